"""Random sequences of what users do: no stale hook, no wrong number, no exception that is not documented."""

import copy
import gc
import io
from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import assume, seed
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from parts import PARTS, recorded, settled
from processes import meeting
from shadow import Shadow, Tied, of_layers, of_plan, whole
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.optim import optimizer as torch_optimizer
from torch.utils._pytree import tree_map_only

import efreg
from efreg.force import steps

LAWS = [
    *(efreg.L1(0.05), efreg.Ladder(0.1, power=2), efreg.Ladder(lambda step: 0.1 / (step + 1), power=1)),
    *(efreg.GroupLasso(0.02), efreg.Torque(0.01), efreg.Electrostatic(1e-12, softening=0.5)),
    *(efreg.Electrostatic(1e-2, relative=True, softening=0.5), efreg.Gravity(1e-3, distance="index")),
]

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.01),
    "climbing": lambda groups: torch.optim.SGD(groups, lr=0.001, maximize=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01),
}

WRONG = [
    {"alpha": -1.0},
    {"alpha": 1.0, "law": "gravitas"},
    {"alpha": 1.0, "layers": ["nowhere"]},
    {"alpha": 1.0, "scope": "filter"},
    {"alpha": 1.0, "refresh": 0},
    {"law": efreg.Fade(3)},
    {"law": efreg.GReg1(1e-3)},
]


class Net(nn.Module):
    """A residual group of two writers with norms, a depthwise convolution, a plain one, and a head."""

    def __init__(self, width: int, last: int):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.block = nn.Conv2d(width, width, 3, padding=1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.last, self.head = nn.Conv2d(width, last, 1), nn.Linear(last, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.stem(x)))
        x = F.gelu(x + self.block(x))
        return self.head(F.gelu(self.last(self.depthwise(x))).mean((2, 3)))


@cache
def planned(width: int, last: int) -> efreg.Plan:
    """A plan of every network of these widths."""
    return efreg.plan(Net(width, last), ratio=0.3, example_inputs=torch.randn(2, 2, 5, 5))


@dataclass
class Force:
    """A force at work, its shadow, and the options that it was attached with."""

    handle: efreg.Attachment
    shadow: Shadow
    options: dict


