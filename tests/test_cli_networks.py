"""The console script on any network: inspect, plan, prune and report."""

import importlib.util
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from console import assert_refused, files
from torch import nn

import efreg
from efreg import cli

NETWORKS = """
import torch
from torch import nn


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.numbers = nn.Linear(5, 8)
        self.last = nn.Linear(16, 2)

    def forward(self, image, numbers):
        return self.last(torch.cat([self.image(image), self.numbers(numbers).relu()], 1))


def small():
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU()),
        *(nn.Conv2d(16, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


class Slices(nn.Module):
    def __init__(self):
        super().__init__()
        self.widths = [6, 4]
        self.first = nn.Conv2d(3, 10, 3)
        self.parts = nn.ModuleList(nn.Conv2d(width, 2, 1) for width in self.widths)

    def forward(self, x):
        parts = self.first(x).relu().split(self.widths, 1)
        return torch.cat([one(part).mean((2, 3)) for one, part in zip(self.parts, parts)], 1)


def no_module():
    return 7


def failing():
    raise KeyError("oh")
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """With a module of networks, which is importable from there alone."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(NETWORKS)
    Path("broken.py").write_text("1 / 0")
    yield
    for name in ("mine", "broken"):
        sys.modules.pop(name, None)


def small():
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU()),
        *(nn.Conv2d(16, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


SMALL = ["mine:small", "--input", "3x8x8"]


def run(capsys, *arguments):
    """What a command that works prints."""
    assert cli.main([str(x) for x in arguments]) == 0
    return capsys.readouterr().out


def test_inspect_prints_what_the_library_says(capsys):
    expected = efreg.inspect(small(), torch.randn(2, 3, 8, 8))
    assert run(capsys, "inspect", *SMALL) == f"{expected}\n"


def test_plan_prints_and_writes_the_plan(capsys):
    printed = run(capsys, "plan", *SMALL, "--ratio", "0.5", "--out", "plan.json")
    plan = efreg.Plan.load("plan.json")
    assert {cut.name: cut.removed for cut in plan.cuts} == {"0": 6, "3": 8}
    assert printed == f"{plan}\nWritten to plan.json\n"
    assert run(capsys, "plan", *SMALL, "--ratio", "0.5") == f"{plan}\n"


@pytest.mark.parametrize(
    ("options", "cut"),
    [
        ("--ratio 0.5 --only 0", {"0": 6}),
        ("--ratio 0.5 --skip 0", {"3": 8}),
        ("--ratio 0.5 --uncoupled", {"3": 8}),
        ("--ratio 0.5 --round-to 4", {"0": 4, "3": 8}),
        ("--ratio 0.5 --max-ratio 0.25", {"0": 3, "3": 4}),
        ("--ratios [0:0.25,1:0.5]", {"0": 3, "3": 8}),
    ],
)
def test_options_reach_the_plan(options, cut, capsys):
    run(capsys, "plan", *SMALL, *options.split(), "--out", "plan.json")
    assert {c.name: c.removed for c in efreg.Plan.load("plan.json").cuts} == cut


@pytest.mark.parametrize(
    ("option", "figure", "target"), [("speedup", "speedup", 2), ("params", "compression", 3)]
)
def test_targets_are_reached(option, figure, target, capsys):
    run(capsys, "plan", *SMALL, f"--{option}", str(target), "--out", "plan.json")
    assert target <= getattr(efreg.Plan.load("plan.json"), figure) < 1.3 * target


def test_every_option_reaches_the_library(monkeypatch):
    seen = {}

    class Seen(Exception):
        pass

    def plan(model, **options):
        seen.update(options)
        raise Seen

    monkeypatch.setattr(efreg, "plan", plan)
    line = (
        "--speedup 2 --params 1.5 --only 0 3 --skip 1 --round-to 8 --ranking global --max-ratio 0.8 "
        "--importance l2 --approximate --dead --uncoupled --ratio 0.5 --ratios [0:0]"
    )
    with pytest.raises(Seen):
        cli.main(["prune", *SMALL, *line.split()])
    assert seen.pop("example_inputs").shape == (2, 3, 8, 8)
    assert seen == {
        "speedup": 2.0,
        "params": 1.5,
        "only": ["0", "3"],
        "skip": ["1"],
        "round_to": 8,
        "ranking": "global",
        "max_ratio": "0.8",
        "importance": "l2",
        "approximate": True,
        "dead": True,
        "coupled": False,
        "ratio": "0.5",
        "ratios": "[0:0]",
    }


def test_prune_writes_the_network_and_its_plan(capsys, tmp_path):
    """The file holds the given weights, of the filters that stay; report shows what prune did."""
    model = small()
    torch.save(model.state_dict(), "weights.pt")
    printed = run(capsys, "prune", *SMALL, "--weights", "weights.pt", "--ratio", "0.5")
    assert printed.endswith("Written to pruned.safetensors, plan.json\n")
    assert files(tmp_path) == ["broken.py", "mine.py", "plan.json", "pruned.safetensors", "weights.pt"]
    x = torch.randn(2, 3, 8, 8)
    plan = efreg.Plan.load("plan.json")
    expected = efreg.prune(model, plan, example_inputs=x).state_dict()
    found = efreg.load(small(), "pruned.safetensors").state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in found.items())
    counts = [efreg.macs(m, x[:1]) for m in (model, efreg.load(small(), "pruned.safetensors"))]
    figures = re.compile(r"MACs +{:,} +{:,} ".format(*counts))
    assert figures.search(printed)
    assert figures.search(run(capsys, "report", *SMALL, "--weights", "weights.pt", "pruned.safetensors"))


def test_prune_follows_a_saved_plan(capsys):
    run(capsys, "plan", *SMALL, "--ratio", "0.25", "--only", "3", "--out", "quarter.json")
    run(capsys, "prune", *SMALL, "--plan", "quarter.json", "--out", "small.safetensors")
    loaded = efreg.load(small(), "small.safetensors")
    assert (loaded[0].out_channels, loaded[3].out_channels) == (12, 12)
    assert efreg.Plan.load("plan.json") == efreg.Plan.load("quarter.json")


def test_a_pruned_network_is_pruned_again(capsys):
    """Numbers that no shape tells come along."""
    run(capsys, "prune", "mine:Slices", "--input", "3x8x8", "--ratio", "0.5")
    printed = run(capsys, "inspect", "mine:Slices", "--input", "3x8x8", "--weights", "pruned.safetensors")
    assert printed.startswith("Inspection(Slices: 5 units")
    run(capsys, "prune", *SMALL, "--ratio", "0.5")
    run(
        capsys,
        "prune",
        *SMALL,
        "--weights",
        "pruned.safetensors",
        "--ratio",
        "0.5",
        "--out",
        "again.safetensors",
    )
    assert efreg.load(small(), "again.safetensors")[3].out_channels == 4


def test_weights_of_others(capsys):
    """safetensors that efreg did not write, and a checkpoint that holds a state dict."""
    model = small()
    safetensors.torch.save_file(model.state_dict(), "weights.safetensors")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, "weights.pt")
    for name in ("weights.safetensors", "weights.pt"):
        run(capsys, "prune", *SMALL, "--weights", name, "--ratio", "0.5", "--only", "0")
        found = efreg.load(small(), "pruned.safetensors")
        assert torch.equal(found[5].weight, model[5].weight), name


