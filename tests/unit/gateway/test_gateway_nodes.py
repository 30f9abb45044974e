"""`services.gateway.nodes` and what is below it: which nodes there are, and which one gets a request."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
import structlog
from inprocess import eventually, nowhere

from services.gateway.node import Node, NodeState
from services.gateway.nodes import GRACE_S, RETRIES, Nodes
from services.gateway.pace import ENOUGH, LEAST_S, MOST_SHARE, SAMPLES, Pace
from shared.client import ServiceClient
from shared.errors import (
    BadUpstream,
    InternalError,
    InvalidField,
    OutOfMemory,
    QueueFull,
    ServiceError,
    Unreachable,
    Unready,
    UpstreamTimeout,
)
from shared.problems import problem_response
from shared.schemas.node import MODEL_PATH, NodeFacts

Handle = Callable[[httpx2.Request], Awaitable[httpx2.Response]]
QUICK = {"INTERVAL_S": 0.01, "FIRST_PAUSE_S": 0.02, "LONGEST_PAUSE_S": 0.08}


class Body(httpx2.AsyncByteStream):
    def __init__(self, content: bytes) -> None:
        self.content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.content


def answer(content: bytes = b"", status: int = 200) -> httpx2.Response:
    return httpx2.Response(status, stream=Body(content))


def refusal(error: ServiceError) -> httpx2.Response:
    problem = problem_response(error, None)
    return httpx2.Response(problem.status_code, headers=dict(problem.headers), stream=Body(bytes(problem.body)))


@dataclass
class Machine:
    """A node that does what the test says; `seen` are its requests but probes."""

    model: str = "a"
    service: str = "encoder"
    probe: Handle | None = None
    work: Handle | None = None
    seen: list[str] = field(default_factory=list)
    probes: int = 0

    async def __call__(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path == MODEL_PATH:
            self.probes += 1
            if self.probe is not None:
                return await self.probe(request)
            facts = NodeFacts(
                service=self.service, version="1", name="m", device="cpu", dtype="float32", fingerprint=self.model
            )
            return answer(facts.model_dump_json().encode())
        self.seen.append(request.url.path)
        return await self.work(request) if self.work is not None else answer(b"done")


async def refuse(_: httpx2.Request) -> httpx2.Response:
    raise httpx2.ConnectError("refused")


async def hang(_: httpx2.Request) -> httpx2.Response:
    await asyncio.Event().wait()
    raise AssertionError


async def break_off(_: httpx2.Request) -> httpx2.Response:
    raise httpx2.ReadError("reset")


def telling(error: ServiceError) -> Handle:
    async def handle(_: httpx2.Request) -> httpx2.Response:
        return refusal(error)

    return handle


@asynccontextmanager
async def pool(
    machines: dict[str, Machine], *, hosts: Sequence[str] | None = None, resolve: Any = nowhere
) -> AsyncIterator[Nodes]:
    """The nodes of the machines, which are known by their hosts' names or addresses."""

    async def handle(request: httpx2.Request) -> httpx2.Response:
        return await machines[request.url.host](request)

    def connect(url: str, address: str | None) -> ServiceClient:
        transport = httpx2.MockTransport(handle)
        return ServiceClient("encoder", url, max_reply_bytes=1 << 20, transport=transport, address=address)

    urls = [f"http://{host}:7861" for host in hosts or machines]
    with structlog.testing.capture_logs():
        async with Nodes("encoder", urls, connect, resolve=resolve) as nodes:
            yield nodes


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QUICK.items():
        monkeypatch.setattr(f"services.gateway.node.{name}", value)
    monkeypatch.setattr("services.gateway.members.LOOKUP_S", 0.01)
    monkeypatch.setattr("services.gateway.members.PROBE_TIMEOUT_S", 0.2)


def three() -> dict[str, Machine]:
    return {f"10.0.0.{number}": Machine() for number in (1, 2, 3)}


async def all_ready(nodes: Nodes, count: int) -> None:
    await eventually(lambda: len(nodes.ready) == count)


