"""Checkpoints on disk: written whole or not at all, loaded strictly, ours or of others."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch
from pydantic import BaseModel, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from salt_distill.common.config import (
    TIMM,
    TIMM_RANDOM,
    Config,
    EncoderConfig,
    FrozenConfig,
    MaskConfig,
    PredictorConfig,
    ViewConfig,
    is_whole_cubes,
)
from salt_distill.common.config.base import Several
from salt_distill.common.model.frozen import AbsoluteConfig, FrozenEncoder
from salt_distill.common.model.grid import TokenGrid, token_grid
from salt_distill.common.model.hugging_face import hf_model_type, open_hf
from salt_distill.common.model.layouts import require_fit
from salt_distill.common.model.pixels import IMAGENET_MEAN, IMAGENET_STD
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.pt_files import open_pt
from salt_distill.common.model.videomae import open_videomae
from salt_distill.common.model.vit import Encoder
from salt_distill.common.whole import whole_folder, write_whole

FORMAT = 1
POINTER = "checkpoint"
_USE_ANOTHER = "use another checkpoint, or a copy of this one"


class CheckpointFile(BaseModel):
    """What a checkpoint's manifest says of a file."""

    bytes: int
    sha256: str


class CheckpointManifest(BaseModel):
    """``manifest.json``, which is written last."""

    format: int = FORMAT
    files: dict[str, CheckpointFile]
    """By name: all but the manifest itself."""


class CheckpointConfig(Config):
    """``config.json`` of a checkpoint: what its tensors are."""

    format: int = FORMAT
    objective: str
    """What trained it: vpixel, salt or vjepa."""
    step: int
    """Optimizer steps behind it."""
    encoder: EncoderConfig
    predictor: PredictorConfig
    predictor_out_width: Several[PositiveInt]
    """Channels of the predictor's output: each teacher's width, or the values of a cube of pixels."""
    view: ViewConfig
    """The clips it was trained on."""
    mask: MaskConfig
    init_std: float = 0.02
    """Standard deviation that its weights started with."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from RGB in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divides RGB in [0, 1] after the mean."""
    teacher_fingerprint: Several[str] = ()
    """The frozen teachers that it learned from, if any."""
    init_fingerprint: str | None = None
    """The encoder that it started from, if one (`--init`)."""

    @property
    def grid(self) -> TokenGrid:
        """The token grid of a clip."""
        return token_grid(self.view, self.encoder)

    @property
    def head_of(self) -> dict[str, slice]:
        """By a teacher's fingerprint, the channels of the predictor's output that predict it."""
        ends = itertools.accumulate(self.predictor_out_width)
        return {
            teacher: slice(end - width, end)
            for teacher, width, end in zip(
                self.teacher_fingerprint, self.predictor_out_width, ends, strict=False
            )
        }

    def require_teacher(self, fingerprint: str, path: str | Path, given: str) -> None:
        """Raises ValueError unless the checkpoint at ``path`` learned from the teacher ``given``."""
        if fingerprint not in self.teacher_fingerprint:
            own = " or ".join(teacher[:12] for teacher in self.teacher_fingerprint) or "none"
            raise ValueError(
                f"{path}: got teacher {given} with fingerprint {fingerprint[:12]}, expected {own}, which it"
                " learned from"
            )


def new_predictor(config: CheckpointConfig) -> Predictor:
    """The predictor that a checkpoint holds, parameters not yet filled."""
    return Predictor(
        config.predictor,
        in_width=config.encoder.width,
        out_width=sum(config.predictor_out_width),
        num_mask_tokens=len(config.mask.sets),
        rope=config.encoder.rope,
        norm_eps=config.encoder.norm_eps,
    )


