"""Finds the file of a LoRA from PATH[@REVISION][:SCALE] of --lora, locally or on the Hub."""

import hashlib
import math
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from utils.checkpoint import hub_errors
from utils.common import RecipeError, reading

CONFIG = "adapter_config.json"  # peft's config, in the folder of the weights
DEFAULTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers' and peft's
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
CONVERT = ('python -c "import torch, sys; from safetensors.torch import save_file; '
           'save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" {} lora.safetensors')


def split(spec: str) -> tuple[str, float]:
    """Splits PATH[:SCALE] into (path, scale). The scale is 1 if no number follows the last colon.

    Raises:
        RecipeError: the scale is not finite.
    """
    path, _, text = spec.rpartition(":")
    try:
        scale = float(text)
    except ValueError:
        return spec, 1.0
    if not path:
        return spec, 1.0
    if not math.isfinite(scale):
        raise RecipeError(f"--lora {spec}: the scale {text} is not finite. Give a number such as 0.8 after the colon.")
    return path, scale


def locate(path: str) -> Path:
    """Returns the local file of a LoRA. Downloads it first, with peft's adapter_config.json, if it is on the Hub.

    Without a network the Hub's local cache is used.

    Args:
        path: a file, a folder with one LoRA, or OWNER/REPO[/FILE][@REVISION] on the Hub.

    Raises:
        RecipeError: there is no LoRA, or more than one, or the file is pickled.
    """
    with reading(f"--lora {path}", "Give a file, a folder, OWNER/REPO or OWNER/REPO/FILE.safetensors."):
        local = Path(path).expanduser()
        if path and local.is_dir():
            names = [found.relative_to(local).as_posix() for depth in ("*", "*/*", "*/*/*")
                     for found in sorted(local.glob(depth)) if found.is_file()]
            return local / _choose(path, names)
        if path and local.exists():
            _refuse_pickled(path, "", [path])
            if local.is_file():
                return local
            raise RecipeError(f"--lora {path} is neither a file nor a folder. Give a .safetensors file.")
        on_hub, _, revision = path.partition("@")  # a revision may hold slashes: refs/pr/1
        parts = on_hub.split("/")
        if path.startswith(("/", "./", "../", "~")) or "\\" in path or len(parts) == 1 or "" in parts or (
                len(parts) == 2 and on_hub.endswith((".safetensors", *PICKLED))):
            raise RecipeError(f"--lora {path}: there is no such file or folder. Give a file, a folder, OWNER/REPO or "
                              "OWNER/REPO/FILE.safetensors.")
        if "@" in path and not revision:
            raise RecipeError(f"--lora {path}: no revision follows the @. Give a branch, a tag or a commit, or drop "
                              "the @.")
        repo, name = "/".join(parts[:2]), "/".join(parts[2:])
        if name:
            _refuse_pickled(path, "", [name])
        if name and not name.endswith(".safetensors"):
            raise RecipeError(f"--lora {path}: there is no such local file or folder. Give a file on the Hub as "
                              "OWNER/REPO/FILE.safetensors.")
        with hub_errors("--lora", repo, revision):
            return _download(path, repo, name, revision or None)


def contents(file: Path) -> str:
    """Returns the SHA-256 of a LoRA's file and of peft's config in the same folder, which holds alpha, if any."""
    total, config = hashlib.sha256(), file.parent / CONFIG
    for path in (file, config) if config.is_file() else (file,):
        with open(path, "rb") as content:
            while part := content.read(2**24):
                total.update(part)
    return total.hexdigest()


def _download(path: str, repo: str, name: str, revision: str | None) -> Path:
    where = repo
    try:
        names = HfApi().list_repo_files(repo, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise
    except Exception:  # no network: the Hub's clients raise many types for it
        where = f"the Hub cannot be reached, and the local copy of {repo}"
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
        names = [found.relative_to(folder).as_posix() for found in sorted(folder.rglob("*")) if found.is_file()]
    if name and name not in names:
        raise RecipeError(f"--lora {path}: {where} has no {name}. It has {_listed(names) or 'no safetensors file'}.")
    name = name or _choose(path, names)
    for beside in ((Path(name).parent / CONFIG).as_posix(), name):
        if beside in names:
            file = hf_hub_download(repo, beside, revision=revision)
    return Path(file)


def _choose(path: str, names: list[str]) -> str:
    """Returns the name of the only LoRA among a folder's files; a default name wins over others.

    Raises:
        RecipeError: there is no LoRA, or more than one.
    """
    usable = [name for name in names if name.endswith(".safetensors") and "/" not in name and name[0] != "."]
    named = [name for name in usable if name in DEFAULTS]
    for only in (named, usable):
        if len(only) == 1:
            return only[0]
    if usable:
        raise RecipeError(f"--lora {path} holds several LoRAs: {_listed(usable)}. Choose one, as in --lora "
                          f"{_inside(path, usable[0])}")
    if _listed(names):
        raise RecipeError(f"--lora {path} holds LoRAs only in subfolders: {_listed(names)}. Choose one, as in --lora "
                          f"{_inside(path, next(name for name in names if name.endswith('.safetensors')))}")
    _refuse_pickled(path, f"{path.rstrip('/')}/", names)
    raise RecipeError(f"--lora {path} holds no safetensors file. Give a file, or another folder.")


def _inside(path: str, name: str) -> str:
    """How --lora names a file of the folder or the repository `path`."""
    place, at, revision = path.partition("@") if not Path(path).expanduser().is_dir() else (path, "", "")
    return f"{place.rstrip('/')}/{name}{at}{revision}"


def _refuse_pickled(path: str, folder: str, names: list[str]) -> None:
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        raise RecipeError(f"--lora {path}: {pickled[0]} is a pickled file. Reading a pickled file can run code, so it "
                          f"is refused. Convert it: {CONVERT.format(folder + pickled[0])}")


def _listed(names: list[str]) -> str:
    found = [name for name in names if name.endswith(".safetensors")]
    return ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