async def ask(nodes: Nodes, *, timeout_s: float = 20.0, kind: str = "") -> bytes:
    async def work(service: ServiceClient, left_s: float) -> bytes:
        body = (await service.get("/v1/work", timeout_s=left_s)).body
        if body == b"garbage":
            raise BadUpstream("That is garbage.")
        return body

    return await nodes.ask(work, timeout_s=timeout_s, kind=kind)


def states(nodes: Nodes) -> list[str]:
    return [state.value for _, state in nodes.all]


class TestChoosing:
    async def test_one_after_the_other_they_take_turns(self) -> None:
        machines = three()
        async with pool(machines) as nodes:
            await all_ready(nodes, 3)
            for _ in range(30):
                assert await ask(nodes) == b"done"
        assert [len(machine.seen) for machine in machines.values()] == [10, 10, 10]

    async def test_the_one_with_the_fewest_requests_in_flight(self) -> None:
        machines, gate = three(), asyncio.Event()

        async def wait(_: httpx2.Request) -> httpx2.Response:
            await gate.wait()
            return answer()

        machines["10.0.0.1"].work = wait
        async with pool(machines) as nodes:
            await all_ready(nodes, 3)
            waiting = asyncio.create_task(ask(nodes))
            await eventually(lambda: machines["10.0.0.1"].seen)
            for _ in range(10):
                await ask(nodes)
            assert [len(machine.seen) for machine in machines.values()] == [1, 5, 5]
            assert [node.in_flight for node, _ in nodes.all] == [1, 0, 0]
            gate.set()
            await waiting

    async def test_what_comes_at_once_is_spread_evenly(self) -> None:
        machines, gate = three(), asyncio.Event()

        async def wait(_: httpx2.Request) -> httpx2.Response:
            await gate.wait()
            return answer()

        for machine in machines.values():
            machine.work = wait
        async with pool(machines) as nodes:
            await all_ready(nodes, 3)
            clients = [asyncio.create_task(ask(nodes)) for _ in range(30)]
            await eventually(lambda: sum(len(machine.seen) for machine in machines.values()) == 30)
            assert [node.in_flight for node, _ in nodes.all] == [10, 10, 10]
            gate.set()
            await asyncio.gather(*clients)
        assert [len(machine.seen) for machine in machines.values()] == [10, 10, 10]

    async def test_before_any_has_been_asked_one_is_tried(self) -> None:
        machines = {"10.0.0.1": Machine(probe=hang)}
        async with pool(machines) as nodes:
            assert await ask(nodes) == b"done"

    async def test_nobody_there(self) -> None:
        async with pool({"10.0.0.1": Machine(probe=refuse, work=refuse)}) as nodes:
            await eventually(lambda: states(nodes) == ["unreachable"])
            with pytest.raises(Unreachable, match="cannot be reached"):
                await ask(nodes)

    async def test_one_that_hangs_is_not_there(self) -> None:
        """The request itself has not been waited for: 503, and not 504."""
        async with pool({"10.0.0.1": Machine(probe=hang)}) as nodes:
            await eventually(lambda: states(nodes) == ["unreachable"])
            with pytest.raises(Unreachable, match="did not answer within"):
                await ask(nodes)

    async def test_a_service_that_is_starting_says_so(self) -> None:
        machine = Machine(probe=telling(Unready("Not ready: the model is being loaded.")))
        async with pool({"10.0.0.1": machine}) as nodes:
            await eventually(lambda: machine.probes > 1)
            assert states(nodes) == ["starting"]
            with pytest.raises(Unready, match="being loaded"):
                await ask(nodes)
            machine.probe = None
            await all_ready(nodes, 1)
            assert await ask(nodes) == b"done"

    async def test_a_node_of_another_kind(self) -> None:
        async with pool({"10.0.0.1": Machine(service="diffusion")}) as nodes:
            await eventually(lambda: states(nodes) == ["unreachable"])
            with pytest.raises(BadUpstream, match="of another kind"):
                await ask(nodes)


