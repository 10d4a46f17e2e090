"""Several processes, each a part of the data, of a table or of the tables: equal to one process that has all."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch.distributed.fsdp")
from distributed_cases import CASES, fully_shard

pytestmark = pytest.mark.compat

# What gloo's processes of torch 2.13 sometimes die of as they end, their work done: 2 of 14 runs of plain DDP in four
# processes, with nothing of ours in them. Such a run proves nothing and is repeated.
TORCHS_ABORT = "terminate called without an active exception"


def torchrun(arguments, **options):
    """The run's standard output; AssertionError with its errors if it failed."""
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    for _ in range(5):
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
        if result.returncode == 0 or TORCHS_ABORT not in result.stderr:
            break
    assert result.returncode == 0, result.stderr[-5000:]
    return result.stdout


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(device type, number of ranks) -> per case what every rank said; started once for all cases."""
    known = {}

    def run(device_type, ranks):
        if (device_type, ranks) not in known:
            folder = tmp_path_factory.mktemp(f"{device_type}{ranks}")
            script = Path(__file__).with_name("distributed_cases.py")
            torchrun(["--standalone", f"--nproc-per-node={ranks}", str(script), device_type, str(folder)])
            by_rank = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]
            known[device_type, ranks] = {case: [outcome[case] for outcome in by_rank] for case in CASES}
        return known[device_type, ranks]

    return run


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_one_process(outcomes, device, case, ranks):
    if device.type == "cuda" and torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    if fully_shard is None and ("fsdp2" in case or case == "checkpoint"):
        pytest.skip(f"torch {torch.__version__} has no public FSDP2")
    for rank, outcome in enumerate(outcomes(device.type, ranks)[case]):
        assert outcome == "passed", f"rank {rank}:\n{outcome}"


ROOT = Path(__file__).resolve().parents[1]
SCALING = ROOT / "docs/scaling.md"
COMMANDS = (
    re.findall(r"^ {4}(torchrun --standalone .*)$", SCALING.read_text(), re.MULTILINE) if SCALING.exists() else []
)


@pytest.mark.skipif(not COMMANDS, reason="the source tree is not here")
@pytest.mark.parametrize("command", COMMANDS or [""], ids=lambda command: command.rpartition(" ")[2])
def test_the_commands_of_the_docs_run(command):
    """As written, but with this Python's torchrun, on the CPU."""
    _, *arguments = shlex.split(command)
    if fully_shard is None and arguments[-1] in ("fsdp", "tensor"):
        pytest.skip(f"torch {torch.__version__} has no public FSDP2, and before 2.5 no public DTensor")
    output = torchrun(
        arguments,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
    )
    first, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", output))
    assert last < 0.7 * first, output
