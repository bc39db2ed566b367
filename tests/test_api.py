"""`import mlx_gpt`: the commands as functions."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import mlx_gpt
from mlx_gpt.errors import RunError
from mlx_gpt.models.directory import save_model
from mlx_gpt.training import loop

TINY: dict[str, Any] = {
    "tokenizer": "bytes",
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "n_positions": 32,
    "dropout": 0.0,
    "seq_len": 16,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "log_every": 1,
    "eval_windows": 8,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, eager):
    """An empty folder, where nothing is compiled."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, make_model, bpe):
    """A model directory."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, make_model(), bpe)
    return folder


@pytest.fixture
def data(tmp_path, sentences):
    """A file of text."""
    path = tmp_path / "ducks.txt"
    path.write_text("".join(sentences))
    return path


def text_of(pieces, sample=0):
    return "".join(piece.text for piece in pieces if piece.sample == sample)


@pytest.mark.parametrize("settings", [{}, {"model_type": "qwen3", "optimizer": "muon"}], ids=["", "qwen3 with muon"])
def test_train_load_and_generate_are_enough(data, capsys, settings):
    run = mlx_gpt.train(data=data, out="weights/ducks", **TINY, **settings)
    assert run == Path("weights/ducks")
    assert "Step 2, Epoch 0, Loss: " in capsys.readouterr().out
    model, tokenizer = mlx_gpt.load(run)
    assert model.model_type == settings.get("model_type", "gpt2")
    text = mlx_gpt.generate(model, tokenizer, "The duck", max_tokens=5, seed=1)
    assert text
    assert text == mlx_gpt.generate(model, tokenizer, "The duck", max_tokens=5, seed=1)


def test_train_takes_a_file_of_settings_resumes_and_overwrites(data, tmp_path):
    (tmp_path / "my.toml").write_text("n_layer = 2\nseed = 3\n")
    settings = {name: value for name, value in TINY.items() if name != "n_layer"}
    run = mlx_gpt.train(config="my.toml", data=data, out="run", echo=None, **settings)
    assert mlx_gpt.load(run)[0].args.n_layer == 2
    assert mlx_gpt.train(resume="run", max_steps=3, echo=None).name == "run"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 3
    with pytest.raises(mlx_gpt.UserError, match="--overwrite"):
        mlx_gpt.train(data=data, out="run", echo=None, **TINY)
    mlx_gpt.train(data=data, out="run", overwrite=True, echo=None, **TINY)
    assert mlx_gpt.load(run)[0].args.n_layer == 1


def test_ctrl_c_saves_the_run_and_interrupts_the_program(data):
    def press_after_step_2(line):
        if line.startswith("Step 2,"):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        mlx_gpt.train(data=data, out="run", echo=press_after_step_2, **(TINY | {"max_steps": 9}))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # The press came while step 2 was logged, so the loop notices it after step 3.
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-00000003"]
    assert mlx_gpt.train(resume="run", max_steps=4, echo=None) == Path("run")


@pytest.fixture
def terminated():
    """Catch SIGTERM as a program may, and list the signals that came."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    yield came
    signal.signal(signal.SIGTERM, before)


def test_a_signal_is_acknowledged_where_the_lines_go(data, terminated, capfd):
    lines: list[str] = []

    def echo(line):
        lines.append(line)
        if line.startswith("Step 2,"):
            signal.raise_signal(signal.SIGTERM)

    mlx_gpt.train(data=data, out="run", echo=echo, **(TINY | {"max_steps": 9}))
    assert "Stopping after this step, and saving. Press Ctrl-C again to quit at once." in lines
    assert capfd.readouterr() == ("", "")
    assert terminated == [signal.SIGTERM]


def test_a_signal_outlives_an_error_that_follows_it(data, terminated):
    lines: list[str] = []

    def echo(line):
        lines.append(line)
        if line.startswith("Step 2,"):
            signal.raise_signal(signal.SIGTERM)
            shutil.rmtree("run/checkpoints", ignore_errors=True)
            Path("run/checkpoints").touch()

    with pytest.raises(RunError, match="could not be saved"):
        mlx_gpt.train(data=data, out="run", echo=echo, **(TINY | {"max_steps": 9}))
    assert terminated == [signal.SIGTERM]
    assert "could not be saved" in lines[-1]  # the signal may end a program before it can show the error


