"""The recipe: load a FLUX.1 pipeline, then `optimize` it, top to bottom, in the one order in which the steps work."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers import attention_backend as diffusers_backend
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import disable_progress_bars
from transformers.utils import logging as transformers_logging

from utils import attention, context_parallel, random_weights, tiny_presets, weight_files
from utils.aoti import export
from utils.benchmark_utils import images_per_call, offloads_transformer, t5_on_gpu
from utils.cache import dbcache
from utils.cache.taylorseer import TaylorSeerTransformer
from utils.checkpoint import configs_of, identify, image_settings, model_shapes, read_configs
from utils.common import RecipeError, StageLog, reading
from utils.cuda_graph import CUDAGraphModule
from utils.fp8_check import Fp8Check
from utils.images import CheckedImageProcessor, GPUImageProcessor
from utils.lora import merge_loras, read_loras
from utils.machine import compiling, use_kernel_cache
from utils.memory import GIB, bf16_modulations_fit, check_cpu_memory, choose_load_device
from utils.plan import Decision, Plan, detect, make_plan
from utils.quantization import quantize_text_encoder, quantize_transformer
from utils.reference_image import MEGAPIXEL, load_reference, reference_size, reference_tokens
from utils.text_encoding import (
    compile_text_encoder,
    overlap_text_encoders,
    set_static_attention_mask,
    stream_text_encoder,
    with_embeddings,
)

# flux-fast's inductor flags, but for the transformer alone: coordinate descent over the VAE's norms did not end in the
# time at hand. Its fourth flag, conv_1x1_as_mm, is about the VAE.
TUNING_FLAGS = {
    "epilogue_fusion": False,  # leave pointwise work out of the matrix products
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
}


def load_pipeline(args):
    """The FluxPipeline or FluxKontextPipeline of `args`, LoRA fused, nothing else changed yet.

    Everything that can be refused is refused here, from configs of a few kB, before any weights load. Weights land on
    the GPU, or on the CPU if they fit on the GPU only once `optimize` has quantized them.

    Raises:
        RecipeError: with what to do about it.
    """
    if args.quiet:
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
    configs = read_configs(args.ckpt, args.revision, args.random_weights)
    hardware = detect(args.device, args.gpu_memory_limit)
    plan = make_plan(args, configs, hardware)
    device = choose_load_device(args, configs, hardware, plan)
    # Weights that are loaded onto the GPU leave room for 3 GiB more than float8 takes.
    plan.float8_modulations = device != args.device and not bf16_modulations_fit(args, configs, hardware, plan)
    if device == "cpu":
        check_cpu_memory(configs, plan.dtype)
    if plan.compile_mode != "disabled" or args.device == "cuda":  # Triton's kernels are compiled without it
        use_kernel_cache(args.cache_dir)
    if args.step_error and device != args.device:
        raise RecipeError("--step_error needs the unquantized model on the GPU, and it does not fit there.")
    reference = load_reference(args.image) if args.image else None
    if plan.context_parallel:
        width, height = plan.settings.width, plan.settings.height
        context_parallel.check_tokens(plan.settings.max_sequence_length, width * height // 256,
                              reference_tokens(reference, width * height) if reference else 0)
    files, contents = None, None
    if not args.random_weights:
        preset = args.ckpt in tiny_presets.NAMES
        folder = tiny_presets.CHECKPOINT if preset else Path(args.ckpt).expanduser()
        files = weight_files.find_checkpoint(args.ckpt, folder, args.revision,
                                             read_configs(str(folder)) if preset else configs)
        contents = weight_files.identity(files.folder)
    loras = read_loras(args.lora, model_shapes(configs), args.lora_partial) if args.lora else []
    if args.gpu_memory_limit:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.gpu_memory_limit * GIB / total))

    if args.random_weights:
        pipeline = random_weights.build(configs, device, plan.dtype)
        contents = f"random {args.ckpt} {args.random_weights}"
    else:
        pipeline = load_checkpoint(files, plan.dtype)
        pipeline.to(device)
        weight_files.refuse_non_finite(args.ckpt, pipeline)
        if args.ckpt in tiny_presets.NAMES:
            pipeline = tiny_presets.as_preset(pipeline, args.ckpt)
    merge_loras(pipeline, loras, args.quiet)
    pipeline.contents = {"weights": contents, "lora": [[lora.sha256, lora.scale] for lora in loras]}
    pipeline.plan = plan
    show_progress(pipeline, not args.quiet)
    return pipeline


def load_checkpoint(files: weight_files.Checkpoint, dtype: torch.dtype):
    """The pipeline of a checkpoint on the CPU, its weights compared with the files.

    Raises:
        RecipeError: a library cannot read a file, or weights did not get in.
    """
    with reading(f"--ckpt {files.ckpt}", "Download the checkpoint again, or save it anew with diffusers 0.42."):
        pipeline = DiffusionPipeline.from_pretrained(str(files.folder), dtype=dtype, use_safetensors=True,
                                                     variant=files.variant)
    weight_files.compare_loaded(files, pipeline)
    return pipeline


@compiling()
def optimize(pipeline, args, log: StageLog | None = None):
    """Applies the plan, weights first, then code from the inside out, and warms up with the real call's shapes.

    The order is the recipe, and the order of the README's table.

    Returns:
        `pipeline`. `pipeline.techniques` says what each technique did, or why it is off.

    Raises:
        RecipeError: packages are missing or do not fit, or, with --strict, the fp8 check fails.
    """
    log = log or StageLog(args.quiet)
    plan = pipeline.plan = getattr(pipeline, "plan", None) or make_plan(args, configs_of(pipeline), detect(args.device))
    pipeline.techniques = plan.decisions
    transformer, vae, device = pipeline.transformer, pipeline.vae, torch.device(args.device)
    check = begin_fp8_check(pipeline, args, plan, log)

    # Weights. LoRAs are in them. Concatenation comes before quantization: quantized tensors cannot be concatenated.
    if plan.is_on("fused projections"):
        fuse_projections(transformer)
        fuse_projections(vae)
    if plan.is_on("channels_last"):  # cuDNN's tensor-core convolutions take NHWC
        vae.to(memory_format=torch.channels_last)
    if plan.is_on("fused VAE"):
        put_fused_vae(plan, vae)
    if args.vae_tiling:
        enable_tiling(vae)
    set_attention(plan, transformer)
    with log.stage("quantize") if plan.quant or args.text_encoder_quant else nullcontext():
        quantize(plan, pipeline, args)
    place_weights(pipeline, args.offload, device)
    if check and not plan.context_parallel:  # on several GPUs only the finished recipe shards the tokens
        with log.stage("fp8 check"):
            check.measure(transformer)

    # Code. A step cache replaces the blocks' callers and reads the signature of the code below them. So packages are
    # loaded before it. torch.compile works from inside the blocks.
    if plan.compile_mode == "export_aoti":
        use_packages(plan, pipeline, args, log)
    wrap = partial(CUDAGraphModule, pool=torch.cuda.graph_pool_handle()) if plan.is_on("CUDA graphs") else None
    if plan.context_parallel:
        shard_fused_attention(plan, transformer, device)
    if plan.cache:  # it decides in Python: CUDA graphs go around the pieces between its decisions
        dbcache.enable(pipeline, plan.cache, args.true_cfg_scale > 1, wrap, shared=plan.context_parallel is not None)
    if plan.compile_mode == "compile":
        compile_pipeline(pipeline, "no blocks" if plan.is_on("fused kernels") else args.compile_scope, args.cache_dir,
                         TUNING_FLAGS if plan.is_on("inductor flags") else {}, t5_on_gpu(args))
    if plan.context_parallel:  # inside the step's CUDA graph, which records the collectives
        pipeline.transformer = context_parallel.SequenceParallel(pipeline.transformer)
    if wrap:
        capture_graphs(plan, pipeline, wrap, t5_on_gpu(args))
    attach_to_denoising_loop(plan, pipeline)
    set_image_processor(plan, pipeline, device)

    print_techniques(plan, log)
    warm_up(plan, pipeline, args, check, log)
    report_fp8_check(plan, pipeline, args, check, log)
    return pipeline


def put_fused_vae(plan: Plan, vae: torch.nn.Module) -> None:
    """Triton kernels in the place of the VAE's norms, attention and upsamplers."""
    from utils.kernels.fused_vae import fuse_vae  # needs Triton, which CPU builds of torch lack

    plan.decisions["fused VAE"] = Decision(True, "{} norms, {} attentions, {} upsamplers".format(*fuse_vae(vae)))


