"""ADM's networks against guided-diffusion with the same weights."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import log_softmax

from calib_guidance.backend import tuning
from calib_guidance.backend.tuning import plain
from calib_guidance.denoisers import ADMDenoiser
from calib_guidance.networks import EncoderUNet, PatchUNet, UNet
from calib_guidance.networks.adm import AttentionBlock, ResBlock, timestep_embedding

IGNORED = {"dims", "use_checkpoint", "use_fp16", "pool", "num_classes", "num_heads_upsample"}


def unet(fixture, **changes):
    config = {
        k: v for k, v in fixture.json["config"].items() if k not in IGNORED - {"num_classes", "num_heads_upsample"}
    }
    network = UNet(**config | changes).eval()
    network.load_state_dict(fixture.weights())
    return network


@pytest.mark.parametrize("name", ["adm_unet_a", "adm_unet_b", "adm_unet_c"])
def test_unet_matches_the_reference(golden, name):
    fixture = golden(name)
    network = unet(fixture)
    y = fixture.tensors.get("y")
    fixture.assert_close("timestep_embedding", timestep_embedding(fixture["t"], network.model_channels))
    emb = network.embed_time(fixture["t"]) + (0 if y is None else network.embed_labels(y))
    fixture.assert_close("emb", emb)
    fixture.assert_close("middle", network._encode(fixture["x"], emb)[-1])
    fixture.assert_close("output", network(fixture["x"], fixture["t"], y))
    if "x_16" in fixture.tensors:
        fixture.assert_close("output_16", network(fixture["x_16"], fixture["t"][1:2], y[1:2]))


def test_the_attention_order_is_an_option_that_matters(golden):
    fixture = golden("adm_unet_c")
    new = unet(fixture, use_new_attention_order=True)(fixture["x"], fixture["t"], fixture["y"])
    fixture.assert_close("output_new_attention_order", new)
    assert (new - fixture["output"]).abs().max() > 0.01


def test_classifier_and_its_input_gradient_match_the_reference(golden):
    fixture = golden("adm_classifier")
    config = {k: v for k, v in fixture.json["config"].items() if k not in IGNORED}
    network = EncoderUNet(**config).eval().requires_grad_(False)
    network.load_state_dict(fixture.weights())
    x = fixture["x"].clone().requires_grad_()
    logits = network(x, fixture["t"])
    fixture.assert_close("logits", logits)
    selected = log_softmax(logits, dim=1).gather(1, fixture["y"][:, None]).squeeze(1)
    fixture.assert_close("selected_log_prob", selected)
    fixture.assert_close("grad", torch.autograd.grad(selected.sum(), x)[0])


@pytest.mark.parametrize(
    ("block", "build"),
    [
        ("res_additive_down", lambda: ResBlock(32, 24, down=True)),
        ("attn_legacy_heads4", lambda: AttentionBlock(32, num_heads=4)),
        ("attn_new_heads4", lambda: AttentionBlock(32, num_heads=4, use_new_attention_order=True)),
    ],
)
def test_blocks_match_the_reference(golden, block, build):
    fixture = golden("adm_blocks")
    module = build()
    module.load_state_dict(fixture.weights(f"weights.{block}."))
    inputs = (fixture["x"], fixture["emb"]) if block.startswith("res") else (fixture["x"],)
    fixture.assert_close(f"{block}.output", module(*inputs))


def test_no_label_is_the_embedding_without_a_class(golden):
    fixture = golden("adm_unet_a")
    network = unet(fixture)
    none = network(fixture["x"], fixture["t"], torch.full((3,), -1))
    torch.testing.assert_close(none, network(fixture["x"], fixture["t"]))
    assert (none - fixture["output"]).abs().max() > 0.01


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_close_and_returns_float32(golden, dtype):
    fixture = golden("adm_unet_a")
    network = unet(fixture, dtype=dtype)
    assert network.input_blocks[1][0].in_layers[2].weight.dtype == getattr(torch, dtype)
    assert network.input_blocks[1][0].in_layers[0].weight.dtype == torch.float32
    output = network(fixture["x"], fixture["t"], fixture["y"])
    assert output.dtype == torch.float32
    spread = fixture["output"].std()
    assert (output - fixture["output"]).abs().max() < (0.02 if dtype == "float16" else 0.15) * spread


@torch.no_grad()
def test_compiled_network_gives_the_same(golden):
    """With the compiler's front alone; then blocks of each kind with its kernels, a second each to compile."""
    fixture = golden("adm_unet_b")
    network = unet(fixture)
    compiled = torch.compile(network.decode, dynamic=False, backend="aot_eager")
    fixture.assert_close("output", compiled(fixture["x"], network.embed_time(fixture["t"])))
    torch.manual_seed(0)
    small = UNet(4, 1, 32, 1, 1, (1,), channel_mult=(1,), num_head_channels=32, use_scale_shift_norm=True).eval()
    x, emb, block = torch.randn(2, 32, 4, 4), small.embed_time(torch.tensor([3, 700])), small.middle_block
    for parameter in block.parameters():
        parameter.normal_(std=0.1)
    found, expected = torch.compile(block, dynamic=False)(x, emb), block(x, emb)
    assert (expected - x).std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_impossible_widths_name_the_cause():
    with pytest.raises(ValueError, match="multiple of 32.*model_channels"):
        UNet(8, model_channels=20, channel_mult=(1,))
    with pytest.raises(ValueError, match="num_head_channels=48"):
        AttentionBlock(64, num_head_channels=48)
    with pytest.raises(ValueError, match="multiples of 4"):
        UNet(8, model_channels=32, channel_mult=(1, 1, 1)).check_image((3, 10, 8))


