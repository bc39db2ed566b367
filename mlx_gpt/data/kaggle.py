"""A dataset's files: from Kaggle with its own client, or out of a zip or CSV that is already here.

A dataset's folder appears whole or not at all. Everything is fetched, checked and unpacked in a temporary folder beside
it, which goes away however the work ends; the last act is a rename.
"""

import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlx_gpt.data.archive import TEXT_SUFFIXES, Echo, check_space, disk_trouble, extract, say_nothing
from mlx_gpt.errors import UserError
from mlx_gpt.files import sync, write_text_whole

DEFAULT_DATASET = "carlmcbrideellis/llm-7-prompt-training-dataset"
LICENCE_NOTE = "The data comes under a licence of its own; whether it allows what you plan is yours to check: {page}"
TOKEN_HELP = (
    "create one at https://www.kaggle.com/settings (API, Generate New Token) and save it in ~/.kaggle/access_token "
    "or in the variable KAGGLE_API_TOKEN; a kaggle.json from before goes in ~/.kaggle"
)
BY_HAND = "or download it in the browser from {page} and run `mlx-gpt download --from-file` with the zip"

# Written last, so a folder that has it is whole; a folder that lacks it was not made here and is never replaced.
MARKER = ".complete.json"

# The longest silence from Kaggle that is still waited for. The client retries a body five times: minutes, not for ever.
STALL_SECONDS = 30.0


def download(dataset: str, folder: Path, *, force: bool = False, echo: Echo | None = None) -> list[Path]:
    """Download a Kaggle dataset into `folder/<owner>-<name>` and return its text-like files, sorted.

    A dataset that is there already, complete and unchanged, is used again without the network unless `force` is set.
    Whatever goes wrong, Ctrl-C included, what was there before is untouched and nothing half-written stays.

    Args:
        dataset: `owner/name`, or `owner/name/3` for version 3.
        folder: where the dataset's own folder goes; made if it is missing.
        force: download again even if the dataset is there.
        echo: is told, one line at a time, what a person would like to know; a progress bar goes with it.

    Raises:
        UserError: the dataset is misspelt, private or missing; the credentials are missing or refused; the network or
            the disk fails; or the zip is damaged, hostile or without text.
    """
    echo = echo or say_nothing
    owner, name, version = _parse(dataset)
    source = "/".join(filter(None, (owner, name, version)))
    page = f"https://www.kaggle.com/datasets/{owner}/{name}" + (f"/versions/{version}" if version else "")
    target = Path(folder) / (f"{owner}-{name}" + (f"-v{version}" if version else ""))

    files = None if force else _finished(target, source)
    if files is not None:
        echo(f"Using {target}, which is already downloaded.")
        return _without_overlap(files, echo)

    _refuse_foreign(target)
    echo(f"Downloading {source} from {page}")
    echo(LICENCE_NOTE.format(page=page))
    with _workroom(target.parent) as room:
        try:
            _run_client(source, room, show_progress=echo is not say_nothing and sys.stderr.isatty())
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(_explain(error, source, page)) from error
        return _install(room / f"{name}.zip", target, room, source, echo)


def from_file(path: Path, folder: Path, *, echo: Echo | None = None) -> list[Path]:
    """Return the text-like files of a download made by hand, sorted.

    A zip is checked and unpacked into `folder/<its name without .zip>`; any other text-like file is used where it lies.

    Args:
        path: the zip, or one file of text.
        folder: where the zip's own folder goes; made if it is missing.
        echo: is told, one line at a time, what a person would like to know.

    Raises:
        UserError: there is no such file, it is of no kind that can be read, or it is a zip that is damaged, hostile or
            without text.
    """
    echo = echo or say_nothing
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no file {path}: check the path.")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the zip or the CSV in it, or run `mlx-gpt prepare` with the folder.")
    if path.suffix.lower() in TEXT_SUFFIXES:
        return [path]
    if path.suffix.lower() != ".zip":
        raise UserError(f"Cannot tell what {path} holds: give a .zip or one of {', '.join(TEXT_SUFFIXES)}.")

    target = Path(folder) / (path.stem.strip(". ") or "archive")
    _refuse_foreign(target)
    with _workroom(target.parent) as room:
        return _install(path, target, room, path.name, echo)


# Talking to Kaggle


def _parse(dataset: str) -> tuple[str, str, str | None]:
    slug = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
    match = re.fullmatch(rf"({slug})/({slug})(?:/([1-9][0-9]*))?", dataset.strip())
    if not match:
        raise UserError(
            f"{dataset!r} is no Kaggle dataset: write owner/name, or owner/name/VERSION, "
            "as in its page's address kaggle.com/datasets/owner/name."
        )
    return match[1], match[2], match[3]


def _run_client(source: str, room: Path, *, show_progress: bool) -> None:
    """Let Kaggle's own client put `<name>.zip` into `room`; its errors come as they are."""
    with _guarded_requests(room), _own_stdin(), redirect_stdout(io.StringIO()):
        with redirect_stderr(io.StringIO()):
            import kaggle  # type: ignore[import-untyped]  # here, because it logs in while it is imported

            kaggle.api.authenticate()  # once more: the import keeps to itself why it failed
        # Only now may stderr be seen: the progress bar is there, everything else goes to stdout.
        kaggle.api.dataset_download_files(source, path=str(room), force=True, quiet=not show_progress)


