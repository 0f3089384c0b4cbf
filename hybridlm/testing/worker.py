"""The other process: reads pickled jobs from its standard input, and writes pickled answers to its standard output.

It is run as a file, so that nothing of hybridlm is imported unless a job brings a model of ours; a worker that is
started with `--without hybridlm` cannot import it at all, as where remote code is loaded.
"""

import contextlib
import hashlib
import importlib.abc
import os
import pickle
import struct
import sys
import traceback
from collections.abc import Sequence
from typing import Any, BinaryIO

HEADER = struct.Struct("<Q")


def send(stream: BinaryIO, value: Any) -> None:
    """Write one pickled value with its length before it."""
    data = pickle.dumps(value)
    stream.write(HEADER.pack(len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """Read what `send` wrote.

    Raises:
        EOFError: The other side has gone.
    """
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise EOFError("the other process has ended")
    data = stream.read(HEADER.unpack(header)[0])
    return pickle.loads(data)


def digest(model: Any) -> str:
    """A fingerprint of every weight's name, type and bits."""
    import torch

    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def remote(folder: str, input_ids: Any, dtype: str = "auto") -> tuple[Any, str, str]:
    """Load a folder by its own code; return logits, the fingerprint of the weights, and the module of the class."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
    with torch.no_grad():
        logits = model(input_ids=input_ids, use_cache=False).logits
    return logits, digest(model), type(model).__module__


def load(kind: type, folder: str, dtype: Any, experts: str | None) -> Any:
    """Load a model of a class, as a rank of a training run does, with every dropout at zero.

    A model is not sent as it is: transformers records router logits only for models that were constructed.
    """
    model = kind.from_pretrained(folder, dtype=dtype)
    if experts is not None and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(experts)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (name == "p" or "dropout" in name):
                setattr(module, name, 0.0)
    return model


def data_parallel(
    source: tuple, batch: dict[str, Any], rank: int, world_size: int, rendezvous: str
) -> tuple[float, dict[str, Any]]:
    """One rank of a data-parallel step: the loss of its rows, and the gradients after they were averaged."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    if not dist.is_initialized():  # and never destroyed: gloo's destructor may wait for ever for a thread of its own
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    model = load(*source).train()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    loss = wrapped(**batch).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def go_on(source: tuple, folder: str, calls: Sequence[Any]) -> list[Any]:
    """Load a saved cache into a new one and feed it."""
    import torch

    model = load(*source).eval()
    cache = model.new_cache()
    cache.load(folder)
    with torch.no_grad():
        return [model(input_ids=ids, past_key_values=cache, use_cache=True).logits for ids in calls]


def ready() -> str:
    """Import what every job needs."""
    import transformers

    return transformers.__version__


JOBS = {job.__name__: job for job in (remote, data_parallel, go_on, ready)}


class _Blocked(importlib.abc.MetaPathFinder):
    """Refuse to import one package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname.split(".")[0] == self.package:
            raise ImportError(f"{self.package} is not installed in this process")


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Answer jobs until the other side closes."""
    while True:
        try:
            sys.path[:], job = receive(source)
            name, arguments = pickle.loads(job)
        except EOFError:
            return
        except Exception as error:
            send(sink, ("error", f"the job could not be read: {type(error).__name__}: {error}"))
            continue
        try:
            answer = ("ok", JOBS[name](*arguments))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(place.filename)}, line {place.lineno}"
            answer = ("error", f"{type(error).__name__}: {error} ({where})")
        send(sink, answer)


def main() -> None:
    """Set the process up as the other side asked, and serve."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not land among the answers
    blocked = receive(source)
    if blocked:
        sys.meta_path.insert(0, _Blocked(blocked))
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(BrokenPipeError):
        serve(source, sink)


if __name__ == "__main__":
    main()
