"""Benchmark: time images and their stages, and record the GPU's load, the memory, the errors and the settings.

    python run_benchmark.py --random_weights --output-json result.json
    torchrun --nproc_per_node=2 run_benchmark.py --random_weights --context_parallel auto

It also saves the last image, and a profiler trace with --trace-file. The last line on stdout is the result as one JSON
object.
"""

import json

from utils import read_ahead
from utils.benchmark_utils import check_args, choose_device, create_parser
from utils.common import RecipeError, StageLog, freeze_gc, run_cli, show_progress
from utils.output_checks import check_outputs
from utils.outputs import as_path


def main():
    args = create_parser(measure=True).parse_args()
    check_args(args)
    for name, least in (("runs", 1), ("warmup", 0)):
        if getattr(args, name) < least:
            raise RecipeError(f"--{name} {getattr(args, name)}: the value must be at least {least}.")
    if args.prompts_file or args.interactive:
        flag = f"--prompts-file {args.prompts_file}" if args.prompts_file else "--interactive"
        raise RecipeError(f"{flag}: run_benchmark.py times one prompt only. Use --prompt, or draw with gen_image.py.")
    path = as_path(args.output_file)
    check_outputs(args, [path], [args.prompt])
    if args.step_error and (args.step_cache or args.offload != "none"):
        raise RecipeError("--step_error runs a single step with the unquantized transformer on the GPU: it does not "
                          "work with --step_cache or --offload. Drop one of the flags.")

    read_ahead.start(args)
    # Only now, since torch and diffusers take seconds to import.
    import torch

    from bench import timing
    from bench.energy import EnergyCounter
    from bench.environment import PeakMemory, monitor_gpu
    from bench.quality import capture_step, float32_step
    from bench.roofline import record_token_counts, step_record
    from utils import context_parallel, flaws
    from utils.cuda_graph import recording_is_an_error
    from utils.images import image_parameters, keep_image
    from utils.machine import kernel_cache
    from utils.outputs import is_record, write_json, write_or_rescue
    from utils.pipeline_utils import call_kwargs, load_pipeline, optimize
    from utils.text_encoding import warn_of_cut_prompts

    choose_device(args)
    if args.kernels and args.device != "cuda":
        raise RecipeError("--kernels lists GPU kernels and needs --device cuda. Add it, or drop --kernels.")
    if args.context_parallel:
        context_parallel.init_distributed(args)
    log, memory = StageLog(args.quiet), PeakMemory()
    cache_was_empty = not any(kernel_cache(args.cache_dir).glob("*"))
    if __name__ == "__main__":
        log.seconds["imports"] = timing.since_start()

    with log.stage("load"):
        pipeline = load_pipeline(args)
    if args.step_error:
        with log.stage("float32 step"):
            show_progress(pipeline, False)
            step_inputs = capture_step(pipeline, call_kwargs(pipeline, args))
            reference = float32_step(pipeline.transformer, step_inputs)
    memory.end_of("load")
    pipeline = optimize(pipeline, args, log)
    freeze_gc()
    memory.end_of("optimize")
    show_progress(pipeline, False)
    error = timing.step_error(pipeline, args, step_inputs, reference) if args.step_error else None
    if context_parallel.is_main_process():
        prompts = [("--prompt", args.prompt), ("--negative_prompt", args.negative_prompt)]
        warn_of_cut_prompts(pipeline, prompts, call_kwargs(pipeline, args)["max_sequence_length"])

    # `optimize` has compiled and recorded everything: a compilation or recording from here on is an error.
    with torch._dynamo.config.patch(error_on_recompile=True), recording_is_an_error(), log.stage("warm-up"):
        for i in range(args.warmup):
            pipeline(**call_kwargs(pipeline, args))
            # The cold start is only valid in a process of its own, and without --step_error's extra work.
            if i == 0 and __name__ == "__main__" and not args.step_error:
                timing.synchronize(args.device)
                log.seconds["process start to first image"] = timing.since_start()
    counter = EnergyCounter(args.device)
    with torch._dynamo.config.patch(error_on_recompile=True), recording_is_an_error():
        before = counter.joules()
        seconds, image = timing.time_images(pipeline, args)
        used = counter.since(before)
        is_finite = pipeline.image_processor.finite.tolist()[0]
        memory.end_of("image")
        with record_token_counts(pipeline.transformer) as tokens, monitor_gpu(args.device) as load:
            stages, steps = timing.time_stages(pipeline, args)
        kernels = timing.step_kernels(pipeline, args) if args.kernels else None
        energy = {"image": used and used / (args.runs * args.num_images_per_prompt),
                  "step": timing.step_energy(pipeline, args, counter, stages["denoising_step"])}
    if not context_parallel.is_main_process():
        if args.trace_file:  # the main process traces one more image, which needs every rank
            pipeline(**call_kwargs(pipeline, args))
        return

    kwargs = call_kwargs(pipeline, args)
    parameters = image_parameters(args, pipeline, kwargs, args.prompt, args.seed)
    errors = [keep_image(image, path, parameters, is_finite)]
    record = timing.record_of(args, pipeline, kwargs, seconds, image, is_finite) | {
        "stages_ms": stages, "steps_ms": steps, "gpu_load": load, "energy_j": energy,
        "roofline": step_record(pipeline.transformer.config, tokens, stages["denoising_step"],
                                cached=pipeline.plan.step_cache.on),
        "step_kernels": kernels, "cold_start_s": log.seconds, "compile_cache_was_empty": cache_was_empty,
        "peak_memory": memory.phases, "step_relative_error": error,
    }
    if args.output_json:
        errors.append(write_or_rescue(lambda path: write_json(path, record, is_record), args.output_json, "result"))
    timing.report(record)
    print(json.dumps(record), flush=True)
    if args.trace_file:  # last, so that a failed trace does not cost the result
        errors.append(timing.write_trace(pipeline, args))
    flaws.raise_errors([error for error in errors if error], pipeline)


if __name__ == "__main__":
    run_cli(main)
