"""Files of ours that were cut, flipped or made up: refused with a clear error, or right, never half."""

import json
import os
import pickle
import random
import struct
from collections import Counter

import pytest
import safetensors.torch
import torch
from networks import assert_same, lively, snapshot
from torch import nn

import efreg
from efreg import cli, disk
from efreg.lab import checkpoints, engine
from efreg.lab.checkpoints import Checkpoint, Settings

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    """Its groups are numbers that a file tells, its last weight has two names."""
    net = nn.Sequential(
        nn.Conv2d(3, 36, 3), nn.ReLU(), nn.Conv2d(36, 36, 3, groups=4), nn.ReLU(), nn.Conv2d(36, 8, 1)
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
    """A run after a step: weights, momentum, charges; settings as the console gives them."""

    name = "checkpoint.pt"

    def __init__(self, path):
        net, plan = planned()
        force = efreg.attach(net, law="ladder", alpha=1e-3, layers=plan, scope="filter")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        net(X).sum().backward()
        optimizer.step()
        states = net.state_dict(), 1, [{"epoch": 1, "loss": 0.5}], optimizer.state_dict(), force.state_dict()
        settings = Settings(ratio="0.5", skip=("1.0",), nested=(0, 0.5))
        self.written = Checkpoint(settings, 8, (3, 8, 8), *states)
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
        del old[disk.CHECKSUM]
        torch.save(old, path)
    elif path.suffix == ".json":
        old = json.loads(content)
        del old[disk.CHECKSUM]
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


# Files that were made up: nothing in them is run, nothing is written


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


READERS = {
    "small.safetensors": lambda path: efreg.load(network(), path),
    "weights.safetensors": checkpoints.load_weights,
    "plan.json": efreg.Plan.load,
    "checkpoint.pt": checkpoints.load,
    "weights.pt": checkpoints.load_weights,
}
PICKLES = {
    "pickle": lambda content, file: pickle.dump(content, file),
    "torch": lambda content, file: torch.save(content, file),
    "torch, the old way": lambda content, file: torch.save(
        content, file, _use_new_zipfile_serialization=False
    ),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", PICKLES)
@pytest.mark.parametrize("name", READERS)
def test_a_pickle_under_our_name_is_not_run(name, how, tmp_path):
    path, trace = tmp_path / name, tmp_path / "trace"
    with path.open("wb") as file:
        PICKLES[how]({"format": checkpoints.FORMAT, "weights": Trap(trace)}, file)
    with pytest.raises(ValueError, match=str(path)):
        READERS[name](path)
    assert os.listdir(tmp_path) == [name]


def lying(header, data=b"\0" * 16, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(4,), data_offsets=(0, 16)):
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


OURS = {"efreg.format": "1"}
LIES = {
    "a header longer than the file": lying({"a": entry()}, length=2**63),
    "a header of nothing": lying(b""),
    "a header of another kind": lying([1, 2]),
    "a header that is nested": lying(b"[" * 10**5),
    "more than the data": lying({"a": entry(shape=(4000,), data_offsets=(0, 16_000))}),
    "less than the data": lying({"a": entry(shape=(2,), data_offsets=(0, 8))}),
    "a shape that is not of the data": lying({"a": entry(shape=(5,))}),
    "a shape that overflows": lying({"a": entry(shape=(2**32, 2**32, 4))}),
    "a negative shape": lying({"a": entry(shape=(-4,))}),
    "offsets backwards": lying({"a": entry(data_offsets=(16, 0))}),
    "places that overlap": lying({"a": entry(), "b": entry()}),
    "an unknown dtype": lying({"a": entry(dtype="F99")}),
    "a name of nothing": lying({"__metadata__": {**OURS, "a": "b"}}, b""),
    "a name of a path": lying({"__metadata__": OURS, "../../a": entry()}),
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_a_lying_header_is_refused(content, tmp_path):
    path = tmp_path / "small.safetensors"
    path.write_bytes(content)
    net = network()
    before = snapshot(net)
    with pytest.raises(ValueError, match=str(path)):
        efreg.load(net, path)
    assert_same(before, snapshot(net))
    assert os.listdir(tmp_path) == [path.name]


def told_of_modules(path, text):
    """A file of a pruned network that tells these numbers, and no checksum."""
    PrunedFile(path)
    with safetensors.safe_open(path, "pt") as file:
        told = file.metadata() | {"efreg.numbers": text}
    del told["efreg.sha256"]
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, told)


NO_NUMBERS = ["{", "[3]", "3", "[" * 10**5, '{"2": 3}', '{"2": {"groups": "3"}}', '{"2": {"groups": [0.5]}}']
IMPOSSIBLE_GROUPS = [f'{{"2": {{"groups": {groups}}}}}' for groups in (0, -1, 5, 7, 10**30)]
NUMBERS = dict.fromkeys(NO_NUMBERS, "is damaged in the numbers of modules")
NUMBERS |= dict.fromkeys(IMPOSSIBLE_GROUPS, "has 2.weight of shape")


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: text[:30])
def test_numbers_of_modules_that_cannot_be_are_refused(text, tmp_path):
    path = tmp_path / "small.safetensors"
    told_of_modules(path, text)
    net = network()
    before = snapshot(net)
    with pytest.raises(ValueError, match=f"{path} {NUMBERS[text]}"):
        efreg.load(net, path)
    assert_same(before, snapshot(net))


def in_first(**changes):
    """The plan's first group with these values."""
    return lambda plan: plan["cuts"][0]["group"].update(changes)


def in_member(**changes):
    """The first group's first member with these values."""
    return lambda plan: plan["cuts"][0]["group"]["members"][0].update(changes)


ABSURD = {
    "more removed than there are": lambda plan: plan["cuts"][0].update(removed=10**30),
    "less than none removed": lambda plan: plan["cuts"][0].update(removed=-1),
    "half a unit": lambda plan: plan["cuts"][0].update(removed=0.5),
    "units beyond the group": lambda plan: plan["cuts"][0].update(units=[*range(100, 106)]),
    "one unit many times": lambda plan: plan["cuts"][0].update(units=[0] * plan["cuts"][0]["removed"]),
    "a dead unit of less than none": lambda plan: plan["cuts"][0].update(removed=1, dead=[-1]),
    "a huge group": in_first(size=10**30),
    "a group of nothing": in_first(members=[]),
    "a group without a size": in_first(size=None),
    "a run without end": in_member(index=[[0, 0, 10**15]], unit=[[0, 0, 10**15]]),
    "runs that cancel out": in_member(index=[[0, 1, 10**15], [0, 1, 36 - 10**15]]),
    "a run of halves": in_member(index=[[0, 0.5, 36]]),
    "a run of words": in_member(index=[["0", 1, 36]]),
    "a run beyond its axis": in_member(index=[[1, 1, 36]]),
    "a run below it": in_member(index=[[-1, 1, 36]]),
    "a run of numbers beyond numbers": in_member(index=[[10**30, 1, 36]], length=10**31),
    "more places than units": in_member(index=[[0, 1, 11]]),
    "an unknown part": in_member(part="eats"),
    "an unknown importance": lambda plan: plan.update(importance="os.system"),
    "MACs of nothing": lambda plan: plan.update(macs=[1, 0]),
    "MACs of words": lambda plan: plan.update(macs=["1", "1"]),
    "three numbers of MACs": lambda plan: plan.update(macs=[3, 2, 1]),
    "an unknown key": lambda plan: plan.update(__class__="Trap"),
}


@pytest.mark.parametrize("change", ABSURD.values(), ids=ABSURD)
def test_a_plan_with_absurd_numbers_is_refused(change, tmp_path):
    """Where no checksum tells."""
    path = tmp_path / "plan.json"
    PlanFile(path)
    plan = json.loads(path.read_text())
    del plan[disk.CHECKSUM]
    change(plan)
    path.write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=f"{path} is no plan that efreg has saved"):
        efreg.Plan.load(path)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"format": ' + "1" * 5000 + "}", '{"format": NaN}', "\ud800"])
