"""Publishing where it meets what is on the server already: origins, activation, checks."""

import contextlib
import hashlib
import json
import os
import re
import unittest

import imgserver
from tests import streams
from tests.support import ServerCase, run_program, uuid_of, write_image, write_manifest

U = uuid_of(1)
DATA = streams.pack(streams.stream())


class PublishCase(ServerCase):

    def run_command(self, *words, data=b"", prelude=None):
        """Run imgserver.py on this serve_dir; returns (status, stdout, stderr)."""
        result = run_program("--dir", self.serve_dir, *words, prelude=prelude, data=data)
        return result.returncode, result.stdout.decode().strip(), result.stderr.decode().strip()

    def stored(self, uuid):
        with open(os.path.join(self.serve_dir, uuid, "manifest.json"), "rb") as file:
            return json.load(file)

    def import_pair(self, file, **fields):
        """Import DATA with a v2 manifest of which files[0] is `file`."""
        manifest = {"v": 2, "uuid": U, "name": "pair", "version": "1", "type": "zone-dataset",
                    "os": "smartos", "files": [file], **fields}
        path = os.path.join(self.directory, "pair.json")
        with open(path, "w") as out:
            json.dump(manifest, out)
        return self.run_command("import", "--manifest", path, data=DATA)


class Order(PublishCase):

    def test_what_is_on_disk_before_it_is_on_show(self):
        done = os.path.join(self.directory, "done")
        status, uuid, _ = self.run_command("import", "web", "1", "Web", data=DATA, prelude=f"""
import os, stat
fsync, rename = os.fsync, os.rename
def note(*words):
    with open({done!r}, "a") as file:
        print(*words, file=file)
def synced(fd):
    is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
    name = os.path.basename(os.readlink(f"/proc/self/fd/{{fd}}"))
    note("sync", "directory" if is_directory else name)
    fsync(fd)
def renamed(old, new, **places):
    note("rename", os.path.basename(new))
    rename(old, new, **places)
os.fsync, os.rename = synced, renamed
""")
        self.assertEqual(status, 0)
        with open(done) as file:
            lines = [re.sub(r"\.[0-9a-f]+$", "", line) for line in file.read().splitlines()]
        self.assertEqual(lines, [
            "sync .manifest.json", "rename manifest.json", "sync directory",
            "sync .file", "rename web-1.zfs.gz", "sync .manifest.json", "rename manifest.json",
            "sync directory", f"rename {uuid}", "sync directory"])


class Activation(PublishCase):

    def setUp(self):
        super().setUp()
        status, self.uuid, _ = self.run_command("import", "-n", "web", "1", "Web", data=DATA)
        self.assertEqual(status, 0)
        self.path = os.path.join(self.serve_dir, ".incoming-" + self.uuid)

    def test_what_lost_its_file_is_not_activated(self):
        name = self.stored(".incoming-" + self.uuid)["files"][0]["path"]
        os.unlink(os.path.join(self.path, name))
        status, _, message = self.run_command("activate", self.uuid)
        self.assertEqual(status, 1)
        self.assertIn("cannot be activated", message)
        self.assertTrue(os.path.isdir(self.path))

    def test_an_empty_manifest_is_not_activated(self):
        os.truncate(os.path.join(self.path, "manifest.json"), 0)
        self.assertEqual(self.run_command("activate", self.uuid)[0], 1)

    def test_what_is_being_discarded_cannot_be_activated(self):
        killed = "imgserver.shutil.rmtree = lambda *_, **__: imgserver.os._exit(9)"
        self.assertEqual(self.run_command("discard", self.uuid, prelude=killed)[0], 9)
        self.assertEqual(self.run_command("activate", self.uuid)[0], 1)
        self.assertEqual(len(os.listdir(self.serve_dir)), 1)
        self.assertEqual(self.run_command("check", "--clean")[0], 0)
        self.assertEqual(os.listdir(self.serve_dir), [])


