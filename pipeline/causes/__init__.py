"""Every known cause of failure, by area; where two explain a line equally well, the earlier one is meant."""

from pipeline.causes import (
    architectures,
    arguments,
    data,
    gguf,
    gpu,
    hub,
    install,
    kernels,
    memory,
    script,
    server,
    training,
    weights,
)
from pipeline.causes.cause import Cause, Pattern, Weight, fill

CAUSES_BY_AREA: dict[str, tuple[Cause, ...]] = {
    "Memory and disk": memory.CAUSES,
    "Arguments": arguments.CAUSES,
    "Training": training.CAUSES,
    "Attention and kernels": kernels.CAUSES,
    "GPUs and processes": gpu.CAUSES,
    "GGUF": gguf.CAUSES,
    "Model files": weights.CAUSES,
    "Data": data.CAUSES,
    "Models and tokenizers": architectures.CAUSES,
    "Packages": install.CAUSES,
    "Script": script.CAUSES,
    "The Hub and the network": hub.CAUSES,
}
LOG_CAUSES: tuple[Cause, ...] = tuple(cause for causes in CAUSES_BY_AREA.values() for cause in causes)
SERVER_CAUSES = server.CAUSES

__all__ = ["CAUSES_BY_AREA", "LOG_CAUSES", "SERVER_CAUSES", "Cause", "Pattern", "Weight", "fill"]
