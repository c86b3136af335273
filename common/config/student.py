"""Training runs of stage 2: ``salt-train student``."""

from typing import Annotated, Self

from pydantic import PositiveFloat, model_validator

from salt_distill.common.config.base import Several
from salt_distill.common.config.marks import OnResume, Shown
from salt_distill.common.config.model import TargetDtype
from salt_distill.common.config.service_client import OnTeacherLoss, ServiceClientConfig
from salt_distill.common.config.train import TeacherComputeConfig, TrainConfig
from salt_distill.common.config.wrong_values import Name


class StudentRun(TrainConfig):
    """Stage 2, SALT: predict the latents of a frozen teacher, or of several. A teacher is a service, a cache
    or a checkpoint; they are numbered from 0, services first, then caches, then checkpoints."""

    paths = (
        *TrainConfig.paths,
        *("targets", "teacher_ckpt", "cache", "teacher_token_file", "teacher_ca", "predict_from"),
    )
    objective = "salt"

    teacher_url: Annotated[
        Several[str],
        OnResume(
            "the source of targets may move or be another; the teacher's fingerprint and compute are compared"
            " with the checkpoint's"
        ),
    ] = ()
    """URL of a teacher service, as `salt-serve teacher` prints it. Repeat it for several teachers."""
    teacher_token_file: Annotated[str | None, OnResume("how the source is reached")] = None
    """File with the access token for every `--teacher-url`, and nothing else. None: the environment variable
    SALT_TOKEN, if it is set."""
    teacher_ca: Annotated[str | None, OnResume("how the source is reached")] = None
    """Certificates that an https `--teacher-url` may be signed by, a PEM file; None: those that the machine
    trusts."""
    targets: Annotated[Several[str], OnResume("as `teacher_url`")] = ()
    """A target cache, as `salt-serve precompute` writes it, or its address in an object store: it is then
    copied to this machine first."""
    teacher_ckpt: Annotated[Several[str], OnResume("as `teacher_url`")] = ()
    """A frozen encoder, as `salt-serve teacher --ckpt` takes it: the teacher runs in the student's own
    process, on the student's clips."""
    teacher_weight: Annotated[Several[PositiveFloat], Shown()] = ()
    """With several teachers: the weight of each one's loss, in their order. The run's loss is the weighted
    mean. None: equal weights."""
    target_dtype: Annotated[TargetDtype, Shown()] = "float16"
    """Number format of the targets, the same from every source."""
    on_teacher_loss: Annotated[OnTeacherLoss, OnResume("what follows when the service stays away")] = "fail"
    """What to do when a service fails for longer than `client.retry_budget_s`. `fail`: stop the run. `wait`:
    ask again without end. `local`: compute with the teacher of `--teacher-ckpt` in this process until the
    service answers again (for several services one each, in their order); at the start of a run, and of
    `--resume`, the service must answer."""
    masked_targets: Annotated[bool, Shown(), OnResume("fewer bytes, the same losses")] = False
    """Ask a service only for the tokens that the masks hide: fewer bytes, the same losses."""
    cache: Annotated[Several[str], OnResume("speed")] = ()
    """Folder that keeps the targets from a service for the next epoch or run: a target is looked up there
    before the service is asked. Any number of runs and workers may share it; several services have one each,
    in their order. It is of use for pinned views (`--views K`), since fresh views are not seen again."""
    predict_from: Annotated[str | None, OnResume("what else is said of the held-out loss")] = None
    """With `--val-every`: folder of probed students of this teacher and their probe.json; the accuracy that
    the held-out loss predicts by them is shown with its interval."""
    predict_label: Annotated[str | None, Shown(), OnResume("what else is said of the held-out loss")] = None
    """Label of that probe.json whose accuracy is meant; None: its only one."""
    group: Annotated[Name | None, Shown(), OnResume("which runs wait for each other")] = None
    """Name of a group of runs that use one service. The runs that are ahead wait for the others, so that each
    target is computed once for all and is still in the service's memory (with several services: the first
    one's)."""
    teacher: Annotated[TeacherComputeConfig, Shown()] = TeacherComputeConfig()
    client: Annotated[ServiceClientConfig, OnResume("how the source is asked")] = ServiceClientConfig()

    @property
    def num_teachers(self) -> int:
        """Teachers that the run learns from."""
        reserves = self.teacher_ckpt if self.on_teacher_loss == "local" else ()
        return len(self.teacher_url + self.targets + self.teacher_ckpt) - len(reserves)

    @property
    def loss_shares(self) -> tuple[float, ...]:
        weights = self.teacher_weight or (1.0,) * max(self.num_teachers, 1)
        return tuple(weight / sum(weights) for weight in weights)

    @model_validator(mode="after")
    def _sources(self) -> Self:
        given = [name for name in ("teacher_url", "targets", "teacher_ckpt") if getattr(self, name)]
        flags = ", ".join("--" + name.replace("_", "-") for name in given) or "none"
        if self.on_teacher_loss == "local" and (
            given != ["teacher_url", "teacher_ckpt"] or len(self.teacher_url) != len(self.teacher_ckpt)
        ):
            raise ValueError(
                f"got --on-teacher-loss local with {flags}, expected --teacher-url, and --teacher-ckpt as"
                " the reserve, for each service one"
            )
        if not given and self.gpu is None:  # a count needs no targets
            raise ValueError(
                "got no source of targets, expected one for each teacher: --teacher-url, --targets or"
                " --teacher-ckpt"
            )
        for name in (
            "on_teacher_loss",
            "masked_targets",
            "group",
            "cache",
            "teacher_token_file",
            "teacher_ca",
        ):
            if not self.teacher_url and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"got --{name.replace('_', '-')} with {flags}, expected it with --teacher-url: it is"
                    " about a service"
                )
        return self

    @model_validator(mode="after")
    def _a_weight_each(self) -> Self:
        if self.teacher_weight and (self.num_teachers < 2 or len(self.teacher_weight) != self.num_teachers):
            raise ValueError(
                f"got --teacher-weight {' '.join(f'{weight:g}' for weight in self.teacher_weight)} for"
                f" {self.num_teachers} teacher(s), expected none for one, and of several one each, in their"
                " order: --teacher-url, then --targets, then --teacher-ckpt"
            )
        return self

    @property
    def extras(self) -> tuple[str, ...]:
        return super().extras if self.predict_from is None else (*super().extras, "eval")

    @model_validator(mode="after")
    def _predictable(self) -> Self:
        if self.predict_from is not None and self.val_every is None:
            raise ValueError("got --predict-from without --val-every, expected both: the loss predicts")
        if self.predict_from is not None and self.num_teachers > 1:
            raise ValueError(
                f"got --predict-from with {self.num_teachers} teachers, expected one: a loss predicts among"
                " students of one teacher"
            )
        if self.predict_label is not None and self.predict_from is None:
            raise ValueError("got --predict-label without --predict-from, expected both")
        return self

    @model_validator(mode="after")
    def _cacheable(self) -> Self:
        if self.cache and self.masked_targets:
            raise ValueError(
                "got --cache with --masked-targets, expected one of them: a cache holds whole targets, for"
                " any mask"
            )
        if self.cache and self.views == "fresh":
            raise ValueError(
                "got --cache with --views fresh, expected --views K: fresh views are not seen again, and"
                " would fill the disk"
            )
        if self.cache and len(self.cache) != len(self.teacher_url):
            raise ValueError(
                f"got {len(self.cache)} --cache for {len(self.teacher_url)} --teacher-url, expected one each,"
                " in their order: a cache is of one teacher"
            )
        return self
