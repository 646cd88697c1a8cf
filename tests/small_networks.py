"""Small networks of the kinds that people bring, each with the shapes of its inputs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Kind:
    """How a network is built, and what it is run on.

    build: makes one. inputs: the shapes of its arguments. macs: multiply-accumulates of one forward pass, and
    after ratio 0.5, counted by hand where that is short. exports: whether `torch.export` takes the network.
    rare: whether it is left to the slow tests.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    macs: tuple[int, int] | None = None
    exports: bool = True
    rare: bool = False


NETWORKS: dict[str, Kind] = {}


def network(*inputs: tuple[int, ...], **known) -> Callable:
    """Registers what builds a network, under its name."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        NETWORKS[build.__name__] = Kind(build, inputs, **known)
        return build

    return register


class Function(nn.Module):
    """A function as a module, such as a permutation."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class Module(nn.Module):
    """A module of these parts, whose forward is a function of it and of the inputs."""

    def __init__(self, how: Callable, **parts):
        super().__init__()
        self.how = how
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor):
        return self.how(self, *inputs)


class Parallel(nn.ModuleList):
    """Modules on one input, their outputs side by side."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self], 1)


def conv_bn(c_in: int, c_out: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()
    )


def head(channels: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


@network((4, 8), macs=(4 * (8 * 32 + 32 * 32 + 32 * 4), 4 * (8 * 16 + 16 * 16 + 16 * 4)))
def mlp():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))


@network((2, 3, 8), macs=(6 * (8 * 32 + 32 * 4), 6 * (8 * 16 + 16 * 4)))
def mlp_over_tokens():
    return nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 4))


@network((8,), macs=(8 * 32 + 32 * 4, 8 * 16 + 16 * 4))
def mlp_unbatched():
    return nn.Sequential(nn.Linear(8, 32), nn.PReLU(), nn.Linear(32, 4))


@network(
    (2, 1, 28, 28),
    macs=(
        2 * (6 * 25 * 24**2 + 16 * 6 * 25 * 8**2 + 256 * 120 + 120 * 84 + 84 * 10),
        2 * (3 * 25 * 24**2 + 8 * 3 * 25 * 8**2 + 128 * 60 + 60 * 42 + 42 * 10),
    ),
)
def lenet5():
    """LeCun et al. 1998: sigmoids, average pooling, no norm."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5), nn.Sigmoid(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Sigmoid(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(256, 120), nn.Sigmoid(), nn.Linear(120, 84), nn.Sigmoid(), nn.Linear(84, 10)),
    )


@network((2, 3, 32, 32))
def without_norm():
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ELU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.Softplus(), head(32)),
    )


