"""Training runs known by what decides their weights: done once, gone on with after an interruption."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

import efreg
from efreg.lab import checkpoints, distributed, engine
from efreg.lab.checkpoints import Settings

Tick = Callable[[int], None]
"""Called with the number of epochs that are done since it was called last."""


def digest(settings: Settings, *more) -> str:
    """Eight letters that change with all that decides the weights a training ends with, and with `more`.

    Where the data lies does not, unless it is a folder of images; the number of processes does.
    """
    device = engine.device_named(settings.device)
    decisive = replace(
        settings,
        data=str(Path(settings.data).resolve()) if settings.dataset == "imagefolder" else "",
        weights=settings.weights and Path(settings.weights).name,
        distil=settings.distil and Path(settings.distil).name,
        device=device.type,
        precision=str(engine.dtype_of(settings.precision, device)),
    )
    chosen = [(f.name, getattr(decisive, f.name)) for f in fields(Settings)]
    told = [(name, value) for name, value in chosen if value != getattr(Settings(), name)] + [*more]
    if distributed.world_size() > 1:
        told.append(("processes", distributed.world_size()))
    return hashlib.sha256(repr(told).encode()).hexdigest()[:8]


def stem(name: str, settings: Settings, *more) -> str:
    """What the files of a run are called: its name, the seed, and a digest of its settings and `more`."""
    for old, new in ((",", ""), ("α ", ""), ("= ", ""), ("(", ""), (")", ""), (" ", "-")):
        name = name.replace(old, new)
    return f"{name}-{settings.seed}-{digest(settings, *more)}"


def fingerprint(path: str | Path) -> str:
    """Of a file's content; empty where there is no such file."""
    path = Path(path)
    return _fingerprint(path, path.stat().st_mtime_ns) if path.is_file() else ""


@cache
def _fingerprint(path: Path, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """While no other command works in the folder. Raises ValueError where one does."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        if distributed.rank() == 0:
            lock.acquire(blocking=False)
        yield
    except Timeout as error:
        raise ValueError(
            f"another bench.paper works in {folder}: wait for it, or name another --out"
        ) from error
    finally:
        lock.release()


def keep_network(settings: Settings, path: Path, tick: Tick) -> None:
    """Trains to the end and writes the network to `path`, a safetensors file; nothing where that is there.

    After every epoch there is a checkpoint beside it, from which an interrupted run goes on. A network of the
    same settings and seed, whatever it is called, is taken over: from this folder, or one beside it.
    Raises engine.Diverged, and ValueError for a damaged checkpoint.
    """
    if not path.exists() and (same := _trained_alike(path)):
        once(path, lambda: _copy(same, path))
    if path.exists():
        return tick(settings.epochs)
    checkpoint = path.with_suffix(".pt")
    run = engine.Run(settings, _interrupted(checkpoint))
    tick(run.epoch)
    for _ in run.epochs():
        if distributed.rank() == 0:
            checkpoints.save(run.checkpoint(), checkpoint)
        tick(1)
    once(path, lambda: efreg.save(run.model, path))
    checkpoint.unlink(missing_ok=True)


def _trained_alike(path: Path) -> Path | None:
    """A file whose name has the same end: seed and digest."""
    _, seed, digest = path.stem.rsplit("-", 2)
    return next(iter(sorted(path.parent.parent.glob(f"*/*-{seed}-{digest}{path.suffix}"))), None)


def _copy(source: Path, path: Path) -> None:
    with checkpoints.replacing(path) as file:
        file.write(source.read_bytes())


def _interrupted(path: Path) -> checkpoints.Checkpoint | None:
    if not path.exists():
        return None
    try:
        return checkpoints.load(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: remove it, and its run begins anew") from error


def once(path: Path, write: Callable[[], None]) -> None:
    """Has the first process write the file, if it is not there; the others wait for it."""
    with distributed.first_alone():
        if not path.exists():
            write()
