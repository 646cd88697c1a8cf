"""`efreg paper forces`: what the tables say is what was measured, and an interrupted study goes on."""

import csv
import io
import shutil
from dataclasses import asdict, replace
from itertools import islice
from math import nan

import pytest
import torch
from PIL import Image
from rich.console import Console

import efreg
from efreg.lab import checkpoints, data, engine, figures, sweep
from efreg.lab.checkpoints import Settings
from efreg.lab.paper import forces, runs, studies
from efreg.lab.paper.forces import RATIOS, Result
from efreg.lab.paper.studies import Candidate, Study, Way

LADDER = Way(studies.LADDER, "filter", "proximal")
TINY = Study(
    "tiny",
    Settings(dataset="digits", model="resnet14", epochs=1, lr=0.05, batch_size=64, held_out=40),
    (Candidate(Way(studies.NO_FORCE), 0.0, seeds=1), Candidate(LADDER, 0.1), Candidate(LADDER, 10.0)),
    start_epochs=1,
)


@pytest.fixture(scope="module", autouse=True)
def small(few_digits):
    """A study of few runs, and latencies of few repeats."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(studies.STUDIES, "tiny", TINY)
        patch.setattr(forces, "LATENCY_REPEATS", {1: 2, 4: 1})
        yield


def run(out, **options):
    torch.set_num_threads(1)
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    forces.run(out, only=["tiny"], seeds=2, device="cpu", console=console, **options)
    return printed.getvalue()


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """The folder of a short study, and what it printed."""
    out = tmp_path_factory.mktemp("paper")
    return out, run(out)


def test_every_candidate_is_there_from_every_seed(studied):
    with open(studied[0] / "forces-tiny.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["force"], float(row["alpha"]), int(row["seed"]), float(row["ratio"])) for row in rows}
    expected = [("no force", 0.0, 0), *(("ladder", alpha, seed) for alpha in (0.1, 10.0) for seed in (0, 1))]
    assert found == {(*key, ratio) for key in expected for ratio in RATIOS}
    assert len(rows) == len(found)


def test_a_row_is_what_a_run_by_hand_gives(studied):
    """Start, training, cut and evaluation, step by step: accuracy on test and held-out images apart."""
    out, _ = studied
    start = replace(TINY.base, seed=1, lr=0.1, device="cpu")
    first = engine.Run(start)
    list(first.epochs())
    efreg.save(first.model, out / "by-hand.safetensors")
    settings = TINY.candidates[1].settings(replace(TINY.base, device="cpu"), seed=1)
    trained = engine.Run(replace(settings, weights=str(out / "by-hand.safetensors")))
    list(trained.epochs())
    results = {(r.alpha, r.seed, r.ratio): r for r in forces.read(out / "forces-tiny.csv")}
    for ratio in (0.0, 0.5):
        plan = efreg.plan(trained.model, ratio=ratio, coupled=False, example_inputs=torch.zeros(2, 1, 8, 8))
        small = efreg.prune(trained.model, plan, example_inputs=torch.zeros(2, 1, 8, 8))
        row = results[0.1, 1, ratio]
        assert row.accuracy == engine.evaluate(small, data.load("digits").test)[1]
        assert row.chosen_by == engine.evaluate(small, trained.data.test)[1]
        assert row.macs == efreg.macs(small, torch.zeros(1, 1, 8, 8))
        efreg.recalibrate(small, islice(trained.data.train.epoch(250, 0, 0), sweep.STATISTICS_BATCHES))
        assert row.recalibrated == engine.evaluate(small, data.load("digits").test)[1]
        dead = efreg.plan(trained.model, dead=True, example_inputs=torch.zeros(2, 1, 8, 8))
        assert row.dead == sum(cut.removed for cut in dead.cuts)
        alive = efreg.prune(trained.model, dead, example_inputs=torch.zeros(2, 1, 8, 8))
        assert row.macs_without == efreg.macs(alive, torch.zeros(1, 1, 8, 8))
    assert len(trained.data.test) == 40
    assert max(r.dead for r in results.values()) > 20


def test_what_is_there_is_not_run_again(studied, monkeypatch):
    out, _ = studied
    before = [path.read_bytes() for path in (out / "forces-tiny.csv", out / "forces-tiny.md")]
    monkeypatch.setattr(engine, "train_epoch", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(efreg, "report", lambda *_, **__: pytest.fail("measured again"))
    run(out)
    assert [path.read_bytes() for path in (out / "forces-tiny.csv", out / "forces-tiny.md")] == before


@pytest.mark.slow
def test_an_interrupted_study_goes_on_with_its_epoch(studied, tmp_path, monkeypatch):
    """Broken off in the second epoch of a run: the first is not trained again, and the rows are the same."""
    longer = replace(TINY, base=replace(TINY.base, epochs=3), candidates=TINY.candidates[1:2])
    monkeypatch.setitem(studies.STUDIES, "tiny", longer)
    run(tmp_path / "whole")
    good, epochs = engine.train_epoch, []

    def interrupted(model, optimizer, images, settings, epoch, *more):
        epochs.append((settings.epochs, settings.seed, epoch))
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return good(model, optimizer, images, settings, epoch, *more)

    monkeypatch.setattr(engine, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken")
    run(tmp_path / "broken")
    starts, runs = ([e[1:] for e in epochs if e[0] == n] for n in (1, 3))
    assert starts == [(0, 0), (1, 0)]
    assert runs == [(0, 0), (0, 1), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    rows = [(folder / "forces-tiny.csv").read_text() for folder in (tmp_path / "whole", tmp_path / "broken")]
    assert rows[0] == rows[1]
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.slow
def test_a_study_interrupted_between_cuts_trains_nothing_again(studied, tmp_path, monkeypatch):
    """Broken off after the last epoch of a run, before its rows are written."""
    one = replace(TINY, candidates=TINY.candidates[:1])
    monkeypatch.setitem(studies.STUDIES, "tiny", one)
    good = forces.sweep
    monkeypatch.setattr(forces, "sweep", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(forces, "sweep", good)
    monkeypatch.setattr(engine, "train_epoch", lambda *_: pytest.fail("trained again"))
    run(tmp_path)
    expected = [r for r in forces.read(studied[0] / "forces-tiny.csv") if r.alpha == 0]
    assert forces.read(tmp_path / "forces-tiny.csv") == expected
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.slow
def test_other_settings_are_other_runs(studied, tmp_path, monkeypatch):
    """Rows of one learning rate are not taken for those of another, nor its first weights."""
    shutil.copytree(studied[0], tmp_path / "out")
    monkeypatch.setitem(studies.STUDIES, "tiny", replace(TINY, base=replace(TINY.base, lr=0.01)))
    run(tmp_path / "out")
    rows = [forces.read(folder / "forces-tiny.csv") for folder in (studied[0], tmp_path / "out")]
    assert all(old.accuracy != new.accuracy for old, new in zip(*rows, strict=True) if not old.ratio)


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


@pytest.mark.slow
def test_a_candidate_that_diverges_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    """It is chosen only where nothing else is there, and no point of the picture is its."""
    wild, good = Candidate(Way(studies.L1), 0.3, seeds=1), engine.train_epoch
    monkeypatch.setitem(studies.STUDIES, "tiny", replace(TINY, candidates=(wild, TINY.candidates[0])))
    monkeypatch.setattr(
        engine,
        "train_epoch",
        lambda *given: (nan, 10.0) if given[3].law == "l1" else good(*given),
    )
    printed = run(tmp_path)
    assert "L1, weights, gradient, α = 0.3, seed 0: the loss is not finite in epoch " in printed
    table = (tmp_path / "forces-tiny.md").read_text(encoding="utf-8")
    assert f"| L1 | weights | gradient | 0.3 | 1 | {'diverged | ' * 7}0 | 0.0 |" in table
    assert "| no force |" in table


@pytest.mark.slow
def test_the_last_good_epoch_of_a_run_that_diverges_is_kept(tmp_path, monkeypatch):
    wild, good = Candidate(Way(studies.L1), 0.3, seeds=1), engine.train_epoch
    base = replace(TINY.base, epochs=2)
    monkeypatch.setitem(studies.STUDIES, "tiny", replace(TINY, base=base, candidates=(wild,)))
    monkeypatch.setattr(
        engine,
        "train_epoch",
        lambda *given: (nan, 10.0) if given[3].law == "l1" and given[4] else good(*given),
    )
    assert "α = 0.3, seed 0: the loss is not finite in epoch 2" in run(tmp_path)
    (kept,) = (tmp_path / "tiny").glob("*.pt")
    assert checkpoints.load(kept).epoch == 1


@pytest.mark.slow
def test_other_weights_of_the_same_name_are_other_runs(tmp_path, monkeypatch):
    """Also where they have lain at the same place."""
    public = tmp_path / "w.pt"
    study = replace(TINY, weights="w.pt", start_epochs=0, candidates=TINY.candidates[:1])
    monkeypatch.setitem(studies.STUDIES, "tiny", study)
    for seed in (0, 1, 0):
        torch.save(engine.build(replace(TINY.base, seed=seed), 10, (1, 8, 8)).state_dict(), public)
        run(tmp_path, data_folder=str(tmp_path))
    assert len(list((tmp_path / "tiny").glob("no-force*.csv"))) == 2


@pytest.mark.parametrize("damage", ["", "force,scope\nL1,weights\n", "half"])
def test_a_damaged_result_is_named(studied, tmp_path, damage):
    shutil.copytree(studied[0], tmp_path / "out")
    path = next((tmp_path / "out" / "tiny").glob("ladder*.csv"))
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2] if damage == "half" else damage)
    with pytest.raises(ValueError, match=f"{path} is .*: remove it, and it is made again"):
        run(tmp_path / "out")


def test_a_damaged_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(forces, "sweep", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    (path,) = tmp_path.rglob("*.pt")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"{path} is damaged: remove it, and its run begins anew"):
        run(tmp_path)


def test_no_seeds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="seeds is 0: it must be at least 1"):
        forces.run(tmp_path, seeds=0, console=Console(file=io.StringIO()))


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(studies.STUDIES, "tiny", replace(TINY, start_epochs=0, weights="weights/x.th"))
    with pytest.raises(FileNotFoundError, match="no weights/x.th in there: put the public weights of"):
        run(tmp_path, data_folder="there")


def results(force, alpha, chosen_by, accuracy, seeds=(0, 1), scope="filter"):
    """Results of seeds that lie one point above and below the accuracy."""
    same = {"recalibrated": 90.0, "macs": 100, "dead": 3, "macs_without": 80, "epochs": 60}
    same.update(dtype="x", device="y")
    found = [
        Result(force, scope, "proximal", alpha, seed, ratio, by, a + (1, -1)[seed], **same)
        for ratio, by, a in zip(RATIOS, chosen_by, accuracy, strict=True)
        for seed in seeds
    ]
    return sorted(found, key=lambda r: (r.seed, r.ratio))


def test_the_strength_is_chosen_on_held_out_images():
    """By the mean over the ratios from 0.3 up, whatever the test images say; each way for itself."""
    found = [
        *results("ladder", 0.1, [99, 10, 10, 10, 10, 10, 10], [99] * 7),
        *results("ladder", 0.3, [50, 20, 20, 20, 20, 20, 20], [60] * 7),
        *results("L1", 0.2, [0] * 7, [30] * 7),
    ]
    best = [b.line for b in forces.best(forces.lines(found), 40)]
    assert [(line.way[0], line.alpha) for line in best] == [("ladder", 0.3), ("L1", 0.2)]
    assert best[0].accuracy == tuple([(60, pytest.approx(2**0.5))] * 7)


def test_strengths_are_compared_on_the_seeds_that_all_of_them_have():
    """A seed that only one strength was tried from says nothing about which is better."""
    found = [
        *results("ladder", 0.1, [50] * 7, [60] * 7, seeds=(0,)),
        *results("ladder", 0.1, [0] * 7, [60] * 7, seeds=(1,)),
        *results("ladder", 0.3, [40] * 7, [60] * 7, seeds=(0,)),
    ]
    (best,) = forces.best(forces.lines(found), 40)
    assert best.line.alpha == 0.1


@pytest.mark.parametrize("images, alpha", [(30, 0.1), (45, 0.2), (200, 0.3)])
def test_of_strengths_that_so_few_images_cannot_tell_apart_the_weakest_is_chosen(images, alpha):
    """A standard error of 80 % is 7.3, 6.0 and 2.8 points, by counting: √(0.8 · 0.2 / images)."""
    strengths = ((0.1, 73), (0.2, 75), (0.3, 80), (0.4, 79))
    found = [r for alpha, by in strengths for r in results("ladder", alpha, [by] * 7, [60] * 7)]
    (best,) = forces.best(forces.lines(found), images)
    assert best.line.alpha == alpha


@pytest.mark.parametrize("kept, end", [((30, 20, 10), "↓"), ((10, 30, 20), ""), ((10, 20, 30), "↑")])
def test_a_strength_at_the_end_of_those_tried_is_marked(kept, end):
    strengths = zip((0.1, 0.2, 0.3), kept, strict=True)
    found = [r for alpha, by in strengths for r in results("ladder", alpha, [by] * 7, [60] * 7)]
    (best,) = forces.best(forces.lines(found), 40)
    assert best.end == end


LATENCIES = [
    forces.Latency(ratio, images, images * (1.5 - place / 10), "cpu", 2)
    for images in (1, 4)
    for place, ratio in enumerate(RATIOS)
]


def test_the_table_shows_means_and_deviations():
    found = [
        *results("ladder", 0.3, [20] * 7, [98, 97, 96, 95, 94, 93, 92]),
        *results("no force", 0.0, [20] * 7, [98, 50, 40, 30, 20, 10, 9], seeds=(0,)),
    ]
    lines = forces.tables(TINY, found, LATENCIES).splitlines()
    assert lines[0].startswith("### resnet14 on digits, 1 epoch, x on y")
    cells = " | ".join(f"{mean}.0 ± 1.4" for mean in (98, 97, 96, 95, 94, 93, 92))
    assert f"| ladder | filter | proximal | 0.3 | 2 | {cells} | 3 | 0.0 |" in lines
    assert "| no force |  |  |  | 1 | 99.0 | 51.0 | 41.0 | 31.0 | 21.0 | 11.0 | 10.0 | 3 | 0.0 |" in lines
    times = "1.50 | 1.40 | 1.30 | 1.20 | 1.10 | 1.00 | 0.90"
    assert f"| ms for 1 image (float32, cpu, 2 threads) |  |  |  |  | {times} |  |  |" in lines
    (course,) = (line for line in lines if line.startswith("Trained from"))
    assert course.startswith(
        "Trained from a network trained without a force over 1 epochs, learning rate 0.05, cosine. Right"
    )
    times = "6.00 | 5.60 | 5.20 | 4.80 | 4.40 | 4.00 | 3.60"
    assert f"| ms for 4 images (float32, cpu, 2 threads) |  |  |  |  | {times} |  |  |" in lines


def test_the_table_says_how_its_strengths_were_chosen():
    """Of several of a force the one that keeps most; or there was one of each."""
    base = replace(TINY.base, alpha_schedule="linear", alpha_until=0.5)
    study = replace(TINY, base=base, weights="public.th", start_epochs=0)
    one = results("ladder", 0.1, [20] * 7, [90] * 7)
    text = forces.tables(study, one, LATENCIES)
    assert (
        "One strength of each, none was chosen. The public weights were trained on all training images"
        in text
    )
    schedule = "α's schedule is linear, over 50% of the steps"
    assert f"Trained from public.th, learning rate 0.05, cosine; {schedule}." in text
    text = forces.tables(study, [*one, *results("ladder", 0.2, [30] * 7, [90] * 7)], LATENCIES)
    assert "α is the weakest that keeps as much as any, within one standard error, of 40 training" in text


def test_every_point_is_in_the_picture(tmp_path, monkeypatch):
    """Also those that were not chosen, and lie far off."""
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    points = [
        figures.Point("no force", "weights", "gradient", 98.0, 30.0, True),
        figures.Point("ladder", "filter", "proximal", 40.0, 12.0, False),
        figures.Point("L1", "weights", "gradient", 99.0, 99.0, True),
    ]
    figures.draw_trade(tmp_path / "x.png", points, "title", "subtitle")
    (ax,) = drawn[0].axes
    shown = [tuple(mark.get_offsets()[0]) for mark in ax.collections]
    assert shown == [(p.before, p.after) for p in points]
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    assert all(left < x < right and bottom < y < top for x, y in shown)


def test_every_force_has_a_colour():
    forces_of_all = {c.way.force.name for study in studies.STUDIES.values() for c in study.candidates}
    assert forces_of_all <= set(figures.COLORS)
    assert len(set(figures.COLORS.values())) == len(figures.COLORS)


def test_it_prints_what_it_writes(studied):
    out, printed = studied
    for line in (out / "forces-tiny.md").read_text(encoding="utf-8").splitlines():
        assert line in printed
    with Image.open(out / "forces-tiny.png") as picture:
        assert picture.format == "PNG" and min(picture.size) >= 1000


def test_no_two_runs_share_a_file():
    for study in studies.STUDIES.values():
        planned = [(c, c.settings(study.base, seed)) for c in study.candidates for seed in range(c.seeds)]
        files = [runs.stem(str(candidate), settings) for candidate, settings in planned]
        assert len(set(files)) == len(files), study.name


def test_every_candidate_can_be_trained():
    """Its settings are known to the engine, its force to the library."""
    for study in studies.STUDIES.values():
        for candidate in study.candidates:
            engine.check(candidate.settings(study.base, seed=0))
            engine.force_options(candidate.settings(study.base, seed=0), steps=10)


def test_a_force_is_named_once():
    forces_of_all = [c.way.force for study in studies.STUDIES.values() for c in study.candidates]
    assert len({f.name for f in forces_of_all}) == len({(f.name, str(f.settings)) for f in forces_of_all})


def test_missing_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no mnist in {tmp_path}"):
        forces.run(
            tmp_path / "out", data_folder=str(tmp_path), only=["mnist"], console=Console(file=io.StringIO())
        )


@pytest.mark.slow
def test_studies_without_data_are_left_out_unless_they_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(forces, "STUDIES", {"mnist": studies.MNIST, "tiny": studies.STUDIES["tiny"]})
    printed = io.StringIO()
    forces.run(
        tmp_path / "out", data_folder="here", seeds=1, device="cpu", console=Console(file=printed, width=200)
    )
    assert "mnist is left out: no mnist in here" in printed.getvalue()
    assert sorted(path.name for path in (tmp_path / "out").glob("*.md")) == ["forces-tiny.md"]


def test_files_of_other_candidates_are_not_counted(studied, tmp_path, monkeypatch):
    """A study that has lost a candidate since."""
    shutil.copytree(studied[0], tmp_path / "out")
    fewer = replace(TINY, candidates=TINY.candidates[:2])
    monkeypatch.setitem(studies.STUDIES, "tiny", fewer)
    run(tmp_path / "out")
    assert {row.alpha for row in forces.read(tmp_path / "out" / "forces-tiny.csv")} == {0.0, 0.1}


def test_rows_read_back_are_those_written(studied):
    written = forces.read(studied[0] / "forces-tiny.csv")
    with open(studied[0] / "forces-tiny.csv", newline="") as file:
        assert [{k: str(v) for k, v in asdict(r).items()} for r in written] == list(csv.DictReader(file))


@pytest.mark.parametrize("seed", [0, 1])
def test_a_way_with_a_seed_that_diverged_is_said_to_have(seed):
    """Whichever of two it is: its strength is not chosen, and the table can be made."""
    kept = results("L1", 0.1, 7 * [50.0], 7 * [60.0])
    wild = results("L1", 1.0, 7 * [90.0], 7 * [90.0])
    nothing = {"accuracy": nan, "recalibrated": nan, "chosen_by": nan}
    wild = [replace(r, **nothing) if r.seed == seed else r for r in wild]
    (chosen,) = forces.best(forces.lines([*kept, *wild]), 40)
    assert chosen.line.alpha == 0.1
    assert "diverged" in forces.tables(TINY, wild, LATENCIES)


def test_forces_runs_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="forces runs in one process: start it without torchrun"):
        run(tmp_path)
