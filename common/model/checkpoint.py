"""Checkpoints on disk: written whole or not at all, loaded strictly."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from safetensors.torch import load_file, save_file
from torch import nn

from common.config import Config, EncoderConfig, MaskConfig, PredictorConfig, ViewConfig
from common.model.grid import TokenGrid, token_grid
from common.model.pixels import IMAGENET_MEAN, IMAGENET_STD
from common.model.predictor import Predictor
from common.model.vit import Encoder

FORMAT = 1
POINTER = "checkpoint"


class CheckpointConfig(Config):
    """``config.json`` of a checkpoint: what its tensors are."""

    format: int = FORMAT
    objective: str
    """What trained it: vpixel, salt or vjepa."""
    step: int
    """Optimizer steps behind it."""
    encoder: EncoderConfig
    predictor: PredictorConfig
    predictor_out_width: PositiveInt
    """Channels of the predictor's output: the teacher's width, or the values of a cube of pixels."""
    view: ViewConfig
    """The clips it was trained on."""
    mask: MaskConfig
    init_std: float = 0.02
    """Standard deviation that its weights started with."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from RGB in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divides RGB in [0, 1] after the mean."""
    teacher_fingerprint: str | None = None
    """The frozen teacher that it learned from, if one."""

    @property
    def grid(self) -> TokenGrid:
        """The token grid of a clip."""
        return token_grid(self.view, self.encoder)


def new_predictor(config: CheckpointConfig) -> Predictor:
    """The predictor that a checkpoint holds, parameters not yet filled."""
    return Predictor(
        config.predictor,
        in_width=config.encoder.width,
        out_width=config.predictor_out_width,
        num_mask_tokens=len(config.mask.sets),
        rope=config.encoder.rope,
        norm_eps=config.encoder.norm_eps,
    )


def save_checkpoint(
    directory: Path,
    config: CheckpointConfig,
    encoder: nn.Module,
    predictor: nn.Module,
    training: dict[str, Any],
    *,
    online: nn.Module | None = None,
) -> None:
    """Writes a checkpoint directory; it appears whole, with its manifest, or not at all. ``online``: the encoder that learns, if it is another."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".partial-{directory.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    (partial / "config.json").write_text(config.model_dump_json(indent=2))
    modules = {"model": encoder, "predictor": predictor} | ({} if online is None else {"online": online})
    for file, module in modules.items():
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, partial / f"{file}.safetensors")
    torch.save(training, partial / "training.pt")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(partial.iterdir())}
    (partial / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}, indent=2))
    for path in partial.iterdir():
        _fsync(path)
    _fsync(partial)
    if directory.exists():  # a step that a resumed run writes again
        shutil.rmtree(directory)
    partial.rename(directory)
    _fsync(directory.parent)


def point_to(run: Path, checkpoint: Path) -> None:
    """Makes ``checkpoint`` the newest of its run; atomic."""
    partial = run / f".{POINTER}"
    partial.write_text(f"{checkpoint.relative_to(run)}\n")
    _fsync(partial)
    partial.replace(run / POINTER)
    _fsync(run)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint directory that a path means: itself, or the newest of a run directory. Raises ValueError where there is none."""
    directory = Path(path)
    if not directory.is_dir():
        raise ValueError(f"got {directory}, expected a run directory or a checkpoint directory: there is no such directory")
    if (directory / POINTER).is_file():
        directory = directory / (directory / POINTER).read_text().strip()
    if not (directory / "manifest.json").is_file():
        raise ValueError(
            f"got {directory}, expected a checkpoint (config.json, model.safetensors, manifest.json): no checkpoint has been written there"
        )
    return directory


def read_config(path: str | Path) -> CheckpointConfig:
    """``config.json`` of a checkpoint or run directory."""
    text = (find_checkpoint(path) / "config.json").read_text()
    if json.loads(text).get("format") != FORMAT:
        raise ValueError(f"{path}: got checkpoint format {json.loads(text).get('format')!r}, expected {FORMAT}")
    return CheckpointConfig.model_validate_json(text)


def load_encoder(path: str | Path) -> Encoder:
    """The encoder of a checkpoint, in eval mode: normalised float ``[b, 3, t, h, w]`` to tokens ``[b, n, e]``, final norm included."""
    encoder = Encoder(read_config(path).encoder)
    load_module(encoder, find_checkpoint(path), "model.safetensors")
    return encoder.eval()


def load_predictor(path: str | Path) -> Predictor:
    """The predictor of a checkpoint, in eval mode."""
    predictor = new_predictor(read_config(path))
    load_module(predictor, find_checkpoint(path), "predictor.safetensors")
    return predictor.eval()


def load_module(module: nn.Module, checkpoint: Path, file: str) -> None:
    """Fills a module from one of a checkpoint's files. Raises ValueError that names what does not fit."""
    path = checkpoint / file
    expected_bytes = json.loads((checkpoint / "manifest.json").read_text())["files"][file]["bytes"]
    if path.stat().st_size != expected_bytes:
        raise ValueError(f"{path}: got {path.stat().st_size} bytes, expected {expected_bytes}: the file is damaged, use another checkpoint")
    found, expected = load_file(path), module.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in expected]
    problems += [
        f"{name}: got {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit its config.json: {'; '.join(problems[:5])}"
            + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
        )
    module.load_state_dict(found)


def load_training(checkpoint: Path) -> dict[str, Any]:
    """Optimizer state and position of a run; never unpickles code."""
    return torch.load(checkpoint / "training.pt", map_location="cpu", weights_only=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
