r"""Which way keys and queries of unbounded reach meet when devices share a sequence: a model of what each way costs.

P devices, with n = B T tokens each, of H heads and G groups of keys; e bytes a number, but partial results and the sums
of gradients are float32; w = K + V, and A devices that share heads, with s copies of a group (`parallel/ulysses.py`).
Bytes that a device sends, forward, and backward if that differs (ids and positions, 8 bytes a token, left out here):

| scheme        | sent                                                     | waits   | slowest | keys it holds |
|---------------|----------------------------------------------------------|---------|---------|---------------|
| ring          | (P-1) n G w e; backward (P-1) n G w e + P n G w 4        | P - 1   | 2 - 1/P | 2 n G w e     |
| balanced ring | and n/2 (H K e + G w e + H (V+1) 4)                      | P + 1   | 1       | 2 n G w e     |
| heads         | (A-1)/A n (H K e + s G w e + H (V+1) 4), A = P           | 2 (P-1) | 1       | s n G w e     |
| both          | that, A < P; and the ring's of P/A devices and s G groups | both's  | ring's  | 2 s n G w e   |
| gather        | (P-1) n G w e; balanced, and n/2 (H K e + H (V+1) 4)     | log₂ P  | 1       | P n G w e     |

"slowest" is the slowest device's work over the mean, under a causal pattern. The time of a training step's attention is
that of the floating-point operations of the slowest device, forward and 5/2 of that backward, and of what is sent while
nothing is computed: a ring sends keys while others are worked on, and waits for what that leaves over; all else waits.
On a torus, what goes further than to a neighbour takes the links between: A / 4 of them on average, half each way, in
an exchange among A devices, and as many as (P + 1) / 3 in gathering. Documents are taken to fill their rows. `auto` is
what is quickest of what holds no more keys than a ring, or than a hundredth of the memory.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from typing import NamedTuple

import jax
from jaxtyping import Array

from longctx.ops.patterns import Pattern
from longctx.parallel import balance

NAMES = ("auto", "ring", "heads", "both", "gather")
_IDS = 8  # bytes a token: id and position


class Platform(NamedTuple):
    """What a device does.

    Attributes:
      bandwidth: bytes a second over a link, one way.
      latency: seconds that a message takes.
      flops: floating-point operations of attention a second.
      memory: bytes it holds.
      torus: whether links join neighbours alone, and not all devices by a switch.
    """

    bandwidth: float
    latency: float
    flops: float
    memory: float
    torus: bool


# Operations: half of the peak of bfloat16 matrix products, which is about what attention reaches. Links: of TPU v5p a
# sixth of the chip's 1,200 GB/s in both directions (docs.cloud.google.com/tpu/docs/v5p), of H100 half of NVLink's
# 900 GB/s (its data sheet). Latencies are orders of magnitude: a hop on a torus, a kernel of NCCL. Of simulated devices
# on a CPU all is made up: they share cores and memory, and a message is a copy without delay.
PLATFORMS = {
    "tpu": Platform(bandwidth=100e9, latency=1e-6, flops=230e12, memory=95e9, torus=True),
    "gpu": Platform(bandwidth=450e9, latency=10e-6, flops=495e12, memory=80e9, torus=False),
    "cpu": Platform(bandwidth=10e9, latency=0.0, flops=10e9, memory=2e9, torus=False),
}
_SHARE = 0.01  # of a device's memory, for a layer's keys from other devices: what else a step holds needs the rest


class Scheme(NamedTuple):
    """A way for keys and queries to meet.

    Attributes:
      name: "ring", "heads", "both" or "gather".
      among: devices that share the heads, neighbours; 1 for none.
      balanced: whether shards trade halves, so that all devices have the same work.
    """

    name: str
    among: int
    balanced: bool

    def __str__(self):
        return ("balanced " if self.balanced else "") + self.name + (f" of {self.among}" if self.name == "both" else "")


@dataclasses.dataclass(frozen=True)
class Case:
    """A device's share of an attention, `batch` rows of `length` tokens, and how many share the sequence.

    Attributes:
      heads, groups: of a device.
      itemsize: bytes of a number of queries, keys and values.
      sharing: numbers of devices that may share the heads.
      balances: how many, or 1, if shards may then trade halves.
      platform: of the devices, one of `PLATFORMS`.
    """

    batch: int
    length: int
    heads: int
    groups: int
    key_width: int
    value_width: int
    itemsize: int
    devices: int
    sharing: tuple[int, ...]
    balances: tuple[int, ...]
    platform: str

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, pattern: Pattern, axis_name: str) -> Case:
        """The case of one device's q, k and v, inside a `jax.shard_map` over `axis_name`."""
        devices, ((batch, length, heads, width), groups) = jax.lax.axis_size(axis_name), (q.shape, k.shape[2])
        divisors = [among for among in range(1, devices + 1) if devices % among == 0]
        return cls(
            batch=batch,
            length=length,
            heads=heads,
            groups=groups,
            key_width=width,
            value_width=v.shape[3],
            itemsize=k.dtype.itemsize,
            devices=devices,
            sharing=tuple(n for n in divisors if n > 1 and heads % n == 0),
            balances=tuple(n for n in divisors if balance.pays(pattern, n * length, devices // n)),
            platform=jax.sharding.get_abstract_mesh().abstract_device.platform,
        )

    def candidates(self, named: str) -> list[Scheme]:
        """The schemes that go by a name, of those that this case allows."""
        found = [Scheme("ring", 1, 1 in self.balances), Scheme("gather", 1, 1 in self.balances)]
        found += [Scheme("ring", 1, False), Scheme("gather", 1, False)]
        for among in self.sharing:
            name = "heads" if among == self.devices else "both"
            found.append(Scheme(name, among, among in self.balances))
        return [scheme for scheme in dict.fromkeys(found) if named in ("auto", scheme.name)]


class Cost(NamedTuple):
    """Of a scheme.

    Attributes:
      forward, backward: bytes that a device sends.
      messages: that it waits for, one after another, forward; as many backward.
      memory: bytes of keys and values that it holds at a time.
      slowest: the work of the slowest device over the mean.
      seconds: of a training step.
    """

    forward: float
    backward: float
    messages: int
    memory: float
    slowest: float
    seconds: float


def cost(case: Case, scheme: Scheme, platform: Platform) -> Cost:
    """What a scheme costs in a case; see the module's docstring."""
    tokens, among, gathers = case.batch * case.length, scheme.among, scheme.name == "gather"
    rounds = case.devices // among
    query = case.heads * case.key_width * case.itemsize
    result = case.heads * (case.value_width + 1) * 4
    copies = among // math.gcd(case.groups, among)
    numbers = copies * case.groups * (case.key_width + case.value_width)
    keys, ids = numbers * case.itemsize, among * _IDS

    exchanged = (among - 1) / among * (query + keys + result)
    traded = (query + result + (0 if gathers else keys)) / 2 if scheme.balanced else 0
    forward = exchanged + traded + (among - 1) * _IDS + (ids / 2 if scheme.balanced else 0)
    backward = exchanged + traded
    messages = 2 * (among - 1) + (2 if scheme.balanced else 0)
    # Bytes times links, were they sent to neighbours.
    detour = (exchanged * max(1, among / 8) + traded * max(1, case.devices / 8)) if platform.torus else backward
    waits = tokens * 2 * detour / platform.bandwidth

    pairs = case.length**2 * among / 2  # of query and key, visible within a shard
    work = case.batch * pairs * case.heads * 2 * (case.key_width + case.value_width) / platform.flops
    works = [work if scheme.balanced or turn == 0 else 2 * work for turn in range(rounds)]
    around = (rounds - 1) * (keys + ids)
    if gathers:
        forward, backward = forward + around, backward + (rounds - 1) * keys
        waits += tokens * 2 * around / platform.bandwidth * (max(1, (rounds + 1) / 3) if platform.torus else 1)
        messages += (rounds - 1).bit_length()
        memory = rounds * tokens * keys
    else:
        gradients = rounds * numbers * 4 if rounds > 1 else 0
        forward, backward = forward + around, backward + around + gradients
        send = tokens * (keys + ids) / platform.bandwidth
        waits += sum(max(0, send - work) + max(0, send - 2.5 * work) for work in works[:-1])
        waits += tokens * gradients / platform.bandwidth
        messages += rounds - 1
        memory = min(rounds, 2) * tokens * keys
    seconds = 3.5 * sum(works) + waits + 2 * messages * platform.latency
    return Cost(tokens * forward, tokens * backward, messages, memory, sum(works) / (work * rounds), seconds)


@functools.cache
def choose(case: Case, named: str) -> Scheme:
    """The quickest scheme that fits, of those that go by a name; logged once.

    Args:
      case: what is to be computed.
      named: one of `NAMES`; "auto" is all of them, and a named one is taken whether it fits or not.

    Raises:
      ValueError: no scheme has this name, or the devices cannot share the heads as the named one does.
    """
    if named not in NAMES:
        raise ValueError(f"context_parallel is '{named}'; choose one of {', '.join(NAMES)}.")
    constants = PLATFORMS[case.platform]
    costs = {scheme: cost(case, scheme, constants) for scheme in case.candidates(named)}
    if not costs:
        raise ValueError(
            f"context_parallel is '{named}', and {case.devices} devices along context cannot share {case.heads} heads "
            f"({case.groups} of keys) of a device"
            + (" in groups of fewer devices" if named == "both" else "")
            + "; give a number of heads that they divide, or choose 'ring', 'gather' or 'auto'."
        )
    ring = cost(case, Scheme("ring", 1, False), constants)
    allowed = max(constants.memory * _SHARE, ring.memory) if named == "auto" else math.inf
    fitting = [scheme for scheme in costs if costs[scheme].memory <= allowed]
    chosen = min(fitting, key=lambda scheme: costs[scheme].seconds)
    logging.info(
        "attention over %d devices of %d tokens: %s (%s)",
        case.devices,
        case.length,
        chosen,
        "; ".join(
            f"{scheme}: {cost.forward + cost.backward:.3g} bytes sent, {cost.messages} messages, "
            f"{cost.memory:.3g} bytes of keys, slowest {cost.slowest:.2f}, {cost.seconds:.3g} s"
            for scheme, cost in costs.items()
        ),
    )
    return chosen
