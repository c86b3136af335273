"""The attentive probe: its block against a slow reference, and what it learns."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms
from train_tools import ALONE
from transformers import VJEPA2Config, VJEPA2ForVideoClassification

from salt_distill.common.config import ViewConfig
from salt_distill.common.data.views import draw
from salt_distill.student_trainer.evaluation.probe.attentive import AttentiveProbe
from salt_distill.student_trainer.evaluation.probe.augment import AugmentedVideoCut, ImageCut
from salt_distill.student_trainer.evaluation.probe.features import TokensInMemory
from salt_distill.student_trainer.evaluation.probe.probe_grid import ProbeGrid, ProbeSetting
from salt_distill.student_trainer.evaluation.probe.score import Score, confusion, score_of, vote

SETTING = ProbeSetting(lr=3e-3, weight_decay=0.01)
GRID = {"num_heads": 2, "depth": 1, "epochs": 20, "batch_size": 32, "micro_batch_size": None, "seed": 0}


def kept(tokens: torch.Tensor) -> TokensInMemory:
    return TokensInMemory(np.ones(len(tokens), bool), tokens[:, None])


def train(tokens, labels, num_classes, settings=(SETTING,), **changes) -> ProbeGrid:
    grid = ProbeGrid(
        num_classes, list(settings), width=tokens.shape[-1], worker=ALONE, bfloat16=False, **GRID | changes
    )
    for _ in range(grid.epochs):
        grid.train_epoch(kept(tokens), {name: label.numpy() for name, label in labels.items()})
    return grid


def random_probe(width: int, num_heads: int, num_classes: int, depth: int = 1) -> AttentiveProbe:
    probe = AttentiveProbe(width, num_heads, num_classes, depth)
    generator = torch.Generator().manual_seed(1)
    for parameter in probe.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return probe.double()


def slow_logits(probe: AttentiveProbe, tokens: torch.Tensor) -> torch.Tensor:
    """The same written out: queries, keys and values of every token, one clip, one head and one token at a
    time."""
    width = tokens.shape[-1]
    head = width // probe.num_heads
    rows = []
    for clip in tokens:
        for block in probe.blocks:
            clip = slow_block(block, clip, probe.num_heads)
        x = F.layer_norm(clip, (width,), probe.token_norm.weight, probe.token_norm.bias, 1e-5)
        query = probe.w_query.weight @ probe.query + probe.w_query.bias
        attended = torch.zeros(width, dtype=tokens.dtype)
        for number in range(probe.num_heads):
            own = slice(number * head, (number + 1) * head)
            keys = [probe.w_key.weight[own] @ token for token in x]
            values = [probe.w_value.weight[own] @ token + probe.w_value.bias[own] for token in x]
            weights = [math.exp((query[own] @ key).item() / math.sqrt(head)) for key in keys]
            attended[own] = sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(
                weights
            )
        q = probe.query + attended
        hidden = F.gelu(
            probe.w_up(F.layer_norm(q, (width,), probe.mlp_norm.weight, probe.mlp_norm.bias, 1e-5))
        )
        rows.append(probe.classifier(q + probe.w_down(hidden)))
    return torch.stack(rows)


def slow_block(block: torch.nn.Module, clip: torch.Tensor, num_heads: int) -> torch.Tensor:
    """A pre-norm block without positions, one head and one token at a time."""
    n, width = clip.shape
    head = width // num_heads
    x = F.layer_norm(clip, (width,), block.norm1.weight, block.norm1.bias, 1e-5)
    w_query, w_key, w_value = block.self_attn.in_proj_weight.split(width)
    b_query, b_key, b_value = block.self_attn.in_proj_bias.split(width)
    attended = torch.zeros_like(clip)
    for number in range(num_heads):
        own = slice(number * head, (number + 1) * head)
        for row in range(n):
            query = w_query[own] @ x[row] + b_query[own]
            scores = torch.stack([query @ (w_key[own] @ token + b_key[own]) for token in x]) / math.sqrt(head)
            weights = scores.exp() / scores.exp().sum()
            attended[row, own] = sum(
                weight * (w_value[own] @ token + b_value[own])
                for weight, token in zip(weights, x, strict=True)
            )
    clip = clip + attended @ block.self_attn.out_proj.weight.T + block.self_attn.out_proj.bias
    x = F.layer_norm(clip, (width,), block.norm2.weight, block.norm2.bias, 1e-5)
    return (
        clip
        + F.gelu(x @ block.linear1.weight.T + block.linear1.bias) @ block.linear2.weight.T
        + block.linear2.bias
    )


def separable(num_clips: int, num_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in which one token of the clip, at any place, points in its class's direction."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_classes, 16, generator=torch.Generator().manual_seed(99))
    tokens = torch.randn(num_clips, 6, 16, generator=generator)
    label = torch.randint(num_classes, (num_clips,), generator=generator)
    tokens[torch.arange(num_clips), torch.randint(6, (num_clips,), generator=generator)] += (
        3 * directions[label]
    )
    return tokens, label


@pytest.mark.parametrize("depth", [1, 4])
def test_the_probe_equals_a_slow_reference(depth):
    probe = random_probe(width=12, num_heads=3, num_classes=5, depth=depth)
    tokens = torch.randn(4, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(probe(tokens), slow_logits(probe, tokens), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("depth", [1, 4])
def test_every_parameter_of_the_probe_gets_a_gradient(depth):
    probe = random_probe(width=12, num_heads=3, num_classes=5, depth=depth)
    probe(torch.randn(4, 7, 12, dtype=torch.float64)).square().sum().backward()
    assert [
        name
        for name, parameter in probe.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ] == []


@pytest.mark.parametrize(
    ("width", "depth", "millions"), [(1024, 1, 11.73), (1024, 4, 49.51), (768, 4, 27.90)]
)
def test_parameters_are_as_many_as_in_the_reference(width, depth, millions):
    """V-JEPA's own probes with 174 classes; they have a key bias more, which changes nothing."""
    with torch.device("meta"):
        probe = AttentiveProbe(width, 16, 174, depth)
    assert round((sum(parameter.numel() for parameter in probe.parameters()) + width) / 1e6, 2) == millions


