"""Overview and player of a recording."""

import base64
import io
import json
import re
import shutil
import subprocess
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from multifire.cli import main
from multifire.cli.recordings import blocks, rate_lines
from multifire.events import open_recording, to_frames
from multifire.events.overview import look_over
from multifire.events.play import Film, film, page, write_film
from multifire.utils import images
from tests.events.event_files import NamedBytes, encode_aedat2, encode_davis, random_events, sensor_events

CHROMIUM = shutil.which("chromium")
EVENTS = random_events(3000, last_us=1_000_000)


def opener(content: bytes = encode_aedat2(EVENTS), **options):
    return lambda: open_recording(NamedBytes(content), **options)


def test_overview_counts_what_the_recording_holds():
    found = look_over(opener(), parts=10)
    assert (found.format, found.sensor_size, found.events) == ("aedat2", (128, 128), 3000)
    assert found.on_events == EVENTS["p"].sum()
    assert (found.first_us, found.last_us) == (EVENTS["t"][0], EVENTS["t"][-1])
    assert found.pixel_counts.sum() == 3000
    assert found.pixel_counts[EVENTS["y"][0], EVENTS["x"][0]] >= 1
    part = (found.last_us - found.first_us + 1) / 10
    expected = [
        [np.count_nonzero((EVENTS["p"] == p) & ((EVENTS["t"] - EVENTS["t"][0]) // part == k)) for p in (0, 1)]
        for k in range(10)
    ]
    assert np.allclose(found.rates * part / 1e6, expected)


def test_recording_of_one_moment():
    found = look_over(opener(b"t,x,y,p\n7,1,1,1\n7,2,2,0\n", sensor_size=(4, 4)))
    assert (found.events, found.first_us, found.last_us) == (2, 7, 7)
    assert found.rates.sum() > 0


def test_film_of_decades(tmp_path):
    """One event before the camera's clock was set."""
    content = b"t,x,y,p\n0,1,1,1\n1600000000000000,2,2,0\n"
    shown = film(opener(content, sensor_size=(4, 4)), look_over(opener(content, sensor_size=(4, 4))), fps=30)
    for ending in (".png", ".gif", ".html"):
        write_film(tmp_path / f"film{ending}", shown, "decades")


def test_film_shows_every_slice():
    overview = look_over(opener())
    shown = film(opener(), overview, fps=20)
    assert shown.slice_us == 50_000
    frames = to_frames(EVENTS, size=(128, 128), duration_us=50_000, timesteps=len(shown.pictures))
    assert frames.sum() == 3000
    assert np.array_equal(shown.pictures, images.paint(frames, 1.0))
    assert np.allclose(shown.rates * 0.05, frames.sum((2, 3)))
    turned = film(opener(), overview, fps=20, flip_x=True, flip_y=True)
    assert np.array_equal(turned.pictures, shown.pictures[:, ::-1, ::-1])
    slow = film(opener(), overview, fps=20, speed=0.5)
    assert (slow.slice_us, slow.seconds_each) == (25_000, 0.05)


def test_film_of_a_large_sensor_and_a_long_recording_is_bounded():
    content = encode_davis(sensor_events(640, 480, 200_000), "DAVIS640")
    overview = look_over(opener(content))
    tracemalloc.start()
    shown = film(opener(content), overview, fps=1e6, pictures=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shown.pictures.shape == (100, 240, 320)
    assert peak < 100 * 3 * 240 * 320 + 20_000_000


def test_time_that_runs_backwards_is_shown_at_the_latest_time():
    rows = b"t,x,y,p\n0,0,0,1\n1000000,1,1,1\n500,2,2,0\n1000001,3,3,1\n"
    chunked = opener(rows, sensor_size=(4, 4))
    shown = film(chunked, look_over(chunked), fps=1)
    assert shown.rates.sum() == 4


def test_page_holds_the_pictures_the_rates_and_a_slider():
    shown = film(opener(), look_over(opener()), fps=10)
    text = page(shown, "<b>a & b</b>")
    assert "<title>&lt;b&gt;a &amp; b&lt;/b&gt;</title>" in text
    assert 'type="range"' in text
    assert not re.search(r"https?://|src=\"[^d]", text)  # nothing is fetched
    data = json.loads(re.findall(r'application/json">(.*?)</script>', text)[0])
    assert len(data["pictures"]) == len(data["rates"]) == len(shown.pictures)
    for number in (0, len(shown.pictures) - 1):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["pictures"][number]))).convert("RGB"))
        assert np.array_equal(picture, images.PALETTE[shown.pictures[number]])
    assert not re.search(r"\{[A-Z]+\}", text)


