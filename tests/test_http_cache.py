"""What all routes share: conditions, gzip, HEAD, OPTIONS and CORS, and the page at /."""

import email.utils
import gzip
import os
import shutil
import time
import unittest

from tests.support import ServerCase, ask, uuid_of, write_image, write_manifest, write_v2

UUID, OTHER = uuid_of(1), uuid_of(2)
LISTS = ("/datasets", "/images", "/datasets/", "/images/")
MANIFESTS = (f"/datasets/{UUID}", f"/images/{UUID}", f"/datasets/{OTHER}", f"/images/{OTHER}")
FILES = (f"/datasets/{UUID}/image.zfs.gz", f"/images/{UUID}/file")
PNG = b"\x89PNG\r\n\x1a\n and so on"
ROUTES = LISTS + MANIFESTS + (
    "/", "/ping", "/ping?error=Internal", *FILES, f"/images/{UUID}/icon", "/images?name=test",
    "/datasets?name=test", "/channels", "/nothing", f"/images/{uuid_of(9)}",
    f"/datasets/{uuid_of(9)}", f"/images/{OTHER}/icon", f"/datasets/{UUID}/manifest.json",
    "/images?limit=x", "/images?inclAdminFields=true", "/state")


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


class Conditions(CacheCase):
    """If-None-Match and If-Match on lists and manifests; those on files stand below."""

    def test_if_none_match(self):
        site = self.site()
        for path in LISTS + MANIFESTS:
            first = ask(site, path)
            etag = first.headers["etag"]
            if path in MANIFESTS:
                self.assertRegex(etag, r'\A"[0-9a-f]{40}"\Z')
            self.assertRegex(etag, r'\A"[!-~]+"\Z')
            for value, status in ((etag, 304), ("*", 304), (f'"x", {etag}', 304),
                                  ("W/" + etag, 304), (etag.strip('"'), 304), ('"x"', 200),
                                  ("nope", 200), ("", 200), (etag[:-2] + '"', 200)):
                for method in ("GET", "HEAD"):
                    with self.subTest(path, value=value, method=method):
                        answer = ask(site, path, method, If_None_Match=value)
                        self.assertEqual(answer.status, status)
                        self.assertEqual(answer.headers["etag"], etag)
                        self.assertEqual(answer.headers["access-control-allow-origin"], "*")
                        self.assertEqual(answer.body, b"" if status == 304 else first.body)

    def test_304_has_no_body_and_no_length(self):
        """Over the socket: a 304 with either would be taken for the next answer."""
        with self.serve().connect() as connection:
            for path in LISTS + MANIFESTS:
                etag = connection.request(path).headers["etag"]
                for method in ("GET", "HEAD"):
                    with self.subTest(path, method=method):
                        answer = connection.request(path, method, {"If-None-Match": etag})
                        self.assertEqual(answer.status, 304)
                        self.assertNotIn("content-length", answer.headers)

    def test_a_change_changes_them(self):
        site = self.site()
        before = {path: ask(site, path).headers["etag"] for path in LISTS + MANIFESTS}
        write_manifest(self.serve_dir, UUID, {**self.manifest, "name": "another"})
        os.mkdir(os.path.join(self.serve_dir, "any"))      # lists look at once then, or in 1 s
        for path in (f"/datasets/{UUID}", f"/images/{UUID}"):
            answer = ask(site, path, If_None_Match=before[path])
            self.assertEqual(answer.status, 200)
            self.assertEqual(answer.json()["name"], "another")
            self.assertNotEqual(answer.headers["etag"], before[path])
        for path in (f"/datasets/{OTHER}", f"/images/{OTHER}"):
            self.assertEqual(ask(site, path, If_None_Match=before[path]).status, 304)
        for path in LISTS:
            answer = ask(site, path, If_None_Match=before[path])
            self.assertEqual(answer.status, 200)
            self.assertIn(b'"another"', answer.body)

    def test_the_etag_of_a_list_follows_the_list_and_comes_back_with_it(self):
        site = self.site()
        etags = {path: ask(site, path).headers["etag"] for path in LISTS}
        write_image(self.serve_dir, uuid_of(3))
        for path, etag in etags.items():
            answer = ask(site, path, If_None_Match=etag)
            self.assertEqual(answer.status, 200)
            self.assertNotEqual(answer.headers["etag"], etag)
        shutil.rmtree(os.path.join(self.serve_dir, uuid_of(3)))
        for path, etag in etags.items():
            self.assertEqual(ask(site, path, If_None_Match=etag).status, 304)

    def test_the_same_after_a_restart(self):
        first, second = self.site(), self.site()
        for path in LISTS + MANIFESTS:
            self.assertEqual(ask(first, path).headers["etag"], ask(second, path).headers["etag"])

    def test_if_match(self):
        site = self.site()
        for path in MANIFESTS:
            etag = ask(site, path).headers["etag"]
            bare = etag.strip('"')
            for value, status in ((etag, 200), ("*", 200), ('"x"', 412), ("nope", 412),
                                  (bare, 200)):
                with self.subTest(path, value=value):
                    answer = ask(site, path, If_Match=value)
                    self.assertEqual(answer.status, status)
                    if status == 412:
                        error = self.assertError(answer, 412, "PreconditionFailed")
                        self.assertEqual(error["message"],
                                         f"if-match '{value}' didn't match etag '{bare}'")

    def test_different_hosts_never_share_one_answer(self):
        site = self.site()
        for path in ("/datasets", f"/datasets/{UUID}"):
            answers = {host: ask(site, path, Host=host) for host in ("a", "b:81", "c")}
            for host, answer in answers.items():
                self.assertIn(f'"http://{host}/datasets/{UUID}/'.encode(), answer.body)
                self.assertEqual(ask(site, path, Host=host).body, answer.body)

    def test_files(self):
        site = self.site()
        for path in FILES:
            with self.subTest(path):
                first = ask(site, path)
                for headers, status in self.of_files(first.headers):
                    for method in ("GET", "HEAD"):
                        with self.subTest(str(headers)[:80], method=method):
                            answer = ask(site, path, method, **headers)
                            self.assertEqual(answer.status, status)
                            if status == 304:
                                self.assertEqual(answer.headers["etag"], first.headers["etag"])
                            elif method == "GET":
                                self.assertEqual(answer.body, first.body)

    @staticmethod
    def of_files(headers):
        """Request headers, and the status that a file with these headers is answered with."""
        etag, date = headers["etag"], headers["last-modified"]
        at = email.utils.parsedate_to_datetime(date).timestamp()
        earlier, later = (email.utils.formatdate(at + delta, usegmt=True) for delta in (-1, 60))
        return (
            ({"If-None-Match": etag}, 304), ({"If-None-Match": "*"}, 304),
            ({"If-None-Match": etag.strip('"')}, 304), ({"If-None-Match": "W/" + etag}, 304),
            ({"If-None-Match": f'"a", {etag} , "b"'}, 304), ({"If-None-Match": '"a"'}, 200),
            ({"If-None-Match": ""}, 200), ({"If-None-Match": "," * 20000}, 200),
            ({"If-Modified-Since": date}, 304), ({"If-Modified-Since": later}, 304),
            ({"If-Modified-Since": earlier}, 200), ({"If-Modified-Since": "garbage"}, 200),
            ({"If-Modified-Since": ""}, 200), ({"If-Modified-Since": "0"}, 200),
            ({"If-Modified-Since": "Mon, 99 Foo 99999 99:99:99 GMT"}, 200),
            ({"If-Modified-Since": "Mon, 01 Jan 0000 00:00:00 +9999999999"}, 200),
            ({"If-Modified-Since": ", " * 10000}, 200),
            ({"If-Modified-Since": "1 Jan 2001 " + "(" * 10000}, 200),
            ({"If-None-Match": '"a"', "If-Modified-Since": later}, 200),
            ({"If-None-Match": etag, "If-Modified-Since": earlier}, 304),
            ({"If-None-Match": etag, "Range": "bytes=0-0"}, 304))

    def test_files_over_both_sockets(self):
        for unix in (False, True):
            with self.serve(unix=unix).connect() as connection:
                first = connection.request(FILES[0])
                for headers, status in self.of_files(first.headers):
                    for method in ("GET", "HEAD"):
                        with self.subTest(str(headers)[:80], unix=unix, method=method):
                            answer = connection.request(FILES[0], method, headers)
                            self.assertEqual(answer.status, status)
                            self.assertEqual("content-length" in answer.headers, status == 200)
                            self.assertEqual(connection.request("/ping").status, 200)


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

    ROUNDS, LIMIT = 20, 0.1   # a corked head takes 0.2 s each time, the fastest too

    def test_a_head_without_a_body_is_sent_at_once(self):
        """HEAD of a file and GET of an empty one: nothing follows that the head could wait for."""
        empty = uuid_of(3)
        write_image(self.serve_dir, empty, b"")
        server = self.serve()
        for method, uuid in (("HEAD", UUID), ("GET", empty), ("HEAD", empty)):
            with self.subTest(method=method, uuid=uuid), server.connect() as connection:
                times = []
                for _ in range(self.ROUNDS):
                    began = time.monotonic()
                    answer = connection.request(f"/datasets/{uuid}/image.zfs.gz", method)
                    times.append(time.monotonic() - began)
                    self.assertEqual((answer.status, answer.body), (200, b""))
                self.assertLess(min(times), self.LIMIT, "the heads are held back")


