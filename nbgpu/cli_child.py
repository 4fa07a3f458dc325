"""The program of ``nbgpu run``: a child, so that there is somebody to speak when it has ended; its signals and its end are passed on."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import NoReturn

NOT_EXECUTABLE = 126
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_WATCHED = (*_PASSED_ON, signal.SIGCHLD)
_FROM_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
"""Ignored by Python, and by no other program that is started from a terminal."""
_PR_SET_PDEATHSIG = 1


class Child:
    """A program that is held back until `go`; it ends when this process does, however that ends.

    Parameters
    ----------
    program : str
        Its file.
    command : list of str
        Its arguments, its name first.
    env : dict
        Its environment.
    """

    def __init__(self, program: str, command: list[str], env: dict[str, str]):
        held, self._let_go = os.pipe()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)  # what comes from now on waits for `wait`
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._let_go)
            _become(program, command, env, held, parent, before)
        os.close(held)

    def go(self) -> None:
        """Let the program begin."""
        os.write(self._let_go, b"\n")
        os.close(self._let_go)

    def give_up(self) -> None:
        """End it before it has begun."""
        os.close(self._let_go)
        os.waitpid(self.pid, 0)

    def wait(self) -> int:
        """Pass signals on until it has ended; return its status as `os.waitpid` has it."""
        while True:
            came = signal.sigwaitinfo(_WATCHED)
            if came.si_signo == signal.SIGCHLD:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                if ended:
                    return status
            elif came.si_code <= 0:  # a process sent it to us alone; what the terminal sends, the program has got as well
                os.kill(self.pid, came.si_signo)


def _become(program: str, command: list[str], env: dict[str, str], held: int, parent: int, mask: Iterable[int]) -> NoReturn:
    """Be the child: wait to be let go, then be the program."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == parent and os.read(held, 1):
            for number in _FROM_PYTHON:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.execve(program, command, env)
    except OSError as error:
        os.write(2, f"nbgpu: {command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(NOT_EXECUTABLE)


def end_as(status: int) -> NoReturn:
    """End as a program with this status has: by the same signal, or with its exit status."""
    sys.stdout.flush()
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # one core is enough
        with suppress(OSError, ValueError):  # nobody can set SIGKILL
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (number,))
        os.kill(os.getpid(), number)
    sys.exit(os.waitstatus_to_exitcode(status))