def test_text_that_no_plan_is(text, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=f"{path} is no plan that efreg has saved"):
        efreg.Plan.load(path)


def test_a_plan_of_paths_is_of_another_model(tmp_path):
    """A name goes nowhere but to the network."""
    path = tmp_path / "plan.json"
    file = PlanFile(path)
    path.write_text(path.read_text().replace('"0.weight"', '"../../0.weight"').replace('"0"', '"../../0"'))
    plan = json.loads(path.read_text())
    del plan[disk.CHECKSUM]
    path.write_text(json.dumps(plan))
    before = snapshot(file.net)
    with pytest.raises(ValueError, match="another model: '../../0.weight' had 36 filters there; .* none"):
        efreg.prune(file.net, efreg.Plan.load(path), example_inputs=X)
    assert_same(before, snapshot(file.net))
    assert os.listdir(tmp_path) == [path.name]


IMPOSSIBLE = {
    "num_classes is 1000000000000": {"num_classes": 10**12},
    "shape is (1, 1000000, 1000000)": {"shape": (1, 10**6, 10**6)},
    "shape is (1, 0, 8)": {"shape": (1, 0, 8)},
    "shape is '188'": {"shape": "188"},
    "epoch is '1'": {"epoch": "1"},
    "history is {}": {"history": {}},
    "weights is [1, 2]": {"weights": [1, 2]},
    "unknown model '../../model'": {"settings": {"model": "../../model"}},
    "model is 3": {"settings": {"model": 3}},
    "batch_size is '64'": {"settings": {"batch_size": "64"}},
    "alpha is tensor([1., 1.])": {"settings": {"alpha": torch.ones(2)}},
}


@pytest.mark.parametrize("culprit", IMPOSSIBLE)
def test_a_checkpoint_that_cannot_be_is_refused_in_one_line(culprit, tmp_path, capsys, monkeypatch):
    """Where no checksum tells; no folder of its names appears."""
    monkeypatch.chdir(tmp_path)
    chosen, changes = Settings(model="resnet14"), IMPOSSIBLE[culprit]
    settings = {**vars(chosen), **changes.get("settings", {})}
    weights = engine.build(chosen, 10, (1, 8, 8)).state_dict()
    content = {"format": checkpoints.FORMAT, "num_classes": 10, "shape": (1, 8, 8), "weights": weights}
    torch.save({**content, **changes, "settings": settings}, "checkpoint.pt")
    assert cli.main(["prune", "checkpoint.pt"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("efreg: error: ") and said.count("\n") == 1 and culprit in said
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
