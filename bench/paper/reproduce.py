"""What a table or figure lacks is run, then the published figures stand beside ours."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from rich.console import Console

from bench.paper import jobs, latency, norms, pictures, recipes, runs, speedups, step_times, tables
from bench.paper.jobs import Job, Outcome
from bench.paper.means import over_seeds, published
from bench.paper.recipes import Group
from efreg.disk import replacing
from efreg.lab import data, distributed, engine
from efreg.lab.logs import progress, read_csv, write_csv

TITLES = {
    "forces": "Accuracy before, against accuracy without half of the filters",
    "speedups": "Speedups: what is left of the paper's networks",
    "table3": "Table 3: what a training step costs",
    "table4": "Table 4: ResNet-56 on CIFAR-10, pruned and fine-tuned",
    "table5": "Table 5: VGG-19 on CIFAR-100, pruned and fine-tuned",
    "table6": "Table 6: ResNet-34 on ImageNet, pruned and fine-tuned",
    "no-finetuning": "Right after pruning, nothing trained again",
    "figure2": "Figure 2: accuracy right after pruning, nothing trained again",
    "figure3": "Figure 3: filters' L1 norms, of each layer's largest",
}


def run(what: str, out: str | Path, **options) -> None:
    """Runs what a table or figure lacks, then writes it to `out`: Markdown or pictures, and CSV.

    options: the further fields of `Reproduction`. What was interrupted goes on after its last epoch. Raises
    ValueError for what cannot be run or read, FileNotFoundError where a group that was named lacks data.
    """
    asked = Reproduction(what, Path(out), **options)
    with distributed.processes(asked.device), runs.alone(asked.runs):
        if distributed.rank():
            asked = replace(asked, console=Console(quiet=True))
        asked.make()


@dataclass(frozen=True)
class Reproduction:
    """A table or figure that is asked for, and how.

    what: one of TITLES. data: the folder of the data sets and weights. only: groups of the recipes; where
    none is named all that have data. seeds: of each run, at most. epochs_scale: a share of the epochs that
    the recipes say. recipes: a file of them. rows: CSV files of outcomes, whose runs count as done.
    recalibrated: figure 2 shows the accuracies with re-estimated batch-norm statistics too.
    """

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
        if self.what in recipes.UNTRAINED and (scale != 1 or self.rows):
            raise ValueError(f"{self.what} trains nothing: drop --epochs-scale and --rows")
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

    def make(self) -> None:
        """Runs what is missing, shows all."""
        named = self._named()
        if self.what in recipes.UNTRAINED:
            return self._untrained(named)
        chosen = self._runnable(named)
        if self.what == "figure3":
            return self._figure3(chosen)
        show = {"forces": self._forces, "figure2": self._figure2}.get(self.what, self._beside_published)
        show(self._outcomes(chosen))

    def _named(self) -> list[Group]:
        """The groups in `only`, or all. Raises ValueError for a name that is none of them."""
        if unknown := [name for name in self.only if name not in self.titles]:
            known = ", ".join(self.titles) or "none"
            raise ValueError(f"{self.what} has no group {unknown[0]!r}: there are {known}")
        return [group for group in self.groups if not self.only or group.name in self.only]

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

    def _outcomes(self, chosen: Sequence[Group]) -> list[Outcome]:
        """Of every run of the chosen groups from every seed, and what is there of the others."""
        every = [
            Job(group, recipe, seed, self.runs)
            for group in self.groups
            for seed in range(self.seeds)
            for recipe in group.recipes
            if seed < recipe.seeds
        ]
        jobs.take_over(every, [row for file in self.rows for row in read_csv(file, Outcome)])
        return self._each([j for j in every if j.group in chosen or j.outcomes.exists()], jobs.measure)

    def _each(self, wanted: Sequence[Job], measure: Callable) -> list:
        """All that is measured of the jobs, under a progress bar of epochs."""
        found = []
        with progress(self.console) as bar:
            task = bar.add_task("epochs", total=sum(job.epochs for job in wanted), note="")
            for job in wanted:
                bar.update(task, note=str(job))
                found += measure(job, self._say, lambda epochs: bar.advance(task, epochs))
        return found

    def _forces(self, outcomes: Sequence[Outcome]) -> None:
        """Of each group a table, its picture, and the latencies of its cut networks."""
        for group in self.groups:
            if own := [outcome for outcome in outcomes if outcome.group == group.name]:
                name, latencies = f"{self.name}-{group.name}", latency.measure(group, self.runs)
                self._csv(f"{name}-latency", latencies)
                self._table(tables.forces(group, own, latencies), own, name)
                self._picture(pictures.trade, group, own)

    def _beside_published(self, outcomes: Sequence[Outcome]) -> None:
        """Tables 4 to 6, and what is lost right after pruning."""
        tuned = self.what in recipes.FINE_TUNING
        ours = over_seeds(outcomes, self.titles, "fine_tuned" if tuned else "accuracy")
        means = [*published(self.what), *ours]
        table = tables.fine_tuned if tuned else tables.lost
        self._table(table(self.heading, means), means)

    def _figure2(self, outcomes: Sequence[Outcome]) -> None:
        means = over_seeds(outcomes, self.titles)
        self._table(tables.by_ratio(self.heading, means, self.recalibrated), means)
        for group in self.groups:
            own = [mean for mean in means if mean.group == group.name]
            if any(mean.n for mean in own):
                self._picture(pictures.accuracies, group, own, self.recalibrated)

    def _figure3(self, chosen: Sequence[Group]) -> None:
        """From seed 0, without fine-tuning; of the groups that were not chosen what is there."""
        wanted = [
            Job(group, replace(group.recipe(name), fine_tune=None), 0, self.runs)
            for group in self.groups
            for name in group.norms
        ]
        wanted = [job for job in wanted if job.group in chosen or job.network.exists()]
        found = self._each(wanted, norms.measure)
        self._table(norms.table(self.heading, self.titles, found), found)
        for group in self.groups:
            if own := [norm for norm in found if norm.group == group.name]:
                self._picture(pictures.norms, group, own)

    def _untrained(self, groups: Sequence[Group]) -> None:
        """The paper's networks cut, or trained for a few steps."""
        if distributed.world_size() > 1:
            raise ValueError(f"{self.what} measures in one process: run it without torchrun")
        module, found = {"speedups": speedups, "table3": step_times}[self.what], []
        with progress(self.console) as bar:
            task = bar.add_task("networks", total=len(groups), note="")
            for group in groups:
                bar.update(task, note=group.title)
                found += module.measure(group, engine.device_named(self.device))
                bar.advance(task)
        self._table(module.table(self.heading, found), found)

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _table(self, text: str, rows: Iterable, name: str | None = None) -> None:
        """The table in Markdown, and the rows behind it as CSV."""
        name = name or self.name
        self._csv(name, rows)
        if not distributed.rank():
            with replacing(self.out / f"{name}.md") as file:
                file.write(f"{text}\n".encode())
        self._say(f"{text}\n\nWritten to {self.out}: {name}.md, {name}.csv")

    def _csv(self, name: str, rows: Iterable) -> None:
        if not distributed.rank():
            write_csv(self.out / f"{name}.csv", map(asdict, rows))

    def _picture(self, draw: Callable[..., str], group: Group, *shown) -> None:
        """A group's picture of what is shown; `draw` names its files."""
        if not distributed.rank():
            names = draw(self.out / f"{self.name}-{group.name}", self.heading, group, *shown)
            self._say(f"Written to {self.out}: {names}")
