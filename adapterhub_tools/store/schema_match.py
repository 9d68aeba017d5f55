"""Says fast whether a value fits a schema; why one does not, jsonschema says, in a hundred times the time.

A manifest repeats the same form for each of some hundred modules, and most manifests are sound. Only the
keywords that the published schemas use are known; they mean what draft 2020-12 says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Match = Callable[[Any], bool]

_ANNOTATIONS = frozenset({"$schema", "$id", "$defs", "title", "description", "examples"})
_TOGETHER = frozenset({"then", "else"})
"""Keywords that another one looks at."""


def matcher(schema: Mapping[str, Any]) -> Match:
    """Returns a function that says whether a parsed JSON value fits a schema.

    Args:
        schema: the whole schema; references lead to its ``$defs``.

    Raises:
        ValueError: it uses a keyword, or a form of one, that is not known here.
    """
    return _Compiler(schema.get("$defs", {})).compile(schema)


class _Compiler:
    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._definitions = definitions
        self._compiled: dict[str, Match] = {}

    def compile(self, schema: Any) -> Match:
        """Returns the function for one schema."""
        if isinstance(schema, bool):
            return lambda _: schema
        rules = [
            self._rule(keyword, value, schema)
            for keyword, value in schema.items()
            if keyword not in _ANNOTATIONS | _TOGETHER
        ]
        if len(rules) == 1:
            return rules[0]
        return lambda value: all(rule(value) for rule in rules)

    def _rule(self, keyword: str, given: Any, schema: Mapping[str, Any]) -> Match:
        if keyword in _SIMPLE:
            return _SIMPLE[keyword](given)
        if keyword == "$ref":
            return self._reference(given)
        if keyword == "properties":
            return self._properties(given)
        if keyword == "additionalProperties":
            return self._additional(given, frozenset(schema.get("properties", ())))
        if keyword == "items":
            item = self.compile(given)
            return lambda value: not isinstance(value, list) or all(map(item, value))
        if keyword == "if":
            return self._condition(given, schema)
        if keyword == "not":
            inner = self.compile(given)
            return lambda value: not inner(value)
        if keyword in ("anyOf", "oneOf"):
            parts = [self.compile(part) for part in given]
            if keyword == "anyOf":
                return lambda value: any(part(value) for part in parts)
            return lambda value: sum(part(value) for part in parts) == 1
        raise ValueError(f"no rule for the keyword {keyword!r}")

    def _reference(self, reference: str) -> Match:
        before, _, name = reference.rpartition("/")
        if before != "#/$defs":
            raise ValueError(f"a reference out of $defs: {reference!r}")
        if name not in self._compiled:
            # A definition may lead to itself, so it is looked up when it is needed.
            self._compiled[name] = lambda value: self._compiled[name](value)
            self._compiled[name] = self.compile(self._definitions[name])
        return self._compiled[name]

    def _properties(self, given: Mapping[str, Any]) -> Match:
        known = {name: self.compile(inner) for name, inner in given.items()}

        def fits(value: Any) -> bool:
            if not isinstance(value, dict):
                return True
            return all(name not in known or known[name](inner) for name, inner in value.items())

        return fits

    def _additional(self, given: Any, known: frozenset[str]) -> Match:
        inner = self.compile(given)

        def fits(value: Any) -> bool:
            if not isinstance(value, dict):
                return True
            return all(name in known or inner(item) for name, item in value.items())

        return fits

    def _condition(self, given: Any, schema: Mapping[str, Any]) -> Match:
        asked = self.compile(given)
        then, other = self.compile(schema.get("then", True)), self.compile(schema.get("else", True))
        return lambda value: then(value) if asked(value) else other(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return _is_number(value) and (isinstance(value, int) or value.is_integer())


_TYPES: dict[str, Match] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": _is_number,
    "integer": _is_integer,
}


def _type(given: str | list[str]) -> Match:
    if isinstance(given, str):
        return _TYPES[given]
    kinds = [_TYPES[name] for name in given]
    return lambda value: any(kind(value) for kind in kinds)


def _one_of(given: list[Any]) -> Match:
    if any(isinstance(item, dict | list) for item in given):
        raise ValueError(f"other values than scalars: {given}")
    # 1 is 1.0 and is not true, as in JSON and unlike in Python.
    known = frozenset((isinstance(item, bool), item) for item in given)
    return lambda value: not isinstance(value, dict | list) and (isinstance(value, bool), value) in known


def _pattern(given: str) -> Match:
    search = re.compile(given).search
    return lambda value: not isinstance(value, str) or search(value) is not None


_SIMPLE: dict[str, Callable[[Any], Match]] = {
    "type": _type,
    "enum": _one_of,
    "const": lambda given: _one_of([given]),
    "pattern": _pattern,
    "required": lambda names: lambda value: not isinstance(value, dict) or all(n in value for n in names),
    "minLength": lambda least: lambda value: not isinstance(value, str) or len(value) >= least,
    "minItems": lambda least: lambda value: not isinstance(value, list) or len(value) >= least,
    "maxItems": lambda most: lambda value: not isinstance(value, list) or len(value) <= most,
    "minProperties": lambda least: lambda value: not isinstance(value, dict) or len(value) >= least,
    "minimum": lambda least: lambda value: not _is_number(value) or not value < least,
    "maximum": lambda most: lambda value: not _is_number(value) or not value > most,
    "exclusiveMinimum": lambda bound: lambda value: not _is_number(value) or not value <= bound,
}
"""Rules that need nothing but the keyword's own value."""
