#!/usr/bin/env python3
"""Throw mutated requests, bodies and directories at the server: fuzz.py [--seconds N] [--seed N]

A failure is an answer of 500 or 503 that nobody asked for, a traceback or a raw byte in
the log, JSON that a strict parser refuses, a connection still open after 20 seconds, a
sound image that is missing from a list, or a file descriptor or thread that stays.
It prints the seed and the input, and exits 1; the same --seed does the same again.
"""

import argparse
import json
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import imgserver                                                # noqa: E402
from tests import streams, test_bodies                           # noqa: E402
from tests.support import Server, uuid_of, wait_for, write_image, write_v2     # noqa: E402

PATIENCE = 20                 # seconds a connection may stay open once all has been sent
GOOD, PLAIN = uuid_of(1), uuid_of(2)

TOKENS = (b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"%", b"%00", b"%2e%2e%2f", b"%2f",
          b"..", b"/", b"//", b"\\", b"?", b"#", b"&", b"=", b";", b"\xff", b"\xc3\xa9",
          b"\xd9\xa3", b"\x1b[2J", b"\x9b", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9",
          b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT", b"get",
          b"http://", b"https://x", b"*", b"0", b"-1", b"+5", b"1_0", b"99999999999999999999",
          b"bytes=0-0", b"bytes=-5", b"bytes=5-4", b"bytes=9-", b"chunked", b"close",
          b"keep-alive", b"100-continue", b"bananas", b"gzip", b"gzip;q=0", b"W/\"x\"", b"*/*",
          b"text/html", b"~1", b"~2", b"~99", b"Mon, 01 Jan 2001 00:00:00 GMT", b"(" * 50,
          b"a" * 300, b"A" * 9000, b"," * 2000, b"\"", b"'", b"<b>", b"$(id)", b"{}", b"[::1]:80",
          b"h:99999", b"u@h", GOOD.encode(), PLAIN.encode(), uuid_of(9).encode(),
          GOOD.upper().encode(), b"file", b"icon", b"manifest.json", b"image.zfs.gz", b"datasets",
          b"images", b"ping", b"channels", b"state")
NAMES = (b"Host", b"Content-Length", b"Transfer-Encoding", b"Connection", b"Expect", b"Range",
         b"If-Range", b"If-None-Match", b"If-Match", b"If-Modified-Since", b"Accept",
         b"Accept-Encoding", b"Accept-Version", b"X-Real-IP", b"X-Forwarded-For",
         b"Access-Control-Request-Headers", b"Origin", b"Upgrade", b"x-request-id", b"Content-MD5",
         b"Authorization", b"TE", b"X")
PARAMETERS = (b"name", b"version", b"os", b"owner", b"type", b"public", b"state", b"limit",
              b"marker", b"sort", b"account", b"channel", b"inclAdminFields", b"tag.role", b"tag.",
              b"billing_tag", b"error", b"index", b"uuid", b"origin", b"")
VALUES = (b"", b"test", b"~test", b"~", b"!zvol", b"true", b"false", b"xyz", b"all", b"active",
          b"disabled", b"unactivated", b"bogus", b"0", b"1", b"-1", b"1e3", b"%d9%a3",
          b"999999999999999", b"2013", b"2013-04-05", b"2013-04-05T06:07:08Z", b"published_at",
          b"published_at.desc", b"name.asc", b"*", b"%ff", b"%00", b"%", b"+", b"dev", b"Internal",
          b"StorageIsDown", b"ResourceNotFoundError", b"Bogus", GOOD.encode(), uuid_of(9).encode())
PATHS = [b"/", b"/ping", b"/datasets", b"/datasets/", b"/images", b"/channels", b"/state",
         b"http://h:80/datasets", b"/nothing"]
PATHS += [path % uuid.encode() for uuid in (GOOD, PLAIN, uuid_of(9)) for path in (
    b"/datasets/%b", b"/images/%b", b"/datasets/%b/image.zfs.gz", b"/images/%b/file",
    b"/images/%b/icon", b"http://elsewhere/datasets/%b/image.zfs.gz")]


class Found(Exception):
    """What is wrong, in a sentence."""


