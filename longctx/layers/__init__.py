"""Flax NNX modules: parameters, projections, and a call into `longctx.ops` by way of `longctx.parallel`.

`MIXERS`, `MLPS` and `NORMS` are the registries that experiment files name; the laws run over the first two. A mixer is

    mixer = Mixer(width, options: Mixer.Config, rngs)
    y, state = mixer(x[B, T, D], segments=None, state=None)
    state = mixer.init_state(batch, capacity, dtype)

where no segments are one document, and so is an MLP: most have no state, and return None for it.
"""

from longctx.config import MLP, Mixer, Norm
from longctx.layers.adaptive_span import AdaptiveSpan
from longctx.layers.attention import Attention
from longctx.layers.basic import LayerNorm, RMSNorm
from longctx.layers.block_recurrent import BlockRecurrent
from longctx.layers.delta_net import DeltaNet
from longctx.layers.forgetting import Forgetting
from longctx.layers.gated_delta import GatedDelta
from longctx.layers.gated_delta_product import GatedDeltaProduct
from longctx.layers.gla import GLA
from longctx.layers.h_transformer import HTransformer
from longctx.layers.hgrn2 import HGRN2
from longctx.layers.indexer_topk import IndexerTopK
from longctx.layers.infini import Infini
from longctx.layers.inplace_ttt import InPlaceTTT
from longctx.layers.kda import KDA
from longctx.layers.lact import LaCT
from longctx.layers.linear_attention import LinearAttention
from longctx.layers.log_linear_gated_delta import LogLinearGatedDelta
from longctx.layers.log_linear_mamba2 import LogLinearMamba2
from longctx.layers.lru import LRU
from longctx.layers.lsh import LSH
from longctx.layers.mamba import Mamba
from longctx.layers.mamba2 import Mamba2
from longctx.layers.mlp import GELU, GeGLU, SquaredReLU, SwiGLU
from longctx.layers.mlstm import MLSTM
from longctx.layers.moba import MoBA
from longctx.layers.multi_resolution import MultiResolution
from longctx.layers.nsa import NSA
from longctx.layers.path import Path
from longctx.layers.pyramid import Pyramid
from longctx.layers.retnet import RetNet
from longctx.layers.rglru import RGLRU
from longctx.layers.rwkv7 import RWKV7
from longctx.layers.s5 import S5
from longctx.layers.slstm import SLSTM
from longctx.layers.titans import Titans
from longctx.layers.titans_context import TitansContext
from longctx.layers.ttt_linear import TTTLinear
from longctx.schema import Kinds

MIXERS = Kinds(
    {
        "adaptive_span": AdaptiveSpan,
        "attention": Attention,
        "block_recurrent": BlockRecurrent,
        "delta_net": DeltaNet,
        "forgetting": Forgetting,
        "gated_delta": GatedDelta,
        "gated_delta_product": GatedDeltaProduct,
        "gla": GLA,
        "h_transformer": HTransformer,
        "hgrn2": HGRN2,
        "indexer_topk": IndexerTopK,
        "infini": Infini,
        "kda": KDA,
        "lact": LaCT,
        "linear_attention": LinearAttention,
        "log_linear_gated_delta": LogLinearGatedDelta,
        "log_linear_mamba2": LogLinearMamba2,
        "lru": LRU,
        "lsh": LSH,
        "mamba": Mamba,
        "mamba2": Mamba2,
        "mlstm": MLSTM,
        "moba": MoBA,
        "multi_resolution": MultiResolution,
        "nsa": NSA,
        "path": Path,
        "pyramid": Pyramid,
        "retnet": RetNet,
        "rglru": RGLRU,
        "rwkv7": RWKV7,
        "s5": S5,
        "slstm": SLSTM,
        "titans": Titans,
        "titans_context": TitansContext,
        "ttt_linear": TTTLinear,
    }
)

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
