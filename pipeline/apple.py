"""Apple's M-series chips as places where MLX trains: a dated catalogue, like `flavors.py`. Estimates nothing.

Memory bandwidth is what Apple's product pages say. FP16 rates: Apple names them for M1 (2.6 TFLOP/s) and M2 (3.6) and
their larger versions; all are GPU cores x 256 operations x clock, and so are those of M3 (1.38 GHz) and M4 (1.62 GHz),
whose clocks follow from the ratio of their F16 prompt speeds to M2's in llama.cpp's table of Apple chips (discussion
4167). FP16 is no faster than FP32 on these GPUs. Of a chip sold with fewer cores, the full one is meant.
"""

from dataclasses import dataclass

from pipeline.experiment import ANY_MAC
from pipeline.flavors import Flavor

AS_OF = "2026-11-28"
MEMORY_GB = (16, 24, 32, 36, 48, 64, 96, 128)  # of Macs that are common; larger ones exist
WIRED = 0.75  # of its memory, what Metal gives to the GPU unless `iogpu.wired_limit_mb` says otherwise


@dataclass(frozen=True)
class Chip:
    """One chip: its name in an experiment and on the box, its FP16 rate and its memory's bandwidth."""

    name: str
    shown: str
    tflops: float
    gb_per_s: int


_ALL = (
    Chip("m1", "M1", 2.6, 68),
    Chip("m1-pro", "M1 Pro", 5.2, 200),
    Chip("m1-max", "M1 Max", 10.4, 400),
    Chip("m1-ultra", "M1 Ultra", 20.8, 800),
    Chip("m2", "M2", 3.6, 100),
    Chip("m2-pro", "M2 Pro", 6.8, 200),
    Chip("m2-max", "M2 Max", 13.6, 400),
    Chip("m2-ultra", "M2 Ultra", 27.2, 800),
    Chip("m3", "M3", 3.5, 100),
    Chip("m3-pro", "M3 Pro", 6.4, 150),
    Chip("m3-max", "M3 Max", 14.1, 400),
    Chip("m3-ultra", "M3 Ultra", 28.3, 819),
    Chip("m4", "M4", 4.1, 120),
    Chip("m4-pro", "M4 Pro", 8.3, 273),
    Chip("m4-max", "M4 Max", 16.6, 546),
)
CHIPS = {chip.name: chip for chip in _ALL}
# Where the train stage of `backend: mlx` runs: no job ever, so nothing to pay.
MACS = {name: Flavor(name, 0.0, 0, 0, 0, local=True) for name in (ANY_MAC, *CHIPS)}
