"""The published weights that this project knows: ``cards.yaml`` says where they are, under which license, and how each was made.

Much of how a network was made does not show in its weights: heads and channel order of the attention, groups of the
normalization, noise schedule, what is predicted. Weights load just as well into a network that differs in these, which then
computes something else. The cards hold these settings by name, and :func:`check` compares them with a configuration.
"""

import os
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import groupby

import torch
from torch import Tensor, nn

from calib_guidance import networks
from calib_guidance.errors import CheckpointError
from calib_guidance.networks.adm import AttentionBlock, EncoderUNet, GroupNorm, UNet
from calib_guidance.networks.dit import DiT
from calib_guidance.weights.cards import CARDS, Card, by_file, entry


def make_network(name: str, dtype: str | None = None) -> nn.Module:
    """The network of a card, without its weights; ``dtype`` is that of its body, None the published one."""
    card = entry(name)
    return getattr(networks, card.network)(**card.arguments | ({} if dtype is None else {"dtype": dtype}))


@cache
def reference(name: str) -> nn.Module:
    """The network of :func:`make_network` without memory for weights, to compare with. Not to be changed."""
    with torch.device("meta"):
        return make_network(name, "float32")


def bare(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights without a first part such as ``model.`` that all their names share."""
    first = next(iter(state), "").partition(".")[0] + "."
    shared = all(name.startswith(first) for name in state)
    return {name.removeprefix(first): value for name, value in state.items()} if shared else state


def identify(
    state: Mapping[str, Tensor], kind: str | None = None, path: str | os.PathLike[str] | None = None
) -> list[str]:
    """Names of the published files that have these weights' names and shapes: none, one, or several of the same shapes.

    Of several, ``path`` decides where it has the name of one of their files.
    """
    count = sum(value.numel() for value in state.values())
    shapes = {name: value.shape for name, value in bare(state).items()}

    def fits(card: Card) -> bool:
        if card.signature_shapes and card.signature_shapes.items() <= shapes.items():
            return card.parameters <= count < 1.01 * card.parameters  # buffers are counted too
        if card.network is None or card.parameters != count:  # the count saves building each network
            return False
        return shapes == {name: value.shape for name, value in reference(card.name).state_dict().items()}

    names = [name for name, card in CARDS.items() if kind in (None, card.kind) and fits(card)]
    named = None if path is None else by_file(path)
    return [named.name] if named is not None and named.name in names else names


def common_card(names: Iterable[str]) -> Card | None:
    """The first card, where all agree on architecture and settings; else None."""
    cards = [CARDS[name] for name in names]
    alike = all((card.arguments, card.settings) == (cards[0].arguments, cards[0].settings) for card in cards)
    return cards[0] if cards and alike else None


def build(
    network: nn.Module | str | None, kind: str, dtype: str | None = None, state: Mapping[str, Tensor] | None = None
) -> tuple[nn.Module, Card | None]:
    """The network of a configuration, and its card where it is a published one of this kind.

    Args:
        network: a module, taken as it is; a published name; or None, for the one that has the shapes of ``state``.
        state: weights that will be loaded: a published network is then built without random ones.
    """
    names = [] if state is None else identify(state, kind)
    if isinstance(network, nn.Module):
        if dtype is not None:
            raise ValueError("dtype is for published networks; a network of your own has its own (init_args.dtype)")
        return network, common_card(names)
    if network is None:
        known = ", ".join(card.name for card in CARDS.values() if card.kind == kind)
        if state is None:
            raise ValueError(f"network: give a published name ({known}), a class_path or a published checkpoint")
        if (card := common_card(names)) is None:
            raise CheckpointError(
                f"the checkpoint has the names and shapes of {' and '.join(names) or 'none'} of the published networks "
                f"({known}), and shapes do not say how many heads the attention has: state network, with its num_heads or "
                "num_head_channels and use_new_attention_order, and of a diffusion model noise_schedule and prediction"
            )
        network = card.name
    card = entry(network, kind)
    if state is not None:
        with torch.device("meta"):
            empty = make_network(network, dtype)
        if {name for name, _ in empty.named_buffers()} <= state.keys():  # what the file lacks has to be computed
            return empty.to_empty(device="cpu"), card
    return make_network(network, dtype), card


def nonstate_hparams(network: nn.Module) -> dict[str, str]:
    """Hyperparameters of an ADM or DiT network that its weights do not show, as text; nothing for other networks."""

    def runs(values: Iterable[object]) -> str:
        return ", ".join(f"{len(list(run))}×{value}" for value, run in groupby(values))

    if isinstance(network, DiT):
        return {"num_heads": str(network.architecture["num_attention_heads"])}
    if not isinstance(network, (UNet, EncoderUNet)):
        return {}
    attention = [module for module in network.modules() if isinstance(module, AttentionBlock)]
    return {
        "attention_order": runs("new" if block.use_new_attention_order else "legacy" for block in attention),
        "attention_heads": runs(block.num_heads for block in attention),
        "norm_groups": runs(module.num_groups for module in network.modules() if isinstance(module, GroupNorm)),
    }


_OPTIONS = {
    "attention_order": ("use_new_attention_order",),
    "attention_heads": ("num_heads", "num_head_channels"),
    "norm_groups": ("min_group_channels",),
}


def check(name: str, settings: Mapping[str, object], path: str | os.PathLike[str] | None = None) -> None:
    """Raise CheckpointError where weights are used otherwise than the published ones of their shapes were made.

    ``settings`` are options of the configuration and :func:`nonstate_hparams` of the network. ``path`` is the weights' file, None
    where the configuration names the network itself.
    """
    card = CARDS[name]
    stated = card.arguments | card.settings
    made = stated | (nonstate_hparams(reference(name)) if card.network else {})
    different = [option for option, value in settings.items() if option in made and made[option] != value]
    if different:
        found = "; ".join(f"{option.replace('_', ' ')} {made[option]}, here {settings[option]}" for option in different)
        options = [option for name in different for option in _OPTIONS.get(name, (name,))]
        cure = ", ".join(f"{option}: {stated[option]}" for option in options if option in stated)
        if path is None:
            raise CheckpointError(f"network: {name} was made with {found}: set {cure}, or omit it")
        alike = f"{path} has the names and shapes of {name}, which was made with {found}"
        raise CheckpointError(f"{alike}. It would load and be something else: set {cure}, or name network: {name}")
