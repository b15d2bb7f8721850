"""What stops the server from starting."""


class ServeError(RuntimeError):
    """One clear line for the user: what is wrong and what to do."""
