"""What docs/ci.md tells people to paste works: the hook, the workflow's commands, and the pytest example."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml
from click.testing import CliRunner

from adapterhub_tools.cli.main import cli
from tests.tiny_files import make_adapter

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "ci.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found


def run_hook(hook: dict[str, object], files: list[Path]) -> int:
    """Calls the entry as pre-commit does: with the files whose names match, as arguments."""
    program, *arguments = shlex.split(str(hook["entry"]))
    assert program == "adaptertool"
    chosen = [str(file) for file in files if re.search(str(hook["files"]), str(file))]
    assert chosen
    return CliRunner().invoke(cli, [*arguments, *chosen]).exit_code


def test_the_hook_checks_each_adapter_once(tmp_path: Path) -> None:
    (hook,) = yaml.safe_load((REPOSITORY / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    good, bad = make_adapter(tmp_path / "good"), make_adapter(tmp_path / "bad", r=3)
    assert run_hook(hook, sorted(good.iterdir())) == 0
    assert run_hook(hook, sorted([*good.iterdir(), *bad.iterdir()])) == 1


def test_the_local_hook_on_the_page_is_the_same() -> None:
    (hook,) = yaml.safe_load((REPOSITORY / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    local = next(
        item
        for text in blocks("yaml")
        if "repo: local" in text
        for item in yaml.safe_load(text)["repos"][0]["hooks"]
    )
    for key in ("id", "entry", "files", "require_serial"):
        assert local[key] == hook[key], key


def test_the_commands_on_the_page_exist() -> None:
    lines = [line for text in blocks("yaml") for line in text.splitlines() if "adaptertool " in line]
    commands = [
        line.partition("adaptertool ")[2] for line in lines if "install" not in line and "#" not in line
    ]
    assert len(commands) >= 3
    for command in commands:
        words = shlex.split(command.split(">")[0])
        if words[0] in {"validate", "push"}:
            help_text = CliRunner().invoke(cli, [words[0], "--help"]).output
            assert all(word in help_text for word in words if word.startswith("--")), command


def test_the_pytest_example_passes_and_fails(tmp_path: Path) -> None:
    (example,) = blocks("python")
    (tmp_path / "test_adapters.py").write_text(example, encoding="utf-8")
    make_adapter(tmp_path / "adapters" / "good")

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_adapters.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    assert run().returncode == 0
    make_adapter(tmp_path / "adapters" / "bad", r=3)
    failed = run()
    assert failed.returncode == 1
    assert "1 failed, 2 passed" in failed.stdout
