pytest_plugins = ["tests.serving"]
