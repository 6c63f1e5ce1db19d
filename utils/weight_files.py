"""Checks a checkpoint's weights against its models.

Names and shapes in the files are compared before anything loads, and values afterwards. diffusers and transformers only
warn, or stay silent, if weights are absent and the model runs with random ones.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from utils.checkpoint import hub_errors, model_shapes
from utils.common import RecipeError, reading
from utils.safetensors_header import Tensor, read_header

STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model",
         "text_encoder_2": "model"}
TOKENIZER_FILES = {"tokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
                   "tokenizer_2": (("tokenizer.json",), ("spiece.model",))}
# Published files also hold weights that FLUX.1 does not use: CLIP's projection and image encoder, and T5's decoder.
UNUSED = {"text_encoder": r"text_projection\.|visual_projection\.|vision_model\.|logit_scale|embeddings\.position_ids",
          "text_encoder_2": r"decoder\.|lm_head\."}
QUANTISED = {"scaled fp8 (its scales would be lost)": r"scale_weight|weight_scale|input_scale|scaled_fp8|scale_input",
             "bitsandbytes": r"\.absmax|\.quant_map|quant_state", "nunchaku": r"\.qweight|\.wscales|\.smooth_factor"}
HASHED_BYTES = 64 * 2**20
CHECKED_ON_CPU = 10**9  # parameters; a GPU checks any number of them within milliseconds
DAMAGED = "Download the file again."


class Checkpoint(NamedTuple):
    """A local checkpoint whose files hold every tensor that its models need."""
    ckpt: str
    folder: Path
    variant: str | None  # as in model.fp16.safetensors
    tensors: dict[str, dict[str, tuple[Path, str]]]  # {component: {name in the model: (file, name in the file)}}


def find_checkpoint(ckpt: str, folder: Path, revision: str | None, configs: dict,
                    others: set[str] = frozenset()) -> Checkpoint:
    """Compares the headers of a checkpoint's files with its models. Downloads the checkpoint first if it is on the Hub.

    Args:
        folder: the local folder; if it does not exist, `ckpt` is a name on the Hub.
        configs: from `utils.checkpoint.read_configs`.
        others: components whose weights come from elsewhere. They are neither downloaded nor looked for.

    Raises:
        RecipeError: a file is absent, damaged or quantized, or a tensor is missing, unknown or of another shape.
    """
    here = f"--ckpt {ckpt}"
    if not folder.is_dir():
        with reading(here, "Check the network and the free disk space, then run again: the download resumes."), \
                hub_errors("--ckpt", ckpt, revision):
            try:
                folder = Path(DiffusionPipeline.download(ckpt, revision=revision, use_safetensors=True,
                                                         **dict.fromkeys(others)))
            except OSError as error:
                if "necessary `safetensors` weights" not in str(error):
                    raise
                raise RecipeError(f"{here} has pickled files, or files of one variant such as model.fp16.safetensors. "
                                  "Pickled files are not read; for a variant run `hf download` and give the folder as "
                                  "--ckpt.") from error
    _check_tokenizers(here, folder)
    with reading(f"{here}: its configs", "Compare them with the configs of the original model."):
        shapes = model_shapes(configs)
    stems = {name: stem for name, stem in STEMS.items() if name not in others}
    variants = {name: _variant(here, folder / name, stem) for name, stem in stems.items()}
    if len(set(variants.values())) > 1:
        raise RecipeError(f"{here}: the files of {', '.join(name for name, one in variants.items() if one)} have a "
                          "variant in their names, and the other files have none. Remove "
                          f".{next(filter(None, variants.values()))} from the names.")
    tensors = {name: _compare(f"{here}: {name}", name, _headers(here, folder / name, stem, variants[name]),
                              shapes[name]) for name, stem in stems.items()}
    return Checkpoint(ckpt, folder, variants["vae"], tensors)


def _check_tokenizers(here: str, folder: Path) -> None:
    for name, choices in TOKENIZER_FILES.items():
        if not any(all((folder / name / file).is_file() and (folder / name / file).stat().st_size for file in files)
                   for files in choices):
            raise RecipeError(f"{here}: {name} has no vocabulary: it needs {' or '.join(map(' and '.join, choices))}. "
                              "Without a vocabulary the model would ignore the prompt. Download the folder again.")


def _variant(here: str, folder: Path, stem: str) -> str | None:
    """Returns the variant in the names of a component's files, such as "fp16" in model.fp16.safetensors, or None."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if any(name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json") for name in names):
        return None
    found = {match[1] for name in names if (match := re.fullmatch(
        rf"{stem}\.(\w+)\.safetensors|{stem}\.safetensors\.index\.(\w+)\.json", name)) and match[1]}
    if len(found) == 1:
        return found.pop()
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".ckpt"))]
    why = (f"holds {pickled[0]}, a pickled file. This recipe reads safetensors only: save the model with "
           "save_pretrained(safe_serialization=True)" if pickled else
           f"has no {stem}.safetensors" + (f", but the variants {', '.join(sorted(found))}: keep one" if found else
                                           ": download the folder again"))
    raise RecipeError(f"{here}: {folder.name} {why}.")


