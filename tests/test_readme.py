"""The README is a tour whose code runs."""

import re
import shlex
from pathlib import Path

import torch

from efreg import cli

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    """Each block goes on where the one before it ended, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert len(blocks) >= 4
    assert "MACs" in capsys.readouterr().out
    halves = names["again"].state_dict()
    assert all(torch.equal(halves[key], value) for key, value in names["small"].state_dict().items())
    assert names["again"].layer1[0].conv1.out_channels == 8


def test_console_lines_are_understood():
    """Every `efreg` line in the README is one that the console script takes."""
    lines = re.findall(r"^    (efreg .*)$", README.read_text(), re.MULTILINE)
    commands = [shlex.split(line, comments=True)[1:] for line in lines]
    assert {command[0] for command in commands} == {
        "inspect",
        "plan",
        "prune",
        "train",
        "sweep",
        "report",
        "paper",
    }
    for command in commands:
        cli._parser().parse_args(command)


def test_the_pictures_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README.read_text()):
        assert (README.parent / path).stat().st_size > 10_000
