"""Which device a worker computes on, checked before anything is loaded."""

import torch

from pdengine.engine.worker_config import StartupError

OLDEST_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16 and with asynchronous copies to shared memory


def open_device(name: str) -> torch.device:
    """The device that `cpu`, `cuda` or `cuda:N` stands for; `cuda` is the first GPU.

    A GPU becomes torch's current one, on this thread and on those that are told nothing else. Raises
    StartupError if torch cannot use it, there is none of this number, or it is older than compute capability
    8.0.
    """
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if torch.version.cuda is None:
        raise StartupError(
            f"device {name}: torch {torch.__version__} is built without CUDA; install a build for it"
        )
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= num_devices:
        found = f"{num_devices} GPUs" if num_devices else "no GPU, or its driver is older than torch needs"
        raise StartupError(f"device {name}: torch sees {found}; nvidia-smi shows what is there")
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        raise StartupError(
            f"device {name}: {torch.cuda.get_device_name(index)} has compute capability "
            f"{capability[0]}.{capability[1]}; the oldest that is supported is 8.0"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