class Cors(CacheCase):

    def test_any_page_may_read_lists_manifests_and_errors(self):
        server = self.serve()
        for path in LISTS + MANIFESTS + ("/ping", "/", "/nothing", "/images?limit=x"):
            with self.subTest(path):
                answer = server.get(path, {"Origin": "https://elsewhere.example"})
                self.assertEqual(answer.headers["access-control-allow-origin"], "*")
                self.assertNotIn("access-control-allow-credentials", answer.headers)

    def test_options(self):
        for unix in (False, True):
            with self.serve(unix=unix).connect() as connection:
                for path in LISTS + MANIFESTS + FILES + ("/", "/ping"):
                    with self.subTest(path, unix=unix):
                        answer = connection.request(path, "OPTIONS", {
                            "Origin": "https://elsewhere.example",
                            "Access-Control-Request-Method": "GET",
                            "Access-Control-Request-Headers": "accept-version, x-request-id"})
                        self.assertEqual((answer.status, answer.body), (204, b""))
                        headers = answer.headers
                        self.assertNotIn("content-length", headers)
                        self.assertEqual(headers["access-control-allow-origin"], "*")
                        self.assertEqual(headers["allow"], "GET, HEAD, OPTIONS")
                        self.assertEqual(headers["access-control-allow-methods"],
                                         headers["allow"])
                        self.assertEqual(headers["access-control-allow-headers"],
                                         "accept-version, x-request-id")
                        self.assertEqual(connection.request("/ping").status, 200)
                self.assertError(connection.request("/nothing", "OPTIONS"), 404)

    def test_options_reflects_nothing_odd(self):
        site = self.site()
        for path in ("/images", "/datasets"):
            for value in ("<script>", "a:b", "a\tb", "x" * 501, "\u00e9"):
                with self.subTest(path, value=value):
                    answer = ask(site, path, "OPTIONS", Access_Control_Request_Headers=value)
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

    def test_either_or_both_for_each_accept(self):
        site = self.site()
        for names in ((), ("index.html",), ("index.html", "index.json"), ("index.json",)):
            for name, text in (("index.html", "<p>"), ("index.json", "{}")):
                path = os.path.join(self.serve_dir, name)
                if name in names:
                    self.page(name, text)
                elif os.path.exists(path):
                    os.unlink(path)
            for accept, html in ((None, False), ("*/*", False), ("application/json", False),
                                 ("text/html,*/*", True), ("application/xhtml+xml", True)):
                with self.subTest(names=names, accept=accept):
                    answer = ask(site, "/", Accept=accept)
                    self.assertEqual(answer.status, 200)
                    kind = answer.headers["content-type"]
                    if html and "index.html" in names:
                        self.assertEqual((kind, answer.body),
                                         ("text/html; charset=utf-8", b"<p>"))
                    elif html:
                        self.assertEqual(kind, "text/html; charset=utf-8")
                        self.assertIn(b"<h1>SmartOS images</h1>", answer.body)
                    elif "index.json" in names:
                        self.assertEqual((kind, answer.body), ("application/json", b"{}"))
                    else:
                        self.assertEqual(kind, "application/json")
                        hint = answer.json()
                        self.assertEqual((hint["datasets"], hint["images"]),
                                         ("/datasets", "/images"))

    def test_one_of_them_or_none(self):
        server = self.serve()
        html = {"Accept": "text/html"}
        self.assertIn(b"SmartOS images", server.get("/", html).body)
        self.assertEqual(server.get("/").json()["images"], "/images")
        self.page("index.json", '{"a": 1}')
        self.assertIn(b"SmartOS images", server.get("/", html).body)
        self.assertEqual(server.get("/").json(), {"a": 1})
        os.unlink(os.path.join(self.serve_dir, "index.json"))
        self.page("index.html", "<h1>images</h1>")
        self.assertEqual(server.get("/", html).body, b"<h1>images</h1>")
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
