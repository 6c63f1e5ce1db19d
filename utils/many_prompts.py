"""A file of prompts: images in batches, over every process that `accelerate launch` starts, and resumable.

What is done is read from the images' own metadata, not from the manifest: an image is renamed into its place whole, so
a crash loses the batch being computed and the one being written. The manifest is a list for people and programs, one
line of JSON an image; where an image was made again, its last line counts.
"""

import hashlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState

from utils import tiny_presets
from utils.benchmark_utils import images_per_call
from utils.common import BrokenResult, RecipeError, reason_of
from utils.flaws import raise_errors
from utils.images import decode, image_parameters, keep_image, numbered_path, read_parameters
from utils.machine import forget_launchers, own_gpu, world_size
from utils.outputs import append_line, as_path, manifest_path
from utils.pipeline_utils import call_kwargs, show_progress
from utils.prompts_file import Prompt
from utils.text_encoding import warn_of_cut_prompts, with_embeddings


class Request(NamedTuple):
    """One image to make."""
    prompt: str
    seed: int
    path: Path


def join_processes(args) -> PartialState | None:
    """This process's place among those of `accelerate launch`, its GPU made the current one. Only the first one talks.
    Without --prompts-file None, since it takes a call of nvidia-smi.
    """
    if not args.prompts_file:
        return None
    if world_size() == 1:
        forget_launchers()
        # On several RTX 40 cards with an old driver accelerate refuses to start without these, for the sake of NCCL,
        # which a single process does not use. `accelerate launch` sets them itself.
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            os.environ.setdefault(name, "1")
    elif args.device == "cuda":
        own_gpu()
    processes = PartialState(cpu=args.device == "cpu")
    args.quiet = args.quiet or not processes.is_main_process
    return processes


def requests_of(prompts: list[Prompt], args) -> list[Request]:
    """The images to make. Image i of the prompt with index k has --seed + k * --num_images_per_prompt + i for a seed,
    or the prompt's own + i: batches and processes change neither seeds nor names."""
    count, requests = args.num_images_per_prompt, []
    for prompt in prompts:
        first = args.seed + prompt.index * count if prompt.seed is None else prompt.seed
        requests += [Request(prompt.text, seed, numbered_path(args.output_file, prompt.index, seed))
                     for seed in range(first, first + count)]
    return requests


def image_paths(args, prompts: list[Prompt] | None) -> list[Path]:
    """Every file that gen_image.py saves an image to."""
    if prompts:
        return [request.path for request in requests_of(prompts, args)]
    if args.num_images_per_prompt == 1:
        return [as_path(args.output_file)]
    return [numbered_path(args.output_file, i, args.seed + i) for i in range(args.num_images_per_prompt)]


def is_made(path: Path, parameters: dict) -> bool:
    """Whether the image is there, whole, and says that it was made with these parameters."""
    try:
        if _of_the_picture(read_parameters(path)) != _of_the_picture(parameters):
            return False
        decode(path)
        return True
    except Exception:  # not there, not an image of ours, or not to its end: PIL raises SyntaxError, too
        return False


def _of_the_picture(parameters: dict) -> dict:
    """Without what is of the run alone: whether packages were exported or loaded, and what files are called."""
    techniques = {name: None if name == "compile" else how for name, how in parameters["techniques"].items()
                  if name != "fp8 check"}
    names = {"revision", "lora", "image"} if parameters.get("contents") else set()
    if names and not parameters["random_weights"] and parameters["model"] not in tiny_presets.NAMES:
        names.add("model")  # one checkpoint of several names otherwise
    return json.loads(json.dumps({name: value for name, value in parameters.items() if name not in names}
                                 | {"techniques": techniques}))


def warn_of_long_prompts(pipeline, prompts: list[Prompt], max_sequence_length: int) -> None:
    """Says once that T5 does not read the ends of some prompts, which it is the tokenizer's way to cut in silence."""
    tokens = pipeline.tokenizer_2([prompt.text for prompt in prompts]).input_ids
    long = [prompt.line for prompt, ids in zip(prompts, tokens, strict=True) if len(ids) > max_sequence_length]
    if long:
        print(f"{len(long)} of {len(prompts)} prompts longer than the {max_sequence_length} tokens that are read, the "
              f"first in line {long[0]}: the ends have no effect.", file=sys.stderr)


class Progress:
    """How far all processes together are: they append to one manifest, and this counts what it gains."""

    def __init__(self, manifest: Path, total: int):
        self.manifest, self.total, self.done = manifest, total, 0
        self.read = manifest.stat().st_size if manifest.exists() else 0
        self.start = time.perf_counter()

    def line(self) -> str:
        """Images done, their rate since the start, and what remains at that rate."""
        gained = b""
        if self.manifest.exists():
            with open(self.manifest, "rb") as file:
                file.seek(self.read)
                gained = file.read()
        self.read += len(gained)
        self.done += gained.count(b"\n")
        rate = self.done / (time.perf_counter() - self.start)
        text = f"{self.done} of {self.total} images, {rate * 60:.1f} a minute"
        if 0 < self.done < self.total:
            text += f", {timedelta(seconds=round((self.total - self.done) / rate))} to go"
        return text


