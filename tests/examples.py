"""Experiments for tests: one good text, and ways to change a line of it."""

import re

GOOD = """\
name: coach
hypothesis: held-out loss falls below 1.2
base: {model: google/gemma-3-12b-it, revision: 96b6f1e}
data:
  dataset: acme/coach
  revision: 5d2
  eval: {fraction: 0.05}
train:
  method: qlora
  flavor: a10g-large
  timeout: 4h
  epochs: 3
  max_length: 2048
  learning_rate: 2e-4
  lora: {r: 64, alpha: 128, targets: [q_proj, k_proj, v_proj, o_proj]}
merge: {flavor: t4-medium, timeout: 1h}
gguf: {flavor: t4-medium, quants: [Q4_K_M, Q8_0]}
evaluate: {flavor: cpu-xl, max_new_tokens: 100}
output: {repo: acme/coach-12b}
budget: {max_usd: 10}
"""


def changed(pattern: str, replacement: str, text: str = GOOD) -> str:
    """The good experiment with one regular expression replaced; fails when nothing matches."""
    new, count = re.subn(pattern, replacement, text, count=1, flags=re.MULTILINE)
    if not count:
        raise ValueError(f"{pattern!r} is not in the text")
    return new


# The same, trained with MLX: on a quantised base, and on the base itself.
_MLX = "{base: mlx-community/gemma-3-12b-it-4bit, revision: 1a2b3c4, num_layers: 16}"
MAC = changed("  flavor: a10g-large\n  timeout: 4h\n", f"  backend: mlx\n  flavor: m3-max\n  mlx: {_MLX}\n")
MAC_LORA = changed("method: qlora", "method: lora", changed(r"  mlx: .*\n", "", MAC))
