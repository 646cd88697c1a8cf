"""Repair without training: what public ResNets keep on CIFAR-10 when they are cut, by the number of images.

    python bench/repair.py --data data                   # rows of bench/results/repair.csv that are missing
    python bench/repair.py --data data --only resnet20 --table

A row is a network, an importance, a ratio and a number of images: accuracy in percent on the whole test set
right after the cut, with statistics re-estimated, and repaired; seconds and the peak of memory of the repair.
"""

import argparse
import copy
import csv
import resource
import time
from itertools import islice, product
from pathlib import Path

import tables
import torch

import efreg
from efreg.lab import checkpoints, data, engine, models

RESULTS = Path(__file__).parent / "results" / "repair.csv"
WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
IMAGES = (200, 1000, 2000, 5000)
IMPORTANCES = ("l1", "reconstruction")
RANKING_IMAGES = 500
"""By which reconstruction ranks."""

KEYS = ("network", "importance", "ratio", "images")
COLUMNS = (*KEYS, "cut", "statistics", "repaired", "seconds", "peak_mb", "threads", "torch")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="data", help="folder of CIFAR-10 and of weights/")
parser.add_argument("--only", nargs="+", default=list(WEIGHTS), choices=WEIGHTS)
parser.add_argument("--importances", nargs="+", default=list(IMPORTANCES), choices=IMPORTANCES)
parser.add_argument("--images", nargs="+", type=int, default=list(IMAGES))
parser.add_argument("--table", action="store_true", help="print what is there, measure nothing")


def rows() -> list[dict]:
    """What has been measured."""
    if not RESULTS.exists():
        return []
    with open(RESULTS, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add(row: dict) -> None:
    """One row more."""
    new = not RESULTS.exists()
    with open(RESULTS, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def network(name: str, folder: str) -> torch.nn.Module:
    """With its public weights, in eval mode."""
    model = models.build(name, 10, 3)
    model.load_state_dict(checkpoints.load_weights(Path(folder, "weights", WEIGHTS[name])))
    return model.eval().to(memory_format=torch.channels_last)  # a third faster on a CPU


def measure(name: str, importance: str, ratio: float, counts: list[int], model, images) -> None:
    """The rows of one cut."""
    few = next(images.train.epoch(RANKING_IMAGES, 0, 0))[0]
    plan = efreg.plan(model, ratio=ratio, coupled=False, importance=importance, example_inputs=few)
    small = efreg.prune(model, plan, example_inputs=few[:2])
    cut = engine.evaluate(small, images.test)[1]
    for count in counts:
        repaired, again = copy.deepcopy(small), copy.deepcopy(small)
        start = time.perf_counter()
        efreg.compensate(repaired, model, images.train.epoch(250, 0, 0), images=count)
        seconds = time.perf_counter() - start
        efreg.recalibrate(again, islice(images.train.epoch(min(count, 250), 0, 0), -(-count // 250)))
        row = {
            "network": name,
            "importance": importance,
            "ratio": ratio,
            "images": count,
            "cut": f"{cut:.2f}",
            "statistics": f"{engine.evaluate(again, images.test)[1]:.2f}",
            "repaired": f"{engine.evaluate(repaired, images.test)[1]:.2f}",
            "seconds": f"{seconds:.1f}",
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        add(row)
        print(*(f"{key} {row[key]}" for key in COLUMNS[:8]), flush=True)


def table(found: list[dict]) -> str:
    """Accuracy by ratio, a row for each network, importance and number of images."""
    lines: dict[tuple, dict[str, dict]] = {}
    for row in found:
        lines.setdefault((row["network"], row["importance"], row["images"]), {})[row["ratio"]] = row
    ratios = list(map(str, RATIOS))
    body = []
    for (name, importance, images), at in sorted(
        lines.items(), key=lambda x: (x[0][0], x[0][1], int(x[0][2]))
    ):
        cells = [
            f"{at[r]['cut']} / {at[r]['statistics']} / **{at[r]['repaired']}**" if r in at else ""
            for r in ratios
        ]
        seconds = max(float(row["seconds"]) for row in at.values())
        body.append([name, importance, images, *cells, f"{seconds:.0f}"])
    return tables.markdown(["network", "importance", "images", *ratios, "s at most"], body)


def main() -> None:
    options = parser.parse_args()
    if not options.table:
        there = {tuple(str(row[key]) for key in KEYS) for row in rows()}
        images = data.load("cifar10", options.data)
        for name in options.only:
            model = network(name, options.data)
            for importance, ratio in product(options.importances, RATIOS):
                counts = [n for n in options.images if (name, importance, str(ratio), str(n)) not in there]
                if counts:
                    measure(name, importance, ratio, counts, model, images)
    print(table(rows()))


if __name__ == "__main__":
    main()
