"""Cross-entropy of a vocabulary, in chunks: the logits of a whole row are never held.

For a token with hidden vector h (width D), target y and unembedding E[V, D]:

    logits  z = E h                                (float32)
    loss    l = log sum_v exp(z_v) - z_y           (nats)
    total     = sum over tokens of weight * l

With label smoothing s the total's target is not y alone, but t = (1 - s) onehot(y) + s / V (Szegedy et al., 2016):
z_y gives way to t . z. The best logits then are finite ones, and loss remains wherever they vary.

With a bias b and a soft cap C (Gemma 2, arXiv:2408.00118) the logits are z = C tanh((E h + b) / C), and g below has a
factor 1 - (z / C)^2; the gradient of b is the sum of g over the tokens.

With a z-loss of coefficient c (PaLM, Chowdhery et al., 2022) the total also has weight * c (log sum_v exp(z_v))^2 of
every token, which keeps logits from drifting all together, where the loss does not see it.

The row is cut into chunks and a `lax.scan` goes over them. Since `total` is one number, its gradient is known up to
that number's cotangent as soon as the loss is: with p = softmax(z), Z = sum_v exp(z_v) and
g = weight (p - t + 2 c p log Z),

    d total / d h = E^T g,    d total / d E = sum over tokens of g h^T

so the forward pass of a gradient takes both at once, from the logits at hand, and the backward pass only scales them:
three matrix products of T * D * V in all, none computed twice. Memory is B * chunk * V floats for the logits,
whatever T is.

A chunk is *not* a contiguous piece of the row. The row is cut into `chunk` equal contiguous pieces, and step j of
the scan takes token j of each piece. Where the row is sharded contiguously over devices, and their number divides
`chunk`, every device then works at every step on tokens that it already holds; chunks of neighbouring tokens would
leave all devices but one idle.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from longctx.ops.sizes import sizes
from longctx.typing import checked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unembedding:
    """How logits are made of hidden vectors: the matrix E, and b and C where there are any."""

    matrix: Float[Array, "V D"]
    bias: Float[Array, " V"] | None = None
    soft_cap: float = dataclasses.field(default=0.0, metadata={"static": True})  # 0: none

    @classmethod
    def of(cls, given: Unembedding | Float[Array, "V D"]) -> Unembedding:
        """`given`, of which a matrix alone has neither bias nor cap."""
        return given if isinstance(given, cls) else cls(given)

    def logits(self, hidden: Float[Array, "... D"], precision: str | None = None) -> Float[Array, "... V"]:
        """Float32 logits; the product is taken in the dtype of `hidden`."""
        matrix = self.matrix.astype(hidden.dtype)
        z = jnp.einsum("...d,vd->...v", hidden, matrix, precision=precision, preferred_element_type=jnp.float32)
        z = z if self.bias is None else z + self.bias
        return self.soft_cap * jnp.tanh(z / self.soft_cap) if self.soft_cap else z


class CrossEntropy(NamedTuple):
    """What `cross_entropy` returns.

    Attributes:
      total: the sum of `weights * losses`, float32; with label smoothing, of the smoothed losses; z-loss included.
      z_loss: the part of `total` that is z-loss.
      losses: `[B, T]` float32, -log p(target) in nats, not weighted.
      correct: `[B, T]` bool, true where no logit is larger than the target's.
    """

    total: Float[Array, ""]
    z_loss: Float[Array, ""]
    losses: Float[Array, "B T"]
    correct: Bool[Array, "B T"]


@checked
def cross_entropy(
    hidden: Float[Array, "B T D"],
    unembedding: Unembedding | Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"] | Bool[Array, "B T"],
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> CrossEntropy:
    """Cross-entropy of the logits that `unembedding` makes of `hidden` against `targets`.

    Args:
      hidden: any floating dtype. The product is taken in this dtype and accumulated in float32.
      unembedding: one row per vocabulary entry; or an `Unembedding`.
      targets: below V; where the weight is 0 any value in range will do.
      weights: weight of each token in `total`.
      smoothing: s, from 0 to below 1, of the total's targets.
      z_loss: c, not negative.
      chunk: tokens of each row whose logits are held at once; a multiple of the devices that the row is sharded
        over. None: as `ops/sizes.py` says of the platform.

    Returns:
      `CrossEntropy`. `total` is differentiable once, with respect to `hidden` and `unembedding`; the others are
      for reading and carry no gradient.
    """
    batch, length, _ = hidden.shape
    head = Unembedding.of(unembedding)
    if chunk is None:
        held = max(sizes().loss_tokens, sizes().loss_logits // len(head.matrix))
        chunk = max(1, held // batch)
    chunk = min(chunk, length)
    options = _Options(chunk, smoothing, z_loss)
    head = dataclasses.replace(head, matrix=head.matrix.astype(hidden.dtype))
    found = _scan(options, hidden, head, targets, weights.astype(jnp.float32))
    return CrossEntropy(found.total, *jax.lax.stop_gradient(found[1:]))


class _Options(NamedTuple):
    chunk: int
    smoothing: float
    z_loss: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options: _Options, hidden, head, targets, weights) -> CrossEntropy:
    def step(sums, inputs):
        terms, losses, correct, _ = _chunk(options, head, *inputs[:2])
        return sums + _weighted(inputs[2], terms), (losses, correct)

    inputs = (_strided(x, options.chunk) for x in (hidden, targets, weights))
    sums, (losses, correct) = jax.lax.scan(step, jnp.zeros(2, jnp.float32), tuple(inputs))
    return CrossEntropy(sums.sum(), sums[1], _whole(losses, targets), _whole(correct, targets))


def _forward(options: _Options, hidden, head, targets, weights):
    def step(carry, inputs):
        sums, d_head = carry
        hidden, targets, weights = inputs
        terms, losses, correct, slopes = _chunk(options, head, hidden, targets)
        slopes *= weights[..., None]
        d_hidden = _product("bcv,vd->bcd", slopes.astype(head.matrix.dtype), head.matrix)
        # Over one axis of tokens: over two XLA:CPU copies both factors, which takes longer than the product.
        rows = (x.reshape(-1, x.shape[-1]) for x in (slopes.astype(hidden.dtype), hidden))
        d_bias = None if head.bias is None else slopes.sum((0, 1))
        d_head = jax.tree.map(jnp.add, d_head, Unembedding(_product("nv,nd->vd", *rows), d_bias, head.soft_cap))
        return (sums + _weighted(weights, terms), d_head), (losses, correct, d_hidden.astype(hidden.dtype))

    inputs = (_strided(x, options.chunk) for x in (hidden, targets, weights))
    start = jnp.zeros(2, jnp.float32), jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), head)
    (sums, d_head), (losses, correct, d_hidden) = jax.lax.scan(step, start, tuple(inputs))
    found = CrossEntropy(sums.sum(), sums[1], _whole(losses, targets), _whole(correct, targets))
    d_head = jax.tree.map(lambda slope, leaf: slope.astype(leaf.dtype), d_head, head)
    return found, (_whole(d_hidden, targets), d_head)


def _backward(options, slopes, cotangents):
    del options
    d_hidden, d_head = jax.tree.map(lambda slope: slope * cotangents.total.astype(slope.dtype), slopes)
    return d_hidden, d_head, None, None


_scan.defvjp(_forward, _backward)


def _weighted(weights, terms):
    """`[2]`: the sums of the smoothed losses and of the z-losses."""
    return jnp.stack([jnp.sum(weights * term) for term in terms])


def _chunk(options: _Options, head: Unembedding, hidden, targets):
    """Of `[B, chunk]` tokens: (smoothed losses, z-losses), losses, hits, and slopes of the first two in the logits."""
    smoothing = options.smoothing
    logits = head.logits(hidden, "highest")
    # A comparison with iota, not a gather: it stays local where the vocabulary is sharded.
    here = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    peak = jnp.max(logits, axis=-1, keepdims=True)
    found = jnp.sum(jnp.where(here, logits, 0), axis=-1)
    exponentials = jnp.exp(logits - peak)
    mass = jnp.sum(exponentials, axis=-1, keepdims=True)
    log_mass = jnp.log(mass) + peak
    losses = log_mass[..., 0] - found
    smoothed = losses + smoothing * (found - jnp.mean(logits, axis=-1)) if smoothing else losses
    chances = exponentials / mass
    slopes = chances - (1 - smoothing) * here - smoothing / logits.shape[-1]
    if options.z_loss:
        slopes += 2 * options.z_loss * log_mass * chances
    if head.soft_cap:
        slopes *= 1 - jnp.square(logits / head.soft_cap)
    return (smoothed, options.z_loss * jnp.square(log_mass[..., 0])), losses, found >= peak[..., 0], slopes


_product = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)


def _strided(x, chunk: int):
    """`[B, T, ...]` as `[steps, B, chunk, ...]`, chunk being the sharded part of T."""
    batch, length = x.shape[:2]
    x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, chunk, -1, *x.shape[2:]), 2, 0)


def _whole(x, targets):
    """`[steps, B, chunk, ...]` as `[B, T, ...]`."""
    batch, length = targets.shape
    return jnp.moveaxis(x, 0, 2).reshape(batch, -1, *x.shape[3:])[:, :length]
