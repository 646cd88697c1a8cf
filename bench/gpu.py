"""All that only a GPU can show, in one call of under eight minutes: checks first, then figures.

    python bench/gpu.py --out results

From a bare checkout, without network; needs torch, triton, torchvision, pytest and, for `cuda`, nvcc. What
is missing or fails is said, and the rest goes on. Rows go to OUT/gpu.csv, words to OUT/gpu.txt; the status
is 1 if a check failed. `--device cpu --tiny` tries the script itself where there is no GPU.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, default=Path(), help="folder for gpu.csv and gpu.txt")
parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
parser.add_argument("--tiny", action="store_true", help="small networks and few rounds")
parser.add_argument("--minutes", type=float, default=6.5, help="nothing new begins after so many")
parser.add_argument("--only", help="the parts to run, separated by commas")
options = parser.parse_args()
# Before Triton is imported: on the CPU its kernels are interpreted.
os.environ["TRITON_INTERPRET"] = "1" if options.device == "cpu" else "0"

import peers  # noqa: E402
import rows as figures  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import efreg  # noqa: E402
from efreg import backends  # noqa: E402
from efreg.backends import native  # noqa: E402
from efreg.backends.reference import accumulator  # noqa: E402
from efreg.backends.rows import Rows  # noqa: E402
from efreg.force.steps import subscribe, unsubscribe  # noqa: E402
from efreg.lab import models  # noqa: E402

DEVICE = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
ON_GPU = options.device == "cuda"
ROUNDS = 3 if options.tiny else 20
OURS = ["triton", "cuda"] if ON_GPU else ["triton", "cpp"]
START = time.perf_counter()

results: list[dict] = []
words: list[str] = []
failed: list[str] = []


def say(line: str) -> None:
    line = f"[{time.perf_counter() - START:5.0f} s] {line}"
    words.append(line)
    print(line, flush=True)


def record(what: str, backend: str, shape: str, values: list[float], unit: str, dtype: str) -> float:
    """Adds a row and returns its median."""
    results.append(figures.row(what, backend, shape, values, unit, dtype=dtype, on=DEVICE.type))
    return statistics.median(values)


def late() -> bool:
    """Whether the time is over in which something new may begin."""
    return time.perf_counter() - START > 60 * options.minutes


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def free() -> None:
    if ON_GPU:
        torch.cuda.empty_cache()


def in_turns(functions: dict, *, rounds: int = ROUNDS, calls: int = 1, around=None) -> dict[str, list[float]]:
    """Milliseconds a call of each function, `calls` in a row, all in turns; the first round does not count.

    around: a function's context, entered and left outside the timing.
    """
    taken = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            with (around or {}).get(name, contextlib.nullcontext)():
                synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    function()
                synchronize()
                taken[name].append(1e3 * (time.perf_counter() - start) / calls)
    return {name: times[1:] for name, times in taken.items()}


def captured(function, calls: int = 1):
    """The function, so many times in one CUDA graph: what it takes of the GPU without the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph.replay


class Synthetic(nn.Module):
    """Convolutions of 3×3 whose weights, and whose gradients, lie one behind the other."""

    def __init__(self, channels: int, layers: int, dtype: torch.dtype):
        super().__init__()
        size = 9 * channels**2
        self.flat = torch.empty(layers * size, dtype=dtype, device=DEVICE).normal_(0, 0.05)
        self.gradients = torch.empty_like(self.flat).normal_(0, 1e-3)
        for i in range(layers):
            layer = nn.Conv2d(channels, channels, 3, bias=False, device="meta")
            part = slice(i * size, (i + 1) * size)
            layer.weight = nn.Parameter(self.flat[part].view(channels, channels, 3, 3))
            layer.weight.grad = self.gradients[part].view(channels, channels, 3, 3)
            self.add_module(f"conv{i}", layer)


def real(build):
    def make(dtype: torch.dtype) -> nn.Module:
        model = build().to(DEVICE, dtype)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        return model

    return make


def resnet50() -> nn.Module:
    import torchvision

    return torchvision.models.resnet50()


def resnet152() -> nn.Module:
    import torchvision

    return torchvision.models.resnet152()


def tiny() -> nn.Module:
    """Small enough for Triton's interpreter."""
    blocks = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(8, 10))


def synthetic(channels: int, layers: int):
    return lambda dtype: Synthetic(channels, layers, dtype)


