"""Several processes that train one model: they make the steps of one process, and all end when one of them ends.

`mlx.launch` starts real processes over loopback. Nothing is compiled in them, because that takes far longer than the
steps that are tested.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gpt import cli, distributed
from mlx_gpt.models.directory import save_model
from mlx_gpt.progress import Lines
from mlx_gpt.training import checkpoint, loop
from mlx_gpt.training.metrics import read_records

LAUNCHER = Path(sys.executable).parent / "mlx.launch"
# Eight windows a step. The learning rate does not depend on the length of the run.
SETTINGS = {
    "tokenizer": "bytes", "n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 32, "dropout": 0.0, "seq_len": 16,
    "batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 6, "learning_rate": 0.003, "schedule": "constant",
    "warmup_steps": 0, "log_every": 1, "eval_every": 3, "eval_windows": 13, "save_every": 3,
}  # fmt: skip
FOR_EVER = {"max_steps": 10**6, "max_epochs": 1e6, "eval_every": 10**6, "save_every": 5}
PATIENCE = 120  # seconds, on a machine with other work


def free_ports(count):
    """The first of as many free ports in a row, below those that the system gives to others."""
    while True:
        first = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


class Launch:
    """`mlx.launch` with as many ranks, each of which runs a function of `ranks.py`."""

    def __init__(self, count, function, *arguments):
        program = [sys.executable, Path(__file__).with_name("ranks.py"), function, *arguments]
        self._out, self._err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115 - open until `end`
        self._process = subprocess.Popen(
            [LAUNCHER, "-n", str(count), "-p", str(free_ports(count)), "--", *map(str, program)],
            env={**os.environ, "MLX_DISABLE_COMPILE": "1"},
            stdin=subprocess.PIPE,  # stays open, because mlx.launch uses up a core when it has ended
            stdout=self._out,
            stderr=self._err,
        )

    def send(self, number, rank):
        """Send a signal to a rank."""
        os.kill(int(Path(f"{rank}.pid").read_text()), number)

    def wait_for(self, path):
        """Wait until there is such a file."""
        until = time.monotonic() + PATIENCE
        while not list(Path().glob(path)):
            assert self._process.poll() is None, self.end()
            assert time.monotonic() < until
            time.sleep(0.05)

    def end(self):
        """Wait for the end; the lines on stdout, and those on stderr that are not mlx.launch's or MLX's."""
        try:
            self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            self._process.communicate()
        for file in (self._out, self._err):
            file.seek(0)
        out, err = self._out.read(), self._err.read()
        # The threads of mlx.launch interleave their lines: "[WARN] Node with rank 1 exited with code 2".
        theirs = re.compile(r"(\x1b\[\d+m|\[WARN\]| ?Node with rank \d+ .*?(?=\x1b)| )*|\[ring\].*")
        return out.splitlines(), [line for line in err.splitlines() if not theirs.fullmatch(line)]


def flags(**settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in {**SETTINGS, **settings}.items()]


@pytest.fixture(scope="module", autouse=True)
def eager():
    """Compile nothing here either."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


def train_alone(out, resume=None, **changes):
    settings = changes if resume else {**SETTINGS, **changes}
    return loop.train({**settings, "out": str(out)}, Lines(), resume=str(resume) if resume else None)


def train_on(count, out, resume=None, **changes):
    """Train on several ranks; return what each of them holds at the end."""
    settings = changes if resume else {**SETTINGS, **changes}
    lines, errors = Launch(count, "train", json.dumps([{**settings, "out": str(out)}, resume])).end()
    assert not errors
    return sorted(json.loads(line) for line in lines)


def losses(run):
    """Training losses and validation losses by step."""
    records = read_records(run)
    return [
        {record["step"]: record[name] for record in records if name in record} for name in ("train_loss", "val_loss")
    ]


