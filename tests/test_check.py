"""imgserver.py check: sound images are counted, each bad one is told, what is abandoned goes."""

import base64
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

from tests import streams
from tests.support import (IMGSERVER, PATIENCE, ROOT, ServerCase, run_program, uuid_of,
                           wait_for, write_image, write_v2)

IMAGE = streams.pack(streams.stream())
DAY = 24 * 3600
# What is imported late comes first: this Python may be where only root can read.
NOT_ROOT = ("import os, gzip, locale; "
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)")


class CheckCase(ServerCase):

    def check(self, *words, prelude=None):
        """Run it; returns (exit status, lines)."""
        result = run_program("check", "--dir", self.serve_dir, *words, prelude=prelude,
                             encoding="utf-8")
        self.assertEqual(result.stderr, "")
        return result.returncode, result.stdout.splitlines()

    def path(self, uuid, name):
        return os.path.join(self.serve_dir, uuid, name)


class TestCheck(CheckCase):

    def test_sound_images_are_counted(self):
        write_image(self.serve_dir, uuid_of(1), IMAGE)
        write_v2(self.serve_dir, uuid_of(2), IMAGE)
        write_image(self.serve_dir, uuid_of(3), b"a tarball", type="lx-dataset")
        self.assertEqual(self.check(), (0, ["3 of 3 images are sound"]))
        self.assertEqual(self.check(uuid_of(2)), (0, ["1 of 1 images are sound"]))

    def test_an_empty_directory(self):
        self.assertEqual(self.check(), (0, ["0 of 0 images are sound: there is none in "
                                            + self.serve_dir]))

    def test_options_before_the_command(self):
        write_image(self.serve_dir, uuid_of(1), IMAGE)
        result = run_program("--dir", self.serve_dir, "check", encoding="utf-8")
        self.assertEqual(result.stdout, "1 of 1 images are sound\n")

    def test_each_fault_is_a_line(self):
        other = streams.pack(streams.stream(b"other bytes"))
        cut = streams.pack(streams.stream()[:-312])
        wrong = {"path": "image.zfs.gz", "size": len(IMAGE), "sha1": "0" * 40}
        md5 = {**wrong, "sha1": hashlib.sha1(IMAGE).hexdigest(), "md5": "0" * 32}
        size = {**wrong, "size": 5}
        broken = IMAGE[:-8] + bytes(8)           # without its CRC
        cases = (
            (IMAGE, {"files": [wrong]}, "its sha1 is"),
            (IMAGE, {"files": [md5]}, "its md5 is"),
            (IMAGE, {"files": [size]}, "size|5"),
            (IMAGE, {"files": []}, "files"),
            (IMAGE, {"name": ["a"]}, "name"),
            (cut, {}, "end record is missing"),
            (other[:-9], {}, "cut short"),
            (broken, {}, "corrupt"),
            (b"a text", {}, "no ZFS send stream"),
        )
        write_image(self.serve_dir, uuid_of(99), IMAGE)
        for number, (data, fields, _) in enumerate(cases):
            write_image(self.serve_dir, uuid_of(number), data, **fields)
        status, lines = self.check()
        self.assertEqual(status, 1)
        self.assertEqual(lines[-1], f"1 of {len(cases) + 1} images are sound")
        self.assertEqual(len(lines), len(cases) + 1)
        for number, (_, _, pattern) in enumerate(cases):
            with self.subTest(pattern=pattern):
                self.assertRegex(lines[number],
                                 f"^{uuid_of(number)} .* 1.0.0: .*({pattern})")

    def test_an_origin_is_missed_in_the_words_of_list(self):
        """Of an image with an incremental stream, too, and never behind the name of its file."""
        data = streams.pack(streams.stream(from_guid=5))
        write_v2(self.serve_dir, uuid_of(1), data, origin=uuid_of(9))
        write_v2(self.serve_dir, uuid_of(2), IMAGE, origin=uuid_of(9))
        write_v2(self.serve_dir, uuid_of(3), IMAGE, origin=uuid_of(4))
        write_v2(self.serve_dir, uuid_of(4), IMAGE, origin=uuid_of(3))
        mirror = (f"imgadm cannot import it until image {uuid_of(9)} is on this server, too: "
                  f"imgserver.py mirror URL {uuid_of(9)}")
        sentences = [f"{uuid_of(1)} test 2.0.0: {mirror}", f"{uuid_of(2)} test 2.0.0: {mirror}"]
        cycles = [f"{uuid_of(number)} test 2.0.0{{}}: its origins form a cycle"
                  for number in (3, 4)]
        for words in ((), ("--fast",)):
            status, lines = self.check(*words)
            self.assertEqual((status, lines), (1, [
                *sentences, *(line.format("") for line in cycles), "0 of 4 images are sound"]))
        listed = run_program("list", "--problems", "--dir", self.serve_dir, text=True)
        self.assertEqual(listed.stdout.splitlines(), [
            *(line.format(" is left out") for line in cycles), *sentences])

    def test_one_flipped_bit(self):
        write_image(self.serve_dir, uuid_of(1), IMAGE)
        with open(self.path(uuid_of(1), "image.zfs.gz"), "r+b") as file:
            file.seek(4)                          # the time stamp of gzip: nothing else sees it
            file.write(b"\1")
        status, lines = self.check()
        self.assertEqual(status, 1)
        self.assertIn("its sha1 is", lines[0])

    def test_an_image_that_is_not_there(self):
        status, lines = self.check(uuid_of(1))
        self.assertEqual((status, lines[1]), (1, "0 of 1 images are sound"))
        self.assertEqual(lines[0], f"{uuid_of(1)}: no such image")
        os.mkdir(os.path.join(self.serve_dir, uuid_of(1)))
        self.assertEqual(self.check(uuid_of(1))[1][0],
                         f"{uuid_of(1)}: there is no manifest.json")

    def test_what_is_no_uuid(self):
        result = run_program("check", "--dir", self.serve_dir, "../x", encoding="utf-8")
        self.assertEqual((result.returncode, result.stdout), (2, ""))
        self.assertRegex(result.stderr, r"\A[^\n]+is not a UUID[^\n]+\n\Z")

    def test_a_terminal_escape_in_a_manifest_is_not_passed_on(self):
        write_image(self.serve_dir, uuid_of(1), IMAGE, files=[
            {"path": "image.zfs.gz", "sha1": "0" * 40, "size": "\x1b[2J"}])
        _, lines = self.check()
        self.assertIn(r"\x1b[2J", lines[0])
        self.assertTrue(all(line.isprintable() for line in lines))

    def test_a_reader_that_does_not_read_keeps_no_signal_away(self):
        write_image(self.serve_dir, uuid_of(1), b"a text")
        looked = os.path.join(self.directory, "looked")
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        os.set_blocking(writer, True)
        process = subprocess.Popen(
            [sys.executable, "-c", "import sys; import imgserver\n"
             "def check(*_):\n"
             f"    open({looked!r}, 'w').close()\n"
             "    raise imgserver.BadImage('bad')\n"
             "imgserver.check_image = check\n"
             "sys.exit(imgserver.main())", "check", "--dir", self.serve_dir],
            stdout=writer, stderr=subprocess.PIPE, cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": ""})       # the line is in Python's buffer
        os.close(writer)
        self.addCleanup(process.stderr.close)
        wait_for(lambda: os.path.exists(looked), "the check")
        process.terminate()
        self.assertEqual(process.wait(PATIENCE), 128 + signal.SIGTERM)
        self.assertIn(b"ended by SIGTERM", process.stderr.read())


class TestIncoming(CheckCase):

    def incoming(self, number, age, whole=False):
        """An image that is not active, last changed `age` seconds ago."""
        path = os.path.join(self.serve_dir, ".incoming-" + uuid_of(number))
        if whole:
            write_image(self.serve_dir, uuid_of(number), IMAGE)
            os.rename(os.path.join(self.serve_dir, uuid_of(number)), path)
        else:
            os.mkdir(path)
            with open(os.path.join(path, ".file.ab12"), "wb") as file:
                file.write(b"a beginning")
        then = time.time() - age
        for name in [*os.listdir(path), ""]:
            os.utime(os.path.join(path, name), (then, then))
        return path

    def test_what_is_not_active_is_listed(self):
        self.incoming(1, 0)
        self.incoming(2, 3 * DAY)
        self.incoming(3, 3 * DAY, whole=True)
        status, lines = self.check()
        self.assertEqual(status, 0)
        for number, text in ((1, "is not whole"), (2, "is not whole"),
                             (3, "waits to be activated")):
            self.assertRegex(lines[number - 1], f"^{uuid_of(number)}.*: {text}")
        self.assertEqual(len(os.listdir(self.serve_dir)), 3)

    def test_a_leftover_is_not_named_as_the_image_that_is_active(self):
        self.incoming(1, 3 * DAY, whole=True)
        write_image(self.serve_dir, uuid_of(1), IMAGE)
        self.assertEqual(self.check(), (0, [
            f".incoming-{uuid_of(1)}: is not whole (an image of this uuid is active), last change "
            "72 hours ago: imgserver.py check --clean", "1 of 1 images are sound"]))

    def test_clean_takes_the_abandoned_alone(self):
        young = self.incoming(1, DAY - 600)
        old = self.incoming(2, DAY + 600)
        waiting = self.incoming(3, 9 * DAY, whole=True)
        growing = self.incoming(4, 2 * DAY)
        os.utime(os.path.join(growing, ".file.ab12"))  # only its file changes while one is written
        os.mkdir(os.path.join(self.serve_dir, ".incoming-notes"))
        write_image(self.serve_dir, uuid_of(5), IMAGE)
        status, lines = self.check("--clean")
        self.assertEqual(status, 0)
        self.assertFalse(os.path.exists(old))
        for path in (young, waiting, growing):
            self.assertTrue(os.path.exists(path), path)
        self.assertEqual(sorted(os.listdir(self.serve_dir)), sorted(
            [".incoming-" + uuid_of(n) for n in (1, 3, 4)] + [".incoming-notes", uuid_of(5)]))
        self.assertIn("1 of 1 images are sound", lines)

    def test_odd_things_in_its_place(self):
        os.symlink("nowhere", os.path.join(self.serve_dir, ".incoming-" + uuid_of(1)))
        with open(os.path.join(self.serve_dir, ".incoming-" + uuid_of(2)), "wb"):
            pass
        status, lines = self.check("--clean")
        self.assertEqual(status, 0)
        self.assertTrue(lines[-1].startswith("0 of 0 images are sound"), lines)


class TestRecord(CheckCase):

    def manifest(self, uuid):
        with open(self.path(uuid, "manifest.json"), encoding="utf-8") as file:
            return json.load(file)

    def test_md5_is_written_once_and_served(self):
        before = write_image(self.serve_dir, uuid_of(1), IMAGE, note="\u00e9")
        write_v2(self.serve_dir, uuid_of(2), IMAGE)
        self.assertEqual(self.check("--record")[0], 0)
        md5 = hashlib.md5(IMAGE)
        for number in (1, 2):
            self.assertEqual(self.manifest(uuid_of(number))["files"][0]["md5"], md5.hexdigest())
        after = self.manifest(uuid_of(1))
        self.assertEqual(after["files"][0].pop("md5_of"), hashlib.sha1(IMAGE).hexdigest())
        del after["files"][0]["md5"]
        self.assertEqual(after["files"][0].pop("sha256"), hashlib.sha256(IMAGE).hexdigest())
        self.assertEqual(after, before)
        status = os.stat(self.path(uuid_of(1), "manifest.json"))
        self.assertEqual(status.st_mode & 0o777, 0o644)
        self.assertEqual(self.check("--record")[0], 0)
        again = os.stat(self.path(uuid_of(1), "manifest.json"))
        self.assertEqual((status.st_ino, status.st_mtime_ns), (again.st_ino, again.st_mtime_ns))
        self.assertEqual(sorted(os.listdir(os.path.join(self.serve_dir, uuid_of(1)))),
                         ["image.zfs.gz", "manifest.json"])
        answer = self.serve().head(f"/images/{uuid_of(2)}/file")
        self.assertEqual(answer.headers["content-md5"], base64.b64encode(md5.digest()).decode())

    def test_what_is_shown_stays_the_same(self):
        write_v2(self.serve_dir, uuid_of(1), IMAGE)       # without published_at: its time counts
        manifest = self.path(uuid_of(1), "manifest.json")
        os.utime(manifest, (1e9, 1e9))
        self.assertEqual(self.check("--record")[0], 0)
        self.assertIn("md5", self.manifest(uuid_of(1))["files"][0])
        image = self.serve().get(f"/images/{uuid_of(1)}").json()
        self.assertEqual(image["published_at"], "2001-09-09T01:46:40Z")

    def test_owner_and_symlink_stay(self):
        write_v2(self.serve_dir, uuid_of(1), IMAGE)
        manifest = self.path(uuid_of(1), "manifest.json")
        aside = os.path.join(self.directory, "manifest.json")
        os.rename(manifest, aside)
        os.symlink(aside, manifest)
        owner = (65534, 65533) if os.getuid() == 0 else (os.getuid(), os.getgid())
        os.chown(aside, *owner)
        os.chmod(aside, 0o640)
        self.assertEqual(self.check("--record")[0], 0)
        self.assertIn("md5", self.manifest(uuid_of(1))["files"][0])
        self.assertTrue(os.path.islink(manifest))
        status = os.stat(aside)
        self.assertEqual((status.st_uid, status.st_gid, status.st_mode & 0o777), (*owner, 0o640))

    def test_owner_of_what_is_not_ours(self):
        if os.getuid() != 0:
            self.skipTest("only root can give a file away")
        config = os.path.join(self.directory, "config.json")     # that of the checkout may be
        with open(config, "w") as file:                          # where only root can read
            file.write("{}")
        for mode, status in ((0o644, 0), (0o640, 1)):
            with self.subTest(mode=oct(mode)):
                write_v2(self.serve_dir, uuid_of(1), IMAGE)
                manifest = self.path(uuid_of(1), "manifest.json")
                os.chown(manifest, 0, 65534)
                os.chmod(manifest, mode)
                for path in (self.directory, self.serve_dir, os.path.dirname(manifest)):
                    os.chown(path, 65534, 65534)
                self.assertEqual(self.check("--record", "--config", config,
                                            prelude=NOT_ROOT)[0], status)
                self.assertEqual(os.stat(manifest).st_uid, 0 if status else 65534)

    def test_one_that_cannot_be_written_does_not_end_it(self):
        for number in (1, 2):
            write_image(self.serve_dir, uuid_of(number), IMAGE)
        write_image(self.serve_dir, uuid_of(3), b"a text")
        result = subprocess.run(
            ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", sys.executable, IMGSERVER, "check",
             "--record", "--dir", self.serve_dir],
            stdout=subprocess.PIPE, encoding="utf-8", timeout=PATIENCE)
        lines = result.stdout.splitlines()
        self.assertEqual((result.returncode, len(lines)), (1, 4), lines)
        for number, pattern in ((1, "cannot write"), (2, "cannot write"), (3, "no ZFS")):
            self.assertRegex(lines[number - 1], f"^{uuid_of(number)} test 1.0.0: .*{pattern}")

    def test_a_bad_image_gets_none(self):
        write_image(self.serve_dir, uuid_of(1), IMAGE[:-9])
        self.assertEqual(self.check("--record")[0], 1)
        self.assertNotIn("md5", self.manifest(uuid_of(1))["files"][0])

    def test_without_it_nothing_is_written(self):
        write_image(self.serve_dir, uuid_of(1), IMAGE)
        before = os.stat(self.path(uuid_of(1), "manifest.json")).st_mtime_ns
        self.check()
        self.assertEqual(os.stat(self.path(uuid_of(1), "manifest.json")).st_mtime_ns, before)
