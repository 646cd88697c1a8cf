"""The operations and the whole hook call, against their floors and against what others do at every step."""

import peers
import pytest
import torch
import torchvision

import efreg
from efreg import backends
from efreg.backends.rows import Rows
from efreg.lab import models

CPU = torch.device("cpu")
NETWORKS = {
    "ResNet-56": (models.resnet56, 30),
    "VGG-19": (lambda: models.vgg19(num_classes=100), 15),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    """name, model with gradients, weights of all convolutions, rounds."""
    torch.manual_seed(0)
    build, rounds = NETWORKS[request.param]
    model = build()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    return request.param, model, weights, rounds


def streams(weights):
    """a and b of the floor torch.add(a, b, out=b): as many elements as the weights have, 12 bytes each."""
    elements = sum(w.numel() for w in weights)
    return torch.randn(elements), torch.randn(elements)


def operations(kind, weights):
    backend, rows, grads = (
        backends.select(kind, CPU),
        Rows.of(weights, [0] * len(weights)),
        [w.grad for w in weights],
    )
    coefficients, scales = torch.full((sum(len(w) for w in weights),), 1e-9), [1e-9] * len(weights)
    return {
        f"{kind} measure": lambda: backend.measure(rows, sign="count", norm=False),
        f"{kind} pull": lambda: backend.pull(grads, rows, coefficients, scale=1.0, direction="sign"),
        f"{kind} shrink": lambda: backend.shrink(rows, coefficients, rates=scales, direction="sign"),
    }


def hook(model, law=peers.LAW, **options):
    """The whole call that an optimizer's step makes into efreg."""
    force = efreg.attach(model, law=law, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = force._serving.find()[0].parameter.grad

    def call():
        torch.autograd.graph.increment_version(first)  # a backward pass was here
        force._serving.before_step(optimizer, (optimizer,), {}, step=0, outermost=True)
        force._serving.after_step(optimizer, 0)

    return call


@torch.no_grad()
def test_operations(side_by_side, network):
    """Each operation alone; the floor moves 12 bytes an element, measure 4, pull 12, shrink 8."""
    name, _, weights, rounds = network
    a, b = streams(weights)
    functions = {"floor of 12 bytes": lambda: torch.add(a, b, out=b)}
    for kind in ("cpp", "reference"):
        functions |= operations(kind, weights)
    side_by_side("operation", name, functions, relative_to="floor of 12 bytes", rounds=rounds)


def test_hook_fresh(side_by_side, network):
    """Charges taken at every step."""
    name, model, weights, rounds = network
    a, b = streams(weights)
    compiled = peers.compiled(peers.plain_reference)
    functions = {
        "floor of 12 bytes": lambda: torch.add(a, b, out=b),
        "cpp": hook(model, refresh=1, backend="cpp"),
        "reference": hook(model, refresh=1, backend="reference"),
        "compiled reference": lambda: compiled(weights),
        "L1 through autograd": lambda: peers.l1_autograd(weights),
        "Torch-Pruning's regularizer": peers.torch_pruning_regularizer(model, torch.randn(1, 3, 32, 32)),
        "the paper's loop": lambda: peers.paper_loop(weights),
    }
    side_by_side("hook, charges fresh", name, functions, relative_to="cpp", rounds=rounds)


def test_hook_fresh_against_the_floor(side_by_side, network):
    """Only the C++ operations beside the floor: nothing else empties the caches between them."""
    name, model, weights, rounds = network
    a, b = streams(weights)
    functions = {
        "floor of 12 bytes": lambda: torch.add(a, b, out=b),
        "cpp": hook(model, refresh=1, backend="cpp"),
    }
    side_by_side("hook, charges fresh", name, functions, relative_to="floor of 12 bytes", rounds=4 * rounds)


def test_hook_kept(side_by_side, network):
    """Charges taken once, at the first call."""
    name, model, weights, rounds = network
    a, b = streams(weights)
    coefficients = [torch.full((len(w),), 1e-9) for w in weights]
    compiled = peers.compiled(peers.plain_pull)
    functions = {
        "floor of 12 bytes": lambda: torch.add(a, b, out=b),
        "cpp": hook(model, backend="cpp"),
        "reference": hook(model, backend="reference"),
        "compiled reference": lambda: compiled(weights, coefficients),
    }
    side_by_side("hook, charges kept", name, functions, relative_to="floor of 12 bytes", rounds=2 * rounds)


class Own(efreg.Law):
    """A law of a user's own: the larger beside the mean, the less."""

    def coefficients(self, charges):
        return self.alpha * charges.magnitude.nanmean(-1, keepdim=True) / charges.magnitude


def test_hook_of_other_laws(side_by_side, network):
    """Laws that are in no kernel, charges fresh, beside the paper's."""
    name, model, weights, rounds = network
    a, b = streams(weights)
    functions = {
        "floor of 12 bytes": lambda: torch.add(a, b, out=b),
        "cpp": hook(model, refresh=1, backend="cpp"),
    }
    laws = {"a user's law": Own(1e-9), "ladder": efreg.Ladder(1e-9), "gravity": efreg.Gravity(1e-9)}
    for what, law in laws.items():
        functions[f"cpp, {what}"] = hook(model, law, refresh=1, backend="cpp")
    side_by_side("hook, charges fresh, by law", name, functions, relative_to="cpp", rounds=2 * rounds)


COUPLED = {"ResNet-18": torchvision.models.resnet18, "MobileNetV2": torchvision.models.mobilenet_v2}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("refresh", [None, 1], ids=["kept", "fresh"])
def test_hook_on_groups(side_by_side, name, refresh):
    """All groups of a plan, whose units several layers write, beside the floor of what is pulled."""
    torch.manual_seed(0)
    model = COUPLED[name]()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    plan = efreg.plan(model, ratio=0.5, example_inputs=torch.randn(2, 3, 64, 64))
    written = {m.tensor for cut in plan.cuts for m in cut.group.of("writes")}
    a, b = streams([model.get_parameter(tensor) for tensor in written])
    functions = {"floor of 12 bytes": lambda: torch.add(a, b, out=b)}
    for scope in ("weights", "filter"):
        functions[f"cpp, {scope}"] = hook(model, layers=plan, scope=scope, refresh=refresh, backend="cpp")
    what = "hook on groups, charges " + ("fresh" if refresh else "kept")
    side_by_side(what, name, functions, relative_to="floor of 12 bytes", rounds=30)


SCOPED = {"ResNet-56": "[0, .5, .5, .5, 0]", "VGG-19": "[1-15:.5]"}


@pytest.mark.parametrize("refresh", [None, 1], ids=["kept", "fresh"])
def test_hook_on_the_whole_filter(side_by_side, network, refresh):
    """The layers of the paper's plan: their weights alone, and with the norms' scale and shift."""
    name, model, _, rounds = network
    plan = efreg.plan(model, SCOPED[name], example_inputs=torch.randn(2, 3, 32, 32))
    functions = {
        f"cpp, {scope}{more}": hook(model, law, layers=plan, scope=scope, refresh=refresh, backend="cpp")
        for scope in ("weights", "filter")
        for law, more in ((peers.LAW, ""), (efreg.Ladder(1e-9), ", ladder"))
    }
    what = "hook on the plan's layers, charges " + ("fresh" if refresh else "kept")
    side_by_side(what, name, functions, relative_to="cpp, weights", rounds=4 * rounds)


def test_fade_beside_the_ladder(side_by_side, network):
    """Proximal steps on whole filters: a fade under way, one that is over, and the ladder."""
    name, model, _, rounds = network
    plan = efreg.plan(model, SCOPED[name], example_inputs=torch.randn(2, 3, 32, 32))
    laws = {"ladder": efreg.Ladder(1e-9), "fade": efreg.Fade(10**9), "fade, over": efreg.Fade(1)}
    functions = {f"cpp, {called}": proximal(model, plan, law) for called, law in laws.items()}
    side_by_side("proximal step, kept", name, functions, relative_to="cpp, ladder", rounds=4 * rounds)


def proximal(model, plan, law):
    """All that an optimizer's step calls in efreg."""
    force = efreg.attach(model, law=law, layers=plan, scope="filter", update="proximal", backend="cpp")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)

    def call():
        force._serving.before_step(optimizer, (optimizer,), {}, step=0, outermost=True)
        force._serving.after_step(optimizer, 0)

    return call
