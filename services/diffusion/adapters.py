"""LoRAs side by side on one DiT, as adapters of peft that are switched between steps and never fused.

Those that were used last stay on the device, as many as its share of memory holds. Knows no request.
"""

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence, Set
from typing import Any

import structlog
import torch

from services.diffusion.loras import add_lora
from services.diffusion.shapes import Lora, ShelfLora
from services.diffusion.shelf import Shelf
from shared.checkpoint import UnusableModel
from shared.errors import InvalidField
from shared.schemas.diffusion import LoraChoice

MEANT = "Already found a `peft_config`|TorchaoLoraLinear was instantiated|Adapter .* was active which is now deleted"
"""What peft warns of and is meant here: several adapters, adapters on quantized weights that are never merged, and
another one that would be active after one is deleted, were adapters not switched off."""

log = structlog.get_logger(__name__)


class Adapters:
    """The adapters of a DiT, by the LoRAs of the shelf. A file that was replaced is another LoRA of the same name: both
    are there as long as pictures in the making have the old one.

    Only the device's thread changes them; others choose among the files and ask what they take.
    """

    def __init__(self, transformer: Any, shelf: Shelf, max_bytes: int) -> None:
        self.shelf = shelf
        self._transformer = transformer
        self._max_bytes = max_bytes
        self._item_bytes: int = transformer.dtype.itemsize
        self._loaded: OrderedDict[ShelfLora, str] = OrderedDict()  # peft's name for each, last used at the end
        self._active: tuple[Lora, ...] = ()
        self._made = 0

    @property
    def loaded(self) -> Sequence[str]:
        """Names of the LoRAs that are on the device, the one that was used last at the end."""
        return [lora.name for lora in self._loaded]

    @property
    def loaded_bytes(self) -> int:
        """What those on the device take."""
        return self.bytes_of(self._loaded)

    def choose(self, choices: Sequence[LoraChoice] | None) -> tuple[Lora, ...]:
        """The LoRAs of a picture, there and not too large together. Looks at the files that are named.

        Raises UnknownName and InvalidField.
        """
        loras = self.shelf.choose(choices)
        if not self.fit(lora for lora, _ in loras):
            raise InvalidField(f"'loras' takes more than the {self._max_bytes} bytes that this server keeps of them.")
        return loras

    def fit(self, loras: Iterable[ShelfLora]) -> bool:
        """Whether these may be on the device at once."""
        return self.bytes_of(loras) <= self._max_bytes

    def bytes_of(self, loras: Iterable[ShelfLora]) -> int:
        """What these take on the device, each counted once."""
        return sum(lora.numbers for lora in set(loras)) * self._item_bytes

    def keep_within(self, room: int, wanted: Iterable[ShelfLora]) -> None:
        """Takes LoRAs off the device, except those `wanted`, until all together take at most `room` bytes."""
        kept = set(wanted)
        for other in list(self._loaded):
            if self.bytes_of({*self._loaded, *kept}) <= room:
                return
            if other not in kept:
                self._drop(other)

    def load(self, loras: Sequence[Lora], *, in_use: Iterable[ShelfLora] = ()) -> tuple[Lora, ...]:
        """Brings these to the device, and takes others off it except those `in_use` until there is room.

        Answers what is there now: for a file that was replaced before it was read, the new one. Raises InvalidField,
        which names a LoRA that cannot be used; the others then stay.
        """
        there = tuple((lora if lora in self._loaded else self.shelf.newest(lora), scale) for lora, scale in loras)
        kept = {*in_use, *(lora for lora, _ in there)}
        self._drop_outdated(kept)
        for lora, _ in there:
            if lora in self._loaded:
                self._loaded.move_to_end(lora)
                continue
            self.keep_within(self._max_bytes, kept)
            self._add(lora)
        return there

    def use(self, loras: Sequence[Lora]) -> None:
        """Switches to exactly these, which are on the device; none leaves the weights as they are, bit for bit."""
        if tuple(loras) == self._active:
            return
        if loras:
            self._transformer.set_adapters(
                [self._loaded[lora] for lora, _ in loras], weights=[scale for _, scale in loras]
            )
            self._transformer.enable_adapters()
            self._active = tuple(loras)
        else:
            self._switch_off()

    def _add(self, lora: ShelfLora) -> None:
        self._made += 1
        adapter = f"lora_{self._made}"  # peft takes no dots in a name
        try:
            with warnings.catch_warnings(), torch.inference_mode(mode=False), torch.no_grad():
                warnings.filterwarnings("ignore", message=MEANT)
                layers = add_lora(self._transformer, lora.path, adapter=adapter)
        except UnusableModel as error:
            told = str(error).replace(f"the LoRA {lora.path}", f"The LoRA {lora.name!r}")
            raise InvalidField(f"{told}.") from None
        finally:
            self._switch_off()  # peft switches a new one on
        self._loaded[lora] = adapter
        log.info("lora loaded", name=lora.name, layers=layers, loaded=len(self._loaded))

    def _drop_outdated(self, kept: Set[ShelfLora]) -> None:
        """Takes those off the device whose file was replaced; one whose file is gone, or is being written, stays."""
        files = self.shelf.files
        for lora in list(self._loaded):
            if lora not in kept and files.get(lora.name, lora) != lora:
                self._drop(lora)

    def _drop(self, lora: ShelfLora) -> None:
        adapter = self._loaded.pop(lora)
        self.use(())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=MEANT)
            self._transformer.delete_adapters(adapter)
        log.info("lora dropped", name=lora.name, loaded=len(self._loaded))

    def _switch_off(self) -> None:
        self._active = ()
        if getattr(self._transformer, "peft_config", None):
            self._transformer.disable_adapters()
