"""Samples that a mixture must not hold: a data set, or a list of keys and contents."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from salt_distill.common.config import MixExclusion
from salt_distill.common.data.index import load_index
from salt_distill.common.data.making.lists import read_text

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


class Exclusion:
    """One entry of ``exclude`` in a recipe. Raises ValueError or FileNotFoundError where there is nothing to
    read."""

    def __init__(self, config: MixExclusion, folder: Path) -> None:
        path = folder / config.path
        self.path = config.path
        self.num_found = 0
        """Samples of the sources that it named so far."""
        if path.is_dir():
            _, index = load_index(path)
            splits = index["split"].to_numpy()
            if config.split not in ("all", *splits):
                raise ValueError(
                    f"exclude: {path}: got split {config.split!r}, expected one of"
                    f" {', '.join(sorted(set(splits)))}, or all"
                )
            self._hashes = set(index["sha256"].to_numpy()[(splits == config.split) | (config.split == "all")])
            self._keys: set[str] = set()
        else:
            if config.split != "all":
                raise ValueError(
                    f"exclude: {path}: got split {config.split!r} for a list, expected it for a data set"
                )
            lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
            self._hashes = {line.lower() for line in lines if _SHA256.fullmatch(line)}
            self._keys = {line for line in lines if not _SHA256.fullmatch(line)}
        self.num_named = len(self._hashes) + len(self._keys)
        """Distinct contents and keys."""

    def mask(self, keys: Sequence[str], hashes: Sequence[str]) -> np.ndarray:
        """Which of these samples it names."""
        named = (
            content in self._hashes or key in self._keys for key, content in zip(keys, hashes, strict=True)
        )
        mask = np.fromiter(named, bool, len(keys))
        self.num_found += int(mask.sum())
        return mask
