"""CLIP as a classifier whose classes are text prompts (Radford et al. 2021), with the models of open_clip."""

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib_guidance.backend.precision import Dtype, autocast, dtype_of
from calib_guidance.classifiers.base import Classifier, Standardize
from calib_guidance.errors import check_installed
from calib_guidance.scores.base import as_float
from calib_guidance.weights.io import WeightsFile, load_weights

_BOUND = 1 + 1e-4  # of pixels; above 1: saturated areas keep their gradient despite rounding
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _import_open_clip() -> ModuleType:
    check_installed("open_clip", "clip", "CLIP")
    import open_clip

    return open_clip


def _read_config(model: str | Mapping[str, Any]) -> dict[str, Any]:
    """The architecture in open_clip's format, from a name that it knows, a JSON file or as it is."""
    if not isinstance(model, str):
        return dict(model)
    if model.endswith(".json"):
        try:
            content = json.loads(Path(model).read_text())
            return content.get("model_cfg", content)  # the hub's open_clip_config.json holds more than the architecture
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"model: {model} is not a readable JSON file of a CLIP architecture ({error})") from error
    open_clip = _import_open_clip()
    config = open_clip.get_model_config(model) if ":" not in model else None
    if config is None:
        near = difflib.get_close_matches(model, open_clip.list_models(), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "open_clip.list_models() names them"
        raise ValueError(f"model: open_clip has no {model!r}; {hint}")
    return config


def build_clip(model: str | Mapping[str, Any]) -> nn.Module:
    """A contrastive model of open_clip with random weights; ``model`` as for :class:`CLIPClassifier`."""
    open_clip, config = _import_open_clip(), _read_config(model)
    text = config.get("text_cfg", {})
    if "multimodal_cfg" in config or "hf_model_name" in text or "hf_tokenizer_name" in text:
        raise ValueError(
            f"model: {model if isinstance(model, str) else 'this architecture'} writes captions, or reads text with a tokenizer "
            "that is not part of open_clip; name a model with CLIP's own, such as ViT-L-14-336-quickgelu"
        )
    arguments = {name: value for name, value in config.items() if name != "custom_text"}
    try:
        return (open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP)(**arguments)
    except TypeError as error:
        raise ValueError(f"model: not an architecture in open_clip's format ({error})") from error


def _check_published(model: str | Mapping[str, Any], weights: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ValueError where published weights were trained with another activation or other pixel statistics.

    Names and shapes do not show these. open_clip lists them for the files on the hub; of others only the name tells.
    """
    open_clip = _import_open_clip()
    repository = "/".join(weights.removeprefix("hf://").split("/")[:2]) + "/"
    entries = (open_clip.get_pretrained_cfg(*pair) for pair in open_clip.list_pretrained())
    entry = next((e for e in entries if repository in (e["hf_hub"], e["hf_hub"].rpartition("/")[0] + "/")), None)
    if entry is None:
        expected = {"quick_gelu": True} if "openai" in weights.lower() else {}
    else:
        expected = {"quick_gelu": entry.get("quick_gelu", False), "mean": entry["mean"], "std": entry["std"]}
    found = {"quick_gelu": _read_config(model).get("quick_gelu", False), "mean": mean, "std": std}
    if expected.get("quick_gelu", found["quick_gelu"]) != found["quick_gelu"]:
        was, cure = ("QuickGELU", "with") if expected["quick_gelu"] else ("GELU", "without")
        raise ValueError(
            f"weights: {weights} was trained with {was}, model {model if isinstance(model, str) else '(given as a mapping)'} has "
            f"another activation: the file would load, and every embedding be wrong. Set model to the one {cure} -quickgelu in "
            "its name (quick_gelu of an architecture of your own)"
        )
    for name in ("mean", "std"):
        if not all(math.isclose(a, b) for a, b in zip(expected.get(name, found[name]), found[name], strict=True)):
            raise ValueError(f"weights: {weights} was trained with {name} {list(expected[name])}: set {name} to that")


def resampling_matrix(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Antialiased bicubic resampling of a stretch of ``source`` pixels to ``target``, as a matrix ``(..., target, source)``.

    The kernel is Keys' with a = −1/2, widened where pixels get fewer, as in Pillow; at the ends of the line, and only there,
    it is cut off. As a matrix it has a gradient that is the same in every run, which a scatter on a GPU has not. ``start`` and
    ``length`` of the stretch are ``(...)``, in pixels.
    """
    step = (length / target)[..., None]
    pixels = torch.arange(max(source, target), dtype=step.dtype, device=step.device) + 0.5
    centres = start[..., None] + pixels[:target] * step
    u = ((pixels[:source] - centres[..., None]) / step[..., None].clamp(min=1)).abs()
    near, far = (1.5 * u - 2.5) * u * u + 1, ((2.5 - 0.5 * u) * u - 4) * u + 2
    kernel = torch.where(u < 1, near, torch.where(u < 2, far, 0.0))
    return kernel / kernel.sum(-1, keepdim=True)


def low_discrepancy(numbers: Tensor) -> Tensor:
    """Evenly distributed points of the unit cube by number: ``(...)`` to ``(..., 3)`` in [0, 1), float64.

    frac((n + ½)·(1/ρ, 1/ρ², 1/ρ³)) with ρ⁴ = ρ + 1, the golden ratio's generalization to three dimensions.
    """
    powers = 1.2207440846057596 ** -torch.arange(1, 4, dtype=torch.float64, device=numbers.device)
    return ((numbers.double() + 0.5)[..., None] * powers).frac()


class CLIPClassifier(Classifier):
    """CLIP as a classifier over prompts.

    Logits logit_scale·cos(image, prompt_k): how well an image fits each of several texts.

    Requests ask for prompt k by the label k. With one prompt the log-probability has no gradient;
    :class:`~calib_guidance.scores.TemperedLogProb` with τ2 = 0 climbs the cosine itself, τ1·logit_scale times.

    Args:
        prompts: one text per class, such as "a photo of a red fox".
        model: a name of ``open_clip.list_models()``, the path of a JSON file in its format, or the content of one.
        weights: local file or ``hf://owner/repository/file`` in open_clip's names, such as
            ``hf://timm/vit_large_patch14_clip_336.openai/open_clip_model.safetensors``; None leaves random weights.
        cutouts: number of crops that are shown besides the full image, the logits being the mean over all of them. Where they
            lie depends on their number and on t alone. Each costs as much as the full image.
        cutout_scale: smallest and largest side of a crop, as a fraction of the image's, in (0, 1].
        mean, std: of each color in [0, 1] that the weights were trained with.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``, of the matrix products of the image network.

    Images of any size are resized to the network's (bicubic, antialiased, overshoot clipped to [-1, 1] as in open_clip).

    Examples:
        >>> tower = {"layers": 1, "width": 32, "heads": 2}
        >>> vision = {"image_size": 32, "patch_size": 16, "head_width": 16, "layers": 1, "width": 32}
        >>> model = {"embed_dim": 16, "vision_cfg": vision,
        ...          "text_cfg": {"context_length": 77, "vocab_size": 49408, **tower}}
        >>> classifier = CLIPClassifier(["a photo of a cat", "a photo of a dog"], model)  # random weights
        >>> classifier(torch.zeros(3, 3, 64, 64), torch.tensor([0])).shape
        torch.Size([3, 2])
    """

    compiled_module = "visual"

    def __init__(
        self,
        prompts: Sequence[str],
        model: str | dict[str, Any] = "ViT-L-14-336-quickgelu",
        weights: WeightsFile | str | None = None,
        cutouts: int = 0,
        cutout_scale: Sequence[float] = (0.5, 0.9),
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        dtype: Dtype = "float32",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if isinstance(prompts, str) or not prompts or not all(prompts):
            raise ValueError(f"prompts must be a list of texts, one per class, got {prompts!r}")
        if cutouts < 0:
            raise ValueError(f"cutouts must be at least 0, got {cutouts}")
        if len(cutout_scale) != 2 or not 0 < cutout_scale[0] <= cutout_scale[1] <= 1:
            raise ValueError(f"cutout_scale must be [smallest, largest] within (0, 1], got {list(cutout_scale)}")
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise ValueError(f"mean and std must be three numbers each, std above 0; got {list(mean)} and {list(std)}")
        self.dtype = dtype_of(dtype)
        clip = build_clip(model)
        if weights is not None:
            _check_published(model, weights, mean, std)
            load_weights(clip, weights)
        self.prompts, self.num_classes = tuple(prompts), len(prompts)
        self.cutouts, self.cutout_scale = cutouts, tuple(cutout_scale)
        size = clip.visual.image_size
        self.size = size if isinstance(size, tuple) else (size, size)
        text_config = _read_config(model).get("text_cfg", {})
        with torch.no_grad():
            tokens = self._tokenize(clip.context_length, text_config.get("tokenizer_kwargs") or {})
            self.register_buffer("text", clip.eval().encode_text(tokens, normalize=True).float(), persistent=False)
            # 100 is the bound that CLIP was trained under.
            logit_scale = clip.logit_scale.exp().clamp(max=100).reshape(())
        self.register_buffer("logit_scale", logit_scale.clone(), persistent=False)
        self.visual = clip.visual
        self.standardize = Standardize(mean, std)

    def _tokenize(self, context_length: int, options: Mapping[str, Any]) -> Tensor:
        """``(K, context_length)`` numbers of word pieces."""
        tokenizer = _import_open_clip().SimpleTokenizer(context_length=context_length, **options)
        for prompt in self.prompts:
            needed = len(tokenizer.encode(prompt)) + 2  # with a beginning and an end
            if needed > context_length:
                raise ValueError(
                    f"prompts: shorten {prompt!r}: of its {needed} tokens the model reads {context_length}"
                )
        return tokenizer(list(self.prompts))

    def check_image(self, shape: Sequence[int]) -> None:
        if shape[0] != 3:
            raise ValueError(f"CLIP sees images of 3 colors, not of {shape[0]}")

    def _views(self, x: Tensor, t: Tensor | None) -> list[Tensor]:
        """The full image and the cut-outs, ``(N, 3, *size)`` each."""
        # Filled on the device; from Python's numbers it would be an upload, for which the host waits.
        sides = torch.stack([torch.full((), side, dtype=torch.float64, device=x.device) for side in x.shape[-2:]])
        starts, lengths = [torch.zeros_like(sides)], [sides]
        low, high = self.cutout_scale
        for number in range(self.cutouts):
            u = low_discrepancy((torch.zeros(len(x), device=x.device) if t is None else t) * self.cutouts + number)
            share = low + (high - low) * u[:, :1]
            starts.append(u[:, 1:] * (1 - share) * sides)
            lengths.append(share * sides)
        views = []
        for start, length in zip(starts, lengths, strict=True):
            rows, columns = (
                resampling_matrix(start[..., axis], length[..., axis], x.shape[axis - 2], self.size[axis]).to(x.dtype)
                for axis in (0, 1)
            )
            if start.ndim == 2:  # a cut-out of its own for each sample, the same for its colors
                rows, columns = rows.unsqueeze(1), columns.unsqueeze(1)
            wide = (x @ columns.mT).clamp(-_BOUND, _BOUND)  # as Pillow: first along the lines, 8 bits after each pass
            views.append((wide.mT @ rows.mT).mT.clamp(-_BOUND, _BOUND))
        return views

    def similarity(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Cosine between images ``(N, 3, H, W)`` in [-1, 1] and each prompt, ``(N, K)`` in [-1, 1]; the mean over cut-outs."""
        with autocast(x.device, None):
            shown = self.standardize(torch.cat(self._views(as_float(x), t)))
        with autocast(x.device, None if self.dtype == torch.float32 else self.dtype):
            embedding = (self._compiled or self.visual)(shown).to(self.text.dtype)
        with autocast(x.device, None):
            embedding = F.normalize(embedding, dim=-1).view(-1, len(x), self.text.shape[1]).mean(0)
            return embedding @ self.text.T

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        return self.temper(self.logit_scale * self.similarity(x, t), t)
