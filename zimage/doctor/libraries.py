"""The Python libraries: which are installed, and whether they can be imported."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from zimage.doctor.row import Row, lacking, ok

REINSTALL = "install zimage-server anew (`make install`)"


def try_import(name: str, attribute: str = "") -> ModuleType | str:
    """The module, or in one line why it cannot be imported; `attribute` is what we use of it, which may load more."""
    try:
        module = importlib.import_module(name)
        if attribute:
            getattr(module, attribute)
    except Exception as error:  # noqa: BLE001 - a library that does not fit this machine may raise anything
        return f"{type(error).__name__}: {(str(error).strip() or 'no reason is given').splitlines()[0]}"
    return module


def installed(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def library_row(name: str, attribute: str, *, needed: bool) -> Row:
    """A library that a service is built on."""
    module = try_import(name, attribute)
    if isinstance(module, str):
        return lacking(name, f"cannot be imported: {module}", REINSTALL, needed=needed)
    return ok(name, installed(name) or "imported; its version is unknown")


def package_row(name: str, purpose: str, *, needed: bool) -> Row:
    """A package that only some options need."""
    found = installed(name)
    if found is None:
        return lacking(name, f"not installed; {purpose}", f"install the package {name}", needed=needed)
    return ok(name, f"{found}; {purpose}")
