"""`bench.paper table3 ... figure3`: the published figures are the paper's, ours are what was measured."""

import csv
import io
import itertools
import re
import shutil
from dataclasses import replace
from math import isnan, nan
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from rich.console import Console

import efreg
from bench import peers, steps
from bench.paper import accuracies, costs, jobs, norms, recipes, reproduce, runs
from bench.paper.accuracies import Mean, over_seeds, published
from bench.paper.jobs import Job, Outcome
from efreg.backends import reference
from efreg.lab import data, distributed, engine, figures, models, ways
from efreg.lab.checkpoints import Settings
from efreg.lab.sweep import pruned

MINE = """
[tiny]
title = "ResNet-14, digits"
shown = ["table4", "no-finetuning", "figure2", "figure3"]
norms = ["dense", "ladder"]
model = "resnet14"
dataset = "digits"
batch_size = 64
lr = 0.05
epochs = 2
cuts = [0.0, 0.5, "[0, 0.6, 0.5, 0.25, 0]"]
fine_tune = { schedule = "p2", epochs = 1 }
runs = [
  { name = "dense" },
  { name = "ladder", start = "dense", law = "ladder", alpha = 0.1, scope = "filter", update = "proximal" },
]
"""


pytestmark = pytest.mark.usefixtures("few_digits")


def run(what, out, text=MINE, **options):
    """What it prints. The recipes are these."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "recipes.toml"
    file.write_text(text)
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    given = {"seeds": 1, "recipes": file, **options}
    reproduce.run(what, out, device="cpu", console=console, **given)
    return printed.getvalue()


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def outcomes(out):
    """The rows of every seed's runs, in any order."""
    return [row for path in sorted((out / "runs").glob("*.csv")) for row in rows(path)]


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A folder where everything that the small recipes show has been run, and what table 4 printed."""
    out = tmp_path_factory.mktemp("paper")
    printed = run("table4", out, seeds=2)
    for what in ("no-finetuning", "figure2", "figure3"):
        run(what, out, seeds=2)
    return out, printed


PRINTED_DROPS = """0.26 0.23 1.00 0.90 0.33 0.23 0.15 0.35 -0.28 0.32 0.17 0.03 -0.36 -0.05 0.18 0.00 0.99
0.08 0.73 0.41 0.30 0.22 0.67 0.48"""
"""The column of Table 4, as the paper prints it."""


def test_published_drops_are_those_the_paper_prints_but_for_three():
    printed = [float(drop) for drop in PRINTED_DROPS.split()]
    for row, drop in zip(published("table4"), printed, strict=True):
        assert isnan(row.printed_drop) == (round(row.drop, 2) == drop)
        assert isnan(row.printed_drop) or row.printed_drop == drop
    assert sum(not isnan(row.printed_drop) for row in published("table4")) == 3


@pytest.mark.parametrize(
    "model, classes, channels, cut, speedup, macs",
    [
        ("resnet56", 10, 3, 0.5, "1.993", None),
        ("resnet56", 10, 3, "[0, .52, .52, .52, 0]", "2.174", 57_729_664),
        ("resnet56", 10, 3, 0.6, "2.615", 47_979_136),
        ("resnet56", 10, 3, "[0, .62, .63, .62, 0]", "2.725", 46_043_776),
        ("resnet56", 10, 3, 0.7, "3.593", None),
        ("resnet56", 10, 3, 0.8, "5.253", None),
        ("resnet56", 10, 1, 0.8, "5.306", None),
        ("resnet56", 10, 1, 0.9, "11.873", None),
        ("vgg19", 100, 3, "[0:0, 1-15:0.65]", "6.848", 58_147_100),
        ("vgg19", 100, 3, "[0:0, 1-15:0.70]", "8.891", 44_784_324),
        ("vgg19", 10, 3, 0.5, "3.610", None),
        ("vgg19", 10, 3, 0.6, "5.425", None),
    ],
)
def test_recipes_cut_to_the_published_speedups(model, classes, channels, cut, speedup, macs):
    """To the last digit of method.md's table, and every cut is one that the recipes have."""
    torch.manual_seed(0)
    example = torch.zeros(2, channels, 32, 32)
    network = models.build(model, classes, channels).eval()
    left = efreg.macs(pruned(network, cut, example), example[:1])
    assert f"{efreg.macs(network, example[:1]) / left:.3f}" == speedup
    assert macs is None or left == macs
    dataset = {(1, 10): "mnist", (3, 10): "cifar10", (3, 100): "cifar100"}[channels, classes]
    groups = [g for g in recipes.read().values() if (g.base.model, g.base.dataset) == (model, dataset)]
    spelled = {str(c).replace("0.", ".") for group in groups for c in group.cuts}
    assert str(cut).replace("0.", ".") in spelled


