"""The weights of a combination: one for each adapter, everywhere or for the modules that a pattern names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan

from adapterhub_tools.dialects.peft import match_keys
from adapterhub_tools.errors import MismatchError, escape

_REMEDY = "Give one number for each adapter, in their order: --weights 0.7,0.3 or --weights PATTERN=1,0."


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What each adapter counts, module by module.

    Attributes:
        default: one number for each adapter, for modules and tensors that no pattern names.
        patterns: pattern -> likewise; a pattern is a regular expression for the end of a module's path, as
            in PEFT's ``rank_pattern``, and the first that matches counts.
    """

    default: tuple[float, ...]
    patterns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @classmethod
    def parse(cls, entries: Sequence[str], count: int) -> Weights:
        """Reads ``"0.7,0.3"`` and ``"PATTERN=1,0"``; the one without pattern stands once.

        Args:
            entries: what was given.
            count: the number of adapters.

        Raises:
            MismatchError: none without pattern, a number that is none or not finite, or as many numbers as
                there are not adapters; or every number is 0.
        """
        default: tuple[float, ...] | None = None
        patterns: dict[str, tuple[float, ...]] = {}
        for entry in entries:
            pattern, equals, numbers = entry.rpartition("=")
            found = _numbers(entry, numbers)
            if len(found) != count:
                weights = f"{len(found)} weight{'s'[: len(found) != 1]}"
                raise MismatchError.of(
                    "weights",
                    f"{escape(repr(entry))} has {weights}; expected {count}, one for each adapter.",
                    loc="--weights",
                    remedy=_REMEDY,
                )
            if pattern in patterns if equals else default is not None:
                raise MismatchError.of(
                    "weights", f"{escape(repr(entry))} is given twice.", loc="--weights", remedy=_REMEDY
                )
            if equals and not pattern:
                raise MismatchError.of(
                    "weights",
                    f"{escape(repr(entry))} has an empty pattern.",
                    loc="--weights",
                    remedy=_REMEDY,
                )
            if equals:
                patterns[pattern] = found
            else:
                default = found
        if default is None:
            raise MismatchError.of(
                "weights",
                "weights for the modules that no pattern names are missing.",
                loc="--weights",
                remedy=_REMEDY,
            )
        if not any(any(numbers) for numbers in (default, *patterns.values())):
            raise MismatchError.of(
                "weights",
                "every weight is 0, so nothing of any adapter would be left.",
                loc="--weights",
                remedy=_REMEDY,
            )
        return cls(default=default, patterns=patterns)

    def of(self, paths: Sequence[str]) -> dict[str, tuple[float, ...]]:
        """Returns the weights of each path.

        Raises:
            MismatchError: a pattern names none of them.
            FormatError: a pattern is no regular expression.
        """
        keys = list(self.patterns)
        hits = match_keys(keys, paths, loc="--weights")
        unused = set(range(len(keys))) - {found[0] for found in hits if found}
        if unused:
            raise MismatchError.of(
                "weight-pattern",
                f"no module takes its weights from {escape(repr(keys[min(unused)]))}.",
                loc="--weights",
                remedy="A pattern is a regular expression for the end of a module's path, such as "
                "'layers\\.[0-7]\\..*'; the first that matches counts.",
            )
        return {
            path: self.patterns[keys[found[0]]] if found else self.default
            for path, found in zip(paths, hits, strict=True)
        }

    def reordered(self, order: Sequence[int]) -> Weights:
        """Returns the same weights with the adapters in another order.

        Args:
            order: for each new place, the old one.
        """
        return Weights(
            default=tuple(self.default[i] for i in order),
            patterns={key: tuple(found[i] for i in order) for key, found in self.patterns.items()},
        )

    def to_json(self) -> dict[str, list[float]]:
        """Returns pattern -> numbers, the default under ``"*"``."""
        return {"*": list(self.default), **{key: list(found) for key, found in self.patterns.items()}}


def _numbers(entry: str, text: str) -> tuple[float, ...]:
    found = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = nan
        if not isfinite(number):
            raise MismatchError.of(
                "weights",
                f"{escape(repr(entry))} holds {escape(repr(part))}; expected finite numbers, with commas "
                "between them.",
                loc="--weights",
                remedy=_REMEDY,
            )
        found.append(number)
    return tuple(found)
