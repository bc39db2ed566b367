"""The memory that a run is expected to hold, on this machine and on Macs; what it says when that is too much."""

import dataclasses
import re
from pathlib import Path

import click
import pytest

from mlx_gpt.backend import GIB, Device, device_from
from mlx_gpt.config import PRESETS, Config, ModelConfig, TrainingConfig, build, resolve
from mlx_gpt.errors import UserError
from mlx_gpt.training import memory
from mlx_gpt.training.plan import fit_memory
from tests.training.peaks import Shape, peak, variants

# What macOS recommends as a working set by default: two thirds of the memory, three quarters from 64 GB on.
WORKING_SETS = {8: 5_726_623_061, 16: 11_453_251_584, 24: 17_179_885_568, 64: 51_539_607_552, 128: 103_079_215_104}
FLAG = re.compile(r"--([a-z-]+)(?: (\d+))?")
SHAPES = [Shape(4, 4, 128, 64, 12, 65), Shape(2, 2, 64, 128, 8, 4096), Shape(3, 8, 128, 128, 4, 1000)]


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


@pytest.mark.parametrize("case", range(8))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(shape, case):
    expected, measured = peak(shape, *variants(shape)[case])
    assert expected == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("gigabytes", WORKING_SETS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_plan_for_every_mac_or_a_refusal(name, gigabytes):
    model, training = preset(name, auto_batch_size=True)
    device = mac(gigabytes)
    if (name, gigabytes) == ("large", 8):  # its weights and means alone are 5 GB
        with pytest.raises(UserError, match="No batch of this model fits: --preset medium would"):
            fit_memory(model, training, device)
        return
    chosen = fit_memory(model, training, device)
    assert memory.estimate(model, chosen, device).peak < device.usable
    windows = training.batch_size * training.gradient_accumulation_steps
    assert chosen.batch_size * chosen.gradient_accumulation_steps == windows
    assert not chosen.auto_batch_size


def test_what_fits_is_left_as_it_is():
    model, training = preset("tiny")
    assert fit_memory(model, training, cpu(64 * GIB)) == training


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
    with pytest.raises(UserError) as refusal:
        fit_memory(model, training, device)
    named = re.search(r"This fits: (--.*?) \(about", str(refusal.value))
    assert named
    given = {flag.replace("-", "_"): int(value) if value else True for flag, value in FLAG.findall(named[1])}
    assert given.keys() == changed
    again = resolve({"preset": "medium", "data": "builtin", "seq_len": 1024} | given)
    assert fit_memory(again.model, again.training, device) == again.training
    assert again.training.batch_size * again.training.gradient_accumulation_steps == 64


def test_a_model_that_fits_with_no_batch_names_a_preset_that_does():
    model, training = preset("large")
    with pytest.raises(UserError, match="No batch of this model fits: --preset tiny would"):
        fit_memory(model, training, cpu(0.3 * GIB))
    with pytest.raises(UserError, match="free some memory, or take another machine"):
        fit_memory(model, training, cpu(1e6))


def test_auto_takes_as_many_windows_at_once_as_fit():
    model, training = preset("medium", auto_batch_size=True)
    roomy = fit_memory(model, training, cpu(1000 * GIB))
    assert (roomy.batch_size, roomy.gradient_accumulation_steps) == (64, 1)
    tight = fit_memory(model, training, cpu(12 * GIB))
    larger = dataclasses.replace(tight, batch_size=2 * tight.batch_size)
    assert not tight.grad_checkpoint
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
        try:
            chosen = fit_memory(model, training, mac(gigabytes))
        except UserError:
            return "-"
        words = f"{chosen.batch_size} x {chosen.gradient_accumulation_steps}"
        words += ", recomputed" if chosen.grad_checkpoint else ""
        return words + (f", {chosen.seq_len} tokens" if chosen.seq_len != training.seq_len else "")

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
