"""What the low-rank operations share: adapters opened for algebra, products and their scales, drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_tools.errors import (
    FormatError,
    IntegrityError,
    MismatchError,
    Problem,
    UnsupportedError,
    raise_for,
)
from adapterhub_tools.linalg.surd import Surd, scaling_of
from adapterhub_tools.model.adapter import Adapter, TargetModule
from adapterhub_tools.model.manifest import HistoryInput
from adapterhub_tools.model.plan import ByteRange
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.ops.adapter_digest import adapter_digest
from adapterhub_tools.ops.adapter_reader import SAVED_EMBEDDING, OpenedAdapter, examine_adapter
from adapterhub_tools.ops.manifest_record import check_record
from adapterhub_tools.ops.spool import Content, Spool, StoredContent

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.model.protocols import OpenSource

RULES = ("alpha/rank", "alpha/sqrt(rank)")
"""The scaling rules that PEFT can express."""

_METHODS = ("lora", "dora")
_KINDS = ("linear", "conv1d", "conv2d", "convnd", "embedding", "unknown")
_VARIANTS = ("use_qalora", "use_bdlora", "kasa_config", "layer_replication")
_ALTERED = ("altered-base", "unknown-init", "megatron")


def open_low_rank(path: Path, *, altered_base: bool = False) -> OpenedAdapter:
    """Opens an adapter whose deltas are products of two factors: LoRA, rsLoRA or DoRA.

    Args:
        path: its folder or weight file.
        altered_base: whether it may belong to a base that its initialisation altered.

    Raises:
        FormatError: its files are broken; every problem.
        UnsupportedError: it is of another type, or of a variant whose factors mean something else.
    """
    opened = examine_adapter(path)
    raise_for([p for p in opened.problems if p.kind not in (SAVED_EMBEDDING, "missing-config")], FormatError)
    opened.files.open_weights().close()  # pickles have their own error
    raise_for([p for p in opened.problems if p.kind != SAVED_EMBEDDING], FormatError)
    adapter = opened.adapter
    if adapter.method not in _METHODS:
        raise UnsupportedError.of(
            "method",
            f"it is of type {adapter.method}, whose delta is no plain product of two factors.",
            file=str(path),
            remedy="Convert it first: `adaptertool convert ADAPTER OUT --to lora --base BASE`.",
        )
    config = adapter.unparsed.get("config", {})
    found = [name for name in _VARIANTS if config.get(name)]
    if found:
        raise UnsupportedError.of(
            "variant",
            f'"{found[0]}" gives its factors another meaning than B·A on the base.',
            file=str(path),
            remedy="Merge it with PEFT (merge_and_unload), and extract a plain LoRA from the result.",
        )
    altered = [item for item in adapter.blockers if item[0] in _ALTERED]
    if altered and not altered_base:
        raise UnsupportedError(
            *(
                Problem(
                    kind=kind,
                    file=str(path),
                    message=message,
                    remedy="Make a plain LoRA of it first: `adaptertool convert ADAPTER OUT --to lora "
                    "--initial INITIAL` or `--base BASE`.",
                )
                for kind, message, _ in altered
            )
        )
    check_record(opened)
    return opened


def checked_input(opened: OpenedAdapter, role: str = "adapter") -> HistoryInput:
    """Returns an adapter as an input of an operation, compared with its own manifest.

    Raises:
        IntegrityError: its tensors are not those that its manifest records.
    """
    recorded = None if opened.manifest is None else opened.manifest.digest
    algorithm = None if recorded is None else recorded.partition(":")[0]
    digest = (
        adapter_digest(opened.files, opened.adapter)
        if algorithm is None
        else adapter_digest(opened.files, opened.adapter, algorithm=algorithm)
    )
    if recorded is not None and recorded != digest:
        raise IntegrityError.of(
            "adapter",
            f"the adapter is {digest}, but its manifest records {recorded}.",
            file=str(opened.files.root),
            remedy="Its files were changed after `adaptertool init`: get them again, or write it anew.",
        )
    return HistoryInput(role=role, digest=digest)


def is_product(module: TargetModule) -> bool:
    """Tells whether a module's delta is one product s·B·A: no stacked experts, no convolution in groups."""
    return (
        module.kind in _KINDS
        and {"A", "B"} <= set(module.factors)
        and "groups" not in module.hparams
        and not module.hparams.get("nesting")
    )


def scale_of(module: TargetModule) -> Surd:
    """Returns the exact scale of a LoRA module."""
    hparams = module.hparams
    return scaling_of(hparams["alpha"], hparams["rank"], hparams.get("scaling", RULES[0]))


def alpha_for(scale: Surd, rank: int, rule: str) -> float | None:
    """Returns the alpha that gives exactly this scale at a rank; None if no binary64 does.

    Args:
        scale: s.
        rank: the rank.
        rule: one of RULES: s = alpha/rank, or alpha/√rank.
    """
    wanted = (
        Surd(coefficient=scale.coefficient * rank, radicand=scale.radicand)
        if rule == RULES[0]
        else Surd.of(scale.coefficient, scale.radicand * rank)
    )
    if wanted.radicand != 1:
        return None
    try:
        alpha = float(wanted.coefficient)
    except OverflowError:
        return None
    return alpha if Fraction(alpha) == wanted.coefficient and alpha > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """How a module is scaled after its rank has changed.

    Attributes:
        alpha: its alpha under the rule.
        factor: what its factors (and lora_bias) are multiplied by; 1 where alpha alone gives the scale.
    """

    alpha: float
    factor: float


