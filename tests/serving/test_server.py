"""The HTTP server: what it answers, what it refuses and how, and what happens when a client leaves."""

from __future__ import annotations

import base64
import http.client
import io
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import numpy as np
import pytest
from PIL import Image

from tdc_fast.serving import Engine, Request
from tests.serving.http import Client, served, wait_for
from tests.serving.models import CLASSES, SHAPE, Scripted, experts, process

for module in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(module, reason=f"no {module}: pip install tdc_fast[serve]")

from tdc_fast.serving.connections import PromptConnection  # noqa: E402  # of the packages above
from tdc_fast.serving.server import Server, create_app  # noqa: E402


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    engine = Engine(experts(), process(), SHAPE, max_batch=8, classes=CLASSES, num_classes=6, null_class=5)
    with served(engine, images=4, steps=30, seconds=30.0, body=500, body_seconds=0.5) as client:
        yield client


@pytest.fixture
def held() -> Iterator[tuple[Client, Scripted, Engine]]:
    """A server whose model waits for the test."""
    model = Scripted()
    model.gate.clear()
    engine = Engine(model, process(), SHAPE, max_batch=2, max_queue=1, deterministic=False)
    with served(engine) as client:
        yield client, model, engine
        model.gate.set()


def test_every_format_holds_the_images_of_the_engine(client):
    wish = {"num_images": 3, "seed": 7, "steps": 4, "label": 2}
    engine = Engine(experts(), process(), SHAPE, max_batch=8, classes=CLASSES, num_classes=6)
    with engine:
        expected = engine.submit(Request(**wish)).result(60).images.numpy()
    archive = client.draw(**wish, format="npz")
    assert (archive.status, archive.headers["content-type"]) == (200, "application/x-npz")
    arrays = np.load(io.BytesIO(archive.body))
    assert np.array_equal(arrays["arr_0"], expected.transpose(0, 2, 3, 1)) and arrays["arr_1"].tolist() == [2, 2, 2]
    picture = client.draw(**wish)  # a PNG, without asking
    assert (picture.status, picture.headers["content-type"]) == (200, "image/png")
    assert np.array_equal(pixels(picture.body), np.concatenate(expected[:, 0], axis=1))
    facts = client.draw(**wish, format="json").json
    assert facts["labels"] == [2, 2, 2] and (facts["seed"], facts["steps"], facts["sampler"]) == (7, 4, "ddim")
    for image, wanted in zip(facts["images"], expected, strict=True):
        assert np.array_equal(pixels(base64.b64decode(image)), wanted[0])


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_seed_that_was_not_asked_for_is_told_and_draws_the_same_again(client):
    first = client.draw(steps=2)
    again = client.draw(steps=2, seed=int(first.headers["x-seed"]))
    assert first.body == again.body and first.status == 200


