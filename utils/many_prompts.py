"""Makes the images of --prompts-file in batches, over all processes of `accelerate launch`. A run can be resumed.

The images' own metadata, not the manifest, decides which images are done. Each image is renamed into its place whole,
so a crash loses only the batch being computed and the batch being written. The manifest lists the images for people and
programs, one line of JSON per image. If an image was made again, its last line counts.
"""

import argparse
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState

from utils import single_file, tasks, tiny_presets
from utils.aoti.export import other_inputs_run_uncompiled
from utils.benchmark_utils import check_image, images_per_call
from utils.checkpoint import ImageSettings, configs_of, image_settings, model_shapes, read_configs
from utils.common import BrokenResult, OutOfMemory, RecipeError, reason_of, show_progress
from utils.flaws import raise_errors
from utils.hardware import Hardware, detect, gpu
from utils.images import decode, image_parameters, keep_image, read_parameters
from utils.launchers import forget_launchers, own_gpu, world_size
from utils.lora_swap import check_loras, use_loras
from utils.memory import check_gpu_memory
from utils.output_checks import check_sides
from utils.outputs import append_line, manifest_path
from utils.pipeline_utils import call_kwargs, check_pictures, use_step_cache
from utils.plan import Plan, make_plan, step_cache_of_line
from utils.prompts_file import Prompt, Request, args_with, left_out, requests_of, settings_of
from utils.reference_image import encoded_size, original_size
from utils.text_encoding import unread_text, warn_of_cut_prompts, with_embeddings


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


def usable_prompts(args: argparse.Namespace, prompts: list[Prompt]) -> tuple[list[Prompt], list[str]]:
    """Leaves out the lines that this checkpoint cannot draw with their settings, before any weights load.

    The first usable line decides the task. If only lines have pictures, those of this line become the flags', for
    `optimize` to warm up with. The sets of LoRAs that lines have in place of the command line's become
    `args.line_loras`, for `load_pipeline`.

    Returns:
        (prompts, complaints), as `read_prompts` does.

    Raises:
        RecipeError: no line is left, or the configs of --ckpt cannot be read.
    """
    if not any(prompt.settings for prompt in prompts):
        return prompts, []
    configs, _ = single_file.find(args.transformer, read_configs(args.ckpt, args.revision, args.random_weights))
    own = tuple(args.lora or ())
    loras = {prompt.settings: dict(prompt.settings).get("lora", own) for prompt in prompts}
    lora_faults = {specs: specs != own and _fault_of(check_loras, args, specs, model_shapes(configs))
                   for specs in dict.fromkeys(loras.values())}
    hardware, fitting, running = detect(args) if args.device == "cuda" else None, set(), []
    faults = {settings: lora_faults[specs]
              or _fault_of(_check_line, args_with(args, settings), configs, hardware, fitting, running)
              for settings, specs in loras.items()}
    complaints = [left_out(args.prompts_file, prompt.unit, prompt.line, faults[prompt.settings])
                  for prompt in prompts if faults[prompt.settings]]
    usable = [prompt for prompt in prompts if not faults[prompt.settings]]
    if not usable:
        raise RecipeError(f"--prompts-file {args.prompts_file} holds no prompt that can be drawn. {complaints[0]}.")
    for name in tasks.PICTURES:
        setattr(args, name, getattr(args, name) or dict(usable[0].settings).get(name))
    args.line_loras = [specs for specs in dict.fromkeys(loras[prompt.settings] for prompt in usable) if specs != own]
    return usable, complaints


def _check_line(args: argparse.Namespace, configs: dict, hardware: Hardware | None, fitting: set[tuple],
                running: list[tasks.Task]) -> None:
    """Raises RecipeError if a line cannot be drawn.

    Args:
        args: from `args_with`.
        hardware: the GPU, or None.
        fitting: the sizes of other lines that fit into the GPU's memory. The line's size is added.
        running: the run's task; empty if this line decides it.
    """
    step_cache_of_line(args, configs)
    settings = image_settings(args, configs)
    if running:
        tasks.check_same(settings.task, running[0])
    check_pictures(settings, args)
    if hardware and (size := (settings.height, settings.width)) not in fitting:
        check_gpu_memory(args, configs, hardware, make_plan(args, configs, hardware))
        fitting.add(size)
    running[:] = [settings.task]


def _fault_of(check: Callable, *given) -> RecipeError | None:
    try:
        check(*given)
    except RecipeError as error:
        return error


