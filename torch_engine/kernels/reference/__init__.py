"""The kernel interface in plain PyTorch."""
