"""Qwen3: its size, its first weights, what a token sees, what it costs, and the directories that others read."""

import dataclasses
import json
import math
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
import transformers

from mlx_gpt import load, models
from mlx_gpt.config import Config, ModelConfig
from mlx_gpt.errors import UserError
from mlx_gpt.generation.cache import BatchCache, Rows
from mlx_gpt.models import qwen3
from mlx_gpt.models.base import seed_dropout
from mlx_gpt.models.directory import load_model, save_model
from mlx_gpt.presets import PRESETS
from mlx_gpt.settings import build
from tests.models.pieces import logits_in_pieces

KINDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_embeddings": False},
    "grouped": {"n_head": 4, "n_kv_head": 2},
}


@pytest.fixture
def make(make_model):
    """Make a tiny Qwen3, as it is for use."""
    return lambda **settings: make_model(model_type="qwen3", **settings).eval()


@pytest.fixture(params=KINDS)
def model(request, make):
    return make(**KINDS[request.param])


def logits(model, ids):
    return np.array(model(mx.array(ids)))


# ---- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_has_about_as_many_parameters_as_gpt2(preset):
    config = build(Config, PRESETS[preset]).model
    gpt2, own = (
        models.n_params(models.create(dataclasses.replace(config, model_type=name))) for name in ("gpt2", "qwen3")
    )
    assert own == pytest.approx(gpt2, rel=0.03)


def test_flops_per_token_are_those_of_the_products():
    """Worked out by hand: 6 for each weight that multiplies, 12 for each block, channel and position attended to."""
    sizes = ModelConfig("qwen3", vocab_size=100, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, n_positions=32)
    attention, mlp, norms = 16 * 16 + 2 * 16 * 8 + 16 * 16, 3 * 16 * 64, 2 * 16 + 2 * 4
    products = 2 * (attention + mlp + norms) + 16 + 100 * 16
    for tied in (True, False):  # an embedding that is not the head multiplies nothing
        model = models.create(dataclasses.replace(sizes, tie_embeddings=tied))
        assert models.flops_per_token(model, 10) == 6 * products + 12 * 2 * 16 * 10


# ---- first weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero projections"])
def test_first_weights_have_the_spread_that_they_should(weights_of, zero):
    sizes = ModelConfig("qwen3", vocab_size=512, n_layer=4, n_head=2, n_embd=64, tie_embeddings=False)
    for name, weight in weights_of(models.init_weights(models.create(sizes), 7, zero_projections=zero)).items():
        if weight.ndim == 1:
            assert np.all(weight == 1), name
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            assert weight.std() == (0 if zero else pytest.approx(0.02 / math.sqrt(2 * 4), rel=0.06)), name
        else:
            assert weight.std() == pytest.approx(0.02, rel=0.06), name


# ---- what a token sees ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["generating", "training with dropout"])
def test_a_later_token_never_changes_what_came_before(make, ids, dropout):
    model = make(n_head=4, n_kv_head=2, dropout=dropout).train(dropout > 0)
    changed = ids.copy()
    changed[:, 9] = (changed[:, 9] + 1) % models.vocab_size(model)
    seed_dropout(model, mx.random.key(5) if dropout else None)
    before, after = logits(model, ids), logits(model, changed)
    np.testing.assert_allclose(after[:, :9], before[:, :9], atol=1e-6)
    assert np.all(np.abs(after[:, 9:] - before[:, 9:]).max(axis=(0, 2)) > 1e-3)  # and every later token sees it


def test_the_order_of_tokens_counts(model, ids):
    """Attention without positions would give the last token the same logits."""
    swapped = ids[:, [1, 0, *range(2, 17)]]
    assert np.abs(logits(model, swapped) - logits(model, ids))[:, -1].max() > 1e-2


@pytest.mark.parametrize("pieces", [[17], [1] * 17, [5, 3, 1, 7, 1]], ids=str)
def test_reading_in_pieces_gives_the_logits_of_the_whole(model, ids, pieces):
    np.testing.assert_allclose(logits_in_pieces(model, ids, pieces), logits(model, ids), atol=1e-5)


def test_sequences_of_different_lengths_are_read_as_alone(model, ids):
    together = BatchCache(len(model.layers), Rows(2, capacity=32))
    for length in (9, 4):
        alone = BatchCache(len(model.layers), Rows(1, capacity=32))
        alone.rows.begin()
        alone.rows.grow(length)
        model(mx.array(ids[:1, :length]), alone.layers)
        together.add(alone)
    for step in range(3):
        together.rows.grow(1)
        found = np.array(model(mx.array(ids[0, [[9 + step], [4 + step]]]), together.layers))[:, 0]
        for row, length in enumerate((9, 4)):
            whole = logits(model, ids[:1, : length + step + 1])[0, -1]
            np.testing.assert_allclose(found[row], whole, atol=1e-5)


