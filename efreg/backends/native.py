"""The compiled operations of csrc/: found prebuilt in the package, or built by ninja at first use."""

import hashlib
import importlib
import importlib.util
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

logger = logging.getLogger("efreg")

PACKAGE = Path(__file__).resolve().parents[1]
CSRC, KERNELS = PACKAGE / "csrc", PACKAGE / "kernels"


class Extension(NamedTuple):
    """A compiled module: its name among the backends, what it is made of, and what its sources include."""

    name: str
    sources: tuple[Path, ...]
    headers: tuple[Path, ...]


CPP = Extension(
    "cpp",
    (CSRC / "module.cpp", CSRC / "cpu" / "force.cpp"),
    (CSRC / "operations.h", CSRC / "electrostatic.h"),
)
CUDA = Extension(
    "cuda",
    (CSRC / "cuda" / "module.cpp", CSRC / "cuda" / "force.cu"),
    (CSRC / "cuda" / "launches.h", CSRC / "electrostatic.h"),
)


class BackendUnavailable(RuntimeError):
    """A backend was asked for that cannot be had here; the message says why."""


def compile_args(*, this_machine: bool = False) -> list[str]:
    """Flags for the compiler; with `this_machine` the code may use all that its processor can do."""
    if sys.platform == "win32":
        return ["/O2", "/std:c++20"]
    # Linking against OpenMP too would bring a second runtime beside torch's own.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    return ["-O3", "-std=c++20", "-ffp-contract=off", *openmp, *(["-march=native"] if this_machine else [])]


def nvcc_args() -> list[str]:
    """Flags for nvcc, where it is needed: products and sums are rounded one by one, as Triton's are."""
    return ["-O3", "-std=c++20", "--fmad=false"]


def module_name(extension: Extension) -> str:
    """`_cpp_` and a hash of versions, sources and flags: for another torch or source it is another module."""
    flags = (*compile_args(), *(nvcc_args() if extension is CUDA else ()))
    digest = hashlib.sha256(repr((torch.__version__, sys.version_info[:2], flags)).encode())
    for source in (*extension.headers, *extension.sources):
        digest.update(source.read_bytes())
    return f"_{extension.name}_{digest.hexdigest()[:12]}"


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def load_triton() -> ModuleType:
    """The Triton kernels. Raises BackendUnavailable."""
    _require(KERNELS / "force.py")
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("Triton is not installed (pip install triton)")
    return importlib.import_module("efreg.kernels.force")


def prebuilt(extension: Extension) -> str | None:
    """The full name of the module that was built ahead for this torch and these sources, if any."""
    name = f"efreg.{module_name(extension)}"
    return name if importlib.util.find_spec(name) else None


@cache
def load(extension: Extension) -> ModuleType:
    """The compiled module, built now where it was not built before. Raises BackendUnavailable."""
    _require(extension.sources[0])
    name = prebuilt(extension)
    try:
        return importlib.import_module(name) if name else _built_at_first_use(extension)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        doing = "loading" if name else "building"
        raise BackendUnavailable(
            f"{doing} the {extension.name} operations failed: {last_line(error)}"
        ) from error


def toolkit() -> Path:
    """The folder of the CUDA toolkit: CUDA_HOME, or where nvcc says that it is, be it a wrapper on the PATH.

    Raises BackendUnavailable.
    """
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if nvcc is None:
        raise BackendUnavailable(
            "the CUDA compiler nvcc is not here: install the CUDA toolkit or set CUDA_HOME"
        )
    told = subprocess.run([nvcc, "--dryrun", "nothing.cu"], capture_output=True, text=True).stderr
    here = re.search(r"_HERE_=(.+)", told)
    return Path(here[1]).parent if here else Path(nvcc).resolve().parent.parent


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


def _built_at_first_use(extension: Extension) -> ModuleType:
    """The module from its folder, which appears when its build is over: one killed midway leaves none."""
    from filelock import FileLock

    name = f"{module_name(extension)}_{_graphics() if extension is CUDA else _processor()}"
    folder = build_root() / name
    library = folder / f"{name}.{'pyd' if sys.platform == 'win32' else 'so'}"
    if not library.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not library.exists():
                return _build(extension, name, folder)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None  # the library's suffix is known
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _graphics() -> str:
    """What code for these graphics processors is known by."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    found = {".".join(map(str, capability)) for capability in capabilities}
    return re.sub(r"[^0-9a-z]+", "_", (asked or " ".join(sorted(found))).lower())


def _processor() -> str:
    """What code for this machine's processor is known by, where machines share a cache."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    features = sorted({line for line in lines if line.startswith(("flags", "Features"))} or lines[:1])
    return hashlib.sha256("".join(features).encode()).hexdigest()[:8]


def _build(extension: Extension, name: str, folder: Path) -> ModuleType:
    if extension is CUDA:
        os.environ["CUDA_HOME"] = str(toolkit())
    _leave_missing_devices_unsaid()
    from torch.utils import cpp_extension

    _put_ninja_on_path()
    logger.warning("building the %s operations into %s: once, about half a minute", extension.name, folder)
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    if extension is CUDA:
        cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]  # in case it was imported before
    module = cpp_extension.load(
        name,
        [str(source) for source in extension.sources],
        extra_cflags=compile_args(this_machine=True),
        extra_cuda_cflags=nvcc_args(),
        build_directory=str(unfinished),
        with_cuda=extension is CUDA,
    )
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    return module


def _leave_missing_devices_unsaid() -> None:
    """torch.utils.cpp_extension says when it is imported that a CUDA toolkit is here and no device."""
    known = logging.getLogger("torch.utils.cpp_extension")
    known.addFilter(lambda record: "No CUDA runtime" not in record.getMessage())


def _put_ninja_on_path() -> None:
    import ninja

    if ninja.BIN_DIR not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (ninja.BIN_DIR, os.environ.get("PATH"))))


def last_line(error: BaseException) -> str:
    """What of an error fits into a sentence."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
