"""One node: a process that serves, as the gateway knows it. Decides nothing about others."""

import asyncio
from contextlib import suppress
from enum import StrEnum

from shared.client import ServiceClient
from shared.errors import BadUpstream, DeviceFailed, NotBegun, ServiceError, Unreachable, Unready, UpstreamTimeout
from shared.schemas.node import NodeFacts

INTERVAL_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0
PROVEN_AFTER_S = 10.0  # a node that worked for this long after a failure starts again with the first pause
FORGOTTEN_AFTER_S = 60.0  # the model of a node that is away for longer does not count any more
LATE_COUNTS_S = 1.0  # for each request in a row that it was too slow for
MOST_LATE = 5  # more in a row count as so many


class NodeState(StrEnum):
    """What a node is good for."""

    READY = "ready"
    STARTING = "starting"
    UNREACHABLE = "unreachable"
    OTHER_MODEL = "other_model"
    DRAINING = "draining"


class Node:
    """A node's last answer to a probe, its requests, and when it is to be asked again. Made in the event loop."""

    def __init__(self, service: ServiceClient) -> None:
        self.service = service
        self.facts: NodeFacts | None = None
        self.failure: ServiceError | None = None
        self.last_error: ServiceError | None = None
        self.asked = False
        self.lost = False  # it does not answer probes: what hangs there may be moved
        self.leaving = False
        self.in_flight = 0
        self.turn = 0  # grows with each request: of equal nodes the one that had none for longest is next
        self._failures = self._late = 0
        self._asked_at = self._failed_at = self._ready_at = self._late_at = -FORGOTTEN_AFTER_S
        self._at_once = False
        self._woken = asyncio.Event()

    @property
    def load(self) -> int:
        """Its requests; for a while after it was too slow for one more than those: 1, 3, 7, ... for so many in a row.

        Once slow is soon forgiven, or the work would be spread unevenly; a node that hangs is left alone.
        """
        if _now() > self._late_at + LATE_COUNTS_S * self._late:
            return self.in_flight
        return self.in_flight + (1 << self._late) - 1

    @property
    def model(self) -> str | None:
        """The fingerprint of its model; None while that is not known, or is long ago."""
        if self.facts is None or (self.failure is not None and _now() > self._ready_at + FORGOTTEN_AFTER_S):
            return None
        return self.facts.fingerprint

    def state(self, model: str | None) -> NodeState:
        """Its state in a pool whose nodes are to have that model."""
        if self.leaving:
            return NodeState.DRAINING
        if self.failure is not None and not isinstance(self.failure, Unready):
            return NodeState.UNREACHABLE
        if self.failure is not None or self.facts is None:
            return NodeState.STARTING
        return NodeState.READY if self.facts.fingerprint == model else NodeState.OTHER_MODEL

    def answered(self, facts: NodeFacts, began_at: float) -> None:
        """It answered a probe that began at that time; a failure since then counts more."""
        now = _now()
        self.asked, self._asked_at = True, now
        if began_at < self._failed_at:
            return
        self.facts, self.failure, self.lost, self._ready_at = facts, None, False, now
        if now > self._failed_at + PROVEN_AFTER_S:
            self._failures = 0

    def was_silent(self, error: ServiceError) -> None:
        """It did not answer a probe, or not well."""
        self.asked, self._asked_at = True, _now()
        self.lost = not isinstance(error, Unready)
        self._fail(error, counts=self.lost)

    def worked(self) -> None:
        """It answered a request."""
        self._late = 0
        if self.failure is None:
            self._failures = 0

    def was_late(self) -> None:
        """Another node was quicker with a request that was begun here."""
        self._late, self._late_at = min(self._late + 1, MOST_LATE), _now()

    def judge(self, error: ServiceError) -> None:
        """A request to it ended with an error: does that say something about the node?

        Who asks for too much in too little time must not be able to take nodes away from others: after a deadline has
        passed, the node is asked at once, and that answer counts.
        """
        if is_nodes_fault(error):
            self._fail(error, counts=self.failure is None and not isinstance(error, Unready))
        elif isinstance(error, UpstreamTimeout):
            self._at_once = True
        self._woken.set()

    async def until_due(self) -> None:
        """Returns when it is to be asked again."""
        while not self._at_once and (left_s := self._due - _now()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._woken.wait()
            self._woken.clear()
        self._at_once = False

    @property
    def _due(self) -> float:
        if self.failure is None or isinstance(self.failure, Unready):
            return self._asked_at + INTERVAL_S
        return self._failed_at + min(FIRST_PAUSE_S * 2.0 ** (min(self._failures, 16) - 1), LONGEST_PAUSE_S)

    def _fail(self, error: ServiceError, *, counts: bool) -> None:
        self.failure = self.last_error = error
        self._failed_at = _now()
        self._failures += counts


def is_nodes_fault(error: ServiceError) -> bool:
    """Whether the error is about the node that was asked, so that another one may do better."""
    if error.told:
        return isinstance(error, Unready | NotBegun | DeviceFailed)
    return isinstance(error, Unreachable | BadUpstream)


def _now() -> float:
    return asyncio.get_running_loop().time()
