"""What metrics share: ranks without data, and features that are kept."""

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


class FeatureMetric(RankMetric):
    """A function of all generated features and a reference. Keeps the features, in float32.

    Args:
        reference: ``(M, D)`` features of the reference, the same on every rank.
    """

    def __init__(self, reference: Tensor, **kwargs: object):
        super().__init__(**kwargs)
        self.register_buffer("reference", reference.float(), persistent=False)
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("indices", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, index: Tensor | None = None) -> None:
        """Add generated features.

        Args:
            features: ``(N, D)``.
            index: ``(N,)`` numbers of the samples, by which they are sorted, so that what depends on their order does not
                depend on the number of ranks; None for the order of arrival, rank after rank.

        Raises:
            ValueError: features of another width than the reference's, or not one index for each.
        """
        check_width(features, self.reference.shape[1], type(self).__name__)
        index = torch.zeros(len(features), dtype=torch.long) if index is None else index
        if index.shape != features.shape[:1]:
            raise ValueError(
                f"{type(self).__name__} needs one index for each of {len(features)} features, got {tuple(index.shape)}"
            )
        self.features.append(features.float())
        self.indices.append(index.long().to(features.device))

    def sync(self, *args: object, **kwargs: object) -> None:
        if not self.features:  # torchmetrics would gather an empty list as one float32 tensor without width
            self.features.append(self.reference[:0])
            self.indices.append(self.reference[:0, 0].long())
        super().sync(*args, **kwargs)

    def gathered(self) -> Tensor:
        """All features ``(N, D)`` so far, by index."""
        if isinstance(self.features, Tensor):  # after a sync
            features, indices = self.features, self.indices
        elif self.features:
            features, indices = torch.cat(self.features), torch.cat(self.indices)
        else:
            return self.reference[:0]
        return features[indices.argsort(stable=True)]


def check_width(features: Tensor, width: int, name: str) -> None:
    """Refuse what is not ``(N, width)``.

    Raises:
        ValueError: another shape.
    """
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(
            f"{name}: the reference has features (M, {width}), the samples' have shape {tuple(features.shape)}; "
            "both must come from one extractor"
        )