def test_events_are_previews_and_then_the_result(client):
    events = list(client.events(steps=7, preview_every=3, num_images=2, seed=1))
    assert [name for name, _ in events] == ["preview", "preview", "result"]
    assert [(data["step"], data["steps"]) for _, data in events[:2]] == [(3, 7), (6, 7)]
    assert pixels(base64.b64decode(events[0][1]["image"])).shape == (8, 16)
    assert events[-1][1]["images"] == client.draw(steps=7, num_images=2, seed=1, format="json").json["images"]


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"num_images": 0}, "num_images", "num_images: got 0; expected greater than or equal to 1"),
        ({"num_images": 5}, "num_images", "num_images: got 5; expected at most 4, a limit of this server"),
        ({"num_images": "1"}, "num_images", "num_images: got '1'; expected a valid integer"),
        ({"num_images": 1.5}, "num_images", "num_images: got 1.5"),
        ({"num_images": True}, "num_images", "num_images: got True"),
        ({"steps": 31}, "steps", "steps: got 31; expected at most 30, a limit of this server"),
        ({"steps": 10**30}, "steps", "steps: got"),
        ({"seed": -1}, "seed", "seed: got -1"),
        ({"sampler": "euler"}, "sampler", "sampler: got 'euler'; expected \"ddpm\", \"ddim\" or \"dpm++2m\""),
        ({"label": 9}, "label", "label: got 9; expected classes that the model was trained on: 0 to 4"),
        ({"guidance_scale": 1e9}, "guidance_scale", "guidance_scale: got 1000000000.0"),
        ({"guidance_scale": [2, 1]}, "guidance_scale", "guidance_scale: got [2.0, 1.0]; expected one number, or 4 of"),
        ({"guidance_scale": "2"}, "guidance_scale", "guidance_scale: got '2'; expected a valid number"),
        ({"eta": -1}, "eta", "eta: got -1"),
        ({"eta": None}, "eta", "eta: got None; expected a valid number"),
        ({"eta": 0.5, "sampler": "dpm++2m"}, "eta", "eta: got 0.5; expected 0 with the sampler dpm++2m"),
        ({"timeout": 31}, "timeout", "timeout: got 31.0; expected at most 30, a limit of this server"),
        ({"timeout": 0}, "timeout", "timeout: got 0"),
        ({"format": "bmp"}, "format", "format: got 'bmp'; expected \"png\", \"npz\", \"json\" or \"events\""),
        ({"preview_every": 2}, "preview_every", "preview_every: got 2; expected format \"events\", or 0"),
        ({"prompt": "a cat"}, "body", "body: got 'prompt'; expected one of the fields num_images, seed"),
    ],
)  # fmt: skip
def test_bad_input_is_422_with_the_field_and_the_remedy(client, fields, field, message):
    answer = client.draw(**fields)
    assert (answer.status, answer.error["reason"], answer.error["field"]) == (422, "invalid", field)
    assert answer.error["message"].startswith(message)


@pytest.mark.parametrize("body", [b"{", b"[]", b'"x"', b"\xff\xfe", b'{"eta": NaN}', b'{"steps": 1e999}', b"[" * 400])
def test_a_body_that_is_no_object_of_fields_is_422(client, body):
    answer = client.ask("POST", "/generate", body)
    assert answer.status == 422 and answer.error["field"] in ("body", "eta", "steps")


def test_a_body_that_is_too_large_or_does_not_come_is_refused(client):
    answer = client.ask("POST", "/generate", b" " * 501)
    assert answer.status == 413 and "larger than 500 bytes" in answer.error["message"]
    with client.sent(b"{", length=100) as connection:  # the rest never comes
        assert b" 408 " in connection.makefile("rb").readline()
    with client.sent(b"{", length=100):
        pass  # the client leaves in the middle
    assert client.draw(steps=1).status == 200


@pytest.mark.parametrize(
    ("head", "sent", "status"),
    [
        (b"Content-Length: 400", b"{", b" 408 "),
        (b"Content-Length: 501", b"", b" 413 "),  # without waiting for it
        (b"Transfer-Encoding: chunked", b"1f5\r\n" + b" " * 501 + b"\r\n", b" 413 "),
    ],
)
def test_a_connection_whose_body_was_refused_is_closed(client, head, sent, status):
    """Else a client could send the rest of it for ever."""
    with socket.create_connection(client.address, timeout=30) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: test\r\n" + head + b"\r\n\r\n" + sent)
        answer = connection.makefile("rb").read()  # to the end of the connection
    assert status in answer.splitlines()[0] and b"\r\nconnection: close\r\n" in answer.lower()


@pytest.mark.parametrize(("is_first", "sent"), [(True, b""), (True, b"GET /health HT"), (False, b"GET /health HT")])
def test_a_connection_that_does_not_send_its_headers_is_closed(client, monkeypatch, sent, is_first):
    monkeypatch.setattr(PromptConnection, "header_seconds", 0.2)
    connection = http.client.HTTPConnection(*client.address, timeout=30)
    with closing(connection):
        connection.connect()
        if not is_first:
            connection.request("GET", "/health")
            assert connection.getresponse().read() and connection.sock
        connection.sock.sendall(sent)
        assert connection.sock.recv(1) == b""  # the end of the connection


