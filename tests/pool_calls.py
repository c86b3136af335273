"""What the tests of the decoding pool have its workers call; workers import this by name."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from salt_distill.common.clip import BadVideoError


def call(item: tuple[str, Any]) -> Any:
    """Does what the item says."""
    name, value = item
    match name:
        case "pid":
            return os.getpid()
        case "sleep":
            time.sleep(value)
        case "read":  # opening a named pipe that nobody writes blocks in the kernel
            return Path(value).read_bytes()
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "bad":
            raise BadVideoError(value)
        case "bug":
            raise KeyError(value)
        case "array":
            return value.sum(), np.arange(value.size, dtype=np.uint8).reshape(value.shape)
    return name
