#!/usr/bin/env python3
"""bench.py - imgserver beside nginx, or beside another imgserver, in the same minutes.

    python3 bench/bench.py [--quick] [--rounds N] [--only NAME,...] [--python PYTHON]
    python3 bench/bench.py --base DIR          beside the imgserver.py in DIR

It makes images in a temporary directory, starts nginx on ready-made files (or the other
imgserver on the images) and imgserver on the images, measures both in turns, and prints one
table: medians, ratios, and the goals.  README.md in this directory says how to read it.

The parts: tools - images - servers - clients - measurements - table - main.
"""

import argparse
import collections
import contextlib
import importlib
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from download import connect, read_answer, read_head, send_request

HERE = os.path.dirname(os.path.abspath(__file__))
IMGSERVER = os.path.join(os.path.dirname(HERE), "imgserver.py")
DOWNLOAD = os.path.join(HERE, "download.py")
PATIENCE = 30                 # seconds until a server that does not start has failed
MIB, GIB = 1 << 20, 1 << 30

IDLE = 10000                  # connections of the row with idle connections
CROWD_IDLE, CROWD_READERS = 500, 50
READER_RATE = 50_000          # bytes/s of a slow reader
READER_STEPS = 5              # reads a second of a slow reader
SLOW = 6000                   # downloads of the row with slow ones
SLOW_RATE = 4096              # bytes/s that each of these takes
UNREAD = 1000                 # clients, each with a Host of its own, that read no byte of a list
FILES_NEEDED = IDLE + 500     # descriptors that this program and each server must have
PINGS = 200                   # manifests asked for while the idle connections stay open

NGINX, OURS, STOCK, BASE = "nginx", "imgserver", "http.server", "base"
FRONT = "imgserver behind nginx"
BOTH = (NGINX, OURS)
IMPORTED, QUIET = "import", "no uploads"      # beside uploads, in nginx's column
UPLOADERS = 16                # uploads at once


class Failure(Exception):
    """What ends the benchmark, in one sentence."""


# -- tools -------------------------------------------------------------------------------

def say(text):
    print(text, file=sys.stderr, flush=True)


def option_parser(text, space):
    """The options of a program that works in a directory with `space` for it."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--quick", action="store_true", help="one round on 256 MiB")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 5; quick: 1")
    parser.add_argument("--python", default=sys.executable,
                        help="the Python that runs imgserver (default: this one)")
    parser.add_argument("--dir", metavar="DIR",
                        help=f"where it works: {space} (default: a temporary directory)")
    return parser


@contextlib.contextmanager
def workplace(name, options):
    """A directory with an empty config.json.  A signal or a Failure ends the program `name`."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    directory = tempfile.mkdtemp(prefix="imgbench-", dir=options.dir)
    try:
        with open(os.path.join(directory, "config.json"), "w") as file:
            file.write("{}\n")
        yield directory
    except Failure as failure:
        sys.exit(f"{name}: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def free_ports(count):
    """Ports that nobody listens on; all are held until the last is found, so no two are one."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]


def wait_for(condition, what):
    """The first true value of condition(), asked every millisecond."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.001)
    raise Failure(f"{what} did not come within {PATIENCE} s")


def children(pid):
    """The processes that a process has started."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open(f"/proc/{name}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(name))
    return found


def cpu_seconds(pid):
    """User and system time of a process, all its threads, those that ended too."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid, key="Pss"):
    """A figure of /proc/PID/smaps_rollup, in MiB."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return int(re.search(rf"(?m)^{key}: +(\d+) kB", file.read())[1]) / 1024


def raise_file_limit():
    """Allow this program, and what it starts, as many files as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(hard, 2 * FILES_NEEDED),) * 2)
        return 2 * FILES_NEEDED
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


# -- images ------------------------------------------------------------------------------

def uuid_of(number):
    value = random.Random(number).getrandbits(128)
    digits = f"{value:032x}"
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-8{digits[17:20]}-{digits[20:]}"


def manifest_of(number, size):
    """A v1 manifest of the usual length, with the fields of an imported image."""
    name, version = f"base-64-lts-{number % 40}", f"{20 + number % 5}.4.{number}"
    day = f"20{13 + number % 12}-{1 + number % 12:02}-{1 + number % 28:02}"
    return {
        "uuid": uuid_of(number), "name": name, "version": version,
        "description": "A 64-bit SmartOS image with just essential packages installed. Ideal "
                       "for users who are comfortable with setting up their own environment.",
        "published_at": f"{day}T{number % 24:02}:{number % 60:02}:00Z",
        "created_at": f"{day}T{number % 24:02}:{number % 60:02}:00Z",
        "type": "zone-dataset", "os": "smartos", "platform_type": "smartos",
        "cloud_name": "sdc", "creator_name": "internal",
        "creator_uuid": "352971aa-31ba-496c-9ade-a379feaecd52",
        "vendor_uuid": "352971aa-31ba-496c-9ade-a379feaecd52",
        "urn": f"sdc:internal:{name}:{version}",
        "requirements": {"networks": [{"name": "net0", "description": "public"}]},
        "files": [{"path": f"{name}-{version}.zfs.gz", "size": size,
                   "sha1": f"{random.Random(-number).getrandbits(160):040x}",
                   "md5": f"{random.Random(-number).getrandbits(128):032x}",
                   "compression": "gzip", "dataset_guid": str(10 ** 18 + number)}],
    }


