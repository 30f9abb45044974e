"""`python -m demo_model`: train the demo model, and measure it."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL
from rich.console import Console
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

from demo_model.evaluate import Evaluation, report
from demo_model.export import export_model, export_vision
from demo_model.seeing import Vision
from demo_model.training.correcting import learn_from_own
from demo_model.training.drawing import train_drawing
from demo_model.training.facts import teach_facts
from demo_model.training.guidance import distil_guidance
from demo_model.training.joint import Learnt, train_together
from demo_model.training.text import TextBatches, new_tokenizer, train_text_model
from demo_model.training.vae import train_vae
from demo_model.training.vision import new_processor, train_vision_model

HERE = Path(__file__).parent
MODEL, VISION = HERE / "checkpoints" / "z-image", HERE / "checkpoints" / "qwen3-vl"

app = typer.Typer(
    no_args_is_help=True,
    help="The bundled demo model: train it anew, and measure what it can do.",
    pretty_exceptions_show_locals=False,
)

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, mps.")]


@app.command()
def train(
    work_dir: Annotated[Path, typer.Option(help="Checkpoints of the training; a run goes on from what is there.")],
    output_dir: Annotated[Path, typer.Option(help="Where the finished directories go.")] = HERE / "checkpoints",
    device: Device = "cpu",
) -> None:
    """Train all stages, one after the other: most of a day on two cores, minutes on a CUDA device."""
    place = torch.device(device)
    tokenizer = _tokenizer(work_dir / "tokenizer.json")
    texts = TextBatches(tokenizer)
    vae = train_vae(work_dir, place)
    text = train_text_model(tokenizer, work_dir, place)
    reader = teach_facts(text, texts, work_dir, place)
    learnt = Learnt(text=text, reader=reader, vae=vae)
    dit = train_together(learnt, texts, work_dir, place)
    vision = train_vision_model(text, reader, texts, work_dir, place)
    see = Vision(vision, new_processor(), texts.ids)
    train_drawing(learnt, dit, texts, see, work_dir, place)
    distil_guidance(learnt, dit, texts, see, work_dir, place)
    learn_from_own(learnt, dit, texts, see, work_dir, place)
    export(output_dir, tokenizer=tokenizer, vae=vae, text=text, dit=dit, vision=vision)
    Console().print(f"Written to {output_dir}. Measure it: python -m demo_model evaluate")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Option(help="A Z-Image directory.")] = MODEL,
    vision: Annotated[Path, typer.Option(help="A Qwen3-VL directory; skipped where it is missing.")] = VISION,
    device: Device = "cpu",
    share: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the cases to run.")] = 1.0,
    output: Annotated[Path | None, typer.Option(help="Write the figures here, as JSON.")] = None,
    grid: Annotated[Path | None, typer.Option(help="Write a sheet of pictures here, as PNG.")] = None,
) -> None:
    """Measure a checkpoint on combinations that the training never saw; ends with 1 where a figure is missed."""
    figures = Evaluation(model, vision, torch.device(device), share=share).run(grid)
    report(figures, Console(), output)
    if not all(figure.holds for figure in figures):
        raise typer.Exit(1)


def _tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        new_tokenizer().save(str(path))
    return Tokenizer.from_file(str(path))


def export(
    folder: Path, *, tokenizer: Tokenizer, vae: AutoencoderKL, text: Qwen3ForCausalLM, dit: object, vision: object
) -> None:
    """Both directories, in bfloat16; statistics are measured before the weights are rounded."""
    export_vision(folder / "qwen3-vl", tokenizer=tokenizer, vision=vision)
    export_model(folder / "z-image", tokenizer=tokenizer, text=text, dit=dit, vae=vae)


if __name__ == "__main__":
    app()
