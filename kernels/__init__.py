"""Triton kernels, one file per op stem."""
