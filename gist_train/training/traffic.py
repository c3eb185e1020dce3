"""What ranks send each other in a step: the bytes of each collective, and how long the sum of gradients took.

Legend: D width of an embedding, r ranks.
"""

from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Traffic:
    """Of a run; of one process there is none.

    Args:
        model: as accelerate prepared it.
        width: D.
    """

    def __init__(self, model: nn.Module, width: int):
        self._model = model if isinstance(model, DistributedDataParallel) else None
        trained = [p for p in model.parameters() if p.requires_grad]
        self._gradient_bytes = sum(p.numel() * p.element_size() for p in trained)
        # Embeddings and their gradients have 32 bits at least, whatever the layers run in.
        self._embedding_bytes = width * max(p.element_size() for p in trained)

    def row(self, gathered: Sequence[int], communication_seconds: float, step_seconds: float) -> dict[str, float]:
        """Columns of a row of metrics, of a step.

        Args:
            gathered: (r,) embeddings of each rank: they are padded to the most of them on the way, their gradients are not.
            communication_seconds: besides the gradients'.
        """
        if self._model is None:
            return {}
        # Nothing public tells how long the sum of gradients took, and how much of that the backward pass hid.
        times = self._model._get_ddp_logging_data()  # type: ignore[no-untyped-call]
        took, hidden = (times.get(f"avg_backward_{part}_time", 0) / 1e9 for part in ("comm", "compute_comm_overlap"))
        return {
            "embedding_bytes": (max(gathered) * len(gathered) + sum(gathered)) * self._embedding_bytes,
            "gradient_bytes": self._gradient_bytes,
            "gradient_seconds": took,
            "communication_share": (communication_seconds + max(0.0, took - hidden)) / step_seconds,
        }
