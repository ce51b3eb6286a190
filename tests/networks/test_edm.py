"""EDM's network, its weights renamed, against EDM with the same weights."""

import pytest
import torch

from calib_guidance.networks import UNet
from calib_guidance.networks.adm import AttentionBlock, ResBlock
from calib_guidance.weights.edm import edm_architecture, from_edm, is_edm

PUBLISHED = {  # EDM's ImageNet-64 network
    "image_size": 64,
    "in_channels": 3,
    "model_channels": 192,
    "out_channels": 3,
    "num_res_blocks": 3,
    "attention_resolutions": (2, 4, 8),
    "channel_mult": (1, 2, 3, 4),
    "num_classes": 1000,
    "num_head_channels": 64,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "channel_mult_emb": 4,
    "min_group_channels": 4,
    "middle_attention": True,
}


def edm_shapes(size, channels, width, blocks, attention, mult, classes):
    """Names and shapes of a DhariwalUNet, from its description: resolutions with attention, not downsampling factors."""
    emb, shapes = 4 * width, {}

    def layer(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    def block(name, source, target, attends=False, resamples=False):
        layer(f"{name}.norm0", source)
        layer(f"{name}.conv0", target, source, 3, 3)
        layer(f"{name}.affine", 2 * target, emb)
        layer(f"{name}.norm1", target)
        layer(f"{name}.conv1", target, target, 3, 3)
        if source != target:
            layer(f"{name}.skip", target, source, 1, 1)
        if resamples:
            shapes[f"{name}.conv0.resample_filter"] = shapes[f"{name}.skip.resample_filter"] = (1, 1, 2, 2)
        if attends:
            layer(f"{name}.norm2", target)
            layer(f"{name}.qkv", 3 * target, target, 1, 1)
            layer(f"{name}.proj", target, target, 1, 1)

    layer("map_layer0", emb, width)
    layer("map_layer1", emb, emb)
    shapes["map_label.weight"] = (emb, classes)
    skips, now = [], channels
    for level, m in enumerate(mult):
        r = size >> level
        if level == 0:
            now = width * m
            layer(f"enc.{r}x{r}_conv", now, channels, 3, 3)
        else:
            block(f"enc.{r}x{r}_down", now, now, resamples=True)
        skips.append(now)
        for n in range(blocks):
            block(f"enc.{r}x{r}_block{n}", now, width * m, r in attention)
            now = width * m
            skips.append(now)
    for level, m in reversed(list(enumerate(mult))):
        r = size >> level
        if level == len(mult) - 1:
            block(f"dec.{r}x{r}_in0", now, now, attends=True)
            block(f"dec.{r}x{r}_in1", now, now)
        else:
            block(f"dec.{r}x{r}_up", now, now, resamples=True)
        for n in range(blocks + 1):
            block(f"dec.{r}x{r}_block{n}", now + skips.pop(), width * m, r in attention)
            now = width * m
    layer("out_norm", now)
    layer("out_conv", channels, now, 3, 3)
    return {f"model.{name}": shape for name, shape in shapes.items()}


def network(fixture):
    weights = fixture.weights()
    unet = UNet(**edm_architecture(weights)).eval().requires_grad_(False)
    unet.load_state_dict(from_edm(weights))
    return unet


def test_network_matches_the_reference(golden):
    fixture = golden("edm_net")
    unet = network(fixture)
    y = fixture["labels"].argmax(1)
    fixture.assert_close("F_x", unet(fixture["net_input"], fixture["c_noise"], y))
    none = unet(fixture["net_input"], fixture["c_noise"], torch.full_like(y, -1))
    assert (none - fixture["F_x"]).abs().max() > 0.01  # labels matter


def test_networks_narrower_than_a_head_have_no_attention_in_the_middle(golden):
    """EDM gives a layer channels // 64 heads, none below 64. Attention whose output map is zero is the same network."""
    fixture = golden("edm_net")
    weights, y = fixture.weights(), fixture["labels"].argmax(1)
    (middle,) = {name.rpartition("_in0")[0] + "_in0" for name in weights if "_in0.qkv" in name}
    silent = {n: torch.zeros_like(v) if f"{middle}.proj" in n else v for n, v in weights.items()}
    lacking = {
        n: v for n, v in weights.items() if not any(f"{middle}.{part}." in n for part in ("norm2", "qkv", "proj"))
    }
    assert edm_architecture(lacking) == edm_architecture(weights) | {"middle_attention": False}
    networks = []
    for state in (silent, lacking):
        networks.append(UNet(**edm_architecture(state)).eval().requires_grad_(False))
        networks[-1].load_state_dict(from_edm(state))
    zero, none = (unet(fixture["net_input"], fixture["c_noise"], y) for unet in networks)
    torch.testing.assert_close(none, zero, atol=1e-6, rtol=1e-6)
    assert (none - fixture["F_x"]).abs().max() > 1e-3  # the attention matters
    # 32 channels throughout, which 64 channels per head do not divide.
    narrow = edm_shapes(8, 3, 32, 1, (), (1, 1), 10)
    narrow = {
        n: torch.zeros(s)
        for n, s in narrow.items()
        if not any(f"_in0.{part}." in n for part in ("norm2", "qkv", "proj"))
    }
    narrow = {n: torch.full(v.shape, 0.25) if "resample" in n else v for n, v in narrow.items()}
    UNet(**edm_architecture(narrow)).load_state_dict(from_edm(narrow))


def test_block_with_several_heads_matches_the_reference(golden):
    fixture = golden("edm_block")
    weights = {k: v for k, v in fixture.weights().items() if "resample" not in k}
    residual, attention = ResBlock(16, 24, 0.0, 32, True, down=True, min_group_channels=4), AttentionBlock(32, 4)
    attention.norm = type(attention.norm)(32, min_group_channels=4)
    mapped = from_edm({f"enc.8x8_block0.{name}": value for name, value in weights.items()}, head_channels=8)
    for n, module in enumerate((residual, attention)):
        prefix = f"input_blocks.0.{n}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in mapped.items() if k.startswith(prefix)})
    # EDM's blocks take the embedding as it is, ADM's activate it: hand over what SiLU makes into it.
    residual.emb_layers[0] = torch.nn.Identity()
    fixture.assert_close("output", attention(residual(fixture["x"], fixture["emb"])))


def test_published_architecture_key_for_key():
    """EDM's ImageNet-64 network, without allocating it: every name and shape of EDM's arrives, and nothing is missing."""
    shapes = edm_shapes(64, 3, 192, 3, (32, 16, 8), (1, 2, 3, 4), 1000)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if "resample" not in name}
    assert is_edm(state)
    assert edm_architecture(state) == PUBLISHED
    with torch.device("meta"):
        unet = UNet(**PUBLISHED)
    expected = {name: value.shape for name, value in unet.state_dict().items()}
    assert {name: value.shape for name, value in from_edm(state).items()} == expected
    assert sum(p.numel() for p in unet.parameters()) == 295_899_267