def test_an_answer_may_take_longer_than_headers(held, monkeypatch):
    client, model, engine = held
    monkeypatch.setattr(PromptConnection, "header_seconds", 0.1)
    with client.sent(b'{"steps": 2}') as connection:
        assert model.reached.wait(30)
        time.sleep(0.2)
        model.gate.set()
        assert b" 200 " in connection.makefile("rb").readline()


def test_other_paths_and_methods_are_refused(client):
    assert client.get("/nothing").status == 404 and client.get("/generate").status == 405


def test_an_empty_body_asks_for_one_image_in_as_many_steps_as_may_be(client):
    answer = client.ask("POST", "/generate", b"")
    again = client.draw(seed=int(answer.headers["x-seed"]), num_images=1, steps=30, sampler="ddim")
    assert answer.status == 200 and answer.body == again.body and pixels(answer.body).shape == (8, 8)


def test_overload_is_503_with_the_time_to_come_back(held):
    client, model, engine = held
    with client.sent(b'{"steps": 3}') as first:
        assert model.reached.wait(30)
        with client.sent(b'{"steps": 3}') as second:
            wait_for(lambda: engine.load()["waiting"] == 1)
            answer = client.draw(steps=3)
            assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1
            assert answer.error["reason"] == "overloaded" and "no more may" in answer.error["message"]
            model.gate.set()
            for connection in (first, second):
                assert b" 200 " in connection.makefile("rb").readline()


@pytest.mark.parametrize("body", [b'{"steps": 40}', b'{"steps": 40, "format": "events", "preview_every": 1}'])
def test_a_client_that_leaves_frees_its_places(held, body):
    client, model, engine = held
    with client.sent(body):
        assert model.reached.wait(30)
    model.before = lambda call, rows: time.sleep(0.05)
    model.gate.set()
    wait_for(lambda: engine.load() == {"waiting": 0, "running": 0})
    assert engine.statistics.outcomes == {"cancelled": 1} and len(model.calls) < 40
    assert client.draw(steps=2).status == 200


def test_a_request_whose_time_is_over_is_504(held):
    client, model, engine = held
    model.before = lambda call, rows: time.sleep(0.01)
    model.gate.set()
    answer = client.draw(steps=40, timeout=0.05)
    assert answer.status == 504 and answer.error["reason"] == "expired"
    assert "of 40 steps were done" in answer.error["message"]


def test_a_step_that_raises_fails_its_requests_and_not_the_server(held):
    client, model, engine = held

    def before(call: int, rows: int) -> None:
        if call == 1:
            raise RuntimeError("CUDA out of memory")
        if call == 2:
            raise ZeroDivisionError("by design")

    model.before = before
    model.gate.set()
    first, second = client.draw(steps=2), client.draw(steps=2)
    assert (first.status, first.error["reason"]) == (503, "out_of_memory") and first.headers["retry-after"] == "1"
    assert (second.status, second.error["reason"]) == (500, "step_failed")
    assert client.draw(steps=2).status == 200 and client.get("/health").json["batch_places"] == 1
    ((name, data),) = client.events(steps=2, num_images=1, timeout=0.0001)
    assert name == "error" and data["reason"] == "expired"


def test_health_says_what_the_model_can_do_and_that_it_closes(held):
    client, model, engine = held
    facts = client.get("/health")
    assert facts.status == 200 and facts.json["status"] == "ok" and facts.json["model"] == "a test"
    assert facts.json["image"] == {"channels": 1, "height": 8, "width": 8} and facts.json["max_steps"] == 40
    model.gate.set()
    engine.close()
    assert client.get("/health").status == 503
    answer = client.draw(steps=2)
    assert (answer.status, answer.error["reason"]) == (503, "closed") and "shutting down" in answer.error["message"]