class Actions(RuleBasedStateMachine):
    """A network, its optimizer, and the forces on it."""

    counts: Counter

    @initialize(seed=st.integers(0, 10**6), optimizer=st.sampled_from(list(OPTIMIZERS)))
    def start(self, seed, optimizer):
        self.counts["sequences"] += 1
        torch.manual_seed(seed)
        self.kind, self.forces = optimizer, []
        self.model = Net(6, 4).double()
        self.renew()

    def renew(self) -> None:
        """A new optimizer of what the network has now."""
        convolutions = [p for name, p in self.model.named_parameters() if "head" not in name]
        groups = [{"params": convolutions}, {"params": list(self.model.head.parameters()), "lr": 0.02}]
        self.optimizer = OPTIMIZERS[self.kind](groups)

    @property
    def sharded(self) -> bool:
        return isinstance(self.model, FSDPModule)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.head.weight.dtype

    def images(self, count: int = 4) -> Tensor:
        return torch.randn(count, 2, 5, 5, dtype=self.dtype)

    @property
    def widths(self) -> tuple[int, int]:
        return self.model.stem.out_channels, self.model.last.out_channels

    # Forces

    @precondition(lambda self: len(self.forces) < 3)
    @rule(
        law=st.sampled_from(LAWS),
        update=st.sampled_from(efreg.force.attachment.UPDATES),
        refresh=st.sampled_from([None, 1, 2, 3]),
        scope=st.sampled_from(["layers", "weights", "filter"]),
        backend=st.sampled_from(["cpp", "reference"]),
    )
    def attach(self, law, update, refresh, scope, backend):
        options = {"law": law, "update": update, "refresh": refresh, "backend": backend, "check": None}
        groups = of_layers(self.model)
        if scope != "layers":
            plan = planned(*self.widths)
            options |= {"layers": plan, "scope": scope}
            groups = of_plan(plan, scope)
        self.put(options, Shadow(law, update, refresh, groups))

    @precondition(lambda self: len(self.forces) < 3)
    @rule(length=st.integers(1, 4))
    def fade(self, length):
        plan = planned(*self.widths)
        options = {"law": efreg.Fade(length), "layers": plan, "check": None}
        self.put(options, Shadow(options["law"], "proximal", None, of_plan(plan, "filter")))

    def put(self, options: dict, shadow: Shadow) -> None:
        self.counts["forces"] += 1
        self.forces.append(Force(efreg.attach(self.model, **options), shadow, options))

    @rule(options=st.sampled_from(WRONG))
    def attach_wrongly(self, options):
        with pytest.raises((ValueError, TypeError)):
            efreg.attach(self.model, **options)

    @precondition(lambda self: self.forces)
    @rule(which=st.integers(0, 2), twice=st.booleans())
    def detach(self, which, twice):
        force = self.forces.pop(which % len(self.forces))
        force.handle.detach()
        if twice:
            force.handle.detach()

    @precondition(lambda self: self.forces)
    @rule(which=st.integers(0, 2))
    def take_charges_anew(self, which):
        force = self.forces[which % len(self.forces)]
        force.handle.refresh()
        force.shadow.age = None

    @precondition(lambda self: self.forces)
    @rule(which=st.integers(0, 2))
    def resume(self, which):
        """The state goes through a file to a force of the same kind."""
        force = self.forces.pop(which % len(self.forces))
        file = io.BytesIO()
        torch.save(force.handle.state_dict(), file)
        file.seek(0)
        force.handle.detach()
        force.handle = efreg.attach(self.model, **force.options)
        force.handle.load_state_dict(torch.load(file, weights_only=True))
        assert force.handle.steps == force.shadow.served
        self.forces.append(force)  # it acts behind the others now

    # Training

    @rule(batches=st.integers(1, 2), training=st.booleans(), closure=st.booleans())
    def step(self, batches, training, closure):
        self.counts["steps"] += 1
        self.backward(batches, training)
        expected = self.expected()
        self.optimizer.step((lambda: torch.zeros(())) if closure else None)
        self.hold(expected)

    def backward(self, batches: int, training: bool) -> None:
        self.model.train(training)
        self.optimizer.zero_grad()
        for _ in range(batches):
            loss = self.model(self.images()).square().mean()
            if loss.requires_grad:
                loss.backward()

    @torch.no_grad()
    def expected(self) -> dict[str, Tensor]:
        """The parameters after a step, in float64: forces, the optimizer's own step, proximal steps."""
        named = dict(self.model.named_parameters())
        twins = {name: nn.Parameter(whole(p.detach()).double().clone()) for name, p in named.items()}
        names = {p: name for name, p in named.items()}
        groups = [g | {"params": [twins[names[p]] for p in g["params"]]} for g in self.optimizer.param_groups]
        twin = type(self.optimizer)(groups)
        twin.load_state_dict(tree_map_only(Tensor, lambda x: whole(x).clone(), self.optimizer.state_dict()))
        grads = {
            name: p.grad if p.grad is None else whole(p.grad).double().clone() for name, p in named.items()
        }
        try:
            for force in self.forces:
                chosen = force.options["layers"].filters(self.model) if "layers" in force.options else {}
                force.shadow.begin(self.model, chosen)
        except Tied:
            assume(False)
        for force in self.forces:
            force.shadow.pulled(twins, grads, self.kind == "climbing")
        for name, grad in grads.items():
            twins[name].grad = grad
        twin.step()
        rates = {
            name: 0.0 if grads[name] is None else group["lr"]
            for group in twin.param_groups
            for name in (n for n, p in twins.items() if any(p is q for q in group["params"]))
        }
        for force in self.forces:
            force.shadow.shrunk(twins, rates)
        return twins

    def hold(self, expected: dict[str, Tensor]) -> None:
        tolerance = 1e-4 if self.dtype == torch.float32 else 1e-9
        for name, parameter in self.model.named_parameters():
            torch.testing.assert_close(
                whole(parameter.detach()).double(),
                expected[name].detach(),
                rtol=tolerance,
                atol=tolerance,
                msg=lambda said, name=name: f"{name}: {said}",
            )

    @precondition(lambda self: self.forces)
    @rule()
    def fail_in_a_closure(self):
        """A step whose closure raises: the next one goes on as if it had not been asked for."""

        def closure():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.optimizer.step(closure)
        self.step(1, False, False)

    # The network

    @rule(name=st.sampled_from(["stem", "block", "norm", "depthwise", "last"]), trained=st.booleans())
    def freeze_or_thaw(self, name, trained):
        self.model.get_submodule(name).requires_grad_(trained)

    @precondition(lambda self: not self.sharded)
    @rule()
    def shard(self):
        """Forces go on. There is no other process."""
        self.counts["sharded"] += 1
        fully_shard(self.model.requires_grad_(True).to(memory_format=torch.contiguous_format))
        self.renew()

    @precondition(lambda self: not self.sharded)
    @rule(dtype=st.sampled_from([torch.float32, torch.float64]), last=st.booleans())
    def move(self, dtype, last):
        self.model.to(dtype).to(memory_format=torch.channels_last if last else torch.contiguous_format)
        self.renew()

    @precondition(lambda self: not self.sharded)
    @rule(name=st.sampled_from(["stem", "block", "last"]))
    def swap(self, name):
        """Another module under the same name."""
        old = self.model.get_submodule(name)
        new = copy.deepcopy(old)
        nn.init.normal_(new.weight, 0, 0.3)
        setattr(self.model, name, new)
        self.renew()

    @precondition(lambda self: not self.sharded)
    @rule(assign=st.booleans())
    def load(self, assign):
        state = {
            name: torch.randn_like(x) * 0.3 if x.ndim > 1 else x.clone()
            for name, x in self.model.state_dict().items()
        }
        self.model.load_state_dict(state, assign=assign)
        self.renew()

    @precondition(lambda self: not self.sharded)
    @rule()
    def use_a_copy(self):
        """A deep copy carries no force; those on the network end with it."""
        self.model = copy.deepcopy(self.model)
        self.leave()

    @rule()
    def forget_the_model(self):
        self.model = Net(*self.widths).to(self.dtype)
        self.leave()

    @precondition(lambda self: min(self.widths) > 2)
    @rule()
    def prune(self):
        """The optimizer moves along; forces stay with the given network."""
        self.model.requires_grad_(True)
        self.step(1, True, False)
        given = {"example_inputs": self.images(2), "optimizer": self.optimizer}
        if self.sharded:
            with pytest.raises(efreg.PruningError, match="prune the network before it is quantised, sharded"):
                efreg.prune(self.model, planned(*self.widths), **given)
            return
        try:
            self.model = efreg.prune(self.model, planned(*self.widths), **given)
        except efreg.PruningError as error:
            assert str(error).startswith("the network cannot be proven")
            return
        self.leave(renewed=False)

    def leave(self, *, renewed: bool = True) -> None:
        """The network that was is gone, and its forces with it."""
        if renewed:
            self.renew()
        gc.collect()
        for force in self.forces:
            with pytest.raises(RuntimeError, match="the model of this force is gone"):
                force.handle.charges()
            force.handle.detach()
        self.forces = []

    @invariant()
    def hooks_are_those_of_the_forces(self):
        forces = getattr(self, "forces", [])
        assert len(steps._subscribers) == len(forces)
        hooks = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
        assert [len(hook) for hook in hooks] == [bool(forces)] * 2

    def teardown(self):
        for force in getattr(self, "forces", []):
            force.handle.detach()
        assert not steps._subscribers and not torch_optimizer._global_optimizer_pre_hooks


@pytest.fixture
def few_objects():
    """Garbage is looked for among what a test makes, which is little."""
    OPTIMIZERS["sgd"]([nn.Parameter(torch.zeros(()))])  # imports much
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A group of processes, of which this is the only one."""
    with meeting(0, 1, tmp_path_factory.mktemp("processes")):
        yield


@pytest.mark.usefixtures("few_objects", "one_process")
@pytest.mark.parametrize("number", PARTS)
def test_actions(number, record_property):
    counts = Counter()
    actions = type(Actions.__name__, (Actions,), {"counts": counts})
    run_state_machine_as_test(seed(number)(actions), settings=settled(25, stateful_step_count=20))
    recorded(counts, record_property)
