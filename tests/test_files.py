"""Downloads: every byte of a file, a part of it, or a cut connection; and nothing left behind."""

import hashlib
import os
import shutil
import socket
import struct
import time
import unittest

import imgserver
from tests.support import (PATIENCE, ServerCase, check_only, readable, uuid_of, wait_for,
                           write_image, write_v2)

UUID = uuid_of(1)
FILE = f"/datasets/{UUID}/image.zfs.gz"
TRANSPORTS = (("tcp", False), ("unix", True))
DATA = hashlib.sha1(b"seed").digest() * 150_000          # 3 MB, of no round length


def sparse(serve_dir, size, marks=(), uuid=UUID):
    """An image of `size` zeros but for the `marks`, {offset: bytes}; its sha1 is made up."""
    manifest = write_image(serve_dir, uuid, b"")
    manifest["files"][0].update(size=size, sha1="5" * 40, compression="none")
    path = os.path.join(serve_dir, uuid, "image.zfs.gz")
    with open(path, "r+b") as file:
        file.truncate(size)
        for offset, data in dict(marks).items():
            file.seek(offset)
            file.write(data)
    write_image(serve_dir, uuid, b"", manifest, "unused.tmp")
    os.unlink(os.path.join(serve_dir, uuid, "unused.tmp"))
    return path


def small_buffer(server, patience=PATIENCE):
    """A connection that takes little before it must be read from."""
    connection = server.connect(patience)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
    return connection


def ask(connection, target=FILE, fields=""):
    connection.send(f"GET {target} HTTP/1.1\r\nHost: h\r\n{fields}\r\n".encode())


def begin(server, target=FILE, fields="", connect=small_buffer):
    """A download of which the head and some bytes have come: (connection, length, bytes)."""
    connection = connect(server)
    ask(connection, target, fields)
    while b"\r\n\r\n" not in connection.buffer:
        data = connection.recv(4096)
        assert data, "the connection ended before the head"
        connection.buffer += data
    head, _, rest = connection.buffer.partition(b"\r\n\r\n")
    connection.buffer = b""
    assert head.startswith(b"HTTP/1.1 200 "), head
    length = int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0])
    return connection, length, rest


def take(connection, rest, length):
    """The bytes of a body that has begun, up to its length or the end of the connection."""
    digest, left = hashlib.sha1(rest), length - len(rest)
    while left:
        data = connection.recv(min(left, 1 << 18))
        if not data:
            break
        digest.update(data)
        left -= len(data)
    return digest.hexdigest(), length - left


class FileCase(ServerCase):

    def assertIdle(self, server, files, threads=None):
        """Nothing is left of the requests so far."""
        wait_for(lambda: server.files() <= files, f"{files} files again, not {server.files()}")
        if threads is not None:
            wait_for(lambda: server.threads() <= threads, f"{threads} threads again")

    def quiet_files(self, server):
        """The number of files that are open when nothing is asked for."""
        server.get(FILE, method="HEAD")
        return wait_for(lambda: server.files() if server.files() == server.files() else 0)


