"""A page to look at, read back as a browser shows it: its figures are those of the networks."""

import csv
import importlib.util
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from console import assert_refused
from rich.console import Console
from torch import nn

import efreg
from efreg import cli
from efreg.cli import training
from efreg.lab import models
from efreg.lab.checkpoints import Settings

RESNET = ["efreg.lab.models:resnet14", "--input", "3x8x8"]

TELEPHONE, SCREEN = {"width": 390, "height": 844}, {"width": 1280, "height": 844}

TEXTS = "selector => [...document.querySelectorAll(selector)].map(found => found.textContent)"
ROWS = "table => [...document.querySelector(table).rows].map(row => [...row.cells].map(x => x.textContent))"
LENGTHS = (
    "fill => [...document.querySelectorAll(`#widths path[style*='${fill}']`)].map(x => x.getBBox().width)"
)
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


class Shown:
    """A page in a browser."""

    def __init__(self, page):
        self.page = page

    def texts(self, selector):
        return self.page.evaluate(TEXTS, selector)

    def table(self, name):
        """The rows, the header first."""
        return self.page.evaluate(ROWS, f"#{name}")

    def bars(self, name):
        """The name and the numbers above each bar."""
        texts = self.texts(f"#{name} svg text")
        return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.fixture
def show(browser):
    """Opens a file on a telephone: nothing is asked for elsewhere, nothing fails, nothing sticks out."""

    def shown(path):
        page, asked, errors = browser.new_page(viewport=TELEPHONE), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(Path(path).resolve().as_uri(), wait_until="networkidle")
        assert {url for url in asked if not url.startswith("data:")} == {Path(path).resolve().as_uri()}
        assert errors == []
        for size in (SCREEN, TELEPHONE):
            page.set_viewport_size(size)
            assert page.evaluate(OVERFLOW) <= 0
        return Shown(page)

    return shown


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0


def costs(model, x):
    """By hand, of each layer: MACs of convolutions and linear layers, and how many numbers it trains."""
    found = {}

    def see(name, module, output):
        multiplied = isinstance(module, (nn.Conv2d, nn.Linear))
        macs = output.numel() * module.weight[0].numel() if multiplied else 0
        found[name] = macs, sum(p.numel() for p in module.parameters())

    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda m, _, output, name=name: see(name, m, output))
    model.eval()(x)
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def shares(sides, part):
    """What stands above the bars: of each layer the share of all; those under 0.1 % together."""
    total = sum(cost[part] for cost in sides[0].values())
    found = {name: [100 * side[name][part] / total for side in sides] for name in sides[0]}
    small = [values for values in found.values() if 0 < max(values) < 0.1]
    shown = [(name, values) for name, values in found.items() if max(values) >= 0.1]
    if small:
        shown.append((f"{len(small)} smaller", [sum(side) for side in zip(*small, strict=True)]))
    return [(name, " → ".join(f"{x:.1f} %" for x in values)) for name, values in shown]


def test_inspect_writes_a_page(show, capsys):
    run("inspect", *RESNET, "--html", "report.html")
    assert capsys.readouterr().out.endswith("Written to report.html\n")
    x, page = torch.randn(2, 3, 8, 8), show("report.html")
    found, by_hand = efreg.inspect(models.resnet14(), x), costs(models.resnet14(), x)
    assert page.bars("widths") == [(group.name, str(group.size)) for group in found.groups]
    assert [row[:3] for row in page.table("groups")[1:]] == [
        [group.name, ", ".join(group.writers), ", ".join(group.readers)] for group in found.groups
    ]
    assert ["MACs", f"{sum(macs for macs, _ in by_hand.values()):,}"] in page.table("totals")
    assert page.table("layers")[1:] == [[name, f"{m:,}", f"{p:,}"] for name, (m, p) in by_hand.items()]
    for part, name in enumerate(("macs", "parameters")):
        assert page.bars(name) == shares([by_hand], part)
    reasons = dict(zip(page.texts("#reasons dt"), page.texts("#reasons dd"), strict=True))
    assert reasons.keys() == {x.reason for x in found.frozen}
    assert all(f"{x.name} ({x.count} of {x.rows} rows)" in reasons[x.reason] for x in found.frozen)
    assert page.texts("#command") == [
        "efreg inspect efreg.lab.models:resnet14 --input 3x8x8 --html report.html"
    ]


def test_prune_writes_a_page(show, capsys):
    """Widths are those of the network that was written, MACs and parameters what it costs."""
    run("prune", *RESNET, "--ratio", "0.3", "--skip", "layer1.0.conv1", "--html", "report.html")
    assert capsys.readouterr().out.endswith("Written to pruned.safetensors, plan.json, report.html\n")
    x, page = torch.randn(1, 3, 8, 8), show("report.html")
    networks = models.resnet14(), efreg.load(models.resnet14(), "pruned.safetensors")
    groups = efreg.inspect(networks[0], torch.randn(2, 3, 8, 8)).groups
    assert ("layer1.0.conv1", "16 → 16") in page.bars("widths")
    gone = [torch.tensor([n.get_submodule(g.name).out_channels for n in networks]) for g in groups]
    after = [g.size - int(before - left) for g, (before, left) in zip(groups, gone, strict=True)]
    before = [group.size for group in groups]
    assert page.bars("widths") == [
        (g.name, f"{g.size} → {left}") for g, left in zip(groups, after, strict=True)
    ]
    for fill, expected in (("#bccbdc", before), ("#1b5e9e", after)):
        lengths = page.page.evaluate(LENGTHS, fill)
        assert [x / max(lengths) for x in lengths] == pytest.approx(
            [x / max(expected) for x in expected], rel=1e-3
        )
    sides = [costs(network, x) for network in networks]
    for part, name in enumerate(("macs", "parameters")):
        assert page.bars(name) == shares(sides, part)
    rows = {name: cells for name, *cells in page.table("totals")}
    for part, name in enumerate(("MACs", "parameters")):
        totals = [sum(cost[part] for cost in side.values()) for side in sides]
        assert rows[name] == [*(f"{total:,}" for total in totals), f"{totals[0] / totals[1]:.3f}"]
    assert all(float(cell) > 0 for cell in rows["latency, ms"])
    assert f"measured here on the CPU (threads: {torch.get_num_threads()})" in page.texts("p")[0]


