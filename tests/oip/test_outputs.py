"""Several outputs of one model: selection, bytes, description, clients, and a swap to a model with fewer."""

import json
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tritonclient.utils import InferenceServerException

from app import engines
from app.errors import MalformedUpload
from app.model import weights
from app.model.card import Stage
from app.model.ood import OodCalibration
from app.model.weights import save
from app.oip.codec import encode
from app.oip.outputs import SelectedOutput, select
from app.oip.schemas import InferenceRequest
from app.oip.tensors import TensorSpec
from app.settings import Settings
from tests.conftest import CLASSES, EXAMPLES, serving, untrained, write
from tests.support import fault_injection
from tests.support.subprocesses import process, wait_until

Start = Callable[..., httpx.Client]
Json = dict[str, Any]

PROBABILITIES = TensorSpec("probabilities", "FP32", (-1, 3))
OOD_SCORE = TensorSpec("ood_score", "FP32", (-1,))
SPECS = [PROBABILITIES, OOD_SCORE]
INPUTS = [{"name": "image", "datatype": "UINT8", "shape": [1], "data": [0]}]
LABELS = ["cat", "dog", 'a "b": ü']
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
INFER = "/v2/models/tiny/infer"
LENGTH = "Inference-Header-Content-Length"


def selected_from(outputs: list[Json], **parameters: Any) -> list[SelectedOutput]:
    return select(
        InferenceRequest.model_validate({"inputs": INPUTS, "outputs": outputs, "parameters": parameters}), SPECS
    )