@network(
    (2, 3, 64),
    macs=(
        2 * (16 * 3 * 5 * 64 + 32 * 16 * 3 * 32 + 32 * 4),
        2 * (8 * 3 * 5 * 64 + 16 * 8 * 3 * 32 + 16 * 4),
    ),
)
def conv1d():
    return nn.Sequential(
        *(nn.Conv1d(3, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(16, 32, 3, padding=1), nn.BatchNorm1d(32), nn.ReLU(), nn.AdaptiveAvgPool1d(1)),
        *(nn.Flatten(), nn.Linear(32, 4)),
    )


@network((2, 3, 64))
def pools_1d():
    """Every 1-d pooling, padding and upsampling that hands channels on."""
    return nn.Sequential(
        *(nn.ReflectionPad1d(2), nn.Conv1d(3, 16, 5), nn.ReLU(), nn.AvgPool1d(2)),
        *(nn.ConstantPad1d(1, 0.5), nn.Conv1d(16, 16, 3), nn.ReLU(), nn.LPPool1d(2, 2)),
        *(nn.ReplicationPad1d(1), nn.Conv1d(16, 16, 3), nn.ReLU(), nn.Upsample(scale_factor=2)),
        *(nn.CircularPad1d(1), nn.Conv1d(16, 16, 3), nn.ReLU(), nn.AdaptiveMaxPool1d(2)),
        *(nn.Flatten(), nn.Linear(32, 4)),
    )


@network((2, 2, 8, 16, 16))
def conv3d():
    return nn.Sequential(
        *(nn.Conv3d(2, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d(2)),
        *(nn.ReplicationPad3d(1), nn.Conv3d(16, 16, 3), nn.InstanceNorm3d(16, affine=True), nn.ReLU()),
        *(nn.AvgPool3d(2), nn.Upsample(scale_factor=2, mode="trilinear")),
        *(nn.Conv3d(16, 32, (3, 1, 1)), nn.ReLU(), nn.AdaptiveAvgPool3d((1, 2, 2))),
        *(nn.Flatten(), nn.Linear(128, 4)),
    )


@network((2, 3, 16, 16))
def resized():
    """Padding, upsampling and pooling of images, of many kinds."""
    return nn.Sequential(
        *(nn.ReflectionPad2d(1), nn.Conv2d(3, 16, 3), nn.ReLU(), nn.UpsamplingBilinear2d(scale_factor=2)),
        *(nn.ZeroPad2d((1, 1, 0, 2)), nn.Conv2d(16, 16, 3), nn.Tanh(), nn.AdaptiveMaxPool2d(8)),
        *(nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.LPPool2d(2, 2)),
        *(nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.UpsamplingNearest2d((6, 5))),
        *(nn.Conv2d(16, 16, 3, padding="same"), nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True)),
        *(nn.Upsample(size=(5, 7), mode="bicubic"), nn.Conv2d(16, 16, 1), nn.ReLU(), head(16)),
    )


@network((2, 16, 16, 3))
def channels_at_the_end():
    """Images as [batch, height, width, channels], permuted to convolutions and back to linear layers."""
    return nn.Sequential(
        *(Function(lambda x: x.permute(0, 3, 1, 2)), conv_bn(3, 16)),
        *(Function(lambda x: x.permute(0, 2, 3, 1)), nn.Linear(16, 32), nn.ReLU()),
        *(Function(lambda x: x.movedim(-1, 1)), nn.Conv2d(32, 16, 3), nn.ReLU()),
        *(Function(lambda x: x.flatten(2).transpose(1, 2).mean(1)), nn.Linear(16, 5)),
    )


@network((2, 3, 32, 32))
def flattened():
    """A classifier that reads every place of every channel, as in VGG."""
    return nn.Sequential(
        *(conv_bn(3, 8), nn.MaxPool2d(4), conv_bn(8, 16), nn.MaxPool2d(4)),
        *(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5)),
    )


@network((2, 3, 32, 32))
def frozen_batch_norm():
    """As torchvision's detectors have: four buffers and plain arithmetic."""
    from torchvision.ops import FrozenBatchNorm2d

    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, bias=False), FrozenBatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, bias=False), FrozenBatchNorm2d(16), nn.ReLU(), head(16)),
    )
    for buffer in model.buffers():
        buffer.uniform_(0.5, 1.5)
    return model


class UNet(nn.Module):
    """Ronneberger et al. 2015: skips by concatenation, transposed convolutions upwards."""

    def __init__(self, norm: Callable[[int], nn.Module], widths: tuple[int, ...] = (8, 16, 32)):
        super().__init__()

        def double(c_in: int, c_out: int) -> nn.Sequential:
            return nn.Sequential(
                *(nn.Conv2d(c_in, c_out, 3, padding=1), norm(c_out), nn.ReLU(inplace=True)),
                *(nn.Conv2d(c_out, c_out, 3, padding=1), norm(c_out), nn.ReLU(inplace=True)),
            )

        self.down = nn.ModuleList(map(double, (3, *widths), widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in widths[-2::-1])
        self.joined = nn.ModuleList(double(2 * w, w) for w in widths[-2::-1])
        self.last = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for up, block, skip in zip(self.up, self.joined, skips[-2::-1], strict=True):
            x = block(torch.cat([skip, up(x)], 1))
        return self.last(x)


@network((2, 3, 16, 16))
def unet_batch():
    return UNet(nn.BatchNorm2d)


@network((2, 3, 16, 16))
def unet_instance():
    return UNet(lambda channels: nn.InstanceNorm2d(channels, affine=True))


@network((2, 3, 16, 16))
def unet_group():
    """Groups of two channels: they go whole."""
    return UNet(lambda channels: nn.GroupNorm(channels // 2, channels))


class C2f(nn.Module):
    """YOLOv8's block: halves of one convolution, a chain of bottlenecks on the second, all side by side."""

    def __init__(self, c_in: int, c_out: int, depth: int = 2, shortcut: bool = True):
        super().__init__()
        hidden = c_out // 2
        self.before = conv_bn(c_in, 2 * hidden, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv_bn(hidden, hidden), conv_bn(hidden, hidden)) for _ in range(depth)
        )
        self.after = conv_bn((2 + depth) * hidden, c_out, 1)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.before(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]) + parts[-1] if self.shortcut else block(parts[-1]))
        return self.after(torch.cat(parts, 1))


