"""The training engine: SGD with momentum and a force, resumable to the last bit."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import efreg
from efreg.lab import checkpoints, data, distributed, models
from efreg.lab.checkpoints import Checkpoint, Settings
from efreg.lab.graphs import GraphedStep
from efreg.lab.logs import Row

logger = logging.getLogger("efreg")

NEAR_ZERO = 0.01
"""A filter is near zero when its magnitude is at most this share of its layer's largest."""


def _milestones(progress: float) -> float:
    """A tenth after half of the training, a hundredth after 3/4: epochs 100, 150 of 200, 60, 90 of 120."""
    return 0.1 ** sum(progress >= milestone for milestone in (0.5, 0.75))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "p1": _milestones,
    "p2": _milestones,
}
"""The learning rate as a share of its start, of the share of the training that is done."""

START_LR = {"p2": 0.01}
"""The learning rate that a schedule starts from where none is given; 0.1 for the others."""

ALPHA_SCHEDULES: dict[str, Callable[[float, int], efreg.schedules.Schedule]] = {
    "warmup": efreg.schedules.warmup,
    "linear": efreg.schedules.linear,
    "cosine": efreg.schedules.cosine,
}
"""The courses that α can take, beside "constant"."""

PRECISIONS = ("float32", "bfloat16", "auto")
"""What a network computes in; its weights are float32. "auto" is bfloat16 where the device has it."""

STEPS = ("eager", "compile", "graph")
"""How a step is carried out: operation by operation, forward and loss compiled, or as one CUDA graph."""

LOOKED_AT = 100
"""After as many steps the loss is looked at, for which a GPU has to be waited for; on a CPU after each."""

Placed = TypeVar("Placed", nn.Module, Tensor)

Step = Callable[..., Tensor]
"""A function with the arguments and the result of `train_step`."""


class Diverged(RuntimeError):
    """Training met a loss that is not finite."""


