"""Requests made by chance: of operations as OpenAPI describes them, and of much that it does not."""

import json
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import quote, quote_from_bytes

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

WORKING = "a-name-that-stands-for-an-entry"  # to be put in place of an id or index, which is known only when it is sent
T = TypeVar("T")
Schema = Mapping[str, Any]


def generated(strategy: st.SearchStrategy[T], count: int) -> list[T]:
    """So many values of the strategy."""
    values: list[T] = []

    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(strategy)
    def collect(value: T) -> None:
        values.append(value)

    collect()
    return values


def scalars() -> st.SearchStrategy[Any]:
    """Values that fields take, nearly take, and never take."""
    return st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.sampled_from([0, 1, -1, -2, 16, 64, 1000, 1024, 8192, 8208, 100, 101, 30.0, 1e308, 2**63, 2**63 - 1]),
        st.floats(),
        st.text(max_size=40),
        st.sampled_from(["", " ", "\0", "\ud800", '"', "default", "pool", "../../etc/passwd", "1024px", "x" * 33_000]),
    )


def bodies(operation: Schema, schemas: Schema) -> st.SearchStrategy[bytes]:
    """JSON objects of the operation's fields, other JSON, and bytes that are none."""
    content = operation["requestBody"]["content"]["application/json"]
    fields = [*_resolved(content["schema"], schemas)["properties"], "unknown"]
    good = next(iter(content["examples"].values()))["value"]
    values = st.recursive(scalars(), lambda inner: st.lists(inner, min_size=1, max_size=3), max_leaves=4)
    objects = st.dictionaries(st.sampled_from(fields), values, max_size=8)
    likely = st.builds(lambda rest: {**good, **rest}, objects)
    others = st.recursive(
        scalars(), lambda inner: st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=5
    )
    as_json = st.one_of(likely, objects, others).map(lambda value: json.dumps(value).encode())
    return st.one_of(as_json, as_json, as_json, st.binary(max_size=60))


def targets(path: str, operation: Schema, schemas: Schema) -> st.SearchStrategy[str]:
    """Paths and queries of the operation."""
    parameters = {item["name"]: item for item in operation.get("parameters", [])}
    queries = [name for name, item in parameters.items() if item["in"] == "query"]

    def good(name: str) -> st.SearchStrategy[str]:
        schema = _resolved(parameters[name]["schema"], schemas) if name in parameters else {"enum": ["1"]}
        return _of_schema(schema).map(lambda value: f"{name}={value}")

    names = st.sampled_from([*queries, "unknown"])
    odd = st.builds("{}={}".format, names, words())
    nearly = st.builds(lambda some, one: [*some, one], st.lists(names.flatmap(good), max_size=2), odd)
    wild = st.lists(names.flatmap(good) | odd | words(), max_size=4)
    query = st.one_of(nearly, wild).map(lambda items: f"?{'&'.join(items)}" if items else "")
    segments = st.fixed_dictionaries({n: words() for n, item in parameters.items() if item["in"] == "path"})
    return st.builds(lambda values, text: path.format(**values) + text, segments, query)


def words() -> st.SearchStrategy[str]:
    """Parts of a URL, encoded: what parameters take, nearly take, and never take."""
    odd = ["", "-1", "-0", "+1", "1.0", "1e9", "1_0", "0x10", "NaN", "None", "%201", "%EF%BC%91", "9" * 40]
    traversals = ["..", "..%2f..%2fetc%2fpasswd", "%2e%2e%2f", "..%5c", "%252e%252e%252f", "%c0%ae%c0%ae%c0%af", "%00"]
    broken = ["%", "%zz", "%ff%fe", "%ed%a0%80", "9" * 5000, "x" * 5000, "none", "thumb", "full", "[]", "'\";--", ";"]
    return st.one_of(
        st.just(WORKING),
        st.sampled_from([*odd, *traversals, *broken]),
        st.integers(-(2**70), 2**70).map(str),
        st.sampled_from([2**31, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1]).map(str),
        st.integers(0, 20).map(str),
        st.text(max_size=20).map(lambda text: quote(text, safe="", errors="replace")),
        st.binary(max_size=8).map(lambda data: quote_from_bytes(data, safe="")),
    )


def _of_schema(schema: Schema) -> st.SearchStrategy[str]:
    kind = next(kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null")
    if "enum" in kind:
        return st.sampled_from(kind["enum"])
    return st.integers(kind.get("minimum", 0), min(kind.get("maximum", 2**63), 2**63)).map(str)


def _resolved(schema: Schema, schemas: Schema) -> Schema:
    resolved: Schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return resolved
