"""The verbs on disk, in this process: what they store and refuse, and what a failure leaves."""

import bz2
import contextlib
import errno
import hashlib
import json
import lzma
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock

import imgserver
from tests import streams
from tests.support import (PATIENCE, ROOT, run_program, uuid_of, write_image, write_manifest,
                           write_v2)

U, V = uuid_of(1), uuid_of(2)
STREAM = streams.stream()
IMAGE = streams.pack(STREAM)
OTHER = streams.pack(streams.stream(b"other blocks", guid=5), "xz")
THIRD = streams.pack(streams.stream(b"third blocks", guid=5))    # gzip, as IMAGE


def reader(data, size=1 << 16):
    """read(n) over bytes, a part at a time, as a socket gives them."""
    at = 0

    def read(count):
        nonlocal at
        piece = data[at:at + min(count, size)]
        at += len(piece)
        return piece
    return read


class VerbCase(unittest.TestCase):

    def setUp(self):
        self.directory = tempfile.mkdtemp(prefix="imgserver-test-")
        self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)
        self.serve_dir = os.path.join(self.directory, "images")
        os.mkdir(self.serve_dir)
        self.config = imgserver.Config()
        self.config.serve_dir = self.serve_dir
        self.publisher = imgserver.Publisher(self.config)

    def manifest_of(self, uuid=U, **fields):
        return {"v": 2, "uuid": uuid, "owner": uuid_of(9), "name": "web", "version": "1",
                "type": "zone-dataset", "os": "smartos", "public": True, "disabled": False,
                **fields}

    def publish(self, uuid=U, data=IMAGE, activated=True, **fields):
        return self.publisher.import_image(self.manifest_of(uuid, **fields), reader(data),
                                           activated)

    def stored(self, name=U):
        with open(os.path.join(self.serve_dir, name, "manifest.json"), "rb") as file:
            return json.load(file)

    def names(self, name=None):
        return sorted(os.listdir(os.path.join(self.serve_dir, name) if name else self.serve_dir))

    def problem(self, uuid=U, place=""):
        """Why the store would not show an image; "absent" where there is none."""
        image = imgserver.ImageReader(self.config).read(
            uuid, os.path.join(self.serve_dir, place), imgserver.IMGAPI)
        return image.problem if image else "absent"

    def contents(self, uuid=U, place=""):
        """The bytes of an image's file, which must be those of its manifest."""
        file = self.stored(place + uuid)["files"][0]
        with open(os.path.join(self.serve_dir, place + uuid, file["path"]), "rb") as stored:
            data = stored.read()
        self.assertEqual((file["size"], file["sha1"], file["sha256"]),
                         (len(data), hashlib.sha1(data).hexdigest(),
                          hashlib.sha256(data).hexdigest()))
        return data

    @contextlib.contextmanager
    def refused(self, status, code, pattern="."):
        with self.assertRaisesRegex(imgserver.ApiError, pattern) as caught:
            yield caught
        self.assertEqual((caught.exception.status, caught.exception.code), (status, code),
                         caught.exception.message)
        self.assertNotIn(self.directory, caught.exception.message)


