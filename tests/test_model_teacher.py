"""How a teacher computes: in bfloat16, compiled; both are said, and change rounding alone."""

import pytest
import torch
from teacher_tools import BATCH_SIZE, random_clips, save_teacher

from salt_distill.common.config import TeacherComputeConfig
from salt_distill.common.model.teacher import Teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("ckpt") / "teacher")


def teacher_of(ckpt, **compute):
    return Teacher.load(ckpt, TeacherComputeConfig(batch_size=BATCH_SIZE, **compute), CPU)


@pytest.mark.parametrize(
    ("compute", "said", "tolerance"),
    [
        ({"dtype": "bfloat16"}, ("bfloat16", False), 0.1),
        pytest.param({"compile": True}, ("float32", True), 1e-5, marks=pytest.mark.slow),
    ],
)
def test_precision_and_compilation_are_said_and_change_rounding_alone(ckpt, compute, said, tolerance):
    plain, other = teacher_of(ckpt), teacher_of(ckpt, **compute)
    clips = random_clips(BATCH_SIZE)
    expected, targets = plain.forward(clips), other.forward(clips)
    assert (other.spec.compute["dtype"], other.spec.compute["compiled"]) == said
    assert (plain.spec.compute["dtype"], plain.spec.compute["compiled"]) == ("float32", False)
    assert other.spec.fingerprint == plain.spec.fingerprint
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets, expected, atol=tolerance, rtol=0)
    assert not torch.equal(targets, expected)
    assert torch.equal(other.forward(clips[1:2])[0], targets[1])  # whatever clips it shared a forward with
