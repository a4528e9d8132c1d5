"""Real ZFS: zfs send - import-image - server - download - zfs receive, with zfs-fuse."""

import os
import subprocess
import sys
import tempfile
import shutil
import unittest

from tests import streams
from tests.support import PATIENCE, ROOT, ServerCase, check_only, need, wait_for, write_image

IMPORT = os.path.join(ROOT, "import-image")
POOL_SIZE = 128 << 20
WORDS = ("files", "1.0", "A file system")


def run(*command, **options):
    """The output of a command that must end well."""
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=PATIENCE * 3,
                          **options).stdout


class ZfsCase(ServerCase):
    """A test with a pool of its own, on a file.  One zfs-fuse serves the whole class."""

    daemon = None

    @classmethod
    def setUpClass(cls):
        need("zfs-fuse", "zfs", "zpool")
        if not os.access("/dev/fuse", os.R_OK | os.W_OK) or os.getuid() != 0:
            raise unittest.SkipTest("zfs-fuse needs /dev/fuse and root")
        cls.home = tempfile.mkdtemp(prefix="imgserver-zfs-")
        cls.addClassCleanup(shutil.rmtree, cls.home, ignore_errors=True)
        cls.log = open(os.path.join(cls.home, "log"), "wb")
        cls.addClassCleanup(cls.log.close)
        cls.daemon = subprocess.Popen(["zfs-fuse", "-n", "--no-kstat-mount"], stdout=cls.log,
                                      stderr=cls.log, stdin=subprocess.DEVNULL)
        cls.addClassCleanup(cls.end_daemon)

        def answers():
            if cls.daemon.poll() is not None:
                raise unittest.SkipTest("zfs-fuse does not run here, or another one does")
            return subprocess.run(["zpool", "list"], stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL).returncode == 0
        wait_for(answers, "zfs-fuse")
        cls.pool = f"imgserver{os.getpid()}"
        disk = os.path.join(cls.home, "disk")
        with open(disk, "wb") as file:
            file.truncate(POOL_SIZE)
        run("zpool", "create", "-m", os.path.join(cls.home, "mnt"), cls.pool, disk,
            stderr=subprocess.DEVNULL)
        cls.addClassCleanup(subprocess.run, ["zpool", "destroy", "-f", cls.pool])
        cls.make_files()

    @classmethod
    def end_daemon(cls):
        cls.daemon.terminate()
        try:
            cls.daemon.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            cls.daemon.kill()
            cls.daemon.wait()

    @classmethod
    def make_files(cls):
        """POOL/vm with @one, and @two with one file more and one changed; and a clone of @one
        with the changes of @two, as `imgadm create -i` makes one of a VM.
        """
        cls.vm = cls.pool + "/vm"
        run("zfs", "create", cls.vm)
        cls.files = os.path.join(cls.home, "mnt", "vm")
        os.mkdir(os.path.join(cls.files, "etc"))
        cls.write("etc/motd", b"Welcome\n")
        cls.write("data", os.urandom(3 << 20))
        cls.write("empty", b"")
        os.symlink("etc/motd", os.path.join(cls.files, "link"))
        run("zfs", "snapshot", cls.vm + "@one")
        cls.first = cls.contents(cls.files)
        cls.write("etc/motd", b"Welcome back\n")
        cls.write("more", os.urandom(1 << 20))
        run("zfs", "snapshot", cls.vm + "@two")
        cls.second = cls.contents(cls.files)
        cls.clone = cls.pool + "/clone"
        run("zfs", "clone", cls.vm + "@one", cls.clone)
        for name in ("etc/motd", "more"):
            shutil.copy(os.path.join(cls.files, name),
                        os.path.join(cls.home, "mnt", "clone", name))
        run("zfs", "snapshot", cls.clone + "@two")

    @classmethod
    def write(cls, name, data):
        with open(os.path.join(cls.files, name), "wb") as file:
            file.write(data)

    @staticmethod
    def contents(directory):
        """{path: bytes, or the target of a symlink} of all files in a directory."""
        result = {}
        for place, _, names in os.walk(directory):
            for name in names:
                path = os.path.join(place, name)
                if os.path.islink(path):
                    result[os.path.relpath(path, directory)] = os.readlink(path)
                else:
                    with open(path, "rb") as file:
                        result[os.path.relpath(path, directory)] = file.read()
        return result

    def send(self, *words):
        return run("zfs", "send", *words)

    def guid(self, snapshot):
        return run("zfs", "get", "-H", "-p", "-o", "value", "guid",
                   snapshot).decode().strip()

    def run_import(self, data, *words):
        return subprocess.run([IMPORT, "--dir", self.serve_dir, *words, *WORDS], input=data,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env={**os.environ, "PYTHON": sys.executable}, timeout=PATIENCE * 3)

    def publish(self, data, *words):
        result = self.run_import(data, *words)
        self.assertEqual((result.returncode, result.stderr), (0, b""))
        return result.stdout.decode().strip()

    def download(self, server, uuid):
        """(manifest, bytes) as imgadm gets them from a dsapi source, unpacked."""
        manifest = server.get(f"/datasets/{uuid}").json()
        [file] = manifest["files"]
        answer = server.get(file["url"])
        self.assertEqual((answer.status, len(answer.body)), (200, file["size"]))
        unpack = {"gzip": ("gzip", "-dc"), "bzip2": ("bzip2", "-dc"), "xz": ("xz", "-dc"),
                  "none": ("cat",)}[file["compression"]]
        return manifest, run(*unpack, input=answer.body)

    def receive(self, data, name, *options):
        """zfs receive into POOL/name; returns the directory of its files."""
        run("zfs", "receive", *options, f"{self.pool}/{name}", input=data)
        return os.path.join(self.home, "mnt", name)


