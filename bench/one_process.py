"""Measures what one process draws when sizes and LoRAs change, beside processes that were started for each.

    python -m bench.one_process --output-json sizes.json --sizes 512x512 1024x1024 1536x1024 --alone -- \\
        --ckpt black-forest-labs/FLUX.1-schnell --random_weights
    python -m bench.one_process --output-json loras.json --random_loras 16 64 --swaps 10 --alone -- \\
        --ckpt black-forest-labs/FLUX.1-schnell --random_weights

The flags after `--` are gen_image.py's. The sizes, and Kontext's --images, come twice, in a random order. The LoRAs
take turns, and none at all is one of them. Each visit has the seconds of the swap, of the first picture, which may
record CUDA graphs, and of three more, the milliseconds of a step, and a hash of the first picture's pixels.
"""

import argparse
import gc
import hashlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.environment import SCHEMA_VERSION
from utils.benchmark_utils import check_args, choose_device, create_parser
from utils.common import RecipeError, StageLog, run_cli
from utils.output_checks import check_output
from utils.outputs import is_record, write_json
from utils.prompts_file import Request, args_with

RUNS = 3  # pictures of a visit after its first
# {module of the published FLUX.1: its shape, in multiples of the width D}
DOUBLE = {f"{stream}_{part}": shape for stream in ("img", "txt") for part, shape in (
    ("attn.qkv", (3, 1)), ("attn.proj", (1, 1)), ("mlp.0", (4, 1)), ("mlp.2", (1, 4)))}
SINGLE = {"linear1": (7, 1), "linear2": (1, 5)}
FORMATS = {  # {name: (begin of a key, dots become, the two factors)}
    "BFL": ("", ".", ("lora_A", "lora_B")),
    "ComfyUI": ("diffusion_model.", ".", ("lora_A", "lora_B")),
    "kohya": ("lora_unet_", "_", ("lora_down", "lora_up")),
}


def random_lora(path: Path, rank: int, spelling: str, config: dict) -> Path:
    """Writes a LoRA with random values for every Linear of every block but the modulations, in bf16.

    Args:
        spelling: of `FORMATS`.
        config: the transformer's.
    """
    import torch
    from safetensors.torch import save_file

    begin, dot, (down, up) = FORMATS[spelling]
    width, source, tensors = config["num_attention_heads"] * config["attention_head_dim"], torch.Generator(), {}
    source.manual_seed(rank)
    for kind, modules, count in (("double_blocks", DOUBLE, config["num_layers"]),
                                 ("single_blocks", SINGLE, config["num_single_layers"])):
        for name, (rows, columns) in ((f"{kind}.{i}.{module}", shape) for i in range(count)
                                      for module, shape in modules.items()):
            key, rows, columns = begin + name.replace(".", dot), rows * width, columns * width
            tensors[f"{key}.{down}.weight"] = torch.randn(rank, columns, generator=source) / columns ** 0.5
            tensors[f"{key}.{up}.weight"] = torch.randn(rows, rank, generator=source) / 20
            if spelling == "kohya":
                tensors[f"{key}.alpha"] = torch.tensor(rank / 2)
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, path)
    return path


def visit(pipeline, args: argparse.Namespace, own: dict, sizes: set[str], log: StageLog) -> dict:
    """Draws with some settings, as a line of a prompts file does. Returns the entry of a record.

    Args:
        own: what differs from the command line.
        sizes: the sizes that were drawn.
    """
    import torch

    from bench.timing import synchronize, time_images, time_stages
    from utils.checkpoint import configs_of
    from utils.many_prompts import Variant, batch_kwargs, prepare

    variant = Variant(pipeline, args_with(args, own), configs_of(pipeline))
    request, start = Request(args.prompt, args.seed, Path("image.png"), tuple(own.items())), time.perf_counter()
    prepare(pipeline, variant, {}, sizes, log)
    synchronize(args.device)
    prepared = time.perf_counter() - start
    kwargs, start = batch_kwargs(pipeline, [request], lambda _: variant, 1), time.perf_counter()
    image = pipeline(**kwargs).images[0]
    synchronize(args.device)
    first = time.perf_counter() - start
    later, again = time_images(pipeline, variant.args)
    stages, _ = time_stages(pipeline, variant.args)
    free, total = torch.cuda.mem_get_info() if args.device == "cuda" else (0, 0)
    entry = {"settings": without_folders(own), "prepare_s": prepared, "first_s": first, "later_s": later,
             "step_ms": stages["denoising_step"], "same_pixels": again.tobytes() == image.tobytes(),
             "sha256": hashlib.sha256(image.tobytes()).hexdigest(),
             "used_gib": (total - free) / 2**30}
    print(f"{json.dumps(entry['settings']):<60} prepared {prepared:.3f}, first {first:.3f}, later "
          f"{statistics.median(later):.4f} s, step {entry['step_ms']:.2f} ms", flush=True)
    return entry


