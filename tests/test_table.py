"""The table of a GPU's backends: made once, sent again only when something moved, and never out of date."""

import pytest
import torch
from torch import nn

import efreg
from efreg.backends import table, transfer
from efreg.backends.rows import Groups, Rows
from efreg.force import batches, serving

INTERPRETER_AS_IT_IS = True
"""Triton's interpreter runs here without the change that makes the other files quick."""


class Counted:
    """Counts the tables made and the arrays sent."""

    def __init__(self, monkeypatch):
        self.tables, self.sent = 0, 0
        monkeypatch.setattr(table, "Table", self._making(table.Table))
        monkeypatch.setattr(transfer, "send", self._sending(transfer.send))
        table._tables.clear()

    def _making(self, make):
        def making(rows):
            self.tables += 1
            return make(rows)

        return making

    def _sending(self, send):
        def sending(*arguments):
            self.sent += 1
            return send(*arguments)

        return sending

    def since(self):
        """Tables made and arrays sent since the last look."""
        counts, self.tables, self.sent = (self.tables, self.sent), 0, 0
        return counts


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


@pytest.fixture
def net():
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Conv2d(4, 3, 3, bias=False))


def step(net, optimizer, grads=None, *, expected=None):
    """One optimizer step on gradients of ones; checks that every weight was pulled as L1 pulls."""
    before = [p.detach().clone() for p in net.parameters()]
    for parameter, grad in zip(net.parameters(), grads or [None] * 9, strict=False):
        parameter.grad = torch.zeros_like(parameter) if grad is None else grad
    optimizer.step()
    for parameter, old in zip(net.parameters(), before, strict=True):
        pull = 0.5 * old.sign()
        torch.testing.assert_close(
            old - parameter.detach().to(old), 0.1 * pull if expected is None else expected
        )


def force_on(net, **settings):
    efreg.attach(net, law=efreg.L1(0.5), backend="triton", **settings)
    return torch.optim.SGD(net.parameters(), lr=0.1)


def test_it_is_made_at_the_first_step_and_then_kept(net, counted):
    """Gradients that stay where they are cost nothing; those that move cost one array."""
    optimizer = force_on(net)
    counted.since()
    grads = [torch.zeros_like(p) for p in net.parameters()]
    step(net, optimizer, grads)
    tables, sent = counted.since()
    assert tables == 1 and sent > 0
    for grad in grads:
        grad.zero_()
    step(net, optimizer, grads)
    assert counted.since() == (0, 0)
    moved = [torch.zeros_like(p) for p in net.parameters()]
    step(net, optimizer, moved)
    assert counted.since() == (0, 1)


