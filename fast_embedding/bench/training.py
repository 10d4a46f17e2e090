"""Training runs on real data: the same model from the same seed, once with ``nn.Embedding`` and once with ours.

``tokens``: the next token of the standard library's source from the ones before, one table whose weight is tied to the
output layer. ``tabular``: the type of the next token from ten categorical columns of this one, ten tables.

The two models of a pair step in turn on the same batches. Their losses and tables may differ by rounding alone: the
optimizer is plain SGD with momentum, which, unlike Adam, does not blow up a gradient's rounding where the gradient is
near zero, and the models are smooth.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fast_embedding import FastMultiEmbedding, replace_embeddings

from . import streams
from .measure import BASELINE, OURS, relative_difference
from .shapes import TABULAR_DIMS, TABULAR_ROWS
from .timing import summarise

WARM_UP_STEPS = 8

# Relative: of the loss at any step, and of all that the tables learnt. Seen in 200 steps: 2e-7 and 7e-7, which is
# rounding; 3e-3 and 4e-2 where the gradient misses the row of the 6th token by frequency, 4e-6 and 1e-3 the 101st.
LOSS_TOLERANCE = 1e-4
TABLE_TOLERANCE = 1e-4

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TrainingSize:
    """What to train. ``context`` tokens predict the next; the tabular tables have the dimensions of ``shapes``."""

    steps: int
    vocabulary: int
    token_dim: int
    context: int
    token_batch: int
    tabular_batch: int
    hidden: int


class TokenModel(nn.Module):
    """A window of tokens, a hidden layer, and the table once more as output layer (tied weights)."""

    def __init__(self, size: TrainingSize) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.token_dim)
        nn.init.normal_(self.embedding.weight, std=size.token_dim**-0.5)
        self.hidden = nn.Linear(size.context * size.token_dim, size.hidden)
        self.output = nn.Linear(size.hidden, size.token_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 ``[batch, context]`` to logits ``[batch, vocabulary]``."""
        hidden = torch.tanh(self.hidden(self.embedding(tokens).flatten(1)))
        return functional.linear(self.output(hidden), self.embedding.weight)


class SeparateTables(nn.Module):
    """One ``nn.Embedding`` a column, concatenated."""

    def __init__(self, num_embeddings: tuple[int, ...], embedding_dims: tuple[int, ...]) -> None:
        super().__init__()
        sizes = zip(num_embeddings, embedding_dims, strict=True)
        self.tables = nn.ModuleList(nn.Embedding(*size) for size in sizes)

    def forward(self, features: Tensor) -> Tensor:
        """int64 ``[batch, columns]`` to ``[batch, sum of dims]``."""
        return torch.cat([table(features[:, column]) for column, table in enumerate(self.tables)], dim=1)


class TabularModel(nn.Module):
    """Categorical columns, two layers, one class of many."""

    def __init__(self, cardinalities: tuple[int, ...], hidden: int, num_classes: int) -> None:
        super().__init__()
        self.embedding: nn.Module = SeparateTables(cardinalities, TABULAR_DIMS)
        self.hidden = nn.Linear(sum(TABULAR_DIMS), hidden)
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """int64 ``[batch, columns]`` to logits ``[batch, num_classes]``."""
        logits: Tensor = self.output(torch.tanh(self.hidden(self.embedding(features))))
        return logits


def run_tokens(size: TrainingSize, device: torch.device, seed: int, advance: Callable[[], None]) -> dict[str, object]:
    """Trains the token model; see ``_compare`` for what comes back."""
    torch.manual_seed(seed)
    baseline = TokenModel(size)
    ours = copy.deepcopy(baseline)
    replace_embeddings(ours)

    window = torch.arange(size.context + 1)
    positions = size.steps * size.token_batch
    tokens = streams.text().indices(size.vocabulary, positions + size.context).to(device)

    def batch(step: int) -> Batch:
        # Samples of a batch stand far apart in the corpus, those of one place follow each other from step to step.
        starts = torch.arange(size.token_batch) * size.steps + step
        rows = tokens[(starts[:, None] + window).to(device)]
        return rows[:, :-1], rows[:, -1]

    settings = {
        "vocabulary": size.vocabulary,
        "embedding_dim": size.token_dim,
        "context": size.context,
        "batch": size.token_batch,
    }
    return {"model": "tokens", **settings, **_compare(baseline, ours, batch, 0.1, size, device, advance)}


