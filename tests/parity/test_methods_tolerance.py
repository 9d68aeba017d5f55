"""Methods besides LoRA's kin: adapted and perturbed with PEFT, merged by both, weights and outputs compared.

Weights agree to 1e-6 of the largest of their tensor for all of them, outputs to 1e-5.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from torch import nn

import adapterhub_tools as at
from adapterhub_tools import registry
from adapterhub_tools.errors import IntegrityError, MismatchError, UnsupportedError
from tests.parity import models
from tests.parity.oracle import Case, adapt, check_parity, ours, refused, stored

LINEAR = ["q_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
BIASED = ["q_proj", "fc1"]
VISION = ["projection"]


class PointConvolutions(nn.Module):
    """Two convolutions, of which one has a 1×1 kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, pixels: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.head(self.point(self.wide(pixels).tanh()).tanh().mean((2, 3)))


PointConvolutions.__name__ = "Convolutions"


def points() -> nn.Module:
    model = PointConvolutions()
    models.randomise(model, seed=7)
    return model.eval()


def case(config: str, build: Any = models.llama, targets: list[str] | None = None, **fields: Any) -> Case:
    fields.setdefault("target_modules", targets or LINEAR)
    return Case(build=build, config=lambda: getattr(peft, config)(**fields))


CASES = {
    "OFT": case("OFTConfig", oft_block_size=8),
    "OFT, Cayley's transform, by blocks": case("OFTConfig", r=4, oft_block_size=0, use_cayley_neumann=False),
    "OFT, one block": case("OFTConfig", r=1, oft_block_size=0, use_cayley_neumann=False),
    "OFT, constrained": case("OFTConfig", oft_block_size=8, coft=True, eps=0.3),
    "OFT, shared block, seven terms": case(
        "OFTConfig", oft_block_size=8, block_share=True, num_cayley_neumann_terms=7
    ),
    "OFT, three terms": case("OFTConfig", oft_block_size=8, num_cayley_neumann_terms=3),
    "OFT, embedding": case("OFTConfig", targets=["embed_tokens"], oft_block_size=8),
    "OFT, convolution 1×1": case("OFTConfig", points, ["point"], oft_block_size=4),
    "OFT, biases too": case("OFTConfig", models.opt, BIASED, oft_block_size=8, bias="all"),
    "BOFT": case("BOFTConfig", boft_block_size=8),
    "BOFT, by number": case("BOFTConfig", boft_block_num=4, boft_block_size=0),
    "BOFT, convolution": case("BOFTConfig", models.vit, VISION, boft_block_size=8),
    "VeRA": case("VeraConfig", r=4),
    "VeRA, made again": case("VeraConfig", r=4, save_projection=False, projection_prng_key=77),
    "VeRA, Conv1D, made again": case("VeraConfig", models.gpt2, CONV1D, r=4, save_projection=False),
    "PVeRA": case("PveraConfig", r=4),
    "PVeRA, made again": case("PveraConfig", r=4, save_projection=False),
    "PVeRA, Conv1D": case("PveraConfig", models.gpt2, CONV1D, r=4),
    "HRA": case("HRAConfig", r=4, init_weights=False),
    "HRA, orthogonalised": case("HRAConfig", r=4, apply_GS=True, init_weights=False),
    "HRA, convolution": case("HRAConfig", models.vit, VISION, r=3, init_weights=False),
    "MiSS": case("MissConfig", r=8),
    "MiSS, rank that does not divide": case("MissConfig", r=5),
    "MiSS, bat": case("MissConfig", r=8, init_weights="bat"),
    "MiSS, mini": case("MissConfig", r=8, mini_r=4, init_weights="mini"),
    "FourierFT": case("FourierFTConfig", n_frequency=50, scaling=150.0),
    "FourierFT, Conv1D, pattern": case(
        "FourierFTConfig", models.gpt2, CONV1D, n_frequency=50, n_frequency_pattern={"c_attn": 30}
    ),
    "C3A": case("C3AConfig", block_size=8),
    "C3A, pattern": case("C3AConfig", block_size=8, block_size_pattern={"q_proj": 16}),
    "RandLoRA": case("RandLoraConfig", targets=[*LINEAR, "up_proj"], r=5, randlora_alpha=5),
    "RandLoRA, sparse": case("RandLoraConfig", r=4, randlora_alpha=1, sparse=True),
    "RandLoRA, very sparse": case("RandLoraConfig", r=4, randlora_alpha=1, very_sparse=True),
    "RandLoRA, Conv1D": case("RandLoraConfig", models.gpt2, CONV1D, r=4, randlora_alpha=1),
    "SHiRA": case("ShiraConfig", r=2),
    "LN-tuning, no bias": case("LNTuningConfig", targets=["input_layernorm", "norm"]),
    "LN-tuning": case("LNTuningConfig", models.bert_classifier, ["LayerNorm"]),
    "RoAd 1": case("RoadConfig", variant="road_1", group_size=4),
    "RoAd 2, biases": case("RoadConfig", models.opt, BIASED, variant="road_2", group_size=8),
    "RoAd 4, biases": case("RoadConfig", models.opt, BIASED, variant="road_4", group_size=16),
    "DeLoRA": case("DeloraConfig", r=4, init_weights=False),
    "DeLoRA, patterns": case(
        "DeloraConfig",
        r=4,
        rank_pattern={"q_proj": 2},
        lambda_pattern={"q_proj": 5.0},
        init_weights=False,
    ),
    "GraLoRA": case("GraloraConfig", r=8, gralora_k=2),
    "GraLoRA, Conv1D, hybrid": case("GraloraConfig", models.gpt2, CONV1D, r=8, gralora_k=4, hybrid_r=3),
    "VB-LoRA": case("VBLoRAConfig", r=4, num_vectors=20, vector_length=8, topk=2),
    "VB-LoRA, largest only": case(
        "VBLoRAConfig", r=4, num_vectors=20, vector_length=8, topk=3, save_only_topk_weights=True
    ),
    "VB-LoRA, Conv1D": case("VBLoRAConfig", models.gpt2, CONV1D, r=4, num_vectors=300, vector_length=8),
    "Uni-LoRA": case("UniLoraConfig", r=4, theta_d_length=64, save_indices=True),
    "Uni-LoRA, Conv1D": case("UniLoraConfig", models.gpt2, CONV1D, r=4, theta_d_length=64, save_indices=True),
    "WaveFT": case("WaveFTConfig", n_frequency=200),
    "WaveFT, Conv1D": case("WaveFTConfig", models.gpt2, CONV1D, n_frequency=60),
    "WaveFT, no transform": case("WaveFTConfig", n_frequency=60, use_idwt=False),
    "WaveFT, proportional": case("WaveFTConfig", n_frequency=60, proportional_parameters=True),
    "BEFT": case("BeftConfig", models.opt, BIASED),
    "Super-Tuning": case("SupertuningConfig", sparsity=0.9),
    "Super-Tuning, with a product": case("SupertuningConfig", sparsity=0.9, r=3, lora_alpha=5),
    "DEFT": case("DeftConfig", r=4, init_weights=False),
    "DEFT, relu, Conv1D": case(
        "DeftConfig", models.gpt2, CONV1D, r=4, init_weights=False, decomposition_method="relu", alpha=8
    ),
    "DEFT, only removes": case("DeftConfig", r=4, para=True),
}


