"""Drivers, GPUs and torch that do not fit together, from what they report; no GPU is needed."""

import pytest
import torch

from app.engines import cuda, hardware, pytorch
from app.engines.cuda import Driver, Torch, has_kernels
from app.errors import DeviceError, DeviceLostError

DRIVER = Driver((13, 0), 1)
TORCH = Torch("2.14.1+cu130", "13.0", 1, "NVIDIA H100", (9, 0), ("sm_80", "sm_90", "compute_120"))
OLD_CARD = TORCH._replace(name="GeForce GTX 1080", capability=(6, 1))

OBSTACLES = [
    (None, TORCH, "there is no NVIDIA driver"),
    (Driver(None, 0, "no device (100)"), None, "the NVIDIA driver cannot be initialised: no device (100)"),
    (Driver((13, 0), 0), None, "the NVIDIA driver finds no GPU"),
    (DRIVER, None, "torch is not installed"),
    (Driver((12, 4), 1), TORCH._replace(devices=0), "the driver supports CUDA 12.4, torch 2.14.1+cu130 has CUDA 13.0"),
    (DRIVER, Torch("2.14.1+cpu", "", 0), "the driver supports CUDA 13.0, torch 2.14.1+cpu has none"),
    (DRIVER, OLD_CARD, "no kernels for GeForce GTX 1080 with compute capability 6.1; it has sm_80, sm_90, compute_120"),
]


@pytest.mark.parametrize(("driver", "found", "reason"), OBSTACLES)
def test_auto_falls_back_to_the_cpu_and_logs_why(
    driver: Driver | None, found: Torch | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert hardware.resolve_device("auto", lambda: driver, lambda: found) == "cpu"
    if driver is None:
        assert not caplog.records  # a machine without a driver needs no warning
    else:
        (record,) = caplog.records
        assert record.getMessage().startswith("falling back to the CPU: ")
        assert reason in record.getMessage()


@pytest.mark.parametrize(("driver", "found", "reason"), OBSTACLES)
def test_cuda_that_cannot_be_used_is_one_line(driver: Driver | None, found: Torch | None, reason: str) -> None:
    with pytest.raises(DeviceError) as error:
        pytorch.available_device("cuda", lambda: driver, lambda index: found)
    assert str(error.value).startswith("cuda is not available here: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_auto_is_cuda_where_all_fits(caplog: pytest.LogCaptureFixture) -> None:
    assert hardware.resolve_device("auto", lambda: DRIVER, lambda: TORCH) == "cuda"
    assert not caplog.records


def test_auto_does_not_import_torch_without_a_gpu() -> None:
    def query_torch() -> Torch:
        raise AssertionError

    for driver in (None, Driver((13, 0), 0), Driver(None, 0, "unknown (999)")):
        assert hardware.resolve_device("auto", lambda driver=driver: driver, query_torch) == "cpu"


def test_number_of_a_gpu_is_checked() -> None:
    assert pytorch.available_device("cuda:0", lambda: DRIVER, lambda index: TORCH) == torch.device("cuda:0")
    beyond = TORCH._replace(name="", capability=(0, 0), architectures=())
    with pytest.raises(DeviceError, match=r"cuda:3 is not available here: the number of GPUs is 1\."):
        pytorch.available_device("cuda:3", lambda: DRIVER, lambda index: beyond)


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), ("sm_90",), True),
        ((8, 9), ("sm_80", "sm_86"), True),
        ((8, 0), ("sm_86",), False),
        ((12, 0), ("sm_90",), False),
        ((12, 0), ("sm_90", "compute_90"), True),
        ((6, 1), ("sm_75", "compute_75"), False),
        ((9, 0), ("sm_90a",), True),
        ((10, 0), ("sm_90a", "compute_90a"), False),
        ((10, 3), ("sm_100f", "gfx942"), False),
    ],
)
def test_kernels_fit_a_compute_capability(
    capability: tuple[int, int], architectures: tuple[str, ...], runs: bool
) -> None:
    assert has_kernels(capability, architectures) == runs


def test_queries_report_this_machine() -> None:
    """Without a GPU both say so; with one they agree."""
    driver, found = cuda.query_driver(), cuda.query_torch()
    assert found is not None
    assert (driver is not None and driver.devices > 0) or found.devices == 0


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_dtype_is_that_of_the_chosen_gpu(capability: tuple[int, int], dtype: torch.dtype) -> None:
    queried: list[torch.device] = []

    def of_device(device: torch.device) -> tuple[int, int]:
        queried.append(device)
        return capability

    assert pytorch.pick_dtype(torch.device("cuda:1"), of_device) == dtype
    assert queried == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered\nCUDA kernel errors might be"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_errors_that_repeat_lose_the_device(error: RuntimeError, lost: bool) -> None:
    assert pytorch.is_device_lost(error) == lost


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to get 2 GB. See https://pytorch.org"),
            "cuda:0 has too little memory; a smaller MAX_BATCH needs less: CUDA out of memory. Tried to get 2 GB.",
        ),
        (
            torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nCompile"),
            "cuda:0 cannot run the network: CUDA error: no kernel image is available for execution on the device",
        ),
        (DeviceLostError("CUDA error: unknown error"), "cuda:0 cannot run the network: CUDA error: unknown error"),
    ],
)
def test_device_error_at_the_start_is_one_line(error: Exception, line: str) -> None:
    with pytest.raises(DeviceError) as raised, pytorch.start_errors(torch.device("cuda:0")):
        raise error
    assert str(raised.value) == line


def test_other_error_at_the_start_stays_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"), pytorch.start_errors(torch.device("cuda:0")):
        raise RuntimeError("shape mismatch")
