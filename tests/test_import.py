"""import-image and imgserver.py import: what is published, what is refused, what is left."""

import argparse
import concurrent.futures
import contextlib
import glob
import gzip
import hashlib
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import imgserver
from tests import streams
from tests.support import (CHECK, IMGSERVER, NOBODY, PATIENCE, ROOT, Program, ServerCase,
                           all_in_check, check_only, default_signals, need, run_program, uuid_of,
                           wait_for, write_image)

IMPORT = os.path.join(ROOT, "import-image")
SHELLS = {"dash": ["dash"], "ksh93": ["ksh93"], "bash": ["bash"], "busybox": ["busybox", "sh"]}
STREAM = streams.stream()
IMAGE = streams.pack(STREAM)
WORDS = ("web", "1.0.0", "A web server")

# Texts that a shell, a printf or a path might make something of.
HOSTILE = ("two  spaces", "$(touch hacked)", "`touch hacked`", "; touch hacked", "it's", '"', "\\",
           "\\n", "a\nb", "trailing\n", "\u00e9", "-n", "--", "-a", "--uuid=x", "../x", "*",
           "%s%n", "a=b", "", "x" * 2000, "&& touch hacked", "\x01\x7f")


def installed(shells):
    """The command lines of the shells that are here."""
    return [shell for shell in shells.values() if shutil.which(shell[0])]


