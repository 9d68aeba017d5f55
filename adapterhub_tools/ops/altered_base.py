"""Adapters whose initialisation altered the base (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) as plain LoRA.

Training began on W_res = W − s·B₀·A₀ and ended with W_res + s·B·A, so the change of the original base is

    ΔW = s·B·A − s·B₀·A₀ = [s·B, −s·B₀]·[A; A₀],

of at most twice the rank, exactly. The initial factors are those saved before training; without them, the
base gives s·B₀·A₀ where the initialisation is a function of the weight alone: PiSSA takes its leading
singular triplets (Meng et al. 2024, arXiv:2404.02948), OLoRA s·Q_r·R_r of its QR decomposition (Büyükakyüz
2024, arXiv:2406.01775). CorDA and LoRA-GA also depend on data, PiSSA's ``niter`` form on random numbers.

LoftQ (Li et al. 2023, arXiv:2310.08659) only approximates: W ≈ Q + s·B₀·A₀ with the quantised Q. The result
is what training changed; that it is added to W instead of Q + s·B₀·A₀ is the approximation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.engine.workers import in_order
from adapterhub_tools.errors import LossyError, MismatchError, UnsupportedError
from adapterhub_tools.linalg.weight import TRANSPOSED
from adapterhub_tools.model.adapter import TargetModule
from adapterhub_tools.model.manifest import HistoryInput
from adapterhub_tools.model.tensor import DTYPE_NAMES, TensorSpec
from adapterhub_tools.ops.base_rows import OpenBase
from adapterhub_tools.ops.convert_options import ConvertOptions
from adapterhub_tools.ops.low_rank import (
    RULES,
    Loader,
    Tensors,
    checked_input,
    factor_shapes,
    is_product,
    open_low_rank,
    rescaled,
    scale_of,
    with_scale,
)
from adapterhub_tools.ops.shrink_report import ModuleReport
from adapterhub_tools.ops.to_lora import LowRankParts

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.ops.adapter_reader import OpenedAdapter

Initial = Callable[[TargetModule], tuple["Tensor", "Tensor"]]
"""A module -> factors (out, k), (k, in·…) of s·B₀·A₀, float64."""


def is_altered(opened: OpenedAdapter) -> bool:
    """Tells whether the adapter's initialisation altered its base."""
    return any(kind in ("altered-base", "unknown-init") for kind, _, _ in opened.adapter.blockers)


def to_plain(
    opened: OpenedAdapter,
    options: ConvertOptions,
    tensors: Tensors,
    loader: Loader,
    threads: int,
    stack: ExitStack,
) -> tuple[LowRankParts, list[HistoryInput]]:
    """Makes the parts of the plain adapter for the original base.

    Without a rank the factors are put side by side, and nothing is rounded where both have one dtype and
    scale. With one, their product is truncated like any other (svd-shrink).

    Raises:
        MismatchError: neither the initial factors nor the base are given, or they do not fit.
        UnsupportedError: the initialisation cannot be repeated from the base.
        LossyError: LoftQ, unless allowed.
    """
    name = str(opened.adapter.unparsed.get("config", {}).get("init_lora_weights")).lower()
    if name == "loftq" and not options.allow_lossy:
        raise LossyError.of(
            "loftq",
            "LoftQ's initial factors only approximate what quantising took from the base, so the result is "
            "not exactly the adapter on the original base.",
            file=str(opened.files.root),
            remedy="Give --allow-lossy, or merge onto the dequantised base that LoftQ wrote.",
        )
    odd = [module.path for module in opened.adapter.modules if not is_product(module)]
    if odd:
        raise UnsupportedError.of("kind", "it is no plain product of two factors.", loc=odd[0])
    inputs: list[HistoryInput] = []
    if options.initial is not None:
        initial, found = _given(opened, options.initial, stack)
    elif options.base is not None:
        initial, found = _repeated(opened, options.base, name, stack)
    else:
        raise MismatchError.of(
            "initial",
            f'"init_lora_weights" is "{name}", which altered the base before training; its initial factors '
            "or the original base are needed.",
            file=str(opened.files.root),
            remedy="Give --initial with the adapter saved before training, or --base for PiSSA and OLoRA.",
        )
    inputs.append(found)
    parts = LowRankParts()
    work = in_order(
        lambda module: _plain(module, loader, initial, options, tensors), opened.adapter.modules, threads
    )
    for module, report in work:
        parts.modules.append(module)
        parts.reports.append(report)
    for item in opened.adapter.full:
        tensors.keep(loader, item.tensor)
        parts.full.append(item)
    return parts, inputs


