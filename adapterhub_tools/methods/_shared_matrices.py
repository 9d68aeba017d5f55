"""What VeRA and PVeRA have in common: trained vectors b and d around random A and B that all modules share.

W' = W + (b ∘ B)·(d ∘ A). Not a method of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from adapterhub_tools.errors import Problem
from adapterhub_tools.linalg.surd import Surd, scaling_of
from adapterhub_tools.linalg.weight import Weight
from adapterhub_tools.model import hyperparameters as read
from adapterhub_tools.model.misfit import misfit_matrix, wrong_factor
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.low_rank import LowRankTerm

Own = TypeVar("Own", bound="SharedMatrices")


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMatrices:
    """The hyperparameters of such a module.

    The tolerance is that of the random numbers: given A and B, the result is correctly rounded for factors
    up to float32.

    Attributes:
        rank: r, positive.
        seed: of A and B where they are not stored (``projection_prng_key``).
        extent: the largest out and in of the adapted modules, where A and B are not stored.
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "tolerance"
    additive: ClassVar[bool] = True
    made: ClassVar[tuple[str, ...]] = ("shared_A", "shared_B")
    parts: ClassVar[int]
    """How many vectors of r values d is made of, and A of as many times r rows; the first ones count."""

    rank: int
    seed: Any = None
    extent: tuple[int, int] | None = None
    multiplier: float = 1.0

    @classmethod
    def from_hparams(cls: type[Own], hparams: Mapping[str, Any]) -> Own:
        """Reads the hyperparameters of a target module; others in the mapping do not enter the maths."""
        extent = hparams.get("extent")
        return cls(
            rank=read.integer(hparams, "rank"),
            seed=hparams.get("projection_prng_key"),
            extent=None if extent is None else (extent[0], extent[1]),
            multiplier=hparams.get("multiplier", 1.0),
        )

    @property
    def scale(self) -> Surd:
        """The multiplier, exactly."""
        return scaling_of(1.0, 1, "alpha", self.multiplier)

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Compares the factors' shapes with the base weight's.

        Args:
            factors: ``"lambda_b"`` (out,), ``"lambda_d"`` (parts·rank,); ``"shared_A"`` (parts·rank, at least
                in) and ``"shared_B"`` (at least out, rank) where they are stored.
            kind: ``"linear"`` or ``"conv1d"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        b, d = factors["lambda_b"], factors["lambda_d"]
        high = self.parts * self.rank
        if d.shape != (high,):
            return (wrong_factor(module, d, f"{'twice ' * (self.parts == 2)}the rank, [{high}]"),)
        if len(b.shape) != 1:
            return (wrong_factor(module, b, "one axis"),)
        found = misfit_matrix(module, base, kind, b.shape[0], None)
        if found:
            return found
        inner = base.shape[1] if kind == "linear" else base.shape[0]
        a, up = factors.get("shared_A"), factors.get("shared_B")
        if (a is None) != (up is None):
            return (wrong_factor(module, a or up or d, "both random matrices beside it, or neither"),)
        if a is not None and (len(a.shape) != 2 or a.shape[0] != high or a.shape[1] < inner):
            found += (wrong_factor(module, a, f"[{high}, at least {inner}]"),)
        if up is not None and (len(up.shape) != 2 or up.shape[1] != self.rank or up.shape[0] < b.shape[0]):
            found += (wrong_factor(module, up, f"[at least {b.shape[0]}, {self.rank}]"),)
        return found

    def random_names(
        self,
        factors: Mapping[str, Any],
        shape: tuple[int, int],  # noqa: ARG002 - the largest modules decide
    ) -> tuple[str, ...]:
        """Returns the names of the random tensors that the file leaves out."""
        return tuple(role for role in self.made if role not in factors)

    def random_tensors(
        self,
        factors: Mapping[str, Any],  # noqa: ARG002 - only the hyperparameters enter
        shape: tuple[int, int],  # noqa: ARG002 - the largest modules decide
    ) -> dict[str, Tensor]:
        """Makes A and B from the seed, as PEFT does: float32, A (parts·rank, in), then B (out, rank).

        Raises:
            UnsupportedError: the seed is no integer.
        """
        from adapterhub_tools.linalg.projections import shared_matrices
        from adapterhub_tools.linalg.random_stream import check_seed

        seed = check_seed(self.seed, "projection_prng_key")
        if self.extent is None:
            raise ValueError("the extent of the random matrices is known only with the base")
        return shared_matrices(self.extent, (self.parts * self.rank, self.rank), seed)

    def delta(self, factors: Mapping[str, Tensor], weight: Weight) -> LowRankTerm:
        """Returns the delta (b ∘ B)·(d ∘ A) as a product in the stored layout.

        Shapes: see ``check``; (out, in), or (in, out) for ``conv1d``.
        Dtype:  any float in; float64 factors out.
        Memory: 8 bytes per value of b ∘ B and d ∘ A, and 4 for A and B.
        """
        from adapterhub_tools.linalg.projections import vectors_term

        shared = factors
        if self.random_names(factors, (0, 0)):
            shared = self.random_tensors(factors, (0, 0))
        vectors = {"lambda_b": factors["lambda_b"], "lambda_d": factors["lambda_d"][: self.rank]}
        return vectors_term(vectors, shared, weight, self.scale)
