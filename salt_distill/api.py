"""The parts of SALT for one's own PyTorch loop: clips, a teacher's targets, masks, encoders."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from salt_distill.common.clip import ClipBatch, clip_digest
from salt_distill.common.config import (
    MASK_GROUP_SIZE,
    FrozenConfig,
    LoaderConfig,
    MaskConfig,
    ServiceClientConfig,
    TargetDtype,
    ViewConfig,
    Views,
    mask_layer,
)
from salt_distill.common.data.reader import Reader
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.model.masking import MaskGroup, mask_group
from salt_distill.common.targets import codec
from salt_distill.common.targets.target_cache import TargetCache
from salt_distill.student_trainer.targets.service_targets import ServiceTargets


def load_encoder(path: str | Path) -> nn.Module:
    """An encoder in eval mode: normalised float ``[b, 3, t, h, w]`` to tokens ``[b, n, d]``, final norm
    included.

    ``path``: a run or checkpoint of ours, a Hugging Face VJEPA2 or VideoMAE directory, a V-JEPA 2 ``.pt``
    file, or ``timm:NAME``. Its input is ``normalise(pixels, encoder.mean, encoder.std)``: encoders of others
    may have another mean than ours.
    """
    frozen = open_encoder(FrozenConfig(ckpt=str(path)))
    encoder = frozen.load()
    # Plain attributes: a module's own are tensors and modules.
    object.__setattr__(encoder, "mean", frozen.mean)
    object.__setattr__(encoder, "std", frozen.std)
    return encoder


class Clips(IterableDataset):
    """Batches of clips of a data set, in the order that a training run with this ``data_seed`` sees them.

    ``clips[step]`` is the batch of a step, whatever was asked before, and iterating goes on from step 0 for
    ever. The videos are decoded in processes of their own; close it, or use it in a ``with`` block.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        batch_size: int,
        num_frames: int = 16,
        frame_step: int = 4,
        crop_size: int | tuple[int, int] = 224,
        data_seed: int = 0,
        views: Views = "fresh",
        split: str = "train",
        decode_processes: int = 2,
        prefetch: int = 2,
    ) -> None:
        """``data``: shards as ``salt-data pack`` writes them. ``crop_size``: height and width in pixels,
        one number where they are equal. ``views``: ``fresh`` draws a new crop in every pass over the data, a
        number K repeats K of them. ``prefetch``: batches decoded ahead."""
        self.batch_size, self._prefetch = batch_size, prefetch
        view = ViewConfig(num_frames=num_frames, frame_step=frame_step, crop_size=crop_size)
        loader = LoaderConfig(decode_processes=decode_processes)
        self._reader = Reader(
            str(data), data_seed=data_seed, views=views, view=view, split=split, loader=loader
        )
        self.num_samples = self._reader.num_samples

    def __getitem__(self, step: int) -> ClipBatch:
        return self._reader.clips(range(step * self.batch_size, (step + 1) * self.batch_size))

    def __iter__(self) -> Iterator[ClipBatch]:
        with ThreadPoolExecutor(max(1, self._prefetch), thread_name_prefix="clips") as pool:
            ahead = [pool.submit(self.__getitem__, step) for step in range(self._prefetch)]
            step = len(ahead)
            while True:
                ahead.append(pool.submit(self.__getitem__, step))
                step += 1
                yield ahead.pop(0).result()

    def close(self) -> None:
        """Ends the decoding processes."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TeacherClient:
    """A running teacher service: ``client(clips)`` gives the targets. Busy and restarted services are asked
    again, answers are checked, and one of another teacher is an error."""

    def __init__(
        self,
        url: str,
        *,
        dtype: TargetDtype = "float16",
        run: str = "python",
        token: str | None = None,
        ca: str | None = None,
        retry_budget_s: float = 120.0,
    ) -> None:
        """``url``: as ``salt-serve teacher`` prints it. ``dtype``: of the targets on the wire. ``run``: the
        name that the service counts the requests under. ``retry_budget_s``: how long one request is tried."""
        config = ServiceClientConfig(retry_budget_s=retry_budget_s)
        self._targets = ServiceTargets(url, dtype, config, run, token=token, ca=ca)
        spec = self._targets.spec
        self.fingerprint, self.clip_shape = spec.fingerprint, spec.clip_shape
        self.grid, self.width = spec.grid, spec.width

    def __call__(self, clips: ClipBatch | UInt8[np.ndarray, "b t h w 3"]) -> Float[Tensor, "b n d"]:
        """The targets of clips in float32, as a student uses them; zeros for a clip that is not ``good``."""
        batch = clips if isinstance(clips, ClipBatch) else _batch(clips)
        if batch.pixels.shape[1:] != self.clip_shape:
            raise ValueError(f"got clips {batch.pixels.shape[1:]}, expected {self.clip_shape}")
        return codec.widen(self._targets.request(batch).result())

    def close(self) -> None:
        """Closes the connections."""
        self._targets.close()


class CachedTargets:
    """A target cache that ``salt-serve precompute`` or a service has written: ``cache(clips)`` gives the
    targets."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ValueError where there is no cache, or a file of it is damaged."""
        self._cache = TargetCache(folder)
        spec = self._cache.spec
        self.fingerprint, self.grid, self.width = spec.fingerprint, spec.teacher.grid, spec.teacher.width

    def __len__(self) -> int:
        return len(self._cache)

    def __call__(self, clips: ClipBatch | UInt8[np.ndarray, "b t h w 3"]) -> Float[Tensor, "b n d"]:
        """The targets of clips in float32; zeros for a clip that is not ``good``. Raises ValueError where one
        is not in the cache."""
        batch = clips if isinstance(clips, ClipBatch) else _batch(clips)
        spec = self._cache.spec
        num_tokens, width = spec.shape
        out = torch.zeros(len(batch.digests), num_tokens, width)
        for row, encoded in enumerate(self._cache.targets(batch.digests)):
            if not batch.good[row]:
                continue
            if encoded is None:
                name = f"{batch.keys[row]}, view {batch.views[row]}"
                raise ValueError(f"got {name}, expected a clip whose target is in the cache")
            out[row] = codec.decode(encoded, spec.target_dtype, num_tokens=num_tokens, width=width)
        return out


def masks(
    grid: tuple[int, int, int],
    *,
    batch_size: int,
    step: int,
    seed: int = 0,
    strategy: str = "multi-block",
) -> list[MaskGroup]:
    """The masks of a step's batch, groups of up to 24 clips that share their numbers of tokens; each has the
    mask sets of the strategy, with ``visible_idx`` and ``hidden_idx``. ``grid``: (t, h, w) of the tokens."""
    config = MaskConfig.model_validate(mask_layer(strategy)["mask"])
    groups = range(-(-batch_size // MASK_GROUP_SIZE))
    return [
        mask_group(config, TokenGrid(*grid), seed=seed, step=step, group=group, batch_size=batch_size)
        for group in groups
    ]


def _batch(clips: UInt8[np.ndarray, "b t h w 3"]) -> ClipBatch:
    clips = np.ascontiguousarray(clips)
    return ClipBatch(
        pixels=clips,
        digests=tuple(clip_digest(clip) for clip in clips),
        keys=tuple(f"clip {row}" for row in range(len(clips))),
        views=(0,) * len(clips),
        good=np.ones(len(clips), bool),
    )
