"""The recipe: load a FLUX.1 pipeline, then `optimize` it, top to bottom, in the one order in which the steps work."""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers import attention_backend as diffusers_backend
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import disable_progress_bars
from transformers.utils import logging as transformers_logging

from utils import (
    attention,
    context_parallel,
    fp8_check,
    memory,
    random_weights,
    single_file,
    tasks,
    tiny_presets,
    weight_files,
)
from utils.base_weights import BaseWeights
from utils.benchmark_utils import choose_device, flags_over_quality, images_per_call, steps_that_compute_two
from utils.cache import dbcache
from utils.cache.taylorseer import TaylorSeerTransformer
from utils.checkpoint import ImageSettings, configs_of, image_settings, model_shapes, read_configs
from utils.common import RecipeError, StageLog, no_progress, reading, show_progress
from utils.compilation import compile_pipeline, use_packages
from utils.cuda_graph import CUDAGraphModule, GraphPool
from utils.hardware import detect
from utils.lora import merge_loras, read_loras
from utils.lora_swap import LoraSwap
from utils.machine import compiling, use_kernel_cache
from utils.plan import Check, Plan, StepCache, lines, make_plan
from utils.postprocess import CheckedImageProcessor, GPUImageProcessor
from utils.quantization import quantize_text_encoder, quantize_transformer
from utils.redux import add_redux, read_redux
from utils.reference_image import (
    MEGAPIXEL,
    check_crop,
    check_mask,
    fitted,
    fitted_mask,
    load_mask,
    load_reference,
    original_size,
    reference_size,
    reference_tokens,
)
from utils.text_encoding import overlap_text_encoders, stream_text_encoder, with_embeddings


def load_pipeline(args: argparse.Namespace):
    """The pipeline of the task of `args` (utils/tasks.py), LoRAs merged, nothing else changed yet.

    The plan is made from configs of a few kB, and LoRAs are read, before the checkpoint is downloaded or loaded.
    Weights land on the GPU; or on the CPU with --offload, or if they fit on the GPU only once they are quantized.

    Returns:
        The pipeline. `pipeline.plan` has every decision (`utils.plan.Plan`), `pipeline.contents` identifies the
        weights.

    Raises:
        RecipeError: with what to do about it.
    """
    if args.quiet:
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
    if args.device is None:  # a script of one's own
        choose_device(args)
    configs, hardware = read_configs(args.ckpt, args.revision, args.random_weights), detect(args)
    configs, single = single_file.find(args.transformer, configs)
    plan = make_plan(args, configs, hardware)
    memory.fit(plan, args, configs, hardware)
    if plan.compile.on or args.device == "cuda":  # Triton's kernels are compiled without it
        use_kernel_cache(args.cache_dir)
    check_pictures(plan.settings, args)
    redux = read_redux(args, configs)
    if plan.context_parallel.on:
        width, height = plan.settings.width, plan.settings.height
        text_tokens = plan.settings.max_sequence_length + (redux.tokens if redux else 0)
        context_parallel.check_tokens(text_tokens, width * height // 256, _tokens_beside(plan.settings, args))
    loras = read_loras(args.lora, model_shapes(configs), args.lora_partial) if args.lora else []
    if single:
        single_file.print_notes(single)
    files = None if args.random_weights else _checkpoint_files(args, configs)
    contents = {"weights": weight_files.identity(files.folder, single and single.path) if files else
                f"random {args.ckpt} {args.random_weights}",
                "lora": [[lora.digest(), lora.scale] for lora in loras]}
    if args.gpu_memory_limit:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.gpu_memory_limit * memory.GIB / total))

    kept = None
    if args.random_weights:
        pipeline = random_weights.build(configs, plan.load_device, plan.dtype)
    else:
        kept = kept_transformer(plan, args, configs, contents)
        if plan.kept_weights.on and not kept and plan.load_device == "cpu":
            memory.check_cpu_memory(configs, plan.dtype)
        transformer = kept or (single and single_file.load(single, plan.load_device, plan.dtype))
        pipeline = load_checkpoint(files, plan.dtype, transformer)
        for name in weight_files.STEMS:
            if not (kept and name == "transformer"):
                getattr(pipeline, name).to(plan.load_device)
        weight_files.refuse_non_finite(args.ckpt, pipeline)
        if args.ckpt in tiny_presets.NAMES:
            pipeline = tiny_presets.as_preset(pipeline, args.ckpt, keep_transformer=single is not None)
    pipeline = tasks.as_task(pipeline, plan.settings.task)
    line_loras = getattr(args, "line_loras", ())
    if args.interactive or line_loras:
        base = BaseWeights(model_shapes(configs), partial(base_reader, args, configs, plan, files, single), plan.dtype,
                           torch.device(args.device), memory.room_for_copies(args, configs, hardware, plan))
        pipeline.lora_swap = LoraSwap(args, plan, configs, loras, base)
        for specs in line_loras:
            pipeline.lora_swap.loras_of(specs)
        pipeline.lora_swap.keep_base(pipeline, has_transformer=not kept)
    if kept:
        loras = [lora.without("transformer") for lora in loras]  # whose changes are in the kept weights
    merge_loras(pipeline, [lora for lora in loras if lora.changes], torch.device(args.device), args.quiet)
    pipeline.plan, pipeline.contents = plan, contents
    if redux:
        add_redux(pipeline, redux, args, plan.dtype)
    show_progress(pipeline, not args.quiet)
    return pipeline


