"""Complete published systems: images per second, arithmetic against what the device's matrix products reach, what guidance takes.

    python benchmarks/systems.py                  # on a GPU: full size, bfloat16
    python benchmarks/systems.py --width reduced  # on a CPU: the same parts, narrow, float32

Random weights, which cost what trained ones do. Short trajectories of each kind of guidance take turns, and the images per second
are those of the number of steps that was published. Operations are counted, multiply and add each one. On a GPU a
trajectory that waits for the device anywhere between its first and its last step is an error.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from timing import Ratio, in_turns, keep, machine, parser, ratio, synchronize
from torch import Tensor
from torchvision.models.resnet import Bottleneck, ResNet

from calib_guidance.backend.counters import FlopCounter
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.denoisers import (
    ADMDenoiser,
    ClassifierFreeGuidance,
    Combination,
    Denoiser,
    DiTDenoiser,
    EDMDenoiser,
    TinyDecoder,
)
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.guidance import ClassifierGuidance, Guidance, GuidanceSchedule
from calib_guidance.networks import DiT, UNet
from calib_guidance.samplers import DDPM, Heun, Sampler, StepRecord
from calib_guidance.scores import DivergenceRegularized, TemperedLogProb

UNET = {"num_res_blocks": 2, "num_classes": 1000, "num_head_channels": 64, "use_scale_shift_norm": True}
UNET |= {"resblock_updown": True, "attention_resolutions": (2, 4), "channel_mult": (1, 2, 3)}
VAE = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
VAE |= {"layers_per_block": 2, "latent_channels": 4}
TINY = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}


class System(NamedTuple):
    """A diffusion model with the kinds of guidance that it is measured under.

    Attributes:
        denoiser: with random weights.
        sampler: of a number of steps.
        guidances: by name, without guidance first.
        published_steps: for which images per second are given.
        batch: images, on a GPU and on a CPU.
    """

    denoiser: Denoiser
    sampler: Callable[[int], Sampler]
    guidances: Mapping[str, Guidance | None]
    published_steps: int
    batch: tuple[int, int]


def classifier(full: bool) -> OffTheShelfClassifier:
    """ResNet-101, or a narrow ResNet."""
    network = "torchvision/resnet101" if full else ResNet(Bottleneck, [1, 1, 2, 1], width_per_group=16)
    return OffTheShelfClassifier(network, 1000)


def adm128(full: bool, dtype: str, compiled: bool) -> System:
    """ADM at 128×128 under ResNet-101 with the Jensen–Shannon score."""
    network = "adm_imagenet128" if full else UNet(32, 3, model_channels=64, out_channels=6, **UNET)
    denoiser = ADMDenoiser(network, dtype=dtype if full else None, compile=compiled)
    js = ClassifierGuidance(classifier(full), DivergenceRegularized("js", alpha=0.1, tau2=0.5), scale=1.0)
    return System(denoiser, lambda n: DDPM(str(n)), {"none": None, "ResNet-101, js": js}, 250, (64, 4))


def dit(full: bool, dtype: str, compiled: bool) -> System:
    """DiT-XL/2 under classifier-free guidance, and with a classifier on decoded images."""
    vae = VAE | ({"block_out_channels": (128, 256, 512, 512)} if full else {"block_out_channels": (32, 64, 128, 128)})
    network = "dit_xl_2_256" if full else DiT(16, 2, 384, 12, 6)
    types = {"dtype": dtype, "vae_dtype": dtype} if full else {}
    denoiser = DiTDenoiser(network, vae=vae, decode_batch=8, compile=compiled, **types)
    free = Combination(denoiser, ClassifierFreeGuidance(1.5), channels=3)
    shared = {"classifier": classifier(full), "scale": 0.5, "apply_to": "cfg_residual"}
    guidances = {
        "none": None,
        "full decoder": ClassifierGuidance(**shared),
        "full decoder, every 4th step": ClassifierGuidance(**shared, schedule=GuidanceSchedule(every=4)),
        "tiny autoencoder": ClassifierGuidance(**shared, decoder=TinyDecoder({} if full else TINY)),
    }
    return System(free, lambda n: DDPM(str(n)), guidances, 250, (16, 1))


def edm64(full: bool, dtype: str, compiled: bool) -> System:
    """EDM at 64×64, 18 Heun steps, arXiv 2310.11311's Algorithm 2."""
    network = "edm_imagenet64" if full else UNet(32, 3, model_channels=64, out_channels=3, **UNET)
    denoiser = EDMDenoiser(network, dtype=dtype if full else None, compile=compiled)
    shift = {"scale": 0.004, "classifier_input": "x_t_normalized", "apply_to": "sample"}
    guide = ClassifierGuidance(classifier(full), TemperedLogProb(tau2=0.0), **shift)
    return System(denoiser, lambda n: Heun(n), {"none": None, "ResNet-101, Algorithm 2": guide}, 18, (128, 4))


