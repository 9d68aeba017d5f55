"""Quantises a weight that comes in rows to 4 bits, with the bytes of bitsandbytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from adapterhub_tools.model.quant_scheme import QuantScheme
from adapterhub_tools.model.tensor import TensorSpec
from adapterhub_tools.quant._code_book import CodeBook, pack
from adapterhub_tools.quant._four_bit_blocks import block_codes, block_scales, piece_of, refuse_non_finite
from adapterhub_tools.quant._nested import dynamic_code_book, quantize_scales

if TYPE_CHECKING:
    from torch import Tensor

_NUMBER_WIDTH = 24
"""The longest text of a binary64 number in JSON."""


class FourBitEncoder:
    """Takes all rows of one weight in order, gives packed bytes as they become complete, then the rest.

    Memory: 4 bytes for each block, and about 2 MiB.
    """

    def __init__(
        self, book: CodeBook, scheme: QuantScheme, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        """Takes what ``FourBit.encoder`` describes."""
        self._book, self._scheme, self._shape = book, scheme, shape
        self._dtype = str(dtype).removeprefix("torch.")
        self._size = scheme.block_size or 1
        self._rest = torch.empty(0, dtype=dtype)
        self._scales: list[Tensor] = []
        self._blocks = 0

    def add(self, rows: Tensor) -> Tensor:
        """Takes the next rows.

        Args:
            rows: (n, columns), in the dtype that was announced; finite.

        Returns:
            uint8, the packed bytes of the blocks that are full now; may be empty.

        Raises:
            FormatError: a value that is not finite.
        """
        flat = rows.reshape(-1)
        if self._rest.numel():
            flat = torch.cat([self._rest, flat])
        full = flat.numel() // self._size * self._size
        packed = torch.empty(full // 2, dtype=torch.uint8)
        piece = piece_of(rows.dtype)
        for begin in range(0, full, piece):
            end = min(full, begin + piece)
            packed[begin // 2 : end // 2] = self._encode(flat[begin:end].view(-1, self._size))
        self._rest = flat[full:].clone()
        return packed

    def finish(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Ends the weight.

        Returns:
            The last packed bytes (none where the block size divides the weight), and the other parts by role:
            flat tensors, ``"quant_state"`` as the bytes of its JSON.

        Raises:
            FormatError: a value that is not finite.
        """
        packed = torch.empty(0, dtype=torch.uint8)
        if self._rest.numel():
            packed = self._encode(self._rest.view(1, -1), short=True)
        scales = torch.cat(self._scales) if self._scales else torch.empty(0)
        parts = {"quant_map": self._book.table.clone()}
        offset = None
        if self._scheme.double:
            nested = quantize_scales(scales, self._scheme.nested_block_size)
            parts |= {"absmax": nested.codes, "nested_absmax": nested.scales}
            parts["nested_quant_map"] = dynamic_code_book().clone()
            offset = nested.offset
        else:
            parts["absmax"] = scales
        state = self._state(offset)
        parts["quant_state"] = torch.tensor(list(state), dtype=torch.uint8)
        return packed, parts

    def part_specs(self, name: str) -> dict[str, TensorSpec]:
        """Returns name, dtype and shape of every part of the weight called ``name``, by role.

        The text of ``quant_state`` is padded with spaces to a length that does not depend on the data.

        Raises:
            ValueError: the packed bytes do not fill the storage dtype.
        """
        elements = self._elements
        blocks = -(-elements // self._size)
        storage = self._scheme.storage_dtype or "U8"
        width = TensorSpec(name="", dtype=storage, shape=(1,)).nbytes
        nbytes = (elements + 1) // 2
        if nbytes % width:
            raise ValueError(f"{name}: {nbytes} bytes do not fill {storage}")
        double = self._scheme.double
        rows: dict[str, tuple[str, str, tuple[int, ...]]] = {
            "data": ("", storage, (nbytes // width, 1)),
            "absmax": (".absmax", "U8" if double else "F32", (blocks,)),
            "quant_map": (".quant_map", "F32", (16,)),
            "quant_state": (
                f".quant_state.bitsandbytes__{self._scheme.format}",
                "U8",
                (len(self._state(0.0 if double else None)),),
            ),
        }
        if double:
            groups = -(-blocks // self._scheme.nested_block_size)
            rows["nested_absmax"] = (".nested_absmax", "F32", (groups,))
            rows["nested_quant_map"] = (".nested_quant_map", "F32", (256,))
        return {
            role: TensorSpec(name=name + suffix, dtype=dtype, shape=shape)
            for role, (suffix, dtype, shape) in rows.items()
        }

    @property
    def _elements(self) -> int:
        return TensorSpec(name="", dtype="U8", shape=self._shape).elements

    def _encode(self, blocks: Tensor, *, short: bool = False) -> Tensor:
        scales = block_scales(blocks, short=short)
        refuse_non_finite(scales, self._blocks)
        self._scales.append(scales)
        self._blocks += scales.numel()
        codes = block_codes(self._book, blocks, scales, short=short)
        if codes.numel() % 2:
            codes = torch.cat([codes, self._book.codes(torch.zeros(1))])
        return pack(codes)

    def _state(self, offset: float | None) -> bytes:
        """Returns the JSON of ``quant_state``."""
        state: dict[str, object] = {
            "quant_type": self._scheme.format,
            "blocksize": self._size,
            "dtype": self._dtype,
            "shape": list(self._shape),
        }
        if offset is None:
            return json.dumps(state).encode()
        state |= {"nested_blocksize": self._scheme.nested_block_size, "nested_dtype": "float32"}
        text = json.dumps(state | {"nested_offset": offset})
        width = len(json.dumps(state | {"nested_offset": 0})) - 1 + _NUMBER_WIDTH
        return text.ljust(width).encode()
