"""What the arguments alone show to be wrong, refused before anything loads.

What depends on the checkpoint or the hardware is refused by `utils.techniques.plan`, still before any weights load.
"""

import argparse
import sys
from pathlib import Path

import torch

from utils.benchmark_utils import STEP_CACHES, RecipeError
from utils.machine import launched
from utils.reference_image import scheme_of


def check_args(args: argparse.Namespace) -> None:
    """Refuses what the arguments alone show to be wrong, but for the files that a run writes: see `check_outputs`.

    Raises:
        RecipeError: names the value, the choices and the way out.
    """
    def refuse(wrong, text):
        if wrong:
            raise RecipeError(text)

    for name in ("height", "width"):
        size = getattr(args, name)
        refuse(size is not None and (size <= 0 or size % 16),
               f"--{name} {size} is not a positive multiple of 16 (8 pixels a latent, 2 latents a token). "
               f"The nearest that works: {max(16, round((size or 0) / 16) * 16)}.")
    for name, least in (("num_inference_steps", 1), ("num_images_per_prompt", 1), ("batch_size", 1),
                        ("taylorseer_interval", 2), ("taylorseer_order", 0)):
        value = getattr(args, name)
        refuse(value is not None and value < least, f"--{name} {value}: it must be at least {least}.")
    refuse(not 0 <= args.seed < 2**63, f"--seed {args.seed}: it must be from 0 to 2^63 - 1.")
    refuse(args.true_cfg_scale < 1, f"--true_cfg_scale {args.true_cfg_scale}: it must be 1 (off) or more.")

    refuse(args.device == "cuda" and not torch.cuda.is_available(),
           "--device cuda, but PyTorch sees no GPU here. Use --device cpu, or install a CUDA or ROCm build of torch.")
    refuse(args.device == "cpu" and args.offload != "none",
           f"--offload {args.offload} moves weights between CPU and GPU; with --device cpu there is nothing to move.")
    refuse(args.gpu_memory_limit is not None and (args.device == "cpu" or args.gpu_memory_limit <= 0),
           "--gpu_memory_limit takes a positive number of GiB and needs --device cuda.")

    refuse(args.negative_prompt is not None and args.true_cfg_scale <= 1,
           "--negative_prompt has no effect without true classifier-free guidance: add --true_cfg_scale, e.g. 4.0.")
    refuse(args.true_cfg_scale > 1 and args.negative_prompt is None,
           f"--true_cfg_scale {args.true_cfg_scale} needs --negative_prompt ('' will do).")
    refuse(args.batch_size is not None and not args.prompts_file,
           f"--batch_size {args.batch_size} is how many prompts of a file go into one call: add --prompts-file. "
           "Several images of one prompt: --num_images_per_prompt.")

    refuse(args.disable_quant and (args.quant_dtype != "auto" or args.quant_granularity),
           "--disable_quant contradicts --quant_dtype and --quant_granularity: drop one or the other.")
    refuse(args.quant_dtype == "int8" and args.quant_granularity == "tensor",
           "--quant_granularity tensor is for float8; int8 is quantised per row. Drop one of the two flags.")
    refuse(args.quant_granularity == "row" and args.disable_bf16,
           "--quant_granularity row needs bf16 weights (torchao's row-scaled kernel takes no other): "
           "drop --disable_bf16 or use --quant_granularity tensor.")
    refuse(args.disable_fa3 and args.attention_backend and args.attention_backend.startswith("fa3"),
           f"--disable_fa3 contradicts --attention_backend {args.attention_backend}: drop one of the two.")
    asked, unpackaged = packages_asked_for(args), unpackaged_by_choice(args)
    refuse(asked and args.compile_export_mode in ("compile", "disabled"),
           f"{asked} is about exported packages, which --compile_export_mode {args.compile_export_mode} neither makes "
           "nor loads: drop one of the two.")
    refuse(args.re_export and (args.use_cached_model or args.package_from),
           "--use-cached-model and --package-from never export, --re-export always does.")
    refuse(asked and unpackaged, f"{asked} does not go with {' '.join(unpackaged or ())}: drop one of the two.")
    refuse(args.compile_scope == "whole" and args.compile_export_mode == "disabled",
           "--compile_scope whole contradicts --compile_export_mode disabled: nothing is compiled.")
    refuse(args.compile_scope == "whole" and moves_transformer(args),
           f"--offload {args.offload} hooks into the transformer, which then cannot be compiled as one whole: use "
           "--compile_scope blocks.")
    cache, decides = args.step_cache, args.step_cache not in (None, "taylorseer")
    refuse(decides and cache not in STEP_CACHES and not Path(cache).expanduser().is_file(),
           f"--step_cache {cache}: there is no such file. Give a yaml file, or one of {', '.join(STEP_CACHES)}.")
    refuse(cache != "taylorseer" and (args.taylorseer_interval is not None or args.taylorseer_order is not None),
           "--taylorseer_interval and --taylorseer_order are about --step_cache taylorseer: add it.")
    refuse(args.force_cache and not decides,
           "--force_cache ignores residuals, by which the caches but taylorseer decide: add --step_cache fast, say.")
    refuse(args.offload == "model" and cache,
           "--offload model takes its hooks off after each image, and the step cache with them: use --offload text or "
           "--offload group.")
    refuse(args.compile_scope == "whole" and decides,
           "a step cache decides in Python between blocks, so the transformer cannot be compiled as one whole: "
           f"use --compile_scope blocks with --step_cache {cache}.")
    not_on_hub = args.random_weights or args.ckpt.startswith("tiny-") or Path(args.ckpt).expanduser().is_dir()
    refuse(args.revision and not_on_hub,
           f"--revision {args.revision} is of a checkpoint on the Hub: drop it, or give a Hub id as --ckpt.")
    refuse(args.random_weights and args.lora,
           "--lora changes pixels, and pixels of --random_weights mean nothing: drop one of the two.")

    processes = launched()
    refuse(processes > 1 and not (args.prompts_file or args.context_parallel),
           f"{processes} processes for one prompt: give many with --prompts-file, let them share one image with "
           "--context_parallel auto, or start one process, without accelerate launch and torchrun.")
    if args.context_parallel:
        parallel = f"--context_parallel {args.context_parallel}"
        refuse(args.prompts_file, f"{parallel} shares one image among GPUs, --prompts-file gives each GPU images of "
               "its own: drop one of the two.")
        refuse(processes == 1, f"{parallel} needs a process for each GPU: torchrun --nproc_per_node=2 "
               f"{Path(sys.argv[0]).name} {parallel} ...")
        for flag, given in ((f"--offload {args.offload}", args.offload != "none"),
                            ("--compile_scope whole", args.compile_scope == "whole")):
            refuse(given, f"{flag} does not go with {parallel}: drop one of the two.")

    refuse(args.prompts_file and not Path(args.prompts_file).expanduser().is_file(),
           f"--prompts_file {args.prompts_file}: there is no such file.")
    is_path = args.image and not scheme_of(args.image)
    refuse(is_path and not Path(args.image).expanduser().is_file(), f"--image {args.image}: there is no such file.")


