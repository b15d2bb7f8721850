"""Locust's command line with the monkey-patching that ``grpc.aio`` can live with.

``python -m flightline.loadtest.locust_main -f loadtest/locustfile.py [Locust's options]``

Locust patches everything on import; ``grpc.aio`` on its own thread needs real threads and a real epoll.
"""

import os

os.environ["LOCUST_SKIP_MONKEY_PATCH"] = "1"

from gevent import monkey

monkey.patch_all(thread=False, select=False)

from locust.main import main  # noqa: E402

if __name__ == "__main__":
    main()
