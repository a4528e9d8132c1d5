"""Clients that take and give as little as they can: what they may cost."""

import os
import time
import unittest

from tests.support import SOON, ServerCase, uuid_of, wait_for, write_image

U = uuid_of(1)


class Unread(ServerCase):
    """Answers that nobody reads."""

    seconds = 6

    def test_pipelined_requests_do_not_fill_the_memory(self):
        write_image(self.serve_dir, U, tags={"text": "x" * 90000})
        server = self.serve(config={"stall_timeout": 1}, fresh=True)
        server.get(f"/datasets/{U}")
        before = server.memory()
        request = f"GET /datasets/{U} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
        connections = [server.connect() for _ in range(20)]
        for connection in connections:
            self.addCleanup(connection.close)
            connection.send(request * 200)
        sizes = []
        wait_for(lambda: sizes.append(server.memory())
                 or server.log().count("taken nothing") == len(connections), "the end of all")
        self.assertLess(max(sizes) - before, 60 << 20)
        self.assertEqual(server.get("/ping").status, 200)

    def test_all_pipelined_requests_are_answered_in_order(self):
        for number in range(1, 6):
            write_image(self.serve_dir, uuid_of(number), tags={"text": "x" * 30000})
        server = self.serve()
        order = [uuid_of(1 + number % 5) for number in range(60)]
        with server.connect() as connection:
            connection.send(b"".join(f"GET /images/{uuid} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
                                     for uuid in order))
            self.assertEqual([connection.answer().json()["uuid"] for _ in order], order)


class Trickle(ServerCase):

    def test_a_head_that_begins_behind_an_answered_request_has_header_timeout(self):
        server = self.serve(config={"header_timeout": 1, "idle_timeout": 60})
        with server.connect() as connection:
            connection.send(b"GET /ping HTTP/1.1\r\nHost: a\r\n\r\nGET /pi")
            self.assertEqual(connection.answer().status, 200)
            began = time.monotonic()
            self.assertEqual(connection.answer().status, 408)
            self.assertLess(time.monotonic() - began, SOON)              # not idle_timeout

    def test_a_long_head_byte_by_byte_costs_little(self):
        server = self.serve(config={"header_timeout": 600}, fresh=True)
        with server.connect() as connection:
            connection.send(b"GET /ping HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 90
                            + b"long: " + b"x" * 30000)
            wait_for(lambda: self.cpu(server) > 0, "a first look")
            before = self.cpu(server)
            for _ in range(1000):
                connection.send(b"x")
                time.sleep(0.0002)        # so that each is a packet of its own
            connection.send(b"\r\n\r\n")
            self.assertEqual(connection.answer().status, 200)
            self.assertLess(self.cpu(server) - before, 0.5)

    @staticmethod
    def cpu(server):
        with open(f"/proc/{server.process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    unittest.main()
