"""Answers from memory that a socket does not take at once: whole, in order, without a thread."""

import contextlib
import os
import signal
import time

import imgserver
from tests.support import PATIENCE, ServerCase, uuid_of, wait_for, write_image
from tests.test_files import SMALL_BUFFER, TRANSPORTS, ask, begin, reset, sparse, take

LIST = "/datasets"
IMAGES = 80                               # of 90 KB each: a list of 7 MB, more than sockets take
THREADS = 3                               # the loop's, one that read the images, one for the list


class ListCase(ServerCase):

    def setUp(self):
        super().setUp()
        for number in range(1, IMAGES + 1):
            write_image(self.serve_dir, uuid_of(number), tags={"text": "x" * 90000})

    def each_transport(self, **options):
        """Yields a server on TCP, then one on a Unix socket, and the list that each answers."""
        for _, unix in TRANSPORTS:
            server = self.serve(unix=unix, **options)
            whole = server.get(LIST, {"Host": "h"}).body
            self.assertGreater(len(whole), 6 << 20)
            yield server, whole

    def rest(self, connection, body, length):
        """What is left of a body of which some bytes have come."""
        parts = [body]
        length -= len(body)
        while length:
            data = connection.recv(min(length, 1 << 18))
            self.assertTrue(data, f"the connection ended {length} bytes too early")
            parts.append(data)
            length -= len(data)
        return b"".join(parts)


