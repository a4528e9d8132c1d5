"""What the tests share: answers without a socket, the real server in a process of its own, a
raw HTTP client that hides nothing, and images to serve.

    site = self.site()                           in a test case of ServerCase
    answer = ask(site, "/datasets")              answer.status, .headers, .body, .json()
    server = self.serve()                        the same with a process and a socket
    answer = server.get("/datasets")
    data = server.raw(b"GET / HTTP/1.1\r\n...")   every byte that came back

Where a new test belongs, by its topic (without a socket if that can fail as well):

    a manifest as a value: rules, v1 to v2 and back      test_manifests
    the directory: left out and why, when a change shows test_store; by a set clock test_freshness
    a route's answers and parameters                     test_dsapi, test_imgapi
    conditions, gzip, HEAD, OPTIONS and CORS, the / page test_http_cache, for all routes
    the page for people, also in a browser               test_page; /metrics: test_metrics
    bytes of files: ranges, sendfile, readers that go    test_files; long lists: test_sending
    where a request ends, methods, limits                test_framing; its target: test_paths
    clients that are many, slow or greedy; shortages     test_load, test_hostile
    signals, log, clock, addresses                       test_life; before it serves: test_startup
    commands that write or check the directory           test_import, test_publish, test_check
    beside another program                               test_mkimg, test_make, test_nginx,
                                                         test_zfs, test_imgadm (imgadm.py)
    caches, X-Accel-Redirect, several listeners          test_front
    random input or load for minutes                     fuzz.py, soak.py; not in the suite

A test or class that is random, large or slow carries @check_only: `make check` alone runs it.
What shall be the same in several shells is run in one by the quick tests (all_in_check), and
imgserver.py is not started but forked (Program), with some waits shorter (SHORT).
A class that takes seconds says so in `seconds`: the runner (run.py) begins with the longest.
"""

import contextlib
import gc
import hashlib
import io
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
IMGSERVER = os.path.join(ROOT, "imgserver.py")
PATIENCE = 28         # seconds until a wait has failed: less than header_timeout and drain_time
SOON = 20             # seconds: what need not wait for a time limit is done by then
SETTLED = 0.06        # seconds: what is that old the server need not read again (RACY)
CHECK = os.environ.get("IMGSERVER_CHECK") == "1"     # `make check`: all tests, at full length

# Constants of imgserver.py for which tests wait, shorter in servers that quick tests fork.
SHORT = {} if CHECK else {"LOG_DELAY": 0.02, "TICK": 0.2, "ACCEPT_PAUSE": 0.1}

sys.path.insert(0, ROOT)
import imgserver      # noqa: E402

LOOK = SHORT.get("TICK", imgserver.TICK) + 0.1      # seconds until time limits were looked at

os.umask(0o022)       # whatever the caller's is: some tests serve, or read, as another user

NOBODY = "00000000-0000-0000-0000-000000000000"


def uuid_of(number):
    """A UUID that is easy to read in a failure."""
    return f"{number:08x}-0000-4000-8000-{number:012x}"


def need(*tools):
    """Skip the test, with the reason, where a tool is missing."""
    for tool in tools:
        if not shutil.which(tool):
            raise unittest.SkipTest(f"{tool} is not installed")


def check_only(reason):
    """Leave a test, or all tests of a class, to `make check`: what is random, large, or waits
    for time limits that cannot be made shorter.  `reason` says which of them."""
    def mark(item):
        if CHECK:
            return item
        item.check_only = reason
        return unittest.skip("left to make check: " + reason)(item)
    return mark


def all_in_check(items):
    """All of them in `make check`, else the first alone: shells, or Pythons, that shall all do
    the same."""
    return items if CHECK else items[:1]


