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
from tests.tiny_files import adapter_config, make_adapter, write_json

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


def hooks() -> dict[str, dict[str, object]]:
    listed = yaml.safe_load((REPOSITORY / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    return {hook["entry"].split()[1]: hook for hook in listed}


def test_the_hooks_check_each_adapter_once(tmp_path: Path) -> None:
    good, bad, evil = (make_adapter(tmp_path / name) for name in ("good", "bad", "evil"))
    write_json(bad / "adapter_config.json", adapter_config(r=3))
    (evil / "optimizer.pt").write_bytes(b"\x80\x02N.")
    found = {"validate": bad, "scan": evil}
    assert set(hooks()) == set(found)
    for name, hook in hooks().items():
        assert run_hook(hook, sorted(good.iterdir())) == 0
        assert run_hook(hook, sorted([*good.iterdir(), *found[name].iterdir()])) == 1


def test_the_local_hooks_on_the_page_are_the_same() -> None:
    local = [
        item
        for text in blocks("yaml")
        if "repo: local" in text
        for item in yaml.safe_load(text)["repos"][0]["hooks"]
    ]
    assert len(local) == len(hooks())
    for item, hook in zip(local, hooks().values(), strict=True):
        for key in ("id", "name", "entry", "files", "require_serial"):
            assert item[key] == hook[key], key


def test_the_commands_on_the_page_exist() -> None:
    lines = [line for text in blocks("yaml") for line in text.splitlines() if "adaptertool " in line]
    commands = [
        line.partition("adaptertool ")[2] for line in lines if "install" not in line and "#" not in line
    ]
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(command.split(">")[0])
        if words[0] in {"validate", "scan", "push"}:
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
