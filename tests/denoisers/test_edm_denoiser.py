"""EDM's denoiser against EDM with the same weights, and the ways in which its weights are found."""

import pytest
import torch
from safetensors.torch import save_file

from calib_guidance.denoisers import EDMDenoiser
from calib_guidance.networks import UNet
from calib_guidance.weights import registry
from calib_guidance.weights.edm import edm_architecture, from_edm
from calib_guidance.weights.io import CheckpointError, save_weights
from tests.edm_files import edm_bytes


@pytest.fixture
def weights(golden, tmp_path):
    """The fixture's weights as a file with EDM's names."""
    path = tmp_path / "edm.safetensors"
    save_file(golden("edm_net").weights(), path)
    return str(path)


@pytest.mark.parametrize("type_", [torch.float64, torch.float32])
def test_denoised_images_match_the_reference(golden, weights, type_):
    """Every sample at a noise level of its own, in both types of state; the x_t of the contract is VP, EDM's is not."""
    fixture = golden("edm_net")
    denoiser = EDMDenoiser(checkpoint=weights)
    levels = denoiser.schedule.at_sigmas(fixture["sigma"].double().numpy())
    scale = torch.tensor(levels.alphas_cumprod).sqrt().view(-1, 1, 1, 1)
    x_t, y, each = (scale * fixture["x"]).to(type_), fixture["labels"].argmax(1), torch.arange(4)
    with torch.no_grad():
        x0, variance, *_ = denoiser.prepare(levels, y)(x_t, each)
        fixture.assert_close("output", x0)
        assert x0.dtype == type_
        assert variance is None
        for none in (None, torch.full_like(y, -1)):
            fixture.assert_close("output_no_labels", denoiser.prepare(levels, none)(x_t, each).x0)
        free = EDMDenoiser(checkpoint=weights, class_conditional=False)
        fixture.assert_close("output_no_labels", free.prepare(levels, y)(x_t, each).x0)
        one = (scale[2] * fixture["x"]).to(type_)
        fixture.assert_close("output_scalar_sigma", denoiser.prepare(levels, y)(one, 2).x0)


def test_sigma_data_is_where_noise_and_image_weigh_the_same(golden, weights):
    """At σ = σ_data: c_skip = ½, c_out = σ_data/√2, c_in = 1/(√2·σ_data)."""
    fixture = golden("edm_net")
    denoiser = EDMDenoiser(checkpoint=weights, sigma_data=0.8)
    x = fixture["x"].double()
    with torch.no_grad():
        found = denoiser.prepare(denoiser.schedule.at_sigmas([0.8]), None)(x / 1.64**0.5, 0).x0
        noise = torch.full((4,), 0.8).log() / 4
        expected = x / 2 + 0.8 / 2**0.5 * denoiser.network((x / (2**0.5 * 0.8)).float(), noise)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_half_precision_is_that_of_the_body(golden, weights):
    fixture = golden("edm_net")
    half = EDMDenoiser(checkpoint=weights, dtype="bfloat16")
    assert half.network.dtype == torch.bfloat16
    levels = half.schedule.at_sigmas(fixture["sigma"].double().numpy())
    x_t = torch.tensor(levels.alphas_cumprod).sqrt().view(-1, 1, 1, 1) * fixture["x"]
    with torch.no_grad():
        x0 = half.prepare(levels, fixture["labels"].argmax(1))(x_t, torch.arange(4)).x0
    assert 0 < (x0 - fixture["output"]).abs().max() < 0.1 * fixture["output"].std()


