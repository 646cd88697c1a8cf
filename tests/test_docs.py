"""The pages of docs/: their code runs, and a browser that opens each of them has nothing to complain of."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
import torch
from documents import ROOT, blocks, console_lines, run_blocks

import efreg
from efreg import cli

PAGES = sorted((ROOT / "docs").glob("*.md"))
PHONE = {"width": 390, "height": 844}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    """Each block goes on where the one before it ended, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    names = run_blocks(page)
    assert isinstance(names["model"], torch.nn.Module)


def test_console_lines_are_understood():
    """Every `efreg` line is one that the console script takes, and every command is shown."""
    lines = [line for page in PAGES for line in console_lines(page, "efreg")]
    for line in lines:
        cli._parser().parse_args(line)
    assert {command.name for command in cli.COMMANDS} == {line[0] for line in lines}


@dataclass(frozen=True)
class Visit:
    """What a browser found on a page.

    complaints: of its console, and requests that failed or went to a network. pictures: that are missing.
    links: addresses, whole. ids: what a link can point to. overflow: pixels that the page is wider than the
    phone. raw: text that is markup which nobody rendered.
    """

    address: str
    complaints: list[str]
    pictures: list[str]
    links: list[str]
    ids: set[str]
    overflow: int
    raw: list[str]


MISSING_PICTURES = """
    async () => {
        const missing = [];
        for (const picture of document.images) {
            picture.loading = "eager";
            await picture.decode().catch(() => missing.push(picture.src));
        }
        return missing;
    }"""

OVERFLOW = """
    () => Math.max(...[document.documentElement, document.querySelector(".content")]
        .map(element => element.scrollWidth - element.clientWidth))"""

RAW_MARKUP = """
    () => [...document.querySelectorAll("article p, article li, article td, article dd")]
        .map(element => {
            const prose = element.cloneNode(true);
            prose.querySelectorAll("code, pre").forEach(code => code.remove());
            return prose.textContent;
        })
        .filter(text => /`|\\]\\(|\\*\\*|\\{doc\\}/.test(text))"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the pages as `make docs` builds them."""
    out = tmp_path_factory.mktemp("docs")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    built = subprocess.run(
        ["make", "docs", f"DOCS={out}"],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode:
        pytest.fail(f'make docs failed (it needs pip install -e ".[docs]"):\n{built.stdout}{built.stderr}')
    return out


@pytest.fixture(scope="module")
def visits(site, browser) -> list[Visit]:
    """Every page, opened on a phone."""
    phone = browser.new_context(viewport=PHONE)
    return [visit(phone, path.as_uri()) for path in sorted(site.rglob("*.html"))]


def visit(phone, address: str) -> Visit:
    page = phone.new_page()
    complaints = []
    page.on("console", lambda said: said.type in ("error", "warning") and complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"cannot be had: {request.url}"))
    page.on("request", lambda request: is_far(request.url) and complaints.append(f"asks {request.url}"))
    page.goto(address)
    found = Visit(
        address,
        complaints,
        pictures=page.evaluate(MISSING_PICTURES),
        links=page.eval_on_selector_all("a[href]", "links => links.map(link => link.href)"),
        ids=set(page.eval_on_selector_all("[id]", "elements => elements.map(element => element.id)")),
        overflow=page.evaluate(OVERFLOW),
        raw=page.evaluate(RAW_MARKUP),
    )
    page.close()
    return found


def is_far(address: str) -> bool:
    return not address.startswith(("file:", "data:"))


@pytest.mark.slow
def test_every_page_is_built(site):
    names = {page.stem for page in PAGES}
    names |= {f"tables/{table.stem}" for table in (ROOT / "bench" / "results").glob("*.md")}
    assert names <= {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}


@pytest.mark.slow
def test_the_api_has_every_public_name(visits):
    (api,) = (visit for visit in visits if visit.address.endswith("/api.html"))
    names = {f"efreg.{name}" for name in efreg.__all__} - {"efreg.schedules"}
    names |= {f"efreg.schedules.{name}" for name in ("constant", "warmup", "cosine", "linear")}
    assert names - api.ids == set()


@pytest.mark.slow
def test_the_console_is_silent_and_no_network_is_asked(visits):
    assert {visit.address: visit.complaints for visit in visits if visit.complaints} == {}


@pytest.mark.slow
def test_no_picture_is_missing(visits):
    assert {visit.address: visit.pictures for visit in visits if visit.pictures} == {}


@pytest.mark.slow
def test_no_link_is_broken(visits):
    """Within the pages: the file is there, and what the fragment names in it."""
    ids = {visit.address: visit.ids for visit in visits}
    broken = {visit.address: [link for link in visit.links if is_broken(link, ids)] for visit in visits}
    assert {address: links for address, links in broken.items() if links} == {}


def is_broken(link: str, ids: dict[str, set[str]]) -> bool:
    address, fragment = urldefrag(link)
    parts = urlsplit(address)
    if parts.scheme != "file":
        return False
    there = Path(unquote(parts.path)).is_file()
    return not there or (bool(fragment) and unquote(fragment) not in ids[parts._replace(query="").geturl()])


@pytest.mark.slow
def test_no_page_is_wider_than_a_phone(visits):
    assert {visit.address: visit.overflow for visit in visits if visit.overflow > 0} == {}


@pytest.mark.slow
def test_all_markup_is_rendered(visits):
    assert {visit.address: visit.raw for visit in visits if visit.raw} == {}