def stand_in(directory):
    """The path of a Python that prints its words, with a NUL behind each."""
    path = os.path.join(directory, "python")
    with open(path, "w") as file:
        file.write("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    os.chmod(path, 0o755)
    return path


class ImportCase(ServerCase):

    def command(self, *words, shell=()):
        """The command line of import-image, the script."""
        return [*shell, IMPORT, "--dir", self.serve_dir, *words]

    def environment(self):
        return {**os.environ, "PYTHON": sys.executable}

    def run_import(self, *words, data=IMAGE, command=None, **options):
        """Run import-image to its end with `data` as its standard input.

        The quick tests pass by the script, if no command line is given: see support.Program.
        """
        if command is None and not CHECK:
            return run_program("import-image", "--dir", self.serve_dir, *words, data=data,
                               **options)
        options.setdefault("env", self.environment())
        return subprocess.run(command or self.command(*words), input=data,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              timeout=PATIENCE * 3, **options)

    def start(self, *words, **options):
        """Start import-image, with pipes of which its standard input has nothing in it."""
        for name in ("stdin", "stdout", "stderr"):
            options.setdefault(name, subprocess.PIPE)
        if CHECK:
            process = subprocess.Popen(self.command(*words), env=self.environment(), **options)
        else:
            process = Program("import-image", "--dir", self.serve_dir, *words, **options)
        self.addCleanup(self.end_import, process)
        return process

    def begun_files(self):
        """The paths of image files that are being written."""
        return glob.glob(os.path.join(self.serve_dir, ".incoming-*", ".file.*"))

    @staticmethod
    def end_import(process):
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def assertPublished(self, result):
        """The import went well and said nothing but a uuid, which is returned."""
        self.assertEqual((result.returncode, result.stderr), (0, b""))
        uuid = result.stdout.decode().rstrip("\n")
        self.assertRegex(uuid, r"\A[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
        return uuid

    def assertRefused(self, result, pattern=".", left=()):
        """The import failed in one sentence that matches, and left nothing behind."""
        self.assertNotEqual(result.returncode, 0)
        self.assertEqual(result.stdout, b"")
        message = result.stderr.decode()
        self.assertRegex(message, r"\A[^\n]+\n\Z")
        self.assertRegex(message, pattern)
        self.assertEqual(sorted(os.listdir(self.serve_dir)), sorted(left))

    def manifest(self, uuid):
        with open(os.path.join(self.serve_dir, uuid, "manifest.json"), "rb") as file:
            return json.loads(file.read().decode("ascii"))

    def publish(self, *words, **options):
        """Import, and return (uuid, manifest)."""
        uuid = self.assertPublished(self.run_import(*words, **options))
        return uuid, self.manifest(uuid)


class TestWords(ImportCase):
    seconds = 5

    def check_word(self, place, text):
        """Publish with `text` for NAME, VERSION or DESCRIPTION."""
        words = list(WORDS)
        words[place] = text
        field = ("name", "version", "description")[place]
        rule = (r"[A-Za-z0-9._/ -]{1,1024}", r"[A-Za-z0-9._/+-]{1,512}", r"(?s).*")[place]
        result = self.run_import("--", *words, cwd=self.directory)
        if not re.fullmatch(rule, text):
            self.assertNotEqual(result.returncode, 0)
            self.assertRegex(result.stderr.decode(),
                             rf"\Aimgserver: {field} (takes [^\n]+|is missing)\n\Z")
            return
        manifest = self.manifest(self.assertPublished(result))
        self.assertEqual(manifest.get(field, ""), text)
        self.assertNotIn("/", manifest["files"][0]["path"])

    def assertNotHacked(self):
        self.assertEqual(sorted(os.listdir(self.directory)), ["images"])
        for name in os.listdir(self.serve_dir):
            self.assertEqual(len(os.listdir(os.path.join(self.serve_dir, name))), 2)

    def test_hostile_descriptions(self):
        for text in HOSTILE:
            with self.subTest(text=text):
                self.check_word(2, text)
        self.assertNotHacked()

    def test_hostile_names_and_versions(self):
        for text in ("two  spaces", "$(touch hacked)", "it's", "a\nb", "trailing\n", "\u00e9",
                     "-n", "--", "../x", "*", "", "x" * 2000):
            for place in (0, 1):
                with self.subTest(text=text, place=place):
                    self.check_word(place, text)
        self.assertNotHacked()

    def test_hostile_words_under_every_shell(self):
        """import-image passes each of them on as it is; one of all of them is published."""
        python = stand_in(tempfile.mkdtemp(dir=self.directory))
        for shell in installed(SHELLS):
            for words in (*((text,) for text in HOSTILE if text), HOSTILE):
                with self.subTest(shell=shell, words=words):
                    result = self.run_import(command=self.command("--", *words, shell=shell),
                                             env={"PYTHON": python}, cwd=self.directory)
                    self.assertEqual(
                        (result.returncode, *result.stdout.decode().split("\0")),
                        (0, "-I", os.path.join(ROOT, "imgserver.py"), "import-image", "--dir",
                         self.serve_dir, "--", *words, ""))
        shutil.rmtree(os.path.dirname(python))
        for shell in installed(SHELLS):
            with self.subTest(shell=shell):
                text = "\n".join(HOSTILE)
                _, manifest = self.publish(cwd=self.directory, command=self.command(
                    "--", "web", "1", text, shell=shell))
                self.assertEqual(manifest["description"], text)
        self.assertNotHacked()

    def test_words_that_are_refused_before_any_byte_is_read(self):
        write_image(self.serve_dir, uuid_of(1))
        cases = (
            (("web", "1.0"), "NAME VERSION DESCRIPTION are needed"),
            ((*WORDS, "homepage"), "is not FIELD=VALUE"),
            ((*WORDS, "=x"), "is not FIELD=VALUE"),
            ((*WORDS, "-n"), "options come before NAME"),
            ((*WORDS, "uuid=x"), "uuid cannot be set"),
            ((*WORDS, "files=[]"), "files cannot be set"),
            ((*WORDS, "homepage=ftp://x"), r"homepage must be an http\(s\) URL"),
            ((*WORDS, "hompage=http://x/"), "hompage is no field of a manifest"),
            ((*WORDS, "min_ram=512"), "min_ram is no field of a manifest, but one of its req"),
            ((*WORDS, "requirements={\"brands\": 1}"), "requirements.brands is no requirement"),
            ((*WORDS, "requirements={brand: lx}"), "requirements must be a JSON object"),
            ((*WORDS, "tags=[1]"), "tags must be a JSON object"),
            ((*WORDS, "disabled=no"), "disabled must be true or false, not 'no'"),
            ((*WORDS, "public=no"), "public must be true or false, not 'no'"),
            ((*WORDS, "acl=x"), "acl must be a list"),
            ((*WORDS, "cloud_name={}"), "cloud_name must be a text without"),
            ((*WORDS, "creator_uuid=x"), "creator_uuid must be a UUID in lower case"),
            ((*WORDS, "created_at=yesterday"), "created_at must look like"),
            ((*WORDS, "published_at=today"), "published_at must look like"),
            ((*WORDS, "image_size=10"), "image_size is for type zvol only"),
            (("--os", "beos", *WORDS), "os must be one of"),
            (("--type", "tape", *WORDS), "type must be one of"),
            (("--uuid", uuid_of(10).upper(), *WORDS), "not a UUID in lower case"),
            (("--uuid", "../x", *WORDS), "not a UUID in lower case"),
            (("--uuid", uuid_of(1), *WORDS), "already exists"),
            (("--origin", "x", *WORDS), "origin must be a UUID in lower case"),
            (("--origin", uuid_of(9), *WORDS), "origin image .* does not exist"),
            (("--manifest", "/nowhere"), "cannot read /nowhere"),
            (("--file", "/nowhere", *WORDS), "cannot read /nowhere"),
            (("web", "1.0", b"\xff\xfe"), "is not UTF-8"),
            ((*WORDS, b"urn=\xff\xfe"), "is not UTF-8"),
        )
        for words, pattern in cases:
            with self.subTest(words=words):
                process = self.start(*words)
                # Nothing is ever written to the pipe, nor is it closed.
                process.wait(PATIENCE)
                result = subprocess.CompletedProcess(
                    words, process.returncode, process.stdout.read(), process.stderr.read())
                self.assertRefused(result, pattern, left=[uuid_of(1)])

    def test_a_description_without_its_quotes(self):
        for words in (("web", "1.0", "A", "web", "server"), (*WORDS, "homepage"),
                      (*WORDS, "description=A", "server")):
            with self.subTest(words):
                result = self.run_import(*words)
                self.assertRefused(result, "is not FIELD=VALUE: a description .* needs quotes")
                self.assertEqual(result.returncode, 2)

    def test_a_refusal_names_few_channels(self):
        config = os.path.join(self.directory, "config.json")
        with open(config, "w") as file:
            json.dump({"channels": [{"name": f"c{number}"} for number in range(100)]}, file)
        self.assertRefused(
            self.run_import("--config", config, *WORDS, f'channels=["{"x" * 1000}"]'),
            r"there is no channel 'x{99}\.\.\. in the configuration, but c0, c1, c2, c3, c4, and "
            r"95 more\.\.\.\n\Z")

    def test_fields_are_texts_or_json(self):
        cases = (
            ("homepage=https://example.com/?a=b", "homepage", "https://example.com/?a=b"),
            ('requirements={"min_ram": 512}', "requirements", {"min_ram": 512}),
            ('tags={"a": "\u00e9", "b": 1}', "tags", {"a": "\u00e9", "b": 1}),
            ("generate_passwords=true", "generate_passwords", True),
            ('users=[{"name": "root"}]', "users", [{"name": "root"}]),
            ("eula=http://example.com/", "eula", "http://example.com/"),
            ("urn={not json", "urn", "{not json"),
            ("creator_name=$(id)", "creator_name", "$(id)"),
            ("name=2024", "name", "2024"), ("version=4.10", "version", "4.10"),
            ("description=5", "description", "5"),
            ("published_at=2020-01-02T03:04:05Z", "published_at", "2020-01-02T03:04:05Z"),
        )
        _, manifest = self.publish(*WORDS, *[case[0] for case in cases])
        for _, field, value in cases:
            with self.subTest(field=field):
                self.assertEqual(manifest[field], value)

    def test_options_and_their_ends(self):
        for words in (("--", *WORDS), ("--os", "linux", *WORDS), ("--os=linux", "-q", *WORDS),
                      ("--uuid", uuid_of(7), "--", *WORDS)):
            with self.subTest(words=words):
                _, manifest = self.publish(*words)
                self.assertEqual((manifest["name"], manifest["description"]),
                                 (WORDS[0], WORDS[2]))
        self.assertIn(uuid_of(7), os.listdir(self.serve_dir))

    def test_help_and_usage(self):
        for shell in installed(SHELLS):               # to which it is the script that answers
            with self.subTest(shell=shell):
                self.assertUsage(self.run_import(command=[*shell, IMPORT]))
        result = self.run_import(command=[IMPORT, "-h"])
        self.assertEqual((result.returncode, result.stderr), (0, b""))
        self.assertIn(b"NAME VERSION DESCRIPTION", result.stdout)
        for words in (("-x",), ("-x", *WORDS), ("--manifest",), ("-nx", *WORDS)):
            with self.subTest(words=words):
                self.assertUsage(self.run_import(*words))

    def assertUsage(self, result):
        self.assertEqual((result.returncode, result.stdout), (2, b""))
        self.assertTrue(result.stderr.startswith(b"usage: import-image "))

    def test_every_option_of_import(self):
        """import-image passes on all that `imgserver.py import` knows, with its value."""
        sub = argparse.ArgumentParser()
        imgserver.add_options(sub, imgserver.IMPORTING)
        values = {"--os": "linux", "--type": "other", "--uuid": uuid_of(7),
                  "--file": os.path.join(self.directory, "image")}
        with open(values["--file"], "wb") as file:
            file.write(IMAGE)
        for action in sub._actions:
            for option in action.option_strings:
                if option in ("-h", "--help", "--manifest", "--origin"):
                    continue
                words = [option] if action.nargs == 0 else [option, values[option]]
                if option == "--no-stream-check":
                    words += ["--type", "other"]
                with self.subTest(option=option):
                    result = self.run_import(*words, "web", "1", "--os")
                    uuid = self.assertPublished(result)
                    for name in os.listdir(self.serve_dir):
                        self.assertTrue(name.endswith(uuid), name)
                        with open(os.path.join(self.serve_dir, name, "manifest.json")) as file:
                            self.assertEqual(json.load(file)["description"], "--os")
                        shutil.rmtree(os.path.join(self.serve_dir, name))

    def test_options_behind_a_name(self):
        for words in ((*WORDS, "--dir", "/x"), (*WORDS, "-n"), ("web", "--dir", "/x", "1", "d"),
                      (*WORDS, "--os=linux"), (*WORDS, "homepage=http://x", "-q"),
                      ("--manifest", "m.json", "public=true", "--file", "x")):
            with self.subTest(words=words):
                result = self.run_import(*words)
                self.assertRefused(result, "options come before NAME, but '-")
                self.assertEqual(result.returncode, 2)


class TestManifest(ImportCase):

    def test_every_field_of_a_new_manifest(self):
        config = os.path.join(self.directory, "config.json")
        with open(config, "w") as file:
            json.dump({"image-creator": "acme", "image-creator-uuid": uuid_of(5),
                       "image-vendor-uuid": uuid_of(6)}, file)
        uuid, manifest = self.publish("--config", config, *WORDS)
        self.assertRegex(manifest["published_at"], r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")
        self.assertEqual(manifest, {
            "uuid": uuid, "name": "web", "version": "1.0.0", "description": "A web server",
            "published_at": manifest["published_at"], "created_at": manifest["published_at"],
            "type": "zone-dataset", "os": "smartos", "platform_type": "smartos",
            "cloud_name": "acme", "creator_name": "acme", "urn": "acme:acme:web:1.0.0",
            "creator_uuid": uuid_of(5), "vendor_uuid": uuid_of(6),
            "files": [{"path": "web-1.0.0.zfs.gz", "sha1": hashlib.sha1(IMAGE).hexdigest(),
                       "size": len(IMAGE), "md5": hashlib.md5(IMAGE).hexdigest(),
                       "md5_of": hashlib.sha1(IMAGE).hexdigest(),
                       "sha256": hashlib.sha256(IMAGE).hexdigest(),
                       "compression": "gzip", "dataset_guid": str(streams.GUID)}]})

    def test_without_a_creator_it_is_nobodys(self):
        config = os.path.join(self.directory, "config.json")
        with open(config, "w") as file:
            file.write("{}")
        _, manifest = self.publish("--config", config, *WORDS)
        self.assertEqual((manifest["creator_uuid"], manifest["vendor_uuid"]), (NOBODY, NOBODY))

    def test_channels(self):
        config = os.path.join(self.directory, "config.json")
        default, dev = {"name": "release", "default": True}, {"name": "dev"}
        for configured, words, wanted in (
                ([], (), None), ([default, dev], (), ["release"]),
                ([default, dev], ("channels=[]",), ["release"]),
                ([default, dev], ('channels=["dev"]',), ["dev"]),
                ([dev], ('channels=["dev"]',), ["dev"]),
                ([dev], (), "channels must be given"),
                ([default, dev], ('channels=["dev", "other"]',), "there is no channel 'other'"),
                ([default, dev], ("channels=dev",), "channels must be a list")):
            with self.subTest(configured=configured, words=words):
                with open(config, "w") as file:
                    json.dump({"channels": configured}, file)
                before = os.listdir(self.serve_dir)
                result = self.run_import("--config", config, *WORDS, *words)
                if isinstance(wanted, str):
                    self.assertRefused(result, wanted, left=before)
                else:
                    manifest = self.manifest(self.assertPublished(result))
                    self.assertEqual(manifest.get("channels"), wanted)

    def test_both_apis_serve_it(self):
        uuid, _ = self.publish(*WORDS)
        server = self.serve()
        [v1], [v2] = server.get("/datasets").json(), server.get("/images").json()
        self.assertEqual((v1["uuid"], v1["urn"]), (uuid, "internal:internal:web:1.0.0"))
        self.assertEqual((v2["v"], v2["uuid"], v2["state"]), (2, uuid, "active"))
        path = v1["files"][0]["url"].partition("images.example.com")[2]
        answer = server.get(path)
        self.assertEqual((answer.status, answer.body), (200, IMAGE))
        self.assertIn("content-md5", answer.headers)

    def test_modes_whatever_the_umask_is(self):
        uuid = self.assertPublished(self.run_import(
            command=["sh", "-c", 'umask 077; exec "$@"', "sh", *self.command(*WORDS)]))
        directory = os.path.join(self.serve_dir, uuid)
        self.assertEqual(os.stat(directory).st_mode & 0o777, 0o755)
        for name in os.listdir(directory):
            self.assertEqual(os.stat(os.path.join(directory, name)).st_mode & 0o777, 0o644)

    def pair(self, **changes):
        """A manifest and a file as imgadm create writes them; their paths."""
        manifest = {"v": 2, "uuid": uuid_of(8), "name": "pair", "version": "2.0", "os": "smartos",
                    "type": "zone-dataset", "requirements": {"min_ram": 64},
                    "files": [{"size": len(IMAGE), "compression": "gzip",
                               "sha1": hashlib.sha1(IMAGE).hexdigest()}]}
        manifest["files"][0].update(changes.pop("file", {}))
        manifest.update(changes)
        paths = [os.path.join(self.directory, name) for name in ("x.imgmanifest", "x.zfs.gz")]
        for path, data in zip(paths, (json.dumps(manifest).encode(), IMAGE)):
            with open(path, "wb") as file:
                file.write(data)
        return ("--manifest", paths[0], "--file", paths[1])

    def test_a_pair_of_manifest_and_file_keeps_its_manifest(self):
        uuid, manifest = self.publish(*self.pair(state="unactivated"), "homepage=http://a/")
        self.assertEqual(uuid, uuid_of(8))
        self.assertEqual((manifest["v"], manifest["name"], manifest["requirements"]),
                         (2, "pair", {"min_ram": 64}))
        self.assertEqual(manifest["homepage"], "http://a/")
        self.assertNotIn("creator_uuid", manifest)
        image = self.serve().get(f"/images/{uuid}").json()
        self.assertEqual((image["state"], image["owner"]), ("active", NOBODY))

    def test_a_field_without_a_value_is_removed(self):
        _, manifest = self.publish(*self.pair(homepage="http://a/", tags={"a": 1}), "homepage=",
                                   "tags=")
        self.assertEqual({"homepage", "tags"} & set(manifest), set())

    def test_a_pair_as_imgadm_create_writes_it(self):
        for number, (changes, texts) in enumerate((
                ({"version": 1, "name": 2024}, {"version": "1", "name": "2024"}),
                ({"description": 5}, {"description": "5"}),
                ({"version": 1.5, "urn": True}, {"version": "1.5", "urn": "true"})), 20):
            with self.subTest(changes):
                _, manifest = self.publish(*self.pair(**changes), "--uuid", uuid_of(number))
                self.assertEqual({key: manifest[key] for key in changes}, texts)

    def test_a_manifest_as_imgadm_get_prints_it(self):
        options = self.pair(version="7.5")
        with open(options[1]) as file:
            manifest = json.load(file)
        with open(options[1], "w") as file:
            json.dump({"manifest": manifest, "zpool": "zones", "source": "http://a"}, file)
        uuid, manifest = self.publish(*options)
        self.assertEqual((uuid, manifest["version"]), (uuid_of(8), "7.5"))
        self.assertNotIn("zpool", manifest)

    def test_a_pair_read_from_standard_input(self):
        uuid, _ = self.publish(*self.pair()[:2], "--uuid", uuid_of(11))
        self.assertEqual(uuid, uuid_of(11))

    def test_a_pair_that_does_not_match(self):
        for file, pattern in (({"sha1": "0" * 40}, "its sha1 is [0-9a-f]*, not 0000"),
                              ({"size": 5}, "its size is [0-9]*, not 5"),
                              ({"compression": "xz"}, "its compression is gzip, not xz"),
                              ({"dataset_guid": "5"}, "its dataset_guid is [0-9]*, not 5"),
                              ({"path": "../../x"}, "plain file name")):
            with self.subTest(file=file):
                self.assertRefused(self.run_import(*self.pair(file=file)), pattern)

    def test_a_number_for_a_guid_is_mended(self):
        _, manifest = self.publish(*self.pair(file={"dataset_guid": streams.GUID}))
        self.assertEqual(manifest["files"][0]["dataset_guid"], str(streams.GUID))

    def test_whose_it_is_and_who_may_see_it(self):
        for words, owner, public, acl in (
                (("public=false", f"owner={uuid_of(5)}"), uuid_of(5), False, None),
                (("public=false", f'acl=["{uuid_of(6)}"]'), NOBODY, False, [uuid_of(6)]),
                ((f"owner={uuid_of(5)}",), uuid_of(5), True, None),
                ((f"creator_uuid={uuid_of(5)}", "public=false"), uuid_of(5), False, None),
                ((f"restricted_to_uuid={uuid_of(6)}", f"owner={uuid_of(5)}"), uuid_of(5), False,
                 [uuid_of(6)]),
                ((f"creator_uuid={uuid_of(5)}",), uuid_of(5), True, None)):
            with self.subTest(words):
                uuid, _ = self.publish(*WORDS, *words, 'requirements={"min_ram": 64}')
                server = self.serve()
                image = server.get(f"/images/{uuid}").json()
                self.assertEqual((image["owner"], image["public"], image.get("acl")),
                                 (owner, public, acl))
                self.assertEqual((image["name"], image["requirements"]), ("web", {"min_ram": 64}))
                self.assertEqual(server.get(f"/datasets/{uuid}").status, 200)

    def test_manifests_that_are_none(self):
        path = os.path.join(self.directory, "m")
        for data in (b"", b"{" + b" " * (1 << 20) + b"}", b"{", b"[]", b'"x"', b'{"files": {}}',
                     b'{"files": [5]}', b'{"files": [{}, {}]}', b"\xff", b'{"name": NaN}',
                     b"[" * 100000, b'{"v": 2, "uuid": 5}'):
            with self.subTest(data=data[:20]):
                with open(path, "wb") as file:
                    file.write(data)
                self.assertRefused(self.run_import("--manifest", path))


class TestData(ImportCase):

    def test_sound_data(self):
        tail = streams.stream(b"x" * 3000, order=">")
        two = streams.pack(STREAM[:400]) + streams.pack(STREAM[400:])
        cases = [(f"{kind} {order}", streams.pack(streams.stream(order=order), kind), kind)
                 for kind in streams.PACKERS for order in "<>"]
        cases += [("two members", two, "gzip"), ("zero padding", IMAGE + bytes(512), "gzip"),
                  ("a package", streams.package(STREAM), "none"),
                  ("a big-endian package", streams.package(tail, order=">"), "none"),
                  ("a long property list",
                   streams.package(STREAM, properties=b"p" * 9000), "none")]
        for name, data, compression in cases:
            with self.subTest(name):
                uuid, manifest = self.publish(*WORDS, data=data)
                [file] = manifest["files"]
                self.assertEqual(
                    (file["compression"], file["size"], file["sha1"], file["dataset_guid"]),
                    (compression, len(data), hashlib.sha1(data).hexdigest(), str(streams.GUID)))
                self.assertEqual(file["path"], "web-1.0.0.zfs" + streams.SUFFIXES[compression])
                with open(os.path.join(self.serve_dir, uuid, file["path"]), "rb") as stored:
                    self.assertEqual(stored.read(), data)

    def test_refused_data(self):
        middle = len(IMAGE) // 2
        flipped = bytearray(streams.pack(streams.stream(streams.noise(5000))))
        flipped[2500] ^= 0xff
        cases = [(f"{kind} of a cut stream", streams.pack(STREAM[:-1], kind), "is cut short")
                 for kind in streams.PACKERS]
        cases += [(f"{kind} that is cut", streams.pack(STREAM, kind)[:-9], f"{kind} data is cut")
                  for kind in ("gzip", "bzip2", "xz")]
        cases += [
            ("empty", b"", "there is no data"),
            ("one byte", b"x", "no ZFS send stream"),
            ("a text", b"not a stream\n" * 99, "no ZFS send stream"),
            ("gzip of nothing", streams.pack(b""), "no ZFS send stream"),
            ("gzip of a text", streams.pack(b"x" * 1000), "no ZFS send stream"),
            ("only the magic of gzip", b"\x1f\x8b", "cut short"),
            ("corrupt gzip", bytes(flipped), "gzip data is corrupt"),
            ("gzip and garbage", IMAGE + b"garbage", "gzip data is followed by other bytes"),
            ("gzip and one byte", IMAGE + b"x", "gzip data is followed by other bytes"),
            ("bzip2 and garbage", streams.pack(STREAM, "bzip2") + b"\ngarbage",
             "bzip2 data is followed by other bytes"),
            ("xz and a newline", streams.pack(STREAM, "xz") + b"\n", "xz data is cut short"),
            ("corrupt xz", streams.pack(STREAM, "xz").replace(b"7zXZ", b"7zXZ\0\1"), "corrupt"),
            ("half of it", IMAGE[:middle], "cut short"),
            ("the first record alone", STREAM[:streams.RECORD], "end record is missing"),
            ("the end of another", STREAM[:-312] + streams.end(5, "<"), "end record is missing"),
            ("a package without its end", streams.package(STREAM)[:-312], "end record is missing"),
            ("a package of what is cut", streams.package(STREAM[:-312]), "end record is missing"),
            ("bytes behind the end", STREAM + b"12345678", "end record is missing"),
            ("a zvol", streams.stream(kind=streams.ZVOL), "is that of a zvol"),
            ("incremental", streams.stream(from_guid=5), "no origin is given"),
        ]
        for name, data, pattern in cases:
            with self.subTest(name):
                self.assertRefused(self.run_import(*WORDS, data=data), pattern)

    def test_a_cut_at_any_record_is_seen(self):
        data = streams.stream(b"a" * 64)
        for size in (1, 100, 311, 312, 313, 624, 680, len(data) - 312, len(data) - 1):
            with self.subTest(size=size):
                self.assertRefused(self.run_import(*WORDS, data=data[:size]), "image refused")

    def test_a_zvol(self):
        fields = ("image_size=10240", "cpu_type=host", "disk_driver=virtio", "nic_driver=virtio")
        data = streams.pack(streams.stream(kind=streams.ZVOL, order=">"))
        _, manifest = self.publish("--type", "zvol", "--os", "linux", *WORDS, *fields, data=data)
        self.assertEqual((manifest["type"], manifest["image_size"]), ("zvol", 10240))
        self.assertEqual(manifest["files"][0]["path"], "web-1.0.0.zvol.gz")
        self.assertEqual(self.serve().get("/images").json()[0]["image_size"], 10240)

    def test_an_incremental_image(self):
        origin, _ = self.publish(*WORDS)
        data = streams.stream(guid=77, from_guid=streams.GUID)
        _, manifest = self.publish("--origin", origin, *WORDS, data=data)
        self.assertEqual(manifest["origin"], origin)
        left = os.listdir(self.serve_dir)
        other = streams.stream(guid=77, from_guid=5)
        self.assertRefused(self.run_import("--origin", origin, *WORDS, data=other),
                           "does not build on", left)
        self.assertRefused(self.run_import("--origin", origin, *WORDS, data=STREAM),
                           "not incremental", left)

    def test_what_is_no_stream_has_a_type_that_is_none(self):
        self.assertRefused(self.run_import("--no-stream-check", *WORDS, data=b"a tarball"),
                           "--no-stream-check needs another --type")

    def test_standard_input_that_does_not_block(self):
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        process = self.start("--uuid", uuid_of(3), *WORDS, stdin=reader)
        os.close(reader)
        wait_for(self.begun_files, "the import")

        def waits():
            with open(f"/proc/{process.pid}/wchan") as where:
                return re.search("poll|select", where.read())
        wait_for(waits, "its first wait")
        with open(writer, "wb") as file:
            file.write(IMAGE)
        output, errors = process.communicate(timeout=PATIENCE)
        self.assertPublished(subprocess.CompletedProcess((), process.returncode, output, errors))

    def test_what_is_no_stream_on_demand(self):
        uuid, manifest = self.publish("--no-stream-check", "--type", "other", *WORDS,
                                      data=b"a tarball")
        self.assertNotIn("dataset_guid", manifest["files"][0])
        self.assertEqual(self.serve().get(f"/datasets/{uuid}").status, 200)

    def test_no_standard_input_at_all(self):
        self.assertRefused(self.run_import(
            command=["sh", "-c", 'exec "$@" <&-', "sh", *self.command(*WORDS)]))

    @check_only("hundreds of MiB")
    def test_memory_stays_flat(self):
        need("gzip")
        piece = streams.noise(1 << 20)           # a bomb of zeros would be one chunk when packed
        for name, squeeze, count in (("none", False, 192), ("gzip", True, 80)):
            with self.subTest(name):
                process = self.start(*WORDS)
                packer = None
                target = process.stdin
                if squeeze:
                    packer = subprocess.Popen(["gzip", "-1"], stdin=subprocess.PIPE,
                                              stdout=process.stdin)
                    target = packer.stdin
                target.write(streams.begin(streams.FILE_SYSTEM, 1, 0, "<"))
                for _ in range(count):
                    target.write(piece)
                target.flush()
                with open(f"/proc/{process.pid}/status") as file:
                    peak = int(re.search(r"VmHWM:\s+(\d+) kB", file.read())[1])
                target.write(streams.end(1, "<"))
                target.close()
                if packer:
                    process.stdin.close()
                    self.assertEqual(packer.wait(PATIENCE), 0)
                # Before it ends, all of it must be on the disk.
                self.assertEqual(process.wait(PATIENCE * 3), 0, "the import failed")
                self.assertLess(peak, 64 << 10)


class TestTrouble(ImportCase):

    def test_a_full_disk(self):
        data = streams.stream(streams.noise(300 << 10))
        for shell in all_in_check([(), *installed(SHELLS)]):
            with self.subTest(shell=shell):
                # POSIX counts blocks of 512 bytes; bash takes KiB.  Both are far too few.
                result = self.run_import(data=data, command=[
                    "sh", "-c", 'ulimit -f 100; exec "$@"', "sh",
                    *self.command(*WORDS, shell=shell)])
                self.assertRefused(result, "the image cannot be stored: File too large")
        self.publish(*WORDS, data=data)

    def test_nowhere_to_print_the_uuid(self):
        with open("/dev/full", "wb") as full:
            process = self.start(*WORDS, stdout=full)
            errors = process.communicate(IMAGE)[1]
        [uuid] = os.listdir(self.serve_dir)
        self.assertEqual(process.returncode, 1)
        self.assertRegex(errors.decode(), rf"\A[^\n]*image {uuid} is stored[^\n]*\n\Z")

    def test_no_room_for_the_manifest(self):
        # The image is small enough, the manifest with its long description is not.
        result = self.run_import(command=[
            "sh", "-c", 'ulimit -f 4; exec "$@"', "sh", *self.command("web", "1", "d" * 9000)])
        self.assertRefused(result, "the image cannot be stored|cannot write")

    def test_a_directory_that_is_not_there(self):
        shutil.rmtree(self.serve_dir)
        result = self.run_import(*WORDS)
        os.mkdir(self.serve_dir)
        self.assertRefused(result, "the image cannot be stored: No such file")

    def begun(self, **options):
        """An import in the middle of its data."""
        process = self.start(*WORDS, **options)
        process.stdin.write(STREAM[:-100])
        process.stdin.flush()
        wait_for(self.begun_files, "the image's file")
        return process

    def test_signals(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            with self.subTest(number=number):
                self.serve_dir = os.path.join(self.directory, number.name)
                os.mkdir(self.serve_dir)
                process = self.begun(preexec_fn=default_signals)
                process.send_signal(number)
                process.wait(PATIENCE)
                self.assertEqual(process.returncode, 128 + number)
                self.assertRefused(subprocess.CompletedProcess(
                    (), process.returncode, process.stdout.read(), process.stderr.read()),
                    f"ended by {number.name}")

    def test_a_signal_that_ends_no_system_call(self):
        # It comes to another thread, or just before the call: the read itself goes on.
        result = subprocess.run([sys.executable, "-c", """if True:
            import os, re, signal, sys, threading, time
            import imgserver

            def end():
                while not re.search("poll|select", open(f"/proc/{os.getpid()}/wchan").read()):
                    time.sleep(0.01)
                signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

            threading.Thread(target=end, daemon=True).start()
            console = imgserver.Console()
            console.arm()
            try:
                console.wait(reading=[os.pipe()[0]])
            except imgserver.UserError as error:
                sys.exit(error.exit_status)
            """], cwd=ROOT, timeout=PATIENCE)
        self.assertEqual(result.returncode, 128 + signal.SIGTERM)

    def test_a_signal_that_the_caller_ignores(self):
        process = self.begun(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        process.send_signal(signal.SIGHUP)
        output, errors = process.communicate(STREAM[-100:], timeout=PATIENCE)
        self.assertPublished(subprocess.CompletedProcess((), process.returncode, output, errors))

    def test_a_signal_while_a_file_keeps_it_waiting(self):
        pipe = os.path.join(self.directory, "pipe")
        os.mkfifo(pipe)
        for words in (("--manifest", pipe), ("--file", pipe, *WORDS)):
            with self.subTest(words[0]):
                process = self.start(*words)
                with open(pipe, "wb"):    # which waits until the import opens it
                    process.send_signal(signal.SIGTERM)
                    process.wait(PATIENCE)
                self.assertRefused(subprocess.CompletedProcess(
                    (), process.returncode, process.stdout.read(), process.stderr.read()),
                    "ended by SIGTERM")

    def test_a_pipe_that_nobody_opens_keeps_no_signal_away(self):
        pipe = os.path.join(self.directory, "pipe")
        os.mkfifo(pipe)
        process = self.start("--file", pipe, *WORDS)
        wait_for(self.begun_files, "the import")
        process.terminate()
        self.assertEqual(process.wait(PATIENCE), 128 + signal.SIGTERM)
        self.assertEqual(os.listdir(self.serve_dir), [])
        process = self.start("--file", pipe, *WORDS)
        wait_for(self.begun_files, "the import")
        with open(pipe, "wb") as file:
            file.write(IMAGE)
        output, errors = process.communicate(timeout=PATIENCE)
        self.assertPublished(subprocess.CompletedProcess((), process.returncode, output, errors))

    def test_a_signal_while_standard_input_does_not_block(self):
        reader, writer = os.pipe()
        self.addCleanup(os.close, writer)
        os.set_blocking(reader, False)
        process = self.start(*WORDS, stdin=reader)
        os.close(reader)
        wait_for(self.begun_files, "the import")
        process.terminate()
        self.assertEqual(process.wait(PATIENCE), 128 + signal.SIGTERM)
        self.assertEqual(os.listdir(self.serve_dir), [])

    def test_a_signal_once_the_image_is_on_show_changes_nothing(self):
        send = "imgserver.os.kill(imgserver.os.getpid(), imgserver.signal.SIGTERM)"
        for name, prelude in (
                ("before it is synced", f"""
sync = imgserver.Publisher._sync
def synced(*words):
    {send}
    sync(*words)
imgserver.Publisher._sync = synced
"""), ("at the very end", f"""
main = imgserver.main
def ended():
    status = main()
    {send}
    return status
imgserver.main = ended
""")):
            with self.subTest(name):
                self.assertPublished(run_program("import", "--dir", self.serve_dir, *WORDS,
                                                 data=IMAGE, prelude=prelude))

    def test_a_signal_while_nobody_reads_the_uuid(self):
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        os.set_blocking(writer, True)
        process = self.start("--uuid", uuid_of(4), *WORDS, stdout=writer)
        os.close(writer)
        process.stdin.write(IMAGE)
        process.stdin.close()
        wait_for(lambda: os.listdir(self.serve_dir) == [uuid_of(4)], "the image")
        process.terminate()
        self.assertEqual(process.wait(PATIENCE), 1)
        self.assertIn(b"is stored, but that cannot be printed: ended by SIGTERM",
                      process.stderr.read())

    def test_a_signal_while_nobody_reads_the_complaint(self):
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        os.set_blocking(writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        os.set_blocking(writer, True)
        flag = os.path.join(self.directory, "flag")
        process = Program("import", "--dir", self.serve_dir, *WORDS, prelude=f"""
complain = imgserver.Console.complain
def complaining(console, text):
    open({flag!r}, "w").close()
    complain(console, text)
imgserver.Console.complain = complaining
""", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=writer)
        os.close(writer)
        self.addCleanup(process.kill)
        wait_for(lambda: os.path.exists(flag), "the complaint")
        with self.assertRaises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.terminate()
        self.assertEqual(process.wait(PATIENCE), 1)
        self.assertEqual(os.listdir(self.serve_dir), [])

    def test_a_signal_where_an_exception_would_be_lost(self):
        # Python drops what is raised in __del__; the command must end all the same.
        code = """if True:
            import os, signal, sys
            import imgserver

            class Dropped:
                def __del__(self):
                    os.kill(os.getpid(), signal.SIGTERM)

            class Stream(imgserver.SendStream):
                def __init__(self):
                    super().__init__()
                    Dropped()

            imgserver.SendStream = Stream
            sys.exit(imgserver.main())
            """
        result = self.run_import(command=[
            sys.executable, "-c", code, "import", "--dir", self.serve_dir, *WORDS])
        self.assertEqual(result.returncode, 128 + signal.SIGTERM)
        self.assertRefused(result, "ended by SIGTERM")

    def test_the_sender_goes_away(self):
        process = self.begun()
        output, errors = process.communicate(timeout=PATIENCE)
        self.assertRefused(subprocess.CompletedProcess((), process.returncode, output, errors),
                           "cut short")

    def ended_at_random(self, number, data, most):
        """Send a signal some time after the start; returns the exit status and output."""
        process = subprocess.Popen([sys.executable, IMGSERVER, "import", "--dir", self.serve_dir,
                                    *WORDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        timer = threading.Timer(random.uniform(0, most), process.send_signal, [number])
        timer.start()
        output, errors = process.communicate(data, timeout=PATIENCE)
        timer.cancel()
        return process.returncode, output.decode().strip(), errors

    def many_ended(self, number, times):
        data = gzip.compress(streams.stream(streams.noise(1 << 20)), 1, mtime=0)
        began = time.monotonic()
        self.publish(*WORDS, data=data)
        most = 2 * (time.monotonic() - began)     # two run at a time
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(self.ended_at_random, number, data, most) for _ in range(times)]
            yield from (run.result() for run in concurrent.futures.as_completed(runs))

    @check_only("random moments")
    def test_term_at_random_moments_leaves_all_or_nothing(self):
        published = set()
        for status, uuid, errors in self.many_ended(signal.SIGTERM, 40):
            self.assertNotIn(b"Traceback", errors)
            if status == 0:
                published.add(uuid)
            else:
                self.assertIn(status, (-signal.SIGTERM, 128 + signal.SIGTERM))
        left = os.listdir(self.serve_dir)
        self.assertEqual([name for name in left if name.startswith(".")], [])
        self.assertEqual(len(left), len(published) + 1)

    @check_only("random moments")
    def test_kill_at_random_moments_never_shows_half_an_image(self):
        server = self.serve()
        seen, faults, ended = set(), [], threading.Event()

        def read():
            """Poll the list, and fetch whatever is new in it."""
            while not ended.is_set():
                with server.connect() as connection:
                    for image in connection.request("/datasets").json():
                        if image["uuid"] in seen:
                            continue
                        seen.add(image["uuid"])
                        [file] = image["files"]
                        answer = connection.request(
                            f"/datasets/{image['uuid']}/{file['path']}")
                        if hashlib.sha1(answer.body).hexdigest() != file["sha1"] \
                                or len(answer.body) != file["size"]:
                            faults.append(image)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            whole = [uuid for status, uuid, _ in self.many_ended(signal.SIGKILL, 100)
                     if status == 0]
            uuid, _ = self.publish(*WORDS)
            wait_for(lambda: uuid in seen, "the image that was imported last")
        finally:
            ended.set()
            reader.join()
        self.assertEqual(faults, [])
        self.assertLessEqual(set(whole), seen)
        self.assertNotIn("left out", server.log())


class TestSteps(ImportCase):

    def test_two_imports_at_once(self):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(self.publish, *WORDS) for _ in range(2)]
        self.assertEqual({run.result()[0] for run in runs}, set(os.listdir(self.serve_dir)))
        self.assertEqual(len(os.listdir(self.serve_dir)), 2)

    def test_the_same_uuid_twice_at_once(self):
        first = self.start("--uuid", uuid_of(3), *WORDS)
        wait_for(lambda: os.listdir(self.serve_dir), "the first import")
        self.assertRefused(self.run_import("--uuid", uuid_of(3), *WORDS), "is being imported",
                           left=[".incoming-" + uuid_of(3)])
        first.communicate(IMAGE, timeout=PATIENCE)
        self.assertEqual(os.listdir(self.serve_dir), [uuid_of(3)])

    def test_discarded_and_imported_again_meanwhile(self):
        for words in (), ("-n",):
            with self.subTest(words):
                first = self.start("--uuid", uuid_of(3), *words, *WORDS)
                wait_for(self.begun_files, "the first import")
                result = run_program("discard", "--dir", self.serve_dir, uuid_of(3))
                self.assertEqual((result.returncode, result.stderr), (0, b""))
                self.assertPublished(self.run_import("--uuid", uuid_of(3), "-n", *WORDS))
                output, errors = first.communicate(IMAGE, timeout=PATIENCE)
                self.assertRefused(
                    subprocess.CompletedProcess((), first.returncode, output, errors),
                    "was discarded", left=[".incoming-" + uuid_of(3)])
                result = run_program("activate", "--dir", self.serve_dir, uuid_of(3))
                self.assertEqual((result.returncode, result.stderr), (0, b""))
                shutil.rmtree(os.path.join(self.serve_dir, uuid_of(3)))

    def test_not_activated_then_activated(self):
        server = self.serve()
        uuid = self.assertPublished(self.run_import("-n", *WORDS))
        self.assertEqual(os.listdir(self.serve_dir), [".incoming-" + uuid])
        self.assertEqual(server.get("/datasets").json(), [])
        self.assertEqual(server.get(f"/datasets/{uuid}").status, 404)
        result = self.run_import("-a", uuid)
        self.assertEqual((result.returncode, result.stdout, result.stderr), (0, b"", b""))
        self.assertEqual([image["uuid"] for image in server.get("/datasets").json()], [uuid])
        self.assertRefused(self.run_import("-a", uuid), "is already activated", left=[uuid])
        self.assertRefused(self.run_import("-d", uuid), "no image .* waits", left=[uuid])

    def test_not_activated_then_discarded(self):
        uuid = self.assertPublished(self.run_import("-n", *WORDS))
        self.assertEqual(self.run_import("-d", uuid).returncode, 0)
        self.assertRefused(self.run_import("-d", uuid), "no image .* waits")
        self.assertRefused(self.run_import("-a", uuid), "no image .* waits")

    def test_steps_with_what_is_no_uuid(self):
        os.mkdir(os.path.join(self.directory, "x"))
        for step in ("-a", "-d"):
            for word in ("../x", "x", "", "*", "-n", uuid_of(10).upper()):
                with self.subTest(step=step, word=word):
                    self.assertRefused(self.run_import(step, "--", word), "is not a UUID")
        self.assertTrue(os.path.isdir(os.path.join(self.directory, "x")))

    def test_an_import_that_is_not_done_is_not_activated(self):
        self.start("--uuid", uuid_of(3), *WORDS)
        wait_for(lambda: os.listdir(self.serve_dir), "the import")
        self.assertRefused(self.run_import("-a", uuid_of(3)), "is still being written",
                           left=[".incoming-" + uuid_of(3)])

    def on_terminal(self, *words):
        """What import-image writes on a terminal while an image comes slowly."""
        ours, theirs = pty.openpty()
        process = self.start(*words, stdout=subprocess.DEVNULL, stderr=theirs)
        os.close(theirs)
        data = streams.stream(bytes(2 << 20))
        process.stdin.write(data[:1 << 20])
        process.stdin.flush()
        wait_for(lambda: [path for path in self.begun_files() if os.stat(path).st_size],
                 "the first bytes")
        time.sleep(0.3)                           # progress is shown four times a second
        process.stdin.write(data[1 << 20:])
        process.stdin.close()
        self.assertEqual(process.wait(PATIENCE), 0)
        shown = b""
        try:
            while True:
                more = os.read(ours, 4096)
                if not more:
                    break
                shown += more
        except OSError:                           # Linux: the other side is closed
            pass
        os.close(ours)
        shutil.rmtree(self.serve_dir)
        os.mkdir(self.serve_dir)
        return shown

    def test_progress_on_a_terminal_alone(self):
        self.assertRegex(self.on_terminal(*WORDS), rb"\d+ MB, \d+ MB/s")
        self.assertEqual(self.on_terminal("-q", *WORDS), b"")
        self.publish(*WORDS)                      # asserts that nothing is on stderr


class TestScript(ImportCase):
    """How import-image finds imgserver.py and a Python."""

    def copy(self, directory, libraries="/opt/local/bin"):
        """import-image and imgserver.py in a directory, looking for Pythons in another."""
        os.makedirs(directory, exist_ok=True)
        shutil.copy(IMGSERVER, directory)
        with open(IMPORT) as file:
            text = file.read()
        path = os.path.join(directory, "import-image")
        with open(path, "w") as file:
            file.write(text.replace("/opt/local/bin/python3", f"'{libraries}'/python3"))
        os.chmod(path, 0o755)
        return path

    def test_it_finds_imgserver_beside_itself(self):
        need("dash", "ksh93", "busybox")
        home = os.path.join(self.directory, "-a path's $HOME")
        script = self.copy(home)
        links = os.path.join(self.directory, "links")
        os.mkdir(links)
        os.symlink(script, os.path.join(links, "absolute"))
        os.symlink("../-a path's $HOME/import-image", os.path.join(links, "relative"))
        os.symlink("relative", os.path.join(links, "twice"))
        path = {**self.environment(), "PATH": links + ":" + os.environ["PATH"]}
        cases = [([script], self.directory, None),
                 (["./import-image"], home, None),
                 (["sh", "./-a path's $HOME/import-image"], self.directory, None),
                 (["twice"], home, path),
                 (["sh", "import-image"], home, None)]
        cases += [([*shell, os.path.join(links, name)], self.directory, None)
                  for shell in SHELLS.values() for name in ("absolute", "relative", "twice")]
        python = stand_in(self.directory)
        for command, directory, environment in cases:
            with self.subTest(command=command):
                result = self.run_import(
                    command=[*command, *WORDS], cwd=directory,
                    env={**(environment or os.environ), "PYTHON": python},
                    executable=shutil.which(command[0], path=path["PATH"])
                    if environment else None)
                self.assertEqual((result.returncode, result.stderr), (0, b""))
                found = result.stdout.decode().split("\0")[1]
                self.assertTrue(os.path.samefile(os.path.join(directory, found),
                                                 os.path.join(home, "imgserver.py")), found)
        self.assertPublished(self.run_import(command=[
            "sh", os.path.join(links, "twice"), "--dir", self.serve_dir, *WORDS]))

    def test_nothing_is_imported_from_the_images(self):
        """Neither from its own directory, nor the current one, nor from PYTHONPATH."""
        script = self.copy(self.serve_dir)
        for name in ("argparse", "json", "sitecustomize", "_strptime", "bz2"):
            with open(os.path.join(self.serve_dir, name + ".py"), "w") as file:
                file.write("import sys\nsys.exit('imported')\n")
        environment = {**self.environment(), "PYTHONPATH": self.serve_dir}
        for words in (WORDS, ("-n", *WORDS), ("-h",)):
            with self.subTest(words=words):
                result = self.run_import(command=[script, "--dir", self.serve_dir, *words],
                                         cwd=self.serve_dir, env=environment)
                self.assertEqual((result.returncode, result.stderr), (0, b""))

    def find(self, shell, libraries, path, python=""):
        script = self.copy(os.path.join(self.directory, "home"), libraries)
        return subprocess.run([shutil.which(shell[0]), *shell[1:], script, "-p"],
                              env={"PATH": path, "PYTHON": python}, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, encoding="utf-8")

    def python(self, directory, name, status=0):
        """A Python of no use but to be found; status is what its test for 3.9 ends with."""
        os.makedirs(directory, exist_ok=True)
        path = os.path.join(directory, name)
        with open(path, "w") as file:
            file.write(f"#!/bin/sh\nexit {status}\n")
        os.chmod(path, 0o755)
        return path

    def test_which_python(self):
        opt, bin_, old, empty = (os.path.join(self.directory, name)
                                 for name in ("opt local", "bin", "old", "empty"))
        for name in ("python3.8", "python3.9", "python3.10", "python3.13", "python3.13-config",
                     "python3.9m"):
            self.python(opt, name)
        self.python(opt, "python3.14")
        os.chmod(os.path.join(opt, "python3.14"), 0o644)
        self.python(empty, "python3.7")
        python3 = self.python(bin_, "python3")
        self.python(old, "python3", 1)
        for shell in installed(SHELLS):
            for libraries, path, python, wanted in (
                    (opt, bin_, "", os.path.join(opt, "python3.13")),
                    (opt, bin_, python3, python3),
                    (empty, bin_, "", python3),
                    (empty, bin_, "python3", python3),
                    (empty, old, "", None),
                    (empty, empty, "", None),
                    (opt, bin_, "python99", None)):
                with self.subTest(shell=shell, libraries=libraries, path=path, python=python):
                    result = self.find(shell, libraries, path, python)
                    if wanted is None:
                        self.assertEqual((result.returncode, result.stdout), (1, ""))
                        self.assertRegex(result.stderr, r"\Aimport-image: [^\n]+\n\Z")
                    else:
                        self.assertEqual((result.returncode, result.stdout, result.stderr),
                                         (0, wanted + "\n", ""))

    def test_shellcheck(self):
        need("shellcheck")
        subprocess.run(["shellcheck", "-s", "sh", IMPORT], check=True)
