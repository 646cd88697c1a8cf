"""The experiments under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = """
[tiny]
title = "ResNet-14, digits"
shown = ["table4"]
model = "resnet14"
dataset = "digits"
batch_size = 256
epochs = 1
cuts = [0.5]
fine_tune = { schedule = "p2", epochs = 1 }
runs = [
  { name = "dense" },
  { name = "ladder", start = "dense", law = "ladder", alpha = 0.1, scope = "filter", update = "proximal" },
]
"""


@pytest.mark.slow
def test_torchrun_makes_a_table_once(tmp_path):
    """And takes over what is there."""
    (tmp_path / "mine.toml").write_text(RECIPES)
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
    line = f"{torchrun} -m bench.paper table4 --recipes mine.toml --seeds 1 --device cpu --out paper"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    for _ in range(2):
        found = subprocess.run(
            line.split(), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )
        assert found.returncode == 0, found.stderr
        assert found.stdout.count("Written to paper: table4.md, table4.csv") == 1
    table = (tmp_path / "paper" / "table4.md").read_text(encoding="utf-8")
    assert table.count("digits: ladder** |") == table.count("digits: dense** |") == 1
    left = sorted(path.suffix for path in (tmp_path / "paper" / "runs").glob("tiny*"))
    assert left == [".csv"] * 2 + [".safetensors"] * 6
