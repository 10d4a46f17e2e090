"""The C ABI of csrc/include/fast_embedding.h for ctypes: what the kernel tests call, without torch's binding."""

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import fast_embedding

OK, INVALID_ARGUMENT, UNSUPPORTED, WORKSPACE_TOO_SMALL, INDEX_OUT_OF_RANGE, CUDA_ERROR = range(6)
FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(4)
INT32, INT64 = range(2)
CONCAT, SUM = range(2)
OWN, PRIVATE, TILE, SORT = range(4)
STRATEGIES = {OWN: "own", PRIVATE: "private", TILE: "tile", SORT: "sort"}
ABI_VERSION = 5


class Table(Structure):
    _fields_ = [
        (name, c_int64) for name in ("num_embeddings", "embedding_dim", "weight_offset", "weight_stride", "padding_idx")
    ]


_LOOKUP = [
    ("scalar_type", c_int32),
    ("index_type", c_int32),
    ("num_tables", c_int64),
    ("tables", POINTER(Table)),
    ("num_rows", c_int64),
    ("indices", c_void_p),
    ("index_row_stride", c_int64),
    ("index_table_stride", c_int64),
]


class ForwardArgs(Structure):
    _fields_ = [
        *_LOOKUP,
        ("weight", c_void_p),
        ("output", c_void_p),
        ("output_stride", c_int64),
        ("combination", c_int32),
    ]


class BackwardArgs(Structure):
    _fields_ = [
        *_LOOKUP,
        ("grad_output", c_void_p),
        ("grad_output_stride", c_int64),
        ("grad_weight", c_void_p),
        ("grad_weight_numel", c_int64),
        ("deterministic", c_int32),
        ("scale_grad_by_freq", c_int32),
        ("combination", c_int32),
    ]


class Device(Structure):
    _fields_ = [
        ("compute_capability", c_int32),
        ("num_sms", c_int32),
        ("l2_bytes", c_int64),
        ("shared_bytes_per_block", c_int64),
        ("shared_bytes_per_sm", c_int64),
        ("max_cluster_blocks", c_int32),
    ]


class PlanQuery(Structure):
    _fields_ = [
        ("scalar_type", c_int32),
        ("num_tables", c_int64),
        ("num_embeddings", c_int64),
        ("embedding_dim", c_int64),
        ("num_indices", c_int64),
        ("grad_weight_numel", c_int64),
        ("deterministic", c_int32),
        ("device", Device),
        ("scale_grad_by_freq", c_int32),
        ("sparse", c_int32),
    ]


class Plan(Structure):
    _fields_ = [
        (name, c_int32)
        for name in ("strategy", "tile", "digit_bits", "sort_tile", "threads", "splits", "float32_scratch", "cluster")
    ]

    def __repr__(self):
        return f"Plan({', '.join(f'{name}={getattr(self, name)}' for name, _ in self._fields_)})"


def library_path(name: str) -> Path:
    """Path of the installed kernel library "cpu" or "cuda"; it need not exist."""
    return Path(fast_embedding.__file__).parent / "lib" / f"libfast_embedding_{name}.so"


def declare_plan(library: ctypes.CDLL) -> ctypes.CDLL:
    library.fe_plan_embedding_backward.argtypes = [POINTER(PlanQuery), POINTER(Plan)]
    library.fe_plan_embedding_backward.restype = c_int32
    library.fe_plan_private_tables.argtypes = [POINTER(BackwardArgs), POINTER(Device), c_char_p, POINTER(Plan)]
    return library


def load_cuda(path: Path) -> ctypes.CDLL:
    library = declare_plan(ctypes.CDLL(str(path)))
    call = [c_void_p, POINTER(c_size_t), c_void_p]
    library.fe_cuda_embedding_forward.argtypes = [POINTER(ForwardArgs), *call]
    library.fe_cuda_embedding_backward.argtypes = [POINTER(BackwardArgs), *call]
    library.fe_cuda_embedding_backward_by.argtypes = [POINTER(Plan), POINTER(BackwardArgs), *call]
    library.fe_cuda_embedding_sparse_count.argtypes = [POINTER(Plan), POINTER(BackwardArgs), c_void_p, *call]
    library.fe_cuda_embedding_sparse_backward.argtypes = [
        POINTER(Plan), POINTER(BackwardArgs), c_int64, c_void_p, *call
    ]  # fmt: skip
    library.fe_cuda_last_error.restype = c_char_p
    library.fe_cuda_architectures.restype = c_char_p
    return library


def make_plan(library: ctypes.CDLL, query: PlanQuery) -> Plan:
    plan = Plan()
    status = library.fe_plan_embedding_backward(byref(query), byref(plan))
    if status != OK:
        raise ValueError(f"fe_plan_embedding_backward returned {status}")
    return plan


def private_tables(library: ctypes.CDLL, args: BackwardArgs, device: Device) -> tuple[list[bool], Plan]:
    """Which tables of a call PRIVATE takes together, and by which plan."""
    plan = Plan()
    chosen = ctypes.create_string_buffer(args.num_tables)
    status = library.fe_plan_private_tables(byref(args), byref(device), chosen, byref(plan))
    if status != OK:
        raise ValueError(f"fe_plan_private_tables returned {status}")
    return [byte != 0 for byte in chosen.raw], plan
