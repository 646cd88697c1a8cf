"""Following what readers give out, while a network runs: through norms and scales, into a sum.

Where a reader's output goes through nothing but a map of each channel and a sum, what the sum gives is what
the network goes on with: an error of the other branch can be mended there too.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from efreg.groups import tensor_of
from efreg.pruning.reading import Convolution, Linear, Reading
from efreg.pruning.running import Mode, tensors_in

NORMS = (
    "aten::native_batch_norm",
    "aten::cudnn_batch_norm",
    "aten::miopen_batch_norm",
    "aten::_native_batch_norm_legit_no_training",
    "aten::_batch_norm_no_update",
)
HANDED_ON = (
    "aten::view",
    "aten::_unsafe_view",
    "aten::clone",
    "aten::alias",
    "aten::detach",
    "aten::_to_copy",
)


@dataclass(eq=False)
class Branch:
    """What a reader's output has become: `tensor` = scale · output + what does not depend on it.

    reader: the name of its weight. number: which of its calls, from 0. links: operations since. scale: of
    each channel, [channels]. summed: whether another branch has been added. constant: the parameter or buffer
    that an equal shift of all outputs can go into, and how much of it: -1 a running mean. uses: by how many
    operations the tensor was taken in. after: what it became next.
    """

    reader: str
    number: int
    reading: Reading
    tensor: Tensor
    scale: Tensor
    links: int = 0
    summed: bool = False
    constant: tuple[str, int] | None = None
    uses: int = 0
    after: "Branch | None" = None

    @property
    def end(self) -> "Branch":
        """How far it goes without anything else that reads what lies between."""
        branch = self
        while branch.after is not None and branch.uses == 1:
            branch = branch.after
        return branch


class Following(Mode):
    """Tells `read` of each call of the readers, and `met` of what becomes of its output.

    readers: names of weights of the model.
    """

    def __init__(self, model: nn.Module, readers: Mapping[str, Any]):
        super().__init__()
        weights = {name: tensor_of(model, name) for name in readers}
        self._weights = {_key(weight): (name, False) for name, weight in weights.items()}
        self._weights |= {_key(w.t()): (name, True) for name, w in weights.items() if w.ndim == 2}
        self._named = {id(x): name for name, x in (*model.named_parameters(), *model.named_buffers())}
        self._branches: dict[int, Branch] = {}
        self._calls: Counter[str] = Counter()
        self.taken_in: Counter[str] = Counter()

    def read(self, branch: Branch, inputs: Tensor, weight: Tensor) -> None:
        """A reader has been called."""

    def met(self, branch: Branch) -> None:
        """Its output has become this."""

    def see(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        out = function(*args, **kwargs)
        given = dict(zip((argument.name for argument in function._schema.arguments), args)) | kwargs
        inputs = tensors_in(given)
        self.taken_in.update(self._named[id(x)] for x in inputs if id(x) in self._named)
        followed = [self._branches[id(x)] for x in inputs if id(x) in self._branches]
        name = function._schema.name.removesuffix("_")
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        for branch in followed:
            branch.uses += 1
            branch.after = self._linked(branch, name, given, first)
        if any(first is x for x in inputs):
            self._branches.pop(id(first), None)
        for branch in [branch.after for branch in followed if branch.after]:
            if not branch.summed:
                self._branches[id(first)] = branch
            self.met(branch)
        self._begin(name, given, first)
        return out

    def _begin(self, name: str, given: dict[str, Any], out: Any) -> None:
        """A branch, where the operation is one that reads with one of the weights."""
        found = self._reading(name, given)
        if found is None:
            return
        reader, reading, inputs, weight, bias = found
        constant = self._named.get(id(bias))
        channels = out.shape[reading.channels_at(out)]
        branch = Branch(
            reader,
            self._calls[reader],
            reading,
            out,
            torch.ones(channels, dtype=torch.float64, device=out.device),
            constant=None if constant is None else (constant, 1),
        )
        self._calls[reader] += 1
        self._branches[id(out)] = branch
        self.read(branch, inputs, weight)
        self.met(branch)

    def _reading(self, name: str, given: dict[str, Any]) -> tuple | None:
        """The reader, how it reads, its input, weight and bias; None for any other operation."""
        if name == "aten::convolution":
            reader, turned = self._weights.get(_key(given["weight"]), (None, True))
            numbers = (tuple(given[k]) for k in ("stride", "padding", "dilation"))
            reading = Convolution(*numbers, given["transposed"], given["groups"])
            found = reader, reading, given["input"], given["weight"], given["bias"]
        elif name == "aten::linear":
            reader, turned = self._weights.get(_key(given["weight"]), (None, True))
            found = reader, Linear(), given["input"], given["weight"], given.get("bias")
        elif name in ("aten::addmm", "aten::mm"):
            x, weight = (given["mat1"], given["mat2"]) if name == "aten::addmm" else given.values()
            reader, turned = self._weights.get(_key(weight), (None, False))
            found, turned = (reader, Linear(not turned), x, weight, given.get("self")), False
            if name == "aten::mm":
                found = *found[:-1], None
        else:
            return None
        return None if reader is None or turned else found

    def _linked(self, branch: Branch, name: str, given: dict[str, Any], out: Any) -> Branch | None:
        """What the branch becomes by an operation; None where that is not a map of each channel."""
        if not isinstance(out, Tensor):
            return None
        scale, summed, constant = branch.scale, False, branch.constant
        own = branch.reading.channels_at(branch.tensor) if branch.tensor.ndim else 0
        if name in HANDED_ON:
            linear = isinstance(branch.reading, Linear)
            if out.shape != branch.tensor.shape and not (linear and out.shape[-1] == branch.tensor.shape[-1]):
                return None
        elif name in NORMS and own == 1:
            if given.get("training") or given.get("train") or given["input"] is not branch.tensor:
                return None
            scale = scale * _scale(given).to(scale)
            mean = self._named.get(id(given["running_mean"]))
            if constant is None and mean is not None and torch.equal(branch.scale, torch.ones_like(scale)):
                constant = mean, -1
        elif name in ("aten::add", "aten::mul"):
            other = given["other"] if given["self"] is branch.tensor else given["self"]
            if not isinstance(other, Tensor) or given.get("alpha", 1) != 1 or other is branch.tensor:
                return None
            each = _of_channels(other, branch.tensor, own)
            if name == "aten::mul":
                if each is None:
                    return None
                scale = scale * each.to(scale)
            elif each is None:
                summed = True
                if not other.shape == branch.tensor.shape == out.shape:
                    return None
        else:
            return None
        return Branch(
            branch.reader, branch.number, branch.reading, out, scale, branch.links + 1, summed, constant
        )


def _key(tensor: Tensor) -> tuple:
    """The same for all views of the same numbers in the same order."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def _scale(given: Mapping[str, Any]) -> Tensor:
    """γ / √(var + ε) of a batch norm with statistics of its own."""
    epsilon = given.get("eps", given.get("epsilon"))
    scale = (given["running_var"].double() + epsilon).rsqrt()
    return scale if given["weight"] is None else scale * given["weight"].double()


def _of_channels(x: Tensor, like: Tensor, axis: int) -> Tensor | None:
    """The numbers of a tensor that broadcasts along all axes of another but that of its channels; None where
    it does not.
    """
    if x.numel() != like.shape[axis] or x.ndim > like.ndim:
        return None
    shape = [1] * (like.ndim - x.ndim) + list(x.shape)
    return x.detach().flatten() if shape[axis] == like.shape[axis] else None
