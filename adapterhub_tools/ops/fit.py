"""Fits an adapter to a base: which module meets which stored tensor, by rule, and whether all is covered.

An adapter names modules as they stood in memory when it was trained; a checkpoint names tensors as some
class saved them. One rule must take every module of the adapter to a tensor of the base. Names as they are
come first, then the renames that the architecture's table states, then prefixes. A rule is reported, and
where two rules fit or none does, that is an error with the nearest names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from adapterhub_tools.architectures import Architecture, embedding_names, head_names, lookup
from adapterhub_tools.errors import MismatchError, Problem, UnsupportedError
from adapterhub_tools.model.adapter import WHOLE_MODEL, Adapter, FullTensor, TargetModule
from adapterhub_tools.model.plan import Placement
from adapterhub_tools.model.tensor import FLOAT_DTYPES, TensorSpec
from adapterhub_tools.ops.coverage import check_coverage
from adapterhub_tools.ops.module_kinds import (
    bias_factors,
    check_bias,
    decide_kind,
    extent_of,
    method_of,
    on_bias_only,
    unknown_layout,
)
from adapterhub_tools.ops.name_rules import NameRule, choose_rule
from adapterhub_tools.ops.quantised_base import foreign_scheme
from adapterhub_tools.ops.tied import Tie, find_tie, may_be_tied
from adapterhub_tools.store.checkpoint import Checkpoint

_UNSUPPORTED = ("quantised-base", "unknown-scheme", "tied-unsupported", "unknown-layout", "converted-weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedFull:
    """A tensor that the adapter carries in full, and the base tensor it stands for.

    Attributes:
        full: the adapter's tensor.
        base_tensor: the name on disk.
        added: True if the base has no such tensor.
        grown: True if it has more or fewer rows than the base's (a resized vocabulary).
    """

    full: FullTensor
    base_tensor: str
    added: bool
    grown: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How an adapter lies on a base.

    Attributes:
        modules: the target modules with kind and base shape resolved.
        placements: module path -> where its weight is in the base.
        biases: module path -> the base's bias tensor, for modules whose factors include one.
        full: the tensors carried in full.
        tie: the base's tied embeddings, or None.
        names: the rule that took module names to tensor names.
        problems: everything that stands against a merge.
        notes: what was decided by rule.
        whole: the adapter's factors that belong to no single module; each module's method has them too.
        extent: the largest out and in of the modules, where random bases of that size are not stored.
    """

    modules: tuple[TargetModule, ...]
    placements: dict[str, Placement]
    biases: dict[str, str]
    full: tuple[FittedFull, ...]
    tie: Tie | None
    names: NameRule
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    whole: tuple[TargetModule, ...] = ()
    extent: tuple[int, int] | None = None

    @property
    def described(self) -> tuple[TargetModule, ...]:
        """The modules as a manifest has them: those of the whole model too."""
        return (*self.whole, *self.modules)

    @property
    def shared(self) -> dict[str, TensorSpec]:
        """The factors that belong to no single module."""
        return {role: spec for module in self.whole for role, spec in module.factors.items()}

    @property
    def target_names(self) -> tuple[str, ...]:
        """The base tensors that the adapter changes or starts from, sorted by the bytes of their names.

        A head that is tied to the embedding and not stored has the embedding's tensor.
        """
        names = {self.stored(place.base_tensor) for place in self.placements.values()} | set(
            self.biases.values()
        )
        names |= {self.stored(item.base_tensor) for item in self.full if not item.added}
        return tuple(sorted(names, key=lambda name: name.encode("utf-8")))

    @property
    def changed_names(self) -> tuple[str, ...]:
        """The output tensors that the adapter changes or adds, sorted."""
        names = {place.base_tensor for place in self.placements.values()} | set(self.biases.values())
        return tuple(sorted(names | {item.base_tensor for item in self.full}))

    def stored(self, name: str) -> str:
        """Returns the base tensor that has a tensor's values: the embedding's for a head not stored."""
        return name if self.tie is None else self.tie.source_of(name)

    def raise_for_problems(self, label: str = "") -> None:
        """Raises UnsupportedError if all problems are of that sort, MismatchError if not; returns if none.

        Args:
            label: what to call the adapter in problems that name no file.
        """
        if not self.problems:
            return
        unsupported = all(p.kind in _UNSUPPORTED for p in self.problems)
        named = (problem if problem.file else replace(problem, file=label) for problem in self.problems)
        raise (UnsupportedError if unsupported else MismatchError)(*named)


