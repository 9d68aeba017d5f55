"""GPT-2 stored quantised: its Conv1D weights lie there as (out, in), in a plain checkpoint as (in, out)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GPT2Config

import adapterhub_tools as at
from tests.parity.oracle import assert_close, refused
from tests.parity.quantised_bases import SCHEMES, adapted, load, logits


def scene(folder: Path, scheme: str, *, dora: bool = False, width: int = 64) -> Any:
    """Makes ``plain``, ``stored`` and ``adapter``, trained on the stored base; returns PEFT's model.

    Where 64 does not divide the width, a kernel of bitsandbytes takes scales of other blocks.
    """
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": width, "n_layer": 2, "n_head": 2, "n_inner": 2 * width}
    config = GPT2Config(**sizes, vocab_size=96, n_positions=96, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "plain")
    load(folder / "plain", SCHEMES[scheme]).save_pretrained(folder / "stored")
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_fc", "c_proj"], use_dora=dora)
    return adapted(load(folder / "stored"), lora, folder / "adapter")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("scheme", ["nf4,double", "fp4"])
def test_the_merged_model_has_the_logits_of_the_unmerged_one(
    tmp_path: Path, scheme: str, *, dora: bool
) -> None:
    expected = logits(scene(tmp_path, scheme, dora=dora))
    at.init(tmp_path / "adapter", base=tmp_path / "stored")
    assert at.validate(tmp_path / "adapter", base=tmp_path / "stored").ok
    report = at.merge(tmp_path / "stored", tmp_path / "adapter", tmp_path / "out")
    assert report.changed == report.expected == 8
    assert_close(logits(load(tmp_path / "out")), expected, "logits", 1e-5)


@pytest.mark.parametrize("scheme", ["nf4", "nf4,double", "int8"])
def test_it_is_the_merge_onto_the_base_that_it_was_made_from(tmp_path: Path, scheme: str) -> None:
    scene(tmp_path, scheme, width=40)
    one = at.merge(tmp_path / "stored", tmp_path / "adapter", tmp_path / "one", threads=2)
    two = at.merge(
        tmp_path / "plain", tmp_path / "adapter", tmp_path / "two", quant=scheme, compute_dtype="fp32"
    )
    assert one.digest == two.digest


def test_quantising_it_again_is_refused(tmp_path: Path) -> None:
    scene(tmp_path, "nf4")
    out = tmp_path / "out"
    problem = refused(
        at.UnsupportedError,
        "quantised-conv1d",
        tmp_path / "stored",
        tmp_path / "adapter",
        out,
        onto="quantized",
    )
    assert "dequantized" in problem.remedy
