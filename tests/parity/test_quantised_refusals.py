"""What is asked wrongly of a merge onto a quantised base, and what is told of one that nobody declared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import adapterhub_tools as at
from adapterhub_tools.cli.main import cli
from tests.parity.oracle import refused
from tests.parity.quantised_bases import NF4_DOUBLE, Quantised, adapted, load, save_plain

SCHEME = {"scheme": "bitsandbytes-nf4", "double": True, "compute_dtype": "BF16"}
NF4 = {"quant": "nf4,double", "compute_dtype": "bf16"}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``plain``, the base in bfloat16; ``stored``, quantised; ``adapter``, trained on it."""
    folder = tmp_path_factory.mktemp("scene")
    save_plain(folder / "plain", torch.bfloat16)
    model = load(folder / "plain", NF4_DOUBLE, torch.bfloat16)
    model.save_pretrained(folder / "stored")
    adapted(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), folder / "adapter")
    return folder


@pytest.fixture
def adapter(scene: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    import shutil

    return Path(shutil.copytree(scene / "adapter", tmp_path / "adapter"))


@pytest.fixture
def stored(scene: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(scene / "stored", tmp_path / "stored"))


@pytest.mark.parametrize(
    ("base", "options", "error", "kind"),
    [
        ("stored", {"onto": "original"}, at.UnsupportedError, "onto-original"),
        ("plain", {"onto": "quantized"}, at.UnsupportedError, "onto-quantized"),
        ("plain", {"onto": "quantized", **NF4}, at.UnsupportedError, "onto-quantized"),
        ("plain", {"onto": "dequantized"}, at.MismatchError, "quant-undeclared"),
        ("plain", {"quant": "nf4"}, at.MismatchError, "compute-dtype"),
        ("plain", {"quant": "int8"}, at.MismatchError, "compute-dtype"),
        ("plain", {"onto": "original", "quant": "nf4"}, at.MismatchError, "quant-unused"),
        ("plain", {"onto": "original", "compute_dtype": "bf16"}, at.MismatchError, "quant-unused"),
        ("plain", {"compute_dtype": "bf16"}, at.MismatchError, "quant-undeclared"),
        ("plain", {"quant": "nf5"}, at.UnsupportedError, "unknown-scheme"),
        ("plain", {"quant": "gptq"}, at.UnsupportedError, "unknown-scheme"),
        ("plain", {"quant": "nf4,100"}, at.UnsupportedError, "unknown-scheme"),
        ("stored", {"quant": "nf4"}, at.MismatchError, "quant-scheme"),
        ("stored", {"quant": "int8"}, at.MismatchError, "quant-scheme"),
        ("stored", {"onto": "quantized", "dtype": "bfloat16"}, at.MismatchError, "onto-dtype"),
        ("stored", {"undo": True}, at.UnsupportedError, "undo-quantised"),
        ("stored", {"undo": True, "onto": "quantized"}, at.UnsupportedError, "undo-quantised"),
        ("plain", {"undo": True, **NF4}, at.UnsupportedError, "undo-quantised"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_what_a_base_cannot_give_is_refused(
    scene: Path, tmp_path: Path, base: str, options: dict[str, Any], error: type[at.AdapterError], kind: str
) -> None:
    refused(error, kind, scene / base, scene / "adapter", tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("options", "exit_code"), [({"onto": "int4"}, 2), ({"compute_dtype": "int8"}, 2), ({"loss": "some"}, 2)]
)
def test_unknown_words_are_wrong_usage(
    scene: Path, tmp_path: Path, options: dict[str, Any], exit_code: int
) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        at.merge(scene / "plain", scene / "adapter", tmp_path / "out", **options)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    places = map(str, (scene / "plain", scene / "adapter", tmp_path / "out"))
    assert CliRunner().invoke(cli, ["merge", *places, *words]).exit_code == exit_code
    assert not (tmp_path / "out").exists()


def _without(suffix: str) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"model.layers.0.self_attn.q_proj.weight{suffix}"]

    return change


def _with_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight.nested_absmax"][0] = float("nan")


def _shorter(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight.absmax"
    tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize(
    "change",
    [_without(".absmax"), _without(".quant_state.bitsandbytes__nf4"), _without(".nested_absmax"), _shorter],
    ids=["no scales", "no state", "no nested scales", "a scale too few"],
)
@pytest.mark.parametrize("onto", ["dequantized", "quantized"])
def test_a_base_that_lacks_a_part_is_refused(
    stored: Path, adapter: Path, tmp_path: Path, change: Callable[[Any], object], onto: str
) -> None:
    tensors = load_file(stored / "model.safetensors")
    change(tensors)
    save_file(tensors, stored / "model.safetensors")
    with pytest.raises(at.AdapterError) as caught:
        at.merge(stored, adapter, tmp_path / "out", onto=onto)
    assert isinstance(caught.value, at.FormatError | at.UnsupportedError)
    assert any("q_proj" in problem.loc for problem in caught.value.problems), str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("onto", ["dequantized", "quantized"])
def test_scales_that_are_not_finite_end_the_merge(
    stored: Path, adapter: Path, tmp_path: Path, onto: str
) -> None:
    tensors = load_file(stored / "model.safetensors")
    _with_nan(tensors)
    save_file(tensors, stored / "model.safetensors")
    with pytest.raises(at.FormatError) as caught:
        at.merge(stored, adapter, tmp_path / "out", onto=onto)
    assert "q_proj" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_nan_in_a_base_that_was_quantised_while_loading_is_named(
    scene: Path, adapter: Path, tmp_path: Path
) -> None:
    tensors = load_file(scene / "plain" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text((scene / "plain" / "config.json").read_text())
    problem = refused(
        at.FormatError, "non-finite", tmp_path / "base", adapter, tmp_path / "out", onto="dequantized", **NF4
    )
    assert problem.loc == "model.layers.1.mlp.up_proj.weight"
    assert "row 3, column 5" in problem.message


def test_a_manifest_that_records_another_base_is_refused(scene: Path, adapter: Path, tmp_path: Path) -> None:
    """Recorded: 16 bits; given: 4 bits. And the other way round: another scheme."""
    at.init(adapter, base=scene / "plain")
    refused(at.IntegrityError, "base-quantisation", scene / "stored", adapter, tmp_path / "out")
    at.init(adapter, base=scene / "plain", quantisation={"scheme": "bitsandbytes-int8"}, replace=True)
    refused(at.IntegrityError, "base-quantisation", scene / "stored", adapter, tmp_path / "out")
    refused(at.MismatchError, "quant-scheme", scene / "plain", adapter, tmp_path / "out", **NF4)
    at.merge(scene / "stored", adapter, tmp_path / "out", check_base="off")


def test_adapters_of_different_schemes_are_not_summed(scene: Path, adapter: Path, tmp_path: Path) -> None:
    import shutil

    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    at.init(adapter, base=scene / "plain", quantisation=SCHEME)
    at.init(other, base=scene / "plain", quantisation={**SCHEME, "double": False})
    with pytest.raises(at.MismatchError, match="quantised differently"):
        at.merge(scene / "plain", [adapter, other], tmp_path / "out")


def test_an_unknown_recorded_scheme_is_refused_where_it_is_needed(
    scene: Path, adapter: Path, tmp_path: Path
) -> None:
    at.init(adapter, base=scene / "plain", quantisation={"scheme": "gptq"})
    refused(at.UnsupportedError, "unknown-scheme", scene / "plain", adapter, tmp_path / "out")
    report = at.merge(scene / "plain", adapter, tmp_path / "out", onto="original")
    assert report.changed == report.expected


def test_the_manifest_decides_and_original_is_said(scene: Path, adapter: Path, tmp_path: Path) -> None:
    at.init(adapter, base=scene / "plain", quantisation=SCHEME)
    told = at.merge(scene / "plain", adapter, tmp_path / "told")
    flags = at.merge(scene / "plain", adapter, tmp_path / "flags", **NF4)
    assert told.digest == flags.digest
    original = at.merge(scene / "plain", adapter, tmp_path / "original", onto="original")
    assert original.digest != told.digest
    assert original.receipt is not None
    assert "onto" not in original.receipt.options
    assert any("trained on NF4" in note for note in original.notes)


@pytest.mark.parametrize("sign", ["name", "card", "none"])
def test_an_undeclared_quantised_base_is_told_and_not_assumed(
    scene: Path, adapter: Path, tmp_path: Path, sign: str
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    name = "owner/model-bnb-4bit" if sign == "name" else "owner/model"
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    card = "- load_in_4bit: True\n- bnb_4bit_quant_type: nf4\n" if sign == "card" else "A model.\n"
    (adapter / "README.md").write_text(f"## Training procedure\n\n{card}")
    report = at.merge(scene / "plain", adapter, tmp_path / "out")
    assert report.receipt is not None
    assert "onto" not in report.receipt.options
    assert any("may have been trained on a quantised base" in note for note in report.notes) == (
        sign != "none"
    )
    said = at.merge(scene / "plain", adapter, tmp_path / "said", onto="original")
    assert not any("may have been trained" in note for note in said.notes)


@pytest.mark.parametrize("skip", [None, ["lm_head", "model.layers.0"]])
def test_the_flags_that_a_card_gives_are_told_and_say_what_the_loader_did(
    scene: Path, tmp_path: Path, skip: list[str] | None
) -> None:
    """Older releases of PEFT wrote the loader's config into the card, line by line."""
    how = Quantised(words="nf4,double", config={**NF4_DOUBLE.config, "llm_int8_skip_modules": skip})
    model = load(scene / "plain", how, torch.bfloat16)
    model.save_pretrained(tmp_path / "stored")
    adapted(model, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    fields = how.loader(torch.bfloat16).to_dict()
    card = "\n".join(f"- {name}: {value}" for name, value in fields.items())
    (tmp_path / "adapter" / "README.md").write_text(f"## Training procedure\n\n{card}\n")
    report = at.merge(scene / "plain", tmp_path / "adapter", tmp_path / "out")
    (note,) = [note for note in report.notes if "would say it" in note]
    flags = note.partition("by its README ")[2].partition(" would say it")[0].split(" ")
    assert flags[:4] == ["--quant", "nf4,double", "--compute-dtype", "bf16"]
    paths = [str(scene / "plain"), str(tmp_path / "adapter"), str(tmp_path / "said")]
    ran = CliRunner().invoke(cli, ["merge", *paths, *flags, "--json"])
    assert ran.exit_code == 0, ran.output
    stored = at.merge(tmp_path / "stored", tmp_path / "adapter", tmp_path / "from-stored")
    assert json.loads(ran.stdout)["digest"] == stored.digest


@pytest.mark.parametrize(
    ("base", "options"), [("stored", {}), ("stored", {"onto": "quantized"}), ("plain", NF4)]
)
def test_a_receipt_is_replayed(
    scene: Path, adapter: Path, tmp_path: Path, base: str, options: dict[str, Any]
) -> None:
    first = at.merge(scene / base, adapter, tmp_path / "one", allow_loss=True, **options)
    again = at.merge(scene / base, adapter, tmp_path / "two", allow_loss=True, replay=tmp_path / "one")
    assert first.receipt == again.receipt
    receipts = [(tmp_path / name / "merge_receipt.json").read_bytes() for name in ("one", "two")]
    assert receipts[0] == receipts[1]
    refused(
        at.MismatchError,
        "replay-options",
        scene / base,
        adapter,
        tmp_path / "no",
        replay=tmp_path / "one",
        **NF4,
    )
    report = at.verify(merged=tmp_path / "one", base=scene / base, adapter=adapter)
    assert [problem.kind for problem in report.unchecked] == ["onto"]
    assert report.exit_code == 10
    assert at.verify(merged=tmp_path / "one", receipt=True).ok


def test_the_digests_of_a_stored_base_are_those_of_its_files(
    scene: Path, adapter: Path, tmp_path: Path
) -> None:
    report = at.merge(scene / "stored", adapter, tmp_path / "out")
    assert report.base_digest == at.content_digest(scene / "stored").digest
    partly = at.merge(scene / "stored", adapter, tmp_path / "part", check_base="targets")
    assert partly.receipt is not None
    assert report.receipt is not None
    assert partly.receipt.base.targets_digest == report.receipt.base.targets_digest
    assert partly.digest == report.digest
