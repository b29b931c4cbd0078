"""The product of tokens and a weight whose epilogue does what follows it: bias, SiLU or residual (Triton only)."""
