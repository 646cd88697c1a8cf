"""The compiled operations of csrc/: found prebuilt in the package, or built by ninja at first use."""

import hashlib
import importlib
import importlib.util
import logging
import os
import platform
import shutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

logger = logging.getLogger("efreg")

CSRC, KERNELS = Path(__file__).parent / "csrc", Path(__file__).parent / "kernels"
CPU_SOURCES = (CSRC / "module.cpp", CSRC / "cpu" / "force.cpp")


class BackendUnavailable(RuntimeError):
    """A backend was asked for that cannot be had here; the message says why."""


def compile_args(*, this_machine: bool = False) -> list[str]:
    """Flags for the compiler; with `this_machine` the code may use all that its processor can do."""
    if sys.platform == "win32":
        return ["/O2", "/std:c++20"]
    # Linking against OpenMP too would bring a second runtime beside torch's own.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    return ["-O3", "-std=c++20", "-ffp-contract=off", *openmp, *(["-march=native"] if this_machine else [])]


def module_name() -> str:
    """`_cpp_` and a hash of versions, sources and flags: for another torch or source it is another module."""
    digest = hashlib.sha256(repr((torch.__version__, sys.version_info[:2], compile_args())).encode())
    for source in (CSRC / "force.h", *CPU_SOURCES):
        digest.update(source.read_bytes())
    return f"_cpp_{digest.hexdigest()[:12]}"


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def load_triton() -> ModuleType:
    """The Triton kernels. Raises BackendUnavailable."""
    _require(KERNELS / "force.py")
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("Triton is not installed (pip install triton)")
    return importlib.import_module("efreg.kernels.force")


def prebuilt() -> str | None:
    """The full name of the module that was built ahead for this torch and these sources, if any."""
    name = f"efreg.{module_name()}"
    return name if importlib.util.find_spec(name) else None


@cache
def load() -> ModuleType:
    """The compiled module, built now where it was not built before. Raises BackendUnavailable."""
    _require(CPU_SOURCES[0])
    name = prebuilt()
    try:
        return (
            importlib.import_module(name) if name else _built_at_first_use(f"{module_name()}_{_processor()}")
        )
    except (RuntimeError, OSError, ImportError) as error:
        doing = "loading" if name else "building"
        raise BackendUnavailable(f"{doing} the C++ operations failed: {last_line(error)}") from error


def _require(source: Path) -> None:
    if not source.exists():
        raise BackendUnavailable(
            f"{source} is not there: check out with symbolic links (git config core.symlinks true "
            "&& git checkout -- efreg/csrc efreg/kernels) or install from a wheel"
        )


def build_root() -> Path:
    """Where modules built at first use are kept: TORCH_EXTENSIONS_DIR, or the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")


def _built_at_first_use(name: str) -> ModuleType:
    """The module from its folder, which appears when its build is over: one killed midway leaves none."""
    from filelock import FileLock

    folder = build_root() / name
    library = folder / f"{name}.{'pyd' if sys.platform == 'win32' else 'so'}"
    if not library.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not library.exists():
                return _build(name, folder)
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _processor() -> str:
    """What code for this machine's processor is known by, where machines share a cache."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    features = sorted({line for line in lines if line.startswith(("flags", "Features"))} or lines[:1])
    return hashlib.sha256("".join(features).encode()).hexdigest()[:8]


def _build(name: str, folder: Path) -> ModuleType:
    from torch.utils import cpp_extension

    _put_ninja_on_path()
    logger.warning("building the C++ operations into %s: once, about half a minute", folder)
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    module = cpp_extension.load(
        name,
        [str(source) for source in CPU_SOURCES],
        extra_cflags=compile_args(this_machine=True),
        build_directory=str(unfinished),
    )
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    return module


def _put_ninja_on_path() -> None:
    import ninja

    if ninja.BIN_DIR not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (ninja.BIN_DIR, os.environ.get("PATH"))))


def last_line(error: BaseException) -> str:
    """What of an error fits into a sentence."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
