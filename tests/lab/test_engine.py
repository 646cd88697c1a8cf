"""The training engine: schedules, logs, checkpoints, and runs that go on to the same bits after a kill."""

import copy
import csv
import errno
import io
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from disk import full_disk
from rich.console import Console
from torch import nn

import efreg
from efreg import disk
from efreg.cli import training
from efreg.lab import checkpoints, data, distributed, engine, graphs, logs, models
from efreg.lab.checkpoints import Checkpoint, Settings

WAYS = {
    "charges kept": {},
    "charges each 4 steps": {"refresh": 4},
    "proximal": {"update": "proximal", "weight_decay": 1e-3},
}
"""169 images in batches of 64 make 3 steps an epoch, so that 4 steps end inside an epoch."""

load_digits = data._load_digits


@cache
def every_eighth_digit():
    return [(images[::8].clone(), labels[::8].clone()) for images, labels in load_digits()]


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    monkeypatch.setattr(data, "_load_digits", every_eighth_digit)


def settings(**changes):
    usual = Settings(model="resnet14", alpha=1e-11, epochs=3, batch_size=64, lr=0.05, device="cpu")
    return replace(usual, **changes)


def train(chosen, out, **options):
    training.train(chosen, out, console=Console(file=io.StringIO()), **options)
    return checkpoints.load(out / "checkpoint.pt")


def equal(some, others):
    """Whether two nests of dicts, lists and tensors hold the same bits."""
    if isinstance(some, torch.Tensor):
        return torch.equal(some, others)
    if isinstance(some, dict):
        return some.keys() == others.keys() and all(equal(some[key], others[key]) for key in some)
    if isinstance(some, (list, tuple)):
        return len(some) == len(others) and all(equal(a, b) for a, b in zip(some, others, strict=True))
    return some == others


def without_times(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


class Few:
    """Four images of two pixels in two batches."""

    def __len__(self):
        return 4

    def epoch(self, batch_size, seed, epoch):
        return self.batches(batch_size)

    def batches(self, batch_size):
        images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
        return zip(images.split(batch_size), torch.tensor([0, 1, 0, 1]).split(batch_size), strict=True)


def rates(chosen, epoch):
    """The learning rate of each step of an epoch, as the optimizer has it."""
    model = nn.Linear(2, 2)
    optimizer = engine.sgd(model, chosen)
    seen = []
    engine.train_epoch(
        model, optimizer, Few(), chosen, epoch, lambda: seen.append(optimizer.param_groups[0]["lr"])
    )
    return seen


@pytest.mark.parametrize(
    ("schedule", "epochs", "expected"),
    [
        ("p1", 200, {0: 0.1, 99: 0.1, 100: 0.01, 149: 0.01, 150: 0.001, 199: 0.001}),
        ("p2", 120, {0: 0.01, 59: 0.01, 60: 0.001, 89: 0.001, 90: 0.0001, 119: 0.0001}),
        ("constant", 7, {0: 0.1, 6: 0.1}),
    ],
)
def test_learning_rates_of_the_paper(schedule, epochs, expected):
    """P1: 0.1, at epoch 100 0.01, at 150 0.001. P2: 0.01, at 60 0.001, at 90 0.0001. At every step."""
    chosen = Settings(schedule=schedule, epochs=epochs, batch_size=2)
    assert {epoch: rates(chosen, epoch) for epoch in expected} == {
        epoch: pytest.approx([lr, lr]) for epoch, lr in expected.items()
    }


def test_cosine_falls_at_every_step():
    """lr (1 + cos(π t / T)) / 2 at step t of T."""
    chosen = Settings(schedule="cosine", epochs=3, batch_size=2, lr=0.4)
    found = [lr for epoch in range(3) for lr in rates(chosen, epoch)]
    assert found == pytest.approx([0.2 * (1 + math.cos(math.pi * step / 6)) for step in range(6)])


def test_a_learning_rate_of_ones_own():
    assert rates(Settings(schedule="p2", epochs=120, batch_size=2, lr=0.5), 60) == pytest.approx([0.05, 0.05])


def test_momentum_and_weight_decay():
    """v ← 0.9 v + g + wd · w, w ← w − lr · v, over three steps by hand."""
    chosen = Settings(schedule="constant", epochs=2, batch_size=2, lr=0.2, weight_decay=0.1)
    model = nn.Linear(2, 2, bias=False).double()
    weight, velocity = model.weight.detach().clone(), torch.zeros(2, 2, dtype=torch.float64)
    optimizer = engine.sgd(model, chosen)
    x, y = torch.eye(2, dtype=torch.float64), torch.tensor([0, 1])
    for _ in range(3):
        engine.train_step(model, optimizer, x, y)
        gradient = (torch.softmax(x @ weight.T, 1) - F.one_hot(y)).T @ x / 2
        velocity = 0.9 * velocity + gradient + 0.1 * weight
        weight = weight - 0.2 * velocity
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-12, atol=1e-12)


