"""Names in memory and names on disk where they differ, as data: dotted paths in which ``*`` is an index.

A library may rename modules between releases and still write the names that published checkpoints have. An
adapter then names its targets otherwise than the checkpoint names the weights. The table states each such
pair; nothing is derived from how similar two names look.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rename:
    """One module whose path differs.

    Attributes:
        memory: its path in memory, such as ``"layers.*.attention.q_proj"``; empty for the whole model.
        disk: its paths in checkpoints, the one that is written first; more than one where published
            checkpoints differ.
    """

    memory: str
    disk: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Converter:
    """Weights that are more than renamed: joined, split or transposed on the way to memory.

    Such a weight cannot be merged into here; the row names what it would take.

    Attributes:
        memory: ends of the paths of the weights in memory, such as ``"mlp.experts.gate_up_proj"``.
        disk: those of the tensors on disk that they are made of, such as ``"mlp.experts.*.up_proj.weight"``.
        operations: what is done with them, in order, by the names that transformers gives:
            ``"MergeModulelist"`` stacks a list of experts, ``"Concatenate"`` joins, ``"Chunk"`` splits.
    """

    memory: tuple[str, ...]
    disk: tuple[str, ...]
    operations: tuple[str, ...]

    def makes(self, path: str) -> bool:
        """Tells whether the module at ``path`` is such a weight or holds it directly."""
        dotted = f".{path}"
        return any(dotted.endswith((f".{end}", f".{end.rpartition('.')[0] or end}")) for end in self.memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Renames:
    """Every renamed module of a model type; the longest path that matches decides.

    Attributes:
        base_prefix: the attribute under which a model with a head holds the bare one; paths of ``pairs`` are
            looked for at the start of a name and after it.
        pairs: the renamed modules.
    """

    base_prefix: str
    pairs: tuple[Rename, ...]

    def __bool__(self) -> bool:
        """Tells whether anything is renamed."""
        return bool(self.pairs)

    def to_disk(self, path: str) -> tuple[str, ...]:
        """Returns the names that a module or parameter may have on disk; empty if it is not renamed."""
        return self._replaced(path, [(pair.memory, pair.disk) for pair in self.pairs])

    def to_memory(self, path: str) -> str | None:
        """Returns the name in memory of a module or parameter on disk, or None if it is not renamed."""
        found = self._replaced(path, [(disk, (pair.memory,)) for pair in self.pairs for disk in pair.disk])
        return found[0] if found else None

    def _replaced(self, path: str, rules: list[tuple[str, tuple[str, ...]]]) -> tuple[str, ...]:
        rules = sorted(rules, key=lambda rule: -rule[0].count(".") if rule[0] else 1)
        head = f"{self.base_prefix}."
        parts = [("", path)]
        if self.base_prefix and path.startswith(head):
            parts.append((head, path.removeprefix(head)))
        for before, rest in parts:
            for pattern, targets in rules:
                caught = _match(pattern, rest)
                if caught is not None:
                    return tuple(before + _fill(target, *caught) for target in targets)
        return ()


def _match(pattern: str, path: str) -> tuple[list[str], list[str]] | None:
    """Returns the indices under the stars and the rest of the path; None if the pattern is not its start."""
    wanted, given = pattern.split(".") if pattern else [], path.split(".")
    if len(given) < len(wanted):
        return None
    indices = []
    for part, found in zip(wanted, given, strict=False):
        if part == "*" and found.isdecimal():
            indices.append(found)
        elif part != found:
            return None
    return indices, given[len(wanted) :]


def _fill(pattern: str, indices: list[str], rest: list[str]) -> str:
    left = iter(indices)
    parts = [next(left) if part == "*" else part for part in pattern.split(".")] if pattern else []
    return ".".join(parts + rest)
