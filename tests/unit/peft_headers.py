"""What the tests of the PEFT dialect share: headers and configs that stand for files."""

from __future__ import annotations

from adapterhub_tools.dialects import peft
from adapterhub_tools.model.tensor import TensorSpec

P = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
PAIR = {f"{P}{Q}.lora_A.weight": (4, 16), f"{P}{Q}.lora_B.weight": (8, 4)}
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}


def header(shapes, dtype="F32"):
    return {name: TensorSpec(name=name, dtype=dtype, shape=tuple(shape)) for name, shape in shapes.items()}


def examine(shapes=PAIR, dtype="F32", **fields):
    return peft.examine(header(shapes, dtype), {**CONFIG, **fields})


def kinds(problems, severity="error"):
    return sorted({p.kind for p in problems if p.severity == severity})
