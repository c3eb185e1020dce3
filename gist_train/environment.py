"""What torch and its libraries read from the environment before they begin, set where the user says nothing."""

import os
import sys

ALLOCATOR = "PYTORCH_ALLOC_CONF"
KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
FEW_KERNELS, KERNELS_OF_BF16 = 4, 32
"""What a layer uses: GELU and its gradient in float32; under bf16 every product, and with fewer kept a step took 9 % longer."""


def let_segments_expand() -> None:
    """Has torch map GPU memory to where it is asked for: batches differ in tokens, and blocks of fixed places would leave holes.

    ALLOCATOR is read by all versions that we take; the other names are older, and the user's word under any is final.
    """
    names = (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ[ALLOCATOR] = "expandable_segments:True"


def launched_together() -> bool:
    """Whether this is one of several processes of a launch."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


def keep_kernels(precision: str = "float32") -> None:
    """Has oneDNN keep the last kernels that it made, as many as a layer uses, and not 1,024, where the user says nothing.

    Each is for one size, and batches have ever new ones: the others are never used again. But each is a small piece of memory
    that stays, between the large ones that a step takes and gives back: these come to lie ever further apart, and a process on a
    CPU grows for hours. oneDNN asks when it makes the first one.
    """
    if not any(name in os.environ for name in (KERNELS, "DNNL_PRIMITIVE_CACHE_CAPACITY")):
        os.environ[KERNELS] = str(KERNELS_OF_BF16 if precision == "bf16" else FEW_KERNELS)
