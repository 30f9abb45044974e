"""What went wrong with the Hugging Face hub, in one sentence that says what to do."""

import errno
from pathlib import Path

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def explain(error: BaseException, name: str, revision: str | None, target: Path) -> str:
    """The sentence for an error of `snapshot_download` of the repository `name` into `target`."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, OfflineModeIsEnabled):
        lack = "only a part of" if isinstance(error, IncompleteSnapshotError) else "no copy of"
        return f"HF_HUB_OFFLINE is set, and {target} has {lack} {name}: unset it, and download once with a network"
    if isinstance(cause, HfHubHTTPError):
        return _refusal(cause, name, revision)
    if isinstance(cause, httpx2.TransportError | ConnectionError):
        return (
            f"the hub at {constants.ENDPOINT} cannot be reached ({type(cause).__name__}): check the network, the proxy "
            "and HF_ENDPOINT"
        )
    if isinstance(cause, HFValidationError | httpx2.InvalidURL):
        return f"the hub's library refuses what was asked for: {_first_line(cause)}"
    if isinstance(cause, OSError) and cause.errno is not None:
        return _file_trouble(cause, target)
    return f"{name} could not be downloaded from {constants.ENDPOINT}: {_first_line(cause)}"


def _refusal(error: HfHubHTTPError, name: str, revision: str | None) -> str:
    status = error.response.status_code
    page = f"{constants.ENDPOINT}/{name}"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision '{revision or constants.DEFAULT_REVISION}': {page} shows which there are"
    if isinstance(error, GatedRepoError):
        return f"{name} is gated ({status}): ask for access at {page}, then set HF_TOKEN to a token of that account"
    if status == httpx2.codes.UNAUTHORIZED:
        return f"the hub wants to know who asks for {name} (401): set HF_TOKEN to a token that may read it"
    if status == httpx2.codes.FORBIDDEN:
        return f"the hub does not let this account have {name} (403): ask for access at {page}, or use another HF_TOKEN"
    if status == httpx2.codes.NOT_FOUND:
        return f"{constants.ENDPOINT} has no {name}, or not all of its files (404): check HF_ENDPOINT and --revision"
    return f"the hub at {constants.ENDPOINT} answered with status {status}: try again later"


def _file_trouble(error: OSError, target: Path) -> str:
    if error.errno in _DISK_FULL:
        return f"the disk of {target} is full: make room, or name another folder with --to or HF_HOME"
    return f"{error.filename or target} cannot be used: {error.strerror}; name another folder with --to or HF_HOME"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
