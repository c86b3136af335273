"""What a stage-2 step asks of a GPU, counted without one: every kernel's bytes and products as eager
PyTorch launches them, and those of the same blocks compiled, from inductor's own record of what it fuses.
Ratios of two versions of one step are what it is for; the milliseconds are a bound, at 0.83 of the bandwidth
and 0.8 of the peak of `--gpu`.

`python benchmarks/roofline.py` counts ViT-L, 24 clips of 16 x 224 x 224, bfloat16; `--compiled` adds a block
of each part as inductor fuses it. Results are in README.md.
"""

import argparse
import copy
import functools
import json
import sys
import types
from collections import Counter

import torch
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import (
    _recursive_post_grad_passes,
    compile_fx,
    fake_tensor_prop,
    record_original_output_strides,
    view_to_reshape,
)
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from salt_distill.common.config import FlopsConfig, preset_layer
from salt_distill.common.model.compute import cast_products
from salt_distill.common.model.grid import token_grid
from salt_distill.common.model.masking import mask_group
from salt_distill.common.model.pixels import normalise
from salt_distill.common.model.predictor import Predictor
from salt_distill.common.model.roofline import BEST, GPUS, Kernel, Kernels, fake_tensors, seconds
from salt_distill.common.model.vit import Block, Encoder
from salt_distill.common.targets import codec
from salt_distill.student_trainer.salt import Salt

PARTS = ("dense teacher forward", "student and predictor, forward and backward")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="vit-l")
    parser.add_argument("--teacher", default="vit-l", help="preset of the frozen teacher")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--gpu", default="h200", choices=GPUS)
    parser.add_argument("--compiled", action="store_true", help="the blocks as inductor compiles them, too")
    parser.add_argument(
        "--vjepa2", metavar="FOLDER", help="a clone of V-JEPA 2's repository: its own modules, ViT-L, too"
    )
    arguments = parser.parse_args()
    sizes = FlopsConfig.model_validate(preset_layer(FlopsConfig, arguments.preset))
    teacher = FlopsConfig.model_validate(preset_layer(FlopsConfig, arguments.teacher)).encoder
    grid = token_grid(sizes.view, sizes.encoder)
    group = mask_group(sizes.mask, grid, seed=0, step=1, group=0, batch_size=arguments.clips)
    theirs = () if arguments.vjepa2 is None else vjepa2_models(arguments.vjepa2, len(group.sets))
    with fake_tensors():
        whole = {}
        for title, kernels in parts(sizes, teacher, group):
            say(arguments.gpu, title, kernels)
            whole[title] = milliseconds(arguments.gpu, kernels)
        if arguments.vjepa2 is not None:
            for title, kernels in parts_of_vjepa2(*theirs, sizes.view, group):
                say(arguments.gpu, f"V-JEPA 2, {title}", kernels)
    if arguments.compiled:
        for part, title, depth, eager, compiled in compiled_blocks(sizes, teacher, group):
            say(arguments.gpu, f"{title}, eager", eager)
            say(arguments.gpu, f"{title}, compiled", compiled)
            saved = milliseconds(arguments.gpu, eager) - milliseconds(arguments.gpu, compiled)
            whole[part] -= depth * saved
        for part, total in whole.items():
            print(json.dumps({"part": f"{part}, all blocks compiled", "ms": round(total, 2)}))


def parts(sizes, teacher, group):
    """The parts of a step, counted."""
    pixels = torch.empty(group.size, *sizes.view.clip_shape, dtype=torch.uint8)
    frozen = Encoder(teacher)
    cast_products(frozen)
    with Kernels() as kernels, torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        frozen(normalise(pixels))
    yield PARTS[0], kernels.launches
    predictor = Predictor(
        sizes.predictor,
        in_width=sizes.encoder.width,
        out_width=teacher.width,
        num_mask_tokens=len(group.sets),
        rope=sizes.encoder.rope,
        norm_eps=sizes.encoder.norm_eps,
    )
    objective = Salt(Encoder(sizes.encoder), predictor)
    target = codec.empty_packed(
        group.size, token_grid(sizes.view, sizes.encoder).num_tokens, teacher.width, "float16"
    )
    with Kernels() as kernels, torch.autocast("cpu", dtype=torch.bfloat16):
        loss = objective(pixels, group, target).mean()
        with torch.autocast("cpu", enabled=False):
            loss.backward()
    yield PARTS[1], kernels.launches


def vjepa2_models(folder, num_mask_sets):
    """V-JEPA 2's own encoder and predictor at ViT-L, from a clone of its repository."""
    sys.path.insert(0, folder)
    layers = types.ModuleType("timm.models.layers")  # its old name, which timm has given up
    layers.drop_path = None
    sys.modules.setdefault("timm.models.layers", layers)
    from src.models.predictor import vit_predictor
    from src.models.vision_transformer import vit_large_rope

    encoder = vit_large_rope(img_size=224, num_frames=16, tubelet_size=2, uniform_power=True)
    predictor = vit_predictor(
        img_size=(224, 224), num_frames=16, embed_dim=1024, predictor_embed_dim=384, depth=12, num_heads=12,
        use_mask_tokens=True, num_mask_tokens=num_mask_sets, use_rope=True,
    )  # fmt: skip
    return encoder, predictor


