"""The smallest run that has everything: two stages, planted facts, two steps between checkpoints."""

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from longctx import config, data
from longctx.layers import MIXERS, MLPS


@pytest.fixture(scope="session")
def parse():
    """`parse(mixer, **training)`: the experiment with these options of its mixer and this part changed."""

    def parse(mixer=None, **training):
        mixer = {"kind": "attention", "heads": 2, "kv_heads": 2, "head_width": 8} if mixer is None else mixer
        tree = {
            "model": {
                "width": 16,
                "pattern": ("only",),
                "blocks": {"only": {"mixer": mixer, "mlp": {"kind": "swiglu", "hidden": 16}}},
            },
            "data": {"tokenizer": "bytes", "needles": {"rows": 0.5, "facts": 2}},
            "mesh": {"data": 1},
            "training": {"stages": ((4, 4, 32), (5, 2, 64)), "warmup_steps": 2, "log_every": 3} | training,
            "checkpoints": {"every": 2, "keep": 2},
        }
        return config.parse(tree, MIXERS, MLPS)

    return parse


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """`config.Data` of twelve documents of pseudo-random letters, as bytes."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    for i in range(12):
        (folder / f"{i}.txt").write_text("".join(rng.choice(list("abcd ef\n"), 200 + 50 * i)))
    return config.Data(path=str(folder), tokenizer="bytes")


@pytest.fixture(scope="session")
def corpus(documents):
    return data.prepare(documents, seed=0)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder that keeps compiled programs for the session, so that the same step is compiled once."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    for name, value in zip(names, (folder, 0.0), strict=True):
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
