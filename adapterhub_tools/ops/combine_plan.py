"""A merge whose adapters are combined by a method of combine/: what each step is told, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adapterhub_tools import registry
from adapterhub_tools.errors import MismatchError, Problem, UnsupportedError, escape
from adapterhub_tools.model.combination import Combination, CombinationChoice, CombinedInput
from adapterhub_tools.model.plan import Step, Term
from adapterhub_tools.ops.combine_weights import Weights
from adapterhub_tools.ops.merge_parts import Part
from adapterhub_tools.ops.module_kinds import is_additive
from adapterhub_tools.ops.part_digest import checked_digest


def combined_parts(parts: Sequence[Part], choice: CombinationChoice | None) -> list[Part]:
    """Returns the adapters with what a combination needs of them: their digests, and weights by module.

    Args:
        parts: the adapters, with their own weights as scales.
        choice: the combination; None returns the adapters as they are.

    Raises:
        IntegrityError: an adapter is not what its manifest records.
        MismatchError: a pattern of the weights names no module, or an adapter is given twice.
    """
    if choice is None:
        return list(parts)
    keys = [checked_digest(part) for part in parts]
    for number, key in enumerate(keys):
        if key in keys[:number]:
            raise MismatchError.of(
                "duplicate",
                f"it is the same adapter as {escape(parts[keys.index(key)].label)}.",
                file=parts[number].label,
                remedy="Give it once, with the sum of both weights.",
            )
    paths = sorted({module.path for part in parts for module in part.fit.modules})
    weights = Weights(default=tuple(part.scale for part in parts), patterns=choice.weights).of(paths)
    return [
        replace(
            part,
            key=keys[number],
            module_scales={path: found[number] for path, found in weights.items()} if choice.weights else {},
        )
        for number, part in enumerate(parts)
    ]


def combined_steps(
    steps: Sequence[Step], parts: Sequence[Part], choice: CombinationChoice | None
) -> tuple[Step, ...]:
    """Returns the steps with the combination that each needs; a plain sum needs none.

    Args:
        steps: the steps, whose terms have the weights as multipliers.
        parts: the adapters, see ``combined_parts``.
        choice: the combination; None returns the steps as they are.

    Raises:
        UnsupportedError: one adapter changes a tensor in several ways that do not add up, or slerp is asked
            to interpolate parts of one tensor differently.
    """
    if choice is None:
        return tuple(steps)
    made = registry.load("combine", choice.method).IMPLEMENTATION
    linear = hasattr(made, "coefficients")
    weighs = bool(getattr(made, "needs_angles", False))
    problems: list[Problem] = []
    found = []
    for step in steps:
        own = [tuple(term for term in step.terms if _is_of(term, part)) for part in parts]
        if sum(map(len, own)) != len(step.terms):
            raise ValueError(f"a term of {step.output.name} belongs to no adapter, or to two")
        problems += [problem for terms in own if (problem := _mixture(terms, step.output.name)) is not None]
        if not step.terms or (linear and not weighs and _adds_up(own)):
            found.append(step)
            continue
        inputs = []
        for part, terms in zip(parts, own, strict=True):
            weight = 1.0
            if weighs:
                weight, problem = _one_weight(part, terms, step.output.name)
                problems += [problem] if problem is not None else []
            inputs.append(CombinedInput(terms=len(terms), key=part.key, weight=weight))
        ordered = tuple(term for terms in own for term in terms)
        found.append(
            replace(
                step,
                terms=tuple(_unweighted(term) for term in ordered) if weighs else ordered,
                combination=Combination(
                    method=choice.method,
                    hparams=dict(choice.hparams),
                    name=_name_of(ordered),
                    inputs=tuple(inputs),
                ),
            )
        )
    if problems:
        raise UnsupportedError(*problems[:10])
    return tuple(found)


def _is_of(term: Term, part: Part) -> bool:
    return bool(term.factors) and all(item.uri == part.uri for item in term.factors.values())


def _adds_up(own: Sequence[tuple[Term, ...]]) -> bool:
    """Says whether a tensor's sum is the merge's own: all deltas are additive, or one adapter has them."""
    changing = [terms for terms in own if terms]
    return len(changing) <= 1 or all(is_additive(term.method) for terms in changing for term in terms)


def _mixture(terms: tuple[Term, ...], name: str) -> Problem | None:
    """Refuses several changes of one tensor by one adapter unless all of them add deltas."""
    methods = sorted({term.method for term in terms if not is_additive(term.method)})
    if len(terms) < 2 or not methods:
        return None
    return Problem(
        kind="not-additive",
        loc=name,
        message=f"one adapter changes this tensor in {len(terms)} places, and what {', '.join(methods)} "
        "makes of one depends on the weight that it meets.",
        remedy="Convert the adapter first: `adaptertool convert ADAPTER OUT --to lora --base BASE`.",
    )


def _one_weight(part: Part, terms: tuple[Term, ...], name: str) -> tuple[float, Problem | None]:
    """Returns the weight of an adapter's terms on one tensor, which must be the same for all."""
    weights = {term.hparams.get("multiplier", 1.0) for term in terms} or {part.scale}
    if len(weights) == 1:
        return weights.pop(), None
    return part.scale, Problem(
        kind="weights",
        file=part.label,
        loc=name,
        message=f"modules that share this tensor have different weights: {sorted(weights)}.",
        remedy="Give them one weight: an angle belongs to a whole tensor.",
    )


def _unweighted(term: Term) -> Term:
    return replace(term, hparams={**term.hparams, "multiplier": 1.0})


def _name_of(terms: Sequence[Term]) -> str:
    """Returns what random numbers call a tensor: its first module by name, and whether it is its bias."""
    bias = terms[0].hparams.get("kind") == "bias"
    return min(term.module for term in terms) + (".bias" if bias else "")
