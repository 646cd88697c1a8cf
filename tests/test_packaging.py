"""What a user installs and imports: light, complete, and made of modules that know each other one way."""

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "efreg"
LINKS = ("csrc", "kernels")
TEST_COMMAND = 'pip install -e ".[test]" && pytest'
DEMO_COMMAND = 'pip install ".[lab]" && efreg demo'


def run_python(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **options
    )


def test_import_brings_torch_only():
    """`import efreg` adds no other package, and nothing of torch that pulls Triton or a compiler in."""
    added = run_python(
        "import sys, torch; before = set(sys.modules); import efreg; print(*(set(sys.modules) - before))",
        cwd=ROOT,
    )
    assert added.returncode == 0, added.stderr
    modules = set(added.stdout.split())
    packages = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    assert packages <= {"efreg", "torch"}
    assert not modules & {"efreg.lab", "efreg.cli", "torch.utils.cpp_extension", "torch.utils.flop_counter"}


def imports(path: Path) -> set[str]:
    """Full names of the modules of efreg that a source file imports, at its top or inside a function."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join(filter(None, (*up, node.module)))
            found |= {module_of(f"{base}.{alias.name}") or base for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "efreg"}


def module_of(name: str) -> str | None:
    path = ROOT.joinpath(*name.split("."))
    return name if path.with_suffix(".py").is_file() or (path / "__init__.py").is_file() else None


def graph() -> dict[str, set[str]]:
    """Module -> the modules of efreg that it imports, for all of efreg/."""
    files = [path for path in PACKAGE.rglob("*.py") if "csrc" not in path.parts]
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }
    return {name: imports(path) for name, path in names.items()}


def on_top(name: str) -> bool:
    return name.split(".")[1:2] in (["lab"], ["cli"], ["__main__"])


def test_imports_go_one_way():
    """No cycle, counting the package's own __init__; nothing of the library knows the programs on top."""
    modules = graph()
    tuple(graphlib.TopologicalSorter(modules).static_order())  # raises CycleError
    assert {name for name, known in modules.items() if not on_top(name) and any(map(on_top, known))} == set()
    assert "efreg.force.attachment" not in modules["efreg.force.penalty"]
    pruning = {name: known for name, known in modules.items() if name.startswith("efreg.pruning")}
    for name, known in pruning.items():
        others = {other for other in known if not other.startswith("efreg.pruning")}
        assert others <= {"efreg.groups", "efreg.disk"}, name
    force = {
        name: known for name, known in modules.items() if name.startswith(("efreg.force", "efreg.backends"))
    }
    for name, known in force.items():
        assert all(
            other.startswith(("efreg.force", "efreg.backends", "efreg.groups", "efreg.kernels"))
            for other in known
        ), name


@pytest.mark.parametrize("name", ["efreg.backends.reference", "efreg.force.laws", "efreg.groups"])
def test_the_definition_stands_alone(name):
    assert not graph()[name]