def test_evaluation_is_a_mean_over_images():
    """Of all images, whatever the size of the batches, in eval mode; the model's own mode stays."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9))
    images, labels = (torch.cat(part) for part in zip(*Few().batches(4), strict=True))
    logits = model[0](images).detach()
    hits = [int(scores.argmax()) == int(label) for scores, label in zip(logits, labels, strict=True)]
    expected = float(F.cross_entropy(logits, labels)), 25.0 * sum(hits)
    for mode, size in ((True, 3), (False, 1)):
        model.train(mode)
        assert engine.evaluate(model, Few(), size) == pytest.approx(expected)
        assert model.training is mode


def test_near_zero_is_a_hundredth_of_the_largest():
    """Layer by layer; a layer of zeros is near zero as a whole."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([100.0, -0.99, 1.01, 0.0]).view(4, 1, 1, 1))
        model[1].weight.fill_(1.0)
        model[2].weight.zero_()
    with efreg.attach(model, 1e-11) as force:
        assert engine.near_zero(force) == 2 + 0 + 2


def test_a_row_of_the_log():
    """Loss and accuracies, energy and filters near zero after the epoch, and the last learning rate."""
    run = engine.Run(settings(schedule="constant"))
    row = next(run.epochs())
    assert list(row)[:2] == ["epoch", "loss"]
    assert row["epoch"] == run.epoch == 1
    assert (row["test_loss"], row["test_accuracy"]) == engine.evaluate(run.model, run.data.test)
    assert row["energy"] == run.force.energy().item() > 0
    assert row["near_zero"] == engine.near_zero(run.force)
    assert row["lr"] == 0.05
    assert (row["dead"], row["macs"]) == (0, efreg.macs(run.model, torch.zeros(1, 1, 8, 8)))
    assert 0 < row["loss"] < 10


LADDER = {"law": "ladder:power=4", "alpha": 8.0, "scope": "filter", "update": "proximal"}


def test_the_log_counts_dead_filters_and_the_macs_without_them():
    """Those of a network that is pruned of them; its outputs are the whole network's."""
    run = engine.Run(settings(**LADDER))
    rows = list(run.epochs())
    example = torch.randn(2, 1, 8, 8)
    dead = efreg.plan(run.model, dead=True, example_inputs=example)
    assert rows[-1]["dead"] == sum(cut.removed for cut in dead.cuts) > 20
    small = efreg.prune(run.model, dead, example_inputs=example)
    assert rows[-1]["macs"] == efreg.macs(small, example[:1]) < efreg.macs(run.model, example[:1])
    assert rows[0]["dead"] <= rows[-1]["dead"] and rows[0]["macs"] >= rows[-1]["macs"]
    assert engine.evaluate(small, run.data.test)[1] == engine.evaluate(run.model, run.data.test)[1]


FADE = {"law": "fade", "alpha": 0.0, "alpha_until": 0.5, "ratio": 0.7}
NESTED = {"alpha": 0.0, "nested": (0, 0.5, 0.7)}


def test_a_fade_lasts_its_share_of_the_training():
    """9 steps: over after the 4th or 5th, in the second epoch; what is dead is what the plan removes."""
    run = engine.Run(settings(**FADE))
    planned = sum(cut.removed for cut in run.plan.cuts)
    assert run.force.law == efreg.Fade(4)
    assert [row["dead"] for row in run.epochs()] == [0, planned, planned]
    assert "not dead yet" not in str(run.force)


@pytest.mark.parametrize("changes", [FADE, NESTED, {**NESTED, **LADDER}], ids=["fade", "nested", "both"])
def test_an_interrupted_run_goes_on_to_the_same_bits(changes):
    whole, first = (engine.Run(settings(**changes)) for _ in range(2))
    list(whole.epochs())
    next(first.epochs())
    second = engine.Run(settings(**changes), copy.deepcopy(first.checkpoint()))
    list(second.epochs())
    assert equal(second.model.state_dict(), whole.model.state_dict())
    assert equal(second.checkpoint().nesting, whole.checkpoint().nesting)
    assert bool(second.checkpoint().nesting) == ("nested" in changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"law": "fade:steps=5"}, "leave steps out of 'fade:steps=5'"),
        ({"alpha_schedule": "linear"}, "alpha_schedule is 'linear', which a fade has not"),
        ({"scope": "weights"}, "scope is 'weights', which a fade has not"),
        ({"update": "gradient"}, "update is 'gradient', which a fade has not"),
        ({"alpha": 0.1}, "has no strength"),
    ],
)
def test_settings_that_a_fade_has_not_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        engine.check(settings(**{**FADE, **changes}))


def test_a_ratio_that_cannot_be_nested_is_refused():
    with pytest.raises(ValueError, match="nested has 1.5"):
        engine.check(settings(nested=(0, 1.5)))


def test_only_what_was_nested_is_cut():
    """Not the layers that the ratios left out."""
    run = engine.Run(settings(**NESTED, ratios="[0, 0.5, 0, 0.5, 0]", epochs=1))
    for planning in (engine.ranked(run.checkpoint()), engine.cutting(run.settings, 10, (1, 8, 8))):
        plan = efreg.plan(run.model, ratio=0.5, **planning, example_inputs=run.example)
        assert list(plan) == list(run.plan)


