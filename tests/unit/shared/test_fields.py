"""The limits of request fields: each row of the table of bad input, over the models that carry the field."""

import json
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from shared.problems import from_validation
from shared.schemas.diffusion import DiffusionParameters
from shared.schemas.encoder import MAX_INPUT_CHARS, MAX_INPUTS, HiddenStatesRequest, TokenizeRequest
from shared.schemas.fields import MAX_PROMPT_CHARS, MAX_SEED, MAX_SIDE_PX, LongPromptMode
from shared.schemas.public import EncodeRequest, GenerateRequest, PromptRequest

PARAMETERS = {
    "width": 64,
    "height": 64,
    "steps": 4,
    "seed": 0,
    "guidance_scale": 0.0,
    "shift": 3.0,
    "long_prompt_mode": "interpolate",
}
SIDES = {
    "0": "0",
    "negative": "-64",
    "15": "15",
    "no multiple of 16": "1000",
    "over 8192": "8208",
    "far over": "1000000",
    "a string with a unit": '"1024px"',
    "a string": '"1024"',
    "a fraction": "64.5",
    "a float": "64.0",
    "true": "true",
    "a list": "[64]",
    "NaN": "NaN",
    "1e400": "1e400",
    "huge": str(10**30),
}
BAD: list[tuple[str, str, str]] = [
    *[(side, name, value) for side in ("width", "height") for name, value in SIDES.items()],
    ("steps", "0", "0"),
    ("steps", "negative", "-1"),
    ("steps", "over 100", "101"),
    ("steps", "a fraction", "4.5"),
    ("steps", "a string", '"9"'),
    ("steps", "true", "true"),
    ("guidance_scale", "negative", "-0.1"),
    ("guidance_scale", "over 30", "30.1"),
    ("guidance_scale", "NaN", "NaN"),
    ("guidance_scale", "Infinity", "Infinity"),
    ("guidance_scale", "1e400", "1e400"),
    ("guidance_scale", "a string", '"0"'),
    ("guidance_scale", "true", "true"),
    ("shift", "0", "0"),
    ("shift", "too small for float32", "1e-12"),
    ("shift", "negative", "-3"),
    ("shift", "over 100", "100.5"),
    ("shift", "NaN", "NaN"),
    ("shift", "1e400", "1e400"),
    ("seed", "negative", "-1"),
    ("seed", "2**63", str(2**63)),
    ("seed", "10**30", str(10**30)),
    ("seed", "a fraction", "1.5"),
    ("seed", "a string", '"42"'),
    ("seed", "random", '"random"'),
    ("seed", "true", "true"),
    ("long_prompt_mode", "unknown", '"squeeze"'),
    ("long_prompt_mode", "upper case", '"POOL"'),
    ("long_prompt_mode", "empty", '""'),
    ("long_prompt_mode", "a number", "1"),
]
GENERATE_ONLY: list[tuple[str, str, str]] = [
    ("hidden_layer", "0", "0"),
    ("hidden_layer", "above 0", "1"),
    ("hidden_layer", "deeper than any model", "-257"),
    ("hidden_layer", "a fraction", "-2.5"),
    ("hidden_layer", "a string", '"-2"'),
    ("prompt", "empty", '""'),
    ("prompt", "spaces", '"   "'),
    ("prompt", "white space", '"\\n\\t\\u00a0\\u2003"'),
    ("prompt", "NUL", '"a\\u0000cat"'),
    ("prompt", "a lone high surrogate", '"\\ud83d cat"'),
    ("prompt", "a lone low surrogate", '"cat \\udc00"'),
    ("prompt", "over 32,000 characters", json.dumps("a" * (MAX_PROMPT_CHARS + 1))),
    ("prompt", "null", "null"),
    ("prompt", "a number", "7"),
    ("prompt", "a list", '["a cat"]'),
    ("system_prompt", "NUL", '"\\u0000"'),
    ("system_prompt", "a lone surrogate", '"\\ud800"'),
    ("system_prompt", "too long", json.dumps("a" * (MAX_PROMPT_CHARS + 1))),
    ("thinking_content", "NUL", '"\\u0000"'),
    ("thinking_content", "a lone surrogate", '"\\ud800"'),
    ("thinking_content", "too long", json.dumps("a" * (MAX_PROMPT_CHARS + 1))),
    ("assistant_content", "NUL", '"\\u0000"'),
    ("assistant_content", "a lone surrogate", '"\\ud800"'),
    ("assistant_content", "too long", json.dumps("a" * (MAX_PROMPT_CHARS + 1))),
    ("force_think_block", "a string", '"yes"'),
    ("force_think_block", "1", "1"),
    ("force_think_block", "null", "null"),
    ("strip_quotes", "a string", '"true"'),
    ("template", "empty", '""'),
    ("template", "NUL", '"a\\u0000"'),
    ("template", "a lone surrogate", '"\\ud800"'),
    ("template", "very long", json.dumps("../" * 100)),
    ("template", "a number", "3"),
    ("hight", "not a field", "64"),
    ("num_steps", "not a field", "4"),
]


