"""What FourierFT and WaveFT have in common: trained values at places of the weight that a seed chooses.

Not a method of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

from adapterhub_tools.errors import Problem
from adapterhub_tools.model.misfit import misfit_matrix, wrong_factor
from adapterhub_tools.model.tensor import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomPlaces:
    """The hyperparameters of such a module; the number of values is that of the tensor.

    Attributes:
        scale: s.
        seed: of the places.
        multiplier: the caller's factor on the delta.
    """

    guarantee: ClassVar[str] = "tolerance"
    additive: ClassVar[bool] = True
    scale: float
    seed: Any
    multiplier: float = 1.0

    def check(
        self, factors: Mapping[str, TensorSpec], kind: str, base: TensorSpec, module: str
    ) -> tuple[Problem, ...]:
        """Checks that the weight has room for the values.

        Args:
            factors: ``"spectrum"`` (n,).
            kind: ``"linear"`` or ``"conv1d"``.
            base: the base weight as stored.
            module: the module's path, for the message.
        """
        spectrum = factors["spectrum"]
        if len(spectrum.shape) != 1 or spectrum.elements > prod(base.shape):
            return (wrong_factor(module, spectrum, f"one axis of at most {prod(base.shape)} values"),)
        return misfit_matrix(module, base, kind, None, None)

    def random_names(self, factors: Mapping[str, Any], shape: tuple[int, int]) -> tuple[str, ...]:
        """Returns the name of the random places, which says what they are made from."""
        return (f"places/{self.seed}/{shape[0]}/{shape[1]}/{factors['spectrum'].shape[0]}",)

    def random_tensors(self, factors: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, Tensor]:
        """Makes the places from the seed, as PEFT does: row · in + column of each.

        Args:
            factors: ``"spectrum"``, a tensor or its description.
            shape: (out, in).

        Raises:
            UnsupportedError: the seed is no integer.
        """
        from adapterhub_tools.linalg.random_stream import check_seed, permutation_head

        seed = check_seed(self.seed, "random_loc_seed")
        flat = permutation_head(shape[0] * shape[1], int(factors["spectrum"].shape[0]), seed)
        return {self.random_names(factors, shape)[0]: flat}
