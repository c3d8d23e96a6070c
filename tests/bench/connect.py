#!/usr/bin/env python3
"""Instructions of the dataplane's engine for each connection that its cache lets through, counted by callgrind: under
a policy of rules, with ten thousand other verdicts beside, and under `defaultAction: allow` alone.

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
TEST = "engine::tests::cost::connections"
CONNECTIONS = 1_000


def test_binary() -> str:
    """Builds the dataplane's unit tests as a release; their path."""
    command = ["cargo", "test", "--release", "-p", "vnet-dataplane", "--lib", "--no-run", "--message-format=json"]
    built = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == "vnet_dataplane":
            return message["executable"]
    sys.exit("connect.py: cargo names no test program of vnet-dataplane")


def instructions(binary: str, scene: str) -> float:
    """Instructions for each connection in a scene."""
    with tempfile.TemporaryDirectory() as directory:
        command = [
            "valgrind",
            "--tool=callgrind",
            "--collect-atstart=no",
            "--toggle-collect=*cost::one_connection*",
            f"--callgrind-out-file={directory}/out",
            binary,
            "--exact",
            TEST,
            "--ignored",
        ]
        run = subprocess.run(
            command, env=os.environ | {"VNET_SCENE": scene}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        counted = re.search(r"Collected : (\d+)", run.stdout)
        if run.returncode != 0 or not counted or int(counted[1]) == 0:
            sys.exit(f"connect.py: nothing was counted in scene {scene}:\n{run.stdout}")
        return int(counted[1]) / CONNECTIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-most", type=float, default=1.02, help="the ratio above which this fails (1.02)")
    arguments = parser.parse_args()
    binary = test_binary()
    default, rules = instructions(binary, "default"), instructions(binary, "rules")
    ratio = rules / default
    print(f"defaultAction: allow alone  {default:10.0f} instructions a connection")
    print(f"rules and 10,000 verdicts   {rules:10.0f}")
    print(f"ratio                       {ratio:10.4f}")
    if ratio > arguments.at_most:
        sys.exit(f"connect.py: above {arguments.at_most}")


if __name__ == "__main__":
    main()
