"""What classifier guidance costs, against its fraction of the operations of a step.

    python benchmarks/guidance_share.py

Complete short trajectories with and without guidance take turns; the guidance's fraction of the time is what the guided one takes
more. Operations are counted, multiply and add each one. A classifier that is as well suited to the machine as the network is has
the same fraction of both.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from timing import Ratio, in_turns, keep, machine, parser
from torch import Tensor

from calib_guidance.backend.counters import FlopCounter
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.denoisers import ADMDenoiser
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.guidance import ClassifierGuidance
from calib_guidance.networks import UNet
from calib_guidance.samplers import DDPM
from calib_guidance.scores import DivergenceRegularized

ADM64 = {"model_channels": 64, "out_channels": 6, "num_res_blocks": 2, "attention_resolutions": (2, 4, 8)}
ADM64 |= {"channel_mult": (1, 2, 3, 4), "num_classes": 1000, "num_head_channels": 64, "use_new_attention_order": True}
ADM64 |= {"use_scale_shift_norm": True, "resblock_updown": True}


def trajectory(
    denoiser: ADMDenoiser, guidance: ClassifierGuidance | None, steps: int, batch: int
) -> Callable[[], Tensor]:
    """Samples one batch."""

    def run() -> Tensor:
        noise = SampleStreams([0] * batch, range(batch), denoiser.image_shape)
        return DDPM(str(steps))(denoiser, noise, torch.arange(batch), guidance)

    return run


def main() -> None:
    """Print the table."""
    arguments = parser(__doc__, rounds=7)
    arguments.add_argument("--steps", type=int, default=4, help="of a trajectory (%(default)s)")
    arguments.add_argument("--batch", type=int, nargs="+", default=[2, 8], help="images (2 8)")
    options = arguments.parse_args()
    torch.manual_seed(0)
    denoiser = ADMDenoiser(UNet(64, 3, **ADM64))
    classifiers = {name: OffTheShelfClassifier(f"torchvision/{name}") for name in ("resnet50", "resnet101")}
    forms = {"none": None} | {
        name: ClassifierGuidance(classifier, DivergenceRegularized("js", alpha=0.1, tau2=0.5))
        for name, classifier in classifiers.items()
    }
    print(f"ADM-64 at 64 channels, js guidance on x̂0; {machine()}, {options.rounds} rounds, {options.steps} steps\n")
    print(
        "| guided by | batch | fraction of operations | fraction of time (min … max) | time / operations | ms a step |"
    )
    print("|---|---:|---:|---:|---:|---:|")
    ratios = {}
    for batch in options.batch:
        runs = {name: trajectory(denoiser, guide, options.steps, batch) for name, guide in forms.items()}
        counts = {}
        for name, run in runs.items():
            with FlopCounter() as flops:
                run()
            counts[name] = flops.get_total_flops()
        times = in_turns(runs, options.rounds)
        for name in classifiers:
            by_operations = 1 - counts["none"] / counts[name]
            by_time = Ratio.of([1 - plain / guided for plain, guided in zip(times["none"], times[name], strict=True)])
            each = 1e3 * statistics.median(times[name]) / options.steps
            print(
                f"| {name} | {batch} | {100 * by_operations:.1f} % | {100 * by_time.median:.1f} % ({100 * by_time.low:.1f} … "
                f"{100 * by_time.high:.1f}) | {by_time.median / by_operations:.2f} | {each:.0f} |"
            )
            fractions = [
                by_operations / max(fraction, 1e-3) for fraction in (by_time.median, by_time.high, by_time.low)
            ]
            ratios[f"{name}, batch {batch}: fraction of operations / fraction of time"] = Ratio(
                *fractions, options.rounds
            )
    keep(options.json, "guidance_share", ratios)


if __name__ == "__main__":
    main()
