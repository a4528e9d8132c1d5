#!/usr/bin/env python3
"""import.py - how fast `imgserver.py import` and `check` read an image.

    python3 bench/import.py [--quick] [--rounds N] [--python PYTHON] [--dir DIR] [--base DIR]

Beside them: `gzip -dc < FILE | sha1sum` on the same file, which must be decompressed and
hashed too; or, with --base, the same commands of the imgserver.py in another directory.  The
file is a made-up ZFS send stream that compresses about as real ones do.
"""

import hashlib
import itertools
import os
import random
import shutil
import statistics
import struct
import subprocess
import time

from bench import (GIB, IMGSERVER, MIB, Failure, find_tool, option_parser, print_table, reached,
                   say, short, workplace)

DRR_BEGIN, DRR_WRITE, DRR_END = 0, 3, 5
DRR_LENGTH = 312              # bytes of a record, without its payload
DRR_MAGIC = 0x2F5bacbac
GUID = 0x1234567890ABCDEF
BLOCK = 128 << 10             # bytes of payload after a record: the usual recordsize of ZFS
POOL = 256                    # different blocks: far more than the 32 KiB that gzip looks back
GOAL, BASE_GOAL = ">= 0.9 x", ">= 0.95 x"

IMPORT, CHECK = "imgserver.py import", "imgserver.py check"


# -- the stream --------------------------------------------------------------------------

def record(layout, *values):
    return struct.pack("<" + layout, *values).ljust(DRR_LENGTH, b"\0")


