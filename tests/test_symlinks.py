"""Symlinks in serve_dir: followed where root or its owner made them, and no others."""

import os
import tempfile
import unittest
from unittest import mock

import imgserver
from tests.support import ServerCase, ask, uuid_of, write_image

DATA = b"not a real stream"
FILE = "image.zfs.gz"
SOMEBODY = 54321              # a user that owns no directory here
FOREIGN = "a symlink that belongs to neither root nor the owner of serve_dir"


class Symlinks(ServerCase):
    """Root gives its links away; anybody else's are foreign where serve_dir is root's."""

    def setUp(self):
        super().setUp()
        self.owner = self.serve_dir if os.getuid() == 0 else "/"
        self.reader = imgserver.ImageReader(imgserver.Config({"serve_dir": self.owner}))
        self.uuid = uuid_of(1)
        write_image(self.serve_dir, self.uuid, DATA)
        self.elsewhere = tempfile.mkdtemp(dir=self.directory)

    def path(self, *names):
        return os.path.join(self.serve_dir, *names)

    def link(self, *names):
        """Move a file or directory of serve_dir elsewhere, and put a foreign link there."""
        path = self.path(*names)
        target = os.path.join(self.elsewhere, names[-1])
        os.rename(path, target)
        os.symlink(target, path)
        if os.getuid() == 0:
            os.lchown(path, SOMEBODY, -1)
        return path

    def read(self):
        return self.reader.read(self.uuid, self.path(""), ("imgapi", "dsapi"))

    def test_image_is_left_out(self):
        for number, names in enumerate(((), ("manifest.json",), (FILE,)), 10):
            with self.subTest(names):
                self.uuid = uuid_of(number)
                write_image(self.serve_dir, self.uuid, DATA)
                self.assertIsNone(self.read().problem)
                path = self.link(self.uuid, *names)
                image = self.read()
                self.assertIn(f"{os.path.basename(path)} is {FOREIGN}", image.problem)
                self.assertFalse(image.is_fresh("imgapi", for_list=True), "its owner may change")
                self.reader.serve_dir = self.directory
                os.lchown(path, os.stat(self.directory).st_uid, -1)
                self.assertIsNone(self.read().problem)
                self.reader.serve_dir = self.owner

    def test_page_is_no_page(self):
        site = self.site()
        with open(self.path("index.json"), "wb") as file:
            file.write(b'"page"')
        self.assertEqual(ask(site, "/").body, b'"page"')
        self.link("index.json")
        site.config.serve_dir = self.owner if os.getuid() else self.serve_dir
        self.assertNotEqual(ask(site, "/").body, b'"page"')

    def test_manifest_that_becomes_a_link_while_it_is_opened(self):
        real, looked = imgserver.trusted_stat, []

        def swapped(path, serve_dir):
            status = real(path, serve_dir)
            if path.endswith("manifest.json"):
                looked.append(path)
                if len(looked) == 1:
                    self.link(self.uuid, "manifest.json")
                    write_image(self.elsewhere, "x")
                    os.rename(os.path.join(self.elsewhere, "x", "manifest.json"),
                              os.path.join(self.elsewhere, "manifest.json"))
            return status
        with mock.patch("imgserver.trusted_stat", swapped):
            self.assertIn(FOREIGN, self.read().problem)

    def test_icon_is_no_icon(self):
        with open(self.path(self.uuid, "icon.png"), "wb") as file:
            file.write(b"icon")
        self.assertEqual(self.read().icon, "icon.png")
        self.link(self.uuid, "icon.png")
        image = self.read()
        self.assertIsNone(image.problem)
        self.assertIsNone(image.icon)

    def test_icon_that_becomes_a_link(self):
        """Since the directory was read, or while it is opened."""
        with open(self.path(self.uuid, "icon.png"), "wb") as file:
            file.write(b"icon")
        path = self.link(self.uuid, "icon.png")
        with self.assertRaisesRegex(OSError, FOREIGN):
            imgserver.open_regular(path, self.owner)
        fd, _ = imgserver.open_regular(os.path.join(self.elsewhere, "icon.png"), self.owner)
        os.close(fd)

    def disable(self):
        imgserver.Publisher(imgserver.Config({"serve_dir": self.serve_dir})).disable(self.uuid)

    def record(self):
        found = imgserver.FileScan()
        found.feed(DATA)
        imgserver.record_facts(imgserver.Config({"serve_dir": self.serve_dir}), self.uuid, found)

    def test_nothing_is_written_behind_it(self):
        if os.getuid() != 0:
            self.skipTest("only root can make a link that is another user's")
        for number, names in enumerate(((), ("manifest.json",)), 10):
            with self.subTest(names):
                self.uuid = uuid_of(number)
                write_image(self.serve_dir, self.uuid, DATA)
                path = self.link(self.uuid, *names)
                behind = os.path.join(self.elsewhere, *(names or (self.uuid, "manifest.json")))
                for change, text in ((self.disable, b'"disabled"'), (self.record, b'"sha256"')):
                    os.lchown(path, SOMEBODY, -1)
                    with self.assertRaisesRegex(imgserver.ApiError,
                                                f"{os.path.basename(path)} is {FOREIGN}"):
                        change()
                    with open(behind, "rb") as file:
                        self.assertNotIn(text, file.read())
                    os.lchown(path, 0, -1)
                    change()
                    self.assertTrue(os.path.islink(path))
                    with open(behind, "rb") as file:
                        self.assertIn(text, file.read())

    def test_a_link_that_comes_while_it_is_changed(self):
        if os.getuid() != 0:
            self.skipTest("only root can make a link that is another user's")
        real = imgserver.manifest_bytes

        def swapped(manifest):
            self.link(self.uuid, "manifest.json")
            return real(manifest)
        with mock.patch("imgserver.manifest_bytes", swapped), \
                self.assertRaisesRegex(imgserver.ApiError, FOREIGN):
            self.disable()
        with open(os.path.join(self.elsewhere, "manifest.json"), "rb") as file:
            self.assertNotIn(b"disabled", file.read())

    def test_it_is_one_line_in_the_log(self):
        if os.getuid() != 0:
            self.skipTest("only root can make a link that is another user's")
        self.link(self.uuid, FILE)
        server = self.serve()
        for _ in range(3):
            self.assertEqual(server.get("/images").json(), [])
            self.assertError(server.get(f"/images/{self.uuid}/file"), 404)
        self.assertEqual(server.log().count(FOREIGN), 1)
        os.lchown(self.path(self.uuid, FILE), 0, -1)
        self.assertEqual(server.get(f"/images/{self.uuid}/file").body, DATA)


if __name__ == "__main__":
    unittest.main()
