"""Which paths a working directory may have: each that is accepted is read back from, each that is not is told why."""

import collections
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.errors import UsageError
from longctx.folder import path as paths
from longctx.training.checkpoints import Checkpoints, load_params
from longctx.training.step import TrainState

STATE = TrainState(jnp.uint32(1), {"matrix": jnp.arange(6.0).reshape(2, 3)}, (jnp.float32(3),))
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE)


@pytest.mark.parametrize(
    "name",
    [
        "{a,b}",
        "lr=1e-3, x",
        " ",
        "%20",
        "a#b&c|d;e",
        "quo\"te's",
        "two\nlines",
        "a:b",
        "$HOME",
        "日本-é",
        "e\u0301 😀",
        "]",
    ],
)
def test_a_name_that_is_accepted_is_read_back_from(tmp_path, name):
    workdir = tmp_path / name / ".." / name / "run"
    (tmp_path / name).mkdir()
    paths.check(workdir)
    checkpoints = Checkpoints(workdir, keep=2)
    checkpoints.save(1, STATE)
    checkpoints.wait()
    step, state = checkpoints.restore(ABSTRACT)
    assert step == 1
    np.testing.assert_array_equal(state.params["matrix"], STATE.params["matrix"])
    np.testing.assert_array_equal(load_params(workdir, ABSTRACT.params)[0]["matrix"], STATE.params["matrix"])
    longest = max(len(os.fsencode(file)) for file in (workdir / "checkpoints").rglob("*"))
    assert longest - len(os.fsencode(workdir)) + len(".orbax-checkpoint-tmp") + 40 < paths.ADDED


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("runs/lr=[1e-3]", r"has \[ in its path .* could not be read back; name, or rename, the folder without"),
        ("[a]/b", r"has \["),
        ("a*b", r"has \*"),
        ("a?b", r"has \?"),
        ("back\\slash", r"has \\"),
        ("x" * 300, "has a name of 300 bytes in it"),
        ("/".join(["x" * 100] * 50), "is a path of 5,[0-9]+ bytes; give one of at most 3,840"),
        ("\udcff", "is not UTF-8"),
        ("a\0b", "holds a NUL"),
        ("gs://bucket/run", "is not on a file system of this machine"),
        ("s3:/bucket/run", "is not on a file system of this machine"),
        ("file:///tmp/run", "is not on a file system of this machine"),
        ("~nobody-of-this-name/run", "~nobody-of-this-name is no user's home folder"),
        ("file/run", "cannot be a folder .Not a directory"),
        ("file", "is a file; name a folder"),
        ("dangling", "is a link to nowhere, which is not there"),
        ("dangling/a/b", "dangling is a link to nowhere, which is not there"),
        ("new/" + "é" * 128, "has a name of 256 bytes in it; give names of at most 255"),
        ("loop/run", "cannot be a folder .Too many levels"),
    ],
)
def test_a_name_that_is_refused(tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=told):
        paths.given(name)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_folder_above_counts_too(tmp_path, monkeypatch):
    (tmp_path / "a[b]").mkdir()
    monkeypatch.chdir(tmp_path / "a[b]")
    with pytest.raises(UsageError, match=r"--workdir=run has \[ in its path /.*a\[b\]/run"):
        paths.given("run")


def test_what_is_spelt_in_other_ways(tmp_path, monkeypatch):
    """A home folder, a slash at the end, a link to a folder, a folder that begins with a tilde."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=[1]").mkdir()
    (tmp_path / "link").symlink_to("lr=[1]")
    assert paths.given("~/run") == tmp_path / "run"
    assert paths.given("run/") == paths.given("run")
    assert str(paths.given("link")) == "link"  # Orbax takes the path as it is
    assert str(paths.given("./~x")) == "~x"


@pytest.mark.parametrize("name", ["/proc/run", "/sys/../proc/x", "/sys/run", "/dev/run", "/dev/pts/run"])
def test_folders_of_the_system(name):
    with pytest.raises(UsageError, match="among the system's own files"):
        paths.writable(name)


def test_not_writable(tmp_path, monkeypatch):
    """No rights are taken, since tests may run as one who has all."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match=f"{tmp_path} may not be changed by you"):
        paths.writable(tmp_path / "a" / "b")
    with pytest.raises(UsageError, match="may not be read by you"):
        paths.check(tmp_path)


def test_a_full_disk(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 0))
    with pytest.raises(UsageError, match=r"0.0 MiB free, and 1.0 MiB are needed"):
        paths.writable(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))
    paths.writable(tmp_path)
