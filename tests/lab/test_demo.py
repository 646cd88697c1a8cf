"""The demo and the sweep: what is shown is what was measured, and a second run shows the same."""

import csv
import io
from dataclasses import replace
from math import isnan

import pytest
import torch
from networks import assert_same, lively, snapshot
from PIL import Image
from rich.console import Console

import efreg
from efreg.lab import data, demo, engine, models, sweep
from efreg.lab.sweep import Cut

NAMES = [
    "no force",
    "L1",
    "electrostatic, each step",
    "electrostatic, proximal",
    "electrostatic, once",
    "L1, whole filter",
    "electrostatic, whole filter",
    "ladder, whole filter",
    "fade, 70 %, whole filter",
]
RATIOS = (0.0, 0.5, 0.9)
STEMS = [name.lower().replace(" %", "").replace(", ", "-").replace(" ", "-") for name in NAMES]


pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A short demo's folder, what it printed, and what it returned."""
    return run(tmp_path_factory.mktemp("demo") / "out")


def run(out, seed=0):
    torch.set_num_threads(1)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "START_EPOCHS", 2)
        patch.setattr(demo, "TIMED_STEPS", 3)
        patch.setattr(demo, "RATIOS", RATIOS)
        sweeps = demo.run(out, seed=seed, epochs=1, console=Console(file=printed, width=100))
    return out, printed.getvalue(), sweeps


def table(out):
    with open(out / "demo.csv", newline="") as file:
        return list(csv.DictReader(file))


def cuts(*accuracies, recalibrated=None):
    """A cut at each ratio, with these accuracies."""
    recalibrated = accuracies if recalibrated is None else recalibrated
    return [Cut(*row, 100, 10) for row in zip(sweep.RATIOS, accuracies, recalibrated, strict=True)]


def resnet():
    return models.resnet14(in_channels=1)


def test_the_table_has_every_force_at_every_ratio(shown):
    out, printed, sweeps = shown
    rows = table(out)
    assert [(row["force"], row["ratio"]) for row in rows] == [
        (name, str(ratio)) for name in NAMES for ratio in RATIOS
    ]
    assert list(sweeps) == NAMES
    for row, cut in zip(rows, (cut for found in sweeps.values() for cut in found), strict=True):
        found = {name: float(row[name]) for name in vars(cut)}
        assert isnan(found.pop("repaired")) == (row["force"] != "no force")
        assert found == {name: value for name, value in vars(cut).items() if name != "repaired"}
        assert float(row["step_time"]) > 0
    assert {row["step_time"] for row in rows if row["force"] == "no force"} == {"1.0"}
    shown_table = printed.partition("Accuracy in %")[2].partition("Half of the filters")[0]
    lines = [line.strip() for line in shown_table.splitlines()]
    for name in NAMES:
        right_after, re_estimated, *repaired = (
            line.split()[-len(RATIOS) :] for line in lines if line.startswith(f"{name} ")
        )
        assert right_after == [f"{cut.accuracy:.0f}" for cut in sweeps[name]]
        assert re_estimated == [f"{cut.recalibrated:.0f}" for cut in sweeps[name]]
        own = [f"{cut.repaired:.0f}" for cut in sweeps[name]]
        assert repaired == ([own] if name == "no force" else [])


def without_times(out):
    return [{name: value for name, value in row.items() if name != "step_time"} for row in table(out)]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_table(shown, tmp_path):
    """Apart from times."""
    assert without_times(run(tmp_path)[0]) == without_times(shown[0])


@pytest.mark.slow
def test_another_seed_gives_another_table(shown, tmp_path):
    assert without_times(run(tmp_path, seed=1)[0]) != without_times(shown[0])


def test_the_forces_differ(shown):
    """Each way of training on gives weights of its own, from the same start."""
    weights = [
        efreg.load(resnet(), shown[0] / "models" / f"{stem}.safetensors").state_dict() for stem in STEMS
    ]
    for i, one in enumerate(weights):
        for other in weights[:i]:
            assert not torch.equal(one["layer1.0.conv1.weight"], other["layer1.0.conv1.weight"])


