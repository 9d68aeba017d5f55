"""Outputs of base and adapter by PEFT, and of the merged model, side by side."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import logging

import adapterhub_tools as at
from adapterhub_tools.cli.main import cli
from adapterhub_tools.errors import FormatError, UnsupportedError
from adapterhub_tools.ops import verify_logits
from adapterhub_tools.ops.verify_logits import TOLERANCE
from tests.parity.models import llama_config, perturb_trainable, randomise

TARGETS = ["q_proj", "v_proj", "down_proj"]


def make(
    folder: Path, dtype: torch.dtype, config: PeftConfig | None = None, seed: int = 2
) -> tuple[Path, Path]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config())
    randomise(model, 1)
    model.to(dtype).save_pretrained(folder / "base")
    tuned = get_peft_model(model, config or LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    perturb_trainable(tuned, seed, 0.05)
    tuned.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_right_merge_gives_the_same_outputs(tmp_path: Path, dtype: torch.dtype) -> None:
    base, adapter = make(tmp_path, dtype)
    at.merge(base, adapter, tmp_path / "merged")
    report = at.verify(base=base, adapter=adapter, merged=tmp_path / "merged", logits=True, seed=3)
    assert report.ok, report.problems
    found = report.logits
    assert found is not None
    assert found.ok
    assert found.rms_relative <= found.tolerance / 4
    assert found.base_relative > found.tolerance
    assert found.top1_agreement > 0.9
    assert (found.sequences, found.tokens) == (4, 128)
    assert report.to_json()["logits"]["ok"] is True
    assert "outputs differ by" in report.summary


def test_the_differences_are_those_of_the_models(tmp_path: Path) -> None:
    """The figures against the same computed by hand with transformers and PEFT."""
    base, adapter = make(tmp_path, torch.bfloat16)
    at.merge(base, adapter, tmp_path / "merged")
    ids = [[1, 5, 9, 2], [7, 7, 3]]
    report = at.verify(base=base, adapter=adapter, merged=tmp_path / "merged", logits=True, input_ids=ids)
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        right, own = (
            torch.cat([model(torch.tensor([row])).logits[0] for row in ids]) for model in (tuned, merged)
        )
    found = report.logits
    assert found is not None
    assert found.largest_absolute == pytest.approx(float((own - right).abs().max()), rel=1e-3)
    assert found.rms_relative == pytest.approx(float((own - right).norm() / right.norm()), rel=1e-3)
    assert (found.sequences, found.tokens) == (2, 7)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]),
    ],
    ids=["dora", "ia3", "saved head"],
)
def test_other_adapters(tmp_path: Path, config: PeftConfig) -> None:
    base, adapter = make(tmp_path, torch.float32, config)
    at.merge(base, adapter, tmp_path / "merged")
    report = at.verify(base=base, adapter=adapter, merged=tmp_path / "merged", logits=True)
    assert report.ok, report.problems


def test_faults_are_seen(tmp_path: Path) -> None:
    """Weights of another merge; and weights that are right under a config that is another's."""
    base, adapter = make(tmp_path, torch.float32)
    at.merge(base, adapter, tmp_path / "merged", scale=1.5)
    (tmp_path / "merged" / "merge_receipt.json").unlink()
    report = at.verify(base=base, adapter=adapter, merged=tmp_path / "merged", logits=True)
    assert "logits" in [problem.kind for problem in report.problems]
    at.merge(base, adapter, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    report = at.verify(base=base, adapter=adapter, merged=tmp_path / "other", logits=True)
    assert [problem.kind for problem in report.problems] == ["config", "logits"]
    assert report.exit_code == 1


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, torch.float32)
    at.merge(base, adapter, tmp_path / "merged")
    path = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    report = at.verify(base=base, adapter=adapter, merged=tmp_path / "merged", logits=True)
    assert report.logits is not None
    assert report.logits.largest_absolute == float("inf")
    assert not report.logits.ok


