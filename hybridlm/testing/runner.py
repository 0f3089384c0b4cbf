"""Run the checks on a model and judge what they measure."""

import linecache
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .base import Differs, NotApplicable, quiet
from .check_any import WeakState
from .foreign import ForeignSubject, Refused
from .loading import DTYPES, Prepared, prepare, without_dropout
from .report import DIFFERS, NOT_APPLICABLE, OK, RAISES, REFUSED, Report, Result
from .suite import Row, check_selection, rows_for
from .workers import POOL

Progress = Callable[[str, int, int], None]
_HERE, _TORCH = Path(__file__).parent, Path(torch.__file__).parent
_LONGEST_REASON = 240


class TimeLimit(BaseException):
    """A check took too long. Not an `Exception`, so that no library swallows it."""


def check_model(
    model_or_path: Any,
    *,
    select: Iterable[str] | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    time_limit: float | None = 60.0,
    seed: int = 0,
    name: str | None = None,
    tokenizer: Any = None,
    scale_weights: bool | None = None,
    inductor: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Hold a causal language model to the promises of its state.

    Args:
        model_or_path: A model, which is not changed, a config, a folder, or a hub id.
        select: Names of checks, or how they begin; all by default.
        dtype: What it computes in, a torch dtype or one of "fp64", "fp32", "bf16", "fp16"; by default float64 where
            that runs and the model is small, else float32.
        device: Where to run; where the model is by default.
        time_limit: Seconds that one check may take, in the main thread; `None` for no limit.
        seed: Where all random choices start.
        name: What the report calls the model.
        tokenizer: Cuts the text into tokens; by default that of the folder or hub id, else bytes.
        scale_weights: Whether the weights are random and are scaled so that state matters; by default those of a
            config, or of a folder without weights.
        inductor: Whether the compiled step uses inductor, which needs a C++ compiler, instead of the eager backend.
        trust_remote_code: Whether code of the folder or the hub may run.
        progress: Called with a check's name, its number and how many there are, before each check.

    Returns:
        The report. A model that cannot be checked at all is a report with a `problem`, not an exception.

    Raises:
        ValueError: No check has a selected name, or the dtype is unknown.
    """
    select = None if select is None else list(select)
    check_selection(select or [])
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype: unknown {dtype!r}, expected one of {list(DTYPES)}")
        dtype = DTYPES[dtype]
    started = time.monotonic()
    report = Report(model=name or _name(model_or_path), seed=seed)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            prepared = prepare(
                model_or_path,
                dtype=dtype,
                device=device,
                seed=seed,
                tokenizer=tokenizer,
                trust_remote_code=trust_remote_code,
                is_twin=scale_weights,
            )
        except Exception as error:
            report.problem = _one_line(error)
        else:
            with few_threads(prepared):
                _run(report, prepared, select, time_limit, inductor, dtype is None, progress)
    report.seconds = time.monotonic() - started
    return report


def _run(
    report: Report,
    prepared: Prepared,
    select: list[str] | None,
    time_limit: float | None,
    inductor: bool,
    may_narrow: bool,
    progress: Progress | None,
) -> None:
    report.notes = list(prepared.notes)
    report.dtype = str(prepared.dtype).removeprefix("torch.")
    report.device = prepared.subject.model.device.type
    if not prepared.subject.keeps_cache:
        report.notes.append("forward returns no cache object: padding and precision are judged by whole forwards")
    rows = rows_for(prepared.subject, select)
    if any(row.needs == "workers" for row in rows):
        POOL.warm_up()
    for number, row in enumerate(rows):
        if progress is not None:
            progress(row.name, number, len(rows))
        options = {"backend": "inductor"} if inductor and row.name == "compiled_decode" else {}
        result = judge_widely(row, prepared, time_limit, may_narrow=may_narrow, **options)
        report.results.append(result)


def judge_widely(
    row: Row, prepared: Prepared, time_limit: float | None = None, *, may_narrow: bool, **options: Any
) -> Result:
    """Run one row, in float32 if it raises in float64 and nobody asked for that."""
    is_wide = may_narrow and prepared.dtype == torch.float64
    if is_wide and row.in_float32 and isinstance(prepared.subject, ForeignSubject):
        return judge(row, prepared.in_float32, time_limit, **options)
    result = judge(row, prepared, time_limit, **options)
    if result.verdict == RAISES and is_wide:
        again = judge(row, prepared.in_float32, time_limit, **options)
        if again.verdict != RAISES:
            again.reason = f"in float32{': ' if again.reason else ''}{again.reason}"
            again.seconds += result.seconds
            return again
    return result


def judge(row: Row, prepared: Prepared, time_limit: float | None = None, **options: Any) -> Result:
    """Run one row and say how it ended.

    Args:
        row: The row.
        prepared: The model.
        time_limit: Seconds that it may take.
        options: Passed to the check.
    """
    subject, limit = prepared.subject, row.tolerance(prepared.exact)
    result = Result(row.name, row.promise, row.compared, OK, tolerance=limit)
    if row.needs == "workers":
        POOL.wait()
    started = time.monotonic()
    try:
        with limited(time_limit), without_dropout(subject.model), torch.random.fork_rng():
            torch.manual_seed(subject.seed)
            result.error = float(row.run(subject, **options))
        if not result.error <= limit:
            result.verdict = DIFFERS
            result.reason = "not finite" if math.isinf(result.error) and row.name == "long_input" else ""
    except Differs as error:
        result.error = error.error
        if not error.error <= limit:
            result.verdict, result.reason = DIFFERS, str(error)
    except TimeLimit:
        result.verdict, result.reason = RAISES, f"took longer than the time limit of {time_limit:g} s"
    except Exception as error:
        result.verdict, result.reason = verdict_of(error, prepared.is_twin)
    finally:
        subject.model.eval()
        subject.model.zero_grad(set_to_none=True)
    result.seconds = time.monotonic() - started
    return result


def verdict_of(error: Exception, is_twin: bool = False) -> tuple[str, str]:
    """What an exception says about the model: the verdict and a line of reason."""
    reason = _one_line(error)
    if isinstance(error, NotApplicable):
        return NOT_APPLICABLE, str(error)
    if isinstance(error, WeakState):
        return (DIFFERS if is_twin else NOT_APPLICABLE), str(error)
    if isinstance(error, Refused):
        return REFUSED, str(error)
    if isinstance(error, AssertionError) and _raised_in(error).parent == _HERE:
        return DIFFERS, str(error)
    if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
        return NOT_APPLICABLE, f"forward takes no {str(error).split('argument')[-1].strip()}"
    if isinstance(error, NotImplementedError) or (isinstance(error, ValueError | RuntimeError) and _is_stated(error)):
        return REFUSED, reason
    return RAISES, reason


def _raised_in(error: BaseException) -> Path:
    return Path(_last_frame(error)[0])


def _last_frame(error: BaseException) -> tuple[str, int]:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return ("", 0) if trace is None else (trace.tb_frame.f_code.co_filename, trace.tb_lineno)


def _is_stated(error: BaseException) -> bool:
    """Whether a `raise` statement of a model or of transformers says so, rather than an operation that failed."""
    file, line = _last_frame(error)
    if not file or _TORCH in Path(file).parents or Path(file).parent == _HERE:
        return False
    return linecache.getline(file, line).strip().startswith("raise")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _name(source: Any) -> str:
    if isinstance(source, str | Path):
        return Path(source).name if Path(source).is_dir() else str(source)
    return type(source).__name__


@contextmanager
def few_threads(prepared: Prepared, small: int = 10_000_000) -> Iterator[None]:
    """One thread for a small model: handing its tensors to others takes longer than the work."""
    before = torch.get_num_threads()
    if sum(p.numel() for p in prepared.subject.model.parameters()) <= small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise `TimeLimit` when the block takes longer; only the main thread of a POSIX system can be interrupted.

    A context that is being entered or left is finished first: a `no_grad` cut off half-way would stay for ever.
    """
    can_interrupt = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not seconds or not can_interrupt:
        yield
        return

    def stop(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_name in ("__enter__", "__exit__"):
                signal.setitimer(signal.ITIMER_REAL, 1e-3)
                return
            frame = frame.f_back
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
