"""The rules that take module names in memory to tensor names on disk; one of them must fit every module."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches

from adapterhub_tools.architectures import Architecture, source
from adapterhub_tools.architectures.renames import Converter, Renames
from adapterhub_tools.errors import Problem
from adapterhub_tools.model.adapter import Adapter

WRAPPERS = ("0.auto_model.", "auto_model.", "base_model.", "model.")
"""Attribute names under which others keep the model: sentence-transformers, and wrapper classes."""

_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRule:
    """A way from module names in memory to names on disk: strip a prefix, add another, rename by the table.

    Attributes:
        words: the rule for people.
        strip: what is taken off.
        add: what is put before.
        renames: the architecture's renamed modules, or None if the rule has none.
    """

    words: str
    strip: str = ""
    add: str = ""
    renames: Renames | None = None

    def to_disk(self, path: str, stored: Collection[str]) -> str:
        """Returns the module's name on disk; a head that stands beside the base model keeps its own."""
        if self.strip and path.startswith(self.strip):
            path = path.removeprefix(self.strip)
        names = [name for way in dict.fromkeys((self.add + path, path)) for name in self._renamed(way)]
        return next((name for name in names if f"{name}.weight" in stored), names[0])

    def _renamed(self, path: str) -> tuple[str, ...]:
        return (self.renames.to_disk(path) if self.renames else ()) or (path,)

    def to_memory(self, path: str) -> str:
        """Returns the module's name in memory."""
        if self.renames:
            path = self.renames.to_memory(path) or path
        if self.add and path.startswith(self.add):
            path = path.removeprefix(self.add)
        return self.strip + path


def choose_rule(
    adapter: Adapter, stored: Collection[str], architecture: Architecture | None, problems: list[Problem]
) -> NameRule:
    """Returns the rule under which every module of an adapter has a weight in the base.

    Names as they are come first, then those that the architecture's table renames, then what is left when a
    prefix is put before or taken off, without and with the table.

    Args:
        adapter: the adapter.
        stored: the base's tensor names, and those that its ties imply.
        architecture: what is known of the base's model type; None if nothing.
        problems: gets what is wrong: modules that no rule places, or rules that disagree.
    """
    paths = [module.path for module in adapter.modules]
    if not paths:
        paths = [item.target.rpartition(".")[0] for item in adapter.full]
    rules = _rules(architecture)
    found = [(sum(f"{r.to_disk(p, stored)}.weight" in stored for p in paths), r) for r in rules]
    best = max(count for count, _ in found)
    winners = [r for count, r in found if count == best]
    if best < len(paths):
        if adapter.modules:
            problems.extend(_unresolved(paths, winners[0], stored, architecture))
        return winners[0]
    if not winners[0].strip and not winners[0].add:
        return _told(winners[0], paths, stored)
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
    return _told(winners[0], paths, stored)


def _rules(architecture: Architecture | None) -> list[NameRule]:
    """Returns every rule, in the order in which they are preferred."""
    renames = architecture.renames if architecture and architecture.renames else None
    inner = f"{architecture.base_prefix}." if architecture and architecture.base_prefix else ""
    rules = [NameRule(words="as they are")]
    for wrapper in ("", *WRAPPERS):
        said = f"'{wrapper}' taken off" if wrapper else ""
        if wrapper:
            rules.append(NameRule(words=said, strip=wrapper))
        if inner:
            rules.append(NameRule(words=_join(said, f"'{inner}' put before"), strip=wrapper, add=inner))
            if wrapper + inner != wrapper:
                rules.append(NameRule(words=f"'{wrapper}{inner}' taken off", strip=wrapper + inner))
    if renames is None:
        return rules
    said = f"renamed as in {source()}"
    named = [
        replace(rule, words=_join(rule.words if rule.strip or rule.add else "", said), renames=renames)
        for rule in rules
    ]
    return [rules[0], *named[:1], *rules[1:], *named[1:]]


def _told(rule: NameRule, paths: Iterable[str], stored: Collection[str]) -> NameRule:
    """Returns the rule with the first name that the table changed as its example."""
    if rule.renames is None:
        return rule
    plain = replace(rule, renames=None)
    for path in paths:
        before, after = plain.to_disk(path, stored), rule.to_disk(path, stored)
        if before != after:
            return replace(rule, words=f"{rule.words}: '{before}' is '{after}' on disk")
    return rule


def _join(*parts: str) -> str:
    return ", ".join(part for part in parts if part)


def _unresolved(
    paths: Iterable[str], rule: NameRule, stored: Collection[str], architecture: Architecture | None
) -> list[Problem]:
    known = sorted({name.removesuffix(".weight") for name in stored if name.endswith(".weight")})
    missing = [path for path in paths if f"{rule.to_disk(path, stored)}.weight" not in stored]
    problems = []
    for path in missing[:_SHOWN]:
        made = [item for item in architecture.converters if item.makes(path)] if architecture else []
        if made:
            problems.append(_converted(path, made[0]))
            continue
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
            Problem(
                kind="unknown-module", message=f"and {len(missing) - _SHOWN} further modules of the adapter."
            )
        )
    return problems


def _converted(path: str, made: Converter) -> Problem:
    return Problem(
        kind="converted-weight",
        loc=path,
        message=f"in memory it is made of {', '.join(made.disk)} by {', '.join(made.operations)}; merging "
        "into weights that are joined or split so is not available yet.",
        remedy="Merge it with PEFT, or train without these modules: the others merge here.",
    )
