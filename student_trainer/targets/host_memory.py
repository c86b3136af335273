"""Memory on the host that targets are read into."""

import torch
from jaxtyping import Float
from torch import Tensor

from salt_distill.common.clip import ClipBatch
from salt_distill.common.model.teacher import TeacherSpec


def new_targets(batch: ClipBatch, spec: TeacherSpec) -> Float[Tensor, "b n d"]:
    """Rows to fill, zeros where a clip is bad.

    Pinned where there is a GPU, so that targets go there from where they were decoded. PyTorch keeps pinned
    blocks and gives them out again when the copies from them are through: a run allocates as many as its
    prefetch needs, once.
    """
    out = torch.empty(len(batch.good), spec.num_tokens, spec.width, pin_memory=torch.cuda.is_available())
    if not batch.good.all():
        out[torch.from_numpy(~batch.good)] = 0
    return out
