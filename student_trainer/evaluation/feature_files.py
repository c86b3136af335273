"""Tokens of frozen encoders on disk, in Arrow files that plain pyarrow reads: a second probe of an encoder costs no forward."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from jaxtyping import Bool, Float, Int
from torch import Tensor

from student_trainer.evaluation.features import Clips, Frozen, in_batches

_FACTS = b"salt.features"
"""Schema metadata: JSON of what the tokens depend on, and their shape."""


class FileTokens:
    """Tokens in a memory-mapped file, float16 there and float32 from here on."""

    def __init__(self, path: Path, keys: Sequence[str], device: torch.device) -> None:
        """``keys``: of the split's samples; those that are not in the file could not be decoded when it was written."""
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        self._path, self._device = path, device
        self._keys: list[str] = table["key"].to_pylist()
        self._shape: list[int] = json.loads(table.schema.metadata[_FACTS])["shape"]
        self._checksums = table["checksum"].to_numpy()
        chunks = [chunk.flatten().to_numpy().reshape(-1, *self._shape) for chunk in table["tokens"].chunks]
        self._rows = [row for chunk in chunks for row in chunk]
        found = set(self._keys)
        self.kept: Bool[np.ndarray, " samples"] = np.array([key in found for key in keys])

    def batches(self, idx: Sequence[Int[np.ndarray, " b"]], epoch: int) -> Iterator[tuple[Int[np.ndarray, " b"], Float[Tensor, "b v n e"]]]:
        """As in ``Tokens``; the same in every epoch. Raises ValueError where a row is not what was written."""
        for numbers in idx:
            for number in numbers:
                if xxhash.xxh3_64_intdigest(self._rows[number].data) != self._checksums[number]:
                    raise ValueError(f"{self._path}: the tokens of {self._keys[number]} are not those that were written: delete the file")
            tokens = torch.from_numpy(np.stack([self._rows[number] for number in numbers]))
            tokens = tokens.pin_memory() if self._device.type == "cuda" else tokens
            yield numbers, tokens.to(self._device, non_blocking=True).float()


def feature_path(folder: str, facts: dict[str, Any]) -> Path:
    """The file of the tokens that ``facts`` decide."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return Path(folder) / f"{facts['fingerprint'][:12]}-{facts['split']}-{digest[:16]}.arrow"


def write_features(path: Path, facts: dict[str, Any], frozen: Frozen, clips: Clips, batch_size: int) -> None:
    """Computes the tokens of every clip; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    writer: pa.ipc.RecordBatchFileWriter | None = None
    idx = in_batches(len(clips.samples), batch_size)
    num_views = clips.cut(clips.samples[0], 0).num_views
    try:
        for rows, (good, pixels) in zip(idx, clips.batches(idx), strict=True):
            tokens = frozen.tokens(pixels, num_views).half().cpu().numpy()
            if not np.isfinite(tokens).all():
                raise ValueError(f"got tokens beyond float16's {np.finfo(np.float16).max:g}, expected smaller ones: leave out --features")
            keys = [clips.samples[row].key for row in rows[good]]
            shape = list(tokens.shape[1:])
            values = pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), int(np.prod(shape)))
            checksums = pa.array([xxhash.xxh3_64_intdigest(row.data) for row in tokens], pa.uint64())
            batch = pa.record_batch({"key": pa.array(keys, pa.string()), "tokens": values, "checksum": checksums})
            if writer is None:
                metadata = {_FACTS: json.dumps(facts | {"shape": shape}, sort_keys=True).encode()}
                writer = pa.ipc.new_file(str(partial), batch.schema.with_metadata(metadata))
            writer.write_batch(batch)
        assert writer is not None, "a split has samples"
        writer.close()
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
