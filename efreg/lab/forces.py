"""Which force keeps most: a study's candidates trained, pruned at every ratio, and set beside each other."""

import csv
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console

import efreg
from efreg.lab import checkpoints, data, engine, figures
from efreg.lab.checkpoints import Settings
from efreg.lab.logs import progress, write_csv
from efreg.lab.studies import STUDIES, Candidate, Study
from efreg.lab.sweep import STATISTICS_BATCHES

RATIOS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Before pruning, and the ratios over whose mean the strength of a force is chosen."""

LATENCY_REPEATS = 200


@dataclass(frozen=True)
class Result:
    """A trained candidate cut at one ratio: one row of the CSV. Accuracies are in percent.

    chosen_by: on the held-out training images. accuracy, recalibrated: on the test images, right after
    pruning and with re-estimated batch-norm statistics. dead, macs_without: the dead filters of the whole
    network, and the MACs that are left without them.
    """

    force: str
    scope: str
    update: str
    alpha: float
    seed: int
    ratio: float
    chosen_by: float
    accuracy: float
    recalibrated: float
    macs: int
    dead: int
    macs_without: int
    epochs: int
    dtype: str
    device: str


def run(
    out: str | Path,
    *,
    data_folder: str = "data",
    only: Sequence[str] = (),
    seeds: int = 3,
    device: str = "auto",
    console: Console,
) -> None:
    """Runs the studies named in `only`, or all whose data is there: what is missing, the rest is taken over.

    Writes to `out`, for each study, its rows as CSV, tables as Markdown and a picture. An interrupted run
    goes on after its last epoch. Raises ValueError or FileNotFoundError where the data of a study that was
    named is not there.
    """
    out = Path(out)
    for name in only or STUDIES:
        base = replace(STUDIES[name].base, data=data_folder, device=device)
        study = replace(STUDIES[name], base=base)
        try:
            test = data.load(base.dataset, data_folder, device=engine.device_named(device)).test
        except FileNotFoundError as error:
            if only:
                raise
            console.print(f"{name} is left out: {error}", highlight=False, markup=False)
            continue
        runs = [(c, seed) for c in study.candidates for seed in range(min(seeds, c.seeds))]
        _train(study, runs, out / name, test, console)
        results = [result for run in runs for result in read(_file(out / name, *run))]
        write_csv(out / f"forces-{study.name}.csv", map(asdict, results))
        text = tables(study, results, _latencies(study))
        (out / f"forces-{study.name}.md").write_text(text)
        _draw(out / f"forces-{study.name}.png", study, results)
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        console.print(f"Written to {out}: forces-{study.name}.csv, .md, .png", highlight=False)


def _train(
    study: Study, runs: Iterable[tuple[Candidate, int]], folder: Path, test: data.Images, console: Console
) -> None:
    """The runs, each a candidate and a seed, whose files are missing in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [run for run in runs if not _file(folder, *run).exists()]
    if not missing:
        return
    with progress(console) as bar:
        task = bar.add_task(study.name, total=len(missing) * study.base.epochs, note="")
        for candidate, seed in missing:
            way = candidate.way
            bar.update(
                task,
                note=f"{way.force.name}, {way.scope}, {way.update}, α = {candidate.alpha:g}, seed {seed}",
            )
            settings = candidate.settings(replace(study.base, weights=_start(study, folder, seed)), seed)
            rows = _result(candidate, settings, folder, test, lambda: bar.advance(task))
            write_csv(_file(folder, candidate, seed), map(asdict, rows))


def _file(folder: Path, candidate: Candidate, seed: int) -> Path:
    way = candidate.way
    name = f"{way.force.name} {way.scope} {way.update} {candidate.alpha:g} {seed}"
    return folder / f"{name.replace(',', '').replace(' ', '-')}.csv"


def _start(study: Study, folder: Path, seed: int) -> str | None:
    """The file of the weights that a seed's runs start from, trained here where the study says so."""
    if study.weights:
        return str(Path(study.base.data) / study.weights)
    if not study.start_epochs:
        return None
    path = folder / f"start-{seed}.safetensors"
    if not path.exists():
        settings = replace(study.base, epochs=study.start_epochs, lr=0.1, seed=seed)
        run = engine.Run(settings)
        for _ in run.epochs():
            pass
        efreg.save(run.model, path)
    return str(path)


def _result(
    candidate: Candidate, settings: Settings, folder: Path, test: data.Images, tick: Callable[[], None]
) -> list[Result]:
    """Trains, or goes on with what an interruption left, and cuts at every ratio."""
    path = folder / "interrupted.pt"
    left = checkpoints.load(path) if path.exists() else None
    going_on = left is not None and left.settings == settings
    run = engine.Run(settings, left if going_on else None)
    for _ in range(run.epoch):
        tick()
    for _ in run.epochs():
        checkpoints.save(run.checkpoint(), path)
        tick()
    path.unlink(missing_ok=True)
    return [_row(candidate, run, ratio, *figures) for ratio, figures in zip(RATIOS, _cuts(run, test))]


def _row(
    candidate: Candidate, run: engine.Run, ratio: float, held: float, accuracy: float, again: float, macs: int
) -> Result:
    way, last = candidate.way, run.history[-1]
    return Result(
        force=way.force.name,
        scope=way.scope,
        update=way.update,
        alpha=candidate.alpha,
        seed=run.settings.seed,
        ratio=ratio,
        chosen_by=held,
        accuracy=accuracy,
        recalibrated=again,
        macs=macs,
        dead=int(last["dead"]),
        macs_without=int(last["macs"]),
        epochs=run.settings.epochs,
        dtype=str(run.dtype).removeprefix("torch."),
        device=run.device.type,
    )