def test_the_patch_unet_is_the_unet_of_blocks_of_pixels():
    sizes = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2), "num_head_channels": 32}
    sizes |= {"attention_resolutions": (2,), "num_classes": 3}
    patched = PatchUNet(16, 3, out_channels=6, patch_size=2, **sizes)
    blocks = UNet(8, 12, out_channels=24, **sizes)
    with torch.no_grad():
        for parameter in patched.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    blocks.load_state_dict(patched.state_dict())
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([5.0, 700.0]), torch.tensor([0, -1])
    expected = F.pixel_shuffle(blocks(F.pixel_unshuffle(x, 2), t, y), 2)
    torch.testing.assert_close(patched(x, t, y), expected)
    assert (patched.in_channels, patched.out_channels, patched.image_size) == (3, 6, 16)
    patched.check_image((3, 16, 16))
    denoiser = ADMDenoiser(patched, noise_schedule="cosine", prediction="v")
    x0 = denoiser(x, t.long(), y).x0
    v, abar = patched(x, t, y)[:, :3], torch.tensor(denoiser.schedule.alphas_cumprod)[t.long()].view(-1, 1, 1, 1)
    torch.testing.assert_close(x0, (abar.sqrt() * x - (1 - abar).sqrt() * v).to(x0.dtype), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"images of \(3, 18, 18\) do not fit the network: \(3, multiples of 4\)"):
        patched.check_image((3, 18, 18))
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size, got 15 and 2"):
        PatchUNet(15, **sizes)


def test_attention_is_trained_in_float32_under_autocast():
    q, k, v = torch.randn(3, 2, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for dtype, tuned in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        inputs = [each.to(dtype).requires_grad_() for each in (q, k, v)]
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
            nullcontext() if tuned else plain(),
        ):
            out = tuning.attention(*inputs)
        assert out.dtype == dtype
        gradients.append(torch.cat([g.float() for g in torch.autograd.grad(out.float().square().sum(), inputs)]))
    exact, fast, theirs = gradients
    torch.testing.assert_close(fast, exact, atol=0.03, rtol=0.03)
    assert (fast - exact).norm() <= 1.01 * (theirs - exact).norm()
