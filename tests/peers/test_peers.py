"""Our layers against others' with the same weights: outputs and all gradients in float32, relative to 1e-4.

The stored goldens are compared in every run. With the extra `bench` installed the peers themselves run as well, and the
goldens must still be what they give.
"""

import numpy as np
import pytest
from peers import GOLDENS, PEERS, compare, run_peer
from recorded import RECORDED

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", [*PEERS, *RECORDED])
def test_golden(name):
    """Ours = the stored results of the peer.

    Seen to fail: β without its sigmoid; the output gate left out; RetNet's exponents spread from 5 to 12, and RoPE's
    angles; one softmax over both halves of Hedgehog's features; an ε of 1e-6 in RWKV-7's removal key; norm scales of
    forgetting attention shared by the heads, and no shift; index keys without their norm, or turned in all channels.
    """
    golden = dict(np.load(GOLDENS / f"{name}.npz"))
    errors = compare((PEERS | RECORDED)[name], golden)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("name", PEERS)
def test_peer(name):
    """The stored results = what the peer gives here and now."""
    pytest.importorskip("torch", reason="needs the extra 'bench'")
    pytest.importorskip("transformers", reason="needs the extra 'bench'")
    golden, again = dict(np.load(GOLDENS / f"{name}.npz")), run_peer(PEERS[name])
    assert golden.keys() == again.keys()
    for what, value in again.items():
        np.testing.assert_allclose(golden[what], value, rtol=0, atol=TOLERANCE * np.abs(value).max(), err_msg=what)


def test_every_golden_has_a_peer():
    assert {path.stem for path in GOLDENS.glob("*.npz")} == {*PEERS, *RECORDED}
