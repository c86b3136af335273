"""What a client of a teacher service shows and trusts: its access token, and the certificates that it takes
for the service's."""

import os
import ssl
from pathlib import Path

TOKEN_VARIABLE = "SALT_TOKEN"
"""Environment variable that holds a token, where no file is named."""


def access_token(file: str | None) -> str | None:
    """The token in a file, else in SALT_TOKEN, else None. Raises ValueError, which does not repeat it."""
    token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    if file is not None:
        where = file
        try:
            token = Path(file).read_text("utf-8-sig")
        except OSError as error:
            raise ValueError(f"no access token in {file}: {error}") from None
        except UnicodeDecodeError:  # which quotes a byte of it
            raise ValueError(f"no access token in {file}: it is no text in UTF-8") from None
    if token is None:
        return None
    token = token.strip()
    if not token or not token.isascii() or any(character.isspace() for character in token):
        raise ValueError(f"{where}: expected one access token, without spaces, and nothing else")
    return token


def authorization(token: str | None) -> dict[str, str]:
    """The header that shows a token; none without one."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def trusted(ca: str | None) -> ssl.SSLContext:
    """Takes certificates that those in a PEM file have signed, else those that this machine trusts
    (SSL_CERT_FILE). Raises ValueError."""
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise ValueError(f"got the certificates {ca}: {error}: expected a PEM file") from error
