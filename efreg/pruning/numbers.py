"""Integers that modules have written down, and which of them are lengths of axes with channels.

A number is followed to the operation that it is given to: while a network is watched its modules' integers
are `Tracked`, which know where they come from, also after a multiplication. A length that came without one is
looked for among the integers of the module that was running.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

from torch import nn
from torch.overrides import TorchFunctionMode

NEVER = {"kernel_size", "stride", "padding", "output_padding", "dilation", "training"}
"""Attributes that are no length of an axis with channels, whatever number they hold."""


class Source(NamedTuple):
    """An integer of a module: the attribute, and the place in it where it is a list or tuple."""

    module: str
    attribute: str
    place: int | None


class Tracked(int):
    """An integer that knows which number of which module it is, `factor` times."""

    source: Source
    factor: Fraction

    @classmethod
    def of(cls, value: int, source: Source, factor: Fraction = Fraction(1)) -> "Tracked":
        number = cls(value)
        number.source, number.factor = source, factor
        return number

    def __mul__(self, other: Any) -> Any:
        product = int(self) * other
        return (
            Tracked.of(product, self.source, self.factor * other)
            if type(other) is int and other > 0
            else product
        )

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        quotient = int(self) // other
        exact = type(other) is int and other > 0 and int(self) % other == 0
        return Tracked.of(quotient, self.source, self.factor / other) if exact else quotient

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def plain_numbers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes of a module that are integers, or lists and tuples of them."""
    for name, value in vars(module).items():
        if name.startswith("_") or name in NEVER:
            continue
        if _is_int(value) or (type(value) in (list, tuple) and value and all(map(_is_int, value))):
            yield name, value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@contextmanager
def tracked(model: nn.Module) -> Iterator[None]:
    """The model's own integers are `Tracked` inside; torch's own modules keep theirs."""
    before = []
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch."):
            continue
        for name, value in list(plain_numbers(module)):
            before.append((module, name, value))
            if isinstance(value, int):
                vars(module)[name] = Tracked.of(value, Source(path, name, None))
            else:
                vars(module)[name] = type(value)(
                    Tracked.of(x, Source(path, name, i)) for i, x in enumerate(value)
                )
    try:
        yield
    finally:
        for module, name, value in before:
            vars(module)[name] = value


class Given(TorchFunctionMode):
    """Keeps in `numbers` the integers that the torch function at work was given, in their order.

    called: is told of each function and its arguments before it works.
    """

    def __init__(self, called: Callable[[Callable, tuple, dict], None]):
        super().__init__()
        self.numbers: list[int] = []
        self._called = called

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._called(function, args, kwargs or {})
        before, self.numbers = self.numbers, list(_integers((args, tuple((kwargs or {}).values()))))
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self.numbers = before

    def sources(self, lengths: Sequence[int]) -> list[Tracked | None]:
        """Which number each of an operation's lengths was given as: by place where they, or the most of them,
        stand in a row, else by value.
        """
        known = {int(x): x for x in self.numbers if isinstance(x, Tracked)}
        row, first = self._row(lengths) if known else ([], 0)
        if not row:
            return [known.get(length) for length in lengths]
        found: list[Tracked | None] = [None] * len(lengths)
        found[first : first + len(row)] = [x if isinstance(x, Tracked) else None for x in row]
        return found

    def _row(self, lengths: Sequence[int]) -> tuple[list[int], int]:
        """The longest row of numbers that are lengths behind each other, and which of them is the first."""
        for count in range(len(lengths), 1, -1):
            for start in range(len(self.numbers) - count + 1):
                row = self.numbers[start : start + count]
                for first in range(len(lengths) - count + 1):
                    if all(x in (length, -1) for x, length in zip(row, lengths[first:])):
                        return row, first
        return [], 0


def _integers(x: Any) -> Iterator[int]:
    if _is_int(x):
        yield x
    elif isinstance(x, (tuple, list)):
        for item in x:
            yield from _integers(item)
    elif isinstance(x, slice):
        yield from _integers((x.start, x.stop, x.step))
