"""Whether all that an adapter's config declares stands in its file, as far as the base has it.

A file may be cut short without a trace: a layer's factors, one tensor of a module trained whole, the biases.
Merging it would mix trained and untrained weights. What the config declares and the base has must therefore
be in the file. Left out may only be what the model in training need not have had: heads of other tasks and
second towers, of which the adapter touches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from adapterhub_tools import registry
from adapterhub_tools.architectures import Architecture
from adapterhub_tools.errors import Problem, escape
from adapterhub_tools.model.adapter import Adapter
from adapterhub_tools.model.declared import Declared
from adapterhub_tools.model.tensor import FLOAT_DTYPES, TensorSpec
from adapterhub_tools.ops.name_rules import NameRule
from adapterhub_tools.ops.tied import Tie
from adapterhub_tools.store.checkpoint import Checkpoint

_SHOWN = 10

_NOT_TRAINED = ("inv_freq", "position_ids", "masked_bias")
"""Tensors that old checkpoints store and that models make themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """The base's tensors by their names in memory, and what the adapter's file has of them.

    Attributes:
        names: name in memory -> name on disk; of a tie, the head too.
        specs: name on disk -> tensor.
        have: names, in memory and on disk, that the file replaces; with a tied tensor all that share it.
        region: tells which modules the model in training need not have had.
    """

    names: dict[str, str]
    specs: Mapping[str, TensorSpec]
    have: Collection[str]
    region: _Region

    def missing(self, wanted: Iterable[str]) -> list[str]:
        """Returns those of some names in memory that the file does not replace."""
        return [name for name in wanted if name not in self.have and self.names[name] not in self.have]


def check_coverage(
    adapter: Adapter,
    checkpoint: Checkpoint,
    rule: NameRule,
    architecture: Architecture | None,
    tie: Tie | None,
    replaced: Collection[str],
    problems: list[Problem],
    notes: list[str],
) -> None:
    """Holds an adapter's file against its config and the base.

    Args:
        adapter: as read from its files.
        checkpoint: the base.
        rule: how module names become names on disk.
        architecture: what is known of the base's model type.
        tie: the base's tied embeddings.
        replaced: the base tensors that the adapter carries in full, by name on disk.
        problems: gets one of kind "coverage" for each field of the config that the file does not fulfil.
        notes: gets what is left out and may be.
    """
    if adapter.dialect not in registry.names("dialects"):
        return
    dialect = registry.load("dialects", adapter.dialect)
    declared = dialect.declared(adapter) if hasattr(dialect, "declared") else Declared()
    base = _read_base(adapter, declared, checkpoint, rule, architecture, tie, replaced)
    _check_targets(adapter, declared, dialect.targeted, base, architecture, problems, notes)
    _check_saved(adapter, declared, base, tie, problems, notes)
    _check_biases(adapter, declared, base, problems, notes)
    _check_tokens(adapter, declared, base, tie, problems, notes)


def _read_base(
    adapter: Adapter,
    declared: Declared,
    checkpoint: Checkpoint,
    rule: NameRule,
    architecture: Architecture | None,
    tie: Tie | None,
    replaced: Collection[str],
) -> _Base:
    specs = {name: stored.spec for name, stored in checkpoint.tensors.items()}
    if tie is not None and not tie.headless and tie.output_name not in specs:
        specs[tie.output_name] = specs[tie.input_name]
    names = {_in_memory(name, rule): name for name in specs}
    whole = [item.target for item in adapter.full if item.rows is None]
    have = {*whole, *(name for name in replaced if name in specs)}
    for name, disk in names.items():
        shared = set() if architecture is None else set(architecture.tied_group(name, tied=tie is not None))
        if name.endswith(".bias") and shared & have:
            have.add(disk)
    touched = [m.path for m in adapter.modules] + [item.target.rpartition(".")[0] for item in adapter.full]
    region = _Region(touched, [n.rpartition(".")[0] for n in names], declared, architecture)
    return _Base(names=names, specs=specs, have=have, region=region)


def _in_memory(name: str, rule: NameRule) -> str:
    module, dot, leaf = name.rpartition(".")
    return f"{rule.to_memory(module)}.{leaf}" if dot else name