@pytest.mark.parametrize("name", CASES)
def test_a_merge_is_the_adapted_model(name, tmp_path):
    report, _ = check_parity(CASES[name], tmp_path)
    assert report.receipt is not None
    (adapter,) = report.receipt.adapters
    assert adapter.guarantee == registry.load("methods", adapter.method).IMPLEMENTATION.guarantee


def test_every_method_here_is_tested():
    tested = {c.config().peft_type.value.lower() for c in CASES.values()}
    elsewhere = {"lora", "lora_merged_linear", "dora", "ia3", "adalora", "loha", "lokr", "hira"}
    assert set(registry.names("methods")) - elsewhere == tested


class BlockDiagonal:
    """What PEFT's CUDA extension does, on the processor."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*torch.unbind(one)) for one in blocks])


@pytest.mark.parametrize(
    ("factors", "build", "targets"), [(2, models.llama, LINEAR), (3, models.vit, VISION)]
)
def test_boft_with_butterflies(factors, build, targets, tmp_path, monkeypatch):
    """Without a GPU PEFT makes one factor whatever the config says; its extension is replaced here."""
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft_layer, "FastBlockDiag", BlockDiagonal)
    check_parity(
        case("BOFTConfig", build, targets, boft_block_size=4, boft_n_butterfly_factor=factors), tmp_path
    )


NARROW = ("OFT", "BOFT", "HRA", "RoAd 1", "FourierFT", "C3A", "MiSS", "MiSS, bat", "DEFT", "LN-tuning")


@pytest.mark.parametrize("name", NARROW)
def test_narrow_outputs_are_the_wide_result_rounded_once(name, tmp_path):
    adapted = adapt(CASES[name], tmp_path)
    folders = {}
    for dtype in ("float64", "bfloat16", "float16"):
        ours(adapted.base, adapted.adapter, tmp_path / dtype, dtype=dtype)
        folders[dtype] = stored(tmp_path / dtype)
    for dtype in ("bfloat16", "float16"):
        for key, value in folders[dtype].items():
            wide = folders["float64"][key]
            assert value.dtype == getattr(torch, dtype)
            unit = torch.nextafter(value.abs(), torch.tensor(torch.inf, dtype=value.dtype)) - value.abs()
            assert bool(((wide - value.double()).abs() <= unit.double() * (0.5 + 1e-9)).all()), key


@pytest.mark.parametrize("name", ["OFT", "RoAd 2, biases", "MiSS", "FourierFT", "DEFT", "MiSS, bat"])
def test_a_scale_multiplies_the_change(name, tmp_path):
    adapted = adapt(CASES[name], tmp_path)
    whole, half = tmp_path / "whole", tmp_path / "half"
    ours(adapted.base, adapted.adapter, whole, dtype="float64")
    ours(adapted.base, adapted.adapter, half, scale=0.5, dtype="float64")
    base = stored(adapted.base)
    full, part = stored(whole), stored(half)
    for key, start in base.items():
        assert torch.allclose(part[key], (start + full[key]) / 2, rtol=1e-12, atol=1e-14), key


def test_sums_of_additive_methods(tmp_path):
    first = adapt(CASES["FourierFT"], tmp_path, "first")
    second = adapt(CASES["C3A"], tmp_path, "second")
    ours(first.base, [first.adapter, second.adapter], tmp_path / "out")
    found = stored(tmp_path / "out")
    merged = [model.model.merge_and_unload().state_dict() for model in (first, second)]
    for key, start in stored(first.base).items():
        expected = merged[0][key].double() + merged[1][key].double() - start.double()
        assert (found[key].double() - expected).abs().max() <= 1e-6 * expected.abs().max(), key


def test_what_is_not_additive_is_not_summed(tmp_path):
    first = adapt(CASES["OFT"], tmp_path, "first")
    second = adapt(CASES["C3A"], tmp_path, "second")
    with pytest.raises(UnsupportedError, match="order would decide"):
        ours(first.base, [first.adapter, second.adapter], tmp_path / "out")


def change_config(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for name, value in fields.items():
        config.pop(name, None)
        if value is not None:
            config[name] = value
    path.write_text(json.dumps(config))


REFUSED = {
    "RandLoRA without its bases": (
        case("RandLoraConfig", r=4, save_projection=False),
        {},
        "not-reproducible",
        UnsupportedError,
    ),
    "Uni-LoRA without its places": (
        case("UniLoraConfig", r=4, theta_d_length=64),
        {},
        "not-reproducible",
        UnsupportedError,
    ),
    "PVeRA that draws noise": (
        case("PveraConfig", r=4, sample_at_inference=True),
        {},
        "unmergeable",
        UnsupportedError,
    ),
    "OFT before 0.14": (CASES["OFT"], {"oft_block_size": None}, "old-form", UnsupportedError),
    "OFT before the series": (CASES["OFT"], {"use_cayley_neumann": None}, "old-form", UnsupportedError),
    "OFT series before 0.18": (CASES["OFT"], {"peft_version": "0.17.1"}, "old-form", UnsupportedError),
    "OFT on a wide kernel": (
        case("OFTConfig", points, ["wide"], oft_block_size=9),
        {},
        "not-representable",
        MismatchError,
    ),
    "MiSS variant": (CASES["MiSS"], {"init_weights": "novel"}, "option", UnsupportedError),
    "RoAd variant": (CASES["RoAd 1"], {"variant": "road_8"}, "option", UnsupportedError),
    "DEFT decomposition": (CASES["DEFT"], {"decomposition_method": "svd"}, "option", UnsupportedError),
    "another wavelet": (CASES["WaveFT"], {"wavelet_family": "db4"}, "option", UnsupportedError),
    "a seed that is none": (CASES["FourierFT"], {"random_loc_seed": "x"}, "seed", UnsupportedError),
    "another rank": (CASES["VeRA"], {"r": 5}, "shape", MismatchError),
    "another group": (CASES["RoAd 1"], {"group_size": 5}, "shape", MismatchError),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_reason_and_remedy(name, tmp_path):
    made, changes, kind, error = REFUSED[name]
    adapted = adapt(made, tmp_path)
    change_config(adapted.adapter, **changes)
    refused(error, kind, adapted.base, adapted.adapter, tmp_path / "out")


RANDOM = ("VeRA, made again", "PVeRA, made again", "FourierFT", "WaveFT")


@pytest.mark.parametrize("name", RANDOM)
def test_random_tensors_are_recorded_and_compared(name, tmp_path):
    adapted = adapt(CASES[name], tmp_path)
    at.init(adapted.adapter, base=adapted.base)
    manifest = json.loads((adapted.adapter / "adapter_manifest.json").read_text())
    digest = manifest["base"]["random_digest"]
    report = ours(adapted.base, adapted.adapter, tmp_path / "out")
    assert any(digest in note for note in report.notes)
    assert at.validate(adapted.adapter, base=adapted.base).ok

    manifest["base"]["random_digest"] = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    (adapted.adapter / "adapter_manifest.json").write_text(json.dumps(manifest))
    refused(IntegrityError, "random-tensors", adapted.base, adapted.adapter, tmp_path / "other")
    kinds = {problem.kind for problem in at.validate(adapted.adapter, base=adapted.base).problems}
    assert "random-tensors" in kinds


@pytest.mark.parametrize("name", ["VeRA", "RandLoRA", "SHiRA", "C3A"])
def test_nothing_random_is_recorded_where_all_is_stored(name, tmp_path):
    adapted = adapt(CASES[name], tmp_path)
    at.init(adapted.adapter, base=adapted.base)
    manifest = json.loads((adapted.adapter / "adapter_manifest.json").read_text())
    assert "random_digest" not in manifest["base"]
    assert at.validate(adapted.adapter, base=adapted.base).ok
