"""A checkpoint gives back the same bits; damage is found, told, and passed over; nothing is lost by it."""

import hashlib
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx.errors import RunError, UsageError
from longctx.training.checkpoints import Checkpoints, load_params
from longctx.training.step import TrainState


def new_state(seed):
    values = jax.random.normal(jax.random.key(seed), (64, 33))
    return TrainState(jnp.uint32(seed), {"matrix": values, "layers": {0: values[0]}}, (values[1], jnp.int32(seed)))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def restore(checkpoints):
    return checkpoints.restore(abstract(new_state(0)))


@pytest.fixture
def saved(tmp_path):
    """A workdir with checkpoints after 3 and 6 steps."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (3, 6):
        checkpoints.save(step, new_state(step))
    checkpoints.wait()
    return tmp_path


def test_gives_back_the_same_bits(saved):
    step, state = restore(Checkpoints(saved, keep=2))
    assert step == 6
    same(state, new_state(6))


def test_what_happens_after_save_is_not_in_it(tmp_path):
    """The state is consumed by the next step while the save is in the background."""
    checkpoints, state = Checkpoints(tmp_path, keep=2), new_state(1)
    checkpoints.save(1, state)
    consume = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + 7, state), donate_argnums=0)
    for _ in range(3):
        state = consume(state)
    checkpoints.wait()
    same(restore(checkpoints)[1], new_state(1))


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 10, 11):
        checkpoints.save(step, new_state(step))
    checkpoints.wait()
    assert checkpoints.steps() == [10, 11]


def test_none_where_there_is_none(tmp_path):
    assert restore(Checkpoints(tmp_path, keep=2)) is None


def largest(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def truncate(folder):
    file = largest(folder)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(folder):
    """One bit in the middle of the numbers; Orbax alone loads it."""
    file = largest(folder / "params")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def delete(folder):
    largest(folder).unlink()


def unfinished_copy(folder):
    """Without its sums, and without most of its files."""
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "_CHECKPOINT_METADATA":
            file.unlink()


def binary_sums(folder):
    (folder / "SHA256SUMS").write_bytes(bytes(range(256)))


def cut_sums(folder):
    """Between two lines: what is not listed would not be looked at."""
    (folder / "SHA256SUMS").write_text("".join((folder / "SHA256SUMS").read_text().splitlines(keepends=True)[:3]))


def no_sums_listed(folder):
    (folder / "SHA256SUMS").write_text("")


def folder_of_sums(folder):
    (folder / "SHA256SUMS").unlink()
    (folder / "SHA256SUMS").mkdir()


def sums_of_another_place(folder):
    file = folder.parent / "outside"
    file.write_text("x")
    digest = hashlib.sha256(b"x").hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  {file}\n{digest}  ../outside\n")


def file_into_folder(folder):
    largest(folder).unlink()
    (folder / "params" / "_METADATA").unlink()
    (folder / "params" / "_METADATA").mkdir()


HARMS = [
    *(truncate, flip, delete, unfinished_copy, binary_sums, cut_sums, no_sums_listed, folder_of_sums),
    *(sums_of_another_place, file_into_folder),
]


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_newest_is_passed_over(saved, caplog, harm):
    """`flip` needs the check of SHA256SUMS: Orbax alone loads such a file as other numbers, without a word."""
    harm(saved / "checkpoints" / "6")
    checkpoints = Checkpoints(saved, keep=2)
    with caplog.at_level(logging.WARNING, logger="longctx"):
        step, state = restore(checkpoints)
    assert step == 3
    same(state, new_state(3))
    told = [record.getMessage() for record in caplog.records if record.name.startswith("longctx")]
    assert len(told) == 1
    assert str(saved / "checkpoints" / "6") in told[0]
    assert (saved / "checkpoints" / "damaged-6").is_dir()
    checkpoints.save(6, new_state(8))  # the step is reached again, and saved again
    checkpoints.wait()
    assert checkpoints.steps() == [3, 6]
    same(restore(checkpoints)[1], new_state(8))


def test_one_that_was_never_finished_is_not_seen_and_is_cleared(saved):
    """A kill while saving leaves Orbax's temporary folder."""
    folder = saved / "checkpoints"
    shutil.copytree(folder / "6", folder / "9.orbax-checkpoint-tmp")
    checkpoints = Checkpoints(saved, keep=2)
    assert restore(checkpoints)[0] == 6
    checkpoints.save(9, new_state(9))
    checkpoints.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["6", "9"]


def test_killed_before_its_sums_were_written(saved):
    (saved / "checkpoints" / "6" / "SHA256SUMS").unlink()
    assert restore(Checkpoints(saved, keep=2))[0] == 6


