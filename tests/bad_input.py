"""The requests of the table of bad input, a group for each of its rows, to the gateway and to the service that owns the
value. What needs the vision-language model or the rewriter's is not here."""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from diffusion_bodies import (
    GOOD,
    HEADERS,
    METADATA,
    ROWS,
    WANTED,
    WIDTH,
    announced,
    message,
    states,
    states_with,
    with_header,
)

from shared.schemas.encoder import MAX_INPUT_CHARS
from shared.schemas.fields import MAX_PROMPT_CHARS
from shared.wire import TensorMeta, build_header

JSON = {"content-type": "application/json"}
GATEWAY, ENCODER, DIFFUSION = "gateway", "encoder", "diffusion"
GENERATE, HIDDEN_STATES, DRAW = "/api/generate", "/v1/hidden_states", "/v1/generate"
PROMPT_PATHS = (GENERATE, "/api/encode", "/api/save-embeddings", "/api/format-prompt")
INPUT_PATHS = (HIDDEN_STATES, "/v1/tokenize")
DEEP = b"[" * 100_000 + b"]" * 100_000
LARGE_HEADER = {"x-filler": "x" * (1 << 20)}


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A request that `place` must refuse with one of `statuses` and a sentence that names `named`."""

    what: str
    place: str
    path: str
    content: bytes = b""
    method: str = "POST"
    headers: Mapping[str, str] | None = None
    statuses: tuple[int, ...] = (422,)
    named: str = ""

    def __str__(self) -> str:
        return f"{self.place} {self.method} {self.path[:40]} {self.what}"


def asked(name: str, value: str, *, path: str = GENERATE, what: str = "", statuses: tuple[int, ...] = (422,)) -> Bad:
    """To the gateway, with JSON for a field as it stands."""
    return Bad(
        what=what or f"{name}={value[:20]}",
        place=GATEWAY,
        path=path,
        content=f'{{"prompt": "A cat", "{name}": {value}}}'.encode(),
        headers=JSON,
        statuses=statuses,
        named=f"'{name}'" if statuses == (422,) else "",
    )


def drawn(name: str, value: str, *, what: str = "", statuses: tuple[int, ...] = (422,)) -> Bad:
    """To diffusion, with JSON for a parameter as it stands."""
    content = message(f'{json.dumps(WANTED)[:-1]}, "{name}": {value}}}', text=states())
    named = f"'{name}'" if statuses == (422,) else ""
    return tensors(what or f"{name}={value[:20]}", content, statuses=statuses, named=named)


def tensors(what: str, content: bytes, *, statuses: tuple[int, ...] = (422,), named: str = "") -> Bad:
    """To diffusion, with any body."""
    return Bad(what=what, place=DIFFUSION, path=DRAW, content=content, headers=HEADERS, statuses=statuses, named=named)


def encoded(name: str, value: str, *, path: str = HIDDEN_STATES, what: str = "") -> Bad:
    """To the encoder, with JSON for a field as it stands."""
    content = f'{{"input": "A cat", "{name}": {value}}}'.encode()
    what = what or f"{name}={value[:20]}"
    return Bad(what=what, place=ENCODER, path=path, content=content, headers=JSON, named=name)


def numbers(name: str, *values: str) -> Iterator[Bad]:
    """A number of a picture: the gateway and diffusion both check it."""
    for value in values:
        yield asked(name, value)
        yield drawn(name, value)


def history(method: str, path: str, *statuses: int) -> Bad:
    """To the gateway's history."""
    return Bad(what="", place=GATEWAY, path=f"/api/history{path}", method=method, statuses=statuses)


def sides() -> Iterator[Bad]:
    """0, negative, off the grid, too long, no number."""
    for side in ("width", "height"):
        yield from numbers(side, "0", "-64", "1000", "8208", '"1024px"', "NaN", "1e400", "64.5", "true")


def areas() -> Iterator[Bad]:
    """Sides that are legal, but together too many pixels."""
    both = '8192, "height": 8192'
    yield asked("width", both)
    yield drawn("width", both)


def settings_of_a_picture() -> Iterator[Bad]:
    """Steps, guidance, shift and seed beyond their limits."""
    yield from numbers("steps", "0", "-1", "101", "2.5", '"9"')
    yield from numbers("guidance_scale", "-0.1", "30.1", "NaN", "Infinity", "1e400")
    yield from numbers("shift", "0", "1e-12", "-3", "100.5", "NaN", "-Infinity", "1e400")
    yield from numbers("seed", "-1", str(2**63), "1e400", '"random"')