# Decoding by the fused VAE: 33.4 ms uncompiled, 26.9 ms compiled (results/h100/2026-11/tried.json).
VAE_COST = "7 ms more a megapixel on an H100"


class Shape(NamedTuple):
    """What the images of one pipeline call have in common."""
    settings: ImageSettings
    reference: tuple[int, int] | None  # width and height of Kontext's reference, as the VAE sees it

    @property
    def size(self) -> str:
        """What is compiled and recorded by itself, for people."""
        reference = " with a reference of {}x{}".format(*self.reference) if self.reference else ""
        return f"{self.settings.width}x{self.settings.height}{reference}"


class Variant:
    """The command line with the settings of a line, for a loaded pipeline.

    Args:
        args: from `args_with`.
        configs: from `configs_of`.
    """

    def __init__(self, pipeline, args: argparse.Namespace, configs: dict):
        self.pipeline, self.args, self.step_cache = pipeline, args, step_cache_of_line(args, configs)
        self.loras = tuple(args.lora or ())
        settings, reference = image_settings(args, configs), None
        tasks.check_same(settings.task, pipeline.plan.settings.task)
        if settings.task is tasks.EDITING:
            reference = encoded_size(original_size(args.image), settings.width * settings.height)
        self.shape = Shape(settings, reference)

    def check_memory(self) -> None:
        """Raises RecipeError if the shape does not fit into the GPU's memory."""
        if self.args.device == "cuda":
            plan = replace(self.pipeline.plan, settings=self.shape.settings)
            check_gpu_memory(self.args, configs_of(self.pipeline), gpu(self.args.gpu_memory_limit), plan)

    @functools.cached_property
    def parameters(self) -> dict:
        """What the metadata of the images have in common. Prompt and seed are empty."""
        use_step_cache(self.pipeline, self.step_cache)
        found = image_parameters(self.args, self.pipeline, call_kwargs(self.pipeline, self.args), prompt="", seed=0)
        swap = getattr(self.pipeline, "lora_swap", None)
        return swap.parameters_with(found, self.args.lora) if swap else found

    def parameters_of(self, request: Request) -> dict:
        """The metadata of an image."""
        return self.parameters | {"prompt": request.prompt, "seed": request.seed}


def check_settings(args: argparse.Namespace, variant: Callable[[tuple], Variant]) -> None:
    """Checks the settings of a loaded pipeline's next picture, as those of a line are checked before it loads.

    Args:
        args: the command line with the settings in place of its flags.
        variant: gives the `Variant` of settings.

    Raises:
        RecipeError: the picture cannot be drawn.
    """
    check_image(args)
    check_sides(args)
    own = variant(settings_of(args))
    own.check_memory()
    check_pictures(own.shape.settings, args)


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
        names |= {"revision", "lora", "transformer", "redux", *tasks.PICTURES}
        if not parameters["random_weights"] and parameters["model"] not in tiny_presets.NAMES:
            names.add("model")  # one checkpoint may have several names
    return json.loads(json.dumps({name: value for name, value in parameters.items() if name not in names}
                                 | {"techniques": techniques}))


def missing_images(requests: list[Request], variant: Callable[[tuple], Variant], log) -> list[Request]:
    """The requests without an image of the same parameters. Says how many have one.

    Args:
        variant: gives the `Variant` of a line's settings.
    """
    present = [one for one in requests if os.path.exists(one.path)]
    expected = [variant(one.settings).parameters_of(one) for one in present]
    with ThreadPoolExecutor() as readers:  # decoding takes 20 ms per image and releases the GIL
        made = readers.map(is_made, [one.path for one in present], expected)
        done = {one.path for one, is_there in zip(present, made, strict=True) if is_there}
    if done:
        log.line(f"{len(done)} of {len(requests)} images exist already with the same parameters and are skipped")
    return [one for one in requests if one.path not in done]


def in_batches(requests: list[Request], variant: Callable[[tuple], Variant], size: int) -> list[list[Request]]:
    """Batches of at most `size` requests of one set of LoRAs and one shape.

    The sets follow each other in the order of their first lines, but the command line's comes first, since it is in the
    weights. The shapes of a set follow each other in the order of their first lines.
    """
    sets = {variant(()).loras: {}}
    for one in requests:
        own = variant(one.settings)
        sets.setdefault(own.loras, {}).setdefault(own.shape, []).append(one)
    return [group[i:i + size] for groups in sets.values() for group in groups.values()
            for i in range(0, len(group), size)]


