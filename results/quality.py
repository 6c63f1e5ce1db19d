"""What each switch does to pictures: tiny-flux's, in 28 steps, against the same prompts and seeds in eager bf16.

    python results/quality.py cpu            # results/cpu/tiny/<row>.json
    python results/quality.py h100 fa3_fp8   # some rows

Half of the 100 prompts name style and background, half leave them open, where small errors can tip a picture over. All
rows run in one process, rows that this machine cannot run are left out with the reason, finished ones are left alone.
The bf16 and float32 rows and `other_seed` are the scale: what changes in no way that matters, and what all else is
worth nothing beyond. Such a small model shows whether a switch engages and whether it breaks something; it does not
show which method is better on FLUX.1's 12 B.
"""

import argparse
import random
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tiny_flux import judge  # noqa: E402
from tiny_flux.data import caption  # noqa: E402
from utils.benchmark_utils import RecipeError, create_parser, environment, write_json  # noqa: E402
from utils.pipeline_utils import call_kwargs, load_pipeline, optimize  # noqa: E402
from utils.quality import picture_drift  # noqa: E402

EAGER = ["--compile_export_mode", "disabled", "--disable_cudagraphs", "--disable_gpu_postprocess"]
PLAIN = ["--disable_fused_projections", "--disable_channels_last", "--disable_fa3", "--disable_quant"]
FUSED, CHANNELS, FA3, QUANT = PLAIN
COMPILED = ["--disable_inductor_tuning_flags", FUSED, CHANNELS]

ROWS = {
    "eager": EAGER + PLAIN,  # the reference: bf16
    "float32": [*EAGER, *PLAIN, "--disable_bf16"],
    "compile": [*COMPILED, FA3, QUANT],
    "projections": [*EAGER, CHANNELS, FA3, QUANT],
    "channels_last": [*EAGER, FUSED, FA3, QUANT],
    "int8": [*COMPILED, FA3, "--quant_dtype", "int8"],
    "float8_row": [*COMPILED, FA3, "--quant_dtype", "float8", "--quant_granularity", "row"],
    "float8_tensor": [*COMPILED, FA3, "--quant_dtype", "float8", "--quant_granularity", "tensor"],
    "fa3_bf16": [*EAGER, FUSED, CHANNELS, QUANT, "--attention_backend", "fa3_bf16"],
    "fa3_fp8": [*EAGER, FUSED, CHANNELS, QUANT, "--attention_backend", "fa3"],
    "fa3_fp8_unscaled": [*EAGER, FUSED, CHANNELS, QUANT, "--attention_backend", "fa3_unscaled"],
    "unfused": [*EAGER, CHANNELS, "--disable_fused_kernels", "--quant_dtype", "float8"],
    "fused": [*EAGER, CHANNELS, "--quant_dtype", "float8"],
    "text_encoder_quant": [*EAGER, *PLAIN, "--text_encoder_quant"],
    "cache": [*EAGER, *PLAIN, "--enable_cache_dit"],
    "steps_20": [*EAGER, *PLAIN, "--num_inference_steps", "20"],
    "steps_14": [*EAGER, *PLAIN, "--num_inference_steps", "14"],
    "all_defaults": ["--disable_inductor_tuning_flags"],
    "other_seed": [*EAGER, *PLAIN, "--seed", "1000"],
}


def prompts(count: int) -> tuple[list[str], list[judge.Wanted]]:
    """The first half with style and background, the second half names alone."""
    names, wanted = [one["name"] for one in judge.read_captions()], judge.training_captions(count)
    random.Random(2).shuffle(wanted)
    texts = [caption(names[one.emoji], one.style, one.colour) for one in wanted[:count // 2]]
    return texts + [names[one.emoji] for one in wanted[count // 2:]], wanted


def draw(row: list[str], texts: list[str], device: str):
    """One picture a prompt, as gen_image.py makes them; what was on; seconds."""
    args = create_parser().parse_args(["--ckpt", "tiny-flux-dev", "--device", device, "--quiet", *row])
    torch._dynamo.reset()
    pipeline = optimize(load_pipeline(args), args)
    start = time.perf_counter()
    images = [pipeline(**call_kwargs(pipeline, args, prompt=text, seed=args.seed + i)).images[0]
              for i, text in enumerate(texts)]
    return images, pipeline.techniques, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machine", help="name of the folder below results/, such as cpu or h100")
    parser.add_argument("rows", nargs="*", help=f"some of {', '.join(ROWS)}; all without")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"unknown row {', '.join(sorted(unknown))}: choose from {', '.join(ROWS)}")

    texts, wanted = prompts(args.prompts)
    half, the_judge, reference = len(texts) // 2, judge.Judge(), None
    for name in args.rows or ROWS:
        output = ROOT / "results" / args.machine / "tiny" / f"{name}.json"
        if output.exists():
            continue
        if reference is None:
            reference = draw(ROWS["eager"], texts, args.device)[0]
        try:
            images, techniques, seconds = draw(ROWS[name], texts, args.device)
        except RecipeError as error:
            print(f"{name}: not here: {error}", flush=True)
            continue
        # Where no background was asked for, the emoji is looked for on the one that was drawn.
        asked = wanted[:half] + [judge.Wanted(one.emoji, one.style, judge.background(image))
                                 for one, image in zip(wanted[half:], images[half:], strict=True)]
        verdicts = the_judge.verdicts(images, asked)
        record = {"row": name, "argv": ROWS[name], "prompts": len(texts), "seconds": seconds,
                  "given": picture_drift(images[:half], reference[:half]),
                  "open": picture_drift(images[half:], reference[half:]),
                  "judge": {key: verdicts[key] for key in ("top1", "top5")},
                  "techniques": {key: decision._asdict() for key, decision in techniques.items()},
                  "environment": environment(args.device)}
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(str(output), record)
        print(f"{name}: {record['given']} {record['open']} {record['judge']} {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
