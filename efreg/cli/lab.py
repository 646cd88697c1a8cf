"""Commands of the lab: demo, train, sweep; and env."""

import shlex
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from pathlib import Path

from efreg.cli import pages
from efreg.cli.commands import Command


def _demo(arguments: Namespace) -> None:
    from rich.console import Console

    from efreg.lab import demo

    given = {"seed": arguments.seed, "epochs": arguments.epochs, "command": arguments.line}
    demo.run(arguments.out, **given, console=Console())


def _train(arguments: Namespace) -> None:
    from rich.console import Console

    from efreg.cli import training
    from efreg.lab.checkpoints import Settings

    given = {field.name: getattr(arguments, field.name) for field in fields(Settings)}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    training.train(
        settings, arguments.out, resume=arguments.resume, download=arguments.download, console=Console()
    )


def _how_to_go_on(arguments: Namespace) -> str:
    from efreg.cli.training import CHECKPOINT

    if not (arguments.out / CHECKPOINT).is_file():
        return "no epoch was done: start again"
    return f"go on with: efreg train --resume --out {shlex.quote(str(arguments.out))}"


def _sweep(arguments: Namespace) -> None:
    from rich.console import Console

    from efreg.lab import sweep

    given = {"data_folder": arguments.data, "repair": arguments.repair}
    given |= {"html": arguments.html, "command": arguments.line}
    sweep.run(arguments.checkpoint, arguments.out, **given, console=Console())


def _env(arguments: Namespace) -> None:
    from efreg.env import describe

    print(describe())


def _demo_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("efreg-demo"), help="folder to write to (%(default)s)")
    add("--seed", type=int, default=0, help="the same seed gives the same table (%(default)s)")
    add("--epochs", type=int, default=60, help="epochs with each force (%(default)s)")


def _train_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", help="digits, mnist, cifar10, cifar100 or imagefolder (digits)")
    add("--data", metavar="DIR", help="folder of the data set (data)")
    add("--download", action="store_true", help="fetch the data set into --data where it is missing")
    add("--model", help="resnet14/20/32/44/56, vgg19, or a torchvision name (resnet20)")
    add("--weights", metavar="FILE", help="weights to start from, also those of a pruned network")
    add("--law", help="as `efreg laws` lists them, such as ladder:power=4 (electrostatic)")
    add("--alpha", type=float, help="strength of the force; 0 trains without (0)")
    add("--alpha-schedule", help="constant, warmup, linear or cosine, the latter two to zero (constant)")
    add(
        "--alpha-until",
        type=float,
        metavar="SHARE",
        help="share of the training that it lasts, or a fade (1)",
    )
    add("--scope", help="weights, or filter: with bias and the norm's scale and shift (the law's)")
    add("--refresh", type=int, metavar="K", help="take the charges every K steps (once)")
    add("--update", help="gradient or proximal (the law's)")
    add("--coupled", action="store_true", help="act on all groups, residual streams among them")
    add("--nested", nargs="+", type=float, default=(), metavar="RATIO", help="hide these shares in turns")
    add("--distil", metavar="FILE", help="weights of a whole network, which teaches")
    add("--backend", help="auto, cpp, triton, cuda or reference (auto)")
    what = "layers that the force acts on: those that lose filters at this"
    add("--ratio", help=f"{what} uniform ratio, such as 0.5")
    add("--ratios", help=f"{what} list, such as '[0, 0.5, 0.5, 0.5, 0]' or '[0:0, 1-15:0.65]'")
    add("--skip", nargs="+", default=(), metavar="BLOCK", help="blocks to leave alone: 1.0 2.3 ...")
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


def _sweep_options(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint.pt that `efreg train` wrote")
    parser.add_argument("--data", metavar="DIR", help="folder of the data set, if it was moved")
    parser.add_argument(
        "--repair", type=int, default=0, metavar="N", help="repair what is cut, too, on N training images"
    )
    parser.add_argument("--out", type=Path, help="folder to write to (the checkpoint's)")
    pages.option(parser)


COMMANDS = (
    Command(
        "train",
        "train a network with a force on its filters",
        (
            "efreg train --model resnet20 --alpha 1e-11 --out runs/digits",
            "efreg train --dataset cifar10 --model resnet56 --alpha 1e-12 --schedule p1 --out runs/c10",
            "efreg train --resume --out runs/c10",
        ),
        _train,
        _train_options,
        to_go_on=_how_to_go_on,
    ),
    Command(
        "sweep",
        "accuracy of a trained network at every ratio",
        (
            "efreg sweep runs/c10/checkpoint.pt",
            "efreg sweep runs/c10/checkpoint.pt --repair 1000 --html report.html",
        ),
        _sweep,
        _sweep_options,
    ),
    Command(
        "demo", "train, prune and compare on digits, in three minutes", ("efreg demo",), _demo, _demo_options
    ),
    Command(
        "env",
        "what serves what here, and why",
        ("efreg env",),
        _env,
        needs_lab=lambda arguments: False,
    ),
)
