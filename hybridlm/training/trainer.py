"""The Trainer of transformers with packed rows, whole checkpoints, and bits per byte."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .callbacks import LogLines, MetricsFile, SelectionBiasCallback, TrainingBar
from .health import router_health
from .parameter_groups import decayed_parameter_names
from .span_metrics import span_metrics

METRICS_FILE = "metrics.jsonl"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the one before it is whole."""


class EpochSampler(Sampler[int]):
    """All rows in an order that depends on the seed and the epoch only.

    Args:
        num_rows: Number of rows.
        seed: Seed of the order.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        yield from self.order(self.epoch)

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch in the order they are read."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.num_rows, generator=generator).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch


class _EpochCallback(TrainerCallback):
    """Tell the sampler the epoch: accelerate does not reach it through every wrapper it uses after a resume."""

    def __init__(self, trainer: "HybridTrainer") -> None:
        self.trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.train_sampler is not None:
            self.trainer.train_sampler.set_epoch(int(state.epoch or 0))


class HybridTrainer(Trainer):
    """Train a causal language model on packed rows.

    Beyond `transformers.Trainer`: weight decay spares recurrences and embeddings, the routers' selection bias moves
    once per optimizer step, records carry bits per byte, tokens per second, the routers' health and what spans
    chose and go to `metrics.jsonl`, the order of rows can be named (`rows_seen`), and a checkpoint appears under its
    name only when it is complete.

    With `disable_tqdm` there is no bar, and the plain figures of each record go to the log instead.

    Args:
        model: As for `transformers.Trainer`, like the next two.
        args: The training arguments.
        data_collator: Makes a batch of rows.
        decay_embeddings: Whether weight decay applies to embeddings too.
        **kwargs: As for `transformers.Trainer`. The training data may be anything that it takes, such as a list of
            dicts with `input_ids` and `labels`; bits per byte are told for `PackedRows` and `PackedStream`, which
            count bytes.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        *,
        decay_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.decay_embeddings = decay_embeddings
        self.train_sampler: EpochSampler | None = None
        self._redirect: str | None = None
        self._tokens_since_log = 0
        self._router_losses: dict[bool, list[Tensor]] = {True: [], False: []}  # in training, in evaluation
        self._step_of_log: int | None = None
        self._time_of_log: float | None = None
        super().__init__(model, args, data_collator, **kwargs)
        for default in (ProgressCallback, PrinterCallback):
            self.remove_callback(default)
        self.add_callback(LogLines if self.args.disable_tqdm else TrainingBar)
        self.add_callback(SelectionBiasCallback)
        self.add_callback(_EpochCallback(self))
        self.add_callback(MetricsFile(Path(self.args.output_dir) / METRICS_FILE))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that decay."""
        return decayed_parameter_names(model, self.decay_embeddings)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not hasattr(dataset, "__len__"):
            return None
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.train_sampler = EpochSampler(len(dataset), seed)
        return self.train_sampler

    def rows_seen(self) -> list[int]:
        """Indices of the rows that training has learnt from so far, each once and in order."""
        assert self.train_sampler is not None, "rows_seen needs a map-style data set and a started training"
        num_rows = self.train_sampler.num_rows
        batch_rows = self.args.per_device_train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last:
            num_rows -= num_rows % batch_rows
        micro_batches = -(-num_rows // batch_rows)
        steps_per_epoch = -(-micro_batches // self.args.gradient_accumulation_steps)
        epochs, steps = divmod(self.state.global_step, steps_per_epoch)
        if epochs and num_rows == self.train_sampler.num_rows:
            return list(range(num_rows))
        seen: set[int] = set()
        for epoch in range(epochs):
            seen.update(self.train_sampler.order(epoch)[:num_rows])
        rows_of_steps = min(num_rows, steps * self.args.gradient_accumulation_steps * batch_rows)
        seen.update(self.train_sampler.order(epochs)[:rows_of_steps])
        return sorted(seen)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run one micro-batch forward and backward, and count its tokens."""
        if self._time_of_log is None:
            self._time_of_log, self._step_of_log = time.perf_counter(), self.state.global_step
        self._tokens_since_log += inputs["input_ids"].numel() * self.args.world_size
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The model's loss; what routers add to it is also kept apart, for bits per byte are of the text alone."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if outputs.get("aux_loss") is not None:
            self._router_losses[model.training].append(outputs["aux_loss"].detach().float())
        return (loss, outputs) if return_outputs else loss

    def _mean_router_loss(self, training: bool, steps: int | None) -> float:
        """Router loss since the last record: per optimizer step, or, in evaluation, per batch."""
        losses, self._router_losses[training] = self._router_losses[training], []
        if not losses:
            return 0.0
        total = self.accelerator.reduce(torch.stack(losses).sum(), "sum" if training else "mean")
        return total.item() / (steps or len(losses))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record `logs`, with bits per byte beside every loss, and speed, routers and spans since the last record."""
        counts = getattr(self.train_dataset, "counts", None)
        for name, training in (("loss", True), ("eval_loss", False)):
            if name in logs:
                steps = self.state.global_step - (self._step_of_log or 0) if training else None
                router_loss = self._mean_router_loss(training, steps)
                if counts is not None and counts.num_bytes:
                    bits = (logs[name] - router_loss) / math.log(2) * counts.tokens_per_byte
                    logs[name.replace("loss", "bits_per_byte")] = bits
        if "loss" in logs and self._tokens_since_log:
            self._step_of_log = self.state.global_step
            now = time.perf_counter()
            logs["tokens_per_second"] = self._tokens_since_log / (now - self._time_of_log)
            self._tokens_since_log, self._time_of_log = 0, now
        if "loss" in logs:
            logs |= router_health(self.model) | span_metrics(self.model)
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return self._redirect or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside the others and move it to its name when it is complete."""
        began = time.perf_counter()
        run_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial = run_dir / f".{name}.partial"
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        self.accelerator.wait_for_everyone()
        self._redirect = str(partial)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish_checkpoint(partial / name, run_dir / name)
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {run_dir / name} could not be written: {error}. {self._whole_checkpoint(run_dir)}"
            ) from error
        finally:
            self._redirect = None
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self._time_of_log is not None:  # writing is not training: leave it out of the speed
            self._time_of_log += time.perf_counter() - began

    def _publish_checkpoint(self, written: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(written):  # the path is part of what was written
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(written / "trainer_state.json"))
        if final.exists():  # from an earlier run in the same folder
            os.replace(final, written.parent / "replaced")
        os.replace(written, final)
        rotate_checkpoints(
            output_dir=str(final.parent),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    @staticmethod
    def _whole_checkpoint(run_dir: Path) -> str:
        steps = [path.name.rpartition("-")[2] for path in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
        newest = max((int(step) for step in steps if step.isdigit()), default=None)
        if newest is None:
            return "There is no earlier checkpoint"
        return f"The last whole checkpoint is {run_dir / f'{PREFIX_CHECKPOINT_DIR}-{newest}'}"
