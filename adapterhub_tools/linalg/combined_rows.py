"""Several deltas of one tensor combined element by element, in panels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from adapterhub_tools.linalg.panels import panel_range, panels_of

if TYPE_CHECKING:
    from torch import Tensor

    from adapterhub_tools.linalg.panels import Panels


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaInput:
    """One delta to be combined.

    Attributes:
        delta: its values, with the caller's weight already in them unless the method weighs itself.
        key: who it belongs to, for random numbers and for the order in which inputs are added up.
        weight: the caller's weight.
    """

    delta: Panels
    key: bytes
    weight: float = 1.0


class ElementWise(Protocol):
    """A way to combine deltas element by element: what a file of combine/ implements."""

    def check(self, count: int) -> None:
        """Raises ValueError unless so many adapters can be combined."""
        ...

    def prepare(self, inputs: Sequence[DeltaInput], name: str) -> Any:
        """Reads what has to be known of the whole deltas first.

        Args:
            inputs: the deltas.
            name: the tensor, for random numbers.
        """
        ...

    def apply(self, state: Any, deltas: list[Tensor], first: int) -> Tensor:
        """Returns some rows of the combined delta.

        Args:
            state: what ``prepare`` gave.
            deltas: the same rows of each input, float64, shape (n, columns); they may be overwritten, and
                the result may be one of them.
            first: which row of the matrix is the first.
        """
        ...


class WeightedSum:
    """The sum of deltas whose weights are in them already; an ElementWise."""

    def check(self, count: int) -> None:
        """Accepts any number."""

    def prepare(self, inputs: Sequence[DeltaInput], name: str) -> None:
        """Has nothing to read; see ElementWise."""

    def apply(
        self,
        state: None,  # noqa: ARG002 - see ElementWise
        deltas: list[Tensor],
        first: int,  # noqa: ARG002 - nothing depends on the place
    ) -> Tensor:
        """Returns some rows of the sum; see ElementWise."""
        return added(deltas)


def added(deltas: list[Tensor]) -> Tensor:
    """Adds all deltas to the first, in place, and returns it."""
    total = deltas[0]
    for delta in deltas[1:]:
        total.add_(delta)
    return total


class CombinedRows:
    """The combined delta of one tensor; Panels but for ``points``, and so RowBlocks.

    The result does not depend on the order of the inputs, on blocks or on threads.

    Args:
        method: how to combine.
        inputs: the deltas, at least one, all of one shape.
        name: the tensor, for random numbers.
    """

    def __init__(self, method: ElementWise, inputs: Sequence[DeltaInput], name: str) -> None:
        """Reads what the method has to know first."""
        self._method = method
        self._inputs = sorted(inputs, key=lambda item: (item.key, item.weight))
        self.shape: tuple[int, int] = self._inputs[0].delta.shape
        self._state = method.prepare(self._inputs, name)

    def panel(self, number: int) -> Tensor:
        """Returns a panel; see Panels."""
        deltas = [item.delta.panel(number) for item in self._inputs]
        return self._method.apply(self._state, deltas, panel_range(number, self.shape)[0])

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, panel) in order; see RowBlocks."""
        for number in range(panels_of(self.shape)):
            yield panel_range(number, self.shape)[0], self.panel(number)