class _Region:
    """Tells which modules of a base the model in training must have had."""

    def __init__(
        self,
        touched: Iterable[str],
        modules: Iterable[str],
        declared: Declared,
        architecture: Architecture | None,
    ) -> None:
        """Prepares the answer.

        Args:
            touched: paths of the modules that the adapter has something for.
            modules: paths of all modules of the base, in memory.
            declared: the adapter's declaration, which may tell whether the model had an output head.
            architecture: the base's, or None.
        """
        self._prefix = f"{architecture.base_prefix}." if architecture and architecture.base_prefix else ""
        paths = list(touched)
        self.templates = {template(path) for path in paths}
        self._stems = {stem for stem in map(_stem, self.templates) if stem is not None}
        self._parts = {self._part(path) for path in paths}
        self._stacks = {self._part(path) for path in modules if _stem(template(path)) is not None}
        output = architecture.output_embedding if architecture else None
        self._head = (output.rpartition(".")[0] or output) if output else None
        self._has_head = declared.has_output_head or any(self.in_head(path) for path in paths)
        self.headless = declared.has_output_head is False
        entry = architecture.input_embedding if architecture else None
        self._entry = self._part(entry) if entry else None

    def in_head(self, path: str) -> bool:
        """Tells whether a module makes logits of tokens, or stands beside the one that does."""
        head = self._head
        return head is not None and (path == head or path.startswith(f"{head}."))

    def may_lack(self, path: str) -> bool:
        """Tells whether a model that the adapter fits may have had no such module.

        It may where the module is of a stack of layers, a tower, a pooler or a head of which the adapter has
        nothing.
        """
        if self.in_head(path):
            return not self._has_head
        form = template(path)
        stem = _stem(form)
        if form in self.templates:
            return False
        if stem is not None:
            return stem not in self._stems
        part = self._part(path)
        inside, name = part
        if inside or not self._prefix:
            if part in self._stacks:
                return part not in self._parts
            return "pool" in name or not (inside or part in self._parts or part == self._entry)
        return True

    def _part(self, path: str) -> tuple[bool, str]:
        """Returns whether a module is inside the bare model, and which child of its it is or belongs to."""
        inside = bool(self._prefix) and path.startswith(self._prefix)
        return inside, path.removeprefix(self._prefix).partition(".")[0]


def _check_targets(
    adapter: Adapter,
    declared: Declared,
    targeted: Callable[[Adapter, list[str]], tuple[list[str], bool]],
    base: _Base,
    architecture: Architecture | None,
    problems: list[Problem],
    notes: list[str],
) -> None:
    """Every targeted module must have factors: if repeated alike, or if its entry names nothing else."""
    have = {m.path for m in adapter.modules}
    have |= {item.target.rpartition(".")[0] for item in adapter.full if item.rows is not None}
    if not have:
        return
    covered = {template(path) for path in have}
    stems = {form.partition("*")[0] for form in covered}
    modules = [
        name.removesuffix(".weight")
        for name, disk in base.names.items()
        if name.endswith(".weight") and len(base.specs[disk].shape) >= 2
        if template(name.removesuffix(".weight")) in covered or not _converted(disk, architecture)
    ]
    expected, named = targeted(adapter, modules)
    missing = [path for path in expected if path not in have]
    alone = _uncovered_entries(declared.entries, expected, have)
    lost, outside = [], []
    for path in missing:
        form = template(path)
        beside = named and "*" in form and form.partition("*")[0] in stems
        if form in covered or beside or (_ends(path) & alone and not _other_head(path, base)):
            lost.append(path)
        else:
            outside.append(path)
    if lost:
        message = f"the config targets {len(lost)} modules that the adapter has no factors for: {_some(lost)}"
        remedy = "The file is incomplete: save the adapter again, or correct target_modules."
        problems.append(Problem(kind="coverage", loc=lost[0], message=message, remedy=remedy))
    if outside and named:
        notes.append(f"targeted by name but not adapted: {', '.join(outside[:_SHOWN])}")


def _other_head(path: str, base: _Base) -> bool:
    return base.region.headless and base.region.in_head(path)


def _uncovered_entries(entries: Iterable[str], expected: Iterable[str], have: Collection[str]) -> set[str]:
    """Returns the entries that name modules of the base, of which the adapter has none."""
    named = {end for path in expected for end in _ends(path)}
    done = {end for path in have for end in _ends(path)}
    return {entry for entry in entries if entry in named and entry not in done}


