"""`shared.addresses`: how the addresses that settings hold are shown."""

import pytest

from shared.addresses import without_passwords, without_version


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://:pw@host:6379/0", "redis://:***@host:6379/0"),
        ("rediss://user:p%40w@host", "rediss://user:***@host"),
        ("redis://user:p/w@d@host", "redis://user:***@host"),
        ("http://a:b@c,http://d:e@f", "http://a:***@c,http://d:***@f"),
        (
            "(AnyHttpUrl('http://a:b@c/'), AnyHttpUrl('http://d/'))",
            "(AnyHttpUrl('http://a:***@c/'), AnyHttpUrl('http://d/'))",
        ),
        ("http://host:7861/v1", "http://host:7861/v1"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
        ("a red cat at 3:00 @ home", "a red cat at 3:00 @ home"),
    ],
)
def test_passwords_are_not_shown(text: str, shown: str) -> None:
    assert without_passwords(text) == shown


@pytest.mark.parametrize(
    "url", ["http://host:8080", "http://host:8080/", "http://host:8080/v1", "http://host:8080/v1/"]
)
def test_a_base_url_is_given_with_its_version_or_without(url: str) -> None:
    assert without_version(url) == "http://host:8080"
