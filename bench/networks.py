"""The table of networks: each of a long list planned, cut, proven and trained for a step.

    python bench/networks.py [--only NAME ...] [--out FILE] [--csv FILE] [--limit SECONDS] [--anew]

Every network has a process of its own, with one thread and a time limit. Rows without an error that the CSV
file has of this commit are not made again unless --anew. `--only` takes names and patterns, as "timm:res*".
"""

import argparse
import csv
import json
import re
import subprocess
import sys
import time
from collections import Counter
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import rows
import torch
import zoo

import efreg

ROOT = Path(__file__).parents[1]
COLUMNS = (
    *("network", "input", "approximate", "groups", "units", "macs_before", "macs_after", "factor"),
    *("plan_seconds", "prune_seconds", "frozen", "why", "error", "device", "versions", "commit"),
)

EARLIER = {
    "torchvision:resnet18": ("1.86", "3.75"),
    "torchvision:resnet50": ("2.24", "3.88"),
    "torchvision:resnext50_32x4d": ("refused", "3.89"),
    "torchvision:mobilenet_v2": ("1.16", "3.58"),
    "torchvision:mobilenet_v3_small": ("", "3.21"),
    "torchvision:mobilenet_v3_large": ("", "3.58"),
    "torchvision:mnasnet1_0": ("1.15", "3.52"),
    "torchvision:efficientnet_b0": ("1.11", "3.55"),
    "torchvision:regnet_y_400mf": ("1.00", "3.88"),
    "torchvision:regnet_x_400mf": ("refused", "3.89"),
    "torchvision:squeezenet1_0": ("refused", "3.06"),
    "torchvision:shufflenet_v2_x1_0": ("refused", "2.33"),
    "torchvision:convnext_tiny": ("refused", "1.88"),
    "torchvision:googlenet": ("1.64", "3.70"),
    "torchvision:inception_v3": ("1.89", "3.99"),
    "torchvision:densenet121": ("1.74", "3.84"),
    "torchvision:vit_b_16": ("", "1.98"),
    "torchvision:swin_t": ("", "1.45"),
    "torchvision:maxvit_t": ("", "1.70"),
    "torchvision:fcn_resnet50": ("", "3.98"),
    "timm:resnet26d": ("", "3.97"),
    "timm:resnetv2_50": ("", "3.88"),
    "timm:seresnet50": ("", "3.88"),
    "timm:mobilenetv4_conv_small": ("", "3.60"),
    "timm:efficientnet_b0": ("", "3.55"),
    "timm:resnest14d": ("", "3.98"),
    "timm:dla34": ("", "3.85"),
    "timm:hrnet_w18_small": ("", "3.93"),
    "timm:densenet121": ("", "3.84"),
    "timm:ghostnet_100": ("", "3.39"),
    "timm:repvgg_a0": ("", "3.94"),
    "timm:regnety_008": ("", "3.94"),
    "timm:fastvit_t8": ("", "3.55"),
    "timm:levit_128s": ("", "2.48"),
    "timm:efficientvit_b0": ("", "2.63"),
    "timm:mixnet_s": ("", "1.17"),
    "timm:rexnet_100": ("", "2.07"),
    "timm:skresnet18": ("", "1.86"),
}
"""The factors of version 0.1, and of a prototype of the groups."""

