"""Tied embeddings: a base that keeps one tensor for its input embedding and its output head.

An adapter that changes one of the pair needs both written out: changing the shared tensor would change the
other side too, and a config that still says "tied" would throw the change away on loading
(huggingface/peft#2018, #2777).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from adapterhub_tools.architectures import Architecture, head_names
from adapterhub_tools.store.checkpoint import Checkpoint

_HEADS = re.compile(
    r"LMHead|CausalLM|MaskedLM|ConditionalGeneration|PreTraining|ForSpeechSeq2Seq|ImageTextToText"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """A tied pair.

    Attributes:
        input_name: the embedding's tensor on disk.
        output_module: the head's module.
        output_stored: True if the base also stores the head's tensor; it must hold the same values.
        others: further tensors of the same tie; a base that has them cannot be untied here.
        companions: tensors that the same config value ties (the biases of BERT's decoder), each that the base
            does not store with the one that it does.
    """

    input_name: str
    output_module: str
    output_stored: bool
    others: tuple[str, ...] = ()
    companions: tuple[tuple[str, str], ...] = ()

    @property
    def output_name(self) -> str:
        """The head's tensor."""
        return f"{self.output_module}.weight"

    def source_of(self, name: str) -> str:
        """Returns the stored tensor that has a tensor's values while the tie holds; ``name`` for others."""
        if name == self.output_name and not self.output_stored:
            return self.input_name
        return dict(self.companions).get(name, name)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a config that describes the language model: its ``text_config``, or itself."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def says_tied(config: dict[str, Any]) -> bool | None:
    """Returns what a config says about its embeddings; None if it says nothing."""
    declared = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))
    return None if declared is None else bool(declared)


def find_tie(checkpoint: Checkpoint, architecture: Architecture | None) -> Tie | None:
    """Returns the tied pair of a base, or None where its embeddings are not tied or it has no head."""
    if architecture is None or not architecture.input_embedding or not architecture.output_embedding:
        return None
    if not _is_tied(checkpoint, architecture):
        return None
    stored = checkpoint.tensors
    inner, output = f"{architecture.input_embedding}.weight", f"{architecture.output_embedding}.weight"
    found = _input_name(checkpoint, architecture)
    if found is None or (output not in stored and _has_head(checkpoint) is False):
        return None
    own = [group for group in architecture.tied if inner in group or output in group]
    others = {name for group in own for name in group} - {inner, output}
    return Tie(
        input_name=found,
        output_module=architecture.output_embedding,
        output_stored=output in stored,
        others=tuple(sorted(others)),
        companions=tuple(
            (missing, source)
            for group in architecture.tied
            if group not in own
            for source in [name for name in group if name in stored][:1]
            for missing in group
            if missing not in stored
        ),
    )


def may_be_tied(checkpoint: Checkpoint, architecture: Architecture | None) -> bool:
    """Says whether a base without a known pair may tie its embeddings under names that are not known.

    A config of transformers 4 leaves ``tie_word_embeddings`` out where it is true, its default then.
    """
    if architecture is not None:
        if not architecture.input_embedding or _input_name(checkpoint, architecture) is not None:
            return False
        return _is_tied(checkpoint, architecture) and _has_head(checkpoint) is not False
    declared = says_tied(checkpoint.config or {})
    if declared is not None:
        return declared
    heads = {f"{name}.weight" for name in head_names()}
    stored = any(".".join(name.rsplit(".", 2)[-2:]) in heads for name in checkpoint.tensors)
    return _has_head(checkpoint) is True and not stored


def _is_tied(checkpoint: Checkpoint, architecture: Architecture) -> bool:
    declared = says_tied(checkpoint.config or {})
    return architecture.tied_default if declared is None else declared


def _input_name(checkpoint: Checkpoint, architecture: Architecture) -> str | None:
    """Returns the stored name of the embedding; that of the bare model lacks the prefix."""
    name = f"{architecture.input_embedding}.weight"
    names = (name, name.removeprefix(f"{architecture.base_prefix}."))
    return next((name for name in names if name in checkpoint.tensors), None)


def _has_head(checkpoint: Checkpoint) -> bool | None:
    """Returns whether the class that saved the base makes logits of tokens; None if it is not recorded."""
    classes = (checkpoint.config or {}).get("architectures") or []
    return any(_HEADS.search(str(name)) for name in classes) if classes else None
