"""How much a kernel's result may lose when it is stored."""

import torch


def rounding_of(dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error of one conversion from float32."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        return 2**-7  # Triton's interpreter cuts off, where a GPU rounds
    return {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
