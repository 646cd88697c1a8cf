"""What every test shares: seeds, and which backends there are to test."""

import importlib.util
import os
import shutil
from typing import NoReturn

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on CPU tensors

import hypothesis
import pytest
import torch

from efreg import backends
from efreg.backends.native import BackendUnavailable
from efreg.force import attachment

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))

hypothesis.settings.register_profile("efreg", deadline=None)  # the first example may build the C++ operations
hypothesis.settings.load_profile("efreg")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CPU_BACKENDS = ["reference", "cpp", "triton"]


@pytest.fixture(scope="module", autouse=True)
def _quick_interpreter(request):
    """Triton's interpreter prepares a module at each call of its functions; once is enough, and 3× faster.

    A file of tests with INTERPRETER_AS_IT_IS does without.
    """
    as_it_is = getattr(request.module, "INTERPRETER_AS_IT_IS", False)
    if as_it_is or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    prepared = set()

    def call(function, *args, **kwargs):
        if function.fn.__module__ not in prepared:
            prepared.add(function.fn.__module__)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


@pytest.fixture(autouse=True)
def _fresh_start():
    """A fixed seed before, no force left after a test; one thread, which is faster for small networks."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_flush_denormal(False)  # the lab's engine flushes them for the whole process
    for force in tuple(attachment._attached):
        force.detach()


def missing(name: str, reason: str) -> NoReturn:
    """Skips a test of what is not here; fails where EFREG_REQUIRE names it."""
    if name in os.environ.get("EFREG_REQUIRE", "").split(","):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    """Chromium, as the system has it."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        missing("chromium", "no Chromium here to look at pages in: apt-get install chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    """Each backend that serves the CPU."""
    try:
        return backends.select(request.param, torch.device("cpu"))
    except BackendUnavailable as error:
        missing(request.param, str(error))


@pytest.fixture(scope="module")
def few_digits():
    """Every fourth of the digits: 337 and 113 images."""
    from efreg.lab import data

    parts = [(images[::4].clone(), labels[::4].clone()) for images, labels in data._load_digits()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_load_digits", lambda: parts)
        yield
