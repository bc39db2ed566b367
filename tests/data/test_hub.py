"""Downloads from a Hub work, continue, and fail in one sentence: the real client against a local server."""

import functools
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_gpt import cli
from mlx_gpt import files as disk
from mlx_gpt.api import load
from mlx_gpt.data import hub, hub_client
from mlx_gpt.data.hub import download, model
from mlx_gpt.models.directory import save_model

from . import zips
from .hub_server import COMMIT, FakeHub, point_client_at, serving
from .zips import tree

SECRET = "hf_secret"
ROWS = b"".join(b'{"text": "essay %d of many about ducks"}\n' % n for n in range(500))
FILES = {
    "train.jsonl": ROWS,
    "test.jsonl": b'{"text": "only for a test"}\n',
    "README.md": b"# Ducks\n",
    "loader.py": b"raise SystemExit\n",
    "dataset_infos.json": b"{}",
}
OTHER = "f" * 40  # another commit

Arrange = Callable[[FakeHub, pytest.MonkeyPatch], None]


refused = functools.partial(zips.refused, secret=SECRET)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A fake Hub that serves a dataset, and a client without pauses."""
    monkeypatch.setattr(hub_client, "PAUSE_SECONDS", 0)
    with serving(dict(FILES), SECRET, tmp_path / "home", monkeypatch) as fake:
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "raw"


@pytest.fixture
def weights(tmp_path, make_model, bpe, server):
    """The server has a model instead, with files that must never be fetched."""
    save_model(tmp_path / "made", make_model(0), bpe)
    made = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    traps = ("modeling_duck.py", "pytorch_model.bin", "onnx/model.onnx", "model_fp16/x.safetensors", "vocab.txt")
    server.files = made | dict.fromkeys(traps, b"do not fetch")
    return made


def names(files: list[Path], folder: Path) -> list[str]:
    return [file.relative_to(folder / "hf/owner/name").as_posix() for file in files]


# ---- datasets -------------------------------------------------------------------------------------------------------


def test_download_leaves_the_training_split_and_nothing_else(server: FakeHub, folder: Path) -> None:
    lines: list[str] = []
    files = download("hf:owner/name", folder, echo=lines.append)
    assert names(files, folder) == ["train.jsonl"]
    assert files[0].read_bytes() == ROWS
    assert {path for path, content in tree(folder).items() if content is not None} == {
        "hf/owner/name/train.jsonl",
        "hf/owner/name/.complete.json",
    }
    assert server.fetched() == ["train.jsonl"]
    assert any("licence" in line and f"{server.url}/datasets/owner/name" in line for line in lines)


def test_the_token_goes_to_the_hub_and_to_no_other_host(server: FakeHub, folder: Path) -> None:
    download("hf:owner/name", folder)
    hosts = {"hub": server.url.removeprefix("http://"), "storage": server.storage.removeprefix("http://")}
    assert {headers["host"] for _, headers in server.requests} == set(hosts.values())
    for path, headers in server.requests:
        assert headers.get("authorization") == (f"Bearer {SECRET}" if headers["host"] == hosts["hub"] else None), path
        assert path.startswith(("/api/datasets/owner/name", "/datasets/owner/name/resolve/", "/storage/"))
        assert "torch" not in headers["user-agent"]  # the library would say what else is installed


def test_a_complete_dataset_is_used_again_without_the_network(
    server: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = download("hf:owner/name", folder)
    point_client_at("http://127.0.0.1:1", monkeypatch)
    assert download("hf:owner/name", folder) == files


@pytest.mark.parametrize("why", ["forced", "a file is gone", "other files are asked for"])
def test_a_dataset_is_downloaded_again_if(why: str, server: FakeHub, folder: Path) -> None:
    file = download("hf:owner/name", folder)[0]
    if why == "a file is gone":
        file.unlink()
    server.files["train.jsonl"] = b'{"text": "new"}\n'
    patterns = ["t*n.jsonl"] if why == "other files are asked for" else []
    assert download("hf:owner/name", folder, force=why == "forced", patterns=patterns) == [file]
    assert file.read_bytes() == b'{"text": "new"}\n'
    assert [path.name for path in (folder / "hf/owner").iterdir()] == ["name"]


def test_a_kaggle_dataset_of_the_same_name_has_another_folder(server: FakeHub, folder: Path) -> None:
    zips.write(folder / "owner-name/.complete.json", b"{}")
    before = tree(folder / "owner-name")
    download("hf:owner/name", folder)
    assert tree(folder / "owner-name") == before


TRAINING: dict[str, tuple[list[str], list[str]]] = {
    "shards in data/": (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0-of-1.parquet"],
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
    ),
    "folders of splits": (["train/a.jsonl", "validation/a.jsonl"], ["train/a.jsonl"]),
    "no split named": (["ducks.csv", "geese.csv"], ["ducks.csv", "geese.csv"]),
    "unnamed beside a test": (["ducks.csv", "ducks_test.csv"], ["ducks.csv"]),
    "a word that contains a split's": (["contest.csv", "latest.csv"], ["contest.csv", "latest.csv"]),
    "one format of several": (["train.csv", "train.jsonl", "train.parquet", "train.txt"], ["train.parquet"]),
    "JSON": (["train.json", "dataset_info.json"], ["train.json"]),
    "text": (["input.txt", "requirements.txt", "LICENSE.txt"], ["input.txt"]),
    "the top before a folder": (["train.csv", "extra/train.csv"], ["train.csv"]),
    "hidden": ([".cache/train.csv", "b.csv"], ["b.csv"]),
}


@pytest.mark.parametrize("case", TRAINING)
def test_the_files_of_the_training_split_are_chosen(case: str, server: FakeHub, folder: Path) -> None:
    there, expected = TRAINING[case]
    server.files = {name: name.encode() for name in there}
    assert names(download("hf:owner/name", folder), folder) == expected


def test_a_list_of_several_pages_is_read_to_its_end(server: FakeHub, folder: Path) -> None:
    server.files = {f"train-{n}.csv": b"text\n" for n in range(5)}
    server.per_page = 2
    assert len(download("hf:owner/name", folder)) == 5


def declared(**configs: object) -> dict[str, object]:
    """The head of a README that names the files of each configuration."""
    return {"configs": [{"config_name": name, "data_files": files} for name, files in configs.items()]}


LANGUAGES = {f"{language}/{split}.jsonl": b"{}" for language in ("de", "en") for split in ("train", "test")}
FORMS: list[object] = [
    "en/train.jsonl",
    ["en/tr*.jsonl"],
    {"train": "en/train.jsonl", "test": "en/test.jsonl"},
    [{"split": "train", "path": ["**/en/train.jsonl"]}, {"split": "test", "path": "en/test.jsonl"}],
]


@pytest.mark.parametrize("form", FORMS)
def test_a_readme_says_which_files_a_configuration_has(form: object, server: FakeHub, folder: Path) -> None:
    server.files, server.card = dict(LANGUAGES), declared(duck="de/*", english=form)
    files = download("hf:owner/name/english", folder)
    assert [file.relative_to(folder).as_posix() for file in files] == ["hf/owner/name+english/en/train.jsonl"]


def test_a_default_configuration_is_taken_and_the_others_are_named(server: FakeHub, folder: Path) -> None:
    server.files, server.card = dict(LANGUAGES), declared(default="en/train.jsonl", german="de/train.jsonl")
    lines: list[str] = []
    assert names(download("hf:owner/name", folder, echo=lines.append), folder) == ["en/train.jsonl"]
    assert "default" in lines[0]
    assert "german" in lines[0]


@pytest.mark.parametrize("card", [{}, declared(en="en/*", de="de/*")])
def test_several_configurations_are_listed_to_choose_from(
    card: dict[str, object], server: FakeHub, folder: Path
) -> None:
    server.files, server.card = dict(LANGUAGES), card
    sentence = refused(lambda: download("hf:owner/name", folder))
    assert "several configurations" in sentence
    assert "hf:owner/name/" in sentence
    assert "--file" in sentence
    assert "has no configuration 'fr'" in refused(lambda: download("hf:owner/name/fr", folder)).replace("fr:", "'fr':")
    assert len(download("hf:owner/name/en", folder)) == 1
    assert names(download("hf:owner/name", folder, patterns=["*/train.jsonl"]), folder) == [
        "de/train.jsonl",
        "en/train.jsonl",
    ]


UNUSABLE: dict[str, tuple[list[str], list[str]]] = {
    "only a script": (["ducks.py", "README.md"], ["ducks.py", "hf:owner/name@refs/convert/parquet"]),
    "other formats": (["train.jsonl.gz", "a.tar", "b.arrow"], ["train.jsonl.gz", "no Parquet, JSONL"]),
    "only a test split": (["test.csv"], ["no file of a split train", "test.csv", "--file"]),
    "a hostile name": (["/etc/train.csv"], ["not safe", "/etc/train.csv"]),
    "two names that a Mac takes for one": (["Train.csv", "train.csv"], ["two files with one name"]),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_dataset_without_usable_text_is_refused(case: str, server: FakeHub, folder: Path) -> None:
    there, words = UNUSABLE[case]
    server.files = dict.fromkeys(there, b"text\n")
    sentence = refused(lambda: download("hf:owner/name", folder))
    assert [word for word in words if word not in sentence] == [], sentence
    assert tree(folder) == {}


def test_a_dataset_of_terabytes_is_refused_before_it_is_downloaded(server: FakeHub, folder: Path) -> None:
    server.listed = {"train.jsonl": {"size": 10**13}}
    sentence = refused(lambda: download("hf:owner/name", folder))
    assert "10,000 GB" in sentence
    assert "--file" in sentence
    assert "disk is full" in refused(lambda: download("hf:owner/name", folder, patterns=["train.jsonl"]))


def test_parquet_without_its_reader_is_refused_before_it_is_downloaded(
    server: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files = {"train.parquet": b"PAR1"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pyarrow" in refused(lambda: download("hf:owner/name", folder))
    assert server.fetched() == []


@pytest.mark.parametrize(
    "name", ["hf:", "hf:name", "hf:owner/", "hf:a/b@", "hf:../b", "hf:a/..", "hf:a/b/..", "hf:a b/c", "hf:a/b@-x"]
)
def test_a_misspelt_name_never_reaches_the_network(name: str, server: FakeHub, folder: Path) -> None:
    assert "hf:owner/name" in refused(lambda: download(name, folder))
    assert "hf:owner/name" in refused(lambda: model(name))
    assert server.requests == []
    assert not folder.exists()


def test_files_are_on_the_disk_before_they_are_marked_as_complete(
    server: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut could leave a file of the right size that holds zeros."""
    flushed: list[str] = []

    def flush(handle: int) -> None:
        opened = os.fstat(handle)
        flushed.extend(path.name for path in folder.rglob("*") if os.path.samestat(opened, path.stat()))

    monkeypatch.setattr(disk, "flush", flush)
    download("hf:owner/name", folder)
    assert flushed[0] == "train.jsonl"
    assert flushed[1].startswith("..complete")
    assert flushed[-1] == "owner"  # the folder that has the new name


