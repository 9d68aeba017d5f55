"""What a merge writes beside the weights: the config, the index, and the files that go along."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub_tools.model.plan import Plan
from adapterhub_tools.model.tensor import DTYPE_NAMES
from adapterhub_tools.ops.base_config import quantisation_notes
from adapterhub_tools.ops.merge_base import MergeBase
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.ops.merge_parts import Part
from adapterhub_tools.ops.merge_plan import MergePlan
from adapterhub_tools.ops.tied import text_config
from adapterhub_tools.store.checkpoint import Checkpoint
from adapterhub_tools.store.digest import config_digest
from adapterhub_tools.store.files import resolve_inside
from adapterhub_tools.store.side_files import classify, is_tokenizer_file

_NAMES = {short: name for name, short in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class SideOutputs:
    """The files beside the weights.

    Attributes:
        copied: name in the output -> the file it is copied from.
        written: name in the output -> its new content.
        config_digest: of the output's config; None where there is none.
        notes: what was changed, and what was left behind and why.
        nbytes: their size, roughly.
    """

    copied: dict[str, Path]
    written: dict[str, bytes]
    config_digest: str | None
    notes: tuple[str, ...]
    nbytes: int


def side_outputs(
    started: MergeBase, planned: MergePlan, parts: Sequence[Part], options: MergeOptions
) -> SideOutputs:
    """Decides what goes along.

    Args:
        started: the base.
        planned: the plan.
        parts: the adapters.
        options: what was asked.

    Raises:
        FormatError: a file to copy lies outside its folder.
    """
    checkpoint = started.checkpoint
    sides = classify(checkpoint.root)
    weights = {*checkpoint.files, checkpoint.index_file, checkpoint.config_file}
    copied = {n: resolve_inside(checkpoint.root, n) for n in sides.copy if n not in weights}
    notes = [f"left behind: {n} ({reason})" for n, reason in sides.left if n not in weights]
    notes += _tokenizer_notes(parts, copied, options)
    written: dict[str, bytes] = {}
    digest = None
    if checkpoint.config is not None and checkpoint.config_file is not None:
        config, changes = _new_config(checkpoint.config, planned, options)
        changes += _plain_config(config, started, options)
        digest = config_digest(config)
        notes += changes
        if changes:
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            written[checkpoint.config_file] = text.encode("utf-8")
        else:
            copied[checkpoint.config_file] = resolve_inside(checkpoint.root, checkpoint.config_file)
    notes += quantisation_notes(checkpoint.on_disk)
    nbytes = sum(path.stat().st_size for path in copied.values()) + sum(map(len, written.values()))
    return SideOutputs(
        copied=copied, written=written, config_digest=digest, notes=tuple(notes), nbytes=nbytes
    )


def _tokenizer_notes(parts: Sequence[Part], copied: dict[str, Path], options: MergeOptions) -> list[str]:
    """Takes the adapters' tokenizers if asked; says so, or says that they were not taken."""
    notes = []
    for part in parts:
        root = part.opened.files.root
        own = [name for name in part.opened.files.other if is_tokenizer_file(name)]
        if not own:
            continue
        differing = [name for name in own if not _same_content(root, name, copied.get(name))]
        if not differing:
            continue
        if options.adapter_tokenizer:
            copied.update({name: resolve_inside(root, name) for name in own})
            notes.append(f"taken from {part.label} instead of the base: {', '.join(sorted(differing))}")
        else:
            notes.append(
                f"{part.label} has its own {', '.join(sorted(differing))}; "
                "the base's are kept (--adapter-tokenizer takes the adapter's)"
            )
    return notes


def _same_content(root: Path, name: str, other: Path | None) -> bool:
    if other is None:
        return False
    own = resolve_inside(root, name)
    return own.stat().st_size == other.stat().st_size and own.read_bytes() == other.read_bytes()


def _new_config(
    config: Mapping[str, Any], planned: MergePlan, options: MergeOptions
) -> tuple[dict[str, Any], list[str]]:
    """Returns the config of the output and what was changed in it; the order of its keys stays."""
    new = json.loads(json.dumps(config))
    notes = []
    if planned.ties.config_unties:
        holders = [part for part in (new, text_config(new)) if "tie_word_embeddings" in part] or [new]
        for holder in holders:
            holder["tie_word_embeddings"] = False
        notes.append("config: tie_word_embeddings is false now")
    if planned.rows is not None:
        holder = new if "vocab_size" in new else text_config(new)
        if holder.get("vocab_size") != planned.rows:
            notes.append(f"config: vocab_size {holder.get('vocab_size')} -> {planned.rows}")
            holder["vocab_size"] = planned.rows
    if options.dtype is not None:
        for holder in (new, text_config(new)):
            key = "dtype" if "dtype" in holder else "torch_dtype"
            if key in holder and holder[key] != options.dtype:
                notes.append(f"config: {key} {holder[key]} -> {options.dtype}")
                holder[key] = options.dtype
    return new, notes


def _plain_config(config: dict[str, Any], started: MergeBase, options: MergeOptions) -> list[str]:
    """Takes the quantisation out of the config of an output that is not quantised, and says so."""
    if started.onto != "dequantized" or started.scheme is None:
        return []
    notes = []
    for holder in {id(part): part for part in (config, text_config(config))}.values():
        if holder.pop("quantization_config", None) is not None:
            notes.append("config: quantization_config is taken out, the weights are not quantised any more")
        # A loader that takes the config's dtype would round the weights again.
        compute = _NAMES.get(started.scheme.compute_dtype or "")
        key = "dtype" if "dtype" in holder else "torch_dtype"
        if (
            options.dtype is None
            and compute is not None
            and holder.get(key) not in (None, compute, "float32")
        ):
            notes.append(f"config: {key} {holder[key]} -> {compute}, that of the dequantised weights")
            holder[key] = compute
    return notes


def index_text(checkpoint: Checkpoint, plan: Plan) -> bytes:
    """Returns the index of the output: the base's metadata with the sizes that are true now, names sorted."""
    metadata = dict(checkpoint.index_metadata)
    metadata["total_size"] = sum(spec.nbytes for step in plan.steps for spec, _ in step.written)
    if "total_parameters" in metadata and not any(step.packed for step in plan.steps):
        metadata["total_parameters"] = sum(step.output.elements for step in plan.steps)
    weight_map = dict(sorted((spec.name, file) for step in plan.steps for spec, file in step.written))
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n").encode("utf-8")