def fit(adapter: Adapter, checkpoint: Checkpoint) -> Fit:
    """Fits an adapter to a base.

    Args:
        adapter: as read from its files.
        checkpoint: the base.

    Returns:
        The fit; ``problems`` holds everything that is wrong.
    """
    config = checkpoint.config or {}
    whole = tuple(module for module in adapter.modules if module.path == WHOLE_MODEL)
    shared = {role: spec for module in whole for role, spec in module.factors.items()}
    adapter = replace(adapter, modules=tuple(m for m in adapter.modules if m.path != WHOLE_MODEL))
    architecture = lookup(config.get("model_type"))
    tie = find_tie(checkpoint, architecture)
    stored = checkpoint.tensors.keys()
    problems: list[Problem] = []
    notes: list[str] = []
    reach = set(stored) | (set(tie.members) if tie else set())
    rule = choose_rule(adapter, reach, architecture, problems)
    if rule.strip or rule.add or rule.renames:
        notes.append(f"names: {rule.words}")
    full: list[FittedFull] = []
    starts: dict[str, TensorSpec] = {}
    for carried in sorted(adapter.full, key=lambda item: item.rows is not None):
        item = _fit_full(carried, rule, checkpoint, architecture, tie, starts, problems)
        if item is not None:
            full.append(item)
            if carried.rows is None:
                starts[item.base_tensor] = carried.tensor
    modules: list[TargetModule] = []
    placements: dict[str, Placement] = {}
    biases: dict[str, str] = {}
    for module in adapter.modules:
        name = f"{rule.to_disk(module.path, reach)}.weight"
        source = tie.source_of(name) if tie and name in tie.members else name
        if source not in stored:
            continue
        start = starts.get(name, checkpoint.tensors[source].spec)
        fitted = _fit_module(module, source, start, checkpoint, architecture, shared, problems, notes)
        modules.append(fitted)
        if not on_bias_only(fitted):
            placements[module.path] = Placement(
                base_tensor=name, transposed=fitted.kind in ("conv1d", "embedding")
            )
        _fit_bias(fitted, name.removesuffix("weight") + "bias", checkpoint, biases, problems)
    if tie is None and may_be_tied(checkpoint, architecture):
        problems.extend(_unknown_tie([*placements, *(item.full.target for item in full)]))
    if architecture is None:
        problems.extend(unknown_layout(modules))
    problems = _named_scheme(problems, checkpoint)
    replaced = {item.base_tensor for item in full if item.full.rows is None}
    check_coverage(adapter, checkpoint, rule, architecture, tie, replaced, problems, notes)
    return Fit(
        modules=tuple(modules),
        placements=placements,
        biases=biases,
        full=tuple(full),
        tie=tie,
        names=rule,
        problems=tuple(problems),
        notes=tuple(notes),
        whole=whole,
        extent=extent_of(modules, shared),
    )


def _named_scheme(problems: list[Problem], checkpoint: Checkpoint) -> list[Problem]:
    """Returns one problem in place of those that come from a scheme of quantisation that is not known here.

    Packed weights have names or dtypes of their own, so that modules seem to be missing.
    """
    rest = [p for p in problems if p.kind not in ("unknown-module", "quantised-base")]
    foreign = foreign_scheme(checkpoint) if len(rest) < len(problems) else None
    return problems if foreign is None else [foreign, *rest]


def _fit_module(
    module: TargetModule,
    source: str,
    start: TensorSpec,
    checkpoint: Checkpoint,
    architecture: Architecture | None,
    shared: Mapping[str, TensorSpec],
    problems: list[Problem],
    notes: list[str],
) -> TargetModule:
    """Decides the kind where the adapter's file leaves it open, and compares the shapes.

    The delta is added to ``start``: the base tensor ``source``, or the resized embedding that the adapter
    carries.
    """
    base = checkpoint.tensors[source].spec
    kind = decide_kind(module, start, architecture, shared)
    if kind != module.kind and module.kind != "unknown":
        said = module.kind == "conv1d"
        note = f"fan_in_fan_out is {said} in the config, but the base stores {kind} weights"
        if note not in notes:
            notes.append(note)
    if base.dtype not in FLOAT_DTYPES:
        problems.append(
            Problem(
                kind="quantised-base",
                file=checkpoint.tensors[source].file,
                loc=source,
                message=f"the weight is stored as {base.dtype}, which is a quantised form.",
                remedy="Give the 16- or 32-bit base that it was made from.",
            )
        )
    elif (method := method_of(module)) is not None:
        problems.extend(method.check({**shared, **module.factors}, kind, start, module.path))
    return replace(module, kind=kind, base_shape=start.shape)


