"""One piece of work in a thread beside training, whose error is raised where training asks for its end."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Task:
    """``work`` starts at once. It does not keep a process alive that ends by an error of its own."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work, self._error = work, None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    _error: BaseException | None

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the training thread must see it
            self._error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        """Until the work has ended, well or not."""
        self._thread.join()

    def result(self) -> None:
        """Wait, and raise the error that ended the work, if one did."""
        self.wait()
        if self._error is not None:
            raise self._error
