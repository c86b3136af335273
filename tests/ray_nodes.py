"""A Ray of several nodes on this machine, of which one can be killed: what tests of a node's loss share."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from serve_tools import alive, descendants

_START_S = 180.0
"""How long a node may take to join, on a busy machine."""


class Node:
    """``ray start --block`` with all its processes, in a session of its own."""

    def __init__(self, environment: dict[str, str], *arguments: object) -> None:
        program = [
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--block",
            "--num-gpus=0",
            "--object-store-memory=100000000",
        ]
        ports = (
            "dashboard-agent-listen",
            "dashboard-agent-grpc",
            "metrics-export",
            "min-worker",
            "max-worker",
        )  # any: nodes share a machine
        self.process = subprocess.Popen(
            [*program, *[f"--{name}-port=0" for name in ports], *map(str, arguments)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self) -> None:
        """As if the power failed: every process at once."""
        pids = alive(descendants(self.process.pid))
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none sees another end
            for pid in pids:
                os.kill(pid, number)
        self.process.wait()


class Cluster:
    """A Ray of this process's own: a head without room for work, and nodes with one CPU each."""

    def __init__(self, environment: dict[str, str]) -> None:
        """``environment``: variables that its processes are started with."""
        self._folder = tempfile.mkdtemp(prefix="salt-", dir="/tmp")  # short: Ray puts sockets in it
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        own = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.environment = (
            {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | environment | own
        )
        """What a command needs to join it."""
        head = [
            "--head",
            f"--port={port}",
            "--num-cpus=0",
            "--include-dashboard=false",
            f"--temp-dir={self._folder}",
        ]
        self._nodes = [Node(self.environment, *head)]
        self._wait_for(1)

    def add(self) -> Node:
        """One more node, which has joined."""
        node = Node(self.environment, f"--address={self.address}", "--num-cpus=1")
        self._nodes.append(node)
        self._wait_for(sum(node.process.poll() is None for node in self._nodes))
        return node

    def close(self) -> None:
        """Ends what it started."""
        for node in reversed(self._nodes):
            if node.process.poll() is None:
                node.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_for(self, number: int) -> None:
        count = (
            f"import ray; ray.init({self.address!r}, log_to_driver=False); print('alive', sum(node['Alive']"
            " for node in ray.nodes()))"
        )
        deadline = time.monotonic() + _START_S
        while True:
            asked = subprocess.run(
                [sys.executable, "-c", count],
                env=self.environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if f"alive {number}\n" in asked.stdout:
                return
            if time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"got no {number} nodes in {_START_S:.0f} s: {asked.stdout}{asked.stderr}")