def without_folders(own: dict) -> dict:
    """Settings for a record, in which files have their names alone."""
    return {name: [Path(one).name for one in value] if name == "lora" else
            Path(value).name if name == "image" else value for name, value in own.items()}


def order_of(args: argparse.Namespace, loras: list[str]) -> list[dict]:
    """The settings of each visit, in their order."""
    places = [dict(zip(("width", "height"), map(int, size.split("x")), strict=True)) for size in args.sizes]
    places = [place | {"image": image} for place in places or [{}] for image in args.images] or places
    source = random.Random(args.order)
    visits = [place for _ in range(2) for place in source.sample(places, len(places))]
    turns = [(), *((lora,) for lora in loras)]
    return visits + [{"lora": turns[i % len(turns)]} for i in range(args.swaps + 1) if loras]


def alone(flags: list[str], own: dict) -> dict:
    """The same visit in a process that is started for its settings."""
    more = [f"--{name}={one}" for name, value in own.items() for one in (value if name == "lora" else [value])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "alone.json")
        done = subprocess.run([sys.executable, "-m", "bench.one_process", "--output-json", str(path), "--", *flags,
                               *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        if done.returncode:
            raise RecipeError(f"a process of its own for {own} ended with exit code {done.returncode}: "
                              f"{(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        return json.loads(path.read_text())["visits"][0] | {"settings": without_folders(own)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-json", required=True, metavar="FILE", help="where to write the record")
    parser.add_argument("--sizes", nargs="+", default=[], metavar="WIDTHxHEIGHT", help="sizes that take turns")
    parser.add_argument("--images", nargs="+", default=[], metavar="PATH", help="references of Kontext that take turns")
    parser.add_argument("--random_loras", nargs="+", type=int, default=[], metavar="RANK",
                        help="LoRAs with random values that take turns, each in another public format")
    parser.add_argument("--swaps", type=int, default=10, metavar="N", help="swaps of LoRAs (10)")
    parser.add_argument("--order", type=int, default=0, metavar="SEED", help="of the random order (0)")
    parser.add_argument("--alone", action="store_true", help="also measure a process of its own for each setting")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, flags = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1:]
    check_output(args.output_json, "--output-json", is_record)
    own = create_parser(measure=True).parse_args([*flags, f"--runs={RUNS}"])
    own.interactive = bool(args.random_loras)  # such a process can swap LoRAs that it did not know at its start
    check_args(own)

    import torch

    from bench.environment import environment
    from utils.checkpoint import read_configs
    from utils.common import show_progress
    from utils.pipeline_utils import load_pipeline, optimize

    choose_device(own)
    log = StageLog(own.quiet)
    machine = environment(own.device)
    record = {"schema_version": SCHEMA_VERSION, "flags": machine["argv"][len(machine["argv"]) - len(flags):],
              "environment": machine, "visits": []}
    with tempfile.TemporaryDirectory() as folder:
        config = read_configs(own.ckpt, own.revision, own.random_weights)["transformer"]
        loras = [str(random_lora(Path(folder, f"rank{rank}_{spelling}.safetensors"), rank, spelling, config))
                 for rank, spelling in zip(args.random_loras, [*FORMATS] * len(args.random_loras), strict=False)]
        with log.stage("load"):
            pipeline = load_pipeline(own)
        pipeline = optimize(pipeline, own, log)
        show_progress(pipeline, False)
        sizes, order = set(), order_of(args, loras) or [{}]
        for settings in order:
            record["visits"].append(visit(pipeline, own, settings, sizes, log))
            write_json(args.output_json, record, is_record)
        del pipeline
        gc.collect()  # the GPU memory is for the next processes
        torch.cuda.empty_cache()
        if args.alone:
            distinct = [json.loads(one) for one in dict.fromkeys(map(json.dumps, order))]
            record["alone"] = []
            for settings in distinct:
                record["alone"].append(alone(flags, settings))
                write_json(args.output_json, record, is_record)
    record["start_s"] = log.seconds
    write_json(args.output_json, record, is_record)


if __name__ == "__main__":
    run_cli(main)
