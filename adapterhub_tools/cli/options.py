"""Options that several commands have, so that the same flag means the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Decorator(Protocol):
    """Adds options to the function of a command."""

    def __call__(self, function: F, /) -> F:
        """Returns the function with the options."""
        ...


def together(*options: Decorator) -> Decorator:
    """Makes one decorator of several options, which the help lists in this order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


DTYPES = click.Choice(["float64", "float32", "bfloat16", "float16"])
"""What ``--dtype`` may be."""

replace_options: Decorator = together(
    click.option("--replace", is_flag=True, help="Replace OUT if it exists, in one step."),
    click.option(
        "--allow-replace-gap",
        is_flag=True,
        help="Replace OUT in two steps where the file system cannot exchange folders.",
    ),
)
"""``--replace`` and ``--allow-replace-gap``, of a command that writes the folder OUT."""

threads_option: Decorator = click.option(
    "--threads", type=click.IntRange(min=1), help="The number of workers; chosen if not given."
)
"""``--threads``."""


def device_option(words: str) -> Decorator:
    """Makes ``--device``, explained by these words."""
    return click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help=words,
    )
