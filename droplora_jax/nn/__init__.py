"""Pieces of a network: attention, rotary positions, norms, quantised kernels."""
