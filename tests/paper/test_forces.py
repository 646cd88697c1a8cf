"""`bench.paper forces`: strengths chosen on held-out images, and tables of what was measured."""

import csv
import io
import shutil
from dataclasses import replace
from itertools import islice
from math import nan

import pytest
import torch
from PIL import Image
from rich.console import Console

import efreg
from bench.paper import costs, forces, recipes, reproduce, runs
from bench.paper.costs import Latency
from bench.paper.jobs import Outcome
from efreg.lab import checkpoints, data, engine, figures, sweep, ways
from efreg.lab.checkpoints import Settings
from efreg.lab.logs import read_csv

TINY = """
[tiny]
title = "ResNet-14, digits"
shown = ["forces"]
model = "resnet14"
dataset = "digits"
batch_size = 64
lr = 0.05
epochs = 1
held_out = 40
scope = "filter"
update = "proximal"
cuts = [0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
runs = [
  { name = "start", seeds = 0, lr = 0.1 },
  { name = "no force", start = "start", seeds = 1 },
  { name = "ladder", start = "start", law = "ladder", grid = [0.1, 10] },
]
"""
RATIOS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@pytest.fixture(scope="module", autouse=True)
def small(few_digits):
    """Latencies of few repeats."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "REPEATS", {1: 2, 4: 1})
        yield


def run(out, text=TINY, **options):
    """What it prints."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipes.toml").write_text(text)
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    given = {"seeds": 2, "recipes": out / "recipes.toml", "device": "cpu", **options}
    reproduce.run("forces", out, console=console, **given)
    return printed.getvalue()


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """The folder of a short study, and what it printed."""
    out = tmp_path_factory.mktemp("paper")
    return out, run(out)


@pytest.fixture
def group(tmp_path):
    """The runs of the short study."""
    (tmp_path / "recipes.toml").write_text(TINY)
    return recipes.read(tmp_path / "recipes.toml")["tiny"].on("data", "cpu")


def outcomes(out):
    return read_csv(out / "forces-tiny.csv", Outcome)


def written(out):
    """As text, in which NaN is itself."""
    return (out / "forces-tiny.csv").read_text()


def test_every_run_is_there_from_every_seed(studied):
    found = [(o.run, o.seed, float(o.ratio)) for o in outcomes(studied[0])]
    expected = [("no force", 0), *((f"ladder, {alpha}", seed) for alpha in ("0.1", "10") for seed in (0, 1))]
    assert set(found) == {(*key, ratio) for key in expected for ratio in RATIOS}
    assert len(found) == len(set(found))


def test_a_row_is_what_a_run_by_hand_gives(studied, group):
    """Start, training, cut and evaluation, step by step: accuracy on test and held-out images apart."""
    out, _ = studied
    first = engine.Run(replace(group.recipe("start").settings, seed=1))
    list(first.epochs())
    efreg.save(first.model, out / "by-hand.safetensors")
    settings = replace(group.recipe("ladder, 0.1").settings, seed=1)
    trained = engine.Run(replace(settings, weights=str(out / "by-hand.safetensors")))
    list(trained.epochs())
    rows = {(o.run, o.seed, o.ratio): o for o in outcomes(out)}
    for ratio in (0.0, 0.5):
        plan = efreg.plan(trained.model, ratio=ratio, coupled=False, example_inputs=torch.zeros(2, 1, 8, 8))
        small = efreg.prune(trained.model, plan, example_inputs=torch.zeros(2, 1, 8, 8))
        row = rows["ladder, 0.1", 1, str(ratio)]
        assert row.accuracy == engine.evaluate(small, data.load("digits").test)[1]
        assert row.held_out == engine.evaluate(small, trained.data.test)[1]
        assert row.macs == efreg.macs(small, torch.zeros(1, 1, 8, 8))
        efreg.recalibrate(small, islice(trained.data.train.epoch(250, 0, 0), sweep.STATISTICS_BATCHES))
        assert row.recalibrated == engine.evaluate(small, data.load("digits").test)[1]
        dead = efreg.plan(trained.model, dead=True, example_inputs=torch.zeros(2, 1, 8, 8))
        assert row.dead == sum(cut.removed for cut in dead.cuts)
        alive = efreg.prune(trained.model, dead, example_inputs=torch.zeros(2, 1, 8, 8))
        assert row.macs_alive == efreg.macs(alive, torch.zeros(1, 1, 8, 8))
        assert row.epochs == "1 + 1"
    assert len(trained.data.test) == 40
    assert max(row.dead for row in rows.values()) > 20


