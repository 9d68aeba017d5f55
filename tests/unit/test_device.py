"""CUDA that is not there is exit code 10 wherever it can be asked for, and nothing is computed instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click import Context
from click.testing import CliRunner

import adapterhub_tools as at
from adapterhub_tools.cli.main import cli
from tests.undo.models import make_adapter, make_base

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
COMMANDS = {
    "merge": "merge base adapter out",
    "merge --dry-run": "merge base adapter out --dry-run",
    "merge --undo": "merge base adapter out --undo",
    "unmerge": "unmerge merged out --adapter adapter",
    "unmerge --dry-run": "unmerge merged out --adapter adapter --dry-run",
    "unmerge --approximate": "unmerge merged out --adapter adapter --approximate",
    "verify": "verify base adapter merged",
    "verify --sample full": "verify base adapter merged --sample full",
    "verify --logits": "verify base adapter merged --logits",
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene")
    base, adapter = make_base(folder / "base"), make_adapter(folder / "adapter")
    at.merge(base, adapter, folder / "merged", undo=True)
    return folder


def test_every_command_with_the_option_is_tried() -> None:
    context = Context(cli)
    having = set()
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        if any(option.name == "device" for option in command.params):
            having.add(name)
    assert having == {words.split()[0] for words in COMMANDS.values()}


@without_cuda
@pytest.mark.parametrize("name", COMMANDS)
def test_it_ends_with_10_and_says_what_was_found(
    scene: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scene)
    before = sorted(scene.rglob("*"))
    result = CliRunner().invoke(cli, [*COMMANDS[name].split(), "--device", "cuda", "--json"])
    assert result.exit_code == 10, result.output
    report = json.loads(result.stdout)
    assert (report["error"], report["exit_code"]) == ("DeviceError", 10)
    (problem,) = report["problems"]
    assert (problem["kind"], problem["loc"]) == ("device", "--device")
    assert torch.__version__ in problem["message"]
    assert "--device cpu" in problem["remedy"]
    assert sorted(scene.rglob("*")) == before
    text = CliRunner().invoke(cli, [*COMMANDS[name].split(), "--device", "cuda"])
    assert text.exit_code == 10
    assert "no CUDA device" in text.stderr


@pytest.mark.parametrize("flag", ["--receipt", "--pubkey=key.pub"])
def test_digests_do_not_take_a_device(scene: Path, flag: str) -> None:
    """They are computed on the CPU: a run that names another device would be one in silence."""
    result = CliRunner().invoke(cli, ["verify", str(scene / "merged"), flag, "--device", "cuda"])
    assert result.exit_code == 2
    with pytest.raises(ValueError, match="on the CPU"):
        at.verify(merged=scene / "merged", receipt=True, device="cuda")


def test_a_device_that_nobody_knows(scene: Path) -> None:
    base, adapter, merged = (scene / name for name in ("base", "adapter", "merged"))
    with pytest.raises(ValueError, match="auto, cpu, cuda"):
        at.merge(base, adapter, scene / "out", device="mps")
    with pytest.raises(ValueError, match="auto, cpu, cuda"):
        at.unmerge(merged, scene / "out", adapter=adapter, device="mps")
    with pytest.raises(ValueError, match="auto, cpu, cuda"):
        at.verify(base=base, adapter=adapter, merged=merged, device="mps")
