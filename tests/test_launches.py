"""Two launches a step for all layers, and nothing compiled after the first."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import efreg
from efreg import backends
from efreg.backends.rows import Groups, Rows

force = pytest.importorskip("efreg.kernels.force", reason="Triton is not installed")

CPU = torch.device("cpu")
LAUNCHERS = ("_measure", "_charge", "_pull", "_shrink")


class Doubling(efreg.Law):
    def coefficients(self, charges):
        return 2 * self.alpha * charges.magnitude


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched so far, in order; none of them runs."""
    backends.select("triton", CPU)
    names = []
    for name in LAUNCHERS:
        monkeypatch.setattr(force, name, lambda *_, name=name, **__: names.append(name[1:]))
    return names


def network(layers, dtypes=(torch.float32,)):
    return nn.ModuleList(nn.Linear(3, 2, bias=False).to(dtypes[i % len(dtypes)]) for i in range(layers))


def steps(net, count, **settings):
    efreg.attach(net, layers="*", backend="triton", check=None, **settings)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(count):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("layers", [1, 3, 500])
@pytest.mark.parametrize(
    "settings, first, later",
    [
        ({"refresh": 1}, ["charge", "pull"], ["charge", "pull"]),
        ({"refresh": None}, ["charge", "pull"], ["pull"]),
        ({"refresh": 1, "update": "proximal"}, ["charge", "shrink"], ["charge", "shrink"]),
        ({"refresh": None, "update": "proximal"}, ["charge", "shrink"], ["shrink"]),
    ],
    ids=str,
)
def test_launches_do_not_depend_on_the_layers(launched, layers, settings, first, later):
    steps(network(layers), 3, law=efreg.Electrostatic(1e-12), **settings)
    assert launched == first + 2 * later


TAKES = [(efreg.Electrostatic(1e-12), "charge"), (efreg.Ladder(1e-2), "measure")]


@pytest.mark.parametrize("layers", [1, 3, 100])
@pytest.mark.parametrize("law, takes", TAKES)
@pytest.mark.parametrize(
    "settings, first, later",
    [
        ({"refresh": 1}, ["pull"], True),
        ({"refresh": None}, ["pull"], False),
        ({"refresh": None, "update": "proximal"}, ["shrink"], False),
    ],
    ids=str,
)
def test_the_whole_filter_goes_in_the_same_launches(launched, layers, law, takes, settings, first, later):
    """A norm's scale and shift are rows of the same table, with their layer's coefficients."""
    net = nn.Sequential()
    for _ in range(layers + 1):
        net.append(nn.Conv2d(2, 2, 1)).append(nn.BatchNorm2d(2))
    plan = efreg.plan(net, {f"0-{layers - 1}": 0.5}, example_inputs=torch.randn(2, 2, 3, 3))
    assert sum(map(len, plan.members.values())) == 4 * layers
    efreg.attach(net, law=law, layers=plan, scope="filter", backend="triton", check=None, **settings)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert launched == [takes, *first] + 2 * ([takes] * later + first)


@pytest.mark.parametrize("layers", [1, 100])
def test_a_fade_is_one_launch_a_step(launched, layers):
    """And one more, for the gradients, once what fades is zero."""
    net = nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(layers + 1)))
    plan = efreg.plan(net, {f"0-{layers - 1}": 0.5}, example_inputs=torch.randn(2, 2, 3, 3))
    efreg.attach(net, law=efreg.Fade(3), layers=plan, backend="triton")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(5):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert launched == ["measure", "shrink", "shrink"] + 3 * ["pull", "shrink"]


class Counted(TorchDispatchMode):
    """Counts the operations of torch that do more than look at a tensor in another way."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


LAWS = [law(1e-3) for law in efreg.LAWS.values() if law.has_strength()]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_operations_of_torch_do_not_depend_on_the_layers(launched, law):
    """Those of the law are a few dozen a step for all layers; the paper's law has none."""
    counts = []
    for layers in (2, 20):
        net = network(layers)
        force = efreg.attach(net, layers="*", backend="triton", check=None, law=law, refresh=1)
        for counted in (Counted(), Counted()):
            for parameter in net.parameters():
                parameter.grad = torch.zeros_like(parameter)
            with counted:
                force.pull()
        counts.append(counted.count)
        force.detach()
    assert counts[0] == counts[1] <= (0 if law == efreg.Electrostatic(1e-3) else 100), counts


def test_a_law_of_the_users_own_runs_between_the_launches(launched):
    steps(network(5), 2, law=Doubling(1e-3), refresh=1)
    assert launched == 2 * ["measure", "pull"]


