"""Reading a method's hyperparameters: each must be there, of its type, and one that is understood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub_tools.errors import FormatError, UnsupportedError, escape


def integer(hparams: Mapping[str, Any], name: str, *, at_least: int = 1) -> int:
    """Returns an integer hyperparameter.

    Raises:
        FormatError: it is absent, of another type, or too small.
    """
    value = hparams.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and value >= at_least:
        return value
    raise _wrong(name, value, f"an integer of at least {at_least}")


def number(hparams: Mapping[str, Any], name: str) -> float:
    """Returns a finite number as binary64.

    Raises:
        FormatError: it is absent or no finite number.
    """
    value = hparams.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value - value == 0:
        return float(value)
    raise _wrong(name, value, "a finite number")


def boolean(hparams: Mapping[str, Any], name: str, *, absent: bool | None = None) -> bool:
    """Returns a boolean.

    Args:
        hparams: the hyperparameters.
        name: its name.
        absent: the value where there is none; None makes that an error.

    Raises:
        FormatError: it is absent or of another type.
    """
    value = hparams.get(name, absent)
    if isinstance(value, bool):
        return value
    raise _wrong(name, value, "true or false")


def booleans(hparams: Mapping[str, Any], name: str) -> tuple[bool, ...]:
    """Returns a list of booleans of which one at least is true.

    Raises:
        FormatError: it is absent or something else.
    """
    value = hparams.get(name)
    if isinstance(value, list) and any(value) and all(isinstance(item, bool) for item in value):
        return tuple(value)
    raise _wrong(name, value, "a list of booleans, one of them true")


def choice(hparams: Mapping[str, Any], name: str, allowed: Sequence[Any]) -> Any:
    """Returns a hyperparameter that has a few values.

    Raises:
        UnsupportedError: it has another one, which may change the maths.
    """
    value = hparams.get(name)
    if any(value is one or (type(value) is type(one) and value == one) for one in allowed):
        return value
    shown = ", ".join(map(repr, allowed))
    raise UnsupportedError.of(
        "option",
        f"{name} is {escape(repr(value))}; what is understood is {shown}.",
        loc=name,
        remedy="Merge it with PEFT (merge_and_unload), or use a later version of adaptertool.",
    )


def _wrong(name: str, value: object, expected: str) -> FormatError:
    found = "absent" if value is None else escape(repr(value))
    return FormatError.of(
        "hyperparameter",
        f"{name} is {found}; expected {expected}.",
        loc=name,
        remedy="Correct the adapter's config; PEFT writes every field when it saves an adapter.",
    )
