"""What a rule says commutes with its operation: without a unit's places the operation gives what it gives
with zeros there, without that unit's places in the output. Units that are said to be silent are zero in it.
"""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from efreg.pruning.watching import watch


@pytest.fixture(autouse=True)
def _no_rule_fails(caplog):
    """A rule that fails freezes all, as where there is none, and says so at DEBUG alone."""
    caplog.set_level("DEBUG", "efreg")
    yield
    assert not [record for record in caplog.get_records("call") if record.msg.startswith("the rule of")]


class Operation(nn.Module):
    """An operation on parameters; what it gives is added to sinks, which so have its ids, and summed, which
    reads it.

    The first argument is made to depend on the network's input, and with `weights` no other.
    """

    def __init__(self, function, shapes, weights):
        super().__init__()
        self.function, self.weights = function, weights
        self.inputs = nn.ParameterList([0.1 + 0.8 * torch.rand(s, dtype=torch.float64) for s in shapes])
        self.sinks = nn.ParameterList(
            [torch.randn(y.shape, dtype=torch.float64) for y in self.outputs(self.inputs)]
        )

    def outputs(self, inputs):
        found = self.function(*(x.detach() if not torch.is_grad_enabled() else x for x in inputs))
        return [y for y in (found if isinstance(found, (tuple, list)) else (found,)) if y is not None]

    def forward(self, x):
        first, *others = self.inputs
        inputs = [first * x, *(other if self.weights else other * x for other in others)]
        for y, sink in zip(self.outputs(inputs), self.sinks, strict=True):
            (y + sink).sum()


def units(watched):
    """Of each class of ids that can go: the places that it has in each tensor, by axis, and whether it is
    loud.
    """
    ids = watched.ids.copy()
    ids.settle(False)
    roots = {
        name: [None if axis is None else ids.find(axis) for axis in axes]
        for name, axes in watched.tensors.items()
    }
    every = {root for axes in roots.values() for axis in axes if axis is not None for root in axis.tolist()}
    for root in sorted(every):
        if not ids.are_frozen(np.array([root]), False)[0]:
            places = {
                name: {
                    i: torch.from_numpy(np.flatnonzero(axis == root))
                    for i, axis in enumerate(axes)
                    if axis is not None and (axis == root).any()
                }
                for name, axes in roots.items()
            }
            yield places, bool(ids.are_loud(np.array([root]))[0])


def zeroed(x, places):
    for axis, index in places.items():
        x = x.index_fill(axis, index, 0)
    return x


def sliced(x, places):
    for axis, index in places.items():
        stays = torch.ones(x.shape[axis], dtype=torch.bool)
        stays[index] = False
        x = x.index_select(axis, stays.nonzero().flatten())
    return x


def assert_lawful(function, shapes, weights):
    """Checks the law for each unit. Returns how many there are."""
    operation = Operation(function, shapes, weights)
    count = 0
    for places, loud in units(watch(operation, torch.ones(()))):
        own = [places[f"inputs.{i}"] for i in range(len(shapes))]
        if not any(own):
            continue
        count += 1
        with torch.no_grad():
            expected = operation.outputs([zeroed(x, p) for x, p in zip(operation.inputs, own, strict=True)])
            found = operation.outputs([sliced(x, p) for x, p in zip(operation.inputs, own, strict=True)])
        for i, (x, y) in enumerate(zip(found, expected, strict=True)):
            gone = places[f"sinks.{i}"]
            torch.testing.assert_close(x, sliced(y, gone), rtol=1e-12, atol=1e-12)
            for axis, index in gone.items():
                assert loud or not y.index_select(axis, index).any(), "said to be silent"
    return count


SMALL = (2, 3, 5)
IMAGE = (2, 4, 4, 6)

POINTWISE = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "rrelu": F.rrelu,
    "threshold": lambda x: F.threshold(x, 0.3, 0.7),
    "power": lambda x: 2**x,
    "one over": lambda x: 1 / (x + 1),
    "mask": lambda x: x.masked_fill(x > 0.5, 7.0),
    "where": lambda x: torch.where(x > 0.5, x, 1.0),
    "comparison": lambda x: (x > 0.5) | (x < 0.2),
    "complex": lambda x: (torch.complex(x, x) * torch.complex(x, -x)).real,
    "pairs": lambda x: torch.view_as_complex(torch.stack([x, -x], -1)).conj().imag,
    "rounded": lambda x: torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127),
    "in place": lambda x: F.hardtanh(x.clone(), 0.2, 0.6, inplace=True).add_(1).mul_(2),
    "filled": lambda x: x.clone().fill_(3.0),
    "zeros like": lambda x: torch.zeros_like(x) + x,
    "ones like": lambda x: torch.ones_like(x) + x,
    "new zeros": lambda x: x.new_zeros(x.shape) + x,
    "new ones": lambda x: x.new_ones(x.shape) * x,
    "random": lambda x: torch.rand_like(x) * 0 + x,
    "converted": lambda x: x.float().type_as(x).contiguous(),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "lerp": lambda x: torch.lerp(x, 2 * x, 0.3),
    "flipped": lambda x: x.flip((0, 2)),
    "view": lambda x: x.view(torch.int64).view(torch.float64),
}