@contextmanager
def _guarded_requests(room: Path) -> Iterator[None]:
    """Meanwhile no request waits for ever, and no body is begun that the disk cannot hold.

    The client sets no time-out, and `requests` passes over the socket module's default; but whatever it sends passes
    through this one method. A full disk the client would retry for a minute, then fail without saying what it needs.
    """
    from requests.adapters import HTTPAdapter

    original = HTTPAdapter.send

    def send(self: HTTPAdapter, request: Any, stream: bool = False, timeout: Any = None, **options: Any) -> Any:
        response = original(self, request, stream=stream, timeout=STALL_SECONDS, **options)
        length = response.headers.get("Content-Length", "")
        check_space(int(length) if length.isdecimal() else 0, room)
        return response

    HTTPAdapter.send = send  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        HTTPAdapter.send = original  # type: ignore[method-assign]


@contextmanager
def _own_stdin() -> Iterator[None]:
    """Without credentials the client calls `exit()`, which closes stdin: let it be one that nobody needs."""
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = stdin


def _explain(error: BaseException, source: str, page: str) -> str:
    """The sentence for whatever the client ended with. None quotes the error: a header in it may hold the token."""
    import requests

    by_hand = BY_HAND.format(page=page)
    match error:
        case ImportError():
            return f"The Kaggle client cannot be imported ({error}): run `pip install 'kaggle>=2.2,<3' six`, {by_hand}."
        case SystemExit():
            return _explain_no_login()
        case ValueError() if isinstance(error, UnicodeError) or "header" in str(error).lower():
            return f"The Kaggle API token holds characters that no token has: {TOKEN_HELP}."
        case json.JSONDecodeError():
            return (
                "Something else answered for Kaggle, perhaps this network's login page: log in there, then try again."
            )
        case requests.HTTPError():
            return _explain_status(error.response.status_code if error.response is not None else 0, source, page)
        # Both of these can stand for a body that began and stopped: the first is no ConnectionError, the second is one.
        case requests.exceptions.ChunkedEncodingError() | ValueError():
            return f"The download of {source} was cut short again and again: try once more later, {by_hand}."
        case requests.Timeout():
            return f"Kaggle gave no answer for {STALL_SECONDS:g} seconds: try again later, {by_hand}."
        case requests.ConnectionError():
            if "Read timed out" in str(error):
                return f"Kaggle stopped sending {source} halfway: try again later, {by_hand}."
            return "Cannot reach Kaggle: check the network connection (and the proxy, if there is one), then try again."
        case OSError() if not isinstance(error, requests.RequestException):
            return str(disk_trouble(error, "run the Kaggle client"))
        case _:
            return (
                f"The Kaggle client failed in a way it should not ({type(error).__name__}): try again later, {by_hand}."
            )


def _explain_no_login() -> str:
    from kagglesdk import get_access_token_from_env  # type: ignore[import-untyped]

    token, place = get_access_token_from_env()
    if token:
        return f"Kaggle does not accept the API token in {place}, which may have expired: {TOKEN_HELP}."
    return f"Kaggle needs an API token and there is none: {TOKEN_HELP}."


def _explain_status(status: int, source: str, page: str) -> str:
    if status == 401:
        return f"Kaggle does not accept the API token (401): {TOKEN_HELP}."
    if status == 403:
        return (
            f"Kaggle refuses {source} (403): open {page}, accept its terms there, and if it is private ask its owner."
        )
    if status == 404:
        return f"Kaggle knows no dataset {source} (404): check the spelling against its page, {page}."
    if status == 429:
        return "Kaggle asks for fewer requests (429): wait some minutes, then try again."
    return f"Kaggle has a problem of its own ({status}): try again later, {BY_HAND.format(page=page)}."


# Folders that appear whole


@contextmanager
def _workroom(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, on the same disk, so that what is finished leaves it by a rename."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".unfinished-", dir=folder, ignore_cleanup_errors=True) as room:
            yield Path(room)
    except OSError as error:
        raise disk_trouble(error, f"write to {folder}") from error


def _install(zip_path: Path, target: Path, room: Path, source: str, echo: Echo) -> list[Path]:
    new = room / "new"
    files = [path.relative_to(new) for path in extract(zip_path, new, echo=echo)]
    record = {
        "source": source,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {path.as_posix(): (new / path).stat().st_size for path in files},
    }
    write_text_whole(new / MARKER, json.dumps(record, indent=2))
    _swap_in(new, target)
    sync(target.parent)
    return _without_overlap([target / path for path in files], echo)


def _swap_in(new: Path, target: Path) -> None:
    old = new.with_name("old")  # in the temporary folder, with which it goes away
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def _finished(target: Path, source: str) -> list[Path] | None:
    """The files of a dataset that is complete and as it was downloaded, or None."""
    try:
        record = json.loads((target / MARKER).read_text(encoding="utf-8"))
        sizes = {target / name: size for name, size in record["files"].items()}
        whole = record["source"] == source and all(path.stat().st_size == size for path, size in sizes.items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return sorted(sizes) if whole else None


def _refuse_foreign(target: Path) -> None:
    if target.exists() and not (target / MARKER).is_file():
        raise UserError(f"{target} is in the way and is not a download of this program: move it elsewhere first.")


def _without_overlap(files: Sequence[Path], echo: Echo) -> list[Path]:
    # The default dataset holds two editions of nearly the same essays. Taken together, almost every essay would stand
    # twice in the corpus, and often on both sides of the split, where a validation loss means nothing.
    first, second = "train_essays_7_prompts.csv", "train_essays_7_prompts_v2.csv"
    if not {first, second} <= {path.name for path in files}:
        return list(files)
    echo(f"Leaving out {first}: {second} holds nearly the same essays.")
    return [path for path in files if path.name != first]
