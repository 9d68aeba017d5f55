"""The manifest: what is read is written back, what is wrong is refused, and old files are read for ever."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_tools.errors import FormatError, UnsupportedVersionError
from adapterhub_tools.model.canonical import canonical_json
from adapterhub_tools.model.manifest import (
    FileRecord,
    HistoryEntry,
    HistoryInput,
    Manifest,
    is_listed,
    path_problem,
)
from adapterhub_tools.ops.manifest_file import load_manifest
from adapterhub_tools.store.schemas import check

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
EXAMPLE = GOLDEN / "1.0" / "lora" / "adapter" / "adapter_manifest.json"
SCHEMA = "adapter-manifest-1.0"
HEX = "0" * 64


@pytest.fixture
def data() -> dict[str, Any]:
    value = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def refused(data: Any) -> FormatError:
    with pytest.raises(FormatError) as caught:
        Manifest.from_json(data)
    return caught.value


def kinds(error: FormatError) -> set[tuple[str, str]]:
    return {(problem.kind, problem.loc) for problem in error.problems}


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*/*/adapter/adapter_manifest.json")), ids=str)
def test_every_released_file_is_read_and_written_back_unchanged(path: Path) -> None:
    manifest = load_manifest(path)
    assert manifest.to_bytes() == path.read_bytes()
    assert check(json.loads(path.read_bytes()), SCHEMA, path.name) == []


def test_the_golden_file_says_what_it_said() -> None:
    manifest = load_manifest(EXAMPLE.parent)
    (module,) = manifest.adapter.modules
    assert (module.path, module.kind, module.base_shape) == (
        "model.layers.0.self_attn.q_proj",
        "linear",
        (2, 2),
    )
    assert module.hparams["rank"] == 2
    assert manifest.base.quantisation is not None
    assert manifest.base.quantisation["scheme"] == "bitsandbytes-nf4"
    assert manifest.training["lora_plus_ratio"] == 16
    assert manifest.history[0].inputs[1].role == "base"
    assert manifest.adapter.full[0].rows == (3, 1)
    assert (manifest.licence, manifest.tags, manifest.metrics) == (
        "apache-2.0",
        ("example",),
        {"eval_loss": 1.25},
    )


def test_the_required_core_is_enough(data: dict[str, Any]) -> None:
    core = {
        "schema_version": "1.0",
        "method": {
            "name": "lora",
            "dialect": "peft",
            "hyperparameters": {"rank": 1, "alpha": 1, "scaling": "alpha"},
        },
        "targets": {"modules": [], "full": []},
        "base": {},
        "files": [],
    }
    manifest = Manifest.from_json(core)
    assert manifest.to_json() == core
    assert check(core, SCHEMA, "") == []
    for name in core:
        rest = {key: value for key, value in core.items() if key != name}
        assert ("missing-field", "/") in kinds(refused(rest))
        assert check(rest, SCHEMA, "") != []


def test_types_write_what_they_read() -> None:
    entry = HistoryEntry(
        operation="combine",
        tool="adaptertool",
        tool_version="0.1.0",
        inputs=(HistoryInput(role="adapter", digest=f"sha256:{HEX}", id="a"),),
        options={"weights": [0.5, 0.5]},
        figures={"norm": 1.5},
    )
    record = FileRecord(path="a/b.json", size=3, sha256=HEX)
    manifest = load_manifest(EXAMPLE)
    changed = dataclasses.replace(manifest, files=(record,), history=(entry,))
    again = Manifest.from_json(json.loads(changed.to_bytes()))
    assert again == changed


# --- newer versions ------------------------------------------------------------------------------


def test_unknown_fields_of_a_newer_minor_version_survive_a_rewrite(data: dict[str, Any]) -> None:
    data["schema_version"] = "1.7"
    data["carbon"] = {"grams": 12}
    data["base"]["mirror"] = "somewhere"
    data["files"][0]["mime"] = "application/json"
    data["history"][0]["seed"] = 7
    data["history"][0]["inputs"][0]["weight"] = 0.5
    data["training"]["schedule"] = "cosine"
    data["training"]["galore"]["projection"] = "std"
    assert Manifest.from_json(data).to_json() == data
    assert check(data, SCHEMA, "") == []


@pytest.mark.parametrize(
    "where",
    [
        ("method",),
        ("method", "hyperparameters"),
        ("targets",),
        ("targets", "modules", 0),
        ("targets", "modules", 0, "hyperparameters"),
        ("targets", "modules", 0, "factors", "A"),
        ("targets", "full", 0),
        ("targets", "full", 0, "tensor"),
        ("base", "quantisation"),
    ],
    ids=lambda where: "/".join(map(str, where)),
)
def test_an_unknown_field_that_may_change_the_result_is_an_error(
    data: dict[str, Any], where: tuple[str | int, ...]
) -> None:
    data["schema_version"] = "1.1"
    node: Any = data
    for part in where:
        node = node[part]
    node["twist"] = True
    loc = "/" + "/".join(map(str, where)) + "/twist"
    assert kinds(refused(data)) == {("unknown-field", loc)}
    assert check(data, SCHEMA, "") != []


def test_hyperparameters_of_other_methods_are_their_own(data: dict[str, Any]) -> None:
    data["method"] = {
        "name": "ia3",
        "dialect": "peft",
        "hyperparameters": {"feedforward_modules": ["down_proj"]},
    }
    data["targets"]["modules"][0]["method"] = "ia3"
    data["targets"]["modules"][0]["hyperparameters"] = {"is_feedforward": True}
    assert Manifest.from_json(data).to_json() == data
    assert check(data, SCHEMA, "") == []


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0"])
def test_another_major_version_is_refused_before_anything_else(version: str) -> None:
    with pytest.raises(UnsupportedVersionError) as caught:
        Manifest.from_json({"schema_version": version, "anything": "else"})
    assert version in str(caught.value)


@pytest.mark.parametrize("version", ["1", "1.0.0", "01.0", "1.x", "", "1.0\n", 1.0, None, ["1.0"]])
def test_a_malformed_version_is_refused(data: dict[str, Any], version: object) -> None:
    data["schema_version"] = version
    assert any(problem.loc == "/schema_version" for problem in refused(data).problems)


# --- what is wrong -------------------------------------------------------------------------------


def _set(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        node: Any = data
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = to

    return change


BAD = {
    "rank zero": (_set("method", "hyperparameters", "rank", to=0), "range"),
    "rank true": (_set("method", "hyperparameters", "rank", to=True), "type"),
    "alpha text": (_set("method", "hyperparameters", "alpha", to="16"), "type"),
    "scaling rule": (_set("method", "hyperparameters", "scaling", to="alpha*rank"), "value"),
    "method name": (_set("method", "name", to="../os"), "value"),
    "kind": (_set("targets", "modules", 0, "kind", to="attention"), "value"),
    "role": (_set("targets", "full", 0, "role", to="whole"), "value"),
    "rows missing": (lambda data: data["targets"]["full"][0].pop("rows"), "missing-field"),
    "negative row": (_set("targets", "full", 0, "rows", to=[-1, 2]), "type"),
    "dtype": (_set("targets", "modules", 0, "factors", "A", "dtype", to="float32"), "dtype"),
    "huge dimension": (_set("targets", "modules", 0, "factors", "A", "shape", to=[2**60]), "type"),
    "md5 digest": (_set("base", "digest", to="md5:" + "0" * 32), "value"),
    "empty digest": (_set("base", "digest", to=""), "value"),
    "digest of a wrong kind": (_set("base", "config_digest", to=f"tensor-tree-blake3-v1:{HEX}"), "value"),
    "upper-case digest": (_set("digest", to=f"adapter-tree-blake3-v1:{'A' * 64}"), "value"),
    "quantisation without scheme": (_set("base", "quantisation", to={"bits": 4}), "missing-field"),
    "path up": (_set("files", 0, "path", to="../x"), "path"),
    "absolute path": (_set("files", 0, "path", to="/etc/passwd"), "path"),
    "drive": (_set("files", 0, "path", to="C:/x"), "path"),
    "backslash": (_set("files", 0, "path", to="a\\b"), "path"),
    "NUL": (_set("files", 0, "path", to="a\x00b"), "path"),
    "card listed": (_set("files", 0, "path", to="README.md"), "path"),
    "itself listed": (_set("files", 0, "path", to="adapter_manifest.json"), "path"),
    "hidden file": (_set("files", 0, "path", to=".gitattributes"), "path"),
    "short sha256": (_set("files", 0, "sha256", to="ab"), "value"),
    "negative size": (_set("files", 0, "size", to=-1), "range"),
    "galore without rank": (_set("training", "galore", to={}), "missing-field"),
    "lora+ ratio": (_set("training", "lora_plus_ratio", to=0), "range"),
    "dataset number": (_set("training", "dataset", to=3), "type"),
    "history without inputs": (lambda data: data["history"][0].pop("inputs"), "missing-field"),
    "tags not texts": (_set("tags", to=["a", 1]), "type"),
    "metric text": (_set("metrics", "eval_loss", to="low"), "type"),
    "licence null": (_set("licence", to=None), "type"),
    "targets array": (_set("targets", to=[]), "type"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_wrong_value_is_refused_by_reader_and_schema(data: dict[str, Any], name: str) -> None:
    change, kind = BAD[name]
    change(data)
    assert kind in {problem.kind for problem in refused(data).problems}
    assert check(data, SCHEMA, "") != []


def test_an_integer_is_written_without_a_fraction(data: dict[str, Any]) -> None:
    """JSON Schema cannot tell 2.0 from 2; docs/manifest.md does, since their canonical texts differ."""
    data["method"]["hyperparameters"]["rank"] = 2.0
    assert kinds(refused(data)) == {("type", "/method/hyperparameters/rank")}


def test_repeated_files_and_modules_are_refused(data: dict[str, Any]) -> None:
    data["files"].append(copy.deepcopy(data["files"][0]))
    data["targets"]["modules"].append(copy.deepcopy(data["targets"]["modules"][0]))
    assert kinds(refused(data)) == {("duplicate", "/files/2"), ("duplicate", "/targets/modules/1")}


def test_every_problem_is_collected(data: dict[str, Any]) -> None:
    for name in ("rank zero", "kind", "md5 digest", "path up", "metric text"):
        BAD[name][0](data)
    assert len(refused(data).problems) == 5


@pytest.mark.parametrize("value", [None, [], "text", 1, True])
def test_something_else_than_an_object_is_refused(value: object) -> None:
    assert refused(value).problems[0].kind == "type"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-10, 2**54)
    | st.text(max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    value=json_values, place=st.sampled_from(["method", "targets", "base", "files", "history", "training"])
)
def test_no_value_in_any_block_breaks_the_reader(value: Any, place: str) -> None:
    data = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    data[place] = value
    try:
        again = Manifest.from_json(data)
    except FormatError:
        return
    assert json.loads(again.to_bytes()).get(place, value) == value


# --- canonical JSON and the file list --------------------------------------------------------------


def test_canonical_json() -> None:
    value = {
        "b": [],
        "a": {"\U0001d11e": 1, "\uffee": 1.0},
        "c": {},
        "d": [1e-5, 1e16, 0.1, -0.0, 2**53, "é\n\x1f"],
    }
    assert canonical_json(value) == (
        '{\n  "a": {\n    "\uffee": 1.0,\n    "\U0001d11e": 1\n  },\n  "b": [],\n  "c": {},\n'
        '  "d": [\n    1e-05,\n    1e+16,\n    0.1,\n    -0.0,\n    9007199254740992,\n'
        '    "é\\n\\u001f"\n  ]\n}\n'
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


@pytest.mark.parametrize(
    ("path", "listed"),
    [
        ("adapter_config.json", True),
        ("sub/README.md", True),
        ("README.md", False),
        ("adapter_manifest.json", False),
        ("adapter_manifest.json.sig", False),
        (".gitattributes", False),
        (".cache/huggingface/x", False),
        ("sub/.hidden", False),
    ],
)
def test_which_files_are_listed(path: str, listed: bool) -> None:
    assert is_listed(path) is listed


@pytest.mark.parametrize("path", ["", "a//b", "a/./b", "..", "a/../b", "a/", "\x7f"])
def test_bad_paths(path: str) -> None:
    assert path_problem(path) is not None