class Run:
    """One training run: data, model, force and optimizer, made and checked from its settings.

    Where a checkpoint is given the run goes on from it, to the same bits as one that was never interrupted.

    In a process group each process takes its part of every batch of the same order, and gradients, losses and
    hits are those of the whole batch: the training is that of one process but for the order of sums, and for
    batch norms, which see a process's part alone; the first process's running statistics are kept.

    Raises ValueError or FileNotFoundError, naming what is wrong, before anything has been trained.
    """

    def __init__(self, settings: Settings, checkpoint: Checkpoint | None = None, *, download: bool = False):
        if not checkpoint:
            check(settings)
        torch.set_flush_denormal(True)  # weights near zero make denormals in the momentum: steps 10x slower
        self.settings, self.device = settings, device_named(settings.device)
        self.dtype = dtype_of(settings)
        _warn_if_slow(self.dtype, self.device)
        _check_parts(settings)
        self.history: list[Row] = list(checkpoint.history) if checkpoint else []
        info = data.info(settings.dataset, settings.data)
        weights = _first_weights(settings, checkpoint)
        self.model = placed(build(settings, info.num_classes, info.shape, weights), settings)
        self.example = _example(info.shape).to(self.device)
        self.plan = plan(self.model, settings, self.example)
        self._step = step_of(settings, self.device, teacher(settings, info.num_classes, info.shape))
        rehearse(self.model, self.plan, settings)
        self.data = self._load(download)
        steps = settings.epochs * steps_per_epoch(self.data.train, settings)
        self.force = attach(self.model, self.plan, settings, steps)
        self.optimizer = sgd(self.model, settings)
        self.nesting = nesting(self.model, self.plan, settings) if settings.nested else None
        self._replica = distributed.replicated(self.model)
        self._remains = Remains(self.model, self.plan, self.example)
        if checkpoint and checkpoint.epoch:
            self.optimizer.load_state_dict(checkpoint.optimizer)
            self.force.load_state_dict(checkpoint.force)
            if self.nesting:
                self.nesting.load_state_dict(checkpoint.nesting)

    def _load(self, download: bool) -> data.Data:
        settings = self.settings
        with distributed.first_alone():
            images = data.load(settings.dataset, settings.data, download=download, device=self.device)
        if settings.held_out:
            images = data.hold_out(images, settings.held_out)
        _check_last_batch(len(images.train), settings)
        return data.share(images, data.Part(distributed.rank(), distributed.world_size()))

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return len(self.history)

    def checkpoint(self) -> Checkpoint:
        """The run as it stands."""
        return Checkpoint(
            self.settings,
            self.data.info.num_classes,
            self.data.info.shape,
            self.model.state_dict(),
            self.epoch,
            self.history,
            self.optimizer.state_dict(),
            self.force.state_dict(),
            self.nesting.state_dict() if self.nesting else {},
        )

    def epochs(self, tick: Callable[[], None] = lambda: None) -> Iterator[Row]:
        """Train the epochs that are left, yielding a row for the log after each; `tick` is called every step.

        Raises Diverged where the loss is not finite, before the epoch's row is yielded.
        """
        for epoch in range(self.epoch, self.settings.epochs):
            start = time.perf_counter()
            loss, accuracy = train_epoch(
                self._replica,
                self.optimizer,
                self.data.train,
                self.settings,
                epoch,
                tick,
                self.dtype,
                self._step,
            )
            distributed.share_buffers(self.model)
            test_loss, test_accuracy = evaluate(self.model, self.data.test, dtype=self.dtype)
            _require_finite(loss + test_loss, epoch)
            dead, macs = self._remains.now()
            row = {
                "epoch": epoch + 1,
                "loss": loss,
                "accuracy": accuracy,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "energy": self.force.energy().item(),
                "near_zero": near_zero(self.force),
                "dead": dead,
                "macs": macs,
                "lr": self.optimizer.param_groups[0]["lr"],
                "seconds": time.perf_counter() - start,
            }
            self.history.append(row)
            yield row

    def kept(self, path: Path, tick: Callable[[], None] = lambda: None) -> Iterator[Row]:
        """As `epochs`; after each the first process writes a checkpoint to `path`."""
        for row in self.epochs(tick):
            if not distributed.rank():
                checkpoints.save(self.checkpoint(), path)
            yield row


def build(
    settings: Settings, num_classes: int, shape: tuple[int, ...], weights: dict[str, Tensor] | None = None
) -> nn.Module:
    """The model that the settings name, from their seed or with `weights`; it takes inputs of `shape`.

    Weights of a pruned network make it as narrow as that. Raises ValueError for what does not fit.
    """
    torch.manual_seed(settings.seed)
    model = models.build(settings.model, num_classes, shape[0])
    _check_input(model, settings.model, shape)
    if weights is not None:
        _load_state(model, weights, settings, shape)
    return model


def placed(what: Placed, settings: Settings) -> Placed:
    """A model, or images as it takes them, on the settings' device and in their memory format."""
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    return what.to(device_named(settings.device)).to(memory_format=layout)


def restore(checkpoint: Checkpoint) -> nn.Module:
    """The model of a checkpoint, in eval mode on the CPU."""
    return build(checkpoint.settings, checkpoint.num_classes, checkpoint.shape, checkpoint.weights).eval()


def plan(model: nn.Module, settings: Settings, example: Tensor) -> efreg.Plan:
    """The plan that the settings describe: at ratio 0.5 where they name neither a ratio nor a list."""
    ratio = 0.5 if settings.ratio is None and settings.ratios is None else settings.ratio
    return efreg.plan(model, settings.ratios, ratio=ratio, **planning(settings), example_inputs=example)


def planning(settings: Settings) -> dict[str, Any]:
    """What `efreg.plan` is told beside ratios: which groups a network of these settings has."""
    return {"coupled": settings.coupled, "skip": settings.skip}


