"""The runs behind the paper's tables and figures, read from recipes.toml or a file of the user's own."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

import efreg
from efreg.lab import data, engine
from efreg.lab.checkpoints import Settings, load_weights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OURS = Path(__file__).with_name("recipes.toml")
FINE_TUNING = ("table4", "table5", "table6")
WHAT = (*FINE_TUNING, "no-finetuning", "figure2", "figure3")
"""The commands that run recipes."""

SETTINGS = {f.name: f.type for f in fields(Settings) if f.name not in ("data", "device", "seed", "weights")}
"""The settings that a recipe can have; the others are said where it is run."""

LISTS = ("skip", "nested")
"""Those that are lists."""

NETWORK = ("model", "dataset")
"""The settings that are the group's alone."""

FORCE = ("law", "alpha", "alpha_schedule", "alpha_until", "scope", "refresh", "update")
COURSE = ("schedule", "epochs", "lr")
"""With the force what fine-tuning does not take over from the training before it."""

RANDOM = "random"
"""What a run starts from that takes random weights where its group has others."""


@dataclass(frozen=True)
class Recipe:
    """One run, from so many seeds at most.

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
    shown: tuple[str, ...]
    recipes: tuple[Recipe, ...]
    cuts: tuple[float | str, ...]
    weights: str | None = None
    weights_from: str = "where they are published"
    norms: tuple[str, ...] = ()
    repair: int = 0

    @property
    def base(self) -> Settings:
        """What network this is, on which images."""
        return self.recipes[0].settings

    def recipe(self, name: str) -> Recipe:
        """The run of this name."""
        return next(recipe for recipe in self.recipes if recipe.name == name)

    def on(self, data: str, device: str) -> "Group":
        """The same runs, with the data in this folder, on this device."""
        return self._changed(lambda settings: replace(settings, data=data, device=device))

    def scaled(self, scale: float) -> "Group":
        """The same runs in a share of the epochs, at least one where there were any."""
        return self._changed(lambda s: replace(s, epochs=max(min(s.epochs, 1), round(scale * s.epochs))))

    def _changed(self, change: Callable[[Settings], Settings]) -> "Group":
        recipes = (
            replace(r, settings=change(r.settings), fine_tune=r.fine_tune and change(r.fine_tune))
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
    more = {key: _typed(told.pop(key), str, key) for key in ("weights", "weights_from") if key in told}
    more["repair"] = _typed(told.pop("repair", 0), int, "repair")
    seeds = told.pop("seeds", Recipe.seeds)
    title = _typed(_taken(told, "title"), str, "title")
    lists = {key: tuple(_typed(told.pop(key, []), list, key)) for key in ("shown", "norms")}
    cuts, lines = (_typed(_taken(told, key), list, key) for key in ("cuts", "runs"))
    tuning = _typed(told.pop("fine_tune"), dict, "fine_tune") if "fine_tune" in told else None
    recipes = tuple(_recipe({"seeds": seeds, **_typed(line, dict, "a run")}, told, tuning) for line in lines)
    group = Group(name=name, title=title, recipes=recipes, cuts=tuple(cuts), **lists, **more)
    _check(group)
    return group


def _taken(told: dict[str, Any], key: str) -> Any:
    if key not in told:
        raise ValueError(f"{key} is missing")
    return told.pop(key)


def _typed(value: Any, kind: Any, name: str) -> Any:
    fits = isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))
    if not fits or (isinstance(value, bool) and not isinstance(True, kind)):
        raise ValueError(f"{name} is {value!r}, which is no {getattr(kind, '__name__', kind)}")
    return value


def _recipe(line: dict[str, Any], shared: dict[str, Any], tuning: dict[str, Any] | None) -> Recipe:
    name = _typed(_taken(line, "name"), str, "name")
    start = line.pop("start", None)
    with _naming(f"run {name!r}"):
        seeds = _typed(line.pop("seeds"), int, "seeds")
        if foreign := [key for key in NETWORK if key in line]:
            raise ValueError(f"{foreign[0]} is the group's: make another group")
        settings = _settings({**shared, **line})
        if tuning is None:
            return Recipe(name, settings, start, seeds=seeds)
        kept = {k: v for k, v in {**shared, **line}.items() if k not in (*FORCE, *COURSE)}
        with _naming("fine_tune"):
            return Recipe(name, settings, start, _settings({**kept, **tuning}), seeds)


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
    if not names or not group.cuts:
        raise ValueError("it needs runs and cuts")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two runs are called {twice.pop()!r}: give each a name")
    if twice := {cut for cut in group.cuts if group.cuts.count(cut) > 1}:
        raise ValueError(f"cuts has {twice.pop()!r} twice: once is enough")
    if slashed := [name for name in (group.name, *names) if "/" in name]:
        raise ValueError(f"{slashed[0]!r} names files: take another sign than /")
    if unknown := set(group.shown) - set(WHAT):
        raise ValueError(f"shown names {unknown.pop()!r}: there are {', '.join(WHAT)}")
    if unknown := set(group.norms) - set(names):
        raise ValueError(f"norms names the run {unknown.pop()!r}, which is not there")
    if "figure3" in group.shown and not group.norms:
        raise ValueError("figure3 shows no run of it: name some as norms")
    if "figure2" in group.shown and all(isinstance(cut, str) for cut in group.cuts):
        raise ValueError("figure2 shows cuts by one share of all layers, such as 0.5: it has none")
    if not group.recipes[0].fine_tune and (tables := set(group.shown) & set(FINE_TUNING)):
        raise ValueError(f"{tables.pop()} shows fine-tuned networks: say fine_tune, or show it in another")
    for place, recipe in enumerate(group.recipes):
        if recipe.start not in (None, RANDOM, *names[:place]):
            raise ValueError(f"run {recipe.name!r} starts from {recipe.start!r}: no run above is called so")
        if recipe.seeds < 1:
            raise ValueError(f"run {recipe.name!r} has {recipe.seeds} seeds: it needs at least one")
        if recipe.settings.epochs == 0 and (recipe.start == RANDOM or not (recipe.start or group.weights)):
            raise ValueError(f"run {recipe.name!r} has no epochs: random weights are no network to cut")


def rehearse(group: Group) -> None:
    """Loads the weights, plans every cut and attaches every force, so that errors show before any training.

    Raises ValueError, naming group and run.
    """
    with _naming(f"group {group.name}"):
        holds = data.info(group.base.dataset, group.base.data)
        weights = load_weights(Path(group.base.data, group.weights)) if group.weights else None
        network = engine.build(group.base, holds.num_classes, holds.shape, weights)
        for file in {recipe.settings.distil for recipe in group.recipes} - {None}:
            taught = replace(group.base, distil=str(Path(group.base.data, file)))
            engine.teacher(taught, holds.num_classes, holds.shape)
        example = torch.zeros(2, *holds.shape)
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
