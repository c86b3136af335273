"""Access tokens of a teacher service: read from a file, found by what a request presents, never said
again."""

import fnmatch
import hashlib
import hmac
import logging
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import yaml

from salt_distill.common.config import ServeConfig, TokenConfig
from salt_distill.common.config.base import parse_yaml
from salt_distill.common.config.wrong_values import at
from salt_distill.common.local_ray import is_private
from salt_distill.common.protocol import HttpStatus
from salt_distill.common.targets.growing_cache import require_place
from salt_distill.teacher_server.http.errors import ApiError

logger = logging.getLogger(__name__)

_HINT = "salt-train: --teacher-token-file FILE or SALT_TOKEN; others: the header Authorization: Bearer TOKEN"


@dataclass(frozen=True, kw_only=True)
class Token:
    """Who asks. Its secret is not in here."""

    name: str
    """Of the entry, as logs and metrics show it."""
    runs: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None
    max_request_bytes: int | None = None
    max_request_clips: int | None = None
    clips_per_s: float | None = None
    """These as in ``TokenConfig``."""

    def require_run(self, run: str) -> None:
        """Raises ApiError 403 unless it may speak for this run."""
        self._require(run, self.runs, "run")

    def require_group(self, group: str | None) -> None:
        """Raises ApiError 403 unless its runs may join this group; none is always right."""
        if group is not None:
            self._require(group, self.groups, "group")

    def require_operator(self) -> None:
        """Raises ApiError 403 unless it may change the service itself: a token that names no runs."""
        if self.runs is not None:
            raise ApiError(
                HttpStatus.FORBIDDEN,
                f"the token of {self.name} is one of runs",
                expected="a token without `runs`",
                got=f"one for {', '.join(self.runs)}",
                hint="ask whoever keeps the service",
            )

    def _require(self, value: str, patterns: tuple[str, ...] | None, what: str) -> None:
        if patterns is not None and not any(fnmatch.fnmatchcase(value, pattern) for pattern in patterns):
            raise ApiError(
                HttpStatus.FORBIDDEN,
                f"the token of {self.name} is not for this {what}",
                expected=f"a {what} of {', '.join(patterns)}",
                got=value,
                hint=f"name the {what} otherwise, or ask whoever keeps the service",
            )


ANYONE = Token(name="anyone")
"""Who asks a service without tokens."""
PEER = Token(name="replica")
"""Another replica, which has asked for a token itself."""


class Tokens:
    """The tokens of a file, as it is now. A file that becomes malformed leaves those that it held before."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError where the file is missing or malformed."""
        self._path = path
        self._seen = self._stamp()
        self._tokens = read_tokens(path)

    def find(self, authorization: str | None) -> Token:
        """Whose token the value of an Authorization header holds. Raises ApiError 401, which does not repeat
        it."""
        scheme, _, secret = (authorization or "").partition(" ")
        presented = _digest(secret.strip())
        known = None
        for digest, token in self._tokens.items():  # all of them, so that time says nothing
            if hmac.compare_digest(digest, presented):
                known = token
        if known is None or scheme.lower() != "bearer":
            got = (
                "no Authorization header"
                if authorization is None
                else "one that is not known"
                if known is None
                else "another scheme"
            )
            raise ApiError(
                HttpStatus.NO_TOKEN,
                "a token is needed",
                expected="Authorization: Bearer TOKEN",
                got=got,
                hint=_HINT,
                headers={"WWW-Authenticate": "Bearer"},
            )
        return known

    def reload(self) -> None:
        """Reads the file again where it has changed. Blocks; never raises for what the file holds."""
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            tokens = read_tokens(self._path)
        except ValueError as error:
            logger.error("the access tokens stay as they were: %s", error)
            return
        self._tokens = tokens
        logger.warning("access tokens read again: %s", ", ".join(token.name for token in tokens.values()))

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            file = os.stat(self._path)
        except OSError:
            return None
        return (file.st_mtime_ns, file.st_size, file.st_ino)


def check_access(config: ServeConfig) -> None:
    """Raises ValueError for tokens, certificates and places that a replica could not use."""
    if config.tokens is not None:
        read_tokens(Path(config.tokens))
    if config.cache is not None:
        require_place(Path(config.cache))
    if config.resource is not None and is_private(config.address):
        raise ValueError(
            f"got --resource {config.resource} without --address, expected the address of a cluster: this"
            " machine alone has none"
        )
    if config.tls_cert is None:
        return
    if not is_private(config.address):
        raise ValueError(
            "got --tls-cert on a cluster that others started, expected it with a private Ray: end TLS before"
            " that cluster's ingress"
        )
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(config.tls_cert, config.tls_key)
    except OSError as error:
        raise ValueError(
            f"--tls-cert {config.tls_cert}, --tls-key {config.tls_key}: {error}: expected PEM files that"
            " belong together"
        ) from error


def read_tokens(path: Path) -> Mapping[bytes, Token]:
    """The tokens of a file by the SHA-256 of each secret. Raises ValueError, whose sentence holds none of
    them."""
    try:
        entries = parse_yaml(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"--tokens {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"--tokens {path}{where}: not YAML") from None  # the error itself quotes the line
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"--tokens {path}: expected names with a `token` each, and at least one of them")
    tokens: dict[bytes, Token] = {}
    for name, entry in entries.items():
        config = _entry(path, str(name), entry)
        digest = _digest(config.token.get_secret_value())
        if digest in tokens:
            raise ValueError(
                f"--tokens {path}: {tokens[digest].name} and {name} have one token, expected one each"
            )
        tokens[digest] = Token(name=str(name), **config.model_dump(exclude={"token"}))
    return tokens


def _entry(path: Path, name: str, entry: Any) -> TokenConfig:
    try:
        return TokenConfig.model_validate(entry)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join([name, *map(str, first["loc"])])
        raise ValueError(f"--tokens {path}: {at(place, first)}") from None  # the value may be a secret


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
