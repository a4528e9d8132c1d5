"""Publishing over HTTP: every route and refusal, the requests of the real clients, uploads.

Refusals that need no connection are asked of a Site; uploads come over TCP, a Unix socket and
real nginx.
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import unittest
from unittest import mock

import imgserver
from tests import streams
from tests.support import (PATIENCE, ROOT, BodyBytes, ServerCase, ask, check_only, log_of, need,
                           run_program, uuid_of, wait_for, write_image, write_v2)
from tests.test_nginx import NginxCase

U, V, W = uuid_of(1), uuid_of(2), uuid_of(3)
GONE, ACCOUNT = uuid_of(9), uuid_of(77)
NOBODY = "00000000-0000-0000-0000-000000000000"
DATA = streams.pack(streams.stream())
SHA1 = hashlib.sha1(DATA).hexdigest()
PUBLISHER, MANAGER, STRANGER = "10.0.0.1", "10.0.0.2", "10.0.0.3"
RIGHTS = {"publish_from": [PUBLISHER], "manage_from": [MANAGER]}
HERE = {"manage_from": ["127.0.0.1", "unix"]}     # of a real server
CHANNELS = [{"name": "release", "default": True}, {"name": "dev"}]
NO_DEFAULT = [{"name": "release"}, {"name": "dev"}]
SHOWN = ("v", "uuid", "owner", "name", "version", "state", "disabled", "public", "type", "os",
         "files")                         # wanted by tritonadm in each image


def manifest_of(image, **fields):
    """A manifest as imgadm create writes it; None leaves a field out."""
    manifest = {"v": 2, "uuid": image, "name": "web", "version": "1.0", "type": "zone-dataset",
                "os": "smartos", "files": [{"size": len(DATA), "compression": "gzip",
                                            "sha1": SHA1}], **fields}
    return {name: value for name, value in manifest.items() if value is not None}


def dump(value):
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def md5_of(data):
    return base64.b64encode(hashlib.md5(data).digest()).decode()


class PublishingCase(ServerCase):
    """A Site that publishes, and images: U active, V waiting with its file, W waiting without."""

    def setUp(self):
        super().setUp()
        write_v2(self.serve_dir, U, DATA)
        self.fill(V, DATA)
        self.fill(W)
        self.www = self.site(**RIGHTS)

    def fill(self, uuid, data=None, **fields):
        """An unactivated image, as the verbs make it."""
        publisher = imgserver.Publisher(imgserver.Config({"serve_dir": self.serve_dir}))
        publisher.create(manifest_of(uuid, files=None, **fields))
        if data is not None:
            publisher.add_file(uuid, io.BytesIO(data).read)

    def put(self, method, target, body=b"", who=MANAGER, site=None, **headers):
        return ask(site or self.www, target, method, dump(body) if body != b"" else b"", who,
                   **headers)

    def expect(self, case, answer, status, code=None, message="", fields=None):
        with self.subTest(case):
            if code is None:
                self.assertEqual(answer.status, status, answer)
                return answer
            error = self.assertError(answer, status, code)
            self.assertIn(message, error["message"])
            if fields is not None:
                self.assertEqual([(each["field"], each["code"]) for each in error["errors"]],
                                 fields)
        return answer

    def names(self):
        return sorted(os.listdir(self.serve_dir))


MALFORMED = {                             # JSON bodies: status, code
    "[]": (b"[]", 400, "InvalidContent"), "{": (b"{", 400, "InvalidContent"),
    "text": (b'"x"', 400, "InvalidContent"), "null": (b"null", 400, "InvalidContent"),
    "not UTF-8": (b'{"name": "\xff"}', 400, "InvalidContent"),
    "NaN": (b'{"image_size": NaN}', 400, "InvalidContent"),
    "half a pair": (b'{"name": "\\ud800"}', 400, "InvalidContent"),
    "nested": (b'{"tags": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "InvalidContent"),
    **{f"nested {depth}": (b'{"v": 2, "x": ' + b"[" * depth + b"]" * depth + b"}", 400,
                           "InvalidContent") for depth in (101, 300, 400, 490, 700, 950)},
    "2 MiB": (b'{"name": "' + b"x" * (2 << 20) + b'"}', 413, "RequestEntityTooLarge"),
}


class Refusals(PublishingCase):
    """Each with its code, its fields, and the directory as it was."""

    def setUp(self):
        super().setUp()
        self.before = self.names()

    def tearDown(self):
        self.assertEqual(self.names(), self.before)
        self.assertNotIn("error", log_of(self.www))

    def test_json_bodies(self):
        for target in ("/images", f"/images/{GONE}?action=import", f"/images/{U}?action=update"):
            for name, (body, status, code) in MALFORMED.items():
                self.expect(f"{target} {name}", self.put("POST", target, body), status, code)
            self.expect(target + " Content-MD5", self.put(
                "POST", target, manifest_of(GONE), Content_MD5=md5_of(b"x")), 400, "BadDigest")
            self.expect(target + " no MD5", self.put(
                "POST", target, manifest_of(GONE), Content_MD5="x"), 400, "BadDigest")

    def test_actions(self):
        wrong = [("action", "Invalid")]
        for target, status, code, fields in (
                (f"/images/{U}", 422, "InvalidParameter", [("action", "MissingParameter")]),
                (f"/images/{U}?action=", 422, "InvalidParameter",
                 [("action", "MissingParameter")]),
                (f"/images/{U}?action=bogus", 422, "InvalidParameter", wrong),
                (f"/images/{U}?action=enable&action=disable", 422, "InvalidParameter", wrong),
                (f"/images/{U}?action=channel-add", 422, "InvalidParameter", wrong),
                ("/images?action=bogus", 422, "InvalidParameter", wrong),
                ("/images?action=create-from-vm", 501, "NotAvailable", None),
                (f"/images/{U}?action=export", 501, "NotAvailable", None),
                (f"/images/{GONE}?action=import-remote&source=http://x", 501, "NotAvailable",
                 None),
                (f"/images/{GONE}?action=import-from-datacenter", 501, "NotAvailable", None),
                (f"/images/{W}?action=change-stor", 501, "NotAvailable", None),
                (f"/images/{GONE}?action=import&source=http://x", 501, "NotAvailable", None),
                (f"/images/{U}/jobs", 501, "NotAvailable", None),
                (f"/images/{U}/push", 501, "NotAvailable", None),
                (f"/images/{U}/clone", 501, "NotAvailable", None),
                (f"/images/{U}/file/from-url", 501, "NotAvailable", None)):
            self.expect(target, self.put("POST", target), status, code, fields=fields)
        self.expect("no such path", self.put("POST", f"/images/{U}/x"), 404, "ResourceNotFound")
        self.expect("no uuid", self.put("POST", "/images/xyz?action=enable"), 404,
                    "ResourceNotFound")
        self.expect("upper case", self.put("DELETE", "/images/" + uuid_of(0xab).upper()), 404)

    def test_a_method_that_a_path_does_not_have(self):
        for method, target, allow in (
                ("PUT", "/images", "GET, HEAD, OPTIONS, POST"),
                ("DELETE", "/images", "GET, HEAD, OPTIONS, POST"),
                ("PUT", f"/images/{U}", "DELETE, GET, HEAD, OPTIONS, POST"),
                ("POST", f"/images/{U}/file", "GET, HEAD, OPTIONS, PUT"),
                ("POST", f"/datasets/{U}", "GET, HEAD, OPTIONS"),
                ("PUT", "/ping", "GET, HEAD, OPTIONS")):
            answer = self.expect(target, self.put(method, target), 405, "MethodNotAllowedError")
            self.assertEqual(answer.headers["allow"], allow)
            self.assertNotIn("off", answer.json()["message"])

    def test_versions_that_are_none(self):
        for method, target in (("POST", "/images"), ("POST", f"/images/{GONE}?action=import"),
                               ("PUT", f"/images/{V}/file?compression=gzip"),
                               ("POST", f"/images/{V}?action=activate"),
                               ("POST", f"/images/{U}?action=disable"),
                               ("PUT", f"/images/{U}/icon"), ("DELETE", f"/images/{U}"),
                               ("DELETE", f"/images/{U}/icon"), ("POST", f"/images/{U}/acl")):
            self.expect(target, self.put(method, target, manifest_of(GONE),
                                         Accept_Version="~99"), 400, "InvalidVersion")

    def test_create(self):
        invalid = "InvalidParameter"
        for changes, code, fields in (
                ({"state": "active"}, "ValidationFailed", [("state", "NotAllowed")]),
                ({"uuid": GONE}, invalid, [("uuid", "Invalid")]),
                ({"urn": "a:b:c:d"}, invalid, [("urn", "Invalid")]),
                ({"bogus": 1}, invalid, [("bogus", "Invalid")]),
                ({"name": None}, "ValidationFailed", [("name", "MissingParameter")]),
                ({"name": "a+b", "os": "beos"}, "ValidationFailed",
                 [("name", "Invalid"), ("os", "Invalid")]),
                ({"nic_driver": "virtio"}, "ValidationFailed", [("nic_driver", "Invalid")]),
                ({"origin": GONE}, "OriginDoesNotExist", None),
                ({"owner": "joe"}, "ValidationFailed", [("owner", "Invalid")])):
            body = {name: value for name, value in {
                **manifest_of(U, uuid=None, files=None), **changes}.items() if value is not None}
            self.expect(changes, self.put("POST", "/images", body), 422, code, fields=fields)
        self.expect("nothing", self.put("POST", "/images"), 422, "ValidationFailed")
        self.expect("two owners", self.put(
            "POST", f"/images?account={ACCOUNT}", manifest_of(U, uuid=None, owner=NOBODY)), 422,
            invalid, fields=[("owner", "Invalid")])

    def test_import(self):
        target = f"/images/{GONE}?action=import"
        no = [("uuid", "Invalid")]
        for case, target, body, status, code, fields in (
                ("nothing", target, b"", 422, "InvalidParameter", [("uuid", "MissingParameter")]),
                ("other uuid", target, manifest_of(U), 422, "InvalidParameter", no),
                ("uuid is no text", target, manifest_of(GONE, uuid=[1]), 422, "InvalidParameter",
                 no),
                ("account", target + "&account=" + ACCOUNT, manifest_of(GONE), 403,
                 "OperatorOnly", None),
                ("active", f"/images/{U}?action=import", manifest_of(U, name="+"), 409,
                 "ImageUuidAlreadyExists", None),
                ("origin", target, manifest_of(GONE, origin=uuid_of(8)), 422,
                 "OriginDoesNotExist", None),
                ("own origin", target, manifest_of(GONE, origin=GONE), 422,
                 "OriginDoesNotExist", None),
                ("moment", target, manifest_of(GONE, published_at="soon"), 422,
                 "ValidationFailed", [("published_at", "Invalid")]),
                ("several", target, manifest_of(GONE, name="a+b", type="x"), 422,
                 "ValidationFailed", [("name", "Invalid"), ("type", "Invalid")])):
            self.expect(case, self.put("POST", target, body), status, code, fields=fields)

    def test_import_of_an_origin_that_would_hide_what_builds_on_it(self):
        self.fill(uuid_of(5), DATA)
        for uuid, origin in ((U, GONE), (uuid_of(5), U), (W, W)):
            place = os.path.join(self.serve_dir, uuid if uuid == U else ".incoming-" + uuid)
            with open(os.path.join(place, "manifest.json")) as file:
                manifest = json.load(file)
            with open(os.path.join(place, "manifest.json"), "w") as file:
                json.dump({**manifest, "origin": origin}, file)
        self.before = self.names()
        for uuid, origin in ((GONE, U), (GONE, uuid_of(5)), (V, V), (W, W)):
            self.expect((uuid, origin), self.put(
                "POST", f"/images/{uuid}?action=import", manifest_of(uuid, origin=origin)), 422,
                "OriginDoesNotExist", "builds on image" if uuid != V else "")
        self.assertEqual([image["uuid"] for image in self.put("GET", "/images").json()], [U])

    def test_file(self):
        missing, wrong = [("compression", "Missing")], [("compression", "Invalid")]
        for case, target, status, code, fields in (
                ("unknown", f"{GONE}/file?compression=gzip", 404, "ResourceNotFound", None),
                ("no compression", f"{W}/file", 422, "InvalidParameter", missing),
                ("compression", f"{W}/file?compression=lzma", 422, "InvalidParameter", wrong),
                ("both", f"{W}/file?compression=xz&compression=gzip", 422, "InvalidParameter",
                 wrong),
                ("storage", f"{W}/file?compression=gzip&storage=s3", 422, "InvalidParameter",
                 [("storage", "Invalid")]),
                ("source", f"{W}/file?compression=gzip&source=http://x", 501, "NotAvailable",
                 None),
                ("active", f"{U}/file?compression=gzip", 422, "ImageFilesImmutable", None)):
            self.expect(case, self.put("PUT", "/images/" + target, DATA), status, code,
                        fields=fields)
        for case, query, data, message in (
                ("empty", "gzip", b"", "there is no data"),
                ("sha1", "gzip&sha1=" + "0" * 40, DATA, "its sha1 is " + SHA1),
                ("sha1 is none", "gzip&sha1=0", DATA, "its sha1 is " + SHA1),
                ("compression", "xz", DATA, "its compression is gzip, not xz"),
                ("guid", "gzip&dataset_guid=5", DATA, "its dataset_guid is"),
                ("half", "gzip", DATA[:-20], "image refused"),
                ("half a stream", "gzip", streams.pack(streams.stream()[:-312]), "refused"),
                ("no stream", "none", b"x" * 5000, "no ZFS send stream"),
                ("incremental", "gzip", streams.pack(streams.stream(from_guid=5)),
                 "no origin is given: the uuid of the image that it builds on"),
                ("several", "gzip", streams.pack(streams.package(
                    streams.stream(), streams.stream(from_guid=streams.GUID, guid=7))),
                 "snapshots")):
            for uuid in (V, W):
                self.expect(case, self.put("PUT", f"/images/{uuid}/file?compression={query}",
                                           data), 400, "Upload", message)
        self.assertEqual(os.listdir(os.path.join(self.serve_dir, ".incoming-" + W)),
                         ["manifest.json"])
        self.assertEqual(self.put("GET", f"/images/{V}/file").body, DATA)

    def test_a_part_of_a_file(self):
        for target in (f"/images/{W}/file?compression=gzip",
                       "/images?action=publish&name=a&version=1"):
            answer = self.put("POST" if "publish" in target else "PUT", target, DATA,
                              Content_Range=f"bytes 5-{len(DATA) + 4}/{len(DATA) + 5}")
            self.expect(target, answer, 400, "BadRequestError", "cannot be resumed")

    def test_file_of_no_stream_where_streams_are_not_checked(self):
        self.www = self.site(check_streams=False, **RIGHTS)
        answer = self.put("PUT", f"/images/{W}/file?compression=none", b"x" * 5000)
        self.assertEqual(answer.json()["files"][0]["size"], 5000, answer)

    def test_limits_of_an_upload(self):
        site = self.site(max_upload=len(DATA) - 1, **RIGHTS)
        target = f"/images/{W}/file?compression=gzip"
        self.expect("told", ask(site, target, "PUT", peer=MANAGER, Content_Length=len(DATA)), 400,
                    "Upload", "max_upload")
        self.expect("chunked", ask(site, (
            f"PUT {target} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n").encode(),
            body=DATA, peer=MANAGER), 400, "Upload", "max_upload")
        free = os.statvfs(self.serve_dir)
        size = free.f_bavail * free.f_frsize + (1 << 40)
        self.expect("no space", ask(self.www, target, "PUT", peer=MANAGER, Content_Length=size),
                    503, "StorageIsDown")

    def test_a_disk_that_fills_meanwhile(self):
        class Filling(BodyBytes):
            def read(self, size):
                imgserver.SPACE_LEFT = 1 << 62
                return super().read(10)
        for head in ("Content-Length: %d" % len(DATA), "Transfer-Encoding: chunked"):
            with mock.patch.object(imgserver, "SPACE_LEFT", imgserver.SPACE_LEFT), \
                    mock.patch.object(imgserver, "SPACE_STEP", 50), \
                    mock.patch("tests.support.BodyBytes", Filling):
                answer = ask(self.www, (f"PUT /images/{W}/file?compression=gzip HTTP/1.1\r\n"
                                        f"Host: h\r\n{head}\r\n\r\n").encode(), body=DATA,
                             peer=MANAGER)
            self.expect(head, answer, 503, "StorageIsDown")
        self.assertEqual(os.listdir(os.path.join(self.serve_dir, ".incoming-" + W)),
                         ["manifest.json"])

    def test_icon(self):
        png = {"Content_Type": "image/png"}
        for case, status, code, message, answer in (
                ("kind", 400, "Upload", "invalid content-type, text/html, must be one of "
                 "image/gif, image/jpeg, image/png", self.put(
                     "PUT", f"/images/{U}/icon", b"<b>", Content_Type="text/html")),
                ("no kind", 400, "Upload", "invalid content-type", self.put(
                    "PUT", f"/images/{U}/icon", b"x")),
                ("large", 400, "Upload", "maximum allowed size, 128 KiB", self.put(
                    "PUT", f"/images/{U}/icon", b"x" * 131073, **png)),
                ("sha1", 400, "Upload", '"sha1" hash, 00, does not match', self.put(
                    "PUT", f"/images/{U}/icon?sha1=00", b"x", **png)),
                ("unknown", 404, "ResourceNotFound", "", self.put(
                    "PUT", f"/images/{GONE}/icon", b"x", **png)),
                ("none", 404, "ResourceNotFound", "has no icon",
                 self.put("DELETE", f"/images/{U}/icon"))):
            self.expect(case, answer, status, code, message)

    def test_activate(self):
        for uuid, status, code in ((U, 422, "ImageAlreadyActivated"), (GONE, 404, None),
                                   (W, 422, "NoActivationNoFile")):
            self.expect(code, self.put("POST", f"/images/{uuid}?action=activate", {}), status,
                        code)
        self.expect("its body", self.put("POST", f"/images/{V}?action=activate", b"{"), 400,
                    "InvalidContent")

    def test_update(self):
        failed, no = "ValidationFailed", "Parameter cannot be updated"
        target = f"/images/{U}?action=update"
        for body, message, fields in (
                (b"{}", "no parameters provided", []),
                ({"uuid": GONE}, "uuid", [("uuid", "NotAllowed")]),
                ({"type": "zvol"}, "type", [("type", "NotAllowed")]),
                ({"files": []}, "files", [("files", "NotAllowed")]),
                ({"disabled": True, "v": 3}, "disabled, v", [("disabled", "NotAllowed"),
                                                              ("v", "NotAllowed")]),
                ({"bogus": 1}, "bogus", [("bogus", "NotAllowed")]),
                ({"name": None}, "name", [("name", "Invalid")]),
                ({"homepage": "x"}, "homepage", [("homepage", "Invalid")])):
            self.expect(body, self.put("POST", target, body), 422, failed, message, fields)
        self.assertEqual(self.put("POST", target, {"uuid": GONE}).json()["errors"][0]["message"],
                         no)
        self.expect("nothing", self.put("POST", target), 422, "InvalidParameter",
                    "missing request body", [("body", "MissingParameter")])
        self.expect("another version", self.put("POST", target, {"name": "x"},
                                                If_Match='"abc"'), 412, "PreconditionFailed")

    def test_acl(self):
        for case, query, body, message in (
                ("no body", "", b"", "(not an array)"), ("text", "", b'"x"', "(not an array)"),
                ("item", "", [ACCOUNT, "x"], "(item 1 is not a UUID): x"),
                ("number", "", [7], "(item 0 is not a UUID): 7"),
                ("action", "?action=x", [ACCOUNT], 'invalid "action": "x"')):
            self.expect(case, self.put("POST", f"/images/{U}/acl{query}", body), 422,
                        "InvalidParameter", message)

    def test_delete(self):
        self.fill(GONE, origin=U)
        self.fill(uuid_of(8), origin=W)
        self.before = self.names()
        for case, target, code, message in (
                ("built on", U, "ImageHasDependentImages",
                 f'image "{U}" has 1 dependent incremental image(s): {GONE}'),
                ("built on, not active", W, "ImageHasDependentImages", uuid_of(8)),
                ("owner", f"{V}?account={ACCOUNT}", "NotImageOwner", ACCOUNT),
                ("force", f"{V}?force_all_channels=1", "InvalidParameter", "force_all")):
            answer = self.put("DELETE", "/images/" + target)
            self.expect(case, answer, 422, code, message)
            self.assertNotIn(b"--force", answer.body)         # an option of the command line
        self.expect("unknown", self.put("DELETE", "/images/" + uuid_of(5)), 404)
        self.expect("another version", self.put("DELETE", f"/images/{V}", If_Match='"x"'), 412)

    def test_publish_in_one(self):
        exists = f"uuid={U}&name=a&version=1"
        for query, status, code, fields in (
                ("version=1", 422, "ValidationFailed", [("name", "MissingParameter")]),
                ("name=a&version=1&bogus=1", 422, "InvalidParameter", [("bogus", "Invalid")]),
                ("name=a&version=1&files=[]", 422, "InvalidParameter", [("files", "Invalid")]),
                ("name=a&version=1&state=active", 422, "InvalidParameter",
                 [("state", "Invalid")]),
                ("name=a&name=b&version=1", 422, "InvalidParameter", [("name", "Invalid")]),
                ("name=a&version=1&os=beos", 422, "InvalidParameter", [("os", "Invalid")]),
                ("name=a&version=1&tags={", 422, "InvalidParameter", [("tags", "Invalid")]),
                ("name=a&version=1&uuid=x", 422, "ValidationFailed", [("uuid", "Invalid")]),
                ("name=a&version=1&uuid=../x", 422, "ValidationFailed", [("uuid", "Invalid")]),
                ("name=a&version=1&compression=lzma", 422, "InvalidParameter",
                 [("compression", "Invalid")]),
                ("name=a&version=1&origin=" + GONE, 422, "OriginDoesNotExist", None),
                (exists, 409, "ImageUuidAlreadyExists", None)):
            answer = ask(self.www, "/images?action=publish&" + query, "POST",
                         peer=PUBLISHER, Content_Length=100)
            self.expect(query, answer, status, code, fields=fields)
        target = "/images?action=publish&name=a&version=1"
        for case, query, data in (("nothing", "", b""), ("half", "", DATA[:-9]),
                                  ("sha1", "&sha1=" + "0" * 40, DATA),
                                  ("compression", "&compression=xz", DATA)):
            self.expect(case, self.put("POST", target + query, data), 400, "Upload")


class Storage(PublishingCase):
    """A disk that fails: the sender is not to blame; the log says why, and the client no path."""

    def test_it_cannot_be_examined(self):
        """Before an upload, and on its way."""
        real = os.statvfs
        for good in (0, 1):
            answers = [real] * good

            def statvfs(path):
                if answers:
                    return answers.pop()(path)
                raise OSError(5, "Input/output error", path)
            with mock.patch("os.statvfs", statvfs), mock.patch.object(imgserver, "SPACE_STEP", 50):
                self.expect(good, self.put("PUT", f"/images/{W}/file?compression=gzip", DATA),
                            503, "StorageIsDown", "Input/output error")

    def test_the_log_has_the_cause(self):
        with mock.patch("os.rename", side_effect=OSError(30, "Read-only file system")):
            answer = self.put("POST", f"/images/{V}?action=activate", b"{}")
        self.expect("activate", answer, 503, "StorageIsDown", "Read-only file system")
        path = os.path.join(self.serve_dir, ".incoming-" + V, "manifest.json")
        self.assertNotIn(self.serve_dir.encode(), answer.body)
        self.assertTrue(log_of(self.www).endswith(
            f"error cannot answer /images/{V}?action=activate: cannot write manifest.json: "
            f"Read-only file system ({path})\n"), log_of(self.www))


class Right(PublishingCase):
    """Who may do which."""

    def test_rights(self):
        yes, no = None, "OperatorOnly"
        self.fill(uuid_of(5), DATA)
        os.rename(os.path.join(self.serve_dir, ".incoming-" + uuid_of(5)),
                  os.path.join(self.serve_dir, uuid_of(5)))
        path = os.path.join(self.serve_dir, uuid_of(5), "manifest.json")
        with open(path) as file:
            manifest = json.load(file)
        with open(path, "w") as file:     # its author has set it aside
            json.dump({**manifest, "state": "unactivated"}, file)
        aside = uuid_of(5)
        png = {"Content_Type": "image/png"}
        for method, target, body, headers, publisher in (
                ("POST", "/images", {"type": "lxd"}, {}, yes),
                ("POST", f"/images/{GONE}?action=import", {}, {}, yes),
                ("PUT", f"/images/{W}/file", b"", {}, yes),
                ("POST", f"/images/{W}?action=activate", {}, {}, yes),
                ("POST", f"/images/{U}?action=activate", {}, {}, yes),
                ("POST", f"/images/{aside}?action=activate", {}, {}, no),
                ("PUT", f"/images/{V}/icon", b"x", png, yes),
                ("PUT", f"/images/{U}/icon", b"x", png, no),
                ("PUT", f"/images/{aside}/icon", b"x", png, no),
                ("DELETE", f"/images/{V}/icon", b"", {}, yes),
                ("DELETE", f"/images/{U}/icon", b"", {}, no),
                ("POST", f"/images/{U}?action=enable", b"", {}, no),
                ("POST", f"/images/{U}?action=disable", b"", {}, no),
                ("POST", f"/images/{U}?action=update", {}, {}, no),
                ("POST", f"/images/{V}?action=update", {}, {}, no),
                ("POST", f"/images/{U}/acl", {}, {}, no),
                ("POST", "/images?action=publish", b"", {}, yes),
                ("DELETE", f"/images/{U}", b"", {}, no),
                ("DELETE", f"/images/{aside}", b"", {}, no),
                ("DELETE", f"/images/{V}", b"", {}, yes),
                ("DELETE", f"/images/{W}/icon", b"", {}, yes)):
            for who, refused in ((STRANGER, no), ("", no), ("fe80::1%net0", no),
                                 ("::ffff:10.0.0.9", no), (PUBLISHER, publisher),
                                 (MANAGER, yes)):
                with self.subTest(f"{method} {target} from {who}"):
                    answer = self.put(method, target, body, who, **headers,
                                      X_Real_IP=MANAGER, X_Forwarded_For=MANAGER,
                                      Forwarded="for=" + MANAGER)
                    code = answer.json()["code"] if answer.status >= 400 else None
                    self.assertEqual(code == "OperatorOnly", refused is no, answer)

    def test_a_directory_that_cannot_be_written_is_said_at_once(self):
        os.chmod(self.directory, 0o755)
        os.chmod(self.serve_dir, 0o555)
        self.addCleanup(os.chmod, self.serve_dir, 0o755)
        for config, said in ((HERE, True), ({}, False)):
            server = self.serve(config=config, prelude=(
                "import locale, os, resource, ipaddress\nif os.getuid() == 0: "
                "os.setgroups([]); os.setgid(65534); os.setuid(65534)"))
            self.assertEqual("serve_dir cannot be written" in server.log(), said)

    def test_networks_and_the_socket(self):
        for networks, peers, others in (
                (["10.0.0.0/8"], ["10.255.0.1"], ["11.0.0.1", "", "::1"]),
                (["fd00::/8", "::1"], ["fd01::7", "::1", "fd00::1%net0"], ["fe80::1", "10.0.0.1"]),
                (["unix"], [""], ["127.0.0.1"])):
            site = self.site(publish_from=networks)
            for peer in peers + others:
                with self.subTest(peer=peer, networks=networks):
                    answer = self.put("POST", f"/images/{U}", who=peer, site=site)
                    self.assertEqual(answer.status, 422 if peer in peers else 403)

    def test_the_refusal_names_the_right_and_who_lacks_it(self):
        for target, who, name, right in (
                ("/images", STRANGER, f"address {STRANGER}", "publish"),
                (f"/images/{U}?action=update", PUBLISHER, f"address {PUBLISHER}", "manage"),
                (f"/images/{U}?action=update", "", "the Unix socket", "publish")):
            answer = self.put("POST", target, {}, who)
            self.assertEqual(self.assertError(answer, 403, "OperatorOnly")["message"],
                             f"{name} lacks the right to {right}")

    def test_off(self):
        site = self.site()
        for method, target in (("POST", "/images"), ("DELETE", f"/images/{U}"),
                               ("POST", f"/images/{U}?action=activate"),
                               ("PUT", f"/images/{V}/file?compression=gzip")):
            answer = self.put(method, target, {}, site=site)
            self.expect(target, answer, 405, "MethodNotAllowedError",
                        "publishing over HTTP is off, until")
            self.assertEqual(answer.headers["allow"], "GET, HEAD, OPTIONS")
        self.expect("no route", self.put("POST", f"/images/{U}/acl", site=site), 404)

    def test_who_sees_what_is_not_active(self):
        for who, found in ((STRANGER, []), (PUBLISHER, [V, W]), (MANAGER, [V, W])):
            answer = self.put("GET", "/images?state=unactivated", who=who)
            self.assertEqual([image["uuid"] for image in answer.json()], found)
            self.assertEqual(len(self.put("GET", "/images?state=all", who=who).json()),
                             1 + len(found))
            self.assertEqual([image["uuid"] for image in self.put("GET", "/images",
                                                                  who=who).json()], [U])


class WebPages(PublishingCase):

    def test_pages(self):
        yes, no = 200, 403
        for headers, status in (
                ({}, yes), ({"Sec_Fetch_Site": "none"}, yes),
                ({"Origin": "http://evil.example"}, no), ({"Origin": "null"}, no),
                ({"Origin": ""}, no), ({"Origin": "x"}, no),
                ({"Origin": "http://10.0.0.5:8080"}, yes),
                ({"Origin": "http://10.0.0.5"}, no), ({"Origin": "http://10.0.0.5:80800"}, no),
                ({"Origin": "http://10.0.0.5:8080.evil.example"}, no),
                ({"Origin": "http://10.0.0.5:8080", "Sec_Fetch_Site": "cross-site"}, no),
                ({"Origin": "http://10.0.0.5:8080, http://evil.example"}, no),
                ({"Sec_Fetch_Site": "cross-site"}, no),
                ({"Sec_Fetch_Site": "same-site", "Origin": "https://other.example"}, no),
                ({"Host": "images.example", "Origin": "https://images.example",
                  "Sec_Fetch_Site": "same-origin"}, yes),
                ({"Host": "images.example", "Origin": "https://IMAGES.example"}, yes),
                ({"Host": "[fd00::1]:80", "Origin": "http://[fd00::1]:80"}, yes),
                # A name of the page's owner that leads here (DNS rebinding).
                ({"Host": "evil.example:8080", "Origin": "http://evil.example:8080"}, no),
                ({"Host": "1.2.3.4.evil.example", "Origin": "http://1.2.3.4.evil.example"}, no)):
            with self.subTest(headers):
                answer = self.put("POST", f"/images/{U}?action=enable",
                                  **{"Host": "10.0.0.5:8080", **headers})
                self.assertEqual(answer.status, status, answer)
                if status == no:
                    self.assertIn("pages of other sites", self.assertError(
                        answer, 403, "OperatorOnly")["message"])
                else:
                    self.assertNotIn("access-control-allow-origin", answer.headers)

    def test_a_preflight_grants_no_writing(self):
        for method in ("PUT", "POST", "DELETE"):
            answer = self.put("OPTIONS", f"/images/{U}", Origin="http://evil.example",
                              Access_Control_Request_Method=method)
            self.assertEqual(answer.headers["access-control-allow-methods"],
                             "GET, HEAD, OPTIONS")

    def test_reading_is_open_to_pages(self):
        for method in ("GET", "HEAD"):
            answer = self.put(method, f"/images/{U}", Origin="http://evil.example",
                              Sec_Fetch_Site="cross-site")
            self.assertEqual(answer.status, 200)


class Answers(PublishingCase):
    """What is done, and how it is answered."""

    def test_create(self):
        answer = self.put("POST", "/images", manifest_of(U, uuid=None, files=None), PUBLISHER)
        image = self.expect("create", answer, 200).json()
        self.assertEqual((image["state"], image["owner"], image["public"], image["disabled"]),
                         ("unactivated", NOBODY, True, False))
        self.assertLessEqual(set(SHOWN), set(image))
        self.assertRegex(image["uuid"], "^[0-9a-f]{8}-[0-9a-f]{4}-4")
        self.assertNotIn("published_at", image)
        self.assertEqual(answer.headers["content-type"], "application/json")
        self.assertEqual(answer.headers["cache-control"], "private, no-store")
        self.assertEqual(answer.headers["etag"],
                         self.put("GET", "/images/" + image["uuid"]).headers["etag"])
        answer = self.put("POST", f"/images?account={ACCOUNT}",
                          manifest_of(U, uuid=None, v=None, files=None))
        self.assertEqual(answer.json()["owner"], ACCOUNT)

    def test_import_drops_what_a_fetched_manifest_carries(self):
        image = self.put("POST", f"/images/{GONE}?action=import", manifest_of(
            GONE, state="active", icon=True, owner=ACCOUNT, published_at="2013-04-05T06:07:08Z",
            urn="a:b:c:d", channels=["elsewhere"], error={"code": "x"}, disabled=True,
            billing_tags=["a"], traits={"b": True}), PUBLISHER).json()
        self.assertEqual((image["state"], image["owner"], image["published_at"], image["urn"],
                          image["disabled"], image["billing_tags"], image["traits"]),
                         ("unactivated", ACCOUNT, "2013-04-05T06:07:08Z", "a:b:c:d", True,
                          ["a"], {"b": True}))
        self.assertFalse({"icon", "channels", "error"} & set(image))
        self.assertEqual(image["files"], [])

    def test_import_of_a_v1_manifest(self):
        source = os.path.join(self.directory, "v1")
        for fields, public in (({}, True), ({"restricted_to_uuid": ACCOUNT}, False)):
            manifest = write_image(source, GONE, DATA, **fields)
            image = self.put("POST", f"/images/{GONE}?action=import", manifest).json()
            self.assertEqual((image["v"], image["owner"], image["public"], image["state"]),
                             (2, manifest["creator_uuid"], public, "unactivated"))
            self.assertEqual(image.get("acl"), None if public else [ACCOUNT])

    def test_versions(self):
        site = self.site(channels=CHANNELS, **RIGHTS)
        for version, shown in (("~1", False), ("*", True), ("~2", True)):
            answer = self.put("POST", f"/images/{GONE}?action=import", manifest_of(GONE),
                              site=site, Accept_Version=version)
            self.assertEqual("channels" in answer.json(), shown)
            self.assertEqual(answer.headers["etag"], self.put(
                "GET", f"/images/{GONE}", site=site, Accept_Version=version).headers["etag"])

    def test_a_second_file_replaces_the_first(self):
        other = streams.pack(streams.stream(payload=b"other"), "xz")
        for data, kind in ((DATA, "gzip"), (other, "xz"), (DATA, "gzip")):
            image = self.put("PUT", f"/images/{W}/file?compression={kind}", data).json()
            self.assertEqual(image["files"][0]["sha1"], hashlib.sha1(data).hexdigest())
            self.assertEqual(image["files"][0]["size"], len(data))
            self.assertEqual(image["state"], "unactivated")
            self.assertEqual(self.put("GET", f"/images/{W}/file").body, data)
        self.assertEqual(len(os.listdir(os.path.join(self.serve_dir, ".incoming-" + W))), 2)

    def test_activate(self):
        image = self.put("POST", f"/images/{V}?action=activate", {}, PUBLISHER).json()
        self.assertEqual(image["state"], "active")
        self.assertRegex(image["published_at"], "^20[0-9-]+T[0-9:.]+Z$")
        self.assertEqual(len(self.put("GET", "/images").json()), 2)
        self.assertEqual(self.put("GET", f"/images/{V}/file").body, DATA)

    def test_disable_and_enable(self):
        for uuid, state in ((U, "active"), (W, "unactivated")):
            for action, disabled in (("disable", True), ("disable", True), ("enable", False),
                                     ("enable", False)):
                image = self.put("POST", f"/images/{uuid}?action={action}").json()
                self.assertEqual(image["disabled"], disabled)
                self.assertEqual(image["state"], "disabled" if disabled and uuid == U else state)

    def test_update(self):
        answer = self.put("POST", f"/images/{U}?action=update",
                          {"name": "new", "description": "x", "tags": {"a": 1}})
        self.assertEqual((answer.json()["name"], answer.json()["tags"]), ("new", {"a": 1}))
        again = self.put("POST", f"/images/{U}?action=update", {"tags": None},
                         If_Match=answer.headers["etag"])
        self.assertNotIn("tags", again.json())
        self.assertNotEqual(again.headers["etag"], answer.headers["etag"])

    def test_acl(self):
        write_image(self.serve_dir, uuid_of(5), DATA)         # v1
        for uuid in (U, uuid_of(5), W):
            for query, body, acl in (("", [ACCOUNT], [ACCOUNT]), ("", [], [ACCOUNT]),
                                     ("?action=add", [ACCOUNT, V], [ACCOUNT, V]),
                                     ("?action=remove", [ACCOUNT, W], [V]),
                                     ("?action=remove", [V], None)):
                answer = self.put("POST", f"/images/{uuid}/acl{query}", body or b"[]")
                self.assertEqual(answer.json().get("acl"), acl)

    def test_icon(self):
        for kind, data in (("image/png", b"one"), ("image/gif", b"two"), ("image/jpeg", b"3")):
            answer = self.put("PUT", f"/images/{U}/icon?sha1={hashlib.sha1(data).hexdigest()}",
                              data, Content_Type=kind)
            self.assertIs(answer.json()["icon"], True)
            icon = self.put("GET", f"/images/{U}/icon")
            self.assertEqual((icon.body, icon.headers["content-type"]), (data, kind))
        self.assertNotIn("icon", self.put("DELETE", f"/images/{U}/icon").json())
        self.expect("again", self.put("DELETE", f"/images/{U}/icon"), 404, "ResourceNotFound")

    def test_delete(self):
        for uuid in (U, V, W):
            answer = self.put("DELETE", "/images/" + uuid)
            self.assertEqual((answer.status, answer.body), (204, b""))
            self.assertEqual(self.put("GET", "/images/" + uuid).status, 404)
        self.assertEqual(self.names(), [])

    def test_publish_in_one(self):
        target = ("/images?action=publish&name=my%20web&version=4.10&description=caf%C3%A9"
                  "&tags={%22a%22:1}&homepage=http://x")
        answer = self.put("POST", target, DATA, PUBLISHER)
        image = self.expect("publish", answer, 200).json()
        self.assertEqual({name: image[name] for name in ("name", "version", "description", "tags",
                                                         "homepage", "state", "owner")},
                         {"name": "my web", "version": "4.10", "description": "caf\u00e9",
                          "tags": {"a": 1}, "homepage": "http://x", "state": "active",
                          "owner": NOBODY})
        self.assertEqual((image["type"], image["os"], image["files"][0]["sha1"]),
                         ("zone-dataset", "smartos", SHA1))
        self.assertEqual(self.put("GET", f"/datasets/{image['uuid']}").json()["name"], "my web")

    def test_publish_in_one_of_a_private_image(self):
        image = self.put("POST", "/images?action=publish&name=a&version=1&public=false"
                         f"&acl=[%22{ACCOUNT}%22]&owner={V}&uuid={GONE}", DATA).json()
        self.assertEqual((image["uuid"], image["public"], image["acl"], image["owner"]),
                         (GONE, False, [ACCOUNT], V))

    def test_an_image_that_builds_on_another(self):
        write_image(self.serve_dir, uuid_of(5), DATA)
        data = streams.pack(streams.stream(from_guid=streams.GUID, guid=7))
        target = f"/images?action=publish&name=a&version=1&uuid={GONE}&origin="
        self.expect("right", self.put("POST", target + uuid_of(5), data), 200)
        self.assertEqual(self.put("DELETE", f"/images/{GONE}").status, 204)
        data = streams.pack(streams.stream(from_guid=streams.GUID + 1, guid=7))
        self.expect("wrong", self.put("POST", target + uuid_of(5), data), 400, "Upload",
                    "does not build on")


    def test_the_answer_is_about_what_was_stored(self):
        """By this request: another publisher may have removed or replaced it by then."""
        for verb, target, body in (
                ("create", f"POST /images/{GONE}?action=import", manifest_of(GONE, name="ours")),
                ("create", "POST /images", manifest_of(V, uuid=None, files=None, name="ours")),
                ("add_file", f"PUT /images/{W}/file?compression=gzip", DATA),
                ("import_image", "POST /images?action=publish&name=ours&version=1", DATA)):
            for is_replaced in (False, True):
                real = getattr(imgserver.Publisher, verb)

                def changed(publisher, *arguments):
                    stored = real(publisher, *arguments)
                    publisher.delete(stored["uuid"])
                    if is_replaced:
                        write_v2(self.serve_dir, stored["uuid"], b"x", name="theirs")
                    return stored
                self.fill(W, name="ours")
                with mock.patch.object(imgserver.Publisher, verb, changed):
                    image = self.expect(target, self.put(*target.split(), body), 200).json()
                self.assertEqual((image["name"], [file["sha1"] for file in image["files"]]),
                                 ("ours", [] if verb == "create" else [SHA1]))
                shutil.rmtree(os.path.join(self.serve_dir, image["uuid"]), ignore_errors=True)


    def test_the_answer_is_what_a_get_shows(self):
        self.put("PUT", f"/images/{W}/icon", b"icon", Content_Type="image/png")
        v1 = imgserver.new_manifest(self.www.config, GONE, {"name": "old", "version": "1"})
        imgserver.Publisher(self.www.config).import_image(v1, io.BytesIO(DATA).read, False)
        for target, body in ((f"PUT /images/{W}/file?compression=gzip", DATA),
                             (f"PUT /images/{GONE}/file?compression=gzip", DATA),
                             (f"POST /images/{V}?action=import", manifest_of(V, acl=[])),
                             ("POST /images?action=publish&name=a&version=1&public=false", DATA)):
            answer = self.expect(target, self.put(*target.split(), body), 200)
            read = self.put("GET", f"/images/{answer.json()['uuid']}")
            self.assertEqual(answer.body, read.body)
            self.assertEqual(answer.headers["etag"], read.headers["etag"])


class AtOnce(PublishingCase):
    """Two changes of one image, of which one comes before the other has the lock."""

    def setUp(self):
        super().setUp()
        write_v2(self.serve_dir, U, DATA, channels=["release", "dev"])
        self.fill(V, DATA, channels=["release"])
        self.fill(W, channels=["release"])
        self.www = self.site(channels=CHANNELS, **RIGHTS)

    def both(self, first, second, **headers):
        """The answer to the second request; the first is made while that one waits for the lock.

        Each is (method, target, body).
        """
        real, waiting = imgserver.lock_directory, [first]

        def lock(*arguments):
            if waiting:
                self.assertLess(self.put(*waiting.pop()).status, 300)
            return real(*arguments)
        with mock.patch.object(imgserver, "lock_directory", lock):
            return self.put(*second, **headers)

    def image(self, uuid=U):
        return self.put("GET", f"/images/{uuid}?channel=*", Accept_Version="*")

    def test_none_is_lost(self):
        others = [uuid_of(number) for number in (71, 72, 73)]
        acl, channel = f"/images/{U}/acl", f"/images/{U}?action=channel-add"
        self.both(("POST", acl, others[:1]), ("POST", acl, others[1:2]))
        self.assertEqual(self.image().json()["acl"], others[:2])
        self.both(("POST", acl, others[2:]), ("POST", acl + "?action=remove", others[:1]))
        self.assertEqual(self.image().json()["acl"], others[1:])
        write_v2(self.serve_dir, U, DATA, channels=["release"])
        self.www = self.site(channels=[*CHANNELS, {"name": "test"}], **RIGHTS)
        self.both(("POST", channel, {"channel": "dev"}), ("POST", channel, {"channel": "test"}))
        self.assertEqual(self.image().json()["channels"], ["release", "dev", "test"])

    def test_delete_out_of_the_last_two_channels(self):
        answer = self.both(("DELETE", f"/images/{U}?channel=dev"),
                           ("DELETE", f"/images/{U}?channel=release"))
        self.assertEqual(answer.status, 204)
        self.assertNotIn(U, self.names())

    def test_if_match_is_checked_when_nobody_else_can_change_it(self):
        for number, (method, target, body) in enumerate((
                ("POST", f"/images/{U}?action=update", {"name": "x"}),
                ("POST", f"/images/{U}/acl", [ACCOUNT]),
                ("POST", f"/images/{U}?action=channel-add", {"channel": "dev"}),
                ("POST", f"/images/{U}?action=disable", b"{}"),
                ("POST", f"/images/{U}?action=enable", b"{}"),
                ("PUT", f"/images/{U}/icon", b"icon"), ("DELETE", f"/images/{U}/icon", b""),
                ("DELETE", f"/images/{U}", b""), ("POST", f"/images/{V}?action=activate", b"{}"),
                ("PUT", f"/images/{W}/file?compression=gzip", DATA))):
            write_v2(self.serve_dir, U, DATA, channels=["release"])
            uuid = target[8:44]
            etag = self.image(uuid).headers["etag"]
            change = "POST", f"/images/{uuid}?action=update", {"description": str(number)}
            answer = self.both(change, (method, target, body), If_Match=etag,
                               Content_Type="image/png")
            self.expect((method, target), answer, 412, "PreconditionFailed")
            now = self.image(uuid)
            self.assertEqual(now.json()["description"], str(number))
            if method != "PUT":
                self.expect((method, target), self.put(
                    method, target, body, If_Match=now.headers["etag"]),
                    404 if "icon" in target else 204 if method == "DELETE" else 200,
                    "ResourceNotFound" if "icon" in target else None)


class Channels(PublishingCase):

    def setUp(self):
        super().setUp()
        write_v2(self.serve_dir, U, DATA, channels=["release", "dev", "old"])
        self.www = self.site(channels=CHANNELS, **RIGHTS)

    def test_channels_of_new_images(self):
        failed = "ValidationFailed"
        for configured, query, given, wanted in (
                (CHANNELS, "", None, ["release"]), (CHANNELS, "&channel=dev", None, ["dev"]),
                (CHANNELS, "", ["dev"], ["dev"]), (CHANNELS, "", [], ["release"]),
                (CHANNELS, "", ["dev", "release"], ["dev", "release"]),
                (CHANNELS, "&channel=dev", ["release"], ["release"]),
                (CHANNELS, "", ["elsewhere"], failed), (CHANNELS, "&channel=x", None, failed),
                (CHANNELS, "&channel=x", ["dev"], failed), (CHANNELS, "&channel=*", None, failed),
                (NO_DEFAULT, "", None, failed), (NO_DEFAULT, "", ["dev"], ["dev"]),
                (NO_DEFAULT, "&channel=dev", None, ["dev"]),
                ([], "&channel=dev", ["dev"], None)):
            with self.subTest(query=query, given=given, configured=configured):
                site = self.site(channels=configured, **RIGHTS)
                for target, manifest in (
                        (f"/images/{GONE}?action=import" + query, manifest_of(GONE)),
                        ("/images?" + query[1:], manifest_of(GONE, uuid=None, files=None))):
                    answer = self.put("POST", target, {**manifest, **(
                        {} if given is None else {"channels": given})}, site=site,
                        Accept_Version="*")
                    if wanted is failed:
                        self.assertError(answer, 422, failed)
                    else:
                        self.assertEqual(answer.json().get("channels"), wanted, answer)

    def test_imgadm_publishes_to_a_channel_that_it_never_names(self):
        for configured in (CHANNELS, NO_DEFAULT):
            site = self.site(channels=configured, **RIGHTS)
            for method, target, body in (
                    ("POST", f"/images/{GONE}?action=import", manifest_of(GONE, channels=["dev"])),
                    ("PUT", f"/images/{GONE}/file?compression=gzip", DATA),
                    ("POST", f"/images/{GONE}?action=activate", {})):
                self.expect(target, self.put(method, target, body, PUBLISHER, site), 200)
            self.assertEqual(self.put("GET", f"/images/{GONE}?channel=dev", site=site).status, 200)
            self.assertEqual(self.put("DELETE", f"/images/{GONE}?channel=dev", site=site).status,
                             204)
            for method, target, body in (
                    ("POST", f"/images/{GONE}?action=import", manifest_of(GONE, channels=["dev"])),
                    ("DELETE", f"/images/{GONE}", b"")):
                self.expect(target, self.put(method, target, body, PUBLISHER, site),
                            200 if body else 204)

    def test_an_image_of_another_channel_is_not_found(self):
        write_v2(self.serve_dir, GONE, DATA, channels=["dev"])
        for method, target, body in (
                ("POST", f"/images/{GONE}?action=disable", b""),
                ("DELETE", f"/images/{GONE}", b""),
                ("POST", f"/images/{GONE}/acl", b"[]"),
                ("POST", f"/images/{GONE}?action=update", {"name": "x"}),
                ("DELETE", f"/images/{GONE}/icon", b"")):
            self.expect(target, self.put(method, target, body), 404, "ResourceNotFound",
                        "image not found")
            for channel in ("*", "x"):
                where = target + ("&" if "?" in target else "?") + "channel=" + channel
                self.expect(where, self.put(method, where, body), 422, "ValidationFailed",
                            f"unknown channel: {channel}", [("channel", "Invalid")])
        target = f"/images/{GONE}?action=disable&channel=dev"
        self.assertEqual(self.put("POST", target).status, 200)

    def test_channel_add(self):
        write_v2(self.serve_dir, GONE, DATA, channels=["dev"])
        target = f"/images/{GONE}?action=channel-add&channel=dev"
        for name in ("release", "release", "dev"):
            answer = self.put("POST", target, {"channel": name}, Accept_Version="*")
            self.assertEqual(answer.json()["channels"], ["dev", "release"])
        for name in ("x", "*", None, 5, ["dev"], ""):
            self.expect(name, self.put("POST", target, {"channel": name}), 422,
                        "ValidationFailed", "unknown channel", [("channel", "Invalid")])

    def test_delete(self):
        self.assertEqual(self.put("DELETE", f"/images/{U}?channel=dev").status, 204)
        self.assertEqual(self.put("GET", f"/images/{U}", Accept_Version="*").json()["channels"],
                         ["release"])
        self.assertEqual(self.put("GET", f"/images/{U}?channel=dev").status, 404)
        self.assertEqual(self.put("DELETE", f"/images/{U}").status, 204)
        self.assertNotIn(U, self.names())

    def test_delete_out_of_all(self):
        self.assertEqual(self.put("DELETE", f"/images/{U}?force_all_channels=true").status, 204)
        self.assertNotIn(U, self.names())


# -- on sockets ----------------------------------------------------------------------------

def head(method, target, length=None, host="images.example.com", **fields):
    """The head of a request; length None: its body is chunked."""
    fields = {"Host": host, **fields}
    fields.update({"Transfer_Encoding": "chunked"} if length is None
                  else {"Content_Length": length})
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([f"{method} {target} HTTP/1.1", *lines, "", ""]).encode()


def chunked(data, size=100_000):
    """`data` in the chunked coding."""
    return b"".join(b"%x\r\n%b\r\n" % (len(data[at:at + size]), data[at:at + size])
                    for at in range(0, len(data), size)) + b"0\r\n\r\n"


class Rejected(Exception):
    """imgadm would print this and exit 1."""


class ImgadmPublish:
    """`imgadm publish -m M -f F URL` of imgadm 3.9.5, as it goes over the wire."""

    def __init__(self, connect, fields=()):
        self.connect, self.fields, self.asked = connect, dict(fields), []

    def ask(self, method, target, body, md5=True, length=None):
        """One request on a connection of its own; the answer's JSON, {} where it is empty."""
        self.asked.append(f"{method} {target}")
        fields = {"accept_version": "*", "x_request_id": GONE, "accept": "application/json",
                  "content_type": "application/json", "user_agent": "imgadm/3.9.5 (node/20)",
                  "date": "Thu, 26 Nov 2026 01:00:00 GMT", "Connection": "close", **self.fields}
        if md5 and body:
            fields["content_md5"] = md5_of(body)
        with self.connect() as connection:
            sender = threading.Thread(target=self.send, args=(connection, head(
                method, target, len(body) if length is None else length, **fields) + body))
            sender.start()
            answer = connection.answer(method)
            sender.join(PATIENCE)
            if answer is None:
                raise Rejected("socket hang up")
            assert connection.rest() == b""
        value = answer.json() if answer.body else {}
        if answer.status >= 400:
            raise Rejected(f"{value['code']}: {value['message']}")
        return value

    @staticmethod
    def send(connection, data):
        try:
            connection.send(data)
        except OSError:
            pass                          # an answer has come before; it is read

    def publish(self, manifest, data, last="activate"):
        """Raises Rejected.  last: the step after which imgadm is interrupted."""
        uuid, file = manifest["uuid"], manifest["files"][0]
        image = self.ask("POST", f"/images/{uuid}?action=import", dump(manifest))
        assert (image["uuid"], image["state"]) == (uuid, "unactivated"), image
        assert (image["name"], image["version"]) == (manifest["name"], manifest["version"])
        if last == "import":
            return
        try:
            query = f"compression={file['compression']}&sha1={file['sha1']}"
            found = self.ask("PUT", f"/images/{uuid}/file?{query}", data, False, file["size"])
            for key in ("sha1", "size"):
                if found["files"][0][key] != file[key]:
                    raise Rejected(f"UploadError: {key} expected to be {file[key]}")
            if last == "file":
                return
            self.ask("POST", f"/images/{uuid}?action=activate", b"{}")
        except Rejected:
            self.ask("DELETE", "/images/" + uuid, b"")
            raise


