from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_ALLOWED = contextvars.ContextVar("kernels", default=True)


@contextlib.contextmanager
def none() -> Iterator[None]:
    """Within it no kernel is chosen, so that whoever counts operations sees them."""
    token = _ALLOWED.set(False)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def allowed() -> bool:
    """Whether a kernel may be chosen where none is named."""
    return _ALLOWED.get()
