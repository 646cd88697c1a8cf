"""What a report counts and measures, against sums by hand."""

import re
import time

import pytest
import torch
from networks import assert_same, snapshot
from torch import nn

import efreg
from efreg.lab import models


class Slow(nn.Module):
    """Takes `seconds` for a forward pass."""

    def __init__(self, seconds):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return self.fc(x)


def test_macs_by_hand():
    """Output size × filter length for convolutions, inputs × outputs for linear layers, times the batch."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Flatten(),
        nn.Linear(8 * 4, 5),
    )
    one = 8 * 4 * 4 * (3 * 9) + 8 * 2 * 2 * (2 * 9) + 32 * 5
    assert efreg.macs(model, torch.randn(1, 3, 8, 8)) == one
    assert efreg.macs(model, torch.randn(6, 3, 8, 8)) == 6 * one


def test_sizes_by_hand():
    before = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    after = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)).half()
    found = efreg.report(before, after.float(), example_inputs=torch.randn(3, 4), repeats=1)
    assert (found.before.macs, found.after.macs) == (3 * (32 + 16), 3 * (8 + 4))
    assert (found.before.parameters, found.after.parameters) == (40 + 16 + 18, 10 + 4 + 6)
    assert (found.before.bytes, found.after.bytes) == (4 * (74 + 16) + 8, 4 * (20 + 4) + 8)
    assert found.speedup == 4.0
    assert found.compression == 74 / 20


def test_latency_is_the_median_in_milliseconds():
    x = torch.randn(1, 4)
    found = efreg.report(Slow(0.02), Slow(0.005), example_inputs=x, repeats=3)
    assert 20 <= found.before.latency < 60
    assert 5 <= found.after.latency < 20
    assert found.measured_speedup == found.before.latency / found.after.latency


def test_one_slow_run_does_not_count():
    class OnceSlow(nn.Linear):
        runs = 0

        def forward(self, x):
            self.runs += 1
            time.sleep(0.2 if self.runs == 6 else 0)
            return super().forward(x)

    found = efreg.report(OnceSlow(4, 1), nn.Linear(4, 1), example_inputs=torch.randn(1, 4), repeats=3)
    assert found.before.latency < 100


def test_runs_are_interleaved():
    order = []

    class Noted(nn.Linear):
        def forward(self, x):
            order.append(self.out_features)
            return super().forward(x)

    efreg.report(Noted(4, 1), Noted(4, 2), example_inputs=torch.randn(1, 4), repeats=5)
    assert order[-10:] == [1, 2] * 5


def test_models_are_left_as_they_were():
    before, after = models.resnet14(), models.resnet14()
    before.layer1.eval()
    snapshots = snapshot(before), snapshot(after)
    with torch.enable_grad():
        efreg.report(before, after, example_inputs=torch.randn(2, 3, 8, 8), repeats=1)
        assert torch.is_grad_enabled()
    assert_same(snapshots[0], snapshot(before))
    assert_same(snapshots[1], snapshot(after))


def test_models_are_left_as_they_were_on_failure():
    model = models.resnet14()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"ResNet cannot take example_inputs of shape \(2, 1, 8, 8\)"):
        efreg.report(model, model, example_inputs=torch.randn(2, 1, 8, 8))
    assert_same(before, snapshot(model))


def test_table_reads_well():
    model = models.resnet56()
    x = torch.randn(1, 3, 32, 32)
    small = efreg.prune(model, efreg.plan(model, [0, 0.52, 0.52, 0.52, 0]), example_inputs=x)
    lines = str(efreg.report(model, small, example_inputs=x, repeats=1)).splitlines()
    assert lines[0].split() == ["before", "after", "ratio"]
    assert lines[1].split() == ["MACs", "125,485,696", "57,729,664", "2.174"]
    assert lines[2].split()[0] == "parameters"
    assert re.fullmatch(r"latency, ms +\d+\.\d\d +\d+\.\d\d +\d+\.\d{3}", lines[4])
    assert len({len(line) for line in lines}) == 1


def test_wrapped_models_and_keyword_inputs():
    model = models.resnet14()
    x = torch.randn(1, 3, 8, 8)
    assert efreg.macs(nn.DataParallel(model), {"x": x}) == efreg.macs(torch.compile(model), (x,))
    efreg.report(nn.DataParallel(model), model, example_inputs={"x": x}, repeats=1)
