"""Stage 2, SALT: predict a frozen teacher's latents at hidden positions (arXiv:2509.24317, Eq. 1 with a
static teacher)."""

from jaxtyping import Float, Int, UInt8
from torch import Tensor

from salt_distill.student_trainer.objective import Objective


class Salt(Objective):
    """L1 between predicted and target latents. The targets come from outside: nothing of the teacher is in
    here."""

    def wanted(
        self,
        pixels: UInt8[Tensor, "b t h w 3"],
        target: Float[Tensor, "b n d"] | None,
        hidden_idx: Int[Tensor, "b k"],
    ) -> Float[Tensor, "b k d"]:
        assert target is not None
        return target.gather(1, hidden_idx[..., None].expand(-1, -1, target.shape[-1]))

    def distance(
        self, prediction: Float[Tensor, "b k out"], wanted: Float[Tensor, "b k out"]
    ) -> Float[Tensor, "b k out"]:
        return (prediction - wanted).abs()
