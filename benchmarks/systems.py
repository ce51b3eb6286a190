"""Complete published systems: images per second, arithmetic against what the device's matrix products reach, what guidance takes.

    python benchmarks/systems.py                  # on a GPU: full size, bfloat16, at most 10 minutes
    python benchmarks/systems.py --width reduced  # on a CPU: the same parts, narrow, float32
    python benchmarks/systems.py --tiny           # a minute at most: does every part run?

Random weights, which cost what trained ones do. Short trajectories of each kind of guidance take turns, and the images per second
are those of the number of steps that was published. Operations are counted, multiply and add each one. On a GPU a
trajectory that waits for the device anywhere between its first and its last step is an error. ``expected`` is the time by the
cost model: on a GPU that it names from public peak rates, on a CPU from measured speeds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from timing import Ratio, in_turns, keep, machine, parser, ratio, synchronize
from torch import Tensor
from torchvision.models.resnet import Bottleneck, ResNet

from calib_guidance.backend.cost import GPUS, Machine, Work, WorkCounter
from calib_guidance.backend.speeds import this_cpu
from calib_guidance.classifiers import OffTheShelfClassifier
from calib_guidance.denoisers import (
    ADMDenoiser,
    ClassifierFreeGuidance,
    Combination,
    Denoiser,
    DiTDenoiser,
    EDM2Denoiser,
    EDMDenoiser,
    FlowDenoiser,
    TinyDecoder,
)
from calib_guidance.diffusion.rng import SampleStreams
from calib_guidance.guidance import ClassifierGuidance, GradientReuse, Guidance
from calib_guidance.networks import DiT, EDM2UNet, UNet
from calib_guidance.samplers import DDPM, FlowODE, Heun, Sampler, StepRecord
from calib_guidance.scores import DivergenceRegularized, TemperedLogProb

UNET = {"num_res_blocks": 2, "num_classes": 1000, "num_head_channels": 64, "use_scale_shift_norm": True}
UNET |= {"resblock_updown": True, "attention_resolutions": (2, 4), "channel_mult": (1, 2, 3)}
VAE = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
VAE |= {"layers_per_block": 2, "latent_channels": 4}
TINY_DECODER = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
# Width of UNets, side of their images, sizes of transformers and of the autoencoder, by width of the systems.
NARROW = {
    "reduced": (64, 32, {"sample_size": 16, "hidden_size": 384, "depth": 12, "num_heads": 6}, (32, 64, 128, 128)),
    "tiny": (32, 8, {"sample_size": 4, "hidden_size": 32, "depth": 1, "num_heads": 2}, (32, 32)),
}


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


class Build(NamedTuple):
    """How systems are built."""

    width: str
    dtype: str
    compiled: bool

    @property
    def full(self) -> bool:
        return self.width == "full"

    def unet(self, published: str, **options: int) -> UNet | str:
        """A published UNet by name, or a narrow one."""
        if self.full:
            return published
        channels, side, _, _ = NARROW[self.width]
        few = {"num_res_blocks": 1, "channel_mult": (1,), "attention_resolutions": (1,), "num_head_channels": 32}
        return UNet(side, 3, channels, **options, **UNET | (few if self.width == "tiny" else {}))

    def dit(self, published: str) -> DiT | str:
        return published if self.full else DiT(**NARROW[self.width][2])

    def latent(self) -> dict[str, Any]:
        """Options of latent models."""
        widths = (128, 256, 512, 512) if self.full else NARROW[self.width][3]
        types = {"dtype": self.dtype, "vae_dtype": self.dtype} if self.full else {}
        vae = VAE | {"block_out_channels": widths}
        if self.width == "tiny":
            few = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
            vae |= few | {"layers_per_block": 1}
        return {"vae": vae, "decode_batch": 8, "compile": self.compiled, **types}

    def pixel(self) -> dict[str, Any]:
        """Options of models of images."""
        return {"dtype": self.dtype if self.full else None, "compile": self.compiled}

    def classifier(self) -> OffTheShelfClassifier:
        """ResNet-101, or a narrow ResNet."""
        if self.full:
            return OffTheShelfClassifier("torchvision/resnet101", 1000, dtype=self.dtype, compile=self.compiled)
        layers = [1, 1, 2, 1] if self.width == "reduced" else [1, 1, 1, 1]
        return OffTheShelfClassifier(ResNet(Bottleneck, layers, width_per_group=16), 1000, compile=self.compiled)

    def decoded(self, **options: str) -> dict[str, Guidance | None]:
        """Guidance on decoded images, by name."""
        shared = {"classifier": self.classifier(), "scale": 0.5, **options}
        return {
            "none": None,
            "full decoder": ClassifierGuidance(**shared),
            "full decoder, reused 4 times": ClassifierGuidance(**shared, reuse=GradientReuse(4)),
            "tiny autoencoder": ClassifierGuidance(**shared, decoder=TinyDecoder({} if self.full else TINY_DECODER)),
        }


def adm128(build: Build) -> System:
    """ADM at 128×128 under ResNet-101 with the Jensen–Shannon score."""
    denoiser = ADMDenoiser(build.unet("adm_imagenet128", out_channels=6), **build.pixel())
    js = ClassifierGuidance(build.classifier(), DivergenceRegularized("js", alpha=0.1, tau2=0.5), scale=1.0)
    return System(denoiser, lambda n: DDPM(str(n)), {"none": None, "ResNet-101, js": js}, 250, (64, 4))


def dit(build: Build) -> System:
    """DiT-XL/2 under classifier-free guidance, and with a classifier on decoded images."""
    free = Combination(
        DiTDenoiser(build.dit("dit_xl_2_256"), **build.latent()), ClassifierFreeGuidance(1.5), channels=3
    )
    return System(free, lambda n: DDPM(str(n)), build.decoded(apply_to="cfg_residual"), 250, (16, 1))


def sit(build: Build) -> System:
    """SiT-XL/2 with its ODE, and with a classifier on decoded images."""
    denoiser = FlowDenoiser(build.dit("sit_xl_2_256"), **build.latent())
    return System(denoiser, lambda n: FlowODE(n), build.decoded(), 125, (16, 1))


def edm2(build: Build) -> System:
    """EDM2-S at 512×512 in latents, 32 Heun steps, and with a classifier on decoded images."""
    if build.full:
        network: EDM2UNet | str = "edm2_img512_s"
    else:
        channels, side, _, _ = NARROW[build.width]
        few = {"channel_mult": (1, 2, 3), "num_blocks": 2} if build.width == "reduced" else {"channel_mult": (1,)}
        network = EDM2UNet(side, 4, 1000, channels, channels_per_head=32, **{"num_blocks": 1} | few)
    denoiser = EDM2Denoiser(network, **build.latent())
    return System(denoiser, lambda n: Heun(n, float32_state=True), build.decoded(), 32, (16, 1))


def edm64(build: Build) -> System:
    """EDM at 64×64, 18 Heun steps, arXiv 2310.11311's Algorithm 2."""
    denoiser = EDMDenoiser(build.unet("edm_imagenet64", out_channels=3), **build.pixel())
    shift = {"scale": 0.004, "classifier_input": "x_t_normalized", "apply_to": "sample"}
    guide = ClassifierGuidance(build.classifier(), TemperedLogProb(tau2=0.0), **shift)
    return System(denoiser, lambda n: Heun(n), {"none": None, "ResNet-101, Algorithm 2": guide}, 18, (128, 4))


