"""When the Store looks at the disk, and what it tells of it: without a server, by the clock
that the test sets."""

import os
import shutil
import tempfile
import time
import unittest
from unittest import mock

import imgserver
from tests.support import ROOT, SETTLED, ServerCase, uuid_of, write_image

U = uuid_of(1)


class Looks(ServerCase):

    def setUp(self):
        super().setUp()
        self.now = 0.0
        clock = mock.patch.object(imgserver.time, "monotonic", self.clock)
        clock.start()
        self.addCleanup(clock.stop)
        write_image(self.serve_dir, U)
        time.sleep(SETTLED)
        self.store = self.new_store()
        past = time.time() - 10
        os.utime(self.serve_dir, (past, past))
        self.store.snapshot(imgserver.DSAPI, True)

    def new_store(self):
        config = imgserver.Config({"serve_dir": self.serve_dir})
        self.log = imgserver.Log("info", os.open(os.devnull, os.O_WRONLY))
        self.addCleanup(os.close, self.log.fd)
        return imgserver.Store(config, self.log)

    def names(self, may_block=False):
        return [image.name for image in self.store.snapshot(imgserver.DSAPI, may_block).images]

    def clock(self):
        """The only time that passes by itself: a microsecond from one look to the next."""
        self.now += 1e-6
        return self.now

    def later(self, seconds):
        self.now += seconds

    def test_what_was_just_looked_at_is_answered_at_once(self):
        self.assertEqual(self.names(), ["test"])

    def test_one_thread_looks_early_while_the_others_are_served(self):
        write_image(self.serve_dir, U, name="edited")
        self.later(imgserver.RECHECK_EARLY)
        with self.assertRaises(imgserver.NeedsThread):
            self.names()
        self.assertEqual(self.names(), ["test"])
        self.assertEqual(self.names(may_block=True), ["edited"])
        self.assertEqual(self.names(), ["edited"])

    def test_few_lists_are_kept_the_latest_ones(self):
        def render(snapshot, api, number):
            return number
        for number in range(imgserver.LISTS_KEPT + 3):
            self.store.listing(imgserver.DSAPI, (number,), render, True)
        kept = self.store.snapshot(imgserver.DSAPI, True).listings
        self.assertEqual(list(kept.values()), list(range(3, imgserver.LISTS_KEPT + 3)))

    def test_nobody_is_served_what_is_too_old(self):
        self.later(imgserver.RECHECK)
        for _ in range(2):
            with self.assertRaises(imgserver.NeedsThread):
                self.names()

    def begin_to_look(self):
        """Have the loop begin a look in parts; what is left to half of its time."""
        self.later(imgserver.RECHECK_SOON)
        self.assertEqual(self.names(), ["test"])
        return (imgserver.RECHECK_EARLY - imgserver.RECHECK_SOON) / 2

    def test_the_loop_looks_itself_where_lists_are_asked_for_often(self):
        time_left = self.begin_to_look()
        for _ in range(3):
            self.later(time_left)
            self.assertEqual(self.names(), ["test"])
            self.later(imgserver.RECHECK_SOON - time_left)
            self.assertEqual(self.names(), ["test"])

    def test_what_the_loop_finds_changed_is_read_by_a_thread(self):
        write_image(self.serve_dir, U, name="edited")
        self.later(self.begin_to_look())
        with self.assertRaises(imgserver.NeedsThread):
            self.names()
        self.assertEqual(self.names(), ["test"])
        self.assertEqual(self.names(may_block=True), ["edited"])
        self.assertEqual(self.names(), ["edited"])

    def test_a_new_icon_is_found_by_the_loop_too(self):
        time_left = self.begin_to_look()
        with open(os.path.join(self.serve_dir, U, "icon.png"), "wb") as file:
            file.write(b"icon")
        self.later(time_left)
        with self.assertRaises(imgserver.NeedsThread):
            self.names()

    def test_what_was_read_alone_meanwhile_is_put_into_the_list_by_a_thread(self):
        write_image(self.serve_dir, U, name="edited")
        self.assertEqual(self.store.image(U, imgserver.DSAPI, True).name, "edited")
        self.later(imgserver.RECHECK_SOON)
        with self.assertRaises(imgserver.NeedsThread):
            self.names()
        self.assertEqual(self.names(may_block=True), ["edited"])

    def test_a_slow_disk_is_looked_at_by_a_thread(self):
        with mock.patch.object(imgserver, "LOOK_AHEAD", -1):
            self.later(self.begin_to_look())
            with self.assertRaises(imgserver.NeedsThread):
                self.names()
        self.assertEqual(self.names(may_block=True), ["test"])
        self.assertEqual(self.names(), ["test"])

    def test_another_file_system_is_looked_at_by_a_thread(self):
        self.begin_to_look()
        self.names()
        places = [place for place in ("/dev/shm", "/var/tmp", ROOT) if os.access(place, os.W_OK)
                  and os.stat(place).st_dev != os.stat(self.serve_dir).st_dev]
        if not places:
            self.skipTest("there is no second file system")
        other = tempfile.mkdtemp(dir=places[0])
        self.addCleanup(shutil.rmtree, other)
        for name in ("manifest.json", "image.zfs.gz", ""):
            with self.subTest(name):
                path = os.path.join(self.serve_dir, U, name).rstrip("/")
                there = os.path.join(other, name or "whole")
                shutil.move(path, there)
                os.symlink(there, path)
                os.utime(self.serve_dir, (1, 1))
                self.later(imgserver.RECHECK)
                self.assertEqual(self.names(may_block=True), ["test"])
                self.later(self.begin_to_look())
                with self.assertRaises(imgserver.NeedsThread):
                    self.names()
                self.assertEqual(self.names(may_block=True), ["test"])
                os.unlink(path)
                shutil.move(there, path)

    def test_a_look_in_parts_that_was_left_is_begun_anew(self):
        self.begin_to_look()
        self.later(imgserver.RECHECK)
        self.assertEqual(self.names(may_block=True), ["test"])
        time_left = self.begin_to_look()
        self.later(time_left)
        for _ in range(2):
            self.assertEqual(self.names(), ["test"])

    def test_a_directory_from_the_future_is_no_reason_to_look_each_time(self):
        future = time.time() + 3600
        os.utime(self.serve_dir, (future, future))
        self.names(may_block=True)
        self.assertEqual(self.names(), ["test"])

    def test_an_image_that_comes_while_the_names_are_read_is_not_missed(self):
        """In the same tick of the file system's clock, and the look takes long."""
        tick = time.time_ns()
        os.utime(self.serve_dir, ns=(tick, tick))
        listdir = os.listdir

        def late(path):
            names = listdir(path)
            if path == self.serve_dir:
                write_image(self.serve_dir, uuid_of(2), name="new")
                os.utime(self.serve_dir, ns=(tick, tick))
                now.return_value += 2 * imgserver.RACY
            return names
        with mock.patch.object(imgserver.time, "time_ns", return_value=tick) as now:
            with mock.patch.object(os, "listdir", late):
                self.assertEqual(self.names(may_block=True), ["test"])
            self.assertEqual(self.names(may_block=True), ["test", "new"])

    def test_what_has_just_changed_is_read_again_until_its_time_would_move(self):
        """Else a second change in the same tick of the file system's clock were never seen."""
        directory = os.path.join(self.serve_dir, U)
        for path in (os.path.join(directory, "manifest.json"),
                     os.path.join(directory, "image.zfs.gz"), directory):
            with self.subTest(path):
                time.sleep(SETTLED)                   # the others are old enough
                os.utime(path)
                changed = os.stat(path).st_ctime_ns
                with mock.patch.object(imgserver.time, "time_ns") as now:
                    self.later(imgserver.RECHECK)
                    now.return_value = changed + imgserver.RACY
                    for _ in range(2):
                        self.assertEqual(self.names(may_block=True), ["test"])
                        with self.assertRaises(imgserver.NeedsThread):
                            self.store.image(U, imgserver.DSAPI, False)
                    now.side_effect = changed - 10**9, changed + 1        # a slow disk
                    self.assertEqual(self.store.image(U, imgserver.DSAPI, True).name, "test")
                    with self.assertRaises(imgserver.NeedsThread):
                        self.store.image(U, imgserver.DSAPI, False)
                    now.side_effect = None
                    now.return_value += 1
                    self.assertEqual(self.store.image(U, imgserver.DSAPI, True).name, "test")
                    self.assertEqual(self.store.image(U, imgserver.DSAPI, False).name, "test")

    def test_a_new_icon_is_seen_with_the_next_look(self):
        with open(os.path.join(self.serve_dir, U, "icon.png"), "wb") as file:
            file.write(b"icon")
        self.later(imgserver.RECHECK_EARLY)
        self.assertEqual(self.store.snapshot(imgserver.DSAPI, True).images[0].icon, "icon.png")

    def test_an_image_file_is_no_icon(self):
        write_image(self.serve_dir, uuid_of(2), path="icon.png")
        image = self.store.image(uuid_of(2), imgserver.IMGAPI, True)
        self.assertIsNone(image.icon)
        self.assertNotIn("icon", image.fields())


class ListEtags(ServerCase):

    def etag(self, channels):
        server = self.serve(config={"channels": [{"name": name} for name in channels]})
        answer = server.get("/images?channel=*")
        server.stop()
        return [image["uuid"] for image in answer.json()], answer.headers["etag"]

    def test_the_etag_says_which_images_are_listed(self):
        write_image(self.serve_dir, uuid_of(1), channels=["a"])
        write_image(self.serve_dir, uuid_of(2), channels=["b"])
        both, one = self.etag("ab"), self.etag("a")
        self.assertEqual((len(both[0]), len(one[0])), (2, 1))
        self.assertNotEqual(both[1], one[1])


if __name__ == "__main__":
    unittest.main()
