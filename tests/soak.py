#!/usr/bin/env python3
"""Mixed load on the real server for a while: soak.py [--minutes N | --seconds N] [--unix]

Clients list, read manifests, download wholes and parts, read slowly and break off, while
images are published by rename and removed.  Every byte that comes is checked.  At the end
threads, files and memory must be back where they were.  Exits 0, or 1 with what was wrong.
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import imgserver                                                # noqa: E402
from tests.support import Server, uuid_of, wait_for, write_image     # noqa: E402

CLIENTS = 12
KEPT = 10                     # images that stay for the whole run
GROWTH = 24 << 20             # bytes that memory may have grown by since the load began


class Soak:
    """What the threads share: the server, the images there have ever been, and the counts."""

    def __init__(self, directory, unix):
        self.serve_dir = os.path.join(directory, "images")
        os.mkdir(self.serve_dir)
        self.data = random.Random(1).randbytes(4 << 20)
        self.files = {}                   # uuid: (its bytes, their sha1); never taken away again
        self.recent = ()                  # the last images published, removed by now or not
        self.number = 1000                # of the next one
        self.kept = [uuid_of(number) for number in range(1, KEPT + 1)]
        for number, uuid in enumerate(self.kept):
            self.add(uuid, number * 300000 + 1)
            os.rename(os.path.join(self.serve_dir, ".incoming-" + uuid),
                      os.path.join(self.serve_dir, uuid))
        self.server = Server(directory, self.serve_dir, {"stall_timeout": 20}, unix=unix,
                             fresh=True)
        self.ended = threading.Event()
        self.counts = collections.Counter()
        self.failures = []

    def add(self, uuid, size):
        """Write a whole image into .incoming-<uuid>."""
        start = random.randrange(len(self.data) - size)
        data = memoryview(self.data)[start:start + size]
        self.files[uuid] = data, hashlib.sha1(data).hexdigest()
        manifest = write_image(self.serve_dir, ".incoming-" + uuid, bytes(data))
        manifest = {**manifest, "uuid": uuid}
        with open(os.path.join(self.serve_dir, ".incoming-" + uuid, "manifest.json"), "w") as file:
            json.dump(manifest, file)

    def check(self, good, what):
        if not good:
            raise AssertionError(what)

    # what clients do; each takes a connection and a source of chance

    def list(self, connection, rng):
        path = rng.choice(("/datasets", "/images", "/images?limit=5", "/datasets?name=test"))
        answer = connection.request(path, headers={"Accept-Encoding": "identity"})
        self.check(answer.status == 200, answer)
        found = [image["uuid"] for image in answer.json()]
        self.check(len(set(found)) == len(found), f"{path}: an image twice")
        if "limit" not in path:
            self.check(set(self.kept) <= set(found), f"{path}: an image is missing")
        self.check(set(found) <= set(self.files), f"{path}: an image that never was")

    def manifest(self, connection, rng):
        uuid = rng.choice((*self.kept, *self.recent))
        answer = connection.request(f"/{rng.choice(('datasets', 'images'))}/{uuid}")
        if answer.status == 404 and uuid not in self.kept:
            return
        self.check(answer.status == 200, answer)
        self.check(answer.json()["files"][0]["sha1"] == self.files[uuid][1], "another sha1")

    def target(self, rng, uuids):
        uuid = rng.choice(uuids)
        return uuid, rng.choice((f"/datasets/{uuid}/image.zfs.gz", f"/images/{uuid}/file",
                                 f"http://elsewhere/datasets/{uuid}/image.zfs.gz"))

    def download(self, connection, rng):
        uuid, target = self.target(rng, (*self.kept, *self.recent))
        answer = connection.request(target)
        if answer.status == 404 and uuid not in self.kept:
            return
        self.check(answer.status == 200, answer)
        self.check(hashlib.sha1(answer.body).hexdigest() == self.files[uuid][1], "wrong bytes")
        self.counts["bytes"] += len(answer.body)

    def part(self, connection, rng):
        uuid, target = self.target(rng, self.kept)
        data, sha1 = self.files[uuid]
        first = rng.randrange(len(data))
        last = rng.randrange(first, len(data))
        answer = connection.request(target, headers={"Range": f"bytes={first}-{last}",
                                                     "If-Range": f'"{sha1}"'})
        self.check(answer.status == 206, answer)
        self.check(hashlib.sha1(answer.body).digest()
                   == hashlib.sha1(data[first:last + 1]).digest(), "wrong bytes of a part")
        self.counts["bytes"] += len(answer.body)

    def begin(self, connection, rng):
        """Ask for a file on a connection of its own, and take the first bytes."""
        uuid, target = self.target(rng, self.kept)
        own = self.server.connect()
        own.send(f"GET {target} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            more = own.recv(4096)
            self.check(more, "ended in the head")
            head += more
        return own, uuid, head.partition(b"\r\n\r\n")[2]

    def slow(self, connection, rng):
        own, uuid, body = self.begin(connection, rng)
        digest, count = hashlib.sha1(body), len(body)
        with own:
            while True:
                more = own.recv(65536)
                if not more:
                    break
                digest.update(more)
                count += len(more)
                if not self.ended.is_set():
                    time.sleep(0.01)
        self.check(count == len(self.files[uuid][0]), "a slow reader was cut")
        self.check(digest.hexdigest() == self.files[uuid][1], "wrong bytes for a slow reader")
        self.counts["bytes"] += count

    def abort(self, connection, rng):
        own, _, _ = self.begin(connection, rng)
        for _ in range(rng.randrange(4)):
            own.recv(65536)
        own.close()

    def client(self, seed):
        """One client: does one thing after the other until the end."""
        rng = random.Random(seed)
        kinds = (self.list, self.manifest, self.manifest, self.download, self.part, self.part,
                 self.slow, self.abort)
        connection = self.server.connect()
        while not self.ended.is_set():
            if rng.random() < 0.05:
                connection.close()
                connection = self.server.connect()
            kind = rng.choice(kinds)
            kind(connection, rng)
            self.counts[kind.__name__] += 1
        connection.close()

    def publisher(self):
        """Publishes images and removes them again, while others read them."""
        rng = random.Random(0)
        shown = collections.deque()
        while not self.ended.wait(0.05):
            uuid = uuid_of(self.number)
            self.number += 1
            self.add(uuid, rng.randrange(1, 500000))
            self.recent = (*self.recent, uuid)[-40:]
            os.rename(os.path.join(self.serve_dir, ".incoming-" + uuid),
                      os.path.join(self.serve_dir, uuid))
            self.counts["published"] += 1
            with self.server.connect() as connection:
                for path in (f"/datasets/{uuid}", f"/images/{uuid}"):
                    self.check(connection.request(path).status == 200, f"{path} is not there")
                for path in ("/datasets", "/images"):
                    self.check(uuid.encode() in connection.request(path).body,
                               f"{uuid} is not in {path}")
            shown.append(uuid)
            if len(shown) > 20:
                uuid = shown.popleft()
                aside = os.path.join(self.serve_dir, ".old-" + uuid)
                os.rename(os.path.join(self.serve_dir, uuid), aside)
                shutil.rmtree(aside)
                with self.server.connect() as connection:
                    self.check(connection.request(f"/images/{uuid}").status == 404,
                               f"{uuid} is still there")
                    self.check(uuid.encode() not in connection.request("/images").body,
                               f"{uuid} is still in /images")

    # the run

    def guarded(self, work, *arguments):
        try:
            work(*arguments)
        except Exception:
            self.failures.append(traceback.format_exc())
            self.ended.set()

    def load(self, seconds):
        """The whole load, for some seconds."""
        self.ended.clear()
        threads = [threading.Thread(target=self.guarded, args=(self.client, seed))
                   for seed in range(CLIENTS)]
        threads.append(threading.Thread(target=self.guarded, args=(self.publisher,)))
        for thread in threads:
            thread.start()
        self.ended.wait(seconds)
        self.ended.set()
        for thread in threads:
            thread.join()

    def run(self, seconds):
        server = self.server
        with server.connect() as connection:
            connection.request("/images")
            connection.request("/datasets")
        files, threads = server.files(), 1 + imgserver.SENDERS
        self.load(min(10, seconds / 4))             # until everything has been used once
        memory = server.memory()
        if not self.failures:
            self.load(seconds)
        if self.failures:
            return "\n".join(self.failures)
        wait_for(lambda: server.files() <= files, f"{files} open files, now {server.files()}", 30)
        wait_for(lambda: server.threads() <= threads, "the end of idle threads", 40)
        grown = server.memory() - memory
        log = server.log()
        status = server.stop()
        actions = sum(self.counts.values()) - self.counts["bytes"]
        print(f"soak: {seconds:.0f} s, {actions} actions, "
              f"{self.counts['bytes'] >> 20} MiB, {dict(self.counts)}; files {files}, "
              f"memory {memory >> 20} MiB {grown / 1048576:+.1f}")
        if grown > GROWTH:
            return f"memory has grown by {grown} bytes"
        if status:
            return f"the server ended with {status}"
        for word in ("Traceback", " error ", "left out"):
            if word in log:
                return f"in the log: {log[max(0, log.index(word) - 100):][:2000]}"
        return None


def main():
    parser = argparse.ArgumentParser(description="Mixed load on the real server for a while.")
    parser.add_argument("--minutes", type=float, default=1, help="how long (default: 1)")
    parser.add_argument("--seconds", type=float, help="the same, in seconds")
    parser.add_argument("--unix", action="store_true", help="over a Unix socket")
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="imgserver-soak-")
    soak = None
    try:
        soak = Soak(directory, options.unix)
        trouble = soak.run(options.seconds or options.minutes * 60)
    except AssertionError as error:
        trouble = str(error)
    finally:
        if soak is not None:
            soak.server.kill()
        shutil.rmtree(directory, ignore_errors=True)
    if trouble:
        print(f"FAILED: {trouble}")
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())