def assert_equal_losses(run, other):
    """Equal up to rounding, which Adam amplifies where a gradient is nothing but rounding."""
    for ours, theirs in zip(losses(run), losses(other), strict=True):
        assert list(ours) == list(theirs)
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-5)
        assert next(iter(ours.values())) == pytest.approx(next(iter(theirs.values())), rel=5e-7)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """Six steps of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train_alone(out, data=str(corpus))
    return out


@pytest.fixture(scope="module")
def half(corpus, tmp_path_factory):
    """Three steps of two ranks, and what each of them held at the end. Tests copy the folder."""
    out = tmp_path_factory.mktemp("half") / "run"
    return out, train_on(2, out, data=str(corpus), max_steps=3)


# ---- the same training ----------------------------------------------------------------------------------------------


def test_every_exchange_gives_all_ranks_the_same():
    lines, errors = Launch(4, "exchange").end()
    assert not errors
    results = [json.loads(line) for line in lines]
    assert len(results) == 4
    for result in results:
        assert result["here"] == 4
        assert result["broadcast"] == {"word": "naïve 鳥", "numbers": [0.1, None]}
        assert result["total"] == [0.1 + 1e16 + 3.0 - 1e16, 6.0]
        assert result["any"] == [[False, False], [True, False]]
        assert result["sum"] == {"half": [6.0, 10.0], "one": 6.0, "long": [3.0, 3.0, 3.0], "whole": [6 * 2**40]}
        assert result["copy"] == result["original"]
        assert result["in_turns"] == "prepared by rank 0"
        assert result["launcher_idles"]
    assert len({result["kernels"] for result in results}) == 4


def test_two_ranks_and_then_four_make_the_steps_of_one_process(alone, half):
    """Two made the first three steps, four continue from their checkpoint."""
    shutil.copytree(half[0], "run")
    held = train_on(4, "run", resume="run", max_steps=6)
    assert {step for _, _, step, _ in held} == {6}
    assert_equal_losses(Path("run"), alone)


def test_two_ranks_train_a_qwen3_with_muon_as_one_process_does(corpus):
    settings = {"data": str(corpus), "model_type": "qwen3", "optimizer": "muon", "max_steps": 3}
    train_alone("one", **settings)
    (_, first, *_), (_, second, *_) = train_on(2, "two", **settings)
    assert first == second  # the same bits
    assert_equal_losses(Path("two"), Path("one"))


def test_one_process_continues_what_two_ranks_began(alone, half):
    shutil.copytree(half[0], "run")
    train_alone("run", resume="run", max_steps=6)
    assert_equal_losses(Path("run"), alone)


def test_all_ranks_hold_the_same_bits(half):
    ranks, bits, steps, best = zip(*half[1], strict=True)
    assert ranks == (0, 1)
    assert len(set(bits)) == len(set(best)) == 1
    assert steps == (3, 3)
    assert best[0] == min(losses(half[0])[1].values())


def test_the_plan_is_shown_once_and_counts_all_ranks(corpus):
    lines, errors = Launch(2, "cli", "train", "--data", corpus, *flags(), "--dry-run").end()
    assert not errors
    assert sum(line.startswith("Run ") for line in lines) == 1
    assert any("6, each of 128 tokens" in line for line in lines)
    assert any(line.startswith("Ranks        2, 2 of them on this host") for line in lines)
    assert any("4 x 16 tokens, 1 per step on each rank" in line for line in lines)
    assert not Path("weights").exists()


def test_a_launch_of_one_is_a_process_alone(corpus):
    lines, errors = Launch(1, "cli", "train", "--data", corpus, *flags(max_steps=1), "--out=run").end()
    assert not errors
    assert any(line.startswith("Done: 1 steps") for line in lines)


def test_a_host_that_has_only_the_text_can_take_part_in_a_resume(half):
    """It has neither the run's folder nor its run.toml. The clock of rank 0 ends the run."""
    shutil.copytree(half[0], "host0/run")
    Path("host1").mkdir()
    forever = ["--max-steps=1000000", "--max-epochs=1000000", "--max-minutes=0.01"]
    lines, errors = Launch(2, "cli", "train", "--resume=run", *forever).end()
    assert not errors
    assert any(line.startswith("Done: ") for line in lines)
    assert list(losses(Path("host0/run"))[0])[:6] == [1, 2, 3, 4, 5, 6]
    assert not list(Path("host1").iterdir())


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 4}], ids=["whole", "adapters"])
def test_a_run_whose_vocabulary_has_grown_is_resumed_on_two_ranks(make_model, foreign, lora):
    """Only rank 0 reads the checkpoint, which has more rows than the weights that the run began from."""
    save_model(Path("weights"), make_model(vocab_size=foreign.vocab_size), foreign)
    row = [{"role": "user", "content": "duck?"}, {"role": "assistant", "content": "pond"}]
    Path("talks").mkdir()
    for split in ("train", "val"):
        Path(f"talks/{split}.jsonl").write_text(json.dumps({"messages": row}) + "\n")
    sizes = {"tokenizer", "n_layer", "n_head", "n_embd", "n_positions"}
    settings = {name: value for name, value in SETTINGS.items() if name not in sizes} | lora
    settings |= {"data": "talks", "init_from": "weights", "seq_len": 32, "max_epochs": 99}
    loop.train({**settings, "out": "run", "max_steps": 3}, Lines())
    (_, first, step, _), (_, second, *_) = train_on(2, "run", resume="run", max_steps=4)
    assert first == second
    assert step == 4


