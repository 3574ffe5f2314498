"""Steps in float16 with loss scaling, reads every few steps, compiled networks, and images kept on a device."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.training import SMALL_RECIPE, equal, shades, small_trainer, state
from training import checkpoint, optimizers, train
from training.distributed import DistributedContext, join
from training.loader import Loader
from training.precision import Precision
from training.trainer import Diverged, Trainer

CPU = torch.device("cpu")
VAL = shades(30, seed=1)


def trainer_with(precision: Precision | None = None, compile_backend: str = "") -> Trainer:
    split = shades(60)
    network = train.build_network(SMALL_RECIPE, split, 3)
    loader = Loader(split, SMALL_RECIPE)
    return Trainer(network, SMALL_RECIPE, loader, CPU, compile_backend=compile_backend, precision=precision)


def test_float16_with_loss_scaling_learns(tmp_path: Path) -> None:
    trainer = trainer_with(Precision.of(CPU, torch.float16))
    trainer.fit(VAL, tmp_path, 60)
    assert trainer.history[-1].loss < trainer.history[0].loss
    saved = checkpoint.load(tmp_path / "checkpoint.pt")["scaler"]
    assert saved["scale"] == trainer.precision.scaler.get_scale() > 1


def test_bfloat16_needs_no_scaling() -> None:
    precision = Precision.of(CPU)
    assert precision.dtype is torch.bfloat16
    assert not precision.scaler.is_enabled()


def test_step_with_non_finite_gradients_is_skipped() -> None:
    network = nn.Linear(2, 1)
    sgd = torch.optim.SGD([{"params": list(network.parameters()), "lr": 0.1, "initial_lr": 0.1, "end_step": 10}])
    scaler = Precision.of(CPU, torch.float16).scaler
    before, scale = network.weight.clone(), scaler.get_scale()
    optimizers.update([sgd], network(torch.tensor([[1.0, torch.inf]])).sum(), 0, scaler)
    assert torch.equal(network.weight, before)
    assert scaler.get_scale() < scale
    optimizers.update([sgd], network(torch.ones(1, 2)).sum(), 1, scaler)
    assert not torch.equal(network.weight, before)


def test_scaler_continues_after_a_resume(tmp_path: Path) -> None:
    trainer = trainer_with(Precision.of(CPU, torch.float16))
    trainer.precision.scaler.load_state_dict(trainer.precision.scaler.state_dict() | {"scale": 123.0})
    trainer.fit(VAL, tmp_path, 60)
    resumed = trainer_with(Precision.of(CPU, torch.float16))
    resumed.load_state_dict(checkpoint.load(tmp_path / "checkpoint.pt"))
    assert resumed.precision.scaler.get_scale() == trainer.precision.scaler.get_scale()


def test_rare_reads_change_neither_weights_nor_metrics(tmp_path: Path) -> None:
    often, rarely = small_trainer(), small_trainer()
    rarely.read_steps = 20
    for name, trainer in (("often", often), ("rarely", rarely)):
        (tmp_path / name).mkdir()
        trainer.fit(VAL, tmp_path / name, 60)
    assert equal(state(often), state(rarely))
    for one, other in zip(often.history, rarely.history, strict=True):
        assert (one.loss, one.train_accuracy, one.val_accuracy) == (
            other.loss,
            other.train_accuracy,
            other.val_accuracy,
        )


def test_divergence_is_found_at_the_next_read(tmp_path: Path) -> None:
    trainer = small_trainer(SMALL_RECIPE.model_copy(update={"muon_lr": float("nan")}))
    trainer.read_steps = 3
    with pytest.raises(Diverged, match="The loss is nan at step 3"):
        trainer.fit(VAL, tmp_path, 60)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.slow
def test_compiled_network_trains_the_same_weights(tmp_path: Path) -> None:
    plain, compiled = trainer_with(), trainer_with(compile_backend="eager")
    for name, trainer in (("plain", plain), ("compiled", compiled)):
        (tmp_path / name).mkdir()
        trainer.fit(VAL, tmp_path / name, 60)
    assert equal(state(plain), state(compiled))


def test_processes_join_with_the_gpu_of_their_local_rank() -> None:
    calls: list[object] = []

    def init_process_group(backend: str, **options: object) -> None:
        calls.append((backend, options))

    join(torch.device("cuda"), 3, calls.append, init_process_group)
    assert calls == [torch.device("cuda:3"), ("nccl", {"device_id": torch.device("cuda:3")})]
    calls.clear()
    join(CPU, 3, calls.append, init_process_group)
    assert calls == [("gloo", {})]


def test_each_process_has_the_gpu_of_its_local_rank() -> None:
    context = DistributedContext(5, 8, 1)
    assert context.device(torch.device("cuda")) == torch.device("cuda:1")
    assert context.device(CPU) == CPU


def test_images_stay_on_the_device_of_the_loader() -> None:
    """The device `meta` has shapes and no pixels, so that a forgotten transfer fails here as on a GPU."""
    recipe = SMALL_RECIPE.model_copy(update={"cutout": 4, "random_crop_padding": 2})
    loader = Loader(shades(60), recipe, device=torch.device("meta"))
    for batch in loader.epoch(0):
        assert batch.images.device.type == batch.labels.device.type == "meta"
        assert batch.images.shape == (20, 12, 12, 3)
