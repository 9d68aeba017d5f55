"""Inspect says what lies at a path, from headers and configs alone."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path

import pytest

import adapterhub_tools as at
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


def inspect_adapter(path: Path, base: Path | None = None) -> at.AdapterReport:
    report = at.inspect(path, base=base)
    assert isinstance(report, at.AdapterReport)
    json.dumps(report.to_json())
    return report


def inspect_base(path: Path) -> at.BaseReport:
    report = at.inspect(path)
    assert isinstance(report, at.BaseReport)
    json.dumps(report.to_json())
    return report


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A bfloat16 file whose data is one hole, so that large models cost nothing."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)


def test_llama_2_7b_with_rank_16_on_q_and_v_trains_8388608_parameters(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(32):
        for name in ("q_proj", "v_proj"):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            shapes[f"{stem}.lora_A.weight"] = (16, 4096)
            shapes[f"{stem}.lora_B.weight"] = (4096, 16)
    write_sparse(tmp_path / "adapter_model.safetensors", shapes)
    write_json(
        tmp_path / "adapter_config.json",
        {
            "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
            "peft_type": "LORA",
            "r": 16,
            "lora_alpha": 32,
            "target_modules": ["q_proj", "v_proj"],
        },
    )
    manifest = at.init(tmp_path).manifest.to_json()
    manifest["base"]["parameters"] = 6_738_415_616
    (tmp_path / "adapter_manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    report = inspect_adapter(tmp_path)
    assert report.parameters == 8_388_608
    assert report.share == 8_388_608 / 6_738_415_616
    assert (report.ranks, report.alphas, report.scales) == ({16: 64}, {32: 64}, {2.0: 64})
    assert [(g.name, g.kind, g.modules, g.shapes) for g in report.groups] == [
        ("q_proj", "linear", 32, ((4096, 4096),)),
        ("v_proj", "linear", 32, ((4096, 4096),)),
    ]
    assert report.dtypes == {"BF16": 8_388_608}
    assert report.adapter.base is not None
    assert report.adapter.base.id == "meta-llama/Llama-2-7b-hf"
    assert report.mergeable


def test_share_of_a_given_base(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    report = inspect_adapter(adapter, base)
    whole = sum(prod(shape) for _, shape, _ in base_tensors().values())
    trained = 2 * (2 * WIDTH + WIDTH * 2 + 2 * WIDTH + HEADS_OUT * 2)
    assert (report.parameters, report.base_parameters) == (trained, whole)
    assert report.share == trained / whole


def test_ranks_alphas_and_scales_where_patterns_differ(tmp_path: Path) -> None:
    tensors = adapter_tensors()
    for name, shape in (("lora_A", (5, WIDTH)), ("lora_B", (WIDTH, 5))):
        tensors[f"base_model.model.model.layers.1.self_attn.q_proj.{name}.weight"] = counted("F32", *shape)
    adapter = make_adapter(
        tmp_path / "adapter",
        tensors=tensors,
        rank_pattern={"layers.1.self_attn.q_proj": 5},
        alpha_pattern={"v_proj": 9},
        use_rslora=True,
    )
    report = inspect_adapter(adapter)
    assert report.ranks == {2: 3, 5: 1}
    assert report.alphas == {4: 2, 9: 2}
    assert report.scales == {1.7888543819998317: 1, 2.8284271247461903: 1, 6.363961030678928: 2}
    assert report.adapter.hparams["scaling"] == "alpha/sqrt(rank)"
    assert [group.ranks for group in report.groups] == [(2, 5), (2,)]


def test_tensors_in_full_count(tmp_path: Path) -> None:
    tensors = adapter_tensors()
    tensors["base_model.model.lm_head.weight"] = counted("F32", ROWS, WIDTH)
    report = inspect_adapter(make_adapter(tmp_path / "a", tensors=tensors, modules_to_save=["lm_head"]))
    assert report.full_parameters == ROWS * WIDTH
    assert [(full.target, full.role) for full in report.adapter.full] == [
        ("lm_head.weight", "modules_to_save")
    ]
    assert report.parameters == ROWS * WIDTH + sum(m.parameters for m in report.adapter.modules)


def test_what_stands_against_a_merge_is_said(tmp_path: Path) -> None:
    report = inspect_adapter(make_adapter(tmp_path / "a", init_lora_weights="pissa"))
    assert not report.mergeable
    assert [kind for kind, _, _ in report.adapter.blockers]
    assert all(remedy for _, _, remedy in report.adapter.blockers)


def test_wrong_content_is_described_and_not_mergeable(tmp_path: Path) -> None:
    tensors = adapter_tensors()
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    report = inspect_adapter(make_adapter(tmp_path / "a", tensors=tensors))
    assert not report.mergeable
    assert any("q_proj" in str(problem) for problem in report.problems)


def test_another_method_is_described(tmp_path: Path) -> None:
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.k_proj.ia3_l": counted("F32", HEADS_OUT, 1)
        for layer in range(2)
    }
    folder = tmp_path / "a"
    folder.mkdir()
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}
    write_json(folder / "adapter_config.json", config)
    report = inspect_adapter(folder)
    assert (report.adapter.method, report.parameters, report.ranks) == ("ia3", 2 * HEADS_OUT, {})
    assert report.mergeable


def test_a_pickle_is_described_by_its_config_and_never_read(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04not a pickle that could be loaded.")
    report = inspect_adapter(folder)
    assert (report.weights_file, report.mergeable, report.problems) == (None, False, ())
    assert any("adapter_model.bin" in note for note in report.notes)


def test_a_single_file_of_an_adapter_is_an_adapter(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "any_name.safetensors", adapter_tensors())
    report = inspect_adapter(tmp_path / "any_name.safetensors")
    assert report.parameters == sum(prod(shape) for _, shape, _ in adapter_tensors().values())
    assert {problem.kind for problem in report.problems} == {"missing-config"}


# --- bases ---------------------------------------------------------------------------------------


def test_a_base(tmp_path: Path) -> None:
    report = inspect_base(make_base(tmp_path / "base", dtype="BF16"))
    specs = base_tensors("BF16")
    assert (report.architecture, report.classes) == ("llama", ("LlamaForCausalLM",))
    assert report.parameters == sum(prod(shape) for _, shape, _ in specs.values())
    assert (report.tensors, report.bytes) == (len(specs), 2 * report.parameters)
    assert report.dtypes == {"BF16": report.parameters}
    assert (report.tied, report.vocabulary, report.layers, report.hidden) == (True, ROWS, 2, WIDTH)
    assert report.files == ("model.safetensors",)


def test_rows_of_the_stored_embedding_count_not_the_config(tmp_path: Path) -> None:
    report = inspect_base(make_base(tmp_path / "base", vocab_size=ROWS + 5, tie_word_embeddings=False))
    assert (report.vocabulary, report.tied) == (ROWS, False)


def test_a_quantised_base_says_so(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", quantization_config={"quant_method": "gptq"})
    report = inspect_base(base)
    assert report.quantisation == "gptq"
    assert any("quantised" in note for note in report.notes)


def test_a_file_without_config_is_a_base_of_unknown_kind(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", base_tensors())
    report = inspect_base(tmp_path / "x.safetensors")
    assert (report.architecture, report.tied, report.layers) == (None, None, None)
    assert report.notes


def test_shards_are_counted(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = list(base_tensors().items())
    parts = {"model-1.safetensors": dict(tensors[:3]), "model-2.safetensors": dict(tensors[3:])}
    for file, part in parts.items():
        write_safetensors(base / file, part)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    write_json(base / "model.safetensors.index.json", index)
    (base / "model.safetensors").unlink()
    report = inspect_base(base)
    assert report.files == ("model-1.safetensors", "model-2.safetensors")
    assert report.tensors == len(tensors)


# --- broken --------------------------------------------------------------------------------------


def test_broken_files_are_errors_of_their_class(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(at.FormatError, match=r"adapter_model\.safetensors"):
        at.inspect(adapter)
    weights.write_bytes(whole)
    (adapter / "adapter_config.json").write_text('{"r": 2, "r": 3}', encoding="utf-8")
    with pytest.raises(at.FormatError, match="stands 2 times"):
        at.inspect(adapter)
    with pytest.raises(at.StoreError):
        at.inspect(tmp_path / "nothing-here")
    (tmp_path / "empty").mkdir()
    with pytest.raises(at.FormatError, match="no weights"):
        at.inspect(tmp_path / "empty")


def test_a_manifest_of_another_major_version_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    write_json(adapter / "adapter_manifest.json", {"schema_version": "2.0"})
    with pytest.raises(at.UnsupportedVersionError):
        at.inspect(adapter)


def test_what_is_written_to_is_a_local_path() -> None:
    with pytest.raises(at.UnsupportedError, match="Pull it first"):
        at.init("hf://owner/name")
