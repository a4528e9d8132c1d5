"""What can be reached by a request target, and what cannot, over both sockets."""

import os
import socket
import unittest

from tests.support import OneServer, ServerCase, uuid_of, write_image, write_manifest, write_v2

U = uuid_of(1)
OTHER = uuid_of(2)
FILE = "image.zfs.gz"
DATA = b"the bytes of an image"
SECRET = "do not serve this"

# Targets beside the ordinary ones that lead to the same place.
SAME = {
    f"http://images.example.com/datasets/{U}/{FILE}": f"/datasets/{U}/{FILE}",
    f"http://whatever:8080/datasets/{U}/{FILE}": f"/datasets/{U}/{FILE}",
    f"https://whatever/datasets/{U}/{FILE}": f"/datasets/{U}/{FILE}",
    f"HTTP://WHATEVER/datasets/{U}/{FILE}": f"/datasets/{U}/{FILE}",
    f"http://[::1]:80/datasets/{U}/{FILE}": f"/datasets/{U}/{FILE}",
    f"http://user:word@whatever/datasets/{U}/{FILE}": f"/datasets/{U}/{FILE}",
    f"http://whatever/images/{U}/file": f"/datasets/{U}/{FILE}",
    "http://whatever/datasets": "/datasets",
    "http://whatever/datasets/": "/datasets",
    "http://whatever/images?limit=5": "/images",
    "http://whatever": "/",
    "http://whatever/": "/",
    "http://whatever?x=y": "/",
    "https://whatever": "/",
    "/?x": "/",
    "/datasets/": "/datasets",
    "/datasets/?name=test": "/datasets",
    "/images/": "/images",
    "/ping/": "/ping",
    f"/datasets/{U}/": f"/datasets/{U}",
    f"/images/{U}/": f"/images/{U}",
    f"/images/{U}/file/": f"/images/{U}/file",
    f"/%64atasets/{U}": f"/datasets/{U}",
    f"/datasets/{U}/image%2Ezfs%2egz": f"/datasets/{U}/{FILE}",
    f"/datasets/{U}/{FILE}?x=/../y": f"/datasets/{U}/{FILE}",
}

NO_TARGETS = (
    "*", "whatever:80", "datasets", "ftp://whatever/datasets", "file:///etc/passwd", "?x", "#",
    "http:/datasets", "http:datasets", "\\datasets", "..", "../config.json",
)

