"""A whole training step with the force beside one without, in turns."""

import copy

import pytest
import torch
from steps import training_step

import efreg
from efreg.lab import data, models

NETWORKS = {
    "ResNet-56, batch 32": (models.resnet56, 32, 20),
    "VGG-19, batch 16": (lambda: models.vgg19(num_classes=10), 16, 40),
}


def step(model, batch):
    return training_step(model, torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)))


SCOPED = {"ResNet-56, batch 32": "[0, .5, .5, .5, 0]", "VGG-19, batch 16": "[1-15:.5]"}


@pytest.mark.parametrize("name", NETWORKS)
def test_training_step_on_the_whole_filter(side_by_side, name):
    """The layers of the paper's plan: their weights alone, and with the norms' scale and shift."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    build, batch, rounds = NETWORKS[name]
    functions = {"without the force": step(build(), batch)}
    for scope in ("weights", "filter"):
        model = build()
        plan = efreg.plan(model, SCOPED[name], example_inputs=torch.randn(2, 3, 32, 32))
        efreg.attach(model, law=efreg.Ladder(1e-9), layers=plan, scope=scope)
        functions[f"with, {scope}"] = step(model, batch)
    side_by_side("training step, plan, kept", name, functions, relative_to="with, weights", rounds=rounds)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("refresh", [None, 1], ids=["kept", "fresh"])
def test_training_step(side_by_side, name, refresh):
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    build, batch, rounds = NETWORKS[name]
    without = build()
    model = copy.deepcopy(without)
    efreg.attach(model, alpha=1e-14, refresh=refresh)
    functions = {"without the force": step(without, batch), "with": step(model, batch)}
    what = "training step, charges " + ("fresh" if refresh else "kept")
    side_by_side(what, name, functions, relative_to="without the force", rounds=rounds)


@pytest.mark.parametrize("name", NETWORKS)
def test_nested_step(side_by_side, name):
    """Every step hides the units behind a width; what is computed stays as large."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    build, batch, rounds = NETWORKS[name]
    without = build()
    model = copy.deepcopy(without)
    plan = efreg.plan(model, SCOPED[name], example_inputs=torch.randn(2, 3, 32, 32))
    widths = efreg.nested(model, plan, (0, 0.3, 0.5, 0.7))
    functions = {"whole": step(without, batch), "nested": step(model, batch)}
    side_by_side("training step, nested", name, functions, relative_to="whole", rounds=2 * rounds)
    widths.detach()


def test_loader(side_by_side):
    """A batch cropped, flipped and normalised as in training, beside the step that takes it."""
    torch.manual_seed(0)
    info = data.INFOS["cifar10"]
    stored = data.InMemory(
        info, torch.randint(256, (50_000, *info.shape), dtype=torch.uint8), torch.zeros(50_000)
    )
    batches = stored.epoch(128, seed=0, epoch=0)
    functions = {
        "training step": step(models.resnet56(), 128),
        "loader and augmentation": lambda: next(batches),
    }
    side_by_side("loader", "ResNet-56, batch 128", functions, relative_to="training step", rounds=10)
