"""The contract's HTTP, over a real socket."""

import io
import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from PIL import Image

from app.settings import Settings
from tests.conftest import CLASSES, EXAMPLES, serving
from tests.support import fault_injection

Start = Callable[..., httpx.Client]


def form(*files: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", file) for file in files]


def problem(response: httpx.Response, status: int, slug: str) -> dict[str, object]:
    body: dict[str, object] = response.json()
    assert response.status_code == status, body
    assert response.headers["content-type"] == "application/problem+json"
    assert set(body) == {"type", "title", "status", "detail", "request_id"}
    assert body["type"] == f"urn:thirtytwo:problem:{slug}"
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    return body


def test_one_picture(client: httpx.Client, cat: bytes) -> None:
    response = client.post("/predict", files=form(("cat.png", cat)))
    assert response.status_code == 200
    body = response.json()
    assert body["model"]["name"] == "tiny"
    (prediction,) = body["predictions"]
    assert list(prediction) == ["filename", "label", "confidence", "top", "resized_from"]
    assert prediction["filename"] == "cat.png"
    assert prediction["label"] == prediction["top"][0]["label"]
    assert prediction["confidence"] == prediction["top"][0]["probability"]
    assert len(prediction["top"]) == 3
    assert prediction["resized_from"] is None
    durations = re.findall(r"(\w+);dur=([\d.]+)", response.headers["server-timing"])
    assert [name for name, _ in durations] == ["decode", "queue", "model"]


def test_a_raw_body_has_no_name(client: httpx.Client, cat: bytes) -> None:
    as_form = client.post("/predict", files=form(("cat.png", cat))).json()["predictions"][0]
    for kind in ("image/png", "application/octet-stream", "image/anything; q=1"):
        response = client.post("/predict", content=cat, headers={"content-type": kind})
        assert response.json()["predictions"] == [{**as_form, "filename": None}]


@pytest.mark.slow
def test_cascade_exits_are_counted_and_can_be_turned_off(start: Start, cascade_weights: Path, cat: bytes) -> None:
    files = form(*[(path.name, path.read_bytes()) for path in sorted(EXAMPLES.glob("*.png"))])
    for early_exit in (True, False):
        client = start(weights=cascade_weights, early_exit=early_exit)
        count = len(client.post("/predict", files=files).json()["predictions"])
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith("thirtytwo_exits_total{")]
        exits = [float(line.rpartition(" ")[2]) for line in lines]
        assert len(exits) == 3
        assert sum(exits) == count
        assert early_exit or exits[2] == count


@pytest.mark.slow
def test_out_of_distribution_images_are_marked_and_counted(start: Start, ood_weights: Path, cat: bytes) -> None:
    client = start(weights=ood_weights)
    (prediction,) = client.post("/predict", files=form(("cat.png", cat))).json()["predictions"]
    assert list(prediction) == ["filename", "label", "confidence", "top", "ood_score", "ood", "resized_from"]
    assert (prediction["ood_score"], prediction["ood"]) == (1.0, True)
    assert "thirtytwo_ood_total 1.0" in client.get("/metrics").text


def test_a_file_without_scores_gives_none(client: httpx.Client, cat: bytes) -> None:
    (prediction,) = client.post("/predict", files=form(("cat.png", cat))).json()["predictions"]
    assert not {"ood", "ood_score"} & prediction.keys()