def batch_kwargs(pipeline, batch: list[Request], variant: Callable[[tuple], Variant], size: int) -> dict:
    """The arguments of the pipeline call that draws a batch, which its last request fills up to `size`."""
    padded = batch + [batch[-1]] * (size - len(batch))
    each = [variant(one.settings).args for one in padded]
    return call_kwargs(pipeline, each[0], [one.prompt for one in padded], [one.seed for one in padded],
                       negative_prompts=[own.negative_prompt for own in each],
                       pictures={name: [getattr(own, name) for own in each] for name in tasks.PICTURES})


def prepare(pipeline, variant: Variant, embeddings: dict, sizes: set[str], log) -> None:
    """Gives the pipeline a variant's LoRAs and step cache. Says if its size is new.

    Args:
        embeddings: of `with_embeddings`.
        sizes: the sizes that were drawn.

    Raises:
        RecipeError: a LoRA cannot be merged.
    """
    use_loras(pipeline, variant.args, embeddings)
    if variant.shape.size not in sizes and (line := new_size_line(variant.shape.size, pipeline.plan)):
        log.line(line)
    sizes.add(variant.shape.size)
    use_step_cache(pipeline, variant.step_cache)


def new_size_line(size: str, plan: Plan) -> str | None:
    """The line about the first picture of a size that `optimize` did not warm up; None if it is as fast as others."""
    has_blocks = plan.compile.scope != "none"
    compiles = plan.compile.mode == "compile" and (has_blocks or not plan.compiles_vae_once)
    done = ["compiled"] * compiles + ["recorded"] * plan.cuda_graphs.on
    notes = [f"{' and '.join(done)} now"] if done else []
    if plan.compile.mode == "export_aoti" and has_blocks:
        notes.append("blocks uncompiled, because the packages are for another size (--compile_export_mode compile "
                     "serves all sizes)")
    if plan.compiles_vae_once:
        cost = f" ({VAE_COST})" if plan.fused_vae.on else ""
        notes.append(f"VAE uncompiled{cost}")
    return f"size {size}: {'; '.join(notes)}" if notes else None


def warn_of_long_prompts(pipeline, kind: str, texts: list[tuple[int, str]], max_sequence_length: int) -> None:
    """Warns on stderr about texts whose ends T5 does not read. The tokenizer cuts them off without a warning.

    Args:
        kind: "prompts" or "negative prompts".
        texts: (line, text) of each.
    """
    tokens = pipeline.tokenizer_2([text for _, text in texts]).input_ids if texts else []
    long = [(line, ids) for (line, _), ids in zip(texts, tokens, strict=True) if len(ids) > max_sequence_length]
    if long:
        line, ids = long[0]
        print(f"{len(long)} of {len(texts)} {kind} are longer than the limit of {max_sequence_length} tokens, the "
              f"first in line {line}. Their ends have no effect. The first one's end begins with "
              f"\"{unread_text(pipeline, ids, max_sequence_length)}\".", file=sys.stderr)


def warn_of_cut_texts(pipeline, args, prompts: list[Prompt], max_sequence_length: int) -> None:
    """`warn_of_long_prompts` for everything that T5 reads."""
    negative = [(prompt.line, text) for prompt in prompts if (text := dict(prompt.settings).get("negative_prompt"))]
    for kind, texts in (("prompts", [(prompt.line, prompt.text) for prompt in prompts]),
                        ("negative prompts", negative)):
        warn_of_long_prompts(pipeline, kind, texts, max_sequence_length)
    warn_of_cut_prompts(pipeline, [("--negative_prompt", args.negative_prompt)], max_sequence_length)


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


def write_images(images: list, are_finite: list[bool], requests: list[Request], parameters: list[dict], seconds: float,
                 manifest: Path) -> list[RecipeError]:
    """Saves images and appends their lines to the manifest. Broken images and images saved elsewhere get no line.

    Args:
        images: PIL images, one per request.
        are_finite: whether each image's decoder output was finite, from `CheckedImageProcessor.finite`.
        parameters: each image's metadata.
        seconds: an image's share of its batch's time.
        manifest: the manifest's path.

    Returns:
        Errors that are not raised: about broken images, and about files that could not be written to their places.
    """
    errors = []
    for image, is_finite, request, own in zip(images, are_finite, requests, parameters, strict=True):
        if error := keep_image(image, request.path, own, is_finite):
            errors.append(error)
            continue
        try:
            append_line(manifest, {"file": request.path.name, **own, "seconds": round(seconds, 4),
                                   "sha256": hashlib.sha256(request.path.read_bytes()).hexdigest()})
        except OSError as error:
            errors.append(RecipeError(f"{manifest}: {request.path.name} is saved, but could not be added to the "
                                      f"manifest ({reason_of(error)})"))
    return errors


