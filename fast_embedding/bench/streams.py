"""Index streams from real data: the source code of the Python standard library, which every Python carries.

``text()`` is that source as a stream of token ids, for token tables: Zipf-distributed and bursty, as text is.
``tabular()`` is a table of categorical columns, one row a token, for models with many small embeddings: cardinalities
from 8 to 10000, skewed and correlated, with the next token's type as something to predict.

Both depend on the Python installation alone (files in sorted or in a fixed shuffled order) and are kept in memory.
"""

import functools
import hashlib
import io
import itertools
import platform
import random
import re
import sysconfig
import token
import tokenize
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# A line break with its indentation, letters, underscores, digits, any other single mark: identifiers are split at
# underscores and digits, which keeps the vocabulary near 60000, the size of a language model's.
_TOKEN = re.compile(r"\n[ \t]*|[^\W\d_]+|_+|\d+|[^\w\s]")

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}


@functools.cache
def standard_library() -> tuple[Path, tuple[str, ...]]:
    """The folder of the standard library and its source files, as sorted relative POSIX paths.

    Raises:
        RuntimeError: this Python comes without the source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    files = tuple(sorted(path.as_posix() for path in relative if _SKIPPED_FOLDERS.isdisjoint(path.parts)))
    if not files:
        raise RuntimeError(
            f"no source files in {root}: this Python was installed without its standard library's source"
        )
    return root, files


@dataclass(frozen=True)
class TextStream:
    """``ranks``: int64 ``[num_tokens]``; token i is the ``ranks[i]``-th most frequent of the ``vocabulary`` ones.

    ``digest`` is a SHA-256 over the token stream: equal digests, equal streams.
    """

    ranks: Tensor
    vocabulary: int
    num_files: int
    digest: str

    def ids(self, num_embeddings: int) -> Tensor:
        """Token ids below ``num_embeddings``: the most frequent keep their own, the rest share the last one."""
        return self.ranks.clamp(max=num_embeddings - 1)

    def indices(self, num_embeddings: int, num_indices: int) -> Tensor:
        """The first ``num_indices`` ids of the corpus, from its start again where it ends."""
        repeats = -(-num_indices // len(self.ranks))
        return self.ids(num_embeddings).repeat(repeats)[:num_indices]

    def summary(self) -> dict[str, object]:
        """What identifies the stream in a report."""
        return {
            "source": f"standard library of Python {platform.python_version()}",
            "files": self.num_files,
            "tokens": len(self.ranks),
            "vocabulary": self.vocabulary,
            "sha256": self.digest,
        }


@functools.cache
def text() -> TextStream:
    """The whole standard library as one stream of token ids (about 9 million tokens, 3 seconds)."""
    root, files = standard_library()
    first_seen: defaultdict[str, int] = defaultdict(itertools.count().__next__)
    stream = array("q")
    for file in files:
        source = (root / file).read_bytes().decode("utf-8", errors="replace")
        stream.extend(map(first_seen.__getitem__, _TOKEN.findall(source)))

    ids = torch.frombuffer(stream, dtype=torch.int64)
    return TextStream(_frequency_ranks(ids), len(first_seen), len(files), hashlib.sha256(stream).hexdigest())


def _frequency_ranks(ids: Tensor) -> Tensor:
    """Each id replaced by its rank by frequency; equally frequent ids keep their order."""
    by_frequency = torch.bincount(ids).argsort(descending=True, stable=True)
    rank_of = torch.empty_like(by_frequency)
    rank_of[by_frequency] = torch.arange(len(by_frequency))
    return rank_of[ids]


@dataclass(frozen=True)
class TabularStream:
    """``features``: int64 ``[num_rows, num_columns]``, column c below ``cardinalities[c]``.

    ``target``: int64 ``[num_rows]``, below ``num_classes``.
    """

    columns: tuple[str, ...]
    cardinalities: tuple[int, ...]
    features: Tensor
    target: Tensor
    num_classes: int

    def rows(self, num_rows: int) -> Tensor:
        """The first ``num_rows`` rows of the features, from the start again where they end."""
        repeats = -(-num_rows // len(self.features))
        return self.features.repeat(repeats, 1)[:num_rows]


_TABULAR_VOCABULARY = 10000
_MAX_INDENTATION = 16
_MAX_BRACKETS = 8
_MAX_POSITION = 64
_MAX_LENGTH_BUCKET = 16


@functools.cache
def tabular(num_rows: int) -> TabularStream:
    """Lexical features of ``num_rows`` tokens of the standard library (about 4 seconds a million).

    The files come in a shuffled but fixed order, so that few rows already touch many files and packages.

    Args:
        num_rows: the rows wanted; fewer come back where the library is smaller.
    """
    root, files = standard_library()
    packages = {name: i for i, name in enumerate(sorted({_package(file) for file in files}))}
    first_seen: defaultdict[str, int] = defaultdict(itertools.count().__next__)
    columns = [array("q") for _ in range(8)]
    package, source, word, kind, indentation, brackets, position, length = columns

    order = list(range(len(files)))
    random.Random(0).shuffle(order)
    for file_number in order:
        if len(word) > num_rows:  # one row more than wanted: the last has no next token to predict
            break
        depth = nesting = 0
        line = place = -1
        for item in _lexed((root / files[file_number]).read_bytes()):
            if item.type == token.INDENT:
                depth += 1
            elif item.type == token.DEDENT:
                depth -= 1
            elif item.type == token.OP:
                nesting += (item.string in "([{") - (item.string in ")]}")
            place = place + 1 if item.start[0] == line else 0
            line = item.start[0]
            package.append(packages[_package(files[file_number])])
            source.append(file_number)
            word.append(first_seen[item.string])
            kind.append(item.exact_type)
            indentation.append(min(depth, _MAX_INDENTATION - 1))
            brackets.append(max(0, min(nesting, _MAX_BRACKETS - 1)))
            position.append(min(place, _MAX_POSITION - 1))
            length.append(min(len(item.line) // 8, _MAX_LENGTH_BUCKET - 1))

    package_ids, file_ids, words, kinds, *rest = (torch.frombuffer(column, dtype=torch.int64) for column in columns)
    words = _frequency_ranks(words).clamp_(max=_TABULAR_VOCABULARY - 1)

    cardinality = {
        "package": len(packages),
        "file": len(files),
        "token": _TABULAR_VOCABULARY,
        "previous token": _TABULAR_VOCABULARY,
        "type": token.N_TOKENS,
        "previous type": token.N_TOKENS,
        "indentation": _MAX_INDENTATION,
        "open brackets": _MAX_BRACKETS,
        "position in line": _MAX_POSITION,
        "line length": _MAX_LENGTH_BUCKET,
    }
    features = torch.stack((package_ids, file_ids, words, words.roll(1), kinds, kinds.roll(1), *rest), dim=1)
    return TabularStream(
        columns=tuple(cardinality),
        cardinalities=tuple(cardinality.values()),
        features=features[:-1][:num_rows].contiguous(),
        target=kinds[1:][:num_rows].contiguous(),
        num_classes=token.N_TOKENS,
    )


def _package(file: str) -> str:
    return file.split("/", 1)[0]


def _lexed(source: bytes) -> Iterator[tokenize.TokenInfo]:
    """The tokens of a file up to its first error: some of the library's test files are broken on purpose."""
    try:
        yield from tokenize.tokenize(io.BytesIO(source).readline)
    except (SyntaxError, tokenize.TokenError, UnicodeDecodeError):
        return
