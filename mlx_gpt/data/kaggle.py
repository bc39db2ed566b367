"""Get a dataset's files from Kaggle with its own client, or from a zip or CSV that is already on the disk.

A dataset's folder appears complete or not at all. Everything is downloaded, checked and unpacked in a temporary folder
beside it, which is removed however the work ends. The last step is a rename.
"""

import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from mlx_gpt.data.archive import JSON_SUFFIX, TEXT_SUFFIXES, check_space, extract
from mlx_gpt.data.downloads import complete_files, install, recover, refuse_foreign
from mlx_gpt.errors import UserError, explain_os_error, os_errors_explained
from mlx_gpt.files import temporary_folder
from mlx_gpt.progress import Echo, ignore_line

DEFAULT_DATASET = "carlmcbrideellis/llm-7-prompt-training-dataset"
LICENCE_NOTE = "The data has its own licence; please check on its page that it allows what you plan to do: {page}"
TOKEN_HELP = (
    "create one at https://www.kaggle.com/settings (API, Generate New Token) and save it in ~/.kaggle/access_token "
    "or in the variable KAGGLE_API_TOKEN; an older kaggle.json goes in ~/.kaggle"
)
BY_HAND = "or download it in the browser from {page} and run `mlx-gpt download --from-file` with the zip"

# How long to wait while Kaggle sends nothing. The client retries a body five times, so it gives up after minutes.
STALL_SECONDS = 30.0


def download(dataset: str, folder: Path, *, force: bool = False, echo: Echo = ignore_line) -> list[Path]:
    """Download a Kaggle dataset into `folder/<owner>-<name>` and return its text files, sorted.

    A dataset that is already there, complete and unchanged, is used again without the network unless `force` is set.
    After a failure or Ctrl-C the folder is as it was before.

    Args:
        dataset: `owner/name`, or `owner/name/3` for version 3.
        folder: where the dataset's own folder goes; created if it is missing.
        force: download the dataset again even if it is there.
        echo: called with each line for the person. A terminal then also shows a progress bar.

    Raises:
        UserError: the dataset is misspelt, private or missing; the credentials are missing or refused; the network or
            the disk fails; or the zip is damaged, hostile or without text.
    """
    owner, name, version = _parse(dataset)
    source = "/".join(filter(None, (owner, name, version)))
    page = f"https://www.kaggle.com/datasets/{owner}/{name}" + (f"/versions/{version}" if version else "")
    target = Path(folder) / (f"{owner}-{name}" + (f"-v{version}" if version else ""))

    recover(target)
    files = None if force else complete_files(target, source)
    if files is not None:
        echo(f"Using {target}, which is already downloaded.")
        return _without_overlap(files, echo)

    refuse_foreign(target)
    echo(f"Downloading {source} from {page}")
    echo(LICENCE_NOTE.format(page=page))
    with _temporary_folder(target.parent) as temporary:
        try:
            _run_client(source, temporary, show_progress=echo is not ignore_line and sys.stderr.isatty())
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(_explain(error, source, page)) from error
        return _install(temporary / f"{name}.zip", target, temporary, source, echo)


def from_file(path: Path, folder: Path, *, echo: Echo = ignore_line) -> list[Path]:
    """Return the text files of a dataset that was downloaded by hand, sorted.

    A zip is checked and unpacked into `folder/<its name without .zip>`. Any other text file is used where it is.

    Args:
        path: the zip, or one text file.
        folder: where the zip's own folder goes; created if it is missing.
        echo: called with each line for the person.

    Raises:
        UserError: there is no such file, its kind cannot be read, or it is a zip that is damaged, hostile or without
            text.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no file {path}: check the path.")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the zip or the CSV in it, or run `mlx-gpt prepare` with the folder.")
    suffixes = (*TEXT_SUFFIXES, JSON_SUFFIX)
    if path.suffix.lower() in suffixes:
        return [path]
    if path.suffix.lower() != ".zip":
        raise UserError(f"Cannot read {path} because of its suffix: give a .zip or one of {', '.join(suffixes)}.")

    target = Path(folder) / (path.stem.strip(". ") or "archive")
    recover(target)
    refuse_foreign(target)
    with _temporary_folder(target.parent) as temporary:
        return _install(path, target, temporary, path.name, echo)


# ---- Kaggle's client ------------------------------------------------------------------------------------------------


def _parse(dataset: str) -> tuple[str, str, str | None]:
    slug = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
    match = re.fullmatch(rf"({slug})/({slug})(?:/([1-9][0-9]*))?", dataset.strip())
    if not match:
        raise UserError(
            f"{dataset!r} is not the name of a Kaggle dataset: write owner/name or owner/name/VERSION, "
            "as in the address of its page, kaggle.com/datasets/owner/name."
        )
    return match[1], match[2], match[3]


def _run_client(source: str, folder: Path, *, show_progress: bool) -> None:
    """Have Kaggle's own client write `<name>.zip` to `folder`. Its errors are not translated here."""
    with _guarded_requests(folder), _own_stdin(), redirect_stdout(io.StringIO()):
        with redirect_stderr(io.StringIO()):
            import kaggle  # type: ignore[import-untyped]  # here, because importing it logs in

            kaggle.api.authenticate()  # again, because the import hides why a login failed
        # From here on stderr is visible: it has only the progress bar, and everything else goes to stdout.
        kaggle.api.dataset_download_files(source, path=str(folder), force=True, quiet=not show_progress)


