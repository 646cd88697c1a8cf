"""What tests of README and of the pages in docs/ share: their code and the lines for the console."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_blocks(page: Path) -> dict:
    """Runs the page's python blocks, each going on where the one before it ended. Returns their names."""
    names = {"__name__": page.stem}
    for number, block in enumerate(blocks(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    return names


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def console_lines(page: Path, program: str) -> list[list[str]]:
    """The words behind a program's name on each indented line that runs it, also as a module of Python's."""
    text = re.sub(r"\\\n *", "", page.read_text())
    lines = re.findall(rf"^    (?:(?:python|torchrun .*) -m )?{re.escape(program)} (.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]