def saved(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def test_sixty_four_pictures_keep_their_order(client: httpx.Client) -> None:
    names = [CLASSES[i % 10] for i in range(64)]
    pictures = [(f"{i}-{name}.png", (EXAMPLES / f"{name}.png").read_bytes()) for i, name in enumerate(names)]
    together = client.post("/predict?top_k=10", files=form(*pictures)).json()["predictions"]
    assert [p["filename"] for p in together] == [name for name, _ in pictures]
    for i in range(10):
        alone = client.post("/predict?top_k=10", files=form(pictures[i])).json()["predictions"][0]
        for a, b in zip(alone["top"], together[i]["top"], strict=True):
            assert a["probability"] == pytest.approx(b["probability"], abs=2e-3)


def test_another_size_is_reported(client: httpx.Client) -> None:
    photo = (EXAMPLES / "chelsea.png").read_bytes()
    response = client.post("/predict", files=form(("chelsea.png", photo)))
    assert response.json()["predictions"][0]["resized_from"] == [451, 300]


def test_a_bad_file_does_not_spoil_the_rest(client: httpx.Client, cat: bytes) -> None:
    response = client.post(
        "/predict",
        files=form(("a.png", cat), ("notes.txt", b"hello"), ("cut.png", cat[:500]), ("none.png", b""), ("b.png", cat)),
    )
    assert response.status_code == 200
    first, notes, cut, none, last = response.json()["predictions"]
    assert first["label"] == last["label"]
    assert {key: notes[key] for key in ("filename",)} == {"filename": "notes.txt"}
    kinds = [p["error"]["type"].rpartition(":")[2] for p in (notes, cut, none)]
    assert kinds == ["unsupported-image", "undecodable-image", "malformed-upload"]
    assert set(cut["error"]) == {"type", "title", "detail"}


def test_when_every_file_is_bad_the_first_error_is_the_answer(client: httpx.Client, cat: bytes) -> None:
    problem(client.post("/predict", files=form(("a.png", cat[:300]), ("b.txt", b"x"))), 422, "undecodable-image")
    problem(client.post("/predict", files=form(("b.txt", b"x"), ("a.png", cat[:300]))), 415, "unsupported-image")


@pytest.mark.parametrize("top_k", ["0", "11", "-1", "x", "1.5", ""])
def test_top_k_out_of_range(client: httpx.Client, cat: bytes, top_k: str) -> None:
    response = client.post(f"/predict?top_k={top_k}", files=form(("cat.png", cat)))
    assert "top_k" in str(problem(response, 422, "invalid-parameter")["detail"])


@pytest.mark.parametrize(("query", "field", "entries"), [("", "2", 2), ("?top_k=4", "2", 4)])
def test_top_k_is_also_a_field_of_the_form(
    client: httpx.Client, cat: bytes, query: str, field: str, entries: int
) -> None:
    response = client.post(f"/predict{query}", files=form(("cat.png", cat)), data={"top_k": field})
    assert len(response.json()["predictions"][0]["top"]) == entries


def test_a_wrong_top_k_field_is_refused(client: httpx.Client, cat: bytes) -> None:
    response = client.post("/predict", files=form(("cat.png", cat)), data={"top_k": "11"})
    assert "top_k" in str(problem(response, 422, "invalid-parameter")["detail"])


def test_top_k_gives_that_many_that_add_up(client: httpx.Client, cat: bytes) -> None:
    top = client.post("/predict?top_k=10", files=form(("cat.png", cat))).json()["predictions"][0]["top"]
    assert sorted(t["label"] for t in top) == CLASSES
    assert sum(t["probability"] for t in top) == pytest.approx(1, abs=1e-3)
    assert [t["probability"] for t in top] == sorted((t["probability"] for t in top), reverse=True)


@pytest.mark.parametrize(
    ("content", "kind", "status", "slug"),
    [
        (b"", "image/png", 400, "malformed-upload"),
        (b"", "multipart/form-data; boundary=x", 400, "malformed-upload"),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 400, "malformed-upload"),
        (b"no form at all", "multipart/form-data; boundary=x", 400, "malformed-upload"),
        (b"--x\r\n\r\n", "multipart/form-data", 400, "malformed-upload"),
        (b'--x\r\nContent-Disposition: form-data; name="other"\r\n\r\nv\r\n--x--\r\n',
         "multipart/form-data; boundary=x", 400, "malformed-upload"),
        (b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nv', "multipart/form-data; boundary=x", 400,
         "malformed-upload"),
        (b"{}", "application/json", 415, "unsupported-image"),
        (b"GIF", "image/gif", 415, "unsupported-image"),
        (b"GIF89a", "image/gif", 422, "undecodable-image"),
    ],
)  # fmt: skip
def test_malformed_bodies(client: httpx.Client, content: bytes, kind: str, status: int, slug: str) -> None:
    problem(client.post("/predict", content=content, headers={"content-type": kind}), status, slug)


