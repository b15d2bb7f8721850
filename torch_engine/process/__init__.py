"""The engine as a process of its own: its server, the client of Triton's models, and the way between several."""