def save_checkpoint(
    directory: Path,
    config: CheckpointConfig,
    modules: Mapping[str, Mapping[str, Tensor]],
    training: dict[str, Any],
) -> None:
    """Writes a checkpoint directory; it appears whole, with its manifest, or not at all.

    ``modules``: the tensors of ``model``, the encoder, and of ``predictor``; of ``online``, the encoder that
    learns, if it is another.
    """
    with whole_folder(directory) as partial:  # a resumed run may write a step again
        (partial / "config.json").write_text(config.model_dump_json(indent=2))
        with disk_errors(directory):
            for file, tensors in modules.items():
                save_file(
                    {name: tensor.contiguous() for name, tensor in tensors.items()},
                    partial / f"{file}.safetensors",
                )
            torch.save(training, partial / "training.pt")
        files = {
            path.name: CheckpointFile(bytes=path.stat().st_size, sha256=_sha256(path))
            for path in sorted(partial.iterdir())
        }
        (partial / "manifest.json").write_text(CheckpointManifest(files=files).model_dump_json(indent=2))


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Inside, an error of the disk stays an OSError: safetensors and torch make others of it."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{path} could not be written: {error}: is the disk full?") from error


def point_to(run: Path, checkpoint: Path) -> None:
    """Makes ``checkpoint`` the newest of its run; atomic."""
    write_whole(run / POINTER, f"{checkpoint.relative_to(run)}\n", synced=True)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint directory that a path means: itself, or the newest of a run directory. Raises ValueError
    where there is none.

    Of an address in an object store: a copy on this machine of what models need.
    """
    directory = on_this_machine(path)
    if not directory.is_dir():
        raise ValueError(
            f"got {directory}, expected a run directory or a checkpoint directory: there is no such directory"
        )
    if (directory / POINTER).is_file():
        directory = directory / (directory / POINTER).read_text().strip()
    if not (directory / "manifest.json").is_file():
        raise ValueError(
            f"got {directory}, expected a checkpoint (config.json, model.safetensors, manifest.json): no"
            " checkpoint has been written there"
        )
    return directory


def on_this_machine(path: str | Path) -> Path:
    """A path of this machine as it is; of an address a copy, without what continues its training: of a run,
    its newest checkpoint."""
    if "://" not in str(path):
        return Path(path)
    from salt_distill.common.folders.fetched import fetched  # brings a video decoder, which models do without
    from salt_distill.common.folders.folder import Folder

    try:
        newest = Folder(path).read(POINTER).decode().strip()
    except (FileNotFoundError, NotADirectoryError):
        newest = ""
    return fetched(path, newest, wanted=lambda name: name != "training.pt")


def read_config(path: str | Path) -> CheckpointConfig:
    """``config.json`` of a checkpoint or run directory."""
    text = verified(find_checkpoint(path), "config.json").read_text()
    if json.loads(text).get("format") != FORMAT:
        raise ValueError(
            f"{path}: got checkpoint format {json.loads(text).get('format')!r}, expected {FORMAT}"
        )
    return CheckpointConfig.model_validate_json(text)


def open_encoder(choice: FrozenConfig) -> FrozenEncoder:
    """What ``--ckpt`` means: one of our checkpoints, or another's encoder; with the clips that it is to be
    given."""
    if choice.ckpt.startswith((TIMM, TIMM_RANDOM)):
        from salt_distill.common.model.timm_encoder import open_timm  # timm takes a second to import

        encoder = open_timm(choice)
    elif not (path := on_this_machine(choice.ckpt)).exists():
        raise ValueError(
            f"got {path}, expected a run or checkpoint, a Hugging Face directory, a .pt file or {TIMM}NAME:"
            " nothing is there. A model of the Hugging Face hub is fetched first: hf download NAME"
            " --local-dir DIR"
        )
    elif path.is_file():
        encoder = open_pt(path)
    elif (model_type := hf_model_type(path)) is not None:
        encoder = open_videomae(path) if model_type == "videomae" else open_hf(path)
    else:
        encoder = _open_own(path)
    tubelet, patch = encoder.config.tubelet_size, encoder.config.patch_size
    asked = (choice.tubelet_size or tubelet, choice.patch_size or patch)
    if asked != (tubelet, patch):
        raise ValueError(
            f"{choice.ckpt}: got a token grid of {asked[0]} frames by {asked[1]} pixels, expected {tubelet}"
            f" by {patch}, which it was trained with: choose the student's patch_size and tubelet_size to"
            f" match the teacher's (only {TIMM} encoders take another)"
        )
    clip = {"num_frames": choice.num_frames, "crop_size": choice.crop_size}
    view = encoder.view.model_copy(update={name: value for name, value in clip.items() if value is not None})
    if isinstance(encoder.config, AbsoluteConfig) and view.clip_shape != encoder.view.clip_shape:
        raise ValueError(
            f"{choice.ckpt}: got clips of {view.num_frames} frames of {view.size_text} pixels, expected"
            f" {encoder.view.num_frames} of {encoder.view.size_text}, whose positions it was trained with:"
            " leave --num-frames and --crop-size out"
        )
    if not is_whole_cubes(view, tubelet_size=tubelet, patch_size=patch):
        raise ValueError(
            f"{choice.ckpt}: got clips of {view.num_frames} frames of {view.size_text} pixels, expected"
            f" multiples of {tubelet} frames and {patch} pixels: choose --num-frames and --crop-size so"
        )
    return dataclasses.replace(encoder, view=view)


def load_encoder(path: str | Path) -> nn.Module:
    """The encoder that ``--ckpt`` means, in eval mode: normalised float ``[b, 3, t, h, w]`` to tokens ``[b,
    n, d]``, final norm included."""
    return open_encoder(FrozenConfig(ckpt=str(path))).load()


def _open_own(path: Path) -> FrozenEncoder:
    config = read_config(path)
    return FrozenEncoder(
        name=path.resolve().name,
        config=config.encoder,
        view=config.view,
        mean=config.mean,
        std=config.std,
        init_std=config.init_std,
        load=functools.partial(load_vit, path),
    )


def load_vit(path: str | Path) -> Encoder:
    """The encoder of one of our checkpoints, in eval mode."""
    encoder = Encoder(read_config(path).encoder)
    load_module(encoder, find_checkpoint(path), "model.safetensors")
    return encoder.eval()


def load_predictor(path: str | Path, teacher: str | None = None) -> Predictor:
    """The predictor of a checkpoint, in eval mode. ``teacher``: fingerprint of the one whose latents alone it
    is to predict; None: all, one after the other."""
    config = read_config(path)
    predictor = new_predictor(config)
    load_module(predictor, find_checkpoint(path), "predictor.safetensors")
    if teacher is not None and len(config.head_of) > 1:
        predictor.keep_outputs(config.head_of[teacher])
    return predictor.eval()


def load_module(module: nn.Module, checkpoint: Path, file: str) -> None:
    """Fills a module from one of a checkpoint's files. Raises ValueError that names what does not fit."""
    module.load_state_dict(read_tensors(checkpoint, file, module))


