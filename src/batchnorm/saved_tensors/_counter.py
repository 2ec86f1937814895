"""The function that counts what forward keeps, while one counts.

Autograd calls only the innermost pair of saved-tensor hooks. While `lean` keeps tensors in its own hooks, `memory`
therefore sees nothing: `lean` reports each tensor that it keeps to the function of `current()`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

Count = Callable[[Tensor], None]

_current: ContextVar[Count | None] = ContextVar("batchnorm_count", default=None)


def current() -> Count | None:
    """The function that counts, or None."""
    return _current.get()


@contextmanager
def counting(count: Count) -> Iterator[None]:
    """Report to `count` each tensor that is kept while the context is active."""
    token = _current.set(count)
    try:
        yield
    finally:
        _current.reset(token)