def read(body: bytes, json_length: int | None) -> dict[str, tuple[str, list[int], Any]]:
    """Datatype, shape and flat data of each output, in order; the binary ones must fill the body."""
    rest = b"" if json_length is None else body[json_length:]
    found = {}
    for output in json.loads(body[:json_length])["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        assert ("data" in output) == (size is None)
        if size is not None:
            output["data"], rest = from_binary(rest[:size], output["datatype"]), rest[size:]
        found[output["name"]] = (output["datatype"], output["shape"], output["data"])
    assert not rest
    return found


def from_binary(data: bytes, datatype: str) -> list[Any]:
    if datatype == "FP32":
        return [value for (value,) in struct.iter_unpack("<f", data)]
    texts = []
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        texts.append(data[4:end].decode())
        data = data[end:]
    return texts


flags = st.none() | st.booleans()
requested = st.lists(  # name, binary_data and classification of each
    st.tuples(st.just("probabilities"), flags, st.integers(0, 5)) | st.tuples(st.just("ood_score"), flags, st.just(0)),
    max_size=2,
    unique_by=lambda output: output[0],
)
values = st.integers(1, 5).flatmap(
    lambda count: st.tuples(
        arrays(np.float32, (count, 3), elements=st.floats(0, 1, width=32)),
        arrays(np.float32, count, elements=st.floats(0, 1, width=32)),
    )
)


def named(name: str, binary: bool | None, top: int) -> Json:
    parameters = {"classification": top} | ({} if binary is None else {"binary_data": binary})
    return {"name": name, "parameters": parameters}


@given(outputs=requested, default=st.booleans(), rows=values)
def test_any_selection_is_read_back_in_its_order_and_form(outputs: Any, default: bool, rows: Any) -> None:
    of_name = dict(zip(("probabilities", "ood_score"), rows, strict=True))
    selected = selected_from([named(*output) for output in outputs], binary_data_output=default)
    body, length = encode({"model_name": "m"}, [(each, of_name[each.spec.name]) for each in selected], LABELS)

    expected = outputs or [("probabilities", None, 0), ("ood_score", None, 0)]
    found = read(body, length)
    assert list(found) == [name for name, _, _ in expected]
    binary = [default if each is None else each for _, each, _ in expected]
    assert ["data" not in output for output in json.loads(body[:length])["outputs"]] == binary
    assert (length is not None) == any(binary)
    for name, _, top in expected:
        check(*found[name], of_name[name], top)


def check(datatype: str, shape: list[int], data: Any, expected: Any, top: int) -> None:
    if not top:
        assert (datatype, shape) == ("FP32", list(expected.shape))
        assert np.array(data, np.float32).tobytes() == expected.tobytes()
        return
    assert (datatype, shape) == ("BYTES", [len(expected), min(top, 3)])
    best = np.argsort(-expected, axis=1, kind="stable")[:, :top].ravel().tolist()
    assert [text.split(":", 2)[1:] for text in data] == [[str(i), LABELS[i]] for i in best]


@pytest.mark.parametrize(
    ("outputs", "sentence"),
    [
        ([{"name": "x"}], "The model has no output 'x'; it has 'probabilities' and 'ood_score'."),
        ([{"name": "ood_score"}, {"name": "y" * 200}], f"The model has no output '{'y' * 80}...'; it has"),
        ([{"name": "ood_score"}] * 2, "The request names the output 'ood_score' twice."),
        ([{"name": "probabilities"}, {"name": "ood_score"}, {"name": "probabilities"}], "'probabilities' twice."),
        (
            [{"name": "ood_score", "parameters": {"classification": 1}}],
            "The output 'ood_score' is one number per image: it has no classification.",
        ),
        (
            [{"name": "probabilities"}, {"name": "ood_score", "parameters": {"shared_memory_region": "x"}}],
            "Shared memory is not supported; send the data with the request.",
        ),
    ],
)
def test_a_selection_that_is_impossible_is_refused(outputs: list[Json], sentence: str) -> None:
    with pytest.raises(MalformedUpload) as caught:
        selected_from(outputs)
    assert sentence in str(caught.value)


@pytest.fixture(scope="module")
def scored_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network with a score that differs from image to image."""
    path = tmp_path_factory.mktemp("weights") / "scored.safetensors"
    tiny = untrained("tiny", 8)
    calibration = OodCalibration(confidence_weight=1, distance_weight=0, quantiles=[-0.3, 0.0])
    tensors = {"ood.whitening": np.eye(16, dtype=np.float16), "ood.means": np.zeros((10, 16), np.float16)}
    card = tiny.card.model_copy(update={"ood": calibration})
    save(path, card, tiny.state | tensors, tiny.reference_images, tiny.reference_probabilities)
    return path


@pytest.fixture(scope="module")
def expected(scored_weights: Path) -> engines.Output:
    output = engines.load(weights.load(scored_weights))(PIXELS)
    assert output.ood is not None
    assert len(set(output.ood.tolist())) == len(PIXELS)
    assert 0 < output.ood.min() < output.ood.max() < 1
    return output


@pytest.fixture(scope="module")
def scored(start: Start, scored_weights: Path) -> httpx.Client:
    return start(weights=scored_weights)


def request(pixels: Any = PIXELS, **more: Any) -> Json:
    tensor = {"name": "image", "datatype": "UINT8", "shape": pixels.shape, "data": pixels.ravel().tolist()}
    return {"inputs": [tensor], **more}


def answer(response: httpx.Response) -> dict[str, tuple[str, list[int], Any]]:
    assert response.status_code == 200, response.text
    length = response.headers.get(LENGTH)
    return read(response.content, None if length is None else int(length))


def as_bytes(output: tuple[str, list[int], Any]) -> bytes:
    return np.array(output[2], np.float32).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "tiny_image"])
def test_the_score_is_described(scored: httpx.Client, client: httpx.Client, name: str) -> None:
    probabilities = {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]}
    score = {"name": "ood_score", "datatype": "FP32", "shape": [-1]}
    assert scored.get(f"/v2/models/{name}").json()["outputs"] == [probabilities, score]
    assert client.get(f"/v2/models/{name}").json()["outputs"] == [probabilities]
    assert scored.get(f"/v2/models/{name}/config").json()["output"] == [
        {"name": "probabilities", "data_type": "TYPE_FP32", "dims": [10]},
        {"name": "ood_score", "data_type": "TYPE_FP32", "dims": []},
    ]


@pytest.mark.parametrize("binary", [False, True])
def test_a_request_without_outputs_gets_all(scored: httpx.Client, expected: Any, binary: bool) -> None:
    response = scored.post(INFER, json=request(parameters={"binary_data_output": binary}))
    assert (LENGTH in response.headers) == binary
    found = answer(response)
    assert list(found) == ["probabilities", "ood_score"]
    assert [shape for _, shape, _ in found.values()] == [[5, 10], [5]]
    assert as_bytes(found["probabilities"]) == expected.probabilities.tobytes()
    assert as_bytes(found["ood_score"]) == expected.ood.tobytes()


def test_one_response_has_json_and_binary_outputs(scored: httpx.Client, expected: Any) -> None:
    wanted = [{"name": "ood_score", "parameters": {"binary_data": True}}, {"name": "probabilities"}]
    response = scored.post(INFER, json=request(outputs=wanted))
    assert response.content.endswith(b"]}]}" + expected.ood.tobytes())
    found = answer(response)
    assert list(found) == ["ood_score", "probabilities"]
    assert as_bytes(found["ood_score"]) == expected.ood.tobytes()
    assert as_bytes(found["probabilities"]) == expected.probabilities.tobytes()


def test_a_raw_image_gets_all_outputs_in_binary(scored: httpx.Client, expected: Any) -> None:
    response = scored.post(INFER, content=PIXELS[2].tobytes(), headers={LENGTH: "0"})
    binary = expected.probabilities[2].tobytes() + expected.ood[2].tobytes()
    assert response.content[int(response.headers[LENGTH]) :] == binary
    assert list(answer(response)) == ["probabilities", "ood_score"]


def test_the_score_is_that_of_predict(scored: httpx.Client) -> None:
    file = (EXAMPLES / "cat.png").read_bytes()
    (prediction,) = scored.post("/predict", files={"file": ("cat.png", file)}).json()["predictions"]
    found = answer(scored.post("/v2/models/tiny_image/infer", content=file, headers={LENGTH: "0"}))
    assert found["ood_score"][2] == [pytest.approx(prediction["ood_score"], abs=1e-4)]


@pytest.mark.slow
def test_a_large_answer_is_made_off_the_loop(start: Start, scored_weights: Path) -> None:
    pixels = np.repeat(PIXELS, 110, 0)  # 5500 probabilities
    wide = start(weights=scored_weights, max_files=550)
    found = answer(wide.post(INFER, json=request(pixels), timeout=60))
    assert [shape for _, shape, _ in found.values()] == [[550, 10], [550]]
    assert len(set(found["ood_score"][2])) >= 5


def test_without_a_score_the_name_is_unknown(client: httpx.Client) -> None:
    response = client.post(INFER, json=request(outputs=[{"name": "ood_score"}]))
    assert response.status_code == 400
    assert response.json() == {"error": "The model has no output 'ood_score'; it has 'probabilities'."}


def test_tritonclient_reads_one_output_or_both(scored: httpx.Client, expected: Any) -> None:
    image = triton.InferInput("image", list(PIXELS.shape), "UINT8")
    image.set_data_from_numpy(PIXELS)
    score, top = triton.InferRequestedOutput("ood_score"), triton.InferRequestedOutput("probabilities", class_count=1)
    in_json = triton.InferRequestedOutput("ood_score", binary_data=False)
    with closing(triton.InferenceServerClient(f"127.0.0.1:{scored.base_url.port}")) as server:
        everything = server.infer("tiny", [image])
        assert everything.as_numpy("probabilities").tobytes() == expected.probabilities.tobytes()
        assert everything.as_numpy("ood_score").tobytes() == expected.ood.tobytes()
        for outputs in ([score], [top, score], [top, in_json]):
            result = server.infer("tiny", [image], outputs=outputs)
            assert result.as_numpy("ood_score").tobytes() == expected.ood.tobytes()
            assert (result.as_numpy("probabilities") is None) == (outputs == [score])
        best = server.infer("tiny", [image], outputs=[in_json, top]).as_numpy("probabilities")
        labels = [CLASSES[i] for i in expected.probabilities.argmax(1)]
        assert [text.decode().split(":")[2] for text in best[:, 0]] == labels
        with pytest.raises(InferenceServerException, match="it has no classification"):
            server.infer("tiny", [image], outputs=[triton.InferRequestedOutput("ood_score", class_count=1)])


@pytest.mark.slow
def test_front_ends_have_the_score(scored_weights: Path, expected: Any) -> None:
    with process(scored_weights, "--workers", "2") as (_, url), httpx.Client(base_url=url) as client:
        found = answer(client.post(INFER, json=request()))
        assert list(found) == ["probabilities", "ood_score"]
        assert found["ood_score"][2] == pytest.approx(expected.ood, abs=1e-3)


def test_a_cascade_has_the_score_of_its_first_network() -> None:
    first, second = untrained("small", 8).card, untrained("large", 16).card
    calibration = OodCalibration(confidence_weight=0, distance_weight=1, quantiles=[0.0, 1.0])
    with_score = first.model_copy(update={"ood": calibration})
    stages = [Stage(network=0, threshold=0.5), Stage(network=1)]
    for networks, has_score in (([with_score, second], True), ([first, with_score], False), ([first, second], False)):
        update = {"architecture": "cascade", "networks": networks, "stages": stages}
        assert first.model_copy(update=update).has_ood_score is has_score
    assert with_score.has_ood_score


@pytest.mark.slow
def test_a_swap_to_a_file_without_a_score_breaks_no_request(scored_weights: Path, tmp_path: Path) -> None:
    entered, release = threading.Event(), threading.Event()

    def held(probabilities: Any, white: Any) -> Any:
        if white.any():
            entered.set()
            assert release.wait(60)
        return probabilities

    path = tmp_path / "served.safetensors"
    path.write_bytes(scored_weights.read_bytes())
    former = weights.load(path).version
    settings = Settings(weights=path, max_batch=16, weights_poll_s=0.05, request_timeout_s=60)
    white = request(np.full((1, 32, 32, 3), 255, np.uint8), outputs=[{"name": "ood_score"}, {"name": "probabilities"}])
    with serving(settings, fault_injection.load(held)) as client, ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, INFER, json=white)
        try:
            assert entered.wait(60)
            write(tmp_path / "new", untrained("tiny", 16, seed=1))
            (tmp_path / "new").replace(path)
            wait_until(lambda: len(client.get("/v2/models/tiny").json()["outputs"]) == 1)
        finally:
            release.set()
        response = running.result(60)
        assert list(answer(response)) == ["ood_score", "probabilities"]
        assert response.json()["parameters"] == {"weights_version": former}
        refused = client.post(INFER, json=white)
        assert (refused.status_code, "no output 'ood_score'" in refused.text) == (400, True)
        assert list(answer(client.post(INFER, json=request()))) == ["probabilities"]
