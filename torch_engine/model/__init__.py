"""A checkpoint as a model: which families run, their tensors, and the decoder's forward pass."""
