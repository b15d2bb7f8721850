"""What the Triton models share: reading requests, writing responses, talking to the engine. No torch."""
