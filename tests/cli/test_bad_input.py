"""A user's mistake ends in one sentence and exit code 2, and changes no file. Ctrl-C works at any moment."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gpt import cli
from mlx_gpt.signals import StopSignals

pytestmark = pytest.mark.usefixtures("unmeasured")


def contents(folder):
    """Return every file with its bytes, except for the cache of prepared corpora, which a mistake may fill."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_relative_to(folder / "data/cache")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def refused(mlx_gpt, tmp_path):
    """Run the program with a mistake and return the sentences that it ends with."""

    def refused(*arguments, stdin=""):
        before = contents(tmp_path)
        answer = mlx_gpt(*(shlex.split(arguments[0]) if len(arguments) == 1 else arguments), stdin=stdin)
        assert answer.code == 2, answer
        chosen, _, sentence = answer.err.partition("Error: ")
        assert chosen in ("", "Model: weights/ducks, the newest run.\n")
        assert sentence
        assert "Error: " not in sentence
        assert "Traceback" not in answer.err
        assert re.search(r"[.:?)]\n$", answer.err)
        assert contents(tmp_path) == before
        return sentence

    return refused


@pytest.fixture
def here(tmp_path, trained, models, sentences):
    """A folder with a run in weights/ducks, a model in `model`, and files that cannot be trained on."""
    shutil.copytree(trained / "weights", "weights")
    shutil.copytree(models / "one", "model")
    Path("empty.txt").touch()
    Path("blank.txt").write_text("\n  \n\n")
    Path("binary.txt").write_bytes(bytes(range(256)) * 10)
    Path("short.txt").write_text("A duck. It swims.")
    Path("ducks.txt").write_text("".join(sentences[:50]))
    Path("two.csv").write_text("question,answer\n" + "Where does the duck swim?,In the pond.\n" * 3)
    Path("latin.csv").write_bytes(b"text\na duck\nna\xefve geese\n")
    Path("chats.jsonl").write_text("".join(f'{{"prompt": "{i}?", "completion": "{i}."}}\n' for i in range(9)))
    Path("pairs.jsonl").write_text("".join(f'{{"prompt": "{i}?", "chosen": "a", "rejected": "b"}}\n' for i in range(9)))
    Path("broken.toml").write_text("n_layer = = 2")
    Path("wrong.toml").write_text('n_layr = 2\nn_head = "many"\nschedule = "cosin"\n')
    return tmp_path


TRAIN = "train --data ducks.txt --tokenizer bytes --preset tiny --seq-len 16 --max-steps 1 --out weights/new "

