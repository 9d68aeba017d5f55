"""RandLoRA: W' = W + s·Σ B·λ·A·γ, with full-rank sums of random bases A and B, s = alpha / rank.

Source: Albert et al. 2025, arXiv:2502.00987; peft/tuners/randlora/layer.py, ``get_scaled_bases``. A lies on
the smaller side of the weight: where that is the output, the delta is the transpose. As in PEFT, place t of
the flattened (basis, rank) of B meets place t of the flattened (rank, basis) of λ·A·γ; the paper pairs them
by basis and rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import Problem
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model import hyperparameters as read
from adapterhub_tools.model.misfit import misfit_matrix, wrong_factor
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.computed_term import ComputedTerm

_STRIP_VALUES = 1 << 20
"""Values of scaled bases made at a time: 8 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RandLoRA:
    """The hyperparameters of a RandLoRA module.

    The random bases must be stored: PEFT makes them in the 16-bit type that the processor of the training
    run supports, and divides them by a deviation that depends on the order of a sum, so a seed does not tell
    them. The error of an element is at most (r·n + 6)·2⁻⁵³·s·Σ|B|·|λ|·|A|·|γ| for n bases of rank r.

    Attributes:
        rank: r, positive.
        alpha: as the config's JSON number.
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "tolerance"
    additive: ClassVar[bool] = True
    row_roles: ClassVar[tuple[str, ...]] = ("shared_B",)
    rank: int
    alpha: float
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any]) -> RandLoRA:
        """Reads the hyperparameters of a target module; others in the mapping do not enter the maths."""
        return cls(
            rank=read.integer(hparams, "rank"),
            alpha=read.number(hparams, "alpha"),
            multiplier=hparams.get("multiplier", 1.0),
        )

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the factors' shapes with the base weight's.

        Args:
            factors: ``"lambda"`` (rank, n), ``"gamma"`` (n, small); ``"shared_A"`` (rank, 1, at least small)
                and ``"shared_B"`` (at least large, at least n, rank), small and large being the sides of W.
            kind: ``"linear"`` or ``"conv1d"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        found = misfit_matrix(module, base, kind, None, None)
        if found:
            return found
        small, large = sorted(base.shape)
        count = -(-small // self.rank)
        a, b = factors.get("shared_A"), factors.get("shared_B")
        for role, shape in (("lambda", (self.rank, count)), ("gamma", (count, small))):
            if factors[role].shape != shape:
                return (
                    wrong_factor(module, factors[role], f"{list(shape)} for a {small} by {large} weight"),
                )
        if a is None or b is None:
            return (wrong_factor(module, factors["lambda"], "randlora_A and randlora_B in the file"),)
        if len(a.shape) != 3 or a.shape[:2] != (self.rank, 1) or a.shape[2] < small:
            return (wrong_factor(module, a, f"[{self.rank}, 1, at least {small}]"),)
        if len(b.shape) != 3 or b.shape[0] < large or b.shape[1] < count or b.shape[2] != self.rank:
            return (wrong_factor(module, b, f"[at least {large}, at least {count}, {self.rank}]"),)
        return ()

    def delta(self, factors: Mapping[str, Any], weight: Weight) -> ComputedTerm:
        """Returns the delta, computed row by row.

        Shapes: see ``check``; the delta is (out, in), or (in, out) for ``conv1d``.
        Dtype:  any float in; float64 out.
        Memory: 8 MiB for strips of the scaled bases, made again for each panel of 256 rows instead of being
            held (at rank r and n bases they have r·n rows), 2 KiB per column for the panel, and as much for
            the rows of ``shared_B`` that meet it; those are read from the file panel by panel.
        """
        import torch

        from adapterhub_tools.linalg.computed_term import PANEL_ROWS, ComputedTerm, PanelCache

        height, width = weight.rows, weight.columns
        strength = self.alpha / self.rank * self.multiplier
        scales: Tensor = factors["lambda"].double()
        weights: Tensor = factors["gamma"].double()
        small, large = sorted((height, width))
        inner = int(scales.numel())
        a: Tensor = factors["shared_A"][:, 0, :small].double()
        stored = factors["shared_B"]

        # Rows of W lie on the side of B where W is at least as high as wide; PEFT looks at (out, in), so a
        # square W has its outputs there.
        upright = height > width or (height == width and not weight.transposed)
        step = max(1, _STRIP_VALUES // stored.shape[1])
        # Blocks of this size, made and dropped thousands of times, would scatter over the heap.
        strip = a.new_empty(inner * max(step, PANEL_ROWS))
        made = a.new_empty(PANEL_ROWS, width)

        def bases(first: int, last: int) -> Tensor:
            """Returns rows of B with their bases side by side, as far as the weight has bases."""
            rows: Tensor = stored.read(first, last - first)[:, :inner]
            return rows

        def scaled_bases(first: int, last: int) -> Tensor:
            """Returns columns of A scaled by every λ and γ: r·n rows, those of one row of A together."""
            part = strip[: inner * (last - first)].view(*scales.shape, last - first)
            torch.mul(scales[:, :, None], a[:, None, first:last], out=part)
            part *= weights[None, :, first:last]
            return part.flatten(0, 1)

        def panel(first: int, last: int) -> Tensor:
            left = bases(first, last) if upright else scaled_bases(first, last).t().contiguous()
            for at in range(0, width, step):
                end = min(width, at + step)
                right = scaled_bases(at, end) if upright else bases(at, end).t()
                made[: last - first, at:end] = left @ right
            return made[: last - first].mul_(strength)

        def largest() -> Any:
            """Returns for each row of W at least the sum of |B|·|λ|·|A|·|γ| at every column."""
            parts = [(at, min(large, at + step)) for at in range(0, large, step)]
            if upright:
                # The largest of |A|·|γ| over the columns is at most the product of both.
                peaks = scales.abs() * a.abs().amax(dim=1)[:, None] * weights.abs().amax(dim=1)
                return torch.cat([bases(*part).abs_() @ peaks.flatten() for part in parts]).numpy()
            tops = torch.stack([bases(*part).abs_().amax(dim=0) for part in parts]).amax(dim=0)
            reach = (scales.abs() * tops.reshape(scales.shape)).t() @ a.abs()
            return (reach * weights.abs()).sum(dim=0).numpy()

        return ComputedTerm(
            rows=PanelCache(panel, height),
            height=height,
            width=width,
            largest=largest() * abs(strength),
        )


IMPLEMENTATION = RandLoRA
