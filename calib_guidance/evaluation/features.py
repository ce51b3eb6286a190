"""Feature extractors for distances between sets of images."""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_guidance.backend.images import from_uint8
from calib_guidance.backend.precision import exact_float32
from calib_guidance.classifiers.base import Classifier
from calib_guidance.classifiers.clip import CLIP_MEAN, CLIP_STD, build_clip
from calib_guidance.classifiers.off_the_shelf import build_network
from calib_guidance.errors import ConfigurationError, check_installed, first_line
from calib_guidance.runs.identity import hash_state
from calib_guidance.weights.io import CheckpointError, load_weights, read_weights, tensors_only

_CLIP, _CLIP_WEIGHTS = (
    "ViT-L-14-336-quickgelu",
    "hf://timm/vit_large_patch14_clip_336.openai/open_clip_model.safetensors",
)
_DINOV2 = "vit_large_patch14_dinov2.lvd142m"
_TORCH = f"torch {torch.__version__.partition('+')[0]}"


class Features(NamedTuple):
    """Features of N images, float32: pooled ``(N, D)``, of a layer before pooling ``(N, D_s)`` for sFID, logits ``(N, K)``.

    Examples:
        >>> Features(pool=torch.zeros(2, 2048)).logits is None  # of an extractor without classes
        True
    """

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class FeatureExtractor(nn.Module, ABC):
    """Maps 8-bit images to features; of the attributes see :meth:`provenance`.

    Examples:
        >>> class Mean(FeatureExtractor):  # features of your own: the mean color
        ...     name, width = "mean color", 3
        ...     def forward(self, images):
        ...         return Features(images.float().mean(dim=(2, 3)))
        >>> Mean()(torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)).pool
        tensor([[7., 7., 7.]])
    """

    name: str
    kind: str = ""  # inception, dinov2 or clip, whose distances have names in the field (FID, FD-DINOv2)
    width: int  # D of the pooled features
    spatial_width: int | None = None  # D_s, None without
    num_logits: int | None = None  # K, None without
    library: str = _TORCH
    weights: str | None = None
    resize: Mapping[str, Any] = MappingProxyType({"size": None, "how": "none", "library": None})
    normalization: str = "none"

    def __call__(self, images: Tensor) -> Features:
        # TF32, the default for convolutions on GPUs, keeps 10 of the 23 bits that the definitions were computed with.
        with exact_float32(), torch.no_grad():
            found = super().__call__(images)
        if not all(value.isfinite().all() for value in found if value is not None):
            raise ConfigurationError(f"{self.name}: features are not finite: its weights do not fit it, or are damaged")
        return found

    @abstractmethod
    def forward(self, images: Tensor) -> Features:
        """Features of uint8 images ``(N, C, H, W)``, C = 1 or 3."""

    def _watch_last_linear(self, network: nn.Module, whose: str) -> None:
        """Set ``width``, and keep the input ``(N, D)`` of the network's last linear layer as ``seen`` in each forward pass."""
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(f"features: {whose} has no linear layer whose input could serve as features")
        self.width = linear[-1].in_features
        linear[-1].register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.seen = inputs[0].flatten(1).float()

    def provenance(self) -> dict[str, Any]:
        """What the features are a function of: two sets whose values differ here do not compare."""
        found = {"extractor": self.name, "library": self.library, "weights": self.weights}
        found |= {"weights_sha256": hash_state(self), "resize": dict(self.resize)}
        return found | {"normalization": self.normalization}