def test_nested_units_are_cut_as_they_were_ranked():
    """By the weights before the training: from the checkpoint, and from the settings alone."""
    run = engine.Run(settings(**NESTED))
    before = efreg.plan(run.model, ratio=0.5, coupled=False, example_inputs=run.example).filters(run.model)
    list(run.epochs())
    told = engine.ranked(run.checkpoint()), engine.cutting(run.settings, 10, (1, 8, 8))
    for planning in told:
        plan = efreg.plan(run.model, ratio=0.5, **planning, example_inputs=run.example)
        assert plan.filters(run.model) == before
    now = efreg.plan(run.model, ratio=0.5, coupled=False, example_inputs=run.example)
    assert now.filters(run.model) != before


def test_coupled_acts_on_the_streams_too():
    run = engine.Run(settings(coupled=True))
    assert "conv1" in run.force.layers and len(run.force.layers) > 6


def test_the_teacher_is_the_whole_network(tmp_path):
    """0.1 · cross-entropy + 0.9 · T² · KL(teacher ‖ model) at T = 4, by hand; the teacher stays as it is."""
    taught = models.resnet14(in_channels=1)
    torch.save(taught.state_dict(), tmp_path / "dense.pt")
    run = engine.Run(settings(distil=str(tmp_path / "dense.pt"), alpha=0.0, epochs=1))
    images, labels = next(run.data.train.batches(16))
    forward = run._step.keywords["forward"]
    loss, logits = forward(run.model.eval(), images, labels, torch.float32)
    p, q = (x.double().div(4).softmax(1) for x in (taught.eval()(images), logits))
    expected = (
        0.1 * nn.functional.cross_entropy(logits, labels) + 0.9 * 16 * (p * (p / q).log()).sum(1).mean()
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    before = copy.deepcopy(forward.teacher.state_dict())
    list(run.epochs())
    assert equal(forward.teacher.state_dict(), before)
    with pytest.raises(FileNotFoundError, match="--distil names a file of weights"):
        engine.Run(settings(distil="nowhere.pt"))


def test_dead_filters_that_cannot_be_removed_do_not_end_a_training(monkeypatch, caplog):
    """The log keeps the last count, and says so."""

    plan = efreg.plan

    def refuse(*arguments, dead=False, **options):
        if dead:
            raise efreg.PruningError("no")
        return plan(*arguments, **options)

    monkeypatch.setattr(efreg, "plan", refuse)
    rows = list(engine.Run(settings(**LADDER)).epochs())
    assert {row["dead"] for row in rows} == {0}
    assert "dead filters and MACs are shown as they were before: no" in caplog.messages


@pytest.mark.parametrize(
    "schedule, until, expected",
    [
        ("constant", 1.0, [2.0] * 6),
        ("warmup", 0.5, [0, 2 / 3, 4 / 3, 2, 2, 2]),
        ("linear", 0.5, [2, 4 / 3, 2 / 3, 0, 0, 0]),
        ("cosine", 1.0, [1 + math.cos(math.pi * step / 6) for step in range(6)]),
    ],
)
def test_the_course_of_alpha(schedule, until, expected):
    """Over six steps of training."""
    options = engine.force_options(settings(alpha=2.0, alpha_schedule=schedule, alpha_until=until), 6)
    alpha = options["law"].alpha
    found = [alpha(step) if callable(alpha) else alpha for step in range(6)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_scheduled_run_goes_on_to_the_same_bits(tmp_path):
    chosen = settings(**LADDER, alpha_schedule="linear", alpha_until=0.9)
    expected = list(engine.Run(chosen).epochs())
    first = engine.Run(chosen)
    next(first.epochs())
    checkpoints.save(first.checkpoint(), tmp_path / "x.pt")
    second = engine.Run(chosen, checkpoints.load(tmp_path / "x.pt"))
    list(second.epochs())
    assert without_times(second.history) == without_times(expected)


def test_held_out_images_take_the_test_images_place():
    """They are training images, always the same, and are not trained on."""
    run, other = engine.Run(settings(held_out=40)), engine.Run(settings(held_out=40, seed=3))
    whole = every_eighth_digit()[0][0]
    assert (len(run.data.train), len(run.data.test)) == (len(whole) - 40, 40)
    assert torch.equal(run.data.test.images, other.data.test.images)
    together = torch.cat([run.data.train.images, run.data.test.images]).flatten(1)
    assert sorted(together.tolist()) == sorted(whole.flatten(1).tolist())
    with pytest.raises(ValueError, match="cannot hold out 1000 of 169 training images"):
        engine.Run(settings(held_out=1000))


def test_bfloat16_by_choice(monkeypatch):
    """The network computes in it, weights and losses are float32; "auto" looks at the device."""
    seen = []
    run = engine.Run(settings(precision="bfloat16", channels_last=True, epochs=1))
    run.model.layer1.register_forward_hook(lambda *_: seen.append(_[2].dtype))
    list(run.epochs())
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert run.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(engine, "has_bfloat16", lambda device, has=has: has)
        assert engine.Run(settings(precision="auto")).dtype == dtype
    assert engine.Run(settings()).dtype == torch.float32


@pytest.mark.parametrize("flags, has", [("fpu avx512f avx512_bf16 sse", True), ("fpu avx512f sse", False)])
def test_bfloat16_without_its_arithmetic_is_warned_of(flags, has, monkeypatch, tmp_path, caplog):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(engine, "Path", lambda path: tmp_path / Path(path).name)
    assert engine.has_bfloat16(torch.device("cpu")) == has
    engine._warn_if_slow(torch.bfloat16, torch.device("cpu"))
    assert ("no bfloat16 arithmetic" in caplog.text) == (not has)
    caplog.clear()
    engine._warn_if_slow(torch.float32, torch.device("cpu"))
    assert not caplog.text


def test_weights_are_cast_anew_at_every_step():
    """Two steps in bfloat16 are those of a network whose casts were not kept."""
    runs = [engine.Run(settings(precision="bfloat16", epochs=1)) for _ in range(2)]
    for run, kept in zip(runs, (True, False), strict=True):
        torch.set_autocast_cache_enabled(kept)
        list(run.epochs())
    torch.set_autocast_cache_enabled(True)
    assert equal(runs[0].model.state_dict(), runs[1].model.state_dict())


def test_every_epoch_has_its_own_rate_and_order(monkeypatch):
    """The cosine goes on from epoch to epoch, 3 steps each, and no two epochs are shuffled alike."""
    shuffled, shuffle = [], data.InMemory.epoch
    monkeypatch.setattr(
        data.InMemory, "epoch", lambda self, *given: shuffled.append(given) or shuffle(self, *given)
    )
    rates = [row["lr"] for row in engine.Run(settings(seed=5)).epochs()]
    assert rates == pytest.approx([0.025 * (1 + math.cos(math.pi * step / 9)) for step in (2, 5, 8)])
    assert shuffled == [(64, 5, 0), (64, 5, 1), (64, 5, 2)]


def test_without_strength_there_is_no_force():
    """α = 0 trains as plain SGD does, to the last bit."""
    chosen = settings(alpha=0.0, epochs=1)
    run = engine.Run(chosen)
    row = next(run.epochs())
    run.force.detach()
    model = engine.build(chosen, 10, (1, 8, 8))
    engine.train_epoch(model, engine.sgd(model, chosen), run.data.train, chosen, 0)
    assert row["energy"] == 0
    assert equal(model.state_dict(), run.model.state_dict())


def test_the_force_acts_on_the_plan_alone():
    run = engine.Run(settings(ratios="[0, 0.5, 0, 0.5, 0]", skip=("1.0",)))
    assert run.force.layers == ["layer1.1.conv1", "layer3.0.conv1", "layer3.1.conv1"]
    assert engine.Run(settings()).force.layers == [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in (0, 1)]


def test_the_seed_decides_the_weights():
    def weights(seed):
        run = engine.Run(settings(seed=seed, epochs=1))
        list(run.epochs())
        return run.model.state_dict()

    assert equal(weights(1), weights(1))
    assert not equal(weights(1), weights(2))


def die_in_training(out, chosen):
    """Trains in a child that is killed at the second step of the second epoch."""
    step, count = engine.train_step, iter(range(100))

    def fatal(*args):
        if next(count) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args)

    _die(out, chosen, engine, "train_step", fatal)


def die_in_writing(out, chosen):
    """Trains in a child that is killed with half of its second checkpoint on disk."""
    save, count = torch.save, iter(range(100))

    def fatal(content, file):
        if next(count) == 0:
            return save(content, file)
        buffer = io.BytesIO()
        save(content, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    _die(out, chosen, torch, "save", fatal)


def _die(out, chosen, owner, name, fatal):
    if not (child := os.fork()):
        setattr(owner, name, fatal)
        train(chosen, out)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def die_in_every_way(folder):
    """What the process of `killed` does: one run each way, all of them killed."""
    torch.set_num_threads(1)
    data._load_digits = every_eighth_digit
    for name, changes in WAYS.items():
        die_in_training(Path(folder) / name, settings(**changes))
    die_in_writing(Path(folder) / "while writing", settings())


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder of runs that were killed, in another process."""
    folder = tmp_path_factory.mktemp("killed")
    folders = (Path(efreg.__file__).parents[1], *Path(__file__).parents[:2])
    sources = os.pathsep.join(map(str, folders))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": sources}
    command = [sys.executable, "-c", f"import test_engine; test_engine.die_in_every_way({str(folder)!r})"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", [*WAYS, "while writing"])
@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(name, killed, tmp_path):
    """Weights, momentum, charges and log are those of a run that nobody killed."""
    expected = train(settings(**WAYS.get(name, {})), tmp_path)
    assert checkpoints.load(killed / name / "checkpoint.pt").epoch == 1
    found = train(None, killed / name, resume=True)
    assert found.epoch == 3
    assert equal(found.weights, expected.weights)
    assert equal(found.optimizer, expected.optimizer)
    assert equal(found.force, expected.force)
    assert any(state["momentum_buffer"].any() for state in found.optimizer["state"].values())
    assert without_times(found.history) == without_times(expected.history)
    assert torch.equal(
        safetensors.torch.load_file(killed / name / "model.safetensors")["conv1.weight"],
        expected.weights["conv1.weight"],
    )
    assert_logged(killed / name, found.history)


def assert_logged(out, history):
    """log.csv and TensorBoard have every epoch once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [row["epoch"] for row in history] == [1, 2, 3]
    assert [float(row["energy"]) for row in rows] == [row["energy"] for row in history]
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    for name in ("loss", "test_accuracy", "energy", "near_zero"):
        logged = events.Scalars(name)
        assert [event.step for event in logged] == [1, 2, 3]
        assert [event.value for event in logged] == pytest.approx([row[name] for row in history])


def test_a_run_that_ended_stays_as_it_is(tmp_path):
    expected = train(settings(epochs=1), tmp_path)
    assert equal(vars(train(None, tmp_path, resume=True)), vars(expected))


@pytest.fixture
def saved(tmp_path):
    """A checkpoint on disk."""
    chosen = settings()
    model = engine.build(chosen, 10, (1, 8, 8))
    path = tmp_path / "checkpoint.pt"
    checkpoints.save(Checkpoint(chosen, 10, (1, 8, 8), model.state_dict()), path)
    return path


def test_a_checkpoint_names_its_model(saved):
    checkpoint = checkpoints.load(saved)
    assert checkpoint.settings == settings()
    model = engine.restore(checkpoint)
    assert not model.training
    assert equal(model.state_dict(), checkpoint.weights)
    assert checkpoint.example().shape == (2, 1, 8, 8)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, RuntimeError])
