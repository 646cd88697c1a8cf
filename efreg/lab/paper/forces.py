"""Which force keeps most: a study's candidates trained, pruned at every ratio, and set beside each other."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import isnan, nan
from pathlib import Path

import torch
from rich.console import Console

import efreg
from efreg.lab import data, distributed, engine, figures
from efreg.lab.checkpoints import Settings, replacing
from efreg.lab.logs import progress, read_csv, write_csv
from efreg.lab.paper import markdown, runs
from efreg.lab.paper.results import RATIOS, Best, Line, Result, best, lines, read
from efreg.lab.paper.studies import STUDIES, Candidate, Study
from efreg.lab.sweep import Cut, pruned, sweep

LATENCY_REPEATS = {1: 200, 128: 20}
"""How often the latency of so many images at once is taken."""


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

    Writes to `out`, for each study, its rows as CSV, tables as Markdown and a picture, and keeps the networks
    in a folder. An interrupted run goes on after its last epoch. Raises ValueError for what cannot be run or
    read, FileNotFoundError where the data of a study that was named is not there.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}: it must be at least 1")
    if distributed.launched() > 1:
        raise ValueError("forces runs in one process: start it without torchrun")
    if unknown := [name for name in only if name not in STUDIES]:
        raise ValueError(f"forces has no study {unknown[0]!r}: there are {', '.join(STUDIES)}")
    out = Path(out)
    for name in only or STUDIES:
        base = replace(STUDIES[name].base, data=data_folder, device=device)
        study = replace(STUDIES[name], base=base)
        try:
            test = _test_images(study)
        except data.Missing as error:
            if only:
                raise
            console.print(f"{name} is left out: {error}", highlight=False, markup=False)
            continue
        with runs.alone(out / name):
            results = _results(study, seeds, out / name, test, console)
            latencies = _latencies(study, out / name)
        write_csv(out / f"forces-{name}.csv", map(asdict, results))
        text = tables(study, results, latencies)
        with replacing(out / f"forces-{name}.md") as file:
            file.write(text.encode())
        _draw(out / f"forces-{name}.png", study, results)
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        console.print(f"Written to {out}: forces-{name}.csv, .md, .png", highlight=False)


def _test_images(study: Study) -> data.Images:
    """Those of the study's data set. Raises FileNotFoundError where they or its first weights are missing."""
    base = study.base
    images = data.load(base.dataset, base.data, device=engine.device_named(base.device)).test
    runs.require_weights(base, study.weights, study.weights_from)
    return images


def _results(study: Study, seeds: int, folder: Path, test: data.Images, console: Console) -> list[Result]:
    """Of every candidate from every seed: read from the folder, or trained, cut and written there."""
    planned = [(c, seed) for c in study.candidates for seed in range(min(seeds, c.seeds))]
    found = []
    with progress(console) as bar:
        task = bar.add_task(study.name, total=len(planned) * study.base.epochs, note="")
        for candidate, seed in planned:
            settings = candidate.settings(replace(study.base, weights=_start(study, folder, seed)), seed)
            first = [runs.fingerprint(settings.weights)] if study.weights else []
            path = folder / f"{runs.stem(str(candidate), settings, *first)}.csv"
            if path.exists():
                bar.advance(task, study.base.epochs)
            else:
                bar.update(task, note=f"{candidate}, seed {seed}")
                _write(path, _run(candidate, settings, path, test, bar, task))
            found += read(path)
    return found


def _write(path: Path, results: Sequence[Result]) -> None:
    """To the file. The checkpoint beside it goes, unless it is the last good one of a run that diverged."""
    write_csv(path, map(asdict, results))
    if not isnan(results[0].accuracy):
        path.with_suffix(".pt").unlink(missing_ok=True)


def _start(study: Study, folder: Path, seed: int) -> str | None:
    """The file of the weights that a seed's runs start from, trained here where the study says so."""
    if study.weights:
        return str(Path(study.base.data, study.weights))
    if not study.start_epochs:
        return None
    settings = replace(study.base, epochs=study.start_epochs, lr=0.1, seed=seed)
    path = folder / f"{runs.stem('start', settings)}.safetensors"
    runs.keep_network(settings, path, lambda _: None)
    return str(path)