# ---- connections that break -----------------------------------------------------------------------------------------


def ranges(server: FakeHub) -> list[str]:
    """The requests that the storage got."""
    return [headers.get("range", "all") for path, headers in server.requests if path.startswith("/storage/")]


def test_a_body_that_stops_is_continued(server: FakeHub, folder: Path) -> None:
    server.cuts = [1000, 5000]
    assert download("hf:owner/name", folder)[0].read_bytes() == ROWS
    assert ranges(server) == ["all", "bytes=1000-", "bytes=6000-"]


def test_a_body_of_unknown_length_is_continued_if_it_stops(server: FakeHub, folder: Path) -> None:
    server.cuts, server.sized = [1000], False
    assert download("hf:owner/name", folder)[0].read_bytes() == ROWS
    assert ranges(server) == ["all", "bytes=1000-"]


def test_a_body_of_unknown_length_ends_at_the_listed_size(server: FakeHub, folder: Path) -> None:
    server.listed, server.sized = {"train.jsonl": {"size": 5}}, False
    assert "instead of 5, so it was not kept" in refused(lambda: download("hf:owner/name", folder))
    assert tree(folder) == {}


def test_a_download_that_gave_up_is_continued_by_the_next(server: FakeHub, folder: Path) -> None:
    server.cuts = [1000, *[0] * hub_client.TRIES]
    assert "run the command again" in refused(lambda: download("hf:owner/name", folder))
    assert not (folder / "hf/owner/name").exists()
    server.cuts.clear()
    server.requests.clear()
    lines: list[str] = []
    assert download("hf:owner/name", folder, echo=lines.append)[0].read_bytes() == ROWS
    assert ranges(server) == ["bytes=1000-"]
    assert lines[0].startswith("Continuing")
    assert [path.name for path in (folder / "hf/owner").iterdir()] == ["name"]


