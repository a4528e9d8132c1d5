#!/usr/bin/env python3
"""fleet.py - many nodes that import one image at the same moment, through caches or not.

    python3 bench/fleet.py [--clients 200] [--mib 64] [--caches 0,1,4] [--limit 120]

Each client asks for the list, the manifest and the file, as imgadm does, over one connection,
and throws the file away.  For each number of caches imgserver and the caches are started new and
empty; a cache is nginx with the rack snippet of the README as it stands, a client asks one of
them, in turns.  Prints one table; README.md in this directory says how to read it.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time

import bench
from download import connect, read_answer, read_head, send_request

MIB = bench.MIB
UUID = bench.uuid_of(1)
MOST_CLIENTS = 2000           # threads of this process: their stacks and sockets
COPY = 256 << 10              # bytes that a client copies by one call
SAMPLE = 0.1                  # seconds between two looks at the memory of the servers
LIST, MANIFEST, FILE = "/images", f"/images/{UUID}", f"/images/{UUID}/file"


class Imgserver(bench.Server):
    """imgserver on a port, with its log in a file."""

    def __init__(self, directory, serve_dir):
        [port] = bench.free_ports(1)
        self.log = os.path.join(directory, "log")
        config = os.path.join(directory, "config.json")
        with open(config, "w") as file:
            json.dump({}, file)
        command = ["/bin/sh", "-c", 'exec "$@" 2>"$0"', self.log, sys.executable, "-ES", "-m",
                   "imgserver", "--config", config, "--dir", serve_dir, "--listen",
                   f"127.0.0.1:{port}"]
        super().__init__(command, ("127.0.0.1", port), {"first": "/ping"}, "imgserver")

    def sent(self):
        """(requests for the file, bytes of all answers), by the log; call it after the end."""
        with open(self.log, encoding="ascii") as file:
            lines = re.findall(r'"\w+ (\S+) HTTP/1\.\d" \d+ (\d+) ', file.read())
        return (sum(target == FILE for target, _ in lines), sum(int(size) for _, size in lines))


class Cache(bench.Nginx):
    """nginx with the README's snippet for a rack, and an empty cache."""

    def __init__(self, tools, directory, number, server):
        [port] = bench.free_ports(1)
        self.prefix = os.path.join(directory, f"rack{number}")
        readme = os.path.join(os.path.dirname(bench.HERE), "README.md")
        with open(readme, encoding="utf-8") as file:
            text = re.search('snippet "rack".*?```nginx\n(.*?)```', file.read(), re.DOTALL)[1]
        for old, new in (("listen 80;", f"listen 127.0.0.1:{port};"),
                         ("server 10.0.0.5:8080;", "server %s:%d;" % server.address),
                         ("/var/cache/imgserver", f"{self.prefix}/cache")):
            if text.count(old) != 1:
                raise bench.Failure(f"the snippet of the README has no {old}")
            text = text.replace(old, new)
        self.start(tools, ("127.0.0.1", port), {"first": "/ping"}, text)

    def pids(self):
        return bench.children(self.process.pid)


class Memory(threading.Thread):
    """The most memory that each of some groups of servers had, in MiB."""

    def __init__(self, groups):
        super().__init__(daemon=True)
        self.groups, self.most, self._stop_it = groups, [0] * len(groups), threading.Event()

    def run(self):
        while not self._stop_it.wait(SAMPLE):
            for number, servers in enumerate(self.groups):
                self.most[number] = max(self.most[number], sum(each.memory() for each in servers))

    def end(self):
        self._stop_it.set()
        self.join()


def import_image(address, size, deadline):
    """List, manifest and file of the image; raises OSError or Failure where one is not whole."""
    buffer = bytearray(COPY)
    with connect(address) as sock:
        for target in (LIST, MANIFEST):
            send_request(sock, target)
            if read_answer(sock)[0] != 200:
                raise bench.Failure(f"{target} was refused")
        send_request(sock, FILE)
        status, _, _, rest = read_head(sock)
        count = len(rest)
        while status == 200 and count < size:
            if time.monotonic() > deadline:
                raise bench.Failure("the time limit has passed")
            got = sock.recv_into(buffer)
            if not got:
                break
            count += got
        if status != 200 or count != size:
            raise bench.Failure(f"{count} of {size} bytes came, status {status}")


