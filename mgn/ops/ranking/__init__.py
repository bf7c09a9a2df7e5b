"""Ranks, neighbours and re-ranking, in an order of canonical keys that no tile, thread or device can change.

Read keys, product (what decides most pairs without their keys, and by how much it may err), tiles, counting, ranks,
nearest, reranking; then reference and sparse_rows, which do in PyTorch and NumPy what the kernels do.
"""