def test_gradients_flow_back_to_a_float64_state(golden, weights):
    """For guidance through the denoiser: along a direction, as the difference quotient."""
    denoiser = EDMDenoiser(checkpoint=weights)
    generator = torch.Generator().manual_seed(0)
    x_t, along, weight = (torch.randn(1, 3, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    predict = denoiser.prepare(denoiser.schedule.at_sigmas([1.5]), torch.tensor([4]))
    x_t.requires_grad_()
    (gradient,) = torch.autograd.grad((predict(x_t, 0).x0 * weight).sum(), x_t)
    assert gradient.dtype == torch.float64
    with torch.no_grad():
        ahead, behind = ((predict(x_t + step * along, 0).x0 * weight).sum() for step in (1e-2, -1e-2))
    assert float((gradient * along).sum()) == pytest.approx(float((ahead - behind) / 2e-2), rel=0.01)


def test_compiled_network_is_used(weights, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, mode: lambda *args: compiled.append(dynamic) or f(*args))
    denoiser = EDMDenoiser(checkpoint=weights, compile=True)
    with torch.no_grad():
        denoiser.prepare(denoiser.schedule.at_sigmas([1.0]), None)(torch.zeros(1, 3, 8, 8), 0)
    assert compiled == [False]


def test_weights_by_either_name_and_into_a_given_network(golden, weights, tmp_path):
    state = golden("edm_net").weights()
    own = tmp_path / "own.safetensors"
    save_file({name: value.contiguous() for name, value in from_edm(state).items()}, own)
    bare = tmp_path / "bare.pt"
    torch.save({name.removeprefix("model."): value for name, value in state.items()}, bare)
    expected = EDMDenoiser(checkpoint=weights).network.state_dict()
    pickled = tmp_path / "edm.pkl"
    pickled.write_bytes(edm_bytes(state))
    for file in (weights, str(own), str(bare), str(pickled)):
        network = UNet(**edm_architecture(state))
        assert EDMDenoiser(network, file).network is network
        for name, value in network.state_dict().items():
            assert value.equal(expected[name]), name


def test_published_network_by_name():
    """Without memory for its weights."""
    with torch.device("meta"):
        denoiser = EDMDenoiser("edm_imagenet64", image_size=32)
        assert EDMDenoiser("edm_imagenet64", dtype="float32").network.dtype == torch.float32
    assert sum(p.numel() for p in denoiser.network.parameters()) == 295_899_267
    assert denoiser.network.dtype == torch.float16
    assert denoiser.image_shape == (3, 32, 32)
    assert denoiser.num_classes == 1000
    assert denoiser.provenance["norm_groups"] == "95×32"
    with pytest.raises(CheckpointError, match="sigma data 0.5, here 1.0.*set sigma_data: 0.5"), torch.device("meta"):
        EDMDenoiser("edm_imagenet64", sigma_data=1.0)


def test_weights_say_what_they_were_trained_with(golden, weights, tmp_path):
    denoiser = EDMDenoiser(checkpoint=weights, sigma_data=0.7)
    assert denoiser.provenance["file"] == weights
    assert denoiser.provenance["sigma_data"] == 0.7
    own = tmp_path / "own.safetensors"
    save_weights(denoiser.network, own, sigma_data=0.7)
    network = UNet(**edm_architecture(golden("edm_net").weights()))
    EDMDenoiser(network, str(own), sigma_data=0.7)
    with pytest.raises(CheckpointError, match="own.safetensors was trained with sigma_data: 0.7"):
        EDMDenoiser(network, str(own))
    pickled = tmp_path / "edm.pkl"
    pickled.write_bytes(edm_bytes(golden("edm_net").weights(), init_kwargs={"sigma_data": 0.7, "label_dim": 10}))
    EDMDenoiser(checkpoint=str(pickled), sigma_data=0.7)
    with pytest.raises(CheckpointError, match="edm.pkl was trained with sigma_data: 0.7"):
        EDMDenoiser(checkpoint=str(pickled))


def test_published_weights_are_identified_after_the_key_map():
    names = registry.reference("edm_imagenet64").state_dict()
    assert registry.identify(names, "edm") == ["edm_imagenet64"]


def test_what_cannot_be_says_why(golden, weights, tmp_path):
    state = golden("edm_net").weights()
    architecture = edm_architecture(state)
    own = tmp_path / "own.safetensors"
    save_file({name: value.contiguous() for name, value in from_edm(state).items()}, own)
    with pytest.raises(CheckpointError, match="none of the published networks.*state network"):
        EDMDenoiser(checkpoint=str(own))
    with pytest.raises(CheckpointError, match="edm.safetensors does not fit UNet; .*unexpected: label_emb.weight"):
        EDMDenoiser(UNet(**architecture | {"num_classes": None}), weights)
    box = "model.enc.4x4_down.conv0.resample_filter"
    torch.save(state | {box: torch.ones(1, 1, 4, 4) / 16}, tmp_path / "filter.pt")
    with pytest.raises(CheckpointError, match="filter.pt: .*box filter"):
        EDMDenoiser(checkpoint=str(tmp_path / "filter.pt"))
    with pytest.raises(ValueError, match="network: give a published name .edm_imagenet64"):
        EDMDenoiser()
    with pytest.raises(ValueError, match="a network of your own has its own"):
        EDMDenoiser(UNet(**architecture), dtype="float16")
    with pytest.raises(ValueError, match=r"out_channels must be in_channels \(3\), got 6"):
        EDMDenoiser(UNet(**architecture | {"out_channels": 6}))
    with pytest.raises(ValueError, match="sigma_data must be above 0"):
        EDMDenoiser(checkpoint=weights, sigma_data=0.0)
    with pytest.raises(ValueError, match="multiples of 2"):
        EDMDenoiser(checkpoint=weights, image_size=7)
