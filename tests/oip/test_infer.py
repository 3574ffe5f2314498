"""The Open Inference Protocol over a real socket: what it promises beside the bytes."""

import base64
import gzip
import io
import json
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app import __version__, engines
from app.model import weights
from app.model.preprocessing import Limits, decode
from app.telemetry.statistics import Statistics
from tests.conftest import CLASSES, EXAMPLES

Start = Callable[..., httpx.Client]

FILES = [(EXAMPLES / f"{name}.png").read_bytes() for name in CLASSES] + [(EXAMPLES / "chelsea.png").read_bytes()]
PIXELS = np.stack([decode(file, Limits(32, 10**7)).pixels for file in FILES])
TENSOR, IMAGE = "/v2/models/tiny/infer", "/v2/models/tiny_image/infer"


def with_pixels(pixels: Any, **more: Any) -> dict[str, Any]:
    data = pixels.ravel().tolist()
    return {"inputs": [{"name": "image", "datatype": "UINT8", "shape": pixels.shape, "data": data}], **more}


def with_files(files: list[bytes], **more: Any) -> dict[str, Any]:
    rest = b"".join(len(file).to_bytes(4, "little") + file for file in files)
    given = {"name": "image", "datatype": "BYTES", "shape": [len(files)], "parameters": {"binary_data_size": len(rest)}}
    text = json.dumps({"inputs": [given], **more}).encode()
    return {"content": text + rest, "headers": {"Inference-Header-Content-Length": str(len(text))}}


