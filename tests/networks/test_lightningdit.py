"""LightningDiT, Internal Guidance and RAE against their authors' code with the same weights, and their samplers."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from calib_guidance.denoisers import (
    Autoguidance,
    ClassifierFreeGuidance,
    Combination,
    FlowDenoiser,
    MiddleHead,
    RAEDecoder,
)
from calib_guidance.diffusion import Interval
from calib_guidance.networks import DiTDH, LightningDiT
from calib_guidance.networks.lightningdit import sine_positions
from calib_guidance.samplers import FlowODE, FlowSDE
from tests.conftest import PARITY

NAMES = {"input_size": "sample_size", "use_qknorm": "qk_norm", "use_swiglu": "swiglu", "use_rope": "rope"}
NAMES |= {"use_rmsnorm": "rms", "encoder_depth": "mid_depth"}
SAME = ("in_channels", "num_classes", "hidden_size", "depth", "num_heads", "patch_size", "learn_sigma")


def lightning(golden, name, **changes):
    config = golden(name).json["config"]
    arguments = {NAMES.get(k, k): v for k, v in config.items() if k in NAMES or k in SAME}
    network = LightningDiT(**arguments, shift=not config["wo_shift"], **changes).eval()
    network.load_state_dict(golden(name).weights())  # strict: the published names
    return network


def rae(golden, name):
    config = golden(name).json["config"]
    keys = ("in_channels", "num_classes", "hidden_size", "depth", "num_heads")
    network = DiTDH(config["input_size"], **{key: config[key] for key in keys}).eval()
    network.load_state_dict(golden(name).weights())
    return network


def labels(fixture, network, key="y"):
    return torch.where(fixture[key] == network.num_classes, -1, fixture[key])


@torch.no_grad()
@pytest.mark.parametrize("name", ["lightningdit_net", "lightningdit_net_qknorm", "lightningdit_net_layernorm"])
def test_lightningdit(golden, name):
    fixture = golden(name)
    network, seen = lightning(golden, name), {}
    network.blocks[0].register_forward_hook(lambda *hook: seen.update(block0=hook[2]))
    y = labels(fixture, network)
    fixture.assert_close("output", network(fixture["x"], fixture["t"], y))
    fixture.assert_close("block0", seen["block0"])
    fixture.assert_close("t_emb", network.embed_time(fixture["t"]))
    fixture.assert_close("patches", network.x_embedder(fixture["x"]))
    if "rope_in" in fixture.tensors:
        fixture.assert_close("rope_out", network.feat_rope(fixture["rope_in"]))
    if name == "lightningdit_net":  # the tables of a file are those that are made
        fresh = LightningDiT(5, 8, 10, 32, 2, 2)
        torch.testing.assert_close(fresh.feat_rope.freqs_cos, network.feat_rope.freqs_cos, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(fresh.feat_rope.freqs_sin, network.feat_rope.freqs_sin, atol=1e-6, rtol=1e-5)
    if "pos_embed_sincos" in fixture.tensors:
        grid, width = network.image_size // network.patch_size, network.pos_embed.shape[2]
        fixture.assert_close("pos_embed_sincos", sine_positions(width, grid))


@torch.no_grad()
def test_internal_guidance(golden):
    """v_mid from the middle head, and the combination in one evaluation."""
    name = "internal_guidance_net"
    fixture, network = golden(name), lightning(golden, name)
    y = labels(fixture, network)
    emb = network.embed_time(fixture["t"]) + network.embed_labels(y)
    v, mid = network.velocities(fixture["x"], emb)
    fixture.assert_close("output", v)
    fixture.assert_close("output_mid", mid)
    guided = lightning(golden, name, internal_guidance=1.4)
    torch.testing.assert_close(guided(fixture["x"], fixture["t"], y), mid + 1.4 * (v - mid), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="needs the head of mid_depth"):
        LightningDiT(4, 7, 9, 32, 3, 2, internal_guidance=1.4)


def sit(golden, **changes):
    """SiT with the head of Internal Guidance: LightningDiT without its changes."""
    name = "internal_guidance_sit_net"
    config = golden(name).json["config"]
    arguments = {NAMES.get(k, k): v for k, v in config.items() if k in ("input_size", "encoder_depth") or k in SAME}
    network = LightningDiT(**arguments, swiglu=False, rope=False, rms=False, **changes).eval()
    network.load_state_dict(golden(name).weights())
    return network


@torch.no_grad()
def test_internal_guidance_of_sit(golden, tmp_path):
    fixture, network = golden("internal_guidance_sit_net"), sit(golden)
    y = labels(fixture, network)
    v, mid = network.velocities(fixture["x"], network.embed_time(fixture["t"]) + network.embed_labels(y))
    fixture.assert_close("output", v)
    fixture.assert_close("output_mid", mid)
    torch.save({"ema": fixture.weights(), "steps": 1}, tmp_path / "sit.pt")
    read = FlowDenoiser(sit(golden, internal_guidance=1.4), str(tmp_path / "sit.pt"), "linear", "data_to_noise", 1)
    torch.testing.assert_close(read.network(fixture["x"], fixture["t"], y), mid + 1.4 * (v - mid), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ig_cfg", "ig_alone"])
def test_the_sde_under_internal_guidance(golden, name):
    fixture = golden("internal_guidance_sit_sde")
    run, records = fixture.json["hyperparameters"]["runs"][name], []
    denoiser = FlowDenoiser(sit(golden, internal_guidance=run["ig_scale"]), time_direction="data_to_noise")
    sampler = FlowSDE(run["num_steps"])
    if run["cfg_scale"] > 1:
        interval = Interval(flow_interval=[run["guidance_low"], run["guidance_high"]])
        denoiser = Combination(denoiser, ClassifierFreeGuidance(run["cfg_scale"]), interval=interval)
        assert interval.active(sampler.levels(denoiser))[::-1] == fixture[f"{name}.guided"].bool().tolist()
    noise = iter([fixture[f"{name}.z"], *fixture[f"{name}.noise"]])
    sampler(denoiser, lambda: next(noise).clone(), fixture[f"{name}.y"], None, [records.append])
    tau = sampler.grid(denoiser)
    for step, record in enumerate(records):
        scale = np.hypot(tau[record.i], 1 - tau[record.i]) if record.i else 1.0
        fixture.assert_close(f"{name}.x", record.x_next * scale, fixture[f"{name}.x"][step], step)


def test_internal_guidance_in_an_interval_of_its_own(golden):
    """The head in the middle as negative, under classifier-free guidance in another interval; one evaluation each."""
    fixture, name, records = golden("internal_guidance_sit_sde"), "ig_interval", []
    run = fixture.json["hyperparameters"]["runs"][name]
    flow = FlowDenoiser(sit(golden), time_direction="data_to_noise")
    own = Interval(flow_interval=[run["ig_guidance_low"], run["ig_guidance_high"]])
    inner = Combination(flow, ClassifierFreeGuidance(run["ig_scale"]), MiddleHead(), own)
    assert inner.nfe == 1
    outer = Interval(flow_interval=[run["guidance_low"], run["guidance_high"]])
    denoiser = Combination(inner, ClassifierFreeGuidance(run["cfg_scale"]), interval=outer)
    sampler = FlowSDE(run["num_steps"])
    noise = iter([fixture[f"{name}.z"], *fixture[f"{name}.noise"]])
    sampler(denoiser, lambda: next(noise).clone(), fixture[f"{name}.y"], None, [records.append])
    tau = sampler.grid(denoiser)
    for step, record in enumerate(records):
        scale = np.hypot(tau[record.i], 1 - tau[record.i]) if record.i else 1.0
        fixture.assert_close(f"{name}.x", record.x_next * scale, fixture[f"{name}.x"][step], step)
    with pytest.raises(ValueError, match=r"set internal_guidance to 1, got 1\.4"):
        Combination(
            FlowDenoiser(sit(golden, internal_guidance=1.4), time_direction="data_to_noise"), None, MiddleHead()
        )
    with pytest.raises(ValueError, match="head in the middle"):
        Combination(FlowDenoiser(lightning(golden, "lightningdit_net")), None, MiddleHead())


@torch.no_grad()
@pytest.mark.parametrize("name", ["rae_net", "rae_net_guide"])
def test_rae(golden, name):
    fixture, network, seen = golden(name), rae(golden, name), {}
    network.blocks[0].register_forward_hook(lambda *hook: seen.update(enc_block0=hook[2]))
    y = labels(fixture, network)
    fixture.assert_close("output", network(fixture["x"], fixture["t"], y))
    if name == "rae_net":
        fixture.assert_close("enc_block0", seen["enc_block0"])
        fixture.assert_close("t_emb", network.t_embedder(fixture["t"]))
        emb = network.embed_time(fixture["t"]) + network.embed_labels(y)
        fixture.assert_close("s", network.conditions(fixture["x"], emb))
        fixture.assert_close("rope_out", network.enc_feat_rope(fixture["rope_in"]))
        fixture.assert_close("pos_embed_sincos", sine_positions(24, 4))


@torch.no_grad()
def test_half_precision_stays_close_and_returns_float32(golden):
    fixture, network = golden("lightningdit_net"), lightning(golden, "lightningdit_net", dtype="bfloat16")
    output = network(fixture["x"], fixture["t"], labels(fixture, network))
    assert (output.dtype, network.blocks[0].mlp.w3.weight.dtype) == (torch.float32, torch.bfloat16)
    assert 0 < (output - fixture["output"]).abs().max() < 0.15 * fixture["output"].std()


class Recorded:
    def __init__(self, x):
        self.x = x

    def __call__(self):
        return self.x.clone()


def assert_trajectory(fixture, name, denoiser, sampler):
    """Every state, of n samples (those of the doubled batch's second half are thrown away)."""
    records, y = [], fixture[f"{name}.y"]
    sampler.check(denoiser, None)
    sampler(denoiser, Recorded(fixture[f"{name}.z"]), y, None, [records.append])
    tau = sampler.grid(denoiser)
    # Observers see VP coordinates, but the image as it is.
    scale = [np.hypot(t, 1 - t) if step else 1.0 for step, t in enumerate(tau)]
    for record in records:
        row = sampler.num_steps - record.i
        fixture.assert_close(f"{name}.x", record.x_next * scale[record.i], fixture[f"{name}.x"][row][: len(y)], row)
    return records


@pytest.mark.parametrize("name", ["euler_cfg", "euler_plain", "euler_cfg_noshift", "heun2_cfg"])
def test_sampling_of_lightningdit(golden, name):
    fixture = golden("lightningdit_ode")
    run = fixture.json["hyperparameters"]["runs"][name]
    denoiser = FlowDenoiser(lightning(golden, "lightningdit_net"), time_direction="noise_to_data")
    method = run["sampling_method"].removesuffix("2")
    sampler = FlowODE(
        run["num_sampling_steps"] - 1,
        method,
        shift=1 / (run["timestep_shift"] or 1),
        correct_last=True,
        interval_by="evaluation",
    )
    if run["cfg_scale"] > 1:
        interval = Interval(flow_interval=[0, 1 - run["cfg_interval_start"]])
        denoiser = Combination(denoiser, ClassifierFreeGuidance(run["cfg_scale"]), interval=interval, channels=3)
        active = interval.active(sampler.evaluated(denoiser))
        n = sampler.num_steps
        order = [k for i in reversed(range(n)) for k in ((i, n + i) if method == "heun" else (i,))]
        assert [active[k] for k in order] == fixture[f"{name}.guided"].bool().tolist()
    assert_trajectory(fixture, name, denoiser, sampler)


@pytest.mark.parametrize("name", ["heun2_ig_cfg", "heun2_ig", "euler_ig_cfg"])
def test_sampling_of_internal_guidance(golden, name):
    fixture = golden("internal_guidance_ode")
    run = fixture.json["hyperparameters"]["runs"][name]
    network = lightning(golden, "internal_guidance_net", internal_guidance=run["ig_scale"])
    denoiser = FlowDenoiser(network, time_direction="noise_to_data")
    sampler = FlowODE(
        run["num_sampling_steps"] - 1,
        run["sampling_method"].removesuffix("2"),
        shift=1 / (run["timestep_shift"] or 1),
        correct_last=True,
        interval_by="evaluation",
    )
    if run["cfg_scale"] > 1:
        interval = Interval(flow_interval=[0, 1 - run["cfg_interval_start"]])
        denoiser = Combination(denoiser, ClassifierFreeGuidance(run["cfg_scale"]), interval=interval)
    assert_trajectory(fixture, name, denoiser, sampler)


@pytest.mark.parametrize("name", ["plain", "autoguidance", "autoguidance_interval", "cfg", "heun2_autoguidance"])
def test_sampling_of_rae(golden, name):
    """Stops above τ = 0; guidance on all channels, by another network with the same labels or by none."""
    fixture = golden("rae_ode")
    run = fixture.json["hyperparameters"]["runs"][name]
    denoiser = FlowDenoiser(rae(golden, "rae_net"), time_direction="data_to_noise")
    shift = (run["time_dist_shift_dim"] / run["time_dist_shift_base"]) ** 0.5
    method = run["sampling_method"].removesuffix("2")
    options = {"shift": shift, "end": 0.001, "correct_last": True, "interval_by": "evaluation"}
    sampler = FlowODE(run["num_steps"] - 1, method, **options)
    assert sampler.grid(denoiser)[0] == pytest.approx(shift * 0.001 / (1 + (shift - 1) * 0.001))
    if run["guidance_scale"] > 1:
        guide = FlowDenoiser(rae(golden, "rae_net_guide"), time_direction="data_to_noise")
        negative = Autoguidance(guide) if "autoguidance" in name else None
        interval = Interval(flow_interval=[run["t_min"], run["t_max"]])
        denoiser = Combination(denoiser, ClassifierFreeGuidance(run["guidance_scale"]), negative, interval)
    assert_trajectory(fixture, name, denoiser, sampler)


# Arguments of the published networks; parameters as their state dicts count.
PUBLISHED = {
    "lightningdit_xl_1": (675_256_736, lambda: LightningDiT()),
    "internal_guidance_xl_1": (677_951_296, lambda: LightningDiT(mid_depth=8)),
    "internal_guidance_sit_xl_2": (
        677_786_144,
        lambda: LightningDiT(32, 4, patch_size=2, swiglu=False, rope=False, rms=False, mid_depth=8),
    ),
    "rae_ditdh_xl_256": (838_675_796, lambda: DiTDH()),
    "rae_decoder_vitxl": (415_352_704, lambda: RAEDecoder(None)),
    "rae_ditdh_s_256": (196_455_764, lambda: DiTDH(hidden_size=(384, 2048), depth=(12, 2), num_heads=(6, 16))),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_without_memory(name):
    count, make = PUBLISHED[name]
    with torch.device("meta"):
        network = make()
    assert sum(p.numel() for p in network.state_dict().values() if p.is_floating_point()) >= count
    sizes = load_file(PARITY / "state_dicts.safetensors")[f"{name}.numel"]
    assert [value.numel() for _, value in sorted(network.state_dict().items())] == sizes.tolist()
