"""Each command does its work when nothing goes wrong."""

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mlx_gpt import device
from mlx_gpt.cli import COMMANDS, doctor
from mlx_gpt.cli.generate import DIVIDER
from mlx_gpt.cpu import kernels
from mlx_gpt.errors import UserError
from mlx_gpt.mac import Mac
from mlx_gpt.presets import PRESETS
from tests.cli.conftest import TINY

pytestmark = pytest.mark.usefixtures("unmeasured")


def value(text, name):
    """The number after `name` in a line of a report."""
    (found,) = re.findall(rf"^{name}\s+([\d,.]+)", text, re.MULTILINE)
    return float(found.replace(",", ""))


# ---- from a person's text to a model that talks ---------------------------------------------------------------------


def test_from_a_table_to_a_model_that_talks(mlx_gpt, sentences, tmp_path):
    """In an empty folder, with only the commands that the README names."""
    rows = [*sentences[:200], "", sentences[0]]  # one empty, one repeated
    Path("essays.csv").write_text("id,text\n" + "".join(f'{i},"{row}"\n' for i, row in enumerate(rows)))
    prepared = mlx_gpt("prepare", "essays.csv")
    assert prepared.code == 0
    assert "read     202 documents" in prepared.out
    assert "kept     200 documents" in prepared.out
    assert re.search(r"1 empty.*\n?.*1 repeated|1 repeated.*\n?.*1 empty", prepared.out)
    counts = [len(Path(f"data/processed/{side}.jsonl").read_text().splitlines()) for side in ("train", "val")]
    assert sum(counts) == 200
    assert f"train    {counts[0]} documents" in prepared.out

    small = "--n-layer 1 --n-embd 32 --seq-len 16 --batch-size 4 --vocab-size 300 --max-steps 20 --learning-rate 0.02"
    trained = mlx_gpt("train", "--preset", "tiny", *small.split())
    assert trained.code == 0
    losses = [float(loss) for loss in re.findall(r"Validation Loss: ([\d.]+)", trained.out)]
    assert losses[-1] < losses[0] - 0.5
    assert "mlx-gpt generate --model weights/tiny-processed" in trained.out

    said = mlx_gpt("generate", "--prompt", "The duck", "--max-tokens", "20", "--seed", "1")
    assert said.code == 0
    assert said.out.startswith("The duck")
    measured = mlx_gpt("eval")
    assert measured.code == 0
    assert value(measured.out, "Loss") == pytest.approx(losses[-1], abs=1e-3)  # 1,024 windows are all there are


@pytest.mark.parametrize("command", ["prepare {}", "download --from-file {}"])
def test_another_text_replaces_the_corpus_only_with_overwrite(mlx_gpt, command):
    for name in ("one.txt", "two.txt"):
        Path(name).write_text(f"{name}\n" * 50)
    one, two = command.format("one.txt").split(), command.format("two.txt").split()
    assert [mlx_gpt(*one).code, mlx_gpt(*one).code] == [0, 0]
    refused = mlx_gpt(*two)
    assert refused.code == 2
    assert re.search(r"data/processed holds the text of \S*/one.txt: choose another folder", refused.err)
    assert "one.txt" in Path("data/processed/train.jsonl").read_text()
    assert mlx_gpt(*two, "--overwrite").code == 0
    assert "two.txt" in Path("data/processed/train.jsonl").read_text()


def test_the_commands_that_are_suggested_can_be_pasted(mlx_gpt, text):
    prepared = mlx_gpt("prepare", text, "--out", "Läufe é/my $text")
    (line,) = re.findall("Train on it with: mlx-gpt (.*)", prepared.out)
    trained = mlx_gpt(*shlex.split(line), *TINY, "--out", "weights/Läufe é/e 1")
    assert trained.code == 0, trained.err
    (line,) = re.findall("Try it with: mlx-gpt (.*)", trained.out)
    assert mlx_gpt(*shlex.split(line), stdin="The duck\n").code == 0


def test_eval_finds_the_loss_that_the_log_has(mlx_gpt, trained, base, corpus):
    model = trained / "weights/ducks"
    measured = mlx_gpt("eval", "--model", model)
    loss = base.column("val_loss")[-1]
    assert value(measured.out, "Loss") == pytest.approx(loss, abs=1e-4)
    assert value(measured.out, "Bits per byte") == pytest.approx(base.column("val_bits_per_byte")[-1], abs=1e-4)
    tokens = len((corpus / "val.txt").read_bytes())  # each end of a line becomes the end of a document
    assert value(measured.out, "Tokens") == tokens - 1
    by_file = mlx_gpt("eval", corpus / "val.txt", "--model", model / "final")
    assert value(by_file.out, "Loss") == pytest.approx(loss, abs=1e-4)