def run_clients(addresses, clients, size, limit):
    """(seconds until the first, the last has the image).  All begin at once."""
    times, failures = [], []
    start = threading.Barrier(clients + 1)

    def work(address):
        start.wait()
        try:
            import_image(address, size, time.monotonic() + limit)
            times.append(time.monotonic())
        except (OSError, bench.Failure) as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(addresses[number % len(addresses)],),
                                daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.monotonic()
    for thread in threads:
        thread.join()
    if failures:
        raise bench.Failure(f"{len(failures)} of {clients} imports failed: {failures[0]}")
    return min(times) - began, max(times) - began


def scenario(tools, directory, serve_dir, count, options):
    """One row of the table: with `count` caches."""
    directory = os.path.join(directory, str(count))
    os.mkdir(directory)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(bench.ending(Imgserver(directory, serve_dir)))
        caches = [stack.enter_context(bench.ending(Cache(tools, directory, number, server)))
                  for number in range(count)]
        memory = Memory([[server], caches])
        memory.start()
        try:
            first, last = run_clients([each.address for each in caches or [server]],
                                      options.clients, options.mib * MIB, options.limit)
        finally:
            memory.end()
        cpu = server.cpu()
    requests, sent = server.sent()
    shutil.rmtree(directory)              # the caches are as large as the image each
    most = memory.most
    return (f"| {count} | {requests} | {sent / MIB:,.0f} | {first:.1f} | {last:.1f} | {cpu:.1f} | "
            f"{most[0]:.0f} | {most[1] / count if count else 0:.0f} |")


def make_image(serve_dir, size):
    """An image of `size` bytes of which no 16 MiB are alike."""
    os.makedirs(os.path.join(serve_dir, UUID))
    digest = hashlib.sha1()
    with open(os.path.join(serve_dir, UUID, "image.zfs"), "wb") as file:
        for _ in range(size // MIB):
            block = os.urandom(MIB)
            digest.update(block)
            file.write(block)
    manifest = {"v": 2, "uuid": UUID, "name": "fleet", "version": "1", "type": "zone-dataset",
                "os": "smartos", "files": [{"sha1": digest.hexdigest(), "size": size,
                                            "compression": "none", "path": "image.zfs"}]}
    with open(os.path.join(serve_dir, UUID, "manifest.json"), "w") as file:
        json.dump(manifest, file)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--mib", type=int, default=64, help="size of the image (%(default)s)")
    parser.add_argument("--caches", default="0,1,4", help="numbers of caches (%(default)s)")
    parser.add_argument("--limit", type=float, default=120,
                        help="seconds until an import has failed (%(default)s)")
    options = parser.parse_args()
    if not (1 <= options.clients <= MOST_CLIENTS and 1 <= options.mib <= 4096
            and re.fullmatch("[0-9]{1,2}(,[0-9]{1,2})*", options.caches)):
        parser.error(f"clients: 1 to {MOST_CLIENTS}; mib: 1 to 4096; caches: numbers to 99")
    return options


def main():
    options = parse_options()
    tools = argparse.Namespace(nginx=bench.find_tool("nginx"), files=bench.raise_file_limit())
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="imgfleet-", dir=place) as directory:
        serve_dir = os.path.join(directory, "images")
        make_image(serve_dir, options.mib * MIB)
        print(f"{options.clients} clients, an image of {options.mib} MiB\n\n"
              "| caches | requests for the file | MiB sent | first s | last s | CPU s | Pss MiB | "
              "Pss MiB of a cache |\n|---|--:|--:|--:|--:|--:|--:|--:|")
        for count in map(int, options.caches.split(",")):
            print(scenario(tools, directory, serve_dir, count, options), flush=True)


if __name__ == "__main__":
    try:
        main()
    except bench.Failure as failure:
        sys.exit(f"fleet.py: {failure}")
