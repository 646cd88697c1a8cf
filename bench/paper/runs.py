"""Training runs known by what decides their weights: done once, gone on with after an interruption."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from torch import nn

import efreg
from bench.paper.recipes import build
from efreg.lab import checkpoints, distributed, engine
from efreg.lab.checkpoints import Settings
from efreg.lab.logs import write_bytes


class Watch(NamedTuple):
    """Is told, in a line, where a training diverged; ticks after every epoch."""

    say: Callable[[str], None] = lambda line: None
    tick: Callable[[], None] = lambda: None


def digest(settings: Settings, *more) -> str:
    """Eight letters that change with all that decides the weights a training ends with, and with `more`.

    Where the data lies does not, unless it is a folder of images; the number of processes does.
    """
    decisive = replace(
        settings,
        data=str(Path(settings.data).resolve()) if settings.dataset == "imagefolder" else "",
        weights=settings.weights and Path(settings.weights).name,
        distil=settings.distil and Path(settings.distil).name,
        device=engine.device_named(settings.device).type,
        precision=str(engine.dtype_of(settings)),
    )
    told = [pair for pair in vars(decisive).items() if pair not in vars(Settings()).items()] + [*more]
    if distributed.world_size() > 1:
        told.append(("processes", distributed.world_size()))
    return hashlib.sha256(repr(told).encode()).hexdigest()[:8]


def stem(name: str, settings: Settings, *more) -> str:
    """What the files of a run are called: its name, the seed, and a digest of its settings and `more`."""
    plain = re.sub("[,()]|α |= ", "", name).replace(" ", "-")
    return f"{plain}-{settings.seed}-{digest(settings, *more)}"


def fingerprint(path: str | Path) -> str:
    """Of a file's content; empty where there is no such file."""
    path = Path(path)
    return _fingerprint(path, path.stat().st_mtime_ns) if path.is_file() else ""


@cache
def _fingerprint(path: Path, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def trained(settings: Settings, path: Path, name: str, watch: Watch) -> nn.Module | None:
    """The network in eval mode: read from `path`, a safetensors file, or trained to the end and kept there.

    After every epoch there is a checkpoint beside it, from which an interrupted run goes on. A network of the
    same settings and seed, whatever it is called, is taken over: from this folder, or one beside it. None
    where it diverges, which is said of the name. Raises ValueError for a damaged checkpoint.
    """
    if not path.exists() and (same := _trained_alike(path)):
        once(path, lambda: write_bytes(path, same.read_bytes()))
    try:
        if not path.exists():
            _train(settings, path, watch.tick)
    except engine.Diverged as error:
        return watch.say(f"{name}: {error}")
    return engine.placed(efreg.load(build(settings)[0], path), settings).eval()


def _train(settings: Settings, path: Path, tick: Callable[[], None]) -> None:
    """With no epochs to go the first weights are taken as they are."""
    if not settings.epochs:
        first = build(settings, checkpoints.load_weights(settings.weights))[0]
        return once(path, lambda: efreg.save(first, path))
    checkpoint = path.with_suffix(".pt")
    run = engine.Run(settings, checkpoints.load(checkpoint) if checkpoint.exists() else None)
    for _ in run.kept(checkpoint):
        tick()
    once(path, lambda: efreg.save(run.model, path))
    checkpoint.unlink(missing_ok=True)


def _trained_alike(path: Path) -> Path | None:
    """A file whose name has the same end: seed and digest."""
    _, seed, digest = path.stem.rsplit("-", 2)
    return min(path.parent.parent.glob(f"*/*-{seed}-{digest}{path.suffix}"), default=None)


def once(path: Path, write: Callable[[], None]) -> None:
    """Has the first process write the file, if it is not there; the others wait for it."""
    with distributed.first_alone():
        if not path.exists():
            write()
