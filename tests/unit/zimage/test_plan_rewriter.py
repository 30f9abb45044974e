"""What writes for the rewriter of `zimage serve`, and what its process is told."""

from pathlib import Path
from typing import Any

import pytest

from services.gateway.settings import GatewaySettings
from services.rewriter.settings import BackEndKind, RewriterSettings
from zimage.plan import REWRITER, CannotStart, plan_services, rewriter_back_end

API: dict[str, Any] = {"use_api_encoder": True, "api_url": "http://mac:8080"}


@pytest.mark.parametrize(
    ("gateway", "rewriter", "writes"),
    [
        ({}, {}, BackEndKind.ENCODER),
        ({"encoder_only": True}, {}, BackEndKind.ENCODER),
        (API, {}, None),
        (API, {"rewriter_use_api": True, "api_url": "http://mac:8080"}, BackEndKind.API),
        (API, {"rewriter_backend": "local"}, BackEndKind.LOCAL),
        ({}, {"rewriter_backend": "local"}, BackEndKind.LOCAL),
        ({}, {"rewriter_backend": "encoder"}, BackEndKind.ENCODER),
        ({}, {"rewriter_use_api": True, "rewriter_api_url": "http://llm:1"}, BackEndKind.API),
        ({"rewriter_urls": "http://other:7862"}, {}, None),
        ({"rewriter_urls": "http://other:7862"}, {"rewriter_backend": "local"}, None),
    ],
)
def test_what_writes(gateway: dict[str, Any], rewriter: dict[str, Any], writes: BackEndKind | None) -> None:
    assert rewriter_back_end(GatewaySettings(**gateway), RewriterSettings(**rewriter)) is writes


def test_an_encoder_that_does_not_run_here_cannot_write() -> None:
    with pytest.raises(CannotStart, match="--rewriter-use-api"):
        rewriter_back_end(GatewaySettings(**API), RewriterSettings(rewriter_backend="encoder"))


@pytest.mark.parametrize(("variables", "told"), [({}, "encoder"), ({"ZIMAGE_REWRITER_BACKEND": "local"}, "local")])
def test_the_process_is_told_what_writes_and_where_the_encoder_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], told: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    plans = {plan.name: plan for plan in plan_services(GatewaySettings(port=0, data_dir=tmp_path))}
    try:
        environment = plans[REWRITER].environment
        assert environment["ZIMAGE_REWRITER_BACKEND"] == told
        assert environment["ZIMAGE_ENCODER_URLS"] == plans["encoder"].url
        assert plans["gateway"].environment["ZIMAGE_REWRITER_URLS"] == plans[REWRITER].url
        assert list(plans)[-1] == "gateway"
    finally:
        for plan in plans.values():
            if plan.listener is not None:
                plan.listener.socket.close()
