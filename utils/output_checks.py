"""Checks before anything loads that the final write will succeed and that it will not replace a file of the user."""

import argparse
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

import PIL.Image

from utils.benchmark_utils import IMAGE_SUFFIXES, STEP_CACHES, images_per_call, redux_parts
from utils.common import RecipeError, reason_of
from utils.images import is_our_image, read_parameters, write_picture
from utils.outputs import as_path, is_manifest, is_record, is_trace, manifest_path, refuse_foreign, temporary_beside

LONGEST_SIDE = {".jpg": 65_535, ".jpeg": 65_535, ".webp": 16_383}  # the formats' limits in pixels
RECORD_BYTES = 4 * 2**20
PIXEL_BYTES = 4  # upper bound per pixel of a compressed image
METADATA_CHARACTERS = 4096  # upper bound per image, without its prompt and names


def check_outputs(args: argparse.Namespace, images: list[Path], prompts: list[str],
                  inputs: Iterable[tuple[str, Path]] = ()) -> None:
    """Refuses a run whose files could not be written or would replace files of the user.

    The check creates missing folders. It removes them again if it refuses the run.

    Args:
        images: every file that the run saves an image to.
        prompts: every prompt that the run writes into an image's metadata.
        inputs: (name, path) of files that the run reads and that no flag names.

    Raises:
        RecipeError: names the file, the reason and the way out.
    """
    outputs = [("--output-file", path, is_our_image) for path in images]
    if images:
        check_image_name(args)
    if args.prompts_file:
        outputs.append(("--output-file", manifest_path(args.output_file), is_manifest))
    records = ("--trace-file", args.trace_file, is_trace), ("--output-json", args.output_json, is_record)
    outputs += [(flag, as_path(path), is_ours) for flag, path, is_ours in records if path is not None]
    outputs = [(flag, Path(os.path.realpath(path)), is_ours) for flag, path, is_ours in outputs]
    refuse_same_files(outputs, [*inputs_of(args), *inputs])
    with without_new_folders(path for _, path, _ in outputs):
        for flag, path, is_ours in outputs:
            try_place(path, flag, is_ours)
        for folder, flag in {path.parent: flag for flag, path, _ in outputs}.items():
            try_folder(folder, flag)
        for flag, path, _ in outputs:
            try_length(path, flag)
        if images:
            try_picture(outputs[0][1], args, prompts)


def check_output(path: str | Path, flag: str, is_ours: Callable[[Path], bool]) -> None:
    """Like `check_outputs`, for a single file of a program other than gen_image.py and run_benchmark.py.

    Raises:
        RecipeError: names the file, the reason and the way out.
    """
    path = Path(os.path.realpath(as_path(path)))
    with without_new_folders([path]):
        try_place(path, flag, is_ours)
        try_folder(path.parent, flag)
        try_length(path, flag)


def check_image_name(args: argparse.Namespace) -> None:
    """Refuses an --output-file that names a folder, has an unknown format, or has a format too small for the image.

    Raises:
        RecipeError: names the file, the reason and the way out.
    """
    name, suffix = args.output_file, as_path(args.output_file).suffix
    if name.endswith(("/", os.sep)):
        raise RecipeError(f"--output-file {name}: it is a folder. Add a file name, such as {name}output.png.")
    if suffix.lower() not in IMAGE_SUFFIXES:
        raise RecipeError(f"--output-file {name}: unknown image type '{suffix}'. Choose a name that ends in one of "
                          f"{', '.join(IMAGE_SUFFIXES)}, such as output.png.")
    check_sides(args)


def check_sides(args: argparse.Namespace) -> None:
    """Refuses an image that is larger than the format of --output-file allows.

    Raises:
        RecipeError: names the side and the way out.
    """
    name, suffix = args.output_file, as_path(args.output_file).suffix
    longest = LONGEST_SIDE.get(suffix.lower(), 2**31 - 1)
    for side in ("height", "width"):
        if (getattr(args, side) or 0) > longest:
            raise RecipeError(f"--output-file {name}: {suffix} holds at most {longest:,} pixels per side, but --{side} "
                              f"is {getattr(args, side)}. Choose a .png file.")