def set_attention(plan: Plan, transformer: torch.nn.Module) -> None:
    """The attention library of diffusers' blocks. Fused blocks call theirs themselves."""
    if plan.is_on("fused kernels"):
        return
    if plan.context_parallel:
        attention.use_attention_library(transformer, plan.attention_backend,
                                        context_parallel.ATTENTION[plan.context_parallel],
                                        context_parallel.all_reduce_max)
    elif plan.attention_backend in attention.BACKENDS:
        attention.use_attention_library(transformer, plan.attention_backend)
    elif plan.is_on("attention"):
        with diffusers_backend("native"):  # on leaving, the process-wide default is as before
            transformer.set_attention_backend(plan.attention_backend)


def quantize(plan: Plan, pipeline, args) -> None:
    """The transformer: blocks on the fused kernels, or torchao's Linears. T5, if a flag asks for it."""
    transformer, device, cpu = pipeline.transformer, torch.device(args.device), torch.device("cpu")
    planned = plan.decisions["quantization"].how
    if plan.is_on("fused kernels"):
        from utils.kernels.fused_blocks import defer_residuals, fuse_blocks  # need Triton

        count = fuse_blocks(transformer, device, float8_modulations=plan.float8_modulations)
        defer_residuals(transformer, *((plan.cache.Fn_compute_blocks, plan.cache.Bn_compute_blocks) if plan.cache
                                       else (0, 0)))
        plan.decisions["quantization"] = Decision(
            True, f"{planned}, {count} Linears; modulations in {'float8' if plan.float8_modulations else 'bf16'}")
    elif plan.quant:
        count = quantize_transformer(transformer, *plan.quant, device, cpu if offloads_transformer(args) else None)
        plan.decisions["quantization"] = Decision(True, f"{planned}, {count} Linears")
    if args.text_encoder_quant:
        quantize_text_encoder(pipeline.text_encoder_2, device, None if t5_on_gpu(args) else cpu)


