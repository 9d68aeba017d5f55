"""Asks the fork server for merges, each in a process of its own that can be traced before it begins."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT = 60.0
"""Seconds after which a merge counts as hung; one takes 0.05."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a merge ended.

    Attributes:
        answer: what it reported: ``digest``, or ``error`` with its problems, or ``traceback``; {} if killed.
        status: the status of its process, as ``os.waitpid`` gives it.
    """

    answer: dict[str, Any]
    status: int

    @property
    def done(self) -> bool:
        return "digest" in self.answer

    @property
    def killed(self) -> bool:
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL


@dataclass(slots=True, kw_only=True)
class Merge:
    """A merge in a process of its own.

    Attributes:
        pid: that process.
        thread: the thread that waits; set by ``until_waiting``.
    """

    pid: int
    thread: int = 0
    _server: MergeServer
    _report: int
    _go: int
    _lines: list[bytes] = field(default_factory=list)
    _rest: bytes = b""

    def until_waiting(self) -> int:
        """Waits until the process stands before its merge, and returns the thread to trace."""
        line = self._line()
        assert line is not None, "the process ended before it waited"
        message = json.loads(line)
        assert "thread" in message, message
        self.thread = message["thread"]
        return self.thread

    def go(self) -> None:
        with suppress(BrokenPipeError):  # it ended before it waited, and its report says why
            os.write(self._go, b"g")

    @property
    def ended(self) -> bool:
        """Whether it has reported its end, or is dead."""
        return bool(self._lines) or bool(select.select([self._report], [], [], 0)[0])

    def end(self) -> Ended:
        """Waits for the end, at most TIMEOUT seconds; a merge that hangs is killed and fails the test."""
        line = self._line()
        answer = {} if line is None else json.loads(line)
        os.close(self._report)
        os.close(self._go)
        return Ended(answer=answer, status=self._server.ask({"wait": self.pid}))

    def _line(self) -> bytes | None:
        while not self._lines:
            ready, _, _ = select.select([self._report], [], [], TIMEOUT)
            if not ready:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"the merge in process {self.pid} hangs")
            data = os.read(self._report, 1 << 16)
            if not data:
                return None
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._lines += lines
        return self._lines.pop(0)


class MergeServer:
    """The fork server's client; a context manager."""

    def __init__(self, warm: dict[str, Any]) -> None:
        """Starts the server and lets it do one merge, whose keywords are given, so that all is imported."""
        ours, theirs = socket.socketpair()
        single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fork_server", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=REPOSITORY,
            env={**os.environ, **single, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        theirs.close()
        self._socket = ours
        self.ask({"warm": warm})

    def __enter__(self) -> MergeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.wait(TIMEOUT)

    def ask(self, message: dict[str, Any], descriptors: Iterable[int] = ()) -> int:
        socket.send_fds(self._socket, [json.dumps(message).encode()], list(descriptors))
        answer = self._socket.recv(1 << 16)
        assert answer, "the fork server ended"
        number: int = json.loads(answer)
        return number

    def start(self, merge: dict[str, Any], **request: Any) -> Merge:
        """Forks a process that waits before its merge; see ``fork_server`` for what may be asked."""
        report_read, report_write = os.pipe()
        go_read, go_write = os.pipe()
        pid = self.ask({"merge": merge, **request}, (report_write, go_read))
        os.close(report_write)
        os.close(go_read)
        return Merge(pid=pid, _server=self, _report=report_read, _go=go_write)

    def run(self, merge: dict[str, Any], **request: Any) -> Ended:
        """Runs a merge without disturbance."""
        started = self.start(merge, **request)
        started.go()
        line = started._line()
        if line is not None and b'"thread"' not in line:
            started._lines.insert(0, line)  # it failed before it waited
        return started.end()
