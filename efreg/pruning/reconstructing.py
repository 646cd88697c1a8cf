"""Which units the readers can best do without, once their weights have been repaired."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efreg.groups import Group, Member, tensor_of
from efreg.pruning.following import Branch, Following
from efreg.pruning.reading import Reading
from efreg.pruning.running import calls, evaluation, forward, in_the_open

POSITIONS = 64
"""How many positions of each image are looked at, of a call of a convolution; of a linear layer all rows."""

BLOCK = 2**23
"""Numbers of readers' inputs that are multiplied at a time."""

DAMPING = 1e-3
"""What is added to the moments' diagonal, as a share of its mean."""


class Reconstruction:
    """An importance, by what the readers of a group lose when a unit goes and they make the best of the rest.

    With H = Σ x xᵀ of what a reader takes in and W its weights, the smallest Σ ‖W x − W̃ x‖² without the
    columns of unit j is tr(W_j ([H⁻¹]_jj)⁻¹ W_jᵀ); readers count relative to Σ ‖W x‖². The unit of the
    smallest sum over readers goes, W and H⁻¹ become what they are without it, and so on: a unit's importance
    is its place in that order. H is summed in float64 over the images and over positions drawn at random,
    always the same, 1e-3 of its mean diagonal added to it.

    Frantar and Alistarh, Optimal Brain Compression, 2022 (arXiv 2208.11580); in groups of columns: Kurtic et
    al., ZipLM, 2023 (arXiv 2302.04089); the sum over readers is ours.
    """

    def __init__(self, model: nn.Module, example_inputs: Any):
        self._model, self._calls = model, calls(example_inputs)
        self._known: dict[tuple[str, int], Tensor] = {}

    def __call__(self, group: Group) -> Tensor:
        """The place of each unit in the order in which they go, from 0. [N], float64

        Raises ValueError where no convolution or linear layer reads the group, or images are not finite.
        """
        key = group.name, group.size
        if key not in self._known:
            self._known[key] = _order(self._losses(group), group.size)
        return self._known[key]

    @torch.no_grad()
    def _losses(self, group: Group) -> list["_Loss"]:
        members = {member.tensor: member for member in group.of("reads")}
        moments = _Moments(self._model, list(members))
        with evaluation(self._model), in_the_open(), moments:
            for call in self._calls:
                forward(self._model, call)
        if not moments.found:
            raise ValueError(
                f"{group.name!r} is read by no convolution or linear layer, which reconstruction could look "
                f"at: take another importance, or leave it out (skip={group.name!r})"
            )
        losses = [loss for name in moments.found for loss in moments.losses(members[name], group.size)]
        if not all(loss.inverse.isfinite().all() for loss in losses):
            raise ValueError(f"activations that {group.name!r} has are not finite on these example_inputs")
        return losses


class _Moments(Following):
    """H of each reader. found: by name how it reads, and H [G, D, D]."""

    def __init__(self, model: nn.Module, readers: Sequence[str]):
        super().__init__(model, readers)
        self._model = model
        self._generator = torch.Generator().manual_seed(0)
        self.found: dict[str, tuple[Reading, Tensor]] = {}

    def read(self, branch: Branch, inputs: Tensor, weight: Tensor) -> None:
        count = branch.tensor.numel() // len(branch.scale)
        rows = torch.randperm(count, generator=self._generator)[: POSITIONS * len(inputs)].to(inputs.device)
        for part in rows.split(max(1, BLOCK // weight[0].numel())):
            x = branch.reading.inputs(inputs, part, branch.tensor.shape, weight.shape[2:])
            x = x.double().transpose(0, 1)  # [G, rows, D]
            before = self.found.get(branch.reader)
            moments = x.mT @ x if before is None else before[1] + x.mT @ x
            self.found[branch.reader] = branch.reading, moments

    def met(self, branch: Branch) -> None:
        self.forget(branch)

    def losses(self, member: Member, size: int) -> list["_Loss"]:
        """Of each group of the reader, if it is a convolution in groups, what it loses."""
        reading, moments = self.found[member.tensor]
        weight = tensor_of(self._model, member.tensor)
        units = torch.full((weight.shape[member.axis],), -1)
        units[member.index] = member.unit
        shape = [-1 if axis == member.axis else 1 for axis in range(weight.ndim)]
        of_columns = reading.matrix(units.reshape(shape).expand(weight.shape))[:, 0]  # [G, D]
        matrices = reading.matrix(weight).double()
        return [_Loss(h, w, of, size) for h, w, of in zip(moments, matrices, of_columns)]


class _Loss:
    """What a reader loses with each unit, and its weights and H⁻¹ without those that have gone.

    moments: H [D, D]. weight: W [O, D]. units: of each column, [D], −1 where it is another group's.
    """

    def __init__(self, moments: Tensor, weight: Tensor, units: Tensor, size: int):
        total = ((weight @ moments) * weight).sum()
        damping = DAMPING * moments.diagonal().mean()
        eye = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
        inverse = torch.linalg.inv(moments + damping.clamp(min=1e-30) * eye)
        most = max(1, int(torch.bincount(units[units >= 0], minlength=size).max()))
        # Columns of weight zero fill up the units that have fewer than others.
        self.inverse = torch.block_diag(inverse, torch.eye(most, dtype=eye.dtype, device=eye.device))
        self._weight = torch.cat(
            [weight / total.sqrt().clamp(min=1e-30), weight.new_zeros(len(weight), most)], 1
        )
        own = [(units == unit).nonzero().flatten().tolist() for unit in range(size)]
        self._columns = torch.tensor(
            [found + list(range(len(units) + len(found), len(units) + most)) for found in own]
        ).to(weight.device)

    def of(self, units: Tensor) -> Tensor:
        """tr(W_j ([H⁻¹]_jj)⁻¹ W_jᵀ) of these units."""
        columns = self._columns[units]  # [units, columns]
        blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
        weights = self._weight[:, columns].permute(1, 2, 0)  # [units, columns, O]
        return (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))

    def remove(self, unit: int) -> None:
        """W and H⁻¹ as they are without this unit, its columns zero but for a one on the diagonal."""
        columns = self._columns[unit]
        rows = self.inverse[columns]
        share = torch.linalg.solve(rows[:, columns], rows)  # [columns, D]
        self._weight = self._weight - self._weight[:, columns] @ share
        self.inverse = self.inverse - rows.mT @ share
        filled = columns[columns >= len(self.inverse) - len(columns)]
        self.inverse[filled, filled] = 1
        self._weight[:, filled] = 0


def _order(losses: Sequence[_Loss], size: int) -> Tensor:
    """The place of each unit in the order in which they go. [N]"""
    left = torch.arange(size)
    places = torch.empty(size, dtype=torch.float64)
    for place in range(size):
        cost = torch.stack([loss.of(left.to(loss.inverse.device)).cpu() for loss in losses]).sum(0)
        first = int(cost.argmin())
        places[left[first]] = place
        for loss in losses:
            loss.remove(int(left[first]))
        left = torch.cat([left[:first], left[first + 1 :]])
    return places
