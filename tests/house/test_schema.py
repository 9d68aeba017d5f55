"""Every published schema is a valid one and is found wherever the package is installed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from adapterhub_tools.store.schemas import load_schema
from tests.house.tree import SCHEMAS

FILES = sorted(SCHEMAS.glob("*.json"))
NAME = re.compile(r"[a-z][a-z-]*-\d+\.\d+\.schema\.json")


def read(path: Path) -> dict[str, Any]:
    schema = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(schema, dict)
    return schema


def test_the_schemas_of_the_foundation_exist() -> None:
    assert {"adapter-manifest-1.0.schema.json", "merge-receipt-1.0.schema.json"} <= {p.name for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_schema_is_valid_2020_12(path: Path) -> None:
    schema = read(path)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_schema_is_named_and_explained(path: Path) -> None:
    schema = read(path)
    assert NAME.fullmatch(path.name), path.name
    assert path.name.removesuffix(".schema.json") in schema["$id"]
    assert schema["title"]
    assert schema["description"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_reference_in_a_schema_resolves_inside_it(path: Path) -> None:
    schema = read(path)

    def references(node: object) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [r for value in node.values() for r in references(value)]
        if isinstance(node, list):
            return [r for value in node for r in references(value)]
        return []

    for reference in references(schema):
        assert reference.startswith("#/"), f"{reference} would need another document"
        target: Any = schema
        for part in reference[2:].split("/"):
            target = target[part.replace("~1", "/").replace("~0", "~")]
        assert isinstance(target, dict | bool)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_loader_finds_the_schema(path: Path) -> None:
    assert load_schema(path.name.removesuffix(".schema.json")) == read(path)