def place_weights(pipeline, offload: str, device: torch.device) -> None:
    """Weights on the GPU, or in CPU memory until they are used (--offload)."""
    if offload == "model":
        # diffusers' default is GPU 0, whatever the current GPU is.
        pipeline.enable_model_cpu_offload(gpu_id=torch.cuda.current_device(), device=device)
    elif offload == "group":
        pipeline.enable_group_offload(onload_device=device, offload_device=torch.device("cpu"),
                                      offload_type="leaf_level", use_stream=True, record_stream=True)
    elif offload == "text":
        for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
            module.to(device)
        stream_text_encoder(pipeline.text_encoder_2, device)
    else:
        pipeline.to(device)


def shard_fused_attention(plan: Plan, transformer: torch.nn.Module, device: torch.device) -> None:
    """Has fused blocks attend to the tokens of all GPUs. Other blocks do since `set_attention`."""
    if plan.is_on("fused kernels"):
        from utils.kernels.fused_blocks import share_attention  # needs Triton

        note = share_attention(transformer, plan.context_parallel, context_parallel.world_size(), device)
        plan.decisions["context parallel"] = Decision(True, plan.decisions["context parallel"].how + note)


def capture_graphs(plan: Plan, pipeline, wrap: Callable[[torch.nn.Module], torch.nn.Module], with_t5: bool) -> None:
    """CUDA graphs around text encoders, VAE decoder and step; with a step cache the step's pieces have theirs."""
    # CLIP has a pool of its own, since it runs beside T5.
    pipeline.text_encoder = CUDAGraphModule(pipeline.text_encoder, torch.cuda.graph_pool_handle())
    if with_t5:
        pipeline.text_encoder_2 = wrap(pipeline.text_encoder_2)
        overlap_text_encoders(pipeline)
    pipeline.vae.decoder = wrap(pipeline.vae.decoder)
    if not plan.cache:
        pipeline.transformer = wrap(pipeline.transformer)