def test_what_is_there_is_not_run_again(studied, monkeypatch):
    out, _ = studied
    before = [path.read_bytes() for path in (out / "forces-tiny.csv", out / "forces-tiny.md")]
    monkeypatch.setattr(engine, "train_epoch", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(efreg, "report", lambda *_, **__: pytest.fail("measured again"))
    run(out)
    assert [path.read_bytes() for path in (out / "forces-tiny.csv", out / "forces-tiny.md")] == before


def test_rows_that_were_made_elsewhere_are_not_made_again(studied, tmp_path, monkeypatch):
    """Those of the run, seed, cuts and epochs; what is missing is run."""
    given = {"rows": [studied[0] / "forces-tiny.csv"]}
    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_epoch", lambda *_: pytest.fail("trained again"))
        run(tmp_path / "same", **given)
        for old, new in (("epochs = 1", "epochs = 2"), ("0.7, 0.8]", "0.7]"), ("[0.1, 10]", "[0.1, 1]")):
            with pytest.raises(pytest.fail.Exception, match="trained again"):
                run(tmp_path / new, text=TINY.replace(old, new), **given)
    assert written(tmp_path / "same") == written(studied[0])
    shorter = TINY.replace("grid = [0.1, 10]", "grid = [0.1]")
    assert {o.run for o in outcomes(studied[0])} > {"no force", "ladder, 0.1"}
    run(tmp_path / "shorter", text=shorter, **given)
    assert {o.run for o in outcomes(tmp_path / "shorter")} == {"no force", "ladder, 0.1"}


@pytest.mark.parametrize(
    "change, same",
    [
        ({"data": "elsewhere"}, True),
        ({"device": "auto", "precision": "auto"}, True),
        ({"epochs": 2}, False),
        ({"alpha": 0.2}, False),
        ({"alpha_schedule": "cosine"}, False),
        ({"held_out": 10}, False),
        ({"precision": "bfloat16"}, False),
        ({"weights": "start-1.safetensors"}, False),
        ({"weights": "there/start-0.safetensors"}, True),
    ],
    ids=str,
)
def test_a_digest_is_of_what_decides_the_weights(change, same, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(engine, "has_bfloat16", lambda _: False)
    settings = Settings(device="cpu", data="here", weights="here/start-0.safetensors", alpha=0.1)
    assert (runs.digest(replace(settings, **change)) == runs.digest(settings)) == same


def test_a_network_is_trained_once_for_all_groups(studied, tmp_path, monkeypatch):
    """Also for one of another name, in whatever folder beside it."""
    shutil.copytree(studied[0] / "runs", tmp_path / "forces")
    monkeypatch.setattr(engine, "train_epoch", lambda *_: pytest.fail("trained again"))
    for path in (tmp_path / "forces").glob("*.csv"):
        path.unlink()
    run(tmp_path)
    assert written(tmp_path) == written(studied[0])


def test_a_run_that_diverges_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    """The last good epoch is kept, and no point of the picture is its."""
    good, drawn = engine.train_epoch, []
    monkeypatch.setattr(
        engine,
        "train_epoch",
        lambda *given: (nan, 10.0) if given[3].law == "ladder" and given[4] else good(*given),
    )
    monkeypatch.setattr(figures, "draw_trade", lambda path, points, *_: drawn.extend(points))
    text = TINY.replace("epochs = 1", "epochs = 2").replace("[0.1, 10]", "[0.1]")
    printed = run(tmp_path, text=text, seeds=1)
    assert "ladder, 0.1, seed 0: the loss is not finite in epoch 2" in printed
    table = (tmp_path / "forces-tiny.md").read_text(encoding="utf-8")
    assert f"| ladder | filter | proximal | 0.1 | 0 (1 diverged) | {'diverged | ' * 7}0 | 0.0 |" in table
    assert [point.label for point in drawn] == ["no force"]
    (kept,) = (tmp_path / "runs").glob("*.pt")
    assert checkpoints.load(kept).epoch == 1


@pytest.mark.parametrize("damage", ["", "group,run\ntiny,ladder\n", "half"])
def test_a_damaged_result_is_named(studied, tmp_path, damage):
    shutil.copytree(studied[0], tmp_path / "out")
    path = next((tmp_path / "out" / "runs").glob("tiny-ladder*.csv"))
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2] if damage == "half" else damage)
    with pytest.raises(ValueError, match=f"{path} is .*: remove it, and it is made again"):
        run(tmp_path / "out")


