"""What a figure is: a row of a CSV file."""

import csv
import importlib.util
import os
import platform
import statistics
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

import efreg

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("what", "backend", "shape", "dtype", "p20", "p50", "p80", "unit", "device", "versions", "commit")


def row(
    what: str, backend: str, shape: str, values: list[float], unit: str, *, dtype="float32", on="cpu"
) -> dict:
    """A row of the 20th, 50th and 80th percentile of `values`, measured on a device of type `on`."""
    p20, p50, p80 = (statistics.quantiles(values, n=10)[i] for i in (1, 4, 7))
    return {
        "what": what,
        "backend": backend,
        "shape": shape,
        "dtype": dtype,
        "p20": f"{p20:.4g}",
        "p50": f"{p50:.4g}",
        "p80": f"{p80:.4g}",
        "unit": unit,
        "device": device(on),
        "versions": versions(on),
        "commit": commit(),
    }


def write(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@cache
def device(on: str) -> str:
    if on == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


@cache
def versions(on: str) -> str:
    known = f"efreg {efreg.__version__}, torch {torch.__version__}"
    if on == "cuda" and importlib.util.find_spec("triton"):
        known += f", triton {metadata.version('triton')}"
    return known


@cache
def commit() -> str:
    """EFREG_COMMIT, or what git says; a copy without its history does not know."""
    if told := os.environ.get("EFREG_COMMIT"):
        return told
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
