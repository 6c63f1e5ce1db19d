"""One image, or one for each line of a file: parse, load, optimise, generate, save. The path to copy.

    python gen_image.py --ckpt tiny-flux --prompt "3d avocado on a teal background"
    torchrun --nproc_per_node=2 gen_image.py --context_parallel auto --prompt "A cat playing with a ball of yarn"
"""

import sys

from utils import parallel, step_cache
from utils.benchmark_utils import RecipeError, StageLog, create_parser, exit_with_reason, spare_the_garbage_collector
from utils.checks import check_args
from utils.images import image_parameters, numbered_path, save_image
from utils.many_prompts import join_processes, make_images, read_prompts
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize


def main():
    args = create_parser().parse_args()
    check_args(args)
    for flag in ("trace_file", "output_json", "step_error", "kernels", "warmup", "runs", "compare", "ceilings",
                 "force_cache", "stop_before_timing"):
        if getattr(args, flag) is not None and getattr(args, flag) is not False:
            raise RecipeError(f"--{flag} is for run_benchmark.py: gen_image.py only makes images.")
    if args.context_parallel:
        parallel.join(args)
    processes = join_processes(args)
    prompts, complaints = read_prompts(args.prompts_file) if args.prompts_file else (None, [])
    for complaint in complaints:
        processes.print(complaint, file=sys.stderr)
    log = StageLog(args.quiet)

    with log.stage("load"):
        pipeline = load_pipeline(args)
    pipeline = optimize(pipeline, args, log)
    spare_the_garbage_collector()
    if prompts:
        return make_images(pipeline, args, prompts, processes, log)

    kwargs = call_kwargs(pipeline, args)
    with log.stage("image"):
        images = pipeline(**kwargs).images
    if not parallel.is_first():
        return
    if pipeline.techniques["step cache"].on:
        log.line(step_cache.last_image(pipeline, kwargs["num_inference_steps"]))
    for i, image in enumerate(images):
        path = numbered_path(args.output_file, i, args.seed + i) if len(images) > 1 else args.output_file
        save_image(image, path, image_parameters(args, kwargs, pipeline.techniques, args.prompt, args.seed + i))
        log.line(f"wrote {path}")


if __name__ == "__main__":
    exit_with_reason(main)
