"""What reaches a terminal or a pipe, and what is loaded to say it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import adapterhub_tools as at
from adapterhub_tools.cli.output import Output, distribution_text, share_text, size_text
from adapterhub_tools.cli.progress import TerminalProgress, progress_for
from adapterhub_tools.model.protocols import SilentProgress
from tests.tiny_files import make_adapter, write_json

PROGRAM = str(Path(sys.executable).with_name("adaptertool"))


def in_a_pipe(*arguments: object) -> str:
    """Runs the program without a terminal and returns its standard output."""
    command = [PROGRAM, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    ).stdout


def last_line(text: str) -> str:
    return text.rstrip("\n").rpartition("\n")[2]


def on_a_terminal(*arguments: object, **environment: str) -> str:
    """Runs the program with a terminal as standard output and returns what arrived there."""
    master, slave = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    process = subprocess.Popen(
        [PROGRAM, *map(str, arguments)],
        stdout=slave,
        stderr=slave,
        stdin=subprocess.DEVNULL,
        env={**env, "TERM": "xterm-256color", **environment},
    )
    os.close(slave)
    received = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux reports the other side's end as an error
            break
        if not piece:
            break
        received += piece
    os.close(master)
    assert process.wait() == 0
    return received.decode()


def test_no_color_and_pipes_get_no_escape_sequences(adapter: Path) -> None:
    assert "\x1b[" in on_a_terminal("inspect", adapter)
    assert "\x1b" not in on_a_terminal("inspect", adapter, NO_COLOR="1")
    assert "\x1b" not in in_a_pipe("inspect", adapter)


def test_names_from_files_are_neither_markup_nor_control_characters(tmp_path: Path) -> None:
    hostile = "\x1b[31m[red]x\u202e"
    adapter = make_adapter(tmp_path / "a", base_model_name_or_path=hostile)
    for text in (on_a_terminal("inspect", adapter, NO_COLOR="1"), in_a_pipe("inspect", adapter)):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "\\x1b[31m[red]x\\u202e" in text
    write_json(tmp_path / "a" / "adapter_config.json", {"peft_type": hostile})
    assert "\x1b" not in in_a_pipe("inspect", adapter)
    assert "\x1b" not in in_a_pipe("validate", adapter)


def test_progress_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert isinstance(progress_for(Output()), SilentProgress)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(progress_for(Output()), TerminalProgress)
    assert isinstance(progress_for(Output(quiet=True)), SilentProgress)
    assert isinstance(progress_for(Output(as_json=True)), SilentProgress)


def test_progress_counts_what_several_threads_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterhub_tools.cli.progress._INTERVAL_SECONDS", 0.0)
    progress = TerminalProgress()
    progress.advance(1)  # before a phase: nothing to show
    progress.start("merge", 4000)
    bar, task = progress._bar, progress._task
    assert bar is not None
    assert task is not None
    threads = [threading.Thread(target=lambda: [progress.advance(1) for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bar.tasks[task].completed == 4000
    progress.finish()
    progress.finish()
    progress.advance(1)


# --- what is loaded ------------------------------------------------------------------------------


def loaded_by(*arguments: object) -> set[str]:
    code = (
        "import json, sys\nfrom adapterhub_tools.cli.main import main\n"
        f"sys.argv = {['adaptertool', *map(str, arguments)]!r}\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code in (0, None), end.code\n"
        "sys.stdout.flush()\n"
        "print('\\n' + json.dumps([n for n in ('torch', 'numpy', 'jsonschema', 'rich') if n in sys.modules]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(json.loads(last_line(result.stdout)))


def test_describing_and_checking_load_no_tensor_library(base: Path, adapter: Path) -> None:
    at.init(adapter, base=base)
    assert loaded_by("--help") == set()
    assert loaded_by("inspect", adapter, "--base", base, "--json") == set()
    assert loaded_by("inspect", adapter) == {"rich"}
    assert loaded_by("hash", base) == set()
    assert "torch" not in loaded_by("validate", adapter, "--base", base)
    assert "torch" not in loaded_by("init", adapter, "--base", base, "--replace")


# --- small parts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_999, "1.0 MB"),
        (13_476_831_232, "13.5 GB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.5, "50.00%"), (0.00124489, "0.12%"), (1e-6, "0.0001%"), (1.5, "150.00%")]
)
def test_shares(share: float, text: str) -> None:
    assert share_text(share) == text


def test_distributions() -> None:
    assert distribution_text({"16": 64}) == "16"
    assert distribution_text({"8": 1, "16": 3}) == "8 (1 module), 16 (3 modules)"


def test_a_command_whose_output_is_cut_off_does_not_fail_loudly(adapter: Path) -> None:
    result = subprocess.run(
        f"'{PROGRAM}' inspect '{adapter}' -v | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in result.stderr
