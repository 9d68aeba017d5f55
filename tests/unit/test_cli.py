"""The command line: exit codes, JSON, colours, quietness, what is loaded; run as a program where needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import adapterhub_tools as at
from adapterhub_tools.cli.main import COMMANDS, cli
from adapterhub_tools.cli.output import share_text
from tests.tiny_files import (
    HEADS_OUT,
    WIDTH,
    adapter_tensors,
    base_tensors,
    counted,
    make_adapter,
    make_base,
    write_safetensors,
)

PROGRAM = str(Path(sys.executable).with_name("adaptertool"))


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the installed program, without a terminal."""
    return subprocess.run(
        [PROGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def call(*arguments: object) -> Result:
    """Runs a command in this process."""
    return CliRunner().invoke(cli, [str(item) for item in arguments])


def last_line(text: str) -> str:
    return text.rstrip("\n").rpartition("\n")[2]


# --- help ----------------------------------------------------------------------------------------


def test_help_lists_every_command_in_the_order_of_work() -> None:
    result = call("--help")
    assert result.exit_code == 0
    places = [result.output.index(f"  {name} ") for name in COMMANDS]
    assert places == sorted(places)
    for line in COMMANDS.values():
        assert line in result.output


def test_version() -> None:
    assert at.__version__ in call("--version").output


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert version("adaptertool") == at.__version__


@pytest.mark.parametrize("name", ["os", "../api", "output", "main", "tool_command"])
def test_only_listed_names_are_commands(name: str) -> None:
    result = call(name)
    assert result.exit_code == 2
    assert "No such command" in result.output


# --- success -------------------------------------------------------------------------------------


def test_every_command_ends_with_a_line_that_proves_it(tmp_path: Path, base: Path, adapter: Path) -> None:
    out = tmp_path / "out"
    found = call("init", adapter, "--base", base)
    assert found.exit_code == 0, found.output
    manifest = at.load_manifest(adapter)
    assert manifest.digest is not None
    assert manifest.base.digest is not None
    for fact in ("4 target modules", "2 files", manifest.digest, manifest.base.digest, str(adapter)):
        assert fact in last_line(found.output)
    assert last_line(call("hash", base).output) == manifest.base.digest
    assert last_line(call("validate", adapter, "--base", base).output).startswith(
        f"valid: {adapter}; checked"
    )
    trained = at.inspect(adapter).parameters
    assert f"4 target modules, {trained} trainable" in last_line(call("inspect", adapter).output)
    merged = call("merge", base, adapter, out)
    assert merged.exit_code == 0, merged.output
    assert "4 of 4 target tensors" in last_line(merged.output)
    assert at.content_digest(out).digest in last_line(merged.output)
    assert str(out) in last_line(merged.output)


def test_quiet_prints_the_last_line_only(base: Path, adapter: Path) -> None:
    for arguments in (
        ("inspect", adapter),
        ("inspect", base),
        ("init", adapter),
        ("validate", adapter),
        ("hash", base),
    ):
        loud, quiet = call(*arguments, *(["--replace"] if arguments[0] == "init" else [])), None
        quiet = call(*arguments, "-q", *(["--replace"] if arguments[0] == "init" else []))
        assert quiet.output.count("\n") == 1
        assert quiet.output == last_line(loud.output) + "\n"


def test_verbose_prints_every_module(adapter: Path, base: Path) -> None:
    assert "model.layers.1.self_attn.v_proj" not in call("inspect", adapter).output
    assert "model.layers.1.self_attn.v_proj" in call("inspect", adapter, "-v").output
    assert "model.norm.weight" in call("hash", base, "-v").output
    assert "not checked: base" in call("validate", adapter, "-v").output


@pytest.mark.parametrize("order", [("-q", "-v"), ("-v", "-q")])
def test_quiet_and_verbose_exclude_each_other(adapter: Path, order: tuple[str, str]) -> None:
    result = call("inspect", adapter, *order)
    assert result.exit_code == 2
    assert "exclude each other" in result.output


def test_inspect_shows_what_it_found(tmp_path: Path, base: Path) -> None:
    adapter = make_adapter(tmp_path / "a", use_rslora=True, init_lora_weights="pissa")
    text = call("inspect", adapter, "--base", base).output
    share = at.inspect(adapter, base=base).share
    for fact in (
        "alpha/sqrt(rank) = 2.82843",
        "q_proj",
        "8×8",
        "4×8",
        share_text(share),
        "can be merged         no",
    ):
        assert fact in text, fact
    assert "not mergeable" in text
    text = call("inspect", base).output
    for fact in ("llama", "LlamaForCausalLM", "tied embeddings  yes", "F32"):
        assert fact in text, fact


def test_a_dry_run_writes_nothing(tmp_path: Path, base: Path, adapter: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    result = call("merge", base, adapter, tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "nothing was written" in last_line(result.output)
    assert "buffers" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_merge_passes_its_options_on(tmp_path: Path, base: Path, adapter: Path) -> None:
    other = make_adapter(tmp_path / "other", lora_alpha=2)
    made = {}
    for name, options in {
        "both": ("--scale", "1", "--scale", "0.5"),
        "single": ("--scale", "1", "--threads", "1", "--device", "cpu", "--check-base", "off"),
        "half": ("--dtype", "float16"),
    }.items():
        adapters = (adapter, other) if name == "both" else (adapter,)
        result = call("merge", base, *adapters, tmp_path / name, "--json", *options)
        assert result.exit_code == 0, result.output
        made[name] = json.loads(result.output)
    assert made["both"]["modules"] == 8
    assert len({report["digest"] for report in made.values()}) == 3
    again = call("merge", base, adapter, tmp_path / "both", "--replace", "--json")
    assert json.loads(again.output)["digest"] == made["single"]["digest"]


def test_init_reads_its_options(adapter: Path) -> None:
    arguments = ["--tag", "a", "--tag", "b", "--licence", "mit", "--base-id", "x/y", "--revision", "r1"]
    arguments += ["--quantisation", '{"scheme": "bitsandbytes-nf4", "double": true}']
    for pair in ("optimizer=adamw", "lora_plus_ratio=16", 'galore={"rank": 4}', "note=a=b", "version=1.2.3"):
        arguments += ["--training", pair]
    result = call("init", adapter, *arguments)
    assert result.exit_code == 0, result.output
    manifest = at.load_manifest(adapter)
    assert manifest.training == {
        "optimizer": "adamw",
        "lora_plus_ratio": 16,
        "galore": {"rank": 4},
        "note": "a=b",
        "version": "1.2.3",
    }
    assert (manifest.tags, manifest.licence) == (("a", "b"), "mit")
    assert (manifest.base.id, manifest.base.revision) == ("x/y", "r1")
    assert manifest.base.quantisation == {"scheme": "bitsandbytes-nf4", "double": True}


@pytest.mark.parametrize(
    "options",
    [
        ("--training", "no-equals"),
        ("--training", "=value"),
        ("--quantisation", "{"),
        ("--quantisation", "[1]"),
    ],
)
def test_malformed_options_are_usage_errors(adapter: Path, options: tuple[str, str]) -> None:
    assert call("init", adapter, *options).exit_code == 2
    assert not (adapter / "adapter_manifest.json").exists()


# --- errors --------------------------------------------------------------------------------------


def test_exit_codes_of_the_program(tmp_path: Path, base: Path, adapter: Path) -> None:
    broken = make_adapter(tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"short")
    pissa = make_adapter(tmp_path / "pissa", init_lora_weights="pissa")
    wide = make_adapter(
        tmp_path / "wide",
        tensors={
            n: counted("F32", 2, WIDTH + 1) if "lora_A" in n else t for n, t in adapter_tensors().items()
        },
    )
    other = make_base(tmp_path / "other")
    tensors = base_tensors()
    tensors["model.layers.0.self_attn.v_proj.weight"] = counted("F32", HEADS_OUT, WIDTH, start=6)
    write_safetensors(other / "model.safetensors", tensors)
    recorded = make_adapter(tmp_path / "recorded")
    at.init(recorded, base=base)
    out = tmp_path / "out"
    expected = {
        ("validate", adapter): 0,
        ("validate", broken): 1,
        ("merge", base, adapter): 2,
        ("inspect", broken): 3,
        ("merge", base, pissa, out): 4,
        ("merge", base, wide, out): 5,
        ("merge", other, recorded, out): 7,
        ("inspect", tmp_path / "nothing"): 8,
        ("validate", tmp_path / "nothing"): 10,
    }
    for arguments, code in expected.items():
        result = run(*arguments)
        assert result.returncode == code, (arguments, result.stdout, result.stderr)
        assert "Traceback" not in result.stderr
        assert not out.exists()
        if code >= 2 and arguments[0] != "validate":
            assert result.stdout == ""
            assert result.stderr


def test_an_error_as_json_has_the_same_content_on_standard_output(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / "adapter_model.safetensors").write_bytes(b"short")
    plain, as_json = run("inspect", adapter), run("inspect", adapter, "--json")
    assert as_json.returncode == plain.returncode == 3
    assert as_json.stderr == ""
    data = json.loads(as_json.stdout)
    assert (data["report"], data["error"], data["exit_code"]) == ("error-1.0", "FormatError", 3)
    for problem in data["problems"]:
        assert problem["message"] in plain.stderr
        assert problem["remedy"] in plain.stderr


def test_every_report_as_json(tmp_path: Path, base: Path, adapter: Path) -> None:
    commands: dict[tuple[object, ...], str] = {
        ("inspect", adapter): "inspect-1.0",
        ("inspect", base): "inspect-1.0",
        ("init", adapter, "--base", base): "init-1.0",
        ("validate", adapter): "validate-1.0",
        ("hash", base): "hash-1.0",
        ("merge", base, adapter, tmp_path / "out"): "merge-1.0",
    }
    for arguments, name in commands.items():
        result = call(*arguments, "--json")
        assert result.exit_code == 0, result.output
        data: dict[str, Any] = json.loads(result.output)
        assert data["report"] == name


def test_other_exceptions_are_not_hidden(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("a fault of this program")

    monkeypatch.setattr("adapterhub_tools.api.inspect", fails)
    assert isinstance(call("inspect", adapter).exception, RuntimeError)


def test_the_group_is_click(base: Path) -> None:
    assert isinstance(cli, click.Group)
    assert cli.get_command(click.Context(cli), "hash") is not None
