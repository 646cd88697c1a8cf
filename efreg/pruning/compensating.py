"""Repair without training: what reads the channels that are left gives back what it gave before the cut."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from efreg.groups import tensor_of, unwrap
from efreg.pruning.attention import PrunedAttention, as_pruned
from efreg.pruning.cutting import Kept, kept_of
from efreg.pruning.following import Branch, Following
from efreg.pruning.loading import Forward, Loader, placed, run_on
from efreg.pruning.matching import gone_from
from efreg.pruning.reading import Reading
from efreg.pruning.running import copy_of, device_of, evaluation, in_the_open, quietly
from efreg.pruning.running import forward as run_call
from efreg.pruning.units import Network
from efreg.pruning.watching import Watched, some, watch

logger = logging.getLogger("efreg")

Progress = Callable[[int, int, str], None]
"""Is told how many readers are done, how many there are, and which was the last."""

TARGETS = 2**30
"""Bytes of targets that are kept at a time; what needs more runs the given network more often."""

BLOCK = 2**23
"""Numbers of readers' inputs that are multiplied at a time."""

FAINT = 1e-4
"""A channel whose scale is below this share of its layer's largest is hardly seen: its weights stay."""


def compensate(
    small: nn.Module,
    model: nn.Module,
    loader: Loader,
    *,
    images: int | None = 1000,
    positions: int = 32,
    ridge: float = 1e-3,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Repairs a pruned network on a thousand images, without training, in place. Returns it.

    Each convolution and linear layer, from the first that reads a cut group on, gets the weights, and the
    constant, that by least squares give back what the given network has there, one after the other in the
    order in which the network runs:

        W̃ = W + E (A + λ I)⁻¹,  A = Σ x̃ x̃ᵀ,  E = Σ (t − t̃) / s · x̃ᵀ,  λ = ridge · mean(diag A)

    summed in float64 over images and positions. x̃ [D] is what the layer reads at a position, as the small
    network makes it with all layers before it repaired; where the layer's output y goes through nothing but
    scales of each channel, such as a batch norm, into a sum, t is that sum: s · y + the other branch, in
    the given network, and t̃ in the small one, so that the error of the other branch is mended too. Elsewhere
    t = s · y. With a plain t this is W̃ = (Σ y x̃ᵀ + λ W) (A + λ I)⁻¹: a ridge towards the weights that were
    kept. A constant goes into the layer's bias, or else into the running mean of the batch norm behind it.
    A layer is left as it is where that would not be nearer, on these images, to what it should give, so also
    where nothing has changed what it reads.

    model: the network that `small` was cut from, by `prune`, as it was then; it is left as it is. What was
        kept is found from the parameters of both, so `small` may have been saved and loaded, moved, or given
        new statistics.
    loader: batches as `recalibrate` takes them. images: how many to take, all there are with None; whole
        batches, which are kept in memory. positions: of a layer's outputs, so many an image, drawn at random
        and always the same. ridge: a positive number.
    device: where to put the batches; None is the small network's. forward: (model, batch) runs a model on a
        batch of any other kind. progress: is called as (done, total, name) after each layer.

    Runs in eval mode, in float32 or wider, without gradients; flags are restored. Raises, with `small` as it
    was: ValueError for a network that was not cut from this one, one of which nothing was cut or no reader
    can be repaired, an empty loader, and activations that are not finite; TypeError for batches that the
    model does not take. Layers that cannot be repaired, since they are no convolution or linear layer with a
    weight of its own, are named in a warning, as are too few images.

    After Luo et al., ThiNet, 2017 (arXiv 1707.06342) and He et al., Channel Pruning, 2017 (arXiv
    1707.06168); the sum is ours.
    """
    small_, model_ = unwrap(small), unwrap(model)
    if not (isinstance(ridge, (int, float)) and ridge > 0):
        raise ValueError(f"ridge is {ridge!r}: give a number above 0, such as 1e-3")
    if not (isinstance(positions, int) and positions > 0):
        raise ValueError(f"positions is {positions!r}: give a whole number of at least 1")
    place, run = device or device_of(small_), forward or run_on
    batches = list(_taken(loader, images))
    with quietly(small_), in_the_open(), evaluation(small_, model_):
        pair = _Pair(small_, model_, batches, run, place, positions)
        readers = pair.readers()
        with _restored(small_, readers):
            pair.repair(readers, ridge, progress)
    return small


def _taken(loader: Loader, images: int | None) -> Iterator[Any]:
    """Batches until there are so many images. Raises ValueError where there is none."""
    count = 0
    for batch in loader:
        if images is not None and count >= images:
            return
        count += _length(batch)
        yield batch
    if not count:
        raise ValueError("the loader is empty: compensate needs a few hundred images")


def _length(batch: Any) -> int:
    """How many images are in a batch: the length of its first tensor."""
    return next((len(x) for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim), 1)


class _Enough(BaseException):
    """All that was looked for has been seen; the rest of the network need not run."""


def _call(model: nn.Module, run: Forward, batch: Any) -> Any:
    """What the model is called with for a batch, in the form of `example_inputs`."""
    found = []

    def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(args or kwargs)
        raise _Enough

    handle = model.register_forward_pre_hook(keep, prepend=True, with_kwargs=True)
    try:
        with suppress(_Enough):
            run(model, batch)
    finally:
        handle.remove()
    if not found:
        raise ValueError(f"forward does not run {type(model).__name__}: call model(...) in it")
    return found[0]


def _few(call: Any) -> Any:
    """The same for two images."""
    length = _length(call)
    return tree_map(lambda x: x[:2] if isinstance(x, Tensor) and x.ndim and len(x) == length else x, call)


def _watched(model: nn.Module, call: Any) -> tuple[Any, Watched]:
    """The model on two images; on the batch where it takes no other number of them."""
    try:
        return _few(call), watch(model, _few(call))
    except ValueError:
        return call, watch(model, call)


def _kept(small: nn.Module, model: nn.Module, watched: Watched) -> tuple[Kept, list[str]]:
    """What the small network has kept of each tensor, and the weights that read what it has not."""
    exact = Network(watched)
    try:
        network, gone = exact, gone_from(exact, model, small)
    except ValueError:
        network = Network(watched, approximate=True)
        gone = gone_from(network, model, small)
    return kept_of(network, gone), list(dict.fromkeys(name for name, _, _ in network.columns(gone)))


@dataclass(frozen=True)
class _Reader:
    """A weight that is repaired, the `number`-th in the order of the run.

    links: in the small network and in the given one, of each call how many operations lie between output and
    target. kept: the channels of the given network's output that the small one has, None where it has all.
    reading: how it reads in the small one. constant: see `Branch`.
    """

    name: str
    number: int
    links: tuple[tuple[int, ...], tuple[int, ...]]
    kept: Tensor | None
    reading: Reading
    constant: tuple[str, int] | None

    @property
    def calls(self) -> int:
        """How often the network calls it."""
        return len(self.links[0])


def _as_pruned(model: nn.Module, small: nn.Module) -> nn.Module:
    """The model, its attention computing in the order that the small network's has; if need be a copy."""
    there = dict(small.named_modules())
    paths = {
        path
        for path, module in model.named_modules()
        if type(module) is nn.MultiheadAttention and type(there.get(path)) is PrunedAttention
    }
    copied = copy_of(model) if paths else model
    for path, module in copied.named_modules():
        if path in paths and isinstance(module, nn.MultiheadAttention):
            as_pruned(module, module.num_heads)
    return copied


class _Survey(Following):
    """All calls of the readers, in order."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__(model, names)
        self.calls: dict[str, list[Branch]] = {}

    def read(self, branch: Branch, inputs: Tensor, weight: Tensor) -> None:
        self.calls.setdefault(branch.reader, []).append(branch)

    def links(self, name: str) -> tuple[int, ...]:
        return tuple(branch.end.links for branch in self.calls[name])

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        """Of what is compared, but for the channels: the same in both networks, or rows are not the same."""
        ends = [branch.end for branch in self.calls.get(name, ())]
        shapes = [(list(branch.tensor.shape), branch.channels) for branch in ends]
        return [(end.summed, *shape[:i], *shape[i + 1 :]) for end, (shape, i) in zip(ends, shapes)]

    def alone(self, reader: str, name: str | None = None) -> bool:
        """Whether the reader's calls are all that takes in this tensor, its weight if none is named."""
        return self.taken_in[name or reader] == len(self.calls[reader])

    def constant(self, reader: str) -> tuple[str, int] | None:
        """What takes a constant, where that serves nobody else."""
        found = {branch.end.constant for branch in self.calls[reader]}
        constant = found.pop() if len(found) == 1 else None
        return constant if constant is not None and self.alone(reader, constant[0]) else None


class _Taking(Following):
    """Rows of what readers read, and of what their outputs become, in one run; then the run ends.

    rows: of a reader, the number of a call and how many there are the rows to take. whole: whether the
    network is the given one, of which only targets are wanted. missing: readers, once for each call that has
    not been seen to its end. inputs, found: by reader and call what it reads, and the target with its scale.
    """

    def __init__(self, network: nn.Module, readers: Sequence[_Reader], rows: Callable, *, whole: bool):
        super().__init__(network, [reader.name for reader in readers])
        self._readers = {reader.name: reader for reader in readers}
        self._rows, self._whole = rows, whole
        self.missing = [reader.name for reader in readers for _ in range(reader.calls)]
        self._chosen: dict[tuple[str, int], Tensor] = {}
        self.inputs: dict[tuple[str, int], Tensor] = {}
        self.found: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def read(self, branch: Branch, inputs: Tensor, weight: Tensor) -> None:
        key, out = (branch.reader, branch.number), branch.tensor
        rows = self._rows(self._readers[branch.reader], branch.number, out.numel() // len(branch.scale))
        self._chosen[key] = rows.to(out.device)
        if not self._whole:
            self.inputs[key] = branch.reading.inputs(inputs, self._chosen[key], out.shape, weight.shape[2:])

    def met(self, branch: Branch) -> None:
        key = branch.reader, branch.number
        if branch.links == self._readers[branch.reader].links[self._whole][branch.number]:
            self.found[key] = branch.reading.outputs(branch.tensor, self._chosen[key]), branch.scale
            self.missing.remove(branch.reader)
            self.forget(branch)
        if not self.missing:
            raise _Enough


class _Pair:
    """The two networks and the images."""

    def __init__(
        self,
        small: nn.Module,
        model: nn.Module,
        batches: Sequence[Any],
        run: Forward,
        place: torch.device | str,
        positions: int,
    ):
        self._small, self._model, self._batches = small, model, batches
        self._whole = _as_pruned(model, small)
        self._run, self._place, self._positions = run, place, positions

    def readers(self) -> list[_Reader]:
        """Those that can be repaired, in the order in which the small network runs.

        Raises ValueError where there is none.
        """
        call = _call(self._model, self._run, placed(self._batches[0], self._place))
        example, watched = _watched(self._model, call)
        kept, names = _kept(self._small, self._model, watched)
        if not names:
            raise ValueError("nothing to repair: the small network has all units of the given one")
        small, whole = (self._survey(network, example) for network in (self._small, self._whole))
        able = [
            name for name in small.calls if small.shapes(name) == whole.shapes(name) and small.alone(name)
        ]
        if left := sorted(set(names) - set(able)):
            logger.warning("not repaired, as no convolution or linear layer reads by them: %s", some(left))
        first = next((number for number, name in enumerate(able) if name in names), None)
        if first is None:
            raise ValueError(f"nothing to repair: no convolution or linear layer reads by {some(left)}")
        return [
            _Reader(
                name,
                number,
                (small.links(name), whole.links(name)),
                whole.calls[name][0].reading.kept(kept.get(name, {}), tensor_of(self._model, name).shape),
                small.calls[name][0].reading,
                small.constant(name),
            )
            for number, name in enumerate(able[first:])
        ]

    def _survey(self, network: nn.Module, example: Any) -> "_Survey":
        names = [name for name, parameter in self._small.named_parameters() if parameter.ndim > 1]
        survey = _Survey(network, names)
        with survey:
            run_call(network, example)
        return survey

    def repair(self, readers: Sequence[_Reader], ridge: float, progress: Progress | None) -> None:
        """One reader after the other."""
        short: dict[str, float] = {}
        done = 0
        for together in self._portions(readers):
            targets = self._targets(together)
            for reader in together:
                equations = self._equations(reader, targets[reader.name])
                _repair(self._small, reader, equations, ridge)
                short[reader.name] = equations.wanting
                done += 1
                if progress is not None:
                    progress(done, len(readers), reader.name.removesuffix(".weight"))
        worst = max(short, key=lambda name: short[name])
        if short[worst] > 1:
            count = sum(map(_length, self._batches))
            logger.warning(
                "%d images are few for %s, the ridge carries what they leave open: %d would do",
                *(count, worst.removesuffix(".weight"), ceil(count * short[worst])),
            )

    def _portions(self, readers: Sequence[_Reader]) -> Iterator[list[_Reader]]:
        """Readers whose targets fit into memory together, one at least."""
        rows = self._positions * sum(map(_length, self._batches))
        portion: list[_Reader] = []
        left = TARGETS
        for reader in readers:
            matrix = reader.reading.matrix(tensor_of(self._small, reader.name))
            size = 4 * rows * reader.calls * matrix.shape[0] * matrix.shape[1]
            if portion and size > left:
                yield portion
                portion, left = [], TARGETS
            portion.append(reader)
            left -= size
        yield portion

    def _seen(self, readers: Sequence[_Reader], *, whole: bool) -> Iterator[_Taking]:
        """What the given or the small network shows of the readers, batch by batch."""
        network = self._whole if whole else self._small
        for number, batch in enumerate(self._batches):
            most = self._positions * _length(batch)

            def rows(
                reader: _Reader, call: int, count: int, number: int = number, most: int = most
            ) -> Tensor:
                generator = torch.Generator().manual_seed((reader.number << 40) + (call << 20) + number)
                return torch.randperm(count, generator=generator)[:most]

            taking = _Taking(network, readers, rows, whole=whole)
            with suppress(_Enough), taking:
                self._run(network, placed(batch, self._place))
            if taking.missing:
                raise ValueError(
                    f"batch {number} does not reach all layers that the first one does, such as "
                    f"{taking.missing[0]!r}: leave it out"
                )
            yield taking

    def _targets(self, readers: Sequence[_Reader]) -> dict[str, list[Tensor]]:
        """What the given network has at the ends of the readers' branches, in the channels that stay.

        Of each reader a tensor [rows, channels] for each batch and call, in float32 or wider.
        """
        targets: dict[str, list[Tensor]] = {reader.name: [] for reader in readers}
        for taking in self._seen(readers, whole=True):
            for reader in readers:
                for call in range(reader.calls):
                    target = _wide(taking.found[reader.name, call][0])
                    if reader.kept is not None:
                        target = target[:, reader.kept.to(target.device)]
                    targets[reader.name].append(target)
        return targets

    def _equations(self, reader: _Reader, targets: Sequence[Tensor]) -> "_Equations":
        """Sums over all images of what the reader reads in the small network, and of how far it is off."""
        matrix = reader.reading.matrix(tensor_of(self._small, reader.name))
        equations, ahead = _Equations(reader, matrix), iter(targets)
        for taking in self._seen([reader], whole=False):
            for call in range(reader.calls):
                key = reader.name, call
                now, scale = taking.found[key]
                error = _unscaled(next(ahead).to(now.device).double() - now.double(), scale)
                equations.add(taking.inputs[key], error)
        return equations


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unscaled(error: Tensor, scale: Tensor) -> Tensor:
    """error / scale of each channel; zero where the scale is faint. [rows, channels]"""
    seen = scale.abs() > FAINT * scale.abs().max()
    return torch.where(seen, error / torch.where(seen, scale, 1), 0)


class _Equations:
    """A = Σ x xᵀ [G, D, D] and E = Σ e xᵀ [G, O, D], float64; x ends in a one where a constant is sought.

    matrix: the reader's weight as [G, O, D].
    """

    def __init__(self, reader: _Reader, matrix: Tensor):
        self._reader, self._rows = reader, 0
        groups, channels, size = matrix.shape
        size += reader.constant is not None
        self.moments = matrix.new_zeros(groups, size, size, dtype=torch.float64)
        self.errors = matrix.new_zeros(groups, channels, size, dtype=torch.float64)

    @property
    def wanting(self) -> float:
        """How many times the images would do."""
        return self.moments.shape[-1] / self._rows

    def add(self, inputs: Tensor, error: Tensor) -> None:
        """inputs: [rows, G, D]. error: [rows, G · O]."""
        groups = inputs.shape[1]
        block = max(1, BLOCK // max(inputs[0].numel(), error.shape[1]))
        for x, e in zip(inputs.split(block), error.split(block)):
            x, e = x.double().transpose(0, 1), e.unflatten(1, (groups, -1)).transpose(0, 1)  # [G, rows, ...]
            if self._reader.constant is not None:
                x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
            self.moments += x.mT @ x
            self.errors += e.mT @ x
        self._rows += len(inputs)

    def solution(self, ridge: float) -> Tensor:
        """E (A + λ I)⁻¹, λ a share of the mean of A's diagonal; zeros where all inputs are. [G, O, D]

        Raises ValueError, naming the reader, for sums that are not finite.
        """
        name = self._reader.name.removesuffix(".weight")
        if not (self.moments.isfinite().all() and self.errors.isfinite().all()):
            raise ValueError(f"activations at {name!r} are not finite: look at the images and both networks")
        diagonal = self.moments.diagonal(dim1=1, dim2=2)
        strength = ridge * diagonal.mean(1, keepdim=True)
        strength = torch.where(strength > 0, strength, 1)
        factor, failed = torch.linalg.cholesky_ex(
            self.moments + torch.diag_embed(strength.expand_as(diagonal))
        )
        if failed.any():
            raise ValueError(f"ridge {ridge:g} is too small for {name!r}: give a larger one")
        return torch.cholesky_solve(self.errors.mT, factor).mT

    def gain(self, change: Tensor) -> float:
        """By how much Σ ‖e‖² falls if this is added to the weights."""
        return float(2 * (change * self.errors).sum() - ((change @ self.moments) * change).sum())


def _repair(small: nn.Module, reader: _Reader, equations: _Equations, ridge: float) -> None:
    """Writes the reader's weight and constant, unless what it should give is no nearer with them."""
    weight, reading = tensor_of(small, reader.name), reader.reading
    change = equations.solution(ridge)
    old = reading.matrix(weight)
    new = (old + change[..., : old.shape[-1]]).to(weight.dtype)
    written = [(new.double() - old.double())]
    if reader.constant is not None:
        name, sign = reader.constant
        constant = tensor_of(small, name)
        shifted = (constant + sign * change[..., -1].reshape(constant.shape)).to(constant.dtype)
        written.append(sign * (shifted.double() - constant.double()).reshape(*change.shape[:2], 1))
    if not equations.gain(torch.cat(written, -1)) > 0:
        return
    weight.copy_(reading.weight(new, weight.shape))
    if reader.constant is not None:
        constant.copy_(shifted)


@contextmanager
def _restored(small: nn.Module, readers: Sequence[_Reader]) -> Iterator[None]:
    """Puts the readers' tensors back where the body raises."""
    names = [name for reader in readers for name in (reader.name, *(reader.constant or ())[:1])]
    before = {name: tensor_of(small, name).detach().clone() for name in names}
    try:
        yield
    except BaseException:
        for name, tensor in before.items():
            tensor_of(small, name).copy_(tensor)
        raise
