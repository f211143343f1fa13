"""Layers of transformers (PyPI, PyTorch on a CPU) with the same mathematics as ours, and how their weights map.

Each peer is a module built from a seed at a small size; biases that our layer does not have are zero.
`python tests/peers/peers.py` writes the goldens that the default suite compares with: weights, input, output and
gradients.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from recorded import Recorded

from longctx.layers import MIXERS
from longctx.typing import Segments

GOLDENS = pathlib.Path(__file__).parent / "goldens"
WIDTH, BATCH, LENGTH = 16, 2, 70  # the peers' chunks have 64 tokens


@dataclasses.dataclass(frozen=True)
class Peer:
    """A layer of ours, and how to make its peer.

    Attributes:
      kind: of our mixer.
      options: of our mixer.
      build: makes `(module, forward(x))` in PyTorch.
      weights: `weights(get)` gives our parameters by name, `get(name)` being an array of the peer (a weight, or its
        gradient).
    """

    kind: str
    options: dict
    build: Callable
    weights: Callable


def ours(peer: Peer | Recorded, weights: dict[str, np.ndarray]):
    """`f(weights, x) -> y` of our layer, and its parameters."""
    cls = MIXERS[peer.kind]
    graph, params = nnx.split(cls(WIDTH, cls.Config(**peer.options), nnx.Rngs(params=0)))
    paths, tree = jax.tree.flatten_with_path(nnx.as_pure(params))
    names = [".".join(str(key.key) for key in path) for path, _ in paths]
    assert sorted(names) == sorted(weights), f"ours {sorted(names)}, given {sorted(weights)}"
    for name, (_, leaf) in zip(names, paths, strict=True):
        assert leaf.shape == weights[name].shape, f"{name}: ours {leaf.shape}, given {weights[name].shape}"

    def run(weights, x):
        layer = nnx.merge(graph, jax.tree.unflatten(tree, [weights[name] for name in names]))
        return layer(x, Segments.single(*x.shape[:2]))[0]

    return run


def gradients(run, weights: dict, x):
    """Output, gradient by input and gradients by weights of `mix(shape) · y`."""

    @jax.jit
    def both(weights, x):
        def loss(weights, x):
            y = run(weights, x)
            return jnp.vdot(y, mix(y.shape)), y

        (_, y), (by_weights, by_x) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, x)
        return y, by_x, by_weights

    return jax.device_get(both(weights, x))


def mix(shape) -> np.ndarray:
    """Fixed coefficients of the outputs in the loss."""
    return np.sin(0.7 * np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)


def run_peer(peer: Peer) -> dict[str, np.ndarray]:
    """What a golden holds, computed by the peer."""
    import torch

    torch.manual_seed(0)
    module, forward = peer.build()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:  # norms' scales, biases and rates, off their initial values; the rest stays
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name in ZERO.get(peer.kind, ()):
                parameter.zero_()
    module.train(False)
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    y = forward(x)
    (y * torch.from_numpy(mix(y.shape))).sum().backward()
    parameters = dict(module.named_parameters())
    found = {"x": x.detach().numpy(), "y": y.detach().numpy(), "gradient of x": x.grad.numpy()}
    for name, value in peer.weights(lambda name: parameters[name].detach().numpy()).items():
        found[f"weight {name}"] = value
    for name, value in peer.weights(lambda name: parameters[name].grad.numpy()).items():
        found[f"gradient of {name}"] = value
    return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}


def compare(peer: Peer | Recorded, golden) -> dict[str, float]:
    """The largest difference between ours and the golden, relative to the largest entry, by array."""
    weights = {name.removeprefix("weight "): golden[name] for name in golden if name.startswith("weight ")}
    y, by_x, by_weights = gradients(ours(peer, weights), weights, golden["x"])
    actual = {"y": y, "gradient of x": by_x} | {f"gradient of {name}": value for name, value in by_weights.items()}
    return {
        name: float(np.abs(value - golden[name]).max() / max(np.abs(golden[name]).max(), 1e-6))
        for name, value in actual.items()
    }


def _linear(get, ours: str, theirs: str) -> dict[str, np.ndarray]:
    """A projection: PyTorch keeps `[outputs, inputs]`."""
    return {f"{ours}.weight": get(f"{theirs}.weight").T}


def _conv(get, theirs: str) -> np.ndarray:
    """Taps `[W, channels]` of a depthwise convolution."""
    return get(f"{theirs}.weight")[:, 0].T


def _qwen3_next():
    from transformers.models.qwen3_next import modeling_qwen3_next as peer

    config = peer.Qwen3NextConfig(
        hidden_size=WIDTH, num_hidden_layers=1, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=4, linear_conv_kernel_dim=4, layer_types=["linear_attention"],
    )  # fmt: skip
    module = peer.Qwen3NextGatedDeltaNet(config, 0)
    return module, lambda x: module(x)


def _qwen3_next_weights(get):
    heads, key, value = 2, 8, 4
    mixed = get("in_proj_qkvz.weight").reshape(heads, 2 * key + 2 * value, WIDTH)
    query, keys, values, gate = np.split(mixed, [key, 2 * key, 2 * key + value], axis=1)
    beta, step = np.split(get("in_proj_ba.weight").reshape(heads, 2, WIDTH), 2, axis=1)
    parts = {"query": query, "key": keys, "value": values, "gate": gate, "beta": beta, "step": step}
    found = {f"{name}.weight": part.reshape(-1, WIDTH).T for name, part in parts.items()}
    return found | {
        "conv.kernel": _conv(get, "conv1d"),
        "log_rate": get("A_log"),
        "step_bias": get("dt_bias"),
        "norm.scale": get("norm.weight"),
        **_linear(get, "out", "out_proj"),
    }


def _recurrent_gemma():
    import torch
    from transformers.models.recurrent_gemma import modeling_recurrent_gemma as peer

    config = peer.RecurrentGemmaConfig(
        hidden_size=WIDTH, num_hidden_layers=1, lru_width=24, num_attention_heads=4, conv1d_width=4
    )
    module = peer.RecurrentGemmaRecurrentBlock(config, 0)
    for name in ("input_gate_weight", "recurrent_gate_weight", "input_gate_bias", "recurrent_gate_bias"):
        torch.nn.init.normal_(getattr(module.rg_lru, name), std=0.5)
    torch.nn.init.normal_(module.rg_lru.recurrent_param, mean=-4.0)

    def forward(x):
        positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
        return module(x, positions, None, use_cache=False)[0]

    return module, forward


def _recurrent_gemma_weights(get):
    return {
        **_linear(get, "branch", "linear_x"),
        **_linear(get, "gate", "linear_y"),
        **_linear(get, "out", "linear_out"),
        "conv.kernel": _conv(get, "conv_1d"),
        "rate": get("rg_lru.recurrent_param"),
        "recurrence_gate": get("rg_lru.recurrent_gate_weight"),
        "recurrence_bias": get("rg_lru.recurrent_gate_bias").reshape(-1),
        "input_gate": get("rg_lru.input_gate_weight"),
        "input_bias": get("rg_lru.input_gate_bias").reshape(-1),
    }


def _olmo_hybrid():
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid as peer

    config = peer.OlmoHybridConfig(
        hidden_size=WIDTH, num_hidden_layers=2, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=4, linear_conv_kernel_dim=4, linear_allow_neg_eigval=True,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    module = peer.OlmoHybridGatedDeltaNet(config, 0)
    module.o_norm.variance_epsilon = 1e-6  # ours
    return module, module


def _olmo_hybrid_weights(get):
    names = {"query": "q", "key": "k", "value": "v", "gate": "g", "beta": "b", "step": "a", "out": "o"}
    found = {}
    for ours, theirs in names.items():
        found |= _linear(get, ours, f"{theirs}_proj")
    return found | {
        "conv.kernel": _conv(get, "conv1d"),
        "log_rate": get("A_log"),
        "step_bias": get("dt_bias"),
        "norm.scale": get("o_norm.weight"),
    }


def _kimi_linear():
    import torch
    from transformers.models.kimi_linear import modeling_kimi_linear as peer

    config = peer.KimiLinearConfig(
        hidden_size=WIDTH, num_hidden_layers=1, linear_num_heads=2, linear_head_dim=8, linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6, layer_types=["linear_attention"],
    )  # fmt: skip
    module = peer.KimiLinearDeltaAttention(config, 0)
    torch.nn.init.normal_(module.forget_gate.A_log, std=0.5)
    torch.nn.init.normal_(module.forget_gate.dt_bias, mean=-2.0)
    return module, module


def _kimi_linear_weights(get):
    found = {}
    for ours, theirs in {
        "query": "q_proj", "key": "k_proj", "value": "v_proj", "beta": "b_proj", "out": "o_proj",
        "step_in": "forget_gate.f_a_proj", "step_out": "forget_gate.f_b_proj", "gate_in": "g_a_proj",
        "gate_out": "g_b_proj",
    }.items():  # fmt: skip
        found |= _linear(get, ours, theirs)
    return found | {
        "conv.kernel": _conv(get, "conv1d"),
        "log_rate": get("forget_gate.A_log").reshape(-1),
        "step_bias": get("forget_gate.dt_bias"),
        "norm.scale": get("o_norm.weight"),
    }


def _mamba():
    from transformers.models.mamba import modeling_mamba as peer

    config = peer.MambaConfig(
        hidden_size=WIDTH, num_hidden_layers=1, state_size=8, expand=2, conv_kernel=4, time_step_rank=4
    )
    module = peer.MambaMixer(config, 0)
    return module, module


def _mamba_weights(get):
    values, gate = np.split(get("in_proj.weight").T, 2, axis=1)
    return {
        "input.weight": values,
        "gate.weight": gate,
        "conv.kernel": _conv(get, "conv1d"),
        "conv_bias": get("conv1d.bias"),
        "select.weight": get("x_proj.weight").T,
        "step.weight": get("dt_proj.weight").T,
        "step_bias": get("dt_proj.bias"),
        "log_rate": get("A_log"),
        "skip": get("D"),
        **_linear(get, "out", "out_proj"),
    }


_MAMBA2 = {"heads": 4, "groups": 2, "key_width": 8, "value_width": 8}


def _mamba2():
    from transformers.models.mamba2 import modeling_mamba2 as peer

    config = peer.Mamba2Config(
        hidden_size=WIDTH, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=8, n_groups=2, expand=2,
        conv_kernel=4, chunk_size=64,
    )  # fmt: skip
    module = peer.Mamba2Mixer(config, 0)
    return module, module


def _mamba2_weights(get):
    keys, values = 2 * 8, 4 * 8
    ends = np.cumsum([values, values, keys, keys])
    gate, value, key, query, step = np.split(get("in_proj.weight").T, ends, axis=1)
    parts = {"gate": gate, "value": value, "key": key, "query": query, "step": step}
    return {f"{name}.weight": part for name, part in parts.items()} | {
        "conv.kernel": _conv(get, "conv1d"),
        "conv_bias": get("conv1d.bias"),
        "step_bias": get("dt_bias"),
        "log_rate": get("A_log"),
        "skip": get("D"),
        "norm_scale": get("norm.weight"),
        **_linear(get, "out", "out_proj"),
    }


def _xlstm():
    from transformers.models.xlstm import configuration_xlstm
    from transformers.models.xlstm import modeling_xlstm as peer

    config = configuration_xlstm.xLSTMConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_heads=2, qk_dim_factor=0.5, v_dim_factor=1.0,
        mode="inference", autocast_kernel_dtype="float32",
    )  # fmt: skip
    module = peer.xLSTMLayer(config)
    return module, lambda x: module(x)[0]


def _xlstm_weights(get):
    found = {}
    for ours, theirs in {
        "query": "q", "key": "k", "value": "v", "output_gate": "ogate_preact", "input_gate": "igate_preact",
        "forget_gate": "fgate_preact", "out": "out_proj",
    }.items():  # fmt: skip
        found |= _linear(get, ours, theirs)
    return found | {
        "input_gate.bias": get("igate_preact.bias"),
        "forget_gate.bias": get("fgate_preact.bias"),
        "norm_scale": get("multihead_norm.weight"),
    }


# The peers' biases that our layers do not have.
ZERO = {"rglru": ("linear_x.bias", "linear_y.bias", "linear_out.bias", "conv_1d.bias")}

_DELTA = {"heads": 2, "key_width": 8, "value_width": 4}

PEERS = {
    "kimi_linear": Peer(
        "kda", {"heads": 2, "key_width": 8, "value_width": 8, "rank": 8}, _kimi_linear, _kimi_linear_weights
    ),
    "mamba": Peer("mamba", {"inner": 32, "state": 8, "step_rank": 4}, _mamba, _mamba_weights),
    "mamba2": Peer("mamba2", _MAMBA2, _mamba2, _mamba2_weights),
    "olmo_hybrid": Peer("gated_delta", _DELTA | {"negative_eigenvalues": True}, _olmo_hybrid, _olmo_hybrid_weights),
    "qwen3_next": Peer("gated_delta", _DELTA, _qwen3_next, _qwen3_next_weights),
    "recurrent_gemma": Peer("rglru", {"hidden": 24, "heads": 4}, _recurrent_gemma, _recurrent_gemma_weights),
    "xlstm": Peer("mlstm", {"heads": 2, "key_width": 4, "value_width": 8}, _xlstm, _xlstm_weights),
}


if __name__ == "__main__":
    GOLDENS.mkdir(exist_ok=True)
    for name, peer in PEERS.items():
        golden = run_peer(peer)
        np.savez_compressed(GOLDENS / f"{name}.npz", **golden)
        print(name, {what: f"{error:.1e}" for what, error in compare(peer, golden).items()})
