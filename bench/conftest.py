"""Side by side measurements, and where their figures go: one CSV row each (`--csv FILE`)."""

import time
from pathlib import Path

import pytest
import rows


def pytest_addoption(parser):
    parser.addoption(
        "--csv", type=Path, default=rows.RESULTS / "cpu.csv", help="the file of results, written anew"
    )


def pytest_configure(config):
    config.rows = []


def pytest_sessionfinish(session):
    if session.config.rows:
        rows.write(session.config.getoption("--csv"), session.config.rows)


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
            add(rows.row(what, name, shape, [1e3 * s for s in seconds], "ms"))
            if name != relative_to:
                ratios = [a / b for a, b in zip(seconds, taken[relative_to][2:], strict=True)]
                add(rows.row(what, name, shape, ratios, f"{ratio} {relative_to}"))

    return measure


@pytest.fixture
def alone(request, benchmark):
    """Times one function: alone(what, backend, shape, function, rounds=n) writes a row of microseconds."""

    def measure(what, backend, shape, function, *, rounds):
        benchmark.pedantic(function, rounds=rounds, warmup_rounds=20)
        microseconds = [1e6 * seconds for seconds in benchmark.stats.stats.data]
        request.config.rows.append(rows.row(what, backend, shape, microseconds, "us"))

    return measure