def test_a_write_that_breaks_off_leaves_the_old_checkpoint(error, saved, monkeypatch):
    before = saved.read_bytes()

    def broken(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", broken)
    checkpoint = checkpoints.load(saved)
    for path in (saved, saved.with_name("new.pt")):
        with pytest.raises(error):
            checkpoints.save(checkpoint, path)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_full_disk_is_named_and_leaves_the_old_files(saved):
    """Whatever it is that fills the disk: torch.save, or the text of a table."""
    table = saved.with_name("log.csv")
    table.write_text("old")
    before, checkpoint = saved.read_bytes(), checkpoints.load(saved)
    with full_disk():
        for path, write in (
            (saved, lambda: checkpoints.save(checkpoint, saved)),
            (table, lambda: logs.write_csv(table, [{"epoch": 1000 * "1"}] * 100)),
        ):
            with pytest.raises(OSError, match=rf"cannot write {path} \(.+\): free space .* untouched$"):
                write()
    assert (saved.read_bytes(), table.read_text()) == (before, "old")
    assert set(saved.parent.iterdir()) == {saved, table}


def test_a_disk_that_is_full_in_the_end(saved, monkeypatch):
    """Some file systems say so when the last bytes go to the disk."""

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpoint, before = checkpoints.load(saved), saved.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"cannot write {saved} \(No space left on device\): free space"):
        checkpoints.save(checkpoint, saved)
    assert saved.read_bytes() == before


