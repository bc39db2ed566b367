"""Lists and fetches the files of a repository on the Hugging Face Hub.

`huggingface_hub` finds the server (`HF_ENDPOINT`) and the token (`HF_TOKEN`, or that of `hf auth login`), and knows the
server's errors. It does not fetch the files, because its downloads start a file anew after an interruption, and do not
check the hash of files that come by plain HTTP. Here a download continues where it stopped, and each file must have the
size and the hash that the Hub lists.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlx_gpt.data.archive import check_space, clash_of, fault_in_name
from mlx_gpt.data.hub_errors import explain
from mlx_gpt.errors import UserError, shown
from mlx_gpt.files import sync
from mlx_gpt.progress import ByteProgress

STALL_SECONDS = 30.0  # to wait while the server sends nothing
TRIES = 5  # a download gives up after this many tries in a row that bring nothing
PAUSE_SECONDS = 1.0  # after the first of these tries; after the n-th, n times as long
AGAIN = "run the command again to continue, since the bytes that have arrived are kept"


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub.

    Attributes:
        name: `owner/name`.
        kind: "dataset" or "model".
    """

    name: str
    kind: str

    @property
    def page(self) -> str:
        """Its page, for people."""
        return f"{_endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    def __str__(self) -> str:
        return f"the {self.kind} {self.name}"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Attributes:
        path: its name in the repository, with `/` between folders.
        size: in bytes.
        digest: SHA-256 of a large file, or git's SHA-1 of a small one; "" if the Hub lists none.
    """

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit, and the facts at the head of its README."""

    commit: str
    files: list[HubFile]
    card: dict[str, Any]


def list_files(repository: Repository, revision: str) -> Listing:
    """Return the files of a repository.

    Args:
        revision: a branch, tag or commit; "" for the newest commit.

    Raises:
        UserError: there is no such repository or revision, the token does not open it, or the network fails.
    """
    with _client(repository, revision) as (session, headers):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import hf_raise_for_status

        found = HfApi(library_name="mlx-gpt", library_version=version("mlx-gpt")).repo_info(
            repository.name, repo_type=repository.kind, revision=revision or None, timeout=STALL_SECONDS
        )
        card = getattr(found, "card_data", None)
        files: list[HubFile] = []
        page: str | None = f"{_endpoint()}/api/{repository.kind}s/{repository.name}/tree/{found.sha}?recursive=true"
        while page:
            response = session.get(page, headers=headers, timeout=STALL_SECONDS)
            hf_raise_for_status(response)
            files += [_file(entry) for entry in response.json() if entry["type"] == "file"]
            page = response.links.get("next", {}).get("url")
        return Listing(str(found.sha), files, card.to_dict() if card else {})


def fetch(repository: Repository, commit: str, files: Sequence[HubFile], folder: Path, progress: ByteProgress) -> None:
    """Write files of a repository to a folder. An earlier call may have left files, or parts of files, there.

    On return each file has the size and the hash that the Hub lists. After a failure, everything that has arrived stays
    for the next call, except for a file whose size or hash is wrong.

    Raises:
        UserError: a file's name is unsafe, a file is not what the Hub lists, the token does not open it, or the network
            or the disk fails.
    """
    _check_names(files, repository)
    total, done = sum(file.size for file in files), 0
    check_space(total - sum(min(_size(folder / file.path), file.size) for file in files), folder)
    with _client(repository, commit) as (session, headers):
        kind = "datasets/" if repository.kind == "dataset" else ""
        for file in sorted(files, key=lambda file: file.size):
            url = f"{_endpoint()}/{kind}{repository.name}/resolve/{commit}/{quote(file.path)}"
            path = folder / file.path
            path.parent.mkdir(parents=True, exist_ok=True)

            def advance(size: int, before: int = done) -> None:
                progress(before + size, total)

            _Transfer(session, headers, url, file, path, repository, advance).run()
            done += file.size
            progress(done, total)