# ---- directories ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(model, bpe, tmp_path):
    save_model(tmp_path, model, bpe)
    return tmp_path


def test_a_directory_from_here_opens_elsewhere(model, folder, ids):
    expected = logits(model, ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(theirs, transformers.Qwen3ForCausalLM)
    with torch.no_grad():
        np.testing.assert_allclose(theirs.eval()(torch.tensor(ids)).logits.numpy(), expected, atol=1e-4)
    other, *_ = mlx_lm.load(str(folder))
    assert type(other).__module__ == "mlx_lm.models.qwen3"
    np.testing.assert_allclose(logits(other, ids), expected, atol=1e-4)
    again = load_model(folder)
    assert type(again) is qwen3.Model
    np.testing.assert_allclose(logits(again, ids), expected, atol=1e-5)


def edit(folder, **changes):
    """Change keys of config.json; `...` removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def test_keys_that_say_nothing_here_stay_in_the_config(make, bpe, tmp_path):
    save_model(tmp_path, make(), bpe)
    edit(tmp_path, max_window_layers=28, note={"by": "somebody"})
    save_model(tmp_path / "again", load_model(tmp_path), bpe)
    config = json.loads((tmp_path / "again/config.json").read_text())
    assert (config["max_window_layers"], config["note"]) == (28, {"by": "somebody"})
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, True),
        ({"rope_parameters": LINEAR}, False),
        ({"attention_bias": True}, False),
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, False),
    ],
    ids=["plain", "scaled positions", "biases", "window"],
)
def test_what_transformers_saved_opens_as_ours_if_it_is_plain(tmp_path, ids, settings, ours):
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    torch.manual_seed(0)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, **settings)).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight += 0.2 * torch.randn_like(weight)
        expected = theirs(torch.tensor(ids)).logits.numpy()
    theirs.save_pretrained(tmp_path)
    if settings.get("attention_bias"):  # which mlx-lm's Qwen3 lacks, too
        with pytest.raises(UserError, match=r"bias, which config\.json has no place for\.$"):
            load_model(tmp_path)
        return
    model = load_model(tmp_path)
    assert type(model).__module__ == ("mlx_gpt.models.qwen3" if ours else "mlx_lm.models.qwen3")
    if "sliding_window" not in settings:  # mlx-lm's Qwen3 sees everything
        np.testing.assert_allclose(logits(model, ids), expected, atol=1e-4)


def test_without_mlx_lm_a_plain_one_opens_and_another_says_what_to_install(make, bpe, tmp_path, ids, monkeypatch):
    model = make()
    save_model(tmp_path, model, bpe)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    np.testing.assert_allclose(logits(load_model(tmp_path), ids), logits(model, ids), atol=1e-5)
    edit(tmp_path, rope_scaling=LINEAR)
    with pytest.raises(UserError, match=r"A model of type qwen3 with these settings needs mlx-lm: run `pip install"):
        load_model(tmp_path)


# ---- hostile directories --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": [1]}, "can't be read as qwen3"),
        ({"rope_parameters": "linear"}, "can't be read as qwen3"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "can't be read as qwen3"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}, "rope_theta": ...}, "rope_theta is missing"),
        ({"rope_theta": "10000"}, "`rope_theta` must be a number above 0, not '10000'"),
        ({"rope_theta": 10**400}, "can't be read as qwen3"),
        ({"rope_theta": float("nan")}, "`rope_theta`"),
        ({"rope_theta": ..., "rope_parameters": ...}, "config.json lacks `rope_theta`"),
        ({"rms_norm_eps": 0}, "`rms_norm_eps` must be a number above 0, not 0"),
        ({"rms_norm_eps": None}, "`rms_norm_eps`"),
        ({"head_dim": ...}, "config.json lacks `head_dim`"),
        ({"head_dim": "8"}, "`head_dim` must be a whole number of at least 1, not '8'"),
        ({"head_dim": 16}, "has shape"),
        ({"num_key_value_heads": 0}, "`num_key_value_heads` must be a whole number of at least 1, not 0"),
        ({"num_key_value_heads": 3}, "must divide"),
        ({"num_attention_heads": True}, "`num_attention_heads`"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, "has shape"),
        ({"num_hidden_layers": 10**12}, "too few or too small"),
        ({"intermediate_size": 2**40}, "can't be read as qwen3"),
        ({"max_position_embeddings": "many"}, "`max_position_embeddings`"),
        ({"tie_word_embeddings": "yes"}, "`tie_word_embeddings` must be true or false"),
        ({"tie_word_embeddings": False}, "no tensor lm_head.weight"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_a_config_that_is_not_of_these_weights_is_refused(make, bpe, tmp_path, changes, said):
    save_model(tmp_path, make(**KINDS["grouped"]), bpe)
    edit(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    sentence = str(caught.value)
    assert said in sentence
    assert sentence.isprintable()
    assert sentence.endswith(".")
