"""Models of others, from their configuration: stock, with replace_embeddings and under enable() they train alike."""

import contextlib
import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fast_embedding import FastEmbedding, enable, replace_embeddings, restore_embeddings

pytestmark = [
    pytest.mark.compat,
    # Of the packages, not of what is tested here.
    *(pytest.mark.filterwarnings(f"ignore::{name}") for name in ("UserWarning", "DeprecationWarning", "FutureWarning")),
]

VOCABULARY, BATCH, LENGTH = 300, 4, 40


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def tokens(device):
    # Zipf, as text is: most of the gradient falls on few rows.
    rank = (VOCABULARY ** torch.rand(BATCH, LENGTH)).long().clamp(max=VOCABULARY) - 1
    return rank.to(device)


def gpt2(t):
    return t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, pad_token_id=0)
    )


def bert(t):
    return t.BertForMaskedLM(
        t.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
    )


def llama(t):
    return t.LlamaForCausalLM(
        t.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            pad_token_id=0,
        )
    )


def t5(t):
    return t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    )


def gemma(t):
    """Its embedding is a subclass of nn.Embedding that scales, which only enable() reaches."""
    return t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            intermediate_size=64,
        )
    )


TRANSFORMERS = {"GPT-2": gpt2, "BERT": bert, "Llama": llama, "T5": t5, "Gemma": gemma}


@pytest.fixture(params=TRANSFORMERS)
def language_model(request, transformers, device):
    """The model, and how many of its modules replace_embeddings must find."""
    torch.manual_seed(0)
    model = TRANSFORMERS[request.param](transformers).to(device).train()
    embeddings = sum(type(module) is nn.Embedding for module in model.modules())
    assert embeddings > 0 or request.param == "Gemma"
    return model, embeddings


def language_loss(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


def train(model, loss, steps=3):
    """Losses, and the gradients of the last step; dropout is the same in every call."""
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    assert losses[-1] < losses[0]
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_three_ways_agree(model, loss, embeddings, **tolerance):
    replaced, accelerated = copy.deepcopy(model), copy.deepcopy(model)
    expected = train(model, loss)
    assert replace_embeddings(replaced) == embeddings
    torch.testing.assert_close(train(replaced, loss), expected, **tolerance)
    with enable():
        torch.testing.assert_close(train(accelerated, loss), expected, **tolerance)
    # And back: a checkpoint of the one is one of the other.
    assert restore_embeddings(replaced) == embeddings
    model.load_state_dict(replaced.state_dict())


CLOSE = {"rtol": 2e-3, "atol": 2e-4}


def test_transformers_train_alike(language_model, tokens):
    model, embeddings = language_model
    assert_three_ways_agree(model, lambda model: language_loss(model, tokens), embeddings, **CLOSE)


def test_gradient_checkpointing(language_model, tokens):
    model, embeddings = language_model
    model.gradient_checkpointing_enable()
    assert_three_ways_agree(model, lambda model: language_loss(model, tokens), embeddings, **CLOSE)


def test_resized_and_tied(language_model, tokens):
    """More tokens, then training: ties, and FastEmbedding's class where transformers keeps the module's."""
    model, embeddings = language_model
    reference = copy.deepcopy(model)
    replace_embeddings(model)
    results = []
    for candidate in (model, reference):
        torch.manual_seed(1)
        candidate.resize_token_embeddings(VOCABULARY + 37, mean_resizing=False)
        tied = candidate.get_input_embeddings().weight is candidate.get_output_embeddings().weight
        assert tied == candidate.config.tie_word_embeddings
        assert candidate.get_input_embeddings().num_embeddings == VOCABULARY + 37
        if candidate is model:
            replace_embeddings(candidate)  # transformers may have put a new nn.Embedding in its place
        results.append(train(candidate, lambda candidate: language_loss(candidate, tokens + 37)))
    torch.testing.assert_close(*results, **CLOSE)
    if embeddings:
        assert type(model.get_input_embeddings()) is FastEmbedding


def test_saved_and_loaded(language_model, tokens, tmp_path):
    model, embeddings = language_model
    replace_embeddings(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).to(tokens.device)
    model.eval()
    loaded.eval()
    assert not any(isinstance(module, FastEmbedding) for module in loaded.modules())
    torch.testing.assert_close(language_loss(loaded, tokens), language_loss(model, tokens))
    with enable():
        torch.testing.assert_close(language_loss(loaded, tokens), language_loss(model, tokens))
    assert replace_embeddings(loaded) == embeddings


def test_generation(transformers, device, tokens):
    """Lookups of one token, and of a batch with a cache of the earlier ones."""
    model = gpt2(transformers).to(device).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **options)
    with enable():
        assert torch.equal(model.generate(tokens, **options), expected)
    replace_embeddings(model)
    assert torch.equal(model.generate(tokens, **options), expected)


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_peft_lora_on_the_embedding(transformers, device, tokens, name):
    peft = pytest.importorskip("peft")
    target = {"GPT-2": "wte", "Llama": "embed_tokens"}[name]

    def adapted(replace_before, replace_after):
        torch.manual_seed(0)
        model = TRANSFORMERS[name](transformers).to(device).train()
        if replace_before:
            replace_embeddings(model)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[target], init_lora_weights=False))
        if replace_after:
            replace_embeddings(model)
        return model

    def loss(model):
        return language_loss(model, tokens)

    expected = train(adapted(False, False), loss)
    assert any("lora_embedding" in parameter for parameter in expected[1])
    torch.testing.assert_close(train(adapted(True, False), loss), expected, **CLOSE)
    torch.testing.assert_close(train(adapted(False, True), loss), expected, **CLOSE)
    with enable():
        torch.testing.assert_close(train(adapted(False, False), loss), expected, **CLOSE)
    merged = [adapted(fast, False).merge_and_unload().eval() for fast in (False, True)]
    torch.testing.assert_close(*(language_loss(model, tokens) for model in merged))


