"""The console script: what each command writes, returns and says, also to bad input and to Ctrl-C."""

import csv
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from console import assert_refused, files
from disk import full_disk

import efreg
from efreg import cli
from efreg.cli import training
from efreg.lab import checkpoints, engine, models

COMMANDS = ["inspect", "plan", "prune", "report", "train", "sweep", "demo", "env"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of one epoch."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "digits"
    line = "train --model resnet14 --alpha 1e-11 --epochs 1 --device cpu --out"
    assert cli.main([*line.split(), str(out)]) == 0
    return out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--law gravitation", ["law 'gravitation'", "electrostatic, gravity, torque"]),
        ("--model resnet57", ["model 'resnet57'", "resnet14", "did you mean"]),
        ("--model vgg19", ["vgg19 cannot take images of 1x8x8", "choose another --model"]),
        ("--dataset imagenet", ["data set 'imagenet'", "digits, mnist"]),
        ("--dataset cifar10", ["no cifar10 in data", "--data", "--download"]),
        ("--dataset mnist --data here", ["no mnist in here", "--data", "--download"]),
        ("--dataset imagefolder --data here", ["no folder here/train", "train/ and val/"]),
        ("--backend abacus", ["backend 'abacus'", "auto, triton, cuda, cpp, reference"]),
        ("--update slow", ["update 'slow'", "gradient, proximal"]),
        ("--schedule p3", ["schedule 'p3'", "constant, cosine, p1, p2"]),
        ("--alpha -1", ["alpha is -1.0", "not negative"]),
        ("--alpha -1e-12", ["alpha"]),
        ("--alpha=-1e-12", ["alpha is -1e-12", "not negative"]),
        ("--alpha nan", ["alpha is nan", "finite"]),
        ("--alpha much", ["--alpha", "'much'", "efreg train --help"]),
        ("--refresh 0", ["refresh is 0", "1 up"]),
        ("--ratios '[0, 0.5, 0.5, 0]'", ["4 ratios for ResNet, which takes 5"]),
        ("--ratios '[0, 0.5, 1.0, 0.5, 0]'", ["ratio 1.0 is outside [0, 1)"]),
        ("--ratios '[0, -0.1, 0.5, 0.5, 0]'", ["ratio -0.1 is outside [0, 1)"]),
        ("--ratio half", ["ratio 'half'", "[0, 1)"]),
        ("--ratio 0.5 --ratios '[0, 0.5, 0.5, 0.5, 0]'", ["one of ratios, ratio"]),
        ("--skip 4.0", ["blocks", "'4.0'", "3.1"]),
        ("--epochs 0", ["epochs is 0", "at least 1"]),
        ("--batch-size 0", ["batch_size is 0", "at least 1"]),
        ("--seed -1", ["seed is -1"]),
        ("--device abacus", ["device 'abacus'", "--device cpu"]),
        ("--weights none.pt", ["no file none.pt", "--weights"]),
        ("--colour red", ["--colour", "--help"]),
        ("--resume", ["no run in out", "--out", "--resume"]),
    ],
)
def test_bad_training_is_refused_at_once(arguments, parts, capsys, tmp_path):
    """One line with culprit and remedy, before anything is written."""
    model = [] if "--model" in arguments else ["--model", "resnet14"]
    assert_refused(capsys, ["train", "--out", "out", *model, *shlex.split(arguments)], *parts)
    assert files(tmp_path) == []


@pytest.mark.parametrize("arguments", ["", "paint", "prune", "report one.pt"])
def test_wrong_usage_is_refused_in_one_line(arguments, capsys):
    assert_refused(capsys, arguments.split(), "--help")


def test_a_run_is_not_overwritten(trained, capsys):
    before = (trained / "checkpoint.pt").read_bytes()
    parts = f"{trained / 'checkpoint.pt'} is there already", "--resume", "--out"
    assert_refused(capsys, ["train", "--model", "resnet14", "--out", trained], *parts)
    assert (trained / "checkpoint.pt").read_bytes() == before


@pytest.fixture(params=["prune", "sweep", "report", "train"])
def reading(request):
    """The arguments of each command that reads a checkpoint."""

    def arguments(path):
        if request.param == "train":
            return ["train", "--resume", "--out", path.parent]
        more = {"prune": ["--ratio", "0.5"], "sweep": [], "report": ["small.safetensors"]}[request.param]
        return [request.param, path, *more]

    return arguments


