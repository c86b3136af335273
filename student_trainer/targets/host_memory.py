"""Memory on the host that targets are read into."""

import torch
from jaxtyping import Shaped
from torch import Tensor

from salt_distill.common.clip import ClipBatch
from salt_distill.common.config import TargetDtype
from salt_distill.common.model.teacher import TeacherSpec
from salt_distill.common.targets.codec import empty_packed


def new_targets(batch: ClipBatch, spec: TeacherSpec, dtype: TargetDtype) -> Shaped[Tensor, "b n packed"]:
    """Rows to fill with packed targets, zeros where a clip is bad.

    Pinned where there is a GPU, so that targets go there from where they were read. PyTorch keeps pinned
    blocks and gives them out again when the copies from them are through: a run allocates as many as its
    prefetch needs, once.
    """
    pinned = torch.cuda.is_available()
    out = empty_packed(len(batch.good), spec.num_tokens, spec.width, dtype, pin_memory=pinned)
    if not batch.good.all():
        out[torch.from_numpy(~batch.good)] = 0
    return out
