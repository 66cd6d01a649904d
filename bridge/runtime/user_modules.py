"""Imports a user's modules by name, and detects modules that hide a package of the bridge.

`bridge`, `caller` and `handler` are ordinary words. A user's file with such a name hides our package if the file's
folder comes first on `sys.path`.
"""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import bridge
from bridge.runtime.settings import SettingsError

OWN_PACKAGES = ("bridge", "caller", "handler")


def import_module(name: str) -> ModuleType:
    """Import a user's module by its dotted name, also from the current directory.

    Raises:
        SettingsError: The module does not exist, fails to import, or has the name of a package of the bridge.
    """
    package = name.partition(".")[0]
    if package in OWN_PACKAGES:
        message = f"cannot use {name}: {package} is a package of the bridge itself; give your module another name"
        raise SettingsError(message)
    if name.endswith(".py") or "/" in name:
        dotted = name.removesuffix(".py").removeprefix("./").replace("/", ".")
        message = f"cannot import {name}: this is a file and not the name of a module; use {dotted}"
        raise SettingsError(message)
    # Append the directory. If it came first, a user's `handler.py` in it would hide our package.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        message = f"cannot import {name}: {type(error).__name__}: {error}"
        raise SettingsError(message) from error


def require_own_package(name: str) -> None:
    """Make sure that `import` finds our package *name*, without importing it.

    Raises:
        SettingsError: `import` finds another module with this name. The error names both files.
    """
    found_file = getattr(find_spec(name), "origin", "missing")
    own_file = Path(bridge.__file__).parent.parent / name / "__init__.py"
    if found_file != str(own_file):
        remedy = "rename that module, or leave it off PYTHONPATH"
        message = f"the package {name} should be {own_file}, but is {found_file}; {remedy}"
        raise SettingsError(message)


def import_attribute(name: str, kind: type[Any]) -> Any:
    """Import `module:attribute`, an instance of *kind*.

    Raises:
        SettingsError: The attribute does not exist or is not an instance of *kind*.
    """
    module, _, attribute = name.partition(":")
    value = getattr(import_module(module), attribute, None) if attribute else None
    if not isinstance(value, kind):
        message = f"{name} does not name a {kind.__name__}; the form is module:attribute"
        raise SettingsError(message)
    return value
