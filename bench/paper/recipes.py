"""The runs behind the paper's tables and figures, read from recipes.toml or a file of the user's own."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import efreg
from efreg.lab import data, engine
from efreg.lab.checkpoints import Settings, load_weights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OURS = Path(__file__).with_name("recipes.toml")
FINE_TUNING = ("table4", "table5", "table6")
UNTRAINED = ("speedups", "table3")
WHAT = ("forces", *UNTRAINED, *FINE_TUNING, "no-finetuning", "figure2", "figure3")
"""The commands."""

IMAGENET = data.Info(1000, (3, 224, 224), data.IMAGENET_MEAN, data.IMAGENET_STD)

SETTINGS = {f.name: f.type for f in fields(Settings) if f.name not in ("data", "device", "seed", "weights")}
"""The settings that a recipe can have; the others are said where it is run."""

LISTS = ("skip", "nested")
"""Those that are lists."""

GROUP = {
    **dict.fromkeys(("title", "weights", "weights_from"), str),
    **dict.fromkeys(("shown", "norms", "cuts", "runs"), list),
    "repair": int,
    "seeds": int,
    "fine_tune": dict,
}
LINE = {"name": str, "start": str, "seeds": int}
"""What a group and a run's line have beside settings."""

NETWORK = ("model", "dataset")
"""The settings that are the group's alone."""

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

    def recipe(self, name: str) -> Recipe:
        """The run of this name."""
        return next(recipe for recipe in self.recipes if recipe.name == name)

    def on(self, data: str, device: str, scale: float = 1) -> "Group":
        """The same runs with the data in this folder, on this device, in a share of the epochs.

        Of those it is at least one, where there were any.
        """

        def moved(s: Settings) -> Settings:
            return replace(s, data=data, device=device, epochs=max(min(s.epochs, 1), round(scale * s.epochs)))

        recipes = (
            replace(r, settings=moved(r.settings), fine_tune=r.fine_tune and moved(r.fine_tune))
            for r in self.recipes
        )
        return replace(self, recipes=tuple(recipes))


def read(path: str | Path = OURS) -> dict[str, Group]:
    """The groups of a file of recipes, by name.

    Raises FileNotFoundError where there is none; ValueError, naming file, group and run, for what cannot be.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: --recipes names a file like {OURS}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    groups = {}
    for name, told in content.items():
        with _naming(f"{path}, group {name}"):
            groups[name] = _group(name, told)
    return groups


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Puts a name in front of what is wrong inside."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _group(name: str, told: dict[str, Any]) -> Group:
    told = dict(_typed(told, dict, "a group"))
    own = _taken(told, GROUP, needed=("title", "cuts", "runs"))
    tuning, seeds = own.pop("fine_tune", None), own.pop("seeds", Recipe.seeds)
    lines = [one for line in own.pop("runs") for one in _strengths(dict(_typed(line, dict, "a run")))]
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    group = Group(name=name, recipes=tuple(_recipe(line, told, seeds, tuning) for line in lines), **own)
    _check(group)
    return group


def _taken(told: dict[str, Any], kinds: dict[str, Any], needed: tuple[str, ...]) -> dict[str, Any]:
    """Those of the keys that are there, each of its kind; they are gone from what is told."""
    if missing := [key for key in needed if key not in told]:
        raise ValueError(f"{missing[0]} is missing")
    return {key: _typed(told.pop(key), kind, key) for key, kind in kinds.items() if key in told}


def _typed(value: Any, kind: Any, name: str) -> Any:
    fits = isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))
    if not fits or (isinstance(value, bool) and not isinstance(True, kind)):
        raise ValueError(f"{name} is {value!r}, which is no {getattr(kind, '__name__', kind)}")
    return value


def _strengths(line: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each strength of its grid, which its name gets; the line itself where it has none."""
    if "grid" not in line:
        return [line]
    with _naming(f"run {line.get('name')!r}"):
        grid = [_typed(alpha, float, "grid") for alpha in _typed(line.pop("grid"), list, "grid")]
        if not grid or "alpha" in line:
            raise ValueError("grid has the strengths to try: some, and alpha beside it is none")
    return [{**line, "name": f"{line.get('name')}, {alpha:g}", "alpha": alpha} for alpha in grid]


