"""The benchmark: real and synthetic lookups, timed against PyTorch's own and against the speed of the memory.

``python -m fast_embedding bench`` runs it (``runner``). A run draws index streams (``streams``, ``shapes``), times one
table (``lookup``), many tables (``multi``) and whole training steps (``training``), relates each time to the fewest
bytes that must move (``limits``) and writes a JSON file, from which ``report`` makes every table and plot.
"""
