"""Exports compiled code of blocks, VAE and T5 as packages without weights, and loads them in seconds.

    python -m utils.aoti list      # key, size, and whether it fits this machine
    python -m utils.aoti verify    # compare every file with its SHA-256; exit code 1 if one differs
    python -m utils.aoti clean     # delete packages that are damaged or made for another machine or PyTorch

torch.export and AOTInductor compile one block of each kind. All blocks of that kind load the same file and lend it the
weights of the live module (`package_constants_in_so` is off). So weights take memory once, and one package serves every
fine-tune of a model.

For --package-from, `python -m zipfile -c KEY.zip CACHE/packages/KEY/*` packs a package and `sha256sum` gives its hash.
"""

import copy
import functools
import hashlib
import inspect
import os
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map_only
from torchao.utils import TorchAOBaseTensor

from utils.aoti.inductor import no_vector_instructions, write_package
from utils.aoti.store import fetch, key_of, locked, open_store, publish, unusable, verify
from utils.common import RecipeError

# Bounds of the relative difference between a package's output and eager's. They allow only for rounding.
FLOAT32_BOUND, BOUND = 1e-4, 3e-2
# In the VAE's many layers bf16 rounding alone comes near BOUND. So the error of the VAE's package against float32 may
# also be up to VAE_RATIO times eager's error against float32.
VAE_RATIO = 1.5


@dataclass
class Unit:
    """Modules that run the same graph on different weights.

    Args:
        name: the unit's name, which is also the package's file name.
        modules: the modules.
        arguments: the first module's arguments in one real call, by name.
        settings: inductor's settings for this graph.
    """
    name: str
    modules: list[torch.nn.Module]
    arguments: dict
    settings: dict = field(default_factory=dict)


def packaged(pipeline, blocks: bool, vae: bool, encoder: bool, text_encoder: bool
             ) -> dict[str, list[torch.nn.Module]]:
    """The modules to package, by kind: double and single blocks, the VAE's decoder and encoder, T5's blocks. The
    transformer's layers around its blocks are a few small kernels, so they stay in eager mode.

    Args:
        blocks: False for fused blocks (`utils.kernels.fused_blocks`), whose packages would hold the same kernels.
        vae: False for a VAE that decodes tiles, because tiles have several sizes.
        encoder: True if pictures are encoded.
        text_encoder: include T5's blocks.
    """
    kinds = {}
    if blocks:
        kinds["double"] = list(pipeline.transformer.transformer_blocks)
        kinds["single"] = list(pipeline.transformer.single_transformer_blocks)
    if vae:
        kinds["decoder"] = [pipeline.vae.decoder]
        if encoder:
            kinds["encoder"] = [pipeline.vae.encoder]
    if text_encoder:
        kinds["t5"] = list(pipeline.text_encoder_2.encoder.block)
    return kinds


def capture(kinds: dict[str, list[torch.nn.Module]], call: Callable[[], object]) -> list[Unit]:
    """Runs `call` and groups the modules of each kind by their arguments, which decide their graph.

    Each group keeps the arguments of its first call. They are captured because diffusers decides dtypes and strides
    (guidance is float32 in a bf16 model). One kind may have several graphs: T5's first block gets no position bias, and
    the last fused block adds the residual that other blocks leave to the next one.
    """
    units: dict[tuple, Unit] = {}

    def keep(kind, module, args, kwargs):
        arguments = _bound(inspect.signature(module.forward), args, kwargs)
        key = kind, getattr(module, "defers_residual", False), *sorted(describe(arguments).items())
        if key not in units:
            same = sum(unit.name.startswith(kind) for unit in units.values())
            units[key] = Unit(f"{kind}-{same + 1}" if same else kind, [],
                              tree_map_only(torch.Tensor, lambda x: canonical(x.detach().clone()), arguments))
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
    """All arguments by name, including the arguments that `**kwargs` collects."""
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def canonical(x: torch.Tensor) -> torch.Tensor:
    """A contiguous `x`. Dimensions of size 1 get contiguous strides too; `.contiguous()` would keep their strides."""
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.append(strides[-1] * size)
    return x.contiguous().as_strided(x.shape, strides[:x.dim()][::-1])


def describe(arguments: dict) -> dict[str, str]:
    """Describes arguments as the package's code depends on them.

    A tensor becomes its dtype, shape and device type. Any other argument becomes its value.
    """
    leaves, _ = tree_flatten_with_path(arguments)
    return {"".join(map(str, path)): f"{x.dtype} {tuple(x.shape)} {x.device.type}" if isinstance(x, torch.Tensor)
            else repr(x) for path, x in leaves}