class TestFailing:
    @pytest.mark.parametrize("fault", [refuse, break_off, telling(Unready("Not ready: the service is stopping."))])
    async def test_it_goes_out_at_once_and_another_one_answers(self, fault: Handle) -> None:
        machines = three()
        async with pool(machines) as nodes:
            await all_ready(nodes, 3)
            machines["10.0.0.2"].work = machines["10.0.0.2"].probe = fault
            for _ in range(30):
                assert await ask(nodes) == b"done"
            assert len(machines["10.0.0.2"].seen) <= 1
            assert len(nodes.ready) == 2
            machines["10.0.0.2"].work = machines["10.0.0.2"].probe = None
            await all_ready(nodes, 3)

    async def test_garbage_takes_it_out_for_growing_pauses_though_its_probes_are_well(self) -> None:
        machines = three()

        async def garbage(_: httpx2.Request) -> httpx2.Response:
            return answer(b"garbage")

        machines["10.0.0.2"].work = garbage
        async with pool(machines) as nodes:
            await all_ready(nodes, 3)
            node = nodes.all[1][0]
            for failures in range(1, 4):
                await eventually(lambda: node in nodes.ready)
                while node in nodes.ready:
                    assert await ask(nodes) == b"done"
                assert node._failures == failures
            assert node.last_error is not None

    async def test_no_more_than_two_others_are_asked(self) -> None:
        machines = {f"10.0.0.{number}": Machine(work=break_off) for number in range(1, 6)}
        async with pool(machines) as nodes:
            await all_ready(nodes, 5)
            with pytest.raises(Unreachable):
                await ask(nodes)
            assert sum(len(machine.seen) for machine in machines.values()) == 1 + RETRIES

    @pytest.mark.parametrize("error", [InvalidField("'input' is required."), UpstreamTimeout("Too late.")])
    async def test_what_is_the_requests_own_fault_is_not_asked_again(self, error: ServiceError) -> None:
        machines = three()
        async with pool(machines) as nodes:
            await all_ready(nodes, 3)
            for machine in machines.values():
                machine.work = telling(error)
            with pytest.raises(type(error), match=error.detail):
                await ask(nodes)
            assert sum(len(machine.seen) for machine in machines.values()) == 1
            assert len(nodes.ready) == 3

    async def test_a_full_queue_is_no_failure_and_another_one_may_have_room(self) -> None:
        machines = three()
        full = telling(QueueFull("3 texts are waiting already.", retry_after_s=1))
        machines["10.0.0.1"].work = machines["10.0.0.2"].work = full
        async with pool(machines) as nodes:
            await all_ready(nodes, 3)
            for _ in range(6):
                assert await ask(nodes) == b"done"
            assert len(nodes.ready) == 3
            machines["10.0.0.3"].work = full
            with pytest.raises(QueueFull, match="are waiting"):
                await ask(nodes)

    async def test_a_deadline_that_is_too_short_takes_no_node_from_others(self) -> None:
        machines = three()
        async with pool(machines) as nodes:
            await all_ready(nodes, 3)
            for machine in machines.values():
                machine.work = hang
            with pytest.raises(UpstreamTimeout, match=r"did not answer within 0\.05 s"):
                await ask(nodes, timeout_s=0.05)
            assert len(nodes.ready) == 3

    async def test_the_last_node_that_went_away_is_waited_for(self) -> None:
        machine = Machine()
        async with pool({"10.0.0.1": machine}) as nodes:
            await all_ready(nodes, 1)
            machine.probe = machine.work = refuse
            waiting = asyncio.create_task(ask(nodes))
            await eventually(lambda: not nodes.ready)
            machine.probe = machine.work = None
            assert await waiting == b"done"

    async def test_it_is_not_waited_for_beyond_the_deadline(self) -> None:
        machines = {"10.0.0.1": Machine()}
        async with pool(machines) as nodes:
            await all_ready(nodes, 1)
            machines["10.0.0.1"].probe = machines["10.0.0.1"].work = refuse
            clock = asyncio.get_running_loop().time
            began = clock()
            with pytest.raises(ServiceError):
                await ask(nodes, timeout_s=0.2)
            assert clock() - began < GRACE_S

    async def test_a_probe_that_breaks_is_asked_again(self) -> None:
        machine, broken = Machine(), [ZeroDivisionError(), ZeroDivisionError()]

        async def defect(_: httpx2.Request) -> httpx2.Response:
            machine.probe = defect if broken else None
            raise broken.pop()

        machine.probe = defect
        async with pool({"10.0.0.1": machine}) as nodes:
            await all_ready(nodes, 1)


