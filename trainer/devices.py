"""What GPUs can do, from their makers' public data sheets; nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One GPU. Rates are per second, of the module with the most power, without sparsity."""

    cuda_name: str
    """How the driver calls it; other modules of the same chip (PCIe, NVL) are slower and have other names."""
    memory_bytes: float
    bf16_flops: float
    """Of matrix products, two operations per multiplication and addition."""
    fp32_flops: float
    """Without TF32, which torch leaves off."""
    memory_bandwidth: float
    """Bytes."""
    link_bandwidth: float
    """Bytes to the other GPUs of the node, in one direction."""

    def flops(self, precision: str) -> float:
        """The peak under `trainer.precision`."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops


DEVICES = {
    "a100": Device(
        cuda_name="NVIDIA A100-SXM4-80GB",
        memory_bytes=80e9,
        bf16_flops=312e12,
        fp32_flops=19.5e12,
        memory_bandwidth=2.039e12,
        link_bandwidth=300e9,
    ),
    "b200": Device(
        cuda_name="NVIDIA B200",
        memory_bytes=180e9,
        bf16_flops=2250e12,
        fp32_flops=75e12,
        memory_bandwidth=7.7e12,
        link_bandwidth=900e9,
    ),
    "h100": Device(
        cuda_name="NVIDIA H100 80GB HBM3",
        memory_bytes=80e9,
        bf16_flops=989.4e12,
        fp32_flops=66.9e12,
        memory_bandwidth=3.35e12,
        link_bandwidth=450e9,
    ),
    "h200": Device(
        cuda_name="NVIDIA H200",
        memory_bytes=141e9,
        bf16_flops=989.4e12,
        fp32_flops=66.9e12,
        memory_bandwidth=4.8e12,
        link_bandwidth=450e9,
    ),
    "mi300x": Device(
        cuda_name="AMD Instinct MI300X",
        memory_bytes=192e9,
        bf16_flops=1307.4e12,
        fp32_flops=163.4e12,
        memory_bandwidth=5.3e12,
        link_bandwidth=448e9,
    ),
}
"""By the name that `ultrarec plan --gpu` takes."""


def device_called(cuda_name: str) -> Device | None:
    """The device that the driver calls so; None of one that is not in the table."""
    return next((device for device in DEVICES.values() if device.cuda_name == cuda_name), None)
