"""Helpers that every module shares: error classes and their handling, the stage log, and a program's exit."""

import argparse
import atexit
import gc
import math
import os
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

from utils import start


class RecipeError(Exception):
    """An error that the user can correct. The scripts print its text as one paragraph and exit with `exit_code`."""

    exit_code = 2


class BrokenResult(RecipeError):
    """The pipeline ran, but its result is not a picture: it contains NaN or has a single color."""

    exit_code = 3


class OutOfMemory(RecipeError):
    """Some of several pictures need more GPU memory than there is. The others are not affected."""


@contextmanager
def reading(what: str, cure: str):
    """Turns any exception of a library that reads a user's file into a one-paragraph error.

    Args:
        what: the flag and the file, such as "--ckpt me/model: transformer/config.json".
        cure: a sentence that tells the user how to fix the problem.

    Raises:
        RecipeError: replaces every exception except RecipeError and torch.OutOfMemoryError.
    """
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RecipeError(f"{what}: {reason_of(error)}. {cure}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is torch.OutOfMemoryError. This module does not import torch, which takes seconds."""
    return "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError)


def reason_of(error: BaseException) -> str:
    """An exception as one line of at most 300 characters: its text, after its class if the text alone is unclear."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # The first line of an error of torch or transformers is often a heading that ends in a colon.
    text = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")
    if isinstance(error, (KeyError, IndexError, AttributeError, TypeError, AssertionError)) or " " not in text:
        text = f"{type(error).__name__} {text}".strip()
    return text[:300]


def finite_float(text: str) -> float:
    """Parses a finite number for argparse. Python's own `float` also accepts nan and inf.

    Raises:
        argparse.ArgumentTypeError: the text is not a finite number.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
    return value


def run_cli(main):
    """Runs a script's main function. Every error becomes one paragraph on stderr and an exit code.

    The exit codes are 2 for an error that the user can correct, 3 for a broken result, 130 for Ctrl-C, and 1 for a bug
    in this program. Only --debug prints the traceback.
    """
    code = 2
    try:
        start.hand_over()
        try:
            main()
        except SystemExit:  # argparse raises it after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # inside the try block, because a flush may fail
        code = 0
    except RecipeError as error:
        _explain(error, str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        start.take_back()
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and start.reader_has_gone():
            os._exit(141)  # after `| head`, as when SIGPIPE ends a program
        if is_out_of_memory(error):
            _explain(error, f"out of GPU memory ({reason_of(error)}). Try, in this order: "
                     "--text_encoder_quant, --vae_tiling, a smaller --batch_size or --num_images_per_prompt, a smaller "
                     "--height and --width, --offload text, --offload group.")
        else:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            _explain(error, f"{type(error).__name__}: {reason_of(error)} ({Path(frame.filename).name}:{frame.lineno}). "
                     "This is a bug in the program. Run it again with --debug and report the traceback.")
            code = 1
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        _end_among_others(code)
    if code:
        sys.exit(code)


def _explain(error: Exception, text: str) -> None:
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    print(f"error: {text}", file=sys.stderr)


def _end_among_others(code: int) -> None:
    """Ends one of several processes at once, with the exit code `code`.

    A normal exit would block: CUDA graphs hold NCCL's communicator, and after an error the other processes wait for
    this one. torchrun sees the exit code and ends the other processes.
    """
    if code == 0:
        sys.modules["torch"].distributed.barrier()  # other ranks may still read from this GPU's memory
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def freeze_gc() -> None:
    """Excludes all existing objects from Python's garbage collection. It is for processes that keep their pipeline.

    Modules and compilers hold half a million objects that never become garbage, and a full collection takes 0.25 s.
    With stubs for all models, Python's time for a 1024x1024 image fell from 14.7 to 9.6 ms (median, one CPU core).
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # otherwise Triton 3.9 reports its own types as leaked at exit


class StageLog:
    """Prints one line per stage with its seconds to stderr. `seconds` keeps them for the JSON record.

    Args:
        quiet: print nothing.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str):
        """Times the body as the stage `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.line(f"{name:<12} {self.seconds[name]:8.2f} s")

    def line(self, text: str) -> None:
        """Prints a line to stderr, unless `quiet` is set."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)


def show_progress(pipeline, shown: bool) -> None:
    """Shows or hides the progress bar of the denoising loop."""
    pipeline.set_progress_bar_config(desc="denoising", disable=not shown)


@contextmanager
def no_progress(pipeline):
    """Hides the progress bar in the body."""
    before = getattr(pipeline, "_progress_bar_config", {})
    show_progress(pipeline, False)
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**before)
