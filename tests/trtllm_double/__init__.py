"""A contract double of TensorRT-LLM: its surface comes from ``surface.json``, its tokens from our engine on a CPU.

The folder on PYTHONPATH makes ``import tensorrt_llm`` work. What the facts do not list does not exist here: an unknown
argument, attribute or release raises as the real one would.
"""