def free_port():
    """A port that nobody listens on, and that stays free until the test takes it.

    Systems give away ports from 32768 on (bind to port 0, connect), to any test that runs
    at the same time: only who asks for this one by its number gets it.
    """
    while True:
        port = random.randrange(10000, 30000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def has_ipv6():
    """Whether this machine can be asked by IPv6: to know the protocol is not enough."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return socket.has_dualstack_ipv6()
    except OSError:
        return False


def wait_for(condition, what="the condition", patience=PATIENCE):
    """The first true value of condition(), looked at again and again; AssertionError if none."""
    end = time.monotonic() + patience
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come within {patience} s")
        time.sleep(0.01)


def strict_json(data):
    """The value of JSON as a strict parser takes it."""
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")
    return json.loads(data.decode("ascii"), parse_constant=refuse)


# -- images ------------------------------------------------------------------------------

def write_image(serve_dir, uuid, data=b"not a real stream", manifest=None, path="image.zfs.gz",
                **fields):
    """Make serve_dir/<uuid> with a v1 manifest as the original's import-image wrote it.

    `fields` replace or add fields, None removes one; `manifest` replaces all of it.
    Returns the manifest.
    """
    directory = os.path.join(serve_dir, uuid)
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, path), "wb") as file:
        file.write(data)
    if manifest is None:
        manifest = {
            "name": "test", "version": "1.0.0", "type": "zone-dataset",
            "description": "An image for a test", "published_at": "2013-04-05T06:07:08Z",
            "created_at": "2013-04-05T06:07:08Z", "os": "smartos", "uuid": uuid,
            "creator_uuid": "352971aa-31ba-496c-9ade-a379feaecd52", "creator_name": "internal",
            "vendor_uuid": "352971aa-31ba-496c-9ade-a379feaecd52", "cloud_name": "sdc",
            "platform_type": "smartos", "urn": "sdc:internal:test:1.0.0",
            "requirements": {"networks": [{"name": "net0", "description": "public"}]},
            "files": [{"path": path, "sha1": hashlib.sha1(data).hexdigest(), "size": len(data)}],
        }
        manifest.update(fields)
        manifest = {key: value for key, value in manifest.items() if value is not None}
    write_manifest(serve_dir, uuid, manifest)
    return manifest


def write_v2(serve_dir, uuid, data=b"not a real stream", path="image.zfs.gz", compression="gzip",
             **fields):
    """The same with a v2 manifest as imgadm create writes it: no path, state or owner."""
    manifest = {
        "v": 2, "uuid": uuid, "name": "test", "version": "2.0.0", "type": "zone-dataset",
        "os": "smartos", "files": [{"size": len(data), "compression": compression,
                                    "sha1": hashlib.sha1(data).hexdigest()}],
    }
    manifest.update(fields)
    manifest = {key: value for key, value in manifest.items() if value is not None}
    return write_image(serve_dir, uuid, data, manifest, path)


def write_manifest(serve_dir, uuid, manifest):
    """Put a manifest (a dict, or bytes as they are) into an image's directory, by rename."""
    if not isinstance(manifest, bytes):
        manifest = json.dumps(manifest, indent=2).encode()
    path = os.path.join(serve_dir, uuid, "manifest.json")
    with open(path + ".new", "wb") as file:
        file.write(manifest)
    os.rename(path + ".new", path)


# -- the client --------------------------------------------------------------------------

class Answer:
    """One HTTP response: status, headers (lower-case names), body."""

    def __init__(self, status, headers, body, head):
        self.status, self.headers, self.body, self.head = status, headers, body, head

    def json(self):
        return strict_json(self.body)

    def __repr__(self):
        return f"<Answer {self.status} {self.headers} {self.body[:200]!r}>"


class Connection:
    """A socket to the server, on which nothing happens that a test did not ask for."""

    def __init__(self, address, patience=PATIENCE):
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self.sock = socket.socket(family)
        self.buffer = b""
        try:
            if family != socket.AF_UNIX:  # which with a timeout fails where the queue is full
                self.sock.settimeout(patience)
            self.sock.connect(address)
            self.sock.settimeout(patience)
        except OSError:
            self.sock.close()
            raise

    def send(self, data):
        self.sock.sendall(data)

    def recv(self, size=65536):
        """Some bytes; b"" at the end, also when the server reset the connection."""
        try:
            return self.sock.recv(size)
        except (ConnectionResetError, BrokenPipeError):
            return b""

    def answer(self, method="GET"):
        """The next response, read by its Content-Length; None where the connection ended."""
        while b"\r\n\r\n" not in self.buffer:
            data = self.recv()
            if not data:
                if self.buffer:
                    raise AssertionError(f"the connection ended inside a head: {self.buffer!r}")
                return None
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.1 ([0-9]{3}) .+", line)
        assert match, f"not a status line: {line!r}"
        status = int(match[1])
        headers = {}
        for each in lines:
            name, _, value = each.partition(": ")
            assert name.lower() not in headers, f"{name} is sent twice"
            headers[name.lower()] = value
        length = int(headers.get("content-length", 0))
        if method == "HEAD" or status in (204, 304):
            length = 0
        body = bytearray(self.buffer)         # += of bytes would copy all of it each time
        while len(body) < length:
            data = self.recv()
            if not data:
                raise AssertionError(f"the body ended after {len(body)} of {length} bytes")
            body += data
        self.buffer = bytes(body[length:])
        return Answer(status, headers, bytes(body[:length]), head)

    def request(self, target, method="GET", headers=(), version="1.1"):
        """Send a request and return its Answer.  headers: (name, value) pairs or a dict."""
        headers = dict(headers)
        headers.setdefault("Host", "images.example.com")
        lines = [f"{method} {target} HTTP/{version}"]
        lines += [f"{name}: {value}" for name, value in headers.items() if value is not None]
        self.send(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        return self.answer(method)

    def rest(self):
        """All bytes until the server ends the connection."""
        data, self.buffer = bytearray(self.buffer), b""
        while True:
            more = self.recv()
            if not more:
                return bytes(data)
            data += more

    def closed(self):
        """Whether the server has ended the connection by now, waiting for it a while."""
        return self.recv() == b""

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def reachable(address):
    """Whether somebody listens there: a socket's file is there a moment earlier."""
    try:
        Connection(address).close()
        return True
    except OSError:
        return False


# -- without a socket ---------------------------------------------------------------------

def parse(data):
    """The Request that these bytes are.  Raises imgserver.ApiError."""
    return imgserver.parse_request(imgserver._HEAD.match(data.decode("latin-1")))


class BodyBytes(io.BytesIO):
    """A request's body that has come already."""

    @property
    def received(self):
        return self.tell()


def ask(site, request, method="GET", body=b"", peer="127.0.0.1", **headers):
    """The Answer of a Site to a request, whole bytes or a target, as a thread would get it.

    body      of it; its length is told
    peer      the address of the client; "" is the Unix socket
    headers   field names with _ for -; None leaves one out
    """
    if body:
        headers = {"Content_Length": len(body), **headers}
    if isinstance(request, str):
        headers = {"Host": "images.example.com", **headers}
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()
                 if value is not None]
        request = "\r\n".join([f"{method} {request} HTTP/1.1", *lines, "", ""]).encode("latin-1")
    try:
        parsed = parse(request)
        parsed.may_block, parsed.peer, parsed.body = True, peer, BodyBytes(body)
        response = site.answer(parsed)
    except imgserver.ApiError as refusal:
        response = imgserver.error_response(refusal)
    body = response.body
    if isinstance(body, imgserver.Listing):
        body = b"".join(map(body.render, range(len(body))))
    if response.file is not None:
        body = os.pread(response.file, response.length, response.offset)
        response.close()
    fields = {}
    for line in response.fields.decode("latin-1").split("\r\n")[:-1]:
        name, _, value = line.partition(": ")
        assert name.lower() not in fields, f"{name} is sent twice"
        fields[name.lower()] = value
    return Answer(response.status, fields, bytes(body), response.fields)


def log_of(site):
    """The log of ServerCase.site()'s Site."""
    site.log.flush(wait=True)
    return os.pread(site.log.fd, 1 << 20, 0).decode("ascii")


# -- the server --------------------------------------------------------------------------

def command(*words, prelude="", python=sys.executable):
    """The command line of imgserver.py with these words: imported, as the service has it, since
    a module is compiled once and a script each time.

    prelude   Python that runs in the process before its main: to put a stand-in in the
              place of a system call, with `imgserver` imported
    """
    return [python, "-S", "-c", f"import sys; sys.path.insert(0, {ROOT!r}); import imgserver\n"
                                f"{prelude or ''}\nsys.exit(imgserver.main())", *words]


def be_new():
    """In a forked process: have the descriptors, signals and streams of one that was started."""
    gc.freeze()                   # nothing of the test is ever finalized here
    for fd in map(int, os.listdir("/dev/fd")):
        if fd > 2:                # the test's; one of them tells Popen that all is well
            with contextlib.suppress(OSError):
                os.close(fd)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, None)
        with contextlib.suppress(OSError):            # it is closed
            setattr(sys, name, open(fd, "w" if fd else "r", closefd=False,
                                    errors=getattr(sys, f"__{name}__").errors))


