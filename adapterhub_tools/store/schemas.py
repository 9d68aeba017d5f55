"""The published JSON Schemas: found in a wheel and in an editable install, and applied."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_tools.errors import Problem, StoreError, escape

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

_PACKAGE = Path(__file__).resolve().parents[1]
_FOLDERS = (_PACKAGE / "schema", _PACKAGE.parent / "schema")


@cache
def load_schema(name: str) -> dict[str, Any]:
    """Returns a published schema.

    Args:
        name: name and version, such as ``"adapter-manifest-1.0"``.

    Raises:
        StoreError: this installation lacks it.
    """
    for folder in _FOLDERS:
        path = folder / f"{name}.schema.json"
        if path.is_file():
            schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return schema
    raise StoreError.of(
        "schema-missing",
        f"the schema {escape(name)!r} is not part of this installation.",
        remedy="Install adaptertool again.",
    )


@cache
def _validator(name: str) -> Validator:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(load_schema(name))


def check(instance: Any, name: str, file: str) -> list[Problem]:
    """Checks a parsed JSON value against a published schema.

    Args:
        instance: the value.
        name: the schema's name and version.
        file: the file that the value comes from, for messages.

    Returns:
        every violation, ordered by its place in the file.
    """
    errors = _validator(name).iter_errors(instance)
    found = sorted(errors, key=lambda error: [str(part) for part in error.path])
    return [
        Problem(
            kind="schema",
            message=f"{escape(error.message)} (rule: {'/'.join(str(p) for p in error.schema_path)})",
            file=file,
            loc="".join(f"/{str(p).replace('~', '~0').replace('/', '~1')}" for p in error.path) or "/",
        )
        for error in found
    ]
