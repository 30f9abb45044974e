"""Containers without `MODEL_PATH`: the bundled model draws what it is told, and sees references."""

import io
from collections.abc import Iterator

import httpx2
import pytest
from docker_engine import Project
from PIL import Image
from servers import free_port

from demo_model.judge import judge
from demo_model.render import render
from demo_model.world import Colour, Place, Scene, Shape, Thing
from shared.settings import BUNDLED_MODEL

pytestmark = pytest.mark.slow
PROMPT = "a large red circle in the center on a blue background"


@pytest.fixture(scope="module")
def client(without_models: dict[str, str]) -> Iterator[httpx2.Client]:
    """A client of a server that was started without a model."""
    project = Project(without_models, free_port())
    try:
        project.up()
        with project.client() as client:
            yield client
    finally:
        project.down("--volumes", "--remove-orphans")


def test_anybody_may_read_the_weights() -> None:
    """The containers' user is not the one who checked them out."""
    files = [path for path in BUNDLED_MODEL.parent.rglob("*") if path.is_file()]
    assert files
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)


def test_it_draws_what_it_is_told(client: httpx2.Client) -> None:
    body = {"prompt": PROMPT, "width": 256, "height": 256, "steps": 9, "seed": 1}
    answer = client.post("/api/generate", json=body)
    assert answer.status_code == 200, answer.text
    seen = judge(Image.open(io.BytesIO(answer.content)).convert("RGB"))
    assert (seen.background, seen.things[0].colour, seen.things[0].shape) == (Colour.BLUE, Colour.RED, Shape.CIRCLE)


def test_it_sees_a_reference(client: httpx2.Client) -> None:
    thing = Thing(shape=Shape.SQUARE, colour=Colour.YELLOW, place=Place.CENTER)
    target = io.BytesIO()
    render(Scene(background=Colour.RED, things=(thing,)), width=256, height=256).save(target, "PNG")
    found = client.post("/api/vl/extract", files={"image": ("reference.png", target.getvalue(), "image/png")})
    assert found.status_code == 200, found.text
    assert client.get("/api/vl/status").json()["cached_embeddings"] == [found.json()["embeddings_id"]]
