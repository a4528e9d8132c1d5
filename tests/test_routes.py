"""Requests and routes in process: parsers, conditions, ranges, and what the table says."""

import email.utils
import os
import time
import unittest
from unittest import mock

import imgserver
from tests.support import SETTLED, ServerCase, uuid_of, write_image
from tests.test_files import RANGES, SMALL, WHOLE
from tests.test_framing import CODINGS, LENGTHS_OF_NO_USE, NOT_WELL_FORMED, TAKEN_AS_THEY_ARE

U = uuid_of(1)
TARGETS = (                               # target, segments or None (400), query
    ("/", [""], ""), ("/ping", ["ping"], ""), ("/ping/", ["ping"], ""), ("/ping?", ["ping"], ""),
    ("/ping?a=/b?c", ["ping"], "a=/b?c"), ("/a/b/c", ["a", "b", "c"], ""),
    ("//ping", ["", "ping"], ""), ("/a//b", ["a", "", "b"], ""), ("/ping//", ["ping", ""], ""),
    ("http://h", [""], ""), ("http://h/", [""], ""), ("http://h/a/b?c", ["a", "b"], "c"),
    ("HTTPS://h:80/a", ["a"], ""), ("http://h?c", [""], "c"), ("http:///a", ["a"], ""),
    ("/a%2Fb", ["a/b"], ""), ("/%2e%2e/a", ["..", "a"], ""), ("/a%20b", ["a b"], ""),
    ("/caf%C3%A9", ["caf\u00e9"], ""), ("/caf\u00c3\u00a9", ["caf\u00e9"], ""),
    ("/a?%zz", ["a"], "%zz"),
    ("*", None, ""), ("h:80", None, ""), ("ftp://h/a", None, ""), ("ping", None, ""),
    ("/%", None, ""), ("/%z1", None, ""), ("/a%0", None, ""), ("/%00", None, ""),
    ("/%ff", None, ""), ("/\u00ff", None, ""), ("/%C3", None, ""), ("/%ed%a0%80", None, ""),
)
HOSTS = {
    True: ("h", "a.b-c_d", "1.2.3.4", "h:0", "h:80", "h:65535", "h:", "[::1]", "[::1]:80",
           "[::1]:", "a" * 253, "[::ffff:1.2.3.4]"),
    False: ("", ":80", "h:65536", "h:99999", "h:123456", "h:x", "h:80:80", "a b", "u@h", "<b>",
            "a/b", "a" * 254, "::1", "[]", "[::1", "[g]", "h\u00e9", "h:\u0663", "http://h",
            "a,b"),
}
ETAGS = (                                 # If-None-Match, whether it names abc
    ('"abc"', True), ("abc", True), ("*", True), ('W/"abc"', True), ('"x", "abc"', True),
    ('"x",W/"abc" ,"y"', True), ('"x"', False), ("", False), ('"abcd"', False), ("W/*", False),
    (",,,", False), ('"x", *', False),
)
MODIFIED = (                              # If-Modified-Since, whether 2013-04-05T06:07:08Z is not
    ("Fri, 05 Apr 2013 06:07:08 GMT", True), ("Friday, 05-Apr-13 06:07:08 GMT", True),
    ("Fri Apr  5 06:07:08 2013", True), ("Fri, 05 Apr 2013 06:07:07 GMT", False),
    ("Fri Apr  5 06:07:07 2013", False), ("Fri, 05 Apr 2013 08:07:08 +0200", True),
    ("", False), ("yesterday", False), ("Fri, 99 Apr 2013 06:07:08 GMT", False), ("0", False),
    ("Mon, 01 Jan 0000 00:00:00 +9999999999", False),
)


def parse(data):
    """The Request in some bytes.  Raises ApiError as the connection answers it."""
    text = data.decode("latin-1").lstrip("\r\n")
    match = imgserver._HEAD.match(text)
    if match is None:
        imgserver.explain_head(text)
        raise AssertionError(f"not refused, and no head: {data!r}")
    return imgserver.parse_request(match)


