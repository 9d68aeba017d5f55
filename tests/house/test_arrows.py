"""Imports between packages only point down; the contracts are in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.house.tree import PACKAGE, REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LINT_IMPORTS = Path(sys.executable).with_name("lint-imports")
PURE_MATHS = {"combine", "linalg", "methods", "quant"}
WITHOUT_TENSORS = {"architectures", "cli", "dialects", "errors", "model", "registry"}


def contract(name: str) -> dict[str, Any]:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    found = [c for c in settings["tool"]["importlinter"]["contracts"] if c["name"] == name]
    assert len(found) == 1, f"pyproject.toml has {len(found)} contracts named {name!r}"
    return found[0]


def run_import_linter(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LINT_IMPORTS), "--no-logo", "--no-cache", "--config", str(folder / "pyproject.toml")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        # The folder comes first, so that a changed copy is linted and not the installed package.
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "COLUMNS": "120"},
    )


def test_every_contract_is_kept() -> None:
    result = run_import_linter(REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def existing_packages() -> set[str]:
    return {
        path.stem
        for path in PACKAGE.iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists()
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Maths touches neither files nor network", PURE_MATHS),
        ("Descriptions and names need no tensor library", WITHOUT_TENSORS),
    ],
)
def test_contracts_name_every_package_that_they_concern(name: str, expected: set[str]) -> None:
    listed = {module.removeprefix("adapterhub_tools.") for module in contract(name)["source_modules"]}
    assert listed == expected & existing_packages()


VIOLATIONS = {
    "a method reads a file": (
        "methods/lora.py",
        "import pathlib\n",
        "Maths touches neither files nor network",
    ),
    "the model knows a method": (
        "model/__init__.py",
        "import adapterhub_tools.methods\n",
        "Arrows point down",
    ),
    "a dialect knows the store": (
        "dialects/__init__.py",
        "import adapterhub_tools.store\n",
        "Arrows point down",
    ),
    "a command needs torch": (
        "cli/main.py",
        "def show() -> None:\n    import torch\n",
        "Descriptions and names need no tensor library",
    ),
    "a stray module": ("stray.py", "", "Arrows point down"),
    "a method knows another": (
        "methods/another.py",
        "import adapterhub_tools.methods.lora\n",
        "Methods do not know each other",
    ),
    "a shared piece knows a method": (
        "methods/_lycoris.py",
        "import adapterhub_tools.methods.loha\n",
        "Methods do not know each other",
    ),
}


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_a_violation_breaks_its_contract(violation: str, tmp_path: Path) -> None:
    where, line, broken = VIOLATIONS[violation]
    for path in PACKAGE.rglob("*.py"):
        copy = tmp_path / "adapterhub_tools" / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((REPOSITORY / "pyproject.toml").read_bytes())
    changed = tmp_path / "adapterhub_tools" / where
    with changed.open("a", encoding="utf-8") as file:
        file.write("\n" + line)

    result = run_import_linter(tmp_path)

    output = result.stdout + result.stderr
    assert result.returncode == 1, output
    assert f"{broken} BROKEN" in output, output