@pytest.mark.parametrize(("name", "stem"), list(zip(NAMES, STEMS, strict=True)))
def test_the_models_have_the_accuracy_of_the_table(name, stem, shown):
    """Whole, and without half of the filters."""
    out, _, sweeps = shown
    test = data.load("digits").test
    for suffix, cut, left in (("", sweeps[name][0], 16), ("-half", sweeps[name][RATIOS.index(0.5)], 8)):
        model = efreg.load(resnet(), out / "models" / f"{stem}{suffix}.safetensors")
        assert engine.evaluate(model, test)[1] == cut.accuracy
        assert efreg.macs(model, torch.zeros(1, 1, 8, 8)) == cut.macs
        assert sum(p.numel() for p in model.parameters()) == cut.parameters
        assert model.layer1[0].conv1.out_channels == left


def test_the_picture_is_one(shown):
    """Two panels with a curve of each colour."""
    colors_of_all = {force.look.color for force in demo.CONTENDERS}
    with Image.open(shown[0] / "demo.png") as picture:
        assert picture.format == "PNG"
        assert picture.size[0] >= 1500
        assert picture.size[1] >= 700
        picture = picture.convert("RGB")
    for half in (0, 1):
        width, height = picture.size
        panel = picture.crop((half * width // 2, int(0.3 * height), (half + 1) * width // 2, height))
        colors = {color for _, color in panel.getcolors(1 << 24)}
        assert all(tuple(bytes.fromhex(color[1:])) in colors for color in colors_of_all)


def test_it_says_what_it_wrote_and_found(shown):
    out, printed, sweeps = shown
    text = " ".join(printed.split())
    assert f"Written to {out}: report.html, demo.png, demo.csv, models/".replace(" ", "") in text.replace(
        " ", ""
    )
    for sentence in demo.findings(sweeps, 113):
        assert sentence in text
    assert sorted(path.name for path in out.iterdir()) == ["demo.csv", "demo.png", "models", "report.html"]
    assert len(list((out / "models").iterdir())) == 2 * len(NAMES)


def test_findings_where_a_force_is_best():
    """The best at half of the filters beside L1 and no force; nothing on L1 where it is nowhere better."""
    sweeps = {
        "no force": cuts(98, 97, 96, 95, 90, 70, 50, 20, 10, 10),
        "L1": cuts(98, 97, 96, 95, 91, 80, 60, 20, 10, 10),
        "electrostatic, once": cuts(98, 97, 96, 96, 95, 93.25, 60, 20, 10, 10),
    }
    assert demo.findings(sweeps, 450) == [
        "Half of the filters gone: 93.2 % with electrostatic, once, 80.0 % with L1, 70.0 % with no force. "
        "One seed, 450 test images."
    ]


def test_findings_where_l1_is_best():
    """It says so, and at which ratios L1 does better than each force; no force is not compared."""
    sweeps = {
        "no force": cuts(*10 * [10]),
        "L1": cuts(98, 97, 96, 95, 94, 93, 60, 20, 10, 10),
        "electrostatic, once": cuts(99, 97, 95, 95, 95, 80, 60, 20, 10, 9),
        "electrostatic, proximal": cuts(*10 * [99], recalibrated=[98, 97, 96, 95, 94, 93, 60, 20, 9, 10]),
    }
    sweeps["electrostatic, proximal"][5] = Cut(0.5, 92, 93, 100, 10)
    assert demo.findings(sweeps, 7) == [
        "Half of the filters gone: 93.0 % with L1, 10.0 % with no force. One seed, 7 test images.",
        "L1 does better than electrostatic, once at 20 %, 50 %, 90 %, right after pruning.",
        "L1 does better than electrostatic, once at 20 %, 50 %, 90 %, batch-norm statistics re-estimated.",
        "L1 does better than electrostatic, proximal at 50 %, right after pruning.",
        "L1 does better than electrostatic, proximal at 80 %, batch-norm statistics re-estimated.",
    ]


def test_findings_on_the_whole_filter():
    """What acts on the whole filter is held against L1 on the whole filter."""
    sweeps = {
        "no force": cuts(*10 * [10]),
        "L1": cuts(*10 * [99]),
        "L1, whole filter": cuts(*10 * [50]),
        "ladder, whole filter": cuts(98, *9 * [40]),
    }
    every = ", ".join(f"{tenth}0 %" for tenth in range(1, 10))
    better = f"L1, whole filter does better than ladder, whole filter at {every}"
    assert demo.findings(sweeps, 7)[1:] == [
        f"{better}, right after pruning.",
        f"{better}, batch-norm statistics re-estimated.",
    ]


def test_findings_where_nothing_beats_no_force():
    sweeps = {name: cuts(*10 * [percent]) for name, percent in (("no force", 90), ("L1", 50), ("x", 60))}
    assert demo.findings(sweeps, 450)[0].startswith(
        "Half of the filters gone: 90.0 % with no force, 50.0 % with L1."
    )


@pytest.fixture(scope="module")
def swept():
    """A network with the numbers of a trained one, digits, and its sweep at three ratios."""
    torch.manual_seed(0)
    model, digits = lively(resnet()), data.load("digits")
    model.layer2.eval()
    before = snapshot(model)
    found = sweep.sweep(model, digits, ratios=(0.0, 0.5, 0.9))
    return model, digits, before, found


def test_a_sweep_leaves_the_network_as_it_was(swept):
    model, _, before, _ = swept
    assert_same(before, snapshot(model))


def test_a_sweep_cuts_the_whole_network_each_time(swept):
    """Accuracy and size at each ratio are those of a network pruned by hand."""
    model, digits, _, found = swept
    example = torch.zeros(2, 1, 8, 8)
    for cut in found:
        small = efreg.prune(
            model,
            efreg.plan(model, ratio=cut.ratio, coupled=False, example_inputs=example),
            example_inputs=example,
        )
        assert cut.accuracy == engine.evaluate(small, digits.test)[1]
        assert cut.macs == efreg.macs(small, example[:1])
        assert cut.parameters == sum(p.numel() for p in small.parameters())


def test_a_sweep_re_estimates_statistics_on_training_images(swept):
    """Means and variances of them all, by one pass in training mode. The test images lie elsewhere."""
    model, digits, _, _ = swept
    images = torch.cat([batch for batch, _ in digits.train.batches(500)])
    example = images[:2]
    elsewhere = data.InMemory(replace(digits.info, mean=(0.9,), std=(0.1,)), *data._load_digits()[1])
    digits = digits._replace(test=elsewhere)
    found = sweep.sweep(model, digits, ratios=(0.0, 0.3, 0.5))
    for cut in found:
        small = efreg.prune(
            model,
            efreg.plan(model, ratio=cut.ratio, coupled=False, example_inputs=example),
            example_inputs=example,
        )
        for module in small.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            small.train()(images)
        assert abs(cut.recalibrated - engine.evaluate(small, digits.test)[1]) <= 100 * 3 / 113
    assert any(cut.recalibrated != cut.accuracy for cut in found)


def test_a_sweep_computes_in_its_dtype(swept, monkeypatch):
    """Statistics are re-estimated (in training mode) in the arithmetic of the evaluation."""
    model, digits, _, _ = swept
    seen, recalibrate = set(), efreg.recalibrate

    def seeing(network, batches):
        network.conv1.register_forward_hook(lambda conv, _, output: seen.add((conv.training, output.dtype)))
        return recalibrate(network, batches)

    monkeypatch.setattr(efreg, "recalibrate", seeing)
    sweep.sweep(model, digits, ratios=(0.0,), dtype=torch.bfloat16)
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}


def test_blocks_left_alone_stay_whole(swept):
    model, digits, _, _ = swept
    (some,) = sweep.sweep(model, digits, planning={"coupled": False, "skip": ("1.0", "1.1")}, ratios=(0.5,))
    (every,) = sweep.sweep(model, digits, ratios=(0.5,))
    assert some.parameters - every.parameters == 2 * (2 * 8 * 16 * 9 + 2 * 8)


def test_ticks_count_the_ratios(swept):
    model, digits, _, _ = swept
    ticks = []
    sweep.sweep(model, digits, ratios=(0.1, 0.2), tick=lambda: ticks.append(1))
    assert len(ticks) == 2


def test_the_table_shows_what_is_left():
    """Accuracies, then those with re-estimated statistics, then what is left of MACs and parameters."""
    found = [Cut(0.0, 97.6, 98.4, 1000, 500), Cut(0.5, 61.4, 92.5, 500, 200)]
    printed = io.StringIO()
    Console(file=printed, width=100).print(
        sweep.accuracy_table({"a": found, "b": found[:1] * 2}, {"a": 1.02, "b": 1})
    )
    lines = [line.split() for line in printed.getvalue().splitlines() if line.strip()]
    assert ["right", "after", "pruning", "step", "0", "50"] in lines
    assert ["a", "1.02", "98", "61"] in lines
    assert ["b", "1.00", "98", "98"] in lines
    assert ["a", "98", "92"] in lines
    assert ["MACs", "left,", "%", "100", "50"] in lines
    assert ["parameters", "left,", "%", "100", "40"] in lines
