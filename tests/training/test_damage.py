"""Damaged checkpoints are noticed, passed over or refused, and never trained on."""

import contextlib
import errno
import hashlib
import random
import shutil

import mlx.core as mx
import pytest

from mlx_gpt.errors import UserError
from mlx_gpt.training import checkpoint

FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
]
NEWEST, BEFORE = "step-00000002", "step-00000001"


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """A run of two steps with two checkpoints. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    mx.disable_compile()
    with contextlib.chdir(folder):
        train(folder / "run", max_steps=2, save_every=1, keep_checkpoints=2)
    mx.enable_compile()
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path, monkeypatch, unmeasured):
    """A copy of it to damage."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def damaged(whole, draw):
    """The file empty, cut off at 20 places, and with one bit flipped at 100 places."""
    yield b""
    for length in draw.sample(range(1, len(whole)), 20):
        yield whole[:length]
    for position, bit in (divmod(place, 8) for place in draw.sample(range(8 * len(whole)), 100)):
        yield whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :]


def test_no_file_is_left_out(trained):
    assert [path.name for path in sorted((trained / "checkpoints" / NEWEST).iterdir())] == FILES


@pytest.mark.parametrize("name", FILES)
def test_any_damage_is_noticed(run, name):
    folder = run / "checkpoints" / NEWEST
    file = folder / name
    whole, cases = file.read_bytes(), 0
    for content in damaged(whole, random.Random(name)):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"is damaged: {name} is not as it was written\\.$"):
            checkpoint.read_progress(folder)
        cases += 1
    assert cases == 121
    file.write_bytes(whole)
    assert checkpoint.read_progress(folder).step == 2


@pytest.mark.parametrize("name", FILES)
def test_the_checkpoint_before_a_damaged_one_is_taken(run, name):
    draw = random.Random(name)
    content = draw.choice(list(damaged((run / "checkpoints" / NEWEST / name).read_bytes(), draw)))
    (run / "checkpoints" / NEWEST / name).write_bytes(content)
    found, why = checkpoint.newest_sound(run)
    assert found is not None
    assert found[0] == run / "checkpoints" / BEFORE
    (broken,) = why
    aside = checkpoint.set_aside(broken)
    assert [path.name for path in checkpoint.all_checkpoints(run)] == [BEFORE]
    assert aside.name == f"damaged-{NEWEST}"
    assert (aside / name).read_bytes() == content


@pytest.mark.parametrize("name", ["optimizer.safetensors", "tokenizer.json", "training.json"])
def test_a_run_resumes_from_the_one_before_and_ends_in_the_same_bytes(train, trained, run, eager, name):
    file = run / "checkpoints" / NEWEST / name
    file.write_bytes(file.read_bytes()[:-1])
    outcome = train(run, resume=run, max_steps=2)
    assert any(f"{name} is not as it was written. It is set aside" in line for line in outcome.lines)
    assert any(f"Resuming from {run}/checkpoints/{BEFORE}" in line for line in outcome.lines)
    for path in ("final/model.safetensors", f"checkpoints/{NEWEST}/optimizer.safetensors"):
        assert (run / path).read_bytes() == (trained / path).read_bytes()


def test_the_checkpoint_before_is_taken_if_the_disk_can_t_read_the_newest(run, monkeypatch):
    def read(file, algorithm):
        if NEWEST in file.name and "model" in file.name:
            raise OSError(errno.EIO, "Input/output error")
        return file_digest(file, algorithm)

    file_digest = hashlib.file_digest
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", read)
        found, why = checkpoint.newest_sound(run)
    assert found is not None
    assert found[0] == run / "checkpoints" / BEFORE
    assert "is damaged: the disk can't read it (Input/output error)." in why[run / "checkpoints" / NEWEST]


def test_a_dry_run_leaves_a_damaged_checkpoint_where_it_is(train, run):
    (run / "checkpoints" / NEWEST / "model.safetensors").write_bytes(b"")
    before = sorted(run.rglob("*"))
    assert train(run, resume=run, dry_run=True, only={}).step == 1
    assert sorted(run.rglob("*")) == before


def test_a_damaged_checkpoint_that_is_named_is_refused(train, run):
    (run / "checkpoints" / NEWEST / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.safetensors is not as it was written\.$"):
        train(run, resume=run / "checkpoints" / NEWEST)


def test_without_a_sound_checkpoint_the_run_is_refused(train, run):
    for name in (NEWEST, BEFORE):
        (run / "checkpoints" / name / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"run has no intact checkpoint, so it can't be resumed: start another"):
        train(run, resume=run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [BEFORE, NEWEST]