def moves_transformer(args: argparse.Namespace) -> bool:
    """Whether the transformer's weights move between CPU and GPU, and not T5's alone."""
    return args.offload in ("model", "group")


def t5_stays(args: argparse.Namespace) -> bool:
    """Whether T5's weights stay on the GPU, where they can be compiled, exported and recorded."""
    return args.offload == "none"


def packages_asked_for(args: argparse.Namespace) -> str | None:
    """The flag that asks for exported packages by name. Without it they are the default where they can be."""
    given = {"--compile_export_mode export_aoti": args.compile_export_mode == "export_aoti",
             "--use-cached-model": args.use_cached_model, "--re-export": args.re_export,
             "--package-from": args.package_from}
    return next((flag for flag, is_given in given.items() if is_given), None)


def unpackaged_by_choice(args: argparse.Namespace) -> tuple[str, str] | None:
    """The flag that exported packages do not go with, and why."""
    backend = args.attention_backend or "native"
    given = {("--compile_scope whole", "(a package is of one kind of block)"): args.compile_scope == "whole",
             (f"--offload {args.offload}", "(it moves weights, whose addresses exported code holds)"):
                 moves_transformer(args),
             (f"--context_parallel {args.context_parallel}", "(its exchanges are not exported)"): args.context_parallel,
             # Exported with _native_math on torch 2.13, a package called the flash kernel.
             (f"--attention_backend {backend}", "(torch.export forgets which of PyTorch's kernels was chosen)"):
                 backend != "native" and not backend.startswith(("fa3", "aiter"))}
    return next((flag for flag, is_given in given.items() if is_given), None)


def images_per_call(args: argparse.Namespace) -> int:
    """The batch of one pipeline call."""
    return (args.batch_size or 1) * args.num_images_per_prompt
