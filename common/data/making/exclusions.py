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
        self.num_by_identity = 0
        """Those of them that it named by their identity alone."""
        if path.is_dir():
            _, index = load_index(path)
            splits = index["split"].to_numpy()
            if config.split not in ("all", *splits):
                raise ValueError(
                    f"exclude: {path}: got split {config.split!r}, expected one of"
                    f" {', '.join(sorted(set(splits)))}, or all"
                )
            mask = (splits == config.split) | (config.split == "all")
            self._hashes = set(index["sha256"].to_numpy()[mask])
            self._keys: set[str] = set()
            keys = index["key"].to_numpy()[mask].tolist()
        else:
            if config.split != "all":
                raise ValueError(
                    f"exclude: {path}: got split {config.split!r} for a list, expected it for a data set"
                )
            lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
            self._hashes = {line.lower() for line in lines if _SHA256.fullmatch(line)}
            self._keys = {line for line in lines if not _SHA256.fullmatch(line)}
            keys = sorted(self._keys)
        self._identities = set(identities_of(config.identity, keys, f"exclude: {config.path}")) - {None}
        self.num_named = len(self._hashes) + len(self._keys)
        """Distinct contents and keys."""

    def mask(
        self, keys: Sequence[str], hashes: Sequence[str], identities: Sequence[str | None]
    ) -> np.ndarray:
        """Which of these samples it names."""
        named = (
            content in self._hashes or key in self._keys for key, content in zip(keys, hashes, strict=True)
        )
        mask = np.fromiter(named, bool, len(keys))
        same = np.fromiter((identity in self._identities for identity in identities), bool, len(keys)) & ~mask
        self.num_found += int((mask | same).sum())
        self.num_by_identity += int(same.sum())
        return mask | same


def identities_of(pattern: str | None, keys: Sequence[str], place: str) -> list[str | None]:
    """What a pattern takes out of each key; None where it finds nothing. Raises ValueError where it finds
    nothing in any key, and names the ``place`` in the recipe."""
    if pattern is None:
        return [None] * len(keys)
    matches = [re.search(pattern, key) for key in keys]
    if keys and not any(matches):
        raise ValueError(f"{place}: got the identity {pattern!r}, which is in no key, such as {keys[0]!r}")
    return [None if match is None else f"identity {match[1]}" for match in matches]
