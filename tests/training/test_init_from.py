"""A run that starts from weights: a run of one's own, or a model of an architecture that mlx-lm knows."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

from mlx_gpt.api import load
from mlx_gpt.errors import UserError
from mlx_gpt.settings import read_toml
from mlx_gpt.training import checkpoint, setup

from .conftest import Silent

QWEN3 = {"n_head": 4, "n_positions": 64}  # those sizes of the weights that differ from the other runs here
SMALL = {
    **QWEN3,
    "seq_len": 16,
    "batch_size": 4,
    "max_steps": 6,
    "eval_every": 3,
    "save_every": 3,
    "learning_rate": 1e-3,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, eager, unmeasured):
    """An empty folder, where nothing is compiled."""
    monkeypatch.chdir(tmp_path)


def val_losses(run):
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [record["val_loss"] for record in map(json.loads, lines) if "val_loss" in record]


@pytest.fixture
def qwen3(tmp_path, bpe):
    """A directory that transformers wrote, with a tokenizer."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    config = transformers.Qwen3Config(
        **sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen3")
    (tmp_path / "qwen3/tokenizer.json").write_text(bpe.to_json())
    return tmp_path / "qwen3"


def test_it_begins_where_the_other_run_ended(train, whole):
    outcome = train("run", init_from=str(whole.folder), max_steps=2)
    assert val_losses("run")[0] == pytest.approx(whole.best_loss, rel=1e-6)
    assert load("run")[1].to_json() == load(whole.folder)[1].to_json()
    assert outcome.finished


def test_what_is_not_given_comes_from_the_weights(corpus, whole):
    with setup.set_up({"data": str(corpus), "init_from": str(whole.folder)}, Silent(), dry_run=True) as run:
        network, training = run.config.model, run.training
        sizes = [network.n_layer, network.n_head, network.n_embd, network.n_positions, network.vocab_size]
        assert sizes == [2, 2, 32, 32, 259]
        assert training.seq_len == 32
        assert training.learning_rate == pytest.approx(4e-3)
        assert run.config.out == f"weights/{whole.folder.name}-{corpus.name}"


@pytest.mark.parametrize(("name", "value"), [("n_embd", 64), ("n_positions", 64), ("model_type", "qwen3")])
def test_a_size_that_is_not_that_of_the_weights_is_refused(train, whole, name, value):
    with pytest.raises(UserError, match=rf"`{name}` {value} contradicts the weights in .*: omit it"):
        train("run", init_from=str(whole.folder), **{name: value})


@pytest.mark.parametrize(("name", "value"), [("n_kv_head", 1), ("tie_embeddings", False)])
def test_a_setting_of_the_network_that_the_weights_do_not_have_is_refused(train, whole, name, value):
    with pytest.raises(UserError, match=rf"`{name}` can't be set for the weights in .*: omit it"):
        train("run", init_from=str(whole.folder), **{name: value})


def test_another_run_starts_from_the_weights_of_an_untied_qwen3_with_its_own_settings(train):
    """As the message for a run without an intact checkpoint advises."""
    train("run", model_type="qwen3", tie_embeddings=False, max_steps=1)
    settings = read_toml("run/run.toml") | {"init_from": "run/best", "out": "run-2"}
    train("run-2", only=settings)
    assert read_toml("run-2/run.toml")["tie_embeddings"] is False
    assert "lm_head.weight" in mx.load("run-2/best/model.safetensors")


def test_a_run_from_weights_takes_small_steps_and_enough_of_them(train, whole, sentences):
    """A text of a few windows, of which ten epochs would be a handful of steps."""
    Path("text").mkdir()
    for split in ("train", "val"):
        Path(f"text/{split}.txt").write_text("".join(sentences[:10]), encoding="utf-8")
    planned = train("run", only={"data": "text", "out": "run", "init_from": str(whole.folder)}, dry_run=True)
    assert any(line.startswith("Steps        300, each of 128 tokens ") for line in planned.lines)
    assert not any("Hint" in line for line in planned.lines)
    fresh = train("run", data="text", max_steps=None, dry_run=True)
    assert any("(10.0 epochs)" in line for line in fresh.lines)


def test_another_start_is_refused_on_a_resume(train, whole, qwen3):
    train("run", init_from=str(whole.folder), stop_after=1)
    with pytest.raises(UserError, match=r"`init_from` was .* when run began and can't become"):
        train("run", init_from=str(qwen3), resume="run")


def test_another_architecture_trains_resumes_and_opens_elsewhere(train, qwen3):
    train("whole", init_from=str(qwen3), **SMALL)
    assert val_losses("whole")[-1] < val_losses("whole")[0] - 0.1
    assert train("half", init_from=str(qwen3), **SMALL, stop_after=3).step == 3
    assert train("half", init_from=str(qwen3), **SMALL, resume="half").finished
    final = "final/model.safetensors"
    assert Path("half", final).read_bytes() == Path("whole", final).read_bytes()
    last = [checkpoint.all_checkpoints(Path(run))[-1] / "optimizer.safetensors" for run in ("half", "whole")]
    assert last[0].read_bytes() == last[1].read_bytes()

    ids = np.arange(12)[None] % 300
    theirs = transformers.Qwen3ForCausalLM.from_pretrained("whole/final").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(np.array(load("whole/final")[0](mx.array(ids))), expected, atol=1e-4)


def test_the_dropout_is_the_run_s(train, whole):
    """The other run trained with dropout; this one trains without unless it is asked to."""
    train("run", init_from=str(whole.folder), max_steps=1, dropout=0.0)
    train("again", init_from=str(whole.folder), max_steps=1, dropout=0.5)
    weights = [Path(run, "final/model.safetensors").read_bytes() for run in ("run", "again")]
    assert weights[0] != weights[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_from": "nowhere"}, "There is no nowhere"),
        ({"init_from": "qwen3", "seq_len": 65}, "use --seq-len 64 or less"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(train, qwen3, settings, words):
    with pytest.raises(UserError, match=words):
        train("run", **{**SMALL, **settings})
    assert not Path("run").exists()


def test_a_tokenizer_of_another_model_is_refused(train, qwen3):
    vocabulary = json.loads((qwen3 / "tokenizer.json").read_text())
    more = {"id": 300, "content": "<|more|>", "special": False}
    vocabulary["added_tokens"].append(vocabulary["added_tokens"][0] | more)
    (qwen3 / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match=r"301 entries .* 300: they don't belong together"):
        train("run", init_from="qwen3", **SMALL)