class Whole(FileCase):

    def test_get_and_head(self):
        manifest = write_image(self.serve_dir, UUID, DATA)
        for transport, unix in TRANSPORTS:
            server = self.serve(unix=unix)
            for target in (FILE, f"/images/{UUID}/file", "http://elsewhere" + FILE):
                with self.subTest(target, transport=transport), server.connect() as connection:
                    answer = connection.request(target)
                    self.assertEqual(answer.status, 200)
                    self.assertEqual(answer.body, DATA)
                    headers = dict(answer.headers)
                    self.assertEqual(headers["content-length"], str(len(DATA)))
                    self.assertEqual(headers["content-type"], "application/octet-stream")
                    self.assertEqual(headers["etag"], '"%s"' % manifest["files"][0]["sha1"])
                    self.assertEqual(headers["accept-ranges"], "bytes")
                    self.assertNotIn("content-encoding", headers)
                    self.assertNotIn("transfer-encoding", headers)
                    head = connection.request(target, "HEAD")
                    head.headers.pop("date")
                    headers.pop("date")
                    self.assertEqual(head.headers, headers)
                    self.assertEqual(connection.request("/ping").json()["ping"], "pong")

    def test_never_encoded_or_chunked_whatever_is_accepted(self):
        write_image(self.serve_dir, UUID, DATA)
        server = self.serve()
        answer = server.get(FILE, {"Accept-Encoding": "gzip, br, deflate", "TE": "trailers",
                                   "Accept": "application/json"})
        self.assertEqual(answer.body, DATA)
        self.assertNotIn("content-encoding", answer.headers)

    def test_an_empty_file(self):
        write_image(self.serve_dir, UUID, b"")
        for transport, unix in TRANSPORTS:
            with self.subTest(transport), self.serve(unix=unix).connect() as connection:
                for method in ("GET", "HEAD", "GET"):
                    answer = connection.request(FILE, method)
                    self.assertEqual((answer.status, answer.body), (200, b""))
                    self.assertEqual(answer.headers["content-length"], "0")

    def test_lengths_around_the_steps_of_sending(self):
        lengths = [1, 2]
        for edge in (64 << 10, 256 << 10, 1 << 20):
            lengths += [edge - 1, edge, edge + 1]
        data = (DATA * 2)[:max(lengths)]
        for number, length in enumerate(lengths, 1):
            write_v2(self.serve_dir, uuid_of(number), data[:length])
        for transport, unix in TRANSPORTS:
            server = self.serve(unix=unix)
            with server.connect() as connection:
                for number, length in enumerate(lengths, 1):
                    with self.subTest(transport, length=length):
                        self.assertEqual(
                            connection.request(f"/images/{uuid_of(number)}/file").body,
                            data[:length])

    def test_a_large_file_with_little_memory(self):
        self.large_file((120 << 20) + 5003)

    @check_only("a GiB takes long")
    def test_2_gib_with_little_memory(self):
        self.large_file((2 << 30) + 5003)

    def large_file(self, size):
        marks = {0: b"begin", (size >> 20 << 20) - 2: b"edge", size - 3: b"end"}
        sparse(self.serve_dir, size, marks)
        server = self.serve(fresh=True)
        connection, length, rest = begin(server, connect=lambda server: server.connect())
        self.assertEqual(length, size)
        block, zeros = bytearray(1 << 20), bytes(1 << 20)
        view, at, expected = memoryview(block), 0, sorted(marks.items())
        block[:len(rest)] = rest
        count = len(rest)
        while count:
            part = {offset: mark for offset, mark in expected
                    if offset < at + count and offset + len(mark) > at}
            if not part:
                self.assertTrue(view[:count] == zeros[:count], f"not the file's bytes at {at}")
            else:
                wanted = bytearray(count)
                for offset, mark in part.items():
                    for index, byte in enumerate(mark, offset - at):
                        if 0 <= index < count:
                            wanted[index] = byte
                self.assertEqual(view[:count], wanted)
            at += count
            count = connection.sock.recv_into(view[:min(len(block),
                                                        size - at)]) if at < size else 0
        connection.close()
        self.assertEqual(at, size)
        self.assertLess(server.memory("VmHWM"), 50 << 20)

    def test_a_part_beyond_4_gib(self):
        size = (5 << 30) + 3
        sparse(self.serve_dir, size, {(1 << 32) - 2: b"4 GiB", size - 3: b"end"})
        for transport, unix in TRANSPORTS:
            with self.subTest(transport):
                server = self.serve(unix=unix)
                answer = server.get(FILE, {"Range": f"bytes={(1 << 32) - 2}-{(1 << 32) + 2}"})
                self.assertEqual((answer.status, answer.body), (206, b"4 GiB"))
                self.assertEqual(server.get(FILE, {"Range": "bytes=-3"}).body, b"end")

    def test_a_file_from_a_time_that_no_date_can_tell(self):
        write_image(self.serve_dir, UUID, DATA)
        path = os.path.join(self.serve_dir, UUID, "image.zfs.gz")
        server = self.serve()
        for seconds in (0, -1, 2**31, 2**32, 2**33, 253402300800, 2**40):
            with self.subTest(seconds):
                try:
                    os.utime(path, (seconds, seconds))
                except (OSError, OverflowError):
                    continue                      # not every file system can hold it
                self.assertEqual(server.get(FILE).body, DATA)
        self.assertEqual(imgserver.http_date(2**40), "Fri, 31 Dec 9999 23:59:59 GMT")


