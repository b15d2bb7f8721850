"""Implementations of the kernel interface (``model/kernel_interface.py``), of which one is chosen at load.

``reference`` is plain PyTorch: it runs anywhere, and all others are tested against it. ``cpu`` is compiled
C++, ``gpu`` Triton's language around cuBLASLt. Importing this package imports no torch.
"""
