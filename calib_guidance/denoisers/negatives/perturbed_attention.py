"""Perturbed attention guidance, PAG (Ahn et al. 2024, arXiv 2403.17377)."""

from torch import Tensor

from calib_guidance.denoisers.negatives.attention import AttentionNegative


class PerturbedAttention(AttentionNegative):
    """The denoiser with the identity as the attention map of some layers, which then output their values.

    Published for ADM 256, conditional and unconditional, with classifier-free weight 4: ``layers: [input_blocks.14.1,
    input_blocks.16.1, input_blocks.17.1, middle_block.1]``.

    Examples:
        >>> query, key, value = torch.randn(3, 1, 2, 16, 8)
        >>> torch.equal(PerturbedAttention(["middle_block.1"]).attend(query, key, value), value)
        True
    """

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return value
