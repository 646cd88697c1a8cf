"""The command line: `python -m bench.paper WHAT`, also under torchrun."""

import argparse
import logging
import sys

from rich.console import Console

from bench.paper import recipes, reproduce


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper",
        description="The tables and figures, ours beside the paper's.",
        epilog=recipes.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    what = "; ".join(f"{name}: {title}" for name, title in recipes.TITLES.items())
    add("what", choices=recipes.TITLES, metavar="WHAT", help=what)
    add("--data", metavar="DIR", default="data", help="folder of the data sets and weights (%(default)s)")
    add("--only", nargs="+", default=(), metavar="NAME", help="of the groups of runs these (all)")
    add("--seeds", type=int, default=3, help="seeds of each run, at most (%(default)s)")
    add("--epochs-scale", type=float, default=1.0, metavar="S", help="train for a share of the epochs (1)")
    add("--recipes", default=recipes.OURS, metavar="FILE", help="runs of your own, like recipes.toml")
    what = "rows of runs that are done, such as bench/results/forces-digits.csv"
    add("--rows", nargs="+", default=(), metavar="FILE", help=what)
    what = "figure2: with re-estimated batch-norm statistics too, which the paper has not"
    add("--recalibrated", action="store_true", help=what)
    add("--device", default="auto", help="auto, cpu, cuda, ... (%(default)s)")
    add("--out", default="runs/paper", help="folder to write to (%(default)s)")
    add("-v", "--verbose", action="store_true", help="log more, show where an error arose")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns 0, 2 for bad input (one line on stderr), 130 after Ctrl-C; exits on wrong usage."""
    told = vars(_parser().parse_args(argv))
    if verbose := told.pop("verbose"):
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        reproduce.run(**told, console=Console())
    except KeyboardInterrupt:
        print("bench.paper: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if verbose:
            raise
        print(f"bench.paper: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