def inputs_of(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """The files that a run reads, as (flag, path).

    The files of --ckpt are left out, because `refuse_foreign` never lets an output replace them.
    """
    files = [*((f"--{name}", getattr(args, name)) for name in ("image", "mask_image", "control_image", "transformer")),
             ("--redux", redux_parts(args.redux)[0] if args.redux else None), ("--prompts-file", args.prompts_file),
             ("--step_cache", None if args.step_cache in STEP_CACHES else args.step_cache)]
    for lora in args.lora or []:
        files += [("--lora", lora), ("--lora", lora.rpartition(":")[0])]
    return [(flag, as_path(path)) for flag, path in files if path and "://" not in path]


def refuse_same_files(outputs: list[tuple], inputs: list[tuple[str, Path]]) -> None:
    """Refuses an output that is the same file as an input or as another output, under any name.

    Args:
        outputs: (flag, path, is_ours) of each output.
        inputs: (flag, path) of each input.

    Raises:
        RecipeError: names both flags.
    """
    read, written = {}, {}
    for flag, path in inputs:
        with suppress(OSError, ValueError):  # no such file; the name may be a repository on the Hub
            read[_identity(path)] = flag
    for flag, path, _ in outputs:
        with suppress(OSError):
            if other := read.get(_identity(path)):
                raise RecipeError(f"{flag} would overwrite {path}, the file of {other}. Choose another {flag}.")
        # Some file systems ignore the case of names.
        other = written.setdefault(str(path).casefold(), flag)
        if other != flag:
            raise RecipeError(f"{flag} {path} is also the file of {other}. Choose another name for one of the two.")


def _identity(path: Path) -> tuple[int, int]:
    info = os.stat(path)
    return info.st_dev, info.st_ino


@contextmanager
def without_new_folders(paths: Iterable[Path]):
    """After a RecipeError in the body, removes the empty folders of `paths` that did not exist before."""
    missing = {folder for parent in {path.parent for path in paths} for folder in (parent, *parent.parents)
               if not os.path.exists(folder)}
    try:
        yield
    except RecipeError:
        for folder in sorted(missing, reverse=True):  # inner folders first
            with suppress(OSError):
                folder.rmdir()
        raise


def try_folder(folder: Path, flag: str, size: int = RECORD_BYTES) -> None:
    """Creates a folder if it is missing, and writes and deletes a temporary file in it.

    Args:
        size: of the temporary file, in bytes.

    Raises:
        RecipeError: names the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(folder / "x")
        try:
            with open(temporary, "wb") as file:
                file.write(bytes(size))
                file.flush()
                os.fsync(file.fileno())  # some file systems report a full disk only now
        finally:
            temporary.unlink()
    except OSError as error:
        raise RecipeError(f"{flag}: {folder} is not writable ({reason_of(error)}). Choose another folder, or free some "
                          "space.") from error


def try_place(path: Path, flag: str, is_ours: Callable[[Path], bool]) -> None:
    """Refuses an output path where a foreign file or a folder already is.

    Raises:
        RecipeError: names the flag, the file and the reason.
    """
    try:
        refuse_foreign(path, is_ours)
    except OSError as error:
        raise RecipeError(f"{flag} {path}: {reason_of(error)}. Choose another name"
                          + (", or remove it." if isinstance(error, FileExistsError) else ".")) from error


def try_length(path: Path, flag: str) -> None:
    """Refuses a file name that the file system does not accept. The folder must exist.

    Raises:
        RecipeError: names the flag, the file and the reason.
    """
    try:
        with suppress(FileNotFoundError):
            os.lstat(path)
    except OSError as error:
        raise RecipeError(f"{flag} {path}: {reason_of(error)}. Choose a shorter name.") from error


def try_picture(path: Path, args: argparse.Namespace, prompts: list[str]) -> None:
    """Saves a small picture with the longest prompt in the format and folder of `path`, and checks the free space.

    The folder needs room for the images of one pipeline call.

    Raises:
        RecipeError: names --output-file, the reason and the way out.
    """
    parameters = {name: getattr(args, name) for name in ("negative_prompt", "ckpt", "transformer", "lora", "image",
                                                         "mask_image", "control_image")}
    parameters |= {"prompt": max(prompts, key=lambda text: len(json.dumps(text))), "more": "x" * METADATA_CHARACTERS}
    needed = images_per_call(args) * (args.height or 1024) * (args.width or 1024) * PIXEL_BYTES
    temporary = temporary_beside(path)
    try:
        usage = shutil.disk_usage(path.parent)
        if usage.total and usage.free < needed:
            raise OSError(errno.ENOSPC, f"{path.parent} has {usage.free / 2**20:.0f} MiB left, but the images may need "
                                        f"{needed / 2**20:.0f}")
        write_picture(PIL.Image.new("RGB", (16, 16)), temporary, parameters)
        if read_parameters(temporary) != parameters:
            raise ValueError("its metadata cannot be read back")
    except OSError as error:
        raise RecipeError(f"--output-file {path}: {reason_of(error)}. Choose another folder, or free some "
                          "space.") from error
    except Exception as error:
        raise RecipeError(f"--output-file {path}: {path.suffix} cannot hold the image with its prompt "
                          f"({reason_of(error)}). Choose a .png file, or a shorter prompt.") from error
    finally:
        temporary.unlink(missing_ok=True)
