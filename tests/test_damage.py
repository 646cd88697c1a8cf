"""Files of ours that were cut, flipped or made up: refused with a clear error, or loaded right, never half."""

import json
import random
import re
import struct
from collections import Counter

import pytest
import safetensors.torch
import torch
from networks import assert_same, lively, snapshot
from torch import nn

import efreg
from efreg.lab import checkpoints
from efreg.lab.checkpoints import Checkpoint, Settings

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    """Its groups are numbers that a file tells, its last weight has two names."""
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=4), nn.ReLU(), nn.Conv2d(12, 8, 1)
    )
    net.append(nn.Conv2d(8, 8, 1)).append(nn.Conv2d(8, 8, 1))
    net[6].weight = net[5].weight
    return net


def planned():
    torch.manual_seed(0)
    net = lively(network())
    return net, efreg.plan(net, ratio=0.5, example_inputs=X)


class PrunedFile:
    """A network, as `efreg.save` writes it."""

    name = "small.safetensors"

    def __init__(self, path):
        net, plan = planned()
        self.small = efreg.prune(net, plan, example_inputs=X)
        efreg.save(self.small, path)

    def require_right(self, path):
        net = network()
        before = snapshot(net)
        try:
            efreg.load(net, path)
        except ValueError:
            assert_same(before, snapshot(net))
            raise
        assert str(net) == str(self.small)
        assert_equal(net.state_dict(), self.small.state_dict())
        assert net[6].weight is net[5].weight


class PlanFile:
    name = "plan.json"

    def __init__(self, path):
        self.net, self.plan = planned()
        self.plan.save(path)

    def require_right(self, path):
        found = efreg.Plan.load(path)
        assert (str(found), found.members) == (str(self.plan), self.plan.members)
        assert found.filters(self.net) == self.plan.filters(self.net)


class CheckpointFile:
    """A run after a step: weights, momentum, charges."""

    name = "checkpoint.pt"

    def __init__(self, path):
        net, plan = planned()
        force = efreg.attach(net, law="ladder", alpha=1e-3, layers=plan, scope="filter")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        net(X).sum().backward()
        optimizer.step()
        states = net.state_dict(), 1, [{"epoch": 1, "loss": 0.5}], optimizer.state_dict(), force.state_dict()
        self.written = Checkpoint(Settings(), 10, (3, 8, 8), *states)
        checkpoints.save(self.written, path)

    def require_right(self, path):
        found = checkpoints.load(path)
        assert_equal(vars(found), vars(self.written))
        assert_equal(checkpoints.load_weights(path), self.written.weights)


def assert_equal(one, other):
    """Values nested in dicts and lists, tensors by their bits."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal(value, other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other) and one.dtype is other.dtype
    else:
        assert one == other


@pytest.fixture(params=[PrunedFile, PlanFile, CheckpointFile], ids=lambda kind: kind.name)
def written(request, tmp_path):
    """A file, its path and its bytes."""
    path = tmp_path / request.param.name
    file = request.param(path)
    return file, path, path.read_bytes()


def outcomes(written, damaged):
    """How often what was made of the file was refused, and how often it loaded right."""
    file, path, _ = written
    found = Counter()
    for content in damaged:
        path.write_bytes(content)
        try:
            file.require_right(path)
            found["right"] += 1
        except ValueError as error:
            assert str(path) in str(error)
            found["refused"] += 1
    return found


def test_a_whole_file_loads(written):
    assert outcomes(written, [written[2]]) == {"right": 1}


def test_a_file_cut_anywhere_is_refused(written):
    """At every KB, and before its last byte."""
    content = written[2]
    cuts = [*range(0, len(content), 1024), len(content) - 1]
    assert outcomes(written, [content[:cut] for cut in cuts]) == {"refused": len(cuts)}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("where", ["anywhere", "at its ends"])
def test_a_flipped_byte_is_refused_or_changes_nothing(written, where):
    """200 bytes, of all or of the headers and footers, which few bytes of a large file are."""
    content, dice = written[2], random.Random(0)
    ends = [*range(1000), *range(len(content) - 1000, len(content))]
    places = dice.sample(range(len(content)) if where == "anywhere" else ends, 200)
    found = outcomes(written, (flipped(content, place, dice.randrange(1, 256)) for place in places))
    assert found["refused"] > 100


def flipped(content, place, bits):
    return content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]


def test_files_of_before_checksums_load(written):
    file, path, content = written
    if path.suffix == ".pt":
        old = torch.load(path, weights_only=True)
        del old[checkpoints.CHECKSUM]
        torch.save(old, path)
    elif path.suffix == ".json":
        old = json.loads(content)
        del old["sha256"]
        path.write_text(json.dumps(old))
    else:
        with safetensors.safe_open(path, "pt") as opened:
            old = opened.metadata()
        del old["efreg.sha256"]
        safetensors.torch.save_file(safetensors.torch.load_file(path), path, old)
    file.require_right(path)


def test_damaged_weights_are_no_start_of_a_training(tmp_path):
    """They are read as any safetensors file is, but for the checksum."""
    path = tmp_path / PrunedFile.name
    PrunedFile(path)
    content = path.read_bytes()
    path.write_bytes(flipped(content, len(content) - 8, 1))
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        checkpoints.load_weights(path)