@pytest.mark.slow
def test_resnet34_of_table_6():
    group = recipes.read()["table6"]
    example = torch.zeros(1, 3, 224, 224)
    network = models.build("resnet34", 1000).eval()
    plan = efreg.plan(network, group.cuts[0], skip=group.base.skip, example_inputs=example)
    small = efreg.prune(network, plan, example_inputs=example)
    assert efreg.macs(network, example) == 3_663_761_408
    assert efreg.macs(small, example) == 2_738_917_376


BOTH = {(None, "weights"), (1, "weights"), (None, "filter"), (1, "filter")}
"""Readings of when charges are taken, and scopes."""


def electrostatic(group):
    return [r.settings for r in group.recipes if r.settings.law == "electrostatic" and r.settings.alpha]


@pytest.mark.parametrize(
    "name, alpha, batch_size, epochs, tuning, cuts",
    [
        ("table4", 1e-16, 128, 200, 120, 3),
        ("table5", 1e-11, 128, 200, 120, 2),
        ("table6", 1e-17, 512, 100, 80, 1),
    ],
)
def test_recipes_of_the_tables_are_the_papers(name, alpha, batch_size, epochs, tuning, cuts):
    """Tables 1 and 2, "pr + ft"; both readings, both scopes, the ladder among the laws."""
    group = recipes.read()[name]
    found = electrostatic(group)
    assert {(s.alpha, s.batch_size, s.epochs, s.weight_decay, s.schedule) for s in found} == {
        (alpha, batch_size, epochs, 5e-4, "p1")
    }
    assert {(s.refresh, ways.way_of(s).scope) for s in found} == BOTH
    assert "ladder:power=4" in {r.settings.law for r in group.recipes}
    assert len(group.cuts) == cuts
    tuned = {
        (t.epochs, t.schedule, t.alpha, t.lr, t.weight_decay) for t in (r.fine_tune for r in group.recipes)
    }
    assert tuned == {(tuning, "p2", 0.0, None, 5e-4)}
    starts = {r.start for r in group.recipes if r.settings.law == "electrostatic" and r.settings.alpha}
    assert starts == ({None} if group.weights else {None, "dense"})


@pytest.mark.parametrize(
    "name, alphas, batch_size",
    [
        ("resnet56-mnist", {1e-11}, 256),
        ("resnet56-cifar10", {1e-11, 1e-12, 1e-14}, 128),
        ("vgg19-cifar10", {1e-11, 1e-12, 1e-14}, 128),
    ],
)
def test_recipes_without_fine_tuning_are_the_papers(name, alphas, batch_size):
    """Table 1, "pr", and section 6.1; L1 at 1e-2."""
    group = recipes.read()[name]
    found = electrostatic(group)
    assert {s.alpha for s in found} == alphas
    assert {(s.batch_size, s.epochs, s.weight_decay, s.schedule) for s in found} == {
        (batch_size, 200, 0, "p1")
    }
    assert {(s.refresh, ways.way_of(s).scope) for s in found} == BOTH
    assert (1e-2, "weights", "gradient") in {
        (r.settings.alpha, r.settings.scope or "weights", r.settings.update or "gradient")
        for r in group.recipes
        if r.settings.law == "l1"
    }


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("resnet20-cifar10-short", "table5") else pytest.mark.slow)
        for name, group in recipes.read().items()
        if group.base.dataset != "imagefolder"
    ],
)
def test_recipes_can_be_run(name):
    """Every cut can be planned, every force attached; the public weights are not looked at."""
    group = recipes.read()[name]
    alone = [replace(r, settings=replace(r.settings, distil=None)) for r in group.recipes]
    recipes.rehearse(replace(group, weights=None, recipes=tuple(alone)))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("lr = 0.05", "speed = 3", "group tiny: run 'dense': unknown setting speed: there are alpha, "),
        ('title = "ResNet-14, digits"', "", "group tiny: title is missing"),
        ("lr = 0.05", 'lr = "0.05"', "run 'dense': lr is '0.05', which is no"),
        ("epochs = 2", "epochs = 1.5", "run 'dense': epochs is 1.5, which is no int"),
        ('norms = ["dense", "ladder"]', "", "figure3 shows no run of it: name some as norms"),
        (
            "cuts = [0.0, 0.5, ",
            "cuts = [",
            "figure2 shows cuts by one share of all layers, such as 0.5",
        ),
        (
            'fine_tune = { schedule = "p2", epochs = 1 }',
            "",
            "table4 shows fine-tuned networks: say",
        ),
        ('start = "dense",', 'model = "resnet20",', "run 'ladder': model is the group's: make another group"),
        ('name = "ladder"', 'name = "a/b"', "'a/b' names files: take another sign than /"),
        (
            'cuts = [0.0, 0.5, "[0, 0.6, 0.5, 0.25, 0]"]',
            'cuts = "0.5"',
            "cuts is '0.5', which is no list",
        ),
        ("cuts = [0.0, 0.5, ", "cuts = [0.0, 0.5, 0.5, ", "cuts has 0.5 twice: once is enough"),
        ('name = "ladder"', 'name = "dense"', "two runs are called 'dense': give each a name"),
        ('start = "dense"', 'start = "dnse"', "run 'ladder' starts from 'dnse': no run above is called so"),
        ('norms = ["dense", "ladder"]', 'norms = ["l"]', "norms names the run 'l', which is not there"),
        ('"figure3"]', '"figure4"]', "shown names 'figure4': there are forces, "),
        ('law = "ladder"', 'law = "lader"', "run 'ladder': unknown law 'lader'"),
        ("alpha = 0.1", "alpha = -1", "run 'ladder': alpha"),
        ("epochs = 2", "epochs = 0", "run 'dense' has no epochs: random weights are no network to cut"),
        ('schedule = "p2"', 'schedule = "p3"', "run 'dense': fine_tune: unknown schedule 'p3'"),
        ("lr = 0.05", 'lr = 0.05\ndata = "here"', "run 'dense': data is said where it is run: leave it out"),
        ('norms = ["dense", "ladder"]', 'norms = ["dense", 3]', "norms is ['dense', 3], which is no list"),
        ("lr = 0.05", "lr = 0.05\nseeds = 1.5", "group tiny: run 'dense': seeds is 1.5, which is no int"),
        ('start = "dense",', "seeds = 0,", "run 'ladder' has 0 seeds: it needs at least one"),
        ("[tiny]", "[tiny", "is no TOML"),
    ],
)
def test_a_recipe_that_cannot_be_is_named(old, new, message, tmp_path):
    assert MINE.count(old) == 1
    file = tmp_path / "mine.toml"
    file.write_text(MINE.replace(old, new))
    with pytest.raises(ValueError, match=str(file)) as caught:
        recipes.read(file)
    assert message in str(caught.value)


