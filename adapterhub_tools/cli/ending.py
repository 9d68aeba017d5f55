"""How the program ends where it cannot end by itself: signals, and output that cannot be written.

A signal becomes an exception, so that everything that is being built is removed on the way out, and then the
exit code 128 + its number.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from adapterhub_tools.errors import AdapterError, Problem, StoreError

if TYPE_CHECKING:
    from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked the program to end; not an Exception, so that nothing takes it for a failure.

    Attributes:
        number: the signal.
        exit_code: 128 + its number, as shells have it.
    """

    def __init__(self, number: int) -> None:
        """Keeps the signal's number."""
        super().__init__(number)
        self.number = number
        self.exit_code: int = 128 + number

    def as_error(self) -> AdapterError:
        """Returns what to tell the user."""
        error = AdapterError(
            Problem(
                kind="interrupted",
                message=f"interrupted by {signal.Signals(self.number).name}.",
                remedy="What was not complete has been removed; run it again.",
            )
        )
        error.exit_code = self.exit_code
        return error


def catch_signals() -> None:
    """Makes SIGINT, SIGTERM and SIGHUP raise Interrupted; what the caller ignores (nohup) stays ignored."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    # What follows must not interrupt the clean-up; a second Ctrl-C does, should that hang.
    for other in _SIGNALS:
        signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else _disregard)
    raise Interrupted(number)


def _disregard(number: int, frame: FrameType | None) -> None:
    """Does nothing: SIG_IGN would make the interpreter complain of a signal that came before it was set."""


def remove_unfinished() -> None:
    """Removes working folders that an interruption at an unlucky moment has left to nobody."""
    module = sys.modules.get("adapterhub_tools.store.working_folder")
    if module is not None:
        module.remove_own()


def soften_streams() -> None:
    """Lets standard output and error escape what their encoding does not have instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def system_error(error: OSError) -> StoreError:
    """Returns the StoreError for a system call that failed outside all that reads and writes files.

    It names the file if the error does; else it was the program's own output that could not be written.
    """
    from adapterhub_tools.store.files import store_error

    if error.filename is None:
        return store_error(error, "write the output", "standard output")
    return store_error(error, "use it", os.fsdecode(error.filename))


def drop_output() -> None:
    """Drops what standard output does not take, so that the interpreter's end does not fail with it."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
