"""Training runs known by what decides their weights: done once, gone on with after an interruption."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

import efreg
from efreg.lab import checkpoints, data, distributed, engine
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


def require_weights(settings: Settings, weights: str | None, weights_from: str) -> None:
    """Raises data.Missing where the file of first weights is not in the folder of the data."""
    if weights and not Path(settings.data, weights).is_file():
        raise data.Missing(
            f"no {weights} in {settings.data}: put the public weights of {settings.model} there, from "
            f"{weights_from}"
        )


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
            f"another efreg paper works in {folder}: wait for it, or name another --out"
        ) from error
    finally:
        lock.release()


def resume(settings: Settings, path: Path) -> engine.Run:
    """The run as an interruption left it in `path`, or a new one. Raises ValueError for a damaged file."""
    return engine.Run(settings, _interrupted(path))


def _interrupted(path: Path) -> checkpoints.Checkpoint | None:
    if not path.exists():
        return None
    try:
        return checkpoints.load(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: remove it, and its run begins anew") from error


def finish(run: engine.Run, path: Path, tick: Tick) -> None:
    """Trains to the end, writing `path` after every epoch. Raises engine.Diverged."""
    tick(run.epoch)
    for _ in run.epochs():
        if distributed.rank() == 0:
            checkpoints.save(run.checkpoint(), path)
        tick(1)


def keep_network(settings: Settings, path: Path, tick: Tick) -> None:
    """Trains to the end and writes the network to `path`, a safetensors file; nothing where that is there.

    A network that the same settings gave to another command is taken over from its folder beside this one.
    Raises as `resume` and `finish` do.
    """
    if not path.exists() and (same := _trained_alike(path)):
        once(path, lambda: _copy(same, path))
    if path.exists():
        tick(settings.epochs)
        return
    checkpoint = path.with_suffix(".pt")
    run = resume(settings, checkpoint)
    finish(run, checkpoint, tick)
    once(path, lambda: efreg.save(run.model, path))
    checkpoint.unlink(missing_ok=True)


def _trained_alike(path: Path) -> Path | None:
    """A file in a folder beside this one's whose name has the same end: seed and digest."""
    _, seed, digest = path.stem.rsplit("-", 2)
    return next(iter(sorted(path.parent.parent.glob(f"*/*-{seed}-{digest}{path.suffix}"))), None)


def _copy(source: Path, path: Path) -> None:
    with checkpoints.replacing(path) as file:
        file.write(source.read_bytes())


def once(path: Path, write: Callable[[], None]) -> None:
    """Has the first process write the file, if it is not there; the others wait for it."""
    with distributed.first_alone():
        if not path.exists():
            write()
