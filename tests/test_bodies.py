"""Bodies of requests: a body is never taken for a request, and a request never for a body.

The routes that take them stand here alone: PUT /upload (also chunked), POST /upload (with a
length), PUT /refused, POST /some (reads ten bytes), DELETE /plain (no body is read).
"""

import hashlib
import os
import random
import signal
import socket
import threading
import types
import unittest

import imgserver
from tests.support import (PATIENCE, OneServer, ServerCase, readable, uuid_of, wait_for,
                           write_image)
from tests.test_files import reset

ROUTES = """
import hashlib

def upload(request):
    digest, size = hashlib.sha1(), 0
    while True:
        data = request.body.read(100_000)
        if not data:
            return imgserver.json_response({"size": size, "sha1": digest.hexdigest()})
        digest.update(data)
        size += len(data)

def refused(request):
    raise imgserver.ApiError(422, "Refused", "not this one")

def some(request):
    return imgserver.json_response({"begin": request.body.read(10).decode("latin-1")})

def plain(request):
    return imgserver.json_response({"plain": True})

class Site(imgserver.Site):
    def __init__(self, config, store, log):
        super().__init__(config, store, log, [
            imgserver.Route("PUT", "upload", upload, imgserver.CHUNKED, imgserver.ANYONE),
            imgserver.Route("POST", "upload", upload, imgserver.THREAD, imgserver.ANYONE),
            imgserver.Route("PUT", "refused", refused, imgserver.CHUNKED, imgserver.ANYONE),
            imgserver.Route("POST", "some", some, imgserver.THREAD, imgserver.ANYONE),
            imgserver.Route("DELETE", "plain", plain, imgserver.THREAD, imgserver.ANYONE)])
imgserver.Site = Site
imgserver.LINGER = 60
"""
PING = b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n"
SECOND = b"GET /second HTTP/1.1\r\nHost: a\r\n\r\n"      # must never be run from within a body
CHUNKED = "Transfer-Encoding: chunked\r\n"
WRONG_CHUNKS = {
    "no number": b"x\r\nhello\r\n0\r\n\r\n",
    "17 digits": b"00000000000000005\r\nhello\r\n0\r\n\r\n",
    "17 digits of a large number": b"fffffffffffffffff\r\nhello",
    "empty line": b"\r\nhello\r\n0\r\n\r\n",
    "sign": b"+5\r\nhello\r\n0\r\n\r\n",
    "negative": b"-5\r\nhello\r\n0\r\n\r\n",
    "0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "space before": b" 5\r\nhello\r\n0\r\n\r\n",
    "space behind": b"5 \r\nhello\r\n0\r\n\r\n",
    "underscore": b"0_5\r\nhello\r\n0\r\n\r\n",
    "extension": b"5;a=b\r\nhello\r\n0\r\n\r\n",
    "long extension": b"5;" + b"a" * 5000 + b"\r\nhello\r\n0\r\n\r\n",
    "extension of the last": b"5\r\nhello\r\n0;a\r\n\r\n",
    "trailer": b"5\r\nhello\r\n0\r\nX: y\r\n\r\n",
    "bare LF behind the size": b"5\nhello\r\n0\r\n\r\n",
    "bare LF behind the data": b"5\r\nhello\n0\r\n\r\n",
    "bare LF at the end": b"5\r\nhello\r\n0\r\n\n",
    "bare CR": b"5\rhello\r\n0\r\n\r\n",
    "data longer than its size": b"5\r\nhello!\r\n0\r\n\r\n",
    "data shorter than its size": b"6\r\nhello\r\n0\r\n\r\n",
    "endless size": b"0" * 5000,
}


def head(method, target, fields="", version="1.1"):
    return f"{method} {target} HTTP/{version}\r\nHost: a\r\n{fields}\r\n".encode()


def with_length(data, method="PUT", target="/upload", fields=""):
    return head(method, target, f"Content-Length: {len(data)}\r\n{fields}") + data


def chunks(rng, data):
    """`data` in the chunked coding, cut anywhere."""
    coded = b""
    while data:
        size = rng.choice((1, 2, 15, 16, 17, 1000, 100_000))
        coded += rng.choice((b"%x", b"%X", b"%04x", b"%016X")) % len(data[:size])
        coded += b"\r\n" + data[:size] + b"\r\n"
        data = data[size:]
    return coded + rng.choice((b"0", b"000", b"0" * 16)) + b"\r\n\r\n"


