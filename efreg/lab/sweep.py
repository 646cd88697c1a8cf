"""Accuracy against pruning ratio: one trained network, cut physically at every ratio, never trained again."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from math import isnan, nan
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import efreg
from efreg.lab import checkpoints, data, engine, figures
from efreg.lab.checkpoints import Settings
from efreg.lab.logs import progress, write_csv, write_text
from efreg.lab.ways import way_of

RATIOS = tuple(tenth / 10 for tenth in range(10))
"""0 to 90 %."""

Planning = Mapping[str, Any]
"""What `efreg.plan` is told beside a ratio."""

PAPERS: Planning = {"coupled": False}
"""The papers' way: convolutions that one layer reads, ranked by their magnitudes."""

ACCURACIES = {
    "accuracy": "right after pruning",
    "recalibrated": "batch-norm statistics re-estimated",
    "repaired": "repaired without training",
}
"""The accuracies of a cut, and how each is called."""

STATISTICS_BATCHES = 40
"""Batch-norm statistics are re-estimated on as many batches of 250 training images at most, cropped and
flipped as in training: on plain ones a whole ResNet-20 loses three points of accuracy on CIFAR-10."""


@dataclass(frozen=True)
class Cut:
    """A network pruned at `ratio`: accuracy in percent right after it, and with re-estimated statistics.

    ratio: the share of filters that each pruned layer loses, or a list of ratios as the papers have it.
    repaired: accuracy after `efreg.compensate` instead; NaN where that was not asked for.
    """

    ratio: float | str
    accuracy: float
    recalibrated: float
    macs: int
    parameters: int
    repaired: float = nan

    @property
    def removed(self) -> float:
        """The share in percent, where it is one."""
        return 100 * float(self.ratio)


def sweep(
    model: nn.Module,
    images: data.Data,
    *,
    planning: Planning = PAPERS,
    ratios: Iterable[float | str] = RATIOS,
    dtype: torch.dtype = torch.float32,
    repair: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> list[Cut]:
    """The network cut at each of the ratios, every time from the whole one; `tick` is called after each.

    dtype: what the networks compute in when they are evaluated and their statistics re-estimated. repair: on
    how many training images they are repaired, none with 0.
    """
    cuts = []
    for ratio in ratios:
        cuts.append(_cut(model, images, ratio, planning, dtype, repair))
        tick()
    return cuts


def planned(model: nn.Module, ratio: float | str, example: Tensor, planning: Planning = PAPERS) -> efreg.Plan:
    """The plan that takes this share of each group, or as a list of ratios has it."""
    asked: dict[str, Any] = {"ratios" if isinstance(ratio, str) else "ratio": ratio}
    return efreg.plan(model, **asked, **planning, example_inputs=example)


def pruned(model: nn.Module, ratio: float | str, example: Tensor, planning: Planning = PAPERS) -> nn.Module:
    """The model without this share of each group; itself it stays as it was."""
    plan = planned(model, ratio, example, planning)
    return efreg.prune(model, plan, example_inputs=example)


def rows(cuts: Iterable[Cut], **more: Any) -> list[dict]:
    """The cuts as rows for a CSV, `more` in front of each."""
    return [{**more, **asdict(cut)} for cut in cuts]


def accuracy_table(
    sweeps: Mapping[str, Sequence[Cut]], step_times: Mapping[str, float] | None = None
) -> Table:
    """One row a sweep, one column a ratio; then the same with re-estimated statistics, and of those that were
    repaired; then what a cut costs.

    step_times: of each sweep the time of a training step, relative to one without a force.
    """
    cuts = next(iter(sweeps.values()))
    title = "Accuracy in % without these % of the filters"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, title=title)
    table.add_column("right after pruning", no_wrap=True)
    table.add_column("step" if step_times else "", justify="right", no_wrap=True)
    for cut in cuts:
        table.add_column(f"{100 * cut.ratio:.0f}", justify="right", no_wrap=True, min_width=3)
    for name, found in sweeps.items():
        time = f"{step_times[name]:.2f}" if step_times else ""
        table.add_row(name, time, *(f"{cut.accuracy:.0f}" for cut in found))
    table.add_section()
    table.add_row("[bold]statistics re-estimated[/bold]")
    for name, found in sweeps.items():
        table.add_row(name, "", *(f"{cut.recalibrated:.0f}" for cut in found))
    repaired = {
        name: found for name, found in sweeps.items() if not any(isnan(cut.repaired) for cut in found)
    }
    if repaired:
        table.add_section()
        table.add_row("[bold]repaired without training[/bold]")
    for name, found in repaired.items():
        table.add_row(name, "", *(f"{cut.repaired:.0f}" for cut in found))
    table.add_section()
    table.add_row("MACs left, %", "", *(f"{100 * cut.macs / cuts[0].macs:.0f}" for cut in cuts))
    table.add_row(
        "parameters left, %", "", *(f"{100 * cut.parameters / cuts[0].parameters:.0f}" for cut in cuts)
    )
    return table