def test_scales_and_several_adapters(tmp_path: Path) -> None:
    base, first = make(tmp_path, torch.float32)
    _, second = make(tmp_path / "two", torch.float32, seed=9)
    at.merge(base, [first, second], tmp_path / "merged", scale=[0.5, -1.25])
    report = at.verify(base=base, adapter=[first, second], merged=tmp_path / "merged", logits=True)
    assert report.scales == (0.5, -1.25)
    assert report.ok, report.problems


def test_a_scale_of_what_peft_does_not_scale(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    base, adapter = make(tmp_path, torch.float32, config)
    at.merge(base, adapter, tmp_path / "merged", scale=0.5)
    with pytest.raises(UnsupportedError, match="plain LoRA only"):
        at.verify(base=base, adapter=adapter, merged=tmp_path / "merged", logits=True)


def test_an_adapter_that_changes_nothing_is_told(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, torch.bfloat16)
    path = adapter / "adapter_model.safetensors"
    save_file({k: v * (1e-4 if "lora_B" in k else 1) for k, v in load_file(path).items()}, path)
    at.merge(base, adapter, tmp_path / "merged")
    report = at.verify(base=base, adapter=adapter, merged=tmp_path / "merged", logits=True)
    assert any("could not tell whether the adapter is applied" in note for note in report.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"auto_map": {"AutoModel": "code.Model"}}, "code of its own"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantised"),
        ({"model_type": "nothing-of-this-name", "architectures": None}, "transformers cannot load it"),
    ],
)
def test_models_that_cannot_be_run(tmp_path: Path, change: dict[str, object], words: str) -> None:
    base, adapter = make(tmp_path, torch.float32)
    at.merge(base, adapter, tmp_path / "merged")
    path = tmp_path / "merged" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    run = CliRunner().invoke(cli, ["verify", str(base), str(adapter), str(tmp_path / "merged"), "--logits"])
    assert run.exit_code == 10
    assert words in run.output


def test_token_ids(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, torch.float32)
    at.merge(base, adapter, tmp_path / "merged")
    given = {"base": base, "adapter": adapter, "merged": tmp_path / "merged", "logits": True}
    for ids in ([[1, 2], []], [[-1]], [[10**6]]):
        with pytest.raises(FormatError, match="vocabulary"):
            at.verify(**given, input_ids=ids)
    paths = [str(base), str(adapter), str(tmp_path / "merged")]
    run = CliRunner().invoke(cli, ["verify", *paths, "--logits", "--input-ids", "1,2,3", "--json"])
    assert run.exit_code == 0
    assert json.loads(run.stdout)["logits"]["tokens"] == 3
    for wrong in (
        ["--input-ids", "1,2"],
        ["--logits", "--input-ids", "1,x"],
        ["--logits", "--input-ids", ""],
    ):
        assert CliRunner().invoke(cli, ["verify", *paths, *wrong]).exit_code == 2
    assert CliRunner().invoke(cli, ["verify", paths[2], "--receipt", "--logits"]).exit_code == 2


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_logits, "find_spec", lambda name: None if name == "peft" else object())
    run = CliRunner().invoke(cli, ["verify", str(tmp_path), "adapter", "merged", "--logits"])
    assert run.exit_code == 10
    assert "adaptertool[verify]" in run.output
    assert "peft" in run.output


def test_the_displays_of_transformers_are_as_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, adapter = make(tmp_path, torch.float32)
    at.merge(base, adapter, tmp_path / "merged")
    capfd.readouterr()
    before = logging.is_progress_bar_enabled()
    at.verify(base=base, adapter=adapter, merged=tmp_path / "merged", logits=True)
    assert logging.is_progress_bar_enabled() == before
    assert "Loading weights" not in capfd.readouterr().err


def test_every_dtype_has_a_tolerance() -> None:
    assert set(TOLERANCE) == {"F64", "F32", "F16", "BF16"}