def test_checkpoints_that_are_none(reading, trained, tmp_path, capsys):
    """Missing, truncated, foreign: named, and nothing is written."""
    path = tmp_path / "run" / "checkpoint.pt"
    path.parent.mkdir()
    assert_refused(capsys, reading(path), path.parent)
    path.write_bytes((trained / "checkpoint.pt").read_bytes()[:5000])
    assert_refused(capsys, reading(path), f"{path} is damaged", "remove it and train anew")
    torch.save(models.resnet14().state_dict(), path)
    assert_refused(capsys, reading(path), f"{path} is no checkpoint of `efreg train`", "--weights")
    assert files(tmp_path) == ["run", "run/checkpoint.pt"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("", ["one of ratios, ratio, speedup (or params) and dead"]),
        ("--dead --ratio 0.5", ["one of ratios, ratio, speedup (or params) and dead"]),
        ("--ratio 0.5 --speedup 2", ["one of ratios, ratio, speedup (or params) and dead"]),
        ("--ratio 1", ["ratio 1 is outside [0, 1)"]),
        ("--ratios '[0, 0.5, 0]'", ["3 ratios for ResNet, which takes 5"]),
        ("--ratios '[0.5, 0.5, 0.5, 0.5, 0]'", ["first convolution", "must be 0"]),
        ("--speedup 1000", ["speedup of 1000.0 is out of reach", "at most"]),
        ("--ratio 0.5 --out none/small.safetensors", ["no folder none"]),
    ],
)
def test_bad_pruning_is_refused(arguments, parts, trained, tmp_path, capsys):
    before = files(trained)
    assert_refused(capsys, ["prune", trained / "checkpoint.pt", *shlex.split(arguments)], *parts)
    assert files(trained) == before
    assert files(tmp_path) == []


def test_a_report_on_what_is_not_pruned_is_refused(trained, tmp_path, capsys):
    checkpoint = trained / "checkpoint.pt"
    assert_refused(capsys, ["report", checkpoint, "none.safetensors"], "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    assert_refused(
        capsys, ["report", checkpoint, "bad.safetensors"], "bad.safetensors", "truncated or foreign"
    )
    efreg.save(models.resnet20(in_channels=1), "other.safetensors")
    assert_refused(capsys, ["report", checkpoint, "other.safetensors"], "other.safetensors", "network")


def test_a_sweep_of_other_data_is_refused(trained, tmp_path, capsys, monkeypatch):
    """Its data gone, or with another number of classes."""
    checkpoint = checkpoints.load(trained / "checkpoint.pt")
    weights = models.resnet14(7, 1).state_dict()
    checkpoints.save(checkpoints.Checkpoint(checkpoint.settings, 7, (1, 8, 8), weights), "seven.pt")
    assert_refused(capsys, ["sweep", "seven.pt", "--data", "here"], "7 classes", "here holds 10", "--data")
    settings = checkpoints.Settings(dataset="cifar10", model="resnet14", data="gone")
    weights = models.resnet14().state_dict()
    checkpoints.save(checkpoints.Checkpoint(settings, 10, (3, 32, 32), weights), "cifar.pt")
    assert_refused(capsys, ["sweep", "cifar.pt"], "no cifar10 in gone", "--data")
    assert_refused(capsys, ["sweep", "cifar.pt", "--data", "here"], "no cifar10 in here", "--data")
    assert files(tmp_path) == ["cifar.pt", "seven.pt"]


def test_a_bad_demo_is_refused(tmp_path, capsys):
    assert_refused(capsys, ["demo", "--seed", "-1"], "seed is -1")
    assert_refused(capsys, ["demo", "--epochs", "0"], "epochs is 0")
    assert files(tmp_path) == []
    (tmp_path / "file").touch()
    assert_refused(capsys, ["demo", "--out", "file"], "file")


def test_a_full_disk_ends_a_training_in_one_line(tmp_path, capsys):
    line = "train --model resnet14 --epochs 1 --device cpu --out out"
    with full_disk():
        assert_refused(capsys, line.split(), "cannot write out/checkpoint.pt (", "free space", "untouched")
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_an_error_of_many_lines_becomes_one(monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("cannot be had:\n    no compiler\n")

    monkeypatch.setattr(training, "train", fail)
    assert_refused(capsys, ["train"], "efreg: error: cannot be had: no compiler\n")


def test_verbose_shows_where_an_error_arose():
    with pytest.raises(ValueError, match="unknown law"):
        cli.main(["train", "-v", "--law", "gravitation"])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_is_understood(command, capsys):
    """Each line of the example is a command that the parser takes."""
    with pytest.raises(SystemExit) as error:
        cli.main([command, "--help"])
    assert error.value.code == 0
    _, _, example = capsys.readouterr().out.partition("example:\n")
    lines = example.splitlines()
    assert lines
    for line in lines:
        name, *arguments = shlex.split(line)
        assert name == "efreg"
        assert arguments[0] == command
        assert cli._parser().parse_args(arguments).command == command


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["--help"])
    assert error.value.code == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^ +{command} +\w", printed, re.MULTILINE) for command in COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["--version"])
    assert error.value.code == 0
    assert capsys.readouterr().out == f"efreg {efreg.__version__}\n"


