"""What the tests of access share: a file of tokens, and bytes on a connection of their own."""

import contextlib
import json
import socket
import time

from service_tools import Caller

ALICE, GROUP, OPERATOR = "alice-" + 32 * "a", "group-" + 32 * "g", "oper-" + 32 * "o"
FILE = f"""
alice:
  token: {ALICE}
  runs: [alice, "alice-*"]
  groups: []
group:
  token: {GROUP}
  runs: ["vit-*"]
  groups: [vit]
operator: {{token: {OPERATOR}}}
"""
JSON = {"Content-Type": "application/json"}
REPORT = json.dumps({"step": 1, "slot": 16})


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


def write_tokens(folder):
    """The file of three tokens."""
    path = folder / "tokens.yaml"
    path.write_text(FILE)
    return path


def raw(url, content, *, wait_s, then=b"", tls=None):
    """What a service answers to these bytes on a connection of their own, and after how long it closed it or
    ``wait_s`` were over.

    ``then``: bytes to send after the first answer.
    """
    parts = Caller(url).parts
    started = time.monotonic()
    with socket.create_connection((parts.hostname, parts.port), timeout=wait_s) as plain:
        connection = plain if tls is None else tls.wrap_socket(plain, server_hostname="localhost")
        connection.sendall(content)
        answer = connection.recv(65536) if content and then else b""
        if then:
            connection.sendall(then)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while chunk := connection.recv(65536):
                answer += chunk
    return answer, time.monotonic() - started


HEAD = "POST /v1/targets HTTP/1.1\r\nHost: x\r\nContent-Type: application/vnd.apache.arrow.stream\r\n"
