"""The command fit: what it prints, its exit codes, and that the page about servers is the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adapterhub_tools.cli.main import cli
from adapterhub_tools.ops.server_table import server, server_names
from tests.tiny_files import make_adapter

PAGE = Path(__file__).resolve().parents[2] / "docs" / "servers.md"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["fit", *map(str, arguments)])


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "a", alpha_pattern={"v_proj": 2})


def test_check_says_whether_it_fits(tmp_path: Path, uneven: Path) -> None:
    even = make_adapter(tmp_path / "even")
    assert run(even, "--for", "vllm", "--check").exit_code == 0
    result = run(uneven, "--for", "vllm", "--check")
    assert result.exit_code == 1
    assert "can be rewritten" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "even"]


def test_a_rewrite_says_what_was_done(tmp_path: Path, uneven: Path) -> None:
    result = run(uneven, tmp_path / "out", "--for", "llama.cpp", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.output)
    assert data["report"] == "fit-1.0"
    assert data["verdict"] == "rewritten"
    assert all(item["exact"] for item in data["modules"])
    assert {"feature", "found", "verdict", "says", "source", "remedy"} <= set(data["findings"][0])
    assert data["config"]["alpha_pattern"] == {}
    text = run(uneven, tmp_path / "again", "--for", "llama.cpp", "-v").output
    assert "https://github.com/ggml-org" in text
    assert text.splitlines()[-1].startswith("fit for llama.cpp: 2 modules rewritten, 2 of them exactly")


def test_a_refusal_has_reason_source_and_remedy(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", peft_type="IA3")
    result = run(adapter, tmp_path / "out", "--for", "vllm", "--json")
    assert result.exit_code in (3, 4)
    assert not (tmp_path / "out").exists()
    assert all(problem["remedy"] for problem in json.loads(result.output)["problems"])


def test_usage(tmp_path: Path, uneven: Path) -> None:
    assert run(uneven, "--for", "vllm").exit_code == 2
    assert run(uneven, tmp_path / "out").exit_code == 2
    assert run(uneven, tmp_path / "out", "--for", "ollama").exit_code == 2
    result = run(uneven, tmp_path / "out", "--for", "vllm", "--dry-run")
    assert result.exit_code == 0
    assert "nothing was written" in result.output
    assert not (tmp_path / "out").exists()


def test_the_table_in_the_docs_is_the_table_in_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in server_names():
        item = server(name)
        assert item.title in page
        assert item.checked in page
        rows = page.split(f"## {item.title}\n")[1].split("\n## ")[0]
        found = [line for line in rows.splitlines() if line.startswith("| `")]
        assert found == [
            f"| `{feature}` | {_word(row.accepts)} | {row.says} ([source]({row.source})) |"
            for feature, row in sorted(item.features.items())
        ]


def _word(accepts: bool | str | tuple[str, ...]) -> str:
    if isinstance(accepts, tuple):
        return ", ".join(accepts)
    return {True: "yes", False: "no", "unknown": "the model decides"}[accepts]