def run_tabular(size: TrainingSize, device: torch.device, seed: int, advance: Callable[[], None]) -> dict[str, object]:
    """Trains the tabular model; see ``_compare`` for what comes back."""
    table = streams.tabular(TABULAR_ROWS)
    torch.manual_seed(seed)
    baseline = TabularModel(table.cardinalities, size.hidden, table.num_classes)
    ours = copy.deepcopy(baseline)
    assert isinstance(ours.embedding, SeparateTables)
    ours.embedding = FastMultiEmbedding.from_embeddings(list(ours.embedding.tables))  # type: ignore[arg-type]

    features, target = table.features.to(device), table.target.to(device)
    generator = torch.Generator().manual_seed(seed)

    def batch(_: int) -> Batch:
        rows = torch.randint(len(target), (size.tabular_batch,), generator=generator).to(device)
        return features[rows], target[rows]

    settings = {"columns": list(table.columns), "cardinalities": list(table.cardinalities), "batch": size.tabular_batch}
    return {"model": "tabular", **settings, **_compare(baseline, ours, batch, 0.1, size, device, advance)}


def _tables(model: TokenModel | TabularModel) -> list[Tensor]:
    """Copies of the model's embedding tables."""
    embedding = model.embedding
    separate = embedding.tables() if isinstance(embedding, FastMultiEmbedding) else embedding.parameters()
    return [table.detach().clone() for table in separate]


def _compare(
    baseline: TokenModel | TabularModel,
    ours: TokenModel | TabularModel,
    batch: Callable[[int], Batch],
    learning_rate: float,
    size: TrainingSize,
    device: torch.device,
    advance: Callable[[], None],
) -> dict[str, object]:
    """Steps both models on the same batches, in alternating order.

    Returns:
        ``losses`` and ``step_us`` (a ``Timing`` as a dict, warm-up excluded) by model, the largest relative difference
        of the losses at any step, that of all that the tables learnt, and whether both ``agree``.
    """
    initial = [table.to(device) for table in _tables(baseline)]
    models = {BASELINE: baseline.to(device), OURS: ours.to(device)}
    optimizers = {
        name: torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9) for name, model in models.items()
    }
    losses: dict[str, list[float]] = {name: [] for name in models}
    times: dict[str, list[float]] = {name: [] for name in models}

    def step(name: str, inputs: Tensor, target: Tensor) -> None:
        start = time.perf_counter()
        optimizers[name].zero_grad()
        loss = functional.cross_entropy(models[name](inputs), target)
        torch.autograd.backward(loss)
        optimizers[name].step()
        losses[name].append(loss.item())  # waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize()
        times[name].append((time.perf_counter() - start) * 1e6)

    for number in range(size.steps):
        inputs, target = batch(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        for name in (BASELINE, OURS) if number % 2 == 0 else (OURS, BASELINE):
            step(name, inputs, target)
        advance()

    pairs = zip(losses[OURS], losses[BASELINE], strict=True)
    difference = max(abs(loss - reference) / abs(reference) for loss, reference in pairs)
    learnt, expected = (
        [table - before for table, before in zip(_tables(model), initial, strict=True)] for model in (ours, baseline)
    )
    table_difference = relative_difference(learnt, expected)
    return {
        "steps": size.steps,
        "losses": losses,
        "first_loss": statistics.fmean(losses[OURS][:WARM_UP_STEPS]),
        "last_loss": statistics.fmean(losses[OURS][-WARM_UP_STEPS:]),
        "max_relative_difference": difference,
        "table_difference": table_difference,
        "agree": difference <= LOSS_TOLERANCE and table_difference <= TABLE_TOLERANCE,
        "step_us": {name: summarise(samples[WARM_UP_STEPS:]).as_dict() for name, samples in times.items()},
    }