def test_an_unfinished_download_of_another_repository_is_kept(server: FakeHub, folder: Path) -> None:
    other = folder / "hf/owner/.name.v2.0123456789ab.download/train.jsonl"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"half")
    download("hf:owner/name", folder)
    assert other.exists()
    assert not list(folder.glob("hf/owner/.name.[0-9a-f]*.download"))


def test_a_server_that_cannot_continue_sends_everything_again(server: FakeHub, folder: Path) -> None:
    server.cuts, server.ranges = [1000], False
    assert download("hf:owner/name", folder)[0].read_bytes() == ROWS


def test_ctrl_c_halfway_keeps_what_has_arrived(server: FakeHub, folder: Path) -> None:
    server.stops_halfway = True
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        download(
            "hf:owner/name", folder, echo=lines.append, progress=lambda done, total: signal.raise_signal(signal.SIGINT)
        )
    assert "run the command again" in lines[-1]
    assert not (folder / "hf/owner/name").exists()
    server.stops_halfway = False
    server.requests.clear()
    assert download("hf:owner/name", folder)[0].read_bytes() == ROWS
    assert ranges(server)[0].startswith("bytes=")


def test_a_part_that_was_damaged_on_the_disk_is_fetched_anew(server: FakeHub, folder: Path) -> None:
    zips.write(folder / f"hf/owner/.name.{COMMIT[:12]}.download/train.jsonl", b"?" * 1000)
    assert download("hf:owner/name", folder)[0].read_bytes() == ROWS
    assert ranges(server) == ["bytes=1000-", "all"]


