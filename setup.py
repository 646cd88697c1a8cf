"""What pyproject.toml cannot say: the C++ operations are built ahead where torch is importable.

EFREG_BUILD=auto (the default) builds the C++ operations if torch and a compiler are there, `cpu` insists,
`cuda` insists and builds the CUDA operations too, `0` leaves all to the first use.
"""

import importlib.util
import os
import shlex
import shutil
import warnings
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "0", "cpu", "cuda")


def build_mode() -> str:
    mode = os.environ.get("EFREG_BUILD", "auto")
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
    """efreg/backends/native.py, without importing the package."""
    spec = importlib.util.spec_from_file_location("efreg_native", ROOT / "efreg" / "backends" / "native.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extensions(*, cuda: bool) -> dict:
    spec = native()
    if cuda:
        try:
            os.environ["CUDA_HOME"] = str(spec.toolkit())
        except spec.BackendUnavailable as error:
            raise SystemExit(f"EFREG_BUILD=cuda: {error}") from error
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    if cuda:
        cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]  # which it looked for when it was imported

    def module(make, of, arguments):
        sources = [str(source.relative_to(ROOT)) for source in of.sources]
        return make(f"efreg.{spec.module_name(of)}", sources, extra_compile_args=arguments)

    modules = [module(CppExtension, spec.CPP, spec.compile_args())]
    if cuda:
        arguments = {"cxx": spec.compile_args(), "nvcc": spec.nvcc_args()}
        modules.append(module(CUDAExtension, spec.CUDA, arguments))
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildExtension}}


def ahead() -> dict:
    """The arguments of setup() that build the extension; none where it is left to the first use."""
    mode = build_mode()
    lacking = None if mode == "0" else missing_tool()
    if lacking and mode in ("cpu", "cuda"):
        raise SystemExit(f"EFREG_BUILD={mode} needs {lacking}")
    if lacking and "compiler" in lacking:
        warnings.warn(f"The C++ operations are not built ahead: this needs {lacking}.", stacklevel=2)
    return {} if mode == "0" or lacking else extensions(cuda=mode == "cuda")


if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(f'setuptools {setuptools.__version__} is too old: pip install "setuptools>=77"')
for link in ("csrc", "kernels"):
    if not (ROOT / "efreg" / link).is_dir():
        raise SystemExit(
            f"efreg/{link} is a symbolic link to {link}, and this checkout lost it. Restore it with\n"
            f"    git config core.symlinks true && git checkout -- efreg/{link}"
        )

setuptools.setup(**ahead())
