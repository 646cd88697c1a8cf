"""`efreg paper table3 ... figure3`: what is missing is run, then the published figures stand beside ours."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from efreg.lab import data, distributed, engine
from efreg.lab.checkpoints import replacing
from efreg.lab.logs import progress, write_csv
from efreg.lab.paper import curves, cuts, pictures, recipes, runs, speedups, step_times, tables, unaided
from efreg.lab.paper.cuts import Job, Outcome
from efreg.lab.paper.recipes import Group

TITLES = {
    "speedups": "Speedups: what is left of the paper's networks",
    "table3": "Table 3: what a training step costs",
    "table4": "Table 4: ResNet-56 on CIFAR-10, pruned and fine-tuned",
    "table5": "Table 5: VGG-19 on CIFAR-100, pruned and fine-tuned",
    "table6": "Table 6: ResNet-34 on ImageNet, pruned and fine-tuned",
    "no-finetuning": "Right after pruning, nothing trained again",
    "figure2": "Figure 2: accuracy right after pruning, nothing trained again",
    "figure3": "Figure 3: filters' L1 norms, of each layer's largest",
}
TIMED_STEPS = 10


def run(
    what: str,
    out: str | Path,
    *,
    data_folder: str = "data",
    only: Sequence[str] = (),
    seeds: int = 3,
    epochs_scale: float = 1.0,
    device: str = "auto",
    recipes_file: str | Path = recipes.OURS,
    recalibrated: bool = False,
    console: Console,
) -> None:
    """Runs what a table or figure lacks, then writes it to `out`: Markdown or pictures, and CSV.

    what: one of TITLES. only: groups of the recipes; where none is named all that have data. epochs_scale: a
    share of the epochs that the recipes say. recalibrated: figure 2 shows the accuracies with re-estimated
    batch-norm statistics too. What was interrupted goes on after its last epoch. Raises ValueError for what
    cannot be run or read, FileNotFoundError where a group that was named lacks data.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}: it must be at least 1")
    if not 0 < epochs_scale <= 1:
        raise ValueError(f"the scale of the epochs is {epochs_scale:g}: it is a share of them, in (0, 1]")
    untrained = {"speedups": _speedups, "table3": _table3}.get(what)
    if untrained and (epochs_scale != 1 or recipes_file != recipes.OURS):
        raise ValueError(f"{what} trains nothing: drop --epochs-scale and --recipes")
    if recalibrated and what != "figure2":
        raise ValueError(f"{what} has no choice of batch-norm statistics: drop --recalibrated")
    with distributed.processes(device):
        output = Output(what, Path(out), epochs_scale, Console(quiet=True) if distributed.rank() else console)
        with runs.alone(output.runs):
            if untrained:
                return untrained(output, only, engine.device_named(device))
            known = [
                group.on(data_folder, device).scaled(epochs_scale)
                for group in recipes.read(recipes_file).values()
                if what in group.shown
            ]
            chosen = _chosen(known, only, output)
            if what == "figure3":
                return _figure3(output, known, chosen)
            outcomes = _outcomes(known, chosen, seeds, output)
            if what == "figure2":
                left_out = () if recalibrated else ("recalibrated",)
                shown = [what for what in curves.SHOWN if what not in left_out]
                return _figure2(output, known, outcomes, shown)
            show = _unaided if what == "no-finetuning" else _fine_tuned
            show(output, known, outcomes)


@dataclass(frozen=True)
class Output:
    """What a command makes, and where it writes and prints it; of several processes the first alone does."""

    what: str
    folder: Path
    scale: float
    console: Console

    @property
    def name(self) -> str:
        """What its files are called: those at another scale of the epochs are others."""
        return self.what if self.scale == 1 else f"{self.what}-{self.scale:g}"

    @property
    def heading(self) -> str:
        """What it is headed with."""
        scaled = "" if self.scale == 1 else f" (ours in {self.scale:g} of the epochs)"
        return f"{TITLES[self.what]}{scaled}"

    @property
    def runs(self) -> Path:
        """The folder of the networks and of what was measured of each."""
        return self.folder / "runs"

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def table(self, text: str, rows: Iterable[dict]) -> None:
        """The table in Markdown, and the rows behind it as CSV."""
        if not distributed.rank():
            write_csv(self.folder / f"{self.name}.csv", rows)
            with replacing(self.folder / f"{self.name}.md") as file:
                file.write(f"{text}\n".encode())
        self.say(f"{text}\n\nWritten to {self.folder}: {self.name}.md, {self.name}.csv")

    def picture(self, group: Group) -> Path:
        """A group's picture, without the end of its name."""
        return self.folder / f"{self.name}-{group.name}"

    def pictures(self, draw: Callable[[Group], str], groups: Sequence[Group]) -> None:
        """One of each group; `draw` names its files."""
        names = [] if distributed.rank() else [draw(group) for group in groups]
        if names:
            self.say(f"Written to {self.folder}: {', '.join(names)}")