# -- os.sendfile that does what it may do --------------------------------------------------

STAND_IN = """
import errno, os
real, calls = os.sendfile, [0]
def sendfile(out, file, offset, count):
    calls[0] += 1
    {}
    return real(out, file, offset, count)
os.sendfile = sendfile
"""
SENDS_ALL = (
    ("partial counts", "count = min(count, calls[0] % 7 * 9999 + 1)"),
    ("one byte first", "count = 1 if calls[0] < 100 else count"),
    ("would block between partial counts",
     "count = min(count, 65537)\n"
     "    if calls[0] % 2: raise BlockingIOError(errno.EAGAIN, 'later')"),
    ("EINVAL on the first call", "raise OSError(errno.EINVAL, 'no')"),
    ("EOPNOTSUPP on the first call", "raise OSError(errno.EOPNOTSUPP, 'no')"),
    ("ENOSYS on the first call", "raise OSError(errno.ENOSYS, 'no')"),
    ("EAFNOSUPPORT on the first call", "raise OSError(errno.EAFNOSUPPORT, 'no')"),
    ("EINVAL after a while", "count = min(count, 70001)\n"
                             "    if calls[0] > 5: raise OSError(errno.EINVAL, 'no')"),
)
# A full socket takes less than it is given: bytes are counted, not calls.
UP_TO = "count = min(count, 210003 - offset)\n    if not count: "
CUT_SHORT = (
    ("0 at once", "return 0", 0),
    ("0 mid-way", UP_TO + "return 0", 210003),
    ("more than was asked for", UP_TO + "return 1 + 2**20", 210003),
    ("a made-up negative count", "if calls[0] > 0: return -1", 0),
    ("EIO from a failing disk", UP_TO + "raise OSError(errno.EIO, 'disk')", 210003),
)


@unittest.skipUnless(hasattr(os, "sendfile"), "this Python has no os.sendfile")
class Sendfile(FileCase):

    def setUp(self):
        super().setUp()
        write_image(self.serve_dir, UUID, DATA)

    def test_whatever_it_does_all_bytes_arrive(self):
        for what, body in SENDS_ALL:
            with self.subTest(what):
                server = self.serve(prelude=STAND_IN.format(body))
                with server.connect() as connection:
                    for _ in range(2):
                        self.assertEqual(connection.request(FILE).body, DATA)
                    answer = connection.request(FILE, headers={"Range": "bytes=1000-2000000"})
                    self.assertEqual(answer.body, DATA[1000:2000001])

    def test_without_it(self):
        server = self.serve(prelude="import os; del os.sendfile")
        self.assertEqual(server.get(FILE).body, DATA)

    def test_it_is_used_on_tcp(self):
        server = self.serve(prelude=STAND_IN.format("open('used', 'w').close()").replace(
            "'used'", repr(os.path.join(self.directory, "used"))))
        self.assertEqual(server.get(FILE).body, DATA)
        self.assertTrue(os.path.exists(os.path.join(self.directory, "used")))

    def test_it_is_never_called_on_a_unix_socket(self):
        server = self.serve(unix=True, prelude=STAND_IN.format("os._exit(9)"))
        self.assertEqual(server.get(FILE).body, DATA)
        self.assertEqual(server.get(FILE, {"Range": "bytes=5-"}).body, DATA[5:])
        self.assertIsNone(server.process.poll())

    def test_what_ends_it_early_ends_the_connection(self):
        for what, body, sent in CUT_SHORT:
            with self.subTest(what):
                server = self.serve(prelude=STAND_IN.format(body))
                files = self.quiet_files(server)
                connection, length, rest = begin(server)
                with connection:
                    digest, count = take(connection, rest, length)
                self.assertEqual((length, count), (len(DATA), sent))
                self.assertEqual(digest, hashlib.sha1(DATA[:sent]).hexdigest())
                server.wait_log(r"error .* the file cannot be read at 210003 bytes"
                                if "EIO" in what else r"error .* truncated at \d+")
                self.assertNotIn("went away", server.log())
                self.assertEqual(server.get("/ping").status, 200)
                self.assertIdle(server, files)


