"""`mirror`: images of other servers, from the real one over both APIs, from directories, and from
a scripted one that does all that a server should not.
"""

import base64
import contextlib
import email.utils
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import unittest
from unittest import mock

import imgserver
from tests import streams
from tests.support import (PATIENCE, Program, ServerCase, check_only, need, run_program, uuid_of,
                           wait_for, write_image, write_v2)

U, V, W = uuid_of(1), uuid_of(2), uuid_of(3)
IMAGE = streams.pack(streams.stream(streams.noise(300_000)))
OTHER = streams.pack(streams.stream(streams.noise(300_001), guid=5))
LEAF = streams.pack(streams.stream(b"a leaf", guid=7, from_guid=streams.GUID))


def answer(body=b"", status="200 OK", length=None, **fields):
    """Bytes of a response; length: another Content-Length than that of the body."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}",
             "Connection: close", *(f"{name.replace('_', '-')}: {value}"
                                    for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Upstream:
    """A server of images that answers as it should, until `script` says otherwise.

    images      uuid: (manifest, bytes of the file)
    script      path without query: answers for its next requests; each is bytes, a function of
                the request's fields, or None for the right one
    requests    (target, fields) of all requests; `sent` counts the bytes of files, by uuid
    """

    def __init__(self, etag=True, wrap=lambda sock: sock):
        self.images, self.script, self.requests, self.sent = {}, {}, [], {}
        self.etag, self.wrap = etag, wrap
        self.hold = threading.Event()     # until it is set, STALL waits
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.run, daemon=True).start()

    def add(self, uuid, data=IMAGE, **fields):
        self.images[uuid] = ({"v": 2, "uuid": uuid, "owner": uuid_of(9), "name": "web",
                              "version": "1", "type": "zone-dataset", "os": "smartos",
                              "state": "active", "disabled": False, "public": True,
                              "published_at": "2026-01-02T03:04:05Z",
                              "files": [{"sha1": hashlib.sha1(data).hexdigest(),
                                         "size": len(data), "compression": "gzip"}], **fields},
                             data)

    def run(self):
        while True:
            try:
                sock, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock):
        with contextlib.suppress(OSError), self.wrap(sock) as sock:
            head = b""
            while b"\r\n\r\n" not in head:
                data = sock.recv(65536)
                if not data:
                    return
                head += data
            line, *lines = head.decode().split("\r\n")[:-2]
            fields = {name.lower(): value for name, _, value in
                      (each.partition(": ") for each in lines)}
            target = line.split(" ")[1]
            self.requests.append((target, fields))
            path = target.partition("?")[0]
            scripted = self.script.get(path)
            reply = scripted.pop(0) if scripted else None
            if callable(reply):
                reply = reply(fields)
            if reply is None:
                reply = self.right(path, fields)
            for part in reply if isinstance(reply, list) else [reply]:
                if part is STALL:
                    self.hold.wait(PATIENCE)
                else:
                    sock.sendall(part)
                    if path.endswith("/file"):
                        body = part.partition(b"\r\n\r\n")[2] if part[:5] == b"HTTP/" else part
                        self.sent[path] = self.sent.get(path, 0) + len(body)

    def right(self, path, fields):
        words = path.strip("/").split("/")
        if words == ["images"]:
            return answer(json.dumps([each[0] for each in self.images.values()
                                      if not each[0]["disabled"]]).encode())
        if len(words) < 2 or words[1] not in self.images:
            return answer(b'{"code": "ResourceNotFound", "message": "image not found"}',
                          "404 Not Found")
        manifest, data = self.images[words[1]]
        if words[2:] == ["file"]:
            return self.file(data, fields)
        return answer(json.dumps(manifest).encode())

    def file(self, data, fields):
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        more = {"ETag": etag} if self.etag else {}
        wanted = fields.get("range")
        if not wanted or fields.get("if-range", etag) != etag:
            return answer(data, **more)
        first = int(wanted[len("bytes="):-1])
        if first >= len(data):
            return answer(b"", "416 Range Not Satisfiable",
                          Content_Range=f"bytes */{len(data)}")
        return answer(data[first:], "206 Partial Content", **more,
                      Content_Range=f"bytes {first}-{len(data) - 1}/{len(data)}")

    def asked(self, path):
        return [fields for target, fields in self.requests if target.partition("?")[0] == path]

    def close(self):
        self.hold.set()
        self.socket.close()


STALL = object()


def cut(data, at, **fields):
    """An answer with a file that ends too early."""
    return answer(data[:at], length=len(data), **fields)


def wait_sent(up, path, count):
    """Wait until an upstream has sent so many bytes of a file: it counts them a moment later."""
    wait_for(lambda: up.sent.get(path) == count, f"{count} bytes of {path}")


class MirrorCase(unittest.TestCase):

    def setUp(self):
        self.directory = tempfile.mkdtemp(prefix="imgserver-test-")
        self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)
        self.serve_dir = os.path.join(self.directory, "here")
        os.mkdir(self.serve_dir)
        self.config = imgserver.Config({"serve_dir": self.serve_dir})
        self.pauses, self.said, self.complaints = [], [], []

    def upstream(self, **options):
        upstream = Upstream(**options)
        self.addCleanup(upstream.close)
        return upstream

    def source(self, upstream, **options):
        return imgserver.RemoteServer(getattr(upstream, "url", upstream),
                                      **{"pause": self.pauses.append, "timeout": PATIENCE,
                                         **options})

    def mirror(self, source, *uuids, check_stream=True, **filters):
        """Bring images; the complaints of this run."""
        self.said, self.complaints = [], []
        mirror = imgserver.Mirror(self.config, source, self.said.append, self.complaints.append,
                                  lambda text, size: lambda size: None, check_stream)
        mirror.bring(mirror.plan(uuids or mirror.select(filters)))
        self.assertEqual(bool(mirror.failed), bool(self.complaints))
        return self.complaints

    def assertHere(self, *uuids):
        """These images are on show, each whole, and there is no trace of others."""
        self.assertEqual(sorted(os.listdir(self.serve_dir)), sorted(uuids))
        for uuid in uuids:
            self.assertEqual(self.sha1(uuid), self.stored(uuid)["files"][0]["sha1"])
            image = imgserver.ImageReader(self.config).read(uuid, self.serve_dir + "/", ())
            self.assertIsNone(image.problem)

    def sha1(self, uuid):
        path = os.path.join(self.serve_dir, uuid,
                            self.stored(uuid)["files"][0].get("path", "image.zfs.gz"))
        with open(path, "rb") as file:
            return hashlib.sha1(file.read()).hexdigest()

    def stored(self, uuid, name="manifest.json"):
        with open(os.path.join(self.serve_dir, uuid, name), "rb") as file:
            return json.load(file)

    def partial(self, uuid=U):
        return os.path.getsize(os.path.join(self.serve_dir, ".incoming-" + uuid, ".partial"))

    def assertOnly(self, complaints, pattern):
        """One sentence that matches."""
        self.assertEqual(len(complaints), 1, complaints)
        self.assertRegex(complaints[0], pattern)

    def assertOne(self, complaints, pattern):
        """One sentence that matches, and nothing on show."""
        self.assertOnly(complaints, pattern)
        self.assertEqual([name for name in os.listdir(self.serve_dir) if name[0] != "."], [])


class TestWhole(MirrorCase):

    def test_an_image_comes_as_it_is(self):
        up = self.upstream()
        up.add(U, icon=True, description="d", channels=["dev"], tags={"a": 1})
        up.script[f"/images/{U}/icon"] = [answer(b"an icon", Content_Type="image/png")]
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertHere(U)
        self.assertEqual(self.said, [f"{U} web 1"])
        given = {key: value for key, value in up.images[U][0].items()
                 if key not in ("state", "channels", "icon", "files")}
        stored = self.stored(U)
        file = stored.pop("files")[0]
        self.assertEqual(stored, given)
        self.assertEqual((file["path"], file["size"]), ("web-1.zfs.gz", len(IMAGE)))
        self.assertEqual(self.stored(U, ".upstream.json"),
                         {"url": up.url, "manifest": up.images[U][0]})
        with open(os.path.join(self.serve_dir, U, "icon.png"), "rb") as icon:
            self.assertEqual(icon.read(), b"an icon")
        before = len(up.asked(f"/images/{U}/file"))
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertEqual((self.said, len(up.asked(f"/images/{U}/file"))), ([], before))

    def test_an_icon_that_cannot_be_used_costs_the_icon(self):
        for reply, pattern in (
                (answer(b"", "404 Not Found"), "it answers 404"),
                (answer(b"x" * (imgserver.ICON_LIMIT + 1), Content_Type="image/png"), "131072"),
                (answer(b"<svg/>", Content_Type="image/svg+xml"), "invalid content-type")):
            with self.subTest(pattern):
                up = self.upstream()
                up.add(U, icon=True)
                up.script[f"/images/{U}/icon"] = [reply]
                mirror = imgserver.Mirror(self.config, self.source(up), self.said.append,
                                          self.complaints.append, lambda *_: lambda size: None)
                mirror.bring(mirror.plan([U]))
                self.assertEqual((self.said, mirror.failed), ([f"{U} web 1"], set()))
                self.assertOnly(self.complaints, f"^image {U} comes without its icon: .*{pattern}")
                self.assertHere(U)
                self.assertEqual(self.mirror(self.source(up), U), [])
                shutil.rmtree(os.path.join(self.serve_dir, U))
                self.said, self.complaints = [], []

    def test_origins_come_first_and_disabled_ones_too(self):
        up = self.upstream()
        up.add(V, LEAF, origin=U)
        up.add(U, disabled=True, state="disabled")
        self.assertEqual(self.mirror(self.source(up), V), [])
        self.assertEqual(self.said, [f"{U} web 1", f"{V} web 1"])
        self.assertHere(U, V)
        self.assertIs(self.stored(U)["disabled"], True)

    def test_an_origin_that_is_here_is_not_asked_for(self):
        up = self.upstream()
        up.add(V, LEAF, origin=U)
        write_v2(self.serve_dir, U, IMAGE)
        self.assertEqual(self.mirror(self.source(up), V), [])
        self.assertEqual(up.asked(f"/images/{U}"), [])

    def test_filters_and_latest(self):
        up = self.upstream()
        for number, (name, version) in enumerate((("base", "1"), ("base", "2"), ("base", "3"),
                                                  ("web", "1"))):
            up.add(uuid_of(number), name=name, version=version,
                   published_at=f"2026-01-0{9 - number}T00:00:00Z")
        mirror = imgserver.Mirror(self.config, self.source(up), None, None, None)
        every = [uuid_of(number) for number in range(4)]
        for filters, latest, wanted in (
                ({}, None, every), ({"name": "base"}, None, every[:3]),
                ({"name": "~as"}, 2, every[:2]), ({}, 1, [every[0], every[3]]),
                ({"version": "1"}, None, [every[0], every[3]]), ({"os": "linux"}, None, []),
                ({"type": "zone-dataset", "name": "web"}, 5, every[3:])):
            with self.subTest(filters, latest=latest):
                self.assertEqual(mirror.select(filters, latest), wanted)

    def test_pages(self):
        up = self.upstream()
        numbers = [uuid_of(number) for number in range(5)]
        pages = [numbers[0:2], numbers[1:3], numbers[2:4], numbers[3:5], numbers[4:]]
        up.script["/images"] = [answer(json.dumps([{"uuid": uuid, "name": "web"}
                                                   for uuid in page]).encode()) for page in pages]
        mirror = imgserver.Mirror(self.config, self.source(up, channel="dev"), None, None, None)
        with mock.patch.object(imgserver, "PAGE", 2):
            self.assertEqual(mirror.select({"name": "web"}), numbers)
        self.assertEqual(up.requests[0][0], "/images?channel=dev&name=web&limit=2")
        self.assertEqual(up.requests[-1][0],
                         f"/images?channel=dev&name=web&limit=2&marker={numbers[4]}")

    def test_its_own_channels_where_they_are_configured(self):
        self.config = imgserver.Config({
            "serve_dir": self.serve_dir, "channels": [
                {"name": "release", "description": "d", "default": True},
                {"name": "dev", "description": "d"}]})
        up = self.upstream()
        up.add(U, channels=["dev", "staging"])
        up.add(V, OTHER, channels=["staging"])
        self.assertEqual(self.mirror(self.source(up)), [])
        self.assertEqual((self.stored(U)["channels"], self.stored(V)["channels"]),
                         (["dev"], ["release"]))

    def test_credentials_are_sent_and_not_printed(self):
        up = self.upstream()
        url = up.url.replace("//", "//jo%40e:se:cret@")
        source = self.source(url)
        self.assertOne(self.mirror(source, U), "image not found")
        self.assertEqual(up.requests[0][1]["authorization"],
                         "Basic " + base64.b64encode(b"jo@e:se:cret").decode())
        up.add(U)
        self.assertEqual(self.mirror(source, U), [])
        self.assertNotIn("cret", json.dumps(self.stored(U, ".upstream.json")))

    def test_hidden_from_the_user_or_gone(self):
        up = self.upstream()
        up.add(U)
        self.assertEqual(self.mirror(self.source(up), U), [])
        up.images.clear()
        for url, text in ((up.url, "no longer there; it stays here"),
                          (up.url.replace("//", "//joe:secret@"),
                           "no longer there, or hidden from the user of the URL; it stays here")):
            with self.subTest(text):
                self.assertEqual(self.mirror(self.source(url), U), [])
                self.assertEqual(self.said, [f"{U} web 1: {text}"])

    def test_a_user_that_is_refused(self):
        up = self.upstream()
        up.add(U)
        source = self.source(up.url.replace("//", "//joe:secret@"))
        self.assertEqual(self.mirror(source, U), [])
        up.images.clear()
        up.add(V)
        up.script["/"] = [answer(b"", "503 Busy"), answer(b"", "401 Unauthorized")]
        source = self.source(up.url.replace("//", "//joe:changed@"))
        complaints = self.mirror(source, U, V)
        self.assertEqual(self.said, [f"{V} web 1"])
        self.assertEqual(complaints, [
            f"{up.url} refuses the user or the password of the URL: its private images are hidden",
            f"image {U}: it answers 404: image not found"])
        self.assertHere(U, V)

    def test_fields_follow_where_the_other_side_changed_them(self):
        up = self.upstream()
        up.add(U, description="first", tags={"a": 1}, homepage="http://one.example.com/")
        self.assertEqual(self.mirror(self.source(up), U), [])
        publisher = imgserver.Publisher(self.config)
        publisher.disable(U)
        publisher.update(U, {"tags": {"mine": True}})
        up.add(U, description="second", tags={"a": 1}, eula="http://two.example.com/")
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertEqual(self.said, [f"{U} web 1: changed: description, eula, homepage"])
        stored = self.stored(U)
        self.assertEqual((stored["description"], stored["tags"], stored["disabled"],
                          stored["eula"], "homepage" in stored),
                         ("second", {"mine": True}, True, "http://two.example.com/", False))
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertEqual(self.said, [])
        up.images.clear()                 # nothing is deleted here
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertHere(U)

    def test_a_manifest_that_becomes_a_link_is_not_followed_to_its_target(self):
        up = self.upstream()
        up.add(U, description="first")
        self.assertEqual(self.mirror(self.source(up), U), [])
        up.add(U, description="second")
        outside = os.path.join(self.directory, "outside")
        with open(outside, "w") as file:
            file.write("mine")
        path, render = os.path.join(self.serve_dir, U, "manifest.json"), imgserver.manifest_bytes

        def become_link(manifest):
            os.unlink(path)
            os.symlink(outside, path)
            return render(manifest)
        with mock.patch.object(imgserver, "manifest_bytes", become_link):
            self.assertEqual(self.mirror(self.source(up), U), [])
        with open(outside) as file:
            self.assertEqual(file.read(), "mine")
        self.assertFalse(os.path.islink(path))
        self.assertEqual(self.stored(U)["description"], "second")

    def test_an_image_of_somebody_else_is_not_followed(self):
        up = self.upstream()
        up.add(U, description="theirs")
        write_v2(self.serve_dir, U, IMAGE, description="mine")
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertEqual(self.stored(U)["description"], "mine")

    def test_followed_in_another_format(self):
        up = self.upstream()
        up.add(U, description="first")
        up.images[U][0]["version"] = "1"
        self.assertEqual(self.mirror(self.source(up), U), [])
        v1 = {key: value for key, value in up.images[U][0].items()
              if key not in ("v", "owner", "public", "state")}
        up.images[U] = ({**v1, "description": "second", "creator_uuid": uuid_of(9)}, IMAGE)
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertEqual(self.said, [f"{U} web 1: changed: description"])


class TestFaults(MirrorCase):
    """A server that does what it should not: one sentence each, and nothing on show."""

    def setUp(self):
        super().setUp()
        self.up = self.upstream()
        self.file = f"/images/{U}/file"

    def check(self, reply, pattern, uuid=U, path=None):
        """An image of which one answer is wrong, and a right one that comes all the same."""
        self.up.script[path or f"/images/{U}"] = [reply]
        complaints = self.mirror(self.source(self.up), uuid, W)
        self.assertEqual(self.said, [f"{W} web 1"])
        shutil.rmtree(os.path.join(self.serve_dir, W))
        self.assertOne(complaints, pattern)

    def test_answers(self):
        self.up.add(U)
        self.up.add(W)
        bad = dict(self.up.images[U][0], files=[{**self.up.images[U][0]["files"][0],
                                                 "path": "../../etc/cron.d/x"}])
        for reply, pattern in (
                (answer(b"<html>a login</html>"), "not JSON"),
                (answer(b"[1]"), "not a JSON object"),
                (answer(b"[" * 100_000), "not JSON"),
                (answer(b"", "401 Unauthorized"), "answers 401"),
                (answer(b'{"message": "go away"}', "403 Forbidden"), "403: go away"),
                (answer(json.dumps(bad).encode()), r"files\[0\].path .* must be a plain"),
                (answer(json.dumps({"uuid": V}).encode()), f"image '{V}'"),
                (answer(json.dumps({**bad, "files": []}).encode()), "files"),
                (answer(json.dumps({**self.up.images[U][0], "state": "unactivated"}).encode()),
                 "unactivated there"),
                (answer(json.dumps({**self.up.images[U][0],
                                    "files": [{"size": 5}]}).encode()), "no sha1"),
                (answer(b"", "302 Found", Location="http://127.0.0.2:1/images"),
                 "redirects to http://127.0.0.2, which is another server"),
                (answer(b"", "302 Found", Location="file:///etc/passwd"),
                 "answers 302: .*file:///etc/passwd' is not allowed"),
                (answer(b" " * (imgserver.MANIFEST_LIMIT + 1)), "larger than 1048576 bytes")):
            with self.subTest(pattern):
                self.check(reply, pattern)
        self.assertEqual((os.listdir(self.serve_dir), self.pauses), ([], []))

    def test_a_redirect_to_the_same_server_is_followed(self):
        self.up.add(U)
        self.up.script[f"/images/{U}"] = [answer(b"", "302 Found", Location=f"/images/{U}")] * 20
        [complaint] = self.mirror(self.source(self.up), U)
        self.assertRegex(complaint, r"answers 302: [^\n]* infinite loop\.\Z")
        self.assertEqual(self.pauses, [])
        self.up.script[f"/images/{U}"] = [answer(b"", "302 Found", Location=f"/images/{U}?x")]
        self.assertEqual(self.mirror(self.source(self.up), U), [])

    def test_files(self):
        self.up.add(U)
        self.up.add(W)
        for reply, pattern in (
                (answer(IMAGE[:-1]), "file has 300.* bytes, not the 300"),
                (answer(IMAGE + b"x"), "file has 300.* bytes, not the 300"),
                (b"HTTP/1.0 200 OK\r\n\r\n" + IMAGE + b"x", "more than the 300"),
                (answer(IMAGE[:-1] + b"x"), "corrupt|its sha1 is"),
                (answer(IMAGE[:1000] + b"x" + IMAGE[1001:]), "corrupt|its sha1 is"),
                (answer(IMAGE, "206 Partial Content", Content_Range=f"bytes 5-9/{len(IMAGE)}"),
                 "another part of the file"),
                (answer(b'{"message": "no file"}', "404 Not Found"), "404: no file")):
            with self.subTest(pattern):
                self.check(reply, pattern, path=self.file)
        self.assertEqual((os.listdir(self.serve_dir), self.pauses), ([], []))

    def test_a_disk_that_fails_in_the_middle(self):
        self.up.add(U)
        self.up.add(W)
        add = imgserver.PartialFile.add

        def fail(partial, data):
            if partial.size:
                raise OSError(errno.ENOSPC, "No space left on device")
            add(partial, data)
        threads = threading.active_count()
        self.up.script[self.file] = [[answer(IMAGE)[:200_000], answer(IMAGE)[200_000:]]]
        with mock.patch.object(imgserver.PartialFile, "add", fail), \
                mock.patch.object(imgserver, "CHUNK", 1000):
            self.assertOne(self.mirror(self.source(self.up), U),
                           "cannot be stored: No space left on device")
        self.assertGreater(self.partial(), 0)
        wait_for(lambda: threading.active_count() <= threads, "the end of the thread")
        self.assertEqual(self.mirror(self.source(self.up), U, W), [])
        self.assertHere(U, W)

    def test_an_origin_that_is_not_there(self):
        self.up.add(V, LEAF, origin=U)
        self.up.add(W)
        complaints = self.mirror(self.source(self.up), V, W)
        self.assertEqual(len(complaints), 1)
        self.assertIn(f"image {V}: image {U}, on which it builds: it answers 404", complaints[0])
        self.assertHere(W)

    def test_an_origin_that_does_not_come(self):
        self.up.add(V, LEAF, origin=U)
        self.up.add(U)
        self.up.script[self.file] = [answer(b"", "404 Not Found")]
        complaints = self.mirror(self.source(self.up), V)
        self.assertEqual(len(complaints), 2)
        self.assertIn(f"image {U}, on which it builds, has not come", complaints[1])

    def test_a_cycle_of_origins(self):
        self.up.add(U, origin=V)
        self.up.add(V, origin=U)
        self.assertOne(self.mirror(self.source(self.up), V), "cycle")
        write_v2(self.serve_dir, U, IMAGE, origin=V)
        write_v2(self.serve_dir, V, IMAGE, origin=U)
        self.assertRegex(self.mirror(self.source(self.up), V)[0], "cycle")

    def test_here_with_other_bytes(self):
        self.up.add(U)
        write_v2(self.serve_dir, U, OTHER)
        complaints = self.mirror(self.source(self.up), U)
        self.assertRegex(complaints[0], "is here with other bytes")
        self.assertHere(U)
        self.assertEqual(self.sha1(U), hashlib.sha1(OTHER).hexdigest())

    def test_lists(self):
        source = self.source(self.up)
        for reply, pattern in ((answer(b"<html>"), "not JSON"), (answer(b"{}"), "JSON array"),
                               (answer(b" " * 2000), "larger than 1000 bytes"),
                               (answer(b'[{"uuid": "../x"}]'), "which is no UUID")):
            self.up.script["/images"] = [reply]
            with self.subTest(pattern), mock.patch.object(imgserver, "LIST_LIMIT", 1000), \
                    mock.patch.object(imgserver, "PAGE", 1), \
                    self.assertRaisesRegex(imgserver.SourceError, pattern):
                list(source.list({}))

    def test_names_in_a_list_that_are_none(self):
        self.up.add(U)
        self.up.script["/images"] = [answer(json.dumps(
            [{"uuid": "../x"}, 5, self.up.images[U][0]]).encode())]
        complaints = self.mirror(self.source(self.up))
        self.assertEqual(len(complaints), 2)
        self.assertHere(U)

    def test_tries_of_what_may_pass(self):
        self.up.add(U)
        for reply in (answer(b"", "500 Oops"), answer(b"", "503 Busy"), b"",
                      cut(b"[" * 99, 9), b"HTTP/1.1 nonsense\r\n\r\n"):
            with self.subTest(reply):
                self.pauses.clear()
                self.up.script[f"/images/{U}"] = [reply] * 5
                self.assertOne(self.mirror(self.source(self.up), U), ".")
                self.assertEqual(self.pauses, [1, 3, 10, 30])
                self.up.script[f"/images/{U}"] = [reply] * 4
                self.assertEqual(self.mirror(self.source(self.up), U), [])
                shutil.rmtree(os.path.join(self.serve_dir, U))

    def test_retry_after(self):
        self.up.add(U)
        soon = email.utils.formatdate(time.time() + 200, usegmt=True)
        self.up.script[f"/images/{U}"] = [
            answer(b"", "503 Busy", Retry_After=value) for value in ("7", soon, "86400", "x")]
        self.assertEqual(self.mirror(self.source(self.up), U), [])
        self.assertEqual(self.pauses[::2], [7, 300])
        self.assertTrue(3 < self.pauses[1] <= 200, self.pauses)
        self.assertEqual(self.pauses[3], 30)

    def test_a_server_that_is_down_is_tried_once_more_for_all(self):
        self.up.close()
        complaints = self.mirror(self.source(self.up), U, V, W)
        self.assertEqual((len(complaints), self.pauses), (3, [1, 3, 10, 30]))

    def test_slow_bodies(self):
        self.up.add(U)
        self.up.script[self.file] = [[answer(IMAGE)[:2000], STALL], *[[STALL]] * 4]
        source = self.source(self.up, timeout=0.2)
        self.assertOne(self.mirror(source, U), "stalled: nothing came for 0.2 s")
        self.assertEqual(len(self.pauses), 4)

    def test_a_body_that_trickles(self):
        body = mock.Mock(length=1000)
        body.read1.return_value = b"x"
        pieces = self.source(self.up, timeout=0)._pieces(body)
        with self.assertRaisesRegex(imgserver.SourceError, "stalled: [0-9]+ bytes came in"):
            list(pieces)

    def test_urls_that_are_none(self):
        for url in ("ftp://h", "http://", "http://h:x", "http://h:0/", "h", "http://h/ x",
                    "http://h/\n", "http://[::1/"):
            with self.subTest(url), self.assertRaises(ValueError):
                imgserver.RemoteServer(url)

    def test_unknown_authorities(self):
        need("openssl")
        path = os.path.join(self.directory, "cert.pem")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                        "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
                        "-keyout", path + ".key", "-out", path], check=True,
                       capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path, path + ".key")
        up = self.upstream(wrap=lambda sock: context.wrap_socket(sock, server_side=True))
        up.add(U)
        up.url = up.url.replace("http:", "https:")
        self.assertOne(self.mirror(self.source(up), U), "certificate cannot be verified")
        self.assertEqual(self.pauses, [])
        self.assertEqual(self.mirror(self.source(up, ca=path), U), [])
        shutil.rmtree(os.path.join(self.serve_dir, U))
        self.assertEqual(self.mirror(self.source(up, insecure=True), U), [])
        with self.assertRaisesRegex(ValueError, "--ca"):
            self.source(up, ca=path + ".none")


class TestResuming(MirrorCase):

    def setUp(self):
        super().setUp()
        self.file = f"/images/{U}/file"

    def start(self, at=100_000, **options):
        """An upstream of which a part has come in an earlier run."""
        up = self.upstream(**options)
        up.add(U)
        up.script[self.file] = [cut(IMAGE, at), *[b""] * 4]
        self.assertOne(self.mirror(self.source(up), U), ".")
        self.assertEqual(self.partial(), at)
        self.pauses.clear()
        up.requests.clear()
        up.sent.clear()
        return up

    def test_a_cut_connection_is_taken_up_again(self):
        for etag in (True, False):
            with self.subTest(etag=etag):
                up = self.upstream(etag=etag)
                up.add(U)
                more = {"ETag": f'"{hashlib.sha1(IMAGE).hexdigest()}"'} if etag else {}
                up.script[self.file] = [cut(IMAGE, 100_000, **more), b"", None]
                self.assertEqual(self.mirror(self.source(up), U), [])
                self.assertHere(U)
                self.assertEqual([fields.get("range") for fields in up.asked(self.file)],
                                 [None, "bytes=100000-", "bytes=100000-"])
                self.assertEqual(up.asked(self.file)[1].get("if-range"), more.get("ETag"))
                wait_sent(up, self.file, len(IMAGE))
                shutil.rmtree(os.path.join(self.serve_dir, U))

    def test_a_later_run_goes_on(self):
        up = self.start()
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertHere(U)
        self.assertEqual(up.asked(self.file)[0]["range"], "bytes=100000-")
        wait_sent(up, self.file, len(IMAGE) - 100_000)
        self.assertEqual(sorted(os.listdir(os.path.join(self.serve_dir, U))),
                         [".upstream.json", "manifest.json", "web-1.zfs.gz"])

    def test_200_instead_of_206(self):
        up = self.start()
        up.script[self.file] = [answer(IMAGE)]
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertHere(U)
        self.assertEqual([fields.get("range") for fields in up.asked(self.file)],
                         ["bytes=100000-"])

    def test_a_server_that_never_gets_to_the_end_and_cannot_resume(self):
        up = self.upstream()
        up.add(U)
        up.script[self.file] = [cut(IMAGE, 1000)] * 99
        self.assertOne(self.mirror(self.source(up), U), "bytes too early|first byte")
        self.assertLess(len(up.asked(self.file)), 20)

    def test_a_server_without_ranges_may_break_several_times(self):
        up = self.start()
        up.script[self.file] = [cut(IMAGE, at) for at in (1000, 150_000, 2000)]
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertHere(U)
        self.assertEqual([fields.get("range") for fields in up.asked(self.file)],
                         ["bytes=100000-", "bytes=1000-", "bytes=150000-", "bytes=2000-"])
        self.assertEqual(self.pauses, [1, 3, 10])

    def test_416_for_a_file_of_the_right_size(self):
        up = self.start()
        up.script[self.file] = [answer(b"", "416 Range Not Satisfiable",
                                       Content_Range=f"bytes */{len(IMAGE)}")]
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertHere(U)
        self.assertEqual([fields.get("range") for fields in up.asked(self.file)],
                         ["bytes=100000-", None])

    def test_other_bytes_on_disk_than_there(self):
        for other, ranges in ((OTHER[:100_000], ["bytes=100000-", None]),
                              (IMAGE[:20] + bytes(1000), [None]),
                              (IMAGE[:-1] + b"x", [None]), (IMAGE + b"x", [None])):
            with self.subTest(other[-9:]):
                up = self.start()
                with open(os.path.join(self.serve_dir, ".incoming-" + U, ".partial"),
                          "wb") as partial:
                    partial.write(other)
                self.assertEqual(self.mirror(self.source(up), U), [])
                self.assertHere(U)
                self.assertEqual([fields.get("range") for fields in up.asked(self.file)], ranges)
                shutil.rmtree(os.path.join(self.serve_dir, U))

    def test_another_file_on_resuming_by_its_etag(self):
        up = self.upstream()
        up.add(U, OTHER)
        up.script[self.file] = [cut(IMAGE.ljust(len(OTHER))[:len(OTHER)], 1000,
                                    ETag='"another"')]
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertEqual(up.asked(self.file)[1]["if-range"], '"another"')
        self.assertHere(U)
        self.assertEqual(self.sha1(U), hashlib.sha1(OTHER).hexdigest())

    def test_another_file_on_resuming_by_its_sha1(self):
        up = self.upstream(etag=False)
        up.add(U)
        wrong = bytes(len(IMAGE))
        up.script[self.file] = [cut(wrong, 1000), None, None]
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertEqual([fields.get("range") for fields in up.asked(self.file)],
                         [None, "bytes=1000-", None])
        self.assertHere(U)

    def test_a_wrong_sha1_after_resuming_begins_once_more_only(self):
        up = self.start()
        wrong = IMAGE[:200_000] + b"x" + IMAGE[200_001:]
        up.images[U] = (up.images[U][0], wrong)
        self.assertOne(self.mirror(self.source(up), U), "sha1|corrupt")
        self.assertEqual([fields.get("range") for fields in up.asked(self.file)],
                         ["bytes=100000-", None])
        self.assertEqual(os.listdir(self.serve_dir), [])

    def test_a_smaller_file_on_resuming(self):
        up = self.start()
        up.images[U] = (up.images[U][0], IMAGE[:50_000])
        self.assertOne(self.mirror(self.source(up), U), "file has 50000 bytes")

    def test_a_manifest_of_a_smaller_file(self):
        up = self.start(200_000)
        small = streams.pack(streams.stream())
        up.add(U, small)
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertEqual(up.asked(self.file)[0].get("range"), None)
        self.assertHere(U)

    def test_a_cut_stream_with_its_right_sha1_comes_once(self):
        up = self.upstream()
        up.add(U, IMAGE[:-9])
        self.assertOne(self.mirror(self.source(up), U), "cut short")
        self.assertEqual(self.partial(), len(IMAGE) - 9)
        self.assertOne(self.mirror(self.source(up), U), "cut short")
        self.assertEqual(len(up.asked(self.file)), 1)

    def test_without_the_check_of_the_stream_nothing_is_unpacked(self):
        data = streams.pack(streams.stream(streams.noise(imgserver.PROLOGUE + 300_000)))[:-9]
        up = self.upstream()
        up.add(U, data)
        self.assertOne(self.mirror(self.source(up), U), "cut short")
        with mock.patch.object(imgserver.SendStream, "feed", autospec=True,
                               side_effect=imgserver.SendStream.feed) as feed:
            self.assertEqual(self.mirror(self.source(up), U, check_stream=False), [])
        self.assertLess(sum(len(call[0][1]) for call in feed.call_args_list),
                        imgserver.PROLOGUE + imgserver.PIECE)
        self.assertHere(U)
        self.assertEqual(self.stored(U)["files"][0]["dataset_guid"], str(streams.GUID))

    def test_killed_before_it_was_activated(self):
        up = self.upstream()
        up.add(U)
        with mock.patch.object(imgserver.Publisher, "_show", side_effect=KeyboardInterrupt), \
                self.assertRaises(KeyboardInterrupt):
            self.mirror(self.source(up), U)
        self.assertEqual(os.listdir(self.serve_dir), [".incoming-" + U])
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertHere(U)
        wait_sent(up, self.file, len(IMAGE))

    def test_an_unfinished_import_is_not_gone_on_with(self):
        up = self.upstream()
        up.add(U)
        imgserver.Publisher(self.config).create({**up.images[U][0]})
        with open(os.path.join(self.serve_dir, ".incoming-" + U, ".partial"), "wb") as file:
            file.write(IMAGE[:1000])
        self.assertEqual(self.mirror(self.source(up), U), [])
        self.assertEqual(up.asked(self.file)[0].get("range"), None)

    def test_two_at_once(self):
        up = self.upstream()
        up.add(U)
        up.script[self.file] = [[answer(IMAGE)[:1000], STALL, answer(IMAGE)[1000:]]]
        first = threading.Thread(target=self.mirror, args=(self.source(up), U))
        first.start()
        wait_for(lambda: up.asked(self.file), "the first one")
        complaints = []
        second = imgserver.Mirror(self.config, self.source(up), None, complaints.append,
                                  lambda text, size: lambda size: None)
        plan = second.plan([U])
        second.bring(plan)
        self.assertRegex(complaints[0], "is being imported or changed by somebody else")
        up.hold.set()
        first.join(PATIENCE)
        self.assertHere(U)
        second.bring(plan)                # planned before the first one had ended
        self.assertEqual(len(complaints), 1)
        self.assertEqual(len(up.asked(self.file)), 1)


class TestDirectories(MirrorCase):

    def setUp(self):
        super().setUp()
        self.disk = os.path.join(self.directory, "disk")
        os.mkdir(self.disk)

    def source(self):
        return imgserver.SourceDirectory(self.disk)

    def test_a_serve_dir(self):
        write_image(self.disk, U, IMAGE)
        write_v2(self.disk, V, LEAF, origin=U, disabled=True)
        write_v2(self.disk, W, LEAF, origin=U)
        with open(os.path.join(self.disk, U, "icon.gif"), "wb") as icon:
            icon.write(b"an icon")
        self.assertEqual(self.mirror(self.source(), name="test"), [])
        self.assertHere(U, W)
        self.assertIn("icon.gif", os.listdir(os.path.join(self.serve_dir, U)))
        self.assertEqual(self.mirror(self.source(), V), [])
        self.assertHere(U, V, W)

    def test_pairs_of_imgadm_create(self):
        for uuid, name, data in ((U, "web-1", IMAGE), (V, "web-1.2", LEAF)):
            manifest = {"v": 2, "uuid": uuid, "name": "web", "version": "1", "os": "smartos",
                        "type": "zone-dataset", "files": [
                            {"sha1": hashlib.sha1(data).hexdigest(), "size": len(data),
                             "compression": "gzip"}]}
            if uuid == V:
                manifest["origin"] = U
            with open(os.path.join(self.disk, name + ".imgmanifest"), "w") as file:
                json.dump(manifest, file)
            with open(os.path.join(self.disk, name + ".zfs.gz"), "wb") as file:
                file.write(data)
        self.assertEqual(self.mirror(self.source(), V), [])
        self.assertHere(U, V)

    def test_pairs_that_cannot_be_read(self):
        write_v2(self.disk, W, OTHER)
        with open(os.path.join(self.disk, "web-1.imgmanifest"), "w") as file:
            file.write("{")
        os.symlink("nowhere", os.path.join(self.disk, "web-2.imgmanifest"))
        complaints = self.mirror(self.source())
        self.assertEqual(len(complaints), 2, complaints)
        self.assertRegex(complaints[0], "^web-1.imgmanifest is not JSON")
        self.assertRegex(complaints[1], "web-2.imgmanifest")
        self.assertHere(W)
        self.assertEqual(self.mirror(self.source(), W), [])
        self.assertOnly(self.mirror(self.source(), U), "image not found, web-1.imgmanifest is not")

    def test_trouble(self):
        write_v2(self.disk, U, IMAGE, files=[{"path": "../x", "size": 5, "sha1": "0" * 40}])
        write_v2(self.disk, V, IMAGE)
        os.unlink(os.path.join(self.disk, V, "image.zfs.gz"))
        self.assertOne(self.mirror(self.source(), U), "plain file name")
        self.assertOne(self.mirror(self.source(), V), "names no file")
        self.assertOne(self.mirror(self.source(), W), "image not found")
        with open(os.path.join(self.disk, V, "manifest.json"), "w") as file:
            file.write("{")
        complaints = self.mirror(self.source())
        self.assertRegex("; ".join(complaints), f"{U}: .*plain file name.*{V}: .* is not JSON")


class TestServers(ServerCase):
    """The real server on the other side, and the command."""

    seconds = 8

    def setUp(self):
        super().setUp()
        self.here = os.path.join(self.directory, "here")
        os.mkdir(self.here)

    def run_mirror(self, *words):
        return run_program("--dir", self.here, "mirror", *words, text=True)

    def fill(self):
        write_image(self.serve_dir, U, IMAGE, name="base")
        write_v2(self.serve_dir, V, LEAF, origin=U, name="leaf")
        write_v2(self.serve_dir, W, OTHER, name="other")

    def test_both_apis(self):
        self.fill()
        server = self.serve()
        for path in ("", "/datasets", "/datasets/"):
            with self.subTest(path):
                url = f"http://127.0.0.1:{server.address[1]}{path}"
                done = self.run_mirror("-n", url, "--name", "leaf")
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertEqual(done.stdout, f"{U} base 1.0.0  0.3 MB\n{V} leaf 2.0.0  0.0 MB\n"
                                              "2 images, 0.3 MB\n")
                self.assertEqual(os.listdir(self.here), [])
                done = self.run_mirror("-q", url, "--all")
                self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))
                self.assertEqual(sorted(os.listdir(self.here)), [U, V, W])
                check = run_program("--dir", self.here, "check", "-q", text=True)
                self.assertEqual((check.returncode, check.stdout), (0, ""))
                for uuid in (U, V, W):
                    shutil.rmtree(os.path.join(self.here, uuid))

    def test_options_may_stand_anywhere(self):
        self.fill()
        for words in (("-n", self.serve_dir, V, W), (self.serve_dir, "-n", V, W),
                      (self.serve_dir, V, "-n", W), (self.serve_dir, V, W, "-n")):
            with self.subTest(words):
                done = self.run_mirror(*words)
                self.assertEqual((done.returncode, done.stdout.count("\n")), (0, 4), done.stderr)

    def test_progress(self):
        terminal = mock.Mock()
        with mock.patch("sys.stderr", terminal), \
                mock.patch("select.select", return_value=([], [2], [])):
            count = imgserver.Console().progress("image 1 of 2", 10_000_000)
            with mock.patch("time.monotonic", return_value=time.monotonic() + 10):
                count(5_000_000)
        self.assertRegex(terminal.write.call_args[0][0],
                         r"image 1 of 2: 5 of 10 MB, 0 MB/s, (10|9) s left")

    def test_disabled_there_after_it_was_brought(self):
        self.fill()
        server = self.serve()
        url = f"http://127.0.0.1:{server.address[1]}"
        self.assertEqual(self.run_mirror(url, "--name", "other").returncode, 0)
        config = imgserver.Config({"serve_dir": self.serve_dir})
        imgserver.Publisher(config).disable(W)
        done = self.run_mirror(url, "--name", "other")
        self.assertEqual((done.returncode, done.stdout), (0, f"{W} other 2.0.0: changed: "
                                                             "disabled\n"))

    def test_channels(self):
        write_v2(self.serve_dir, U, IMAGE, channels=["dev"])
        server = self.serve(config={"channels": [
            {"name": "release", "description": "d", "default": True},
            {"name": "dev", "description": "d"}]})
        url = f"http://127.0.0.1:{server.address[1]}"
        self.assertEqual(self.run_mirror(url, U).returncode, 1)
        for words in ((url, "--channel", "dev"), (url + "?channel=dev",)):
            self.assertEqual(self.run_mirror(*words, "--all").returncode, 0)
            shutil.rmtree(os.path.join(self.here, U))

    def test_users(self):
        write_v2(self.serve_dir, U, IMAGE, public=False)
        path = os.path.join(self.directory, "users")
        salt = os.urandom(imgserver.SALT_SIZE)
        imgserver.write_users(path, {"joe": imgserver.User(
            "joe", "read", salt, imgserver.hash_password(b"s/e@c:", salt))}, self.directory)
        server = self.serve(config={"users": path, "read": "public"})
        for path in ("", "/datasets"):
            place = f"127.0.0.1:{server.address[1]}{path}"
            self.assertEqual(self.run_mirror(f"http://{place}", U).returncode, 1)
            done = self.run_mirror(f"http://joe:s%2Fe%40c%3A@{place}", "--all")
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertIs(imgserver.ImageReader(imgserver.Config({"serve_dir": self.here})).read(
                U, self.here + "/", ()).public, False)
            shutil.rmtree(os.path.join(self.here, U))

    def test_a_wrong_password_for_private_images(self):
        for uuid, data, public in ((U, IMAGE, True), (V, OTHER, False)):
            write_v2(self.serve_dir, uuid, data, public=public)
        path = os.path.join(self.directory, "users")
        salt = os.urandom(imgserver.SALT_SIZE)
        imgserver.write_users(path, {"joe": imgserver.User(
            "joe", "read", salt, imgserver.hash_password(b"secret", salt))}, self.directory)
        server = self.serve(config={"users": path, "read": "public"})
        for path in ("", "/datasets"):
            with self.subTest(path):
                place = f"127.0.0.1:{server.address[1]}{path}"
                done = self.run_mirror("-q", f"http://joe:secret@{place}", "--all")
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                shutil.rmtree(os.path.join(self.here, U))
                done = self.run_mirror(f"http://joe:changed@{place}", "--all")
                self.assertEqual(done.returncode, 1)
                self.assertEqual(done.stdout, f"{U} test 2.0.0\n")
                self.assertRegex(done.stderr, f"refuses the user or the password.*\n.*{V}: .*404")
                self.assertEqual(sorted(os.listdir(self.here)), [U, V])
                for uuid in (U, V):
                    shutil.rmtree(os.path.join(self.here, uuid))

    def test_exit_statuses(self):
        for words, status, pattern in (
                (("http://127.0.0.1:1",), 2, "UUIDs are needed"),
                (("http://127.0.0.1:1", U, "--all"), 2, "either"),
                (("http://127.0.0.1:1", "x"), 2, "is not a UUID"),
                (("http://joe:secret@h:x", "--all"), 2, "URL"),
                (("/nowhere", "--all"), 2, "URL is not http"),
                (("http://127.0.0.1:1", "--latest", "0"), 2, "--latest"),
                (("http://127.0.0.1:1/datasets", "--all", "--channel", "c"), 2, "no channels"),
                (("--dir", "/nowhere", self.serve_dir, "--all"), 96, "serve_dir"),
                ((self.serve_dir, "--all"), 0, "^imgserver: no image .* fits\n$"),
                ((self.serve_dir, "--all", "-q"), 0, "^$"), ((self.serve_dir, U), 1, "not found")):
            with self.subTest(words):
                done = self.run_mirror(*words)
                self.assertEqual(done.returncode, status, done.stderr)
                self.assertRegex(done.stderr, pattern)
                self.assertNotIn("secret", done.stderr)
                self.assertNotIn("Traceback", done.stderr)

    def stalled(self, *words):
        """A mirror in a process of its own that waits in the middle of a file."""
        up = Upstream()
        self.addCleanup(up.close)
        up.add(U)
        up.script[f"/images/{U}/file"] = [[answer(IMAGE)[:200_000], STALL]]
        process = Program("--dir", self.here, "mirror", up.url, U, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(process.kill)
        partial = os.path.join(self.here, ".incoming-" + U, ".partial")
        wait_for(lambda: os.path.exists(partial) and os.path.getsize(partial), "the file")
        return up, process, partial

    def test_killed_in_the_middle_of_a_file(self):
        up, process, partial = self.stalled()
        process.kill()
        process.communicate()
        size = os.path.getsize(partial)
        self.assertGreater(size, 0)
        up.sent.clear()
        done = self.run_mirror(up.url, U)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(up.asked(f"/images/{U}/file")[1]["range"], f"bytes={size}-")
        wait_sent(up, f"/images/{U}/file", len(IMAGE) - size)
        self.assertEqual(os.listdir(self.here), [U])

    def test_a_signal_while_nothing_comes(self):
        up, process, partial = self.stalled()
        process.terminate()
        output, errors = process.communicate(timeout=PATIENCE)
        self.assertEqual((process.returncode, errors), (128 + signal.SIGTERM,
                                                        "imgserver: ended by SIGTERM\n"))
        self.assertGreater(os.path.getsize(partial), 0)

    def test_import_says_how_an_origin_comes(self):
        done = run_program("--dir", self.here, "import", "--origin", U, "a", "1", "b")
        self.assertIn(f"`imgserver.py mirror URL {U}` brings it".encode(), done.stderr)

    @check_only("random")
    def test_random_kills(self):
        data = streams.pack(streams.stream(streams.noise(8 << 20)))
        write_v2(self.serve_dir, U, data)
        server = self.serve()
        url = f"http://127.0.0.1:{server.address[1]}"
        for _ in range(20):
            process = Program("--dir", self.here, "mirror", url, U, stdout=subprocess.DEVNULL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(random.uniform(0.05, 0.5))
            process.kill()
            process.wait()
        self.assertEqual(self.run_mirror("-q", url, U).returncode, 0)
        self.assertEqual(os.listdir(self.here), [U])
        check = run_program("--dir", self.here, "check", "-q")
        self.assertEqual((check.returncode, check.stdout), (0, b""))

    @check_only("large")
    def test_memory(self):
        data = streams.pack(streams.stream(streams.noise(100 << 20)), "none")
        write_v2(self.serve_dir, U, data, compression="none", path="image.zfs")
        server = self.serve()
        report = ("import atexit, re; atexit.register(lambda: print(re.search("
                  "'VmHWM:\\\\s+([0-9]+)', open('/proc/self/status').read())[1]))")
        done = run_program(
            "--dir", self.here, "mirror", "-q", f"http://127.0.0.1:{server.address[1]}", U,
            prelude=report, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertLess(int(done.stdout), 40 << 10)


if __name__ == "__main__":
    unittest.main()
