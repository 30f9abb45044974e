"""The bundled demo model behind the server: it is used where no model is named, and it draws what it is told."""

import base64
import io
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from PIL import Image
from servers import Running, free_port, running, zimage

from demo_model.judge import judge
from demo_model.render import render
from demo_model.world import Colour, Place, Scene, Shape, Thing
from shared.settings import BUNDLED_MODEL
from shared.wire import read_file_header

pytestmark = pytest.mark.slow
MAX_BYTES = 32_000_000
RED_CIRCLE = "a large red circle in the center on a blue background"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`zimage serve` without a model path."""
    data_dir, port = tmp_path_factory.mktemp("demo"), free_port()
    with running(zimage("serve", "--port", str(port), "--data-dir", data_dir), port, data_dir) as server:
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx2.Client]:
    """A client of it."""
    with server.client() as client:
        yield client


def draw(client: httpx2.Client, prompt: str, **fields: Any) -> Image.Image:
    """The picture of a prompt, 256x256."""
    body = {"prompt": prompt, "width": 256, "height": 256, "steps": 9, "seed": 1, **fields}
    answer = client.post("/api/vl/generate" if "vl_image" in fields else "/api/generate", json=body)
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content)).convert("RGB")


def test_the_weights_are_small_and_in_bfloat16() -> None:
    files = sorted(BUNDLED_MODEL.parent.rglob("*.safetensors"))
    assert len(files) == 4  # text encoder, DiT, VAE, vision-language model
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    for path in files:
        with path.open("rb") as file:
            assert {tensor.dtype for tensor in read_file_header(file).tensors} == {"BF16"}, path


def test_the_operator_is_told(server: Running) -> None:
    assert "the bundled demo model draws" in server.output


@pytest.mark.parametrize(
    ("prompt", "background", "shape", "colour", "place"),
    [
        (RED_CIRCLE, Colour.BLUE, Shape.CIRCLE, Colour.RED, Place.CENTER),
        ("a yellow star at the top left, white background", Colour.WHITE, Shape.STAR, Colour.YELLOW, Place.TOP_LEFT),
        ("A green heart in the bottom right corner, black background.", *(Colour.BLACK, Shape.HEART, Colour.GREEN),
         Place.BOTTOM_RIGHT),
    ],
)  # fmt: skip
def test_it_draws_what_it_is_told(
    client: httpx2.Client, prompt: str, background: Colour, shape: Shape, colour: Colour, place: Place
) -> None:
    seen = judge(draw(client, prompt))
    assert seen.background is background
    (thing, *_) = seen.things
    assert (thing.shape, thing.colour, thing.place) == (shape, colour, place)


def test_two_things_and_another_size(client: httpx2.Client) -> None:
    prompt = "a red square on the left and a blue circle on the right, on a white background"
    seen = judge(draw(client, prompt, width=320, height=256))
    found = {(thing.colour, thing.shape, thing.place) for thing in seen.things}
    assert found == {(Colour.RED, Shape.SQUARE, Place.LEFT), (Colour.BLUE, Shape.CIRCLE, Place.RIGHT)}


def test_words_that_it_does_not_know_give_a_clean_picture(client: httpx2.Client) -> None:
    seen = judge(draw(client, "An old fisherman repairs his nets beside the harbour at dawn"))
    assert len(seen.things) in (1, 2)


def test_a_batch_follows_every_prompt(client: httpx2.Client) -> None:
    colours = [Colour.RED, Colour.GREEN, Colour.YELLOW, Colour.PURPLE]
    body = {"prompt": RED_CIRCLE, "width": 256, "height": 256, "steps": 9, "seed": 1, "num_images": 4}
    several = client.post("/api/generate", json=body, headers={"accept": "application/json"}).json()
    for item in several["images"]:
        seen = judge(Image.open(io.BytesIO(base64.b64decode(item["image_b64"]))).convert("RGB"))
        assert (seen.background, seen.things[0].colour) == (Colour.BLUE, Colour.RED)
    for colour in colours:
        seen = judge(draw(client, f"a large {colour} square in the center on a white background"))
        assert seen.things[0].colour is colour


def test_pictures_made_together_are_those_made_alone(client: httpx2.Client) -> None:
    """Prompts of unlike lengths, seeds and steps at once: 999 of 1000 numbers within 2 grey levels."""
    wanted = [
        (f"a {size} {colour} {shape} {place}, {background} background", seed, 7 + seed % 3)
        for seed, (size, colour, shape, place, background) in enumerate(
            [
                ("large", "red", "circle", "in the center", "blue"),
                ("small", "yellow", "star", "at the top left", "black"),
                ("medium", "green", "heart", "on the right", "white"),
                ("large", "purple", "ring", "at the bottom", "orange"),
                ("large striped", "cyan", "square", "in the middle of the picture", "brown"),
                ("medium dotted", "pink", "triangle", "in the bottom left corner", "gray"),
            ]
        )
    ]

    def drawn(one: tuple[str, int, int]) -> np.ndarray:
        prompt, seed, steps = one
        return np.asarray(draw(client, prompt, seed=seed, steps=steps), dtype=np.int16)

    alone = [drawn(one) for one in wanted]
    with ThreadPoolExecutor(len(wanted)) as pool:
        together = list(pool.map(drawn, wanted))
    for one, other in itertools.combinations(alone, 2):
        assert np.abs(one - other).mean() > 20, "pictures that are swapped must be seen"
    for ours, theirs in zip(together, alone, strict=True):
        assert np.percentile(np.abs(ours - theirs), 99.9) <= 2


def test_the_rewriter_keeps_what_the_prompt_names(client: httpx2.Client) -> None:
    body = {"prompt": "a green ring on a white background", "rewriter": "rewriter_general", "seed": 3}
    answer = client.post("/api/rewrite", json=body).json()
    assert answer["thinking_content"]
    for word in ("green", "ring", "white"):
        assert word in answer["rewritten_prompt"].lower()
    seen = judge(draw(client, answer["rewritten_prompt"]))
    assert (seen.background, seen.things[0].colour, seen.things[0].shape) == (Colour.WHITE, Colour.GREEN, Shape.RING)


def test_a_reference_pulls_the_colour(client: httpx2.Client) -> None:
    thing = Thing(shape=Shape.SQUARE, colour=Colour.YELLOW, place=Place.CENTER)
    reference = render(Scene(background=Colour.RED, things=(thing,)), width=256, height=256)
    target = io.BytesIO()
    reference.save(target, "PNG")
    image = base64.b64encode(target.getvalue()).decode()
    goal = np.asarray(reference, dtype=np.float64).mean((0, 1))
    away = []
    for alpha in (0.0, 0.3, 0.6, 1.0):
        drawn = draw(client, "a large circle in the center", vl_image=image, vl_alpha=alpha)
        away.append(float(np.linalg.norm(np.asarray(drawn, dtype=np.float64).mean((0, 1)) - goal)))
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(away)), away
    assert away[-1] < away[0] / 2


def test_diffusers_own_pipeline_draws_with_it() -> None:
    pipeline = ZImagePipeline.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(RED_CIRCLE, height=256, width=256, num_inference_steps=9, guidance_scale=0.0)
    seen = judge(made.images[0])
    assert (seen.background, seen.things[0].colour, seen.things[0].shape) == (Colour.BLUE, Colour.RED, Shape.CIRCLE)