def read_tensors(checkpoint: Path, file: str, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of one of a checkpoint's files, which are those of ``module``. Raises ValueError that names
    what does not fit."""
    path = verified(checkpoint, file)
    tensors = load_file(path)
    shapes = [
        {name: tensor.shape for name, tensor in part.items()} for part in (tensors, module.state_dict())
    ]
    require_fit(*shapes, where=f"{path} does not fit its config.json")
    return tensors


def load_training(checkpoint: Path) -> dict[str, Any]:
    """Optimizer state and position of a run; never unpickles code."""
    return torch.load(verified(checkpoint, "training.pt"), map_location="cpu", weights_only=True)


def verified(checkpoint: Path, file: str) -> Path:
    """The path of one of a checkpoint's files, whose bytes are those that were written. Every reading of
    one begins here. Raises ValueError where it is missing or damaged."""
    manifest, path = checkpoint / "manifest.json", checkpoint / file
    try:
        files = CheckpointManifest.model_validate_json(manifest.read_bytes()).files
    except pydantic.ValidationError as error:
        raise ValueError(
            f"{manifest}: got a damaged file, expected sizes and hashes: {_USE_ANOTHER}"
        ) from error
    if file not in files or not path.is_file():
        raise ValueError(f"{path}: got a checkpoint without it, expected it there: {_USE_ANOTHER}")
    if (num_bytes := path.stat().st_size) != files[file].bytes:
        raise ValueError(
            f"{path}: got {num_bytes} bytes, expected {files[file].bytes}: it is damaged, {_USE_ANOTHER}"
        )
    if (sha256 := _sha256(path)) != files[file].sha256:
        raise ValueError(
            f"{path}: got sha256 {sha256[:12]}, expected {files[file].sha256[:12]}: it is damaged,"
            f" {_USE_ANOTHER}"
        )
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