# -- requests ------------------------------------------------------------------------------

def target(rng):
    path = rng.choice(PATHS)
    if rng.random() < 0.4:
        path += b"?" + b"&".join(rng.choice(PARAMETERS) + b"=" + rng.choice(VALUES)
                                 for _ in range(rng.choice((1, 1, 2, 3, 120))))
    return path


def request(rng):
    """One request that is nearly right."""
    method = rng.choice((b"GET", b"GET", b"GET", b"HEAD", b"OPTIONS", b"POST", b"PUT", b"DELETE"))
    lines = [method + b" " + target(rng) + b" HTTP/1." + rng.choice((b"1", b"1", b"1", b"0")),
             b"Host: h:8080"]
    for _ in range(rng.choice((0, 0, 1, 2, 4))):
        lines.append(rng.choice(NAMES) + b": " + rng.choice(TOKENS + VALUES))
    end = rng.choice((b"\r\n", b"\r\n", b"\r\n", b"\n"))
    return end.join(lines) + end + end


def with_body(rng):
    """One request with a body, for the routes of test_bodies."""
    body = bytes(rng.choice(b"abc\r\n0123 GET") for _ in range(rng.choice((0, 1, 5, 300, 5000))))
    method, path = rng.choice((("PUT", "/upload"), ("POST", "/upload"), ("POST", "/some"),
                               ("PUT", "/refused"), ("DELETE", "/plain")))
    fields = rng.choice(("", "", "Expect: 100-continue\r\n"))
    if rng.random() < 0.5:
        return test_bodies.with_length(body, method, path, fields)
    return (test_bodies.head(method, path, test_bodies.CHUNKED + fields)
            + test_bodies.chunks(rng, body))


ACTIONS = ("import", "activate", "enable", "disable", "update", "channel-add", "publish", "export",
           "import-remote", "bogus", "")
FIELD_TEXTS = ("name=a", "version=1", "name=", "os=other", "type=other", "type=zvol",
               "public=false", "tags={}", "acl=[]", "channels=[%22dev%22]", "origin=" + GOOD,
               "uuid=" + PLAIN, "sha1=0", "compression=gzip", "compression=xz", "state=active", "%ff=%00", "v=2")


def writing(rng):
    """One request that publishes, changes or deletes, or nearly so."""
    uuid = uuid_of(rng.randrange(1, 4))
    kind, packer = rng.randrange(10), rng.choice(("gzip", "gzip", "none", "xz", "bzip2"))
    query = rng.sample(FIELD_TEXTS, rng.choice((1, 2, 4))) if rng.random() < 0.3 else []
    data = streams.pack(streams.stream(bytes(rng.choice((0, 100, 70000)))), packer)
    if rng.random() < 0.2:
        data = mutated(rng, data)
    method, path, fields, chunked = "POST", f"/images/{uuid}", "", rng.random() < 0.05
    if kind == 0:
        path, query = "/images", ["action=publish", "name=a", "version=1", *query]
        chunked = rng.random() < 0.5
    elif kind in (1, 2):
        method, path, chunked = "PUT", path + "/file", rng.random() < 0.5
        query.append("compression=" + rng.choice((packer, packer, packer, "gzip", "x")))
    elif kind == 3:
        method, path = rng.choice(("PUT", "PUT", "DELETE")), path + "/icon"
        fields = "Content-Type: " + rng.choice(("image/png", "image/gif", "text/html")) + "\r\n"
        data = data[:300]
    elif kind == 4 and rng.random() < 0.4:
        method, data = "DELETE", b""
    else:
        action = rng.choice(("import", "import", "activate", "update", *ACTIONS))
        query.append("action=" + action)
        manifest = {"v": 2, "uuid": uuid, "name": "a", "version": "1", "type": "zone-dataset",
                    "os": "smartos", "tags": {"role": "x"}}
        right = {"import": manifest, "channel-add": {"channel": "dev"}}.get(
            action, {rng.choice(FIELDS): rng.choice(ODD)})
        data = rng.choice((b"", b"{}", b"[]", json.dumps(right).encode(),
                           json.dumps(right).encode(), json.dumps(right).encode(),
                           manifest_bytes(rng, manifest),
                           json.dumps([uuid, rng.choice(ODD)]).encode()))
        path += rng.choice(("", "", "", "", "/acl"))
    target = path + "?" * bool(query) + "&".join(query)
    if not chunked:
        return test_bodies.with_length(data, method, target, fields)
    return (test_bodies.head(method, target, test_bodies.CHUNKED + fields)
            + test_bodies.chunks(rng, data))


