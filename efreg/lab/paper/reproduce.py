"""`efreg paper table3 ... figure3`: what is missing is run, then the published figures stand beside ours."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from efreg.lab import data, distributed, engine
from efreg.lab.checkpoints import replacing
from efreg.lab.logs import progress, write_csv
from efreg.lab.paper import cuts, pictures, recipes, step_times, tables, unaided
from efreg.lab.paper.cuts import Job, Row
from efreg.lab.paper.recipes import Group

TITLES = {
    "table3": "Table 3: what a training step costs",
    "table4": "Table 4: ResNet-56 on CIFAR-10, pruned and fine-tuned",
    "table5": "Table 5: VGG-19 on CIFAR-100, pruned and fine-tuned",
    "table6": "Table 6: ResNet-34 on ImageNet, pruned and fine-tuned",
    "no-finetuning": "Right after pruning, nothing trained again",
    "figure2": "Figure 2: accuracy right after pruning, nothing trained again",
    "figure3": "Figure 3: filters' L1 norms, of each layer's largest",
}
TIMED_STEPS = 20


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
    console: Console,
) -> None:
    """Runs what a table or figure lacks, then writes it to `out`: Markdown or pictures, and CSV.

    what: one of TITLES. only: groups of the recipes; where none is named all that have data. epochs_scale: a
    share of the epochs that the recipes say. What was interrupted goes on after its last epoch. Raises
    ValueError for what cannot be run or read, FileNotFoundError where a group that was named lacks data.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}: it must be at least 1")
    if not 0 < epochs_scale <= 1:
        raise ValueError(f"the scale of the epochs is {epochs_scale:g}: it is a share of them, in (0, 1]")
    heading = TITLES[what] + ("" if epochs_scale == 1 else f" (ours in {epochs_scale:g} of the epochs)")
    with distributed.processes(device):
        output = Output(what, Path(out), heading, Console(quiet=True) if distributed.rank() else console)
        if what == "table3":
            return _table3(output, only, engine.device_named(device))
        known = _groups(recipes.read(recipes_file), what, only)
        groups = [group.on(data_folder, device).scaled(epochs_scale) for group in known]
        groups = [group for group in groups if _has_data(group, bool(only), output)]
        output.runs.mkdir(parents=True, exist_ok=True)
        if what == "figure3":
            return _figure3(output, groups)
        show = {"figure2": _figure2, "no-finetuning": _unaided}.get(what, _fine_tuned)
        show(output, groups, _rows(groups, seeds, output))


@dataclass(frozen=True)
class Output:
    """What a command makes, and where it writes and prints it; of several processes the first alone does."""

    what: str
    folder: Path
    heading: str
    console: Console

    @property
    def runs(self) -> Path:
        """The folder of the networks and of what was measured of each."""
        return self.folder / "runs"

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def table(self, text: str, rows: Iterable[dict]) -> None:
        """The table in Markdown, and the rows behind it as CSV."""
        self.rows(rows)
        if not distributed.rank():
            with replacing(self.folder / f"{self.what}.md") as file:
                file.write(f"{text}\n".encode())
        self.say(f"{text}\n\nWritten to {self.folder}: {self.what}.md, {self.what}.csv")

    def rows(self, rows: Iterable[dict]) -> None:
        """The rows as CSV."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not distributed.rank():
            write_csv(self.folder / f"{self.what}.csv", rows)

    def pictures(self, draw: Callable[[Group], str], groups: Sequence[Group]) -> None:
        """One of each group; `draw` names its files."""
        names = [] if distributed.rank() else [draw(group) for group in groups]
        self.say(f"Written to {self.folder}: {', '.join([f'{self.what}.csv', *names])}")


def _groups(known: dict[str, Group], what: str, only: Sequence[str]) -> list[Group]:
    """Those that the command shows. Raises ValueError for a name in `only` that is none of them."""
    shown = {name: group for name, group in known.items() if what in group.shown}
    if unknown := [name for name in only if name not in shown]:
        raise ValueError(f"{what} has no group {unknown[0]!r}: there are {', '.join(shown) or 'none'}")
    return [group for name, group in shown.items() if not only or name in only]


def _has_data(group: Group, insist: bool, output: Output) -> bool:
    """Whether a group's images and first weights are there. Raises FileNotFoundError where we insist."""
    base = group.base
    try:
        data.load(base.dataset, base.data)
        if group.weights and not Path(base.data, group.weights).is_file():
            raise FileNotFoundError(
                f"no {group.weights} in {base.data}: put the weights of {group.title} there, from "
                f"{group.weights_from}"
            )
    except FileNotFoundError as error:
        if insist:
            raise
        output.say(f"{group.name} is left out: {error}")
        return False
    return True


def _rows(groups: Sequence[Group], seeds: int, output: Output) -> list[Row]:
    """Of every run of the groups from every seed."""
    jobs = [
        Job(group, recipe, seed, output.runs)
        for group in groups
        for seed in range(min(seeds, group.seeds))
        for recipe in group.recipes
    ]
    return [row for found in _each(jobs, cuts.measure, output) for row in found]


def _each(jobs: Sequence[Job], function: Callable, output: Output) -> list:
    """What the function makes of each job, under a progress bar of epochs."""
    found = []
    with progress(output.console) as bar:
        task = bar.add_task("epochs", total=sum(job.epochs for job in jobs), note="")
        for job in jobs:
            bar.update(task, note=str(job))
            found.append(function(job, output.say, lambda epochs: bar.advance(task, epochs)))
    return found


def _table3(output: Output, only: Sequence[str], device: torch.device) -> None:
    networks = [network for network in step_times.NETWORKS if not only or network.name in only]
    if not networks:
        known = ", ".join(network.name for network in step_times.NETWORKS)
        raise ValueError(f"table3 has no network {only[0]!r}: there are {known}")
    found = []
    with progress(output.console) as bar:
        task = bar.add_task("timing steps", total=len(networks) * (TIMED_STEPS + 1), note="")
        for network in networks:
            bar.update(task, note=network.title)
            found += step_times.measure(network, device, TIMED_STEPS, lambda: bar.advance(task))
    output.table(step_times.table(output.heading, found), map(asdict, found))


def _fine_tuned(output: Output, groups: Sequence[Group], rows: Sequence[Row]) -> None:
    lines = tables.lines(tables.PUBLISHED[output.what], rows)
    output.table(tables.table(output.heading, lines), ({**asdict(x), "drop": x.drop} for x in lines))


def _unaided(output: Output, groups: Sequence[Group], rows: Sequence[Row]) -> None:
    titles = {group.name: group.title for group in groups}
    output.table(unaided.table(output.heading, titles, rows), map(asdict, rows))


def _figure2(output: Output, groups: Sequence[Group], rows: Sequence[Row]) -> None:
    def draw(group: Group) -> str:
        own = [row for row in rows if row.group == group.name]
        return pictures.accuracies(output.folder, output.heading, group, own)

    output.rows(map(asdict, rows))
    output.pictures(draw, groups)


def _figure3(output: Output, groups: Sequence[Group]) -> None:
    """From seed 0."""
    whole = [replace(group, fine_tune=None) for group in groups]
    jobs = [Job(group, group.recipe(name), 0, output.runs) for group in whole for name in group.norms]
    norms = [norm for found in _each(jobs, pictures.norms_of, output) for norm in found]

    def draw(group: Group) -> str:
        own = [norm for norm in norms if norm.group == group.name]
        return pictures.norms(output.folder, output.heading, group, own)

    output.rows(map(asdict, norms))
    output.pictures(draw, groups)
