"""What keeping a picture costs, and what listing pictures costs with and without their bytes."""

import asyncio
import re
import statistics
import time
from pathlib import Path

import httpx2

from benchmarks.results import Figure, Findings
from benchmarks.setting import Setting
from services.gateway.store import Bounds, History
from zimage.redis_server import socket_path

NAME = "history"
PICTURES, QUICK_PICTURES = 5, 2
ENTRIES, QUICK_ENTRIES = 1_000, 50
LISTINGS = 3
KEEPING_AIM, LISTING_AIM = 0.03, 0.1


def run(setting: Setting) -> Findings:
    """Makes pictures of 512x512, then fills the history with copies of one and lists it in both ways, in turn."""
    with httpx2.Client(base_url=setting.server.url, trust_env=False, timeout=None) as client:
        made = [_picture(client, seed) for seed in range(QUICK_PICTURES if setting.quick else PICTURES)]
        png = made[0].content
        entries = QUICK_ENTRIES if setting.quick else ENTRIES
        client.delete("/api/history").raise_for_status()
        template = {**_entry(client, made[0]), "seed": 0}
        asyncio.run(_fill(setting.data_dir, template, png, entries))
        listings = [(_seconds(client, "none"), _seconds(client, "full")) for _ in range(LISTINGS)]
        client.delete("/api/history").raise_for_status()
    shares = [_stage(answer, "history") / (_stage(answer, "total") - _stage(answer, "history")) for answer in made]
    ratio = statistics.median(none / full for none, full in listings)
    figures = [
        Figure(benchmark=NAME, what="keeping a picture / making it", value=statistics.median(shares), aim=KEEPING_AIM),
        Figure(benchmark=NAME, what=f"listing {entries}, none / full", value=ratio, aim=LISTING_AIM),
        Figure(benchmark=NAME, what="listing without pictures", value=1000 * listings[-1][0], unit="ms"),
    ]
    return Findings(figures, {"shares": shares, "listings_s": listings, "png_bytes": len(png)})


def _picture(client: httpx2.Client, seed: int) -> httpx2.Response:
    body = {"prompt": "A picture to keep", "width": 512, "height": 512, "seed": seed}
    answer = client.post("/api/generate", json=body)
    answer.raise_for_status()
    return answer


def _entry(client: httpx2.Client, answer: httpx2.Response) -> dict[str, object]:
    again = client.post("/api/generate", json={"prompt": "A picture to keep", "width": 64, "height": 64, "steps": 1})
    again.raise_for_status()
    entry: dict[str, object] = client.get("/api/history", params={"images": "none"}).json()["history"][0]
    entry.pop("id")
    return {**entry, "gen_time": float(answer.headers["x-generation-time"])}


async def _fill(data_dir: Path, entry: dict[str, object], png: bytes, entries: int) -> None:
    bounds = Bounds(max_entries=entries, max_bytes=entries * (len(png) + (1 << 16)))
    async with History(f"unix://{socket_path(data_dir / 'redis')}", bounds) as history:
        await history.clear()
        for _ in range(entries):
            await history.add(entry, png, b"")


def _seconds(client: httpx2.Client, images: str) -> float:
    started = time.perf_counter()
    with client.stream("GET", "/api/history", params={"images": images}) as answer:
        answer.raise_for_status()
        for _ in answer.iter_raw():
            pass
    return time.perf_counter() - started


def _stage(answer: httpx2.Response, name: str) -> float:
    found = re.search(rf"\b{name};dur=([\d.]+)", answer.headers["server-timing"])
    if found is None:
        raise LookupError(f"no stage {name}")
    return float(found[1])