class ImageSet:
    """A serve_dir of `count` images and, in www, what nginx shows of them.

    The first image's file has `large` bytes where that is given, the others a few.  `ports`
    are imgserver's and nginx's.
    """

    def __init__(self, directory, count, ports, large=0):
        self.count, self.large = count, large
        self.port, self.nginx_port = ports
        self.serve_dir = os.path.join(directory, f"images-{count}")
        self.www = os.path.join(directory, f"www-{count}")
        self.manifests = [manifest_of(number, large if large and not number else 1024)
                          for number in range(count)]
        self.uuid = self.manifests[0]["uuid"]
        self.file = self.manifests[0]["files"][0]["path"]
        data = b"\x1f\x8b" + random.Random(1).randbytes(1022)
        os.mkdir(self.serve_dir)
        for manifest in self.manifests:
            place = os.path.join(self.serve_dir, manifest["uuid"])
            os.mkdir(place)
            with open(os.path.join(place, "manifest.json"), "w") as file:
                json.dump(manifest, file, indent=2)
            with open(os.path.join(place, manifest["files"][0]["path"]), "wb") as file:
                file.write(data)
        self.large_path = os.path.join(self.serve_dir, self.uuid, self.file)
        if large:
            self._write_large()

    def _write_large(self):
        piece = b"\x1f\x8b" + random.Random(2).randbytes(16 * MIB - 2)
        with open(self.large_path, "wb") as file:
            for at in range(0, self.large, len(piece)):
                file.write(piece[:self.large - at])
            file.flush()
            os.fsync(file.fileno())   # or it would be written to the disk while we measure

    def warm(self):
        """Read the large file, so that all of it is in the page cache."""
        with open(self.large_path, "rb", buffering=0) as file:
            buffer = bytearray(MIB)
            while file.readinto(buffer):
                pass

    def write_www(self, server):
        """Make nginx's files of what the server answers, byte for byte."""
        os.makedirs(os.path.join(self.www, "datasets"))
        os.symlink(self.serve_dir, os.path.join(self.www, "files"))
        with connect(server.address) as sock:
            for name, target, headers in [
                    ("list.json", "/datasets", []),
                    ("list.json.gz", "/datasets", ["Accept-Encoding: gzip"]),
                    *((f"datasets/{m['uuid']}", f"/datasets/{m['uuid']}", [])
                      for m in self.manifests)]:
                send_request(sock, target, headers)
                status, head, body = read_answer(sock)
                if status != 200:
                    raise Failure(f"imgserver answered {status} to GET {target}")
                if name.endswith(".gz") and "content-encoding: gzip" not in head.lower():
                    raise Failure("imgserver did not compress the list")
                with open(os.path.join(self.www, name), "wb") as file:
                    file.write(body)


# -- servers -----------------------------------------------------------------------------

class Server:
    """A process that serves.  `targets` has the paths of list, manifest and file."""

    def __init__(self, command, address, targets, what, directory=os.path.dirname(IMGSERVER)):
        self.address, self.targets = address, targets
        self.began = time.monotonic()
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        cwd=directory)
        try:
            wait_for(lambda: self.answers(what), f"{what}'s first answer")
        except BaseException:
            self.end()
            raise

    def answers(self, what):
        if self.process.poll() is not None:
            raise Failure(f"{what} ended with status {self.process.returncode} when it started")
        try:
            with connect(self.address) as sock:
                send_request(sock, self.targets["first"], ["Connection: close"])
                return read_answer(sock)[0] == 200
        except OSError:
            return False

    def pids(self):
        return [self.process.pid]

    def cpu(self):
        return sum(map(cpu_seconds, self.pids()))

    def memory(self):
        return sum(map(memory, self.pids()))

    def end(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class ImgServer(Server):
    """imgserver.py, ours or the base's, on a set of images, on TCP or on a Unix socket."""

    def __init__(self, bench, side, images, unix=False, config=()):
        path = os.path.join(bench.directory, f"config-{side}-{images.count}-{unix}.json")
        with open(path, "w") as file:
            json.dump(dict(config), file)
        address = (os.path.join(bench.directory, f"{side}-{images.count}-{unix}") if unix
                   else ("127.0.0.1", images.port if side == OURS else images.nginx_port))
        listen = address if unix else "%s:%d" % address
        command = [bench.python, "-ES", "-m", "imgserver", "--config", path,
                   "--dir", images.serve_dir, "--listen", listen, "--loglevel", "info"]
        manifest = f"/datasets/{images.uuid}"
        super().__init__(command, address, {
            "first": "/ping", "list": "/datasets", "manifest": manifest,
            "file": f"{manifest}/{images.file}"}, side,
            bench.base if side == BASE else os.path.dirname(IMGSERVER))


def nginx_configuration(bench, prefix, servers):
    """nginx with one worker, which writes below `prefix` alone."""
    temporary = "".join(f"\n    {name}_temp_path {prefix};" for name in (
        "client_body", "proxy", "fastcgi", "scgi", "uwsgi"))
    return f"""\
{"user root;" if os.getuid() == 0 else ""}
worker_processes 1;
worker_rlimit_nofile {bench.files};
daemon off;
pid {prefix}/pid;
error_log {prefix}/error.log crit;
events {{ worker_connections {bench.files}; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    open_file_cache off;
    keepalive_requests 1000000000;
    keepalive_timeout 600;
    client_header_timeout 600;
    send_timeout 600;
    default_type application/json;{temporary}
{servers}
}}
"""


class Nginx(Server):
    """One nginx with one worker for all sets; at(images, unix) is what to ask for one."""

    def __init__(self, bench, sets):
        self.prefix = os.path.join(bench.directory, "nginx")
        self.start(bench, ("127.0.0.1", sets[0].nginx_port), {"first": "/list.json"},
                   self.configuration(bench, sets))

    def start(self, bench, address, targets, servers):
        os.mkdir(self.prefix)
        path = os.path.join(self.prefix, "nginx.conf")
        with open(path, "w") as file:
            file.write(nginx_configuration(bench, self.prefix, servers))
        command = [bench.nginx, "-p", self.prefix, "-c", path]
        test = subprocess.run([*command, "-t", "-q"], stderr=subprocess.PIPE, text=True)
        if test.returncode:
            raise Failure(f"nginx refuses its configuration: {test.stderr.strip()}")
        Server.__init__(self, command, address, targets, "nginx")
        self.workers = wait_for(lambda: children(self.process.pid), "nginx's worker")

    def configuration(self, bench, sets):
        return "".join(f"""
    server {{
        listen 127.0.0.1:{images.nginx_port};
        listen unix:{self.socket(images)};
        root {images.www};
        location = /list.json {{ gzip_static on; }}
    }}""" for images in sets)

    def socket(self, images):
        return os.path.join(self.prefix, f"s-{images.count}")

    def at(self, images, unix):
        self.address = self.socket(images) if unix else ("127.0.0.1", images.nginx_port)
        self.targets = {"list": "/list.json", "manifest": f"/datasets/{images.uuid}",
                        "file": f"/files/{images.uuid}/{images.file}"}
        return self

    def pids(self):
        return self.workers


class Front(Nginx):
    """nginx on TCP before imgserver on a Unix socket; with accel nginx reads the files itself."""

    def __init__(self, bench, images, accel):
        self.back = ImgServer(bench, OURS, images, "accel" if accel else "proxied",
                              {"accel": "/files"} if accel else {})
        try:
            [port] = free_ports(1)
            self.prefix = f"{self.back.address}-nginx"
            self.start(bench, ("127.0.0.1", port), self.back.targets, f"""
    upstream imgserver {{ server unix:{self.back.address}; keepalive 16; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://imgserver;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_max_temp_file_size 0;
        }}
        location /files/ {{
            internal;
            alias {images.serve_dir}/;
            max_ranges 1;
            etag off;
            add_header ETag $upstream_http_etag;
        }}
    }}""")
        except BaseException:
            self.back.end()
            raise

    def pids(self):
        return self.workers + self.back.pids()

    def end(self):
        super().end()
        self.back.end()


class StockServer(Server):
    """python3 -m http.server on the files that nginx serves."""

    def __init__(self, bench, images):
        [port] = free_ports(1)
        command = [bench.python, "-m", "http.server", str(port), "--bind", "127.0.0.1",
                   "--directory", images.www]
        super().__init__(command, ("127.0.0.1", port), {
            "first": "/list.json", "manifest": f"/datasets/{images.uuid}"}, "http.server")


class Bench:
    """What all measurements share: options, the images, and the servers that run."""

    def __init__(self, options, stack, directory):
        self.quick, self.python, self.directory = options.quick, options.python, directory
        self.base = options.base
        # Have it compiled, as `make` does for the service.
        for place in filter(None, (os.path.dirname(IMGSERVER), self.base)):
            subprocess.run([self.python, "-ES", "-c", "import sys; sys.path.insert(0, "
                            "sys.argv[1]); import imgserver", place], check=True)
        self.wrk = find_tool("wrk")
        self.seconds = 1 if options.quick else options.seconds
        self.files = raise_file_limit()
        self.idle = min(IDLE, self.files - 500)
        self.notes = []
        self._stack, self._running = stack, {}
        large = 256 * MIB if options.quick or self.base else 2 * GIB
        say(f"making 100, 1,000 and 10,000 images, and a file of {large // MIB} MiB")
        ports = free_ports(6)
        self.small = ImageSet(directory, 100, ports[0:2], large)
        self.middle = ImageSet(directory, 1000, ports[2:4])
        self.large = ImageSet(directory, 10000, ports[4:6])
        self.sets = (self.small, self.middle, self.large)
        if not self.base:
            self._start_nginx()

    def _start_nginx(self):
        self.nginx = find_tool("nginx")
        built = subprocess.run([self.nginx, "-V"], stderr=subprocess.PIPE, text=True).stderr
        if "http_gzip_static_module" not in built:
            raise Failure("this nginx was built without http_gzip_static_module, which is needed")
        for images in self.sets:
            images.write_www(self.server(OURS, images))
        self._nginx = self._stack.enter_context(ending(Nginx(self, self.sets)))
        for images in self.sets:
            self.compare(images)

    def server(self, side, images, unix=False):
        """The server of a side for a set of images, started when it is first asked for."""
        if side == NGINX:
            return self._nginx.at(images, unix)
        key = side, images.count, unix
        if key not in self._running:
            server = (StockServer(self, images) if side == STOCK
                      else Front(self, images, unix == "accel") if side == FRONT
                      else ImgServer(self, side, images, unix))
            self._running[key] = self._stack.enter_context(ending(server))
        return self._running[key]

    @contextlib.contextmanager
    def fresh(self, side, images, config=()):
        """The same, but imgserver is a new one that ends with the block."""
        if side == NGINX:
            yield self._nginx.at(images, False)
            return
        old = self._running.pop((side, images.count, False), None)
        if old:                       # it has the port
            old.end()
        with ending(ImgServer(self, side, images, config=config)) as server:
            yield server

    def compare(self, images):
        """Fail unless both servers give the same bytes for the same thing."""
        for name, headers in (("list", []), ("list", ["Accept-Encoding: gzip"]),
                              ("manifest", [])):
            answers = []
            for side in BOTH:
                server = self.server(side, images)
                with connect(server.address) as sock:
                    # The Host is in the URLs of the answer, so both get the same.
                    send_request_as(sock, server.targets[name], images, headers)
                    answers.append(read_answer(sock))
            if answers[0][0] != 200 or answers[0][::2] != answers[1][::2]:
                raise Failure(f"nginx and imgserver differ in the {name} of {images.count} images")

    def note(self, text):
        if text not in self.notes:
            self.notes.append(text)


def send_request_as(sock, target, images, headers):
    """A GET with imgserver's own Host, whoever is asked."""
    lines = [f"GET {target} HTTP/1.1", f"Host: 127.0.0.1:{images.port}", *headers, "", ""]
    sock.sendall("\r\n".join(lines).encode())


@contextlib.contextmanager
def ending(server):
    try:
        yield server
    finally:
        server.end()


def find_tool(name):
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if not path:
        raise Failure(f"{name} is needed and not installed")
    return path


# -- clients -----------------------------------------------------------------------------

UNITS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}


