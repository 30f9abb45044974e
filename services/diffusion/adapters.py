"""LoRAs side by side on one DiT, as adapters of peft that are switched between steps and never fused.

Those that were used last stay on the device, as many as its share of memory holds. Knows no request.
"""

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from services.diffusion.loras import add_lora
from services.diffusion.shapes import Lora
from services.diffusion.shelf import Shelf
from shared.checkpoint import UnusableModel
from shared.errors import InvalidField
from shared.schemas.diffusion import LoraChoice

MEANT = "Already found a `peft_config`|TorchaoLoraLinear was instantiated"
"""What peft warns of and is meant here: several adapters, and adapters on quantized weights that are never merged."""
NEXT = "Adapter .* was active which is now deleted"
"""And of another one that then would be active, were adapters not switched off."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A LoRA on the device: its name for peft, the file as it was when it was read, and what it takes."""

    adapter: str
    stamp: tuple[int, int]
    bytes: int


class Adapters:
    """The adapters of a DiT, by the names of the LoRAs on the shelf.

    Only the device's thread changes them; others choose among the files and ask what they take.
    """

    def __init__(self, transformer: Any, shelf: Shelf, max_bytes: int) -> None:
        self.shelf = shelf
        self._transformer = transformer
        self._max_bytes = max_bytes
        self._item_bytes: int = transformer.dtype.itemsize
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()  # last used at the end
        self._active: tuple[Lora, ...] = ()
        self._made = 0

    @property
    def loaded(self) -> Sequence[str]:
        """Names of the LoRAs that are on the device, the one that was used last at the end."""
        return list(self._loaded)

    @property
    def loaded_bytes(self) -> int:
        """What those on the device take."""
        return sum(lora.bytes for lora in self._loaded.values())

    def choose(self, choices: Sequence[LoraChoice] | None) -> tuple[Lora, ...]:
        """The LoRAs of a picture, there and not too large together. Looks at the files that are named.

        Raises UnknownName and InvalidField.
        """
        loras = self.shelf.choose(choices)
        if not self.fit({name for name, _ in loras}):
            raise InvalidField(f"'loras' takes more than the {self._max_bytes} bytes that this server keeps of them.")
        return loras

    def fit(self, names: Iterable[str]) -> bool:
        """Whether these may be on the device at once."""
        return self.bytes_of(names) <= self._max_bytes

    def bytes_of(self, names: Iterable[str]) -> int:
        """What these take on the device. Any thread may ask."""
        known = {name: self._loaded.get(name) for name in set(names)}
        others = {name for name, lora in known.items() if lora is None}
        there = sum(lora.bytes for lora in known.values() if lora is not None)
        return there + self.shelf.bytes_of(others, self._item_bytes)

    def keep_within(self, room: int, wanted: Iterable[str]) -> None:
        """Takes LoRAs off the device, except those `wanted`, until all together take at most `room` bytes."""
        kept = set(wanted)
        for other in list(self._loaded):
            if self.bytes_of({*self._loaded, *kept}) <= room:
                return
            if other not in kept:
                self._drop(other)

    def load(self, loras: Sequence[Lora], *, in_use: Iterable[str] = ()) -> None:
        """Brings these to the device, and takes others off it except those `in_use` until there is room.

        Raises InvalidField, which names a LoRA that cannot be used; the others then stay.
        """
        wanted = {name for name, _ in loras}
        kept = wanted | set(in_use)
        for name in wanted:
            self._drop_outdated(name, in_use)
            if name in self._loaded:
                self._loaded.move_to_end(name)
                continue
            self.keep_within(self._max_bytes, kept)
            self._add(name)

    def use(self, loras: Sequence[Lora]) -> None:
        """Switches to exactly these, which are on the device; none leaves the weights as they are, bit for bit."""
        if tuple(loras) == self._active:
            return
        if loras:
            self._transformer.set_adapters(
                [self._loaded[name].adapter for name, _ in loras], weights=[scale for _, scale in loras]
            )
            self._transformer.enable_adapters()
            self._active = tuple(loras)
        else:
            self._switch_off()

    def _add(self, name: str) -> None:
        lora = self.shelf.files.get(name)
        if lora is None:
            raise InvalidField(f"The LoRA {name!r} is no longer there.")
        self._made += 1
        adapter = f"lora_{self._made}"  # peft takes no dots in a name
        try:
            with warnings.catch_warnings(), torch.inference_mode(mode=False), torch.no_grad():
                warnings.filterwarnings("ignore", message=MEANT)
                layers = add_lora(self._transformer, lora.path, adapter=adapter)
        except UnusableModel as error:
            told = str(error).replace(f"the LoRA {lora.path}", f"The LoRA {name!r}")
            raise InvalidField(f"{told}.") from None
        finally:
            self._switch_off()  # peft switches a new one on
        self._loaded[name] = _Loaded(adapter, lora.stamp, self.shelf.bytes_of({name}, self._item_bytes))
        log.info("lora loaded", name=name, layers=layers, loaded=len(self._loaded))

    def _drop_outdated(self, name: str, in_use: Iterable[str]) -> None:
        lora = self.shelf.files.get(name)
        if name in self._loaded and lora is not None and self._loaded[name].stamp != lora.stamp and name not in in_use:
            self._drop(name)

    def _drop(self, name: str) -> None:
        lora = self._loaded.pop(name)
        self.use(())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=NEXT)
            self._transformer.delete_adapters(lora.adapter)
        log.info("lora dropped", name=name, loaded=len(self._loaded))

    def _switch_off(self) -> None:
        self._active = ()
        if getattr(self._transformer, "peft_config", None):
            self._transformer.disable_adapters()
