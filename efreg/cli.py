"""The console script `efreg`: demo, train, prune, sweep, report, paper, env."""

import argparse
import importlib.util
import logging
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import efreg

LAB = ("torchvision", "sklearn", "matplotlib", "rich", "tensorboard")


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns 0, 2 for bad input (one line on stderr), 130 after Ctrl-C; exits on usage."""
    arguments = _parser().parse_args(argv)
    if arguments.verbose:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.run is not _env and (
        missing := [name for name in LAB if not importlib.util.find_spec(name)]
    ):
        return _fail(f'{arguments.command} needs {", ".join(missing)}: pip install "efreg[lab]"')
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        if arguments.verbose:
            raise
        return _fail(" ".join(str(error).split()))
    return 0


def _fail(message: str) -> int:
    print(f"efreg: error: {message}", file=sys.stderr)
    return 2


def _interrupted(arguments: argparse.Namespace) -> int:
    remedies = {_train: _how_to_go_on, _paper: lambda _: "the same command goes on from here"}
    remedy = f"; {remedies[arguments.run](arguments.out)}" if arguments.run in remedies else ""
    print(f"efreg: interrupted{remedy}", file=sys.stderr)
    return 130


def _how_to_go_on(out: Path) -> str:
    from efreg.lab.training import CHECKPOINT

    if not (out / CHECKPOINT).is_file():
        return "no epoch was done: start again"
    return f"go on with: efreg train --resume --out {shlex.quote(str(out))}"


def _demo(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from efreg.lab import demo

    demo.run(arguments.out, seed=arguments.seed, epochs=arguments.epochs, console=Console())


def _train(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from efreg.lab import training
    from efreg.lab.checkpoints import Settings

    given = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    training.train(
        settings, arguments.out, resume=arguments.resume, download=arguments.download, console=Console()
    )


def _prune(arguments: argparse.Namespace) -> None:
    from efreg.lab import checkpoints, engine

    checkpoint = checkpoints.load(arguments.checkpoint)
    model, example = engine.restore(checkpoint), checkpoint.example()
    plan = efreg.plan(
        model,
        arguments.ratios,
        ratio=arguments.ratio,
        speedup=arguments.speedup,
        dead=arguments.dead,
        skip=arguments.skip,
        example_inputs=example,
    )
    small = efreg.prune(model, plan, example_inputs=example)
    name = "without-dead.safetensors" if arguments.dead else "pruned.safetensors"
    out = arguments.out or arguments.checkpoint.with_name(name)
    efreg.save(small, out)
    print(efreg.report(model, small, example_inputs=example[:1]))
    print(f"Written to {out}")


def _sweep(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from efreg.lab import sweep

    sweep.run(arguments.checkpoint, arguments.out, data_folder=arguments.data, console=Console())


def _report(arguments: argparse.Namespace) -> None:
    from efreg.lab import checkpoints, engine

    checkpoint = checkpoints.load(arguments.checkpoint)
    model = engine.restore(checkpoint)
    small = efreg.load(engine.restore(checkpoint), arguments.pruned)
    print(efreg.report(model, small, example_inputs=checkpoint.example()[:1]))


def _paper(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from efreg.lab.paper import forces, reproduce

    given = {name: getattr(arguments, name) for name in ("only", "seeds", "device")}
    given.update(data_folder=arguments.data, console=Console())
    if arguments.what == "forces":
        others = {"epochs-scale": arguments.epochs_scale != 1, "recipes": arguments.recipes}
        others["recalibrated"] = arguments.recalibrated
        if told := [f"--{name}" for name, given in others.items() if given]:
            raise ValueError(f"forces has studies of its own: drop {' and '.join(told)}")
        return forces.run(arguments.out, **given)
    given.update(epochs_scale=arguments.epochs_scale, recalibrated=arguments.recalibrated)
    if arguments.recipes:
        given["recipes_file"] = arguments.recipes
    reproduce.run(arguments.what, arguments.out, **given)


def _env(arguments: argparse.Namespace) -> None:
    from efreg.env import describe

    print(describe())


class _Parser(argparse.ArgumentParser):
    """Wrong usage gets one line, as all bad input does."""

    def error(self, message: str):
        self.exit(_fail(f"{message}; see {self.prog} --help"))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="efreg", description="Train networks so that their filters can be removed, and remove them."
    )
    parser.add_argument("--version", action="version", version=f"efreg {efreg.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, options, summary, example in (
        ("demo", _demo, _demo_options, "train, prune and compare on digits, in three minutes", "efreg demo"),
        ("train", _train, _train_options, "train a network with a force on its filters", TRAIN_EXAMPLES),
        ("prune", _prune, _prune_options, "remove filters from a trained network", PRUNE_EXAMPLES),
        ("sweep", _sweep, _sweep_options, "accuracy of a trained network at every ratio", SWEEP_EXAMPLES),
        (
            "report",
            _report,
            _report_options,
            "MACs, parameters, bytes, latency before and after",
            REPORT_EXAMPLES,
        ),
        ("paper", _paper, _paper_options, "the tables and figures, ours beside the paper's", PAPER_EXAMPLES),
        ("env", _env, lambda parser: None, "what serves what here, and why", "efreg env"),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument(
            "-v", "--verbose", action="store_true", help="log more, show where an error arose"
        )
        options(command)
    return parser


TRAIN_EXAMPLES = """efreg train --model resnet20 --alpha 1e-11 --out runs/digits
  efreg train --dataset cifar10 --model resnet56 --alpha 1e-12 --schedule p1 --epochs 200 --out runs/c10
  efreg train --resume --out runs/c10"""
PAPER = {
    "forces": "which force keeps most when filters are removed, and at what strength",
    "speedups": "MACs and parameters at the paper's cuts, nothing trained",
    "table3": "what a training step costs",
    "table4": "ResNet-56 on CIFAR-10, pruned and fine-tuned",
    "table5": "VGG-19 on CIFAR-100",
    "table6": "ResNet-34 on ImageNet",
    "no-finetuning": "points lost right after pruning",
    "figure2": "accuracy right after pruning at every ratio",
    "figure3": "norms of filters",
}
PAPER_EXAMPLES = """efreg paper forces
  efreg paper forces --data data --only digits cifar10 --seeds 3
  efreg paper table4 --data data --epochs-scale 0.05
  efreg paper figure2 --data data --only resnet20-cifar10-short"""
PRUNE_EXAMPLES = """efreg prune runs/c10/checkpoint.pt --ratio 0.5
  efreg prune runs/c10/checkpoint.pt --ratios "[0, 0.5, 0.5, 0.5, 0]" --out small.safetensors
  efreg prune runs/c10/checkpoint.pt --speedup 2
  efreg prune runs/c10/checkpoint.pt --dead"""
SWEEP_EXAMPLES = "efreg sweep runs/c10/checkpoint.pt"
REPORT_EXAMPLES = "efreg report runs/c10/checkpoint.pt runs/c10/pruned.safetensors"


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("efreg-demo"), help="folder to write to (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same table (%(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=60, help="epochs with each force (%(default)s)")


def _train_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", help="digits, mnist, cifar10, cifar100 or imagefolder (digits)")
    add("--data", metavar="DIR", help="folder of the data set (data)")
    add("--download", action="store_true", help="fetch the data set into --data where it is missing")
    add("--model", help="resnet14/20/32/44/56, vgg19, or a torchvision name (resnet20)")
    add("--weights", metavar="FILE", help="weights to start from, also those of a pruned network")
    add("--law", help=f"{', '.join(efreg.LAWS)} (electrostatic)")
    add("--alpha", type=float, help="strength of the force; 0 trains without (0)")
    add("--power", type=float, help="power of the ladder (1)")
    add("--alpha-schedule", help="constant, warmup, linear or cosine, the latter two to zero (constant)")
    add("--alpha-until", type=float, metavar="SHARE", help="share of the training that it takes (1)")
    add("--scope", help="weights, or filter: with bias and the norm's scale and shift (weights)")
    add("--refresh", type=int, metavar="K", help="take the charges every K steps (once)")
    add("--update", help="gradient or proximal (gradient)")
    add("--backend", help="auto, cpp, triton, cuda or reference (auto)")
    _plan_options(parser, "layers that the force acts on: those that lose filters at this")
    add("--schedule", help="constant, cosine, p1 or p2: the course of the learning rate (cosine)")
    add("--epochs", type=int, help="(30)")
    add("--lr", type=float, help="first learning rate (0.1, with p2 0.01)")
    add("--batch-size", type=int, help="of all processes together (128)")
    add("--precision", help="float32, bfloat16, or auto: bfloat16 where the device has it (float32)")
    add("--channels-last", action="store_true", help="lay images out channels last, faster on most devices")
    add("--step", help="eager, compile: forward and loss compiled, or graph: all of it a CUDA graph (eager)")
    add("--held-out", type=int, metavar="N", help="test on N training images, which are not trained on (0)")
    add("--weight-decay", type=float, help="(0)")
    add("--seed", type=int, help="(0)")
    add("--device", help="auto, cpu, cuda, ... (auto)")
    add("--out", type=Path, default=Path("runs/efreg"), help="folder of the run (%(default)s)")
    add("--resume", action="store_true", help="go on with the run in --out, as it was set up")


def _prune_options(parser: argparse.ArgumentParser) -> None:
    _checkpoint_option(parser)
    _plan_options(parser, "remove filters at this")
    parser.add_argument(
        "--speedup", type=float, help="the smallest uniform ratio that saves MACs by this factor"
    )
    parser.add_argument("--dead", action="store_true", help="remove filters that are zero; no output changes")
    parser.add_argument(
        "--out",
        type=Path,
        help="file to write (beside the checkpoint pruned.safetensors; with --dead without-dead.safetensors)",
    )


def _sweep_options(parser: argparse.ArgumentParser) -> None:
    _checkpoint_option(parser)
    parser.add_argument("--data", metavar="DIR", help="folder of the data set, if it was moved")
    parser.add_argument("--out", type=Path, help="folder to write to (the checkpoint's)")


def _report_options(parser: argparse.ArgumentParser) -> None:
    _checkpoint_option(parser)
    parser.add_argument("pruned", type=Path, help="a file that `efreg prune` wrote")


def _paper_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "what",
        choices=PAPER,
        metavar="WHAT",
        help="; ".join(f"{name}: {what}" for name, what in PAPER.items()),
    )
    add("--data", metavar="DIR", default="data", help="folder of the data sets and weights (%(default)s)")
    add("--only", nargs="+", default=(), metavar="NAME", help="of the studies or groups of runs these (all)")
    add("--seeds", type=int, default=3, help="seeds of each run, at most (%(default)s)")
    add("--epochs-scale", type=float, default=1.0, metavar="S", help="train for a share of the epochs (1)")
    add("--recipes", type=Path, metavar="FILE", help="runs of your own, like efreg/lab/paper/recipes.toml")
    add(
        "--recalibrated",
        action="store_true",
        help="figure2: with re-estimated batch-norm statistics too, which the paper has not",
    )
    add("--device", default="auto", help="auto, cpu, cuda, ... (%(default)s)")
    add("--out", type=Path, default=Path("runs/paper"), help="folder to write to (%(default)s)")


def _checkpoint_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint.pt that `efreg train` wrote")


def _plan_options(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--ratio", help=f"{what} uniform ratio, such as 0.5")
    parser.add_argument(
        "--ratios", help=f"{what} list, such as '[0, 0.5, 0.5, 0.5, 0]' or '[0:0, 1-15:0.65]'"
    )
    parser.add_argument(
        "--skip", nargs="+", default=(), metavar="BLOCK", help="blocks to leave alone: 1.0 2.3 ..."
    )
