"""How a student asks the teacher service."""

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from salt_distill.common.config.base import Config

OnTeacherLoss = Literal["wait", "local", "fail"]
"""What a student does when its teacher service stays away."""


class ServiceClientConfig(Config):
    """How a student asks the teacher service."""

    request_clips: PositiveInt = 16
    """Clips of one request."""
    connections: PositiveInt = 4
    """Requests in flight at a time."""
    timeout_s: PositiveFloat = 60.0
    """Longest wait for one response, in seconds."""
    segment_bytes: PositiveInt = 64_000_000
    """Size at which a file of `--cache` is sealed, in bytes: what a kill costs each rank."""
    connect_budget_s: PositiveFloat = 10.0
    """How long a service that never answered is asked again, in seconds; for ever with `wait`."""
    retry_budget_s: PositiveFloat = 120.0
    """How long one request is retried, with backoff, before the service counts as lost (`--on-teacher-loss`),
    in seconds."""
