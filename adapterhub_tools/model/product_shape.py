"""The weight that a product of two factors is for, by shapes alone."""

from __future__ import annotations

from adapterhub_tools.errors import Problem
from adapterhub_tools.model.tensor import TensorSpec

_TRANSPOSED = ("conv1d", "embedding")


def product_shape(a: tuple[int, ...], b: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Returns the shape of the weight that factors of these shapes change.

    Args:
        a: (rank, in), or (rank, in, k, …) for a convolution.
        b: (out, rank), or (out, rank, 1, …).
        kind: the module's kind; ``conv1d`` and ``embedding`` are stored as (in, out).
    """
    if kind in _TRANSPOSED:
        return (a[1], b[0])
    return (b[0], *a[1:])


def check_product(
    a: TensorSpec, b: TensorSpec, kind: str, base: TensorSpec, module: str
) -> tuple[Problem, ...]:
    """Compares the shape of a product B·A with the base weight's.

    Args:
        a: (rank, in, …).
        b: (out, rank, …).
        kind: the module's kind, see model/adapter.py.
        base: the base weight as stored.
        module: the module's path, for the message.
    """
    expected = product_shape(a.shape, b.shape, kind)
    if expected == base.shape:
        return ()
    found = "×".join(map(str, base.shape))
    wanted = "×".join(map(str, expected))
    remedy = "Use the base that the adapter was trained on."
    if kind in ("conv2d", "convnd") and len(base.shape) == len(expected) and base.shape[1] != expected[1]:
        remedy = "A convolution with groups cannot take a merged LoRA; PEFT does not merge it either."
    return (
        Problem(
            kind="shape",
            loc=module,
            message=f"the factors give a {wanted} weight, but {base.name} of the base is {found}.",
            remedy=remedy,
        ),
    )
