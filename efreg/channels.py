"""Which channels go together: the adapter around Torch-Pruning's dependency graph.

Torch-Pruning is asked for indices only, of a copy; what they are removed from is `efreg.surgery`'s affair.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from efreg.resizing import CONVOLUTIONS
from efreg.tracing import forward, tensors, twin, twin_inputs

READERS = (*CONVOLUTIONS, nn.Linear)
"""The layers that may read the output of a pruned one."""

CHANNELWISE = {
    "AdaptiveAvgPool2DBackward",
    "AdaptiveMaxPool2DBackward",
    "AvgPool2DBackward",
    "AvgPool3DBackward",
    "CloneBackward",
    "EluBackward",
    "GeluBackward",
    "HardswishBackward",
    "HardtanhBackward",
    "LeakyReluBackward",
    "MaxPool2DWithIndicesBackward",
    "MaxPool3DWithIndicesBackward",
    "MeanBackward",
    "MishBackward",
    "ReluBackward",
    "ReshapeAliasBackward",
    "SiluBackward",
    "SqueezeBackward",
    "TanhBackward",
    "UnsafeViewBackward",
    "ViewBackward",
}
"""Operations, as autograd calls them, that work on each channel alone and leave a zero channel at zero."""


class PruningError(RuntimeError):
    """A network that cannot be pruned as planned. The message names the layer."""


@dataclass(frozen=True)
class Member:
    """Channels of a module that go: along dim 0, of what it computes; along dim 1, of what it reads."""

    module: str
    dim: int
    channels: Sequence[int]


@dataclass(frozen=True)
class Removal:
    """All that goes with filters of `layer`: its own rows, its norms' channels, its readers' inputs."""

    layer: str
    members: tuple[Member, ...]


class Own(NamedTuple):
    """What belongs to the filters of a layer and to nobody else.

    members: qualified names of the layer's weight and bias, and of scale and shift of the norm behind it.
    remark: why a norm behind it is not among them; empty where none is missing.
    silent: whether a filter whose members are zero sends out nothing, whatever statistics a norm keeps.
    """

    members: tuple[str, ...]
    remark: str
    silent: bool


class Channels:
    """How the channels of a model's layers hang together, traced on a copy that runs in eval mode.

    Raises ValueError where the model cannot take the example inputs, PruningError where it cannot be traced.
    """

    def __init__(self, model: nn.Module, example_inputs: Any):
        traced = _copy(model)
        with torch.enable_grad():
            forward(traced, twin_inputs(example_inputs))
            self._graph, outputs = _trace(traced, twin_inputs(example_inputs))
        self._outputs = {output.grad_fn for output in outputs}
        self._modules = dict(traced.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        self._owners = Counter(id(p) for _, p in traced.named_parameters(remove_duplicate=False))

    def readers(self, layer: str) -> set[str]:
        """The convolutions and linear layers that read the layer's output through channel-wise steps only.

        None where other things are on a way.
        """
        module, found = self._modules[layer], set()
        ways = [self._graph.module2node.get(module)]
        while ways:
            previous = ways.pop()
            if previous is None or not previous.outputs or previous.grad_fn in self._outputs:
                return set()
            for node in set(previous.outputs):
                if self._sources(node) != {previous}:
                    return set()
                if isinstance(node.module, READERS) and _reads(node.module, module.out_channels):
                    found.add(self._names[node.module])
                elif not isinstance(node.module, READERS) and _is_channelwise(node):
                    ways.append(node)
                else:
                    return set()
        return found

    def _sources(self, node: Any) -> set:
        """The nodes that feed this one, those that only reshape a parameter aside."""
        return {source for source in node.inputs if source.inputs or source.module in self._names}

    def removal(self, layer: str, filters: Sequence[int]) -> Removal:
        """What goes along with these filters of a convolution.

        Raises PruningError where that is more than norms and the inputs of ungrouped readers.
        """
        from torch_pruning import prune_conv_out_channels

        module = self._modules[layer]
        if module not in self._graph.module2node:
            _refuse(layer, "no gradient passes through it on the way from the inputs to the outputs")
        group = self._graph.get_pruning_group(module, prune_conv_out_channels, filters)
        members = [self._member(layer, dependency, channels) for dependency, channels in group]
        return Removal(layer, tuple(member for member in members if member is not None))

    def own(self, layer: str) -> Own:
        """What belongs to the layer's filters, entry n along dim 0 to filter n alone: see `Own`."""
        module = self._modules[layer]
        every = list(range(module.out_channels))
        try:
            behind = [m for m in self.removal(layer, every).members if m.dim == 0 and m.module != layer]
        except PruningError as error:
            return Own(self._parameters(layer), str(error), False)
        norms = [m for m in behind if isinstance(self._modules[m.module], _BatchNorm)]
        strangers = [m.module for m in norms if list(m.channels) != every or self._is_shared(m.module, every)]
        own = [m.module for m in norms if m.module not in strangers and self._modules[m.module].affine]
        remark = f"{', '.join(map(repr, strangers))} is not channel by channel its own" if strangers else ""
        names = tuple(name for path in (layer, *own) for name in self._parameters(path))
        return Own(names, remark, len(own) == len(norms))

    def _parameters(self, path: str) -> tuple[str, ...]:
        """Weight and bias of a module, by qualified name."""
        found = self._modules[path]._parameters
        return tuple(f"{path}.{name}" for name in ("weight", "bias") if found.get(name) is not None)

    def _is_shared(self, norm: str, channels: Sequence[int]) -> bool:
        """Whether the norm has other channels, too, or a parameter that has another place in the model."""
        module = self._modules[norm]
        return self._is_tied(norm) or module.num_features != len(channels)

    def _is_tied(self, path: str) -> bool:
        """Whether a parameter of the module has another place in the model."""
        return any(self._owners[id(p)] > 1 for p in self._modules[path].parameters(recurse=False))

    def can_lose_filters(self, layer: str) -> bool:
        """Whether `removal` finds what goes along with a filter, and none of it is tied to another layer."""
        try:
            going = self.removal(layer, [0]).members
        except PruningError:
            return False
        return not any(self._is_tied(member.module) for member in going)

    def _member(self, layer: str, dependency: Any, channels: Sequence[int]) -> Member | None:
        node, module = dependency.target, dependency.target.module
        if isinstance(module, READERS) and module is not self._modules[layer]:
            return self._reader_member(layer, dependency, channels)
        if node.grad_fn in self._outputs:
            _refuse(layer, "its output is an output of the network")
        if isinstance(module, CONVOLUTIONS) or _has_channels(module):
            return Member(self._names[module], 0, channels)
        if isinstance(module, nn.Parameter) or (module in self._names and not isinstance(module, nn.PReLU)):
            _refuse(layer, f"its channels pass through {self._describe(module)}, which cannot lose some")
        return None

    def _reader_member(self, layer: str, dependency: Any, channels: Sequence[int]) -> Member:
        module = dependency.target.module
        if getattr(module, "groups", 1) != 1:
            _refuse(layer, f"its output goes to {self._describe(module)}, a grouped convolution")
        if self._graph.is_out_channel_pruning_fn(dependency.handler):
            _refuse(layer, f"outputs of {self._describe(module)} would have to go as well")
        return Member(self._names[module], 1, channels)

    def _describe(self, module: nn.Module | nn.Parameter) -> str:
        if isinstance(module, nn.Parameter):
            return f"a parameter of shape {tuple(module.shape)} outside the usual layers"
        return f"{self._names[module]!r} ({type(module).__name__})"


