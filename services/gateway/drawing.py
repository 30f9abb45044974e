"""Pictures of encoded prompts: their parameters, the diffusion service's work on them, and what is kept. Knows no HTTP.

A request for several pictures is as many commissions, drawn at the same time, with seeds counting up.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import structlog

from services.gateway.clients import Embeddings
from services.gateway.commissions import Commission, DiffusionClient, Drawn, Errand, Progress
from services.gateway.node import is_nodes_fault
from services.gateway.pictures import with_parameters
from services.gateway.settings import GatewaySettings
from services.gateway.store import History
from shared.errors import BadUpstream, InvalidField, NotBegun, QueueFull, ServiceError, Unready, UpstreamTimeout
from shared.schemas.diffusion import DiffusionParameters, LoraList
from shared.schemas.fields import MAX_SEED
from shared.schemas.public import GenerateRequest
from shared.tasks import all_of

DRAWN_SEEDS = 2**32  # small enough for every client's number type; a request may name any up to 2**63 - 1
RESTARTS = 2
CALL_TIMEOUT_S = 10.0
NOT_PICTURE = {
    "num_images",
    "priority",
    "timeout_s",
    "preview_every",
    "rewrite",
    "blending",
    "vl_image",
    "vl_references",
}
"""Fields that are not kept with a picture: they say how it is to be made, not which, or are kept in another form."""

T = TypeVar("T")
log = structlog.get_logger(__name__)


class Clock:
    """The time of one request: its deadline, and its stages in the form of the Server-Timing header."""

    def __init__(self, timeout_s: float) -> None:
        self._started = time.perf_counter()
        self._timeout_s = timeout_s
        self.stages: list[str] = []

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self._started

    @property
    def is_over(self) -> bool:
        """The deadline has passed."""
        return self.seconds >= self._timeout_s

    def left_s(self) -> float:
        """Seconds to the deadline. Raises UpstreamTimeout when there are none."""
        if self.is_over:
            raise self.late()
        return self._timeout_s - self.seconds

    def late(self) -> UpstreamTimeout:
        """What is told when the deadline has passed."""
        return UpstreamTimeout(f"The picture was not ready within {self._timeout_s:g} s.")

    def note(self, stage: str, seconds: float) -> None:
        """Writes a stage down."""
        self.stages.append(f"{stage};dur={seconds * 1000:.2f}")

    def split(self) -> "Clock":
        """One that has the same deadline and stages, and writes down its own from now on."""
        clock = Clock(self._timeout_s)
        clock._started, clock.stages = self._started, list(self.stages)
        return clock


@dataclass(frozen=True, slots=True)
class Texts:
    """The embeddings of a prompt and, with guidance, of the negative prompt; those of reference pictures."""

    text: Embeddings
    negative: Embeddings | None
    references: Sequence[Embeddings] = ()


@dataclass(frozen=True, slots=True)
class Generated:
    """A picture, what determined it, and how long each stage took (in the form of the Server-Timing header)."""

    index: int
    png: bytes
    parameters: DiffusionParameters
    seconds: float
    server_timing: str
    history_id: int | None
    prompt: str
    original_prompt: str | None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a prompt comes from that was rewritten: what it was before, and the template that was named."""

    original_prompt: str | None = None
    rewriter: str | None = None


@dataclass(frozen=True, slots=True)
class Happened:
    """Something on the way of the picture of that index."""

    index: int
    progress: Progress


Report = Callable[[Happened | Generated], None]


