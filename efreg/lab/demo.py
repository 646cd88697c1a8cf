"""The demo: digits, a small ResNet, nine ways to train it on, and what is left of each when it is cut."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

import efreg
from efreg.lab import data, engine, figures
from efreg.lab.checkpoints import Settings
from efreg.lab.figures import look_of
from efreg.lab.logs import progress, write_csv, write_text
from efreg.lab.sweep import ACCURACIES, RATIOS, Cut, accuracy_table, page, rows, sweep
from efreg.lab.ways import NO_FORCE

START_EPOCHS = 15
"""Epochs of the network that every force starts from."""

TIMED_STEPS = 40
"""Training steps with each force that are timed, each beside one without."""


REPAIR = 1000
"""Training images on which the network that no force trained is repaired."""


@dataclass(frozen=True)
class Contender:
    """A way to train on: its name in the table, its line, and what `efreg.attach` is given; None: nothing.

    fades: the share of the filters that fade over the first quarter of the steps.
    """

    name: str
    look: figures.Look
    options: Mapping[str, Any] | None
    fades: float | None = None


FIGURES = ("accuracy", "recalibrated")
"""What is compared of a cut."""

WHOLE = ", whole filter"
"""What the names of forces on the whole filter end with."""

L1 = "L1"
REPAIRED = "no force, repaired"
ONCE, EACH_STEP = "electrostatic, once", "electrostatic, each step"
CONTENDERS = (
    Contender(NO_FORCE, look_of(NO_FORCE), None),
    Contender(L1, look_of(L1), {"law": "l1", "alpha": 3e-2}),
    Contender(EACH_STEP, look_of(EACH_STEP), {"alpha": 1e-11, "refresh": 1}),
    Contender("electrostatic, proximal", look_of(ONCE, style="--"), {"alpha": 1e-11, "update": "proximal"}),
    Contender(ONCE, look_of(ONCE), {"alpha": 1e-11}),
    Contender(f"L1{WHOLE}", look_of(L1, "filter"), {"law": "l1", "alpha": 1e-2, "scope": "filter"}),
    Contender(f"electrostatic{WHOLE}", look_of(ONCE, "filter"), {"alpha": 3e-11, "scope": "filter"}),
    Contender(
        f"ladder{WHOLE}",
        look_of("ladder", "filter"),
        {"law": "ladder", "alpha": 1e-1, "scope": "filter", "update": "proximal"},
    ),
    Contender(f"fade, 70 %{WHOLE}", look_of("fade", "filter"), {}, fades=0.7),
)
"""On the weights, as the paper has it: electrostatic force with charges at both readings, beside L1 at its
best α here; then on all that removal takes from a filter; then a fade, which has a target and no strength.
Where nothing is said charges are taken once."""


def run(
    out: str | Path, *, seed: int = 0, epochs: int = 60, command: str | None = None, console: Console
) -> dict[str, list[Cut]]:
    """Trains, prunes at every ratio, prints the table, and writes it, a picture, a page and the networks.

    out: the folder. command: what the page says that it was made by.
    """
    out = Path(out)
    settings = Settings(model="resnet14", lr=0.05, batch_size=64, epochs=epochs, seed=seed)
    engine.check(settings)
    (out / "models").mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    images = data.load("digits")
    with progress(console) as bar:
        start = _start(settings, images, bar)
        networks = {force.name: _train_on(start, force, settings, images, bar) for force in CONTENDERS}
        step_times = _step_times(start, settings, images, bar)
        sweeps = {name: _sweep(name, network, images, bar) for name, network in networks.items()}
    _save(out / "models", networks, images)
    cuts = [
        row for name, found in sweeps.items() for row in rows(found, force=name, step_time=step_times[name])
    ]
    write_csv(out / "demo.csv", cuts)
    _draw(out / "demo.png", sweeps, epochs)
    best = _best(sweeps)
    curves = {name: [(float(cut.ratio), cut.accuracy) for cut in found] for name, found in sweeps.items()}
    title = f"ResNet-14 on digits ({best})"
    write_text(out / "report.html", page(networks[best], images, curves, title, command=command))
    console.print(accuracy_table(sweeps, step_times))
    console.print("\n".join(findings(sweeps, len(images.test))), highlight=False)
    console.print(f"Written to {out}: report.html, demo.png, demo.csv, models/", highlight=False)
    return sweeps


def findings(sweeps: Mapping[str, Sequence[Cut]], test_images: int) -> list[str]:
    """What the table says: the best force at 50 %, and for each where L1 on the same numbers does better."""
    at_half, best = _at_half(sweeps), _best(sweeps)
    others = ", ".join(f"{at_half[name]:.1f} % with {name}" for name in (L1, NO_FORCE) if name != best)
    sentences = [
        f"Half of the filters gone: {at_half[best]:.1f} % with {best}, {others}. "
        f"One seed, {test_images} test images."
    ]
    for name in sweeps:
        rival = f"L1{WHOLE}" if name.endswith(WHOLE) else L1
        for figure in FIGURES:
            if name != NO_FORCE and (lost := _lost(sweeps[name], sweeps[rival], figure)):
                sentences.append(
                    f"{rival} does better than {name} at {', '.join(lost)}, {ACCURACIES[figure]}."
                )
    return sentences


def _at_half(sweeps: Mapping[str, Sequence[Cut]]) -> dict[str, float]:
    return {name: cut.accuracy for name, cuts in sweeps.items() for cut in cuts if cut.ratio == 0.5}


def _best(sweeps: Mapping[str, Sequence[Cut]]) -> str:
    """The force with the highest accuracy without half of the filters."""
    at_half = _at_half(sweeps)
    return max(at_half, key=at_half.__getitem__)


def _lost(cuts: Sequence[Cut], others: Sequence[Cut], figure: str) -> list[str]:
    """The ratios at which the others are better."""
    return [f"{100 * a.ratio:.0f} %" for a, b in zip(cuts, others) if getattr(b, figure) > getattr(a, figure)]


def _start(settings: Settings, images: data.Data, bar: Progress) -> nn.Module:
    model = engine.build(settings, images.info.num_classes, images.info.shape)
    _train(model, Settings(**{**vars(settings), "epochs": START_EPOCHS, "lr": 0.1}), images, bar, "training")
    return model


def _train_on(
    start: nn.Module, force: Contender, settings: Settings, images: data.Data, bar: Progress
) -> nn.Module:
    model = copy.deepcopy(start)
    attached = _attach(model, force, images, settings.epochs * engine.steps_per_epoch(images.train, settings))
    _train(model, Settings(**{**vars(settings), "seed": settings.seed + 1}), images, bar, force.name)
    if attached:
        attached.detach()
    return model


def _train(model: nn.Module, settings: Settings, images: data.Data, bar: Progress, name: str) -> None:
    steps = engine.steps_per_epoch(images.train, settings)
    task = bar.add_task(name, total=settings.epochs * steps, note="")
    optimizer = engine.sgd(model, settings)
    for epoch in range(settings.epochs):
        engine.train_epoch(model, optimizer, images.train, settings, epoch, lambda: bar.advance(task))
    bar.update(task, note=f"{engine.evaluate(model, images.test)[1]:.1f} %")


def _attach(model: nn.Module, force: Contender, images: data.Data, steps: int) -> efreg.Attachment | None:
    """The force on the layers that will be pruned, as in the paper, for a training of so many steps."""
    if force.options is None:
        return None
    example = next(images.test.batches(2))[0]
    plan = efreg.plan(model, ratio=force.fades or 0.5, coupled=False, example_inputs=example)
    options = {"law": efreg.Fade(max(1, steps // 4))} if force.fades else force.options
    return efreg.attach(model, layers=plan, check=None, **options)


def _step_times(start: nn.Module, settings: Settings, images: data.Data, bar: Progress) -> dict[str, float]:
    task = bar.add_task("timing training steps", total=len(CONTENDERS), note="")
    times = {}
    for force in CONTENDERS:
        times[force.name] = _step_time(start, force, settings, images)
        bar.advance(task)
    return times


def _step_time(start: nn.Module, force: Contender, settings: Settings, images: data.Data) -> float:
    """The median ratio of a training step with the force to one without, timed in turns."""
    models = copy.deepcopy(start), copy.deepcopy(start)
    attached = _attach(models[0], force, images, TIMED_STEPS)
    if attached is None:
        return 1.0
    optimizers = [engine.sgd(model, settings) for model in models]
    batch = next(images.train.batches(settings.batch_size))
    ratios = []
    for _ in range(TIMED_STEPS):
        with_force, without = (
            _seconds(partial(engine.train_step, model, optimizer, *batch))
            for model, optimizer in zip(models, optimizers)
        )
        ratios.append(with_force / without)
    attached.detach()
    return statistics.median(ratios)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _sweep(name: str, network: nn.Module, images: data.Data, bar: Progress) -> list[Cut]:
    task = bar.add_task(f"pruning: {name}", total=len(RATIOS), note="")
    repair = REPAIR if name == NO_FORCE else 0
    return sweep(network, images, ratios=RATIOS, repair=repair, tick=lambda: bar.advance(task))


def _save(folder: Path, networks: Mapping[str, nn.Module], images: data.Data) -> None:
    """Each network whole, and without half of its filters."""
    example = next(images.test.batches(2))[0]
    for name, network in networks.items():
        stem = name.replace(", ", "-").replace(" %", "").replace(" ", "-").lower()
        efreg.save(network, folder / f"{stem}.safetensors")
        plan = efreg.plan(network, ratio=0.5, coupled=False, example_inputs=example)
        efreg.save(efreg.prune(network, plan, example_inputs=example), folder / f"{stem}-half.safetensors")


def _draw(path: Path, sweeps: Mapping[str, Sequence[Cut]], epochs: int) -> None:
    looks = {force.name: force.look for force in CONTENDERS} | {REPAIRED: look_of(NO_FORCE, style="--")}

    def curves(figure: str) -> list[figures.Curve]:
        kept = figures.curves(sweeps, "removed", figure, looks)
        flattest = min(kept, key=lambda curve: curve.y[0] - statistics.mean(curve.y))
        repaired = figures.curves({REPAIRED: sweeps[NO_FORCE]}, "removed", "repaired", looks)
        return [replace(curve, strong=curve is flattest) for curve in kept] + repaired

    figures.draw_panels(
        path,
        [figures.Panel(ACCURACIES[figure], figures.REMOVED, curves(figure)) for figure in FIGURES],
        "What is left when filters are removed, without training again",
        f"ResNet-14 on scikit-learn's digits: trained, then {epochs} epochs with each force, then cut",
    )
