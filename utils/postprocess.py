"""The pipeline's image processors: 8-bit pixels computed on the GPU or the CPU, and a look for NaN."""

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor


class CheckedImageProcessor(VaeImageProcessor):
    """diffusers' image processor, which also records whether the images are finite. 8-bit pixels do not show NaN."""

    device = torch.device("cpu")  # of the preprocessed reference image
    # (B,) bool: which images of the last call are finite, on the images' device. To read it is to wait for the GPU.
    finite: torch.Tensor | None = None

    def postprocess(self, image: torch.Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None):
        """Converts image (B, 3, H, W), in [-1, 1], to PIL images or `output_type`. NaN becomes black."""
        if output_type == "pil":
            self.note_finite(image)
            image = image.nan_to_num(nan=-1.0)  # NumPy would warn of NaN
        return super().postprocess(image, output_type, do_denormalize)

    def note_finite(self, image: torch.Tensor) -> None:
        """Sets `finite` (B,) from image (B, ...)."""
        self.finite = image.isfinite().all(dim=tuple(range(1, image.ndim)))


class GPUImageProcessor(CheckedImageProcessor):
    """diffusers' image processor, which copies pixels between CPU and GPU as 8 bits.

    diffusers copies float32 pixels and rounds them with NumPy. At 1024x1024 that takes 23.2 ms, and 2.8 ms with this
    class (H100, results/h100/2026-11/schnell). diffusers also converts Kontext's reference to float32 with NumPy before
    it copies it, while the GPU waits. The results are bit-identical.
    """

    def preprocess(self, image, height: int | None = None, width: int | None = None, **options) -> torch.Tensor:
        """Converts RGB PIL images of size (width, height) to (B, 3, height, width) float32 in [-1, 1], on `device`.

        The images have that size already. diffusers processes all other inputs, such as masks.
        """
        images = image if isinstance(image, list) else [image]
        as_they_are = all(isinstance(one, PIL.Image.Image) and one.mode == "RGB" and one.size == (width, height)
                          for one in images)
        if not as_they_are or not self.config.do_normalize or options.get("crops_coords") or (
                options.get("resize_mode", "default") != "default"):
            return super().preprocess(image, height, width, **options).to(self.device)
        pixels = torch.from_numpy(np.stack([np.array(one) for one in images])).to(self.device)
        # The divisor is a tensor, because torch on CUDA replaces a division by a Python number with a multiplication by
        # the rounded 1 / 255.
        whole = torch.full((), 255.0, device=self.device)
        return self.normalize(pixels.permute(0, 3, 1, 2).float() / whole)

    def postprocess(self, image: torch.Tensor, output_type: str = "pil", do_denormalize: list[bool] | None = None):
        """Converts image (B, 3, H, W), in [-1, 1], to PIL images. diffusers makes every output type but "pil"."""
        if output_type != "pil":
            return super().postprocess(image, output_type, do_denormalize)
        self.note_finite(image)
        image = self._denormalize_conditionally(image, do_denormalize)
        pixels = (image.float() * 255).round().to(torch.uint8)
        return self.numpy_to_pil(pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[PIL.Image.Image]:
        """Converts images (B, H, W, 3), uint8 or floats in [0, 1], to PIL images."""
        if images.dtype != np.uint8:
            return VaeImageProcessor.numpy_to_pil(images)
        return [PIL.Image.fromarray(image) for image in images]
