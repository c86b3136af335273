"""One optimizer step: schedules, parameter groups, mask groups as micro-batches, the moving average, the
compute switches."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from train_tools import (
    ALONE,
    BAD_SLOT,
    CPU,
    RandomClips,
    batch_of,
    losses_and_gradients,
    new_model,
    small_run,
    train_on_random_clips,
)

from salt_distill.common.config import ComputeConfig, EmaConfig, OptimConfig, TeacherRun
from salt_distill.common.model.compute import compiles, set_up, uses_bfloat16
from salt_distill.common.model.pixels import normalise
from salt_distill.student_trainer.loop import train_on, update
from salt_distill.student_trainer.objective import modules_of
from salt_distill.student_trainer.optim import new_optimizer, set_schedule
from salt_distill.student_trainer.ranks import Worker
from salt_distill.student_trainer.run_directory import check_run, claimed, read_metrics
from salt_distill.student_trainer.schedule import ema_momentum
from salt_distill.student_trainer.vjepa import VJepa

# --- schedules (those of the paper are in test_fidelity.py) ---


def test_momentum_is_v_jepas():
    assert [ema_momentum(EmaConfig(), step=step, steps=100) for step in (1, 50, 100)] == [0.99925] * 3
    v1 = EmaConfig(start=0.998, end=1.0)
    assert ema_momentum(v1, step=1, steps=90_000) == 0.998
    assert ema_momentum(v1, step=45_001, steps=90_000) == pytest.approx(0.999, abs=1e-12)
    assert ema_momentum(v1, step=90_000, steps=90_000) == pytest.approx(1 - 0.002 / 90_000, abs=1e-12)


# --- the optimizer ---


def test_norms_and_biases_are_not_decayed_and_mask_tokens_are():
    objective, _ = new_model(small_run(TeacherRun))
    optimizer = new_optimizer([objective.encoder, objective.predictor], OptimConfig())
    set_schedule(optimizer, OptimConfig(), step=80_000, steps=160_000)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(objective.named_parameters())
    assert len(decay) == len(named)
    kept = {name for name, parameter in named.items() if decay[id(parameter)] == 0}
    assert kept == {name for name in named if name.endswith("bias") or "norm" in name}
    assert [decay[id(named[name])] for name in named.keys() - kept] == pytest.approx(
        [0.22] * (len(named) - len(kept))
    )
    assert "predictor.mask_tokens" not in kept


@pytest.mark.parametrize("clip", ["separate", "joint"])
def test_the_gradient_is_cut_after_the_warm_up(clip):
    config = small_run(TeacherRun, optim={"warmup_steps": 3, "clip_grad": 0.002, "clip": clip})

    def norms(step: int, config: TeacherRun = config) -> tuple[float, float, float]:
        """That of the whole gradient before it was cut, those of encoder and predictor after."""
        objective, _ = new_model(config)
        optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
        norm = update(objective, optimizer, replace(batch_of(config), step=step), (), config, ALONE).norm
        encoder, predictor = (
            torch.cat([parameter.grad.flatten() for parameter in part.parameters()]).norm().item()
            for part in (objective.encoder, objective.predictor)
        )
        return norm.item(), encoder, predictor

    norm, encoder, predictor = norms(step=3)
    assert math.hypot(encoder, predictor) == pytest.approx(norm, rel=1e-5)
    assert min(encoder, predictor) > 0.002
    again, *cut = norms(step=4)
    assert again == norm
    share = 0.002 / np.array([encoder, predictor] if clip == "separate" else [norm, norm])
    assert cut == pytest.approx(share * [encoder, predictor], rel=1e-3)
    always = config.optim.model_copy(update={"clip_after_warmup": False})
    assert norms(step=3, config=config.model_copy(update={"optim": always})) == (again, *cut)


# --- mask groups ---


def test_groups_one_by_one_give_the_gradient_of_all_at_once():
    config = small_run(TeacherRun)
    batch = batch_of(config)
    assert [group.size for group in batch.masks] == [24, 6]
    assert batch.clips.good.sum() == 29

    objective, _ = new_model(config)
    losses = torch.cat([objective(*group.inputs) for group in batch.groups((), CPU)], dim=1)
    whole = losses.mean(0)[torch.from_numpy(batch.clips.good)].mean()  # DESIGN section 4, Loss
    whole.backward()
    expected = [parameter.grad for parameter in objective.parameters()]

    again, _ = new_model(config)
    loss = update(
        again, torch.optim.SGD(again.parameters(), lr=0.0, fused=True), batch, (), config, ALONE
    ).loss
    torch.testing.assert_close(loss, whole.detach().double(), rtol=1e-6, atol=0)
    for parameter, gradient in zip(again.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


class Casts(TorchDispatchMode):
    """Shapes of what is cast to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.shapes[out.shape] += 1
        return out


