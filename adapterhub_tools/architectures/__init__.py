"""What is known of model architectures without building a model: a data table with its source and version.

``tables.json`` is written by tools/build_architectures.py from the installed transformers; a test compares
them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


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
        conv1d_modules: last parts of the paths of modules that store their weight as (in, out).
    """

    model_type: str
    base_prefix: str
    input_embedding: str | None
    output_embedding: str | None
    tied: tuple[tuple[str, ...], ...]
    always_tied: tuple[tuple[str, ...], ...]
    tied_default: bool
    conv1d_modules: tuple[str, ...]

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


@lru_cache(maxsize=1)
def table() -> dict[str, Architecture]:
    """Returns every known architecture by model type."""
    data = json.loads(Path(__file__).with_name("tables.json").read_text(encoding="utf-8"))
    return {
        name: Architecture(
            model_type=name,
            base_prefix=row["base_prefix"],
            input_embedding=row["input_embedding"],
            output_embedding=row["output_embedding"],
            tied=tuple(map(tuple, row["tied"])),
            always_tied=tuple(map(tuple, row["always_tied"])),
            tied_default=row["tied_default"],
            conv1d_modules=tuple(row["conv1d_modules"]),
        )
        for name, row in data["architectures"].items()
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
