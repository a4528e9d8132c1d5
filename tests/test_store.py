"""The directory as it is served: what is left out and why, and how soon a change shows."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
import unittest
import urllib.parse
from unittest import mock

import imgserver
from tests.support import (NOBODY, SETTLED, ServerCase, ask, log_of, parse, uuid_of, wait_for,
                           write_image, write_manifest, write_v2)

GOOD = uuid_of(1)              # the sound image that every hostile one must leave in peace
TRANSPORTS = (("tcp", False), ("unix", True))
FEW = {"max_connections": 100}      # no warning that this machine allows too few open files

# Runs the server as nobody, since root may read what has no mode at all.
# What is imported late must be there before: nobody may not be able to read Python's library.
AS_NOBODY = """
import encodings.idna, fcntl, gzip, locale, os, resource, termios
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
"""
SEEN_SOON = "imgserver.RECHECK, imgserver.RECHECK_EARLY = 0.2, 0.13\n"


def uuids(answer):
    assert answer.status == 200, answer
    return [image["uuid"] for image in answer.json()]


def left_out(server, uuid):
    """The log lines that say that an image is left out."""
    return re.findall(rf"image {uuid} is left out: (.*)", server.log())


def changed(**fields):
    """A hostile manifest: the sound one with other fields; None removes one."""
    def make(manifest):
        manifest.update(fields)
        return {key: value for key, value in manifest.items() if value is not None}
    return make


def of_file(**fields):
    """A hostile manifest: the sound one with another files[0]."""
    return lambda manifest: {**manifest, "files": [{**manifest["files"][0], **fields}]}


def spelled(text):
    """A hostile manifest: the sound one with `text` as the value of a field, not quoted."""
    return lambda manifest: (json.dumps(manifest)[:-1] + f', "extra": {text}}}').encode()


# What is in manifest.json, and what the one log line must say besides the image.
HOSTILE = (
    ("cut short", lambda _: b'{"uuid": ', "manifest.json is not JSON"),
    ("empty", lambda _: b"", "manifest.json is not JSON"),
    ("a list", lambda _: b"[]", "manifest.json is not a JSON object"),
    ("a text", lambda _: b'"x"', "manifest.json is not a JSON object"),
    ("null", lambda _: b"null", "manifest.json is not a JSON object"),
    ("NaN", spelled("NaN"), "NaN is not JSON"),
    ("minus Infinity", spelled("-Infinity"), "Infinity is not JSON"),
    ("1e999", spelled("1e999"), "too large"),
    ("a number of 5,000 digits", spelled("1" * 5000), "5000 digits"),
    ("100,000 lists deep", spelled("[" * 100000), "manifest.json.*deep"),
    ("100,000 lists deep and closed", spelled("[" * 100000 + "]" * 100000), "manifest.json.*deep"),
    ("100,000 objects deep", spelled('{"a":' * 100000), "manifest.json.*deep"),
    ("half a surrogate pair", spelled(r'"\ud800"'), "surrogate"),
    ("half a pair as a key", spelled(r'{"\udfff": 1}'), "surrogate"),
    ("the same key twice", spelled('1, "extra": 2'), None),        # the last counts
    ("a raw line end in a text", spelled('"a\nb"'), "manifest.json is not JSON"),
    ("50 MB", lambda _: b" " * (50 << 20), "manifest.json is larger"),
    ("a byte-order mark", lambda manifest: b"\xef\xbb\xbf" + json.dumps(manifest).encode(), None),
    ("UTF-16", lambda manifest: json.dumps(manifest).encode("utf-16"),
     "manifest.json is not JSON"),
    ("a letter in UTF-8", spelled('"\u00e9"'), None),      # sound, and shown
    ("latin-1 bytes", lambda manifest: spelled('"~"')(manifest).replace(b"~", b"\xe9"),
     "manifest.json is not JSON.*UTF-8"),
    ("NUL bytes", lambda _: bytes(1000), "manifest.json is not JSON"),
    ("no files", changed(files=None), "manifest.json: files"),
    ("files an object", changed(files={}), "manifest.json: files"),
    ("no file in files", changed(files=[]), "manifest.json: files"),
    ("a text in files", changed(files=["image.zfs.gz"]), "manifest.json: files"),
    ("another uuid", changed(uuid=uuid_of(999)), "manifest.json: its uuid"),
    ("the uuid of a sound image", changed(uuid=GOOD), "manifest.json: its uuid"),
    ("no uuid", changed(uuid=None), "manifest.json: its uuid"),
    ("a uuid that is a list", changed(uuid=[]), "manifest.json: its uuid"),
    ("v as a text", changed(v="2"), None),
    ("v that is true", changed(v=True), None),
    ("v of the future", changed(v=3), None),
    ("a v1 manifest that says v 2", changed(v=2, name=""), "manifest.json: name is missing"),
    ("no name", changed(name=None), "manifest.json: name is missing"),
    ("a name that is a list", changed(name=["x"]), "manifest.json: name ...x... takes letters"),
    ("no version", changed(version=None), "manifest.json: version is missing"),
    ("no type", changed(type=None), "manifest.json: type is missing"),
    ("a type unknown", changed(type="floppy"), "manifest.json: type 'floppy' must be one of"),
    ("a type that is a list", changed(type=["zvol"]), "manifest.json: type .*zvol.* must be"),
    ("no os", changed(os=None), "manifest.json: os is missing"),
    ("a date that is a number", changed(published_at=5), None),
    ("a date that is none", changed(published_at="soon"), None),
    ("a zvol without its fields", changed(type="zvol"), None),
    ("tags over 100 KiB", changed(tags={"a": "b" * 110000}), None),
    ("an origin that is no uuid", changed(origin="../x"), "manifest.json: origin '../x' must be"),
    ("no sha1", of_file(sha1=None), None),
    ("a short sha1", of_file(sha1="abc"), r"manifest.json: files.0..sha1 'abc' must have"),
    ("a compression unknown", of_file(compression="lzma"),
     r"manifest.json: files.0..compression 'lzma' must be one of"),
    ("a size that is true", of_file(size=True), "size"),
    ("a negative size", of_file(size=-1), "size"),
    ("a path upwards", of_file(path="../../etc/passwd"), "manifest.json: files.0..path"),
    ("an absolute path", of_file(path="/etc/passwd"), "manifest.json: files.0..path"),
    ("a path with a slash", of_file(path="a/b"), "manifest.json: files.0..path"),
    ("a dot", of_file(path="."), "manifest.json: files.0..path"),
    ("two dots", of_file(path=".."), "manifest.json: files.0..path"),
    ("an empty path", of_file(path=""), "manifest.json: files.0..path"),
    ("a path with a line end", of_file(path="image.zfs.gz\n"), "manifest.json: files.0..path"),
    ("a path with NUL", of_file(path="image\0.zfs.gz"), "manifest.json: files.0..path"),
    ("a path of 300 letters", of_file(path="a" * 300), "manifest.json: files.0..path"),
    ("a path that is the manifest", of_file(path="manifest.json"), "manifest.json: files.0..path"),
    ("a path that is a number", of_file(path=7), "manifest.json: files.0..path"),
    ("a file that is not there", of_file(path="other.gz"), "other.gz: No such file"),
    ("a file of another size", of_file(size=16), "image.zfs.gz: its size is not the 16 bytes"),
)


class HostileManifests(ServerCase):
    seconds = 5

    def test_each_is_left_out_with_one_line_and_the_others_are_listed(self):
        write_image(self.serve_dir, GOOD)
        cases = {}
        for number, (what, make, reason) in enumerate(HOSTILE, 1000):
            uuid = uuid_of(number)
            cases[uuid] = what, reason
            manifest = write_image(self.serve_dir, uuid)
            write_manifest(self.serve_dir, uuid, make(manifest))
        sound = sorted([GOOD] + [uuid for uuid in cases if cases[uuid][1] is None])
        server = self.serve()
        for _ in range(2):
            self.assertEqual(sorted(uuids(server.get("/datasets"))), sound)
            self.assertEqual(sorted(uuids(server.get("/images"))), sound)
        with server.connect() as connection:
            for uuid, (what, reason) in cases.items():
                with self.subTest(what):
                    lines = left_out(server, uuid)
                    if reason is None:
                        self.assertEqual(lines, [])
                        continue
                    for target in (f"/datasets/{uuid}", f"/images/{uuid}", f"/images/{uuid}/file",
                                   f"/datasets/{uuid}/image.zfs.gz"):
                        self.assertError(connection.request(target), 404, "ResourceNotFound")
                    self.assertEqual(len(lines), 1, lines)
                    self.assertRegex(lines[0], reason)
        for line in server.log().splitlines():
            self.assertLess(len(line), 1500)

    def test_nesting_at_every_depth_is_either_shown_or_left_out(self):
        write_image(self.serve_dir, GOOD)
        depths = (50, 150, 250, 300, 325, 400, 450, 490, 600, 900, 990)
        for depth in depths:
            manifest = write_image(self.serve_dir, uuid_of(depth))
            for name, deep in (("tags", '{"a":' * depth + "1" + "}" * depth),):
                text = json.dumps(manifest)[:-1] + f', "{name}": {deep}}}'
                write_manifest(self.serve_dir, uuid_of(depth), text.encode())
        server = self.serve()
        shown = {path: set(re.findall(rb'\n    "uuid": "([0-9a-f-]{36})"', server.get(path).body))
                 for path in ("/datasets", "/images")}
        for path, found in shown.items():
            self.assertIn(GOOD.encode(), found)
            for depth in depths:
                with self.subTest(path, depth=depth):
                    lines = left_out(server, uuid_of(depth))
                    self.assertEqual(len(lines), 0 if uuid_of(depth).encode() in found else 1)
                    for line in lines:
                        self.assertIn("manifest.json", line)

    def test_no_field_of_any_type_spoils_the_list(self):
        names = ("creator_name", "cloud_name", "creator_uuid", "vendor_uuid", "platform_type",
                 "restricted_to_uuid", "created_at", "updated_at", "urn", "owner", "public",
                 "state", "disabled", "image_size", "generate_passwords", "requirements", "users",
                 "traits", "acl", "tags", "billing_tags", "channels", "icon", "error",
                 "inherited_directories", "homepage", "origin", "description", "md5", "v")
        values = (5, 1.5, True, [], [1], {}, {"a": 1}, "", "x", "\u2028", [[]], [{}], [None])
        count = 0
        for with_urn in (True, False):
            for name in names:
                for value in values:
                    count += 1
                    manifest = write_image(self.serve_dir, uuid_of(1000 + count),
                                           **({} if with_urn else {"urn": None}))
                    manifest[name] = value
                    write_manifest(self.serve_dir, uuid_of(1000 + count), manifest)
        write_image(self.serve_dir, GOOD)
        server = self.serve()
        for path in ("/datasets", "/images"):
            found = uuids(server.get(path))
            self.assertIn(GOOD, found)
            for number in range(1001, 1001 + count):
                uuid = uuid_of(number)
                shown = uuid in found or server.get(path + "/" + uuid).status == 200   # disabled
                self.assertEqual(len(left_out(server, uuid)), 0 if shown else 1, uuid)
                self.assertLessEqual(len(re.findall(f"warn image {uuid}", server.log())), 1)

    def test_an_empty_creator_is_mended_to_nobody(self):
        for number, creator in ((2, ""), (3, None)):
            write_image(self.serve_dir, uuid_of(number), creator_uuid=creator)
        server = self.serve()
        for image in server.get("/datasets").json():
            self.assertEqual(image["creator_uuid"], NOBODY)
        self.assertEqual([image["owner"] for image in server.get("/images").json()], [NOBODY] * 2)
        self.assertNotIn("left out", server.log())

    def test_a_file_name_that_the_locale_cannot_spell(self):
        write_image(self.serve_dir, GOOD)
        manifest = write_image(self.serve_dir, uuid_of(2))
        manifest["files"][0]["path"] = "\u4e2d\u6587.gz"
        write_manifest(self.serve_dir, uuid_of(2), manifest)
        server = self.serve(environment={"LC_ALL": "C", "PYTHONUTF8": "0",
                                         "PYTHONCOERCECLOCALE": "0"})
        self.assertEqual(uuids(server.get("/datasets")), [GOOD])
        self.assertEqual(len(left_out(server, uuid_of(2))), 1)

    def test_directories_without_a_manifest_are_passed_over_in_silence(self):
        write_image(self.serve_dir, GOOD)
        for name in (uuid_of(2), ".git", "tests", uuid_of(3).upper(), ".incoming-" + uuid_of(4),
                     "lost+found", "\udcff\udcfe"):
            os.mkdir(os.path.join(self.serve_dir, name))
        os.symlink("nowhere", os.path.join(self.serve_dir, uuid_of(6)))
        server = self.serve(config=FEW)
        for path in ("/datasets", "/images"):
            self.assertEqual(uuids(server.get(path)), [GOOD])
        for number in (2, 3, 4, 6):
            self.assertError(server.get(f"/datasets/{uuid_of(number)}"), 404)
        self.assertNotRegex(server.log(), "left out| warn | error ")

    def test_an_image_that_vanishes_while_it_is_read(self):
        write_image(self.serve_dir, GOOD)
        ghost = uuid_of(7)
        server = self.serve(config=FEW, prelude=f"""
