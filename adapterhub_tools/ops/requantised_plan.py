"""From a plan onto dequantised weights to one that writes the base's own quantised format.

Weights that no adapter changes keep their bytes. A changed weight is merged, rounded once to the dtype that
it had before it was quantised, and quantised again with new scales: what a loader would make of the merged
weight in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from adapterhub_tools import registry
from adapterhub_tools.errors import MismatchError
from adapterhub_tools.model.packed import PackedOutput, PlacedTensor
from adapterhub_tools.model.plan import OutputFile, Step
from adapterhub_tools.model.quant_scheme import QuantizedTensor
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.ops.merge_options import MergeOptions
from adapterhub_tools.ops.merge_plan import MergePlan
from adapterhub_tools.store.checkpoint import Checkpoint
from adapterhub_tools.store.layout import build_file


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A tensor of the output: the step that writes it, and its role if that step writes several."""

    spec: TensorSpec
    step: Step
    role: str | None = None


def requantised(
    planned: MergePlan, stored: Checkpoint, weights: Mapping[str, QuantizedTensor], options: MergeOptions
) -> MergePlan:
    """Returns the plan with the base's layout: every tensor where it is, and changed weights quantised.

    Args:
        planned: the merge onto the dequantised weights.
        stored: the base on disk.
        weights: its quantised weights.
        options: ``dtype`` must not be given.

    Raises:
        MismatchError: a dtype was asked for.
    """
    if options.dtype is not None:
        raise MismatchError.of(
            "onto-dtype",
            f"--dtype {options.dtype} was given, but a quantised output has the base's own format.",
            loc="--dtype",
            remedy="Leave --dtype out, or merge --onto dequantized.",
        )
    steps = {step.output.name: step for step in planned.plan.steps}
    owners = {part: name for name, weight in weights.items() for part in weight.part_names}
    files = {stored.uri(file): file for file in stored.files}
    drafts: dict[str, list[_Draft]] = {file: [] for file in stored.files}
    for name, tensor in stored.tensors.items():
        owner = owners.get(name)
        if owner is None:
            drafts[tensor.file].append(_Draft(spec=steps[name].output, step=steps[name]))
        elif steps[owner].action == "copy":
            item = stored.range_of(name)
            copy = Step(
                action="copy", start=item, output=item.spec, file=tensor.file, offset=0, base_name=name
            )
            drafts[tensor.file].append(_Draft(spec=item.spec, step=copy))
    for name, weight in weights.items():
        if steps[name].action != "copy":
            step = replace(steps[name], output=weight.spec)
            for role, spec in _part_specs(weight).items():
                drafts[files[weight.parts[role].uri]].append(_Draft(spec=spec, step=step, role=role))
    drafts[stored.files[-1]] += [_Draft(spec=steps[name].output, step=steps[name]) for name in planned.added]
    return _placed(planned, stored, weights, drafts)


def _placed(
    planned: MergePlan,
    stored: Checkpoint,
    weights: Mapping[str, QuantizedTensor],
    drafts: Mapping[str, list[_Draft]],
) -> MergePlan:
    """Lays the files out in the order of the base's tensors, and joins the parts of each weight."""
    order = {name: place for place, name in enumerate(stored.tensors)}
    plain: list[tuple[str, int, Step]] = []
    packed: dict[str, dict[str, PlacedTensor]] = {}
    steps: dict[str, Step] = {}
    files = []
    for file, items in drafts.items():
        items.sort(key=lambda draft: order.get(draft.spec.name, len(order)))
        header, offsets = build_file([draft.spec for draft in items], {"format": "pt"})
        length = len(header)
        for draft in items:
            offset = offsets[draft.spec.name]
            length = max(length, offset + draft.spec.nbytes)
            if draft.role is None:
                plain.append((file, offset, replace(draft.step, file=file, offset=offset)))
            else:
                name = draft.step.output.name
                steps[name] = draft.step
                place = PlacedTensor(spec=draft.spec, file=file, offset=offset)
                packed.setdefault(name, {})[draft.role] = place
        files.append(OutputFile(name=file, header=header, length=length))
    for name, parts in packed.items():
        data = parts["data"]
        output = PackedOutput(scheme=weights[name].scheme, parts=parts)
        step = replace(steps[name], file=data.file, offset=data.offset, packed=output)
        plain.append((data.file, data.offset, step))
    plain.sort(key=lambda item: item[:2])
    ordered = tuple(step for _, _, step in plain)
    read = {step.base_name for step in ordered}
    plan = replace(
        planned.plan,
        steps=ordered,
        files=tuple(files),
        digest_only=tuple(item for item in planned.plan.digest_only if item.spec.name not in read),
    )
    return replace(planned, plan=plan)


def _part_specs(weight: QuantizedTensor) -> dict[str, TensorSpec]:
    """Returns the parts of a weight after it was quantised again: those that the base has, by its names."""
    from adapterhub_tools.engine.buffers import torch_dtype

    codec = registry.load("quant", weight.scheme.format).IMPLEMENTATION
    encoder = codec.encoder(weight.scheme, weight.spec.shape, torch_dtype(weight.spec.dtype))
    made: dict[str, TensorSpec] = encoder.part_specs(weight.spec.name)
    return {
        role: replace(spec, name=weight.parts[role].spec.name)
        for role, spec in made.items()
        if role in weight.parts
    }