class TestLosing:
    async def test_what_hangs_at_a_silent_node_is_moved(self) -> None:
        machines = three()
        async with pool(machines) as nodes:
            await all_ready(nodes, 3)
            machines["10.0.0.1"].work = machines["10.0.0.1"].probe = hang
            answers = await asyncio.gather(*(ask(nodes) for _ in range(6)))
            assert answers == [b"done"] * 6
            assert machines["10.0.0.1"].seen
            assert states(nodes)[0] == "unreachable"

    async def test_where_there_is_no_other_it_is_waited_for(self) -> None:
        machine, gate = Machine(), asyncio.Event()

        async def wait(_: httpx2.Request) -> httpx2.Response:
            await gate.wait()
            return answer(b"late")

        async with pool({"10.0.0.1": machine}) as nodes:
            await all_ready(nodes, 1)
            machine.work, machine.probe = wait, hang
            waiting = asyncio.create_task(ask(nodes))
            await eventually(lambda: states(nodes) == ["unreachable"])
            gate.set()
            assert await waiting == b"late"

    async def test_a_lease_ends_where_its_node_is_lost(self) -> None:
        machines = three()
        async with pool(machines) as nodes:
            await all_ready(nodes, 3)
            with pytest.raises(Unreachable, match="stopped answering"):
                async with nodes.lease() as node:
                    machines[httpx2.URL(node.service.base_url).host].probe = hang
                    await asyncio.Event().wait()
            assert node not in nodes.ready
            assert node.in_flight == 0

    async def test_one_that_cannot_be_moved_stays(self) -> None:
        machines = three()
        async with pool(machines) as nodes:
            await all_ready(nodes, 3)
            async with nodes.lease(movable=False) as node:
                machines[httpx2.URL(node.service.base_url).host].probe = hang
                await eventually(lambda: node not in nodes.ready)


class TestSlowness:
    async def test_another_node_is_asked_too_and_the_slow_one_spared(self) -> None:
        machines = three()
        async with pool(machines) as nodes:
            await all_ready(nodes, 3)
            for _ in range(3 * ENOUGH):
                await ask(nodes, kind="encode")
            machines["10.0.0.1"].work = hang
            before = len(machines["10.0.0.1"].seen)
            for _ in range(30):
                assert await ask(nodes, kind="encode") == b"done"
            assert len(machines["10.0.0.1"].seen) - before == 1
            node = nodes.all[0][0]
            assert (node.in_flight, node.load) == (0, 1)
            assert len(nodes.ready) == 3

    async def test_it_is_spared_also_where_the_others_have_much_to_do(self) -> None:
        async def busy(_: httpx2.Request) -> httpx2.Response:
            await asyncio.sleep(0.01)
            return answer(b"done")

        machines = three()
        async with pool(machines) as nodes:
            await all_ready(nodes, 3)
            for machine in machines.values():
                machine.work = busy
            for _ in range(ENOUGH):
                await ask(nodes, kind="encode")
            machines["10.0.0.1"].work = hang
            before = len(machines["10.0.0.1"].seen)

            async def client() -> None:
                for _ in range(25):
                    await ask(nodes, kind="encode")

            await asyncio.gather(*(client() for _ in range(4)))
            assert len(machines["10.0.0.1"].seen) - before <= 4

    @pytest.mark.parametrize("error", [QueueFull("Full."), OutOfMemory("Full."), InternalError("Broken.")])
    async def test_one_that_fails_ends_nothing_while_a_slow_one_is_at_work(self, error: ServiceError) -> None:
        begun, finish = asyncio.Event(), asyncio.Event()

        async def slow(_: httpx2.Request) -> httpx2.Response:
            begun.set()
            await finish.wait()
            return answer(b"late")

        async def fail(_: httpx2.Request) -> httpx2.Response:
            asyncio.get_running_loop().call_later(0.05, finish.set)
            return refusal(error)

        machines = {host: machine for host, machine in three().items() if host != "10.0.0.3"}
        async with pool(machines) as nodes:
            await all_ready(nodes, 2)
            for _ in range(2 * ENOUGH):
                await ask(nodes, kind="encode")
            machines["10.0.0.1"].work, machines["10.0.0.2"].work = slow, fail
            waiting = asyncio.create_task(ask(nodes, kind="encode"))
            if not begun.is_set():  # the first one asked may be the one that fails
                nodes.all[1][0].turn = 10**9
            assert await asyncio.wait_for(waiting, 20) == b"late"

    async def test_work_that_takes_as_long_as_it_takes_is_not_done_twice(self) -> None:
        async def slow(_: httpx2.Request) -> httpx2.Response:
            await asyncio.sleep(0.3)
            return answer(b"late")

        machines = three()
        async with pool(machines) as nodes:
            await all_ready(nodes, 3)
            for _ in range(3 * ENOUGH):
                await ask(nodes)
            before = sum(len(machine.seen) for machine in machines.values())
            for machine in machines.values():
                machine.work = slow
            assert await ask(nodes) == b"late"
            assert sum(len(machine.seen) for machine in machines.values()) == before + 1

    def test_patience_is_what_most_take_twice(self) -> None:
        pace = Pace()
        for number in range(ENOUGH):
            assert pace.patience_s() is None
            pace.note(1.0 + number / 1000, doubled=False)
        assert pace.patience_s() == pytest.approx(2.0, abs=0.1)

    def test_there_is_a_least_patience(self) -> None:
        pace = Pace()
        for _ in range(SAMPLES):
            pace.note(0.001, doubled=False)
        assert pace.patience_s() == LEAST_S

    def test_few_are_asked_for_twice(self) -> None:
        pace = Pace()
        for number in range(SAMPLES):
            pace.note(1.0, doubled=number <= MOST_SHARE * SAMPLES)
        assert pace.patience_s() is None