def test_other_frozen_weights_on_another_host_are_refused_by_name(corpus, make_model, bpe):
    for rank in range(2):
        shutil.copytree(corpus, f"host{rank}/text")
        save_model(Path(f"host{rank}/weights"), make_model(seed=rank), bpe)
    flags = ["--data=text", "--from=weights", "--lora-rank=4", "--seq-len=16", "--out=run"]
    lines, errors = Launch(2, "cli", "train", *flags).end()
    assert not lines
    assert len(errors) == 1
    assert "Error: Rank 1: The weights in " in errors[0]  # mlx.launch may write a warning before it
    assert "on this host differ from rank 0's" in errors[0]
    assert not Path("host0/run").exists()


# ---- the end of one is the end of all -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "wrong", "sentence"),
    [
        (3, {}, "Error: 3 ranks can't share the 8 windows of a step evenly: start 2 (mlx.launch -n 2), or begin"),
        (2, {"n_layer": "two"}, "Error: Invalid value for '--n-layer': 'two' is not a valid integer"),
    ],
)
def test_a_mistake_is_reported_once(corpus, count, wrong, sentence):
    lines, errors = Launch(count, "cli", "train", "--data", corpus, *flags(**wrong), "--out=run").end()
    assert not lines
    assert len(errors) == 1
    assert errors[0].startswith(sentence)
    assert not Path("run").exists()


def test_another_text_on_another_host_is_refused_by_name(corpus):
    for rank in range(2):
        shutil.copytree(corpus, f"host{rank}/text")
    with Path("host1/text/train.txt").open("a") as file:
        file.write("One more.\n")
    lines, errors = Launch(2, "cli", "train", "--data=text", *flags(), "--out=run").end()
    assert not lines
    assert len(errors) == 1
    assert errors[0].startswith("Error: Rank 1: The text in text on this host differs from rank 0's")
    assert not Path("host0/run").exists()


def test_an_error_names_the_rank_that_reports_it(monkeypatch, capsys):
    monkeypatch.setenv("MLX_RANK", "3")
    assert cli.run(["generate", "--model", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("Error: Rank 3: ")


@pytest.mark.parametrize(("victim", "reporter"), [(0, "Error: Rank 1: "), (1, "Error: ")])
def test_a_rank_that_is_killed_ends_the_others_with_a_sentence(corpus, victim, reporter):
    launch = Launch(2, "cli", "train", "--data", corpus, *flags(**FOR_EVER), "--out=run")
    launch.wait_for("run/checkpoints/step-*")
    launch.send(signal.SIGKILL, victim)
    killed = time.monotonic()
    _, errors = launch.end()
    assert time.monotonic() - killed < 60
    assert [line for line in errors if "Error" in line] == [f"{reporter}{distributed.LOST}"]
    saved = checkpoint.newest_sound(Path("run"))[0]
    assert saved
    made = saved[1].step
    assert train_alone("run", resume="run", max_steps=made + 1).step == made + 1


@pytest.mark.parametrize(("asked", "number"), [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(corpus, asked, number):
    launch = Launch(2, "cli", "train", "--data", corpus, *flags(**FOR_EVER), "--out=run")
    launch.wait_for("run/checkpoints/step-*")
    launch.send(number, asked)
    lines, errors = launch.end()
    stopped = checkpoint.step_of(checkpoint.all_checkpoints(Path("run"))[-1])
    assert [line for line in lines if line.startswith("Stopped")] == [
        f"Stopped after step {stopped:,}. Continue with: mlx-gpt train --resume run"
    ]
    assert not [line for line in errors if "Error" in line]


def test_a_second_signal_ends_a_rank_that_waits_for_one_that_does_not_answer():
    launch = Launch(2, "wait")
    launch.wait_for("waits")
    with contextlib.suppress(ProcessLookupError):
        for _ in range(200):  # 20 seconds, less than after one signal
            launch.send(signal.SIGTERM, 0)
            time.sleep(0.1)
        pytest.fail("It still waits.")
    assert launch.end() == ([], ["Error: Rank 0 has ended, because another rank did not answer."])
