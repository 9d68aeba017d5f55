"""How a rank is chosen from singular values: one rule for every module, or one budget for all of them.

``sv_ratio``, ``sv_cumulative`` and ``sv_fro`` are the rules that the diffusion community knows from kohya's
``resize_lora``, by the same names. With σ₁ ≥ σ₂ ≥ … the singular values of a module's delta:

    rank            the given number, or what the module has if that is less
    energy e        the smallest k with Σ_{j≤k} σ_j² ≥ e · Σ σ_j²
    max_error e     the smallest k with √Σ_{j>k} σ_j² ≤ e · √Σ σ_j²
    sv_ratio q      the number of σ_j > σ₁ / q
    sv_cumulative c the smallest k with Σ_{j≤k} σ_j ≥ c · Σ σ_j
    sv_fro f        the smallest k with √Σ_{j≤k} σ_j² ≥ f · √Σ σ_j², so energy f²
    budget          at most so many parameters or bytes for all tensors of the adapter, or such a share of
                    the values of its factors; ranks go to the singular values with the largest σ² per
                    parameter, so that the total squared error is least

No module gets rank 0, which PEFT cannot express.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING

from adapterhub_tools.dialects.peft import match_keys
from adapterhub_tools.errors import MismatchError, escape

if TYPE_CHECKING:
    from torch import Tensor

SHARES = ("energy", "max_error", "sv_ratio", "sv_cumulative", "sv_fro")
"""The policies that look at one module's singular values."""

_RANGES = {"sv_ratio": "a number of at least 1", "max_error": "a number from 0 to 1"}
_SHARE = "a number above 0 and up to 1"
_BUDGET = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[kMG]?B|[KMG]iB|[kMG]?)\s*")
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How large an adapter may be, its tensors alone.

    Attributes:
        amount: how much of it.
        unit: ``"share"`` of the values that its factors have now, ``"values"`` or ``"bytes"`` of all tensors.
    """

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads ``"50%"``, ``"2M"`` (parameters) or ``"8MiB"`` (bytes).

        Raises:
            MismatchError: anything else.
        """
        match = _BUDGET.fullmatch(text)
        amount = float(match[1]) if match else 0.0
        if match is None or amount <= 0 or not isfinite(amount):
            raise MismatchError.of(
                "budget",
                f"{escape(repr(text))} is no budget.",
                loc="--budget",
                remedy="Give a share (50%), a number of parameters (2M) or a size (8MiB).",
            )
        if match[2] == "%":
            return cls(amount=amount / 100, unit="share")
        if match[2] in _BYTES:
            return cls(amount=amount * _BYTES[match[2]], unit="bytes")
        return cls(amount=amount * _UNITS[match[2]], unit="values")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPolicy:
    """Exactly one rule for the ranks.

    Attributes:
        name: ``"rank"``, one of SHARES, or ``"budget"``.
        value: the number of the rule; for ``"rank"`` the default, or None to leave other modules alone.
        patterns: for ``"rank"``, pattern -> rank, as in PEFT's rank_pattern.
        budget: for ``"budget"``.
    """

    name: str
    value: float | None = None
    patterns: Mapping[str, int] = field(default_factory=dict)
    budget: Budget | None = None

    @classmethod
    def of(
        cls,
        *,
        rank: int | str | Sequence[int | str] | None = None,
        energy: float | None = None,
        max_error: float | None = None,
        budget: str | None = None,
        sv_ratio: float | None = None,
        sv_cumulative: float | None = None,
        sv_fro: float | None = None,
    ) -> RankPolicy:
        """Makes the policy of a command's options.

        Raises:
            MismatchError: none or more than one is given, or a value is out of its range.
        """
        shares = {
            "energy": energy,
            "max_error": max_error,
            "sv_ratio": sv_ratio,
            "sv_cumulative": sv_cumulative,
            "sv_fro": sv_fro,
        }
        ranks = [rank] if isinstance(rank, int | str) else list(rank or ())
        given = [name for name, value in shares.items() if value is not None]
        given += ["rank"] if ranks else []
        given += ["budget"] if budget is not None else []
        if len(given) != 1:
            named = ", ".join("--" + name.replace("_", "-") for name in ("rank", *SHARES, "budget"))
            found = "none" if not given else " and ".join(sorted(given))
            raise MismatchError.of(
                "policy",
                f"a policy for the ranks is needed, exactly one; found {found}.",
                remedy=f"Give one of {named}.",
            )
        if ranks:
            return _fixed(ranks)
        if budget is not None:
            return cls(name="budget", budget=Budget.parse(budget))
        value = shares[given[0]]
        low, high = {"sv_ratio": (1.0, float("inf")), "max_error": (0.0, 1.0)}.get(given[0], (0.0, 1.0))
        if value is None or not (low <= value <= high) or (value == 0.0 and given[0] != "max_error"):
            raise MismatchError.of(
                "policy",
                f"{value} is out of range; expected {_RANGES.get(given[0], _SHARE)}.",
                loc="--" + given[0].replace("_", "-"),
                remedy="It is a ratio: 10 keeps what is above a tenth of the largest."
                if given[0] == "sv_ratio"
                else "It is a share: 99 % is 0.99.",
            )
        return cls(name=given[0], value=float(value))

    def fixed_ranks(self, paths: Sequence[str]) -> dict[str, int | None]:
        """Returns for ``"rank"`` each module's rank; None leaves it as it is.

        Raises:
            MismatchError: a pattern matches no module.
            FormatError: a pattern is no regular expression.
        """
        default = None if self.value is None else int(self.value)
        keys = list(self.patterns)
        found = match_keys(keys, paths, loc="--rank")
        unused = set(range(len(keys))) - {hits[0] for hits in found if hits}
        if unused:
            raise MismatchError.of(
                "rank-pattern",
                f"no module of the adapter takes its rank from {escape(repr(keys[min(unused)]))}.",
                loc="--rank",
                remedy="A pattern is a regular expression for the end of a module's path; the first that "
                "matches counts.",
            )
        return {
            path: self.patterns[keys[hits[0]]] if hits else default
            for path, hits in zip(paths, found, strict=True)
        }

    def rank_of(self, values: Tensor, *, total: float | None = None) -> int:
        """Returns the rank that one of SHARES gives to a module; at least 1.

        Args:
            values: its singular values, descending.
            total: the squared norm, if ``values`` are not all of them; not for ``sv_cumulative``.
        """
        from adapterhub_tools.linalg.factored_svd import rank_for_energy, rank_for_error

        amount = self.value or 0.0
        if self.name == "energy":
            return max(1, rank_for_energy(values, amount, total=total))
        if self.name == "sv_fro":
            return max(1, rank_for_energy(values, amount * amount, total=total))
        if self.name == "max_error":
            return max(1, rank_for_error(values, amount, total=total))
        if self.name == "sv_ratio":
            largest = float(values[0]) if values.numel() else 0.0
            return max(1, int((values > largest / amount).sum()))
        if self.name == "sv_cumulative":
            roots = values.sqrt()  # rank_for_energy sums squares
            return max(1, rank_for_energy(roots, amount))
        raise ValueError(f"{self.name} is not a policy for one module")


