"""A request on its way: sequences, KV blocks, the scheduler's plan of a step, what sampling must know. No kernels."""
