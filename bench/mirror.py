#!/usr/bin/env python3
"""mirror.py - how fast `imgserver.py mirror` brings an image.

    python3 bench/mirror.py [--quick] [--rounds N] [--python PYTHON] [--dir DIR]

Beside it: a pipe that does the same by tools, curl from the same server, tee to a file, sha1sum,
and gzip -dc where the stream is examined in compressed bytes.  Once with the stream as gzip, once
as gzip with --no-stream-check, once as it is.  With --quick, the start of Python (0.2 s) counts.
"""

import importlib
import os
import shutil
import statistics
import subprocess
import time

from bench import (GIB, IMGSERVER, MIB, Failure, option_parser, print_table, reached, say, short,
                   workplace)

PIPE = "curl -s {} | tee FILE | sha1sum"
KINDS = (                     # (what is brought, options of mirror, the pipe beside it, the goal)
    ("gzip", (), "curl -s {} | tee FILE | tee >(sha1sum >SUM) | gzip -dc | tail -c 1", ">= 0.9 x"),
    ("gzip, --no-stream-check", ("--no-stream-check",), PIPE, ">= 0.8 x"),
    ("none", (), PIPE, ">= 0.8 x"))

make_file = importlib.import_module("import").make_file      # its name is a keyword


def timed(command, directory):
    """Seconds of a command, whose files go into a directory that is empty before."""
    shutil.rmtree(directory, ignore_errors=True)
    os.mkdir(directory)
    began = time.monotonic()
    done = subprocess.run(command, cwd=directory, stdout=subprocess.PIPE)
    if done.returncode:
        raise Failure(f"{command} ended with status {done.returncode}")
    return time.monotonic() - began


def publish(options, directory, path):
    """Serve the file as an image: (the server's process, its URL, uuid of the image)."""
    images = os.path.join(directory, "images")
    shutil.rmtree(images, ignore_errors=True)
    os.mkdir(images)
    base = [options.python, IMGSERVER, "--config", os.path.join(directory, "config.json"),
            "--dir", images]
    with open(path, "rb") as file:
        uuid = subprocess.run([*base, "import", "-q", "bench", "1.0.0", "A benchmark"],
                              stdin=file, stdout=subprocess.PIPE, text=True,
                              check=True).stdout.strip()
    server = subprocess.Popen([*base, "--listen", "127.0.0.1:0"], stderr=subprocess.PIPE,
                              text=True)
    url = server.stderr.readline().split(" on ")[-1].strip()
    return server, url, uuid


def measure(options, directory, path, words, pipe):
    """(seconds of the pipe, seconds of mirror) of each round."""
    server, url, uuid = publish(options, directory, path)
    here = os.path.join(directory, "here")
    pipe = ["bash", "-c", pipe.format(f"{url}/images/{uuid}/file")]
    mirror = [options.python, IMGSERVER, "--config", os.path.join(directory, "config.json"),
              "--dir", here, "mirror", "-q", *words, url, uuid]
    try:
        rounds = []
        for number in range(options.rounds or (1 if options.quick else 5)):
            pair = [timed(command, here) for command in (pipe, mirror)[::1 - 2 * (number % 2)]]
            rounds.append(pair[::1 - 2 * (number % 2)])
            say(f"round {number + 1}: pipe {short(rounds[-1][0])} s, mirror "
                f"{short(rounds[-1][1])} s")
        return rounds
    finally:
        server.terminate()
        server.communicate()


def main():
    options = option_parser("Measure imgserver.py mirror.", "5 GiB").parse_args()
    with workplace("mirror", options) as directory:
        rows = []
        path = os.path.join(directory, "stream.gz")
        make_file(path, 256 * MIB if options.quick else 2 * GIB)
        for kind, words, pipe, goal in KINDS:
            if kind == "none":
                subprocess.run(["gzip", "-d", path], check=True)
                path = path[:-len(".gz")]
            size = os.path.getsize(path)
            rounds = measure(options, directory, path, words, pipe)
            curl, ours = (statistics.median(each[side] for each in rounds) for side in (0, 1))
            ratio = statistics.median(each[0] / each[1] for each in rounds)
            rows.append([kind, short(curl), short(ours), short(size / ours / 1e6), short(ratio),
                         goal, reached(goal, None, ratio)])
        print_table(["file", "pipe s", "mirror s", "MB/s", "ratio", "goal", "reached"], rows,
                    {1, 2, 3, 4})


if __name__ == "__main__":
    main()
