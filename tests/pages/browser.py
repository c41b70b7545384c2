"""A headless Chromium of the system's packages, as the browser tests drive it: what it logged, what it asked for."""

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

PROBES = Path(__file__).with_name("probes.js").read_text()
DESKTOP, PHONE = (1280, 900), (390, 844)


class Browser:
    """One tab; every page it opens is a file."""

    def __init__(self) -> None:
        options = Options()
        found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        assert found, "no Chromium: `make check-browser` says how to install one"
        options.binary_location = found
        for flag in ("headless=new", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking"):
            options.add_argument(f"--{flag}")
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")  # Chromium has none for root
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))

    def close(self) -> None:
        self.driver.quit()

    def look(self, *, dark: bool = False, size: tuple[int, int] = DESKTOP) -> None:
        """Show pages in one of the colour schemes, at a window size in CSS pixels."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def open(self, page: Path) -> None:
        """Open a page, its logs emptied before."""
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        self.driver.get(page.resolve().as_uri())

    def js(self, program: str, *arguments: Any) -> Any:
        """Return what a piece of JavaScript returns."""
        return self.driver.execute_script(program, *arguments)

    def probe(self, name: str) -> list[str]:
        """Return what one of the probes minds about the page."""
        return self.js(f"{PROBES}\nreturn {name}();")

    def console(self) -> list[str]:
        """Return what the console says since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return every address asked for since the page was opened, the page's own included."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith("data:")]

    def picture(self, path: Path, *, whole: bool = True) -> Path:
        """Save a screenshot of the page, the whole of it or the window."""
        height = self.js("return document.documentElement.scrollHeight") if whole else None
        settings: dict[str, Any] = {"captureBeyondViewport": whole}
        if whole:
            width = self.js("return document.documentElement.clientWidth")
            settings["clip"] = {"x": 0, "y": 0, "width": width, "height": min(height, 6000), "scale": 1}
        path.write_bytes(base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", settings)["data"]))
        return path
