"""docs/manifest.md alone is enough: a second, independent implementation gives every digest printed there.

The implementation here uses hashlib, blake3 and struct, and nothing of the package. The package is then held
against the same page and the same files.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from jsonschema import Draft202012Validator

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "manifest.md").read_text(encoding="utf-8")
GOLDEN = REPOSITORY / "tests" / "golden" / "1.0" / "lora"

HASHES: dict[str, Callable[[bytes], bytes]] = {
    "blake3": lambda data: blake3(data).digest(),
    "sha256": lambda data: hashlib.sha256(data).digest(),
}
Vector = tuple[str, str, list[int], bytes, dict[str, str]]


def section(title: str) -> str:
    """The text between a heading and the next one of the same or a higher level."""
    level, _, _ = title.partition(" ")
    text = PAGE.partition(f"\n{title}\n")[2]
    assert text, title
    return re.split(rf"\n#{{1,{len(level)}}} ", text)[0]


def block(text: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found is not None, language
    return found[1]


def vectors(title: str) -> list[Vector]:
    """The rows of a table of tensors."""
    rows = []
    for line in section(title).splitlines():
        if not line.startswith("| `"):
            continue
        name, dtype, shape, data, b3, sha = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
        rows.append((name, dtype, json.loads(shape), bytes.fromhex(data), {"blake3": b3, "sha256": sha}))
    return rows


def listed_digests(text: str) -> list[str]:
    return re.findall(r"^- `([a-z0-9-]+:[0-9a-f]{64})`$", text, re.MULTILINE)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def tensor_digest(hash_of: Callable[[bytes], bytes], dtype: str, shape: list[int], data: bytes) -> bytes:
    head = b"adaptertool:tensor-tree-v1:tensor\x00" + u64(len(dtype)) + dtype.encode("ascii")
    return hash_of(head + u64(len(shape)) + b"".join(map(u64, shape)) + data)


def tree(name: str, algorithm: str, tensors: list[tuple[str, str, list[int], bytes]]) -> str:
    hash_of = HASHES[algorithm]
    text = b"adaptertool:tensor-tree-v1:root\x00" + u64(len(tensors))
    for key, dtype, shape, data in sorted(tensors, key=lambda tensor: tensor[0].encode("utf-8")):
        encoded = key.encode("utf-8")
        text += u64(len(encoded)) + encoded + tensor_digest(hash_of, dtype, shape, data)
    return f"{name}-tree-{algorithm}-v1:{hash_of(text).hex()}"


def both(name: str, tensors: list[tuple[str, str, list[int], bytes]]) -> list[str]:
    return [tree(name, algorithm, tensors) for algorithm in ("blake3", "sha256")]


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    value = json.loads(block(section("## Worked example"), "json"))
    assert isinstance(value, dict)
    return value


BASE = [row[:4] for row in vectors("### Tensors") if row[0].startswith("model.")]


@pytest.mark.parametrize("row", vectors("### Tensors") + vectors("### Adapter"), ids=lambda row: row[0])
@pytest.mark.parametrize("algorithm", HASHES)
def test_tensor_digests(row: Vector, algorithm: str) -> None:
    _, dtype, shape, data, printed = row
    assert tensor_digest(HASHES[algorithm], dtype, shape, data).hex() == printed[algorithm]


def test_root_digests(example: dict[str, Any]) -> None:
    one = struct.pack("<d", 1.0)
    changed = [row for row in BASE if row[0] != "model.norm.weight"]
    named = [(name, "F64", [], one) for name in ("a", "\uffee", "\U0001d11e")]
    printed = listed_digests(section("### Roots"))
    assert len(BASE) == 3
    assert printed == [
        *both("tensor", BASE),
        *both("tensor", changed),
        *both("tensor", named),
        *both("tensor", []),
    ]
    assert example["base"]["digest"] == printed[0]
    assert example["base"]["targets_digest"] == printed[2]


def test_names_in_that_vector_are_ordered_differently_in_utf_16() -> None:
    names = ["\uffee", "\U0001d11e"]
    assert sorted(names, key=lambda name: name.encode("utf-8")) == names
    assert sorted(names, key=lambda name: name.encode("utf-16-be")) == names[::-1]


def test_config_digest(example: dict[str, Any]) -> None:
    text = section("### Config")
    config = json.loads(block(text, "json config"))
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        config.pop(key, None)
    compact = block(text, "text compact").rstrip("\n")
    assert json.loads(compact) == config
    assert list(json.loads(compact)) == sorted(config)
    assert " " not in compact
    digest = f"config-sha256-v1:{hashlib.sha256(compact.encode('utf-8')).hexdigest()}"
    assert listed_digests(text) == [digest]
    assert example["base"]["config_digest"] == digest


def test_adapter_digest(example: dict[str, Any]) -> None:
    rows = vectors("### Adapter")
    digests = both("adapter", [row[:4] for row in rows])
    assert listed_digests(section("### Adapter")) == digests
    assert example["digest"] == digests[0]
    module, full = example["targets"]["modules"][0], example["targets"]["full"][0]
    scaling = struct.pack("<d", 11.313708498984761)
    data = {name: data for name, _, _, data, _ in rows}
    assert set(data) == {
        *(f"module/{module['path']}/{part}" for part in ("A", "B", "scaling", "method")),
        f"full/{full['target']}/values",
        f"full/{full['target']}/rows",
    }
    assert data[f"module/{module['path']}/scaling"] == scaling
    assert data[f"module/{module['path']}/method"] == module["method"].encode()
    assert data[f"full/{full['target']}/rows"] == struct.pack("<2q", *full["rows"])


def test_scales_are_correctly_rounded() -> None:
    """Checked with decimals of sixty digits, far more than the distance of any of them to a tie."""
    from decimal import Decimal, localcontext

    from adapterhub_tools.model.scaling import effective_scale

    lines = [line for line in section("### Scales").splitlines() if line.startswith("| `")]
    assert len(lines) == 8
    for line in lines:
        alpha, rank, rule, printed, data = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
        with localcontext() as context:
            context.prec = 60
            divisor = {
                "alpha/rank": Decimal(rank),
                "alpha/sqrt(rank)": Decimal(rank).sqrt(),
                "alpha": Decimal(1),
            }[rule]
            expected = float(Decimal(float(alpha)) / divisor)
        assert float(printed) == expected
        assert bytes.fromhex(data) == struct.pack("<d", expected)
        assert effective_scale(json.loads(alpha), int(rank), rule) == expected


def test_the_example_fits_the_schema(example: dict[str, Any]) -> None:
    schema = json.loads(
        (REPOSITORY / "schema" / "adapter-manifest-1.0.schema.json").read_text(encoding="utf-8")
    )
    assert list(Draft202012Validator(schema).iter_errors(example)) == []


def test_the_example_is_the_golden_file_and_canonical(example: dict[str, Any]) -> None:
    text = block(section("## Worked example"), "json")
    assert text == (GOLDEN / "adapter" / "adapter_manifest.json").read_text(encoding="utf-8")
    assert text == json.dumps(example, sort_keys=True, indent=2, ensure_ascii=False) + "\n"


def test_the_files_of_the_example_are_the_golden_ones(example: dict[str, Any]) -> None:
    for record in example["files"]:
        data = (GOLDEN / "adapter" / record["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (record["size"], record["sha256"])
    config = (GOLDEN / "base" / "config.json").read_text(encoding="utf-8")
    assert config == block(section("### Config"), "json config")


def test_the_package_agrees(example: dict[str, Any]) -> None:
    import adapterhub_tools as at

    base = GOLDEN / "base"
    for algorithm, printed in zip(("blake3", "sha256"), listed_digests(section("### Roots")), strict=False):
        found = at.content_digest(base, algorithm=algorithm, cache=False)
        assert found.digest == printed
        rows = {name: digests[algorithm] for name, _, _, _, digests in vectors("### Tensors")}
        assert found.tensors == {name: rows[name] for name in found.tensors}
        assert found.config_digest == example["base"]["config_digest"]
    assert at.adapter_digest(GOLDEN / "adapter") == example["digest"]
