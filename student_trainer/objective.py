"""What a run trains: one of three objectives, each a module whose ``forward`` is its equation."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from salt_distill.common.config import TeacherRun, TrainConfig, VJepaRun
from salt_distill.common.model.checkpoint import CheckpointConfig, new_predictor
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.teacher import TeacherSpec
from salt_distill.common.model.vit import Encoder, init_weights
from salt_distill.student_trainer.salt import Salt
from salt_distill.student_trainer.vjepa import VJepa
from salt_distill.student_trainer.vpixel import VPixel, pixel_width

Objective = VPixel | Salt | VJepa


def new_objective(
    config: TrainConfig, teachers: Sequence[TeacherSpec] = ()
) -> tuple[Objective, CheckpointConfig]:
    """The model of a run, initialised from its seed, and what its checkpoints say about it. Raises ValueError
    where a teacher sees other tokens, or two are one."""
    grid = tuple(token_grid(config.view, config.encoder))
    for number, teacher in enumerate(teachers):
        name = "a teacher" if len(teachers) == 1 else f"teacher {number}, {teacher.fingerprint[:12]},"
        if teacher.grid != grid or teacher.clip_shape != config.view.clip_shape:
            raise ValueError(
                f"got {name} for {_clips(teacher.clip_shape, teacher.grid)}, and a student for"
                f" {_clips(config.view.clip_shape, grid)}, expected the same: give the student"
                f" {_flags(teacher)}"
            )
    fingerprints = tuple(teacher.fingerprint for teacher in teachers)
    if len(set(fingerprints)) < len(fingerprints):
        raise ValueError(
            f"got teachers {', '.join(teacher[:12] for teacher in fingerprints)}, expected different ones: a"
            " teacher that counts for more has a larger --teacher-weight"
        )
    checkpoint_config = CheckpointConfig(
        objective=config.objective,
        step=0,
        encoder=config.encoder,
        predictor=config.predictor,
        predictor_out_width=_out_widths(config, tuple(teacher.width for teacher in teachers)),
        view=config.view,
        mask=config.mask,
        init_std=config.init_std,
        teacher_fingerprint=fingerprints,
    )
    generator = torch.Generator().manual_seed(config.seed)
    encoder, predictor = Encoder(config.encoder), new_predictor(checkpoint_config)
    init_weights(encoder, generator, std=config.init_std)
    predictor.init_weights(generator, std=config.init_std)
    return _objective(config, encoder, predictor), checkpoint_config


def uninitialised_objective(config: TrainConfig, *teacher_widths: int) -> Objective:
    """The model of a run, with whatever its weights are: to count what it does."""
    predictor = Predictor(
        config.predictor,
        in_width=config.encoder.width,
        out_width=sum(_out_widths(config, teacher_widths)),
        num_mask_tokens=len(config.mask.sets),
        rope=config.encoder.rope,
        norm_eps=config.encoder.norm_eps,
    )
    return _objective(config, Encoder(config.encoder), predictor)


def _clips(clip_shape: tuple[int, ...], grid: tuple[int, ...]) -> str:
    """Clips and their tokens in words."""
    frames, height, width, _ = clip_shape
    return f"clips of {frames} frames of {height}x{width} pixels, as {'x'.join(map(str, grid))} tokens"


def _flags(teacher: TeacherSpec) -> str:
    """Those that give a student the clips and tokens of its teacher."""
    frames, height, width, _ = teacher.clip_shape
    crop_size = height if height == width else f"[{height},{width}]"
    tubelet_size, patch_size = frames // teacher.grid[0], height // teacher.grid[1]
    return (
        f"--set view.num_frames={frames} --set view.crop_size={crop_size} --set"
        f" encoder.tubelet_size={tubelet_size} --set encoder.patch_size={patch_size}"
    )


def _out_widths(config: TrainConfig, teacher_widths: tuple[int, ...]) -> tuple[int, ...]:
    """Channels of what is predicted: of the pixels, of each teacher, or of the run's own encoder."""
    if isinstance(config, TeacherRun):
        return (pixel_width(config.encoder),)
    return teacher_widths or (config.encoder.width,)


def of_teachers(losses: Float[Tensor, "losses b"], num_teachers: int) -> list[Float[Tensor, " b"]]:
    """What an objective's ``forward`` gives -> the loss of each clip for each teacher, the mean over the mask
    sets; of an objective without teachers its one loss."""
    parts = losses.chunk(num_teachers) if num_teachers > 1 else [losses]
    return [part.mean(0) for part in parts]


def weighted_mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Of the teachers' losses; ``shares`` are 1 together."""
    if len(values) == 1:
        return values[0]
    return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum(0)


def _objective(config: TrainConfig, encoder: Encoder, predictor: Predictor) -> Objective:
    if isinstance(config, TeacherRun):
        return VPixel(encoder, predictor, pixel_norm=config.pixel_norm)
    if isinstance(config, VJepaRun):
        return VJepa(encoder, predictor, ema=config.ema)
    return Salt(encoder, predictor)


def modules_of(objective: Objective) -> dict[str, nn.Module]:
    """What a checkpoint holds of an objective, by the names of its files. ``model`` is what the run is for:
    the encoder that is judged, served and exported."""
    if isinstance(objective, VJepa):
        return {
            "model": objective.target_encoder,
            "predictor": objective.predictor,
            "online": objective.encoder,
        }
    return {"model": objective.encoder, "predictor": objective.predictor}
