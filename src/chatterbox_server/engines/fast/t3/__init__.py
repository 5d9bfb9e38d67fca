"""Text to tokens: who has a slot (``batch``), in what sizes (``graphs``), and what is worked out of a slot.

In torch: ``slots`` (the state on the device), ``backbone``, ``alignment``, ``sampling``. The same in Triton, by which a
GPU steps: ``stepper``, ``kernels``, ``choosing``.
"""
