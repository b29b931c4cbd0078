"""Calls of hstu_attention of every kind, and the bound on their error against the definition in float64."""

# T = events of all sequences, H = heads, Dqk and Dv = head widths, N = max_seq_len

from dataclasses import dataclass, field

import hardware_tanh
import torch

from ultrarec.kernels import AttentionMask, RelativeBias, hstu_attention

LENGTHS = (0, 1, 63, 65, 0, 7, 300, 64, 2)


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...] = LENGTHS
    num_heads: int = 2
    dqk: int = 16
    dv: int = 16
    slack: int = 0
    """How much longer max_seq_len is than the longest sequence."""
    mask: AttentionMask = field(default_factory=AttentionMask)
    targets: bool = False
    bias: str = ""
    """Which weights: some of "position time", and "query" for query timestamps of their own."""
    scale: str = "default"
    alpha: float | None = None
    dtype: torch.dtype = torch.float32
    offsets_dtype: torch.dtype = torch.int64
    device: str = "cpu"

    @property
    def max_seq_len(self) -> int:
        return max(1, *self.lengths) + self.slack


def inputs_of(case: Case) -> dict[str, torch.Tensor]:
    """Tensors of the case that a gradient is asked for, rounded to its dtype."""
    torch.manual_seed(0)
    num_events, num_heads = sum(case.lengths), case.num_heads
    inputs = {
        "q": torch.randn(num_events, num_heads, case.dqk).to(case.dtype),
        "k": torch.randn(num_events, num_heads, case.dqk).to(case.dtype),
        "v": torch.randn(num_events, num_heads, case.dv).to(case.dtype),
    }
    if "position" in case.bias:
        inputs["position_weight"] = torch.randn(2 * case.max_seq_len - 1)
    if "time" in case.bias:
        inputs["time_weight"] = torch.randn(41)
    if case.scale == "tensor":
        inputs["scale"] = (torch.rand(num_events) - 0.3) / case.max_seq_len
    return {name: x.to(case.device) for name, x in inputs.items()}


def num_targets_of(case: Case) -> torch.Tensor | None:
    if not case.targets:
        return None
    return torch.tensor([min(n, 1 + b % 4) for b, n in enumerate(case.lengths)], device=case.device)


def bias_of(case: Case, inputs: dict[str, torch.Tensor]) -> RelativeBias | None:
    if not case.bias:
        return None
    generator = torch.Generator().manual_seed(1)
    timestamps = torch.randint(0, 200_000, (sum(case.lengths),), generator=generator)
    later = (timestamps + torch.randint(0, 5000, timestamps.shape, generator=generator)).to(case.device)
    timestamps = timestamps.to(case.device)
    weights = (inputs.get("position_weight"), inputs.get("time_weight"))
    return RelativeBias(*weights, timestamps, later if "query" in case.bias else None)


def attend(case: Case, inputs: dict[str, torch.Tensor], backend: str) -> torch.Tensor:
    scale = {"default": None, "number": 0.01}.get(case.scale, inputs.get("scale"))
    return hstu_attention(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        torch.tensor((0, *case.lengths)).cumsum(0).to(case.device, case.offsets_dtype),
        max_seq_len=case.max_seq_len,
        alpha=case.alpha,
        scale=scale,
        num_targets=num_targets_of(case),
        mask=case.mask,
        bias=bias_of(case, inputs),
        backend=backend,
    )


def outputs_and_gradients(case: Case, backend: str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The output and all gradients; computed in dtype, if given, from inputs of the same value."""
    inputs = {name: x.to(dtype or x.dtype).requires_grad_() for name, x in inputs_of(case).items()}
    out = attend(case, inputs, backend)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(case.dtype).to(out)
    grads = torch.autograd.grad(out, list(inputs.values()), dout)
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}}


def hardware_tanh_shares(case: Case) -> dict[str, float]:
    """See hardware_tanh.py."""
    inputs = {name: x.double().requires_grad_() for name, x in inputs_of(case).items()}
    shape = (*inputs["v"].shape,)
    dout = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(case.dtype).to(inputs["v"])
    rest = {"num_targets": num_targets_of(case), "bias": bias_of(case, inputs)}
    return hardware_tanh.shares_of(case, inputs, dout, **rest)


def assert_as_exact_as_plain_torch(case: Case, backend: str = "auto") -> None:
    """At most twice the error of the definition computed in the dtype of the case, for the output and each gradient;
    and what a tanh of the hardware adds.
    """
    shares = hardware_tanh_shares(case) if hardware_tanh.is_used(case, backend) else {}
    got = outputs_and_gradients(case, backend)
    plain = outputs_and_gradients(case, "reference")
    exact = outputs_and_gradients(case, "reference", torch.float64)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert value.dtype == plain[name].dtype, name
        assert value.shape == exact[name].shape, name
        if value.numel() == 0:
            continue
        error = (value - exact[name]).abs().max()
        # Relative to what is compared: outputs are means of many weights, far below 1.
        bound = 2 * (plain[name] - exact[name]).abs().max() + 1e-6 * exact[name].abs().max() + shares.get(name, 0.0)
        assert error <= bound, f"{name}: error {error:.1e} > {bound:.1e}, twice that of plain torch in {case.dtype}"


MASKS = {
    "causal": AttentionMask(),
    "window": AttentionMask(window=20),
    "window_and_tail": AttentionMask(window=20, full_tail=10),
    "window_and_prefix": AttentionMask(window=20, prefix=8),
    "contextual": AttentionMask(num_contextual=3),
    "contextual_window": AttentionMask(window=20, num_contextual=3),
    "all": AttentionMask(window=20, full_tail=10, prefix=2, num_contextual=3),
}
