"""The command line of the experiments: what it takes, says and returns."""

import pytest
from documents import ROOT, console_lines

from bench.paper import __main__ as console
from bench.paper import reproduce


def test_lines_of_the_documentation_are_understood():
    lines = console_lines(ROOT / "docs" / "results.md", "bench.paper")
    told = [console._parser().parse_args(line) for line in lines]
    assert {"forces", "speedups", "table4", "table6", "figure2"} <= {one.what for one in told}


def test_bad_input_gets_one_line(tmp_path, capsys):
    assert console.main(["table4", "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "bench.paper: error: seeds is 0: it must be at least 1\n"
    with pytest.raises(ValueError, match="seeds is 0"):
        console.main(["table4", "--seeds", "0", "--out", str(tmp_path), "--verbose"])


def test_what_was_interrupted_can_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "run", interrupted)
    assert console.main(["table4", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "bench.paper: interrupted; the same command goes on from here\n"
