"""What the host does in a step of a GPU's backend: Python alone, with the launches stubbed out.

The tensors lie on the CPU; on a GPU the driver's part of a launch comes on top, bench/gpu.py measures both.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # without it no Triton kernel serves CPU tensors

import pytest
import torch
import torchvision
from test_force import hook

import efreg
from efreg.kernels import force
from efreg.lab import models

NETWORKS = {
    "ResNet-56, 27 layers": (models.resnet56, "*.conv1"),
    "ResNet-56, 55 layers": (models.resnet56, None),
    "ResNet-152, 155 layers": (torchvision.models.resnet152, None),
}


class Nothing:
    """A compiled kernel that is launched and does nothing."""

    def __getitem__(self, grid):
        return lambda *arguments: None


class Compiled(dict):
    """Every kernel has been compiled before."""

    def get(self, key):
        return hash(key) and (Nothing(), ())


@pytest.fixture(autouse=True)
def stubbed(monkeypatch):
    for launcher in (force._measure, force._charge, force._pull, force._shrink):
        monkeypatch.setattr(launcher, "_compiled", Compiled())


def test_host_on_the_whole_filter(alone):
    model = models.resnet56()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    plan = efreg.plan(model, ratio=0.5, coupled=False, example_inputs=torch.randn(2, 3, 32, 32))
    call = hook(model, layers=plan, scope="filter", backend="triton")
    alone("host, charges kept, no launch", "triton", "ResNet-56, 27 layers, whole filters", call, rounds=2000)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("refresh", [None, 1], ids=["kept", "fresh"])
def test_host(alone, name, refresh):
    build, layers = NETWORKS[name]
    model = build()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    call = hook(model, layers=layers, refresh=refresh, backend="triton")
    alone(f"host, charges {'fresh' if refresh else 'kept'}, no launch", "triton", name, call, rounds=2000)