def mutated(rng, data):
    """`data` with a few bytes or lines changed."""
    for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        to = min(len(data), at + rng.choice((1, 1, 2, 10, 100)))
        kind = rng.randrange(7)
        if kind == 0:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1:]
        elif kind == 1:
            data = data[:at] + rng.choice(TOKENS) + data[at:]
        elif kind == 2:
            data = data[:at] + rng.choice(TOKENS) + data[to:]
        elif kind == 3:
            data = data[:at] + data[to:]
        elif kind == 4:
            data = data[:at] + data[at:to] * rng.choice((2, 3, 50)) + data[to:]
        elif kind == 5:
            lines = data.split(b"\n")
            rng.shuffle(lines)
            data = b"\n".join(lines)
        else:
            data = data[:at]
    return data[:200000]


def pieces(rng, data):
    """`data` as the packets in which it is sent."""
    if rng.random() < 0.6 or len(data) < 2:
        return [data]
    cuts = sorted(rng.randrange(len(data)) for _ in range(rng.choice((1, 2, 5, 20))))
    return [data[a:b] for a, b in zip([0] + cuts, cuts + [len(data)])]


def exchange(server, packets):
    """All that a server sends until it closes; Found if it does not close in time."""
    connection = server.connect(PATIENCE)
    data = b""
    try:
        try:
            for packet in packets:
                connection.send(packet)
            connection.sock.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError, OSError):
            pass
        while True:
            more = connection.recv()
            if not more:
                return data
            data += more
    except socket.timeout:
        raise Found(f"still open after {PATIENCE} s, with {data[:300]!r}")
    finally:
        connection.close()


HEAD = re.compile(rb"HTTP/1\.1 ([0-9]{3}) [A-Za-z '-]+\r\n((?:[A-Za-z0-9-]+: [ -~]*\r\n)+)\r\n")


def check_answers(data, sent):
    """Hold every response in `data` against what any client may rely on.  Raises Found."""
    while data:
        match = HEAD.match(data)
        if not match:
            raise Found(f"this is no response head: {data[:300]!r}")
        status = int(match[1])
        fields = dict(line.split(b": ", 1) for line in match[2].split(b"\r\n") if line)
        data = data[match.end():]
        if status in (500, 503) and not (b"ping" in sent and b"error" in sent):
            raise Found(f"answered {status}: {data[:300]!r}")
        if status in (204, 304):
            continue
        length = int(fields[b"Content-Length"])
        if b"HEAD" in sent and (len(data) < length or data.startswith(b"HTTP/1.1 ")):
            continue
        if len(data) < length:
            raise Found(f"the body has {len(data)} of {length} bytes")
        body, data = data[:length], data[length:]
        if fields[b"Content-Type"] == b"application/json" and b"Content-Encoding" not in fields:
            if b"HEAD" in sent and body.startswith(b"HTTP/"):
                return
            check_json(body, status)


def check_json(body, status):
    def refuse(name):
        raise Found(f"{name} is not JSON")
    try:
        value = json.loads(body.decode("ascii"), parse_constant=refuse)
    except ValueError as error:
        raise Found(f"not JSON: {error}: {body[:300]!r}")
    if status >= 400 and not {"code", "message"} <= set(value):
        raise Found(f"an error without code or message: {body[:300]!r}")
    return value


def fuzz_requests(rng, servers, serve_dir):
    make = rng.choice((request, request, request, with_body))
    data = b"".join(mutated(rng, make(rng)) if rng.random() < 0.7 else make(rng)
                    for _ in range(rng.choice((1, 1, 1, 2, 5))))
    packets = pieces(rng, data)
    try:
        answers = exchange(rng.choice(servers), packets)
        check_answers(answers.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""), data)
    except Found as found:
        raise Found(f"{found}\n  input: {packets!r}")


