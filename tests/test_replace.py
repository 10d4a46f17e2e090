"""replace_embeddings and restore_embeddings: the same modules and parameters, another forward."""

import copy

import pytest
import torch
from torch import nn

from fast_embedding import FastEmbedding, replace_embeddings, restore_embeddings


class Scaled(nn.Embedding):
    def forward(self, input):
        return 2 * super().forward(input)


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 8, padding_idx=0)
        self.same_tokens = self.tokens
        self.scaled = Scaled(50, 8)
        self.blocks = nn.ModuleList([nn.ModuleDict({"positions": nn.Embedding(400, 8)})])
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        positions = torch.arange(x.shape[-1])
        return self.head(self.tokens(x) + self.scaled(x) + self.blocks[0]["positions"](positions))


def test_only_exact_embeddings_are_replaced():
    model = LanguageModel()
    before = copy.deepcopy(model)
    assert replace_embeddings(model) == 2
    assert type(model.tokens) is type(model.blocks[0]["positions"]) is FastEmbedding
    assert type(model.scaled) is Scaled
    assert model.same_tokens is model.tokens
    assert model.head.weight is model.tokens.weight
    assert replace_embeddings(model) == 0
    x = torch.randint(50, (3, 400))
    assert torch.equal(model(x), before(x))
    assert restore_embeddings(model) == 2
    assert type(model.tokens) is type(model.blocks[0]["positions"]) is nn.Embedding
    assert repr(model) == repr(before)


def test_training_goes_on_as_before():
    """The optimizer, made before, has state for the same parameters; hooks registered before still run."""
    model = LanguageModel()
    reference = copy.deepcopy(model)
    losses, calls = [], []
    for candidate in (model, reference):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(candidate.parameters(), lr=0.01)
        candidate.tokens.register_forward_hook(lambda *_: calls.append("hook"))
        history = []
        for step in range(6):
            if step == 3 and candidate is model:
                replace_embeddings(candidate)
            optimizer.zero_grad()
            loss = candidate(torch.randint(50, (5, 300))).square().mean()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    torch.testing.assert_close(losses[0], losses[1])
    assert len(calls) == 12


def test_references_held_elsewhere_see_the_change():
    model = LanguageModel()
    tokens, weight = model.tokens, model.tokens.weight
    replace_embeddings(model)
    assert type(tokens) is FastEmbedding
    assert tokens.weight is weight


def test_filter_chooses_by_name_and_module():
    model = LanguageModel()
    seen = []

    def keep(name, module):
        seen.append((name, module))
        return name == "blocks.0.positions"

    assert replace_embeddings(model, keep) == 1
    assert type(model.tokens) is nn.Embedding
    assert type(model.blocks[0]["positions"]) is FastEmbedding
    assert seen == [("tokens", model.tokens), ("blocks.0.positions", model.blocks[0]["positions"])]


def test_a_summary_on_request():
    model, lines = LanguageModel(), []
    assert replace_embeddings(model, lambda name, _: name == "tokens", lines.append) == 1
    assert lines == [
        "tokens: Embedding(50, 8, padding_idx=0) is accelerated now",
        "scaled: Scaled(50, 8) is left alone: a subclass, whose forward may be its own",
        "blocks.0.positions: Embedding(400, 8) is left alone by the filter",
    ]
    lines.clear()
    assert replace_embeddings(model.tokens, report=lines.append) == 0
    assert lines == ["the model: FastEmbedding(50, 8, padding_idx=0) is accelerated already"]


def test_the_model_may_be_an_embedding():
    model = nn.Embedding(9, 2)
    assert replace_embeddings(model) == 1
    assert type(model) is FastEmbedding


def test_state_dict_is_unchanged():
    model = LanguageModel()
    expected = model.state_dict()
    replace_embeddings(model)
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert state._metadata == expected._metadata
    LanguageModel().load_state_dict(state)


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_options_are_kept(options):
    model = nn.Sequential(nn.Embedding(50, 4, **options))
    reference = copy.deepcopy(model)
    replace_embeddings(model)
    x = torch.randint(50, (1000,))
    gradients = []
    for candidate in (model, reference):
        candidate(x).sum().backward()
        grad = candidate[0].weight.grad
        gradients.append(grad.coalesce() if grad.is_sparse else grad)
    torch.testing.assert_close(*gradients)
    assert torch.equal(model[0].weight, reference[0].weight)


def test_parametrized_embeddings_are_left_alone():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Embedding(9, 2)))
    assert replace_embeddings(model) == 0
