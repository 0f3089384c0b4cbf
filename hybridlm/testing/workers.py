"""Long-lived processes for the checks that need another one: DDP, remote code, a snapshot that goes on elsewhere.

Starting one takes seconds, most of them for importing torch, so all models of a run share them.
"""

import atexit
import os
import pickle
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .base import NotApplicable
from .worker import receive, send


class Worker:
    """One process that runs jobs of `worker.py`.

    Args:
        without: A package that it cannot import.
    """

    def __init__(self, without: str | None = None) -> None:
        self._modules = tempfile.TemporaryDirectory(prefix="hybridlm-worker-")
        environment = os.environ | {
            "HF_MODULES_CACHE": self._modules.name,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):  # it runs code that a folder ships, and needs no network
            environment.pop(name, None)
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name that does not resolve must not matter
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        send(self.process.stdin, without)

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def start(self, job: str, *arguments: Any) -> None:
        """Send a job.

        Raises:
            NotApplicable: The arguments cannot be sent.
        """
        try:
            data = pickle.dumps((job, arguments))
        except Exception as error:  # pickle raises many types
            raise NotApplicable(f"the class of the model cannot be sent to another process: {error}") from error
        try:  # the path goes first: the arguments may need it to be read
            send(self.process.stdin, ([path for path in sys.path if path], data))
        except OSError as error:
            self.stop()
            raise RuntimeError("the worker process has ended") from error

    def has_answered(self, seconds: float) -> bool:
        """Whether there is an answer, after waiting for at most so long."""
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def finish(self, timeout: float) -> Any:
        """Wait for the answer to the last job, see `finish_all`."""
        return finish_all([self], timeout)[0]

    def answer(self) -> Any:
        """Read the answer that has come.

        Raises:
            NotApplicable: The process could not read the job, such as a class that it cannot import.
            RuntimeError: The job failed, or the process ended.
        """
        try:
            status, answer = receive(self.process.stdout)
        except EOFError as error:
            raise RuntimeError("the worker process has ended") from error
        if status == "error":
            kind = NotApplicable if answer.startswith("the job could not be read") else RuntimeError
            raise kind(f"in another process: {answer}")
        return answer

    def stop(self) -> None:
        """End the process."""
        if self.process.stdin.closed:
            return
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self._modules.cleanup()


def finish_all(workers: list[Worker], timeout: float) -> list[Any]:
    """Wait for the answers of several workers; when one fails, all are ended, since the others may wait for it.

    Raises:
        NotApplicable: A process could not read its job.
        RuntimeError: A job failed, or a process ended.
        TimeoutError: It took too long.
    """
    end, answers = time.monotonic() + timeout, {}
    try:
        while len(answers) < len(workers):
            for worker in workers:
                if id(worker) not in answers and worker.has_answered(0.1):
                    answers[id(worker)] = worker.answer()
            if time.monotonic() > end:
                raise TimeoutError(f"another process did not answer within {timeout:.0f} s")
    except BaseException:  # a late answer must not be taken for that of the next job
        for worker in workers:
            worker.stop()
        raise
    return [answers[id(worker)] for worker in workers]


_NAMES = {"rank 0": None, "rank 1": None, "remote": "hybridlm"}


class Pool:
    """Workers by name, started when they are first asked for."""

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._starting: set[str] = set()
        self._pair: list[Worker] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def ranks(self) -> tuple[list[Worker], str]:
        """Two workers that can form a process group, and the file at which they meet.

        Both are started anew if one has died, since a group lives as long as its processes.
        """
        names = [name for name in _NAMES if name.startswith("rank")]
        pair = [self._workers.get(name) for name in names]
        if pair != self._pair or not all(self._is_alive(name) for name in names):
            if self._pair:
                for name in names:
                    self._workers.pop(name).stop()
            self._pair = [self.worker(name) for name in names]
            self._folder = tempfile.TemporaryDirectory(prefix="hybridlm-ranks-")
        return self._pair, f"{self._folder.name}/rendezvous"

    def worker(self, name: str, without: str | None = None) -> Worker:
        """The worker of a name, restarted if it died."""
        if not self._is_alive(name):
            self._workers[name] = Worker(without)
        return self._workers[name]

    def warm_up(self) -> None:
        """Start all workers, which import torch meanwhile."""
        for name, without in _NAMES.items():
            if not self._is_alive(name):
                self.worker(name, without).start("ready")
                self._starting.add(name)

    def wait(self, timeout: float = 300.0) -> None:
        """Wait until all workers are ready, so that their start counts for no check."""
        self.warm_up()
        starting, self._starting = self._starting, set()
        finish_all([self._workers[name] for name in sorted(starting)], timeout)

    def _is_alive(self, name: str) -> bool:
        return name in self._workers and self._workers[name].is_alive

    def stop(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            if worker.is_alive:
                worker.stop()
        self._workers.clear()
        self._starting.clear()


POOL = Pool()
atexit.register(POOL.stop)
