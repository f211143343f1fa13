"""Softmax attention of a span's tokens to each other, under the ambient mesh."""

from longctx.ops.attention import ATTENTION
from longctx.parallel import sequence


def attend(q, k, v, pattern, segments, decay=None, sinks=None, bias=None, **options):
    inputs = (q, decay), (k, v, decay), (sinks, bias)
    return sequence.attend(ATTENTION, *inputs, segments=segments, options=ATTENTION.options(pattern, **options)).y
