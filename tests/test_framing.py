"""Where a request begins and ends: heads, limits, bodies, pipelines, over both sockets."""

import threading
import time

from tests.support import OneServer, ServerCase, uuid_of, wait_for, write_image

IMAGE = uuid_of(1)
DATA = b"one small image"
FILE = f"/datasets/{IMAGE}/image.zfs.gz"
PING = b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n"
SECOND = b"GET /second HTTP/1.1\r\nHost: a\r\n\r\n"      # must never be run from within a body

# Each is a whole head, up to its blank line, and is refused with 400.
NOT_WELL_FORMED = {
    "no Host on 1.1": b"GET /ping HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET /ping HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    "two Hosts in two cases": b"GET /ping HTTP/1.1\r\nHost: a\r\nhOST: b\r\n\r\n",
    "two Hosts on 1.0": b"GET /ping HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n",
    "empty Host": b"GET /ping HTTP/1.1\r\nHost:\r\n\r\n",
    "space before the colon": b"GET /ping HTTP/1.1\r\nHost : a\r\n\r\n",
    "tab before the colon": b"GET /ping HTTP/1.1\r\nHost: a\r\nX\t: b\r\n\r\n",
    "folded line": b"GET /ping HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
    "folded with a tab": b"GET /ping HTTP/1.1\r\nHost: a\r\nX: b\r\n\tc\r\n\r\n",
    "folded first line": b"GET /ping HTTP/1.1\r\n Host: a\r\n\r\n",
    "bare CR in a value": b"GET /ping HTTP/1.1\r\nHost: a\r\nX: b\rY: c\r\n\r\n",
    "bare CR in the request line": b"GET /ping\rx HTTP/1.1\r\nHost: a\r\n\r\n",
    "bare CR for a line end": b"GET /ping HTTP/1.1\rHost: a\r\n\r\n",
    "NUL in a value": b"GET /ping HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n",
    "NUL in a name": b"GET /ping HTTP/1.1\r\nHost: a\r\nX\0: b\r\n\r\n",
    "NUL in the target": b"GET /pi\0ng HTTP/1.1\r\nHost: a\r\n\r\n",
    "ESC in a value": b"GET /ping HTTP/1.1\r\nHost: a\r\nX: \x1b[31m\r\n\r\n",
    "line without a colon": b"GET /ping HTTP/1.1\r\nHost: a\r\nnothing\r\n\r\n",
    "empty name": b"GET /ping HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n",
    "name with a bracket": b"GET /ping HTTP/1.1\r\nHost: a\r\nX[1]: b\r\n\r\n",
    "HTTP/0.9": b"GET /ping\r\n\r\n",
    "no target": b"GET HTTP/1.1\r\nHost: a\r\n\r\n",
    "empty target": b"GET  HTTP/1.1\r\nHost: a\r\n\r\n",
    "two spaces": b"GET  /ping HTTP/1.1\r\nHost: a\r\n\r\n",
    "tab between": b"GET\t/ping\tHTTP/1.1\r\nHost: a\r\n\r\n",
    "space at the end": b"GET /ping HTTP/1.1 \r\nHost: a\r\n\r\n",
    "space in the target": b"GET /pi ng HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/1.1.1": b"GET /ping HTTP/1.1.1\r\nHost: a\r\n\r\n",
    "HTTP/+1.1": b"GET /ping HTTP/+1.1\r\nHost: a\r\n\r\n",
    "HTTP/1.10": b"GET /ping HTTP/1.10\r\nHost: a\r\n\r\n",
    "HTTP/1": b"GET /ping HTTP/1\r\nHost: a\r\n\r\n",
    "HTTP/1.": b"GET /ping HTTP/1.\r\nHost: a\r\n\r\n",
    "http in lower case": b"GET /ping http/1.1\r\nHost: a\r\n\r\n",
    "FOO/1.1": b"GET /ping FOO/1.1\r\nHost: a\r\n\r\n",
    "NUL in the method": b"G\0T /ping HTTP/1.1\r\nHost: a\r\n\r\n",
    "bracket in the method": b"G(T /ping HTTP/1.1\r\nHost: a\r\n\r\n",
    "nonsense": b"hello\r\n\r\n",
}

