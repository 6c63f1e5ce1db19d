"""Measures the error of each fp8 recipe's step against float32, on weights that resemble trained weights.

    python -m bench.fp8_error --random_weights 3+6 --output-json families.json
    python -m bench.fp8_error --random_weights --cases plain massive=500,spread=0.5,neuron=300 --output-json full.json
    python -m bench.fp8_error --ckpt tiny-flux-dev --pictures 16 --output-json pictures.json

For every case of `bench.trained_like` one transformer is reshaped, and each recipe is applied to a copy. The error of a
real call's step is ||step - float32|| / ||float32|| over the picture's tokens. On a CPU the kernels' references run
instead of the kernels. The step is eager, because CUDA graphs and compilation change rounding at most.
"""

import argparse
import copy
import gc
import json
import time

import torch
import torchao.quantization.quant_api

from bench import trained_like
from bench.environment import environment
from bench.quality import capture_step, float32_step, picture_drift
from tiny_flux import judge, pictures
from utils import attention
from utils.attention import use_attention_library
from utils.benchmark_utils import choose_device, create_parser
from utils.common import RecipeError, finite_float, freeze_gc, run_cli
from utils.fp8_check import relative_error, run_step
from utils.output_checks import check_output
from utils.outputs import is_record, write_json
from utils.pipeline_utils import call_kwargs, fuse_projections, load_pipeline
from utils.quantization import quantize_transformer

# Random weights have gates of about 0.07, so that blocks hardly change the stream. Trained gates are about 0.5.
RANDOM_GATES = 8.0


def as_bf16(transformer: torch.nn.Module, device: torch.device) -> None:
    """diffusers' own blocks."""


def as_float8_row(transformer: torch.nn.Module, device: torch.device) -> None:
    """The default without the fused kernels: torchao's float8 with per-row scales, and FlashAttention-3, fp8 scaled."""
    use_attention_library(transformer, "fa3")
    quantize_transformer(transformer, "float8", "row", device)


def as_flux_fast(transformer: torch.nn.Module, device: torch.device) -> None:
    """flux-fast's recipe: float8 with per-tensor scales, and q, k and v cast to e4m3 without a scale."""
    use_attention_library(transformer, "fa3_unscaled")
    quantize_transformer(transformer, "float8", "tensor", device)


def as_fused(transformer: torch.nn.Module, device: torch.device, **options: bool) -> None:
    """The default on a Hopper GPU.

    Args:
        options: of `fuse_blocks`.
    """
    from utils.kernels.fused_blocks import defer_residuals, fuse_blocks  # Triton, which CPU builds of torch lack

    fuse_blocks(transformer, device, **options)
    defer_residuals(transformer)


def as_fused_float8_modulations(transformer: torch.nn.Module, device: torch.device) -> None:
    """The default if GPU memory is too small for modulations in bf16."""
    as_fused(transformer, device, float8_modulations=True)


def as_fused_int8(transformer: torch.nn.Module, device: torch.device) -> None:
    """--quality high on a Hopper GPU: the fused kernels in int8, and FlashAttention-3 in bf16."""
    as_fused(transformer, device, int8=True)


def as_int8(transformer: torch.nn.Module, device: torch.device) -> None:
    """torchao's int8 with per-row scales, and FlashAttention-3, fp8 scaled."""
    use_attention_library(transformer, "fa3")
    quantize_transformer(transformer, "int8", "row", device)


def as_fp8_attention(transformer: torch.nn.Module, device: torch.device) -> None:
    """FlashAttention-3, fp8 scaled, alone."""
    use_attention_library(transformer, "fa3")


RECIPES = {"bf16": as_bf16, "fp8_attention": as_fp8_attention, "float8_row": as_float8_row, "flux_fast": as_flux_fast,
           "fused": as_fused, "fused_float8_modulations": as_fused_float8_modulations, "fused_int8": as_fused_int8,
           "int8": as_int8}


def draw(pipeline, transformer: torch.nn.Module, mixture: dict[str, float], count: int, steps: int) -> list:
    """Draws `count` prompts of tiny-flux, with `transformer` in the pipeline.

    Args:
        mixture: from `bench.trained_like.parse`, for `bench.trained_like.attach`.
    """
    pipeline.transformer = transformer
    handles = [trained_like.attach(transformer, mixture)]
    if hasattr(transformer.time_text_embed, "prepare"):
        from utils.kernels.modulation import attach_modulation_hook
        handles.append(attach_modulation_hook(pipeline))
    try:
        return judge.draw_pictures(pipeline, pictures.prompts(count)[0], steps)
    finally:
        for handle in handles:
            handle.remove()


