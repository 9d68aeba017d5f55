"""Fits an adapter to a base: which module meets which stored tensor, by rule, and whether everything is covered.

An adapter names modules as they stood in memory when it was trained; a checkpoint names tensors as some class saved
them. One rule must take every module of the adapter to a tensor of the base. Names as they are come first; otherwise
the rule is reported, and where two rules fit or none does, that is an error with the nearest names, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches

from adapterhub_tools import registry
from adapterhub_tools.architectures import lookup
from adapterhub_tools.errors import MismatchError, Problem, UnsupportedError
from adapterhub_tools.model.adapter import Adapter, FullTensor, TargetModule
from adapterhub_tools.model.plan import Placement
from adapterhub_tools.model.tensor import FLOAT_DTYPES
from adapterhub_tools.ops.tied import Tie, find_tie
from adapterhub_tools.store.checkpoint import Checkpoint

WRAPPERS = ("0.auto_model.", "auto_model.", "base_model.", "model.")
"""Attribute names under which other libraries keep the model: sentence-transformers, and plain wrapper classes."""

_SHOWN = 10
_ONE_D_KINDS = ("linear", "conv1d", "unknown")


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
        rule: the rule that took module names to tensor names, in words.
        problems: everything that stands against a merge.
        notes: what was decided by rule.
    """

    modules: tuple[TargetModule, ...]
    placements: dict[str, Placement]
    biases: dict[str, str]
    full: tuple[FittedFull, ...]
    tie: Tie | None
    rule: str
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def target_names(self) -> tuple[str, ...]:
        """The base tensors that the adapter changes, sorted by the bytes of their names."""
        names = {place.base_tensor for place in self.placements.values()} | set(self.biases.values())
        names |= {item.base_tensor for item in self.full if not item.added}
        return tuple(sorted(names, key=lambda name: name.encode("utf-8")))

    def raise_for_problems(self) -> None:
        """Raises UnsupportedError if all problems are of that sort, else MismatchError; returns if there are none."""
        if not self.problems:
            return
        unsupported = all(p.kind in ("quantised-base", "tied-unsupported") for p in self.problems)
        raise (UnsupportedError if unsupported else MismatchError)(*self.problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """A way from module names in memory to names on disk: strip one prefix, then add another."""

    words: str
    strip: str = ""
    add: str = ""

    def to_disk(self, path: str, stored: Collection[str]) -> str:
        if self.strip and path.startswith(self.strip):
            path = path.removeprefix(self.strip)
        added = self.add + path
        # A head such as lm_head stands beside the base model, not inside it.
        return path if self.add and f"{added}.weight" not in stored and f"{path}.weight" in stored else added

    def to_memory(self, path: str) -> str:
        if self.add and path.startswith(self.add):
            path = path.removeprefix(self.add)
        return self.strip + path


def fit(adapter: Adapter, checkpoint: Checkpoint) -> Fit:
    """Fits an adapter to a base.

    Args:
        adapter: as read from its files.
        checkpoint: the base.

    Returns:
        The fit; ``problems`` holds everything that is wrong.
    """
    config = checkpoint.config or {}
    architecture = lookup(config.get("model_type"))
    tie = find_tie(checkpoint, architecture)
    stored = checkpoint.tensors.keys()
    problems: list[Problem] = []
    notes: list[str] = []
    reach = set(stored) | ({f"{tie.output_module}.weight"} if tie else set())
    rule = _choose_rule(adapter, reach, architecture.base_prefix, problems)
    if rule.strip or rule.add:
        notes.append(f"names: {rule.words}")
    modules, placements, biases = [], {}, {}
    for module in adapter.modules:
        name = f"{rule.to_disk(module.path, reach)}.weight"
        source = tie.input_name if tie and name not in stored and name == tie.output_name else name
        if source not in stored:
            continue
        fitted = _fit_module(module, source, checkpoint, architecture.conv1d_modules, problems, notes)
        modules.append(fitted)
        placements[module.path] = Placement(base_tensor=name, transposed=fitted.kind in ("conv1d", "embedding"))
        if "bias" in module.factors:
            _fit_bias(module, name.removesuffix("weight") + "bias", checkpoint, biases, problems)
    full = [
        item for carried in adapter.full if (item := _fit_full(carried, rule, checkpoint, tie, problems)) is not None
    ]
    _check_coverage(adapter, checkpoint, rule, problems, notes)
    return Fit(
        modules=tuple(modules),
        placements=placements,
        biases=biases,
        full=tuple(full),
        tie=tie,
        rule=rule.words,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _choose_rule(adapter: Adapter, stored: Collection[str], prefix: str, problems: list[Problem]) -> _Rule:
    paths = [module.path for module in adapter.modules]
    if not paths:
        paths = [item.target.rpartition(".")[0] for item in adapter.full]
    inner = f"{prefix}." if prefix else ""
    rules = [_Rule(words="as they are")]
    for wrapper in ("", *WRAPPERS):
        said = f"'{wrapper}' taken off" if wrapper else ""
        if wrapper:
            rules.append(_Rule(words=said, strip=wrapper))
        if inner:
            rules.append(_Rule(words=_join(said, f"'{inner}' put before"), strip=wrapper, add=inner))
            if wrapper + inner != wrapper:
                rules.append(_Rule(words=f"'{wrapper}{inner}' taken off", strip=wrapper + inner))
    found = [(sum(f"{r.to_disk(p, stored)}.weight" in stored for p in paths), r) for r in rules]
    best = max(count for count, _ in found)
    winners = [r for count, r in found if count == best]
    if best < len(paths):
        if adapter.modules:
            problems.extend(_unresolved(paths, winners[0], stored))
        return winners[0]
    if winners[0].words == "as they are":
        return winners[0]
    ways = {tuple(r.to_disk(p, stored) for p in paths): r for r in reversed(winners)}
    if len(ways) > 1:
        problems.append(
            Problem(
                kind="ambiguous-names",
                message=f"the adapter's module names fit the base in {len(ways)} ways: "
                + "; ".join(rule.words for rule in ways.values()),
                remedy="Rename the adapter's keys to the base's names.",
            )
        )
    return winners[0]


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _unresolved(paths: Iterable[str], rule: _Rule, stored: Collection[str]) -> list[Problem]:
    known = sorted({name.removesuffix(".weight") for name in stored if name.endswith(".weight")})
    missing = [path for path in paths if f"{rule.to_disk(path, stored)}.weight" not in stored]
    problems = []
    for path in missing[:_SHOWN]:
        near = get_close_matches(rule.to_disk(path, stored), known, n=3, cutoff=0.5)
        problems.append(
            Problem(
                kind="unknown-module",
                loc=path,
                message="the base has no such module"
                + (f"; near names are {', '.join(near)}." if near else "; no name comes near it."),
                remedy="Use the base that the adapter was trained on; `adaptertool inspect` shows both.",
            )
        )
    if len(missing) > _SHOWN:
        problems.append(
            Problem(kind="unknown-module", message=f"and {len(missing) - _SHOWN} further modules of the adapter.")
        )
    return problems


def _fit_module(
    module: TargetModule,
    source: str,
    checkpoint: Checkpoint,
    conv1d: Collection[str] | None,
    problems: list[Problem],
    notes: list[str],
) -> TargetModule:
    """Decides the kind where the adapter's file leaves it open, and compares the shapes."""
    base = checkpoint.tensors[source].spec
    kind = module.kind
    if kind in _ONE_D_KINDS and "A" in module.factors and "B" in module.factors:
        kind = _linear_or_conv1d(module, base.shape, conv1d)
        if kind != module.kind and module.kind != "unknown":
            note = f"fan_in_fan_out is {module.kind == 'conv1d'} in the config, but the base stores {kind} weights"
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
    elif module.method in registry.names("methods"):
        method = registry.load("methods", module.method).IMPLEMENTATION.from_hparams(module.hparams)
        problems.extend(method.check(module.factors, kind, base, module.path))
    return replace(module, kind=kind, base_shape=base.shape)


def _linear_or_conv1d(module: TargetModule, shape: tuple[int, ...], conv1d: Collection[str] | None) -> str:
    """The architecture's table decides; where it has none, the shape; where that is square, the config."""
    if conv1d is not None:
        return "conv1d" if module.path.rpartition(".")[2] in conv1d else "linear"
    linear = (module.factors["B"].shape[0], module.factors["A"].shape[-1])
    if linear[0] == linear[1] or shape not in (linear, linear[::-1]):
        return "linear" if module.kind == "unknown" else module.kind
    return "linear" if shape == linear else "conv1d"


def _fit_bias(
    module: TargetModule, name: str, checkpoint: Checkpoint, biases: dict[str, str], problems: list[Problem]
) -> None:
    spec = module.factors["bias"]
    if name in checkpoint.tensors and checkpoint.tensors[name].spec.shape == spec.shape:
        biases[module.path] = name
        return
    found = "none" if name not in checkpoint.tensors else str(list(checkpoint.tensors[name].spec.shape))
    problems.append(
        Problem(
            kind="bias",
            loc=module.path,
            message=f"the adapter adds to a bias of shape {list(spec.shape)}, but for {name} the base has {found}.",
            remedy="Only a base whose layers have biases can take an adapter with lora_bias.",
        )
    )


def _fit_full(
    item: FullTensor, rule: _Rule, checkpoint: Checkpoint, tie: Tie | None, problems: list[Problem]
) -> FittedFull | None:
    module, _, leaf = item.target.rpartition(".")
    name = f"{rule.to_disk(module, checkpoint.tensors.keys())}.{leaf}"
    if name not in checkpoint.tensors and item.target in checkpoint.tensors:
        name = item.target
    shape = item.tensor.shape
    if name not in checkpoint.tensors:
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
    base = checkpoint.tensors[name].spec
    if item.rows is not None:
        fits = len(base.shape) == 2 and shape == (len(item.rows), base.shape[1]) and max(item.rows) < base.shape[0]
        if not fits:
            problems.append(_full_shape(item, name, base.shape, "rows of the same width, with indices inside it"))
        return FittedFull(full=item, base_tensor=name, added=False, grown=False)
    if shape == base.shape:
        return FittedFull(full=item, base_tensor=name, added=False, grown=False)
    if tie_or_embedding(name, tie, checkpoint) and len(shape) == len(base.shape) and shape[1:] == base.shape[1:]:
        return FittedFull(full=item, base_tensor=name, added=False, grown=True)
    problems.append(_full_shape(item, name, base.shape, "the same shape"))
    return None


def tie_or_embedding(name: str, tie: Tie | None, checkpoint: Checkpoint) -> bool:
    """Says whether a base tensor is an input or output embedding, which may have another number of rows."""
    if tie and name in (tie.input_name, tie.output_name):
        return True
    architecture = lookup((checkpoint.config or {}).get("model_type"))
    module = name.rpartition(".")[0]
    known = [part for part in (architecture.input_embedding, architecture.output_embedding) if part]
    return any(module == part or part.endswith(f".{module}") for part in known)


def _full_shape(item: FullTensor, name: str, shape: tuple[int, ...], wanted: str) -> Problem:
    return Problem(
        kind="shape",
        loc=item.tensor.name,
        message=f"it has shape {list(item.tensor.shape)}, but {name} of the base is {list(shape)}; expected {wanted}.",
        remedy="Use the base that the adapter was trained on.",
    )


def _check_coverage(
    adapter: Adapter, checkpoint: Checkpoint, rule: _Rule, problems: list[Problem], notes: list[str]
) -> None:
    """Every base module that the config targets must be in the adapter, as far as they are repeated alike."""
    if not adapter.modules or adapter.dialect not in registry.names("dialects"):
        return
    matches = registry.load("dialects", adapter.dialect).targeted
    on_disk = [n.removesuffix(".weight") for n, t in checkpoint.tensors.items() if _is_weight(n, t.spec.shape)]
    in_memory = [rule.to_memory(path) for path in on_disk]
    have = {module.path for module in adapter.modules}
    covered = {_template(path) for path in have}
    stems = {template.partition("*")[0] for template in covered}
    missing = [path for path in matches(adapter, in_memory) if path not in have]
    lost = [p for p in missing if _template(p) in covered or _template(p).partition("*")[0] in stems and "*" in _template(p)]
    if lost:
        problems.append(
            Problem(
                kind="coverage",
                loc=lost[0],
                message=f"the config targets {len(lost)} modules of the base that the adapter has no factors for: "
                + ", ".join(lost[:_SHOWN])
                + (", …" if len(lost) > _SHOWN else "."),
                remedy="The file is incomplete: save the adapter again, or correct target_modules if it was meant.",
            )
        )
    outside = [path for path in missing if path not in set(lost)]
    if outside:
        notes.append(f"targeted by name but not adapted: {', '.join(outside[:_SHOWN])}")


def _is_weight(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) >= 2


def _template(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", path)
