"""The memory that a run is expected to hold, on this machine and on Macs; what it says when that is too much."""

import dataclasses
import os
import re
import sys
from pathlib import Path

import click
import pytest

from mlx_gpt import backend
from mlx_gpt.backend import GIB, Device, device_from
from mlx_gpt.config import Config, ModelConfig, TrainingConfig
from mlx_gpt.errors import UserError
from mlx_gpt.presets import PRESETS
from mlx_gpt.settings import build, resolve
from mlx_gpt.training import memory, setup
from tests.training.conftest import TINY, Silent
from tests.training.peaks import Shape, peak, variants

# What macOS recommends as a working set by default: two thirds of the memory, three quarters from 64 GB on.
WORKING_SETS = {8: 5_726_623_061, 16: 11_453_251_584, 24: 17_179_885_568, 64: 51_539_607_552, 128: 103_079_215_104}
FLAG = re.compile(r"--([a-z-]+)(?: (\d+))?")
# Not among those of the script, from which the estimate was made.
SHAPES = [Shape(4, 4, 96, 64, 8, 65), Shape(5, 4, 112, 160, 6, 2500), Shape(24, 4, 64, 48, 8, 400)]


def mac(gigabytes: int) -> Device:
    """A Mac as Metal would describe it."""
    facts: dict[str, str | int] = {
        "device_name": f"a Mac with {gigabytes} GB",
        "memory_size": gigabytes * GIB,
        "max_recommended_working_set_size": WORKING_SETS[gigabytes],
    }
    return device_from(True, False, facts)


def cpu(usable: float) -> Device:
    return Device("cpu", "cores", int(usable), int(usable))


def preset(name: str, **changes) -> tuple[ModelConfig, TrainingConfig]:
    config = build(Config, PRESETS[name])
    return config.model, dataclasses.replace(config.training, **changes)


