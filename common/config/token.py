"""Who may ask a teacher service for what: the entries of the file of `--tokens`."""

import re

from pydantic import PositiveFloat, PositiveInt, SecretStr, field_validator

from salt_distill.common.config.base import Config

_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")


class TokenConfig(Config):
    """What a token may do. The file maps a name, which logs and metrics show, to each."""

    token: SecretStr
    """The secret: 16 to 512 of A-Z a-z 0-9 . _ ~ + / = -, for example of `openssl rand -hex 32`."""
    runs: tuple[str, ...] | None = None
    """Shell patterns of the run ids that it may use; None: any run, and also the routes that change the
    service itself."""
    groups: tuple[str, ...] | None = None
    """Shell patterns of the groups that its runs may join; None: any."""
    max_request_bytes: PositiveInt | None = None
    """Largest request body, in bytes; None: `service.max_request_bytes`, which holds for everybody."""
    max_request_clips: PositiveInt | None = None
    """Most clips of a request; None: `service.max_request_clips`, which holds for everybody."""
    clips_per_s: PositiveFloat | None = None
    """Clips that it may ask for in a second, over all replicas. A new clip is asked for twice: once without
    its bytes, and once with them."""

    @field_validator("token")
    @classmethod
    def _is_a_token(cls, value: SecretStr) -> SecretStr:
        if _TOKEN.fullmatch(value.get_secret_value()) is None:
            raise ValueError(
                "expected 16 to 512 of A-Z a-z 0-9 . _ ~ + / = -, for example of `openssl rand -hex 32`"
            )
        return value