# ---- Graphs


def molecules(geometric, atom_sizes, bond_sizes):
    def molecule():
        atoms, bonds = 20, 44
        x = torch.stack([torch.randint(size, (atoms,)) for size in atom_sizes], 1)
        edge_attr = torch.stack([torch.randint(size, (bonds,)) for size in bond_sizes], 1)
        return geometric.data.Data(x=x, edge_index=torch.randint(atoms, (2, bonds)), edge_attr=edge_attr)

    return geometric.data.Batch.from_data_list([molecule() for _ in range(8)])


def test_torch_geometric_with_ogbs_encoders(device, monkeypatch):
    """OGB's own AtomEncoder and BondEncoder, which add tables up in place, in front of a convolution."""
    geometric = pytest.importorskip("torch_geometric")
    monkeypatch.setitem(sys.modules, "outdated", None)  # with which ogb asks the network for newer versions of itself
    encoders = pytest.importorskip("ogb.graphproppred.mol_encoder")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.atoms, self.bonds = encoders.AtomEncoder(16), encoders.BondEncoder(16)
            mlp = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
            self.conv = geometric.nn.GINEConv(mlp)
            self.head = nn.Linear(16, 1)

        def forward(self, data):
            hidden = self.conv(self.atoms(data.x), data.edge_index, self.bonds(data.edge_attr))
            return self.head(geometric.nn.global_add_pool(hidden, data.batch)).squeeze(-1)

    sizes = encoders.full_atom_feature_dims, encoders.full_bond_feature_dims
    batch = molecules(geometric, *sizes).to(device)
    target = torch.arange(8.0, device=device)
    model = Net().to(device)
    assert_three_ways_agree(model, lambda model: F.mse_loss(model(batch), target), sum(map(len, sizes)), **CLOSE)


# ---- Lightning


@pytest.mark.parametrize("way", ["replace_embeddings", "enable"])
def test_lightning_loop(device, way, tmp_path):
    lightning = pytest.importorskip("pytorch_lightning")

    class Tagger(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(nn.Embedding(VOCABULARY, 16, padding_idx=0), nn.Linear(16, VOCABULARY))
            self.losses = []

        def training_step(self, batch, _):
            loss = F.cross_entropy(self.model(batch[0]).flatten(0, 1), batch[0].flatten())
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.05)

    data = torch.utils.data.TensorDataset(torch.randint(VOCABULARY, (64, 30)))
    losses = []
    for fast in (False, True):
        lightning.seed_everything(0, verbose=False)
        module = Tagger()
        if fast and way == "replace_embeddings":
            assert replace_embeddings(module) == 1
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            logger=False,
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with enable() if fast and way == "enable" else contextlib.nullcontext():
            trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16))
        losses.append(module.losses)
        Tagger.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    torch.testing.assert_close(*losses, **CLOSE)
    assert losses[0][-1] < losses[0][0]