def test_no_content_type_is_unsupported(client: httpx.Client) -> None:
    problem(client.post("/predict", content=b"x"), 415, "unsupported-image")


def test_unknown_paths_and_methods_are_problems(client: httpx.Client) -> None:
    problem(client.get("/nothing"), 404, "not-found")
    response = client.get("/predict")
    problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(("sent", "kept"), [("my-id.1", True), ("x" * 128, True), ("x" * 129, False), ("a b", False)])
def test_request_ids_are_kept_when_sane(client: httpx.Client, sent: str, kept: bool) -> None:
    answered = client.get("/healthz", headers={"x-request-id": sent}).headers["x-request-id"]
    assert (answered == sent) is kept
    assert answered


def test_limits(start: Start, cat: bytes) -> None:
    client = start(max_files=3, max_file_bytes=5000, max_body_bytes=12_000, max_pixels=2000, max_queue=8)
    assert client.post("/predict", files=form(*[("cat.png", cat)] * 3)).status_code == 200
    problem(client.post("/predict", files=form(*[("cat.png", cat)] * 4)), 413, "too-large")
    problem(client.post("/predict", files=form(("large", bytes(5001)))), 413, "too-large")
    problem(client.post("/predict", content=bytes(5001), headers={"content-type": "image/png"}), 413, "too-large")
    problem(client.post("/predict", files=form(("large", bytes(13_000)))), 413, "too-large")
    wide = io.BytesIO()
    Image.new("RGB", (50, 50)).save(wide, "PNG")
    problem(client.post("/predict", files=form(("wide.png", wide.getvalue()))), 413, "too-large")
    among = client.post("/predict", files=form(("large", bytes(5001)), ("cat.png", cat))).json()["predictions"]
    assert "error" in among[0]
    assert "label" in among[1]


@pytest.mark.slow
def test_a_chunked_body_is_refused_when_it_passes_the_limit(start: Start) -> None:
    client = start(max_body_bytes=10_000, max_file_bytes=10_000)
    chunks = (bytes(4096) for _ in range(5_000))
    response = client.post("/predict", content=chunks, headers={"content-type": "image/png"})
    problem(response, 413, "too-large")
    assert client.get("/healthz").status_code == 200


def test_strict_size(start: Start, cat: bytes) -> None:
    client = start(strict_size=True)
    assert client.post("/predict", files=form(("cat.png", cat))).status_code == 200
    photo = (EXAMPLES / "chelsea.png").read_bytes()
    problem(client.post("/predict", files=form(("chelsea.png", photo))), 422, "wrong-size")


@pytest.mark.slow
def test_api_keys(start: Start, cat: bytes) -> None:
    client = start(api_keys="first, second")
    files = form(("cat.png", cat))
    for headers in ({}, {"x-api-key": "third"}, {"authorization": "Bearer third"}, {"authorization": "Basic first"}):
        response = client.post("/predict", files=files, headers=headers)
        problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    for headers in ({"x-api-key": "first"}, {"authorization": "Bearer second"}):
        assert client.post("/predict", files=files, headers=headers).status_code == 200
    assert client.get("/readyz").status_code == 200


@pytest.mark.slow
def test_timeouts_are_504(start: Start, cat: bytes) -> None:
    client = start(request_timeout_s=0.0001)
    problem(client.post("/predict", files=form(("cat.png", cat))), 504, "deadline-exceeded")
    assert client.get("/readyz").status_code == 200


@pytest.mark.slow
def test_a_full_queue_is_429_with_retry_after(start: Start, cat: bytes) -> None:
    client = start(max_files=32, max_queue=32, max_batch=1)
    files = form(*[("cat.png", cat)] * 32)
    statuses: list[int] = []
    with ThreadPoolExecutor(12) as pool:
        for response in pool.map(lambda _: client.post("/predict", files=files), range(48)):
            statuses.append(response.status_code)
            if response.status_code == 429:
                problem(response, 429, "queue-full")
                assert int(response.headers["retry-after"]) >= 1
    assert set(statuses) == {200, 429}
    assert client.post("/predict", files=files).status_code == 200


