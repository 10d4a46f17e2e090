"""Accelerate every embedding of the process, with nothing replaced in any model."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _loader, functional

__all__ = ["enable"]

_lock = threading.Lock()
_count = 0
# Whether _count > 0. torch.compile guards on what it reads: a bool, so that a second enable() recompiles nothing.
_enabled = False
_torch_embedding = F.embedding


class enable:  # noqa: N801 (it is called like a function)
    """Accelerate every lookup of the process: nn.Embedding, F.embedding and torch.embedding, of any model.

    It takes effect with the call and lasts until :meth:`disable`, or until the end of a ``with`` block. Several may be
    active at once, in any threads; the last one to end ends it.

    Our kernels stand in for those of ``aten::embedding`` and ``aten::embedding_dense_backward`` on the CPU and on CUDA,
    below autograd, for float32, float64, float16 and bfloat16 weights and int32 and int64 indices. Everything else,
    also ``max_norm``, nn.EmbeddingBag and other devices, runs as ever.
    For ``torch.compile``, whose compiler has a backward of its own, and for ``sparse=True``, whose backward is not an
    operator, ``torch.nn.functional.embedding`` is replaced as well: what was compiled before recompiles at its next
    call. Code that does not look the function up in its module (``torch.embedding``,
    ``from torch.nn.functional import embedding``) keeps torch's sparse backward, and Inductor's where it is compiled.

    On macOS and Windows, where there are no kernels, it does nothing.

    Raises:
        RuntimeError: the native library cannot be loaded; the message says why and what to do. A device without kernels
            raises the same kind of error at its first lookup.

    >>> layer = torch.nn.Embedding(10, 3)
    >>> with enable():
    ...     layer(torch.tensor([1, 2])).sum().backward()
    >>> acceleration = enable()
    >>> acceleration.disable()
    """

    def __init__(self) -> None:
        global _count, _enabled
        self._active = False
        if not _loader.native_platform():
            return
        with _lock:
            if _count == 0:
                _tell_dynamo_where_torchs_function_is()
            _loader.accelerate_aten()
            self._active = True
            _count += 1
            _enabled = True
            if _count == 1:
                F.embedding = _embedding

    def disable(self) -> None:
        """End this acceleration; again, and nothing happens."""
        global _count, _enabled
        with _lock:
            if not self._active:
                return
            self._active = False
            _loader.leave_aten_alone()
            _count -= 1
            _enabled = _count > 0
            # Where someone has put a wrapper of theirs around ours, both stay, and ours gives way below.
            if _count == 0 and F.embedding is _embedding:
                F.embedding = _torch_embedding

    def __enter__(self) -> enable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.disable()


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """What stands in torch.nn.functional.embedding's place: torch's own function but for torch.compile and sparse."""
    if torch.compiler.is_compiling() and _enabled:
        return functional.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if has_torch_function_variadic(input, weight):
        # torch's own function would name itself by looking itself up in its module, and so name us: subclasses of
        # Tensor, and torch.fx, would see a function that they do not know.
        return handle_torch_function(
            _torch_embedding,
            (input, weight),
            input,
            weight,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
        )
    if sparse and _enabled:
        return functional.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    return _torch_embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)


# What torch.jit.script compiles in place of this function.
_embedding.__prepare_scriptable__ = lambda: _torch_embedding  # type: ignore[attr-defined]


def _tell_dynamo_where_torchs_function_is() -> None:
    """Dynamo has rules for torch's functions by name, and looks the names up whenever it likes: F.embedding's must lead
    to torch's own function, or ours would get its rule, which is to keep it in the graph and not to look inside."""
    from torch._dynamo import trace_rules

    maps: list[dict[str, Any]] = trace_rules.torch_name_rule_map  # type: ignore[assignment]
    for rules in maps:
        if "torch.nn.functional.embedding" in rules:
            rules[f"{__name__}._torch_embedding"] = rules.pop("torch.nn.functional.embedding")