class SPPF(nn.Module):
    """YOLOv5's pyramid: the same pooling three times over, side by side."""

    def __init__(self, channels: int):
        super().__init__()
        self.before, self.after = conv_bn(channels, channels // 2, 1), conv_bn(2 * channels, channels, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.before(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.after(torch.cat(parts, 1))


class Yolo(nn.Module):
    """A backbone, a path up and down, and heads for boxes and classes at each scale, as YOLOv8 has them."""

    def __init__(self, classes: int = 3, bins: int = 4):
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2)
        self.p3 = nn.Sequential(conv_bn(8, 16, stride=2), C2f(16, 16))
        self.p4 = nn.Sequential(conv_bn(16, 32, stride=2), C2f(32, 32), SPPF(32))
        self.up = C2f(48, 16, shortcut=False)
        self.down, self.joined = conv_bn(16, 16, stride=2), C2f(48, 32, shortcut=False)
        self.boxes, self.classes = (
            nn.ModuleList(nn.Sequential(conv_bn(c, 16), nn.Conv2d(16, outputs, 1)) for c in (16, 32))
            for outputs in (4 * bins, classes)
        )
        self.bins = bins

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p3 = self.up(torch.cat([F.interpolate(p4, scale_factor=2.0), p3], 1))
        scales = p3, self.joined(torch.cat([self.down(p3), p4], 1))
        boxes, scores = (
            torch.cat([head(scale).flatten(2) for head, scale in zip(heads, scales, strict=True)], 2)
            for heads in (self.boxes, self.classes)
        )
        bins = boxes.unflatten(1, (4, self.bins)).softmax(2)
        distances = (bins * torch.arange(self.bins, device=x.device).view(1, 1, -1, 1)).sum(2)
        return distances, scores.sigmoid()


@network((2, 3, 32, 32))
def yolo():
    return Yolo()


class Siamese(nn.Module):
    """One trunk on two inputs; what they have apart is read."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(conv_bn(3, 16), conv_bn(16, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.verdict = nn.Linear(32, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.verdict((self.trunk(a) - self.trunk(b)).abs())


@network((2, 3, 16, 16), (2, 3, 16, 16))
def siamese():
    return Siamese()


class SharedHead(nn.Module):
    """RetinaNet in small: lateral convolutions to one width, summed from above, one head for all scales."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(conv_bn(a, b, stride=2) for a, b in ((3, 8), (8, 16), (16, 32)))
        self.lateral = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in (8, 16, 32))
        self.head = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 6, 3, padding=1))

    def forward(self, x: Tensor) -> list[Tensor]:
        scales = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            scales.append(lateral(x))
        for i in (1, 0):
            scales[i] = scales[i] + F.interpolate(scales[i + 1], size=scales[i].shape[-2:])
        return [self.head(scale) for scale in scales]


@network((2, 3, 32, 32))
def shared_head():
    return SharedHead()


class Crnn(nn.Module):
    """Shi et al. 2015: columns of a feature map as a sequence for a recurrent layer."""

    def __init__(self, recurrent: type[nn.RNNBase], **options):
        super().__init__()
        self.trunk = nn.Sequential(conv_bn(1, 8), nn.MaxPool2d(2), conv_bn(8, 16), nn.MaxPool2d((2, 1)))
        self.recurrent = recurrent(16 * 4, 12, **options)
        self.letters = nn.Linear(self.recurrent.hidden_size * (2 if self.recurrent.bidirectional else 1), 7)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.trunk(x).flatten(1, 2)  # [batch, channels · height, width]
        columns = columns.transpose(1, 2) if self.recurrent.batch_first else columns.permute(2, 0, 1)
        return self.letters(self.recurrent(columns)[0]).log_softmax(-1)


@network((2, 1, 16, 16))
def crnn_lstm():
    return Crnn(nn.LSTM, batch_first=True, bidirectional=True, num_layers=2)


@network((2, 1, 16, 16))
def crnn_gru():
    return Crnn(nn.GRU, bidirectional=True)


@network((2, 1, 16, 16))
def crnn_rnn():
    return Crnn(nn.RNN, batch_first=True, nonlinearity="relu", num_layers=2)


