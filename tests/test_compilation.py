"""Commands keep what they compile; an import does not."""

import jax
import pytest
from absl import app
from jax.experimental.compilation_cache import compilation_cache

from longctx import commands, compilation

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache folder of a user, in which nothing is kept yet."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = {name: getattr(jax.config, name) for name in NAMES}
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def entries(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_kept_where_the_user_has_a_cache(home, monkeypatch):
    """And an entry that a kill cut short is compiled again."""
    monkeypatch.setattr(compilation, "SECONDS", 0.0)
    monkeypatch.setattr(app, "run", lambda *_, **__: None)
    commands.run(lambda: None)
    for _ in range(2):
        assert jax.jit(lambda x: x * 3 + 1)(2) == 7
        found = entries(home / "longctx" / "compiled")
        assert found
        for path in found:
            path.write_bytes(path.read_bytes()[:100])
        jax.clear_caches()


@pytest.mark.parametrize("where", ["", "elsewhere"])
def test_kept_elsewhere_or_nowhere(home, monkeypatch, where):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", where)
    compilation.keep()
    assert jax.config.jax_compilation_cache_dir is None  # jax has read the variable itself
    assert not entries(home)


def test_no_home_to_write_in(home, monkeypatch):
    (home / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    compilation.keep()
    assert jax.config.jax_compilation_cache_dir is None