@contextmanager
def _guarded_requests(folder: Path) -> Iterator[None]:
    """Give every request a time-out, and refuse a body that the disk has no room for.

    The client sets no time-out, and `requests` ignores the socket module's default, but everything that it sends goes
    through this one method. On a full disk the client would retry for a minute and then not say how much it needs.
    """
    from requests.adapters import HTTPAdapter

    original = HTTPAdapter.send

    def send(self: HTTPAdapter, request: Any, stream: bool = False, timeout: Any = None, **options: Any) -> Any:
        response = original(self, request, stream=stream, timeout=STALL_SECONDS, **options)
        length = response.headers.get("Content-Length", "")
        check_space(int(length) if length.isdecimal() else 0, folder)
        return response

    HTTPAdapter.send = send  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        HTTPAdapter.send = original  # type: ignore[method-assign]


@contextmanager
def _own_stdin() -> Iterator[None]:
    """Give the client a stdin of its own, because without credentials it calls `exit()`, which closes stdin."""
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = stdin


def _explain(error: BaseException, source: str, page: str) -> str:
    """Return the sentence for an error of the client. It never quotes a request, whose headers hold the token."""
    import requests

    by_hand = BY_HAND.format(page=page)
    match error:
        case ImportError():
            return f"The Kaggle client cannot be imported ({error}): run `pip install 'kaggle>=2.2,<3' six`, {by_hand}."
        case SystemExit():
            return _explain_no_login()
        case ValueError() if isinstance(error, UnicodeError) or "header" in str(error).lower():
            return f"The Kaggle API token has characters that a token cannot have: {TOKEN_HELP}."
        case json.JSONDecodeError():
            return "The answer was not from Kaggle, perhaps this network's login page: log in there, then try again."
        case requests.HTTPError():
            return _explain_status(error.response.status_code if error.response is not None else 0, source, page)
        # A body that stops early raises one of these, or the ConnectionError below.
        case requests.exceptions.ChunkedEncodingError() | ValueError():
            return f"The download of {source} was cut short several times: try again later, {by_hand}."
        case requests.Timeout():
            return f"Kaggle did not answer for {STALL_SECONDS:g} seconds: try again later, {by_hand}."
        case requests.ConnectionError():
            if "Read timed out" in str(error):
                return f"Kaggle stopped sending {source} halfway: try again later, {by_hand}."
            return "Cannot reach Kaggle: check the network connection (and the proxy, if there is one), then try again."
        case OSError() if not isinstance(error, requests.RequestException):
            return explain_os_error(error, "run the Kaggle client")
        case _:
            return f"The Kaggle client failed unexpectedly ({type(error).__name__}): try again later, {by_hand}."


def _explain_no_login() -> str:
    from kagglesdk import get_access_token_from_env  # type: ignore[import-untyped]

    token, place = get_access_token_from_env()
    if token:
        return f"Kaggle does not accept the API token in {place}, which may have expired: {TOKEN_HELP}."
    return f"Kaggle needs an API token, and there is none: {TOKEN_HELP}."


def _explain_status(status: int, source: str, page: str) -> str:
    if status == 401:
        return f"Kaggle does not accept the API token (401): {TOKEN_HELP}."
    if status == 403:
        return (
            f"Kaggle refuses {source} (403): accept its terms on {page}, or ask its owner for access if it is private."
        )
    if status == 404:
        return f"Kaggle has no dataset {source} (404): check the spelling against its page, {page}."
    if status == 429:
        return "Kaggle asks for fewer requests (429): wait a few minutes, then try again."
    return f"Kaggle's server failed ({status}): try again later, {BY_HAND.format(page=page)}."


# ---- from the zip to a folder ---------------------------------------------------------------------------------------


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """Make a temporary folder inside `folder`, on the same disk, so that a complete folder can be moved by a rename."""
    with os_errors_explained(f"write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder) as temporary:
            yield temporary


def _install(zip_path: Path, target: Path, temporary: Path, source: str, echo: Echo) -> list[Path]:
    """Unpack a zip in `temporary`, move the result to `target` and return its text files."""
    new = temporary / "new"
    names = [path.relative_to(new).as_posix() for path in extract(zip_path, new, echo=echo)]
    install(new, target, source, names)
    return _without_overlap([target / name for name in names], echo)


def _without_overlap(files: Sequence[Path], echo: Echo) -> list[Path]:
    # The default dataset holds two editions of nearly the same essays. With both, almost every essay would be in the
    # corpus twice, and often once in each split, which would make the validation loss meaningless.
    first, second = "train_essays_7_prompts.csv", "train_essays_7_prompts_v2.csv"
    if not {first, second} <= {path.name for path in files}:
        return list(files)
    echo(f"Leaving out {first}: {second} holds nearly the same essays.")
    return [path for path in files if path.name != first]