def test_weights_of_transformers_give_its_logits():
    config = VJEPA2Config(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=4, patch_size=8, crop_size=32,
        frames_per_clip=4, num_pooler_layers=3,
        layer_norm_eps=1e-5, num_labels=5, pred_hidden_size=24, pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
    )  # fmt: skip
    model = VJEPA2ForVideoClassification(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    probe = AttentiveProbe(48, 4, 5, depth=4)
    probe.load_state_dict(from_transformers(model))
    clip = torch.randn(2, 4, 3, 32, 32)
    with torch.no_grad():
        tokens = model.vjepa2(clip, skip_predictor=True).last_hidden_state
        assert (probe(tokens) - model(clip).logits).abs().max() < 1e-5


def from_transformers(model: VJEPA2ForVideoClassification) -> dict[str, torch.Tensor]:
    """The pooler and the classifier under our names, without the key bias."""
    theirs = model.state_dict()
    cross = "pooler.cross_attention_layer."
    names = {
        "token_norm": f"{cross}layer_norm1", "w_query": f"{cross}cross_attn.q_proj",
        "w_key": f"{cross}cross_attn.k_proj",
        "w_value": f"{cross}cross_attn.v_proj", "mlp_norm": f"{cross}layer_norm2",
        "w_up": f"{cross}mlp.fc1", "w_down": f"{cross}mlp.fc2",
        "classifier": "classifier",
    }  # fmt: skip
    for number in range(3):
        layer = f"pooler.self_attention_layers.{number}."
        names |= {
            f"blocks.{number}.self_attn.out_proj": f"{layer}self_attn.out_proj",
            f"blocks.{number}.norm1": f"{layer}layer_norm1",
            f"blocks.{number}.norm2": f"{layer}layer_norm2", f"blocks.{number}.linear1": f"{layer}mlp.fc1",
            f"blocks.{number}.linear2": f"{layer}mlp.fc2",
        }  # fmt: skip
    ours = {
        f"{name}.{kind}": theirs[f"{other}.{kind}"]
        for name, other in names.items()
        for kind in ("weight", "bias")
    }
    del ours["w_key.bias"]
    for number in range(3):
        for kind in ("weight", "bias"):
            parts = [
                theirs[f"pooler.self_attention_layers.{number}.self_attn.{part}_proj.{kind}"]
                for part in "qkv"
            ]
            ours[f"blocks.{number}.self_attn.in_proj_{kind}"] = torch.cat(parts)
    return ours | {"query": theirs["pooler.query_tokens"].flatten()}


@pytest.mark.parametrize("depth", [1, 4])
def test_it_learns_what_can_be_learned_and_nothing_else(depth):
    tokens, label = separable(500, num_classes=4)
    held_out, held_out_label = separable(300, num_classes=4, seed=1)
    shuffled = label[torch.randperm(500, generator=torch.Generator().manual_seed(3))]
    grid = train(
        tokens,
        {"real": label, "shuffled": shuffled},
        {"real": 4, "shuffled": 4},
        depth=depth,
        epochs=20 if depth == 1 else 8,
    )
    examined = grid.examine(
        kept(held_out), {"real": held_out_label.numpy(), "shuffled": held_out_label.numpy()}, 64
    )
    assert score_of(examined["real", SETTING].counts).accuracy > 0.9
    low, high = score_of(examined["shuffled", SETTING].counts).interval
    assert low - 0.05 < 0.25 < high + 0.05


def test_a_probe_does_not_change_another_and_the_seed_decides():
    tokens, label = separable(100, num_classes=4)
    other, fast = torch.arange(100) % 3, ProbeSetting(lr=1e-2, weight_decay=0.5)
    alone = train(tokens, {"class": label}, {"class": 4}, epochs=3).probes["class", SETTING]
    together = train(
        tokens, {"aaa": other, "class": label}, {"aaa": 3, "class": 4}, (fast, SETTING), epochs=3
    ).probes
    another_seed = train(tokens, {"class": label}, {"class": 4}, epochs=3, seed=1).probes["class", SETTING]
    for name, value in alone.state_dict().items():
        assert torch.equal(value, together["class", SETTING].state_dict()[name]), name
    assert not torch.equal(alone.query, another_seed.query)
    assert not torch.equal(alone.query, together["class", fast].query)


def test_micro_batches_add_up_to_the_step():
    tokens, label = separable(50, num_classes=4)
    whole, parts = (
        train(tokens, {"class": label}, {"class": 4}, epochs=1, micro_batch_size=size) for size in (None, 7)
    )
    for name, value in whole.probes["class", SETTING].state_dict().items():
        assert (value - parts.probes["class", SETTING].state_dict()[name]).abs().max() < 1e-4, name


def test_views_vote_with_their_probabilities():
    outvoted = torch.tensor([[4.0, 0.0], [0.0, 1.0], [0.0, 1.0]])  # two of three say class 1
    outshouted = torch.tensor([[10.0, 0.0], [0.0, 3.0], [0.0, 3.0]])  # the mean logit says class 0
    assert vote(torch.stack([outvoted, outshouted]))[0].tolist() == [0, 1]
    assert confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2).tolist() == [[1, 1], [0, 1]]


