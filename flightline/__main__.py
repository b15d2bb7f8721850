import sys

from flightline.cli import main

sys.exit(main())
