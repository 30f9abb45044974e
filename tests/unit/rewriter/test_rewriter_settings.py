"""Which language model the settings name, and where keys go."""

from typing import Any

import pytest

from services.rewriter.settings import BackEndKind, RewriterSettings
from shared.settings import InvalidSettings, read_settings

API, OWN = "http://api:8080", "https://rewriter:8443/v1/"


def settings(**fields: Any) -> RewriterSettings:
    return RewriterSettings(**fields)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, BackEndKind.LOCAL),
        ({"rewriter_backend": "local"}, BackEndKind.LOCAL),
        ({"rewriter_backend": "encoder"}, BackEndKind.ENCODER),
        ({"rewriter_backend": "api", "api_url": API}, BackEndKind.API),
        ({"rewriter_use_api": True, "api_url": API}, BackEndKind.API),
        ({"rewriter_use_api": True, "rewriter_backend": "encoder", "rewriter_api_url": API}, BackEndKind.API),
    ],
)
def test_what_writes(fields: dict[str, Any], kind: BackEndKind) -> None:
    assert settings(**fields).back_end is kind
    assert settings(**fields).reads_model_directory is (kind is BackEndKind.LOCAL)


def test_a_model_of_its_own_needs_no_model_directory(tmp_path: Any) -> None:
    assert not settings(rewriter_model_path=tmp_path).reads_model_directory


@pytest.mark.parametrize(
    ("fields", "url", "key"),
    [
        ({"api_url": API}, API, None),
        ({"api_url": API, "api_key": "a"}, API, "a"),
        ({"api_url": API, "api_key": "a", "rewriter_api_key": "b"}, API, "b"),
        ({"api_url": API, "api_key": "a", "rewriter_api_url": OWN}, "https://rewriter:8443", None),
        ({"rewriter_api_url": OWN, "rewriter_api_key": "b"}, "https://rewriter:8443", "b"),
    ],
)
def test_the_key_of_one_server_goes_to_no_other(fields: dict[str, Any], url: str, key: str | None) -> None:
    upstream = settings(rewriter_use_api=True, **fields).upstream
    assert upstream.urls == (url,)
    assert (upstream.key.get_secret_value() if upstream.key else None) == key


def test_encoders_get_no_key() -> None:
    urls = "http://encoder:1/,http://other:2"
    upstream = settings(rewriter_backend="encoder", encoder_urls=urls, api_key="a").upstream
    assert upstream == (("http://encoder:1", "http://other:2"), None)


def test_an_api_needs_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZIMAGE_REWRITER_USE_API", "true")
    with pytest.raises(InvalidSettings, match="--rewriter-use-api needs the URL"):
        read_settings(RewriterSettings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", 3),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("top_k", -1),
        ("presence_penalty", 5),
        ("max_tokens", 0),
        ("max_tokens", 10**9),
        ("backend", "none"),
        ("api_url", "ftp://x"),
    ],
)
def test_bounds(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    monkeypatch.setenv(f"ZIMAGE_REWRITER_{name.upper()}", str(value))
    with pytest.raises(InvalidSettings, match=f"REWRITER_{name.upper()}"):
        read_settings(RewriterSettings)