# A command, and words that its sentence must have.
MISTAKES = [
    # No such file or run
    ("train --data none.csv --out weights/new", ["none.csv"]),
    ("train --config none.toml", ["none.toml"]),
    (TRAIN + "--tokenizer none.json", ["none.json", "`bytes`"]),
    ("train --resume weights/none", ["weights/none", "no run"]),
    ("generate --model weights/none --prompt Geese", ["weights/none"]),
    ("eval --model weights/none", ["weights/none"]),
    ("eval none.txt", ["none.txt"]),
    ("prepare none.txt", ["none.txt"]),
    ("download --from-file none.zip", ["none.zip"]),
    # A file or folder of another kind
    ("generate --model ducks.txt --prompt Geese", ["ducks.txt"]),
    ("generate --model weights --prompt Geese", ["weights is not a run or a model directory"]),
    ("eval --model model", ["model is not a run", "FILE"]),
    ("train --config broken.toml", ["broken.toml", "TOML"]),
    ("train --config binary.txt", ["binary.txt", "TOML"]),
    (TRAIN + "--tokenizer ducks.txt", ["ducks.txt is not a tokenizer.json"]),
    (TRAIN + "--tokenizer binary.txt", ["binary.txt is not a tokenizer.json"]),
    ("download --from-file ducks.pdf", ["ducks.pdf"]),
    ("download --from-file broken.zip", ["broken.zip"]),
    ("download --from-file photos.zip", ["photos.zip"]),
    ("download --from-file weights", ["weights is a folder"]),
    # A file without text
    ("train --data empty.txt --out weights/new", ["empty.txt is empty"]),
    ("train --data blank.txt --out weights/new", ["Nothing is left", "empty"]),
    ("prepare empty.txt", ["empty.txt is empty"]),
    ("prepare blank.txt", ["Nothing is left"]),
    ("eval empty.txt", ["empty.txt is empty"]),
    ("eval blank.txt", ["blank.txt", "holds no text"]),
    ("train --data binary.txt --out weights/new", ["binary.txt is a binary file"]),
    ("prepare binary.txt", ["binary.txt is a binary file"]),
    ("eval binary.txt", ["binary.txt is a binary file"]),
    ("prepare latin.csv", ["latin.csv, row 2", "UTF-8"]),
    # A text shorter than one window
    ("train --data short.txt --tokenizer bytes --preset tiny --out weights/new", ["has 16 tokens", "--seq-len 15"]),
    # A dataset that has not been downloaded yet
    ("train --data hf:owner/name --out weights/new", ["first run `mlx-gpt download --dataset hf:owner/name`"]),
    ("prepare hf:owner/name", ["first run `mlx-gpt download --dataset hf:owner/name`"]),
    # A column that does not exist, or that is not clear
    ("train --data two.csv --column text --out weights/new", ["no column 'text'", "question, answer"]),
    ("prepare two.csv --column text", ["no column 'text'", "question, answer"]),
    ("eval two.csv --column text", ["no column 'text'", "question, answer"]),
    ("prepare two.csv", ["--column", "question, answer"]),
    # A corpus of a kind that a command or a model does not take
    ("train --data pairs.jsonl --out weights/new", ["does not train on preferences", "--data", "--column"]),
    ("eval chats.jsonl", ["chats.jsonl holds conversations, but weights/ducks has no chat template"]),
    # A run in the place of a text
    ("eval weights/ducks", ["weights/ducks is a model, not a text", "--model"]),
    ("prepare weights/ducks", ["weights/ducks is a run or a model, not a text"]),
    ("prepare chats.jsonl pairs.jsonl", ["not clear", "chats.jsonl, line 1", "pairs.jsonl, line 1"]),
    # Settings outside their bounds
    (TRAIN + "--n-layer 0", ["`n_layer` must be at least 1, not 0"]),
    (TRAIN + "--learning-rate nan", ["`learning_rate`", "nan"]),
    (TRAIN + "--dropout 1", ["`dropout`", "below 1"]),
    (TRAIN + "--max-minutes -5", ["`max_minutes`", "above 0"]),
    (TRAIN + "--seed -1", ["`seed`", "at least 0"]),
    (TRAIN + "--n-head 3", ["`n_embd` 128", "`n_head` 3", "try"]),
    (TRAIN + "--seq-len 257", ["`seq_len` 257", "`n_positions` 256"]),
    (TRAIN + "--tokenizer bpe --vocab-size 100", ["`vocab_size` 100", "259"]),
    (TRAIN + "--min-lr 1", ["`min_lr`", "`learning_rate`"]),
    ("prepare ducks.txt --val-fraction 1", ["`val_fraction`", "below 1"]),
    ("prepare ducks.txt --val-fraction nan", ["`val_fraction`"]),
    ("generate --temperature -1 --prompt Geese", ["`temperature`", "at least 0"]),
    ("generate --temperature nan --prompt Geese", ["`temperature`", "nan"]),
    ("generate --top-p 0 --prompt Geese", ["`top_p`", "above 0"]),
    ("generate --top-p 1.5 --prompt Geese", ["`top_p`", "at most 1"]),
    ("generate --repetition-penalty 0 --prompt Geese", ["`repetition_penalty`", "above 0"]),
    ("generate --max-tokens 0 --prompt Geese", ["`max_tokens`", "at least 1"]),
    ("generate --stop '' --prompt Geese", ["`stop`", "none of them empty, not ''"]),
    ("eval --seq-len 33", ["--seq-len", "32", "33"]),
    ("eval --seq-len 0", ["--seq-len", "32", "0"]),
    ("eval --batch-size 0", ["--batch-size"]),
    # The prompt
    ("generate --prompt ''", ["prompt is empty"]),
    (f"generate --prompt '{'duck ' * 20}'", ["prompt has 100 tokens", "context of 32"]),
    ("generate --prompt Geese --interactive", ["--prompt, --prompt-file and --interactive"]),
    ("generate --prompt Geese --prompt-file ducks.txt", ["--prompt, --prompt-file and --interactive"]),
    ("generate --prompt-file none.txt", ["none.txt"]),
    ("generate --prompt-file weights", ["weights is a folder: name a file."]),
    ("generate --prompt-file latin.csv", ["latin.csv is not UTF-8 text", "byte 14"]),
    ("generate --prompt-file empty.txt", ["prompt is empty"]),
    ("generate --prompt-file -", ["prompt is empty"]),
    # Flags and commands
    ("train --learning-rat 1", ["--learning-rat", "--learning-rate"]),
    ("train --n-layer two", ["--n-layer", "two"]),
    ("train --schedule cosin", ["--schedule", "cosine"]),
    ("train --n-layer", ["--n-layer"]),
    ("train ducks.txt", ["ducks.txt", "name a run with --resume", "--data"]),
    ("generate Geese", ["Geese", "--model", "in quotes, with --prompt"]),
    ("download owner/name", ["owner/name", "--dataset"]),
    ("serve weights/ducks", ["weights/ducks", "--model"]),
    ("prepare", ["PATH"]),
    ("generat", ["There is no command generat: did you mean generate?"]),
    ("talk", ["There is no command talk: `mlx-gpt --help` lists the commands."]),
    ("download --dataset nonsense", ["nonsense", "owner/name"]),
    ("download --dataset a/b --from-file ducks.txt", ["--dataset and --from-file"]),
    # A folder with somebody's work
    ("train --data ducks.txt --preset tiny --out weights/ducks", ["weights/ducks", "--resume", "--overwrite", "--out"]),
    ("train --data ducks.txt --preset tiny --out model", ["model exists and is not a run"]),
    ("train --data ducks.txt --preset tiny --out model --overwrite", ["model exists and is not a run"]),
    ("train --data ducks.txt --preset tiny --out ducks.txt", ["ducks.txt exists and is not a run"]),
    ("prepare two.csv --column answer --out mine", ["mine", "by hand"]),
    # A mistake together with --overwrite
    ("train --data none.csv --out weights/ducks --overwrite", ["none.csv"]),
    ("train --data ducks.txt --preset tiny --seq-len 257 --out weights/ducks --overwrite", ["`seq_len` 257"]),
    ("train --data short.txt --preset tiny --out weights/ducks --overwrite", ["--seq-len"]),
    # Another run
    ("train --resume weights/ducks --n-layer 2 --seed 9", ["`n_layer` was 1", "`seed` was 1337"]),
    (
        "train --from weights/ducks --preset small --out weights/new",
        ["`preset` small has `n_layer` 6", "omit `preset`"],
    ),
    ("train --resume weights/ducks/checkpoints/step-00000400", ["no checkpoint step-00000400", "(step-0000000"]),
]


