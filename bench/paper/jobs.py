"""A recipe's network, cut in every way that its group names: trained, pruned, fine-tuned where it says so."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isnan, nan
from pathlib import Path

from torch import nn

import efreg
from bench.paper import runs
from bench.paper.recipes import RANDOM, Group, Recipe
from efreg.lab import data, distributed, engine
from efreg.lab.checkpoints import Settings
from efreg.lab.logs import read_csv, write_csv
from efreg.lab.sweep import Cut, pruned, re_estimate, sweep


@dataclass(frozen=True)
class Outcome:
    """A row: a network cut once. Accuracies are in percent, on the test images; NaN where training diverged.

    ratio: the share of filters removed, or a list. before: accuracy of the whole network. accuracy,
    recalibrated: right after pruning, and with re-estimated batch-norm statistics; fine_tuned: after training
    on; repaired: after a repair without training; held_out: as accuracy, on training images that were held
    out; these three are NaN where there is no such thing. macs_before, macs: of an image. epochs: of each
    training on the way, such as "200 + 200 + 120". on: what computed, in which precision. dead, macs_alive:
    the dead filters of the whole network, and its MACs without them; 0 in rows from before they were counted.
    """

    group: str
    run: str
    seed: int
    ratio: str
    before: float
    accuracy: float
    recalibrated: float
    fine_tuned: float
    macs_before: int
    macs: int
    epochs: str
    on: str
    repaired: float = nan
    held_out: float = nan
    dead: int = 0
    macs_alive: int = 0

    @property
    def lost(self) -> float:
        """Points of accuracy, right after pruning."""
        return self.before - self.accuracy

    @property
    def speedup(self) -> float:
        """MACs before / MACs after; NaN where the training diverged, and nothing was cut."""
        return self.macs_before / self.macs if self.macs else nan


@dataclass(frozen=True)
class Job:
    """A recipe's run from one seed, and the folder of its files, named by what decides them."""

    group: Group
    recipe: Recipe
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"{self.group.title}, {self.recipe.name}, seed {self.seed}"

    @property
    def start(self) -> "Job | None":
        """The run that this one goes on from, before it is fine-tuned."""
        if self.recipe.start in (None, RANDOM):
            return None
        return replace(self, recipe=replace(self.group.recipe(self.recipe.start), fine_tune=None))

    @property
    def settings(self) -> Settings:
        """What trains the network, the file of its first weights among them."""
        weights = str(self.start.network) if self.start else self.group.first
        if self.recipe.start == RANDOM:
            weights = None
        return replace(self.recipe.settings, seed=self.seed, weights=weights)

    @property
    def network(self) -> Path:
        """The file of the trained network."""
        return self._file(".safetensors")

    @property
    def outcomes(self) -> Path:
        """The file of what is left of it at the group's cuts."""
        tuning = self.recipe.fine_tune and runs.digest(self.recipe.fine_tune)
        repair = [("repair", self.group.repair)] if self.group.repair else []
        return self._file(".csv", self.group.cuts, tuning, *repair)

    def narrow(self, ratio: float | str) -> Path:
        """The file of the network cut so, before it is trained on."""
        return self._file(".safetensors", "cut", ratio)

    @property
    def epochs(self) -> int:
        """Of training, and of fine-tuning each of the cut networks."""
        tuning = self.recipe.fine_tune.epochs * len(self.group.cuts) if self.recipe.fine_tune else 0
        return self.recipe.settings.epochs + tuning

    @property
    def course(self) -> str:
        """The epochs of each training that a cut network went through, such as "200 + 200 + 120"."""
        before = [self.start.course] if self.start else []
        own = [str(part.epochs) for part in (self.recipe.settings, self.recipe.fine_tune) if part]
        return " + ".join([*before, *own])

    @property
    def on(self) -> str:
        """What computes, in which precision."""
        dtype, device = engine.dtype_of(self.settings), engine.device_named(self.settings.device)
        return f"{str(dtype).removeprefix('torch.')}, {engine.computer(device)}"

    def _file(self, suffix: str, *more) -> Path:
        files = [None if self.start else self.settings.weights, self.settings.distil]
        first = [runs.fingerprint(file) for file in files if file]
        name = runs.stem(f"{self.group.name} {self.recipe.name}", self.settings, *first, *more)
        return self.folder / f"{name}{suffix}"


def train(job: Job, watch: runs.Watch) -> nn.Module | None:
    """The trained network, after the run that it starts from; None where one diverges."""
    if job.start and train(job.start, runs.Watch(watch.say)) is None:
        return None
    return runs.trained(job.settings, job.network, str(job), watch)


