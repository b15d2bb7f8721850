"""Lane trtllm-engine: quantize.py and trtllm-build inside NVIDIA's container, and what can go wrong there."""
