"""Counter-based random draws: every random choice of data and masks is a pure function of its name."""

import struct

import blake3
import numpy as np


def words(seed: int, key: str, number: int, count: int) -> np.ndarray:
    """``count`` uint64 words of BLAKE3-XOF over (seed, key, number): int64 little-endian, UTF-8, int64
    little-endian.

    A draw has no state, so it is the same on every rank, worker, process and resume, and no library's
    generator can change it.
    """
    name = struct.pack("<q", seed) + key.encode() + struct.pack("<q", number)
    return np.frombuffer(blake3.blake3(name).digest(length=8 * count), dtype="<u8")


def uniforms(seed: int, key: str, number: int, count: int) -> np.ndarray:
    """``count`` float64 draws of U[0, 1): the top 53 bits of each word of ``words``, over 2^53 (DESIGN
    section 4, View)."""
    return (words(seed, key, number, count) >> np.uint64(11)).astype(np.float64) / 2.0**53
