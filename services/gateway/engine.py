"""The gateway's use cases: format a prompt, encode it, make a picture of it. Knows no HTTP and no tensors."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.gateway.clients import Embeddings, Encoder
from services.gateway.commissions import Progress
from services.gateway.drawing import NOT_PICTURE, Clock, Drawing, Generated, Happened, Origin, Report, Texts, Wanted
from services.gateway.files import write_embeddings
from services.gateway.rewriting import Rewriting, answer_of, answers, rewritten_request
from services.gateway.settings import GatewaySettings
from services.gateway.vision import Seen, Vision
from services.gateway.written import RewriteEvent
from shared.chat import Conversation, format_prompt
from shared.errors import Cancelled, InvalidField
from shared.schemas.diffusion import PREVIEW, LoraList
from shared.schemas.public import EncodeRequest, GenerateRequest, PromptRequest
from shared.schemas.rewriter import REWRITTEN, RewriteAnswer, RewriteChoice, RewriteOptions, RewriteRequest
from shared.schemas.vl import DescribeParameters, VlGenerateRequest
from shared.templates import Templates

FEW_UNREAD = 16
"""A client that has so many events to read gets no preview on top."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as the encoder read it, and its embeddings."""

    formatted_prompt: str
    embeddings: Embeddings
    seconds: float


@dataclass(frozen=True, slots=True)
class Saved:
    """Embeddings that lie in a file."""

    path: Path
    encoded: Encoded