def pieces_of(kinds, total, rng):
    """`total` bytes of random pieces, the first kinds far more often than the last."""
    weights = list(itertools.accumulate(1 / (1 + number) for number in range(len(kinds))))
    data = b"".join(rng.choices(kinds, cum_weights=weights, k=total // 4))
    return (data * (total // len(data) + 1))[:total]


def blocks():
    """Payload as a zone has it: texts, programs, what is compressed already, and nothing."""
    rng = random.Random(7)
    words = [bytes(rng.choices(b"etaoinshrdlucmfw", k=rng.randint(1, 9))) + b" "
             for _ in range(4000)]
    code = [rng.randbytes(rng.randint(2, 7)) for _ in range(4000)]
    makers = [(40, lambda: pieces_of(words, BLOCK, rng)),
              (35, lambda: pieces_of(code, BLOCK, rng)),
              (15, lambda: rng.randbytes(BLOCK)),
              (10, lambda: bytes(BLOCK))]
    weights = [weight for weight, _ in makers]
    return [rng.choices(makers, weights)[0][1]() for _ in range(POOL)]


def stream(size):
    """Yield a ZFS send stream of `size` bytes or a little more: BEGIN, data, END."""
    yield record("IIQQQIIQQ256s", DRR_BEGIN, 0, DRR_MAGIC, 1, int(time.time()), 2, 0, GUID, 0,
                 b"zones/bench@final")
    sent = 2 * DRR_LENGTH
    for number, block in enumerate(itertools.cycle(blocks())):
        if sent >= size:
            break
        yield record("IIQIIQQQ", DRR_WRITE, 0, 1, 19, 0, number * BLOCK, BLOCK, GUID)
        yield block
        sent += DRR_LENGTH + BLOCK
    yield record("II4QQ", DRR_END, 0, 0, 0, 0, 0, GUID)


def make_file(path, size):
    """Write the compressed stream to path; returns (its size, sha1) before compression."""
    compressor = shutil.which("pigz") or find_tool("gzip")
    digest, total = hashlib.sha1(), 0
    with open(path, "wb") as file:
        process = subprocess.Popen([compressor, "-1", "-c"], stdin=subprocess.PIPE, stdout=file)
        with process.stdin as pipe:
            for data in stream(size):
                digest.update(data)
                total += len(data)
                pipe.write(data)
        if process.wait():
            raise Failure(f"{compressor} failed")
        os.fsync(file.fileno())
    return total, digest.hexdigest()


# -- measurements ------------------------------------------------------------------------

def timed(command, path=None):
    """(seconds, standard output) of a command that reads the file at path."""
    with open(path or os.devnull, "rb") as file:
        began = time.monotonic()
        done = subprocess.run(command, stdin=file, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise Failure(f"{command} ended with status {done.returncode}: {done.stdout.strip()}")
    return time.monotonic() - began, done.stdout.strip()


def pipe(path, sha1):
    """Seconds of gzip and sha1sum, beside which both commands are put."""
    seconds, output = timed(["sh", "-c", "gzip -dc | sha1sum"], path)
    if output.split()[0] != sha1:
        raise Failure("gzip -dc | sha1sum gave another sha1")
    return {IMPORT: seconds, CHECK: seconds}


def commands(python, program, directory, path):
    """Seconds of an imgserver.py's import and check."""
    serve_dir = os.path.join(directory, "images")
    command = [python, program, "--config", os.path.join(directory, "config.json"),
               "--dir", serve_dir]
    os.mkdir(serve_dir)
    imported, uuid = timed([*command, "import", "-q", "bench", "1.0.0", "A benchmark"], path)
    checked, _ = timed([*command, "check", "-q", uuid])
    shutil.rmtree(serve_dir)
    return {IMPORT: imported, CHECK: checked}


def one_round(options, directory, path, sha1, number):
    """(seconds beside, seconds of ours), each by command; who comes first changes."""
    def ours():
        return commands(options.python, IMGSERVER, directory, path)

    def beside():
        if not options.base:
            return pipe(path, sha1)
        return commands(options.python, os.path.join(options.base, "imgserver.py"), directory,
                        path)
    if number % 2:
        return beside(), ours()
    return (ours(), beside())[::-1]


def report(rounds, size, stored, base):
    print(f"A ZFS stream of {size / MIB:,.0f} MiB, {stored / MIB:,.0f} MiB as gzip; medians of "
          f"{len(rounds)} round{'s' * (len(rounds) > 1)}; MB of the stream, not of the file; "
          f"{os.cpu_count()} cores.\n")
    rows, goal = [], BASE_GOAL if base else GOAL
    for name in (IMPORT, CHECK):
        theirs, ours = (statistics.median(each[side][name] for each in rounds) for side in (0, 1))
        ratios = [beside[name] / own[name] for beside, own in rounds]
        ratio = statistics.median(ratios)
        spread = f"{short(min(ratios))} - {short(max(ratios))}" if len(ratios) > 1 else ""
        rows.append([name, short(theirs), short(ours), short(size / ours / 1e6), short(ratio),
                     spread, goal, reached(goal, None, ratio)])
    print_table(["work", "base s" if base else "pipe s", "s", "MB/s", "ratio",
                 "of rounds", "goal", "reached"], rows, {1, 2, 3, 4})


def main():
    parser = option_parser("Measure imgserver.py import and check.", "2 GiB")
    parser.add_argument("--base", metavar="DIR", default=None,
                        help="beside the imgserver.py in DIR, not beside gzip and sha1sum")
    options = parser.parse_args()
    with workplace("import", options) as directory:
        path = os.path.join(directory, "stream.gz")
        say("making the stream")
        size, sha1 = make_file(path, 256 * MIB if options.quick else 2 * GIB)
        rounds = []
        count = options.rounds or (1 if options.quick else 5)
        for number in range(1, count + 1):
            rounds.append(one_round(options, directory, path, sha1, number))
            say(f"round {number}/{count}  " + "; ".join(
                f"{side}: " + ", ".join(f"{name}: {short(seconds)} s"
                                        for name, seconds in figures.items())
                for side, figures in zip(("beside", "ours"), rounds[-1])))
        report(rounds, size, os.path.getsize(path), options.base)


if __name__ == "__main__":
    main()