def layers() -> Iterator[Bad]:
    """The tiny checkpoint has four."""
    for value in ("0", "3", "-5", "-257", "-999999999999", '"-2"', "NaN"):
        yield from (asked("hidden_layer", value, path=path) for path in PROMPT_PATHS[:3])
        yield encoded("layer", value)


def unknown_names() -> Iterator[Bad]:
    """404 for names, 422 for modes."""
    yield from (asked("template", '"no_such_template"', path=path, statuses=(404,)) for path in PROMPT_PATHS)
    yield asked("rewriter", '"no_such_rewriter"', path="/api/rewrite", statuses=(404,))
    unknown_lora = '[{"name": "no_such_lora"}]'
    yield asked("loras", unknown_lora, statuses=(404,))
    yield drawn("loras", unknown_lora, statuses=(404,))
    yield from numbers("long_prompt_mode", '"squeeze"', '"POOL"', '""', "1")
    yield encoded("encoding_format", '"pickle"')


def texts() -> Iterator[Bad]:
    """Prompts of nothing, half a surrogate pair, NUL. A white text is legal for the encoder, which knows no prompts."""
    for value in ('""', '"  \\n\\u2003"', '"\\ud83d cat"', '"cat \\udc00"', '"a\\u0000b"', "null", "7", "[]"):
        yield from (asked("prompt", value, path=path) for path in PROMPT_PATHS)
    for value in ('""', "[]", '[""]', '"\\ud83d cat"', '["cat \\udc00"]', '"a\\u0000b"', "null", "7", "[7]"):
        yield from (encoded("input", value, path=path) for path in INPUT_PATHS)
    for part in ("system_prompt", "thinking_content", "assistant_content"):
        yield from (asked(part, value) for value in ('"\\ud800"', '"\\u0000"'))


def long_texts() -> Iterator[Bad]:
    """From one character too many to more than is read."""
    for length in (MAX_PROMPT_CHARS + 1, 1_900_000):
        value = json.dumps("x" * length)
        yield from (asked("prompt", value, path=path, what=f"{length} characters") for path in PROMPT_PATHS)
    huge = json.dumps("x" * (3 << 20))
    yield asked("prompt", huge, what="3 MB", statuses=(413,))
    for length in (MAX_INPUT_CHARS + 1, 15_000_000):
        yield encoded("input", json.dumps("x" * length), what=f"{length} characters")
    yield encoded("input", json.dumps(["x"] * 65), what="65 texts")
    content = json.dumps({"input": "x" * (17 << 20)}).encode()
    yield Bad(what="17 MB", place=ENCODER, path=HIDDEN_STATES, content=content, headers=JSON, statuses=(413,))


def traversals() -> Iterator[Bad]:
    """Names and ids that would be paths."""
    for name in ("../../etc/passwd", "/etc/passwd", "%2e%2e%2fetc", "..\\..\\etc", "a\0b", "default/../default"):
        for path in PROMPT_PATHS:
            yield asked("template", json.dumps(name), path=path, statuses=(404, 422), what=f"template {name!r}")
        what, loras = f"LoRA {name!r}", json.dumps([{"name": name}])
        yield asked("rewriter", json.dumps(name), path="/api/rewrite", statuses=(404, 422), what=f"rewriter {name!r}")
        yield asked("loras", loras, statuses=(404, 422), what=what)
        yield drawn("loras", loras, statuses=(404, 422), what=what)
    for name in ("../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f", "..%5c..%5cetc", "%00"):
        yield history("GET", f"/{name}/image", 404, 422)
        yield history("DELETE", f"/{name}", 404, 422)
        yield Bad(what="", place=GATEWAY, path=f"/{name}", method="GET", statuses=(404,))
    yield encoded("model", '"a\\u0000b"')


def embeddings() -> Iterator[Bad]:
    """Tensors and headers that are not what diffusion reads."""
    shaped = f"[tokens, {WIDTH}]"
    yield tensors("NaN", message(text=states_with(np.nan)), named="'text'")
    yield tensors("infinity", message(text=states_with(np.inf)), named="'text'")
    guided = {"guidance_scale": 2.0}
    yield tensors("NaN in the negative", message(guided, text=states(), negative=states_with(np.nan)))
    yield tensors("guidance without a negative", message(guided, text=states()), named="'negative'")
    yield tensors("too wide", message(text=states(10, WIDTH + 1)), named=shaped)
    yield tensors("too narrow", message(text=states(10, 8)), named=shaped)
    yield tensors("rank 3", message(text=states(1, 10, WIDTH)), named=shaped)
    yield tensors("rank 1", message(text=states(WIDTH)), named=shaped)
    yield tensors("int8", message(text=states(dtype="int8")), named="I8")
    yield tensors("float64", message(text=states(dtype="float64")), named="F64")
    yield tensors("no rows", message(text=states(0, WIDTH)), named="tokens")
    yield tensors("a million rows", announced(10**6, WIDTH), named="tokens")
    yield tensors("no text", message(negative=states()), named="'text'")
    yield tensors("no parameters", build_header([TensorMeta("text", "F32", (1, WIDTH))]) + bytes(4 * WIDTH))
    yield tensors("parameters of another kind", message("[]", text=states()))
    yield tensors("an unknown parameter", message({"prompt": "x"}, text=states()), named="'prompt'")
    yield from broken_headers()


