"""Runs that train adapters beside frozen weights."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model, save
from safetensors.numpy import load_file

from mlx_gpt import api
from mlx_gpt.errors import UserError
from mlx_gpt.models import quantized
from mlx_gpt.models.directory import load_model
from mlx_gpt.training import checkpoint, memory, setup

from .conftest import TINY, Silent, contents, refusal

LORA = {"lora_rank": 4, "lora_dropout": 0.1}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, eager, unmeasured):
    """An empty folder, where nothing is compiled."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tune(train, whole):
    """Train adapters beside the weights of the other run."""
    return lambda out, **options: train(out, **{"init_from": str(whole.folder), **LORA, **options})


def weights_in(run):
    """Every array of a run, with its bytes."""
    return {path: data for path, data in contents(run).items() if path.suffix == ".safetensors"}


def test_two_halves_with_dropout_are_the_whole(tune):
    tune("whole")
    assert tune("half", stop_after=3).step == 3
    assert tune("half", resume="half").finished
    halves = weights_in("half")
    assert {name: data for name, data in weights_in("whole").items() if name in halves} == halves
    assert Path("final/adapters/adapters.safetensors") in halves


def test_automatic_dropout_leaves_the_adapters_their_own(tune):
    """However often the text is read."""
    options = {"max_epochs": 12, "max_steps": None, "stop_after": 2}
    for run, dropout in (("auto", "auto"), ("told", 0.0)):
        tune(run, dropout=dropout, **options)
        tune(run, dropout=dropout, resume=run, **options)
    auto, told = (checkpoint.all_checkpoints(Path(run))[-1] for run in ("auto", "told"))
    assert checkpoint.step_of(auto) == 4
    assert weights_in(auto) == weights_in(told)


def test_a_checkpoint_has_the_adapters_and_no_base(tune, whole):
    tune("run", max_steps=1)
    [saved] = checkpoint.all_checkpoints(Path("run"))
    arrays = {name for path in saved.glob("*.safetensors") for name in load_file(path)}
    assert not [name for name in arrays if "lora" not in name and not name.endswith((".step", ".learning_rate"))]
    assert checkpoint.size(saved) < (whole.folder / "final/model.safetensors").stat().st_size
    last, final = (dict(tree_flatten(load_model(folder).parameters())) for folder in (saved, Path("run/final")))
    assert all(mx.allclose(last[name], final[name], atol=1e-6) for name in last | final)
    assert api.load(saved)[1].to_json() == api.load(whole.folder)[1].to_json()


def test_it_says_what_it_trains(tune):
    assert [line for line in tune("run", max_steps=1, lora_layers=1).lines if "Trained" in line] == [
        "Trained      2,048 parameters (5.6 % of all parameters), adapters of rank 4"
    ]


def test_its_memory_is_counted_whole_and_its_gradients_are_not(tune, whole, corpus):
    options = {"data": str(corpus), "out": "run", "init_from": str(whole.folder), **TINY, **LORA}
    with setup.set_up(options, Silent(), dry_run=True) as run:
        weights, gradients, state = memory.held_bytes(run)
    parameters = sum(array.size for array in load_file(whole.folder / "final/model.safetensors").values())
    assert weights - gradients == 4 * parameters
    assert 2 * gradients < state < 2 * gradients + 100


def test_adapters_are_trained_further(tune, train, whole):
    tune("first")
    outcome = train("second", init_from="first/final/adapters", max_steps=2, learning_rate=1e-6)
    assert any("adapters of rank 4" in line for line in outcome.lines)
    described = json.loads(Path("second/final/adapters/adapter_config.json").read_text())
    assert Path("second/final/adapters", described["model"]).resolve() == Path("second/base").resolve()
    assert Path("second/base/model.safetensors").samefile(whole.folder / "best/model.safetensors")
    first, second = (load_file(f"{run}/final/adapters/adapters.safetensors") for run in ("first", "second"))
    assert all(abs(first[name] - second[name]).max() < 1e-4 for name in first | second)
    assert train("second", resume="second", max_steps=3).finished


def test_a_quantised_base_is_trained_beside_and_written_whole(tune, whole):
    model, tokenizer, config = cast(Any, mlx_lm.utils.load(str(whole.folder / "final"), return_config=True))
    model, config = quantize_model(model, config, 32, 4)
    save("packed", str(whole.folder / "final"), model, tokenizer, config)
    assert "are quantised, so only adapters can be trained: add --lora-rank 8" in refusal(
        lambda: tune("run", init_from="packed", lora_rank=None, lora_dropout=0.0)
    )
    outcome = tune("run", init_from="packed")
    assert outcome.finished
    assert not quantized.is_quantized(load_model("run/final"))
    assert quantized.is_quantized(load_model("run/final/adapters"))
    assert tune("run", init_from="packed", resume="run", max_steps=9).finished


