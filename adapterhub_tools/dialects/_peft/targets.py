"""Which modules a PEFT config means: ``target_modules`` and what narrows it.

The rules are those of PEFT 0.21 (``peft.tuners.tuners_utils.check_target_module_exists``), which older
configs follow too: a list entry is a whole path or its end after a dot, a string is a regular expression for
the whole path, ``exclude_modules`` and ``modules_to_save`` win over both, and ``layers_to_transform`` picks
layers by the first number in the path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub_tools.dialects._peft.patterns import Pattern, captures, is_literal, literal_at, matches

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRule:
    """What a config says about which modules it adapts.

    Attributes:
        target_modules: names, or a regular expression for the whole path, or None where the config leaves it
            to the model's architecture.
        exclude_modules: names or a regular expression that are left alone, whatever ``target_modules`` says.
        modules_to_save: modules trained whole; they and everything below them carry no factors.
        layers: the layer numbers that ``layers_to_transform`` picks, or None for all.
        layers_pattern: names of the list of layers; empty for any.
        parameters: ``target_parameters``, names of parameters (experts) rather than modules.
        file: the config file, for messages.
    """

    target_modules: tuple[str, ...] | str | None
    exclude_modules: tuple[str, ...] | str = ()
    modules_to_save: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    layers_pattern: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    file: str = "adapter_config.json"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, file: str = "adapter_config.json") -> TargetRule:
        """Reads the rule from a config; fields of a wrong type, reported elsewhere, count as absent."""
        layers = config.get("layers_to_transform")
        numbers = layers if isinstance(layers, list) else [layers]
        return cls(
            target_modules=_names(config.get("target_modules")),
            exclude_modules=_names(config.get("exclude_modules")) or (),
            modules_to_save=_list(config.get("modules_to_save")),
            layers=frozenset(i for i in numbers if isinstance(i, int)) or None,
            layers_pattern=_list(config.get("layers_pattern")),
            parameters=_list(config.get("target_parameters")),
            file=file,
        )

    @property
    def needs_base(self) -> bool:
        """True if only the base model can tell what is meant: ``all-linear``, or no targets given at all."""
        targets = self.target_modules
        return (targets is None and not self.parameters) or (
            isinstance(targets, str) and targets.lower() == ALL_LINEAR
        )

    @property
    def entries(self) -> tuple[str, ...]:
        """The names, or the one regular expression, that the config gives; empty if it gives none."""
        if self.target_modules is None or self.needs_base:
            return ()
        return (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules

    def matches(self, path: str) -> bool:
        """Tells whether the module at ``path`` is a target; True for what only the base can tell.

        Raises:
            FormatError: a regular expression of the config is invalid or takes too long; kind ``"regex"``.
        """
        return self.match((path,))[0]

    def match(self, paths: Sequence[str]) -> list[bool]:
        """Returns for each path what ``matches`` does, all in one bounded evaluation."""
        excluded = self._excluded(paths)
        found = self._targeted(paths)
        return [hit and not out for hit, out in zip(found, excluded, strict=True)]

    def match_parameters(self, paths: Sequence[str]) -> list[bool]:
        """Returns for each module path whether ``target_parameters`` names a parameter directly in it.

        A name is a whole parameter path or its end after a dot; the module is what stands before its last
        dot.
        """
        owners = {entry.rpartition(".")[0] for entry in self.parameters}
        return [bool(owners) and ("" in owners or _ends_in(path, owners)) for path in paths]

    def _excluded(self, paths: Sequence[str]) -> list[bool]:
        exclude = self.exclude_modules
        if isinstance(exclude, str):
            pattern = Pattern(text=exclude, mode="fullmatch", file=self.file, loc="exclude_modules")
            out = matches(pattern, paths)
        else:
            names = set(exclude)
            out = [bool(names) and _ends_in(path, names) for path in paths]
        for name in self.modules_to_save:
            if is_literal(name):
                hits = [_has_part(path, name) for path in paths]
            else:
                text = rf"(^|.*\.){name}($|\..*)"
                hits = matches(Pattern(text=text, shown=name, file=self.file, loc="modules_to_save"), paths)
            out = [a or b for a, b in zip(out, hits, strict=True)]
        return out

    def _targeted(self, paths: Sequence[str]) -> list[bool]:
        targets = self.target_modules
        if self.needs_base:
            return [True] * len(paths)
        if targets is None:
            return [False] * len(paths)
        if isinstance(targets, str):
            pattern = Pattern(text=targets, mode="fullmatch", file=self.file, loc="target_modules")
            return matches(pattern, paths)
        names = set(targets)
        found = [_ends_in(path, names) for path in paths]
        if self.layers is None:
            return found
        # An entry that is the whole path counts in every layer: PEFT looks at layers for suffixes only.
        checked = [path for path, hit in zip(paths, found, strict=True) if hit and path not in names]
        picked = {path for path, i in zip(checked, self._layer(checked), strict=True) if i in self.layers}
        return [hit and (path in names or path in picked) for path, hit in zip(paths, found, strict=True)]

    def _layer(self, paths: Sequence[str]) -> list[int | None]:
        """Returns the number of the layer that each path lies in, or None."""
        if not self.layers_pattern:
            return [_first_number(path) for path in paths]
        layer: list[int | None] = [None] * len(paths)
        decided = [False] * len(paths)
        for name in self.layers_pattern:
            text = rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\."
            pattern = Pattern(text=text, shown=name, file=self.file, loc="layers_pattern")
            for i, caught in enumerate(captures(pattern, paths, "idx")):
                if caught is not None and not decided[i]:
                    decided[i], layer[i] = True, int(caught)
        return layer


def _names(value: object) -> tuple[str, ...] | str | None:
    if isinstance(value, str):
        return value
    return None if value is None else _list(value)


def _list(value: object) -> tuple[str, ...]:
    """Returns the strings of a list, or of a single string, without duplicates, in order."""
    if isinstance(value, str):
        return (value,) if value else ()
    return tuple(dict.fromkeys(v for v in value if isinstance(v, str))) if isinstance(value, list) else ()


def _ends_in(path: str, names: set[str]) -> bool:
    """Tells whether the path is one of the names or ends in one after a dot."""
    if path in names:
        return True
    dot = path.find(".")
    while dot >= 0:
        if path[dot + 1 :] in names:
            return True
        dot = path.find(".", dot + 1)
    return False


def _has_part(path: str, name: str) -> bool:
    r"""Tells whether ``(^|.*\.)name($|\..*)`` matches, for a name whose only special character is the dot."""
    start = 0
    while start >= 0:
        end = start + len(name)
        if literal_at(name, path, start) and (end == len(path) or path[end] == "."):
            return True
        start = path.find(".", start) + 1 or -1
    return False


def _first_number(path: str) -> int | None:
    """Returns the first part that is a number and has two parts before it and one after it."""
    parts = path.split(".")
    return next((int(part) for part in parts[2:-1] if part.isdecimal()), None)
