"""Flax NNX modules: parameters, projections, and a call into `longctx.ops` by way of `longctx.parallel`.

`MIXERS` and `MLPS` are the registries that experiment files name and that the laws run over. A mixer is

    mixer = Mixer(width, options: Mixer.Config, rngs)
    y, state = mixer(x[B, T, D], segments, state=None)
    state = mixer.init_state(batch, capacity, dtype)

and so is an MLP: most have no state, and return None for it.
"""

from longctx.layers.attention import Attention
from longctx.layers.delta_net import DeltaNet
from longctx.layers.block_recurrent import BlockRecurrent
from longctx.layers.forgetting import Forgetting
from longctx.layers.gated_delta import GatedDelta
from longctx.layers.gla import GLA
from longctx.layers.lru import LRU
from longctx.layers.hgrn2 import HGRN2
from longctx.layers.linear_attention import LinearAttention
from longctx.layers.inplace_ttt import InPlaceTTT
from longctx.layers.lact import LaCT
from longctx.layers.mamba import Mamba
from longctx.layers.mamba2 import Mamba2
from longctx.layers.mlp import SquaredReLU, SwiGLU
from longctx.layers.mlstm import MLSTM
from longctx.layers.retnet import RetNet
from longctx.layers.infini import Infini
from longctx.layers.mlp import SquaredReLU, SwiGLU
from longctx.layers.path import Path
from longctx.layers.rglru import RGLRU
from longctx.layers.s5 import S5
from longctx.layers.titans import Titans
from longctx.layers.ttt_linear import TTTLinear
from longctx.layers.slstm import SLSTM

MIXERS: dict[str, type] = {
    "attention": Attention,
    "block_recurrent": BlockRecurrent,
    "forgetting": Forgetting,
    "delta_net": DeltaNet,
    "gated_delta": GatedDelta,
    "gla": GLA,
    "lru": LRU,
    "hgrn2": HGRN2,
    "linear_attention": LinearAttention,
    "mamba2": Mamba2,
    "mlstm": MLSTM,
    "retnet": RetNet,
    "infini": Infini,
    "path": Path,
    "rglru": RGLRU,
    "s5": S5,
    "lact": LaCT,
    "rglru": RGLRU,
    "titans": Titans,
    "ttt_linear": TTTLinear,
    "mamba": Mamba,
    "rglru": RGLRU,
    "s5": S5,
    "slstm": SLSTM,
}

MLPS: dict[str, type] = {
    "inplace_ttt": InPlaceTTT,
    "relu2": SquaredReLU,
    "swiglu": SwiGLU,
}