def base_reader(args: argparse.Namespace, configs: dict, plan: Plan, files: weight_files.Checkpoint | None,
                single: single_file.SingleFile | None) -> Callable:
    """Returns a function (component, names) -> {name: tensor} that gives parameters as `load_pipeline` found them.

    Only a checkpoint of files gives single tensors. The others are built once more, for as long as the function lives.
    """
    built = {}
    if args.random_weights:
        pipeline = random_weights.build(configs, "cpu", plan.dtype)
        built = {name: getattr(pipeline, name) for name in weight_files.STEMS}
    elif args.ckpt in tiny_presets.NAMES:
        pipeline = tiny_presets.as_preset(load_checkpoint(files, plan.dtype).to(plan.load_device), args.ckpt)
        built = {name: getattr(pipeline, name) for name in weight_files.STEMS}
    if single:
        built["transformer"] = single_file.load(single, "cpu", plan.dtype)
    parameters = {component: dict(module.named_parameters()) for component, module in built.items()}

    def read(component: str, names: list[str]) -> dict[str, torch.Tensor]:
        if component in parameters:
            return {name: parameters[component][name] for name in names}
        return weight_files.read_tensors(files, component, names)

    return read


def kept_transformer(plan: Plan, args: argparse.Namespace, configs: dict, contents: dict):
    """The quantized transformer that an earlier start kept, or None. Adapts the plan to it."""
    if not plan.kept_weights.on:
        return None
    from utils import kept_weights  # needs Triton

    found = kept_weights.load(args.cache_dir, kept_weights.fields_of(plan, contents), configs["transformer"],
                              torch.device(args.device))
    if found is None:
        return None
    transformer, check = found
    plan.kept_weights.loaded = True
    if not plan.offload.on:
        plan.load_device = args.device
    if plan.fp8_check.on:
        plan.fp8_check = (Check(note="measured before the weights were kept", difference=check["difference"])
                          if check else Check(False, "not run before the weights were kept"))
    transformer.fp8_check = check
    return transformer


def check_pictures(settings: ImageSettings, args: argparse.Namespace) -> None:
    """Loads the pictures of a command line or of a line of --prompts-file, before any weights load.

    Raises:
        RecipeError: a picture cannot be used, or the mask does not fit the image or is black.
    """
    task, size = settings.task, (settings.width, settings.height)
    for name in task.pictures:
        if name == "mask_image":
            # Fill reads each of the mask's pixels, and the others one for each of the VAE's 8x8.
            check_mask(args.mask_image, args.image, size, 1 if task is tasks.FILLING else 8)
        elif task.redraws:
            check_crop(getattr(args, name), f"--{name}", size)
        else:
            load_reference(getattr(args, name), f"--{name}")


def _tokens_beside(settings: ImageSettings, args: argparse.Namespace) -> int:
    """The number of Kontext's tokens beside the image's."""
    area = settings.width * settings.height
    if settings.task is tasks.EDITING:
        return reference_tokens(load_reference(args.image), area)
    return area // 256 if settings.task is tasks.EDITING_A_PART else 0


