"""What is known of model architectures without building a model: a data table with its source and version.

``tables.json`` is written by tools/build_architectures.py from the installed transformers; a test compares
them.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from adapterhub_tools.architectures.renames import Converter, Rename, Renames

__all__ = ["Architecture", "embedding_names", "head_names", "lookup", "source", "table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One model type, with the names that its parameters have in memory.

    Attributes:
        model_type: the ``model_type`` of a model's config, such as ``"llama"``.
        base_prefix: the attribute under which the model with a head holds the bare model, such as
            ``"model"``; a checkpoint of the bare model lacks it. Empty where there is none.
        input_embedding: path of the module with one row per token.
        output_embedding: path of the module that makes logits.
        tied: groups of parameters that are one tensor when embeddings are tied; the name that a checkpoint
            stores comes first.
        always_tied: groups that are one tensor in any case.
        tied_default: whether embeddings are tied when the config does not say (``tie_word_embeddings``).
        unties: whether a config can say that embeddings are apart. False for T5, of which transformers 5
            ties what a checkpoint does not store and leaves the rest as it is, whatever the config says.
        conv1d_modules: last parts of the paths of modules that store their weight as (in, out).
        float32_modules: patterns of modules that a loader never quantises (``_keep_in_fp32_modules``).
        last_module: path of the linear layer that has the last parameter when embeddings are tied, which a
            loader does not quantise either; ``*`` stands for the last index. None where it is no such layer.
        renames: names in memory that differ from those on disk.
        converters: weights that are joined, split or transposed on the way to memory.
    """

    model_type: str
    base_prefix: str
    input_embedding: str | None
    output_embedding: str | None
    tied: tuple[tuple[str, ...], ...]
    always_tied: tuple[tuple[str, ...], ...]
    tied_default: bool
    unties: bool
    conv1d_modules: tuple[str, ...]
    float32_modules: tuple[str, ...]
    last_module: str | None
    renames: Renames
    converters: tuple[Converter, ...]

    def is_conv1d(self, path: str) -> bool:
        """Tells whether the module at ``path`` stores its weight as (in, out)."""
        return path.rpartition(".")[2] in self.conv1d_modules

    def tied_group(self, name: str, *, tied: bool) -> tuple[str, ...]:
        """Returns the names that share one tensor with ``name`` (itself included), the stored one first.

        Args:
            name: a parameter's name in memory, such as ``"lm_head.weight"``.
            tied: whether the model ties its embeddings.
        """
        groups = (*self.always_tied, *(self.tied if tied else ()))
        return next((group for group in groups if name in group), (name,))

    def on_disk(self, name: str, stored: Collection[str]) -> str:
        """Returns the name that a checkpoint has for a parameter or module; where none is stored, the usual.

        Args:
            name: its name in memory.
            stored: the checkpoint's tensor names.
        """
        names = (*self.renames.to_disk(name), name)
        return next((found for found in names if found in stored), names[0])

    def in_memory(self, name: str) -> str:
        """Returns the name in memory of a parameter or module on disk."""
        return self.renames.to_memory(name) or name


@lru_cache(maxsize=1)
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(Path(__file__).with_name("tables.json").read_text(encoding="utf-8"))
    return data


def source() -> str:
    """Returns where the table comes from: a library and its version."""
    return str(_data()["source"])


@lru_cache(maxsize=1)
def table() -> dict[str, Architecture]:
    """Returns every known architecture by model type."""
    return {
        name: Architecture(
            model_type=name,
            base_prefix=row["base_prefix"],
            input_embedding=row["input_embedding"],
            output_embedding=row["output_embedding"],
            tied=tuple(map(tuple, row["tied"])),
            always_tied=tuple(map(tuple, row["always_tied"])),
            tied_default=row["tied_default"],
            unties=row["unties"],
            conv1d_modules=tuple(row["conv1d_modules"]),
            float32_modules=tuple(row["float32_modules"]),
            last_module=row["last_module"],
            renames=Renames(
                base_prefix=row["base_prefix"],
                pairs=tuple(Rename(memory=r["memory"], disk=tuple(r["disk"])) for r in row["renames"]),
            ),
            converters=tuple(
                Converter(memory=tuple(c["memory"]), disk=tuple(c["disk"]), operations=tuple(c["operations"]))
                for c in row["converters"]
            ),
        )
        for name, row in _data()["architectures"].items()
    }


def lookup(model_type: str | None) -> Architecture | None:
    """Returns the architecture of a model type, or None if it is not in the table."""
    return None if model_type is None else table().get(model_type)


@lru_cache(maxsize=1)
def head_names() -> frozenset[str]:
    """Returns the last path parts that output embeddings have in any known architecture."""
    paths = [row.output_embedding for row in table().values() if row.output_embedding]
    return frozenset(path.rpartition(".")[2] for path in paths) | {"lm_head", "embed_out"}


@lru_cache(maxsize=1)
def embedding_names() -> frozenset[str]:
    """Returns the last path parts that input and output embeddings have in any known architecture."""
    paths = [p for row in table().values() for p in (row.input_embedding, row.output_embedding) if p]
    return frozenset(path.rpartition(".")[2] for path in paths) | {"embed_tokens", "lm_head", "embed_out"}