def test_a_run_writes_what_it_says(trained):
    names = {name.split("/")[0] for name in files(trained)}
    assert {"checkpoint.pt", "log.csv", "tensorboard", "model.safetensors"} <= names
    checkpoint = checkpoints.load(trained / "checkpoint.pt")
    assert checkpoint.settings == checkpoints.Settings(model="resnet14", alpha=1e-11, epochs=1, device="cpu")
    whole = efreg.load(models.resnet14(in_channels=1), trained / "model.safetensors")
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in checkpoint.weights.items())


def test_every_option_reaches_the_settings(monkeypatch):
    seen = []
    monkeypatch.setattr(
        training, "train", lambda settings, out, **options: seen.append((settings, out, options))
    )
    line = (
        "train --dataset mnist --data here --download --model resnet32 --weights w.pt --law l1 --alpha 0.01 "
        "--refresh 3 --update proximal --backend reference --ratio 0.65 --skip 1.0 2.1 --schedule p2 "
        "--epochs 7 --lr 0.2 --batch-size 9 --weight-decay 5e-4 --seed 4 --device cpu --out there "
        "--scope filter --alpha-schedule cosine --alpha-until 0.5 --precision auto --channels-last "
        "--step compile --held-out 100 --coupled --nested 0 0.5 --distil t.pt"
    )
    assert cli.main(line.split()) == 0
    settings, out, options = seen[0]
    told = {"skip": list(settings.skip), "nested": list(settings.nested), "ratio": float(settings.ratio)}
    assert vars(settings) | told == {
        "dataset": "mnist",
        "data": "here",
        "model": "resnet32",
        "weights": "w.pt",
        "law": "l1",
        "alpha": 0.01,
        "alpha_schedule": "cosine",
        "alpha_until": 0.5,
        "scope": "filter",
        "refresh": 3,
        "update": "proximal",
        "backend": "reference",
        "ratio": 0.65,
        "ratios": None,
        "skip": ["1.0", "2.1"],
        "coupled": True,
        "nested": [0, 0.5],
        "distil": "t.pt",
        "schedule": "p2",
        "epochs": 7,
        "lr": 0.2,
        "batch_size": 9,
        "precision": "auto",
        "channels_last": True,
        "step": "compile",
        "held_out": 100,
        "weight_decay": 5e-4,
        "seed": 4,
        "device": "cpu",
    }
    assert out.name == "there"
    assert (options["download"], options["resume"]) == (True, False)
    assert cli.main(["train"]) == 0
    assert seen[1][0] == checkpoints.Settings()


def test_prune_takes_dead_filters_away(tmp_path, capsys, caplog):
    """Accuracy and outputs stay; without dead filters one line says so, and the copy is equal."""
    line = "train --model resnet14 --law ladder:power=4 --alpha 8 --scope filter --update proximal --epochs 3"
    assert cli.main([*line.split(), "--device", "cpu", "--out", "run"]) == 0
    assert cli.main(["prune", "run/checkpoint.pt", "--dead"]) == 0
    whole = engine.restore(checkpoints.load("run/checkpoint.pt"))
    small = efreg.load(models.resnet14(in_channels=1), "run/without-dead.safetensors").eval()
    assert efreg.macs(small, torch.zeros(1, 1, 8, 8)) < efreg.macs(whole, torch.zeros(1, 1, 8, 8))
    x = torch.randn(20, 1, 8, 8)
    torch.testing.assert_close(small(x), whole(x), rtol=1e-4, atol=1e-5)
    assert re.search(r"MACs +1,631,872 +[\d,]+ ", capsys.readouterr().out)