def _cuts(run: engine.Run, test: data.Images) -> Iterable[tuple[float, float, float, int]]:
    """At each ratio accuracies on held-out and test images, with re-estimated statistics; and the MACs."""
    for ratio in RATIOS:
        plan = efreg.plan(run.model, ratio=ratio, example_inputs=run.example)
        small = efreg.prune(run.model, plan, example_inputs=run.example)
        held, accuracy = (engine.evaluate(small, part, dtype=run.dtype)[1] for part in (run.data.test, test))
        efreg.recalibrate(small, islice(run.data.train.batches(250), STATISTICS_BATCHES))
        recalibrated = engine.evaluate(small, test, dtype=run.dtype)[1]
        yield held, accuracy, recalibrated, efreg.macs(small, run.example[:1])


def read(path: str | Path) -> list[Result]:
    """The results in a file."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [Result(**{field.name: field.type(row[field.name]) for field in fields(Result)}) for row in rows]


@dataclass(frozen=True)
class Line:
    """A way at one strength over its seeds: mean and standard deviation at each ratio."""

    way: tuple[str, str, str]
    alpha: float
    seeds: int
    chosen_by: float
    accuracy: tuple[tuple[float, float], ...]
    recalibrated: tuple[tuple[float, float], ...]
    dead: float
    macs_without: float


def lines(results: Sequence[Result]) -> list[Line]:
    """The results, seeds taken together."""
    groups: dict[tuple, list[Result]] = {}
    for r in results:
        groups.setdefault((r.force, r.scope, r.update, r.alpha), []).append(r)
    return [_line(key, found) for key, found in groups.items()]


def _line(key: tuple, results: Sequence[Result]) -> Line:
    at = [[r for r in results if r.ratio == ratio] for ratio in RATIOS]

    def spread(figure: str) -> tuple[tuple[float, float], ...]:
        return tuple(_mean_and_deviation([getattr(r, figure) for r in found]) for found in at)

    *way, alpha = key
    return Line(
        tuple(way),
        alpha,
        len(at[0]),
        statistics.mean(r.chosen_by for found in at[1:] for r in found),
        spread("accuracy"),
        spread("recalibrated"),
        statistics.mean(r.dead for r in results),
        statistics.mean(r.macs_without for r in results),
    )


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def best(found: Iterable[Line]) -> list[Line]:
    """Of each way the strength that keeps most on the held-out images, on average over the ratios."""
    chosen: dict[tuple, Line] = {}
    for line in found:
        if line.way not in chosen or line.chosen_by > chosen[line.way].chosen_by:
            chosen[line.way] = line
    return list(chosen.values())


def tables(study: Study, results: Sequence[Result], latencies: Sequence[float]) -> str:
    """Markdown: each way at its best strength, right after pruning and with re-estimated statistics."""
    chosen = best(lines(results))
    base = study.base
    title = (
        f"{base.model} on {base.dataset}, {base.epochs} epoch{'s' * (base.epochs > 1)}, "
        f"{results[0].dtype} on {results[0].device}: "
        "accuracy in % on the test images, mean ± standard deviation"
    )
    head = ["force", "acts on", "update", "α", "n", "before", *(f"{100 * r:.0f} %" for r in RATIOS[1:])]
    macs = [f"{r.macs / 1e6:.1f}" for r in results[: len(RATIOS)]]
    costs = [
        ["MACs, millions", *[""] * 4, *macs],
        ["latency of one image, ms", *[""] * 4, *(f"{latency:.2f}" for latency in latencies)],
    ]
    after = [[*_named(line), *_cells(line, line.accuracy), f"{line.dead:.0f}"] for line in chosen]
    again = [[*_named(line), *_cells(line, line.recalibrated), f"{line.dead:.0f}"] for line in chosen]
    return "\n\n".join(
        [
            f"### {title}",
            "Right after pruning, nothing re-trained and nothing re-estimated:",
            _markdown([*head, "dead"], [*after, *([*cost, ""] for cost in costs)]),
            "Batch-norm statistics re-estimated:",
            _markdown([*head, "dead"], again),
        ]
    )


def _named(line: Line) -> list[str]:
    force, scope, update = line.way
    if line.alpha == 0:
        return [force, "", "", "", str(line.seeds)]
    return [force, scope, update, f"{line.alpha:g}", str(line.seeds)]


def _cells(line: Line, figures: Iterable[tuple[float, float]]) -> list[str]:
    return [
        f"{mean:.1f} ± {deviation:.1f}" if line.seeds > 1 else f"{mean:.1f}" for mean, deviation in figures
    ]


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _latencies(study: Study) -> list[float]:
    """Milliseconds that one image takes through the network pruned at each of the ratios."""
    holds = data.info(study.base.dataset, study.base.data)
    model = engine.build(study.base, holds.num_classes, holds.shape).eval()
    example = torch.zeros(2, *holds.shape)
    found = []
    for ratio in RATIOS:
        plan = efreg.plan(model, ratio=ratio, example_inputs=example)
        small = efreg.prune(model, plan, example_inputs=example)
        report = efreg.report(model, small, example_inputs=example[:1], repeats=LATENCY_REPEATS)
        found.append(report.after.latency)
    return found


def _draw(path: Path, study: Study, results: Sequence[Result]) -> None:
    half = RATIOS.index(0.5)
    found = lines(results)
    kept = best(found)
    points = [
        figures.Point(line.way[0], line.way[1], line.accuracy[0][0], line.accuracy[half][0], line in kept)
        for line in found
    ]
    figures.draw_trade(
        path,
        points,
        "Accuracy before, against accuracy without half of the filters",
        f"{study.base.model} on {study.base.dataset}; every strength of every force, the chosen ones large",
    )
