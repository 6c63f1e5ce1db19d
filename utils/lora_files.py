"""Where a LoRA lies: PATH[:SCALE] of --lora as a file on this machine."""

import hashlib
import math
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from utils.checkpoint import hub_errors
from utils.common import RecipeError, reading

CONFIG = "adapter_config.json"  # peft's, beside the weights
DEFAULTS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # diffusers' and peft's
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
CONVERT = ('python -c "import torch, sys; from safetensors.torch import save_file; '
           'save_file(torch.load(sys.argv[1], weights_only=True), sys.argv[2])" {} lora.safetensors')


def split(spec: str) -> tuple[str, float]:
    """PATH[:SCALE] -> (path, scale); the scale is 1 if what follows the last colon is no number.

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
        raise RecipeError(f"--lora {spec}: the scale {text} is not finite. Give a number such as 0.8 behind the colon.")
    return path, scale


def locate(path: str) -> Path:
    """The file of a LoRA: a local file, the one LoRA of a local folder, or OWNER/REPO[/FILE] of the Hub.

    Offline the Hub's local cache is read instead. peft's adapter_config.json lies beside the file if it has one.

    Raises:
        RecipeError: there is none, or several, or a pickled one.
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
            raise RecipeError(f"--lora {path} is neither a file nor a folder.")
        parts = path.split("/")
        if path.startswith(("/", "./", "../", "~")) or "\\" in path or len(parts) == 1 or "" in parts or (
                len(parts) == 2 and path.endswith((".safetensors", *PICKLED))):
            raise RecipeError(f"--lora {path}: there is no such file or folder.")
        repo, name = "/".join(parts[:2]), "/".join(parts[2:])
        if name:
            _refuse_pickled(path, "", [name])
        if name and not name.endswith(".safetensors"):
            raise RecipeError(f"--lora {path}: there is no such file or folder here, and a file on the Hub is "
                              "OWNER/REPO/FILE.safetensors.")
        with hub_errors("--lora", repo):
            return _download(path, repo, name)


def contents(file: Path) -> str:
    """The SHA-256 of what decides a LoRA's effect: the file, and peft's config beside it if there is one, which holds
    alpha."""
    found, beside = hashlib.sha256(), file.parent / CONFIG
    for path in (file, beside) if beside.is_file() else (file,):
        with open(path, "rb") as content:
            while part := content.read(2**24):
                found.update(part)
    return found.hexdigest()


def _download(path: str, repo: str, name: str) -> Path:
    where = repo
    try:
        names = HfApi().list_repo_files(repo)
    except (RepositoryNotFoundError, HFValidationError):
        raise
    except Exception:  # no network, in one of the many ways that clients say it
        where = f"the Hub cannot be reached, and the local copy of {repo}"
        folder = Path(snapshot_download(repo, local_files_only=True))
        names = [found.relative_to(folder).as_posix() for found in sorted(folder.rglob("*")) if found.is_file()]
    if name and name not in names:
        raise RecipeError(f"--lora {path}: {where} has no {name}. It has {_listed(names) or 'no safetensors file'}.")
    name = name or _choose(path, names)
    for beside in ((Path(name).parent / CONFIG).as_posix(), name):
        if beside in names:
            file = hf_hub_download(repo, beside)
    return Path(file)


def _choose(path: str, names: list[str]) -> str:
    """The one LoRA among a folder's files."""
    usable = [name for name in names if name.endswith(".safetensors") and "/" not in name and name[0] != "."]
    named = [name for name in usable if name in DEFAULTS]
    for only in (named, usable):
        if len(only) == 1:
            return only[0]
    if usable:
        raise RecipeError(f"--lora {path} holds several LoRAs: {_listed(usable)}. Say which: --lora "
                          f"{path.rstrip('/')}/{usable[0]}")
    if _listed(names):
        raise RecipeError(f"--lora {path} holds LoRAs in folders only: {_listed(names)}. Say which: --lora "
                          f"{path.rstrip('/')}/{next(name for name in names if name.endswith('.safetensors'))}")
    _refuse_pickled(path, f"{path.rstrip('/')}/", names)
    raise RecipeError(f"--lora {path} holds no safetensors file.")


def _refuse_pickled(path: str, folder: str, names: list[str]) -> None:
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        raise RecipeError(f"--lora {path}: {pickled[0]} is a pickled file, which can run code and is not read. "
                          f"Convert it: {CONVERT.format(folder + pickled[0])}")


def _listed(names: list[str]) -> str:
    found = [name for name in names if name.endswith(".safetensors")]
    return ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
