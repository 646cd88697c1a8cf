"""Random networks: what is cut computes what the network does when nobody reads what went."""

import copy
import logging
import math
from collections import Counter
from contextlib import contextmanager
from zlib import crc32

import pytest
import torch
from grammar import Sketch, sketches
from hypothesis import given, note
from hypothesis import strategies as st
from parts import PARTS, part, recorded
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import efreg
from efreg.groups import tensor_of

TOLERANCE = 1e-9
"""Relative to max|output|, in float64: norms of few numbers, one behind the other, make roundings large."""

REFUSALS = (ValueError, efreg.PruningError)

REQUESTS = st.fixed_dictionaries(
    {"ratio": st.sampled_from([0.5, 0.3, 0.8])},
    optional={
        "ranking": st.just("global"),
        "round_to": st.just(2),
        "coupled": st.just(False),
        "approximate": st.just(True),
    },
)


@pytest.mark.parametrize("number", PARTS)
def test_networks(number, tmp_path, record_property):
    """Planned, pruned, moved, saved and loaded, and one in eight pruned again, which takes as long."""
    counts = Counter()

    @part(number)
    @given(sketches(), REQUESTS)
    def hold(sketch: Sketch, request: dict):
        counts["networks"] += 1
        model, x = sketch.build(), sketch.inputs()
        with nothing_said():
            plan = planned(model, x, request)
            if plan is None:
                counts["refused"] += 1
                return
            note(str(plan))
            counts["left out"] += bool(plan.left_out)
            counts["approximate"] += is_approximate(plan)
            counts["coupled"] += any(len(c.group.of("writes")) > 1 for c in plan.cuts)
            small = hold_cut(sketch, model, plan, x)
            if small is None:
                counts["unprovable"] += 1
                return
            hold_loaded(model, small, x, tmp_path / "small.safetensors")
            if one_in(8, sketch) and (again := planned(small, x, {"ratio": 0.5})):
                counts["cut twice"] += hold_cut(sketch, small, again, x) is not None

    hold()
    recorded(counts, record_property)
    assert counts["refused"] < 0.3 * counts["networks"]
    assert counts["coupled"] > 0.2 * counts["networks"]
    assert counts["cut twice"] > 0.03 * counts["networks"]


@pytest.mark.parametrize("number", PARTS)
def test_exports(number, record_property):
    """What is left goes through torch.export, and computes the same there."""
    counts = Counter()

    @part(number, 1)
    @given(sketches())
    def hold(sketch: Sketch):
        model, x = sketch.build(), sketch.inputs()
        plan = planned(model, x, {"ratio": 0.5})
        if plan is None:
            return
        try:
            small = efreg.prune(model, plan, example_inputs=x).eval()
        except efreg.PruningError as error:
            assert str(error).startswith("the network cannot be proven"), error
            return
        exported = torch.export.export(small, (x,)).module()
        for found, expected in zip(exported(x), small(x), strict=True):
            torch.testing.assert_close(found, expected)
        counts["exported"] += 1

    hold()
    recorded(counts, record_property)


def one_in(count: int, sketch: Sketch) -> bool:
    """Whether the network is one of those that are chosen, always the same ones."""
    return crc32(repr(sketch).encode()) % count == 0


def planned(model: nn.Module, x: torch.Tensor, request: dict) -> efreg.Plan | None:
    """The plan, None where there is none; what is refused is named."""
    try:
        plan = efreg.plan(model, **request, example_inputs=x)
    except REFUSALS as error:
        names = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
        assert any(repr(name) in str(error) for name in names) or "cannot be proven" in str(error), error
        return None
    return plan if plan.cuts else None


def hold_cut(sketch: Sketch, model: nn.Module, plan: efreg.Plan, x: torch.Tensor) -> nn.Module | None:
    """What is left, once it holds; None where outputs no longer depend on the images, which prove nothing."""
    optimizer = with_momentum(model)
    before = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    try:
        small = efreg.prune(model, plan, example_inputs=x, optimizer=optimizer)
    except efreg.PruningError as error:
        assert str(error).startswith("the network cannot be proven"), error
        return None
    hold_outputs(sketch, model, plan, small)
    assert plan.parameters == tuple(sum(p.numel() for p in net.parameters()) for net in (model, small))
    for name, parameter in small.named_parameters():
        places = found_in(model.get_parameter(name), parameter, name)
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(momentum, before[name].flatten()[places]), f"momentum of {name}"
    return small


