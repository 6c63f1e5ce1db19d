"""Times images, their stages and their kernels, for run_benchmark.py."""

import gzip
import hashlib
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from bench.energy import EnergyCounter
from bench.environment import SCHEMA_VERSION, environment, summarize
from bench.profiling import StageTimes, annotate
from bench.quality import capture_step
from utils import flaws, plan
from utils.cache import dbcache
from utils.common import RecipeError, reason_of
from utils.fp8_check import relative_error
from utils.outputs import atomic_write, is_trace, refuse_torn_trace, write_or_rescue
from utils.pipeline_utils import call_kwargs


def since_start() -> float:
    """Returns the seconds since the operating system started this process."""
    return time.time() - psutil.Process().create_time()


def synchronize(device: str) -> None:
    """Waits until the GPU has finished; does nothing on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def step_error(pipeline, args, inputs: dict, reference) -> float:
    """Returns the relative error of one optimized step against float32, over the picture's tokens.

    Kontext appends the tokens of its reference image, whose output the pipeline drops.

    Args:
        pipeline: after `optimize`.
        args: of the command line.
        inputs: the transformer's named arguments, from `bench.quality.capture_step`.
        reference: the output (B, S, C) in float32, from `bench.quality.float32_step`.
    """
    kwargs = call_kwargs(pipeline, args)
    tokens = (kwargs["height"] // 16) * (kwargs["width"] // 16)
    pipeline._current_timestep = inputs["timestep"]  # the denoising loop sets it, and the timed step reads it
    with torch.no_grad():
        found = pipeline.transformer(**inputs)[0][:, :tokens]
    pipeline._current_timestep = None
    return relative_error(found, reference[:, :tokens])


STEP_SECONDS = 2  # of steps one after the other, for their energy


def time_images(pipeline, args):
    """Times --runs whole calls, from prompt to PIL image. The arguments are built outside the timed part.

    Returns:
        The seconds of each call, and the last call's first image.
    """
    seconds = []
    for _ in range(args.runs):
        kwargs = call_kwargs(pipeline, args)
        synchronize(args.device)
        start = time.perf_counter()
        image = pipeline(**kwargs).images[0]
        synchronize(args.device)
        seconds.append(time.perf_counter() - start)
    return seconds, image


def time_stages(pipeline, args) -> tuple[dict[str, float], list[float]]:
    """Times the stages of up to three more images; the images of `time_images` record no events.

    Returns:
        The median milliseconds of each stage, and of each denoising step in order. With --true_cfg_scale a step has
        two entries, one for each call. A GPU at its power limit slows down within an image.
    """
    times, images = StageTimes(args.device), min(3, args.runs)
    with annotate(pipeline, times.timer):
        for _ in range(images):
            pipeline(**call_kwargs(pipeline, args))
    spans = times.milliseconds()
    calls = spans["denoising_step"]
    of_each_step = [calls[i::len(calls) // images] for i in range(len(calls) // images)]
    return {name: statistics.median(each) for name, each in spans.items()}, list(map(statistics.median, of_each_step))


def step_energy(pipeline, args, counter: EnergyCounter, milliseconds: float) -> float | None:
    """Returns the joules of a denoising step, as the mean of steps one after the other for `STEP_SECONDS`.

    None on a CPU, on several GPUs, whose processes would have to agree on the number of steps, and with a step cache,
    whose steps differ.

    Args:
        milliseconds: of a step.
    """
    if counter.joules() is None or args.context_parallel or pipeline.plan.step_cache.on:
        return None
    inputs, steps = capture_step(pipeline, call_kwargs(pipeline, args)), round(STEP_SECONDS * 1e3 / milliseconds)
    with torch.no_grad():
        for count in (steps // 4, steps):  # the clock and the power settle first
            synchronize(args.device)
            before = counter.joules()
            for _ in range(count):
                pipeline.transformer(**inputs)
            synchronize(args.device)
    return counter.since(before) / steps


def step_kernels(pipeline, args) -> list[dict]:
    """Returns the GPU kernels of an image's first denoising step, slowest first.

    Each is {"name", "launches", "ms"}, with the milliseconds of all launches together.
    """
    inputs = capture_step(pipeline, call_kwargs(pipeline, args))
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        pipeline.transformer(**inputs)
        synchronize(args.device)
    # Names of C++ templates can have thousands of characters.
    found = [{"name": event.key[:160], "launches": event.count, "ms": event.self_device_time_total / 1e3}
             for event in profile.key_averages() if event.self_device_time_total]
    return sorted(found, key=lambda kernel: -kernel["ms"])


def write_trace(pipeline, args) -> RecipeError | None:
    """Writes a profiler trace of one image, with its stages as named regions.

    Returns:
        None on success, else the error, as `write_or_rescue`.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    kwargs = call_kwargs(pipeline, args)
    with annotate(pipeline, torch.profiler.record_function), torch.profiler.profile(activities=activities) as trace:
        pipeline(**kwargs)
        synchronize(args.device)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "trace.json")
        try:
            trace.export_chrome_trace(str(whole))  # a second export of the same trace fails
            refuse_torn_trace(whole)
        except Exception as error:
            return RecipeError(f"--trace-file {args.trace_file}: the trace cannot be written to the temporary folder "
                               f"{folder} ({reason_of(error)})")
        return write_or_rescue(lambda path: write_compressed(path, whole), args.trace_file, "trace")