def be_imgserver(words, prelude):
    """In a forked process: run imgserver.py with these words, and end as Python would."""
    status = 1
    try:
        be_new()
        sys.argv = ["imgserver.py", *map(os.fsdecode, words)]
        vars(imgserver).update(SHORT)
        exec(prelude or "", {"imgserver": imgserver, "sys": sys})
        status = imgserver.main()
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except SystemExit as end:     # argparse's
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


class Program(subprocess.Popen):
    """imgserver.py with these words, in a process of its own; `options` are Popen's.

    The quick tests fork it from their own process, which has imported the module: an
    interpreter that starts and loads it costs ten times as much.  `make check` runs `command`.
    """

    def __init__(self, *words, prelude="", preexec_fn=None, **options):
        def become():
            if preexec_fn is not None:
                preexec_fn()
            be_imgserver(words, prelude)
        line = command(*words, prelude=prelude)
        super().__init__(line, preexec_fn=preexec_fn if CHECK else become, **options)


def run_program(*words, data=b"", timeout=PATIENCE * 3, **options):
    """Run imgserver.py to its end with `data` as its standard input; a CompletedProcess."""
    for name in ("stdin", "stdout", "stderr"):
        options.setdefault(name, subprocess.PIPE)
    with Program(*words, **options) as process:
        try:
            output, errors = process.communicate(data or None, timeout)
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(words, process.returncode, output, errors)


