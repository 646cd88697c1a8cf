"""Training with `fully_shard`: what two and four processes make of a network is what one makes of it."""

import pytest
import torch
import torch.distributed as dist
from processes import found_by, meeting
from torch import nn
from torch.nn import functional as F

import efreg
from efreg.force import batches

ONCE = {"alpha": 1e-15}
LAWS = {
    "electrostatic": {"law": "electrostatic", "alpha": 1e-15},
    "signs of sums": {"law": efreg.Electrostatic(1e-15, sign="sum")},
    "relative": {"law": efreg.Electrostatic(1e-6, relative=True)},
    "gravity": {"law": "gravity", "alpha": 1e-4},
    "torque": {"law": "torque", "alpha": 1e-4},
    "l1": {"law": "l1", "alpha": 1e-2},
    "group lasso": {"law": "group_lasso", "alpha": 1e-2},
    "ladder": {"law": "ladder", "alpha": 1e-1},
    "growing": {"law": "greg1", "alpha": 1e-3, "refresh": 1},
}
WAYS = {
    "weights": {"refresh": 1},
    "filter": {"refresh": 2, "scope": "filter"},
    "proximal": {"scope": "filter", "update": "proximal"},
}
CASES = {f"{law}, {way}": WAYS[way] | LAWS[law] for law in LAWS for way in WAYS}
CASES["fade"] = {"law": efreg.Fade(4)}
CASES["fade, forgetting"] = {"law": efreg.Fade(6, forget=True)}


