"""The Triton model repository: ``config.pbtxt`` templates, their Python models, and the server's supervisor.

Each sub-folder with a ``config.pbtxt`` is one Triton model; ``engine_build`` renders them into
``build/model_repository``. ``shared`` is what the models have in common, ``serve`` runs the server.
"""
