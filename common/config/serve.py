"""A frozen teacher as a service, or on disk: ``salt-serve``."""

import ipaddress
from typing import Annotated, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from salt_distill.common.config.base import Config
from salt_distill.common.config.device import Device, GpusPerWorker, require_one_device
from salt_distill.common.config.frozen import DrawConfig, FrozenConfig
from salt_distill.common.config.loader import LoaderConfig
from salt_distill.common.config.model import TargetDtype
from salt_distill.common.config.train import TeacherComputeConfig
from salt_distill.common.config.wrong_values import NAME_PARTS, matching


class ServiceConfig(Config):
    """What one replica of the teacher service holds and how long it waits."""

    batch_wait_ms: PositiveFloat = 5.0
    """How long the first clip of a batch waits for others, in milliseconds; a full batch does not wait."""
    memory_bytes: NonNegativeInt = 2_000_000_000
    """Memory of each replica for its newest targets, in bytes. Runs share a target while it is there."""
    max_request_bytes: PositiveInt = 256_000_000
    """Largest request body, in bytes."""
    max_pending_bytes: PositiveInt = 1_000_000_000
    """Most bytes of requests that wait for the teacher; beyond that, a request is answered 429. A run may
    hold no more than its share of it."""
    max_request_clips: PositiveInt = 4096
    """Most clips of a request."""
    header_timeout_s: PositiveFloat = 10.0
    """How long the head of a request may take to arrive, in seconds."""
    body_timeout_s: PositiveFloat = 60.0
    """How long the body of a request may take to arrive, in seconds; after that it is answered 408. Also how
    long the client may take to read the answer; after that the connection ends."""
    forward_timeout_s: PositiveFloat = 600.0
    """How long the teacher may take for one batch, in seconds. If it takes longer, its replica counts as not
    ready, and is replaced."""
    retry_after_s: PositiveFloat = 0.5
    """What a client that was answered 429 or 503 is told to wait, in seconds."""
    lease_s: PositiveFloat = 10.0
    """How long the first client that asks for a new clip may take to upload it, in seconds; after that the
    next client is told to upload it."""
    max_runs: PositiveInt = 1000
    """Most student runs on the board. Beyond that, the token with the most runs loses the run that has been
    silent for the longest time."""
    hosts: tuple[str, ...] = ()
    """Host names that a service without tokens answers to, beside addresses, the machine's own name, and
    names that no web site has: those without a dot, and in .local, .localhost, .internal and .home.arpa.
    Others are refused, since a web page of another site may have sent the request."""
    group_timeout_s: PositiveFloat = 60.0
    """How long a run of a group may be silent before the others stop waiting for it, in seconds."""
    cache_dtype: TargetDtype = "float16"
    """Number format of the targets in `--cache`; targets in another format are kept in memory only."""
    segment_bytes: PositiveInt = 256_000_000
    """Size at which a file of `--cache` is complete, in bytes. A kill loses the file that is not complete."""
    drain_s: NonNegativeFloat = 30.0
    """How long a replica that is to end may take to answer the requests that it has begun, in seconds."""
    clips_per_replica: PositiveInt = 256
    """Number of waiting clips for which one more replica is started, if `--replicas` is a range."""


_SERVICE_NAME = f"{NAME_PARTS}, a letter or a digit first"
_REPLICAS = "a number of replicas, or the fewest and the most of them, such as 1:4"


def _number_as_text(value: object) -> object:
    return str(value) if type(value) is int else value