def _run(candidate: Candidate, settings: Settings, path: Path, test: data.Images, bar, task) -> list[Result]:
    """Trains, or goes on with what an interruption left, and cuts at every ratio."""
    checkpoint = path.with_suffix(".pt")
    run = runs.resume(settings, checkpoint)
    try:
        runs.finish(run, checkpoint, lambda epochs: bar.advance(task, epochs))
    except engine.Diverged as error:
        bar.console.print(f"{candidate}, seed {settings.seed}: {error}", highlight=False)
        bar.advance(task, settings.epochs - run.epoch)
        return [_result(candidate, run, Cut(ratio, nan, nan, 0, 0), nan) for ratio in RATIOS]
    efreg.save(run.model, path.with_suffix(".safetensors"))
    images = run.data._replace(test=test)
    cuts = sweep(run.model, images, ratios=RATIOS, dtype=run.dtype)
    return [_result(candidate, run, cut, _held_out_accuracy(run, cut.ratio)) for cut in cuts]


def _held_out_accuracy(run: engine.Run, ratio: float) -> float:
    return engine.evaluate(pruned(run.model, ratio, run.example), run.data.test, dtype=run.dtype)[1]


def _result(candidate: Candidate, run: engine.Run, cut: Cut, held_out: float) -> Result:
    way, last = candidate.way, run.history[-1] if run.history else {}
    return Result(
        force=way.force.name,
        scope=way.scope,
        update=way.update,
        alpha=candidate.alpha,
        seed=run.settings.seed,
        ratio=cut.ratio,
        chosen_by=held_out,
        accuracy=cut.accuracy,
        recalibrated=cut.recalibrated,
        macs=cut.macs,
        dead=int(last.get("dead", 0)),
        macs_without=int(last.get("macs", 0)),
        epochs=run.settings.epochs,
        dtype=str(run.dtype).removeprefix("torch."),
        device=run.device.type,
    )


@dataclass(frozen=True)
class Latency:
    """Milliseconds that so many images take together through the network pruned at `ratio`, in float32."""

    ratio: float
    images: int
    milliseconds: float
    device: str
    threads: int


def _latencies(study: Study, folder: Path) -> list[Latency]:
    """Of one image and of many, each at all of the ratios: measured once, and kept in the folder."""
    path = folder / f"{runs.stem('latency', study.base)}.csv"
    if not path.exists():
        write_csv(path, map(asdict, _measure_latencies(study)))
    return read_csv(path, Latency)


def _measure_latencies(study: Study) -> Iterable[Latency]:
    device = engine.device_named(study.base.device)
    holds = data.info(study.base.dataset, study.base.data)
    model = engine.build(study.base, holds.num_classes, holds.shape).to(device).eval()
    example = torch.zeros(max(LATENCY_REPEATS), *holds.shape, device=device)
    if study.base.channels_last:
        model, example = (x.to(memory_format=torch.channels_last) for x in (model, example))
    for images, repeats in LATENCY_REPEATS.items():
        for ratio in RATIOS:
            small = pruned(model, ratio, example[:2])
            report = efreg.report(model, small, example_inputs=example[:images], repeats=repeats)
            yield Latency(ratio, images, report.after.latency, device.type, torch.get_num_threads())


