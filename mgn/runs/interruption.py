"""SIGTERM and SIGINT: a run ends behind the step under way, its checkpoint written, with an exit status of its own."""

import contextlib
import os
import signal
import socket
import threading
import time

from mgn.runs import processes

STATUS = 75    # EX_TEMPFAIL of sysexits.h: try again later
SAME = 0.3     # seconds in which a signal that comes again is the same one
PASSED = 2.0   # the same under torchrun, which passes on what has reached its processes already

_running = None


class Interruption:
    """Within `with`, the first signal is noted, or ends the process by SystemExit where nothing would be lost; the second ends it at once.

    A thread listens, for Python's handlers wait until the main one comes back from a long call, of a product or of another process.
    """

    def __init__(self):
        self.noted, self.since, self.nothing_to_lose, self.before, self.process = None, None, False, {}, os.getpid()

    def __enter__(self):
        global _running
        _running = self
        if threading.current_thread() is threading.main_thread():  # Python has handlers nowhere else
            reader, self.writer = socket.socketpair()
            self.writer.setblocking(False)
            self.descriptor_before = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self.listen, args=(reader,), daemon=True).start()
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as in the background of a script
                    self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        global _running
        _running = None
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self.descriptor_before)
            self.writer.close()

    def listen(self, reader):
        with reader:
            while numbers := reader.recv(64):
                for number in numbers:
                    if number in self.before:
                        self.note(number)

    def note(self, number):
        now = time.monotonic()
        if self.since is None:
            self.noted, self.since = signal.Signals(number), now
            if processes.number() == 0:  # not by logging, which may be at work
                with contextlib.suppress(OSError):  # a reader that the same signal has ended
                    os.write(2, f'{self.noted.name}: the run ends behind this step; once more ends it at once\n'.encode())
        elif now - self.since > (SAME if processes.count() == 1 else PASSED):
            os._exit(128 + number)

    def handle(self, number, _):
        if os.getpid() == self.process:  # not in a worker process just forked
            self.noted = signal.Signals(number)
            leave_if_nothing_is_lost()

    def asked(self):
        """Whether the run has to end here, the same in all processes: any of them has noted a signal."""
        return processes.any_of(self.noted is not None)

    @contextlib.contextmanager
    def at_once(self):
        """Within this, all that matters is on disk: a signal ends the process here and now."""
        self.nothing_to_lose = True
        try:
            leave_if_nothing_is_lost()
            yield
        except Exception:
            leave_if_nothing_is_lost()  # of what the signal has done to worker processes, or to another process
            raise
        finally:
            self.nothing_to_lose = False


def leave_if_nothing_is_lost():
    """SystemExit where a signal has come and all that matters is on disk. Long work asks again and again: a handler's own can get lost in a callback."""
    if _running and _running.noted and _running.nothing_to_lose:
        raise SystemExit(STATUS)
