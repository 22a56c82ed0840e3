"""The page of `minsd web`: what its server answers and refuses, and the page itself in Chromium."""

import http.client
import json
import shlex
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minsd.app import web
from minsd.generate import main
from minsd.noise import initno

PROMPT = "a red circle and a blue square"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def server(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "net.safetensors").write_bytes(b"")
    server = web.Server(web.Studio(tmp_path / "out", [tmp_path / "models"]), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.studio.cancelled = True
    server.shutdown()
    server.server_close()


def ask(server, path, form=None, headers=None):
    """Returns the status, the headers and the content of an answer. JSON is parsed."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    body = None if form is None else json.dumps(form)
    connection.request("GET" if form is None else "POST", path, body, JSON if headers is None else headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    is_json = answer.getheader("Content-Type") == "application/json"
    return answer.status, answer.headers, json.loads(content) if is_json else content


def finished(server, seconds=300):
    end = time.monotonic() + seconds
    while (state := ask(server, "/state")[2])["running"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    return state


def same_from_the_command_line(command, out, file):
    """Whether the command that the page shows draws the same image into an empty folder."""
    words = shlex.split(command)
    assert words.pop(0) == "minsd"
    words[words.index("--out") + 1] = str(out)
    assert main([*words, "--quiet"]) == 0
    [again] = out.glob("*.png")
    return np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(file)))


def test_a_layout_is_drawn_and_its_command_draws_it_again(server, tmp_path):
    regions = [
        {"prompt": "a red circle", "box": [0, 0.2, 0.45, 0.8], "mask": "/etc/passwd"},
        {"prompt": "a blue square", "box": [0.55, 0.2, 1, 0.8]},
    ]
    form = {
        "prompt": PROMPT,
        "seed": "1",
        "steps": "3",
        "preview": "2",
        "regions": regions,
        "more": "--layout-method paper",
    }
    code, _, answer = ask(server, "/run", form | {"methods": ["plain", "select:attention:2"]})
    assert code == 200 and len(answer["commands"]) == 2
    state = finished(server)
    assert not state["error"] and [image["method"] for image in state["images"]] == [
        "plain",
        "select:attention:2",
    ]
    out = tmp_path / "out"
    written = json.loads((out / "layouts" / "0.json").read_text())
    boxes = [(region["prompt"], region["box"]) for region in regions]
    assert written["regions"] == [{"prompt": prompt, "box": box} for prompt, box in boxes]  # and no mask
    first = state["images"][0]
    assert first["attention"] and first["command"] == answer["commands"][0]
    assert ask(server, f"/file/{first['file']}")[2] == (out / first["file"]).read_bytes()
    assert ask(server, f"/{state['preview']}")[2][:4] == b"\x89PNG"
    assert same_from_the_command_line(first["command"], tmp_path / "again", out / first["file"])
    ask(server, "/run", form)
    finished(server)
    assert len(list((out / "layouts").iterdir())) == 1  # the same layout has the same file


def test_candidates_come_with_their_scores(server, shapes):
    assert ask(server, "/candidates", {"prompt": PROMPT, "seed": "1", "count": "3"})[0] == 200
    found = finished(server)["candidates"]
    seeds = [int(one["seed"]) for one in found]
    assert 1 in seeds and len(set(seeds)) == 3
    scores = initno.attention_scores(shapes, PROMPT, None, seeds)
    assert [one["score"] for one in found] == pytest.approx(scores, abs=2e-3)
    assert scores == sorted(scores) and found[0]["peaks"][0].startswith("circle 0.")
    assert ask(server, f"/{found[0]['picture']}")[0] == 200


def test_one_job_at_a_time_which_can_be_cancelled(server):
    ask(server, "/run", {"prompt": PROMPT, "seed": "1", "steps": "900"})
    assert "a job is running" in ask(server, "/run", {"prompt": PROMPT})[2]["error"]
    ask(server, "/cancel", {})
    state = finished(server)
    assert state["error"] == "cancelled" and not state["images"]


@pytest.mark.parametrize(
    "form, message",
    [
        ({"methods": ["bset:1"]}, "objective"),
        ({"steps": "0"}, "--steps must be from 1"),
        ({"more": "--vae /etc"}, "--vae: /etc is not in the folders of this page"),
        ({"more": "--lora ../../x.safetensors:0.5"}, "--lora: there is no ../../x.safetensors"),
        ({"model": "runwayml/stable-diffusion-v1-5"}, "--model: there is no runwayml"),
        ({"model": "sd15"}, "--model: there is no sd15"),
        ({"more": "--out /tmp"}, "--out: /tmp is not in the folders of this page"),
        ({"more": "--resume"}, "--resume is for the command line"),
        ({"more": "--prompts x.txt"}, "--prompts is for the command line"),
        ({"more": "'"}, "No closing quotation"),
        ({"regions": [{"prompt": "x", "box": [0.5, 0, 0.2, 1]}]}, "box"),
        ({"regions": [3]}, "TypeError"),
        ({"prompt": ""}, None),  # an empty prompt is one
    ],
)
def test_mistakes_are_answered_with_one_line(server, form, message):
    code, _, answer = ask(server, "/run", {"prompt": PROMPT, "seed": "1", "steps": "1"} | form)
    assert code == (200 if message is None else 400)
    if message is not None:
        assert message in answer["error"] and "\n" not in answer["error"]
        assert not server.studio.state.running


def test_only_this_page_is_answered(server, tmp_path):
    code, headers, page = ask(server, "/")
    assert code == 200 and b"<canvas" in page and b"http" not in page  # nothing from elsewhere
    assert headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert ask(server, "/start")[2]["models"] == [
        "shapes",
        "shapes-turbo",
        str(tmp_path / "models" / "net.safetensors"),
    ]
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    for path in ("/file/../secret.png", "/file//etc/passwd.png", "/file/none.png", "/nothing"):
        assert ask(server, path)[0] == 404
    for host in ("evil.example:80", "127.0.0.1.evil.example:80"):
        assert ask(server, "/state", headers={"Host": host})[0] == 400
    assert ask(server, "/run", {}, {"Content-Type": "text/plain"})[2]["error"] == "a request must be JSON"
    assert ask(server, "/run", [1])[0] == 400 and ask(server, "/elsewhere", {})[0] == 400
    assert ask(server, "/cancel", {}, JSON | {"Content-Length": str(2**30)})[0] == 400


def test_the_command_refuses_mistakes_in_one_line(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words in (["--folder", str(tmp_path / "no")], ["--port", port], ["--prot", "1"], ["--port", "x"]):
            assert web.main(words) == 2
            assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_the_page_in_chromium(server, tmp_path):
    """Two boxes are drawn and captioned, Draw is pressed, and the image appears. Nothing is asked of
    any other machine, and the command that the page shows draws the same image."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        pytest.skip("needs Chromium and playwright")
    quiet = ["background-networking", "component-update", "sync", "gpu", "quic"]
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    asked, complaints = [], []
    with sync_playwright() as play:
        switches = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
        browser = play.chromium.launch(executable_path=chromium, args=switches)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(300_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        page.locator("#sampler option").nth(1).wait_for(state="attached")
        page.fill("#steps", "6")
        page.fill("#preview", "2")
        page.fill("#more", "--layout-method paper")  # its best noises take a while
        for (x0, y0, x1, y1), caption in (
            ((0.02, 0.2, 0.45, 0.8), "a red circle"),
            ((0.55, 0.2, 0.98, 0.8), "a blue square"),
        ):
            board = page.locator("#board").bounding_box()
            assert board is not None
            corners = [
                (board["x"] + x * board["width"], board["y"] + y * board["height"])
                for x, y in ((x0, y0), (x1, y1))
            ]
            page.mouse.move(*corners[0])
            page.mouse.down()
            page.mouse.move(*corners[1], steps=4)
            page.mouse.up()
            page.keyboard.type(caption)  # into the new box's field
        page.click("#run")
        image = page.locator("#images img")
        image.wait_for()
        page.locator("#maps canvas").nth(1).wait_for()
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") == 128
        command = page.text_content("#commands")
        page.screenshot(path=tmp_path / "page.png")
        page.fill("#steps", "900")
        page.click("#run")
        page.click("#cancel:enabled")
        page.get_by_text("cancelled").wait_for()
        browser.close()
    assert not complaints and all(url.startswith(address) for url in asked)
    [layout] = (tmp_path / "out" / "layouts").glob("*.json")
    regions = json.loads(layout.read_text())["regions"]
    assert [region["prompt"] for region in regions] == ["a red circle", "a blue square"]
    assert np.allclose(
        [region["box"] for region in regions], [[0.02, 0.2, 0.45, 0.8], [0.55, 0.2, 0.98, 0.8]], atol=0.01
    )
    [file] = Path(tmp_path / "out").glob("*.png")
    assert same_from_the_command_line(command, tmp_path / "again", file)
