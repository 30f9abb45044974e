"""`shared.templates` on folders made for each test, and the templates that the project ships."""

import re
from pathlib import Path

import pytest

from shared.chat import Conversation
from shared.errors import UnknownName
from shared.templates import DEFAULT_DIR, BrokenTemplate, Template, Templates, load_templates

REQUIRED = {"default", "photorealistic", "artistic"}
REQUIRED_REWRITERS = {"rewriter_character_generator", "rewriter_scene_enhancer"}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "zebra.md", "---\ndescription: Stripes\ncategory: animals\n---\nDraw stripes.\n")
    write(
        tmp_path, "deep/er/apple.md", "---\nthinking_content: |-\n  Red.\n\n  Round.\n---\n\nDraw fruit.\n\nWell.\n\n"
    )
    write(tmp_path, "general/default.md", "---\ndescription: Nothing added\n---\n")
    write(tmp_path, "rewriters/rewriter_long.md", "---\ndescription: Longer\ncategory: rewriter\n---\nWrite more.")
    write(tmp_path, "plain.md", "No front matter at all.")
    write(tmp_path, "README.md", "Not a template.")
    write(tmp_path, "notes.txt", "Not a template.")
    return tmp_path


@pytest.fixture
def templates(folder: Path) -> Templates:
    return load_templates(folder)


def test_default_comes_first_and_the_others_by_name(templates: Templates) -> None:
    assert list(templates.pictures) == ["default", "apple", "plain", "zebra"]


def test_rewriters_are_apart(templates: Templates) -> None:
    assert list(templates.rewriters) == ["rewriter_long"]
    assert templates.rewriter("rewriter_long").system_prompt == "Write more."
    with pytest.raises(UnknownName, match="no template of that name; GET /api/templates"):
        templates.picture("rewriter_long")
    with pytest.raises(UnknownName, match="no rewriter of that name; GET /api/rewriters"):
        templates.rewriter("zebra")


def test_what_a_file_holds(templates: Templates) -> None:
    assert templates.picture("zebra") == Template(
        name="zebra", system_prompt="Draw stripes.", description="Stripes", category="animals"
    )
    apple = templates.picture("apple")
    assert apple.system_prompt == "Draw fruit.\n\nWell."
    assert apple.thinking_content == "Red.\n\nRound."
    assert apple.assistant_content is None
    assert templates.picture("plain").system_prompt == "No front matter at all."


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "../../etc/passwd",
        "/etc/passwd",
        "..\\windows",
        "%2e%2e%2fzebra",
        "deep/er/apple",
        "apple.md",
        "APPLE",
        "apple\0",
        "README",
        "notes",
        ".",
        "",
    ],
)
def test_a_name_is_only_looked_up(templates: Templates, name: str) -> None:
    with pytest.raises(UnknownName) as refused:
        templates.picture(name)
    assert not name or name not in refused.value.detail or name == "."


def test_the_tables_cannot_be_changed(templates: Templates) -> None:
    with pytest.raises(TypeError):
        templates.pictures["new"] = templates.picture("zebra")  # type: ignore[index]


def test_two_files_of_one_name(folder: Path) -> None:
    write(folder, "other/zebra.md", "Draw another.")
    with pytest.raises(BrokenTemplate, match="are named 'zebra'"):
        load_templates(folder)


@pytest.mark.parametrize(
    ("front", "text"),
    [
        ("colour: red", "'colour' is not one of"),
        ("name: zebra", "'name' is not one of"),
        ("system_prompt: x", "'system_prompt' is not one of"),
        ("description: 3", "'description' is not one of"),
        ("description: [a, b]", "'description' is not one of"),
        ("thinking_content: null", "'thinking_content' is not one of"),
        ("1: one", "the front matter cannot be read"),
        ("content: x", "the front matter cannot be read"),
        ("description: [", "the front matter cannot be read"),
        ("description: 'open", "the front matter cannot be read"),
        ("description: &a [*a", "the front matter cannot be read"),
        ("description: !!python/object/apply:os.system ['true']", "the front matter cannot be read"),
    ],
)
def test_broken_front_matter_names_the_file(folder: Path, front: str, text: str) -> None:
    path = write(folder, "broken.md", f"---\n{front}\n---\nDraw.")
    with pytest.raises(BrokenTemplate, match=re.escape(text)) as broken:
        load_templates(folder)
    assert str(path) in str(broken.value)


