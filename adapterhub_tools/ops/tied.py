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
    r"LMHead|CausalLM|MaskedLM|MTModel|ConditionalGeneration|PreTraining|ForSpeechSeq2Seq|ImageTextToText"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """An embedding and what shares its tensor; every name is the one on disk.

    Attributes:
        input_name: the embedding's tensor, which is stored.
        output_module: the head's module.
        output_stored: True if the base also stores the head's tensor.
        others: the further tensors of the same tie, such as the embeddings of an encoder and a decoder.
        stored_others: those of them that the base stores.
        unties: whether a config can say that the tensors are apart. If not, a loader ties what is not stored,
            and takes the rest as it is (T5 under transformers 5).
        headless: True if the base was saved without its head, by a class that shares an embedding between an
            encoder and a decoder; which of them it has is not recorded.
        companions: tensors that the same config value ties (the biases of BERT's decoder), each that the base
            does not store with the one that it does.
    """

    input_name: str
    output_module: str
    output_stored: bool
    others: tuple[str, ...] = ()
    stored_others: tuple[str, ...] = ()
    unties: bool = True
    headless: bool = False
    companions: tuple[tuple[str, str], ...] = ()

    @property
    def output_name(self) -> str:
        """The head's tensor."""
        return f"{self.output_module}.weight"

    @property
    def members(self) -> tuple[str, ...]:
        """Every tensor of the tie: the stored one, the head's, the others."""
        return (self.input_name, self.output_name, *self.others)

    def source_of(self, name: str) -> str:
        """Returns the stored tensor that has a tensor's values while the tie holds; ``name`` for others."""
        if name == self.output_name:
            return name if self.output_stored else self.input_name
        if name in self.others:
            return name if name in self.stored_others else self.input_name
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
    """Returns the tied tensors of a base, or None where its embeddings are not tied or it has no head."""
    if architecture is None or not architecture.input_embedding or not architecture.output_embedding:
        return None
    if not _is_tied(checkpoint, architecture):
        return None
    stored = checkpoint.tensors
    inner, outer = f"{architecture.input_embedding}.weight", f"{architecture.output_embedding}.weight"
    output = architecture.on_disk(outer, stored.keys())
    found = _input_name(checkpoint, architecture)
    headless = output not in stored and _has_head(checkpoint) is False
    own = [group for group in architecture.tied if inner in group or outer in group]
    anchor = _anchor(checkpoint, architecture)
    others = {name for group in own for name in group} - {anchor, outer}
    if found is None or (headless and not others):
        return None
    bare = "" if found.startswith(f"{architecture.base_prefix}.") else f"{architecture.base_prefix}."
    on_disk = sorted(architecture.on_disk(name, stored.keys()).removeprefix(bare) for name in others)
    if headless:
        output = on_disk.pop()
    return Tie(
        input_name=found,
        output_module=output.removesuffix(".weight"),
        output_stored=output in stored,
        others=tuple(on_disk),
        stored_others=tuple(name for name in on_disk if name in stored),
        unties=architecture.unties,
        headless=headless,
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
    if not architecture.unties or declared is None:
        return architecture.tied_default
    return declared


def _anchor(checkpoint: Checkpoint, architecture: Architecture) -> str:
    """Returns the tensor in memory that a checkpoint stores for the embedding: its own, or a shared one.

    Marian's input embedding is the encoder's, and what is stored is the one that encoder and decoder share.
    """
    inner = f"{architecture.input_embedding}.weight"
    outer = f"{architecture.output_embedding}.weight"
    shared = [name for group in architecture.tied if inner in group for name in group if name != outer]
    ways = (inner, *shared)
    return next((name for name in ways if _stored_name(name, checkpoint, architecture) is not None), inner)


def _input_name(checkpoint: Checkpoint, architecture: Architecture) -> str | None:
    """Returns the stored name of the embedding; that of the bare model lacks the prefix."""
    return _stored_name(_anchor(checkpoint, architecture), checkpoint, architecture)


def _stored_name(name: str, checkpoint: Checkpoint, architecture: Architecture) -> str | None:
    bare = name.removeprefix(f"{architecture.base_prefix}.")
    names = [way for path in (name, bare) for way in (*architecture.renames.to_disk(path), path)]
    return next((way for way in names if way in checkpoint.tensors), None)


def _has_head(checkpoint: Checkpoint) -> bool | None:
    """Returns whether the class that saved the base makes logits of tokens; None if it is not recorded."""
    classes = (checkpoint.config or {}).get("architectures") or []
    return any(_HEADS.search(str(name)) for name in classes) if classes else None
