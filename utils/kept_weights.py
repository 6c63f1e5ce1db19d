"""Keeps the quantized transformer on disk, so that later starts read less and quantize nothing.

    CACHE/weights/KEY/manifest.json, 00.safetensors, 01.safetensors, ...

KEY is a hash of everything that decides the values: the checkpoint's and the LoRAs' contents, the recipe's switches
and the code that quantizes. The files are tensors, no code. They are written whole or not at all, belong to this user
alone, and every SHA-256 is compared before they are used. If anything is off, one line says so, and the checkpoint is
quantized again.
"""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.aoti.store import MANIFEST, key_of, locked, open_store, publish, remove, verify
from utils.common import RecipeError, StageLog, reason_of
from utils.plan import Plan

SHARD = 2**30  # bytes; several threads hash and read the shards
MOST = 3  # kept transformers, 12 or 15 GB each for FLUX.1; the least recently used ones go first
SOURCES = ("attention.py", "equalization.py", "kernels/formats.py", "kernels/fused_blocks.py",
           "kernels/int8_blocks.py", "kernels/modulation.py")


def fields_of(plan: Plan, contents: dict) -> dict:
    """Everything that decides the values of the quantized transformer.

    Args:
        contents: identifies the checkpoint, with its configs, and the LoRAs, as `pipeline.contents`.
    """
    sources = {name: hashlib.sha256((Path(__file__).parent / name).read_bytes()).hexdigest()[:16] for name in SOURCES}
    return {"contents": contents, "quantization": plan.quantization.dtype,
            "float8_modulations": plan.fused_kernels.float8_modulations, "sources": sources}


def load(cache_dir: str, fields: dict, config: dict, device: torch.device
         ) -> tuple[FluxTransformer2DModel, dict | None] | None:
    """Loads a kept transformer, fused and quantized, onto `device`.

    Returns:
        The transformer and the record of the fp8 check that it passed (None without a check); or None if no kept
        transformer fits, after a line on stderr if there is one and something is wrong with it.
    """
    key = key_of(fields)
    try:
        root = open_store(cache_dir, "weights")
        folder = root / key
        if not os.path.lexists(folder):
            return None
        with locked(root, key):
            manifest = verify(folder)
            transformer = empty(config, device, fields["float8_modulations"], fields["quantization"] == "int8")
            with ThreadPoolExecutor(8) as pool:
                shards = [folder / name for name in manifest["files"] if name.endswith(".safetensors")]
                parts = list(pool.map(lambda path: load_file(path, device=str(device)), shards))
            transformer.load_state_dict({name: tensor for part in parts for name, tensor in part.items()}, assign=True)
            os.utime(folder / MANIFEST)
        return transformer, manifest["facts"].get("fp8_check")
    except (RecipeError, OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = getattr(error, "reason", None) or reason_of(error)
        print(f"note: the kept weights {key} are not used ({reason}). The checkpoint is quantized again.",
              file=sys.stderr, flush=True)
        return None


def empty(config: dict, device: torch.device, float8_modulations: bool, int8: bool) -> FluxTransformer2DModel:
    """A transformer of fused blocks whose weights have shapes and no values.

    Args:
        float8_modulations, int8: of `fuse_blocks`.
    """
    from utils.kernels.formats import use_torch_memory  # need Triton
    from utils.kernels.fused_blocks import fuse_blocks
    from utils.pipeline_utils import fuse_projections

    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config).to(torch.bfloat16)
    fuse_projections(transformer)
    fuse_blocks(transformer, torch.device("meta"), float8_modulations, int8)
    if device.type == "cuda":
        use_torch_memory(device)
    return transformer.eval().requires_grad_(False)


def keep(cache_dir: str, fields: dict, state: dict[str, torch.Tensor], check: dict | None, log: StageLog) -> None:
    """Writes a quantized transformer. A failure is a line in the log: the pictures do not depend on it.

    Args:
        state: the transformer's `state_dict`, with fused blocks, before anything wraps the blocks.
        check: the record of the fp8 check, if it ran.
    """
    size = sum(tensor.nbytes for tensor in state.values())

    def write(folder: Path) -> None:
        shard, used, number = {}, 0, 0
        for name, tensor in state.items():
            shard[name] = tensor.detach().contiguous().cpu().clone()
            used += tensor.nbytes
            if used >= SHARD or name == next(reversed(state)):
                save_file(shard, folder / f"{number:02}.safetensors")
                shard, used, number = {}, 0, number + 1

    key = key_of(fields)
    try:
        root = open_store(cache_dir, "weights")
        with log.stage("keep weights"), locked(root, key):
            folder = publish(root, fields, write, {"fp8_check": check}, size + size // 20)
            forget_oldest(root, folder)
        log.line(f"kept the quantized weights in {folder}, {size / 1e9:.1f} GB: later starts load them")
    except (RecipeError, OSError, SafetensorError) as error:  # a full disk is a SafetensorError
        log.line(f"the quantized weights are not kept: {reason_of(error)}")


def forget_oldest(root: Path, newest: Path) -> None:
    """Removes all kept transformers but `newest` and the `MOST` - 1 that were used last."""
    others = [path.parent for path in root.glob(f"*/{MANIFEST}") if path.parent != newest]
    others.sort(key=lambda folder: (folder / MANIFEST).stat().st_mtime, reverse=True)
    for folder in others[MOST - 1:]:
        with suppress(RecipeError, OSError):  # another user's
            remove(folder)
