"""ADM's networks against guided-diffusion with the same weights."""

import pytest
import torch
from torch.nn.functional import log_softmax

from calib_guidance.networks import EncoderUNet, UNet
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


def test_compiled_network_gives_the_same(golden):
    fixture = golden("adm_unet_b")
    network = unet(fixture)
    compiled = torch.compile(network.decode, dynamic=False)
    fixture.assert_close("output", compiled(fixture["x"], network.embed_time(fixture["t"])))


def test_impossible_widths_name_the_cause():
    with pytest.raises(ValueError, match="multiple of 32.*model_channels"):
        UNet(8, model_channels=20, channel_mult=(1,))
    with pytest.raises(ValueError, match="num_head_channels=48"):
        AttentionBlock(64, num_head_channels=48)
    with pytest.raises(ValueError, match="multiples of 4"):
        UNet(8, model_channels=32, channel_mult=(1, 1, 1)).check_image((3, 10, 8))
