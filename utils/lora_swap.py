"""Swaps LoRAs in a running process, for lines of a prompts file and for typed prompts.

The parts of the model that the old or the new LoRAs change (`utils.base_weights.Part`) are made anew, as a start with
the new LoRAs makes them: the weights without any LoRA, the merges, the fused projections, the quantization. The values
are then copied into the tensors that are there. So CUDA graphs, packages and compiled code stay valid, a step costs
nothing more, and every bit is that of a process that started with these LoRAs.

A part is a whole block, because a fused block's scales and shares depend on all of its Linears, and its modulation
includes them.
"""

import argparse
import copy
import re
import time
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace

import torch
from safetensors import safe_open
from torchao.utils import TorchAOBaseTensor

from utils.base_weights import BaseWeights, Part, described
from utils.benchmark_utils import offloads_transformer
from utils.checkpoint import meta_models
from utils.common import RecipeError, reading
from utils.lora import (
    CURE,
    Change,
    Lora,
    factors_of,
    merged,
    not_finite,
    overflow,
    read_lora,
    read_loras,
    refuse_first,
    write_rows,
)
from utils.lora_files import split
from utils.quantization import Int8Linear, quantize_transformer

MOST = 16  # LoRAs whose tensors stay in memory; the least recently used ones are read again


def part_of(change: Change) -> Part:
    """The part that a change belongs to. No trainer stacks rows of several blocks."""
    module = change.rows[0].module
    block = re.match(r"(single_)?transformer_blocks\.\d+(?=\.)", module) if change.component == "transformer" else None
    return Part(change.component, block[0] if block else module)


def embeds_time_and_text(part: Part) -> bool:
    """Whether the part belongs to diffusers' time_text_embed."""
    return part.component == "transformer" and part.module.startswith("time_text_embed.")


def check_swap(args: argparse.Namespace, loras: Iterable[Lora]) -> None:
    """Refuses swaps of weights that move between CPU and GPU, whose live tensors are not there to be written.

    Raises:
        RecipeError: --offload moves weights that a LoRA changes.
    """
    encoder = next((lora.name for lora in loras for change in lora.changes if change.component == "text_encoder_2"), "")
    if offloads_transformer(args) or (args.offload == "text" and encoder):
        what = "the weights" if offloads_transformer(args) else f"T5's weights, which {encoder} changes,"
        raise RecipeError(f"LoRAs cannot be swapped with --offload {args.offload}, which moves {what} between CPU and "
                          "GPU. Drop it, or start a process for each set of LoRAs with --lora.")


def check_loras(args: argparse.Namespace, specs: Iterable[str], shapes: dict[str, dict[str, tuple]]) -> None:
    """Checks from headers and flags, before any weights load, that a process can swap to the LoRAs of a line.

    Args:
        args: the command line, with its own --lora.
        specs: PATH[:SCALE] of each of the line's LoRAs.
        shapes: from `utils.checkpoint.model_shapes`.

    Raises:
        RecipeError: as `read_lora` and `check_swap`.
    """
    check_swap(args, [read_lora(spec, shapes, args.lora_partial) for spec in (*specs, *(args.lora or ()))])


def use_loras(pipeline, args: argparse.Namespace, embeddings: dict) -> None:
    """Makes the LoRAs of `args` those of an optimized pipeline. See `LoraSwap.use`."""
    if swap := getattr(pipeline, "lora_swap", None):
        swap.use(args.lora, embeddings)