# Values of Transfer-Encoding header lines, and what answers them.  None of their bodies is read.
CODINGS = {
    "chunked": (b"Transfer-Encoding: chunked\r\n", 411),
    "Chunked": (b"Transfer-Encoding: Chunked\r\n", 411),
    "identity": (b"Transfer-Encoding: identity\r\n", 400),
    "gzip": (b"Transfer-Encoding: gzip\r\n", 400),
    "gzip, chunked": (b"Transfer-Encoding: gzip, chunked\r\n", 400),
    "chunked, chunked": (b"Transfer-Encoding: chunked, chunked\r\n", 400),
    "xchunked": (b"Transfer-Encoding: xchunked\r\n", 400),
    "empty": (b"Transfer-Encoding:\r\n", 400),
    "chunked twice": (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 400),
    "beside a length": (b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", 400),
    "before a length of 0": (b"Transfer-Encoding: chunked\r\nContent-Length: 0\r\n", 400),
}

LENGTHS_OF_NO_USE = {
    "two that differ": b"Content-Length: 5\r\nContent-Length: 6\r\n",
    "the same twice": b"Content-Length: 5\r\nContent-Length: 5\r\n",
    "0 twice": b"Content-Length: 0\r\nContent-Length: 0\r\n",
    "a list": b"Content-Length: 5, 5\r\n",
    "negative": b"Content-Length: -1\r\n",
    "with a sign": b"Content-Length: +5\r\n",
    "underscore": b"Content-Length: 1_0\r\n",
    "Arabic digit": b"Content-Length: \xd9\xa3\r\n",
    "superscript digit": b"Content-Length: \xb2\r\n",
    "hexadecimal": b"Content-Length: 0x5\r\n",
    "20 digits": b"Content-Length: " + b"9" * 20 + b"\r\n",
    "20 zeros": b"Content-Length: " + b"0" * 20 + b"\r\n",
    "decimal point": b"Content-Length: 5.0\r\n",
    "inner space": b"Content-Length: 5 5\r\n",
    "empty": b"Content-Length:\r\n",
    "a word": b"Content-Length: five\r\n",
}

# Requests that may arrive as they are, however odd.
TAKEN_AS_THEY_ARE = {
    "bare LF line ends": b"GET /ping HTTP/1.1\nHost: a\n\n",
    "CRLF and LF mixed": b"GET /ping HTTP/1.1\r\nHost: a\nX: b\r\n\n",
    "one leading CRLF": b"\r\n" + PING,
    "some leading line ends": b"\r\n\n\r\n" + PING,
    "Content-Length 0": b"GET /ping HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    "Content-Length 000": b"GET /ping HTTP/1.1\r\nHost: a\r\nContent-Length: 000\r\n\r\n",
    "no Host on 1.0": b"GET /ping HTTP/1.0\r\n\r\n",
    "no space after the colon": b"GET /ping HTTP/1.1\r\nHost:a\r\n\r\n",
    "tabs around a value": b"GET /ping HTTP/1.1\r\nHost:\t a \t\r\n\r\n",
    "an empty value": b"GET /ping HTTP/1.1\r\nHost: a\r\nX:\r\n\r\n",
    "latin-1 in a value": b"GET /ping HTTP/1.1\r\nHost: a\r\nX: caf\xe9\r\n\r\n",
    "HTTP/1.2": b"GET /ping HTTP/1.2\r\nHost: a\r\n\r\n",
    "a field twice": b"GET /ping HTTP/1.1\r\nHost: a\r\nAccept: x\r\nAccept: y\r\n\r\n",
}


def request(method, target="/ping", fields=b"", version="1.1"):
    return f"{method} {target} HTTP/{version}\r\nHost: a\r\n".encode() + fields + b"\r\n"


class Framing(OneServer):
    """The cases; each is run once on TCP and once on a Unix socket."""

    @classmethod
    def fill(cls):
        write_image(cls.images, IMAGE, DATA)

    def refused(self, data, status, code=None):
        """`data` gets one error answer, which ends the connection though the client stays."""
        with self.server.connect() as connection:
            connection.send(data)
            answer = connection.answer()
            self.assertIsNotNone(answer, "closed without an answer")
            self.assertError(answer, status, code)
            self.assertEqual(answer.headers.get("connection"), "close")
            self.assertEqual(connection.rest(), b"", "something came after the error")
            return answer

    def taken(self, data):
        """`data` gets 200, and the connection can be used again."""
        with self.server.connect() as connection:
            connection.send(data)
            answer = connection.answer()
            self.assertEqual(answer.status, 200, answer)
            if b"HTTP/1.0" not in data:
                self.assertEqual(connection.request("/ping").status, 200)
            return answer

    def test_ping(self):
        answer = self.taken(PING)
        self.assertEqual(answer.headers["content-type"], "application/json")
        self.assertEqual(answer.json()["ping"], "pong")
        self.assertIs(answer.json()["imgapi"], True)

    def test_heads_that_are_taken(self):
        for name, data in TAKEN_AS_THEY_ARE.items():
            with self.subTest(name):
                self.taken(data)

    def test_heads_that_are_not_well_formed(self):
        for name, data in NOT_WELL_FORMED.items():
            with self.subTest(name):
                self.refused(data + SECOND, 400, "BadRequestError")
        self.assertNotIn("/second", self.server.log())

    def test_refused_head_has_no_body(self):
        for name, head, status in (("no Host", b"HEAD /ping HTTP/1.1\r\n\r\n", 400),
                                   ("body", request("HEAD", fields=b"Content-Length: 5\r\n"), 400),
                                   ("chunked", request("HEAD", fields=CODINGS["chunked"][0]), 411),
                                   ("HTTP/2.0", request("HEAD", version="2.0"), 505),
                                   ("no such path", request("HEAD", "/nothing"), 404)):
            with self.subTest(name):
                data = self.server.raw(head)
                self.assertRegex(data, b"^HTTP/1.1 %d " % status)
                self.assertRegex(data, rb"Content-Length: [1-9]")
                self.assertTrue(data.endswith(b"\r\n\r\n"), data)

    def test_host_of_http_1_0_without_one(self):
        data = self.server.raw(f"GET /datasets/{IMAGE} HTTP/1.0\r\n\r\n".encode())
        self.assertRegex(data, b"^HTTP/1.1 200 ")
        own = "localhost" if self.unix else "127.0.0.1:%d" % self.server.address[1]
        self.assertIn(f'"url": "http://{own}{FILE}"'.encode(), data)

    # bodies

    def test_second_request_in_the_body_of_a_get_is_not_run(self):
        for method in ("GET", "OPTIONS"):
            with self.subTest(method):
                fields = b"Content-Length: %d\r\n" % len(SECOND)
                self.refused(request(method, fields=fields) + SECOND, 400, "BadRequestError")
        self.assertNotIn("/second", self.server.log())

    def test_any_transfer_encoding_is_refused(self):
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SECOND), SECOND)
        for name, (fields, status) in CODINGS.items():
            for method in ("GET", "POST"):
                with self.subTest(name, method=method):
                    self.refused(request(method, fields=fields) + body + SECOND, status)
        self.assertNotIn("/second", self.server.log())

    def test_content_length_that_is_no_number(self):
        for name, fields in LENGTHS_OF_NO_USE.items():
            for method in ("GET", "POST"):
                with self.subTest(name, method=method):
                    self.refused(request(method, fields=fields) + SECOND, 400,
                                 "BadRequestError")
        self.assertNotIn("/second", self.server.log())

    def test_content_length_with_a_space_after_it(self):
        self.refused(request("GET", fields=b"Content-Length: 5 \r\n") + b"12345", 400)

    def test_refusal_is_readable_while_the_client_still_sends(self):
        size = 8 << 20
        server = self.serve(unix=self.unix, prelude="imgserver.LINGER = 60")
        with server.connect() as connection:
            connection.send(request("POST", fields=b"Content-Length: %d\r\n" % size))
            for _ in range(size >> 16):
                connection.send(bytes(1 << 16))       # a reset would end this
            self.assertError(connection.answer(), 405)
            self.assertEqual(connection.rest(), b"")

    def test_client_that_never_stops_sending_is_cut(self):
        server = self.serve(unix=self.unix, config={"header_timeout": 1},
                            prelude="imgserver.LINGER = 0.3")
        with server.connect() as connection:
            connection.send(request("POST", fields=b"Content-Length: 99999999999\r\n"))

            def cut():
                try:
                    connection.send(bytes(1 << 16))
                except OSError:
                    return True
            wait_for(cut, "the end of the connection")

    # versions

    def test_other_major_versions_get_505(self):
        for version in ("2.0", "3.0", "0.9", "9.9"):
            with self.subTest(version):
                self.refused(request("GET", version=version), 505)

    def test_http_2_preface_gets_505(self):
        self.refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505)

    def test_http_0_9_is_refused_without_waiting_for_more(self):
        for line in (b"GET /ping\r\n", b"GET /ping\n", b"GET /\r\n"):
            with self.subTest(line):
                self.refused(line, 400)

    # limits

    def test_request_line_limit(self):
        longest = 8192 - len("GET / HTTP/1.1\r")
        for length, status in ((longest, 404), (longest + 2, 414), (60_000, 414)):
            with self.subTest(length):
                with self.server.connect() as connection:
                    connection.send(request("GET", "/" + "a" * length))
                    answer = connection.answer()
                    self.assertError(answer, status)
                    self.assertEqual(answer.headers.get("connection", "") == "close",
                                     status == 414)

    def test_endless_request_line_gets_414_before_its_end(self):
        self.refused(b"GET /" + b"a" * 9000, 414)

    def test_number_of_header_lines(self):
        for count, status in ((100, 200), (101, 431), (3000, 431)):
            with self.subTest(count):
                data = request("GET", fields=b"".join(b"X%d: y\r\n" % number
                                                      for number in range(count - 1)))
                if status == 200:
                    self.taken(data)
                else:
                    self.refused(data, 431)

    def test_size_of_a_head(self):
        for size, status in ((32000, 200), (33000, 431)):
            with self.subTest(size):
                fields = b"".join(b"X%d: %b\r\n" % (number, b"y" * (size // 10 - 6))
                                  for number in range(10))
                if status == 200:
                    self.taken(request("GET", fields=fields))
                else:
                    self.refused(request("GET", fields=fields), 431)

    def test_endless_header_line_gets_431_and_memory_stays_flat(self):
        self.server.get("/ping")
        before = self.server.memory("VmRSS")
        with self.server.connect() as connection:
            connection.send(b"GET /ping HTTP/1.1\r\nHost: a\r\nX: ")
            sent = 0
            try:
                while sent < 32 << 20:
                    connection.send(b"y" * (1 << 16))
                    sent += 1 << 16
            except OSError:
                self.assertGreater(sent, 32 << 10)
            self.assertError(connection.answer(), 431)
        self.assertLess(self.server.memory("VmRSS") - before, 8 << 20)

    # pipelines and keep-alive

    def test_two_pipelined_requests_get_two_answers_in_order(self):
        with self.server.connect() as connection:
            connection.send(request("GET", FILE) + PING + request("HEAD", FILE) + PING)
            self.assertEqual(connection.answer().body, DATA)
            self.assertEqual(connection.answer().json()["ping"], "pong")
            head = connection.answer("HEAD")
            self.assertEqual(head.headers["content-length"], str(len(DATA)))
            self.assertEqual(connection.answer().json()["ping"], "pong")

    def test_two_thousand_pipelined_requests(self):
        count = 2000
        with self.server.connect() as connection:
            data = b"".join(request("GET", f"/ping{number}") for number in range(count))
            threading.Thread(target=connection.send, args=(data,)).start()    # while it reads
            for number in range(count):
                self.assertIn(f"/ping{number} ", connection.answer().json()["message"])

    def test_request_that_comes_byte_by_byte(self):
        with self.server.connect() as connection:
            for _ in range(2):
                for number in range(len(PING)):
                    connection.send(PING[number:number + 1])
                self.assertEqual(connection.answer().status, 200)

    def test_request_in_two_parts_cut_anywhere(self):
        with self.server.connect() as connection:
            for cut in range(1, len(PING)):
                connection.send(PING[:cut])
                time.sleep(0.001)                      # or both parts would arrive as one
                connection.send(PING[cut:])
                self.assertEqual(connection.answer().status, 200, cut)

    def test_connection_header_tells_the_truth(self):
        for name, version, value, stays in (("1.1", "1.1", None, True),
                                            ("close", "1.1", "close", False),
                                            ("CLOSE", "1.1", "CLOSE", False),
                                            ("close, x", "1.1", "close, x", False),
                                            ("x,close", "1.1", "x,close", False),
                                            ("closer", "1.1", "closer", True),
                                            ("1.0", "1.0", None, False),
                                            ("1.0 keep-alive", "1.0", "keep-alive", True),
                                            ("1.0 both", "1.0", "keep-alive, close", False)):
            with self.subTest(name), self.server.connect() as connection:
                answer = connection.request("/ping", headers={"Connection": value},
                                            version=version)
                self.assertEqual(answer.status, 200)
                said = answer.headers.get("connection")
                if stays:
                    self.assertEqual(said, "keep-alive" if version == "1.0" else None)
                    self.assertEqual(connection.request("/ping").status, 200)
                else:
                    self.assertEqual(said, "close")
                    self.assertTrue(connection.closed())

    def test_two_connection_headers_of_which_one_says_close(self):
        data = self.server.raw(request("GET", fields=b"Connection: x\r\nConnection: close\r\n")
                               + SECOND)
        self.assertEqual(data.count(b"HTTP/1.1 "), 1)

    def test_client_that_half_closes_after_its_request_is_answered(self):
        data = self.server.raw(request("GET", FILE))
        self.assertRegex(data, b"^HTTP/1.1 200 ")
        self.assertTrue(data.endswith(DATA))

    # Expect, methods, what is no HTTP

    def test_expect_100_continue_on_a_get_gets_its_answer_at_once(self):
        for target, status in (("/ping", 200), (FILE, 200), ("/nothing", 404)):
            with self.subTest(target):
                data = self.server.raw(request("GET", target, b"Expect: 100-continue\r\n"))
                self.assertRegex(data, b"^HTTP/1.1 %d " % status)
                self.assertNotIn(b" 100 Continue", data)

    def test_expect_100_continue_on_what_is_refused_gets_no_100(self):
        self.refused(request("POST", fields=b"Expect: 100-continue\r\nContent-Length: 5\r\n"), 405)

    def test_other_expectations_get_417(self):
        for value in (b"bananas", b"", b"100-continue, bananas", b"200-ok"):
            with self.subTest(value):
                self.refused(request("GET", fields=b"Expect: " + value + b"\r\n"), 417)

    def test_method_that_a_route_does_not_have(self):
        for target in ("/ping", "/datasets", f"/datasets/{IMAGE}", FILE, "/images",
                       f"/images/{IMAGE}", f"/images/{IMAGE}/file", "/"):
            for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE"):
                with self.subTest(target, method=method), self.server.connect() as connection:
                    answer = connection.request(target, method)
                    self.assertError(answer, 405, "MethodNotAllowedError")
                    self.assertEqual(answer.headers["allow"], "GET, HEAD, OPTIONS")
                    self.assertEqual(connection.request("/ping").status, 200)

    def test_allow_is_true(self):
        for method in ("GET", "HEAD", "OPTIONS"):
            for target in ("/ping", "/datasets", FILE, f"/images/{IMAGE}"):
                with self.subTest(method, target=target):
                    answer = self.server.get(target, method=method)
                    self.assertEqual(answer.status, 204 if method == "OPTIONS" else 200)

    def test_method_with_a_body_that_a_route_does_not_have_closes(self):
        for method in ("POST", "PUT", "DELETE"):
            with self.subTest(method):
                fields = b"Content-Length: %d\r\n" % len(SECOND)
                answer = self.refused(request(method, "/datasets", fields) + SECOND, 405)
                self.assertEqual(answer.headers["allow"], "GET, HEAD, OPTIONS")
        self.assertNotIn("/second", self.server.log())

    def test_unknown_methods_get_501(self):
        for method in ("get", "Get", "FROBNICATE", "GETS", "PROPFIND"):
            with self.subTest(method):
                self.assertError(self.server.get("/ping", method=method), 501)

    def test_other_method_on_a_path_that_is_not_there_gets_404(self):
        self.assertError(self.server.get("/nothing", method="POST"), 404)

    def test_tls_client_hello_gets_400_and_one_log_line(self):
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(32)) + b"\x00" * 400
        server = self.serve(unix=self.unix, config={"max_connections": 100})
        with server.connect() as connection:
            connection.send(hello)
            self.assertError(connection.answer(), 400)
            self.assertTrue(connection.closed())
        server.stop()
        first, *lines, last = server.log().splitlines()
        self.assertEqual(len(lines), 1, lines)
        self.assertIn('"\\x16\\x03\\x01', lines[0])

    def test_other_protocols_are_refused_at_once(self):
        for name, data in (("SSH", b"SSH-2.0-OpenSSH_9.6\r\n"),
                           ("SMTP", b"EHLO example.com\r\n"),
                           ("NULs", bytes(64)), ("0xff", b"\xff\xfb\x1f\r\n"),
                           ("JSON", b'{"jsonrpc": "2.0"}'),
                           ("PROXY", b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n")):
            with self.subTest(name):
                self.refused(data, 400)

    def test_nothing_but_line_ends_is_no_request(self):
        self.assertEqual(self.server.raw(b"\r\n" * 5000), b"")

    def test_connection_that_sends_nothing_gets_nothing(self):
        self.assertEqual(self.server.raw(b""), b"")

    def test_unfinished_head_gets_no_answer_when_the_client_ends_it(self):
        self.assertEqual(self.server.raw(b"GET /second HTTP/1.1\r\nHost: a\r\n"), b"")
        self.assertNotIn("/second", self.server.log())


class FramingOverTcp(Framing, ServerCase):
    unix = False


class FramingOverUnix(Framing, ServerCase):
    unix = True
