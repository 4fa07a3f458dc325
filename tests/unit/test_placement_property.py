"""The matrix that is renewed by what changes finds the same place as a plain recomputation of everything, device by device."""

from __future__ import annotations

from itertools import groupby
from math import isqrt

from hypothesis import example, given, settings
from hypothesis import strategies as st

from nbgpu_pool.placement.chooser import Chooser
from nbgpu_pool.placement.fleet import Fleet, Gpu, Need, Node, Spot, Taken
from nbgpu_pool.placement.rules import Fgd, Ours, Parameters
from nbgpu_pool.placement.values import BITS, ONE

MODELS = ("A", "B")
gpus = st.builds(
    Gpu,
    model=st.sampled_from(MODELS),
    memory_bytes=st.sampled_from([0, 1000, 640]),
    size_milli=st.sampled_from([1000, 1000, 500]),
    fixed=st.booleans(),
)
NONE, ZONE = frozenset[tuple[str, str]](), frozenset({("zone", "x")})
nodes = st.builds(
    Node,
    gpus=st.lists(gpus, max_size=4),
    cpu_milli=st.sampled_from([None, 2000, 9000, 20_000]),
    ram_bytes=st.sampled_from([None, 50]),
    labels=st.sampled_from([NONE, ZONE]),
)
needs = st.builds(
    Need,
    device_count=st.sampled_from([0, 1, 1, 1, 2, 3]),
    compute_milli=st.sampled_from([100, 125, 333, 460, 500, 1000]),
    memory_bytes=st.sampled_from([0, 0, 125, 500]),
    cpu_milli=st.sampled_from([0, 500, 1000, 3500, 8000]),
    ram_bytes=st.sampled_from([0, 0, 20]),
    models=st.sampled_from([None, None, frozenset("A"), frozenset("AB")]),
    labels=st.sampled_from([NONE, NONE, NONE, ZONE]),
)