def no_link(*paths):
    """Fail as a link to another disk does."""
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.parametrize("links", [True, False])
def test_a_moved_project_is_resumed(tune, whole, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_link)
    Path("project").mkdir()
    monkeypatch.chdir("project")
    shutil.copytree(whole.folder / "final", "weights")
    tune("whole", init_from="weights")
    tune("half", init_from="weights", stop_after=3)
    assert Path("half/base").exists() == links
    Path("../project").rename("../moved")
    monkeypatch.chdir("../moved")
    tune("half", resume="half", init_from="weights")
    halves = weights_in("half")
    assert {name: data for name, data in weights_in("whole").items() if name in halves} == halves
    if links:
        adapted, final = (
            dict(tree_flatten(load_model(f"half/final{inner}").parameters())) for inner in ("/adapters", "")
        )
        assert all(mx.allclose(adapted[name], final[name], atol=1e-6) for name in adapted | final)


@pytest.mark.parametrize("stop_after", [1, 3], ids=["before its first checkpoint", "after it"])
def test_a_base_that_its_own_run_replaces_is_still_there(tune, whole, stop_after):
    shutil.copytree(whole.folder, "other")
    tune("whole", init_from="other")
    tune("half", init_from="other", stop_after=stop_after)
    if stop_after == 1:
        shutil.rmtree("half/checkpoints")
    newer = Path("newer.safetensors")
    shutil.copy(checkpoint.all_checkpoints(Path("other"))[0] / "model.safetensors", newer)
    newer.rename("other/best/model.safetensors")  # as every file is written
    tune("half", init_from="other", resume="half")
    assert load_model("half/final/adapters").layers
    halves = weights_in("half")
    assert {name: data for name, data in weights_in("whole").items() if name in halves} == halves


def test_a_base_that_is_gone_or_changed_is_refused(tune, whole, monkeypatch):
    monkeypatch.setattr(os, "link", no_link)
    shutil.copytree(whole.folder / "final", "weights")
    tune("run", init_from="weights", stop_after=3)
    before = contents("run")
    shutil.copy(whole.folder / "best/model.safetensors", "weights")
    Path("weights/model.safetensors").write_bytes(Path("weights/model.safetensors").read_bytes() + b"\0")
    again = {"resume": "run", "init_from": "weights"}
    assert "have changed since the run began" in refusal(lambda: tune("run", **again))
    Path("weights").rename("moved")
    assert "run has only adapters, and needs the weights that they belong to. There is no " in refusal(
        lambda: tune("run", **again)
    )
    assert {path: data for path, data in contents("run").items() if path.name != ".lock"} == {
        path: data for path, data in before.items() if path.name != ".lock"
    }


def test_another_run_s_adapters_outlive_the_run_of_their_base(tune, train, whole):
    shutil.copytree(whole.folder, "other")
    tune("first", init_from="other", max_steps=1)
    expected = contents("first")
    train("other", init_from="first/final/adapters", overwrite=True, max_steps=1)
    assert contents("first") == expected
    assert load_model("other/final/adapters").layers


def test_a_dropout_for_stored_adapters_needs_no_rank(tune, train):
    tune("first", max_steps=1)
    train("second", init_from="first/final/adapters", lora_dropout=0.3, max_steps=1)
    described = json.loads(Path("second/final/adapters/adapter_config.json").read_text())
    assert described["lora_parameters"]["dropout"] == 0.3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_rank": 33}, "`lora_rank` 33 is more than the model is wide"),
        ({"lora_layers": 3}, "`lora_layers` 3 is more than the model has: use 2 or less"),
        ({"init_from": ""}, "`lora_rank` is for adapters, which need existing weights: name the weights"),
        ({"init_from": "", "lora_rank": None}, "`lora_dropout` is for adapters, which need existing weights"),
        ({"lora_rank": None}, "`lora_dropout` is for adapters: give `lora_rank` as well"),
        ({"n_layer": 3}, "`n_layer` 3 contradicts the weights in .*, which have 2: omit it"),
    ],
    ids=str,
)
def test_a_mistake_is_refused_before_anything_is_written(tune, settings, said):
    with pytest.raises(UserError, match=said):
        tune("run", **settings)
    assert not Path("run").exists()


def test_a_run_that_would_replace_the_base_of_its_adapters_is_refused(tune, train, whole, monkeypatch):
    monkeypatch.setattr(os, "link", no_link)
    shutil.copytree(whole.folder, "other")
    tune("first", init_from="other", max_steps=1)
    before = contents("other")
    with pytest.raises(UserError, match="other/best would be deleted before the new run has saved anything"):
        train("other", init_from="first/final/adapters", overwrite=True)
    assert contents("other") == before


def test_a_setting_that_contradicts_stored_adapters_is_refused(tune, train):
    tune("first", max_steps=1)
    with pytest.raises(UserError, match="`lora_rank` 8 contradicts the adapters in first/final/adapters, which have 4"):
        train("second", init_from="first/final/adapters", lora_rank=8)