def test_a_part_of_another_commit_or_of_other_files_is_not_used(server: FakeHub, folder: Path) -> None:
    for name in (f".name.{OTHER[:12]}.download/train.jsonl", f".name.{COMMIT[:12]}.download/data/old.jsonl"):
        zips.write(folder / "hf/owner" / name, b"?" * 1000)
    download("hf:owner/name", folder)
    assert ranges(server) == ["all"]
    assert set(tree(folder / "hf/owner")) == {"name", "name/train.jsonl", "name/.complete.json"}


def test_two_downloads_at_once_fetch_once(
    server: FakeHub, folder: Path, meanwhile: Callable[[Path, Callable[[], object]], threading.Thread]
) -> None:
    part = folder / f"hf/owner/.name.{COMMIT[:12]}.download"
    others: list[threading.Thread] = []
    found: list[Path] = []

    def at_once(line: str) -> None:
        if not others:
            others.append(meanwhile(part, lambda: found.extend(download("hf:owner/name", folder))))

    assert download("hf:owner/name", folder, echo=at_once)[0].read_bytes() == ROWS
    others[0].join()
    assert found == [folder / "hf/owner/name/train.jsonl"]
    assert ranges(server) == ["all"]
    assert [path.name for path in (folder / "hf/owner").iterdir()] == ["name"]


# ---- downloads that fail --------------------------------------------------------------------------------------------


