"""Pictures and prompts that keep a server busy while something else is measured."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2

SIZE_PX, STEPS = 512, 9
ENCODERS = 4
LONG = "a small red circle beside a large blue square, " * 120  # over 1,000 tokens: megabytes of embeddings


@asynccontextmanager
async def busy(url: str) -> AsyncIterator[None]:
    """While it is open, one client draws picture after picture and others encode prompt after prompt."""
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=None) as client:
        works = [_draw(client), *(_encode(client, number) for number in range(ENCODERS))]
        tasks = [asyncio.create_task(work) for work in works]
        yield
        for task in tasks:
            if task.done():
                task.result()  # a client that failed did not keep the server busy
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def burst(url: str, *, clients: int, rounds: int) -> None:
    """Long prompts from many clients at once, and a picture, `rounds` times."""
    async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=None) as client:
        for number in range(rounds):
            bodies = [{"prompt": f"{number} {index} {LONG}"} for index in range(clients)]
            answers = await asyncio.gather(*(client.post("/api/encode", json=body) for body in bodies))
            answers.append(await client.post("/api/generate", json=_picture(number)))
            for answer in answers:
                answer.raise_for_status()


async def _draw(client: httpx2.AsyncClient) -> None:
    for number in itertools.count():
        (await client.post("/api/generate", json=_picture(number))).raise_for_status()


async def _encode(client: httpx2.AsyncClient, encoder: int) -> None:
    for number in itertools.count():
        answer = await client.post("/api/encode", json={"prompt": f"Text {number} of client {encoder}"})
        answer.raise_for_status()


def _picture(number: int) -> dict[str, object]:
    return {"prompt": f"Load {number}", "width": SIZE_PX, "height": SIZE_PX, "steps": STEPS}