def fields_of(pipeline, units: list[Unit], switches: dict) -> dict:
    """Everything that decides what the packages compute and where they run. Its hash is the package's key.

    Args:
        switches: the techniques that change the graph, as JSON values.
    """
    versions = {"python": ".".join(map(str, sys.version_info[:2])), "cuda": torch.version.cuda,
                "hip": torch.version.hip}
    for name in ("torch", "triton", "torchao", "diffusers", "transformers", "fa3-fwd", "flash-attn-3", "amd-aiter"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    sources = {name: hashlib.sha256((Path(__file__).parent.parent / name).read_bytes()).hexdigest()[:16]
               for name in ("aoti/inductor.py", "attention.py", "kernels/formats.py", "kernels/layer_norm.py",
                            "kernels/casts.py", "kernels/gemm.py", "kernels/int8_gemm.py", "kernels/fused_blocks.py",
                            "kernels/int8_blocks.py", "kernels/modulation.py", "kernels/fused_vae.py")}
    models = {name: {k: repr(v) for k, v in sorted(getattr(pipeline, name).config.items()) if not k.startswith("_")}
              for name in ("transformer", "vae")}
    return {"models": models, "switches": switches, "versions": versions, "machine": machine(pipeline.device.type),
            "sources": sources, "inputs": {unit.name: describe(unit.arguments) for unit in units}}


def machine(device: str) -> dict:
    """The hardware that native code is made for: the GPU's architecture, or the CPU's SIMD instruction set."""
    if device == "cuda":
        return {"gpu": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    return {"cpu": str(pick_vec_isa())}


def use_packages(pipeline, units: list[Unit], switches: dict, cache_dir: str, use_cached: bool, re_export: bool,
                 source: str | None, say: Callable[[str], None]) -> str:
    """Replaces the units' modules by packaged code. It loads existing packages and exports missing packages.

    Args:
        units: the units that `capture` returned.
        switches: the techniques that change the graph, as JSON values.
        cache_dir: --cache-dir; packages are in its folder `packages`.
        use_cached: never export; a missing package is an error.
        re_export: always export, and replace an older package.
        source: fetch a missing package from this source (`store.fetch`) instead of exporting it.
        say: prints a line.

    Returns:
        Whether the packages were loaded, exported or fetched, and their key, for the table of techniques.

    Raises:
        RecipeError: a package is damaged, missing or unlike eager, or the cache folder is full or not the user's own.
    """
    root, fields = open_store(cache_dir), fields_of(pipeline, units, switches)
    key = key_of(fields)
    folder = root / key
    with locked(root, key), no_vector_instructions(pipeline.device.type == "cuda"):
        if os.path.lexists(folder) and not re_export:
            verify(folder)
            done = f"loaded {key}"
        elif use_cached and not source:
            raise RecipeError(f"--use-cached-model: there is no package {key} in {root}. Run once without this flag "
                              "and with the same other arguments to export it. `python -m utils.aoti list` shows all "
                              "packages.")
        else:
            if not source:
                say(f"exporting {', '.join(unit.name for unit in units)}; later starts load them")
            make = fetch(source, key) if source else functools.partial(export, units, key=key, say=say)
            publish(root, fields, make)
            size = sum(path.stat().st_size for path in folder.iterdir())
            done = f"{'fetched' if source else 'exported'} {key}, {size / 1e6:.1f} MB"
        put_in_place(pipeline, load(units, folder, key))
    return done


@torch.no_grad()
def export(units: list[Unit], folder: Path, key: str, say: Callable[[str], None] = lambda line: None) -> None:
    """Writes each unit's NAME.pt2 into `folder` and compares it with eager on the unit's first and last modules.

    The last module proves that the code holds no weight of the first. `say` prints a line after each unit, because
    the export may take a minute.

    Raises:
        RecipeError: a package differs from eager by more than rounding.
    """
    for unit in units:
        start, path = time.perf_counter(), folder / f"{unit.name}.pt2"
        write_package(unit.modules[0], unit.arguments, path, unit.settings,
                      {"flux_faster_key": key, "flux_faster_unit": unit.name})
        for module in {id(m): m for m in (unit.modules[0], unit.modules[-1])}.values():
            eager, output = module(**unit.arguments), load_code(unit, module, path, key)(**unit.arguments)
            error = _error(output, eager)
            if not (error < _bound_of(module, _tensors(eager)[0].dtype)
                    or _is_as_near_to_float32(unit, module, output, eager)):
                raise RecipeError(f"the package of {unit.name} differs from eager by {error:.1e}, more than rounding. "
                                  "Please report this, and use --compile_export_mode compile.")
        say(f"exported {unit.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1e6:.1f} MB")


def _tensors(output) -> list[torch.Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]


def _bound_of(module: torch.nn.Module, dtype: torch.dtype) -> float:
    """The bound of a module's relative difference from eager.

    Quantized modules get the larger bound in any dtype, because 8-bit rounding may go either way. An int8 module in
    float32 differed by 1.2e-4.
    """
    quantized = any(x.dtype.itemsize == 1 for x in constants_of(module).values())
    return BOUND if quantized or dtype != torch.float32 else FLOAT32_BOUND


def _is_as_near_to_float32(unit: Unit, module: torch.nn.Module, output, eager) -> bool:
    if unit.name not in ("decoder", "encoder"):
        return False
    arguments = tree_map_only(torch.Tensor, torch.Tensor.float, unit.arguments)
    exact = copy.deepcopy(module).float()(**arguments)
    return _error(output, exact) < VAE_RATIO * _error(eager, exact)


def _error(output, reference) -> float:
    """The largest ||output - reference|| / ||reference|| over the tensors of two outputs."""
    return max(((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
               for a, b in zip(_tensors(output), _tensors(reference), strict=True))


class PackagedModule(torch.nn.Module):
    """Replaces `module` and runs a package's code on its weights.

    The code does not check its inputs and computes garbage from wrong inputs. So `forward` compares each call with the
    arguments that the package was made for. Inside a CUDA graph this check costs nothing.
    """

    takes_other_inputs = False  # True within `other_inputs_run_uncompiled`

    def __init__(self, module: torch.nn.Module, unit: Unit, code: Callable):
        super().__init__()
        self.module = module  # as a submodule: diffusers asks a model's parameters for its device and dtype
        signature, name, expected = inspect.signature(module.forward), unit.name, describe(unit.arguments)

        @functools.wraps(module.forward)
        def forward(*args, **kwargs):
            arguments = _bound(signature, args, kwargs)
            if (actual := describe(arguments)) != expected:
                if self.takes_other_inputs:
                    return module(*args, **kwargs)
                wrong = next(path for path in sorted(actual | expected) if actual.get(path) != expected.get(path))
                raise RecipeError(
                    f"the package of {name} was made for other inputs: {wrong} is {actual.get(wrong, 'missing')}, not "
                    f"{expected.get(wrong, 'given')}. Start again with the new size, or with --compile_export_mode "
                    "compile.")
            return code(**tree_map_only(torch.Tensor, canonical, arguments))

        self._forward = forward

    @property
    def forward(self) -> Callable:
        """The module's own signature, which cache-dit inspects, in front of the package's code."""
        return self._forward


@contextmanager
def other_inputs_run_uncompiled():
    """Within this context, a `PackagedModule` runs its module uncompiled on inputs that the package is not made for.

    Elsewhere it raises an error, because a benchmark or a script would be slow without notice.
    """
    PackagedModule.takes_other_inputs = True
    try:
        yield
    finally:
        PackagedModule.takes_other_inputs = False


def load(units: list[Unit], folder: Path, key: str) -> dict[torch.nn.Module, PackagedModule]:
    """Loads the packages in `folder` for all modules of the units. It changes no module.

    Returns:
        {module: its replacement}.

    Raises:
        RecipeError: a package is made for another key or unit, or cannot be opened.
    """
    return {module: PackagedModule(module, unit, load_code(unit, module, folder / f"{unit.name}.pt2", key))
            for unit in units for module in unit.modules}


def put_in_place(pipeline, stand_ins: dict[torch.nn.Module, PackagedModule]) -> None:
    """Replaces the transformer's, the VAE's and T5's modules by the modules of `stand_ins`."""
    for model in (pipeline.transformer, pipeline.vae, pipeline.text_encoder_2):
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if child in stand_ins:
                    setattr(parent, name, stand_ins[child])


def load_code(unit: Unit, module: torch.nn.Module, path: Path, key: str) -> Callable:
    """Loads a package's code with `module`'s weights. The code would crash without weights.

    Returns:
        A function that takes the unit's arguments by name.

    Raises:
        RecipeError: see `load`.
    """
    try:  # reading the metadata loads no code
        made_for = torch._C._aoti.AOTIModelPackageLoader.load_metadata_from_package(str(path), "model")
        if (made_for.get("flux_faster_key"), made_for.get("flux_faster_unit")) != (key, unit.name):
            raise unusable(key, f"{path.name} was made for {made_for.get('flux_faster_unit')} of "
                                f"{made_for.get('flux_faster_key')}")
        runner = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
    except RuntimeError as error:
        raise unusable(key, f"{path.name} cannot be opened ({str(error).splitlines()[0]})") from error
    weights = constants_of(module)
    if missing := [name for name in runner.get_constant_fqns() if name not in weights]:
        raise unusable(key, f"{path.name} asks for weights that {unit.name} lacks: {', '.join(missing[:3])}")
    # `detach` makes new tensors on the same memory. PyTorch 2.11 and 2.13 never release the tensors passed to
    # load_constants, which would keep a pipeline's weights alive. `_empty` empties the new tensors with the code.
    weights = {name: weights[name].detach() for name in runner.get_constant_fqns()}
    runner.load_constants(weights, check_full_update=True, user_managed=True)
    weakref.finalize(runner, _empty, list(weights.values()), torch.empty(0)).atexit = False
    return runner


def _empty(tensors: list[torch.Tensor], nothing: torch.Tensor) -> None:
    # Assignment calls no operator. Garbage collection may run during tracing, which refuses operators on real tensors.
    for x in tensors:
        x.data = nothing


def constants_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The module's tensors by the names that torch.export gives them. A quantized weight appears as its parts."""
    constants = {}
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if isinstance(value.data, TorchAOBaseTensor):
            parent, _, leaf = name.rpartition(".")
            parts, _ = value.data.__tensor_flatten__()
            constants |= {f"{parent}.parametrizations.{leaf}.original{i}": getattr(value.data, part)
                          for i, part in enumerate(parts)}
        else:
            constants[name] = value.data
    return constants
