"""Files are sent by a few threads: slow clients cost none, and a disk that hangs costs one."""

import _thread
import functools
import hashlib
import os
import threading
import time
import unittest
from unittest import mock

import imgserver
from tests.support import ServerCase, uuid_of, wait_for, write_image
from tests.test_files import DATA, SMALL_BUFFER, TRANSPORTS, ask, begin, sparse, take

HUNG = 700_001                            # bytes of the file whose disk hangs
# Reading that file takes until the flag is there.
HANGING_DISK = """
import os, time
def hang(fd):
    while os.fstat(fd).st_size == {size} and not os.path.exists({flag!r}):
        time.sleep(0.01)
sendfile, pread = os.sendfile, os.pread
def hanging_sendfile(out, fd, offset, count):
    hang(fd)
    return sendfile(out, fd, offset, count)
def hanging_pread(fd, count, offset):
    hang(fd)
    return pread(fd, count, offset)
os.sendfile, os.pread = hanging_sendfile, hanging_pread
imgserver.HANG, imgserver.TICK, imgserver.THREAD_IDLE = 0.2, 0.2, 0.2
imgserver.MD5_LIMIT = 0                               # or a worker would read it first
"""


def target_of(number):
    return f"/datasets/{uuid_of(number)}/image.zfs.gz"


class HangingDisk(ServerCase):

    def setUp(self):
        super().setUp()
        self.flag = os.path.join(self.directory, "goes on")
        self.data = os.urandom(HUNG)
        write_image(self.serve_dir, uuid_of(1), self.data, sha1=None)
        write_image(self.serve_dir, uuid_of(2), DATA)

    def each(self, more="", **options):
        for transport, unix in TRANSPORTS:
            with self.subTest(transport):
                if os.path.exists(self.flag):
                    os.unlink(self.flag)
                yield self.serve(unix=unix, **options, prelude=HANGING_DISK.format(
                    size=HUNG, flag=self.flag) + more)

    def begin(self, server, count):
        connections = [server.connect() for _ in range(count)]
        for connection in connections:
            self.addCleanup(connection.close)
            ask(connection, target_of(1))
        return connections

    def go_on(self, server, connections, idle):
        with open(self.flag, "w"):
            pass
        for connection in connections:
            self.assertTrue(connection.answer().body == self.data)
            self.assertEqual(connection.request("/ping").status, 200)
        wait_for(lambda: server.threads() <= idle, f"{idle} threads again")

    def test_it_stops_neither_other_downloads_nor_answers_from_memory(self):
        for server in self.each():
            hung = self.begin(server, 2 * imgserver.SENDERS)
            for _ in range(2 * imgserver.SENDERS):
                self.assertTrue(server.get(target_of(2)).body == DATA)
                self.assertEqual(server.get("/ping").status, 200)
                self.assertEqual(len(server.get("/datasets").json()), 2)
            # the loop's, the senders', one for each hung step, and workers that end soon
            wait_for(lambda: server.threads() <= 1 + imgserver.SENDERS + len(hung), "few threads")
            self.go_on(server, hung, 1 + imgserver.SENDERS)
            self.assertTrue(server.get(target_of(2)).body == DATA)
            self.assertNotRegex(server.log(), "Traceback|went away|cut:")

    def test_threads_are_bounded(self):
        for server in self.each("imgserver.SENDER_THREADS = imgserver.SENDERS + 2\n"):
            hung = self.begin(server, 20)
            limit = 1 + imgserver.SENDERS + 2

            def is_steady():              # for some ticks, once the workers have ended
                end = time.monotonic() + 1
                while time.monotonic() < end:
                    self.assertEqual(server.get("/ping").status, 200)
                    if server.threads() != limit:
                        return False
                return True
            wait_for(is_steady, f"{limit} threads, and no more")
            self.go_on(server, hung, 1 + imgserver.SENDERS)
            self.assertTrue(server.get(target_of(2)).body == DATA)

    def test_a_client_of_it_that_goes_away(self):
        for server in self.each():
            files = server.files()
            for connection in self.begin(server, 6):
                connection.close()
            self.assertTrue(server.get(target_of(2)).body == DATA)
            with open(self.flag, "w"):
                pass
            wait_for(lambda: server.files() <= files, "closed files")
            wait_for(lambda: server.threads() <= 1 + imgserver.SENDERS, "few threads")

    def test_it_does_not_hold_up_the_end(self):
        for server in self.each(config={"drain_time": 0.5}):
            [connection] = self.begin(server, 1)
            wait_for(lambda: server.threads() > 1, "its thread")
            self.assertEqual(server.stop(), 0)
            self.assertLess(len(connection.rest()), HUNG)