MOVES = {
    "to float64 and back": lambda net: net.double().float(),
    "to float64": lambda net: net.double(),
    "channels_last": lambda net: net.to(memory_format=torch.channels_last),
    "load_state_dict": lambda net: net.load_state_dict({k: v + 0.5 for k, v in net.state_dict().items()}),
    "load_state_dict by assignment": lambda net: net.load_state_dict(
        {k: v + 0.5 for k, v in net.state_dict().items()}, assign=True
    ),
    "new numbers": lambda net: setattr(net[0].weight, "data", torch.randn(4, 2, 3, 3)),
    "half of the filters": lambda net: setattr(net[0].weight, "data", net[0].weight.data[:2]),
    "half of the channels": lambda net: setattr(net[1].weight, "data", net[1].weight.data[:, :2]),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("refresh", [None, 1])
def test_it_follows_the_model(net, move, refresh):
    optimizer = force_on(net, refresh=refresh)
    step(net, optimizer)
    MOVES[move](net)
    if "assignment" in move:
        optimizer.param_groups[0]["params"] = list(net.parameters())
    step(net, optimizer)
    step(net, optimizer)


def test_weights_frozen_and_thawed(net):
    """What has no gradient is left alone, what has one again is pulled; each at its own place."""
    optimizer = force_on(net)
    step(net, optimizer)
    for frozen in (0, 1, 0):
        before = [p.detach().clone() for p in net.parameters()]
        optimizer.zero_grad()
        net[1 - frozen].weight.grad = torch.zeros_like(net[1 - frozen].weight)
        optimizer.step()
        assert torch.equal(net[frozen].weight, before[frozen])
        assert not torch.equal(net[1 - frozen].weight, before[1 - frozen])
    step(net, optimizer)


def test_which_weight_has_the_gradient_is_no_matter_of_its_address():
    """A gradient that lies where the other weight's lay is the right one's."""
    weights, grad = [torch.ones(2, 3), -torch.ones(2, 3)], torch.zeros(2, 3)
    backend, rows = efreg.backends.select("triton", torch.device("cpu")), Rows.of(weights, [0, 0])
    for grads, sign in (([grad, None], 1.0), ([None, grad], -1.0), ([grad, None], 1.0)):
        grad.zero_()
        backend.pull(grads, rows, torch.ones(4), scale=1.0, direction="sign")
        assert torch.equal(grad, torch.full((2, 3), sign))


def test_a_gradient_of_another_order_at_the_same_address():
    weight, buffer = torch.randn(4, 2, 3, 3), torch.zeros(72)
    backend, rows = efreg.backends.select("triton", torch.device("cpu")), Rows.of([weight], [0])
    last = buffer.view(4, 3, 3, 2).permute(0, 3, 1, 2)
    for grad in (buffer.view(4, 2, 3, 3), last, buffer.view(4, 2, 3, 3)):
        buffer.zero_()
        backend.pull([grad], rows, torch.ones(4), scale=1.0, direction="sign")
        assert torch.equal(grad, weight.sign())


@pytest.mark.parametrize("other", ["shape", "dtype"])
def test_a_gradient_that_does_not_fit_is_refused(other):
    weight = torch.ones(2, 3)
    grad = torch.ones(2, 4) if other == "shape" else torch.ones(2, 3, dtype=torch.float64)
    backend = efreg.backends.select("triton", torch.device("cpu"))
    with pytest.raises(ValueError, match=f"a gradient has {other} .* its weight"):
        backend.pull([grad], Rows.of([weight], [0]), torch.ones(2), scale=1.0, direction="sign")


def test_weights_are_not_kept_alive(net):
    """A table knows addresses; a tensor at the same address of the same shape has the same table."""
    weight = torch.randn(3, 5)
    rows = Rows.of([weight], [0])
    first = table.table_of(rows)
    assert table.table_of(Rows.of([weight.detach()], [0])) is first
    assert table.table_of(Rows.of([weight[:2]], [0])) is not first
    assert table.table_of(Rows.of([weight.t()], [0])) is not first
    assert not any(value is weight for value in vars(first).values())


def test_tables_of_bare_tensors_are_few():
    weights = [torch.randn(2, 3) for _ in range(3 * table.TABLES)]
    for weight in weights:
        assert table.table_of(Rows.of([weight], [0]))
    assert len(table._tables) == table.TABLES


@pytest.fixture
def capture(monkeypatch):
    """What the library does while a CUDA graph is captured, on the CPU: a switch."""
    state = {"on": False}
    for module in (transfer, table, batches, serving):
        monkeypatch.setattr(module, "capturing", lambda device: state["on"])
    return lambda on: state.update(on=on)


def test_a_capture_needs_a_step_before(net, capture):
    optimizer = force_on(net, refresh=1)
    capture(True)
    with pytest.raises(RuntimeError, match="take one step, with gradients, before the capture"):
        step(net, optimizer)


@pytest.mark.parametrize("refresh", [2, 5])
def test_steps_between_charges_are_not_counted_by_a_graph(net, capture, refresh):
    optimizer = force_on(net, refresh=refresh)
    step(net, optimizer)
    capture(True)
    with pytest.raises(RuntimeError, match=f"refresh={refresh} counts steps"):
        step(net, optimizer)


def test_charges_once_are_taken_before_the_capture(net, capture):
    optimizer = force_on(net)
    step(net, optimizer)
    capture(True)
    step(net, optimizer)
    efreg.attach(net, 1e-12, backend="triton")
    with pytest.raises(RuntimeError, match="after a step that has taken the charges"):
        step(net, optimizer)


def test_what_a_graph_reads_is_its_own(net, capture):
    """What was sent in a capture arrives at the replay: eager steps send anew, and all of it is kept."""
    optimizer = force_on(net, refresh=1)
    step(net, optimizer)
    kept = len(transfer._captured)
    grads = [torch.zeros_like(p) for p in net.parameters()]
    (rows,) = [batch._rows for _, batches in _batches() for batch in batches]
    capture(True)
    step(net, optimizer, grads)
    inside = table.table_of(rows)._sent_targets.last
    assert len(transfer._captured) > kept
    capture(False)
    for grad in grads:
        grad.zero_()
    step(net, optimizer, grads)
    assert table.table_of(rows)._sent_targets.last is not inside


def _batches():
    (force,) = efreg.force.attachment._attached
    return force._serving._batches.values()


def test_numbers_are_sent_when_they_change():
    sent = transfer.Sent(torch.float32, torch.device("cpu"))
    first = sent([0.1, 0.2])
    assert sent([0.1, 0.2]) is first
    second = sent([0.1, 0.3])
    assert second is not first and first.tolist() == pytest.approx([0.1, 0.2])


def test_constants_are_made_once_and_not_in_a_capture(capture):
    cpu = torch.device("cpu")
    capture(True)
    inside = transfer.constant(0.625, torch.float32, cpu)
    assert transfer.constant(0.625, torch.float32, cpu) is not inside
    capture(False)
    assert transfer.constant(0.625, torch.float32, cpu) is transfer.constant(0.625, torch.float32, cpu)


def test_captured_numbers_lie_in_memory_that_was_pinned_before(monkeypatch):
    """During a capture nothing is pinned; each array has its own place, for ever; too little is said."""
    monkeypatch.setattr(transfer, "_arena", [torch.zeros(256, dtype=torch.uint8)])
    first = transfer._pinned_for_ever(torch.tensor([1, 2, 3]))
    second = transfer._pinned_for_ever(torch.tensor([0.5, 0.25]))
    assert first.tolist() == [1, 2, 3] and second.tolist() == [0.5, 0.25]
    assert second.data_ptr() - first.data_ptr() == 64
    with pytest.raises(RuntimeError, match="take one step outside a capture"):
        transfer._pinned_for_ever(torch.zeros(100))


def test_a_failed_sending_is_not_taken_for_a_success(monkeypatch):
    """Who tries again with gradients at the same addresses must not find those of before."""
    weight, grads = torch.ones(2, 3), [torch.zeros(2, 3), torch.zeros(2, 3)]
    backend, rows = efreg.backends.select("triton", torch.device("cpu")), Rows.of([weight], [0])
    backend.pull(grads[:1], rows, torch.ones(2), scale=1.0, direction="sign")
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "send", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            backend.pull(grads[1:], rows, torch.ones(2), scale=1.0, direction="sign")
    backend.pull(grads[1:], rows, torch.ones(2), scale=1.0, direction="sign")
    assert torch.equal(grads[1], torch.ones(2, 3)) and torch.equal(grads[0], torch.ones(2, 3))


@pytest.mark.parametrize(
    "coefficients, message",
    [
        (torch.ones(2, dtype=torch.float64), "coefficients are torch.float64 on cpu: give torch.float32"),
        (torch.ones(2, device="meta"), "coefficients are torch.float32 on meta"),
        (torch.ones(4)[::2], "must be contiguous"),
    ],
    ids=["dtype", "device", "strides"],
)
def test_coefficients_that_would_be_misread_are_refused(coefficients, message):
    backend, weight = efreg.backends.select("triton", torch.device("cpu")), torch.ones(2, 3)
    rows = Rows.of([weight], [0])
    for operation in (
        lambda: backend.pull([weight.clone()], rows, coefficients, scale=1.0, direction="sign"),
        lambda: backend.shrink(rows, coefficients, rates=[0.1], direction="sign"),
        lambda: backend.charge(Groups.of(rows), coefficients, efreg.Electrostatic(1.0)),
    ):
        with pytest.raises(ValueError, match=message):
            operation()


def test_a_table_made_in_inference_mode_serves_training():
    """Filters of a transposed convolution lie in a copy that the table keeps."""
    table._tables.clear()
    net = nn.Sequential(nn.ConvTranspose2d(2, 3, 3, bias=False))
    force = efreg.attach(net, law=efreg.L1(0.5), layers="0", backend="triton")
    with torch.inference_mode():
        force.energy()
    step(net, torch.optim.SGD(net.parameters(), lr=0.1))


def test_the_default_device_is_no_matter():
    """What is sent is made on the CPU, wherever new tensors would go."""
    with torch.device("meta"):
        sent = transfer.send([1, 2, 3], torch.int64, torch.device("cpu"))
        tiles = table._tiles([5, 1], [9, 300])
    assert sent.tolist() == [1, 2, 3]
    assert tiles.tolist() == [[0, 0], [0, 4], [1, 0]]