# -- files that change under a download ----------------------------------------------------

class Changing(FileCase):
    """Each download has begun, and cannot end before the test has read on."""

    SIZE = 48 << 20

    def setUp(self):
        super().setUp()
        self.path = sparse(self.serve_dir, self.SIZE, {20 << 20: b"middle", self.SIZE - 3: b"end"})
        with open(self.path, "rb") as file:
            self.sha1 = hashlib.sha1(file.read()).hexdigest()

    def each(self, change, check):
        for transport, unix in TRANSPORTS:
            with self.subTest(transport):
                self.setUp()
                server = self.serve(unix=unix)
                files = self.quiet_files(server)
                connection, length, rest = begin(server)
                with connection:
                    change()
                    self.assertEqual(length, self.SIZE)
                    check(server, *take(connection, rest, length))
                self.assertEqual(server.get("/ping").status, 200)
                self.assertIdle(server, files)

    def test_truncated_the_connection_ends_short(self):
        def check(server, digest, count):
            self.assertLess(count, self.SIZE)
            server.wait_log("truncated at")
        self.each(lambda: os.truncate(self.path, 4096), check)

    def whole(self, server, digest, count):
        self.assertEqual((digest, count), (self.sha1, self.SIZE))
        self.assertNotIn("truncated", server.log())

    def test_grown_it_is_sent_up_to_its_length(self):
        def grow():
            with open(self.path, "ab") as file:
                file.write(b"more" * 1000)
        self.each(grow, self.whole)

    def test_replaced_the_old_bytes_are_sent_to_the_end(self):
        def replace():
            with open(self.path + ".new", "wb") as file:
                file.write(b"n" * 10000)
            os.rename(self.path + ".new", self.path)
        self.each(replace, self.whole)

    def test_deleted_with_its_directory_it_is_sent_to_the_end(self):
        self.each(lambda: shutil.rmtree(os.path.dirname(self.path)), self.whole)

    def test_hundreds_of_them_leave_no_file_open(self):
        server = self.serve()
        files, threads = self.quiet_files(server), server.threads()
        for round in range(300):
            connection, _, _ = begin(server)
            if round % 3 == 0:
                sparse(self.serve_dir, self.SIZE)
            elif round % 3 == 1:
                os.rename(self.path, self.path + ".old")
                os.rename(self.path + ".old", self.path)
            connection.close()
        self.assertIdle(server, files)
        self.assertLess(server.threads(), threads + imgserver.SENDERS + 30)


# -- clients that go away, stop, or are slow -----------------------------------------------

def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# As illumos: the send buffer has 128 KiB.  What is in it the server cannot tell from what the
# client has read, so that one of some MB would have to be read from quickly.
SMALL_BUFFER = """
import socket
adopt = imgserver.EventLoop.adopt
def small(loop, sock, peer):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
    adopt(loop, sock, peer)
imgserver.EventLoop.adopt = small
"""

# A system where the end of a socket wakes nobody.
NEVER_WOKEN = """
import selectors, time
class Deaf(selectors.DefaultSelector):
    def select(self, timeout=None):
        events = super().select(timeout)
        heard = [event for event in events if not (
            isinstance(event[0].data, imgserver.Connection) and event[0].data.failure)]
        if events and not heard:
            time.sleep(0.01)
        return heard
selectors.DefaultSelector = Deaf
"""


