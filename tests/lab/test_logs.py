"""The log of a training: a CSV of all its epochs, whatever each of them has."""

import csv

import pytest

from efreg.lab.logs import Log


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path, [{"epoch": 1, "loss": 2.0}])
    yield log
    log.close()


def test_epochs_logged_before_a_figure_was_there_leave_it_empty(log, tmp_path):
    """A training that goes on from an older checkpoint."""
    log.add({"epoch": 2, "loss": 1.0, "dead": 3})
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert rows == [{"epoch": "1", "loss": "2.0", "dead": ""}, {"epoch": "2", "loss": "1.0", "dead": "3"}]
