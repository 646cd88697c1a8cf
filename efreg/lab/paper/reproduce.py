"""`efreg paper table3 ... figure3`: what is missing is run, then the published figures stand beside ours."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from efreg.lab import data, engine
from efreg.lab.checkpoints import replacing
from efreg.lab.logs import progress, write_csv
from efreg.lab.paper import cuts, pictures, recipes, step_times, tables, unaided
from efreg.lab.paper.cuts import Job, Row
from efreg.lab.paper.recipes import Group

TITLES = {
    "table3": "Table 3: what a training step costs",
    "table4": "Table 4: ResNet-56 on CIFAR-10, pruned and fine-tuned",
    "table5": "Table 5: VGG-19 on CIFAR-100, pruned and fine-tuned",
    "table6": "Table 6: ResNet-34 on ImageNet, pruned and fine-tuned",
    "no-finetuning": "Right after pruning, nothing trained again",
    "figure2": "Figure 2: accuracy right after pruning, nothing trained again",
    "figure3": "Figure 3: filters' L1 norms, of each layer's largest",
}
TIMED_STEPS = 20


def run(
    what: str,
    out: str | Path,
    *,
    data_folder: str = "data",
    only: Sequence[str] = (),
    seeds: int = 3,
    epochs_scale: float = 1.0,
    device: str = "auto",
    recipes_file: str | Path = recipes.OURS,
    console: Console,
) -> None:
    """Runs what a table or figure lacks, then writes it to `out`: Markdown or pictures, and CSV.

    what: one of TITLES. only: groups of the recipes; where none is named all that have data. epochs_scale: a
    share of the epochs that the recipes say. What was interrupted goes on after its last epoch. Raises
    ValueError for what cannot be run or read, FileNotFoundError where a group that was named lacks data.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}: it must be at least 1")
    if not 0 < epochs_scale <= 1:
        raise ValueError(f"the scale of the epochs is {epochs_scale:g}: it is a share of them, in (0, 1]")
    out = Path(out)
    (out / "runs").mkdir(parents=True, exist_ok=True)
    heading = TITLES[what] + ("" if epochs_scale == 1 else f" (ours in {epochs_scale:g} of the epochs)")
    if what == "table3":
        return _table3(out, heading, only, engine.device_named(device), console)
    known = _groups(recipes.read(recipes_file), what, only)
    groups = [group.on(data_folder, device).scaled(epochs_scale) for group in known]
    groups = [group for group in groups if _has_data(group, bool(only), console)]
    if what == "figure3":
        return _figure3(out, heading, groups, console)
    rows = _rows(groups, seeds, out / "runs", console)
    if what == "figure2":
        return _figure2(out, heading, groups, rows, console)
    if what == "no-finetuning":
        text = unaided.table(heading, {group.name: group.title for group in groups}, rows)
        return _write(out, what, text, map(asdict, rows), console)
    lines = tables.lines(tables.PUBLISHED[what], rows)
    _write(out, what, tables.table(heading, lines), ({**asdict(x), "drop": x.drop} for x in lines), console)


def _groups(known: dict[str, Group], what: str, only: Sequence[str]) -> list[Group]:
    """Those that the command shows. Raises ValueError for a name in `only` that is none of them."""
    shown = {name: group for name, group in known.items() if what in group.shown}
    if unknown := [name for name in only if name not in shown]:
        raise ValueError(f"{what} has no group {unknown[0]!r}: there are {', '.join(shown) or 'none'}")
    return [group for name, group in shown.items() if not only or name in only]


def _has_data(group: Group, insist: bool, console: Console) -> bool:
    """Whether a group's images and first weights are there. Raises FileNotFoundError where we insist."""
    base = group.base
    try:
        data.load(base.dataset, base.data)
        if group.weights and not Path(base.data, group.weights).is_file():
            raise FileNotFoundError(
                f"no {group.weights} in {base.data}: put the weights of {group.title} there, from "
                f"{group.weights_from}"
            )
    except FileNotFoundError as error:
        if insist:
            raise
        console.print(f"{group.name} is left out: {error}", highlight=False, markup=False, soft_wrap=True)
        return False
    return True


def _rows(groups: Sequence[Group], seeds: int, folder: Path, console: Console) -> list[Row]:
    """Of every run of the groups from every seed."""
    jobs = [
        Job(group, recipe, seed, folder)
        for group in groups
        for seed in range(min(seeds, group.seeds))
        for recipe in group.recipes
    ]
    return [row for found in _each(jobs, cuts.measure, console) for row in found]


def _each(jobs: Sequence[Job], function: Callable, console: Console) -> list:
    """What the function makes of each job, under a progress bar of epochs."""
    found = []
    with progress(console) as bar:
        task = bar.add_task("epochs", total=sum(job.epochs for job in jobs), note="")
        for job in jobs:
            bar.update(task, note=str(job))
            found.append(function(job, _say(bar.console), lambda epochs: bar.advance(task, epochs)))
    return found


def _say(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)


def _write(out: Path, name: str, text: str, rows: Iterable[dict], console: Console) -> None:
    """The table in Markdown, and the rows behind it as CSV."""
    with replacing(out / f"{name}.md") as file:
        file.write(f"{text}\n".encode())
    write_csv(out / f"{name}.csv", rows)
    _say(console)(f"{text}\n\nWritten to {out}: {name}.md, {name}.csv")


def _table3(out: Path, heading: str, only: Sequence[str], device: torch.device, console: Console) -> None:
    networks = [network for network in step_times.NETWORKS if not only or network.name in only]
    if not networks:
        known = ", ".join(network.name for network in step_times.NETWORKS)
        raise ValueError(f"table3 has no network {only[0]!r}: there are {known}")
    found = []
    with progress(console) as bar:
        task = bar.add_task("timing steps", total=len(networks) * (TIMED_STEPS + 1), note="")
        for network in networks:
            bar.update(task, note=network.title)
            found += step_times.measure(network, device, TIMED_STEPS, lambda: bar.advance(task))
    _write(out, "table3", step_times.table(heading, found), map(asdict, found), console)


def _figure2(out: Path, heading: str, groups: Sequence[Group], rows: list[Row], console: Console) -> None:
    write_csv(out / "figure2.csv", map(asdict, rows))
    names = [
        pictures.accuracies(out, heading, group, [r for r in rows if r.group == group.name])
        for group in groups
    ]
    _say(console)(f"Written to {out}: figure2.csv, {', '.join(names)}")


def _figure3(out: Path, heading: str, groups: Sequence[Group], console: Console) -> None:
    """From seed 0."""
    whole = [replace(group, fine_tune=None) for group in groups]
    jobs = [Job(group, group.recipe(name), 0, out / "runs") for group in whole for name in group.norms]
    norms = [norm for found in _each(jobs, pictures.norms_of, console) for norm in found]
    write_csv(out / "figure3.csv", map(asdict, norms))
    names = [
        pictures.norms(out, heading, group, [n for n in norms if n.group == group.name]) for group in groups
    ]
    _say(console)(f"Written to {out}: figure3.csv, {', '.join(names)}")