def broken_headers() -> Iterator[Bad]:
    """Safetensors that is none."""
    row = bytes(4 * WIDTH)
    bodies = {
        "nothing": b"",
        "less than a header": b"\x05\x00\x00",
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
        "a header that is no JSON": with_header(b"{not json"),
        "a header that is a list": with_header([]),
        "a header nested deep": with_header(DEEP),
        "an unknown dtype": with_header({**METADATA, "text": {**ROWS, "dtype": "F7"}}, row),
        "a negative shape": with_header({**METADATA, "text": {**ROWS, "shape": [-1, WIDTH]}}, row),
        "overlapping offsets": with_header({**METADATA, "text": ROWS, "negative": ROWS}, row),
        "a byte too few": GOOD[:-1],
        "a byte too many": GOOD + b"\0",
    }
    for what, content in bodies.items():
        yield tensors(what, content)


def places_in_the_history() -> Iterator[Bad]:
    """404 for what is not there, 422 for what is no number."""
    for number in ("999999", "-1", str(2**53), str(2**63), "9" * 40):
        yield history("DELETE", f"/{number}", 404)
        yield history("GET", f"/{number}/image", 404)
    yield history("DELETE", "/", 404)
    for word in ("abc", "1.5", "1e3", "NaN", "%C2%B2", "9" * 5000):
        yield history("DELETE", f"/{word}", 422)
        yield history("GET", f"/{word}/image", 422)
    for query in ("limit=-1", "limit=10001", "offset=x", "offset=-1", f"offset={2**63}", "images=all", "limit=%ff"):
        yield history("GET", f"?{query}", 422)


def bodies_and_headers() -> Iterator[Bad]:
    """What is no JSON, does not say that it is, is nested too deep or comes under too many headers."""
    for place, paths in ((GATEWAY, PROMPT_PATHS), (ENCODER, INPUT_PATHS)):
        for path in paths:
            for what, content in (("no JSON", b"{not json"), ("no text", b'{"\xff": 1}'), ("cut", b'{"prompt": "A c')):
                yield Bad(what=what, place=place, path=path, content=content, headers=JSON, statuses=(400,))
            yield Bad(what="nested", place=place, path=path, content=DEEP, headers=JSON, statuses=(400, 422))
            nested = b'{"prompt": ' + DEEP + b"}"
            yield Bad(what="nested inside", place=place, path=path, content=nested, headers=JSON, statuses=(400, 422))
            for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""):
                headers, what = {"content-type": kind}, f"content type {kind!r}"
                yield Bad(what=what, place=place, path=path, content=b"{}", headers=headers, statuses=(415,))
            strange = {**JSON, "host": "rebound.example.com:7860"}
            if place == GATEWAY:
                yield Bad(
                    what="a stranger's host", place=place, path=path, content=b"{}", headers=strange, statuses=(421,)
                )
            large = {**JSON, **LARGE_HEADER}
            yield Bad(what="1 MB of headers", place=place, path=path, content=b"{}", headers=large, statuses=(431,))
    yield tensors("parameters that are no JSON", message("{", text=states()), statuses=(400,))
    for kind in ("application/json", "application/octet-stream", ""):
        headers, what = {"content-type": kind}, f"content type {kind!r}"
        yield Bad(what=what, place=DIFFUSION, path=DRAW, content=GOOD, headers=headers, statuses=(415,))
    large = {**HEADERS, **LARGE_HEADER}
    yield Bad(what="1 MB of headers", place=DIFFUSION, path=DRAW, content=GOOD, headers=large, statuses=(431,))


REFUSED = {
    "width or height": sides,
    "width x height": areas,
    "steps": settings_of_a_picture,
    "hidden_layer": layers,
    "unknown template": unknown_names,
    "prompt empty": texts,
    "prompt over": long_texts,
    "`../../etc/passwd`": traversals,
    "embeddings sent": embeddings,
    "a history index": places_in_the_history,
    "malformed JSON": bodies_and_headers,
}
"""The requests of each row, under the words that the row begins with."""