class InceptionFeatures(FeatureExtractor):
    """The Inception-v3 that FID is defined with, through torch-fidelity, with its own resize (TensorFlow 1's bilinear).

    Pool features (2048), of FID, KID, precision and recall; the first 7 channels of ``mixed_6/conv`` (17×17×7 = 2023, in
    that order), of ADM's sFID; and logits (1008) without bias, of the Inception score. ``weights`` are
    ``weights-inception-2015-12-05-6726825d.pth`` on this machine, or ``hf://…``; None lets torch-fidelity download it.
    """

    name = "Inception-v3 (2015-12-05), torch-fidelity"
    kind, width, spatial_width, num_logits = "inception", 2048, 2023, 1008

    def __init__(self, weights: str | None = None):
        super().__init__()
        check_installed("torch_fidelity", "eval", "InceptionFeatures")
        import torch_fidelity
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        self.weights, self.library = weights, f"torch-fidelity {torch_fidelity.__version__}"
        self.resize = {"size": 299, "how": "bilinear, not antialiased, as TensorFlow 1", "library": self.library}
        self.normalization = "(x − 128)/128"
        file: io.BytesIO | None = None
        if weights is not None:  # read here, so that any format will do and no file is executed; the class wants a file
            file = io.BytesIO()
            torch.save(read_weights(weights).state, file)
            file.seek(0)
        try:
            with tensors_only():
                self.network = FeatureExtractorInceptionV3(
                    "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=file
                )
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            if weights is not None:
                message = f"{weights} does not fit torch-fidelity's Inception-v3 ({first_line(error)})"
                raise CheckpointError(f"{message}: name {Path(URL_INCEPTION_V3).name}") from error
            raise CheckpointError(
                f"Inception's weights could not be fetched ({type(error).__name__}: {error}): fetch {URL_INCEPTION_V3} "
                "elsewhere and name the file, inception:FILE or InceptionFeatures' weights"
            ) from error
        self._seen: list[Tensor] = []
        # torch-fidelity's name for TensorFlow's mixed_6/conv.
        self.network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: self._seen.append(output))

    def forward(self, images: Tensor) -> Features:
        self._seen.clear()
        pool, logits = self.network(images.expand(-1, 3, -1, -1))
        spatial = self._seen.pop()[:, :7].permute(0, 2, 3, 1)  # as TensorFlow lays it out, and statistics files with it
        return Features(pool.float(), spatial.flatten(1).float(), logits.float())


class _ResizedFeatures(FeatureExtractor):
    """Base class: RGB images resized without cropping and normalized by channel."""

    def _prepare(
        self,
        size: int,
        how: str,
        mean: Sequence[float],
        std: Sequence[float],
        note: str = "",
        antialias: bool = True,
        clamp: bool = True,
    ) -> None:
        self.size, self.how, self.mean, self.std = size, how, tuple(mean), tuple(std)
        self.antialias, self.clamp = antialias, clamp  # bicubic overshoots, which 8-bit images cannot
        smooth = ("antialiased" if antialias else "not antialiased") + ("" if clamp else ", overshoot kept")
        self.resize = {"size": size, "how": f"{how}, {smooth}, full image, in float32{note}", "library": _TORCH}
        self.normalization = f"mean {list(mean)}, standard deviation {list(std)} of [0, 1]"
        self.requires_grad_(False).eval()

    def shown(self, images: Tensor) -> Tensor:
        """``(N, 3, size, size)`` as the network was trained with, of uint8 ``(N, C, H, W)``."""
        x = images.expand(-1, 3, -1, -1).float()
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode=self.how, antialias=self.antialias, align_corners=False)
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        x = x.clamp(0, 255) if self.clamp else x
        return (x / 255 - mean) / std


class TimmFeatures(_ResizedFeatures):
    """Input of the head of a timm model, by default DINOv2's class token as Stein et al. (2023) measure FD_DINOv2.

    Args:
        model: name that timm knows, with its tag.
        weights: ``pretrained``, a local file or ``hf://…`` with timm's names; None leaves random ones.
        size: side in pixels to which images are resized; None takes the model's own, but for DINOv2 the 224 which the field
            measures with (https://arxiv.org/abs/2306.04675), not timm's 518. timm resamples the position embedding.

    Examples:
        >>> features = TimmFeatures("resnet18", weights=None)  # random weights
        >>> features.width, features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).pool.shape
        (512, torch.Size([1, 512]))
    """

    def __init__(self, model: str = _DINOV2, weights: str | None = "pretrained", size: int | None = None):
        import timm

        super().__init__()
        self.network = build_network(f"timm/{model}", None, weights)
        settings = timm.data.resolve_data_config(pretrained_cfg=self.network.pretrained_cfg)
        own = settings["input_size"][-1]
        size = size or (224 if "dinov2" in model else own)
        if size != own and hasattr(self.network, "set_input_size"):
            self.network.set_input_size(img_size=(size, size))
        self.name, self.weights, self.library = f"timm {model}", weights, f"timm {timm.__version__}"
        self.kind = "dinov2" if (model, size) == (_DINOV2, 224) else ""
        self.width = self.network.head_hidden_size
        note = "" if size == own else f", where timm's settings say {own}"
        self._prepare(size, settings["interpolation"], settings["mean"], settings["std"], note)

    def forward(self, images: Tensor) -> Features:
        features = self.network.forward_features(self.shown(images))
        return Features(self.network.forward_head(features, pre_logits=True).flatten(1).float())


