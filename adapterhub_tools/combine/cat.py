"""The weighted sum of deltas, with the factors of all inputs one beside the other: ranks add up.

ΔW = Σ w_i·s_i·B_i·A_i = [k_1·B_1, …, k_n·B_n]·[A_1; …; A_n]·s with k_i = w_i·s_i/s. PEFT has it by this name
(peft/tuners/lora/model.py, ``add_weighted_adapter``); here the scales are those that act, rsLoRA's included.
"""

from __future__ import annotations

from dataclasses import dataclass

from adapterhub_tools.combine._weighted_sum import WeightedSum


@dataclass(frozen=True, slots=True, kw_only=True)
class Cat(WeightedSum):
    """The concatenation; it has no hyperparameters."""


IMPLEMENTATION = Cat