def test_several_inputs(capsys):
    printed = run(capsys, "inspect", "mine:Two", "--input", "3x8x8", "--input", "5")
    assert printed.startswith("Inspection(Two: 16 units in 2 groups")


@pytest.mark.parametrize(
    ("name", "shape"), [("torchvision:squeezenet1_1", "3x64x64"), ("timm:mobilenetv3_small_050", "3x64x64")]
)
def test_networks_by_name(name, shape, capsys):
    pytest.importorskip(name.partition(":")[0])
    printed = run(capsys, "plan", name, "--input", shape, "--ratio", "0.5")
    assert float(re.search(r"MACs ([\d.]+)×", printed)[1]) > 2.5


def test_a_network_has_its_own_input():
    """timm's say so; others are taken to be of ImageNet's size. Nothing is downloaded."""
    pytest.importorskip("timm")
    from efreg.cli.models import subject

    assert subject("timm:test_efficientnet", None, None).inputs.shape == (2, 3, 160, 160)
    assert subject("mine:small", None, None).inputs.shape == (2, 3, 224, 224)
    assert [x.shape for x in subject("mine:Two", None, [(3, 8, 8), (5,)]).inputs] == [(2, 3, 8, 8), (2, 5)]


def test_networks_without_weights_are_the_same_each_time():
    from efreg.cli.models import built

    one, other = (built("torchvision:squeezenet1_1").state_dict() for _ in range(2))
    assert all(torch.equal(t, other[n]) for n, t in one.items())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("resnet50", ["unknown network 'resnet50'", "torchvision:NAME", "package.module:function"]),
        ("torchvision:resnet5", ["torchvision has no model 'resnet5'", "resnet50"]),
        ("timm:efficientnet", ["timm has no model 'efficientnet'", "efficientnet"]),
        ("nowhere:small", ["there is no nowhere:small", "No module named 'nowhere'"]),
        ("mine:large", ["there is no mine:large"]),
        ("mine:no_module", ["mine:no_module gives a int", "torch.nn.Module"]),
        ("mine:failing", ["mine:failing() fails (KeyError('oh'))", "without arguments"]),
        ("broken:small", ["broken cannot be imported (ZeroDivisionError"]),
        ("mine:small --input 3x8y8", ["'3x8y8' is no shape", "3x224x224"]),
        ("mine:small --input 3x0x8", ["'3x0x8' is no shape"]),
        ("mine:small --input 4x8x8", ["cannot take example_inputs of shape (2, 4, 8, 8)"]),
        ("mine:Two --input 3x8x8", ["Two cannot take example_inputs"]),
        ("mine:small --weights none.pt", ["no file none.pt", "--weights"]),
        ("mine:small --weights mine.py", ["mine.py is damaged, or is no file of tensors alone"]),
    ],
)
def test_bad_networks_are_refused_in_one_line(arguments, parts, capsys, tmp_path):
    before = files(tmp_path)
    assert_refused(capsys, ["prune", *arguments.split(), "--ratio", "0.5"], *parts)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("", ["give one of ratios, ratio, speedup"]),
        ("--ratio 2", ["ratio 2 is outside [0, 1)"]),
        ("--ratio 0.5 --skip nobody", ["skip names 'nobody'"]),
        ("--ratio 0.5 --round-to 64", ["round_to=64 is more than the units"]),
        ("--ratio 0.5 --importance age", ["unknown importance 'age'", "l1, l2"]),
        ("--speedup 1000", ["speedup of 1000.0 is out of reach"]),
        ("--plan none.json", ["none.json"]),
        ("--plan mine.py", ["mine.py is no plan that efreg has saved"]),
        ("--plan plan.json --ratio 0.5 --round-to 4", ["drop --ratio and --round-to"]),
        ("--ratio 0.5 --out none/small.safetensors", ["no folder none"]),
    ],
)
def test_bad_plans_are_refused_in_one_line(options, parts, capsys, tmp_path):
    before = files(tmp_path)
    assert_refused(capsys, ["prune", *SMALL, *options.split()], *parts)
    assert files(tmp_path) == before


