"""`efreg paper forces`: what the tables say is what was measured, and an interrupted study goes on."""

import csv
import io
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image
from rich.console import Console

import efreg
from efreg.lab import data, engine, forces, studies
from efreg.lab.checkpoints import Settings
from efreg.lab.forces import RATIOS, Result
from efreg.lab.studies import Candidate, Study, Way

LADDER = Way(studies.LADDER, "filter", "proximal")
TINY = Study(
    "tiny",
    Settings(dataset="digits", model="resnet14", epochs=1, lr=0.05, batch_size=64, held_out=40),
    (Candidate(Way(studies.NO_FORCE), 0.0, seeds=1), Candidate(LADDER, 0.1), Candidate(LADDER, 10.0)),
    start_epochs=1,
)


@pytest.fixture(scope="module", autouse=True)
def few_digits():
    """Every fourth of the digits: 337 and 113 images."""
    parts = [(images[::4].clone(), labels[::4].clone()) for images, labels in data._load_digits()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_load_digits", lambda: parts)
        patch.setitem(studies.STUDIES, "tiny", TINY)
        patch.setattr(forces, "LATENCY_REPEATS", 2)
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
        plan = efreg.plan(trained.model, ratio=ratio, example_inputs=torch.zeros(2, 1, 8, 8))
        small = efreg.prune(trained.model, plan, example_inputs=torch.zeros(2, 1, 8, 8))
        row = results[0.1, 1, ratio]
        assert row.accuracy == engine.evaluate(small, data.load("digits").test)[1]
        assert row.chosen_by == engine.evaluate(small, trained.data.test)[1]
        assert row.macs == efreg.macs(small, torch.zeros(1, 1, 8, 8))
    assert len(trained.data.test) == 40


def test_what_is_there_is_not_run_again(studied, monkeypatch):
    out, _ = studied
    before = (out / "forces-tiny.csv").read_bytes()
    monkeypatch.setattr(engine, "train_epoch", lambda *_: pytest.fail("trained again"))
    run(out)
    assert (out / "forces-tiny.csv").read_bytes() == before


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
    assert not (tmp_path / "broken" / "tiny" / "interrupted.pt").exists()


def results(force, alpha, chosen_by, accuracy, seeds=(0, 1), scope="filter"):
    """Results of seeds that lie one point above and below the accuracy."""
    figures = zip(RATIOS, chosen_by, accuracy, strict=True)
    return [
        Result(
            force,
            scope,
            "proximal",
            alpha,
            seed,
            ratio,
            by,
            a + (1, -1)[seed],
            90.0,
            100,
            3,
            80,
            60,
            "x",
            "y",
        )
        for ratio, by, a in figures
        for seed in seeds
    ]


def test_the_strength_is_chosen_on_held_out_images():
    """By the mean over the ratios from 0.3 up, whatever the test images say; each way for itself."""
    found = [
        *results("ladder", 0.1, [99, 10, 10, 10, 10, 10, 10], [99] * 7),
        *results("ladder", 0.3, [50, 20, 20, 20, 20, 20, 20], [60] * 7),
        *results("L1", 0.2, [0] * 7, [30] * 7),
    ]
    best = forces.best(forces.lines(found))
    assert [(line.way[0], line.alpha) for line in best] == [("ladder", 0.3), ("L1", 0.2)]
    assert best[0].accuracy == tuple([(60, pytest.approx(2**0.5))] * 7)


def test_the_table_shows_means_and_deviations():
    found = [
        *results("ladder", 0.3, [20] * 7, [98, 97, 96, 95, 94, 93, 92]),
        *results("no force", 0.0, [20] * 7, [98, 50, 40, 30, 20, 10, 9], seeds=(0,)),
    ]
    lines = forces.tables(TINY, found, [1.5, 1.4, 1.3, 1.2, 1.1, 1.0, 0.9]).splitlines()
    assert lines[0].startswith("### resnet14 on digits, 1 epoch, x on y")
    cells = " | ".join(f"{mean}.0 ± 1.4" for mean in (98, 97, 96, 95, 94, 93, 92))
    assert f"| ladder | filter | proximal | 0.3 | 2 | {cells} | 3 |" in lines
    assert "| no force |  |  |  | 1 | 99.0 | 51.0 | 41.0 | 31.0 | 21.0 | 11.0 | 10.0 | 3 |" in lines
    assert (
        "| latency of one image, ms |  |  |  |  | 1.50 | 1.40 | 1.30 | 1.20 | 1.10 | 1.00 | 0.90 |  |"
        in lines
    )


def test_it_prints_what_it_writes(studied):
    out, printed = studied
    for line in (out / "forces-tiny.md").read_text().splitlines():
        assert line in printed or line.startswith("| latency"), line  # measured anew each time
    with Image.open(out / "forces-tiny.png") as picture:
        assert picture.format == "PNG" and min(picture.size) >= 1000


def test_no_two_runs_share_a_file(tmp_path):
    for study in studies.STUDIES.values():
        files = [forces._file(tmp_path, c, seed) for c in study.candidates for seed in range(c.seeds)]
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
