"""What `efreg paper forces` compares: which forces, how strong, on which networks and images."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from efreg.lab import engine
from efreg.lab.checkpoints import Settings


@dataclass(frozen=True)
class Force:
    """A force as the tables call it, and the settings that make it."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict, compare=False)


NO_FORCE = Force("no force")
L1 = Force("L1", {"law": "l1"})
GROUP_LASSO = Force("group lasso", {"law": "group_lasso"})
ONCE = Force("electrostatic, once", {"law": "electrostatic"})
EACH_STEP = Force("electrostatic, each step", {"law": "electrostatic", "refresh": 1})
LADDER = Force("ladder", {"law": "ladder"})
LADDER_4 = Force("ladder, p = 4", {"law": "ladder:power=4"})
LADDER_SPARING = Force("ladder, sparing", {"law": "ladder:power=4,spare=0.3"})
NESTED = Force("nested")
FADE = Force("fade", {"law": "fade"})
FORGETTING = Force("fade, forgetting", {"law": "fade:forget=true"})


def force_of(settings: Settings) -> Force:
    """The force that a network is trained with, and whether its units are nested."""
    if settings.nested:
        beside = force_of(replace(settings, nested=()))
        return NESTED if beside is NO_FORCE else Force(f"nested, {beside.name.partition(',')[0]}")
    if settings.epochs == 0 or (settings.alpha == 0 and not engine.fades(settings)):
        return NO_FORCE
    kinds = (FADE, FORGETTING, LADDER_SPARING, LADDER_4, LADDER, EACH_STEP, ONCE, GROUP_LASSO, L1)
    own = Force(settings.law)
    return next((kind for kind in kinds if kind.settings.items() <= vars(settings).items()), own)


def scope_of(settings: Settings) -> str:
    """What the force pulls that a network is trained with."""
    return settings.scope or engine.force_options(settings, steps=1)["law"].scope


@dataclass(frozen=True)
class Way:
    """A row of the table: a force, what it pulls, and how."""

    force: Force
    scope: str = "weights"
    update: str = "gradient"

    def __str__(self) -> str:
        return f"{self.force.name}, {self.scope}, {self.update}"


@dataclass(frozen=True)
class Candidate:
    """A way to train at one strength, from so many seeds at most."""

    way: Way
    alpha: float
    seeds: int = 3

    def __str__(self) -> str:
        return f"{self.way}, α = {self.alpha:g}"

    def settings(self, base: Settings, seed: int) -> Settings:
        """What trains it from this seed."""
        chosen = {**self.way.force.settings, "scope": self.way.scope, "update": self.way.update}
        return Settings(**{**vars(base), **chosen, "alpha": self.alpha, "seed": seed})


@dataclass(frozen=True)
class Study:
    """Candidates on one network and data set. What `base` says holds for all of them.

    start_epochs: of the training without a force that each seed's network starts from; 0 starts from random
        weights, or from the file `weights` in the folder of the data, which is to be had from `weights_from`.
    """

    name: str
    base: Settings
    candidates: tuple[Candidate, ...]
    start_epochs: int = 0
    weights: str | None = None
    weights_from: str = "https://github.com/akamaster/pytorch_resnet_cifar10"


GRIDS: dict[Force, dict[str, tuple[float, ...]]] = {
    L1: {"gradient": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), "proximal": (3e-2, 1e-1, 3e-1, 1.0, 3.0)},
    GROUP_LASSO: {"gradient": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "proximal": (1e-2, 3e-2, 1e-1, 3e-1, 1.0)},
    ONCE: {
        "gradient": (1e-12, 3e-12, 1e-11, 3e-11, 1e-10),
        "proximal": (3e-12, 1e-11, 3e-11, 1e-10, 3e-10, 1e-9),
    },
    EACH_STEP: {
        "gradient": (1e-14, 1e-13, 1e-12, 1e-11, 1e-10),
        "proximal": (1e-13, 1e-12, 1e-11, 1e-10, 1e-9),
    },
    LADDER: {"gradient": (3e-3, 1e-2, 3e-2, 6e-2, 2e-1), "proximal": (3e-2, 1e-1, 3e-1, 1.0, 3.0)},
}
"""Strengths of the digits' study. Under momentum 0.9 a gradient pull acts ten times as a proximal step."""


def _whole_grid() -> Iterator[Candidate]:
    yield Candidate(Way(NO_FORCE), 0.0)
    for force, alphas in GRIDS.items():
        for scope in ("weights", "filter"):
            for update in ("gradient", "proximal"):
                yield from (Candidate(Way(force, scope, update), alpha) for alpha in alphas[update])


DIGITS = Study(
    "digits",
    Settings(dataset="digits", model="resnet14", epochs=60, lr=0.05, batch_size=64, held_out=247),
    tuple(_whole_grid()),
    start_epochs=15,
)
MNIST = Study(
    "mnist",
    Settings(
        dataset="mnist",
        model="resnet20",
        epochs=3,
        batch_size=128,
        precision="auto",
        channels_last=True,
        held_out=5000,
    ),
    (
        Candidate(Way(NO_FORCE), 0.0),
        Candidate(Way(L1), 5e-2),
        Candidate(Way(L1, "filter"), 5e-3),
        Candidate(Way(ONCE), 5e-12),
        Candidate(Way(ONCE, "filter"), 1e-11),
        Candidate(Way(EACH_STEP), 1e-12),
        Candidate(Way(LADDER, "filter"), 5e-3),
    ),
)
CIFAR10 = Study(
    "cifar10",
    Settings(
        dataset="cifar10",
        model="resnet20",
        epochs=5,
        lr=0.05,
        batch_size=128,
        alpha_schedule="linear",
        alpha_until=0.5,
        precision="auto",
        channels_last=True,
        held_out=5000,
    ),
    (
        Candidate(Way(NO_FORCE), 0.0, seeds=1),
        Candidate(Way(LADDER, "filter", "proximal"), 0.1),
        Candidate(Way(L1, "filter", "proximal"), 0.1),
        Candidate(Way(L1, "filter", "proximal"), 0.05, seeds=1),
        Candidate(Way(L1, "weights", "proximal"), 0.05, seeds=1),
        Candidate(Way(ONCE, "filter", "proximal"), 2e-11, seeds=1),
        Candidate(Way(ONCE, "weights", "proximal"), 2e-11, seeds=1),
        Candidate(Way(EACH_STEP, "weights"), 1e-12, seeds=1),
        Candidate(Way(GROUP_LASSO, "filter", "proximal"), 1e-2, seeds=1),
        Candidate(Way(LADDER_4, "filter", "proximal"), 0.15, seeds=1),
    ),
    weights="weights/resnet20-12fca82f.th",
)
CIFAR10_LONG = Study(
    "cifar10-long",
    replace(CIFAR10.base, epochs=15),
    (
        Candidate(Way(LADDER_4, "filter", "proximal"), 0.1, seeds=2),
        Candidate(Way(L1, "filter", "proximal"), 0.03, seeds=1),
    ),
    weights=CIFAR10.weights,
)
STUDIES = {study.name: study for study in (DIGITS, MNIST, CIFAR10, CIFAR10_LONG)}
