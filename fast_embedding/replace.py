"""Accelerate the embeddings of an existing model in place, and undo it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .modules import FastEmbedding

__all__ = ["replace_embeddings", "restore_embeddings"]


def replace_embeddings(
    model: nn.Module,
    filter: Callable[[str, nn.Module], bool] | None = None,
    report: Callable[[str], object] | None = None,
) -> int:
    """Make every :class:`torch.nn.Embedding` of ``model`` a :class:`fast_embedding.FastEmbedding`.

    The modules stay the same objects: only their class changes, as FastEmbedding adds no state. So parameters, weight
    tying, hooks, optimizer state and other references to the modules keep working. Subclasses of nn.Embedding are
    left alone, for their ``forward`` may be their own.

    Args:
        model: changed in place; may be an nn.Embedding itself.
        filter: called with the name and the module; False leaves the module as it is.
        report: called with a line for each embedding of the model, changed or not; ``print``, say.

    Returns:
        How many modules were changed; one that stands in several places counts once.

    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    >>> replace_embeddings(model)
    1
    >>> model[0]
    FastEmbedding(10, 4)
    >>> replace_embeddings(model, report=print)
    0: FastEmbedding(10, 4) is accelerated already
    0
    """
    chosen = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding):
            continue
        if isinstance(module, FastEmbedding):
            outcome = "is accelerated already"
        elif type(module) is not nn.Embedding:
            outcome = "is left alone: a subclass, whose forward may be its own"
        elif filter is not None and not filter(name, module):
            outcome = "is left alone by the filter"
        else:
            outcome = "is accelerated now"
            chosen.append(module)
        if report is not None:
            report(f"{name or 'the model'}: {module} {outcome}")
    for module in chosen:
        module.__class__ = FastEmbedding
    return len(chosen)


def restore_embeddings(model: nn.Module) -> int:
    """Undo :func:`replace_embeddings`: make every FastEmbedding of ``model`` an nn.Embedding.

    Returns:
        How many modules were changed.

    >>> model = nn.Sequential(FastEmbedding(10, 4))
    >>> restore_embeddings(model)
    1
    >>> model[0]
    Embedding(10, 4)
    """
    replaced: list[nn.Module] = [module for module in model.modules() if type(module) is FastEmbedding]
    for module in replaced:
        module.__class__ = nn.Embedding
    return len(replaced)
