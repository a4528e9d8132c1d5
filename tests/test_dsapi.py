"""DSAPI: every route and filter, as a table of requests and answers."""

import hashlib
import json
import os
import urllib.parse

from tests import support
from tests.support import NOBODY, uuid_of

DATA = b"not a real stream"
U1, U2, U3, U4, U5, NONE = (uuid_of(number) for number in (1, 2, 3, 4, 5, 99))
HOST = "images.example.com"


class Case(support.ServerCase):

    def expect(self, server, table, method="GET"):
        """Rows of request, status, and for errors the code and a part of the message."""
        for target, status, *error in table:
            with self.subTest(method + " " + target):
                answer = server.get(target, method=method)
                self.assertEqual(answer.status, status, answer)
                if status >= 400 and method != "HEAD":
                    code, message = error
                    found = self.assertError(answer, status, code)
                    self.assertIn(message, found["message"])
                elif method == "HEAD":
                    self.assertEqual(answer.body, b"")


class Routes(Case):
    """One directory with all that can and cannot be seen."""

    def setUp(self):
        super().setUp()
        support.write_image(self.serve_dir, U1, path="an image.zfs.gz")
        support.write_v2(self.serve_dir, U2, path="image.zfs.gz")
        support.write_v2(self.serve_dir, U3, disabled=True)
        os.mkdir(os.path.join(self.serve_dir, U4))
        support.write_image(self.serve_dir, U5, size="x", name="")
        support.write_image(self.serve_dir, ".incoming-" + uuid_of(6))
        for name, text in (("icon.png", "png"), ("notes.txt", "secret")):
            with open(os.path.join(self.serve_dir, U1, name), "w") as file:
                file.write(text)
        self.server = self.serve()

    TABLE = [
        ("/datasets", 200),
        ("/datasets/", 200),
        ("/datasets?", 200),
        (f"/datasets/{U1}", 200),
        (f"/datasets/{U1}/", 200),
        (f"/datasets/{U2}", 200),
        (f"/datasets/{U3}", 200),
        (f"/datasets/{U1}/an%20image.zfs.gz", 200),
        (f"/datasets/{U1}/%61n%20image%2Ezfs.gz", 200),
        (f"/datasets/{U1}/an%20image.zfs.gz?x=y", 200),
        (f"/datasets/{U2}/image.zfs.gz", 200),
        (f"/datasets/{U3}/image.zfs.gz", 200),
        ("/ping", 200),
        ("/ping?x=y", 200),
        ("/", 200),
        (f"http://{HOST}/datasets", 200),
        (f"http://other.example.com:1/datasets/{U1}/an%20image.zfs.gz", 200),
        (f"https://203.0.113.9:9/datasets/{U1}", 200),
        (f"HTTP://{HOST}/datasets/{U1}", 200),
        (f"http://{HOST}", 200),
        (f"http://{HOST}/", 200),
        (f"http://{HOST}?x=y", 200),
        (f"/datasets/{NONE}", 404, "ResourceNotFound", "not found"),
        (f"/datasets/{U4}", 404, "ResourceNotFound", "not found"),
        (f"/datasets/{U5}", 404, "ResourceNotFound", "not found"),
        (f"/datasets/{uuid_of(6)}", 404, "ResourceNotFound", "not found"),
        (f"/datasets/.incoming-{uuid_of(6)}", 404, "ResourceNotFound", "does not exist"),
        (f"/datasets/{uuid_of(6)}/image.zfs.gz", 404, "ResourceNotFound", "not found"),
        (f"/datasets/{uuid_of(0xabc).upper()}", 404, "ResourceNotFound", "does not exist"),
        ("/datasets/name", 404, "ResourceNotFound", "/datasets/name does not exist"),
        ("/datasets/name:1.0", 404, "ResourceNotFound", "does not exist"),
        (f"/datasets//{U1}", 404, "ResourceNotFound", "does not exist"),
        ("//datasets", 404, "ResourceNotFound", "does not exist"),
        (f"/datasets/{U1}/manifest.json", 404, "ResourceNotFound", "does not exist"),
        (f"/datasets/{U1}/icon.png", 404, "ResourceNotFound", "does not exist"),
        (f"/datasets/{U1}/notes.txt", 404, "ResourceNotFound", "does not exist"),
        (f"/datasets/{U1}/image.zfs.gz", 404, "ResourceNotFound", "does not exist"),
        (f"/datasets/{U1}/an+image.zfs.gz", 404, "ResourceNotFound", "does not exist"),
        (f"/datasets/{NONE}/image.zfs.gz", 404, "ResourceNotFound", "not found"),
        (f"/datasets/{U1}/an%20image.zfs.gz/x", 404, "ResourceNotFound", "does not exist"),
        (f"/datasets/{U1}/..%2f{U2}%2fimage.zfs.gz", 404, "ResourceNotFound", "not exist"),
        (f"/datasets/{U1}/../{U2}/image.zfs.gz", 404, "ResourceNotFound", "does not exist"),
        ("/datasets/%zz", 400, "BadRequestError", "URI malformed"),
        (f"/datasets/{U1}/%00", 400, "BadRequestError", "URI malformed"),
        ("/nothing", 404, "ResourceNotFound", "/nothing does not exist"),
        ("/pong", 404, "ResourceNotFound", "does not exist"),
        ("/Datasets", 404, "ResourceNotFound", "does not exist"),
    ]

    def test_get(self):
        self.expect(self.server, self.TABLE)

    def test_head(self):
        self.expect(self.server, self.TABLE, "HEAD")

    def test_other_methods(self):
        for target in ("/datasets", f"/datasets/{U1}", f"/datasets/{U2}/image.zfs.gz", "/ping",
                       "/"):
            for method in ("POST", "PUT", "DELETE", "PATCH"):
                with self.subTest(method + " " + target):
                    answer = self.server.get(target, method=method)
                    error = self.assertError(answer, 405, "MethodNotAllowedError")
                    self.assertEqual(error["message"], f"{method} is not allowed")
                    self.assertEqual(answer.headers["allow"], "GET, HEAD, OPTIONS")

    def test_list(self):
        answer = self.server.get("/datasets")
        self.assertEqual([image["uuid"] for image in answer.json()], [U1, U2])
        self.assertEqual(answer.headers["content-type"], "application/json")
        self.assertEqual(answer.headers["access-control-allow-origin"], "*")
        self.assertEqual(answer.headers["content-length"], str(len(answer.body)))
        self.assertEqual(answer.body.decode("ascii"), json.dumps(answer.json(), indent=2))
        one = [self.server.get(f"/datasets/{image['uuid']}").json() for image in answer.json()]
        self.assertEqual(answer.json(), one)

    def test_manifest(self):
        answer = self.server.get(f"/datasets/{U1}")
        self.assertEqual(answer.headers["content-type"], "application/json")
        self.assertEqual(answer.headers["access-control-allow-origin"], "*")
        self.assertEqual(answer.body.decode("ascii"), json.dumps(answer.json(), indent=2))

    def test_file(self):
        answer = self.server.get(f"/datasets/{U1}/an%20image.zfs.gz")
        self.assertEqual(answer.body, DATA)
        self.assertEqual(answer.headers["content-type"], "application/octet-stream")
        self.assertEqual(answer.headers["content-length"], str(len(DATA)))
        self.assertEqual(answer.headers["etag"], f'"{hashlib.sha1(DATA).hexdigest()}"')

    def test_ping(self):
        answer = self.server.get("/ping")
        self.assertEqual(answer.headers["content-type"], "application/json")
        ping = answer.json()
        self.assertEqual(list(ping), ["ping", "version", "imgapi", "dsapi"])
        self.assertEqual((ping["ping"], ping["imgapi"], ping["dsapi"]), ("pong", True, True))
        self.assertEqual(answer.headers["server"], "imgserver/" + ping["version"])