@pytest.mark.parametrize(("grace", "signals"), [(0.05, [signal.SIGTERM]), (60.0, [signal.SIGTERM, signal.SIGINT])])
def test_what_is_not_finished_in_time_or_before_a_second_signal_fails_with_a_reason(grace, signals):
    model = Scripted()
    model.gate.clear()
    engine = Engine(model, process(), SHAPE, max_batch=1, deterministic=False)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(3) as pool:
        engine.start()
        server = Server(create_app(engine), engine, grace)
        serving = pool.submit(server.serve_on, listener)
        client = Client(listener.getsockname())
        asked = [pool.submit(client.draw, steps=3) for _ in range(2)]
        wait_for(lambda: model.reached.is_set() and engine.load() == {"waiting": 1, "running": 1})
        for one in signals:
            server.handle_exit(one, None)
        wait_for(lambda: engine._abandon)  # nobody waits any more, and a step is in the model
        model.gate.set()
        answers = [one.result(60) for one in asked]
        serving.result(60)
    assert [(answer.status, answer.error["reason"]) for answer in answers] == [(503, "closed")] * 2
    assert engine.statistics.outcomes == {"closed": 2}


def test_a_body_that_has_not_come_when_the_server_ends_is_503():
    engine = Engine(Scripted(), process(), SHAPE, deterministic=False)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        engine.start()
        server = Server(create_app(engine), engine, grace=0.0)
        server.config.timeout_graceful_shutdown = 1
        serving = pool.submit(server.serve_on, listener)
        with Client(listener.getsockname()).sent(b"{", length=100) as connection:
            wait_for(lambda: server.server_state.tasks)
            server.handle_exit(signal.SIGTERM, None)
            answer = connection.makefile("rb").read()
        serving.result(60)
    assert b" 503 " in answer.splitlines()[0] and b"the body did not arrive before the end" in answer


def test_what_cannot_be_read_after_an_answer_closes_the_connection_in_silence(client, caplog):
    with socket.create_connection(client.address, timeout=30) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = connection.makefile("rb")
        assert b" 404 " in answer.readline()
        connection.sendall(b"no length\r\n")
        with suppress(ConnectionResetError):
            answer.read()  # to the end of the connection
    assert client.get("/health").status == 200 and "Fatal error" not in caplog.text


def test_a_body_that_is_no_http_is_400_and_counted_so(client):
    name = 'tdc_http_responses_total{path="/generate",status="%d"}'
    before = client.metrics()
    with socket.create_connection(client.address, timeout=30) as connection:
        connection.sendall(b"POST /generate HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
        connection.sendall(b"no length\r\n")
        assert b" 400 " in connection.makefile("rb").read().splitlines()[0]
    wait_for(lambda: client.metrics().get(name % 400, 0) == before.get(name % 400, 0) + 1)
    assert client.metrics().get(name % 499) == before.get(name % 499)


def test_metrics_count_every_answer_image_step_and_place(held):
    client, model, engine = held
    model.gate.set()
    for seed in range(3):
        assert client.draw(num_images=2, steps=5, seed=seed).status == 200
    assert client.draw(steps=0).status == 422 and client.get("/favicon.ico").status == 404
    seen = client.metrics()
    assert seen['tdc_requests_total{outcome="completed"}'] == 3 and seen["tdc_images_total"] == 6
    assert seen["tdc_steps_total"] == 15 == seen["tdc_step_seconds_count"]
    assert seen["tdc_batch_rows_total"] == 30 == seen['tdc_expert_rows_total{expert="0"}']
    assert seen['tdc_step_seconds_bucket{le="+Inf"}'] == 15 and seen["tdc_latency_seconds_count"] == 3
    assert 0 < seen["tdc_forward_seconds_total"] < seen["tdc_step_seconds_sum"]
    assert seen['tdc_http_responses_total{path="/generate",status="200"}'] == 3
    assert seen['tdc_http_responses_total{path="/generate",status="422"}'] == 1
    assert seen['tdc_http_responses_total{path="other",status="404"}'] == 1
    assert seen["tdc_queue_requests"] == seen["tdc_running_requests"] == 0
    assert seen["process_resident_memory_bytes"] > 2**20
