"""Load for an OpenAI-compatible server: `locust -f loadtests/locustfile.py --host http://127.0.0.1:8000 -u 8`.

`python loadtests/locustfile.py` is the same, and its --help lists our options too: `locust --help` answers before
it reads this file. For users of your own, see docs/load-tests.md.
"""

import sys

from adapter_users import AdapterUser
from locust import task


class ChatUser(AdapterUser):
    """Asks for chat completions, one after the other."""

    @task
    def ask_next(self) -> None:
        """One request."""
        self.chat()


class CompletionUser(AdapterUser):
    """Asks for completions, one after the other."""

    @task
    def ask_next(self) -> None:
        """One request."""
        self.complete()


if __name__ == "__main__":
    from locust.main import main

    sys.argv[1:1] = ["-f", __file__]
    main()
