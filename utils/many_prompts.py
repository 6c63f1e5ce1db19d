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

from utils.benchmark_utils import RecipeError
from utils.checks import images_per_call, manifest_path
from utils.images import image_parameters, numbered_path, read_parameters, save_image
from utils.pipeline_utils import call_kwargs, show_progress
from utils.text_encoding import with_embeddings

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Prompt(NamedTuple):
    line: int  # from 1
    index: int  # among the lines that are not blank, bad ones included: mending one renumbers no other
    text: str
    seed: int | None = None  # of its first image, if the file says so


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
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        # On several RTX 40 cards with an old driver accelerate refuses to start without these, for the sake of NCCL,
        # which a single process does not use. `accelerate launch` sets them itself.
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            os.environ.setdefault(name, "1")
    processes = PartialState(cpu=args.device == "cpu")
    args.quiet = args.quiet or not processes.is_main_process
    return processes


def read_prompts(path: str) -> tuple[list[Prompt], list[str]]:
    """The prompts of a file, and what is wrong with the lines that were left out.

    A line is a prompt; in a .jsonl file, {"prompt": ..., "seed": ...}, the seed optional. Blank lines are nothing.

    Raises:
        RecipeError: there is no prompt in it.
    """
    file = Path(path).expanduser()
    parse = _from_json if file.suffix.lower() == ".jsonl" else lambda text: (text, None)
    prompts, complaints, index = [], [], 0
    for number, line in enumerate(file.read_bytes().removeprefix(BYTE_ORDER_MARK).split(b"\n"), 1):
        try:
            text = line.decode().strip()
            if not text:
                continue
            prompts.append(Prompt(number, index, *parse(text)))
        except (ValueError, RecursionError) as error:
            why = f"not UTF-8 text ({error.reason})" if isinstance(error, UnicodeError) else error
            complaints.append(f"--prompts-file {path}, line {number} is left out: {why}")
        index += 1
    if not prompts:
        raise RecipeError(f"--prompts-file {path} holds no prompt: write one a line."
                          + (f" {len(complaints)} lines are unusable; {complaints[0]}." if complaints else ""))
    return prompts, complaints


def _from_json(text: str) -> tuple[str, int | None]:
    """(prompt, seed) of {"prompt": ..., "seed": ...}; other keys are of no concern. ValueError says what is wrong."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from error
    prompt, seed = (record.get("prompt"), record.get("seed")) if isinstance(record, dict) else (None, None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError('not of the form {"prompt": "a cat", "seed": 42}, the seed optional')
    prompt.encode()  # half a surrogate pair is valid JSON and no text
    if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
        raise ValueError(f"its seed is {json.dumps(seed)}, not a whole number from 0 to 2^63 - 1")
    return prompt.strip(), seed


def requests_of(prompts: list[Prompt], args) -> list[Request]:
    """The images to make. Image i of the prompt with index k has --seed + k * --num_images_per_prompt + i for a seed,
    or the prompt's own + i: batches and processes change neither seeds nor names."""
    count, requests = args.num_images_per_prompt, []
    for prompt in prompts:
        first = args.seed + prompt.index * count if prompt.seed is None else prompt.seed
        requests += [Request(prompt.text, seed, numbered_path(args.output_file, prompt.index, seed))
                     for seed in range(first, first + count)]
    return requests


def is_made(path: Path, parameters: dict) -> bool:
    """Whether the image is there and says that it was made with these parameters."""
    try:
        return _of_the_picture(read_parameters(path)) == _of_the_picture(parameters)
    except (OSError, KeyError, ValueError, TypeError, AttributeError):  # not there, or not an image of ours
        return False


def _of_the_picture(parameters: dict) -> dict:
    """Without what is of the run alone: whether packages were exported or loaded."""
    techniques = {name: None if name == "compile" else how for name, how in parameters["techniques"].items()
                  if name != "fp8 check"}
    return json.loads(json.dumps(parameters | {"techniques": techniques}))


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


def write_images(images: list, requests: list[Request], common: dict, seconds: float, manifest: Path) -> None:
    """Saves images and adds their lines to the manifest.

    Args:
        common: the parameters that all images share.
        seconds: an image's share of its batch's time.

    Raises:
        RecipeError: the disk is full, say.
    """
    for image, request in zip(images, requests, strict=True):
        parameters = common | {"prompt": request.prompt, "seed": request.seed}
        try:
            save_image(image, request.path, parameters)
            line = {"file": request.path.name, **parameters, "seconds": round(seconds, 4),
                    "sha256": hashlib.sha256(request.path.read_bytes()).hexdigest()}
            # Opened for appending and written at once: lines of several processes do not mix.
            with open(manifest, "ab", buffering=0) as file:
                file.write((json.dumps(line) + "\n").encode())
        except OSError as error:
            raise RecipeError(f"--output-file: cannot write {request.path} ({error.strerror or error}).") from error


def make_images(pipeline, args, prompts: list[Prompt], processes: PartialState, log) -> None:
    """Makes what is missing of the images of `prompts`, this process its share, with an optimised pipeline.

    A batch that is not full is filled up with its last prompt and the surplus dropped: compiled code and CUDA graphs
    see the one shape that `optimize` warmed up. While a batch is computed, a thread writes the one before.
    """
    size, manifest = images_per_call(args), manifest_path(args.output_file)
    kwargs = call_kwargs(pipeline, args)
    common = image_parameters(args, kwargs, pipeline.techniques, prompt="", seed=0)
    group = None
    if processes.num_processes > 1:
        # Over gloo: waiting for one another takes no GPU memory, and may take as long as it takes.
        group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    missing, progress = None, None
    if processes.is_main_process:  # alone, since the others' new images would change the answer
        warn_of_long_prompts(pipeline, prompts, kwargs["max_sequence_length"])
        requests = requests_of(prompts, args)
        missing = [request for request in requests
                   if not is_made(request.path, common | {"prompt": request.prompt, "seed": request.seed})]
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
    embeddings, writing = {}, None
    with processes.split_between_processes(batches) as own, ThreadPoolExecutor(1) as writer:
        for batch in own:
            padded = batch + [batch[-1]] * (size - len(batch))
            kwargs = call_kwargs(pipeline, args, [one.prompt for one in padded], [one.seed for one in padded])
            start = time.perf_counter()
            images = pipeline(**with_embeddings(pipeline, kwargs, embeddings)).images[:len(batch)]
            seconds = (time.perf_counter() - start) / len(batch)
            if writing:
                writing.result()  # raises what went wrong in the thread
                if progress:
                    log.line(progress.line())
            writing = writer.submit(write_images, images, batch, common, seconds, manifest)
        if writing:
            writing.result()
    if group:
        torch.distributed.barrier(group)
    if progress:
        log.line(f"done: {progress.line()}, listed in {manifest}")
    processes.destroy_process_group()