class Filters(Case):

    IMAGES = {                            # number: name, version, os, type
        1: ("base", "1.0.0", "smartos", "zone-dataset"),
        2: ("base64", "1.0.1", "smartos", "zone-dataset"),
        3: ("my-base", "1.10.0", "linux", "lx-dataset"),
        4: ("ubuntu", "2.0.0", "linux", "other"),
        5: ("Base", "21.0", "bsd", "zone-dataset"),
    }
    TABLE = [
        ("", [1, 2, 3, 4, 5]),
        ("name=base", [1, 2]),
        ("name=base64", [2]),
        ("name=Base", [5]),
        ("name=ase", []),
        ("name=~ase", [1, 2, 3, 5]),
        ("name=~base", [1, 2, 3]),
        ("name=~", [1, 2, 3, 4, 5]),
        ("name=%62ase64", [2]),
        ("version=1.0", [1, 2]),
        ("version=1.0.1", [2]),
        ("version=2", [4, 5]),
        ("os=smartos", [1, 2]),
        ("os=s", [1, 2]),
        ("os=martos", []),
        ("type=zone-dataset", [1, 2, 5]),
        ("type=zone", []),
        ("type=other", [4]),
        ("name=base&os=smartos&version=1.0.0", [1]),
        ("name=base&os=linux", []),
        ("bogus=x", [1, 2, 3, 4, 5]),
        ("uuid=" + NONE, [1, 2, 3, 4, 5]),
        ("name=", [1, 2, 3, 4, 5]),
        ("name=nothing", []),
    ]

    def test_table(self):
        for number, (name, version, system, kind) in self.IMAGES.items():
            support.write_image(self.serve_dir, uuid_of(number), name=name, version=version,
                                os=system, type=kind)
        server = self.serve()
        for query, numbers in self.TABLE:
            with self.subTest(query):
                answer = server.get("/datasets?" + query)
                self.assertEqual(answer.status, 200)
                self.assertEqual([image["uuid"] for image in answer.json()],
                                 [uuid_of(number) for number in numbers])
                self.assertEqual(answer.headers["access-control-allow-origin"], "*")
                self.assertEqual(answer.body.decode("ascii"), json.dumps(answer.json(), indent=2))

    def test_order_is_by_time_then_uuid(self):
        for number, stamp in ((1, "2020-01-01T00:00:00Z"), (2, "2011-01-01T00:00:00Z"),
                             (3, "2015-01-01T00:00:00Z"), (4, "2011-01-01T00:00:00Z")):
            support.write_image(self.serve_dir, uuid_of(number), published_at=stamp)
        server = self.serve()
        for target in ("/datasets", "/datasets?name=test"):
            with self.subTest(target):
                self.assertEqual([image["uuid"] for image in server.get(target).json()],
                                 [U2, U4, U3, U1])

    def test_hostile_queries(self):
        support.write_image(self.serve_dir, U1)
        server = self.serve()
        long = "x" * 7000
        for query in ("name=a&name=b", "name=%ff%fe", "name=%", "name=%00", "name=~~", "&&&", "=",
                      "=x", "name=" + long, long, "&".join(f"a{n}=1" for n in range(1000)),
                      "a=1&" * 1900, "name[]=x", "os=\xff\xfe", "type=%c3%28", ";", "name;x"):
            with self.subTest(query[:40]):
                answer = server.get("/datasets?" + query)
                self.assertLess(answer.status, 500, answer)
                answer.json()