class LoraSwap:
    """The LoRAs of a pipeline, and everything that a swap needs. `load_pipeline` makes it, `optimize` attaches it.

    Attributes:
        start: --lora of the command line.
        current: the LoRAs in the weights now; None if a swap was interrupted.
        changed: the parts that may differ from the base.
    """

    def __init__(self, args: argparse.Namespace, plan, configs: dict, loras: list[Lora], base: BaseWeights):
        self.args, self.plan, self.base, self.shapes = args, plan, base, base.shapes
        self.meta = meta_models(configs)["transformer"]
        self.loras = {lora.name: lora for lora in loras}  # without regard to the scale
        self.factors: dict[str, dict[Part, list[tuple]]] = {}  # {name: {part: [(change, factors, strength)]}}
        self.start = self.current = tuple(args.lora or ())
        self.changed = self.parts_of(self.loras_of(self.start))
        self.pipeline = self.log = None
        self.live: dict[str, dict[str, torch.nn.Module]] = {}

    def loras_of(self, specs: Iterable[str]) -> list[Lora]:
        """The LoRAs of PATH[:SCALE] each. Headers are read once a process.

        Raises:
            RecipeError: as `read_lora`.
        """
        found = []
        for spec in specs:
            name, scale = split(spec)
            if name not in self.loras:
                [self.loras[name]] = read_loras([spec], self.shapes, self.args.lora_partial)
            found.append(replace(self.loras[name], scale=scale))
        return found

    def contents(self, specs: Iterable[str] | None) -> list[list]:
        """What identifies LoRAs in `pipeline.contents`: the digest and the scale of each."""
        return [[self.loras[lora.name].digest(), lora.scale] for lora in self.loras_of(specs or ())]

    def parameters_with(self, parameters: dict, specs: Iterable[str] | None) -> dict:
        """The metadata of an image that is drawn with these LoRAs, from that of the LoRAs that are in the weights."""
        techniques = parameters["techniques"]
        if tuple(specs or ()) != self.start and "fp8 check" in techniques:
            techniques = techniques | {"fp8 check": {"difference": None}}  # it measured the start's LoRAs
        contents = parameters["contents"] | {"lora": self.contents(specs)}
        return parameters | {"techniques": techniques, "contents": contents}

    def parts_of(self, loras: list[Lora]) -> dict[Part, None]:
        """The parts that LoRAs change, as the keys of a dictionary."""
        parts = dict.fromkeys(part_of(change) for lora in loras for change in lora.changes)
        in_int8 = self.plan.fused_kernels.on and self.plan.quantization.dtype == "int8"
        if in_int8 and any(map(embeds_time_and_text, parts)):
            # The typical modulation of each block depends on it.
            parts |= dict.fromkeys(Part("transformer", f"{kind}.{i}") for kind in (
                "transformer_blocks", "single_transformer_blocks") for i in range(len(getattr(self.meta, kind))))
        return parts

    def keep_base(self, pipeline, has_transformer: bool) -> None:
        """Copies the weights under the LoRAs that are known by now, before LoRAs are merged into them.

        Args:
            has_transformer: whether the transformer is the checkpoint's; otherwise it is a kept quantized one.

        Raises:
            RecipeError: as `BaseWeights.check_memory`.
        """
        if offloads_transformer(self.args):
            return  # `use` refuses to swap
        components = ["text_encoder", "text_encoder_2"] + ["transformer"] * has_transformer
        parameters = {name: dict(getattr(pipeline, name).named_parameters()) for name in components}
        self.base.dtypes = {(component, name): parameter.dtype for component, found in parameters.items()
                            for name, parameter in found.items()}
        parts = [part for part in self.parts_of(list(self.loras.values())) if part.component in parameters]
        self.base.check_memory(parts)
        for part in parts:
            self.base.keep(part, parameters[part.component])

    def attach(self, pipeline, log) -> None:
        """Remembers the modules as they are once quantized and placed, before others wrap them."""
        self.pipeline, self.log = pipeline, log
        self.live = {component: dict(getattr(pipeline, component).named_modules()) for component in self.shapes}
        if self.base.parts:
            log.line(self.base.line())

    @torch.no_grad()
    def use(self, specs: Iterable[str] | None, embeddings: dict) -> None:
        """Makes these LoRAs the pipeline's, instead of those before.

        Args:
            specs: PATH[:SCALE] of each.
            embeddings: of `with_embeddings`; emptied if a text encoder changes.

        Raises:
            RecipeError: a LoRA cannot be read or merged. The weights are as before.
        """
        wanted, before = tuple(specs or ()), self.current
        if wanted == before:
            return
        start, loras, old = time.perf_counter(), self.loras_of(wanted), self.loras_of(before or ())
        check_swap(self.args, [*loras, *old])
        # int8 blocks depend on the embedding of time and text, so that it comes first.
        parts = sorted(self.changed | self.parts_of(loras), key=lambda part: not embeds_time_and_text(part))
        parts = dict.fromkeys(parts)
        self.read([*loras, *old])  # the old ones too, for the way back
        if self.base.fetch(parts):
            self.log.line(self.base.line())
        if any(part.component != "transformer" for part in parts):
            embeddings.clear()
        self.current, self.changed = None, parts  # until all is written: Ctrl-C may come in between
        try:
            refuse_first(self.write(parts, loras))
        except RecipeError:
            if before is not None:
                self.write(parts, old)
                self.current, self.changed = before, self.parts_of(old)
            raise
        if self.base.device.type == "cuda":
            torch.cuda.synchronize()
        self.current, self.changed = wanted, self.parts_of(loras)
        self.pipeline.contents = self.pipeline.contents | {"lora": self.contents(wanted)}
        unmeasured = self.plan.fp8_check.on and wanted != self.start
        self.log.line(f"LoRA {', '.join(wanted) or 'none'}: {described(parts)} swapped in "
                      f"{time.perf_counter() - start:.2f} s{'; the fp8 check was made without it' * unmeasured}")

    def read(self, loras: list[Lora]) -> None:
        """Reads the tensors of LoRAs that are not in memory yet. If there are many, it drops those used longest ago.

        Raises:
            RecipeError: a file is damaged, or holds NaN or infinity.
        """
        for lora in loras:
            if lora.name in self.factors:
                self.factors[lora.name] = self.factors.pop(lora.name)
                continue
            by_part, flags = {}, []
            with reading(f"--lora {lora.name}", CURE), safe_open(lora.path, framework="pt") as file:
                for change in lora.changes:
                    factors, strength = factors_of(change, file, torch.device("cpu"))
                    factors = {kind: self.base.place(tensor) for kind, tensor in factors.items()}
                    by_part.setdefault(part_of(change), []).append((change, factors, strength))
                    flags += not_finite(lora, change, self.on_device(factors))
                refuse_first(flags)
            self.factors[lora.name] = by_part
        used = {lora.name for lora in loras}
        for name in [name for name in self.factors if name not in used][:max(0, len(self.factors) - MOST)]:
            self.base.release([tensor for changes in self.factors.pop(name).values() for _, factors, _ in changes
                               for tensor in factors.values()])

    def on_device(self, factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A change's tensors where merges compute."""
        return {kind: tensor.to(self.base.device, non_blocking=True) for kind, tensor in factors.items()}

    def write(self, parts: Iterable[Part], loras: list[Lora]) -> list[tuple[str, torch.Tensor]]:
        """Makes parts anew and writes them into the live tensors. On a GPU the CPU does not wait.

        Returns:
            For `refuse_first`: whether each merged weight is finite.
        """
        flags, conditions, blocks = [], None, {}
        for part in parts:
            weights = self.base.copies(part)
            for lora in loras:
                for change, factors, strength in self.factors[lora.name].get(part, ()):
                    for rows, new in merged(change, self.on_device(factors), strength, lora.scale, weights.__getitem__):
                        flags.append(overflow(lora, change, new))
                        write_rows(rows, new)
            weights = {name.removeprefix(f"{part.module}."): tensor for name, tensor in weights.items()}
            if not part.is_block:
                self.write_module(part, weights)
                continue
            block, live = self.block_of(part, weights, blocks), self.live["transformer"][part.module]
            if not self.plan.fused_kernels.on:
                copy_values(self.quantized(block), live)
                continue
            from utils.kernels.fused_blocks import fused_block  # need Triton
            from utils.kernels.modulation import typical_conditions

            modulations = self.live["transformer"]["time_text_embed"]
            if live.int8 and conditions is None:
                conditions = typical_conditions(modulations.embed, self.base.device)
            fused, linears = fused_block(type(live), block, live.offset, self.base.device, conditions)
            copy_values(fused, live)
            for at, linear, factors in linears:
                modulations.put(at, linear, factors)
        if self.plan.fused_kernels.on:
            self.live["transformer"]["time_text_embed"].tables = []  # of an image that was dropped
        return flags

    def block_of(self, part: Part, weights: dict[str, torch.Tensor], blocks: dict[str, torch.nn.Module]
                 ) -> torch.nn.Module:
        """diffusers' block with these weights, and with fused projections if the live one has them.

        Args:
            blocks: the block of each kind, which all parts of the kind use in turn: to make one takes milliseconds.
        """
        kind = part.module.partition(".")[0]
        if kind not in blocks:
            blocks[kind] = copy.deepcopy(self.meta.get_submodule(part.module))
        block = blocks[kind]
        for name, tensor in weights.items():
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))
        if self.plan.fused_projections.on:
            block.attn.fused_projections = False
            block.attn.fuse_projections()
        return block

    def quantized(self, block: torch.nn.Module) -> torch.nn.Module:
        """A block of diffusers as `quantize_transformer` leaves it, if the plan quantizes the transformer."""
        if self.plan.quantization.on:
            quantize_transformer(SimpleNamespace(transformer_blocks=[block]), self.plan.quantization.dtype,
                                 self.plan.quantization.granularity, self.base.device)
        return block

    def write_module(self, part: Part, weights: dict[str, torch.Tensor]) -> None:
        """Writes a module outside of the blocks into the live one, in the form that it has there."""
        live, name = self.live[part.component], part.module
        if part.component == "transformer" and self.plan.fused_kernels.on:
            from utils.kernels.formats import STREAM  # needs Triton

            if name in ("x_embedder", "context_embedder"):
                name, weights = f"{name}.embed", {key: tensor / STREAM for key, tensor in weights.items()}
            elif name == "norm_out.linear":
                name = "time_text_embed.last"
            else:
                name = name.replace("time_text_embed.", "time_text_embed.embed.")
        module = torch.nn.Module()
        if isinstance(live[name], Int8Linear):
            module = Int8Linear(SimpleNamespace(weight=weights["weight"], bias=weights.get("bias")), self.base.device)
        else:
            for key, tensor in weights.items():
                module.register_buffer(key, tensor)
        copy_values(module, live[name])


def copy_values(new: torch.nn.Module, live: torch.nn.Module) -> None:
    """Copies the parameters and buffers of `new` into the tensors that `live` has under the same names."""
    values = dict([*new.named_parameters(), *new.named_buffers()])
    for name, tensor in [*live.named_parameters(), *live.named_buffers()]:
        into, value = tensor.data, values[name].data
        if isinstance(into, TorchAOBaseTensor):
            for part in into.__tensor_flatten__()[0]:
                getattr(into, part).copy_(getattr(value, part))
        else:
            into.copy_(value)