def cutting(settings: Settings, num_classes: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """What `efreg.plan` is told to cut a network that was trained so: nested units as they were ranked."""
    told = planning(settings)
    if not settings.nested:
        return told
    weights = checkpoints.load_weights(settings.weights) if settings.weights else None
    first = build(settings, num_classes, shape, weights)
    with nesting(first, plan(first, settings, _example(shape)), settings) as widths:
        return _nested(told, widths.importance)


def ranked(checkpoint: Checkpoint) -> dict[str, Any]:
    """As `cutting`, from a checkpoint, which holds the ranking."""
    told, kept = planning(checkpoint.settings), checkpoint.nesting.get("importance")
    return _nested(told, efreg.Ranking(kept)) if kept else told


def _nested(told: dict[str, Any], ranking: efreg.Ranking) -> dict[str, Any]:
    """What was nested, and nothing else, as it was ranked."""
    return {**told, "importance": ranking, "only": tuple(ranking.numbers)}


def teacher(settings: Settings, num_classes: int, shape: tuple[int, ...]) -> nn.Module | None:
    """The network that teaches, in eval mode, where there is one.

    Raises ValueError for weights that are not of the settings' model and data.
    """
    if settings.distil is None:
        return None
    weights = checkpoints.load_weights(settings.distil)
    whole = placed(build(settings, num_classes, shape, weights), settings)
    return whole.eval().requires_grad_(False)


def nesting(model: nn.Module, plan: efreg.Plan, settings: Settings) -> efreg.Nesting:
    """The widths that are drawn."""
    return efreg.nested(model, plan, settings.nested, seed=settings.seed)


def force_options(settings: Settings, steps: int) -> dict[str, Any]:
    """What `efreg.attach` is given, beside model and layers, for a training of so many steps."""
    until = max(1, round(settings.alpha_until * steps))
    alpha: float | efreg.schedules.Schedule = settings.alpha
    if settings.alpha_schedule != "constant":
        alpha = ALPHA_SCHEDULES[settings.alpha_schedule](settings.alpha, until)
    law = _fade(settings, until) if fades(settings) else efreg.resolve(settings.law, alpha)
    return {"law": law, "scope": settings.scope, "refresh": settings.refresh, "update": settings.update}


def attach(
    model: nn.Module, plan: efreg.Plan, settings: Settings, steps: int, check: str | None = "warn"
) -> efreg.Attachment:
    """The settings' force on the planned layers, for a training of so many steps."""
    options = {**force_options(settings, steps), "backend": settings.backend, "check": check}
    return efreg.attach(model, layers=plan, **options)


def rehearse(model: nn.Module, plan: efreg.Plan, settings: Settings) -> None:
    """Raises ValueError for a force that cannot be attached, before anything is fetched or trained."""
    with attach(model, plan, settings, steps=1, check=None) as force:
        force.charges()


def fades(settings: Settings) -> bool:
    """Whether the force is a fade, which has steps instead of an α."""
    return settings.law.partition(":")[0] == "fade"


def _fade(settings: Settings, steps: int) -> efreg.Law:
    told = settings.law if ":" in settings.law else f"{settings.law}:"
    return efreg.resolve(f"{told},steps={steps}", settings.alpha or None)


def sgd(model: nn.Module, settings: Settings) -> torch.optim.SGD:
    """SGD with momentum 0.9, as the paper trains; for a graph fused, which reads the rate on the device."""
    return torch.optim.SGD(
        model.parameters(),
        start_lr(settings),
        momentum=0.9,
        weight_decay=settings.weight_decay,
        fused=True if settings.step == "graph" else None,
    )


def start_lr(settings: Settings) -> float:
    """The learning rate of the first step."""
    return START_LR.get(settings.schedule, 0.1) if settings.lr is None else settings.lr


def computing(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """The context of forward passes in `dtype`, in training of one alone: it keeps casts of the weights."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of a batch, and the logits, made in `dtype`."""
    with computing(dtype, inputs.device):
        logits = _full(model(inputs))
    return F.cross_entropy(logits, labels), logits


@dataclass(frozen=True)
class Distilled:
    """`loss_of` with a teacher: 0.1 · cross-entropy + 0.9 · T² · KL(teacher ‖ model) of logits divided by T.

    (Hinton et al., 2015, arXiv 1503.02531; the weights are those that are usual on CIFAR.)
    """

    teacher: nn.Module
    temperature: float = 4.0
    share: float = 0.9

    def __call__(
        self, model: nn.Module, inputs: Tensor, labels: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        loss, logits = loss_of(model, inputs, labels, dtype)
        with torch.no_grad(), computing(dtype, inputs.device):
            taught = _full(self.teacher(inputs))
        soft, target = (F.log_softmax(x / self.temperature, 1) for x in (logits, taught))
        far = F.kl_div(soft, target, log_target=True, reduction="batchmean") * self.temperature**2
        return (1 - self.share) * loss + self.share * far, logits


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    labels: Tensor,
    dtype: torch.dtype = torch.float32,
    weight: float = 1.0,
    *,
    forward: Callable[..., tuple[Tensor, Tensor]] = loss_of,
) -> Tensor:
    """One step of the optimizer on the cross-entropy of a batch; the logits before it, made in `dtype`.

    weight: of the loss, where this is one process's part of a batch that does not divide evenly.
    """
    optimizer.zero_grad()
    loss, logits = forward(model, inputs, labels, dtype)
    (weight * loss).backward()
    optimizer.step()
    return logits.detach()


def step_of(settings: Settings, device: torch.device, teacher: nn.Module | None = None) -> Step:
    """What takes a step in the way that the settings name. Raises ValueError where it cannot be had."""
    forward = Distilled(teacher) if teacher else loss_of
    if settings.step == "compile":
        alone = distributed.world_size() == 1  # DistributedDataParallel breaks the graph in two
        whole = alone and not settings.nested
        return partial(train_step, forward=torch.compile(forward, dynamic=False, fullgraph=whole))
    step = partial(train_step, forward=forward) if teacher else train_step
    if settings.step == "graph":
        _check_graph(settings, device)
        return GraphedStep(step, settings.batch_size)
    return step


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: data.Images,
    settings: Settings,
    epoch: int,
    tick: Callable[[], None] = lambda: None,
    dtype: torch.dtype = torch.float32,
    step: Step = train_step,
) -> tuple[float, float]:
    """One pass over the images: mean loss, and accuracy in percent, as met on the way.

    Raises Diverged at the first loss that is not finite; not on a CPU, within LOOKED_AT steps.
    """
    torch.manual_seed(data.seed_of(settings.seed, epoch) + distributed.rank())
    model.train()
    steps = steps_per_epoch(images, settings)
    tally = _Tally()
    for done, (inputs, labels) in enumerate(images.epoch(settings.batch_size, settings.seed, epoch)):
        share = (epoch * steps + done) / (settings.epochs * steps)
        for group in optimizer.param_groups:
            group["lr"] = start_lr(settings) * SCHEDULES[settings.schedule](share)
        whole = min(settings.batch_size, len(images) - done * settings.batch_size)
        weight = distributed.world_size() * len(labels) / whole
        tally.add(step(model, optimizer, inputs, labels, dtype, weight), labels)
        tick()
        if inputs.device.type == "cpu" or (done + 1) % LOOKED_AT == 0:
            _require_finite(tally.means()[0], epoch)
    return tally.means()


def _require_finite(loss: float, epoch: int) -> None:
    if not math.isfinite(loss):
        raise Diverged(f"the loss is not finite in epoch {epoch + 1}: lower the learning rate or alpha")


def steps_per_epoch(images: data.Images, settings: Settings) -> int:
    return math.ceil(len(images) / settings.batch_size)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: data.Images,
    batch_size: int = 250,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, float]:
    """Mean loss and accuracy in percent, in eval mode; the model's own mode is left as it was."""
    training = model.training
    model.eval()
    tally = _Tally()
    for inputs, labels in images.batches(batch_size):
        with computing(dtype, inputs.device):
            logits = _full(model(inputs))
        tally.add(logits, labels)
    model.train(training)
    return tally.means()


