"""TensorBoard and Weights & Biases show the same numbers as metrics.jsonl, across resumes, and never end a run."""

import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlx_gpt import plot
from mlx_gpt.errors import UserError
from mlx_gpt.training import reporters
from mlx_gpt.training.metrics import read_records

EACH_STEP = {"log_every": 1, "save_every": 1, "eval_every": 2, "report_to": ["tensorboard"]}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, eager, unmeasured):
    """Run in an empty folder, without compiling anything."""
    monkeypatch.chdir(tmp_path)


def curves(run="run"):
    """Return the points of each curve as TensorBoard would draw them."""
    events = EventAccumulator(f"{run}/tensorboard").Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def metrics(run="run"):
    """Return the numbers of metrics.jsonl in the same form, to the precision of 32-bit floats."""
    found: dict[str, list] = {}
    for record in map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines()):
        for name, value in record.items():
            if name not in ("step", "started"):
                found.setdefault(name, []).append((record["step"], pytest.approx(value, rel=1e-6)))
    return found


def warnings(outcome):
    return [line for line in outcome.lines if line.startswith("WARNING")]


def test_tensorboard_shows_every_number_of_the_metrics(train):
    train("run", **EACH_STEP, max_steps=4)
    shown = curves()
    assert shown == metrics()
    assert [step for step, _ in shown["train_loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in shown["val_loss"]] == [0, 2, 4]


@pytest.mark.parametrize("back", ["run", "run/checkpoints/step-00000002"], ids=["newest", "earlier"])
def test_after_a_resume_it_shows_each_step_once(train, back):
    train("run", **EACH_STEP, keep_checkpoints=9, max_steps=8, stop_after=5)
    # The curves now go beyond the newest checkpoint, as after the process is killed.
    shutil.rmtree("run/checkpoints/step-00000005")
    train("run", resume=back, overwrite=back != "run", **(EACH_STEP | {"max_steps": 6}))
    assert curves() == metrics()
    assert [step for step, _ in curves()["train_loss"]] == [1, 2, 3, 4, 5, 6]


def test_a_spike_is_not_part_of_a_curve(train):
    """Otherwise the curve of a run that logs every fourth step would mostly show its spikes."""
    train("run", **(EACH_STEP | {"log_every": 4, "learning_rate": 50.0}), max_steps=8)
    records = read_records(Path("run"))
    assert any(record.get("event") == "spike" for record in records)
    assert [step for step, _ in curves()["train_loss"]] == [4, 8]
    assert plot._series(records, "train_loss")[0] == [4, 8]


def test_a_run_that_is_replaced_leaves_no_curves(train):
    train("run", **EACH_STEP, max_steps=4)
    train("run", **EACH_STEP, max_steps=2, overwrite=True)
    assert curves() == metrics()


def test_reporting_can_start_and_stop_with_a_resume(train):
    train("run", **(EACH_STEP | {"report_to": []}), max_steps=1)
    assert not Path("run/tensorboard").exists()
    train("run", resume="run", report_to=["tensorboard", "tensorboard"], max_steps=2)
    train("run", resume="run", report_to=["none"], max_steps=3)
    assert [step for step, _ in curves()["train_loss"]] == [2]


def test_a_reporter_that_cannot_start_gives_one_warning(train):
    train("run", **EACH_STEP, max_steps=1)
    shutil.rmtree("run/tensorboard")
    Path("run/tensorboard").write_text("mine")
    outcome = train("run", resume="run", **EACH_STEP, max_steps=3)
    assert outcome.finished
    (warning,) = warnings(outcome)
    assert warning.startswith("WARNING: logging to tensorboard has stopped for this run (")
    assert warning in Path("run/training.log").read_text()


def test_a_reporter_that_fails_later_gives_one_warning(train, monkeypatch):
    def record(self, record):
        if record["step"] == 2:
            raise OSError(28, "No space left on device")
        original(self, record)

    original = reporters.TensorBoard.record
    monkeypatch.setattr(reporters.TensorBoard, "record", record)
    outcome = train("run", **EACH_STEP, max_steps=4)
    assert outcome.finished
    (warning,) = warnings(outcome)
    assert "No space left on device" in warning
    assert [step for step, _ in curves()["train_loss"]] == [1]
    assert len(metrics()["train_loss"]) == 4


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_reported_before_anything_is_changed(train, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer", None)
    sentence = rf"^--report-to {name} needs a package: run `pip install -e '\.\[{name}\]'` in the project's folder\.$"
    with pytest.raises(UserError, match=sentence):
        train("run", report_to=[name])
    assert not Path("run").exists()
    train("run", max_steps=1)
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    with pytest.raises(UserError, match=sentence):
        train("run", resume="run", max_steps=2, report_to=[name])
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before


@pytest.mark.parametrize("wrong", ["tensorbord", ["tensorbord"], "", 3])
def test_anything_but_names_of_reporters_is_refused(train, wrong):
    with pytest.raises(UserError, match=r"^`report_to` must be one or several of .*tensorboard"):
        train("run", report_to=wrong)


# ---- wandb ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """The real package, without a key."""
    package = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    package.teardown()  # because the package keeps the settings of the process
    yield package
    package.teardown()


def sent(folder):
    """Return the rows of an offline run. The file has the format of a LevelDB log, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, at, pieces, rows = path.read_bytes(), 7, b"", []
    while at < len(data):
        if 32768 - at % 32768 < 7:  # padding, because a header does not fit
            at += 32768 - at % 32768
        length, kind = struct.unpack_from("<HB", data, at + 4)
        pieces += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            items = Record.FromString(pieces).history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
            pieces = b""
    return [row for row in rows if row]


def test_without_a_key_wandb_is_refused_without_a_prompt(wandb, train):
    with pytest.raises(UserError, match=r"^--report-to wandb needs a key: "):
        train("run", report_to=["wandb"])
    assert not Path("run").exists()


def test_wandb_gets_the_metrics_and_a_resume_continues_the_same_run(wandb, train, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = EACH_STEP | {"report_to": ["wandb"]}
    assert not warnings(train("run", **settings, max_steps=2))
    assert not warnings(train("run", resume="run", **settings, max_steps=3))
    first, second = sorted(Path("run/wandb").glob("offline-run-*"))
    identity = Path("run/wandb/id").read_text()
    assert first.name.endswith(identity)
    assert second.name.endswith(identity)
    rows = sent(first) + sent(second)
    assert [row["_step"] for row in rows] == [0, 1, 2, 3]
    for name in ("train_loss", "val_loss", "learning_rate"):
        assert [(row["_step"], row[name]) for row in rows if name in row] == metrics()[name]
