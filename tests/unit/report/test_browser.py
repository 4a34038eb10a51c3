"""The report in a real browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gradnoise.base import layout
from gradnoise.figures.names import SPECS

CHROMIUM = shutil.which("chromium")
PROBE = "probe of the console"
# Runs inside the page: what loaded, and whether the page is wider than the window.
SCRIPT = f"""<script>
addEventListener("load", () => {{
  console.log("{PROBE}");
  const report = {{
    title: document.title,
    pictures: [...document.querySelectorAll("figure img")].map(
      (image) => [image.alt, image.complete, image.naturalWidth, image.getBoundingClientRect().width]),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  }};
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(report);
}});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [500, 1280])
def test_the_page_loads_whole_without_complaint(rendered: Path, tmp_path: Path, width: int) -> None:
    page = tmp_path / "page.html"
    page.write_text(Path(layout.report("quick")).read_text().replace("</body>", SCRIPT))
    run = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            *("--enable-logging=stderr", "--dump-dom"),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    dumped = re.search(r'<pre id="found">(.*?)</pre>', run.stdout, re.DOTALL)
    assert dumped, run.stderr[-2000:]
    found = json.loads(html.unescape(dumped[1]))
    assert found["title"] == "REHEARSAL: Rehearsal of the noise study"
    assert [alt.split(":")[0] for alt, *_ in found["pictures"]] == [f"Figure {spec.number}" for spec in SPECS]
    for alt, complete, natural, shown in found["pictures"]:
        assert complete and natural > 500 and shown > 400, alt  # noqa: PT018
    assert found["overflow"] <= 0
    # The probe shows that the console was heard; nothing else may be in it.
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert len(console) == 1, console
    assert PROBE in console[0]