def test_all_damaged_is_an_error_and_nothing_is_touched(saved):
    """Training must not start afresh over a run that could be mended from a copy."""
    for step in ("3", "6"):
        truncate(saved / "checkpoints" / step)
    before = sorted(saved.rglob("*"))
    with pytest.raises(UsageError, match=r"no checkpoint is usable .*checkpoints/6.*checkpoints/3"):
        restore(Checkpoints(saved, keep=2))
    assert sorted(saved.rglob("*")) == before


def test_parameters_alone(saved):
    truncate(saved / "checkpoints" / "6")
    params, step = load_params(saved, abstract(new_state(0)).params)
    assert step == 3
    same(params, new_state(3).params)
    assert (saved / "checkpoints" / "6").is_dir(), "a reader moves nothing"


def test_parameters_of_another_model(saved):
    wanted = {
        "matrix": jax.ShapeDtypeStruct((65, 33), jnp.float32),
        "layers": {0: jax.ShapeDtypeStruct((33,), jnp.float32)},
    }
    with pytest.raises(UsageError, match=r"checkpoints/6 is whole but .* another model"):
        load_params(saved, wanted)


def test_parameters_where_there_are_none(tmp_path):
    with pytest.raises(UsageError, match="holds no checkpoint"):
        load_params(tmp_path, abstract(new_state(0)).params)


@pytest.mark.parametrize("lost", ["params/manifest.ocdbt", "optimizer/_METADATA", "params/array_metadatas"])
def test_a_save_that_does_not_read_back_is_no_save(saved, monkeypatch, lost):
    """Orbax leaves these out where its patterns find no file; told at once, and the one before is kept and named."""
    checkpoints = Checkpoints(saved, keep=1)
    state = new_state(9)
    finish = checkpoints._finish

    def lose(path, response, kinds):
        response.result()
        shutil.rmtree(path / lost) if (path / lost).is_dir() else (path / lost).unlink()
        finish(path, response, kinds)

    monkeypatch.setattr(checkpoints, "_finish", lose)
    checkpoints.save(9, state)
    if lost == "params/array_metadatas":  # what Orbax reads without
        checkpoints.wait()
        same(restore(checkpoints)[1], state)
        return
    with pytest.raises(
        RunError, match=r"step 9 cannot be written .*does not read back.*checkpoints/6 is the last good"
    ):
        checkpoints.wait()
    assert checkpoints.steps() == [3, 6, 9]
    assert restore(checkpoints)[0] == 6


def test_names_that_are_no_steps(saved):
    """Copied there by hand, or by another program; they are neither read nor removed."""
    directory = saved / "checkpoints"
    names = ["0999", "٣٣", "²", "9" * 250, "1e3", "+7", " 8", "-9", "6 (copy)", "damaged-6", ".5"]
    for name in names:
        shutil.copytree(directory / "6", directory / name)
    (directory / "77").write_text("a file")
    (directory / "88").symlink_to("nowhere")
    checkpoints = Checkpoints(saved, keep=1)
    assert checkpoints.steps() == [3, 6]
    assert restore(checkpoints)[0] == 6
    checkpoints.save(77, new_state(77))
    checkpoints.wait()
    assert checkpoints.steps() == [77]
    assert {path.name for path in directory.iterdir()} == {"77", "88", "damaged-77", *names}


def test_links_and_files_are_removed_as_they_are(saved, tmp_path_factory):
    """An old checkpoint that is a link to another disk, and what looks like one half-written and is a file."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "3"
    shutil.move(saved / "checkpoints" / "3", elsewhere)
    (saved / "checkpoints" / "3").symlink_to(elsewhere)
    (saved / "checkpoints" / "9.orbax-checkpoint-tmp").touch()
    checkpoints = Checkpoints(saved, keep=1)
    checkpoints.save(9, new_state(9))
    checkpoints.wait()
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["9"]
    assert elsewhere.is_dir()


def test_what_was_damaged_before_is_kept(saved):
    for name in ("damaged-6", "damaged-6-2"):
        (saved / "checkpoints" / name).write_text(name)
    flip(saved / "checkpoints" / "6")
    restore(Checkpoints(saved, keep=2))
    assert sorted(os.listdir(saved / "checkpoints")) == ["3", "damaged-6", "damaged-6-2", "damaged-6-3"]


def test_a_folder_that_cannot_be_read(saved, monkeypatch):
    """Without a look, a run would begin anew over its own checkpoints. No rights are taken: tests may have all."""

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    checkpoints = Checkpoints(saved, keep=2)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UsageError, match=r"checkpoints cannot be read \(Permission denied\)"):
        restore(checkpoints)


def test_room_for_one_more(saved, monkeypatch):
    state = abstract(new_state(0))
    usage = shutil.disk_usage(saved)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=8_000))
    with pytest.raises(UsageError, match=r"needed to save anything; make room"):
        Checkpoints(saved, keep=2).check_room(state)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=9_000))
    Checkpoints(saved, keep=2).check_room(state)
