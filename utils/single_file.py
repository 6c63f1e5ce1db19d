"""Puts the transformer of a single file into the pipeline of --ckpt, under the names of any of the usual tools.

The header decides before weights load: the depth, the guidance embedding, and the place of every tensor. Values are
then read one tensor at a time into the model, so that they are in CPU memory once. Scaled float8 becomes value times
scale in float32, rounded once.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from huggingface_hub import hf_hub_download
from safetensors import safe_open

from utils import gguf_file
from utils.checkpoint import hub_errors, model_shapes
from utils.common import RecipeError, reading
from utils.lora_files import PICKLED
from utils.lora_names import Rows
from utils.safetensors_header import read_header
from utils.single_file_header import (
    FLOAT8,
    OTHER_PARTS,
    config_of,
    guess,
    names_of,
    places_of,
    refuse_other_files,
    refuse_other_formats,
)


class SingleFile(NamedTuple):
    """A file whose tensors are all of a transformer's, by its header."""
    spec: str  # the --transformer argument
    path: Path
    config: dict  # of FluxTransformer2DModel
    tensors: dict[str, tuple[Rows, ...]]  # {name in the file: the rows of parameters that it stacks, in its order}
    scales: dict[str, str]  # {name in the file: name of its scale}
    notes: list[str]  # sentences for the user


def find(spec: str | None, configs: dict) -> tuple[dict, SingleFile | None]:
    """Reads the header of --transformer, if it is given, and puts its transformer into the configs.

    Args:
        spec: FILE, or OWNER/REPO/FILE[@REVISION] on the Hub, which is downloaded.
        configs: from `utils.checkpoint.read_configs`.

    Returns:
        The configs with the file's transformer, and the file; or `configs` and None.

    Raises:
        RecipeError: the file is missing, damaged, quantized in another format, of another model, or does not fit.
    """
    if spec is None:
        return configs, None
    here, path = f"--transformer {spec}", locate(spec)
    with reading(here, "Download the file again, or give another file."):
        is_gguf = gguf_file.is_gguf(path)
        header, metadata = (gguf_file.read_header(here, path), {}) if is_gguf else read_header(path)
        left_out = [name for name in header if OTHER_PARTS.match(name)]
        own = [name for name in header if not OTHER_PARTS.match(name)]
        refuse_other_files(here, path, own)
        if not is_gguf:
            refuse_other_formats(here, path, own, metadata)
    notes = []
    names = names_of(own, notes)
    if not names:
        raise RecipeError(f"{here} holds no block of a FLUX.1 transformer{guess(header)}. Give a FLUX.1 transformer.")
    if left_out:
        parts = ", ".join(sorted({name.split(".")[0] for name in left_out}))
        notes.append(f"only its transformer is taken; {len(left_out)} tensors of {parts} are left to --ckpt")
    config = config_of(here, names, header, configs["transformer"], notes)
    configs = configs | {"transformer": config}
    with reading(here, "Compare --ckpt's configs with the original model's."):
        shapes = model_shapes(configs)["transformer"]
    tensors, scales = places_of(here, names, header, shapes)
    bare = [name for name in tensors if header[name].dtype in FLOAT8 and len(header[name].shape) > 1
            and name not in scales]
    if scales and bare:
        notes.append(f"{len(bare)} float8 weights have no scale, such as {bare[0]}, and are taken as they are")
    return configs, SingleFile(spec, path, config, tensors, scales, notes)


def locate(spec: str) -> Path:
    """Returns the local file of --transformer. Downloads it first if it is on the Hub.

    Raises:
        RecipeError: there is no such file, or it is a folder or pickled.
    """
    here = f"--transformer {spec}"
    with reading(here, "Give a file, or OWNER/REPO/FILE.safetensors on the Hub."):
        local = Path(spec).expanduser()
        if spec and local.is_dir():
            raise RecipeError(f"{here} is a folder. Give a single file; --ckpt takes a diffusers folder.")
        on_hub, _, revision = spec.partition("@")  # a revision may hold slashes: refs/pr/1
        if (spec if local.exists() else on_hub).endswith(PICKLED):
            raise RecipeError(f"{here} is a pickled file. Reading a pickled file can run code, so it is refused. Give "
                              "the model as .safetensors.")
        if spec and local.is_file():
            return local
        parts = on_hub.split("/")
        if len(parts) < 3 or "" in parts or parts[0] in (".", "..", "~") or "\\" in spec:
            raise RecipeError(f"{here}: there is no such file. Give a file, or OWNER/REPO/FILE.safetensors on the Hub.")
        if "@" in spec and not revision:
            raise RecipeError(f"{here}: no revision follows the @. Give a branch, a tag or a commit, or drop the @.")
        repo = "/".join(parts[:2])
        with hub_errors("--transformer", repo, revision):
            return Path(hf_hub_download(repo, "/".join(parts[2:]), revision=revision or None))


def print_notes(file: SingleFile) -> None:
    """Prints to stderr what the header's reader decided by itself."""
    for note in file.notes:
        print(f"--transformer {file.spec}: {note}", file=sys.stderr, flush=True)


@torch.no_grad()
def load(file: SingleFile, device: str | torch.device, dtype: torch.dtype) -> FluxTransformer2DModel:
    """Builds the transformer on `device` in `dtype` and reads the file into it, one tensor at a time.

    Raises:
        RecipeError: the file cannot be read, or a weight holds NaN or infinity.
    """
    here = f"--transformer {file.spec}"
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(file.config)
    transformer.to(dtype).to_empty(device=device)
    parameters = dict(transformer.named_parameters())
    with reading(here, "Download the file again."), _open(file.path, device) as opened:
        for name, places in file.tensors.items():
            values = opened.get_tensor(name).to(device)
            if name in file.scales:
                scale = opened.get_tensor(file.scales[name]).to(device).float()
                values = values.float() * (scale if scale.dim() == 2 else scale.reshape(()))
            for place, part in zip(places, values.split([place.stop - place.start for place in places]), strict=True):
                parameters[place.module][place.start:place.stop].copy_(part)
    # A sum is 20 times as fast as isfinite on a CPU. A GPU is waited for once.
    sums = torch.stack([parameter.sum() for parameter in parameters.values()]).isfinite().tolist()
    if bad := [name for (name, parameter), is_finite in zip(parameters.items(), sums, strict=True)
               if not is_finite and not parameter.isfinite().all()]:
        raise RecipeError(f"{here}: {bad[0]} holds NaN or infinity{f', and so do {len(bad) - 1} more' * (len(bad) > 1)}"
                          ". Download the file again, or ask who made it.")
    return transformer.eval().requires_grad_(False)


def _open(path: Path, device: str | torch.device):
    return gguf_file.Reader(path, device) if gguf_file.is_gguf(path) else safe_open(path, "pt")