def test_no_recipes(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*nothing.toml: --recipes names a file like"):
        recipes.read(tmp_path / "nothing.toml")


def test_a_row_is_what_training_pruning_and_tuning_by_hand_give(reproduced):
    """Both runs, step by step through the library: the force goes on from the dense network."""
    out, _ = reproduced
    found = {(r["run"], r["seed"], r["ratio"]): r for r in outcomes(out)}
    group = recipes.read(out / "recipes.toml")["tiny"].on("data", "cpu")
    dense = engine.Run(replace(group.base, seed=1))
    list(dense.epochs())
    efreg.save(dense.model, out / "by-hand.safetensors")
    forced = engine.Run(
        replace(group.recipe("ladder").settings, seed=1, weights=str(out / "by-hand.safetensors"))
    )
    list(forced.epochs())
    test, example = data.load("digits").test, torch.zeros(2, 1, 8, 8)
    for name, network in (("dense", dense.model), ("ladder", forced.model)):
        row = found[name, "1", "[0, 0.6, 0.5, 0.25, 0]"]
        plan = efreg.plan(network, "[0, 0.6, 0.5, 0.25, 0]", example_inputs=example)
        small = efreg.prune(network, plan, example_inputs=example)
        assert float(row["before"]) == engine.evaluate(network, test)[1]
        assert float(row["accuracy"]) == engine.evaluate(small, test)[1]
        assert int(row["macs"]) == efreg.macs(small, example[:1])
        assert int(row["macs_before"]) == efreg.macs(network, example[:1])
        efreg.save(small, out / "small.safetensors")
        tuning = Settings("digits", "resnet14", batch_size=64, schedule="p2", epochs=1, seed=1, device="cpu")
        tuned = engine.Run(replace(tuning, weights=str(out / "small.safetensors")))
        list(tuned.epochs())
        assert float(row["fine_tuned"]) == engine.evaluate(tuned.model, test)[1]
    assert {(r["run"], r["epochs"]) for r in found.values()} == {("dense", "2 + 1"), ("ladder", "2 + 2 + 1")}


def test_the_table_has_published_and_ours_by_speedup(reproduced):
    out, printed = reproduced
    text = (out / "table4.md").read_text(encoding="utf-8")
    assert text in printed
    lines = rows(out / "table4.csv")
    assert len(lines) == len(published("table4")) + 2 * 3
    speedups = [float(cell) for cell in re.findall(r"\| (\d+\.\d\d)× \|", text)]
    assert speedups == sorted(speedups) and len(speedups) == len(lines)
    assert "| electrostatic (p) | 94.05 | 93.57 | 0.48 | 2.73× |" in text
    assert "| WHC | 93.59 | 93.74 | -0.15[1] | 2.11× |" in text and "[1] The paper prints 0.15." in text
    ours = [line for line in lines if line["source"] == "ours"]
    assert {line["n"] for line in ours} == {"2"}
    assert "| **ResNet-14, digits: ladder** |" in text


def outcome(run="x", seed=0, ratio="0.5", before=90.0, accuracy=60.0, fine_tuned=nan, macs=50):
    return Outcome(
        "g", run, seed, ratio, before, accuracy, 70.0, fine_tuned, 100, macs, "3 + 1", "float32, cpu"
    )


def table4(*outcomes):
    ours = over_seeds(outcomes, {"g": "ResNet-56, CIFAR-10"}, "fine_tuned")
    return accuracies.fine_tuned("", [*published("table4"), *ours])


def lost(*outcomes, title="net"):
    return accuracies.lost("", [*published("no-finetuning"), *over_seeds(outcomes, {"g": title})])


def test_a_line_of_ours_is_a_mean_over_seeds():
    """Before 91 and 93, pruned 88 and 90: a drop of 3, a standard deviation of √2."""
    found = [outcome(before=91, fine_tuned=88), outcome(seed=1, before=93, fine_tuned=90)]
    expected = "| **x** | 92.00 | 89.00 ± 1.41 | 3.00 | 2.00× | 60.00 | 2 | 3 + 1 | float32, cpu |"
    assert expected in table4(*found)


def test_all_figures_of_a_line_are_of_the_same_seeds():
    """One seed's fine-tuning diverged: 90 before and 88 after are the other's."""
    found = [outcome(before=90, fine_tuned=88), outcome(seed=1, before=92, accuracy=50)]
    assert "| **x** | 90.00 | 88.00 | 2.00 | 2.00× | 60.00 | 1 (1 diverged) |" in table4(*found)


LOST = {"before": nan, "accuracy": nan, "macs": 0}


def test_a_run_that_diverged_is_said_to_have():
    assert "| **x** | diverged | diverged | diverged |  | diverged | 0 (1 diverged) |" in table4(
        outcome(**LOST)
    )
    assert "| **x** | diverged | 0 (1 diverged) |" in lost(outcome(**LOST))


@pytest.mark.parametrize("first", [True, False])
def test_seeds_that_diverged_are_not_in_the_mean(first):
    """Whichever of three it is."""
    kept = [outcome(seed=1, before=91, fine_tuned=88), outcome(seed=2, before=93, fine_tuned=90)]
    found = [outcome(**LOST), *kept] if first else [*kept, outcome(**LOST)]
    expected = "| **x** | 92.00 | 89.00 ± 1.41 | 3.00 | 2.00× | 60.00 | 2 (1 diverged) |"
    assert expected in table4(*found)
    text = lost(*found)
    assert "| **x** | 92.00 | 32.00 ± 1.41 | 2 (1 diverged) |" in text


def test_fine_tuning_that_diverged_leaves_what_was_before():
    expected = "| **x** | 90.00 | diverged | diverged | 2.00× | 60.00 | 0 (1 diverged) |"
    assert expected in table4(outcome(fine_tuned=nan))


def test_points_lost_stand_under_their_speedup():
    found = [outcome(seed=seed, ratio="0.7", macs=28, accuracy=80.0 + 2 * seed) for seed in (0, 1)]
    found += [outcome(seed=seed, ratio="0.8", macs=19, accuracy=60.0 + 4 * seed) for seed in (0, 1)]
    text = lost(*found, title="ResNet-56, CIFAR-10")
    head = next(line for line in text.splitlines() if line.startswith("| method | before % | 2.12×"))
    ours = next(line for line in text.splitlines() if line.startswith("| **x**"))
    paper = next(line for line in text.splitlines() if line.startswith("| the paper: electrostatic, 1e-12"))
    cells = [[cell.strip() for cell in line.split("|")] for line in (head, ours, paper)]
    shown = {speedup: (a, b) for speedup, a, b in zip(*cells, strict=True)}
    assert shown["3.57×"] == ("9.00 ± 1.41", "8.48 (3.59×)")
    assert shown["5.26×"] == ("28.00 ± 2.83", "27.73 (5.25×)")


def test_the_pictures(reproduced):
    out, _ = reproduced
    for name in ("figure2-tiny", "figure3-tiny"):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.format == "PNG" and min(picture.size) >= 600
        assert (out / f"{name}.svg").read_text(encoding="utf-8").count("<svg") == 1
    assert {r["run"] for r in rows(out / "figure2.csv")} == {"dense", "ladder"}


CALLED = {
    "ladder p = 4 sparing": "ladder, sparing",
    "ladder p = 4": "ladder, p = 4",
    "ladder": "ladder",
    "group lasso": "group lasso",
    "L1": "L1",
    "electrostatic, once": "electrostatic, once",
    "electrostatic, each step": "electrostatic, each step",
    "fade, forgetting": "fade, forgetting",
    "fade": "fade",
    "nested and ladder": "nested, ladder",
    "nested": "nested",
}
"""How the names of runs begin, and the forces of the trade-offs that they are drawn as."""


@pytest.mark.parametrize("group", recipes.read().values(), ids=lambda group: group.name)
def test_a_line_shows_force_and_scope_that_its_run_is_named_after(group):
    looks = accuracies.looks_of(group)
    if "figure2" in group.shown:
        assert len(set(looks.values())) == len(looks) == len(group.recipes)
    for name, look in looks.items():
        force = next((CALLED[start] for start in CALLED if name.startswith(start)), "no force")
        assert look.color == figures.COLORS[force]
        whole = ", filter" in name or name.startswith("fade") or group.base.scope == "filter"
        assert look.marker == figures.MARKERS["filter" if whole else "weights"]


def test_of_a_force_the_strongest_is_solid():
    looks = accuracies.looks_of(recipes.read()["resnet20-cifar10-short"])
    once = [looks[f"electrostatic, once, {alpha}"].style for alpha in ("1e-11", "1e-12", "1e-14")]
    assert once == ["-", "--", ":"]
    assert looks["electrostatic, once, filter, proximal, fading, 2e-11 (ours)"].style == "-"


def test_lines_are_drawn_as_they_look(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    given = figures.Curve("given", [1, 2], [3, 4], look=figures.Look("#123456", ":", "D"))
    panel = figures.Panel("heading", "x", [figures.Curve("by place", [1, 2], [4, 3]), given])
    figures.draw_panels(tmp_path / "x.png", [panel], "title", "subtitle")
    lines = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in drawn[0].axes[0].lines]
    assert lines == [(figures.PALETTE[0], "-", "o"), ("#123456", ":", "D")]


def test_figure_2_shows_new_statistics_where_they_are_asked_for(reproduced, tmp_path):
    shutil.copytree(reproduced[0] / "runs", tmp_path / "runs")
    run("figure2", tmp_path, seeds=2)
    as_the_paper, width = (tmp_path / "figure2.md").read_text(), _width(tmp_path)
    printed = run("figure2", tmp_path, seeds=2, recalibrated=True)
    assert "statistics" not in as_the_paper
    assert "accuracy in %, batch-norm statistics re-estimated" in printed
    assert _width(tmp_path) == 1.5 * width  # three panels, two before


def _width(folder):
    with Image.open(folder / "figure2-tiny.png") as picture:
        return picture.width


def test_figure_2_has_means_of_its_seeds(reproduced):
    out, _ = reproduced
    for row in rows(out / "figure2.csv"):
        found = [o for o in outcomes(out) if (o["run"], o["ratio"]) == (row["run"], row["ratio"])]
        assert (len(found), row["n"], row["epochs"]) == (2, "2", found[0]["epochs"])
        for what in ("accuracy", "recalibrated"):
            a, b = (float(o[what]) for o in found)
            assert float(row[what]) == pytest.approx((a + b) / 2, abs=1e-9)
            assert float(row[f"{what}_deviation"]) == pytest.approx(abs(a - b) / 2**0.5, abs=1e-9)
        assert float(row["speedup"]) == int(found[0]["macs_before"]) / int(found[0]["macs"])


def test_a_run_has_seeds_of_its_own(reproduced, tmp_path):
    """The group's, or those of its line; a run starts from the same seed of another."""
    shutil.copytree(reproduced[0] / "runs", tmp_path / "runs")
    text = MINE.replace("lr = 0.05", "lr = 0.05\nseeds = 1").replace(
        'name = "ladder"', 'name = "ladder", seeds = 2'
    )
    run("figure2", tmp_path, text=text, seeds=3)
    assert {(r["run"], r["n"]) for r in rows(tmp_path / "figure2.csv")} == {("dense", "1"), ("ladder", "2")}


@pytest.mark.parametrize(
    "seeds, said",
    [((1, 1), "one seed"), ((3, 3), "means of 3 seeds"), ((3, 1, 2), "means of 1 to 3 seeds")],
)
def test_a_picture_says_how_many_seeds(seeds, said, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    group = recipes.read()["resnet20-cifar10-short"]
    made = [
        Mean(group.name, "R", recipe.name, "0.5", 2.0, accuracy=70, n=n)
        for recipe, n in zip(group.recipes, seeds, strict=False)
    ]
    accuracies.picture(tmp_path / "x", "heading", group, made)
    assert f"ResNet-20, CIFAR-10, whole test set: 5 epochs with each force, {said}" in {
        text.get_text() for text in drawn[0].texts
    }


def test_figure_2_in_a_table():
    """A row a run and a column a ratio, the two accuracies apart, groups of one network together."""
    made = [
        Mean(
            group,
            "R",
            run,
            ratio,
            s,
            accuracy=10 * s,
            recalibrated=20 * s,
            recalibrated_deviation=1.0,
            n=2,
            diverged=d,
            epochs="3",
            on="cpu",
        )
        for group, run, d in (("short", "L1", 0), ("long", "ladder", 1))
        for ratio, s in (("0.0", 1.0), ("0.5", 2.0))
    ]
    text = accuracies.by_ratio("Figure", made)
    assert "repaired" not in text
    assert "repaired without training" in accuracies.by_ratio("", [replace(made[0], repaired=50.0)])
    after, again = text.split("batch-norm statistics re-estimated")
    assert "| run | 0.0 | 0.5 | n | epochs | on |" in after
    assert "| L1 | 10.00 | 20.00 | 2 | 3 | cpu |" in after
    assert "| ladder | 10.00 | 20.00 | 2 (1 diverged) | 3 | cpu |" in after
    assert "| speedup | 1.00× | 2.00× |" in after
    assert "| L1 | 20.00 ± 1.00 | 40.00 ± 1.00 | 2 | 3 | cpu |" in again


def test_a_layer_that_is_all_dead_has_norms_of_zero():
    assert norms.sorted_norms(torch.zeros(3, 2, 1, 1)) == [0, 0, 0]


def test_figure_3_in_a_table():
    shares = (1, 0.5, 0.09, 0.01, 0)
    found = [norms.Norm("g", "L1", "conv", place, n, "2", "cpu") for place, n in enumerate(shares)]
    text = norms.table("Figure", {"g": "R"}, found)
    assert "| R | L1 | conv | 5 | 1 | 3 | 3 | 2 | cpu |" in text
    assert "| network | run | layer | filters | below 1 % | below 10 % | below 50 % | epochs | on |" in text


def test_figure_3_shows_sorted_norms(reproduced):
    out, _ = reproduced
    found = rows(out / "figure3.csv")
    group = recipes.read(out / "recipes.toml")["tiny"].on("data", "cpu")
    network = jobs.train(Job(group, group.recipe("ladder"), 0, out / "runs"), runs.Watch())
    expected = (
        network.layer1[1].conv1.weight.detach().double().abs().sum((1, 2, 3)).sort(descending=True).values
    )
    ours = [float(r["norm"]) for r in found if (r["run"], r["layer"]) == ("ladder", "layer1.1.conv1")]
    torch.testing.assert_close(torch.tensor(ours).double(), expected / expected[0], rtol=1e-6, atol=0)
    assert {r["layer"] for r in found} == {"layer1.0.conv1", "layer1.1.conv1"}


def test_what_is_there_is_not_run_again(reproduced, monkeypatch):
    out, _ = reproduced
    monkeypatch.setattr(engine, "train_epoch", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(engine, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
    before = (out / "table4.csv").read_bytes()
    run("table4", out, seeds=2)
    assert (out / "table4.csv").read_bytes() == before


def test_networks_are_kept_for_other_cuts(reproduced, tmp_path, monkeypatch):
    """What is not trained again where only the cuts are others."""
    shutil.copytree(reproduced[0] / "runs", tmp_path / "runs")
    monkeypatch.setattr(engine, "train_epoch", lambda *_: pytest.fail("trained again"))
    text = MINE.replace("cuts = [0.0, 0.5,", "cuts = [0.0, 0.25,").replace('"table4", ', "")
    run("figure2", tmp_path, text=text.replace('fine_tune = { schedule = "p2", epochs = 1 }', ""), seeds=2)
    assert {r["ratio"] for r in rows(tmp_path / "figure2.csv")} == {"0.0", "0.25", "[0, 0.6, 0.5, 0.25, 0]"}


@pytest.mark.parametrize(
    "when",
    [
        pytest.param(2, id="training", marks=pytest.mark.slow),
        pytest.param(4, id="fine-tuning", marks=pytest.mark.slow),
        pytest.param(7, id="the run that goes on", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_table_loses_one_epoch(when, reproduced, tmp_path, monkeypatch):
    """Of 10 epochs: 2 of dense, 1 after each of its 3 cuts, then 2 and 3 of the ladder."""
    good, done = engine.train_epoch, []

    def interrupted(*given):
        done.append(given[4])
        if len(done) == when:
            raise KeyboardInterrupt
        return good(*given)

    monkeypatch.setattr(engine, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("table4", tmp_path)
    run("table4", tmp_path)
    assert len(done) == 10 + 1
    assert outcomes(tmp_path) == [r for r in outcomes(reproduced[0]) if r["seed"] == "0"]
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.slow
def test_a_scaled_table_says_so(tmp_path):
    """And lies beside the one that is not."""
    text = MINE.replace("epochs = 2", "epochs = 8").replace("epochs = 1 }", "epochs = 12 }")
    printed = run("table4", tmp_path, text=text.replace(', "[0, 0.6, 0.5, 0.25, 0]"', ""), epochs_scale=0.25)
    assert "### Table 4: ResNet-56 on CIFAR-10, pruned and fine-tuned (ours in 0.25 of the epochs)" in printed
    ours = [r for r in rows(tmp_path / "table4-0.25.csv") if r["source"] == "ours"]
    assert {r["epochs"] for r in ours} == {"2 + 3", "2 + 2 + 3"}
    assert not (tmp_path / "table4.csv").exists()


def test_a_run_that_diverges_is_said_and_the_rest_goes_on(tmp_path, monkeypatch):
    good = engine.train_epoch
    monkeypatch.setattr(
        engine, "train_epoch", lambda *given: (nan, 1.0) if given[3].law == "ladder" else good(*given)
    )
    printed = run("table4", tmp_path)
    assert "ResNet-14, digits, ladder, seed 0: the loss is not finite in epoch 1" in printed
    assert "| **ResNet-14, digits: ladder** | diverged |" in printed
    assert "| **ResNet-14, digits: dense** | " in printed and "dense** | diverged" not in printed
    run("figure2", tmp_path)
    assert "ladder, seed 0: the loss is not finite in epoch 1" in run("figure3", tmp_path)
    assert {r["run"] for r in rows(tmp_path / "figure3.csv")} == {"dense"}


TWO = MINE + MINE.replace("[tiny]", "[other]").replace('dataset = "digits"', 'dataset = "cifar10"')


def test_groups_without_data_are_left_out(reproduced, tmp_path):
    shutil.copytree(reproduced[0] / "runs", tmp_path / "runs")
    printed = run("figure2", tmp_path, text=TWO, data="nowhere")
    assert "other is left out: no cifar10 in nowhere" in printed
    assert {r["group"] for r in rows(tmp_path / "figure2.csv")} == {"tiny"}


def test_a_group_that_is_named_must_have_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="no cifar10 in nowhere"):
        run("table4", tmp_path, text=TWO, data="nowhere", only=["other"])
    weights = MINE.replace("lr = 0.05", 'lr = 0.05\nweights = "w.th"\nweights_from = "there"')
    taught = MINE.replace("lr = 0.05", 'lr = 0.05\ndistil = "w.th"\nweights_from = "there"')
    for text in (weights, taught):
        with pytest.raises(FileNotFoundError, match="no data/w.th: put the public weights of resnet14"):
            run("table4", tmp_path, text=text)


def test_without_any_data_nothing_is_written(tmp_path):
    """What was there stays."""
    text = MINE.replace('dataset = "digits"', 'dataset = "cifar10"')
    with pytest.raises(FileNotFoundError, match="no cifar10 in nowhere"):
        run("table4", tmp_path, text=text, data="nowhere")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["recipes.toml"]


def test_half_a_data_set_is_not_left_out(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").touch()
    with pytest.raises(FileNotFoundError, match="is incomplete, cifar-10-batches-py/data_batch_2"):
        run("figure2", tmp_path, text=TWO, data=str(tmp_path))


@pytest.mark.slow
def test_groups_that_are_not_named_are_shown_as_they_are(reproduced, tmp_path, monkeypatch):
    shutil.copytree(reproduced[0] / "runs", tmp_path / "runs")
    text = MINE + MINE.replace("[tiny]", "[other]")
    run("figure2", tmp_path, text=text, only=["tiny"])
    assert {r["group"] for r in rows(tmp_path / "figure2.csv")} == {"tiny"}
    run("figure2", tmp_path, text=text, only=["other"])
    assert {r["group"] for r in rows(tmp_path / "figure2.csv")} == {"tiny", "other"}


def test_a_run_may_start_from_random_weights_in_a_group_that_has_others(reproduced, tmp_path):
    """It is the run of a group that has none."""
    out, _ = reproduced
    group = recipes.read(out / "recipes.toml")["tiny"].on("data", "cpu")
    plain = Job(group, group.recipe("dense"), 0, tmp_path)
    random = replace(
        plain, group=replace(group, weights="w.th"), recipe=replace(plain.recipe, start=recipes.RANDOM)
    )
    assert (random.settings.weights, random.settings) == (None, plain.settings)
    assert random.network == plain.network


def test_other_weights_of_the_same_name_are_other_runs(tmp_path):
    group = replace(recipes.read()["resnet20-cifar10-short"], weights="w.th").on(str(tmp_path), "cpu")
    job = Job(group, group.recipes[1], 0, tmp_path)
    (tmp_path / "w.th").write_bytes(b"some")
    first = job.network
    (tmp_path / "w.th").write_bytes(b"other")
    assert job.network != first


@pytest.mark.parametrize(
    "change, message",
    [
        (("cuts = [0.0, 0.5, ", "cuts = [0.0, 1.5, "), "group tiny: cut 1.5: "),
        (('"[0, 0.6, 0.5, 0.25, 0]"', '"[0, 0.5, 0]"'), "group tiny: cut '\\[0, 0.5, 0\\]': "),
        (('scope = "filter"', 'scope = "filters"'), "group tiny: run 'ladder': .*scope"),
        (('update = "proximal"', 'update = "p"'), "group tiny: run 'ladder': .*update"),
        (('model = "resnet14"', 'model = "resnet15"'), "group tiny: unknown model 'resnet15'"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_said_before_training(change, message, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "train_epoch", lambda *_: pytest.fail("trained"))
    assert MINE.count(change[0]) == 1
    with pytest.raises(ValueError, match=message):
        run("table4", tmp_path, text=MINE.replace(*change))


def test_two_commands_do_not_share_a_folder(tmp_path):
    with distributed.alone(tmp_path / "runs"), pytest.raises(ValueError, match="another command works in"):
        run("table4", tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seeds": 0}, "seeds is 0: it must be at least 1"),
        ({"epochs_scale": 0.0}, "the scale of the epochs is 0: it is a share"),
        ({"epochs_scale": 2.0}, "the scale of the epochs is 2: it is a share"),
        ({"only": ["x"]}, "table4 has no group 'x': there are tiny"),
    ],
    ids=str,
)
def test_what_cannot_be_asked(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("table4", tmp_path, **options)


def test_only_figure_2_has_a_choice_of_statistics(tmp_path):
    with pytest.raises(ValueError, match="table4 has no choice of batch-norm statistics: drop --recal"):
        run("table4", tmp_path, recalibrated=True)


def test_a_damaged_file_is_named(reproduced, tmp_path):
    shutil.copytree(reproduced[0], tmp_path / "out")
    path = next((tmp_path / "out" / "runs").glob("tiny-ladder-*.csv"))
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match=f"{path} is not whole: remove it, and it is made again"):
        run("table4", tmp_path / "out", seeds=2)


def test_zero_epochs_take_the_first_weights(tmp_path, reproduced):
    """A run that starts from another one and is not trained is that one."""
    text = MINE.replace('start = "dense", law = "ladder", alpha = 0.1', 'start = "dense", epochs = 0')
    text = text.replace(', scope = "filter", update = "proximal"', "")
    run("figure3", tmp_path, text=text)
    group = recipes.read(tmp_path / "recipes.toml")["tiny"].on("data", "cpu")
    first, same = (jobs.train(Job(group, r, 0, tmp_path / "runs"), runs.Watch()) for r in group.recipes)
    for a, b in zip(first.state_dict().values(), same.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_speedups_stand_beside_the_published(tmp_path):
    run("speedups", tmp_path, only=["resnet56-mnist"], recipes=recipes.OURS)
    whole, *cut = rows(tmp_path / "speedups.csv")
    assert [f"{float(row['speedup']):.3f}" for row in (whole, *cut)] == ["1.000", "5.306", "11.873"]
    assert [int(whole["macs"]) / int(row["macs"]) for row in cut] == [float(row["speedup"]) for row in cut]
    text = (tmp_path / "speedups.md").read_text(encoding="utf-8")
    assert "| ResNet-56, MNIST | 0.9 | 10,543,744 | 81,214 | 11.873× | 11.87× |" in text
    shown = [group for group in recipes.read().values() if "speedups" in group.shown]
    assert {group.title for group in shown} == {cut.network for cut in published("speedups")}
    with pytest.raises(ValueError, match="speedups trains nothing: drop --epochs-scale"):
        run("speedups", tmp_path, epochs_scale=0.5)


def test_step_times_are_paired(monkeypatch, tmp_path):
    """On a clock that each method moves by its own step: the ratios are those of the clock.

    The forces pull the 6 layers that a plan prunes.
    """
    pulled = []
    for name in costs.LOOPS:
        monkeypatch.setitem(costs.LOOPS, name, lambda weights: pulled.append(len(weights)))
    ticks = itertools.chain.from_iterable((0.0, 1.0 + place % 6) for place in itertools.count())
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr(costs, "STEPS", 4)
    text = MINE.replace('title = "ResNet-14, digits"', 'title = "ResNet-56, CIFAR-10"')
    text = text.replace('"figure3"]', '"figure3", "table3"]').replace("batch_size = 64", "batch_size = 2")
    run("table3", tmp_path, text=text)
    found = rows(tmp_path / "table3.csv")
    assert [float(r["ratio"]) for r in found] == [1, 2, 3, 4, 5, 6]
    assert set(pulled) == {6}
    printed = (tmp_path / "table3.md").read_text(encoding="utf-8")
    line = "| ResNet-56, CIFAR-10 | electrostatic, the paper's loop | 4.91 | ×4.68 | 3000 | ×3.000 |"
    assert line in printed
    assert [r["paper_hours"] for r in found] == ["1.05", "3.05", "4.91", "nan", "nan", "nan"]
    with pytest.raises(ValueError, match="table3 trains nothing: drop --epochs-scale"):
        run("table3", tmp_path, epochs_scale=0.5)
    with pytest.raises(ValueError, match="table3 has no group 'x': there are tiny"):
        run("table3", tmp_path, text=text, only=["x"])


def test_the_papers_loop_pulls_as_the_library_does():
    """The gradients of both, in float64."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 5, 3).double()
    peers.paper_loop([model.weight])
    magnitude, balance, _ = reference.measure(model.weight.detach())
    pulled = torch.zeros_like(model.weight)
    coefficients = peers.LAW.coefficients(efreg.Charges(magnitude, balance.sign(), 27))
    reference.pull(pulled, model.weight.detach(), coefficients)
    torch.testing.assert_close(model.weight.grad, pulled, rtol=1e-9, atol=0)
