"""Starting a run from weights that somebody trained: ``--init``."""

from pathlib import Path

from salt_distill.common.config import EncoderConfig, FrozenConfig, TrainConfig
from salt_distill.common.model.checkpoint import (
    POINTER,
    CheckpointConfig,
    find_checkpoint,
    load_predictor,
    on_this_machine,
    open_encoder,
    read_config,
)
from salt_distill.common.model.hugging_face import hf_model_type
from salt_distill.common.model.pixels import IMAGENET_MEAN, IMAGENET_STD
from salt_distill.common.model.teacher import fingerprint
from salt_distill.student_trainer.objective import Objective
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.vjepa import VJepa
from salt_distill.student_trainer.vpixel import VPixel


def initialised(
    checkpoint_config: CheckpointConfig,
    objective: Objective,
    config: TrainConfig,
    worker: Worker,
    checkpoint: Path | None,
) -> CheckpointConfig:
    """``checkpoint_config`` with what the run started from. Where it begins (rank 0 has no ``checkpoint``),
    ``objective`` is filled from there."""
    if config.init is None:
        return checkpoint_config
    if worker.ranks.all_values(checkpoint is None)[0]:
        identity = start_from(config.init, objective, config, worker)
    else:
        identity = None if checkpoint is None else read_config(checkpoint).init_fingerprint
    return checkpoint_config.model_copy(update={"init_fingerprint": identity})


def start_from(init: str, objective: Objective, config: TrainConfig, worker: Worker) -> str:
    """Fills the encoder of ``objective`` from what ``--ckpt`` commands read, its predictor too where the
    checkpoint is ours and has one of these shapes; the fingerprint of the encoder. Raises ValueError where
    the encoder is another: clips may differ, since positions are rotations, but no width."""
    if (Path(init) / POINTER).exists():  # of a run that may still train: encoder and predictor of one step
        init = str(find_checkpoint(init))
    elif Path(init).is_symlink():  # checkpoints/best, which may point elsewhere soon
        init = str(Path(init).resolve())
    frozen = open_encoder(FrozenConfig(ckpt=init))
    if not isinstance(frozen.config, EncoderConfig):
        raise ValueError(
            f"got --init {init}, which is no video ViT with rotary positions, expected one of ours or V-JEPA"
            " 2's: leave --init out, or let it teach a student (--teacher-ckpt)"
        )
    theirs, ours = frozen.config.model_dump(), config.encoder.model_dump()
    different = [key for key in ours if theirs[key] != ours[key]]
    if different:
        raise ValueError(
            f"got --init {init} with {', '.join(f'{key}={theirs[key]}' for key in different)}, expected the"
            f" run's {', '.join(f'{key}={ours[key]}' for key in different)}: choose the preset, or --set"
            " encoder.KEY, of the checkpoint"
        )
    if (frozen.mean, frozen.std) != (IMAGENET_MEAN, IMAGENET_STD):
        raise ValueError(
            f"got --init {init}, whose clips are normalised by {frozen.mean} and {frozen.std}, expected"
            f" {IMAGENET_MEAN} and {IMAGENET_STD}, by which a run normalises"
        )
    weights = frozen.load()
    objective.encoder.load_state_dict(weights.state_dict())
    if isinstance(objective, VJepa):
        objective.target_encoder.load_state_dict(weights.state_dict())
    reason = _fill_predictor(init, objective, config)
    identity = fingerprint(frozen, weights)
    worker.say(f"starting from {init}, fingerprint {identity[:12]}; the predictor {reason}")
    return identity


def _fill_predictor(init: str, objective: Objective, config: TrainConfig) -> str:
    """What became of the predictor, in words. It is taken where it is the same network for the same kind of
    target: pixels and latents may have equally many channels."""
    path = on_this_machine(init)
    if path.is_file() or hf_model_type(path) is not None:
        return "starts afresh: only a checkpoint of ours is read for one"
    if (read_config(path).objective == "vpixel") != isinstance(objective, VPixel):
        return "starts afresh: the checkpoint's predicts another kind of target"
    if read_config(path).predictor != config.predictor:
        return "starts afresh: the checkpoint's is of another size"
    predictor = load_predictor(init).state_dict()
    shapes = {name: tensor.shape for name, tensor in objective.predictor.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in predictor.items()}:
        return "starts afresh: the checkpoint's has other shapes"
    objective.predictor.load_state_dict(predictor)
    return "is the checkpoint's"