class Clients(FileCase):
    seconds = 12
    SIZE = 48 << 20

    def setUp(self):
        super().setUp()
        sparse(self.serve_dir, self.SIZE, {self.SIZE - 3: b"end"})

    def test_going_away_is_one_line_and_leaves_nothing(self):
        ways = (("close", lambda sock: sock.close()), ("reset", reset),
                ("shutdown both", lambda sock: (sock.shutdown(socket.SHUT_RDWR), sock.close())))
        for transport, unix in TRANSPORTS:
            server = self.serve(unix=unix)
            files = self.quiet_files(server)
            for what, leave in ways:
                with self.subTest(what, transport=transport):
                    before = server.log().count("went away")
                    connection, _, rest = begin(server)
                    take(connection, rest, 1 << 20)
                    leave(connection.sock)
                    self.assertIdle(server, files)
                    wait_for(lambda: server.log().count("went away") > before, "the line")
                    self.assertEqual(server.log().count("went away"), before + 1)
            self.assertNotRegex(server.log(), "Traceback| error | warn ")

    def test_going_away_before_the_answer(self):
        for transport, unix in TRANSPORTS:
            with self.subTest(transport):
                server = self.serve(unix=unix)
                files = self.quiet_files(server)
                for leave in (socket.socket.close, reset) * 20:
                    connection = server.connect()
                    ask(connection)
                    leave(connection.sock)
                self.assertIdle(server, files)
                self.assertNotRegex(server.log(), "Traceback| error | warn ")

    def test_half_closed_the_answer_still_comes_whole(self):
        for transport, unix in TRANSPORTS:
            with self.subTest(transport):
                server = self.serve(unix=unix)
                files = self.quiet_files(server)
                connection, length, rest = begin(server)
                with connection:
                    connection.sock.shutdown(socket.SHUT_WR)
                    self.assertEqual(take(connection, rest, length)[1], self.SIZE)
                    self.assertTrue(connection.closed())
                self.assertIdle(server, files)

    def test_half_closed_for_reading_it_is_cut(self):
        for transport, unix in TRANSPORTS:
            with self.subTest(transport):
                server = self.serve(unix=unix, config={"stall_timeout": 1})
                files = self.quiet_files(server)
                connection, _, _ = begin(server)
                with connection:
                    connection.sock.shutdown(socket.SHUT_RD)
                    server.wait_log("went away|taken nothing")
                self.assertIdle(server, files)

    def test_who_takes_nothing_is_cut_and_who_is_slow_is_not(self):
        for transport, unix in TRANSPORTS:
            with self.subTest(transport):
                server = self.serve(unix=unix, config={"stall_timeout": 1}, prelude=SMALL_BUFFER)
                files = self.quiet_files(server)
                slow, length, _ = begin(server)
                began = time.monotonic()
                stalled, _, _ = begin(server)
                cut = None
                while cut is None or time.monotonic() < began + 2:
                    data = slow.recv(32768)
                    self.assertTrue(data, "a steady reader was cut")
                    if cut is None and "taken nothing" in server.log():
                        cut = time.monotonic() - began
                    self.assertLess(time.monotonic() - began, PATIENCE,
                                    "a stalled reader was not cut")
                    # This client is slow: that is what is tested.  It must empty a third of
                    # the buffer within a second on a busy machine as well.
                    time.sleep(0.02)
                self.assertGreater(cut, 0.9)
                self.assertEqual(take(slow, b"", 4 << 20)[1], 4 << 20)
                self.assertLess(take(stalled, b"", length)[1], length)
                self.assertEqual(server.log().count("taken nothing"), 1)
                slow.close()
                stalled.close()
                self.assertIdle(server, files)

    def test_who_takes_nothing_is_cut_where_that_wakes_no_thread(self):
        server = self.serve(config={"stall_timeout": 1}, prelude=NEVER_WOKEN)
        files = self.quiet_files(server)
        connection, length, _ = begin(server)
        with connection:
            server.wait_log("taken nothing")
            self.assertLess(take(connection, b"", length)[1], length)
            self.assertIdle(server, files)

    def test_fifty_at_once_get_every_byte(self):
        write_image(self.serve_dir, uuid_of(2), DATA)
        server = self.serve()
        files = self.quiet_files(server)
        connections = [begin(server, f"/datasets/{uuid_of(2)}/image.zfs.gz",
                             connect=lambda server: server.connect()) for _ in range(50)]
        for connection, length, rest in connections:
            with connection:
                self.assertEqual(take(connection, rest, length),
                                 (hashlib.sha1(DATA).hexdigest(), len(DATA)))
        self.assertIdle(server, files)

    def test_pipelined_downloads_come_in_order(self):
        write_image(self.serve_dir, uuid_of(2), DATA)
        path = f"/datasets/{uuid_of(2)}/image.zfs.gz"
        for transport, unix in TRANSPORTS:
            with self.subTest(transport), self.serve(unix=unix).connect() as connection:
                for first in (0, 1, 2, 3):
                    ask(connection, path, f"Range: bytes={first}-\r\n")
                    ask(connection, "/ping")
                for first in (0, 1, 2, 3):
                    self.assertEqual(connection.answer().body, DATA[first:])
                    self.assertEqual(connection.answer().json()["ping"], "pong")

    def test_after_a_download_who_reads_nothing_holds_up_nobody(self):
        for number in range(3, 400):                  # a list larger than the socket's buffers
            write_image(self.serve_dir, uuid_of(number), description="x" * 5000)
        write_image(self.serve_dir, uuid_of(2), DATA)
        os.utime(self.serve_dir, (1, 1))              # or a thread would look for changes
        for transport, unix in TRANSPORTS:
            with self.subTest(transport):
                server = self.serve(unix=unix)
                server.get("/datasets", {"Host": "h"})    # from now on the loop sends it
                with server.connect() as connection:
                    answer = connection.request(f"/datasets/{uuid_of(2)}/image.zfs.gz")
                    self.assertEqual(answer.body, DATA)
                    ask(connection, "/datasets")
                    self.assertTrue(readable(connection.sock, PATIENCE))
                    self.assertEqual(server.get("/ping").status, 200)