@pytest.mark.parametrize("case", [0, 3, 5, 6])  # each of the three variants on and off
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(shape, case):
    expected, measured = peak(shape, *variants(shape)[case])
    assert expected == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("gigabytes", WORKING_SETS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_plan_for_every_mac_or_a_refusal(name, gigabytes):
    model, training = preset(name, auto_batch_size=True)
    device = mac(gigabytes)
    chosen, problem = memory.fit(model, training, device)
    if (name, gigabytes) == ("large", 8):  # its weights and means alone are 5 GB
        assert re.search(r"No batch of this model fits: --preset medium.* would\.$", problem)
        return
    assert not problem
    assert memory.estimate(model, chosen, device).peak < device.usable
    windows = training.batch_size * training.gradient_accumulation_steps
    assert chosen.batch_size * chosen.gradient_accumulation_steps == windows
    assert not chosen.auto_batch_size


def test_what_fits_is_left_as_it_is():
    model, training = preset("tiny")
    assert memory.fit(model, training, cpu(64 * GIB)) == (training, "")


@pytest.mark.parametrize(
    ("gigabytes", "changed"),
    [
        (20, {"batch_size", "gradient_accumulation_steps"}),
        (3, {"batch_size", "gradient_accumulation_steps", "grad_checkpoint"}),
        (2.4, {"batch_size", "gradient_accumulation_steps", "grad_checkpoint", "seq_len"}),
    ],
)
def test_the_flags_that_it_names_fit_and_cost_the_least(gigabytes, changed):
    """The less memory, the more has to be given up; what is named is read back as a person would type it."""
    model, training = preset("medium", seq_len=1024)
    device = cpu(gigabytes * GIB)
    named = re.search(r"This fits: (--.*?) \(about", memory.fit(model, training, device)[1])
    assert named
    given = {flag.replace("-", "_"): int(value) if value else True for flag, value in FLAG.findall(named[1])}
    assert given.keys() == changed
    again = resolve({"preset": "medium", "data": "builtin", "seq_len": 1024} | given)
    assert memory.fit(again.model, again.training, device) == (again.training, "")
    assert again.training.batch_size * again.training.gradient_accumulation_steps == 64


@pytest.mark.parametrize(
    ("windows", "ranks", "of_a_rank"),
    [((8, 4), 1, (8, 4)), ((8, 4), 2, (8, 2)), ((16, 1), 2, (8, 1)), ((4, 3), 2, (3, 2)), ((2, 7), 2, (1, 7))],
)
def test_a_rank_takes_as_many_windows_at_once_as_share_its_part_evenly(windows, ranks, of_a_rank):
    training = TrainingConfig(batch_size=windows[0], gradient_accumulation_steps=windows[1], ranks=ranks)
    assert (training.micro_batch_size, training.micro_steps) == of_a_rank


def test_each_rank_holds_its_own_micro_batch_and_auto_chooses_for_it():
    model, training = preset("medium", auto_batch_size=True)
    tight = cpu(12 * GIB)
    alone, _ = memory.fit(model, training, tight)
    for ranks in (2, 4):
        chosen, problem = memory.fit(model, dataclasses.replace(training, ranks=ranks), tight)
        assert not problem
        assert chosen.windows_per_step == alone.windows_per_step == 64
        assert chosen.windows_per_rank == 64 // ranks
        assert chosen.micro_batch_size == chosen.batch_size <= 64 // ranks
        assert memory.fits(memory.estimate(model, chosen, tight), tight)
    refused = memory.fit(model, dataclasses.replace(training, auto_batch_size=False, ranks=2), tight)[1]
    assert "This fits: --batch-size" in refused


@pytest.fixture(autouse=True)
def own_cores():
    """No test leaves another its cores."""
    yield
    backend.cores_at_first.cache_clear()


def test_ranks_on_one_host_divide_its_memory_and_its_cores(monkeypatch):
    assert backend.part_of(cpu(12 * GIB), 3).usable == 4 * GIB
    assert backend.part_of(mac(24), 2).usable == mac(24).usable // 2
    assert backend.part_of(Device("cuda", "GPU", GIB, GIB), 2).usable == GIB  # each has its own
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(8)), raising=False)
    kept = []

    def keep(thread, cores):
        kept.append((thread, (*cores,)))
        monkeypatch.setattr("os.sched_getaffinity", lambda process: set(cores), raising=False)

    monkeypatch.setattr("os.sched_setaffinity", keep, raising=False)
    backend.cores_at_first.cache_clear()
    for _ in range(2):  # of two trainings one after the other
        backend.take_cores(1, 2)
        assert backend.cores() == 4
    if sys.platform == "linux":
        assert {*kept} >= {(os.getpid(), (4, 5, 6, 7))}


def test_with_more_ranks_than_cores_each_has_one(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5}, raising=False)
    backend.cores_at_first.cache_clear()
    kept = set()
    monkeypatch.setattr("os.sched_setaffinity", lambda thread, cores: kept.add((*cores,)), raising=False)
    for number in range(4):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        backend.take_cores(number, 4)
        assert backend.cores() == 1
    assert kept == ({(3,), (5,)} if sys.platform == "linux" else set())


def test_a_model_that_fits_with_no_batch_names_a_preset_that_does():
    model, training = preset("large")
    device = cpu(0.1 * GIB)
    named = re.search(
        r"No batch of this model fits: (--preset tiny --batch-size .*) would\.$", memory.fit(model, training, device)[1]
    )
    assert named
    given = {flag.replace("-", "_"): int(value) for flag, value in FLAG.findall(named[1]) if value}
    again = resolve({"preset": "tiny", "data": "builtin"} | given)
    assert memory.fit(again.model, again.training, device) == (again.training, "")
    assert "free some memory, or take another machine" in memory.fit(model, training, cpu(1e6))[1]