def test_a_folder_that_cannot_be_written(saved):
    with pytest.raises(
        OSError, match=rf"cannot write {saved / 'x.pt'} \(Not a directory\): .* name a folder"
    ):
        checkpoints.save(checkpoints.load(saved), saved / "x.pt")


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no file {tmp_path / 'x.pt'}: name a checkpoint"):
        checkpoints.load(tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError, match=f"no file {tmp_path}: name a checkpoint"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_a_truncated_checkpoint(share, saved):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"{saved} is damaged, or is no file of tensors"):
        checkpoints.load(saved)


@pytest.mark.parametrize("content", [{"conv1.weight": torch.ones(2)}, [1, 2], torch.ones(3)])
def test_a_foreign_checkpoint(content, tmp_path):
    path = tmp_path / "x.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"{path} is no checkpoint of `efreg train`; .*--weights {path}"):
        checkpoints.load(path)


def test_a_file_that_is_no_checkpoint_at_all(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# Read me\n")
    with pytest.raises(ValueError, match=f"{path} is damaged, or is no file of tensors"):
        checkpoints.load(path)
    safetensors.torch.save_file({"weight": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors is no checkpoint of `efreg train`"):
        checkpoints.load(tmp_path / "x.safetensors")


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_nothing_in_a_file_is_run(tmp_path):
    path, trace = tmp_path / "x.pt", tmp_path / "trace"
    torch.save({"format": checkpoints.FORMAT, "weights": Malicious(trace)}, path)
    with pytest.raises(ValueError, match=f"{path} is damaged, or is no file of tensors"):
        checkpoints.load(path)
    with pytest.raises(ValueError, match=f"{path} is damaged, or is no file of tensors"):
        checkpoints.load_weights(path)
    assert not trace.exists()


def test_two_trainings_do_not_share_a_folder(tmp_path):
    with distributed.alone(tmp_path), pytest.raises(ValueError, match=f"another command works in {tmp_path}"):
        train(Settings(model="resnet14", epochs=1, device="cpu"), tmp_path)


@pytest.mark.parametrize(
    "change", [{"shape": None}, {"colour": 1}, {"settings": {"colour": 1}}, {"settings": None}]
)
def test_a_checkpoint_of_another_version(change, saved):
    content = torch.load(saved, weights_only=True) | change
    del content[disk.CHECKSUM]
    torch.save({name: value for name, value in content.items() if name != "shape" or value}, saved)
    with pytest.raises(
        ValueError, match=f"{saved} was written by another version of efreg .*: train it again"
    ):
        checkpoints.load(saved)


@pytest.fixture
def weights():
    return models.resnet14(in_channels=1).state_dict()


def wrap(weights):
    return {f"module.{name}": value for name, value in weights.items()}


@pytest.mark.parametrize(
    "form",
    [lambda w: w, wrap, lambda w: {"state_dict": wrap(w), "epoch": 3}],
    ids=["plain", "module.", "nested"],
)
def test_a_run_starts_from_given_weights(form, weights, tmp_path):
    """Those of DataParallel have `module.` before each name; many public files are nested in `state_dict`."""
    path = tmp_path / "weights.pth"
    torch.save(form(weights), path)
    assert equal(engine.Run(settings(weights=str(path))).model.state_dict(), weights)


def test_a_run_starts_from_safetensors_and_checkpoints(weights, saved, tmp_path):
    safetensors.torch.save_file(wrap(weights), tmp_path / "weights.safetensors")
    found = engine.Run(settings(weights=str(tmp_path / "weights.safetensors"))).model.state_dict()
    assert equal(found, weights)
    found = engine.Run(settings(weights=str(saved), seed=5)).model.state_dict()
    assert equal(found, checkpoints.load(saved).weights)


def test_weights_are_needed_once(weights, tmp_path):
    """A run goes on without the file that it started from."""
    path = tmp_path / "weights.pth"
    torch.save(weights, path)
    chosen = settings(weights=str(path), epochs=2)
    first = engine.Run(chosen)
    next(first.epochs())
    path.unlink()
    second = engine.Run(chosen, first.checkpoint())
    assert equal(second.model.state_dict(), first.model.state_dict())
    assert [row["epoch"] for row in second.epochs()] == [2]


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(models.resnet20(in_channels=1).state_dict(), path)
    with pytest.raises(
        ValueError, match="the weights do not fit resnet14 on digits: layer1.2.*36 such tensors.*--model"
    ):
        engine.Run(settings(weights=str(path)))
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match=f"{path} holds no state dict: save one with"):
        engine.Run(settings(weights=str(path)))


@pytest.mark.parametrize(
    "changes, found",
    [({"refresh": 2}, "--refresh 2"), ({"alpha_schedule": "cosine"}, "--alpha-schedule cosine")],
)
def test_what_a_graph_does_not_count_is_refused(changes, found):
    with pytest.raises(ValueError, match=f"a CUDA graph cannot be had with {found}: use --step compile"):
        engine.step_of(settings(step="graph", **changes), torch.device("cuda"))
    engine.step_of(settings(step="graph", refresh=1), torch.device("cuda"))


def test_a_run_for_a_graph_does_not_go_on_without_one():
    """A checkpoint of a GPU, on another device."""
    chosen = settings(step="graph")
    model = engine.build(chosen, 10, (1, 8, 8))
    with pytest.raises(ValueError, match="a CUDA graph cannot be had with the device cpu"):
        engine.Run(chosen, Checkpoint(chosen, 10, (1, 8, 8), model.state_dict()))


class Small(nn.Sequential):
    """A network that is compiled quickly."""

    def __init__(self, num_classes, in_channels):
        super().__init__(
            nn.Conv2d(in_channels, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3),
            nn.Flatten(),
            nn.Linear(64, num_classes),
        )


@pytest.fixture
def small(monkeypatch):
    """Settings of runs on such a network, all in float64."""
    monkeypatch.setitem(models.MODELS, "small", Small)
    torch.set_default_dtype(torch.float64)
    yield settings(model="small", alpha=1e-10, epochs=2)
    torch.set_default_dtype(torch.float32)


def test_compiled_steps_are_the_same(small, monkeypatch):
    """To the bit where captured operations run as they are; one capture a size of batch, all sizes fixed."""
    captured, compile = [], torch.compile

    def as_it_is(graph, inputs):
        captured.append(inputs)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=as_it_is, **options))
    eager, compiled = engine.Run(small), engine.Run(replace(small, step="compile"))
    assert without_times(eager.epochs()) == without_times(compiled.epochs())
    assert equal(eager.model.state_dict(), compiled.model.state_dict())
    assert len(captured) == 2
    assert all(isinstance(x, torch.Tensor) for inputs in captured for x in inputs)


