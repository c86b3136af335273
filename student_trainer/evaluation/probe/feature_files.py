"""Tokens of frozen encoders on disk, in Arrow files that plain pyarrow reads: a second probe of an encoder
costs no forward."""

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import xxhash
from jaxtyping import Bool, Float, Int
from torch import Tensor

from salt_distill.common.config import ViewConfig
from salt_distill.common.whole import whole_file
from salt_distill.student_trainer.evaluation.probe.features import (
    DecodedClips,
    EncoderOnDevice,
    in_batches,
    part_of,
)
from salt_distill.student_trainer.evaluation.records import Record
from salt_distill.student_trainer.ranks import Worker

_FACTS = b"salt.features"
"""Schema metadata: JSON of what the tokens depend on, and their shape."""


class FeatureFacts(Record):
    """What the tokens of a split depend on."""

    fingerprint: str
    """Of the encoder."""
    index_hash: str
    """Of the data set."""
    decoder: str
    """Library and version."""
    compute: dict[str, str]
    """Device kind, precision and versions of the forward."""
    split: str
    view: ViewConfig
    clips: tuple[int, int, float]
    """Segments, views, and a crop's sides as a share of those of the largest."""
    antialias: bool
    """Whether frames were resized with antialias, as images are."""

    def path(self, folder: str) -> Path:
        """The file of these tokens in a folder."""
        values = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(values.encode()).hexdigest()
        return Path(folder) / f"{self.fingerprint[:12]}-{self.split}-{digest[:16]}.arrow"


class TokensOnDisk:
    """Tokens in a memory-mapped file, float16 there and float32 from here on."""

    def __init__(self, path: Path, keys: Sequence[str], worker: Worker) -> None:
        """``keys``: of the split's samples; those that are not in the file could not be decoded when it was
        written."""
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
        self._path, self._worker = path, worker
        self._keys: list[str] = table["key"].to_pylist()
        self._shape: list[int] = json.loads(table.schema.metadata[_FACTS])["shape"]
        self._checksums = table["checksum"].to_numpy()
        chunks = [chunk.flatten().to_numpy().reshape(-1, *self._shape) for chunk in table["tokens"].chunks]
        self._rows = [row for chunk in chunks for row in chunk]
        written = set(self._keys)
        self.kept: Bool[np.ndarray, " samples"] = np.array([key in written for key in keys])

    def share(self, numbers: Int[np.ndarray, " b"]) -> Int[np.ndarray, " k"]:
        """As many as every other rank's, or one more or less."""
        return part_of(numbers, self._worker)

    def batches(
        self, idx: Sequence[Int[np.ndarray, " b"]], epoch: int
    ) -> Iterator[tuple[Int[np.ndarray, " b"], Float[Tensor, "b v n e"]]]:
        """As in ``TokenSource``; the same in every epoch. Raises ValueError where a row is not what was
        written."""
        for numbers in idx:
            for number in numbers:
                if xxhash.xxh3_64_intdigest(self._rows[number].data) != self._checksums[number]:
                    raise ValueError(
                        f"{self._path}: the tokens of {self._keys[number]} are not those that were written:"
                        " delete the file"
                    )
            tokens = torch.from_numpy(np.stack([self._rows[number] for number in numbers]))
            tokens = tokens.pin_memory() if self._worker.device.type == "cuda" else tokens
            yield numbers, tokens.to(self._worker.device, non_blocking=True).float()


def write_features(
    path: Path,
    facts: FeatureFacts,
    encoder: EncoderOnDevice,
    clips: DecodedClips,
    batch_size: int,
    worker: Worker,
) -> None:
    """Computes the tokens of every clip, each rank those of its part; the file appears whole or not at all.
    Raises the first error of a rank."""
    partial = path.with_name(f".partial-{socket.gethostname()}-{os.getpid()}-{path.name}")
    try:
        is_written = worker.together(lambda: _write_part(partial, facts, encoder, clips, batch_size, worker))
        parts = [
            name for name in worker.ranks.all_values(partial.name if is_written else None) if name is not None
        ]
        worker.together(lambda: _join(path, parts, partial) if worker.rank == 0 else None)
    finally:
        partial.unlink(missing_ok=True)


def _write_part(
    path: Path,
    facts: FeatureFacts,
    encoder: EncoderOnDevice,
    clips: DecodedClips,
    batch_size: int,
    worker: Worker,
) -> bool:
    """Writes the tokens of this rank's clips, if it has any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer: pa.ipc.RecordBatchFileWriter | None = None
    idx = in_batches(part_of(np.arange(len(clips.samples)), worker), batch_size)
    num_views = clips.cut(clips.samples[0], 0).num_views
    for rows, (good, pixels) in zip(idx, clips.batches(idx), strict=True):
        if not good.any():
            continue
        tokens = encoder.tokens(pixels, num_views).half().cpu().numpy()
        if not np.isfinite(tokens).all():
            raise ValueError(
                f"got tokens beyond float16's {np.finfo(np.float16).max:g}, expected smaller ones: leave out"
                " --features"
            )
        keys = [clips.samples[row].key for row in rows[good]]
        shape = list(tokens.shape[1:])
        values = pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), int(np.prod(shape)))
        checksums = pa.array([xxhash.xxh3_64_intdigest(row.data) for row in tokens], pa.uint64())
        batch = pa.record_batch({"key": pa.array(keys, pa.string()), "tokens": values, "checksum": checksums})
        if writer is None:
            metadata = {
                _FACTS: json.dumps(facts.model_dump(mode="json") | {"shape": shape}, sort_keys=True).encode()
            }
            writer = pa.ipc.new_file(str(path), batch.schema.with_metadata(metadata))
        writer.write_batch(batch)
    if writer is not None:
        writer.close()
    return writer is not None


def _join(path: Path, parts: Sequence[str], partial: Path) -> None:
    """Makes the file of the ranks' parts, in their order; ``partial``: a file of this rank, which may be one
    of them."""
    if not parts:
        raise ValueError(f"none of the clips for {path} can be decoded, expected some")
    files = [path.with_name(part) for part in parts]
    if absent := [file for file in files if not file.exists()]:
        raise ValueError(
            f"got no file {absent[0]} of another worker, expected one: --features names a folder that all"
            " workers share"
        )
    whole = files[0]
    if len(files) > 1:
        whole = partial.with_name(f"{partial.name}-whole")
    try:
        if len(files) > 1:
            _concatenate(whole, files)
        with whole_file(path) as partial:
            whole.rename(partial)
    finally:
        whole.unlink(missing_ok=True)


def _concatenate(whole: Path, files: Sequence[Path]) -> None:
    """Writes the batches of Arrow files of one schema into one, a batch at a time."""
    writer: pa.ipc.RecordBatchFileWriter | None = None
    for path in files:
        with pa.memory_map(str(path)) as file:
            part = pa.ipc.open_file(file)
            if writer is None:
                writer = pa.ipc.new_file(str(whole), part.schema)
            for number in range(part.num_record_batches):
                writer.write_batch(part.get_batch(number))
    assert writer is not None, "there are files"
    writer.close()
