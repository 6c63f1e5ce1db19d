"""The FLOPs of a denoising step, and the rate that a GPU achieves.

GEMMs and attention of a plain step count, a multiplication and an addition as two. Norms, activations and casts do not:
they are bound by bandwidth.
"""

from contextlib import contextmanager

TIME_CHANNELS = 256  # of the sinusoidal embedding of timestep and guidance


def step_flops(config: dict, image_tokens: int, text_tokens: int, batch: int = 1) -> dict[str, float]:
    """{"matmul", "attention"} of one call of a FluxTransformer2DModel.

    With D channels and S = image + text tokens, a double block multiplies each token with 3 D^2 weights (q, k, v), D^2
    (out) and 8 D^2 (MLP, four times as wide), and a single block with 7 D^2 (q, k, v and MLP at once) and 5 D^2 (out):
    12 D^2 either way. Attention is q k^T and the product with v: 4 S^2 D FLOPs. Modulations work on a vector an image.
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
    """Yields a dictionary that holds, after a step, what it worked on: image_tokens, text_tokens, batch."""
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
    """What a result says of its step. The rate is None with a step cache: it skips an unknown part of the products."""
    flops = step_flops(config, **tokens)
    rate = None if cached else sum(flops.values()) / milliseconds / 1e9
    return {**tokens, "flops": flops, "tflops": rate}
