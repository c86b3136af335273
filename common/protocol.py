"""The HTTP contract between a teacher service and its students (DESIGN section 4, HTTP).

Routes, headers, statuses, and the JSON bodies. Both sides and the OpenAPI page take it from here; the
Arrow bodies are those of ``salt_distill.common.targets.wire``."""

import enum
import json
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    WithJsonSchema,
    field_validator,
)

from salt_distill.common.config.model import TargetDtype
from salt_distill.common.metrics import ServiceCounters, counter, gauge, metrics_of

PROTOCOL = "1"
"""Version of everything in this file, and of the Arrow bodies."""
ARROW_TYPE = "application/vnd.apache.arrow.stream"
"""Content type of the bodies of ``POST /v1/targets``."""
ID_PATTERN = r"^[A-Za-z0-9._-]{1,64}$"
"""Ids of runs, groups and requests; a run's is neither `.` nor `..`."""
MAX_CONFIG_BYTES = 32_768
"""Largest configuration that the board keeps of a run, in bytes of JSON."""
MAX_JSON_BYTES = 65_536
"""Largest JSON body that the service reads."""
MAX_COUNT = 2**53
"""Largest number of steps or clips: those up to it are exact in every reader of JSON."""

RowStatus = Literal["ok", "need_clip", "bad_digest", "bad_shape"]
"""Of a row of an answer with targets."""
ROW_STATUSES: tuple[RowStatus, ...] = ("ok", "need_clip", "bad_digest", "bad_shape")


class Route(enum.StrEnum):
    """Paths, below a service's URL."""

    TEACHER = "/v1/teacher"
    TARGETS = "/v1/targets"
    RUNS = "/v1/runs"
    RUN = "/v1/runs/{run}"
    PROGRESS = "/v1/runs/{run}/progress"
    HISTORY = "/v1/history"
    DRAIN = "/v1/drain"
    STOP = "/v1/stop"
    ALIVE = "/healthz"
    READY = "/readyz"
    METRICS = "/metrics"
    PAGE = "/"


class Header(enum.StrEnum):
    """Headers of ours, each with its meaning."""

    meaning: str

    def __new__(cls, name: str, meaning: str) -> Self:
        """A member that is its name."""
        header = str.__new__(cls, name)
        header._value_, header.meaning = name, meaning
        return header

    RUN = "X-Salt-Run", "The student run that asks."
    TEACHER = "X-Salt-Teacher", "The fingerprint of the teacher that is asked; another one answers 409."
    DEADLINE_MS = "X-Salt-Deadline-Ms", "How long the client still waits, in whole milliseconds."
    BUCKET = "X-Salt-Bucket", "Which part of the clips a request holds: equal buckets reach one replica."
    REQUEST = "X-Salt-Request", "The request's id: the client's own, or one that the answer tells it."
    RETRY = "X-Salt-Retry", "How often the request has been tried before."
    PASSED = "X-Salt-Passed", "The secret of the replicas: a request that one of them passes on to another."
    SHARE = (
        "X-Salt-Share",
        "Of a request that is passed on: the token whose share of the service it counts to.",
    )


class HttpStatus(enum.IntEnum):
    """What the service refuses with, each with its meaning. A body of ``ErrorBody`` says more."""

    meaning: str

    def __new__(cls, status: int, meaning: str) -> Self:
        """A member that is its number."""
        member = int.__new__(cls, status)
        member._value_, member.meaning = status, meaning
        return member

    NO_TOKEN = 401, "No token that the service knows."
    FORBIDDEN = 403, "The token is not for this run, group or route; or a web page of another site asks."
    NOT_FOUND = 404, "No such route or run."
    TOO_SLOW = 408, "The body took too long to arrive."
    OTHER_TEACHER = 409, "Another teacher is served here."
    TOO_LARGE = 413, "More bytes or clips than a request may have."
    WRONG_TYPE = 415, "The body is not of the content type that the route takes."
    MALFORMED = 422, "The body or a header is not what the route takes."
    BUSY = 429, "Others fill the service, or the token's rate is spent: ask again after Retry-After."
    HEAD_TOO_LARGE = 431, "The head of the request is too large."
    FAILED = 500, "The teacher failed; the request may be repeated."
    NOT_READY = 503, "The service starts or ends: ask again after Retry-After."
    EXPIRED = 504, "The request's deadline has passed; what was computed is in memory."


RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
"""Requests are pure: one that is answered so is worth repeating. 502 is a proxy's."""


class _Fact(BaseModel):
    """What the service says. A reader ignores what a later service may add."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)


class ErrorBody(_Fact):
    """The body of every refusal."""

    error: str
    """What is wrong, in a few words."""
    expected: str
    """What the service takes."""
    got: str
    """What it was sent."""
    hint: str
    """What to do."""


class TeacherLimits(_Fact):
    """What a request may hold."""

    max_request_bytes: int
    """Largest request body, in bytes."""
    max_request_clips: int
    """Most rows of a request."""
    lease_s: float
    """How long who was answered ``need_clip`` may take to upload the clip, in seconds."""


Activity = Literal["running", "finished", "stopped"]
"""What a run says of itself: it trains, it has done its last step, or it ended before (an error, Ctrl-C)."""
RunStatus = Literal["running", "finished", "stopped", "lost"]
"""What the board says of a run: what it said itself, or lost where a running one fell silent."""

EndingName = Literal["no", "drain", "stop"]
"""A service takes new requests for targets (no), only answers what it has begun (drain), then ends (stop)."""


class TeacherFacts(_Fact):
    """The answer to ``GET /v1/teacher``: which teacher is served, how it runs, what it takes and has done."""

    name: str
    """For people: the teacher's run directory."""
    fingerprint: str
    """sha256 of architecture and weights."""
    compute: dict[str, str | int | bool]
    """Device kind, dtype, batch size, threads, versions, compiled: what a target's last bits depend on."""
    clip_shape: tuple[int, int, int, int]
    """(t, h, w, 3) of the clips that it takes."""
    grid: tuple[int, int, int]
    """(t, h, w) of its tokens."""
    width: int
    """Channels of a target token."""
    num_parameters: int
    """Weights of the encoder."""
    protocol: str
    """Version of this contract."""
    dtypes: tuple[TargetDtype, ...]
    """Roundings that targets may be asked for in."""
    batch_size: int
    """Clips of one forward."""
    buckets: int
    """Into how many parts a client splits its clips by digest, so that equal clips reach one replica."""
    ingress: str
    """What stands between client and replica."""
    limits: TeacherLimits
    ready: bool
    """Weights are loaded, and a target can be had."""
    ending: EndingName
    counters: ServiceCounters
    """Sums over all replicas."""


class EndingAnswer(_Fact):
    """The answer to ``POST /v1/drain`` and ``POST /v1/stop``."""

    ending: EndingName


class Alive(_Fact):
    """The answer to ``GET /healthz``: the process answers and its parts run."""

    alive: Literal[True] = True


class Ready(_Fact):
    """The answer to ``GET /readyz``: weights are loaded, one forward is done, and a target can be had."""

    ready: Literal[True] = True


class RunState(BaseModel):
    """Where a student run is."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    step: Annotated[NonNegativeInt, gauge("steps")] = Field(le=MAX_COUNT)
    """Optimizer steps done, as the run reported last."""
    num_steps: NonNegativeInt | None = Field(default=None, le=MAX_COUNT)
    """Optimizer steps of the whole run; None where it has not said."""
    activity: Activity = "running"
    slot: NonNegativeInt = Field(le=MAX_COUNT)
    """The next slot of the data order."""
    loss: Annotated[float | None, gauge("L1")] = Field(default=None, ge=-1e30, le=1e30)
    """Loss of that step."""
    val_loss: Annotated[float | None, gauge("L1")] = Field(default=None, ge=-1e30, le=1e30)
    """The newest loss on held-out clips; None without one."""
    val_step: NonNegativeInt | None = Field(default=None, le=MAX_COUNT)
    """The step that it was measured after."""
    predicted_accuracy: Annotated[float | None, gauge("ratio")] = Field(default=None, ge=0, le=1)
    """Accuracy that the held-out loss predicts, by a line through probed runs; None without one."""
    predicted_low: Annotated[float | None, gauge("ratio")] = Field(default=None, ge=0, le=1)
    """Lower end of the prediction's interval, in which 95% of new runs would lie."""
    predicted_high: Annotated[float | None, gauge("ratio")] = Field(default=None, ge=0, le=1)
    """Upper end of that interval."""
    flops: Annotated[NonNegativeFloat | None, gauge("FLOP")] = Field(default=None, le=1e40)
    """Compute of the run so far, the teacher's forwards included."""
    teacher_wait_ms: Annotated[NonNegativeFloat | None, gauge("milliseconds")] = Field(default=None, le=1e15)
    """Time that a step waited for its targets."""
    step_ms: Annotated[NonNegativeFloat | None, gauge("milliseconds")] = Field(default=None, le=1e15)
    """Time of a step."""
    clips_per_s: Annotated[NonNegativeFloat | None, gauge("clips/s")] = Field(default=None, le=1e15)
    """Clips trained on per second."""
    group: str | None = Field(default=None, pattern=ID_PATTERN)
    """Runs of one data seed that keep together, so that memory serves them all; a report without it leaves
    the group."""
    worker: NonNegativeInt = Field(default=0, lt=100_000)
    """Which worker of the run says so. Each is a member of the group; the first one's report is shown."""


