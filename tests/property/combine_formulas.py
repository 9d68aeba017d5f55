"""The combination methods again, on whole dense arrays with numpy and fractions alone."""

from __future__ import annotations

import hashlib
from math import acos, sin

import numpy as np

Array = np.ndarray


def kept_largest(delta: Array, density: float) -> Array:
    """Keeps the ⌊density·n⌋ largest magnitudes, and all that equal the last of them."""
    count = max(1, int(density * delta.size))
    lowest = np.sort(np.abs(delta).reshape(-1))[::-1][count - 1]
    return np.where(np.abs(delta) >= lowest, delta, 0.0)


def kept_middle(delta: Array, density: float, gamma: float) -> Array:
    """Drops the ⌊gamma·n⌋ largest magnitudes and keeps the ⌊density·n⌋ after them, with equal ones."""
    top, count = int(gamma * delta.size), max(1, int(density * delta.size))
    ordered = np.sort(np.abs(delta).reshape(-1))[::-1]
    high, low = ordered[top], ordered[min(top + count, delta.size) - 1]
    if top + count >= delta.size:
        low = 0.0
    return np.where((np.abs(delta) >= low) & (np.abs(delta) <= high), delta, 0.0)


def elected_mean(deltas: list[Array], majority: str = "total") -> Array:
    """The mean of the non-zero values that have the elected sign."""
    stacked = np.stack(deltas)
    sign = np.sign(np.sign(stacked).sum(axis=0) if majority == "frequency" else stacked.sum(axis=0))
    agree = (np.sign(stacked) == sign) & (stacked != 0)
    total = np.where(agree, stacked, 0.0).sum(axis=0)
    return total / np.maximum(agree.sum(axis=0), 1)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as published: ten rounds of two products, and keys that grow by two constants."""
    mask = 2**64 - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(p1 >> 64) ^ c[1] ^ k[0], p1 & mask, (p0 >> 64) ^ c[3] ^ k[1], p0 & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


def uniform_bits(seed: int, owner: bytes, name: str, count: int) -> list[int]:
    """The 32-bit numbers of the first elements of a tensor; numpy's stream starts with counter 1."""
    text = name.encode()
    data = b"adaptertool:combine-random-v1\0" + seed.to_bytes(8, "little")
    data += len(owner).to_bytes(8, "little") + owner + len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(data).digest()
    key = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8)]
    found: list[int] = []
    counter = 1
    while len(found) < count:
        for word in philox([counter, 0, 0, 0], key):
            found += [word & 0xFFFFFFFF, word >> 32]
        counter += 1
    return found[:count]


def dropped(delta: Array, density: float, bits: list[int]) -> Array:
    """Keeps a value where its 32 bits are below density·2^32, divided by the density."""
    kept = np.array(bits).reshape(delta.shape) < int(density * 2**32)
    return np.where(kept, delta / density, 0.0)


def magnitude_dropped(delta: Array, density: float, epsilon: float, bits: list[int]) -> Array:
    """Keeps the value of rank r in its row with probability density + ε·((r + ½)/n − ½), divided by it."""
    columns = delta.shape[1]
    result = np.zeros_like(delta)
    for i, row in enumerate(delta):
        order = sorted(range(columns), key=lambda j: (abs(row[j]), j))
        for rank, j in enumerate(order):
            q = ((rank + 0.5) / columns - 0.5) * epsilon + density
            if bits[i * columns + j] < q * 2**32:
                result[i, j] = row[j] / q
    return result


def slerp(first: Array, second: Array, t: float) -> Array:
    """Spherical interpolation of two flattened arrays."""
    a, b = first.reshape(-1), second.reshape(-1)
    cosine = float(a @ b) / (float(np.linalg.norm(a)) * float(np.linalg.norm(b)))
    if abs(cosine) > 0.9995:
        return (1 - t) * first + t * second
    angle = acos(cosine)
    return (sin((1 - t) * angle) * first + sin(t * angle) * second) / sin(angle)
