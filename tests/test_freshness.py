"""When the Store looks at the disk, and what it tells of it: without a server, by the clock
that the test sets."""

import os
import shutil
import threading
import time
import unittest
from unittest import mock

import imgserver
from tests.support import SETTLED, ServerCase, uuid_of, write_image

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
        self.store.snapshot(imgserver.DSAPI, True)

    def new_store(self):
        config = imgserver.Config({"serve_dir": self.serve_dir})
        self.log = imgserver.Log("info", os.open(os.devnull, os.O_WRONLY))
        self.addCleanup(os.close, self.log.fd)
        self.jobs = []                    # generators, for the event loop
        return imgserver.Store(config, self.log, self.jobs.append)

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
        for _ in range(3):
            self.assertEqual(self.names(), ["test"])
        [job] = self.jobs
        imgserver.run_out(job)
        self.assertEqual(self.names(), ["edited"])
        self.assertEqual(len(self.jobs), 1)
        self.later(imgserver.RECHECK_EARLY)
        self.names()
        self.assertEqual(len(self.jobs), 2)

    def test_few_lists_are_kept_the_latest_ones(self):
        hosts = [b"h%d" % number for number in range(imgserver.LISTS_KEPT + 3)]
        lists = [self.store.listing(imgserver.DSAPI, (), lambda images: images,
                                    lambda image: image.dsapi[0], True, host) for host in hosts]
        kept = self.store.snapshot(imgserver.DSAPI, True).listings
        self.assertEqual([host for _, _, host in kept], hosts[3:])
        self.assertEqual([listing.kept for listing in lists],
                         [False] * 3 + [True] * imgserver.LISTS_KEPT)

    def test_a_list_wanted_by_many_at_once_is_rendered_once(self):
        rendered, lists = [], []

        def text_of(image):
            rendered.append(image)
            return image.dsapi[0]

        def ask(host):
            lists.append(self.store.listing(imgserver.DSAPI, (), lambda images: images, text_of,
                                            True, host))
        with self.store.rendering:
            threads = [threading.Thread(target=ask, args=(host,)) for host in (b"a", b"b") * 4]
            for thread in threads:
                thread.start()
            time.sleep(0.1)               # they wait
        for thread in threads:
            thread.join()
        self.assertEqual((len(lists), len(set(map(id, lists)))), (8, 2))
        self.assertEqual(len(rendered), 1)

    def test_pieces_that_are_cached_stay_so(self):
        def ask():
            return self.store.listing(imgserver.DSAPI, (), lambda images: images,
                                      lambda image: image.dsapi[0], True, b"h")
        for_host, others = imgserver.Listing.for_host, []

        def slow(*given):                 # another is faster, and sends a piece already
            if not others:
                others.append(None)
                others[0] = ask()
                imgserver.ListReader(others[0]).parts(1)
            return for_host(*given)
        with mock.patch.object(imgserver.Listing, "for_host", slow):
            self.assertIs(ask(), others[0])
        self.assertIsNotNone(others[0]._pieces[0])

    def test_nobody_is_served_what_is_too_old(self):
        self.later(imgserver.RECHECK)
        for _ in range(2):
            with self.assertRaises(imgserver.NeedsThread):
                self.names()

    def test_an_image_read_alone_is_in_the_list_after_the_next_look(self):
        write_image(self.serve_dir, U, name="edited")
        self.assertEqual(self.store.image(U, imgserver.DSAPI, True).name, "edited")
        self.later(imgserver.RECHECK_EARLY)
        self.names()
        imgserver.run_out(self.jobs.pop())
        self.assertEqual(self.names(), ["edited"])

    def test_a_manifest_that_was_away_while_an_image_was_asked_for_alone(self):
        """The directory of images does not change when it comes back."""
        path = os.path.join(self.serve_dir, U, "manifest.json")
        os.rename(path, path + ".away")
        with self.assertRaises(imgserver.ApiError):
            self.store.image(U, imgserver.DSAPI, True)
        for _ in range(2):
            self.later(imgserver.RECHECK)
            self.assertEqual(self.names(may_block=True), [])
        os.rename(path + ".away", path)
        self.later(imgserver.RECHECK)
        self.assertEqual(self.names(may_block=True), ["test"])
        shutil.rmtree(os.path.dirname(path))
        self.later(imgserver.RECHECK)
        self.assertEqual(self.names(may_block=True), [])
        self.assertEqual(self.store._empty, set())

    def test_a_look_that_is_not_done_in_time_is_waited_for(self):
        self.later(imgserver.RECHECK_EARLY)
        self.names()                      # the job is never begun
        self.later(imgserver.RECHECK - imgserver.RECHECK_EARLY)
        with self.assertRaises(imgserver.NeedsThread):
            self.names()
        self.assertEqual(self.names(may_block=True), ["test"])
        self.assertEqual(self.names(), ["test"])

    def test_an_early_look_that_is_given_up_is_begun_again(self):
        self.later(imgserver.RECHECK_EARLY)
        self.names()
        with mock.patch.object(imgserver, "RECHECK_SLICE", 0):
            job = self.jobs.pop()
            self.assertFalse(next(job))
        job.close()                       # as where no thread starts
        self.assertEqual(self.names(), ["test"])
        self.assertEqual(len(self.jobs), 1)

    def test_only_one_looks_at_a_time(self):
        self.later(imgserver.RECHECK_EARLY)
        self.names()
        with self.store._recheck_lock:    # a thread is at it
            self.assertEqual(list(self.jobs.pop()), [])

    def test_an_early_look_that_fails_is_told_to_the_next_client(self):
        self.later(imgserver.RECHECK_EARLY)
        self.names()
        os.rename(self.serve_dir, self.serve_dir + "2")
        imgserver.run_out(self.jobs.pop())
        with self.assertRaises(OSError):
            self.names(may_block=True)
        os.rename(self.serve_dir + "2", self.serve_dir)
        self.assertEqual(self.names(may_block=True), ["test"])

    def test_an_early_look_is_cut_into_slices_until_it_needs_a_disk(self):
        for number in range(2, 50):
            write_image(self.serve_dir, uuid_of(number))
        time.sleep(SETTLED)
        self.names(may_block=True)
        with mock.patch.object(imgserver, "RECHECK_SLICE", 0):
            self.later(imgserver.RECHECK_EARLY)
            self.names(may_block=True)
            self.assertEqual(list(self.jobs.pop()), [False] * 49)
            write_image(self.serve_dir, U, name="edited")
            self.later(imgserver.RECHECK_EARLY)
            self.names()
            self.assertEqual(list(self.jobs.pop()), [False] * 49 + [True])     # it is read again
        self.assertIn("edited", self.names())
        self.later(imgserver.RECHECK_EARLY)
        self.names()
        stat = os.stat

        def slow_stat(*arguments, **options):
            self.later(imgserver.RECHECK_SLOW)
            return stat(*arguments, **options)
        with mock.patch.object(imgserver.os, "stat", slow_stat):
            self.assertTrue(next(self.jobs.pop()))

    def test_a_directory_from_the_future_is_no_reason_to_look_each_time(self):
        future = time.time() + 3600
        os.utime(self.serve_dir, (future, future))
        time.sleep(SETTLED)
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
        self.later(imgserver.RECHECK)
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