def test_a_damaged_checkpoint_is_named(tmp_path, monkeypatch):
    good = engine.train_epoch

    def interrupted(*given):
        if given[4]:
            raise KeyboardInterrupt
        return good(*given)

    text = TINY.replace("epochs = 1", "epochs = 2")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "train_epoch", interrupted)
        run(tmp_path, text=text)
    (path,) = tmp_path.rglob("*.pt")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"{path} is damaged, .*: remove it and train anew"):
        run(tmp_path, text=text)


LADDER = """
[tiny]
title = "ResNet-14, digits"
shown = ["forces"]
dataset = "digits"
model = "resnet14"
held_out = IMAGES
scope = "filter"
update = "proximal"
cuts = [0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
runs = [
  { name = "no force" },
  { name = "ladder", law = "ladder", grid = [0.1, 0.2, 0.3, 0.4] },
  { name = "L1", law = "l1", grid = [0.2] },
]
"""


@pytest.fixture
def chosen(tmp_path):
    """chosen(outcomes, images): of each force the strength that so many held-out images choose."""

    def choose(found, images=40):
        (tmp_path / "recipes.toml").write_text(LADDER.replace("IMAGES", str(images)))
        return forces.choices(recipes.read(tmp_path / "recipes.toml")["tiny"], found)

    return choose


def results(run, held_out, accuracy, seeds=(0, 1)):
    """Outcomes of seeds that lie one point above and below the accuracy."""
    same = {"fine_tuned": nan, "macs_before": 100, "epochs": "60", "on": "x, y", "dead": 3, "macs_alive": 80}
    found = [
        Outcome("tiny", run, seed, str(r), 98.0, a + (1, -1)[seed], 90.0, macs=100, held_out=by, **same)
        for r, by, a in zip(RATIOS, held_out, accuracy, strict=True)
        for seed in seeds
    ]
    return sorted(found, key=lambda outcome: (outcome.seed, float(outcome.ratio)))


def test_the_strength_is_chosen_on_held_out_images(chosen):
    """By the mean over the cuts from 0.3 up, whatever the test images say; each way for itself."""
    found = [
        *results("ladder, 0.1", [99, 10, 10, 10, 10, 10, 10], [99] * 7),
        *results("ladder, 0.3", [50, 20, 20, 20, 20, 20, 20], [60] * 7),
        *results("L1, 0.2", [0] * 7, [30] * 7),
    ]
    assert [c.run.name for c in chosen(found)] == ["ladder, 0.3", "L1, 0.2"]


def test_strengths_are_compared_on_the_seeds_that_all_of_them_have(chosen):
    """A seed that only one strength was tried from says nothing about which is better."""
    found = [
        *results("ladder, 0.1", [50] * 7, [60] * 7, seeds=(0,)),
        *results("ladder, 0.1", [0] * 7, [60] * 7, seeds=(1,)),
        *results("ladder, 0.3", [40] * 7, [60] * 7, seeds=(0,)),
    ]
    assert [c.run.name for c in chosen(found)] == ["ladder, 0.1"]