def _recipe(
    line: dict[str, Any], shared: dict[str, Any], seeds: int, tuning: dict[str, Any] | None
) -> Recipe:
    own = {"seeds": seeds, **_taken(line, LINE, needed=("name",))}
    with _naming(f"run {own['name']!r}"):
        if foreign := [key for key in NETWORK if key in line]:
            raise ValueError(f"{foreign[0]} is the group's: make another group")
        told = {**shared, **line}
        settings = _settings(told)
        if tuning is None:
            return Recipe(settings=settings, **own)
        kept = {key: value for key, value in told.items() if key not in (*FORCE, *COURSE)}
        with _naming("fine_tune"):
            return Recipe(settings=settings, fine_tune=_settings({**kept, **tuning}), **own)


def _settings(told: dict[str, Any]) -> Settings:
    if unknown := told.keys() - SETTINGS.keys():
        known = ", ".join(sorted(SETTINGS))
        raise ValueError(f"unknown setting {', '.join(sorted(unknown))}: there are {known}")
    told = {**told, **{name: tuple(_typed(told[name], list, name)) for name in LISTS if name in told}}
    for name, value in told.items():
        if name not in LISTS:
            _typed(value, SETTINGS[name], name)
    settings = Settings(**told)
    engine.check(replace(settings, epochs=max(1, settings.epochs), distil=None))
    engine.force_options(settings, steps=1)
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
    if slashed := [name for name in (group.name, *names) if "/" in name]:
        raise ValueError(f"{slashed[0]!r} names files: take another sign than /")
    for place, recipe in enumerate(group.recipes):
        if recipe.start not in (None, RANDOM, *names[:place]):
            raise ValueError(f"run {recipe.name!r} starts from {recipe.start!r}: no run above is called so")
        if recipe.seeds < (recipe.name not in starts):
            raise ValueError(f"run {recipe.name!r} has {recipe.seeds} seeds: it needs at least one")
        if recipe.settings.epochs == 0 and (recipe.start == RANDOM or not (recipe.start or group.weights)):
            raise ValueError(f"run {recipe.name!r} has no epochs: random weights are no network to cut")
    if unknown := set(group.shown) - set(WHAT):
        raise ValueError(f"shown names {unknown.pop()!r}: there are {', '.join(WHAT)}")
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
    base, files = group.base, {group.weights, *(recipe.settings.distil for recipe in group.recipes)}
    data.load(base.dataset, base.data)
    for file in sorted(files - {None}):
        if not Path(base.data, file).is_file():
            whence = f"put the public weights of {base.model} there, from {group.weights_from}"
            raise data.Missing(f"no {file} in {base.data}: {whence}")


def rehearse(group: Group) -> None:
    """Loads the weights, plans every cut and attaches every force, so that errors show before any training.

    Raises ValueError, naming group and run.
    """
    with _naming(f"group {group.name}"):
        weights = load_weights(Path(group.base.data, group.weights)) if group.weights else None
        network, example = build(group.base, weights)
        for file in {recipe.settings.distil for recipe in group.recipes} - {None}:
            build(group.base, load_weights(Path(group.base.data, file)))
        for cut in group.cuts:
            with _naming(f"cut {cut!r}"):
                asked = {"ratios" if isinstance(cut, str) else "ratio": cut}
                efreg.plan(network, **asked, **engine.planning(group.base), example_inputs=example)
        plans = {}
        for recipe in group.recipes:
            with _naming(f"run {recipe.name!r}"):
                asked = (
                    recipe.settings.ratio,
                    recipe.settings.ratios,
                    *engine.planning(recipe.settings).values(),
                )
                if asked not in plans:
                    plans[asked] = engine.plan(network, recipe.settings, example)
                options = engine.force_options(recipe.settings, steps=1)
                options |= {"layers": plans[asked], "backend": "reference", "check": None}
                with efreg.attach(network, **options) as force:
                    force.charges()
