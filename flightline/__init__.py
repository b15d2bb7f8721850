"""Flightline: LLM serving on NVIDIA Triton with the proof beside it.

``flightline.client`` is the folder ``client`` at the top of the repository, and so on for the others: links here, so
that nothing of ours is importable under a name as common as "client".
"""

__version__ = "0.1.0"