class Encoder(NamedTuple):
    """One of the encoders of FDr-6: a timm model, how it is fed and pooled, and the Fréchet distance that FD-loss divides by."""

    model: str
    size: int  # pixels of a side; padded with zeros to a multiple of the patch
    pooling: Literal["mean", "token", "head"]  # of the last map; the class token; what its own head pools
    unit: float  # of 50,000 ImageNet validation images to training statistics at 256


# FD-loss (arXiv 2604.28190). Inception is InceptionFeatures. Sides are those of its validation script, not of the models' names.
ENCODERS = {
    "inception": Encoder("", 299, "head", 1.68),
    "convnext": Encoder("convnextv2_base.fcmae_ft_in22k_in1k", 224, "mean", 56.87),
    "dinov2": Encoder("vit_large_patch14_dinov2.lvd142m", 256, "token", 14.19),
    "mae": Encoder("vit_large_patch16_224.mae", 224, "token", 0.04),
    "siglip2": Encoder("vit_so400m_patch16_siglip_256.v2_webli", 224, "head", 0.60),
    "clip": Encoder("vit_large_patch14_clip_224.openai", 256, "token", 5.60),
}


class EncoderFeatures(_ResizedFeatures):
    """Features of an encoder of FDr-6 (FD-loss, arXiv 2604.28190): bicubic and antialiased resize, bfloat16 autocast.

    Args:
        encoder: convnext, dinov2, mae, siglip2 or clip of :data:`ENCODERS`.
        weights: ``pretrained``, a local file or ``hf://…`` with timm's names; None leaves random ones.

    Examples:
        >>> with torch.device("meta"):  # its 300 million weights take no memory
        ...     features = EncoderFeatures("mae", weights=None)
        >>> features.width, features.size, features.pooling
        (1024, 224, 'token')
    """

    def __init__(self, encoder: str, weights: str | None = "pretrained"):
        import timm

        super().__init__()
        known = [name for name, each in ENCODERS.items() if each.model]
        if encoder not in known:
            raise ValueError(f"encoder: expected one of {', '.join(known)}, got {encoder!r}")
        model, size, self.pooling, _ = ENCODERS[encoder]
        # A transformer takes any number of patches, and its position embedding is resampled.
        any_size = {"dynamic_img_size": True, "dynamic_img_pad": True} if "vit" in model else {}
        self.network = build_network(f"timm/{model}", None, weights, options=any_size)
        settings = timm.data.resolve_data_config(pretrained_cfg=self.network.pretrained_cfg)
        self.name, self.weights, self.library = f"FDr's {encoder}: timm {model}", weights, f"timm {timm.__version__}"
        self.width = self.network.num_features
        self._prepare(size, "bicubic", settings["mean"], settings["std"], clamp=False)

    def forward(self, images: Tensor) -> Features:
        with torch.autocast(images.device.type, torch.bfloat16):
            found = self.network.forward_features(self.shown(images))
            if self.pooling == "head":
                found = self.network.forward_head(found, pre_logits=True)
            else:
                found = found.mean((2, 3)) if self.pooling == "mean" else found[:, 0]
        return Features(found.float())


class CLIPFeatures(_ResizedFeatures):
    """Projected image embeddings of CLIP ViT-L/14 at 336 pixels, as CMMD is defined with (arXiv 2401.09603), not normalized.

    Args:
        weights: a local file or ``hf://…`` in open_clip's names; None leaves random ones.
        model: a name of open_clip, or the architecture in its format. Distances have CMMD's name with the default alone.

    Examples:
        >>> vision = {"image_size": 32, "patch_size": 16, "head_width": 16, "layers": 1, "width": 32}
        >>> model = {"embed_dim": 16, "vision_cfg": vision,
        ...          "text_cfg": {"context_length": 77, "vocab_size": 49408, "layers": 1, "width": 32, "heads": 2}}
        >>> features = CLIPFeatures(weights=None, model=model)  # a small one, with random weights
        >>> features(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).pool.shape
        torch.Size([2, 16])
    """

    def __init__(self, weights: str | None = _CLIP_WEIGHTS, model: str | dict[str, Any] = _CLIP):
        super().__init__()
        clip = build_clip(model)
        if weights is not None:
            load_weights(clip, weights)
        self.network, self.weights, self.width = clip.visual, weights, clip.visual.output_dim
        self.kind, self.name = (
            "clip" if model == _CLIP else "",
            f"open_clip {model if isinstance(model, str) else 'model'}",
        )
        size = clip.visual.image_size
        self._prepare(
            size if isinstance(size, int) else size[0], "bicubic", CLIP_MEAN, CLIP_STD, antialias=False, clamp=False
        )

    def forward(self, images: Tensor) -> Features:
        return Features(self.network(self.shown(images)).float())


