"""Many clients, slow clients, and a machine that has run out of something."""

import concurrent.futures
import hashlib
import os
import re
import socket
import time
import unittest

import imgserver
from tests.support import SOON, ServerCase, check_only, uuid_of, wait_for, write_image

U = uuid_of(1)
FILE = f"/datasets/{U}/image.zfs.gz"
FEW_FILES = ("import resource; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
             "resource.setrlimit(resource.RLIMIT_NOFILE, ({0}, {0}))")
SHORT_LINGER = "imgserver.LINGER = 0.2\n"
NO_THREADS = """
import os
start = imgserver.start_new_thread
def refuse(*job):
    if os.path.exists({flag!r}):
        raise {error}
    start(*job)
imgserver.start_new_thread = refuse
"""


class Load:
    """The cases; each is run once on TCP and once on a Unix socket."""

    unix = False

    def open(self, server, count):
        connections = [server.connect() for _ in range(count)]
        for connection in connections:
            self.addCleanup(connection.close)
        return connections

    def settled(self, server, files, threads):
        """Files and threads are as many again as they were."""
        wait_for(lambda: server.files() == files, f"{files} open files")
        wait_for(lambda: server.threads() <= threads, f"{threads} threads")

    # slow clients

    def test_two_hundred_idle_connections_are_cut_and_disturb_nobody(self):
        server = self.serve(unix=self.unix, config={"header_timeout": 1},
                            prelude=SHORT_LINGER)
        files, threads = server.files(), server.threads()
        silent, begun = self.open(server, 100), []
        for _ in range(100):                     # each before header_timeout has passed
            begun += self.open(server, 1)
            begun[-1].send(b"GET /ping HTTP/1.1\r\nHo")
        began = time.monotonic()
        self.assertEqual(server.get("/ping").status, 200)
        self.assertLess(time.monotonic() - began, SOON)
        self.assertEqual(server.threads(), threads, "idle connections cost threads")
        for connection in begun:
            self.assertError(connection.answer(), 408)
            self.assertTrue(connection.closed())
        for connection in silent:
            self.assertEqual(connection.rest(), b"")
        self.settled(server, files, threads)

    def test_header_timeout_is_counted_from_the_connection_not_per_byte(self):
        server = self.serve(unix=self.unix, config={"header_timeout": 1.5, "idle_timeout": 60})
        began = time.monotonic()
        [connection] = self.open(server, 1)
        connection.sock.settimeout(0.1)
        sent = 0
        try:
            while time.monotonic() - began < SOON:
                connection.send(b"GET /ping HTTP/1.1\r\nX: "[sent:sent + 1] or b"y")
                sent += 1
                try:
                    data = connection.recv()
                except socket.timeout:
                    continue
                break
            else:
                self.fail("one byte now and then keeps a connection for ever")
        except OSError as error:
            self.fail(f"cut without an answer: {error}")
        self.assertRegex(data, b"^HTTP/1.1 408 ")
        self.assertGreater(time.monotonic() - began, 1.4)

    def test_later_request_has_header_timeout_from_its_first_byte(self):
        server = self.serve(unix=self.unix, config={"header_timeout": 1, "idle_timeout": 60})
        [connection] = self.open(server, 1)
        self.assertEqual(connection.request("/ping").status, 200)
        time.sleep(1.4)                          # longer than header_timeout: idle is no header
        self.assertEqual(connection.request("/ping").status, 200)
        connection.send(b"GET /ping HT")
        self.assertError(connection.answer(), 408)
        self.assertTrue(connection.closed())

    def test_idle_timeout_closes_without_a_word(self):
        server = self.serve(unix=self.unix, config={"idle_timeout": 0.3})
        [connection] = self.open(server, 1)
        self.assertEqual(connection.request("/ping").status, 200)
        self.assertEqual(connection.rest(), b"")

    def test_who_asks_in_time_is_answered_though_the_loop_is_late(self):
        server = self.serve(unix=self.unix, config={"idle_timeout": 1.5}, prelude=(
            "import time\n"
            "real = imgserver.Site.ping\n"
            "def ping(site, request):\n"
            "    time.sleep(2.5 if request.query == 'late' else 0)\n"
            "    return real(site, request)\n"
            "imgserver.Site.ping = ping"))
        slow, quick = self.open(server, 2)
        self.assertEqual(slow.request("/ping").status, 200)
        self.assertEqual(quick.request("/ping").status, 200)
        slow.send(b"GET /ping?late HTTP/1.1\r\nHost: a\r\n\r\n")
        self.assertEqual(quick.request("/ping").status, 200)
        self.assertEqual(slow.answer().status, 200)

    # too many connections

    def test_connections_above_the_limit_get_503_without_a_thread(self):
        write_image(self.serve_dir, U)
        server = self.serve(unix=self.unix, config={"max_connections": 5, "header_timeout": 60},
                            prelude="imgserver.LINGER = 60")     # until each has asked
        connections = self.open(server, 5)
        self.assertEqual(connections[0].request("/ping").status, 200)
        threads = server.threads()
        for connection in self.open(server, 20):
            answer = connection.request(FILE)
            self.assertError(answer, 503, "ServiceUnavailableError")
            self.assertRegex(answer.headers["retry-after"], "^[0-9]+$")
            self.assertEqual(answer.headers["connection"], "close")
            self.assertTrue(connection.closed())
            connection.close()
        self.assertEqual(server.threads(), threads)
        self.assertEqual(connections[4].request("/ping").status, 200, "the first five go on")
        for connection in connections:
            connection.close()
        wait_for(lambda: server.get("/ping").status == 200, "the end of the crowd")

    def test_connections_far_above_the_limit_are_closed(self):
        server = self.serve(unix=self.unix, config={"max_connections": 2, "header_timeout": 20},
                            prelude="imgserver.OVERFLOW = 3")
        server_files = server.files()
        connections = self.open(server, 60)
        self.assertEqual(connections[0].request("/ping").status, 200)
        for connection in connections[2:5]:
            self.assertRegex(connection.rest(), b"^HTTP/1.1 503 ")
        for connection in connections[5:]:
            self.assertIn(connection.rest()[:13], (b"", b"HTTP/1.1 503 "))
        self.assertLessEqual(server.files(), server_files + 5)
        for connection in connections:
            connection.close()
        wait_for(lambda: b" 200 OK" in server.raw(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\n"),
                 "the end of the crowd")

    # what runs out

    def test_few_files(self):
        for files, connections in ((1000, 1000 - imgserver.OVERFLOW - imgserver.SPARE_FILES),
                                   (100, 50)):
            server = self.serve(unix=self.unix, prelude=FEW_FILES.format(files))
            server.wait_log(f"{files} files may be open: max_connections is {connections}")

    def test_no_file_left_to_accept_with(self):
        server = self.serve(unix=self.unix, config={"header_timeout": 10},
                            prelude="imgserver.SPARE_FILES = 0\n" + FEW_FILES.format(40))
        self.assertEqual(server.get("/ping").status, 200)
        connections = self.open(server, 60)
        server.wait_log("cannot accept connections: ")
        before = self.cpu_time(server)
        self.assertEqual(connections[0].request("/ping").status, 200, "who is in is served")
        time.sleep(1.2)                          # some tries to accept again
        self.assertLess(self.cpu_time(server) - before, 0.5, "it spins")
        self.assertEqual(server.log().count("cannot accept connections: "), 1)
        for connection in connections:
            connection.close()
        self.assertEqual(server.get("/ping").status, 200)

    def test_no_file_left_and_a_line_that_must_be_escaped(self):
        server = self.serve(unix=self.unix, config={"header_timeout": 10},
                            prelude="imgserver.SPARE_FILES = 0\n" + FEW_FILES.format(40))
        connections = self.open(server, 60)
        server.wait_log("cannot accept connections: ")
        self.assertError(connections[0].request('/a"b'), 404)
        connections[1].send(b"\x16\x03\x01\x02\x00\x01")       # how TLS begins
        self.assertError(connections[1].answer(), 400)
        for connection in connections:
            connection.close()
        self.assertEqual(server.get("/ping").status, 200)

    @staticmethod
    def cpu_time(server):
        with open(f"/proc/{server.process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def test_no_file_left_to_open_an_image_with(self):
        write_image(self.serve_dir, U, b"data")
        server = self.serve(unix=self.unix, config={"header_timeout": 10},
                            prelude="imgserver.SPARE_FILES = 0\n" + FEW_FILES.format(40))
        files = server.files()
        self.assertEqual(server.get(FILE).body, b"data")
        wait_for(lambda: server.files() == files, "the first connection's end")
        connections = self.open(server, 60)
        server.wait_log("cannot accept connections: ")
        wait_for(lambda: server.files() >= 40, "every file to be taken")
        answer = connections[0].request(FILE)
        self.assertError(answer, 503)
        self.assertIn("retry-after", answer.headers)
        for connection in connections:
            connection.close()
        self.assertEqual(server.get(FILE).body, b"data")

    def test_no_thread_can_be_started(self):
        for error in ('RuntimeError("can\'t start new thread")', "MemoryError"):
            with self.subTest(error):
                self.no_thread_can_be_started(error)

    def no_thread_can_be_started(self, error):
        write_image(self.serve_dir, U, b"data")
        flag = os.path.join(self.directory, "no threads")
        with open(flag, "w"):
            pass
        server = self.serve(unix=self.unix, prelude=SHORT_LINGER + NO_THREADS.format(
            flag=flag, error=error))
        files = server.files()
        for target in (FILE, "/datasets", "/"):
            with self.subTest(target), server.connect() as connection:
                answer = connection.request(target)
                self.assertError(answer, 503, "ServiceUnavailableError")
                self.assertIn("retry-after", answer.headers)
                self.assertEqual(answer.headers["connection"], "close")
                self.assertTrue(connection.closed())
        self.assertEqual(server.get("/ping").status, 200)
        os.unlink(flag)
        for _ in range(20):
            self.assertEqual(server.get(FILE).body, b"data")
        wait_for(lambda: server.files() <= files, "closed connections")

    # many downloads

    def test_fifty_downloads_at_once(self):
        data = os.urandom(1 << 20) * 3 + b"end"
        write_image(self.serve_dir, U, data)
        wanted = hashlib.sha1(data).hexdigest()
        server = self.serve(unix=self.unix, prelude="imgserver.THREAD_IDLE = 0.3")
        files = server.files()
        self.assertEqual(server.get("/datasets").status, 200)
        self.assertEqual(hashlib.sha1(server.get(FILE).body).hexdigest(), wanted)

        def download(_):
            digest = hashlib.sha1()
            with server.connect() as connection:
                connection.send(f"GET {FILE} HTTP/1.1\r\nHost: a\r\n"
                                "Connection: close\r\n\r\n".encode())
                head, _, body = self.until_head(connection)
                length = int(re.search(rb"Content-Length: (\d+)", head)[1])
                count = len(body)
                digest.update(body)
                while True:
                    more = connection.recv(1 << 18)
                    if not more:
                        return digest.hexdigest() if count == length else f"{count} bytes"
                    digest.update(more)
                    count += len(more)

        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            self.assertEqual(set(pool.map(download, range(50))), {wanted})
        self.settled(server, files, 1 + imgserver.SENDERS)

    @staticmethod
    def until_head(connection):
        data = b""
        while b"\r\n\r\n" not in data:
            more = connection.recv()
            assert more, f"no whole head: {data!r}"
            data += more
        return data.partition(b"\r\n\r\n")

    def test_fifty_downloads_that_are_given_up(self):
        write_image(self.serve_dir, U, bytes(8 << 20))
        server = self.serve(unix=self.unix, prelude="imgserver.THREAD_IDLE = 0.3")
        files = server.files()
        for connection in self.open(server, 50):
            connection.send(f"GET {FILE} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            self.until_head(connection)
            connection.close()
        self.settled(server, files, 1 + imgserver.SENDERS)
        self.assertEqual(server.get("/ping").status, 200)


class LoadOverTcp(Load, ServerCase):
    seconds = 14
    unix = False


class LoadOverUnix(Load, ServerCase):
    seconds = 14
    unix = True


@check_only("a time limit of seconds")
class LateStart(ServerCase):

    def test_silence_before_the_first_byte_counts_to_header_timeout(self):
        server = self.serve(config={"header_timeout": 5,
                                    "idle_timeout": 0.4})    # so that it looks often
        with server.connect() as connection:
            time.sleep(2.5)
            began = time.monotonic()
            connection.send(b"GET /ping HTTP/1.1\r\n")
            self.assertError(connection.answer(), 408)
        self.assertLess(time.monotonic() - began, 5, "it was counted from the first byte")


if __name__ == "__main__":
    unittest.main()