def refusal(model: type[BaseModel], body: Any) -> str:
    """The sentence that a client gets for this body, which must be refused."""
    with pytest.raises(ValidationError) as refused:
        model.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in refused.value.errors()]
    error = from_validation(RequestValidationError(errors).errors())
    assert error.status == 422
    error.detail.encode()
    return error.detail


@pytest.mark.parametrize(("field", "name", "value"), [*BAD, *GENERATE_ONLY])
def test_generate_refuses_and_names_the_field(field: str, name: str, value: str) -> None:
    body = json.loads(f'{{"prompt": "A cat", "{field}": {value}}}')
    detail = refusal(GenerateRequest, body)
    assert detail.startswith(f"'{field}' ")
    assert "not valid" not in detail
    assert len(detail) < 300


@pytest.mark.parametrize(("field", "name", "value"), [case for case in GENERATE_ONLY if case[1] != "not a field"])
def test_encode_refuses_the_same(field: str, name: str, value: str) -> None:
    detail = refusal(EncodeRequest, json.loads(f'{{"prompt": "A cat", "{field}": {value}}}'))
    assert detail.startswith(f"'{field}' ")


@pytest.mark.parametrize(("field", "name", "value"), BAD)
def test_diffusion_checks_again_what_the_gateway_checked(field: str, name: str, value: str) -> None:
    text = json.dumps({**PARAMETERS, field: "HERE"}).replace('"HERE"', value)
    with pytest.raises(ValidationError) as refused:
        DiffusionParameters.model_validate_json(text)
    first = refused.value.errors()[0]
    assert first["type"] == "json_invalid" or first["loc"][0] == field


@pytest.mark.parametrize("field", PARAMETERS)
def test_diffusion_has_no_default_of_its_own(field: str) -> None:
    body = {key: value for key, value in PARAMETERS.items() if key != field}
    with pytest.raises(ValidationError, match="Field required"):
        DiffusionParameters.model_validate_json(json.dumps(body))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("width", 16),
        ("height", MAX_SIDE_PX),
        ("steps", 1),
        ("steps", 100),
        ("seed", 0),
        ("seed", MAX_SEED),
        ("guidance_scale", 0),
        ("guidance_scale", 30),
        ("shift", 0.001),
        ("shift", 100),
        ("hidden_layer", -1),
        ("hidden_layer", -256),
        ("prompt", "a" * MAX_PROMPT_CHARS),
        ("prompt", "\U0001f408" * MAX_PROMPT_CHARS),
        ("prompt", "."),
        ("system_prompt", ""),
        ("template", "../../etc/passwd"),
        *[("long_prompt_mode", mode.value) for mode in LongPromptMode],
    ],
)
def test_the_limits_themselves_are_allowed(field: str, value: Any) -> None:
    request = GenerateRequest.model_validate({"prompt": "A cat", field: value})
    assert getattr(request, field) == value


@pytest.mark.parametrize(
    ("field", "limit"),
    [
        ("width", "a multiple of 16"),
        ("steps", "at most 100"),
        ("guidance_scale", "at most 30"),
        ("shift", "at most 100"),
        ("seed", f"at most {MAX_SEED}"),
        ("hidden_layer", "at most -1"),
    ],
)
def test_the_sentence_names_the_limit(field: str, limit: str) -> None:
    too_much = {"width": 1001, "steps": 101, "guidance_scale": 31, "shift": 101, "seed": 2**63, "hidden_layer": 0}
    assert limit in refusal(GenerateRequest, {"prompt": "A cat", field: too_much[field]})