def sets(**knobs: object) -> Arrange:
    def arrange(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        for knob, value in knobs.items():
            setattr(server, knob, value)

    return arrange


def fails_with(path: str, status: int, code: str = "") -> Arrange:
    return sets(status={path: (status, code)})


def lists(**facts: object) -> Arrange:
    return sets(listed={"train.jsonl": facts})


def hangs(path: str) -> Arrange:
    def arrange(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        server.hang = path
        monkeypatch.setattr(hub_client, "STALL_SECONDS", 0.1)

    return arrange


def network_down(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    point_client_at("http://127.0.0.1:1", monkeypatch)


def offline(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def no_token(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    server.status = {"/name": (401, "")}


def strange_token(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{SECRET}\N{EURO SIGN}")


def little_room(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))


def full_disk(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_client._Transfer, "_receive_all", fail)


FAILURES: dict[str, tuple[Arrange, list[str]]] = {
    "401 without a token": (no_token, ["401", "no dataset owner/name", "licence", "/datasets/owner/name", "HF_TOKEN"]),
    "401": (fails_with("/name", 401), ["401", "licence", "/datasets/owner/name", "HF_TOKEN"]),
    "401 for the file": (fails_with("train.jsonl", 401), ["401", "HF_TOKEN"]),
    "gated": (fails_with("train.jsonl", 403, "GatedRepo"), ["gated", "licence", "/datasets/owner/name", "HF_TOKEN"]),
    "404": (fails_with("/name", 404, "RepoNotFound"), ["404", "no dataset owner/name", "spelling"]),
    "404 for the file": (fails_with("train.jsonl", 404, "EntryNotFound"), ["not there"]),
    "429": (fails_with("/name", 429), ["429", "wait"]),
    "500": (fails_with("/name", 500), ["500", "later"]),
    "503 from the storage": (fails_with("/storage/train.jsonl", 503), ["503", "later"]),
    "network down": (network_down, ["Cannot reach 127.0.0.1", "network"]),
    "offline": (offline, ["HF_HUB_OFFLINE"]),
    "the Hub hangs": (hangs("/name"), ["did not answer", "0.1 seconds"]),
    "the list hangs": (hangs(COMMIT), ["did not answer"]),
    "the storage hangs": (hangs("/storage/train.jsonl"), ["broke 5 times"]),
    "a hotel's network": (sets(html="/name"), ["login page"]),
    "a web page instead of the file": (sets(html="/storage/train.jsonl"), ["has 49 bytes instead of", "not kept"]),
    "a file that is longer than listed": (lists(size=5), [f"has {len(ROWS):,} bytes instead of 5", "not kept"]),
    "a file that is shorter than listed": (lists(size=10**6), ["instead of 1,000,000", "not kept"]),
    "a file with another hash": (lists(oid="a" * 64), ["its hash differs", "not kept"]),
    "token with a character that no header can have": (strange_token, ["characters"]),
    "too big for the disk": (little_room, ["disk is full", "left"]),
    "the disk fills up": (full_disk, ["disk is full", "make room"]),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_download_is_one_sentence_and_changes_nothing(
    case: str, server: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server.files["train.jsonl"] = b'{"text": "old"}\n'
    download("hf:owner/name", folder)
    before = tree(folder)
    server.files["train.jsonl"], server.commit = ROWS, OTHER if case != "the list hangs" else COMMIT
    arrange, words = FAILURES[case]
    arrange(server, monkeypatch)
    sentence = refused(lambda: download("hf:owner/name", folder, force=True))
    assert [word for word in words if word not in sentence] == [], sentence
    assert tree(folder) == before
    assert capfd.readouterr() == ("", "")


def test_a_small_file_with_another_hash_is_refused(server: FakeHub, folder: Path) -> None:
    server.files, server.listed = {"train.csv": b"text\nduck\n"}, {"train.csv": {"oid": "b" * 40}}
    assert "its hash differs" in refused(lambda: download("hf:owner/name", folder))
    assert tree(folder) == {}


def test_a_folder_that_was_not_downloaded_is_never_replaced(server: FakeHub, folder: Path) -> None:
    mine = zips.write(folder / "hf/owner/name/mine.csv", b"text\n")
    assert "in the way" in refused(lambda: download("hf:owner/name", folder, force=True))
    assert mine.read_bytes() == b"text\n"


# ---- models ---------------------------------------------------------------------------------------------------------


def test_only_safetensors_and_json_of_a_model_are_fetched(server: FakeHub, weights: dict[str, bytes]) -> None:
    folder, name = model("hf:owner/name")
    assert sorted(server.fetched()) == sorted(weights)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."} == weights
    assert name == f"hf:owner/name@{COMMIT}"


def test_load_fetches_a_model_and_says_so(server: FakeHub, weights: dict[str, bytes]) -> None:
    lines: list[str] = []
    fetched = load("hf:owner/name", echo=lines.append)
    assert f"from {server.url}/owner/name" in lines[0]
    assert fetched[1].to_json() == load(model("hf:owner/name")[0])[1].to_json()


@pytest.mark.parametrize("again", ["hf:owner/name", f"hf:owner/name@{COMMIT}"])
def test_a_model_is_used_again_without_the_network_even_if_its_name_has_moved(
    again: str, server: FakeHub, weights: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model("hf:owner/name")
    server.commit = OTHER
    server.requests.clear()
    assert model(again) == first
    assert server.requests == []
    folder, name = model("hf:owner/name@main")  # another name, which is looked up once
    assert name.endswith(OTHER)
    assert folder != first[0]


def test_a_model_without_safetensors_is_refused(server: FakeHub, weights: dict[str, bytes]) -> None:
    del server.files["model.safetensors"]
    sentence = refused(lambda: model("hf:owner/name"))
    assert "safetensors" in sentence
    assert "pickles" in sentence
    assert server.fetched() == []


def test_a_model_whose_weights_are_not_what_is_listed_is_not_kept(server: FakeHub, weights: dict[str, bytes]) -> None:
    server.listed = {"model.safetensors": {"oid": "a" * 64}}
    assert "its hash differs" in refused(lambda: model("hf:owner/name"))
    server.listed = {}
    server.requests.clear()
    folder, _ = model("hf:owner/name")
    assert server.fetched() == ["model.safetensors"]  # the others were sound
    assert (folder / "model.safetensors").read_bytes() == weights["model.safetensors"]


def test_a_revision_that_does_not_exist_is_refused(server: FakeHub, weights: dict[str, bytes]) -> None:
    assert "no revision v9" in refused(lambda: model("hf:owner/name@v9"))
    assert "no model owner/other" in refused(lambda: model("hf:owner/other"))
    assert not hub.cache_folder().exists()


# ---- on the command line --------------------------------------------------------------------------------------------


def test_a_dataset_becomes_a_corpus(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["download", "--dataset", "hf:owner/name", "--out", "ducks"]) == 0
    assert (
        len([line for name in ("train", "val") for line in Path(f"ducks/{name}.jsonl").read_text().splitlines()]) == 500
    )
    assert Path("data/raw/hf/owner/name/train.jsonl").read_bytes() == ROWS
    assert "from " + server.url in capfd.readouterr().out
    assert cli.run(["download", "--dataset", "owner/name", "--file", "train.jsonl"]) == 2
    assert "--dataset hf:owner/name" in capfd.readouterr().err


def test_a_run_starts_from_a_model_of_the_hub_and_notes_its_commit(
    server: FakeHub,
    tmp_path: Path,
    weights: dict[str, bytes],
    eager: None,
    unmeasured: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ducks.jsonl").write_bytes(ROWS)
    small = ["--seq-len", "16", "--batch-size", "2", "--gradient-accumulation-steps", "1", "--eval-windows", "4"]
    start = ["train", "--data", "ducks.jsonl", *small, "--from", "hf:owner/name", "--max-steps", "1", "--out", "run"]
    assert cli.run(start) == 0, capfd.readouterr().err
    assert f'init_from = "hf:owner/name@{COMMIT}"' in Path("run/run.toml").read_text()
    server.requests.clear()
    assert cli.run(["train", "--resume", "run", "--max-steps", "2"]) == 0, capfd.readouterr().err
    capfd.readouterr()
    assert cli.run(["generate", "--model", "hf:owner/name", "--prompt", "essay", "--max-tokens", "2"]) == 0
    assert capfd.readouterr().out.startswith("essay")
    assert server.requests == []
    assert cli.run([*start[:-1], "another"]) == 0
    assert server.requests == []


@pytest.mark.parametrize(
    "arguments",
    [
        "generate --prompt essay --prompt-file essay.txt",
        "generate --prompt-file missing.txt",
        "generate --temperature -1",
        "eval missing.txt",
        "eval",
        "serve --host 0.0.0.0",
        "serve --allow-origin a.example",
        "train --resume",
        "train --data missing.txt --from",
    ],
)
def test_a_mistake_is_refused_before_a_model_is_fetched(
    arguments: str, server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flag = [] if arguments.endswith(("--resume", "--from")) else ["--model"]
    assert cli.run([*arguments.split(), *flag, "hf:owner/name"]) == 2
    assert server.requests == []