@pytest.mark.parametrize("ending", ["png", "gif"])
def test_animation_has_every_picture(tmp_path, ending):
    shown = film(opener(), look_over(opener()), fps=5)
    write_film(tmp_path / f"a.{ending}", shown, "a")
    with Image.open(tmp_path / f"a.{ending}") as picture:
        assert getattr(picture, "n_frames", 1) == len(shown.pictures)
        assert picture.size == (384, 384)


def test_terminal_shows_two_pixels_in_a_character():
    pictures = np.array([[[240, 0], [0, 15], [15, 15]]], np.uint8)  # ON is blue, OFF red
    text = blocks(Film(pictures, np.array([[5.0, 7000.0]]), 1e6, 1.0, 0), 0)
    assert text.plain == "▀▀\n▀▀\n   0.000 s   ON 7,000/s   OFF 5/s"
    assert [str(span.style) for span in text.spans][:2] == ["#0000ff on #ffffff", "#ffffff on #ff0000"]


def test_rates_share_one_scale():
    assert rate_lines(np.array([[0, 80], [40, 10], [8, 0.0]])) == ["ON  █▁  at most 80/s", "OFF  ▄▁ at most 40/s"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_page_runs_in_a_browser(tmp_path):
    (tmp_path / "a.html").write_text(page(film(opener(), look_over(opener())), "a recording"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [CHROMIUM, *flags, "--dump-dom", (tmp_path / "a.html").as_uri()]
    drawn = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert re.search(r'polyline class="on" points="0,\d', drawn)
    assert re.search(r"<output>0\.000 s</output>", drawn)
    assert 'src="data:image/png;base64,' in drawn


def test_command(tmp_path, capsys):
    file = tmp_path / "a.aedat"
    file.write_bytes(encode_aedat2(EVENTS))
    assert main(["data", "play", str(file)]) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "3,000 events in" in out
    assert "give --out FILE.html for a page with a time slider" in out
    assert main(["data", "play", str(file), "--out", str(tmp_path / "a.html"), "--hot-pixels", "drop"]) == 0
    assert "30 pictures of 33.3 ms; blue: ON, red: OFF; written to" in capsys.readouterr().out.replace("\n", " ")
    assert (tmp_path / "a.html").stat().st_size > 10_000
    for options, expected in (
        (["--out", str(tmp_path / "a.mp4")], "expected .html, .png or .gif"),
        (["--out", str(tmp_path / "no/a.html")], "no such folder"),
        (["--out", str(tmp_path / "b.html"), "--fps", "0"], "fps 0 and speed 1 must be numbers above 0"),
        (["--out", str(tmp_path / "b.html"), "--speed", "nan"], "must be numbers above 0"),
    ):
        assert main(["data", "play", str(file), *options]) == 2
        err = capsys.readouterr().err
        assert expected in err
        assert err.count("\n") == 1
    np.save(tmp_path / "a.npy", EVENTS)
    assert main(["data", "play", str(tmp_path / "a.npy"), "--out", str(tmp_path / "c.html")]) == 2
    assert "does not state its sensor's size; give it with --sensor" in capsys.readouterr().err
    assert main(["data", "play", str(tmp_path / "none")]) == 2
