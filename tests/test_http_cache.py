"""What caches and browsers rest on: ETags, gzip, HEAD, CORS, and the page at /."""

import gzip
import os
import unittest

from tests.support import ServerCase, uuid_of, write_image, write_manifest, write_v2

UUID, OTHER = uuid_of(1), uuid_of(2)
LISTS = ("/datasets", "/images", "/datasets/", "/images/")
MANIFESTS = (f"/datasets/{UUID}", f"/images/{UUID}", f"/datasets/{OTHER}", f"/images/{OTHER}")
PNG = b"\x89PNG\r\n\x1a\n and so on"
ROUTES = LISTS + MANIFESTS + (
    "/", "/ping", "/ping?error=Internal", f"/datasets/{UUID}/image.zfs.gz",
    f"/images/{UUID}/file", f"/images/{UUID}/icon", "/images?name=test", "/datasets?name=test",
    "/channels", "/nothing", f"/images/{uuid_of(9)}", f"/images/{OTHER}/icon")


class CacheCase(ServerCase):

    def setUp(self):
        super().setUp()
        self.manifest = write_image(self.serve_dir, UUID)
        write_v2(self.serve_dir, OTHER)
        with open(os.path.join(self.serve_dir, UUID, "icon.png"), "wb") as file:
            file.write(PNG)

    def page(self, name, text):
        with open(os.path.join(self.serve_dir, name), "w") as file:
            file.write(text)


class ETags(CacheCase):

    def test_304_for_manifests_and_lists(self):
        server = self.serve()
        with server.connect() as connection:
            for path in LISTS + MANIFESTS:
                first = connection.request(path)
                etag = first.headers["etag"]
                self.assertRegex(etag, r'\A"[!-~]+"\Z')
                for value, status in ((etag, 304), ("*", 304), (f'"x", {etag}', 304),
                                      ("W/" + etag, 304), (etag.strip('"'), 304), ('"x"', 200),
                                      ("", 200), (etag[:-2] + '"', 200)):
                    for method in ("GET", "HEAD"):
                        with self.subTest(path, value=value, method=method):
                            answer = connection.request(path, method, {"If-None-Match": value})
                            self.assertEqual(answer.status, status)
                            self.assertEqual(answer.headers["etag"], etag)
                            self.assertEqual(answer.headers["access-control-allow-origin"], "*")
                            if status == 200 and method == "GET":
                                self.assertEqual(answer.body, first.body)
                            if status == 304:
                                self.assertNotIn("content-length", answer.headers)

    def test_a_change_changes_them(self):
        server = self.serve()
        before = {path: server.get(path).headers["etag"] for path in LISTS + MANIFESTS}
        write_manifest(self.serve_dir, UUID, {**self.manifest, "name": "another"})
        os.mkdir(os.path.join(self.serve_dir, "any"))      # lists look at once then, or in 1 s
        for path in (f"/datasets/{UUID}", f"/images/{UUID}"):
            answer = server.get(path, {"If-None-Match": before[path]})
            self.assertEqual(answer.status, 200)
            self.assertEqual(answer.json()["name"], "another")
            self.assertNotEqual(answer.headers["etag"], before[path])
        for path in (f"/datasets/{OTHER}", f"/images/{OTHER}"):
            self.assertEqual(server.get(path, {"If-None-Match": before[path]}).status, 304)
        for path in LISTS:
            answer = server.get(path, {"If-None-Match": before[path]})
            self.assertEqual(answer.status, 200)
            self.assertIn(b'"another"', answer.body)

    def test_the_same_after_a_restart(self):
        first, second = self.serve(), self.serve()
        for path in LISTS + MANIFESTS:
            self.assertEqual(first.get(path).headers["etag"], second.get(path).headers["etag"])

    def test_if_match(self):
        server = self.serve()
        for path in MANIFESTS:
            etag = server.get(path).headers["etag"]
            for value, status in ((etag, 200), ("*", 200), ('"x"', 412), (etag.strip('"'), 200)):
                with self.subTest(path, value=value):
                    answer = server.get(path, {"If-Match": value})
                    self.assertEqual(answer.status, status)
                    if status == 412:
                        self.assertError(answer, 412, "PreconditionFailed")

    def test_different_hosts_never_share_one_answer(self):
        server = self.serve()
        for path in ("/datasets", f"/datasets/{UUID}"):
            answers = {host: server.get(path, {"Host": host}) for host in ("a", "b:81", "c")}
            for host, answer in answers.items():
                self.assertIn(f'"http://{host}/datasets/{UUID}/'.encode(), answer.body)
                self.assertEqual(server.get(path, {"Host": host}).body, answer.body)


