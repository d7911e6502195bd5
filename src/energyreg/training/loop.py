"""The loop of a training: epochs, steps, validation, and when to stop.

Randomness: the order of the rows depends on (seed, epoch), the noise of the objective on (seed, step), dropout on
(seed, epoch, process). So there is no random state to store, and a resumed run continues as if nothing had happened.
All is drawn from generators of the training's own: the global random state of the caller is not touched.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from energyreg.progress import TrainingProgress, terminated_as_interrupted
from energyreg.randomness import RandomSource, draws_by_itself, mix
from energyreg.training import resume
from energyreg.training.data import Rows, TrainingData
from energyreg.training.failures import TrainingError, Watch
from energyreg.training.history import History, Sums
from energyreg.training.settings import DROPOUT, EVALUATION, NOISE, TrainingSettings
from energyreg.training.step import Batch, TrainingStep
from energyreg.training.trainable import Trainable

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Steps between two looks at the losses where a look would make the host wait for the device.
WINDOW = 32
VALIDATION_BYTES = 2**25
"""Working memory of the validation."""


@dataclass
class Job:
    """All that a process needs to train.

    Attributes:
        model: The model, or one that stands for `num_members` models.
        objective: What is minimised.
        data: What is read.
        settings: How.
        started: When the caller began.
        num_members: Members that all bookkeeping is by.
        process: The caller's process.
        scratch: File for the result of another process; None where the caller's own trains.
    """

    model: Trainable
    objective: Any
    data: TrainingData
    settings: TrainingSettings
    started: float
    num_members: int
    process: int
    scratch: Path | None

    @property
    def folder(self) -> Path | None:
        """Where the checkpoints are; None for none."""
        return None if self.settings.checkpoint_dir is None else Path(self.settings.checkpoint_dir)


class OutOfTimeError(Exception):
    """The time limit has passed."""


class Training:
    """The training of a model, or of the members of an ensemble that a model stands for: all bookkeeping is by member.

    What is particular to an ensemble is in the methods that its own kind of training overrides: `is_matrix`, `clip`,
    `models`, `keep` and `summary`.
    """

    def __init__(self, fabric: Fabric, job: Job) -> None:
        self.fabric, self.job, self.settings = fabric, job, job.settings
        self.model: Any = job.model  # a module beside being Trainable
        dtype = torch.float64 if job.settings.precision == "64-true" else next(job.model.parameters()).dtype
        fabric.to_device(self.model)
        for data in (job.data.training, job.data.validation):
            if data is not None:
                if job.folder is not None or fabric.world_size > 1:
                    data.describe()  # the values as they were given, whatever the precision of the training
                data.place(fabric, dtype)
        self.steps = job.data.training.num_batches()
        # A look at the loss costs nothing on one CPU process; then it comes before the weights are touched.
        self.eager = fabric.world_size == 1 and fabric.device.type == "cpu"
        self.scaled = job.settings.precision == "16-mixed" and fabric.device.type != "cpu"
        optimizer = self._make_optimizer()
        self.scheduler = self._make_scheduler(optimizer)
        step = TrainingStep(job.model, job.objective, job.num_members)
        self.module, self.optimizer = fabric.setup(step, optimizer)
        self.raw_optimizer = optimizer
        self.generator = torch.Generator(fabric.device)
        self.source = RandomSource(0)
        foreign = draws_by_itself(job.model, job.objective, *self.models())
        # What draws for modules that take no generator slows small networks down.
        self.drawing = self.source.everywhere if foreign else contextlib.nullcontext
        self.seeds = [job.settings.seed + member for member in range(job.num_members)]
        self.histories = [History() for _ in range(job.num_members)]
        self.epoch = 0
        averaged = job.settings.averaging is not None
        module: Any = job.model  # a module beside being Trainable
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad} if averaged else {}
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}
        self.kept = self.copy_weights()  # the best weights so far; without validation the last
        rows = job.data.training.rows if isinstance(job.data.training, Rows) else None
        self.watch = Watch(fabric, job.settings, job.num_members, self.steps, self.scaled, rows)
        self.finished = False
        self.earlier_seconds = 0.0
        self.warned = False
        self.pending: list[tuple[int, Batch, Tensor]] = []
        self.deadline = math.inf if self.settings.time_limit is None else job.started + self.settings.time_limit
        self.out_of_time = False
        self.step_seconds = self.validation_seconds = 0.0
        self.progress = TrainingProgress(
            self.settings.progress if fabric.is_global_zero else False, job.settings.epochs, self.steps
        )
        if fabric.world_size > 1:
            self._compare_processes()

    def _compare_processes(self) -> None:
        """Stop in all processes if one has other data or settings, as in a script that draws data without a seed."""
        here = resume.conditions(self)
        differences = list(resume.differences(self.fabric.broadcast(here), here))
        worst = self.fabric.all_reduce(torch.tensor(float(bool(differences))), reduce_op="sum")
        if float(worst) > 0:  # type: ignore[arg-type]
            found = f" Here: {differences[0]}." if differences else ""
            raise ValueError(
                "The processes were given different data or settings, but each must be given the same, of which it "
                f"then takes its share. Seed whatever makes the data.{found}"
            )

    @staticmethod
    def is_matrix(parameter: Tensor) -> bool:
        """Whether a parameter gets weight decay."""
        return parameter.ndim >= 2

    def _make_optimizer(self) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if self.is_matrix(p)], "weight_decay": self.settings.weight_decay},
            {"params": [p for p in parameters if not self.is_matrix(p)], "weight_decay": 0.0},
        ]
        # The fused kernel is five times as fast for small networks, but cannot be combined with a loss scale and
        # clipping.
        fused = self.fabric.device.type in ("cpu", "cuda") and not self.scaled
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=self.settings.learning_rate, fused=fused
        )

    def _make_scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        total, schedulers = self.settings.epochs * self.steps, torch.optim.lr_scheduler
        if self.settings.schedule == "one-cycle":
            # One step more than there are, so that the last step comes before the end; and torch divides by zero where
            # the way up has less than two steps.
            total = max(total + 1, 4)
            return schedulers.OneCycleLR(
                optimizer, self.settings.learning_rate, total_steps=total, pct_start=max(0.1, 2 / total)
            )
        if self.settings.schedule == "cosine":
            return schedulers.CosineAnnealingLR(optimizer, total)
        return schedulers.ConstantLR(optimizer, factor=1.0, total_iters=0)

    def run(self) -> list[History]:
        if self.settings.resume and self.job.folder is not None:
            resume.resume(self, self.job.folder / resume.LAST)
        try:
            if not self.finished:
                with self.source.in_use(), terminated_as_interrupted():
                    self._loop()
        except KeyboardInterrupt:
            self.stop_on_interrupt()
        except TrainingError as error:
            self.restore()
            one = self.job.num_members == 1
            whose, model = ("its", "The model has") if one else ("their", "The members have")
            state = f"weights {self.kept_epoch()}" if self.epoch else "initial weights, as no epoch was complete"
            raise TrainingError(f"{error} {model} {whose} {state}.") from None
        finally:
            self.progress.stop()
            self.model.zero_grad()
            self.model.eval()
        return self.histories

    def _loop(self) -> None:
        self.progress.start(self.epoch)
        while self.epoch < self.settings.epochs and not self.histories[0].stopped_early:
            started = time.perf_counter()
            self.source.seed(mix(self.settings.seed, DROPOUT, self.epoch, self.fabric.global_rank))
            self.model.train()
            sums = Sums(self.job.num_members)
            number = 0
            for number, batch in enumerate(self.job.data.training.batches(self.epoch, self.seeds, self.fabric), 1):
                self._step(number - 1, batch, sums)
                if self._time_is_up(number, started):
                    break
            self._flush(sums)
            if self.out_of_time and number < self.steps:
                self._end_in_the_middle(sums, started, number)
                return
            try:
                self._end_epoch(sums, started)
            except OutOfTimeError:
                self.stop_on_time_limit(self.steps)
                return
            over = self.epoch >= self.settings.epochs or self.histories[0].stopped_early
            if not over and self._time_is_up(0, started):
                self.stop_on_time_limit(0)
                return
        self.restore()
        self.finished = True
        self._take_time()
        resume.save(self)

    def _time_is_up(self, number: int, started: float) -> bool:
        """Whether a further step, and the validation after it, would probably end after the time limit.

        Args:
            number: Steps of this epoch that were made; 0 between two epochs.
            started: When the epoch began.
        """
        if self.settings.time_limit is None:
            return False
        now = time.perf_counter()
        if number:
            self.step_seconds = (now - started) / number
        late = now + self.step_seconds + self.validation_seconds >= self.deadline
        if self.fabric.world_size == 1:
            self.out_of_time = late
        elif number % WINDOW == 0:  # all processes must stop at the same step
            self.out_of_time = bool(self.fabric.broadcast(late))
        return self.out_of_time

    def _end_in_the_middle(self, sums: Sums, started: float, number: int) -> None:
        """Let the weights of an epoch that was cut short compete with those of the others, if there is time."""
        checkpointed = self.epoch
        if checkpointed or self.job.data.validation is None:
            # The last checkpoint stays that of a whole epoch, from which an exact continuation is possible.
            with contextlib.suppress(OutOfTimeError):
                self._end_epoch(sums, started, whole=False)
        self.stop_on_time_limit(number, checkpointed)

    def stop_on_time_limit(self, number: int, epoch: int | None = None) -> None:
        """End with the best weights so far, as the time is up.

        Args:
            number: Steps of the epoch that were made.
            epoch: Whole epochs; by default `self.epoch`.
        """
        epoch = self.epoch if epoch is None else epoch
        for history in self.histories:
            history.timed_out = True
        self._take_time()
        if self.epoch > 0:
            self.restore()
        if self.fabric.is_global_zero:
            self.progress.stop()
            after = f"{number} of {self.steps} steps of epoch {epoch + 1}" if number else f"epoch {epoch}"
            warnings.warn(
                f"Training stopped after {after} of {self.settings.epochs}, as its time of "
                f"{self.settings.time_limit:.3g} s was up; {self._who_has()} "
                f"{self._which_weights()}.{self._how_to_resume()}",
                stacklevel=2,
            )

    def _take_time(self) -> None:
        for history in self.histories:
            history.total_seconds = self.earlier_seconds + time.perf_counter() - self.job.started

    def _step(self, number: int, batch: Batch, sums: Sums) -> None:
        step = self.epoch * self.steps + number
        self.optimizer.zero_grad()
        # The same in every process: noise that the rows of a batch share must be the same for all of them.
        self.generator.manual_seed(mix(self.settings.seed, NOISE, step))
        with self.drawing():
            loss = self.module(batch, self.generator)
        if self.eager:
            self.watch.check_losses(batch.loss.tolist(), self.epoch, number, batch)
        self.fabric.backward(loss)
        norm = self.clip(math.inf if self.settings.gradient_clip is None else self.settings.gradient_clip)
        if self.eager:
            self.watch.check_norms(norm.tolist(), self.epoch, number, batch)
        self.optimizer.step()
        self.scheduler.step()
        if self.average:
            self._add_to_average(step + 1)
        if batch.rows is None and isinstance(batch.x, Tensor) and not self.eager:
            batch.finite = batch.x.isfinite().all()
        batch.x = None  # it may be large, and the losses of many steps wait to be looked at
        self.pending.append((number, batch, norm))
        if len(self.pending) >= WINDOW:
            self._flush(sums)

    @torch.no_grad()
    def _add_to_average(self, step: int) -> None:
        """Let the weights after a step, counted from 1, enter their average."""
        assert self.settings.averaging is not None
        share = (self.settings.averaging + 1) / (self.settings.averaging + step)
        torch._foreach_lerp_(list(self.average.values()), list(self.trained.values()), share)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the average of the weights in their place; in place, as the members of an ensemble are views of them."""

        @torch.no_grad()
        def swap() -> None:
            for name, parameter in self.trained.items():
                current = parameter.detach().clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(current)

        swap()
        try:
            yield
        finally:
            swap()

    def clip(self, limit: float) -> Tensor:
        """Limit the norm of the gradient, and return what it was, one a member, shape (S,)."""
        norm = self.fabric.clip_gradients(self.module, self.optimizer, max_norm=limit, error_if_nonfinite=False)
        assert norm is not None
        return norm[None]

    def _flush(self, sums: Sums) -> None:
        """Look at the losses of the last steps: one wait for the device, one message between processes."""
        if not self.pending:
            return
        pending, self.pending = self.pending, []
        losses = torch.stack([batch.loss for _, batch, _ in pending]).double()
        values = torch.stack([losses, torch.stack([norm for _, _, norm in pending]).double()], 1)  # (W, 2, S)
        if self.fabric.world_size > 1:
            values = self.fabric.all_reduce(values, reduce_op="mean")  # type: ignore[assignment]
        for (number, batch, _), (loss, norm) in zip(pending, values.tolist(), strict=True):
            if not self.eager:
                self.watch.check_losses(loss, self.epoch, number, batch)
                self.watch.check_norms(norm, self.epoch, number, batch)
            sums.add_losses(loss)
        sums.add_diagnostics([batch for _, batch, _ in pending])
        means = sums.mean_losses()
        self.progress.step(self.epoch, pending[-1][0] + 1, sum(means) / len(means))

    def models(self) -> Sequence[Trainable]:
        """The members, for validation."""
        return [self.model]

    @torch.no_grad()
    def _validate(self, model: Trainable) -> float:
        """The weighted mean of -log p(y|x) over the validation data.

        Raises:
            OutOfTimeError: If the time is up before it is known, in a single process.
        """
        assert self.job.data.validation is not None
        # All processes must see a shuffling loader in the same order.
        self.source.seed(mix(self.settings.seed, EVALUATION, self.epoch))
        total = torch.zeros(2, dtype=torch.float64)
        for x, y, weights in self.job.data.validation.pairs(self.fabric, max(self.job.data.batch_size, 1024)):
            if self.fabric.world_size == 1 and time.perf_counter() >= self.deadline:
                raise OutOfTimeError
            with self.drawing():
                nll = -model(x, memory_budget=VALIDATION_BYTES).log_prob(y).double().cpu()
            weights = torch.ones_like(nll) if weights is None else weights.cpu()
            total += torch.stack([(nll * weights).sum(), weights.sum()])
        if self.fabric.world_size > 1:
            summed = self.fabric.all_reduce(self.fabric.to_device(total), reduce_op="sum")
            total = summed.cpu()  # type: ignore[union-attr]
        return float(total[0] / total[1])

    def _end_epoch(self, sums: Sums, started: float, whole: bool = True) -> None:
        learning_rate = float(self.scheduler.get_last_lr()[0])
        diagnostics = sums.mean_diagnostics(self.fabric)
        with self.averaged():
            nlls = self._validation_nlls()
            self.epoch += 1
            for member, (history, loss) in enumerate(zip(self.histories, sums.mean_losses(), strict=True)):
                history.train_loss.append(loss)
                history.learning_rate.append(learning_rate)
                for name, values in diagnostics.items():
                    history.diagnostics.setdefault(name, []).append(values[member])
                if nlls is not None:
                    history.validation_nll.append(nlls[member])
                    best = history.best_validation_nll
                    if best is None or nlls[member] < best:
                        history.best_epoch = self.epoch
                        self.keep(member)
            if nlls is None:
                self.kept = self.copy_weights()
        patience = self.settings.patience
        if patience is not None and self.epoch - max(history.best_epoch or 0 for history in self.histories) >= patience:
            for history in self.histories:
                history.stopped_early = self.epoch < self.settings.epochs
        for history in self.histories:
            history.seconds.append(time.perf_counter() - started)
        self._take_time()
        self.progress.epoch(self.epoch, self.summary())
        if whole:
            resume.save(self)

    def _validation_nlls(self) -> list[float] | None:
        """The members' validation NLLs; None without validation data."""
        if self.job.data.validation is None:
            return None
        self.model.eval()
        before = time.perf_counter()
        nlls = [self._validate(model) for model in self.models()]
        self.validation_seconds = time.perf_counter() - before
        self.watch.check_validation(nlls, self.epoch)
        return nlls

    def summary(self) -> History:
        """What the progress shows."""
        return self.histories[0]

    def copy_weights(self) -> dict[str, Any]:
        return {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in self.model.state_dict().items()
        }

    def keep(self, member: int) -> None:
        """Keep the weights that a member has now as its best."""
        self.kept = self.copy_weights()

    def restore(self) -> None:
        self.model.load_state_dict(self.kept)

    def kept_epoch(self) -> str:
        """Which weights are kept, in words."""
        if self.job.num_members > 1 and self.histories[0].best_epoch is not None:
            return f"of their best epochs up to {self.epoch}"
        return f"of epoch {self.histories[0].best_epoch or self.epoch}"

    def stop_on_interrupt(self) -> None:
        for history in self.histories:
            history.interrupted = True
        self._take_time()
        if self.epoch > 0:
            self.restore()
        if self.fabric.is_global_zero:
            self.progress.stop()
            warnings.warn(
                f"Training was interrupted in epoch {self.epoch + 1} of {self.settings.epochs}; "
                f"{self._who_has()} {self._which_weights()}.{self._how_to_resume()}",
                stacklevel=2,
            )

    def _who_has(self) -> str:
        return "the model has" if self.job.num_members == 1 else "the members have"

    def _which_weights(self) -> str:
        if self.epoch == 0:
            return "the current weights, as no epoch was complete"
        return f"the weights {self.kept_epoch()}"

    def _how_to_resume(self) -> str:
        if self.job.folder is None or self.epoch == 0:
            return ""
        return f" Call {'fit' if self.job.num_members == 1 else 'fit_ensemble'}(..., resume=True) to continue."