# Nothing of these is there; {n} is the number of the answer, {U} and {OTHER} are served.
NOT_FOUND = (
    # empty segments
    "//datasets", "//evil.example.com/datasets", f"/datasets//{U}", f"//datasets/{U}",
    "/datasets//", f"/datasets/{U}//", f"/datasets/{U}//{FILE}", "///",
    # upwards
    "/config.json", "/imgserver.py", "/../config.json", "/datasets/../config.json",
    "/datasets/../../config.json", "/%2e%2e/config.json", "/..%2fconfig.json",
    "/%2e%2e%2fconfig.json", "/datasets/%2e%2e/config.json", "/datasets/..%2fconfig.json",
    "/datasets/%2e%2e%2fconfig.json", "/datasets/..%5cconfig.json", "/datasets/..\\config.json",
    "/datasets/%252e%252e/config.json", "/datasets/%252e%252e%252fconfig.json",
    "/datasets/.%2e/config.json", "/datasets/..;/config.json", "/datasets/...", "/datasets/.",
    "/datasets/..", "/datasets/../", f"/datasets/{U}/..", f"/datasets/{U}/.",
    f"/datasets/{U}/../../config.json", f"/datasets/{U}/..%2f..%2fconfig.json",
    f"/datasets/{U}/%2e%2e%2f%2e%2e%2fconfig.json", f"/datasets/{U}/%2e%2e%5c%2e%2e%5cconfig.json",
    f"/datasets/{U}/../{OTHER}/{FILE}", f"/datasets/{U}/%2e%2e/{OTHER}/{FILE}",
    f"/datasets/{U}/..%2f{OTHER}%2f{FILE}", f"/datasets/{U}/./{FILE}", f"/datasets/./{U}/{FILE}",
    f"/datasets/x/../{U}/{FILE}", f"/images/{U}/../{OTHER}/file", f"/images/{U}/..%2ffile",
    f"/datasets/{U}%2f{FILE}", f"/datasets%2f{U}", f"/datasets%2f{U}%2f{FILE}",
    f"/datasets/{U}%2f..%2f{OTHER}", f"http://whatever/../datasets/{U}",
    # the names of routes are not routes
    "/datasets%2f:uuid", "/datasets%2F:uuid%2F:file", "/images%2f:uuid", "/images%2f:uuid%2ffile",
    "/datasets/:uuid", "/datasets/:uuid/:file", f"/datasets/{U}/:file", f"/images/{U}/:file",
    f"/datasets%2f:uuid/{U}",
    # absolute paths
    "/etc/passwd", "/datasets//etc/passwd", "/datasets/%2fetc%2fpasswd",
    f"/datasets/{U}/%2fetc%2fpasswd", f"/datasets/{U}//etc/passwd",
    # a neighbour whose path begins with that of serve_dir
    f"/datasets/../images2/{U}/secret", f"/datasets/..%2fimages2%2f{U}%2fsecret",
    f"/datasets/{U}/..%2f..%2fimages2%2f{U}%2fsecret", f"/datasets/2/{U}/secret",
    f"/datasets2/{U}/secret", f"/images2/{U}/secret",
    # what lies in serve_dir and is no image
    "/datasets/config.json", "/datasets/.git/HEAD", "/datasets/.git", "/datasets/tests/x",
    "/datasets/plain", "/datasets/.incoming.abc/manifest.json",
    f"/datasets/.incoming-{OTHER}", f"/datasets/.incoming-{OTHER}/manifest.json",
    f"/datasets/.incoming-{OTHER}/{FILE}", f"/images/.incoming-{OTHER}/file",
    # what lies in an image's directory and is not its file
    f"/datasets/{U}/manifest.json", f"/datasets/{U}/notes", f"/datasets/{U}/.hidden",
    f"/datasets/{U}/icon.png", f"/datasets/{U}/manifest.json.new", f"/datasets/{U}/IMAGE.zfs.gz",
    f"/datasets/{U}/deeper/{FILE}", f"/datasets/{U}/deeper%2f{FILE}", f"/datasets/{U}/{FILE}/x",
    f"/datasets/{U}/{FILE}%20", f"/datasets/{U}/%20{FILE}", f"/datasets/{U}/{FILE}%0a",
    f"/datasets/{U}/{FILE};x", f"/datasets/{U}/{FILE}:x", f"/datasets/{U}/{FILE}%3fx",
    f"/images/{U}/{FILE}", f"/images/{U}/manifest.json", f"/images/{U}/file/x",
    # what is no UUID
    f"/datasets/{uuid_of(0xabc).upper()}", f"/datasets/{uuid_of(0xabc).upper()}/{FILE}",
    f"/datasets/{U}x", f"/datasets/{U[:-1]}", f"/datasets/{{{U}}}", f"/datasets/{U}%0a",
    f"/datasets/{U}%20", f"/datasets/{U.replace('-', '')}", "/datasets/*", "/datasets/~",
    f"/datasets/{U.replace('0', '%D9%A0')}",
    # odd characters and lengths
    f"/datasets/{U}/{'a' * 300}", f"/datasets/{'a' * 300}", f"/{'a' * 300}", "/" + "a/" * 1000,
    f"/datasets/{U}/%c3%a9", f"/datasets/{U}/%f0%9f%92%a9", "/%0d%0aX-Injected:%20y", "/%1b%5b31m",
    "/<script>alert(1)</script>", "/%3cscript%3e", "/datasets.", "/Datasets", "/PING",
    "/favicon.ico", "/ping/x", f"/ping/{U}", f"/channels/{U}", "/datasets#x",
)

MALFORMED = (
    "/%", "/%z", "/%zz", "/%4", "/%-1", "/%+1", "/% 1".replace(" ", "_"), "/ping%", "/%%",
    f"/datasets/%/{FILE}", f"/datasets/{U}/%", f"/datasets/{U}/%zz", f"/datasets/{U}/%u0041",
    "/%00", f"/datasets/{U}/%00", f"/datasets/{U}/{FILE}%00.gz", f"/datasets/{U}%00",
    f"/datasets/{U}/%00{FILE}", "/%ff%fe", f"/datasets/{U}/%ff%fe", f"/datasets/{U}/%c3",
    f"/datasets/{U}/%ed%a0%80", f"/datasets/{U}/%c0%ae%c0%ae", f"/datasets/{U}/%c0%af",
    "/\xff", f"/datasets/{U}/\xe9", "/datasets/\xc0\xae\xc0\xae/config.json",
)


