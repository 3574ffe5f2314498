"""The Open Inference Protocol as its own client speaks it, in both its forms; and the examples of the documents."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

from app import engines
from app.model import weights
from app.model.preprocessing import Limits, decode
from tests.conftest import CLASSES, EXAMPLES

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "open-inference-protocol.md").read_text()

FILES = [(EXAMPLES / f"{name}.png").read_bytes() for name in CLASSES]
PIXELS = np.stack([decode(file, Limits(32, 10**7)).pixels for file in FILES])

Ask = Callable[..., Any]


def address(client: httpx.Client) -> str:
    return f"{client.base_url.host}:{client.base_url.port}"


@pytest.fixture(params=["sync", "asyncio"])
def ask(client: httpx.Client, request: pytest.FixtureRequest) -> Iterator[Ask]:
    """Calls a method of the client."""
    if request.param == "sync":
        with triton.InferenceServerClient(address(client)) as server:
            yield lambda method, *args, **options: getattr(server, method)(*args, **options)
        return

    async def call(method: str, args: Any, options: Any) -> Any:
        async with aio.InferenceServerClient(address(client)) as server:
            return await getattr(server, method)(*args, **options)

    yield lambda method, *args, **options: asyncio.run(call(method, args, options))


@pytest.fixture(scope="module")
def expected(tiny_weights: Path) -> Any:
    return engines.load(weights.load(tiny_weights))(PIXELS).probabilities


def pixels(images: Any = PIXELS, binary: bool = True, name: str = "image") -> triton.InferInput:
    given = triton.InferInput(name, list(images.shape), "UINT8")
    return given.set_data_from_numpy(images, binary_data=binary)


def files(contents: list[bytes]) -> triton.InferInput:
    given = triton.InferInput("image", [len(contents)], "BYTES")
    return given.set_data_from_numpy(np.array(contents, object))


def wanted(**options: Any) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput("probabilities", **options)]


def test_the_server_is_alive_and_ready(ask: Ask) -> None:
    assert ask("is_server_live")
    assert ask("is_server_ready")
    assert ask("is_model_ready", "tiny")
    assert ask("is_model_ready", "tiny_image", "1")
    assert not ask("is_model_ready", "tiny", "2")
    assert not ask("is_model_ready", "other")


def test_metadata_and_configuration(ask: Ask) -> None:
    assert ask("get_server_metadata")["name"] == "thirtytwo"
    assert ask("get_model_metadata", "tiny")["inputs"][0]["shape"] == [-1, 32, 32, 3]
    assert ask("get_model_metadata", "tiny_image", "1")["inputs"][0]["datatype"] == "BYTES"
    assert ask("get_model_config", "tiny")["output"][0]["dims"] == [10]
    assert [model["name"] for model in ask("get_model_repository_index")] == ["tiny", "tiny_image"]


@pytest.mark.parametrize("request_binary", [True, False])
@pytest.mark.parametrize("answer_binary", [True, False, None])
def test_pixels(ask: Ask, expected: Any, request_binary: bool, answer_binary: bool | None) -> None:
    outputs = None if answer_binary is None else wanted(binary_data=answer_binary)
    result = ask("infer", "tiny", [pixels(binary=request_binary)], outputs=outputs, request_id="7")
    assert result.as_numpy("probabilities").tobytes() == expected.tobytes()
    assert result.get_response()["id"] == "7"
    assert result.get_response()["model_name"] == "tiny"


def test_files(ask: Ask, expected: Any) -> None:
    result = ask("infer", "tiny_image", [files(FILES)], model_version="1")
    assert result.as_numpy("probabilities").tobytes() == expected.tobytes()


@pytest.mark.parametrize("binary", [True, False])
def test_classes(ask: Ask, expected: Any, binary: bool) -> None:
    outputs = wanted(class_count=3, binary_data=binary)
    texts = ask("infer", "tiny_image", [files(FILES)], outputs=outputs).as_numpy("probabilities")
    assert texts.shape == (10, 3)
    best = [text.decode() if binary else text for text in texts[:, 0].tolist()]
    assert best == [f"{row.max():.6f}:{row.argmax()}:{CLASSES[row.argmax()]}" for row in expected]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_compression(ask: Ask, expected: Any, coding: str, binary: bool) -> None:
    options = {"request_compression_algorithm": coding, "response_compression_algorithm": coding}
    result = ask("infer", "tiny", [pixels(binary=binary)], **options)
    assert result.as_numpy("probabilities").tobytes() == expected.tobytes()


def test_parameters(ask: Ask) -> None:
    options = {"priority": 1, "timeout": 5_000_000, "sequence_id": 3, "parameters": {"mine": "x"}}
    assert ask("infer", "tiny", [pixels()], **options).as_numpy("probabilities").shape == (10, 10)


def test_statistics(ask: Ask) -> None:
    before = ask("get_inference_statistics", "tiny")["model_stats"][0]
    ask("infer", "tiny", [pixels()])
    after, image = ask("get_inference_statistics")["model_stats"]
    assert after["inference_count"] == before["inference_count"] + 10
    assert after["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 1
    assert image["name"] == "tiny_image"


def refused(status: int, sentence: str) -> Any:
    return pytest.raises(InferenceServerException, match=rf"^\[{status}\] {sentence}$")


def test_errors_are_readable(ask: Ask) -> None:
    with refused(404, "There is no model 'other' of version 1; there are tiny and tiny_image of 1."):
        ask("infer", "other", [pixels()])
    with refused(400, "The model has one input, 'image'; the request has x."):
        ask("infer", "tiny", [pixels(name="x")])
    with refused(400, "Input 'image' is of BYTES, not UINT8."):
        ask("infer", "tiny_image", [pixels()])
    with refused(400, r"Input 'image' has the shape \[10, 16, 64, 3\]; it must be \[-1, 32, 32, 3\]."):
        ask("infer", "tiny", [pixels(PIXELS.reshape(10, 16, 64, 3))])
    with refused(400, "Image 1 of the input: The PNG data is broken or incomplete."):
        ask("infer", "tiny_image", [files([FILES[0], FILES[0][:100]])])
    with refused(504, "No answer within 1e-06 s."):
        ask("infer", "tiny", [pixels()], timeout=1)
    with refused(403, "Loading needs an API key, and this service has none: .*"):
        ask("load_model", "tiny")
    with refused(501, "'tiny' cannot be unloaded; a load replaces it."):
        ask("unload_model", "tiny")


@pytest.mark.parametrize("kind", ["system", "cuda"])
def test_shared_memory_is_refused(ask: Ask, kind: str) -> None:
    with refused(404, f"Not Found: GET /v2/{kind}sharedmemory/status"):
        ask(f"get_{kind}_shared_memory_status")
    given = triton.InferInput("image", [1, 32, 32, 3], "UINT8").set_shared_memory("region", 3072)
    with refused(400, "Shared memory is not supported; send the data with the request."):
        ask("infer", "tiny", [given])


def test_requests_in_the_background(client: httpx.Client, expected: Any) -> None:
    with triton.InferenceServerClient(address(client), concurrency=4) as server:
        answers = [server.async_infer("tiny", [pixels(PIXELS[i : i + 1])]) for i in range(10)]
        for answer, row in zip(answers, expected, strict=True):
            assert answer.get_result().as_numpy("probabilities").tobytes() == row.tobytes()


def test_a_key(start: Callable[..., httpx.Client]) -> None:
    guarded = address(start(api_keys="secret"))
    with triton.InferenceServerClient(guarded) as server:
        with refused(401, "Send a key as .*"):
            server.infer("tiny", [pixels()])
        headers = {"X-API-Key": "secret"}
        assert server.infer("tiny", [pixels()], headers=headers).as_numpy("probabilities").shape == (10, 10)


def blocks(language: str, client: httpx.Client) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    return [block.replace("localhost:8000", address(client)) for block in found]


def run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.slow
def test_the_documents_python_names_the_cat(bundled: httpx.Client) -> None:
    program, _ = blocks("python", bundled)
    assert re.match(r"\[\[b'0\.\d{6}:3:cat'( b'0\.\d{6}:\d:\w+'){2}\]\]\n", run(sys.executable, "-c", program))


@pytest.mark.slow
def test_the_documents_python_prints_the_score(start: Callable[..., httpx.Client], ood_weights: Path) -> None:
    program = "".join(blocks("python", start(weights=ood_weights))).replace("cifar10_image", "tiny_image")
    assert run(sys.executable, "-c", program).endswith("]]\n[1.]\n")


@pytest.mark.slow
def test_the_documents_curl_gives_the_cats_probabilities(bundled: httpx.Client) -> None:
    (line,) = blocks("console", bundled)
    probabilities = [float(text) for text in run("bash", "-c", line.removeprefix("$ ")).split()]
    assert len(probabilities) == 10
    assert np.argmax(probabilities) == CLASSES.index("cat")


def test_the_documents_curl_gives_no_score(start: Callable[..., httpx.Client], ood_weights: Path) -> None:
    (line,) = blocks("console", start(weights=ood_weights))
    printed = run("bash", "-c", line.removeprefix("$ ").replace("cifar10_image", "tiny_image")).split()
    assert len(printed) == 10
    assert sum(map(float, printed)) == pytest.approx(1, abs=1e-3)


def test_the_documents_models_are_those_served(bundled: httpx.Client) -> None:
    table = re.findall(r"^\| `(\w+)` \| (\w+) `(\[.*?\])`", DOCUMENT, re.MULTILINE)
    assert [name for name, _, _ in table] == ["cifar10", "cifar10_image"]
    for name, datatype, shape in table:
        (given,) = bundled.get(f"/v2/models/{name}").json()["inputs"]
        assert given == {"name": "image", "datatype": datatype, "shape": json.loads(shape)}