def _fixed(ranks: Sequence[int | str]) -> RankPolicy:
    default: int | None = None
    patterns: dict[str, int] = {}
    for entry in ranks:
        pattern, equals, number = str(entry).rpartition("=")
        try:
            value = int(number)
        except ValueError:
            value = 0
        repeated = pattern in patterns if equals else default is not None
        if value < 1 or repeated or (equals and not pattern):
            raise MismatchError.of(
                "rank",
                f"{escape(repr(entry))} is {'given twice' if value >= 1 and repeated else 'no rank'}.",
                loc="--rank",
                remedy="Give a positive number, or PATTERN=NUMBER, each once.",
            )
        if equals:
            patterns[pattern] = value
        else:
            default = value
    return RankPolicy(name="rank", value=default, patterns=patterns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A module that takes part in a budget.

    Attributes:
        values: its singular values, scaled as they act, descending.
        cost: what one more rank costs, in the budget's unit.
    """

    values: Sequence[float]
    cost: float


def allot(claims: Sequence[Claim], amount: float) -> list[int]:
    """Returns a rank for each module such that the total squared error is small and the budget kept.

    Every module has rank 1 first. Then the singular value with the largest σ² per unit of cost comes next,
    as long as it fits. Where all costs are equal this is the optimum over all allotments, since the σ of a
    module descend.

    Args:
        claims: the modules.
        amount: what may be spent on them.

    Raises:
        MismatchError: rank 1 for each is more than that.
    """
    ranks = [1] * len(claims)
    left = amount - sum(claim.cost for claim in claims)
    if left < 0:
        raise MismatchError.of(
            "budget",
            f"rank 1 in each of {len(claims)} modules takes {sum(c.cost for c in claims):,.0f}; "
            f"{amount:,.0f} is left for them after the tensors that have no rank.",
            loc="--budget",
            remedy="Give a larger budget.",
        )
    queue = [
        (-(claim.values[1] ** 2) / claim.cost, index)
        for index, claim in enumerate(claims)
        if len(claim.values) > 1 and claim.values[1] > 0
    ]
    heapq.heapify(queue)
    while queue:
        _, index = heapq.heappop(queue)
        claim = claims[index]
        if claim.cost > left:
            continue
        left -= claim.cost
        ranks[index] += 1
        rank = ranks[index]
        if rank < len(claim.values) and claim.values[rank] > 0:
            heapq.heappush(queue, (-(claim.values[rank] ** 2) / claim.cost, index))
    return ranks