NETWORKS = (
    {"tiny": real(tiny), "4,608 weights": synthetic(8, 8)}
    if options.tiny
    else {
        "ResNet-56": real(models.resnet56),
        "ResNet-50": real(resnet50),
        "VGG-19": real(models.vgg19),
        "0.1 B": synthetic(512, 42),
        "1 B": synthetic(1024, 106),
        "8 B": synthetic(2048, 212),
    }
)


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]


def hook(model: nn.Module, backend: str, **settings):
    """The whole call that an optimizer's step makes into efreg; and the force, deaf to other steps."""
    force = efreg.attach(model, law=peers.LAW, backend=backend, check=None, **settings)
    unsubscribe(force._serving)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grads = [p.grad for p in model.parameters() if p.grad is not None]

    def call():
        torch.autograd.graph.increment_version(grads)  # as a backward pass does
        force._serving.before_step(optimizer, (optimizer,), {}, step=0, outermost=True)
        force._serving.after_step(optimizer, 0)

    return force, call


def available() -> list[str]:
    """Our backends that can be had here; what cannot is said once."""
    found = []
    for name in OURS:
        try:
            backends.select(name, DEVICE)
            found.append(name)
        except efreg.BackendUnavailable as error:
            failed.append(f"backend {name}")
            say(f"backend {name} cannot be had: {error}")
    return found


# The checks.


def check_correctness() -> None:
    """tests/test_gpu.py: float64, equal bits in 100 runs, no waiting, graphs; pruning as on the CPU."""
    available()
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):  # its processes must agree on the tests' names
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    run_tests(command, limit=300, EFREG_TEST_SEED=str(time.time_ns() % 2**31))


def check_memory() -> None:
    """compute-sanitizer's memcheck over the operations of both compiled backends."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not ON_GPU or not Path(sanitizer).exists():
        return say("memcheck: no compute-sanitizer here, not run")
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"]
    chosen = ["-k", "(pull_and_shrink and float32 or norms) and not reference"]
    # Each tensor in an allocation of its own, so that an overrun is seen.
    run_tests([*command, *chosen], limit=90, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def run_tests(command: list[str], limit: float, **environment: str) -> None:
    """Runs tests/test_gpu.py. Raises AssertionError where it fails or is not over in time."""
    environment = {**os.environ, "EFREG_TEST_DEVICE": DEVICE.type, **environment}
    here = ["-o", "addopts=--strict-markers", "-m", "gpu"]
    command = [*command, *here, str(ROOT / "tests" / "test_gpu.py")]
    with (options.out / "gpu_tests.txt").open("a+") as file:
        begin = file.tell()
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            )
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"not over after {limit:.0f} s") from error
        file.seek(begin)
        lines = [line.strip() for line in file if line.strip()]
    for line in lines[-12 if done.returncode else -1 :]:
        say(line[:300])
    if done.returncode:
        raise AssertionError(f"status {done.returncode}")


# The figures.


def measure_operations() -> None:
    """time / floor of measure, pull and shrink, and of the whole hook call, kept and fresh."""
    ours = available()
    for name, build in NETWORKS.items():
        for dtype in (torch.float32, torch.bfloat16):
            if late():
                return say("out of time")
            for backend in ours:
                operations_of(name, build(dtype), dtype, backend)
                free()


def operations_of(name: str, model: nn.Module, dtype: torch.dtype, kind: str) -> None:
    weights = weights_of(model)
    elements = sum(w.numel() for w in weights)
    a, b = (model.flat, model.gradients) if isinstance(model, Synthetic) else (
        torch.randn(elements, device=DEVICE, dtype=dtype) for _ in range(2)
    )  # fmt: skip
    backend = backends.select(kind, DEVICE)
    rows, grads = Rows.of(weights, [0] * len(weights)), [w.grad for w in weights]
    c = torch.full((sum(map(len, weights)),), 1e-30, dtype=accumulator(dtype), device=DEVICE)
    kept, keep = hook(model, kind)
    fresh, refresh = hook(model, kind, refresh=1)
    functions = {
        "floor": lambda: torch.add(a, b, out=b),
        "measure": lambda: backend.measure(rows, sign="count", norm=False),
        "pull": lambda: backend.pull(grads, rows, c, scale=1.0, direction="sign"),
        "shrink": lambda: backend.shrink(rows, c, rates=[1.0] * len(weights), direction="sign"),
        "hook, charges kept": keep,
        "hook, charges fresh": refresh,
    }
    calls = 1 if options.tiny else max(1, min(100, int(1e9 / elements)))
    taken = {}
    with torch.no_grad():
        taken["eager"] = in_turns(functions, calls=calls)
        if ON_GPU:
            graphs = {what: captured(function, calls) for what, function in functions.items()}
            taken["graph"] = {k: [t / calls for t in v] for k, v in in_turns(graphs).items()}
    for how, times in taken.items():
        report_operations(name, kind, str(dtype)[6:], how, times)
    for force in (kept, fresh):
        force.detach()


def report_operations(name: str, kind: str, dtype: str, how: str, times: dict[str, list[float]]) -> None:
    """time / floor of the mode: of the floor's three tensors a mode moves one to four."""
    moved = {"measure": 1, "pull": 3, "shrink": 2, "hook, charges kept": 3, "hook, charges fresh": 4}
    floor = record(f"floor of 3 tensors, {how}", "torch.add", name, times["floor"], "ms", dtype)
    parts = []
    for what, tensors in moved.items():
        record(f"{what}, {how}", kind, name, times[what], "ms", dtype)
        ratios = [3 / tensors * t / f for t, f in zip(times[what], times["floor"], strict=True)]
        ratio = record(f"{what}, {how}", kind, name, ratios, "x floor of its mode", dtype)
        parts.append(f"{what} {ratio:.2f}")
    say(f"{name:>9} {dtype:8} {kind:6} {how}: floor {1e3 * floor:8.1f} µs; " + ", ".join(parts))


