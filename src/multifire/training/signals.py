"""Signals as requests that the training loop reads between two steps."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from multifire.utils.log import log


class Interrupted(Exception):
    """The run was asked to stop; its `last` checkpoint holds everything up to that step."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Requests:
    """Requests made by signals: `stop` is a signal's number or 0; `save` asks for a checkpoint without a stop."""

    def __init__(self):
        self.stop = 0
        self.save = False

    def on_stop(self, number: int, frame: object) -> None:
        """Ask for a stop after this step; at the second signal, stop at once."""
        if self.stop:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.stop = number
        log.warning("stopping after this step; once more to stop at once, without a checkpoint")

    def on_save(self, number: int, frame: object) -> None:
        """Ask for a checkpoint."""
        self.save = True


@contextlib.contextmanager
def catch_signals() -> Iterator[Requests]:
    """Turn SIGINT, SIGTERM (stop) and SIGUSR1 (save) into requests."""
    requests = Requests()
    if threading.current_thread() is not threading.main_thread():
        yield requests  # only the main thread may set a signal handler
        return
    handlers = {signal.SIGINT: requests.on_stop, signal.SIGTERM: requests.on_stop, signal.SIGUSR1: requests.on_save}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
