"""The operations on the filters of a whole model, one launch each, in Triton.

Their definition is in efreg/backends/reference.py.

A program takes one *tile*: some whole filters of one row. The arrays of a table (efreg/backends/table.py) say
which:

tiles    [T, 2] int32     the tile's row, and the first of its filters
layout   [rows, 3] int64  its filters, their size D, where its statistics begin
weights  [rows] int64     addresses
units    [Σ filters] int32  of each filter, where its coefficient lies (−1: it has none)
targets  [rows, 2] int64  address of the row's gradient (0: leave the row alone), and its turn

What the rows of a *group* write together is charged together (efreg/backends/rows.py):

owners   [rows] int32     the row's group
groups   [G, 5] int64     its units N, where their coefficients begin, its tiles, K, where its members begin
members  int32            [N, K] of each group: which filters write a unit, as statistics lie (−1: no more)

A gradient's *turn* is 1 where it lies in memory as its weight does. Where one is contiguous and the other is
channels_last, number i of a filter's gradient belongs to its weight's (i mod turn) · D/turn + i // turn.
DTYPE is the dtype behind the addresses, ACC that of statistics, coefficients and scales.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from . import launch

FIELDS, SHAPES = tl.constexpr(3), tl.constexpr(5)
NARROW_FILTERS, NARROW_LANES = map(tl.constexpr, launch.NARROW)
WIDE_FILTERS, WIDE_LANES = map(tl.constexpr, launch.WIDE)
FLAT_FILTERS, FLAT_LANES = map(tl.constexpr, launch.FLAT)
LAW_LANES = tl.constexpr(launch.LAW_LANES)
NOWHERE = tl.constexpr(2**31 - 1)
SIGN, RADIAL, SHARE = map(tl.constexpr, range(3))

ARRAYS = (
    "tiles", "layout", "weights", "units", "targets", "magnitude", "balance", "norm", "coefficients",
    "owners", "groups", "members", "done",
)  # fmt: skip
NUMBERS = ("law", "scale", "rates", "found_inf")

# Nothing is specialised to where an argument lies: what was compiled once serves at every later step.
_kernel = triton.jit(do_not_specialize=ARRAYS + NUMBERS)


@triton.jit
def _sgn(x):
    return (x > 0).to(tl.int32) - (x < 0).to(tl.int32)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _positive_part(x):
    """max(x, 0), and NaN for NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _divide(a, b):
    """a / b, correctly rounded."""
    if b.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _sqrt(x):
    """√x, correctly rounded."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def _hypot(a, b):
    """√(a² + b²) of numbers ≥ 0, without overflow on the way; NaN where both are 0."""
    large, small = tl.maximum(a, b), tl.minimum(a, b)
    ratio = _divide(small, large)
    return large * _sqrt(1 + ratio * ratio)


@triton.jit
def _fold(x):
    """Σ over the lanes, [F, lanes] -> [F]: neighbour to neighbour, whoever holds which lane."""
    for _ in tl.static_range(16):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]), axis=2)
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def _pointers(address, n, size, ALIGNED: tl.constexpr, DTYPE: tl.constexpr):
    """To the first number of each filter n [F], as [F, 1]."""
    p = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p + (n.to(tl.int64) * size)[:, None]


@triton.jit
def _known(size, ALIGNED: tl.constexpr, DTYPE: tl.constexpr):
    """The size, written so that the compiler sees where filters end at multiples of 16 bytes."""
    if ALIGNED:
        size = size // (128 // DTYPE.primitive_bitwidth) * (128 // DTYPE.primitive_bitwidth)
    return size


@triton.jit
def _norms(p, inside, size, LANES: tl.constexpr, ACC: tl.constexpr):
    """‖w_n‖₂ [F] of the filters that begin at p [F, 1], where inside [F, 1]."""
    squares = tl.zeros([p.shape[0], LANES], ACC)
    for start in range(0, size, LANES):
        i = start + tl.arange(0, LANES)[None, :]
        w = tl.load(p + i, mask=inside & (i < size), other=0.0).to(ACC)
        squares += w * w
    return _sqrt(_fold(squares))


@triton.jit
def _inverse(norm):
    """1 / ‖w_n‖₂ [F, 1], and 0 where there is no direction."""
    ok = (norm > 0) & _finite(norm)
    return tl.where(ok, _divide(tl.full(norm.shape, 1, norm.dtype), norm), 0.0)[:, None]


@triton.jit
def _kept(norm, c):
    """The share of a filter that the radial shrink leaves: max(1 − c/‖w_n‖₂, 0), all if it is not finite."""
    return tl.where(norm <= c, 0.0, tl.where((norm > 0) & _finite(norm), 1 - _divide(c, norm), 1.0))


@triton.jit
def _without(x, share):
    """What is left of x when it has lost a share of itself: 0 where that is all, whatever x was."""
    return tl.where(share >= 1, 0.0, x * (1 - share))


@triton.jit
def _coefficients(coefficients, units, inside):
    """Those of filters with these units, 0 for a filter that has none."""
    unit = tl.load(units, mask=inside, other=-1)
    return tl.load(coefficients + unit, mask=unit >= 0, other=0.0)


@triton.jit
def _measure_tile(
    tile, to, FLAGS: tl.constexpr,
    ALIGNED: tl.constexpr, FILTERS: tl.constexpr, LANES: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    weight, _, first, filters, size, _ = tile
    magnitude, balance, norm = to
    COUNT: tl.constexpr = FLAGS[0]
    NORM: tl.constexpr = FLAGS[1]
    size = _known(size, ALIGNED, DTYPE)
    n = first + tl.arange(0, FILTERS)
    p = _pointers(weight, n, size, ALIGNED, DTYPE)
    inside = (n < filters)[:, None]
    lengths = tl.zeros([FILTERS, LANES], ACC)
    balances = tl.zeros([FILTERS, LANES], tl.int32 if COUNT else ACC)
    for start in range(0, size, LANES):
        i = start + tl.arange(0, LANES)[None, :]
        w = tl.load(p + i, mask=inside & (i < size), other=0.0).to(ACC)
        lengths += tl.abs(w)
        balances += _sgn(w) if COUNT else w
    sums = tl.sum(balances, axis=1) if COUNT else _fold(balances)
    tl.store(magnitude + n, _fold(lengths), mask=n < filters)
    tl.store(balance + n, sums.to(ACC), mask=n < filters)
    if NORM:
        tl.store(norm + n, _norms(p, inside, size, LANES, ACC), mask=n < filters)


@triton.jit
def _pull_tile(
    tile, to, FLAGS: tl.constexpr,
    ALIGNED: tl.constexpr, FILTERS: tl.constexpr, LANES: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    weight, target, first, filters, size, turn = tile
    coefficients, units, scale = to
    ALONG: tl.constexpr = FLAGS[0]
    size = _known(size, ALIGNED, DTYPE)
    n = first + tl.arange(0, FILTERS)
    p_w, p_g = _pointers(weight, n, size, ALIGNED, DTYPE), _pointers(target, n, size, ALIGNED, DTYPE)
    c = (_coefficients(coefficients, units + n, n < filters) * tl.load(scale))[:, None]
    acts = c != 0
    if ALONG == RADIAL:
        c *= _inverse(_norms(p_w, acts, size, LANES, ACC))
    for start in range(0, size, LANES):
        i = start + tl.arange(0, LANES)[None, :]
        inside = acts & (i < size)
        i_w = i
        if not ALIGNED:  # noqa: SIM102, decided by the compiler
            if turn != 1:
                i_w = i % turn * (size // turn) + i // turn
        g = tl.load(p_g + i, mask=inside, other=0.0).to(ACC)
        if ALONG == SHARE:
            g = _without(g, c)
        else:
            w = tl.load(p_w + i_w, mask=inside, other=0.0).to(ACC)
            g += c * (w if ALONG == RADIAL else _sgn(w).to(ACC))
        tl.store(p_g + i, g.to(DTYPE), mask=inside)


@triton.jit
def _shrink_tile(
    tile, to, FLAGS: tl.constexpr,
    ALIGNED: tl.constexpr, FILTERS: tl.constexpr, LANES: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    weight, _, first, filters, size, _ = tile
    coefficients, units, rate, found_inf = to
    ALONG: tl.constexpr = FLAGS[0]
    size = _known(size, ALIGNED, DTYPE)
    n = first + tl.arange(0, FILTERS)
    p = _pointers(weight, n, size, ALIGNED, DTYPE)
    by = tl.where(tl.load(found_inf) == 0, tl.load(rate), 0.0)
    c = (_coefficients(coefficients, units + n, n < filters) * by)[:, None]
    acts = c != 0
    if ALONG == RADIAL:
        kept = _kept(_norms(p, acts, size, LANES, ACC)[:, None], c)
    for start in range(0, size, LANES):
        i = start + tl.arange(0, LANES)[None, :]
        inside = acts & (i < size)
        w = tl.load(p + i, mask=inside, other=0.0).to(ACC)
        if ALONG == RADIAL:
            w *= kept
        elif ALONG == SHARE:
            w = _without(w, c)
        else:
            w = _sgn(w).to(ACC) * _positive_part(tl.abs(w) - c)
        tl.store(p + i, w.to(DTYPE), mask=inside)


@triton.jit
def _on(tile, work: tl.constexpr, to, FLAGS: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr):
    """Does `work` on a tile as wide as its filters, 16 bytes at a time where they lie so."""
    weight, target, _, _, size, turn = tile
    aligned = ((weight | target | size.to(tl.int64) * (DTYPE.primitive_bitwidth // 8)) % 16 == 0) & (
        turn == 1
    )
    if size == 1:
        work(tile, to, FLAGS, False, FLAT_FILTERS, FLAT_LANES, DTYPE, ACC)
    elif size <= NARROW_LANES:
        if aligned:
            work(tile, to, FLAGS, True, NARROW_FILTERS, NARROW_LANES, DTYPE, ACC)
        else:
            work(tile, to, FLAGS, False, NARROW_FILTERS, NARROW_LANES, DTYPE, ACC)
    else:
        if aligned:
            work(tile, to, FLAGS, True, WIDE_FILTERS, WIDE_LANES, DTYPE, ACC)
        else:
            work(tile, to, FLAGS, False, WIDE_FILTERS, WIDE_LANES, DTYPE, ACC)


@triton.jit
def _tile(t, tiles, layout, weights):
    """Tile t, its weight for a target; and the row, and where its statistics begin."""
    row = tl.load(tiles + 2 * t).to(tl.int64)
    first = tl.load(tiles + 2 * t + 1)
    p = layout + row * FIELDS
    weight = tl.load(weights + row)
    filters, size = tl.load(p).to(tl.int32), tl.load(p + 1).to(tl.int32)
    return (weight, weight, first, filters, size, 1), row, tl.load(p + 2)


@triton.jit
def _statistics(n, group, stats, LANES: tl.constexpr, ACC: tl.constexpr):
    """Magnitude and sign of units n of a group: sums over all that writes them, NaN behind the last."""
    filters, members, depth = group
    magnitude, balance = stats
    m, b = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
    for k in range(depth):
        at = tl.load(members + n * depth + k, mask=n < filters, other=-1)
        m += tl.load(magnitude + at, mask=at >= 0, other=0.0, cache_modifier=".cg")
        b += tl.load(balance + at, mask=at >= 0, other=0.0, cache_modifier=".cg")
    s = tl.where(_finite(m), _sgn(b).to(m.dtype), 0.0)
    return tl.where(n < filters, m, float("nan")), s


@triton.jit
def _source(group, stats, LANES: tl.constexpr, ACC: tl.constexpr):
    """The largest finite magnitude of a group, −1 if there is none, its sign, and the first that has it."""
    best, at = tl.full([LANES], -1, ACC), tl.full([LANES], 0, tl.int32)
    sign = tl.full([LANES], 0, ACC)
    for start in range(0, group[0], LANES):
        n = start + tl.arange(0, LANES)
        m, s = _statistics(n, group, stats, LANES, ACC)
        larger = _finite(m) & (m > best)
        best, at, sign = tl.where(larger, m, best), tl.where(larger, n, at), tl.where(larger, s, sign)
    largest = tl.max(best, axis=0)
    source = tl.min(tl.where(best == largest, at, NOWHERE), axis=0)
    return largest, tl.sum(tl.where((best == largest) & (at == source), sign, 0.0), axis=0), source


@triton.jit
def _electrostatic(group, stats, coefficients, law, LANES: tl.constexpr, ACC: tl.constexpr):
    """Eq. 10 for a group whose statistics are all there (efreg/force/laws.py: Electrostatic.coefficients)."""
    m_src, s_src, source = _source(group, stats, LANES, ACC)
    strength = tl.zeros([LANES], ACC) + tl.load(law) * tl.abs(s_src)
    softening = tl.zeros([LANES], ACC) + tl.load(law + 1) * m_src
    for start in range(0, group[0], LANES):
        n = start + tl.arange(0, LANES)
        m, s = _statistics(n, group, stats, LANES, ACC)
        r = _hypot(tl.abs(s_src * m_src - s * m), softening)
        c = _divide(strength, r) * _divide(tl.zeros([LANES], ACC) + m_src, r)
        acts = _finite(c) & _finite(m) & (n != source) & (s != 0)
        tl.store(coefficients + n, tl.where(acts, c, 0.0), mask=n < group[0])


@_kernel
def measure_kernel(
    tiles, layout, weights, magnitude, balance, norm,
    COUNT: tl.constexpr, NORM: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tile, _, start = _tile(tl.program_id(0).to(tl.int64), tiles, layout, weights)
    to = (magnitude + start, balance + start, norm + start)
    _on(tile, _measure_tile, to, (COUNT, NORM), DTYPE, ACC)


@_kernel
def charge_kernel(
    tiles, layout, weights, owners, groups, members, done, magnitude, balance, coefficients, law,
    COUNT: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tile, row, start = _tile(tl.program_id(0).to(tl.int64), tiles, layout, weights)
    _on(tile, _measure_tile, (magnitude + start, balance + start, balance), (COUNT, False), DTYPE, ACC)
    owner = tl.load(owners + row).to(tl.int64)
    p = groups + owner * SHAPES
    # The last program of a group to come here finds all statistics written: its stores before the barrier,
    # the barrier before the atomic. It applies the law and leaves the counter as it was.
    tl.debug_barrier()
    if tl.atomic_add(done + owner, 1, sem="acq_rel", scope="gpu") == tl.load(p + 2) - 1:
        group = (tl.load(p).to(tl.int32), members + tl.load(p + 4), tl.load(p + 3).to(tl.int32))
        _electrostatic(group, (magnitude, balance), coefficients + tl.load(p + 1), law, LAW_LANES, ACC)
        tl.store(done + owner, 0)


@_kernel
def pull_kernel(
    tiles, layout, weights, units, targets, coefficients, scale,
    ALONG: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # Backwards: what was measured last is still in the cache.
    t = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64)
    tile, row, start = _tile(t, tiles, layout, weights)
    weight, _, first, filters, size, _ = tile
    target, turn = tl.load(targets + 2 * row), tl.load(targets + 2 * row + 1).to(tl.int32)
    if target != 0:
        tile = (weight, target, first, filters, size, turn)
        _on(tile, _pull_tile, (coefficients, units + start, scale), (ALONG,), DTYPE, ACC)


@_kernel
def shrink_kernel(
    tiles, layout, weights, units, coefficients, rates, found_inf,
    ALONG: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    t = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64)
    tile, row, start = _tile(t, tiles, layout, weights)
    _on(tile, _shrink_tile, (coefficients, units + start, rates + row, found_inf), (ALONG,), DTYPE, ACC)


class _Launcher:
    """A kernel and what it was compiled to.

    From the second launch on it is started directly: Triton's own look at the arguments takes longer than all
    that efreg does in a step.
    """

    def __init__(self, kernel: Callable, registers: Callable[[int], int] | None = None):
        self._kernel, self._registers = kernel, registers
        self._compiled = {}

    def __call__(self, dtype: torch.dtype, *tensors: torch.Tensor, **constants) -> None:
        """One program for each of the tiles, which are the first of the tensors."""
        programs, device = tensors[0].shape[0], tensors[0].device
        if programs == 0:
            return
        key = (device.index, dtype, *constants.values())
        with _current(device):
            if compiled := self._compiled.get(key):
                kernel, constants = compiled
                kernel[programs, 1, 1](*map(torch.Tensor.data_ptr, tensors), *constants)
            else:
                constants |= {"DTYPE": TYPES[dtype], "ACC": TYPES[_accumulator(dtype)]}
                kernel = self._kernel[programs,](*tensors, **constants, **self.options(dtype))
                if kernel is not None:  # the interpreter compiles nothing
                    self._compiled[key] = kernel, tuple(constants.values())

    def options(self, dtype: torch.dtype) -> dict:
        """What the kernel is compiled with for tensors of `dtype` on the current device."""
        if triton.knobs.runtime.interpret:
            return {}
        target = triton.runtime.driver.active.get_current_target()
        options = {"num_warps": launch.warps(target.warp_size), "enable_fp_fusion": False}
        if self._registers and target.backend == "cuda":
            options["maxnreg"] = self._registers(_accumulator(dtype).itemsize)
        return options


TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _current(device: torch.device):
    """The context in which `device` is the current one."""
    if device.type == "cpu":
        return _HERE
    module = torch.get_device_module(device)
    return _HERE if device.index == module.current_device() else module.device(device)


_HERE = nullcontext()


_measure = _Launcher(measure_kernel, launch.measuring_registers)
_charge = _Launcher(charge_kernel, launch.measuring_registers)
_pull = _Launcher(pull_kernel)
_shrink = _Launcher(shrink_kernel)


def measure(tiles, layout, weights, magnitude, balance, norm, count: bool, dtype: torch.dtype) -> None:
    """Writes the statistics of all filters, [Σ filters] each, row behind row; `norm` may be None."""
    norms = magnitude if norm is None else norm
    _measure(dtype, tiles, layout, weights, magnitude, balance, norms, COUNT=count, NORM=norm is not None)


def charge(
    tiles,
    layout,
    weights,
    owners,
    groups,
    members,
    done,
    magnitude,
    balance,
    coefficients,
    law,
    count: bool,
    dtype: torch.dtype,
) -> None:
    """Writes statistics, then each group's coefficients by Eq. 10 with the numbers `law`: α · k_e and ε.

    done: [G] int32, zeros, and zeros again afterwards.
    """
    _charge(
        dtype, tiles, layout, weights, owners, groups, members, done, magnitude, balance, coefficients, law,
        COUNT=count,
    )  # fmt: skip


def pull(tiles, layout, weights, units, targets, coefficients, scale, along: int, dtype: torch.dtype) -> None:
    """gradients += scale · c_n · sgn(w), or its twins: `along` is SIGN, RADIAL or SHARE; scale: 0-dim."""
    _pull(dtype, tiles, layout, weights, units, targets, coefficients, scale, ALONG=along)


def shrink(
    tiles, layout, weights, units, coefficients, rates, found_inf, along: int, dtype: torch.dtype
) -> None:
    """w ← sgn(w) · max(|w| − t, 0) at t = rates[row] · c_n, or its twins; found_inf ≠ 0: nothing."""
    _shrink(dtype, tiles, layout, weights, units, coefficients, rates, found_inf, ALONG=along)