class GatewayEngine:
    """Orchestrates the services; holds no state but what is being done."""

    def __init__(
        self,
        settings: GatewaySettings,
        templates: Templates,
        *,
        encoder: Encoder,
        drawing: Drawing,
        rewriting: Rewriting,
        vision: Vision,
    ) -> None:
        self.templates = templates
        self._settings = settings
        self._encoder = encoder
        self._drawing = drawing
        self._works: defaultdict[str, set[asyncio.Task[None]]] = defaultdict(set)
        self._rewriting = rewriting
        self.vision = vision

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

    async def rewrite(self, request: RewriteRequest) -> RewriteAnswer:
        """A longer prompt, or with a picture what is said of it. Raises a ServiceError."""
        if request.image is not None:
            return await self._describe(request, request.image)
        return await self._rewriting.rewrite(request.prompt, request, timeout_s=self._settings.rewrite_timeout_s)

    def follow_rewriting(self, request: RewriteRequest) -> AsyncGenerator[RewriteEvent | RewriteAnswer]:
        """The same as it comes. Closing the generator ends it. Raises a ServiceError."""
        if request.image is not None:
            return self._follow_describing(request, request.image)
        return self._rewriting.follow(request, timeout_s=self._settings.rewrite_timeout_s)

    async def encode(self, request: EncodeRequest) -> Encoded:
        """The embeddings of a prompt. Raises a ServiceError."""
        formatted = self.format(request)
        encoding = await self._encoder.encode(
            [formatted], layer=self._layer(request), timeout_s=self._settings.encode_timeout_s
        )
        return Encoded(formatted, encoding.items[0], encoding.seconds)

    async def generate(
        self, request: GenerateRequest, *, request_id: str | None = None, watched: bool = False
    ) -> AsyncGenerator[Happened | Generated]:
        """The pictures of a prompt, within the deadline of request and settings, in the order in which they are done;
        with `watched` also what happens before. Closing the generator gives them up, as `cancel` with the id does.

        Raises a ServiceError.
        """
        told: asyncio.Queue[Happened | Generated | None] = asyncio.Queue()

        def tell(item: Happened | Generated) -> None:
            is_preview = isinstance(item, Happened) and item.progress.name == PREVIEW
            if not is_preview or told.qsize() < FEW_UNREAD:
                told.put_nowait(item)

        work = asyncio.create_task(self._generate(request, tell, watched=watched))
        work.add_done_callback(lambda _: told.put_nowait(None))
        with self._cancellable(work, request_id):
            try:
                while (item := await told.get()) is not None:
                    yield item
                if work.cancelled():
                    raise Cancelled("The request was cancelled.")
                work.result()
            finally:
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)

    async def cancel(self, request_id: str) -> None:
        """Gives up what is drawn for a request. Raises UnknownName when nothing is, or another ServiceError."""
        works = self._works.get(request_id)
        if not works:
            await self._drawing.cancel(request_id)
        for work in works or ():
            work.cancel()

    async def loras(self) -> LoraList:
        """The LoRAs that requests may name. Raises a ServiceError."""
        return await self._drawing.loras()

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

    async def _generate(self, request: GenerateRequest, report: Report, *, watched: bool) -> None:
        _ = self._drawing.client
        limit_s = self._settings.generate_timeout_s
        clock = Clock(limit_s if request.timeout_s is None else min(limit_s, request.timeout_s))
        formatted, layer, parameters = self.format(request), self._layer(request), self._drawing.parameters(request)
        if request.rewrite is not None:
            self._rewriting.asked(request.prompt, request.rewrite)  # refused before a reference is read
        seen = await self._seen(request, clock)
        origin = Origin()
        if request.rewrite is not None:
            rewritten = await self._rewrite(request.prompt, request.rewrite, clock)
            origin = Origin(request.prompt, request.rewrite.rewriter)
            request = rewritten_request(request, rewritten)
            formatted = self.format(request)
            if watched:
                report(Happened(0, Progress(REWRITTEN, rewritten)))
        texts = [formatted]
        if parameters[0].guidance_scale > 0:
            texts.append(format_prompt(Conversation(prompt=request.negative_prompt or "")))
        encoding = await self._encoder.encode(
            texts, layer=layer, timeout_s=min(self._settings.encode_timeout_s, clock.left_s())
        )
        clock.note("encode", encoding.seconds)
        fields = {**request.model_dump(mode="json", exclude=NOT_PICTURE), "hidden_layer": layer}
        references: tuple[Embeddings, ...] = ()
        if seen is not None:
            references, fields = seen.references, {**fields, **seen.fields}
            parameters = [one.model_copy(update={"blending": seen.blending}) for one in parameters]
        negative = encoding.items[1] if len(texts) > 1 else None
        wanted = Wanted(parameters, Texts(encoding.items[0], negative, references), fields, origin)
        await self._drawing.draw(wanted, clock, report, watched=watched)

    async def _describe(self, request: RewriteRequest, image: str) -> RewriteAnswer:
        started, asked = time.perf_counter(), self._asked_about(request)
        written = await self.vision.describe(image, asked, timeout_s=self._settings.rewrite_timeout_s)
        return answer_of(request.prompt, request, written, started)

    def _follow_describing(self, request: RewriteRequest, image: str) -> AsyncGenerator[RewriteEvent | RewriteAnswer]:
        started, asked = time.perf_counter(), self._asked_about(request)
        written = self.vision.follow_description(image, asked, timeout_s=self._settings.rewrite_timeout_s)
        return answers(written, request, started)

    def _asked_about(self, request: RewriteRequest) -> DescribeParameters:
        """What is asked about the request's picture. Raises UnknownName."""
        return DescribeParameters(
            prompt=request.prompt,
            system_prompt=self._rewriting.system_prompt(request),
            **request.model_dump(include=set(RewriteOptions.model_fields)),
        )

    async def _seen(self, request: GenerateRequest, clock: Clock) -> Seen | None:
        if not isinstance(request, VlGenerateRequest):
            return None
        seen = await self.vision.see(request, clock.left_s)
        clock.note("vision", seen.seconds)
        return seen

    async def _rewrite(self, prompt: str, choice: RewriteChoice, clock: Clock) -> RewriteAnswer:
        timeout_s = min(self._settings.rewrite_timeout_s, clock.left_s())
        rewritten = await self._rewriting.rewrite(prompt, choice, timeout_s=timeout_s)
        clock.note("rewrite", rewritten.gen_time)
        return rewritten

    @contextmanager
    def _cancellable(self, work: "asyncio.Task[None]", request_id: str | None) -> Iterator[None]:
        """Lets `cancel` find the work while it is done."""
        if request_id is None:
            yield
            return
        self._works[request_id].add(work)
        try:
            yield
        finally:
            self._works[request_id].discard(work)
            if not self._works[request_id]:
                del self._works[request_id]

    def _layer(self, request: EncodeRequest) -> int:
        return self._settings.hidden_layer if request.hidden_layer is None else request.hidden_layer
