"""`zimage demo`: starts everything, draws one picture with a progress bar, says what took how long, and stops."""

import re
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from services.gateway.settings import GatewaySettings
from shared.logs import configure_logs
from shared.schemas.diffusion import Stepped
from shared.settings import BUNDLED_MODEL
from zimage.client import Picture, request_picture
from zimage.logbook import Logbook
from zimage.plan import GATEWAY, plan_services
from zimage.progress import progress_bar
from zimage.supervisor import Supervisor

READY_TIMEOUT_S = 300.0
GENERATE_TIMEOUT_S = 600.0
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


async def run_demo(picture: DemoPicture) -> None:
    """Draws the picture into `pictures` of the data directory. Raises CommandFailed when that fails."""
    configure_logs("demo")
    settings = GatewaySettings(port=0, model_path=BUNDLED_MODEL)
    data_dir = settings.data_dir
    console = Console()
    console.print(
        "The bundled demo model knows one or two [bold]simple shapes[/] in a dozen colours: "
        "circle, square, triangle, star, diamond, ring, cross, heart."
    )
    plans = plan_services(settings, {"ZIMAGE_MODEL_PATH": str(BUNDLED_MODEL)})
    started = time.perf_counter()
    with progress_bar(console) as progress:
        task = progress.add_task("Starting gateway, encoder and diffusion", total=None)
        async with Supervisor(plans, Logbook(data_dir / "logs", echo=False)) as supervisor:
            await supervisor.wait_ready(READY_TIMEOUT_S)
            start_s = time.perf_counter() - started
            drawn = await _draw(picture, supervisor.urls, progress)
            progress.update(task, description="Stopping")
    path = _save(drawn, picture, data_dir / "pictures")
    console.print(_stage_table(start_s, drawn.server_timing))
    console.print(f"Picture: {path}", soft_wrap=True, highlight=False)


async def _draw(picture: DemoPicture, urls: dict[str, str], progress: Progress) -> Picture:
    task = progress.add_task("Drawing", total=picture.steps)
    fields = {
        "prompt": picture.prompt,
        "width": picture.size,
        "height": picture.size,
        "steps": picture.steps,
        "seed": picture.seed,
    }

    def told(done: Stepped) -> None:
        progress.update(task, completed=done.step)

    return await request_picture(urls[GATEWAY], fields, timeout_s=GENERATE_TIMEOUT_S, told=told)


def _save(drawn: Picture, picture: DemoPicture, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"demo-{picture.size}x{picture.size}-seed{drawn.seed}.png"
    path.write_bytes(drawn.png)
    return path


def _stage_table(start_s: float, server_timing: str) -> Table:
    table = Table("stage", "time")
    table.columns[1].justify = "right"
    table.add_row("starting the services and loading", f"{start_s:.2f} s")
    for name, milliseconds in re.findall(r"(\w+);dur=([\d.]+)", server_timing):
        table.add_row(_STAGES.get(name, name), f"{float(milliseconds) / 1000:.3f} s")
    return table
