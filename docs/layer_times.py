"""Times one layer without its attention, as operators and as their definitions: `python docs/layer_times.py`.

Forward and backward in float32 on one thread, both in turns in one process; prints the table of docs/kernels.md.
"""

# T = tokens, E = model width, H = heads, D = head width

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from ultrarec.kernels import gated_output, norm_uvqk

SHAPES = ((1500, 512, 4, 128), (6000, 64, 2, 32), (13000, 50, 1, 50))
TURNS = 7
BACKENDS = {"operators": "auto", "definitions": "reference"}


def layer(inputs: dict[str, Tensor], heads: int, seed: Tensor, backend: str) -> Tensor:
    """u, v, q and k of the tokens, and v gated by u in the place of the attention."""
    x_TE, dim = inputs["x"], len(inputs["uvqk_weight"]) // (4 * heads)
    norm = {"norm_weight_E": inputs["norm_weight"], "norm_bias_E": inputs["norm_bias"]}
    uvqk = norm_uvqk(x_TE, inputs["uvqk_weight"], **norm, num_activated=heads * dim, backend=backend)
    u_TV, v_TV, _, _ = uvqk.split(heads * dim, dim=1)
    a_THD = v_TV.reshape(-1, heads, dim)
    weight_EY = inputs["output_weight"]
    return gated_output(u_TV, a_THD, x_TE, weight_EY, concat=True, dropout=0.2, seed=seed, backend=backend)


def medians(num_tokens: int, width: int, heads: int, dim: int) -> dict[str, float]:
    """Milliseconds by name of BACKENDS."""
    torch.manual_seed(0)
    shapes = {"uvqk_weight": (4 * heads * dim, width), "output_weight": (width, 3 * heads * dim)}
    shapes |= {"x": (num_tokens, width), "norm_weight": (width,), "norm_bias": (width,)}
    inputs = {name: torch.randn(*shape).mul_(0.1).requires_grad_() for name, shape in shapes.items()}
    times: dict[str, list[float]] = {name: [] for name in BACKENDS}
    for _ in range(TURNS + 1):
        for name, backend in BACKENDS.items():
            begin = time.perf_counter()
            out = layer(inputs, heads, torch.tensor([1]), backend)
            torch.autograd.grad(out.sum(), list(inputs.values()))
            times[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(each[1:]) for name, each in times.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| tokens, width, heads x head width | operators | definitions |\n|---|---|---|")
    for num_tokens, width, heads, dim in SHAPES:
        found = medians(num_tokens, width, heads, dim)
        cells = " | ".join(f"{found[name]:.0f} ms" for name in BACKENDS)
        print(f"| {num_tokens:,}, {width}, {heads} x {dim} | {cells} |", flush=True)
