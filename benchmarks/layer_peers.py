"""Layers of transformers (PyTorch on a CPU) next to which `benchmarks/layers.py` measures ours, at equal sizes.

With the same weights the two sides compute the same: tests/peers proves it of the recurrent ones, but for MiniMax's,
which is retention without rotary positions and with SiLU on queries, keys and values. A peer takes the fastest path
that transformers has on a CPU without further packages, and `path` says which that is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

WIDTH, HEADS, HEAD_WIDTH = 256, 4, 64


@dataclasses.dataclass(frozen=True)
class Peer:
    """A layer of transformers at the benchmark's size.

    Attributes:
      name: whose layer it is.
      layer: ours.
      build: `build(length)` makes the module and `call(x[1, length, WIDTH]) -> y`.
      path: how the peer works through the tokens.
      options: of our layer, besides the benchmark's sizes, so that both sides have the same.
      extra: parameters that only the peer has.
    """

    name: str
    layer: str
    build: Callable
    path: str
    options: dict = dataclasses.field(default_factory=dict)
    extra: int = 0


def _qwen3(length: int):
    import torch
    from transformers.models.qwen3 import modeling_qwen3 as peer

    config = peer.Qwen3Config(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        head_dim=HEAD_WIDTH, attn_implementation="sdpa",
    )  # fmt: skip
    module = peer.Qwen3Attention(config, 0)
    turns = peer.Qwen3RotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    return module, lambda x: module(x, turns, None)[0]


def _qwen3_next(length: int):
    from transformers.models.qwen3_next import modeling_qwen3_next as peer

    config = peer.Qwen3NextConfig(
        hidden_size=WIDTH, num_hidden_layers=1, linear_num_value_heads=HEADS, linear_num_key_heads=HEADS,
        linear_key_head_dim=HEAD_WIDTH, linear_value_head_dim=HEAD_WIDTH, linear_conv_kernel_dim=4,
        layer_types=["linear_attention"],
    )  # fmt: skip
    module = peer.Qwen3NextGatedDeltaNet(config, 0)
    return module, module


def _olmo_hybrid(length: int):
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid as peer

    config = peer.OlmoHybridConfig(
        hidden_size=WIDTH, num_hidden_layers=2, linear_num_value_heads=HEADS, linear_num_key_heads=HEADS,
        linear_key_head_dim=HEAD_WIDTH, linear_value_head_dim=HEAD_WIDTH, linear_conv_kernel_dim=4,
        linear_allow_neg_eigval=True, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    module = peer.OlmoHybridGatedDeltaNet(config, 0)
    return module, module


def _kimi_linear(length: int):
    from transformers.models.kimi_linear import modeling_kimi_linear as peer

    config = peer.KimiLinearConfig(
        hidden_size=WIDTH, num_hidden_layers=1, linear_num_heads=HEADS, linear_head_dim=HEAD_WIDTH,
        linear_conv_kernel_dim=4, layer_types=["linear_attention"],
    )  # fmt: skip
    module = peer.KimiLinearDeltaAttention(config, 0)
    return module, module


def _mamba(length: int):
    from transformers.models.mamba import modeling_mamba as peer

    config = peer.MambaConfig(
        hidden_size=WIDTH, num_hidden_layers=1, state_size=16, expand=2, conv_kernel=4, time_step_rank=16
    )
    module = peer.MambaMixer(config, 0)
    return module, module


def _mamba2(length: int):
    from transformers.models.mamba2 import modeling_mamba2 as peer

    config = peer.Mamba2Config(
        hidden_size=WIDTH, num_hidden_layers=1, expand=2, num_heads=8, head_dim=HEAD_WIDTH, state_size=128, n_groups=1,
        conv_kernel=4, chunk_size=CHUNK,
    )  # fmt: skip
    module = peer.Mamba2Mixer(config, 0)
    return module, module


def _xlstm(length: int):
    from transformers.models.xlstm import configuration_xlstm
    from transformers.models.xlstm import modeling_xlstm as peer

    config = configuration_xlstm.xLSTMConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_heads=HEADS, qk_dim_factor=0.5, v_dim_factor=1.0, mode="train",
        chunk_size=CHUNK, autocast_kernel_dtype="float32",
    )  # fmt: skip
    module = peer.xLSTMLayer(config)
    return module, lambda x: module(x)[0]


def _minimax(length: int):
    from transformers.models.minimax import modeling_minimax as peer

    config = peer.MiniMaxConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, head_dim=HEAD_WIDTH, block_size=CHUNK,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    module = peer.MiniMaxLightningAttention(config, 0)
    return module, lambda x: module(x, None, None)[0]


def _recurrent_gemma(length: int):
    import torch
    from transformers.models.recurrent_gemma import modeling_recurrent_gemma as peer

    config = peer.RecurrentGemmaConfig(
        hidden_size=WIDTH, num_hidden_layers=1, lru_width=WIDTH, num_attention_heads=HEADS, conv1d_width=4
    )
    module = peer.RecurrentGemmaRecurrentBlock(config, 0)
    positions = torch.arange(length)[None]

    def call(x):
        module.rg_lru.recurrent_states = None  # which the module keeps from call to call
        return module(x, positions, None, use_cache=False)[0]

    return module, call


def _llama_mlp(length: int):
    from transformers.models.llama import modeling_llama as peer

    module = peer.LlamaMLP(peer.LlamaConfig(hidden_size=WIDTH, intermediate_size=2 * WIDTH))
    return module, module


def _nemotron_mlp(length: int):
    from transformers.models.nemotron import modeling_nemotron as peer

    module = peer.NemotronMLP(peer.NemotronConfig(hidden_size=WIDTH, intermediate_size=2 * WIDTH))
    return module, module


CHUNK = 64
_CHUNKS = f"chunks of {CHUNK}"
_TOKENS = "token by token"

PEERS = {
    peer.name: peer
    for peer in (
        Peer("Qwen3", "attention", _qwen3, "fused SDPA"),
        Peer("Qwen3-Next", "gated_delta", _qwen3_next, _CHUNKS),
        Peer("OLMo Hybrid", "gated_delta", _olmo_hybrid, _CHUNKS, {"negative_eigenvalues": True}),
        Peer("Kimi Linear", "kda", _kimi_linear, _CHUNKS, {"rank": HEAD_WIDTH}),
        Peer("Mamba", "mamba", _mamba, _TOKENS, {"inner": 2 * WIDTH, "state": 16, "step_rank": 16}),
        Peer("Mamba-2", "mamba2", _mamba2, _CHUNKS, {"heads": 8, "key_width": 128}),
        Peer("xLSTM 7B", "mlstm", _xlstm, _CHUNKS, {"key_width": HEAD_WIDTH // 2}),
        Peer("MiniMax-01", "retnet", _minimax, _CHUNKS, extra=WIDTH - HEAD_WIDTH),  # its norm is not shared by heads
        Peer("RecurrentGemma", "rglru", _recurrent_gemma, _TOKENS, extra=4 * WIDTH),  # biases
        Peer("Llama", "swiglu", _llama_mlp, "whole row"),
        Peer("Nemotron", "relu2", _nemotron_mlp, "whole row"),
    )
}