def _checkpoint_files(args, configs: dict) -> weight_files.Checkpoint:
    """The files of --ckpt, compared with its models. Downloads a Hub checkpoint."""
    preset = args.ckpt in tiny_presets.NAMES
    folder = tiny_presets.CHECKPOINT if preset else Path(args.ckpt).expanduser()
    return weight_files.find_checkpoint(args.ckpt, folder, args.revision,
                                        read_configs(str(folder)) if preset else configs,
                                        {"transformer"} if args.transformer else set())


def load_checkpoint(files: weight_files.Checkpoint, dtype: torch.dtype, transformer=None):
    """The pipeline of a checkpoint on the CPU, its weights compared with the files.

    Args:
        transformer: takes the place of the checkpoint's.

    Raises:
        RecipeError: a library cannot read a file, or weights did not get in.
    """
    with reading(f"--ckpt {files.ckpt}", "Download the checkpoint again, or save it anew with diffusers 0.42."):
        pipeline = DiffusionPipeline.from_pretrained(str(files.folder), dtype=dtype, use_safetensors=True,
                                                     variant=files.variant,
                                                     **({"transformer": transformer} if transformer else {}))
    weight_files.compare_loaded(files, pipeline, {"transformer"} if transformer else set())
    return pipeline


@compiling()
def optimize(pipeline, args: argparse.Namespace, log: StageLog | None = None):
    """Applies `pipeline.plan`, weights first, then code from the inside out, and warms up with the real call's shapes.

    The order is the recipe. A pipeline that `load_pipeline` did not make gets its plan here.

    Raises:
        RecipeError: packages are missing or do not fit, or, with --strict, the fp8 check fails.
    """
    plan = pipeline.plan = getattr(pipeline, "plan", None) or plan_of_own(pipeline, args)
    pipeline = tasks.as_task(pipeline, plan.settings.task)
    log, inputs = log or StageLog(args.quiet), partial(call_kwargs, pipeline, args)
    transformer, vae, device = pipeline.transformer, pipeline.vae, torch.device(args.device)
    check = begin_fp8_check(plan, pipeline, args, log)

    # Weights. LoRAs are in them. Concatenation comes before quantization: quantized tensors cannot be concatenated.
    if plan.fused_projections.on:
        fuse_projections(*([] if plan.kept_weights.loaded else [transformer]), vae)
    if plan.channels_last.on:  # cuDNN's tensor-core convolutions take NHWC
        vae.to(memory_format=torch.channels_last)
    if plan.fused_vae.on:
        put_fused_vae(plan, vae)
    if plan.vae_tiling:
        enable_tiling(vae)
    if plan.settings.is_encoded:
        encode_one_by_one(vae)
    set_attention(plan, transformer)
    quantize(plan, pipeline, device, log)
    place_weights(plan, pipeline, device)
    if swap := getattr(pipeline, "lora_swap", None):
        swap.attach(pipeline, log)
    quantized = transformer.state_dict() if plan.kept_weights.on and not plan.kept_weights.loaded else None
    measure_quantized_steps(plan, transformer, check, log)

    # Code. A step cache replaces the blocks' callers and reads the signature of the code below them. So packages are
    # loaded before it. torch.compile works from inside the blocks.
    if plan.compile.mode == "export_aoti":
        use_packages(plan, pipeline, args, inputs, log)
    if plan.context_parallel.on:
        shard_attention(plan, transformer, device)
    pool = GraphPool(bounded=not plan.context_parallel.on) if plan.cuda_graphs.on else None
    if plan.step_cache.dbcache:
        cache_steps(plan, pipeline, pool)
    if plan.compile.mode == "compile":
        compile_pipeline(plan, pipeline, args.cache_dir)
    if plan.context_parallel.on:  # inside the step's CUDA graph, which records the collectives
        pipeline.transformer = context_parallel.SequenceParallel(pipeline.transformer)
    if plan.cuda_graphs.on:
        capture_graphs(plan, pipeline, pool)
    attach_to_denoising_loop(plan, pipeline)
    set_image_processor(plan, pipeline, device)

    log.line(lines(plan))
    warm_up(plan, pipeline, inputs, check, log)
    report_fp8_check(plan, pipeline, check, args, log)
    keep_weights(pipeline, quantized, args.cache_dir, log)
    return pipeline


