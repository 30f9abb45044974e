"""The command line. Flags go to the services as `ZIMAGE_...` variables; a flag that is not given leaves the default
that the service's own settings hold."""

import asyncio
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.gateway.settings import GatewaySettings
from services.rewriter.settings import BackEndKind, RewriterSettings
from shared.addresses import without_passwords
from shared.checkpoint import UnusableModel, require_parts
from shared.settings import DEFAULT_PROFILE, Device, ModelSettings, NodeSettings, ServiceSettings, VisionSettings
from zimage.flags import check_configuration, in_force, set_environment, with_flags
from zimage.plan import (
    DIFFUSION,
    ENCODER,
    REWRITER,
    VL,
    CannotStart,
    listen,
    rewriter_back_end,
    runs_diffusion,
    runs_encoder,
    runs_vl,
)
from zimage.published import Published
from zimage.serve import serve_until_stopped

app = typer.Typer(
    name="zimage",
    help="A text-to-image server for Z-Image: gateway, encoder, rewriter, vision and diffusion, each a service.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)


class NodeKind(StrEnum):
    """The services that run alone on another machine."""

    ENCODER = ENCODER
    DIFFUSION = DIFFUSION
    REWRITER = REWRITER
    VL = VL


class Dtypes(StrEnum):
    """Dtypes of a random checkpoint."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Sizes(StrEnum):
    """Sizes of a random checkpoint: `tiny` for tests, `small` as the demo model, `bench` for benchmarks."""

    TINY = "tiny"
    SMALL = "small"
    BENCH = "bench"


DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder for everything that is written: logs, pictures.", show_default="the user data directory"),
]
ConfigFile = Annotated[Path | None, typer.Option(help="Path to a TOML config file.", rich_help_panel="Model & device")]
Profile = Annotated[
    str | None,
    typer.Option(help="Config profile to use.", show_default=DEFAULT_PROFILE, rich_help_panel="Model & device"),
]


_SERVER_URL = f"http://127.0.0.1:{GatewaySettings.model_fields['port'].default}"
_PICTURE_TIMEOUT_S = GatewaySettings.model_fields["generate_timeout_s"].default + 30.0
"""The server's own deadline, and some for the way."""


@app.command()
@with_flags
def serve(*, config: ConfigFile = None, profile: Profile = None, **flags: Any) -> None:
    """Run all services on this machine, and keep them running until Ctrl-C or SIGTERM."""
    set_environment({"config": config, "profile": profile, **flags})
    settings = check_configuration()
    gateway = settings["gateway"]
    assert isinstance(gateway, GatewaySettings)  # noqa: S101 - by the table that it comes from
    local = [kind for kind, runs in ((ENCODER, runs_encoder), (DIFFUSION, runs_diffusion)) if runs(gateway)]
    rewriter = settings[REWRITER]
    assert isinstance(rewriter, RewriterSettings)  # noqa: S101 - by the table that it comes from
    if rewriter_back_end(gateway, rewriter) is BackEndKind.LOCAL and rewriter.reads_model_directory:
        local.append(REWRITER)
    for kind in local:
        _require_model(settings[kind])
    if runs_vl(gateway):
        _require_vision_model(gateway)
    asyncio.run(serve_until_stopped(gateway))


@app.command()
def node(
    kind: Annotated[NodeKind, typer.Argument(help="Which service to run.")],
    model_path: Annotated[Path | None, typer.Option(help="The Z-Image model; for vl the Qwen3-VL model.")] = None,
    device: Annotated[Device | None, typer.Option(help="Device to run on.", show_default="auto")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port to listen on.", show_default="7861 encoder, 7862 rewriter, 7863 vl, 7864 diffusion"),
    ] = None,
    service_token_file: Annotated[
        Path | None, typer.Option(help="File with the token that the gateway must show; needed beyond loopback.")
    ] = None,
    allow_no_token: Annotated[
        bool | None, typer.Option("--allow-no-token", help="Serve whoever reaches it, on a network that you trust.")
    ] = None,
    config: ConfigFile = None,
    profile: Profile = None,
    debug: Annotated[bool | None, typer.Option("--debug", help="Enable debug logging.")] = None,
) -> None:
    """Run one service alone, for a gateway on another machine."""
    path = "vl_model_path" if kind is NodeKind.VL else "model_path"
    set_environment({path: model_path, f"{kind}_host": host, f"{kind}_port": port, "debug": debug})
    set_environment({"service_token_file": service_token_file, "allow_no_token": allow_no_token})
    set_environment({"config": config, "profile": profile})
    set_environment(dict.fromkeys(_DEVICES[kind], device))
    settings = check_configuration([kind])[kind]
    assert isinstance(settings, NodeSettings)  # noqa: S101 - by the table that it comes from
    settings.require_token()
    if isinstance(settings, VisionSettings):
        _require_vision_model(settings)
    elif not isinstance(settings, RewriterSettings) or settings.reads_model_directory:
        _require_model(settings)
    listen(*settings.address).socket.close()  # tells of a bad address before a model is loaded
    os.execv(sys.executable, [sys.executable, "-m", f"services.{kind}"])  # noqa: S606 - our own module, no shell


@app.command()
def config(*, config: ConfigFile = None, profile: Profile = None) -> None:
    """Show every setting that is in force, and where its value comes from."""
    set_environment({"config": config, "profile": profile})
    table = Table("setting", "value", "from")
    for row in in_force():
        table.add_row(row.name, escape(without_passwords(str(row.value))), escape(row.source))
    Console().print(table)


@app.command("make-checkpoint")
def make_checkpoint(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    size: Annotated[
        Sizes, typer.Option(help="tiny for tests, small as the demo model, bench for benchmarks.")
    ] = Sizes.TINY,
    dtype: Annotated[Dtypes, typer.Option(help="Number format of the weights.")] = Dtypes.BFLOAT16,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.", min=0)] = 0,
    vision: Annotated[bool, typer.Option("--vision", help="A Qwen3-VL model for vision conditioning.")] = False,
) -> None:
    """Write a checkpoint with random weights, in the published layout, to test and to measure with."""
    from zimage import checkpoints  # loads torch, which `zimage --help` and `zimage serve` do without

    make = checkpoints.make_vision_checkpoint if vision else checkpoints.make_checkpoint
    make(folder, size=checkpoints.Size(size.value), dtype=dtype.value, seed=seed)
    typer.echo(f"wrote {folder}")


@app.command()
def demo(
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "A red circle on a blue background",
    size: Annotated[int, typer.Option(help="Width and height in pixels, a multiple of 16.")] = 256,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 9,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 42,
    data_dir: DataDir = None,
) -> None:
    """Start everything, draw one picture, and stop: shows that this machine can do it."""
    from zimage.demo import DemoPicture, run_demo

    picture = DemoPicture(prompt=prompt, size=size, steps=steps, seed=seed)
    set_environment({"data_dir": data_dir})
    asyncio.run(run_demo(picture))


@app.command("generate")
def generate_picture(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file; - is standard output.")] = Path("out.png"),
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.", show_default="drawn")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels, a multiple of 16.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels, a multiple of 16.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="CFG scale (0.0 for Z-Image Turbo).")] = None,
    shift: Annotated[float | None, typer.Option(help="Scheduler shift/mu parameter.")] = None,
    template: Annotated[str | None, typer.Option(help="Name of a template.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="System message.")] = None,
    url: Annotated[str, typer.Option(envvar="ZIMAGE_URL", help="Where the server is.")] = _SERVER_URL,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds to wait for the picture.")] = _PICTURE_TIMEOUT_S,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if there is one.")] = False,
) -> None:
    """Draw a picture on a running server. What no option says is as the server's defaults say."""
    from zimage.generate import generate

    fields = {
        "prompt": prompt,
        "seed": seed,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "shift": shift,
        "template": template,
        "system_prompt": system_prompt,
    }
    generate(fields, output, url=url, timeout_s=timeout, force=force)


@app.command("download")
def download_model(
    model: Annotated[Published, typer.Argument(help="Which model.")] = Published.Z_IMAGE_TURBO,
    to: Annotated[
        Path | None, typer.Option(help="Folder to put it into.", show_default="the cache of the Hugging Face hub")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default="main")] = None,
) -> None:
    """Download a published model; the last line is the path for --model-path.

    Files that are there already are not fetched again. HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE count.
    """
    from zimage.download import download

    typer.echo(download(model, to=to, revision=revision))