@pytest.mark.usefixtures("few_digits")
def test_sweep_writes_a_page(show):
    settings = Settings(model="resnet14", epochs=1)
    training.train(settings, Path("run"), resume=False, download=False, console=Console(quiet=True))
    run("sweep", "run/checkpoint.pt", "--html", "report.html")
    page = show("report.html")
    with open("run/sweep.csv", newline="") as file:
        cuts = list(csv.DictReader(file))
    names = {"right after pruning": "accuracy", "batch-norm statistics re-estimated": "recalibrated"}
    assert page.table("accuracies") == [
        ["%, without", *(f"{100 * float(cut['ratio']):.0f} %" for cut in cuts)],
        *([name, *(f"{float(cut[key]):.1f}" for cut in cuts)] for name, key in names.items()),
    ]
    assert set(names) <= set(page.texts("#curves svg text"))
    half = next(cut for cut in cuts if cut["ratio"] == "0.5")
    macs = next(row for row in page.table("totals") if row[0] == "MACs")
    assert macs[1:3] == [f"{int(cut['macs']):,}" for cut in (cuts[0], half)]
    assert page.texts("#command") == ["efreg sweep run/checkpoint.pt --html report.html"]


NAMES = ["<script>alert(1)<", "$x_1$ & \"y\" 'z'", "</svg><img src=x onerror=alert(1)>", "</pre>{{ 7 * 7 }}"]


def test_what_users_name_stays_text(show):
    """Names of layers, the title, curves and the command, whatever they look like."""
    layers = [nn.Linear(width, 8) for width in (4, 8, 8, 8)]
    model = nn.Sequential()
    for name, layer in zip(NAMES, layers, strict=True):
        model.add_module(name, layer)
    x, title = torch.randn(2, 4), "<script>alert(2)</script>"
    plan = efreg.plan(model, ratio=0.5, example_inputs=x)
    report = efreg.report(model, efreg.prune(model, plan, example_inputs=x), example_inputs=x, repeats=1)
    curves = {name: [(0, 90), (0.5, 50)] for name in NAMES}
    written = report.to_html(efreg.inspect(model, x), plan, curves=curves, title=title, command=title)
    Path("page.html").write_text(written, encoding="utf-8")
    page = show("page.html")
    assert page.texts("script, img") == []
    assert page.texts("h1, title, #command") == [title] * 3
    assert page.bars("widths") == [(name, "8 → 4") for name in NAMES[:-1]]
    assert [name for name, _ in page.bars("macs")] == NAMES
    assert page.texts("#curves svg text")[-len(NAMES) :] == NAMES
    assert [row[0] for row in page.table("accuracies")[1:]] == NAMES
    assert page.texts("#reasons dd") == [f"{NAMES[-1]} (8 of 8 rows)"]


def test_hundreds_of_groups_stay_readable(show):
    """On a telephone no text is smaller than ten pixels, and none lies over another."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(200)))
    found = efreg.inspect(model, torch.randn(2, 4))
    Path("page.html").write_text(found.to_html(), encoding="utf-8")
    page = show("page.html")
    assert [name for name, _ in page.bars("widths")] == [str(n) for n in range(199)]
    boxes = page.page.evaluate(
        "[...document.querySelectorAll('#widths svg text')].map(x => x.getBoundingClientRect().toJSON())"
    )
    assert min(box["height"] for box in boxes) >= 10
    names = boxes[::2]
    assert all(below["top"] >= above["bottom"] for above, below in pairwise(names))


def test_the_same_page_is_the_same_file():
    found = efreg.inspect(models.resnet14(), torch.randn(2, 3, 8, 8))
    assert found.to_html() == found.to_html()


def test_widths_need_plan_and_inspection():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(2, 4)
    report = efreg.report(model, model, example_inputs=x, repeats=1)
    with pytest.raises(ValueError, match="give both"):
        report.to_html(efreg.inspect(model, x))


@pytest.mark.parametrize("command", ["inspect", "prune", "sweep"])
@pytest.mark.parametrize("path", ["gone/report.html", "notes.txt/report.html", "folder"])
def test_a_page_that_cannot_be_written_is_refused_first(command, path, capsys):
    """Before even the network is looked for."""
    Path("notes.txt").touch()
    Path("folder").mkdir()
    assert_refused(capsys, [command, "nothing.pt", "--html", path], path, "name a file")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_the_lab_the_remedy_is_named(package, capsys, monkeypatch):
    found = efreg.inspect(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(2, 4))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=re.escape(f'a page needs {package}: pip install "efreg[lab]"')):
            found.to_html()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == package else find(name))
    remedy = f'needs {package}: pip install "efreg[lab]"'
    assert_refused(capsys, ["inspect", *RESNET, "--html", "report.html"], remedy)
    run("inspect", *RESNET)
