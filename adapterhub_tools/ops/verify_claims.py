"""Compares what a merged model's receipt says of its inputs and of each tensor with what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapterhub_tools.errors import Problem
from adapterhub_tools.model.receipt import RECEIPT_FILE, Receipt
from adapterhub_tools.ops.adapter_digest import adapter_digest
from adapterhub_tools.ops.earlier_merges import earlier_merges
from adapterhub_tools.ops.merge_parts import Part
from adapterhub_tools.ops.merge_plan import MergePlan
from adapterhub_tools.ops.module_kinds import guarantee_of
from adapterhub_tools.store.checkpoint import Checkpoint
from adapterhub_tools.store.digest import config_digest, digest_checkpoint, root_digest, split_digest

_REMEDY = "The receipt was edited, or is that of another merge: get the folder again."


def claim_problems(
    receipt: Receipt, base: Checkpoint, merged: Checkpoint, parts: Sequence[Part], planned: MergePlan
) -> list[Problem]:
    """Returns which sentences of a receipt are not true, of those that headers and configs decide.

    Args:
        receipt: of the merged model.
        base: the base.
        merged: the merged model.
        parts: the adapters.
        planned: the merge, with the dtype that the receipt tells.
    """
    claims = [*_about_inputs(receipt, base, parts, planned), *_about_tensors(receipt, merged, planned)]
    return [_problem(loc, said, found) for loc, said, found in claims if said != found]


def digest_problems(
    receipt: Receipt, base: Checkpoint, planned: MergePlan, *, threads: int | None
) -> list[Problem]:
    """Returns which digests of the base a receipt has wrong; all of the base is read.

    Raises:
        StoreError: a file cannot be read.
    """
    recorded = {"digest": receipt.base.digest, "targets_digest": receipt.base.targets_digest}
    problems = []
    found: dict[str, Mapping[str, bytes]] = {}
    for field, said in recorded.items():
        if said is None:
            continue
        algorithm, _ = split_digest(said, file=RECEIPT_FILE, loc=f"/base/{field}")
        if algorithm not in found:
            found[algorithm] = digest_checkpoint(base, algorithm=algorithm, threads=threads or 2)
        digests = found[algorithm]
        chosen = digests if field == "digest" else {name: digests[name] for name in planned.targets}
        own = root_digest(algorithm, chosen)
        if own != said:
            problems.append(_problem(f"/base/{field}", said, own))
    return problems


def _about_inputs(
    receipt: Receipt, base: Checkpoint, parts: Sequence[Part], planned: MergePlan
) -> Iterator[tuple[str, Any, Any]]:
    if receipt.base.config_digest is not None and base.config is not None:
        yield "/base/config_digest", receipt.base.config_digest, config_digest(base.config)
    told, _ = earlier_merges(base)
    if receipt.base.earlier and told:
        yield (
            "/base/earlier",
            [merge.to_json() for merge in receipt.base.earlier],
            [merge.to_json() for merge in told],
        )
    digests = [adapter_digest(part.opened.files, part.opened.adapter) for part in parts]
    if sorted(digests) != sorted(adapter.digest for adapter in receipt.adapters):
        return  # of other adapters nothing can be said
    known = dict(zip(digests, parts, strict=True))
    for number, adapter in enumerate(receipt.adapters):
        part = known[adapter.digest]
        method = part.opened.adapter.method
        yield f"/adapters/{number}/method", adapter.method, method
        yield f"/adapters/{number}/targets", adapter.targets, len(part.fit.modules)
        yield f"/adapters/{number}/full", adapter.full, len(part.fit.full)
        yield f"/adapters/{number}/guarantee", adapter.guarantee, guarantee_of((method,))
    guarantee = guarantee_of(part.opened.adapter.method for part in parts)
    if any(step.combination is not None for step in planned.plan.steps):
        guarantee = "tolerance"
    yield "/guarantee", receipt.guarantee, guarantee


def _about_tensors(
    receipt: Receipt, merged: Checkpoint, planned: MergePlan
) -> Iterator[tuple[str, Any, Any]]:
    recorded = {tensor.name: tensor for tensor in receipt.tensors}
    steps = {step.output.name: step for step in planned.plan.steps}
    for name in sorted({*recorded, *steps}):
        loc = f"/output/tensors/{name}"
        if name not in recorded or name not in steps:
            yield loc, name in recorded and "listed", name in steps and "listed"
            continue
        tensor, step = recorded[name], steps[name]
        yield f"{loc}/action", tensor.action, step.action
        yield f"{loc}/dtype", tensor.dtype, step.output.dtype
        stored = merged.tensors.get(name)
        if stored is not None and tensor.dtype == step.output.dtype:
            yield f"{loc}/dtype", tensor.dtype, stored.spec.dtype
        if stored is not None:
            yield f"{loc}/shape", tensor.shape, stored.spec.shape


def _problem(loc: str, said: Any, found: Any) -> Problem:
    return Problem(
        kind="receipt-claim",
        message=f"the receipt says {said}, but it is {found}.",
        file=RECEIPT_FILE,
        loc=loc,
        remedy=_REMEDY,
    )