def fuzz_writes(rng, servers, serve_dir):
    """Requests that change a directory; then all that is shown must be whole."""
    data = b"".join(mutated(rng, writing(rng)) if rng.random() < 0.3 else writing(rng)
                    for _ in range(rng.choice((1, 2, 5))))
    packets = pieces(rng, data)
    try:
        answers = exchange(rng.choice(servers), packets)
        check_answers(answers.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""), data)
        if rng.random() < 0.1:
            for image in get_json(rng.choice(servers), "/images?state=all"):
                uuid = image["uuid"]
                if image["state"] != "unactivated":
                    check_file(servers[0], get_json(servers[0], "/datasets/" + uuid)["files"][0])
        if rng.random() < 0.02:
            for name in os.listdir(serve_dir):
                shutil.rmtree(os.path.join(serve_dir, name))
    except Found as found:
        raise Found(f"{found}\n  input: {packets!r}")


# -- manifests and directories -------------------------------------------------------------

ODD = (None, True, False, 0, 1, -1, 1.5, 10**18, 10**30, "", "x", " ", "\0", "\n", "\u2028",
       "\U0001f4be", "\ud800", "../x", "2013-04-05T06:07Z", "2013-04-05T06:07:08Z", "5" * 40,
       "a" * 300, "a" * 20000, "gzip", "xz", "none", "zvol", "disabled", "failed", "image.zfs.gz",
       "manifest.json", "icon.png", GOOD, uuid_of(3), uuid_of(4), [], [[]], [None], ["x"], [{}],
       {}, {"a": 1}, {"a": {"b": [1]}}, float("nan"), float("inf"), [{"path": "image.zfs.gz"}],
       [{"name": "root"}])
FIELDS = ("v", "uuid", "name", "version", "type", "os", "files", "published_at", "created_at",
          "updated_at", "creator_uuid", "creator_name", "cloud_name", "vendor_uuid",
          "platform_type", "urn", "description", "requirements", "users", "origin", "owner",
          "public", "state", "disabled", "acl", "restricted_to_uuid", "tags", "billing_tags",
          "traits", "channels", "icon", "error", "nic_driver", "disk_driver", "cpu_type",
          "image_size", "generate_passwords", "homepage", "eula", "inherited_directories", "extra")


def changed(rng, value, depth=0):
    """`value`, JSON of any shape, with something odd somewhere in it."""
    if depth > 3 or not value or rng.random() < 0.25 or not isinstance(value, (dict, list)):
        return rng.choice(ODD)
    value = value.copy()
    if isinstance(value, list):
        index = rng.randrange(len(value))
        value[index] = changed(rng, value[index], depth + 1)
    else:
        key = rng.choice(list(value))
        if rng.random() < 0.2:
            del value[key]
        else:
            value[key] = changed(rng, value[key], depth + 1)
    return value


