"""The LoRA files that requests may name: a folder, looked at anew whenever someone asks. Loads nothing.

A name is a file's place in the folder without its suffix. What a request says is looked up here, never made a path.
"""

import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType

import structlog

from services.diffusion.lora_settings import LORA_SUFFIX, LoraFile, LoraSettings
from services.diffusion.shapes import Lora, ShelfLora
from shared.checkpoint import UnusableModel
from shared.errors import InvalidField, UnknownName
from shared.schemas.diffusion import LoraChoice
from shared.wire import Header, WireError, read_file_header

MAX_FILES = 10_000
MAX_METADATA_ENTRIES = 64
MAX_METADATA_CHARS = 2_000  # of one value; some trainers write every caption that they have seen

log = structlog.get_logger(__name__)


class Shelf:
    """The folder, and the LoRAs that a picture has by default. Its methods read files: not for the event loop.

    Raises UnusableModel for a default that has no name of its own.
    """

    def __init__(self, settings: LoraSettings) -> None:
        self._folder = settings.lora_dir
        self._flags = settings.loras
        self._elsewhere: Mapping[str, Path] = {} if self._folder is None else self._outside(self._folder)
        self._hidden: Set[str] = set()
        self._seen: dict[Path, ShelfLora | None] = {}
        self._looking = threading.Lock()
        self._began_at = float("-inf")
        self.files: Mapping[str, ShelfLora] = {}
        self.refresh()
        self._default: tuple[Lora, ...] = () if self._folder is None else self._of_flags()

    @property
    def default(self) -> Mapping[str, float]:
        """Names and scales of a picture that names none."""
        return {lora.name: scale for lora, scale in self._default}

    def refresh(self) -> None:
        """Looks what is in the folder now. A file that is not whole safetensors is left out, and logged once.

        Those who ask while the folder is being looked through share one look more: who asks for many names that there
        are not must not keep disk and threads busy.
        """
        if self._folder is None:
            return
        asked_at = time.monotonic()
        with self._looking:
            if self._began_at < asked_at:
                self._began_at = time.monotonic()
                self._look_through(self._folder)

    def _look_through(self, folder: Path) -> None:
        found = {_printable(_name(folder, path)): path for path in _paths(folder)}
        hidden = found.keys() & self._elsewhere.keys()
        for name in hidden - self._hidden:
            log.warning(
                "a LoRA of the folder cannot be told from one of --lora, which keeps its name",
                path=str(found[name]),
                kept=str(self._elsewhere[name]),
            )
        self._hidden = hidden
        found |= self._elsewhere
        self._seen = {path: self._seen[path] for path in found.values() if path in self._seen}
        files = {name: self._look_at(name, path) for name, path in found.items()}
        self.files = MappingProxyType({name: lora for name, lora in files.items() if lora is not None})

    def choose(self, choices: Sequence[LoraChoice] | None) -> tuple[Lora, ...]:
        """The LoRAs that a picture is to have, as their files are now, without those that a scale of 0 leaves out.

        Raises UnknownName, and InvalidField for a choice that cannot be.
        """
        if choices is None:
            return self._default_now()
        if self._folder is None and (choices or self._flags):
            self._refuse(choices)
        names = [choice.name for choice in choices]
        if len(set(names)) < len(names):
            raise InvalidField("'loras' names a LoRA twice; give it once, with the sum of the scales.")
        files = self._files_now(names)
        for name in names:
            if name not in files:
                raise UnknownName(f"There is no LoRA {name!r}; GET /api/loras lists those that there are.")
        return tuple((files[choice.name], float(choice.scale)) for choice in choices if choice.scale)

    def newest(self, lora: ShelfLora) -> ShelfLora:
        """What the file of that name is now. Raises InvalidField when there is none any more."""
        newest = self._files_now([lora.name]).get(lora.name)
        if newest is None:
            raise InvalidField(f"The LoRA {lora.name!r} is no longer there.")
        return newest

    def _default_now(self) -> tuple[Lora, ...]:
        """Those of the flags as their files are now; one that is not whole now, as it was."""
        files = self._files_now(self.default)
        self._default = tuple((files.get(lora.name, lora), scale) for lora, scale in self._default)
        return self._default

    def _files_now(self, names: Iterable[str]) -> Mapping[str, ShelfLora]:
        """All files, looked at anew where one of these has changed."""
        if not all(self._is_as_seen(name) for name in names):
            self.refresh()
        return self.files

    def _is_as_seen(self, name: str) -> bool:
        lora = self.files.get(name)
        try:
            return lora is not None and _stamp(lora.path) == lora.stamp
        except OSError:
            return False

    def _refuse(self, choices: Sequence[LoraChoice]) -> None:
        if choices:
            raise UnknownName(
                f"There is no LoRA {choices[0].name[:128]!r}: this server was started without --lora-dir."
            )
        raise InvalidField("'loras' cannot be empty here: this server's LoRAs are fused into its weights.")

    def _outside(self, folder: Path) -> Mapping[str, Path]:
        """The flags' files that lie elsewhere, by their names, which no file that comes into the folder takes."""
        there = {path.resolve() for path in _paths(folder)} if self._flags else set()
        elsewhere: dict[str, Path] = {}
        for flag in self._flags:
            if flag.path.resolve() not in there:
                elsewhere.setdefault(flag.path.stem, flag.path)
        return elsewhere

    def _of_flags(self) -> tuple[Lora, ...]:
        """Those of the flags; one that they name twice has the sum of its scales, as fusing it twice would give."""
        by_path = {lora.path.resolve(): name for name, lora in self.files.items()}
        scales: dict[str, float] = {}
        for lora in self._flags:
            name = by_path.get(lora.path.resolve())
            if name is None or name in self._hidden:
                raise UnusableModel(
                    f"the LoRA {lora.path} cannot be told from another one of its name in {self._folder}: rename it"
                )
            scales[name] = scales.get(name, 0.0) + lora.scale
        return tuple((self.files[name], scale) for name, scale in scales.items() if scale)

    def _look_at(self, name: str, path: Path) -> ShelfLora | None:
        try:
            stamp = _stamp(path)
            known = self._seen.get(path)
            if known is not None and known.stamp == stamp:
                return known
            with path.open("rb") as file:
                header = read_file_header(file)
        except (OSError, WireError) as error:
            if path not in self._seen or self._seen[path] is not None:
                log.warning("a LoRA of the folder cannot be used", path=str(path), cause=str(error))
            self._seen[path] = None
            return None
        lora = ShelfLora(
            name=name,
            path=path,
            stamp=stamp,
            bytes=stamp[1],
            numbers=sum(math.prod(tensor.shape) for tensor in header.tensors),
            rank=_rank(header),
            metadata=_short(header.metadata),
        )
        self._seen[path] = lora
        return lora


def default_files(settings: LoraSettings) -> Sequence[LoraFile]:
    """The LoRAs to fuse at the start: the flags', where requests cannot choose others."""
    return settings.loras if settings.lora_dir is None else ()


def _paths(folder: Path) -> Sequence[Path]:
    return sorted(folder.rglob(f"*{LORA_SUFFIX}"))[:MAX_FILES]


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _rank(header: Header) -> int | None:
    ranks = {
        tensor.shape[0]
        for tensor in header.tensors
        if tensor.name.endswith((".lora_A.weight", ".lora_down.weight")) and len(tensor.shape) == 2
    }
    return ranks.pop() if len(ranks) == 1 else None


def _short(metadata: Mapping[str, str]) -> Mapping[str, str]:
    items = list(metadata.items())[:MAX_METADATA_ENTRIES]
    return {_printable(name[:128]): _printable(text[:MAX_METADATA_CHARS]) for name, text in items}


def _printable(text: str) -> str:
    return text.encode(errors="replace").decode()
