"""Counts the FLOPs of a denoising step, and computes the rate that a GPU achieves.

Only GEMMs and attention count, with two FLOPs for a multiplication and an addition. Norms, activations and casts do not
count, because memory bandwidth bounds them.
"""

from contextlib import contextmanager

TIME_CHANNELS = 256  # of the sinusoidal embedding of timestep and guidance


def step_flops(config: dict, image_tokens: int, text_tokens: int, batch: int = 1) -> dict[str, float]:
    """Returns the FLOPs of one call of a FluxTransformer2DModel, {"matmul", "attention"}.

    There are D channels and S = image + text tokens. A double block multiplies each token with 3 D^2 weights (q, k, v),
    D^2 (attention's output) and 8 D^2 (MLP). A single block has 7 D^2 (q, k, v and MLP up) and 5 D^2 (output). Both
    sums are 12 D^2. Attention takes 4 S^2 D FLOPs for q k^T and for the product with v. The modulations' GEMMs have one
    row for each image.

    Args:
        config: of the transformer.
        batch: images in the call.
    """
    width = config["attention_head_dim"] * config["num_attention_heads"]
    double, single = config["num_layers"], config["num_single_layers"]
    channels = config["in_channels"]
    tokens = image_tokens + text_tokens
    weights = (double + single) * tokens * 12 * width**2
    weights += double * 2 * 6 * width**2 + single * 3 * width**2  # modulations
    weights += image_tokens * channels * width + text_tokens * config["joint_attention_dim"] * width  # embedders
    embedders = 2 if config["guidance_embeds"] else 1
    weights += embedders * (TIME_CHANNELS * width + width**2) + config["pooled_projection_dim"] * width + width**2
    weights += 2 * width**2 + image_tokens * width * (config.get("out_channels") or channels)  # the last norm, output
    return {"matmul": 2.0 * batch * weights, "attention": 4.0 * batch * (double + single) * tokens**2 * width}


@contextmanager
def record_token_counts(transformer):
    """Context manager: yields a dictionary that a step fills with image_tokens, text_tokens and batch."""
    seen = {}

    def look(module, args, kwargs):
        batch, image_tokens = kwargs["hidden_states"].shape[:2]
        seen.update(image_tokens=image_tokens, text_tokens=kwargs["encoder_hidden_states"].shape[1], batch=batch)

    handle = transformer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def step_record(config: dict, tokens: dict, milliseconds: float, cached: bool) -> dict:
    """Returns the step's part of a result: tokens, FLOPs and TFLOP/s.

    Args:
        config: of the transformer.
        tokens: from `record_token_counts`.
        milliseconds: of the step.
        cached: whether a step cache is on. It skips an unknown part of the GEMMs, so that the rate is None.
    """
    flops = step_flops(config, **tokens)
    rate = None if cached else sum(flops.values()) / milliseconds / 1e9
    return {**tokens, "flops": flops, "tflops": rate}
