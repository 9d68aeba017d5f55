"""PEFT's ``add_weighted_adapter`` on files: the same factors, errors of its method included.

For comparison only. What it gets wrong is told in docs/combine.md: types that work on factors have cross
terms, and the new adapter keeps ``use_rslora`` with alpha = rank, so that it is √rank times too strong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterhub_tools.errors import MismatchError, Problem, UnsupportedError, escape
from adapterhub_tools.model.adapter import TargetModule
from adapterhub_tools.model.tensor import DTYPE_NAMES
from adapterhub_tools.ops.combine_inputs import CombineInput
from adapterhub_tools.ops.combine_modules import Joint
from adapterhub_tools.ops.combine_options import CombineOptions
from adapterhub_tools.ops.low_rank import RULES, Tensors
from adapterhub_tools.ops.peft_order import draw_initialisation, module_order
from adapterhub_tools.ops.shrink_report import ModuleReport

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_OWN = "Combine deltas instead, which is the default."


class FactorWork:
    """Repeats ``add_weighted_adapter``.

    Args:
        inputs: the adapters, in the order given.
        options: see CombineOptions; the weights in the same order.
        tensors: takes what is computed.

    Attributes:
        notes: what is to be told.
        rank: the rank that PEFT gives the new adapter.
        rule: the rule of its scale, that of the first adapter.
    """

    def __init__(self, inputs: Sequence[CombineInput], options: CombineOptions, tensors: Tensors) -> None:
        """Checks what PEFT checks.

        Raises:
            UnsupportedError: no such type, or adapters that PEFT's method has no meaning for.
            MismatchError: an option is missing or is none of it, or ranks differ.
        """
        self.inputs: Sequence[CombineInput] = inputs
        self.options: CombineOptions = options
        self.tensors: Tensors = tensors
        self.notes: list[str] = []
        self._density, self._majority = _hparams(options)
        _check_inputs(inputs, dropped=options.full == "drop")
        self.config: dict[str, Any] = inputs[0].opened.adapter.unparsed.get("config", {})
        self.rule: str = RULES[1] if self.config.get("use_rslora") is True else RULES[0]
        self.bias: bool = self.config.get("lora_bias") is True
        self.rank: int = self._new_rank()
        if self.rule == RULES[1]:
            self.notes.append(
                "PEFT keeps use_rslora and sets alpha to the rank, so this adapter is √rank times too strong"
            )

    def run(self, joints: Sequence[Joint]) -> list[tuple[TargetModule, ModuleReport]]:
        """Combines the modules in PEFT's order, with PEFT's random numbers."""
        import torch

        generator = torch.Generator().manual_seed(self.options.seed)
        by_path = {joint.path: joint for joint in joints}
        order = [by_path[path] for path in module_order(list(by_path), self._model_type())]
        if self.options.method.startswith("dare"):
            self._initialise(order, generator)
        return [self._combine(joint, generator) for joint in order]

    def _initialise(self, order: Sequence[Joint], generator: torch.Generator) -> None:
        init = self.config.get("init_lora_weights", True)
        if not isinstance(init, bool) and init != "gaussian":
            self.notes.append(
                f"init_lora_weights is {escape(init)}, whose random numbers are not repeated, so the masks "
                "are others than PEFT's"
            )
            return
        for joint in order:
            a, b = self._shapes(joint)
            draw_initialisation(
                generator, a, b, embedding=joint.kind == "embedding", bias=self.bias, init=init
            )
        self.notes.append(
            f"masks: those of torch.manual_seed({self.options.seed}) before add_weighted_adapter on the CPU, "
            f"if the model registers its modules in this order: {_shown([joint.path for joint in order])}"
        )

    def _combine(self, joint: Joint, generator: torch.Generator) -> tuple[TargetModule, ModuleReport]:
        from adapterhub_tools.linalg.factor_arithmetic import (
            ON_FACTORS,
            arithmetic,
            factor_weights,
            truncated,
        )

        method = self.options.method
        weights = [joint.weights[member.index] for member in joint.members]
        factors = [self._load(joint, index) for index in range(len(joint.members))]
        scales = [scale for _, _, scale in factors]

        def combined(tensors: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
            return arithmetic(
                method.removesuffix("_svd"),
                tensors,
                counts,
                density=self._density,
                majority_sign=self._majority,
                generator=generator,
            )

        if method == "cat":
            b, a = self._concatenated(joint, factors, weights)
        elif method in ON_FACTORS:
            self._same_ranks(joint, [a for _, a, _ in factors])
            for_a, for_b = factor_weights(weights, scales)
            a = combined([a for _, a, _ in factors], for_a)
            b = combined([b for b, _, _ in factors], for_b)
        else:
            deltas = [_delta(joint, b, a, scale) for b, a, scale in factors]
            whole = combined(deltas, weights)
            b, a = truncated(whole.t() if joint.kind in ("conv1d", "embedding") else whole, self.rank)
        return self._module(joint, b, a)

    def _load(self, joint: Joint, place: int) -> tuple[Tensor, Tensor, float]:
        """Returns B and A as float32 matrices, and the scale as PEFT has it."""
        member = joint.members[place]
        loader, module = self.inputs[member.index].loader, member.module
        b, a = (loader.load(module.factors[role]).float().flatten(1) for role in ("B", "A"))
        rank, alpha = module.hparams["rank"], float(module.hparams["alpha"])
        rslora = module.hparams.get("scaling", RULES[0]) == RULES[1]
        return b, a, alpha / rank**0.5 if rslora else alpha / rank

    def _concatenated(
        self, joint: Joint, factors: Sequence[tuple[Tensor, Tensor, float]], weights: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Returns the factors side by side, with zeros up to the rank that all adapters would need."""
        import torch

        out, inward = joint.shape
        b, a = torch.zeros(out, self.rank), torch.zeros(self.rank, inward)
        at = 0
        for (left, right, scale), weight in zip(factors, weights, strict=True):
            b[:, at : at + left.shape[1]] = left
            a[at : at + right.shape[0]] = right * weight * scale
            at += int(right.shape[0])
        return b, a

    def _module(self, joint: Joint, b: Tensor, a: Tensor) -> tuple[TargetModule, ModuleReport]:
        import torch

        from adapterhub_tools.linalg.factored_svd import product_norm
        from adapterhub_tools.ops.to_lora import shaped

        rank = int(a.shape[0])
        dtype = DTYPE_NAMES[self.options.dtype or "float32"]
        shaped_b, shaped_a = shaped(b, a, joint.kind, joint.weight_shape)
        factors = {
            role: self.tensors.put(values.double(), dtype, f"{joint.path}.{role}")[0]
            for role, values in (("A", shaped_a), ("B", shaped_b))
        }
        if self.bias and joint.kind != "embedding":
            zeros = torch.zeros(joint.shape[0], dtype=torch.float64)
            factors["bias"] = self.tensors.put(zeros, dtype, f"{joint.path}.bias of B")[0]
        norm = product_norm(b, a) * (rank**0.5 if self.rule == RULES[1] else 1.0)
        hparams = {"rank": rank, "alpha": float(rank), "scaling": self.rule}
        module = TargetModule(
            path=joint.path, method="lora", kind=joint.kind, hparams=hparams, factors=factors
        )
        report = ModuleReport(
            path=joint.path, kind=joint.kind, rank_before=None, rank=rank, norm=norm, energy=1.0, error=0.0
        )
        return module, report

    def _shapes(self, joint: Joint) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out, inward = joint.shape
        if joint.kind == "conv2d":
            kernel = joint.weight_shape[1:]
            return (self.rank, *kernel), (out, self.rank, 1, 1)
        return (self.rank, inward), (out, self.rank)

    def _new_rank(self) -> int:
        from adapterhub_tools.linalg.factor_arithmetic import ON_FACTORS

        ranks = [
            max([int(m.hparams["rank"]) for m in i.opened.adapter.modules] + [_config_rank(i)])
            for i in self.inputs
        ]
        policy = self.options.policy
        if policy is not None and (
            policy.name != "rank" or policy.value is None or policy.patterns or not self._takes_rank
        ):
            raise MismatchError.of(
                "policy",
                f"{self.options.method} of PEFT takes no such policy.",
                remedy="Give --rank N, for types that end in svd, or nothing.",
            )
        if self.options.method == "cat":
            return sum(ranks)
        if self.options.method in ON_FACTORS:
            if len(set(ranks)) > 1:
                raise MismatchError.of(
                    "rank",
                    f"the adapters have the ranks {', '.join(map(str, ranks))}; {self.options.method} on "
                    "factors needs one.",
                    remedy=_OWN,
                )
            return ranks[0]
        return max(ranks) if policy is None or policy.value is None else int(policy.value)

    @property
    def _takes_rank(self) -> bool:
        return self.options.method.endswith("svd")

    def _same_ranks(self, joint: Joint, factors: Sequence[Tensor]) -> None:
        if len({int(a.shape[0]) for a in factors}) > 1:
            raise MismatchError.of(
                "rank",
                f"its ranks differ: {', '.join(str(int(a.shape[0])) for a in factors)}; "
                f"{self.options.method} on factors needs one.",
                loc=joint.path,
                remedy=_OWN,
            )

    def _model_type(self) -> str | None:
        for item in self.inputs:
            if item.effects is not None:
                found = (item.effects.base.checkpoint.config or {}).get("model_type")
                return found if isinstance(found, str) else None
            if item.opened.manifest is not None and item.opened.manifest.base.architecture is not None:
                return item.opened.manifest.base.architecture
        return None


