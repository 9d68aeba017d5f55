"""What an adapter's config declares beside its factors, so that a file can be held against it. No data."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_TASKS = {
    "CAUSAL_LM": True,
    "SEQ_2_SEQ_LM": True,
    "SEQ_CLS": False,
    "TOKEN_CLS": False,
    "QUESTION_ANS": False,
    "FEATURE_EXTRACTION": False,
}
_WITH_HEAD = re.compile(r"LMHead|CausalLM|MaskedLM|ConditionalGeneration|PreTraining|ForSpeechSeq2Seq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What must stand in an adapter's file as far as the base has it.

    Attributes:
        saved: entries for modules trained whole; a module is meant if its path or that of one above it ends
            in an entry, wherever the entry starts.
        bias: which biases were trained: ``"none"``, ``"all"`` of the model, or those of the ``"targets"``.
        tokens: entry -> indices of trained token rows; the modules are meant as by ``saved``, but themselves
            only.
        entries: the list of target modules; each is a whole path or its end after a dot. Empty where the
            config has no such list.
        task: the task that the adapter was trained for, such as ``"SEQ_CLS"``.
        model_class: the name of the class that it was trained on.
    """

    saved: tuple[str, ...] = ()
    bias: str = "none"
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    entries: tuple[str, ...] = ()
    task: str | None = None
    model_class: str | None = None

    def saved_entries(self, path: str) -> tuple[str, ...]:
        """Returns the entries of ``saved`` that mean the module at ``path`` or one above it."""
        found: set[str] = set()
        end = len(path)
        while end > 0:
            found.update(entry for entry in self.saved if path.endswith(entry, 0, end))
            end = path.rfind(".", 0, end)
        return tuple(entry for entry in self.saved if entry in found)

    @property
    def has_output_head(self) -> bool | None:
        """Whether the model in training made logits of tokens; None if the config does not tell."""
        if self.task in _TASKS:
            return _TASKS[self.task]
        return None if self.model_class is None else _WITH_HEAD.search(self.model_class) is not None