def rescaled(scale: Surd, rank: int, rule: str, *, fold: bool = False) -> Scaled:
    """Keeps a scale at another rank: in alpha where a binary64 can, else in the factors with a scale of 1.

    Args:
        scale: s.
        rank: the new rank.
        rule: one of RULES; ``"alpha/rank"`` unless alpha can express the scale.
        fold: True to put it into the factors in any case.

    Raises:
        ValueError: the scale has to go into the factors, but the rule is not ``"alpha/rank"``.
    """
    alpha = None if fold else alpha_for(scale, rank, rule)
    if alpha is not None:
        return Scaled(alpha=alpha, factor=1.0)
    if rule != RULES[0]:
        raise ValueError("alpha = rank is a scale of 1 only under alpha/rank")
    return Scaled(alpha=float(rank), factor=float(scale))


class Loader:
    """Reads the tensors of one opened adapter.

    Args:
        opened: the adapter.
        source: its open weight file.

    Attributes:
        source: likewise.
    """

    def __init__(self, opened: OpenedAdapter, source: OpenSource) -> None:
        """Keeps both."""
        self._offsets = opened.files.header.offsets if opened.files.header else {}
        self.source: OpenSource = source

    def range_of(self, spec: TensorSpec) -> ByteRange:
        """Returns where a tensor is."""
        return ByteRange(uri=self.source.name, offset=self._offsets[spec.name], spec=spec)

    def load(self, spec: TensorSpec) -> Tensor:
        """Returns a tensor as it is stored; NaN and infinities are errors."""
        from adapterhub_tools.engine.buffers import load_whole

        return load_whole(self.source, self.range_of(spec))

    def product(self, module: TargetModule) -> tuple[Tensor, Tensor]:
        """Returns (B, A) of a module as float64 matrices: (out, rank) and (rank, in·…)."""
        b = self.load(module.factors["B"]).double().flatten(1)
        a = self.load(module.factors["A"]).double().flatten(1)
        return b, a

    def content(self, spec: TensorSpec) -> StoredContent:
        """Returns a tensor's bytes as they are stored."""
        return StoredContent(source=self.source, offset=self._offsets[spec.name], nbytes=spec.nbytes)


class Tensors:
    """The tensors of a draft: copied or computed, each under a name of its own.

    Attributes:
        contents: name -> bytes.
    """

    def __init__(self, spool: Spool) -> None:
        """Begins without any."""
        self._spool = spool
        self.contents: dict[str, Content] = {}

    def keep(self, loader: Loader, spec: TensorSpec) -> TensorSpec:
        """Takes a tensor along as it is stored, under its own name."""
        self._add(spec.name, loader.content(spec))
        return spec

    def put(self, values: Tensor, dtype: str, name: str) -> tuple[TensorSpec, Tensor]:
        """Rounds float64 values once to a dtype and takes them along.

        Returns:
            The tensor's description, and its values as they are stored now.
        """
        from adapterhub_tools.linalg.casting import cast

        stored = cast(values, dtype, name=name)
        return self.put_stored(stored, name), stored

    def put_stored(self, stored: Tensor, name: str) -> TensorSpec:
        """Takes values along that are in their storage dtype already."""
        spec, content = self._spool.put(stored, name)
        self._add(name, content)
        return spec

    def keep_module(self, loader: Loader, module: TargetModule) -> TargetModule:
        """Takes all factors of a module along as they are stored."""
        for spec in module.factors.values():
            self.keep(loader, spec)
        return module

    def _add(self, name: str, content: Content) -> None:
        if name in self.contents:
            raise ValueError(f"two tensors of a draft are called {name!r}")
        self.contents[name] = content


def factor_shapes(module: TargetModule, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Returns matrices (out, k) and (k, in·…) in the shapes that the module's factors have."""
    rank = int(a.shape[0])
    old_b, old_a = module.factors["B"].shape, module.factors["A"].shape
    return b.reshape(old_b[0], rank, *old_b[2:]), a.reshape(rank, *old_a[1:])


def one_rule(adapter: Adapter) -> str:
    """Returns the scaling rule of an adapter's modules.

    Raises:
        UnsupportedError: there are several, or one that PEFT does not have.
    """
    rules = {module.hparams.get("scaling", RULES[0]) for module in adapter.modules}
    if len(rules) != 1 or not rules <= set(RULES):
        raise UnsupportedError.of(
            "scaling",
            f"its modules are scaled by {', '.join(sorted(map(str, rules)))}; expected one rule of PEFT.",
            remedy="Fold the scales into the factors first: `adaptertool convert --to lora --fold-scale`.",
        )
    return str(rules.pop())


def with_scale(module: TargetModule, rank: int, alpha: float, rule: str) -> dict[str, Any]:
    """Returns a module's hyperparameters with another rank, alpha and rule."""
    return {**module.hparams, "rank": rank, "alpha": alpha, "scaling": rule}


def refuse_zero(norms: Sequence[float], path: Path) -> None:
    """Refuses an adapter none of whose deltas is other than zero.

    Raises:
        MismatchError: all are zero.
    """
    if not any(norm > 0 for norm in norms):
        raise MismatchError.of(
            "zero-delta",
            "every delta of it is exactly zero, so there is nothing to decompose.",
            file=str(path),
            remedy="It was saved before training, or training did not reach it; use a later checkpoint.",
        )


def replace_modules(adapter: Adapter, modules: Sequence[TargetModule], **changes: Any) -> Adapter:
    """Returns the adapter with other modules, ordered by path."""
    return replace(adapter, modules=tuple(sorted(modules, key=lambda m: m.path)), **changes)
