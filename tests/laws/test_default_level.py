"""The law of form as users compile: these tests leave the compiler's optimisations out (tests/conftest.py)."""

import jax
import jaxlib
from flax import nnx
from laws.cases import families, inputs, make, packed
from laws.compare import OUTPUT_TOLERANCE, close

from longctx.ops.family import definitions

DEFAULTS = {"xla_backend_optimization_level": 3}
if jaxlib.__version__.startswith("0.10."):
    DEFAULTS["xla_cpu_use_fusion_emitters"] = True
ROWS, LENGTH = ([1, 65, 14], [14, 1, 65]), 80


@families
def test_form_at_the_default_level(name):
    """Fast form = definition: outputs and state, the fast form with the compiler's default optimisations.

    Guards against what the compiler's optimisations change of a fast form.
    """
    graph, params = make(name)
    x, segments = inputs(LENGTH), packed(ROWS, LENGTH)

    def run(options):
        def forward(params, x):
            layer = nnx.merge(graph, params)
            return layer(x, segments, layer.init_state(2, LENGTH, x.dtype))

        return jax.jit(forward).lower(params, x).compile(compiler_options=options)(params, x)

    fast = run(DEFAULTS)
    with definitions():
        expected = run(None)
    close(fast, expected, OUTPUT_TOLERANCE, "output")
