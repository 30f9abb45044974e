"""History on a real Valkey server, the one that `zimage serve` embeds."""

import asyncio
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from embedded_redis import embedded_redis, end, start_guard, start_redis
from inprocess import eventually
from servers import wait_until

from services.gateway.store import Bounds, History
from shared.errors import QueueFull, UnknownName, Unreachable
from zimage import redis_server

pytestmark = pytest.mark.slow
PLENTY = Bounds(max_entries=1000, max_bytes=1 << 30)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a running server."""
    with embedded_redis(tmp_path_factory.mktemp("redis")) as redis:
        yield redis.url


@pytest.fixture
async def history(url: str) -> AsyncIterator[History]:
    """An empty history."""
    async with History(url, PLENTY) as history:
        await history.clear()
        yield history


async def rows(history: History, **arguments: object) -> list[tuple[dict[str, object], bytes | None]]:
    """What `entries` yields."""
    return [row async for row in history.entries(**arguments)]


async def test_entries_come_back_oldest_first_with_what_was_asked_for(history: History) -> None:
    ids = [await history.add({"prompt": f"p{n}"}, b"png%d" % n, b"jpg%d" % n) for n in range(40)]
    assert ids == sorted(set(ids))
    assert [(entry["id"], entry["prompt"], picture) for entry, picture in await rows(history)] == [
        (number, f"p{n}", None) for n, number in enumerate(ids)
    ]
    assert await rows(history, offset=2, limit=2, images="full") == [
        ({"id": ids[2], "prompt": "p2"}, b"png2"),
        ({"id": ids[3], "prompt": "p3"}, b"png3"),
    ]
    assert [picture for _, picture in await rows(history, offset=39, images="thumb")] == [b"jpg39"]
    assert await rows(history, limit=0) == []
    assert await rows(history, offset=99) == []
    assert await history.count() == 40


async def test_delete_takes_the_entry_at_its_place_and_ids_never_repeat(history: History) -> None:
    ids = [await history.add({"n": n}, b"png", b"") for n in range(3)]
    deleted = await history.delete(1)
    assert deleted.entry == {"id": ids[1], "n": 1}
    assert deleted.remaining == 2
    with pytest.raises(UnknownName):
        await history.image(ids[1] or 0)
    for index in (2, -1, 2**53, 2**63, -(2**70)):
        with pytest.raises(UnknownName):
            await history.delete(index)
    assert await history.clear() == 2
    fresh = await history.add({"n": 3}, b"png", b"")
    assert fresh is not None
    assert fresh > max(number or 0 for number in ids)


async def test_a_full_history_moves_its_indices_and_an_id_keeps_others_from_being_deleted(url: str) -> None:
    async with History(url, Bounds(max_entries=3, max_bytes=1 << 20)) as history:
        await history.clear()
        ids = [await history.add({"n": n}, b"png", b"") for n in range(3)]
        await history.add({"n": 3}, b"png", b"")  # the oldest goes: what was at 1 is at 0
        with pytest.raises(UnknownName, match="id"):
            await history.delete(1, ids[1])
        assert await history.count() == 3
        assert (await history.delete(0, ids[1])).entry["n"] == 1
        assert (await history.delete(0)).entry["n"] == 2


async def test_listings_with_whole_pictures_are_few_at_a_time(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.store.MAX_READERS", 2)
    for n in range(3):
        await history.add({"n": n}, b"png", b"jpg")
    listings = [history.entries(images="full") for _ in range(3)]
    for listing in listings[:2]:
        await anext(listing)
    with pytest.raises(QueueFull, match="images=thumb"):
        await anext(listings[2])
    assert len(await rows(history, images="thumb")) == 3
    await listings[0].aclose()
    assert len(await rows(history, images="full")) == 3
    assert len([row async for row in listings[1]]) == 2
    assert len(await rows(history, images="full")) == 3


async def test_concurrent_deletes_of_one_index_remove_different_entries(history: History) -> None:
    for n in range(10):
        await history.add({"n": n}, b"png", b"")
    deleted = await asyncio.gather(*(history.delete(0) for _ in range(10)))
    assert sorted(item.entry["n"] for item in deleted) == list(range(10))
    assert await history.count() == 0


async def test_the_oldest_goes_when_a_bound_is_reached(url: str) -> None:
    async with History(url, Bounds(max_entries=3, max_bytes=1 << 20)) as history:
        await history.clear()
        for n in range(5):
            await history.add({"n": n}, b"png", b"")
        assert [entry["n"] for entry, _ in await rows(history)] == [2, 3, 4]
        big = await history.add({"n": 5}, bytes(1 << 20), b"")  # alone larger than the bound: it stays, all else goes
        assert [entry["n"] for entry, _ in await rows(history)] == [5]
        assert len(await history.image(big or 0)) == 1 << 20


async def test_what_was_added_survives_kill_9(tmp_path: Path) -> None:
    process = start_redis(tmp_path)
    history_url = f"unix://{redis_server.socket_path(tmp_path)}"
    async with History(history_url, PLENTY) as history:
        first = await history.add({"n": 1}, b"png", b"")
    end(process, signal.SIGKILL)
    wait_until(lambda: not redis_server.answers(redis_server.socket_path(tmp_path)), "the server dies with its guard")
    process = start_redis(tmp_path)
    async with History(history_url, PLENTY) as history:
        second = await history.add({"n": 2}, b"png", b"")
        assert [(entry["id"], entry["n"]) for entry, _ in await rows(history)] == [(first, 1), (second, 2)]
    assert end(process) == 0


async def test_away_redis_is_told_and_heals(tmp_path: Path) -> None:
    process = start_redis(tmp_path)
    async with History(f"unix://{redis_server.socket_path(tmp_path)}", PLENTY) as history:
        assert end(process) == 0
        with pytest.raises(Unreachable):
            await history.count()
        with pytest.raises(Unreachable):
            await rows(history)
        assert await history.add({"n": 1}, b"png", b"") is None
        process = start_redis(tmp_path)
        await eventually(lambda: history.is_here)
        assert await history.add({"n": 2}, b"png", b"") is not None
    assert end(process) == 0


async def test_a_short_absence_loses_nothing(tmp_path: Path) -> None:
    process = start_redis(tmp_path)
    async with History(f"unix://{redis_server.socket_path(tmp_path)}", PLENTY) as history:
        end(process, signal.SIGKILL)
        wait_until(lambda: not redis_server.answers(redis_server.socket_path(tmp_path)), "the server dies too")
        adding = asyncio.create_task(history.add({"n": 1}, b"png", b""))
        process = await asyncio.to_thread(start_redis, tmp_path)
        assert await adding is not None
        assert await history.count() == 1
    assert end(process) == 0


def test_the_end_of_the_lifeline_ends_the_server(tmp_path: Path) -> None:
    process = start_redis(tmp_path)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 0
    assert not redis_server.answers(redis_server.socket_path(tmp_path))


async def test_a_second_guard_of_the_folder_shares_the_server_and_takes_the_firsts_place(tmp_path: Path) -> None:
    path = redis_server.socket_path(tmp_path)
    first = start_redis(tmp_path)
    with start_guard(tmp_path, stderr=subprocess.PIPE) as brief:
        assert brief.stderr is not None
        assert b"using it too" in brief.stderr.readline()
        assert end(brief) == 0
    assert redis_server.answers(path)  # as `zimage demo` beside `zimage serve` leaves it
    with start_guard(tmp_path, stderr=subprocess.PIPE) as second:
        assert second.stderr is not None
        assert b"using it too" in second.stderr.readline()
        async with History(f"unix://{path}", PLENTY) as history:
            added = await history.add({"n": 1}, b"png", b"")
            assert end(first) == 0
            await eventually(lambda: redis_server.answers(path))
            await eventually(lambda: history.is_here)
            assert [(entry["id"], entry["n"]) for entry, _ in await rows(history)] == [(added, 1)]
        assert end(second) == 0
    assert not redis_server.answers(path)


def test_a_server_that_outlived_its_guard_is_adopted(tmp_path: Path) -> None:
    path, binary = redis_server.socket_path(tmp_path), redis_server.find_binary()
    assert binary is not None
    command = [binary, "--port", "0", "--unixsocket", str(path), "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        wait_until(lambda: redis_server.answers(path), "the server answers")
        with start_guard(tmp_path, stderr=subprocess.PIPE) as guard:
            assert guard.stderr is not None
            assert b"running already" in guard.stderr.readline()
            assert end(guard) == 0
        assert server.wait(30) == 0  # the guard shut it down


def test_the_socket_is_the_owners_alone_and_its_path_never_too_long(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 80) / ("y" * 80)
    process = start_redis(deep)
    path = redis_server.socket_path(deep)
    assert path.stat().st_mode & 0o077 == 0
    assert len(str(path)) <= redis_server.MAX_SOCKET_PATH_BYTES
    assert end(process) == 0