def attach_to_denoising_loop(plan: Plan, pipeline) -> None:
    """Everything that has to be outside the step's CUDA graph, from the inside out."""
    if plan.context_parallel:
        pipeline.vae.decoder = context_parallel.DataParallelDecoder(pipeline.vae.decoder)
        context_parallel.start_watchdog(pipeline.transformer)
    if plan.is_on("fused kernels"):
        from utils.kernels.fused_blocks import prune_unused_tokens  # needs Triton

        _modulations_follow(pipeline)
        if not plan.context_parallel and (plan.is_on("CUDA graphs") or not plan.cache):
            prune_unused_tokens(pipeline)
    if plan.extrapolation:  # an extrapolated step launches nothing of the step
        pipeline.transformer = TaylorSeerTransformer(pipeline.transformer, pipeline.scheduler,
                                                     plan.extrapolation.mask(plan.settings.num_inference_steps),
                                                     plan.extrapolation.order)


def set_image_processor(plan: Plan, pipeline, device: torch.device) -> None:
    """Pixels become 8 bits on the GPU or on the CPU; both processors notice values that are not finite."""
    processor = GPUImageProcessor if plan.is_on("GPU postprocess") else CheckedImageProcessor
    pipeline.image_processor = processor.from_config(pipeline.image_processor.config)
    pipeline.image_processor.device = device


def print_techniques(plan: Plan, log: StageLog) -> None:
    """One line for each technique: on and how, or off and why."""
    width = max(map(len, plan.decisions))
    for name, decision in plan.decisions.items():
        log.line(f"  {name:<{width}}  {'on ' if decision.on else 'off'}  {decision.how}")


def warm_up(plan: Plan, pipeline, args, check: Fp8Check | None, log: StageLog) -> None:
    """Compiles and records with the shapes of the real call. The fp8 check measures the finished recipe meanwhile."""
    if not (plan.is_on("compile") or plan.is_on("CUDA graphs")):
        return
    # A cache skips a step only after its own warm-up steps. Everything else shows in one step.
    steps = plan.settings.num_inference_steps if plan.cache else 1
    with log.stage("compile" if plan.compile_mode == "compile" else "record"):
        show_progress(pipeline, False)
        # A step cache would compare its first step with the second, which has inputs of its own.
        checked = check and not (plan.cache or plan.extrapolation)
        with check.measure_next_call(pipeline.transformer) if checked else nullcontext():
            # With embeddings, as for a file of prompts, whose prompts are encoded one at a time.
            pipeline(**with_embeddings(pipeline, call_kwargs(pipeline, args, num_inference_steps=steps), {}))
        show_progress(pipeline, not args.quiet)


def report_fp8_check(plan: Plan, pipeline, args, check: Fp8Check | None, log: StageLog) -> None:
    """Prints the fp8 check's result and keeps it in `pipeline.fp8_check`.

    Raises:
        RecipeError: fp8 does not hold, with --strict.
    """
    if check and not check.errors:
        plan.decisions["fp8 check"] = Decision(False, "not run: several GPUs, and a step cache or no warm-up")
    elif check:
        pipeline.fp8_check = check.record()
        plan.decisions["fp8 check"] = Decision(True, check.line())
        log.line(f"fp8 check: {check.line()}")
        if context_parallel.is_main_process():
            on = {"fused": plan.is_on("fused kernels"),
                  "fp8 attention": plan.attention_backend in ("fa3", "fa3_unscaled"),
                  "float8": plan.quant and plan.quant[0] == "float8"}
            check.report({name for name, is_on in on.items() if is_on}, args.strict)