class Paths(OneServer):
    """Requests to one directory with much in it that is not to be had."""

    @classmethod
    def fill(cls):
        for number in (1, 2, 0xabc):
            write_image(cls.images, uuid_of(number), DATA)
        os.rename(os.path.join(cls.images, OTHER), os.path.join(cls.images, f".incoming-{OTHER}"))
        write_image(cls.images, OTHER, DATA)
        write_image(os.path.join(cls.home, "images2"), U, DATA)
        for path in ("config.json", "imgserver.py", "images/config.json", "images/.git/HEAD",
                     "images/tests/x", "images/plain", "images/.incoming.abc/manifest.json",
                     f"images/{U}/notes", f"images/{U}/.hidden", f"images/{U}/icon.png",
                     f"images/{U}/deeper/{FILE}", f"images2/{U}/secret"):
            path = os.path.join(cls.home, path)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as file:
                file.write(SECRET)

    def refused(self, target, status):
        answer = self.server.get(target)
        self.assertError(answer, status)
        self.assertNotIn(self.home, answer.body.decode())
        self.assertNotIn(SECRET, answer.body.decode())
        self.assertNotIn("location", answer.headers)

    def test_targets_that_lead_to_the_same_place(self):
        for target, plain in SAME.items():
            with self.subTest(target):
                answer, wanted = self.server.get(target), self.server.get(plain)
                self.assertEqual(answer.status, 200, answer)
                self.assertEqual(answer.body, wanted.body)

    def test_file_in_absolute_form_as_imgadm_asks_for_it(self):
        url = self.server.get(f"/datasets/{U}").json()["files"][0]["url"]
        self.assertEqual(url, f"http://images.example.com/datasets/{U}/{FILE}")
        answer = self.server.get(url)
        self.assertEqual((answer.status, answer.body), (200, DATA))

    def test_targets_that_are_neither_path_nor_url(self):
        for target in NO_TARGETS:
            with self.subTest(target):
                self.refused(target, 400)
        with self.subTest("OPTIONS *"):
            self.assertError(self.server.get("*", method="OPTIONS"), 400)
        with self.subTest("CONNECT"):
            self.assertError(self.server.get("whatever:80", method="CONNECT"), 400)

    def test_targets_that_are_not_there(self):
        for target in NOT_FOUND:
            with self.subTest(target):
                self.refused(target, 404)

    def test_targets_that_are_not_there_for_head(self):
        for target in NOT_FOUND:
            with self.subTest(target):
                self.assertEqual(self.server.head(target).status, 404)

    def test_malformed_escapes(self):
        for target in MALFORMED:
            with self.subTest(target):
                self.refused(target, 400)

    def test_traversal_in_absolute_form(self):
        for path in ("/../config.json", "/datasets/../config.json", "/datasets/..%2fconfig.json",
                     f"/datasets/{U}/..%2f..%2fconfig.json"):
            with self.subTest(path):
                self.refused("http://whatever" + path, 404)

    def test_log_shows_the_target_escaped(self):
        self.server.get("/datasets/..%2f..%2fseen%1b")
        self.server.wait_log(r'"GET /datasets/\.\.%2f\.\.%2fseen%1b HTTP/1\.1" 404 ')

    def test_requests_change_nothing_on_disk(self):
        def names():
            return sorted(os.path.join(directory, name) for directory, directories, files
                          in os.walk(self.images) for name in directories + files)
        before = names()
        for method in ("PUT", "DELETE", "POST"):
            for target in (f"/datasets/{U}/{FILE}", f"/datasets/{U}", f"/images/{U}/file",
                           "/datasets/new"):
                with self.subTest(method, target=target):
                    self.assertIn(self.server.get(target, method=method).status, (404, 405))
        self.assertEqual(names(), before)


class PathsOverTcp(Paths, ServerCase):
    unix = False


