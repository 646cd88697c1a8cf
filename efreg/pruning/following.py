"""Following what readers give out, while a network runs: through norms and scales, into a sum.

Where a reader's output goes through nothing but a map of each channel into a sum, the sum is what the network
goes on with: an error of the other branch can be mended there too.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from efreg.groups import tensor_of
from efreg.pruning.reading import Convolution, Linear, Reading
from efreg.pruning.running import Mode, arguments, schema_name, tensors_in

Given = Mapping[str, Any]
"""An operation's arguments, by the names that ATen's schema has for them."""


@dataclass(eq=False)
class Branch:
    """What a reader's output has become: `tensor` = scale · output + what does not depend on it.

    reader: the name of its weight. number: which of its calls, from 0. scale: of each channel, [channels],
    float64. links: operations since the reader. summed: whether another branch has been added. constant: the
    parameter or buffer that an equal shift of all outputs can go into, and 1, or −1 for a running mean.
    uses: how many operations took the tensor in. after: what one of them made of it.
    """

    reader: str
    number: int
    reading: Reading
    tensor: Tensor
    scale: Tensor
    constant: tuple[str, int] | None = None
    links: int = 0
    summed: bool = False
    uses: int = field(default=0, init=False)
    after: "Branch | None" = field(default=None, init=False)

    @property
    def channels(self) -> int:
        """The axis that the channels lie on."""
        return self.reading.channels_at(self.tensor)

    @property
    def plain(self) -> bool:
        """Whether no channel has been scaled."""
        return bool((self.scale == 1).all())

    @property
    def end(self) -> "Branch":
        """How far it goes with nobody else who takes in what lies between."""
        branch = self
        while branch.after is not None and branch.uses == 1:
            branch = branch.after
        return branch

    def become(self, out: Tensor, **changes: Any) -> "Branch":
        """One link further."""
        return replace(self, tensor=out, links=self.links + 1, **changes)


class Following(Mode):
    """Tells `read` of each call of the readers, and `met` of that and of whatever becomes of its output.

    readers: names of weights of the model. taken_in: how many operations took in each parameter and buffer.
    """

    def __init__(self, model: nn.Module, readers: Iterable[str]):
        super().__init__()
        weights = {name: tensor_of(model, name) for name in readers}
        self._weights = {_key(weight): name for name, weight in weights.items()}
        self._turned = {_key(weight.t()): name for name, weight in weights.items() if weight.ndim == 2}
        self._names = {id(x): name for name, x in (*model.named_parameters(), *model.named_buffers())}
        self._branches: dict[int, Branch] = {}
        self._calls: Counter[str] = Counter()
        self.taken_in: Counter[str] = Counter()

    def read(self, branch: Branch, inputs: Tensor, weight: Tensor) -> None:
        """A reader has been called."""

    def met(self, branch: Branch) -> None:
        """Its output is, or has become, this."""

    def forget(self, branch: Branch) -> None:
        """Follows this call no further, and keeps nothing alive for it."""
        call = branch.reader, branch.number
        self._branches = {key: b for key, b in self._branches.items() if (b.reader, b.number) != call}

    def see(self, function: OpOverload, args: tuple, kwargs: dict[str, Any]) -> Any:
        out = function(*args, **kwargs)
        given = arguments(function, args, kwargs)
        name = schema_name(function).removeprefix("aten::").removesuffix("_")
        inputs = tensors_in(given)
        self.taken_in.update(self._names[id(x)] for x in inputs if id(x) in self._names)
        first = next(iter(tensors_in(out)), None)
        if first is not None:
            self._follow(name, given, inputs, first)
            self._begin(name, given, first)
        return out

    def _follow(self, name: str, given: Given, inputs: list[Tensor], out: Tensor) -> None:
        """What becomes of the branches that an operation takes in."""
        taken = [self._branches[id(x)] for x in inputs if id(x) in self._branches]
        for branch in taken:
            branch.uses += 1
            branch.after = LINKS[name](self, branch, given, out) if name in LINKS else None
        self._branches.pop(id(out), None)  # written to in place
        for branch in [branch.after for branch in taken if branch.after is not None]:
            if not branch.summed:
                self._branches[id(out)] = branch
            self.met(branch)

    def _begin(self, name: str, given: Given, out: Tensor) -> None:
        """A branch, where the operation reads by one of the weights."""
        found = READS[name](self, given) if name in READS else None
        if found is None or found[0] is None:
            return
        reader, reading, inputs, weight, bias = found
        scale = torch.ones(out.shape[reading.channels_at(out)], dtype=torch.float64, device=out.device)
        branch = Branch(reader, self._calls[reader], reading, out, scale)
        branch.constant = self._own(branch, bias, 1)
        self._calls[reader] += 1
        self._branches[id(out)] = branch
        self.read(branch, inputs, weight)
        self.met(branch)

    # Operations that read: the reader, how it reads, its input, weight and bias

    def _convolution(self, given: Given) -> tuple:
        stride, padding, dilation = (tuple(given[key]) for key in ("stride", "padding", "dilation"))
        reading = Convolution(stride, padding, dilation, given["transposed"], given["groups"])
        return self._reader(given["weight"]), reading, given["input"], given["weight"], given["bias"]

    def _linear(self, given: Given) -> tuple:
        return self._reader(given["weight"]), Linear(), given["input"], given["weight"], given.get("bias")

    def _addmm(self, given: Given) -> tuple | None:
        scaled = given.get("alpha", 1) != 1 or given.get("beta", 1) != 1
        return None if scaled else self._product(given["mat1"], given["mat2"], given["self"])

    def _mm(self, given: Given) -> tuple:
        return self._product(given["self"], given["mat2"], None)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
        turned = self._turned.get(_key(weight))
        if turned is not None:
            return turned, Linear(), x, weight, bias
        return self._reader(weight), Linear(turned=True), x, weight, bias

    def _reader(self, weight: Tensor) -> str | None:
        return self._weights.get(_key(weight))

    def _own(self, branch: Branch, tensor: Tensor | None, sign: int) -> tuple[str, int] | None:
        """The tensor as what takes a constant, where it is the model's and no channel has been scaled."""
        name = self._names.get(id(tensor))
        return (name, sign) if name is not None and branch.plain else None

    # Maps of each channel, and sums

    def _handed_on(self, branch: Branch, given: Given, out: Tensor) -> Branch | None:
        """The same rows of the same channels."""
        shape, rows = branch.tensor.shape, isinstance(branch.reading, Linear)
        same = out.shape == shape or (rows and out.ndim > 0 and out.shape[-1] == shape[-1])
        return branch.become(out) if same else None

    def _normed(self, branch: Branch, given: Given, out: Tensor) -> Branch | None:
        """γ (x − mean) / √(var + ε) + β with statistics of its own."""
        if given.get("training") or given["input"] is not branch.tensor or branch.channels != 1:
            return None
        scale = (given["running_var"].double() + given.get("eps", given.get("epsilon"))).rsqrt()
        scale = scale if given["weight"] is None else scale * given["weight"].double()
        constant = branch.constant or self._own(branch, given["running_mean"], -1)
        return branch.become(out, scale=branch.scale * scale, constant=constant)

    def _multiplied(self, branch: Branch, given: Given, out: Tensor) -> Branch | None:
        """By a number of each channel."""
        other = _of_channels(_other(branch, given), branch)
        return None if other is None else branch.become(out, scale=branch.scale * other.double())

    def _added(self, branch: Branch, given: Given, out: Tensor) -> Branch | None:
        """A number of each channel, or another branch."""
        other = _other(branch, given)
        if other is None or given.get("alpha", 1) != 1:
            return None
        if _of_channels(other, branch) is not None:
            return branch.become(out, constant=branch.constant or self._own(branch, other, 1))
        same = other.shape == branch.tensor.shape == out.shape
        return branch.become(out, summed=True) if same else None