def _given(opened: OpenedAdapter, path: Path, stack: ExitStack) -> tuple[Initial, HistoryInput]:
    """Takes the initial factors from the adapter that was saved before training."""
    first = open_low_rank(path, altered_base=True)
    source = Loader(first, stack.enter_context(first.files.open_weights()))
    by_path = {module.path: module for module in first.adapter.modules}
    missing = [module.path for module in opened.adapter.modules if module.path not in by_path]
    if missing:
        raise MismatchError.of(
            "initial",
            f"the initial adapter lacks {len(missing)} modules, the first is {missing[0]}.",
            file=str(path),
            loc="--initial",
            remedy="Give the adapter that was saved right after initialisation of the same run.",
        )

    def initial(module: TargetModule) -> tuple[Tensor, Tensor]:
        other = by_path[module.path]
        b, a = source.product(other)
        if b.shape[0] != module.factors["B"].shape[0] or a.shape[1:] != _columns(module):
            raise MismatchError.of(
                "initial",
                "the initial factors have other shapes.",
                file=str(path),
                loc=module.path,
                remedy="Give the adapter that was saved right after initialisation of the same run.",
            )
        return b * float(scale_of(other)), a

    return initial, checked_input(first, "initial")


def _columns(module: TargetModule) -> tuple[int]:
    size = 1
    for axis in module.factors["A"].shape[1:]:
        size *= axis
    return (size,)


def _repeated(opened: OpenedAdapter, path: Path, name: str, stack: ExitStack) -> tuple[Initial, HistoryInput]:
    """Computes the initial product again from the original base."""
    if name not in ("pissa", "olora"):
        raise UnsupportedError.of(
            "initial",
            f'"{name}" depends on more than the base weight, so its factors cannot be computed again.',
            file=str(opened.files.root),
            loc="--base",
            remedy="Give --initial with the adapter saved before training.",
        )
    base = OpenBase(path)
    stack.callback(base.close)
    fitted = base.fit(replace(opened.adapter, blockers=()))
    kinds = {module.path: module.kind for module in fitted.modules}

    def initial(module: TargetModule) -> tuple[Tensor, Tensor]:
        import torch

        rows = base.rows(fitted, module.path)
        whole = rows.read(0, rows.shape[0])
        weight = whole.t() if kinds[module.path] in TRANSPOSED else whole
        rank = int(module.hparams["rank"])
        if name == "pissa":
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
            return u[:, :rank] * s[:rank], vt[:rank]
        q, r = torch.linalg.qr(weight)
        return q[:, :rank] * float(scale_of(module)), r[:rank]

    return initial, base.targets_input(fitted)


def _plain(
    module: TargetModule, loader: Loader, initial: Initial, options: ConvertOptions, tensors: Tensors
) -> tuple[TargetModule, ModuleReport]:
    import torch

    from adapterhub_tools.linalg.factored_svd import FactoredSVD, product_distance

    b, a = loader.product(module)
    scale = scale_of(module)
    size = float(scale)
    first_b, first_a = initial(module)
    left, right = torch.cat((b, -first_b / size), dim=1), torch.cat((a, first_a), dim=0)
    factored = FactoredSVD(left, right)
    norm = float(factored.values.norm()) * size
    rank = int(right.shape[0])
    new_b, new_a = left, right
    if options.rank is not None:
        rank = options.fixed_rank or options.policy.rank_of(factored.values)
        rank = min(rank, int(factored.values.shape[0]))
        new_b, new_a = factored.leading(rank).balanced()
    # rsLoRA and twice the rank give an alpha·√2: such a scale goes into the factors.
    scaled = rescaled(scale, rank, RULES[0], fold=options.fold_scale)
    root = sqrt(scaled.factor)
    factors: dict[str, TensorSpec] = {}
    stored: dict[str, Tensor] = {}
    for role, values in zip(("B", "A"), factor_shapes(module, new_b * root, new_a * root), strict=True):
        spec = module.factors[role]
        dtype = spec.dtype if options.dtype is None else DTYPE_NAMES[options.dtype]
        factors[role], stored[role] = tensors.put(values, dtype, spec.name)
    distance = product_distance(
        left, right, stored["B"].double().flatten(1) / root, stored["A"].double().flatten(1) / root
    )
    for role in module.factors.keys() - {"A", "B"}:
        spec = module.factors[role]
        if role == "bias" and scaled.factor != 1.0:
            factors[role] = tensors.put(loader.load(spec).double() * scaled.factor, spec.dtype, spec.name)[0]
        else:
            factors[role] = tensors.keep(loader, spec)
    kept = float((factored.values[:rank] ** 2).sum()) * size * size
    report = ModuleReport(
        path=module.path,
        kind=module.kind,
        rank_before=int(module.hparams["rank"]),
        rank=rank,
        norm=norm,
        energy=1.0 if norm == 0 else min(1.0, kept / norm**2),
        error=0.0 if norm == 0 else distance * size / norm,
        singular_values=tuple(float(value) * size for value in factored.values),
    )
    hparams = with_scale(module, rank, scaled.alpha, RULES[0])
    return replace(module, hparams=hparams, factors=factors), report
