"""Images as other tools leave them: which are shown, how, and what the log says of the others."""

import base64
import errno
import hashlib
import os
import re
import shutil
import threading
import unittest
from unittest import mock

from tests import imgadm, streams, support
from tests.samples import SAMPLES
from tests.support import PATIENCE, uuid_of, wait_for, write_image, write_manifest, write_v2

import imgserver

SOURCE = {"Accept": "application/json"}        # as imgadm 2 and later ask a DSAPI source
COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".zfs": "none"}


def manifest_of(text, uuid, data):
    """The bytes of a sample's manifest for an image file with these bytes."""
    for sign, value in (("@UUID@", uuid), ("@SIZE@", str(len(data))),
                        ("@SHA1@", hashlib.sha1(data).hexdigest()),
                        ("@MD5@", hashlib.md5(data).hexdigest()),
                        ("@CJK@", r"\u4e2d" * 17000)):
        text = text.replace(sign, value)
    return text.encode()


def stream_of(name, text):
    kind = streams.ZVOL if '"type": "zvol"' in text else streams.FILE_SYSTEM
    return streams.pack(streams.stream(kind=kind), COMPRESSIONS[os.path.splitext(name)[1]])


class Samples(support.ServerCase):

    def test_served(self):
        for number, (name, file, _, _, text, *_) in enumerate(SAMPLES, 1):
            uuid, data = uuid_of(number), stream_of(file, text)
            write_image(self.serve_dir, uuid, data, {}, path=file)
            write_manifest(self.serve_dir, uuid, manifest_of(text, uuid, data))
            if name == "copy-beside":
                for copy in ("n-1.imgmanifest", "image.zfs.gz~", ".x", "image.zfs.gz.md5"):
                    with open(os.path.join(self.serve_dir, uuid, copy), "wb") as beside:
                        beside.write(data)
                os.mkdir(os.path.join(self.serve_dir, uuid, "old"))
        server = self.serve()
        lists = {target: {image["uuid"]: image for image in server.get(target, accept).json()}
                 for target, accept in (("/images", {}), ("/datasets", {}), ("/datasets", SOURCE))}
        for number, (name, file, shown, listed, text, imgapi, dsapi, _) in enumerate(SAMPLES, 1):
            uuid = uuid_of(number)
            for target, found in lists.items():
                with self.subTest(name, target=target):
                    self.assertEqual(uuid in found, listed)
            for target, accept, fields in (("images", {}, imgapi), ("datasets", {}, dsapi),
                                           ("datasets", SOURCE, imgapi)):
                with self.subTest(name, target=target, accept=accept):
                    answer = server.get(f"/{target}/{uuid}", accept)
                    if shown is not None:
                        self.assertEqual(answer.status, 200 if shown else 404, server.log())
                    if answer.status == 200:
                        image = answer.json()
                        self.assertEqual({key: image.get(key) for key in fields}, fields)
                        imgadm.upgrade_manifest(image)
                        if target == "images":
                            imgadm.check_minimal_manifest(image)
                            self.assertEqual(server.get(f"/images/{uuid}/file").body,
                                             stream_of(file, text))

    def test_imported(self):
        for number, (name, file, _, _, text, imgapi, _, taken) in enumerate(SAMPLES, 1):
            if not taken:
                continue
            with self.subTest(name):
                data = stream_of(file, text)
                paths = [os.path.join(self.directory, name) for name in ("manifest", "image")]
                for path, content in zip(paths, (manifest_of(text, uuid_of(number), data), data)):
                    with open(path, "wb") as output:
                        output.write(content)
                run = support.run_program("import", "--dir", self.serve_dir, "--manifest",
                                          paths[0], "--file", paths[1])
                self.assertEqual((run.stdout, run.stderr), (uuid_of(number).encode() + b"\n", b""))
                reader = imgserver.ImageReader(imgserver.Config({}))
                image = reader.read(uuid_of(number), os.path.join(self.serve_dir, ""), ("imgapi",))
                self.assertIsNone(image.problem)
                shown = image.fields()
                self.assertEqual({key: shown.get(key) for key in imgapi}, imgapi)