class Pairs(PublishCase):
    """--manifest and the data it comes with."""

    GOOD = {"size": len(DATA), "sha1": hashlib.sha1(DATA).hexdigest(), "compression": "gzip"}

    def test_what_the_server_mends_is_taken(self):
        for change in ({"size": str(len(DATA))}, {"sha1": self.GOOD["sha1"].upper()},
                       {"compression": ""}):
            with self.subTest(change):
                status, uuid, message = self.import_pair({**self.GOOD, **change})
                self.assertEqual((status, uuid), (0, U), message)
                file = self.stored(U)["files"][0]
                self.assertEqual({key: file[key] for key in self.GOOD}, self.GOOD)
                self.assertEqual(file["dataset_guid"], str(streams.GUID))
                os.rename(os.path.join(self.serve_dir, U),
                          os.path.join(self.directory, str(change)))

    def test_another_dataset_guid_is_refused(self):
        status, _, message = self.import_pair({**self.GOOD, "dataset_guid": "999"})
        self.assertEqual(status, 1)
        self.assertIn("its dataset_guid is", message)
        self.assertEqual(os.listdir(self.serve_dir), [])


class Origins(PublishCase):
    """An origin whose manifest does not say its guid, as the original server's."""

    def import_on(self, from_guid):
        write_image(self.serve_dir, U, DATA)
        data = streams.pack(streams.stream(from_guid=from_guid, guid=77))
        return self.run_command("import", "--origin", U, "web", "2", "Web", data=data)

    def test_the_guid_is_read_from_its_file(self):
        status, _, message = self.import_on(streams.GUID)
        self.assertEqual(status, 0, message)

    def test_a_stream_on_top_of_another_is_refused(self):
        status, _, message = self.import_on(streams.GUID + 1)
        self.assertEqual(status, 1)
        self.assertIn("does not build on", message)


class Checks(PublishCase):

    def test_a_wrong_compression_in_the_manifest_is_found(self):
        manifest = write_image(self.serve_dir, U, DATA)
        manifest["files"][0]["compression"] = "xz"
        write_manifest(self.serve_dir, U, manifest)
        status, lines, _ = self.run_command("check")
        self.assertEqual(status, 1)
        self.assertIn("its compression is gzip, not xz", lines)

    def test_no_md5_is_recorded_beside_another_sha1(self):
        manifest = write_image(self.serve_dir, U, DATA)
        found = imgserver.FileScan()
        with open(os.path.join(self.serve_dir, U, "image.zfs.gz"), "rb") as file:
            found.feed(file.read())
        for spoilt in ({**manifest, "files": [{**manifest["files"][0], "sha1": "0" * 40}]},
                       b"not JSON any more", {"files": 5}):
            with self.subTest(spoilt):
                write_manifest(self.serve_dir, U, spoilt)
                with contextlib.suppress(imgserver.ApiError):
                    imgserver.record_facts(imgserver.Config({"serve_dir": self.serve_dir}), U,
                                           found)
                path = os.path.join(self.serve_dir, U, "manifest.json")
                with open(path, "rb") as file:
                    self.assertNotRegex(file.read(), b"md5|sha256")


class Streams(unittest.TestCase):

    def test_a_begin_of_an_unknown_kind_is_the_last_word(self):
        stream = imgserver.SendStream()
        stream.feed(streams.stream(kind=1))
        stream.feed(streams.stream())
        self.assertIsNone(stream.type)
        self.assertIn("no ZFS send stream", stream.problem())


class Smf(PublishCase):

    def test_the_options_are_those_of_the_service(self):
        status, text, _ = self.run_command("--listen", "8080", "smf", "--user", "nobody")
        self.assertEqual(status, 0)
        self.assertIn(f"--dir {self.serve_dir} --listen 8080", text)
        self.assertNotIn("net_privaddr", text)


if __name__ == "__main__":
    unittest.main()