def plan_of_own(pipeline, args: argparse.Namespace) -> Plan:
    """The plan for a pipeline that `load_pipeline` did not make. The pipeline is cast to the plan's dtype.

    Raises:
        RecipeError: as `make_plan`, and for --lora, --transformer, --redux and --keep_quantized, which are
            `load_pipeline`'s.
    """
    if args.lora:
        raise RecipeError(f"--lora {args.lora[0]}: only load_pipeline merges LoRAs. Load the pipeline with it, or call "
                          "pipeline.fuse_lora() and drop the flag.")
    if args.transformer:
        raise RecipeError(f"--transformer {args.transformer}: only load_pipeline reads it. Load the pipeline with it, "
                          "or drop the flag.")
    if args.keep_quantized:
        raise RecipeError("--keep_quantized: the weights of a checkpoint's files alone are kept. Load the pipeline "
                          "with load_pipeline, or drop the flag.")
    if args.redux:
        raise RecipeError(f"--redux {args.redux}: only load_pipeline loads Redux. Load the pipeline with it, or drop "
                          "the flag.")
    plan = make_plan(args, configs_of(pipeline), detect(args))
    plan.load_device = pipeline.transformer.device.type
    if plan.load_device != args.device and plan.fp8_check.on:
        plan.fp8_check = Check(False, f"the unquantized model is on the {plan.load_device}")
    pipeline.to(plan.dtype)
    if args.device == "cuda":
        use_kernel_cache(args.cache_dir)
    return plan


# --- the recipe's steps; each reads its own technique of the plan ---

def put_fused_vae(plan: Plan, vae: torch.nn.Module) -> None:
    """Triton kernels in the place of the VAE's norms, attention and upsamplers."""
    from utils.kernels.fused_vae import fuse_vae  # needs Triton, which CPU builds of torch lack

    plan.fused_vae.note = "{} norms, {} attentions, {} upsamplers".format(*fuse_vae(vae))


def set_attention(plan: Plan, transformer: torch.nn.Module) -> None:
    """The attention library of diffusers' blocks. Fused blocks call FlashAttention-3 themselves."""
    chosen, sharded = plan.attention, plan.context_parallel.on
    if chosen.library and chosen.on:
        attention.register_library(chosen.library, attention.find_library(chosen.library)[0])
    if plan.fused_kernels.on:
        return
    if sharded:
        attention.use_attention_library(transformer, chosen.backend,
                                        context_parallel.ATTENTION[plan.context_parallel.kind],
                                        context_parallel.all_reduce_max)
    elif chosen.on and chosen.library:
        attention.use_attention_library(transformer, chosen.backend)
    elif chosen.on:
        with diffusers_backend("native"):  # on leaving, the process-wide default is as before
            transformer.set_attention_backend(chosen.backend)


def quantize(plan: Plan, pipeline, device: torch.device, log: StageLog) -> None:
    """The transformer: blocks on the fused kernels, or torchao's Linears. T5, if a flag asks for it."""
    if not (plan.quantization.on or plan.text_encoder_quant.on):
        return
    transformer, cpu = pipeline.transformer, torch.device("cpu")
    with log.stage("quantize"):
        if plan.fused_kernels.on:
            from utils.kernels.fused_blocks import defer_residuals, fuse_blocks  # need Triton

            in_float8, cache = plan.fused_kernels.float8_modulations, plan.step_cache.dbcache
            if not plan.kept_weights.loaded:
                count = fuse_blocks(transformer, device, in_float8, int8=plan.quantization.dtype == "int8")
                plan.quantization.note = f"{count} Linears; modulations in {'float8' if in_float8 else 'bf16'}"
            defer_residuals(transformer, *((cache.Fn_compute_blocks, cache.Bn_compute_blocks) if cache else (0, 0)))
        elif plan.quantization.on:
            count = quantize_transformer(transformer, plan.quantization.dtype, plan.quantization.granularity, device,
                                         cpu if plan.offload.mode in ("model", "group") else None)
            plan.quantization.note = f"{count} Linears"
        if plan.text_encoder_quant.on:
            quantize_text_encoder(pipeline.text_encoder_2, device, cpu if plan.offload.on else None)