def test_a_signal_to_another_rank_ends_the_run_of_this_one(terminated, monkeypatch):
    stopped = loop.Outcome(Path("run"), finished=False, step=2, best_loss=None)
    monkeypatch.setattr(loop, "train", lambda *arguments, **options: stopped)
    mlx_gpt.train(echo=None)
    assert terminated == [signal.SIGTERM]


def test_train_works_in_a_thread_that_no_signal_reaches(data):
    with ThreadPoolExecutor() as pool:
        assert pool.submit(lambda: mlx_gpt.train(data=data, out="run", echo=None, **TINY)).result() == Path("run")


def test_a_program_that_worked_in_a_thread_ends_well(data):
    """MLX aborted it at its exit."""
    program = f"""
import threading, mlx_gpt

def work():
    run = mlx_gpt.train(**{TINY | {"data": str(data), "out": "run"}!r}, echo=None)
    mlx_gpt.generate(*mlx_gpt.load(run), "The duck", max_tokens=4)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_train_shows_its_lines_where_the_caller_wants_them(data, capsys):
    lines: list[str] = []
    mlx_gpt.train(data=data, out="loud", echo=lines.append, **TINY)
    assert any(line.startswith("Validation Loss: ") for line in lines)
    mlx_gpt.train(data=data, out="quiet", echo=None, **TINY)
    assert capsys.readouterr().out == ""


def test_a_reader_of_the_lines_that_has_gone_does_not_end_the_run(data):
    def gone(line):
        raise BrokenPipeError

    assert mlx_gpt.train(data=data, out="run", echo=gone, **TINY) == Path("run")


def test_stream_gives_the_text_of_generate_piece_by_piece(directory):
    model, tokenizer = mlx_gpt.load(directory)
    settings = {"max_tokens": 12, "seed": 1, "temperature": 0.9}
    pieces = list(mlx_gpt.stream(model, tokenizer, "The duck", **settings))
    assert len(pieces) > 3
    assert [piece.reason for piece in pieces][:-1] == [""] * (len(pieces) - 1)
    assert pieces[-1].reason == "length"
    assert text_of(pieces) == mlx_gpt.generate(model, tokenizer, "The duck", **settings)
    both = list(mlx_gpt.stream(model, tokenizer, "The duck", **settings, num_samples=2))
    assert text_of(both, 0) == text_of(pieces)
    assert text_of(both, 1) not in ("", text_of(both, 0))


def test_stop_is_a_text_or_several(directory):
    model, tokenizer = mlx_gpt.load(directory)
    settings = {"max_tokens": 12, "seed": 1}
    whole = mlx_gpt.generate(model, tokenizer, "The duck", **settings)
    stop = whole[4:7]
    for way in (stop, (stop,), [stop, "never there"]):
        assert mlx_gpt.generate(model, tokenizer, "The duck", stop=way, **settings) == whole[: whole.index(stop)]
    assert mlx_gpt.generate(model, tokenizer, "The duck", stop=(), **settings) == whole


def test_load_opens_a_run_and_a_model_directory_in_either_precision(directory):
    exact, _ = mlx_gpt.load(str(directory), precision="float32")
    short, _ = mlx_gpt.load(directory, precision="bfloat16")
    assert [str(model.wte.weight.dtype).split(".")[-1] for model in (exact, short)] == ["float32", "bfloat16"]
    with pytest.raises(mlx_gpt.UserError, match=r"precision.*float32, bfloat16"):
        mlx_gpt.load(directory, precision="float99")


REFUSALS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "an unknown setting": ({"temprature": 1.0}, "The duck", "did you mean `temperature`"),
    "a value out of bounds": ({"temperature": -1}, "The duck", "`temperature` must be at least 0, not -1"),
    "a value of another kind": ({"max_tokens": "many"}, "The duck", "`max_tokens` must be a whole number"),
    "an empty prompt": ({}, "", "prompt is empty"),
    "a long prompt": ({}, "duck " * 40, "context of 32"),
    "half a character": ({}, "\ud800", "not valid Unicode"),
    "no prompt": ({}, None, "The prompt must be text or a list of messages, not NoneType"),
    "bytes": ({}, b"The duck", "The prompt must be text or a list of messages, not bytes"),
    "no message": ({}, [], "The last message must be from the user"),
    "an answer at the end": ({}, [{"role": "assistant", "content": "Hi."}], "The last message must be from the user"),
    "a text among messages": ({}, ["The duck"], "A message must be like {"),
    "a message without content": ({}, [{"role": "user"}], "A message must be like {"),
    "messages without a template": ({}, [{"role": "user", "content": "Hi."}], "The model has no chat template"),
    "an empty stop string": ({"stop": ""}, "The duck", "`stop` must be a text or a list of texts, none of them empty"),
    "an empty stop string among others": ({"stop": (".", "")}, "The duck", "none of them empty, not ('.', '')"),
    "several samples": ({"num_samples": 2}, "The duck", "stream"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_mistake_is_a_value_error_that_says_what_to_do(directory, case):
    settings, prompt, words = REFUSALS[case]
    model, tokenizer = mlx_gpt.load(directory)
    with pytest.raises(mlx_gpt.UserError) as refusal:
        mlx_gpt.generate(model, tokenizer, prompt, **settings)
    assert isinstance(refusal.value, ValueError)
    assert words in str(refusal.value)


def test_an_answer_has_the_defaults_of_a_conversation(monkeypatch):
    made: list[Any] = []

    def note(model, tokenizer, prompt, config):
        made.append(config)
        return []

    monkeypatch.setattr("mlx_gpt.api.stream_pieces", note)
    for prompt in ("The duck", [{"role": "user", "content": "Hi."}]):
        mlx_gpt.generate(None, None, prompt)  # type: ignore[arg-type]
        mlx_gpt.generate(None, None, prompt, max_tokens=7)  # type: ignore[arg-type]
    assert [(config.max_tokens, config.repetition_penalty) for config in made] == [
        (200, 1.2),
        (7, 1.2),
        (1000, 1),
        (7, 1),
    ]


def test_an_answer_ends_where_the_context_ends(saying, tmp_path):
    """Beyond it, the engine would drop the question."""
    text = bytes(range(ord("!"), ord("z")))
    model, tokenizer = mlx_gpt.load(saying(tmp_path / "rambler", text, 64))
    answer = mlx_gpt.generate(model, tokenizer, [{"role": "user", "content": "Hi."}], temperature=0)
    prompt = len("<>user\nHi.<>\n<>assistant\n")  # the ends of a turn are one token each
    assert answer == text.decode()[: 64 - prompt + 3]


def test_all_wrong_settings_are_reported_at_once(data):
    with pytest.raises(mlx_gpt.UserError) as refusal:
        mlx_gpt.train(data=data, out="run", n_layr=2, seq_len=0, dropout=2)
    assert len(str(refusal.value).splitlines()) == 3
    assert not Path("run").exists()


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(mlx_gpt.UserError, match=r"There is no .*none"):
        mlx_gpt.load(tmp_path / "none")
    with pytest.raises(mlx_gpt.UserError, match=r"^load\(\) opens a path, .* not None\.$"):
        mlx_gpt.load(None)  # type: ignore[arg-type]
    with pytest.raises(mlx_gpt.UserError, match="not a run or a model directory"):
        mlx_gpt.load(tmp_path)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_a_folder_whose_name_is_not_utf8_is_refused(directory, tmp_path):
    name = os.fsdecode(b"na\xefve")
    shutil.copytree(directory, tmp_path / name)
    with pytest.raises(mlx_gpt.UserError, match="the name is not UTF-8"):
        mlx_gpt.load(name)
    with pytest.raises(mlx_gpt.UserError, match="`out` must be valid Unicode"):
        mlx_gpt.train(data="builtin", out=name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="goose"):
        mlx_gpt.goose  # noqa: B018
    assert all(getattr(mlx_gpt, name) for name in mlx_gpt.__all__)


def test_a_notebook_completes_the_public_names_and_no_others():
    assert [name for name in dir(mlx_gpt) if not name.startswith("_")] == sorted(mlx_gpt.__all__)