class LongLists(ListCase):
    seconds = 20

    def test_readers_that_do_not_read_cost_no_thread_and_lose_no_byte(self):
        for server, whole in self.each_transport():
            begun = [begin(server, LIST) for _ in range(50)]
            self.assertLessEqual(server.threads(), THREADS)
            self.assertEqual(server.get("/ping").status, 200)
            for connection, length, body in begun:
                with connection:
                    self.assertTrue(self.rest(connection, body, length) == whole)
            with server.connect() as connection:      # the loop is done with all of them
                self.assertEqual(connection.request("/ping").status, 200)
            self.assertLessEqual(server.threads(), THREADS)
            self.assertNotRegex(server.log(), "went away|Traceback| error ")

    def test_requests_behind_a_long_answer_are_answered_after_it(self):
        for server, whole in self.each_transport():
            with server.connect() as connection:
                for target in ("/ping", LIST, "/ping", LIST, f"{LIST}/{uuid_of(9)}", "/ping"):
                    ask(connection, target)
                self.assertEqual(connection.answer().json()["ping"], "pong")
                self.assertTrue(connection.answer().body == whole)
                self.assertEqual(connection.answer().json()["ping"], "pong")
                self.assertTrue(connection.answer().body == whole)
                self.assertEqual(connection.answer().json()["uuid"], uuid_of(9))
                self.assertEqual(connection.answer().json()["ping"], "pong")

    def test_who_asks_more_while_it_is_sent_is_heard_afterwards(self):
        for server, whole in self.each_transport():
            connection, length, body = begin(server, LIST)
            with connection:
                ask(connection, "/ping")
                self.assertTrue(self.rest(connection, body, length) == whole)
                self.assertEqual(connection.answer().json()["ping"], "pong")

    def test_connection_close_comes_after_the_last_byte(self):
        for server, whole in self.each_transport():
            connection, length, body = begin(server, LIST, "Connection: close\r\n")
            with connection:
                self.assertTrue(self.rest(connection, body, length) == whole)
                self.assertTrue(connection.closed())

    def test_who_takes_nothing_is_cut_and_who_is_slow_is_not(self):
        for server, whole in self.each_transport(config={"stall_timeout": 1},
                                                 prelude=SMALL_BUFFER):
            slow, length, body = begin(server, LIST)
            stalled, _, start = begin(server, LIST)
            with slow, stalled:
                left, parts = length - len(body), [body]
                while "taken nothing" not in server.log():
                    parts.append(slow.recv(min(left, 32768)))
                    self.assertTrue(parts[-1], "a steady reader was cut")
                    left -= len(parts[-1])
                    time.sleep(0.02)      # this client is slow: that is what is tested
                parts.append(self.rest(slow, b"", left))
                self.assertTrue(b"".join(parts) == whole)
                self.assertLess(take(stalled, start, length)[1], length)
            self.assertEqual(server.log().count("taken nothing"), 1)

    def test_going_away_is_one_line_and_leaves_nothing(self):
        for server, _ in self.each_transport():
            files = wait_for(lambda: server.files() if server.files() == server.files() else 0)
            connection, _, _ = begin(server, LIST)
            connection.close()
            server.wait_log("went away: ")
            wait_for(lambda: server.files() <= files, "closed connections")
            self.assertEqual(server.log().count("went away"), 1)
            self.assertNotRegex(server.log(), "Traceback| error | warn ")

    def test_the_log_tells_what_was_sent_and_of_which_image(self):
        data = b"x" * (8 << 20)
        write_image(self.serve_dir, uuid_of(1), data, name="some-image", version="4.1")
        file = f"/datasets/{uuid_of(1)}/image.zfs.gz"
        for server, _ in self.each_transport(prelude="imgserver.LOG_DELAY = 0.01"):
            for target, title in ((LIST, ""), (file, " some-image 4.1")):
                line = f'info \\S+ "GET {target} HTTP/1.1" 200 ([0-9]+) [0-9.]+ms - "[^"]*"{title}'
                with server.connect() as connection:
                    size = len(connection.request(target, headers={"Host": "h"}).body)
                found = server.wait_log(line + "\n")
                self.assertEqual(int(found[1]), size)
                connection, length, _ = begin(server, target)
                reset(connection.sock)
                found = server.wait_log(line + r" \(the client went away: [A-Za-z ]+\)\n")
                self.assertLess(int(found[1]), length)

    def test_it_is_finished_after_sigterm(self):
        for server, whole in self.each_transport():
            connection, length, body = begin(server, LIST)
            with connection:
                server.send_signal(signal.SIGTERM)
                server.wait_log("finishing 1 answers")
                self.assertTrue(self.rest(connection, body, length) == whole)
                self.assertTrue(connection.closed())
            self.assertEqual(server.process.wait(PATIENCE), 0)

    def test_it_is_cut_after_drain_time(self):
        for server, _ in self.each_transport(config={"drain_time": 0.5}):
            connection, length, body = begin(server, LIST)
            with connection:
                self.assertEqual(server.stop(), 0)
                self.assertLess(take(connection, body, length)[1], length)

    def test_a_list_made_in_a_thread_is_sent_by_the_loop(self):
        """The first one of each Host is made in a thread, since it takes so long."""
        for _, unix in TRANSPORTS:
            server = self.serve(unix=unix, prelude="imgserver.THREAD_IDLE = 0.2")
            connection, length, body = begin(server, LIST)
            with connection:
                wait_for(lambda: server.threads() == 1, "the end of the thread")
                whole = self.rest(connection, body, length)
                self.assertTrue(whole == server.get(LIST, {"Host": "h"}).body)

    def test_answers_that_wait_before_a_list_made_in_a_thread_go_first(self):
        for _, unix in TRANSPORTS:
            with self.serve(unix=unix).connect() as connection:
                connection.send(b"GET /ping HTTP/1.1\r\nHost: h\r\n\r\n"
                                b"GET /datasets HTTP/1.1\r\nHost: h\r\n\r\n")
                self.assertEqual(connection.answer().json()["ping"], "pong")
                self.assertEqual(len(connection.answer().json()), IMAGES)

    def test_who_goes_before_a_list_is_made_is_a_line_of_its_own(self):
        made = os.path.join(self.directory, "made")
        prelude = f"""
import os, time
listing = imgserver.Store.listing
def slow(store, api, view, select, text_of, may_block, host=b""):
    while may_block and not os.path.exists({made!r}):
        time.sleep(0.01)
    return listing(store, api, view, select, text_of, may_block, host)
imgserver.Store.listing = slow
"""
        for _, unix in TRANSPORTS:
            server = self.serve(unix=unix, prelude=prelude)
            files, threads = server.files(), server.threads()
            connection = server.connect()
            ask(connection, LIST)
            wait_for(lambda: server.threads() > threads, "the thread that makes it")
            reset(connection.sock)
            with open(made, "w"):
                pass
            server.wait_log("went away: ")
            wait_for(lambda: server.files() <= files, "closed connections")
            os.unlink(made)

    def test_many_readers_share_a_turn_of_the_loop(self):
        """Nobody else is answered before all that can take something have been given some."""
        turns = os.path.join(self.directory, "turns")
        prelude = f"""
turn = worst = 0
flush, send_out = imgserver.Connection.flush, imgserver.EventLoop._send_out
def counting(connection):
    global turn
    transport = connection.transport
    before = transport.unsent_bytes if connection.state is imgserver.SENDING else 0
    flush(connection)
    turn += max(0, before - transport.unsent_bytes)
def at_the_end(server):
    global turn, worst
    send_out(server)
    if turn > worst:
        worst = turn
        with open({turns!r}, "w") as file:
            print(worst, file=file, flush=True)
    turn = 0
imgserver.Connection.flush, imgserver.EventLoop._send_out = counting, at_the_end
"""
        server = self.serve(prelude=prelude)
        whole = server.get(LIST, {"Host": "h"}).body
        begun = [begin(server, LIST, connect=lambda server: server.connect())
                 for _ in range(60)]
        server.send_signal(signal.SIGSTOP)
        try:
            for number, (connection, length, body) in enumerate(begun):
                connection.sock.settimeout(0.03)      # all that the sockets hold
                parts = [body]
                with contextlib.suppress(OSError):
                    while True:
                        parts.append(connection.sock.recv(1 << 20))
                connection.sock.settimeout(PATIENCE)
                begun[number] = connection, length, b"".join(parts)
        finally:
            server.send_signal(signal.SIGCONT)        # now all sockets are ready at once
        for connection, length, body in begun:
            with connection:
                self.assertTrue(self.rest(connection, body, length) == whole)
        server.stop()                                 # it writes no more
        with open(turns) as file:
            self.assertLessEqual(int(file.read()), imgserver.TURN + imgserver.LOOP_STEP)

    def test_head_of_a_file_that_a_thread_has_opened(self):
        server = self.serve(prelude="imgserver.THREAD_IDLE = 0.2")
        files = server.files()
        target = f"/datasets/{uuid_of(1)}/image.zfs.gz"
        with server.connect() as connection:
            for _ in range(20):
                answer = connection.request(target, "HEAD")
                self.assertEqual((answer.status, answer.body), (200, b""))
        size = os.path.getsize(os.path.join(self.serve_dir, uuid_of(1), "image.zfs.gz"))
        self.assertEqual(answer.headers["content-length"], str(size))
        wait_for(lambda: server.files() <= files, "closed files")


