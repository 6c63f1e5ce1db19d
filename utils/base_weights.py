"""The weights under the LoRAs, for the parts of the model that LoRAs change. A merge that rounds cannot be undone, so a
swap of LoRAs (utils/lora_swap.py) merges the new ones into these."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from utils.common import RecipeError
from utils.machine import available_memory


class Part(NamedTuple):
    """What a swap writes as a whole: a block of the transformer with its norms, or a module outside of the blocks."""
    component: str  # "transformer", "text_encoder" or "text_encoder_2"
    module: str  # such as "transformer_blocks.0" or "x_embedder"

    @property
    def is_block(self) -> bool:
        """Whether it is a block of the transformer."""
        return self.component == "transformer" and "transformer_blocks." in self.module


class BaseWeights:
    """Copies of parameters as they are without any LoRA.

    Args:
        shapes: the shape of each parameter, from `utils.checkpoint.model_shapes`.
        source: returns a function (component, names) -> {name: tensor} that reads parameters which were not kept.
        dtype: that of the model's parameters, where `dtypes` names no other.
        device: where merges compute.
        room: how many bytes of `device` the copies may take. The others wait in pinned CPU memory.
    """

    def __init__(self, shapes: dict[str, dict[str, tuple]], source: Callable[[], Callable], dtype: torch.dtype,
                 device: torch.device, room: float):
        self.shapes, self.source, self.dtype, self.device, self.room = shapes, source, dtype, device, room
        self.dtypes: dict[tuple[str, str], torch.dtype] = {}
        self.parts: dict[Part, dict[str, Tensor]] = {}

    def names_of(self, part: Part) -> list[str]:
        """The names of a part's parameters in its component."""
        return [name for name in self.shapes[part.component] if name.startswith(f"{part.module}.")]

    def keep(self, part: Part, parameters: dict[str, Tensor]) -> None:
        """Copies a part from its component's parameters, before any LoRA is merged into them."""
        self.parts[part] = {name: self.place(parameters[name].detach()) for name in self.names_of(part)}

    def fetch(self, parts) -> list[Part]:
        """Reads the parts that are not kept yet from the source. Returns them.

        Raises:
            RecipeError: a file cannot be read, or as `check_memory`.
        """
        absent = [part for part in parts if part not in self.parts]
        self.check_memory(absent)
        read = self.source() if absent else None
        for part in absent:
            self.keep(part, {name: tensor.to(self.dtypes.get((part.component, name), self.dtype))
                             for name, tensor in read(part.component, self.names_of(part)).items()})
        return absent

    def check_memory(self, parts) -> None:
        """Refuses copies that CPU memory cannot hold: the system would kill this process.

        Raises:
            RecipeError: they do not fit.
        """
        size = sum(math.prod(self.shapes[part.component][name]) for part in parts for name in self.names_of(part))
        on_cpu, available = size * self.dtype.itemsize - max(0, self.room), available_memory()
        if on_cpu > available:
            raise RecipeError(f"not enough CPU memory to swap LoRAs: the weights under them take {on_cpu / 1e9:.1f} "
                              f"GB, and {available / 1e9:.1f} GB are available. Start a process for each set of LoRAs "
                              "with --lora instead.")

    def copies(self, part: Part) -> dict[str, Tensor]:
        """New copies of a part's parameters by name, on `device`. The CPU does not wait for them."""
        return {name: tensor.to(self.device, non_blocking=True, copy=True) for name, tensor in self.parts[part].items()}

    def place(self, tensor: Tensor) -> Tensor:
        """A copy where it waits until it is needed: on `device` if there is room, else in pinned CPU memory."""
        if self.device.type == "cpu":
            return tensor.to(self.device, copy=True)
        if tensor.nbytes <= self.room:
            self.room -= tensor.nbytes
            return tensor.to(self.device, copy=True)
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)

    def release(self, tensors: list[Tensor]) -> None:
        """Gives back the room of copies from `place` that the caller drops."""
        self.room += sum(tensor.nbytes for tensor in tensors if tensor.device.type != "cpu")

    def line(self) -> str:
        """How many parts are kept, and where."""
        tensors = [tensor for part in self.parts.values() for tensor in part.values()]
        on_gpu, on_cpu = (sum(tensor.nbytes for tensor in tensors if (tensor.device.type == "cpu") == cpu) / 1e9
                          for cpu in (False, True))
        places = [f"{size:.1f} GB in {where} memory" for size, where in ((on_gpu, "GPU"), (on_cpu, "CPU")) if size]
        return f"weights under the LoRAs: {described(self.parts)}, {' and '.join(places)}"


def described(parts) -> str:
    """How many blocks and other modules there are, for people."""
    blocks = sum(part.is_block for part in parts)
    others = len(parts) - blocks
    counts = ((blocks, "block"), (others, "other module" if blocks else "module"))
    return " and ".join(f"{count} {what}{'s' * (count != 1)}" for count, what in counts if count) or "0 blocks"
