"""The ranks of a combination that are known before the work."""

from __future__ import annotations

from collections.abc import Sequence

from adapterhub_tools.engine.workers import in_order
from adapterhub_tools.errors import MismatchError, escape
from adapterhub_tools.linalg.randomized_svd import randomized_svd
from adapterhub_tools.ops.combine_modules import Joint
from adapterhub_tools.ops.combine_products import spectrum
from adapterhub_tools.ops.combine_work import Work, nbytes_of, value_cost
from adapterhub_tools.ops.extract import BUDGET_REACH
from adapterhub_tools.ops.rank_policy import Budget, Claim, allot

_POLICIES = "Give --rank, --energy, --max-error or another policy."


def choose_ranks(work: Work, joints: Sequence[Joint], carried: float) -> dict[str, int]:
    """Returns module path -> rank; modules without one get it from their own singular values.

    Args:
        work: the combination.
        joints: the modules.
        carried: what the tensors without a rank take, in the unit of the budget.

    Raises:
        MismatchError: a rank that no module can have, or one that is needed.
    """
    policy = work.options.policy
    if policy is None:
        return _own_ranks(work, joints)
    if policy.budget is not None:
        return _allotted(work, joints, policy.budget, carried)
    if policy.name != "rank":
        return {}
    asked = policy.fixed_ranks([joint.path for joint in joints])
    most = {joint.path: _most(work, joint) for joint in joints}
    given = [rank for rank in asked.values() if rank is not None]
    if given and min(given) > max(most.values()):
        raise MismatchError.of(
            "rank",
            f"rank {min(given)} was asked, but the largest that any combined delta can have is "
            f"{max(most.values())}.",
            loc="--rank",
            remedy=f"Give a rank of at most {max(most.values())}.",
        )
    found = {}
    for joint in joints:
        rank = asked[joint.path]
        if rank is None and not (work.factored and joint.plain):
            raise _needed(joint, work.options.method)
        found[joint.path] = most[joint.path] if rank is None else min(rank, most[joint.path])
    return found


def _own_ranks(work: Work, joints: Sequence[Joint]) -> dict[str, int]:
    found = {}
    for joint in joints:
        if work.factored and joint.plain and work.exact:
            continue
        if work.exact or not joint.ranks:
            raise _needed(joint, work.options.method)
        found[joint.path] = min(max(joint.ranks), _most(work, joint))
    return found


def _needed(joint: Joint, method: str) -> MismatchError:
    return MismatchError.of(
        "policy",
        f"its combined delta by {escape(method)} is no product of factors, so it has full rank in general.",
        loc=joint.path,
        remedy=_POLICIES,
    )


def _most(work: Work, joint: Joint) -> int:
    """Returns the largest rank that the combined delta can have."""
    return min(joint.side, sum(joint.ranks)) if work.factored and joint.plain else joint.side


def _allotted(work: Work, joints: Sequence[Joint], budget: Budget, carried: float) -> dict[str, int]:
    costs = [value_cost(joint, work.dtype, budget.unit) for joint in joints]
    if budget.unit == "share":
        amount = budget.amount * sum(
            spec.elements
            for joint in joints
            for member in joint.members
            for role, spec in member.module.factors.items()
            if role in ("A", "B") or not member.plain
        )
    else:
        amount = budget.amount - carried
    most = max(1, int(BUDGET_REACH * amount / sum(costs)))

    def values_of(joint: Joint) -> list[float]:
        if work.factored and joint.plain:
            return spectrum(work, joint)
        work.progress.advance(nbytes_of(joint))
        rows = work.rows(joint)
        if rows is None:
            return []
        svd = randomized_svd(rows, min(most, joint.side), seed=work.options.seed).svd
        return [float(value) for value in svd.s]

    work.progress.start("reading spectra", sum(nbytes_of(joint) for joint in joints))
    spectra = list(in_order(values_of, joints, work.threads))
    work.progress.finish()
    claims = [Claim(values=values, cost=cost) for values, cost in zip(spectra, costs, strict=True)]
    return {joint.path: rank for joint, rank in zip(joints, allot(claims, amount), strict=True)}
