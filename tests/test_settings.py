"""A setting takes its value from the right place, and bad values are refused with a sentence each."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gpt.config import Config, GenerationConfig, ModelConfig
from mlx_gpt.errors import UserError
from mlx_gpt.presets import PRESETS
from mlx_gpt.settings import COMPARE, build, flat, read_toml, resolve, settings_of, write_toml

SETTINGS = [*settings_of(Config), *settings_of(GenerationConfig)]
NUMBERS = [(Config, s) for s in settings_of(Config) if s.kind in (int, float)] + [
    (GenerationConfig, s) for s in settings_of(GenerationConfig) if s.kind in (int, float)
]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Run in a folder in which no data is prepared."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def toml(tmp_path):
    """Write a TOML file and return its path."""

    def write(text):
        path = tmp_path / "my.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(action):
    """Run an action that must be refused, and return the sentences."""
    with pytest.raises(UserError) as refusal:
        action()
    return str(refusal.value).splitlines()


def name_of(case):
    return getattr(case, "name", getattr(case, "__name__", None))


# ---- the source of a value ------------------------------------------------------------------------------------------


def test_a_flag_wins_over_the_file_the_file_over_the_preset_the_preset_over_the_default(toml):
    file = toml('preset = "small"\nn_layer = 3\nn_embd = 64\n')
    config = resolve({"n_layer": 1}, read_toml(file))
    assert config.model.n_layer == 1  # the flag; 3 in the file, 6 in the preset, 12 by default
    assert config.model.n_embd == 64  # the file; 512 in the preset, 768 by default
    assert config.model.n_head == 8  # the preset; 12 by default
    assert config.training.seq_len == 512  # the default
    assert config.preset == "small"


def test_a_recipe_stands_for_its_settings():
    config = resolve({"recipe": "quick"})
    training = config.training
    assert (config.preset, config.model.model_type, config.model.auto_dropout) == ("tiny", "qwen3", True)
    assert (training.optimizer, training.muon_momentum, training.schedule, training.min_lr) == ("muon", 0.9, "wsd", 0.0)
    assert (training.learning_rate, training.muon_learning_rate) == (4e-3, 0.02)


def test_muon_has_a_learning_rate_of_its_own_for_the_rest():
    assert resolve({"preset": "tiny"}).training.learning_rate == 2e-3
    assert resolve({"preset": "tiny", "optimizer": "muon"}).training.learning_rate == 4e-3
    assert resolve({"preset": "tiny", "optimizer": "muon", "learning_rate": 1e-3}).training.learning_rate == 1e-3


def test_the_file_wins_over_a_preset_that_a_flag_names(toml):
    config = resolve({"preset": "large"}, read_toml(toml('preset = "tiny"\nn_embd = 64\n')))
    assert (config.preset, config.model.n_layer, config.model.n_embd) == ("large", 24, 64)


def test_without_data_the_preset_is_tiny_and_the_text_is_built_in():
    config = resolve({})
    assert (config.data.data, config.preset, config.out) == ("builtin", "tiny", "weights/tiny-builtin")
    assert config.model.n_layer == PRESETS["tiny"]["n_layer"]


@pytest.mark.parametrize("name", ["train.jsonl", "train.txt"])
def test_prepared_data_is_used_with_preset_medium(name):
    prepared = Path("data/processed")
    prepared.mkdir(parents=True)
    (prepared / name).write_text("Text.\n")
    config = resolve({})
    assert (config.data.data, config.preset, config.out) == ("data/processed", "medium", "weights/medium-processed")


def test_any_text_may_have_any_preset():
    assert resolve({"preset": "small"}).out == "weights/small-builtin"
    assert resolve({"preset": "tiny", "data": "my/essays.csv"}).out == "weights/tiny-essays"


@pytest.mark.parametrize("data", [".", "folder/.."])
def test_the_run_is_named_after_the_folder_that_a_path_with_dots_means(data, tmp_path):
    assert resolve({"data": data}).out == f"weights/medium-{tmp_path.name}"


def test_a_whole_number_becomes_a_float_where_a_float_is_needed():
    rate = resolve({"learning_rate": 1}).training.learning_rate
    assert (rate, type(rate)) == (1.0, float)


def test_numbers_may_be_numpy_s_or_mlx_s():
    config = resolve(
        {
            "n_layer": np.int64(3),
            "n_embd": mx.array(48),
            "learning_rate": np.float32(0.5),
            "dropout": np.float64(0.25),
            "grad_checkpoint": np.bool_(True),
        }
    )
    found = (config.model.n_layer, config.model.n_embd, config.training.learning_rate, config.model.dropout)
    assert found == (3, 48, 0.5, 0.25)
    assert [type(value) for value in found] == [int, int, float, float]
    assert config.training.grad_checkpoint is True
    assert build(GenerationConfig, {"top_k": np.int32(7)}).top_k == 7
    assert problems(lambda: resolve({"n_layer": np.float32(2.5)})) == ["`n_layer` must be a whole number, not 2.5."]


def test_paths_may_be_paths():
    config = resolve({"data": Path("a/b.csv"), "out": Path("c")})
    assert (config.data.data, config.out) == ("a/b.csv", "c")


# ---- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_saved_settings_load_as_the_same_config(preset, tmp_path):
    config = resolve({"preset": preset, "data": 'C:\\"naïve" 鳥\n.csv', "max_minutes": 1.5})
    write_toml(config, tmp_path / "run.toml")
    assert resolve(read_toml(tmp_path / "run.toml")) == config


def test_a_file_may_begin_with_a_byte_order_mark(toml):
    assert resolve({}, read_toml(toml("\ufeffn_layer = 2\n"))).model.n_layer == 2


def test_a_missing_file_a_folder_and_a_file_that_is_not_toml_are_refused(toml, tmp_path):
    (missing,) = problems(lambda: read_toml(tmp_path / "none.toml"))
    assert "none.toml" in missing
    (folder,) = problems(lambda: read_toml(tmp_path))
    assert str(tmp_path) in folder
    (broken,) = problems(lambda: read_toml(toml("n_layer = = 2")))
    assert "my.toml is not valid TOML" in broken
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (binary,) = problems(lambda: read_toml(tmp_path / "binary.toml"))
    assert "not valid TOML" in binary


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("learning_rat", "learning_rate"), ("n-layers", "n_layer"), ("lr_min", "min_lr"), ("batchsize", "batch_size")],
)
def test_an_unknown_setting_is_refused_with_the_nearest_name(name, nearest, toml):
    (sentence,) = problems(lambda: resolve({}, read_toml(toml(f"{name} = 1\n"))))
    assert f"`{name}`" in sentence
    assert f"did you mean `{nearest}`?" in sentence


def test_an_unknown_setting_unlike_any_other_is_refused_with_a_hint_to_the_help():
    (sentence,) = problems(lambda: resolve({"zzz": 1}))
    assert "`zzz`" in sentence
    assert "--help" in sentence


def test_a_path_that_toml_cannot_hold_is_refused_in_one_sentence():
    (sentence,) = problems(lambda: resolve({"data": os.fsdecode(b"caf\xe9.txt")}))
    assert "`data` must be valid Unicode" in sentence
    sentence.encode()


def test_a_table_is_refused(toml):
    assert "`model`" in problems(lambda: resolve({}, read_toml(toml("[model]\nn_layer = 2\n"))))[0]


def test_all_mistakes_are_reported_at_once(toml):
    file = toml('n_layer = 0\ndrop_out = 0.1\nlearning_rate = nan\nschedule = "cosin"\n')
    sentences = problems(lambda: resolve({"batch_size": -1}, read_toml(file)))
    assert len(sentences) == 5
    for name in ("n_layer", "drop_out", "learning_rate", "schedule", "batch_size"):
        assert any(f"`{name}`" in sentence for sentence in sentences)
    assert any("did you mean cosine?" in sentence for sentence in sentences)


CONFLICTS: list[tuple[dict[str, Any], list[str]]] = [
    ({"n_embd": 30, "n_head": 4}, ["`n_embd` 30", "`n_head` 4", "try `n_head` 3"]),
    ({"seq_len": 65, "n_positions": 64}, ["`seq_len` 65", "`n_positions` 64"]),
    ({"min_lr": 0.2, "learning_rate": 0.1}, ["`min_lr` 0.2", "`learning_rate` 0.1"]),
    ({"vocab_size": 258, "tokenizer": "bpe"}, ["`vocab_size` 258", "259"]),
]
QWEN3: dict[str, Any] = {"model_type": "qwen3", "n_embd": 32}
NETWORK_CONFLICTS: list[tuple[dict[str, Any], list[str]]] = [
    ({"n_kv_head": 2}, ["GPT-2 has no `n_kv_head`", "`model_type` qwen3"]),
    ({"tie_embeddings": False}, ["GPT-2 has no `tie_embeddings`"]),
    ({"n_kv_head": 2, "tie_embeddings": False}, ["GPT-2"]),
    ({**QWEN3, "n_head": 4, "n_kv_head": 3}, ["`n_head` 4", "`n_kv_head` 3"]),
    ({**QWEN3, "n_head": 4, "n_kv_head": 8}, ["`n_head` 4", "`n_kv_head` 8"]),
    ({**QWEN3, "n_head": 32}, ["`n_embd` 32", "`n_head` 32", "odd"]),
    ({**QWEN3, "n_head": 5}, ["`n_embd` 32 is not a multiple of `n_head` 5"]),
]


@pytest.mark.parametrize(("settings", "named"), [*CONFLICTS, *NETWORK_CONFLICTS])
def test_an_impossible_combination_is_refused(settings, named):
    (sentence,) = problems(lambda: resolve(settings))
    assert all(words in sentence for words in named)


def test_a_combination_that_is_just_possible_is_allowed():
    resolve({"n_embd": 30, "n_head": 3, "seq_len": 64, "n_positions": 64, "min_lr": 0.1, "learning_rate": 0.1})
    resolve({"vocab_size": 259})
    resolve({**QWEN3, "n_head": 16, "n_kv_head": 1, "tie_embeddings": False})
    resolve({"vocab_size": 1, "tokenizer": "bytes"})  # which has its own vocabulary


def test_impossible_combinations_are_reported_at_once_and_together_with_unknown_names():
    everything = {name: value for settings, _ in CONFLICTS for name, value in settings.items()}
    assert len(problems(lambda: resolve(everything))) == len(CONFLICTS)
    sentences = problems(lambda: resolve(everything | {"n_layr": 1}))
    assert any("`n_layer`" in sentence for sentence in sentences)
    assert len(sentences) == len(CONFLICTS) + 1


@pytest.mark.parametrize(("config_class", "setting"), NUMBERS, ids=name_of)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False, "1", [1], {}], ids=repr)
def test_a_number_is_a_finite_number(config_class, setting, value):
    (sentence,) = problems(lambda: build(config_class, {setting.name: value}))
    assert f"`{setting.name}` must be" in sentence
    assert repr(value) in sentence


@pytest.mark.parametrize("setting", [s for s in settings_of(Config) if s.kind is int], ids=name_of)
def test_a_whole_number_has_no_fraction(setting):
    (sentence,) = problems(lambda: build(Config, {setting.name: 2.5}))
    assert "a whole number" in sentence


@pytest.mark.parametrize(("config_class", "setting"), NUMBERS, ids=name_of)
def test_a_number_stays_inside_its_bounds(config_class, setting):
    """A value at each bound is allowed and the nearest value beyond it is refused."""
    step = 1 if setting.kind is int else 1e-9
    for words, bound in setting.metadata["bounds"].items():
        outside = {"at least": bound - step, "above": bound, "at most": bound + step, "below": bound}[words]
        inside = {"at least": bound, "above": bound + step, "at most": bound, "below": bound - step}[words]
        (sentence,) = problems(lambda value=outside: build(config_class, {setting.name: value}))
        assert f"{words} {bound:g}" in sentence
        assert flat(build(config_class, {setting.name: inside}))[setting.name] == inside


def test_a_number_too_large_for_a_float_is_refused():
    assert "`learning_rate`" in problems(lambda: resolve({"learning_rate": 10**400}))[0]


def test_the_message_for_infinity_asks_for_a_finite_number():
    (sentence,) = problems(lambda: resolve({"learning_rate": math.inf}))
    assert "finite" in sentence


@pytest.mark.parametrize("value", ["", [1], ("",), None], ids=repr)
def test_stop_strings_must_be_texts(value):
    (sentence,) = problems(lambda: build(GenerationConfig, {"stop": value}))
    assert "`stop`" in sentence
    assert build(GenerationConfig, {"stop": ["a", "b"]}).stop == ("a", "b")
    assert build(GenerationConfig, {"stop": "END"}).stop == ("END",)


# ---- every setting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_every_setting_has_an_explanation_and_a_valid_default(setting):
    explanation = setting.metadata["help"]
    assert explanation[0].isupper() or explanation[0] == "`"
    assert explanation.endswith((".", "]"))
    if setting.default in (None, "", ()):
        return
    assert type(setting.default) is setting.kind
    assert not setting.metadata["choices"] or setting.default in setting.metadata["choices"]
    for words, bound in setting.metadata["bounds"].items():
        assert COMPARE[words](setting.default, bound)


def test_every_name_is_unique():
    names = [setting.name for setting in settings_of(Config)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_only_valid_settings(preset):
    names = {setting.name for setting in settings_of(Config)}
    assert PRESETS[preset].keys() <= names
    assert flat(resolve({"preset": preset})).items() >= PRESETS[preset].items()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_without_dropout(preset):
    assert resolve({"preset": preset}).model.dropout == 0


def test_flat_and_build_are_inverse():
    config = resolve({"preset": "small", "data": "x.csv", "max_steps": 5})
    assert build(Config, flat(config)) == config
    chosen_later = resolve({"batch_size": "auto"})
    assert chosen_later.training.auto_batch_size
    assert build(Config, flat(chosen_later)) == chosen_later
    model = dataclasses.replace(ModelConfig(), n_layer=3)
    assert build(ModelConfig, flat(model)) == model