def test_a_step_casts_each_weight_once_for_all_groups_and_mask_sets_and_gives_the_same_gradient():
    config = small_run(TeacherRun, compute={"dtype": "bfloat16"})
    objective, _ = new_model(config)
    batch = batch_of(config)
    assert len(batch.masks) == 2
    with Casts() as casts:
        update(
            objective, torch.optim.SGD(objective.parameters(), lr=0.0, fused=True), batch, (), config, ALONE
        )
    weights = Counter(parameter.shape for parameter in objective.parameters() if parameter.ndim == 2)
    del weights[objective.predictor.mask_tokens.shape]
    assert {shape: casts.shapes[shape] for shape in weights} == weights

    again, _ = new_model(config)
    num_good = int(batch.clips.good.sum())
    for group in batch.groups((), CPU):
        with torch.autocast("cpu", torch.bfloat16):
            losses = again(*group.inputs)
        ((losses.mean(0) * group.good).sum() / num_good).backward()
    for parameter, expected in zip(objective.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


def test_a_bad_clip_has_no_weight():
    config = small_run(TeacherRun)
    batch = batch_of(config)
    loss = update(
        objective := new_model(config)[0],
        torch.optim.SGD(objective.parameters(), lr=0.0, fused=True),
        batch,
        (),
        config,
        ALONE,
    ).loss
    batch.clips.pixels[BAD_SLOT] = 200 + torch.arange(32, dtype=torch.uint8).numpy()[:, None]
    again = update(
        objective := new_model(config)[0],
        torch.optim.SGD(objective.parameters(), lr=0.0, fused=True),
        batch,
        (),
        config,
        ALONE,
    ).loss
    assert torch.equal(loss, again)
    batch.clips.pixels[BAD_SLOT + 1] += 1
    other = update(
        objective := new_model(config)[0],
        torch.optim.SGD(objective.parameters(), lr=0.0, fused=True),
        batch,
        (),
        config,
        ALONE,
    ).loss
    assert not torch.equal(loss, other)


# --- nothing of a step waits for the device ---


class NoAnswers(TorchDispatchMode):
    """Operations whose result the host would need, so that it waits for the device, are errors."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def step_of(device: torch.device) -> Callable[[int], None]:
    """Takes a whole step with a number: forward, backward, clipping, optimizer, moving average."""
    config = small_run()
    objective, _ = new_model(config)
    assert isinstance(objective, VJepa)
    objective.to(device)
    optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
    worker = Worker(rank=0, world_size=1, device=device)
    batches = {number: batch_of(config, number) for number in (1, 2)}

    def step(number: int) -> None:
        set_schedule(optimizer, config.optim, step=number, steps=config.steps)
        update(objective, optimizer, batches[number], (), config, worker)
        objective.move_target_encoder(step=number, steps=config.steps)

    return step


def test_no_operation_of_a_step_asks_for_a_value():
    step = step_of(CPU)
    with NoAnswers():
        step(1)
        with pytest.raises(AssertionError, match=r"aten\._local_scalar_dense.* waits for the device"):
            torch.ones(()).item()


@pytest.mark.needs_cuda
def test_the_host_waits_nowhere_in_a_step_of_a_gpu():
    if not torch.cuda.is_available():
        (pytest.fail if os.environ.get("FAIL_WITHOUT_CUDA") == "1" else pytest.skip)(
            "there is no CUDA device"
        )
    step = step_of(torch.device("cuda"))
    step(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- the moving average ---


def test_the_target_encoder_follows_the_encoder_and_is_the_result():
    config = small_run(ema={"start": 0.75, "end": 1.0})
    objective, checkpoint_config = new_model(config)
    assert isinstance(objective, VJepa)
    assert modules_of(objective)["model"] is objective.target_encoder
    assert checkpoint_config.objective == "vjepa"
    before = [parameter.clone() for parameter in objective.target_encoder.parameters()]
    assert all(
        torch.equal(a, b) for a, b in zip(before, objective.encoder.parameters(), strict=True)
    )  # it starts as a copy
    optimizer = new_optimizer([objective.encoder, objective.predictor], config.optim)
    for step in (1, 2):
        update(objective, optimizer, batch_of(config, step), (), config, ALONE)
        objective.move_target_encoder(step=step, steps=10)
        momentum = 0.75 + 0.25 * (step - 1) / 10
        before = [
            momentum * old + (1 - momentum) * new
            for old, new in zip(before, objective.encoder.parameters(), strict=True)
        ]
        for parameter, expected in zip(objective.target_encoder.parameters(), before, strict=True):
            torch.testing.assert_close(parameter.data, expected.data, rtol=1e-6, atol=1e-7)
            assert parameter.grad is None
            assert not parameter.requires_grad


def test_the_moving_target_is_the_normalised_dense_forward():
    config = small_run()
    objective, _ = new_model(config)
    torch.nn.init.zeros_(
        objective.predictor.head.weight
    )  # the prediction is 0, so the loss is the target's mean size
    group = next(iter(batch_of(config).groups((), CPU)))
    losses = objective(*group.inputs)
    with torch.no_grad():
        dense = objective.target_encoder(normalise(group.pixels))
        target = F.layer_norm(dense, (32,), eps=1e-5)
    for set_idx, mask in enumerate(group.masks.sets):
        for row in range(24):
            torch.testing.assert_close(losses[set_idx, row], target[row, mask.hidden_idx[row]].abs().mean())


# --- compute switches ---


@pytest.fixture(scope="module")
def plain() -> dict[str, torch.Tensor]:
    return losses_and_gradients(ComputeConfig())


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def test_activation_checkpointing_changes_no_bit(plain):
    checkpointed = losses_and_gradients(ComputeConfig(activation_checkpointing=True))
    assert checkpointed.keys() == plain.keys()
    assert [name for name, tensor in plain.items() if not torch.equal(tensor, checkpointed[name])] == []


def test_activation_checkpointing_keeps_less():
    def kept_bytes(checkpointing: bool) -> int:
        config = small_run(TeacherRun)
        objective, _ = new_model(config)
        set_up(objective, ComputeConfig(activation_checkpointing=checkpointing), CPU)
        sizes = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        group = next(iter(batch_of(config).groups((), CPU)))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            objective(*group.inputs)
        return sum(sizes)

    assert kept_bytes(True) < kept_bytes(False) / 2


def test_explicit_attention_agrees(plain):
    explicit = losses_and_gradients(ComputeConfig(attention="explicit"))
    assert_close(explicit, plain)
    assert not torch.equal(
        explicit["encoder.blocks.0.attn.w_qkv.weight"], plain["encoder.blocks.0.attn.w_qkv.weight"]
    )


@pytest.mark.slow
def test_compiled_blocks_agree_and_are_compiled_once_for_thirty_steps(plain, tmp_path):
    code = (
        "from pathlib import Path; from salt_distill.common.config import ComputeConfig; from train_tools"
        " import save_losses_and_gradients\nsave_losses_and_gradients(ComputeConfig(compile=True),"
        f" Path({str(tmp_path / 'compiled.safetensors')!r}), more_steps=29)"
    )
    environment = {**os.environ, "TORCH_LOGS": "recompiles"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = load_file(tmp_path / "compiled.safetensors")
    assert_close(compiled, plain)  # the names too: a checkpoint of a compiled run is like any other
    assert not all(torch.equal(compiled[name], tensor) for name, tensor in plain.items())
    recompiled = [line for line in done.stderr.splitlines() if "Recompiling function" in line]
    assert len(recompiled) <= 2, (
        recompiled
    )  # target encoder without gradient, then with; not one per block or per number of tokens


def test_auto_compiles_on_a_gpu_with_compilers_alone(monkeypatch, tmp_path, caplog):
    gpu = torch.device("cuda")
    assert [compiles(wish, CPU, key="compute.compile") for wish in ("auto", False, True)] == [
        False,
        False,
        True,
    ]
    assert compiles("auto", gpu, key="compute.compile")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not compiles("auto", gpu, key="compute.compile")
    assert "compute.compile=auto: nothing is compiled, so steps take longer: g++ was not found" in caplog.text


def test_compile_without_a_compiler_is_refused_before_training(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    config = small_run(TeacherRun, out=str(tmp_path), compute={"compile": True})
    with pytest.raises(
        ValueError,
        match=r"got compute.compile=true, but g\+\+ was not found: torch.compile needs a C\+\+ compiler",
    ):
        train_on_random_clips(config)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_bfloat16_keeps_weights_and_gradients_in_float32():
    results = {}
    for dtype in ("float32", "bfloat16"):
        config = small_run(compute={"dtype": dtype})
        objective, _ = new_model(config)
        results[dtype] = update(
            objective,
            torch.optim.SGD(objective.parameters(), lr=0.0, fused=True),
            batch_of(config),
            (),
            config,
            ALONE,
        ).loss
        assert {p.dtype for p in objective.parameters()} | {
            p.grad.dtype for p in objective.parameters() if p.grad is not None
        } == {torch.float32}
    torch.testing.assert_close(results["bfloat16"], results["float32"], rtol=2e-2, atol=0)
    assert results["bfloat16"] != results["float32"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert objective.encoder(torch.randn(1, 3, 4, 32, 32)).dtype == torch.float32  # the final norm


def test_auto_is_bfloat16_on_a_gpu_alone():
    assert uses_bfloat16("auto", torch.device("cuda"))
    assert not uses_bfloat16("auto", CPU)
    assert not uses_bfloat16("float32", torch.device("cuda"))


def test_a_run_says_how_it_computed_and_may_compute_otherwise_when_it_goes_on(tmp_path):
    out = str(tmp_path / "run")
    first = small_run(TeacherRun, out=out, steps=4)
    for config in (
        first,
        small_run(TeacherRun, out=out, resume=True, steps=5, compute={"activation_checkpointing": True}),
    ):
        check_run(config)
        with claimed(config) as checkpoint:
            train_on(RandomClips(config.view.clip_shape), (), config, ALONE, checkpoint)  # type: ignore[arg-type]
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [
        (start["after_step"], start["activation_checkpointing"], start["dtype"], start["decoder"])
        for start in starts
    ] == [
        (0, False, "float32", "none"),
        (4, True, "float32", "none"),
    ]
    assert starts[0]["device"].startswith("cpu")
    line = read_metrics(out)[-1]  # of step 5 alone
    masks = batch_of(first, step=5).masks
    for name, idx in (("context_fraction", "visible_idx"), ("target_fraction", "hidden_idx")):
        share = sum(getattr(mask, idx).numel() for group in masks for mask in group.sets) / (
            30 * 2 * 32
        )  # clips, sets, tokens
        assert line[name] == pytest.approx(share)
    other = small_run(TeacherRun, out=out, resume=True, steps=5, compute={"dtype": "bfloat16"})
    with pytest.raises(
        ValueError, match=r"was started with compute\.dtype='auto', got compute\.dtype='bfloat16'"
    ):
        check_run(other)
