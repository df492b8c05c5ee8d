"""Triton kernels; installed as `torch_manual.triton_kernels`."""