class Case(support.ServerCase):

    def setUp(self):
        super().setUp()
        self.lines = []
        self.log = imgserver.Log("info", os.open(os.devnull, os.O_WRONLY))
        self.addCleanup(os.close, self.log.fd)
        self.log._line = lambda level, text: self.lines.append(f"{level} {text}")

    def store(self, **config):
        return imgserver.Store(imgserver.Config({"serve_dir": self.serve_dir, **config}), self.log)

    def uuids(self, store, api="imgapi"):
        return [image.uuid for image in store.snapshot(api, True).images]

    def path(self, number, name="image.zfs.gz"):
        return os.path.join(self.serve_dir, uuid_of(number), name)


class LogLines(Case):

    def test_a_broken_field_is_one_line_with_its_value(self):
        write_v2(self.serve_dir, uuid_of(1), homepage="example.com", tags=["a"])
        store = self.store()
        for _ in range(3):
            self.assertEqual(self.uuids(store), [uuid_of(1)])
            store.image(uuid_of(1), "dsapi", True)
        self.assertEqual(self.lines, [
            f"warn image {uuid_of(1)}: homepage 'example.com' must be an http(s) URL of at most "
            "1024 characters: it is left out",
            f"warn image {uuid_of(1)}: tags " + r"[\"a\"]" + " must be a JSON object of at most 100 "
            "KiB: it is left out"])

    def test_what_is_passed_over_is_said_once(self):
        upper = uuid_of(0xabc).upper()
        write_image(self.serve_dir, upper)
        for number, name in ((2, "manifest"), (3, "web-1.imgmanifest"), (4, "notes.txt")):
            os.mkdir(os.path.join(self.serve_dir, uuid_of(number)))
            open(self.path(number, name), "w").close()
        store = self.store()
        for _ in range(3):
            self.assertEqual(self.uuids(store), [])
            store._checked = -float("inf")
        self.assertEqual(sorted(self.lines), sorted([
            f"warn image {upper} is left out: its directory must have a UUID in lower case as name",
            f"warn image {uuid_of(2)} is left out: its manifest must be named manifest.json, not "
            "manifest",
            f"warn image {uuid_of(3)} is left out: its manifest must be named manifest.json, not "
            "web-1.imgmanifest"]))

    def test_an_image_that_comes_or_goes_is_one_line_from_the_start_on(self):
        write_v2(self.serve_dir, uuid_of(1))
        store = self.store()
        write_v2(self.serve_dir, uuid_of(2), name="web", version="3")
        write_v2(self.serve_dir, uuid_of(3))
        store.image(uuid_of(3), "imgapi", True)           # before any list
        store.image(uuid_of(1), "imgapi", True)
        for _ in range(2):
            self.assertEqual(len(self.uuids(store)), 3)
        write_v2(self.serve_dir, uuid_of(4))
        self.assertEqual(len(self.uuids(store)), 4)
        shutil.rmtree(os.path.dirname(self.path(1)))
        self.assertEqual(len(self.uuids(store)), 3)
        self.assertEqual(self.lines, [
            f"info image {uuid_of(3)} is on show: test 2.0.0, 17 bytes",
            f"info image {uuid_of(2)} is on show: web 3, 17 bytes",
            f"info image {uuid_of(4)} is on show: test 2.0.0, 17 bytes",
            f"info image {uuid_of(1)} is gone: test 2.0.0"])

    def test_an_image_that_goes_after_it_was_left_out(self):
        write_v2(self.serve_dir, uuid_of(1))
        write_manifest(self.serve_dir, uuid_of(1), b"{")
        store = self.store()
        self.assertEqual(self.uuids(store), [])
        shutil.rmtree(os.path.dirname(self.path(1)))
        self.assertEqual(self.uuids(store), [])
        self.assertRegex(self.lines[0], "is left out: manifest.json is not JSON")
        self.assertEqual(self.lines[1:], [f"info image {uuid_of(1)} is gone, which was left out"])

    def test_a_missing_origin_is_told_before_any_list(self):
        write_v2(self.serve_dir, uuid_of(1), origin=uuid_of(2))
        write_v2(self.serve_dir, uuid_of(3), origin=uuid_of(1))
        store = self.store()
        for _ in range(2):
            for number in (3, 1):
                store.image(uuid_of(number), "imgapi", True)
            self.uuids(store)
        self.assertEqual(self.lines, [f"warn image {uuid_of(1)}: imgadm cannot import it until "
                                      f"image {uuid_of(2)} is on this server, too"])

    def test_a_warning_is_due_again_when_it_was_not_for_a_time(self):
        write_v2(self.serve_dir, uuid_of(1), origin=uuid_of(2))
        store, text = self.store(), "its origins form a cycle"
        for count, number, origin in ((0, 2, None), (2, 2, 1), (3, 3, 1), (3, 2, None), (6, 2, 1)):
            write_v2(self.serve_dir, uuid_of(number), origin=origin and uuid_of(origin))
            store._checked = -float("inf")
            self.uuids(store)
            self.assertEqual(len([line for line in self.lines if text in line]), count)

    def test_an_origin_in_no_channel_of_its_child(self):
        channels = [{"name": "dev"}, {"name": "release", "default": True}]
        write_v2(self.serve_dir, uuid_of(1), channels=["dev"])
        write_v2(self.serve_dir, uuid_of(2), channels=["release"], origin=uuid_of(1))
        write_v2(self.serve_dir, uuid_of(3), channels=["release", "dev"], origin=uuid_of(1))
        for configured, count in (([], 0), (channels, 1)):
            store = self.store(channels=configured)
            for api in ("imgapi", "dsapi"):
                self.assertEqual(len(self.uuids(store, api)), 3)
            self.assertEqual(len(self.lines), count)
        self.assertEqual(self.lines, [f"warn image {uuid_of(2)}: its origin {uuid_of(1)} is in none "
                                      "of its channels: imgadm cannot import it from there"])

    def test_import_warns_of_it_too(self):
        config = imgserver.Config({"serve_dir": self.serve_dir,
                                   "channels": [{"name": "dev"}, {"name": "release"}]})
        write_v2(self.serve_dir, uuid_of(1), channels=["dev"])
        for channels, warns in ((["dev"], False), (["release"], True)):
            warning = imgserver.choose_channels(config, {"origin": uuid_of(1),
                "channels": channels})
            self.assertEqual(bool(warning), warns)

    def test_an_unactivated_image_is_served_and_not_listed(self):
        for number, (write, state) in enumerate(((write_v2, "unactivated"), (write_v2, "nuked"),
                                                 (write_image, "pending"), (write_v2, "active")),
                                                 1):
            write(self.serve_dir, uuid_of(number), state=state)
        store = self.store()
        for api in imgserver.RENDERINGS:
            self.assertEqual(self.uuids(store, api), [uuid_of(4)])
        for number in (1, 2, 3):
            image = store.image(uuid_of(number), "imgapi", True)
            self.assertEqual((image.state, image.fields()["state"]), ("unactivated",) * 2)
        self.assertNotIn("published_at", store.image(uuid_of(1), "imgapi", True).fields())