def test_the_interval_is_wilsons():
    """Closed form by another route: the interval's ends are where |p - k/n| is 1.96 standard deviations of a
    binomial with that p."""
    value = Score(num_correct=7, num_clips=40)
    for end in value.interval:
        assert abs(value.accuracy - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / 40))
    assert Score(num_correct=0, num_clips=40).interval[0] == 0
    assert Score(num_correct=40, num_clips=40).interval[1] == pytest.approx(1)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"got 5 probe heads for tokens of 12 channels.*--num-heads"):
        AttentiveProbe(12, 5, 2)


@pytest.mark.parametrize("optimizer", ["vjepa2", "vjepa"])
def test_three_steps_of_the_reference_optimizers(optimizer):
    """Written out: V-JEPA clips and spares biases and norms, and its decay falls; the last rate is 0 in
    both."""
    generator = torch.Generator().manual_seed(3)
    tokens, label = torch.randn(12, 5, 8, generator=generator), torch.arange(12) % 3
    grid = train(tokens, {"a": label}, {"a": 3}, epochs=3, batch_size=12, optimizer=optimizer)
    probe = random_probe(8, 2, 3).float()
    fresh = ProbeGrid(
        {"a": 3}, [SETTING], width=8, worker=ALONE, bfloat16=False, **GRID | {"epochs": 3, "batch_size": 12}
    )
    probe.load_state_dict(fresh.probes["a", SETTING].state_dict())
    groups = [
        [weight for name, weight in probe.named_parameters() if (weight.ndim > 1 or name == "query") is of]
        for of in (True, False)
    ]
    adamw = torch.optim.AdamW([{"params": group} for group in groups])
    for step in (1, 2, 3):
        fall = 0.5 * (1 + math.cos(math.pi * step / 3))
        decay = SETTING.weight_decay
        adamw.param_groups[0]["weight_decay"] = (
            1e-6 + (decay - 1e-6) * fall if optimizer == "vjepa" else decay
        )
        adamw.param_groups[1]["weight_decay"] = 0 if optimizer == "vjepa" else decay
        for group in adamw.param_groups:
            group["lr"] = SETTING.lr * fall
        adamw.zero_grad()
        (100 * F.cross_entropy(probe(tokens), label) / 100).backward()
        if optimizer == "vjepa":
            torch.nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
        adamw.step()
    for weight, expected in zip(grid.probes["a", SETTING].parameters(), probe.parameters(), strict=True):
        assert (weight - expected).abs().max() < 1e-5


def test_training_clips_change_as_their_seed_says():
    """The same clip from the same seed, another from another, and nobody else's random numbers move."""
    rng = np.random.default_rng(0)
    frames = list(rng.integers(0, 256, (4, 40, 60, 3), dtype=np.uint8))
    view = ViewConfig(num_frames=4, crop_size=16, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    draws = (draw(0, "a", 0),)
    before = np.random.get_state()[1].tolist()
    videos = [AugmentedVideoCut(view, 1, 1, 1.0, draws, (seed,)).clip(frames)[0] for seed in (1, 1, 2)]
    images = [ImageCut(view, 1, 1, 1.0, draws, seed).clip(frames)[0] for seed in (1, 1, 2)]
    assert before == np.random.get_state()[1].tolist()  # Python's own are drawn from by the type checks
    for clips in (videos, images):
        assert clips[0].shape == (4, 16, 16, 3)
        assert (clips[0] == clips[1]).all()
        assert (clips[0] != clips[2]).any()
    assert (images[0] == images[0][:1]).all(), "an image is repeated"
    scored, _ = ImageCut(view, 1, 1, 1.0).clip(frames)
    oracle = transforms.Compose([transforms.Resize(int(16 * 256 / 224)), transforms.CenterCrop(16)])
    assert (scored[0] == np.asarray(oracle(Image.fromarray(frames[0])))).all()