def copy_program(directory):
    """Put imgserver.py into a directory, for others to run; returns its path.

    In the quick tests it runs the module here, which is compiled: that costs half as much.
    """
    path = os.path.join(directory, "imgserver.py")
    if CHECK:
        return shutil.copy(IMGSERVER, path)
    with open(path, "w") as file:
        file.write(f"""#!/usr/bin/env python3
import sys
sys.pycache_prefix = {sys.pycache_prefix!r}
sys.path.insert(0, {ROOT!r})
import imgserver
imgserver.__file__ = __file__
sys.exit(imgserver.main())
""")
    os.chmod(path, 0o755)
    return path


class Server:
    """imgserver.py in a process of its own.

    config    dict for its config.json; None: none is written, options alone decide
    unix      listen on a Unix socket instead of TCP
    prelude   as `command` takes it
    fresh     no fork of this process (see Program): for a test that looks at its memory
    """

    def __init__(self, directory, serve_dir, config=None, unix=False, options=(), prelude=None,
                 environment=None, python=sys.executable, wrapper=(), fresh=False):
        self.directory, self.serve_dir = directory, serve_dir
        number = len([name for name in os.listdir(directory) if name.startswith("log")])
        self.log_path = os.path.join(directory, f"log{number}")
        self.address = os.path.join(directory, f"s{number}.sock") if unix else None
        listen = [] if "--listen" in options else ["--listen", self.address or "127.0.0.1:0"]
        arguments = [*listen, "--dir", serve_dir, *options]
        config_path = os.path.join(directory, f"config{number}.json")
        with open(config_path, "w") as file:
            json.dump(config or {}, file)
        arguments += ["--config", config_path]
        with open(self.log_path, "wb") as log:
            if fresh or wrapper or environment or python != sys.executable:
                self.process = subprocess.Popen(
                    [*wrapper, *command(*arguments, prelude=prelude, python=python)], stderr=log,
                    stdin=subprocess.DEVNULL, env={**os.environ, **(environment or {})})
            else:
                self.process = Program(*arguments, prelude=prelude, stderr=log,
                                       stdin=subprocess.DEVNULL)
        try:
            match = self.wait_log(r"imgserver \S+ serves .* on .*")
        except AssertionError:
            self.kill()
            raise AssertionError(f"the server did not start: {self.log()}")
        if not unix:                  # of several addresses the first that is a port
            self.address = ("127.0.0.1", int(re.search(r' http://\S+?:(\d+)(?=[",]|$)',
                                                      match[0])[1]))

    # asking

    def connect(self, patience=PATIENCE):
        return Connection(self.address, patience)

    def get(self, target, headers=(), method="GET", version="1.1"):
        """One request on a connection of its own."""
        with self.connect() as connection:
            return connection.request(target, method, headers, version)

    def head(self, target, headers=()):
        return self.get(target, headers, "HEAD")

    def raw(self, data, half_close=True):
        """Send bytes, and return all bytes that came back until the server closed."""
        with self.connect() as connection:
            with contextlib.suppress(OSError):        # the server may be the first to close
                connection.send(data)
                if half_close:
                    connection.sock.shutdown(socket.SHUT_WR)
            return connection.rest()

    # looking

    def log(self):
        with open(self.log_path, encoding="ascii") as file:
            return file.read()

    def wait_log(self, pattern, patience=PATIENCE):
        """The first match of a regular expression in the log, once it is there."""
        def look():
            if self.process.poll() is not None and not re.search(pattern, self.log()):
                raise AssertionError(f"the server has ended: {self.log()}")
            return re.search(pattern, self.log())
        return wait_for(look, f"a log line {pattern!r}", patience)

    def files(self):
        """The number of its open file descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def threads(self):
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def memory(self, key="VmRSS"):
        """A figure of /proc/PID/status, in bytes: VmRSS, or VmHWM for the peak."""
        with open(f"/proc/{self.process.pid}/status") as file:
            return int(re.search(rf"^{key}:\s+(\d+) kB", file.read(), re.M)[1]) * 1024

    # ending

    def send_signal(self, number):
        self.process.send_signal(number)

    def stop(self, number=signal.SIGTERM):
        """Ask it to end, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def kill(self):
        self.process.kill()
        self.process.wait()