COLUMNS = ("system", "guidance", "batch", "images per second", "TFLOP/s", "matrix products")
COLUMNS += ("guidance, of the step", "by operations", "peak, GiB")
SYSTEMS = {"ADM-128": adm128, "DiT-XL/2": dit, "EDM-64": edm64}


class NoWaiting:
    """An observer that makes waiting for the device an error from the end of the first step on."""

    def __call__(self, record: StepRecord) -> None:
        torch.cuda.set_sync_debug_mode("error" if record.i else "default")


def trajectory(system: System, guidance: Guidance | None, steps: int, batch: int, device: str) -> Callable[..., Tensor]:
    """Samples one batch; with observers, as they are given."""

    def run(*observers: NoWaiting) -> Tensor:
        noise = SampleStreams([0] * batch, range(batch), system.denoiser.image_shape, device)
        y = torch.arange(batch, device=device)
        return system.sampler(steps)(system.denoiser, noise, y, guidance, observers)

    return run


def matrix_products(device: str, dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """Large matrix products, as fast as the device makes them, and how many operations they are."""
    n, times = (8192, 20) if device == "cuda" else (2048, 5)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    return run, 2 * n**3 * times


def operations(system: System, steps: int) -> dict[str, float]:
    """Of a trajectory of one image, by kind of guidance; the system is on the meta device."""
    counts = {}
    for kind, guidance in system.guidances.items():
        with FlopCounter() as flops:
            trajectory(system, guidance, steps, 1, "meta")()
        counts[kind] = flops.get_total_flops()
    return counts


def watched(run: Callable[..., Tensor]) -> float:
    """GiB at the peak of a trajectory that may not wait for the device, after one that warms up."""
    run()
    torch.cuda.reset_peak_memory_stats()
    run(NoWaiting())
    synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    """Print the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--width", choices=("full", "reduced"), default="full" if device == "cuda" else "reduced")
    arguments.add_argument("--system", choices=SYSTEMS, nargs="+", default=list(SYSTEMS), help="(all)")
    arguments.add_argument("--steps", type=int, default=4, help="of a timed trajectory (%(default)s)")
    arguments.add_argument("--batch", type=int, help="images; the default grows it as long as that helps")
    arguments.add_argument("--dtype", default="bfloat16", help="of networks at full width (%(default)s)")
    arguments.add_argument("--compile", action="store_true", help="compile the networks")
    options = arguments.parse_args()
    full = options.width == "full"
    torch.manual_seed(0)
    products, product_operations = matrix_products(device, getattr(torch, options.dtype) if full else torch.float32)
    print(f"{machine()}, {options.width} width, {options.steps} steps, {options.rounds} rounds\n")
    print(f"| {' | '.join(COLUMNS)} |\n|---|---|{'---:|' * (len(COLUMNS) - 2)}")
    ratios: dict[str, Ratio] = {}
    for name in options.system:
        make = SYSTEMS[name]
        with torch.device("meta"):
            twin = make(full, options.dtype, False)
        counts = operations(twin, options.steps)
        system = make(full, options.dtype, options.compile)
        system.denoiser.to(device)
        batch = options.batch or system.batch[device == "cpu"]
        runs, peaks = {}, {}
        for kind, guidance in system.guidances.items():
            runs[kind] = trajectory(system, guidance and guidance.to(device), options.steps, batch, device)
            peaks[kind] = watched(runs[kind]) if device == "cuda" else None
        times = in_turns(runs | {"products": products}, options.rounds)
        rates = [product_operations / s / 1e12 for s in times.pop("products")]
        for kind, seconds in times.items():
            speeds = [batch * counts[kind] / s / 1e12 for s in seconds]
            of_products = ratio(speeds, rates)
            images = batch * options.steps / system.published_steps / statistics.median(seconds)
            fraction = Ratio.of([1 - plain / s for plain, s in zip(times["none"], seconds, strict=True)])
            cells = [name, kind, batch, f"{images:.3g}", f"{statistics.median(speeds):.2f}"]
            cells.append(f"{statistics.median(rates):.2f} ({100 * of_products.median:.0f} %)")
            if kind == "none":
                cells += ["–", "–"]
            else:
                by_time = f"{100 * fraction.median:.1f} % ({100 * fraction.low:.1f} … {100 * fraction.high:.1f})"
                cells += [by_time, f"{100 * (1 - counts['none'] / counts[kind]):.1f} %"]
                ratios[f"{name}: unguided / {kind}"] = ratio(times["none"], seconds)
            cells.append("–" if peaks[kind] is None else f"{peaks[kind]:.1f}")
            print(f"| {' | '.join(map(str, cells))} |")
            ratios[f"{name}, {kind}: fraction of matrix products"] = of_products
    keep(options.json, f"systems, {options.width}", ratios)


if __name__ == "__main__":
    main()
