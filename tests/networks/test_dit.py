"""The diffusion transformer against the published code with the same weights, and the names of its weights."""

import pytest
import torch
from diffusers import DiTTransformer2DModel

from calib_guidance.networks import DiT
from calib_guidance.tasks import TrainDiffusion
from calib_guidance.weights.dit import from_official, named_dit, to_diffusers, to_dit
from calib_guidance.weights.io import CheckpointError, Weights, load_weights, save_weights


def tiny(**changes):
    arguments = {"sample_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
    return DiT(**arguments | changes).eval()


def null(y):
    """The fixture's null class is label 10, here it is -1."""
    return torch.where(y == 10, -1, y)


@pytest.fixture(scope="module")
def fixture(golden):
    return golden("dit_tiny")


@pytest.fixture
def network(fixture):
    network = tiny()
    load_weights(network, Weights("fixture", to_dit(fixture.weights())))
    return network


@torch.no_grad()
def test_every_part_matches_the_reference(fixture, network):
    seen = {}
    transformer = network.transformer
    transformer.transformer_blocks[0].register_forward_hook(lambda *hook: seen.update(block0=hook[2]))
    transformer.pos_embed.proj.register_forward_hook(lambda *hook: seen.update(patches=hook[2]))
    fixture.assert_close("t_emb", network.embed_time(fixture["t"]))
    fixture.assert_close("output", network(fixture["x"], fixture["t"], null(fixture["y"])))
    fixture.assert_close("patches", seen["patches"].flatten(2).transpose(1, 2))
    fixture.assert_close("block0", seen["block0"])
    x = fixture["cfg_x"][:2].repeat(2, 1, 1, 1)
    fixture.assert_close("cfg_plain_output", network(x, fixture["cfg_t"], null(fixture["cfg_y"])))
    nothing = torch.full_like(fixture["y"], -1)
    assert torch.equal(network(fixture["x"], fixture["t"]), network(fixture["x"], fixture["t"], nothing))


@torch.no_grad()
def test_weights_without_positions_get_the_published_ones(fixture):
    assert (tiny().transformer.pos_embed.pos_embed - fixture["pos_embed_sincos"]).abs().max() <= 1e-6
    official = tiny()
    load_weights(official, Weights("fixture", to_dit(fixture.weights())))
    network = tiny()
    load_weights(network, Weights("diffusers", to_dit(to_diffusers(official.state_dict()))))
    fixture.assert_close("output_sincos", network(fixture["x"], fixture["t"], null(fixture["y"])))


@torch.no_grad()
def test_diffusers_own_model_takes_the_weights_and_differs_by_its_time_frequencies_alone(fixture, network):
    theirs = DiTTransformer2DModel(**network.architecture, norm_eps=1e-6).eval()
    theirs.load_state_dict(to_diffusers(network.state_dict()))  # strict: every name is there, none is too many
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    output = theirs(fixture["x"], fixture["t"], fixture["y"], return_dict=False)[0]
    fixture.assert_close("output_sincos", output)
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1  # as diffusers comes
    assert (theirs(fixture["x"], fixture["t"], fixture["y"], return_dict=False)[0] - output).abs().max() > 0.1


def test_embedders_that_differ_between_blocks_are_refused(network):
    state = to_diffusers(network.state_dict())
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    state[name] = state[name] + 1e-3
    with pytest.raises(CheckpointError, match=r"blocks\.1.*class_embedder.*differs"):
        load_weights(tiny(), Weights("file", to_dit(state)))


def test_the_published_size_by_name():
    with torch.device("meta"):
        network, larger = named_dit("dit_xl_2_256"), named_dit("dit_xl_2_512")
    count = sum(value.numel() for value in network.state_dict().values())
    assert count == 675_129_632  # with the table of positions, as the official file counts
    assert network.architecture["num_attention_heads"] == 16
    assert (network.image_size, larger.image_size) == (32, 64)
    # A file of the official names and shapes fits: 28 blocks of 10 tensors each, and 12 beside them.
    width = 1152
    blocks = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width)}
    blocks |= {"mlp.fc2": (width, 4 * width), "adaLN_modulation.1": (6 * width, width)}
    shapes = {f"blocks.{n}.{name}": shape for n in range(28) for name, shape in blocks.items()}
    shapes |= {
        "x_embedder.proj": (width, 4, 2, 2),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
    }
    shapes |= {"final_layer.adaLN_modulation.1": (2 * width, width), "final_layer.linear": (32, width)}
    state = {f"{name}.weight": torch.empty(shape, device="meta") for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.empty(shape[:1], device="meta") for name, shape in shapes.items()}
    state |= {"y_embedder.embedding_table.weight": torch.empty(1001, width, device="meta")}
    state |= {"pos_embed": torch.empty(1, 256, width, device="meta")}
    assert len(state) == 292
    expected = {name: value.shape for name, value in network.state_dict().items()}
    assert {name: value.shape for name, value in from_official(state).items()} == expected


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "largest"), [("float16", 0.02), ("bfloat16", 0.15)])
def test_half_precision_stays_close_and_returns_float32(fixture, dtype, largest):
    network = tiny(dtype=dtype)
    load_weights(network, Weights("fixture", to_dit(fixture.weights())))
    assert network.transformer.proj_out_1.weight.dtype == getattr(torch, dtype)
    output = network(fixture["x"], fixture["t"], null(fixture["y"]))
    assert output.dtype == torch.float32
    assert (output - fixture["output"]).abs().max() < largest * fixture["output"].std()


@torch.no_grad()
def test_the_network_is_one_graph_to_the_compiler(fixture, network):
    complete = torch.compile(network.decode, fullgraph=True, backend="eager")  # a break in the graph is an error
    emb = network.embed_time(fixture["t"]) + network.embed_labels(null(fixture["y"]))
    fixture.assert_close("output", complete(fixture["x"], emb))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"patch_size": 3}, "multiple of patch_size"),
        ({"out_channels": 6}, "with variance, twice"),
        ({"dtype": "int8"}, "float16"),
    ],
)
def test_impossible_architectures_name_the_cause(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)
    with pytest.raises(ValueError, match="dit_xl_2_256"):
        named_dit("dit_xxl_2_256")
    with pytest.raises(ValueError, match="do not fit"):
        tiny().check_image((4, 8, 4))


@torch.no_grad()
def test_training_starts_with_blocks_that_change_nothing(tmp_path):
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, -1])
    random, network = tiny(), tiny()
    assert random(x, t, y).abs().max() > 0.01
    TrainDiffusion(network)
    assert not network(x, t, y).any()
    tokens, emb = torch.randn(2, 16, 64), torch.randn(2, 64)
    for block in network.transformer.transformer_blocks:
        assert torch.equal(block(tokens, timestep=emb), tokens)
    bound = (6 / (64 + 64)) ** 0.5  # of Xavier's uniform matrices
    weight = network.transformer.transformer_blocks[1].attn1.to_q.weight
    assert 0.98 * bound < weight.abs().max() <= bound
    assert network.label_emb.weight.std() == pytest.approx(0.02, rel=0.1)
    save_weights(random, tmp_path / "network.safetensors")
    TrainDiffusion(network, checkpoint=str(tmp_path / "network.safetensors"))  # given weights stay
    assert torch.equal(network(x, t, y), random(x, t, y))
