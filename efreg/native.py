"""The compiled operations of csrc/: found prebuilt in the package, or built by ninja at first use."""

import hashlib
import importlib
import importlib.util
import logging
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

logger = logging.getLogger("efreg")

CSRC = Path(__file__).parent / "csrc"
CPU_SOURCES = (CSRC / "module.cpp", CSRC / "cpu" / "force.cpp")


class BackendUnavailable(RuntimeError):
    """A backend was asked for that cannot be had here; the message says why."""


def compile_args() -> list[str]:
    # Linking against OpenMP too would bring a second runtime beside torch's own.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    return (
        ["/O2", "/std:c++20"]
        if sys.platform == "win32"
        else ["-O3", "-std=c++20", "-ffp-contract=off", *openmp]
    )


def module_name() -> str:
    """`_cpp_` and a hash of versions, sources and flags: for another torch or source it is another module."""
    digest = hashlib.sha256(repr((torch.__version__, sys.version_info[:2], compile_args())).encode())
    for source in (CSRC / "force.h", *CPU_SOURCES):
        digest.update(source.read_bytes())
    return f"_cpp_{digest.hexdigest()[:12]}"


def prebuilt() -> str | None:
    """The full name of the module that was built ahead for this torch and these sources, if any."""
    name = f"efreg.{module_name()}"
    return name if importlib.util.find_spec(name) else None


@cache
def load() -> ModuleType:
    """The compiled module, built now where it was not built ahead. Raises BackendUnavailable."""
    if not CPU_SOURCES[0].exists():
        raise BackendUnavailable(
            f"the C++ sources are not in {CSRC}: check out with symbolic links "
            "(git config core.symlinks true && git checkout -- efreg/csrc) or install from a wheel"
        )
    name = prebuilt()
    return importlib.import_module(name) if name else _build()


def _build() -> ModuleType:
    """Builds under a lock that dies with its process, so that a build killed midway blocks nobody."""
    from filelock import FileLock
    from torch.utils import cpp_extension

    _put_ninja_on_path()
    name = f"{module_name()}_{torch.backends.cpu.get_cpu_capability().lower().replace(' ', '_')}"
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    with FileLock(folder.with_suffix(".efreg-lock")):
        if not (folder / f"{name}.so").exists():
            logger.warning("building the C++ operations into %s: once, about half a minute", folder)
        (folder / "lock").unlink(missing_ok=True)
        try:
            return cpp_extension.load(
                name,
                [str(s) for s in CPU_SOURCES],
                extra_cflags=[*compile_args(), "-march=native"],
                build_directory=str(folder),
            )
        except (RuntimeError, OSError, ImportError) as error:
            raise BackendUnavailable(f"building the C++ operations failed: {_last_line(error)}") from error


def _put_ninja_on_path() -> None:
    import ninja

    if ninja.BIN_DIR not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (ninja.BIN_DIR, os.environ.get("PATH"))))


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
