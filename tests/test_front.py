"""In front of imgserver: Cache-Control on every route, a cache of nginx in the rack, files that
nginx sends itself (X-Accel-Redirect), and several addresses in one process.

The nginx snippets are those of the README as they stand.
"""

import base64
import hashlib
import os
import re
import socket
import unittest
import urllib.parse

from tests import imgadm, streams, support, test_nginx
from tests.support import (Connection, ServerCase, ask, need, uuid_of, wait_for,
                           write_image, write_v2)

U, V, W = uuid_of(1), uuid_of(2), uuid_of(3)
INCOMING = ".incoming-"
SHARED, BRIEFLY = "public, max-age=86400", "public, max-age=1, stale-if-error=86400"
NEVER, NOTHING = "private, no-cache", "private, no-store"
CHANNELS = [{"name": "release", "default": True}, {"name": "dev"}]

# File names that a URL, a header or nginx may take for something else.
NAMES = ("plain.zfs.gz", "a b  c.gz", "100%#?+;&=.gz", "%41%2e%2e.gz",
         "gr\u00f6\u00df \U0001f600.gz", "x?y=1", "..gz", "'\"$uri.gz", "~back\\slash.gz",
         "[::1]:80")


def unactivated(serve_dir, uuid, data=b"not yet"):
    """An image that waits to be activated."""
    write_v2(serve_dir, uuid, data)
    os.rename(os.path.join(serve_dir, uuid), os.path.join(serve_dir, INCOMING + uuid))


class CacheControl(ServerCase):
    """What a shared cache may keep, and for how long, without a rule of its own."""

    def test_every_route(self):
        write_image(self.serve_dir, U)
        with open(os.path.join(self.serve_dir, U, "icon.png"), "wb") as file:
            file.write(b"an icon")
        site = self.site(channels=CHANNELS)
        write_v2(self.serve_dir, V, channels=["release"])
        for target, wanted in (
                ("/", BRIEFLY), ("/ping", NOTHING), ("/channels", BRIEFLY), ("/images", BRIEFLY),
                ("/images?limit=1", BRIEFLY), ("/images?account=" + W, BRIEFLY),
                ("/images?state=all", NOTHING), (f"/images/{V}", BRIEFLY),
                (f"/images/{V}/file", SHARED), ("/datasets", NEVER), ("/datasets?name=t", NEVER),
                (f"/datasets/{U}", NEVER), (f"/datasets/{U}/image.zfs.gz", SHARED)):
            for method in ("GET", "HEAD"):
                with self.subTest(target, method=method):
                    answer = ask(site, target, method)
                    self.assertEqual(answer.status, 200, answer)
                    self.assertEqual(answer.headers["cache-control"], wanted)
        for target, headers, status in ((f"/images/{V}/file", {"Range": "bytes=1-2"}, 206),
                                        (f"/images/{V}/file", {"If_None_Match": "*"}, 304)):
            answer = ask(site, target, **headers)
            self.assertEqual((answer.status, answer.headers["cache-control"]), (status, SHARED))

    def test_no_error_is_kept(self):
        write_image(self.serve_dir, U)
        site = self.site()
        for target, method, headers, status in (
                (f"/images/{W}", "GET", {}, 404), (f"/images/{W}/file", "GET", {}, 404),
                (f"/datasets/{U}/other", "GET", {}, 404), (f"/images/{U}/icon", "GET", {}, 404),
                (f"/images/{U}/file", "GET", {"Range": "bytes=1000-"}, 416),
                (f"/images/{U}", "GET", {"If_Match": "x"}, 412), ("/nothing", "GET", {}, 404),
                (f"/images/{U}", "GET", {"Accept_Version": "9"}, 400), ("/%", "GET", {}, 400),
                ("/images?sort=x", "GET", {}, 422), ("/images", "DELETE", {}, 405),
                ("/ping?error=StorageIsDown", "GET", {}, 503), ("/images", "BREW", {}, 501)):
            with self.subTest(target, method=method):
                answer = ask(site, target, method, **headers)
                self.assertError(answer, status)
                self.assertEqual(answer.headers["cache-control"], NOTHING)

    def test_images_that_are_not_active_are_not_kept(self):
        """Their file may be replaced at any moment, under the same URL."""
        unactivated(self.serve_dir, U)
        site = self.site()
        for target in (f"/images/{U}", f"/images/{U}/file"):
            self.assertEqual(ask(site, target).headers["cache-control"], NOTHING)

    def test_answers_that_depend_on_a_header_say_so(self):
        write_v2(self.serve_dir, U, channels=["release"])
        site = self.site(channels=CHANNELS)
        for target in ("/images", "/images?limit=1", f"/images/{U}"):
            one, two = (ask(site, target, Accept_Version=version) for version in ("~1", "~2"))
            self.assertNotEqual(one.body, two.body)
            for answer in (one, two):
                self.assertIn("Accept-Version", answer.headers["vary"].split(", "))
        self.assertEqual(ask(self.site(), "/images").headers["vary"], "Accept-Encoding")

    def test_no_answer_that_may_be_kept_holds_the_host(self):
        write_image(self.serve_dir, U)
        site = self.site()
        for target in ("/", "/ping", "/images", "/images?limit=1", f"/images/{U}", "/datasets",
                       "/datasets?name=t", f"/datasets/{U}", "/nothing", f"/images/{W}"):
            answer = ask(site, target, Host="evil.example.com")
            if b"evil" in answer.body + answer.head:
                self.assertIn(answer.headers["cache-control"], (NEVER, NOTHING), target)