def run_wrk(bench, server, target, connections, headers=()):
    """Drive the server with wrk: requests/s, CPU us per request, p99 in ms."""
    command = [bench.wrk, "-t1", f"-c{connections}", "--latency"]
    for header in headers:
        command += ["-H", header]
    url = "http://%s:%d%s" % (*server.address, target)
    ask(server, target, headers)      # what only the first request costs has its own row
    for seconds in (bench.seconds, 10 * bench.seconds, 100 * bench.seconds):
        before = server.cpu()
        run = subprocess.run([*command, f"-d{seconds}s", url], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
        cpu = server.cpu() - before
        rate = re.search(r"Requests/sec: +([0-9.]+)", run.stdout)
        count = re.search(r"([0-9]+) requests in", run.stdout)
        late = re.search(r"99% +([0-9.]+)(us|ms|s|m)", run.stdout)
        if run.returncode or not (rate and count and late):
            raise Failure(f"wrk failed: {run.stdout.strip()}")
        if int(count[1]):
            break
        # The machine is so slow or busy that no answer came to its end in that time.
        bench.note(f"wrk, {connections} connections, GET {target}, port {server.address[1]}: "
                   f"not one answer within {seconds} s")
    else:
        raise Failure(f"{server.address} gives wrk no answer to GET {target}")
    for trouble in re.findall(r"Non-2xx.*|Socket errors.*", run.stdout):
        bench.note(f"wrk, {connections} connections, GET {target}, port {server.address[1]}: "
                   f"{trouble}")
    return {RATE: float(rate[1]), CPU: cpu / int(count[1]) * 1e6,
            P99: float(late[1]) * UNITS[late[2]]}


def ask(server, target, headers=()):
    """The body of the answer to one request on a connection of its own."""
    with connect(server.address) as sock:
        send_request(sock, target, headers)
        status, _, body = read_answer(sock)
    if status not in (200, 304):
        raise Failure(f"the answer to GET {target} was {status}")
    return body


def run_downloads(server, count, during=None):
    """Download the large file `count` times at once: GB/s and CPU s per GiB.

    during() is called again and again until they have ended.
    """
    address = server.address if isinstance(server.address, str) else "%s:%d" % server.address
    before = server.cpu()
    client = subprocess.Popen([sys.executable, DOWNLOAD, address, server.targets["file"],
                               str(count)], stdout=subprocess.PIPE, text=True)
    try:
        while during:
            during()                  # once at least, however soon they end
            if client.poll() is not None:
                break
            time.sleep(0.02)
        output, _ = client.communicate()
    except BaseException:
        client.kill()
        client.wait()
        raise
    cpu = server.cpu() - before
    if client.returncode:
        raise Failure("a download failed")
    result = json.loads(output)
    return {SPEED: result["bytes"] / result["seconds"] / 1e9,
            CPU_GIB: cpu / (result["bytes"] / GIB)}


def open_idle(server, count):
    """Keep-alive connections that have each been answered one manifest."""
    idle = []
    try:
        for _ in range(count):
            idle.append(connect(server.address))
            send_request(idle[-1], server.targets["manifest"])
            if read_answer(idle[-1])[0] != 200:
                raise Failure("an idle connection was refused")
    except BaseException:
        close_all(idle)
        raise
    return idle


def count_dead(server, idle):
    """How many of them do not answer any more."""
    dead = 0
    for sock in idle:
        try:
            send_request(sock, server.targets["manifest"])
            dead += read_answer(sock)[0] != 200
        except OSError:
            dead += 1
    return dead


def close_all(sockets):
    for sock in sockets:
        sock.close()


class Readers(threading.Thread):
    """Clients that each read the large file at READER_RATE, until stop()."""

    def __init__(self, server, count):
        super().__init__(daemon=True)
        self.socks, self.got = [], []
        self._ending = threading.Event()
        try:
            for _ in range(count):
                sock = connect(server.address, receive_buffer=32 << 10)
                self.socks.append(sock)
                send_request(sock, server.targets["file"])
                status, _, _, body = read_head(sock)
                if status != 200:
                    raise Failure(f"a slow reader was answered {status}")
                sock.setblocking(False)
                self.got.append(len(body))
        except BaseException:
            close_all(self.socks)
            raise
        self.began = time.monotonic()
        self.start()

    def run(self):
        while not self._ending.wait(1 / READER_STEPS):
            due = (time.monotonic() - self.began) * READER_RATE
            for index, sock in enumerate(self.socks):
                with contextlib.suppress(OSError):
                    while self.got[index] < due:
                        data = sock.recv(int(due) - self.got[index] + 1)
                        if not data:
                            break
                        self.got[index] += len(data)

    def stop(self):
        """How many readers got less than nine tenths of what they would have read."""
        self._ending.set()
        self.join()
        wanted = 0.9 * READER_RATE * max(0, time.monotonic() - self.began - 2 / READER_STEPS)
        close_all(self.socks)
        return sum(got < wanted for got in self.got)


# -- measurements ------------------------------------------------------------------------
#
# Each takes (bench, side) and returns figures.  A figure is a name with its unit.

RATE, CPU, P99 = "requests/s", "CPU us/request", "p99 ms"
SPEED, CPU_GIB = "GB/s", "CPU s/GiB"
DROPPED, GROWTH, SLOWEST, PSS = "dropped", "MiB more", "slowest ms", "Pss MiB"
READY, FIRST_LIST, SHOWN = "ready ms", "first list s", "slowest s"
THREADS, REFUSED, LEAVING = "threads", "refused", "slowest ms, leaving"
MEDIAN = "median ms"


def load(images, target, connections, *headers):
    """wrk on one target."""
    def measure(bench, side):
        server = bench.server(side, getattr(bench, images))
        return run_wrk(bench, server, server.targets[target], connections, headers)
    return measure


def not_modified(bench, side):
    """wrk on the long list, with the ETag that the server itself gave it."""
    server = bench.server(side, bench.large)
    with connect(server.address) as sock:
        send_request(sock, server.targets["list"])
        etag = re.search(r"(?im)^etag: *(.+?)\r?$", read_answer(sock)[1])[1]
        send_request(sock, server.targets["list"], [f"If-None-Match: {etag}"])
        if read_answer(sock)[0] != 304:
            raise Failure(f"{side} does not answer 304 to its own ETag")
    return run_wrk(bench, server, server.targets["list"], 16, [f"If-None-Match: {etag}"])


def files(count, unix=False):
    """The large file, `count` times at once."""
    def measure(bench, side):
        bench.small.warm()
        return run_downloads(bench.server(side, bench.small, unix), count)
    return measure


def fronted(count, how):
    """The same through nginx: "proxied" over the Unix socket, or with "accel"."""
    def measure(bench, side):
        bench.small.warm()
        return run_downloads(bench.server(side, bench.small, how if side == FRONT else False),
                             count)
    return measure


def crowded(bench, side):
    """wrk on one manifest beside idle connections and slow readers."""
    server = bench.server(side, bench.small)
    idle = open_idle(server, CROWD_IDLE)
    try:
        readers = Readers(server, CROWD_READERS)
        try:
            result = run_wrk(bench, server, server.targets["manifest"], 16)
        finally:
            starved = readers.stop()
        result[DROPPED] = starved + count_dead(server, idle)
    finally:
        close_all(idle)
    return result


def many_idle(bench, side):
    """What idle connections cost in memory, and what one more client feels of them."""
    with bench.fresh(side, bench.small, {"max_connections": bench.idle + 500}) as server:
        close_all(open_idle(server, 16))
        before = server.memory()
        idle = open_idle(server, bench.idle)
        try:
            growth = server.memory() - before
            slowest = 0
            for _ in range(PINGS):        # over two seconds: what is done once a second shows
                began = time.monotonic()
                close_all(open_idle(server, 1))
                slowest = max(slowest, time.monotonic() - began)
                time.sleep(0.01)
            dead = count_dead(server, idle)
        finally:
            close_all(idle)
    return {GROWTH: growth, SLOWEST: slowest * 1e3, DROPPED: dead}


def memory_idle(bench, side):
    with bench.fresh(side, bench.small) as server:
        ask(server, server.targets["list"])
        ask(server, server.targets["manifest"])
        return {PSS: server.memory()}


def memory_downloads(bench, side):
    """The most that is in use while 16 downloads run."""
    with bench.fresh(side, bench.small) as server:
        seen = []
        run_downloads(server, 16, lambda: seen.append(server.memory()))
        return {PSS: max(seen)}


def memory_list(bench, side):
    with bench.fresh(side, bench.large) as server:
        for _ in range(3):
            ask(server, server.targets["list"])
        return {PSS: server.memory()}


def cold_start(bench, side):
    """A new process on 10,000 images: when it answers /ping, and its first list."""
    with bench.fresh(side, bench.large) as server:
        ready = time.monotonic()
        body = ask(server, server.targets["list"])
        listed = time.monotonic()
    if len(json.loads(body)) != bench.large.count:
        raise Failure("the first list is not full")
    return {READY: (ready - server.began) * 1e3, FIRST_LIST: listed - ready}


class Pinger(threading.Thread):
    """A client that asks for /ping a hundred times a second; slowest() and it begins again."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self._sock, self._worst, self._since = connect(server.address), 0, None
        self._ending = threading.Event()
        self.start()

    def run(self):
        with self._sock, contextlib.suppress(OSError, ValueError):
            while not self._ending.wait(0.01):
                self._since = time.monotonic()
                send_request(self._sock, "/ping")
                read_answer(self._sock)
                self._worst = max(self._worst, time.monotonic() - self._since)
                self._since = None

    def slowest(self):
        """The slowest answer in ms since it was last asked for, one that is due yet too."""
        since = self._since
        worst, self._worst = max(self._worst, time.monotonic() - since if since else 0), 0
        return worst * 1e3

    def stop(self):
        self._ending.set()
        self.join()


def slow_downloads(bench, side):
    """Thousands of downloads that take a few bytes each second, and then all go at once."""
    count = min(SLOW, bench.idle)
    with bench.fresh(side, bench.small, {"max_connections": bench.idle + 500}) as server:
        close_all(open_idle(server, 16))
        before, refused, socks = server.memory(), 0, []
        pinger = Pinger(server)
        try:
            for _ in range(count):
                socks.append(connect(server.address, receive_buffer=32 << 10))
                send_request(socks[-1], server.targets["file"])
            for sock in socks:
                try:
                    refused += read_head(sock)[0] != 200
                except OSError:
                    refused += 1
            pinger.slowest()
            for _ in range(3):
                began = time.monotonic()
                for sock in socks:
                    with contextlib.suppress(OSError):
                        sock.recv(SLOW_RATE, socket.MSG_DONTWAIT)
                time.sleep(max(0, 1 - (time.monotonic() - began)))
            figures = {THREADS: len(os.listdir(f"/proc/{server.process.pid}/task")),
                       GROWTH: server.memory() - before, SLOWEST: pinger.slowest(),
                       REFUSED: refused}
            close_all(socks)
            time.sleep(3)
            figures[LEAVING] = pinger.slowest()
        finally:
            close_all(socks)
            pinger.stop()
    return figures


def unread(target, *headers, count=UNREAD):
    """Clients that ask for the long list, each with a Host of its own, and read nothing."""
    def measure(bench, side):
        with bench.fresh(side, bench.large, {"max_connections": count + 500}) as server:
            ask(server, target, headers)
            before, refused, socks = server.memory(), 0, []
            pinger = Pinger(server)
            try:
                for number in range(count):
                    socks.append(connect(server.address, receive_buffer=32 << 10))
                    lines = [f"GET {target} HTTP/1.1", f"Host: host-{number:04}.example",
                             *headers, "", ""]
                    socks[-1].sendall("\r\n".join(lines).encode())
                most = 0
                for number, sock in enumerate(socks):
                    refused += not sock.recv(12).startswith(b"HTTP/1.1 200")
                    if number % 50 == 0:
                        most = max(most, server.memory())
                with connect(server.address) as sock:     # who reads is served as well
                    send_request(sock, target, headers)
                    refused += read_answer(sock)[0] != 200
                return {REFUSED: refused, GROWTH: max(most, server.memory()) - before,
                        SLOWEST: pinger.slowest()}
            finally:
                close_all(socks)
                pinger.stop()
    return measure


def tail(fresh_each, pause):
    """How late answers for the long list begin, while it is re-checked once a second.

    They are asked for at fixed times, so that one that is late makes the next ones late;
    fresh_each: whole lists; else 304s.
    """
    def measure(bench, side):
        server = bench.server(side, bench.large)
        late = []
        with connect(server.address) as sock:
            send_request(sock, server.targets["list"])
            etag = re.search(r"(?im)^etag: *(.+?)\r?$", read_answer(sock)[1])[1]
            headers = [] if fresh_each else [f"If-None-Match: {etag}"]
            due = time.monotonic()
            end = due + max(3, bench.seconds)
            while due < end:
                time.sleep(max(0, due - time.monotonic()))
                send_request(sock, server.targets["list"], headers)
                sock.recv(1, socket.MSG_PEEK)
                late.append(time.monotonic() - due)
                read_answer(sock)
                due += pause
        return {P99: statistics.quantiles(late, n=100)[98] * 1e3}
    return measure


class Poller:
    """A client that reads the list over and over."""

    def __init__(self, server):
        self.server, self.sock = server, connect(server.address)

    def read(self):
        send_request(self.sock, self.server.targets["list"])
        return read_answer(self.sock)[2]

    def poll(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.read()
            time.sleep(0.005)

    def until(self, condition):
        """Seconds from now until a list fulfils the condition."""
        began = time.monotonic()
        while not condition(self.read()):
            if time.monotonic() - began > PATIENCE:
                raise Failure("a change of the directory never showed in the list")
            time.sleep(0.005)
        return time.monotonic() - began


def changes(bench):
    """Moments of a change: so many, each after some seconds of polling."""
    return [random.uniform(0.2, 1.2) for _ in range(2 if bench.quick or bench.base else 5)]


def added_removed(bench, side):
    """An image renamed into serve_dir and out again, until the lists show it."""
    manifest = manifest_of(99_999, 1024)
    aside = os.path.join(bench.directory, "aside")
    inside = os.path.join(bench.middle.serve_dir, manifest["uuid"])
    shutil.copytree(os.path.join(bench.middle.serve_dir, bench.middle.uuid), aside)
    os.rename(os.path.join(aside, bench.middle.file),
              os.path.join(aside, manifest["files"][0]["path"]))
    with open(os.path.join(aside, "manifest.json"), "w") as file:
        json.dump(manifest, file, indent=2)
    mark = manifest["uuid"].encode()
    poller, slowest = Poller(bench.server(side, bench.middle)), 0
    with poller.sock:
        for pause in changes(bench):
            poller.poll(pause)
            os.rename(aside, inside)
            slowest = max(slowest, poller.until(lambda body: mark in body))
            poller.poll(pause)
            os.rename(inside, aside)
            slowest = max(slowest, poller.until(lambda body: mark not in body))
    shutil.rmtree(aside)
    return {SHOWN: slowest}


def edited(bench, side):
    """A manifest written over in place, until the lists show the new text."""
    path = os.path.join(bench.middle.serve_dir, bench.middle.manifests[500]["uuid"],
                        "manifest.json")
    with open(path, "rb") as file:
        original = file.read()
    poller, slowest = Poller(bench.server(side, bench.middle)), 0
    with poller.sock:
        for number, pause in enumerate(changes(bench)):
            mark = b"edit %03d, A 64-bit SmartOS" % number
            poller.poll(pause)
            write_over(path, original.replace(b"A 64-bit SmartOS", mark))
            slowest = max(slowest, poller.until(lambda body: mark in body))
        write_over(path, original)
        poller.until(lambda body: mark not in body)
    return {SHOWN: slowest}


def write_over(path, data):
    with open(path, "r+b", buffering=0) as file:
        file.write(data)
        file.truncate()


def stream_file(bench):
    """The path of a compressed ZFS stream as real zones have it; made once."""
    path = os.path.join(bench.directory, "stream.gz")
    if not os.path.exists(path):
        importlib.import_module("import").make_file(path, 128 * MIB if bench.quick else GIB)
    return path


def upload(server, path):
    """Publish a file in one request, and delete it; seconds until it was answered."""
    with connect(server.address) as sock, open(path, "rb") as file:
        size, began, sent = os.path.getsize(path), time.monotonic(), 0
        sock.sendall(b"POST /images?action=publish&name=bench&version=1 HTTP/1.1\r\nHost: h\r\n"
                     b"Content-Length: %d\r\n\r\n" % size)
        sock.settimeout(None)
        while sent < size:
            sent += os.sendfile(sock.fileno(), file.fileno(), sent, size - sent)
        status, _, body = read_answer(sock)
        took = time.monotonic() - began
        if status != 200:
            raise Failure(f"an upload was answered {status}: {body!r}")
        uuid = json.loads(body)["uuid"]
        sock.sendall(f"DELETE /images/{uuid} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
        read_head(sock)
    return took


def one_upload(bench, side):
    """The rate of one upload; beside it `import` of the same file into the same directory."""
    path = stream_file(bench)
    size = os.path.getsize(path)
    with open(path, "rb") as file:        # from the page cache, for both
        while file.read(MIB):
            pass
    if side == OURS:
        with bench.fresh(OURS, bench.small, {"manage_from": ["127.0.0.1"]}) as server:
            return {SPEED: size / upload(server, path) / 1e9}
    command = [bench.python, IMGSERVER, "--dir", bench.small.serve_dir]
    began = time.monotonic()
    done = subprocess.run([*command, "import", "-q", "--file", path, "bench", "1", "x"],
                          stdout=subprocess.PIPE, text=True, check=True)
    took = time.monotonic() - began
    shutil.rmtree(os.path.join(bench.small.serve_dir, done.stdout.strip()))
    return {SPEED: size / took / 1e9}


def many_uploads(bench, side):
    """How long one manifest takes, 100 times a second, while others upload."""
    path, ending_soon, late = stream_file(bench), threading.Event(), []
    with bench.fresh(OURS, bench.small, {"manage_from": ["127.0.0.1"]}) as server:
        def keep_on():
            while not ending_soon.is_set():
                upload(server, path)
        threads = [threading.Thread(target=keep_on)
                   for _ in range(UPLOADERS if side == OURS else 0)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        with connect(server.address) as sock:
            end = time.monotonic() + max(3, bench.seconds)
            while time.monotonic() < end:
                began = time.monotonic()
                send_request(sock, server.targets["manifest"])
                read_answer(sock)
                late.append(time.monotonic() - began)
                time.sleep(0.01)
        ending_soon.set()
        for thread in threads:
            thread.join()
    return {MEDIAN: statistics.median(late) * 1e3,
            P99: statistics.quantiles(late, n=100)[98] * 1e3}


# One thing measured.  goals: figure -> goal, "" for none; sides: who is measured, the last
# of them beside nginx; most: its rounds at most where --only names no rows, since it takes
# long or differs little.  A quick run leaves out those of one round.
Work = collections.namedtuple("Work", "name label measure goals sides most")


def work(name, label, measure, sides=BOTH, most=99, **goals):
    """A Work; goals by the keys of FIGURES."""
    return Work(name, label, measure, {FIGURES[key]: goal for key, goal in goals.items()}, sides,
                most)


FIGURES = {"rate": RATE, "cpu": CPU, "p99": P99, "speed": SPEED, "gib": CPU_GIB,
           "dropped": DROPPED, "growth": GROWTH, "slowest": SLOWEST, "pss": PSS, "ready": READY,
           "first": FIRST_LIST, "shown": SHOWN, "threads": THREADS, "refused": REFUSED,
           "leaving": LEAVING, "median": MEDIAN}

# Goals beside the base; of other figures those without an "x" stay.
BASE_GOALS = {RATE: ">= 0.95 x", SPEED: ">= 0.95 x", CPU: "<= 1.05 x", CPU_GIB: "<= 1.05 x",
              PSS: "<= 1.05 x", READY: "<= 1.05 x", FIRST_LIST: "<= 1.05 x"}

# "x" in a goal: times nginx's figure; without it: the figure itself.
WORKS = [
    work("manifest-16", "manifest, 16 connections", load("small", "manifest", 16),
         rate=">= 0.65 x", cpu="<= 1.5 x", p99=""),
    work("manifest-64", "manifest, 64 connections", load("small", "manifest", 64),
         rate=">= 0.65 x", cpu="<= 1.5 x", p99=""),
    work("manifest-256", "manifest, 256 connections", load("small", "manifest", 256),
         rate=">= 0.7 x", cpu="", p99="<= 2.5 x"),
    work("connect", "manifest, each on a new connection, 16",
         load("small", "manifest", 16, "Connection: close"), rate=">= 0.65 x", cpu="", p99=""),
    work("list-100", "list of 100, 16 connections", load("small", "list", 16),
         rate=">= 0.65 x", cpu=""),
    work("list-1000", "list of 1,000, 16 connections", load("middle", "list", 16),
         rate=">= 2.5 x", cpu=""),
    work("list-10000", "list of 10,000, 16 connections", load("large", "list", 16),
         rate=">= 1.3 x", cpu=""),
    work("list-304", "list of 10,000, If-None-Match: 304", not_modified,
         rate=">= 0.7 x", cpu=""),
    work("list-gzip", "list of 1,000, gzip (nginx: gzip_static)",
         load("middle", "list", 16, "Accept-Encoding: gzip"), rate=">= 0.6 x", cpu=""),
    work("file-1", "file, 1 download", files(1), gib="<= 0.95 x", speed=">= 1 x"),
    work("file-4", "file, 4 downloads", files(4), gib="<= 0.6 x", speed=">= 1.3 x"),
    work("file-16", "file, 16 downloads", files(16), gib="<= 0.6 x", speed=">= 1.3 x"),
    work("unix-1", "file over the Unix socket, 1", files(1, True), gib="", speed=">= 0.7 x"),
    work("unix-4", "file over the Unix socket, 4", files(4, True), gib="", speed=">= 0.7 x"),
    work("unix-16", "file over the Unix socket, 16", files(16, True), gib="", speed=">= 0.7 x"),
    work("proxied-1", "file through nginx, 1", fronted(1, "proxied"), (NGINX, FRONT), gib="",
         speed=""),
    work("proxied-16", "file through nginx, 16", fronted(16, "proxied"), (NGINX, FRONT), gib="",
         speed=""),
    work("accel-1", "file by X-Accel-Redirect, 1", fronted(1, "accel"), (NGINX, FRONT),
         gib="<= 1.1 x", speed=">= 0.9 x"),
    work("accel-16", "file by X-Accel-Redirect, 16", fronted(16, "accel"), (NGINX, FRONT),
         gib="<= 1.1 x", speed=">= 0.9 x"),
    work("crowd", "manifest, 16; 500 idle, 50 slow readers", crowded,
         rate=">= 0.55 x", p99="<= 3 x", dropped="<= 0"),
    work("idle", "10,000 idle connections", many_idle, most=3,
         growth="<= 40", slowest="< 10", dropped="<= 0"),
    work("memory-idle", "memory: idle", memory_idle, most=3, pss="<= 20"),
    work("memory-file", "memory: 16 downloads", memory_downloads, most=3,
         pss="<= 30"),
    work("memory-list", "memory: after listing 10,000", memory_list, most=3, pss="<= 60"),
    work("start", "cold start, 10,000 images", cold_start, (OURS,), ready="<= 100",
         first="<= 0.8"),
    work("added", "image added or removed, until listed", added_removed, (OURS,),
         most=3, shown="<= 0.1"),
    work("edited", "image edited in place, until listed", edited, (OURS,), most=3,
         shown="<= 1"),
    work("tail-304", "304s, 100/s, during re-checks of 10,000", tail(False, 0.01), (OURS,),
         most=5, p99="<= 20"),
    work("tail-list", "lists of 10,000, 10/s, during re-checks", tail(True, 0.1), (OURS,),
         most=5, p99="<= 20"),
    work("slow", "6,000 slow downloads", slow_downloads, (OURS,), most=1, threads="<= 40",
         growth="<= 100", slowest="<= 100", leaving="<= 100", refused="<= 0"),
    work("unread-v1", "1,000 unread lists of 10,000, DSAPI", unread("/datasets"), (OURS,),
         most=1, refused="<= 0", growth="<= 100", slowest=""),
    work("unread-v2", "1,000 unread lists of 10,000, IMGAPI", unread("/images"), (OURS,),
         most=1, refused="<= 0", growth="<= 100", slowest=""),
    work("unread-filtered", "1,000 unread lists of 10,000, filtered",
         unread("/datasets?os=smartos"), (OURS,), most=1, refused="<= 0", growth="<= 100",
         slowest=""),
    work("unread-gzip", "100 unread lists of 10,000, gzip",
         unread("/datasets", "Accept-Encoding: gzip", count=100), (OURS,), most=1,
         refused="<= 0", growth="<= 100", slowest=""),
    work("upload-1", "one upload, beside `import`", one_upload, (IMPORTED, OURS), most=3,
         speed=">= 0.9 x"),
    work("upload-16", "manifest, while 16 upload, beside none", many_uploads, (QUIET, OURS),
         most=1, median="<= 3 x", p99="<= 20"),
    work("stock", "for scale: python3 -m http.server, 16", load("small", "manifest", 16),
         (NGINX, STOCK), rate="", cpu="", p99=""),
]


def names_of(item):
    """What a work is called in --only: its name, and the part of it before the dash."""
    return {item.name, item.name.split("-")[0]}


def beside_base(item):
    """The same Work with the base in nginx's place."""
    goals = {figure: BASE_GOALS.get(figure, "" if goal.endswith("x") else goal)
             for figure, goal in item.goals.items()}
    return item._replace(goals=goals, sides=(BASE, OURS))


def chosen(names, quick=False, base=None):
    """The works that --only asks for, in the order of the table."""
    if base:
        return [beside_base(item) for item in chosen(names, quick)
                if not {STOCK, FRONT, IMPORTED, QUIET} & set(item.sides)]
    if not names:
        return [item for item in WORKS if item.most > 1 or not quick]
    known = {name for item in WORKS for name in names_of(item)}
    for name in names.split(","):
        if name not in known:
            raise Failure(f"--only knows no {name!a}: " + ", ".join(sorted(known)))
    return [item for item in WORKS if names_of(item) & set(names.split(","))]


def measure_all(bench, works, rounds, every):
    """{(work's name, figure, side): [a value of each round]}, the sides in turns.

    Who comes first changes with each round.  every: a Work's own `most` does not count.
    """
    values = collections.defaultdict(list)
    for number in range(1, rounds + 1):
        for item in works:
            if number > item.most and not every:
                continue
            for side in item.sides[::-1 if bench.base and number % 2 == 0 else 1]:
                result = item.measure(bench, side)
                for figure in item.goals:
                    values[item.name, figure, side].append(result[figure])
                say(f"round {number}/{rounds}  {item.label}, {side}: " + ", ".join(
                    f"{short(result[figure])} {figure}" for figure in item.goals))
    return values


# -- table -------------------------------------------------------------------------------

def short(value):
    """A number in three or four digits."""
    if value is None:
        return "-"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def reached(goal, value, ratio):
    """Whether a goal such as ">= 0.65 x" or "<= 20" is met; "" where there is none."""
    if not goal:
        return ""
    sign, number = goal.split()[:2]
    compared = ratio if goal.endswith("x") else value
    if compared is None:
        return "?"
    return "yes" if {">=": compared >= float(number), "<=": compared <= float(number),
                     "<": compared < float(number)}[sign] else "NO"


def ratios_of(theirs, ours):
    """Our figure over nginx's, for each round; none where nginx's is 0 or was not taken."""
    return [b / a for a, b in zip(theirs, ours) if a]


def row_of(item, figure, values):
    theirs = values.get((item.name, figure, item.sides[0]), []) if len(item.sides) > 1 else []
    ours = values[item.name, figure, item.sides[-1]]
    ratios = ratios_of(theirs, ours) if figure not in (DROPPED, REFUSED) else []
    middle = statistics.median(ours)
    ratio = statistics.median(ratios) if ratios else None
    spread = f"{short(min(ratios))} - {short(max(ratios))}" if len(ratios) > 1 else ""
    return [item.label, figure, short(statistics.median(theirs)) if theirs else "-",
            short(middle), short(ratio) if ratios else "-", spread, item.goals[figure],
            reached(item.goals[figure], middle, ratio)]


def print_table(head, rows, right):
    """Text that is a Markdown table too; the columns `right` are aligned to the right."""
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]

    def line(cells):
        return "| " + " | ".join(cell.rjust(width) if at in right else cell.ljust(width)
                                 for at, (cell, width) in enumerate(zip(cells, widths))) + " |"

    print(line(head))
    print("|" + "|".join("-" * (width + 1) + (":" if at in right else "-")
                         for at, width in enumerate(widths)) + "|")
    for row in rows:
        print(line(row))


