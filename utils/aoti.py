"""Packages: the compiled code of blocks, VAE and T5, exported once, loaded in seconds, without weights.

    python -m utils.aoti list                     # what is there, how big, does it fit this machine
    python -m utils.aoti verify                   # compare every file with its SHA-256; exit code 1 if one differs
    python -m utils.aoti clean --older-than 30    # days; without the flag, all that do not fit or are damaged
    python -m utils.aoti pack KEY                 # KEY.zip and its SHA-256, for --package-from

torch.export and AOTInductor compile one block of each kind. Its weights stay outside (`package_constants_in_so`), and
all blocks of that kind load the same file and share the weights of the live module: no second copy in memory, and one
package for every fine-tune of a model. Such code checks none of its inputs and computes garbage from wrong ones, so
each call is compared here with what the package was made for; inside a CUDA graph that costs nothing.
"""

import argparse
import copy
import functools
import hashlib
import inspect
import shutil
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map_only
from torchao.utils import TorchAOBaseTensor

from utils.aoti_compile import no_vector_instructions, write_package
from utils.benchmark_utils import DEFAULT_CACHE_DIR, RecipeError, exit_with_reason, finite_float
from utils.package_store import (
    Rejected,
    fetch,
    key_of,
    locked,
    nearest,
    open_store,
    pack,
    publish,
    read_manifest,
    set_aside,
    verify,
)

# How far a package's first output may be from eager's: rounding in other places, nothing more.
FLOAT32_BOUND, BOUND = 1e-4, 3e-2
# The VAE's layers are so many that bf16's roundings alone come near to that. Its package may also be this many times as
# far from float32 as eager is.
VAE_RATIO = 1.5

@dataclass
class Unit:
    """Modules that run the same graph on weights of their own, the arguments of one real call of the first, and
    inductor's settings for them."""
    name: str
    modules: list[torch.nn.Module]
    arguments: dict
    settings: dict = field(default_factory=dict)


def packaged(pipeline, blocks: bool, vae: bool, needs_image: bool, text_encoder: bool
             ) -> dict[str, list[torch.nn.Module]]:
    """What is packaged: both kinds of block, the VAE's decoder, its encoder where pictures are read (Kontext), and T5's
    blocks. What lies before and after the transformer's blocks is a few small kernels, no code worth a package.

    The recipe leaves out fused blocks (`utils.fused_blocks`), since four graphs of theirs would hold the same kernels
    in the same order; and the VAE where it sees tiles of several sizes.
    """
    kinds = {}
    if blocks:
        kinds["double"] = list(pipeline.transformer.transformer_blocks)
        kinds["single"] = list(pipeline.transformer.single_transformer_blocks)
    if vae:
        kinds["decoder"] = [pipeline.vae.decoder]
        if needs_image:
            kinds["encoder"] = [pipeline.vae.encoder]
    if text_encoder:
        kinds["t5"] = list(pipeline.text_encoder_2.encoder.block)
    return kinds


def capture(kinds: dict[str, list[torch.nn.Module]], call: Callable[[], object]) -> list[Unit]:
    """Sorts the modules of each kind by what `call` gives them, which decides their graph, and keeps what it gives the
    first of each: never written by hand, since the dtypes and strides that diffusers passes are its own affair
    (guidance is float32 in a bf16 model). T5's first block gets no position bias; fused blocks leave sums to the next,
    but for the last."""
    units: dict[tuple, Unit] = {}

    def keep(kind, module, args, kwargs):
        found = _bound(inspect.signature(module.forward), args, kwargs)
        key = kind, getattr(module, "leaves_sum", False), *sorted(describe(found).items())
        if key not in units:
            same = sum(unit.name.startswith(kind) for unit in units.values())
            units[key] = Unit(f"{kind}-{same + 1}" if same else kind, [],
                              tree_map_only(torch.Tensor, lambda x: canonical(x.detach().clone()), found))
        if not any(module is other for other in units[key].modules):
            units[key].modules.append(module)

    handles = [module.register_forward_pre_hook(functools.partial(keep, kind), with_kwargs=True)
               for kind, modules in kinds.items() for module in modules]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return list(units.values())


