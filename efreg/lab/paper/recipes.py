"""The runs behind the paper's tables and figures, read from recipes.toml or a file of the user's own."""

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from efreg.lab import engine
from efreg.lab.checkpoints import Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OURS = Path(__file__).with_name("recipes.toml")
WHAT = ("table4", "table5", "table6", "no-finetuning", "figure2", "figure3")
"""The commands that run recipes."""

SETTINGS = {f.name for f in fields(Settings)} - {"data", "device", "seed", "weights"}
"""The settings that a recipe can have; the others are said where it is run."""


@dataclass(frozen=True)
class Recipe:
    """One run: `start` is the run of its group that its first weights come from, None takes the group's."""

    name: str
    settings: Settings
    start: str | None = None


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
    seeds: int = 3
    fine_tune: Settings | None = None
    norms: tuple[str, ...] = ()

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

    def _changed(self, change) -> "Group":
        recipes = tuple(replace(recipe, settings=change(recipe.settings)) for recipe in self.recipes)
        return replace(self, recipes=recipes, fine_tune=self.fine_tune and change(self.fine_tune))


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
        try:
            groups[name] = _group(name, told)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, group {name}: {reason}") from error
    return groups


def _group(name: str, told: dict[str, Any]) -> Group:
    if not isinstance(told, dict):
        raise ValueError("expected a table [NAME]")
    told = dict(told)
    own = {key: told.pop(key) for key in ("title", "runs", "cuts")}
    more = {key: told.pop(key) for key in ("weights", "weights_from", "seeds") if key in told}
    listed = {key: tuple(told.pop(key, ())) for key in ("shown", "norms")}
    fine_tune = told.pop("fine_tune", None)
    recipes = tuple(_recipe(line, told) for line in own["runs"])
    group = Group(
        name=name,
        title=own["title"],
        recipes=recipes,
        cuts=tuple(own["cuts"]),
        fine_tune=None if fine_tune is None else _fine_tuning(fine_tune, told),
        **listed,
        **more,
    )
    _check(group)
    return group


def _recipe(line: dict[str, Any], shared: dict[str, Any]) -> Recipe:
    line = dict(line)
    name, start = line.pop("name"), line.pop("start", None)
    try:
        return Recipe(name, _settings({**shared, **line}), start)
    except (TypeError, ValueError) as error:
        raise ValueError(f"run {name!r}: {error}") from error


def _fine_tuning(told: dict[str, Any], shared: dict[str, Any]) -> Settings:
    try:
        return _settings({**shared, **told})
    except (TypeError, ValueError) as error:
        raise ValueError(f"fine_tune: {error}") from error


def _settings(told: dict[str, Any]) -> Settings:
    if unknown := told.keys() - SETTINGS:
        raise ValueError(
            f"unknown setting {', '.join(sorted(unknown))}: there are {', '.join(sorted(SETTINGS))}"
        )
    settings = Settings(**{**told, "skip": tuple(told.get("skip", ()))})
    engine.check(replace(settings, epochs=max(1, settings.epochs)))
    engine.force_options(settings, steps=1)
    return settings


def _check(group: Group) -> None:
    """Raises ValueError for what does not fit together."""
    names = [recipe.name for recipe in group.recipes]
    if not names:
        raise ValueError("it has no runs")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two runs are called {twice.pop()!r}: give each a name")
    if unknown := set(group.shown) - set(WHAT):
        raise ValueError(f"shown names {unknown.pop()!r}: there are {', '.join(WHAT)}")
    if unknown := set(group.norms) - set(names):
        raise ValueError(f"norms names the run {unknown.pop()!r}, which is not there")
    for place, recipe in enumerate(group.recipes):
        if recipe.start is not None and recipe.start not in names[:place]:
            raise ValueError(f"run {recipe.name!r} starts from {recipe.start!r}: no run above is called so")
        if not (recipe.settings.epochs or recipe.start or group.weights):
            raise ValueError(f"run {recipe.name!r} has no epochs: random weights are no network to cut")
