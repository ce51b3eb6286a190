"""The modules that predict: guided sampling, and denoising of a data set to train classifiers on."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib_guidance.backend.compilation import eager
from calib_guidance.classifiers.base import Classifier
from calib_guidance.classifiers.noise_aware import NoiseAwareClassifier
from calib_guidance.data.requests import DenoiseRequests
from calib_guidance.denoisers import Combination
from calib_guidance.denoisers.base import Denoiser
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.diffusion.schedules import named_betas
from calib_guidance.errors import ConfigurationError
from calib_guidance.guidance import Guidance
from calib_guidance.samplers.base import Sampler
from calib_guidance.samplers.evaluate import Evaluate, plan_of
from calib_guidance.scores.base import Score
from calib_guidance.tasks.base import tell_smoothing
from calib_guidance.tasks.retry import FaultTolerant, FirstNonFinite, Samples, in_float32
from calib_guidance.training.inputs import DenoisedInput, Precision


def _one_class_problems(score: Score) -> Iterator[str]:
    """Of one class, whose probability is 1 whatever the logit, most scores have no gradient."""
    with torch.enable_grad():
        logits = torch.zeros(score.group_size, 1, requires_grad=True)
        value = score(logits, torch.zeros(score.group_size, dtype=torch.long)).sum()
        (gradient,) = torch.autograd.grad(value, logits)
    if not (gradient > 0).all():
        yield (
            f"the requests have one class, and {type(score).__name__} is always equally certain of it, so it cannot guide: "
            "set the score to TemperedLogProb with tau2: 0, which climbs the logit itself, or give classes to choose from"
        )


class GuidedSampling(FaultTolerant):
    """Samples the requests of the data module; see :class:`~calib_guidance.tasks.retry.FaultTolerant` for failures.

    Callbacks that watch the trajectory register with ``context.observe`` in their ``setup``.

    Args:
        denoiser: the diffusion model, possibly under classifier-free guidance.
        sampler: the sampling loop.
        guidance: classifier guidance; None samples the model as it is.
    """

    def __init__(self, denoiser: Denoiser, sampler: Sampler, guidance: Guidance | None = None):
        super().__init__()
        self.denoiser, self.sampler, self.guidance = denoiser, sampler, guidance
        self.group_size = guidance.group_size if guidance is not None else 1
        self._checked = self._told_smoothing = False

    @property
    def num_classes(self) -> int | None:
        """Classes of the denoiser, else of the first classifier; None where nothing has classes."""
        classifiers = [part.classifier for part in self._parts() if hasattr(part, "classifier")]
        known = (part.num_classes for part in (self.denoiser, *classifiers))
        return next((count for count in known if count is not None), None)

    def _parts(self) -> Sequence[Guidance]:
        return () if self.guidance is None else self.guidance.parts()

    def check(self) -> None:
        if self._checked:
            return
        # Nothing is compiled for the single images that are looked at here.
        with eager():
            for problem in self.problems():
                raise ConfigurationError(problem)
        self._checked = True

    def problems(self) -> Iterator[str]:
        """Why the parts of this run cannot go together, one reason after the other."""
        try:
            yield from self._problems()
        except ValueError as error:  # without this part nothing else can be looked at
            yield str(error)

    def _problems(self) -> Iterator[str]:
        if self.guidance is not None and self.trainer.predict_loop.inference_mode:
            yield "guidance takes gradients, and PyTorch's inference mode turns them off: set trainer.inference_mode to false"
        requests = self.trainer.datamodule
        self.sampler.check(self.denoiser, self.guidance)
        with torch.no_grad():  # a corner is enough to see whether there is a decoder
            self.denoiser.decode(torch.zeros(1, *self.denoiser.image_shape, device=self.device)[..., :4, :4])
        self.give_num_classes(requests, self.num_classes)
        yield from self._class_problems(requests.num_classes)
        group = self.group_size
        for name in ("batch_size", "shard_size", "num_samples"):
            if (getattr(requests, name) or 0) % group:
                yield (
                    f"the score tilts over groups of {group} samples, so data.{name} must be a multiple of {group}, "
                    f"got {getattr(requests, name)}"
                )

    def _class_problems(self, num_classes: int) -> Iterator[str]:
        if self.denoiser.num_classes not in (None, num_classes):
            yield (
                f"the requests have {num_classes} classes, the denoiser {self.denoiser.num_classes}: set "
                "data.num_classes to the denoiser's, or its class_conditional to false"
            )
        levels = self.sampler.levels(self.denoiser)
        one = torch.zeros(1, dtype=torch.long, device=self.device)
        for part in self._parts():
            if not part.plan(levels).active.any():
                continue  # switched off: its classifier is not run, not even to look at it
            if part.apply_to == "cfg_residual" and not isinstance(self.denoiser, Combination):
                yield "cfg_residual needs classifier-free guidance: wrap the denoiser in Combination, or set apply_to to score"
            image = torch.zeros(1, *self.denoiser.image_shape, device=self.device)
            if part.classifier_input == "x0":
                with torch.no_grad():
                    image = part.seen((part.decoder or self.denoiser.decode)(image))
            yield from self._classifier_problems(part.classifier, image, num_classes, one)
            yield from self._noise_problems(part.classifier)
            if num_classes == 1:
                yield from _one_class_problems(part.score)

    def _classifier_problems(
        self, classifier: Classifier, image: Tensor, num_classes: int, step: Tensor
    ) -> Iterator[str]:
        size = "×".join(map(str, image.shape[1:]))
        try:
            classifier.check_image(tuple(image.shape[1:]))
            with torch.no_grad():
                logits = classifier(image, step)
        except (ValueError, RuntimeError) as error:
            yield f"the classifier cannot take images of {size}: {error}"
            return
        if logits.shape != (1, num_classes):
            yield (
                f"the requests have {num_classes} classes, the classifier {logits.shape[-1]}: name a classifier of these "
                "classes, or set data.num_classes"
            )

    def _noise_problems(self, classifier: Classifier) -> Iterator[str]:
        """The t that a classifier is told must be of the noise that it was trained on."""
        parts = [module for module in classifier.modules() if isinstance(module, Classifier)]
        steps = {part.num_steps for part in parts if isinstance(part.temperature, list)}
        for num_steps in sorted(steps - {len(self.denoiser.schedule)}):
            yield (
                f"the classifier has a temperature for each range of t in a process of {num_steps} steps, and the denoiser's has "
                f"{len(self.denoiser.schedule)}: fit the temperatures for this process, or set the classifier's temperature to "
                "one number"
            )
        known = {part.noise_schedule for part in parts if isinstance(part, NoiseAwareClassifier)}
        for name in sorted(known - {None}):
            expected, found = named_betas(name), self.denoiser.schedule
            if len(found) != len(expected) or not np.allclose(found.alphas_cumprod, np.cumprod(1 - expected)):
                yield (
                    f"the classifier was trained on the noise of a {name} schedule of {len(expected)} steps, and the "
                    "denoiser's t means other noise, so that it would see more or less than it is told: set the denoiser's "
                    f"noise_schedule to {name} if its network knows σ alone (EDM), or name a classifier of its schedule"
                )

    def networks(self) -> dict[str, nn.Module]:
        return {"denoiser": self.denoiser} | ({} if self.guidance is None else {"guidance": self.guidance})

    def attempt(self, batch: dict[str, Tensor], float32: bool) -> tuple[dict[str, Tensor], Tensor]:
        noise = SampleStreams(batch["seed"].tolist(), batch["index"].tolist(), self.denoiser.image_shape, self.device)
        watch = FirstNonFinite()
        with in_float32(*self.networks().values()) if float32 else contextlib.nullcontext():
            observers = [watch, *self.context.observers]
            x0 = self.sampler(self.denoiser, noise, batch["label"], self.guidance, observers, self._show_progress)
            image = self.denoiser.decode(x0)
            if not self._told_smoothing:
                self._told_smoothing = True
                for part in self._parts():
                    tell_smoothing(part, part.seen(image if part.decoder is None else part.decoder(x0)))
            return {"image": image}, watch.t

    def _show_progress(self, step: int, num_steps: int) -> None:
        """A batch that is half done counts half."""
        done = self.num_done + len(self.context.indices) * step / num_steps
        self.context.progress(done, f"step {step}/{num_steps}")

    def evaluate_once(self) -> None:
        levels, device = self.sampler.evaluated(self.denoiser), self.device
        noise = SampleStreams([0] * self.group_size, range(self.group_size), self.denoiser.image_shape, device)
        y = torch.zeros(self.group_size, dtype=torch.long, device=device)
        x = self.sampler.start(noise, levels)
        (guided,) = np.nonzero(plan_of(self.guidance, levels).active)
        level = int(guided[-1]) if len(guided) else len(levels.times) - 1
        Evaluate(self.sampler, self.denoiser, self.guidance, y, x)(x, level)
        self.denoiser.decode(x.float())


class DenoiseImages(FaultTolerant):
    """Denoises the images of :class:`~calib_guidance.data.DenoiseRequests`: x̂0(x_t) with t, for SampleWriter to write.

    What ``fit`` computes at every step with :class:`~calib_guidance.training.DenoisedInput` is computed once here. Written as
    8-bit images, it is off by half a gray level at most (1/255 on the scale of [-1, 1]), and by nothing on average where the
    writer's ``uint8_rule`` is ``round_up_half``.

    Args:
        denoiser: the diffusion model to be guided; a class-conditional one is given the labels.
        steps, weights, precision: see :class:`~calib_guidance.training.DenoisedInput`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        steps: str | int | None = None,
        weights: Sequence[float] | None = None,
        precision: Precision = "bf16",
    ):
        super().__init__()
        self.input_transform = DenoisedInput(denoiser, steps, weights, precision)

    def check(self) -> None:
        requests = self.trainer.datamodule
        if not isinstance(requests, DenoiseRequests):
            raise ConfigurationError(
                "DenoiseImages needs images: set data.class_path to calib_guidance.data.DenoiseRequests, got "
                f"{type(requests).__name__}"
            )
        self.input_transform.check_image(requests.image_shape)
        self.give_num_classes(requests, self.input_transform.denoiser.num_classes)
        self.input_transform.check_classes(requests.num_classes)

    def networks(self) -> dict[str, nn.Module]:
        return {"denoiser": self.input_transform.denoiser}

    def evaluate_once(self) -> None:
        image = torch.zeros(1, *self.trainer.datamodule.image_shape, device=self.device)
        zero = torch.zeros(1, dtype=torch.long, device=self.device)
        self.input_transform({"index": zero, "source": zero, "label": zero, "seed": zero, "image": image}, 0)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Samples:
        if not len(batch["index"]):  # no image of it can be read
            return Samples({"image": batch["image"], "t": batch["index"]}, [])
        return super().predict_step(batch, batch_idx)

    def attempt(self, batch: dict[str, Tensor], float32: bool) -> tuple[dict[str, Tensor], Tensor]:
        """``image`` ``(N, C, H, W)`` in [-1, 1] and ``t`` ``(N,)`` for requests ``{index, source, label, seed, image}``."""
        seed = int(batch["seed"][0])
        if float32:
            with in_float32(self.input_transform.denoiser):
                images, t = self.input_transform(batch | {"image": batch["image"].float()}, seed, precision="fp32")
        else:
            images, t = self.input_transform(batch, seed)
        first_wrong = t.double().masked_fill(images.sum(dim=(1, 2, 3)).isfinite(), torch.nan)
        return {"image": images, "t": t}, first_wrong