@check_only("a real pool takes long")
class TestZfs(ZfsCase):
    seconds = 20

    def test_files_come_out_as_they_went_in(self):
        server = self.serve()
        sent = self.send(self.vm + "@one")
        for compression in streams.PACKERS:
            with self.subTest(compression=compression):
                if compression != "none":
                    need(compression)
                    packed = run(compression, input=sent)
                else:
                    packed = sent
                manifest, data = self.download(server, self.publish(packed))
                self.assertEqual(manifest["files"][0]["compression"], compression)
                self.assertEqual(manifest["files"][0]["dataset_guid"],
                                 self.guid(self.vm + "@one"))
                self.assertEqual(data, sent)
                received = self.receive(data, compression)
                self.assertEqual(self.contents(received), self.first)

    def test_an_incremental_image(self):
        server = self.serve()
        full = self.publish(self.send(self.vm + "@one"))
        part = self.send("-i", self.vm + "@one", self.clone + "@two")
        refused = self.run_import(part)
        self.assertEqual(refused.returncode, 1)
        self.assertIn(b"no origin is given", refused.stderr)
        uuid = self.publish(part, "--origin", full)
        manifest, data = self.download(server, uuid)
        self.assertEqual(manifest["origin"], full)
        self.receive(self.download(server, full)[1], "chain")
        received = self.receive(data, "onchain")      # a name of its own, as imgadm has it
        self.assertEqual(self.contents(received), self.second)

    def test_an_incremental_image_on_the_wrong_origin(self):
        other = self.publish(self.send(self.vm + "@two"))
        refused = self.run_import(self.send("-i", self.vm + "@one", self.clone + "@two"),
                                  "--origin", other)
        self.assertEqual((refused.returncode, refused.stdout), (1, b""))
        self.assertIn(b"does not build on", refused.stderr)

    def test_an_increment_of_no_clone_has_nowhere_to_go(self):
        server = self.serve()
        full = self.publish(self.send(self.vm + "@one"))
        part = self.send("-i", self.vm + "@one", self.vm + "@two")
        refused = self.run_import(part, "--origin", full)
        self.assertEqual((refused.returncode, refused.stdout), (1, b""))
        self.assertIn(b"not that of a clone", refused.stderr)
        self.receive(self.download(server, full)[1], "lone")
        # ZFS refuses it; older ones put it into the origin: the new name is never there.
        fresh = self.pool + "/fresh"
        subprocess.run(["zfs", "receive", fresh], input=part, stderr=subprocess.DEVNULL,
                       timeout=PATIENCE * 3)
        there = subprocess.run(["zfs", "list", fresh], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, timeout=PATIENCE)
        self.assertNotEqual(there.returncode, 0)

    def test_packages(self):
        server = self.serve()
        run("zfs", "create", self.pool + "/single")
        with open(os.path.join(self.home, "mnt", "single", "file"), "wb") as file:
            file.write(b"alone")
        run("zfs", "snapshot", self.pool + "/single@only")
        for number, (option, snapshot, wanted) in enumerate((
                ("-p", self.vm + "@two", self.second),
                ("-R", self.pool + "/single@only", {"file": b"alone"}))):
            with self.subTest(option=option):
                sent = self.send(option, snapshot)
                _, data = self.download(server, self.publish(sent))
                received = self.receive(data, f"package{number}")
                self.assertEqual(self.contents(received), wanted)
                refused = self.run_import(sent[:-312])
                self.assertIn(b"end record is missing", refused.stderr)

    def test_packages_of_several_snapshots(self):
        full = self.publish(self.send(self.vm + "@one"))
        for words in (("-R", self.vm + "@two"), ("-R", "-I", "@one", self.vm + "@two")):
            with self.subTest(words=words):
                refused = self.run_import(self.send(*words), "--origin", full)
                self.assertEqual((refused.returncode, refused.stdout), (1, b""))
                self.assertRegex(refused.stderr, b"several snapshots|not that of a clone")

    def test_padding_behind_the_end(self):
        sent = self.send(self.vm + "@one")
        for number, padding in enumerate((b"\n", bytes(512), bytes(10240))):
            with self.subTest(padding=len(padding)):
                self.publish(sent + padding)
                received = self.receive(sent + padding, f"padded{number}")
                self.assertEqual(self.contents(received), self.first)

    def test_cut_streams_are_refused(self):
        sent = self.send(self.vm + "@two")
        for size in (312, 313, 5000, len(sent) // 3, len(sent) // 2, len(sent) - 312,
                     len(sent) - 1):
            for compression in ("gzip", "none"):
                with self.subTest(size=size, compression=compression):
                    refused = self.run_import(streams.pack(sent[:size], compression))
                    self.assertEqual((refused.returncode, refused.stdout), (1, b""))
                    self.assertRegex(refused.stderr, rb"\Aimgserver: image refused: [^\n]+\n\Z")
                    self.assertEqual(os.listdir(self.serve_dir), [])

    def test_check_finds_a_real_stream_cut(self):
        sent = self.send(self.vm + "@one")
        uuid = self.publish(sent)
        write_image(self.serve_dir, uuid, streams.pack(sent[:-400]))
        result = subprocess.run(
            [sys.executable, os.path.join(ROOT, "imgserver.py"), "check", "--dir",
             self.serve_dir], stdout=subprocess.PIPE)
        self.assertEqual(result.returncode, 1)
        self.assertIn(b"end record is missing", result.stdout)