def tables(study: Study, results: Sequence[Result], latencies: Sequence[Latency]) -> str:
    """Markdown: each way at its best strength, right after pruning and with re-estimated statistics."""
    chosen = best(lines(results), study.base.held_out)
    base = study.base
    title = (
        f"{base.model} on {base.dataset}, {base.epochs} epoch{'s' * (base.epochs > 1)}, "
        f"{results[0].dtype} on {results[0].device}: "
        "accuracy in % on the test images, mean ± standard deviation"
    )
    head = ["force", "acts on", "update", "α", "n", "before", *(f"{100 * r:.0f} %" for r in RATIOS[1:])]
    first = latencies[0]
    where = f"float32, {first.device}, {first.threads} thread{'s' * (first.threads > 1)}"
    costs = [
        _cost("MACs, millions", (f"{r.macs / 1e6:.1f}" for r in _whole(results))),
        *(
            _cost(f"ms for {n} image{'s' * (n > 1)} ({where})", _milliseconds(latencies, n))
            for n in LATENCY_REPEATS
        ),
    ]
    after = [[*_named(b), *_cells(b.line, b.line.accuracy), *_left(b.line)] for b in chosen]
    again = [[*_named(b), *_cells(b.line, b.line.recalibrated)] for b in chosen]
    return "\n\n".join(
        [
            f"### {title}",
            f"{_course(study)} Right after pruning, nothing re-trained and nothing re-estimated. dead: "
            "filters that are zero before anything is cut; M left: millions of MACs without them.",
            markdown.table([*head, "dead", "M left"], [*after, *costs]),
            f"{_choice(study, chosen)}{_seen(study)}",
            "Batch-norm statistics re-estimated:",
            markdown.table(head, again),
        ]
    )


def _whole(results: Sequence[Result]) -> Sequence[Result]:
    """The rows of a run that was trained to its end; of any, if there is none."""
    first = next((i for i, r in enumerate(results) if r.macs), 0)
    return results[first : first + len(RATIOS)]


def _course(study: Study) -> str:
    """How the networks were trained."""
    base = study.base
    start = study.weights or "random weights"
    if study.start_epochs:
        start = f"a network trained without a force over {study.start_epochs} epochs"
    course = f"Trained from {start}, learning rate {engine.start_lr(base):g}, {base.schedule}"
    if base.alpha_schedule != "constant":
        course += f"; α's schedule is {base.alpha_schedule}, over {base.alpha_until:.0%} of the steps"
    return f"{course}."


def _choice(study: Study, chosen: Sequence[Best]) -> str:
    """How the strengths were chosen."""
    if all(len(b.tried) == 1 for b in chosen):
        return "One strength of each, none was chosen."
    return (
        "Where several strengths were tried α is the weakest that keeps as much as any, within one standard "
        f"error, of {study.base.held_out} training images that were held out, on average over the ratios; "
        "↑ ↓: the largest, the smallest of them. The CSV has all."
    )


def _seen(study: Study) -> str:
    return (
        " The public weights were trained on all training images, those held out too."
        if study.weights
        else ""
    )


def _cost(name: str, figures: Iterable[str]) -> list[str]:
    return [name, *[""] * 4, *figures, "", ""]


def _milliseconds(latencies: Iterable[Latency], images: int) -> list[str]:
    return [f"{latency.milliseconds:.2f}" for latency in latencies if latency.images == images]


def _named(b: Best) -> list[str]:
    force, scope, update = b.line.way
    if b.line.alpha == 0:
        return [force, "", "", "", str(b.line.seeds)]
    return [force, scope, update, f"{b.line.alpha:g} {b.end}".strip(), str(b.line.seeds)]


def _cells(line: Line, spread: Iterable[tuple[float, float]]) -> list[str]:
    if line.diverged:
        return ["diverged"] * len(RATIOS)
    return [f"{mean:.1f} ± {sd:.1f}" if line.seeds > 1 else f"{mean:.1f}" for mean, sd in spread]


def _left(line: Line) -> list[str]:
    return [f"{line.dead:.0f}", f"{line.macs_without / 1e6:.1f}"]


def _draw(path: Path, study: Study, results: Sequence[Result]) -> None:
    half = RATIOS.index(0.5)
    found = [line for line in lines(results) if not line.diverged]
    kept = [b.line for b in best(found, study.base.held_out)]
    points = [
        figures.Point(*line.way, line.accuracy[0][0], line.accuracy[half][0], line in kept) for line in found
    ]
    figures.draw_trade(
        path,
        points,
        "Accuracy before, against accuracy without half of the filters",
        f"{study.base.model} on {study.base.dataset}; all that was tried, large what stands in the table",
    )
