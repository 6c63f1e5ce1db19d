"""Reads the variables of torchrun and `accelerate launch`: how many processes there are, and which GPU is whose."""

import os

from utils.common import RecipeError

# torchrun and `accelerate launch` set all of these variables.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# mpirun and srun set these variables in each process that they start. SLURM_NTASKS is not among them, because a Slurm
# allocation sets it even for a single process.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def world_size() -> int:
    """The number of processes that torchrun or accelerate has started.

    Raises:
        RecipeError: a launcher's variables are incomplete or invalid, or another kind of launcher started the process.
    """
    variables = {name: os.environ.get(name, "").strip() for name in LAUNCHER}
    size = _number("WORLD_SIZE", variables["WORLD_SIZE"] or "1", 1)
    missing = [name for name, value in variables.items() if not value]
    if size > 1 and missing:
        raise RecipeError(f"WORLD_SIZE={size}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
                          "set, so no launcher has started this process. Run a single process with "
                          "`env -u WORLD_SIZE`, or start several with torchrun or accelerate launch.")
    if not missing:
        for name, least, end in (("RANK", 0, size), ("LOCAL_RANK", 0, size), ("MASTER_PORT", 0, 2**16)):
            _number(name, variables[name], least, end)
        return size
    for name in MPI_SIZES:
        value = os.environ.get(name, "").strip()
        if value.isdecimal() and int(value) > 1:
            raise RecipeError(f"{name}={value}: mpirun or srun has started this process, and all {value} processes "
                              "would do the same work. Start them with torchrun or accelerate launch, or run a single "
                              f"process with `env -u {name}`.")
    return 1


def _number(name: str, text: str, least: int, end: int | None = None) -> int:
    if not text.isdecimal() or int(text) < least or (end is not None and int(text) >= end):
        limits = f"from {least} to {end - 1}" if end is not None else f"of at least {least}"
        raise RecipeError(f"{name}={text} is not a number {limits}, as torchrun sets it. If no launcher has started "
                          f"this process, run it with `env -u WORLD_SIZE -u {name}`.")
    return int(text)


def own_gpu() -> int:
    """The index of this process's GPU, when a launcher has started several processes on this host.

    Raises:
        RecipeError: this host has fewer GPUs than processes.
    """
    import torch

    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise RecipeError(f"torchrun started {os.environ.get('LOCAL_WORLD_SIZE', world_size())} processes on this "
                          f"host, but PyTorch sees {torch.cuda.device_count()} GPUs. Start one process per GPU.")
    return local


def forget_launchers() -> None:
    """Deletes the launchers' variables of a single process, from which accelerate would infer several processes."""
    prefixes = ("PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MPI_LOCAL")
    for name in [name for name in os.environ if name in (*LAUNCHER, "LOCAL_WORLD_SIZE") or name.startswith(prefixes)]:
        del os.environ[name]
