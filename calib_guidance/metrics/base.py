"""Base classes of metrics: ranks without data, and values kept for every sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class RankMetric(Metric):
    """A metric in whose sums over ranks one without data takes part, silently."""

    full_state_update = False

    def __init__(self, **kwargs: object):
        # A rank that would answer from its cache, having seen nothing new, would leave the others waiting for it.
        super().__init__(compute_with_cache=False, **kwargs)

    @property
    def update_called(self) -> bool:
        """True: a rank without data takes part with its empty state, which torchmetrics would warn of."""
        return True


class KeptRows(RankMetric):
    """Values of every sample, kept until all are there, then of all ranks and by index.

    Args:
        columns: of each name, an empty tensor ``(0, …)`` of the shape and type of its rows.
    """

    def __init__(self, columns: dict[str, Tensor], **kwargs: object):
        super().__init__(**kwargs)
        self.columns = columns | {"index": torch.zeros(0, dtype=torch.long)}
        for name in self.columns:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, **rows: Tensor) -> None:
        """Keep ``(N, …)`` of every column, ``index`` ``(N,)`` among them."""
        for name, empty in self.columns.items():
            getattr(self, name).append(rows[name].to(self.device, empty.dtype))

    def sync(self, *args: object, **kwargs: object) -> None:
        for name, empty in self.columns.items():
            if not getattr(self, name):  # torchmetrics would gather an empty list as a tensor of another shape
                getattr(self, name).append(empty.to(self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Every column, rows in order of index."""
        rows = {}
        for name, empty in self.columns.items():
            value = getattr(self, name)
            rows[name] = value if isinstance(value, Tensor) else torch.cat([empty.to(self.device), *value])
        order = rows["index"].argsort(stable=True)
        return {name: value[order] for name, value in rows.items()}

    def rows(self) -> dict[str, Tensor]:
        """What :meth:`compute` gives, ``(N, …)`` also where N is 1, of which torchmetrics makes plain numbers."""
        return {name: value.reshape(-1, *self.columns[name].shape[1:]) for name, value in self.compute().items()}
