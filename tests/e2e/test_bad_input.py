"""Bad input costs nothing: each row of the table is refused as it says, and the next good request works."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from bad_input import DIFFUSION, ENCODER, GATEWAY, GENERATE, HIDDEN_STATES, JSON, PROMPT_PATHS, REFUSED, Bad
from diffusion_bodies import GOOD, HEADERS, WIDTH, message, states
from servers import Running, picture, png_size, shared_file

from shared.errors import BY_CODE
from shared.problems import MEDIA_TYPE
from shared.schemas.fields import MAX_PROMPT_CHARS, LongPromptMode

pytestmark = pytest.mark.slow
LONG_PROMPT = "a small red circle beside a large blue square, " * 600
OF_A_LIBRARY = re.compile(r"pydantic|traceback|exception|error\b|starlette|uvicorn|redis|torch|\bat 0x", re.IGNORECASE)
TESTED_OTHERWISE = ("a legal prompt", "LoRA file")  # below, and in test_commands.py
NEEDS_VL = ("base64", "an image over", "vl_alpha", "a vl_embeddings_id")


@pytest.fixture(scope="module")
def places(server: Running) -> Iterator[dict[str, httpx2.Client]]:
    """Clients of the gateway and of the services behind it, which must be the same processes in the end."""
    before = {name: server.service(name) for name in (GATEWAY, ENCODER, DIFFUSION)}
    with (
        server.client() as gateway,
        server.service_client(ENCODER) as encoder,
        server.service_client(DIFFUSION) as diffusion,
    ):
        yield {GATEWAY: gateway, ENCODER: encoder, DIFFUSION: diffusion}
    assert {name: server.service(name) for name in before} == before, "bad input ended a service"


def still_works(places: dict[str, httpx2.Client], place: str) -> None:
    """The next good request is answered as ever."""
    if place == GATEWAY:
        assert png_size(places[GATEWAY].post(GENERATE, json=picture(steps=1)).content) == (64, 64)
    elif place == ENCODER:
        assert places[ENCODER].post(HIDDEN_STATES, json={"input": "A cat"}).json()["shape"][1] == WIDTH
    else:
        drawn = places[DIFFUSION].post("/v1/generate", content=GOOD, headers=HEADERS)
        assert png_size(drawn.content) == (64, 32)


def check_problem(answer: httpx2.Response) -> dict[str, Any]:
    """A refusal is a problem in our words."""
    assert answer.headers["content-type"] == MEDIA_TYPE
    problem: dict[str, Any] = answer.json()
    assert BY_CODE[problem["code"]].status == problem["status"] == answer.status_code
    assert problem["request_id"] == answer.headers["x-request-id"]
    assert problem["detail"].endswith(".")
    assert len(problem["detail"]) < 500
    assert not OF_A_LIBRARY.search(problem["detail"]), problem["detail"]
    return problem


@pytest.mark.parametrize(
    "bad", [pytest.param(bad, id=f"{row}-{bad}") for row, cases in REFUSED.items() for bad in cases()]
)
def test_refused(places: dict[str, httpx2.Client], bad: Bad) -> None:
    client = places[bad.place]
    target = {"target": bad.path.encode()}  # as it stands, where a client would tidy it up
    answer = client.request(bad.method, "/", content=bad.content, headers=bad.headers, extensions=target)
    assert answer.status_code in bad.statuses, answer.text
    assert bad.named in check_problem(answer)["detail"]
    still_works(places, bad.place)


def test_every_row_has_its_cases() -> None:
    table = shared_file("design/limits-and-errors.md").read_text().partition("|---|---|\n")[2]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    known = (*REFUSED, *TESTED_OTHERWISE, *NEEDS_VL)
    assert [[row.startswith(begin) for begin in known].count(True) for row in rows] == [1] * len(known)


def test_health_answers_while_long_prompts_are_refused(places: dict[str, httpx2.Client]) -> None:
    body = json.dumps({"prompt": "x" * 1_900_000}).encode()
    gateway = places[GATEWAY]
    with ThreadPoolExecutor(8) as pool:
        refused = [pool.submit(gateway.post, path, content=body, headers=JSON) for path in PROMPT_PATHS * 5]
        healthy = [gateway.get("/health")]
        while not all(answer.done() for answer in refused):
            healthy.append(gateway.get("/health"))
    assert {answer.result().status_code for answer in refused} == {422}
    assert {answer.json()["status"] for answer in healthy} == {"healthy"}
    still_works(places, GATEWAY)


@pytest.mark.parametrize("mode", LongPromptMode)
def test_a_legal_prompt_over_the_text_limit_is_drawn(places: dict[str, httpx2.Client], mode: str) -> None:
    limit = places[DIFFUSION].get("/v1/model").json()["text_limit"]
    counted = places[GATEWAY].post("/api/format-prompt", json={"prompt": LONG_PROMPT}).json()
    assert len(LONG_PROMPT) < MAX_PROMPT_CHARS
    assert counted["token_count"] > limit
    drawn = places[GATEWAY].post(GENERATE, json=picture(prompt=LONG_PROMPT, long_prompt_mode=mode))
    assert png_size(drawn.content) == (64, 64)
    body = message({"long_prompt_mode": mode}, text=states(limit + 77, WIDTH))
    assert png_size(places[DIFFUSION].post("/v1/generate", content=body, headers=HEADERS).content) == (64, 32)