@network((2, 3, 8, 8))
def pixel_shuffle():
    """Shi et al. 2016: super-resolution; the four channels of each place go together."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 32, 3, padding=1), nn.PixelShuffle(2)),
        *(nn.PReLU(8), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.PixelUnshuffle(2), nn.Conv2d(64, 3, 1)),
    )


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        self.fc1, self.fc2 = (
            nn.Conv2d(channels, channels // reduction, 1),
            nn.Conv2d(channels // reduction, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


@network((2, 3, 16, 16))
def squeeze_excite():
    return nn.Sequential(conv_bn(3, 16), SqueezeExcite(16), conv_bn(16, 32), SqueezeExcite(32), head(32))


class Cbam(nn.Module):
    """Woo et al. 2018. The gate over space takes the maximum and the mean over channels, which keeps them."""

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(channels, channels // reduction), nn.ReLU(), nn.Linear(channels // reduction, channels)
        )
        self.place = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * (self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3)))).sigmoid()[:, :, None, None]
        return x * self.place(torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], 1)).sigmoid()


@network((2, 3, 16, 16))
def cbam():
    return nn.Sequential(conv_bn(3, 16), conv_bn(16, 32), Cbam(32), conv_bn(32, 16), head(16))


class CoordAtt(nn.Module):
    """Hou et al. 2021: means along rows and columns, side by side, split again."""

    def __init__(self, channels: int, reduction: int = 2):
        super().__init__()
        self.both = conv_bn(channels, channels // reduction, 1)
        self.rows, self.columns = (nn.Conv2d(channels // reduction, channels, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        means = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).permute(0, 1, 3, 2)], 2)
        rows, columns = self.both(means).split([height, width], 2)
        return x * self.rows(rows).sigmoid() * self.columns(columns.permute(0, 1, 3, 2)).sigmoid()


@network((2, 3, 16, 12))
def coord_att():
    return nn.Sequential(conv_bn(3, 16), CoordAtt(16), conv_bn(16, 32), CoordAtt(32), head(32))


@network((2, 3, 16, 16))
def grouped():
    """A grouped convolution between dense ones: the same channel of each group, or whole groups."""
    return nn.Sequential(conv_bn(3, 16), conv_bn(16, 32, groups=4), conv_bn(32, 16, 1), head(16))


@network((2, 3, 16, 16))
def transposed_grouped():
    return nn.Sequential(
        *(conv_bn(3, 16), nn.ConvTranspose2d(16, 32, 2, stride=2, groups=4), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.ConvTranspose2d(32, 32, 3, padding=1, groups=32), nn.ReLU()),
        *(nn.ConvTranspose2d(32, 8, 3), nn.ReLU(), head(8)),
    )


@network((2, 3, 16, 16))
def depthwise():
    return nn.Sequential(conv_bn(3, 16), conv_bn(16, 16, groups=16), conv_bn(16, 32, 1), head(32))


@network((2, 3, 16, 16))
def depthwise_multiplied():
    """Three channels from each, by a filter of its own each."""
    return nn.Sequential(conv_bn(3, 16), conv_bn(16, 48, groups=16), conv_bn(48, 32, 1), head(32))


def shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width).transpose(1, 2)
    return x.reshape(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """Ma et al. 2018: half of the channels are convolved, then both halves are shuffled."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1), nn.Conv2d(half, half, 3, padding=1, groups=half), conv_bn(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return shuffle(torch.cat([a, self.branch(b)], 1), 2)


@network((2, 3, 16, 16))
def channel_shuffle():
    return nn.Sequential(conv_bn(3, 16), ShuffleUnit(16), ShuffleUnit(16), conv_bn(16, 32, 1), head(32))


@network((2, 3, 16, 16))
def channel_shuffle_module():
    return nn.Sequential(
        *(conv_bn(3, 16), conv_bn(16, 32, 1, groups=2), nn.ChannelShuffle(2)),
        *(conv_bn(32, 32, groups=2), head(32)),
    )


class Residual(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


@network((2, 3, 16, 16))
def dense_and_residual():
    return nn.Sequential(
        *(conv_bn(3, 16), Residual(conv_bn(16, 16)), Parallel([nn.Identity(), conv_bn(16, 8)])),
        *(Residual(nn.Sequential(conv_bn(24, 8, 1), nn.Conv2d(8, 24, 3, padding=1))), head(24)),
    )


@network((2, 5, 16))
def encoder_layer():
    """The stream goes through layer norms, which keep it; the MLP and the heads can go."""
    return nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)


