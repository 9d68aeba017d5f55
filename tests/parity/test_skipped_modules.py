"""A base of which the loader was told to leave some modules alone: ``llm_int8_skip_modules``.

The reference is the model that transformers and bitsandbytes load with that list, and PEFT's adapter on it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig
from safetensors.torch import load_file

import adapterhub_tools as at
from adapterhub_tools.cli.main import cli
from adapterhub_tools.errors import FormatError, MismatchError
from tests.parity.exact import assert_exactly_rounded, factors_of
from tests.parity.oracle import refused
from tests.parity.quantised_bases import Quantised, adapted, dequantised, load, save_plain

SKIPS = {
    "a layer and a name": ["model.layers.0", "up_proj"],
    "an expression": [r"model\.layers\.\d+\.(self_attn|mlp).*_proj", "lm_head"],
    "nothing": [],
}
SCHEMES = {
    "nf4,double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
TARGETS = ["q_proj", "down_proj"]


def scheme_of(words: str, skip: list[str]) -> Quantised:
    return Quantised(words=words, config={**SCHEMES[words], "llm_int8_skip_modules": skip})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def scene(folder: Path, words: str, skip: list[str]) -> dict[str, torch.Tensor]:
    """Makes ``plain``, ``stored`` and ``adapter``; returns the weights that the loader quantised."""
    save_plain(folder / "plain", torch.bfloat16)
    model = load(folder / "plain", scheme_of(words, skip), torch.bfloat16)
    model.save_pretrained(folder / "stored")
    peft = adapted(model, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS), folder / "adapter")
    found = dequantised(peft.get_base_model(), torch.bfloat16)
    return {name.replace(".base_layer", ""): weight for name, weight in found.items()}


@pytest.mark.parametrize("case", SKIPS)
@pytest.mark.parametrize("words", SCHEMES)
def test_each_weight_is_the_one_that_the_loaded_model_has(tmp_path: Path, words: str, case: str) -> None:
    quantised = scene(tmp_path, words, SKIPS[case])
    plain = weights_of(tmp_path / "plain")
    assert len(quantised) == {"a layer and a name": 7, "an expression": 0, "nothing": 15}[case]
    flags: dict[str, Any] = {"quant": words, "compute_dtype": "bf16", "skip_modules": SKIPS[case]}
    report = at.merge(tmp_path / "plain", tmp_path / "adapter", tmp_path / "out", **flags)
    merged = weights_of(tmp_path / "out")
    for name, weight in plain.items():
        before = quantised.get(name, weight)
        if any(target in name for target in TARGETS):
            factors = factors_of(tmp_path / "adapter", name.removesuffix(".weight"))
            assert_exactly_rounded(merged[name], before, [factors])
        else:
            assert torch.equal(merged[name], before), name
    assert report.receipt is not None
    assert report.receipt.options["quantisation"]["skip_modules"] == SKIPS[case]
    replayed = at.merge(tmp_path / "plain", tmp_path / "adapter", tmp_path / "again", replay=tmp_path / "out")
    assert replayed.digest == report.digest
    if quantised:
        stored = at.merge(tmp_path / "stored", tmp_path / "adapter", tmp_path / "stored-out")
        assert stored.digest == report.digest
        assert stored.receipt is not None
        assert "skip_modules" not in stored.receipt.options["quantisation"]


def test_the_list_of_a_stored_base_is_recorded_and_holds_for_the_plain_one(tmp_path: Path) -> None:
    scene(tmp_path, "nf4,double", ["lm_head", "layers.1.mlp", "model.layers.0.mlp"])
    at.init(tmp_path / "adapter", base=tmp_path / "stored")
    recorded = at.load_manifest(tmp_path / "adapter").base.quantisation
    assert recorded is not None
    assert recorded["skip_modules"] == ["lm_head", "layers.1.mlp", "model.layers.0.mlp"]
    stored = at.merge(tmp_path / "stored", tmp_path / "adapter", tmp_path / "one")
    plain = at.merge(tmp_path / "plain", tmp_path / "adapter", tmp_path / "two", check_base="off")
    assert plain.digest == stored.digest
    assert any("no matrix of this base: layers.1.mlp" in note for note in plain.notes)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    scene(folder, "nf4,double", ["lm_head"])
    return folder


NF4 = {"quant": "nf4,double", "compute_dtype": "bf16"}


@pytest.mark.parametrize(
    ("base", "options", "error", "kind"),
    [
        ("stored", {"skip_modules": ["lm_head"]}, MismatchError, "quant-unused"),
        ("plain", {"skip_modules": ["lm_head"]}, MismatchError, "quant-undeclared"),
        ("plain", {"skip_modules": ["lm_head"], "onto": "original"}, MismatchError, "quant-unused"),
        ("plain", {**NF4, "skip_modules": ["("]}, FormatError, "regex"),
        ("plain", {**NF4, "skip_modules": ["(.*.*.*.*.*.*)+x"]}, FormatError, "regex"),
    ],
)
def test_a_list_that_means_nothing_is_refused(
    small: Path, tmp_path: Path, base: str, options: dict[str, Any], error: type[Exception], kind: str
) -> None:
    refused(error, kind, small / base, small / "adapter", tmp_path / "out", **options)


def test_an_empty_name_is_wrong_usage(small: Path, tmp_path: Path) -> None:
    paths = [str(path) for path in (small / "plain", small / "adapter", tmp_path / "out")]
    result = CliRunner().invoke(cli, ["merge", *paths, "--quant", "nf4", "--skip-modules", ""])
    assert result.exit_code == 2, result.output
    with pytest.raises(ValueError, match="skip_modules"):
        at.merge(*paths, quant="nf4", skip_modules=[""])


def test_the_command_takes_one_name_after_the_other(small: Path, tmp_path: Path) -> None:
    paths = [str(path) for path in (small / "plain", small / "adapter", tmp_path / "out")]
    words = ["--quant", "nf4,double", "--compute-dtype", "bf16", "--json", "--dry-run"]
    names = ["--skip-modules", "lm_head", "--skip-modules", "model.layers.0"]
    result = CliRunner().invoke(cli, ["merge", *paths, *words, *names])
    assert result.exit_code == 0, result.output
    assert any("7 linear weights" in note for note in json.loads(result.stdout)["notes"])


def test_lists_that_differ_are_refused(small: Path, tmp_path: Path) -> None:
    """Of two manifests, and of a manifest and the flag; None stands for the loader's own choice."""
    import shutil

    scheme = {"scheme": "bitsandbytes-nf4", "double": True, "compute_dtype": "BF16"}
    for name, skips in (("a", ["lm_head"]), ("b", ["lm_head", "q_proj"]), ("c", None), ("d", ["lm_head"])):
        shutil.copytree(small / "adapter", tmp_path / name)
        more = {} if skips is None else {"skip_modules": skips}
        at.init(tmp_path / name, base=small / "plain", quantisation=scheme | more)
    base, out = small / "plain", tmp_path / "out"
    for other in ("b", "c"):
        refused(MismatchError, "quant-skips", base, [tmp_path / "a", tmp_path / other], out)
    refused(MismatchError, "quant-skips", base, tmp_path / "a", out, skip_modules=["q_proj"])
    told = at.merge(base, tmp_path / "a", out, skip_modules=["q_proj"], check_base="off", dry_run=True)
    said = at.merge(base, [tmp_path / "a", tmp_path / "d"], out, skip_modules=["lm_head"], dry_run=True)
    assert any("13 linear weights" in note for note in told.notes)
    assert any("14 linear weights" in note for note in said.notes)
