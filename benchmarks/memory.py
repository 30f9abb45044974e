"""How much memory the gateway holds on to after pictures and prompts, some of them long, have passed through it."""

import asyncio

import psutil  # type: ignore[import-untyped]

from benchmarks.load import burst
from benchmarks.results import Figure, Findings
from benchmarks.setting import Setting

NAME = "memory"
AIM_MB = 120.0
CLIENTS = 8
ROUNDS, QUICK_ROUNDS = 3, 1
SAMPLE_S = 0.02
_MB = 1e6


def run(setting: Setting) -> Findings:
    """Loads the gateway and reads its resident memory before, at its highest, and after."""
    gateway = setting.server.service("gateway")
    before = gateway.memory_info().rss
    rounds = QUICK_ROUNDS if setting.quick else ROUNDS
    highest = asyncio.run(_highest(setting.server.url, gateway, rounds))
    after = gateway.memory_info().rss
    figures = [
        Figure(benchmark=NAME, what="gateway after the load, resident", value=after / _MB, unit="MB", aim=AIM_MB),
        Figure(benchmark=NAME, what="gateway before it", value=before / _MB, unit="MB"),
        Figure(benchmark=NAME, what=f"gateway's peak, {CLIENTS} long prompts at once", value=highest / _MB, unit="MB"),
    ]
    return Findings(figures)


async def _highest(url: str, gateway: psutil.Process, rounds: int) -> int:
    load = asyncio.create_task(burst(url, clients=CLIENTS, rounds=rounds))
    highest = 0
    while not load.done():
        highest = max(highest, gateway.memory_info().rss)
        await asyncio.sleep(SAMPLE_S)
    await load
    return highest
