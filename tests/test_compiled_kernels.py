"""The Triton kernels as compiled for GPUs that need not be there: no spills, 16 bytes at a time, a barrier.

The tests run in a process in which Triton interprets; run as a script, this file is the one that compiles.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from efreg.force.laws import DIRECTIONS
from efreg.kernels import launch

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {
    ("cuda", 80, 32): pytest.mark.slow,
    ("cuda", 90, 32): (),
    ("hip", "gfx942", 64): pytest.mark.slow,
}
SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

# Both values of every flag, but not each with each of another: no two decide about the same lines. The first
# of a kernel needs most registers; of other dtypes than float32 the quick tests have this one alone.
ALONG = [{"ALONG": DIRECTIONS.index(direction)} for direction in ("radial", "sign", "share")]
VARIANTS = {
    "measure": [{"COUNT": False, "NORM": True}, {"COUNT": True, "NORM": False}],
    "charge": [{"COUNT": True}, {"COUNT": False}],
    "pull": ALONG,
    "shrink": ALONG,
}


def variants_of(name, dtype, target):
    return VARIANTS[name] if dtype == "float32" or TARGETS[tuple(target)] else VARIANTS[name][:1]


# What an argument points to, where that is not a statistic, a coefficient or a scale.
POINTEES = {
    "tiles": "i32",
    "layout": "i64",
    "units": "i32",
    "owners": "i32",
    "groups": "i64",
    "members": "i32",
    "weights": "i64",
    "targets": "i64",
    "done": "i32",
}


def compile_all(backend, arch, warp_size):
    """One dict for each kernel, dtype and variant: what it is, its code, and what it takes."""
    from types import SimpleNamespace

    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from efreg.kernels import force

    target = GPUTarget(backend, arch, warp_size)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target))
    types = {str(dtype).removeprefix("torch."): type_ for dtype, type_ in force.TYPES.items()}
    assert types.keys() == SIZES.keys()
    for name in VARIANTS:
        kernel = getattr(force, f"{name}_kernel")
        for dtype in SIZES:
            acc = types["float64" if dtype == "float64" else "float32"]
            for flags in variants_of(name, dtype, (backend, arch, warp_size)):
                constants = {**flags, "DTYPE": types[dtype], "ACC": acc}
                signature = {
                    argument: "constexpr" if argument in constants else f"*{POINTEES.get(argument, acc.name)}"
                    for argument in kernel.arg_names
                }
                options = getattr(force, f"_{name}").options(getattr(torch, dtype))
                source = ASTSource(kernel, signature, constants, {})
                compiled = triton.compile(source, target=target, options=options)
                code = compiled.asm["ptx" if backend == "cuda" else "amdgcn"]
                registers, memory = in_cubin(compiled.asm["cubin"]) if backend == "cuda" else in_amdgcn(code)
                yield {
                    "name": name,
                    "dtype": dtype,
                    "flags": flags,
                    "ir": compiled.asm["ttir"],
                    "code": code,
                    "registers": registers,
                    "shared": compiled.metadata.shared,
                    "memory": memory,
                }


def in_cubin(cubin):
    """Registers of the kernel in machine code, and the memory that it takes for want of them."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", text)}
    return found["REG"], {key: found[key] for key in ("STACK", "LOCAL")}


def in_amdgcn(code):
    """The same, as the metadata of an AMD kernel say it."""
    metadata = code[code.index("amdhsa.kernels:") :]
    found = {key: int(value) for key, value in re.findall(r"^    \.(\w+): +(\d+)$", metadata, re.M)}
    memory = ("private_segment_fixed_size", "sgpr_spill_count", "vgpr_spill_count")
    return found["vgpr_count"], {key: found[key] for key in memory}


@pytest.fixture(
    scope="module",
    params=[pytest.param(target, id=str(target[1]), marks=marks) for target, marks in TARGETS.items()],
)
def target(request):
    return request.param


