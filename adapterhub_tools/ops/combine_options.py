"""What can be asked of a combination."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from adapterhub_tools import registry
from adapterhub_tools.errors import MismatchError, escape
from adapterhub_tools.ops.combine_weights import Weights
from adapterhub_tools.ops.option_checks import check_choice, check_dtype
from adapterhub_tools.ops.rank_policy import RankPolicy

SPACES = ("deltas", "factors")
"""What is combined: what the adapters do, or, as in PEFT's ``add_weighted_adapter``, their factors."""

FULL_RULES = ("delta", "average", "drop")
"""What becomes of tensors that adapters carry in full; see ops/combine_full.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineOptions:
    """The options of a combination.

    Attributes:
        method: a name of the registry ``combine``, or for ``space="factors"`` of PEFT's combination types.
        weights: what each adapter counts.
        hparams: the method's options that were given, by name.
        policy: how ranks are chosen; None for the method's own choice.
        policy_options: the policy as it was asked for, for the history.
        base: the base, where what an adapter does depends on it.
        space: one of SPACES.
        full: one of FULL_RULES.
        allow_disjoint: whether an adapter may share no target module with any other.
        dtype: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"`` for the factors; None takes the
            widest of the inputs.
        seed: of random sketches, and of random masks.
        replace: whether an existing folder may be replaced.
        allow_replace_gap: whether that may leave a moment without a folder.
        threads: the number of workers; None chooses.
        dry_run: whether to compute and report without writing.
    """

    method: str
    weights: Weights
    hparams: Mapping[str, Any] = field(default_factory=dict)
    policy: RankPolicy | None = None
    policy_options: Mapping[str, object] = field(default_factory=dict)
    base: Path | None = None
    space: str = "deltas"
    full: str = "delta"
    allow_disjoint: bool = False
    dtype: str | None = None
    seed: int = 0
    replace: bool = False
    allow_replace_gap: bool = False
    threads: int | None = None
    dry_run: bool = False

    def check_values(self) -> None:
        """Refuses values that no option has; the command line refuses them earlier.

        Raises:
            ValueError: an unknown space, rule or dtype.
        """
        check_choice("space", self.space, SPACES)
        check_choice("full", self.full, FULL_RULES)
        check_dtype(self.dtype)

    def to_json(self) -> dict[str, Any]:
        """Returns the options that decide the result, for the history."""
        return {
            "method": self.method,
            "weights": self.weights.to_json(),
            **self.hparams,
            **self.policy_options,
            "space": self.space,
            "full": self.full,
            "dtype": self.dtype,
            "seed": self.seed,
        }


def implementation(method: str, given: Mapping[str, Any], seed: int, *, count: int) -> Any:
    """Returns a method of the registry with the options that were given.

    Args:
        method: its name.
        given: option -> value; None counts as not given.
        seed: for methods that draw random numbers.
        count: the number of adapters.

    Raises:
        UnsupportedError: no such method.
        MismatchError: an option that it does not have, one that it needs is missing, or a value out of range.
    """
    made = registry.load("combine", method).IMPLEMENTATION
    known = {item.name: item for item in fields(made)}
    values = {name: value for name, value in given.items() if value is not None}
    for name in values:
        if name not in known:
            raise MismatchError.of(
                "option",
                f"{method} has no {name.replace('_', ' ')}.",
                loc=_flag(name),
                remedy=f"Leave {_flag(name)} out, or choose a method that has it.",
            )
    if "seed" in known:
        values["seed"] = seed
    for name, item in known.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise MismatchError.of(
                "option",
                f"{method} needs a value for it.",
                loc=_flag(name),
                remedy=f"Give {_flag(name)}.",
            )
    try:
        found = made.from_options(values)
        found.check(count)
    except ValueError as error:
        wrong = next((name for name in known if str(error).startswith(name)), None)
        raise MismatchError.of(
            "option",
            f"{escape(str(error))}.",
            loc="--method" if wrong is None else _flag(wrong),
            remedy="Choose another method." if wrong is None else _default_of(wrong, method, known[wrong]),
        ) from error
    return found


def _default_of(name: str, method: str, item: Field[Any]) -> str:
    share = " A share of 50 % is written 0.5." if isinstance(item.default, float) else ""
    return f"Without {_flag(name)}, {method} takes {item.default}.{share}"


def refuse_with_into(
    *,
    policy: bool = False,
    base: bool = False,
    space: bool = False,
    full: bool = False,
    undo_without_into: bool = False,
) -> None:
    """Refuses options that mean nothing where the result is a base, or means nothing else.

    Args:
        policy: whether a policy for ranks was given.
        base: whether ``--base`` was.
        space: whether factors are to be combined.
        full: whether a rule for tensors in full was given.
        undo_without_into: whether ``--undo`` was given without ``--into``.

    Raises:
        MismatchError: one of them was given.
    """
    reasons = {
        "--rank": (policy, "a base has no rank, so no policy for ranks applies"),
        "--base": (base, "--into names the base already"),
        "--space": (space, "factors have no meaning in a base"),
        "--full": (full, "tensors in full follow the rules of `merge`"),
        "--undo": (undo_without_into, "only a base can be brought back"),
    }
    for flag, (given, reason) in reasons.items():
        if given:
            raise MismatchError.of("option", f"{reason}.", loc=flag, remedy=f"Leave {flag} out.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
