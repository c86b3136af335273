"""The attentive probe: its block against a slow reference, and what it learns."""

import math

import pytest
import torch
import torch.nn.functional as F

from student_trainer.evaluation.probe import AttentiveProbe, Score, score, train_probes

SETTINGS = {"num_heads": 2, "epochs": 20, "lr": 3e-3, "weight_decay": 0.01, "batch_size": 32, "seed": 0}


def random_probe(width: int, num_heads: int, num_classes: int) -> AttentiveProbe:
    probe = AttentiveProbe(width, num_heads, num_classes)
    generator = torch.Generator().manual_seed(1)
    for parameter in probe.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return probe.double()


def slow_logits(probe: AttentiveProbe, tokens: torch.Tensor) -> torch.Tensor:
    """The same block written out: keys and values of every token, one clip, one head and one token at a time."""
    width = tokens.shape[-1]
    head = width // probe.num_heads
    rows = []
    for clip in tokens:
        x = F.layer_norm(clip, (width,), probe.token_norm.weight, probe.token_norm.bias, 1e-5)
        query = probe.w_query.weight @ probe.query + probe.w_query.bias
        attended = torch.zeros(width, dtype=tokens.dtype)
        for number in range(probe.num_heads):
            own = slice(number * head, (number + 1) * head)
            keys = [probe.w_key.weight[own] @ token for token in x]
            values = [probe.w_value.weight[own] @ token + probe.w_value.bias[own] for token in x]
            weights = [math.exp((query[own] @ key).item() / math.sqrt(head)) for key in keys]
            attended[own] = sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
        q = probe.query + attended
        hidden = F.gelu(probe.w_up(F.layer_norm(q, (width,), probe.mlp_norm.weight, probe.mlp_norm.bias, 1e-5)))
        rows.append(probe.classifier(q + probe.w_down(hidden)))
    return torch.stack(rows)


def separable(num_clips: int, num_classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in which one token of the clip, at any place, points in its class's direction."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_classes, 16, generator=torch.Generator().manual_seed(99))
    tokens = torch.randn(num_clips, 6, 16, generator=generator)
    label = torch.randint(num_classes, (num_clips,), generator=generator)
    tokens[torch.arange(num_clips), torch.randint(6, (num_clips,), generator=generator)] += 3 * directions[label]
    return tokens, label


def test_the_block_equals_a_slow_reference():
    probe = random_probe(width=12, num_heads=3, num_classes=5)
    tokens = torch.randn(4, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(probe(tokens), slow_logits(probe, tokens), rtol=1e-9, atol=1e-9)


def test_every_parameter_of_the_probe_gets_a_gradient():
    probe = random_probe(width=12, num_heads=3, num_classes=5)
    probe(torch.randn(4, 7, 12, dtype=torch.float64)).square().sum().backward()
    assert [name for name, parameter in probe.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_it_learns_what_can_be_learned_and_nothing_else():
    tokens, label = separable(500, num_classes=4)
    held_out, held_out_label = separable(300, num_classes=4, seed=1)
    shuffled = label[torch.randperm(500, generator=torch.Generator().manual_seed(3))]
    probes = train_probes(tokens, {"real": label, "shuffled": shuffled}, {"real": 4, "shuffled": 4}, **SETTINGS)
    assert score(probes["real"], held_out, held_out_label, 64).accuracy > 0.9
    low, high = score(probes["shuffled"], held_out, held_out_label, 64).interval
    assert low - 0.05 < 0.25 < high + 0.05


def test_a_label_does_not_change_another_and_the_seed_decides():
    tokens, label = separable(100, num_classes=4)
    other = torch.arange(100) % 3
    settings = SETTINGS | {"epochs": 3}
    alone = train_probes(tokens, {"class": label}, {"class": 4}, **settings)["class"]
    together = train_probes(tokens, {"aaa": other, "class": label}, {"aaa": 3, "class": 4}, **settings)["class"]
    another_seed = train_probes(tokens, {"class": label}, {"class": 4}, **settings | {"seed": 1})["class"]
    for name, value in alone.state_dict().items():
        assert torch.equal(value, together.state_dict()[name]), name
    assert not torch.equal(alone.query, another_seed.query)


def test_the_interval_is_wilsons():
    """Closed form by another route: the interval's ends are where |p - k/n| is 1.96 standard deviations of a binomial with that p."""
    value = Score(num_correct=7, num_clips=40)
    for end in value.interval:
        assert abs(value.accuracy - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / 40))
    assert Score(num_correct=0, num_clips=40).interval[0] == 0
    assert Score(num_correct=40, num_clips=40).interval[1] == pytest.approx(1)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"got 5 probe heads for tokens of 12 channels.*--num-heads"):
        AttentiveProbe(12, 5, 2)
