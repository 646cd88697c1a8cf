"""The examples: each is run on little, and what it promises is looked at from outside."""

import copy
import importlib
import inspect
import io
import re
import sys
from collections import namedtuple
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import efreg
from efreg import cli

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = [path.stem for path in sorted(EXAMPLES.glob("*.py")) if "__main__" in path.read_text()]

pytestmark = pytest.mark.filterwarnings(
    "error::UserWarning",  # of a library that is used wrongly
    "ignore:.*does not have many workers",  # Lightning's, where there are many cores
    "ignore:The dirpath has changed",  # Lightning's, as each of its runs has a folder
)

Cut = namedtuple("Cut", "given pruned units weights inputs optimizer stateful")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _efreg_has_nothing_to_warn_of(caplog):
    yield
    assert not [r.getMessage() for r in caplog.get_records("call") if r.name == "efreg"]


@pytest.fixture(autouse=True)
def _accelerate_forgets():
    """Its settings are the process's, which here runs several trainings."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def cuts(monkeypatch):
    """Every cut that is made: of what, with its units; what came of it, as it was at that moment."""
    made, prune = [], efreg.prune

    def watched(model, plan, *, example_inputs, optimizer=None):
        units = plan.filters(model)
        pruned = prune(model, plan, example_inputs=example_inputs, optimizer=optimizer)
        weights = copy.deepcopy(pruned.state_dict())
        stateful = optimizer is not None and all(p in optimizer.state for p in pruned.parameters())
        made.append(Cut(model, pruned, units, weights, example_inputs, optimizer, stateful))
        return pruned

    monkeypatch.setattr(efreg, "prune", watched)
    return made


def example(name):
    return importlib.import_module(name)


def speedup(cut):
    return efreg.macs(cut.given, cut.inputs) / efreg.macs(cut.pruned, cut.inputs)


def assert_it_goes_on(cut):
    """The optimizer took its state along, steps the cut network, all of which has moved, and fits it."""
    assert cut.stateful
    stepped = [p for group in cut.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in stepped} == {id(p) for p in cut.pruned.parameters()}
    assert not any(torch.equal(p, cut.weights[name]) for name, p in cut.pruned.named_parameters())
    kept = [(p, x) for p in stepped for x in cut.optimizer.state[p].values() if x.ndim]
    assert len(kept) >= len(stepped) and all(x.shape == p.shape for p, x in kept)


def assert_same_outputs(a, b, x):
    with torch.no_grad():
        torch.testing.assert_close(a.eval()(x), b.eval()(x))


# All


@pytest.mark.parametrize("name", SCRIPTS)
def test_options_are_the_arguments_of_main(name, monkeypatch):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit), redirect_stdout(io.StringIO()) as shown:
        exec(compile((EXAMPLES / f"{name}.py").read_text(), name, "exec"), {"__name__": "__main__"})
    options = set(re.findall(r"--([\w-]+)", shown.getvalue())) - {"help"}
    assert {option.replace("-", "_") for option in options} == set(
        inspect.signature(example(name).main).parameters
    )


def test_every_example_says_how_it_is_run():
    for path in EXAMPLES.glob("*.py"):
        assert re.search(
            rf"python examples/{path.name}|{path.stem}\.\w+", path.read_text().split('"""')[1]
        ), path


# Each


def test_digits_keep_their_accuracy_with_the_force_and_not_without():
    main = example("digits").main
    with_force, without = main(epochs=8, alpha=0.19, ratios=[0.5]), main(epochs=8, alpha=0, ratios=[0.5])
    assert with_force[0] > 0.95 and with_force[0.5] > with_force[0] - 0.02
    assert without[0] > 0.95 and without[0.5] < without[0] - 0.2


def test_finetuning_goes_on_after_the_cut_and_ends_in_onnx(cuts):
    small = example("finetune").main(size=32, epochs=1)
    (cut,) = cuts
    assert cut.pruned is small and speedup(cut) > 3
    assert_it_goes_on(cut)
    x = torch.randn(5, 3, 32, 32)
    (found,) = onnxruntime.InferenceSession("small.onnx").run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), small(x).detach(), rtol=1e-3, atol=1e-4)


def test_finetuning_takes_a_folder_of_images(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((40, 50, 3), 128, dtype=np.uint8)).save(tmp_path / name / "1.png")
    found = example("finetune").load(tmp_path, 32)
    assert found.classes == ["cat", "dog"] and [label for _, label in found] == [0, 1]
    grey = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(found[0][0], grey.view(3, 1, 1).expand(3, 32, 32))


def test_timm_cuts_model_and_average_alike_and_goes_on(cuts):
    averaged = example("timm_loop").main(epochs=2)
    model, average = cuts
    assert average.pruned is averaged and model.units == average.units
    assert speedup(model) == speedup(average) > 3
    assert_it_goes_on(model)
    assert not torch.equal(averaged.conv1[0].weight, average.weights["conv1.0.weight"])


