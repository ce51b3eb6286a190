"""Networks of diffusion models with the weights of a file of any layout."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from calib_guidance.errors import CheckpointError
from calib_guidance.networks import EDM2UNet, UNet
from calib_guidance.weights import diffusers_folder, registry
from calib_guidance.weights.dit import described_dit, from_diffusers, named_dit, to_dit
from calib_guidance.weights.edm import edm_architecture, from_edm, is_edm
from calib_guidance.weights.edm2 import edm2_architecture, from_edm2, is_edm2
from calib_guidance.weights.io import Weights, load_weights, part_of, read_weights

_DEFAULTS = {"noise_schedule": "linear", "prediction": "epsilon"}
_DEFAULTS |= {"path": "linear", "time_direction": "data_to_noise", "time_scale": 1.0}


def load_network(
    network: nn.Module | str | None, kind: str, checkpoint: str | None, dtype: str | None, **stated: Any
) -> tuple[Any, dict[str, Any], dict[str, object]]:
    """The network of a diffusion model's configuration.

    Args:
        network, checkpoint, dtype: see :class:`~calib_guidance.denoisers.discrete.NetworkDenoiser`.
        kind: ``adm``, ``edm``, ``edm2``, ``dit`` or ``flow``.
        stated: settings of the configuration; None takes what the file says of itself, else how it was published, else the
            usual one where there are no weights.

    Returns:
        The network, frozen; the stated settings with those that were None filled in; and provenance for the report of a run.
    """
    weights, described = (None, {}) if checkpoint is None else _read(checkpoint, kind)
    published = network if isinstance(network, str) else None
    if kind == "dit" and published is not None and published not in registry.CARDS:
        network, dtype = named_dit(published, dtype), None
    elif network is None and described:
        build = EDM2UNet if kind == "edm2" else UNet
        network = described_dit(described, dtype) if kind == "dit" else build(**described, dtype=dtype or "float32")
        dtype = None
    network, card = registry.build(network, kind, dtype, weights and weights.state)
    if kind == "dit":  # a folder's config.json must be of the same architecture
        for name, value in network.architecture.items():
            if described.get(name, value) != value:
                found = f"{checkpoint} has {name}: {described[name]}, the configuration's has {value}"
                raise CheckpointError(f"{found}: set network to that, or to null to read it from the file")
    weights = weights and part_of(weights, network)
    settings = {name: _setting(name, value, weights, card) for name, value in stated.items()}
    if published is not None and card is not None:
        registry.check(card.name, settings)
    provenance = settings | registry.nonstate_hparams(network)
    if weights is not None:
        provenance |= load_weights(network, weights, kind, **settings)
    return network.eval().requires_grad_(False), settings, provenance


def _read(checkpoint: str, kind: str) -> tuple[Weights, Mapping[str, Any]]:
    """Weights by the names of the network that runs them here, and what the file tells of its architecture."""
    if kind == "dit" and diffusers_folder.is_folder(checkpoint):
        folder = diffusers_folder.subfolder(checkpoint, "transformer")
        config = diffusers_folder.read_config(folder, "DiTTransformer2DModel")
        state = read_weights(diffusers_folder.weights_file(folder)).state
        return Weights(checkpoint, from_diffusers(state)), config
    weights = read_weights(checkpoint)
    if kind in ("dit", "flow"):
        state = registry.bare(weights.state)
        # LightningDiT and RAE, with rotary positions, and Internal Guidance, with two heads, run by their own names.
        own = any("feat_rope." in name or name.startswith("final_layer_xr.") for name in state)
        state = state if own else to_dit(state)
        # REPA's projectors, which its features were aligned with in training, and REPA-E's statistics do not enter the velocity.
        return weights._replace(state={n: v for n, v in state.items() if not n.startswith(("projectors.", "bn."))}), {}
    if not (kind == "edm" and is_edm(weights.state)) and not (kind == "edm2" and is_edm2(weights.state)):
        return weights, {}
    try:
        if kind == "edm":
            described, state = edm_architecture(weights.state), from_edm(weights.state)
        else:
            state = from_edm2(weights.state)
            described = edm2_architecture(state, weights.arguments)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    # What an EDM pickle says of its preconditioning is compared like what files of this project say.
    said = {name: str(value) for name, value in weights.arguments.items() if name == "sigma_data"}
    return weights._replace(state=state, metadata={**weights.metadata, **said}), described


def _setting(name: str, value: Any, weights: Weights | None, card: registry.Card | None) -> Any:
    """A setting as stated, else as the file says, else as it was published, else the usual one."""
    if value is None and weights is not None:
        value = weights.metadata.get(name)
    if value is None and card is not None:
        value = card.settings[name]
    if value is None and weights is not None:
        raise CheckpointError(f"{weights.path} does not say its {name}, nor is published: state {name} in the YAML")
    return _DEFAULTS[name] if value is None else value
