"""`zimage download`: a published model from the Hugging Face hub, by its own library.

What an interrupted run had finished stays; a file that was under way is fetched anew, but within a run a broken
connection goes on where it broke. The library reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE at its import.
"""

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import DryRunError, XetDownloadError
from huggingface_hub.utils._xet import abort_xet_session
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, tqdm
from rich.console import Console
from rich.filesize import decimal

from shared.checkpoint import UnusableModel
from zimage.errors import CommandFailed
from zimage.hub_errors import explain
from zimage.published import REPOSITORIES, Published, Repository
from zimage.weights import read_weights


class CannotDownload(CommandFailed):
    """The model did not arrive."""


def download(model: Published, *, to: Path | None, revision: str | None) -> Path:
    """Fetches what is missing of a model into the folder `to`, else into the hub's cache, and answers where it is.

    Raises CannotDownload.
    """
    repository = REPOSITORIES[model]
    target = to or Path(constants.HF_HUB_CACHE)
    asked: dict[str, Any] = {
        "repo_id": repository.name,
        "revision": revision,
        "local_dir": to,
        "allow_patterns": list(repository.patterns),
    }
    try:
        _announce(asked, target)
        with _bars_that_stop() as bars:
            folder = Path(snapshot_download(**asked, tqdm_class=bars))
    except (OSError, ValueError, RuntimeError, XetDownloadError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise CannotDownload(explain(error, repository.name, revision, target)) from None
    _require_whole(folder, repository)
    return folder


def _announce(asked: dict[str, Any], target: Path) -> None:
    """Says how much comes, if the hub can be asked. Raises CannotDownload when the disk is too small for it."""
    try:
        with _no_progress_bars():
            files = snapshot_download(**asked, dry_run=True)
    except DryRunError:  # no hub: the cache may have all, and what comes next says why where it doesn't
        return
    sizes = [file.file_size or 0 for file in files if file.will_download]
    if not sizes:
        _tell(f"{asked['repo_id']}: all {len(files)} files are here already")
        return
    size, free = sum(sizes), _free_bytes(target)
    _tell(f"{asked['repo_id']}: {len(sizes)} of {len(files)} files to fetch, {decimal(size)}, to {target}")
    if size > free:
        raise CannotDownload(
            f"the disk of {target} has {decimal(free)} free, and {decimal(size)} are to come: make room, or name "
            "another folder with --to or HF_HOME"
        )


@contextmanager
def _bars_that_stop() -> Iterator[type[tqdm]]:
    """The library's progress bars, which at Ctrl-C end the threads that move them.

    By itself the library would first finish every file that is under way, which may be gigabytes.
    """
    stopped = threading.Event()

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> Any:
            if stopped.is_set():
                raise KeyboardInterrupt
            return super().update(n)

    def stop(*_: object) -> None:
        stopped.set()
        abort_xet_session()  # type: ignore[no-untyped-call]
        _tell("stopped; the same command goes on with the files that are missing")
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield Bar
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """The library's bars are the user's to switch off, too: that is left as it is."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _free_bytes(folder: Path) -> int:
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def _require_whole(folder: Path, repository: Repository) -> None:
    try:
        for part in repository.weights:
            read_weights(folder / part)
    except UnusableModel as error:
        raise CannotDownload(f"the model in {folder} cannot be used: {error}; run the same command again") from None


def _tell(text: str) -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text)