COLUMNS = ("system", "guidance", "batch", "images per second", "TFLOP/s", "matrix products")
COLUMNS += ("guidance, of the step", "by operations", "expected / measured", "peak, GiB")
SYSTEMS = {"ADM-128": adm128, "EDM2-S": edm2, "SiT-XL/2": sit, "DiT-XL/2": dit, "EDM-64": edm64}


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


def matrix_products(device: str, dtype: torch.dtype, size: int | None = None) -> tuple[Callable[[], None], float]:
    """Large matrix products, as fast as the device makes them, and how many operations they are."""
    n, times = (size, 5) if size else (8192, 20) if device == "cuda" else (2048, 5)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    return run, 2 * n**3 * times


def operators(system: System, steps: int, batch: int) -> dict[str, list[Work]]:
    """Those of a trajectory of a batch, by kind of guidance; the system is on the meta device."""
    works = {}
    for kind, guidance in system.guidances.items():
        with WorkCounter() as counter:
            trajectory(system, guidance, steps, batch, "meta")()
        works[kind] = counter.take()
    return works


def model_of(device: str) -> Machine | None:
    """The cost model of this device, where there is one."""
    if device == "cpu":
        return this_cpu()
    return next((gpu for name, gpu in GPUS.items() if name in torch.cuda.get_device_name()), None)


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
    arguments.add_argument("--tiny", action="store_true", help="the smallest networks: a test of this program")
    arguments.add_argument(
        "--minutes", type=float, default=10.0, help="after which no measurement starts (%(default)g)"
    )
    arguments.add_argument("--compile", action="store_true", help="compile the networks")
    options = arguments.parse_args()
    build = Build("tiny" if options.tiny else options.width, options.dtype, options.compile)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype) if build.full else torch.float32
    products, product_operations = matrix_products(device, dtype, 256 if options.tiny else None)
    model, deadline = model_of(device), time.monotonic() + 60 * options.minutes
    print(f"{machine()}, {build.width} width, {options.steps} steps, at most {options.rounds} rounds\n")
    print(f"| {' | '.join(COLUMNS)} |\n|---|---|{'---:|' * (len(COLUMNS) - 2)}")
    ratios: dict[str, Ratio] = {}
    for done, name in enumerate(options.system):
        if time.monotonic() > deadline:
            print(f"| {name} | not measured: the {options.minutes:g} minutes are over |")
            continue
        make = SYSTEMS[name]
        with torch.device("meta"):
            twin = make(build._replace(compiled=False))
        system = make(build)
        batch = options.batch or (1 if options.tiny else system.batch[device == "cpu"])
        works = operators(twin, options.steps, batch)
        counts = {kind: sum(work.flops for work in each) / batch for kind, each in works.items()}
        system.denoiser.to(device)
        runs, peaks = {}, {}
        for kind, guidance in system.guidances.items():
            runs[kind] = trajectory(system, guidance and guidance.to(device), options.steps, batch, device)
            peaks[kind] = watched(runs[kind]) if device == "cuda" else None
        # What is left of the time, in equal parts; a round was run to warm up.
        started = time.monotonic()
        in_turns(runs, 0)
        each = max(time.monotonic() - started, 1e-3)
        left = (deadline - time.monotonic()) / (len(options.system) - done)
        times = in_turns(runs | {"products": products}, max(1, min(options.rounds, int(left / each) - 1)))
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
            of_model = None if model is None else model.seconds(works[kind]) / statistics.median(seconds)
            cells.append("–" if of_model is None else f"{of_model:.2f}")
            cells.append("–" if peaks[kind] is None else f"{peaks[kind]:.1f}")
            print(f"| {' | '.join(map(str, cells))} |")
            ratios[f"{name}, {kind}: fraction of matrix products"] = of_products
    keep(options.json, f"systems, {build.width}", ratios)


if __name__ == "__main__":
    main()
