"""NF4 of bitsandbytes: quantiles of the normal distribution times a scale for each block of weights.

The scales may be quantised as well (double quantisation).

Source: Dettmers et al. 2023, arXiv:2305.14314, §3 and appendix E (the values); bitsandbytes 0.50.2,
``functional.quantize_4bit`` and its CPU kernels.
"""

from __future__ import annotations

from adapterhub_tools.quant._code_book import CodeBook
from adapterhub_tools.quant._four_bit import FourBit

IMPLEMENTATION = FourBit(
    book=CodeBook(
        values=(
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ),
        order=tuple(range(16)),
    )
)
