"""SIGTERM and SIGINT: a run finishes its step, writes its checkpoint and ends with an exit status of its own."""

import contextlib
import os
import signal
import threading
import time

import torch

from mgn.runs import processes

STATUS = 75            # EX_TEMPFAIL of sysexits.h: try again later
REPEAT = 0.3           # seconds within which a second signal counts as the first one
REPEAT_TORCHRUN = 2.0  # the same under torchrun, which forwards signals that its processes may have received already


class Interruption:
    """Within `with`, the first signal is noted, or raises SystemExit where nothing would be lost; the second one ends
    the process at once. Python hears of either once a call into C++ has returned.
    """

    def __init__(self):
        self.noted, self.since, self.process, self.nothing_to_lose, self.before = None, None, os.getpid(), False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only here can handlers be set
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored e.g. in the background of a script
                    self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, _):
        if os.getpid() != self.process:  # in a worker process just forked
            return
        if self.noted is None:
            self.noted, self.since = signal.Signals(number), time.monotonic()
            if processes.number() == 0:
                with contextlib.suppress(OSError):  # the same signal may have ended the reader of this message
                    os.write(2, f'{self.noted.name}: the run ends after this step; send it again to end at once\n'
                             .encode())
        elif time.monotonic() - self.since > (REPEAT_TORCHRUN if 'TORCHELASTIC_RUN_ID' in os.environ else REPEAT):
            os._exit(128 + number)
        if self.nothing_to_lose:
            raise SystemExit(STATUS)

    def asked(self):
        """Whether any process has noted a signal, so that the run has to end here; the same answer in all processes.

        It travels through main memory, so that no device is waited for.
        """
        return bool(processes.reduced(torch.tensor(int(self.noted is not None)), 'MAX'))

    @contextlib.contextmanager
    def at_once(self):
        """Within this block a signal ends the process immediately, because all that matters is on disk."""
        self.nothing_to_lose = True
        try:
            if self.noted:
                raise SystemExit(STATUS)
            yield
        finally:
            self.nothing_to_lose = False
