"""Signals, draining, dead DNS, addresses, hostile logs, and clocks that jump."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

import imgserver
from tests.support import (IMGSERVER, LOOK, PATIENCE, SETTLED, SOON, Connection, ServerCase,
                           has_ipv6, reachable, readable, uuid_of, wait_for, write_image)

U = uuid_of(1)
FILE = f"/datasets/{U}/image.zfs.gz"
BIG = 12 << 20        # bytes: more than any socket's buffers take at once
PING = b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n"
PROMPT_LOG = "imgserver.LOG_DELAY = 0.01"
DEAD_DNS = """
import socket, time
def hang(*_, **__):
    time.sleep(3600)
socket.getfqdn = socket.gethostbyaddr = socket.gethostbyname = socket.getnameinfo = hang
look_up = socket.getaddrinfo
def getaddrinfo(host, port, family=0, type=0, proto=0, flags=0):
    if not flags & socket.AI_NUMERICHOST:
        hang()
    return look_up(host, port, family, type, proto, flags)
socket.getaddrinfo = getaddrinfo
"""
JUMPING_CLOCK = """
import os, time
real, real_ns = time.time, time.time_ns
def jump():
    try:
        with open({flag!r}) as file:
            return int(file.read() or 0)
    except OSError:
        return 0
time.time = lambda: real() + jump()
time.time_ns = lambda: real_ns() + jump() * 10**9
"""


class Signals:
    """How it ends; each case is run once on TCP and once on a Unix socket."""

    unix = False

    def download(self, server, fields=b""):
        """A connection on which a big file is on its way, and stands."""
        connection = server.connect()
        self.addCleanup(connection.close)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.send(f"GET {FILE} HTTP/1.1\r\nHost: a\r\n".encode() + fields + b"\r\n")
        self.assertTrue(readable(connection.sock, PATIENCE))
        return connection

    def test_ends_at_once_with_0_when_idle(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number):
                server = self.serve(unix=self.unix)
                self.assertEqual(server.get("/ping").status, 200)
                began = time.monotonic()
                self.assertEqual(server.stop(number), 0)
                self.assertLess(time.monotonic() - began, SOON)
                self.assertRegex(server.log(), r"info ended\n$")
                with self.assertRaises(OSError):
                    server.connect()
                if self.unix:
                    self.assertFalse(os.path.exists(server.address))

    def test_idle_connections_do_not_hold_up_the_end(self):
        server = self.serve(unix=self.unix)
        with server.connect() as silent, server.connect() as kept:
            self.assertEqual(kept.request("/ping").status, 200)
            began = time.monotonic()
            self.assertEqual(server.stop(), 0)
            self.assertLess(time.monotonic() - began, SOON)
            self.assertEqual(silent.rest(), b"")
            self.assertEqual(kept.rest(), b"")

    def test_download_is_finished_after_sigterm(self):
        write_image(self.serve_dir, U, bytes(BIG))
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number):
                server = self.serve(unix=self.unix)
                connection = self.download(server)
                server.send_signal(number)
                server.wait_log("finishing 1 answers")
                with self.assertRaises(OSError, msg="it takes new connections while it drains"):
                    server.connect()
                self.assertEqual(len(connection.answer().body), BIG)
                self.assertTrue(connection.closed())
                self.assertEqual(server.process.wait(PATIENCE), 0)

    def test_download_is_cut_after_drain_time(self):
        write_image(self.serve_dir, U, bytes(BIG))
        server = self.serve(unix=self.unix, config={"drain_time": 0.5})
        connection = self.download(server)
        began = time.monotonic()
        self.assertEqual(server.stop(), 0)
        self.assertTrue(0.4 < time.monotonic() - began < SOON)
        self.assertLess(len(connection.rest()), BIG)

    def test_second_sigterm_ends_it_at_once(self):
        write_image(self.serve_dir, U, bytes(BIG))
        for first, second in ((signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)):
            with self.subTest(first, second=second):
                server = self.serve(unix=self.unix, config={"drain_time": 600})
                self.download(server)
                server.send_signal(first)
                server.wait_log("finishing 1 answers, for 600 s at most")
                self.assertIsNone(server.process.poll())
                began = time.monotonic()
                self.assertEqual(server.stop(second), 0)
                self.assertLess(time.monotonic() - began, SOON)
                if self.unix:
                    self.assertFalse(os.path.exists(server.address))

    def test_request_that_has_begun_is_answered_while_it_drains(self):
        server = self.serve(unix=self.unix)
        with server.connect() as begun:
            begun.send(PING[:20])
            self.assertEqual(server.get("/ping").status, 200)     # the loop has read it by now
            server.send_signal(signal.SIGTERM)

            def refuses():
                try:
                    server.connect().close()
                except OSError:
                    return True
            wait_for(refuses, "draining")
            begun.send(PING[20:] + PING)
            answer = begun.answer()
            self.assertEqual(answer.status, 200)
            self.assertEqual(answer.headers.get("connection"), "close")
            self.assertEqual(begun.rest(), b"", "a further request was answered")
        self.assertEqual(server.process.wait(PATIENCE), 0)

    def test_what_came_during_a_download_costs_none_of_its_bytes(self):
        # Closing a socket that holds unread bytes would reset it (RFC 9112 9.6).
        write_image(self.serve_dir, U, bytes(BIG))
        for more, end in ((b"\r\n", b"Connection: close\r\n"), (PING, b"")):
            with self.subTest(more):
                server = self.serve(unix=self.unix, prelude="imgserver.LINGER = 0.3")
                connection = self.download(server, end)
                connection.send(more)
                server.send_signal(signal.SIGTERM)
                server.wait_log("finishing 1 answers")
                self.assertEqual(len(connection.answer().body), BIG)
                self.assertTrue(connection.closed())
                self.assertEqual(server.process.wait(PATIENCE), 0)

    def test_sighup_changes_nothing(self):
        write_image(self.serve_dir, U, bytes(BIG))
        server = self.serve(unix=self.unix)
        connection = self.download(server)
        for _ in range(3):
            server.send_signal(signal.SIGHUP)
        server.wait_log("SIGHUP")
        self.assertEqual(server.get("/ping").status, 200)
        self.assertEqual(connection.answer().body, bytes(BIG))
        self.assertEqual(connection.request("/ping").status, 200)

    def test_many_signals_during_a_download_lose_no_byte(self):
        data = os.urandom(1 << 20) * 16           # more than the 50 times that are received
        write_image(self.serve_dir, U, data)
        server = self.serve(unix=self.unix)
        connection = self.download(server)
        for _ in range(50):
            server.send_signal(signal.SIGHUP)
            connection.buffer += connection.recv(1 << 18)
        self.assertEqual(connection.answer().body, data)


class SignalsOverTcp(Signals, ServerCase):
    seconds = 8
    unix = False


class SignalsOverUnix(Signals, ServerCase):
    seconds = 8
    unix = True


class Addresses(ServerCase):

    def test_dead_dns(self):
        for options in ((), ("--listen", "0"), ("--listen", "0.0.0.0:0")):
            with self.subTest(options):
                began = time.monotonic()
                server = self.serve(prelude=DEAD_DNS, options=options)
                self.assertEqual(server.get("/ping").status, 200)
                self.assertLess(time.monotonic() - began, SOON)
                server.wait_log(r'info 127\.0\.0\.1 "GET /ping HTTP/1\.1" 200')

    def test_dead_dns_on_a_unix_socket(self):
        server = self.serve(unix=True, prelude=DEAD_DNS)
        self.assertEqual(server.get("/ping").status, 200)
        server.wait_log(r'info unix "GET /ping HTTP/1\.1" 200')

    def connect6(self, port):
        connection = Connection.__new__(Connection)
        connection.sock, connection.buffer = socket.socket(socket.AF_INET6), b""
        self.addCleanup(connection.close)
        connection.sock.settimeout(PATIENCE)
        connection.sock.connect(("::1", port))
        return connection

    @unittest.skipUnless(has_ipv6(), "this machine has no IPv6")
    def test_port_alone_is_every_address_of_both_kinds(self):
        write_image(self.serve_dir, U)
        server = self.serve(options=("--listen", "0"))
        self.assertIn(" on http://[::]:", server.log())
        self.assertEqual(server.get("/ping").status, 200)
        server.wait_log(r'info 127\.0\.0\.1 "GET /ping HTTP/1\.1" 200')
        port = server.address[1]
        connection = self.connect6(port)
        self.assertEqual(connection.request("/ping").status, 200)
        server.wait_log(r'info ::1 "GET /ping HTTP/1\.1" 200')
        self.assertEqual(connection.request(FILE).body, b"not a real stream")
        for host, connect in ((f"127.0.0.1:{port}", server.connect),
                              (f"[::1]:{port}", lambda: self.connect6(port))):
            with self.subTest(host), connect() as connection:
                connection.send(f"GET /datasets/{U} HTTP/1.0\r\n\r\n".encode())
                self.assertEqual(connection.answer().json()["files"][0]["url"],
                                 f"http://{host}{FILE}")

    @unittest.skipUnless(has_ipv6(), "this machine has no IPv6")
    def test_one_ipv6_address(self):
        with socket.socket() as taken:           # so that nobody else answers there by IPv4
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            server = self.serve(options=("--listen", f"[::1]:{port}"))
            self.assertIn(f" on http://[::1]:{port}\n", server.log())
            self.assertEqual(self.connect6(port).request("/ping").status, 200)
            with self.assertRaises(ConnectionRefusedError):
                server.connect()

    def test_without_ipv6_a_port_alone_is_every_ipv4_address(self):
        server = self.serve(options=("--listen", "0"), prelude=(
            "import socket; socket.has_dualstack_ipv6 = lambda: False"))
        self.assertIn(" on http://0.0.0.0:", server.log())
        self.assertEqual(server.get("/ping").status, 200)


# What a client sends in its request line, and how the log shows it.
HOSTILE = {
    "ESC": (b"GET /\x1b[2J\x1b]0;title\x07 HTTP/1.1", r"GET /\x1b[2J\x1b]0;title\x07 HTTP/1.1"),
    "CR": (b"GET /a\rinfo forged HTTP/1.1", r"GET /a\rinfo forged HTTP/1.1"),
    "bare LF": (b"GET /a\ninfo forged HTTP/1.1", "GET /a"),
    "quote": (b'GET /a" 200 0 HTTP/1.1', r"GET /a\" 200 0 HTTP/1.1"),
    "quote in a good line": (b'GET /a"b HTTP/1.1', r"GET /a\"b HTTP/1.1"),
    "backslash": (b"GET /a\\b HTTP/1.1", r"GET /a\\b HTTP/1.1"),
    "backslash before a quote": (b'GET /a\\"b HTTP/1.1', r"GET /a\\\"b HTTP/1.1"),
    "0x9b, a terminal's CSI": (b"GET /\x9b31m HTTP/1.1", r"GET /\x9b31m HTTP/1.1"),
    "0xff": (b"GET /\xff HTTP/1.1", r"GET /\xff HTTP/1.1"),
    "UTF-8": (b"GET /\xc3\xa9 HTTP/1.1", r"GET /\xc3\xa9 HTTP/1.1"),
    "line separator": (b"GET /\xe2\x80\xa8x HTTP/1.1", r"GET /\xe2\x80\xa8x HTTP/1.1"),
    "NUL": (b"GET /\0 HTTP/1.1", r"GET /\x00 HTTP/1.1"),
    "DEL": (b"GET /\x7f HTTP/1.1", r"GET /\x7f HTTP/1.1"),
    "tab": (b"GET /a\tb HTTP/1.1", r"GET /a\tb HTTP/1.1"),
    "vertical tab": (b"GET /a\x0bb HTTP/1.1", r"GET /a\x0bb HTTP/1.1"),
    "percent": (b"GET /%s%d%n HTTP/1.1", "GET /%s%d%n HTTP/1.1"),
    "braces": (b"GET /{0}{x!r} HTTP/1.1", "GET /{0}{x!r} HTTP/1.1"),
}


class Logs(ServerCase):
    seconds = 5

    def test_hostile_request_lines(self):
        for unix in (False, True):
            server = self.serve(unix=unix, prelude=PROMPT_LOG)
            for name, (line, shown) in HOSTILE.items():
                with self.subTest(name, unix=unix):
                    before = server.log().count("\n")
                    server.raw(line + b"\r\nHost: a\r\n\r\n")
                    wait_for(lambda: server.log().count("\n") > before, "a log line")
                    [logged] = server.log().splitlines()[before:]
                    self.assertRegex(logged, r"^[ -~]*$")
                    self.assertIn(f' "{shown}" 40', logged)

    def test_long_request_line_is_one_line_and_cut(self):
        server = self.serve(prelude=PROMPT_LOG)
        for length in (8000, 60_000):
            with self.subTest(length):
                before = server.log().count("\n")
                server.raw(b"GET /" + b"\x1b" * length + b" HTTP/1.1\r\nHost: a\r\n\r\n")
                wait_for(lambda: server.log().count("\n") > before, "a log line")
                [logged] = server.log().splitlines()[before:]
                self.assertIn('..." 4', logged)
                self.assertLess(len(logged), 5000)

    def test_hostile_address_from_a_proxy(self):
        server = self.serve(unix=True, prelude=PROMPT_LOG)
        for header, value, shown in (("X-Real-IP", "192.0.2.7", "192.0.2.7"),
                                     ("X-Real-IP", "2001:db8::7", "2001:db8::7"),
                                     ("X-Forwarded-For", "evil, 192.0.2.7", "192.0.2.7"),
                                     ("X-Real-IP", "\xe9\x9b2J", r"\xe9\x9b2J"),
                                     ("X-Real-IP", "y" * 5000, "y" * 45 + "..."),
                                     ("X-Real-IP", "", "unix")):
            with self.subTest(value[:50]):
                before = server.log().count("\n")
                server.get("/ping", {header: value})
                wait_for(lambda: server.log().count("\n") > before, "a log line")
                self.assertIn(f' info {shown} "GET /ping ', server.log().splitlines()[before])

    def test_who_asks_stands_behind_the_time(self):
        write_image(self.serve_dir, U, b"12345")
        server = self.serve(prelude=PROMPT_LOG)
        agent = f"imgadm/3.9.5 (node/0.10.48; OpenSSL/1.0.1h) {U}"
        for headers, shown in (({"User-Agent": agent}, agent), ({}, ""),
                               ({"User-Agent": 'a" 200 \xe9'}, r'a\" 200 \xe9'),
                               ({"User-Agent": "z" * 3000}, "z" * 200 + "...")):
            with self.subTest(shown[:50]):
                before = server.log().count("\n")
                server.get(f"/images/{U}/file", headers)
                wait_for(lambda: " 200 5 " in "".join(server.log().splitlines()[before:]))
                logged = [line for line in server.log().splitlines()[before:]
                          if '"GET ' in line][0]
                self.assertRegex(logged, r'HTTP/1\.1" 200 5 [0-9.]+ms - "'
                                 + re.escape(shown) + '" test 1.0.0$')

    def test_json_has_the_keys_of_bunyan(self):
        write_image(self.serve_dir, U, b"12345")
        write_image(self.serve_dir, uuid_of(2), b"12345", name=["a\x1b"])
        server = self.serve(prelude=PROMPT_LOG, config={"logformat": "json", "colour": 1})
        server.get(f"/images/{U}/file", {"User-Agent": 'imgadm "3"'})
        server.get("/images")
        server.raw(b"\x1b[31m\r\n\r\n")
        wait_for(lambda: server.log().count('"latency"') == 3)
        self.assertEqual(server.stop(), 0)
        self.assertRegex(server.log(), r"^[ -~\n]*$")
        records = [json.loads(line) for line in server.log().splitlines()]
        for record in records:
            self.assertLessEqual({"v", "level", "name", "hostname", "pid", "time", "msg"},
                                 set(record))
            self.assertEqual((record["v"], record["name"], record["pid"]),
                             (0, "imgserver", server.process.pid))
            self.assertRegex(record["time"], r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
        self.assertEqual([record["msg"] for record in records if record["level"] == 40][0],
                         "config: 'colour' is no key of the configuration")
        self.assertTrue(any("is left out" in record["msg"] for record in records))
        file, _, bad = [record for record in records if "req" in record]
        self.assertEqual((file["req"], file["res"], file["image"], file["user"], file["level"]), (
            {"method": "GET", "url": f"/images/{U}/file", "remoteAddress": "127.0.0.1",
             "headers": {"user-agent": r'imgadm \"3\"'}},
            {"statusCode": 200, "bytes": 5}, "test 1.0.0", None, 30))
        self.assertGreaterEqual(file["latency"], 0)
        self.assertEqual((bad["req"]["method"], bad["res"]["statusCode"]), (r"\x1b[31m", 400))

    def test_client_on_tcp_cannot_name_its_own_address(self):
        server = self.serve()
        server.get("/ping", {"X-Real-IP": "192.0.2.7", "X-Forwarded-For": "192.0.2.7"})
        server.wait_log(r'info 127\.0\.0\.1 "GET /ping ')
        self.assertNotIn("192.0.2.7", server.log())

    def test_client_with_an_address_of_its_own_on_a_unix_socket(self):
        server = self.serve(unix=True)
        for address in ("", f"\0imgserver-{os.getpid()}", os.path.join(self.directory, "client")):
            with self.subTest(address), server.connect() as ours, \
                    socket.socket(socket.AF_UNIX) as sock:
                sock.bind(address)
                sock.connect(server.address)
                ours.sock.close()
                ours.sock = sock
                self.assertEqual(ours.request("/ping", headers={"X-Real-IP": "192.0.2.7"}).status,
                                 200)
        wait_for(lambda: server.log().count(' info 192.0.2.7 "GET /ping ') == 3, "the log")

    def test_hostile_names_on_disk(self):
        for number, path in enumerate(("\x1b[2J", "a\nb", 'a"b', "é")):
            uuid = uuid_of(number + 1)
            manifest = write_image(self.serve_dir, uuid)
            manifest["files"][0]["path"] = path
            os.unlink(os.path.join(self.serve_dir, uuid, "image.zfs.gz"))
            write_image(self.serve_dir, uuid, manifest=manifest)
        server = self.serve()
        self.assertEqual(server.get("/datasets").body, b"[]")
        wait_for(lambda: server.log().count("is left out") == 4, "4 lines")
        self.assertRegex(server.log(), r"^[ -~\n]*$")

    # a stderr that is of no use

    def start(self, stderr, *wrapper, options=()):
        """A server on a Unix socket, whose log nobody needs to read to find it."""
        path = os.path.join(self.directory, f"s{len(os.listdir(self.directory))}.sock")
        process = subprocess.Popen(
            [*wrapper, sys.executable, IMGSERVER, "--listen", path, "--dir", self.serve_dir,
             *options], stdin=subprocess.DEVNULL, stderr=stderr)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        wait_for(lambda: reachable(path) or process.poll() is not None, "the server")
        self.assertIsNone(process.poll(), "it has ended")
        return process, path

    def ask_much(self, path, count=2500):
        """More lines than a pipe and the log's own buffer hold, each with its answer."""
        target = "/" + "x" * 1000
        request = f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode() * 50
        with Connection(path) as connection:
            for _ in range(count // 50):
                connection.send(request)
                for _ in range(50):
                    self.assertEqual(connection.answer().status, 404)

    def test_stderr_closed(self):
        write_image(self.serve_dir, U)
        process, path = self.start(None, "/bin/sh", "-c", 'exec "$@" 2>&-', "sh")
        self.ask_much(path, 100)
        for target in (FILE, "/datasets", "/ping"):
            with Connection(path) as connection:
                answer = connection.request(target)
                self.assertEqual(answer.status, 200)
                self.assertNotIn(b" info ", answer.body)
        process.terminate()
        self.assertEqual(process.wait(PATIENCE), 0)

    def test_stderr_a_pipe_whose_reader_has_gone(self):
        reader, writer = os.pipe()
        process, path = self.start(writer)
        os.close(writer)
        os.close(reader)
        self.ask_much(path, 100)
        process.terminate()
        self.assertEqual(process.wait(PATIENCE), 0)

    def test_stderr_that_is_full(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("there is no /dev/full")
        with open("/dev/full", "wb") as full:
            process, path = self.start(full)
        self.ask_much(path, 100)
        process.terminate()
        self.assertEqual(process.wait(PATIENCE), 0)

    def test_stderr_a_pipe_or_socket_that_nobody_reads(self):
        config = os.path.join(self.directory, "config.json")
        with open(config, "w") as file:
            json.dump({"header_timeout": 1}, file)
        for kind, make in (("pipe", os.pipe), ("socket", self.socket_pair)):
            with self.subTest(kind):
                reader, writer = make()
                self.addCleanup(os.close, reader)
                process, path = self.start(writer, options=("--config", config))
                os.close(writer)
                self.ask_much(path)
                with Connection(path) as connection:    # closed later than the log is written
                    self.assertTrue(connection.closed())
                with open(f"/proc/{process.pid}/status") as file:
                    size = int(re.search(r"VmRSS:\s+(\d+)", file.read())[1])
                self.assertLess(size, 80_000)
                text = self.read_on(reader, path)
                self.assertRegex(text, rb"\n\([0-9]+ bytes of log lost")
                self.assertRegex(text, rb'"GET /read-again HTTP/1\.1" 404 ')
                process.terminate()
                self.assertEqual(process.wait(PATIENCE), 0)

    @staticmethod
    def socket_pair():
        reader, writer = socket.socketpair()
        return reader.detach(), writer.detach()

    def read_on(self, reader, path):
        """The log once somebody reads it again, up to the line of a request made then."""
        text, end = b"", time.monotonic() + PATIENCE
        asked = False
        while b"/read-again HTTP/1.1\" 404 " not in text and time.monotonic() < end:
            if select.select([reader], [], [], 0.5)[0]:
                text += os.read(reader, 1 << 16)
            elif not asked:
                asked = True
                with Connection(path) as connection:
                    self.assertEqual(connection.request("/read-again").status, 404)
        return text

    def test_nothing_is_printed_on_stdout(self):
        write_image(self.serve_dir, U)
        path = os.path.join(self.directory, "s.sock")
        process = subprocess.Popen([sys.executable, IMGSERVER, "--listen", path, "--dir",
                                    self.serve_dir], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        wait_for(lambda: reachable(path), "the server")
        self.ask_much(path, 50)
        process.terminate()
        self.assertEqual(process.stdout.read(), b"")


    def test_stdout_closed(self):
        server = self.serve(wrapper=("sh", "-c", 'exec "$@" >&-', "sh"))
        self.assertEqual(server.get("/ping").status, 200)
        self.assertEqual(server.stop(), 0)


class LogOfThreads(unittest.TestCase):

    def setUp(self):
        self.file = tempfile.TemporaryFile()
        self.addCleanup(self.file.close)
        self.log = imgserver.Log("info", self.file.fileno())

    def lines(self):
        self.file.seek(0)
        return self.file.read().decode().splitlines()

    def test_a_warning_is_written_at_once_also_while_another_thread_writes(self):
        with self.log._flushing:
            thread = threading.Thread(target=self.log.warn, args=("now",))
            thread.start()
            wait_for(lambda: self.log.pending)
            thread.join(0.05)                     # it waits for the other one, or has given up
        thread.join()
        self.assertEqual([line.split(None, 1)[1] for line in self.lines()], ["warn now"])

    def test_no_line_is_lost_between_threads(self):
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)

        def add(thread):
            for number in range(20000):
                self.log.add("info", f"{thread} {number}")
        threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            self.log.flush()
        self.log.flush()
        self.assertEqual(sorted(self.lines()), sorted(
            f" info {thread} {number}" for thread in range(4) for number in range(20000)))


    def test_lost_lines_are_a_line_of_json_too(self):
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        log = imgserver.Log("info", writer, "json")
        with mock.patch("imgserver.LOG_LIMIT", 1 << 17):
            for _ in range(3000):
                log.add("info", "x" * 100)
                log.flush()
        data = os.read(reader, 1 << 20)
        log.warn("read again")
        while b"read again" not in data:
            data += os.read(reader, 1 << 20)
            log.flush()
        os.close(writer)
        lines = data.decode().splitlines()
        self.assertEqual(json.loads(lines[-1])["msg"], "read again")
        lost = [line for line in lines if "lost" in line][-1]
        self.assertRegex(json.loads(lost)["msg"], r"^\([0-9]+ bytes of log lost: nobody read")

    def test_a_user_is_named(self):
        for form in ("text", "json"):
            log = imgserver.Log("info", self.file.fileno(), form)
            log.request("192.0.2.7", "joe", "GET / HTTP/1.1", "curl", 200, 5, 0.0123, "", " (cut)")
            log.flush()
        text, record = self.lines()
        self.assertTrue(text.endswith('192.0.2.7 "GET / HTTP/1.1" 200 5 12.3ms joe "curl" (cut)'))
        self.assertEqual(json.loads(record)["user"], "joe")
        self.assertEqual(json.loads(record)["msg"], "GET / HTTP/1.1 200 (cut)")
        self.assertEqual(json.loads(record)["latency"], 12.3)


class Clock(ServerCase):
    seconds = 5

    def jumping(self, **config):
        """A server whose clock the returned function sets, in seconds from the true time."""
        flag = os.path.join(self.directory, "clock")

        def jump(seconds):
            with open(flag + ".new", "w") as file:
                file.write(str(seconds))
            os.rename(flag + ".new", flag)
        return self.serve(prelude=JUMPING_CLOCK.format(flag=flag), config=config), jump

    def test_clock_that_jumps_cuts_nobody(self):
        write_image(self.serve_dir, U, bytes(BIG))
        server, jump = self.jumping()
        with server.connect() as kept, server.connect() as begun, server.connect() as busy:
            busy.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            self.assertEqual(kept.request("/ping").status, 200)
            begun.send(PING[:20])
            busy.send(f"GET {FILE} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            for seconds in (10**8, -10**8):
                jump(seconds)
                answer = server.get("/ping")
                self.assertEqual(answer.status, 200)
                year = time.gmtime(time.time() + seconds).tm_year
                wait_for(lambda: f" {year} " in server.get("/ping").headers["date"], "the year")
                time.sleep(LOOK)
            begun.send(PING[20:])
            self.assertEqual(begun.answer().status, 200)
            self.assertEqual(kept.request("/ping").status, 200)
            self.assertEqual(len(busy.answer().body), BIG)

    def test_clock_that_goes_back_ends_no_time_limit(self):
        server, jump = self.jumping(header_timeout=1.5, idle_timeout=1.5)
        with server.connect() as begun, server.connect() as kept:
            begun.send(PING[:20])
            self.assertEqual(kept.request("/ping").status, 200)
            jump(-10**8)
            self.assertError(begun.answer(), 408)
            self.assertEqual(kept.rest(), b"")

    def test_clock_that_jumps_hides_no_change_of_the_directory(self):
        server, jump = self.jumping()
        for number, seconds in enumerate((10**8, -10**8, 0), 1):
            jump(seconds)
            time.sleep(SETTLED)                  # the clock of the file system does not jump
            write_image(self.serve_dir, uuid_of(number))
            self.assertEqual(len(server.get("/datasets").json()), number)

    def test_drain_time_is_not_the_clock_s(self):
        write_image(self.serve_dir, U, bytes(BIG))
        server, jump = self.jumping(drain_time=0.5)
        with server.connect() as busy:
            busy.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            busy.send(f"GET {FILE} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            self.assertTrue(readable(busy.sock, PATIENCE))
            server.send_signal(signal.SIGTERM)
            jump(-10**8)
            self.assertEqual(server.process.wait(PATIENCE), 0)


if __name__ == "__main__":
    unittest.main()
