r"""LongRoPE's search: by how much should each pair of channels turn slower, so that a model reads s times as far?

Rotary frequencies θ_j become θ_j / λ_j (`longctx.ops.positions.longrope`). Among the factors

    1 <= λ_0 <= λ_1 <= ... <= λ_{R/2-1} <= 1.25 s,    each a multiple of a step above 1,

those with the least loss at the longer length are sought by evolution, which needs of the loss nothing but values.
The population begins with position interpolation, NTK and YaRN, rounded to the step, and mutations of these. In each
iteration its best are the parents, and the next population is they, mutations of them and crossings of two of them. No
individual's loss is taken twice.

A mutation draws each factor, with probability p, anew from all between its two neighbours. A crossing of two parents
takes each factor of the second with probability p, else of the first; where no such child is in order and new, the
first parent mutates in its place.

Reference: Ding et al., "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens", 2024 (arXiv:2402.13753),
section 3.2, algorithm 1 and table 4. Its number of first tokens that are not rescaled is not sought here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from longctx.ops import positions

_TRIES = 100  # at a child that is new, before going without


@dataclasses.dataclass(frozen=True)
class Found:
    """What the search found.

    Attributes:
      factors: `[R/2]` float64, the best λ.
      loss: theirs.
      history: the best loss of the first population, and of all so far after each iteration.
    """

    factors: Float[np.ndarray, " R/2"]
    loss: float
    history: tuple[float, ...]


def search(
    loss: Callable[[Float[np.ndarray, " R/2"]], float],
    width: int,
    base: float,
    factor: float,
    trained: int,
    *,
    population: int = 64,
    parents: int = 32,
    mutations: int = 16,
    crossings: int = 16,
    iterations: int = 40,
    probability: float = 0.3,
    step: float = 0.01,
    seed: int = 0,
) -> Found:
    """The factors with the least loss that an evolution finds; the defaults are the paper's.

    Args:
      loss: of factors `[R/2]`, such as the perplexity of a model with these factors on texts of the length to reach.
        What is not finite counts as the worst. Called `population` times, and then at most `mutations + crossings`
        times an iteration.
      width, base, factor, trained: R, b, s and L as in `longctx.ops.positions`.
      population: individuals to begin with.
      parents: the best of a population, which make the next and are in it.
      mutations, crossings: children an iteration.
      iterations: how often.
      probability: p.
      step: between one factor and the next larger one.
      seed: the same one finds the same.

    Raises:
      ValueError: a number that cannot be, in a sentence that names it.
    """
    for name, value, least in (("width", width, 2), ("parents", parents, 2), ("population", population, parents)):
        if value < least:
            raise ValueError(f"{name} is {value}; expected at least {least}.")
    if not (0 < probability <= 1 and step > 0):
        raise ValueError(f"probability is {probability}, step is {step}; expected 0 < probability <= 1 and step > 0.")
    theta = positions.rope(width, base).frequencies
    schemes = (
        positions.linear(width, base, factor),
        positions.ntk(width, base, factor),
        positions.yarn(width, base, factor, trained),
    )
    last = math.floor((1.25 * factor - 1) / step + 1e-9)
    seeds = [np.clip(np.rint((theta / scheme.frequencies - 1) / step), 0, last).astype(int) for scheme in schemes]
    pool = _Pool(loss, np.random.default_rng(seed), probability, step, last)
    alive = [individual for individual in seeds if pool.add(individual)]
    first = len(alive)
    while len(alive) < population and (child := pool.mutation(alive[len(alive) % first])) is not None:
        alive.append(child)
    history = [pool.best()]
    for _ in range(iterations):
        alive = sorted(alive, key=pool.loss_of)[:parents]
        made = [pool.mutation(alive[pool.draws.integers(len(alive))]) for _ in range(mutations)]
        made += [pool.crossing(alive) for _ in range(crossings)]
        alive += [child for child in made if child is not None]
        history.append(pool.best())
    best = min(alive, key=pool.loss_of)
    return Found(1 + step * best, pool.loss_of(best), tuple(history))


class _Pool:
    """Individuals, `[R/2]` whole steps above 1, and the losses of all that ever were."""

    def __init__(self, loss, draws: np.random.Generator, probability: float, step: float, last: int):
        self.loss, self.draws, self.probability, self.step, self.last = loss, draws, probability, step, last
        self.losses: dict[bytes, float] = {}

    def loss_of(self, individual: Int[np.ndarray, " R/2"]) -> float:
        return self.losses[individual.tobytes()]

    def best(self) -> float:
        return min(self.losses.values())

    def add(self, individual) -> bool:
        """Takes its loss; False if it was there before, or is out of order."""
        key = individual.tobytes()
        if key in self.losses or (np.diff(individual) < 0).any():
            return False
        found = float(self.loss(1 + self.step * individual))
        self.losses[key] = found if math.isfinite(found) else math.inf
        return True

    def mutation(self, parent):
        """A new individual, or None if none was found."""
        child = parent.copy()
        for _ in range(_TRIES):
            for j in np.flatnonzero(self.draws.random(len(child)) < self.probability):
                below = child[j - 1] if j else 0
                above = child[j + 1] if j + 1 < len(child) else self.last
                child[j] = self.draws.integers(below, above, endpoint=True)
            if self.add(child):
                return child
        return None

    def crossing(self, alive):
        """A child of two of those alive, of which the better one is the first; else a mutation of it."""
        if len(alive) < 2:
            return None
        first, second = sorted(self.draws.choice(len(alive), 2, replace=False))
        for _ in range(_TRIES):
            chosen = self.draws.random(len(alive[first])) < self.probability
            child = np.where(chosen, alive[second], alive[first])
            if self.add(child):
                return child
        return self.mutation(alive[first])