class Bodies(OneServer):
    """The cases; each is run once on TCP and once on a Unix socket."""

    prelude = ROUTES
    bad_lines = "Traceback| error |/second"

    def assertTaken(self, answer, data):
        self.assertEqual(answer.status, 200, answer)
        self.assertEqual(answer.json(), {"size": len(data),
                                         "sha1": hashlib.sha1(data).hexdigest()})

    def refused(self, data, status, half_close=False):
        """`data` gets one error answer, which ends the connection."""
        with self.server.connect() as connection:
            connection.send(data)
            if half_close:
                connection.sock.shutdown(socket.SHUT_WR)
            answer = connection.answer()
            self.assertIsNotNone(answer, "closed without an answer")
            self.assertError(answer, status)
            self.assertEqual(answer.headers["connection"], "close")
            self.assertEqual(connection.rest(), b"", "something came after the error")
            return answer

    # with a length

    def test_bodies_of_all_sizes_one_after_the_other(self):
        with self.server.connect() as connection:
            for size in (0, 1, 10, (16 << 10) - 1, 16 << 10, 65536, 100_001, 3 << 20):
                for method in ("PUT", "POST"):
                    with self.subTest(size, method=method):
                        data = os.urandom(size)
                        connection.send(with_length(data, method))
                        self.assertTaken(connection.answer(), data)

    def test_a_body_that_comes_byte_by_byte(self):
        data = SECOND
        with self.server.connect() as connection:
            for part in with_length(data) + PING:
                connection.send(bytes([part]))
            self.assertTaken(connection.answer(), data)
            self.assertEqual(connection.answer().json()["ping"], "pong")

    def test_requests_before_and_behind_a_body_are_answered_in_order(self):
        data = SECOND * 2000
        with self.server.connect() as connection:
            sent = (PING + with_length(data) + PING + with_length(b"")
                    + with_length(SECOND, "POST") + PING)
            threading.Thread(target=connection.send, args=(sent,)).start()
            for wanted in (None, data, None, b"", SECOND, None):
                answer = connection.answer()
                if wanted is None:
                    self.assertEqual(answer.json()["ping"], "pong")
                else:
                    self.assertTaken(answer, wanted)

    def test_more_bytes_than_announced_are_the_next_request(self):
        with self.server.connect() as connection:
            connection.send(with_length(b"hello") + b"GET /third HTTP/1.1\r\nHost: a\r\n\r\n")
            self.assertTaken(connection.answer(), b"hello")
            self.assertError(connection.answer(), 404)

    def test_fewer_bytes_than_announced_get_no_answer_and_one_line(self):
        for leave in (lambda sock: sock.shutdown(socket.SHUT_WR), reset):
            for body in (head("PUT", "/upload", "Content-Length: 50\r\n") + b"x" * 20,
                         head("PUT", "/upload", CHUNKED) + b"a\r\n0123456789\r\n",
                         head("PUT", "/upload", CHUNKED) + b"a\r\n01234"):
                with self.subTest(body), self.server.connect() as connection:
                    before = self.server.log().count(" 499 ")
                    connection.send(body)
                    wait_for(lambda: self.server.threads() > 1)
                    leave(connection.sock)
                    if leave is not reset:
                        self.assertEqual(connection.rest(), b"")
                    wait_for(lambda: self.server.log().count(" 499 ") > before, "the line")
                    self.assertEqual(self.server.log().count(" 499 "), before + 1)
                    self.assertRegex(self.server.log(), r'"PUT /upload HTTP/1.1" 499 0 '
                                                        r'\S+ms - "" \(the client went away')

    def test_a_client_that_goes_before_it_is_asked_for_its_body(self):
        for _ in range(20):
            connection = self.server.connect()
            connection.send(head("PUT", "/upload", "Content-Length: 5\r\n"
                                                   "Expect: 100-continue\r\n"))
            reset(connection.sock)
        self.assertEqual(self.server.get("/ping").status, 200)
        wait_for(lambda: self.server.log()[self.logged:].count('"PUT /upload HTTP/1.1" 499') == 20,
                 "their lines")

    def test_what_is_left_of_a_body_is_no_request(self):
        for method, target in (("POST", "/some"), ("PUT", "/refused"), ("DELETE", "/plain"),
                               ("DELETE", "/upload"), ("PUT", "/ping"), ("POST", "/nothing")):
            with self.subTest(target, method=method), self.server.connect() as connection:
                connection.send(with_length(b"0123456789" + SECOND, method, target) + SECOND)
                answer = connection.answer()
                self.assertEqual(answer.headers["connection"], "close")
                if target == "/some":
                    self.assertEqual(answer.json(), {"begin": "0123456789"})
                self.assertEqual(connection.rest(), b"")

    def test_a_body_on_get_and_its_like_is_refused(self):
        for method in ("GET", "OPTIONS"):
            self.refused(with_length(SECOND, method), 400)
            self.refused(head(method, "/upload", CHUNKED) + b"0\r\n\r\n", 411)

    def test_a_method_that_a_route_of_bodies_does_not_have(self):
        answer = self.refused(with_length(SECOND, "PATCH"), 405)
        self.assertEqual(answer.headers["allow"], "OPTIONS, POST, PUT")
        with self.server.connect() as connection:
            self.assertEqual(connection.request("/upload", "OPTIONS").headers["allow"],
                             "OPTIONS, POST, PUT")
            self.assertError(connection.request("/upload"), 405)
            self.assertEqual(connection.request("/plain", "DELETE").json(), {"plain": True})

    # chunked

    def test_chunks_cut_anywhere(self):
        for seed in range(10):
            rng = random.Random(seed)
            data = rng.choice((b"", b"x", SECOND * 30, os.urandom(300_000)))
            with self.subTest(seed), self.server.connect() as connection:
                sent = head("PUT", "/upload", CHUNKED) + chunks(rng, data) + PING
                if len(sent) > 1 << 16:
                    threading.Thread(target=connection.send, args=(sent,)).start()
                else:
                    while sent:
                        size = rng.choice((1, 7, 500))
                        connection.send(sent[:size])
                        sent = sent[size:]
                self.assertTaken(connection.answer(), data)
                self.assertEqual(connection.answer().json()["ping"], "pong")
                connection.send(with_length(b"next"))
                self.assertTaken(connection.answer(), b"next")

    def test_chunks_that_are_not_well_formed(self):
        for name, body in WRONG_CHUNKS.items():
            with self.subTest(name):
                self.refused(head("PUT", "/upload", CHUNKED) + body + SECOND, 400)

    def test_chunked_beside_a_length(self):
        for fields in ("Content-Length: 5\r\n" + CHUNKED, CHUNKED + "Content-Length: 0\r\n",
                       CHUNKED * 2, "Transfer-Encoding: gzip, chunked\r\n"):
            with self.subTest(fields):
                self.refused(head("PUT", "/upload", fields) + b"5\r\nhello\r\n0\r\n\r\n", 400)

    def test_chunked_on_http_1_0(self):
        self.refused(head("PUT", "/upload", CHUNKED, "1.0") + b"0\r\n\r\n", 400)

    def test_chunked_where_a_length_is_needed(self):
        for method, target in (("POST", "/upload"), ("POST", "/some"), ("DELETE", "/plain"),
                               ("POST", "/ping"), ("PUT", "/nothing")):
            with self.subTest(target):
                self.refused(head(method, target, CHUNKED) + b"5\r\nhello\r\n0\r\n\r\n", 411)

    # refusals, and 100 Continue

    def test_100_continue_comes_with_the_first_read(self):
        for fields, body in (("Content-Length: 5\r\n", b"hello"),
                             (CHUNKED, b"5\r\nhello\r\n0\r\n\r\n")):
            with self.server.connect() as connection:
                for _ in range(2):
                    connection.send(head("PUT", "/upload", fields + "Expect: 100-Continue\r\n"))
                    wanted = b"HTTP/1.1 100 Continue\r\n\r\n"
                    while len(connection.buffer) < len(wanted):
                        connection.buffer += connection.recv(1)
                    self.assertEqual(connection.buffer, wanted)
                    connection.buffer = b""
                    connection.send(body)
                    self.assertTaken(connection.answer(), b"hello")

    def test_no_100_continue_for_whom_it_says_nothing(self):
        expect = "Expect: 100-continue\r\n"
        with self.server.connect() as connection:
            connection.send(head("PUT", "/upload", "Content-Length: 5\r\n"
                                 "Connection: keep-alive\r\n" + expect, "1.0"))
            self.assertFalse(readable(connection.sock, 0.2))
            connection.send(b"hello")
            self.assertTaken(connection.answer(), b"hello")
            connection.send(head("PUT", "/upload", "Content-Length: 0\r\n" + expect))
            self.assertTaken(connection.answer(), b"")
        with self.server.connect() as connection:     # it has not waited
            connection.send(with_length(b"hello", fields=expect))
            data = b""
            while b"\r\n}" not in data and b"\n}" not in data:
                data += connection.recv()
            self.assertRegex(data, rb"^(HTTP/1.1 100 Continue\r\n\r\n)?HTTP/1.1 200 OK\r\n")

    def test_a_refusal_asks_for_no_byte(self):
        for fields in ("Content-Length: 5\r\n", CHUNKED):
            for method, target, status in (("PUT", "/refused", 422), ("PUT", "/nothing", 404),
                                           ("PUT", "/ping", 405)):
                if fields is CHUNKED and target != "/refused":
                    status = 411
                with self.subTest(target, fields=fields):
                    self.refused(head(method, target, fields + "Expect: 100-continue\r\n"), status)
        self.refused(head("PUT", "/upload", "Content-Length: 5\r\nExpect: bananas\r\n"), 417)

    def test_a_refusal_is_read_by_a_client_that_is_sending_32_mib(self):
        size = 32 << 20
        for method, target, status in (("PUT", "/refused", 422), ("POST", "/datasets", 405)):
            with self.subTest(target), self.server.connect() as connection:
                connection.send(head(method, target, f"Content-Length: {size}\r\n"))
                for _ in range(size >> 18):
                    connection.send(bytes(1 << 18))       # a reset would end this
                self.assertError(connection.answer(), status)
                self.assertEqual(connection.rest(), b"")

    def test_earlier_answers_do_not_wait_for_the_body(self):
        """A client may send its body only when it has read them."""
        with self.server.connect() as connection:
            connection.send(PING + head("PUT", "/upload", "Content-Length: 5\r\n"))
            self.assertEqual(connection.answer().json()["ping"], "pong")
            connection.send(b"hello")
            self.assertTaken(connection.answer(), b"hello")

    # time and the end

    def test_a_body_that_stops_gets_408_and_a_slow_one_goes_on(self):
        server = self.serve(unix=self.unix, config={"stall_timeout": 1}, prelude=ROUTES)
        slow, stalled, chunked = (server.connect() for _ in range(3))
        with slow, stalled, chunked:
            stalled.send(head("PUT", "/upload", "Content-Length: 500\r\n") + b"x" * 20)
            chunked.send(head("PUT", "/upload", CHUNKED) + b"5\r\nhel")
            slow.send(head("PUT", "/upload", "Content-Length: 500\r\n"))
            sent = 0
            while not (readable(stalled.sock, 0) and readable(chunked.sock, 0)):
                self.assertLess(sent, 400, "a stalled body was waited for")
                slow.send(b"y")
                sent += 1
                readable(slow.sock, 0.1)  # this client is slow: that is what is tested
            for connection in (stalled, chunked):
                answer = connection.answer()
                self.assertError(answer, 408)
                self.assertEqual(answer.headers["connection"], "close")
                self.assertEqual(connection.rest(), b"")
            slow.send(b"y" * (500 - sent))
            self.assertTaken(slow.answer(), b"y" * 500)

    def test_stalled_bodies_disturb_nobody(self):
        data = os.urandom(300_000)
        write_image(self.serve_dir, uuid_of(1), data)
        server = self.serve(unix=self.unix, prelude=ROUTES)
        connections = []
        for _ in range(60):
            connections.append(server.connect())
            self.addCleanup(connections[-1].close)
            connections[-1].send(head("PUT", "/upload", "Content-Length: 5\r\n") + b"hell")
        wait_for(lambda: server.threads() > 60, "a thread for each")
        self.assertEqual(server.get(f"/images/{uuid_of(1)}/file").body, data)
        self.assertEqual(server.get("/datasets").status, 200)
        for connection in connections:
            connection.send(b"o")
        for connection in connections:
            self.assertTaken(connection.answer(), b"hello")

    def test_a_body_is_waited_for_after_sigterm(self):
        server = self.serve(unix=self.unix, prelude=ROUTES)
        with server.connect() as connection:
            connection.send(head("PUT", "/upload", "Content-Length: 5\r\n") + b"he")
            wait_for(lambda: server.threads() > 1, "its thread")
            server.send_signal(signal.SIGTERM)
            server.wait_log("finishing 1 answers")
            connection.send(b"llo" + SECOND)
            answer = connection.answer()
            self.assertTaken(answer, b"hello")
            self.assertEqual(answer.headers["connection"], "close")
            self.assertEqual(connection.rest(), b"")
        self.assertEqual(server.process.wait(PATIENCE), 0)

    def test_a_body_is_cut_after_drain_time(self):
        server = self.serve(unix=self.unix, config={"drain_time": 0.5}, prelude=ROUTES)
        with server.connect() as connection:
            connection.send(head("PUT", "/upload", "Content-Length: 5\r\n") + b"he")
            wait_for(lambda: server.threads() > 1, "its thread")
            self.assertEqual(server.stop(), 0)
            self.assertEqual(connection.rest(), b"")
        self.assertRegex(server.log(), r'"PUT /upload HTTP/1.1" 499 0 ')