def _headers(here: str, folder: Path, stem: str, variant: str | None) -> dict[str, tuple[Path, Tensor]]:
    """Returns the file, and the dtype and shape, of every tensor in a component's files, by the tensor's name."""
    mark = f".{variant}" if variant else ""
    single, index = folder / f"{stem}{mark}.safetensors", folder / f"{stem}.safetensors.index{mark}.json"
    # diffusers would read the index and transformers the single file, so that both together are an error.
    if single.exists() and index.exists():
        raise RecipeError(f"{here}: {folder.name} holds both {single.name} and {index.name}. Remove the stale one.")
    if single.exists():
        files, mapped = [single], None
    else:
        with reading(f"{here}: {folder.name}/{index.name}", DAMAGED):
            mapped = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(mapped.values()))]
            if not files or any(path.parent != folder for path in files):
                raise ValueError("it names no file, or a file outside its folder")
    found = {}
    for path in files:
        with reading(f"{here}: {folder.name}/{path.name}", DAMAGED):
            for name, tensor in read_header(path)[0].items():
                if name in found or (mapped is not None and mapped.get(name) != path.name):
                    raise ValueError(f"it holds {name}, which belongs to another file according to {index.name}")
                found[name] = path, tensor
    if mapped is not None and (absent := sorted(mapped.keys() - found.keys())):
        raise RecipeError(f"{here}: {folder.name}/{index.name} names {len(absent)} tensors that no file holds, such as "
                          f"{absent[0]}. {DAMAGED}")
    return found


def _in_model(component: str, name: str) -> str:
    """Maps a tensor's name to one spelling: older files and versions of transformers spell it differently."""
    if component == "text_encoder":
        return name.removeprefix("text_model.")
    return "shared.weight" if component == "text_encoder_2" and name == "encoder.embed_tokens.weight" else name


