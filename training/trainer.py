"""The training loop, top to bottom: steps, epochs, checkpoints, interruption, metrics log, weight averaging."""

import copy
import math
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn
from tqdm import tqdm

from app.errors import ThirtytwoError
from training import checkpoint, metrics, optimizers
from training.data import Split
from training.distributed import DistributedContext, StopSignals
from training.history import Epoch, MetricsLogger
from training.loader import Batch, Loader
from training.precision import Precision
from training.recipe import Recipe

BN_BATCHES = 10  # batches for the batch-norm statistics of an averaged network
READ_STEPS = 20  # on a GPU: steps between reads of loss and stop signals, each of which waits for the GPU


class Diverged(ThirtytwoError):
    """Loss or weights are not finite."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; the checkpoint is written."""


class Trainer:
    """A network in training. `fit` runs the loop; `state_dict` and `load_state_dict` make it resumable at any step."""

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        loader: Loader,
        device: torch.device,
        context: DistributedContext | None = None,
        compile_backend: str = "",
        precision: Precision | None = None,
    ) -> None:
        """`compile_backend` is one of torch.compile, or empty. `precision` is by default that of the device."""
        self.network = network.to(device).to(memory_format=torch.channels_last)  # the layout of the images, and faster
        self.recipe, self.loader, self.device = recipe, loader, device
        self.context = context or DistributedContext()
        self.precision = precision or Precision.of(device)
        self.read_steps = 1 if device.type == "cpu" else READ_STEPS
        steps_per_epoch = loader.steps_per_epoch
        self.total_steps = recipe.max_steps or math.ceil(recipe.epochs * steps_per_epoch)
        self.optimizers = optimizers.build(self.network, recipe, loader.batch_size, self.total_steps, steps_per_epoch)
        self.step, self.seconds = 0, 0.0
        self.history: list[Epoch] = []
        # For the checkpoint: of the training data, and the state of `training.plan.Plan`.
        self.fingerprint: dict[str, Any] = {}
        self.plan: dict[str, Any] = {}
        # Earlier weights of this network to average with the final ones: the initial and the previously final ones.
        self.averaged_checkpoints: list[checkpoint.State] = []
        if recipe.average_checkpoints and recipe.initial_weights:
            self.averaged_checkpoints.append(copy.deepcopy(self.network.state_dict()))
        self._class_weights = loader.class_weights.to(device) if recipe.class_balance == "weights" else None
        parallel = self.context.wrap(self.network)
        self._parallel_network: nn.Module = (
            torch.compile(parallel, backend=compile_backend) if compile_backend else parallel  # type: ignore[assignment]
        )

    def fit(self, val: Split, run_dir: Path, checkpoint_interval_s: float, tensorboard: bool = False) -> None:
        """Trains from the current step to the last, with checkpoint.pt and metrics.jsonl in the run's folder.

        Raises Diverged, Interrupted, OSError for a full disk, or SettingsError where TensorBoard is not installed.
        """
        metrics_logger = MetricsLogger(run_dir, self.history, tensorboard) if self.context.is_main else None
        checkpoint_file, saved_at = run_dir / "checkpoint.pt", time.monotonic()
        hide_bar = not self.context.is_main or None  # None: shown where stderr is a terminal
        with StopSignals() as stop:
            while self.step < self.total_steps:
                epoch, first_step = divmod(self.step, self.loader.steps_per_epoch)
                # The first epoch after a resume starts in the middle, the last one may end there.
                steps = min(self.loader.steps_per_epoch - first_step, self.total_steps - self.step)
                samples, epoch_start = 0, time.monotonic()
                totals = self._zeros()  # loss and correct predictions
                self._set_train_mode()  # validation has set evaluation mode
                with tqdm(total=steps, desc=f"epoch {epoch + 1}", unit="batch", leave=False, disable=hide_bar) as bar:
                    read_at = time.monotonic()
                    for i, batch in enumerate(islice(self.loader.epoch(epoch, first_step), steps), start=1):
                        step_start = time.monotonic() if self.read_steps == 1 else read_at
                        totals += self._train_step(batch)
                        samples += len(batch.labels)
                        bar.update()
                        if i % self.read_steps and i != steps:
                            continue
                        loss_sum, correct = self._read(totals)
                        read_at = time.monotonic()
                        self.seconds += read_at - step_start  # on a CPU without the loader's augmentation
                        rate = self.context.world_size * samples / (read_at - epoch_start)
                        status = f"{rate:.0f} images/s, loss {loss_sum / samples:.3f}, accuracy {correct / samples:.2%}"
                        bar.set_postfix_str(status, refresh=False)  # `update` refreshes at the bar's own interval
                        if i == steps:
                            break  # the epoch's metrics belong into its last checkpoint, so they come first
                        if time.monotonic() - saved_at > checkpoint_interval_s:
                            self._save(checkpoint_file)
                            saved_at = time.monotonic()
                        self._raise_if_stopped(stop, checkpoint_file)
                loss_sum, correct, count = self.context.all_reduce_sum(loss_sum, correct, samples)
                epoch_s = time.monotonic() - epoch_start
                val_logits = metrics.predict_logits(self.network, val.images)
                val_accuracy = metrics.accuracy(val_logits, val.labels)
                val_loss = F.cross_entropy(val_logits, val.labels).item()
                rate, loss, accuracy = count / epoch_s, loss_sum / count, correct / count
                self.history.append(Epoch(epoch + 1, self.seconds, rate, loss, accuracy, val_accuracy, val_loss))
                self._save(checkpoint_file)  # includes the history, from which metrics.jsonl is restored
                saved_at = time.monotonic()
                if metrics_logger:
                    metrics_logger.log(self.history[-1])
                    self._print_epoch()
                self._raise_if_stopped(stop, checkpoint_file)

    def final_network(self) -> nn.Module:
        """The trained network, or its average with `averaged_checkpoints` if the recipe has one."""
        if not (self.recipe.average_checkpoints and self.averaged_checkpoints):
            return self.network
        # Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407): the mean of several optima of a run is
        # better than each. The last update copies the buffers, so that frozen batch norms keep the final statistics.
        averaged, earlier = AveragedModel(self.network), copy.deepcopy(self.network)
        for state in self.averaged_checkpoints:
            earlier.load_state_dict(state)
            averaged.update_parameters(earlier)
        averaged.update_parameters(self.network)
        network: nn.Module = averaged.module
        if not self.recipe.freeze_bn:
            batches = islice(self.loader.epoch(len(self.history)), BN_BATCHES)
            with self.precision.autocast():  # as in training
                update_bn((batch.images.to(self.device).permute(0, 3, 1, 2) for batch in batches), network)
        return network.eval()

    def state_dict(self) -> checkpoint.State:
        """The content of a checkpoint; raises Diverged, so that broken weights never replace sound ones."""
        if not all(torch.isfinite(value).all() for value in self.network.state_dict().values()):
            raise Diverged(f"Non-finite weight at step {self.step}; a lower learning rate may help.")
        return checkpoint.state_dict(self.network, self.optimizers) | {
            "recipe": self.recipe.model_dump(),
            "fingerprint": self.fingerprint,
            "plan": self.plan,
            "averaged_checkpoints": self.averaged_checkpoints,
            "scaler": self.precision.scaler.state_dict(),
            "total_steps": self.total_steps,
            "step": self.step,
            "seconds": self.seconds,
            "history": [tuple(epoch) for epoch in self.history],
        }

    def load_state_dict(self, state: checkpoint.State) -> None:
        """Resumes from a checkpoint. Learning rates and their end steps are those of this trainer's recipe.

        A finished run that continues for longer keeps its final weights for the average, if the recipe averages.
        """
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        schedules = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        checkpoint.load_state_dict(self.network, self.optimizers, state)
        # The optimizers' own load_state_dict replaces the groups, with the schedule of the checkpoint's recipe.
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        for group, schedule in zip(groups, schedules, strict=True):
            group.update(schedule)
        self.precision.scaler.load_state_dict(state.get("scaler") or self.precision.scaler.state_dict())
        self.step, self.seconds = state["step"], state["seconds"]
        # `ends` is the name in checkpoints from before 0.1.
        self.averaged_checkpoints = state["averaged_checkpoints" if "averaged_checkpoints" in state else "ends"]
        if self.recipe.average_checkpoints and state["total_steps"] <= self.step < self.total_steps:
            self.averaged_checkpoints.append(state["network"])
        self.history = [Epoch(*epoch) for epoch in state["history"]]

    def _train_step(self, batch: Batch) -> Tensor:
        """One optimizer step; summed loss and number of correct predictions of this process's images, float32 [2]."""
        if self.context.world_size == 1:  # DistributedDataParallel fixes the set of gradients at its start
            optimizers.freeze_finished_groups(self.optimizers, self.step)
        images = batch.images.to(self.device).permute(0, 3, 1, 2)  # uint8 [N, 3, S, S]
        labels = batch.labels.to(self.device)
        with self.precision.autocast():
            logits = self._parallel_network(images)  # float32 [N, classes], as all networks return them
        loss = self._loss(logits, labels, batch.targets)
        if self.read_steps == 1:
            self._check_finite(loss.item())
        # Muon's SGD rates are for the sum over the whole batch, but the processes' gradients are averaged. The other
        # optimizers' rates are for the mean.
        scale = self.context.world_size if self.recipe.optimizer == "muon" else 1 / len(labels)
        optimizers.update(self.optimizers, loss * scale, self.step, self.precision.scaler)
        self.step += 1
        return torch.stack((loss.detach(), (logits.argmax(1) == labels).sum()))

    def _zeros(self) -> Tensor:
        """Two sums on the device; float64, since a sum of losses over an epoch loses digits in float32."""
        return torch.zeros(2, dtype=torch.float32 if self.device.type == "mps" else torch.float64, device=self.device)

    def _read(self, totals: Tensor) -> tuple[float, float]:
        """Loss and correct predictions so far; waits for the device. Raises Diverged."""
        loss_sum, correct = totals.tolist()
        self._check_finite(loss_sum)
        return loss_sum, correct

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise Diverged(f"The loss is {loss} at step {self.step}; a lower learning rate may help.")

    def _loss(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        """Cross-entropy summed over the batch, for the labels and where there is a teacher for its targets."""
        # Sums, because Muon's SGD rates are per image; `_train_step` scales for the other optimizers.
        weights = self._class_weights
        hard = F.cross_entropy(logits, labels, weights, label_smoothing=self.recipe.label_smoothing, reduction="sum")
        if targets is None:
            return hard
        soft = F.cross_entropy(logits, targets.to(self.device), reduction="sum")
        return torch.lerp(hard, soft, self.recipe.distill_weight)

    def _set_train_mode(self) -> None:
        """Training mode, except for batch norms that the recipe freezes."""
        self.network.train()
        if self.recipe.freeze_bn:
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()  # uses the stored statistics and does not update them

    def _save(self, file: Path) -> None:
        if self.context.is_main:
            checkpoint.save(file, self.state_dict())

    def _raise_if_stopped(self, stop: StopSignals, file: Path) -> None:
        """Every process must call it: a signal to one of them stops all at the same step."""
        if self.context.all_reduce_sum(stop.received)[0] > 0:
            self._save(file)
            raise Interrupted(f"Interrupted at step {self.step} of {self.total_steps}; a resumed run continues here.")

    def _print_epoch(self) -> None:
        epoch = self.history[-1]
        remaining_s = (self.total_steps - self.step) * self.seconds / self.step
        print(
            f"epoch {epoch.epoch:3d}  loss {epoch.loss:.3f}  train {epoch.train_accuracy:.2%}  "
            f"val loss {epoch.val_loss:.3f}  val {epoch.val_accuracy:.2%}  {epoch.images_per_s:.0f} images/s  "
            f"{epoch.seconds:.0f} s, {remaining_s:.0f} s left",
            flush=True,
        )
