"""A recipe's network, cut in every way that its group names: trained, pruned, fine-tuned where it says so."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import nan
from pathlib import Path

import torch
from torch import nn

import efreg
from efreg.lab import checkpoints, data, distributed, engine
from efreg.lab.checkpoints import Settings
from efreg.lab.logs import read_csv, write_csv
from efreg.lab.paper import runs
from efreg.lab.paper.recipes import RANDOM, Group, Recipe
from efreg.lab.sweep import Cut, pruned, re_estimate, sweep

Say = Callable[[str], None]
"""Is told, in a line, where a training diverged."""


@dataclass(frozen=True)
class Outcome:
    """A network cut once. Accuracies are in percent, on the test images; NaN where the training diverged.

    ratio: the share of filters removed, or a list. before: accuracy of the whole network. accuracy,
    recalibrated: right after pruning, and with re-estimated batch-norm statistics; fine_tuned: after training
    on; repaired: after a repair without training, NaN where the group has none. macs_before, macs: of an
    image. epochs: of each training on the way, such as "200 + 200 + 120". on: what computed, in which
    precision.
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
        return " + ".join(map(str, self._trainings()))

    @property
    def on(self) -> str:
        """What computes, in which precision."""
        return f"{str(_dtype(self.settings)).removeprefix('torch.')}, {_where(_device(self.settings))}"

    def _trainings(self) -> list[int]:
        first = replace(self.start, recipe=replace(self.start.recipe, fine_tune=None)) if self.start else None
        after = [self.recipe.fine_tune.epochs] if self.recipe.fine_tune else []
        return [*(first._trainings() if first else ()), self.recipe.settings.epochs, *after]

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
        runs.once(job.network, lambda: efreg.save(_first_network(job.settings), job.network))
    return _read(job.settings, job.network)


def _first_network(settings: Settings) -> nn.Module:
    holds = data.info(settings.dataset, settings.data)
    weights = checkpoints.load_weights(settings.weights)
    return engine.build(settings, holds.num_classes, holds.shape, weights)


def _read(settings: Settings, path: Path) -> nn.Module:
    holds = data.info(settings.dataset, settings.data)
    model = efreg.load(engine.build(settings, holds.num_classes, holds.shape), path)
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


def _measure(job: Job, say: Say, tick: runs.Tick) -> list[Outcome]:
    try:
        network = train(job, tick)
    except engine.Diverged as error:
        say(f"{job}: {error}")
        lost = [Cut(ratio, nan, nan, 0, 0) for ratio in job.group.cuts]
        return [_outcome(job, lost[0], cut, nan) for cut in lost]
    images = data.load(job.settings.dataset, job.settings.data, device=_device(job.settings))
    part = data.Part(distributed.rank(), distributed.world_size())
    images = images._replace(test=images.test.share(part))
    ratios = dict.fromkeys((0.0, *job.group.cuts))
    planning = engine.cutting(job.settings, images.info.num_classes, images.info.shape)
    dtype, repair = _dtype(job.settings), job.group.repair
    if job.settings.nested:
        re_estimate(network, images, dtype)
    found = sweep(network, images, planning=planning, ratios=ratios, dtype=dtype, repair=repair)
    at = {cut.ratio: cut for cut in found}
    return [
        _outcome(job, at[0.0], at[ratio], _fine_tuned(job, network, ratio, images, say, tick))
        for ratio in job.group.cuts
    ]


def _outcome(job: Job, whole: Cut, cut: Cut, fine_tuned: float) -> Outcome:
    return Outcome(
        group=job.group.name,
        run=job.recipe.name,
        seed=job.seed,
        ratio=str(cut.ratio),
        before=whole.accuracy,
        accuracy=cut.accuracy,
        recalibrated=cut.recalibrated,
        fine_tuned=fine_tuned,
        macs_before=whole.macs,
        macs=cut.macs,
        epochs=job.course,
        on=job.on,
        repaired=cut.repaired,
    )


def _fine_tuned(
    job: Job, network: nn.Module, ratio: float | str, images: data.Data, say: Say, tick: runs.Tick
) -> float:
    """Accuracy of the cut network after it was trained on, from where an interruption left it."""
    if not job.recipe.fine_tune:
        return nan
    narrow = job.narrow(ratio)
    settings = replace(job.recipe.fine_tune, weights=str(narrow), seed=job.seed)
    tuned = narrow.with_name(f"{narrow.stem}-{runs.digest(settings)}.safetensors")
    example = next(images.test.batches(2))[0]
    planning = engine.cutting(job.settings, images.info.num_classes, images.info.shape)
    runs.once(narrow, lambda: efreg.save(pruned(network, ratio, example, planning), narrow))
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
