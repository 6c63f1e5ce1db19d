"""What every part shares: errors and their boundary, the stage log, and how a program ends."""

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

import torch

from utils import start


class RecipeError(Exception):
    """Something the user can put right. The scripts print its text as one paragraph and exit with `exit_code`."""

    exit_code = 2


class BrokenResult(RecipeError):
    """The pipeline ran, but its result is not a picture: NaN, or a single colour."""

    exit_code = 3


@contextmanager
def reading(what: str, cure: str):
    """The one boundary around code that reads somebody's file: whatever a library raises there becomes one paragraph.

    Args:
        what: the flag and the file, such as "--ckpt me/model: transformer/config.json".
        cure: a sentence that says what to do about it.

    Raises:
        RecipeError: in the place of every exception but another RecipeError and a lack of GPU memory.
    """
    try:
        yield
    except (RecipeError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RecipeError(f"{what}: {reason_of(error)}. {cure}") from error


def reason_of(error: BaseException) -> str:
    """An exception in one line: its text, or its text behind its class where the text alone says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # torch's and transformers' first line is often a heading, which ends in a colon.
    text = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1]).rstrip(".")
    if isinstance(error, (KeyError, IndexError, AttributeError, TypeError, AssertionError)) or " " not in text:
        text = f"{type(error).__name__} {text}".strip()
    return text[:300]


def finite_float(text: str) -> float:
    """A number for argparse. Python's own `float` also takes nan and inf.

    Raises:
        argparse.ArgumentTypeError: the text is no number, or not a finite one.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
    return value


def run_cli(main):
    """Runs a script's main. Whatever goes wrong becomes one paragraph and an exit code: 2 for what the user can put
    right, 3 for a broken result, 130 for Ctrl-C, 1 for a fault of this program. Tracebacks are for --debug."""
    code = 2
    try:
        start.hand_over()
        try:
            main()
        except SystemExit:  # argparse's, of --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here, where it may fail
        code = 0
    except RecipeError as error:
        _explain(error, str(error))
        code = error.exit_code
    except torch.OutOfMemoryError as error:
        _explain(error, f"out of GPU memory ({reason_of(error)}). What helps, in this order: "
                 "--text_encoder_quant, --vae_tiling, a smaller --batch_size or --num_images_per_prompt, a smaller "
                 "--height and --width, --offload text, --offload group.")
    except KeyboardInterrupt:
        start.take_back()
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and start.reader_has_gone():
            os._exit(141)  # of `| head`: as a program that SIGPIPE ends
        frame = traceback.extract_tb(error.__traceback__)[-1]
        _explain(error, f"{type(error).__name__}: {reason_of(error)} ({Path(frame.filename).name}:{frame.lineno}). "
                 "This is a fault of the program: --debug prints the traceback, which belongs into a report.")
        code = 1
    if torch.distributed.is_initialized():
        _end_among_others(code)
    if code:
        sys.exit(code)


def _explain(error: Exception, text: str) -> None:
    if "--debug" in sys.argv:
        traceback.print_exception(error)
    print(f"error: {text}", file=sys.stderr)


def _end_among_others(code: int) -> None:
    """Ends this process of several. Not the usual way, which waits: for the CUDA graphs that hold NCCL's communicator,
    and, after an error, for processes that wait for this one. torchrun sees the code and ends them."""
    if code == 0:
        torch.distributed.barrier()  # what others still read from this GPU stays until then
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def freeze_gc() -> None:
    """Takes everything that exists by now out of Python's garbage collection, for processes that keep their pipeline.

    Half a million objects of modules and compilers never become garbage, and one full look at them takes 0.25 s.
    Python's share of a 1024x1024 image, all models replaced by stubs, fell from 14.7 to 9.6 ms (median, one CPU core).
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or Triton 3.9 takes its own types for leaked, and says so at the end


class StageLog:
    """One line per stage with its seconds, on stderr; the seconds go into the JSON as well."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.line(f"{name:<12} {self.seconds[name]:8.2f} s")

    def line(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)