def place_weights(plan: Plan, pipeline, device: torch.device) -> None:
    """Weights on the GPU, or in CPU memory until they are used (--offload)."""
    if plan.offload.mode == "model":
        # diffusers' default is GPU 0, whatever the current GPU is.
        pipeline.enable_model_cpu_offload(gpu_id=torch.cuda.current_device(), device=device)
    elif plan.offload.mode == "group":
        pipeline.enable_group_offload(onload_device=device, offload_device=torch.device("cpu"),
                                      offload_type="leaf_level", use_stream=True, record_stream=True)
    elif plan.offload.mode == "text":
        for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
            module.to(device)
        stream_text_encoder(pipeline.text_encoder_2, device)
    else:
        pipeline.to(device)


def shard_attention(plan: Plan, transformer: torch.nn.Module, device: torch.device) -> None:
    """Has fused blocks attend to the tokens of all GPUs. Other blocks do since `set_attention`."""
    if plan.fused_kernels.on:
        from utils.kernels.fused_blocks import share_attention  # needs Triton

        plan.context_parallel.peer_memory = share_attention(transformer, plan.context_parallel.kind,
                                                            plan.context_parallel.processes, device)


def cache_steps(plan: Plan, pipeline, pool) -> None:
    """cache-dit around the blocks. It decides in Python, so CUDA graphs go around the segments between decisions."""
    wrap = partial(CUDAGraphModule, pool=pool) if plan.cuda_graphs.on else None
    dbcache.enable(pipeline, plan.step_cache.dbcache, plan.step_cache.separate_cfg, wrap,
                   shared=plan.context_parallel.on)


def capture_graphs(plan: Plan, pipeline, pool) -> None:
    """CUDA graphs around text encoders, VAE decoder and step. With a step cache the step's segments have theirs.

    Args:
        pool: the `GraphPool` of graphs that never run at once.
    """
    # CLIP has a pool of its own, since it runs beside T5.
    pipeline.text_encoder = CUDAGraphModule(pipeline.text_encoder, GraphPool())
    wrap = partial(CUDAGraphModule, pool=pool)
    if plan.cuda_graphs.with_t5:
        pipeline.text_encoder_2 = wrap(pipeline.text_encoder_2)
        overlap_text_encoders(pipeline)
    pipeline.vae.decoder = wrap(pipeline.vae.decoder)
    if not plan.step_cache.dbcache:
        pipeline.transformer = wrap(pipeline.transformer)


def attach_to_denoising_loop(plan: Plan, pipeline) -> None:
    """Everything that has to be outside the step's CUDA graph, from the inside out."""
    if plan.context_parallel.on:
        pipeline.vae.decoder = context_parallel.DataParallelDecoder(pipeline.vae.decoder)
        context_parallel.start_watchdog(pipeline.transformer)
    if plan.fused_kernels.on:
        from utils.kernels.fused_blocks import prune_unused_tokens  # need Triton
        from utils.kernels.modulation import attach_modulation_hook

        attach_modulation_hook(pipeline)
        if not plan.context_parallel.on and (plan.cuda_graphs.on or not plan.step_cache.dbcache):
            prune_unused_tokens(pipeline)
    if taylorseer := plan.step_cache.taylorseer:  # an extrapolated step launches nothing of the step
        pipeline.transformer = TaylorSeerTransformer(pipeline.transformer, pipeline.scheduler, plan.step_cache.mask,
                                                     taylorseer.order)


def set_image_processor(plan: Plan, pipeline, device: torch.device) -> None:
    """Pixels become 8 bits on the GPU or on the CPU; both processors notice values that are not finite."""
    processor = GPUImageProcessor if plan.gpu_postprocess.on else CheckedImageProcessor
    pipeline.image_processor = processor.from_config(pipeline.image_processor.config)
    pipeline.image_processor.device = device
    if hasattr(pipeline, "mask_processor"):  # the image is multiplied by the mask, on one device
        pipeline.mask_processor = processor.from_config(pipeline.mask_processor.config)
        pipeline.mask_processor.device = device


