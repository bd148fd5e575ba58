"""Print the exact versions of an environment as a requirements file: write_lock.py PYTHON."""

import json
import subprocess
import sys

#: Installed by other means (Makefile), or parts of every virtual environment.
LEFT_OUT = {"pip", "qaa-serve", "torch"}

listing = subprocess.run(
    [sys.argv[1], "-m", "pip", "--disable-pip-version-check", "list", "--format=json"],
    check=True,
    capture_output=True,
    text=True,
)
print("# Written by `make lock` from cpu.in and pyproject.toml; installed with --no-deps, after torch==2.13.0.")
for package in sorted(json.loads(listing.stdout), key=lambda package: package["name"].lower()):
    if package["name"].lower() not in LEFT_OUT:
        print(f"{package['name']}=={package['version'].partition('+')[0]}")
