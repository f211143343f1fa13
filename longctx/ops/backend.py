"""The platform that a program is traced for, and the forms that XLA:CPU needs where the plain ones are slow.

The platform is that of the ambient mesh's devices, which need not be this machine's. Accelerators get the plain forms.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_EXACT = jax.lax.Precision.HIGHEST


def platform() -> str:
    """ "cpu", "gpu" or "tpu": what the devices of `jax.set_mesh` are; without a mesh, JAX's default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def scaled(x: Float[Array, "... D"], scale: Float[Array, " D"]) -> Float[Array, "... D"]:
    """`x · scale`, float32.

    On a CPU a matrix product spreads the scale over the tokens, so that the scale's gradient is a product too, in a
    quarter of the time of sums over tokens. The backward pass spreads it again.
    """
    return _spread(x, scale) if platform() == "cpu" else x * scale


@jax.checkpoint
def _spread(x, scale):
    tokens = merged(x)
    ones = jnp.ones((*tokens.shape[:-1], 1))
    return (tokens * jnp.matmul(ones, scale[None], precision=_EXACT)).reshape(x.shape)


def merged(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """On a CPU `[N, D]`, all axes but the last as one, unless the compiler splits the time over devices.

    The gradient of a weight is a sum over tokens: over one axis it is a plain matrix product, over two XLA:CPU copies
    both factors first, which takes longer than the product.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = "context" not in mesh.manual_axes and mesh.shape.get("context", 1) > 1
    return x if split or platform() != "cpu" else x.reshape(-1, x.shape[-1])


def once(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """`x`, float32, on a CPU times the identity: what uses it then reads it, and does not compute it again."""
    return jnp.matmul(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision=_EXACT) if platform() == "cpu" else x


def apart(true: Bool[Array, ""], write: Callable, held):
    """`write(held)`; on a CPU in a branch that is taken because of `true`, which the compiler must not know to be.

    XLA:CPU fuses the write of one slot into the product that reads all of them and does it there again, each time in a
    copy of the whole. A branch it leaves where it is, and writes in place.
    """
    return jax.lax.cond(true, write, lambda held: held, held) if platform() == "cpu" else write(held)