def near_zero(force: efreg.Attachment) -> int:
    """How many of the force's filters have a magnitude of at most 1 % of their layer's largest."""
    magnitudes = (charges.magnitude for charges in force.charges().values())
    return sum(int((m <= NEAR_ZERO * m.max()).sum()) for m in magnitudes)


class Remains:
    """What is left of a model without its dead filters, counted anew when its planned layers' change."""

    def __init__(self, model: nn.Module, plan: efreg.Plan, example: Tensor):
        self._model, self._plan, self._example = model, plan, example[:1]
        self._seen: dict[str, list[int]] = {name: [] for name in plan}
        self._counts = 0, efreg.macs(model, self._example)

    def now(self) -> tuple[int, int]:
        """The dead filters of the whole model, and the MACs of an image that remain without them."""
        seen = self._plan.dead(self._model)
        if seen != self._seen:
            self._seen, self._counts = seen, self._count()
        return self._counts

    def _count(self) -> tuple[int, int]:
        try:
            dead = efreg.plan(self._model, dead=True, example_inputs=self._example)
        except efreg.PruningError as error:
            logger.warning("dead filters and MACs are shown as they were before: %s", error)
            return self._counts
        assert dead.macs is not None  # it was made with example inputs
        return sum(cut.removed for cut in dead.cuts), dead.macs[1]