@pytest.fixture(scope="module")
def compiled(target, tmp_path_factory):
    """What compile_all yields for a target, in a process of its own and anew."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, json.dumps(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def pick(kernels, name, dtype, target):
    """Those of all kernels that are the variants of one, in one dtype."""
    found = [kernel for kernel in kernels if (kernel["name"], kernel["dtype"]) == (name, dtype)]
    assert [kernel["flags"] for kernel in found] == variants_of(name, dtype, target)
    return found


def report(kernels):
    """A line for each kernel, for the messages of failures."""
    rows = [f"\n{'kernel':<8} {'dtype':<9} {'registers':>9} {'shared':>7}  flags"]
    for kernel in kernels:
        name, dtype, registers, shared = (kernel[key] for key in ("name", "dtype", "registers", "shared"))
        rows.append(f"{name:<8} {dtype:<9} {registers:>9} {shared:>7}  {kernel['flags']}")
    return "\n".join(rows)


def instructions(code):
    """Opcodes with operands, and the labels that can be jumped to; no comments, predicates and line ends."""
    for line in code.splitlines():
        line = re.sub(r"^@!?%\w+\s+", "", re.split(r"//|;", line)[0].strip())
        if re.match(r"\w|[$.]L(__)?BB", line):
            yield line


def access(instruction):
    """("ld" or "st", its bytes for each thread) of an access to global memory, else None."""
    opcode = instruction.split()[0]
    if match := re.fullmatch(r"(ld|st)\.global(?:\.v(\d))?\.[bfsu](\d+)", opcode):
        kind, numbers, bits = match.groups()
        return kind, int(numbers or 1) * int(bits) // 8
    amd = r"(?:global|flat)_(load|store)_[us]?(byte|short|dword)(?:x(\d))?(?:_d16)?(?:_hi)?"
    if match := re.fullmatch(amd, opcode):
        kind, unit, numbers = match.groups()
        size = {"byte": 1, "short": 2, "dword": 4}[unit]
        return {"load": "ld", "store": "st"}[kind], size * int(numbers or 1)
    return None


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("name", VARIANTS)
def test_registers_suffice(compiled, target, name, dtype):
    """Nothing is spilled, and nothing lies on a stack."""
    for kernel in pick(compiled, name, dtype, target):
        message = f"{kernel['flags']}: {kernel['memory']}{report(compiled)}"
        assert not any(kernel["memory"].values()), message
        assert not re.search(r"\.local\b|\bscratch_(load|store)", kernel["code"]), message


@pytest.mark.parametrize("dtype", SIZES)
@pytest.mark.parametrize("name", VARIANTS)
def test_sixteen_bytes_at_a_time_where_aligned(compiled, target, name, dtype):
    """Each pass over a tile is there twice for either width: 16 bytes at a time, and number for number.

    A thread has filters · lanes / THREADS numbers of a tile. A pass is one over the weight or the gradient,
    and one more over the weight for its norm; where a share is taken the weight itself is not needed.
    """
    each = [tile.filters * tile.lanes // launch.THREADS for tile in (launch.NARROW, launch.WIDE)]
    wide, single = sum(numbers * SIZES[dtype] // 16 for numbers in each), sum(each)
    for kernel in pick(compiled, name, dtype, target):
        flags = kernel["flags"]
        direction = DIRECTIONS[flags.get("ALONG", 0)]
        loads = 1 + (name == "pull" and direction != "share")
        loads += flags.get("NORM", False) or direction == "radial"
        stores = int(name in ("pull", "shrink"))
        found = Counter(map(access, instructions(kernel["code"])))
        del found[None]
        for kind, passes in {"ld": loads, "st": stores}.items():
            enough = found[kind, 16] >= passes * wide and found[kind, SIZES[dtype]] >= passes * single
            assert enough, f"{flags}: {passes} passes, {found}{report(compiled)}"


@pytest.mark.parametrize("dtype", SIZES)
def test_barrier_before_the_counter(compiled, target, dtype):
    """All threads meet between their last store of a statistic and the atomic that counts their program.

    One thread does the atomic. Its release orders what that thread wrote or has seen, and what the others
    wrote is seen only behind a barrier. Without it the program that applies the law may, rarely, read
    statistics of an earlier step. The interpreter runs one program after the other, and race checkers look at
    shared memory: neither would notice.

    The kernel asks for the barrier itself: where Triton puts one there, it may be for its own use of shared
    memory. In the machine code no label may stand between barrier and atomic, so that no way leads around it.
    """
    barrier, atomic = {
        "cuda": (r"bar(rier)?(\.cta)?\.sync\b", r"atom\."),
        "hip": (r"s_barrier\b", r"(global|flat)_atomic_"),
    }[target[0]]
    for kernel in pick(compiled, "charge", dtype, target):
        before, indent, _ = re.split(r"^( *)(?=%\S+ = tt\.atomic_rmw)", kernel["ir"], flags=re.M)
        asked = rf"^{indent}(gpu\.barrier|ttg\.barrier all)\b"
        assert re.search(asked, before[before.rindex("tt.store") :], re.M), before[-2000:]
        code = list(instructions(kernel["code"]))
        [at] = [i for i, line in enumerate(code) if re.match(atomic, line)]
        assert any(access(line) == ("st", max(SIZES[dtype], 4)) for line in code[:at])
        entry = max(i for i in range(at) if re.match(r"[$.]L", code[i]))
        barriers = [i for i in range(entry, at) if re.match(barrier, code[i])]
        message = "\n".join([str(kernel["flags"]), *code[entry : at + 3]])
        assert barriers, message
        between = code[barriers[-1] : at]
        assert not any((access(line) or "")[:1] == ("st",) for line in between), message
        if target[0] == "cuda":
            assert {"global", "acq_rel", "gpu"} <= set(code[at].split()[0].split(".")), message
        else:  # on gfx942, release to the other programs of the GPU, and acquire from them
            before, after = "\n".join(between), "\n".join(code[at + 1 : at + 3])
            assert re.search(r"buffer_wbl2 sc1\n(?s:.*)s_waitcnt .*vmcnt\(0\)", before), message
            assert re.match(r"s_waitcnt .*vmcnt\(0\)\nbuffer_inv sc1", after), message


if __name__ == "__main__":
    json.dump(list(compile_all(*json.loads(sys.argv[1]))), sys.stdout)
