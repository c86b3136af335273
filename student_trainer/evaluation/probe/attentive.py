"""The attentive probe: a small classifier that reads the tokens of a frozen encoder."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

NORM_EPS = 1e-5
"""Of the probe's norms, as V-JEPA 2 trains them; transformers' pooler has its encoder's."""


class AttentiveProbe(nn.Module):
    """Self-attention blocks over a clip's tokens, then one learned query that attends over them, an MLP, a
    linear classifier (V-JEPA 2's probe, depth 4; at depth 1, V-JEPA's, which the fast protocol takes,
    arXiv:2509.24317, Table 7).

    The blocks know no positions. The last one: ``q = q + attention(q, norm(x)); q = q + mlp(norm(q))``,
    without an output map after the attention. Its keys and values are never formed. With a single query, ``q
    . W_k x = (W_k^T q) . x`` and ``sum a W_v x = W_v sum a x``: the same function, at a cost per token of a
    few dot products. A key bias would add one number to all scores of a clip, which the softmax ignores, so
    there is none.
    """

    def __init__(self, width: int, num_heads: int, num_classes: int, depth: int = 1) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"got {num_heads} probe heads for tokens of {width} channels, expected a divisor: set"
                " --num-heads"
            )
        self.num_heads = num_heads
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                num_heads,
                4 * width,
                dropout=0,
                activation="gelu",
                layer_norm_eps=NORM_EPS,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(depth - 1)
        )
        self.query = nn.Parameter(torch.zeros(width))
        self.token_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.w_query = nn.Linear(width, width)
        self.w_key = nn.Linear(width, width, bias=False)
        self.w_value = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.w_up = nn.Linear(width, 4 * width)
        self.w_down = nn.Linear(4 * width, width)
        self.classifier = nn.Linear(width, num_classes)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fills every parameter: normal, zero for biases, one for norms; the maps that end self-attention
        block i over sqrt(2 i), and that of the cross-attention block as the last of them (V-JEPA 2).
        The spread is V-JEPA's 0.02 at the 1024 channels of ViT-L, and keeps the maps' gain at other widths:
        at 96 channels a probe that starts with 0.02 hardly moves."""
        std = 0.02 * math.sqrt(1024 / len(self.query))
        nn.init.trunc_normal_(self.query, std=std, generator=generator)
        for child in self.modules():
            if isinstance(child, nn.Linear):
                nn.init.trunc_normal_(child.weight, std=std, generator=generator)
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
            elif isinstance(child, nn.MultiheadAttention):
                nn.init.trunc_normal_(child.in_proj_weight, std=std, generator=generator)
                nn.init.zeros_(child.in_proj_bias)
            elif isinstance(child, nn.LayerNorm):
                nn.init.ones_(child.weight)
                nn.init.zeros_(child.bias)
        with torch.no_grad():
            self.w_down.weight.div_(math.sqrt(2 * max(1, len(self.blocks))))
            for number, block in enumerate(self.blocks, start=1):
                assert isinstance(block, nn.TransformerEncoderLayer)
                block.self_attn.out_proj.weight.div_(math.sqrt(2 * number))
                block.linear2.weight.div_(math.sqrt(2 * number))

    def forward(self, tokens: Float[Tensor, "b n e"]) -> Float[Tensor, "b classes"]:
        """Logits, one row per clip."""
        for block in self.blocks:
            tokens = block(tokens)
        x = self.token_norm(tokens)
        query = rearrange(self.w_query(self.query), "(heads head) -> heads 1 head", heads=self.num_heads)
        w_key = rearrange(self.w_key.weight, "(heads head) e -> heads head e", heads=self.num_heads)
        direction = (query @ w_key).squeeze(1) / math.sqrt(query.shape[-1])
        attention = (x @ direction.T).softmax(dim=1)
        pooled = attention.transpose(1, 2) @ x
        w_value = rearrange(self.w_value.weight, "(heads head) e -> heads head e", heads=self.num_heads)
        attended = torch.einsum("bse,she->bsh", pooled, w_value).flatten(1) + self.w_value.bias
        q = self.query + attended
        q = q + self.w_down(F.gelu(self.w_up(self.mlp_norm(q))))
        return self.classifier(q)
