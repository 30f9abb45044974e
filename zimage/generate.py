"""`zimage generate`: one picture from a running server, into a file or to standard output."""

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from shared.schemas.diffusion import Stepped
from zimage.client import NoPicture, Picture, request_picture
from zimage.progress import progress_bar

STANDARD_OUTPUT = Path("-")


def generate(fields: Mapping[str, Any], output: Path, *, url: str, timeout_s: float, force: bool) -> None:
    """Draws the picture that `fields` of `POST /api/generate` describe (None leaves one to the server) into `output`,
    which `-` makes standard output. Raises NoPicture."""
    _check_output(output, force=force)
    body = {name: value for name, value in fields.items() if value is not None}
    picture = _draw(body, url=url, timeout_s=timeout_s)
    if output == STANDARD_OUTPUT:
        sys.stdout.buffer.write(picture.png)
        sys.stdout.buffer.flush()
    else:
        _save(picture, output, force=force)
    told = Console(stderr=output == STANDARD_OUTPUT, highlight=False, markup=False, soft_wrap=True)
    told.print(_summary(picture, output))


def _draw(body: Mapping[str, Any], *, url: str, timeout_s: float) -> Picture:
    with progress_bar(Console(stderr=True)) as progress:
        task = progress.add_task("Waiting", total=None)

        def told(done: Stepped) -> None:
            progress.update(task, description="Drawing", total=done.steps, completed=done.step)

        return asyncio.run(request_picture(url, body, timeout_s=timeout_s, told=told))


def _check_output(output: Path, *, force: bool) -> None:
    """Finds out before the drawing what would prevent the saving, and makes the folder."""
    if output == STANDARD_OUTPUT:
        if sys.stdout.isatty():
            raise NoPicture("a picture is not for a terminal: send it on (`-o - > out.png`), or name a file with -o")
        return
    if output.is_dir():
        raise NoPicture(f"{output} is a folder: name a file in it")
    if output.exists() and not output.is_file():
        raise NoPicture(f"{output} is no ordinary file: `-o -` writes to standard output")
    if os.path.lexists(output) and not force:
        raise NoPicture(_taken(output))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NoPicture(f"the folder {output.parent} cannot be made: {error.strerror}") from None
    if not os.access(output.parent, os.W_OK | os.X_OK):
        raise NoPicture(f"the folder {output.parent} cannot be written to")


def _save(picture: Picture, output: Path, *, force: bool) -> None:
    """Writes the file whole or not at all: beside its place, then moved there."""
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        part.write_bytes(picture.png)
        if force:
            part.replace(output)
        else:
            _move_to_free_name(part, output)
    except FileExistsError:
        raise NoPicture(f"{_taken(output)}; the picture that was drawn had seed {picture.seed}") from None
    except OSError as error:
        raise NoPicture(f"{output} cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def _move_to_free_name(part: Path, output: Path) -> None:
    """Unlike a rename, a link fails where a file has come into being since we looked."""
    try:
        output.hardlink_to(part)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: the look before must do
        part.rename(output)


def _taken(output: Path) -> str:
    return f"{output} exists already: name another file with -o, or overwrite it with --force"


def _summary(picture: Picture, output: Path) -> str:
    width, height = picture.size
    name = "standard output" if output == STANDARD_OUTPUT else str(output)
    size = f"{width}x{height} pixels, {len(picture.png) / 1000:.1f} kB"
    return f"{name} · seed {picture.seed} · {size} · {picture.seconds:.2f} s"
