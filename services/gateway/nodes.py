"""Which node of a service a request goes to, and what becomes of it when that node fails, is lost or is slow."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from services.gateway.lookup import Resolve, resolve
from services.gateway.members import Connect, Members, Probe
from services.gateway.node import Node, NodeState, is_nodes_fault
from services.gateway.pace import Pace
from shared.client import ServiceClient
from shared.errors import QueueFull, ServiceError, Unreachable, UpstreamTimeout

GRACE_S = 3.0  # a request waits for so long after the last node went away: most are back soon, or others are
RETRIES = 2

T = TypeVar("T")
Work = Callable[[ServiceClient, float], Awaitable[T]]
"""A request to a node and the reading of its answer, within so many seconds. Raises a ServiceError."""


class Nodes(Members):
    """The nodes of one service, and the requests that they have."""

    def __init__(
        self,
        name: str,
        urls: Sequence[str],
        connect: Connect,
        *,
        probe: Probe | None = None,
        resolve: Resolve = resolve,
    ) -> None:
        super().__init__(name, urls, connect, probe=probe, resolve=resolve)
        self._paces: dict[str, Pace] = {}
        self._turns = 0

    async def ask(self, work: Work[T], *, timeout_s: float, kind: str = "") -> T:
        """The answer of a request that may be asked for again without harm: on another node where one fails, is lost,
        or has no room, at most `RETRIES` times. Requests of one `kind` take about as long as one another: where one
        takes much longer, another node is asked too, and the first answer counts. Those without a kind are left alone.

        Raises a ServiceError.
        """
        end = _now() + timeout_s
        try:
            if len(self._nodes) == 1:
                return await self._ask_in_turn(work, end)
            return await self._ask_together(work, end, self._paces.setdefault(kind, Pace()) if kind else None)
        except UpstreamTimeout as error:
            late = UpstreamTimeout(f"The {self.name} service did not answer within {timeout_s:g} s.")
            raise (error if error.told else late) from None

    async def ask_all(self, work: Work[T], *, timeout_s: float) -> list[T | ServiceError]:
        """The answers of all nodes that can be reached, in no order. Raises a ServiceError when there are none."""

        async def one(node: Node) -> T | ServiceError:
            try:
                return await work(node.service, timeout_s)
            except ServiceError as error:
                return error

        away = (NodeState.UNREACHABLE,)
        nodes = [node for node, state in self.all if state not in away] or self._usable()
        if not nodes:
            raise self._away()
        return list(await asyncio.gather(*map(one, nodes)))

    @asynccontextmanager
    async def lease(
        self, *, movable: bool = True, avoiding: Collection[Node] = (), timeout_s: float = GRACE_S
    ) -> AsyncIterator[Node]:
        """The node for a request, which counts as in flight there meanwhile; one of `avoiding` only without another.
        Where none is ready one is waited for, `timeout_s` seconds at most.

        What is raised within is judged. Where the node is lost while another is ready, a `movable` request ends there
        with Unreachable. Raises a ServiceError when no node can work.
        """
        node = await self._choose(avoiding, _now() + timeout_s)
        node.in_flight += 1
        try:
            async with self._ended_when_lost(node) if movable else nullcontext():
                yield node
        except ServiceError as error:
            node.judge(error)
            self._review()
            raise
        else:
            node.worked()
        finally:
            node.in_flight -= 1

    def has_others(self, than: Collection[Node]) -> bool:
        """Whether another node than these can work."""
        return any(node not in than for node in self.ready)

    async def _ask_in_turn(self, work: Work[T], end: float) -> T:
        for attempt in range(1 + RETRIES):
            try:
                return (await self._attempt(work, end, _Race()))[0]
            except ServiceError as error:
                if attempt == RETRIES or not is_nodes_fault(error):
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def _ask_together(self, work: Work[T], end: float, pace: Pace | None) -> T:
        race = _Race()
        running: set[asyncio.Task[tuple[T, float]]] = set()
        try:
            for attempt in range(1 + RETRIES):
                running.add(asyncio.create_task(self._attempt(work, end, race)))
                answer = await self._first_answer(running, race, pace, last=attempt == RETRIES)
                if answer is not None:
                    return answer[0]
            assert race.failure is not None  # noqa: S101 - each attempt has failed
            raise race.failure
        finally:
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)

    async def _first_answer(
        self, running: set[asyncio.Task[tuple[T, float]]], race: "_Race", pace: Pace | None, *, last: bool
    ) -> tuple[T, float] | None:
        """What the first of the attempts answers that does; None once another attempt should begin.

        A node that has no room or no answer ends nothing while another one is at work.
        """
        while running:
            patience_s = None if last or pace is None else pace.patience_s()
            again = False
            done, _ = await asyncio.wait(running, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            running -= done
            for task in done:
                race.failure = task.exception()
                if race.failure is None:
                    race.won = True
                    if pace is not None:
                        pace.note(task.result()[1], doubled=bool(running))
                    return task.result()
                better = self._may_be_better(race.failure, race.tried)
                if not better and (not running or _is_final(race.failure)):
                    raise race.failure
                again |= better
            if not last and (again or (not done and self.has_others(race.tried))):
                return None
        return None

    async def _attempt(self, work: Work[T], end: float, race: "_Race") -> tuple[T, float]:
        """The answer of one node, and the seconds that it took."""
        async with self.lease(avoiding=race.tried, timeout_s=end - _now()) as node:
            race.tried.add(node)
            started = _now()
            try:
                return await work(node.service, max(0.001, end - started)), _now() - started
            except asyncio.CancelledError:
                if race.won:
                    node.was_late()
                raise

    def _may_be_better(self, error: BaseException, tried: Collection[Node]) -> bool:
        """Whether another attempt may do better."""
        if isinstance(error, QueueFull):
            return self.has_others(tried)
        return isinstance(error, ServiceError) and is_nodes_fault(error)

    async def _choose(self, avoiding: Collection[Node], end: float) -> Node:
        """The node with the least to do; of equal ones the one that had nothing for longest. Raises a ServiceError."""
        while not (usable := self._usable()):
            left_s = min(self._last_ready_at + GRACE_S, end) - _now()
            if left_s <= 0:
                raise self._away()
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._changed.wait()
        others = [node for node in usable if node not in avoiding]
        chosen = min(others or usable, key=lambda node: (node.load, node.turn))
        self._turns += 1
        chosen.turn = self._turns
        return chosen

    @asynccontextmanager
    async def _ended_when_lost(self, node: Node) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(None) as scope:
                self._movable[scope] = node
                try:
                    yield
                finally:
                    self._movable.pop(scope, None)
        except TimeoutError:
            if not scope.expired():
                raise
            raise Unreachable(f"The {self.name} service stopped answering.", retry_after_s=2) from None


@dataclass(slots=True)
class _Race:
    """The nodes that one request was sent to, the last failure, and whether one of them has answered it."""

    tried: set[Node] = field(default_factory=set)
    failure: BaseException | None = None
    won: bool = False


def _is_final(error: BaseException) -> bool:
    """Whether every node would answer so: the request is at fault."""
    return not isinstance(error, ServiceError) or (error.status < 500 and not isinstance(error, QueueFull))


def _now() -> float:
    return asyncio.get_running_loop().time()