# -- parts and conditions --------------------------------------------------------------------

SMALL = bytes(range(200)) * 5                       # 1,000 bytes
WHOLE = None
RANGES = (
    ("bytes=0-0", (0, 0)), ("bytes=5-", (5, 999)), ("bytes=-5", (995, 999)),
    ("bytes=0-", (0, 999)), ("bytes=999-", (999, 999)), ("bytes=0-999", (0, 999)),
    ("bytes=0-1000", (0, 999)), ("bytes=0-999999999999", (0, 999)), ("bytes=10-19", (10, 19)),
    ("bytes=-1000", (0, 999)), ("bytes=-1001", (0, 999)), ("bytes=007-009", (7, 9)),
    ("bytes=0-9999999999999999999", (0, 999)),
    ("bytes=1000-", 416), ("bytes=1000-2000", 416), ("bytes=-0", 416),
    ("bytes=9999999999999999999-", 416),
    ("bytes=5-4", WHOLE), ("bytes=a-b", WHOLE), ("bytes=", WHOLE), ("bytes=-", WHOLE),
    ("BYTES=0-1", WHOLE), ("items=0-1", WHOLE), ("bytes", WHOLE), ("", WHOLE), ("0-1", WHOLE),
    ("bytes=\u00d9\u00a3-", WHOLE), ("bytes=1_0-", WHOLE), ("bytes=+1-", WHOLE),
    ("bytes= 0-1", WHOLE), ("bytes=0 -1", WHOLE), ("bytes=0x1-", WHOLE), ("bytes=0-1x", WHOLE),
    ("bytes=--1", WHOLE), ("bytes=0--1", WHOLE), ("bytes=1.5-", WHOLE),
    ("bytes=0-0,2-2", WHOLE), ("bytes=0-0,", WHOLE), ("bytes=,0-0", WHOLE),
    ("bytes=" + "," * 10000, WHOLE), ("bytes=" + "0-," * 5000, WHOLE),
    ("bytes=" + "9" * 10000 + "-", WHOLE),
)


