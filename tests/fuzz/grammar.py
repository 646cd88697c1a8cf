"""A grammar of small networks: blocks that take any number of channels, and networks that are made of them.

A network is written down as a value, `Sketch(...)`, which prints as the call that makes it: one that fails
can be read, made smaller, and built again.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd

import torch
from hypothesis import strategies as st
from small_networks import Module, Parallel
from torch import Tensor, nn
from torch.nn import functional as F

SIZES = {1: (9,), 2: (7, 6), 3: (5, 5, 5)}
"""The images, by their number of dimensions."""

IMAGE_CHANNELS, CLASSES, WIDEST = 2, 3, 14
"""What comes in, what goes out, and the most channels that one block hands to the next."""

ACTIVATIONS = {
    "relu": nn.ReLU,
    "inplace": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "none": nn.Identity,
}

Built = tuple[nn.Module, int]
"""A module, and how many channels it hands on."""


class Block:
    """A part of a network."""

    def build(self, d: int, c: int) -> Built:
        """The module for images of d dimensions with c channels, whose size it keeps."""
        raise NotImplementedError


Blocks = tuple[Block, ...]


def of(d: int, kind: str) -> type[nn.Module]:
    """torch's module of this kind for images of d dimensions."""
    return getattr(nn, f"{kind}{d}d")


