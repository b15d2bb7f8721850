"""The OpenAI-compatible HTTP endpoint in front of Triton."""
