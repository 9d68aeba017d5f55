"""What a target module is on a given base: linear, Conv1D, convolution; and what its method says about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adapterhub_tools import registry
from adapterhub_tools.architectures import Architecture
from adapterhub_tools.errors import Problem
from adapterhub_tools.model.adapter import TargetModule
from adapterhub_tools.model.tensor import TensorSpec

_FLAT = ("linear", "conv1d")
_BY_AXES = {1: "vector", 3: "convnd", 4: "conv2d", 5: "convnd"}


def method_of(module: TargetModule, more: Mapping[str, Any] | None = None) -> Any:
    """Returns the module's method with its hyperparameters, or None if ``methods/`` has none of its name.

    Args:
        module: the module.
        more: hyperparameters that only the base tells.
    """
    if module.method not in registry.names("methods"):
        return None
    hparams = {**module.hparams, **(more or {})}
    return registry.load("methods", module.method).IMPLEMENTATION.from_hparams(hparams)


def guarantee_of(methods: Iterable[str]) -> str:
    """Returns ``"exact"`` if every one of these methods has that guarantee, else ``"tolerance"``.

    A name without an implementation is that of an adapter whose tensors replace the base's, which is exact.
    """
    known = registry.names("methods")
    found = {
        registry.load("methods", name).IMPLEMENTATION.guarantee if name in known else "exact"
        for name in methods
    }
    return "tolerance" if "tolerance" in found else "exact"


def is_additive(method: str) -> bool:
    """Says whether a method adds a delta that does not depend on the base weight."""
    return bool(registry.load("methods", method).IMPLEMENTATION.additive)


def bias_factors(module: TargetModule) -> dict[str, TensorSpec]:
    """Returns the factors that act on the module's bias; a method without ``bias_roles`` leaves it alone."""
    method = method_of(module)
    roles = getattr(method, "bias_roles", None)
    names = () if roles is None else roles(module.factors, module.kind)
    return {name: module.factors[name] for name in names}


def on_bias_only(module: TargetModule) -> bool:
    """Says whether a module's method changes nothing but its bias."""
    return getattr(method_of(module), "bias_only", False) is True


def extent_of(modules: Iterable[TargetModule], shared: Mapping[str, TensorSpec]) -> tuple[int, int] | None:
    """Returns the largest out and in of the modules whose method makes shared factors that are not stored.

    Args:
        modules: with their kinds and base shapes.
        shared: the factors of the whole model that are stored.
    """
    sizes = []
    for module in modules:
        made = getattr(method_of(module), "made", ())
        if set(made) <= set(shared) or module.base_shape is None or len(module.base_shape) != 2:
            continue
        sizes.append(module.base_shape if module.kind != "conv1d" else module.base_shape[::-1])
    return (max(out for out, _ in sizes), max(inner for _, inner in sizes)) if sizes else None


def decide_kind(
    module: TargetModule,
    base: TensorSpec,
    architecture: Architecture | None,
    shared: Mapping[str, TensorSpec],
) -> str:
    """Decides what the adapter's own files leave open.

    The base's axes tell a convolution from a matrix. Whether a matrix is stored as (out, in) or (in, out) is
    decided by the architecture's table; where it has none, by which of the two the factors fit; where both
    do, by the config's ``fan_in_fan_out``.

    Args:
        module: as the adapter describes it.
        base: the base weight as stored.
        architecture: the base's, or None if it is not in the table.
        shared: factors that the module's method has beside its own.
    """
    if module.kind not in (*_FLAT, "unknown"):
        return module.kind
    said = "conv1d" if module.hparams.get("fan_in_fan_out") is True else "linear"
    if module.kind != "unknown":
        said = module.kind
    elif len(base.shape) in _BY_AXES:
        return _BY_AXES[len(base.shape)]
    if architecture is not None:
        return "conv1d" if architecture.is_conv1d(module.path) else "linear"
    method = method_of(module)
    factors = {**shared, **module.factors}
    fits = [kind for kind in _FLAT if method and not method.check(factors, kind, base, module.path)]
    return fits[0] if len(fits) == 1 else said


def unknown_layout(modules: Iterable[TargetModule]) -> list[Problem]:
    """Refuses square weights whose layout only the config tells, where other shapes show it to be mixed.

    PEFT keeps one ``fan_in_fan_out`` for the adapter: the one that the last module needed.
    """
    flat = [(m, m.base_shape) for m in modules if m.kind in _FLAT and m.base_shape is not None]
    square = [m for m, shape in flat if len(shape) == 2 and shape[0] == shape[1]]
    shown = {m.kind for m, shape in flat if len(shape) == 2 and shape[0] != shape[1]}
    return [
        Problem(
            kind="unknown-layout",
            loc=module.path,
            message="its weight is square, so its shape does not tell whether it is stored as (out, in) or "
            "(in, out); other modules of the adapter are stored in the other way than the config says.",
            remedy="Merge it with PEFT (merge_and_unload), which knows the layer's class.",
        )
        for module in square
        if shown - {module.kind}
    ]


def check_bias(
    module: TargetModule, name: str, bias: TensorSpec | None, factors: Mapping[str, TensorSpec]
) -> tuple[list[Problem], bool]:
    """Compares the factors that act on a bias with the base's bias.

    Args:
        module: with its kind decided.
        name: the bias's name on disk.
        bias: the base's bias, or None if it has none.
        factors: as ``bias_factors`` returns them.

    Returns:
        The problems, and whether there is a bias to change.
    """
    method = method_of(module)
    if bias is not None:
        problems = list(method.check(factors, "bias", bias, module.path))
        return problems, not problems
    if not getattr(method, "needs_bias", False):
        return [], False
    shapes = ", ".join(str(list(spec.shape)) for spec in factors.values())
    return [
        Problem(
            kind="bias",
            loc=module.path,
            message=f"the adapter adds {shapes} to a bias; for {name} the base has none.",
            remedy="Only a base whose layers have biases can take this adapter.",
        )
    ], False
