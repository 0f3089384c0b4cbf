"""What figures of time were taken on."""

import platform
from pathlib import Path


def processor_name(cpuinfo: str | Path = "/proc/cpuinfo") -> str:
    """The processor's name, as the system's file says it, else as Python does."""
    path = Path(cpuinfo)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
