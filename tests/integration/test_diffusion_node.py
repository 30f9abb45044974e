"""The diffusion service's HTTP interface, served by a real process: embeddings in, a picture out.

What it refuses is in `bad_input.py`.
"""

import httpx2
import pytest
from diffusion_bodies import GOOD, HEADERS, WIDTH
from servers import png_size

pytestmark = pytest.mark.slow


def test_a_picture(diffusion: httpx2.Client) -> None:
    answer = diffusion.post("/v1/generate", content=GOOD, headers=HEADERS)
    assert answer.status_code == 200, answer.text
    assert png_size(answer.content) == (64, 32)
    assert [stage.split(";")[0] for stage in answer.headers["server-timing"].split(", ")] == [
        "queue",
        "denoise",
        "decode",
        "png",
    ]


def test_facts_and_queue(diffusion: httpx2.Client) -> None:
    model = diffusion.get("/v1/model").json()
    assert (model["device"], model["dtype"], model["text_width"], model["text_limit"]) == (
        "cpu",
        "float32",
        WIDTH,
        1504,
    )
    assert diffusion.get("/v1/queue").json() == {"running": [], "waiting": 0, "max_waiting": 32}
    assert "zimage_diffusion_waiting" in diffusion.get("/metrics").text