def test_a_file_that_is_not_utf_8(folder: Path) -> None:
    path = folder / "latin.md"
    path.write_bytes("---\ndescription: Caf\xe9\n---\n".encode("latin-1"))
    with pytest.raises(BrokenTemplate, match="cannot be read"):
        load_templates(folder)


def test_a_file_that_cannot_be_opened(folder: Path) -> None:
    (folder / "dangling.md").symlink_to(folder / "gone.txt")
    with pytest.raises(BrokenTemplate, match=r"dangling\.md"):
        load_templates(folder)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BrokenTemplate, match="does not exist"):
        load_templates(tmp_path / "gone")


FULL = Template(name="t", system_prompt="S", thinking_content="T", assistant_content="A")


def test_a_template_fills_what_the_request_leaves_out() -> None:
    filled = FULL.fill(Conversation(prompt="a cat", force_think_block=True, strip_quotes=True))
    assert filled == Conversation(
        prompt="a cat",
        system_prompt="S",
        thinking_content="T",
        assistant_content="A",
        force_think_block=True,
        strip_quotes=True,
    )


@pytest.mark.parametrize("field", ["system_prompt", "thinking_content", "assistant_content"])
@pytest.mark.parametrize("text", ["mine", "", " "])
def test_what_the_request_gives_wins_even_when_it_is_empty(field: str, text: str) -> None:
    filled = FULL.fill(Conversation(prompt="a cat", **{field: text}))
    assert getattr(filled, field) == text
    others = {"system_prompt": "S", "thinking_content": "T", "assistant_content": "A"}
    del others[field]
    assert {name: getattr(filled, name) for name in others} == others


def test_a_part_that_neither_has_stays_absent() -> None:
    filled = Template(name="t", system_prompt="S").fill(Conversation(prompt="a cat"))
    assert (filled.thinking_content, filled.assistant_content) == (None, None)


@pytest.fixture(scope="module")
def shipped() -> Templates:
    return load_templates(DEFAULT_DIR)


def test_enough_templates_are_shipped(shipped: Templates) -> None:
    assert len(shipped.pictures) >= 24
    assert set(shipped.pictures) >= REQUIRED
    assert next(iter(shipped.pictures)) == "default"
    assert set(shipped.rewriters) >= REQUIRED_REWRITERS
    assert sum(template.thinking_content is not None for template in shipped.pictures.values()) >= 6


def test_photorealistic_thinks_and_the_others_of_the_specification_do_not(shipped: Templates) -> None:
    assert shipped.picture("photorealistic").thinking_content
    assert shipped.picture("default").thinking_content is None
    assert shipped.picture("artistic").thinking_content is None


def test_shipped_names_and_texts(shipped: Templates) -> None:
    for name, template in {**shipped.pictures, **shipped.rewriters}.items():
        assert re.fullmatch(r"[a-z0-9_]{1,64}", name)
        assert template.description, name
        assert template.category, name
        assert template.system_prompt or name == "default"
        assert template.system_prompt == template.system_prompt.strip()
        assert template.thinking_content is None or template.thinking_content.strip()
        assert "{{" not in template.system_prompt, name
        assert "<|im_" not in template.system_prompt, name
    assert all(name.startswith("rewriter_") for name in shipped.rewriters)
    assert not any(name.startswith("rewriter_") for name in shipped.pictures)


def test_the_default_template_can_be_used(shipped: Templates) -> None:
    conversation = Conversation(prompt="a cat")
    filled = shipped.picture("default").fill(conversation)
    assert filled.prompt == "a cat"
    assert filled.thinking_content is None


def test_a_rewriters_description_is_as_the_specification_shows_it(shipped: Templates) -> None:
    assert shipped.rewriter("rewriter_character_generator").description == "Character Generator (prompt rewriter)"
    assert shipped.rewriter("rewriter_scene_enhancer").description == "Scene Enhancer (prompt rewriter)"