def _fit_bias(
    module: TargetModule, name: str, checkpoint: Checkpoint, biases: dict[str, str], problems: list[Problem]
) -> None:
    factors = bias_factors(module)
    if not factors:
        return
    stored = checkpoint.tensors.get(name)
    found, there = check_bias(module, name, None if stored is None else stored.spec, factors)
    problems.extend(found)
    if there:
        biases[module.path] = name


def _fit_full(
    item: FullTensor,
    rule: NameRule,
    checkpoint: Checkpoint,
    architecture: Architecture | None,
    tie: Tie | None,
    starts: Mapping[str, TensorSpec],
    problems: list[Problem],
) -> FittedFull | None:
    """Finds the tensor that an adapter's full tensor replaces; ``starts`` has those replaced whole."""
    module, _, leaf = item.target.rpartition(".")
    name = f"{rule.to_disk(module, checkpoint.tensors.keys())}.{leaf}"
    if name not in checkpoint.tensors and item.target in checkpoint.tensors:
        name = item.target
    if name not in checkpoint.tensors and architecture is not None:
        name = architecture.on_disk(name, checkpoint.tensors.keys())
    shape = item.tensor.shape
    part = item.rows is not None or item.role == "bias"
    source = tie.source_of(name) if tie is not None and part else name
    if source not in checkpoint.tensors:
        if item.role in ("modules_to_save", "saved_embedding"):
            return FittedFull(full=item, base_tensor=name, added=True, grown=False)
        problems.append(
            Problem(
                kind="unknown-tensor",
                loc=item.tensor.name,
                message=f"the adapter replaces {item.target}, which the base does not have.",
                remedy="Use the base that the adapter was trained on.",
            )
        )
        return None
    base = starts.get(name, checkpoint.tensors[source].spec)
    if item.rows is not None:
        fits = (
            len(base.shape) == 2
            and shape == (len(item.rows), base.shape[1])
            and max(item.rows) < base.shape[0]
        )
        if not fits:
            problems.append(
                _full_shape(item, name, base.shape, "rows of the same width, with indices inside it")
            )
        return FittedFull(full=item, base_tensor=name, added=False, grown=False)
    if shape == base.shape:
        return FittedFull(full=item, base_tensor=name, added=False, grown=False)
    if is_embedding(name, tie, checkpoint) and len(shape) == len(base.shape) and shape[1:] == base.shape[1:]:
        return FittedFull(full=item, base_tensor=name, added=False, grown=True)
    problems.append(_full_shape(item, name, base.shape, "the same shape"))
    return None


def is_embedding(name: str, tie: Tie | None, checkpoint: Checkpoint) -> bool:
    """Says whether a base tensor is an input or output embedding, which may have another number of rows."""
    if tie and name in tie.members:
        return True
    architecture = lookup((checkpoint.config or {}).get("model_type"))
    module = name.rpartition(".")[0]
    stored = checkpoint.tensors.keys()
    if architecture is None:
        return module.rpartition(".")[2] in embedding_names()
    paths = (architecture.input_embedding, architecture.output_embedding)
    known = [architecture.on_disk(f"{path}.weight", stored).removesuffix(".weight") for path in paths if path]
    return any(module == part or part.endswith(f".{module}") for part in known)


def is_head_bias(name: str, checkpoint: Checkpoint) -> bool:
    """Says whether a base tensor is a bias of the head: of its output embedding or of the module around it.

    BART keeps one beside its head (``final_logits_bias``), BERT in the block that holds the decoder.
    """
    architecture = lookup((checkpoint.config or {}).get("model_type"))
    module, _, leaf = name.rpartition(".")
    if not leaf.endswith("bias"):
        return False
    if architecture is None or not architecture.output_embedding:
        return module.rpartition(".")[2] in head_names()
    head = architecture.on_disk(f"{architecture.output_embedding}.weight", checkpoint.tensors.keys())
    return module in (head.removesuffix(".weight"), head.removesuffix(".weight").rpartition(".")[0])


def _unknown_tie(paths: Iterable[str]) -> list[Problem]:
    leaves = embedding_names()
    return [
        Problem(
            kind="tied-unsupported",
            loc=path,
            message="the base ties its embeddings, or may do so, under names that are not known here.",
            remedy="Untie the base: load it, clone the weight, save it with tie_word_embeddings=false.",
        )
        for path in paths
        if leaves & {path.rpartition(".")[2], path.rpartition(".")[0].rpartition(".")[2]}
    ]


def _full_shape(item: FullTensor, name: str, shape: tuple[int, ...], wanted: str) -> Problem:
    return Problem(
        kind="shape",
        loc=item.tensor.name,
        message=f"it has shape {list(item.tensor.shape)}, but {name} of the base is {list(shape)}; "
        f"expected {wanted}.",
        remedy="Use the base that the adapter was trained on.",
    )
