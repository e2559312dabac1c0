"""What rewards make of the pictures of one call, made once: `Weighted` opens a scope, recipes and `dispatch` ask in it.

Outside of a scope nothing is kept, so a reward that is asked alone works as if this file were not there. Rewards of
one's own share without knowing it, as long as they take their pictures through `dispatch` and a `Recipe`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class Prepared:
    """(how, of what) -> what was made. What it was made of is held too: identities of live objects are unique."""

    def __init__(self) -> None:
        # a reward that only logs is asked without gradient; what it shares with one that trains must have one
        self._grad = torch.is_grad_enabled()
        self._made: dict[Hashable, tuple[Any, Any]] = {}

    def once(self, make: Callable[..., Result], source: Any, *args: Hashable) -> Result:
        """make(source, *args), with the gradient mode of the whole call; see `once`."""
        key = (make, args, _identity(source))
        if key not in self._made:
            with torch.set_grad_enabled(self._grad):
                self._made[key] = source, make(source, *args)
        made: Result = self._made[key][1]
        return made


_scope: ContextVar[Prepared | None] = ContextVar("prepared", default=None)


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Within it, `once` remembers. Scopes inside each other are one; threads started within it do not see it."""
    if _scope.get() is not None:
        yield
        return
    token = _scope.set(Prepared())
    try:
        yield
    finally:
        _scope.reset(token)


def once(make: Callable[..., Result], source: Any, *args: Hashable) -> Result:
    """make(source, *args), or in a scope what it gave before for the same source and arguments.

    Args:
        make: a function of a module: one that is made anew at each call would never be found again.
        source: a tensor, or a sequence of pictures; the same one if it is the same object, or holds the same ones.
    """
    prepared = _scope.get()
    return make(source, *args) if prepared is None else prepared.once(make, source, *args)


def _identity(source: Any) -> Hashable:
    return tuple(map(id, source)) if isinstance(source, Sequence) else id(source)
