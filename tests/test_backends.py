"""Which backend serves, how the C++ operations come to be, and what happens where they cannot."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import efreg
from efreg import backends
from efreg.backends import native
from efreg.backends.rows import Groups, Rows

CPU = torch.device("cpu")


def run(code, folder, **environment):
    """A fresh interpreter with a build folder of its own."""
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=280)


def test_auto_takes_cpp_on_the_cpu():
    assert backends.select("auto", CPU).name == "cpp"


def test_the_environment_chooses_for_auto_alone(monkeypatch):
    monkeypatch.setenv("EFREG_BACKEND", "reference")
    assert backends.select("auto", CPU).name == "reference"
    assert backends.select("cpp", CPU).name == "cpp"
    monkeypatch.setenv("EFREG_BACKEND", "abacus")
    with pytest.raises(ValueError, match="unknown backend .abacus.: there are auto, triton, cuda, cpp, ref"):
        backends.select("auto", CPU)


def test_a_backend_that_does_not_serve_the_device_is_refused():
    with pytest.raises(efreg.BackendUnavailable, match="'cpp' serves cpu; the weights are on cuda:0"):
        backends.select("cpp", torch.device("cuda", 0))
    with pytest.raises(efreg.BackendUnavailable, match="'triton' serves cpu while TRITON_INTERPRET is set"):
        backends.select("triton", torch.device("cuda", 0))
    assert backends.select("auto", torch.device("cuda", 0)).name == "reference"


def test_without_a_compiler_the_reference_serves_after_one_warning(tmp_path):
    code = """
import efreg, torch
from torch import nn
net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
for _ in range(2):
    print(efreg.attach(net, 1e-12))
try:
    efreg.attach(net, 1e-12, backend="cpp")
except efreg.BackendUnavailable as error:
    print("refused:", error)
"""
    done = run(code, tmp_path, CXX="no-such-compiler", CC="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("backend=reference") == 2
    assert "refused:" in done.stdout
    assert done.stderr.count("cannot be had") == 1, done.stderr


WITHOUT_CPP = """
import efreg, torch
from torch import nn
net = nn.Sequential(nn.Conv2d(1, 2, 3))
print(efreg.attach(net, 1e-12))
net[0].weight.grad = torch.zeros_like(net[0].weight)
torch.optim.SGD(net.parameters(), lr=0.1).step()
print("pulled", bool(net[0].weight.grad.any()))
"""
READ_ONLY = """
import errno, os, pathlib
def refuse(self, *args, **options):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
pathlib.Path.mkdir = refuse
"""


def failing_compiler(folder):
    """It says its name and no more."""
    compiler = folder / "c++"
    compiler.write_text("#!/bin/sh\ncase $1 in -*) echo 'g++ 13.0' && exit;; esac\necho broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    return str(compiler)


BROKEN = {
    "a file in the cache's place": lambda folder: (WITHOUT_CPP, {"TORCH_EXTENSIONS_DIR": __file__}),
    "a cache below a file": lambda folder: (WITHOUT_CPP, {"TORCH_EXTENSIONS_DIR": f"{__file__}/cache"}),
    "no right to write": lambda folder: (READ_ONLY + WITHOUT_CPP, {}),
    "a compiler that fails": lambda folder: (WITHOUT_CPP, {"CXX": failing_compiler(folder)}),
    "a compiler that says nothing": lambda folder: (WITHOUT_CPP, {"CXX": "false"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_where_nothing_can_be_built_the_reference_serves_after_one_warning(what, tmp_path):
    code, environment = BROKEN[what](tmp_path)
    done = run(code, tmp_path / "cache", **environment)
    assert done.returncode == 0, done.stderr
    assert "backend=reference" in done.stdout and "pulled True" in done.stdout
    warned = [line for line in done.stderr.splitlines() if "cannot be had" in line]
    assert len(warned) == 1 and "building the cpp operations failed: " in warned[0], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_that_build_at_once_build_once(tmp_path):
    """The second waits, and finds what the first has built; a mended compiler's first build is one, too."""
    run(WITHOUT_CPP, tmp_path, CXX="false")
    code = "from efreg.backends import native; native.load(native.CPP); print('built')"
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], env=env, **piped) for _ in range(2)]
    said = [process.communicate(timeout=500) for process in both]
    assert [out.strip() for out, _ in said] == ["built", "built"], said
    assert sum("building the cpp operations into" in errors for _, errors in said) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]


