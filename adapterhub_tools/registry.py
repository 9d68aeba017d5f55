"""The folder is the registry: ``methods/lora.py`` IS the method "lora".

Listing reads file names and imports nothing; only a listed name can be loaded, so a hostile file cannot
choose what is imported. A name that starts with an underscore is private to its folder.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from adapterhub_tools.errors import UnsupportedError, escape

_ROOT = Path(__file__).parent
FOLDERS = ("methods", "dialects", "combine", "quant")


@cache
def names(folder: str) -> tuple[str, ...]:
    """Returns the names in one of FOLDERS, sorted; empty if the folder does not exist.

    The folder is read once.
    """
    if folder not in FOLDERS:
        raise ValueError(f"not a registry: {folder}")
    found = {
        entry.stem if entry.suffix == ".py" else entry.name
        for entry in (_ROOT / folder).glob("*")
        if entry.suffix == ".py" or (entry / "__init__.py").is_file()
    }
    return tuple(sorted(name for name in found if not name.startswith("_")))


def load(folder: str, name: str) -> ModuleType:
    """Imports and returns the module that a listed name stands for.

    Raises:
        UnsupportedError: the name is not listed.
    """
    listed = names(folder)
    if name not in listed:
        raise UnsupportedError.of(
            "unknown-name",
            f"{folder} has no {escape(repr(name))}; it has {', '.join(listed) or 'nothing'}.",
            remedy="Use one of those names, or a newer version of adaptertool.",
        )
    return import_module(f"adapterhub_tools.{folder}.{name}")