@pytest.mark.parametrize(("command", "named"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_ends_in_one_sentence(refused, here, command, named):
    if "--out mine" in command:
        Path("mine").mkdir()
        Path("mine/train.txt").write_text("Mine.\n")
    if "broken.zip" in command:
        Path("broken.zip").write_bytes(b"PK\x03\x04 and no more")
    if "photos.zip" in command:
        with zipfile.ZipFile("photos.zip", "w") as archive:
            archive.writestr("duck.jpg", b"\xff\xd8\xff")
    if "ducks.pdf" in command:
        Path("ducks.pdf").write_bytes(b"%PDF-1.7")
    message = refused(command)
    assert len(message.splitlines()) == (len(named) if "was 1" in message else 1)
    for words in named:
        assert words in message


def test_all_mistakes_in_the_settings_are_reported_at_once(refused, here):
    message = refused("train --config wrong.toml --n-embd 0 --batch-size -1")
    assert len(message.splitlines()) == 5
    for words in ("`n_layr`: did you mean `n_layer`?", "`n_head`", "did you mean cosine?", "`n_embd`", "`batch_size`"):
        assert words in message


@pytest.mark.parametrize("command", ["generate --prompt Geese", "eval", "train --resume"])
def test_a_missing_run_is_reported(refused, command):
    assert "There is no run in weights" in refused(command)


def test_a_prompt_that_is_not_unicode_is_refused(refused, here):
    assert "not valid Unicode" in refused("generate", "--prompt", "\udcff")


# ---- damaged model directories --------------------------------------------------------------------------------------


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = dict(mx.load(str(path)))
    change(weights)
    mx.eval(weights)
    mx.save_safetensors(str(path), weights, {"format": "pt"})


def claim_more(folder):
    path = folder / "model.safetensors"
    path.write_bytes((10**9).to_bytes(8, "little") + path.read_bytes()[8:])


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def use_more_entries(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["duckduckgoose"] = 300
    path.write_text(json.dumps(tokenizer))


DAMAGES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "JSON"]),
    "no GPT-2": (lambda folder: change_config(folder, model_type="llama"), ["config.json", "layers"]),
    "another activation": (lambda folder: change_config(folder, activation_function="relu"), ["activation_function"]),
    "width no number": (lambda folder: change_config(folder, n_embd="wide"), ["n_embd", "'wide'"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors"]),
    "weights cut short": (cut_short, ["model.safetensors", "cut short"]),
    "header claims more": (claim_more, ["model.safetensors", "damaged"]),
    "a tensor too few": (
        lambda folder: change_weights(folder, lambda weights: weights.pop("h.1.ln_2.bias")),
        ["h.1.ln_2.bias"],
    ),
    "a tensor of another shape": (
        lambda folder: change_weights(folder, lambda weights: weights.update({"ln_f.weight": mx.zeros(33)})),
        ["ln_f.weight", "(33,)", "(32,)"],
    ),
    "another width": (lambda folder: change_config(folder, n_embd=64), ["wte.weight", "(300, 32)", "(300, 64)"]),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "tokenizer no JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), ["tokenizer.json"]),
    "another tokenizer": (use_more_entries, ["trained with another tokenizer"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_directory_is_refused(refused, here, damage):
    spoil, named = DAMAGES[damage]
    spoil(here / "model")
    message = refused("generate --model model --prompt Geese")
    assert len(message.splitlines()) == 1
    assert "model" in message
    for words in named:
        assert words in message
    assert refused("eval ducks.txt --model model") == message


# ---- folders that cannot be written to ------------------------------------------------------------------------------


def test_a_folder_below_a_file_is_refused(refused, here):
    for command in (
        "train --data ducks.txt --preset tiny --tokenizer bytes --seq-len 16 --max-steps 1 --out ducks.txt/run",
        "prepare two.csv --column answer --out ducks.txt/corpus",
        "download --from-file good.zip --raw ducks.txt/raw",
    ):
        with zipfile.ZipFile("good.zip", "w") as archive:
            archive.writestr("ducks.txt", "Ducks.\n" * 100)
        assert "ducks.txt" in refused(command)


@pytest.mark.skipif(os.geteuid() == 0, reason="root has every permission")
def test_a_folder_without_permission_is_named(refused, here):
    Path("weights/ducks").rename("ducks")
    Path("weights").chmod(0o555)
    try:
        assert "weights" in refused(TRAIN)
    finally:
        Path("weights").chmod(0o755)


def test_a_missing_permission_is_a_sentence(refused, here, monkeypatch):
    """The same test for root, who has every permission."""

    make = Path.mkdir

    def refuse(path, *arguments, **options):
        if path.is_relative_to("weights"):
            raise PermissionError(13, "Permission denied", str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "weights/new" in refused(TRAIN)


# ---- Ctrl-C and other signals ---------------------------------------------------------------------------------------


def endless(corpus):
    """Return the arguments of a training run that logs each step and does not end."""
    small = "--tokenizer bytes --n-layer 1 --n-head 2 --n-embd 16 --n-positions 32 --seq-len 16 --batch-size 2"
    return ["train", "--data", corpus, *small.split(), "--max-steps", "1000000", "--max-epochs", "1e6", "--log-every=1"]


def read_until(stream, beginning):
    """Read lines until one has this beginning, and return that line."""
    for line in stream:
        if line.startswith(beginning):
            return line
    raise AssertionError(f"no line began with {beginning!r}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_training_saves_first(start, mlx_gpt, corpus, number, code):
    process = start(*endless(corpus), "--out", "a run")
    read_until(process.stdout, "Step 2,")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err.split("\n")[1:] == ["Stopping after this step, and saving. Press Ctrl-C again to quit at once.", ""]
    told = r"^Stopped after step ([\d,]+)\. Continue with: mlx-gpt (train --resume 'a run')$"
    ((stopped, go_on),) = re.findall(told, out, re.MULTILINE)
    step = int(stopped.replace(",", ""))
    assert Path(f"a run/checkpoints/step-{step:08d}/training.json").exists()
    answer = mlx_gpt(*shlex.split(go_on), "--max-steps", step + 1)
    assert answer.code == 0
    assert f"after step {step}." in answer.out


def test_ctrl_c_before_training_leaves_no_half_written_file(start, tmp_path):
    process = start("train", "--data", "builtin", "--vocab-size", "8000", "--preset", "tiny")
    read_until(process.stdout, "Training a tokenizer")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.split() == ["Interrupted."]
    assert not (tmp_path / "weights").exists()
    assert {path.name for path in tmp_path.glob("data/cache/*/*")} == {"train.jsonl", "val.jsonl", "report.json"}


def test_ctrl_c_while_steps_are_measured_is_acknowledged():
    program = """
import os, signal
from mlx_gpt.signals import acknowledged

reader, writer = os.pipe()
os.dup2(writer, 2)
with acknowledged("Stopping."):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        print(os.read(reader, 99))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert ran.stdout == "b'\\nStopping.\\n'\n"


def test_a_second_ctrl_c_does_not_wait_for_the_step():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.received == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_any_command_shows_no_traceback(mlx_gpt, here, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_gpt.api.load", interrupt)
    for command in ("generate --model model --prompt Geese", "eval ducks.txt"):
        answer = mlx_gpt(*command.split())
        assert (answer.code, answer.out, answer.err.strip()) == (130, "", "Interrupted.")


def test_a_reader_that_closes_the_pipe_causes_no_error_message(start, trained):
    # The likeliest token is always the same one, so the output has no end.
    likeliest = ["--temperature", "0", "--repetition-penalty", "1", "--max-tokens", "1000000"]
    process = start("generate", "--model", trained / "weights/ducks", "--prompt", "The duck", *likeliest)
    assert process.stdout.read(20).startswith("The duck")
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=30)
    assert process.returncode not in (None, 0)
    assert "Traceback" not in err
    assert "Error" not in err
    assert "Exception" not in err


# ---- bugs -----------------------------------------------------------------------------------------------------------


def test_a_bug_is_a_sentence_too_unless_the_user_asks_for_the_traceback(mlx_gpt, here, monkeypatch):
    def fail(*arguments, **options):
        raise ZeroDivisionError("duck")

    monkeypatch.setattr("mlx_gpt.api.load", fail)
    answer = mlx_gpt("generate", "--model", "model", "--prompt", "Geese")
    assert answer.code == 1
    assert answer.err.startswith("Error: An unexpected error occurred (ZeroDivisionError: duck).")
    monkeypatch.setenv("MLX_GPT_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli.run(["generate", "--model", "model", "--prompt", "Geese"])


def test_an_end_of_file_where_more_was_expected_is_not_reported_as_ctrl_c(mlx_gpt, here, monkeypatch):
    def fail(*arguments, **options):
        raise EOFError("duck")

    monkeypatch.setattr("mlx_gpt.api.load", fail)
    answer = mlx_gpt("generate", "--model", "model", "--prompt", "Geese")
    assert answer.code == 1
    assert "An unexpected error occurred (EOFError: duck)." in answer.err
