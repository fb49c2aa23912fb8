"""Turn signals into requests, which the training loop reads between two steps."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from multifire.utils.log import log


class Interrupted(Exception):
    """The run was stopped by request; its `last` checkpoint holds the state at the stop."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class Requests:
    """Requests made by signals: `stop` is the number of a signal, or 0; `save` asks for a checkpoint."""

    def __init__(self):
        self.stop = 0
        self.save = False

    def on_stop(self, number: int, frame: object) -> None:
        """Ask for a stop after this step; at the second signal, stop at once."""
        if self.stop:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.stop = number
        log.warning("stopping after this step; send the signal again to stop at once, without a checkpoint")

    def on_save(self, number: int, frame: object) -> None:
        """Ask for a checkpoint."""
        self.save = True


@contextlib.contextmanager
def catch_signals() -> Iterator[Requests]:
    """Within the block, turn SIGINT and SIGTERM into a request to stop, and SIGUSR1 into a request to save."""
    requests = Requests()
    if threading.current_thread() is not threading.main_thread():
        yield requests  # only the main thread may set a signal handler
        return
    handlers = {signal.SIGINT: requests.on_stop, signal.SIGTERM: requests.on_stop, signal.SIGUSR1: requests.on_save}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
