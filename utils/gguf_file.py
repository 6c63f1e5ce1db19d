"""Reads a transformer's GGUF file: names and shapes first, then one dequantized tensor at a time.

The gguf package reads the format, and diffusers' code dequantizes. The package is not among the requirements.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

from utils.common import RecipeError
from utils.safetensors_header import Tensor

# The types that diffusers dequantizes, and plain numbers.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K",
         "IQ4_NL", "IQ4_XS")


def is_gguf(path: Path) -> bool:
    """Whether the file begins as a GGUF file, whatever its name."""
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def read_header(here: str, path: Path) -> dict[str, Tensor]:
    """Reads names, types and shapes, the shapes in PyTorch's order.

    Args:
        here: the flag and its value, for errors.

    Raises:
        RecipeError: the gguf package is not installed, the file is damaged, or it is of another model.
    """
    if find_spec("gguf") is None:
        raise RecipeError(f"{here} is a GGUF file, and the package that reads it is not installed. Run `pip install "
                          "gguf`, or give the model in bf16 or float8 as .safetensors.")
    reader = _open(here, path)
    field = reader.get_field("general.architecture")
    model = field.contents() if field else "flux"
    if model != "flux":
        raise RecipeError(f"{here} is a GGUF file of the model {model}, and FLUX.1's are named flux. Give a FLUX.1 "
                          "transformer.")
    header = {one.name: Tensor(one.tensor_type.name, _shape(one)) for one in reader.tensors}
    if len(header) < len(reader.tensors):
        raise RecipeError(f"{here} is damaged: a name occurs twice. Download the file again.")
    return header


def _open(here: str, path: Path):
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # of numpy and struct: it has no checks of its own
        raise RecipeError(f"{here} is truncated or damaged: the gguf package cannot read it. Download the file "
                          "again.") from error


def _shape(tensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


class Reader:
    """Reads tensors of a GGUF file; a context manager like safetensors' `safe_open`.

    Args:
        device: on which tensors are dequantized.
    """

    def __init__(self, path: Path, device: str | torch.device):
        self.device = device
        self.tensors = {one.name: one for one in _open(f"--transformer {path}", path).tensors}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.tensors = {}

    def get_tensor(self, name: str) -> torch.Tensor:
        """Returns a tensor in float32 or float16, on the device."""
        from diffusers.quantizers.gguf.utils import GGML_QUANT_SIZES, dequantize_functions

        tensor = self.tensors[name]
        values = torch.from_numpy(tensor.data.copy()).to(self.device)
        if tensor.tensor_type in dequantize_functions:
            block_size, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
            blocks = values.view(torch.uint8).reshape(-1, block_bytes)
            values = dequantize_functions[tensor.tensor_type](blocks, block_size, block_bytes, torch.float32)
        return values.reshape(_shape(tensor))
