"""`efreg train`, killed at any moment and gone on with, ends with the bits of one that nobody killed."""

import importlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import efreg
from efreg import cli
from efreg.backends import native
from efreg.cli import training
from efreg.lab import checkpoints, data, models

KILLS = 20
LINE = "train --model small --law ladder --alpha 1e-3 --update proximal --refresh 2 --device cpu"
EPOCHS = 50
SIZES = f"--batch-size 64 --epochs {EPOCHS} --out"


class Small(nn.Sequential):
    def __init__(self, num_classes, in_channels):
        convolutions = [nn.Conv2d(in_channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)]
        super().__init__(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, num_classes))


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def begin(arguments, processes):
    """`efreg` with these arguments, in forks of this process, which has everything imported; their ids."""
    port, children = free_port(), []
    for rank in range(processes):
        if not (child := os.fork()):
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            os.environ.update({name: str(value) for name, value in told.items()})
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
            os._exit(cli.main(arguments.split()))
        children.append(child)
    return children


def ends(children):
    """How each of them ended."""
    return [os.waitpid(child, 0)[1] for child in children]


def _prepare():
    """What each fork would take seconds for."""
    importlib.import_module("torch.utils.tensorboard")

    native.load(native.CPP)
    data.load("digits")


def kill_often(folder, processes):
    """What a process of its own does: a training that is left alone, and `KILLS` that are killed, each once.

    A moment is any that a whole training lasts; one that comes too late is drawn anew.
    """
    os.chdir(folder)
    torch.set_num_threads(1)
    models.MODELS["small"] = Small
    _prepare()
    start = time.perf_counter()
    assert ends(begin(f"{LINE} {SIZES} whole", processes)) == [0] * processes
    lasts, dice, killed = time.perf_counter() - start, random.Random(0), 0
    for attempt in range(5 * KILLS):
        if killed == KILLS:
            break
        children = begin(f"{LINE} {SIZES} {attempt}", processes)
        time.sleep(dice.uniform(0, lasts))
        for child in dice.sample(children, processes):
            os.kill(child, signal.SIGKILL)
        if set(ends(children)) != {signal.SIGKILL}:
            continue
        killed += 1
        begun = Path(str(attempt), training.CHECKPOINT).exists()
        goes_on = f"train --resume --out {attempt}" if begun else f"{LINE} {SIZES} {attempt}"
        assert ends(begin(goes_on, processes)) == [0] * processes
        Path(str(attempt)).rename(f"{'gone on' if begun else 'begun anew'} {killed}")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_it_ends_with_the_same_bits(processes, tmp_path):
    sources = os.pathsep.join([str(Path(efreg.__file__).parents[1]), str(Path(__file__).parent)])
    command = f"import test_killed; test_killed.kill_often({str(tmp_path)!r}, {processes})"
    done = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": sources},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    runs = [*tmp_path.glob("gone on *"), *tmp_path.glob("begun anew *")]
    assert len(runs) == KILLS and len([run for run in runs if "gone on" in run.name]) > KILLS / 3
    expected = contents(tmp_path / "whole")
    for run in runs:
        assert_same_bits(contents(run), expected)


def contents(run):
    """All that a training leaves behind, but for the seconds that it took."""
    checkpoint = checkpoints.load(run / training.CHECKPOINT)
    rows = [{name: x for name, x in row.items() if name != "seconds"} for row in checkpoint.history]
    assert [row["epoch"] for row in rows] == [*range(1, EPOCHS + 1)]
    assert (run / "log.csv").read_text().count("\n") == EPOCHS + 1
    small = checkpoints.read(run / "model.safetensors")
    return [rows, checkpoint.weights, checkpoint.optimizer, checkpoint.force, small]


def assert_same_bits(found, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, (dict, list)):
        pairs = expected.items() if isinstance(expected, dict) else enumerate(expected)
        assert len(found) == len(expected)
        for key, value in pairs:
            assert_same_bits(found[key], value)
    else:
        assert found == expected
