"""Validate checks everything and collects every problem, each with its class."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import adapterhub_tools as at
from adapterhub_tools.ops.finite import finite_problems
from adapterhub_tools.store.files import LocalFile
from adapterhub_tools.store.header import read_header
from tests.tiny_files import (
    HEADS_OUT,
    ROWS,
    WIDTH,
    adapter_tensors,
    base_tensors,
    counted,
    make_adapter,
    make_base,
    write_json,
    write_safetensors,
)
from tests.unit.manifests import NAME, edit, found


@pytest.fixture
def adapter(adapter: Path, base: Path) -> Path:
    at.init(adapter, base=base)
    return adapter


def test_a_sound_adapter_passes_every_check(adapter: Path, base: Path) -> None:
    report = at.validate(adapter, base=base)
    assert report.ok
    assert report.findings == ()
    assert report.skipped == {}
    assert report.checked == (
        "manifest",
        "files",
        "tensors",
        "values",
        "file list",
        "adapter digest",
        "base files",
        "base fit",
        "base digest",
    )
    assert report.exit_code == 0
    report.raise_for_problems()


def test_what_was_not_checked_is_said(tmp_path: Path) -> None:
    report = at.validate(make_adapter(tmp_path / "a"))
    assert report.ok
    assert set(report.skipped) == {"manifest", "base"}


def test_problems_of_all_sorts_are_collected_in_one_run(adapter: Path, base: Path) -> None:
    tensors = adapter_tensors()
    del tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors[f"{stem}.lora_B.weight"] = counted("F32", WIDTH + 3, 2)
    dtype, shape, data = tensors[f"{stem}.lora_A.weight"]
    tensors[f"{stem}.lora_A.weight"] = (dtype, shape, struct.pack("<f", float("nan")) + data[4:])
    write_safetensors(adapter / "adapter_model.safetensors", tensors)
    (adapter / "extra.py").write_text("", encoding="utf-8")
    write_json(base / "config.json", {"model_type": "llama", "rope_theta": 2.0})

    report = at.validate(adapter, base=base)
    kinds = {kind for _, kind in found(report)}
    assert {
        "non-finite",
        "unlisted-file",
        "file-size",
        "manifest-differs",
        "shape",
        "base-config-digest",
    } <= kinds
    assert {error for error, _ in found(report)} == {"FormatError", "IntegrityError", "MismatchError"}
    assert any("v_proj" in problem.loc or "v_proj" in problem.message for problem in report.problems)
    assert report.exit_code == 1
    assert not report.ok
    assert all(problem.remedy for problem in report.problems)
    with pytest.raises(at.FormatError) as caught:
        report.raise_for_problems()
    assert len(caught.value.problems) == len(report.errors)
    json.dumps(report.to_json())


# --- manifest ------------------------------------------------------------------------------------


def test_schema_and_reader_do_not_say_the_same_twice(adapter: Path) -> None:
    edit(adapter, lambda data: data["method"]["hyperparameters"].update(rank=0))
    report = at.validate(adapter)
    locs = [problem.loc for problem in report.problems if problem.file == NAME]
    assert locs.count("/method/hyperparameters/rank") == 1


@pytest.mark.parametrize(
    ("text", "error", "kind"),
    [
        ('{"schema_version": "2.0"}', "UnsupportedVersionError", "schema-version"),
        ('{"schema_version": "1.0", "schema_version": "1.0"}', "FormatError", "duplicate-key"),
        ("{", "FormatError", "json"),
        ("[]", "FormatError", "json-type"),
        ('{"schema_version": "1.0"}', "FormatError", "missing-field"),
    ],
)
def test_broken_manifests(adapter: Path, text: str, error: str, kind: str) -> None:
    (adapter / NAME).write_text(text, encoding="utf-8")
    report = at.validate(adapter)
    assert (error, kind) in found(report)
    assert report.exit_code == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["method"].update(name="ia3"),
        lambda data: data["method"]["hyperparameters"].update(alpha=5),
        lambda data: data["targets"]["modules"].pop(),
        lambda data: data["targets"]["modules"][0]["hyperparameters"].update(rank=3),
        lambda data: data["targets"]["modules"][1]["factors"].pop("B"),
        lambda data: data.update(digest="adapter-tree-blake3-v1:" + "0" * 64),
    ],
)
def test_a_manifest_that_says_something_else_than_the_files(
    adapter: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(adapter, change)
    report = at.validate(adapter)
    assert {error for error, _ in found(report)} == {"IntegrityError"}
    assert {kind for _, kind in found(report)} <= {"manifest-differs", "adapter-digest"}


# --- files ---------------------------------------------------------------------------------------


def test_files_that_changed_came_or_went(adapter: Path) -> None:
    (adapter / "new.txt").write_text("x", encoding="utf-8")
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("none", "None"), encoding="utf-8")
    edit(adapter, lambda data: data["files"].append({"path": "gone.txt", "size": 1, "sha256": "0" * 64}))
    kinds = {(problem.kind, problem.file) for problem in at.validate(adapter).problems}
    assert ("unlisted-file", "new.txt") in kinds
    assert ("file-digest", "adapter_config.json") in kinds
    assert ("missing-file", "gone.txt") in kinds


def test_cards_and_hidden_files_may_come_and_change(adapter: Path) -> None:
    (adapter / "README.md").write_text("# Card", encoding="utf-8")
    (adapter / ".gitattributes").write_text("*", encoding="utf-8")
    assert at.validate(adapter).ok


def test_a_pickle_is_named_with_the_remedy(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    report = at.validate(adapter)
    assert {error for error, _ in found(report)} == {"UnsupportedError"}
    assert "adapter_model.bin" in str(report.problems[0])


def test_nothing_there_is_could_not_check_not_passed(tmp_path: Path) -> None:
    report = at.validate(tmp_path / "nothing")
    assert not report.ok
    assert report.exit_code == 10
    with pytest.raises(at.StoreError):
        report.raise_for_problems()


# --- values --------------------------------------------------------------------------------------

BITS = [
    ("F64", "<Q", 0x7FF0_0000_0000_0000, 0x7FEF_FFFF_FFFF_FFFF),
    ("F64", "<Q", 0xFFF8_0000_0000_0001, 0x8000_0000_0000_0001),
    ("F32", "<I", 0x7F80_0000, 0x7F7F_FFFF),
    ("F32", "<I", 0xFFC0_0001, 0x8000_0001),
    ("BF16", "<H", 0x7F80, 0x7F7F),
    ("BF16", "<H", 0xFF81, 0x8001),
    ("F16", "<H", 0x7C00, 0x7BFF),
    ("F16", "<H", 0xFE00, 0x83FF),
]


@pytest.mark.parametrize(("dtype", "form", "bad", "good"), BITS)
def test_nan_and_infinities_are_found_by_their_bits(
    tmp_path: Path, dtype: str, form: str, bad: int, good: int
) -> None:
    path = tmp_path / "x.safetensors"
    values = [good] * 12
    for bits, expected in ((good, 0), (bad, 1)):
        values[7] = bits
        data = b"".join(struct.pack(form, value) for value in values)
        write_safetensors(path, {"other": counted("F32", 3), "x": (dtype, (2, 2, 3), data)})
        with LocalFile(path, name=path.name) as source:
            header = read_header(source)
            problems = finite_problems(source, ((s, header.offsets[n]) for n, s in header.tensors.items()))
        assert len(problems) == expected
        if problems:
            assert problems[0].loc == "x"
            assert "index [1, 0, 1]" in problems[0].message


def test_a_value_far_into_a_large_tensor_is_found(tmp_path: Path) -> None:
    """Beyond the first chunk that is read, at its exact index."""
    rows, width = 70_000, 64
    data = bytearray(2 * rows * width)
    data[2 * (69_999 * width + 63) : 2 * (69_999 * width + 63) + 2] = struct.pack("<H", 0x7F80)
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": ("BF16", (rows, width), bytes(data))})
    with LocalFile(path, name=path.name) as source:
        header = read_header(source)
        (problem,) = finite_problems(source, [(header.tensors["x"], header.offsets["x"])])
    assert "1 values are NaN or infinite, the first at index [69999, 63]" in problem.message


# --- config and tensors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"r": 3},
        {"lora_alpha": -8},
        {"lora_alpha": 1e30},
        {"target_modules": ["k_proj"]},
        {"peft_type": "NEWEST"},
        {"some_new_field": {"strength": 2}},
        {"bias": "sometimes"},
    ],
)
def test_wrong_configs(tmp_path: Path, config: dict[str, Any]) -> None:
    report = at.validate(make_adapter(tmp_path / "a", **config))
    assert {error for error, _ in found(report)} == {"FormatError"}


def test_what_cannot_be_merged_is_a_warning(tmp_path: Path) -> None:
    report = at.validate(make_adapter(tmp_path / "a", init_lora_weights="pissa"))
    assert report.ok
    assert [problem.severity for problem in report.problems] == ["warning"]


def test_saved_embeddings_that_the_config_does_not_mention_need_a_flag(tmp_path: Path) -> None:
    tensors = adapter_tensors()
    tensors["base_model.model.model.embed_tokens.weight"] = counted("F32", ROWS, WIDTH)
    adapter = make_adapter(tmp_path / "a", tensors=tensors)
    assert {kind for _, kind in found(at.validate(adapter))} == {"saved-embedding"}
    assert at.validate(adapter, accept_embeddings=True).ok


# --- base ----------------------------------------------------------------------------------------


def changed_base(folder: Path, name: str) -> Path:
    """The same shapes, with one bit of one tensor changed."""
    make_base(folder)
    tensors = base_tensors()
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, bytes([data[0] ^ 1]) + data[1:])
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def test_another_base_of_the_same_shapes_is_found_by_its_digest(tmp_path: Path, adapter: Path) -> None:
    other = changed_base(tmp_path / "other", "model.norm.weight")
    assert found(at.validate(adapter, base=other)) == {("IntegrityError", "base-digest")}
    assert at.validate(adapter, base=other, check_base="targets").ok
    assert at.validate(adapter, base=other, check_base="off").ok
    target = changed_base(tmp_path / "third", "model.layers.0.self_attn.q_proj.weight")
    report = at.validate(adapter, base=target, check_base="targets")
    assert found(report) == {("IntegrityError", "base-targets-digest")}
    assert at.validate(adapter, base=target, check_base="off").ok


def test_a_base_that_does_not_fit(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_base(base)
    tensors = base_tensors()
    tensors["model.layers.0.self_attn.v_proj.weight"] = counted("F32", HEADS_OUT + 1, WIDTH)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    write_safetensors(base / "model.safetensors", tensors)
    report = at.validate(make_adapter(tmp_path / "a"), base=base)
    assert {error for error, _ in found(report)} == {"MismatchError"}
    text = "\n".join(map(str, report.problems))
    assert "layers.0.self_attn.v_proj" in text
    assert "layers.1.self_attn.q_proj" in text


def test_a_broken_base_is_a_problem_of_the_base(tmp_path: Path, adapter: Path) -> None:
    base = tmp_path / "broken"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"\x00" * 20)
    report = at.validate(adapter, base=base)
    assert {error for error, _ in found(report)} == {"FormatError"}
    assert report.skipped["base"]


def test_an_unknown_way_to_check_the_base_is_refused(adapter: Path) -> None:
    with pytest.raises(at.UnsupportedError, match="full, targets, off"):
        at.validate(adapter, check_base="half")
