"""Prompts as the conditions of text-to-image models, by their pipeline's own text encoders."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calib_guidance.errors import CheckpointError, ConfigurationError, check_installed
from calib_guidance.weights.hub import PREFIX

_BATCH = 32  # prompts that are encoded at a time


def text_pipeline(source: str) -> Any:
    """The pipeline of a folder or ``hf://OWNER/NAME[@REVISION]`` with its text encoders alone."""
    for library in ("diffusers", "transformers"):
        check_installed(library, "text", "a text encoder")
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline  # seconds to import

    name, _, revision = source.removeprefix(PREFIX).partition("@")
    config: Any = DiffusionPipeline.load_config(name, revision=revision or None)
    parts = {part: kind for part, kind in config.items() if isinstance(kind, list | tuple) and not part.startswith("_")}
    texts = {part for part in parts if part.startswith(("text_encoder", "tokenizer"))}
    if unknown := [str(parts[part][0]) for part in texts if parts[part][0] not in ("transformers", None)]:
        raise CheckpointError(
            f"{source}: its text encoders are of {unknown[0]}, which is not run; expected transformers"
        )
    others = {part: None for part in parts if part not in texts}
    return DiffusionPipeline.from_pretrained(name, revision=revision or None, **others)


@torch.no_grad()
def encode_prompts(
    pipeline: Any, prompts: Sequence[str], negative_prompt: str | None, names: Sequence[str]
) -> Mapping[str, Tensor]:
    """Conditions ``(K + 1, …)`` of K prompts, the last row the negative prompt's, by the names of the model's arguments.

    Args:
        pipeline: one whose ``encode_prompt`` returns embeddings, those of the negative prompt, and where ``names`` has two
            both pooled (Stable Diffusion 1, 2, XL and 3); or embeddings and pooled ones (Flux).
        prompts: a prompt per class.
        negative_prompt: None is the pipeline's own: the empty prompt, of some zeros.
        names: of the model's arguments.
    """
    if isinstance(prompts, str) or not prompts:
        raise ConfigurationError(f"prompts: expected a list with a prompt per class, got {prompts!r}")
    if not hasattr(pipeline, "encode_prompt"):
        raise ConfigurationError(f"{type(pipeline).__name__} encodes no prompts: give class labels instead of prompts")
    accepted = inspect.signature(pipeline.encode_prompt).parameters
    device = pipeline.text_encoder.device
    given = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    given |= {"prompt_2": None, "prompt_3": None}
    rows: list[list[Tensor]] = [[] for _ in names]
    last: list[Tensor] = []
    for start in range(0, len(prompts), _BATCH):
        batch = list(prompts[start : start + _BATCH])
        negative = None if negative_prompt is None else [negative_prompt] * len(batch)
        stated = {name: value for name, value in given.items() if name in accepted}
        if "negative_prompt" not in accepted:  # Flux: each prompt on its own
            encoded = pipeline.encode_prompt(prompt=batch, **stated)
            none = pipeline.encode_prompt(prompt=[negative_prompt or ""], **stated)
            encoded = [part for pair in zip(encoded, none, strict=True) for part in pair]
        else:
            encoded = pipeline.encode_prompt(prompt=batch, negative_prompt=negative, **stated)
        for k, row in enumerate(rows):
            row.append(encoded[2 * k])
        last = [encoded[2 * k + 1][:1] for k in range(len(names))]
    return {name: torch.cat([*row, end]) for name, row, end in zip(names, rows, last, strict=True)}