@pytest.mark.slow
def test_a_full_queue_refuses_before_it_decodes(tiny_weights: Path, cat: bytes) -> None:
    """Told by files that are no pictures: they would be a 415, or a 400, as soon as anybody looked at them."""
    rest = b"\1\0\0\0?" * 400
    tensor = {"name": "image", "datatype": "BYTES", "shape": [400], "parameters": {"binary_data_size": len(rest)}}
    text = json.dumps({"inputs": [tensor]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    settings = Settings(weights=tiny_weights, max_files=400, max_queue=400, max_batch=1)
    with serving(settings, fault_injection.load(fault_injection.slow)) as client, ThreadPoolExecutor(1) as pool:
        filling = pool.submit(client.post, "/predict", files=form(*[("cat.png", cat)] * 400))
        while "thirtytwo_queue_size 0.0" in client.get("/metrics").text:
            time.sleep(0.01)
        for path, bad in (
            ("/predict", {"files": form(*[("a", b"?")] * 400)}),
            ("/v2/models/tiny_image/infer", {"content": text + rest, "headers": headers}),
        ):
            assert client.post(path, **bad).status_code == 429
        assert filling.result().status_code == 200


@pytest.mark.slow
def test_a_caller_who_leaves_frees_its_place(start: Start, cat: bytes) -> None:
    client = start(max_batch=1, max_files=400, max_queue=400)
    files = form(*[("cat.png", cat)] * 400)
    for _ in range(3):
        with suppress(httpx.ReadTimeout):  # or 429, while the previous request still leaves
            client.post("/predict", files=files, timeout=httpx.Timeout(5, read=0.01))
    deadline = time.monotonic() + 10
    while "thirtytwo_queue_size 0.0" not in client.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_answers_do_not_depend_on_the_company(client: httpx.Client, cat: bytes) -> None:
    frog = (EXAMPLES / "frog.png").read_bytes()
    alone = client.post("/predict", files=form(("cat.png", cat))).json()["predictions"][0]["label"]
    answers: list[str] = []

    def ask(_: int) -> None:
        body = client.post("/predict", files=form(("frog.png", frog), ("bad", b"?"), ("cat.png", cat))).json()
        answers.append(body["predictions"][2]["label"])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [alone] * 24


def test_the_card(client: httpx.Client) -> None:
    card = client.get("/model").json()
    assert card["classes"] == CLASSES
    assert card["input_size"] == 32
    assert card["device"] == "cpu"
    assert card["version"] == card["sha256"][:8]
    assert {"name", "architecture", "parameters", "test_accuracy", "recipe", "dataset", "precision"} <= set(card)


@pytest.mark.slow
def test_card_of_a_cascade_shows_its_stages(start: Start, cascade_weights: Path) -> None:
    card = start(weights=cascade_weights).get("/model").json()
    assert [stage["threshold"] for stage in card["stages"]] == [0.15, 0.2, None]
    assert [network["name"] for network in card["networks"]] == ["small", "large"]


def test_health(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize("path", ["/", "/docs", "/healthz", "/nothing", "/static/index.js"])
def test_every_answer_carries_the_security_headers(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_and_all_they_load_come_from_the_service(client: httpx.Client, path: str) -> None:
    page = client.get(path)
    assert page.headers["content-type"].startswith("text/html")
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert links
    for link in links:
        assert "//" not in link
        assert client.get(f"/{link}").status_code == 200, link


def test_a_root_path_is_told_in_the_schema_and_stripped_by_the_proxy(start: Start) -> None:
    client = start(root_path="classifier/")
    assert client.get("/openapi.json").json()["servers"] == [{"url": "/classifier"}]
    for path in ("/", "/docs", "/static/index.js", "/static/swagger/swagger-ui.css", "/model"):
        assert client.get(path).status_code == 200, path


@pytest.mark.slow
def test_the_schema_describes_the_upload_and_its_errors(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    predict = schema["paths"]["/predict"]["post"]
    files = predict["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]["file"]
    assert files["items"] == {"type": "string", "format": "binary"}
    statuses = {"200", "400", "401", "408", "413", "414", "415", "422", "429", "431", "503", "504"}
    assert statuses == set(predict["responses"])
    assert "Problem" in schema["components"]["schemas"]