class Rack(test_nginx.WithNginx):
    """The cache of a rack, before a server on TCP."""

    seconds = 8
    data = os.urandom(1 << 20) * 33               # three slices, the last one not whole

    def start(self, **options):
        self.server = self.serve(**options)
        self.port = self.start_nginx(
            test_nginx.snippet("rack"),
            ("server 10.0.0.5:8080;", "server %s:%d;" % self.server.address),
            ("/var/cache/imgserver", os.path.join(self.directory, "cache")))
        self.address = "127.0.0.1", self.port

    def get(self, target, headers=(), method="GET"):
        with Connection(self.address) as connection:
            return connection.request(target, method, headers)

    def assertAsked(self, target, count):
        """So often was the server itself asked for a target, by its log."""
        def asked():
            return self.server.log().count(f' {target} HTTP/1.')
        wait_for(lambda: asked() >= count, "the request in the log")
        self.flushed = getattr(self, "flushed", 0) + 1
        self.server.get(f"/ping?flush={self.flushed}.")
        self.server.wait_log(rf"/ping\?flush={self.flushed}\. HTTP")
        self.assertEqual(asked(), count)

    def test_many_clients_one_fetch(self):
        write_v2(self.serve_dir, U, self.data)
        self.start()
        target = f"/images/{U}/file"
        connections = [Connection(self.address) for _ in range(4)]
        for connection in connections:
            self.addCleanup(connection.close)
            connection.request(f"/images/{U}")    # so that nginx has it open
        self.server.send_signal(support.signal.SIGSTOP)
        try:                                      # all ask before the server can answer
            for connection in connections:
                connection.send(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            with Connection(self.address) as last:      # answered by nginx itself, after those
                last.send(b"GET / HTTP/1.1\r\n\r\n")
                self.assertEqual(last.answer().status, 400)
        finally:
            self.server.send_signal(support.signal.SIGCONT)
        for connection in connections:
            answer = connection.answer()
            self.assertEqual(answer.status, 200)
            self.assertTrue(answer.body == self.data)
        self.assertAsked(target, 3)
        again = self.get(target, {"Range": "bytes=17000000-34000000"})
        self.assertEqual((again.status, again.body == self.data[17000000:34000001]), (206, True))
        self.assertAsked(target, 3)

    def test_imgadm_imports_while_the_server_is_down(self):
        stream = os.urandom(1000) * 20000
        write_image(self.serve_dir, U, stream, path="image.zfs")
        write_v2(self.serve_dir, V, streams.pack(b"on top" * 500, "gzip"), origin=U)
        self.start()
        url = f"http://127.0.0.1:{self.port}"
        with imgadm.Imgadm3([imgadm.Source(url, self.address)]) as client:
            client.ping()
            self.assertEqual([image["uuid"] for image in client.avail()], [U, V])
            client.import_image(V)
        self.server.stop()
        errors = os.path.join(self.nginx, "error")

        def refused():                            # so the copy that it has was stale
            self.assertEqual(self.get(f"/images/{V}").status, 200)
            with open(errors, encoding="utf-8") as file:
                return "Connection refused" in file.read()
        wait_for(refused, "a stale answer")
        with imgadm.Imgadm3([imgadm.Source(url, self.address)]) as client:
            self.assertEqual([image["uuid"] for image in client.avail()], [U, V])
            self.assertEqual(client.import_image(V), b"on top" * 500)
            self.assertEqual(client.datasets[U], stream)
        self.assertEqual(self.get("/ping").status, 502)     # a monitor is not deceived

    def test_a_change_is_seen(self):
        write_v2(self.serve_dir, U)
        self.start()
        self.assertError(self.get(f"/images/{V}"), 404)
        self.assertEqual(len(self.get("/images").json()), 1)
        write_v2(self.serve_dir, V)
        self.assertEqual(self.get(f"/images/{V}").status, 200)
        wait_for(lambda: len(self.get("/images").json()) == 2, "the new image in the list")

    def test_no_host_poisons_anything(self):
        write_image(self.serve_dir, U)
        write_v2(self.serve_dir, V, channels=["release"])
        self.start(config={"channels": CHANNELS})
        evil = {"Host": "evil.example.com", "X-Forwarded-Host": "evil.example.com"}
        for path in ("/", "/images", "/images?limit=1", f"/images/{V}", "/images?channel=*",
                     f"/images/{U}?channel=*", "/channels", "/datasets", "/datasets?name=test",
                     f"/datasets/{U}", f"/datasets/{U}/image.zfs.gz", "/nothing"):
            for target in (path, "http://evil.example.com" + path):
                self.get(target, {**evil, "Accept": "application/json", "Accept-Version": "~1"})
                self.get(target, evil)
            with self.subTest(path):
                for headers in ({}, {"Accept-Version": "~2"}):
                    answer, wanted = self.get(path, headers), self.server.get(path, headers)
                    self.assertNotIn(b"evil", answer.body)
                    self.assertEqual((answer.status, answer.body), (wanted.status, wanted.body))

    def test_encodings_of_a_path_are_kept_apart(self):
        write_v2(self.serve_dir, U)
        self.start()
        for target in (f"/images/{U}%2Ffile", f"//images/{U}/file", f"/images/x/../{U}",
                       f"/images/{U}/file%00"):
            for headers in ({}, {"Range": "bytes=0-1"}):
                self.assertIn(self.get(target, headers).status, (400, 404), target)
        self.assertEqual(self.get(f"/images/{U}/file").body, b"not a real stream")

    def test_nothing_private_is_kept(self):
        """The rack's address may publish, so all that it asks for is answered fully."""
        write_v2(self.serve_dir, U)
        unactivated(self.serve_dir, V)
        self.start(config={"publish_from": ["127.0.0.1"]})
        for target in ("/images?state=all", f"/images/{V}", f"/images/{V}/file"):
            with self.subTest(target):
                for count in (1, 2):
                    self.assertEqual(self.get(target).status, 200)
                    self.assertAsked(target, count)
        for target, method in (("/images", "POST"), (f"/images/{U}", "DELETE"),
                               (f"/images/{V}/file", "PUT")):
            self.assertEqual(self.get(target, {"Content-Length": "0"}, method).status, 403)

    def test_a_login_passes_by_the_cache(self):
        write_v2(self.serve_dir, U)
        self.start()
        target = f"/images/{U}/file"
        login = {"Authorization": "Basic " + base64.b64encode(b"joe:secret").decode()}
        for count in (1, 2):
            self.assertEqual(self.get(target, login).status, 200)
            self.assertAsked(target, count)
        self.get(target)                          # what logins fetched is given to nobody
        self.assertAsked(target, 3)
        self.get(target)
        self.assertAsked(target, 3)
        self.get(target, login)                   # and they are not given what is kept
        self.assertAsked(target, 4)

    def test_a_private_image_is_not_given_to_a_stranger(self):
        write_v2(self.serve_dir, U)
        write_v2(self.serve_dir, V, public=False)
        users = os.path.join(self.directory, "users")
        salt = b"sixteen bytes..."
        digest = hashlib.scrypt(b"secret", salt=salt, n=1 << 14, r=8, p=1, dklen=32)
        with open(users, "w", encoding="ascii") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write("joe read scrypt$16384$8$1$%s$%s\n" % tuple(
                each.hex() for each in (salt, digest)))
        self.start(config={"users": users, "read": "public"})
        login = {"Authorization": "Basic " + base64.b64encode(b"joe:secret").decode()}
        targets = (f"/images/{V}", f"/images/{V}/file", f"/datasets/{V}",
                   f"/datasets/{V}/image.zfs.gz")
        for _ in range(2):                        # whoever comes first
            for target in targets:
                self.assertError(self.get(target), 404)
                self.assertEqual(self.get(target, login).status, 200, target)
                self.assertError(self.get(target), 404)
            for target in ("/images", "/images?limit=9", "/datasets"):
                self.assertEqual(len(self.get(target).json()), 1, target)
                self.assertEqual(len(self.get(target, login).json()), 2, target)
                self.assertEqual(len(self.get(target).json()), 1, target)


class AccelAnswers(ServerCase):
    """What nginx is told."""

    def test_the_path_is_percent_encoded(self):
        for number, name in enumerate(NAMES, 1):
            write_image(self.serve_dir, uuid_of(number), path=name)
        site = self.site(listen_port="/run/s", accel="/a/b.c")
        for number, name in enumerate(NAMES, 1):
            for method in ("GET", "HEAD"):
                answer = ask(site, f"/images/{uuid_of(number)}/file", method, peer="")
                self.assertEqual((answer.status, answer.body), (200, b""), answer)
                path = answer.headers["x-accel-redirect"]
                self.assertRegex(path, r"\A[A-Za-z0-9/._~%-]+\Z")
                self.assertEqual(urllib.parse.unquote(path), f"/a/b.c/{uuid_of(number)}/{name}")

    def test_checks_come_first(self):
        write_image(self.serve_dir, U)
        write_image(self.serve_dir, V)
        site = self.site(listen_port="/run/s", accel="/files")
        etag = ask(site, f"/images/{U}/file", peer="").headers["etag"]
        with open(os.path.join(self.serve_dir, V, "image.zfs.gz"), "ab") as file:
            file.write(b"x")
        for target, headers, status in (
                (f"/images/{V}/file", {}, 404), (f"/datasets/{V}/image.zfs.gz", {}, 404),
                (f"/images/{U}/file", {"If_None_Match": etag}, 304),
                (f"/images/{U}/file", {"Range": "bytes=99-"}, 416)):
            answer = ask(site, target, peer="", **headers)
            self.assertEqual(answer.status, status, target)
            self.assertNotIn("x-accel-redirect", answer.headers)
        before = len(os.listdir("/proc/self/fd"))
        self.assertEqual(ask(site, f"/images/{U}/file", peer="").body, b"")
        self.assertEqual(len(os.listdir("/proc/self/fd")), before)

    def test_who_comes_over_tcp_gets_the_bytes(self):
        write_image(self.serve_dir, U)
        site = self.site(listen_port=["/run/s", 80], accel="/files")
        answer = ask(site, f"/images/{U}/file", peer="192.0.2.1")
        self.assertEqual(answer.body, b"not a real stream")
        self.assertNotIn("x-accel-redirect", answer.headers)


class Accel(test_nginx.WithNginx):
    """nginx sends the files."""

    def start(self):
        self.server = self.serve(unix=True, config={"accel": "/files"})
        text = test_nginx.snippet().rstrip()
        self.assertTrue(text.endswith("}"))
        self.port = self.start_nginx(
            text[:-1] + test_nginx.snippet("accel") + "}",
            ("/var/imgserver/imgserver.sock", self.server.address),
            ("alias /images/;", f"alias {self.serve_dir}/;"))
        self.address = "127.0.0.1", self.port

    def get(self, target, method="GET", **headers):
        with Connection(self.address) as connection:
            return connection.request(target, method, {name.replace("_", "-"): value
                                                       for name, value in headers.items()})

    def test_names(self):
        for number, name in enumerate(NAMES, 1):
            write_image(self.serve_dir, uuid_of(number), name.encode() * 1000, path=name)
        self.start()
        for number, name in enumerate(NAMES, 1):
            uuid = uuid_of(number)
            for target in (f"/images/{uuid}/file", f"/datasets/{uuid}/{urllib.parse.quote(name)}"):
                with self.subTest(target):
                    answer = self.get(target)
                    self.assertEqual((answer.status, answer.body), (200, name.encode() * 1000))
        self.assertRegex(self.server.wait_log(r"GET /images/\S+/file HTTP/1.\d. 200 \d+")[0],
                         " 0$")                   # nginx sent the bytes

    def test_as_if_imgserver_had_sent_it(self):
        data = os.urandom(100000)
        write_image(self.serve_dir, U, data)
        unactivated(self.serve_dir, V)
        self.start()
        plain = ask(self.site(), f"/images/{U}/file").headers
        for method in ("GET", "HEAD"):
            answer = self.get(f"/images/{U}/file", method)
            self.assertEqual(answer.status, 200)
            self.assertEqual(answer.body, data if method == "GET" else b"")
            self.assertEqual(answer.headers["content-length"], str(len(data)))
            for name in ("etag", "last-modified", "content-md5", "content-type", "cache-control",
                         "accept-ranges"):
                self.assertEqual(answer.headers.get(name), plain[name], name)
        self.assertEqual(self.get(f"/images/{V}/file").body, b"not yet")

    def test_ranges_and_conditions(self):
        data = os.urandom(100000)
        write_image(self.serve_dir, U, data)
        self.start()
        target = f"/images/{U}/file"
        whole = self.get(target)
        etag, date = whole.headers["etag"], whole.headers["last-modified"]
        for headers, status, body in (
                ({"Range": "bytes=1000-"}, 206, data[1000:]),
                ({"Range": "bytes=-10", "If_Range": etag}, 206, data[-10:]),
                ({"Range": "bytes=1000-", "If_Range": '"other"'}, 200, data),
                ({"Range": "bytes=1-2,5-6"}, 200, data), ({"Range": "lines=1-2"}, 200, data),
                ({"If_None_Match": etag}, 304, b""), ({"If_Modified_Since": date}, 304, b""),
                ({"If_None_Match": '"other"'}, 200, data)):
            with self.subTest(headers):
                answer = self.get(target, **headers)
                self.assertEqual((answer.status, answer.body == body), (status, True))
                self.assertEqual(answer.headers["etag"], etag)
                self.assertEqual("content-md5" in answer.headers, status == 200)
        self.assertError(self.get(target, Range="bytes=100000-"), 416)

    def test_nobody_asks_for_the_location_itself(self):
        write_image(self.serve_dir, U)
        self.start()
        for target in (f"/files/{U}/image.zfs.gz", f"/files/{U}/manifest.json", "/files/",
                       f"/images/..%2Ffiles/{U}/manifest.json", f"/x/../files/{U}/manifest.json"):
            self.assertEqual(self.get(target).status, 404, target)

    def test_imgadm(self):
        stream = os.urandom(50000)
        write_image(self.serve_dir, U, streams.pack(stream, "gzip"))
        self.start()
        for path in ("", "/datasets"):
            for client in (imgadm.Imgadm3, imgadm.Imgadm2):
                with client([imgadm.Source(f"http://127.0.0.1:{self.port}{path}",
                                           self.address)]) as client:
                    self.assertEqual(client.import_image(U), stream)
        one = imgadm.Imgadm1(f"http://127.0.0.1:{self.port}/datasets/", self.address)
        one.update()
        self.assertEqual(one.import_image(U), stream)

    def test_a_cache_of_a_rack_before_it(self):
        data = os.urandom(1 << 20) * 17           # two slices
        write_v2(self.serve_dir, U, data)
        self.start()
        self.port = self.start_nginx(
            test_nginx.snippet("rack"),
            ("server 10.0.0.5:8080;", "server %s:%d;" % self.address),
            ("/var/cache/imgserver", os.path.join(self.directory, "cache")))
        self.address = "127.0.0.1", self.port
        target = f"/images/{U}/file"
        for _ in range(2):
            answer = self.get(target)
            self.assertEqual((answer.status, answer.body == data), (200, True))
            self.assertEqual(answer.headers["etag"], f'"{hashlib.sha1(data).hexdigest()}"')
        self.server.stop()
        self.assertTrue(self.get(target).body == data)

    def test_curl_resumes_through_it(self):
        need("curl")
        data = os.urandom(3 << 20)
        write_image(self.serve_dir, U, data)
        self.start()
        path = os.path.join(self.directory, "download")
        with open(path, "wb") as file:
            file.write(data[:1234567])
        support.subprocess.run(["curl", "-q", "--noproxy", "*", "-sSf", "-C", "-", "-o", path,
                                f"http://127.0.0.1:{self.port}/images/{U}/file"], check=True,
                               timeout=support.PATIENCE)
        with open(path, "rb") as file:
            self.assertTrue(file.read() == data)


class Listeners(ServerCase):
    """Several addresses, one process."""

    def fails(self, status, *arguments):
        """The one sentence with which it ends."""
        done = support.run_program("--dir", self.serve_dir, *arguments, encoding="ascii")
        self.assertEqual(done.returncode, status, done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        return done.stderr

    def config(self, **values):
        path = os.path.join(self.directory, "the.json")
        with open(path, "w", encoding="utf-8") as file:
            support.json.dump({"serve_dir": self.serve_dir, **values}, file)
        return path

    def path(self, name="a.sock"):
        return os.path.join(self.directory, name)

    def test_ports_and_sockets_of_one_process(self):
        write_image(self.serve_dir, U)
        paths = [self.path(), self.path("b.sock")]
        server = self.serve(config={"accel": "/files"}, options=(
            "--listen", "127.0.0.1:0", "--listen", paths[0], "--listen", paths[1],
            "--listen", "127.0.0.1:0"))
        for address in (server.address, *paths):
            self.assertIn(address if isinstance(address, str) else "http://%s:%d" % address,
                          server.log())
            with Connection(address) as connection:
                answer = connection.request(f"/images/{U}/file")
                self.assertEqual(answer.status, 200)
                self.assertEqual("x-accel-redirect" in answer.headers, address in paths)
                self.assertEqual(answer.body, b"" if address in paths else b"not a real stream")
        ports = set(re.findall(r"http://127\.0\.0\.1:(\d+)", server.log()))
        self.assertEqual(len(ports), 2)
        self.assertEqual(server.stop(), 0)
        self.assertEqual([path for path in paths if os.path.lexists(path)], [])

    def test_list_of_the_configuration(self):
        port = support.free_port()
        process = support.Program(
            "--config", self.config(listen_port=[f"127.0.0.1:{port}", self.path()]),
            stdin=support.subprocess.DEVNULL, stderr=support.subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        for address in (("127.0.0.1", port), self.path()):
            wait_for(lambda: support.reachable(address) or process.poll(), "the server")
            self.assertIsNone(process.poll())

    def test_localhost_has_one_port(self):
        if not support.has_ipv6():
            raise unittest.SkipTest("no IPv6")
        server = self.serve(options=("--listen", self.path(), "--listen", "localhost:0"))
        ports = re.findall(r"http://\S+:(\d+)", server.log())
        self.assertEqual((len(ports), len(set(ports))), (2, 1), server.log())

    def test_one_that_cannot_be_bound_ends_the_start(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = "127.0.0.1:%d" % taken.getsockname()[1]
            for listen in ([self.path(), port], [port, self.path()]):
                sentence = self.fails(1, *[word for each in listen
                                           for word in ("--listen", each)])
                self.assertIn(f"cannot listen on {port}: ", sentence)
                self.assertFalse(os.path.lexists(self.path()))
        with open(self.path("plain"), "w", encoding="ascii"):
            pass
        self.assertIn("no socket", self.fails(96, "--listen", self.path(), "--listen",
                                              self.path("plain")))
        self.assertFalse(os.path.lexists(self.path()))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(self.path())
            sock.listen()
            self.assertIn("another server listens", self.fails(
                1, "--listen", "127.0.0.1:0", "--listen", self.path()))

    def test_bad_lists(self):
        for arguments in (("--listen", "8080", "--listen", "8080"),
                          ("--listen", "8080", "--listen", "x")):
            self.assertIn("--listen must", self.fails(96, *arguments))
        self.assertIn("listen_port must name a port from 1", self.fails(
            96, "--config", self.config(listen_port=[self.path(), 0])))

    def test_accel_needs_a_unix_socket(self):
        for listen in (80, ["127.0.0.1:1", "[::1]:2"]):
            sentence = self.fails(96, "--config", self.config(listen_port=listen,
                                                              accel="/files"))
            self.assertIn("accel", sentence)

    def test_smf_manifest(self):
        for listen, privileged in (([8080, "/run/s"], False), (["/run/s", 80], True),
                                   ([8080, "10.0.0.1:443"], True), ("/run/s", False)):
            done = support.run_program("smf", "--user", "nobody", "--config",
                                       self.config(listen_port=listen), encoding="utf-8")
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual("net_privaddr" in done.stdout, privileged, listen)
        done = support.run_program("--listen", "8080", "--listen", "/run/s", "smf", "--user",
                                   "nobody", encoding="utf-8")
        self.assertIn("--listen 8080 --listen /run/s", done.stdout)


if __name__ == "__main__":
    unittest.main()
