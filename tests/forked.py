"""Starts `python -m MODULE …` without the six seconds that Python, torch and DALI need to load.

A server, one for each process of pytest, has imported the libraries (nothing of ours) and forks
itself for each program; what such a program starts with `-m`, as torchrun its ranks, it forks too.
These are processes as any, with their own pid, parent, environment, signals and exit status. What
differs: ranks share one seed of string hashes, OMP_NUM_THREADS is 1 for all, handlers of `atexit`
do not run. So each kind of program is started in full somewhere too, by `subprocess`.
"""

import contextlib
import gc
import importlib
import json
import os
import random
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = (
    *("torch", "torch._dynamo", "torch.distributed.launcher", "torch.utils.tensorboard"),
    *("torchvision.models.segmentation", "torchvision.transforms.v2"),
    *("nvidia.dali.fn", "nvidia.dali.plugin.pytorch", "safetensors.torch"),
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imports the compiler
    *("sklearn.cluster", "sklearn.decomposition", "scipy.optimize", "scipy.ndimage"),
    *("rich.progress", "omegaconf", "typer", "jinja2", "simplejpeg"),
)
_TORCHRUN = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
_RENDEZVOUS = "torch.distributed.elastic.rendezvous.dynamic_rendezvous"
_REQUEST = 1 << 20  # bytes, at most
_server: tuple[int, socket.socket] | None = None