class Gzip(CacheCase):

    @staticmethod
    def vary(path):
        return "Accept, Accept-Encoding" if path.startswith("/datasets") else "Accept-Encoding"

    def test_lists_are_gzipped_for_who_asks(self):
        server = self.serve()
        with server.connect() as connection:
            for path in LISTS:
                plain = connection.request(path)
                self.assertNotIn("content-encoding", plain.headers)
                self.assertEqual(plain.headers["vary"], self.vary(path))
                for accept in ("gzip", "GZIP", "gzip, deflate, br", "br;q=1.0, gzip;q=0.5",
                               "identity , gzip ;q=0.001", "gzip;q=1"):
                    with self.subTest(path, accept=accept):
                        answer = connection.request(path, headers={"Accept-Encoding": accept})
                        self.assertEqual(answer.headers.get("content-encoding"), "gzip")
                        self.assertEqual(gzip.decompress(answer.body), plain.body)
                        self.assertEqual(answer.headers["vary"], self.vary(path))
                        self.assertEqual(answer.headers["content-type"], "application/json")
                        self.assertNotEqual(answer.headers["etag"], plain.headers["etag"])
                for accept in ("", "identity", "br", "gzip;q=0", "gzip;q=0.0", "gzip; q=0.000",
                               "x-gzip2", "notgzip", "gzip;q=0, identity"):
                    with self.subTest(path, accept=accept):
                        answer = connection.request(path, headers={"Accept-Encoding": accept})
                        self.assertNotIn("content-encoding", answer.headers)
                        self.assertEqual(answer.body, plain.body)

    def test_each_form_has_its_own_304(self):
        server = self.serve()
        for path in LISTS:
            plain = server.get(path).headers["etag"]
            zipped = server.get(path, {"Accept-Encoding": "gzip"}).headers["etag"]
            for accept, etag, status in (("gzip", zipped, 304), ("identity", plain, 304),
                                         ("gzip", plain, 200), ("identity", zipped, 200)):
                with self.subTest(path, accept=accept, etag=etag):
                    answer = server.get(path, {"Accept-Encoding": accept, "If-None-Match": etag})
                    self.assertEqual(answer.status, status)
                    self.assertEqual(answer.headers["vary"], self.vary(path))

    def test_the_gzip_form_follows_a_change(self):
        server = self.serve()
        for _ in range(2):
            for path in LISTS:
                zipped = server.get(path, {"Accept-Encoding": "gzip"})
                self.assertEqual(gzip.decompress(zipped.body), server.get(path).body)
            write_image(self.serve_dir, uuid_of(3))
        self.assertIn(uuid_of(3).encode(), gzip.decompress(zipped.body) + server.get(path).body)

    def test_the_bytes_are_the_same_each_time(self):
        first, second = self.serve(), self.serve()
        for path in ("/datasets", "/images"):
            self.assertEqual(first.get(path, {"Accept-Encoding": "gzip"}).body,
                             second.get(path, {"Accept-Encoding": "gzip"}).body)


class Heads(CacheCase):

    def test_head_is_get_without_its_body_on_every_route(self):
        for unix in (False, True):
            with self.serve(unix=unix).connect() as connection:
                for path in ROUTES:
                    for fields in ({}, {"Accept-Encoding": "gzip"}, {"Accept": "text/html"}):
                        with self.subTest(path, unix=unix, fields=fields):
                            answer = connection.request(path, headers=fields)
                            head = connection.request(path, "HEAD", fields)
                            self.assertEqual(head.status, answer.status)
                            for each in (answer, head):
                                each.headers.pop("date")
                            self.assertEqual(head.headers, answer.headers)
                            self.assertEqual(answer.headers["content-length"],
                                             str(len(answer.body)))
                            self.assertEqual(connection.request("/ping").status, 200)


