"""What a training run writes down as it goes: log.csv and TensorBoard events, one row an epoch."""

import csv
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from efreg.disk import replacing

Row = dict[str, float]
T = TypeVar("T")


class Log:
    """log.csv and tensorboard/ in the folder `out`, continued after the rows of `history`.

    The CSV is written whole each time, from the rows a checkpoint keeps, so a resumed run repeats none;
    TensorBoard is told to forget what it saw of later epochs.
    """

    def __init__(self, out: Path, history: list[Row]):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorBoard loads TensorFlow where it is
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.rows = out / "log.csv", list(history)
        self.writer = SummaryWriter(out / "tensorboard", purge_step=len(history) + 1)
        if history:
            write_csv(self.path, history)

    def add(self, row: Row) -> None:
        """Write the row of one epoch, whose number is `row["epoch"]`."""
        self.rows.append(row)
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(name, value, int(row["epoch"]))
        self.writer.flush()
        write_csv(self.path, self.rows)

    def close(self) -> None:
        self.writer.close()


def write_csv(path: str | Path, rows: Iterable[Any]) -> None:
    """Rows, dicts or dataclasses, under the names of all their keys; what a row lacks is left empty."""
    rows = [row if isinstance(row, dict) else asdict(row) for row in rows]
    names = dict.fromkeys(name for row in rows for name in row)
    with replacing(path, "w") as file:
        writer = csv.DictWriter(file, fieldnames=list(names))
        writer.writeheader()
        writer.writerows(rows)


def write_text(path: str | Path, text: str) -> None:
    """A page, or a table."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """A whole file, or nothing."""
    with replacing(path) as file:
        file.write(content)


def read_csv(path: str | Path, kind: type[T]) -> list[T]:
    """Rows that `write_csv` wrote, each as a dataclass of this kind; a missing column has its default.

    Raises ValueError for a damaged file.
    """
    try:
        columns = get_type_hints(kind)
        with open(path, newline="", encoding="utf-8") as file:
            return [
                kind(**{name: read(row[name]) for name, read in columns.items() if name in row})
                for row in csv.DictReader(file)
            ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): remove it, and it is made again") from error


def progress(console: Console) -> Progress:
    """Progress bars: what, how far, how long still, and a remark (`note`)."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