def test_every_mode_is_named_when_one_is_unknown() -> None:
    detail = refusal(GenerateRequest, {"prompt": "A cat", "long_prompt_mode": "squeeze"})
    assert all(f"'{mode}'" in detail for mode in LongPromptMode)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200)
sides = st.integers(1, MAX_SIDE_PX // 16).map(lambda n: 16 * n)
requests = st.fixed_dictionaries(
    {"prompt": texts.filter(str.strip)},
    optional={
        "system_prompt": st.none() | texts,
        "thinking_content": st.none() | texts,
        "assistant_content": st.none() | texts,
        "force_think_block": st.booleans(),
        "strip_quotes": st.booleans(),
        "template": st.none() | texts.filter(lambda text: 0 < len(text) <= 128),
        "width": st.none() | sides,
        "height": st.none() | sides,
        "steps": st.none() | st.integers(1, 100),
        "seed": st.none() | st.integers(0, MAX_SEED),
        "guidance_scale": st.none() | st.floats(0, 30) | st.integers(0, 30),
        "shift": st.none() | st.floats(0.001, 100),
        "long_prompt_mode": st.none() | st.sampled_from([mode.value for mode in LongPromptMode]),
        "hidden_layer": st.none() | st.integers(-256, -1),
    },
)


@given(requests)
def test_any_request_within_the_limits_is_taken_as_it_is(body: dict[str, Any]) -> None:
    request = GenerateRequest.model_validate(json.loads(json.dumps(body)))
    assert request.model_dump(exclude_unset=True) == body
    conversation = request.conversation()
    assert conversation.prompt == body["prompt"]
    assert conversation.thinking_content == body.get("thinking_content")


@given(
    st.fixed_dictionaries(
        {
            "width": sides,
            "height": sides,
            "steps": st.integers(1, 100),
            "seed": st.integers(0, MAX_SEED),
            "guidance_scale": st.floats(0, 30),
            "shift": st.floats(0.001, 100),
            "long_prompt_mode": st.sampled_from(list(LongPromptMode)),
        }
    )
)
def test_parameters_survive_the_way_to_diffusion(fields: dict[str, Any]) -> None:
    parameters = DiffusionParameters(**fields)
    assert DiffusionParameters.model_validate_json(parameters.model_dump_json()) == parameters


def test_the_prompt_is_required_and_nothing_else() -> None:
    assert refusal(PromptRequest, {}) == "'prompt' is required."
    assert GenerateRequest(prompt="A cat").model_dump(exclude_none=True) == {
        "prompt": "A cat",
        "force_think_block": False,
        "strip_quotes": False,
    }


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a\0"]}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        ({"input": "a" * (MAX_INPUT_CHARS + 1)}, "input"),
        ({"input": 3}, "input"),
        ({"input": None}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({}, "input"),
        ({"input": "a", "layer": 0}, "layer"),
        ({"input": "a", "layer": -257}, "layer"),
        ({"input": "a", "layer": "-2"}, "layer"),
        ({"input": "a", "max_length": 0}, "max_length"),
        ({"input": "a", "max_length": -1}, "max_length"),
        ({"input": "a", "encoding_format": "pickle"}, "encoding_format"),
        ({"input": "a", "model": ""}, "model"),
        ({"input": "a", "other": 1}, "other"),
    ],
)
def test_the_encoder_refuses(body: dict[str, Any], field: str) -> None:
    detail = refusal(HiddenStatesRequest, body)
    assert detail.startswith((f"'{field}' ", f"'{field}[")), detail
    assert detail.count("'input'") <= 1, "one mistake is one sentence, though a text or a list may be given"


def test_the_encoder_takes_one_text_or_several() -> None:
    assert HiddenStatesRequest(input="a").texts == ["a"]
    assert HiddenStatesRequest(input=["a", "b"]).texts == ["a", "b"]
    assert TokenizeRequest(input=["a"] * MAX_INPUTS).texts == ["a"] * MAX_INPUTS
    request = HiddenStatesRequest(input="a" * MAX_INPUT_CHARS)
    assert (request.layer, request.max_length, request.encoding_format) == (-2, None, "float")


def test_the_longest_conversation_fits_the_encoder() -> None:
    from shared.chat import Conversation, format_prompt

    longest = "a" * MAX_PROMPT_CHARS
    text = format_prompt(
        Conversation(prompt=longest, system_prompt=longest, thinking_content=longest, assistant_content=longest)
    )
    assert HiddenStatesRequest(input=text).texts == [text]