class Program:
    """As `subprocess.Popen(arguments, text=True)`, of `[sys.executable, "-m", MODULE, …]`.

    No file that it writes gets larger than `largest_file` bytes; -1 for no limit.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str] | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        largest_file: int = -1,
    ) -> None:
        assert arguments[:2] == [sys.executable, "-m"], arguments
        self.args, self.returncode = arguments, None
        self._texts: dict[str, str] = {}
        self._readers: list[threading.Thread] = []
        self._status, status = os.pipe()
        null = os.open(os.devnull, os.O_RDWR)
        ends = [status, null]
        out = self._end("out", stdout, 1, null, ends)
        error = out if stderr == subprocess.STDOUT else self._end("error", stderr, 2, null, ends)
        request = {
            "arguments": list(arguments[2:]),
            "env": dict(os.environ if env is None else env),
            "cwd": os.getcwd(),
            "largest_file": largest_file,
        }
        socket.send_fds(_connect(), [json.dumps(request).encode()], [null, out, error, status])
        for end in ends:
            os.close(end)
        self.pid = int(self._read_line())

    def _end(self, name: str, choice: int | None, own: int, null: int, ends: list[int]) -> int:
        """Where the program writes; what is piped is read by a thread."""
        if choice != subprocess.PIPE:
            return null if choice == subprocess.DEVNULL else own if choice is None else choice
        ours, theirs = os.pipe()
        ends.append(theirs)
        self._readers.append(threading.Thread(target=self._read, args=(name, ours), daemon=True))
        self._readers[-1].start()
        return theirs

    def _read(self, name: str, end: int) -> None:
        with open(end, encoding="utf-8", errors="replace") as file:
            self._texts[name] = file.read()

    def _read_line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(self._status, 1) or b"-9\n"  # whoever waited for it was killed
        return line

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = int(self._read_line())
            os.close(self._status)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it and its children have printed: waits until none of them can print any more."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for reader in self._readers:
            reader.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if deadline is None else max(0.1, deadline - time.monotonic()))
        return self._texts.get("out", ""), self._texts.get("error", "")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_program(
    arguments: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 300
) -> "subprocess.CompletedProcess[str]":
    """As `subprocess.run(arguments, capture_output=True, text=True)`."""
    program = Program(arguments, env, subprocess.PIPE, subprocess.PIPE)
    try:
        out, error = program.communicate(timeout)
    except BaseException:
        program.kill()
        raise
    assert program.returncode is not None
    return subprocess.CompletedProcess(arguments, program.returncode, out, error)


def _connect() -> socket.socket:
    global _server
    if _server is None or _server[0] != os.getpid():
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _REQUEST)
        quiet = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        quiet["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # CUDA that was started cannot be forked
        subprocess.Popen(
            [sys.executable, "-m", "tests.forked", str(theirs.fileno())],
            cwd=Path(__file__).parent.parent,
            env=os.environ | quiet,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        _server = os.getpid(), ours
    return _server[1]


# the server


def serve(channel: socket.socket) -> None:
    """Forks programs until the process that asks for them has ended."""
    for library in LIBRARIES:
        try:
            importlib.import_module(library)
        except ImportError:
            continue  # an optional one
    # a name for a log that nobody reads, for which torchrun looks at the files of all modules
    importlib.import_module(_RENDEZVOUS).get_method_name = lambda depth=2: ""
    gc.freeze()  # a collection would copy all of that memory in every program
    while True:
        request, numbers, _, _ = socket.recv_fds(channel, _REQUEST, 4)
        if not request:
            return
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that kept programs which have ended
                pass
        if os.fork() == 0:
            channel.close()
            _keep(json.loads(request), numbers)
        for number in numbers:
            os.close(number)


def _keep(request: dict[str, Any], numbers: list[int]) -> NoReturn:
    """The parent of one program: says its pid, and then how it ended."""
    *streams, status = numbers
    pid = os.fork()
    if pid == 0:
        os.chdir(request["cwd"])
        os.setsid()
        limit = request["largest_file"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        _become(request["arguments"], request["env"], streams)
    os.write(status, f"{pid}\n".encode())
    os.closerange(0, status)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status, f"{ended}\n".encode())
    os._exit(0)


def _become(arguments: Sequence[str], env: Mapping[str, str], streams: Sequence[int]) -> NoReturn:
    """This process, just forked, as `python -m ARGUMENTS` with these streams and no other file."""
    for target, source in enumerate(streams):
        os.dup2(source, target)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with contextlib.suppress(OSError):  # the folder itself
                os.close(int(name))
    os.environ.clear()
    os.environ.update(env)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    sys.argv = list(arguments)
    status = 1
    try:
        subprocess.Popen = importlib.import_module(_TORCHRUN).Popen = _Popen  # type: ignore[misc]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as leave:
        if leave.code is None or isinstance(leave.code, int):
            status = leave.code or 0
        else:
            print(leave.code, file=sys.stderr)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


class _Popen(subprocess.Popen):  # type: ignore[type-arg]
    """Forks `python -m MODULE …` where nothing is piped and no other option is given."""

    def __new__(cls, args: Sequence[str], **options: Any) -> Any:
        known = {"env", "stdout", "stderr", "start_new_session"}
        piped = subprocess.PIPE in (options.get("stdout"), options.get("stderr"))
        if _module_at(args) and options.keys() <= known and not piped:
            return _Child(args, **options)
        return super().__new__(cls)


class _Child:
    """What is asked of a `Popen` whose program was forked from this one."""

    def __init__(
        self,
        args: Sequence[str],
        env: Mapping[str, str] | None = None,
        stdout: Any = None,
        stderr: Any = None,
        start_new_session: bool = False,
    ) -> None:
        self.args, self.returncode = args, None
        env = dict(os.environ if env is None else env)
        out = 1 if stdout is None else stdout.fileno()
        error = out if stderr == subprocess.STDOUT else 2 if stderr is None else stderr.fileno()
        self.pid = os.fork()
        if self.pid == 0:
            if start_new_session:
                os.setsid()
            _become(args[_module_at(args) :], env, (0, out, error))

    def poll(self) -> int | None:
        return self._ask(os.WNOHANG)

    def _ask(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout or 0)
        while self._ask(0 if timeout is None else os.WNOHANG) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _module_at(args: Sequence[str]) -> int:
    """Where the module's name stands in `python [-u] -m MODULE …`; 0 for any other command."""
    known = ([sys.executable, "-m"], [sys.executable, "-u", "-m"])
    return next((len(start) for start in known if list(args[: len(start)]) == start), 0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
