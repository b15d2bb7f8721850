"""The kernel interface in compiled C++."""
