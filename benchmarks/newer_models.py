"""Operations and memory of the published models at full width, and of ResNet-101 guiding them.

    python benchmarks/newer_models.py

Counted on the meta device, without weights: multiply and add each one, per image and evaluation. Guidance is the way through the
decoder and the classifier, forward and backward to x̂0. Memory is that of the weights in float16, and of the activations of one
guided image in float32.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from calib_guidance.backend.counters import FlopCounter, PeakMemory
from calib_guidance.denoisers import RAEDecoder, VAEDecoder
from calib_guidance.weights.registry import CARDS, make_network

SD = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2}
SD |= {"block_out_channels": [128, 256, 512, 512]}
VAVAE = dict(CARDS["vavae_f16d32"].arguments)
RAE = {256: 257, 512: 1025}  # tokens of the decoder
MODELS: dict[str, dict | int] = {
    "adm_imagenet64": {},
    "adm_imagenet128": {},
    "adm_imagenet256": {},
    "adm_imagenet512": {},
    "edm_imagenet64": {},
    "edm2_img64_s": {},
    "edm2_img64_xl": {},
    "edm2_img512_xs": SD,
    "edm2_img512_s": SD,
    "edm2_img512_xxl": SD,
    "dit_xl_2_256": SD,
    "dit_xl_2_512": SD,
    "sit_xl_2_256": SD,
    "repa_xl_2_256": SD,
    "sit_ig_xl_2_256": SD,
    "lightningdit_xl_1_256": VAVAE,
    "lightningdit_ig_xl_1_256": VAVAE,
    "repae_xl_1_256": VAVAE,
    "rae_ditdh_s_256": 256,
    "rae_ditdh_xl_256": 256,
    "rae_ditdh_s_512": 512,
    "rae_ditdh_xl_512": 512,
}


def counted(function: nn.Module, *inputs: Tensor) -> float:
    """Operations of a call, in 10⁹."""
    with FlopCounter() as flops, sdpa_kernel(SDPBackend.MATH):
        function(*inputs)
    return flops.get_total_flops() / 1e9


def decoder_of(name: str) -> nn.Module:
    """From latents to images, or the identity."""
    source = MODELS[name]
    if isinstance(source, int):
        decoder = RAEDecoder(None)
        decoder.decoder_pos_embed = torch.zeros(1, RAE[source], decoder.decoder_pos_embed.shape[-1])
        return decoder
    return VAEDecoder(source) if source else nn.Identity()


def row(name: str) -> str:
    """One line of the table."""
    import torchvision

    with torch.device("meta"):
        network, decode = make_network(name, "float32").eval(), decoder_of(name).eval()
        classifier = torchvision.models.resnet101().eval()
        for part in (network, decode, classifier):
            part.requires_grad_(False)
        x = torch.zeros(1, network.in_channels, network.image_size, network.image_size)
        t, y = torch.zeros(1), torch.zeros(1, dtype=torch.long)
        emb = network.embed_time(t) + (0 if network.num_classes is None else network.embed_labels(y))
        with torch.no_grad():
            step = counted(network.decode, x, emb)
            through = counted(decode, x)

        def guide(x0: Tensor) -> None:
            image = decode(x0.requires_grad_())
            torch.autograd.grad(classifier(image).sum(), x0)

        both = counted(guide, x)
        with PeakMemory() as memory:
            guide(x)
    weights = sum(p.numel() for p in network.parameters())
    numbers = (
        f"{step:,.0f} | {through:,.0f} | {both:,.0f} | {both / (step + both):.2f} | {both / (2 * step + both):.2f}"
    )
    return f"| `{name}` | {2 * weights / 1e9:.2f} | {numbers} | {memory.peak / 1e9:.1f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in MODELS or name not in CARDS]:
        parser.error(f"unknown {', '.join(unknown)}")
    print(
        "| model | weights, GB | one NFE | decoder | guidance | fraction of a guided step | with two NFE | memory, GB |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name in options.names:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
