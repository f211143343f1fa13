"""Operations of the matrix products of a traced program, counted as often as they run.

XLA's analysis of a compiled program counts a loop's body once. A traced program says how often its scans run. Loops
that end at run time are those of `longctx.ops.blockwise`, over pairs of blocks that the pattern and the documents
leave; they say in a named scope how many steps they take if each row is one document.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from longctx.planning.chips import OF_TPU, Passes
from longctx.planning.programs import STEPS


class Work(NamedTuple):
    """Of matrix products, on all devices together.

    Attributes:
      operations: additions and multiplications.
      passes: the same, of float32 as often as the bfloat16 products that take as long.
    """

    operations: float = 0
    passes: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> Work:
        """That of `count` runs."""
        return Work(*(count * x for x in self))


def count(jaxpr, passes: Passes = OF_TPU) -> tuple[Work, Work]:
    """Of a traced program, such as `jax.jit(f).trace(x).jaxpr`: the work outside of loops that end at run time, and in.

    `passes` are those of the chip; by default of a TPU.

    The body of a `jax.shard_map` counts on every device along the axes that it splits. Of branches the most counts,
    and a loop that does not say how many steps it takes counts for nothing.
    """
    fixed = looped = Work()
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            fixed += _product(equation, passes)
            continue
        leaves = jax.tree.leaves(list(parameters.values()))
        inner = [count(body, passes) for leaf in leaves if hasattr(body := getattr(leaf, "jaxpr", leaf), "eqns")]
        if name == "cond":
            inner = [max(inner, key=lambda both: sum(work.passes for work in both))]
        runs = parameters["length"] if name == "scan" else 1
        if name == "shard_map":
            runs = math.prod(parameters["mesh"].shape[axis] for axis in parameters["newly_manual_axes"])
        if name == "while":
            steps = STEPS.findall(str(equation.source_info.name_stack))
            runs = int(steps[-1]) if steps else 0
            inner = [(Work(), outside + inside) for outside, inside in inner]
        for outside, inside in inner:
            fixed, looped = fixed + outside.times(runs), looped + inside.times(runs)
    return fixed, looped


def _product(equation, passes: Passes) -> Work:
    """Of one `dot_general`."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, right = (variable.aval for variable in equation.invars)
    operations = 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left.shape[axis] for axis in contracted)
    precision = equation.params["precision"]
    precision = precision[0] if isinstance(precision, tuple) else precision
    full = "float32" in (left.dtype.name, right.dtype.name)
    each = getattr(passes, getattr(precision, "name", "").lower(), passes.default) if full else 1
    return Work(operations, operations * each)