def _compare(here: str, component: str, found: dict[str, tuple[Path, Tensor]],
             shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[Path, str]]:
    """Returns the file of each of the model's tensors, and the tensor's name in it.

    Raises:
        RecipeError: a tensor is missing, unknown, quantized or of another shape.
    """
    for kind, pattern in QUANTISED.items():
        if named := [name for name in found if re.search(pattern, name)]:
            raise RecipeError(f"{here} is quantized by {kind}: {len(named)} tensors such as {named[0]}. Give the "
                              "checkpoint in bf16: this recipe quantizes the model itself.")
    wanted = {_in_model(component, name): shape for name, shape in shapes.items()}
    unused = re.compile(UNUSED.get(component, r"(?!)"))
    held = {_in_model(component, name): (path, name, tensor) for name, (path, tensor) in found.items()
            if not unused.match(_in_model(component, name))}
    faults = {"missing": [name for name in wanted if name not in held],
              "unknown to the model": [held[name][1] for name in held if name not in wanted],
              "of another shape than the config's": [name for name in wanted if name in held
                                                     and held[name][2].shape != wanted[name]],
              "not floating point, so quantized": [name for name in wanted if name in held
                                              and held[name][2].dtype.startswith(("I", "U", "BOOL", "F4", "F6"))]}
    said = [f"{len(names)} {fault} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for fault, names in faults.items() if names]
    if said:
        is_foreign = any(re.match(r"(model\.diffusion_model\.|double_blocks\.)", name) for name in found)
        raise RecipeError(f"{here}: the weights do not match the config. Of {len(wanted)} tensors: "
                          f"{'; '.join(said)}. "
                          + ("The names are not diffusers' names: give the file with --transformer." if is_foreign else
                             "Download this component again, or restore the config that it was saved with."))
    return {name: held[name][:2] for name in wanted}


def read_tensors(checkpoint: Checkpoint, component: str, names: list[str]) -> dict[str, torch.Tensor]:
    """Reads some of a model's tensors from the files, on the CPU in the files' dtypes.

    Args:
        names: in the model.
    """
    places, files, found = checkpoint.tensors[component], {}, {}
    with reading(f"--ckpt {checkpoint.ckpt}: {component}", DAMAGED):
        for name in names:
            path, stored = places[_in_model(component, name)]
            if path not in files:
                files[path] = safe_open(path, "pt")
            found[name] = files[path].get_tensor(stored)
    return found


@torch.no_grad()
def compare_loaded(checkpoint: Checkpoint, pipeline, others: set[str] = frozenset()) -> None:
    """Compares the last row of every loaded tensor with the file, bit by bit in the model's dtype.

    It reads a few kB of each tensor. It also checks that both tokenizers turn a text into known tokens.

    Args:
        others: components that were not loaded from the checkpoint.

    Raises:
        RecipeError: a tensor was not loaded, or a tokenizer does not match its text encoder.
    """
    here = f"--ckpt {checkpoint.ckpt}"
    for component, tensors in checkpoint.tensors.items():
        if component in others:
            continue
        loaded = {_in_model(component, name): parameter
                  for name, parameter in getattr(pipeline, component).named_parameters(remove_duplicate=False)}
        files = {}
        for name, (path, stored) in tensors.items():
            if path not in files:
                files[path] = safe_open(path, "pt")
            part = files[path].get_slice(stored)
            sample = part[-1:] if part.get_shape() else files[path].get_tensor(stored)
            parameter = loaded[name]
            values = parameter if parameter.is_meta or not parameter.dim() else parameter[-1:]
            if parameter.is_meta or not torch.equal(values.cpu().nan_to_num(), sample.to(values.dtype).nan_to_num()):
                raise RecipeError(f"{here}: {component}: {name} was not loaded from {path.name}: this version of "
                                  "diffusers or transformers does not know the name. Save the model again with this "
                                  "version.")
    for name, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        tokenizer = getattr(pipeline, name)
        ids = tokenizer("a photo of a cat", add_special_tokens=False).input_ids
        vocabulary = getattr(pipeline, encoder).config.vocab_size
        if not set(ids) - {tokenizer.unk_token_id} or max(ids) >= vocabulary:
            raise RecipeError(f"{here}: {name} does not belong to {encoder}: the largest of the {len(ids)} tokens of a "
                              f"text is {max(ids, default=0)}, and the encoder's vocabulary has {vocabulary}. Download "
                              "the tokenizer again.")


@torch.no_grad()
def refuse_non_finite(ckpt: str, pipeline) -> None:
    """Refuses weights with NaN or infinity. On a CPU, models above `CHECKED_ON_CPU` parameters are not checked.

    On a GPU the CPU waits once for all weights together.

    Raises:
        RecipeError: a weight holds NaN or infinity.
    """
    named = {f"{component}.{name}": parameter for component in STEMS
             for name, parameter in getattr(pipeline, component).named_parameters()}
    if not any(one.is_cuda for one in named.values()) and sum(map(torch.Tensor.numel, named.values())) > CHECKED_ON_CPU:
        return
    flags = [parameter.isfinite().all() for parameter in named.values()]
    # Kept weights are on the GPU while the other components may wait in CPU memory.
    bad = [name for name, flag in zip(named, torch.stack([flag.to(flags[0].device) for flag in flags]).tolist(),
                                      strict=True) if not flag]
    if bad:
        raise RecipeError(f"--ckpt {ckpt}: {bad[0]} holds NaN or infinity"
                          f"{f', and so do {len(bad) - 1} more weights' * (len(bad) > 1)}. Download the "
                          "checkpoint again, or ask who made it.")


def identity(folder: Path, transformer: Path | None = None) -> str:
    """Returns a SHA-256 of the files that decide a checkpoint's pictures: weights, configs and vocabularies.

    Small files are hashed whole. Files in the Hub's cache are hashed by their names there, which are SHA-256 sums.
    Large local files are hashed by header, modification time and 1 KiB of each 64 MiB. That sample changes if training
    changes every tensor; hashing all 34 GB would take a minute.

    Args:
        transformer: the single file, of any name, that takes the place of the folder's transformer.
    """
    total = hashlib.sha256()
    for path in [folder / "model_index.json", *sorted(folder.glob("*/*"))]:
        if path.suffix not in (".safetensors", ".json", ".txt", ".model") or not path.is_file() or (
                transformer and path.parent.name == "transformer" and path.name != "config.json"):
            continue
        total.update(f"{path.relative_to(folder).as_posix()} ".encode())
        _hash_file(total, path)
    if transformer:
        total.update(b"--transformer ")
        _hash_file(total, transformer)
    return total.hexdigest()


def _hash_file(total, path: Path) -> None:
    """Adds a file's contents to a hash, or what stands for them (see `identity`)."""
    size, blob = path.stat().st_size, path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", blob):
        total.update(blob.encode())
    elif size <= HASHED_BYTES:
        total.update(path.read_bytes())
    else:
        header = sorted(read_header(path)[0].items()) if path.suffix == ".safetensors" else ""
        total.update(f"{size} {path.stat().st_mtime_ns} {header}".encode())
        with open(path, "rb") as file:
            for offset in range(0, size, HASHED_BYTES):
                file.seek(offset)
                total.update(file.read(2**10))
