"""What adapters add to biases (PEFT's ``lora_bias``), summed beside the combined deltas."""

from __future__ import annotations

from dataclasses import replace

from adapterhub_tools.model.adapter import TargetModule
from adapterhub_tools.ops.combine_modules import Joint
from adapterhub_tools.ops.combine_work import Combined, Work
from adapterhub_tools.ops.low_rank import RULES, scale_of
from adapterhub_tools.ops.shrink_report import ModuleReport
from adapterhub_tools.ops.to_lora import shaped


def with_biases(work: Work, joint: Joint, done: Combined) -> Combined:
    """Adds Σ w_i·s_i·b_i over the scale of the combined module, under every method.

    Where one module has such a bias, PEFT expects one in every module, so others get zeros. A module whose
    combined delta is zero stays, at rank 1, if its bias does not.

    Args:
        work: the combination.
        joint: the module.
        done: what became of its weight.
    """
    import torch

    if joint.kind == "embedding" or not work.has_biases:
        return done
    total = torch.zeros(joint.shape[0], dtype=torch.float64)
    for member in joint.members:
        weight = joint.weights[member.index]
        if member.plain and "bias" in member.module.factors and weight != 0:
            values = work.inputs[member.index].loader.load(member.module.factors["bias"])
            total.add_(values.double(), alpha=weight * float(scale_of(member.module)))
    if done.module is None:
        if not bool(total.any()):
            return done
        done = _zero(work, joint)
    module = done.module
    if module is None:
        return done
    scale = float(scale_of(module))
    spec, _ = work.tensors.put(total / scale, work.dtype, f"{joint.path}.bias of B")
    return replace(done, module=replace(module, factors={**module.factors, "bias": spec}))


def _zero(work: Work, joint: Joint) -> Combined:
    import torch

    out, inward = joint.shape
    b, a = shaped(torch.zeros(out, 1), torch.zeros(1, inward), joint.kind, joint.weight_shape)
    module = TargetModule(
        path=joint.path,
        method="lora",
        kind=joint.kind,
        hparams={"rank": 1, "alpha": 1.0, "scaling": RULES[0]},
        factors={
            "A": work.tensors.put(a.double(), work.dtype, f"{joint.path}.A")[0],
            "B": work.tensors.put(b.double(), work.dtype, f"{joint.path}.B")[0],
        },
    )
    report = ModuleReport(
        path=joint.path, kind=joint.kind, rank_before=None, rank=1, norm=0.0, energy=1.0, error=0.0
    )
    return Combined(module=module, report=report)