def make_images(pipeline, args, prompts: list[Prompt], processes: PartialState, log) -> None:
    """Makes this process's share of the missing images with an optimized pipeline.

    Lines of one set of LoRAs and one shape are batched. A partial batch is padded with its last prompt, and the surplus
    images are dropped. So compiled code and CUDA graphs see only the batch size that `optimize` warmed up. A thread
    writes each batch while the next one is computed. Broken images, LoRAs that cannot be merged, and batches that need
    too much GPU memory do not stop the run. An image or a manifest line that cannot be written stops it.

    Args:
        pipeline: the pipeline that `optimize` returned.
        args: the parsed command line.
        prompts: the prompts that `usable_prompts` returned.
        processes: the state that `join_processes` returned.
        log: the stage log.

    Raises:
        RecipeError: the errors that `raise_errors` combines, after all computed images are saved.
    """
    size, manifest, configs = images_per_call(args), manifest_path(args.output_file), configs_of(pipeline)
    variant = functools.cache(lambda settings: Variant(pipeline, args_with(args, settings), configs))
    warmed_up = variant(()).shape
    group = None
    if processes.num_processes > 1:
        # With gloo, waiting takes no GPU memory. The timeout lets one process wait very long for another.
        group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    batches, progress = None, None
    if processes.is_main_process:  # one process only, because new images of other ranks would change the result
        warn_of_cut_texts(pipeline, args, prompts, warmed_up.settings.max_sequence_length)
        missing = missing_images(requests_of(prompts, args), variant, log)
        batches = in_batches(missing, variant, size)
        if missing:
            progress = Progress(manifest, len(missing))
    if group:
        shared = [batches]
        torch.distributed.broadcast_object_list(shared, src=0, group=group)
        batches = shared[0]

    show_progress(pipeline, False)
    embeddings, writing, errors, unusable, sizes = {}, None, [], {}, {warmed_up.size}
    with (processes.split_between_processes(batches) as own, ThreadPoolExecutor(1) as writer,
          other_inputs_run_uncompiled()):
        for batch in own:
            drawn = variant(batch[0].settings)
            if drawn.loras in unusable:
                continue
            try:
                prepare(pipeline, drawn, embeddings, sizes, log)
            except RecipeError as error:  # a LoRA's header was sound, and its values are not
                unusable[drawn.loras] = error
                continue
            kwargs = batch_kwargs(pipeline, batch, variant, size)
            start = time.perf_counter()
            try:
                images = pipeline(**with_embeddings(pipeline, kwargs, embeddings)).images[:len(batch)]
            except torch.OutOfMemoryError as error:  # is not kept, because its traceback holds the batch's tensors
                errors.append(out_of_memory(error, batch, drawn.shape.size))
                print(f"error: {errors[-1]}", file=sys.stderr, flush=True)
                continue
            seconds = (time.perf_counter() - start) / len(batch)
            are_finite = pipeline.image_processor.finite.tolist()[:len(batch)]
            if writing:
                errors += writing.result()
                if progress:
                    log.line(progress.line())
            parameters = [variant(one.settings).parameters_of(one) for one in batch]
            writing = writer.submit(write_images, images, are_finite, batch, parameters, seconds, manifest)
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
    raise_errors(errors + list(unusable.values()), pipeline)


def out_of_memory(error: torch.OutOfMemoryError, batch: list[Request], size: str) -> OutOfMemory:
    """The error about a batch that is left out."""
    names = ", ".join(one.path.name for one in batch)
    return OutOfMemory(f"{names} not made: out of GPU memory at size {size} ({reason_of(error)}). The same command "
                       "with a smaller --batch_size or --vae_tiling makes the missing images")


def must_stop(errors: list[RecipeError]) -> bool:
    """Whether the run must stop because a file could not be written. Broken images and full memory do not stop it."""
    return any(not isinstance(error, (BrokenResult, OutOfMemory)) for error in errors)
