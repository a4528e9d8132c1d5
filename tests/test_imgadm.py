"""imgadm 3.9.5, 2.6.13 and 1 list, show, import and update every image of a mixed directory."""

import collections
import os
import shutil

from tests import imgadm, streams, support
from tests.support import uuid_of

Example = collections.namedtuple("Example", "uuid stream path compression listed")

ZVOL = {"type": "zvol", "nic_driver": "virtio", "disk_driver": "virtio", "cpu_type": "host"}


class Directory:
    """Writes images of all kinds and remembers what is in them."""

    def __init__(self, serve_dir):
        self.serve_dir = serve_dir
        self.examples = []

    def add(self, write, kind, path, **fields):
        uuid = uuid_of(len(self.examples) + 1)
        stream = f"the stream of {uuid}\n".encode() * 500
        write(self.serve_dir, uuid, streams.pack(stream, kind), path=path, **fields)
        self.examples.append(Example(uuid, stream, path, kind,
                                     not fields.get("disabled")))
        return uuid

    def v1(self, compression, path, **fields):
        return self.add(support.write_image, compression, path, **fields)

    def v2(self, compression, path, **fields):
        return self.add(support.write_v2, compression, path, compression=compression, **fields)


def mixed(serve_dir):
    """Every kind of image that has ever been in a serve_dir."""
    made = Directory(serve_dir)
    made.v1("gzip", "image.zfs.gz")
    made.v1("gzip", "empty-creator.zfs.gz", creator_uuid="", vendor_uuid="")
    made.v1("bzip2", "no-creator.zfs.bz2", creator_uuid=None)
    made.v1("xz", "image.zfs.xz")
    made.v1("none", "image.zfs")
    made.v1("gzip", "an image.zfs.gz")
    made.v1("gzip", "100%#?+\u00e9;&=.zfs.gz")
    made.v1("gzip", "short-time.zfs.gz", published_at="2011-12-13T14:15Z", created_at=None)
    made.v1("gzip", "letters.zfs.gz", description="gr\u00f6\u00dfer \U0001f600")
    made.v1("gzip", "zvol.zvol.gz", image_size="10240", **ZVOL)
    made.v2("gzip", "image.zfs.gz")
    made.v2("bzip2", "image.zfs.bz2", description="b", tags={"role": "db", "x": [1, {"y": None}]})
    made.v2("xz", "image.zfs.xz", homepage="https://example.com/")
    made.v2("none", "image.zfs", published_at="2020-01-02T03:04:00Z")
    made.v2("gzip", "zvol", image_size=10240, **ZVOL)
    made.v2("bzip2", "named-by-its-author", users=[{"name": "root"}], requirements={
        "min_platform": {"7.0": "20141030T081701Z"}, "brand": "bhyve", "bootrom": "uefi"})
    # Three deep, in each format, in both, and over an origin that is no longer listed.
    base = made.v1("gzip", "base.zfs.gz")
    middle = made.v1("bzip2", "middle.zfs.bz2", origin=base)
    made.v1("none", "top.zfs", origin=middle)
    base = made.v2("gzip", "base.zfs.gz")
    middle = made.v2("none", "middle.zfs", origin=base)
    made.v2("bzip2", "top.zfs.bz2", origin=middle)
    base = made.v1("bzip2", "base.zfs.bz2", creator_uuid="")
    middle = made.v2("gzip", "middle", origin=base, disabled=True)
    made.v1("gzip", "top.zfs.gz", origin=middle)
    return made.examples


def takes(client, example):
    """Whether this imgadm can install an image, whatever the server does."""
    if isinstance(client, imgadm.Imgadm1):
        # It unpacks .gz and .bz2, and hands the path to curl as it is: no space, no "%".
        return example.compression != "xz" and example.path.isascii() \
            and not set(example.path) & set(" %#?")
    return example.compression in client.compressions


HOSTS = ("images.example.com", "images.example.com:8080", "[2001:db8::1]:80")
PATHS = {"dsapi": "/datasets", "imgapi": ""}