def _check_saved(
    adapter: Adapter,
    declared: Declared,
    base: _Base,
    tie: Tie | None,
    problems: list[Problem],
    notes: list[str],
) -> None:
    """Every tensor of a module trained whole must be in the file."""
    by_entry: dict[str, list[str]] = {}
    for name, disk in base.names.items():
        if not _is_parameter(name, base.specs[disk]):
            continue
        if tie is not None and adapter.ties and disk == tie.output_name:
            continue
        for entry in declared.saved_entries(name.rpartition(".")[0]):
            by_entry.setdefault(entry, []).append(name)
    for entry, names in by_entry.items():
        missing = base.missing(names)
        partly = len(missing) < len(names)
        excused = [n for n in missing if partly and base.region.may_lack(n.rpartition(".")[0])]
        _report(
            [n for n in missing if n not in set(excused)],
            f'of "{escape(entry)}", trained whole,',
            "modules_to_save (and task_type, which names a head)",
            problems,
        )
        if excused:
            notes.append(f'named by "{escape(entry)}" but not in the adapter: {_some(excused)}')


def _check_biases(
    adapter: Adapter, declared: Declared, base: _Base, problems: list[Problem], notes: list[str]
) -> None:
    """Every bias that was trained must be in the file."""
    if declared.bias == "none":
        return
    biases = [
        name
        for name, disk in base.names.items()
        if name.rpartition(".")[2] == "bias" and _is_parameter(name, base.specs[disk])
    ]
    if declared.bias == "targets":
        targets = {module.path for module in adapter.modules}
        biases = [name for name in biases if name.rpartition(".")[0] in targets]
    missing = base.missing(biases)
    excused = [name for name in missing if base.region.may_lack(name.rpartition(".")[0])]
    lost = [name for name in missing if name not in set(excused)]
    _report(lost, "that are biases, which the config says were trained,", "bias", problems)
    if excused:
        notes.append(f"biases of the base that the adapter does not have: {_some(excused)}")


def _check_tokens(
    adapter: Adapter,
    declared: Declared,
    base: _Base,
    tie: Tie | None,
    problems: list[Problem],
    notes: list[str],
) -> None:
    """Every module with trained token rows must have them; tied ones with the same indices share them."""
    rows = {item.target: item.rows for item in adapter.full if item.rows is not None}
    members = () if tie is None else tie.members
    shared = {rows[name] for name, disk in base.names.items() if name in rows and disk in members}
    for entry, indices in declared.tokens.items():
        named = [
            name
            for name, disk in base.names.items()
            if name.endswith(f"{entry}.weight") and len(base.specs[disk].shape) == 2
        ]
        missing = [
            name
            for name in named
            if name not in rows and not (base.names[name] in members and indices in shared)
        ]
        what = f'of "{escape(entry)}", of which token rows were trained,'
        _report(missing, what, "trainable_token_indices", problems)
        if not named:
            notes.append(f'trainable_token_indices names "{escape(entry)}", which the base does not have.')


def _report(missing: list[str], what: str, field: str, problems: list[Problem]) -> None:
    if not missing:
        return
    problems.append(
        Problem(
            kind="coverage",
            loc=missing[0],
            message=f"the adapter lacks {len(missing)} tensors {what} that the base has: {_some(missing)}",
            remedy=f"The file is incomplete: save the adapter again, or correct {field} in its config if the "
            "base's values are to stay.",
        )
    )


def _is_parameter(name: str, spec: TensorSpec) -> bool:
    """Tells a parameter, or a buffer that every model has, from what old checkpoints store beside them.

    GPT-2's causal mask is called ``attn.bias`` and has four axes.
    """
    leaf = name.rpartition(".")[2]
    if spec.dtype not in FLOAT_DTYPES or leaf in _NOT_TRAINED:
        return False
    return leaf != "bias" or len(spec.shape) == 1


def _converted(disk: str, architecture: Architecture | None) -> bool:
    """Tells whether a weight on disk is a part of one in memory, which has another name."""
    if architecture is None:
        return False
    form = f".{template(disk)}"
    return any(form.endswith(f".{end}") for item in architecture.converters for end in item.disk)


def _ends(path: str) -> set[str]:
    parts = path.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else ".")


def _stem(form: str) -> str | None:
    return form.partition("*")[0] if "*" in form else None


def template(path: str) -> str:
    """Returns a path with a star for each index."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", path)
