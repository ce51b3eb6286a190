"""What a classifier looks at, by one word for the parameters of tests."""


def seeing(at):
    """Options of ClassifierGuidance: ``x0``, ``x_t``, ``x_t_normalized``, or ``through_denoiser``."""
    if at == "through_denoiser":
        return {"classifier_input": "x0", "backprop_through_denoiser": True}
    return {"classifier_input": at}