def test_auto_takes_as_many_windows_at_once_as_fit():
    model, training = preset("medium", auto_batch_size=True)
    roomy, _ = memory.fit(model, training, cpu(1000 * GIB))
    assert (roomy.batch_size, roomy.gradient_accumulation_steps) == (64, 1)
    tight, _ = memory.fit(model, training, cpu(12 * GIB))
    larger = dataclasses.replace(tight, batch_size=2 * tight.batch_size)
    assert not tight.grad_checkpoint
    recomputing, problem = memory.fit(model, training, cpu(2.9 * GIB))
    assert recomputing.grad_checkpoint
    assert not problem
    longer = dataclasses.replace(training, seq_len=1024)
    assert "--seq-len 512" in memory.fit(model, longer, cpu(2.5 * GIB))[1]  # another training, so it is only named
    assert not memory.fits(memory.estimate(model, larger, cpu(12 * GIB)), cpu(12 * GIB))


def test_half_the_numbers_take_less_than_whole_ones():
    model, training = preset("medium")
    whole, half = (
        memory.estimate(model, dataclasses.replace(training, precision=precision), mac(64))
        for precision in ("float32", "bfloat16")
    )
    assert half.activations < 0.7 * whole.activations
    assert half.weights > whole.weights  # a copy to compute with comes on top
    assert half.gradients == whole.gradients


def test_the_readme_shows_what_fits_which_mac():
    """The table of presets by Mac is made of what `--batch-size auto` would choose there."""

    def cell(name: str, gigabytes: int) -> str:
        model, training = preset(name, auto_batch_size=True)
        chosen, problem = memory.fit(model, training, mac(gigabytes))
        words = f"{chosen.batch_size} x {chosen.gradient_accumulation_steps}"
        return "-" if problem else words + (", computed twice" if chosen.grad_checkpoint else "")

    rows = [["preset", *(f"{gigabytes} GB" for gigabytes in WORKING_SETS)], ["---"] * (1 + len(WORKING_SETS))]
    rows += [[f"`{name}`", *(cell(name, gigabytes) for gigabytes in WORKING_SETS)] for name in PRESETS]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    readme = Path(__file__).parents[2] / "README.md"
    if not readme.read_text(encoding="utf-8").count(table):
        click.echo(table)
        pytest.fail("README.md has another table of presets by Mac than the memory plan gives; it is shown above.")


def test_training_config_has_no_automatic_batch_left_over():
    """Nobody but the plan may see a batch that is still to be chosen."""
    assert not TrainingConfig().auto_batch_size
    assert resolve({"batch_size": "auto", "data": "builtin"}).training.auto_batch_size
    assert not resolve({"batch_size": 4, "data": "builtin"}).training.auto_batch_size


def test_a_run_that_does_not_fit_is_refused_before_anything_is_touched(train, tmp_path, monkeypatch, eager):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend, "device", lambda: cpu(1e6))
    with pytest.raises(UserError, match=r"^Training would hold about \d+ MiB at its peak"):
        train("run", max_steps=1)
    assert not Path("run").exists()


def test_a_dry_run_shows_the_plan_of_what_does_not_fit(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backend, "device", lambda: cpu(1e6))
    display = Silent()
    with pytest.raises(UserError, match=r"^Training would hold about \d+ MiB at its peak"):
        setup.dry_run({"data": str(corpus), "out": "run", **TINY}, display)
    assert any(line.startswith("Memory ") for line in display.lines)
    assert not Path("run").exists()


def test_a_run_that_fitted_when_it_began_may_go_on(train, tmp_path, monkeypatch, eager):
    """Nothing that it could change would leave it the same run."""
    monkeypatch.chdir(tmp_path)
    train("run", max_steps=1)
    monkeypatch.setattr(backend, "device", lambda: cpu(1e6))
    outcome = train("run", resume="run", max_steps=2)
    assert outcome.step == 2
    assert any(line.startswith("WARNING      That is more than can safely be spared") for line in outcome.lines)