@pytest.mark.slow
def test_compiled_code_trains_as_eager_code_does(small):
    """Six steps in float64: another order of sums changes 1e-16 a step, which stays below 1e-10."""
    eager, compiled = engine.Run(small), engine.Run(replace(small, step="compile"))
    for run in (eager, compiled):
        list(run.epochs())
    for name, weight in eager.model.state_dict().items():
        torch.testing.assert_close(compiled.model.state_dict()[name], weight, rtol=1e-10, atol=1e-10)


class Recorded:
    """Stands for a CUDA graph: it takes the step again, from what it was told to read."""

    def __init__(self):
        self.captures = self.replays = 0

    def capture(self, work):
        self.captures += 1

        def replay():
            self.replays += 1
            work()

        return replay


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_replayed_steps_are_the_same(small, update, monkeypatch):
    """What a graph reads is each batch and each learning rate; the last batch of an epoch, with 41 of 64, and
    the first three steps are taken without it. Rates are powers of two, which float32 holds exactly.
    """
    recorded = Recorded()
    monkeypatch.setattr(graphs, "capture", recorded.capture)
    monkeypatch.setattr(graphs, "aside", lambda work: work())
    monkeypatch.setitem(engine.SCHEDULES, "halves", lambda progress: 2.0 ** -int(9 * progress))
    monkeypatch.setattr(engine, "_check_graph", lambda *_: None)
    chosen = replace(small, epochs=3, schedule="halves", lr=0.0625, update=update, step="graph")
    eager, graphed = engine.Run(chosen), engine.Run(chosen)
    eager._step = engine.train_step
    rates = []
    rows = graphed.epochs(lambda: rates.append(graphed.optimizer.param_groups[0]["lr"]))
    assert without_times(eager.epochs()) == without_times(rows)
    assert [type(rate) for rate in rates] == [float] * 9  # none of the graph's stays behind
    assert equal(eager.optimizer.state_dict(), graphed.optimizer.state_dict())
    assert equal(eager.model.state_dict(), graphed.model.state_dict())
    assert (recorded.captures, recorded.replays) == (1, 3)
    assert graphed.optimizer.param_groups[0]["fused"]


