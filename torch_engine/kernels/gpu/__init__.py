"""The kernel interface on NVIDIA GPUs."""