@app.command("doctor")
@with_flags
def examine(
    *,
    config: ConfigFile = None,
    profile: Profile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure how much memory pictures take, and keep it for the service.")
    ] = False,
    **flags: Any,
) -> None:
    """Show what this machine has and lacks for `zimage serve` with the same flags; exit status 0 if it could start."""
    from zimage.doctor.report import examine_machine

    set_environment({"config": config, "profile": profile, **flags})
    raise typer.Exit(0 if examine_machine(as_json=as_json, calibrating=calibrate) else 1)


_DEVICES = {
    ENCODER: ("text_encoder_device",),
    DIFFUSION: ("dit_device", "vae_device"),
    REWRITER: ("rewriter_device",),
    VL: ("vl_device",),
}


def _require_vision_model(settings: VisionSettings) -> None:
    folder = settings.vl_model_folder
    if folder is None or not (folder / "config.json").is_file():
        said = "no vision-language model is given" if folder is None else f"{folder} holds no Qwen3-VL model"
        raise CannotStart(f"{said}: name the directory of one with --vl-model-path")


def _require_model(settings: ServiceSettings) -> None:
    assert isinstance(settings, ModelSettings)  # noqa: S101 - by the table that it comes from
    try:
        require_parts(settings.model_folder, *settings.parts)
    except UnusableModel as error:
        raise CannotStart(str(error)) from None
