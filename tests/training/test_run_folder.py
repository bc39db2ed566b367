"""A run, its text and its weights are found where they are, by links as well, and weights are never taken for none."""

import shutil
from pathlib import Path

import pytest

from mlx_gpt.settings import read_toml
from mlx_gpt.training.run_settings import config_of, resumed_config

from .conftest import TINY, contents, copy_of, refusal


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, eager, unmeasured):
    monkeypatch.chdir(tmp_path)


# ---- its text -------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(train, corpus, tmp_path, monkeypatch):
    """A folder with a text and a run that was begun there, with relative paths; another folder is the current one."""
    folder = tmp_path / "project"
    shutil.copytree(corpus, folder / "text")
    monkeypatch.chdir(folder)
    train("runs/one", data="text", max_steps=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def test_a_run_resumes_from_any_folder(train, project, tmp_path, monkeypatch):
    assert train(None, resume=project / "runs/one", only={"max_steps": 2}).step == 2
    assert train(None, resume="../project/runs/one", only={"max_steps": 3}).step == 3
    monkeypatch.chdir(tmp_path)
    assert train(None, resume="project/runs/one", only={"max_steps": 4}).step == 4
    monkeypatch.chdir(project / "runs/one")
    assert train(None, resume=".", only={"max_steps": 5}).step == 5


def test_the_command_that_began_a_run_from_the_hub_also_resumes_it(train, project, monkeypatch):
    """run.toml keeps the commit, which the command need not name."""
    run = project / "runs/one"
    text = (run / "run.toml").read_text()
    (run / "run.toml").write_text(text.replace('init_from = ""', 'init_from = "hf:bird/duck@1234"'))
    assert resumed_config(run, {"init_from": "hf:bird/duck"}).init_from == "hf:bird/duck@1234"
    commits = {"hf:bird/duck@main": "hf:bird/duck@1234", "hf:bird/duck@new": "hf:bird/duck@9"}
    fetched = {name: (Path("duck"), commit) for name, commit in commits.items()}
    monkeypatch.setattr("mlx_gpt.data.hub.found_model", fetched.get)
    assert resumed_config(run, {"init_from": "hf:bird/duck@main"}).init_from == "hf:bird/duck@1234"
    for other in ("hf:bird/duc", "hf:bird/duck@5678", "hf:bird/duck@new"):
        sentence = refusal(lambda other=other: resumed_config(run, {"init_from": other}))
        assert "`init_from` was 'hf:bird/duck@1234'" in sentence


def test_a_run_resumes_after_its_project_has_moved(train, project, tmp_path):
    train(None, resume=project / "runs/one", only={})
    moved = project.rename(tmp_path / "moved")
    assert train(None, resume=moved / "runs/one", only={"max_steps": 2}).step == 2


def test_a_run_outside_the_current_folder_finds_its_text_from_anywhere(train, corpus, tmp_path, monkeypatch):
    shutil.copytree(corpus, tmp_path / "text")
    train(tmp_path / "runs/one", data="text", max_steps=1)
    (tmp_path / "runs/one").rename(tmp_path / "two")
    monkeypatch.chdir("/")
    assert train(None, resume=tmp_path / "two", only={"max_steps": 2}).step == 2


def test_a_copy_of_a_project_reads_its_own_text(train, project, tmp_path):
    """Not the original, which is still there."""
    copy = copy_of(project, tmp_path / "copy")
    with (copy / "text/train.jsonl").open("a") as file:
        file.write('{"text": "One more."}\n')
    sentence = refusal(lambda: train(None, resume=copy / "runs/one", only={"max_steps": 2}))
    assert sentence.startswith(f"The text in {copy / 'text'} is not")


def test_a_run_that_moves_alone_finds_its_text(train, project, tmp_path):
    """A copy under another name, a link to the run, and a link to its folder."""
    copy = copy_of(project / "runs/one", tmp_path / "elsewhere/copy")
    assert train(None, resume="copy", only={"max_steps": 2}).step == 2
    assert read_toml(copy / "run.toml")["data"] == str(project / "text")
    Path("link").symlink_to(project / "runs/one")
    assert train(None, resume="link", only={"max_steps": 3}).step == 3
    assert train(None, resume="link/checkpoints/step-00000003", only={"max_steps": 4}).step == 4
    assert read_toml(project / "runs/one/run.toml")["out"] == str(project / "runs/one")
    Path("best").symlink_to(project / "runs/one/best")
    for path in ("link/best", "best"):
        config = config_of(Path(path))
        assert config
        assert config.data.data == str(project / "text")


def test_a_project_whose_runs_are_a_link_to_another_disk_may_move(train, project, tmp_path):
    (project / "runs").rename(tmp_path / "disk")
    (project / "runs").symlink_to(tmp_path / "disk")
    train(None, resume=project / "runs/one", only={})
    moved = project.rename(tmp_path / "moved")
    assert train(None, resume=moved / "runs/one", only={"max_steps": 2}).step == 2


def test_the_settings_of_a_run_may_be_used_from_any_folder(train, project, tmp_path):
    """They begin another run, or replace the run itself, wherever it is now."""
    assert train(
        None, file="../project/runs/one/run.toml", only={"out": "more", "init_from": "../project/runs/one"}
    ).step
    project.rename(tmp_path / "moved")
    assert train(None, file="../moved/runs/one/run.toml", only={"out": "again"}).finished
    again = train(None, file="../moved/runs/one/run.toml", overwrite=True, only={"max_steps": 2})
    assert (str(again.folder), again.step) == ("../moved/runs/one", 2)
    assert not project.exists()


def test_settings_of_one_s_own_are_read_as_they_are(train, project, tmp_path):
    """Although they are in a file of the same name."""
    Path("run.toml").write_text('data = "../project/text"\nout = "mine"\nmax_steps = 1\n')
    settings = {name: value for name, value in TINY.items() if name != "max_steps"}
    assert str(train(None, file="run.toml", only=settings).folder) == "mine"


def test_a_text_that_has_moved_can_be_named(train, project, tmp_path):
    run, before = project / "runs/one", contents(project / "runs/one")
    (project / "text").rename(tmp_path / "elsewhere/essays")
    sentence = refusal(lambda: train(None, resume=run, only={"max_steps": 2}))
    assert sentence == f"The text of {run} is no longer in {project / 'text'}: name its new place with --data."
    other = refusal(lambda: train(None, resume=run, only={"data": "builtin", "max_steps": 2}))
    assert other.startswith(f"The text in builtin is not what {run} was trained on: name that text with --data, or")
    assert contents(run) == before
    assert train(None, resume=run, only={"data": "essays", "max_steps": 2}).step == 2
    assert train(None, resume=run, only={"max_steps": 3}).step == 3  # the new place is kept


# ---- its weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-00000008", "best", "."])
def test_weights_behind_a_link_that_leads_nowhere_are_not_taken_for_none(train, whole, tmp_path, name):
    """As while the disk that the link leads to is not mounted."""
    run, disk = copy_of(whole.folder, tmp_path / "run"), tmp_path / "disk"
    (run / name).rename(disk)
    (run / name).symlink_to(disk)
    away = disk.rename(tmp_path / "away")
    for again in ({"resume": run, "max_steps": 10}, {"overwrite": True}):
        sentence = refusal(lambda again=again: train(run, **again))
        assert sentence == (
            f"{run / name} is a link to {disk}, where there is nothing: mount its disk or correct the link."
        )
    away.rename(disk)
    assert train(run, resume=run).finished


@pytest.mark.parametrize("part", ["best", "final", "checkpoints", "checkpoints/step-00000006"])
def test_a_resume_of_a_part_of_a_run_names_the_run(train, whole, tmp_path, part):
    copy_of(whole.folder, tmp_path / "run")
    Path("run/checkpoints/step-00000006/training.json").unlink()
    sentence = refusal(lambda: train(None, resume=Path("run", part), only={}))
    assert sentence == (
        f"run/{part} is only a part of the run run, and not a whole checkpoint: resume the run with "
        "`mlx-gpt train --resume run`."
    )


@pytest.mark.parametrize(
    ("path", "found"),
    [("run", "run/best"), ("run/best", "run/best"), ("run/checkpoints/step-00000008", "run/checkpoints/step-00000008")],
)
def test_a_resume_of_weights_without_their_run_names_the_way_to_use_them(train, whole, tmp_path, path, found):
    (copy_of(whole.folder, tmp_path / "run") / "run.toml").unlink()
    sentence = refusal(lambda: train(None, resume=path, only={}))
    assert sentence.startswith(f"{path} has no run.toml, so it can't be resumed: start another run from its weights")
    assert f"`mlx-gpt train --from {found}`" in sentence


def test_a_run_in_the_current_folder_that_lost_its_checkpoints_names_a_way_on(train, whole, tmp_path, monkeypatch):
    run = copy_of(whole.folder, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    monkeypatch.chdir(run)
    assert f"--out {run}-2" in refusal(lambda: train(None, resume=".", only={}))