class Parsers(unittest.TestCase):

    def test_heads_that_are_not_well_formed(self):
        for name, data in NOT_WELL_FORMED.items():
            with self.subTest(name), self.assertRaises(imgserver.ApiError) as caught:
                parse(data)
            self.assertEqual(caught.exception.status, 400)

    def test_heads_that_are_taken(self):
        for name, data in TAKEN_AS_THEY_ARE.items():
            with self.subTest(name):
                request = parse(data)
                self.assertEqual((request.method, request.segments), ("GET", ["ping"]))
                self.assertEqual(request.length, 0)
                self.assertFalse(request.may_block)

    def test_lengths_of_bodies(self):
        def length(fields):
            return parse(b"POST / HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n").length
        for name, fields in LENGTHS_OF_NO_USE.items():
            with self.subTest(name), self.assertRaises(imgserver.ApiError):
                length(fields)
        for name, (fields, status) in CODINGS.items():
            with self.subTest(name):
                if status == 411:         # which routes take it is for the table to say
                    self.assertIsNone(length(fields))
                else:
                    with self.assertRaises(imgserver.ApiError):
                        length(fields)
        for value in (0, 1, 5 << 40, 10**19 - 1):
            self.assertEqual(length(b"Content-Length: %d\r\n" % value), value)

    def test_targets(self):
        for target, segments, query in TARGETS:
            with self.subTest(target):
                if segments is None:
                    with self.assertRaises(imgserver.ApiError) as caught:
                        imgserver.split_target(target)
                    self.assertEqual(caught.exception.status, 400)
                else:
                    self.assertEqual(imgserver.split_target(target), (segments, query))

    def test_hosts(self):
        for wanted, hosts in HOSTS.items():
            for host in hosts:
                with self.subTest(host):
                    self.assertIs(imgserver.is_host(host), wanted)

    def test_ranges(self):
        for header, wanted in RANGES:
            with self.subTest(header[:40]):
                if wanted == 416:
                    with self.assertRaises(imgserver.ApiError) as caught:
                        imgserver.parse_range(header, 1000)
                    self.assertEqual(caught.exception.status, 416)
                    self.assertEqual(caught.exception.fields, b"Content-Range: bytes */1000\r\n")
                elif wanted is WHOLE:
                    self.assertIsNone(imgserver.parse_range(header, 1000))
                else:
                    first, last = wanted
                    self.assertEqual(imgserver.parse_range(header, 1000),
                                     (first, last - first + 1))

    def test_etags(self):
        for header, wanted in ETAGS:
            with self.subTest(header):
                self.assertIs(imgserver.etag_matches(header, "abc"), wanted)

    def test_dates(self):
        seconds = email.utils.parsedate_to_datetime(MODIFIED[0][0]).timestamp()
        for header, wanted in MODIFIED:
            with self.subTest(header):
                self.assertIs(imgserver.not_modified_since(header, seconds + 0.9), wanted)

    def test_no_header_line_can_be_split(self):
        for value in ("a\r\nb", "a\nb", "\0", "\x1b"):
            with self.assertRaises(ValueError):
                imgserver.header_line("X", value)


class RouteCase(ServerCase):

    def setUp(self):
        super().setUp()
        self.manifest = write_image(self.serve_dir, U, SMALL, channels=["a"])
        with open(os.path.join(self.serve_dir, U, "icon.png"), "wb") as file:
            file.write(b"icon")
        time.sleep(SETTLED)
        clock = mock.patch.object(imgserver.time, "monotonic", return_value=1000.0)
        clock.start()                     # or a slow machine would have to re-check
        self.addCleanup(clock.stop)
        log = imgserver.Log("fatal", os.open(os.devnull, os.O_WRONLY))
        self.addCleanup(os.close, log.fd)
        config = imgserver.Config({"serve_dir": self.serve_dir, "channels": [
            {"name": "a", "default": True}]})
        self.calls = []
        self.site = imgserver.Site(
            config, imgserver.Store(config, log, lambda job: None), log,
            [imgserver.Route(method, pattern, self.call, flags, imgserver.ANYONE)
             for method, pattern, flags in (
                 ("GET", "extra", imgserver.MEMORY), ("PUT", "extra", imgserver.CHUNKED),
                 ("POST", "extra", imgserver.THREAD), ("DELETE", "images/:uuid", imgserver.THREAD),
                 ("POST", "images/:uuid", imgserver.THREAD))])

    def call(self, request, *arguments):
        self.calls.append((request.method, *arguments))
        return imgserver.json_response({})

    def answer(self, target, method="GET", may_block=True, **headers):
        fields = "".join(f"{name.replace('_', '-')}: {value}\r\n"
                         for name, value in headers.items())
        request = parse(f"{method} {target} HTTP/1.1\r\nHost: h\r\n{fields}\r\n".encode("latin-1"))
        request.may_block = may_block
        response = self.site.answer(request)
        self.addCleanup(response.close)
        return response

    def field(self, response, name):
        for line in response.fields.decode("latin-1").split("\r\n"):
            if line.startswith(name + ": "):
                return line[len(name) + 2:]
        return None