@pytest.mark.parametrize("images, alpha", [(30, 0.1), (45, 0.2), (200, 0.3)])
def test_of_strengths_that_so_few_images_cannot_tell_apart_the_weakest_is_chosen(images, alpha, chosen):
    """A standard error of 80 % is 7.3, 6.0 and 2.8 points, by counting: √(0.8 · 0.2 / images)."""
    strengths = ((0.1, 73), (0.2, 75), (0.3, 80), (0.4, 79))
    found = [r for a, by in strengths for r in results(f"ladder, {a}", [by] * 7, [60] * 7)]
    assert [c.run.settings.alpha for c in chosen(found, images)] == [alpha]


@pytest.mark.parametrize(
    "kept, said", [((30, 20, 10), "0.1 ↓"), ((10, 30, 20), "0.2"), ((10, 20, 30), "0.3 ↑")]
)
def test_a_strength_at_the_end_of_those_tried_is_marked(kept, said, chosen):
    strengths = zip((0.1, 0.2, 0.3), kept, strict=True)
    found = [r for a, by in strengths for r in results(f"ladder, {a}", [by] * 7, [60] * 7)]
    assert [c.strength for c in chosen(found)] == [said]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_strength_with_a_seed_that_diverged_is_not_chosen(seed, chosen, group):
    """Whichever of two it is."""
    kept = results("ladder, 0.1", [50] * 7, [60] * 7)
    wild = results("ladder, 0.4", [90] * 7, [90] * 7)
    lost = {"accuracy": nan, "recalibrated": nan, "held_out": nan, "before": nan, "macs": 0}
    wild = [replace(o, **lost) if o.seed == seed else o for o in wild]
    assert [c.run.name for c in chosen([*kept, *wild])] == ["ladder, 0.1"]


LATENCIES = [
    Latency(ratio, images, images * (1.5 - place / 10), "cpu", 2)
    for images in (1, 4)
    for place, ratio in enumerate(RATIOS)
]


def test_the_table_shows_means_and_deviations(group):
    found = [
        *results("ladder, 0.1", [20] * 7, [98, 97, 96, 95, 94, 93, 92]),
        *results("no force", [20] * 7, [98, 50, 40, 30, 20, 10, 9], seeds=(0,)),
    ]
    lines = forces.table(group, found, LATENCIES).splitlines()
    assert lines[0].startswith("### resnet14 on digits, 1 epoch, x on y: accuracy in % on the test images")
    cells = " | ".join(f"{mean}.0 ± 1.4" for mean in (98, 97, 96, 95, 94, 93, 92))
    assert f"| ladder | filter | proximal | 0.1 | 2 | {cells} | 3 | 0.0 |" in lines
    assert "| no force |  |  |  | 1 | 99.0 | 51.0 | 41.0 | 31.0 | 21.0 | 11.0 | 10.0 | 3 | 0.0 |" in lines
    times = "1.50 | 1.40 | 1.30 | 1.20 | 1.10 | 1.00 | 0.90"
    assert f"| ms for 1 image (float32, cpu, 2 threads) |  |  |  |  | {times} |  |  |" in lines
    (course,) = (line for line in lines if line.startswith("Trained from"))
    assert course.startswith(
        "Trained from a network trained without a force over 1 epochs, learning rate 0.05, cosine. Right"
    )
    times = "6.00 | 5.60 | 5.20 | 4.80 | 4.40 | 4.00 | 3.60"
    assert f"| ms for 4 images (float32, cpu, 2 threads) |  |  |  |  | {times} |  |  |" in lines


