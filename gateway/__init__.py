"""The OpenAI-compatible HTTP door in front of Triton."""