class Clients:
    """What the clients do, over any way to the server: self.connect(), self.serve_dir."""

    fields = ()                           # that every request needs, such as credentials
    host = "images.example.com"

    def imgadm(self):
        return ImgadmPublish(self.connect, self.fields)

    def stored(self):
        return sorted(os.listdir(self.serve_dir))

    def assertActive(self, uuid, data):
        with self.connect() as connection:
            answer = connection.request(f"/images/{uuid}")
            self.assertEqual((answer.status, answer.json()["state"]), (200, "active"))
            self.assertEqual(connection.request(f"/images/{uuid}/file").body, data)
            self.assertIn(uuid, [image["uuid"] for image in connection.request("/images").json()])
        result = run_program("--dir", self.serve_dir, "check", "-q", uuid)
        self.assertEqual((result.returncode, result.stdout), (0, b""))

    def test_imgadm_publish(self):
        self.imgadm().publish(manifest_of(GONE), DATA)
        self.assertActive(GONE, DATA)
        with self.assertRaisesRegex(Rejected, "ImageUuidAlreadyExists"):
            self.imgadm().publish(manifest_of(GONE), DATA)
        self.assertActive(GONE, DATA)

    def test_imgadm_rolls_back(self):
        for data in (b"x" * len(DATA), DATA[:-1] + b"x"):
            imgadm = self.imgadm()
            with self.assertRaisesRegex(Rejected, "^Upload: image refused: "):
                imgadm.publish(manifest_of(GONE), data)
            self.assertEqual(imgadm.asked[-1], f"DELETE /images/{GONE}")
            self.assertNotIn(GONE, "".join(self.stored()))
        self.imgadm().publish(manifest_of(GONE), DATA)
        self.assertActive(GONE, DATA)

    def test_imgadm_publishes_over_what_it_left(self):
        other = streams.pack(streams.stream(payload=b"first"))
        first = manifest_of(GONE, name="first", files=[
            {"size": len(other), "compression": "gzip", "sha1": hashlib.sha1(other).hexdigest()}])
        for last in ("import", "file"):
            self.imgadm().publish(first, other, last)
            self.assertIn(".incoming-" + GONE, self.stored())
        self.imgadm().publish(manifest_of(GONE), DATA)
        self.assertActive(GONE, DATA)
        self.assertEqual([name for name in self.stored() if GONE in name], [GONE])

    def test_a_refusal_is_read_while_the_client_sends(self):
        data = streams.pack(streams.stream(payload=b"x" * (8 << 20)), "none")
        manifest = manifest_of(GONE, files=[{"size": len(data), "compression": "none",
                                             "sha1": "0" * 40}])
        with self.assertRaisesRegex(Rejected, "its sha1 is"):
            self.imgadm().publish(manifest, data)
        for target, code in ((f"/images/{uuid_of(8)}/file?compression=none", "ResourceNotFound"),
                             (f"/images/{uuid_of(8)}/file", "InvalidParameter")):
            with self.assertRaisesRegex(Rejected, code):
                self.imgadm().ask("PUT", target, data)

    def test_another_upload_holds_it(self):
        self.imgadm().publish(manifest_of(GONE), DATA, "import")
        with self.connect() as connection:
            connection.send(head("PUT", f"/images/{GONE}/file?compression=gzip", len(DATA),
                                 **dict(self.fields)) + DATA[:100])
            wait_for(lambda: any(name.startswith(".file") for name in os.listdir(
                os.path.join(self.serve_dir, ".incoming-" + GONE))), "the upload")
            for step, code in (
                    (lambda: self.imgadm().publish(manifest_of(GONE), DATA),
                     "ImageUuidAlreadyExists"),
                    (lambda: self.imgadm().ask("PUT", f"/images/{GONE}/file?compression=gzip",
                                               DATA, False), "ImageUuidAlreadyExists"),
                    (lambda: self.imgadm().ask("POST", f"/images/{GONE}?action=activate", b"{}"),
                     "NoActivationNoFile")):
                with self.assertRaisesRegex(Rejected, code):
                    step()
            connection.send(DATA[100:])
            self.assertEqual(connection.answer().json()["files"][0]["sha1"], SHA1)
        self.imgadm().ask("POST", f"/images/{GONE}?action=activate", b"{}")
        self.assertActive(GONE, DATA)

    def test_a_client_that_goes_leaves_what_was_there(self):
        self.imgadm().publish(manifest_of(GONE), DATA, "file")
        path = os.path.join(self.serve_dir, ".incoming-" + GONE)
        before = sorted(os.listdir(path))
        for beginning in (head("PUT", f"/images/{GONE}/file?compression=gzip", len(DATA),
                               **dict(self.fields)) + DATA[:100],
                          head("PUT", f"/images/{GONE}/file?compression=gzip",
                               **dict(self.fields)) + b"20\r\n" + DATA[:32] + b"\r\n"):
            with self.connect() as connection:
                connection.send(beginning)
                wait_for(lambda: sorted(os.listdir(path)) != before, "the upload")
            wait_for(lambda: sorted(os.listdir(path)) == before, "its end")
        self.imgadm().ask("POST", f"/images/{GONE}?action=activate", b"{}")
        self.assertActive(GONE, DATA)

    def test_chunked(self):
        self.imgadm().publish(manifest_of(GONE), DATA, "import")
        with self.connect() as connection:
            connection.send(head("PUT", f"/images/{GONE}/file?compression=gzip",
                                 **dict(self.fields)) + chunked(DATA, 50))
            self.assertEqual(connection.answer().json()["files"][0]["sha1"], SHA1)
            connection.send(head("POST", "/images?action=publish&name=a&version=1",
                                 **dict(self.fields)) + chunked(DATA))
            image = connection.answer().json()
        self.assertActive(image["uuid"], DATA)

    def on_one(self, connection, method, target, body=b"", status=200, **fields):
        """A request on a connection that goes on; the answer's JSON."""
        connection.send(head(method, target, len(body), **dict(self.fields), **fields) + body)
        answer = connection.answer(method)
        self.assertEqual(answer.status, status, answer)
        self.assertNotEqual(answer.headers.get("connection"), "close", f"{method} {target}")
        return answer.json() if answer.body else None

    def test_imgapi_cli(self):
        """sdc-imgapi-cli: node's keep-alive agent, all on one connection."""
        with self.connect() as connection:
            def ask(method, target, body=b"", **fields):
                return self.on_one(connection, method, target, body, **fields)
            uuid = ask("POST", "/images", dump(manifest_of(GONE, uuid=None, files=None)),
                       Accept_Version="~2")["uuid"]
            ask("PUT", f"/images/{uuid}/file?compression=gzip&sha1={SHA1}&storage=local", DATA,
                Content_Type="application/octet-stream")
            ask("PUT", f"/images/{uuid}/icon", b"icon", Content_Type="image/png")
            self.assertEqual(ask("POST", f"/images/{uuid}?action=activate", b"{}")["state"],
                             "active")
            ask("POST", f"/images/{uuid}?action=update", b'{"description": "x"}')
            ask("POST", f"/images/{uuid}?action=disable", b"{}")
            ask("POST", f"/images/{uuid}?action=enable")
            ask("POST", f"/images/{uuid}/acl?action=add", dump([ACCOUNT]))
            ask("POST", f"/images/{uuid}/acl?action=remove", dump([ACCOUNT]))
            ask("DELETE", f"/images/{uuid}/icon")
            self.assertActive(uuid, DATA)
            ask("DELETE", f"/images/{uuid}", status=204)
            ask("GET", f"/images/{uuid}", status=404)

    def test_tritonadm(self):
        """tritonadm image import: state in the manifest, no sha1, octet-stream."""
        manifest = manifest_of(GONE, state="active", owner=NOBODY, disabled=False, public=True,
                               type="zvol", os="linux", published_at="2026-01-01T00:00:00Z",
                               tags={"a:b": "c"}, files=[], requirements={
                                   "brand": "bhyve", "bootrom": "uefi", "ssh_key": True})
        data = streams.pack(streams.stream(kind=streams.ZVOL))
        with self.connect() as connection:
            for method, target, body in (
                    ("POST", f"/images/{GONE}?action=import", dump(manifest)),
                    ("PUT", f"/images/{GONE}/file?compression=gzip", data),
                    ("POST", f"/images/{GONE}?action=activate", b"")):
                image = self.on_one(connection, method, target, body)
                self.assertLessEqual(set(SHOWN), set(image))
        self.assertEqual(image["state"], "active")
        self.assertEqual(image["published_at"], "2026-01-01T00:00:00Z")

    def test_100_continue(self):
        target = f"/images/{GONE}/file?compression=gzip"
        fields = {"Expect": "100-continue", **dict(self.fields)}
        self.imgadm().publish(manifest_of(GONE), DATA, "import")
        with self.connect() as connection:
            connection.send(head("PUT", target, len(DATA), **fields))
            wait_for(lambda: connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n", "100")
            connection.send(DATA)
            self.assertEqual(connection.answer().status, 200)


class OverTcp(Clients, ServerCase):

    unix = False
    config = HERE
    prelude = ""

    def setUp(self):
        super().setUp()
        self.server = self.serve(config=self.config, unix=self.unix, prelude=self.prelude)

    def connect(self):
        return self.server.connect()


class OverUnix(OverTcp):

    unix = True


class NginxPublishing(Clients, NginxCase):
    """The snippet as it stands, with a file of passwords."""

    config = {"manage_from": ["unix"]}
    fields = (("Authorization", "Basic " + base64.b64encode(b"joe:secret").decode()),)

    def start_nginx(self, text, *replaced):
        path = os.path.join(self.directory, "users")
        with open(path, "w") as file:
            file.write("joe:{PLAIN}secret\n")
        return super().start_nginx(text, ("/etc/nginx/imgserver.users", path), *replaced)

    def assertRefused(self, answer, status):
        self.assertEqual(answer.status, status, answer)
        self.assertEqual(os.listdir(self.serve_dir), [U])

    def test_without_a_password_nothing_is_written(self):
        wrong = "Basic " + base64.b64encode(b"joe:wrong").decode()
        for method, target in (("POST", f"/images/{U}?action=disable"), ("PUT", "/images"),
                               ("DELETE", f"/images/{U}"), ("PATCH", f"/images/{U}"),
                               ("POST", f"http://127.0.0.1/images/{U}?action=disable")):
            for fields in ({}, {"Authorization": wrong}, {"X-Real-IP": "127.0.0.1"}):
                with self.subTest(f"{method} {target} {fields}"), self.connect() as connection:
                    self.assertRefused(connection.request(target, method, {
                        "Content-Length": "0", **fields}), 401)
        with self.connect() as connection:
            for method in ("GET", "HEAD", "OPTIONS"):
                self.assertIn(connection.request(f"/images/{U}", method).status, (200, 204))

    def test_the_password_is_for_nginx_alone(self):
        self.imgadm().publish(manifest_of(GONE), DATA)
        with self.connect() as connection:
            self.assertEqual(connection.request(f"/images/{GONE}", headers={
                "Authorization": "Basic eHg6eHg="}).status, 200)

    @check_only("1 GiB through nginx")
    def test_a_large_upload(self):
        size = 1 << 30
        begin = streams.begin(streams.FILE_SYSTEM, streams.GUID, 0, "<")
        piece = streams.write(bytes(1 << 20), "<", 7)
        count = size // len(piece) + 1
        end = streams.end(streams.GUID, "<")
        length = len(begin) + count * len(piece) + len(end)
        with self.connect() as connection:
            connection.send(head("POST", "/images?action=publish&name=a&version=1", length,
                                 **dict(self.fields)) + begin)
            for _ in range(count):
                connection.send(piece)
            connection.send(end)
            image = connection.answer().json()
        self.assertEqual((image["state"], image["files"][0]["size"]), ("active", length))
        self.assertLess(self.server.memory("VmHWM"), 150 << 20)


class NginxBuffering(NginxPublishing):
    """With request buffering nginx takes the whole body first."""

    changes = (("proxy_request_buffering off;", ""), )
    test_another_upload_holds_it = test_a_client_that_goes_leaves_what_was_there = None
    test_a_large_upload = None


class Uploads(ServerCase):
    """Their number, their end by a signal, and the log."""

    seconds = 4

    def begin(self, server, uuid, length=len(DATA), **fields):
        """A connection on which an upload has begun."""
        ImgadmPublish(server.connect).publish(manifest_of(uuid), DATA, "import")
        connection = server.connect()
        self.addCleanup(connection.close)
        connection.send(head("PUT", f"/images/{uuid}/file?compression=gzip", length, **fields)
                        + DATA[:100])
        wait_for(lambda: self.is_partial(uuid), "the upload")
        return connection

    def is_partial(self, uuid):
        return any(name.startswith(".file") for name in os.listdir(
            os.path.join(self.serve_dir, ".incoming-" + uuid)))

    def test_imgadm_says_which_right_is_missing(self):
        server = self.serve(config={"manage_from": ["192.0.2.1"]})
        with self.assertRaisesRegex(
                Rejected, "^OperatorOnly: address 127.0.0.1 lacks the right to publish$"):
            ImgadmPublish(server.connect).publish(manifest_of(GONE), DATA)

    def test_no_more_xz_than_memory(self):
        server = self.serve(config=HERE, prelude="imgserver.XZ_AT_ONCE = 2")
        data = streams.pack(streams.stream(), "xz")

        def put(uuid, kind, sent):
            connection = server.connect()
            self.addCleanup(connection.close)
            connection.send(head("PUT", f"/images/{uuid}/file?compression={kind}", len(sent))
                            + sent[:100])
            return connection
        for number in range(1, 6):
            ImgadmPublish(server.connect).publish(manifest_of(uuid_of(number)), DATA, "import")
        first, second = (put(uuid_of(number), "xz", data) for number in (1, 2))
        wait_for(lambda: self.is_partial(uuid_of(1)) and self.is_partial(uuid_of(2)))
        answer = put(uuid_of(3), "gzip", data).answer()       # whatever the query says
        self.assertError(answer, 503, "ServiceUnavailableError")
        self.assertEqual(answer.headers["retry-after"], "10")
        other = put(uuid_of(4), "gzip", DATA)
        other.send(DATA[100:])
        self.assertEqual(other.answer().status, 200)
        first.send(data[100:])
        self.assertEqual(first.answer().status, 200)
        second.close()
        wait_for(lambda: not self.is_partial(uuid_of(2)), "its end")
        for number in (3, 5):
            connection = put(uuid_of(number), "xz", data)
            connection.send(data[100:])
            self.assertEqual(connection.answer().status, 200)

    def test_no_more_than_so_many(self):
        server = self.serve(config=HERE, prelude="imgserver.UPLOADS = 3")
        open_ones = [self.begin(server, uuid_of(number)) for number in (1, 2, 3)]
        ImgadmPublish(server.connect).publish(manifest_of(GONE), DATA, "import")
        for target in (f"/images/{GONE}/file?compression=gzip",
                       "/images?action=publish&name=a&version=1"):
            with server.connect() as connection:
                connection.send(head("POST" if "publish" in target else "PUT", target, len(DATA),
                                     Expect="100-continue"))
                answer = connection.answer()          # no 100 Continue before it
                self.assertError(answer, 503, "ServiceUnavailableError")
                self.assertEqual(answer.headers["retry-after"], "10")
        open_ones[0].send(DATA[100:])
        self.assertEqual(open_ones[0].answer().status, 200)
        open_ones[1].close()
        wait_for(lambda: not self.is_partial(uuid_of(2)), "its end")
        self.assertEqual(sorted(os.listdir(self.serve_dir)), sorted(
            ".incoming-" + uuid for uuid in (uuid_of(1), uuid_of(2), uuid_of(3), GONE)))
        for uuid in (GONE, uuid_of(5)):
            ImgadmPublish(server.connect).publish(manifest_of(uuid), DATA)

    def test_a_client_that_goes_is_one_line(self):
        server = self.serve(config=HERE)
        for fields in ({}, {"Connection": "close"}):
            before = len(server.log())
            self.begin(server, U, **fields).close()
            line = rf'info 127.0.0.1 "PUT /images/{U}/file\?compression=gzip HTTP/1.1" 499 0 .*'
            wait_for(lambda: re.search(line + r"went away.*100 bytes came", server.log()[before:]),
                     "the line")
            self.assertEqual(server.log()[before:].count("PUT"), 1)
        self.assertFalse(self.is_partial(U))

    def test_a_client_that_stalls(self):
        server = self.serve(config={**HERE, "stall_timeout": 0.3})
        connection = self.begin(server, U)
        self.assertError(connection.answer(), 408, "RequestTimeout")
        self.assertFalse(self.is_partial(U))

    def test_an_upload_is_waited_for_after_sigterm(self):
        server = self.serve(config=HERE)
        connection = self.begin(server, U)
        server.send_signal(signal.SIGTERM)
        server.wait_log("finishing 1 answers")
        connection.send(DATA[100:])
        self.assertEqual(connection.answer().json()["files"][0]["sha1"], SHA1)
        self.assertEqual(server.process.wait(PATIENCE), 0)

    def test_an_upload_is_cut_after_drain_time(self):
        server = self.serve(config={**HERE, "drain_time": 0.3})
        self.begin(server, U)
        self.assertEqual(server.stop(), 0)
        self.assertEqual(os.listdir(os.path.join(self.serve_dir, ".incoming-" + U)),
                         ["manifest.json"])
        again = self.serve(config=HERE)
        ImgadmPublish(again.connect).publish(manifest_of(U), DATA)

    def test_an_image_that_is_deleted_meanwhile(self):
        server = self.serve(config=HERE)
        connection = self.begin(server, U)
        self.assertEqual(server.get(f"/images/{U}", {"Content-Length": 0}, "DELETE").status, 204)
        ImgadmPublish(server.connect).publish(manifest_of(U, name="second"), DATA, "import")
        connection.send(DATA[100:])
        self.assertError(connection.answer(), 404, "ResourceNotFound")
        self.assertEqual(server.get(f"/images/{U}").json()["files"], [])
        self.assertEqual(os.listdir(os.path.join(self.serve_dir, ".incoming-" + U)),
                         ["manifest.json"])

    def test_an_image_that_is_deleted_while_it_is_downloaded(self):
        data = os.urandom(16 << 20)
        write_v2(self.serve_dir, U, data)
        server = self.serve(config=HERE)
        with server.connect() as connection:
            connection.send(f"GET /images/{U}/file HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            connection.buffer = connection.recv(1000)
            ImgadmPublish(server.connect).ask("DELETE", f"/images/{U}", b"")
            self.assertEqual(os.listdir(self.serve_dir), [])
            self.assertEqual(connection.answer().body, data)

    def test_malformed_chunks_store_nothing(self):
        server = self.serve(config=HERE)
        ImgadmPublish(server.connect).publish(manifest_of(U), DATA, "file")
        target = f"/images/{U}/file?compression=gzip"
        for body in (b"x\r\n", b"5\r\nhello!\r\n0\r\n\r\n", b"5;a\r\nhello\r\n0\r\n\r\n",
                     chunked(DATA)[:-5] + b"0\r\nX: y\r\n\r\n", b"5\nhello\n0\n\n"):
            with server.connect() as connection:
                connection.send(head("PUT", target) + body)
                self.assertError(connection.answer(), 400)
                self.assertEqual(connection.rest(), b"")
        with server.connect() as connection:
            connection.send(head("PUT", target, 5, Transfer_Encoding="chunked",
                                 Content_Length="5")[:-2]
                            + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(DATA))
            self.assertError(connection.answer(), 400)
        self.assertEqual(server.get(f"/images/{U}/file").body, DATA)

    def test_check_names_leftovers(self):
        server = self.serve(config=HERE)
        ImgadmPublish(server.connect).publish(manifest_of(U), DATA, "import")
        ImgadmPublish(server.connect).publish(manifest_of(V), DATA, "file")
        old = imgserver.time.time() - imgserver.STALE - 60
        for uuid in (U, V):
            path = os.path.join(self.serve_dir, ".incoming-" + uuid)
            for name in (*os.listdir(path), "."):
                os.utime(os.path.join(path, name), (old, old))
        for words, left in (((), [U, V]), (("--clean",), [V])):
            lines = run_program("--dir", self.serve_dir, "check", *words).stdout.decode()
            self.assertRegex(lines, rf"(?m)^{U}.*: is not whole")
            self.assertRegex(lines, rf"(?m)^{V} .*: waits to be activated, last change 24 hours "
                                    rf"ago: imgserver\.py activate {V}$")
            self.assertEqual(sorted(os.listdir(self.serve_dir)),
                             [".incoming-" + uuid for uuid in left])


class Log(ServerCase):
    """A request that was to change something, and was refused: the line says why."""

    def line(self, server, method, target, body=b"", **fields):
        """The log line of a request that is answered by an error."""
        before = len(server.log())
        with server.connect() as connection:
            connection.send(head(method, target, len(body), Connection="close", **fields) + body)
            self.assertGreaterEqual(connection.answer(method).status, 400)
        line = re.compile(r'(.*(" | HTTP/1\.1 )[45][0-9][0-9] .*)\n')
        return wait_for(lambda: line.search(server.log()[before:]), "a log line")[1]

    def test_the_reason(self):
        server = self.serve(config=HERE, prelude="imgserver.LOG_DELAY = 0")
        ImgadmPublish(server.connect).publish(manifest_of(U), DATA, "import")
        for method, target, body, reason in (
                ("PUT", f"/images/{U}/file?compression=gzip", DATA[:-9], r"400 .*Upload: image "
                 "refused: .*"),
                ("POST", "/images", b'{"v": 2}', "422 .*ValidationFailed: .*name, version.*"),
                ("DELETE", f"/images/{V}", b"", "404 .*ResourceNotFound: .*"),
                ("POST", f"/images/{U}?action=%1b[2J", b"", r"422 .*InvalidParameter: "
                 r"\\\"\\x1b\[2J\\\" is .*"),
                ("POST", f"/images?channel={'x' * 5000}&action=" + "y" * 2000, b"",
                 r"422 .*InvalidParameter: \\\"y{970,}\.\.\."),
                ("PATCH", "/images/%zz", b"", r"400 .*BadRequestError: URI malformed\)"),
                ("POST", f"http://joe:secret@h/images/{U}/jobs", b"",
                 f"501 .*POST http://h/images/{U}/jobs is not available .*")):
            with self.subTest(f"{method} {target[:60]}"):
                line = self.line(server, method, target, body, Authorization="Basic c2VjcmV0")
                self.assertRegex(line, rf'^[^"]*"{method} [^"]*" {reason}$')
                self.assertNotIn("secret", line)
                self.assertLess(len(line), 3000)
        for target in (f"/images/{V}", "/images?limit=x"):
            line = self.line(server, "GET", target)
            self.assertTrue(line.endswith('ms - ""'), line)

    def test_as_json(self):
        server = self.serve(config={**HERE, "logformat": "json"},
                            prelude="imgserver.LOG_DELAY = 0")
        line = self.line(server, "POST", f"/images/{U}?action=enable", b"{}")
        value = json.loads(line)
        self.assertIsNone(value["image"])
        self.assertEqual(value["msg"], f"POST /images/{U}?action=enable HTTP/1.1 404 "
                                       f"(ResourceNotFound: image {U} not found)")


class TwoServers(ServerCase):
    """Over one directory, with clients of both."""

    seconds = 4

    def setUp(self):
        super().setUp()
        self.servers = [self.serve(config=HERE), self.serve(config=HERE, unix=True)]

    def test_each_sees_what_is_done_through_the_other(self):
        for one, other in (self.servers, self.servers[::-1]):
            for server in self.servers:   # both have read the directory
                self.assertEqual(server.get("/images").json(), [])
            uploader = ImgadmPublish(one.connect)
            uploader.publish(manifest_of(U), DATA, "import")
            ImgadmPublish(other.connect).ask("PUT", f"/images/{U}/file?compression=gzip", DATA)
            uploader.ask("POST", f"/images/{U}?action=activate", b"{}")
            for server in self.servers:
                self.assertEqual([image["uuid"] for image in server.get("/images").json()], [U])
            uploader.ask("POST", f"/images/{U}?action=update", b'{"description": "new"}')
            self.assertEqual(other.get(f"/images/{U}").json()["description"], "new")
            wait_for(lambda: other.get("/images").json()[0]["description"] == "new", "the change")
            ImgadmPublish(other.connect).ask("DELETE", f"/images/{U}", b"")
            for server in self.servers:
                self.assertEqual(server.get("/images").json(), [])
                self.assertEqual(server.get(f"/images/{U}").status, 404)

    def test_the_same_image_through_both_at_once(self):
        done, rejected = [], []

        def publish(number):
            for _ in range(8):
                data = streams.pack(streams.stream(payload=b"%d" % number))
                file = {"size": len(data), "compression": "gzip",
                        "sha1": hashlib.sha1(data).hexdigest()}
                imgadm = ImgadmPublish(self.servers[number % 2].connect)
                try:
                    imgadm.publish(manifest_of(U, files=[file]), data)
                    done.append(number)
                    imgadm.ask("DELETE", f"/images/{U}", b"")
                except Rejected as error:
                    rejected.append(str(error))
        threads = [threading.Thread(target=publish, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE * 2)
        # None of them may have come through: each rolls the others back, as imgadm does.
        self.assertGreaterEqual(len(done) + len(rejected), 32)
        codes = {error.partition(":")[0] for error in rejected}
        self.assertLessEqual(codes, {"ImageUuidAlreadyExists", "ResourceNotFound", "Upload",
                                     "NoActivationNoFile", "ImageAlreadyActivated",
                                     "ImageFilesImmutable"}, rejected)
        ImgadmPublish(self.servers[0].connect).publish(manifest_of(V), DATA)
        for server in self.servers:
            self.assertIn(V, [image["uuid"] for image in server.get("/images").json()])
        status = run_program("--dir", self.serve_dir, "check", "-q")
        self.assertEqual(status.returncode, 0, status.stdout)


class Curl(ServerCase):
    """The commands of the README as they stand, with real curl and a `zfs` of ours."""

    def setUp(self):
        super().setUp()
        need("curl")
        self.server = self.serve(config=HERE)
        with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
            section = re.search(r"### Over HTTP\n(.*?)\n### ", file.read(), re.DOTALL)[1]
        text = "\n".join(line[4:] for line in section.split("\n") if line.startswith("    "))
        self.commands = [each for each in text.replace("\\\n", "").split("\n")
                         if "curl " in each]
        for name, data in (("stream", streams.stream()), ("web.zfs.gz", DATA),
                           ("web.json", dump(manifest_of(U)))):
            with open(os.path.join(self.directory, name), "wb") as file:
                file.write(data)

    def run_command(self, text):
        host = "127.0.0.1:%d" % self.server.address[1]
        text = text.replace("HOST:8080", host).replace("UUID", U)
        text = text.replace("zfs send zones/VM@image", "cat stream")
        result = subprocess.run(["sh", "-c", "curl() { command curl -q --noproxy '*' \"$@\"; }\n"
                                 + text], cwd=self.directory, capture_output=True,
                                timeout=PATIENCE)
        self.assertEqual((result.returncode, result.stderr), (0, b""))
        return json.loads(result.stdout) if result.stdout else None

    def test_the_commands_of_the_readme(self):
        piped, sized, *steps = self.commands
        for each in (piped, sized):
            image = self.run_command(each)
            self.assertEqual((image["state"], image["name"], image["version"]),
                             ("active", "web", "1.2.0"))
        self.assertEqual(len(steps), 3)
        self.assertEqual([self.run_command(each)["state"] for each in steps],
                         ["unactivated", "unactivated", "active"])
        self.assertEqual(self.server.get(f"/images/{U}/file").status, 200)
        self.assertEqual(len(self.server.get("/images").json()), 3)

    def test_nothing_is_left_of_a_stream_that_was_cut(self):
        os.truncate(os.path.join(self.directory, "stream"), 500)
        error = self.run_command(self.commands[0])
        self.assertEqual(error["code"], "Upload")
        self.assertEqual(os.listdir(self.serve_dir), [])


@check_only("random")
class Killed(ServerCase):
    """kill -9 and a full disk at any moment: nothing half is shown, and publishing goes on."""

    seconds = 60

    def sound(self, server, wanted):
        for image in server.get("/images").json():
            data = server.get(f"/images/{image['uuid']}/file").body
            self.assertEqual(hashlib.sha1(data).hexdigest(), image["files"][0]["sha1"])
        self.assertLessEqual(set(wanted),
                             {image["uuid"] for image in server.get("/images").json()})

    def test_kill_9(self):
        rng = random.Random()
        data = streams.pack(streams.stream(payload=streams.noise(2 << 20)), "none")
        manifest = manifest_of(U, files=[{"size": len(data), "compression": "none",
                                          "sha1": hashlib.sha1(data).hexdigest()}])
        shown = []
        for number in range(40):
            uuid = uuid_of(10 + number // 4)
            server = self.serve(config=HERE)
            killer = threading.Timer(rng.uniform(0, 0.06), server.process.kill)
            killer.start()
            try:
                ImgadmPublish(server.connect).publish({**manifest, "uuid": uuid}, data)
                shown.append(uuid)
            except Rejected as error:
                if "ImageUuidAlreadyExists" in str(error):
                    shown.append(uuid)
            except (OSError, AssertionError):
                pass                      # cut inside an answer
            killer.join()
            server.process.wait()
            again = self.serve(config=HERE)
            self.sound(again, shown)
            fresh = uuid_of(100 + number)
            ImgadmPublish(again.connect).publish({**manifest, "uuid": fresh}, data)
            if uuid not in shown:
                with contextlib.suppress(Rejected):
                    ImgadmPublish(again.connect).publish({**manifest, "uuid": uuid}, data)
                self.sound(again, [uuid])
                shown.append(uuid)
            ImgadmPublish(again.connect).ask("DELETE", f"/images/{fresh}", b"")
            self.assertEqual(again.stop(), 0)

    def test_a_full_disk(self):
        data = streams.pack(streams.stream(payload=streams.noise(2 << 20)), "none")
        manifest = manifest_of(U, files=[{"size": len(data), "compression": "none",
                                          "sha1": hashlib.sha1(data).hexdigest()}])
        server = self.serve(config=HERE, wrapper=("sh", "-c", "ulimit -f 1024; exec \"$@\"",
                                                  "sh"))
        ImgadmPublish(server.connect).publish(manifest_of(V), DATA)
        for _ in range(3):
            with self.assertRaisesRegex(Rejected, "StorageIsDown: the image cannot be stored"):
                ImgadmPublish(server.connect).publish(manifest, data)
            self.assertEqual(os.listdir(self.serve_dir), [V])
            self.sound(server, [V])
        with self.assertRaisesRegex(Rejected, "StorageIsDown"):
            ImgadmPublish(server.connect).ask(
                "POST", "/images?action=publish&name=a&version=1", data)
        self.assertEqual(os.listdir(self.serve_dir), [V])


if __name__ == "__main__":
    unittest.main()