class Small(FileCase):

    def test_one_that_cannot_be_read_is_an_error_and_no_loss_of_the_client(self):
        write_image(self.serve_dir, UUID, SMALL)
        for what, body in (("EIO", "raise OSError(5, 'disk')"), ("short", "data = data[:-1]")):
            for transport, unix in TRANSPORTS:
                with self.subTest(what, transport=transport):
                    server = self.serve(unix=unix, prelude=f"""
import os
pread = os.pread
def failing(fd, count, offset):
    data = pread(fd, count, offset)
    if len(data) == {len(SMALL)}:
        {body}
    return data
os.pread = failing
imgserver.MD5_LIMIT = 0
""")
                    with server.connect() as connection:
                        answer = connection.request(FILE)
                        self.assertEqual((answer.status, answer.json()["code"]),
                                         (503, "ServiceUnavailableError"))
                        self.assertEqual(connection.request("/ping").status, 200)
                    server.wait_log(r"error .* the file cannot be read")


class Parts(FileCase):

    def setUp(self):
        super().setUp()
        self.manifest = write_image(self.serve_dir, UUID, SMALL)

    def test_ranges(self):
        for transport, unix in TRANSPORTS:
            with self.serve(unix=unix).connect() as connection:
                for value, wanted in RANGES:
                    for target in (FILE, f"/images/{UUID}/file"):
                        with self.subTest(value[:40], transport=transport, target=target):
                            self.check(connection.request(target, headers={"Range": value}),
                                       wanted)

    def check(self, answer, wanted):
        if wanted == 416:
            self.assertError(answer, 416)
            self.assertEqual(answer.headers["content-range"], "bytes */1000")
        elif wanted is WHOLE:
            self.assertEqual((answer.status, answer.body), (200, SMALL))
            self.assertNotIn("content-range", answer.headers)
        else:
            first, last = wanted
            self.assertEqual((answer.status, answer.body), (206, SMALL[first:last + 1]))
            self.assertEqual(answer.headers["content-range"], f"bytes {first}-{last}/1000")
            self.assertEqual(answer.headers["content-length"], str(last - first + 1))
            self.assertEqual(answer.headers["etag"], f'"{self.manifest["files"][0]["sha1"]}"')
            self.assertNotIn("content-md5", answer.headers)

    def test_any_range_of_an_empty_file(self):
        write_image(self.serve_dir, uuid_of(2), b"")
        server = self.serve()
        for value in ("bytes=0-", "bytes=0-0", "bytes=-5", "bytes=-0"):
            answer = server.get(f"/images/{uuid_of(2)}/file", {"Range": value})
            self.assertError(answer, 416)
            self.assertEqual(answer.headers["content-range"], "bytes */0")

    def test_two_range_headers_are_no_range(self):
        answer = self.serve().raw(f"GET {FILE} HTTP/1.1\r\nHost: h\r\nRange: bytes=0-0\r\n"
                                  "Range: bytes=1-1\r\n\r\n".encode())
        self.assertTrue(answer.startswith(b"HTTP/1.1 200 "))
        self.assertTrue(answer.endswith(SMALL))

    def test_head_passes_over_range(self):
        answer = self.serve().head(FILE, {"Range": "bytes=0-0"})
        self.assertEqual((answer.status, answer.headers["content-length"]), (200, "1000"))

    def test_if_range(self):
        server = self.serve()
        first = server.get(FILE).headers
        etag, date = first["etag"], first["last-modified"]
        for value, status in ((etag, 206), (date, 200), ('"stale"', 200), ("W/" + etag, 200),
                              ("Mon, 01 Jan 2001 00:00:00 GMT", 200), ("garbage", 200), ("", 200),
                              ("*", 200)):
            with self.subTest(value):
                answer = server.get(FILE, {"Range": "bytes=1-2", "If-Range": value})
                self.assertEqual(answer.status, status)
                self.assertEqual(answer.body, SMALL[1:3] if status == 206 else SMALL)

    def test_a_download_cut_off_is_resumed(self):
        server = self.serve()
        first = server.get(FILE)
        start = first.body[:300]
        answer = server.get(FILE, {"Range": "bytes=300-", "If-Range": first.headers["etag"]})
        self.assertEqual(start + answer.body, SMALL)
        write_image(self.serve_dir, UUID, SMALL[::-1])
        answer = server.get(FILE, {"Range": "bytes=300-", "If-Range": first.headers["etag"]})
        self.assertEqual((answer.status, answer.body), (200, SMALL[::-1]))


if __name__ == "__main__":
    unittest.main()