class Table(RouteCase):

    def targets(self):
        """(target, {method: Route}) for all rows."""
        for pattern, rows in self.site.table.items():
            yield "/" + pattern.replace(":uuid", U).replace(":file", "image.zfs.gz"), rows

    def test_allow_and_options_tell_what_the_table_has(self):
        for target, rows in self.targets():
            allowed = set(rows) | {"OPTIONS"} | ({"HEAD"} if "GET" in rows else set())
            for method in imgserver.METHODS:
                with self.subTest(target, method=method):
                    response = self.answer(target, method)
                    if method == "OPTIONS":
                        self.assertEqual((response.status, response.length), (204, 0))
                    if method not in allowed:
                        self.assertEqual(response.status, 405)
                    if method == "OPTIONS" or method not in allowed:
                        self.assertEqual(set(self.field(response, "Allow").split(", ")), allowed)
                    else:
                        self.assertNotEqual(response.status, 405)
            self.assertEqual(self.answer(target, "FROBNICATE").status, 501)
        self.assertIn(("DELETE", U), self.calls)
        self.assertIn(("PUT",), self.calls)

    def test_options_and_errors_need_no_thread(self):
        for target, rows in self.targets():
            self.assertEqual(self.answer(target, "OPTIONS", may_block=False).status, 204)
            self.assertEqual(self.answer(target, "TRACE", may_block=False).status, 405)
        for target in ("/nothing", "/datasets/ABCDEF01" + U[8:], f"/images/{U}/nothing", "//ping",
                       "/images%2F:uuid", "/images/:uuid", f"/datasets/{U}/a/b"):
            self.assertEqual(self.answer(target, may_block=False).status, 404)

    def test_a_thread_where_the_flags_say_so_and_only_there(self):
        for target, rows in self.targets():
            for method, route in rows.items():
                with self.subTest(target, method=method):
                    self.calls.clear()
                    if route.flags:
                        with self.assertRaises(imgserver.NeedsThread):
                            self.answer(target, method, may_block=False)
                        self.assertEqual(self.calls, [])
                    else:
                        first = self.answer(target, method)
                        again = self.answer(target, method, may_block=False)
                        self.assertEqual((again.status, again.fields, again.length),
                                         (first.status, first.fields, first.length))

    def test_what_is_not_in_memory_yet_needs_a_thread(self):
        for target in ("/datasets", "/images", f"/datasets/{U}", f"/images/{U}", "/images?name=x"):
            with self.subTest(target), self.assertRaises(imgserver.NeedsThread):
                self.answer(target, may_block=False)

    def test_a_route_is_looked_up_once(self):
        request = parse(f"GET /datasets/{U} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        with self.assertRaises(imgserver.NeedsThread):
            self.site.answer(request)
        self.assertEqual((request.route.pattern, request.arguments), ("datasets/:uuid", [U]))
        request.may_block = True
        self.site.table.clear()
        self.assertEqual(self.site.answer(request).status, 200)

    def test_which_bodies_are_taken(self):
        length, chunked = {"Content_Length": 5}, {"Transfer_Encoding": "chunked"}
        for method, target, fields, status in (
                ("PUT", "/extra", length, 200), ("PUT", "/extra", chunked, 200),
                ("POST", "/extra", length, 200), ("POST", "/extra", chunked, 411),
                ("DELETE", f"/images/{U}", length, 200), ("DELETE", f"/images/{U}", chunked, 411),
                ("GET", "/extra", length, 400), ("GET", "/extra", chunked, 411),
                ("HEAD", "/extra", length, 400), ("OPTIONS", "/extra", length, 400),
                ("POST", "/ping", length, 405), ("POST", "/ping", chunked, 411),
                ("POST", "/nothing", length, 404), ("GET", "/nothing", length, 400)):
            with self.subTest(target, method=method, fields=fields):
                self.assertEqual(self.answer(target, method, **fields).status, status)

    def test_errors_of_routes(self):
        def fails(error):
            def handler(request):
                raise error
            self.site.table["extra"]["GET"] = imgserver.Route(
                "GET", "extra", handler, imgserver.MEMORY, imgserver.ANYONE)
            return self.answer("/extra")
        response = fails(imgserver.ApiError(409, "Conflict", "no", fields=b"X: y\r\n"))
        self.assertEqual((response.status, self.field(response, "X")), (409, "y"))
        response = fails(OSError(5, "Input/output error", "/secret"))
        self.assertEqual(response.status, 503)
        self.assertNotIn(b"secret", response.body)
        self.assertEqual(self.field(response, "Retry-After"), "10")
        for error in (imgserver.ClientGone("gone"), KeyError("x")):
            with self.assertRaises(type(error)):
                fails(error)


class Conditions(RouteCase):

    def test_lists_and_manifests(self):
        for target in ("/datasets", "/images", f"/datasets/{U}", f"/images/{U}"):
            etag = self.field(self.answer(target), "ETag")
            self.assertRegex(etag, '^"[0-9a-f]{40}(-1)?"$')
            for method in ("GET", "HEAD"):
                for header, status in ((etag, 304), (etag.strip('"'), 304), ("*", 304),
                                       ('"x"', 200)):
                    with self.subTest(target, header=header):
                        response = self.answer(target, method, may_block=False,
                                               If_None_Match=header)
                        self.assertEqual(response.status, status)
                        self.assertEqual(self.field(response, "ETag"), etag)
                        self.assertEqual(response.length == 0, status == 304)
        etag = self.field(self.answer(f"/images/{U}"), "ETag")
        for header, status in (('"x"', 412), (etag, 200)):
            self.assertEqual(self.answer(f"/images/{U}", If_Match=header).status, status)

    def test_files(self):
        first = self.answer(f"/images/{U}/file")
        etag, date = self.field(first, "ETag"), self.field(first, "Last-Modified")
        self.assertEqual((first.status, first.length, first.offset), (200, 1000, 0))
        for headers, wanted in (
                ({"If_None_Match": etag}, (304, 0)), ({"If_Modified_Since": date}, (304, 0)),
                ({"If_None_Match": '"x"', "If_Modified_Since": date}, (200, 1000)),
                ({"Range": "bytes=10-19"}, (206, 10)),
                ({"Range": "bytes=10-19", "If_Range": etag}, (206, 10)),
                ({"Range": "bytes=10-19", "If_Range": date}, (200, 1000)),
                ({"Range": "bytes=10-19", "If_Range": etag.strip('"')}, (200, 1000)),
                ({"Range": "bytes=10-19", "If_None_Match": etag}, (304, 0))):
            for target in (f"/images/{U}/file", f"/datasets/{U}/image.zfs.gz"):
                with self.subTest(target, headers=headers):
                    response = self.answer(target, **headers)
                    self.assertEqual((response.status, response.length), wanted)
                    self.assertEqual(response.file is None, wanted[0] == 304)
                    self.assertEqual(self.field(response, "ETag"), etag)

    def test_files_that_are_not_the_answer_are_closed(self):
        before = len(os.listdir("/proc/self/fd"))
        for headers in ({"If_None_Match": "*"}, {"Range": "bytes=1000-"}):
            for target in (f"/images/{U}/file", f"/images/{U}/icon"):
                self.assertIn(self.answer(target, **headers).status, (304, 416))
        self.assertEqual(len(os.listdir("/proc/self/fd")), before)

    def test_caching_as_it_is_meant_for_each(self):
        never, briefly = "private, no-cache", "public, max-age=1, stale-if-error=86400"
        for target, wanted in (("/datasets", never), (f"/datasets/{U}", never),
                               ("/datasets?name=t", never), ("/images", briefly),
                               (f"/images/{U}", briefly), ("/images?name=t", briefly),
                               (f"/images/{U}/icon", briefly),
                               (f"/images/{U}/file", "public, max-age=86400"),
                               (f"/datasets/{U}/image.zfs.gz", "public, max-age=86400")):
            with self.subTest(target):
                self.assertEqual(self.field(self.answer(target), "Cache-Control"), wanted)


if __name__ == "__main__":
    unittest.main()