class PathsOverUnix(Paths, ServerCase):
    unix = True


class Files:
    """What stands in the place of an image's file, its directory or its manifest."""

    unix = False

    def path(self, uuid, name=FILE):
        return os.path.join(self.serve_dir, uuid, name)

    def put_away(self, uuid, name=FILE):
        """Remove what write_image has made; returns where it was."""
        os.unlink(self.path(uuid, name))
        return self.path(uuid, name)

    def listed(self, server):
        return {image["uuid"] for image in server.get("/datasets").json()}

    def left_out(self, server, cases):
        """Each image of `cases` (name: uuid) is not to be had, and the log says so once."""
        for _ in range(2):
            self.assertEqual(self.listed(server), {U})
            for name, uuid in cases.items():
                for target in (f"/datasets/{uuid}/{FILE}", f"/datasets/{uuid}",
                               f"/images/{uuid}", f"/images/{uuid}/file"):
                    with self.subTest(name, target=target):
                        self.assertError(server.get(target), 404)
        for name, uuid in cases.items():
            with self.subTest(name):
                self.assertEqual(server.log().count(f"image {uuid} is left out: "), 1)
        self.assertEqual(server.get(f"/datasets/{U}/{FILE}").body, DATA)

    def test_paths_in_a_manifest_that_are_no_file_names(self):
        write_image(self.serve_dir, U, DATA)
        cases = {}
        paths = ["../../etc/passwd", "/etc/passwd", "a/b", ".", "..", "", "./" + FILE,
                 FILE + "\n", "a\0b", "a\x1b[31m", "a\\../b/c", f"../{U}/{FILE}",
                 "manifest.json", "x" * 256, "é" * 128, 5, True]
        for number, path in enumerate(paths, 10):
            uuid = cases[repr(path)[:40]] = uuid_of(number)
            manifest = write_image(self.serve_dir, uuid, DATA)
            manifest["files"][0]["path"] = path
            write_manifest(self.serve_dir, uuid, manifest)
        self.left_out(self.serve(unix=self.unix), cases)

    def test_files_that_are_no_regular_files(self):
        write_image(self.serve_dir, U, DATA)
        cases = {name: uuid_of(number) for number, name in enumerate(
            ("missing", "dangling symlink", "symlink to itself", "fifo", "symlink to a fifo",
             "symlink to a device", "directory", "symlink to a directory", "socket"), 10)}
        for uuid in cases.values():
            write_image(self.serve_dir, uuid, b"")     # sizes agree: only the kind is wrong
            self.put_away(uuid)
        os.symlink("nothing", self.path(cases["dangling symlink"]))
        os.symlink(FILE, self.path(cases["symlink to itself"]))
        os.mkfifo(self.path(cases["fifo"]))
        os.symlink(self.path(cases["fifo"]), self.path(cases["symlink to a fifo"]))
        os.symlink("/dev/null", self.path(cases["symlink to a device"]))
        os.mkdir(self.path(cases["directory"]))
        os.symlink("/", self.path(cases["symlink to a directory"]))
        self.make_socket(cases["socket"])
        self.left_out(self.serve(unix=self.unix), cases)    # no answer comes if one waits

    def make_socket(self, uuid):
        """Bind by a short name: the path itself may be too long for a Unix socket."""
        directory = os.open(os.path.dirname(self.path(uuid)), os.O_RDONLY)
        self.addCleanup(os.close, directory)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"/proc/self/fd/{directory}/{FILE}")

    def test_manifests_that_are_no_regular_files(self):
        write_image(self.serve_dir, U, DATA)
        cases = {"fifo": uuid_of(10), "directory": uuid_of(11), "device": uuid_of(12),
                 "symlink to itself": uuid_of(13)}
        for uuid in cases.values():
            write_image(self.serve_dir, uuid, DATA)
            self.put_away(uuid, "manifest.json")
        os.mkfifo(self.path(cases["fifo"], "manifest.json"))
        os.mkdir(self.path(cases["directory"], "manifest.json"))
        os.symlink("/dev/zero", self.path(cases["device"], "manifest.json"))
        os.symlink("manifest.json", self.path(cases["symlink to itself"], "manifest.json"))
        self.left_out(self.serve(unix=self.unix), cases)

    def test_icons_that_are_no_regular_files(self):
        write_image(self.serve_dir, U, DATA)
        for name, make in (("fifo", os.mkfifo), ("directory", os.mkdir),
                           ("dangling symlink", lambda path: os.symlink("nothing", path)),
                           ("device", lambda path: os.symlink("/dev/zero", path))):
            with self.subTest(name):
                uuid = uuid_of(len(os.listdir(self.serve_dir)) + 10)
                write_image(self.serve_dir, uuid, DATA)
                make(self.path(uuid, "icon.png"))
                server = self.serve(unix=self.unix)
                self.assertError(server.get(f"/images/{uuid}/icon"), 404)
                self.assertEqual(server.get(f"/images/{uuid}").status, 200)

    def test_file_that_turns_into_a_fifo_after_it_was_listed(self):
        write_v2(self.serve_dir, U, b"")
        server = self.serve(unix=self.unix)
        self.assertEqual(server.get(f"/images/{U}/file").status, 200)
        os.mkfifo(self.put_away(U))
        self.assertError(server.get(f"/images/{U}/file"), 404)
        self.assertError(server.get(f"/datasets/{U}/{FILE}"), 404)

    def test_file_and_manifest_that_may_not_be_read(self):
        write_image(self.serve_dir, U, DATA)
        cases = {"file": uuid_of(10), "manifest": uuid_of(11), "directory": uuid_of(12)}
        for uuid in cases.values():
            write_image(self.serve_dir, uuid, DATA)
        os.chmod(self.path(cases["file"]), 0)
        os.chmod(self.path(cases["manifest"], "manifest.json"), 0)
        os.chmod(os.path.join(self.serve_dir, cases["directory"]), 0)
        self.addCleanup(os.chmod, os.path.join(self.serve_dir, cases["directory"]), 0o700)
        os.chmod(self.directory, 0o777)
        # Nothing is forbidden to root: as root, the server must be somebody else.
        # It may no longer read the standard library then, so what is missing is loaded before.
        prelude = ("import os, fcntl, termios, resource, gzip, locale, encodings.idna\n"
                   "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)")
        server = self.serve(unix=self.unix, prelude=prelude)
        self.left_out(server, cases)
        os.chmod(self.path(cases["file"]), 0o644)
        self.assertEqual(server.get(f"/datasets/{cases['file']}/{FILE}").body, DATA)

    def test_symlinks_of_an_operator_are_followed(self):
        elsewhere = os.path.join(self.directory, "elsewhere")
        write_image(elsewhere, U, DATA)
        write_image(self.serve_dir, OTHER, DATA)
        third = uuid_of(3)
        write_image(self.serve_dir, third, DATA)
        os.symlink(os.path.join(elsewhere, U), os.path.join(self.serve_dir, U))
        os.symlink(os.path.join(elsewhere, U, FILE), self.put_away(OTHER))
        os.rename(self.path(third, "manifest.json"), os.path.join(elsewhere, "third"))
        os.symlink("../../elsewhere/third", self.path(third, "manifest.json"))
        server = self.serve(unix=self.unix)
        self.assertEqual(self.listed(server), {U, OTHER, third})
        for uuid in (U, OTHER, third):
            self.assertEqual(server.get(f"/datasets/{uuid}/{FILE}").body, DATA)

    def test_entries_that_are_no_images_are_passed_over_in_silence(self):
        write_image(self.serve_dir, U, DATA)
        os.mkdir(os.path.join(self.serve_dir, uuid_of(10)))
        with open(os.path.join(self.serve_dir, uuid_of(11)), "w"):
            pass
        os.symlink("nothing", os.path.join(self.serve_dir, uuid_of(12)))
        os.mkdir(os.path.join(self.serve_dir, "lost+found"))
        server = self.serve(unix=self.unix)
        self.assertEqual(self.listed(server), {U})
        for number in (10, 11, 12):
            self.assertError(server.get(f"/datasets/{uuid_of(number)}"), 404)
            self.assertError(server.get(f"/datasets/{uuid_of(number)}/{FILE}"), 404)
        self.assertNotIn(" warn image ", server.log())


class FilesOverTcp(Files, ServerCase):
    unix = False


class FilesOverUnix(Files, ServerCase):
    unix = True


if __name__ == "__main__":
    unittest.main()