def measure_host() -> None:
    """Microseconds of the host in one hook call, while the GPU keeps up."""
    cases = {"ResNet-56": (models.resnet56, ["*.conv1", None]), "ResNet-152": (resnet152, [None])}
    if options.tiny:
        cases = {"tiny": (tiny, [None])}
    for name, (build, choices) in cases.items():
        model = real(build)(torch.float32)
        for kind in available():
            for layers in choices:
                for mode, refresh in (("kept", None), ("fresh", 1)):
                    force, call = hook(model, kind, layers=layers, refresh=refresh)
                    shape, taken = f"{name}, {len(force.layers)} layers", []
                    for i in range(5 if options.tiny else 400):
                        if i % 10 == 0:
                            synchronize()
                        start = time.perf_counter()
                        call()
                        taken.append(1e6 * (time.perf_counter() - start))
                    median = record(f"host, charges {mode}", kind, shape, taken[2:], "us", "float32")
                    say(f"host: {shape:22} {kind:6} {mode:5} {median:6.1f} µs")
                    force.detach()


def measure_training() -> None:
    """A step with the force beside one without: three copies of one network, in turns."""
    cases = {
        "ResNet-56, batch 128": (models.resnet56, 128, 32, "*.conv1", "[0, .5, .5, .5, 0]"),
        "VGG-19, batch 128": (lambda: models.vgg19(num_classes=10), 128, 32, None, "[1-15:.5]"),
        "ResNet-50, batch 128, 224²": (resnet50, 128, 224, None, "[0, .5, .5, .5, .5, 0]"),
    }
    if options.tiny:
        cases = {"tiny, batch 2": (tiny, 2, 32, None, {"0": 0.5})}
    for name, case in cases.items():
        for fused in (False, True):
            if late():
                return say("out of time")
            training_of(name, *case, fused=fused)
            free()


def training_of(name: str, build, batch: int, side: int, layers, ratios, *, fused: bool) -> None:
    start = build().to(DEVICE, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, side, side, device=DEVICE).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=DEVICE)
    plan = efreg.plan(start, ratios, example_inputs=images[:2])
    ways = {
        "without": None,
        "kept": {"layers": layers},
        "fresh": {"layers": layers, "refresh": 1},
        "whole filters": {"layers": plan, "law": "ladder", "scope": "filter"},
    }
    steps, forces = {}, {}
    for mode, settings in ways.items():
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=fused, foreach=not fused)
        if settings is not None:
            forces[mode] = efreg.attach(model, 1e-16, **settings)
            unsubscribe(forces[mode]._serving)
        steps[mode] = one_step(model, optimizer, images, labels)
    precision = "bfloat16 autocast"
    optimizer = "fused" if fused else "foreach"
    calls = 1 if options.tiny else 4
    around = {mode: functools.partial(heard, force) for mode, force in forces.items()}
    report_training(name, precision, optimizer, "eager", in_turns(steps, calls=calls, around=around))
    if ON_GPU:
        graphs = {}
        for mode, step in steps.items():
            with heard(forces.get(mode)):
                graphs[mode] = captured(step)
        report_training(name, precision, optimizer, "graph", in_turns(graphs, calls=calls))