@network((5, 2, 16))
def encoder_layer_norm_first():
    return nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, activation="gelu", norm_first=True)


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` with keys and values of other widths."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, kdim=12, vdim=8, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(query, key, value)[0]


@network((2, 5, 16), (2, 7, 12), (2, 7, 8))
def cross_attention():
    return CrossAttention()


def causal(self: nn.Module, x: Tensor) -> Tensor:
    mask = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
    return self.last(self.attention(x, x, x, need_weights=False, attn_mask=mask)[0])


@network((5, 2, 16), rare=True)
def attention_with_more_keys():
    """A learned key and one of zeros beside those of the sequence."""
    attention = nn.MultiheadAttention(16, 4, add_bias_kv=True, add_zero_attn=True)
    return Module(causal, attention=attention, last=nn.Linear(16, 3))


class OwnHeads(nn.Module):
    """Attention of one's own: one layer for queries, keys and values, heads by a view."""

    def __init__(self, width: int, heads: int, fused: bool = True):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.width, self.fused = heads, width // heads, fused

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = (q @ k.transpose(-2, -1) * self.width**-0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


def transformer_block(attention: nn.Module, width: int) -> nn.Sequential:
    mlp = nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
    )
    return nn.Sequential(Residual(nn.Sequential(nn.LayerNorm(width), attention)), Residual(mlp))


@network((2, 5, 16))
def own_heads_fused():
    return transformer_block(OwnHeads(16, 4), 16)


class BiasedHeads(OwnHeads):
    """A learned bias for each head and pair of places, as Swin and MaxViT have it."""

    def __init__(self, width: int, heads: int, places: int):
        super().__init__(width, heads)
        self.bias = nn.Parameter(torch.randn(heads, places, places))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, self.bias).transpose(1, 2).flatten(2))


@network((2, 5, 32))
def own_heads_with_bias():
    """Fewer heads than channels in each, of which the scale is made: heads go."""
    return transformer_block(BiasedHeads(32, 4, 5), 32)


@network((2, 5, 16))
def own_heads_written_out():
    return transformer_block(OwnHeads(16, 4, fused=False), 16)


class QuantisedConv(nn.Conv2d):
    """LSQ (Esser et al. 2020) in small: a learned step, a histogram with as many bins as filters."""

    def __init__(self, *args, bins: int = 64, **kwargs):
        super().__init__(*args, **kwargs)
        self.step = nn.Parameter(torch.full((1,), 0.05))
        self.register_buffer("histogram", torch.zeros(bins))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.histogram += torch.histc(x.detach().float(), len(self.histogram), -3.0, 3.0)
        scaled = self.weight / self.step
        rounded = scaled + (scaled.round() - scaled).detach()
        return F.conv2d(x, rounded * self.step, self.bias, self.stride, self.padding)


@network((2, 3, 16, 16))
def quantised_conv():
    return nn.Sequential(
        *(QuantisedConv(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
        *(QuantisedConv(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), head(64)),
    )


class ScaledConv(nn.Conv2d):
    """A gain for each filter, of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.gain, self.bias)


@network((2, 3, 16, 16))
def scaled_conv():
    return nn.Sequential(ScaledConv(3, 16, 3), nn.ReLU(), ScaledConv(16, 16, 3), nn.ReLU(), head(16))


@network((2, 3, 16, 16))
def weight_norm():
    """g · v / ‖v‖ a filter: the norm reaches over the columns, so what such a layer reads stays."""
    normed = parametrizations.weight_norm
    return nn.Sequential(
        *(normed(nn.Conv2d(3, 16, 3)), nn.ReLU(), normed(nn.Conv2d(16, 16, 3)), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3), nn.ReLU(), head(16)),
    )


class Functional(nn.Module):
    """Weights as plain parameters, for `F.conv2d` and `@`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 3, 3, 3) * 0.3)
        self.shift = nn.Parameter(torch.randn(16, 1, 1) * 0.3)
        self.kernels = nn.ParameterList([torch.randn(16, 16, 3, 3) * 0.1 for _ in range(2)])
        self.last = nn.Parameter(torch.randn(16, 5) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.weight) + self.shift)
        for kernel in self.kernels:
            x = F.conv2d(x, kernel, padding=1).clamp_min_(0)
        return torch.einsum("bchw,ck->bk", x, self.last)


@network((2, 3, 16, 16))
def functional():
    return Functional()


@dataclass
class Detection:
    boxes: Tensor
    scores: Tensor


class Returns(nn.Module):
    """A trunk, and an output of the structure that `wrap` makes of features and scores."""

    def __init__(self, wrap: Callable, scores: nn.Module | None = None):
        super().__init__()
        self.trunk = nn.Sequential(conv_bn(3, 16), conv_bn(16, 16))
        self.head = scores or head(16)
        self.wrap = wrap

    def forward(self, x: Tensor):
        x = self.trunk(x)
        return self.wrap(x, self.head(x))


@network((2, 3, 16, 16))
def returns_dict():
    return Returns(lambda x, scores: {"scores": scores, "parts": (scores.sum(), [scores])})


@network((2, 3, 16, 16), exports=False)
def returns_dataclass():
    return Returns(lambda x, scores: (scores, Detection(x, scores)))


@network((2, 3, 16, 16))
def returns_complex():
    return Returns(lambda x, scores: torch.complex(scores, scores.sin()))


@network((2, 3, 16, 16))
def returns_argmax():
    return Returns(lambda x, scores: scores.argmax(1), nn.Conv2d(16, 5, 1))


class Wrapped(nn.Module):
    """Convolutions of which the inner ones are run by `how`."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.first, self.inner, self.head = conv_bn(3, 16), conv_bn(16, 16), head(16)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.how(self.inner, self.first(x)))


@network((2, 3, 16, 16))
def no_grad_inside():
    """A trunk that is kept as it is, as in transfer learning."""
    return Wrapped(torch.no_grad()(lambda inner, x: inner(x)))


@network((2, 3, 16, 16))
def checkpoint_reentrant():
    return Wrapped(lambda inner, x: checkpoint(inner, x, use_reentrant=True))


@network((2, 3, 16, 16))
def checkpoint_not_reentrant():
    return Wrapped(lambda inner, x: checkpoint(inner, x, use_reentrant=False))


@network((2, 3, 16, 16))
def compiled_inside():
    model = Wrapped(lambda inner, x: inner(x))
    model.inner = torch.compile(model.inner, backend="eager")
    return model


@network((2, 3, 16, 16), exports=False)
def scripted_inside():
    """What is scripted keeps its channels, inside and at its borders; the others go."""
    model = Wrapped(lambda inner, x: inner(x))
    model.first = nn.Sequential(conv_bn(3, 16), conv_bn(16, 16))
    model.inner = torch.jit.script(model.inner)
    return model


def llama_attention(self: Module, x: Tensor) -> Tensor:
    """Fewer keys than queries, turned by their places: halves of a head's channels are coordinates."""
    batch, length, _ = x.shape
    q, k, v = (f(x).unflatten(2, (-1, self.width)).transpose(1, 2) for f in (self.q, self.k, self.v))
    angles = torch.arange(length, device=x.device, dtype=x.dtype)[:, None] * self.frequencies
    cos, sin = (torch.cat([f(angles), f(angles)], 1) for f in (torch.cos, torch.sin))
    q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin for y in (q, k))
    k, v = (y.repeat_interleave(self.shared, 1) for y in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return self.out(y.transpose(1, 2).reshape(batch, length, -1))


@network((2, 6, 16), rare=True)
def llama_block():
    """Grouped queries, rotary embedding, RMS norm, SwiGLU."""
    attention = Module(
        llama_attention,
        **{name: nn.Linear(16, n, bias=False) for name, n in (("q", 16), ("k", 8), ("v", 8), ("out", 16))},
        width=4,
        shared=2,
        frequencies=nn.Buffer(torch.tensor([1.0, 0.1])),
    )
    mlp = Module(
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
        gate=nn.Linear(16, 32, bias=False),
        up=nn.Linear(16, 32, bias=False),
        down=nn.Linear(32, 16, bias=False),
    )
    return nn.Sequential(*(Residual(nn.Sequential(nn.RMSNorm(16), part)) for part in (attention, mlp)))


def convolve_by_gate(self: Module, x: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    kernel = torch.einsum("bk,koiyx->boiyx", self.gate(x.mean((2, 3))).softmax(1), self.kernels)
    y = F.conv2d(x.reshape(1, -1, height, width), kernel.flatten(0, 1), padding=1, groups=batch)
    return y.view(batch, -1, height, width)


@network((2, 3, 12, 12), rare=True)
def dynamic_convolution():
    """Chen et al. 2020: kernels mixed anew for each image."""
    return nn.Sequential(
        conv_bn(3, 16),
        Module(
            convolve_by_gate, gate=nn.Linear(16, 4), kernels=nn.Parameter(torch.randn(4, 16, 16, 3, 3) * 0.1)
        ),
        *(nn.BatchNorm2d(16), nn.ReLU(), head(16)),
    )


def in_a_chain(self: Module, x: Tensor) -> Tensor:
    first, *parts = self.before(x).split(self.width, 1)
    done = [first]
    for convolution, part in zip(self.chain, parts, strict=True):
        done.append(convolution(part + done[-1]))
    return x + self.after(torch.cat(done, 1))


@network((2, 3, 12, 12), rare=True)
def res2net():
    """Gao et al. 2019: split at a number that the module has written down."""
    block = Module(
        in_a_chain,
        before=conv_bn(32, 32, 1),
        chain=nn.ModuleList(conv_bn(8, 8) for _ in range(3)),
        after=conv_bn(32, 32, 1),
        width=8,
    )
    return nn.Sequential(conv_bn(3, 32), block, head(32))


def gated(self: Module, x: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(x, (self.dilation, 0))
    y = torch.tanh(self.filter(padded)) * torch.sigmoid(self.gate(padded))
    return x + self.out(y), self.skip(y)


def with_skips(self: Module, x: Tensor) -> Tensor:
    x, total = self.first(x), 0
    for block in self.blocks:
        x, skip = block(x)
        total = total + skip
    return self.last(F.relu(total)).mean(2)


@network((2, 3, 32), rare=True)
def wavenet():
    blocks = (
        Module(
            gated,
            filter=nn.Conv1d(16, 16, 2, dilation=d),
            gate=nn.Conv1d(16, 16, 2, dilation=d),
            out=nn.Conv1d(16, 16, 1),
            skip=nn.Conv1d(16, 16, 1),
            dilation=d,
        )
        for d in (1, 2)
    )
    return Module(
        with_skips, first=nn.Conv1d(3, 16, 1), blocks=nn.ModuleList(blocks), last=nn.Conv1d(16, 5, 1)
    )


def turned(self: Module, x: Tensor) -> Tensor:
    size = x.shape[1]
    return torch.bmm(self.net(x).unflatten(1, (size, size)), x)


@network((2, 3, 32), rare=True)
def pointnet():
    """Qi et al. 2017: points turned by a matrix that is computed, their maximum taken."""
    turn = nn.Sequential(
        nn.Conv1d(3, 16, 1), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(16, 9)
    )
    return nn.Sequential(
        *(Module(turned, net=turn), nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1)),
        *(Function(lambda x: x.max(2).values), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)),
    )


@network((2, 3, 12, 12), rare=True)
def gate_expanded():
    """One gate for all channels of a place, expanded to them; Oktay et al. 2018."""
    gate = Module(lambda m, x: x * m.gate(x).sigmoid().expand_as(x), gate=nn.Conv2d(16, 1, 1))
    return nn.Sequential(conv_bn(3, 16), gate, conv_bn(16, 16), head(16))


def unpooled(self: Module, x: Tensor) -> Tensor:
    small, places = F.max_pool2d(self.first(x), 2, return_indices=True)
    return self.last(F.max_unpool2d(self.inner(small), places, 2))


@network((2, 3, 12, 12), rare=True)
def segnet():
    """Badrinarayanan et al. 2017: back to where the maxima were, so in the same channels."""
    return Module(unpooled, first=conv_bn(3, 16), inner=conv_bn(16, 16), last=nn.Conv2d(16, 2, 1))


def selected(self: Module, x: Tensor) -> Tensor:
    branches = torch.stack([branch(x) for branch in self.branches], 1)
    squeezed = F.relu(self.squeeze(branches.sum(1).mean((2, 3))))
    weights = torch.stack([excite(squeezed) for excite in self.excite], 1).softmax(1)
    return (branches * weights[..., None, None]).sum(1)


@network((2, 3, 12, 12), rare=True)
def selective_kernel():
    """Li et al. 2019."""
    block = Module(
        selected,
        branches=nn.ModuleList([conv_bn(16, 16), conv_bn(16, 16, 5)]),
        squeeze=nn.Linear(16, 8),
        excite=nn.ModuleList(nn.Linear(8, 16) for _ in range(2)),
    )
    return nn.Sequential(conv_bn(3, 16), block, head(16))


def low_rank(c_in: int, c_out: int, rank: int = 4) -> Module:
    return Module(
        lambda m, x: F.linear(x, m.linear.weight + m.b @ m.a, m.linear.bias),
        linear=nn.Linear(c_in, c_out),
        a=nn.Parameter(torch.randn(rank, c_in) * 0.1),
        b=nn.Parameter(torch.randn(c_out, rank) * 0.1),
    )


@network((4, 8), rare=True)
def low_rank_adapters():
    """Hu et al. 2021, merged: a weight that is the sum of one and of a product of two."""
    return nn.Sequential(low_rank(8, 32), nn.ReLU(), low_rank(32, 4))


@network((4, 12), rare=True)
def tied_autoencoder():
    """One weight writes the code by its rows, and reads it by them."""
    return Module(
        lambda m, x: F.relu(F.linear(x, m.weight, m.bias)) @ m.weight,
        weight=nn.Parameter(torch.randn(32, 12) * 0.3),
        bias=nn.Parameter(torch.randn(32) * 0.3),
    )


def mixed(self: Module, x: Tensor) -> Tensor:
    y = torch.einsum("beo,eok->bek", torch.einsum("bi,eio->beo", x, self.up).relu(), self.down)
    return torch.einsum("be,bek->bk", self.gate(x).softmax(1), y)


@network((4, 8), rare=True)
def experts():
    """All experts in two parameters; their hidden channels go in step."""
    return Module(
        mixed,
        up=nn.Parameter(torch.randn(3, 8, 16)),
        down=nn.Parameter(torch.randn(3, 16, 4)),
        gate=nn.Linear(8, 3),
    )


def in_frequencies(self: Module, x: Tensor) -> Tensor:
    low = torch.fft.rfft2(x)[:, :, : self.modes, : self.modes]
    return torch.fft.irfft2(torch.einsum("bixy,ioxy->boxy", low, self.weight), s=x.shape[2:])


@network((2, 3, 12, 12), rare=True)
def fourier_operator():
    """Li et al. 2020: a complex weight."""
    weight = nn.Parameter(torch.randn(16, 16, 4, 4, dtype=torch.cfloat) * 0.1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), Module(in_frequencies, weight=weight, modes=4), nn.GELU(), nn.Conv2d(16, 1, 1)
    )


def passed(self: Module, x: Tensor) -> Tensor:
    senders, receivers = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 0, 2])
    x = F.relu(self.first(x))
    x = F.relu(self.second(torch.zeros_like(x).index_add(0, receivers, x[senders])))
    index = receivers[:, None].expand(-1, x.shape[1])
    return self.last(x.new_zeros(x.shape).scatter_add(0, index, x[senders]))


@network((5, 8), rare=True)
def graph_convolution():
    """Messages along edges, by `index_add` and by `scatter_add`."""
    return Module(passed, first=nn.Linear(8, 16), second=nn.Linear(16, 16), last=nn.Linear(16, 3))


@network((2, 3, 12, 12), rare=True)
def deformable():
    """Dai et al. 2017: offsets are computed, and stay."""
    from torchvision.ops import DeformConv2d

    inner = Module(
        lambda m, x: m.convolution(x, m.offsets(x)),
        convolution=DeformConv2d(16, 16, 3, padding=1),
        offsets=nn.Conv2d(16, 18, 3, padding=1),
    )
    return nn.Sequential(conv_bn(3, 16), inner, nn.ReLU(), head(16))


def packed(self: Module, x: Tensor) -> Tensor:
    sequences = nn.utils.rnn.pack_padded_sequence(
        F.relu(self.first(x)), torch.tensor([6, 4]), batch_first=True
    )
    y, _ = nn.utils.rnn.pad_packed_sequence(self.recurrent(sequences)[0], batch_first=True)
    return self.last(F.relu(self.middle(y)))


@network((2, 6, 8), rare=True, exports=False)
def packed_lstm():
    return Module(
        packed,
        first=nn.Linear(8, 16),
        recurrent=nn.LSTM(16, 12, batch_first=True),
        middle=nn.Linear(12, 16),
        last=nn.Linear(16, 4),
    )


@network((2, 3, 12, 12), rare=True)
def space_to_depth():
    """YOLOv5's focus: every second place of each axis, side by side."""
    corners = [(i, j) for i in (0, 1) for j in (0, 1)]
    focus = Function(lambda x: torch.cat([x[..., i::2, j::2] for i, j in corners], 1))
    return nn.Sequential(conv_bn(3, 8), focus, conv_bn(32, 16), head(16))


@network((2, 3, 12, 12), rare=True)
def halves_by_slices():
    """Cut in two by slices, at a number that is read off the shape."""
    halves = Module(
        lambda m, x: torch.cat([m.left(x[:, : x.shape[1] // 2]), x[:, x.shape[1] // 2 :]], 1),
        left=conv_bn(8, 8),
    )
    return nn.Sequential(conv_bn(3, 16), halves, head(16))