def test_prune_without_dead_filters_says_so(trained, caplog):
    assert cli.main(["prune", str(trained / "checkpoint.pt"), "--dead", "--out", "same.safetensors"]) == 0
    assert "ResNet has no dead filters to remove: the plan is empty" in caplog.messages
    same = efreg.load(models.resnet14(in_channels=1), "same.safetensors")
    whole = engine.restore(checkpoints.load(trained / "checkpoint.pt"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(same.state_dict().values(), whole.state_dict().values(), strict=True)
    )


def test_prune_and_report_need_no_data(trained, tmp_path, capsys, monkeypatch):
    """A checkpoint is enough; the report's MACs are those of the file that was written."""
    monkeypatch.setattr("efreg.lab.data.load", lambda *_, **__: pytest.fail("data was read"))
    checkpoint = str(trained / "checkpoint.pt")
    assert cli.main(["prune", checkpoint, "--ratio", "0.5", "--out", "small.safetensors"]) == 0
    assert "Written to small.safetensors" in capsys.readouterr().out
    assert files(tmp_path) == ["small.safetensors"]
    small = efreg.load(models.resnet14(in_channels=1), "small.safetensors")
    assert [small.get_submodule(f"layer{s}.0.conv1").out_channels for s in (1, 2, 3)] == [8, 16, 32]
    assert cli.main(["report", checkpoint, "small.safetensors"]) == 0
    whole, cut = (
        efreg.macs(model, torch.zeros(1, 1, 8, 8)) for model in (models.resnet14(in_channels=1), small)
    )
    assert re.search(rf"MACs +{whole:,} +{cut:,} +{whole / cut:.3f}", capsys.readouterr().out)


def test_a_pruned_network_is_trained_pruned_and_swept_again(trained, capsys):
    """Half of its half is a quarter, in the report too; the file that it started from is no longer needed."""
    checkpoint = str(trained / "checkpoint.pt")
    assert cli.main(["prune", checkpoint, "--ratio", "0.5", "--out", "half.safetensors"]) == 0
    line = "train --model resnet14 --weights half.safetensors --epochs 1 --device cpu --out again"
    assert cli.main(line.split()) == 0
    os.remove("half.safetensors")
    assert cli.main(["train", "--resume", "--out", "again"]) == 0
    assert cli.main(["prune", "again/checkpoint.pt", "--ratio", "0.5"]) == 0
    quarter = efreg.load(models.resnet14(in_channels=1), "again/pruned.safetensors")
    assert [quarter.get_submodule(f"layer{s}.0.conv1").out_channels for s in (1, 2, 3)] == [4, 8, 16]
    assert cli.main(["report", "again/checkpoint.pt", "again/pruned.safetensors"]) == 0
    half = engine.restore(checkpoints.load("again/checkpoint.pt"))
    counts = [efreg.macs(model, torch.zeros(1, 1, 8, 8)) for model in (half, quarter)]
    assert re.search(r"MACs +{:,} +{:,} ".format(*counts), capsys.readouterr().out)
    assert cli.main(["sweep", "again/checkpoint.pt"]) == 0


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ("--ratios '[0, 0.5, 0, 0.25, 0]'", [8, 32, 48]),
        ("--ratio 0.5 --skip 1.0 2.0", [16, 32, 32]),
    ],
)
def test_prune_removes_what_was_asked(arguments, left, trained):
    out = trained / "pruned.safetensors"
    assert cli.main(["prune", str(trained / "checkpoint.pt"), *shlex.split(arguments)]) == 0
    small = efreg.load(models.resnet14(in_channels=1), out)
    out.unlink()
    assert [small.get_submodule(f"layer{s}.0.conv1").out_channels for s in (1, 2, 3)] == left