def _hparams(options: CombineOptions) -> tuple[float, str]:
    """Returns density and majority sign, checked."""
    from adapterhub_tools.linalg.factor_arithmetic import TYPES

    method, given = options.method, dict(options.hparams)
    if method not in TYPES:
        raise UnsupportedError.of(
            "method",
            f"PEFT has no combination type {escape(repr(method))}; it has {', '.join(sorted(TYPES))}.",
            loc="--method",
            remedy=_OWN,
        )
    density, majority = given.pop("density", None), given.pop("majority_sign", "total")
    prunes = method.startswith(("ties", "dare", "magnitude"))
    if prunes and (density is None or not 0 < density <= 1):
        raise MismatchError.of(
            "option",
            f"{method} needs a density above 0, up to 1; found {density}.",
            loc="--density",
            remedy="Give --density.",
        )
    if given or (density is not None and not prunes):
        name = next(iter(given), "density")
        raise MismatchError.of(
            "option",
            f"PEFT's {method} has no {name}.",
            loc=f"--{name}",
            remedy=f"Leave --{name} out.",
        )
    return (1.0 if density is None else float(density)), str(majority)


def _check_inputs(inputs: Sequence[CombineInput], *, dropped: bool) -> None:
    problems = []
    for item in inputs:
        if not item.plain:
            message = f"PEFT combines the factors of {item.opened.adapter.method} as if it were LoRA."
            problems.append(Problem(kind="method", file=item.label, message=message, remedy=_OWN))
        if item.opened.adapter.full and not dropped:
            message = "PEFT does not combine tensors that are carried in full."
            problems.append(
                Problem(
                    kind="full",
                    file=item.label,
                    loc=item.opened.adapter.full[0].target,
                    message=message,
                    remedy="Leave them out with --full drop.",
                )
            )
    if problems:
        raise UnsupportedError(*problems)


def _config_rank(item: CombineInput) -> int:
    rank = item.opened.adapter.unparsed.get("config", {}).get("r", 0)
    return rank if isinstance(rank, int) else 0


def _delta(joint: Joint, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """Returns s·B·A in the stored layout, in which PEFT trims and drops."""
    if joint.kind == "convnd":
        raise UnsupportedError.of(
            "conv", "PEFT takes only two-dimensional convolutions apart.", loc=joint.path, remedy=_OWN
        )
    product = b @ a
    return (product.t() if joint.kind in ("conv1d", "embedding") else product) * scale


def _shown(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:8])
    return f"{shown}, and {len(paths) - 8} more" if len(paths) > 8 else shown