def begin_fp8_check(pipeline, args, plan, log: StageLog) -> Fp8Check | None:
    """The check with its bf16 reference, before anything is quantized; or None, and a line about why."""
    pipeline.fp8_check = None
    fp8_attention = plan.attention_backend == "aiter" or (
        "fp8" in attention.BACKENDS.get(plan.attention_backend, ("", ""))[1])
    # int8 too, but not on a CPU, where a bf16 step takes longer than the picture's.
    if not (fp8_attention or (plan.quant and (plan.quant[0] == "float8" or args.device == "cuda"))):
        return None
    if args.skip_fp8_check:
        why = "--skip_fp8_check"
    elif args.offload != "none":
        why = f"not run with --offload {args.offload}: the unquantized model is not on the GPU"
    elif pipeline.transformer.device.type != args.device:
        why = "not run: the unquantized model does not fit on this GPU"
    else:
        show_progress(pipeline, False)
        with log.stage("bf16 step"):
            # One image, whatever the batch: a bf16 step takes three times as long as one in fp8.
            check = Fp8Check(pipeline, call_kwargs(pipeline, args, prompt=[args.prompt], seed=[args.seed]))
        show_progress(pipeline, not args.quiet)
        return check
    pipeline.techniques["fp8 check"] = Decision(False, why)
    return None


def show_progress(pipeline, shown: bool) -> None:
    pipeline.set_progress_bar_config(desc="denoising", disable=not shown)


def call_kwargs(pipeline, args, prompt: str | list[str] | None = None, seed: int | list[int] | None = None,
                num_inference_steps: int | None = None) -> dict:
    """The arguments of one pipeline call: the only place where they are made, for warm-up, timing, trace and images.

    Holds generators, which a call uses up: make new ones for each call, outside what is timed.

    Args:
        prompt: one, for --num_images_per_prompt images, or a list of one an image. By default --prompt; with
            --prompts-file as many of it as its batches hold.
        seed: of the first image, or a list of one an image. By default --seed.
    """
    settings = image_settings(args, configs_of(pipeline))
    if prompt is None:
        prompt = [args.prompt] * images_per_call(args) if args.prompts_file else args.prompt
    batched = isinstance(prompt, list)
    count = len(prompt) if batched else args.num_images_per_prompt
    if not isinstance(seed, list):
        first = args.seed if seed is None else seed
        seed = list(range(first, first + count))
    kwargs = dict(
        prompt=prompt,
        height=settings.height, width=settings.width,
        num_inference_steps=num_inference_steps or settings.num_inference_steps,
        guidance_scale=settings.guidance_scale, max_sequence_length=settings.max_sequence_length,
        num_images_per_prompt=1 if batched else count,
        generator=[torch.Generator("cpu").manual_seed(one) for one in seed])
    if args.true_cfg_scale > 1:
        kwargs |= dict(negative_prompt=[args.negative_prompt] * count if batched else args.negative_prompt,
                       true_cfg_scale=args.true_cfg_scale)
    if settings.model.needs_image:
        kwargs |= _reference_kwargs(load_reference(args.image), settings.width, settings.height)
    return kwargs


def _reference_kwargs(image, width: int, height: int) -> dict:
    """Kontext's image arguments. At a megapixel diffusers picks the nearest size that Kontext was trained on; at other
    sizes it would still return a megapixel, so there the reference is brought to the output's area."""
    area = width * height
    if area == MEGAPIXEL:
        return dict(image=image, max_area=area)
    return dict(image=image.resize(reference_size(image, area)), max_area=area, _auto_resize=False)


