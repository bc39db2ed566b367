"""Says in a sentence why a request to the Hugging Face Hub failed, and what to do about it."""

from typing import TYPE_CHECKING

from mlx_gpt.errors import explain_os_error, shown

if TYPE_CHECKING:
    from mlx_gpt.data.hub_client import Repository

TOKEN_HELP = "set HF_TOKEN to a token of your account (its settings, Access Tokens) or run `hf auth login`"


def explain(error: Exception, repository: "Repository", revision: str, host: str, waited: float) -> str:
    """Return the sentence for an error of the client. It never quotes a request, because the headers hold the token.

    Args:
        error: the error as it was raised.
        repository: the repository of the request.
        revision: the branch, tag or commit of the request.
        host: the name of the server.
        waited: seconds after which the client stops waiting for an answer.
    """
    import httpx2
    from huggingface_hub import errors

    match error:
        case errors.OfflineModeIsEnabled():
            return f"HF_HUB_OFFLINE forbids fetching {repository}: unset it, then run the command again."
        case errors.RevisionNotFoundError():
            return f"{repository.page} has no revision {shown(revision)}: name a branch, a tag or a commit after the @."
        case errors.RemoteEntryNotFoundError():
            return f"A file that {repository.page} lists is not there: try again later."
        case errors.HfHubHTTPError():
            gated = isinstance(error, errors.GatedRepoError)
            return _explain_status(error.response.status_code, gated, repository, host)
        case UnicodeError() | httpx2.LocalProtocolError():
            return f"The token in HF_TOKEN has characters that a token cannot have: {TOKEN_HELP}."
        case httpx2.TimeoutException():
            return f"{host} did not answer for {waited:g} seconds: try again later."
        case httpx2.ProxyError():
            return f"Cannot reach {host} through the proxy: check the variables HTTPS_PROXY and HTTP_PROXY."
        case httpx2.TransportError() | httpx2.InvalidURL():
            return f"Cannot reach {host}: check the network connection (and HF_ENDPOINT, if it is set), then try again."
        case OSError():
            return explain_os_error(error, f"fetch {repository}")
        case _:
            return f"The answer was not from {host}, perhaps this network's login page: log in there, then try again."


def _explain_status(status: int, gated: bool, repository: "Repository", host: str) -> str:
    from huggingface_hub import get_token

    what = str(repository)
    if gated or status == 403:
        return f"{what[0].upper()}{what[1:]} is gated: accept its licence on {repository.page}, then {TOKEN_HELP}."
    if status == 401 and get_token():
        return (
            f"{host} does not show {what} to the owner of this token (401): check the spelling, accept its licence on "
            f"{repository.page} if it has one, or {TOKEN_HELP}."
        )
    if status == 401:
        return (
            f"{host} has no {repository.kind} {repository.name}, or it is private or gated (401): check the spelling; "
            f"if it is there, accept its licence on {repository.page} and {TOKEN_HELP}."
        )
    if status == 404:
        return f"{host} has no {repository.kind} {repository.name} (404): check the spelling against its page."
    if status == 429:
        return f"{host} asks for fewer requests (429): wait a few minutes, then try again."
    return f"{host} failed ({status}): try again later."
