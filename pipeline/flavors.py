"""Hugging Face Jobs hardware: a dated catalogue, so that plans work offline. Looks nothing up."""

from dataclasses import dataclass

# Names: `JobHardware` of huggingface_hub 2.4.0. Prices and sizes: the Hub's jobs-pricing page of this date.
AS_OF = "2026-08-21"
CONTAINER_START_S = 120  # Image pull and dependency install before a script runs; billed.


@dataclass(frozen=True)
class Flavor:
    """One hardware choice. Memory figures in GiB as the Hub lists them, price in US dollars per hour."""

    name: str
    usd_per_hour: float
    vcpus: int
    ram_gib: int
    disk_gb: int
    gpu: str | None = None
    gpus: int = 0
    vram_gib: float = 0.0
    local: bool = False  # the machine of whoever runs it: never a job

    @property
    def usd_per_minute(self) -> float:
        """Jobs are billed by the minute."""
        return self.usd_per_hour / 60

    @property
    def has_flash(self) -> bool:
        """Flash attention is built for Ampere (A100, A10G) and what came after; a T4 is older."""
        return self.gpu is not None and self.gpu != "T4"


# What a process can allocate on one GPU (the total CUDA reports), GiB: from out-of-memory messages and driver reports.
T4, L4, A10G, L40S, A100, H200, RTX = 14.56, 22.0, 22.06, 44.4, 79.15, 139.7, 95.0
_ALL = (
    Flavor("cpu-basic", 0.01, 2, 16, 50),
    Flavor("cpu-upgrade", 0.03, 8, 32, 50),
    Flavor("cpu-xl", 1.00, 16, 124, 1000),
    Flavor("cpu-performance", 1.90, 32, 256, 1024),
    Flavor("t4-small", 0.40, 4, 15, 50, "T4", 1, T4),
    Flavor("t4-medium", 0.60, 8, 30, 100, "T4", 1, T4),
    Flavor("l4x1", 0.80, 8, 30, 400, "L4", 1, L4),
    Flavor("l4x4", 3.80, 48, 186, 3200, "L4", 4, L4),
    Flavor("a10g-small", 1.00, 4, 15, 110, "A10G", 1, A10G),
    Flavor("a10g-large", 1.50, 12, 46, 200, "A10G", 1, A10G),
    Flavor("a10g-largex2", 3.00, 24, 92, 1000, "A10G", 2, A10G),
    Flavor("a10g-largex4", 5.00, 48, 184, 2000, "A10G", 4, A10G),
    Flavor("l40sx1", 1.80, 8, 62, 380, "L40S", 1, L40S),
    Flavor("l40sx4", 8.30, 48, 382, 3200, "L40S", 4, L40S),
    Flavor("l40sx8", 23.50, 192, 1534, 6500, "L40S", 8, L40S),
    Flavor("a100-large", 2.50, 12, 142, 1000, "A100", 1, A100),
    Flavor("a100x4", 10.00, 48, 568, 4000, "A100", 4, A100),
    Flavor("a100x8", 20.00, 96, 1136, 8000, "A100", 8, A100),
    Flavor("rtx-pro-6000", 2.75, 23, 256, 475, "RTX PRO 6000", 1, RTX),
    Flavor("h200", 5.00, 23, 256, 3000, "H200", 1, H200),
)
FLAVORS = {flavor.name: flavor for flavor in _ALL}


def gpu_flavors() -> list[Flavor]:
    """Single-GPU flavors, cheapest first."""
    return sorted((f for f in _ALL if f.gpus == 1), key=lambda f: f.usd_per_hour)
