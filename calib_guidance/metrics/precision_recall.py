"""Improved precision and recall (Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

_BLOCK = 2048


def knn_radii(features: Tensor, k: int = 3) -> Tensor:
    """Distance of each of the features ``(N, D)`` to its k-th nearest other one, ``(N,)`` float64."""
    features = features.double()
    radii = [torch.cdist(block, features).kthvalue(k + 1, dim=1).values for block in features.split(_BLOCK)]
    return torch.cat(radii)


def share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Share of ``points`` ``(N, D)`` that lie in a ball around any of the ``centres`` ``(M, D)`` with ``radii`` ``(M,)``."""
    centres = centres.double()
    inside = [(torch.cdist(block.double(), centres) <= radii).any(dim=1) for block in points.split(_BLOCK)]
    return torch.cat(inside).double().mean()


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Precision: share of generated points in the reference's k-NN balls. Recall: the other way round.

    Args:
        reference: ``(M, D)`` features.
        generated: ``(N, D)`` features.
        k: neighbours that set the radius of a ball; 3 in the field.

    Raises:
        ValueError: k or fewer points in one of the sets.
    """
    if min(len(reference), len(generated)) <= k:
        raise ValueError(
            f"precision and recall with k = {k} need more than {k} points, got {len(reference)} and {len(generated)}"
        )
    precision = share_inside(generated, reference, knn_radii(reference, k))
    return precision, share_inside(reference, generated, knn_radii(generated, k))


class PrecisionRecall(Metric):
    """Improved precision and recall of generated features against a reference. Keeps the features, in float32.

    Args:
        reference: ``(M, D)`` features of the reference, the same on every rank.
        k: neighbours that set the radius of a ball.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, reference: Tensor, k: int = 3, **kwargs: object):
        super().__init__(**kwargs)
        self.k = k
        self.register_buffer("reference", reference.float(), persistent=False)
        self.add_state("features", [], dist_reduce_fx="cat")

    def update(self, features: Tensor) -> None:
        """Add generated features ``(N, D)``."""
        self.features.append(features.float())

    def sync(self, *args: object, **kwargs: object) -> None:
        if not self.features:  # torchmetrics cannot gather an empty list
            self.features.append(self.reference[:0])
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """``precision`` and ``recall``; NaN with k or fewer samples."""
        features = (
            self.features if isinstance(self.features, Tensor) else torch.cat([self.reference[:0], *self.features])
        )
        if len(features) <= self.k:
            return {"precision": torch.tensor(torch.nan), "recall": torch.tensor(torch.nan)}
        precision, recall = precision_recall(self.reference, features, self.k)
        return {"precision": precision, "recall": recall}
