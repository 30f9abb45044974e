"""The command line. Flags go to the services as `ZIMAGE_...` variables; a flag that is not given leaves the default
that the service's own settings hold."""

import asyncio
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from services.encoder.settings import EncoderSettings
from services.gateway.settings import GatewaySettings
from shared.checkpoint import UnusableModel, require_parts
from shared.schemas.fields import LongPromptMode
from shared.settings import Device
from zimage.plan import DIFFUSION, ENCODER, CannotStart, ServeOptions, default_data_dir
from zimage.serve import serve_until_stopped

app = typer.Typer(
    name="zimage",
    help="A text-to-image server for Z-Image: gateway, encoder and diffusion as services of their own.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)

_gateway = GatewaySettings.model_fields
_encoder = EncoderSettings.model_fields


class NodeKind(StrEnum):
    """The services that run alone on another machine."""

    ENCODER = ENCODER
    DIFFUSION = DIFFUSION


class Dtypes(StrEnum):
    """Dtypes of a random checkpoint."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Sizes(StrEnum):
    """Sizes of a random checkpoint: `tiny` for tests, `bench` for benchmarks."""

    TINY = "tiny"
    BENCH = "bench"


DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder for everything that is written: logs, pictures.", show_default="the user data directory"),
]
ModelPath = Annotated[
    Path, typer.Option(envvar="ZIMAGE_MODEL_PATH", help="Path to the Z-Image model.", show_default=False)
]


def _device_option(part: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        help=f"Device for the {part} (cpu/cuda/mps/auto).", show_default="auto", rich_help_panel="Model & device"
    )
    return option


@app.command()
def serve(
    model_path: ModelPath,
    text_encoder_device: Annotated[Device | None, _device_option("text encoder")] = None,
    dit_device: Annotated[Device | None, _device_option("DiT transformer")] = None,
    vae_device: Annotated[Device | None, _device_option("VAE")] = None,
    hidden_layer: Annotated[
        int | None,
        typer.Option(
            help="Hidden layer to read embeddings from (-1=last, -2=penultimate).",
            show_default=str(_gateway["hidden_layer"].default),
            rich_help_panel="Model & device",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Server host.", rich_help_panel="Server")] = _gateway["host"].default,
    port: Annotated[int, typer.Option(help="Server port; 0 picks a free one.", rich_help_panel="Server")] = _gateway[
        "port"
    ].default,
    encoder_only: Annotated[
        bool, typer.Option("--encoder-only", help="Run only the encoder (no DiT/VAE).", rich_help_panel="Server")
    ] = False,
    shift: Annotated[
        float | None,
        typer.Option(
            help="Scheduler shift.", show_default=str(_gateway["shift"].default), rich_help_panel="Generation"
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="CFG scale (0.0 for Z-Image Turbo).",
            show_default=str(_gateway["guidance_scale"].default),
            rich_help_panel="Generation",
        ),
    ] = None,
    long_prompt_mode: Annotated[
        LongPromptMode | None,
        typer.Option(
            help="How to handle prompts beyond the text limit (1504 tokens for the published model).",
            show_default=_gateway["long_prompt_mode"].default.value,
            rich_help_panel="Generation",
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Log more.", rich_help_panel="Server")] = False,
    data_dir: DataDir = None,
) -> None:
    """Run all services on this machine, and keep them running until Ctrl-C or SIGTERM."""
    _require_model(model_path, *_PARTS[ENCODER], *([] if encoder_only else _PARTS[DIFFUSION]))
    settings = {
        "ZIMAGE_MODEL_PATH": model_path.resolve(),
        "ZIMAGE_TEXT_ENCODER_DEVICE": text_encoder_device,
        "ZIMAGE_DIT_DEVICE": dit_device,
        "ZIMAGE_VAE_DEVICE": vae_device,
        "ZIMAGE_HIDDEN_LAYER": hidden_layer,
        "ZIMAGE_SHIFT": shift,
        "ZIMAGE_GUIDANCE_SCALE": guidance_scale,
        "ZIMAGE_LONG_PROMPT_MODE": long_prompt_mode,
        "ZIMAGE_ENCODER_ONLY": "true" if encoder_only else None,
        "ZIMAGE_DEBUG": "true" if debug else None,
    }
    options = ServeOptions(
        host=host,
        port=port,
        encoder_only=encoder_only,
        settings={name: str(value) for name, value in settings.items() if value is not None},
    )
    asyncio.run(serve_until_stopped(options, data_dir or default_data_dir()))


@app.command()
def node(
    kind: Annotated[NodeKind, typer.Argument(help="Which service to run.")],
    model_path: ModelPath,
    device: Annotated[Device | None, typer.Option(help="Device to run on.", show_default="auto")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = _encoder["host"].default,
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 7861,
    debug: Annotated[bool, typer.Option("--debug", help="Log more.")] = False,
) -> None:
    """Run one service alone, for a gateway on another machine."""
    _require_model(model_path, *_PARTS[kind])
    told = {"ZIMAGE_MODEL_PATH": str(model_path.resolve())}
    told |= {f"ZIMAGE_{kind.upper()}_HOST": host, f"ZIMAGE_{kind.upper()}_PORT": str(port)}
    if device is not None:
        told |= dict.fromkeys(_DEVICES[kind], device.value)
    if debug:
        told["ZIMAGE_DEBUG"] = "true"
    _become(kind, told)


@app.command("make-checkpoint")
def make_checkpoint(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    size: Annotated[Sizes, typer.Option(help="tiny for tests, bench for benchmarks.")] = Sizes.TINY,
    dtype: Annotated[Dtypes, typer.Option(help="Number format of the weights.")] = Dtypes.BFLOAT16,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.", min=0)] = 0,
) -> None:
    """Write a checkpoint with random weights, in the published layout, to test and to measure with."""
    from zimage import checkpoints  # loads torch, which `zimage --help` and `zimage serve` do without

    checkpoints.make_checkpoint(folder, size=checkpoints.Size(size.value), dtype=dtype.value, seed=seed)
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
    from zimage.demo import DemoPicture, run_demo  # loads torch to make the checkpoint

    picture = DemoPicture(prompt=prompt, size=size, steps=steps, seed=seed)
    asyncio.run(run_demo(picture, data_dir or default_data_dir()))


_PARTS = {ENCODER: ("text_encoder", "tokenizer"), DIFFUSION: ("transformer", "vae", "scheduler")}
_DEVICES = {ENCODER: ("ZIMAGE_TEXT_ENCODER_DEVICE",), DIFFUSION: ("ZIMAGE_DIT_DEVICE", "ZIMAGE_VAE_DEVICE")}


def _require_model(model_path: Path, *parts: str) -> None:
    try:
        require_parts(model_path, *parts)
    except UnusableModel as error:
        raise CannotStart(str(error)) from None


def _become(kind: str, environment: dict[str, str]) -> NoReturn:
    os.environ.update(environment)
    os.execv(sys.executable, [sys.executable, "-m", f"services.{kind}"])  # noqa: S606 - our own module, no shell
