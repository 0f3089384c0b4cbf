"""What happens beside the steps of training: the router's bias, the progress bar, the metrics file."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from hybridlm.modeling.losses import update_selection_bias

logger = logging.getLogger(__name__)

SHOWN = {"loss": "loss", "bits_per_byte": "bits/byte", "tokens_per_second": "tok/s"}


class SelectionBiasCallback(TrainerCallback):
    """Move the routers' selection bias once per optimizer step, not once per micro-batch."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update every router of the model that has a selection bias."""
        update_selection_bias(kwargs["model"])


class TrainingBar(ProgressCallback):
    """A progress bar that carries the loss, the bits per byte and the speed, instead of printing each record."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar; into a file it writes seldom."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None and not sys.stderr.isatty():
            self.training_bar.mininterval = 10.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest figures."""
        if self.training_bar is not None and logs:
            shown = {label: f"{logs[key]:.4g}" for key, label in SHOWN.items() if key in logs}
            if shown:
                self.training_bar.set_postfix(shown, refresh=False)


class LogLines(TrainerCallback):
    """Log a line a record where there is no bar; to the standard error where nobody has set up logging."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell the plain figures; those of single layers and spans, with a slash, are in the metrics file."""
        if not state.is_world_process_zero or not logs:
            return
        figures = [
            f"{name} {_short(value)}" for name, value in logs.items() if "/" not in name and name != "total_flos"
        ]
        line = f"step {state.global_step}: {', '.join(figures)}"
        if logger.hasHandlers():
            logger.info(line)
        else:
            sys.stderr.write(line + "\n")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class MetricsFile(TrainerCallback):
    """Write every record to a JSON lines file; after a resume the file goes on from the checkpoint.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file with what the checkpoint remembers: nothing, unless training resumes."""
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(json.dumps(record) + "\n" for record in state.log_history))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append the newest record."""
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")