def test_transformers_loses_heads_and_hidden_units_that_had_faded(cuts, tmp_path):
    small = example("transformers_trainer").main(epochs=1)
    (cut,) = cuts
    for layer in small.vit.layers:
        assert layer.attention.q_proj.weight.shape == (32, 64) and layer.mlp.fc1.weight.shape == (64, 64)
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        expected = cut.given.eval()(x).logits
        torch.testing.assert_close(cut.pruned.eval()(x).logits, expected)
        torch.testing.assert_close(small.eval()(x).logits, expected)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_cuts_what_had_faded_and_saves_it(cuts, precision):
    accelerate_loop = example("accelerate_loop")
    small = accelerate_loop.main(epochs=2, mixed_precision=precision)
    (cut,) = cuts
    x = torch.rand(3, 1, 8, 8)
    assert speedup(cut) > 3
    assert_same_outputs(cut.given, small, x)
    assert_same_outputs(efreg.load(accelerate_loop.network(), "small.safetensors"), small, x)


def test_an_optimizer_that_accelerate_wraps_goes_on(cuts):
    from accelerate import Accelerator

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    accelerator, x = Accelerator(), torch.rand(2, 1, 8, 8)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    model(x).square().mean().backward()
    optimizer.step()
    small = efreg.prune(
        model, efreg.plan(model, ratio=0.5, example_inputs=x), example_inputs=x, optimizer=optimizer
    )
    optimizer.zero_grad()
    small(x).square().mean().backward()
    optimizer.step()
    assert_it_goes_on(cuts[0])


# Lightning


@pytest.fixture
def fit():
    """Fits digits for some epochs of four batches with a callback; the trainer."""
    import lightning

    def fitted(callback, module, epochs, **options):
        torch.manual_seed(0)
        loader = DataLoader(TensorDataset(torch.rand(32, 1, 8, 8), torch.arange(32) % 10), 8)
        trainer = lightning.Trainer(
            max_epochs=epochs, callbacks=[callback], log_every_n_steps=1, enable_progress_bar=False
        )
        trainer.fit(module, loader, **options)
        return trainer

    return fitted


def test_lightning_logs_the_dead_and_cuts_at_the_end(cuts):
    trainer = example("lightning_callback").main(epochs=3)
    (cut,) = cuts
    first, norm, _, second, *_ = cut.given
    dead = 0
    for written_by in ([*first.parameters(), *norm.parameters()], list(second.parameters())):
        dead += sum(not any(part[n].any() for part in written_by) for n in range(len(written_by[0])))
    assert trainer.callback_metrics["dead"] == dead > 0
    assert trainer.lightning_module.net is cut.pruned and speedup(cut) > 2


def test_lightning_logs_the_energy(cuts, fit):
    """L1's is α Σ |w|, at the last of 8 steps with an eighth of α."""
    lightning_callback = example("lightning_callback")
    trainer = fit(lightning_callback.Force(law="l1", alpha=0.4), lightning_callback.Digits(), epochs=2)
    weights = cuts[0].given[0].weight, cuts[0].given[3].weight
    torch.testing.assert_close(
        trainer.callback_metrics["energy"], 0.4 / 8 * sum(w.abs().sum() for w in weights)
    )


def test_lightning_resumes_the_force(fit):
    """The state comes from the checkpoint, so that alpha falls on from where it was."""
    lightning_callback = example("lightning_callback")
    checkpoint = fit(
        lightning_callback.Force(), lightning_callback.Digits(), epochs=2
    ).checkpoint_callback.best_model_path
    force = lightning_callback.Force()
    fit(force, lightning_callback.Digits(), epochs=5, ckpt_path=checkpoint)
    assert force.force.steps == 5 * 4


def test_a_config_file_can_name_the_callback(cuts, fit):
    lightning_callback = example("lightning_callback")
    config = lightning_callback.__doc__.rpartition("\n\n")[2]
    (named,) = yaml.safe_load(config)
    module, _, name = named["class_path"].partition(".")
    callback = getattr(example(module), name)(**named["init_args"])
    fit(callback, lightning_callback.Digits(), epochs=1)
    assert callback.force.law.power == 2 and speedup(cuts[0]) > 2


# A law of one's own


def test_own_law_is_its_formula():
    """Ten lines, with a parameter; α · (mean / m_n)^p."""
    law = example("own_law").Crowd(0.5, sharpness=2.0)
    charges = efreg.Charges(torch.tensor([1.0, 3.0]), torch.ones(2), 9)
    assert law.of(charges).tolist() == pytest.approx([0.5 * 4, 0.5 * (2 / 3) ** 2])
    assert efreg.resolve("own_law.Crowd:sharpness=2.0", 0.5) == law


def test_own_law_trains_from_the_console(tmp_path, few_digits):
    line = "train --model resnet14 --law own_law.Crowd:sharpness=2 --alpha 1e-3 --epochs 1 --batch-size 64"
    assert cli.main([*line.split(), "--lr", "0.05", "--out", str(tmp_path)]) == 0
    from efreg.lab import checkpoints

    assert checkpoints.load(tmp_path / "checkpoint.pt").settings.law == "own_law.Crowd:sharpness=2"