import os
real = os.listdir
os.listdir = lambda path=".": real(path) + [{ghost!r}] * (path == {self.serve_dir!r})
""")
        self.assertEqual(uuids(server.get("/datasets")), [GOOD])
        self.assertEqual(uuids(server.get("/images")), [GOOD])
        self.assertNotRegex(server.log(), "left out| warn | error ")


class HostileFiles(ServerCase):

    def test_what_is_no_readable_file_is_left_out_at_once(self):
        def link(target):
            return lambda path: os.symlink(target, path)

        def unreadable(path):
            with open(path, "wb") as file:
                file.write(b"not a real stream")
            os.chmod(path, 0)

        cases = (("a dangling link", link("nowhere"), "No such file"),
                 ("a link to itself", link("image.zfs.gz"), "symbolic links"),
                 ("a fifo", os.mkfifo, "regular"),
                 ("a directory", os.mkdir, "regular"),
                 ("a device", link("/dev/zero"), "regular"),
                 ("without a mode", unreadable, "ermission"))
        os.chmod(self.directory, 0o755)
        write_image(self.serve_dir, GOOD)
        for number, (what, make, _) in enumerate(cases, 10):
            write_image(self.serve_dir, uuid_of(number))
            path = os.path.join(self.serve_dir, uuid_of(number), "image.zfs.gz")
            os.unlink(path)
            make(path)
        server = self.serve(prelude=AS_NOBODY)
        for path in ("/datasets", "/images", "/datasets"):
            self.assertEqual(uuids(server.get(path)), [GOOD])
        for number, (what, _, reason) in enumerate(cases, 10):
            with self.subTest(what):
                self.assertError(server.get(f"/datasets/{uuid_of(number)}/image.zfs.gz"), 404)
                lines = left_out(server, uuid_of(number))
                self.assertEqual(len(lines), 1, lines)
                self.assertRegex(lines[0], "image.zfs.gz.*" + reason)

    def test_links_that_an_operator_has_placed_are_followed(self):
        pool = os.path.join(self.directory, "pool")
        write_image(pool, uuid_of(2), b"elsewhere")
        os.symlink(os.path.join(pool, uuid_of(2)), os.path.join(self.serve_dir, uuid_of(2)))
        write_image(self.serve_dir, uuid_of(3), b"elsewhere")
        path = os.path.join(self.serve_dir, uuid_of(3), "image.zfs.gz")
        os.rename(path, os.path.join(pool, "far away"))
        os.symlink(os.path.join(pool, "far away"), path)
        server = self.serve()
        for uuid in uuids(server.get("/datasets")):
            self.assertEqual(server.get(f"/datasets/{uuid}/image.zfs.gz").body, b"elsewhere")
        self.assertEqual(len(uuids(server.get("/datasets"))), 2)


class Freshness(ServerCase):
    seconds = 6

    def setUp(self):
        super().setUp()
        self.manifest = write_image(self.serve_dir, GOOD)
        self.path = os.path.join(self.serve_dir, GOOD, "manifest.json")

    def name(self, server):
        return server.get(f"/datasets/{GOOD}").json()["name"]

    def names(self, server, path="/datasets"):
        return [image["name"] for image in server.get(path).json()]

    def assertShows(self, server, name):
        """The image itself tells at once, lists when it is time to look again."""
        self.assertEqual(self.name(server), name)
        self.assertEqual(server.get(f"/images/{GOOD}").json()["name"], name)
        for path in ("/datasets", "/images"):
            wait_for(lambda: self.names(server, path) == [name], f"{name} in {path}")

    def test_a_manifest_replaced_by_rename(self):
        server = self.serve()
        self.assertShows(server, "test")
        write_manifest(self.serve_dir, GOOD, {**self.manifest, "name": "another"})
        self.assertShows(server, "another")

    def test_a_manifest_edited_in_place(self):
        server = self.serve()
        self.assertShows(server, "test")
        with open(self.path, "w") as file:
            json.dump({**self.manifest, "name": "another"}, file)
        self.assertShows(server, "another")

    def test_a_manifest_of_the_same_size_and_mtime(self):
        server = self.serve(prelude=SEEN_SOON)
        for round, in_place in enumerate((False, True, False, True)):
            before = os.stat(self.path)
            name = f"tes{round}"
            if in_place:
                with open(self.path, "r+") as file:
                    text = re.sub('"name": "tes."', f'"name": "{name}"', file.read(), count=1)
                    file.seek(0)
                    file.write(text)
            else:
                write_manifest(self.serve_dir, GOOD, {**self.manifest, "name": name})
            os.utime(self.path, ns=(before.st_atime_ns, before.st_mtime_ns))
            self.assertEqual(os.stat(self.path).st_mtime_ns, before.st_mtime_ns)
            self.assertShows(server, name)

    def test_added_and_removed_shows_with_the_next_request(self):
        server = self.serve()
        self.assertEqual(uuids(server.get("/datasets")), [GOOD])
        for round in range(20):
            uuid = uuid_of(100 + round)
            write_image(self.directory, uuid)
            os.rename(os.path.join(self.directory, uuid), os.path.join(self.serve_dir, uuid))
            for path in ("/datasets", "/images"):
                self.assertIn(uuid, uuids(server.get(path)))
            self.assertEqual(server.get(f"/images/{uuid}").status, 200)
            if round % 2:
                shutil.rmtree(os.path.join(self.serve_dir, uuid))
            else:
                os.rename(os.path.join(self.serve_dir, uuid), os.path.join(self.directory, uuid))
            for path in ("/datasets", "/images"):
                self.assertEqual(uuids(server.get(path)), [GOOD])
            self.assertError(server.get(f"/images/{uuid}"), 404)

    def test_one_directory_swapped_for_another_of_its_name(self):
        server = self.serve()
        self.assertShows(server, "test")
        write_image(self.directory, GOOD, b"other bytes", name="swapped")
        os.rename(os.path.join(self.serve_dir, GOOD), os.path.join(self.directory, "old"))
        os.rename(os.path.join(self.directory, GOOD), os.path.join(self.serve_dir, GOOD))
        self.assertShows(server, "swapped")
        self.assertEqual(server.get(f"/images/{GOOD}/file").body, b"other bytes")

    def test_one_directory_swapped_between_the_look_and_open_never_has_the_etag_before(self):
        for number, target in enumerate((f"/images/{GOOD}/file",
                                         f"/datasets/{GOOD}/image.zfs.gz")):
            site, real = self.site(), imgserver.open_regular
            place, after = os.path.join(self.serve_dir, GOOD), b"not a real strea%d" % number
            write_image(self.directory, GOOD, after)
            ask(site, target)

            def swapped(name, *serve_dir):
                if name == os.path.join(place, "image.zfs.gz") and os.path.isdir(
                        os.path.join(self.directory, GOOD)):
                    os.rename(place, place + f".{number}")
                    os.rename(os.path.join(self.directory, GOOD), place)
                return real(name, *serve_dir)
            with self.subTest(target), mock.patch("imgserver.open_regular", swapped):
                answer = ask(site, target)
                self.assertEqual((answer.status, answer.body), (200, after))
                self.assertEqual(answer.headers["etag"], f'"{hashlib.sha1(after).hexdigest()}"')

    def test_one_directory_swapped_while_it_is_read_is_no_mixture_of_two(self):
        after = b"not a real strea?"
        write_image(self.directory, GOOD, after, name="after")
        place, listdir = os.path.join(self.serve_dir, GOOD), os.listdir

        def swapped(path):                # between its manifest and its file
            if path == place and os.path.isdir(os.path.join(self.directory, GOOD)):
                os.rename(place, place + ".before")
                os.rename(os.path.join(self.directory, GOOD), place)
            return listdir(path)
        with mock.patch("os.listdir", swapped):
            answer = ask(self.site(), f"/images/{GOOD}/file")
        self.assertEqual((answer.status, answer.body), (200, after))
        self.assertEqual(answer.headers["etag"], f'"{hashlib.sha1(after).hexdigest()}"')

    def test_out_of_files_while_a_hash_is_taken_is_not_for_ever(self):
        site = self.site()
        write_v2(self.serve_dir, uuid_of(5), files=[{"compression": "gzip"}])
        for code in (errno.EMFILE, errno.EIO):
            with self.subTest(code):
                os.utime(os.path.join(self.serve_dir, uuid_of(5), "image.zfs.gz"))
                with mock.patch("imgserver.hash_file", side_effect=OSError(code, "broken")):
                    self.assertIn(ask(site, f"/images/{uuid_of(5)}").status, (404, 503))
                self.assertEqual(ask(site, f"/images/{uuid_of(5)}").status, 200)

    def test_out_of_memory_for_a_moment(self):
        time.sleep(SETTLED)
        site = self.site()
        with mock.patch("imgserver.normalise", side_effect=MemoryError):
            for target in (f"/images/{GOOD}", "/images"):
                self.assertEqual(ask(site, target).status, 503)
        self.assertEqual(ask(site, f"/images/{GOOD}").status, 200)
        self.assertEqual(uuids(ask(site, "/images")), [GOOD])

    def test_a_file_that_cannot_be_opened_is_no_file_that_is_not_there(self):
        time.sleep(SETTLED)
        site, open_regular = self.site(), imgserver.open_regular
        target = f"/images/{GOOD}/file"
        self.assertEqual(ask(site, target).status, 200)
        for code, status in ((errno.EIO, 503), (errno.ESTALE, 503), (errno.EACCES, 503),
                             (errno.EMFILE, 503), (errno.ENOENT, 404), (errno.ELOOP, 404)):
            def fails(path, *more, code=code):
                if path.endswith(".gz"):
                    raise OSError(code, os.strerror(code))
                return open_regular(path, *more)
            with self.subTest(code), mock.patch("imgserver.open_regular", fails):
                self.assertEqual(ask(site, target).status, status)
                self.assertEqual(os.strerror(code) in log_of(site), status == 503)

    def test_a_file_that_grows_while_it_is_copied(self):
        data = b"0123456789" * 1000
        uuid = uuid_of(2)
        write_image(self.serve_dir, uuid, data)
        path = os.path.join(self.serve_dir, uuid, "image.zfs.gz")
        os.truncate(path, 0)
        server = self.serve()
        with open(path, "ab", buffering=0) as file:
            for start in range(0, len(data), 1000):
                self.assertEqual(uuids(server.get("/datasets")), [GOOD])
                self.assertEqual(uuids(server.get("/images")), [GOOD])
                self.assertError(server.get(f"/datasets/{uuid}"), 404)
                self.assertError(server.get(f"/datasets/{uuid}/image.zfs.gz"), 404)
                file.write(data[start:start + 1000])
        self.assertEqual(server.get(f"/images/{uuid}/file").body, data)
        for api in ("/datasets", "/images"):
            wait_for(lambda: uuid in uuids(server.get(api)), "the image")
        self.assertEqual(len(left_out(server, uuid)), 1, server.log())
        server.wait_log(f"image {uuid} is on show")

    def test_copied_in_any_order_it_shows_by_itself(self):
        for number, order in enumerate((("manifest.json", "image.zfs.gz"),
                                        ("image.zfs.gz", "manifest.json"))):
            with self.subTest(order):
                uuid = uuid_of(50 + number)
                write_image(self.directory, uuid)
                server = self.serve()
                os.mkdir(os.path.join(self.serve_dir, uuid))
                for name in order:
                    self.assertNotIn(uuid, uuids(server.get("/datasets")))
                    self.assertError(server.get(f"/images/{uuid}"), 404)
                    shutil.copy(os.path.join(self.directory, uuid, name),
                                os.path.join(self.serve_dir, uuid, name))
                self.assertEqual(server.get(f"/images/{uuid}").status, 200)
                wait_for(lambda: uuid in uuids(server.get("/datasets")), "the image")

    def test_chmod_hides_it_and_chmod_brings_it_back(self):
        os.chmod(self.directory, 0o755)
        server = self.serve(prelude=AS_NOBODY + SEEN_SOON)
        for name in ("manifest.json", "image.zfs.gz", "."):
            with self.subTest(name):
                path = os.path.normpath(os.path.join(self.serve_dir, GOOD, name))
                mode = os.stat(path).st_mode & 0o777
                self.assertEqual(server.get(f"/datasets/{GOOD}").status, 200)
                os.chmod(path, 0)
                self.assertError(server.get(f"/datasets/{GOOD}"), 404)
                wait_for(lambda: uuids(server.get("/datasets")) == [], "the image hidden")
                os.chmod(path, mode | 0o005)
                self.assertEqual(server.get(f"/datasets/{GOOD}").status, 200)
                wait_for(lambda: uuids(server.get("/datasets")) == [GOOD], "the image")

    def test_out_of_file_descriptors_for_a_moment(self):
        for call in ("open", "listdir"):
            with self.subTest(call):
                server = self.serve(prelude=f"""
