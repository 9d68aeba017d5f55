"""Sorts the tensors of a base and of a tuned copy of it: what an adapter carries, and in which form."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from adapterhub_tools.architectures import Architecture, lookup
from adapterhub_tools.dialects.peft import match_keys
from adapterhub_tools.errors import MismatchError, Problem, UnsupportedError
from adapterhub_tools.model.base import StoredTensor
from adapterhub_tools.model.tensor import FLOAT_DTYPES
from adapterhub_tools.ops.fit import is_embedding
from adapterhub_tools.ops.tied import Tie, find_tie
from adapterhub_tools.store.checkpoint import Checkpoint

_WITH_HEAD = re.compile(r"For[A-Z]|LMHead|PreTraining")
_KINDS = {3: "convnd", 4: "conv2d", 5: "convnd"}
_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
)
"""Ends of class names -> PEFT's task. For classifiers PEFT demands the head in the file, changed or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A changed weight that becomes a product of two factors.

    Attributes:
        path: the module's path in memory.
        base_tensor: its tensor in the base.
        tuned_tensor: its tensor in the tuned model.
        kind: see model/adapter.py.
        shape: as stored.
    """

    path: str
    base_tensor: str
    tuned_tensor: str
    kind: str
    shape: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class ExtractPlan:
    """What becomes of every tensor.

    Attributes:
        matrices: weights to approximate.
        full: (name in memory, role, tensor in the tuned model), carried as they are.
        left: (name in memory, reason): left out because it was asked for.
        inexpressible: (name in memory, reason): no adapter can carry it.
        unchanged: how many tensors are equal.
        modules: paths in memory of all modules with a weight.
    """

    matrices: list[Matrix] = field(default_factory=list)
    full: list[tuple[str, str, StoredTensor]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    inexpressible: list[tuple[str, str]] = field(default_factory=list)
    unchanged: int = 0
    modules: tuple[str, ...] = ()


def task_of(checkpoint: Checkpoint) -> str | None:
    """Returns PEFT's name for the task of a model's class; None where the class alone decides."""
    name = _class_of(checkpoint)
    return next((task for end, task in _TASKS if name.endswith(end)), None)


def plan_extract(
    base: Checkpoint,
    tuned: Checkpoint,
    same: Callable[[StoredTensor, StoredTensor], bool],
    leave_out: Sequence[str],
) -> ExtractPlan:
    """Compares two models tensor by tensor.

    Args:
        base: the base.
        tuned: the tuned model.
        same: tells of two tensors whether their values are equal, bit for bit.
        leave_out: patterns for the end of names that are left out.

    Raises:
        MismatchError: they are not the same architecture, or a shape differs where it may not.
        UnsupportedError: one of them is quantised.
    """
    _check_alike(base, tuned)
    architecture = lookup((base.config or {}).get("model_type"))
    ties = find_tie(base, architecture), find_tie(tuned, architecture)
    in_memory = _memory_names(base, architecture)
    plan = ExtractPlan(
        modules=tuple(in_memory(n.removesuffix(".weight")) for n in base.tensors if n.endswith(".weight"))
    )
    problems: list[Problem] = []
    pairs = _pairs(base, tuned, ties, problems)
    changed: dict[str, tuple[StoredTensor | None, StoredTensor]] = {}
    for name, (before, after) in pairs.items():
        if before is not None and same(before, after):
            plan.unchanged += 1
        else:
            changed[name] = (before, after)
    left = _left_out([in_memory(name) for name in changed], leave_out)
    for name, (before, after) in changed.items():
        if in_memory(name) in left:
            plan.left.append((in_memory(name), "left out, as asked"))
            continue
        _place(name, before, after, base, ties[0], architecture, in_memory, plan, problems)
    _complete_modules(plan, pairs, in_memory)
    _complete_biases(plan, pairs, in_memory)
    if problems:
        unsupported = all(problem.kind == "quantised" for problem in problems)
        raise (UnsupportedError if unsupported else MismatchError)(*problems)
    return plan


def _check_alike(base: Checkpoint, tuned: Checkpoint) -> None:
    types = [(checkpoint.config or {}).get("model_type") for checkpoint in (base, tuned)]
    if None not in types and types[0] != types[1]:
        raise MismatchError.of(
            "model-type",
            f"the base is {types[0]}, the tuned model {types[1]}.",
            file=str(tuned.root),
            remedy="Give the base that the model was tuned from.",
        )


def _class_of(checkpoint: Checkpoint) -> str:
    classes = (checkpoint.config or {}).get("architectures")
    return str(classes[0]) if isinstance(classes, list) and classes else ""


def _memory_names(base: Checkpoint, architecture: Architecture | None) -> Callable[[str], str]:
    """Returns how names on disk read in memory: a bare model's checkpoint lacks the prefix of its class."""
    prefix = f"{architecture.base_prefix}." if architecture and architecture.base_prefix else ""
    bare = prefix and not any(name.startswith(prefix) for name in base.tensors)
    if not bare or architecture is None or not _WITH_HEAD.search(_class_of(base)):
        return lambda name: name
    head = (architecture.output_embedding or "").partition(".")[0]
    return lambda name: name if head and name.partition(".")[0] == head else prefix + name


