"""What a command line asks of a FLUX.1 model: which pipeline class of diffusers draws it, and from which pictures.

Every task has the same transformer, VAE and text encoders, so the pipeline of a task is made from the components of the
loaded one. A run has one task; utils/checkpoint.py says which tasks a model serves.
"""

from argparse import Namespace
from dataclasses import dataclass

from diffusers import (
    FluxControlPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)
from torch import Tensor

from utils.common import RecipeError
from utils.reference_image import encoded_size, original_size, sized_like

PICTURES = ("image", "mask_image", "control_image")  # the flags that name a picture, and diffusers' names of them


@dataclass(frozen=True)
class Task:
    """A pipeline class of diffusers and its inputs beside the prompt."""
    name: str
    pipeline: type
    pictures: tuple[str, ...] = ()  # of `PICTURES`: all that the class takes, and all that it needs
    strength: float | None = None  # diffusers' default; None where every step is computed
    takes_negative_prompt: bool = True
    # Whether the VAE's encoder draws from the generators of the images: each image is then encoded with its own, so
    # that a batch does not change it.
    draws_latents: bool = False

    @property
    def redraws(self) -> str | None:
        """The picture that has the output's size. Kontext's reference may have another size."""
        return self.pictures[0] if self.pictures and self is not EDITING else None


FROM_TEXT = Task("text to image", FluxPipeline)
FROM_IMAGE = Task("image to image", FluxImg2ImgPipeline, ("image",), 0.6, draws_latents=True)
INPAINTING = Task("inpainting", FluxInpaintPipeline, ("image", "mask_image"), 0.6, draws_latents=True)
EDITING = Task("editing", FluxKontextPipeline, ("image",))
EDITING_A_PART = Task("editing a part", FluxKontextInpaintPipeline, ("image", "mask_image"), 1.0)
FILLING = Task("filling", FluxFillPipeline, ("image", "mask_image"), 1.0, takes_negative_prompt=False,
               draws_latents=True)
CONTROL = Task("control", FluxControlPipeline, ("control_image",), takes_negative_prompt=False)
TASKS = (FROM_TEXT, FROM_IMAGE, INPAINTING, EDITING, EDITING_A_PART, FILLING, CONTROL)

# {class that a model_index.json may name: its task}
BY_CLASS = {task.pipeline.__name__: task for task in TASKS}
# {task of a checkpoint's class: number of the transformer's input channels, where it is not 64}. Fill appends the
# masked picture's 64 channels and the mask's 256, Depth and Canny the control picture's 64.
INPUT_CHANNELS = {FILLING: 384, CONTROL: 128}


def choose(tasks: tuple[Task, ...], args: Namespace) -> Task:
    """The task of `tasks` that takes exactly the pictures of `args`; without one, the first, which `check` refuses."""
    given = {name for name in PICTURES if getattr(args, name)}
    return next((task for task in tasks if set(task.pictures) == given), tasks[0])


def check(task: Task, tasks: tuple[Task, ...], args: Namespace) -> None:
    """Refuses flags that the task, from `choose`, does not take.

    Raises:
        RecipeError: a picture is missing or too many, or --strength or --negative_prompt has no effect.
    """
    given = [f"--{name}" for name in PICTURES if getattr(args, name)]
    if {f"--{name}" for name in task.pictures} != set(given):
        choices = " or ".join(" and ".join(f"--{name} PATH_OR_URL" for name in one.pictures) or "no picture"
                              for one in tasks)
        hint = ("" if any("control_image" in one.pictures for one in tasks) or "--control_image" not in given else
                " --control_image is for black-forest-labs/FLUX.1-Depth-dev and FLUX.1-Canny-dev.")
        raise RecipeError(f"{args.ckpt} takes {choices}, and the command gives {' and '.join(given) or 'none'}.{hint}")
    if args.strength is not None and task.strength is None:
        instead = " Add --image." if task is FROM_TEXT else ""
        raise RecipeError(f"--strength {args.strength} has no effect on {task.name}, where every step is computed: "
                          f"drop it.{instead}")
    if args.true_cfg_scale > 1 and not task.takes_negative_prompt:
        raise RecipeError(f"--true_cfg_scale {args.true_cfg_scale}: diffusers' {task.pipeline.__name__} takes no "
                          "negative prompt. Drop it and --negative_prompt; --guidance_scale stays.")


def check_same(task: Task, running: Task) -> None:
    """Refuses a line's task unless it is the run's, whose pipeline is loaded, compiled and recorded.

    Raises:
        RecipeError: the tasks differ.
    """
    if task is not running:
        raise RecipeError(f"it is {task.name} by its pictures, and this run is {running.name}: draw it with a command "
                          "of its own")


def output_size(task: Task, args: Namespace, side: int) -> tuple[int, int]:
    """The (width, height) of an image: the flags; without them the shape of the picture that is redrawn.

    diffusers would squeeze any picture into a square. Kontext has its own sizes at a megapixel.

    Args:
        side: of the square that the model was trained for, in pixels.
    """
    width, height, path = args.width, args.height, getattr(args, task.redraws or "", None)
    if not path or (width and height):
        return width or side, height or side
    size = original_size(path, f"--{task.redraws}")
    if width or height:
        return sized_like(size, width, height)
    return encoded_size(size, side * side, of_kontext=task is EDITING_A_PART)


def as_task(pipeline, task: Task):
    """The pipeline of `task`, with the components of `pipeline`; `pipeline` itself if it is of its class."""
    if isinstance(pipeline, task.pipeline):
        return pipeline
    made = task.pipeline(**{name: part for name, part in pipeline.components.items() if part is not None})
    for name in ("plan", "contents", "_progress_bar_config"):
        if hasattr(pipeline, name):
            setattr(made, name, getattr(pipeline, name))
    return made


def current_index(scheduler) -> int:
    """The index in `scheduler.timesteps` of the step that is computed now. The numbers are on the CPU."""
    return _first_index(scheduler) if scheduler.step_index is None else scheduler.step_index


def current_step(scheduler) -> int:
    """The number of steps of this image before the one that is computed now. `strength` skips the schedule's first."""
    return current_index(scheduler) - _first_index(scheduler)


def _first_index(scheduler) -> int:
    return getattr(scheduler, "begin_index", None) or 0


def current_timestep(pipeline) -> Tensor | None:
    """The timestep of the denoising step that is computed now, a view into `scheduler.timesteps`; None outside.

    FluxPipeline and Kontext's pipelines keep it, and the others' is found by the scheduler's counter. The counter is
    past the schedule after the last step.
    """
    kept = getattr(pipeline, "_current_timestep", None)
    if kept is not None or hasattr(type(pipeline), "current_timestep"):
        return kept
    scheduler = pipeline.scheduler
    index = current_index(scheduler)
    # `num_inference_steps` is absent until `set_timesteps` begins the first image.
    begun = getattr(scheduler, "num_inference_steps", None) is not None and index < len(scheduler.timesteps)
    return scheduler.timesteps[index] if begun else None
