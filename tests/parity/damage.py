"""Adapters and bases to be spoilt, and how a merge of them must be refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from safetensors.torch import load_file, save_file

from adapterhub_tools.errors import AdapterError
from tests.parity import models
from tests.parity.oracle import Adapted, Case, refused

if TYPE_CHECKING:
    from torch import Tensor

FACTOR_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
FACTOR_B = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
TARGET = "model.layers.1.self_attn.q_proj.weight"


def case(build: Callable[[], Any] = models.llama, **fields: Any) -> Case:
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **fields}
    return Case(build=build, config=lambda: LoraConfig(**fields))


def assert_refused(
    error: type[AdapterError], kind: str, adapted: Adapted, tmp_path: Path, **options: Any
) -> Any:
    return refused(error, kind, adapted.base, adapted.adapter, tmp_path / "out", **options)


def edit_config(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Changes the tensors of a folder's only weight file in place."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
