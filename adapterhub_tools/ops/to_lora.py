"""Any mergeable adapter as plain LoRA: the best low-rank approximation of its true effect on the base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_tools.engine.row_blocks import StoredRows, held
from adapterhub_tools.engine.workers import in_order
from adapterhub_tools.errors import UnsupportedError
from adapterhub_tools.linalg.randomized_svd import residual_norm
from adapterhub_tools.linalg.weight import TRANSPOSED
from adapterhub_tools.model.adapter import Adapter, FullTensor, TargetModule
from adapterhub_tools.model.plan import ByteRange
from adapterhub_tools.model.tensor import DTYPE_NAMES, FLOAT_DTYPES, TensorSpec
from adapterhub_tools.ops.base_rows import memory_paths
from adapterhub_tools.ops.convert_options import ConvertOptions
from adapterhub_tools.ops.dense_rank import Ranked, approximate
from adapterhub_tools.ops.effects import Effects, Target
from adapterhub_tools.ops.low_rank import Loader, Tensors
from adapterhub_tools.ops.shrink_report import ModuleReport

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.randomized_svd import Approximation, RowBlocks
    from adapterhub_tools.model.protocols import Progress
    from adapterhub_tools.ops.adapter_reader import OpenedAdapter


@dataclass(slots=True, kw_only=True)
class LowRankParts:
    """The parts of an adapter that is being made.

    Attributes:
        modules: its target modules.
        full: tensors carried in full.
        reports: what was computed.
        kept: what was taken along or left out, with the reason.
        notes: what was decided by rule.
        base_modules: paths of the base's modules, if the base is known.
    """

    modules: list[TargetModule] = field(default_factory=list)
    full: list[FullTensor] = field(default_factory=list)
    reports: list[ModuleReport] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    base_modules: tuple[str, ...] | None = None


def to_lora(
    opened: OpenedAdapter,
    base: Path,
    options: ConvertOptions,
    tensors: Tensors,
    loader: Loader,
    threads: int,
    stack: ExitStack,
    progress: Progress,
) -> tuple[LowRankParts, Effects]:
    """Approximates the effect of every module.

    D = f(W) − W in float64, block of rows by block of rows, with f the method's formula; then a randomised
    SVD of D (linalg/randomized_svd.py). The error of each module is measured on the factors as stored.

    Args:
        opened: the adapter.
        base: its base.
        options: see ConvertOptions.
        tensors: takes what is computed.
        loader: reads the adapter.
        threads: the number of workers.
        stack: closes the files.
        progress: told the bytes read.
    """
    effects = Effects(opened, base, stack, progress)
    parts = LowRankParts(base_modules=memory_paths(opened.adapter, effects.base.checkpoint))
    weights = [t for t in effects.targets if not t.is_bias and _is_matrix(t)]
    vectors = [t for t in effects.targets if not t.is_bias and not _is_matrix(t)]
    dtype = _factor_dtype(opened.adapter) if options.dtype is None else DTYPE_NAMES[options.dtype]
    progress.start("reading the base", sum(t.step.start.spec.nbytes for t in weights))
    work = in_order(lambda t: _approximated(effects, t, options, dtype, tensors, threads), weights, threads)
    for target, result in zip(weights, work, strict=True):
        if result is None:
            parts.kept.append((target.module, "left out: its effect is exactly zero"))
            continue
        module, report, met = result
        parts.modules.append(module)
        parts.reports.append(report)
        if not met:
            parts.notes.append(f"{target.module}: a higher rank would take more room than the weight itself")
    progress.finish()
    _carry_vectors(effects, vectors, tensors, parts)
    for target in effects.targets:
        if target.is_bias and not any(target.module == vector.module for vector in vectors):
            _carry_bias(effects, target, tensors, parts)
    complete_biases(effects, tensors, parts)
    for item in opened.adapter.full:
        tensors.keep(loader, item.tensor)
        parts.full.append(item)
        parts.kept.append((item.target, f"carried in full ({item.role})"))
    parts.notes += effects.fit.notes
    return parts, effects


def low_rank_module(
    source: RowBlocks,
    ranked: Ranked,
    *,
    path: str,
    kind: str,
    shape: tuple[int, ...],
    rank_before: int | None,
    dtype: str,
    tensors: Tensors,
) -> tuple[TargetModule, ModuleReport]:
    """Writes the factors of an approximation, and measures how far they are from the matrix.

    Args:
        source: the matrix, in the stored layout of the weight.
        ranked: its triplets and rank.
        path: the module.
        kind: its kind on the base.
        shape: the weight's shape as stored.
        rank_before: the rank that the module had, if any.
        dtype: of the factors.
        tensors: takes the factors.
    """
    approximation, rank = ranked.approximation, ranked.rank
    left, right = approximation.svd.leading(rank).balanced()
    b, a = (right.t(), left.t()) if kind in TRANSPOSED else (left, right)
    shaped_b, shaped_a = shaped(b, a, kind, shape)
    b_spec, b_stored = tensors.put(shaped_b, dtype, f"{path}.B")
    a_spec, a_stored = tensors.put(shaped_a, dtype, f"{path}.A")
    new_b, new_a = b_stored.double().flatten(1), a_stored.double().flatten(1)
    rows, columns = (new_a.t(), new_b.t()) if kind in TRANSPOSED else (new_b, new_a)
    error = residual_norm(source, rows.contiguous(), columns.contiguous())
    norm = approximation.norm
    module = TargetModule(
        path=path,
        method="lora",
        kind=kind,
        hparams={"rank": rank, "alpha": float(rank), "scaling": "alpha/rank"},
        factors={"A": a_spec, "B": b_spec},
        base_shape=shape,
    )
    return module, _report(approximation, path, kind, rank_before, rank, norm, error)


def _report(
    approximation: Approximation,
    path: str,
    kind: str,
    rank_before: int | None,
    rank: int,
    norm: float,
    error: float,
) -> ModuleReport:
    values = [float(value) for value in approximation.svd.s]
    kept = sum(value**2 for value in values[:rank])
    return ModuleReport(
        path=path,
        kind=kind,
        rank_before=rank_before,
        rank=rank,
        norm=norm,
        energy=1.0 if norm == 0 else min(1.0, kept / approximation.total),
        error=0.0 if norm == 0 else error / norm,
        singular_values=tuple(values),
    )


def shaped(b: Tensor, a: Tensor, kind: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Gives the factors of a convolution its axes: A (rank, in, k, …) and B (out, rank, 1, …)."""
    if kind not in ("conv2d", "convnd"):
        return b.contiguous(), a.contiguous()
    rank = int(a.shape[0])
    return b.reshape(shape[0], rank, *(1 for _ in shape[2:])), a.reshape(rank, *shape[1:])


