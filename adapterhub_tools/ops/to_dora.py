"""LoRA as DoRA, exactly: magnitudes that make its formula give W + ΔW; and scales folded into factors."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.engine.workers import in_order
from adapterhub_tools.errors import Problem, UnsupportedError
from adapterhub_tools.model.adapter import TargetModule
from adapterhub_tools.model.manifest import HistoryInput
from adapterhub_tools.model.tensor import DTYPE_NAMES, TensorSpec
from adapterhub_tools.ops.convert_options import ConvertOptions
from adapterhub_tools.ops.dora_magnitude import norms
from adapterhub_tools.ops.effects import Effects
from adapterhub_tools.ops.low_rank import RULES, Loader, Tensors, is_product, rescaled, scale_of, with_scale
from adapterhub_tools.ops.shrink_report import ModuleReport
from adapterhub_tools.ops.to_lora import LowRankParts

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.model.protocols import Progress
    from adapterhub_tools.ops.adapter_reader import OpenedAdapter


def to_dora(
    opened: OpenedAdapter,
    base: Path,
    options: ConvertOptions,
    tensors: Tensors,
    loader: Loader,
    threads: int,
    stack: ExitStack,
    progress: Progress,
) -> tuple[LowRankParts, HistoryInput]:
    """Adds magnitudes m = ‖W + s·B·A‖, one for each output, so that m·(W + s·B·A)/‖W + s·B·A‖ is W + s·B·A.

    The factors stay as they are. The magnitudes are rounded once, to float32 (float64 beside float64
    factors); that is the only error.

    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5.

    Raises:
        UnsupportedError: a module that DoRA cannot express, or a row of W + ΔW that is zero.
    """
    odd = [m for m in opened.adapter.modules if not is_product(m) or "bias" in m.factors]
    if odd:
        what = "a lora_bias" if "bias" in odd[0].factors else f"a target of kind {odd[0].kind}"
        raise UnsupportedError.of(
            "dora",
            f"PEFT has no DoRA with {what}.",
            loc=odd[0].path,
            remedy="Keep it as LoRA, or merge it.",
        )
    effects = Effects(opened, base, stack, progress)
    fitted = effects.fit
    parts = LowRankParts(notes=list(fitted.notes))

    def convert(module: TargetModule) -> tuple[TargetModule, ModuleReport]:
        b, a = loader.product(module)
        rows = effects.weight(effects.of_module(module.path))
        magnitude = norms(rows, module.kind, (b, a, float(scale_of(module))))
        if not bool((magnitude > 0).all()):
            raise UnsupportedError(
                Problem(
                    kind="zero-row",
                    message=f"output {int((magnitude == 0).nonzero()[0])} of W + ΔW is zero, and DoRA "
                    "divides by its norm.",
                    loc=module.path,
                    remedy="Keep it as LoRA.",
                )
            )
        shape: tuple[int, ...] = (int(magnitude.shape[0]),)
        if module.kind in ("conv2d", "convnd"):
            shape = (1, *shape, *(1 for _ in module.factors["B"].shape[2:]))
        dtype = "F64" if module.factors["A"].dtype == "F64" else "F32"
        spec, stored = tensors.put(magnitude.reshape(shape), dtype, f"{module.path}.magnitude")
        folded, own = (
            fold(module, options, tensors, loader)
            if options.fold_scale
            else (
                tensors.keep_module(loader, module),
                plain_report(module, b, a),
            )
        )
        rounding = float((stored.double().reshape(-1) - magnitude).norm())
        error = sqrt((own.error * own.norm) ** 2 + rounding**2)
        report = replace(own, error=0.0 if own.norm == 0 else error / own.norm)
        made = replace(folded, method="dora", kind=module.kind, factors={**folded.factors, "magnitude": spec})
        return made, report

    progress.start("reading the base", sum(effects.weight(target).nbytes for target in effects.targets))
    for module, report in in_order(convert, fitted.modules, threads):
        parts.modules.append(module)
        parts.reports.append(report)
    progress.finish()
    for item in opened.adapter.full:
        tensors.keep(loader, item.tensor)
        parts.full.append(item)
    return parts, effects.base.targets_input(fitted)


def plain_report(module: TargetModule, b: Tensor, a: Tensor) -> ModuleReport:
    """Returns the report of a module whose factors stay as they are."""
    from adapterhub_tools.linalg.factored_svd import singular_values

    size = float(scale_of(module))
    values = singular_values(b, a) * size
    rank = int(module.hparams["rank"])
    return ModuleReport(
        path=module.path,
        kind=module.kind,
        rank_before=rank,
        rank=rank,
        norm=float(values.norm()),
        energy=1.0,
        error=0.0,
        singular_values=tuple(float(value) for value in values),
    )


def fold(
    module: TargetModule, options: ConvertOptions, tensors: Tensors, loader: Loader
) -> tuple[TargetModule, ModuleReport]:
    """Puts a module's scale into its B (and lora_bias), so that alpha is its rank and the scale is 1.

    Exact where s is a power of two; otherwise each value of B is rounded once.
    """
    if not is_product(module):
        raise UnsupportedError.of(
            "fold", "stacked experts and convolutions in groups keep their scale.", loc=module.path
        )
    from adapterhub_tools.linalg.factored_svd import product_distance

    rank = int(module.hparams["rank"])
    scaled = rescaled(scale_of(module), rank, RULES[0], fold=True)
    b, a = loader.product(module)
    report = plain_report(module, b, a)
    factors: dict[str, TensorSpec] = {}
    for role, spec in module.factors.items():
        if role not in ("B", "bias"):
            factors[role] = tensors.keep(loader, spec)
            continue
        values = loader.load(spec).double() * scaled.factor
        dtype = spec.dtype if options.dtype is None else DTYPE_NAMES[options.dtype]
        factors[role], stored = tensors.put(values, dtype, spec.name)
        if role == "B" and report.norm > 0:
            distance = product_distance(b * scaled.factor, a, stored.double().flatten(1), a)
            report = replace(report, error=distance / report.norm)
    hparams = with_scale(module, rank, scaled.alpha, RULES[0])
    return replace(module, hparams=hparams, factors=factors), report
