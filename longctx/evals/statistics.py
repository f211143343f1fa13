"""How sure a number is: intervals of shares, standard errors of means whose parts hang together."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

Z = 1.959964  # of the normal distribution, for 95 %


def wilson(share: float, trials: float) -> list[float]:
    """`[low, high]`, the interval of a share that was found in `trials`, at 95 %; honest at 0 and 1, where ± is not.

    With p the share, n the trials and z = 1.96,

        (p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n)

    (Wilson, "Probable inference, the law of succession, and statistical inference", 1927).
    """
    square = Z * Z / trials
    middle = share + square / 2
    half = math.sqrt(square * (share * (1 - share) + square / 4))
    low, high = (middle - half) / (1 + square), (middle + half) / (1 + square)
    return [0.0 if share == 0 else low, 1.0 if share == 1 else high]


def independent(shares: Float[np.ndarray, " rows"], trials: int) -> float:
    """How many independent trials the shares of several rows are worth, of `trials` in all.

    As many as would spread the mean as the rows do; at least as many as rows, and all of them if rows do not differ
    more than chance makes them. Rows that are all right, or all wrong, count once each.
    """
    rows, mean = len(shares), shares.mean()
    spread = shares.var() / rows
    if mean in (0, 1) or rows == 1:
        return rows
    return float(np.clip(mean * (1 - mean) / spread if spread else trials, rows, trials))


def clustered(
    values: Float[np.ndarray, " n"],
    clusters: Sequence[Hashable],
    weights: Float[np.ndarray, " n"] | None = None,
) -> tuple[float, float | None]:
    """The weighted mean, and its standard error if only values of different clusters are independent.

    With m the mean, w the weights and G clusters, the error is that of a ratio of sums,

        sqrt(G / (G - 1) * sum over clusters of (sum in it of w (x - m))²) / sum of w

    (Liang and Zeger, "Longitudinal data analysis using generalized linear models", 1986). Of values in one cluster
    nothing can be said: the error is None.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    mean = float(np.sum(weights * values) / weights.sum())
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    if len(names) < 2:
        return mean, None
    sums = np.bincount([names[name] for name in clusters], weights * (values - mean))
    return mean, float(math.sqrt(len(names) / (len(names) - 1) * np.sum(sums**2)) / weights.sum())