def warm_up(plan: Plan, pipeline, inputs: Callable, check: fp8_check.Fp8Check | None, log: StageLog) -> None:
    """Compiles and records with the shapes of the real call. The fp8 check measures the finished recipe meanwhile."""
    if not (plan.compile.on or plan.cuda_graphs.on):
        return
    # A cache skips a step only after its own warm-up steps. Everything else shows in one step. With --strength the fp8
    # check's first step has a timestep that one step alone would not have.
    strength = plan.settings.strength
    steps = 1 if strength is None else steps_that_compute_two(strength)
    if plan.step_cache.dbcache:
        steps = plan.settings.num_inference_steps
    with log.stage("compile" if plan.compile.mode == "compile" else "record"), no_progress(pipeline):
        # A step cache would compare its first step with the second, which has inputs of its own.
        checked = check and not plan.step_cache.on
        with check.measure_next_call(pipeline.transformer) if checked else nullcontext():
            # With embeddings, as for a file of prompts, whose prompts are encoded one at a time.
            pipeline(**with_embeddings(pipeline, inputs(num_inference_steps=steps), {}))


def keep_weights(pipeline, state: dict | None, cache_dir: str, log: StageLog) -> None:
    """Keeps the quantized transformer for the next start, unless the fp8 check failed.

    Args:
        state: the transformer's tensors after `quantize`, or None if they are not to be kept.
    """
    check = pipeline.fp8_check
    if state is None or (check and not check["holds"]) or not context_parallel.is_main_process():
        return
    from utils import kept_weights

    kept_weights.keep(cache_dir, kept_weights.fields_of(pipeline.plan, pipeline.contents), state, check, log)


def begin_fp8_check(plan: Plan, pipeline, args, log: StageLog) -> fp8_check.Fp8Check | None:
    """The check with its bf16 reference, computed before anything is quantized, if the plan has it on."""
    pipeline.fp8_check = getattr(pipeline.transformer, "fp8_check", None)  # of kept weights
    if not plan.fp8_check.on or plan.kept_weights.loaded:
        return None
    with log.stage("bf16 step"), no_progress(pipeline):
        # One image, whatever the batch: a bf16 step takes three times as long as one in fp8.
        return fp8_check.Fp8Check(pipeline, call_kwargs(pipeline, args, prompt=[args.prompt], seed=[args.seed]))


def measure_quantized_steps(plan: Plan, transformer: torch.nn.Module, check: fp8_check.Fp8Check | None,
                            log: StageLog) -> None:
    """The fp8 check of the blocks before they are compiled. On several GPUs only the finished recipe shards tokens."""
    if check and not plan.context_parallel.on:
        with log.stage("fp8 check"):
            check.measure(transformer)


def report_fp8_check(plan: Plan, pipeline, check: fp8_check.Fp8Check | None, args, log: StageLog) -> None:
    """Prints the fp8 check's result and keeps it in `pipeline.fp8_check`.

    Raises:
        RecipeError: fp8 does not hold, with --strict.
    """
    if check:
        pipeline.fp8_check, plan.fp8_check.difference = check.record(), check.difference
        log.line(f"fp8 check: {check.line()}")
        if context_parallel.is_main_process():
            check.report(plan.lossy(), args.strict, flags_over_quality(args))


def use_step_cache(pipeline, step_cache: StepCache) -> None:
    """Gives an optimized pipeline the mask that its step cache has for another number of steps."""
    pipeline.plan = replace(pipeline.plan, step_cache=step_cache)
    if step_cache.taylorseer:
        pipeline.transformer.mask = step_cache.mask
    elif step_cache.dbcache:
        pipeline.cache_options = step_cache.dbcache


