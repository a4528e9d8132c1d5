"""Real nginx in front of the Unix socket, with the snippet of the README as it stands."""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import unittest

from tests.support import PATIENCE, ROOT, Connection, ServerCase, need, uuid_of, write_image

U = uuid_of(1)
FILE = f"/datasets/{U}/image.zfs.gz"


def snippet():
    """The nginx configuration that the README shows."""
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        return re.search(r"```nginx\n(.*?)```", file.read(), re.DOTALL)[1]


class NginxCase(ServerCase):
    """Real nginx in front of a server."""

    config = None
    changes = ()                          # (old, new): in the snippet

    def setUp(self):
        super().setUp()
        need("nginx")
        self.data = os.urandom(3 << 20)
        write_image(self.serve_dir, U, self.data)
        self.server = self.serve(unix=True, config=self.config)
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.port = sock.getsockname()[1]
            self.start_nginx(sock.fileno())

    def text(self):
        """What stands in http { }."""
        return snippet()

    def start_nginx(self, listener):
        """Start nginx on a socket that listens already: nobody else can take its port."""
        text = self.text()
        self.assertEqual(text.count("/var/imgserver/imgserver.sock"), 1)
        text = text.replace("/var/imgserver/imgserver.sock", self.server.address)
        for old, new in self.changes:
            self.assertEqual(text.count(old), 1, old)
            text = text.replace(old, new)
        text = text.replace("listen 80;", f"listen 127.0.0.1:{self.port};")
        directory = os.path.join(self.directory, "nginx")
        os.mkdir(directory)
        user = "user root root;\n" if os.getuid() == 0 else ""     # or it may not come in here
        names = ("client_body", "proxy", "fastcgi", "scgi", "uwsgi")
        paths = "".join(f"{name}_temp_path {directory}/{name};\n" for name in names)
        path = os.path.join(directory, "nginx.conf")
        with open(path, "w", encoding="utf-8") as file:
            file.write(f"daemon off; pid {directory}/pid; error_log {directory}/error;\n{user}"
                       "events {}\nhttp {\naccess_log off;\n" + paths + text + "}\n")
        process = subprocess.Popen([shutil.which("nginx"), "-p", directory, "-c", path],
                                   stderr=subprocess.DEVNULL, pass_fds=[listener],
                                   env={**os.environ, "NGINX": f"{listener};"})
        self.addCleanup(process.wait, PATIENCE)
        self.addCleanup(process.terminate)

    def connect(self):
        return Connection(("127.0.0.1", self.port))

    def get(self, target, headers=()):
        with self.connect() as connection:
            return connection.request(target, headers={"Host": f"127.0.0.1:{self.port}",
                                                       **dict(headers)})


class Nginx(NginxCase):

    def test_lists_and_manifests_name_the_proxy(self):
        for path in ("/datasets", "/images"):
            self.assertEqual([image["uuid"] for image in self.get(path).json()], [U])
        url = self.get(f"/datasets/{U}").json()["files"][0]["url"]
        self.assertEqual(url, f"http://127.0.0.1:{self.port}{FILE}")

    def test_a_file_comes_whole(self):
        for target in (FILE, f"http://127.0.0.1:{self.port}{FILE}", f"/images/{U}/file"):
            with self.subTest(target):
                answer = self.get(target)
                self.assertEqual(answer.status, 200)
                self.assertEqual(answer.headers["content-length"], str(len(self.data)))
                self.assertEqual(hashlib.sha1(answer.body).digest(),
                                 hashlib.sha1(self.data).digest())

    def test_a_file_is_resumed(self):
        etag = self.get(FILE).headers["etag"]
        answer = self.get(FILE, {"Range": "bytes=1000000-", "If-Range": etag})
        self.assertEqual(answer.status, 206)
        self.assertEqual(answer.body, self.data[1000000:])

    def test_one_connection_to_the_server_serves_many_requests(self):
        files = self.server.files()
        with self.connect() as connection:
            for _ in range(20):
                self.assertEqual(connection.request("/ping").status, 200)
        self.assertLess(self.server.files(), files + 10)

    def test_errors_come_through(self):
        self.assertError(self.get("/datasets/" + uuid_of(2)), 404, "ResourceNotFound")

    def test_the_log_names_the_client_of_the_proxy(self):
        self.get("/ping?through-nginx")
        self.server.wait_log(r'info 127\.0\.0\.1 "GET /ping\?through-nginx HTTP/1\.1" 200')

    def test_curl_resumes_a_download(self):
        need("curl")
        path = os.path.join(self.directory, "download")
        with open(path, "wb") as file:
            file.write(self.data[:1234567])
        subprocess.run(["curl", "-q", "--noproxy", "*", "-sSf", "-C", "-", "-o", path,
                        f"http://127.0.0.1:{self.port}{FILE}"], check=True, timeout=PATIENCE)
        with open(path, "rb") as file:
            self.assertEqual(file.read(), self.data)


class Cache(Nginx):
    """The same with a cache, as the README shows it."""

    def text(self):
        with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
            block = re.findall(r"```nginx\n(.*?)```", file.read(), re.DOTALL)[1]
        first, rest = block.split("\n", 1)
        self.assertEqual(first.count("/var/cache/imgserver"), 1)
        first = first.replace("/var/cache/imgserver", os.path.join(self.directory, "cache"))
        return first + "\n" + snippet().replace("location / {\n", "location / {\n" + rest)

    def test_files_come_from_the_cache_as_they_are(self):
        for target in (f"/images/{U}/file", FILE):
            first = self.get(target)
            for _ in range(3):
                again = self.get(target)
                self.assertEqual(again.body, self.data)
                for name in ("content-md5", "etag", "content-length", "accept-ranges"):
                    self.assertEqual(again.headers[name], first.headers[name])
            self.get("/ping")             # whose line is behind all of theirs
            self.server.wait_log(f'"GET {re.escape(target)} (?s:.*)"GET /ping ')
            asked = re.findall(f'"GET {re.escape(target)} ', self.server.log())
            self.assertEqual(len(asked), 1)


class CacheOfAnyHost(Cache):
    """With the key of nginx's own example, which leaves out the Host."""

    def text(self):
        text, count = re.subn("proxy_cache_key .*;", "proxy_cache_key $request_uri;",
                              super().text())
        self.assertEqual(count, 1)
        return text

    def test_no_host_poisons_the_manifests_of_others(self):
        for target in ("/datasets", f"/datasets/{U}"):
            for host in ("evil.example.com", "images.example.com"):
                answer = self.get(target, {"Host": host})
                self.assertIn(f"http://{host}/datasets/{U}/".encode(), answer.body)


if __name__ == "__main__":
    unittest.main()