class Plain:
    """Nodes as lists, all of it looked at each time."""

    def __init__(self, described: list[Node]):
        self.nodes = described
        self.free = [[gpu.size_milli for gpu in node.gpus] for node in described]
        self.bytes = [[gpu.memory_bytes or 1 << 40 for gpu in node.gpus] for node in described]
        self.cpu = [1 << 40 if node.cpu_milli is None else node.cpu_milli for node in described]
        self.ram = [1 << 40 if node.ram_bytes is None else node.ram_bytes for node in described]

    def left(self, node: int, index: int, free: int, memory: int) -> int:
        gpu = self.nodes[node].gpus[index]
        if gpu.fixed and free < gpu.size_milli:
            return 0
        return max(0, min(free, memory * gpu.size_milli // (gpu.memory_bytes or 1 << 40)))

    def lefts(self, node: int) -> list[int]:
        return [self.left(node, index, self.free[node][index], self.bytes[node][index]) for index in range(len(self.free[node]))]

    def ok(self, need: Need, node: int, index: int) -> bool:
        gpu, free = self.nodes[node].gpus[index], self.free[node][index]
        if need.models is not None and gpu.model not in need.models:
            return False
        return free >= need.compute_milli and self.bytes[node][index] >= need.memory_bytes and (not gpu.fixed or free == gpu.size_milli)

    def places(self, need: Need, node: int) -> list[tuple[int, ...]]:
        if self.cpu[node] < need.cpu_milli or self.ram[node] < need.ram_bytes or not need.labels <= self.nodes[node].labels:
            return []
        if need.device_count == 0:
            return [()]
        left = self.lefts(node)
        fits = [index for index in range(len(left)) if self.ok(need, node, index)]
        if need.device_count == 1:
            return [(index,) for index in fits]
        found: list[tuple[int, ...]] = []
        model = lambda index: self.nodes[node].gpus[index].model  # noqa: E731
        for _, group in groupby(sorted(fits, key=model), key=model):
            alike = sorted(group, key=lambda index: (left[index], index))
            if len(alike) >= need.device_count:
                found.append(tuple(alike[: need.device_count]))
        return sorted(found)  # by the first device, whatever the models are called

    def value(self, node: int, left: list[int], cpu: int, weights: dict[Need, int], cpu_limits: bool) -> int:
        """Twice V."""
        value = 0
        for shape, weight in weights.items():
            usable = self.usable(shape, node, left, cpu)
            total = shape.total_milli
            if not cpu_limits or not shape.cpu_milli or usable * shape.cpu_milli <= cpu * total:
                value += 2 * usable * weight
            else:
                value += usable * weight + cpu * (weight * total // shape.cpu_milli)
        return value

    def usable(self, shape: Need, node: int, left: list[int], cpu: int) -> int:
        models = [gpu.model for gpu in self.nodes[node].gpus]
        usable = [
            one
            for one, model in zip(left, models, strict=True)
            if one >= shape.compute_milli and (shape.models is None or model in shape.models)
        ]
        return sum(usable) if cpu >= shape.cpu_milli and len(usable) >= shape.device_count else 0

    def choose(self, need: Need, weights: dict[Need, int], cpu_limits: bool, remainder: list[int], remainder_weight: int) -> Spot | None:
        best: tuple[int, Spot] | None = None
        for node in range(len(self.nodes)):
            before = self.lefts(node)
            for devices in self.places(need, node):
                after = list(before)
                for index in devices:
                    fixed = self.nodes[node].gpus[index].fixed
                    milli = 0 if fixed else self.free[node][index] - need.compute_milli
                    after[index] = self.left(node, index, milli, self.bytes[node][index] - need.memory_bytes)
                gain = self.value(node, after, self.cpu[node] - need.cpu_milli, weights, cpu_limits)
                gain -= self.value(node, before, self.cpu[node], weights, cpu_limits)
                worth = sum(remainder[after[index]] - remainder[before[index]] for index in devices)
                score = (gain + 2 * ONE * (need.total_milli + remainder_weight * worth)) // (2 * ONE * 40)
                if best is None or score > best[0]:
                    best = score, Spot(node, devices)
        return best[1] if best else None

    def book(self, taken: Taken, sign: int) -> None:
        node = taken.spot.node
        for index, milli, memory in zip(taken.spot.devices, taken.milli, taken.bytes, strict=True):
            self.free[node][index] -= sign * milli
            self.bytes[node][index] -= sign * memory
        self.cpu[node] -= sign * taken.need.cpu_milli
        self.ram[node] -= sign * taken.need.ram_bytes

    def weights(self, shares: dict[Need, int], most: int) -> dict[Need, int]:
        free = sum(sum(self.lefts(node)) for node in range(len(self.nodes)))
        found: dict[Need, int] = {}
        even = uneven = 0
        for shape, share in shares.items():
            if shape.device_count:
                usable = sum(self.usable(shape, node, self.lefts(node), self.cpu[node]) for node in range(len(self.nodes)))
                scarce = min(most * ONE, isqrt((free**3 << 2 * BITS) // usable**3)) if usable else most * ONE
                found[shape] = share * scarce >> BITS
                even, uneven = even + share * usable, uneven + found[shape] * usable
        return {shape: weight * even // uneven if uneven else weight for shape, weight in found.items()}


B_A_A_B = Node([Gpu(model) for model in "BAAB"])


@settings(max_examples=50, deadline=None)
@example([B_A_A_B], [(Need(2, 100), 2)], False)  # equals, of which the model that comes first is not on the first device
@given(st.lists(nodes, min_size=1, max_size=5), st.lists(st.tuples(needs, st.integers(0, 3)), max_size=25), st.booleans())
def test_incremental_equals_plain(described: list[Node], steps: list[tuple[Need, int]], fgd: bool) -> None:
    fleet, plain = Fleet(described), Plain(described)
    shares = {need._replace(memory_bytes=0, ram_bytes=0, labels=NONE): ONE // (number + 1) for number, (need, _) in enumerate(steps[:6])}
    shares = {shape: share for shape, share in shares.items() if shape.device_count}
    rule = Fgd(fleet, shares) if fgd else Ours(fleet, shares, Parameters(reweigh_every=4))
    chooser = Chooser(fleet, rule)
    weights = shares if fgd else plain.weights(rule.demand.shares(ONE), rule.parameters.most_scarce)  # type: ignore[union-attr]
    version = rule.version
    held: list[Taken] = []
    for need, leaving in steps:
        rule.arrived(need)
        if isinstance(rule, Ours) and rule.version != version:
            version, weights = rule.version, plain.weights(rule.demand.shares(ONE), rule.parameters.most_scarce)
        remainder = rule.remainder.tolist() if isinstance(rule, Ours) else [0] * 1001
        spot = chooser.choose(need)
        assert spot == plain.choose(need, weights, not fgd, remainder, 0 if fgd else 3)
        if spot is not None:
            held.append(fleet.take(spot, need))
            plain.book(held[-1], 1)
        if leaving == 1:
            chooser.refresh()
        if leaving == 0 and held:
            plain.book(held[0], -1)
            fleet.give_back(held.pop(0))
        assert [fleet.left[node, : len(plain.free[node])].tolist() for node in range(len(described))] == [
            plain.lefts(node) for node in range(len(described))
        ]
    while held:
        fleet.give_back(held.pop())
    assert (fleet.free_milli == fleet.size_milli - (fleet.size_milli == 0)).all(), "nothing leaks"
