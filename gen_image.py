"""Makes one image, or one per line of a file or of standard input: parse, load, optimize, generate, save.

Copy this script to start.

    python gen_image.py --ckpt tiny-flux --prompt "3d avocado on a teal background"
    torchrun --nproc_per_node=2 gen_image.py --context_parallel auto --prompt "A cat playing with a ball of yarn"

A script of your own imports `utils` before torch and calls create_parser, check_args, load_pipeline and optimize once.
For each picture it calls pipeline(**call_kwargs(pipeline, args, prompt, seed)), which returns it in `images`. The size
and the batch stay those of `args`. Make the kwargs anew for each picture, because a call uses up their generators.
"""

import sys

from utils import read_ahead
from utils.benchmark_utils import check_args, choose_device, create_parser
from utils.common import StageLog, freeze_gc, run_cli
from utils.output_checks import check_outputs
from utils.prompts_file import image_paths, read_prompts, references_of, texts_of


def main():
    args = create_parser().parse_args()
    check_args(args)
    prompts, complaints = read_prompts(args.prompts_file, args) if args.prompts_file else ([], [])
    paths = image_paths(args, prompts)
    check_outputs(args, paths, texts_of(prompts) or [args.prompt], references_of(prompts))

    read_ahead.start(args)
    # Only now, since torch and diffusers take seconds to import.
    from utils import context_parallel
    from utils.cache import dbcache
    from utils.images import image_parameters, keep_images
    from utils.interactive import Session
    from utils.many_prompts import join_processes, make_images, usable_prompts
    from utils.pipeline_utils import call_kwargs, load_pipeline, optimize
    from utils.text_encoding import warn_of_cut_prompts

    choose_device(args)
    if args.context_parallel:
        context_parallel.init_distributed(args)
    processes = join_processes(args)
    prompts, more = usable_prompts(args, prompts)
    for complaint in complaints + more:
        processes.print(complaint, file=sys.stderr)
    log = StageLog(args.quiet)

    with log.stage("load"):
        pipeline = load_pipeline(args)
    pipeline = optimize(pipeline, args, log)
    freeze_gc()
    if prompts:
        return make_images(pipeline, args, prompts, processes, log)
    if args.interactive:
        return Session(pipeline, args, log).run()

    kwargs = call_kwargs(pipeline, args)
    if context_parallel.is_main_process():
        given = [("--prompt", args.prompt), ("--negative_prompt", args.negative_prompt)]
        warn_of_cut_prompts(pipeline, given, kwargs["max_sequence_length"])
    with log.stage("image"):
        images = pipeline(**kwargs).images
    if not context_parallel.is_main_process():
        return
    if pipeline.plan.step_cache.on:
        log.line(dbcache.cached_steps_line(pipeline, pipeline.plan.settings.steps))
    keep_images(pipeline, images, paths, [image_parameters(args, pipeline, kwargs, args.prompt, args.seed + i)
                                          for i in range(len(images))], log)


if __name__ == "__main__":
    run_cli(main)
