"""What the package imports is what it declares: no undeclared import, no dependency that nothing uses."""

from __future__ import annotations

import ast
import re
import sys

from tests.house.test_arrows import tomllib
from tests.house.tree import PACKAGE, REPOSITORY

# The name of a distribution, where the module that it brings is called otherwise.
MODULE = {"huggingface-hub": "huggingface_hub", "pyyaml": "yaml"}


def imported() -> dict[str, str]:
    """Top-level names of all third-party modules the package imports -> a file that does."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                found[name.split(".")[0]] = str(path.relative_to(REPOSITORY))
    ours = {"adapterhub_tools", "__future__"}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | ours}


# Modules of extras that the package imports where they are asked for, with the extra.
OPTIONAL = {
    "cryptography": "sign",
    "matplotlib": "plot",
    "model_signing": "sign",
    "peft": "verify",
    "transformers": "verify",
}


def optional() -> set[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    return {
        name
        for name, extra in OPTIONAL.items()
        if any(entry.startswith(name.replace("_", "-")) for entry in extras[extra])
    }


def declared() -> set[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[^A-Za-z0-9._-]", entry, maxsplit=1)[0] for entry in project["dependencies"]}
    return {MODULE.get(name, name) for name in names}


def test_every_import_is_declared() -> None:
    undeclared = {name: path for name, path in imported().items() if name not in declared() | optional()}
    assert undeclared == {}


def test_every_dependency_is_imported() -> None:
    assert declared() - set(imported()) == set()
