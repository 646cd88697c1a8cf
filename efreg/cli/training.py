"""Training at the console: progress bars, logs, and a checkpoint an epoch to go on from."""

from contextlib import closing
from pathlib import Path

from rich.console import Console

import efreg
from efreg.lab import checkpoints, distributed, engine
from efreg.lab.checkpoints import Settings
from efreg.lab.logs import Log, Row, progress

CHECKPOINT = "checkpoint.pt"


def train(
    settings: Settings | None,
    out: str | Path,
    *,
    resume: bool = False,
    download: bool = False,
    console: Console,
) -> None:
    """Trains as `settings` say, or goes on with the run in the folder `out`.

    Where torchrun has started several processes, they train together, and the first alone writes and prints.
    Writes checkpoint.pt and log.csv after every epoch, TensorBoard events beside them, and model.safetensors
    at the end. Raises ValueError or FileNotFoundError before anything is trained, engine.Diverged where the
    loss is no longer finite; the last checkpoint stays.
    """
    out = Path(out)
    path = out / CHECKPOINT
    if path.exists() and not resume:
        raise ValueError(f"{path} is there already: go on with --resume, or choose another --out")
    if resume and not path.exists():
        raise FileNotFoundError(
            f"no run in {out} to go on with: name its folder with --out, or drop --resume"
        )
    checkpoint = checkpoints.load(path) if resume else None
    settings = checkpoint.settings if checkpoint else settings
    assert settings is not None  # None stands for those of the checkpoint
    with distributed.processes(settings.device):
        run = engine.Run(settings, checkpoint, download=download)
        if distributed.rank():
            for _ in run.epochs():
                pass
            return
        with distributed.alone(out):
            _record(run, out, console)


def _record(run: engine.Run, out: Path, console: Console) -> None:
    """Trains, writing to `out`."""
    console.print(f"{run.force}", highlight=False)
    dtype = str(run.dtype).removeprefix("torch.")
    console.print(f"{dtype} on {engine.computer(run.device)}", highlight=False)
    _train(run, out, console)
    efreg.save(run.model, out / "model.safetensors")
    console.print(
        f"Written to {out}: {CHECKPOINT}, log.csv, tensorboard/, model.safetensors", highlight=False
    )


def _train(run: engine.Run, out: Path, console: Console) -> None:
    steps = engine.steps_per_epoch(run.data.train, run.settings)
    with closing(Log(out, run.history)) as log, progress(console) as bar:
        task = bar.add_task(
            "training", total=run.settings.epochs * steps, completed=run.epoch * steps, note=""
        )
        for row in run.kept(out / CHECKPOINT, lambda: bar.advance(task)):
            log.add(row)
            bar.update(task, note=_note(row, "held out" if run.settings.held_out else "test"))


def _note(row: Row, images: str) -> str:
    """What the progress bar says of an epoch; `images` are those that its accuracy is of."""
    note = f"loss {row['loss']:.3f}, {images} {row['test_accuracy']:.1f} %, {row['near_zero']:.0f} near zero"
    return f"{note}, {row['dead']:.0f} dead, {row['macs'] / 1e6:.1f} M MACs left"
