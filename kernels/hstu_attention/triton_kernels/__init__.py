"""The Triton kernels of HSTU attention; what they are launched with is beside this folder."""
