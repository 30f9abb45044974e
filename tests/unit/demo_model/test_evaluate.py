"""The evaluation's figures of references: how they are reckoned, and that they come from the server's own blending."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from demo_model import evaluate
from demo_model.evaluate import ALPHAS, PULL_GOAL, Evaluation, Figure, pull_figures, report
from shared.schemas.fields import BlendMode


@pytest.mark.filterwarnings("ignore")  # diffusers' and transformers' own
def test_every_way_of_blending_is_measured(
    tiny_checkpoint: Path, tiny_vision_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vision = tmp_path / "vision"
    shutil.copytree(tiny_vision_checkpoint, vision)
    config = json.loads((vision / "config.json").read_text())
    (vision / "config.json").write_text(json.dumps({**config, "zimage_target_std": 1.0}))
    monkeypatch.setattr(evaluate, "SIZE", 64)
    monkeypatch.setattr(evaluate, "STEPS", 1)
    asked = []

    def noted(*arguments: object) -> torch.Tensor:
        asked.append(arguments)
        return blend(*arguments)

    blend = evaluate.blend
    monkeypatch.setattr(evaluate, "blend", noted)
    figures = list(Evaluation(tiny_checkpoint, vision, torch.device("cpu"), share=0.01).references())
    ways = [*BlendMode, "linear, all tokens"]
    assert [figure.name.partition(":")[0] for figure in figures] == [way for way in ways for _ in ALPHAS]
    assert [figure.goal for figure in figures if figure.goal is not None] == [PULL_GOAL]
    assert len(asked) == len(ways) * (len(ALPHAS) - 1)


def test_the_pull_of_distances() -> None:
    cases = [[100.0, 80.0, 50.0, 0.0], [100.0, 90.0, 95.0, 50.0]]
    away = {(BlendMode.LINEAR, True): cases, (BlendMode.GRADUATED, True): cases}
    figures = {figure.name: figure for figure in pull_figures(away)}
    steady = [figure for name, figure in figures.items() if "more with alpha" in name]
    assert [(figure.reached, figure.goal) for figure in steady] == [(50.0, PULL_GOAL), (50.0, None)]
    pulls = [figures[f"linear: colour pull at alpha {alpha:g}"] for alpha in ALPHAS[1:]]
    assert [figure.reached for figure in pulls] == [15.0, 27.5, 75.0]
    assert all(figure.goal is None for figure in pulls)


def test_figures_without_a_goal_miss_none(tmp_path: Path) -> None:
    figures = [Figure(name="a", reached=1.0), Figure(name="b", reached=1.0, goal=2.0)]
    assert [figure.holds for figure in figures] == [True, False]
    report(figures, Console(quiet=True), tmp_path / "figures.json")
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [(one["name"], one["goal"]) for one in written] == [("a", None), ("b", 2.0)]