class MixedDirectory(support.ServerCase):

    def setUp(self):
        super().setUp()
        self.examples = mixed(self.serve_dir)
        self.listed = {example.uuid for example in self.examples if example.listed}
        self.address = self.serve().address

    def each(self, test):
        """Call test(client) for every generation, kind of source and Host."""
        for kind, path in PATHS.items():
            for host in HOSTS:
                for generation in (imgadm.Imgadm3, imgadm.Imgadm2):
                    source = imgadm.Source(f"http://{host}{path}", self.address)
                    self.assertEqual(source.kind, kind)
                    with self.subTest(client=generation.__name__, url=source.url), \
                            generation([source]) as client:
                        test(client)

    def test_ping(self):
        self.each(lambda client: client.ping())

    def test_avail_is_every_active_image_once(self):
        def test(client):
            uuids = [manifest["uuid"] for manifest in client.avail()]
            self.assertEqual(sorted(uuids), sorted(self.listed))
        self.each(test)

    def test_show_has_what_the_list_has(self):
        def test(client):
            listed = {manifest["uuid"]: manifest for manifest in client.avail()}
            for example in self.examples:
                shown = client.show(example.uuid)
                self.assertEqual(shown["uuid"], example.uuid)
                if example.listed:
                    self.assertEqual(shown, listed[example.uuid])
        self.each(test)

    def test_shown_v2_manifests_can_be_installed(self):
        def test(client):
            if client.sources[0].kind == "imgapi":
                for manifest in client.avail():
                    imgadm.check_minimal_manifest(manifest)
        self.each(test)

    def test_import_then_update(self):
        """Every stream arrives as it was made, and an update has nothing to say after it."""
        def test(client):
            wanted = [example for example in self.examples if takes(client, example)]
            for example in wanted:
                if example.listed:
                    self.assertEqual(client.import_image(example.uuid), example.stream, example)
                else:
                    with self.assertRaisesRegex(imgadm.Failure, "ActiveImageNotFound"):
                        client.import_image(example.uuid)
            for example in wanted:             # what is not listed came as an origin
                self.assertEqual(client.datasets[example.uuid], example.stream)
            self.assertEqual(client.update(), {})
        self.each(test)

    def test_import_brings_the_whole_chain(self):
        chain = [example.uuid for example in self.examples[-3:]]

        def test(client):
            client.import_image(chain[-1])
            self.assertEqual(sorted(client.installed), sorted(chain))
        self.each(test)

    def test_a_path_in_the_url_of_a_dsapi_source_is_forgotten(self):
        source = imgadm.Source("http://images.example.com/some/prefix/datasets/", self.address)
        with imgadm.Imgadm3([source]) as client:
            self.assertEqual(len(client.avail()), len(self.listed))
            example = self.examples[0]
            self.assertEqual(client.import_image(example.uuid), example.stream)

    def test_imgadm_1(self):
        for path in ("/datasets", "/datasets/"):
            with self.subTest(path=path):
                client = imgadm.Imgadm1("http://images.example.com" + path, self.address)
                self.assertEqual(set(client.update()), self.listed)
                for urn, published in client.avail():
                    self.assertRegex(urn, "^[^:]+:[^:]+:[^:]+:[^:]+$")
                    self.assertRegex(published, "^20[0-9-]{8}T")
                for example in self.examples:
                    if example.listed and takes(client, example):
                        self.assertEqual(client.import_image(example.uuid), example.stream)

    def test_answers_are_stable_byte_for_byte(self):
        """Also from a server that has just been started, over the same directory."""
        servers = [self.serve(), self.serve()]
        targets = ["/datasets", "/images"]
        targets += [f"/{api}/{example.uuid}" for api in ("datasets", "images")
                    for example in self.examples]
        for target in targets:
            with self.subTest(target=target):
                answers = {server.get(target).body for server in servers for _ in range(2)}
                self.assertEqual(len(answers), 1)


class UrlsOfAnOldConfiguration(support.ServerCase):
    """prefix and suffix only change the host in a url, which imgadm does not look at."""

    def test_import(self):
        examples = mixed(self.serve_dir)[:3]
        for prefix, suffix in (("https://", ""), ("http://", ":8080"), ("http://a.", ".org:1")):
            server = self.serve(config={"prefix": prefix, "suffix": suffix})
            source = imgadm.Source("http://images.example.com/datasets", server.address)
            with self.subTest(prefix=prefix, suffix=suffix), imgadm.Imgadm3([source]) as client:
                for example in examples:
                    self.assertEqual(client.import_image(example.uuid), example.stream)