class BodiesOverTcp(Bodies, ServerCase):
    unix = False


class BodiesOverUnix(Bodies, ServerCase):
    unix = True


class Faults(ServerCase):

    breaks_it = True

    def test_a_fault_of_a_route_is_500_and_the_end_of_the_connection(self):
        server = self.serve(prelude=ROUTES.replace('"plain": True', '"plain": nothing'))
        with server.connect() as connection:
            connection.send(head("DELETE", "/plain") + SECOND)
            self.assertError(connection.answer(), 500, "InternalError")
            self.assertEqual(connection.rest(), b"")
        self.assertEqual(server.get("/ping").status, 200)
        server.wait_log("error internal error: .*NameError")


class Body(unittest.TestCase):
    """In process: what read() gives and leaves, however the bytes come."""

    def body(self, text, rest=b"", stall_timeout=PATIENCE):
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        request = imgserver.parse_request(imgserver._HEAD.match(text.decode("latin-1")))
        return imgserver.Body(imgserver.Transport(ours), rest, request, stall_timeout), theirs

    def test_reads_of_any_size_and_what_is_left(self):
        for seed in range(100):
            rng = random.Random(seed)
            data = os.urandom(rng.choice((0, 1, 5, 1000, 20_000)))
            if rng.random() < 0.5:
                coded, fields = chunks(rng, data), CHUNKED
            else:
                coded, fields = data, f"Content-Length: {len(data)}\r\n"
            sent = coded + SECOND
            cut = rng.randrange(len(sent) + 1)
            body, peer = self.body(head("PUT", "/upload", fields), sent[:cut])
            peer.sendall(sent[cut:])
            got, size = [], rng.choice((1, 16, 1000, 1 << 20))
            while True:
                part = body.read(size)
                self.assertLessEqual(len(part), size)
                if not part:
                    break
                got.append(part)
            with self.subTest(seed):
                self.assertEqual(b"".join(got), data)
                self.assertTrue(body.finished)
                self.assertEqual(body.received, len(data))
                self.assertEqual(body.read(size), b"")
                peer.shutdown(socket.SHUT_WR)
                while True:
                    more = body._transport.receive(65536)
                    if not more:
                        break
                    body.rest += more
                self.assertEqual(body.rest, SECOND)

    def test_the_end_of_the_client_is_client_gone(self):
        for fields in ("Content-Length: 5\r\n", CHUNKED, "Content-Length: 5\r\n"
                                                         "Expect: 100-continue\r\n"):
            body, peer = self.body(head("PUT", "/upload", fields))
            peer.close()
            with self.subTest(fields), self.assertRaises(imgserver.ClientGone):
                body.read(10)

    def test_nothing_is_taken_from_the_socket_behind_a_length(self):
        body, peer = self.body(head("PUT", "/upload", "Content-Length: 5\r\n"))
        peer.sendall(b"hello" + SECOND)
        self.assertEqual(body.read(100), b"hello")
        self.assertEqual(body.read(100), b"")
        self.assertEqual(body.rest, b"")
        self.assertEqual(body._transport.receive(100), SECOND)


class Lingering(unittest.TestCase):

    def test_a_refused_client_has_time_while_it_sends_but_not_for_ever(self):
        config = imgserver.Config({"serve_dir": "/", "header_timeout": 30})
        loop = types.SimpleNamespace(now=100.0, config=config)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            connection = imgserver.Connection(ours, "", loop)
            connection.unread = True
            connection._close_or_linger()
            self.assertEqual(connection.state, imgserver.LINGERING)
            for loop.now, deadline in ((100.0, 102.0), (101.5, 103.5), (129.5, 130.0)):
                theirs.send(b"more")
                connection.ready()
                self.assertEqual(connection.deadline, deadline)


if __name__ == "__main__":
    unittest.main()
