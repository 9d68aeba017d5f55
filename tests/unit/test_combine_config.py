"""What a combined adapter takes over of its inputs: config fields, targets, files beside, and the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import adapterhub_tools as at
from tests.property.low_rank_folders import config_of, gaussian, write_base, write_lora

LAYERS = [f"model.layers.{i}.{name}" for i in range(3) for name in ("q_proj", "v_proj")]


def adapter(folder: Path, paths: list[str], seed: int, **config: Any) -> Path:
    factors = {p: (gaussian(5, 2, seed + i), gaussian(2, 6, seed + 90 + i)) for i, p in enumerate(paths)}
    return write_lora(folder, factors, **config)


def combined(
    root: Path, *configs: tuple[list[str], dict[str, Any]]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    folders = [adapter(root / f"a{i}", *c[:1], 200 * i, **c[1]) for i, c in enumerate(configs)]
    report = at.combine_adapters(folders, out=root / "o", weights=[1.0] * len(folders))
    assert not at.validate(root / "o").problems
    return config_of(root / "o"), report.notes


def test_fields_that_agree_stay_and_others_are_told(tmp_path: Path) -> None:
    shared = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "owner/base"}
    config, notes = combined(
        tmp_path,
        (LAYERS, {**shared, "target_modules": ["v_proj", "q_proj"], "lora_dropout": 0.1}),
        (LAYERS, {**shared, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.2, "use_rslora": True}),
    )
    assert {name: config[name] for name in shared} == shared
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["use_rslora"] is False
    assert config["lora_dropout"] == 0.0
    assert any("lora_dropout" in note for note in notes)


@pytest.mark.parametrize("second", ["owner/other", "owner/base", None, ""])
def test_bases_that_configs_name(second: str | None, tmp_path: Path) -> None:
    """Names that differ are told, as they may mean other weights; one that is missing is no contradiction."""
    config, notes = combined(
        tmp_path,
        (LAYERS, {"base_model_name_or_path": "owner/base"}),
        (LAYERS, {"base_model_name_or_path": second}),
    )
    told = [note for note in notes if "a0 owner/base, a1 owner/other" in note]
    assert bool(told) == (second == "owner/other")
    assert config["base_model_name_or_path"] == (None if told else "owner/base")


CASES: dict[str, tuple[Any, Any, Any]] = {
    "lists": ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj", "q_proj"]}, ["q_proj", "v_proj"]),
    "one pattern": ({"target_modules": ".*_proj"}, {"target_modules": ".*_proj"}, ".*_proj"),
    "two patterns": ({"target_modules": ".*q_proj"}, {"target_modules": ".*_proj"}, LAYERS),
    "narrowed": (
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1]},
        [*LAYERS[:4]],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_targets_mean_the_modules_of_all(name: str, tmp_path: Path) -> None:
    first, second, expected = CASES[name]
    layers = [p for p in LAYERS if name != "narrowed" or not p.startswith("model.layers.2")]
    own = [p for p in layers if p.endswith("q_proj") and (name != "narrowed" or ".1." in p)]
    other = layers if second["target_modules"] != ["q_proj"] else own
    config, _ = combined(tmp_path, (own if name != "one pattern" else layers, first), (other, second))
    found = config["target_modules"]
    assert (sorted(found) if isinstance(found, list) else found) == (
        sorted(expected) if isinstance(expected, list) else expected
    )
    assert not config.get("layers_to_transform")


def test_files_beside_go_along_where_all_agree(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"a{i}", LAYERS, 200 * i) for i in range(2)]
    for folder in folders:
        (folder / "tokenizer_config.json").write_text("{}")
    at.combine_adapters(folders, out=tmp_path / "o", weights=[1, 1])
    assert (tmp_path / "o" / "tokenizer_config.json").read_text() == "{}"
    (folders[1] / "tokenizer_config.json").write_text('{"other": 1}')
    report = at.combine_adapters(folders, out=tmp_path / "p", weights=[1, 1])
    assert not (tmp_path / "p" / "tokenizer_config.json").exists()
    assert any("tokenizer_config.json" in note for note in report.notes)


def test_the_manifest_keeps_the_base_that_all_record(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", {f"{path}.weight": gaussian(5, 6, 7) for path in LAYERS})
    folders = [adapter(tmp_path / f"a{i}", LAYERS, 200 * i) for i in range(2)]
    for folder in folders:
        at.init(folder, base=base)
    at.combine_adapters(folders, out=tmp_path / "o", weights=[1, 1])
    recorded = at.load_manifest(tmp_path / "o").base
    assert recorded.digest == at.load_manifest(folders[0]).base.digest
    assert recorded.digest is not None
    merged = at.merge(base, tmp_path / "o", tmp_path / "merged")
    assert merged.changed == len(LAYERS)
    twice = at.combine_adapters(folders, out=tmp_path / "again", weights=[1, 1], base=base)
    assert {item.role for item in at.load_manifest(tmp_path / "again").history[-1].inputs} == {
        "adapter",
        "base-targets",
    }
    assert twice.digest == at.adapter_digest(tmp_path / "o")


@pytest.mark.parametrize("wrong", [{"space": "delta"}, {"full": "mean"}, {"dtype": "int8"}])
def test_values_that_no_option_has(wrong: dict[str, str], tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"a{i}", LAYERS, 200 * i) for i in range(2)]
    with pytest.raises(ValueError, match="must be one of"):
        at.combine_adapters(folders, out=tmp_path / "o", weights=[1, 1], **wrong)
    assert not (tmp_path / "o").exists()


def test_a_dry_run_reports_and_writes_nothing(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"a{i}", LAYERS, 200 * i) for i in range(2)]
    before = sorted(tmp_path.rglob("*"))
    dry = at.combine_adapters(folders, out=None, weights=[1, 2], dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    real = at.combine_adapters(folders, out=tmp_path / "o", weights=[1, 2])
    assert dry.modules == real.modules
    data = json.loads(json.dumps(real.to_json()))
    assert data["weights"] == {"*": [1.0, 2.0]}
    assert [item["modules"] for item in data["inputs"]] == [6, 6]
    with pytest.raises(at.StoreError):
        at.combine_adapters(folders, out=tmp_path / "o", weights=[1, 2])
    again = at.combine_adapters(folders, out=tmp_path / "o", weights=[1, 2], replace=True)
    assert again.digest == real.digest
