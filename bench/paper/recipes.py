"""The runs behind the tables and figures, and what is said of them: recipes.toml and texts.toml."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import efreg
from efreg.lab import data, engine
from efreg.lab.checkpoints import Settings, load_weights, made, require
from efreg.lab.sweep import planned

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OURS = Path(__file__).with_name("recipes.toml")
FINE_TUNING = ("table4", "table5", "table6")
"""The commands that show fine-tuned networks."""

IMAGENET = data.Info(1000, (3, 224, 224), data.IMAGENET_MEAN, data.IMAGENET_STD)

GROUP = ("title", "cuts", "shown", "weights", "weights_from", "norms", "repair")
LINE = ("name", "start", "seeds")
"""What a group and a run's line have beside settings."""

NETWORK = ("model", "dataset")
WHERE = ("data", "device", "seed", "weights")
"""The settings that are the group's alone, and those that are said where it is run."""

FORCE = ("law", "alpha", "alpha_schedule", "alpha_until", "scope", "refresh", "update")
COURSE = ("schedule", "epochs", "lr")
"""With the force what fine-tuning does not take over from the training before it."""

RANDOM = "random"
"""What a run starts from that takes random weights where its group has others."""


@dataclass(frozen=True)
class Recipe:
    """One run, from so many seeds at most; with 0 only others start from it.

    It takes the weights of the run `start` of its group, RANDOM ones, or those of its group.
    """

    name: str
    settings: Settings
    start: str | None = None
    fine_tune: Settings | None = None
    seeds: int = 3


@dataclass(frozen=True)
class Group:
    """Runs on one network and data set, and how they are cut. recipes.toml says what each of these is."""

    name: str
    title: str
    recipes: tuple[Recipe, ...]
    cuts: tuple[float | str, ...]
    shown: tuple[str, ...] = ()
    weights: str | None = None
    weights_from: str = "where they are published"
    norms: tuple[str, ...] = ()
    repair: int = 0

    @property
    def base(self) -> Settings:
        """What network this is, on which images; but for the force those of the first run that is cut."""
        return next(recipe.settings for recipe in self.recipes if recipe.seeds)

    @property
    def first(self) -> str | None:
        """The file of the weights that its runs begin with."""
        return self.weights and str(Path(self.base.data, self.weights))

    @property
    def files(self) -> list[str]:
        """This file, and those of the networks that teach."""
        named = {self.first, *(recipe.settings.distil for recipe in self.recipes)}
        return sorted(named - {None})

    def __str__(self) -> str:
        return self.title

    def recipe(self, name: str) -> Recipe:
        """The run of this name."""
        return next(recipe for recipe in self.recipes if recipe.name == name)

    def on(self, data: str, device: str, scale: float = 1) -> "Group":
        """The same runs with the data in this folder, on this device, in a share of the epochs.

        Of those it is at least one, where there were any.
        """

        def moved(settings: Settings) -> Settings:
            epochs = max(min(settings.epochs, 1), round(scale * settings.epochs))
            distil = settings.distil and str(Path(data, settings.distil))
            return replace(settings, data=data, distil=distil, device=device, epochs=epochs)

        recipes = (
            replace(r, settings=moved(r.settings), fine_tune=r.fine_tune and moved(r.fine_tune))
            for r in self.recipes
        )
        return replace(self, recipes=tuple(recipes))


def _toml(path: Path) -> dict[str, Any]:
    """What the file says. Raises ValueError, naming it, where it is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from error


_TEXTS = _toml(OURS.with_name("texts.toml"))
TITLES, NOTES, HOURS, EXAMPLES = (_TEXTS[part] for part in ("titles", "notes", "hours", "examples"))


def read(path: str | Path = OURS) -> dict[str, Group]:
    """The groups of a file of recipes, by name.

    Raises FileNotFoundError where there is none; ValueError, naming file, group and run, for what cannot be.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: --recipes names a file like {OURS}")
    groups = {}
    for name, told in _toml(path).items():
        with _naming(f"{path}, group {name}"):
            groups[name] = _group(name, told)
    return groups


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts a name in front of what is wrong inside."""
    try:
        yield
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name}: {error}") from error


def _group(name: str, told: dict[str, Any]) -> Group:
    require("it", told, dict)
    own = {key: value for key, value in told.items() if key in GROUP}
    shared = {key: value for key, value in told.items() if key not in (*GROUP, "runs")}
    require("runs", told.get("runs", []), tuple[dict, ...])
    recipes = [_recipe(one, shared) for line in told.get("runs", []) for one in _strengths(line)]
    group = made(Group, {**own, "name": name, "recipes": recipes})
    _check(group)
    return group


def _strengths(line: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each strength of its grid, which its name gets; the line itself where it has none."""
    if "grid" not in line:
        return [line]
    line, name = dict(line), line.get("name")
    with _naming(f"run {name!r}"):
        require("grid", grid := line.pop("grid"), tuple[float, ...])
        if not grid or "alpha" in line:
            raise ValueError("grid has the strengths to try: some, and alpha beside it is none")
    return [{**line, "name": f"{name}, {alpha:g}", "alpha": alpha} for alpha in grid]