class TestModels:
    async def test_most_nodes_decide(self) -> None:
        machines = {"10.0.0.1": Machine("b"), "10.0.0.2": Machine("a"), "10.0.0.3": Machine("a")}
        async with pool(machines) as nodes:
            await eventually(lambda: states(nodes) == ["other_model", "ready", "ready"])
            assert nodes.model == "a"
            machines["10.0.0.1"].seen.clear()
            for _ in range(10):
                await ask(nodes)
            assert machines["10.0.0.1"].seen == []

    async def test_of_equally_many_it_stays_with_the_one_so_far(self) -> None:
        machines = {"10.0.0.1": Machine("a"), "10.0.0.2": Machine("a")}
        async with pool(machines) as nodes:
            await all_ready(nodes, 2)
            machines["10.0.0.1"].model = "b"
            await eventually(lambda: states(nodes) == ["other_model", "ready"])
            machines["10.0.0.2"].model = "b"
            await all_ready(nodes, 2)
            assert nodes.model == "b"

    async def test_a_node_that_is_away_for_a_moment_still_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machines = {"10.0.0.1": Machine("a"), "10.0.0.2": Machine("a"), "10.0.0.3": Machine("b")}
        async with pool(machines) as nodes:
            await eventually(lambda: states(nodes) == ["ready", "ready", "other_model"])
            machines["10.0.0.1"].probe = machines["10.0.0.2"].probe = refuse
            await eventually(lambda: states(nodes) == ["unreachable", "unreachable", "other_model"])
            assert nodes.model == "a"
            monkeypatch.setattr("services.gateway.node.FORGOTTEN_AFTER_S", 0.0)
            await eventually(lambda: nodes.model == "b")
            assert states(nodes)[2] == "ready"


