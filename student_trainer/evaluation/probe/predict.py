"""`salt-eval predict`: what kept probes say of videos."""

from collections.abc import Iterator
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Float
from rich.progress import track
from torch import Tensor

from salt_distill.common.clip import BadVideoError
from salt_distill.common.config import FrozenConfig, PredictConfig
from salt_distill.common.console import console
from salt_distill.common.csv_text import csv_text
from salt_distill.common.data.segments import SegmentCut
from salt_distill.common.devices import device_here
from salt_distill.common.model.checkpoint import open_encoder
from salt_distill.common.model.compute import uses_bfloat16
from salt_distill.common.model.teacher import fingerprint
from salt_distill.common.whole import write_whole
from salt_distill.student_trainer.evaluation.probe.augment import ImageCut
from salt_distill.student_trainer.evaluation.probe.features import EncoderOnDevice
from salt_distill.student_trainer.evaluation.probe.kept import OpenProbe, open_probe
from salt_distill.student_trainer.evaluation.videos import open_videos, report_skipped

COLUMNS = ("video", "label", "view", "class", "probability")


def run(config: PredictConfig) -> None:
    """Names every video, and writes the file."""
    torch.set_num_threads(config.num_threads)
    device = device_here()
    probe_file = open_probe(Path(config.probe), config.encoder)
    encoder = encoder_of(probe_file, config, device)
    about, view = probe_file.about, probe_file.encoder.identity.view
    kind = ImageCut if about.is_image else SegmentCut
    cut = kind(view, about.segments, about.views, about.square)
    probes = {label: probe.to(device) for label, probe in probe_file.probes.items()}
    rows: list[tuple[object, ...]] = [COLUMNS]
    skipped = {}
    with open_videos(config.videos, config.loader) as videos:
        for number, future in track(
            videos.ahead(range(len(videos.names))),
            total=len(videos.names),
            description="predicting",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ):
            try:
                frames, _ = videos.decode(future.result(), cut).result()
            except BadVideoError as error:
                skipped[videos.names[number]] = str(error)
                continue
            clips = rearrange(frames, "(c t) h w rgb -> 1 c t h w rgb", t=view.num_frames)
            tokens = encoder.tokens(clips, about.views)[0]
            for label, probe in probes.items():
                with (
                    torch.no_grad(),
                    torch.autocast(device.type, dtype=torch.bfloat16, enabled=encoder.bfloat16),
                ):
                    probabilities = probe(tokens).float().softmax(-1).cpu()
                for answer in _answers(probabilities, about.labels[label].class_names):
                    rows.append((videos.names[number], label, *answer))
        num_videos = len(videos.names)
    report_skipped(skipped, num_videos, config.loader.max_bad_fraction)
    write_whole(Path(config.out), csv_text(rows))
    console.print(
        f"{config.out}: {num_videos - len(skipped):,} videos, {', '.join(probes)}",
        highlight=False,
        soft_wrap=True,
    )


def encoder_of(probe_file: OpenProbe, config: PredictConfig, device: torch.device) -> EncoderOnDevice:
    """The encoder that the probes read. Raises ValueError where another is found."""
    ckpt = config.ckpt or probe_file.encoder.ckpt
    assert ckpt is not None, "probes of fresh weights are not chosen"
    view = probe_file.encoder.identity.view
    candidate = open_encoder(FrozenConfig(ckpt=ckpt, num_frames=view.num_frames, crop_size=view.crop_size))
    module = candidate.load()
    identity, expected = fingerprint(candidate, module), probe_file.encoder.identity.fingerprint
    if identity != expected:
        raise ValueError(
            f"got encoder {ckpt} with fingerprint {identity[:12]}, expected {expected[:12]}, which the probe"
            " was trained on: give --ckpt"
        )
    return EncoderOnDevice(
        candidate,
        module,
        device,
        batch_size=config.batch_size,
        bfloat16=uses_bfloat16(config.dtype, device),
    )


def _answers(
    probabilities: Float[Tensor, "v classes"], class_names: tuple[str, ...]
) -> Iterator[tuple[str, str, str]]:
    """View, class and probability: of all views together, then of each where there are several."""
    views = [("all", probabilities.mean(0))]
    if len(probabilities) > 1:
        views += [(str(number), row) for number, row in enumerate(probabilities)]
    for view, row in views:
        yield view, class_names[int(row.argmax())], f"{float(row.max()):.6f}"
