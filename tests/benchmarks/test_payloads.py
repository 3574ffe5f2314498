from app.api.uploads import FormParser
from app.model.preprocessing import Limits, decode
from app.settings import Settings
from benchmarks.payloads import form, forms, image_files, post


def test_image_files_are_png_and_jpeg_of_the_input_size() -> None:
    files = image_files(None, count=8)
    assert [name for name, _ in files] == [f"{i}.{'jpeg' if i % 4 == 3 else 'png'}" for i in range(8)]
    assert [decode(data, Limits(32, 1024)).resized_from for _, data in files] == [None] * 8


def test_form_holds_the_files_in_order() -> None:
    files = [("0.png", b"first"), ("1.png", b"second\r\n--BOUND")]
    parser = FormParser("BOUNDARY", Settings())
    parser.feed(form(files).partition(b"\r\n\r\n")[2])
    assert [(upload.filename, upload.data) for upload in parser.close().files] == files


def test_forms_split_the_files() -> None:
    files = [(f"{i}.png", bytes([i])) for i in range(5)]
    assert [request.count(b"filename=") for request in forms(files, 2)] == [2, 2, 1]


def test_post_declares_the_length_of_its_body() -> None:
    head, _, body = post(b"\0" * 7, "image/png").partition(b"\r\n\r\n")
    assert b"\r\nContent-Length: 7" in head
    assert len(body) == 7