class ServeConfig(FrozenConfig):
    """`salt-serve teacher`: a frozen teacher behind Ray Serve."""

    paths = (*FrozenConfig.paths, "board_file", "cache", "tokens", "tls_cert", "tls_key", "request_log")

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    address: str | None = None
    """Ray cluster to join; else RAY_ADDRESS, else a private Ray on this machine that ends with the
    command."""
    cpus: PositiveFloat = 1.0
    """CPUs that Ray sets aside for the teacher; may be a fraction."""
    gpus: GpusPerWorker = None
    """GPUs that Ray sets aside for the teacher; may be a fraction. None: one where Ray has any; 0 runs on the
    CPU."""
    resource: str | None = None
    """Custom resource of Ray that a machine must have for a replica, such as `teacher` of
    deploy/cluster-aws.yaml; None: any machine."""
    replicas: Annotated[
        str, BeforeValidator(_number_as_text), matching(r"[1-9]\d*(:[1-9]\d*)?", _REPLICAS)
    ] = "1"
    """Number of replicas, each with its own CPUs and GPUs. MIN:MAX: more or fewer, by the number of waiting
    clips."""
    name: Annotated[str, matching("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", _SERVICE_NAME)] | None = None
    """Name of this teacher, if a cluster serves several; its URL is then http://HOST:PORT/NAME. None: it is
    the only one, at http://HOST:PORT."""
    cache: str | None = None
    """Folder that targets are also written to, and read from before they are computed; replicas may share
    it."""
    tokens: str | None = None
    """YAML file of access tokens; then every route but the page, /healthz and /readyz needs one. A change is
    seen within seconds."""
    insecure: bool = False
    """Let other machines connect without `--tokens`: everybody who reaches the port may use the teacher."""
    tls_cert: str | None = None
    """Certificate chain, a PEM file, with `--tls-key`: the replicas themselves use TLS. Only for a private
    Ray."""
    tls_key: str | None = None
    """Private key of `--tls-cert`, a PEM file."""
    request_log: str | None = None
    """File with a JSON line for each request and each event: ids of request, run and clips."""
    board_file: str | None = None
    """File that keeps the reports of the student runs and the counters of the replicas; it is read when the
    service starts again. None: they are kept in memory only."""
    teacher: TeacherComputeConfig = TeacherComputeConfig()
    service: ServiceConfig = ServiceConfig()

    @property
    def extras(self) -> tuple[str, ...]:
        return ("serve",)

    @field_validator("replicas")
    @classmethod
    def _ascending(cls, value: str) -> str:
        least, most = _range(value)
        if least > most:
            raise ValueError(f"got {value}, expected MIN:MAX with MIN at most MAX")
        return value

    @model_validator(mode="after")
    def _closed_to_strangers(self) -> Self:
        if not _is_loopback(self.host) and self.tokens is None and not self.insecure:
            raise ValueError(
                f"got --host {self.host} without --tokens, expected a file of access tokens where other"
                " machines may reach the teacher: give --tokens FILE, or --insecure to let everybody in"
            )
        if self.insecure and self.tokens is not None:
            raise ValueError(
                "got --insecure with --tokens, expected one of them: with tokens the teacher is not open to"
                " everybody"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError(
                f"got --tls-cert {self.tls_cert} and --tls-key {self.tls_key}, expected both or none"
            )
        return self

    @property
    def replica_range(self) -> tuple[int, int]:
        """The fewest and the most replicas."""
        return _range(self.replicas)


class PrecomputeConfig(FrozenConfig):
    """`salt-serve precompute`: a frozen teacher's targets on disk or in an object store."""

    places = ()

    paths = (*FrozenConfig.paths, "data", "out")

    data: str
    """Folder of WebDataset shards with an index, as `salt-data pack` writes it, or its address in an object
    store, such as s3://BUCKET/SHARDS."""
    out: str
    """The cache: a folder or an address such as s3://BUCKET/TARGETS. Arrow files and, last, manifest.json. A
    command that was killed continues when it is repeated."""
    views: PositiveInt
    """Pinned views per sample: the K of the student's `--views`."""
    data_seed: int = 0
    """Random seed of the views: the same as the students'."""
    split: str = "train"
    """Split of the data set; `all` takes every sample."""
    target_dtype: TargetDtype = "float16"
    """Number format of the targets: the same as the students'."""
    workers: NonNegativeInt = 1
    """Ray actors; 0 runs in this process, without Ray."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that Ray sets aside for a worker; may be a fraction."""
    gpus_per_worker: GpusPerWorker = None
    """GPUs that Ray sets aside for a worker; may be a fraction. None: one where Ray has any; 0 runs on the
    CPU."""
    device: Device = "auto"
    """`auto`: GPUs where there are any, else the CPU. `cpu`: the CPU."""
    address: str | None = None
    """Ray cluster to join; else RAY_ADDRESS, else a private Ray on this machine that ends with the
    command."""
    view: DrawConfig = DrawConfig()
    teacher: TeacherComputeConfig = TeacherComputeConfig()
    loader: LoaderConfig = LoaderConfig()

    @property
    def extras(self) -> tuple[str, ...]:
        return ("serve",) if self.workers else ()

    @model_validator(mode="after")
    def _on_one_device(self) -> Self:
        require_one_device(self.device, self.gpus_per_worker)
        return self


class OfServiceConfig(Config):
    """What is said to a running teacher service."""

    url: str
    """The service, as `salt-serve teacher` prints it."""
    token_file: str | None = None
    """File that holds an access token of the service, and nothing else; None: the environment variable
    SALT_TOKEN, if it is set."""
    ca: str | None = None
    """Certificates that an https `--url` may be signed by, a PEM file; None: those that the machine
    trusts."""
    json_: bool = False
    """One JSON object for programs, instead of tables for people."""


class StatusConfig(OfServiceConfig):
    """`salt-serve status`: what a running teacher service says of itself."""

    wait: float = Field(default=0.0, ge=0)
    """How long to wait until the service is ready, in seconds."""


class RunsConfig(OfServiceConfig):
    """`salt-serve runs`: the student runs of a teacher service."""


class DrainConfig(OfServiceConfig):
    """`salt-serve drain` and `salt-serve stop`: a teacher service that takes nothing new."""

    wait: float = Field(default=120.0, ge=0)
    """How long to wait until everything that was begun is answered, and a service that stops has ended, in
    seconds."""


def _is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone; a name that is not `localhost` may be any."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class CacheVerifyConfig(Config):
    """`salt-serve cache verify`: whether every target of a cache is what was written."""

    targets: str
    """The cache, as `salt-serve precompute` or `--cache` writes it: a folder, or an address such as
    s3://BUCKET/TARGETS."""
    repair: bool = False
    """Compute the damaged targets again, with `--ckpt` and `--data`. In a cache that was written by
    `--cache`, they are dropped instead; in an object store, repeat `salt-serve precompute` to repair."""
    ckpt: str | None = None
    """The teacher that the targets are of, for `--repair`."""
    data: str | None = None
    """The data set that they were made from, for `--repair`."""
    loader: LoaderConfig = LoaderConfig()

    @model_validator(mode="after")
    def _for_repair(self) -> Self:
        given = [f"--{name}" for name in ("ckpt", "data") if getattr(self, name) is not None]
        if given and not self.repair:
            raise ValueError(
                f"got {' and '.join(given)} without --repair, expected all or none: without it nothing is"
                " computed"
            )
        return self


class CacheStatsConfig(Config):
    """`salt-serve cache stats`: what a cache holds."""

    targets: str
    """The cache, as `salt-serve precompute` or `--cache` writes it: a folder, or an address such as
    s3://BUCKET/TARGETS."""
    json_: bool = False
    """One JSON object for programs, instead of tables for people."""


class CacheGcConfig(Config):
    """`salt-serve cache gc`: remove from a cache what no student would find."""

    targets: str
    """The cache, as `salt-serve precompute` or `--cache` writes it: a folder of this machine."""
    max_bytes: PositiveInt | None = None
    """Drop the oldest segments of a cache that was written through until it has this size, in bytes; none:
    keep all."""
    dry_run: bool = False
    """Only say what would be removed."""


def _range(replicas: str) -> tuple[int, int]:
    least, _, most = replicas.partition(":")
    return int(least), int(most or least)