def test_the_table_says_how_its_strengths_were_chosen(tmp_path):
    """Of several of a force the one that keeps most; or there was one of each."""
    told = 'alpha_schedule = "linear"\nalpha_until = 0.5\nweights = "public.th"\nheld_out = 40'
    text = TINY.replace("held_out = 40", told).replace('start = "start", ', "")
    (tmp_path / "recipes.toml").write_text(text.replace('  { name = "start", seeds = 0, lr = 0.1 },\n', ""))
    group = recipes.read(tmp_path / "recipes.toml")["tiny"]
    one = results("ladder, 0.1", [20] * 7, [90] * 7)
    text = forces.table(group, one, LATENCIES)
    assert "none was chosen. The public weights were trained on all training images" in text
    schedule = "α's schedule is linear, over 50% of the steps"
    assert f"Trained from public.th, learning rate 0.05, cosine; {schedule}." in text
    text = forces.table(group, [*one, *results("ladder, 10", [30] * 7, [90] * 7)], LATENCIES)
    assert "α is the weakest that keeps as much as any, within one standard error, of 40 training" in text


def test_every_point_is_in_the_picture(tmp_path, monkeypatch):
    """Also those that were not chosen, that lie far off, and that are of a law of the user's own."""
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    points = [
        figures.Point("no force", "weights", "gradient", 98.0, 30.0, True),
        figures.Point("ladder", "filter", "proximal", 40.0, 12.0, False),
        figures.Point("L1", "weights", "gradient", 99.0, 99.0, True),
        figures.Point("my.Law", "weights", "gradient", 97.0, 50.0, True),
    ]
    figures.draw_trade(tmp_path / "x.png", points, "title", "subtitle")
    (ax,) = drawn[0].axes
    shown = [tuple(mark.get_offsets()[0]) for mark in ax.collections]
    assert shown == [(p.before, p.after) for p in points]
    assert {"L1", "my.Law"} < {text.get_text() for text in drawn[0].legends[0].texts}
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert all(left < x < right and bottom < y < top for x, y in shown)


def test_every_force_has_a_colour():
    shown = [r.settings for g in recipes.read().values() for r in g.recipes]
    assert {ways.way_of(settings).force for settings in shown} <= set(figures.COLORS)
    assert len(set(figures.COLORS.values())) == len(figures.COLORS)


def test_it_prints_what_it_writes(studied):
    out, printed = studied
    for line in (out / "forces-tiny.md").read_text(encoding="utf-8").splitlines():
        assert line in printed
    with Image.open(out / "forces-tiny.png") as picture:
        assert picture.format == "PNG" and min(picture.size) >= 1000
    with open(out / "forces-tiny-latency.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * len(RATIOS)


def test_no_two_runs_share_a_name_of_files():
    for group in recipes.read().values():
        names = [runs.stem(recipe.name, Settings()) for recipe in group.recipes]
        assert len(set(names)) == len(names), group.name


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("held_out = 40", "", "forces chooses strengths by images that are not trained on: say held_out"),
        ("0.4, 0.5,", "0.4,", "forces shows cuts by one share of all layers, 0.0 and 0.5 among them"),
        ("0.4, 0.5,", '"[0, 0.5, 0.5, 0.5, 0]", 0.5,', "forces shows cuts by one share of all layers"),
        ("grid = [0.1, 10]", "grid = []", "run 'ladder': grid has the strengths to try"),
        ("grid = [0.1, 10]", "grid = [0.1], alpha = 1.0", "run 'ladder': grid has the strengths to try"),
        ("grid = [0.1, 10]", "grid = 0.1", "run 'ladder': grid is 0.1, which is no list"),
        (
            "grid = [0.1, 10]",
            "grid = [0.1, 'x']",
            "grid is [0.1, 'x'], which is no list",
        ),
        ("grid = [0.1, 10]", "grid = [0.1, 0.1]", "two runs are called 'ladder, 0.1': give each a name"),
        ("seeds = 1", "seeds = 0", "run 'no force' has 0 seeds: it needs at least one"),
    ],
)
def test_a_study_that_cannot_be_is_named(old, new, message, tmp_path):
    assert TINY.count(old) == 1
    (tmp_path / "mine.toml").write_text(TINY.replace(old, new))
    with pytest.raises(ValueError, match="mine.toml, group tiny: ") as caught:
        recipes.read(tmp_path / "mine.toml")
    assert message in str(caught.value)