def floats(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    (output,) = response.json()["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def error(response: httpx.Response, status: int, part: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    assert part in response.json()["error"]


@pytest.fixture(scope="module")
def expected(tiny_weights: Path) -> Any:
    """The engine's own probabilities."""
    return engines.load(weights.load(tiny_weights))(PIXELS).probabilities


def test_answers_are_the_engines_bit_for_bit(client: httpx.Client, expected: Any) -> None:
    assert floats(client.post(TENSOR, json=with_pixels(PIXELS))).tobytes() == expected.tobytes()
    assert floats(client.post(IMAGE, **with_files(FILES))).tobytes() == expected.tobytes()
    for i in (0, 10):
        assert floats(client.post(TENSOR, json=with_pixels(PIXELS[i : i + 1]))).tobytes() == expected[i].tobytes()


def test_labels_are_those_of_predict(client: httpx.Client) -> None:
    predicted = client.post("/predict", files=[("file", ("", file)) for file in FILES]).json()["predictions"]
    wanted = {"outputs": [{"name": "probabilities", "parameters": {"classification": 3}}]}
    (output,) = client.post(IMAGE, **with_files(FILES, **wanted)).json()["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [11, 3])
    labels = [text.split(":")[2] for text in output["data"]]
    assert labels == [top["label"] for prediction in predicted for top in prediction["top"]]


def test_a_raw_image_needs_no_json(client: httpx.Client, expected: Any) -> None:
    for path, body in ((TENSOR, PIXELS[3].tobytes()), (IMAGE, FILES[3])):
        response = client.post(path, content=body, headers={"Inference-Header-Content-Length": "0"})
        length = int(response.headers["inference-header-content-length"])
        assert response.content[length:] == expected[3].tobytes()
        (output,) = json.loads(response.content[:length])["outputs"]
        assert output == {
            "name": "probabilities",
            "datatype": "FP32",
            "shape": [1, 10],
            "parameters": {"binary_data_size": 40},
        }


def test_the_model_and_the_id_are_told(client: httpx.Client) -> None:
    for path in (TENSOR, TENSOR.replace("/infer", "/versions/1/infer")):
        answer = client.post(path, json=with_pixels(PIXELS[:1], id="my-7")).json()
        assert (answer["model_name"], answer["model_version"], answer["id"]) == ("tiny", "1", "my-7")
        assert answer["parameters"] == {"weights_version": client.get("/model").json()["version"]}
    assert "id" not in client.post(TENSOR, json=with_pixels(PIXELS[:1])).json()


def test_a_media_type_does_not_matter(client: httpx.Client, expected: Any) -> None:
    body = json.dumps(with_pixels(PIXELS[:1]))
    for kind in ("image/png", "multipart/form-data; boundary=x", "nonsense"):
        answer = client.post(TENSOR, content=body, headers={"content-type": kind})
        assert floats(answer).tobytes() == expected[0].tobytes()


def test_compressed_bodies(client: httpx.Client, expected: Any) -> None:
    said = with_files(FILES[:2])
    for coding, compress in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        headers = {**said["headers"], "content-encoding": coding}
        assert floats(client.post(IMAGE, content=compress(said["content"]), headers=headers)).shape == (2, 10)
    error(client.post(IMAGE, content=b"nonsense", headers={"content-encoding": "gzip"}), 400, "broken")
    error(client.post(IMAGE, content=b"x", headers={"content-encoding": "br"}), 415, "gzip or deflate")


def test_the_server_tells_of_itself(client: httpx.Client) -> None:
    for path in ("/v2", "/v2/"):
        server = client.get(path).json()
        assert (server["name"], server["version"]) == ("thirtytwo", __version__)
        assert {"classification", "binary_tensor_data", "statistics"} <= set(server["extensions"])
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.post("/v2/repository/index").json() == [
        {"name": name, "version": "1", "state": "READY", "reason": ""} for name in ("tiny", "tiny_image")
    ]


@pytest.mark.parametrize(
    ("name", "datatype", "shape"), [("tiny", "UINT8", [-1, 32, 32, 3]), ("tiny_image", "BYTES", [-1])]
)
@pytest.mark.parametrize("version", ["", "/versions/1"])
def test_the_models_tell_of_themselves(
    client: httpx.Client, name: str, datatype: str, shape: list[int], version: str
) -> None:
    metadata = client.get(f"/v2/models/{name}{version}").json()
    assert metadata["inputs"] == [{"name": "image", "datatype": datatype, "shape": shape}]
    assert metadata["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}]
    assert (metadata["name"], metadata["versions"]) == (name, ["1"])
    assert metadata["platform"] == client.get("/model").json()["engine"]
    config = client.get(f"/v2/models/{name}{version}/config").json()
    assert (config["name"], config["max_batch_size"]) == (name, 256)
    assert config["input"][0]["dims"] == shape[1:]
    assert config["input"][0]["data_type"] == {"UINT8": "TYPE_UINT8", "BYTES": "TYPE_STRING"}[datatype]
    assert config["output"] == [{"name": "probabilities", "data_type": "TYPE_FP32", "dims": [10]}]
    assert client.get(f"/v2/models/{name}{version}/ready").json() == {"name": name, "ready": True}


@pytest.mark.parametrize(
    ("method", "path", "status", "part"),
    [
        ("GET", "/v2/models/other", 404, "There is no model 'other'"),
        ("GET", "/v2/models/tiny/versions/2", 404, "of version 2; there are tiny and tiny_image"),
        ("GET", "/v2/models/tiny/versions/2/ready", 404, "of version 2"),
        ("GET", "/v2/models/other/stats", 404, "'other'"),
        ("POST", "/v2/models/other/infer", 404, "'other'"),
        ("GET", "/v2/nothing", 404, "Not Found: GET /v2/nothing"),
        ("GET", "/v2/health/live/", 404, "Not Found"),
        ("GET", "/v2/systemsharedmemory/status", 404, "Not Found"),
        ("POST", "/v2/cudasharedmemory/region/x/register", 404, "Not Found"),
        ("GET", "/v2/models/tiny/infer", 405, "Method Not Allowed"),
        ("POST", "/v2", 405, "Method Not Allowed"),
        ("POST", "/v2/repository/models/tiny/load", 403, "Loading needs an API key"),
        ("POST", "/v2/repository/models/tiny/unload", 501, "'tiny' cannot be unloaded"),
        ("POST", TENSOR, 400, "The body is empty; it must be a JSON object"),
        ("POST", IMAGE, 400, "The body is empty; it must be a JSON object"),
    ],
)
def test_every_refusal_has_a_text(client: httpx.Client, method: str, path: str, status: int, part: str) -> None:
    error(client.request(method, path), status, part)


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        (b"hello", "Image 1 of the input: Send one of PNG"),
        (FILES[0][:200], "Image 1 of the input: The PNG data is broken"),
        (b"", "Image 1 of the input: The file is empty"),
    ],
)
def test_a_bad_file_fails_the_request(client: httpx.Client, bad: bytes, part: str) -> None:
    error(client.post(IMAGE, **with_files([FILES[0], bad, FILES[1]])), 400, part)
    headers = {"Inference-Header-Content-Length": "0"}
    error(client.post(IMAGE, content=bad, headers=headers), 400, part.replace("Image 1", "Image 0"))


PNG = FILES[0]
PNG_TEXT = base64.b64encode(PNG)
OF_FILES: dict[str, Any] = {"name": "image", "datatype": "BYTES", "shape": [1]}
OF_PIXELS: dict[str, Any] = {"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3]}
RAW = {"Inference-Header-Content-Length": "0"}


@pytest.mark.parametrize("path", [TENSOR, IMAGE])
@pytest.mark.parametrize(
    ("body", "found"),
    [
        (PNG, "The body is a PNG file"),
        (PNG_TEXT, "The body is base64 text of a PNG file"),
        (b"data:image/png;base64," + PNG_TEXT, "The body is base64 text of a PNG file"),
        (b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\n", "The body is a multipart form"),
        (b"image=%89PNG", "The body is text that starts with b'image=%89PNG'"),
        (b'[{"inputs": []}]', "The body is text that starts with b'[{"),
    ],
)
def test_body_that_is_no_json_is_named(client: httpx.Client, path: str, body: bytes, found: str) -> None:
    error(client.post(path, content=body), 400, f"{found}")
    error(client.post(path, content=body), 400, "it must be a JSON object")


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        ({**OF_FILES, "data": [PNG_TEXT.decode()]}, "is base64 text of a PNG file. JSON cannot hold a file"),
        ({**OF_FILES, "data": [f"data:image/png;base64,{PNG_TEXT.decode()}"]}, "is base64 text of a PNG file. JSON"),
        ({**OF_FILES, "data": PNG_TEXT.decode()}, "valid array, not base64 text of a PNG file"),
        ({**OF_FILES, "data": ["a cat"]}, "is text. JSON cannot hold a file"),
        ({**OF_FILES, "data": [{"b64": PNG_TEXT.decode()}]}, "is an object. JSON cannot hold a file"),
        ({**OF_FILES, "data": [137, 80]}, "is whole numbers. JSON cannot hold a file"),
        ({**OF_PIXELS, "data": [PNG_TEXT.decode()]}, "is base64 text of a PNG file; it must be whole numbers"),
        ({**OF_PIXELS, "data": [0.5] * 3072}, "is no list of whole numbers; it must be whole numbers from 0 to 255"),
    ],
)
def test_data_that_is_no_pixels_is_named(client: httpx.Client, tensor: dict[str, Any], found: str) -> None:
    path = TENSOR if tensor["datatype"] == "UINT8" else IMAGE
    error(client.post(path, json={"inputs": [tensor]}), 400, found)


def test_file_in_place_of_a_tensor_is_named(client: httpx.Client) -> None:
    error(client.post(TENSOR, content=PNG, headers=RAW), 400, "The data is a PNG file; files are for the model whose")
    error(client.post(IMAGE, content=PNG_TEXT, headers=RAW), 400, "the file is base64 text of a PNG file")
    for given, path, part in (
        (OF_PIXELS, TENSOR, "The data is a PNG file"),
        (OF_FILES, IMAGE, "It is a PNG file, without the 4 bytes of its length"),
    ):
        text = json.dumps({"inputs": [{**given, "parameters": {"binary_data_size": len(PNG)}}]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(text))}
        error(client.post(path, content=text + PNG, headers=headers), 400, part)


def test_limits(start: Start) -> None:
    client = start(max_files=3, max_file_bytes=5000, max_body_bytes=40_000, max_pixels=2000, max_queue=8)
    assert floats(client.post(TENSOR, json=with_pixels(PIXELS[:3]))).shape == (3, 10)
    error(client.post(TENSOR, json=with_pixels(PIXELS[:4])), 413, "over 40000 bytes")
    error(client.post(IMAGE, **with_files(FILES[:4])), 413, "more than 3 images")
    error(client.post(IMAGE, **with_files([bytes(5001)])), 413, "Image 0 of the input: The file has over 5000 bytes")
    error(client.post(IMAGE, content=iter([bytes(30_000)] * 2)), 413, "over 40000 bytes")
    headers = {"content-encoding": "gzip"}
    error(client.post(IMAGE, content=gzip.compress(bytes(50_000)), headers=headers), 413, "when decompressed")
    wide = io.BytesIO()
    Image.new("RGB", (50, 50)).save(wide, "PNG")
    error(client.post(IMAGE, **with_files([FILES[0], wide.getvalue()])), 413, "Image 1 of the input: The image has 50")


def test_strict_size(start: Start) -> None:
    client = start(strict_size=True)
    assert client.post(IMAGE, **with_files(FILES[:2])).status_code == 200
    error(client.post(IMAGE, **with_files([FILES[0], FILES[-1]])), 400, "Image 1 of the input: The image is 451 x 300")


def test_api_keys_guard_what_costs_work(start: Start) -> None:
    client = start(api_keys="first")
    refused = client.post(TENSOR, json=with_pixels(PIXELS[:1]))
    error(refused, 401, "Send a key")
    assert refused.headers["www-authenticate"] == "Bearer"
    for headers in ({"x-api-key": "first"}, {"authorization": "Bearer first"}):
        assert client.post(TENSOR, json=with_pixels(PIXELS[:1]), headers=headers).status_code == 200
    for path in ("/v2", "/v2/health/ready", "/v2/models/tiny"):
        assert client.get(path).status_code == 200


def test_a_request_can_shorten_its_timeout_but_not_extend_it(start: Start, client: httpx.Client) -> None:
    error(client.post(TENSOR, json=with_pixels(PIXELS[:1], parameters={"timeout": 1})), 504, "No answer within")
    patient = with_pixels(PIXELS[:1], parameters={"timeout": 20_000_000, "priority": 1})
    assert client.post(TENSOR, json=patient).status_code == 200
    error(start(request_timeout_s=0.0001).post(TENSOR, json=patient), 504, "No answer within 0.0001 s")


def test_a_full_queue_is_429(start: Start) -> None:
    client = start(max_files=32, max_queue=32, max_batch=1)
    said = with_files([FILES[0]] * 32)
    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(lambda _: client.post(IMAGE, **said), range(48)))
    assert {response.status_code for response in responses} == {200, 429}
    for response in responses:
        if response.status_code == 429:
            error(response, 429, "images are waiting; the limit is")
            assert int(response.headers["retry-after"]) >= 1


def test_a_caller_who_leaves_frees_its_place(start: Start) -> None:
    client = start(max_batch=1, max_files=400, max_queue=400)
    for _ in range(3):
        with suppress(httpx.ReadTimeout):  # or 429, while the previous request still leaves
            client.post(IMAGE, **with_files([FILES[0]] * 400), timeout=httpx.Timeout(5, read=0.01))
    deadline = time.monotonic() + 10
    while "thirtytwo_queue_size 0.0" not in client.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_shares_batches_and_counts_with_predict(start: Start) -> None:
    client = start()
    client.post(TENSOR, json=with_pixels(PIXELS))
    client.post("/predict", files=[("file", ("", file)) for file in FILES])
    predictions = [line for line in client.get("/metrics").text.splitlines() if "predictions_total{" in line]
    assert sum(float(line.split()[1]) for line in predictions) == 22


def test_statistics_count_requests_by_model_and_passes_of_the_network(start: Start) -> None:
    client = start()
    begun = time.time_ns() // 1_000_000
    for count in (1, 2, 4):
        client.post(TENSOR, json=with_pixels(PIXELS[:count]))
    client.post(TENSOR, content=b"?")
    client.post(IMAGE, **with_files(FILES[:1]))
    tensor, image = client.get("/v2/models/stats").json()["model_stats"]
    assert client.get("/v2/models/tiny_image/stats").json() == {"model_stats": [image]}
    assert client.get("/v2/models/tiny/versions/1/stats").json() == {"model_stats": [tensor]}
    for stats, name, success, fail in ((tensor, "tiny", 3, 1), (image, "tiny_image", 1, 0)):
        assert (stats["name"], stats["version"]) == (name, "1")
        assert begun <= stats["last_inference"] <= time.time_ns() // 1_000_000
        durations = stats["inference_stats"]
        assert (durations["success"]["count"], durations["fail"]["count"]) == (success, fail)
        parts = [durations[part] for part in ("queue", "compute_input", "compute_infer", "compute_output")]
        assert [part["count"] for part in parts] == [success] * 4
        assert 0 < sum(part["ns"] for part in parts) < durations["success"]["ns"]
        assert durations["cache_hit"] == durations["cache_miss"] == {"count": 0, "ns": 0}
        assert (stats["inference_count"], stats["execution_count"]) == (8, 4)
        sizes = {batch["batch_size"]: batch["compute_infer"]["count"] for batch in stats["batch_stats"]}
        assert sizes == {1: 2, 2: 1, 4: 1}
        assert all(batch["compute_infer"]["ns"] > 0 for batch in stats["batch_stats"])


def test_statistics_lose_nothing_between_threads() -> None:
    statistics = Statistics()

    def observe() -> None:
        for size in range(1, 500):
            statistics.observe_batch(size, 0.001)

    thread = threading.Thread(target=observe)
    thread.start()
    while thread.is_alive():
        statistics.of("tiny", "1")
    assert statistics.of("tiny", "1")["execution_count"] == 499


def test_a_root_path(start: Start) -> None:
    client = start(root_path="classifier/")
    assert client.get("/v2").status_code == 200
    error(client.get("/v2/nothing"), 404, "Not Found")
    error(client.post(TENSOR, content=b"?"), 400, "must be a JSON object")
    assert "title" in client.get("/nothing").json()


def test_the_schema_tells_of_it_in_one_group(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    calls = [call for path, calls in paths.items() if path.startswith("/v2") for call in calls.values()]
    assert len(calls) == 11
    assert {tuple(call["tags"]) for call in calls} == {("Open Inference Protocol",)}
    assert all(call["summary"] and "default" in call["responses"] and "422" not in call["responses"] for call in calls)
