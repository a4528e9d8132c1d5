#!/usr/bin/env python3
"""download.py - fetch a file over HTTP and throw it away.

    python3 download.py HOST:PORT|/SOCKET TARGET COUNT

COUNT downloads of TARGET run at once, a thread for each.  When all have ended, one line of
JSON says how many bytes came and how many seconds it took.  The bytes are copied into one
small buffer: every real client has to take them, but what it does then is its own affair.
"""

import json
import re
import socket
import sys
import threading
import time

COPY = 256 << 10          # bytes copied by one call: small enough to stay in the cache
PATIENCE = 60             # seconds without a byte until a download has failed


def parse_address(text):
    """(host, port), or the path of a socket."""
    if text.startswith("/"):
        return text
    host, _, port = text.rpartition(":")
    return host, int(port)


def connect(address, receive_buffer=None):
    """A connected socket; the receive buffer, in bytes, is set before it connects."""
    unix = isinstance(address, str)
    sock = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
    try:
        sock.settimeout(PATIENCE)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.connect(address)
        if not unix:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        sock.close()
        raise
    return sock


def send_request(sock, target, headers=()):
    """Send a GET; headers are whole lines without their ends."""
    name = sock.getpeername()
    host = "localhost" if isinstance(name, (str, bytes)) else "%s:%d" % name
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}", *headers, "", ""]
    sock.sendall("\r\n".join(lines).encode("latin-1"))


def read_head(sock):
    """(status, the head as text, length of the body, what came of it already)."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(16 << 10)
        if not more:
            raise ConnectionError("the connection ended inside the head of a response")
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    head = head.decode("latin-1")
    status = int(head.split(" ", 2)[1])
    length = re.search(r"(?im)^content-length: *([0-9]+)", head)
    return status, head, int(length[1]) if length and status != 304 else 0, body


def read_answer(sock):
    """(status, head, body) of the next response."""
    status, head, length, body = read_head(sock)
    parts, left = [body], length - len(body)
    while left > 0:
        data = sock.recv(min(left, 1 << 20))
        if not data:
            raise ConnectionError("the connection ended inside the body of a response")
        parts.append(data)
        left -= len(data)
    return status, head, b"".join(parts)


def drain(sock, left):
    """Receive `left` bytes and keep none.  Raises ConnectionError if fewer come."""
    buffer = bytearray(COPY)
    while left > 0:
        size = sock.recv_into(buffer, min(left, len(buffer)))
        if not size:
            raise ConnectionError(f"the connection ended {left} bytes too early")
        left -= size


def download(sock, target):
    """The number of bytes of the body of GET target."""
    send_request(sock, target)
    status, _, length, body = read_head(sock)
    if status != 200:
        raise ConnectionError(f"the answer to GET {target} was {status}")
    drain(sock, length - len(body))
    return length


def run(address, target, count):
    """(bytes of all downloads, seconds from the first request to the last byte)."""
    sizes, failures = [], []
    start = threading.Barrier(count + 1)

    def work(sock):
        with sock:
            start.wait()
            try:
                sizes.append(download(sock, target))
            except OSError as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(connect(address),), daemon=True)
               for _ in range(count)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.monotonic()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    if failures:
        raise failures[0]
    return sum(sizes), seconds


def main():
    if len(sys.argv) != 4:
        sys.exit("usage: download.py HOST:PORT|/SOCKET TARGET COUNT")
    try:
        size, seconds = run(parse_address(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    except OSError as error:
        sys.exit(f"download.py: {error}")
    print(json.dumps({"bytes": size, "seconds": seconds}))


if __name__ == "__main__":
    main()
