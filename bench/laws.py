"""What the laws do to weights that nothing else moves: stability, and one strength for many networks.

    python bench/laws.py [--out FILE] [--csv FILE] [--steps N]

Writes docs/laws.md and bench/results/laws.csv.
"""

import argparse
import logging
import math
from itertools import product
from pathlib import Path

import rows
import torch
from torch import nn

import efreg
from efreg.lab import models

ROOT = Path(__file__).parents[1]
ALPHAS = [10.0**e for e in range(-16, -5, 2)]
READINGS = {"once": None, "each step": 1}
NETWORKS = {
    "ResNet-20": models.resnet20,
    "ResNet-56": models.resnet56,
    "VGG-19": lambda: models.vgg19(num_classes=100),
}
STRENGTHS = {"paper's α": [1e-16, 1e-14, 1e-12, 1e-11], "relative α": [1e-4, 1e-3, 1e-2, 1e-1]}
NEAR_ZERO = 0.01
"""A filter below this share of its layer's largest counts as near zero."""


def pulled(model: nn.Module, law: efreg.Law, *, steps: int, lr: float, **options) -> float:
    """Weights that the force alone moves, so many steps. Their largest magnitude / that at the start."""
    before = largest = most(model)
    with efreg.attach(model, law=law, check=None, **options):
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        for step in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.ndim > 1 else None
            optimizer.step()
            if step % 100 == 99:
                largest = max(largest, most(model))
                if not largest < 1e9 * before:
                    break
    return largest / before


def most(model: nn.Module) -> float:
    """The largest magnitude of a filter."""
    found = [w.detach().flatten(1).abs().sum(1).max().item() for w in model.parameters() if w.ndim > 1]
    return max(found) if all(map(math.isfinite, found)) else math.inf


def stability(steps: int) -> list[dict]:
    """128 Kaiming filters of 1152 numbers under every law, update, reading and strength, lr 0.1."""
    found = []
    for (name, kind), update, (reading, refresh) in product(
        efreg.LAWS.items(), ("gradient", "proximal"), READINGS.items()
    ):
        if not kind.has_strength() or ("greg" in name and refresh != 1):
            continue
        for alpha in ALPHAS:
            torch.manual_seed(0)
            layer = nn.Conv2d(128, 128, 3, bias=False)
            grown = pulled(layer, kind(alpha), steps=steps, lr=0.1, update=update, refresh=refresh)
            found.append({"law": name, "update": update, "charges": reading, "alpha": alpha, "grown": grown})
        print(name, update, reading, *(f"{r['grown']:.3g}" for r in found[-len(ALPHAS) :]), flush=True)
    return found


def near_zero(model: nn.Module) -> float:
    """The share of filters below NEAR_ZERO of their layer's largest."""
    m = [c.magnitude for c in (efreg.measure(w) for w in model.parameters() if w.ndim == 4)]
    return sum((x < NEAR_ZERO * x.max()).sum().item() for x in m) / sum(map(len, m))


def one_strength(steps: int) -> list[dict]:
    """Kaiming networks of several sizes under one strength, proximal steps, charges once, lr 0.1."""
    found = []
    for (kind, alphas), (name, build) in product(STRENGTHS.items(), NETWORKS.items()):
        for alpha in alphas:
            torch.manual_seed(0)
            model = build()
            law = efreg.Electrostatic(alpha, relative=kind == "relative α", softening=0.0)
            pulled(model, law, steps=steps, lr=0.1, update="proximal")
            found.append({"kind": kind, "alpha": alpha, "network": name, "near zero": near_zero(model)})
            print(kind, name, f"{alpha:g} {found[-1]['near zero']:.3f}", flush=True)
    return found


def page(stable: list[dict], shares: list[dict], steps: int) -> str:
    """docs/laws.md."""
    lines = [
        "# What the laws do by themselves",
        "",
        "Made by `python bench/laws.py`: weights that the force alone moves, "
        f"{steps} steps of SGD, lr 0.1, momentum 0.9.",
        "",
        "## Stability",
        "",
        "How many times larger than at the start the largest of 128 Kaiming filters (D = 1152) was at any",
        "hundredth step; 1 is no growth, ∞ that it is no number any more. Proximal steps do not grow it (but",
        "greg2 may, which lets the units that it spares grow).",
        "",
        "| law | update | charges | " + " | ".join(f"α = {alpha:.0e}" for alpha in ALPHAS) + " |",
        "|---|---|---|" + "---|" * len(ALPHAS),
    ]
    for key in dict.fromkeys((r["law"], r["update"], r["charges"]) for r in stable):
        cells = [short(r["grown"]) for r in stable if (r["law"], r["update"], r["charges"]) == key]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    lines += [
        "",
        "## One strength for networks of any size",
        "",
        f"The share of filters below {NEAR_ZERO:.0%} of their layer's largest, in %: Kaiming weights,",
        "charges once, proximal steps. `Electrostatic(relative=True)` counts charges in units of the",
        "layer's source. With either a strength that takes all units of the source's own sign takes as",
        "many of each network, some 40 %; how early that happens depends on the network with both.",
        "",
        "| law | α | " + " | ".join(NETWORKS) + " |",
        "|---|---|" + "---|" * len(NETWORKS),
    ]
    for kind, alpha in dict.fromkeys((r["kind"], r["alpha"]) for r in shares):
        cells = [f"{100 * r['near zero']:.0f}" for r in shares if (r["kind"], r["alpha"]) == (kind, alpha)]
        lines.append(f"| {kind} | {alpha:.0e} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def short(grown: float) -> str:
    return "∞" if not math.isfinite(grown) else f"{grown:.0e}" if grown >= 1e4 else f"{grown:.3g}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--out", type=Path, default=ROOT / "docs" / "laws.md")
    options.add_argument("--csv", type=Path, default=rows.RESULTS / "laws.csv")
    options.add_argument("--steps", type=int, default=900)
    given = options.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    stable, shares = stability(given.steps), one_strength(given.steps)
    given.out.write_text(page(stable, shares, given.steps))
    stability_rows = [
        rows.row(", ".join(map(str, list(r.values())[:4])), "auto", "128 × 1152", [r["grown"]] * 2, "x")
        for r in stable
    ]
    share_rows = [
        rows.row(f"{r['kind']} = {r['alpha']:g}", "auto", r["network"], [r["near zero"]] * 2, "near zero")
        for r in shares
    ]
    rows.write(given.csv, stability_rows + share_rows)


if __name__ == "__main__":
    main()
