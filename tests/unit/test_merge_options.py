"""What a merge is asked wrongly, and what it says of a base's config that is unclear."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import adapterhub_tools as at
from adapterhub_tools.cli.main import cli
from adapterhub_tools.model.base import is_repository_id
from tests.tiny_files import ROWS, WIDTH, counted, make_adapter, write_json


def configure(base: Path, changes: Mapping[str, Any]) -> None:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    write_json(base / "config.json", {**config, **changes})


@pytest.mark.parametrize("scales", [("nan",), ("inf",), ("1", "2"), ("1", "2", "-inf")])
@pytest.mark.parametrize("verb", ["merge", "verify"])
def test_wrong_scales_are_wrong_usage(
    tmp_path: Path, base: Path, adapter: Path, scales: tuple[str, ...], verb: str
) -> None:
    options = [word for scale in scales for word in ("--scale", scale)]
    result = CliRunner().invoke(cli, [verb, *map(str, (base, adapter, tmp_path / "out")), *options])
    assert result.exit_code == 2, result.output
    assert "scale" in result.output
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="scale"):
        at.merge(base, adapter, tmp_path / "out", scale=[float(scale) for scale in scales])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"device": "tpu"}, {"check_base": "half"}, {"threads": 0}, {"out": None}]
)
def test_wrong_options_are_value_errors(
    tmp_path: Path, base: Path, adapter: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError):
        at.merge(base, adapter, **{"out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dtype", "wider"),
    [
        ("float16", "float32"),
        ("bfloat16", "float64"),
        ("float32", "float64"),
        ("float64", "No type is wider"),
    ],
)
def test_an_overflow_advises_a_wider_type_than_that_of_the_output(
    tmp_path: Path, base: Path, adapter: Path, dtype: str, wider: str
) -> None:
    with pytest.raises(at.LossyError) as caught:
        at.merge(base, adapter, tmp_path / "out", dtype=dtype, scale=1.7e308, threads=1)
    remedy = caught.value.problems[0].remedy
    assert wider in remedy
    assert f"--dtype {dtype}" not in remedy


@pytest.mark.parametrize("value", ["false", "true", 0, 1, []])
def test_a_tie_that_is_no_boolean_is_refused_where_it_matters(
    tmp_path: Path, base: Path, adapter: Path, value: object
) -> None:
    configure(base, {"tie_word_embeddings": value})
    assert at.merge(base, adapter, tmp_path / "untouched").changed == 4
    with_embedding = make_adapter(
        tmp_path / "embedding",
        tensors={
            "base_model.model.model.embed_tokens.lora_embedding_A": counted("F32", 2, ROWS),
            "base_model.model.model.embed_tokens.lora_embedding_B": counted("F32", WIDTH, 2),
        },
        target_modules=["embed_tokens"],
    )
    with pytest.raises(at.FormatError) as caught:
        at.merge(base, with_embedding, None, dry_run=True)
    assert [(p.kind, p.loc) for p in caught.value.problems] == [("type", "tie_word_embeddings")]
    report = at.validate(with_embedding, base=base)
    assert "FormatError" in {finding.error.__name__ for finding in report.errors}
    configure(base, {"tie_word_embeddings": False})
    assert at.validate(with_embedding, base=base).ok


def test_a_quantisation_that_the_weights_do_not_have_is_noted(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    assert not any("quantization" in note for note in at.merge(base, adapter, tmp_path / "plain").notes)
    configure(base, {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    report = at.merge(base, adapter, tmp_path / "noted")
    assert any("quantization_config (bitsandbytes)" in note for note in report.notes)


@pytest.mark.parametrize(
    ("name", "id_"),
    [
        ("owner/name", "owner/name"),
        ("gpt2", "gpt2"),
        ("/models/tiny", None),
        ("./model", None),
        ("../model", None),
        ("models/owner/name", None),
        ("C:\\models\\x", None),
        ("owner/name/", None),
        ("~/model", None),
    ],
)
def test_only_a_repository_id_is_recorded_as_the_base(tmp_path: Path, name: str, id_: str | None) -> None:
    assert is_repository_id(name) == (id_ is not None)
    adapter = make_adapter(tmp_path / "a", base_model_name_or_path=name)
    report = at.init(adapter)
    assert report.manifest.base.id == id_
    assert any("--base-id" in note for note in report.notes) == (id_ is None)
    assert at.svd_shrink(adapter, tmp_path / "small", rank=1).digest
    assert at.load_manifest(tmp_path / "small").base.id == id_
    assert at.init(adapter, replace=True, base_id=name).manifest.base.id == name
