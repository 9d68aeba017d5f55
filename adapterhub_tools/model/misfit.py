"""The problem of factors that do not fit the weight that they should change."""

from __future__ import annotations

from adapterhub_tools.errors import Problem
from adapterhub_tools.model.tensor import TensorSpec

OTHER_BASE = "Use the base that the adapter was trained on."


def misfit(
    module: str, base: TensorSpec, expected: tuple[int, ...], remedy: str = OTHER_BASE
) -> tuple[Problem, ...]:
    """Returns a problem if a base tensor has not the shape that an adapter's factors change.

    Args:
        module: the module's path.
        base: the base tensor as stored.
        expected: the shape that the factors are for, as stored.
        remedy: what to do.
    """
    if expected == base.shape:
        return ()
    return (
        Problem(
            kind="shape",
            loc=module,
            message=f"the factors are for a {_times(expected)} weight, but {base.name} of the base is "
            f"{_times(base.shape)}.",
            remedy=remedy,
        ),
    )


def misfit_matrix(
    module: str, base: TensorSpec, kind: str, out: int | None, inner: int | None
) -> tuple[Problem, ...]:
    """Returns a problem if a linear layer's weight has not the shape that the factors are for.

    Args:
        module: the module's path.
        base: the base tensor as stored.
        kind: ``"linear"``, or ``"conv1d"``, which is stored as (in, out); anything else is a problem.
        out: the number of outputs that the factors are for, or None where they leave it open.
        inner: the number of inputs, likewise.
    """
    if kind not in ("linear", "conv1d") or len(base.shape) != 2:
        return (wrong_kind(module, kind, ("linear", "conv1d")),)
    found = base.shape if kind == "linear" else base.shape[::-1]
    expected = (found[0] if out is None else out, found[1] if inner is None else inner)
    return misfit(module, base, expected if kind == "linear" else expected[::-1])


def wrong_factor(module: str, spec: TensorSpec, expected: str) -> Problem:
    """Returns the problem of a factor whose own shape or dtype cannot be.

    Args:
        module: the module's path.
        spec: the factor.
        expected: what it should be, in words.
    """
    return Problem(
        kind="shape",
        loc=spec.name,
        message=f"it is {spec.dtype} {list(spec.shape)} for {module}; expected {expected}.",
        remedy="The file is damaged or its config is another adapter's: save the adapter again.",
    )


def wrong_kind(module: str, kind: str, allowed: tuple[str, ...]) -> Problem:
    """Returns the problem of a layer that a method does not adapt.

    Args:
        module: the module's path.
        kind: what the layer is.
        allowed: what the method adapts.
    """
    return Problem(
        kind="layer",
        loc=module,
        message=f"the layer is {kind}; this method adapts {' and '.join(allowed)} layers.",
        remedy="Use the base that the adapter was trained on, or correct target_modules.",
    )


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
