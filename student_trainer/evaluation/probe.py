"""The attentive probe: a small classifier that reads the tokens of a frozen encoder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.draws import uniforms, words


class AttentiveProbe(nn.Module):
    """One learned query that attends over a clip's tokens, an MLP, a linear classifier (V-JEPA's probe of depth 1, the fast protocol of
    arXiv:2509.24317, Table 7): ``q = q + attention(q, norm(x)); q = q + mlp(norm(q))``, without an output map after the attention.

    Keys and values are never formed. With a single query, ``q . W_k x = (W_k^T q) . x`` and ``sum a W_v x = W_v sum a x``: the same
    function, at a cost per token of a few dot products. A key bias would add one number to all scores of a clip, which the softmax
    ignores, so there is none.
    """

    def __init__(self, width: int, num_heads: int, num_classes: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"got {num_heads} probe heads for tokens of {width} channels, expected a divisor: set --num-heads")
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(width))
        self.token_norm = nn.LayerNorm(width, eps=1e-5)
        self.w_query = nn.Linear(width, width)
        self.w_key = nn.Linear(width, width, bias=False)
        self.w_value = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-5)
        self.w_up = nn.Linear(width, 4 * width)
        self.w_down = nn.Linear(4 * width, width)
        self.classifier = nn.Linear(width, num_classes)

    def init_weights(self, generator: torch.Generator) -> None:
        """Fills every parameter: normal, zero for biases, one for norms; the block's last map over sqrt(2). The spread is V-JEPA's 0.02 at
        the 1024 channels of ViT-L, and keeps the maps' gain at other widths: at 96 channels a probe that starts with 0.02 hardly moves."""
        std = 0.02 * math.sqrt(1024 / len(self.query))
        nn.init.trunc_normal_(self.query, std=std, generator=generator)
        for child in self.modules():
            if isinstance(child, nn.Linear):
                nn.init.trunc_normal_(child.weight, std=std, generator=generator)
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
            elif isinstance(child, nn.LayerNorm):
                nn.init.ones_(child.weight)
                nn.init.zeros_(child.bias)
        with torch.no_grad():
            self.w_down.weight.div_(math.sqrt(2))

    def forward(self, tokens: Float[Tensor, "b n e"]) -> Float[Tensor, "b classes"]:
        """Logits, one row per clip."""
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


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a probe got right on the test clips."""

    num_correct: int
    num_clips: int

    @property
    def accuracy(self) -> float:
        """Share of clips classified right."""
        return self.num_correct / self.num_clips

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson score interval of the accuracy."""
        z, n, p = 1.96, self.num_clips, self.accuracy
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)


def train_probes(
    tokens: Float[Tensor, "b n e"],
    labels: Mapping[str, Int[Tensor, " b"]],
    num_classes: Mapping[str, int],
    *,
    num_heads: int,
    epochs: int,
    lr: float,
    weight_decay: float,
    batch_size: int,
    seed: int,
) -> dict[str, AttentiveProbe]:
    """A trained probe for every label, all from one pass over the tokens: AdamW, cosine to 0, no warm-up, decay on every parameter.

    A probe shares nothing with its neighbours: its weights start from (seed, label), it has its own optimizer, and the order of the clips
    comes from the seed alone. So a label's probe is the same whichever other labels are there.
    """
    num_clips, _, width = tokens.shape
    probes = {name: AttentiveProbe(width, num_heads, num_classes[name]).to(tokens.device) for name in labels}
    optimizers = {}
    for name, probe in probes.items():
        probe.init_weights(torch.Generator(device=tokens.device).manual_seed(int(words(seed, f"probe {name}", 0, 1)[0] >> np.uint64(1))))
        optimizers[name] = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    num_steps = epochs * -(-num_clips // batch_size)
    step = 0
    for epoch in range(epochs):
        order = torch.from_numpy(np.argsort(uniforms(seed, "probe order", epoch, num_clips), kind="stable")).to(tokens.device)
        for idx in order.split(batch_size):
            batch = tokens[idx]
            for name, probe in probes.items():
                for group in optimizers[name].param_groups:
                    group["lr"] = 0.5 * lr * (1 + math.cos(math.pi * step / num_steps))
                optimizers[name].zero_grad()
                F.cross_entropy(probe(batch), labels[name][idx]).backward()
                optimizers[name].step()
            step += 1
    return probes


@torch.no_grad()
def score(probe: AttentiveProbe, tokens: Float[Tensor, "b n e"], label: Int[Tensor, " b"], batch_size: int) -> Score:
    """How many of the clips the probe names right."""
    correct = [probe(x).argmax(1) == y for x, y in zip(tokens.split(batch_size), label.split(batch_size), strict=True)]
    return Score(num_correct=int(torch.cat(correct).sum()), num_clips=len(label))
