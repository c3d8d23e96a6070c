#!/usr/bin/env python3
"""Instructions of the dataplane's engine for each connection that its cache lets through, counted by callgrind: under
a policy of rules, with ten thousand other verdicts beside, and under `defaultAction: allow` alone. And for each segment
of an open connection: with other connections open beside it, and alone.

    tests/bench/connect.py [--at-most 1.02]

Runs on any Linux machine with valgrind; fails if the ratio is above --at-most. Whatever the engine does is counted from
a guest's SYN to the last acknowledgement, with the test's own scripted guest on both sides of the ratio. System calls
are not: they are the driver's, and the same either way.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
TESTS = "engine::tests::cost"
# Of connections, and of segments.
EACH = 1_000


def test_binary() -> str:
    """Builds the dataplane's unit tests as a release; their path."""
    command = ["cargo", "test", "--release", "-p", "vnet-dataplane", "--lib", "--no-run", "--message-format=json"]
    built = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == "vnet_dataplane":
            return message["executable"]
    sys.exit("connect.py: cargo names no test program of vnet-dataplane")


def instructions(binary: str, test: str, counted_in: str, scene: str) -> float:
    """Instructions for each call of a function in a scene of a test."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            "valgrind",
            "--tool=callgrind",
            "--collect-atstart=no",
            f"--toggle-collect=*cost::{counted_in}*",
            f"--callgrind-out-file={directory}/out",
            binary,
            "--exact",
            f"{TESTS}::{test}",
            "--ignored",
        ]
        run = subprocess.run(
            command, env=os.environ | {"VNET_SCENE": scene}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        counted = re.search(r"Collected : (\d+)", run.stdout)
        if run.returncode != 0 or not counted or int(counted[1]) == 0:
            sys.exit(f"connect.py: nothing was counted in scene {scene}:\n{run.stdout}")
        return int(counted[1]) / EACH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-most", type=float, default=1.02, help="the ratios above which this fails (1.02)")
    arguments = parser.parse_args()
    binary = test_binary()
    worse = []
    for test, counted_in, scenes in (
        ("connections", "one_connection", {"default": "defaultAction: allow alone", "rules": "rules and 10,000 verdicts"}),
        ("packets", "one_packet", {"alone": "a segment of the only flow", "others": "beside 63 other flows"}),
    ):
        counts = [instructions(binary, test, counted_in, scene) for scene in scenes]
        for said, count in zip(scenes.values(), counts):
            print(f"{said:28} {count:10.0f} instructions each")
        ratio = counts[1] / counts[0]
        print(f"{'ratio':28} {ratio:10.4f}")
        if ratio > arguments.at_most:
            worse.append(test)
    if worse:
        sys.exit(f"connect.py: above {arguments.at_most}: {', '.join(worse)}")


if __name__ == "__main__":
    main()