def test_a_checkpoint_is_inspected_and_planned_too(trained, tmp_path, capsys):
    """Its ratios are the papers': each block's first convolution alone. A saved plan gives the same bits."""
    checkpoint = str(trained / "checkpoint.pt")
    assert cli.main(["inspect", checkpoint]) == 0
    assert capsys.readouterr().out.startswith("Inspection(ResNet: ")
    assert cli.main(["plan", checkpoint, "--ratio", "0.5", "--out", "plan.json"]) == 0
    names = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1)]
    assert list(efreg.Plan.load("plan.json")) == names
    assert cli.main(["prune", checkpoint, "--plan", "plan.json", "--out", "one.safetensors"]) == 0
    assert cli.main(["prune", checkpoint, "--ratio", "0.5", "--out", "other.safetensors"]) == 0
    assert files(tmp_path) == ["one.safetensors", "other.safetensors", "plan.json"]
    one, other = (safetensors.torch.load_file(f"{name}.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("option", ["--weights w.pt", "--input 1x8x8"])
def test_a_checkpoint_brings_all_along(option, trained, capsys):
    arguments = ["inspect", trained / "checkpoint.pt", *option.split()]
    assert_refused(capsys, arguments, "drop --weights and --input")


def test_prune_to_a_speedup(trained, capsys):
    assert (
        cli.main(["prune", str(trained / "checkpoint.pt"), "--speedup", "3", "--out", "small.safetensors"])
        == 0
    )
    speedup = re.search(r"MACs +[\d,]+ +[\d,]+ +([\d.]+)", capsys.readouterr().out)
    assert 3 <= float(speedup[1]) < 3.3


def test_a_sweep_shows_every_ratio(trained, tmp_path, capsys):
    """The first row is the network as it was trained; its accuracy is the log's."""
    from PIL import Image

    assert cli.main(["sweep", str(trained / "checkpoint.pt"), "--out", "swept", "--repair", "100"]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"\b{percent}\b", printed) for percent in range(0, 100, 10))
    with open("swept/sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(trained / "log.csv", newline="") as file:
        log = list(csv.DictReader(file))
    assert [row["ratio"] for row in rows] == [f"0.{tenth}" for tenth in range(10)]
    assert float(rows[0]["accuracy"]) == float(log[-1]["test_accuracy"])
    macs = [int(row["macs"]) for row in rows]
    assert macs == sorted(macs, reverse=True)
    assert float(rows[0]["repaired"]) == float(rows[0]["accuracy"])
    assert sum(float(row["repaired"]) > float(row["accuracy"]) for row in rows) > 5
    with Image.open("swept/sweep.png") as picture:
        assert picture.size[0] > 1000
        assert len(set(picture.convert("L").tobytes())) > 50


def test_the_paper_says_where_it_went(capsys):
    assert_refused(capsys, ["paper", "table4", "--only", "x"], "python -m bench.paper", "checkout")


def test_env_says_what_serves(capsys):
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    assert f"torch          {torch.__version__.split('+')[0]}" in printed
    assert re.search(r"reference +serves", printed)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "env"])
def test_without_the_lab_it_says_how_to_get_it(command, capsys, monkeypatch, tmp_path):
    """The library alone: every command but `env` names what is missing and the extra that brings it."""
    find = importlib.util.find_spec
    gone = ("sklearn", "tensorboard")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name in gone else find(name))
    more = {"report": ["x.pt", "y"], "train": [], "demo": []}.get(command, ["x.pt"])
    assert_refused(
        capsys, [command, *more], f"{command} needs sklearn, tensorboard", 'pip install "efreg[lab]"'
    )
    assert files(tmp_path) == []
    assert cli.main(["env"]) == 0


def test_env_needs_nothing_of_the_lab():
    """In a process where none of the lab's packages can be imported."""
    script = (
        "import sys\n"
        "from efreg import cli\n"
        "sys.modules.update(dict.fromkeys(cli.LAB))\n"
        "sys.exit(cli.main(['env']))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(efreg.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "serves" in done.stdout


def interrupting(step, at):
    count = iter(range(1000))

    def interrupted(*args):
        if next(count) == at:
            raise KeyboardInterrupt
        return step(*args)

    return interrupted


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    """130, and a line that a shell takes as it is: with it the run ends as if nothing had happened."""
    line = "train --model resnet14 --alpha 1e-11 --epochs 2 --batch-size 512 --device cpu"
    arguments = line.split()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", interrupting(engine.train_step, 4))
        assert cli.main([*arguments, "--out", "my run"]) == 130
    printed = capsys.readouterr().err
    going_on = re.fullmatch(r"efreg: interrupted; go on with: efreg (.*)\n", printed)
    assert shlex.split(going_on[1]) == ["train", "--resume", "--out", "my run"]
    assert checkpoints.load("my run/checkpoint.pt").epoch == 1
    assert cli.main(shlex.split(going_on[1])) == 0
    assert cli.main([*arguments, "--out", "whole"]) == 0
    found, expected = (checkpoints.load(f"{name}/checkpoint.pt") for name in ("my run", "whole"))
    assert found.epoch == expected.epoch == 2
    assert all(torch.equal(value, expected.weights[name]) for name, value in found.weights.items())


def test_ctrl_c_in_the_first_epoch(monkeypatch, capsys):
    """Nothing is promised that is not there, and the same command can be given again."""
    arguments = ["train", "--model", "resnet14", "--epochs", "1", "--batch-size", "512", "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_step", interrupting(engine.train_step, 1))
        assert cli.main(arguments) == 130
    assert capsys.readouterr().err == "efreg: interrupted; no epoch was done: start again\n"
    assert cli.main(arguments) == 0


@pytest.mark.parametrize("command", ["sweep", "prune"])
def test_ctrl_c_elsewhere(command, trained, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(efreg, "plan", interrupted)
    assert cli.main([command, str(trained / "checkpoint.pt")]) == 130
    assert capsys.readouterr().err == "efreg: interrupted\n"