def test_weights_that_do_not_fit_are_refused(capsys):
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1)).state_dict(), "weights.pt")
    assert_refused(capsys, ["inspect", *SMALL, "--weights", "weights.pt"], "the state dict lacks 1.bias")


def test_a_pickle_that_is_more_than_weights_is_refused(capsys):
    """Nothing in it is run."""
    torch.save(small(), "model.pt")
    Path("evil.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("model.pt", "evil.pt"):
        arguments = ["inspect", *SMALL, "--weights", name]
        assert_refused(capsys, arguments, name, "no file of tensors alone", "model.state_dict()")
    assert not Path("touched").exists()


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_a_plan_of_another_network_is_refused(capsys):
    run(
        capsys, "plan", "mine:Two", "--input", "3x8x8", "--input", "5", "--ratio", "0.5", "--out", "plan.json"
    )
    assert_refused(capsys, ["prune", *SMALL, "--plan", "plan.json"], "the plan is of another model")


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_missing_package_is_named(package, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == package else find(name))
    assert_refused(
        capsys, ["inspect", f"{package}:resnet18"], f"{package} is not installed: pip install {package}"
    )


@pytest.mark.slow
def test_the_library_is_enough():
    """In a process where none of the lab's packages can be imported."""
    script = (
        "import sys\n"
        "from efreg import cli\n"
        "sys.modules.update(dict.fromkeys((*cli.LAB, 'timm')))\n"
        "sys.exit(cli.main(['prune', 'mine:small', '--input', '3x8x8', '--ratio', '0.5']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Written to pruned.safetensors, plan.json" in done.stdout
