"""How a prediction of stored values and their true bits become a record, and back.

The differences are taken in the dtype's own ordering: two's complement with ``-0`` just below ``+0``, so that
neighbouring values differ by one. A record covers some rows of a tensor::

    coding u8 · rows u32 · count u32 · gaps u32 · exceptions u32 · payload          (little-endian)

* ``EQUAL``: the prediction is right; no payload.
* ``SPARSE``: the ``count`` positions that differ, as gaps (a byte each; 255 goes on), zstd level 3, ``gaps``
  bytes; their signs, one bit each; then ``exceptions`` bytes, zstd: pairs of varints, the gap to the
  difference whose magnitude is not 1, and that magnitude less 2.
* ``RAW`` and ``XOR``: the byte planes of the values, or of their exclusive or with the prediction, zstd, in
  ``gaps`` bytes.

The smallest is taken. Each record stands alone, so that both ways run in bounded memory.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from adapterhub_tools.errors import FormatError
from adapterhub_tools.linalg.flagged import flagged

if TYPE_CHECKING:
    from adapterhub_tools.linalg.expression import IntArray
    from adapterhub_tools.linalg.formats import AnyArray

EQUAL, SPARSE, RAW, XOR = range(4)
HEAD = struct.Struct("<BIIII")
_CONTINUE = 255
_MORE = 0x80
_LEVEL = 3
_MIXED = 0.25
"""From this share of wrong predictions on, whole byte planes are tried too."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordHead:
    """The fixed part of a record.

    Attributes:
        coding: EQUAL, SPARSE, RAW or XOR.
        rows: how many rows it covers.
        count: how many values differ.
        gaps: bytes of the first stream.
        exceptions: bytes of the last stream.
    """

    coding: int
    rows: int
    count: int
    gaps: int
    exceptions: int

    @classmethod
    def parse(cls, data: bytes) -> RecordHead:
        """Reads the bytes of HEAD."""
        coding, rows, count, gaps, exceptions = HEAD.unpack(data)
        if coding not in (EQUAL, SPARSE, RAW, XOR):
            raise _broken(f"a record has the coding {coding}")
        return cls(coding=coding, rows=rows, count=count, gaps=gaps, exceptions=exceptions)

    @property
    def payload(self) -> int:
        """The bytes that follow."""
        return self.gaps + self.exceptions + (-(-self.count // 8) if self.coding == SPARSE else 0)


def encode(true: AnyArray, predicted: AnyArray | None, rows: int) -> bytes:
    """Returns the record of some rows.

    Args:
        true: their bits, as a flat unsigned array.
        predicted: the predicted bits, or None where nothing predicts them.
        rows: how many rows they are.
    """
    if predicted is None:
        return _planes(RAW, true, rows)
    wrong = flagged(true != predicted)
    return encode_wrong(true, wrong, true.take(wrong), predicted.take(wrong), rows)


def encode_wrong(
    true: AnyArray, wrong: IntArray, expected: AnyArray, predicted: AnyArray, rows: int
) -> bytes:
    """Returns the record of some rows whose prediction is wrong at some places.

    Args:
        true: their bits, as a flat unsigned array.
        wrong: the places, ascending; everywhere else the prediction is right.
        expected: the true bits at these places.
        predicted: the bits predicted there.
        rows: how many rows they are.
    """
    if not len(wrong):
        return HEAD.pack(EQUAL, rows, 0, 0, 0)
    found = []
    if len(wrong) <= len(true) // 2:
        found.append(_sparse(wrong, expected, predicted, rows))
    if len(wrong) > _MIXED * len(true):
        difference = np.zeros_like(true)
        difference[wrong] = expected ^ predicted
        found += [_planes(RAW, true, rows), _planes(XOR, difference, rows)]
    return min(found, key=len)


def decode(head: RecordHead, payload: bytes, predicted: AnyArray) -> AnyArray:
    """Returns the true bits.

    Args:
        head: of the record.
        payload: what follows it, ``head.payload`` bytes.
        predicted: the predicted bits, flat; changed in place where that is enough.

    Raises:
        FormatError: the record is broken.
    """
    if head.coding == EQUAL:
        return predicted
    if head.coding == SPARSE:
        return _restore_sparse(head, payload, predicted)
    size = predicted.dtype.itemsize
    planes = decompress(payload, predicted.nbytes)
    if len(planes) != predicted.nbytes:
        raise _broken("a record does not have the bytes of its rows")
    values = np.frombuffer(planes, np.uint8).reshape(size, -1).T.copy().view(predicted.dtype).reshape(-1)
    return values ^ predicted if head.coding == XOR else values


def order(bits: AnyArray) -> npt.NDArray[np.signedinteger[Any]]:
    """Returns the place of each value in the dtype's ordering; neighbours differ by one.

    Of a wider type than the bits' own, so that differences of 16- and 32-bit values do not wrap around.
    """
    width = 8 * bits.dtype.itemsize
    places = bits.view(f"i{width // 8}").astype("i4" if width == 16 else "i8")
    # The sign spread over all bits turns the magnitudes of negative values around.
    spread = places >> (width - 1)
    places &= (1 << (width - 1)) - 1
    places ^= spread
    return places


def from_order(places: npt.NDArray[np.signedinteger[Any]], dtype: np.dtype[np.unsignedinteger]) -> AnyArray:
    """Returns the bits at places of the ordering; the inverse of ``order``."""
    width = 8 * dtype.itemsize
    wide = places.astype(np.int64).view(np.uint64)
    minus = places < 0
    sign = np.uint64(1 << (width - 1))
    return np.where(minus, ~wide | sign, wide).astype(dtype)


def compress(data: bytes | memoryview) -> bytes:
    """Returns one zstd frame that says its size."""
    import zstandard

    return zstandard.ZstdCompressor(level=_LEVEL).compress(data)


def decompress(frame: bytes | memoryview, limit: int) -> bytes:
    """Returns the content of one frame, which must say its size, and at most ``limit`` bytes.

    Raises:
        FormatError: it is broken, or larger.
    """
    import zstandard

    try:
        size = zstandard.frame_content_size(frame)
        if not 0 <= size <= limit:
            raise _broken(f"a compressed stream has {size} bytes, expected at most {limit}")
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _broken(f"a compressed stream is damaged ({error})") from error


def _sparse(wrong: AnyArray, true: AnyArray, predicted: AnyArray, rows: int) -> bytes:
    difference = order(true)
    difference -= order(predicted)
    gaps = compress(_gap_bytes(_gaps(wrong)).data)
    signs = np.packbits(difference > 0, bitorder="little").tobytes()
    # The difference of two binary64 places may wrap around; so does adding it back.
    magnitudes = np.abs(difference, out=difference)
    far = np.flatnonzero(magnitudes != 1)
    exceptions = b""
    if len(far):
        pairs = np.empty(2 * len(far), dtype=np.uint64)
        pairs[::2] = _gaps(far)
        pairs[1::2] = magnitudes[far].astype(np.int64).view(np.uint64) - np.uint64(2)
        exceptions = compress(_varints(pairs).data)
    return HEAD.pack(SPARSE, rows, len(wrong), len(gaps), len(exceptions)) + gaps + signs + exceptions


def _restore_sparse(head: RecordHead, payload: bytes, predicted: AnyArray) -> AnyArray:
    view = memoryview(payload)
    if not 0 < head.count <= len(predicted):
        raise _broken("a record changes more values than it covers")
    stream = np.frombuffer(
        decompress(view[: head.gaps], head.count + len(predicted) // _CONTINUE + 1), np.uint8
    )
    ends = np.flatnonzero(stream != _CONTINUE)
    if len(ends) != head.count:
        raise _broken("a record does not have as many gaps as differences")
    full = np.diff(ends, prepend=-1) - 1
    places = np.cumsum(full * _CONTINUE + stream[ends] + 1) - 1
    if places[-1] >= len(predicted):
        raise _broken("a record changes values beyond its rows")
    middle = head.gaps + -(-head.count // 8)
    signs = np.unpackbits(
        np.frombuffer(view[head.gaps : middle], np.uint8), count=head.count, bitorder="little"
    )
    magnitudes = np.ones(head.count, dtype=np.uint64)
    if head.exceptions:
        numbers = _from_varints(decompress(view[middle:], 20 * head.count))
        if len(numbers) % 2:
            raise _broken("a record has half an exception")
        far = np.cumsum(numbers[::2].astype(np.int64) + 1) - 1
        if len(far) and (far.min() < 0 or far.max() >= head.count):
            raise _broken("a record has an exception beyond its differences")
        magnitudes[far] = numbers[1::2] + np.uint64(2)
    difference = magnitudes.view(np.int64)
    with np.errstate(over="ignore"):
        difference = np.where(signs.astype(np.bool_), difference, -difference)
        predicted[places] = from_order(order(predicted[places]) + difference, predicted.dtype)
    return predicted


def _planes(coding: int, values: AnyArray, rows: int) -> bytes:
    size = values.dtype.itemsize
    planes = np.ascontiguousarray(values.view(np.uint8).reshape(-1, size).T)
    frame = compress(planes.reshape(-1).data)
    return HEAD.pack(coding, rows, 0, len(frame), 0) + frame


def _gaps(places: IntArray) -> IntArray:
    """Returns how many places lie between neighbours, and before the first."""
    gaps = places - 1
    gaps[1:] -= places[:-1]
    gaps[0] += 1
    return gaps


def _gap_bytes(gaps: AnyArray) -> Bytes:
    """Returns each gap as 255s and a last byte below 255."""
    large = np.flatnonzero(gaps >= _CONTINUE)
    if not len(large):
        return gaps.astype(np.uint8)
    full, last = np.divmod(gaps[large], _CONTINUE)
    short = gaps.astype(np.uint8)
    short[large] = last
    # Before each large gap stand its 255s.
    return np.insert(short, np.repeat(large, full), np.uint8(_CONTINUE))


def _varints(values: npt.NDArray[np.uint64]) -> Bytes:
    """Returns numbers in LEB128: seven bits a byte, the lowest first, the top bit set where more follow."""
    long = np.flatnonzero(values >= _MORE)
    if not len(long):
        return values.astype(np.uint8)
    large = values[long]
    lengths = np.ones(len(large), dtype=np.int64)
    for shift in range(7, 64, 7):
        lengths += (large >> np.uint64(shift)) != 0
    # Where each number begins: its index, and the further bytes of the long ones before it.
    further = np.zeros(len(values), dtype=np.int64)
    further[long] = lengths - 1
    begins = np.arange(len(values)) + np.cumsum(further) - further
    out = np.zeros(len(values) + int(further.sum()), dtype=np.uint8)
    out[begins] = values.astype(np.uint8)
    for step in range(int(lengths.max())):
        chosen = np.flatnonzero(lengths > step)
        low = (large[chosen] >> np.uint64(7 * step)) & np.uint64(0x7F)
        more = (lengths[chosen] > step + 1).astype(np.uint64) << np.uint64(7)
        out[begins[long[chosen]] + step] = (low | more).astype(np.uint8)
    return out


def _from_varints(data: bytes) -> npt.NDArray[np.uint64]:
    stream = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(stream < 0x80) + 1
    if not len(stream):
        return np.empty(0, dtype=np.uint64)
    if not len(ends) or ends[-1] != len(stream):
        raise _broken("a number in a record does not end")
    begins = np.concatenate(([0], ends[:-1]))
    lengths = ends - begins
    if lengths.max() > 10:
        raise _broken("a number in a record is too long")
    values = np.zeros(len(ends), dtype=np.uint64)
    for step in range(int(lengths.max())):
        chosen = np.flatnonzero(lengths > step)
        part = (stream[begins[chosen] + step] & np.uint8(0x7F)).astype(np.uint64)
        values[chosen] |= part << np.uint64(7 * step)
    return values


def _broken(what: str) -> FormatError:
    return FormatError.of(
        "undo-record", f"{what}.", file="merge.undo", remedy="The file is damaged: get it again."
    )