def test_programs_use_public_names_only():
    """The lab and the console script see what a user sees; `efreg.env` is the text of `efreg env`, and files
    are written in the one way of `efreg.disk`.
    """
    for name, known in graph().items():
        if on_top(name):
            seen = {other for other in known if not on_top(other)}
            assert seen <= {"efreg", "efreg.env", "efreg.disk"}, name


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_dependencies():
    """The library needs nothing of the lab; the tests need the lab."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert names(project["dependencies"]) == {
        "torch",
        "numpy",
        "safetensors",
        "ninja",
        "filelock",
    }
    extras = project["optional-dependencies"]
    assert not names(extras["lab"]) & names(project["dependencies"])
    assert "efreg[lab]" in extras["test"]


def test_readme_and_ci_run_the_same_commands():
    readme = (ROOT / "README.md").read_text()
    assert TEST_COMMAND in readme
    assert DEMO_COMMAND in readme
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text()


def test_kernels_know_nothing_of_efreg():
    for source in (ROOT / "kernels").glob("*.py"):
        assert not imports(source), source


@pytest.mark.parametrize("link", LINKS)
def test_sources_are_linked_into_the_package(link):
    """A symbolic link, to git as well: a copy would drift."""
    assert os.readlink(PACKAGE / link) == f"../{link}"
    if (ROOT / ".git").exists():
        tracked = subprocess.run(
            ["git", "ls-files", "-s", f"efreg/{link}"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert tracked.stdout.startswith("120000 ")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what a build reads."""
    for name in (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
    ):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("efreg", *LINKS, "tests"):
        shutil.copytree(
            ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    return tmp_path


def build(folder: Path, what: str, mode: str = "0") -> subprocess.CompletedProcess:
    """Builds into folder/dist as pip does without isolation; the file's name is the last word printed."""
    code = f"from setuptools import build_meta; print(build_meta.build_{what}('dist'))"
    return run_python(code, cwd=folder, env={**os.environ, "EFREG_BUILD": mode})


def contents(folder: Path, result: subprocess.CompletedProcess) -> set[str]:
    assert result.returncode == 0, result.stderr
    with zipfile.ZipFile(folder / "dist" / result.stdout.split()[-1]) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_wheel_carries_the_library_and_its_sources(checkout):
    """Every module, kernel, C++ and CUDA source, page and py.typed; no test, bench or data."""
    sources = [path for link in LINKS for path in (PACKAGE / link).rglob("*")]
    kept = {
        path for path in [*PACKAGE.rglob("*.py"), *sources] if path.suffix in (".py", ".h", ".cpp", ".cu")
    }
    expected = {path.relative_to(ROOT).as_posix() for path in kept}
    expected |= {"efreg/py.typed", "efreg/pruning/page.html"}
    assert {"efreg/csrc/cpu/force.cpp", "efreg/csrc/cuda/force.cu", "efreg/kernels/force.py"} <= expected
    assert contents(checkout, build(checkout, "wheel")) == expected


def test_wheel_can_be_built_from_the_sdist(checkout):
    sdist = build(checkout, "sdist")
    assert sdist.returncode == 0, sdist.stderr
    shutil.unpack_archive(checkout / "dist" / sdist.stdout.split()[-1], checkout / "unpacked")
    (unpacked,) = (checkout / "unpacked").iterdir()
    assert contents(unpacked, build(unpacked, "wheel")) == contents(checkout, build(checkout, "wheel"))


@pytest.mark.parametrize("link", LINKS)
def test_lost_link_names_the_remedy(checkout, link):
    """Zip archives and Windows checkouts leave a text file where the link was."""
    (checkout / "efreg" / link).unlink()
    (checkout / "efreg" / link).write_text(f"../{link}")
    result = build(checkout, "wheel")
    assert result.returncode != 0
    assert f"git config core.symlinks true && git checkout -- efreg/{link}" in result.stderr


def test_unknown_build_mode_is_refused(checkout):
    result = build(checkout, "wheel", "gpu")
    assert result.returncode != 0
    assert "EFREG_BUILD=gpu" in result.stderr


def test_missing_compiler(checkout, monkeypatch):
    """`auto` warns and leaves the operations to the first use, `cpu` refuses."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    automatic = build(checkout, "wheel", "auto")
    assert automatic.returncode == 0
    assert "no-such-compiler" in automatic.stderr
    assert "py3-none-any" in automatic.stdout
    insisted = build(checkout, "wheel", "cpu")
    assert insisted.returncode != 0
    assert "no-such-compiler" in insisted.stderr


@pytest.mark.slow
def test_extension_is_built_ahead(checkout):
    """The wheel holds the module under the name by which the library looks for it."""
    built = {name for name in contents(checkout, build(checkout, "wheel", "cpu")) if name.endswith(".so")}
    name = run_python(
        "from efreg.backends import native; print(native.module_name(native.CPP))", cwd=checkout
    ).stdout.strip()
    assert {path.partition(".")[0] for path in built} == {f"efreg/{name}"}