def enable_tiling(vae: torch.nn.Module) -> None:
    """Decodes in tiles of half the VAE's own size. diffusers' default tile is that whole size, which for FLUX means
    that a 1024x1024 image is one tile and nothing is saved."""
    vae.enable_tiling()
    vae.tile_sample_min_size = vae.config.sample_size // 2
    vae.tile_latent_min_size = vae.tile_sample_min_size // 2 ** (len(vae.config.block_out_channels) - 1)


def fuse_projections(model: torch.nn.Module) -> None:
    """One Linear for q, k, v instead of three, and the three freed: diffusers keeps them, 4.3 GB in FLUX.1's case."""
    model.fuse_qkv_projections()
    for module in model.modules():
        if getattr(module, "fused_projections", False):
            for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
                if hasattr(module, name):
                    delattr(module, name)


def use_packages(plan: Plan, pipeline, args, log: StageLog) -> None:
    """Exported code in the place of the code that `compile_pipeline` would compile; see `utils.aoti.export`."""
    use_kernel_cache(args.cache_dir)
    with_t5 = args.device == "cuda" and t5_on_gpu(args)
    if with_t5:
        set_static_attention_mask(pipeline.text_encoder_2)
    fused = plan.is_on("fused kernels")
    kinds = export.packaged(pipeline, not fused, not args.vae_tiling, plan.settings.model.needs_image, with_t5)

    def call():
        pipeline(**with_embeddings(pipeline, call_kwargs(pipeline, args, num_inference_steps=1), {}))

    with log.stage("packages"), _modulations_follow(pipeline) if fused else nullcontext():
        show_progress(pipeline, False)
        units = export.capture(kinds, call)
        show_progress(pipeline, not args.quiet)
        if plan.is_on("inductor flags"):
            for unit in units:
                if unit.name.startswith(("double", "single")):
                    unit.settings = TUNING_FLAGS
        switches = {"dtype": str(plan.dtype), "attention": plan.attention_backend, "quantization": plan.quant} | {
            name: plan.is_on(name) for name in ("fused projections", "channels_last", "fused VAE", "fused kernels",
                                                "text encoder quant", "inductor flags")}
        how = export.use_packages(pipeline, units, switches, args.cache_dir, args.use_cached_model, args.re_export,
                                  args.package_from, log.line)
    plan.decisions["compile"] = Decision(True, how)


def _modulations_follow(pipeline):
    """The hook of `attach_modulation_hook` until the end of a `with`."""
    from utils.kernels.modulation import attach_modulation_hook  # needs Triton

    return attach_modulation_hook(pipeline)


def compile_pipeline(pipeline, scope: str, cache_dir: str, flags: dict, with_t5: bool) -> None:
    """Marks the transformer ("blocks", its two kinds; "whole"; or "no blocks"), the VAE, and on a GPU T5's blocks for
    compilation at their first call.

    Args:
        flags: of inductor, for the transformer.
        with_t5: False for a T5 whose weights travel.
    """
    use_kernel_cache(cache_dir)
    # On ROCm static shapes gave black images in flux-fast's experience; not tried here.
    dynamic = True if torch.version.hip else None
    if scope == "blocks":
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=dynamic, options=flags)
    elif scope == "whole":
        flags = torch._inductor.list_mode_options("max-autotune-no-cudagraphs") | flags
        pipeline.transformer = torch.compile(pipeline.transformer, fullgraph=True, dynamic=dynamic, options=flags)
    pipeline.vae.decoder.compile(fullgraph=True, dynamic=dynamic)
    if identify(configs_of(pipeline)).needs_image:
        pipeline.vae.encoder.compile(fullgraph=True, dynamic=dynamic)
    if pipeline.device.type == "cuda" and with_t5:
        compile_text_encoder(pipeline.text_encoder_2, dynamic)
