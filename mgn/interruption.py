"""SIGTERM and SIGINT: a run ends behind the step under way, its checkpoint written, with an exit status of its own."""

import contextlib
import os
import signal
import threading
import time

from mgn import processes

STATUS = 75     # EX_TEMPFAIL of sysexits.h: try again later
DOUBLE = 2.0    # seconds in which torchrun may pass on a signal that has reached this process already


class Interruption:
    """Within `with`, the first signal is noted, or ends the process by SystemExit where nothing would be lost; the second ends it at once."""

    def __init__(self):
        self.noted, self.since, self.nothing_to_lose = None, None, False

    def __enter__(self):
        main = threading.current_thread() is threading.main_thread()  # Python has handlers nowhere else
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT) if main}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, _):
        now = time.monotonic()
        if self.noted is None:
            self.noted, self.since = signal.Signals(number), now
            if processes.number() == 0:  # not by logging, which may be at work on its stream
                os.write(2, f'{self.noted.name}: the run ends behind this step; once more ends it at once\n'.encode())
            if self.nothing_to_lose:
                raise SystemExit(STATUS)
        elif processes.count() == 1 or now - self.since > DOUBLE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def asked(self):
        """Whether the run has to end here, the same in all processes: any of them has noted a signal."""
        return processes.any_of(self.noted is not None)

    @contextlib.contextmanager
    def at_once(self):
        """Within this, all that matters is on disk: a signal ends the process here and now."""
        self.nothing_to_lose = True
        try:
            if self.noted:
                raise SystemExit(STATUS)
            yield
        finally:
            self.nothing_to_lose = False
