"""What a GPU must show: every backend against float64, the same bits a hundred times, no waiting, graphs; and
networks planned, cut and proven there as on the CPU.

    TRITON_INTERPRET=0 pytest -n 0 -m gpu tests/test_gpu.py

The numbers are new at every run; the tests' names show the seed, and EFREG_TEST_SEED repeats it.
EFREG_TEST_DEVICE=cpu runs what can run on the CPU, the Triton kernels interpreted: that tests this file, not
the backends.
"""

import copy
import dataclasses
import functools
import math
import os
import time
import warnings

import numpy as np
import oracle
import pytest
import small_networks
import torch
from small_networks import head
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import efreg
from efreg import backends
from efreg.backends.reference import accumulator
from efreg.backends.rows import Groups, Rows
from efreg.force.laws import DIRECTIONS

pytestmark = pytest.mark.gpu

DEVICE = torch.device(os.environ.get("EFREG_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
BACKENDS = ["triton", "cuda", "reference"] if ON_GPU else ["triton", "reference"]
REPEATS = 100 if ON_GPU else 2
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SEED = int(os.environ.get("EFREG_TEST_SEED", time.time_ns() % 2**31))
SHAPES = [(1, 1), (9, 9), (4, 3, 3, 3), (6, 63), (3, 256), (2, 257), (130, 1), (0, 5), (5, 0)]
if ON_GPU:
    SHAPES += [(4096, 9), (257, 63), (130, 64, 1, 1), (33, 255), (17, 576), (64, 1000), (10, 4608)]
    SHAPES += [(3, 25000), (512, 1024), (1, 100000), (2048, 4)]
LAWS = [
    efreg.Electrostatic(1e-12),
    efreg.Electrostatic(1e-12, sign="sum"),
    efreg.Electrostatic(1e-12, softening=0.3),
    efreg.Ladder(1e-2, power=2),
    efreg.L1(1e-2),
]

ROUNDINGS = {LAWS[2]: 16, LAWS[3]: 4 + 2 * 2 * 11}
"""√(a² + b²) counts twice; x² as 2^(2 log₂ x) has the error of 2 log₂ N, N up to 2,048 and more."""

only_on_a_gpu = pytest.mark.skipif(not ON_GPU, reason="CPU tensors have no streams and no graphs")


@pytest.fixture(autouse=True, params=[SEED], ids="seed={}".format)
def new_numbers(request):
    torch.manual_seed(request.param)


@functools.cache
def had(name):
    """A backend, or why it cannot be had: found out once."""
    try:
        return backends.select(name, DEVICE)
    except efreg.BackendUnavailable as error:
        return error


def need(name):
    """The backend; the test is skipped without it, unless EFREG_REQUIRE names it."""
    found = had(name)
    if isinstance(found, Exception):
        if name in os.environ.get("EFREG_REQUIRE", "").split(","):
            raise found
        pytest.skip(str(found))
    return found


@pytest.fixture(params=BACKENDS)
def backend(request):
    return need(request.param)


def exactly(tensor):
    """A copy in float64, on the CPU."""
    return tensor.to("cpu", torch.float64, copy=True)


def eps(dtype):
    return torch.finfo(dtype).eps


def rounding(backend, exact, dtype):
    """Half the distance between neighbours; Triton's interpreter cuts bfloat16 off and needs the whole."""
    part = 1.0 if (dtype, ON_GPU, backend.name) == (torch.bfloat16, False, "triton") else 0.5
    return part * eps(dtype) * exact.abs().clamp_min(torch.finfo(dtype).tiny)


def tensors(shapes, dtype):
    return [torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE) for shape in shapes]


def misaligned(tensor, shift):
    """A copy that begins `shift` numbers into a buffer."""
    buffer = torch.full((tensor.numel() + shift + 8,), math.nan, dtype=tensor.dtype, device=tensor.device)
    return buffer[shift : shift + tensor.numel()].view(tensor.shape).copy_(tensor)


def force(backend, grads, rows, coefficients, law, scale):
    """`Backend.force` with each row a group of its own."""
    backend.force(grads, rows, Groups.of(rows), coefficients, law, scale=scale)


def rows_of(weights):
    return Rows.of(weights, [0] * len(weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_force_against_float64(backend, dtype, shift, law):
    """Magnitudes against exact sums, coefficients against the law on these, gradients against both."""
    weights, acc = [misaligned(w, shift) for w in tensors(SHAPES, dtype)], accumulator(dtype)
    grads = [misaligned(g, shift) for g in tensors(SHAPES, dtype)]
    before, rows = [exactly(g) for g in grads], rows_of(weights)
    c = torch.full((sum(map(len, weights)),), math.nan, dtype=acc, device=DEVICE)
    force(backend, grads, rows, c, law, scale=2.0)
    measured = rows.charges(*backend.measure(rows, sign=law.sign, norm=False))
    for w, g, g0, charges, cut in zip(weights, grads, before, measured, c.split(rows.filters), strict=True):
        m, s, w = exactly(charges.magnitude), exactly(charges.sign), w.cpu()
        plain = w.to(acc).abs().flatten(1).sum(1).double() if w.numel() else m
        exact = torch.from_numpy(oracle.magnitudes(w)).double()
        # torch sums in a tree on a GPU: half a rounding for each of its levels.
        levels = math.log2(max(charges.size, 4)) if (backend.name, ON_GPU) == ("reference", True) else 2
        bound = torch.maximum(2 * (plain - exact).abs().max() if len(m) else m, levels / 2 * eps(acc) * exact)
        assert ((m - exact).abs() <= bound).all()
        assert s.tolist() == oracle.signs(w, by=law.sign).tolist()
        expected = law.of(efreg.Charges(m, s, charges.size))
        roundings = ROUNDINGS.get(law, 4)
        torch.testing.assert_close(exactly(cut), expected, rtol=roundings * eps(acc), atol=0)
        added = 2 * exactly(cut).view(-1, *[1] * (w.ndim - 1)) * w.double().sign()
        allowed = rounding(backend, g0 + added, dtype) + 4 * eps(acc) * (g0.abs() + added.abs())
        overflows = (g0 + added).abs() > torch.finfo(dtype).max
        assert (((exactly(g) - (g0 + added)).abs() <= allowed) | overflows).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", ["count", "sum"])
def test_groups_against_float64(backend, dtype, sign):
    """Units that rows of several sizes write, in another order: sums in float64, then the law on these."""
    sizes, shapes = [40, 7], [(40, 63), (45, 300), (7, 9), (9, 1100), (7, 1)]
    owners, starts, acc = [0, 0, 1, 1, 1], [0, 40], accumulator(dtype)
    units = []
    for (filters, _), owner in zip(shapes, owners, strict=True):
        found = torch.full((filters,), -1)
        found[torch.randperm(filters)[: sizes[owner]]] = starts[owner] + torch.randperm(sizes[owner])
        units.append(found.to(torch.int32))
    weights, grads = tensors(shapes, dtype), [torch.zeros_like(w) for w in tensors(shapes, dtype)]
    rows = Rows(weights, [0] * len(weights), units)
    law, c = efreg.Electrostatic(1e-12, sign=sign), torch.full((47,), math.nan, dtype=acc, device=DEVICE)
    backend.force(grads, rows, Groups(rows, sizes, starts, owners), c, law, scale=2.0)
    for group, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        own = [(exactly(w), u) for w, u, g in zip(weights, units, owners, strict=True) if g == group]
        w = torch.stack(
            [torch.cat([x[u == n].flatten() for x, u in own]) for n in range(start, start + size)]
        )
        exact = oracle.coefficients(oracle.magnitudes(w), oracle.signs(w, by=sign), 1e-12).astype("float64")
        rtol = 1e-9 if acc == torch.float64 else 1e-3  # δc/c = 2 δr/r: charges of neighbouring units
        torch.testing.assert_close(
            exactly(c[start : start + size]), torch.from_numpy(exact), rtol=rtol, atol=0
        )
    for w, g, u in zip(weights, grads, units, strict=True):
        each = torch.where(u < 0, 0, exactly(c)[u.clamp_min(0).long()])
        added = 2 * each[:, None] * exactly(w).sign()
        assert ((exactly(g) - added).abs() <= rounding(backend, added, dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_pull_and_shrink_against_float64(backend, dtype, shift, direction):
    weights, acc = [misaligned(w, shift) for w in tensors(SHAPES, dtype)], accumulator(dtype)
    grads, rows = [misaligned(g, shift) for g in tensors(SHAPES, dtype)], rows_of(weights)
    c = torch.rand(sum(map(len, weights)), device=DEVICE).to(acc)
    old = [(exactly(w), exactly(g)) for w, g in zip(weights, grads, strict=True)]
    backend.pull(grads, rows, c, scale=3.0, direction=direction)
    backend.shrink(rows, c, rates=[0.7] * len(weights), direction=direction)
    for w, g, (w0, g0), cut in zip(weights, grads, old, c.split(rows.filters), strict=True):
        cut = exactly(cut).view(-1, *[1] * (w0.ndim - 1))
        norm = w0.flatten(1).norm(dim=1).view(cut.shape)
        radial = direction == "radial"
        along = torch.where(norm > 0, w0 / norm, 0) if radial else w0.sign()
        pulled = g0 + 3 * cut * along
        shrunk = w0 - torch.minimum(0.7 * cut, norm if radial else w0.abs()) * along
        if direction == "share":
            pulled, shrunk = g0 * (1 - 3 * cut).clamp_min(0), w0 * (1 - 0.7 * cut)
        roundings = 4 + math.sqrt(w0[0].numel() if len(w0) else 0) if radial else 4
        for got, want, terms in [
            (g, pulled, g0.abs() * (1 + 3 * cut) + 3 * cut),
            (w, shrunk, w0.abs() + cut),
        ]:
            allowed = rounding(backend, want, dtype) + roundings * eps(acc) * terms
            assert ((exactly(got) - want).abs() <= allowed).all()


def test_a_radial_shrink_ends_at_zero(backend):
    weight = torch.full((3, 7), 1e-25, device=DEVICE)
    backend.shrink(rows_of([weight]), torch.full((3,), 0.1, device=DEVICE), rates=[0.1], direction="radial")
    assert not weight.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(backend, dtype):
    weights = [w for w in tensors(SHAPES, dtype) if w.numel()]
    for w, charges in zip(
        weights,
        rows_of(weights).charges(*backend.measure(rows_of(weights), sign="sum", norm=True)),
        strict=True,
    ):
        exact = w.double().flatten(1).norm(dim=1).cpu().numpy()
        np.testing.assert_allclose(
            charges.norm.double().cpu().numpy(), exact, rtol=8 * eps(accumulator(dtype))
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_or_not_the_bits_are_the_same(dtype):
    """The order of summation is one; so are the two compiled backends, where both are."""
    weights, found = tensors(SHAPES, dtype), []
    for name in [name for name in BACKENDS if name != "reference"]:
        for shift in range(5 if ON_GPU else 2):
            rows = rows_of([misaligned(w, shift) for w in weights])
            found.append(need(name).measure(rows, sign="sum", norm=True))
    for statistics in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(statistics, found[0], strict=True))


@pytest.mark.parametrize(
    "orders", [("contiguous", "last"), ("last", "contiguous"), ("last", "last")], ids=str
)
def test_weight_and_gradient_of_different_strides(backend, orders):
    formats = {"contiguous": torch.contiguous_format, "last": torch.channels_last}
    shape = (6, 8, 3, 3) if ON_GPU else (2, 4, 3, 3)
    weight, grad = (
        t.contiguous(memory_format=formats[o])
        for t, o in zip(tensors([shape] * 2, torch.float32), orders, strict=True)
    )
    c = torch.rand(shape[0], device=DEVICE)
    expected = grad + c.view(-1, 1, 1, 1) * weight.sign()
    backend.pull([grad], rows_of([weight]), c, scale=1.0, direction="sign")
    torch.testing.assert_close(grad, expected)


def test_a_hundred_runs_give_the_same_bits(backend):
    weights = tensors(SHAPES, torch.float32)
    start, found = tensors(SHAPES, torch.float32), []
    for _ in range(REPEATS):
        grads, c = [g.clone() for g in start], torch.empty(sum(map(len, weights)), device=DEVICE)
        force(backend, grads, rows_of(weights), c, LAWS[0], scale=1.0)
        found.append(torch.cat([c, *(g.flatten() for g in grads)]))
    assert all(torch.equal(f, found[0]) for f in found[1:])


class Net(nn.Sequential):
    def __init__(self, dtype=torch.float32):
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()]
        super().__init__(*layers, nn.Linear(8 * 16, 4))
        self.to(DEVICE, dtype)

    def whole_filters(self):
        """What attaches a ladder to the first convolution, its bias and its norm."""
        x = torch.randn(2, 3, 8, 8, device=DEVICE, dtype=self[0].weight.dtype)
        plan = efreg.plan(self, {"0": 0.5}, example_inputs=x)
        return {"law": efreg.Ladder(1e-2), "layers": plan, "scope": "filter"}


def training(net, optimizer, batch):
    loss = net(batch).square().mean()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("refresh", [None, 1, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_training_as_the_reference_does(name, update, refresh, whole):
    """A hundred steps of one network, each backend from the same start."""
    need(name)
    start, batches, ends = Net(torch.float64), tensors([(4, 3, 8, 8)] * REPEATS, torch.float64), []
    for backend in ("reference", name):
        net = copy.deepcopy(start)
        acting = net.whole_filters() if whole else {"alpha": 1e-13}
        efreg.attach(net, **acting, refresh=refresh, update=update, backend=backend)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        for batch in batches:
            optimizer.zero_grad()
            training(net, optimizer, batch)
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-9)


@only_on_a_gpu
@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("refresh", [None, 1, 2])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_no_step_synchronises(backend, update, refresh, fused, whole):
    """Not with gradients that move, a scale, a rate and an α that change; found_inf stays on the device."""
    net, alpha = Net(), torch.zeros((), device=DEVICE)
    acting = net.whole_filters() | {"law": efreg.Ladder(alpha)} if whole else {"alpha": 1e-12}
    efreg.attach(net, **acting, refresh=refresh, update=update, backend=backend.name)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=fused)
    batch, keep = torch.randn(4, 3, 8, 8, device=DEVICE), []
    for step in range(6):
        optimizer.zero_grad(set_to_none=True)
        keep.append(torch.empty(100 * step + 1, device=DEVICE))
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        alpha.fill_(1e-12 * step)
        if fused:
            optimizer.grad_scale = torch.full((), 2.0**step, device=DEVICE)
            optimizer.found_inf = torch.full((), float(step == 4), device=DEVICE)
        loss = net(batch).square().mean()
        loss.backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@only_on_a_gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("refresh", [None, 1])
@pytest.mark.parametrize("whole", [False, True])
@torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
def test_a_captured_step_replays_as_eager_steps_do(name, update, refresh, whole):
    """Two captures, gradients of each at addresses of its own, then a hundred replays of both in turns.

    Every sign that flips makes a rounding larger, so α is small and the convolutions' own sums are fixed.
    """
    need(name)
    start, batch = Net(), torch.randn(4, 3, 8, 8, device=DEVICE)
    ends = []
    for captured in (False, True):
        net = copy.deepcopy(start)
        acting = net.whole_filters() | {"law": efreg.Ladder(1e-5)} if whole else {"alpha": 1e-15}
        efreg.attach(net, **acting, refresh=refresh, update=update, backend=name)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

        def step(net=net, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            training(net, optimizer, batch)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        steps = [step, step]
        if captured:
            graphs, gradients = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()], []
            for graph in graphs:
                with torch.cuda.graph(graph):
                    step()
                gradients.append([p.grad for p in net.parameters()])
            assert gradients[0][0].data_ptr() != gradients[1][0].data_ptr()
            steps = [graph.replay for graph in graphs]
        for i in range(REPEATS):
            steps[i % 2]()
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_flush_denormal(False)


@only_on_a_gpu
@pytest.mark.parametrize("update", ["gradient", "proximal"])
@pytest.mark.parametrize("refresh", [None, 1])
def test_epochs_of_graphs_are_epochs_of_steps(in_float64, update, refresh):
    """21 batches of 64 digits and one of 3, twice; the rate is a power of two, exact in float32."""
    pytest.importorskip("sklearn")
    from efreg.lab import checkpoints, engine

    force = {"alpha": 1e-13, "update": update, "refresh": refresh}
    course = {"epochs": 2, "batch_size": 64, "schedule": "constant", "lr": 0.0625}
    chosen = checkpoints.Settings(model="resnet14", device="cuda", **force, **course)
    ends = []
    for step in ("eager", "graph"):
        run = engine.Run(dataclasses.replace(chosen, step=step))
        assert all(math.isfinite(row["loss"]) for row in run.epochs())
        ends.append(torch.cat([tensor.double().flatten() for tensor in run.model.state_dict().values()]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-9)


@only_on_a_gpu
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_rate_that_lies_on_the_device(backend, shape):
    """A capturable optimizer's learning rate: read there, by nobody else."""
    net, batch = Net(), torch.randn(4, 3, 8, 8, device=DEVICE)
    efreg.attach(net, law=efreg.L1(1e-3), update="proximal", backend=backend.name)
    rate = torch.full(shape, 0.5, device=DEVICE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, capturable=True)
    training(net, optimizer, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        net[0].weight.data.fill_(1.0)
        optimizer.zero_grad()
        net[0].weight.grad = torch.zeros_like(net[0].weight)
        rate.zero_()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(net[0].weight, torch.ones_like(net[0].weight))


@only_on_a_gpu
def test_what_a_graph_cannot_do_is_refused():
    net, batch = Net(), torch.randn(4, 3, 8, 8, device=DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    efreg.attach(net, 1e-12, refresh=5)
    training(net, optimizer, batch)
    with (
        pytest.raises(RuntimeError, match="refresh=5 counts steps"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        training(net, optimizer, batch)


@only_on_a_gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_another_stream_and_another_layout_later(name):
    """The table follows a model that moves: to half, to channels_last, and back."""
    need(name)
    net, batch = Net(), torch.randn(4, 3, 8, 8, device=DEVICE)
    force = efreg.attach(net, 1e-12, refresh=1, backend=name)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    for move in (
        lambda: net.to(memory_format=torch.channels_last),
        lambda: net.to(torch.bfloat16),
        lambda: net.float(),
        lambda: net[0].weight.requires_grad_(False),
        lambda: net[0].weight.requires_grad_(True),
    ):
        move()
        optimizer.zero_grad()
        net(batch.to(net[3].weight.dtype)).square().mean().backward()
        before = net[3].weight.grad.clone()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            optimizer.step()
        torch.cuda.synchronize()
        c = force.charges()["3"].coefficient.view(-1, 1, 1, 1)
        expected = (before.double() + c.double() * net[3].weight.double().sign()).to(before.dtype)
        torch.testing.assert_close(net[3].weight.grad, expected)


@only_on_a_gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_nothing_is_compiled_after_the_first_step(name):
    """200 epochs of a learning-rate schedule, another α at each."""
    need(name)
    net, batch = Net(), torch.randn(4, 3, 8, 8, device=DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    training(net, optimizer, batch)
    kernels = None
    for step in range(200):
        with efreg.attach(net, 1e-12 * (step + 1), refresh=1, update="proximal", backend=name):
            training(net, optimizer, batch)
        schedule.step()
        if name == "triton":
            from efreg.kernels import force

            compiled = [len(launcher._compiled) for launcher in (force._charge, force._shrink)]
            kernels = kernels or compiled
            assert compiled == kernels


class Heads(nn.Module):
    """Attention of one's own behind a linear layer, with a bias for each head where there is a `length`."""

    def __init__(self, length=None, dtype=None, **options):
        super().__init__()
        self.before, self.q, self.k, self.v = nn.Linear(8, 32), *(nn.Linear(32, 32) for _ in range(3))
        self.out, self.heads, self.dtype, self.options = nn.Linear(32, 5), 4, dtype, options
        self.register_buffer("bias", None if length is None else torch.randn(1, 4, length, length))

    def forward(self, x):
        x = self.before(x).relu()
        dtype = self.dtype or x.dtype
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2).to(dtype) for f in (self.q, self.k, self.v)
        )
        bias = None if self.bias is None else self.bias.to(dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **self.options)
        return self.out(y.transpose(1, 2).flatten(2).to(x.dtype))


class Cell(nn.Module):
    """A cell that takes two steps from a state that layers of their own write."""

    def __init__(self, cell):
        super().__init__()
        self.input, self.h, self.c = nn.Linear(8, 16), nn.Linear(8, 12), nn.Linear(8, 12)
        self.cell, self.out = cell(16, 12), nn.Linear(12, 5)

    def forward(self, x):
        state, x = (self.h(x), self.c(x)), self.input(x).relu()
        for _ in range(2):
            if isinstance(self.cell, nn.LSTMCell):
                state = self.cell(x, state)
            else:
                state = self.cell(x, state[0]), state[1]
        return self.out(state[0])


def vision():
    """torchvision's networks, made small."""
    models = pytest.importorskip("torchvision.models")
    from torchvision.models import efficientnet, regnet, resnet

    inverted = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2]]
    scaled = [efficientnet.MBConvConfig(4, 3, 2, c, 16, 2) for c in (32, 16)]
    stages = regnet.BlockParams.from_init_params(
        depth=6, w_0=16, w_a=12.0, w_m=2.0, group_width=8, se_ratio=0.25
    )
    return {
        "resnet": lambda: models.ResNet(resnet.BasicBlock, [1, 2, 1, 1], num_classes=10),
        "mobilenet_v2": lambda: models.MobileNetV2(10, 0.5, inverted),
        "efficientnet": lambda: models.EfficientNet(scaled, 0.2, num_classes=10),
        "regnet": lambda: models.RegNet(stages, num_classes=10, stem_width=16),
    }


OWN = {
    "heads": (Heads, (2, 5, 8)),
    "heads_causal": (lambda: Heads(is_causal=True), (2, 5, 8)),
    "heads_scale": (lambda: Heads(scale=0.3), (2, 5, 8)),
    "heads_bias": (lambda: Heads(5), (2, 5, 8)),
    "heads_bias_aligned": (lambda: Heads(16), (2, 16, 8)),
    "lstm_cell": (lambda: Cell(nn.LSTMCell), (3, 8)),
    "gru_cell": (lambda: Cell(nn.GRUCell), (3, 8)),
    "rnn_cell": (lambda: Cell(nn.RNNCell), (3, 8)),
    "rms_norm": (
        lambda: nn.Sequential(
            nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 24), nn.SiLU(), nn.Linear(24, 5)
        ),
        (3, 8),
    ),
}
VISION = ["resnet", "mobilenet_v2", "efficientnet", "regnet"]
OTHERS = (
    "returns",
    "scripted",
    "fourier",
    "graph",
)  # complex weights stay float32, the graph's edges on the CPU
SMALL = [name for name in small_networks.NETWORKS if not name.startswith(OTHERS)]


def network(name):
    """A network and its inputs, on the CPU; whatever its numbers agree on is random."""
    if name in VISION:
        model, shapes = vision()[name](), [(2, 3, 32, 32)]
    elif name in OWN:
        model, shapes = OWN[name][0](), [OWN[name][1]]
    else:
        kind = small_networks.NETWORKS[name]
        model, shapes = kind.build(), kind.inputs
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() == tensor.max():
                tensor.uniform_(0.5, 1.5)
    return model, tuple(map(torch.randn, shapes))


def held(model, inputs, *, tolerance=1e-9, **how):
    """Half of every group goes: the same units as on the CPU, and what is left is the same function.

    tolerance: of the largest output; float64 rounds to 1e-16, and random weights enlarge that.
    """
    here, there = copy.deepcopy(model), copy.deepcopy(model).to(DEVICE)
    x_here, x_there = inputs, tuple(x.to(DEVICE) for x in inputs)
    expected = efreg.plan(here, ratio=0.5, example_inputs=x_here, **how)
    plan = efreg.plan(there, ratio=0.5, example_inputs=x_there, **how)
    assert plan.cuts == expected.cuts
    assert [(c.group.writers, c.group.readers) for c in plan.cuts] == [
        (c.group.writers, c.group.readers) for c in expected.cuts
    ]
    assert plan.parameters == expected.parameters
    assert [x.group for x in plan.left_out] == [x.group for x in expected.left_out]
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    assert plan.macs == expected.macs or recurrent  # one operation for cuDNN, which nobody looks into
    here = efreg.prune(here, plan, example_inputs=x_here)
    there = efreg.prune(there, plan, example_inputs=x_there)
    assert {p.device.type for p in there.parameters()} == {DEVICE.type}
    state = here.state_dict()
    assert there.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor.cpu(), state[name]) for name, tensor in there.state_dict().items())
    outputs = [
        tree_leaves(copy.deepcopy(net).double().eval()(*(x.double() for x in given)))
        for net, given in ((here, x_here), (there, x_there))
    ]
    for y, z in zip(*outputs, strict=True):
        torch.testing.assert_close(z.cpu(), y, rtol=0, atol=tolerance * y.abs().max().item())
    return there, x_there, plan


def trained(model, inputs):
    """One step of SGD."""
    outputs = [y for y in tree_leaves(model.train()(*inputs)) if y.is_floating_point()]
    sum(y.float().square().mean() for y in outputs).backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [*SMALL, *VISION, *OWN])
def test_networks_are_pruned_as_on_the_cpu(name):
    model, inputs = network(name)
    tolerance = eps(torch.float32) if name == "weight_norm" else 1e-9  # on a GPU it takes roots in float32
    pruned, inputs, _ = held(model, inputs, tolerance=tolerance)
    trained(pruned, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*VISION, "unet_group", "crnn_lstm", "crnn_gru", "encoder_layer", "heads"])
def test_networks_in_half_and_channels_last(name, dtype):
    model, inputs = network(name)
    model = model.to(dtype, memory_format=torch.channels_last)
    pruned, inputs, _ = held(model, tuple(x.to(dtype) for x in inputs))
    for parameter in pruned.parameters():
        assert parameter.dtype == dtype
        assert parameter.ndim != 4 or parameter.is_contiguous(memory_format=torch.channels_last)
    trained(pruned, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["crnn_lstm", "crnn_gru", "crnn_rnn"])
def test_recurrent_weights_stay_in_one_piece(name, dtype):
    """cuDNN warns where they are not, and copies them at every call."""
    model, inputs = network(name)
    model, inputs = model.to(DEVICE, dtype), tuple(x.to(DEVICE, dtype) for x in inputs)
    with warnings.catch_warnings(action="error"):
        plan = efreg.plan(model, ratio=0.5, example_inputs=inputs)
        assert "recurrent" in plan.cuts[-1].group.readers
        efreg.prune(model, plan, example_inputs=inputs)(*inputs)


@only_on_a_gpu
@pytest.mark.parametrize(
    "kernel", [k for k in SDPBackend.__members__.values() if k.name.endswith("ION")], ids=str
)
def test_every_kernel_of_attention_is_known(kernel):
    """The same groups whichever computes it; half-precision for those that want it."""
    dtype = torch.float32 if kernel is SDPBackend.EFFICIENT_ATTENTION else torch.bfloat16
    model, x = Heads(dtype=dtype), torch.randn(2, 64, 8)
    expected = efreg.inspect(model, x)
    with sdpa_kernel(kernel):
        found = efreg.inspect(model.to(DEVICE), x.to(DEVICE))
    assert [(g.name, g.size, g.writers, g.readers) for g in found.groups] == [
        (g.name, g.size, g.writers, g.readers) for g in expected.groups
    ]


@pytest.mark.parametrize(
    "options", [{"fused": True}, {"foreach": True}, {"fused": True, "amsgrad": True}], ids=str
)
def test_a_fused_optimizer_moves_and_steps_on(options):
    """Its moments are those of what stays; the next step is that of a plain AdamW in float64."""
    model, inputs = network("resnet")
    model, inputs = model.to(DEVICE), tuple(x.to(DEVICE) for x in inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)
    for _ in range(3):
        optimizer.zero_grad()
        training(model, optimizer, inputs[0])
    plan = efreg.plan(model, ratio=0.5, example_inputs=inputs)
    cut = next(cut for cut in plan.cuts if cut.name == "layer1.0.conv1")
    gone = plan.filters(model)[cut.name]
    stays = torch.tensor([n for n in range(cut.group.size) if n not in gone], device=DEVICE)
    moments = {
        (name, key): optimizer.state[model.get_parameter(name)][key].index_select(axis, stays)
        for name, axis in (
            ("layer1.0.conv1.weight", 0),
            ("layer1.0.bn1.bias", 0),
            ("layer1.0.conv2.weight", 1),
        )
        for key in ("exp_avg", "exp_avg_sq")
    }
    pruned = efreg.prune(model, plan, example_inputs=inputs, optimizer=optimizer)
    for (name, key), moment in moments.items():
        found = optimizer.state[pruned.get_parameter(name)][key]
        if "conv" in name:  # channels on the other axis are cut, too
            assert set(found.flatten().tolist()) <= set(moment.flatten().tolist())
        else:
            assert torch.equal(found, moment)
    twin = copy.deepcopy(pruned).cpu().double()
    plain = torch.optim.AdamW(
        twin.parameters(), lr=1e-3, foreach=False, amsgrad=options.get("amsgrad", False)
    )
    state = copy.deepcopy(optimizer.state_dict())
    plain.load_state_dict(state | {"param_groups": plain.state_dict()["param_groups"]})
    optimizer.zero_grad()
    pruned.train()(*inputs).square().mean().backward()
    for p, q in zip(pruned.parameters(), twin.parameters(), strict=True):
        q.grad = exactly(p.grad)
    optimizer.step()
    plain.step()
    for p, q in zip(pruned.parameters(), twin.parameters(), strict=True):
        # A step is at most lr / √(1 − β₂) long; a dozen roundings lie in it and one in the sum.
        torch.testing.assert_close(
            exactly(p), q.detach(), rtol=eps(p.dtype), atol=1e-3 / 0.03 * 12 * eps(p.dtype)
        )


@pytest.mark.parametrize("name", ["resnet", "crnn_lstm", "heads"])
def test_the_callers_settings_do_not_matter_and_stay(name):
    """TF32, cuDNN's search among algorithms and autocast."""
    model, inputs = network(name)
    model, inputs = model.to(DEVICE), tuple(x.to(DEVICE) for x in inputs)
    plan = efreg.plan(model, ratio=0.5, example_inputs=inputs)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                assert efreg.plan(model, ratio=0.5, example_inputs=inputs).cuts == plan.cuts
                pruned = efreg.prune(model, plan, example_inputs=inputs)
            assert torch.backends.cuda.matmul.allow_tf32
            assert torch.backends.cudnn.allow_tf32
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
    trained(pruned, inputs)


@only_on_a_gpu
def test_a_network_on_two_devices():
    """Every tensor stays where it was; half of both parts goes."""
    model, (x,) = network("conv1d")
    model = nn.Sequential(*model[:4].to(DEVICE), small_networks.Function(lambda x: x.cpu()), *model[4:])
    plan = efreg.plan(model, ratio=0.5, example_inputs=x.to(DEVICE))
    assert [cut.removed for cut in plan.cuts] == [8, 16]
    pruned = efreg.prune(model, plan, example_inputs=x.to(DEVICE))
    assert [p.device.type for p in pruned.parameters()] == [p.device.type for p in model.parameters()]
    trained(pruned, [x.to(DEVICE)])


@only_on_a_gpu
def test_inputs_on_another_device_are_named():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), head(8)).to(DEVICE), torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match="on cpu, with its parameters on cuda:0"):
        efreg.plan(model, ratio=0.5, example_inputs=x)


@pytest.mark.parametrize("name", ["resnet", "crnn_lstm", "encoder_layer"])
def test_a_pruned_network_is_saved_and_loaded(name, tmp_path):
    """From the GPU into a network of full size on the CPU, and back."""
    model, inputs = network(name)
    pruned, inputs, _ = held(model, inputs)
    efreg.save(pruned, tmp_path / "pruned.safetensors")
    for device in ("cpu", DEVICE):
        loaded = efreg.load(copy.deepcopy(model).to(device), tmp_path / "pruned.safetensors")
        state = pruned.state_dict()
        assert loaded.state_dict().keys() == state.keys()
        assert all(torch.equal(x.cpu(), state[n].cpu()) for n, x in loaded.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(*inputs), pruned.eval()(*inputs))
