"""A recipe's network, cut in every way that its group names: trained, pruned, fine-tuned where it says so."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isnan, nan
from pathlib import Path

import torch
from torch import nn

import efreg
from bench.paper import runs
from bench.paper.recipes import RANDOM, Group, Recipe, build
from efreg.lab import data, distributed, engine
from efreg.lab.checkpoints import Settings, load_weights
from efreg.lab.logs import read_csv, write_csv
from efreg.lab.sweep import Cut, pruned, re_estimate, sweep

Say = Callable[[str], None]
"""Is told, in a line, where a training diverged."""


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
        """The run that this one goes on from."""
        if self.recipe.start in (None, RANDOM):
            return None
        return replace(self, recipe=self.group.recipe(self.recipe.start))

    @property
    def settings(self) -> Settings:
        """What trains the network, the file of its first weights among them."""
        settings = replace(self.recipe.settings, seed=self.seed)
        if settings.distil:
            settings = replace(settings, distil=str(Path(settings.data, settings.distil)))
        if self.start:
            return replace(settings, weights=str(self.start.network))
        weights = None if self.recipe.start == RANDOM else self.group.weights
        return replace(settings, weights=weights and str(Path(settings.data, weights)))

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
        tuned = [self.recipe.fine_tune.epochs] if self.recipe.fine_tune else []
        return " + ".join(map(str, [*self._trained, *tuned]))

    @property
    def on(self) -> str:
        """What computes, in which precision."""
        return f"{str(_dtype(self.settings)).removeprefix('torch.')}, {_where(_device(self.settings))}"

    @property
    def _trained(self) -> list[int]:
        return [*(self.start._trained if self.start else ()), self.recipe.settings.epochs]

    def _file(self, suffix: str, *more) -> Path:
        files = [None if self.start else self.settings.weights, self.settings.distil]
        first = [runs.fingerprint(file) for file in files if file]
        name = runs.stem(f"{self.group.name} {self.recipe.name}", self.settings, *first, *more)
        return self.folder / f"{name}{suffix}"


def train(job: Job, tick: runs.Tick) -> nn.Module:
    """The trained network in eval mode: read from its file, or trained, after the run that it starts from.

    Raises engine.Diverged.
    """
    if job.start:
        train(job.start, lambda _: None)
    if job.settings.epochs:
        runs.keep_network(job.settings, job.network, tick)
    else:
        first = load_weights(job.settings.weights)
        runs.once(job.network, lambda: efreg.save(build(job.settings, first)[0], job.network))
    return _read(job.settings, job.network)


def _read(settings: Settings, path: Path) -> nn.Module:
    model = efreg.load(build(settings)[0], path)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    return model.to(engine.device_named(settings.device), memory_format=layout).eval()


def measure(job: Job, say: Say, tick: runs.Tick) -> list[Outcome]:
    """What is left at each of the group's cuts: read from the job's file, or trained, cut and written."""
    if job.outcomes.exists():
        tick(job.epochs)
    else:
        found = _measure(job, say, tick)
        runs.once(job.outcomes, lambda: write_csv(job.outcomes, map(asdict, found)))
    outcomes = read_csv(job.outcomes, Outcome)
    if len(outcomes) != len(job.group.cuts):
        raise ValueError(f"{job.outcomes} is not whole: remove it, and it is made again")
    return outcomes


def take_over(jobs: Iterable[Job], rows: Sequence[Outcome]) -> None:
    """Gives the jobs without outcomes those of the rows that are theirs, so that they are not run again."""
    for job in jobs:
        own = [row for row in rows if _is_of(row, job)]
        if [row.ratio for row in own] == [str(cut) for cut in job.group.cuts]:
            runs.once(job.outcomes, partial(write_csv, job.outcomes, map(asdict, own)))


def _is_of(row: Outcome, job: Job) -> bool:
    lacks_repair = job.group.repair and isnan(row.repaired) and not isnan(row.accuracy)
    named = (row.group, row.run, row.seed, row.epochs)
    return named == (job.group.name, job.recipe.name, job.seed, job.course) and not lacks_repair


def _measure(job: Job, say: Say, tick: runs.Tick) -> list[Outcome]:
    try:
        network = train(job, tick)
    except engine.Diverged as error:
        say(f"{job}: {error}")
        return [_outcome(job, Cut(cut, nan, nan, 0, 0), before=nan, macs_before=0) for cut in job.group.cuts]
    images, held_out = _images(job.settings)
    dtype, example = _dtype(job.settings), next(images.test.batches(2))[0]
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
        tuned = _fine_tuned(job, small, ratio, images, say, tick) if job.recipe.fine_tune else nan
        outcomes.append(_outcome(job, cuts[ratio], **whole, held_out=kept, fine_tuned=tuned))
    return outcomes


def _images(settings: Settings) -> tuple[data.Data, data.Images | None]:
    """The data set without what is held out of its training images, and that."""
    images = data.load(settings.dataset, settings.data, device=_device(settings))
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
    job: Job, small: Callable[[], nn.Module], ratio: float | str, images: data.Data, say: Say, tick: runs.Tick
) -> float:
    """Accuracy of the cut network after it was trained on, from where an interruption left it."""
    narrow = job.narrow(ratio)
    runs.once(narrow, lambda: efreg.save(small(), narrow))
    settings = replace(job.recipe.fine_tune, weights=str(narrow), seed=job.seed)
    tuned = narrow.with_name(f"{narrow.stem}-{runs.digest(settings)}.safetensors")
    try:
        runs.keep_network(settings, tuned, tick)
    except engine.Diverged as error:
        say(f"{job}, fine-tuned at {ratio}: {error}")
        return nan
    return engine.evaluate(_read(settings, tuned), images.test, dtype=_dtype(settings))[1]


def _device(settings: Settings) -> torch.device:
    return engine.device_named(settings.device)


def _dtype(settings: Settings) -> torch.dtype:
    return engine.dtype_of(settings.precision, _device(settings))


def _where(device: torch.device) -> str:
    """What computes: a GPU by its name, and how many together."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{distributed.world_size()} × {name}" if distributed.world_size() > 1 else name
