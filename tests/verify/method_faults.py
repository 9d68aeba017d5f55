"""Faults in merges of DoRA, (IA)³, LoHa and LoKr, each by name, from the methods' formulas in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import adapterhub_tools as at
from tests.parity.models import perturb_trainable, randomise

HIDDEN, RANK, ALPHA = 128, 6, 12
Q0 = "model.layers.0.self_attn.q_proj.weight"
Q1 = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"
_TARGETS = ["q_proj", "o_proj"]
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "dora": lambda: LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=_TARGETS, use_dora=True),
    "ia3": lambda: IA3Config(target_modules=_TARGETS, feedforward_modules=["o_proj"]),
    "loha": lambda: LoHaConfig(r=RANK, alpha=ALPHA, target_modules=_TARGETS),
    "lokr": lambda: LoKrConfig(r=RANK, alpha=ALPHA, target_modules=_TARGETS, decompose_factor=8),
}
_PERMUTED = {"dora": "lora_A", "ia3": "ia3_l", "loha": "hada_w1_b", "lokr": "lokr_w2_b"}


class Scene:
    """Base, adapter and a right merge of one method in one dtype, and the merged tensors to put faults in."""

    def __init__(self, folder: Path, method: str, dtype: torch.dtype) -> None:
        self.folder, self.method = folder, method
        torch.manual_seed(0)
        shape = {"hidden_size": HIDDEN, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 64}
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **shape))
        randomise(model, 1)
        model.to(dtype).save_pretrained(folder / "base")
        tuned = get_peft_model(model, CONFIGS[method]())
        perturb_trainable(tuned, 2, 0.05)
        tuned.save_pretrained(folder / "adapter")
        at.merge(folder / "base", folder / "adapter", folder / "right")
        self.base = load_file(folder / "base" / "model.safetensors")
        self.factors = load_file(folder / "adapter" / "adapter_model.safetensors")
        self.right = load_file(folder / "right" / "model.safetensors")
        self.wide = self.merge(base=folder / "base", dtype="float64")
        self.now = dict(self.right)

    def merge(
        self,
        *,
        base: Path | None = None,
        edit: Callable[[str, Tensor], Tensor] | None = None,
        dtype: str | None = None,
        **config: object,
    ) -> dict[str, Tensor]:
        """Returns what a merge of an edited adapter gives."""
        other, out = self.folder / "edited", self.folder / "other"
        shutil.copytree(self.folder / "adapter", other, dirs_exist_ok=True)
        if edit is not None:
            tensors = {name: edit(name, tensor).contiguous() for name, tensor in self.factors.items()}
            save_file(tensors, other / "adapter_model.safetensors", {"format": "pt"})
        content = json.loads((other / "adapter_config.json").read_text())
        (other / "adapter_config.json").write_text(json.dumps({**content, **config}))
        at.merge(base or self.folder / "base", other, out, replace=True, check_base="off", dtype=dtype)
        shutil.rmtree(other)
        return load_file(out / "model.safetensors")

    def put(self, name: str, values: Tensor) -> None:
        """Replaces a tensor by values in float64, rounded."""
        self.now[name] = values.float().to(self.base[name].dtype)

    def save(self, *, receipt: bool) -> Path:
        """Writes the merged folder."""
        merged = self.folder / "merged"
        shutil.copytree(self.folder / "right", merged, dirs_exist_ok=True)
        if any(tensor is not self.right[name] for name, tensor in self.now.items()):
            tensors = {name: tensor.contiguous() for name, tensor in self.now.items()}
            save_file(tensors, merged / "model.safetensors", {"format": "pt"})
        if not receipt:
            (merged / "merge_receipt.json").unlink()
        return merged

    def delta(self) -> Tensor:
        return self.wide[Q0] - self.base[Q0].double()

    def formula(self, *, factor: float = 1.0, transposed: bool = False) -> Tensor:
        """The merged q_proj with its delta, or the one inside DoRA's norm, times a factor or transposed."""
        base, stem = self.base[Q0].double(), f"base_model.model.{Q0.removesuffix('.weight')}"
        if self.method == "ia3" and transposed:
            return base * self.factors[f"{stem}.ia3_l"].double().reshape(1, -1)
        if self.method != "dora":
            return base + factor * (self.delta().t() if transposed else self.delta())
        A, B = (self.factors[f"{stem}.lora_{side}.weight"].double() for side in "AB")
        delta = factor * ALPHA / RANK * B @ A
        sums = base + (delta.t() if transposed else delta)
        magnitude = self.factors[f"{stem}.lora_magnitude_vector"].double().reshape(-1, 1)
        return magnitude * sums / sums.norm(dim=1, keepdim=True)


def _row(scene: Scene) -> None:
    scene.now[Q0] = scene.now[Q0].clone()
    scene.now[Q0][5] = scene.base[Q0][5]


def _tensor(scene: Scene) -> None:
    scene.now[Q0] = scene.base[Q0]


def _twice(scene: Scene) -> None:
    scene.now = scene.merge(base=scene.folder / "right")


