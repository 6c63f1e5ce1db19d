"""Makes the images of --prompts-file in batches, over all processes of `accelerate launch`. A run can be resumed.

The images' own metadata, not the manifest, decides which images are done. Each image is renamed into its place whole,
so a crash loses only the batch being computed and the batch being written. The manifest lists the images for people and
programs, one line of JSON per image. If an image was made again, its last line counts.
"""

import hashlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from utils import tiny_presets
from utils.benchmark_utils import images_per_call
from utils.common import BrokenResult, RecipeError, reason_of, show_progress
from utils.flaws import raise_errors
from utils.images import decode, image_parameters, keep_image, read_parameters
from utils.launchers import forget_launchers, own_gpu, world_size
from utils.outputs import append_line, manifest_path
from utils.pipeline_utils import call_kwargs
from utils.prompts_file import Prompt, Request, requests_of
from utils.text_encoding import warn_of_cut_prompts, with_embeddings


def join_processes(args) -> PartialState | None:
    """Joins the processes of `accelerate launch` and makes this process's GPU the current one.

    Sets `args.quiet` in every process but the first.

    Args:
        args: the parsed command line.

    Returns:
        accelerate's state, or None without --prompts-file, because accelerate calls nvidia-smi.

    Raises:
        RecipeError: there are fewer GPUs than processes, or a launcher's variables are wrong.
    """
    if not args.prompts_file:
        return None
    if world_size() == 1:
        forget_launchers()
        # With several RTX 40 cards and an old driver, accelerate refuses to start unless these variables disable
        # NCCL's P2P and InfiniBand. A single process does not use NCCL. `accelerate launch` sets the variables itself.
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            os.environ.setdefault(name, "1")
    elif args.device == "cuda":
        own_gpu()
    processes = PartialState(cpu=args.device == "cpu")
    args.quiet = args.quiet or not processes.is_main_process
    return processes


def is_made(path: Path, parameters: dict) -> bool:
    """Whether `path` is a complete image whose metadata holds the same parameters."""
    try:
        if _of_the_picture(read_parameters(path)) != _of_the_picture(parameters):
            return False
        decode(path)
        return True
    except Exception:  # missing, foreign or incomplete; PIL also raises SyntaxError
        return False


def _of_the_picture(parameters: dict) -> dict:
    """The parameters that decide the picture.

    They leave out the fp8 check, whether packages or torch.compile compiled the code, whether the quantized weights
    were kept by an earlier start, --quality, which only chooses techniques, and the files' names if hashes of the
    contents are present.
    """
    techniques = {name: None if name == "compile" else how for name, how in parameters["techniques"].items()
                  if name not in ("fp8 check", "kept weights")}
    names = {"quality"}
    if parameters.get("contents"):
        names |= {"revision", "lora", "image"}
        if not parameters["random_weights"] and parameters["model"] not in tiny_presets.NAMES:
            names.add("model")  # one checkpoint may have several names
    return json.loads(json.dumps({name: value for name, value in parameters.items() if name not in names}
                                 | {"techniques": techniques}))


def warn_of_long_prompts(pipeline, prompts: list[Prompt], max_sequence_length: int) -> None:
    """Warns on stderr about prompts whose ends T5 does not read. The tokenizer cuts them off without a warning."""
    tokens = pipeline.tokenizer_2([prompt.text for prompt in prompts]).input_ids
    long = [prompt.line for prompt, ids in zip(prompts, tokens, strict=True) if len(ids) > max_sequence_length]
    if long:
        print(f"{len(long)} of {len(prompts)} prompts are longer than the limit of {max_sequence_length} tokens, the "
              f"first in line {long[0]}. Their ends have no effect.", file=sys.stderr)


class Progress:
    """Counts the images of all processes. The processes append to one manifest, and this class counts its new lines."""

    def __init__(self, manifest: Path, total: int):
        self.manifest, self.total, self.done = manifest, total, 0
        self.read = manifest.stat().st_size if manifest.exists() else 0
        self.start = time.perf_counter()

    def line(self) -> str:
        """The number of images done, the rate since the start, and the remaining time at that rate."""
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
    """Saves images and appends their lines to the manifest. Broken images and images saved elsewhere get no line.

    Args:
        images: PIL images, one per request.
        are_finite: whether each image's decoder output was finite, from `CheckedImageProcessor.finite`.
        common: the parameters that all images share.
        seconds: an image's share of its batch's time.
        manifest: the manifest's path.

    Returns:
        Errors that are not raised: about broken images, and about files that could not be written to their places.
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
            errors.append(RecipeError(f"{manifest}: {request.path.name} is saved, but could not be added to the "
                                      f"manifest ({reason_of(error)})"))
    return errors


def make_images(pipeline, args, prompts: list[Prompt], processes: PartialState, log) -> None:
    """Makes this process's share of the missing images with an optimized pipeline.

    A partial batch is padded with its last prompt, and the surplus images are dropped. So compiled code and CUDA graphs
    see only the batch size that `optimize` warmed up. A thread writes each batch while the next one is computed. Broken
    images do not stop the run. An image or a manifest line that cannot be written stops it.

    Args:
        pipeline: the pipeline that `optimize` returned.
        args: the parsed command line.
        prompts: all prompts of the file.
        processes: the state that `join_processes` returned.
        log: the stage log.

    Raises:
        RecipeError: the errors that `raise_errors` combines, after all computed images are saved.
    """
    size, manifest = images_per_call(args), manifest_path(args.output_file)
    kwargs = call_kwargs(pipeline, args)
    common = image_parameters(args, pipeline, kwargs, prompt="", seed=0)
    group = None
    if processes.num_processes > 1:
        # With gloo, waiting takes no GPU memory. The timeout lets one process wait very long for another.
        group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    missing, progress = None, None
    if processes.is_main_process:  # one process only, because new images of other ranks would change the result
        warn_of_long_prompts(pipeline, prompts, kwargs["max_sequence_length"])
        warn_of_cut_prompts(pipeline, [("--negative_prompt", args.negative_prompt)], kwargs["max_sequence_length"])
        requests = requests_of(prompts, args)
        with ThreadPoolExecutor() as readers:  # decoding takes 20 ms per image and releases the GIL
            made = readers.map(lambda one: is_made(one.path, common | {"prompt": one.prompt, "seed": one.seed}),
                               requests)
            missing = [request for request, is_there in zip(requests, made, strict=True) if not is_there]
        if len(missing) < len(requests):
            log.line(f"{len(requests) - len(missing)} of {len(requests)} images exist already with the same "
                     "parameters and are skipped")
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
    """Whether the run must stop because a file could not be written. Broken images alone do not stop it."""
    return any(not isinstance(error, BrokenResult) for error in errors)