def measure(pipeline, inputs: dict, mixture: dict[str, float], recipes: list[str], tokens: int, count: int, steps: int
            ) -> dict[str, dict[str, float]]:
    """Measures one case: {"errors": {recipe: relative error}, "psnr": {recipe: dB}}.

    Args:
        pipeline: its transformer is unquantized, without fused projections. It stays unchanged.
        inputs: the transformer's named arguments, from `bench.quality.capture_step`.
        mixture: from `bench.trained_like.parse`.
        recipes: names of `RECIPES`.
        tokens: the number of output rows that the pipeline reads.
        count: the number of pictures to draw with bf16 and with each recipe; 0 for none.
        steps: for each picture.
    """
    transformer = pipeline.transformer
    device, reshaped = transformer.device, copy.deepcopy(transformer)
    trained_like.reshape(reshaped, mixture, inputs)
    inputs = trained_like.step_inputs(inputs, mixture)
    reference = float32_step(reshaped, inputs)[:, :tokens]
    expected = draw(pipeline, reshaped, mixture, count, steps) if count else None
    found = {"errors": {}, "psnr": {}}
    for i, name in enumerate(recipes):
        # The last recipe changes the model in place: at full depth some cards have no memory for another copy.
        model = copy.deepcopy(reshaped) if i + 1 < len(recipes) else reshaped
        fuse_projections(model)
        RECIPES[name](model, device)
        found["errors"][name] = relative_error(run_step(model, inputs)[:, :tokens], reference)
        if count:
            found["psnr"][name] = picture_drift(draw(pipeline, model, mixture, count, steps), expected)["psnr_mean"]
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    pipeline.transformer = transformer
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="gen_image.py's flags work as well: --ckpt, --random_weights, --device.")
    parser.add_argument("--cases", nargs="+", metavar="FAMILY=STRENGTH,...",
                        help="cases to measure: plain, families or mixtures (plain, each family at three strengths, "
                        "and the mixtures)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE",
                        help=f"recipes to measure: {', '.join(RECIPES)} (all)")
    parser.add_argument("--gates", type=finite_float, metavar="FACTOR",
                        help=f"factor of all gates: {RANDOM_GATES:g} with --random_weights, else 1")
    parser.add_argument("--pictures", type=int, default=0, metavar="N",
                        help="also measure the PSNR of N tiny-flux pictures against bf16's pictures (0)")
    parser.add_argument("--output-json", required=True, metavar="FILE", help="file for the record")
    args, rest = parser.parse_known_args()
    recipe = create_parser().parse_args([*rest, "--quiet"])
    choose_device(recipe)
    check_output(args.output_json, "--output-json", is_record)
    cases = ([(text, trained_like.parse(text)) for text in args.cases] if args.cases else
             [("plain", {}), *trained_like.cases()])
    device = torch.device(recipe.device)
    if device.type == "cpu":
        # torchao refuses float8 on a CPU although PyTorch computes it there, slowly.
        torchao.quantization.quant_api._check_hardware_support = lambda *_: None
    else:
        function, where = attention.find_library("fa3")
        if function is None:
            raise RecipeError(f"--device {recipe.device}: the fp8 recipes need FlashAttention-3 ({where}). Install it, "
                              "or use --device cpu.")
        attention.register_library("fa3", function)
    if args.pictures and not recipe.ckpt.startswith("tiny-flux"):
        raise RecipeError(f"--pictures {args.pictures} does not work with --ckpt {recipe.ckpt}. Use --ckpt tiny-flux "
                          "or tiny-flux-dev, or drop --pictures.")
    pipeline = load_pipeline(recipe)
    kwargs = call_kwargs(pipeline, recipe)
    inputs = capture_step(pipeline, kwargs)
    tokens = (kwargs["height"] // 16) * (kwargs["width"] // 16)
    freeze_gc()  # without it each gc.collect() takes 0.25 s
    record = {"model": recipe.ckpt, "random_weights": recipe.random_weights, "pictures": args.pictures, "rows": [],
              "gates": args.gates if args.gates is not None else RANDOM_GATES if recipe.random_weights else 1.0,
              "environment": environment(recipe.device)}
    for name, mixture in cases:
        start = time.perf_counter()
        if record["gates"] != 1:
            mixture = mixture | {"gates": record["gates"] * mixture.get("gates", 1.0)}
        found = measure(pipeline, inputs, mixture, args.recipes, tokens, args.pictures, kwargs["num_inference_steps"])
        record["rows"].append({"case": name} | found)
        shown = (f"{recipe} {100 * error:.2f} %" + (f" {found['psnr'][recipe]:.1f} dB" if args.pictures else "")
                 for recipe, error in found["errors"].items())
        print(f"{name:60}", *shown, f"({time.perf_counter() - start:.1f} s)", flush=True)
        write_json(args.output_json, record)
    print(json.dumps({"output_json": args.output_json, "cases": len(cases)}))


if __name__ == "__main__":
    run_cli(main)