def _permuted(scene: Scene) -> None:
    def edit(name: str, tensor: Tensor) -> Tensor:
        if _PERMUTED[scene.method] not in name or "layers.0.self_attn.q_proj" not in name:
            return tensor
        return tensor.roll(1, dims=0)

    scene.now[Q0] = scene.merge(edit=edit)[Q0]


def _transposed(scene: Scene) -> None:
    scene.put(Q0, scene.formula(transposed=True))


def _scale(scene: Scene) -> None:
    scene.put(Q0, scene.formula(factor=1.01))


def _subtracted(scene: Scene) -> None:
    scene.put(Q0, scene.formula(factor=-1.0))


def _no_alpha(scene: Scene) -> None:
    scene.now = scene.merge(**{"lora_alpha" if scene.method == "dora" else "alpha": RANK})


def _other_rule(scene: Scene) -> None:
    scene.now = scene.merge(use_rslora=True)


def _no_magnitude(scene: Scene) -> None:
    A, B = (
        scene.factors[f"base_model.model.{Q0.removesuffix('.weight')}.lora_{side}.weight"].double()
        for side in "AB"
    )
    scene.put(Q0, scene.base[Q0].double() + ALPHA / RANK * B @ A)


def _ranks(scene: Scene) -> None:
    def edit(name: str, tensor: Tensor) -> Tensor:
        if "lora_B" not in name and "hada_w1_a" not in name:
            return tensor
        return torch.cat([tensor[:, : RANK // 2], torch.zeros_like(tensor[:, RANK // 2 :])], dim=1)

    scene.now[Q0] = scene.merge(edit=edit)[Q0]


def _bit(scene: Scene) -> None:
    scene.now[Q0] = scene.now[Q0].clone()
    kind = torch.int32 if scene.now[Q0].dtype == torch.float32 else torch.int16
    scene.now[Q0].view(kind)[7, 9] ^= 1 << (4 if kind == torch.int16 else 8)


def _ulp(scene: Scene) -> None:
    scene.now[Q0] = scene.now[Q0].clone()
    larger = torch.nextafter(scene.now[Q0][7, 9], torch.tensor(9.0, dtype=scene.now[Q0].dtype))
    scene.now[Q0][7, 9] = larger


def _swapped(scene: Scene) -> None:
    scene.now[Q0], scene.now[Q1] = scene.now[Q1], scene.now[Q0]


def _norm(scene: Scene) -> None:
    scene.now[NORM] = scene.now[NORM].clone()
    scene.now[NORM][3] *= 1.5


def _other_adapter(scene: Scene) -> None:
    generator = torch.Generator().manual_seed(5)

    def edit(name: str, tensor: Tensor) -> Tensor:
        values = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
        around = tensor.float().mean() if "ia3_l" in name or "magnitude" in name else 0.0
        return (values + around).to(tensor.dtype)

    scene.now = scene.merge(edit=edit)


def _other_base(scene: Scene) -> None:
    generator = torch.Generator().manual_seed(6)
    other = scene.folder / "another base"
    shutil.copytree(scene.folder / "base", other)
    tensors = {
        name: (torch.randn(tensor.shape, generator=generator) * tensor.float().std()).to(tensor.dtype)
        for name, tensor in scene.base.items()
    }
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    scene.now = scene.merge(base=other)
    shutil.rmtree(other)


EVERY = tuple(CONFIGS)
LOW_RANK = ("dora", "loha")
FAULTS: dict[str, tuple[Callable[[Scene], None], str, tuple[str, ...]]] = {
    "one row unmerged": (_row, "1 rows are not merged: 5", EVERY),
    "one tensor unmerged": (_tensor, "the adapter is not applied", EVERY),
    "merged twice": (_twice, "applied twice", EVERY),
    "a factor permuted": (_permuted, "are permuted", EVERY),
    "transposed on a square layer": (_transposed, "transposed", EVERY),
    "one per cent more on one tensor": (_scale, "multiplied by 1.0", EVERY),
    "subtracted": (_subtracted, "the adapter is subtracted", EVERY),
    "alpha ignored": (_no_alpha, "alpha is ignored", ("dora", "loha", "lokr")),
    "the other scaling rule": (_other_rule, "the scaling is alpha/√rank", ("dora",)),
    "magnitude ignored": (_no_magnitude, "the magnitude is ignored", ("dora",)),
    "other rank slice": (_ranks, "ranks are merged", LOW_RANK),
    "one bit flipped": (_bit, "[7, 9] is", EVERY),
    "one weight off by one ulp": (_ulp, "1 single weights differ: [7, 9]", EVERY),
    "swapped tensors": (_swapped, "swapped: it holds what", EVERY),
    "a changed norm weight": (_norm, "1 values differ, the first at [3, 0]", EVERY),
    "another adapter": (_other_adapter, "another adapter", EVERY),
    "another base": (_other_base, "started from another base", EVERY),
}
"""Name -> what puts the fault in, a part of the explanation that must be found, the methods that have it."""
