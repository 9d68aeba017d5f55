"""Runs `adaptertool` many times: one process imports everything once and forks a child for each command.

Importing takes a second, a command a few hundredths. The process is started with an environment of its own
(see `HubServer.env`), because huggingface_hub reads its settings when it is imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 40.0
"""After which a command counts as hung and is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """How a command ended.

    Attributes:
        code: exit status; negative: killed by that signal.
        out: standard output.
        err: standard error.
        seconds: how long it took.
    """

    code: int
    out: str
    err: str
    seconds: float

    @property
    def json(self) -> Any:
        """What `--json` printed."""
        return json.loads(self.out)


class ForkedClient:
    """The process that forks."""

    def __init__(self, env: Mapping[str, str], folder: Path) -> None:
        """Starts it; `folder` is for its files."""
        self._env, self._folder = dict(env), folder
        folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub.forked_client"],
            cwd=REPOSITORY,
            env=self._env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str | Path, **env: str) -> Ran:
        """Runs one command to its end.

        Args:
            arguments: as on the command line, without the program.
            env: variables that differ; an empty value removes one.
        """
        out, err = self._folder / "out.txt", self._folder / "err.txt"
        values = {k: v for k, v in {**self._env, **env}.items() if v}
        request = {"arguments": list(map(str, arguments)), "env": values, "out": str(out), "err": str(err)}
        request["modules"] = str(self._folder / "modules.txt")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        ended = json.loads(self._process.stdout.readline())
        return Ran(code=ended["code"], out=out.read_text(), err=err.read_text(), seconds=ended["seconds"])

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _child(request: dict[str, Any]) -> None:
    """Runs the command and ends this process, whatever happens."""
    code = 70
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.environ.clear()
        os.environ.update(request["env"])
        from adapterhub_tools.cli.main import main

        sys.argv = ["adaptertool", *request["arguments"]]
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        if sys.exc_info()[0] is not None:  # an error that the command did not map
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        Path(request["modules"]).write_text("\n".join(sys.modules))
        os._exit(code)


def _wait(pid: int, limit_seconds: float) -> int:
    end = time.monotonic() + limit_seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.004)


def _import_what_was_needed(listing: Path) -> None:
    """Imports here what a child had to import, so that the next one need not."""
    for name in listing.read_text().split() if listing.exists() else ():
        if name not in sys.modules and not name.startswith("__"):
            with contextlib.suppress(ImportError):  # some modules are made by others and have no file
                import_module(name)


def serve() -> None:
    """Forks for each line of standard input; what the first commands import is kept for the later ones."""
    huggingface_hub.get_session()  # reads the certificates once; it has no connection yet
    for line in sys.stdin:
        request = json.loads(line)
        Path(request["modules"]).unlink(missing_ok=True)
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(request)
        code = _wait(pid, LIMIT_SECONDS)
        seconds = time.monotonic() - began
        _import_what_was_needed(Path(request["modules"]))
        print(json.dumps({"code": code, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    serve()