def _pairs(
    base: Checkpoint, tuned: Checkpoint, ties: tuple[Tie | None, Tie | None], problems: list[Problem]
) -> dict[str, tuple[StoredTensor | None, StoredTensor]]:
    """Pairs tensors by name; a tied head that is not stored has the embedding's tensor."""
    names = dict.fromkeys((*base.tensors, *tuned.tensors))
    for tie in ties:
        if tie is not None:
            names[tie.output_name] = None
    pairs: dict[str, tuple[StoredTensor | None, StoredTensor]] = {}
    for name in names:
        found = [
            checkpoint.tensors.get(tie.source_of(name) if tie is not None else name)
            for checkpoint, tie in zip((base, tuned), ties, strict=True)
        ]
        before, after = found
        if after is None:
            if before is not None and before.spec.dtype in FLOAT_DTYPES:
                problems.append(
                    Problem(
                        kind="missing",
                        loc=name,
                        message="the base has this tensor, but the tuned model does not.",
                        remedy="Give the base that the model was tuned from, saved by the same class.",
                    )
                )
            continue
        pairs[name] = (before, after)
    return pairs


def _left_out(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Returns the names that the patterns mean.

    Raises:
        MismatchError: a pattern means none.
    """
    hits = match_keys(list(patterns), names, loc="--leave-out")
    used = {index for found in hits for index in found}
    unused = [pattern for index, pattern in enumerate(patterns) if index not in used]
    if unused:
        raise MismatchError.of(
            "leave-out",
            f"no changed tensor ends in {unused[0]!r}.",
            loc="--leave-out",
            remedy="Give the end of a tensor's name in memory, such as lm_head.weight.",
        )
    return {name for name, found in zip(names, hits, strict=True) if found}


def _place(
    name: str,
    before: StoredTensor | None,
    after: StoredTensor,
    base: Checkpoint,
    tie: Tie | None,
    architecture: Architecture | None,
    in_memory: Callable[[str], str],
    plan: ExtractPlan,
    problems: list[Problem],
) -> None:
    memory = in_memory(name)
    module, _, leaf = memory.rpartition(".")
    shape = after.spec.shape
    if before is None:
        if leaf in ("weight", "bias"):
            plan.full.append((memory, "modules_to_save", after))
        else:
            plan.inexpressible.append((memory, "the base has no such tensor, and its module is not known"))
        return
    if before.spec.dtype not in FLOAT_DTYPES or after.spec.dtype not in FLOAT_DTYPES:
        _not_floats(memory, before, after, plan, problems)
        return
    if is_embedding(name, tie, base):
        same_width = shape[1:] == before.spec.shape[1:] and len(shape) == len(before.spec.shape)
        if same_width:
            plan.full.append((memory, "modules_to_save", after))
            return
    if shape != before.spec.shape:
        problems.append(
            Problem(
                kind="shape",
                loc=name,
                message=f"it is {list(before.spec.shape)} in the base, {list(shape)} in the tuned model.",
                remedy="Give the base that the model was tuned from.",
            )
        )
        return
    if leaf == "weight" and len(shape) == 2 and 0 not in shape:
        conv1d = architecture is not None and architecture.is_conv1d(module)
        kind = "conv1d" if conv1d else "linear"
        plan.matrices.append(_matrix(module, before, after, kind))
    elif leaf == "weight" and len(shape) in _KINDS and shape[1] > 1:
        plan.matrices.append(_matrix(module, before, after, _KINDS[len(shape)]))
    elif leaf == "bias" and _has_matrix(name, base):
        plan.full.append((memory, "bias", after))
    elif leaf in ("weight", "bias"):
        plan.full.append((memory, "modules_to_save", after))
    else:
        plan.inexpressible.append((memory, "a parameter that belongs to no weight or bias of a module"))


def _matrix(path: str, before: StoredTensor, after: StoredTensor, kind: str) -> Matrix:
    return Matrix(
        path=path,
        base_tensor=before.spec.name,
        tuned_tensor=after.spec.name,
        kind=kind,
        shape=before.spec.shape,
    )


def _has_matrix(bias: str, base: Checkpoint) -> bool:
    weight = base.tensors.get(bias.removesuffix("bias") + "weight")
    return weight is not None and len(weight.spec.shape) >= 2


def _not_floats(
    memory: str, before: StoredTensor, after: StoredTensor, plan: ExtractPlan, problems: list[Problem]
) -> None:
    dtypes = (before.spec.dtype, after.spec.dtype)
    if memory.endswith(".weight") and len(after.spec.shape) >= 2:
        problems.append(
            Problem(
                kind="quantised",
                loc=memory,
                message=f"its dtypes are {' and '.join(dtypes)}; a quantised weight has no difference.",
                remedy="Give 16- or 32-bit copies of both models.",
            )
        )
        return
    plan.inexpressible.append((memory, f"its values are {' and '.join(dtypes)}, which no adapter carries"))


def _complete_modules(
    plan: ExtractPlan,
    pairs: dict[str, tuple[StoredTensor | None, StoredTensor]],
    in_memory: Callable[[str], str],
) -> None:
    """Adds what PEFT wants of a module that is carried in full: every tensor of it, changed or not.

    A matrix or bias of such a module is carried with it.
    """
    saved = {name.rpartition(".")[0] for name, role, _ in plan.full if role == "modules_to_save"}
    have = {name for name, _, _ in plan.full}
    plan.full = [
        (name, "modules_to_save" if name.rpartition(".")[0] in saved else role, tensor)
        for name, role, tensor in plan.full
    ]
    for name, (_, after) in pairs.items():
        memory = in_memory(name)
        if memory.rpartition(".")[0] in saved and memory not in have:
            plan.full.append((memory, "modules_to_save", after))
    plan.matrices = [matrix for matrix in plan.matrices if matrix.path not in saved]
    plan.full.sort(key=lambda item: item[0])


def _complete_biases(
    plan: ExtractPlan,
    pairs: dict[str, tuple[StoredTensor | None, StoredTensor]],
    in_memory: Callable[[str], str],
) -> None:
    """Adds biases that stayed, where others changed: a config has only all of them, or the targets'."""
    owners = {name.rpartition(".")[0] for name, role, _ in plan.full if role == "bias"}
    if not owners:
        return
    targets = {matrix.path for matrix in plan.matrices}
    have = {name for name, _, _ in plan.full}
    for name, (_, after) in pairs.items():
        memory = in_memory(name)
        module, _, leaf = memory.rpartition(".")
        if leaf == "bias" and memory not in have and (module in targets or not owners <= targets):
            plan.full.append((memory, "bias", after))
    plan.full.sort(key=lambda item: item[0])
