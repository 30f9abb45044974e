"""Templates: Markdown files with YAML front matter whose body is a system prompt, looked up by name only.

A name is never joined to a path: the folder is read once at start and names are keys of a table.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import frontmatter
import yaml

from shared.chat import Conversation
from shared.errors import UnknownName
from shared.schemas.fields import MAX_PROMPT_CHARS
from shared.settings import InvalidSettings

DEFAULT_DIR = Path(__file__).resolve().parent.parent / "templates" / "z_image"
REWRITER = "rewriter"
_FIRST = "default"
_KEYS = frozenset({"description", "category", "thinking_content", "assistant_content"})


class BrokenTemplate(InvalidSettings):
    """A template file cannot be used; the text names the file and what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """One template. `system_prompt` is the file's body; `category` "rewriter" makes it one for the rewriter."""

    name: str
    system_prompt: str
    description: str = ""
    category: str = ""
    thinking_content: str | None = None
    assistant_content: str | None = None

    def fill(self, conversation: Conversation) -> Conversation:
        """The conversation with the template's text where the request gave none (None; "" is given, and empty)."""
        return replace(
            conversation,
            system_prompt=_given(conversation.system_prompt, self.system_prompt),
            thinking_content=_given(conversation.thinking_content, self.thinking_content),
            assistant_content=_given(conversation.assistant_content, self.assistant_content),
        )


@dataclass(frozen=True, slots=True)
class Templates:
    """The templates of a folder, by name: those for pictures and, apart from them, those for the rewriter."""

    pictures: Mapping[str, Template]
    rewriters: Mapping[str, Template]

    def picture(self, name: str) -> Template:
        """The template for pictures of that name. Raises UnknownName."""
        return _named(self.pictures, name, "template", "/api/templates")

    def rewriter(self, name: str) -> Template:
        """The rewriter template of that name. Raises UnknownName."""
        return _named(self.rewriters, name, "rewriter", "/api/rewriters")


def load_templates(folder: Path) -> Templates:
    """Reads every `**/*.md` below a folder, `default` first, the others by name. Raises BrokenTemplate."""
    if not folder.is_dir():
        raise BrokenTemplate(f"the template folder {folder} does not exist")
    found: dict[str, Template] = {}
    for template in sorted(_read_folder(folder), key=lambda item: (item.name != _FIRST, item.name)):
        if template.name in found:
            raise BrokenTemplate(f"two templates below {folder} are named '{template.name}'")
        found[template.name] = template
    return Templates(
        pictures=MappingProxyType({n: t for n, t in found.items() if t.category != REWRITER}),
        rewriters=MappingProxyType({n: t for n, t in found.items() if t.category == REWRITER}),
    )


def _read_folder(folder: Path) -> Iterator[Template]:
    for path in folder.rglob("*.md"):
        if path.name != "README.md":
            yield _read(path)


def _read(path: Path) -> Template:
    try:
        post = frontmatter.load(str(path))
    except (OSError, UnicodeDecodeError, TypeError, yaml.YAMLError) as error:  # TypeError: a key that is no text
        raise BrokenTemplate(f"{path}: the front matter cannot be read: {error}") from error
    fields = post.metadata
    for key, value in fields.items():
        if key not in _KEYS or not isinstance(value, str):
            raise BrokenTemplate(f"{path}: '{key}' is not one of {', '.join(sorted(_KEYS))} with a text as its value")
    template = Template(name=path.stem, system_prompt=post.content.strip(), **fields)
    if template.category == REWRITER and not 0 < len(template.system_prompt) <= MAX_PROMPT_CHARS:
        raise BrokenTemplate(f"{path}: a rewriter needs a text of 1 to {MAX_PROMPT_CHARS} characters")
    return template


def _given(explicit: str | None, otherwise: str | None) -> str | None:
    return otherwise if explicit is None else explicit


def _named(table: Mapping[str, Template], name: str, kind: str, listing: str) -> Template:
    if name not in table:
        raise UnknownName(f"There is no {kind} of that name; GET {listing} lists them.")
    return table[name]
