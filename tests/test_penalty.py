"""`penalty`: Eq. 7 as a term of the loss, its gradient Eq. 10, and the operators that it is made of."""

import copy

import oracle
import pytest
import torch
from torch import nn

import efreg
from efreg.force import penalty as ops

ALPHA = 1e-12
LAW = efreg.Electrostatic(ALPHA)


def weights(dtype=torch.float64):
    return [
        torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_()
        for s in [(8, 3, 3, 3), (5, 8, 3, 3), (1, 4)]
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_value_and_gradient(dtype):
    """α Σ F, and c_n · sgn(w) with charges and distances held constant."""
    ws = weights(dtype)
    term = efreg.penalty(ws, LAW)
    expected = sum(
        float((oracle.coefficients(m, oracle.signs(w), ALPHA) * m).sum())
        for w in ws
        for m in [oracle.magnitudes(w)]
    )
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert term.shape == () and term.item() == pytest.approx(expected, rel=tolerance)
    (3 * term).backward()
    for w in ws:
        expected_grad = (3 * oracle.force(w, ALPHA)).to(dtype)
        torch.testing.assert_close(
            w.grad, expected_grad, rtol=max(tolerance, torch.finfo(dtype).eps), atol=1e-12
        )


def test_gradient_is_that_of_the_weighted_l1_norm():
    """gradcheck of Σ_n c_n.detach() · ‖w_n‖₁, which Eq. 10 is the gradient of."""
    w = weights()[0]
    c = LAW.coefficients(efreg.measure(w))
    weighted = (c.view(-1, 1, 1, 1) * w.abs()).sum()
    (expected,) = torch.autograd.grad(weighted, w)
    (found,) = torch.autograd.grad(efreg.penalty(w, LAW), w)
    torch.testing.assert_close(found, expected)


def test_l1_passes_gradcheck():
    """L1's coefficients are constants, so here the gradient is the true one."""
    assert torch.autograd.gradcheck(lambda *ws: efreg.penalty(ws, efreg.L1(0.1)), weights())


def test_under_sgd_it_trains_as_attach_with_fresh_charges():
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).double()
    twin = copy.deepcopy(net)
    efreg.attach(net, law=LAW, refresh=1)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.05, momentum=0.9) for n in (net, twin)]
    for _ in range(20):
        x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
        for model, optimizer in zip((net, twin), optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            (loss if model is net else loss + efreg.penalty(model, LAW)).backward()
            optimizer.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_layers_are_chosen_as_in_attach():
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3)).double()
    one = efreg.penalty(net, LAW, layers="1")
    torch.testing.assert_close(one, efreg.penalty(net[1].weight, LAW))
    torch.testing.assert_close(efreg.penalty(net, LAW), one + efreg.penalty(net[0].weight, LAW))


def test_weights_of_several_dtypes():
    a, b = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9)
    torch.testing.assert_close(efreg.penalty([a, b], LAW), efreg.penalty(a, LAW) + efreg.penalty(b, LAW))


def test_differentiating_twice_raises():
    w = weights()[0]
    loss = w.square().sum() + efreg.penalty(w, LAW)
    (grad,) = torch.autograd.grad(loss, w, create_graph=True)
    with pytest.raises(RuntimeError, match="efreg.pull.*no autograd formula"):
        grad.square().sum().backward()


@pytest.mark.parametrize("kind", ["weights", "model"])
def test_compiles_into_one_graph(kind):
    """The compiled function's value and gradient are those of the eager one."""
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 4, 3))
    given = net if kind == "model" else [m.weight for m in net]

    def loss(x):
        return net(x).square().mean() + efreg.penalty(given, LAW)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 1, 8, 8)
    values, grads = [], []
    for function in (loss, compiled):
        net.zero_grad()
        value = function(x)
        value.backward()
        values.append(value.detach())
        grads.append([p.grad.clone() for p in net.parameters()])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*grads)
    assert net[0].weight.grad.abs().sum() > 0


@pytest.mark.slow
def test_compiles_with_inductor():
    ws = [w.detach().float().requires_grad_() for w in weights()]
    torch._dynamo.reset()
    compiled = torch.compile(lambda: efreg.penalty(ws, LAW), fullgraph=True)
    compiled().backward()
    for w in ws:
        torch.testing.assert_close(w.grad.double(), oracle.force(w, ALPHA), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("law", [LAW, efreg.L1(1e-2), efreg.Electrostatic(ALPHA, softening=0.2, sign="sum")])
def test_every_backend_gives_the_laws_energy_and_force(backend, law, monkeypatch):
    """Σ c_n · ‖w_n‖₁ and c_n · sgn(w) by the law's own method, in float64."""
    monkeypatch.setenv("EFREG_BACKEND", backend)
    ws = weights()
    efreg.penalty(ws, law).backward()
    energy = 0
    for w in ws:
        charges = efreg.measure(w)
        signs = oracle.signs(w, by=law.sign)
        c = law.coefficients(efreg.Charges(charges.magnitude, torch.from_numpy(signs), charges.size))
        energy += (c * charges.magnitude).sum()
        torch.testing.assert_close(w.grad, c.view(-1, *[1] * (w.ndim - 1)) * w.detach().sign())
    torch.testing.assert_close(efreg.penalty(ws, law).detach(), energy)


SAMPLES = [([(8, 3, 3, 3), (5, 8)], [0, 0]), ([(6, 4, 3, 3)], [1]), ([(0, 4), (3, 0)], [0, 0])]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("shapes", "dims"), SAMPLES, ids=str)
def test_opcheck(shapes, dims, dtype):
    """Schema, fake, autograd registration and tracing of the operators."""
    ws = [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]
    for sign in ("count", "sum"):
        for norm in (False, True):
            torch.library.opcheck(ops.measure_op, (ws, dims, sign, norm))
    c = torch.rand(
        sum(w.shape[d] for w, d in zip(ws, dims, strict=True)),
        dtype=efreg.backends.reference.accumulator(dtype),
    )
    for direction in ("sign", "radial"):
        torch.library.opcheck(ops.pull_op, (ws, c, dims, direction))


def test_operators_refuse_what_they_cannot_serve():
    measure = torch.ops.efreg.measure
    with pytest.raises(ValueError, match="no weights"):
        measure([], [], "count", False)
    with pytest.raises(ValueError, match="2 dims"):
        measure([torch.ones(2, 2)], [0, 0], "count", False)
    with pytest.raises(TypeError, match="int64"):
        measure([torch.ones(2, 2).long()], [0], "count", False)
    with pytest.raises(ValueError, match="share dtype"):
        measure([torch.ones(2, 2), torch.ones(2, 2).double()], [0, 0], "count", False)


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="law is 'l1'"):
        efreg.penalty(torch.ones(2, 2), "l1")
    with pytest.raises(ValueError, match="no weights"):
        efreg.penalty([], LAW)
    with pytest.raises(ValueError, match="weight 1 has shape"):
        efreg.penalty([torch.ones(2, 2), torch.ones(3)], LAW)
    with pytest.raises(ValueError, match="leave them out"):
        efreg.penalty(torch.ones(2, 2), LAW, layers=["0"])
    with pytest.raises(ValueError, match="no ungrouped convolution"):
        efreg.penalty(nn.ReLU(), LAW)
