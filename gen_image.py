"""One image, or one for each line of a file: parse, load, optimise, generate, save. The path to copy.

    python gen_image.py --ckpt tiny-flux --prompt "3d avocado on a teal background"
"""

from pathlib import Path

from utils import step_cache
from utils.benchmark_utils import (
    RecipeError,
    StageLog,
    check_args,
    create_parser,
    exit_with_reason,
    spare_the_garbage_collector,
)
from utils.images import image_parameters, numbered_path, save_image
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize, with_embeddings


def main():
    args = create_parser().parse_args()
    check_args(args)
    for flag in ("trace_file", "output_json", "step_error", "kernels", "warmup", "runs", "compare", "ceilings",
                 "force_cache"):
        if getattr(args, flag) is not None and getattr(args, flag) is not False:
            raise RecipeError(f"--{flag} is for run_benchmark.py: gen_image.py only makes images.")
    prompts = read_prompts(args.prompts_file) if args.prompts_file else [args.prompt]
    log = StageLog(args.quiet)

    with log.stage("load"):
        pipeline = load_pipeline(args)
    pipeline = optimize(pipeline, args, log)
    spare_the_garbage_collector()

    embeddings = {}
    for index, prompt in enumerate(prompts):
        first_seed = args.seed + index * args.num_images_per_prompt
        kwargs = call_kwargs(pipeline, args, prompt=prompt, seed=first_seed)
        with log.stage("image"):
            images = pipeline(**with_embeddings(pipeline, kwargs, embeddings)).images
        if pipeline.techniques["step cache"].on:
            log.line(step_cache.last_image(pipeline, kwargs["num_inference_steps"]))
        for i, image in enumerate(images):
            seed = first_seed + i
            if args.prompts_file:
                path = numbered_path(args.output_file, index, seed)
            elif len(images) > 1:
                path = numbered_path(args.output_file, i, seed)
            else:
                path = args.output_file
            save_image(image, path, image_parameters(args, kwargs, pipeline.techniques, prompt, seed))
            log.line(f"wrote {path}")


def read_prompts(path: str) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"--prompts-file {path} is not UTF-8 text: {error}") from error
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise RecipeError(f"--prompts-file {path} holds no prompt: write one a line.")
    return prompts


if __name__ == "__main__":
    exit_with_reason(main)