def version_of(bench, directory):
    """The version that an imgserver.py says, and the commit if git knows it."""
    said = subprocess.run([bench.python, os.path.join(directory, "imgserver.py"), "--version"],
                          stdout=subprocess.PIPE, text=True).stdout.strip()
    with contextlib.suppress(OSError):
        commit = subprocess.run(["git", "-C", directory, "rev-parse", "--short", "HEAD"],
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        said += f" {commit.stdout.strip()}"
    return said.strip()


def print_report(bench, works, values, rounds, took):
    if bench.base:
        beside, other = f"base: {version_of(bench, bench.base)}", BASE
    else:
        beside, other = subprocess.run([bench.nginx, "-v"], stderr=subprocess.PIPE,
                                       text=True).stderr.strip().split(": ")[-1], NGINX
    python = subprocess.run([bench.python, "-V"], stdout=subprocess.PIPE, text=True).stdout
    print(f"{python.strip()}, {beside}, Linux {platform.release()}, "
          f"{os.cpu_count()} cores, shared by the clients and the servers.")
    print(f"{rounds} round{'s' * (rounds > 1)} of {bench.seconds} s for each wrk run; file of "
          f"{bench.small.large // MIB:,} MiB in the page cache; files in {bench.directory}; "
          f"{took:.0f} s in all.\n")
    print_table(
        ["work", "figure", other, "imgserver", "ratio", "of rounds", "goal", "reached"],
        [row_of(item, figure, values) for item in works for figure in item.goals], {2, 3, 4})
    print()
    if bench.idle < IDLE:
        print(f"Only {bench.idle:,} idle connections: {bench.files:,} files may be open.")
    if bench.quick:
        print("A quick run, with a smaller file: the table is right in kind, not in detail.")
    for note in bench.notes:
        print(f"Note: {note}")


# -- main --------------------------------------------------------------------------------

def default_place(quick):
    """Where the files are made: a disk; but memory for a run that must be quick, which has no
    time to write 30,000 small files to a disk and remove them again.
    """
    memory = "/dev/shm"
    with contextlib.suppress(OSError):
        room = os.statvfs(memory)
        if quick and room.f_bavail * room.f_frsize > GIB and os.access(memory, os.W_OK):
            return memory
    return None


def parse_options():
    parser = argparse.ArgumentParser(description="Measure imgserver beside nginx.")
    parser.add_argument("--quick", action="store_true",
                        help="one round of short runs and a small file: about a minute")
    parser.add_argument("--base", metavar="DIR", default=None,
                        help="measure beside the imgserver.py in DIR, not beside nginx: a git "
                             "worktree of the version before")
    parser.add_argument("--rounds", type=int, metavar="N",
                        help="rounds to take medians of (default: 5; with --base 7; quick: 1); "
                             "some long rows have fewer, unless --only names rows")
    parser.add_argument("--seconds", type=int, default=3, metavar="N",
                        help="length of each wrk run (default: %(default)s; quick: 1)")
    parser.add_argument("--only", metavar="NAME,...",
                        help="measure only these: " + ", ".join(item.name for item in WORKS))
    parser.add_argument("--python", default=sys.executable,
                        help="the Python that runs imgserver (default: this one)")
    parser.add_argument("--dir", metavar="DIR", default=None,
                        help="where the images are made, 3 GiB (default: a temporary directory; "
                             "quick, or with --base: /dev/shm)")
    options = parser.parse_args()
    options.python = os.path.abspath(shutil.which(options.python) or options.python)
    options.base = options.base and os.path.abspath(options.base)
    options.rounds = options.rounds or (1 if options.quick else 7 if options.base else 5)
    return options


def main():
    options = parse_options()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    began = time.monotonic()
    try:
        if sys.platform != "linux":
            raise Failure("the benchmark reads /proc as Linux has it, so it runs on Linux only")
        works = chosen(options.only, options.quick, options.base)
        if options.base and not os.path.isfile(os.path.join(options.base, "imgserver.py")):
            raise Failure(f"there is no imgserver.py in {options.base}")
        for tool in ("wrk",) if options.base else ("nginx", "wrk"):
            find_tool(tool)
        with contextlib.ExitStack() as stack:
            directory = tempfile.mkdtemp(prefix="imgbench-",
                                         dir=os.path.abspath(options.dir) if options.dir else
                                         default_place(options.quick or options.base))
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            bench = Bench(options, stack, directory)
            values = measure_all(bench, works, options.rounds, options.only)
            print_report(bench, works, values, options.rounds, time.monotonic() - began)
    except Failure as failure:
        sys.exit(f"bench: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