import errno, os
real, left = os.{call}, [3]
def fails(path, *more):
    if left[0] and {GOOD!r} in str(path):
        left[0] -= 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return real(path, *more)
os.{call} = fails
""")
                server.get("/datasets")
                wait_for(lambda: server.get("/datasets").body.count(GOOD.encode()) > 0,
                         "the image")
                self.assertEqual(server.get(f"/images/{GOOD}").status, 200)

    def test_serve_dir_replaced_by_what_is_none(self):
        server = self.serve()
        targets = "/datasets", f"/datasets/{GOOD}", f"/images/{GOOD}", f"/images/{GOOD}/file"
        for target in targets:
            self.assertEqual(server.get(target).status, 200)
        os.rename(self.serve_dir, self.serve_dir + "2")
        for what, make in (("a file", lambda: open(self.serve_dir, "w").close()),
                           ("a loop", lambda: os.symlink(self.serve_dir, self.serve_dir))):
            make()
            for target in targets:
                with self.subTest(what, target=target):
                    self.assertError(server.get(target), 503)
            os.unlink(self.serve_dir)
        os.rename(self.serve_dir + "2", self.serve_dir)
        for target in targets:
            self.assertEqual(server.get(target).status, 200)

    def test_serve_dir_gone_and_back(self):
        server = self.serve()
        self.assertEqual(uuids(server.get("/datasets")), [GOOD])
        aside = os.path.join(self.directory, "aside")
        os.rename(self.serve_dir, aside)
        for path in ("/datasets", "/images", f"/datasets/{uuid_of(9)}"):
            answer = server.get(path)
            self.assertError(answer, 503)
            self.assertIn("retry-after", answer.headers)
        os.rename(aside, self.serve_dir)
        self.assertEqual(uuids(server.get("/datasets")), [GOOD])

    def test_one_answer_stays_the_same_byte_for_byte(self):
        for number in (2, 3):
            write_v2(self.serve_dir, uuid_of(number), tags={"b": 1, "a": 2})
        for path in ("/datasets", "/images", f"/datasets/{uuid_of(2)}", f"/images/{GOOD}"):
            first, second = self.serve(), self.serve()
            self.assertEqual(first.get(path).body, first.get(path).body)
            self.assertEqual(first.get(path).body, second.get(path).body)


class Amount(ServerCase):
    seconds = 4

    def test_5000_images_are_listed_quickly_once_they_are_known(self):
        data = b"small"
        manifest = write_image(self.serve_dir, uuid_of(0), data)
        first = os.path.join(self.serve_dir, uuid_of(0), "image.zfs.gz")
        for number in range(1, 5000):
            manifest["uuid"] = uuid_of(number)
            directory = os.path.join(self.serve_dir, uuid_of(number))
            os.mkdir(directory)
            os.link(first, directory + "/image.zfs.gz")
            with open(directory + "/manifest.json", "w") as file:
                json.dump(manifest, file)
        server = self.serve()
        for path in ("/datasets", "/images"):
            times = []
            for _ in range(4):
                began = time.monotonic()
                answer = server.get(path)
                times.append(time.monotonic() - began)
            self.assertEqual(uuids(answer), [uuid_of(n) for n in range(5000)])
            self.assertLess(min(times[1:]), times[0] / 2)
        shutil.rmtree(os.path.join(self.serve_dir, uuid_of(77)))
        self.assertEqual(len(uuids(server.get("/datasets"))), 4999)


FILE_NAMES = ("a b.gz", " leading.gz", "100%.gz", "%41.gz", "%2e%2e%2f.gz", "a#b.gz", "a?b.gz",
              "a+b.gz", "\u00e9.gz", "e\u0301.gz", "\u65e5\u672c\u8a9e.gz", "\U0001f4be.gz",
              "a;b.gz",
              "a'b\".gz", "a&b=c.gz", "a\\b.gz", "..hidden.gz", "-n", "~", "a:b@c.gz", "<b>.gz",
              "http:", "a,b.gz", "$(id).gz", "`id`", "file", "{}[]|^.gz", "x" * 250 + ".gz")


class Urls(ServerCase):

    def test_the_url_of_any_file_name_leads_to_the_file(self):
        for number, name in enumerate(FILE_NAMES, 1):
            write_image(self.serve_dir, uuid_of(number), name.encode(), path=name)
        for transport, unix in TRANSPORTS:
            server = self.serve(unix=unix)
            images = {image["uuid"]: image for image in server.get("/datasets").json()}
            for number, name in enumerate(FILE_NAMES, 1):
                with self.subTest(name, transport=transport):
                    file = images[uuid_of(number)]["files"][0]
                    self.assertEqual(file["path"], name)
                    self.assertEqual(
                        file, server.get(f"/datasets/{uuid_of(number)}").json()["files"][0])
                    url = file["url"]
                    self.assertRegex(url, r"\A[!-~]+\Z")
                    base = f"http://images.example.com/datasets/{uuid_of(number)}/"
                    self.assertEqual(urllib.parse.unquote(url[len(base):]), name)
                    self.assertTrue(url.startswith(base))
                    path = url[len("http://images.example.com"):]
                    for target in (path, url, "https://elsewhere:1" + path):
                        self.assertEqual(server.get(target).body, name.encode())

    def test_the_host_header_goes_into_the_url_only_where_it_is_one(self):
        write_image(self.serve_dir, GOOD)
        for transport, unix in TRANSPORTS:
            server = self.serve(unix=unix)
            for host in ("a b", "<script>", "h" * 300, "host:99999", "host:65536", "", "user@h",
                         "h:80:80", "h:-1", "h:+1", "h:\u00b2", "h/../x", "h?x", "h#x",
                         'h"x', "h'x", "[::1", "::1", "[zz]", "h,i", "h\\", "%00",
                         "\u00e9", "h;x", "{h}", "$h", "h:\t1", "http://h"):
                with self.subTest(host, transport=transport):
                    for path in ("/datasets", f"/datasets/{GOOD}", "/ping"):
                        answer = server.get(path, {"Host": host})
                        self.assertError(answer, 400)
                        if len(host) > 5:
                            self.assertNotIn(host.encode("latin-1"), answer.head + answer.body)
            for host in ("[::1]:80", "[::1]", "h:8080", "1.2.3.4", "h", "h:1", "A-b.C_d.example"):
                with self.subTest(host, transport=transport):
                    for path in ("/datasets", f"/datasets/{GOOD}"):
                        value = server.get(path, {"Host": host}).json()
                        url = (value if isinstance(value, dict) else value[0])["files"][0]["url"]
                        self.assertEqual(url, f"http://{host}/datasets/{GOOD}/image.zfs.gz")

    def test_a_client_of_http_1_0_without_a_host(self):
        write_image(self.serve_dir, GOOD)
        for transport, unix in TRANSPORTS:
            with self.subTest(transport=transport):
                server = self.serve(unix=unix)
                image, = server.get("/datasets", {"Host": None}, version="1.0").json()
                host = "localhost" if unix else "127.0.0.1:%d" % server.address[1]
                self.assertEqual(image["files"][0]["url"],
                                 f"http://{host}/datasets/{GOOD}/image.zfs.gz")

    def test_prefix_and_suffix_and_no_port_twice(self):
        write_image(self.serve_dir, GOOD)
        for suffix, host, base in ((":8080", "h", "https://h:8080"),
                                   (":8080", "h:8080", "https://h:8080"),
                                   (":8080", "h:81", "https://h:81"),
                                   (":8080", "[::1]", "https://[::1]:8080"),
                                   (":8080", "[::1]:9", "https://[::1]:9"),
                                   (":8080/sub", "h:81", "https://h:81/sub"),
                                   ("/sub", "h:81", "https://h:81/sub"), ("", "h", "https://h")):
            with self.subTest(suffix=suffix, host=host):
                server = self.serve(config={"prefix": "https://", "suffix": suffix})
                for path in ("/datasets", f"/datasets/{GOOD}"):
                    value = server.get(path, {"Host": host}).json()
                    url = (value if isinstance(value, dict) else value[0])["files"][0]["url"]
                    self.assertEqual(url, f"{base}/datasets/{GOOD}/image.zfs.gz")


class Origins(ServerCase):
    seconds = 4

    def image(self, number, origin=None):
        write_image(self.serve_dir, uuid_of(number), origin=origin and uuid_of(origin))

    def test_cycles_are_hidden_and_logged_once(self):
        for number, origin in ((1, None), (2, 2), (3, 4), (4, 3), (5, 6), (6, 7), (7, 5),
                               (8, 3), (9, 1)):
            self.image(number, origin)
        server = self.serve()
        for _ in range(3):
            for path in ("/datasets", "/images"):
                self.assertEqual(uuids(server.get(path)), [uuid_of(1), uuid_of(9)])
            for number in range(2, 9):
                self.assertError(server.get(f"/datasets/{uuid_of(number)}"), 404)
                self.assertError(server.get(f"/images/{uuid_of(number)}"), 404)
        for number in range(2, 9):
            self.assertEqual(len(re.findall(f"{uuid_of(number)} is left out.*cycle",
                                            server.log())), 1, number)

    def test_a_cycle_that_is_undone(self):
        self.image(2, 3)
        self.image(3, 2)
        server = self.serve(prelude=SEEN_SOON)
        self.assertEqual(uuids(server.get("/datasets")), [])

        def status(wanted):
            return lambda: server.get(f"/datasets/{uuid_of(2)}").status == wanted

        self.image(3)                     # first no list is asked for, which looks at all
        wait_for(status(200), "the image")
        wait_for(lambda: len(uuids(server.get("/datasets"))) == 2, "both images")
        self.image(3, 2)
        wait_for(status(404), "the cycle hidden")
        wait_for(lambda: uuids(server.get("/datasets")) == [], "the cycle hidden in lists")

    def test_a_cycle_asked_for_before_any_list(self):
        self.image(2, 3)
        self.image(3, 2)
        server = self.serve()
        self.assertError(server.get(f"/datasets/{uuid_of(2)}"), 404)
        self.assertError(server.get(f"/images/{uuid_of(3)}/file"), 404)

    def test_images_left_out_by_their_origins_are_in_no_list(self):
        self.image(1)
        self.image(2, 3)
        self.image(3, 2)
        site = self.site(publish_from=["127.0.0.1"])
        for target in ("/images", "/images?state=all", "/images?state=active"):
            self.assertEqual(uuids(ask(site, target)), [uuid_of(1)])
        self.assertEqual(site.store.count_states(),
                         {"active": 1, "disabled": 0, "unactivated": 0, "left_out": 2})

    def test_chains_of_any_shape_and_length(self):
        count = 20_000
        line = {number: number - 1 for number in range(1, count)}
        for origins, expected in (
                ({}, set()), ({1: 1}, {1}), ({1: 2}, set()), ({1: 2, 2: 1, 3: 2, 4: 5}, {1, 2, 3}),
                (line, set()), (dict(reversed(line.items())), set()),
                ({**line, 0: 1}, set(range(count))),
                (dict(reversed({**line, 0: 1}.items())), set(range(count)))):
            started = time.process_time()
            self.assertEqual(imgserver.endless(origins), expected)
            self.assertLess(time.process_time() - started, 2)

    def test_a_chain_of_a_thousand(self):
        for number in range(1, 1001):
            self.image(number, number - 1 or None)
        server = self.serve()
        self.assertEqual(server.get(f"/datasets/{uuid_of(1000)}").status, 200)
        self.assertEqual(len(uuids(server.get("/datasets"))), 1000)

    def test_a_long_chain_never_holds_up_the_event_loop(self):
        count = 3 * imgserver.LINKS_IN_LOOP
        for number in range(1, count + 1):
            self.image(number, number - 1 or None)
        time.sleep(SETTLED)           # or they would be read again with each look
        site = self.site()
        ask(site, "/images")
        looks, real = [], imgserver.Image.is_fresh

        def is_fresh(image, *arguments, **words):
            looks.append(image.uuid)
            return real(image, *arguments, **words)

        def in_loop():
            request = parse(f"GET /images/{uuid_of(count)} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            return site.answer(request).status
        for image in site.store._images.values():     # each link is due to be re-checked
            image.checked = image.chain_checked = -math.inf
        with mock.patch("imgserver.Image.is_fresh", is_fresh):
            with self.assertRaises(imgserver.NeedsThread):
                in_loop()
            self.assertLess(len(looks), imgserver.LINKS_IN_LOOP + 5)
            del looks[:]
            self.assertEqual(ask(site, f"/images/{uuid_of(count)}").status, 200)
            self.assertLessEqual(len(looks), count, "each link once")
            del looks[:]
            for _ in range(50):
                self.assertEqual(in_loop(), 200)
            self.assertEqual(looks, [uuid_of(count)] * 50)

    def test_a_missing_origin_is_told_once(self):
        self.image(2, 3)
        server = self.serve()
        for _ in range(3):
            for path in ("/datasets", "/images", f"/datasets/{uuid_of(2)}"):
                self.assertEqual(server.get(path).status, 200)
        self.assertEqual(len(re.findall(f"{uuid_of(2)}.*{uuid_of(3)}", server.log())), 1)


# -- imgmanifest's upgrade, as imgadm runs it on what a DSAPI source answers ---------------

DROPPED = ("creator_uuid", "vendor_uuid", "creator_name", "cloud_name", "creator_admin",
           "restricted_to_uuid", "owner_uuid", "platform_type", "created_at", "updated_at", "_url")


def upgraded(manifest):
    """The v2 manifest that imgadm makes of `manifest`; AssertionError where it would fail."""
    if manifest.get("v") is not None:
        assert manifest["v"] >= 2
        return manifest
    assert manifest.get("creator_uuid"), "manifest does not have a v field"
    new = dict(manifest, v=2)
    assert re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", new["uuid"])
    assert "owner" not in new
    new["owner"] = new["creator_uuid"]
    if new.get("restricted_to_uuid"):
        assert "public" not in new
        new.update(public=False, acl=[new["restricted_to_uuid"]])
    else:
        new["public"] = True
    new["disabled"] = bool(new.get("disabled"))
    new["state"] = "disabled" if new["disabled"] else "active"
    if not new.get("published_at") and new.get("created_at"):
        new["published_at"] = new["created_at"]
    if re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\dZ", new.get("published_at", "")):
        new["published_at"] = new["published_at"][:-1] + ":00Z"
    for file in new["files"]:
        if not file.get("compression"):
            end = os.path.splitext(file.get("path") or file["url"])[1]
            file["compression"] = {".gz": "gzip", ".bz2": "bzip2"}.get(end, "none")
        file.pop("path", None)
        file.pop("url", None)
    if "image_size" in new:
        new["image_size"] = int(new["image_size"])
    for name in DROPPED:
        new.pop(name, None)
    return new


GZIP, BZIP2, XZ = b"\x1f\x8b\x08 and so on", b"BZh9 and so on", b"\xfd7zXZ\0 and so on"
OWNER = "352971aa-31ba-496c-9ade-a379feaecd52"
ZVOL = {"type": "zvol", "nic_driver": "virtio", "disk_driver": "virtio", "cpu_type": "host"}

# A manifest on disk, its file, and the compression that an import must use.
STORED = (
    ("as the original wrote it", write_image, {"data": GZIP}, "gzip"),
    ("without a creator", write_image, {"data": GZIP, "creator_uuid": ""}, "gzip"),
    ("bzip2 by its bytes only", write_image, {"data": BZIP2, "path": "image"}, "bzip2"),
    ("xz, which an upgrade takes for none", write_image, {"data": XZ, "path": "i.xz"}, "xz"),
    ("named .gz and not compressed", write_image, {"data": b"plain"}, "none"),
    ("an empty file by its name", write_image, {"data": b"", "path": "i.bz2"}, "bzip2"),
    ("a date without seconds", write_image, {"published_at": "2012-03-04T05:06Z"}, "none"),
    ("only created_at", write_image, {"published_at": None}, "none"),
    ("no date at all", write_image, {"published_at": None, "created_at": None}, "none"),
    ("restricted", write_image, {"restricted_to_uuid": OWNER}, "none"),
    ("restricted, with v2's public", write_image, {"restricted_to_uuid": OWNER, "public": True},
     "none"),
    ("with v2's owner and state", write_image, {"owner": OWNER, "state": "creating"}, "none"),
    ("a zvol, image_size a text", write_image, {**ZVOL, "image_size": "10240"}, "none"),
    ("a zvol, image_size a number", write_image, {**ZVOL, "image_size": 10240}, "none"),
    ("v 1 said aloud", write_image, {"v": 1}, "none"),
    ("as imgadm create wrote it", write_v2, {"data": GZIP}, "gzip"),
    ("v2 xz", write_v2, {"data": XZ, "compression": "xz"}, "xz"),
    ("v2 with an owner", write_v2, {"owner": OWNER, "state": "active", "public": True}, "gzip"),
    ("v2 private", write_v2, {"owner": OWNER, "public": False, "acl": [OWNER]}, "gzip"),
    ("v2 private to two", write_v2, {"public": False, "acl": [OWNER, NOBODY]}, "gzip"),
    ("v2 zvol", write_v2, {**ZVOL, "image_size": 10240}, "gzip"),
    ("v2 with all sorts", write_v2, {
        "requirements": {"brand": "bhyve", "bootrom": "uefi",
                         "min_platform": {"7.0": "20150101T000000Z"}},
        "users": [{"name": "root"}], "tags": {"role": "x"}, "generate_passwords": True,
        "homepage": "https://example.com/x", "urn": "a:b:c:1", "origin": uuid_of(1),
        "published_at": "2020-01-02T03:04:05.678Z", "inherited_directories": ["/opt"]}, "gzip"),
)


class Importable(ServerCase):

    def setUp(self):
        super().setUp()
        for number, (_, write, options, _) in enumerate(STORED, 1):
            write(self.serve_dir, uuid_of(number), **options)

    def check(self, server, shown, compression):
        """Hold one manifest of a DSAPI source against all that imgadm asks of it."""
        url = shown["files"][0]["url"]
        self.assertEqual(shown["files"][0]["compression"], compression)   # origins: not upgraded
        for name in ("name", "version", "description", "published_at", "type", "os",
                     "creator_uuid", "creator_name", "urn"):              # imgadm 1
            self.assertIsInstance(shown[name], str, name)
        manifest = upgraded(shown)
        self.assertEqual(manifest["state"], "active")
        file, = manifest["files"]
        self.assertEqual(file["compression"], compression)
        answer = server.get(url)
        self.assertIs(type(file["size"]), int)
        self.assertEqual(answer.headers["content-length"], str(file["size"]))
        self.assertEqual(hashlib.sha1(answer.body).hexdigest(), file["sha1"])
        self.assertRegex(manifest["published_at"],
                         r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z\Z")
        return manifest

    def test_every_manifest_served_can_be_imported(self):
        server = self.serve()
        listed = {image["uuid"]: image for image in server.get("/datasets").json()}
        for number, (what, _, _, compression) in enumerate(STORED, 1):
            with self.subTest(what):
                uuid = uuid_of(number)
                alone = server.get(f"/datasets/{uuid}").json()
                self.assertEqual(listed[uuid], alone)
                self.check(server, alone, compression)

    def test_both_apis_say_the_same_of_an_image(self):
        server = self.serve()
        for number, (what, _, _, _) in enumerate(STORED, 1):
            with self.subTest(what):
                uuid = uuid_of(number)
                manifest = upgraded(server.get(f"/datasets/{uuid}").json())
                for name, value in server.get(f"/images/{uuid}").json().items():
                    if name == "public" and len(manifest.get("acl", ())) > 1:
                        continue          # imgadm knows images of v1 that are private to one only
                    self.assertEqual(manifest[name], value, name)

    def test_what_a_client_upgraded_can_be_served_again(self):
        server = self.serve()
        for number in range(1, len(STORED) + 1):
            with self.subTest(STORED[number - 1][0]):
                uuid = uuid_of(number)
                first = upgraded(server.get(f"/datasets/{uuid}").json())
                path = server.get(f"/datasets/{uuid}").json()["files"][0]["path"]
                stored = json.loads(json.dumps(first))
                stored["files"][0]["path"] = next(
                    name for name in os.listdir(os.path.join(self.serve_dir, uuid))
                    if name != "manifest.json")
                write_manifest(self.serve_dir, uuid, stored)
                again = server.get(f"/datasets/{uuid}").json()
                self.assertEqual(again["files"][0]["path"], stored["files"][0]["path"])
                self.assertTrue(path.startswith(again["files"][0]["path"]))
                again = upgraded(again)
                self.assertEqual({name: first[name] for name in first if name in again}, again)


if __name__ == "__main__":
    unittest.main()