def test_train_and_eval_say_how_much_of_a_text_the_tokenizer_does_not_know(mlx_gpt, train):
    words = HFTokenizer(WordLevel({"[UNK]": 0, "The": 1, "duck": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.save("words.json")
    assert "tokens of this text are [UNK]" in train("--tokenizer", "words.json").out
    Path("text.txt").write_text("The duck barks.")
    measured = mlx_gpt("eval", "text.txt", "--model", "run")
    assert "WARNING: 2 of the 5 tokens of this text are [UNK]" in measured.out


def test_eval_measures_the_answers_in_a_file_of_conversations(mlx_gpt, saying, tmp_path):
    saying(tmp_path / "duck", b"Quack.", 96)
    for name, answer in (("right", "Quack."), ("wrong", "Honk.")):
        rows = [[{"role": "user", "content": "Hi."}, {"role": "assistant", "content": answer}]] * 2
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    right, wrong = (mlx_gpt("eval", f"{name}.jsonl", "--model", tmp_path / "duck").out for name in ("right", "wrong"))
    assert re.search(r"Tokens +14 ", right)  # six bytes and the end of the turn, twice
    [low], [high] = (re.findall(r"Loss +([\d.]+)", out) for out in (right, wrong))
    assert float(low) < 0.1 < 10 < float(high)


def test_generate_says_that_a_model_with_a_template_can_converse(mlx_gpt, saying, tmp_path):
    saying(tmp_path / "duck", b"Quack.", 96)
    answer = mlx_gpt("generate", "--model", tmp_path / "duck", "--prompt", "Hi", "--max-tokens", "2")
    assert "This model has a chat template: with --interactive it answers messages." in answer.err


def test_eval_refuses_conversations_that_have_taken_the_place_of_the_text(mlx_gpt, train, corpus):
    shutil.copytree(corpus, "text")
    train("--data", "text")
    talk = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    for split in ("train", "val"):
        Path(f"text/{split}.txt").unlink()
        Path(f"text/{split}.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    measured = mlx_gpt("eval", "--model", "run")
    assert measured.code == 2
    assert "was not trained on the text that text holds now: name a FILE." in measured.err


def test_eval_flags_change_what_is_measured(mlx_gpt, trained, corpus, tmp_path):
    def measure(*flags):
        answer = mlx_gpt("eval", *flags, "--model", trained / "weights/ducks")
        assert answer.code == 0
        return answer.out

    (tmp_path / "two.csv").write_text("a,b\nThe duck swims.,Geese.\n")
    assert value(measure("two.csv", "--column", "a"), "Tokens") > value(measure("two.csv", "--column", "b"), "Tokens")
    val = corpus / "val.txt"
    assert measure(val) == measure(val, "--batch-size", "3")
    assert measure(val) != measure(val, "--seq-len", "32")
    assert measure(val, "--documents", "file") != measure(val, "--documents", "line")


@pytest.mark.parametrize("rest", ["", "/tree/main", "/viewer/default/train?row=3", "?row=3"])
def test_download_takes_the_address_of_a_page_of_the_hub(mlx_gpt, monkeypatch, rest):
    asked = mock.Mock(side_effect=UserError("Asked."))
    monkeypatch.setattr("mlx_gpt.data.hub.download", asked)
    mlx_gpt("download", "--dataset", f"https://huggingface.co/datasets/owner/name{rest}")
    assert asked.call_args.args[0] == "hf:owner/name"


def test_download_takes_a_file_that_was_downloaded_by_hand(mlx_gpt, text, tmp_path):
    with zipfile.ZipFile("ducks.zip", "w") as archive:
        archive.write(text, "ducks.txt")
    answer = mlx_gpt("download", "--from-file", "ducks.zip", "--documents", "line", "--raw", "raw", "--out", "ducks")
    assert answer.code == 0
    assert (tmp_path / "raw/ducks/ducks.txt").read_text() == text.read_text()
    assert "kept     300 documents" in answer.out
    assert "mlx-gpt train --data ducks" in answer.out
    assert (tmp_path / "ducks/train.jsonl").exists()


# ---- help and doctor ------------------------------------------------------------------------------------------------


def test_help_of_every_command_needs_no_arrays():
    script = """
import sys
from mlx_gpt.cli import COMMANDS, run
for arguments in (["--help"], *([name, "--help"] for name in COMMANDS)):
    assert run(arguments) == 0
    print("=" * 9)
print([name for name in sys.modules if name.split(".")[0] in ("mlx", "numpy", "tokenizers", "kaggle")])
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=30)
    general, *pages, loaded = ran.stdout.split("=" * 9 + "\n")
    assert loaded == "[]\n"
    for (name, sentence), page in zip(COMMANDS.items(), pages, strict=True):
        assert re.search(rf"^  {name} +{re.escape(sentence.split()[0])}", general, re.MULTILINE)
        assert f"Usage: mlx-gpt {name}" in page
        assert "--help" in page


def test_help_says_what_each_flag_is_and_where_it_starts(mlx_gpt):
    page = " ".join(mlx_gpt("train", "--help").out.split())
    assert "--min-lr X Learning rate at the end. [default: a tenth of --learning-rate]" in page
    assert "--schedule [cosine|linear|constant" in page
    assert page.index("Options:") < page.index("Text:") < page.index("Model:") < page.index("Training")
    assert "--max-tokens, --max-length N" in mlx_gpt("generate", "--help").out


def test_version(mlx_gpt):
    assert re.search(r"\d+\.\d+\.\d+", mlx_gpt("--version").out)


def test_without_a_command_it_shows_the_help(mlx_gpt):
    answer = mlx_gpt()
    assert "Usage: mlx-gpt" in answer.out + answer.err
    assert "Error" not in answer.err


@pytest.fixture
def small(monkeypatch):
    """Let doctor measure something small."""
    monkeypatch.setattr(doctor, "PRODUCT", 64)
    monkeypatch.setattr(doctor, "SLOW_GFLOPS", 0)
    for name, size in {"n_layer": 1, "n_embd": 16, "vocab_size": 300, "seq_len": 16, "batch_size": 2}.items():
        monkeypatch.setitem(PRESETS["tiny"], name, size)


def test_doctor_shows_the_machine(mlx_gpt, small):
    answer = mlx_gpt("doctor")
    for row in ("Python", "mlx", "kaggle", "Device", "Usable memory", "Precision", "Matrix product", "BLAS", "Kaggle"):
        assert re.search(rf"^{row} +\S", answer.out, re.MULTILINE)
    assert value(answer.out, "Training") > 0
    assert re.search(r"^Fast path +one step in float32 differs by loss \de-\d\d, gradients \de-\d\d", answer.out, re.M)
    assert (answer.code, answer.out.splitlines()[-1]) == (0, "Ready.")


def test_doctor_says_when_no_blas_is_in_place(mlx_gpt, small, monkeypatch):
    monkeypatch.setattr(doctor, "SLOW_GFLOPS", 1e9)
    answer = mlx_gpt("doctor")
    assert answer.code == 1
    assert "Problem: No tuned BLAS" in answer.out


def test_doctor_without_a_compiler_says_what_to_install(mlx_gpt, small, monkeypatch):
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    answer = mlx_gpt("doctor")
    assert answer.code == 1
    assert "Problem: There is no g++" in answer.out
    assert not re.search("^Training", answer.out, re.MULTILINE)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_doctor_finds_a_device_that_computes_something_else(mlx_gpt, small, monkeypatch, factor):
    gelu = kernels.gelu
    monkeypatch.setattr(kernels, "gelu", lambda x: gelu(x) * factor)
    answer = mlx_gpt("doctor")
    assert answer.code == 1
    assert "Problem: A training step in float32 gives other numbers than plain operations on the CPU" in answer.out


def test_doctor_names_what_is_wrong_and_goes_on(mlx_gpt, small, monkeypatch):
    def fails(here):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(doctor, "training_speed", fails)
    monkeypatch.setattr(doctor, "PACKAGES", ("mlx", "mlx-nonsense"))
    monkeypatch.setattr(doctor.packages, "backend_conflict", lambda: "mlx-cpu and mlx-cuda-13 both install it.")
    answer = mlx_gpt("doctor")
    assert (answer.code, answer.err.count("Traceback")) == (1, 0)
    problems = re.findall(r"^Problem: (.*)$", answer.out, re.MULTILINE)
    assert [problem.split()[0] for problem in problems] == ["mlx-nonsense", "mlx-cpu", "A"]
    assert "no kernel" in problems[-1]


def test_doctor_without_the_device_that_was_asked_for(mlx_gpt, monkeypatch):
    monkeypatch.setattr(device, "WANTED", "tpu")
    answer = mlx_gpt("doctor")
    assert answer.code == 1
    assert "Problem: MLX_GPT_DEVICE=tpu is not a device" in answer.out


M3 = Mac("Apple M3 Max", 40, (14, 6, 1), 0)
M5 = Mac("Apple M5", 10, (26, 2), 24576)


def metal_rows(machine):
    """What doctor says of a Mac with a GPU, by row."""
    return dict(doctor.device_rows(device.Device("metal", machine.chip, 32 * 2**30, 24 * 2**30), machine))


def test_doctor_describes_a_mac():
    old, new = metal_rows(M3), metal_rows(M5)
    assert (old["Chip"], old["macOS"]) == ("Apple M3 Max, 40 GPU cores", "14.6.1")
    assert (old["Device"], old["Usable memory"]) == ("Apple M3 Max (metal, 32 GiB)", "24.0 GiB")
    assert old["Precision"].startswith("computes in bfloat16")
    assert "needs macOS 15" in old["Wired memory"]
    assert "24,576 MiB at most; `sudo sysctl iogpu.wired_limit_mb=N`" in new["Wired memory"]
    newer = dataclasses.replace(M3, macos=(15,))
    assert "default" in metal_rows(newer)["Wired memory"]
    unanswered = metal_rows(Mac("", None, (), None))
    assert (unanswered["Chip"], unanswered["macOS"]) == ("unknown, GPU cores unknown", "unknown")


def test_doctor_says_when_float32_is_rounded(monkeypatch):
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    assert metal_rows(M5)["Matrix units"] == "used"
    assert "TF32" in metal_rows(M5)["float32"]
    early = dataclasses.replace(M5, macos=(26, 1))
    assert metal_rows(early)["Matrix units"] == "not used: MLX needs macOS 26.2 for them"
    for machine in (M3, early):
        assert metal_rows(machine)["float32"] == "products keep all bits"
    assert "Matrix units" not in metal_rows(M3)
    assert "TF32" in dict(doctor.device_rows(device.Device("cuda", "NVIDIA", 1, 1), None))["float32"]
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    assert metal_rows(M5)["float32"] == "products keep all bits"


def test_doctor_compares_both_precisions_of_a_gpu(small, capsys):
    """The CPU stands in for the GPU, without what makes a CPU quick."""
    gpu = device.Device("metal", "Apple M5", 32 * 2**30, 24 * 2**30)
    assert list(doctor.measure(gpu, M5)) == []
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("GPU and CPU")]
    assert ["one step in float32" in rows[0], "one step in bfloat16" in rows[1]] == [True, True]
    assert (rows[0].endswith("at most 1e-02 is fine"), rows[1].endswith("at most 5e-02 is fine")) == (True, True)


def test_doctor_on_a_mac_without_a_gpu(mlx_gpt, small, monkeypatch):
    """On a virtual machine, say: MLX computes on the CPU although nobody asked for it."""
    monkeypatch.setattr(doctor.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(doctor.mac, "look", lambda: M3)
    monkeypatch.delenv("MLX_GPT_DEVICE")
    answer = mlx_gpt("doctor")
    assert re.search(r"^Chip +Apple M3 Max, 40 GPU cores$", answer.out, re.MULTILINE)
    assert "Wired memory" not in answer.out
    assert (answer.code, answer.out.count("Problem: MLX finds no GPU on this Mac")) == (1, 1)


# ---- generate -------------------------------------------------------------------------------------------------------


def test_stdout_is_only_text_and_the_speed_goes_to_stderr(mlx_gpt, models):
    answer = mlx_gpt("generate", "--model", models / "one", "--prompt", "The duck", "--max-tokens", "5", "--seed", "1")
    assert answer.out.startswith("The duck")
    assert "tokens/s" not in answer.out
    assert DIVIDER not in answer.out
    speed = r"Prompt: \d+ tokens, [\d,.]+ tokens/s\. Generation: 5 tokens, [\d,.]+ tokens/s\. Peak memory: [\d.]+ MB\."
    assert re.fullmatch(speed, answer.err.strip())


def test_a_model_directory_a_run_and_the_newest_run_are_found(mlx_gpt, trained, monkeypatch):
    same = ("--prompt", "The duck", "--seed", "1", "--max-tokens", "5")
    monkeypatch.chdir(trained)
    answer = mlx_gpt("generate", *same)
    assert answer.err.startswith("Model: weights/ducks, the newest run.\n")
    newest = answer.out
    assert newest == mlx_gpt("generate", "--model", "weights/ducks", *same).out
    assert newest == mlx_gpt("generate", "--model", "weights/ducks/best", *same).out


def test_a_bar_in_a_terminal_has_the_facts(terminal, corpus):
    small = "--tokenizer bytes --n-layer 1 --n-head 2 --n-embd 16 --n-positions 32 --seq-len 16 --batch-size 2"
    window = terminal("train", "--data", corpus, *small.split(), "--max-steps", "100000", "--max-epochs", "1e6")
    window.see("Validation Loss")
    for fact in ("Training", "loss=", "lr=", "tok/s=", "mem="):
        window.see(fact)
    window.type("\x03")
    window.see("Stopped after step")
    assert window.process.wait(timeout=20) == 130
