"""The encoder's HTTP interface, served by a real process. What it refuses is in `bad_input.py`."""

import base64
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import pytest
from safetensors.numpy import load

from shared.wire import MEDIA_TYPE

pytestmark = pytest.mark.slow
PATH = "/v1/hidden_states"
TEXT = "<|im_start|>user\nA cat sleeping<|im_end|>\n<|im_start|>assistant\n"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 in batches of different sizes


def tensors(encoder: httpx2.Client, **body: Any) -> dict[str, Any]:
    """The hidden states in the form of safetensors."""
    answer = encoder.post(PATH, json=body, headers={"accept": MEDIA_TYPE})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == MEDIA_TYPE
    assert answer.headers["server-timing"].startswith("encode;dur=")
    return load(answer.content)


def decoded(answer: dict[str, Any]) -> Any:
    """The numbers of a JSON answer in base64."""
    return np.frombuffer(base64.b64decode(answer["hidden_states"], validate=True), "<f4").reshape(answer["shape"])


@pytest.mark.parametrize("layer", [-1, -2, -4])
def test_the_three_forms_agree(encoder: httpx2.Client, layer: int) -> None:
    as_floats = encoder.post(PATH, json={"input": TEXT, "layer": layer}).json()
    as_base64 = encoder.post(PATH, json={"input": TEXT, "layer": layer, "encoding_format": "base64"}).json()
    as_tensors = tensors(encoder, input=TEXT, layer=layer)
    assert as_floats["encoding_format"] == "float"
    assert as_base64["encoding_format"] == "base64"
    for answer in (as_floats, as_base64):
        assert answer["layer"] == layer
        assert answer["dtype"] == "float32"
        assert answer["model"]
        assert answer["shape"] == list(as_tensors["hidden_states.0"].shape)
    assert as_tensors.keys() == {"hidden_states.0"}
    assert np.array_equal(np.array(as_floats["hidden_states"], "<f4"), as_tensors["hidden_states.0"])
    assert np.array_equal(decoded(as_base64), as_tensors["hidden_states.0"])


def test_layers_differ(encoder: httpx2.Client) -> None:
    states = [tensors(encoder, input=TEXT, layer=layer)["hidden_states.0"] for layer in (-1, -2, -3, -4)]
    assert len({item.tobytes() for item in states}) == len(states)


def test_a_list_is_answered_by_a_list(encoder: httpx2.Client) -> None:
    texts = [TEXT, "A much longer text about a dog and a cat, " * 20, "x"]
    listed = encoder.post(PATH, json={"input": texts, "encoding_format": "base64"}).json()
    together = tensors(encoder, input=texts)
    assert len(listed) == len(together) == len(texts)
    for index, (text, answer) in enumerate(zip(texts, listed, strict=True)):
        alone = tensors(encoder, input=text)["hidden_states.0"]
        np.testing.assert_allclose(decoded(answer), alone, **CLOSE)
        np.testing.assert_allclose(together[f"hidden_states.{index}"], alone, **CLOSE)
    assert isinstance(encoder.post(PATH, json={"input": ["x"]}).json(), list)


def test_many_clients_get_their_own_numbers(encoder: httpx2.Client) -> None:
    texts = [f"Text {index} {'and another word ' * (index % 5)}" for index in range(16)]

    def encode(text: str) -> Any:
        return tensors(encoder, input=text)["hidden_states.0"]

    alone = [encode(text) for text in texts]
    with ThreadPoolExecutor(len(texts)) as pool:
        for got, expected in zip(pool.map(encode, texts), alone, strict=True):
            np.testing.assert_allclose(got, expected, **CLOSE)


def test_max_length_keeps_the_first_tokens(encoder: httpx2.Client) -> None:
    whole = tensors(encoder, input=TEXT)["hidden_states.0"]
    cut = tensors(encoder, input=TEXT, max_length=3)["hidden_states.0"]
    assert cut.shape == (3, whole.shape[1])
    np.testing.assert_allclose(cut, whole[:3], **CLOSE)
    assert tensors(encoder, input=TEXT, max_length=10_000)["hidden_states.0"].shape == whole.shape


def test_tokenize(encoder: httpx2.Client) -> None:
    answer = encoder.post("/v1/tokenize", json={"input": [TEXT, "cat"]}).json()
    assert answer["counts"] == [len(ids) for ids in answer["tokens"]]
    assert answer["counts"][0] == tensors(encoder, input=TEXT)["hidden_states.0"].shape[0]
    single = encoder.post("/v1/tokenize", json={"input": TEXT}).json()
    assert single["tokens"] == answer["tokens"][:1]


def test_models(encoder: httpx2.Client) -> None:
    answer = encoder.get("/v1/models").json()
    (model,) = answer["data"]
    assert (answer["object"], model["object"]) == ("list", "model")
    assert (model["device"], model["dtype"], model["layers"]) == ("cpu", "float32", 4)
    assert model["width"] == tensors(encoder, input=TEXT)["hidden_states.0"].shape[1]
    assert model["id"] == encoder.post(PATH, json={"input": TEXT}).json()["model"]


def test_other_paths(encoder: httpx2.Client) -> None:
    assert (encoder.get(PATH).status_code, encoder.get("/nothing").status_code) == (405, 404)
    assert "/v1/hidden_states" in encoder.get("/openapi.json").json()["paths"]
    assert "zimage_encoder_waiting" in encoder.get("/metrics").text