class Progress(RunState):
    """Body of ``POST /v1/runs/{run}/progress``."""

    config: Annotated[
        dict[str, JsonValue] | None, WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "null"}]})
    ] = None
    """The run's resolved configuration, without secrets and paths; the board keeps the newest one that it was
    given."""

    @field_validator("config")
    @classmethod
    def _can_be_said_again(cls, config: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        """What every reader of JSON can read, in a bounded size."""
        if config is None:
            return None
        try:
            text = json.dumps(config, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"got a configuration that is no plain JSON: {error}") from None
        if len(text) > MAX_CONFIG_BYTES:
            raise ValueError(
                f"got a configuration of {len(text)} bytes, expected at most {MAX_CONFIG_BYTES}: leave it out"
            )
        return config


class Standing(_Fact):
    """The answer to a progress report: where the run is in its group."""

    wait: bool
    """The run is further ahead than memory reaches: it asks again, with the same report, before it goes
    on."""
    slowest_slot: int | None
    """Of the live members of the other runs and of who asks; None without a group."""
    window_clips: int
    """Clips that the replicas' memory holds: how far ahead a member may be."""
    members: int
    """Live members of the group: the workers of its runs."""


class BoardRun(_Fact):
    """A student run as ``GET /v1/runs`` lists it."""

    id: str
    """The run's id."""
    clips_served: Annotated[int, counter("targets")]
    """Targets sent to the run."""
    clips_computed: Annotated[int, counter("clips")]
    """Clips that were computed because the run asked for them."""
    clips_shared: Annotated[int, counter("targets")]
    """Targets sent to the run that another run had asked for before."""
    bytes_out: Annotated[int, counter("bytes")]
    """Size of the answers to the run."""
    seen_s: Annotated[float, gauge("seconds since 1970", name="seen_timestamp_seconds")]
    """Time of the run's last request or report."""
    hit_rate: float | None
    """Share of its targets that another run had asked for: ``clips_shared`` over ``clips_served``. Its own
    earlier epochs are not among them."""
    skew_clips: Annotated[int | None, gauge("clips")]
    """How far the run is ahead of the slowest run of its group; none without a group."""
    progress: RunState | None
    """What it reported last; None before its first report."""
    status: RunStatus
    left_s: float | None
    """Time to its last step at the speed of its last report, in seconds; None where that is not known, or it
    does not train."""


class ServedHistory(_Fact):
    """The answer to ``GET /v1/history``: what the service has served over the last hour, all replicas
    together."""

    seconds: list[float]
    """When each number was taken, in seconds since 1970."""
    clips_served: list[int]
    """Targets sent by then."""


class CurvePoints(_Fact):
    """A run's loss against steps and FLOPs, in a bounded number of points."""

    step: list[int]
    """Optimizer steps done at each point."""
    flops: list[float | None]
    """Compute spent."""
    loss: list[float]
    """Mean loss since the point before."""


class BoardRunDetail(BoardRun):
    """A student run as ``GET /v1/runs/{run}`` shows it."""

    config: dict[str, JsonValue] | None
    """What the run learns and how."""
    curve: CurvePoints
    val_curve: CurvePoints
    """Loss on held-out clips."""


RUN_METRICS = tuple(
    metric for record in (BoardRun, RunState) for metric in metrics_of(record, prefix="run_", labels=("run",))
)
"""One sample for each run on the board."""