def conv(d: int, c: int, width: int, kernel: int = 1, **options) -> nn.Module:
    """A convolution that keeps the size."""
    return of(d, "Conv")(c, width, kernel, padding=kernel // 2, **options)


def chain(blocks: Iterable[Block], d: int, c: int) -> Built:
    """Blocks one behind the other; a convolution takes channels back where they have become many."""
    modules = []
    for block in blocks:
        module, c = block.build(d, c)
        modules.append(module)
        if c > WIDEST:
            modules.append(conv(d, c, c := 8))
    return nn.Sequential(*modules), c


def to_width(blocks: Blocks, d: int, c: int, width: int) -> nn.Module:
    """Blocks, and a convolution behind them where they do not come out at this width."""
    inner, found = chain(blocks, d, c)
    return inner if found == width else inner.append(conv(d, found, width))


def norm(kind: str, d: int, c: int) -> nn.Module:
    """A norm for c channels."""
    made = {
        "batch": lambda: of(d, "BatchNorm")(c),
        "untracked": lambda: of(d, "BatchNorm")(c, track_running_stats=False),
        "instance": lambda: of(d, "InstanceNorm")(c, affine=True),
        "group": lambda: nn.GroupNorm(gcd(c, 4), c),
        "layer": lambda: Module(
            lambda self, x: self.norm(x.movedim(1, -1)).movedim(-1, 1), norm=nn.LayerNorm(c)
        ),
        "none": nn.Identity,
    }
    return made[kind]()


@dataclass(frozen=True)
class Conv(Block):
    """A convolution, a norm, an activation."""

    width: int
    kernel: int = 3
    bias: bool = True
    norm: str = "none"
    activation: str = "relu"

    def build(self, d, c):
        first = conv(d, c, self.width, self.kernel, bias=self.bias)
        behind = norm(self.norm, d, self.width), ACTIVATIONS[self.activation]()
        return nn.Sequential(first, *behind), self.width


@dataclass(frozen=True)
class Grouped(Block):
    """A grouped convolution, transposed perhaps; depthwise where there are as many groups as channels."""

    groups: int
    each: int
    transposed: bool = False

    def build(self, d, c):
        groups = gcd(c, self.groups) if self.groups else c
        kind = of(d, "ConvTranspose" if self.transposed else "Conv")
        return kind(c, groups * self.each, 3, padding=1, groups=groups), groups * self.each


@dataclass(frozen=True)
class Upwards(Block):
    """A transposed convolution to twice the size, and a pooling back."""

    width: int
    pool: str

    def build(self, d, c):
        return nn.Sequential(
            of(d, "ConvTranspose")(c, self.width, 2, stride=2), of(d, self.pool)(2)
        ), self.width


@dataclass(frozen=True)
class Residual(Block):
    """x + f(x)."""

    inner: Blocks

    def build(self, d, c):
        return Module(lambda self, x: x + self.inner(x), inner=to_width(self.inner, d, c, c)), c


@dataclass(frozen=True)
class Concat(Block):
    """Branches side by side; an empty one hands on what it is given."""

    branches: tuple[Blocks, ...]

    def build(self, d, c):
        built = [chain(branch, d, c) for branch in self.branches]
        return Parallel([module for module, _ in built]), sum(width for _, width in built)


@dataclass(frozen=True)
class Joined(Block):
    """Two branches of one width that are added, multiplied, or of which the larger is taken."""

    how: str
    width: int
    branches: tuple[Blocks, Blocks]

    def build(self, d, c):
        a, b = (to_width(branch, d, c, self.width) for branch in self.branches)
        join = {
            "sum": lambda self, x: torch.stack([self.a(x), self.b(x)], 1).sum(1),
            "difference": lambda self, x: (self.a(x) - self.b(x)).abs(),
            "product": lambda self, x: self.a(x) * self.b(x),
            "max": lambda self, x: torch.maximum(self.a(x), self.b(x)),
        }[self.how]
        return Module(join, a=a, b=b), self.width


def halves(self: nn.Module, x: Tensor) -> Tensor:
    a, b = x.split([self.first, self.rest], 1)
    return torch.cat([self.inner(b), a] if self.swapped else [a, self.inner(b)], 1)


@dataclass(frozen=True)
class Split(Block):
    """The first channels pass by."""

    first: int
    swapped: bool
    inner: Blocks

    def build(self, d, c):
        first = min(self.first, c - 1)
        if not first:
            return chain(self.inner, d, c)
        inner, width = chain(self.inner, d, c - first)
        return Module(halves, first=first, rest=c - first, inner=inner, swapped=self.swapped), first + width


@dataclass(frozen=True)
class Chunks(Block):
    """A convolution's output in equal parts, which gate each other, are added, or lie in another order."""

    width: int
    parts: int
    how: str

    def build(self, d, c):
        parts, before = self.parts, conv(d, c, self.parts * self.width)
        how = {
            "gate": lambda self, x: torch.stack(self.before(x).chunk(parts, 1)).sigmoid().prod(0),
            "sum": lambda self, x: sum(self.before(x).chunk(parts, 1)),
            "turned": lambda self, x: torch.cat(self.before(x).chunk(parts, 1)[::-1], 1),
            "maxout": lambda self, x: self.before(x).unflatten(1, (parts, -1)).amax(1),
            "pieces": lambda self, x: self.before(x).unflatten(1, (-1, parts)).mean(2),
        }[self.how]
        return Module(how, before=before), self.width * (parts if self.how == "turned" else 1)


def shuffled(self: nn.Module, x: Tensor) -> Tensor:
    return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


@dataclass(frozen=True)
class Shuffle(Block):
    """Channels of groups, taken in turn."""

    groups: int
    module: bool

    def build(self, d, c):
        groups = gcd(c, self.groups)
        return nn.ChannelShuffle(groups) if self.module else Module(shuffled, groups=groups), c


@dataclass(frozen=True)
class SqueezeExcite(Block):
    """Channels weighed by what their means give."""

    hidden: int
    linear: bool

    def build(self, d, c):
        if self.linear:
            gate = nn.Sequential(
                *(of(d, "AdaptiveAvgPool")(1), nn.Flatten(), nn.Linear(c, self.hidden), nn.ReLU()),
                *(nn.Linear(self.hidden, c), nn.Sigmoid(), nn.Unflatten(1, (-1, *[1] * d))),
            )
        else:
            gate = nn.Sequential(
                *(of(d, "AdaptiveAvgPool")(1), conv(d, c, self.hidden), nn.ReLU()),
                *(conv(d, self.hidden, c), nn.Sigmoid()),
            )
        return Module(lambda self, x: x * self.gate(x), gate=gate), c


@dataclass(frozen=True)
class Pool(Block):
    """A pooling over what lies near."""

    kind: str

    def build(self, d, c):
        return of(d, self.kind)(3, stride=1, padding=1), c


@dataclass(frozen=True)
class Norm(Block):
    """A norm alone."""

    kind: str

    def build(self, d, c):
        return norm(self.kind, d, c), c


@dataclass(frozen=True)
class Scale(Block):
    """Numbers of each channel's own: slopes, or factors of the network's own."""

    slopes: bool

    def build(self, d, c):
        if self.slopes:
            return nn.PReLU(c), c
        factors = nn.Parameter(torch.randn(c, *[1] * d))
        return Module(lambda self, x: x * self.factors, factors=factors), c


@dataclass(frozen=True)
class Shared(Block):
    """One module used twice: behind itself, on two inputs, or its weight by another layer."""

    how: str
    inner: Blocks

    def build(self, d, c):
        inner = to_width(self.inner, d, c, c)
        if self.how == "weight":
            a, b = conv(d, c, c, 3, bias=False), conv(d, c, c, 3)
            b.weight = a.weight
            return nn.Sequential(a, inner, b), c
        how = {
            "twice": lambda self, x: self.inner(self.inner(x)),
            "siamese": lambda self, x: self.inner(x) - self.inner(x.flip(-1)),
            "side by side": lambda self, x: torch.cat([self.inner(x), self.inner(-x)], 1),
        }[self.how]
        return Module(how, inner=inner), 2 * c if self.how == "side by side" else c


def own_heads(self: nn.Module, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    if self.fused:
        y = F.scaled_dot_product_attention(q, k, v)
    else:
        y = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
    return self.out(y.transpose(1, 2).flatten(2)).transpose(1, 2).unflatten(2, x.shape[2:])


def torch_heads(self: nn.Module, x: Tensor) -> Tensor:
    tokens = self.before(x.flatten(2).transpose(1, 2))
    return self.attention(tokens, tokens, tokens)[0].transpose(1, 2).unflatten(2, x.shape[2:])


@dataclass(frozen=True)
class Attention(Block):
    """Places of the image as tokens; heads of one's own, or torch's."""

    how: str
    heads: int
    each: int

    def build(self, d, c):
        width = self.heads * self.each
        if self.how == "torch":
            attention = nn.MultiheadAttention(width, self.heads, batch_first=True)
            return Module(torch_heads, before=nn.Linear(c, width), attention=attention), width
        layers = {"qkv": nn.Linear(c, 3 * width), "out": nn.Linear(width, c)}
        numbers = {"heads": self.heads, "fused": self.how == "fused", "scale": self.each**-0.5}
        return Module(own_heads, **layers, **numbers), c


@dataclass(frozen=True)
class Mlp(Block):
    """Linear layers at each place, channels last."""

    hidden: int

    def build(self, d, c):
        inner = nn.Sequential(nn.Linear(c, self.hidden), nn.GELU(), nn.Linear(self.hidden, c))
        return Module(lambda self, x: self.inner(x.movedim(1, -1)).movedim(-1, 1), inner=inner), c


def along_last(self: nn.Module, x: Tensor) -> Tensor:
    means = x.flatten(2, -2).mean(2) if x.ndim > 3 else x
    y = self.layer(F.adaptive_avg_pool1d(means, 2).transpose(1, 2))[0].transpose(1, 2)
    y = F.interpolate(y, x.shape[-1]).unflatten(2, (*[1] * (x.ndim - 3), -1))
    return y.expand(-1, -1, *x.shape[2:])


@dataclass(frozen=True)
class Recurrent(Block):
    """A recurrent layer over two means along the last axis, given back to all that they are of.

    The plain one, which takes the fewest operations, goes both ways.
    """

    kind: str
    width: int

    def build(self, d, c):
        both = self.kind == "RNN"
        layer = getattr(nn, self.kind)(c, self.width, batch_first=True, bidirectional=both)
        return Module(along_last, layer=layer), self.width * (2 if both else 1)


@dataclass(frozen=True)
class Taken(Block):
    """Some of the channels, in some order, some of them twice."""

    how: str

    def build(self, d, c):
        how, width = {
            "every other": (lambda self, x: x[:, ::2], (c + 1) // 2),
            "all but one": (lambda self, x: x[:, 1:] if c > 1 else x, max(c - 1, 1)),
            "turned": (lambda self, x: x.flip(1), c),
            "rolled": (lambda self, x: x.roll(1, 1), c),
            "twice": (lambda self, x: torch.cat([x, x], 1), 2 * c),
            "repeated": (lambda self, x: x.repeat_interleave(2, 1), 2 * c),
            "padded": (lambda self, x: F.pad(x, [0] * 2 * d + [0, 2]), c + 2),
        }[self.how]
        return Module(how), width


@dataclass(frozen=True)
class Over(Block):
    """Something over all channels, which keeps them."""

    how: str

    def build(self, d, c):
        how = {
            "mean": lambda self, x: x - x.mean(1, keepdim=True),
            "max": lambda self, x: x * x.amax(1, keepdim=True).sigmoid(),
            "softmax": lambda self, x: x.softmax(1),
            "sort": lambda self, x: x.sort(1).values,
        }[self.how]
        return Module(how), c


class Outputs(nn.Module):
    """A trunk, and what it ends in: one output or several."""

    def __init__(self, kinds: tuple[str, ...], trunk: nn.Module, d: int, c: int):
        super().__init__()
        pooled = of(d, "AdaptiveAvgPool")
        made = {
            "pooled": lambda: [pooled(1), nn.Flatten(), nn.Linear(c, CLASSES)],
            "flattened": lambda: [pooled(2), nn.Flatten(), nn.Linear(c * 2**d, CLASSES)],
            "hidden": lambda: [*(pooled(1), nn.Flatten(), nn.Linear(c, 6), nn.ReLU(), nn.Linear(6, CLASSES))],
            "dense": lambda: [conv(d, c, CLASSES, 3)],
        }
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Sequential(*made[kind]()) for kind in kinds)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.trunk(x)
        return [head(x) for head in self.heads]


@dataclass(frozen=True)
class Sketch:
    """A network: images of d dimensions, blocks, then half the size, more blocks, and outputs."""

    d: int
    blocks: Blocks
    halved: str
    more: Blocks
    outputs: tuple[str, ...]
    seed: int = 0

    def build(self) -> nn.Module:
        """The network in float64, whose numbers are all different from each other."""
        torch.manual_seed(self.seed)
        trunk, c = chain(self.blocks, self.d, IMAGE_CHANNELS)
        if self.halved == "conv":
            trunk.append(of(self.d, "Conv")(c, c := 6, 3, stride=2, padding=1))
        elif self.halved != "none":
            trunk.append(of(self.d, self.halved)(2, ceil_mode=True))
        more, c = chain(self.more, self.d, c)
        network = Outputs(self.outputs, trunk.extend(more), self.d, c).double()
        with torch.no_grad():
            for tensor in (*network.parameters(), *network.buffers()):
                if tensor.ndim == 1:
                    tensor.uniform_(0.3, 1.2)
                elif tensor.ndim:  # torch draws in float32, where two may be equal
                    tensor.add_(torch.randn_like(tensor), alpha=1e-3)
        return network

    def inputs(self) -> Tensor:
        """Two random images."""
        return torch.randn(2, IMAGE_CHANNELS, *SIZES[self.d], dtype=torch.float64)

    @property
    def multiplies(self) -> bool:
        """Whether channels that nothing else reads are summed over in a product, as those of queries are."""
        return "Attention(" in repr(self)


def one_of(*values) -> st.SearchStrategy:
    return st.sampled_from(values)


WIDTHS, FEW, YES_OR_NO = st.integers(3, 8), st.integers(1, 4), st.booleans()
NORMS = one_of("none", "batch", "none", "batch", "untracked", "instance", "group", "layer")
POOLS = one_of("MaxPool", "AvgPool")

LEAVES = st.one_of(
    st.builds(Conv, WIDTHS, one_of(3, 1), YES_OR_NO, NORMS, st.sampled_from(list(ACTIVATIONS))),
    st.builds(Grouped, one_of(0, 2, 3, 4), FEW, YES_OR_NO),
    st.builds(Upwards, WIDTHS, POOLS),
    st.builds(Chunks, FEW, one_of(2, 3), one_of("gate", "sum", "turned", "maxout", "pieces")),
    st.builds(Shuffle, one_of(2, 3), YES_OR_NO),
    st.builds(SqueezeExcite, FEW, YES_OR_NO),
    st.builds(Pool, POOLS),
    st.builds(Norm, NORMS),
    st.builds(Scale, YES_OR_NO),
    st.builds(Attention, one_of("torch", "fused", "written out"), one_of(1, 2, 3), one_of(2, 4)),
    st.builds(Mlp, WIDTHS),
    st.builds(Recurrent, one_of("RNN", "GRU", "LSTM"), WIDTHS),
    st.builds(
        Taken,
        one_of("every other", "all but one", "turned", "rolled", "twice", "repeated", "padded"),
    ),
    st.builds(Over, one_of("mean", "max", "softmax", "sort")),
)
CONVS = st.builds(Conv, WIDTHS, one_of(3, 1), YES_OR_NO, NORMS, st.sampled_from(list(ACTIVATIONS)))


def made_of(blocks: st.SearchStrategy) -> st.SearchStrategy:
    """Blocks that have others in them."""
    inner = st.lists(blocks, min_size=1, max_size=2).map(tuple)
    perhaps = st.lists(blocks, max_size=2).map(tuple)
    return st.one_of(
        st.builds(Residual, inner),
        st.builds(Concat, st.lists(perhaps, min_size=2, max_size=3).map(tuple)),
        st.builds(Joined, one_of("sum", "difference", "product", "max"), WIDTHS, st.tuples(perhaps, inner)),
        st.builds(Split, FEW, YES_OR_NO, inner),
        st.builds(Shared, one_of("twice", "siamese", "side by side", "weight"), inner),
    )


BLOCKS = st.recursive(st.one_of(CONVS, LEAVES), made_of, max_leaves=3)


def sketches() -> st.SearchStrategy:
    """Networks of one to five blocks."""
    return st.builds(
        Sketch,
        one_of(2, 1, 3),
        st.builds(lambda first, more: (first, *more), CONVS, st.lists(BLOCKS, max_size=2)),
        one_of("none", "MaxPool", "AvgPool", "conv"),
        st.lists(BLOCKS, max_size=2).map(tuple),
        st.lists(one_of("pooled", "flattened", "hidden", "dense"), min_size=1, max_size=2).map(tuple),
        st.integers(0, 10**6),
    )