WITH_ANOTHER = {
    "sum": (lambda a, b: a + b, SMALL, (5,), 10),
    "product of columns and rows": (lambda a, b: a * b, (3, 1), (1, 5), 8),
    "in place": (lambda a, b: a.clone().add_(b), SMALL, (3, 1), 10),
    "copied": (lambda a, b: a.clone().copy_(b), SMALL, (5,), 10),
    "chosen": (lambda a, b: torch.where(a > 0.5, a, b), SMALL, SMALL, 10),
    "expanded": (lambda a, b: a * b.expand_as(a), SMALL, (2, 1, 5), 10),
    "prelu": (F.prelu, SMALL, (3,), 10),
    "cross": (lambda a, b: torch.linalg.cross(a, b), (4, 3), (4, 3), 4),
    "outer": (torch.outer, (3,), (4,), 7),
    "mm": (torch.mm, (3, 4), (4, 5), 12),
    "matmul": (torch.matmul, SMALL, (5, 4), 14),
    "bmm": (torch.bmm, (2, 3, 4), (2, 4, 5), 14),
    "mv": (torch.mv, (3, 4), (4,), 7),
    "vector times matrix": (torch.matmul, (5,), (5, 4), 9),
    "dot": (torch.dot, (4,), (4,), 4),
    "vdot": (torch.vdot, (4,), (4,), 4),
    "linear": (F.linear, (5,), (4, 5), 9),
    "einsum": (lambda a, b: torch.einsum("bchw,ck->bkhw", a, b), (2, 3, 4, 5), (3, 6), 20),
    "einsum of heads": (lambda a, b: torch.einsum("qhd,khd->hqk", a, b), (3, 4, 5), (6, 4, 5), 18),
    "tensordot": (lambda a, b: torch.tensordot(a, b, ([1], [0])), SMALL, (3, 4), 14),
    "convolution": (F.conv2d, (2, 3, 6, 6), (4, 3, 3, 3), 7),
    "convolution in 1d": (F.conv1d, (2, 3, 8), (4, 3, 3), 7),
    "unbatched convolution": (F.conv2d, (3, 6, 6), (4, 3, 3, 3), 7),
    "transposed convolution": (F.conv_transpose2d, (2, 3, 4, 4), (3, 4, 3, 3), 7),
    "depthwise": (lambda x, w: F.conv2d(x, w, groups=len(w)), (2, 4, 6, 6), (4, 1, 3, 3), 4),
    "depthwise, multiplied": (lambda x, w: F.conv2d(x, w, groups=x.shape[1]), (2, 4, 6, 6), (12, 1, 3, 3), 4),
    "grouped": (lambda x, w: F.conv2d(x, w, groups=2), (2, 4, 6, 6), (6, 2, 3, 3), 5),
    "layer norm over another axis": (lambda x, w: F.layer_norm(x, (5,), w, w), SMALL, (5,), 5),
    "group norm": (lambda x, w: F.group_norm(x, len(w), w), (2, 4, 3, 3), (4,), 4),
    "weight norm": (lambda v, g: torch._weight_norm(v, g, 0), (4, 3, 2), (4, 1, 1), 4),
    "distances": (torch.cdist, SMALL, (2, 4, 5), 7),
    "mean of squares": (F.mse_loss, SMALL, SMALL, 0),
}

OVER_THE_SECOND = {
    "sum": (lambda x: x.sum(1), 10),
    "all": (lambda x: x.sum(), 10),
    "mean": (lambda x: x.mean(1), 7),
    "variance": (lambda x: torch.var_mean(x, 1), 7),
    "norm": (lambda x: x.norm(dim=1), 7),
    "maximum": (lambda x: x.max(1, keepdim=True), 7),
    "argmax": (lambda x: x.argmax(1), 7),
    "kth": (lambda x: x.kthvalue(2, 1), 7),
    "median": (lambda x: x.median(1), 7),
    "logsumexp": (lambda x: x.logsumexp(1), 7),
    "cumulated": (lambda x: x.cumsum(1), 7),
    "softmax": (lambda x: x.softmax(1), 7),
    "sorted": (lambda x: x.sort(1), 7),
    "topk": (lambda x: x.topk(2, 1), 7),
    "quantile": (lambda x: x.quantile(0.5, 1), 7),
    "any": (lambda x: (x > 0.5).any(1), 7),
    "rolled": (lambda x: x.roll(1, 1), 7),
    "Fourier": (lambda x: torch.fft.rfft(x, dim=1).abs(), 7),
    "unbound": (lambda x: x.unbind(1), 7),
    "first": (lambda x: x[:, 0], 9),
    "by index": (lambda x: x[:, [0, 1]], 7),
    "by mask": (lambda x: x[:, torch.tensor([True, False, True])], 7),
    "gathered": (lambda x: x.gather(1, torch.tensor([[[0]], [[1]]]).expand(-1, -1, x.shape[2])), 5),
    "histogram": (lambda x: x.histc(4, 0, 1), 0),
    "triangle": (torch.tril, 2),
    "normalised": (lambda x: F.normalize(x, dim=1), 7),
}

