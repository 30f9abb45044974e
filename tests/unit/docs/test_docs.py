"""The documents: what is generated is up to date, what they name exists."""

import os
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.errors import BY_CODE
from zimage.flags import check_configuration

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "services/*/README.md", "benchmarks/*.md", "templates/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")


def run(script: str) -> dict[str, object]:
    """The names that a script defines."""
    return runpy.run_path(str(ROOT / script))


def test_the_example_configuration_is_up_to_date() -> None:
    render = run("scripts/config_example.py")["render"]
    assert callable(render)
    assert (ROOT / "config.example.toml").read_text(encoding="utf-8") == render(), "run scripts/config_example.py"


def test_the_example_configuration_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ZIMAGE_")]:
        monkeypatch.delenv(name)
    defaults = check_configuration()
    monkeypatch.setenv("ZIMAGE_CONFIG", str(ROOT / "config.example.toml"))
    assert {name: settings.model_dump() for name, settings in check_configuration().items()} == {
        name: settings.model_dump() for name, settings in defaults.items()
    }


def test_the_table_of_flags_is_up_to_date() -> None:
    updated = run("scripts/readme_flags.py")["updated"]
    assert callable(updated)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert updated(readme) == readme, "run scripts/readme_flags.py"


def test_the_stack_file_is_up_to_date() -> None:
    render = run("scripts/stack_file.py")["render"]
    assert callable(render)
    assert (ROOT / "deploy/stack.yaml").read_text(encoding="utf-8") == render(), "run scripts/stack_file.py"


def test_the_picture_is_up_to_date() -> None:
    draw = run("docs/images/request_path.py")["draw"]
    assert callable(draw)
    assert (ROOT / "docs/images/request_path.svg").read_text(encoding="utf-8") == draw(), "run request_path.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def tree(readme: str) -> Iterator[Path]:
    """The paths that the README's tree names, each below the folders that it is indented under."""
    block = readme.partition("## What is where")[2].split("```")[1]
    folders: list[str] = []
    for line in block.strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names, _, comment = line.strip().partition("  ")
        assert comment, f"{names} has no comment"
        folders[depth:] = [names]
        yield from (Path(*folders[:depth], name) for name in names.split(", "))


def test_the_tree_is_there() -> None:
    paths = list(tree((ROOT / "README.md").read_text(encoding="utf-8")))
    assert [str(path) for path in paths if not (ROOT / path).exists()] == []


def test_the_table_of_errors_is_complete() -> None:
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {code: int(status) for status, code in rows} == {code: error.status for code, error in BY_CODE.items()}
