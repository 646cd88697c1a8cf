"""Commands for any network: inspect, plan, prune, report."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

import efreg
from efreg.cli import pages
from efreg.cli.commands import Command
from efreg.cli.models import FORMS, Subject, is_checkpoint, subject

PLANNING = {
    **dict.fromkeys(("ratio", "ratios", "speedup", "params", "max_ratio")),
    **dict.fromkeys(("dead", "approximate", "uncoupled"), False),
    **dict.fromkeys(("only", "skip"), ()),
    "ranking": "group",
    "round_to": 1,
    "importance": "l1",
}
"""The options that say what goes, each with what it is where it is not given."""


def _inspect(arguments: Namespace) -> None:
    given = _subject(arguments)
    found = efreg.inspect(given.model, given.inputs, approximate=arguments.approximate)
    print(found)
    if arguments.html:
        from efreg.lab.logs import write_text

        write_text(arguments.html, found.to_html(title=arguments.model, command=arguments.line))
        print(f"Written to {arguments.html}")


def _plan(arguments: Namespace) -> None:
    given = _subject(arguments)
    _require_folder(arguments.out)
    plan = _planned(arguments, given)
    print(plan)
    if arguments.out:
        plan.save(arguments.out)
        print(f"Written to {arguments.out}")


def _prune(arguments: Namespace) -> None:
    given = _subject(arguments)
    out = arguments.out or _default_out(arguments, given)
    _require_folder(out)
    plan = _planned(arguments, given) if arguments.plan is None else _saved_plan(arguments)
    small = efreg.prune(given.model, plan, example_inputs=given.inputs)
    efreg.save(small, out)
    written = [str(out)]
    if not given.trained:
        plan.save(out.with_name("plan.json"))
        written.append(str(out.with_name("plan.json")))
    report = efreg.report(given.model, small, example_inputs=given.one_input)
    print(report)
    if arguments.html:
        from efreg.lab.logs import write_text

        found = efreg.inspect(given.model, given.inputs, approximate=plan.approximate)
        page = report.to_html(found, plan, title=arguments.model, command=arguments.line)
        write_text(arguments.html, page)
        written.append(str(arguments.html))
    print(f"Written to {', '.join(written)}")


def _report(arguments: Namespace) -> None:
    given = _subject(arguments)
    small = efreg.load(_subject(arguments).model, arguments.pruned)
    print(efreg.report(given.model, small, example_inputs=given.one_input))


def _subject(arguments: Namespace) -> Subject:
    return subject(arguments.model, arguments.weights, arguments.input)


def _planned(arguments: Namespace, given: Subject) -> efreg.Plan:
    """The plan that was asked for; of a network that `efreg train` wrote, as its settings have it."""
    options = {name: getattr(arguments, name) for name in PLANNING}
    own = {} if arguments.dead else dict(given.planning)
    uncoupled = options.pop("uncoupled")
    coupled = own.pop("coupled", True) and not uncoupled
    if own.get("skip"):
        options["skip"] = (*options["skip"], *own.pop("skip"))
    options |= {name: value for name, value in own.items() if options[name] == PLANNING[name]}
    return efreg.plan(given.model, **options, coupled=coupled, example_inputs=given.inputs)


def _saved_plan(arguments: Namespace) -> efreg.Plan:
    told = [name for name, value in PLANNING.items() if getattr(arguments, name) != value]
    if told:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in told)
        raise ValueError(f"--plan says what goes: drop {options}")
    return efreg.Plan.load(arguments.plan)


def _default_out(arguments: Namespace, given: Subject) -> Path:
    """Beside a checkpoint, else in the current folder."""
    folder = Path(arguments.model).parent if given.trained else Path()
    return folder / ("without-dead.safetensors" if arguments.dead else "pruned.safetensors")


def _require_folder(out: Path | None) -> None:
    if out is not None and not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} to save {out.name} in")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(map(int, text.split("x")))
    except ValueError:
        shape = (0,)
    if min(shape) < 1:
        raise ArgumentTypeError(f"{text!r} is no shape: write one as 3x224x224, without the batch")
    return shape


def _model_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"{FORMS}; a function is called without arguments")
    add(
        "--weights",
        type=Path,
        metavar="FILE",
        help=".safetensors or .pt with weights alone, also those of a pruned network (as it is built, by "
        "torchvision and timm at random)",
    )
    add(
        "--input",
        type=_shape,
        action="append",
        metavar="SHAPE",
        help="of an input without its batch, as 3x224x224; again for each further one (the network's own)",
    )


def _inspect_options(parser: ArgumentParser) -> None:
    _model_options(parser)
    _approximate_option(parser)
    pages.option(parser)


def _plan_options(parser: ArgumentParser) -> None:
    _model_options(parser)
    _what_goes_options(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write the plan to (none)")


def _prune_options(parser: ArgumentParser) -> None:
    _model_options(parser)
    _what_goes_options(parser)
    add = parser.add_argument
    add("--plan", type=Path, metavar="FILE", help="follow a plan that `efreg plan` wrote")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="safetensors file to write (pruned.safetensors, with --dead without-dead.safetensors, beside a "
        "checkpoint or here); the plan is written beside it as plan.json, but for a checkpoint",
    )
    pages.option(parser)


def _what_goes_options(parser: ArgumentParser) -> None:
    parser.set_defaults(**PLANNING)
    add = parser.add_argument
    add("--ratio", help="the share of its units that each group loses, such as 0.5")
    add("--ratios", help="a list as papers have it, '[0, 0.5, 0.5, 0.5, 0]' or '[0:0, 1-15:0.65]'")
    add("--speedup", type=float, help="the smallest ratio that makes MACs before / MACs after this much")
    add("--params", type=float, help="the same of parameters; with --speedup both are reached")
    add("--dead", action="store_true", help="what is zero goes; no output changes")
    add("--only", nargs="+", metavar="NAME", help="modules, patterns or blocks to cover (all)")
    add("--skip", nargs="+", metavar="NAME", help="modules, patterns or blocks to leave alone")
    add("--round-to", type=int, metavar="K", help="what stays of a group is a multiple of K (1)")
    add("--ranking", help="group: of every group the ratio; global: of all units (group)")
    add("--max-ratio", metavar="RATIO", help="the most that a group loses")
    add("--importance", help="l1, l2, norm_scale or geometric_median (l1)")
    _approximate_option(parser)
    add(
        "--uncoupled",
        action="store_true",
        help="cover only convolutions that one layer reads, as the papers do; so it is for a checkpoint",
    )


def _approximate_option(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="also cut what norms over channels mix, as layer norms do",
    )


def _report_options(parser: ArgumentParser) -> None:
    _model_options(parser)
    parser.add_argument("pruned", type=Path, help="a file that `efreg prune` wrote")


def _is_of_the_lab(arguments: Namespace) -> bool:
    return is_checkpoint(arguments.model) or getattr(arguments, "html", None) is not None


COMMANDS = (
    Command(
        "inspect",
        "what goes together in a network, what could go, and what cannot and why",
        (
            "efreg inspect torchvision:resnet50",
            "efreg inspect timm:efficientnet_b0 --input 3x128x128 --html report.html",
            "efreg inspect package.module:function --weights weights.pt",
        ),
        _inspect,
        _inspect_options,
        _is_of_the_lab,
    ),
    Command(
        "plan",
        "which groups of filters lose how many",
        (
            "efreg plan torchvision:resnet50 --ratio 0.5",
            "efreg plan timm:mobilenetv3_small_100 --speedup 2 --round-to 8 --out plan.json",
            "efreg plan torchvision:resnet50 --params 2 --ranking global --skip layer1 'layer4.*'",
        ),
        _plan,
        _plan_options,
        _is_of_the_lab,
    ),
    Command(
        "prune",
        "remove filters from a network, and prove the result",
        (
            "efreg prune torchvision:resnet50 --weights resnet50.pt --ratio 0.5 --html report.html",
            "efreg prune timm:mobilenetv3_small_100 --weights trained.safetensors --plan plan.json",
            "efreg prune package.module:function --input 3x64x64 --input 10 --speedup 2",
            "efreg prune runs/c10/checkpoint.pt --ratio 0.5",
            'efreg prune runs/c10/checkpoint.pt --ratios "[0, 0.5, 0.5, 0.5, 0]" --out small.safetensors',
            "efreg prune runs/c10/checkpoint.pt --dead",
        ),
        _prune,
        _prune_options,
        _is_of_the_lab,
    ),
    Command(
        "report",
        "MACs, parameters, bytes, latency before and after",
        (
            "efreg report torchvision:resnet50 pruned.safetensors",
            "efreg report runs/c10/checkpoint.pt runs/c10/pruned.safetensors",
        ),
        _report,
        _report_options,
        _is_of_the_lab,
    ),
)