class Many(ServerCase):

    def test_three_hundred_slow_downloads_use_the_senders_threads_alone(self):
        size = 4 << 20
        path = sparse(self.serve_dir, size, {size - 3: b"end"})
        with open(path, "rb") as file:
            wanted = hashlib.sha1(file.read()).hexdigest()
        for transport, unix in TRANSPORTS:
            with self.subTest(transport):
                server = self.serve(unix=unix, config={"stall_timeout": 600}, fresh=True,
                                    prelude=SMALL_BUFFER + "imgserver.THREAD_IDLE = 0.2\n")
                files, memory = server.files(), server.memory()
                begun = []
                for _ in range(300):
                    begun.append(begin(server))
                    self.addCleanup(begun[-1][0].close)
                wait_for(lambda: server.threads() <= 1 + imgserver.SENDERS, "few threads")
                self.assertEqual(server.get("/ping").status, 200)
                self.assertLess(server.memory() - memory, 32 << 20)
                for connection, length, rest in begun[:20]:
                    self.assertEqual(take(connection, rest, length), (wanted, size))
                for connection, _, _ in begun:
                    connection.close()                # all at once
                self.assertEqual(server.get("/ping").status, 200)
                wait_for(lambda: server.files() <= files, "closed files")
                self.assertLessEqual(server.threads(), 1 + imgserver.SENDERS + 1)


class Shortage(ServerCase):

    def check(self, prelude, line):
        write_image(self.serve_dir, uuid_of(2), DATA)
        flag = os.path.join(self.directory, "short")
        server = self.serve(prelude=prelude.format(flag=flag))
        server.get("/ping")
        files = server.files()
        with open(flag, "w"):
            pass
        for _ in range(3):
            with server.connect() as connection:
                ask(connection, target_of(2))
                self.assertLess(len(connection.rest()), 1000)
        server.wait_log(line)
        wait_for(lambda: server.log().count(" 200 0 ") == 3, "three lines")
        wait_for(lambda: server.files() <= files, "closed files")
        os.unlink(flag)
        self.assertTrue(server.get(target_of(2)).body == DATA)

    def test_no_thread_to_send_with(self):
        self.check("""
import os
start = imgserver.start_new_thread
def refuse(job, arguments):
    if os.path.exists({flag!r}) and job.__func__ is imgserver.Sender._run:
        raise RuntimeError("can't start new thread")
    start(job, arguments)
imgserver.start_new_thread = refuse
""", "no thread to send it with")

    def test_no_memory_to_wait_for_a_socket(self):
        self.check("""
import os, threading
register = imgserver.selectors.DefaultSelector.register
def fails(selector, sock, event, data=None):
    if os.path.exists({flag!r}) and threading.current_thread() is not threading.main_thread():
        raise OSError(12, "no memory")
    return register(selector, sock, event, data)
imgserver.selectors.DefaultSelector.register = fails
""", "cut: no memory")


