"""One image, or one for each line of a file: parse, load, optimise, generate, save. The path to copy.

    python gen_image.py --ckpt tiny-flux --prompt "A cat playing with a ball of yarn"
"""

from pathlib import Path

from utils.benchmark_utils import (
    RecipeError,
    StageLog,
    check_args,
    create_parser,
    exit_with_reason,
    spare_the_garbage_collector,
)
from utils.images import numbered_path, save_image
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize, with_embeddings


def main():
    args = create_parser().parse_args()
    check_args(args)
    for flag in ("trace_file", "output_json", "step_error"):
        if getattr(args, flag):
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
        for i, image in enumerate(images):
            seed = first_seed + i
            if args.prompts_file:
                path = numbered_path(args.output_file, index, seed)
            elif len(images) > 1:
                path = numbered_path(args.output_file, i, seed)
            else:
                path = args.output_file
            save_image(image, path, parameters(args, kwargs, pipeline, prompt, seed))
            log.line(f"wrote {path}")


def read_prompts(path: str) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        prompts = [line.strip() for line in Path(path).expanduser().read_text().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise RecipeError(f"--prompts-file {path} is not UTF-8 text: {error}") from error
    if not prompts:
        raise RecipeError(f"--prompts-file {path} holds no prompt: write one a line.")
    return prompts


def parameters(args, kwargs: dict, pipeline, prompt: str, seed: int) -> dict:
    """What the image file says of how it was made."""
    names = ("height", "width", "num_inference_steps", "guidance_scale", "negative_prompt", "true_cfg_scale")
    return {"prompt": prompt, "seed": seed, "model": args.ckpt, "revision": args.revision, "lora": args.lora,
            "image": args.image, "random_weights": args.random_weights is not None,
            "techniques": {name: how for name, (on, how) in pipeline.techniques.items() if on},
            **{name: kwargs[name] for name in names if name in kwargs}}


if __name__ == "__main__":
    exit_with_reason(main)
