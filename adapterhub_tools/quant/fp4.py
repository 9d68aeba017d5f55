"""FP4 of bitsandbytes: sign, two exponent bits and one of fraction, times a scale for each block of weights.

The scales may be quantised as well (double quantisation). By their bits the
magnitudes are 0, 0.0625, 8, 12, 4, 6, 2 and 3, divided by 12. The zero with a sign is a code of its own,
which small positive values get.

Source: bitsandbytes 0.50.2, ``functional.get_4bit_type`` and ``functional.quantize_4bit``.
"""

from __future__ import annotations

import struct

from adapterhub_tools.quant._code_book import CodeBook
from adapterhub_tools.quant._four_bit import FourBit

_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)

IMPLEMENTATION = FourBit(
    book=CodeBook(
        values=struct.unpack("<16f", struct.pack("<16f", *(value / 12 for value in _TWELFTHS))),
        order=(11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
    )
)