def one_step(model, optimizer, images, labels):
    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


@contextlib.contextmanager
def heard(force):
    """While it lasts `force`, and no other, hears of steps."""
    if force is not None:
        subscribe(force._serving)
    yield
    if force is not None:
        unsubscribe(force._serving)


def report_training(name, precision, optimizer, how, taken) -> None:
    what = f"training step, SGD {optimizer}, {how}"
    plain = record(what, "without the force", name, taken["without"], "ms", precision)
    for mode, times in taken.items():
        if mode == "without":
            continue
        pairs = list(zip(times, taken["without"], strict=True))
        record(what, f"with, {mode}", name, times, "ms", precision)
        ratio = record(what, f"with, {mode}", name, [a / b for a, b in pairs], "x without", precision)
        more = record(what, f"with, {mode}", name, [1e3 * (a - b) for a, b in pairs], "us more", precision)
        say(f"{name}, SGD {optimizer}, {how}: {plain:.2f} ms; {mode} ×{ratio:.4f}, {more:+.1f} µs")


def measure_peers() -> None:
    """What others do at every step, beside ours: charges fresh, whole calls."""
    networks = {"tiny": tiny} if options.tiny else {"ResNet-56": models.resnet56, "VGG-19": models.vgg19}
    for name, build in networks.items():
        model = real(build)(torch.float32)
        weights = weights_of(model)
        functions, forces = {}, []
        for kind in [*available(), "reference"]:
            force, functions[kind] = hook(model, kind, refresh=1)
            forces.append(force)
        functions["L1 through autograd"] = lambda w=weights: peers.l1_autograd(w)
        functions["the paper's loop"] = lambda w=weights: peers.paper_loop(w)
        with told("Torch-Pruning's regularizer"):
            example = torch.randn(1, 3, 32, 32, device=DEVICE)
            functions["Torch-Pruning's regularizer"] = peers.torch_pruning_regularizer(model, example)
        with told("the compiled reference"):
            if late():
                raise TimeoutError("too late to compile it")
            compiled = peers.compiled(peers.plain_reference)
            compiled(weights)
            functions["compiled reference"] = lambda w=weights, f=compiled: f(w)
        taken = in_turns(functions, rounds=3 if options.tiny else 7)
        ours = next(iter(functions))
        for kind, times in taken.items():
            record("hook, charges fresh, beside the peers", kind, name, times, "ms", "float32")
            ratios = [a / b for a, b in zip(times, taken[ours], strict=True)]
            ratio = record(
                "hook, charges fresh, beside the peers", kind, name, ratios, f"x {ours}", "float32"
            )
            say(f"{name}: {kind:28} {statistics.median(times):9.3f} ms, ×{ratio:.1f} of {ours}")
        for force in forces:
            force.detach()


@contextlib.contextmanager
def told(what: str):
    """Says what cannot be had, and goes on."""
    try:
        yield
    except Exception as error:
        say(f"{what} cannot be had: {type(error).__name__}: {native.last_line(error)}")


PARTS = {
    "correct": check_correctness,
    "memcheck": check_memory,
    "operations": measure_operations,
    "host": measure_host,
    "training": measure_training,
    "peers": measure_peers,
}


def main() -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    say(f"{figures.device(DEVICE.type)}; {figures.versions(DEVICE.type)}; commit {figures.commit()}")
    logging.getLogger("efreg").setLevel(logging.ERROR)  # that two forces act on one model is meant
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for name, part in PARTS.items():
        if options.only and name not in options.only.split(","):
            continue
        if late():
            say(f"{name}: out of time, not begun")
            continue
        say(f"--- {name}: {part.__doc__.splitlines()[0]}")
        try:
            part()
        except Exception as error:
            failed.append(name)
            say(f"{name} FAILED: {type(error).__name__}: {error}"[:600])
            traceback.print_exc()
        figures.write(options.out / "gpu.csv", results)
        (options.out / "gpu.txt").write_text("\n".join(words) + "\n")
    say("failed: " + ", ".join(failed) if failed else "all checks passed")
    (options.out / "gpu.txt").write_text("\n".join(words) + "\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