@pytest.fixture
def narrow(tmp_path):
    """A file of a pruned ResNet-14, and the network in it."""
    example = torch.randn(2, 1, 8, 8)
    model = models.resnet14(in_channels=1).eval()
    plan = efreg.plan(model, "[0, 0.5, 0.25, 0.75, 0]", example_inputs=example)
    small = efreg.prune(model, plan, example_inputs=example)
    path = tmp_path / "small.safetensors"
    efreg.save(small, path)
    return path, small


def widths(model):
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


def test_a_pruned_network_is_trained_on(narrow, tmp_path):
    """As narrow as it was; an interrupted run goes on without the file, to the same bits."""
    path, small = narrow
    chosen = settings(weights=str(path), alpha=1e-9, ratio=0.5)
    expected = engine.Run(chosen)
    assert equal(expected.model.state_dict(), small.state_dict())
    assert [cut.removed for cut in expected.plan.cuts] == [4, 4, 12, 12, 8, 8]
    list(expected.epochs())
    assert not equal(expected.model.state_dict(), small.state_dict())
    first = engine.Run(chosen)
    next(first.epochs())
    checkpoints.save(first.checkpoint(), tmp_path / "x.pt")
    path.unlink()
    second = engine.Run(chosen, checkpoints.load(tmp_path / "x.pt"))
    list(second.epochs())
    assert equal(second.model.state_dict(), expected.model.state_dict())
    assert without_times(second.history) == without_times(expected.history)


def test_a_checkpoint_of_a_pruned_network_restores_it(narrow, tmp_path):
    """And another run can start from it."""
    path, small = narrow
    checkpoints.save(engine.Run(settings(weights=str(path))).checkpoint(), tmp_path / "x.pt")
    path.unlink()
    restored = engine.restore(checkpoints.load(tmp_path / "x.pt"))
    images = torch.randn(2, 1, 8, 8)
    assert widths(restored) == widths(small) != widths(models.resnet14())
    assert torch.equal(restored(images), small(images))
    again = engine.Run(settings(weights=str(tmp_path / "x.pt"))).model
    assert equal(again.state_dict(), small.state_dict())


@pytest.mark.parametrize("classes, channels", [(7, 1), (10, 3)])
def test_weights_of_other_images_or_classes_do_not_fit(classes, channels, tmp_path):
    """Fewer classes, or fewer channels than the images have, are no pruning."""
    path = tmp_path / "weights.pth"
    torch.save(models.resnet14(classes, 1).state_dict(), path)
    with pytest.raises(ValueError, match=r"the weights do not fit resnet14 on digits: (linear|conv1)\."):
        engine.build(settings(), 10, (channels, 8, 8), checkpoints.load_weights(path))


def test_weights_of_before_batches_were_counted(weights, tmp_path):
    old = {name: t for name, t in weights.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "weights.pth")
    assert equal(engine.Run(settings(weights=str(tmp_path / "weights.pth"))).model.state_dict(), weights)


