"""Draws the prompts that a person types, or a pipe sends, while everything stays warm: gen_image.py --interactive."""

import functools
import re
import secrets
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import torch

from utils.aoti.export import other_inputs_run_uncompiled
from utils.checkpoint import configs_of
from utils.common import RecipeError, finite_float, show_progress
from utils.images import is_our_image, keep_image, numbered_path, save_image
from utils.lora_swap import use_loras
from utils.many_prompts import Variant, batch_kwargs, check_settings, prepare
from utils.output_checks import check_output
from utils.prompts_file import Request, args_with, settings_of
from utils.text_encoding import warn_of_cut_prompts, with_embeddings

HELP = """A line is a prompt. Commands begin with a colon and hold for the pictures after them:
  :size 1360x768     width and height          :seed 7            :seed alone takes a random one
  :steps 28          denoising steps           :guidance 3.5      guidance scale
  :image photo.png   the picture to redraw     :mask mask.png     white where it is redrawn
  :strength 0.6      how far it is left        :control depth.png for FLUX.1-Depth-dev and -Canny-dev
  :lora a:0.8 b      LoRAs instead of --lora; :lora alone takes none
  :save cat.png      the last picture again    :help              these lines
Ctrl-C drops the picture that is being drawn, Ctrl-D ends."""
# {command: the flags that it replaces}
CHANGES = {
    "size": lambda text: dict(zip(("width", "height"), map(int, re.split("[x×]", text)), strict=True)),
    "seed": lambda text: {"seed": int(text) if text else secrets.randbelow(2**31)},
    "steps": lambda text: {"num_inference_steps": int(text)},
    "guidance": lambda text: {"guidance_scale": finite_float(text)},
    "image": lambda text: {"image": text}, "mask": lambda text: {"mask_image": text},
    "control": lambda text: {"control_image": text}, "strength": lambda text: {"strength": finite_float(text)},
    "lora": lambda text: {"lora": tuple(shlex.split(text))},
}


def lines() -> Iterator[str]:
    """The lines of standard input. A terminal gets a prompt, line editing and a history."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):  # Windows has no readline
        import readline  # noqa: F401 - `input` uses it once it is imported
    with suppress(EOFError):
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:
                print()


class Session:
    """A pipeline from `optimize`, with the parsed command line, whose flags the commands replace, and a stage log."""

    def __init__(self, pipeline, args, log):
        self.pipeline, self.args, self.log, configs = pipeline, args, log, configs_of(pipeline)
        self.number, self.last, self.embeddings = 0, None, {}
        self.variant = functools.cache(lambda settings: Variant(pipeline, args_with(args, settings), configs))
        self.sizes = {self.variant(()).shape.size}

    def run(self) -> None:
        """Draws until standard input ends. An error, full memory and Ctrl-C end a line, not the session."""
        show_progress(self.pipeline, False)
        with other_inputs_run_uncompiled():
            for line in map(str.strip, lines()):
                try:
                    if line.startswith(":"):
                        self.command(*map(str.strip, line[1:].partition(" ")[::2]))
                    elif line:
                        self.draw(line)
                except (RecipeError, torch.OutOfMemoryError) as error:
                    print(f"error: {error}", file=sys.stderr, flush=True)
                except KeyboardInterrupt:
                    print("dropped", file=sys.stderr, flush=True)

    def command(self, name: str, text: str) -> None:
        """Follows a command. Flags are replaced only if the command line and the checkpoint take their values."""
        if name in CHANGES:
            try:
                changed = args_with(self.args, CHANGES[name](text))
            except Exception as error:
                raise RecipeError(f":{name} {text}: not of the form that :help shows.") from error
            check_settings(changed, self.variant)
            use_loras(self.pipeline, changed, self.embeddings)
            self.args = changed
        elif name == "save" and text and self.last:
            check_output(text, ":save", is_our_image)
            save_image(self.last[0], text, self.last[1])
            print(text, flush=True)
        elif name == "help":
            print(HELP, flush=True)
        else:
            raise RecipeError(f":{name} {text}: no such command, or nothing to save yet. Type :help for the list.")

    def draw(self, prompt: str) -> None:
        """Draws --num_images_per_prompt pictures, and prints seconds and paths."""
        args, variant = self.args, self.variant(settings := settings_of(self.args))
        while numbered_path(args.output_file, self.number, args.seed).exists():  # of this session or an earlier one
            self.number += 1
        requests = [Request(prompt, seed, numbered_path(args.output_file, self.number, seed), settings)
                    for seed in range(args.seed, args.seed + args.num_images_per_prompt)]
        prepare(self.pipeline, variant, self.embeddings, self.sizes, self.log)
        kwargs = batch_kwargs(self.pipeline, requests, self.variant, len(requests))
        warn_of_cut_prompts(self.pipeline, [("the prompt", prompt)], kwargs["max_sequence_length"])
        start = time.perf_counter()
        images = self.pipeline(**with_embeddings(self.pipeline, kwargs, self.embeddings)).images
        seconds, finite = time.perf_counter() - start, self.pipeline.image_processor.finite.tolist()
        for image, request, is_finite in zip(images, requests, finite, strict=True):
            parameters = variant.parameters_of(request)
            if error := keep_image(image, request.path, parameters, is_finite):
                raise error
            self.last = image, parameters
            print(f"{seconds:.2f} s  {request.path}", flush=True)