def test_each_dtype_has_its_launches(launched):
    steps(network(6, (torch.float32, torch.bfloat16, torch.float64)), 1, alpha=1e-12, refresh=1)
    assert launched == 3 * ["charge", "pull"]


def test_penalty_uses_the_same_kernels(launched, monkeypatch):
    """One launch forward, one backward."""
    monkeypatch.setenv("EFREG_BACKEND", "triton")
    efreg.penalty(network(4), efreg.L1(1e-3), layers="*").backward()
    assert launched == ["measure", "pull"]


class Fake:
    """Stands for a kernel: counts its compilations, and the launches of what was compiled."""

    def __init__(self):
        self.compiled, self.launches = 0, []

    def __getitem__(self, grid):
        def launch(*arguments, **_):
            if grid[1:] == ():
                self.compiled += 1
                return self
            self.launches.append((grid, arguments))

        return launch


def test_nothing_is_compiled_after_the_first_step(monkeypatch):
    """200 epochs of a learning-rate schedule, GradScaler's changing scale, found_inf and another α."""
    fakes = {name: Fake() for name in ("_charge", "_shrink", "_pull")}
    for name, fake in fakes.items():
        monkeypatch.setattr(force, name, force._Launcher(fake))
    backend, weight = backends.select("triton", CPU), torch.randn(4, 5)
    rows, c = Rows.of([weight], [0]), torch.zeros(4)
    for epoch in range(200):
        backend.charge(Groups.of(rows), c, efreg.Electrostatic(1e-12 * (epoch + 1), softening=0.01 * epoch))
        backend.pull([torch.zeros(4, 5)], rows, c, scale=torch.tensor(2.0**epoch % 1e30), direction="sign")
        found_inf = torch.tensor(float(epoch % 2))
        backend.shrink(rows, c, rates=[0.1 / (epoch + 1)], found_inf=found_inf, direction="sign")
    assert {name: fake.compiled for name, fake in fakes.items()} == {"_charge": 1, "_shrink": 1, "_pull": 1}
    assert all(len(fake.launches) == 199 for fake in fakes.values())


def test_a_compiled_kernel_gets_addresses_in_the_kernels_order(monkeypatch):
    fake = Fake()
    monkeypatch.setattr(force, "_pull", force._Launcher(fake))
    tensors = [torch.zeros(3, 2)] + [torch.zeros(2) for _ in range(6)]
    for _ in range(2):
        force.pull(*tensors, 1, torch.bfloat16)
    grid, arguments = fake.launches[0]
    constants = (1, force.tl.bfloat16, force.tl.float32)
    assert grid == (3, 1, 1)
    assert arguments == (*(tensor.data_ptr() for tensor in tensors), *constants)
    names = force.pull_kernel.arg_names
    assert names[-3:] == ["ALONG", "DTYPE", "ACC"] and len(names) == len(arguments)


@pytest.mark.parametrize("name, constants", [("measure", 4), ("charge", 3), ("pull", 3), ("shrink", 3)])
def test_kernels_take_tensors_first_and_constants_last(name, constants):
    """_Launcher relies on it; and no tensor's address is specialised, or the next would need a compiler."""
    names = getattr(force, f"{name}_kernel").arg_names
    assert [n.isupper() for n in names] == [False] * (len(names) - constants) + [True] * constants
    assert set(names[:-constants]) <= {*force.ARRAYS, *force.NUMBERS}


def test_offsets_have_64_bits():
    """Filter 199,999 of 25,000 numbers begins 5·10⁹ numbers into its row; what lies before is not touched."""
    filters, size, dtype = 200_000, 25_000, torch.float32
    weight, grad = torch.randn(size), torch.randn(size)
    before, shift = grad.clone(), (filters - 1) * size * dtype.itemsize
    tiles = torch.tensor([[0, filters - 1]], dtype=torch.int32)
    layout = torch.tensor([[filters, size, 0]])
    units = torch.arange(filters, dtype=torch.int32)
    addresses = torch.tensor([weight.data_ptr() - shift])
    targets = torch.tensor([[grad.data_ptr() - shift, 1]])
    magnitude, balance = torch.zeros(2, filters)
    force.measure(tiles, layout, addresses, magnitude, balance, None, True, dtype)
    torch.testing.assert_close(magnitude[-1], weight.abs().sum())
    assert not magnitude[:-1].any()
    c = torch.zeros(filters)
    c[-1] = 0.5
    force.pull(tiles, layout, addresses, units, targets, c, torch.tensor(1.0), False, dtype)
    torch.testing.assert_close(grad, before + 0.5 * weight.sign())