def _chosen(known: Sequence[Group], only: Sequence[str], output: Output) -> list[Group]:
    """The groups to run: those in `only`, or all that have data.

    Raises ValueError for a name that is none of them and for a group that cannot be run, FileNotFoundError
    where one that was named lacks its data, or all do.
    """
    names = [group.name for group in known]
    if unknown := [name for name in only if name not in names]:
        raise ValueError(f"{output.what} has no group {unknown[0]!r}: there are {', '.join(names) or 'none'}")
    chosen, missing = [], {}
    for group in known:
        if not only or group.name in only:
            try:
                _require_data(group)
                chosen.append(group)
            except data.Missing as error:
                missing[group.name] = error
    if missing and (only or not chosen):
        raise next(iter(missing.values()))
    for name, error in missing.items():
        output.say(f"{name} is left out: {error}")
    for group in chosen:
        recipes.rehearse(group)
    return chosen


def _require_data(group: Group) -> None:
    data.load(group.base.dataset, group.base.data)
    runs.require_weights(group.base, group.weights, group.weights_from)


def _outcomes(known: Sequence[Group], chosen: Sequence[Group], seeds: int, output: Output) -> list[Outcome]:
    """Of every run of the chosen groups from every seed, and what is there of the others."""
    jobs = [
        Job(group, recipe, seed, output.runs)
        for group in known
        for seed in range(seeds)
        for recipe in group.recipes
        if seed < recipe.seeds
    ]
    wanted = [job for job in jobs if job.group in chosen or job.outcomes.exists()]
    return [outcome for found in _each(wanted, cuts.measure, output) for outcome in found]


def _each(jobs: Sequence[Job], function: Callable, output: Output) -> list:
    """What the function makes of each job, under a progress bar of epochs."""
    found = []
    with progress(output.console) as bar:
        task = bar.add_task("epochs", total=sum(job.epochs for job in jobs), note="")
        for job in jobs:
            bar.update(task, note=str(job))
            found.append(function(job, output.say, lambda epochs: bar.advance(task, epochs)))
    return found


def _speedups(output: Output, only: Sequence[str], _: torch.device) -> None:
    networks = _networks(output, speedups.NETWORKS, only)
    found = [size for network in networks for size in speedups.measure(network)]
    output.table(speedups.table(output.heading, found), map(asdict, found))


def _networks(output: Output, known: Mapping[str, Any], only: Sequence[str]) -> list:
    """Those that are named, or all. Raises ValueError for a name that is none of them, and under torchrun."""
    if unknown := [name for name in only if name not in known]:
        raise ValueError(f"{output.what} has no network {unknown[0]!r}: there are {', '.join(known)}")
    if distributed.world_size() > 1:
        raise ValueError(f"{output.what} measures in one process: run it without torchrun")
    return [known[name] for name in only or known]


def _table3(output: Output, only: Sequence[str], device: torch.device) -> None:
    networks, found = _networks(output, step_times.NETWORKS, only), []
    with progress(output.console) as bar:
        task = bar.add_task("timing steps", total=len(networks) * (TIMED_STEPS + 1), note="")
        for network in networks:
            bar.update(task, note=network.title)
            found += step_times.measure(network, device, TIMED_STEPS, lambda: bar.advance(task))
    output.table(step_times.table(output.heading, found), map(asdict, found))


def _titles(groups: Sequence[Group]) -> dict[str, str]:
    return {group.name: group.title for group in groups}


def _fine_tuned(output: Output, groups: Sequence[Group], outcomes: Sequence[Outcome]) -> None:
    lines = tables.lines(output.what, _titles(groups), outcomes)
    output.table(tables.table(output.heading, lines), map(asdict, lines))


def _unaided(output: Output, groups: Sequence[Group], outcomes: Sequence[Outcome]) -> None:
    lines = unaided.lines(_titles(groups), outcomes)
    output.table(unaided.table(output.heading, lines), map(asdict, lines))


def _figure2(
    output: Output, groups: Sequence[Group], outcomes: Sequence[Outcome], shown: Iterable[str]
) -> None:
    points = curves.points(_titles(groups), outcomes)

    def draw(group: Group) -> str:
        own = [point for point in points if point.group == group.name]
        return pictures.accuracies(output.picture(group), output.heading, group, own, shown)

    output.table(curves.table(output.heading, points, shown), map(asdict, points))
    trained = {point.group for point in points if point.n}
    output.pictures(draw, [group for group in groups if group.name in trained])


def _figure3(output: Output, groups: Sequence[Group], chosen: Sequence[Group]) -> None:
    """From seed 0; of the groups that were not chosen what is there."""
    jobs = [
        Job(group, group.recipe(name), 0, output.runs)
        for group in map(_without_fine_tuning, groups)
        for name in group.norms
    ]
    names = {group.name for group in chosen}
    jobs = [job for job in jobs if job.group.name in names or job.network.exists()]
    norms = [norm for found in _each(jobs, pictures.norms_of, output) for norm in found]

    def draw(group: Group) -> str:
        own = [norm for norm in norms if norm.group == group.name]
        return pictures.norms(output.picture(group), output.heading, group, own)

    output.table(pictures.norms_table(output.heading, _titles(groups), norms), map(asdict, norms))
    shown = {norm.group for norm in norms}
    output.pictures(draw, [group for group in groups if group.name in shown])


def _without_fine_tuning(group: Group) -> Group:
    return replace(group, recipes=tuple(replace(recipe, fine_tune=None) for recipe in group.recipes))
