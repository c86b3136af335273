"""`salt-eval embed`: features of a folder of videos, continued where it was left."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float16
from rich.progress import track
from torch import Tensor

from salt_distill.common.clip import BadVideoError
from salt_distill.common.config import EmbedConfig
from salt_distill.common.console import console
from salt_distill.common.data.video import decoder_name
from salt_distill.common.devices import device_here
from salt_distill.common.model.compute import uses_bfloat16
from salt_distill.common.model.frozen import FrozenEncoder
from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.model.teacher import device_kind, fingerprint
from salt_distill.common.untouched import left_as_it_was
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.evaluation.candidates import open_candidates
from salt_distill.student_trainer.evaluation.embed.files import FeatureTable, join_parts, table_of, write_part
from salt_distill.student_trainer.evaluation.embed.windows import Window, WindowsCut, windows_of
from salt_distill.student_trainer.evaluation.probe.features import EncoderOnDevice
from salt_distill.student_trainer.evaluation.records import EncoderIdentity
from salt_distill.student_trainer.evaluation.videos import FoundVideo, VideoSet, open_videos, report_skipped
from salt_distill.student_trainer.ranks import Worker

VIDEOS_PER_PART = 16
"""Videos of a part of the file: what a kill costs each worker, at most."""


def run(config: EmbedConfig) -> None:
    """Embeds what is not there yet, and joins the parts."""
    out = Path(config.out)
    if out.exists():
        raise ValueError(f"got --out {out}, which is there already: give another name, or delete it")
    parts = out.resolve().with_name(f".{out.name}.parts")
    with left_as_it_was(parts, unless=lambda: any(parts.glob("*.skipped.json"))):
        parts.mkdir(parents=True, exist_ok=True)
        if config.workers == 0:
            alone = Worker(rank=0, world_size=1, device=device_here(config))
            num_videos = embed(config, parts, alone)
        else:
            from salt_distill.student_trainer.job import in_workers

            num_videos = in_workers(partial(embed, config.absolute(), parts), config, folder=parts)
    skipped = {
        name: reason
        for path in sorted(parts.glob("*.skipped.json"))
        for name, reason in json.loads(path.read_text()).items()
    }
    report_skipped(skipped, num_videos, config.loader.max_bad_fraction)
    num_rows = join_parts(out, sorted(parts.glob("*.arrow")))
    shutil.rmtree(parts)
    console.print(
        f"{out}: {num_rows:,} clips of {num_videos - len(skipped):,} videos", highlight=False, soft_wrap=True
    )


def embed(config: EmbedConfig, parts: Path, worker: Worker) -> int:
    """Writes the parts of this rank that are not there; gives the number of all videos."""
    torch.set_num_threads(config.num_threads)
    [candidate] = open_candidates([config.ckpt], config.num_frames, config.crop_size, config.frame_step)
    module = candidate.load()
    bfloat16 = uses_bfloat16(config.dtype, worker.device)
    encoder = EncoderOnDevice(
        candidate, module, worker.device, batch_size=config.batch_size, bfloat16=bfloat16
    )
    with open_videos(config.videos, config.loader) as videos:
        identity = fingerprint(candidate, module)
        about = _about(config, candidate, identity, videos.identity, worker.device, bfloat16)
        _require_same(parts / "about.json", about, worker)
        groups = range(-(-len(videos.names) // VIDEOS_PER_PART))
        own_groups = [group for group in groups if group % worker.world_size == worker.rank]
        todo = [group for group in own_groups if not (parts / f"{group:08d}.skipped.json").exists()]
        for group in track(
            todo, description="embedding", console=console, transient=True, disable=not console.is_terminal
        ):
            _write_group(config, group, videos, encoder, about, parts)
        worker.ranks.all_values(None)  # all parts are there
        return len(videos.names)


def _write_group(
    config: EmbedConfig,
    group: int,
    videos: VideoSet,
    encoder: EncoderOnDevice,
    about: FeatureTable,
    parts: Path,
) -> None:
    """A part: its features first, then what had to be left out, which says that it is whole."""
    first = group * VIDEOS_PER_PART
    numbers = range(first, min(first + VIDEOS_PER_PART, len(videos.names)))
    rows: list[tuple[str, int, Window]] = []
    features = [np.zeros((0, *about.shape), np.float16)]
    skipped = {}
    for number, future in videos.ahead(numbers):
        try:
            video = future.result()
            windows = windows_of(
                video.num_frames, video.fps, about.encoder.view, config.window, config.stride
            )
            video_features = list(_features(config, video, windows, videos, encoder, about))
        except BadVideoError as error:
            skipped[videos.names[number]] = str(error)
            continue
        features += video_features
        rows += [(video.name, position, window) for position, window in enumerate(windows)]
    write_part(parts / f"{group:08d}.arrow", table_of(about, rows, np.concatenate(features)))
    write_whole(parts / f"{group:08d}.skipped.json", json.dumps(skipped))


def _features(
    config: EmbedConfig,
    video: FoundVideo,
    windows: list[Window],
    videos: VideoSet,
    encoder: EncoderOnDevice,
    about: FeatureTable,
) -> Iterator[Float16[np.ndarray, "b ..."]]:
    """Of a batch of windows at a time; the next one is decoded meanwhile."""
    view = about.encoder.view
    grid_steps = about.shape[0] if config.tokens == "step" else 1
    duration_s, is_spread = video.num_frames / video.fps, config.window is not None
    cuts = [
        WindowsCut(view, tuple(windows[first : first + config.batch_size]), duration_s, is_spread)
        for first in range(0, len(windows), config.batch_size)
    ]
    coming = videos.decode(video, cuts[0])
    for following in [*cuts[1:], None]:
        frames, _ = coming.result()
        if following is not None:
            coming = videos.decode(video, following)
        pixels = rearrange(frames, "(b t) h w rgb -> b 1 t h w rgb", t=view.num_frames)
        tokens = encoder.tokens(pixels, 1).squeeze(1)
        pooled = _pooled(tokens, config.tokens, grid_steps).half().cpu().numpy()
        if not np.isfinite(pooled).all():
            raise ValueError(
                f"{video.name}: got features beyond float16's {np.finfo(np.float16).max:g}, expected smaller"
                " ones: choose another layer or encoder"
            )
        yield pooled


def _pooled(tokens: Float[Tensor, "b n e"], kind: str, grid_steps: int) -> Float[Tensor, "b ..."]:
    if kind == "all":
        return tokens
    steps = rearrange(tokens, "b (t hw) e -> b t hw e", t=grid_steps).mean(2)
    return steps if kind == "step" else steps.squeeze(1)


def _about(
    config: EmbedConfig,
    candidate: FrozenEncoder,
    identity: str,
    videos_identity: str,
    device: torch.device,
    bfloat16: bool,
) -> FeatureTable:
    grid: TokenGrid = candidate.grid
    width = candidate.config.width
    shape = {"clip": (width,), "step": (grid.t, width), "all": (grid.num_tokens, width)}[config.tokens]
    compute = {
        "device": device_kind(device),
        "dtype": "bfloat16" if bfloat16 else "float32",
        "torch": str(torch.__version__),
    }
    return FeatureTable(
        encoder=EncoderIdentity.of(candidate, identity),
        compute=compute | candidate.libraries,
        decoder=decoder_name(),
        videos=config.videos,
        videos_identity=videos_identity,
        tokens=config.tokens,
        window_s=config.window,
        stride_s=config.stride or config.window,
        shape=shape,
    )


def _require_same(path: Path, about: FeatureTable, worker: Worker) -> None:
    """Raises ValueError, on every rank, where the parts that are there were made of something else."""

    def check() -> None:
        if path.exists() and FeatureTable.read(path) != about:
            raise ValueError(
                f"{path.parent}: got parts of another `salt-eval embed` (other weights, clips, videos or"
                " pooling), expected those of this one: delete the folder, or give another --out"
            )
        if worker.rank == 0:
            about.write(path)

    worker.together(check)