def dtype_of(settings: Settings) -> torch.dtype:
    """What a network of these settings computes in, on their device."""
    auto = settings.precision == "auto" and has_bfloat16(device_named(settings.device))
    return torch.bfloat16 if auto or settings.precision == "bfloat16" else torch.float32


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16; a CPU without is three times slower in it than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    if device.type != "cpu" or not cpuinfo.exists():
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpuinfo.read_text().split())


def _warn_if_slow(dtype: torch.dtype, device: torch.device) -> None:
    if dtype == torch.bfloat16 and not has_bfloat16(device):
        logger.warning(
            "this %s has no bfloat16 arithmetic, and computes in it several times slower than in float32: "
            "precision auto would have taken float32",
            device.type,
        )


def _full(logits: Tensor) -> Tensor:
    """Logits in float32 at least, as losses need them."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


class _Tally:
    """Sums of loss and hits over batches, kept on the device so that no step waits for them.

    The means are those of all processes.
    """

    def __init__(self) -> None:
        self.count = 0
        self.loss: float | Tensor = 0.0
        self.hits: float | Tensor = 0.0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self.count += len(labels)
        self.loss += F.cross_entropy(logits, labels, reduction="sum")
        self.hits += (logits.argmax(1) == labels).sum()

    def means(self) -> tuple[float, float]:
        count, loss, hits = distributed.summed(self.count, float(self.loss), float(self.hits))
        return loss / count, 100 * hits / count


def check(settings: Settings) -> None:
    """Raises ValueError or FileNotFoundError, naming it, for a setting that no training can have."""
    if fades(settings):
        _check_fade(settings)
    if settings.schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {settings.schedule!r}: there are {', '.join(SCHEDULES)}")
    if settings.alpha_schedule not in ("constant", *ALPHA_SCHEDULES):
        known = ", ".join(("constant", *ALPHA_SCHEDULES))
        raise ValueError(f"unknown schedule of alpha {settings.alpha_schedule!r}: there are {known}")
    force_options(settings, steps=1)
    if not 0 < settings.alpha_until <= 1:
        raise ValueError(f"alpha_until is {settings.alpha_until}: it is a share of the training, in (0, 1]")
    if settings.alpha_until < 1 and settings.alpha_schedule == "constant" and not fades(settings):
        raise ValueError("a constant alpha has no end: name an --alpha-schedule, or drop --alpha-until")
    if settings.precision not in PRECISIONS:
        raise ValueError(f"unknown precision {settings.precision!r}: there are {', '.join(PRECISIONS)}")
    if settings.step not in STEPS:
        raise ValueError(f"unknown step {settings.step!r}: there are {', '.join(STEPS)}")
    for name in ("epochs", "batch_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}: it must be at least 1")
    if settings.seed < 0:
        raise ValueError(f"seed is {settings.seed}: it must not be negative")
    if wrong := [ratio for ratio in settings.nested if not 0 <= ratio < 1]:
        raise ValueError(f"nested has {wrong[0]}: each is a share of the units, in [0, 1)")
    for option in ("weights", "distil"):
        if (named := getattr(settings, option)) is not None and not Path(named).is_file():
            raise FileNotFoundError(f"no file {named}: --{option} names a file of weights")


def _check_fade(settings: Settings) -> None:
    """Raises ValueError, naming it, for a setting that a fade has not."""
    if "steps=" in settings.law:
        raise ValueError(f"the fade lasts alpha_until of the training: leave steps out of {settings.law!r}")
    for name, fits in {"alpha_schedule": "constant", "scope": "filter", "update": "proximal"}.items():
        if (found := getattr(settings, name)) not in (None, fits):
            raise ValueError(f"{name} is {found!r}, which a fade has not: leave it out")


def _check_parts(settings: Settings) -> None:
    """Raises ValueError for batches that the processes cannot share evenly."""
    processes = distributed.world_size()
    if settings.batch_size % processes:
        raise ValueError(
            f"{processes} processes cannot share a batch of {settings.batch_size} evenly: choose another "
            "--batch-size, of all of them together"
        )


def _check_last_batch(images: int, settings: Settings) -> None:
    """Raises ValueError for a last batch that leaves a process without an image."""
    left, processes = images % settings.batch_size, distributed.world_size()
    if 0 < left < processes:
        raise ValueError(
            f"the last batch of an epoch has {left} image{'s' * (left > 1)} for {processes} processes: "
            "choose another --batch-size"
        )


def _check_graph(settings: Settings, device: torch.device) -> None:
    """Raises ValueError for a training that the replays of a CUDA graph cannot carry out."""
    for found, fits in (
        (f"the device {device.type}", device.type == "cuda"),
        (f"{distributed.world_size()} processes", distributed.world_size() == 1),
        (f"--refresh {settings.refresh}", settings.refresh in (None, 1)),
        (f"--alpha-schedule {settings.alpha_schedule}", settings.alpha_schedule == "constant"),
        ("--law fade", not fades(settings)),
        ("--nested", not settings.nested),
    ):
        if not fits:
            raise ValueError(f"a CUDA graph cannot be had with {found}: use --step compile or eager")


def computer(device: torch.device) -> str:
    """What computes: a GPU by its name, and how many together."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{distributed.world_size()} × {name}" if distributed.world_size() > 1 else name


