"""The gateway's use cases: format a prompt, encode it, make a picture of it. Knows no HTTP and no tensors."""

import asyncio
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from services.gateway.clients import DiffusionClient, Embeddings, Encoder, thumbnail_of
from services.gateway.files import write_embeddings
from services.gateway.pictures import with_parameters
from services.gateway.settings import GatewaySettings
from services.gateway.store import History
from shared.chat import UNCONDITIONAL, format_prompt
from shared.client import Reply
from shared.errors import InvalidField, Unready, UpstreamTimeout
from shared.schemas.diffusion import DiffusionParameters
from shared.schemas.public import EncodeRequest, GenerateRequest, PromptRequest
from shared.templates import Templates

T = TypeVar("T")
DRAWN_SEEDS = 2**32  # small enough for every client's number type; a request may name any up to 2**63 - 1


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as the encoder read it, and its embeddings."""

    formatted_prompt: str
    embeddings: Embeddings
    seconds: float


@dataclass(frozen=True, slots=True)
class Generated:
    """A picture, what determined it, and how long each stage took (in the form of the Server-Timing header)."""

    png: bytes
    parameters: DiffusionParameters
    seconds: float
    server_timing: str
    history_id: int | None


@dataclass(frozen=True, slots=True)
class Saved:
    """Embeddings that lie in a file."""

    path: Path
    encoded: Encoded


class _Clock:
    """The time of one request: its deadline, and its stages in the form of the Server-Timing header."""

    def __init__(self, timeout_s: float) -> None:
        self._started = time.perf_counter()
        self._timeout_s = timeout_s
        self.stages: list[str] = []

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def left_s(self) -> float:
        """Seconds to the deadline. Raises UpstreamTimeout when there are none."""
        left_s = self._timeout_s - self.seconds
        if left_s <= 0:
            raise UpstreamTimeout(f"The picture was not ready within {self._timeout_s:g} s.")
        return left_s

    def note(self, stage: str, seconds: float) -> None:
        self.stages.append(f"{stage};dur={seconds * 1000:.2f}")


class GatewayEngine:
    """Orchestrates the services for one request at a time; holds no state of its own."""

    def __init__(
        self,
        settings: GatewaySettings,
        templates: Templates,
        *,
        encoder: Encoder,
        diffusion: DiffusionClient | None = None,
        history: History | None = None,
    ) -> None:
        self.templates = templates
        self._settings = settings
        self._encoder = encoder
        self._diffusion = diffusion
        self._history = history

    def format(self, request: PromptRequest) -> str:
        """The text that the encoder will read. Raises UnknownName, InvalidField."""
        conversation = request.conversation()
        if request.template is not None:
            conversation = self.templates.picture(request.template).fill(conversation)
        if not conversation.user_text.strip():
            raise InvalidField("'prompt' must not be empty once 'strip_quotes' has removed its quotes.")
        return format_prompt(conversation)

    async def count_tokens(self, formatted_prompt: str) -> int:
        """How many tokens the encoder makes of the text. Raises a ServiceError."""
        return await self._encoder.count_tokens(formatted_prompt, timeout_s=self._settings.encode_timeout_s)

    async def encode(self, request: EncodeRequest) -> Encoded:
        """The embeddings of a prompt. Raises a ServiceError."""
        formatted = self.format(request)
        encoding = await self._encoder.encode(
            [formatted], layer=self._layer(request), timeout_s=self._settings.encode_timeout_s
        )
        return Encoded(formatted, encoding.items[0], encoding.seconds)

    async def generate(self, request: GenerateRequest) -> Generated:
        """A picture of a prompt, within the deadline that the settings name. Raises a ServiceError."""
        if self._diffusion is None:
            raise Unready("This server runs only the encoder (--encoder-only): it makes no pictures.")
        clock = _Clock(self._settings.generate_timeout_s)
        formatted, layer, parameters = self.format(request), self._layer(request), self.parameters(request)
        texts = [formatted, UNCONDITIONAL] if parameters.guidance_scale > 0 else [formatted]
        encoding = await self._encoder.encode(
            texts, layer=layer, timeout_s=min(self._settings.encode_timeout_s, clock.left_s())
        )
        clock.note("encode", encoding.seconds)
        text, negative = encoding.items[0], (encoding.items[1] if len(texts) > 1 else None)
        reply = await self._diffusion.generate(parameters, text, negative, timeout_s=clock.left_s())
        clock.stages.append(reply.headers.get("server-timing", ""))
        again = {**request.model_dump(mode="json"), **parameters.model_dump(mode="json"), "hidden_layer": layer}
        png, seconds = with_parameters(reply.body, again), clock.seconds
        history_id = await self._keep(again, seconds, png, reply)
        clock.note("history", clock.seconds - seconds)
        clock.note("total", clock.seconds)
        return Generated(png, parameters, seconds, ", ".join(filter(None, clock.stages)), history_id)

    def parameters(self, request: GenerateRequest) -> DiffusionParameters:
        """The request's parameters with the server's defaults and a drawn seed where it names none.

        Raises InvalidField for a picture that is larger than this server makes.
        """
        defaults = self._settings
        parameters = DiffusionParameters(
            width=_or(request.width, defaults.width),
            height=_or(request.height, defaults.height),
            steps=_or(request.steps, defaults.steps),
            seed=secrets.randbelow(DRAWN_SEEDS) if request.seed is None else request.seed,
            guidance_scale=_or(request.guidance_scale, defaults.guidance_scale),
            shift=_or(request.shift, defaults.shift),
            long_prompt_mode=_or(request.long_prompt_mode, defaults.long_prompt_mode),
        )
        pixels = parameters.width * parameters.height
        if pixels > defaults.max_pixels:
            raise InvalidField(f"'width' times 'height' must be at most {defaults.max_pixels} pixels, not {pixels}.")
        return parameters

    async def save_embeddings(self, request: EncodeRequest) -> Saved:
        """Writes the embeddings of a prompt to a file of the data directory. Raises a ServiceError."""
        encoded = await self.encode(request)
        path = await asyncio.to_thread(
            write_embeddings,
            self._settings.data_dir / "embeddings",
            encoded.embeddings,
            {"formatted_prompt": encoded.formatted_prompt, "hidden_layer": str(self._layer(request))},
        )
        return Saved(path, encoded)

    async def _keep(self, again: dict[str, Any], seconds: float, png: bytes, reply: Reply) -> int | None:
        if self._history is None:
            return None
        entry = {"timestamp": time.time(), **again, "gen_time": round(seconds, 3)}
        return await self._history.add(entry, png, thumbnail_of(reply))

    def _layer(self, request: EncodeRequest) -> int:
        return _or(request.hidden_layer, self._settings.hidden_layer)


def _or(given: T | None, default: T) -> T:
    return default if given is None else given
