"""Taking back what adapters of quantised bases added: from the merged weights as they are, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

import adapterhub_tools as at
from tests.parity.quantised_bases import NF4_DOUBLE, adapted, load, save_plain

SCHEME = {"scheme": "bitsandbytes-nf4", "double": True, "compute_dtype": "BF16"}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``plain``; ``stored`` quantised; ``adapter``, whose manifest declares it; ``silent``, without one."""
    folder = tmp_path_factory.mktemp("scene")
    save_plain(folder / "plain", torch.bfloat16)
    model = load(folder / "plain", NF4_DOUBLE, torch.bfloat16)
    model.save_pretrained(folder / "stored")
    adapted(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), folder / "adapter")
    adapted(load(folder / "plain"), LoraConfig(r=2, target_modules=["q_proj"]), folder / "silent")
    at.init(folder / "adapter", base=folder / "plain", licence="mit", quantisation=SCHEME)
    return folder


def _largest(left: Path, right: Path) -> float:
    """The largest difference of two models, in units of the largest weight of each tensor."""
    old, new = load_file(left / "model.safetensors"), load_file(right / "model.safetensors")
    return max(float((old[n] - new[n]).abs().max() / old[n].abs().max()) for n in old)


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_close_to_what_was_merged_onto_whatever_the_manifest_declares(
    scene: Path, tmp_path: Path, onto: str
) -> None:
    merged, near, wanted = tmp_path / "merged", tmp_path / "near", scene / "plain"
    at.merge(scene / "plain", scene / "adapter", merged, onto=onto)
    at.unmerge(merged, near, adapter=scene / "adapter", approximate=True)
    if onto == "dequantized":
        wanted = tmp_path / "wanted"
        at.merge(scene / "plain", scene / "adapter", wanted, scale=0.0)
    assert 0 < _largest(wanted, near) < 2**-6


def test_a_base_that_was_quantised_again_cannot_be_approached(scene: Path, tmp_path: Path) -> None:
    merged, near = tmp_path / "merged", tmp_path / "near"
    at.merge(scene / "stored", scene / "silent", merged, onto="quantized", allow_loss=True)
    with pytest.raises(at.UnsupportedError) as raised:
        at.unmerge(merged, near, adapter=scene / "silent", approximate=True)
    assert raised.value.problems[0].kind == "undo-quantised"
    with pytest.raises(at.FormatError) as missing:
        at.unmerge(merged, near, adapter=scene / "silent")
    assert missing.value.problems[0].remedy == "Use the base itself."
    assert not near.exists()


def test_an_adapter_that_declares_nothing_beside_one_that_does_is_named(scene: Path, tmp_path: Path) -> None:
    report = at.merge(scene / "plain", [scene / "adapter", scene / "silent"], tmp_path / "merged")
    (note,) = [note for note in report.notes if "declares no quantisation" in note]
    assert note.startswith("silent ")
    assert not any(
        "declares no" in n for n in at.merge(scene / "plain", scene / "adapter", None, dry_run=True).notes
    )