READS = {
    "convolution": Following._convolution,
    "linear": Following._linear,
    "addmm": Following._addmm,
    "mm": Following._mm,
}
"""The operations that readers are, by name."""

LINKS = {
    **dict.fromkeys(("view", "_unsafe_view", "clone", "alias", "detach"), Following._handed_on),
    **dict.fromkeys(("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"), Following._normed),
    "mul": Following._multiplied,
    "add": Following._added,
}
"""The operations that a branch is followed through, by name; one in place has the name of its twin."""


def _key(tensor: Tensor) -> tuple:
    """The same for all views of the same numbers in the same order."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def _other(branch: Branch, given: Given) -> Tensor | None:
    """The other one of two arguments; None where it is no tensor, or the same one."""
    other = given["other"] if given["self"] is branch.tensor else given["self"]
    return other if isinstance(other, Tensor) and other is not branch.tensor else None


def _of_channels(x: Tensor | None, branch: Branch) -> Tensor | None:
    """The numbers of a tensor that has one for each channel, wherever that is; None where it has others."""
    like = branch.tensor
    if x is None or x.ndim > like.ndim:
        return None
    shape = [1] * (like.ndim - x.ndim) + list(x.shape)
    each = x.numel() == like.shape[branch.channels] == shape[branch.channels]
    return x.flatten() if each else None
