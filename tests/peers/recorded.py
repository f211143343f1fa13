"""Layers of ours beside programs that tests do not run: the goldens hold what these gave, by hand and once."""

from __future__ import annotations

import dataclasses

from longctx.layers.position_schemes import CoPE
from longctx.layers.positions import NoPositions


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A layer of ours, and what it is compared with.

    Attributes:
      kind: of our mixer.
      options: of our mixer.
      source: the program; its ε are ours, where they would show.
    """

    kind: str
    options: dict
    source: str


_BLOCKS = {"heads": 2, "head_width": 8, "block": 8, "vectors": 3, "positions": NoPositions()}
_LACT = {"heads": 4, "head_width": 4, "fast_width": 8, "hidden": 8, "minibatch": 12, "window": 12}
_SMALL = {"heads": 2, "key_width": 8, "value_width": 6}
# Written again in plain PyTorch with its naive recurrences, since its own are kernels for GPUs.
_FLA = "github.com/fla-org/flash-linear-attention, fla/layers"

RECORDED = {
    "block_recurrent": Recorded("block_recurrent", _BLOCKS, "github.com/google-research/meliad"),
    "block_recurrent_lstm": Recorded(
        "block_recurrent", _BLOCKS | {"gate": "lstm"}, "github.com/google-research/meliad"
    ),
    "cope": Recorded(
        "attention",
        {"heads": 2, "kv_heads": 2, "head_width": 8, "qk_norm": False, "positions": CoPE(max_position=9)},
        "github.com/facebookresearch/RAM, projects/cope, with --cope-nodiv",
    ),
    "delta_net": Recorded("delta_net", _SMALL, f"{_FLA}/delta_net.py"),
    "forgetting": Recorded(
        "forgetting",
        {"heads": 2, "kv_heads": 2, "head_width": 8},
        "github.com/zhixuan-lin/forgetting-transformer, its Pro layer; its Triton kernels as plain PyTorch",
    ),
    "gated_delta_product": Recorded("gated_delta_product", _SMALL, f"{_FLA}/gated_deltaproduct.py"),
    "gla": Recorded("gla", _SMALL | {"gate_rank": 4}, f"{_FLA}/gla.py"),
    "hedgehog": Recorded("linear_attention", _SMALL | {"feature_map": "hedgehog"}, "github.com/HazyResearch/lolcats"),
    "hgrn2": Recorded("hgrn2", _SMALL, f"{_FLA}/hgrn2.py"),
    "indexer": Recorded(
        "indexer_topk",
        {"heads": 2, "kv_heads": 2, "head_width": 8, "qk_norm": False, "index_heads": 16, "index_width": 8}
        | {"count": 8, "kl_weight": 0.0},
        "transformers' indexer of deepseek_v32, its queries made of x, and softmax attention to what it chooses",
    ),
    "kda": Recorded(
        "kda", {"heads": 2, "key_width": 8, "value_width": 8, "rank": 8, "gate_bias": True}, f"{_FLA}/kda.py"
    ),
    "lact": Recorded("lact", _LACT | {"rank": 3}, "github.com/a1600012888/LaCT"),
    "lact_muon": Recorded(
        "lact", _LACT | {"rank": 0, "orthogonal": True, "minibatch": 24}, "github.com/a1600012888/LaCT"
    ),
    "log_linear_mamba2": Recorded("log_linear_mamba2", _SMALL | {"levels": 7}, f"{_FLA}/log_linear_mamba2.py"),
    "path": Recorded("path", {"heads": 2, "head_width": 8, "rank": 4}, f"{_FLA}/path_attn.py"),
    "reformer": Recorded(
        "lsh",
        {"heads": 2, "head_width": 8, "rounds": 1, "buckets": 2, "positions": NoPositions(), "scale": 1.0}
        | {"centroid_weight": 1e-30},  # equal centroids put all tokens into one bucket
        "transformers' LSH self-attention of reformer, on a row that is one chunk",
    ),
    "retnet": Recorded("retnet", _SMALL, "github.com/microsoft/torchscale, its parallel form"),
    "rwkv7": Recorded(
        "rwkv7",
        {"heads": 2, "key_width": 64, "value_width": 64, "rank": 3},
        "github.com/BlinkDL/RWKV-LM, rwkv_v7_numpy.py; gradients by the same in PyTorch",
    ),
    "slstm": Recorded("slstm", {"heads": 2, "head_width": 8}, "github.com/NX-AI/xlstm, its plain backend"),
    "ttt_linear": Recorded(
        "ttt_linear", {"heads": 2, "head_width": 8, "minibatch": 8}, "github.com/test-time-training/ttt-lm-pytorch"
    ),
}
