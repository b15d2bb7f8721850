import sys

from flightline.client.cli import main

sys.exit(main())
