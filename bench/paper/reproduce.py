"""What a table or figure lacks is run, then the published figures stand beside ours."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import nan
from pathlib import Path

from rich.console import Console

from bench.paper import accuracies, costs, forces, jobs, norms, recipes, runs
from bench.paper.accuracies import grouped, over_seeds, published
from bench.paper.jobs import Job, Outcome
from bench.paper.recipes import TITLES, Group, Recipe
from efreg.lab import data, distributed
from efreg.lab.logs import progress, read_csv, write_csv, write_text

UNTRAINED = {"speedups": (costs.sizes, costs.size_table), "table3": (costs.step_times, costs.step_table)}
"""The commands that train nothing: what they measure of a group, and the table of it."""


def run(what: str, out: str | Path, **options) -> None:
    """Runs what a table or figure lacks, then writes it to `out`: Markdown or pictures, and CSV.

    options: the further fields of `Reproduction`. What was interrupted goes on after its last epoch. Raises
    ValueError for what cannot be run or read, FileNotFoundError where a group that was named lacks data.
    """
    asked = Reproduction(what, Path(out), **options)
    with distributed.processes(asked.device), distributed.alone(asked.runs):
        if distributed.rank():
            asked = replace(asked, console=Console(quiet=True))
        found = asked.measured()
        if not distributed.rank():
            asked.show(found)


@dataclass(frozen=True)
class Reproduction:
    """A table or figure that is asked for, one of TITLES; its fields are options of the command line."""

    what: str
    out: Path
    console: Console
    data: str = "data"
    only: Sequence[str] = ()
    seeds: int = 3
    epochs_scale: float = 1.0
    recipes: str | Path = recipes.OURS
    rows: Sequence[str | Path] = ()
    recalibrated: bool = False
    device: str = "auto"

    def __post_init__(self):
        scale = self.epochs_scale
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}: it must be at least 1")
        if not 0 < scale <= 1:
            raise ValueError(f"the scale of the epochs is {scale:g}: it is a share of them, in (0, 1]")
        if self.what in UNTRAINED and (scale != 1 or self.rows):
            raise ValueError(f"{self.what} trains nothing: drop --epochs-scale and --rows")
        if self.what in UNTRAINED and distributed.launched() > 1:
            raise ValueError(f"{self.what} measures in one process: run it without torchrun")
        if self.recalibrated and self.what != "figure2":
            raise ValueError(f"{self.what} has no choice of batch-norm statistics: drop --recalibrated")

    @property
    def name(self) -> str:
        """What its files are called: those at another scale of the epochs are others."""
        return self.what if self.epochs_scale == 1 else f"{self.what}-{self.epochs_scale:g}"

    @property
    def heading(self) -> str:
        """What it is headed with."""
        scaled = "" if self.epochs_scale == 1 else f" (ours in {self.epochs_scale:g} of the epochs)"
        return f"{TITLES[self.what]}{scaled}"

    @property
    def runs(self) -> Path:
        """The folder of the networks and of what was measured of each."""
        return self.out / "runs"

    @cached_property
    def groups(self) -> list[Group]:
        """All that it shows."""
        groups = recipes.read(self.recipes).values()
        return [g.on(self.data, self.device, self.epochs_scale) for g in groups if self.what in g.shown]

    @property
    def titles(self) -> dict[str, str]:
        """Of each group the network and its images."""
        return {group.name: group.title for group in self.groups}

    def measured(self) -> list:
        """The rows that it is made of: read from their files, or measured."""
        if unknown := [name for name in self.only if name not in self.titles]:
            known = ", ".join(self.titles) or "none"
            raise ValueError(f"{self.what} has no group {unknown[0]!r}: there are {known}")
        named = [group for group in self.groups if not self.only or group.name in self.only]
        if self.what in UNTRAINED:
            measure, _ = UNTRAINED[self.what]
            return self._each("networks", dict.fromkeys(named, 1), lambda group, watch: measure(group))
        chosen, every = self._runnable(named), self._jobs()
        if self.what == "figure3":
            wanted, measure = [j for j in every if j.group in chosen or j.network.exists()], norms.measure
        else:
            jobs.take_over(every, [row for file in self.rows for row in read_csv(file, Outcome)])
            wanted, measure = [j for j in every if j.group in chosen or j.outcomes.exists()], jobs.measure
        return self._each("epochs", {job: job.epochs for job in wanted}, measure)

    def _jobs(self) -> list[Job]:
        """Every run that it shows, from every seed."""
        return [
            Job(group, recipe, seed, self.runs)
            for group in self.groups
            for seed in range(self.seeds)
            for recipe in self._recipes(group)
            if seed < recipe.seeds
        ]

    def _recipes(self, group: Group) -> Sequence[Recipe]:
        """All; of figure 3 some, from one seed and without fine-tuning."""
        if self.what != "figure3":
            return group.recipes
        return [replace(group.recipe(name), fine_tune=None, seeds=1) for name in group.norms]

    def _runnable(self, named: Sequence[Group]) -> list[Group]:
        """Those that have data.

        Raises FileNotFoundError where one in `only` lacks them, or all do; ValueError for what cannot be run.
        """
        missing = {}
        for group in named:
            try:
                recipes.require_data(group)
            except data.Missing as error:
                missing[group.name] = error
        if missing and (self.only or len(missing) == len(named)):
            raise next(iter(missing.values()))
        for name, error in missing.items():
            self._say(f"{name} is left out: {error}")
        runnable = [group for group in named if group.name not in missing]
        for group in runnable:
            recipes.rehearse(group)
        return runnable

    def _each(self, unit: str, wanted: Mapping[Job | Group, int], measure: Callable) -> list:
        """All that is measured of what is wanted, under a progress bar of so many units of each."""
        found = []
        with progress(self.console) as bar:
            task = bar.add_task(unit, total=sum(wanted.values()), note="")
            watch = runs.Watch(self._say, lambda: bar.advance(task))
            for one, done in zip(wanted, accumulate(wanted.values()), strict=True):
                bar.update(task, note=str(one))
                found += measure(one, watch)
                bar.update(task, completed=done)
        return found

    def show(self, found: Sequence) -> None:
        """Writes tables and pictures, and the rows behind them."""
        if self.what == "forces":
            self._forces(found)
        elif self.what in UNTRAINED:
            _, table = UNTRAINED[self.what]
            self._table(table(self.heading, found), found)
        elif self.what == "figure3":
            self._table(norms.table(self.heading, self.titles, found), found)
            self._pictures(norms.picture, found)
        else:
            self._means(found)

    def _forces(self, outcomes: Sequence[Outcome]) -> None:
        """Of each group a table, its picture, and the latencies of its cut networks."""
        for group, own in self._by_group(outcomes):
            name, latencies = f"{self.name}-{group.name}", costs.latencies(group, self.runs)
            write_csv(self.out / f"{name}-latency.csv", latencies)
            self._table(forces.table(group, own, latencies), own, name)
            self._pictures(forces.picture, own)

    def _means(self, outcomes: Sequence[Outcome]) -> None:
        """Over the seeds, beside what is published."""
        ended = "fine_tuned" if self.what in recipes.FINE_TUNING else "accuracy"
        means = [*published(self.what), *over_seeds(outcomes, self.titles, ended)]
        told = means if self.recalibrated else [replace(mean, recalibrated=nan) for mean in means]
        tables = {"no-finetuning": accuracies.lost, "figure2": accuracies.by_ratio}
        self._table(tables.get(self.what, accuracies.fine_tuned)(self.heading, told), means)
        if self.what == "figure2":
            self._pictures(accuracies.picture, [mean for mean in told if mean.n])

    def _by_group(self, rows: Iterable) -> list[tuple[Group, list]]:
        """The groups that have rows, and these."""
        own = grouped(rows, lambda row: row.group)
        return [(group, own[group.name]) for group in self.groups if group.name in own]

    def _table(self, text: str, rows: Sequence, name: str | None = None) -> None:
        """The table in Markdown, and the rows behind it as CSV."""
        name = name or self.name
        write_csv(self.out / f"{name}.csv", rows)
        write_text(self.out / f"{name}.md", f"{text}\n")
        self._say(f"{text}\n\nWritten to {self.out}: {name}.md, {name}.csv")

    def _pictures(self, draw: Callable[..., str], rows: Sequence) -> None:
        """Of each group that has rows; `draw` names the files."""
        for group, own in self._by_group(rows):
            names = draw(self.out / f"{self.name}-{group.name}", self.heading, group, own)
            self._say(f"Written to {self.out}: {names}")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
