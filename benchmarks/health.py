"""How soon `/health` answers while pictures are made and prompts encoded, as a load balancer asks a busy server."""

import asyncio
import time

import httpx2

from benchmarks.load import busy
from benchmarks.results import Figure, Findings, percentile
from benchmarks.setting import Setting

NAME = "health"
SAMPLES, QUICK_SAMPLES = 600, 100
PAUSE_S = 0.02
WARM_UP_S = 1.0
AIM_MS = 50.0


def run(setting: Setting) -> Findings:
    """Asks again and again, by a client of its own, and looks at the slow answers."""
    samples = asyncio.run(_sample(setting.server.url, QUICK_SAMPLES if setting.quick else SAMPLES))
    figures = [
        Figure(benchmark=NAME, what="/health under load, p99", value=percentile(samples, 0.99), unit="ms", aim=AIM_MS),
        Figure(benchmark=NAME, what="/health under load, p50", value=percentile(samples, 0.5), unit="ms"),
        Figure(benchmark=NAME, what="/health under load, slowest", value=max(samples), unit="ms"),
    ]
    return Findings(figures, {"milliseconds": [round(sample, 3) for sample in samples]})


async def _sample(url: str, count: int) -> list[float]:
    taken = []
    async with busy(url), httpx2.AsyncClient(base_url=url, trust_env=False, timeout=None) as client:
        await asyncio.sleep(WARM_UP_S)
        await client.get("/health")
        for _ in range(count):
            started = time.perf_counter()
            (await client.get("/health")).raise_for_status()
            taken.append(1000 * (time.perf_counter() - started))
            await asyncio.sleep(PAUSE_S)
    return taken
