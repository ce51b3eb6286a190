"""Classifiers of clean images, used as they come or smoothed (arXiv 2310.11311, section 4.2)."""

import copy
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_guidance.backend.convolutions import pack_convolutions
from calib_guidance.backend.precision import Dtype, dtype_of
from calib_guidance.classifiers.base import Classifier, Standardize
from calib_guidance.classifiers.smoothing import Resmoothed, smooth_activations
from calib_guidance.errors import CheckpointError, check_choice
from calib_guidance.weights import registry
from calib_guidance.weights.io import Weights, WeightsFile, load_weights, read_weights, tensors_only

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Normalization = Literal["none", "imagenet"]


def count_classes(network: nn.Module) -> int | None:
    """K of a network that states its ``num_classes``, or the width of its last linear or convolution layer; None without one."""
    if isinstance(stated := getattr(network, "num_classes", None), int):
        return stated
    layers = [module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return layers[-1].weight.shape[0] if layers else None


def _classes_of_file(make: Callable[..., nn.Module], weights: Weights) -> int:
    """Number of classes that a weights file states, else the width of its last layer."""
    if "num_classes" in weights.metadata:
        return int(weights.metadata["num_classes"])
    with torch.device("meta"):
        default = make()
    if getattr(default, "num_classes", None) == 0:  # timm's name for a network without classes
        return 0
    last, state = list(default.state_dict())[-1], registry.bare(weights.state)
    if last not in state:
        raise ValueError(f"num_classes: {weights.path} does not show how many classes it has: state num_classes")
    return state[last].shape[0]


def build_network(
    name: str,
    num_classes: int | None,
    weights: str | None,
    metadata: Mapping[str, object] | None = None,
    options: Mapping[str, object] | None = None,
) -> nn.Module:
    """A torchvision or timm classifier by name (``torchvision/resnet50``, ``timm/convnext_tiny``).

    Args:
        num_classes: width of the last layer; None for that of the weights, without weights for the library's.
        weights: None for random ones, a name that the library knows (``IMAGENET1K_V2``; ``pretrained`` for timm), or a file.
        metadata: settings for :func:`~calib_guidance.weights.io.load_weights` of a local file.
        options: more of the library's, such as timm's ``dynamic_img_size``.
    """
    import timm  # seconds to import, as torchvision
    import torchvision

    local = weights is not None and ("/" in weights or "." in weights)
    library, _, model = name.partition("/")
    if library == "torchvision" and model in torchvision.models.list_models(torchvision.models):
        known = torchvision.models.get_model_weights(model).__members__
        file = Path(known[weights].url).name if weights in known else None
        make = partial(torchvision.models.get_model, model, weights=None if local else weights, **options or {})
    elif library == "timm" and timm.is_model(model):
        known, file = ["pretrained"], "model.safetensors"
        make = partial(timm.create_model, model, pretrained=weights == "pretrained", **options or {})
    else:
        raise ValueError(
            f"network: unknown {name!r}; expected torchvision/NAME or timm/NAME with a NAME of "
            "torchvision.models.list_models() or timm.list_models()"
        )
    if not local and weights is not None and weights not in known:
        tag = "; a tag goes into the name: timm/NAME.TAG" if library == "timm" else ""
        raise ValueError(f"weights: {name} has no {weights!r}; known: {', '.join(known)}, or a local file{tag}")
    width = {} if num_classes is None else {"num_classes": num_classes}
    if local:
        read = read_weights(weights)
        width = width or {"num_classes": _classes_of_file(make, read)}
        network = make(**width)
        load_weights(network, read, **(metadata or {}), **width)
        return network
    try:
        with tensors_only():
            return make(**width)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{name}: its weights {weights} could not be fetched and loaded ({type(error).__name__}: {error}). Without "
            f"network, fetch {file} elsewhere and name it: weights: checkpoints/{file}"
        ) from error


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Fold each BatchNorm into the convolution before it, for inference; a network that torch.fx cannot trace is unchanged."""
    from torch.fx.experimental.optimization import fuse  # imports sympy

    if "forward" in vars(network):  # smoothed around its forward, which a trace would leave out
        return network
    try:
        return fuse(copy.deepcopy(network).eval(), inplace=True)
    except Exception:  # tracing runs the model's own code and fails in as many ways as there are models
        return network


class OffTheShelfClassifier(Classifier):
    """Any image classifier, shown clean images or their estimates x̂0.

    Args:
        network: ``torchvision/NAME``, ``timm/NAME``, or a module (``class_path``) that maps images to logits.
        num_classes: number of classes; None reads it from the network or its weights.
        weights: for a named network, see :func:`build_network`; for a module, its weights file; None keeps it as it is.
        normalize: ``none`` feeds [-1, 1] as the published numbers do; ``imagenet`` maps to the mean and standard deviation
            that torchvision's and most timm weights were trained with.
        resize: side in pixels to which images are resized (bilinear, antialiased), or None.
        softplus_beta: β of the Softplus that replaces every ReLU (3 for DDPM, 5 for EDM in the paper); None keeps ReLU.
        activations: what is smoothed, see :func:`~calib_guidance.classifiers.smoothing.smooth_activations`.
        dtype: of the network once it is frozen to guide; ``auto`` takes what is fast on this machine. Images, logits and
            gradients are float32 whatever it is.

    Examples:
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
        >>> classifier = OffTheShelfClassifier(network, softplus_beta=3.0)
        >>> classifier.num_classes, classifier(torch.zeros(2, 3, 2, 2)).shape
        (3, torch.Size([2, 3]))
    """

    def __init__(
        self,
        network: str | nn.Module,
        num_classes: int | None = None,
        weights: WeightsFile | str | None = None,
        normalize: Normalization = "none",
        resize: int | None = None,
        softplus_beta: float | None = None,
        activations: Sequence[str] = ("ReLU",),
        dtype: Dtype = "float32",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_choice("normalize", normalize, get_args(Normalization))
        if resize is not None and resize < 1:
            raise ValueError(f"resize must be a number of pixels or null, got {resize}")
        settings = {"normalize": normalize, "resize": resize} | self.temperature_metadata
        named = isinstance(network, str)
        name = network if named else type(network).__name__
        if named:
            network = build_network(network, num_classes, weights, {"architecture": name} | settings)
        if num_classes is None and (num_classes := count_classes(network)) is None:
            raise ValueError(f"num_classes: {name} does not show how many classes it has: state num_classes")
        if (own := getattr(network, "num_classes", num_classes)) != num_classes:
            raise ValueError(f"num_classes is {num_classes}, but {name} has {own}: omit num_classes")
        self.weights_metadata = {"architecture": name, "num_classes": num_classes} | settings
        self.provenance = self.weights_metadata | {"file": weights}
        if not named and weights is not None:
            load_weights(network, weights, **self.weights_metadata)
        self.network, self.num_classes, self.normalize, self.resize = network, num_classes, normalize, resize
        self.softplus_beta, self.activations = softplus_beta, tuple(activations)
        self.dtype, self._frozen = dtype_of(dtype), False
        self.standardize = Standardize(_IMAGENET_MEAN, _IMAGENET_STD)
        if softplus_beta is not None:
            self.network = smooth_activations(self.network, softplus_beta, self.activations)

    def freeze(self) -> Self:
        """Also folds BatchNorm into the convolutions, gives the weights their type and lays them out channels-last, once."""
        if not self._frozen:
            self.network = fold_batch_norm(self.network).to(self.dtype, memory_format=torch.channels_last)
            if not self.is_compiled:
                pack_convolutions(self.network)
            self._frozen = True
        return super().freeze()

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        return self.temper(self._logits(x, self._compiled or self.network), t)

    def smoothing_change(self, images: Tensor) -> tuple[float, float]:
        """What ``softplus_beta`` does to ``(N, C, H, W)`` images: the fraction whose predicted class changes, and the mean total
        variation distance of the probabilities.
        """
        with torch.no_grad():
            smoothed = self._logits(images, self.network).softmax(1)
            with Resmoothed(self.softplus_beta, None):
                plain = self._logits(images, self.network).softmax(1)
        changed = smoothed.argmax(1) != plain.argmax(1)
        return float(changed.float().mean()), float((smoothed - plain).abs().sum(1).mean() / 2)

    def _logits(self, x: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        if self.resize is not None and x.shape[-2:] != (self.resize, self.resize):
            x = F.interpolate(x, (self.resize, self.resize), mode="bilinear", antialias=True, align_corners=False)
        if self.normalize == "imagenet":
            x = self.standardize(x)
        if self._frozen and self.dtype != torch.float32:
            return network(x.to(self.dtype)).to(x.dtype)
        return network(x)
