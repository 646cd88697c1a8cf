"""Training runs known by what decides their weights: done once, gone on with after an interruption."""

import hashlib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import efreg
from efreg.lab import checkpoints, distributed, engine
from efreg.lab.checkpoints import Settings

Tick = Callable[[int], None]
"""Called with the number of epochs that are done since it was called last."""


def digest(settings: Settings, *more) -> str:
    """Eight letters that change with all that decides the weights a training ends with, and with `more`."""
    device = engine.device_named(settings.device)
    decisive = replace(
        settings,
        data="",
        weights=settings.weights and Path(settings.weights).name,
        device=device.type,
        precision=str(engine.dtype_of(settings.precision, device)),
    )
    chosen = [(f.name, getattr(decisive, f.name)) for f in fields(Settings)]
    text = repr([(name, value) for name, value in chosen if value != getattr(Settings(), name)] + [*more])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def stem(name: str, settings: Settings, *more) -> str:
    """What the files of a run are called: its name, the seed, and a digest of its settings and `more`."""
    for old, new in ((",", ""), ("α ", ""), ("= ", ""), ("(", ""), (")", ""), (" ", "-")):
        name = name.replace(old, new)
    return f"{name}-{settings.seed}-{digest(settings, *more)}"


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

    Raises as `resume` and `finish` do.
    """
    if path.exists():
        tick(settings.epochs)
        return
    checkpoint = path.with_suffix(".pt")
    run = resume(settings, checkpoint)
    finish(run, checkpoint, tick)
    once(path, lambda: efreg.save(run.model, path))
    checkpoint.unlink(missing_ok=True)


def once(path: Path, write: Callable[[], None]) -> None:
    """Has the first process write the file, if it is not there; the others wait for it."""
    with distributed.first_alone():
        if not path.exists():
            write()