class TestSteps(VerbCase):

    def test_created_filled_and_activated(self):
        self.publisher.create(self.manifest_of(state="active", icon=True, files=[{"size": 5}]))
        self.assertEqual(self.stored(".incoming-" + U), self.manifest_of())
        with self.refused(422, "NoActivationNoFile"):
            self.publisher.activate(U)
        stored = self.publisher.add_file(U, reader(IMAGE, 1), {
            "sha1": hashlib.sha1(IMAGE).hexdigest().upper(), "size": len(IMAGE),
            "compression": "gzip"})
        self.assertEqual(stored, self.stored(".incoming-" + U))
        self.publisher.activate(U)
        self.assertEqual(self.names(), [U])
        self.assertEqual(self.names(U), ["manifest.json", "web-1.zfs.gz"])
        self.assertEqual(self.contents(), IMAGE)
        self.assertIsNone(self.problem())
        self.assertRegex(self.stored()["published_at"], "^20")
        self.assertNotIn("state", self.stored())
        with self.refused(422, "ImageAlreadyActivated"):
            self.publisher.activate(U)
        with self.refused(422, "ImageFilesImmutable"):
            self.publisher.add_file(U, reader(IMAGE))
        with self.refused(409, "ImageUuidAlreadyExists"):
            self.publisher.create(self.manifest_of())

    def test_unknown_images(self):
        for verb, words in (("add_file", (reader(IMAGE),)), ("activate", ()), ("discard", ()),
                            ("update", ({"description": "x"},)), ("enable", ()),
                            ("disable", ()), ("delete", ()), ("remove_icon", ()),
                            ("add_icon", ("image/png", b"x"))):
            with self.subTest(verb), self.refused(404, "ResourceNotFound"):
                getattr(self.publisher, verb)(U, *words)
        self.assertEqual(self.names(), [])

    def test_a_second_file_takes_the_place_of_the_first(self):
        self.publish(activated=False)
        self.publisher.add_file(U, reader(OTHER))
        self.assertEqual(self.contents(place=".incoming-"), OTHER)
        self.assertEqual(len(self.names(".incoming-" + U)), 2)
        again = streams.pack(streams.stream(b"again"), "xz")
        self.publisher.add_file(U, reader(again))
        self.assertEqual(self.contents(place=".incoming-"), again)
        self.assertEqual(len(self.names(".incoming-" + U)), 2)

    def test_a_failed_upload_leaves_the_file_before(self):
        self.publish(activated=False)

        def gone(_):
            raise OSError(errno.ECONNRESET, "Connection reset by peer")
        for read, expected, pattern in (
                (gone, {}, "cannot be read"), (reader(b""), {}, "no data"),
                (reader(OTHER), {"sha1": "0" * 40}, "its sha1 is"),
                (reader(OTHER), {"size": 5}, "its size is"),
                (reader(OTHER), {"compression": "gzip"}, "its compression is xz, not gzip"),
                (reader(OTHER), {"dataset_guid": "7"}, "its dataset_guid is 5, not 7"),
                (reader(OTHER), {"path": "../x"}, "plain file name"),
                (reader(IMAGE[:-9]), {}, "cut short"),
                (reader(streams.pack(STREAM[:-1])), {}, "end record is missing")):
            with self.subTest(pattern), self.refused(400, "Upload", pattern):
                self.publisher.add_file(U, read, expected)
            self.assertEqual(self.contents(place=".incoming-"), IMAGE)
            self.assertEqual(len(self.names(".incoming-" + U)), 2)
        self.publisher.activate(U)

    def test_a_leftover_blocks_nothing(self):
        for name, data in ((".file.ab", b"part"), ("manifest.json", b"{}"), ("web.zfs", b"x")):
            path = os.path.join(self.serve_dir, ".incoming-" + U)
            os.makedirs(path, exist_ok=True)
            with open(os.path.join(path, name), "wb") as file:
                file.write(data)
        self.publish()
        self.assertEqual((self.names(), self.names(U)), ([U], ["manifest.json", "web-1.zfs.gz"]))

    def test_turns_are_taken_for_each_piece(self):
        turns = []

        class Turn:
            def __enter__(self):
                turns.append("in")

            def __exit__(self, *_):
                turns.append("out")
        publisher = imgserver.Publisher(self.config, Turn())
        publisher.create(self.manifest_of())
        publisher.add_file(U, reader(IMAGE, 50))
        self.assertEqual(turns, ["in", "out"] * -(-len(IMAGE) // 50))

    def test_modes_and_owner_from_the_first_moment(self):
        if os.getuid() == 0:
            os.chown(self.serve_dir, 65534, 65533)
        opened = []
        real_open, real_mkdir = os.open, os.mkdir

        def spy(path, flags, mode=0o777, **place):
            fd = real_open(path, flags, mode, **place)
            if flags & os.O_CREAT:
                opened.append(os.fstat(fd).st_mode & 0o777)
            return fd
        for umask, widest in ((0, 0o644), (0o077, 0o600)):
            with self.subTest(umask=oct(umask)):
                before = os.umask(umask)
                try:
                    with mock.patch("os.open", spy):
                        self.publish()
                        self.publisher.add_icon(U, "image/png", b"icon")
                finally:
                    os.umask(before)
                self.assertEqual(set(opened), {widest})
                opened.clear()
                for path in (U, *(f"{U}/{name}" for name in self.names(U))):
                    status = os.stat(os.path.join(self.serve_dir, path))
                    self.assertEqual(status.st_mode & 0o777, 0o755 if path == U else 0o644)
                    if os.getuid() == 0:
                        self.assertEqual((status.st_uid, status.st_gid), (65534, 65533), path)
                self.publisher.delete(U)
        self.assertIs(os.mkdir, real_mkdir)


class TestChanges(VerbCase):

    def test_disabled_and_enabled(self):
        write_v2(self.serve_dir, U)
        mtime = os.stat(os.path.join(self.serve_dir, U, "manifest.json")).st_mtime_ns
        before = self.stored()
        self.assertIs(self.publisher.disable(U)["disabled"], True)
        self.assertEqual(self.stored(), {**before, "disabled": True})
        self.publisher.enable(U)
        self.assertEqual(self.stored(), before)
        self.assertEqual(os.stat(os.path.join(self.serve_dir, U, "manifest.json")).st_mtime_ns,
                         mtime)

    def test_fields_are_set_and_removed(self):
        write_image(self.serve_dir, U, channels=["dev"])
        v1 = self.stored()
        self.publisher.update(U, {"description": "other", "channels": None, "tags": {"a": 1}})
        wanted = {**v1, "description": "other", "tags": {"a": 1}}
        del wanted["channels"]
        self.assertEqual(self.stored(), wanted)
        self.publisher.update(U, {"public": False, "acl": [uuid_of(5)]})
        after = self.stored()
        self.assertEqual((after["v"], after["public"], after["acl"]), (2, False, [uuid_of(5)]))
        self.assertEqual(after["files"], v1["files"])
        self.assertNotIn("state", after)
        self.assertIsNone(self.problem())
        for field in ("v", "uuid", "files", "state"):
            with self.refused(422, "ValidationFailed", field):
                self.publisher.update(U, {field: None})
        with self.assertRaises((imgserver.ApiError, imgserver.UserError)):
            self.publisher.update(U, {"os": "beos"})
        self.assertEqual(self.stored(), after)

    def test_channels_are_those_of_the_configuration(self):
        self.config.channels = [{"name": "release", "default": True}, {"name": "dev"}]
        self.config.default_channel = "release"
        write_v2(self.serve_dir, U, channels=["dev"])
        with self.assertRaises((imgserver.ApiError, imgserver.UserError)):
            self.publisher.update(U, {"channels": ["other"]})
        self.assertEqual(self.stored()["channels"], ["dev"])
        self.assertEqual(self.publisher.update(U, {"channels": ["dev", "release"]})["channels"],
                         ["dev", "release"])
        self.publisher.update(U, {"channels": None})
        self.assertEqual(self.stored()["channels"], ["release"])

    def test_a_state_of_the_author_goes_with_activation(self):
        write_v2(self.serve_dir, U, state="unactivated")
        self.publisher.activate(U)
        self.assertNotIn("state", self.stored())

    def test_icons(self):
        for activated in (False, True):
            with self.subTest(activated=activated):
                self.publish(activated=activated)
                place = U if activated else ".incoming-" + U
                self.publisher.add_icon(U, "image/png", b"png")
                self.publisher.add_icon(U, "image/gif", b"gif")
                self.assertEqual(self.names(place), ["icon.gif", "manifest.json", "web-1.zfs.gz"])
                if not activated:
                    self.publisher.add_file(U, reader(IMAGE))
                    self.assertIn("icon.gif", self.names(place))
                self.publisher.remove_icon(U)
                with self.refused(404, "ResourceNotFound", "has no icon"):
                    self.publisher.remove_icon(U)
        with self.refused(400, "Upload", "content-type"):
            self.publisher.add_icon(U, "text/html", b"x")
        with self.refused(400, "Upload", "128 KiB"):
            self.publisher.add_icon(U, "image/png", bytes((128 << 10) + 1))

    def test_an_origin_is_not_deleted(self):
        with self.refused(422, "OriginDoesNotExist"):
            self.publish(V, origin=U)
        self.assertEqual(self.names(), [])
        self.publish()
        part = streams.stream(guid=77, from_guid=streams.GUID)
        for activated in (False, True):
            with self.subTest(activated=activated):
                self.publish(V, part, activated, origin=U)
                with self.refused(422, "ImageHasDependentImages", V):
                    self.publisher.delete(U)
                self.assertIsNone(self.problem())
        self.publisher.delete(U, force=True)
        self.publisher.delete(V)
        self.assertEqual(self.names(), [])

    def test_the_first_of_many_dependents_are_named(self):
        write_image(self.serve_dir, U)
        for number in range(10, 20):
            write_image(self.serve_dir, uuid_of(number), origin=U)
        with self.refused(422, "ImageHasDependentImages",
                          f"has 10 .*{uuid_of(14)}, and 5 more...$"):
            self.publisher.delete(U)


    def test_no_manifest_is_stored_that_is_too_large_to_be_read(self):
        write_v2(self.serve_dir, U)
        before = self.stored()
        tags = ["\xe9" * 128] * 2000       # 512 KB of UTF-8, but 1.5 MB of JSON in ASCII
        with self.refused(422, "ValidationFailed", "1048576"):
            self.publisher.update(U, {"billing_tags": tags})
        with self.refused(422, "ValidationFailed", "1048576"):
            self.publisher.create(self.manifest_of(V, billing_tags=tags))
        self.assertEqual((self.stored(), self.names()), (before, [U]))

    def test_no_set_uid_bit_goes_with_the_bytes_of_others(self):
        write_v2(self.serve_dir, U)
        path, elsewhere = os.path.join(self.serve_dir, U, "icon.png"), self.directory + "/file"
        for name in (path, elsewhere):
            open(name, "w").close()
            os.chmod(name, 0o6751)
        for mode in (0o751, 0o644):
            self.publisher.add_icon(U, "image/png", b"icon")
            self.assertEqual(stat.S_IMODE(os.lstat(path).st_mode), mode)
            os.unlink(path)
            os.symlink(elsewhere, path)

class TestStreams(VerbCase):

    def test_those_that_imgadm_cannot_install_are_refused(self):
        self.publish(V)
        two = streams.package(STREAM, streams.stream(guid=9, from_guid=streams.GUID))
        part = {"from_guid": streams.GUID, "guid": 77}
        lone, first = STREAM[:400], STREAM[400:]
        for name, data, fields, pattern in (
                ("no clone", streams.stream(**part, flags=0), {"origin": V},
                 "not that of a clone"),
                ("big-endian no clone", streams.stream(**part, flags=2, order=">"),
                 {"origin": V}, "not that of a clone"),
                ("several snapshots", two, {}, "several snapshots: send one, without -R or -I"),
                ("several of which the last is cut", two[:-624] + bytes(312) + two[-312:], {},
                 "end record is missing"),
                ("resuming", streams.stream(features=streams.RESUMING), {}, "interrupted"),
                ("xz padding of 3", streams.pack(STREAM, "xz") + bytes(3), {}, "multiple of 4"),
                ("xz behind padding of 5", lzma.compress(lone) + bytes(5) + lzma.compress(first),
                 {}, "multiple of 4"),
                ("gzip behind NULs", streams.pack(lone) + b"\0" + streams.pack(first), {},
                 "gzip would not unpack"),
                ("bzip2 behind NULs", bz2.compress(lone) + b"\0" + bz2.compress(first), {},
                 "bzip2 would not unpack"),
                ("a layer", STREAM, {"type": "docker"}, "the type is docker"),
                ("bytes behind the end", STREAM + b"\n\0x", {}, "end record is missing")):
            with self.subTest(name):
                with self.refused(400, "Upload", pattern):
                    self.publish(data=data, **fields)
                self.assertEqual(self.names(), [V])

    def test_those_that_it_takes_are_taken(self):
        self.publish(V)
        one, two = lzma.compress(STREAM[:400]), lzma.compress(STREAM[400:])
        many = dict(features=1 << 0 | 1 << 16 | 1 << 24)       # dedup, embedded data, raw
        part = streams.stream(from_guid=streams.GUID, guid=77)
        for name, data, fields in (
                ("a newline", STREAM + b"\n", {}), ("NULs", STREAM + bytes(10240), {}),
                ("NULs and more", STREAM + bytes(311) + b"\n" + bytes(313), {}),
                ("a package and NULs", streams.package(STREAM) + bytes(700), {}),
                ("a big-endian package and a newline",
                 streams.package(streams.stream(order=">"), order=">") + b"\n", {}),
                ("features", streams.stream(**many), {}),
                ("a clone", part, {"origin": V}),
                ("a clone in a package", streams.package(part), {"origin": V}),
                ("xz padding of 8", one + bytes(8) + two + bytes(4), {}),
                ("gzip and NULs", IMAGE + bytes(5), {}),
                ("gzip and a newline", IMAGE + b"\n", {}),
                ("bzip2, NULs and a newline", streams.pack(STREAM, "bzip2") + b"\0\0\n", {}),
                ("two members", bz2.compress(STREAM[:400]) + bz2.compress(STREAM[400:]), {}),
                ("a layer", b"a tarball", {"type": "docker"}),
                ("other", b"", {"type": "other"})):
            with self.subTest(name):
                self.publish(data=data or b"anything", **fields)
                self.assertIsNone(self.problem())
                self.publisher.delete(U)

    def test_padding_is_nothing_to_the_pipe_of_imgadm(self):
        for kind in ("gzip", "bzip2"):
            if not shutil.which(kind):
                self.skipTest(f"{kind} is missing")
            for padding in (b"\n", bytes(5) + b"\n"):
                run = subprocess.run([kind, "-cdfq"], input=streams.pack(STREAM, kind) + padding,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                with self.subTest(kind, padding=padding):
                    self.assertEqual((run.returncode, run.stderr), (0, b""))
                    self.assertEqual(run.stdout.rstrip(b"\0\n"), STREAM.rstrip(b"\0\n"))

    def test_pieces_of_any_size(self):
        for data in (streams.package(STREAM) + bytes(9), IMAGE, OTHER):
            for size in (1, 7, 311, 313):
                found = imgserver.FileScan()
                for at in range(0, len(data), size):
                    found.feed(data[at:at + size])
                found.finish()
                self.assertIsNone(found.stream.problem(), size)
                self.assertEqual(found.hashes()["sha1"], hashlib.sha1(data).hexdigest())

    def test_xz_above_the_memory_limit_says_so(self):
        for bits in (28, 29):
            data = lzma.compress(STREAM, filters=[
                {"id": lzma.FILTER_LZMA2, "dict_size": 1 << bits, "mode": lzma.MODE_FAST,
                 "mf": lzma.MF_HC3, "depth": 1, "nice_len": 3}])
            with self.subTest(bits=bits):
                with self.refused(400, "Upload", "needs more than 256 MiB to unpack"):
                    self.publish(data=data)


class TestFailures(VerbCase):
    """Each system call of each verb fails once; nothing is half, and no path is told."""

    CALLS = ("open", "mkdir", "rename", "fsync", "fchmod", "listdir", "stat", "fstat", "unlink",
             "utime", "fchown")

    def prepare(self, verb):
        """(call, check): the verb to run, and an assertion on what it leaves after a failure."""
        shutil.rmtree(self.serve_dir)
        os.mkdir(self.serve_dir)
        if verb == "import":
            return lambda: self.publish(), self.all_or_nothing
        self.publish(activated=verb not in ("add_file", "activate", "discard"))
        place = ".incoming-" if verb in ("add_file", "activate", "discard") else ""
        before = self.stored(place + U)

        def kept():
            self.assertIn(self.contents(place=place), (IMAGE, THIRD))
            self.assertIsNone(self.problem(place=place))
            self.assertEqual([name for name in self.names(place + U)
                              if name.startswith(".") and self.failing != "unlink"], [])
            self.assertEqual(self.stored(place + U)["name"], before["name"])

        def kept_or_gone():
            if self.problem(place=place) != "absent":
                kept()

        def kept_or_shown():
            self.assertIsNone(self.problem(place=".incoming-" if self.problem() == "absent"
                                           else ""))
        return {
            "add_file": (lambda: self.publisher.add_file(U, reader(THIRD)), kept),
            "activate": (lambda: self.publisher.activate(U), kept_or_shown),
            "update": (lambda: self.publisher.update(U, {"description": "other"}), kept),
            "disable": (lambda: self.publisher.disable(U), kept),
            "add_icon": (lambda: self.publisher.add_icon(U, "image/png", b"icon"), kept),
            "delete": (lambda: self.publisher.delete(U), kept_or_gone),
            "discard": (lambda: self.publisher.discard(U), kept_or_gone),
        }[verb]

    def all_or_nothing(self):
        self.assertEqual([name for name in self.names() if name.startswith(".incoming")], [])
        if U in self.names():
            self.assertIsNone(self.problem())
            self.assertEqual(self.contents(), IMAGE)

    def fail_once(self, verb, name, number):
        """Run a verb whose `number`th call of os.NAME fails; whether it came to that."""
        call, check = self.prepare(verb)
        self.failing = name
        real, count = getattr(os, name), 0

        def failing(*words, **places):
            nonlocal count
            count += 1
            if count == number:
                raise OSError(errno.EIO, "Input/output error", "/secret/path")
            return real(*words, **places)
        said = None
        with mock.patch.object(os, name, failing):
            try:
                call()
            except imgserver.ApiError as error:
                said = error
        if said is not None:
            self.assertIn(said.status, (404, 409, 422, 503), said.message)
            self.assertNotIn("/", said.message.replace("Input/output", ""))
            if U in self.names() and verb in ("import", "activate"):
                self.assertIn("on show, but not surely on disk", said.message)
        check()
        self.assertEqual([name for name in self.names() if name.startswith(".discarded")
                          and verb not in ("delete", "discard")], [])
        return count >= number

    def test_every_call_fails_once(self):
        for verb in ("import", "add_file", "activate", "update", "disable", "add_icon", "delete",
                     "discard"):
            for name in self.CALLS:
                number = 1
                while number < 60:
                    with self.subTest(verb=verb, call=name, number=number):
                        if not self.fail_once(verb, name, number):
                            break
                    number += 1

    def test_an_image_works_after_each_failure(self):
        for name in ("mkdir", "open", "rename", "fsync"):
            for number in range(1, 8):
                self.fail_once("import", name, number)
                if self.problem() == "absent":
                    self.publish()
                self.assertEqual(self.contents(), IMAGE)


class TestTwo(VerbCase):
    """Two threads, two processes."""

    def in_thread(self, call):
        result = []

        def run():
            try:
                call()
                result.append(None)
            except imgserver.ApiError as error:
                result.append(error)
        thread = threading.Thread(target=run)
        thread.start()
        return thread, result

    def stalled(self, data):
        """(read, begun, go on): a read that stops in the middle until it is told."""
        begun, on = threading.Event(), threading.Event()
        parts = [data[:50], data[50:], b""]

        def read(_):
            if len(parts) == 2:
                begun.set()
                on.wait(PATIENCE)
            return parts.pop(0)
        return read, begun, on

    def test_a_second_upload_and_an_activation_are_refused(self):
        self.publisher.create(self.manifest_of())
        read, begun, on = self.stalled(IMAGE)
        thread, result = self.in_thread(lambda: self.publisher.add_file(U, read))
        self.assertTrue(begun.wait(PATIENCE))
        with self.refused(409, "ImageUuidAlreadyExists"):
            self.publisher.add_file(U, reader(OTHER))
        with self.refused(409, "ImageUuidAlreadyExists"):
            self.publish()
        with self.refused(422, "NoActivationNoFile", "still being written"):
            self.publisher.activate(U)
        on.set()
        thread.join()
        self.assertEqual(result, [None])
        self.publisher.activate(U)
        self.assertEqual(self.contents(), IMAGE)

    def test_discarded_and_made_again_meanwhile(self):
        read, begun, on = self.stalled(IMAGE)
        thread, result = self.in_thread(
            lambda: self.publisher.import_image(self.manifest_of(), read))
        self.assertTrue(begun.wait(PATIENCE))
        self.publisher.discard(U)
        self.publish(data=OTHER, activated=False, name="second")
        on.set()
        thread.join()
        self.assertIn("was discarded", result[0].message)
        self.publisher.activate(U)
        self.assertEqual((self.contents(), self.stored()["name"]), (OTHER, "second"))

    def test_an_upload_removes_its_file_while_the_image_is_removed(self):
        self.publisher.create(self.manifest_of())
        real = os.unlink

        def unlink(path, **places):
            if os.path.basename(path) == "manifest.json":
                real(path, **places)
            real(path, **places)
        with mock.patch("os.unlink", unlink):
            self.publisher.discard(U)
        self.assertEqual(self.names(), [])

    def test_discarded_at_any_step(self):
        """Before the rename of a file in it: the disk is not at fault."""
        steps = ((lambda: self.publisher.create(self.manifest_of()), 1),
                 (lambda: self.publisher.add_file(U, reader(IMAGE)), 2),
                 (lambda: self.publisher.add_icon(U, "image/png", b"icon"), 1),
                 (lambda: self.publish(activated=False), 3))
        real = os.rename
        for call, renames in steps:
            for number in range(renames):
                with self.subTest(number=number):
                    if call is not steps[0][0]:
                        self.publisher.create(self.manifest_of())
                    left = [number]

                    def rename(old, new, **places):
                        if places:
                            left[0] -= 1
                            if left[0] < 0:
                                shutil.rmtree(os.path.join(self.serve_dir, ".incoming-" + U))
                        real(old, new, **places)
                    with mock.patch("os.rename", rename), \
                            self.refused(404, "ResourceNotFound", "was discarded"):
                        call()
                    self.assertEqual(self.names(), [])

    def test_another_directory_in_its_place_is_put_back(self):
        self.publish(activated=False)
        real = os.rename

        def swapped(old, new, **places):
            if new == os.path.join(self.serve_dir, U):
                real(old, os.path.join(self.directory, "checked"))
                shutil.copytree(os.path.join(self.directory, "checked"), old)
                os.unlink(os.path.join(old, "web-1.zfs.gz"))
            real(old, new, **places)
        with mock.patch("os.rename", swapped), self.refused(409, "ImageUuidAlreadyExists"):
            self.publisher.activate(U)
        self.assertEqual(self.names(), [".incoming-" + U])

    def test_a_third_one_in_its_place_stays_and_nothing_unfinished_is_shown(self):
        self.publish(activated=False)
        real = os.rename

        def swapped(old, new, **places):
            if new == os.path.join(self.serve_dir, U):
                real(old, os.path.join(self.directory, "checked"))
                os.mkdir(old)
                open(os.path.join(old, "second"), "w").close()
                real(old, new, **places)
                os.mkdir(old)
                open(os.path.join(old, "third"), "w").close()
            else:
                real(old, new, **places)
        with mock.patch("os.rename", swapped), self.refused(409, "ImageUuidAlreadyExists"):
            self.publisher.activate(U)
        self.assertNotIn(U, self.names())
        self.assertEqual(self.names(".incoming-" + U), ["third"])

    def test_another_directory_is_not_removed_in_its_place(self):
        """Between the lock and the rename of delete, or of what takes a leftover away."""
        for call in (lambda: self.publisher.delete(U), lambda: self.publish(activated=False)):
            with self.subTest():
                self.publisher.create(self.manifest_of())
                real, path = os.rename, os.path.join(self.serve_dir, ".incoming-" + U)

                def swapped(old, new, **places):
                    if old == path and not os.path.exists(os.path.join(path, "second")):
                        shutil.rmtree(path)
                        os.mkdir(path)
                        open(os.path.join(path, "second"), "w").close()
                    real(old, new, **places)
                with mock.patch("os.rename", swapped), \
                        self.refused(409, "ImageUuidAlreadyExists"):
                    call()
                self.assertEqual(self.names(".incoming-" + U), ["second"])

    def test_what_is_no_directory_in_its_place(self):
        os.mkdir(os.path.join(self.directory, "elsewhere"))
        path = os.path.join(self.serve_dir, ".incoming-" + U)
        for make in (lambda: os.symlink("/nowhere", path), lambda: open(path, "w").close(),
                     lambda: os.symlink(os.path.join(self.directory, "elsewhere"), path)):
            make()
            self.publish(activated=False)
            self.assertEqual(self.names(), [".incoming-" + U])
            self.publisher.discard(U)
            make()
            self.publisher.discard(U)
            self.assertEqual(self.names(), [])
        self.assertTrue(os.path.isdir(os.path.join(self.directory, "elsewhere")))

    def test_an_image_behind_a_symlink_is_deleted(self):
        write_v2(self.directory, U)
        os.symlink(os.path.join(self.directory, U), os.path.join(self.serve_dir, U))
        self.publisher.delete(U)
        self.assertEqual(self.names(), [])
        self.assertTrue(os.path.exists(os.path.join(self.directory, U, "manifest.json")))

    def test_without_locks_a_whole_image_comes_out(self):
        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")
        with mock.patch("fcntl.flock", refuse):
            self.publisher.create(self.manifest_of())
            read, begun, on = self.stalled(IMAGE)
            thread, result = self.in_thread(lambda: self.publisher.add_file(U, read))
            self.assertTrue(begun.wait(PATIENCE))
            self.publisher.add_file(U, reader(OTHER))
            self.assertEqual(self.contents(place=".incoming-"), OTHER)
            on.set()
            thread.join()
            self.assertIn(self.contents(place=".incoming-"), (IMAGE, OTHER))
            self.publisher.activate(U)
        self.assertIsNone(self.problem())

    def test_as_many_xz_files_are_unpacked_as_memory_is_for(self):
        made, real = [], imgserver.member_decompressor

        def counted(kind):
            made.append(kind)
            return real(kind)
        with mock.patch.object(imgserver, "XZ_AT_ONCE", 2), \
                mock.patch.object(imgserver, "member_decompressor", counted):
            publisher = imgserver.Publisher(self.config)
            runs = []
            for uuid in (U, V):
                read, begun, on = self.stalled(OTHER)
                runs.append((on, *self.in_thread(
                    lambda uuid=uuid, read=read: publisher.import_image(
                        self.manifest_of(uuid), read))))
                self.assertTrue(begun.wait(PATIENCE))
            for _ in range(2):
                with self.refused(503, "ServiceUnavailableError", "2 xz files"):
                    publisher.import_image(self.manifest_of(uuid_of(3)), reader(OTHER))
            publisher.import_image(self.manifest_of(uuid_of(4)), reader(IMAGE))
            self.assertEqual(made.count("xz"), 2)
            for on, thread, result in runs:
                on.set()
                thread.join()
                self.assertEqual(result, [None])
            for data in (OTHER[:-9], OTHER[:-9], OTHER[:-9], OTHER):      # a failure ends, too
                with contextlib.suppress(imgserver.ApiError):
                    publisher.import_image(self.manifest_of(uuid_of(3)), reader(data))
        self.assertEqual(self.names(), [U, V, uuid_of(3), uuid_of(4)])

    def test_many_threads_change_one_image(self):
        write_v2(self.serve_dir, U)
        calls = [lambda n=n: self.publisher.update(U, {"tags": {"n": n}}) for n in range(8)]
        runs = [self.in_thread(call) for call in calls]
        runs.append(self.in_thread(lambda: self.publisher.disable(U)))
        for thread, _ in runs:
            thread.join()
        self.assertEqual([result for _, result in runs], [[None]] * 9)
        self.assertIn(self.stored()["tags"]["n"], range(8))
        self.assertIs(self.stored()["disabled"], True)

    def test_a_process_that_was_killed_keeps_nothing_locked(self):
        process = subprocess.Popen([sys.executable, "-c", f"""if True:
            import sys, time
            sys.path.insert(0, {ROOT!r})
            import imgserver
            config = imgserver.Config()
            config.serve_dir = {self.serve_dir!r}
            def read(_):
                print("reading", flush=True)
                time.sleep(3600)
            imgserver.Publisher(config).import_image({self.manifest_of()!r}, read)
            """], stdout=subprocess.PIPE)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.kill)
        self.assertEqual(process.stdout.readline(), b"reading\n")
        with self.refused(409, "ImageUuidAlreadyExists"):
            self.publish()
        process.kill()
        process.wait()
        self.publish()
        self.assertEqual((self.names(), self.contents()), ([U], IMAGE))


class TestCheck(VerbCase):
    """check, on images that the verbs made."""

    def run_check(self, *words):
        result = run_program("check", "--dir", self.serve_dir, *words, encoding="utf-8")
        return result.returncode, result.stdout.splitlines()

    def test_quiet_says_nothing_when_all_is_well(self):
        self.publish()
        self.publish(V, activated=False)
        self.assertEqual(self.run_check("-q"), (0, []))
        write_image(self.serve_dir, uuid_of(3), IMAGE[:-1])
        status, lines = self.run_check("-q")
        self.assertEqual((status, len(lines)), (1, 2))
        self.assertRegex(lines[0], f"^{uuid_of(3)} test 1.0.0: .*cut short")

    def test_a_missing_origin_is_named(self):
        write_image(self.serve_dir, U, streams.stream(), origin=V)
        for words in ((), ("--fast",)):
            status, lines = self.run_check(*words)
            self.assertEqual(status, 1)
            self.assertEqual(lines[0], f"{U} test 1.0.0: imgadm cannot import it until image {V} "
                                       f"is on this server, too: imgserver.py mirror URL {V}")

    def test_fast_reads_the_first_bytes_alone(self):
        big = streams.pack(streams.stream(streams.noise(3 << 20)))
        write_image(self.serve_dir, U, big)
        write_image(self.serve_dir, V, big[:-9] + b"123456789", files=[
            {"path": "image.zfs.gz", "size": len(big), "sha1": "0" * 40}])
        self.assertEqual(self.run_check("--fast"), (0, ["2 of 2 images are sound"]))
        write_image(self.serve_dir, V, streams.pack(streams.stream(from_guid=7, flags=0)))
        write_image(self.serve_dir, uuid_of(3), STREAM, type="docker")
        write_image(self.serve_dir, uuid_of(4), b"x" * 5)
        status, lines = self.run_check("--fast")
        self.assertEqual((status, lines[-1]), (1, "1 of 4 images are sound"))
        for line, pattern in zip(lines, ("not that of a clone", "the type is docker",
                                         "no ZFS send stream")):
            self.assertRegex(line, pattern)

    def test_directories_that_are_passed_over_are_named(self):
        manifest = write_image(self.serve_dir, U, IMAGE)
        for name in (uuid_of(10).upper(), V):
            shutil.copytree(os.path.join(self.serve_dir, U), os.path.join(self.serve_dir, name))
        os.rename(os.path.join(self.serve_dir, V, "manifest.json"),
                  os.path.join(self.serve_dir, V, "x.imgmanifest"))
        status, lines = self.run_check()
        self.assertEqual((status, lines), (1, [
            f"{V}: its manifest must be named manifest.json, not x.imgmanifest",
            f"{uuid_of(10).upper()} test 1.0.0: its directory must have a UUID in lower case as "
            "name", "1 of 3 images are sound"]), manifest)

    def test_several_snapshots_are_named(self):
        write_image(self.serve_dir, U, streams.package(STREAM, streams.stream(guid=9)))
        self.assertRegex(self.run_check()[1][0], "several snapshots")

    def test_record_writes_the_missing_facts(self):
        write_v2(self.serve_dir, U, IMAGE, files=[{"path": "image.zfs.gz",
                                                   "compression": "gzip"}])
        self.assertEqual(self.run_check("--record"), (0, ["1 of 1 images are sound"]))
        self.assertEqual(self.contents(), IMAGE)
        self.assertEqual(self.stored()["files"][0]["md5"], hashlib.md5(IMAGE).hexdigest())

    def test_clean_takes_what_killed_commands_left(self):
        self.publish()
        then = time.time() - 25 * 3600
        for name in (".manifest.json.4711", ".file.00ff", ".icon.png.ab", "..upstream.json.0a",
                     ".upstream.json", ".notes", ".manifest.json~"):
            path = os.path.join(self.serve_dir, U, name)
            with open(path, "wb"):
                pass
            os.utime(path, (then, then))
        with open(os.path.join(self.serve_dir, U, ".manifest.json.12"), "wb"):
            pass
        self.publisher.create(self.manifest_of(V))
        for path in (".incoming-" + V, f".incoming-{V}/manifest.json"):
            os.utime(os.path.join(self.serve_dir, path), (then, then))
        os.mkdir(os.path.join(self.serve_dir, ".discarded-" + V + ".12"))
        status, lines = self.run_check("--clean")
        self.assertEqual(status, 0)
        self.assertIn(": removed", lines[0])
        self.assertEqual(self.names(), [U])
        self.assertEqual(self.names(U), [".manifest.json.12", ".manifest.json~", ".notes",
                                         ".upstream.json", "manifest.json", "web-1.zfs.gz"])

    def test_no_sha256_is_served(self):
        self.publish()
        image = imgserver.ImageReader(self.config).read(
            U, os.path.join(self.serve_dir, ""), (imgserver.DSAPI, imgserver.IMGAPI))
        self.assertNotIn(b"sha256", b"".join(map(bytes, image.dsapi + image.imgapi)))
        write_manifest(self.serve_dir, U, self.stored())


if __name__ == "__main__":
    unittest.main()
