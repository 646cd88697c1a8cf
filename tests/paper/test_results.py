"""The committed results are those of these recipes: their rows give their tables, to the byte."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from bench.paper import accuracies, costs, forces, norms, recipes, reproduce
from bench.paper.accuracies import Mean
from bench.paper.costs import Latency
from bench.paper.jobs import Job, Outcome
from efreg.lab import engine
from efreg.lab.logs import read_csv

RESULTS = Path(__file__).parents[2] / "bench" / "results"
GROUPS = recipes.read()
FORCES = [name for name, group in GROUPS.items() if "forces" in group.shown]
TABLES = {
    "speedups": (costs.Size, costs.size_table),
    "table3": (costs.StepTime, costs.step_table),
    "no-finetuning": (Mean, accuracies.lost),
    "figure2": (Mean, accuracies.by_ratio),
    "figure3": (
        norms.Norm,
        lambda heading, found: norms.table(heading, {g.name: g.title for g in GROUPS.values()}, found),
    ),
}


def committed(name):
    return (RESULTS / f"{name}.md").read_text(encoding="utf-8").rstrip("\n")


@pytest.mark.parametrize("what", TABLES)
def test_rows_give_the_table(what):
    kind, table = TABLES[what]
    assert table(recipes.TITLES[what], read_csv(RESULTS / f"{what}.csv", kind)) == committed(what)


@pytest.mark.parametrize("name", FORCES)
def test_rows_of_forces_give_the_table(name):
    rows = read_csv(RESULTS / f"forces-{name}.csv", Outcome)
    latencies = read_csv(RESULTS / f"forces-{name}-latency.csv", Latency)
    assert forces.table(GROUPS[name], rows, latencies) == committed(f"forces-{name}")


def test_committed_rows_need_not_be_made_again(tmp_path, monkeypatch):
    """All of the digits', through the command; the latencies are those that were measured."""
    found = RESULTS / "forces-digits-latency.csv"
    monkeypatch.setattr(costs, "latencies", lambda *_: read_csv(found, Latency))
    monkeypatch.setattr(engine, "Run", lambda *_: pytest.fail("trained"))
    console = Console(file=io.StringIO())
    given = {"rows": [RESULTS / "forces-digits.csv"], "only": ["digits"], "device": "cpu"}
    reproduce.run("forces", tmp_path, console=console, **given)
    assert (tmp_path / "forces-digits.md").read_text(encoding="utf-8").rstrip("\n") == committed(
        "forces-digits"
    )


def test_committed_rows_of_outcomes_are_of_runs_that_there_are():
    for name in ("resnet20-cifar10-15-epochs", *(f"forces-{name}" for name in FORCES)):
        rows = read_csv(RESULTS / f"{name}.csv", Outcome)
        known = {(group.name, recipe.name) for group in GROUPS.values() for recipe in group.recipes}
        assert {(row.group, row.run) for row in rows} <= known


NAMES = {
    ("resnet56-mnist", "dense (r)"): ("resnet56-mnist-dense-r-1-14c52b96", "8a7eb15a"),
    ("table4", "L1 (p, ours)"): ("table4-L1-p-ours-1-58334ad5", "d562e3d3"),
    ("resnet20-cifar10-15-epochs", "fade 0.7, distilled"): (
        "resnet20-cifar10-15-epochs-fade-0.7-distilled-1-f653cc68",
        "62d37253",
    ),
    ("cifar10", "ladder, filter, proximal, 0.1"): ("cifar10-ladder-filter-proximal-0.1-1-9cd676ab", None),
}
"""Of a run's files, without the public weights: the network's, and the end of that of the outcomes."""


@pytest.mark.parametrize("group, run", NAMES)
def test_files_are_found_under_the_names_that_they_have_always_had(group, run, tmp_path, monkeypatch):
    """Of `forces`, whose files were called otherwise, networks are found by their digest."""
    monkeypatch.setattr(engine, "has_bfloat16", lambda _: False)
    own = GROUPS[group].on(str(tmp_path), "cpu")
    job, (network, outcomes) = Job(own, own.recipe(run), 1, tmp_path), NAMES[group, run]
    assert job.network.name == f"{network}.safetensors"
    assert outcomes is None or job.outcomes.name.endswith(f"-{outcomes}.csv")