class Drawing:
    """Has pictures drawn by the diffusion service, if there is one, and keeps them."""

    def __init__(self, settings: GatewaySettings, client: DiffusionClient | None, history: History | None) -> None:
        self._settings = settings
        self._client = client
        self._history = history

    @property
    def client(self) -> DiffusionClient:
        """The diffusion service. Raises Unready when this server has none."""
        if self._client is None:
            raise Unready("This server runs only the encoder (--encoder-only): it makes no pictures.")
        return self._client

    def parameters(self, request: GenerateRequest) -> list[DiffusionParameters]:
        """Of each picture: the request's fields, the server's defaults and a drawn seed where it names none.

        Raises InvalidField for pictures that are larger than this server makes, or whose seeds count too far.
        """
        defaults = self._settings
        count = _or(request.num_images, 1)
        seed = secrets.randbelow(DRAWN_SEEDS) if request.seed is None else request.seed
        if seed > MAX_SEED - (count - 1):
            raise InvalidField(f"'seed' must be at most {MAX_SEED - (count - 1)} for {count} pictures.")
        first = DiffusionParameters(
            width=_or(request.width, defaults.width),
            height=_or(request.height, defaults.height),
            steps=_or(request.steps, defaults.steps),
            seed=seed,
            guidance_scale=_or(request.guidance_scale, defaults.guidance_scale),
            shift=_or(request.shift, defaults.shift),
            long_prompt_mode=_or(request.long_prompt_mode, defaults.long_prompt_mode),
            preview_every=_or(request.preview_every, defaults.preview_every),
            **_given(request, "cfg_normalization", "cfg_truncation", "loras", "priority"),
        )
        pixels = first.width * first.height
        if pixels > defaults.max_pixels:
            raise InvalidField(f"'width' times 'height' must be at most {defaults.max_pixels} pixels, not {pixels}.")
        return [first.model_copy(update={"seed": seed + index}) for index in range(count)]

    async def draw(self, wanted: "Wanted", clock: Clock, report: Report, *, watched: bool) -> None:
        """Draws and keeps all pictures, and reports each when it is there; with `watched` also what happens before.

        Raises a ServiceError; when one picture fails the others are given up.
        """
        try:
            await all_of(
                self._draw_one(wanted, index, clock.split(), report, watched=watched)
                for index in range(len(wanted.parameters))
            )
        except UpstreamTimeout:
            if not clock.is_over:
                raise
            raise clock.late() from None

    async def loras(self) -> LoraList:
        """The LoRAs that requests may name. Raises a ServiceError."""
        return await self.client.loras(timeout_s=CALL_TIMEOUT_S)

    async def cancel(self, request_id: str) -> None:
        """Gives up the pictures of a request that came through another gateway. Raises a ServiceError."""
        await self.client.cancel(request_id, timeout_s=CALL_TIMEOUT_S)

    async def _draw_one(self, wanted: "Wanted", index: int, clock: Clock, report: Report, *, watched: bool) -> None:
        parameters = wanted.parameters[index]
        drawn = await self._drawn(wanted, index, clock, report, watched=watched)
        clock.stages.append(drawn.server_timing)
        again = {**wanted.fields, **parameters.model_dump(mode="json", exclude=NOT_PICTURE)}
        png, seconds = with_parameters(drawn.png, again), clock.seconds
        history_id = await self._keep({**again, **asdict(wanted.origin)}, seconds, png, drawn)
        clock.note("history", clock.seconds - seconds)
        clock.note("total", clock.seconds)
        server_timing = ", ".join(filter(None, clock.stages))
        report(Generated(index, png, parameters, seconds, server_timing, history_id, **wanted.prompts))

    async def _drawn(self, wanted: "Wanted", index: int, clock: Clock, report: Report, *, watched: bool) -> Drawn:
        """The picture. One whose node ended or was lost is begun again, with the same seed, wherever there is room:
        if nothing had been done for it until the time to send it again is up, else `RESTARTS` times at most."""
        end, restarts, errand = clock.seconds + self._settings.resend_timeout_s, RESTARTS, Errand()
        while True:
            left_s = clock.left_s()
            unwatched = {} if watched else {"preview_every": 0}
            parameters = wanted.parameters[index].model_copy(update={"timeout_s": left_s, **unwatched})
            commission = Commission(parameters, wanted.texts.text, wanted.texts.negative, wanted.texts.references)
            try:
                if not watched:
                    return await self.client.generate(commission, timeout_s=left_s, errand=errand)
                return await self._followed(commission, index, left_s, report, errand)
            except QueueFull:
                if not self.client.nodes.has_others(errand.full):
                    raise
            except ServiceError as error:
                restarts -= not isinstance(error, NotBegun)
                if not (errand.sent and is_nodes_fault(error)) or restarts < 0 or clock.seconds > end:
                    raise
                log.info("a picture is begun again", reason=error.detail, restarts_left=restarts)
                await self.client.nodes.until_ready(min(end - clock.seconds, clock.left_s()))

    async def _followed(
        self, commission: Commission, index: int, timeout_s: float, report: Report, errand: Errand
    ) -> Drawn:
        async with aclosing(self.client.follow(commission, timeout_s=timeout_s, errand=errand)) as told:
            async for item in told:
                if isinstance(item, Drawn):
                    return item
                report(Happened(index, item))
        raise BadUpstream("The diffusion service ended its answer before the picture was there.")

    async def _keep(self, again: Mapping[str, Any], seconds: float, png: bytes, drawn: Drawn) -> int | None:
        if self._history is None:
            return None
        entry = {"timestamp": time.time(), **again, "gen_time": round(seconds, 3)}
        return await self._history.add(entry, png, drawn.thumbnail)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request comes to: the parameters of each picture, the texts of all, and the request's fields to keep.

    `origin` is what the history keeps besides and the PNG does not, which makes its picture again without a rewriter.
    """

    parameters: Sequence[DiffusionParameters]
    texts: Texts
    fields: dict[str, Any]
    origin: Origin

    @property
    def prompts(self) -> dict[str, Any]:
        """The prompt that is drawn, and the one before it was rewritten."""
        return {"prompt": self.fields["prompt"], "original_prompt": self.origin.original_prompt}


def _given(request: GenerateRequest, *names: str) -> dict[str, Any]:
    """Those of the fields that the request names."""
    return {name: value for name in names if (value := getattr(request, name)) is not None}


def _or(given: T | None, default: T) -> T:
    return default if given is None else given
