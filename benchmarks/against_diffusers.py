"""Classifier-free sampling of a DiT and its decoder against diffusers' own pipeline, with the same weights and noise.

    python benchmarks/against_diffusers.py

Both make the same images; the largest difference is printed. diffusers runs DiT with other time frequencies and another ε of its
LayerNorm than it was trained with; here its pipeline is given those of the training. diffusers computes the embedding of time and
class in every block of every step; here a trajectory computes it once.
"""

from __future__ import annotations

import statistics

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from timing import in_turns, keep, machine, parser, ratio
from torch import Tensor

from calib_guidance.denoisers import ClassifierFreeGuidance, Combination, DiTDenoiser
from calib_guidance.networks import DiT
from calib_guidance.samplers import DDIM
from calib_guidance.weights.dit import to_diffusers

WEIGHT = 4.0
SIZES = {  # width, depth, heads, latents' side; channels of the autoencoder
    "reduced": (384, 12, 6, 16, (32, 64, 128, 128)),
    "full": (1152, 28, 16, 32, (128, 256, 512, 512)),
}


def pair(size: str, device: str) -> tuple[Combination, DiTPipeline]:
    """The same model, here and in diffusers."""
    width, depth, heads, side, channels = SIZES[size]
    network = DiT(side, 2, width, depth, heads)
    # Blocks are trained from zero (adaLN-Zero): without weights there nothing would be compared.
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = AutoencoderKL(**blocks, block_out_channels=channels, layers_per_block=2, latent_channels=4).eval()
    theirs = DiTTransformer2DModel(**network.architecture, norm_eps=1e-6).eval()
    theirs.load_state_dict(to_diffusers(network.state_dict()))
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    pipeline = DiTPipeline(theirs, vae, scheduler).to(device)
    pipeline.set_progress_bar_config(disable=True)
    denoiser = DiTDenoiser(network, vae=vae, decode_batch=None)
    return Combination(denoiser, ClassifierFreeGuidance(WEIGHT), channels=4).to(device), pipeline


def main() -> None:
    """Print the table."""
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--size", choices=SIZES, default="reduced", help="full: DiT-XL/2 at 256×256 (%(default)s)")
    arguments.add_argument("--steps", type=int, default=5, help="a divisor of 1,000 (%(default)s)")
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="images (1 4)")
    options = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    denoiser, pipeline = pair(options.size, device)
    sampler = DDIM(f"ddim{options.steps}", clip_denoised=False)
    print(f"DiT, {options.size} width, {options.steps} DDIM steps; {machine()}, {options.rounds} rounds\n")
    print(
        "| batch | diffusers, s | here, s | diffusers / here (min … max) | largest difference |\n|---:|---:|---:|---:|---:|"
    )
    ratios = {}
    for batch in options.batch:
        noise = torch.randn(batch, *denoiser.image_shape, generator=torch.Generator().manual_seed(0))
        y = torch.arange(batch, device=device)

        def theirs(batch: int = batch) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                images = pipeline(list(range(batch)), WEIGHT, generator, options.steps, output_type="pt").images
            return 2 * images - 1

        def ours(noise: Tensor = noise, y: Tensor = y) -> Tensor:
            with torch.no_grad():
                return denoiser.decode(sampler(denoiser, lambda: noise.to(device), y)).clamp(-1, 1)

        difference = float((theirs() - ours()).abs().max())
        times = in_turns({"diffusers": theirs, "here": ours}, options.rounds)
        found = ratios[f"batch {batch}: diffusers / here"] = ratio(times["diffusers"], times["here"])
        medians = " | ".join(f"{statistics.median(seconds):.2f}" for seconds in times.values())
        print(f"| {batch} | {medians} | {found} | {difference:.1e} |")
    keep(options.json, f"against_diffusers, {options.size}", ratios)


if __name__ == "__main__":
    main()
