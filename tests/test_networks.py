"""Half of every group of a network goes: what is left is the network whose readers look away."""

import copy
import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import efreg

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

SPEC = importlib.util.spec_from_file_location("zoo", Path(__file__).parents[1] / "bench" / "zoo.py")
zoo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(zoo)

QUERIES = re.compile(r"\b(qkv|kv|q|self_attention|aggreg)\b")
"""What writes queries and keys, which products of activations read, in the networks below."""

QUICK = {
    "torchvision:resnet18": 3.7,
    "torchvision:mobilenet_v3_small": 3.0,
    "torchvision:regnet_y_400mf": 3.6,
    "torchvision:shufflenet_v2_x0_5": 2.3,
    "torchvision:squeezenet1_1": 3.0,
    "torchvision:densenet121": 3.8,
    "torchvision:efficientnet_b0": 3.4,
    "timm:convnext_atto": 1.7,
    "timm:mixnet_s": 2.0,
    "timm:rexnet_100": 2.0,
    "timm:levit_128s": 2.4,
    "timm:efficientvit_b0": 2.4,
    "timm:skresnet18": 2.0,
    "timm:ghostnet_100": 3.3,
    "timm:hrnet_w18_small": 3.8,
    "timm:resnest14d": 3.5,
}

SLOW = ("torchvision:densenet121", "timm:rexnet_100", "timm:levit_128s", "timm:hrnet_w18_small")


def reference(model, plan, standardised=()):
    """A deep copy in float64 whose readers' columns are zero at the units that go, made by hand.

    Queries and keys are read by each other, not by weights: they are zero themselves, rows, biases, shifts.
    Weights that are standardised over their columns (`standardised`) become what they are over what stays.
    """
    model = copy.deepcopy(model).double()
    columns = {}
    with torch.no_grad():
        for cut, units in zip(plan.cuts, plan.filters(model).values(), strict=True):
            own = ("writes", "carries") if any(map(QUERIES.search, cut.group.writers)) else ()
            for member in (member for part in ("reads", *own) for member in cut.group.of(part)):
                positions = member.positions(units)
                model.get_parameter(member.tensor).index_fill_(member.axis, positions, 0)
                columns.setdefault(member.module, []).append(positions)
        for name in standardised:
            plain(model, name, torch.cat(columns.get(name, [torch.empty(0, dtype=torch.int64)])))
    return model


def plain(model, name, gone):
    """Puts a convolution with γ · scale · (w − mean) / √(var + ε), by hand, in the place of one."""
    layer = model.get_submodule(name)
    stays = torch.ones(layer.weight.shape[1], dtype=bool).index_fill(0, gone, False)
    w = layer.weight[:, stays].flatten(1)
    variance, mean = torch.var_mean(w, 1, correction=0, keepdim=True)
    w = layer.gain.flatten()[:, None] * layer.scale * (w - mean) / (variance + layer.eps).sqrt()
    found = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
    found.double().bias.copy_(layer.bias)
    found.weight.zero_()[:, stays] = w.reshape(len(w), -1, *layer.kernel_size)
    path, _, key = name.rpartition(".")
    setattr(model.get_submodule(path), key, found)


def tolerance(name):
    """Of the largest output. float64 rounds to 1e-16, and a hundred layers of random weights enlarge that.

    EfficientViT's attention computes in float32 whatever it is given.
    """
    return 1e-5 if "efficientvit" in name else 1e-9


def tensors(output):
    output = output.values() if isinstance(output, dict) else output
    return [output] if isinstance(output, torch.Tensor) else list(output)


def held(model, x, least, *, tolerance=1e-9, approximate=False, standardised=()):
    """Half of every group goes: the hand-made reference, with the planned MACs, which can be trained."""
    plan = efreg.plan(model, ratio=0.5, example_inputs=x, approximate=approximate)
    pruned = efreg.prune(model, plan, example_inputs=x)
    assert plan.macs == (efreg.macs(model, x), efreg.macs(pruned, x))
    assert plan.speedup >= least
    assert plan.parameters[1] == sum(p.numel() for p in pruned.parameters())
    fresh = torch.randn(x.shape, dtype=torch.float64)
    with torch.no_grad():
        expected = tensors(reference(model, plan, standardised)(fresh))
        found = tensors(copy.deepcopy(pruned).double()(fresh))
    for y, z in zip(found, expected, strict=True):
        assert torch.allclose(y, z, rtol=0, atol=tolerance * z.abs().max())
    sum(y.square().mean() for y in tensors(pruned.train()(x))).backward()
    torch.optim.SGD(pruned.parameters(), lr=1e-3).step()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in QUICK]
)
def test_half_of_every_group_goes(name):
    case = zoo.cases()[name]
    case = replace(case, size=min(case.size, 224 if "levit" in name else 64))
    held(case.build(), case.inputs(), QUICK[name], tolerance=tolerance(name))


def test_vision_transformer_loses_heads_and_mlp_channels():
    model = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10).eval()
    held(zoo.lived(model), torch.randn(2, 3, 32, 32), 1.6)


def test_swin_transformer():
    model = torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10).eval()
    held(zoo.lived(model), torch.randn(2, 3, 64, 64), 1.3)


def test_standardised_weights_are_taken_over_what_stays():
    """γ · (w − mean) / √var over the columns that are left: only where an approximation is allowed."""
    model = timm.create_model("nf_resnet26").eval()
    names = [name for name, module in model.named_modules() if type(module).__name__ == "ScaledStdConv2d"]
    held(zoo.lived(model), torch.randn(2, 3, 64, 64), 3.5, approximate=True, standardised=names)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.cases())
def test_the_whole_list(name):
    case = zoo.cases()[name]
    model = case.build()
    names = [name for name, module in model.named_modules() if type(module).__name__ == "ScaledStdConv2d"]
    ways = {"approximate": case.approximate, "standardised": names, "tolerance": tolerance(name)}
    held(model, case.inputs(), case.least, **ways)


@pytest.mark.parametrize(
    "name", ["resnet50", "mobilenet_v2", pytest.param("densenet121", marks=pytest.mark.slow)]
)
def test_units_are_what_torch_pruning_finds(name):
    """(module, axis, indices) of the first and the last unit of every group."""
    tp = pytest.importorskip("torch_pruning")
    case = replace(zoo.cases()[f"torchvision:{name}"], size=64)
    model, x = case.build(), case.inputs()
    names = {module: name for name, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, x)

    def theirs(layer, k):
        found = set()
        group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, idxs=[k])
        for dependency, positions in group:
            module, pruner = dependency.target.module, graph.get_pruner_of_module(dependency.target.module)
            if module in names:
                reads = dependency.handler == pruner.prune_in_channels != pruner.prune_out_channels
                found.add((names[module], int(reads), tuple(sorted(positions))))
        return found

    for group in efreg.inspect(model, x).groups:
        for unit in (0, group.size - 1):
            ours = {(m.module, m.axis, tuple(m.positions([unit]).tolist())) for m in group.members}
            writer = group.of("writes")[0]
            (k,) = writer.positions([unit]).tolist()
            assert ours == theirs(model.get_submodule(writer.module), k), (group.name, unit)