@pytest.mark.slow
def test_a_build_killed_midway_does_not_hang_the_next_start(tmp_path):
    code = "from efreg.backends import native; native.load(native.CPP); print('built')"
    env = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    first = subprocess.Popen(
        [sys.executable, "-c", code], env=env, start_new_session=True, stderr=subprocess.DEVNULL
    )
    for _ in range(600):
        if list(tmp_path.glob("*.unfinished/lock")):
            break
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert list(tmp_path.glob("*.unfinished/lock")), "the build was over before it could be killed"
    done = run(code, tmp_path, CUDA_HOME=str(tmp_path))  # a toolkit and no device, of which torch speaks
    assert done.stdout.strip() == "built", done.stderr
    assert re.fullmatch(r"building the cpp operations into .*: once, about half a minute\n", done.stderr)
    again = run(code, tmp_path)
    assert again.stdout.strip() == "built" and "building" not in again.stderr


def test_lost_symlinks_are_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "CPP", native.CPP._replace(sources=(tmp_path / "module.cpp",)))
    with pytest.raises(efreg.BackendUnavailable, match="core.symlinks"):
        native.load.__wrapped__(native.CPP)


def test_the_toolkit_is_where_nvcc_says_it_is(monkeypatch, tmp_path):
    """The nvcc on the PATH may be a wrapper in another folder; CUDA_HOME goes before it."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho '#$ _HERE_=/opt/cuda-99/bin' >&2\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert native.toolkit() == Path("/opt/cuda-99")
    monkeypatch.setenv("CUDA_HOME", "/opt/mine")
    assert native.toolkit() == Path("/opt/mine")


def test_a_missing_nvcc_is_named_with_the_remedy(monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(native.shutil, "which", lambda *_, **__: None)
    with pytest.raises(efreg.BackendUnavailable, match="nvcc is not here: .* set CUDA_HOME"):
        native.toolkit()


def test_the_modules_name_changes_with_torch_and_sources(monkeypatch, tmp_path):
    """A module built for another torch or from other sources is never found."""
    name = native.module_name(native.CPP)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert native.module_name(native.CPP) != name


def test_cpp_refuses_tensors_that_do_not_fit():
    module = native.load(native.CPP)
    ones, c = torch.ones(2, 3), torch.ones(2)
    units = torch.arange(2, dtype=torch.int32)
    law = module.Electrostatic(1.0, 0.0, True)
    groups = Groups.of(Rows.of([ones], [0])).packed
    for grads, weights, coefficients, places, message in [
        ([ones], [torch.ones(2, 4)], c, units, "differ in shape"),
        ([ones.double()], [ones], c, units, "they must agree"),
        ([ones], [ones], c, units + 1, "need as many coefficients"),
        ([ones], [ones], c, units[:1], "need a unit each"),
        ([ones], [ones], c[:1], units - 1, "need as many coefficients"),
        ([ones], [ones], c.double(), units, "coefficients must be"),
        ([ones, ones], [ones], c, units, "as many"),
        ([ones, ones.double()], [ones, ones.double()], c, units, "share a dtype"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            module.force(grads, weights, coefficients, *groups, places, [0] * len(weights), law, 1.0)


def test_autograd_sees_that_weights_changed():
    """A weight saved for backward and then shrunk or pulled into must be noticed."""
    w = torch.ones(2, 3, requires_grad=True)
    loss = w.square().sum()
    with torch.no_grad():
        rows = Rows.of([w], [0])
        backends.select("cpp", CPU).shrink(rows, torch.ones(2), rates=[0.1], direction="sign")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_efreg_env_says_what_serves():
    from efreg.env import describe

    text = describe()
    for part in (efreg.__version__, torch.__version__.split("+")[0], "cpp", "reference", "auto", "takes cpp"):
        assert part in text


def test_a_subclass_of_a_known_law_is_not_mistaken_for_it():
    """Its own method runs, not the kernel of its parent."""

    class Half(efreg.L1):
        def coefficients(self, charges):
            return super().coefficients(charges) / 2

    net = nn.Linear(3, 2, bias=False)
    efreg.attach(net, law=Half(1.0), layers="", backend="cpp")
    before = net.weight.detach().clone()
    net.weight.grad = torch.zeros_like(before)
    torch.optim.SGD(net.parameters(), lr=1.0).step()
    torch.testing.assert_close(net.weight.detach(), before - 0.5 * before.sign())