def _approximated(
    effects: Effects,
    target: Target,
    options: ConvertOptions,
    dtype: str,
    tensors: Tensors,
    threads: int,
) -> tuple[TargetModule, ModuleReport, bool] | None:
    module = target.fitted
    if module is None:
        raise UnsupportedError.of("whole-model", "a factor of the whole model is no target.", loc=target.name)
    source = held(effects.difference(target), threads)
    rows, columns = source.shape
    own = module.hparams.get("rank")
    rank = options.fixed_rank
    if rank is None and options.rank is None and module.method == "dora" and isinstance(own, int):
        rank = own
    limit = None if rank is not None else max(1, rows * columns // (rows + columns))
    ranked = approximate(source, options.policy, rank=rank, limit=limit, seed=options.seed)
    if ranked.approximation.total == 0.0:
        return None
    made, report = low_rank_module(
        source,
        ranked,
        path=module.path,
        kind=module.kind,
        shape=target.step.start.spec.shape,
        rank_before=own if isinstance(own, int) else None,
        dtype=dtype,
        tensors=tensors,
    )
    return made, report, ranked.met or rank is not None


def _is_matrix(target: Target) -> bool:
    return len(target.step.start.spec.shape) >= 2


def changed(effects: Effects, target: Target) -> Tensor:
    """Returns a small tensor after the adapter, in float64."""
    weight = effects.weight(target)
    values = weight.read(0, weight.shape[0])
    effects.expression(target).evaluate(values, 0)
    return values.reshape(target.step.start.spec.shape)


def _carry_bias(effects: Effects, target: Target, tensors: Tensors, parts: LowRankParts) -> None:
    """Carries a bias that the method changes, as it becomes."""
    name = f"{target.module}.bias"
    spec, _ = tensors.put(changed(effects, target), target.step.start.spec.dtype, name)
    parts.full.append(FullTensor(target=name, role="bias", tensor=spec))
    parts.kept.append((name, "its bias changes too, and is carried in full"))


def complete_biases(effects: Effects, tensors: Tensors, parts: LowRankParts) -> None:
    """Carries biases that stay, where others change: a config has only all of them, or the targets'."""
    owners = {item.target.rpartition(".")[0] for item in parts.full if item.role == "bias"}
    if not owners:
        return
    checkpoint = effects.base.checkpoint
    weights = [name for name in checkpoint.tensors if name.endswith(".weight")]
    targets = {module.path for module in parts.modules}
    have = {item.target for item in parts.full}
    for path, weight in zip(parts.base_modules or (), weights, strict=True):
        stored, name = weight.removesuffix("weight") + "bias", f"{path}.bias"
        if stored not in checkpoint.tensors or name in have or (path not in targets and owners <= targets):
            continue
        spec = keep_base_tensor(tensors, effects, effects.base.range_of(stored), name)
        parts.full.append(FullTensor(target=name, role="bias", tensor=spec))


def _carry_vectors(
    effects: Effects, vectors: Sequence[Target], tensors: Tensors, parts: LowRankParts
) -> None:
    """Carries modules whose weight is no matrix (norms): every tensor of them, since PEFT needs all."""
    checkpoint = effects.base.checkpoint
    by_name = {target.name: target for target in effects.targets}
    for vector in vectors:
        stem = vector.name.removesuffix("weight")
        for leaf in ("weight", "bias"):
            name, target = f"{vector.module}.{leaf}", by_name.get(f"{stem}{leaf}")
            if target is not None:
                spec, _ = tensors.put(changed(effects, target), target.step.start.spec.dtype, name)
            elif f"{stem}{leaf}" in checkpoint.tensors:
                item = effects.base.range_of(f"{stem}{leaf}")
                spec = keep_base_tensor(tensors, effects, item, name)
            else:
                continue
            parts.full.append(FullTensor(target=name, role="modules_to_save", tensor=spec))
            parts.kept.append((name, "no matrix, so it is carried in full"))


def keep_base_tensor(tensors: Tensors, effects: Effects, item: ByteRange, name: str) -> TensorSpec:
    """Carries a tensor of the base as it stands."""
    rows = StoredRows(effects.base.open(item.uri), item)
    return tensors.put(rows.read(0, rows.shape[0]).reshape(item.spec.shape), item.spec.dtype, name)[0]


def _factor_dtype(adapter: Adapter) -> str:
    """Returns the dtype that most of the factors have."""
    counts: dict[str, int] = {}
    for module in adapter.modules:
        for spec in module.factors.values():
            if spec.dtype in FLOAT_DTYPES:
                counts[spec.dtype] = counts.get(spec.dtype, 0) + spec.elements
    return max(sorted(counts), key=lambda dtype: counts[dtype]) if counts else "F32"