def default_signals():
    """For a child process: its signals as a login has them, whatever nohup or a pipe did."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)


class ServerCase(unittest.TestCase):
    """A test with a directory of its own, and servers that end with it."""

    breaks_it = False         # whether the server's code is made to fail: a traceback is right

    def setUp(self):
        self.directory = tempfile.mkdtemp(prefix="imgserver-test-")
        self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)
        self.serve_dir = os.path.join(self.directory, "images")
        os.mkdir(self.serve_dir)

    def site(self, **config):
        """A Site on self.serve_dir to `ask`; log_of(site) is its log."""
        file = tempfile.TemporaryFile()
        self.addCleanup(file.close)
        config = imgserver.Config({"serve_dir": self.serve_dir, **config})
        log = imgserver.Log("info", file.fileno())
        return imgserver.Site(config, imgserver.Store(config, log, imgserver.run_out), log)

    def serve(self, **options):
        """Start a server on self.serve_dir; it must still be well when the test ends."""
        server = Server(self.directory, options.pop("serve_dir", self.serve_dir), **options)
        self.addCleanup(self.end, server)
        return server

    def end(self, server):
        try:
            if server.process.poll() is None:
                status = server.stop()
                self.assertEqual(status, 0, "the server did not end well: " + server.log())
            if not self.breaks_it:
                self.assertNotIn("Traceback", server.log())
        finally:
            server.kill()

    def assertError(self, answer, status, code=None):
        """An error as every client needs it: JSON with code and message, and no secrets."""
        self.assertEqual(answer.status, status, answer)
        self.assertEqual(answer.headers["content-type"], "application/json")
        error = answer.json()
        self.assertEqual({"code", "message"} - set(error), set())
        self.assertNotIn(self.directory, answer.body.decode())
        if code is not None:
            self.assertEqual(error["code"], code)
        return error


def readable(sock, seconds):
    """Whether a socket has bytes (or its end) to read within some seconds."""
    return bool(select.select([sock], [], [], seconds)[0])


class OneServer:
    """For a ServerCase whose cases all ask one server, and must leave it well."""

    unix = False
    prelude = None            # of the server
    bad_lines = "Traceback"   # a pattern that is in no line of its log

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.home = tempfile.mkdtemp(prefix="imgserver-test-")
        cls.addClassCleanup(shutil.rmtree, cls.home, ignore_errors=True)
        cls.images = os.path.join(cls.home, "images")
        os.mkdir(cls.images)
        cls.fill()
        cls.server = Server(cls.home, cls.images, unix=cls.unix, prelude=cls.prelude, fresh=True)
        cls.addClassCleanup(cls.server.kill)

    @classmethod
    def fill(cls):
        """Put images into cls.images."""

    def setUp(self):
        super().setUp()
        self.logged = len(self.server.log())

    def tearDown(self):
        self.assertIsNone(self.server.process.poll())
        self.assertNotRegex(self.server.log()[self.logged:], self.bad_lines)