def manifest_bytes(rng, manifest):
    """A manifest.json of an author who was not quite awake."""
    if rng.random() < 0.4:
        for key in rng.sample(sorted(manifest), rng.choice((1, 2, 4))):
            del manifest[key]
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        if rng.random() < 0.5:
            manifest = changed(rng, {**manifest, "": 0}) or manifest
            if not isinstance(manifest, dict):
                break
        else:
            manifest = {**manifest, rng.choice(FIELDS): rng.choice(ODD)}
    data = json.dumps(manifest, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        data = mutated(rng, data)
    elif rng.random() < 0.05:
        deep = rng.choice((10, 200, 400, 700, 1500, 50000))
        data = data[:-1] + b', "deep": ' + b"[" * deep + b"]" * deep + b"}"
    return data


def odd_entry(rng, path):
    """Put something at `path` that a directory of images need not have."""
    kind = rng.randrange(9)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        os.symlink(rng.choice(("nowhere", os.path.basename(path), "/dev/zero", "/", "..")), path)
    elif kind == 2:
        os.mkdir(path)
    elif kind == 3:
        with socket.socket(socket.AF_UNIX) as sock:
            if len(path) < 100:
                sock.bind(path)
    else:
        with open(path, "wb") as file:
            file.write(rng.choice((b"", b"x", b"\x1f\x8bdata", b"not a real stream",
                                   bytes(70000))))
        if kind == 5:
            os.chmod(path, rng.choice((0, 0o200, 0o444)))
        elif kind == 6:
            when = rng.choice((0, -1, 2**31, 2**33, 2**40))
            try:
                os.utime(path, (when, when))
            except (OSError, OverflowError):
                pass


def odd_name(rng):
    return rng.choice(("manifest.json", "image.zfs.gz", "icon.png", "icon.gif", ".hidden", "other",
                       "a b", "%41", "\u00e9", "\udcff", "-n", "a\nb", "x" * 250))


def change_tree(rng, serve_dir):
    """Change one image directory of serve_dir; returns what was done, to be printed."""
    uuid = uuid_of(rng.randrange(3, 12))
    path = os.path.join(serve_dir, rng.choice(("", "", "", "", "", ".incoming-")) + uuid)
    told = [path]
    if rng.random() < 0.3 and os.path.lexists(path):
        told.append("removed")
        if os.path.islink(path) or not os.path.isdir(path):
            os.unlink(path)
        else:
            shutil.rmtree(path)
    if not os.path.lexists(path) and rng.random() < 0.05:
        told.append("odd")
        odd_entry(rng, path)
    if os.path.islink(path) or os.path.lexists(path) and not os.path.isdir(path):
        return told
    data = rng.choice((b"not a real stream", b"", b"\x1f\x8b\x08", b"BZh", b"\xfd7zXZ\0",
                       bytes(70000)))
    origin = rng.choice((None, None, uuid_of(rng.randrange(1, 13))))
    scratch = os.path.join(os.path.dirname(serve_dir), "scratch")
    manifest = rng.choice((write_image, write_v2))(scratch, uuid, data, origin=origin)
    text = manifest_bytes(rng, manifest) if rng.random() < 0.7 else None
    told.append(text)
    if text is not None:
        with open(os.path.join(scratch, uuid, "manifest.json"), "wb") as file:
            file.write(text)
    if os.path.isfile(os.path.join(path, "manifest.json")) and rng.random() < 0.4:
        os.rename(os.path.join(scratch, uuid, "manifest.json"), os.path.join(path,
                                                                             "manifest.json"))
        shutil.rmtree(scratch)
    else:
        shutil.rmtree(path, ignore_errors=True)
        os.rename(os.path.join(scratch, uuid), path)
    for _ in range(rng.choice((0, 0, 1, 2))):
        name = odd_name(rng)
        entry = os.path.join(path, name)
        told.append(name)
        if os.path.isdir(entry) and not os.path.islink(entry):
            shutil.rmtree(entry)
        elif os.path.lexists(entry):
            os.unlink(entry)
        odd_entry(rng, entry)
    return told


def get_json(server, path):
    """The value that GET `path` answers with; None for 404.  Raises Found."""
    data = exchange(server, [b"GET %b HTTP/1.1\r\nHost: h\r\n\r\n" % path.encode()])
    check_answers(data, b"")
    if data.startswith(b"HTTP/1.1 404 "):
        return None
    if not data.startswith(b"HTTP/1.1 200 "):
        raise Found(f"GET {path}: {data[:300]!r}")
    return check_json(data.partition(b"\r\n\r\n")[2], 200)


def fuzz_trees(rng, servers, serve_dir):
    told = [change_tree(rng, serve_dir) for _ in range(rng.choice((1, 1, 3)))]
    server = rng.choice(servers)
    try:
        for number in range(3, 12):
            for api in rng.sample(("datasets", "images"), 2):
                manifest = get_json(server, f"/{api}/{uuid_of(number)}")
                if manifest is not None and manifest["uuid"] != uuid_of(number):
                    raise Found(f"/{api}/{uuid_of(number)} is another image")
                if manifest is not None and api == "datasets":
                    check_file(server, manifest["files"][0])
        for path in rng.sample(("/datasets", "/images", "/datasets?name=test", "/images?state=all",
                                "/images?tag.role=x", "/images?sort=published_at.desc"), 3):
            found = [image["uuid"] for image in get_json(server, path)]
            if GOOD not in found or PLAIN not in found or len(set(found)) < len(found):
                raise Found(f"{path} holds {found}")
    except Found as found:
        raise Found(f"{found}\n  done to the tree: {told!r}")


def check_file(server, file):
    """GET the url of a manifest: it must be `size` bytes."""
    data = exchange(server, [b"GET %b HTTP/1.1\r\nHost: h\r\n\r\n" % file["url"].encode("ascii")])
    check_answers(data, b"")
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 ") or len(body) != file["size"]:
        raise Found(f"{file} is answered with {len(body)} bytes: {head!r}")


# -- the run -------------------------------------------------------------------------------

class Watched(Server):
    """A server of which the log is read as it grows."""

    log_read = 0

    def check_log(self):
        """Raises Found for what must not stand in the lines written since the last look."""
        with open(self.log_path, "rb") as file:
            file.seek(self.log_read)
            data = file.read()
        self.log_read += len(data)
        if self.process.poll() is not None:
            raise Found(f"the server has ended with {self.process.poll()}: {data[-2000:]!r}")
        for word in (b"Traceback", b"internal error"):
            if word in data:
                at = data.index(word)
                raise Found(f"in the log: {data[max(0, at - 200):at + 4000].decode('ascii')}")
        fault = re.search(rb"is left out: manifest\.json: [A-Z]\w*(Error|Exception): .*", data)
        if fault:
            raise Found(f"a fault taken for a manifest's: {fault[0].decode('ascii')}")
        odd = re.search(rb"[^ -~\n]", data)
        if odd:
            raise Found(f"raw byte in the log: {data[max(0, odd.start() - 100):odd.end()]!r}")


def channels_of(seed):
    """The channels of a run: none in every second one."""
    return [{"name": "release", "default": True}, {"name": "dev"}] if seed % 2 else []


def run(seed, seconds, directory):
    serve_dir, written = (os.path.join(directory, name) for name in ("images", "written"))
    os.mkdir(serve_dir)
    os.mkdir(written)
    write_image(serve_dir, GOOD, tags={"role": "x"})
    write_v2(serve_dir, PLAIN, bytes(100000), origin=GOOD, tags={"role": "x"})
    servers, writers = [], []
    rounds = 0
    try:
        for unix in (False, True):
            servers.append(Watched(directory, serve_dir, unix=unix, prelude=(
                test_bodies.ROUTES + "imgserver.LINGER = 2.0\n")))
            writers.append(Watched(directory, written, unix=unix, config={
                "manage_from": ["127.0.0.1", "unix"], "channels": channels_of(seed)}))
        for server in servers:
            get_json(server, "/images")
            get_json(server, "/datasets")
        for server in writers:
            get_json(server, "/images?state=all")
            get_json(server, "/datasets")
        files = [server.files() for server in servers + writers]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            one = f"{seed}.{rounds}"
            rng = random.Random(one)
            if rounds % 3 == 0:
                fuzz_writes(rng, writers, written)
            else:
                step = fuzz_trees if rounds % 10 == 9 else fuzz_requests
                step(rng, servers, serve_dir)
            rounds += 1
            if rounds % 25 == 0:
                for server in servers + writers:
                    server.check_log()
        for server, before in zip(servers + writers, files):
            wait_for(lambda: server.files() <= before, "the number of open files", 20)
            wait_for(lambda: server.threads() <= 2 + imgserver.SENDERS,
                     "the end of idle threads", 30)
            if server.stop() != 0:
                raise Found("the server did not end well")
            server.log_read = max(0, server.log_read - 1)
    except (Found, AssertionError) as found:
        print(f"FAILED: seed {seed}, round {rounds}: {found}")
        return 1
    finally:
        for server in servers + writers:
            server.kill()
    print(f"fuzz: seed {seed}, {rounds} rounds in {seconds} s, nothing found")
    return 0


def main():
    parser = argparse.ArgumentParser(description="Throw mutated input at the real server.")
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: 60)")
    parser.add_argument("--seed", type=int, default=None, help="where to start (default: any)")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    directory = tempfile.mkdtemp(prefix="imgserver-fuzz-")
    try:
        return run(seed, options.seconds, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