class Lists(ServerCase):

    def test_lists_that_take_long_hold_up_no_file(self):
        write_image(self.serve_dir, uuid_of(1), DATA)
        end = os.path.join(self.directory, "end")
        server = self.serve(prelude=f"""
import os, time
imgserver.Workers.watch = lambda workers: None        # no help as for a disk that hangs
select = imgserver.Imgapi._select
def slow(*arguments):
    result = select(*arguments)           # in the event loop it asks for a thread
    while not os.path.exists({end!r}):
        time.sleep(0.01)
    return result
imgserver.Imgapi._select = slow
""")
        lists = [server.connect() for _ in range(2 * imgserver.WORKERS)]
        for connection in lists:
            self.addCleanup(connection.close)
            ask(connection, "/images?name=test")
        self.assertEqual(server.get(target_of(1)).body, DATA)
        open(end, "w").close()
        for connection in lists:
            self.assertEqual(connection.answer().status, 200)


class Pipelined(ServerCase):

    def test_an_answer_does_not_wait_for_the_thread_of_the_next_request(self):
        flag = os.path.join(self.directory, "goes on")
        server = self.serve(prelude=f"""
import os, time
def slow(self, request):
    while not os.path.exists({flag!r}):
        time.sleep(0.01)
    return imgserver.Response(204)
imgserver.Page.root = slow
""")
        with server.connect() as connection:
            connection.send(b"GET /ping HTTP/1.1\r\nHost: h\r\n\r\n"
                            b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
            self.assertEqual(connection.answer().json()["ping"], "pong")
            open(flag, "w").close()
            self.assertEqual(connection.answer().status, 204)


class Workers(unittest.TestCase):
    """In process: every job is done once, and threads are few and end."""

    def setUp(self):
        for name, value in (("THREAD_IDLE", 0.005), ("WORKERS", 4)):
            self.addCleanup(setattr, imgserver, name, getattr(imgserver, name))
            setattr(imgserver, name, value)
        self.threads, self.end = _thread._count(), threading.Event()
        self.workers = imgserver.Workers()

    def tearDown(self):
        self.end.set()                    # of those that hang
        wait_for(lambda: _thread._count() <= self.threads, "the end of idle threads")

    def test_each_job_is_done_once_and_few_at_a_time(self):
        done, running, most = [], [], [0]

        def job(number):
            running.append(number)
            most[0] = max(most[0], len(running))
            time.sleep(number % 7 * 0.001)
            done.append(number)
            running.remove(number)
        for number in range(1000):
            self.workers.submit(functools.partial(job, number))
            if number % 50 == 0:
                time.sleep(0.007)         # about as long as idle threads stay
        wait_for(lambda: len(done) == 1000, "the end of all")
        self.assertEqual(sorted(done), list(range(1000)))
        self.assertLessEqual(most[0], 4)

    def test_long_jobs_do_not_hold_up_short_ones(self):
        for _ in range(20):
            self.workers.submit(self.end.wait, False)
        done = []
        for number in range(20):
            self.workers.submit(functools.partial(done.append, number))
        wait_for(lambda: len(done) == 20, "the short jobs")

    def test_short_jobs_that_hang_are_passed(self):
        for _ in range(10):
            self.workers.submit(self.end.wait)
        done = []
        self.workers.submit(lambda: done.append(1))
        self.workers.replace_hung()       # four more are started, which hang too
        self.assertFalse(done)
        self.workers.replace_hung()
        wait_for(lambda: done, "the last job")

    def test_threads_that_hang_are_bounded(self):
        with mock.patch.object(imgserver, "WORKER_THREADS", 6):
            for _ in range(20):
                self.workers.submit(self.end.wait)
            for _ in range(5):
                self.workers.replace_hung()
            self.assertEqual(self.workers._running, 6)
            self.assertEqual(len(self.workers._waiting), 14)

    def test_no_thread_for_a_job(self):
        with mock.patch.object(imgserver, "start_new_thread", side_effect=RuntimeError):
            for is_short in (True, False) * 5:
                with self.assertRaises(RuntimeError):
                    self.workers.submit(self.fail, is_short)
        done = []
        for number in range(20):
            self.workers.submit(functools.partial(done.append, number))
        wait_for(lambda: len(done) == 20, "all jobs")


if __name__ == "__main__":
    unittest.main()