def _copy(model: nn.Module) -> nn.Module:
    try:
        return twin(model).requires_grad_(True)
    except Exception as error:
        raise PruningError(f"{type(model).__name__} cannot be copied: {error}") from error


def _trace(model: nn.Module, example_inputs: Any) -> tuple[Any, list[Tensor]]:
    """Torch-Pruning's graph, and the outputs of the run that it was traced from."""
    from torch_pruning import DependencyGraph

    outputs = []

    def differentiable(output: Any) -> list[Tensor]:
        outputs.extend(tensor for tensor in tensors(output) if tensor.grad_fn is not None)
        return outputs

    try:
        graph = DependencyGraph().build_dependency(
            model, example_inputs, forward_fn=forward, output_transform=differentiable, verbose=False
        )
    except Exception as error:
        raise PruningError(f"{type(model).__name__} cannot be traced: {error}") from error
    return graph, outputs


def _reads(reader: nn.Module, width: int) -> bool:
    """Whether a layer reads `width` channels, each as one input or, behind a flatten, as several."""
    inputs = reader.in_features if isinstance(reader, nn.Linear) else reader.in_channels
    return getattr(reader, "groups", 1) == 1 and inputs % width == 0


def _is_channelwise(node: Any) -> bool:
    operation = node.grad_fn.name().rstrip("0123456789")
    return _has_channels(node.module) or isinstance(node.module, nn.PReLU) or operation in CHANNELWISE


def _has_channels(module: nn.Module) -> bool:
    """Whether a batch norm or PReLU keeps something for each channel, which can go with it."""
    if isinstance(module, _BatchNorm):
        return module.affine or module.track_running_stats
    return isinstance(module, nn.PReLU) and module.num_parameters > 1


def _refuse(layer: str, reason: str) -> NoReturn:
    raise PruningError(f"{layer!r} cannot lose filters: {reason}. Leave it out of the plan")
