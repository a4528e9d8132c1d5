"""Lists are sent by position: a client that does not read costs no thread and no copy, and
gets every byte in the end."""

import json
import os
import random
import re
import socket
import unittest
import zlib

import imgserver
from tests.support import (ServerCase, all_in_check, uuid_of, wait_for, write_image,
                           write_v2)
from tests.test_files import SMALL_BUFFER, TRANSPORTS, small_buffer

IMAGES = 100                              # of 10 KB each: a list of 1 MB, more than sockets take


# -- in process ------------------------------------------------------------------------------

class SlowSocket:
    """A socket that takes some bytes, or none, of those it is given."""

    family = socket.AF_UNIX

    def __init__(self, rng, most):
        self.rng, self.most, self.data = rng, most, bytearray()

    def setblocking(self, _):
        pass

    def setsockopt(self, *_):
        pass

    def send(self, data, flags=0):
        if self.rng.random() < 0.2:
            raise BlockingIOError
        taken = bytes(data[:self.rng.randrange(1, self.most)])
        self.data += taken
        return len(taken)

    def sendmsg(self, parts, ancillary=(), flags=0):
        assert len(parts) <= imgserver.PARTS
        return self.send(b"".join(parts))


def whole(texts):
    """The list as it was always sent."""
    indented = [text.replace(b"\n", b"\n  ") for text in texts]
    return b"[\n  " + b",\n  ".join(indented) + b"\n]" if texts else b"[]"


def texts_of(rng, count, size):
    return [b'{\n  "x": "%b"\n}' % (b"y" * rng.randrange(size)) for _ in range(count)]


class Positions(unittest.TestCase):

    def test_every_byte_whatever_the_socket_takes(self):
        for seed in range(60):
            rng = random.Random(seed)
            texts = texts_of(rng, rng.choice((0, 1, 2, 15, 16, 17, 32, 33, 200)),
                             rng.choice((1, 100, 5000, 100_000)))
            with self.subTest(seed):
                listing = imgserver.Listing(texts, lambda text: text)
                self.assertEqual(listing.length, len(whole(texts)))
                sock = SlowSocket(rng, rng.choice((2000, 100_000, 3_000_000)))
                transport = imgserver.Transport(sock)
                wanted = b""
                for part in (b"head", listing, b"between", b"b" * 70_000, listing, b"end"):
                    length = listing.length if part is listing else len(part)
                    transport.queue(part, length)
                    wanted += whole(texts) if part is listing else part
                while True:
                    before = len(sock.data)
                    step = rng.choice((imgserver.ONE_PIECE, imgserver.LOOP_STEP))
                    done = transport.flush(step)
                    self.assertEqual(transport.unsent_bytes, len(wanted) - len(sock.data))
                    self.assertEqual(transport.sent, len(sock.data))
                    self.assertLessEqual(len(sock.data) - before,
                                         max(step, imgserver.LIST_PIECE) + 200_000)
                    if done:
                        break
                    kept = rng.random()           # the cache gets and loses it at any moment
                    if kept < 0.1:
                        listing.keep()
                    elif kept < 0.2:
                        listing.release()
                self.assertTrue(bytes(sock.data) == wanted)
                self.assertFalse(transport.unsent)

    def test_one_step_gives_no_more_than_its_budget(self):
        """However large the images are: many readers share a turn of the event loop."""
        listing = imgserver.Listing([b"x" * 500_000] * 40, lambda text: text)
        listing.keep()
        for number in range(len(listing)):
            listing.parts(number, 0, 1)
        for budget in (1000, 65536, 1 << 20):
            reader = imgserver.ListReader(listing)
            self.assertEqual(sum(map(len, reader.parts(budget))), budget)
        listing.release()
        self.assertEqual(len(imgserver.ListReader(listing).parts(1 << 30)), 1)

    def test_a_list_that_is_not_kept_is_rendered_in_small_pieces(self):
        rendered = []

        def text_of(text):
            rendered.append(len(text))
            return text
        listing = imgserver.Listing([b"x" * 100_000] * 64, text_of)
        del rendered[:]
        list(imgserver.ListReader(listing).parts(1 << 20))
        self.assertLessEqual(sum(rendered), 400_000)


