"""The narrow predictor: from the visible tokens to the hidden ones."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from salt_distill.common.config import PredictorConfig
from salt_distill.common.model.grid import TokenGrid
from salt_distill.common.model.vit import Block, Norm, RopeTables, Stack, init_weights


class Predictor(nn.Module):
    """Predicts hidden tokens from visible ones (arXiv:2509.24317, Table 4).

    One mask token per mask set, so that each is trained (V-JEPA; V-JEPA 2 shares one and leaves the others
    without gradient). With full attention the order of the tokens does not matter: positions enter through
    RoPE alone.

    Note [heads]: several teachers share everything but the last linear map, of which each has its own rows,
    in their order. AM-RADIO (arXiv:2312.06709) shares the student and gives each teacher a small head. MVD
    (arXiv:2212.04500) gives each a decoder of its own, with mask token and projection. Its decoders have two
    blocks; ours has twelve, a third of the matrix products of a ViT-L student's step: each teacher more would
    cost as much again.
    """

    def __init__(
        self,
        config: PredictorConfig,
        *,
        in_width: int,
        out_width: int,
        num_mask_tokens: int,
        rope: str,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_width, config.width)
        self.mask_tokens = nn.Parameter(torch.zeros(num_mask_tokens, config.width))
        self.rope = RopeTables(config.width // config.num_heads, rope)
        self.blocks = Stack(
            Block(config.width, config.num_heads, config.mlp_width, norm_eps) for _ in range(config.depth)
        )
        self.norm = Norm(config.width, eps=norm_eps)
        self.head = nn.Linear(config.width, out_width)

    def init_weights(self, generator: torch.Generator, *, std: float) -> None:
        """Fills every parameter; mask tokens start at zero (V-JEPA 2's ``zero_init_mask_tokens``)."""
        init_weights(self, generator, std=std)
        nn.init.zeros_(self.mask_tokens)

    def keep_outputs(self, channels: slice) -> None:
        """Predicts these channels alone from here on."""
        head = nn.Linear(self.head.in_features, channels.stop - channels.start)
        head.load_state_dict({name: tensor[channels] for name, tensor in self.head.state_dict().items()})
        self.head = head

    def forward(
        self,
        visible: Float[Tensor, "b v e"],
        visible_idx: Int[Tensor, "b v"],
        hidden_idx: Int[Tensor, "b k"],
        *,
        grid: TokenGrid,
        mask_set: int,
    ) -> Float[Tensor, "b k out"]:
        """Predictions for ``hidden_idx``, in its order."""
        context = self.embed(visible)
        hidden = self.mask_tokens[mask_set].to(context.dtype).expand(*hidden_idx.shape, -1)
        x = torch.cat((context, hidden), dim=1)
        rope = self.rope(grid, torch.cat((visible_idx, hidden_idx), dim=1), x.device)
        x = self.blocks(x, rope)
        return self.head(self.norm(x[:, visible_idx.shape[1] :]))
