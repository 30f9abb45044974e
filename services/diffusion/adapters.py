"""LoRAs side by side on one DiT, as adapters of peft that are switched between steps and never fused.

Those that were used last stay on the device, as many as its share of memory holds. Knows no request.
"""

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Sequence
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

log = structlog.get_logger(__name__)


class Adapters:
    """The adapters of a DiT, by the names of the LoRAs on the shelf. Used by the device's thread alone."""

    def __init__(self, transformer: Any, shelf: Shelf, max_bytes: int) -> None:
        self.shelf = shelf
        self._transformer = transformer
        self._max_bytes = max_bytes
        self._item_bytes: int = transformer.dtype.itemsize
        self._loaded: OrderedDict[str, tuple[str, tuple[int, int]]] = OrderedDict()  # last used at the end
        self._active: tuple[Lora, ...] = ()
        self._made = 0

    @property
    def loaded(self) -> Sequence[str]:
        """Names of the LoRAs that are on the device, the one that was used last at the end."""
        return list(self._loaded)

    def know(self, choices: Sequence[LoraChoice] | None) -> bool:
        """Whether each name was in the folder when it was last looked through: then choosing reads no files."""
        return {choice.name for choice in choices or ()} <= set(self.shelf.files)

    def choose(self, choices: Sequence[LoraChoice] | None) -> tuple[Lora, ...]:
        """The LoRAs of a picture, known and not too large together. May read files where not all are known.

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
        """What these take on the device."""
        wanted = set(names)
        return self.shelf.bytes_of(wanted, self._item_bytes) if wanted else 0

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
            self._make_room(name, kept)
            self._add(name)

    def use(self, loras: Sequence[Lora]) -> None:
        """Switches to exactly these, which are on the device; none leaves the weights as they are, bit for bit."""
        if tuple(loras) == self._active:
            return
        if loras:
            self._transformer.set_adapters(
                [self._loaded[name][0] for name, _ in loras], weights=[scale for _, scale in loras]
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
        self._loaded[name] = adapter, lora.stamp
        log.info("lora loaded", name=name, layers=layers, loaded=len(self._loaded))

    def _drop_outdated(self, name: str, in_use: Iterable[str]) -> None:
        lora = self.shelf.files.get(name)
        if name in self._loaded and lora is not None and self._loaded[name][1] != lora.stamp and name not in in_use:
            self._drop(name)

    def _make_room(self, name: str, kept: set[str]) -> None:
        for other in list(self._loaded):
            if self.fit([*self._loaded, name]):
                return
            if other not in kept:
                self._drop(other)

    def _drop(self, name: str) -> None:
        adapter, _ = self._loaded.pop(name)
        self.use(())
        self._transformer.delete_adapters(adapter)
        log.info("lora dropped", name=name, loaded=len(self._loaded))

    def _switch_off(self) -> None:
        self._active = ()
        if getattr(self._transformer, "peft_config", None):
            self._transformer.disable_adapters()