def write_images(images: list, are_finite: list[bool], requests: list[Request], common: dict, seconds: float,
                 manifest: Path) -> list[RecipeError]:
    """Saves images and adds their lines to the manifest. Broken images and those that had to go elsewhere get none.

    Args:
        are_finite: as `CheckedImageProcessor.finite` has it.
        common: the parameters that all images share.
        seconds: an image's share of its batch's time.

    Returns:
        What went wrong, not raised: broken images, and what could not be written where it belongs.
    """
    errors = []
    for image, is_finite, request in zip(images, are_finite, requests, strict=True):
        parameters = common | {"prompt": request.prompt, "seed": request.seed}
        if error := keep_image(image, request.path, parameters, is_finite):
            errors.append(error)
            continue
        try:
            append_line(manifest, {"file": request.path.name, **parameters, "seconds": round(seconds, 4),
                                   "sha256": hashlib.sha256(request.path.read_bytes()).hexdigest()})
        except OSError as error:
            errors.append(RecipeError(f"{manifest}: {request.path.name} is made, and cannot be added to the list "
                                      f"({reason_of(error)})"))
    return errors


def make_images(pipeline, args, prompts: list[Prompt], processes: PartialState, log) -> None:
    """Makes what is missing of the images of `prompts`, this process its share, with an optimized pipeline.

    A batch that is not full is filled up with its last prompt and the surplus dropped: compiled code and CUDA graphs
    see the one shape that `optimize` warmed up. While a batch is computed, a thread writes the one before. Broken
    images do not stop the others; an image or a line that cannot be written does.

    Raises:
        RecipeError: as `raise_errors` has it, once all that was computed is kept.
    """
    size, manifest = images_per_call(args), manifest_path(args.output_file)
    kwargs = call_kwargs(pipeline, args)
    common = image_parameters(args, pipeline, kwargs, prompt="", seed=0)
    group = None
    if processes.num_processes > 1:
        # Over gloo: waiting for one another takes no GPU memory, and may take as long as it takes.
        group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    missing, progress = None, None
    if processes.is_main_process:  # alone, since the others' new images would change the answer
        warn_of_long_prompts(pipeline, prompts, kwargs["max_sequence_length"])
        warn_of_cut_prompts(pipeline, [("--negative_prompt", args.negative_prompt)], kwargs["max_sequence_length"])
        requests = requests_of(prompts, args)
        with ThreadPoolExecutor() as readers:  # a picture takes 20 ms, outside Python's lock
            made = readers.map(lambda one: is_made(one.path, common | {"prompt": one.prompt, "seed": one.seed}),
                               requests)
            missing = [request for request, is_there in zip(requests, made, strict=True) if not is_there]
        if len(missing) < len(requests):
            log.line(f"{len(requests) - len(missing)} of {len(requests)} images are there, made with the same "
                     "parameters: skipped")
        if missing:
            progress = Progress(manifest, len(missing))
    if group:
        shared = [missing]
        torch.distributed.broadcast_object_list(shared, src=0, group=group)
        missing = shared[0]

    show_progress(pipeline, False)
    batches = [missing[i:i + size] for i in range(0, len(missing), size)]
    embeddings, writing, errors = {}, None, []
    with processes.split_between_processes(batches) as own, ThreadPoolExecutor(1) as writer:
        for batch in own:
            padded = batch + [batch[-1]] * (size - len(batch))
            kwargs = call_kwargs(pipeline, args, [one.prompt for one in padded], [one.seed for one in padded])
            start = time.perf_counter()
            images = pipeline(**with_embeddings(pipeline, kwargs, embeddings)).images[:len(batch)]
            seconds = (time.perf_counter() - start) / len(batch)
            are_finite = pipeline.image_processor.finite.tolist()[:len(batch)]
            if writing:
                errors += writing.result()
                if progress:
                    log.line(progress.line())
            writing = writer.submit(write_images, images, are_finite, batch, common, seconds, manifest)
            if must_stop(errors):
                break
        if writing:
            errors += writing.result()
    if must_stop(errors):
        raise_errors(errors, pipeline)
    if group:
        torch.distributed.barrier(group)
    if progress:
        log.line(f"done: {progress.line()}, listed in {manifest}")
    processes.destroy_process_group()
    raise_errors(errors, pipeline)


def must_stop(errors: list[RecipeError]) -> bool:
    """Whether more images would be as much in danger as the last ones: something could not be written."""
    return any(not isinstance(error, BrokenResult) for error in errors)