def write_compressed(path: Path, source: Path) -> None:
    """Copies `source` to `path`, compressed if the path ends in .gz."""
    opened = gzip.open if path.suffix == ".gz" else open
    with atomic_write(path, is_trace) as temporary, open(source, "rb") as read, opened(temporary, "wb") as written:
        shutil.copyfileobj(read, written)


def report(record: dict) -> None:
    """Prints the result for people."""
    seconds = record["seconds"]
    print(f"time mean/var: {seconds['mean']:.4f} s / {seconds['variance']:.3e} s^2 over {len(seconds['raw'])} runs")
    print(f"median {seconds['median']:.4f} s, min {seconds['min']:.4f}, max {seconds['max']:.4f}; "
          f"{record['images_per_second']:.3f} images/s")
    print("stages (median ms): " + ", ".join(f"{name} {ms:.2f}" for name, ms in record["stages_ms"].items()))
    if record["gpu_load"]:
        print("GPU load (median): {sm_clock_mhz:.0f} MHz, {power_w:.0f} W".format(**record["gpu_load"]))
    if record["energy_j"]["image"]:
        print("energy: " + ", ".join(f"{used:.1f} J {what}" for what, used in record["energy_j"].items() if used))
    work = record["roofline"]
    print(f"step: {sum(work['flops'].values()) / 1e12:.3f} TFLOP over {work['image_tokens']} + {work['text_tokens']} "
          f"tokens" + (f", {work['tflops']:.3f} TFLOP/s" if work["tflops"] else ", partly cached"))
    for phase, peak in record["peak_memory"].items():
        print(f"peak GPU memory, {phase}: {peak['allocated_gib']:.2f} GiB allocated, "
              f"{peak['reserved_gib']:.2f} GiB reserved")
    print("cold start: " + ", ".join(f"{name} {s:.2f} s" for name, s in record["cold_start_s"].items()))
    for kernel in (record["step_kernels"] or [])[:20]:
        print(f"  {kernel['ms']:8.3f} ms {kernel['launches']:5d} x {kernel['name'][:100]}")
    if record["step_relative_error"] is not None:
        print(f"relative error of one step against float32: {record['step_relative_error']:.3e}")
    if record["cached_steps"] is not None:
        print(f"cached steps: {record['cached_steps']}")
        print("residual differences: " + (", ".join(f"{step} {value:.3f}" for step, value in
                                                    record["residual_diffs"].items()) or "none compared"))


def record_of(args, pipeline, kwargs: dict, seconds: list[float], image, is_finite: bool) -> dict:
    """Returns the part of a benchmark's record that describes the command, the recipe and the picture.

    Args:
        args: of the command line.
        pipeline: after `optimize` and at least one image.
        kwargs: the arguments of the timed calls.
        seconds: of the timed calls.
        image: the last picture, a PIL image.
        is_finite: whether the decoder's output was finite.
    """
    timing, cached = summarize(seconds), pipeline.plan.step_cache.on
    return {
        "schema_version": SCHEMA_VERSION, "model": args.ckpt, "task": pipeline.plan.settings.task.name,
        "random_weights": args.random_weights,
        "device": args.device,
        "settings": {"seed": args.seed, "quality": args.quality}
        | ({"transformer": args.transformer} if args.transformer else {})
        | {name: value for name, value in kwargs.items() if isinstance(value, (int, float, str))}
        | ({"steps": pipeline.plan.settings.steps} if "strength" in kwargs else {}),
        "techniques": plan.record(pipeline.plan),
        "seconds": timing, "images_per_second": args.num_images_per_prompt / timing["median"],
        "fp8_check": pipeline.fp8_check,
        "cached_steps": dbcache.cached_steps(pipeline) if cached else None,
        "residual_diffs": dbcache.residual_diffs(pipeline) if cached else None,
        "broken": flaws.flaw_of(image, is_finite), "image_std": float(np.asarray(image).std()),
        "image_sha256": hashlib.sha256(image.tobytes()).hexdigest(), "environment": environment(args.device),
    }
