"""combine against PEFT: sums of PEFT's own deltas, loaded by PEFT; and PEFT's add_weighted_adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoHaConfig, LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import adapterhub_tools as at
from adapterhub_tools.cli.main import cli
from tests.parity import models
from tests.parity.low_rank import deltas, fresh, loaded, saved

WEIGHTS = (0.7, -0.4)


def lora(targets: list[str], **fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **fields})


def bfloat16(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: build().to(torch.bfloat16)


Case = tuple[Callable[[], nn.Module], PeftConfig, PeftConfig]
PLAIN: dict[str, Case] = {
    "ranks and scales": (
        models.llama,
        lora(["q_proj", "down_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}),
        lora(["q_proj", "v_proj"], r=8, use_rslora=True),
    ),
    "embedding": (models.llama, lora(["embed_tokens", "q_proj"]), lora(["embed_tokens"], r=2)),
    "conv1d": (
        models.gpt2,
        lora(["c_attn", "c_proj"], fan_in_fan_out=True),
        lora(["c_attn"], r=3, fan_in_fan_out=True),
    ),
    "convolutions": (models.convolutions, lora(["along", "wide", "point"]), lora(["wide", "point"], r=2)),
    "bfloat16": (bfloat16(models.llama), lora(["q_proj"]), lora(["q_proj"], r=8, lora_alpha=3)),
}
EFFECTS: dict[str, Case] = {
    "dora and lora": (models.llama, lora(["q_proj", "v_proj"], use_dora=True), lora(["q_proj"])),
    "two doras": (models.gpt2, *(lora(["c_attn"], r=r, use_dora=True, fan_in_fan_out=True) for r in (2, 4))),
    "loha and lora": (
        models.llama,
        LoHaConfig(r=2, alpha=4, target_modules=["q_proj"]),
        lora(["q_proj", "k_proj"], use_rslora=True),
    ),
}


def pair(case: Case, folder: Path) -> list[Path]:
    build, *configs = case
    for place, config in enumerate(configs):
        saved(fresh(build), config, folder / f"a{place}", seed=3 + place)
    return [folder / "a0", folder / "a1"]


def weighted(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    paths = {path for part in parts for path in part}
    return {
        path: sum(w * part[path] for w, part in zip(WEIGHTS, parts, strict=True) if path in part)  # type: ignore[misc]
        for path in paths
    }


def assert_deltas(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for path, delta in expected.items():
        assert float((found[path] - delta).norm()) <= bound * float(delta.norm()), path


@pytest.mark.parametrize("method", ["linear", "cat"])
@pytest.mark.parametrize("name", PLAIN)
def test_the_sum_of_deltas_loads_in_peft(name: str, method: str, tmp_path: Path) -> None:
    build = PLAIN[name][0]
    folders = pair(PLAIN[name], tmp_path)
    expected = weighted([deltas(loaded(fresh(build), folder)) for folder in folders])
    report = at.combine_adapters(folders, out=tmp_path / "o", weights=WEIGHTS, method=method, dtype="float32")
    assert_deltas(deltas(loaded(fresh(build), tmp_path / "o")), expected, 1e-6)
    assert report.totals.error < 1e-7
    assert not at.validate(tmp_path / "o").problems


@pytest.mark.parametrize("name", EFFECTS)
def test_other_methods_count_by_what_they_do_to_the_base(name: str, tmp_path: Path) -> None:
    """PEFT merges each into the base; what that changes, in float64, is what is combined."""
    build = EFFECTS[name][0]
    base = models.save_base(fresh(build), tmp_path / "base")
    folders = pair(EFFECTS[name], tmp_path)
    before = dict(fresh(build).double().named_parameters())
    parts = []
    for folder in folders:
        adapted: Any = PeftModel.from_pretrained(fresh(build).double(), folder)
        merged = adapted.double().merge_and_unload().named_parameters()
        changed = {n: (p - before[n]).detach() for n, p in merged if not torch.equal(p, before[n])}
        parts.append({n.removesuffix(".weight"): d for n, d in changed.items()})
    options: dict[str, Any] = {"weights": WEIGHTS, "base": base}
    with pytest.raises(at.MismatchError, match="policy"):
        at.combine_adapters(folders, out=tmp_path / "none", **options)
    report = at.combine_adapters(folders, out=tmp_path / "o", rank=32, dtype="float64", **options)
    assert report.totals.error < 1e-12
    model = fresh(build)
    assert_deltas(deltas(loaded(model, tmp_path / "o")), weighted(parts), 2e-6)
    cut = at.combine_adapters(folders, out=tmp_path / "cut", method="svd", dtype="float64", **options)
    for module in cut.modules:
        values = torch.linalg.svdvals(weighted(parts)[module.path])
        best = float(values[module.rank :].norm() / values.norm())
        assert best - 1e-6 <= module.error <= 1.01 * best + 1e-6


FULL: dict[str, tuple[Callable[[], nn.Module], LoraConfig]] = {
    "modules": (models.llama, lora(["q_proj"], modules_to_save=["lm_head", "norm"])),
    "biases": (models.opt, lora(["q_proj", "fc1"], bias="lora_only")),
    "all biases": (models.opt, lora(["q_proj"], bias="all", lora_bias=True)),
    "tokens": (models.llama, lora(["q_proj"], trainable_token_indices={"embed_tokens": [3, 5, 8]})),
}


@pytest.mark.parametrize("feature", FULL)
@pytest.mark.parametrize("weights", [(0.25, 0.75), WEIGHTS])
def test_a_merge_of_the_sum_is_the_sum_of_merges(
    feature: str, weights: tuple[float, float], tmp_path: Path
) -> None:
    """W + Σ w·(W_i − W) for every tensor of the model: factors, biases, whole modules and token rows."""
    build, config = FULL[feature]
    base = models.save_base(fresh(build), tmp_path / "base")
    folders = pair((build, config, config), tmp_path)
    at.combine_adapters(folders, out=tmp_path / "o", weights=weights, base=base)
    merged = []
    for folder in (*folders, tmp_path / "o"):
        at.merge(base, folder, tmp_path / f"m-{folder.name}", dtype="float64")
        merged.append(load_file(tmp_path / f"m-{folder.name}" / "model.safetensors"))
    for name, w in load_file(base / "model.safetensors").items():
        expected = w.double() + sum(c * (m[name] - w) for c, m in zip(weights, merged[:2], strict=True))
        assert float((merged[2][name] - expected).abs().max()) < 1e-6, name
    loaded(fresh(build), tmp_path / "o")


def test_token_rows_of_different_tokens(tmp_path: Path) -> None:
    base = models.save_base(fresh(models.llama), tmp_path / "base")
    configs = [
        lora(["q_proj"], trainable_token_indices={"embed_tokens": rows}) for rows in ([3, 5], [5, 9, 2])
    ]
    folders = pair((models.llama, *configs), tmp_path)
    at.combine_adapters(folders, out=tmp_path / "o", weights=WEIGHTS, base=base)
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [2, 3, 5, 9]}
    w = load_file(base / "model.safetensors")["model.embed_tokens.weight"].double()
    parts = [load_file(f / "adapter_model.safetensors") for f in (*folders, tmp_path / "o")]
    rows = [next(t for n, t in part.items() if "trainable_tokens" in n).double() for part in parts]
    expected = torch.stack(
        [
            w[2] - 0.4 * (rows[1][2] - w[2]),
            w[3] + 0.7 * (rows[0][0] - w[3]),
            w[5] + 0.7 * (rows[0][1] - w[5]) - 0.4 * (rows[1][0] - w[5]),
            w[9] - 0.4 * (rows[1][1] - w[9]),
        ]
    )
    assert float((rows[2] - expected).abs().max()) < 1e-6


TYPES = (
    *("svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd"),
    *("dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"),
)
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], dict[str, Any]]] = {
    "llama": (models.llama, ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], {}),
    "gpt2": (models.gpt2, ["c_attn", "c_proj", "c_fc", "wte"], {"fan_in_fan_out": True}),
    "opt": (models.opt, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], {}),
    "bert": (models.bert_classifier, ["query", "key", "value", "dense"], {"task_type": None}),
    "rslora": (models.llama, ["q_proj", "v_proj"], {"use_rslora": True}),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_factors_repeat_add_weighted_adapter(name: str, kind: str, tmp_path: Path) -> None:
    """To 1e-6, the random masks of the same seed included; the factors themselves where PEFT has no SVD."""
    build, targets, fields = MODELS[name]
    case = (
        build,
        lora(targets, **fields),
        lora(targets[:3], lora_alpha=9, **{**fields, "use_rslora": False}),
    )
    base = models.save_base(fresh(build), tmp_path / "base")
    folders = pair(case, tmp_path)
    options: dict[str, Any] = {} if kind in ("svd", "linear", "cat") else {"density": 0.6}
    model: Any = PeftModel.from_pretrained(fresh(build), folders[0], adapter_name="a")
    model.load_adapter(folders[1], adapter_name="b")
    torch.manual_seed(7)
    model.add_weighted_adapter(["a", "b"], list(WEIGHTS), "c", combination_type=kind, **options)
    model.save_pretrained(tmp_path / "peft", selected_adapters=["c"])
    report = at.combine_adapters(
        folders,
        out=tmp_path / "o",
        weights=WEIGHTS,
        method=kind,
        space="factors",
        seed=7,
        base=base,
        **options,
    )
    theirs = load_file(tmp_path / "peft" / "c" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "o" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    pairs = [(n, n.replace("_A", "_B")) for n in theirs if "_A" in n]
    for a, b in pairs:
        expected = theirs[b].double().flatten(1) @ theirs[a].double().flatten(1)
        found = ours[b].double().flatten(1) @ ours[a].double().flatten(1)
        assert float((found - expected).norm()) <= 1e-6 * float(expected.norm()), a
        if not kind.endswith("svd"):
            assert torch.equal(ours[a], theirs[a])
            assert torch.equal(ours[b], theirs[b])
    configs = [
        json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "peft" / "c", tmp_path / "o")
    ]
    assert all(configs[0][key] == configs[1][key] for key in ("r", "lora_alpha", "use_rslora", "peft_type"))
    assert any("too strong" in note for note in report.notes) is (name == "rslora")
    assert any("masks" in note for note in report.notes) is kind.startswith("dare")


def test_rslora_by_factors_is_too_strong_and_by_deltas_is_right(tmp_path: Path) -> None:
    """The number that docs/combine.md gives: √r, here √8 for a concatenation of two adapters of rank 4."""
    folders = pair((models.llama, *(lora(["q_proj"], use_rslora=True) for _ in range(2))), tmp_path)
    expected = weighted([deltas(loaded(fresh(models.llama), folder)) for folder in folders])
    for space, ratio in (("factors", 8**0.5), ("deltas", 1.0)):
        at.combine_adapters(folders, out=tmp_path / space, weights=WEIGHTS, method="cat", space=space)
        found = deltas(loaded(fresh(models.llama), tmp_path / space))
        assert_deltas(found, {path: ratio * delta for path, delta in expected.items()}, 1e-6)


def test_the_command_reports_what_it_did(tmp_path: Path) -> None:
    folders = pair(PLAIN["ranks and scales"], tmp_path)
    words = ["combine", *map(str, folders), "--weights", "-1,0.5", "--out", str(tmp_path / "o")]
    table = CliRunner().invoke(cli, [*words, "--dry-run"])
    assert table.exit_code == 0, table.output
    assert "dry run: 2 adapters by linear, 6 modules" in table.output
    assert not (tmp_path / "o").exists()
    done = CliRunner().invoke(cli, [*words, "--json", "--rank", "3"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["report"] == "combine-1.0"
    assert [item["weight"] for item in report["inputs"]] == [-1.0, 0.5]
    assert report["digest"] == at.adapter_digest(tmp_path / "o")
    assert all(module["rank"] <= 3 for module in report["modules"])
