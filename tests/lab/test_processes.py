"""Training in two processes is the training of one: the same batches, losses, weights, and one who writes."""

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from rich.console import Console
from torch import nn

import efreg
from efreg.cli import training
from efreg.lab import checkpoints, data, distributed, engine, models
from efreg.lab.checkpoints import Settings
from efreg.lab.data import Part

PLAIN = Settings(model="plain", alpha=1e-10, epochs=2, batch_size=64, lr=0.05, device="cpu")
"""Of 169 images: batches of 64, 64 and 41, which two processes share as 20 and 21."""

LADDER = {"law": "ladder", "alpha": 1e-3, "scope": "filter", "update": "proximal", "refresh": 1}
CASES = {
    "paper": PLAIN,
    "ladder": replace(PLAIN, **LADDER),
    "held out": replace(PLAIN, held_out=41),
    "fade": replace(PLAIN, law="fade", alpha=0.0, alpha_until=0.5),
    "nested": replace(PLAIN, alpha=0.0, nested=(0, 0.3, 0.5, 0.7)),
    "compiled": replace(PLAIN, step="compile", epochs=1),
    "folders": replace(PLAIN, dataset="imagefolder", data="images", batch_size=4),
    "batch norm": replace(PLAIN, model="normed"),
}
BAD = {
    "2 processes cannot share a batch of 63 evenly: choose another --batch-size": {"batch_size": 63},
    "the last batch of an epoch has 1 image for 2 processes: choose another --batch": {"batch_size": 56},
    "a CUDA graph cannot be had with 2 processes: use --step compile": {"step": "graph"},
}


class Plain(nn.Sequential):
    """A network in float64 whose images do not see each other."""

    def __init__(self, num_classes, in_channels):
        convolutions = [nn.Conv2d(in_channels, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)]
        super().__init__(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, num_classes))
        self.double()

    def forward(self, images):
        return super().forward(images.double())


class Normed(Plain):
    """One whose images do."""

    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.insert(1, nn.BatchNorm2d(6).double())


def every_eighth_digit(load=data._load_digits):
    return [(images[::8].clone(), labels[::8].clone()) for images, labels in load()]


def prepare(folder):
    """This process trains on few digits, knows the networks above, and works in `folder`."""
    torch.set_num_threads(1)
    models.MODELS.update(plain=Plain, normed=Normed)
    data._load_digits = every_eighth_digit
    os.chdir(folder)


