"""A watch over the size of steps: a force that moves a unit further than it is long is said once."""

import logging

import torch
from torch import Tensor

from efreg.force.batches import Batch, times
from efreg.force.laws import Factor, Law, is_finite
from efreg.force.targets import Target

logger = logging.getLogger("efreg")


class Watch:
    """Looks at coefficients when charges were taken for the first, second, fourth, eighth ... time.

    On an accelerator what it finds is read when it is there; nobody waits for it.
    """

    def __init__(self, update: str) -> None:
        self._remedies = "a softening or max_coefficient"
        if update == "gradient":
            self._remedies = "a softening, max_coefficient, or update='proximal'"
        self._taken = 0
        self._pending: tuple[tuple[Tensor, torch.cuda.Event | None], list[Target], int] | None = None
        self._said = False

    def look(self, batch: Batch, law: Law, strength: Factor) -> None:
        """Says once which unit lr · c_n moves further than its mean |w|."""
        if self._said:
            return
        self._taken += 1
        self._read()
        if self._taken & (self._taken - 1) or batch.charging is None:
            return
        rate = next((group["lr"] for group in batch.owners.values() if group.get("lr") is not None), None)
        if rate is None:
            return
        charges, c = batch.charging.charges(law), batch.charging.groups.take(batch.shelf.coefficients)
        step = c.abs() * times(rate, strength)
        mean = charges.magnitude / charges.size
        share = torch.where(is_finite(step) & (mean > 0), step / mean, 0)
        worst = share.flatten().argmax().reshape(1)
        found = torch.stack([share, step.to(share), mean.to(share)]).flatten(1).index_select(1, worst)
        numbers = torch.cat([worst.to(share), found.flatten()])
        self._pending = self._sent(numbers), batch.charging.targets, share.shape[-1]
        self._read()

    def _sent(self, numbers: Tensor) -> tuple[Tensor, "torch.cuda.Event | None"]:
        if numbers.device.type != "cuda":
            return numbers.cpu(), None
        host = torch.empty_like(numbers, device="cpu", pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def _read(self) -> None:
        if self._pending is None:
            return
        (numbers, event), targets, width = self._pending
        if event is not None and not event.query():
            return
        self._pending = None
        place, share, step, mean = numbers.tolist()
        if share > 1:
            self._said = True
            name, unit = targets[int(place) // width].name, int(place) % width
            logger.warning(
                "the force is larger than what it pulls: in %s unit %d moves by lr · c = %.3g in a step, its "
                "mean |w| is %.3g; take a smaller alpha, %s",
                name,
                unit,
                step,
                mean,
                self._remedies,
            )
