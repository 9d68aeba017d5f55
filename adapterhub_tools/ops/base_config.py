"""What a base's config says that stands against its weights, or could be read in two ways."""

from __future__ import annotations

from collections.abc import Iterable

from adapterhub_tools.errors import Problem
from adapterhub_tools.model.tensor import FLOAT_DTYPES
from adapterhub_tools.ops.fit import is_embedding
from adapterhub_tools.ops.tied import text_config
from adapterhub_tools.store.checkpoint import Checkpoint


def tie_problems(checkpoint: Checkpoint, names: Iterable[str]) -> list[Problem]:
    """Returns a problem for each ``tie_word_embeddings`` that is no boolean, where something depends on it.

    Loaders disagree on what such a value means: the text ``"false"`` is true in Python.

    Args:
        checkpoint: the base.
        names: the tensors that an adapter changes; without an embedding among them nothing depends on it.
    """
    config = checkpoint.config or {}
    holders = {"tie_word_embeddings": config, "text_config/tie_word_embeddings": text_config(config)}
    wrong = {
        loc: holder["tie_word_embeddings"]
        for loc, holder in holders.items()
        if not isinstance(holder.get("tie_word_embeddings"), bool | None)
        and (loc == "tie_word_embeddings" or holder is not config)
    }
    if not wrong or not any(is_embedding(name, None, checkpoint) for name in names):
        return []
    return [
        Problem(
            kind="type",
            file=checkpoint.config_file or "",
            loc=loc,
            message=f"is {value!r}, expected true or false; the adapter changes an embedding.",
            remedy="Correct the base's config.",
        )
        for loc, value in wrong.items()
    ]


def quantisation_notes(checkpoint: Checkpoint) -> list[str]:
    """Returns a remark where a config says how weights are quantised, but none of them are."""
    found = (checkpoint.config or {}).get("quantization_config")
    if not isinstance(found, dict):
        return []
    if any(stored.spec.dtype not in FLOAT_DTYPES for stored in checkpoint.tensors.values()):
        return []
    method = found.get("quant_method")
    named = f" ({method})" if isinstance(method, str) else ""
    return [
        f"config: quantization_config{named} is kept, though no weight of the base is quantised; "
        "a loader may quantise the merged ones, or refuse them"
    ]