class FilesInManifests(Case):

    def reader(self):
        return imgserver.ImageReader(imgserver.Config({}))

    def read(self, number, **file):
        data = file.pop("data", b"some data")
        files = [{name: value for name, value in {
            "size": len(data), "sha1": hashlib.sha1(data).hexdigest(), **file}.items()
            if value is not None}]
        write_v2(self.serve_dir, uuid_of(number), data, files=files)
        return self.reader().read(uuid_of(number), os.path.join(self.serve_dir, ""), ("imgapi",))

    def test_without_size_or_sha1_it_is_hashed(self):
        sha1 = hashlib.sha1(b"some data").hexdigest()
        for file in ({"size": None}, {"sha1": None}, {"size": None, "sha1": None},
                     {"sha1": "", "md5": "0" * 32}):
            with self.subTest(file):
                image = self.read(1, **file)
                self.assertEqual((image.problem, image.size, image.sha1), (None, 9, sha1))

    def test_the_file_of_the_manifests_size(self):
        image = self.read(1)
        for name, data in (("notes.txt", b"x"), ("other.gz", b"other data"), ("a.imgmanifest",
            b""),
                           ("image.zfs.gz.sig", b"some date"), (".hidden", b"some date"),
                           ("image.zfs.gz~", b"some date")):
            with open(self.path(1, name), "wb") as file:
                file.write(data)
        os.mkdir(self.path(1, "directory"))
        image = self.reader().read(uuid_of(1), os.path.join(self.serve_dir, ""), ("imgapi",))
        self.assertEqual((image.problem, image.file), (None, "image.zfs.gz"))
        with open(self.path(1, "copy.gz"), "wb") as file:
            file.write(b"some data")
        image = self.reader().read(uuid_of(1), os.path.join(self.serve_dir, ""), ("imgapi",))
        self.assertIn("2 files have its size of 9 bytes: copy.gz, image.zfs.gz", image.problem)

    def test_a_large_file_is_hashed_once_while_no_list_waits(self):
        limit, imgserver.MD5_LIMIT = imgserver.MD5_LIMIT, 100
        self.addCleanup(setattr, imgserver, "MD5_LIMIT", limit)
        may_go, calls, hash_file = threading.Event(), [], imgserver.hash_file
        self.addCleanup(setattr, imgserver, "hash_file", hash_file)
        self.addCleanup(may_go.set)

        def slow(fd, size):
            calls.append(size)
            may_go.wait(PATIENCE)
            return hash_file(fd, size)

        imgserver.hash_file = slow
        data = b"x" * 101
        for number, size in ((1, len(data)), (2, None)):
            write_v2(self.serve_dir, uuid_of(number), data, files=[
                {key: value for key, value in (("size", size),) if value}])
        write_v2(self.serve_dir, uuid_of(3))
        store = self.store()
        for _ in range(3):
            self.assertEqual(self.uuids(store), [uuid_of(3)])
            with self.assertRaises(imgserver.ApiError):
                store.image(uuid_of(1), "imgapi", True)
            store._checked = -float("inf")
        self.assertEqual(len([line for line in self.lines if "being checked" in line]), 2)
        may_go.set()

        def shown():
            store._checked = -float("inf")
            return len(self.uuids(store)) == 3

        wait_for(shown, "the images")
        for number in (1, 2):
            image = store.image(uuid_of(number), "imgapi", True)
            self.assertEqual((image.sha1, image.md5), (hashlib.sha1(data).hexdigest(),
                                                       hashlib.md5(data).digest()))
        self.assertEqual(calls, [101, 101])

    def large(self):
        """A Hasher, path and key of a file that it hashes in a thread."""
        for name, value in (("MD5_LIMIT", 5), ("HASH_AGAIN", 0.1)):
            change = mock.patch.object(imgserver, name, value)
            change.start()
            self.addCleanup(change.stop)
        self.read(1)
        return (imgserver.Hasher(later=True), self.path(1),
                imgserver.stat_key(os.stat(self.path(1))))

    def test_a_large_file_that_cannot_be_read_is_tried_again(self):
        hasher, path, key = self.large()
        errors = []

        def outcome():
            try:
                return hasher.hashes(path, key)
            except OSError as error:
                errors.append(error)
                return error.strerror

        with mock.patch("imgserver.hash_file", side_effect=OSError(errno.EIO, "broken")) as tried:
            self.assertIsNone(outcome())
            wait_for(lambda: outcome() == "broken", "the error")
            # Tried again, it stays the error, or each try would be lines in the log.
            wait_for(lambda: outcome() == "broken" and tried.call_count > 2, "another try")
        self.assertEqual(len(set(map(id, errors))), len(errors))
        wait_for(lambda: outcome() != "broken", "the hashes")
        self.assertEqual(outcome()[0], hashlib.sha1(b"some data").hexdigest())

    def test_a_large_file_for_which_no_thread_starts_is_hashed_later(self):
        hasher, path, key = self.large()
        with mock.patch("imgserver.start_new_thread", side_effect=RuntimeError("no thread")):
            self.assertIsNone(hasher.hashes(path, key))
        wait_for(lambda: hasher.hashes(path, key), "the hashes")

    def test_a_leftover_md5_is_never_sent(self):
        data, wrong = b"some data", "0" * 32
        right = hashlib.md5(data).digest()
        for limit, file, sent in (
                (100, {"md5": wrong}, right), (5, {"md5": wrong}, None),
                (5, {"md5": right.hex()}, None),             # nobody knows of which file it is
                (5, {"md5": wrong, "md5_of": "1" * 40}, None),
                (5, {"md5_of": hashlib.sha1(data).hexdigest()}, None),
                (5, {"md5": "x", "md5_of": hashlib.sha1(data).hexdigest()}, None),
                (5, {"md5": right.hex(), "md5_of": hashlib.sha1(data).hexdigest()}, right)):
            with self.subTest(limit=limit, file=file):
                image = self.read(1, data=data, **file)
                self.assertIsNone(image.problem)
                before, imgserver.MD5_LIMIT = imgserver.MD5_LIMIT, limit
                try:
                    with open(self.path(1), "rb") as opened:
                        found = self.store().content_md5(image, opened.fileno())
                finally:
                    imgserver.MD5_LIMIT = before
                self.assertEqual(found, sent)

    def test_the_md5_is_taken_in_pieces_and_once(self):
        data = b"0123456789" * 7
        image = self.read(1, data=data)
        store, pread, sizes = self.store(), os.pread, []
        before, imgserver.PIECE = imgserver.PIECE, 16
        self.addCleanup(setattr, imgserver, "PIECE", before)
        self.addCleanup(setattr, os, "pread", pread)
        os.pread = lambda fd, size, offset: sizes.append(size) or pread(fd, size, offset)
        found = []
        with open(self.path(1), "rb") as file:
            threads = [threading.Thread(target=lambda: found.append(
                store.content_md5(image, file.fileno()))) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.assertEqual(found, [hashlib.md5(data).digest()] * 8)
        self.assertEqual(sizes, [16, 16, 16, 16, 6])

    def test_a_file_that_changes_while_it_is_hashed(self):
        """Its hashes are those of no state of it: none is kept."""
        image = self.read(1)
        store, hasher, hash_file = self.store(), imgserver.Hasher(), imgserver.hash_file
        self.addCleanup(setattr, imgserver, "hash_file", hash_file)

        def change(fd, size):
            result = hash_file(fd, size)
            os.chmod(self.path(1), 0o600)
            os.chmod(self.path(1), 0o644)
            os.utime(self.path(1), (5, 5))
            os.truncate(self.path(1), 8)
            return result

        imgserver.hash_file = change
        with open(self.path(1), "rb") as file:
            self.assertEqual(store.content_md5(image, file.fileno()),
                             hashlib.md5(b"some data").digest())
        self.assertIsNone(image.md5)
        write_image(self.serve_dir, uuid_of(1), b"some data")
        key = imgserver.stat_key(os.stat(self.path(1)))
        with self.assertRaises(OSError):
            hasher.hashes(self.path(1), key)
        imgserver.hash_file = hash_file
        self.assertEqual(hasher.hashes(self.path(1), imgserver.stat_key(os.stat(self.path(1))))[0],
                         hashlib.sha1(b"some dat").hexdigest())

    def test_content_md5_of_a_manifest_that_has_a_wrong_one(self):
        data = b"some data"
        self.read(1, data=data, md5="0" * 32)
        answer = self.serve().get(f"/images/{uuid_of(1)}/file")
        self.assertEqual(answer.headers["content-md5"],
                         base64.b64encode(hashlib.md5(data).digest()).decode())


class SourceOfImgadm(support.ServerCase):
    """DSAPI, as its clients ask: v2 for imgadm 2 and later, v1 for everybody else."""

    def setUp(self):
        super().setUp()
        write_image(self.serve_dir, uuid_of(1), channels=["dev"], **{"x-own": [1, None]})
        write_v2(self.serve_dir, uuid_of(2), path="noname", channels=["dev"],
                 billing_tags=["a"], traits={"a": True}, **{"x-own": {"b": 1}})
        self.server = self.serve(config={"channels": [{"name": "dev", "default": True}]})

    def test_by_accept(self):
        for accept, v in (("application/json", 2), (None, None), ("*/*", None), ("", None),
                          ("application/json, */*", None), ("application/JSON", None),
                          ("text/html", None)):
            headers = {} if accept is None else {"Accept": accept}
            for target in ("/datasets", "/datasets?name=test"):
                with self.subTest(accept, target=target):
                    answer = self.server.get(target, headers)
                    self.assertEqual([image.get("v") for image in answer.json()], [v, v])
                    self.assertIn("Accept", re.split(", *", answer.headers["vary"]))
            for number in (1, 2):
                with self.subTest(accept, number=number):
                    answer = self.server.get(f"/datasets/{uuid_of(number)}", headers)
                    self.assertEqual(answer.json().get("v"), v)
                    self.assertEqual(answer.headers["vary"], "Accept")
                    head = self.server.head(f"/datasets/{uuid_of(number)}", headers)
                    self.assertEqual(head.headers["etag"], answer.headers["etag"])

    def test_lists_vary_by_both(self):
        for headers in ({}, SOURCE, {"Accept-Encoding": "gzip"}):
            answer = self.server.get("/datasets", headers)
            self.assertEqual(answer.headers["vary"], "Accept, Accept-Encoding")
        self.assertEqual(self.server.get("/images").headers["vary"],
                         "Accept-Encoding, Accept-Version")
        etags = [self.server.get("/datasets", headers).headers["etag"] for headers in ({}, SOURCE)]
        self.assertNotEqual(*etags)

    def test_v2(self):
        for number, path in ((1, "image.zfs.gz"), (2, "noname.gz")):
            uuid = uuid_of(number)
            image = self.server.get(f"/datasets/{uuid}", SOURCE).json()
            v2 = self.server.get(f"/images/{uuid}").json()
            v2.pop("channels", None)
            file = image["files"][0]
            self.assertEqual((file.pop("path"), file.pop("url")), (
                path, f"http://images.example.com/datasets/{uuid}/{path}"))
            own = image.pop("x-own")
            self.assertEqual(image, v2)
            self.assertEqual(own, [1, None] if number == 1 else {"b": 1})
        self.assertEqual(self.server.get(f"/datasets/{uuid_of(2)}/noname.gz").status, 200)

    def test_imgadm_imports_and_update_finds_nothing(self):
        source = imgadm.Source("http://images.example.com/datasets", self.server.address)
        data = streams.pack(b"blocks")
        for number, write in ((3, write_image), (4, write_v2)):
            write(self.serve_dir, uuid_of(number), data, origin=uuid_of(number - 1)
                  if number == 4 else None)
        with imgadm.Imgadm3([source]) as client:
            client.import_image(uuid_of(4))
            self.assertEqual(sorted(client.installed), [uuid_of(3), uuid_of(4)])
            self.assertEqual({image["v"] for image in client.installed.values()}, {2})
            self.assertEqual(client.update(), {})
        v1 = imgadm.Imgadm1("http://images.example.com/datasets/", self.server.address)
        v1.update()
        self.assertEqual({image.get("v") for image in v1.cache.values()}, {None})


if __name__ == "__main__":
    unittest.main()
