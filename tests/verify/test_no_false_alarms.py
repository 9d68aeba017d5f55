"""Correct merges pass, whoever made them: this tool and PEFT, in float32 and bfloat16, at random."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

import adapterhub_tools as at
from tests.parity.models import llama_config, perturb_trainable, randomise
from tests.undo.models import make_adapter, make_base

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRUE_OF_PEFT = {
    "identical",
    "correctly rounded",
    "delta rounded first",
    "factors rounded first",
    "within k ulp",
}


@pytest.mark.parametrize("number", range(10))
def test_fifty_of_ours(number: int) -> None:
    ours(range(5 * number, 5 * number + 5))


@pytest.mark.parametrize("number", range(10))
def test_fifty_of_peft(number: int) -> None:
    of_peft(range(5 * number, 5 * number + 5))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_two_hundred_and_fifty_more_of_ours(number: int) -> None:
    ours(range(1000 + 25 * number, 1025 + 25 * number))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_two_hundred_and_fifty_more_of_peft(number: int) -> None:
    of_peft(range(1000 + 25 * number, 1025 + 25 * number))


def ours(seeds: range) -> None:
    for seed in seeds:
        chooser = random.Random(seed)
        dtype = chooser.choice(["bfloat16", "float16", "float32"])
        hidden = chooser.choice([32, 64, 128, 256])
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            base = make_base(
                folder / "base", dtype=dtype, hidden=hidden, seed=seed, specials=chooser.random() < 0.3
            )
            adapter = make_adapter(
                folder / "adapter",
                hidden=hidden,
                rank=chooser.choice([1, 4, 16]),
                seed=seed,
                dtype=chooser.choice(["float32", "bfloat16", "float16"]),
                delta=10 ** chooser.uniform(-4, 0.5),
                targets=tuple(chooser.sample(("q_proj", "k_proj", "v_proj"), chooser.randint(1, 3))),
                use_rslora=chooser.random() < 0.3,
            )
            out_dtype = chooser.choice([None, None, "float32", "bfloat16"])
            at.merge(
                base, adapter, folder / "merged", scale=chooser.choice([1.0, 0.5, -1.3]), dtype=out_dtype
            )
            report = at.verify(
                base=base,
                adapter=adapter,
                merged=folder / "merged",
                sample=chooser.choice(["rows", "full"]),
                seed=seed,
                threads=1,
            )
            assert report.ok, (seed, report.summary, [str(problem) for problem in report.problems])
            assert set(report.counts) <= {"identical", "cast", "correctly rounded"}, (seed, report.counts)
            assert at.verify(merged=folder / "merged", receipt=True).ok


def of_peft(seeds: range) -> None:
    verdicts: Counter[str] = Counter()
    for seed in seeds:
        chooser = random.Random(seed)
        dtype = chooser.choice([torch.float32, torch.bfloat16])
        autocast = chooser.random() < 0.5
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            torch.manual_seed(seed)
            model = LlamaForCausalLM(llama_config())
            randomise(model, seed)
            model.to(dtype).save_pretrained(folder / "base")
            rank = chooser.choice([1, 2, 8])
            tuned = get_peft_model(
                model,
                LoraConfig(
                    r=rank,
                    lora_alpha=chooser.choice([1, rank, 2 * rank, 7]),
                    target_modules=chooser.sample(MODULES, chooser.randint(1, 4)),
                    use_rslora=chooser.random() < 0.3,
                ),
            )
            perturb_trainable(tuned, seed, 10 ** chooser.uniform(-2.5, -0.3))
            tuned.save_pretrained(folder / "adapter")
            again = LlamaForCausalLM.from_pretrained(folder / "base", dtype=dtype)
            loaded = PeftModel.from_pretrained(again, folder / "adapter", autocast_adapter_dtype=autocast)
            loaded.merge_and_unload().save_pretrained(folder / "merged")
            report = at.verify(
                base=folder / "base",
                adapter=folder / "adapter",
                merged=folder / "merged",
                sample=chooser.choice(["rows", "full"]),
                seed=seed,
                threads=1,
            )
            assert report.ok, (seed, dtype, report.summary, [str(problem) for problem in report.problems])
            verdicts.update(report.counts)
    print(dict(verdicts))
    assert set(verdicts) <= TRUE_OF_PEFT


def test_one_adapter_merged_twice_in_one_call(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", hidden=64)
    adapter = make_adapter(tmp_path / "adapter", hidden=64)
    at.merge(base, [adapter, adapter], tmp_path / "merged", scale=[0.3, 0.9], undo=True)
    report = at.verify(base=base, adapter=[adapter, adapter], merged=tmp_path / "merged", sample="full")
    assert report.ok, [str(problem) for problem in report.problems]
    undone = at.unmerge(tmp_path / "merged", tmp_path / "undone", adapter=adapter)
    assert undone.digest == at.content_digest(base, cache=False).digest


def test_tied_full_and_grown(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = {name: torch.randn(29, 32, generator=generator) for name in ("model.embed_tokens", "lm_head")}
    for name, base, adapter in (
        ("tied", make_base(tmp_path / "b1", tied=True), make_adapter(tmp_path / "a1", head=True)),
        ("grown", make_base(tmp_path / "b2"), make_adapter(tmp_path / "a2", saved=rows)),
    ):
        at.merge(base, adapter, tmp_path / name)
        report = at.verify(base=base, adapter=adapter, merged=tmp_path / name)
        assert report.ok, (name, [str(problem) for problem in report.problems])