def parts_of_vjepa2(encoder, predictor, view, group):
    """The same parts by these modules. LayerNorms compute in float32, as autocast has it on a GPU."""
    clips = torch.empty(group.size, 3, *view.clip_shape[:3])
    layer_norm = torch.nn.functional.layer_norm

    def in_float32(x, shape, weight=None, bias=None, eps=1e-5):
        return layer_norm(x.float(), shape, weight, bias, eps)

    torch.nn.functional.layer_norm = in_float32
    try:
        with Kernels() as kernels, torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = encoder(clips)
            targets = in_float32(tokens, tokens.shape[-1:])
        yield PARTS[0], kernels.launches
        with Kernels() as kernels:
            loss = torch.zeros(())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                for number, mask in enumerate(group.sets):
                    visible = encoder(clips, [mask.visible_idx])
                    hidden = predictor(visible, [mask.visible_idx], [mask.hidden_idx], mask_index=number)
                    idx = mask.hidden_idx[..., None].expand(-1, -1, targets.shape[-1])
                    loss = loss + (hidden - targets.gather(1, idx)).abs().mean()
            loss.backward()
        yield PARTS[1], kernels.launches
    finally:
        torch.nn.functional.layer_norm = layer_norm


def compiled_blocks(sizes, teacher, group):
    """A block of each part under each mask set, as eager PyTorch and as inductor runs it, and how many there
    are of it."""
    num_clips, num_tokens = group.size, token_grid(sizes.view, sizes.encoder).num_tokens
    blocks = [(PARTS[0], "a teacher's block, forward", teacher, num_tokens, 1, False)]
    for mask in group.sets:
        visible = mask.visible_idx.shape[1]
        for name, config, count in (
            ("an encoder's", sizes.encoder, visible),
            ("a predictor's", sizes.predictor, visible + mask.hidden_idx.shape[1]),
        ):
            title = f"{name} block at {count} tokens, forward and backward"
            blocks.append((PARTS[1], title, config, count, num_clips, True))
    for part, title, config, count, tables, learns in blocks:
        eager, compiled = count_block(config, num_clips, count, tables, learns=learns)
        yield part, title, config.depth, eager, compiled


def count_block(config, num_clips, num_tokens, tables, *, learns):
    """Kernels of one block: those that eager PyTorch launches, and those that inductor generates."""
    compiled = Counter()

    def run(forward, rope, x):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(learns):
            out = forward(x, rope)
        if learns:
            out.backward(torch.empty_like(out))

    def block_and_input():
        block = Block(config.width, config.num_heads, config.mlp_width, 1e-6).requires_grad_(learns)
        if not learns:
            cast_products(block)
        rope = torch.empty(2, tables, 1, num_tokens, config.width // config.num_heads)
        x = torch.empty(num_clips, num_tokens, config.width, dtype=torch.bfloat16).requires_grad_(learns)
        return block, rope, x

    with FakeTensorMode():
        block, rope, x = block_and_input()
        with Kernels() as eager:
            run(block, rope, x)
    block, rope, x = block_and_input()
    torch._dynamo.reset()
    backend = functools.partial(compile_fx, inner_compile=functools.partial(count_graph, compiled))
    run(torch.compile(block, backend=backend, dynamic=False), rope, x)
    return eager.launches, compiled


def count_graph(compiled, module, inputs, **options):
    """In place of inductor's code generation: its passes and its fusion, what each of its kernels reads and
    writes by its own count, and results that nothing has computed."""
    lowered = copy.deepcopy(module)
    view_to_reshape(lowered)
    record_original_output_strides(lowered)
    inference = options.get("is_inference", False)
    with V.set_fake_mode(fake_tensor_prop(lowered, inputs)), V.set_debug_handler(DebugContext()):
        _recursive_post_grad_passes(lowered, is_inference=inference)
        graph = GraphLowering(
            lowered,
            example_inputs=inputs,
            is_inference=inference,
            is_backward=options.get("is_backward", False),
        )
        with V.set_graph_handler(graph):
            graph.run(*inputs)
            graph.init_wrapper_code()
            graph._update_scheduler()
            attention = [flops_of(node) for node in lowered.graph.nodes if "scaled_dot" in str(node.target)]
            for node, values in graph.count_bytes()[1]:
                if values == 0:
                    continue
                extern = type(node).__name__ == "ExternKernelSchedulerNode"
                flops = node.estimate_flops() if extern else 0
                if extern and flops is None:
                    flops = attention.pop(0) if attention else 0
                name = "product or attention" if flops else "fused"
                compiled[Kernel(name, 4 * values, flops or 0, torch.bfloat16)] += 1
    [results] = next(node for node in module.graph.nodes if node.op == "output").args

    def boxed(arguments):
        arguments.clear()
        return [like(node.meta["val"]) if isinstance(node, torch.fx.Node) else node for node in results]

    return make_boxed_func(lambda *arguments: boxed(list(arguments)))


def flops_of(node):
    """Of an operation of a graph, by PyTorch's own formulas."""
    arguments = [
        argument.meta["val"] if isinstance(argument, torch.fx.Node) else argument for argument in node.args
    ]
    return flop_registry[node.target.overloadpacket](*arguments, out_val=node.meta["val"])


def like(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def milliseconds(gpu, launches):
    return 1000 * seconds(launches, GPUS[gpu], BEST)


def say(gpu, title, launches):
    """Prints the whole and the dearest kernels."""

    by_name = {}
    for kernel, number in launches.items():
        by_name.setdefault(kernel.name, Counter())[kernel] += number
    dearest = sorted(by_name.items(), key=lambda item: -milliseconds(gpu, item[1]))[:8]
    print(
        json.dumps(
            {
                "part": title,
                "gpu": gpu,
                "ms": round(milliseconds(gpu, launches), 2),
                "gigabytes": round(
                    sum(number * kernel.num_bytes for kernel, number in launches.items()) / 1e9, 2
                ),
                "tflop": round(sum(number * kernel.flops for kernel, number in launches.items()) / 1e12, 3),
                "kernels": sum(launches.values()),
                "dearest_ms": {name: round(milliseconds(gpu, kernels), 2) for name, kernels in dearest},
            }
        )
    )


if __name__ == "__main__":
    main()
