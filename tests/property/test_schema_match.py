"""Whether a value fits a published schema: the fast answer is that of jsonschema, damaged or not."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import adapterhub_tools as at
from adapterhub_tools.ops.receipt_file import load_receipt
from adapterhub_tools.ops.undo_file import open_undo
from adapterhub_tools.store.schema_match import matcher
from adapterhub_tools.store.schemas import load_schema
from tests.tiny_files import make_adapter, make_base

FOLDER = Path(__file__).resolve().parents[2] / "schema"
NAMES = sorted(path.name.removesuffix(".schema.json") for path in FOLDER.glob("*.schema.json"))

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2.0, 0.5, 1e300, 2**70, "", "x", "lora", "token_rows", "null", "1.0"),
    *("a" * 64, "sha256:" + "0" * 64, "tensor-tree-blake3-v1:" + "f" * 64, "../x", "README.md", "C:/x", ".a"),
    *([], {}, [1], [-1], ["x"], [{}], {"x": 1}, {"rank": 0}, {"rank": 4, "alpha": 8.0, "scaling": "alpha"}),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A value that fits, for each schema: what the program wrote."""
    folder = tmp_path_factory.mktemp("sound")
    base, adapter = make_base(folder / "base"), make_adapter(folder / "adapter")
    at.init(adapter, base=base, licence="mit", tag=["a"], training={"optimizer": "adamw"})
    at.merge(base, adapter, folder / "out", undo=True)
    with open_undo(folder / "out", load_receipt(folder / "out")) as opened:
        undo = opened.undo.to_json()
    return {
        "adapter-manifest-1.0": json.loads((adapter / "adapter_manifest.json").read_text()),
        "merge-receipt-1.0": json.loads((folder / "out" / "merge_receipt.json").read_text()),
        "merge-undo-1.0": undo,
    }


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value, with each key or index of it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


def agree(name: str, value: Any) -> bool:
    """Whether a value fits; both must say the same."""
    said = matcher(load_schema(name))(value)
    assert said == Draft202012Validator(load_schema(name)).is_valid(value), json.dumps(value)[:2000]
    return said


@pytest.mark.parametrize("name", NAMES)
def test_what_the_program_writes_fits(sound: dict[str, Any], name: str) -> None:
    assert agree(name, sound[name])


@pytest.mark.parametrize("name", NAMES)
def test_every_place_with_every_value(sound: dict[str, Any], name: str) -> None:
    """One place at a time; the modules and tensors repeat each other, so the first few are enough."""
    value = copy.deepcopy(sound[name])
    told = {True: 0, False: 0}
    for container, key in list(places(value))[:250]:
        kept = container[key]
        for other in VALUES:
            container[key] = other
            told[agree(name, value)] += 1
        container[key] = kept
        if isinstance(container, dict):
            del container[key]
            told[agree(name, value)] += 1
            container[key] = kept
    assert min(told.values()) > 50, told


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_several_changes_at_once(sound: dict[str, Any], data: st.DataObject, name: str) -> None:
    value = copy.deepcopy(sound[name])
    for _ in range(data.draw(st.integers(1, 4))):
        all_places = list(places(value))
        container, key = all_places[data.draw(st.integers(0, len(all_places) - 1))]
        if isinstance(container, dict) and data.draw(st.booleans()):
            container[data.draw(st.sampled_from(["x", "rank", "path", "rows", "method", ""]))] = "x"
        else:
            container[key] = data.draw(st.sampled_from(VALUES))
    agree(name, value)


@pytest.mark.parametrize(
    "schema",
    [{"format": "uri"}, {"enum": [[1]]}, {"$ref": "https://example.com/x"}, {"properties": {"a": {"x": 1}}}],
)
def test_a_keyword_that_is_not_known_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"keyword|scalars|\$defs"):
        matcher(schema)


def test_numbers_and_truth_in_an_enumeration() -> None:
    schema = {"enum": [1, 2.0, True, None, "x"]}
    for value in (*VALUES, 1.0, 2, True, False):
        assert matcher(schema)(value) == Draft202012Validator(schema).is_valid(value), value


def test_a_definition_that_leads_to_itself() -> None:
    schema = {"$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "$ref": "#/$defs/tree"}
    for value, fits in (([[], [[]]], True), ([[], [1]], False)):
        assert matcher(schema)(value) == fits == Draft202012Validator(schema).is_valid(value)
