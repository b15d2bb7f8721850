"""What Triton loads: ``config.pbtxt`` templates, their ``1/model.py``, and ``shared``, the library that those import.

Each sub-folder with a ``config.pbtxt`` is one Triton model; ``engine_build`` renders them into the build folder.
"""
