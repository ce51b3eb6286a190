"""EDM2's network part by part against EDM2 with the same weights."""

import pytest
import torch
import torch.nn.functional as F

from calib_guidance.networks import EDM2UNet
from calib_guidance.networks.edm2 import EDM2Block, MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize
from calib_guidance.weights.edm2 import edm2_architecture, from_edm2

# Parameters of the paper's sizes, in millions (arXiv 2312.02696, Table 2).
SIZES = {"xs": (128, 125), "s": (192, 280), "m": (256, 498), "l": (320, 777), "xl": (384, 1119), "xxl": (448, 1523)}


def edm2_network(fixture, upcast=False, fold=True):
    """The network of a fixture; its weights in float16 run as they are published, or cast first."""
    state = from_edm2(fixture.weights())
    network = EDM2UNet(**edm2_architecture(state, fixture.json["config"]))
    network.load_state_dict(state)
    return network.fold(half_gains=not upcast) if fold else network.eval()


@pytest.fixture(scope="module")
def blocks(golden):
    return golden("edm2_blocks")


@torch.no_grad()
def test_functions(blocks):
    a, a2, b, x = (blocks[f"fn.{name}"] for name in ("a", "a2", "b", "x"))
    found = {
        "normalize": normalize(x),
        "normalize_dim1": normalize(x, dim=1),
        "mp_silu": mp_silu(a),
        "mp_sum_t05": mp_sum(a, a2, 0.5),
        "mp_sum_t03": mp_sum(a, a2, 0.3),
        "mp_cat_t05": mp_cat(a, b, 0.5),
        "mp_cat_t03": mp_cat(a, b, 0.3),
        "down": F.avg_pool2d(a, 2),
        "up": F.interpolate(a, scale_factor=2, mode="nearest"),
    }
    for name, value in found.items():
        blocks.assert_close(f"fn.{name}", value)
    # Not clamped: ε is added, so that zeros stay zeros and tiny samples shrink.
    assert (normalize(x)[2] == 0).all()
    fourier = MPFourier(24)
    fourier.load_state_dict(blocks.weights("weights.fourier."))
    blocks.assert_close("fourier.output", fourier(blocks["fourier.x"]))


@torch.no_grad()
@pytest.mark.parametrize(("name", "kernel"), [("linear", 0), ("conv1", 1), ("conv3", 3)])
def test_layers(blocks, name, kernel):
    weights, x, gain = blocks.weights(f"weights.{name}."), blocks[f"{name}.x"], blocks["gain"]

    def made(training=False):
        layer = MPConv(x.shape[1], len(weights["weight"]), kernel).train(training)
        layer.load_state_dict(weights)
        return layer

    layer = made()
    blocks.assert_close(f"{name}.output", layer(x))
    blocks.assert_close(f"{name}.output_gain", layer(x, gain))
    folded = made()
    folded.fold(gain)
    blocks.assert_close(f"{name}.output_gain", folded(x))
    folded.fold(gain)  # once is enough
    blocks.assert_close(f"{name}.output_gain", folded(x))
    training = made(training=True)
    blocks.assert_close(f"{name}.output_train", training(x))
    blocks.assert_close(f"{name}.weight_after_train", training.weight)
    if name == "conv3":
        half = made()
        half.weight.data = half.weight.half().float()
        half.fold(gain, half_gain=True)
        blocks.assert_close("conv3.output_gain_half", half(x))
        exact = made()
        exact.weight.data = exact.weight.half().float()
        exact.fold(gain)
        assert (exact(x) - half(x)).abs().max() > 1e-4 * half(x).std()


@torch.no_grad()
@pytest.mark.parametrize("name", ["enc_down", "dec_up", "keep_noattn"])
def test_blocks(blocks, name):
    config = dict(blocks.json["config"][name])
    block = EDM2Block(**{key.replace("_mode", ""): value for key, value in config.items()}).eval()
    assert block.heads == blocks.json["derived"][name]["num_heads"]
    block.load_state_dict(blocks.weights(f"weights.{name}."))  # strict: no attention, no weights of it
    blocks.assert_close(f"{name}.output", block(blocks[f"{name}.x"], blocks[f"{name}.emb"]))