class Net(nn.Module):
    """A residual group of two writers, whose units no number of processes divides, and a group of three."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.block, self.norm2 = nn.Conv2d(10, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.narrow, self.head = nn.Conv2d(10, 3, 1), nn.Linear(3, 5)

    def forward(self, x):
        x = F.relu(self.norm1(self.stem(x)))
        x = F.relu(x + self.norm2(self.block(x)))
        return self.head(F.relu(self.narrow(x)).mean((2, 3)))


def network():
    torch.manual_seed(0)
    net = Net().eval()
    return net, efreg.plan(net, ratio=0.5, example_inputs=torch.randn(2, 3, 8, 8))


def images():
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        yield torch.randn(8, 3, 8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator)


def trained(case, shard=lambda net: None, *, first="shard", part=(0, 1)):
    """Weights and coefficients after five steps on a process's part of the images."""
    net, plan = network()
    options = {"layers": plan, "check": None, **case}
    if first == "shard":
        shard(net)
    force = efreg.attach(net, **options)
    if first == "attach":
        shard(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step_on(net, optimizer, images(), part)
    weights = {name: whole(tensor.detach()) for name, tensor in net.state_dict().items()}
    state = force.state_dict()
    force.detach()
    return weights, state


def step_on(net, optimizer, batches, part):
    rank, processes = part
    for x, y in batches:
        loss = F.cross_entropy(net(x.chunk(processes)[rank]), y.chunk(processes)[rank])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def sharded(net):
    """The narrow convolution is a unit of its own, the rest another."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(net.narrow)
    fully_shard(net)


def policies():
    """Shardings with a policy: convolutions in lower precision, and parameters that are kept on the CPU."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    def mixed(net):
        for part in (net.stem, net.block, net.narrow):
            fully_shard(part, mp_policy=MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.float32))
        fully_shard(net)

    return {
        "mixed precision": mixed,
        "offloaded": lambda net: fully_shard(net, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    }


def restored(folder, part):
    """Of a training that is saved after three steps and goes on in other objects, as the file has it."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    for steps in (slice(3), slice(3, 5)):
        net, plan = network()
        sharded(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        force = efreg.attach(net, layers=plan, check=None, **CASES["ladder, filter"])
        if steps.start:
            model_state, optimizer_state = get_state_dict(net, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state, "force": force.state_dict()}
            dcp.load(state, checkpoint_id=f"{folder}/checkpoint")
            set_state_dict(
                net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
            force.load_state_dict(state["force"])
        step_on(net, optimizer, list(images())[steps], part)
        if not steps.start:
            model_state, optimizer_state = get_state_dict(net, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state, "force": force.state_dict()}
            dcp.save(state, checkpoint_id=f"{folder}/checkpoint")
        force.detach()
    return {name: whole(tensor.detach()) for name, tensor in net.state_dict().items()}


def collectives(case):
    """The numbers that each step's collectives of ours carried."""
    counted, reduce = [], dist.all_reduce

    def counting(tensor, **options):
        counted[-1].append(tensor.numel())
        return reduce(tensor, **options)

    before = batches.Batch.begin
    batches.Batch.begin = lambda self, refresh: (counted.append([]), before(self, refresh))[1]
    dist.all_reduce = counting
    try:
        trained(case, sharded, part=(dist.get_rank(), dist.get_world_size()))
    finally:
        dist.all_reduce, batches.Batch.begin = reduce, before
    return counted


def work(rank, processes, folder):
    """All that the processes do, into a file of each rank."""
    part = rank, processes
    with meeting(rank, processes, folder):
        found = {name: trained(case, sharded, part=part) for name, case in CASES.items()}
        found["attached first"] = trained(CASES["ladder, filter"], sharded, first="attach", part=part)
        found["again"] = trained(CASES["ladder, filter"], sharded, part=part)
        found["collectives"] = collectives(LAWS["electrostatic"] | {"refresh": 2})
        found |= {name: trained(CASES["fade"], shard, part=part) for name, shard in policies().items()}
        found["restored"] = restored(folder, part)
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    """What each of the processes found."""
    return found_by(work, request.param, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("name", CASES)
def test_processes_with_shards_train_as_one(name, found):
    """To float32's rounding, as the sums over images are made in another order."""
    weights, state = trained(CASES[name])
    for theirs, kept in (here[name] for here in found):
        for key, weight in weights.items():
            torch.testing.assert_close(theirs[key], weight, rtol=1e-5, atol=1e-6)
        assert kept.keys() == state.keys()


def test_every_process_has_the_same_coefficients(found):
    for name in CASES:
        first, *others = (here[name][1] for here in found)
        assert all(repr(first) == repr(other) for other in others)


def test_shards_before_and_after_attach_give_the_same_bits_and_so_does_another_run(found):
    for here in found:
        for name in ("attached first", "again"):
            for key, weight in here["ladder, filter"][0].items():
                assert torch.equal(here[name][0][key], weight)


def test_parameters_that_are_kept_on_the_cpu(found):
    for here in found:
        for key, weight in trained(CASES["fade"])[0].items():
            torch.testing.assert_close(here["offloaded"][0][key], weight, rtol=1e-5, atol=1e-6)


def test_in_lower_precision_the_same_units_are_exactly_zero_at_the_end_of_a_fade(found):
    for here in found:
        for key, weight in trained(CASES["fade"])[0].items():
            assert torch.equal(here["mixed precision"][0][key] == 0, weight == 0)


def test_a_training_goes_on_from_a_distributed_checkpoint_to_the_same_bits(found):
    for here in found:
        for key, weight in here["ladder, filter"][0].items():
            assert torch.equal(here["restored"][key], weight)


def test_one_collective_when_charges_are_taken_of_two_numbers_a_filter(found):
    """Whatever the size of the filters: 10 + 10 + 3 of them write units."""
    for here in found:
        assert here["collectives"] == [[2 * 23], [], [2 * 23], [], [2 * 23]]


@pytest.fixture
def alone(tmp_path):
    """This process is a group."""
    with meeting(0, 1, tmp_path):
        yield


def test_filters_that_are_split_are_refused(alone):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    net, _ = network()
    fully_shard(net, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    with pytest.raises(
        ValueError, match="stem.weight is placed as .* shard it along dimension 0, where they"
    ):
        efreg.attach(net, 1e-15)


def test_flat_pieces_are_refused(alone):
    from torch.distributed.fsdp import FullyShardedDataParallel

    net, _ = network()
    wrapped = FullyShardedDataParallel(net, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="flat pieces of parameters.* take .*fully_shard"):
        efreg.attach(wrapped, 1e-15)


def test_partitions_are_refused():
    net, _ = network()
    net.stem.weight.ds_id = 0  # as DeepSpeed marks them
    with pytest.raises(ValueError, match="stem.weight is partitioned by .* stage 3.* take stage"):
        efreg.attach(net, 1e-15)


def test_a_sharded_network_is_not_cut(alone):
    net, plan = network()
    x = torch.randn(2, 3, 8, 8)
    sharded(net)
    ways = (
        lambda: efreg.plan(net, ratio=0.5, example_inputs=x),
        lambda: efreg.prune(net, plan, example_inputs=x),
    )
    for cut in ways:
        with pytest.raises(efreg.PruningError, match="cannot be cut: prune the network before it is"):
            cut()
