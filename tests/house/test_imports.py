"""What describes and names starts at once: no tensor library is loaded until something computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.tree import PACKAGE, REPOSITORY

HEAVY = ("torch", "numpy", "safetensors", "transformers", "peft", "huggingface_hub")
LIGHT_PACKAGES = ("architectures", "cli", "dialects", "errors", "model", "registry", "store")


def loaded_after(code: str) -> set[str]:
    """The heavy modules that a fresh interpreter has loaded once it ran the code."""
    report = (
        f"\nimport json, sys\nprint('\\n' + json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code + report],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def modules_of(package: str) -> list[str]:
    """Dotted names of all modules in one package, or of the single module with that name."""
    single = PACKAGE / f"{package}.py"
    paths = [single] if single.exists() else sorted((PACKAGE / package).rglob("*.py"))
    return [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for path in paths
    ]


def test_the_probe_sees_what_is_loaded() -> None:
    assert "numpy" in loaded_after("import numpy")


def test_importing_the_package_loads_no_tensor_library() -> None:
    assert loaded_after("import adapterhub_tools; dir(adapterhub_tools)") == set()


@pytest.mark.parametrize("package", LIGHT_PACKAGES)
def test_light_packages_load_no_tensor_library(package: str) -> None:
    modules = modules_of(package)
    assert modules, f"adapterhub_tools.{package} does not exist"
    code = "import importlib\n" + "\n".join(f"importlib.import_module({name!r})" for name in modules)
    assert loaded_after(code) == set()


def commands() -> list[str]:
    from click import Context

    from adapterhub_tools.cli.main import cli

    return cli.list_commands(Context(cli))


def test_there_is_a_module_for_every_command() -> None:
    modules = {path.stem for path in (PACKAGE / "cli").glob("*.py")}
    assert {name.replace("-", "_") for name in commands()} <= modules


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_bare_command_loads_no_tensor_library(arguments: list[str]) -> None:
    assert loaded_after(run_command(arguments)) == set()


def test_the_help_of_every_command_loads_no_tensor_library() -> None:
    listed = commands()
    assert {"init", "validate", "inspect", "hash", "merge"} <= set(listed)
    code = "\n".join(run_command([name, "--help"]) for name in listed)
    assert loaded_after(code) == set()


def run_command(arguments: list[str]) -> str:
    """Code that runs the program as the shell would and survives its exit."""
    return (
        "import sys\n"
        "from adapterhub_tools.cli.main import main\n"
        f"sys.argv = {['adaptertool', *arguments]!r}\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert end.code in (0, None), end.code"
    )


def test_the_installed_program_starts() -> None:
    program = Path(sys.executable).with_name("adaptertool")
    result = subprocess.run([str(program), "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "merge" in result.stdout
