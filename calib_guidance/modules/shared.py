"""What the copies of a module share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Shared:
    """A callable that a deep copy of its owner shares with it.

    The callables that the command line makes of optimizers and rate schedules hold the whole command line, with trainer and
    data. A weight average copies the module, and would copy those too, which under DDP fails at a lock of the launcher's.

    Args:
        function: what to call.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, object]) -> Shared:
        return self
