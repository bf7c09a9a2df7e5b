"""SIGTERM and SIGINT: a run finishes its step, writes its checkpoint and ends with an exit status of its own; whatever
else a binary does ends at once. Light to import, as it watches over the import of torch.
"""

import contextlib
import os
import signal
import socket
import threading
import time

STATUS = 75            # EX_TEMPFAIL of sysexits.h: try again later
REPEAT = 0.3           # seconds within which a second signal counts as the first one
REPEAT_TORCHRUN = 2.0  # the same under torchrun, which forwards signals that its processes may have received already

_running = None


class Interruption:
    """Within `with`, the first signal is noted, or raises SystemExit where nothing would be lost; the second one ends
    the process at once.

    resumable: the process is a training run, which loses nothing within `at_once` alone and ends with STATUS. Others
    never lose anything, and end with 128 + the signal's number as in a shell.

    A thread listens for signals, because Python runs handlers only after the main thread has returned from a long call
    into C++.
    """

    def __init__(self, resumable=True):
        self.resumable, self.nothing_to_lose = resumable, not resumable
        self.noted, self.since, self.process = None, None, os.getpid()
        self.said = threading.Event()  # that the first signal has come
        self.handlers_before = {}

    def __enter__(self):
        global _running
        self.running_before, _running = _running, self
        if threading.current_thread() is threading.main_thread():  # only here can handlers be set
            reader, self.writer = socket.socketpair()
            self.writer.setblocking(False)
            self.descriptor_before = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self.listen, args=(reader,), daemon=True).start()
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # ignored e.g. in the background of a script
                    self.handlers_before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        global _running
        _running = self.running_before
        for number, handler in self.handlers_before.items():
            # Behind a binary's work comes Python's own end, where its handler of SIGINT would print a traceback.
            signal.signal(number, handler if self.resumable else signal.SIG_DFL)
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self.descriptor_before)
            self.writer.close()

    def listen(self, reader):
        with reader:
            while numbers := reader.recv(64):
                for number in numbers:
                    if number in self.handlers_before:
                        self.note(number)

    def note(self, number):
        now = time.monotonic()
        if self.since is None:
            self.noted, self.since = signal.Signals(number), now
            if os.environ.get('RANK', '0') == '0':  # not by logging, whose lock the main thread may hold
                what = 'the run ends after this step' if self.resumable else 'ending'
                with contextlib.suppress(OSError):  # the same signal may have ended the reader of this message
                    os.write(2, f'{self.noted.name}: {what}; send it again to end at once\n'.encode())
            self.said.set()
        elif now - self.since > (REPEAT_TORCHRUN if 'TORCHELASTIC_RUN_ID' in os.environ else REPEAT):
            os._exit(128 + number)

    def handle(self, number, frame):
        if os.getpid() != self.process:  # in a worker process just forked
            return
        self.noted = signal.Signals(number)
        self.said.wait(timeout=1)  # the other thread tells first
        if not self.resumable and is_importing(frame):
            os._exit(128 + number)  # some modules swallow what is raised while they are imported, and go on broken
        leave_if_nothing_is_lost()

    def asked(self):
        """Whether any process has noted a signal, so that the run has to end here; the same answer in all processes."""
        from mgn.runs import processes

        return processes.any_of(self.noted is not None)

    @contextlib.contextmanager
    def at_once(self):
        """Within this block a signal ends the process immediately, because all that matters is on disk."""
        self.nothing_to_lose = True
        try:
            leave_if_nothing_is_lost()
            yield
        except Exception:
            leave_if_nothing_is_lost()  # the signal may have ended worker processes, or another process of the run
            raise
        finally:
            self.nothing_to_lose = False


def is_importing(frame):
    while frame and not frame.f_code.co_filename.startswith('<frozen importlib'):
        frame = frame.f_back
    return frame is not None


def leave_if_nothing_is_lost():
    """Raises SystemExit where a signal has come and all that matters is on disk.

    Long work calls this again and again: an exception that a signal handler raises can get lost in a callback.
    """
    if _running and _running.noted and _running.nothing_to_lose:
        raise SystemExit(STATUS if _running.resumable else 128 + _running.noted)
