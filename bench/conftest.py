"""Side by side measurements, and where their figures go: one CSV row each (`--csv FILE`)."""

import csv
import platform
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import torch

import efreg

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("what", "backend", "shape", "dtype", "p20", "p50", "p80", "unit", "device", "versions", "commit")


def pytest_addoption(parser):
    parser.addoption(
        "--csv", type=Path, default=RESULTS / "cpu.csv", help="the file of results, written anew"
    )


def pytest_configure(config):
    config.rows = []


def pytest_sessionfinish(session):
    if session.config.rows:
        with session.config.getoption("--csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(session.config.rows)


@pytest.fixture
def side_by_side(request, benchmark):
    """Times several functions in turns, so that whatever the machine does falls on all of them.

    side_by_side(what, shape, {name: function, ...}, relative_to=name, rounds=n) writes a row of milliseconds
    for each function, and a row of ratios, paired round by round, for each but `relative_to`.
    """

    def measure(what, shape, functions, *, relative_to, rounds, ratio="x"):
        taken = {name: [] for name in functions}

        def one_round():
            for name, function in functions.items():
                function()  # untimed: what ran before it left other code and data in the caches
                start = time.perf_counter()
                function()
                taken[name].append(time.perf_counter() - start)

        benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=2)
        add = request.config.rows.append
        for name, seconds in taken.items():
            seconds = seconds[2:]
            add(_row(what, name, shape, [1e3 * s for s in seconds], "ms"))
            if name != relative_to:
                ratios = [a / b for a, b in zip(seconds, taken[relative_to][2:], strict=True)]
                add(_row(what, name, shape, ratios, f"{ratio} {relative_to}"))

    return measure


def _row(what, backend, shape, values, unit):
    p20, p50, p80 = (statistics.quantiles(values, n=10)[i] for i in (1, 4, 7))
    figures = {"p20": f"{p20:.4g}", "p50": f"{p50:.4g}", "p80": f"{p80:.4g}"}
    where = {
        "device": _device(),
        "versions": f"efreg {efreg.__version__}, torch {torch.__version__}",
        "commit": _commit(),
    }
    return {
        "what": what,
        "backend": backend,
        "shape": shape,
        "dtype": "float32",
        "unit": unit,
        **figures,
        **where,
    }


def _device():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def _commit():
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