class Lengths(ServerCase):
    """Content-Length is told before a byte is rendered: it must be the length of the bytes."""

    def setUp(self):
        super().setUp()
        log = imgserver.Log("fatal", os.open(os.devnull, os.O_WRONLY))
        self.addCleanup(os.close, log.fd)
        self.config = imgserver.Config({"serve_dir": self.serve_dir, "suffix": ":8080/x",
                                        "channels": [{"name": "a"}, {"name": "b"}]})
        self.store = imgserver.Store(self.config, log, lambda job: None)
        self.site = imgserver.Site(self.config, self.store, log)

    def ask(self, target, host="h", fields=""):
        head = f"GET {target} HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n"
        request = imgserver.parse_request(imgserver._HEAD.match(head))
        try:
            return self.site.answer(request)
        except imgserver.NeedsThread:
            request.may_block = True
            return self.site.answer(request)

    def bytes_of(self, response):
        if isinstance(response.body, imgserver.Listing):
            return b"".join(map(response.body.render, range(len(response.body))))
        return bytes(response.body)

    def test_for_any_host_and_any_images(self):
        rng = random.Random(5)
        images = 0
        for count in (0, 1, 15, 16, 17, 40):
            while images < count:
                images += 1
                write = rng.choice((write_image, write_v2))
                write(self.serve_dir, uuid_of(images),
                      name=rng.choice(("a", "n" * 40)),
                      description="caf\u00e9" * rng.randrange(1, 90),
                      channels=rng.choice((["a"], ["b"])),
                      path=rng.choice(("image.zfs.gz", "a b%\u00e9.gz")))
            wait_for(lambda: len(json.loads(self.bytes_of(self.ask("/datasets")))) == count)
            for host in ("h", "h:1", "a" * 253, "[::1]", "[fe80::1]:65535", "10.0.0.1:"):
                for target in ("/datasets", "/datasets?name=a", "/images?channel=*",
                               "/images?channel=a", "/images?channel=b&name=a",
                               "/images?channel=*&limit=3"):
                    for fields in ("", "Accept-Version: ~2\r\n", "Accept-Encoding: gzip\r\n",
                                   "Accept: application/json\r\n"):
                        with self.subTest(target, host=host, count=count, fields=fields):
                            response = self.ask(target, host, fields)
                            self.assertEqual(response.status, 200)
                            data = self.bytes_of(response)
                            self.assertEqual(response.length, len(data))
                            if b"gzip" in response.fields:
                                data = zlib.decompress(data, 31)
                            json.loads(data)
                            if target == "/datasets" and count:
                                self.assertIn(f"http://{host}".encode(), data)

    def test_gzip_forms_in_use_are_bounded(self):
        for number in range(1, 30):
            write_image(self.serve_dir, uuid_of(number), tags={"x": os.urandom(3000).hex()})
        self.ask("/datasets")
        self.addCleanup(setattr, imgserver, "ZIPPED_LIMIT", imgserver.ZIPPED_LIMIT)
        imgserver.ZIPPED_LIMIT = 200_000
        unread = [self.ask("/datasets", f"h{number}", "Accept-Encoding: gzip\r\n")
                  for number in range(20)]
        kinds = [b"gzip\r\n" in response.fields for response in unread]
        self.assertEqual(kinds[:2], [True, True])
        self.assertFalse(any(kinds[4:]))
        del unread[:]
        again = self.ask("/datasets", "new", "Accept-Encoding: gzip\r\n")
        self.assertIn(b"gzip\r\n", again.fields)


# -- over sockets ----------------------------------------------------------------------------

class Unread(ServerCase):

    def setUp(self):
        super().setUp()
        for number in range(1, IMAGES + 1):
            write_image(self.serve_dir, uuid_of(number), tags={"text": os.urandom(5000).hex()})

    def begin(self, server, target, host, fields=""):
        connection = small_buffer(server)
        self.addCleanup(connection.close)
        connection.send(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n".encode())
        while b"\r\n\r\n" not in connection.buffer:
            data = connection.recv(2048)
            self.assertTrue(data, "the connection ended before the head")
            connection.buffer += data
        return connection

    def test_two_hundred_cost_no_thread_and_little_memory_and_are_read_whole_afterwards(self):
        forms = (("/datasets", ""), ("/images", ""), ("/images?os=smartos", ""),
                 ("/datasets?name=t", ""), ("/images", "Accept-Encoding: gzip\r\n"),
                 ("/datasets", "Accept-Encoding: gzip\r\n"))
        for transport, unix in all_in_check(TRANSPORTS):
            with self.subTest(transport):
                server = self.serve(unix=unix, config={"stall_timeout": 600},
                                    prelude=SMALL_BUFFER, fresh=True)
                wanted = [server.get(target, {"Host": "host"}).body for target, _ in forms]
                for target, fields in forms:
                    self.begin(server, target, "warm", fields).close()
                threads, memory = server.threads(), server.memory()
                begun = [(number, self.begin(server, *(forms[number % len(forms)][:1]),
                                             f"host{number}", forms[number % len(forms)][1]))
                         for number in range(200)]
                self.assertEqual(server.get("/ping").status, 200)
                self.assertLessEqual(server.threads(), threads + 4)
                self.assertLess(server.memory() - memory, 64 << 20)   # 200 copies are 200 MB
                for number, connection in begun:
                    answer = connection.answer()
                    self.assertEqual(answer.status, 200)
                    body = answer.body
                    if "content-encoding" in answer.headers:
                        body = zlib.decompress(body, 31)
                    self.assertTrue(body == re.sub(b"//host/", b"//host%d/" % number,
                                                   wanted[number % len(forms)]), number)
                    connection.close()
                self.assertNotRegex(server.log(), " 503 | warn |taken nothing")

    def test_a_snapshot_that_is_replaced_in_mid_transfer(self):
        for transport, unix in TRANSPORTS:
            with self.subTest(transport):
                server = self.serve(unix=unix, prelude=SMALL_BUFFER)
                before = {target: server.get(target, {"Host": "h"}).body
                          for target in ("/datasets", "/images", "/images?os=smartos")}
                begun = {target: self.begin(server, target, "h") for target in before}
                os.rename(os.path.join(self.serve_dir, uuid_of(50)),
                          os.path.join(self.directory, "gone"))
                write_image(self.serve_dir, uuid_of(51), name="changed")
                write_image(self.serve_dir, uuid_of(999))
                wait_for(lambda: b"changed" in server.get("/images").body, "the changed image")
                self.assertNotIn(uuid_of(50).encode(), server.get("/datasets").body)
                for target, connection in begun.items():
                    self.assertTrue(connection.answer().body == before[target], target)
                    self.assertEqual(connection.request("/ping").status, 200)
                os.rename(os.path.join(self.directory, "gone"),
                          os.path.join(self.serve_dir, uuid_of(50)))


if __name__ == "__main__":
    unittest.main()