class Faults(ListCase):
    seconds = 4
    breaks_it = True

    def test_a_fault_at_a_change_of_state_costs_one_connection(self):
        for method, call in (("modify", 1), ("modify", 2), ("register", 4 + imgserver.SENDERS)):
            prelude = f"""
Selector = imgserver.selectors.DefaultSelector
real, calls = Selector.{method}, 0
def {method}(self, file, *rest):
    global calls
    calls += 1
    if calls == {call}:
        if "{method}" == "modify":
            self.unregister(file)                     # as selectors does where epoll fails
        raise OSError(12, "no memory")
    return real(self, file, *rest)
Selector.{method} = {method}
"""
            for _, unix in TRANSPORTS:
                with self.subTest(method, call=call, unix=unix):
                    server = self.serve(unix=unix, prelude=prelude)
                    files = server.files()
                    with server.connect() as connection:
                        ask(connection, LIST)
                        self.assertLessEqual(len(connection.rest()), IMAGES * 91000)
                    server.wait_log("error internal error")
                    wait_for(lambda: server.files() <= files, "closed connections")
                    self.assertEqual(len(server.get(LIST).json()), IMAGES)

    def test_a_fault_after_a_file_was_opened_leaves_none_open(self):
        server = self.serve(prelude="""
put = imgserver.Connection.put
def fails(connection, response):
    if connection.line.endswith("/file HTTP/1.1"):
        raise MemoryError
    return put(connection, response)
imgserver.Connection.put = fails
""")
        sparse(self.serve_dir, 1 << 20)   # more than is read at once
        files = server.files()
        for method in ("HEAD", "GET") * 3:
            with server.connect() as connection:
                connection.send(f"{method} /images/{uuid_of(1)}/file HTTP/1.1\r\nHost: h\r\n\r\n"
                                .encode())
                self.assertEqual(connection.rest(), b"")
        wait_for(lambda: server.files() <= files, "closed files")
