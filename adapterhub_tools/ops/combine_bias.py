"""What adapters add to biases (PEFT's ``lora_bias``), summed beside the combined deltas.

PEFT has one ``lora_bias`` for all modules of an adapter, and merges such a module only where the base's layer
has a bias (peft/tuners/lora/layer.py, ``merge``). Adapters that add to biases are therefore combined with
others in one of two forms: as ``lora_bias`` where every layer has a bias, else with the sums added to the
base's biases, which are carried in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterhub_tools.errors import MismatchError, escape
from adapterhub_tools.model.adapter import FullTensor, TargetModule
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.ops.combine_full import Carried, CombinedFull, Held, SumContent
from adapterhub_tools.ops.combine_inputs import CombineInput
from adapterhub_tools.ops.combine_modules import Joint
from adapterhub_tools.ops.combine_work import Combined, Work
from adapterhub_tools.ops.low_rank import RULES, scale_of
from adapterhub_tools.ops.shrink_report import ModuleReport
from adapterhub_tools.ops.to_lora import shaped

if TYPE_CHECKING:
    from torch import Tensor


def bias_sums(inputs: Sequence[CombineInput], joints: Sequence[Joint]) -> dict[str, Tensor]:
    """Returns Σ w_i·s_i·b_i for each module to whose bias an adapter adds.

    Args:
        inputs: the adapters.
        joints: the modules.

    Returns:
        Path -> float64, shape (out,).
    """
    import torch

    found = {}
    for joint in joints:
        members = [m for m in joint.members if m.plain and "bias" in m.module.factors]
        if not members:
            continue
        total = torch.zeros(joint.shape[0], dtype=torch.float64)
        for member in members:
            weight = joint.weights[member.index]
            if weight != 0:
                values = inputs[member.index].loader.load(member.module.factors["bias"])
                total.add_(values.double(), alpha=weight * float(scale_of(member.module)))
        found[joint.path] = total
    return found


def biases_in_full(
    inputs: Sequence[CombineInput], joints: Sequence[Joint], sums: Mapping[str, Tensor]
) -> bool:
    """Says whether the sums have to be carried in full: where a layer among the targets has no bias.

    Args:
        inputs: the adapters.
        joints: the modules.
        sums: what ``bias_sums`` gave.

    Raises:
        MismatchError: without a base nobody knows.
    """
    others = [joint for joint in joints if joint.path not in sums and joint.kind != "embedding"]
    if not sums or not others:
        return False
    if inputs[0].effects is None:
        raise MismatchError.of(
            "base",
            f"an adapter adds to the bias of {escape(next(iter(sums)))} (lora_bias), and PEFT expects that "
            f"of every module; but whether {escape(others[0].path)} has a bias, only the base tells.",
            loc="--base",
            remedy="Give --base with the base that the adapters were trained on.",
        )
    return any(_stored_bias(inputs, joint) is None for joint in others)


def add_in_full(
    inputs: Sequence[CombineInput],
    joints: Sequence[Joint],
    sums: Mapping[str, Tensor],
    carried: Mapping[str, Sequence[Carried]],
    work: Work,
    full: CombinedFull,
) -> None:
    """Adds the sums to the base's biases, or to what the adapters make of these, and carries them in full.

    Args:
        inputs: the adapters.
        joints: the modules.
        sums: what ``bias_sums`` gave.
        carried: what adapters carry in full.
        work: the combination.
        full: what became of that; the biases are added to it.
    """
    for joint in joints:
        if joint.path not in sums:
            continue
        name = f"{joint.path}.bias"
        added = (1.0, Held(sums[joint.path].reshape(-1, 1)))
        own = next((item for item in full.full if item.target == name), None)
        stored, effects = _stored_bias(inputs, joint), inputs[0].effects
        if own is not None:
            full.full.remove(own)
            content = work.tensors.contents.pop(own.tensor.name)
            same = ((1.0, carried[name][0].values),)
            terms = content.terms if isinstance(content, SumContent) else same
        elif stored is not None and effects is not None:
            terms = ((1.0, effects.base.stored_rows(stored)),)
        else:
            raise ValueError(f"{name} was fitted to the base, which lacks it")
        spec = TensorSpec(name=name, dtype=work.dtype, shape=(int(joint.shape[0]),))
        work.tensors.contents[name] = SumContent(terms=(*terms, added), spec=spec)
        full.full.append(FullTensor(target=name, role="bias", tensor=spec))
        full.kept.append((name, "lora_bias, carried in full, since not every target has a bias in the base"))


def with_biases(work: Work, joint: Joint, done: Combined, sums: Mapping[str, Tensor]) -> Combined:
    """Adds Σ w_i·s_i·b_i over the scale of the combined module, under every method.

    Where one module has such a bias, PEFT expects one in every module, so others get zeros. A module whose
    combined delta is zero stays, at rank 1, if its bias does not.

    Args:
        work: the combination.
        joint: the module.
        done: what became of its weight.
        sums: path -> what is added to its bias; none where they are carried in full.
    """
    import torch

    if joint.kind == "embedding" or not sums:
        return done
    total = sums.get(joint.path)
    if total is None:
        total = torch.zeros(joint.shape[0], dtype=torch.float64)
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


def _stored_bias(inputs: Sequence[CombineInput], joint: Joint) -> str | None:
    """Returns the name of the bias of a module in the base; None where it has none."""
    effects = inputs[joint.members[0].index].effects
    target = joint.members[0].target
    if effects is None or target is None:
        return None
    name = f"{target.name.removesuffix('weight')}bias"
    return name if target.name.endswith(".weight") and name in effects.base.checkpoint.tensors else None


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
