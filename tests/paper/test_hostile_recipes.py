"""Files of recipes that nobody meant: each is read, or refused by name."""

import copy
import dataclasses
import datetime
import json
import math

import pytest
from test_paper import MINE

from bench.paper import recipes
from efreg.lab.checkpoints import Settings

SETTINGS = [field.name for field in dataclasses.fields(Settings)]

ABSURD = {
    "huge": 10**400,
    "hugely negative": -(10**400),
    "negative": -1,
    "not a number": math.nan,
    "infinite": math.inf,
    "true": True,
    "empty": "",
    "another folder": "../../x",
    "NUL": "\0",
    "a strange law": "ladder:power=1e999",
    "ratios without end": "[0-" + "9" * 40 + ":0.5]",
    "a date": datetime.date(2020, 1, 1),
    "no entries": [],
    "lists": [[[]], {}],
    "a table": {"a": 1},
}

FILES = {
    "lists in lists": "a = " + "[" * 10**5,
    "tables in tables": "a = " + "{a = " * 10**5,
    "a name of names": f"[tiny]\ntitle.{'a.' * 3000}a = 1\nruns = []\ncuts = []",
    "a long number": "a = " + "9" * 5000,
    "a long number in a group": f"[tiny]\nseeds = 0x{'f' * 5000}\ntitle = ''\nruns = []\ncuts = []",
    "zeros": "\0" * 100,
    "half a sign": b"title = '\xc3'",
    "two of one name": "[tiny]\n[tiny]",
    "no day": "a = 2020-99-99",
}


def toml(value) -> str:
    """A value as TOML has it, whole numbers in hexadecimal digits, of which there may be any number."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return hex(value)
    return json.dumps(value) if isinstance(value, (bool, str)) else str(value)


def places(value, path=()):
    """The way to everything in a value, and to what its tables might have."""
    if isinstance(value, dict):
        more = recipes.GROUP if "runs" in value else [*recipes.LINE, "grid"]
        for key in dict.fromkeys([*value, *more, *SETTINGS] if path else value):
            yield (*path, key)
            yield from places(value.get(key), (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield (*path, i)
            yield from places(item, (*path, i))


def with_value(content, path, value):
    """The content with another value at this place."""
    content = copy.deepcopy(content)
    at = content
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return content


def read_or_refused(file) -> bool:
    """Whether the file is read; else it is named."""
    try:
        recipes.read(file)
    except ValueError as error:
        assert str(file) in str(error)
        return False
    return True


@pytest.mark.parametrize("value", ABSURD.values(), ids=ABSURD)
def test_an_absurd_value_is_read_or_refused_by_name(value, tmp_path):
    file, content = tmp_path / "mine.toml", recipes.tomllib.loads(MINE)
    for path in places(content):
        changed = with_value(content, path, value)
        file.write_text("\n".join(f"{json.dumps(key)} = {toml(group)}" for key, group in changed.items()))
        read_or_refused(file)


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_a_file_of_anything_else_is_refused_by_name(text, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert not read_or_refused(file)


@pytest.mark.parametrize(
    "old, new",
    [
        ("epochs = 2", "epochs = -1"),
        ("epochs = 2", "epochs = 2\nlr = nan"),
        ("epochs = 2", f"epochs = 0x{'f' * 400}"),
        ("cuts = [0.0,", "cuts = [2020-01-01,"),
        ("cuts = [0.0,", "cuts = [inf,"),
        ('name = "ladder"', 'name = "lad\\u0000der"'),
    ],
)
def test_numbers_and_names_that_cannot_be_are_refused(old, new, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(MINE)
    assert read_or_refused(file)
    file.write_text(MINE.replace(old, new))
    assert not read_or_refused(file)