def _bound(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict:
    """All arguments by name, those that `**kwargs` takes among them."""
    found = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
    return found


def canonical(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, also in the strides of dimensions of size 1, which `.contiguous()` leaves as they are."""
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.append(strides[-1] * size)
    return x.contiguous().as_strided(x.shape, strides[:x.dim()][::-1])


def describe(arguments: dict) -> dict[str, str]:
    """What a package's code depends on: shape, dtype and device of each tensor, the value of everything else."""
    leaves, _ = tree_flatten_with_path(arguments)
    return {"".join(map(str, path)): f"{x.dtype} {tuple(x.shape)} {x.device.type}" if isinstance(x, torch.Tensor)
            else repr(x) for path, x in leaves}


def fields_of(pipeline, units: list[Unit], switches: dict) -> dict:
    """Everything that decides what the packages compute and where they run; its hash is their folder's name.

    Args:
        switches: techniques that change the graph, as JSON values.
    """
    versions = {"python": ".".join(map(str, sys.version_info[:2])), "cuda": torch.version.cuda,
                "hip": torch.version.hip}
    for name in ("torch", "triton", "torchao", "diffusers", "transformers", "fa3-fwd", "flash-attn-3", "amd-aiter"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    sources = {name: hashlib.sha256((Path(__file__).parent / name).read_bytes()).hexdigest()[:16]
               for name in ("aoti_compile.py", "attention.py", "fused_kernels.py", "fused_blocks.py", "fused_vae.py")}
    models = {name: {k: repr(v) for k, v in sorted(getattr(pipeline, name).config.items()) if not k.startswith("_")}
              for name in ("transformer", "vae")}
    return {"models": models, "switches": switches, "versions": versions, "machine": machine(pipeline.device.type),
            "sources": sources, "inputs": {unit.name: describe(unit.arguments) for unit in units}}


def machine(device: str) -> dict:
    """What native code is made for: the GPU's architecture, or the CPU's instruction set."""
    if device == "cuda":
        return {"gpu": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    return {"cpu": str(pick_vec_isa())}


def use_packages(pipeline, units: list[Unit], switches: dict, cache_dir: str, use_cached: bool, re_export: bool,
                 source: str | None, say: Callable[[str], None]) -> str:
    """Puts packaged code under the units' modules: found ones, or new ones that are kept.

    Args:
        units: with their arguments captured.
        use_cached: never export: what is missing or damaged is an error.
        re_export: make the packages anew in any case.
        source: fetch what is missing from there (`package_store.fetch`) and do not export.

    Returns:
        What was done, for the table of techniques.

    Raises:
        RecipeError: see `use_cached`; or the cache folder cannot be trusted or is full.
    """
    root, fields = open_store(cache_dir), fields_of(pipeline, units, switches)
    key = key_of(fields)
    folder, names = root / key, ", ".join(unit.name for unit in units)
    with locked(root, key), no_vector_instructions(pipeline.device.type == "cuda"):
        if folder.is_symlink() or (folder.exists() and not re_export):
            try:
                verify(folder)
                bind(units, folder, key)
                return f"{names}: loaded {key}"
            except Rejected as error:
                aside = set_aside(folder, "rejected")
                said = f"package {key} is not usable: {error}; it is now {aside}"
                if use_cached:
                    raise RecipeError(f"--use-cached-model: {said}. Run once without the flag to make a new one."
                                      ) from error
                say(f"{said}; making it anew")
        elif use_cached and not source:
            raise RecipeError(f"--use-cached-model: there is no package {key} in {root}{_nearest(root, fields)}. Run "
                              "once without the flag (same arguments otherwise) to make it.")
        if not source:
            say(f"exporting {names}; later starts load them")
        make = fetch(source, key) if source else lambda temporary: export(units, temporary, key, say)
        folder = publish(root, fields, make)
        try:
            bind(units, folder, key)
        except Rejected as error:  # of someone else's making, since our own was compared with eager
            aside = set_aside(folder, "rejected")
            raise RecipeError(f"package {key} is not usable: {error}; it is now {aside}. Use --compile_export_mode "
                              "compile, or export it here.") from error
    size = sum(path.stat().st_size for path in folder.iterdir())
    return f"{names}: {'fetched' if source else 'exported'} {key}, {size / 1e6:.1f} MB"


def _nearest(root: Path, fields: dict) -> str:
    found = nearest(root, fields)
    if found is None:
        return ", which is empty"
    key, differs = found
    shown = "; ".join(f"{name}: there {there}, here {here}" for name, (there, here) in list(differs.items())[:6])
    more = f"; and {len(differs) - 6} more" if len(differs) > 6 else ""
    return f". The nearest is {key}, which differs in {shown}{more}"


@torch.no_grad()
def export(units: list[Unit], folder: Path, key: str, say: Callable[[str], None] = lambda line: None) -> None:
    """Writes NAME.pt2 of each unit into `folder`, after comparing it with eager on the first and the last module:
    the last shows that no weight of the first was compiled in. A line to `say` of each, since all may take a minute.

    Raises:
        RecipeError: a package computes something else.
    """
    for unit in units:
        start, path = time.perf_counter(), folder / f"{unit.name}.pt2"
        try:
            write_package(unit.modules[0], unit.arguments, path, unit.settings,
                          {"flux_faster_key": key, "flux_faster_unit": unit.name})
        except Exception as error:
            error.add_note(f"Exporting {unit.name} failed. --compile_export_mode compile does without packages.")
            raise
        for module in {id(m): m for m in (unit.modules[0], unit.modules[-1])}.values():
            expected, found = module(**unit.arguments), _load(unit, module, path, key)(**unit.arguments)
            error = _error(found, expected)
            if not (error < _bound_of(module, _tensors(expected)[0].dtype)
                    or _is_as_near_to_float32(unit, module, found, expected)):
                raise RecipeError(f"the package of {unit.name} differs from eager by {error:.1e}, more than rounding: "
                                  "please report this, and use --compile_export_mode compile.")
        say(f"exported {unit.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1e6:.1f} MB")


def _tensors(output) -> list[torch.Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]


def _bound_of(module: torch.nn.Module, dtype: torch.dtype) -> float:
    """Values that are rounded to 8 bits on their way may go to the next of few, in any dtype: 1.2e-4 was seen of int8
    in float32."""
    quantised = any(x.dtype.itemsize == 1 for x in constants_of(module).values())
    return BOUND if quantised or dtype != torch.float32 else FLOAT32_BOUND


def _is_as_near_to_float32(unit: Unit, module: torch.nn.Module, found, expected) -> bool:
    if unit.name not in ("decoder", "encoder"):
        return False
    arguments = tree_map_only(torch.Tensor, torch.Tensor.float, unit.arguments)
    exact = copy.deepcopy(module).float()(**arguments)
    return _error(found, exact) < VAE_RATIO * _error(expected, exact)


def _error(found, expected) -> float:
    """The largest ||found - expected|| / ||expected|| of two outputs' tensors."""
    return max(((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
               for a, b in zip(_tensors(found), _tensors(expected), strict=True))


def bind(units: list[Unit], folder: Path, key: str) -> None:
    """Replaces the forward of each module by the package's code on the module's own weights.

    Raises:
        Rejected: a package is for something else, or cannot be opened.
    """
    forwards = [[_checked(unit, module, _load(unit, module, folder / f"{unit.name}.pt2", key))
                 for module in unit.modules] for unit in units]
    for unit, made in zip(units, forwards, strict=True):  # only now: all or none
        for module, forward in zip(unit.modules, made, strict=True):
            module.forward = forward


def _load(unit: Unit, module: torch.nn.Module, path: Path, key: str) -> Callable:
    """The package's code with `module`'s weights. It leaves here only with them: called without, it would crash."""
    try:
        told = torch._C._aoti.AOTIModelPackageLoader.load_metadata_from_package(str(path), "model")  # opens no code
        if (told.get("flux_faster_key"), told.get("flux_faster_unit")) != (key, unit.name):
            raise Rejected(f"{path.name} was made for {told.get('flux_faster_unit')} of {told.get('flux_faster_key')}")
        runner = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
    except RuntimeError as error:
        raise Rejected(f"{path.name} cannot be opened ({str(error).splitlines()[0]})") from error
    weights = constants_of(module)
    if missing := [name for name in runner.get_constant_fqns() if name not in weights]:
        raise Rejected(f"{path.name} asks for weights that {unit.name} has not: {', '.join(missing[:3])}")
    # Tensors of their own on the same memory: what load_constants is given is never let go (seen of PyTorch 2.11 and
    # 2.13), and a pipeline's weights would stay after it. Emptied when the code goes, they hold nothing.
    weights = {name: weights[name].detach() for name in runner.get_constant_fqns()}
    runner.load_constants(weights, check_full_update=True, user_managed=True)
    weakref.finalize(runner, _empty, list(weights.values()), torch.empty(0)).atexit = False
    return runner


def _empty(tensors: list[torch.Tensor], nothing: torch.Tensor) -> None:
    # No operation of PyTorch: garbage may be collected while something else is traced, which refuses those.
    for x in tensors:
        x.data = nothing


def constants_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's tensors under the names that export gives them; quantised weights in their parts."""
    found = {}
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if isinstance(value.data, TorchAOBaseTensor):
            parent, _, leaf = name.rpartition(".")
            parts, _ = value.data.__tensor_flatten__()
            found |= {f"{parent}.parametrizations.{leaf}.original{i}": getattr(value.data, part)
                      for i, part in enumerate(parts)}
        else:
            found[name] = value.data
    return found


def _checked(unit: Unit, module: torch.nn.Module, runner: Callable) -> Callable:
    """`runner` behind the module's own signature, which cache-dit inspects, and a comparison of every call."""
    parameters, expected = inspect.signature(module.forward), describe(unit.arguments)

    @functools.wraps(module.forward)
    def forward(*args, **kwargs):
        arguments = _bound(parameters, args, kwargs)
        if (found := describe(arguments)) != expected:
            name = next(name for name in sorted(found | expected) if found.get(name) != expected.get(name))
            raise RecipeError(
                f"the package of {unit.name} was made for other inputs: {name} is {found.get(name, 'missing')}, not "
                f"{expected.get(name, 'given')}. One size of image a process: start again with the new one, or with "
                "--compile_export_mode compile.")
        return runner(**tree_map_only(torch.Tensor, canonical, arguments))

    return forward


# --- the command line ---

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["list", "verify", "clean", "pack"])
    parser.add_argument("key", nargs="?", help="for pack: which")
    parser.add_argument("--cache-dir", default=DEFAULT_CACHE_DIR)
    parser.add_argument("--older-than", type=finite_float, metavar="DAYS", help="for clean: all of at least this age")
    args = parser.parse_args()
    if args.action == "pack":
        try:
            return print(pack(open_store(args.cache_dir) / str(args.key), Path(f"{args.key}.zip")), f"{args.key}.zip")
        except Rejected as error:
            parser.error(f"pack {args.key}: {error}")
    unusable = 0
    here = machine("cuda" if torch.cuda.is_available() else "cpu")
    for folder in sorted(path for path in open_store(args.cache_dir).iterdir() if path.is_dir()):
        size = sum(path.lstat().st_size for path in folder.rglob("*")) / 1e6
        days = (time.time() - folder.lstat().st_mtime) / 86400
        try:
            fields = (verify if args.action != "list" else read_manifest)(folder)["fields"]
            made_for = fields["machine"], fields["versions"].get("torch")
            state = ("set aside" if folder.name != key_of(fields) else
                     "fits this machine" if made_for == (here, metadata.version("torch")) else
                     f"made for {made_for[0]}, torch {made_for[1]}")
        except Rejected as error:
            state = f"not usable: {error}"
            unusable += 1
        unwanted = days >= args.older_than if args.older_than is not None else state != "fits this machine"
        if args.action == "clean" and unwanted:
            shutil.rmtree(folder)
            state = f"removed ({state})"
        print(f"{folder.name}  {size:7.1f} MB  {days:6.1f} days  {state}")
    if args.action == "verify" and unusable:
        sys.exit(1)


if __name__ == "__main__":
    exit_with_reason(main)