def measure(job: Job, watch: runs.Watch) -> list[Outcome]:
    """What is left at each of the group's cuts: read from the job's file, or trained, cut and written."""
    if not job.outcomes.exists():
        found = _measure(job, watch)
        runs.once(job.outcomes, lambda: write_csv(job.outcomes, found))
    outcomes = read_csv(job.outcomes, Outcome)
    if len(outcomes) != len(job.group.cuts):
        raise ValueError(f"{job.outcomes} is not whole: remove it, and it is made again")
    return outcomes


def take_over(jobs: Iterable[Job], rows: Sequence[Outcome]) -> None:
    """Gives the jobs without outcomes those of the rows that are theirs, so that they are not run again."""
    for job in jobs:
        named = job.group.name, job.recipe.name, job.seed, job.course
        own = [row for row in rows if (row.group, row.run, row.seed, row.epochs) == named]
        lacks_repair = job.group.repair and any(isnan(x.repaired) and not isnan(x.accuracy) for x in own)
        if [row.ratio for row in own] == [str(cut) for cut in job.group.cuts] and not lacks_repair:
            runs.once(job.outcomes, partial(write_csv, job.outcomes, own))


def _measure(job: Job, watch: runs.Watch) -> list[Outcome]:
    network = train(job, watch)
    if network is None:
        return [_outcome(job, Cut(cut, nan, nan, 0, 0), before=nan, macs_before=0) for cut in job.group.cuts]
    images, held_out = _images(job.settings)
    dtype, example = engine.dtype_of(job.settings), next(images.test.batches(2))[0]
    planning = engine.cutting(job.settings, images.info.num_classes, images.info.shape)
    if job.settings.nested:
        re_estimate(network, images, dtype)
    ratios, repair = dict.fromkeys((0.0, *job.group.cuts)), job.group.repair
    found = sweep(network, images, planning=planning, ratios=ratios, dtype=dtype, repair=repair)
    cuts = {cut.ratio: cut for cut in found}
    remains = engine.Remains(network, engine.plan(network, job.settings, example), example)
    whole = {"before": cuts[0.0].accuracy, "macs_before": cuts[0.0].macs}
    whole["dead"], whole["macs_alive"] = remains.now()
    outcomes = []
    for ratio in job.group.cuts:
        small = partial(pruned, network, ratio, example, planning)
        kept = engine.evaluate(small(), held_out, dtype=dtype)[1] if held_out else nan
        tuned = _fine_tuned(job, small, ratio, images, watch) if job.recipe.fine_tune else nan
        outcomes.append(_outcome(job, cuts[ratio], **whole, held_out=kept, fine_tuned=tuned))
    return outcomes


def _images(settings: Settings) -> tuple[data.Data, data.Images | None]:
    """The data set without what is held out of its training images, and that."""
    images = data.load(settings.dataset, settings.data, device=engine.device_named(settings.device))
    part = data.Part(distributed.rank(), distributed.world_size())
    images = images._replace(test=images.test.share(part))
    if not settings.held_out:
        return images, None
    _, train, held_out = data.hold_out(images, settings.held_out)
    return images._replace(train=train), held_out.share(part)


def _outcome(job: Job, cut: Cut, *, fine_tuned: float = nan, **more) -> Outcome:
    told = {"group": job.group.name, "run": job.recipe.name, "seed": job.seed, "ratio": str(cut.ratio)}
    told.update({name: getattr(cut, name) for name in ("accuracy", "recalibrated", "repaired", "macs")})
    return Outcome(**told, fine_tuned=fine_tuned, epochs=job.course, on=job.on, **more)


def _fine_tuned(
    job: Job, small: Callable[[], nn.Module], ratio: float | str, images: data.Data, watch: runs.Watch
) -> float:
    """Accuracy of the cut network after it was trained on, from where an interruption left it."""
    narrow = job.narrow(ratio)
    runs.once(narrow, lambda: efreg.save(small(), narrow))
    settings = replace(job.recipe.fine_tune, weights=str(narrow), seed=job.seed)
    tuned = narrow.with_name(f"{narrow.stem}-{runs.digest(settings)}.safetensors")
    network = runs.trained(settings, tuned, f"{job}, fine-tuned at {ratio}", watch)
    dtype = engine.dtype_of(settings)
    return nan if network is None else engine.evaluate(network, images.test, dtype=dtype)[1]
