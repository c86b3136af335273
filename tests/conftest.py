"""What every test file may use: a restored random state, the videos beside the project, a small packed data
set."""

import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import rich.console
import torch
from jaxtyping import install_import_hook

# Tests check shapes and types of the pure parts at every call; production does not. Ray pickles classes of
# the other parts, and wrapped ones fail.
_CHECKED = "grid masking pixels predictor rope timm_encoder vit"
install_import_hook(
    [
        "salt_distill.common.clip",
        "salt_distill.common.data.views",
        "salt_distill.common.pictures",
        *(f"salt_distill.common.model.{name}" for name in _CHECKED.split()),
    ]
    + [f"salt_distill.student_trainer.{name}" for name in ("objective", "salt", "vjepa", "vpixel")],
    "beartype.beartype",
)

from salt_distill.common.config import PackConfig, SynthConfig  # noqa: E402
from salt_distill.common.data.making.pack import pack  # noqa: E402
from salt_distill.common.data.making.synth import synthesise  # noqa: E402

# A shell's background ignores it, and what was ignored stays so, in the commands that tests start too.
signal.signal(signal.SIGINT, signal.default_int_handler)

_LONG_FILES = {
    f"test_{name}.py"
    for name in (
        "train",
        "train_resume",
        "server_ray",
        "server_ray_access",
        "server_ending",
        "server_page",
        "server_replicas",
    )
}
_SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def pytest_collection_modifyitems(items):
    """Files that start one Ray after the other come first: they mostly wait, beside the others rather than
    alone at the end."""
    items.sort(key=lambda item: item.path.name not in _LONG_FILES)


@pytest.fixture(autouse=True)
def _same_random_state():
    """Every test starts from the same random state and one thread, and leaves no trace in the next one."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    num_threads = torch.get_num_threads()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


@pytest.fixture(scope="session")
def shared_videos() -> Path:
    """A folder of real videos in many formats."""
    return _shared("videos")


@pytest.fixture(scope="session")
def shared_bad() -> Path:
    """A folder of videos that are damaged, empty or odd."""
    return _shared("bad")


@pytest.fixture(scope="session")
def shared_reports() -> Path:
    """A folder of inputs made after public reports of what data sets get wrong."""
    return _shared("reports")


@pytest.fixture(scope="session")
def synth_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training and 10 test videos with labels, not packed."""
    out = tmp_path_factory.mktemp("synth") / "toy"
    synthesise(SynthConfig(out=str(out), num_train=40, num_test=10, num_frames=12))
    return out


@pytest.fixture(scope="session")
def shards(synth_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``synth_videos`` in several shards; read only."""
    out = tmp_path_factory.mktemp("packed") / "toy"
    pack(
        PackConfig(src=str(synth_videos), out=str(out), max_shard_bytes=60_000, workers=1),
        rich.console.Console(quiet=True),
    )
    return out


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours with random weights; read only."""
    from foreign_tools import encoder_config, save_ours

    return save_ours(tmp_path_factory.mktemp("ours") / "ours", encoder_config())


@pytest.fixture(scope="session")
def as_hf(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a directory for transformers; read only."""
    from foreign_tools import exported

    return exported(ours, tmp_path_factory.mktemp("hf") / "hf", "hf")


@pytest.fixture(scope="session")
def as_pt(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a file for V-JEPA 2's code; read only."""
    from foreign_tools import exported

    return exported(ours, tmp_path_factory.mktemp("pt") / "encoder.pt", "vjepa2")


def _shared(folder: str) -> Path:
    path = _SHARED_DATA / folder
    if not path.is_dir():
        reason = f"{path} is absent"
        if os.environ.get("FAIL_WITHOUT_DATA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path
