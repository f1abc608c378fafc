"""Looks at every built page in Chromium, on a desk and on a phone, and prints what is broken there.

A page must not be wider than its window, and no code of the first one wider than its box; its images must be there and
have a text, its formulas must be drawn, its console must be silent, and it must not fetch anything from a network.

    python docs/look.py docs/_build/html                 # exits with 1 if something is broken
    python docs/look.py docs/_build/html --shots shots   # also takes a picture of every page

It needs selenium, and chromium and chromedriver on the path.
"""

import argparse
import base64
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

SIZES = {"desk": (1280, 900), "phone": (390, 844)}
FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run hide-scrollbars disable-background-networking "
    "disable-component-update disable-sync"
)
FORMULAS_ARE_DRAWN = "(window.MathJax?.startup.promise ?? Promise.resolve()).then(arguments[0])"
FAULTS = r"""
const faults = [];
for (const box of document.querySelectorAll("html, .content"))
  if (box.scrollWidth > box.clientWidth) faults.push(`${box.tagName}: ${box.scrollWidth} pixels in ${box.clientWidth}`);
if (location.pathname.endsWith("/index.html"))
  for (const code of document.querySelectorAll("pre"))
    if (code.scrollWidth > code.clientWidth) faults.push(`code is cut: ${code.textContent.slice(0, 60)}`);
for (const image of document.images)
  if (!image.naturalWidth || !image.alt) faults.push(`no image, or no text for it: ${image.src}`);
for (const formula of document.querySelectorAll(".math"))
  if (!formula.querySelector("mjx-container svg")) faults.push(`not drawn: ${formula.textContent}`);
for (const error of document.querySelectorAll("[data-mjx-error]"))
  faults.push(`${error.dataset.mjxError}: ${error.closest(".math").textContent}`);
const text = document.querySelector("article").cloneNode(true);
text.querySelectorAll("pre, code, mjx-container").forEach(part => part.remove());
for (const raw of text.textContent.match(/.{0,20}(\$\$|\\[a-z]{3,}|\\[\[(]).{0,20}/g) ?? []) faults.push(`raw: ${raw}`);
for (const {name} of performance.getEntriesByType("resource"))
  if (!name.startsWith("file:")) faults.push(`fetched: ${name}`);
return faults;
"""


def browser(width: int, height: int, profile: str) -> Chrome:
    """Chromium with a window of this size. A narrow one is a phone's, which no window of a desk can be."""
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in [*FLAGS.split(), f"user-data-dir={profile}", f"window-size={width},{height}"]:
        options.add_argument(f"--{flag}")
    if width < 500:
        metrics = {"width": width, "height": height, "pixelRatio": 2.0, "mobile": True, "touch": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return Chrome(options, Service(shutil.which("chromedriver")))


def faults(driver: Chrome, page: Path) -> Iterator[str]:
    """Opens a page and yields what is broken on it."""
    driver.get(page.resolve().as_uri())
    driver.execute_async_script(FORMULAS_ARE_DRAWN)
    yield from driver.execute_script(FAULTS)
    yield from (entry["message"] for entry in driver.get_log("browser") if entry["level"] != "INFO")


def take_shot(driver: Chrome, width: int, path: Path) -> None:
    """A picture of the whole page, down to 6000 pixels."""
    height = min(6000, driver.execute_script("return document.documentElement.scrollHeight"))
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(shot["data"]))


def main() -> None:
    """Looks at all pages in all sizes."""
    parser = argparse.ArgumentParser(description="Looks at every built page in Chromium.")
    parser.add_argument("site", type=Path, help="where Sphinx built the pages")
    parser.add_argument("--shots", type=Path, help="where to put pictures of the pages")
    arguments = parser.parse_args()

    pages = sorted(page for page in arguments.site.rglob("*.html") if "_static" not in page.parts)
    broken = 0
    for size, (width, height) in SIZES.items():
        with tempfile.TemporaryDirectory() as profile, browser(width, height, profile) as driver:
            for page in pages:
                for fault in faults(driver, page):
                    print(f"{page.relative_to(arguments.site)}, {size}: {fault}")
                    broken += 1
                if arguments.shots:
                    arguments.shots.mkdir(parents=True, exist_ok=True)
                    take_shot(driver, width, arguments.shots / f"{page.stem}-{size}.png")
    print(f"{len(pages)} pages, {broken} faults")
    sys.exit(broken > 0)


if __name__ == "__main__":
    main()
