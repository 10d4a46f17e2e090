"""Embedding layers for PyTorch whose forward and backward run at the speed of memory.

    >>> import torch
    >>> from fast_embedding import FastEmbedding, FastMultiEmbedding
    >>> FastEmbedding(1000, 64)(torch.tensor([[1, 2], [3, 4]])).shape
    torch.Size([2, 2, 64])
    >>> FastMultiEmbedding([1000, 20], [64, 8])(torch.tensor([[1, 2], [3, 4]])).shape
    torch.Size([2, 72])

Importing the package neither initialises a GPU nor loads the native library; the first lookup does the latter.
"""

__version__ = "0.1.0"

from . import functional
from .everywhere import enable
from .modules import FastEmbedding, FastMultiEmbedding
from .replace import replace_embeddings, restore_embeddings

__all__ = [
    "FastEmbedding",
    "FastMultiEmbedding",
    "__version__",
    "enable",
    "functional",
    "replace_embeddings",
    "restore_embeddings",
]
