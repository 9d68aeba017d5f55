"""How long to try: every request and transfer has a number of tries, a stall time and a time limit."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from adapterhub_tools.errors import HubError, Problem, UnsupportedError, escape

R = TypeVar("R")

SECONDS_PER_MB = 20.0
"""Added to the time limit of a transfer for each megabyte: slower than 50 kB/s is given up."""

_PREFIX = "ADAPTERTOOL_"
_TELL_SECONDS = 5.0
_log = logging.getLogger(__name__)


class TransientError(Exception):
    """A try failed in a way that another try may not.

    Attributes:
        problem: what to raise when no try is left.
        wait_seconds: what the server asked to wait, if it did.
    """

    def __init__(self, problem: Problem, *, wait_seconds: float | None = None) -> None:
        super().__init__(str(problem))
        self.problem = problem
        self.wait_seconds = wait_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """The limits; each is an environment variable too.

    Attributes:
        tries: tries of a request that may be repeated, ``ADAPTERTOOL_TRIES``.
        wait_seconds: before the second try, ``ADAPTERTOOL_RETRY_WAIT``; doubled up to eight times that.
        stall_seconds: without any byte, ``ADAPTERTOOL_TIMEOUT``.
        limit_seconds: for one request or transfer, tries and waits included, ``ADAPTERTOOL_TIME_LIMIT``; a
            transfer has SECONDS_PER_MB more for each megabyte.
    """

    tries: int = 5
    wait_seconds: float = 1.0
    stall_seconds: float = 30.0
    limit_seconds: float = 600.0

    @classmethod
    def from_environment(cls) -> Patience:
        """Returns the limits that the environment sets, or the defaults.

        Raises:
            UnsupportedError: a variable is not a positive number.
        """
        usual = cls()
        return cls(
            tries=max(1, int(_number("TRIES", usual.tries))),
            wait_seconds=_number("RETRY_WAIT", usual.wait_seconds),
            stall_seconds=_number("TIMEOUT", usual.stall_seconds),
            limit_seconds=_number("TIME_LIMIT", usual.limit_seconds),
        )

    def deadline(self, nbytes: int = 0) -> Deadline:
        """Returns a deadline that begins now, for a transfer of ``nbytes``."""
        return Deadline(self.limit_seconds + nbytes / 1e6 * SECONDS_PER_MB)


class Deadline:
    """A point in time after which nothing is tried any more."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left_seconds(self) -> float:
        """Seconds until then; negative after it."""
        return self._end - time.monotonic()

    def check(self, what: str) -> None:
        """Returns if there is time left.

        Raises:
            HubError: there is none.
        """
        if self.left_seconds <= 0:
            raise HubError.of(
                "time-limit",
                f"{what} took longer than the limit of {self._seconds:.0f} s.",
                remedy=f"Try again later, or raise {_PREFIX}TIME_LIMIT.",
            )


def patiently(
    attempt: Callable[[], R],
    patience: Patience,
    deadline: Deadline,
    *,
    repeatable: bool = True,
    progress: Callable[[], int] | None = None,
) -> R:
    """Calls ``attempt`` until it does not raise TransientError, within the limits.

    Args:
        attempt: what to try.
        patience: the number of tries and the waits.
        deadline: when to stop.
        repeatable: False where a second try could do something twice.
        progress: a number that grows while attempts get further; tries are counted anew when it did.

    Raises:
        HubError: no try or no time is left.
    """
    failed, wait = 0, patience.wait_seconds
    reached = progress() if progress else 0
    while True:
        try:
            return attempt()
        except TransientError as error:
            now = progress() if progress else 0
            failed = 1 if now > reached else failed + 1
            if now > reached:
                reached, wait = now, patience.wait_seconds
            pause = wait if error.wait_seconds is None else error.wait_seconds
            if not repeatable or failed >= patience.tries or pause >= deadline.left_seconds:
                raise HubError(error.problem) from error
            if pause > _TELL_SECONDS:
                # Else nobody could tell the wait that a server asks for from a program that hangs.
                _log.warning("%s Trying again in %.0f s.", error.problem.message, pause)
        time.sleep(pause)
        wait = min(wait * 2, 8 * patience.wait_seconds)


def _number(name: str, default: float) -> float:
    text = os.environ.get(_PREFIX + name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e7:
        raise UnsupportedError.of(
            "environment",
            f"{escape(text)!r} is not a positive number.",
            loc=_PREFIX + name,
            remedy="Set it to a number, or unset it.",
        )
    return value
