"""What pyproject.toml cannot say: the C++ operations are built ahead where torch is importable.

EFREG_BUILD=auto (the default) builds them if torch and a compiler are there, `cpu` insists, `0` leaves them
to the first use.
"""

import importlib.util
import os
import shlex
import shutil
import warnings
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "0", "cpu")


def build_mode() -> str:
    mode = os.environ.get("EFREG_BUILD", "auto")
    if mode == "cuda":
        raise SystemExit("EFREG_BUILD=cuda: there are no CUDA sources yet; use auto, 0 or cpu")
    if mode not in MODES:
        raise SystemExit(f"EFREG_BUILD={mode}: expected one of {', '.join(MODES)}")
    return mode


def missing_tool() -> str | None:
    """What building ahead lacks here, with the remedy."""
    if importlib.util.find_spec("torch") is None:
        return "torch at build time (pip install --no-build-isolation)"
    from torch.utils.cpp_extension import get_cxx_compiler

    compiler = shlex.split(get_cxx_compiler())[0]
    return None if shutil.which(compiler) else f"the C++ compiler {compiler} (install it or set CXX)"


def native():
    """efreg/native.py, without importing the package."""
    spec = importlib.util.spec_from_file_location("efreg_native", ROOT / "efreg" / "native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extension() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    spec = native()
    module = CppExtension(
        f"efreg.{spec.module_name()}",
        [str(source.relative_to(ROOT)) for source in spec.CPU_SOURCES],
        extra_compile_args=spec.compile_args(),
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


def ahead() -> dict:
    """The arguments of setup() that build the extension; none where it is left to the first use."""
    mode = build_mode()
    lacking = None if mode == "0" else missing_tool()
    if lacking and mode == "cpu":
        raise SystemExit(f"EFREG_BUILD=cpu needs {lacking}")
    if lacking and "compiler" in lacking:
        warnings.warn(f"The C++ operations are not built ahead: this needs {lacking}.", stacklevel=2)
    return {} if mode == "0" or lacking else extension()


if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(f'setuptools {setuptools.__version__} is too old: pip install "setuptools>=77"')
if not (ROOT / "efreg" / "csrc").is_dir():
    raise SystemExit(
        "efreg/csrc is a symbolic link to csrc, and this checkout lost it. Restore it with\n"
        "    git config core.symlinks true && git checkout -- efreg/csrc"
    )

setuptools.setup(**ahead())
