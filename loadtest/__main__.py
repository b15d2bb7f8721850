"""``python -m loadtest ui|bench [options]``"""

import sys

from loadtest import bench, ui

COMMANDS = {"ui": ui.main, "bench": bench.main}

if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
    sys.exit("usage: python -m loadtest ui|bench [options]")
sys.exit(COMMANDS[sys.argv[1]](sys.argv[2:]))