def run(
    checkpoint: str | Path,
    out: str | Path | None,
    *,
    data_folder: str | None = None,
    repair: int = 0,
    html: Path | None = None,
    command: str | None = None,
    console: Console,
) -> list[Cut]:
    """Sweeps a checkpoint of `efreg train` on its data set: prints a table, writes sweep.csv and sweep.png.

    out: a folder; None is the checkpoint's own. data_folder: where the data set lies now, if it was moved.
    repair: on how many training images the cut networks are repaired, none with 0. html: a file for a page to
    look at, none with None. command: what the page says that it was made by.
    """
    trained = checkpoints.load(checkpoint)
    settings = trained.settings
    model = engine.restore(trained)
    images = data.load(settings.dataset, data_folder or settings.data)
    if images.info.num_classes != trained.num_classes:
        raise ValueError(
            f"{checkpoint} tells {trained.num_classes} classes apart, {data_folder or settings.data} holds "
            f"{images.info.num_classes}: name the folder that it was trained on with --data"
        )
    out = Path(out or Path(checkpoint).parent)
    out.mkdir(parents=True, exist_ok=True)
    with progress(console) as bar:
        task = bar.add_task("pruning", total=len(RATIOS), note="")
        planning = engine.ranked(trained)
        if settings.nested:
            re_estimate(model, images, torch.float32)
        cuts = sweep(model, images, planning=planning, repair=repair, tick=lambda: bar.advance(task))
    write_csv(out / "sweep.csv", cuts)
    _draw(out / "sweep.png", cuts, settings)
    console.print(accuracy_table({settings.model: cuts}))
    console.print(f"Written to {out}: sweep.csv, sweep.png", highlight=False)
    if html:
        curves = {name: list(zip(RATIOS, values)) for name, values in _accuracies(cuts).items()}
        write_text(html, page(model, images, curves, settings.model, planning=planning, command=command))
        console.print(f"Written to {html}", highlight=False)
    return cuts


def page(
    model: nn.Module,
    images: data.Data,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    *,
    planning: Planning = PAPERS,
    command: str | None,
) -> str:
    """A page to look at: the curves, and of the network whole and at a ratio of one half.

    curves: of each name the accuracies in percent at ratios, as pairs (ratio, accuracy).
    """
    example = next(images.test.batches(2))[0]
    plan = planned(model, 0.5, example, planning)
    small = efreg.prune(model, plan, example_inputs=example)
    return efreg.report(model, small, example_inputs=example[:1]).to_html(
        efreg.inspect(model, example),
        plan,
        curves=curves,
        title=f"{title}, whole and at a ratio of 50 %",
        command=command,
    )


def _accuracies(cuts: Sequence[Cut]) -> dict[str, list[float]]:
    """What was measured at each ratio, by name."""
    found = {name: [getattr(cut, what) for cut in cuts] for what, name in ACCURACIES.items()}
    return {name: values for name, values in found.items() if not any(map(isnan, values))}


def _draw(path: Path, cuts: Sequence[Cut], settings: Settings) -> None:
    removed = [cut.removed for cut in cuts]
    curves = [figures.Curve(name, removed, values) for name, values in _accuracies(cuts).items()]
    force, strength = way_of(settings).force, f", α = {settings.alpha:g}" if settings.alpha else ""
    figures.draw_panels(
        path,
        [figures.Panel(settings.model, figures.REMOVED, curves)],
        "Accuracy when filters are removed",
        f"{settings.dataset}, {force}{strength}",
    )


def _cut(
    model: nn.Module,
    images: data.Data,
    ratio: float | str,
    planning: Planning,
    dtype: torch.dtype,
    repair: int,
) -> Cut:
    example = next(images.test.batches(2))[0]
    small = pruned(model, ratio, example, planning)
    accuracy = engine.evaluate(small, images.test, dtype=dtype)[1]
    macs = efreg.macs(small, example[:1])
    repaired = accuracy if repair else nan
    if repair and macs < efreg.macs(model, example[:1]):
        repaired = _repaired(small, model, images, dtype, repair)
    re_estimate(small, images, dtype)
    recalibrated = engine.evaluate(small, images.test, dtype=dtype)[1]
    parameters = sum(p.numel() for p in small.parameters())
    return Cut(ratio, accuracy, recalibrated, macs, parameters, repaired)


def re_estimate(model: nn.Module, images: data.Data, dtype: torch.dtype) -> None:
    """Statistics of batch norms anew; of a nested network they are those of all widths together."""
    with engine.computing(dtype, next(model.parameters()).device):
        efreg.recalibrate(model, islice(images.train.epoch(250, 0, 0), STATISTICS_BATCHES))


def _repaired(
    small: nn.Module, model: nn.Module, images: data.Data, dtype: torch.dtype, repair: int
) -> float:
    """The accuracy of a copy of the small network that was repaired on so many training images."""
    copied = copy.deepcopy(small)
    efreg.compensate(copied, model, images.train.epoch(250, 0, 0), images=repair)
    return engine.evaluate(copied, images.test, dtype=dtype)[1]