class Urls(Case):
    """files[].url = prefix + Host + suffix + percent-encoded path."""

    #         prefix             suffix         Host                      what the url begins with
    TABLE = [
        (None, None, "images.example.com", "http://images.example.com"),
        (None, None, "images.example.com:8080", "http://images.example.com:8080"),
        (None, None, "[::1]:80", "http://[::1]:80"),
        (None, None, "1.2.3.4", "http://1.2.3.4"),
        ("https://", "", "h", "https://h"),
        ("https://", ":8443", "h", "https://h:8443"),
        ("http://", ":8080", "h:8080", "http://h:8080"),
        ("http://", ":8080", "h:9", "http://h:9"),
        ("http://", ":8080", "[::1]", "http://[::1]:8080"),
        ("http://", ":8080", "[::1]:9", "http://[::1]:9"),
        ("http://", "/sub", "h", "http://h/sub"),
        ("http://", "/sub", "h:1", "http://h:1/sub"),
        ("http://", ":8080/sub", "h:1", "http://h:1/sub"),
    ]

    def test_table(self):
        support.write_image(self.serve_dir, U1)
        servers = {}
        for prefix, suffix, host, start in self.TABLE:
            with self.subTest(prefix=prefix, suffix=suffix, host=host):
                if (prefix, suffix) not in servers:
                    settings = {"prefix": prefix, "suffix": suffix}
                    servers[prefix, suffix] = self.serve(config={
                        key: value for key, value in settings.items() if value is not None})
                server = servers[prefix, suffix]
                url = f"{start}/datasets/{U1}/image.zfs.gz"
                headers = {"Host": host}
                shown = server.get(f"/datasets/{U1}", headers).json()["files"][0]["url"]
                listed = server.get("/datasets", headers).json()[0]["files"][0]["url"]
                filtered = server.get("/datasets?name=test", headers).json()[0]["files"][0]["url"]
                self.assertEqual([shown, listed, filtered], [url] * 3)

    def test_http_1_0_without_a_host(self):
        support.write_image(self.serve_dir, U1)
        server = self.serve()
        answer = server.get(f"/datasets/{U1}", {"Host": None}, version="1.0")
        self.assertEqual(answer.status, 200)
        self.assertRegex(answer.json()["files"][0]["url"],
                         f"^http://[^/]+/datasets/{U1}/image.zfs.gz$")

    def test_a_stored_url_is_always_overwritten(self):
        file = {"path": "image.zfs.gz", "url": "http://old.example.com/x", "size": len(DATA),
                "sha1": hashlib.sha1(DATA).hexdigest()}
        support.write_image(self.serve_dir, U1, files=[file])
        shown = self.serve().get(f"/datasets/{U1}").json()
        self.assertEqual(shown["files"][0]["url"], f"http://{HOST}/datasets/{U1}/image.zfs.gz")

    NAMES = ["an image.gz", "100%.gz", "a#b.gz", "a?b.gz", "a+b.gz", "\u00e9\u4e2d\U0001f600.gz",
             "a&b=c;d.gz", "%2e%2e.gz", "a\\b.gz", "'\".gz", "~a:b@c,$!*().gz", "..gz", "x" * 200]

    def test_every_name_comes_back_through_its_url(self):
        for number, name in enumerate(self.NAMES, 1):
            support.write_image(self.serve_dir, uuid_of(number), name.encode(), path=name)
        server = self.serve()
        images = server.get("/datasets").json()
        self.assertEqual(len(images), len(self.NAMES))
        for image, name in zip(images, self.NAMES):
            with self.subTest(name):
                url, path = image["files"][0]["url"], image["files"][0]["path"]
                self.assertRegex(url, r"^http://[!-~]+$")
                self.assertEqual(path, name)
                self.assertEqual(server.get(url).body, name.encode())
                target = urllib.parse.urlsplit(url).path
                self.assertEqual(server.get(target).body, name.encode())