def _recipe(line: dict[str, Any], shared: dict[str, Any]) -> Recipe:
    with _naming(f"run {line.get('name')!r}"):
        if foreign := [name for name in NETWORK if name in line]:
            raise ValueError(f"{foreign[0]} is the group's: make another group")
        told = {**shared, **line}
        own = {key: told.pop(key) for key in LINE if key in told}
        tuning = told.pop("fine_tune", None)
        own["settings"] = _settings(told)
        if tuning is not None:
            kept = {name: value for name, value in told.items() if name not in (*FORCE, *COURSE)}
            with _naming("fine_tune"):
                own["fine_tune"] = _settings({**kept, **tuning})
        return made(Recipe, own)


def _settings(told: dict[str, Any]) -> Settings:
    if foreign := [name for name in WHERE if name in told]:
        raise ValueError(f"{foreign[0]} is said where it is run: leave it out")
    settings = made(Settings, told)
    engine.check(replace(settings, epochs=settings.epochs or 1, distil=None))
    return settings


def _check(group: Group) -> None:
    """Raises ValueError for what does not fit together."""
    names = [recipe.name for recipe in group.recipes]
    starts = {recipe.start for recipe in group.recipes}
    if not names or not group.cuts:
        raise ValueError("it needs runs and cuts")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two runs are called {twice.pop()!r}: give each a name")
    if twice := {cut for cut in group.cuts if group.cuts.count(cut) > 1}:
        raise ValueError(f"cuts has {twice.pop()!r} twice: once is enough")
    if strange := [name for name in (group.name, *names) if {"/", "\0"} & set(name)]:
        raise ValueError(f"{strange[0]!r} names files: take another sign than / and NUL")
    for place, recipe in enumerate(group.recipes):
        if recipe.start not in (None, RANDOM, *names[:place]):
            raise ValueError(f"run {recipe.name!r} starts from {recipe.start!r}: no run above is called so")
        if recipe.seeds < (recipe.name not in starts):
            raise ValueError(f"run {recipe.name!r} has {recipe.seeds} seeds: it needs at least one")
        if recipe.settings.epochs == 0 and (recipe.start == RANDOM or not (recipe.start or group.weights)):
            raise ValueError(f"run {recipe.name!r} has no epochs: random weights are no network to cut")
    if unknown := set(group.shown) - set(TITLES):
        raise ValueError(f"shown names {unknown.pop()!r}: there are {', '.join(TITLES)}")
    if unknown := set(group.norms) - set(names):
        raise ValueError(f"norms names the run {unknown.pop()!r}, which is not there")
    if "figure3" in group.shown and not group.norms:
        raise ValueError("figure3 shows no run of it: name some as norms")
    strings = [cut for cut in group.cuts if isinstance(cut, str)]
    if "figure2" in group.shown and len(strings) == len(group.cuts):
        raise ValueError("figure2 shows cuts by one share of all layers, such as 0.5: it has none")
    if "forces" in group.shown and not group.base.held_out:
        raise ValueError("forces chooses strengths by images that are not trained on: say held_out")
    if "forces" in group.shown and (strings or not {0.0, 0.5} <= set(group.cuts)):
        raise ValueError("forces shows cuts by one share of all layers, 0.0 and 0.5 among them")
    if not group.recipes[0].fine_tune and (tables := set(group.shown) & set(FINE_TUNING)):
        raise ValueError(f"{tables.pop()} shows fine-tuned networks: say fine_tune, or show it in another")


def build(settings: Settings, weights: Mapping[str, Tensor] | None = None) -> tuple[nn.Module, Tensor]:
    """The network, and two images as it takes them; of image folders that are not there as ImageNet's are."""
    there = settings.dataset != "imagefolder" or Path(settings.data, "train").is_dir()
    holds = data.info(settings.dataset, settings.data) if there else IMAGENET
    network = engine.build(settings, holds.num_classes, holds.shape, weights)
    return network, torch.zeros(2, *holds.shape)


def require_data(group: Group) -> None:
    """Raises data.Missing where the data set, or a file of weights beside it, is not there."""
    data.load(group.base.dataset, group.base.data)
    if missing := [file for file in group.files if not Path(file).is_file()]:
        whence = f"put the public weights of {group.base.model} there, from {group.weights_from}"
        raise data.Missing(f"no {missing[0]}: {whence}")


def rehearse(group: Group) -> None:
    """Loads the weights, plans every cut and attaches every force, so that errors show before any training.

    Raises ValueError, naming group and run.
    """
    with _naming(f"group {group.name}"):
        networks = {file: build(group.base, load_weights(file)) for file in group.files}
        network, example = networks.get(group.first) or build(group.base)
        for cut in group.cuts:
            with _naming(f"cut {cut!r}"):
                planned(network, cut, example, engine.planning(group.base))
        plans: dict[tuple, efreg.Plan] = {}
        for recipe in group.recipes:
            with _naming(f"run {recipe.name!r}"):
                settings = recipe.settings
                asked = settings.ratio, settings.ratios, settings.coupled, settings.skip
                if asked not in plans:
                    plans[asked] = engine.plan(network, settings, example)
                engine.rehearse(network, plans[asked], settings)