class TorchvisionFeatures(_ResizedFeatures):
    """Input of the last linear layer of a torchvision classifier, of images of the size, mean and std that it names with weights.

    Args:
        model: name that torchvision knows.
        weights: one of the names that it has for the model's weights, a local file or ``hf://…``; None leaves random ones.

    Examples:
        >>> features = TorchvisionFeatures("resnet18", weights=None)  # random weights
        >>> features.width, features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).pool.shape
        (512, torch.Size([1, 512]))
    """

    def __init__(self, model: str, weights: str | None = "DEFAULT"):
        import torchvision

        super().__init__()
        self.network = build_network(f"torchvision/{model}", None, weights)
        known = torchvision.models.get_model_weights(model)
        shown = (known[weights] if weights in known.__members__ else known.DEFAULT).transforms()
        self.name, self.library = f"torchvision {model}", f"torchvision {torchvision.__version__.partition('+')[0]}"
        self.weights = known[weights].name if weights in known.__members__ else weights  # DEFAULT moves
        self._watch_last_linear(self.network, self.name)
        self._prepare(shown.crop_size[0], shown.interpolation.value, shown.mean, shown.std)

    def forward(self, images: Tensor) -> Features:
        self.network(self.shown(images))
        return Features(self.seen)


class ClassifierFeatures(FeatureExtractor):
    """Input of a classifier's last linear layer, and its logits: features for data that Inception does not know.

    An evaluation classifier that also guides makes the metrics look better than they are.

    Examples:
        >>> import calib_guidance
        >>> features = ClassifierFeatures(calib_guidance.load_pretrained("digits_classifier"))
        >>> features.width, features(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).logits.shape
        (64, torch.Size([2, 10]))
    """

    def __init__(self, classifier: Classifier):
        super().__init__()
        self._sha256 = hash_state(classifier)  # freezing folds weights into others
        self.classifier = classifier.freeze()
        self._watch_last_linear(classifier, "the evaluation classifier")
        self.num_logits = classifier.num_classes
        self.name = f"input of the last linear layer ({self.width} wide) of {type(classifier).__name__}"
        self._known = known = getattr(classifier, "provenance", {})
        self.weights, size = known.get("file"), known.get("resize")
        if size:
            self.resize = {"size": size, "how": "bilinear, antialiased", "library": _TORCH}
        self.normalization = f"[-1, 1], {known.get('normalize', 'none')}"

    def forward(self, images: Tensor) -> Features:
        logits = self.classifier(from_uint8(images))
        return Features(self.seen, None, logits.float())

    def provenance(self) -> dict[str, Any]:
        architecture = self._known.get("architecture", type(self.classifier).__name__)
        return super().provenance() | {"weights_sha256": self._sha256, "architecture": architecture}


class ModuleFeatures(FeatureExtractor):
    """A module of your own, with ``width`` D, which maps float32 images ``(N, C, H, W)`` in [-1, 1] to features ``(N, D)``.

    Examples:
        >>> features = ModuleFeatures(nn.Flatten(), width=4)
        >>> features(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)).pool
        tensor([[1., 1., 1., 1.]])
    """

    def __init__(self, module: nn.Module, width: int | None = None):
        super().__init__()
        width = getattr(module, "width", None) if width is None else width
        if not isinstance(width, int):
            raise ValueError(f"{type(module).__name__} does not say how wide its features are: set its attribute width")
        self.module, self.width = module.requires_grad_(False).eval(), width
        self.name = f"{type(module).__module__}.{type(module).__qualname__}"
        # Only its code tells what the module does to images, so the code counts as weights do.
        file = getattr(sys.modules[type(module).__module__], "__file__", None)
        code = Path(file).read_bytes() if file else b""
        self.library = f"{_TORCH}, code {hashlib.sha256(code).hexdigest()[:12]}"
        self.resize = {"size": None, "how": "the module's own", "library": None}
        self.normalization = "[-1, 1]"

    def forward(self, images: Tensor) -> Features:
        return Features(self.module(from_uint8(images)).flatten(1).float())
