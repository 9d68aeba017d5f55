"""extract: what PEFT makes of the extracted adapter, against the tuned model and against dense SVDs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterhub_tools as at
from tests.parity import models
from tests.parity.low_rank import close, deltas, fresh, loaded, refused, same_outputs, saved
from tests.parity.models import example_inputs, outputs_of, save_base


def tuned_by(build: Callable[[], nn.Module], folder: Path, change: Callable[[nn.Module], None]) -> Tensor:
    """Saves a base and a changed copy of it; returns the outputs of the copy."""
    save_base(fresh(build), folder / "base")
    model = fresh(build)
    with torch.no_grad():
        change(model)
    save_base(model, folder / "tuned")
    return outputs_of(model)


def add_low_rank(model: nn.Module, *endings: str, rank: int = 4) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith(endings):
            left = torch.randn(parameter.shape[0], rank, generator=generator)
            right = torch.randn(rank, parameter[0].numel(), generator=generator)
            parameter += (left @ right).reshape(parameter.shape) * 0.05


def shift(model: nn.Module, *endings: str) -> None:
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if name.endswith(endings):
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1


Case = tuple[Callable[[], nn.Module], tuple[str, ...], tuple[str, ...]]
CASES: dict[str, Case] = {
    "matrices": (models.llama, ("q_proj.weight", "down_proj.weight"), ()),
    "norms": (models.llama, ("q_proj.weight",), ("layernorm.weight", "model.norm.weight")),
    "one-norm": (models.llama, ("q_proj.weight",), ("model.norm.weight",)),
    "one-layer": (models.llama, ("1.self_attn.q_proj.weight",), ()),
    "embedding": (models.llama, ("q_proj.weight",), ("embed_tokens.weight",)),
    "head": (models.llama, ("q_proj.weight",), ("lm_head.weight",)),
    "tied": (lambda: models.llama(tied=True), ("q_proj.weight",), ("embed_tokens.weight",)),
    "biases": (models.opt, ("q_proj.weight",), ("q_proj.bias", "fc1.bias")),
    "biases-of-targets": (models.opt, ("q_proj.weight",), ("q_proj.bias",)),
    "norm-biases": (models.opt, ("q_proj.weight",), ("final_layer_norm.bias",)),
    "conv1d": (models.gpt2, ("c_attn.weight", "c_proj.weight"), ("ln_1.weight", "c_attn.bias")),
    "classifier": (models.bert_classifier, ("query.weight",), ("LayerNorm.weight", "query.bias")),
    "bare": (models.bare_llama, ("q_proj.weight",), ("norm.weight",)),
    "convolutions": (models.convolutions, ("wide.weight", "deep.weight", "head.weight"), ("wide.bias",)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_adapter_takes_the_base_to_the_tuned_model(case: str, tmp_path: Path) -> None:
    build, low_rank, other = CASES[case]

    def change(model: nn.Module) -> None:
        add_low_rank(model, *low_rank)
        shift(model, *other)

    expected = tuned_by(build, tmp_path, change)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    report = at.extract(base, tuned, tmp_path / "a", rank=4)
    names = [name for name, _ in fresh(build).named_parameters()]
    assert {m.path for m in report.modules} == {
        n.removesuffix(".weight") for n in names if n.endswith(low_rank)
    }
    assert {name for name, _ in report.kept} >= {n for n in names if other and n.endswith(other)}
    assert report.totals.worst[0] < 1e-5
    same_outputs(fresh(build), tmp_path / "a", expected)
    merged = at.merge(base, tmp_path / "a", tmp_path / "merged")
    assert merged.changed > 0
    before, after = (load_file(folder / "model.safetensors") for folder in (tuned, tmp_path / "merged"))
    for name, tensor in before.items():
        close(after[name], tensor, 1e-6)
    assert not at.validate(tmp_path / "a", base=base).problems


def test_merge_and_extract_recover_the_delta_to_rounding(tmp_path: Path) -> None:
    base = save_base(fresh(models.llama), tmp_path / "base")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    adapted = saved(fresh(models.llama), config, tmp_path / "a")
    wanted = deltas(adapted)
    at.merge(base, tmp_path / "a", tmp_path / "tuned")
    at.extract(base, tmp_path / "tuned", tmp_path / "b", rank=4)
    found = deltas(loaded(fresh(models.llama), tmp_path / "b"))
    weights = fresh(models.llama).state_dict()
    assert set(found) == set(wanted)
    for path, delta in wanted.items():
        weight = weights[f"{path}.weight"]
        # The merged weight was rounded to float32: that much of the delta is lost before extract sees it.
        rounding = 2.0**-24 * float((weight.abs() + delta.abs()).norm()) + 2.0**-22 * float(delta.norm())
        assert float((found[path] - delta).norm()) <= rounding


def test_errors_are_within_one_percent_of_the_optimum(tmp_path: Path) -> None:
    tuned_by(models.llama, tmp_path, lambda model: shift(model, "proj.weight"))
    report = at.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=6)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "tuned"))
    found = deltas(loaded(fresh(models.llama), tmp_path / "a"))
    assert len(report.modules) == 14
    for module in report.modules:
        true = after[f"{module.path}.weight"].double() - before[f"{module.path}.weight"].double()
        error = float((true - found[module.path]).norm() / true.norm())
        best = float(torch.linalg.svdvals(true)[6:].norm() / true.norm())
        assert best * (1 - 1e-9) <= error <= best * 1.01
        assert module.error == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize(
    ("policy", "check"),
    [
        ({"energy": 0.6}, lambda m: m.energy >= 0.6),
        ({"max_error": 0.5}, lambda m: m.error <= 0.5 + 1e-6),
        ({"sv_fro": 0.8}, lambda m: m.energy >= 0.64 - 1e-9),
        ({"sv_ratio": 3}, lambda m: m.singular_values[m.rank - 1] > m.singular_values[0] / 3),
        ({"sv_cumulative": 0.5}, lambda m: sum(m.singular_values[: m.rank]) >= 0.5 * sum(m.singular_values)),
        ({"rank": ["3", "q_proj=5"]}, lambda m: m.rank == (5 if "q_proj" in m.path else 3)),
        ({"budget": "20%"}, lambda m: m.rank >= 1),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_policies(policy: dict[str, Any], check: Callable[[at.ModuleReport], bool], tmp_path: Path) -> None:
    tuned_by(models.llama, tmp_path, lambda model: shift(model, "proj.weight"))
    report = at.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", **policy)
    assert report.modules
    assert all(check(module) for module in report.modules)
    loaded(fresh(models.llama), tmp_path / "a")
    if "budget" in policy:
        matrices = [p.numel() for n, p in fresh(models.llama).named_parameters() if n.endswith("proj.weight")]
        assert 0.9 * 0.2 * sum(matrices) <= report.parameters <= 0.2 * sum(matrices)


def test_a_grown_vocabulary_is_carried_in_full(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        add_low_rank(model, "q_proj.weight")
        model.resize_token_embeddings(models.VOCAB + 8, mean_resizing=False)

    expected = tuned_by(models.llama, tmp_path, change)
    report = at.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=4)
    assert {name for name, _ in report.kept} == {"model.embed_tokens.weight", "lm_head.weight"}
    resized = fresh(models.llama)
    resized.resize_token_embeddings(models.VOCAB + 8, mean_resizing=False)
    same_outputs(resized, tmp_path / "a", expected)
    at.merge(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == models.VOCAB + 8


def test_lower_precision_and_shards(tmp_path: Path) -> None:
    save_base(fresh(models.llama).bfloat16(), tmp_path / "base", max_shard_size="20KB")
    model = fresh(models.llama).bfloat16()
    with torch.no_grad():
        add_low_rank(model, "q_proj.weight")
    save_base(model, tmp_path / "tuned")
    report = at.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=32, dtype="bfloat16")
    assert report.totals.error < 2.0**-7
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    close(outputs_of(loaded(fresh(models.llama).bfloat16(), tmp_path / "a")), outputs_of(model), 0.05)


class GaLore(torch.optim.Optimizer):
    """Adam on gradients projected to their leading singular subspace, renewed now and then.

    Source: Zhao et al. 2024, arXiv:2403.03507, algorithm 2.
    """

    def __init__(self, parameters: Iterator[nn.Parameter], *, rank: int, gap: int, lr: float) -> None:
        super().__init__(parameters, {"rank": rank, "gap": gap, "lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                step = state["step"] = state.get("step", 0) + 1
                if (step - 1) % group["gap"] == 0:
                    state["P"] = torch.linalg.svd(weight.grad, full_matrices=False)[0][:, : group["rank"]]
                low = state["P"].t() @ weight.grad
                first = state["m"] = 0.9 * state.get("m", torch.zeros_like(low)) + 0.1 * low
                second = state["v"] = 0.999 * state.get("v", torch.zeros_like(low)) + 0.001 * low**2
                ratio = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                weight -= group["lr"] * state["P"] @ ratio


def test_a_model_trained_with_galore(tmp_path: Path) -> None:
    """Two subspaces of rank 4 were used, so the change has rank 8 and no more."""
    save_base(fresh(models.llama), tmp_path / "base")
    model = fresh(models.llama)
    trained = [p for n, p in model.named_parameters() if n.endswith("proj.weight")]
    optimiser = GaLore(iter(trained), rank=4, gap=10, lr=0.01)
    batch = example_inputs(model)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]
    save_base(model.eval(), tmp_path / "tuned")
    report = at.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", max_error=1e-4)
    assert {module.rank for module in report.modules} <= set(range(4, 9))
    same_outputs(fresh(models.llama), tmp_path / "a", outputs_of(model), 1e-3)
    halved = at.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "b", rank=4)
    assert 0 < halved.totals.error < 0.8


def test_history_threads_and_leaving_out(tmp_path: Path) -> None:
    def change(model: nn.Module) -> None:
        shift(model, "q_proj.weight", "embed_tokens.weight", "norm.weight")

    tuned_by(models.llama, tmp_path, change)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    for threads in (1, 3):
        at.extract(base, tuned, tmp_path / f"a{threads}", rank=4, threads=threads)
    one, three = ({f.name: f.read_bytes() for f in (tmp_path / f"a{n}").iterdir()} for n in (1, 3))
    assert one == three
    manifest = at.load_manifest(tmp_path / "a1")
    assert manifest.base.digest == at.content_digest(base).digest
    assert {(i.role, i.digest) for i in manifest.history[0].inputs} == {
        ("base", at.content_digest(base).digest),
        ("tuned", at.content_digest(tuned).digest),
    }
    report = at.extract(base, tuned, tmp_path / "b", rank=4, leave_out=["embed_tokens.weight"])
    assert ("model.embed_tokens.weight", "left out, as asked") in report.kept
    names = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert not any("embed_tokens" in name for name in names)
    assert at.extract(base, tuned, None, rank=4, dry_run=True).digest is None


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    out = work / "out"
    tuned_by(models.llama, tmp_path, lambda model: shift(model, "q_proj.weight"))
    base, tuned = tmp_path / "base", tmp_path / "tuned"

    def call(where: Path, **options: Any) -> at.LowRankReport:
        return at.extract(options.pop("before", base), options.pop("after", tuned), where, **options)

    refused(at.MismatchError, "policy", out, call)
    refused(at.MismatchError, "equal", out, call, after=base, rank=4)
    refused(at.MismatchError, "rank", out, call, rank=33)
    refused(at.MismatchError, "rank", out, call, rank="0.self_attn.q_proj=4")
    refused(at.MismatchError, "leave-out", out, call, rank=4, leave_out=["k_proj.weight"])
    refused(at.MismatchError, "nothing-left", out, call, rank=4, leave_out=["q_proj.weight"])
    refused(at.MismatchError, "budget", out, call, budget="1B")
    other = save_base(fresh(models.gpt2), tmp_path / "gpt2")
    refused(at.MismatchError, "model-type", out, call, after=other, rank=4)

    def copy(name: str, change: Callable[[dict[str, Tensor]], None]) -> Path:
        return rewritten(save_base(fresh(models.llama), tmp_path / name), change)

    q_proj = "model.layers.0.self_attn.q_proj.weight"
    smaller = copy("smaller", lambda t: t.update({q_proj: t[q_proj][:16].clone()}))
    refused(at.MismatchError, "shape", out, call, after=smaller, rank=4)
    fewer = copy("fewer", lambda t: t.pop(q_proj))  # type: ignore[arg-type, return-value]
    refused(at.MismatchError, "missing", out, call, after=fewer, rank=4)
    nan = copy("nan", lambda t: t[q_proj].view(-1)[:1].fill_(float("nan")))  # type: ignore[arg-type, return-value]
    refused(at.FormatError, "non-finite", out, call, after=nan, rank=4)
    bytes_ = copy("bytes", lambda t: t.update({q_proj: t[q_proj].to(torch.int8)}))
    refused(at.UnsupportedError, "quantised", out, call, after=bytes_, rank=4)
    odd = copy(
        "odd", lambda t: t.update({"model.layers.0.mixer.A_log": torch.ones(4), q_proj: t[q_proj] + 1})
    )
    refused(at.LossyError, "inexpressible", out, call, after=odd, rank=4)
    report = call(out, after=odd, rank=4, allow_lossy=True)
    assert [name for name, reason in report.kept if "left out" in reason] == ["model.layers.0.mixer.A_log"]