@torch.no_grad()
@pytest.mark.parametrize("fold", [False, True])
def test_network_with_labels(golden, fold):
    fixture = golden("edm2_unet_a")
    network, seen = edm2_network(fixture, upcast=True, fold=fold), {}
    for key, layer in (("enc_block0", network.enc["16x16_block0"]), ("dec_in0", network.dec["4x4_in0"])):
        layer.register_forward_hook(lambda *hook, key=key: seen.update({key: hook[2]}))
    y = fixture["class_labels"].argmax(1)
    fixture.assert_close("F_x", network(fixture["net_input"], fixture["c_noise"], y))
    for key, value in seen.items():
        fixture.assert_close(key, value)
    fixture.assert_close("emb", mp_silu(network.embed_time(fixture["c_noise"]) + network.embed_labels(y)))
    fixture.assert_close("logvar", network.logvar(fixture["c_noise"]))
    other = network(fixture["net_input"], fixture["c_noise"], torch.full_like(y, -1))
    assert torch.equal(other, network(fixture["net_input"], fixture["c_noise"]))
    assert (other - fixture["F_x"]).abs().max() > 0.01


@torch.no_grad()
def test_float16_parameters_as_they_are_and_cast(golden):
    """Rounded gains are the only difference, and larger than the tolerance."""
    fixture = golden("edm2_unet_b")
    for upcast, end in ((False, ""), (True, "_upcast")):
        network = edm2_network(fixture, upcast)
        output = network(fixture["net_input"], fixture["c_noise"])
        fixture.assert_close(f"F_x{end}", output)
        fixture.assert_close(f"emb{end}", mp_silu(network.embed_time(fixture["c_noise"])))
        wrong = fixture[f"F_x{'' if upcast else '_upcast'}"]
        assert (output - wrong).abs().max() > 1e-4 * wrong.std()
    with pytest.raises(ValueError, match="without classes"):
        network.embed_labels(torch.tensor([0]))


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "largest"), [("float16", 0.01), ("bfloat16", 0.08)])
def test_half_precision_stays_close_and_returns_float32(golden, dtype, largest):
    fixture = golden("edm2_unet_a")
    state = from_edm2(fixture.weights())
    network = EDM2UNet(**edm2_architecture(state, fixture.json["config"]), dtype=dtype)
    network.load_state_dict(state)
    output = network.fold()(fixture["net_input"], fixture["c_noise"], fixture["class_labels"].argmax(1))
    assert network.emb_noise.weight.dtype == output.dtype == torch.float32
    assert 0 < (output - fixture["F_x"]).abs().max() < largest * fixture["F_x"].std()


@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_the_paper(size):
    width, millions = SIZES[size]
    with torch.device("meta"):
        network = EDM2UNet(64, 4, 1000, width)
        pixels = EDM2UNet(64, 3, 1000, width)
    count = sum(p.numel() for p in network.parameters())
    assert round(count / 1e6) == millions
    assert count - sum(p.numel() for p in pixels.parameters()) == 2 * 9 * width  # one channel in, one out
    assert edm2_architecture(network.state_dict(), {}) == {
        "image_size": 64,
        "in_channels": 4,
        "num_classes": 1000,
        "model_channels": width,
        "channel_mult": (1, 2, 3, 4),
        "num_blocks": 3,
        "attn_resolutions": (16, 8),
        "logvar_channels": 128,
    }


def test_training_reaches_every_parameter():
    torch.manual_seed(0)
    network = EDM2UNet(8, 1, 10, 16, (1, 2), 1, (4,), channels_per_head=16).train()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.5)
    x, c_noise = torch.randn(3, 1, 8, 8), torch.tensor([-1.0, 0.0, 0.5])
    (network(x, c_noise, torch.tensor([0, 3, -1])).square().sum() + network.logvar(c_noise).sum()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
    weight = network.enc["8x8_conv"].weight
    torch.testing.assert_close(weight.square().mean((1, 2, 3)), torch.ones(len(weight)), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="multiples of 2"):
        network.check_image((1, 7, 8))