def with_momentum(model: nn.Module) -> torch.optim.SGD:
    """An optimizer of the network, with random momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.randn_like(parameter)
    return optimizer


@torch.no_grad()
def hold_outputs(sketch: Sketch, model: nn.Module, plan: efreg.Plan, small: nn.Module) -> None:
    """In eval and train mode the outputs are those of the given network in which nobody reads what went, and
    cost what the plan says. In an approximate plan they are finite.
    """
    tolerance = math.inf if is_approximate(plan) else TOLERANCE
    reference, x = unread(model, plan, silenced=sketch.multiplies), sketch.inputs()
    hold_close(small.eval()(x), reference.eval()(x), tolerance)
    (expected, before), (found, after) = (counted(network.train(), x) for network in (reference, small))
    hold_close(found, expected, tolerance)
    assert plan.macs == (before, after)


def is_approximate(plan: efreg.Plan) -> bool:
    """Whether a norm is taken over what is cut, so that outputs are others."""
    return any(cut.group.approximate for cut in plan.cuts)


def hold_close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        apart = (x - y).abs().max() / y.abs().max().clamp_min(1e-30)
        assert apart < tolerance, f"outputs lie {apart:.1e} apart"


def counted(network: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], int]:
    """What a network gives, and in how many multiply-accumulates."""
    with Products() as products, sdpa_kernel(SDPBackend.MATH):
        return network(x), products.macs


class Products(TorchDispatchMode):
    """Counts as torch's FlopCounterMode does, without the modules, which take it long."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out

    @property
    def macs(self) -> int:
        return self.flops // 2


@torch.no_grad()
def unread(model: nn.Module, plan: efreg.Plan, *, silenced: bool) -> nn.Module:
    """A copy in which the columns that read what goes are zero; where there are none, the rows."""
    filters, model = plan.filters(model), copy.deepcopy(model)
    for group in plan.groups(model, members=True):
        parts = ["reads"] if group.of("reads") else []
        parts += ["writes", "carries"] if silenced or not parts else []
        for member in (member for what in parts for member in group.of(what)):
            places = member.index[torch.isin(member.unit, torch.tensor(filters[group.name]))]
            tensor_of(model, member.tensor).index_fill_(member.axis, places, 0)
    return model


@torch.no_grad()
def found_in(whole: torch.Tensor, part: torch.Tensor, name: str) -> torch.Tensor:
    """Where the numbers of a part lie in the whole, flat: along each axis at some of the places, in order."""
    if part.shape == whole.shape:
        assert torch.equal(part, whole), f"{name} has changed"
        return torch.arange(whole.numel()).view(whole.shape)
    values, order = whole.flatten().sort()
    places = order[torch.searchsorted(values, part.flatten()).clamp_max(len(values) - 1)].view(part.shape)
    assert torch.equal(whole.flatten()[places], part), f"{name} has numbers of its own"
    for axis, along in enumerate(torch.unravel_index(places, whole.shape)):
        lines = along.movedim(axis, 0).reshape(part.shape[axis], -1)
        assert (lines == lines[:, :1]).all() and (lines[:, 0].diff() > 0).all(), f"{name} is out of order"
    return places


@torch.no_grad()
def hold_loaded(model: nn.Module, small: nn.Module, x: torch.Tensor, path) -> None:
    """Saved, and loaded into the full-size network, whose own numbers are gone, it computes the same to the
    bit.
    """
    efreg.save(small, path)
    for parameter in model.parameters():
        parameter.zero_()
    loaded = efreg.load(model, path)
    outputs = [network.eval()(x) for network in (small, loaded)]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@contextmanager
def nothing_said():
    """No rule for an operation fails: all is frozen then, as where there is none, and said at DEBUG alone."""
    said, logger = [], logging.getLogger("efreg")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert not [message for message in said if message.startswith("the rule of")]