class Faults(support.ServerCase):

    def each(self, test, *servers):
        """Call test(client) for both kinds of source, with one source at each server."""
        for kind, path in PATHS.items():
            sources = [imgadm.Source("http://images.example.com" + path, server.address)
                       for server in servers or [self.serve()]]
            with self.subTest(kind=kind), imgadm.Imgadm3(sources) as client:
                test(client)

    def assertNotFound(self, client, uuid):
        with self.assertRaisesRegex(imgadm.Failure, "ActiveImageNotFound"):
            client.import_image(uuid)

    def test_what_one_source_has_not_the_next_is_asked_for(self):
        other = os.path.join(self.directory, "other")
        os.mkdir(other)
        base, top = uuid_of(1), uuid_of(2)
        support.write_image(other, base, streams.pack(b"base"))
        support.write_image(self.serve_dir, top, streams.pack(b"top"), origin=base)

        def test(client):
            self.assertEqual(client.import_image(top), b"top")
            self.assertEqual(client.datasets[base], b"base")
            self.assertEqual(len(client.avail()), 2)
        self.each(test, self.serve(serve_dir=other), self.serve())

    def test_unknown_image(self):
        def test(client):
            self.assertIsNone(client.show(uuid_of(9)))
            self.assertNotFound(client, uuid_of(9))
        self.each(test)

    def test_empty_directory(self):
        def test(client):
            client.ping()
            self.assertEqual(client.avail(), [])
        self.each(test)

    def test_origin_that_nobody_has(self):
        support.write_image(self.serve_dir, uuid_of(2), streams.pack(b"top"), origin=uuid_of(1))

        def test(client):
            with self.assertRaisesRegex(imgadm.Failure, "image not found"):
                client.import_image(uuid_of(2))
        self.each(test)

    def test_origins_in_a_cycle_are_never_seen(self):
        """Of one, of two, and what rests on a cycle: imgadm would follow it for ever."""
        origins = {1: 1, 2: 3, 3: 2, 4: 3, 5: None}
        for number, origin in origins.items():
            support.write_image(self.serve_dir, uuid_of(number), streams.pack(b"x"),
                                origin=origin and uuid_of(origin))

        def test(client):
            self.assertEqual([manifest["uuid"] for manifest in client.avail()], [uuid_of(5)])
            for number in (1, 2, 3, 4):
                self.assertNotFound(client, uuid_of(number))
        self.each(test)

    def test_disabled_image(self):
        support.write_v2(self.serve_dir, uuid_of(1), streams.pack(b"x"), disabled=True)
        support.write_v2(self.serve_dir, uuid_of(2), streams.pack(b"x"), state="disabled")
        support.write_image(self.serve_dir, uuid_of(3), streams.pack(b"x"), disabled=True)

        def test(client):
            self.assertEqual(client.avail(), [])
            for number in (1, 2, 3):
                self.assertIs(client.show(uuid_of(number))["disabled"], True)
                self.assertNotFound(client, uuid_of(number))
        self.each(test)

    def test_image_removed_between_show_and_import(self):
        def test(client):
            support.write_image(self.serve_dir, uuid_of(1), streams.pack(b"x"))
            self.assertIsNotNone(client.show(uuid_of(1)))
            shutil.rmtree(os.path.join(self.serve_dir, uuid_of(1)))
            self.assertNotFound(client, uuid_of(1))
        self.each(test)

    def test_errors_are_json_objects(self):
        support.write_image(self.serve_dir, uuid_of(1), streams.pack(b"x"))
        server = self.serve()
        for target in ("/nothing", "/images/nothing", "/datasets/nothing", f"/images/{uuid_of(9)}",
                       f"/images/{uuid_of(9)}/file", f"/images/{uuid_of(1)}/file?index=1",
                       f"/datasets/{uuid_of(1)}/nothing", "/ping?error=Internal"):
            with self.subTest(target=target):
                answer = server.get(target)
                self.assertGreaterEqual(answer.status, 400)
                self.assertEqual(answer.headers["content-type"], "application/json")
                self.assertIn("error (", str(imgadm.error_of(answer)))


class Client(support.ServerCase):
    """The client itself refuses what imgadm refuses, or the tests above would say nothing."""

    def expect(self, message, change, client=imgadm.Imgadm3, kind="dsapi"):
        """Importing fails with `message` where `change` is Python that spoils the server."""
        support.write_image(self.serve_dir, uuid_of(1), streams.pack(b"x" * 100))
        server = self.serve(prelude=change)
        source = imgadm.Source("http://images.example.com" + PATHS[kind], server.address)
        with self.subTest(message=message), client([source]) as one:
            with self.assertRaisesRegex(imgadm.Failure, message):
                one.import_image(uuid_of(1))

    def test_spoilt_answers(self):
        spoil = ("was = imgserver.ImageReader._check_file\n"
                 "def check(*args):\n"
                 "    file = was(*args)\n"
                 "    {}\n"
                 "    return file\n"
                 "imgserver.ImageReader._check_file = check\n")
        self.expect("checksum", spoil.format("file['sha1'] = 'ab' * 20"))
        self.expect("mismatch between expected size", spoil.format("file['size'] += 1") +
                    "imgserver.file_of = lambda *_: imgserver.Response("
                    "200, b'', b'short')")
        self.expect("compression", spoil.format("file['compression'] = 'xz'"), imgadm.Imgadm2)
        self.expect('did not include a "Content-MD5"', "imgserver.MD5_LIMIT = 0",
                    imgadm.Imgadm2, "imgapi")
        self.expect("unescaped", "imgserver.urllib.parse.quote = lambda text, **_: text + ' '")
