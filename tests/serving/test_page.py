"""The page at `/` in a real browser: images form before the eyes of whoever asks, and errors and Stop are told."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from tdc_fast.serving import Engine, Request
from tests.serving.browser import BROWSER, Page, browser
from tests.serving.http import served, wait_for
from tests.serving.models import CLASSES, SHAPE, Scripted, experts, process

for module in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(module, reason=f"no {module}: pip install tdc_fast[serve]")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium on PATH")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def open_page(page: Page, url: str) -> None:
    page.errors.clear()
    page.call("Page.navigate", url=url)
    page.wait_for("document.readyState === 'complete' && document.getElementById('model').textContent.trim()")


def fill(page: Page, **fields: object) -> None:
    for name, value in fields.items():
        page.evaluate(f"document.getElementById({name!r}).value = {str(value)!r}")


STATE = "document.getElementById('state').textContent"


def test_images_form_on_the_page_and_are_those_of_the_seed(page):
    model = experts()
    engine = Engine(model, process(), SHAPE, max_batch=8, classes=CLASSES, num_classes=6)
    with served(engine, images=4, steps=40) as client:
        open_page(page, client.url)
        assert page.evaluate("document.getElementById('model').textContent") == "a test"
        assert page.evaluate("[...document.getElementById('label').options].map((o) => o.value).join()") == ",0,1,2,3,4"
        fill(page, num_images=3, steps=40, seed=11, label=2)
        page.evaluate("""{
            window.seen = [];
            new MutationObserver(() => seen.push(document.getElementById('state').textContent))
                .observe(document.getElementById('state'), {childList: true});
            window.pictures = new Set();
            new MutationObserver(() => pictures.add(document.getElementById('picture').src))
                .observe(document.getElementById('picture'), {attributes: true});
        }""")
        page.click("#draw")
        assert page.wait_for(f"{STATE}.startsWith('3 images in') && {STATE}").endswith("seed 11")
        seen = page.evaluate("seen")
        steps = [int(text.split()[1]) for text in seen if text.startswith("step")]
        assert steps == sorted(set(steps)) and set(steps) <= set(range(2, 40, 2))
        assert len(steps) >= 10 and page.evaluate("pictures.size") >= 10, "the picture changes with the previews"
        with Engine(model, process(), SHAPE, classes=CLASSES, num_classes=6) as alone:
            expected = alone.submit(Request(num_images=3, steps=40, seed=11, label=2)).result(60).images
        shown = page.evaluate("document.getElementById('picture').src").partition("base64,")[2]
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))).convert("L"))
        assert np.array_equal(picture, np.concatenate(expected[:, 0].numpy(), axis=1))
        assert page.evaluate("document.getElementById('picture').getBoundingClientRect().width") > 100
    assert page.errors == []


def test_stop_frees_the_places_and_a_refusal_is_shown(page):
    model = Scripted(lambda call, rows: time.sleep(0.05))
    engine = Engine(model, process(), SHAPE, max_batch=2, max_queue=1, deterministic=False)
    with served(engine, images=2) as client:
        open_page(page, client.url)
        assert page.evaluate("document.getElementById('label_field').hidden")
        fill(page, num_images=2, steps=40)
        page.click("#draw")
        page.wait_for(f"{STATE}.startsWith('step ')")
        page.click("#stop")
        page.wait_for(f"{STATE} === 'stopped'")
        wait_for(lambda: engine.load() == {"waiting": 0, "running": 0})
        assert engine.statistics.outcomes == {"cancelled": 1}

        model.gate.clear()
        model.reached.clear()
        with client.sent(b'{"num_images": 2}'):
            assert model.reached.wait(30)
            with client.sent(b'{"num_images": 2}'):
                wait_for(lambda: engine.load()["waiting"] == 1)
                page.click("#draw")
                said = page.wait_for(f"document.getElementById('state').className === 'bad' && {STATE}")
                assert "requests are waiting, and no more may" in said and "try again in" in said
        model.gate.set()
    assert [text for text in page.errors if "503" not in text] == []