INTRODUCTION = """# Networks

Half of every group of units is planned (`efreg.plan(model, ratio=0.5, example_inputs=x)`), cut and proven
(`efreg.prune`), and the result is trained for one step. Weights are random, batch norms have random
statistics. Each row comes from a process of its own with one thread: {versions},
torchvision {torchvision}, timm {timm}, {device}, commit {commit}; `python bench/networks.py`
makes the table anew. *Factor* is MACs before / after, *0.1* what version 0.1 gave, *seconds* are CPU time of
plan and of prune with its proof. *Stays* is the share of all rows of dense weights that cannot go, with the
reasons that keep the most beside those of the outputs, which every network has. *≈*: with `approximate=True`.

| network | input | groups | units | MACs before | after | factor | 0.1 | seconds | stays | why |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--only", nargs="+", default=["*"], metavar="NAME")
    options.add_argument("--out", type=Path, default=ROOT / "docs" / "networks.md")
    options.add_argument("--csv", type=Path, default=rows.RESULTS / "networks.csv")
    options.add_argument("--limit", type=float, default=900, help="seconds that a network may take")
    options.add_argument("--anew", action="store_true", help="also what has a row of this commit")
    options.add_argument("--one", help=argparse.SUPPRESS)
    given = options.parse_args()
    cases = zoo.cases()
    if given.one:
        print(json.dumps(measured(cases[given.one])))
        return 0
    known = read(given.csv)
    wanted = [name for name in cases if any(fnmatch(name, pattern) for pattern in given.only)]
    for number, name in enumerate(wanted, 1):
        done = known.get(name, {"commit": "", "error": ""})
        if given.anew or done["commit"] != rows.commit() or done["error"]:
            known[name] = in_a_process(cases[name], given.limit)
            write(given.csv, [known[n] for n in cases if n in known])
        row = known[name]
        said = f"{float(row['factor']):.2f}×  {seconds(row):.1f} s  " if row["factor"] else ""
        said += row["error"]
        print(f"{number:3} / {len(wanted)}  {name:40}  {said}", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(page([known[name] for name in cases if name in known]))
    return any(known[name]["error"] for name in wanted)


def in_a_process(case: zoo.Case, limit: float) -> dict[str, str]:
    """The row of a network that is measured in a process of its own; its error where there is one."""
    command = [sys.executable, __file__, "--one", case.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}
        last = done.stderr.strip().rpartition("\n")[2] or f"ended by signal {-done.returncode}"
        error = ("" if float(found["factor"]) >= case.least else f"below {case.least}") if found else last
    except subprocess.TimeoutExpired:
        found, error = {}, f"over {limit:.0f} s"
    known = {
        "network": case.name,
        "input": f"{case.batch} × {case.size}²",
        "approximate": "yes" if case.approximate else "",
        "error": error,
        "device": rows.device("cpu").replace(f"{torch.get_num_threads()} threads", "1 thread"),
        "versions": rows.versions("cpu"),
        "commit": rows.commit(),
    }
    return {**dict.fromkeys(COLUMNS, ""), **{k: str(v) for k, v in found.items()}, **known}


def measured(case: zoo.Case) -> dict[str, object]:
    """Plans, prunes, proves and trains a network; what its row says."""
    torch.set_num_threads(1)
    model, x = case.build(), case.inputs()
    start = time.process_time()
    plan = efreg.plan(model, ratio=0.5, example_inputs=x, approximate=case.approximate)
    planned = time.process_time()
    pruned = efreg.prune(model, plan, example_inputs=x)
    done = time.process_time()
    before, after = plan.macs
    measured = efreg.macs(pruned, x)
    assert measured == after, f"{measured} MACs are left, {after} were planned"
    share, why = stays(efreg.inspect(model, x, approximate=case.approximate), plan)
    train(pruned, x)
    return {
        "groups": len(plan),
        "units": sum(cut.group.size for cut in plan.cuts),
        "macs_before": before,
        "macs_after": after,
        "factor": f"{before / after:.3f}",
        "plan_seconds": f"{planned - start:.2f}",
        "prune_seconds": f"{done - planned:.2f}",
        "frozen": f"{share:.4f}",
        "why": why,
    }


def train(model: torch.nn.Module, x: torch.Tensor) -> None:
    """One step of SGD on the outputs' squares; what it gives must be finite."""
    outputs = tensors(model.train()(x))
    sum(y.square().mean() / y.detach().square().mean() for y in outputs).backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert all(p.isfinite().all() for p in model.parameters()), "a training step gave what is not finite"


def tensors(output) -> list[torch.Tensor]:
    """The tensors of an output: one, a mapping's, or a tuple's."""
    output = output.values() if isinstance(output, dict) else output
    return [output] if isinstance(output, torch.Tensor) else [y for y in output if y is not None]


def stays(inspection: efreg.Inspection, plan: efreg.Plan) -> tuple[float, str]:
    """The share of all dense weights' rows that cannot go, and the reasons that keep the most."""
    kept: Counter[str] = Counter()
    for frozen in inspection.frozen:
        kept[shortened(frozen.reason)] += frozen.count
    for left in plan.left_out:
        kept[f"refused by the proof: {shortened(left.reason)}"] += written(left.group)
    every = sum(x.count for x in inspection.frozen) + sum(map(written, inspection.groups))
    share = sum(kept.values()) / every
    kept.pop(shortened("an output of the network has them"), None)
    top = [f"{reason} ({100 * count / every:.2g} %)" for reason, count in kept.most_common(3)]
    return share, "; ".join(top)


def written(group: efreg.Group) -> int:
    """How many rows of dense weights write a group."""
    return sum(len(member.index) for member in group.of("writes"))


def shortened(reason: str) -> str:
    """A reason without the module where it arose, and without figures."""
    reason = re.sub(r" in '[^']*'", "", reason)
    reason = re.sub(r"(outputs differ) by .*", r"\1", reason)
    return re.sub(r"breaks down: shape .* is invalid for input of size \d+", "breaks down at a view", reason)


def seconds(row: dict[str, str]) -> float:
    return float(row["plan_seconds"]) + float(row["prune_seconds"])


def page(known: list[dict[str, str]]) -> str:
    """docs/networks.md."""
    facts = {k: ", ".join(dict.fromkeys(row[k] for row in known)) for k in ("versions", "device", "commit")}
    libraries = {name: metadata.version(name) for name in ("torchvision", "timm")}
    return INTRODUCTION.format(**facts, **libraries) + "".join(map(line, known))


def line(row: dict[str, str]) -> str:
    name = f"{row['network'].partition(':')[2]}{' (timm)' if row['network'].startswith('timm') else ''}"
    name = name.replace(":", ", its ") + (" ≈" if row["approximate"] else "")
    old, _ = EARLIER.get(row["network"], ("", ""))
    if not row["factor"]:
        cells = [name, row["input"], *[""] * 5, old, "", "", row["error"].replace("|", "/")]
    else:
        before, after = (f"{int(row[key]):,}" for key in ("macs_before", "macs_after"))
        cells = [name, row["input"], row["groups"], row["units"], before, after]
        cells += [f"{float(row['factor']):.2f}", old, f"{seconds(row):.1f}"]
        cells += [f"{100 * float(row['frozen']):.1f} %", row["why"] or "outputs alone"]
    return f"| {' | '.join(cells)} |\n"


def read(path: Path) -> dict[str, dict[str, str]]:
    """The rows of an earlier run, by network."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {row["network"]: row for row in csv.DictReader(file)}


def write(path: Path, found: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    sys.exit(main())
