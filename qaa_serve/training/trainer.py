"""transformers' Trainer, with checkpoints of the trained parameters only, an order of rows that a resumed
training repeats exactly, and figures of time and memory."""

from __future__ import annotations

import math
import os
import resource
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_pt_utils import get_length_grouped_indices

from qaa_serve.training.errors import TrainingError
from qaa_serve.training.loss import row_losses
from qaa_serve.training.options import TrainOptions

_WEIGHTS = "trained.safetensors"
_COMPLETE = "complete"


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose checkpoints hold what is trained, whatever the method.

    Args:
        lengths: tokens of each row of ``train_dataset``: rows of like length share a batch.
        scores: of a model, by name, to be taken at each evaluation beside the loss; None: none.
        **options: Trainer's own.
    """

    def __init__(
        self, *, lengths: list[int], scores: Callable[[nn.Module], dict[str, float]] | None, **options: Any
    ) -> None:
        super().__init__(**options)
        self._lengths, self._scores = lengths, scores
        self._unread: list[tuple[int, float | None, float | None, torch.Tensor, Any]] = []
        self.saved_for_backward: int | None = None
        self.order: LengthGrouped | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.order = LengthGrouped(self._lengths, batch, self.args.seed)
        return self.order

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's; the first one in training counts the bytes that are kept for the backward pass."""
        if self.saved_for_backward is not None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with SavedBytes(model) as saved:
            result = super().compute_loss(model, inputs, *args, **kwargs)
        self.saved_for_backward = saved.total
        return result

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The loss over the evaluation rows, a share a process, and scores. Trainer's own is a mean of means."""
        rows = self.eval_dataset.rows[self.args.process_index :: self.args.world_size]
        sums = row_losses(self.model, rows, self.args.eval_batch_size).sum(0)
        loss, tokens = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        metrics = {"eval_loss": loss / tokens}
        if self._scores is not None:
            metrics |= {f"eval_{name}": score for name, score in self._scores(self.model).items()}
        self.log(dict(metrics))  # which adds the epoch
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """Keeps the figures of each step where they are, and reads them together where a log or checkpoint is due.

        A training on a GPU so waits for none of its steps, and the history has every one.
        """
        step, control = self.state.global_step, self.control
        if step > self._globalstep_last_logged + len(self._unread):
            self._unread.append((step, self.state.epoch, kwargs.get("learning_rate"), tr_loss.clone(), grad_norm))
            tr_loss -= tr_loss
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self._read()
        control.should_log = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _read(self) -> None:
        if not self._unread:
            return
        losses = self.accelerator.reduce(torch.stack([loss for *_, loss, _ in self._unread]), "mean").tolist()
        for (step, epoch, rate, _, norm), loss in zip(self._unread, losses, strict=True):
            logs = {"loss": loss, "learning_rate": rate}
            if norm is not None:
                logs["grad_norm"] = float(norm)
            if step < self.state.global_step:
                self.state.log_history.append({**logs, "epoch": epoch, "step": step})
        self._total_loss_scalar += sum(losses)
        self._globalstep_last_logged = self.state.global_step
        self._unread = []
        self.log(logs)

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self._trained().items()}, directory / _WEIGHTS)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(*args, **kwargs)
            if self.args.should_save:
                (directory / _COMPLETE).touch()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError for a full disk
            raise TrainingError(
                f"checkpoint {directory} cannot be written: {error}. Free some space and go on with --resume"
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        # The main process writes it before, and removes it when it has saved what was trained.
        self.accelerator.wait_for_everyone()
        self._load(Path(self.state.best_model_checkpoint))
        self.accelerator.wait_for_everyone()

    def _load(self, directory: Path) -> None:
        tensors = load_file(directory / _WEIGHTS)
        with torch.no_grad():
            for name, tensor in self._trained().items():
                tensor.copy_(tensors[name])


def planned_steps(options: TrainOptions, rows: int, processes: int = 1) -> int:
    """Optimiser steps of a training over so many rows, as Trainer counts them."""
    if options.max_steps is not None:
        return options.max_steps
    batches = math.ceil(rows / (options.batch_size * processes))
    return math.ceil(options.epochs * math.ceil(batches / options.grad_accum))


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    found = [path.parent for path in directory.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def drop_incomplete(directory: Path) -> None:
    """Remove checkpoints that an interrupted process left half-written."""
    for path in directory.glob("checkpoint-*"):
        if not (path / _COMPLETE).exists():
            shutil.rmtree(path)


class LengthGrouped(Sampler[int]):
    """Rows in random order, of like length within a batch; the order depends on seed and epoch alone."""

    def __init__(self, lengths: list[int], batch: int, seed: int) -> None:
        self._lengths, self._batch, self._seed = lengths, batch, seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + 1_000_003 * self._epoch)
        return iter(get_length_grouped_indices(self._lengths, self._batch, generator=generator))


class Flow(TrainerCallback):  # type: ignore[misc]
    """Times the steps, sets the epoch's order, evaluates the last step, and stops where a signal asks for it.

    As a context it takes SIGINT and SIGTERM: at the first one the step is finished and a checkpoint written; a
    second one interrupts at once. With several processes signals keep their usual effect, since the processes
    would not stop at the same step.

    Attributes:
        step_seconds: duration of each step, without evaluation and checkpoints.
        stopped_by: the signal that ended the training, None without one.
    """

    def __init__(self, trainer: AdapterTrainer, evaluates: bool, handles_signals: bool) -> None:
        self._trainer, self._evaluates = trainer, evaluates
        self._handles_signals = handles_signals and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}
        self._begun = 0.0
        self.step_seconds: list[float] = []
        self._events: list[tuple[Any, Any]] = []  # of CUDA, which the host runs ahead of
        self.stopped_by: int | None = None

    def __enter__(self) -> Flow:
        if self._handles_signals:
            self._before = {
                number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = number
        self._give_back()

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before the order of the epoch's rows is asked for."""
        if self._trainer.order is not None:
            self._trainer.order.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the clock."""
        self._begun = time.perf_counter()
        if torch.cuda.is_available():
            event: Any = torch.cuda.Event
            self._events.append((event(enable_timing=True), event(enable_timing=True)))
            self._events[-1][0].record()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """Stops the clock; the last step is always evaluated and saved, so that it can be the best."""
        self.step_seconds.append(time.perf_counter() - self._begun)
        if self._events:
            self._events[-1][1].record()
        if state.global_step >= state.max_steps:
            control.should_evaluate = self._evaluates
            control.should_save = True
        elif self.stopped_by is not None:
            control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        """The last step's evaluation was not to be followed by that of its epoch; nor a signal's checkpoint."""
        if state.global_step >= state.max_steps or self.stopped_by is not None:
            control.should_evaluate = control.should_save = False
        return control

    @property
    def seconds_per_step(self) -> float:
        """Median over the steps but the first, which warms up."""
        if self._events:
            torch.cuda.synchronize()
            self.step_seconds = [begin.elapsed_time(end) / 1e3 for begin, end in self._events]
        return statistics.median(self.step_seconds[1:] or self.step_seconds or [0.0])


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps for the backward pass: each storage once, a model's parameters left out.

    Attributes:
        total: bytes.
    """

    def __init__(self, model: nn.Module) -> None:
        kept = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        alive: list[torch.Tensor] = []  # an address may be used again once its tensor is gone
        self.total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
                storage = part.untyped_storage()
                if storage.data_ptr() not in kept:
                    kept.add(storage.data_ptr())
                    alive.append(part.detach())
                    self.total += storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:  # type: ignore[override]
        super().__enter__()
        return self


class PeakMemory:
    """From its making to ``peak()``: the most memory that was resident."""

    def __init__(self) -> None:
        self.start = _status("VmRSS")
        self._resets = False
        try:  # Linux: the kernel's high-water mark begins anew
            Path("/proc/self/clear_refs").write_text("5")
            self._resets = True
        except OSError:
            pass
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes; where the mark cannot be reset, since the process began."""
        mark = _status("VmHWM") if self._resets else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        return max(mark, self.start)  # the kernel's two counters are not quite in step


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(key)), 0)


def world_size() -> int:
    """Number of processes that torchrun or accelerate started for this training."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that writes and talks."""
    return int(os.environ.get("RANK", "0")) == 0