def test_an_epoch_that_diverged_is_not_trained_to_its_end(tmp_path, monkeypatch):
    """Of its 3 steps the first breaks the weights, the second meets the loss."""
    good, steps = engine.train_step, []

    def poisoned(model, *given):
        logits = good(model, *given)
        steps.append(nn.init.constant_(model.conv1.weight, math.nan))
        return logits

    monkeypatch.setattr(engine, "train_step", poisoned)
    with pytest.raises(engine.Diverged, match="the loss is not finite in epoch 1"):
        train(settings(), tmp_path)
    assert len(steps) == 2


@pytest.mark.parametrize("force", [{}, {"law": "ladder", "alpha": 8.0, "scope": "filter"}], ids=str)
@pytest.mark.parametrize("step", [3, 5], ids=["first step", "last step"])
def test_a_loss_that_is_not_finite_ends_the_run(step, force, tmp_path, monkeypatch):
    """The epoch is named, also where its last step alone went wrong; the checkpoint before it stays."""
    good, count = engine.train_step, iter(range(100))

    def poisoned(model, *given):
        logits = good(model, *given)
        if next(count) == step:
            nn.init.constant_(model.conv1.weight, math.nan)
        return logits

    monkeypatch.setattr(engine, "train_step", poisoned)
    with pytest.raises(
        engine.Diverged, match="the loss is not finite in epoch 2: lower the learning rate or alpha"
    ):
        train(settings(**force), tmp_path)
    checkpoint = checkpoints.load(tmp_path / "checkpoint.pt")
    assert checkpoint.epoch == 1
    assert all(value.isfinite().all() for value in checkpoint.weights.values())
    assert (tmp_path / "log.csv").read_text().count("\n") == 2
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "p3"}, "unknown schedule 'p3': there are constant, cosine, p1, p2"),
        ({"epochs": 0}, "epochs is 0: it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"seed": -1}, "seed is -1: it must not be negative"),
        ({"device": "abacus"}, "device 'abacus' cannot be had here: use --device cpu"),
        ({"model": "vgg19"}, "vgg19 cannot take images of 1x8x8 .*: choose another --model"),
        ({"model": "picky"}, "picky cannot take images of 1x8x8 .*224.*: choose another --model"),
        ({"model": "resnet18"}, "resnet18 takes 3 channels, not 1"),
        ({"law": "gravitation"}, "unknown law 'gravitation': there are electrostatic, gravity"),
        ({"law": "electrostatic:power=2"}, "law 'electrostatic' has no parameter 'power=2': there are k_e="),
        ({"law": "ladder:power=-2"}, "power is -2"),
        ({"scope": "all"}, "unknown scope 'all': there are weights, filter"),
        ({"alpha_schedule": "sine"}, "'sine': there are constant, warmup, linear, cosine"),
        ({"alpha_until": 0.5}, "a constant alpha has no end: name an --alpha-schedule, or drop --alpha-u"),
        ({"alpha_until": 0.0}, "alpha_until is 0.0: it is a share of the training, in .0, 1.$"),
        ({"precision": "float8"}, "unknown precision 'float8': there are float32, bfloat16, auto"),
        ({"step": "jump"}, "unknown step 'jump': there are eager, compile, graph"),
        ({"step": "graph"}, "a CUDA graph cannot be had with the device cpu: use --step compile or eager"),
        ({"lr": -1.0}, "-1"),
        ({"weight_decay": -1.0}, "-1"),
    ],
)
def test_settings_that_no_training_can_have(changes, message, monkeypatch):
    monkeypatch.setitem(models.MODELS, "picky", lambda **_: Picky())
    with pytest.raises(ValueError, match=message):
        engine.Run(settings(**changes))


class Picky(nn.Module):
    """Takes one size of images, and says so as torchvision's transformers do."""

    def forward(self, x):
        torch._assert(x.shape[-1] == 224, f"Wrong image height! Expected 224 but got {x.shape[-1]}!")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no file {tmp_path / 'w.pt'}: --weights names"):
        engine.Run(settings(weights=str(tmp_path / "w.pt")))


@pytest.mark.parametrize(
    "changes",
    [
        {"law": "gravitation"},
        {"model": "resnet21"},
        {"alpha": -1.0},
        {"ratio": "1"},
        {"update": "x"},
        {"scope": "x"},
    ],
)
def test_nothing_is_fetched_for_settings_that_are_wrong(changes, monkeypatch):
    monkeypatch.setattr(data, "_load_torchvision", lambda *_: pytest.fail("fetched"))
    with pytest.raises(ValueError):
        engine.Run(settings(dataset="cifar10", **changes), download=True)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 299)])
def test_training_sees_logits_alone(name, size):
    """torchvision's two networks with further heads are built without them."""
    with torch.device("meta"):
        assert models.build(name, 7).train()(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_files_are_replaced_in_one_step(tmp_path):
    """What is read at any time is the old text or the new one."""
    path = tmp_path / "log.csv"
    path.write_text("old")
    with checkpoints.replacing(path, "w") as file:
        file.write("new\n")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_bytes() == b"new\n"
    assert list(tmp_path.iterdir()) == [path]
