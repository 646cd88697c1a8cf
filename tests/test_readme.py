"""The README is a tour of a page whose code runs."""

import re

import torch
from documents import ROOT, blocks, console_lines, run_blocks

import efreg
from efreg import cli

README = ROOT / "README.md"


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    """Each block goes on where the one before it ended, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    names = run_blocks(README)
    assert len(blocks(README)) >= 2
    x, small = names["x"], names["small"]
    fewer = efreg.macs(names["model"], x) / efreg.macs(small, x)
    assert f"{fewer:.2f} times fewer MACs" in README.read_text()
    assert "MACs" in capsys.readouterr().out
    halves = names["again"].state_dict()
    assert all(torch.equal(halves[key], value) for key, value in small.state_dict().items())
    assert names["again"].layer1[0].conv1.out_channels == 32


def test_console_lines_are_understood():
    """Every `efreg` line in the README is one that the console script takes."""
    commands = console_lines(README, "efreg")
    assert {command[0] for command in commands} == {"inspect", "prune", "train", "sweep"}
    for command in commands:
        cli._parser().parse_args(command)


def test_pictures_and_linked_files_are_there():
    text = README.read_text()
    for path in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (README.parent / path).stat().st_size > 10_000
    links = [path for path in re.findall(r"\]\((.*?)\)", text) if not path.startswith("https://")]
    assert len(links) > 5
    assert [path for path in links if not (README.parent / path).exists()] == []


def test_it_is_a_page():
    assert README.stat().st_size <= 6 * 1024
