"""How the program ends early: by signals, on outputs that take nothing, and at paths that cannot be used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

import adapterhub_tools as at
from adapterhub_tools.cli.main import COMMANDS, cli
from adapterhub_tools.store import working_folder
from adapterhub_tools.store.directory import stage
from tests.tiny_files import make_adapter

PROGRAM = str(Path(sys.executable).with_name("adaptertool"))
LONG = "a/" * 2500
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

# A merge that waits in a worker thread, at the first tensor, while its output is half made.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner in the background ignores it
from adapterhub_tools.engine import run
step = run.run_step
def slow(*args):
    time.sleep(0.05)
    return step(*args)
run.run_step = slow
from adapterhub_tools.cli.main import main
main()
"""


def heed_signals() -> None:
    """For a child: what the tests themselves were started with, such as nohup, is not passed on."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def start_merge(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, "merge", "base", "adapter", "out", "--threads", "1", *options],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )


def wait_for_working_folder(folder: Path) -> None:
    end = time.monotonic() + 60
    while not list(folder.glob(".out.tmp-*/new/*.safetensors")):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.usefixtures("base", "adapter")
def test_a_signal_removes_what_is_half_made(tmp_path: Path, number: signal.Signals) -> None:
    process = start_merge(tmp_path)
    wait_for_working_folder(tmp_path)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert stderr.startswith(f"error: interrupted by {number.name}.")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.usefixtures("base", "adapter")
def test_a_signal_as_json_and_a_second_one_while_it_ends(tmp_path: Path) -> None:
    process = start_merge(tmp_path, "--json")
    wait_for_working_folder(tmp_path)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGHUP)
    stdout, stderr = process.communicate(timeout=60)
    found = json.loads(stdout)
    assert stderr == ""
    assert process.returncode == found["exit_code"]
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGHUP)
    assert found["problems"][0]["kind"] == "interrupted"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.usefixtures("base", "adapter")
def test_a_signal_that_the_caller_ignores_stays_ignored(tmp_path: Path) -> None:
    arguments = [PROGRAM, "merge", "base", "adapter", "out"]
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *arguments],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    time.sleep(0.2)  # until the shell has set its trap
    while process.poll() is None:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.05)
    assert process.returncode == 0
    assert (tmp_path / "out").is_dir()


def test_a_working_folder_that_nobody_holds_is_removed_at_the_end(tmp_path: Path) -> None:
    staged = stage(tmp_path / "out", inputs=[])
    staged.__enter__()
    staged.write_bytes("half", b"x")
    assert list(tmp_path.glob(".out.tmp-*"))
    working_folder.remove_own()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 8),
        (("inspect", "adapter"), 8),
        (("hash", "base", "--json"), 8),
        (("validate", "adapter"), 10),
    ],
)
@pytest.mark.usefixtures("base", "adapter")
def test_a_full_output(tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [PROGRAM, *arguments], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == code
    assert result.stderr.startswith("error: standard output: could not write the output: No space left")
    assert result.stderr.count("\n") == 1


def test_a_reader_that_went_away_is_told_nothing(adapter: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [PROGRAM, "inspect", str(adapter)], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (8, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_that_is_no_utf8(tmp_path: Path, encoding: str) -> None:
    adapter = make_adapter(tmp_path / "größe→")
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for options in ((), ("--json",)):
        result = subprocess.run(
            [PROGRAM, "inspect", str(adapter), *options], capture_output=True, env=environment, check=False
        )
        assert result.returncode == 0, result.stderr
        assert b"\\u2192" in result.stdout
    assert json.loads(result.stdout.decode(encoding))["path"] == str(adapter)


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_a_path_that_is_no_utf8_as_json(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / os.fsdecode(b"bad\xff"))
    result = subprocess.run([PROGRAM, "inspect", adapter, "--json"], capture_output=True, check=False)
    assert result.returncode == 0
    assert json.loads(result.stdout.decode("utf-8"))["path"] == str(adapter)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("inspect", LONG), 8),
        (("hash", LONG), 8),
        (("init", LONG), 8),
        (("merge", LONG, "adapter", "out"), 8),
        (("merge", "base", LONG, "out"), 8),
        (("merge", "base", "adapter", LONG), 8),
        (("svd-shrink", LONG, "out", "--rank", "1"), 8),
    ],
)
@pytest.mark.usefixtures("base", "adapter")
def test_a_path_that_is_too_long(tmp_path: Path, arguments: tuple[str, ...], code: int) -> None:
    result = subprocess.run([PROGRAM, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert "could not" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_path_that_is_too_long_in_python(tmp_path: Path, base: Path, adapter: Path) -> None:
    for call in (
        lambda: at.inspect(LONG),
        lambda: at.content_digest(LONG),
        lambda: at.init(LONG),
        lambda: at.load_manifest(LONG),
        lambda: at.merge(LONG, adapter, tmp_path / "out"),
        lambda: at.merge(base, LONG, tmp_path / "out"),
    ):
        with pytest.raises(at.StoreError) as caught:
            call()
        assert caught.value.problems[0].kind == "name-too-long"
    report = at.validate(LONG)
    assert (report.exit_code, report.unchecked[0].kind) == (10, "name-too-long")


def test_an_output_whose_working_folder_has_too_long_a_name(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    out = tmp_path / ("n" * 250)
    with pytest.raises(at.StoreError) as caught:
        at.merge(base, adapter, out)
    problem = caught.value.problems[0]
    assert (problem.kind, problem.file) == ("name-too-long", str(out))
    assert at.merge(base, adapter, tmp_path / ("n" * 230)).changed == 4


@pytest.mark.parametrize("name", COMMANDS)
def test_no_path_is_refused_as_wrong_usage_because_it_cannot_be_read(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    paths = [param.type for param in command.params if isinstance(param.type, click.Path)]
    assert not any(path.readable or path.exists for path in paths)
