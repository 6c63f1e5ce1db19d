"""How far a denoising step is from what the GPU can do: its FLOPs, the rate achieved, its share of measured ceilings.

Counted are the products that a plain step computes, a multiplication and an addition as two; not norms, activations and
casts, which move bytes rather than multiply.
"""

from contextlib import contextmanager

from utils import random_weights
from utils.checkpoint import identify

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
def watching_tokens(transformer):
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


def roofline_of(record: dict) -> dict | None:
    """`step_record` of a result; from its settings for one that was written before results had it. None where it is
    no image of a known architecture."""
    if "roofline" in record:
        return record["roofline"]
    if not record.get("random_weights"):
        return None
    configs = random_weights.architecture(record["model"], record["random_weights"])
    settings = record["settings"]
    image = settings["height"] * settings["width"] // 256
    tokens = {"image_tokens": image * (2 if identify(configs).needs_image else 1),
              "text_tokens": settings["max_sequence_length"], "batch": settings["num_images_per_prompt"]}
    return step_record(configs["transformer"], tokens, record["stages_ms"]["denoising_step"],
                       bool(record["cached_steps"]))


def share_of_ceiling(record: dict, ceilings: dict) -> float | None:
    """The time that the step's products take at this GPU's measured rates, in the precisions that the result used, over
    the time that it took; of several GPUs each at its share of them. None where a rate was not measured."""
    work, techniques = roofline_of(record), record["techniques"]
    if work is None or work["tflops"] is None or not techniques["bf16"]["on"]:
        return None
    quantisation = techniques["quantisation"]
    how = quantisation["how"] if quantisation["on"] else "bf16"
    # The fused blocks' GEMMs ("per-row") come in both kinds: cuBLAS multiplies plain e4m3 numbers, as for one tensor.
    signs = {"float8_row": ("a row", "per-row"), "float8_tensor": ("a tensor", "per-row")}
    kinds = ([kind for kind, words in signs.items() if any(word in how for word in words)]
             if how.startswith("float8") else [how])
    products = [rates[kind] for rates in ceilings["matmul"].values() for kind in kinds if rates.get(kind)]
    attends = [rate for name, rate in ceilings["attention"].items()
               if rate and name.endswith("fp8") == ("fp8" in techniques["attention"]["how"])]
    if not products or not attends:
        return None
    seconds = work["flops"]["matmul"] / max(products) / 1e12 + work["flops"]["attention"] / max(attends) / 1e12
    gpus = record.get("environment", {}).get("processes", 1)
    return seconds / gpus / (record["stages_ms"]["denoising_step"] / 1e3)