def device_named(name: str) -> torch.device:
    """The device; "auto" is the GPU where there is one. Raises ValueError for one that cannot be had."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be had here: use --device cpu") from error


def _example(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(2, *shape)


def _first_weights(settings: Settings, checkpoint: Checkpoint | None) -> dict[str, Tensor] | None:
    if checkpoint:
        return checkpoint.weights
    return checkpoints.load_weights(settings.weights) if settings.weights else None


def _check_input(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    try:
        _outputs(model, shape)
    except (RuntimeError, AssertionError) as error:
        size = "x".join(map(str, shape))
        raise ValueError(f"{name} cannot take images of {size} ({error}): choose another --model") from error


@torch.no_grad()
def _outputs(model: nn.Module, shape: tuple[int, ...]) -> torch.Size:
    """The shape of what the model makes of two images; it is left in training mode."""
    made = model.eval()(_example(shape)).shape
    model.train()
    return made


def _load_state(
    model: nn.Module, weights: dict[str, Tensor], settings: Settings, shape: tuple[int, ...]
) -> None:
    """Loads weights of the model, or of a narrower one that takes the same images to the same classes."""
    outputs = _outputs(model, shape)
    shapes = [{name: x.shape for name, x in state.items()} for state in (model.state_dict(), weights)]
    names = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
    try:
        if _outputs(efreg.load(model, weights), shape) != outputs:
            raise ValueError("they are of other classes")
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the weights do not fit {settings.model} on {settings.dataset}: {', '.join(names[:3])} "
            f"({len(names)} such tensors); name the --model and --dataset that they are of"
        ) from error