class Formats(Case):
    """Whatever is stored, DSAPI shows v1."""

    def show(self, server, uuid):
        return server.get(f"/datasets/{uuid}").json()

    def test_v1_as_stored(self):
        stored = support.write_image(self.serve_dir, U1, **{
            "x-own": {"b": [1.5, None], "a": True}, "published_at": "2011-12-13T14:15Z"})
        shown = self.show(self.serve(), U1)
        file = {**stored["files"][0], "compression": "none",
                "url": f"http://{HOST}/datasets/{U1}/image.zfs.gz"}
        self.assertEqual(shown, {**stored, "files": [file]})
        self.assertEqual(list(shown), list(stored))

    def test_v2_downgraded(self):
        """The official reverse, but nothing is lost that v1 clients pass over."""
        support.write_v2(
            self.serve_dir, U1, owner=uuid_of(7), published_at="2020-01-02T03:04:00Z",
            urn="sdc:admin:test:2.0.0", state="active", public=True, disabled=False,
            description="d", homepage="https://example.com/", tags={"a": 1}, origin=U2,
            users=[{"name": "root"}], requirements={"min_ram": 256}, type="zvol",
            nic_driver="virtio", disk_driver="virtio", cpu_type="host", image_size=10240,
            billing_tags=["x"], acl=[])
        support.write_image(self.serve_dir, U2)
        self.assertEqual(self.show(self.serve(), U1), {
            "uuid": U1, "name": "test", "version": "2.0.0", "type": "zvol", "os": "smartos",
            "creator_uuid": uuid_of(7), "vendor_uuid": uuid_of(7), "cloud_name": "sdc",
            "creator_name": "admin", "platform_type": "smartos", "urn": "sdc:admin:test:2.0.0",
            "published_at": "2020-01-02T03:04Z", "created_at": "2020-01-02T03:04Z",
            "updated_at": "2020-01-02T03:04Z", "description": "d",
            "homepage": "https://example.com/", "tags": {"a": 1}, "origin": U2,
            "users": [{"name": "root"}], "requirements": {"min_ram": 256},
            "nic_driver": "virtio", "disk_driver": "virtio", "cpu_type": "host",
            "image_size": "10240", "billing_tags": ["x"],
            "files": [{"size": len(DATA), "compression": "gzip", "path": "image.zfs.gz",
                       "sha1": hashlib.sha1(DATA).hexdigest(),
                       "url": f"http://{HOST}/datasets/{U1}/image.zfs.gz"}]})

    # what is changed in a v1 manifest, and the fields that must come of it
    MENDED = [
        ({"creator_uuid": ""}, {"creator_uuid": NOBODY}),
        ({"creator_uuid": None}, {"creator_uuid": NOBODY}),
        ({"owner": U2}, {"owner": None}),
        ({"state": "active", "public": True}, {"state": None, "public": None}),
        ({"urn": None, "cloud_name": None}, {"urn": "internal:internal:test:1.0.0"}),
        ({"description": None}, {"description": "test 1.0.0"}),
        ({"creator_name": None}, {"creator_name": "internal"}),
    ]

    def test_mended_v1(self):
        for number, (change, _) in enumerate(self.MENDED, 1):
            support.write_image(self.serve_dir, uuid_of(number), **change)
        server = self.serve()
        for number, (change, fields) in enumerate(self.MENDED, 1):
            with self.subTest(change):
                shown = self.show(server, uuid_of(number))
                self.assertEqual({key: shown.get(key) for key in fields}, fields)

    #          path             its bytes           stored     shown
    COMPRESSIONS = [
        ("a.zfs.gz", b"\x1f\x8b\x08 rest", None, "gzip"),
        ("a.zfs", b"\x1f\x8b\x08 rest", None, "gzip"),
        ("a.zfs.bz2", b"BZh91AY rest", None, "bzip2"),
        ("a.zfs.xz", b"\xfd7zXZ\0 rest", None, "xz"),
        ("b.zfs.gz", b"\xfd7zXZ\0 rest", None, "xz"),
        ("a.zfs", b"a raw stream", None, "none"),
        ("a.zfs.gz", b"\x1f\x8b\x08 rest", "", "gzip"),
        ("a.zfs.gz", b"anything", "bzip2", "bzip2"),
        ("a.zfs.gz", b"", None, "gzip"),
    ]

    def test_compression(self):
        for number, (path, data, stored, _) in enumerate(self.COMPRESSIONS, 1):
            file = {"path": path, "size": len(data), "sha1": hashlib.sha1(data).hexdigest()}
            if stored is not None:
                file["compression"] = stored
            support.write_image(self.serve_dir, uuid_of(number), data, path=path, files=[file])
        server = self.serve()
        for number, (*case, shown) in enumerate(self.COMPRESSIONS, 1):
            with self.subTest(case):
                file = self.show(server, uuid_of(number))["files"][0]
                self.assertEqual(file["compression"], shown)

    def test_numbers_and_hashes_as_imgadm_needs_them(self):
        """An upper-case sha1 and a size as a text are mended: imgadm compares and counts."""
        sha1 = hashlib.sha1(DATA).hexdigest()
        support.write_image(self.serve_dir, U1, files=[{
            "path": "image.zfs.gz", "sha1": sha1.upper(), "size": str(len(DATA))}])
        file = self.show(self.serve(), U1)["files"][0]
        self.assertEqual((file["sha1"], file["size"]), (sha1, len(DATA)))

    def test_a_v2_name_gets_the_ending_that_imgadm_1_goes_by(self):
        support.write_v2(self.serve_dir, U1, path="noname", compression="bzip2")
        server = self.serve()
        file = self.show(server, U1)["files"][0]
        self.assertEqual(file["path"], "noname.bz2")
        self.assertEqual(server.get(file["url"]).body, DATA)

    def test_ascii_alone(self):
        support.write_image(self.serve_dir, U1, description="gr\u00f6\u00dfer \U0001f600")
        answer = self.serve().get("/datasets")
        self.assertIn(rb"gr\u00f6\u00dfer \ud83d\ude00", answer.body)
        self.assertEqual(answer.json()[0]["description"], "gr\u00f6\u00dfer \U0001f600")
