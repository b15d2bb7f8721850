"""Checkpoint to servable engine; one file a stage: checkpoint, plan, quantize, gate, package, repository."""