def write_images(count):
    """Noise in two classes, in the folder `images`."""
    for part, i in ((part, i) for part in ("train", "val") for i in range(count)):
        path = Path("images", part, ("apple", "pear")[i % 2], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def trained(settings):
    run = engine.Run(settings)
    return without_times(run.epochs()), run.model.state_dict()


def resumed(settings):
    """Of a run that goes on after its first epoch."""
    first = engine.Run(settings)
    next(first.epochs())
    if not dist.get_rank():
        checkpoints.save(first.checkpoint(), "x.pt")
    dist.barrier()
    second = engine.Run(settings, checkpoints.load("x.pt"))
    return without_times([*first.history, *second.epochs()]), second.model.state_dict()


def complaint(settings):
    """What is said of settings that cannot be had."""
    with pytest.raises(ValueError) as error:
        engine.step_of(settings, torch.device("cuda"))
        engine.Run(settings)
    return str(error.value)


def recorded(settings):
    """What one process prints while it trains, and goes on with what is done already."""
    printed = io.StringIO()
    training.train(settings, "run", console=Console(file=printed))
    dist.barrier()
    training.train(None, "run", resume=True, console=Console(file=printed))
    return printed.getvalue()


def work(rank, folder):
    """All that two processes do, into a file of each rank."""
    prepare(folder)
    torch.multiprocessing.set_start_method("fork", force=True)  # of loaders: as under torchrun, and quicker
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {name: trained(settings) for name, settings in CASES.items()}
    found["seed"] = torch.initial_seed()
    found["resumed"] = resumed(CASES["batch norm"])
    found["complaints"] = [complaint(replace(PLAIN, **changes)) for changes in BAD.values()]
    found["recorded"] = recorded(PLAIN)
    with distributed.first_alone():
        found["waited"] = Path("first").exists()
        Path("first").touch()
    torch.save(found, f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes work; this one too."""
    before, digits, known = os.getcwd(), data._load_digits, dict(models.MODELS)
    folder = tmp_path_factory.mktemp("processes")
    prepare(folder)
    write_images(7)
    yield folder
    os.chdir(before)
    data._load_digits = digits
    models.MODELS.clear()
    models.MODELS.update(known)


@pytest.fixture(scope="module")
def both(folder):
    """What each of the two processes found."""
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_equal(some, others):
    assert some[0] == others[0]
    assert all(torch.equal(some[1][name], weight) for name, weight in others[1].items())


@pytest.mark.parametrize("name", [name for name in CASES if name != "batch norm"])
@pytest.mark.slow
def test_two_processes_train_as_one(name, both):
    """Also where the last batch does not divide, and where crops and flips are random; only sums are made
    in another order, in float64.
    """
    rows, weights = trained(replace(CASES[name], step="eager"))
    for row, other in zip(both[0][name][0], rows, strict=True):
        assert row == pytest.approx(other, rel=1e-9)
    for key, weight in weights.items():
        torch.testing.assert_close(both[0][name][1][key], weight, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_both_processes_hold_the_same(name, both):
    """To the bit, also the statistics of batch norms, which are those of the first."""
    assert_equal(both[0][name], both[1][name])


def test_two_processes_go_on_to_the_same_bits(both):
    for found in both:
        assert_equal(found["resumed"], found["batch norm"])


def test_batches_that_cannot_be_shared(both):
    for found in both:
        assert all(said.startswith(start) for said, start in zip(found["complaints"], BAD, strict=True))


def test_one_of_two_prints_and_writes(both, folder):
    """The bare network, under its own names."""
    assert both[0]["recorded"].count("Written to run") == 2
    assert both[1]["recorded"] == ""
    checkpoint = checkpoints.load(folder / "run" / "checkpoint.pt")
    assert_equal((without_times(checkpoint.history), checkpoint.weights), both[0]["paper"])
    assert (folder / "run" / "log.csv").read_text().count("\n") == 3


def test_the_first_goes_before_the_others(both):
    """As it must where something is fetched."""
    assert [found["waited"] for found in both] == [False, True]


def test_each_process_drops_out_by_random_numbers_of_its_own(both):
    assert both[1]["seed"] == both[0]["seed"] + 1


@pytest.mark.parametrize("length, processes", [(10, 1), (10, 2), (7, 3), (2, 3), (0, 2)])
def test_parts_are_everything_once(length, processes):
    parts = [Part(rank, processes).of(range(length)) for rank in range(processes)]
    assert [x for part in parts for x in part] == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("name, count", [("digits", 57), ("imagefolder", 7)])
def test_each_process_evaluates_its_part(name, count, folder):
    """Together they see every image once, in the stored order."""
    images = data.load(name, "images").test
    parts = [batch for rank in range(2) for batch in images.share(Part(rank, 2)).batches(5)]
    found, expected = ([torch.cat(x) for x in zip(*y, strict=True)] for y in (parts, images.batches(5)))
    assert len(found[1]) == count
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with (
        pytest.raises(
            ValueError, match="no GPU for process 1, there are 1: give torchrun --nproc-per-node 1"
        ),
        distributed.processes("auto"),
    ):
        pass


def torchrun(folder, *arguments):
    sources = str(Path(efreg.__file__).parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "efreg", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": sources},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_torchrun_trains_and_goes_on(tmp_path):
    """One of the processes prints and writes."""
    line = "train --model resnet14 --batch-size 256 --epochs 1 --device cpu --out run"
    found = torchrun(tmp_path, *line.split())
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("Written to run") == 1
    names = {"checkpoint.pt", "log.csv", "model.safetensors", "tensorboard"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    checkpoint = checkpoints.load(tmp_path / "run" / "checkpoint.pt")
    assert checkpoint.epoch == 1
    assert (
        engine.restore(checkpoint).state_dict().keys() == models.resnet14(in_channels=1).state_dict().keys()
    )
    again = torchrun(tmp_path, "train", "--resume", "--out", "run")
    assert (again.returncode, again.stdout.count("Written to run")) == (0, 1), again.stderr


def test_torchrun_says_what_is_wrong(tmp_path):
    found = torchrun(tmp_path, "train", "--batch-size", "63", "--device", "cpu")
    assert found.returncode != 0
    assert "efreg: error: 2 processes cannot share a batch of 63 evenly" in found.stderr
    assert list(tmp_path.iterdir()) == []