def test_every_weight_arrives_once_and_unchanged():
    """Two levels with attention, so that resampling blocks follow attention and qkv of two heads are reordered."""
    generator = torch.Generator().manual_seed(0)
    shapes = edm_shapes(8, 1, 64, 1, (8, 4), (1, 2), 5)
    state = {
        name: torch.full(shape, 0.25) if "resample" in name else torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    mapped = from_edm({name.removeprefix("model."): value for name, value in state.items()})
    unet = UNet(**edm_architecture(state))
    unet.load_state_dict(mapped)
    augmented = state | {"model.map_augment.weight": torch.ones(256, 9)}  # zero labels while sampling, and no bias
    assert from_edm(augmented).keys() == mapped.keys()
    assert unet.output_blocks[1][2].in_layers[2].weight.equal(state["model.dec.8x8_up.conv0.weight"])
    sent = torch.cat([v.flatten() for name, v in state.items() if "resample" not in name])
    assert sent.sort().values.equal(torch.cat([v.flatten() for v in mapped.values()]).sort().values)
    qkv, source = unet.input_blocks[3][1].qkv.bias, state["model.enc.4x4_block0.qkv.bias"]
    for head in range(2):
        for channel in (0, 7, 63):
            for part in range(3):
                assert qkv[head * 192 + part * 64 + channel] == source[head * 192 + channel * 3 + part]


def test_what_is_not_edm_is_refused_by_name(golden):
    weights = golden("edm_net").weights()
    name = "model.enc.4x4_down.conv0.resample_filter"
    with pytest.raises(ValueError, match="4x4_down.conv0.resample_filter.*box"):
        from_edm(weights | {name: torch.ones(1, 1, 4, 4) / 16})
    with pytest.raises(ValueError, match="'surplus.weight'"):
        from_edm(weights | {"surplus.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="norm3.weight"):
        from_edm(weights | {"model.enc.4x4_block0.norm3.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="64 channels cannot be split in heads of 48"):
        from_edm(weights, head_channels=48)
    assert not is_edm({"time_embed.0.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="DhariwalUNet"):
        edm_architecture({"time_embed.0.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="multiple of 32.*got 40"):
        UNet(8, model_channels=40, channel_mult=(1,))
    with pytest.raises(ValueError, match="got 3"):
        UNet(8, model_channels=3, channel_mult=(1,), min_group_channels=4)