def call_kwargs(pipeline, args, prompt: str | list[str] | None = None, seed: int | list[int] | None = None,
                num_inference_steps: int | None = None, negative_prompts: list[str] | None = None,
                pictures: dict[str, list[str]] | None = None) -> dict:
    """The arguments of one pipeline call: the only place where they are made, for warm-up, timing, trace and images.

    Holds generators, which a call uses up: make new ones for each call, outside what is timed.

    Args:
        prompt: one, for --num_images_per_prompt images, or a list of one an image. By default --prompt; with
            --prompts-file, --prompt repeated to the size of the file's batches, as `optimize` warms up.
        seed: of the first image, or a list of one an image. By default --seed.
        negative_prompts: one an image. By default --negative_prompt for all.
        pictures: {flag of `tasks.PICTURES`: path or URL of each image's picture}. By default the flag's for all.
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
        one = args.negative_prompt
        kwargs |= dict(negative_prompt=negative_prompts or ([one] * count if batched else one),
                       true_cfg_scale=args.true_cfg_scale)
    if settings.task.pictures:
        kwargs |= _picture_kwargs(settings, {name: (pictures or {}).get(name) or [getattr(args, name)] * count
                                             for name in settings.task.pictures})
    if settings.strength is not None:
        kwargs["strength"] = settings.strength
    return kwargs


def _picture_kwargs(settings: ImageSettings, paths: dict[str, list[str]]) -> dict:
    """The pictures of a task: 8 bits, RGB or gray, at the output's size.

    Args:
        paths: {flag: path or URL of each image's picture}. A picture that all images share is encoded once, unless
            encoding draws random numbers.
    """
    task, width, height = settings.task, settings.width, settings.height
    if task is tasks.EDITING:
        return _reference_kwargs(paths["image"], width, height)
    kwargs, count = {}, len(paths[task.redraws])
    for name in task.pictures:
        of_each = list(zip(paths[name], paths[task.redraws], strict=True))
        if len(set(of_each)) == 1 and not task.draws_latents:
            of_each = of_each[:1]
        made = [fitted_mask(load_mask(path), original_size(image, f"--{task.redraws}"), (width, height))
                if name == "mask_image" else fitted(load_reference(path, f"--{name}"), (width, height))
                for path, image in of_each]
        kwargs[name] = made if len(made) > 1 else made[0]
    if task is tasks.INPAINTING:
        # FLUX.1 without Fill's channels does not see the masked picture, which diffusers would encode all the same.
        kwargs["masked_image_latents"] = torch.zeros(count, 16, height // 8, width // 8)
    if task is tasks.EDITING_A_PART:  # or diffusers replaces the size
        kwargs |= dict(max_area=width * height, _auto_resize=False)
    return kwargs


def _reference_kwargs(images: list[str], width: int, height: int) -> dict:
    """Kontext's image arguments. At a megapixel diffusers picks the nearest size that Kontext was trained on; at other
    sizes it would still return a megapixel, so there the references are brought to the output's area.

    Args:
        images: path or URL of each image's reference. A reference that all images share is encoded once.
    """
    area = width * height
    references = [load_reference(image) for image in (images if len(set(images)) > 1 else images[:1])]
    if area != MEGAPIXEL:
        references = [image.resize(reference_size(image, area)) for image in references]
    kwargs = dict(image=references if len(references) > 1 else references[0], max_area=area)
    return kwargs if area == MEGAPIXEL else kwargs | dict(_auto_resize=False)


def enable_tiling(vae: torch.nn.Module) -> None:
    """Decodes in tiles of half the VAE's own size. diffusers' default tile is that whole size, which for FLUX means
    that a 1024x1024 image is one tile and nothing is saved."""
    vae.enable_tiling()
    vae.tile_sample_min_size = vae.config.sample_size // 2
    vae.tile_latent_min_size = vae.tile_sample_min_size // 2 ** (len(vae.config.block_out_channels) - 1)


def encode_one_by_one(vae: torch.nn.Module) -> None:
    """Encodes the pictures of a batch one at a time, so that compiled code and packages of the encoder see one shape.

    diffusers does so for images, and encodes masked and control pictures as a batch.
    """
    encode = vae._encode
    vae._encode = lambda x: encode(x) if len(x) == 1 else torch.cat([encode(one) for one in x.split(1)])


def fuse_projections(*models: torch.nn.Module) -> None:
    """One Linear for q, k, v instead of three, and the three freed: diffusers keeps them, 4.3 GB in FLUX.1's case."""
    for model in models:
        model.fuse_qkv_projections()
    for module in (module for model in models for module in model.modules()):
        if getattr(module, "fused_projections", False):
            for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
                if hasattr(module, name):
                    delattr(module, name)
