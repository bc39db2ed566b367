"""Adapters beside frozen layers: they compute as PyTorch does, and their files are those of mlx-lm."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx_lm
import mlx_lm.fuse
import mlx_lm.lora
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model, save

from mlx_gpt import api, models
from mlx_gpt.config import TrainingConfig
from mlx_gpt.device import device
from mlx_gpt.errors import UserError
from mlx_gpt.models import lora
from mlx_gpt.models.directory import load_model, save_adapters, save_model
from mlx_gpt.objectives.text import Text
from mlx_gpt.optim import make_optimizer
from mlx_gpt.training.loop import make_step

RATE = 1e-3
TRAINING = TrainingConfig(batch_size=4, gradient_accumulation_steps=1, seq_len=16, max_grad_norm=0.5, seed=1)
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "qwen3": {"model_type": "qwen3", "n_head": 4, "n_kv_head": 2, "tie_embeddings": False},
}
PROMPT = "The duck swims"


def test_validation_computes_no_gradient_for_a_frozen_head(make_model, ids, monkeypatch):
    model, objective = make_model(), device().accelerate(Text()).eval()
    batch = mx.array(ids), mx.ones((len(ids), len(ids[0]) - 1))
    expected = objective(model, *batch)[0].item()
    model.freeze()
    monkeypatch.setattr(type(objective.cross_entropy), "loss_and_gradient", None)
    assert objective(model, *batch)[0].item() == pytest.approx(expected, rel=1e-6)


@pytest.fixture(autouse=True)
def quickly(eager):
    """Nothing is compiled."""


@pytest.fixture(scope="module", params=[(kind, bits) for kind in KINDS for bits in (0, 4)], ids=str)
def base(request, make_model, bpe, tmp_path_factory):
    """The directory of a network, as we write it or as mlx-lm does after quantising it."""
    kind, bits = request.param
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "plain", make_model(**KINDS[kind]), bpe)
    return quantized(folder / "plain", folder / "packed", bits) if bits else folder / "plain"


def quantized(plain, folder, bits):
    """A directory that mlx-lm has quantised."""
    model, tokenizer, config = cast(Any, mlx_lm.utils.load(str(plain), return_config=True))
    model, config = quantize_model(model, config, 32, bits)
    save(folder, str(plain), model, tokenizer, config)
    return folder


def adapted(base, rank=4, dropout=0.0, blocks=None, trained=True):
    """The model with adapters that change something, or that are fresh."""
    model = load_model(base, dtype=None)
    model.base = str(base)
    lora.adapt_blocks(model, rank, 2.0, dropout, blocks, seed=3)
    if trained:
        for i, layer in enumerate(lora.adapted_layers(model).values()):
            layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(i))
    return device().accelerate(model).eval()


def logits_of(model, ids):
    return np.array(model(mx.array(ids)))


def trainer(model, **changes):
    """The optimizer and the step of a model."""
    training = dataclasses.replace(TRAINING, **changes)
    optimizer = make_optimizer(training, model)
    return optimizer, make_step(model.train(), optimizer, device().accelerate(Text()), training, device())


@pytest.fixture
def batch(ids):
    """Windows with their weights, a third of which are 0."""
    return mx.array(ids), mx.array((np.random.default_rng(6).random((4, 16)) > 0.3).astype(np.float32))


# ---- results equal to PyTorch's -------------------------------------------------------------------------------------


def test_fresh_adapters_change_no_bit(base, ids):
    model = load_model(base)
    before = logits_of(model, ids)
    lora.adapt_blocks(model, 4, 20.0, 0.0, None, seed=1)
    assert np.array_equal(logits_of(model, ids), before)


class TorchLoRA(torch.nn.Module):
    """A layer of PyTorch with an adapter, as in the paper."""

    def __init__(self, layer, ours):
        super().__init__()
        self.layer, self.scale = layer, ours.scale
        self.a, self.b = (torch.nn.Parameter(torch.tensor(np.array(w))) for w in (ours.lora_a, ours.lora_b))

    def forward(self, x):
        return self.layer(x) + self.scale * (x @ self.a @ self.b)


@pytest.fixture
def reference(base, bpe, tmp_path):
    """The step of PyTorch with the same frozen weights and adapters."""
    model = adapted(base)
    save_model(tmp_path, unadapted(base), bpe)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs.requires_grad_(False)
    layers = {}
    for name, ours in lora.adapted_layers(model).items():
        path, _, leaf = ("transformer." * name.startswith("h.") + name).rpartition(".")
        layers[name] = TorchLoRA(getattr(theirs.get_submodule(path), leaf), ours)
        setattr(theirs.get_submodule(path), leaf, layers[name])
    trained = [weight for weight in theirs.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=TRAINING.weight_decay)

    def step(windows, weights):
        tokens = torch.tensor(np.array(windows), dtype=torch.long)
        targets = tokens[:, 1:].masked_fill(torch.tensor(np.array(weights)) == 0, -100)
        logits = theirs(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, TRAINING.max_grad_norm)
        optimizer.step()
        return loss.item(), norm.item()

    return SimpleNamespace(model=model, layers=layers, step=step)


def unadapted(base):
    """The model with adapters that do nothing, so that it is written without quantisation."""
    return adapted(base, trained=False)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "computed twice"])
def test_a_step_is_that_of_pytorch(reference, batch, recompute):
    optimizer, step = trainer(reference.model, grad_checkpoint=recompute)
    loss, norm = step(0, RATE, [batch]).numbers()
    expected_loss, expected_norm = reference.step(*batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert norm == pytest.approx(expected_norm, rel=1e-4)
    assert norm > TRAINING.max_grad_norm
    means = {name.removeprefix("states.0."): np.array(m) for name, m in tree_flatten(optimizer.state)}
    for name, ours in lora.adapted_layers(reference.model).items():
        for leaf, theirs in (("lora_a", reference.layers[name].a), ("lora_b", reference.layers[name].b)):
            gradient = theirs.grad.numpy()
            found = means[f"{name}.{leaf}.m"] / (1 - TRAINING.beta1)
            np.testing.assert_allclose(found, gradient, atol=1e-5 * abs(gradient).max() + 1e-8, err_msg=name)
            # On average, because Adam can make a step of any size from a gradient that is only a rounding error.
            assert abs(np.array(ours[leaf]) - theirs.detach().numpy()).mean() < RATE / 100, name


def test_only_the_adapters_have_gradients_and_state(base, batch):
    model = adapted(base, blocks=1)
    frozen = {name: np.array(w.view(mx.uint32)) for name, w in tree_flatten(lora.frozen(model))}
    optimizer, step = trainer(model)
    step(0, RATE, [batch])
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert {name.rpartition(".")[2] for name in trained} == {"lora_a", "lora_b"}
    assert all(".1." in name for name in trained)
    means = {name.split(".", 2)[2] for name, _ in tree_flatten(optimizer.state) if name.endswith((".m", ".v"))}
    assert means == {f"{name}.{mean}" for name in trained for mean in "mv"}
    after = {name: np.array(w.view(mx.uint32)) for name, w in tree_flatten(lora.frozen(model))}
    assert all(np.array_equal(after[name], frozen[name]) for name in frozen | after)


def test_blocks_without_adapters_can_be_computed_twice(make_model, bpe, batch, tmp_path):
    """The embedding below these blocks is trained, so its gradient passes through them."""
    save_model(tmp_path, make_model(), bpe)
    models_of_both = []
    for recompute in (False, True):
        model = adapted(tmp_path, blocks=1)
        lora.keep_training(model, ["wte.weight"])
        _, step = trainer(model, grad_checkpoint=recompute)
        step(0, RATE, [batch])
        models_of_both.append(dict(tree_flatten(model.trainable_parameters())))
    kept, again = models_of_both
    assert "wte.weight" in kept
    for name in kept | again:
        assert mx.abs(kept[name] - again[name]).mean().item() < RATE / 100, name


def test_a_base_in_half_precision_is_held_as_it_is(make_model, bpe, batch, tmp_path):
    """This is for GPUs, which compute in bfloat16. A CPU computes in float32, and there is no exact way back."""
    save_model(tmp_path, make_model(), bpe)
    model = load_model(tmp_path, dtype=mx.bfloat16)
    lora.adapt_blocks(model, 4, 2.0, 0.0, None, seed=1)
    lora.set_dtypes(model, mx.bfloat16)
    assert {w.dtype for _, w in tree_flatten(lora.frozen(model))} == {mx.bfloat16}
    assert {w.dtype for _, w in tree_flatten(model.trainable_parameters())} == {mx.float32}
    plain = dataclasses.replace(device(), accelerated=False)
    training = dataclasses.replace(TRAINING, precision="bfloat16")
    step = make_step(model, make_optimizer(training, model), Text(), training, plain)
    losses = [step(number, 1e-2, [batch]).loss.item() for number in range(6)]
    assert losses[-1] < losses[0]
    assert {w.dtype for _, w in tree_flatten(lora.frozen(model))} == {mx.bfloat16}


# ---- files of adapters ----------------------------------------------------------------------------------------------


@pytest.fixture
def written(base, bpe, tmp_path):
    """A model with adapters, and the directory that it is written to."""
    model = adapted(base)
    save_model(tmp_path / "out", model, bpe)
    return SimpleNamespace(model=model, folder=tmp_path / "out", base=base)


def test_a_written_model_is_whole_and_its_adapters_are_beside(written, ids):
    expected = logits_of(written.model, ids)
    for folder in (written.folder, written.folder / "adapters"):
        np.testing.assert_allclose(logits_of(load_model(folder), ids), expected, atol=2e-5)
    config = json.loads((written.folder / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & config.keys()
    assert {w.dtype for _, w in tree_flatten(load_model(written.folder, None).parameters())} == {mx.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(written.folder).eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_a_written_model_keeps_the_dtype_of_its_base(base, bpe, tmp_path):
    model = adapted(base)
    model.set_dtype(mx.bfloat16)
    save_model(tmp_path, model, bpe)
    assert {w.dtype for _, w in tree_flatten(load_model(tmp_path, None).parameters())} == {mx.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def greedy(folder):
    """The text that we generate, without spaces at its ends, because mlx-lm drops the first one."""
    model, tokenizer = api.load(folder)
    return api.generate(model, tokenizer, PROMPT, temperature=0.0, repetition_penalty=1.0, max_tokens=12).strip()


def greedy_of_mlx_lm(bpe, *args, **options):
    """What mlx-lm writes."""
    model, tokenizer = cast(Any, mlx_lm.load(*args, **options))
    return mlx_lm.generate(model, tokenizer, bpe.encode(PROMPT), max_tokens=12).strip()


def run_mlx_lm(monkeypatch, program, *switches, **flags):
    """Run a program of mlx-lm in this process."""
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["mlx_lm", *switches, *words])
    program.main()


def test_mlx_lm_takes_our_adapters(written, bpe, monkeypatch, tmp_path):
    expected = greedy(written.folder / "adapters")
    assert expected != greedy(written.base)
    assert greedy_of_mlx_lm(bpe, str(written.base), adapter_path=str(written.folder / "adapters")) == expected
    options = {"model": written.base, "adapter_path": written.folder / "adapters", "save_path": tmp_path / "fused"}
    run_mlx_lm(monkeypatch, mlx_lm.fuse, "--dequantize", **options)
    assert greedy(tmp_path / "fused") == expected


def test_adapters_of_mlx_lm_open_here(base, bpe, sentences, monkeypatch, tmp_path):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in sentences[:8]))
    monkeypatch.setattr(mlx_lm.lora, "get_reporting_callbacks", lambda *args, **options: None)
    data = {"model": base, "data": tmp_path, "adapter_path": tmp_path / "theirs", "max_seq_length": 32}
    short = {"iters": 8, "batch_size": 2, "num_layers": 1, "learning_rate": 0.02, "val_batches": 1}
    run_mlx_lm(monkeypatch, mlx_lm.lora, "--train", **data, **short)
    text = greedy(tmp_path / "theirs")
    assert text != greedy(base)
    assert text == greedy_of_mlx_lm(bpe, str(base), adapter_path=str(tmp_path / "theirs"))


def test_a_further_trained_parameter_is_kept_beside_the_adapters(make_model, bpe, batch, ids, tmp_path):
    """An embedding that has grown has to be trained, and mlx-lm's file of adapters can't hold it."""
    save_model(tmp_path / "base", make_model(), bpe)
    model = adapted(tmp_path / "base")
    model.wte.weight = mx.concatenate([model.wte.weight, mx.ones((2, 32))])
    models.set_vocab_size(model, bpe.vocab_size + 2)
    lora.keep_training(model, ["wte.weight"])
    _, step = trainer(model)
    step(0, 0.1, [batch])
    expected = logits_of(model.eval(), ids)
    save_adapters(tmp_path / "checkpoint", model, bpe)
    assert {path.name for path in (tmp_path / "checkpoint").glob("*.safetensors")} == {
        "adapters.safetensors",
        "trained.safetensors",
    }
    again = load_model(tmp_path / "checkpoint")
    assert models.vocab_size(again) == bpe.vocab_size + 2
    np.testing.assert_allclose(logits_of(again, ids), expected, atol=2e-5)
    half = tree_flatten(load_model(tmp_path / "checkpoint", mx.bfloat16).parameters())
    assert {weight.dtype for _, weight in half} == {mx.bfloat16}
    save_model(tmp_path / "whole", model, bpe)  # adapters alone would be another model than the one that was trained
    assert not (tmp_path / "whole/adapters").exists()
    np.testing.assert_allclose(logits_of(load_model(tmp_path / "whole"), ids), expected, atol=2e-5)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"model.h.0.attn.c_fc.lora_a": mx.zeros((32, 4))}, "a tensor h.0.attn.c_fc.lora_a"),
        (lambda t: t | {"model.h.0.attn.c_attn.m": mx.zeros(32)}, "a tensor h.0.attn.c_attn.m"),
        (
            lambda t: t | {"model.h.1.mlp.c_fc.lora_a": mx.zeros((64, 4))},
            r"h.1.mlp.c_fc.lora_a of shape \(64, 4\), and",
        ),
        (lambda t: t | {"model.h.1.mlp.c_fc.lora_b": mx.zeros((5, 128))}, r"needs \(4, 128\) there"),
        (
            lambda t: {n: w for n, w in t.items() if not n.endswith("h.0.mlp.c_fc.lora_b")},
            "no tensor h.0.mlp.c_fc.lora_b",
        ),
        (lambda t: {}, "adapters.safetensors has no tensors"),
    ],
    ids=["no such layer", "another kind", "another width", "another rank", "half of one", "nothing"],
)
def test_adapters_that_do_not_fit_are_refused(make_model, bpe, tmp_path, change, said):
    save_model(tmp_path / "base", make_model(), bpe)
    save_model(tmp_path / "out", adapted(tmp_path / "base"), bpe)
    path = str(tmp_path / "out/adapters/adapters.safetensors")
    tensors = mx.load(path)
    mx.eval(tensors)
    mx.save_safetensors(path, change(tensors))
    with pytest.raises(UserError, match=said):
        load_model(tmp_path / "out/adapters")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "nowhere"}, "belong to the model in nowhere, which is not there: write its directory into"),
        ({"model": None}, "does not name the model of these adapters"),
        ({"fine_tune_type": "dora"}, "`fine_tune_type` 'dora': mlx-gpt reads adapters of type lora"),
        ({"lora_parameters": {"rank": 4, "scale": math.nan}}, "lacks a sound `rank`, `scale`"),
        ({"lora_parameters": {"rank": 4}}, "lacks a sound `rank`, `scale` or `dropout`"),
    ],
    ids=str,
)
def test_a_config_of_adapters_that_says_something_else_is_refused(make_model, bpe, tmp_path, changes, said):
    save_model(tmp_path / "base", make_model(), bpe)
    save_model(tmp_path / "out", adapted(tmp_path / "base"), bpe)
    path = tmp_path / "out/adapters/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=said):
        load_model(path.parent)


def test_a_base_is_found_where_mlx_lm_has_downloaded_it(make_model, bpe, ids, tmp_path, monkeypatch):
    """mlx_lm.lora names a model of the Hub as it was asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache/models--birds--duck"
    save_model(repository / "snapshots/1234", make_model(), bpe)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("1234")
    save_model(tmp_path / "out", adapted(repository / "snapshots/1234"), bpe)
    path = tmp_path / "out/adapters/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "birds/duck"}))
    expected = logits_of(load_model(tmp_path / "out"), ids)
    np.testing.assert_allclose(logits_of(load_model(path.parent), ids), expected, atol=1e-6)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "birds/goose"}))
    with pytest.raises(UserError, match="belong to the model in birds/goose, which is not there"):
        load_model(path.parent)


def test_a_base_is_found_beside_its_adapters(make_model, bpe, ids, tmp_path):
    save_model(tmp_path / "base", make_model(), bpe)
    save_model(tmp_path / "out", adapted(tmp_path / "base"), bpe)
    path = tmp_path / "out/adapters/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": "../../base"}))
    Path(tmp_path).rename(tmp_path.with_name("moved"))
    moved = tmp_path.with_name("moved")
    expected = logits_of(load_model(moved / "out"), ids)
    np.testing.assert_allclose(logits_of(load_model(moved / "out/adapters"), ids), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("rank", "blocks", "said"),
    [(33, None, "`lora_rank` 33 is more than the model is wide: use at most 32"), (4, 3, "use 2 or less")],
)
def test_a_rank_or_a_count_of_blocks_beyond_the_model_is_refused(make_model, rank, blocks, said):
    with pytest.raises(UserError, match=said):
        lora.adapt_blocks(make_model(), rank, 20.0, 0.0, blocks, seed=1)