@dataclass(frozen=True)
class _Transfer:
    """The download of one file from `url` to `path`; `advance` is called with the number of bytes that have arrived."""

    session: Any
    headers: dict[str, str]
    url: str
    file: HubFile
    path: Path
    repository: Repository
    advance: Callable[[int], None]

    def run(self) -> None:
        """Write the file, or the rest of it, and check its hash."""
        continued = _size(self.path) > 0
        if _size(self.path) > self.file.size:
            self.path.unlink()
        if self.file.size:
            self._receive_all()
        else:
            self.path.touch()
        if self.file.digest in ("", _digest(self.path, self.file)):
            sync(self.path)  # otherwise a file of the right size could hold zeros after a power cut
            return
        self.path.unlink()
        if not continued:
            raise self._refusal("its hash differs")
        self.run()  # an earlier call's part of the file may have been damaged on the disk

    def _receive_all(self) -> None:
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError

        failures = 0
        while (start := _size(self.path)) < self.file.size:
            problem: Exception | None = None
            try:
                self._receive(start)
            except (HfHubHTTPError, httpx2.TransportError) as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                    raise
                problem = error
            failures = 0 if _size(self.path) > start else failures + 1
            if failures == TRIES and isinstance(problem, HfHubHTTPError):
                raise problem
            if failures == TRIES:
                name = shown(self.file.path)
                raise UserError(f"The connection broke {TRIES} times while {name} was fetched: {AGAIN}.") from problem
            if failures:
                time.sleep(PAUSE_SECONDS * failures)

    def _receive(self, start: int) -> None:
        """Append the bytes from `start` on, as the server sends them. A file that would get a wrong size is removed."""
        from huggingface_hub.utils import hf_raise_for_status

        headers = {**self.headers, "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        with self.session.stream("GET", self.url, headers=headers, timeout=STALL_SECONDS) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:  # the server sends the whole file
                start = 0
            length = response.headers.get("Content-Length", "")
            size = start + int(length) if length.isdecimal() else self.file.size
            with self.path.open("ab") as part:
                part.truncate(start)
                for chunk in response.iter_bytes() if size == self.file.size else ():
                    start += len(chunk)
                    if start > self.file.size:
                        size = start
                        break
                    part.write(chunk)
                    if start < self.file.size:
                        self.advance(start)
        if size != self.file.size:
            self.path.unlink()
            raise self._refusal(f"it has {size:,} bytes instead of {self.file.size:,}")

    def _refusal(self, why: str) -> UserError:
        return UserError(
            f"{shown(self.file.path)} of {self.repository} is not what the Hub lists, because {why}, so it was not "
            f"kept: try again later, or write to its owner on {self.repository.page}."
        )


@contextmanager
def _client(repository: Repository, revision: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """Yield a session and the headers for requests to the Hub, and explain errors that the requests raise.

    When it is redirected to another host, the session does not send the token there. The library sends no telemetry.
    """
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session

    telemetry = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield get_session(), build_hf_headers(library_name="mlx-gpt", library_version=version("mlx-gpt"))
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        host = httpx2.URL(_endpoint()).host
        raise UserError(explain(error, repository, revision, host, STALL_SECONDS)) from error
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = telemetry


def _file(entry: dict[str, Any]) -> HubFile:
    """Return a file from the Hub's list. The list may give a large file the size and `oid` of a pointer to it."""
    large = entry.get("lfs")
    if large:
        return HubFile(str(entry["path"]), int(large["size"]), str(large["oid"]))
    return HubFile(str(entry["path"]), int(entry["size"]), str(entry.get("oid") or ""))


def _check_names(files: Sequence[HubFile], repository: Repository) -> None:
    for file in files:
        if fault := fault_in_name(file.path):
            raise UserError(
                f"{repository.page} is not safe to fetch because {shown(file.path)!r} {fault}: use another."
            )
    if clash := clash_of(file.path for file in files):
        both = f"{shown(clash[0])!r} and {shown(clash[1])!r}"
        raise UserError(f"{repository.page} holds {clash[2]} with one name, {both}: choose one of them with --file.")


def _digest(path: Path, file: HubFile) -> str:
    """Return the hash of a file, computed by the method of the listed hash."""
    with path.open("rb") as content:
        if len(file.digest) == 64:
            return hashlib.file_digest(content, "sha256").hexdigest()
        sha1 = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)  # git hashes this header first
        while chunk := content.read(1 << 20):
            sha1.update(chunk)
        return sha1.hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)