MOVED = {
    "permuted": (lambda x: x.permute(2, 0, 1, 3), 16),
    "moved": (lambda x: x.movedim((1, 2), (0, 1)).swapaxes(0, 1).mT, 16),
    "squeezed": (lambda x: x.unsqueeze(1).squeeze(1)[:, None], 16),
    "expanded": (lambda x: x.unsqueeze(1).expand(-1, 3, -1, -1, -1), 16),
    "repeated": (lambda x: x.repeat(1, 2, 1, 1).repeat_interleave(2, 1), 16),
    "side by side": (lambda x: torch.cat([x, x], -3), 16),
    "stacked": (lambda x: torch.stack([x, x], -1), 16),
    "with zeros": (lambda x: torch.cat([x, x.new_zeros(*x.shape[:3], 2)], 3), 16),
    "chunks": (lambda x: x.chunk(2, 1), 14),
    "every second": (lambda x: x[:, 1::2], 14),
    "halves multiplied": (lambda x: F.glu(x, 1), 14),
    "shuffled": (lambda x: x.view(x.shape[0], 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape), 14),
    "channel shuffle": (lambda x: F.channel_shuffle(x, 2), 14),
    "flattened": (lambda x: x.flatten(1), 8),
    "flattened and back": (lambda x: x.flatten(1).view(x.shape), 16),
    "pixels apart": (lambda x: F.pixel_unshuffle(x, 2), 6),
    "diagonal": (lambda x: x.diagonal(dim1=1, dim2=2), 8),
    "windows": (lambda x: x.unfold(2, 2, 1), 12),
    "patches": (lambda x: F.unfold(x, 2), 6),
    "patches back": (lambda x: F.fold(F.unfold(x, 2), (4, 6), 2), 6),
    "to places": (lambda x: x.index_put((torch.tensor([0]),), x.new_ones(1)), 14),
    "added to places": (lambda x: torch.zeros_like(x).index_add(0, torch.tensor([0, 0]), x), 14),
    "filled places": (lambda x: x.index_fill(3, torch.tensor([0]), 5.0), 10),
    "scattered": (
        lambda x: x.new_zeros(x.shape).scatter_add(
            0, torch.tensor([0, 1])[:, None, None, None].expand(x.shape), x
        ),
        14,
    ),
    "pooled": (lambda x: F.max_pool2d(x, 2, return_indices=True), 6),
    "pooled to one": (lambda x: F.adaptive_avg_pool2d(x, 1), 6),
    "pooled, channels last": (
        lambda x: F.adaptive_avg_pool2d(x.contiguous(memory_format=torch.channels_last), 1),
        6,
    ),
    "unpooled": (lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), 6),
    "resized": (lambda x: F.interpolate(x, size=(7, 7), mode="bicubic"), 6),
    "padded": (lambda x: F.pad(x, (1, 1), value=2.0), 16),
    "padded in a circle": (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), 6),
    "sampled": (lambda x: F.grid_sample(x, x.new_zeros(2, 3, 3, 2), align_corners=False), 4),
    "boxes": (lambda x: torchvision.ops.roi_align(x, [x.new_tensor([[0, 0, 3, 3]])] * 2, 2), 4),
    "instance norm": (F.instance_norm, 6),
    "as strided": (lambda x: x.as_strided((2, 2), (1, 1)), 0),
    "embedded": (lambda x: F.embedding(torch.tensor([[0, 1], [1, 0]]), x.flatten(1)), 6),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_each_number_alone(name):
    assert assert_lawful(POINTWISE[name], [SMALL], False) == 10


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("name", WITH_ANOTHER)
def test_two_tensors(name, weights):
    function, first, second, count = WITH_ANOTHER[name]
    assert assert_lawful(function, [first, second], weights) == count


@pytest.mark.parametrize("name", OVER_THE_SECOND)
def test_what_goes_over_an_axis_keeps_it(name):
    function, count = OVER_THE_SECOND[name]
    assert assert_lawful(function, [SMALL], False) == count


@pytest.mark.parametrize("name", MOVED)
def test_what_moves_numbers(name):
    function, count = MOVED[name]
    assert assert_lawful(function, [IMAGE], False) == count