class Names:
    """A lookup that the test changes."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        assert (host, port) == ("encoders", 7861)
        if not self.addresses:
            raise OSError("no such host")
        return self.addresses


class TestNames:
    async def test_each_address_of_a_name_is_a_node(self) -> None:
        machines, hosts = three(), []

        async def note(request: httpx2.Request) -> httpx2.Response:
            hosts.append(request.headers["host"])
            return answer()

        for machine in machines.values():
            machine.work = note
        async with pool(machines, hosts=["encoders"], resolve=Names(*machines)) as nodes:
            await all_ready(nodes, 3)
            await ask(nodes)
            urls = [node.service.base_url for node, state in nodes.all if state is NodeState.READY]
        assert urls == [f"http://{address}:7861" for address in machines]
        assert hosts == ["encoders:7861"]

    async def test_nodes_come_and_go(self) -> None:
        machines, names = three(), Names("10.0.0.1")
        async with pool(machines, hosts=["encoders"], resolve=names) as nodes:
            await all_ready(nodes, 1)
            names.addresses = ("10.0.0.1", "10.0.0.2", "10.0.0.3")
            await all_ready(nodes, 3)
            names.addresses = ("10.0.0.2",)
            await eventually(lambda: [node.service.base_url for node, _ in nodes.all] == ["http://10.0.0.2:7861"])

    async def test_one_that_goes_finishes_what_it_has(self) -> None:
        machines, names, gate = three(), Names("10.0.0.1"), asyncio.Event()

        async def wait(_: httpx2.Request) -> httpx2.Response:
            await gate.wait()
            return answer(b"finished")

        machines["10.0.0.1"].work = wait
        async with pool(machines, hosts=["encoders"], resolve=names) as nodes:
            await all_ready(nodes, 1)
            waiting = asyncio.create_task(ask(nodes))
            await eventually(lambda: machines["10.0.0.1"].seen)
            names.addresses = ("10.0.0.2",)
            await eventually(lambda: [node.service.base_url for node in nodes.ready] == ["http://10.0.0.2:7861"])
            assert await ask(nodes) == b"done"
            gate.set()
            assert await waiting == b"finished"
            await eventually(lambda: states(nodes) == ["ready"])

    async def test_while_names_cannot_be_looked_up_the_nodes_stay(self) -> None:
        machines, names = three(), Names("10.0.0.1")
        async with pool(machines, hosts=["encoders"], resolve=names) as nodes:
            await all_ready(nodes, 1)
            names.addresses = ()
            await asyncio.sleep(0.05)
            assert await ask(nodes) == b"done"
            names.addresses = ("10.0.0.2",)
            await eventually(lambda: [node.service.base_url for node, _ in nodes.all] == ["http://10.0.0.2:7861"])

    async def test_a_lookup_that_hangs_is_the_only_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("services.gateway.lookup.LOOKUP_TIMEOUT_S", 0.01)
        begun = []

        async def resolve(host: str, port: int) -> Sequence[str]:
            begun.append(host)
            await asyncio.Event().wait()
            return ()

        async with pool({"encoders": Machine()}, resolve=resolve) as nodes:
            await all_ready(nodes, 1)
            await asyncio.sleep(0.1)
            assert await ask(nodes) == b"done"
        assert begun == ["encoders"]

    async def test_lookups_that_hang_keep_no_thread_from_requests(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from services.gateway.lookup import resolve

        gate = threading.Event()
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: gate.wait(30) and [])
        lookups = [asyncio.create_task(resolve(f"node{number}", 1)) for number in range(64)]
        try:
            async with asyncio.timeout(20):
                assert await asyncio.to_thread(sum, (1, 2)) == 3
            assert not any(lookup.done() for lookup in lookups)
        finally:
            gate.set()
            await asyncio.gather(*lookups, return_exceptions=True)

    async def test_localhost(self) -> None:
        from services.gateway.lookup import Host, resolve

        host = Host("http://localhost:7861", resolve)
        assert host.is_name
        assert await host.look_up()
        assert host.addresses in (("127.0.0.1",), ("::1",))
        assert not Host("http://127.0.0.1:7861", resolve).is_name
        assert not Host("http://[::1]:7861", resolve).is_name


def test_a_node_that_was_not_asked_is_starting() -> None:
    node = Node(ServiceClient("encoder", "http://10.0.0.1", max_reply_bytes=1))
    assert node.state(None) is NodeState.STARTING
    assert node.model is None


@pytest.fixture(autouse=True)
def no_logs() -> Iterator[None]:
    with structlog.testing.capture_logs():
        yield
