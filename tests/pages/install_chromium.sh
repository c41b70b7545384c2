#!/bin/sh
# Install Chromium and its driver from the system's packages if they are missing; say how where that is not possible.
set -eu

has() { for name in "$@"; do command -v "$name" >/dev/null 2>&1 && return 0; done; return 1; }

has chromium chromium-browser google-chrome && has chromedriver && exit 0

if has apt-get; then
  commands="apt-get update -q && apt-get install -y -q --no-install-recommends chromium chromium-driver fonts-dejavu-core"
elif has dnf; then
  commands="dnf install -y chromium chromedriver"
else
  echo "Chromium and chromedriver are missing, and neither apt-get nor dnf is here. Install both, then repeat." >&2
  exit 1
fi
if [ "$(id -u)" = 0 ]; then
  sh -c "$commands"
elif has sudo && sudo -n true 2>/dev/null; then
  sudo -n sh -c "$commands"
else
  echo "Chromium or chromedriver is missing. Install them as root, then repeat: $commands" >&2
  exit 1
fi
has chromium chromium-browser google-chrome && has chromedriver