class Cors(CacheCase):

    def test_any_page_may_read_lists_manifests_and_errors(self):
        server = self.serve()
        for path in LISTS + MANIFESTS + ("/ping", "/", "/nothing", "/images?limit=x"):
            with self.subTest(path):
                answer = server.get(path, {"Origin": "https://elsewhere.example"})
                self.assertEqual(answer.headers["access-control-allow-origin"], "*")
                self.assertNotIn("access-control-allow-credentials", answer.headers)

    def test_options(self):
        with self.serve().connect() as connection:
            for path in LISTS + MANIFESTS + ("/", "/ping", f"/images/{UUID}/file"):
                with self.subTest(path):
                    answer = connection.request(path, "OPTIONS", {
                        "Origin": "https://elsewhere.example",
                        "Access-Control-Request-Method": "GET",
                        "Access-Control-Request-Headers": "accept-version, x-request-id"})
                    self.assertEqual((answer.status, answer.body), (204, b""))
                    headers = answer.headers
                    self.assertNotIn("content-length", headers)
                    self.assertEqual(headers["access-control-allow-origin"], "*")
                    self.assertEqual(headers["allow"], "GET, HEAD, OPTIONS")
                    self.assertEqual(headers["access-control-allow-methods"], headers["allow"])
                    self.assertEqual(headers["access-control-allow-headers"],
                                     "accept-version, x-request-id")
            self.assertError(connection.request("/nothing", "OPTIONS"), 404)

    def test_options_reflects_nothing_odd(self):
        with self.serve().connect() as connection:
            for value in ("<script>", "a:b", "a\tb", "x" * 501, "\u00e9"):
                answer = connection.request("/images", "OPTIONS",
                                            {"Access-Control-Request-Headers": value})
                self.assertEqual(answer.status, 204)
                self.assertNotIn("access-control-allow-headers", answer.headers)


class Root(CacheCase):

    def test_html_for_browsers_and_json_for_the_rest(self):
        self.page("index.html", "<h1>images</h1>")
        self.page("index.json", '{"a": 1}')
        server = self.serve()
        for path in ("/", "http://elsewhere", "http://elsewhere/", "/?x=y"):
            for accept, html in (("text/html,application/xhtml+xml;q=0.9,*/*;q=0.8", True),
                                 ("application/xhtml+xml", True), ("application/json", False),
                                 ("*/*", False), (None, False)):
                with self.subTest(path, accept=accept):
                    answer = server.get(path, {"Accept": accept})
                    self.assertEqual(answer.headers["vary"], "Accept")
                    if html:
                        self.assertEqual(answer.body, b"<h1>images</h1>")
                        self.assertTrue(answer.headers["content-type"].startswith("text/html"))
                    else:
                        self.assertEqual(answer.json(), {"a": 1})
                        self.assertEqual(answer.headers["content-type"], "application/json")
                    again = server.get(path, {"Accept": accept,
                                              "If-None-Match": answer.headers["etag"]})
                    self.assertEqual(again.status, 304)

    def test_one_of_them_or_none(self):
        server = self.serve()
        self.assertEqual(server.get("/", {"Accept": "text/html"}).json()["images"], "/images")
        self.page("index.json", '{"a": 1}')
        self.assertEqual(server.get("/", {"Accept": "text/html"}).json(), {"a": 1})
        os.unlink(os.path.join(self.serve_dir, "index.json"))
        self.page("index.html", "<h1>images</h1>")
        self.assertEqual(server.get("/", {"Accept": "text/html"}).body, b"<h1>images</h1>")
        self.assertEqual(server.get("/").json()["images"], "/images")

    def test_an_edit_shows_at_once(self):
        self.page("index.html", "<h1>one</h1>")
        server = self.serve()
        first = server.get("/", {"Accept": "text/html"})
        self.page("index.html", "<h1>two</h1>")
        again = server.get("/", {"Accept": "text/html",
                                 "If-None-Match": first.headers["etag"]})
        self.assertEqual((again.status, again.body), (200, b"<h1>two</h1>"))

    def test_nothing_else_of_serve_dir_is_a_page(self):
        for name in ("index.htm", "config.json", "x.html"):
            self.page(name, "secret")
        server = self.serve()
        for path in ("/index.htm", "/config.json", "/x.html"):
            self.assertError(server.get(path, {"Accept": "text/html"}), 404)
        os.mkfifo(os.path.join(self.serve_dir, "index.html"))
        self.assertEqual(server.get("/", {"Accept": "text/html"}).status, 200)


if __name__ == "__main__":
    unittest.main()
