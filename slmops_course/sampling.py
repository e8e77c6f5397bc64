"""Looking at something many times a second while other code runs."""

import threading


class Sampler:
    """Calls `sample` every `interval_s` seconds in a thread of its own, while its block runs, and once at the end."""

    def __init__(self, *, interval_s: float = 0.02):
        self.interval_s = interval_s
        self._stop = threading.Event()

    def sample(self) -> None:
        """One look. To be given by the kind of sampler."""
        raise NotImplementedError

    def __enter__(self):
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()
        self.sample()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval_s):
            self.sample()
