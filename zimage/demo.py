"""`zimage demo`: starts everything, draws one picture with a progress bar, says what took how long, and stops."""

import asyncio
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from services.gateway.settings import GatewaySettings
from shared.logs import configure_logs
from shared.problems import Problem
from zimage.checkpoints import make_checkpoint
from zimage.logbook import Logbook
from zimage.plan import DIFFUSION, GATEWAY, CannotStart, plan_services
from zimage.supervisor import Supervisor

READY_TIMEOUT_S = 300.0
GENERATE_TIMEOUT_S = 600.0
POLL_S = 0.05
_STAGES = {
    "encode": "encoder: prompt to hidden states",
    "queue": "diffusion: waiting",
    "denoise": "diffusion: denoising",
    "decode": "diffusion: VAE decode",
    "png": "diffusion: PNG",
    "total": "all, as the gateway saw it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPicture:
    """What to draw; `size` is width and height in pixels."""

    prompt: str
    size: int
    steps: int
    seed: int


async def run_demo(picture: DemoPicture, data_dir: Path) -> None:
    """Draws the picture into `<data_dir>/pictures`. Raises CannotStart when that fails."""
    configure_logs("demo")
    console = Console()
    console.print(
        "[yellow]No trained model is bundled yet:[/] this demo runs on a tiny checkpoint with random weights, "
        "so the picture is coloured noise. The way it takes is the real one."
    )
    model = await asyncio.to_thread(make_checkpoint, data_dir / "checkpoints" / "tiny")
    plans = plan_services(GatewaySettings(port=0), {"ZIMAGE_MODEL_PATH": str(model)})
    started = time.perf_counter()
    with _progress(console) as progress:
        task = progress.add_task("Starting gateway, encoder and diffusion", total=None)
        async with Supervisor(plans, Logbook(data_dir / "logs", echo=False)) as supervisor:
            await supervisor.wait_ready(READY_TIMEOUT_S)
            start_s = time.perf_counter() - started
            response = await _draw(picture, supervisor.urls, progress)
            progress.update(task, description="Stopping")
    path = _save(response, picture, data_dir / "pictures")
    console.print(_stage_table(start_s, response.headers["server-timing"]))
    console.print(f"Picture: {path}", soft_wrap=True, highlight=False)


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


async def _draw(picture: DemoPicture, urls: dict[str, str], progress: Progress) -> httpx2.Response:
    task = progress.add_task("Drawing", total=picture.steps)
    body = {
        "prompt": picture.prompt,
        "width": picture.size,
        "height": picture.size,
        "steps": picture.steps,
        "seed": picture.seed,
    }
    async with httpx2.AsyncClient(trust_env=False, timeout=GENERATE_TIMEOUT_S) as client:
        follower = asyncio.create_task(_follow(client, urls[DIFFUSION], progress, task))
        response = await client.post(f"{urls[GATEWAY]}/api/generate", json=body)
        follower.cancel()
    if not response.is_success:
        raise CannotStart(f"the picture was refused: {Problem.model_validate_json(response.content).detail}")
    progress.update(task, completed=picture.steps)
    return response


async def _follow(client: httpx2.AsyncClient, url: str, progress: Progress, task: object) -> None:
    while True:
        with suppress(httpx2.HTTPError):
            queue = (await client.get(f"{url}/v1/queue")).json()
            for running in queue["running"]:
                progress.update(task, completed=running["step"])  # type: ignore[arg-type]
        await asyncio.sleep(POLL_S)


def _save(response: httpx2.Response, picture: DemoPicture, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"demo-{picture.size}x{picture.size}-seed{response.headers['x-seed']}.png"
    path.write_bytes(response.content)
    return path


def _stage_table(start_s: float, server_timing: str) -> Table:
    table = Table("stage", "time")
    table.columns[1].justify = "right"
    table.add_row("starting the services and loading", f"{start_s:.2f} s")
    for name, milliseconds in re.findall(r"(\w+);dur=([\d.]+)", server_timing):
        table.add_row(_STAGES.get(name, name), f"{float(milliseconds) / 1000:.3f} s")
    return table
