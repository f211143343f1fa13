"""Rotary frequencies, rotation and biases against transformers', in float32.

The stored golden is compared in every run. With the extra `bench` installed transformers runs as well, and the golden
must still be what it gives. `python tests/peers/test_rotary.py` writes the golden.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from longctx.ops import positions, rotary

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "rotary.json"
WIDTH, BASE, TRAINED = 64, 10_000.0, 4096
EXTENDED = (WIDTH, BASE, 8.0, TRAINED)
SHORT = [1 + j / 50 for j in range(WIDTH // 2)]
LONG = [1 + j * j / 50 for j in range(WIDTH // 2)]
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": TRAINED}
DYNAMIC = {"rope_type": "dynamic", "factor": 8.0}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = YARN | {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}

# Our rotation, and transformers' parameters and length.
SCHEMES = {
    "default": (positions.rope(WIDTH, BASE), {"rope_type": "default"}, None),
    "linear": (positions.linear(WIDTH, BASE, 8.0), {"rope_type": "linear", "factor": 8.0}, None),
    "linear, partial": (
        positions.linear(WIDTH // 4, BASE, 8.0),
        {"rope_type": "linear", "factor": 8.0, "partial_rotary_factor": 0.25},
        None,
    ),
    "dynamic, short": (positions.dynamic_ntk(*EXTENDED, 1000), DYNAMIC, 1000),
    "dynamic, long": (positions.dynamic_ntk(*EXTENDED, 20_000), DYNAMIC, 20_000),
    "yarn": (positions.yarn(*EXTENDED), YARN, None),
    "yarn, other bounds": (positions.yarn(*EXTENDED, 16, 2), YARN | {"beta_fast": 16, "beta_slow": 2}, None),
    "yarn, not truncated": (positions.yarn(*EXTENDED, truncate=False), YARN | {"truncate": False}, None),
    "yarn, magnitude": (positions.yarn(*EXTENDED, magnitude=1.5), YARN | {"attention_factor": 1.5}, None),
    "yarn, mscale": (
        positions.yarn(*EXTENDED, magnitude=positions.yarn_magnitude(8, 0.7) / positions.yarn_magnitude(8, 1.2)),
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
        None,
    ),
    "llama3": (positions.llama3(*EXTENDED), LLAMA3, None),
    "longrope, short": (positions.longrope(*EXTENDED, TRAINED, SHORT, LONG), LONGROPE, TRAINED),
    "longrope, long": (positions.longrope(*EXTENDED, TRAINED + 1, SHORT, LONG), LONGROPE, TRAINED + 1),
}
X = np.sin(0.7 * np.arange(2 * 3 * 2 * WIDTH, dtype=np.float32)).reshape(2, 3, 2, WIDTH)
PLACES = np.array([[0, 1, 2], [17, 3, 20]], np.int32)
DISTANCE = np.arange(-200, 200)
HEADS = (1, 8, 12, 20)


def ours() -> dict[str, np.ndarray]:
    """What the golden holds, computed by us."""
    found = {name: np.append(rotation.frequencies, rotation.magnitude) for name, (rotation, _, _) in SCHEMES.items()}
    found["rotate"] = rotary.rotate(jnp.asarray(X), jnp.asarray(PLACES), SCHEMES["yarn"][0]).ravel()
    for causal in (True, False):
        found[f"t5, causal={causal}"] = positions.t5_buckets(jnp.asarray(DISTANCE), causal=causal)
    for heads in HEADS:
        found[f"alibi, {heads} heads"] = positions.alibi_slopes(heads)
    return found


def theirs() -> dict[str, np.ndarray]:
    """What the golden holds, computed by transformers: for a scheme its frequencies, and last its magnitude."""
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
    from transformers.models.t5.modeling_t5 import T5Attention

    schemes = ROPE_INIT_FUNCTIONS | {"default": LlamaRotaryEmbedding.compute_default_rope_parameters}
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 1, "max_position_embeddings": TRAINED}
    found = {}
    for name, (_, parameters, length) in SCHEMES.items():
        config = LlamaConfig(**sizes, rope_parameters={"rope_theta": BASE} | parameters)
        frequencies, magnitude = schemes[parameters["rope_type"]](config, device="cpu", seq_len=length)
        found[name] = np.append(frequencies.numpy(), np.float32(magnitude))
    x = torch.from_numpy(X)
    module = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters={"rope_theta": BASE} | YARN))
    cos, sin = module(x, torch.from_numpy(PLACES))
    found["rotate"] = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)[0].numpy().ravel()
    for causal in (True, False):
        # Their relative position is that of the key less that of the query.
        buckets = T5Attention._relative_position_bucket(torch.from_numpy(-DISTANCE), bidirectional=not causal)
        found[f"t5, causal={causal}"] = buckets.numpy()
    for heads in HEADS:
        bias = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
        found[f"alibi, {heads} heads"] = bias[:, 0, 1].numpy()  # of the key at position 1: slope times 1
    return found


def test_golden():
    """Ours = the stored results of transformers, to 1e-6 of each number.

    Seen to fail: s for 1/s in ntk; yarn's weights a pair later; long for short; neighbouring channels as pairs; no
    magnitude; distances of the other sign; ALiBi's second, fourth, ... slopes of the next power of 2.
    """
    golden, found = json.loads(GOLDEN.read_text()), ours()
    assert golden.keys() == found.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, golden[name], rtol=1e-6, atol=1e-6 * (name == "rotate"), err_msg=name)


def test_peer():
    """The stored results = what transformers gives here and now."""
    pytest.importorskip("torch", reason="needs the extra 'bench'")
    pytest.importorskip("transformers", reason="needs the extra 'bench'")
    golden, again = json.loads(GOLDEN.read_text()), theirs()
    assert golden.keys() == again.keys()
    for name, value in again.items():
        np.testing.assert_allclose(golden[name], value, rtol=1e-6, atol=1e-6 * (name == "rotate"), err_msg=name)


if __name__ == "__main__":
    lines = [f'"{name}": {[float(f"{one:.8g}") for one in value]}' for name, value in theirs().items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
