"""Flax NNX modules: parameters, projections, and a call into `longctx.ops` by way of `longctx.parallel`.

`MIXERS`, `MLPS` and `NORMS` are the registries that experiment files name; the laws run over the first two. A mixer is

    mixer = Mixer(width, options: Mixer.Config, rngs)
    y, state = mixer(x[B, T, D], segments=None, state=None)
    state = mixer.init_state(batch, capacity, dtype)

where no segments are one document, and so is an MLP: most have no state, and return None for it.
"""

import importlib

from longctx.architecture import MLP, Mixer, Norm
from longctx.layers import position_schemes as position_schemes
from longctx.layers.basic import LayerNorm, RMSNorm
from longctx.layers.inplace_ttt import InPlaceTTT
from longctx.layers.mlp import GELU, GeGLU, SquaredReLU, SwiGLU
from longctx.schema import Kinds

# A kind is the name of its module, and this is its class there.
_CLASSES = {
    "adaptive_span": "AdaptiveSpan",
    "attention": "Attention",
    "block_recurrent": "BlockRecurrent",
    "delta_net": "DeltaNet",
    "forgetting": "Forgetting",
    "gated_delta": "GatedDelta",
    "gated_delta_product": "GatedDeltaProduct",
    "gla": "GLA",
    "h_transformer": "HTransformer",
    "hgrn2": "HGRN2",
    "indexer_topk": "IndexerTopK",
    "infini": "Infini",
    "kda": "KDA",
    "lact": "LaCT",
    "linear_attention": "LinearAttention",
    "log_linear_gated_delta": "LogLinearGatedDelta",
    "log_linear_mamba2": "LogLinearMamba2",
    "lru": "LRU",
    "lsh": "LSH",
    "mamba": "Mamba",
    "mamba2": "Mamba2",
    "mlstm": "MLSTM",
    "moba": "MoBA",
    "multi_resolution": "MultiResolution",
    "nsa": "NSA",
    "path": "Path",
    "pyramid": "Pyramid",
    "retnet": "RetNet",
    "rglru": "RGLRU",
    "rwkv7": "RWKV7",
    "s5": "S5",
    "slstm": "SLSTM",
    "titans": "Titans",
    "titans_context": "TitansContext",
    "ttt_linear": "TTTLinear",
}
MIXERS = Kinds({kind: getattr(importlib.import_module(f"{__name__}.{kind}"), name) for kind, name in _CLASSES.items()})

MLPS = Kinds(
    {
        "geglu": GeGLU,
        "gelu": GELU,
        "inplace_ttt": InPlaceTTT,
        "relu2": SquaredReLU,
        "swiglu": SwiGLU,
    }
)

NORMS = {"layer": LayerNorm, "rms": RMSNorm}

Mixer.kinds, MLP.kinds, Norm.kinds = MIXERS, MLPS, NORMS
