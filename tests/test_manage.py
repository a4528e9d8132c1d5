"""Commands that list and change images, and config --check; in this process where that will do."""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import imgserver
from tests import streams
from tests.support import (PATIENCE, Program, ServerCase, ask, readable, run_program, uuid_of,
                           write_image, write_manifest, write_v2)

U, V, W, X = map(uuid_of, range(1, 5))
DAY = 24 * 3600
CHANNELS = [{"name": "release", "default": True}, {"name": "dev"}]


class Said:
    """In the place of a Console: no signal comes, and what is said is kept."""

    def __init__(self):
        self.text = ""

    def check(self):
        pass

    def say(self, text):
        self.text += text + "\n"


class ManageCase(ServerCase):

    def manage(self, *words, **config):
        """(exit status, lines) of a command that ends well.  Raises UserError and ApiError."""
        options = imgserver.option_parser().parse_args(words, argparse.Namespace(
            config=None, dir=self.serve_dir, listen=None, loglevel=None))
        options.console = Said()
        config = imgserver.Config({"serve_dir": self.serve_dir, **config})
        status = options.run(config, options)
        return status, options.console.text.splitlines()

    def refused(self, pattern, *words, **config):
        """A command is refused in these words, and changes nothing."""
        before = self.tree()
        with self.assertRaisesRegex((imgserver.UserError, imgserver.ApiError), pattern) as caught:
            self.manage(*words, **config)
        self.assertEqual(self.tree(), before)
        return caught.exception

    def tree(self):
        """Every file below serve_dir with its bytes."""
        found = {}
        for directory, _, names in os.walk(self.serve_dir):
            for name in names:
                with open(os.path.join(directory, name), "rb") as file:
                    found[directory, name] = file.read()
        return found

    def stored(self, uuid):
        with open(os.path.join(self.serve_dir, uuid, "manifest.json"), "rb") as file:
            return json.load(file)

    def set_aside(self, uuid, age=0):
        """Make an image one that is not active, last changed `age` seconds ago."""
        path = os.path.join(self.serve_dir, ".incoming-" + uuid)
        os.rename(os.path.join(self.serve_dir, uuid), path)
        then = time.time() - age
        for name in [*os.listdir(path), ""]:
            os.utime(os.path.join(path, name), (then, then))
        return path

    def listed(self, *words, **config):
        """The uuids of `list`."""
        return [line[:36] for line in self.manage("list", "-p", *words, **config)[1]]


class TestList(ManageCase):

    def fill(self):
        write_image(self.serve_dir, U, b"12345", published_at="2013-01-01T00:00:00Z")
        write_v2(self.serve_dir, V, name="web", os="linux", type="lx-dataset", disabled=True,
                 published_at="2012-01-01T00:00:00.500Z", tags={"role": "db"},
                 channels=["dev", "release"])
        write_v2(self.serve_dir, W, name="web 2", origin=U, published_at="2014-01-01T00:00:00Z")
        self.set_aside(W)

    def test_columns(self):
        self.fill()
        status, lines = self.manage("list")
        self.assertEqual(status, 0)
        self.assertEqual(lines[:4], [
            "UUID                                 NAME  VERSION OS      TYPE         SIZE STATE  "
            "     PUBLISHED            ORIGIN",
            f"{V} web   2.0.0   linux   lx-dataset   17   disabled    2012-01-01T00:00:00Z -",
            f"{U} test  1.0.0   smartos zone-dataset 5    active      2013-01-01T00:00:00Z -",
            f"{W} web 2 2.0.0   smartos zone-dataset 17   unactivated -                    {U}"])
        self.assertEqual(lines[4], "")
        self.assertRegex(lines[5], f"^{W} web 2 2.0.0: waits to be activated, .*: "
                                   f"imgserver.py activate {W}$")
        self.assertEqual(len(lines), 6)
        rows = [line.split("\t") for line in self.manage("list", "-p", channels=CHANNELS)[1]]
        self.assertEqual([(row[1], row[9]) for row in rows],
                         [("web", "dev,release"), ("test", "-"), ("web 2", "-")])

    def test_long_texts_are_cut_for_people_alone(self):
        write_v2(self.serve_dir, U, name="n" * 300)
        self.assertIn(f"{U} {'n' * 33}... 2.0.0", self.manage("list")[1][1])
        self.assertIn("n" * 300, self.manage("list", "-p")[1][0])

    def test_filters(self):
        self.fill()
        for words, found in ((["name=web"], [V]), (["name=~web"], [V, W]), (["os=linux"], [V]),
                             (["type=!lx-dataset"], [U, W]), (["state=active"], [U]),
                             (["state=unactivated"], [W]), ([f"origin={U}"], [W]),
                             (["origin="], [V, U]), ([f"uuid={U}"], [U]), (["tag.role=db"], [V]),
                             (["channels=dev"], [V]), (["name=~web", "state=disabled"], [V]),
                             (["version=7"], []), (["public=true"], [V, U, W])):
            with self.subTest(words):
                self.assertEqual(self.listed(*words), found)
        self.assertEqual(len(self.manage("list", "name=web")[1]), 2)      # nothing else below
        for word in ("colour=red", "name", "files=[]"):
            with self.subTest(word):
                self.assertEqual(self.refused("FIELD=VALUE with one of", "list", word).exit_status,
                                 2)

    def test_json(self):
        self.fill()
        status, lines = self.manage("list", "--json", channels=CHANNELS)
        found = json.loads("\n".join(lines))
        self.assertEqual(status, 0)
        self.assertEqual([image["uuid"] for image in found], [V, U, W])
        self.assertEqual(found[0]["channels"], ["dev", "release"])
        self.assertEqual(found[0]["files"][0]["size"], 17)
        self.assertEqual(json.loads("\n".join(self.manage("list", "-j", "name=x")[1])), [])

    def test_an_empty_directory(self):
        self.assertEqual(len(self.manage("list")[1]), 1)
        self.assertEqual(self.manage("list", "--problems"), (0, []))
        with self.assertRaisesRegex(imgserver.UserError, "cannot list serve_dir"):
            self.manage("list", serve_dir="/nowhere")

    def test_no_image_file_is_read(self):
        for number in range(20):
            write_v2(self.serve_dir, uuid_of(number), files=[{"compression": "gzip"}])
        opened, real = [], imgserver.open_regular

        def spy(path, *words):
            opened.append(os.path.basename(path))
            return real(path, *words)
        with mock.patch("imgserver.open_regular", spy):
            self.assertEqual(len(self.listed()), 20)
            self.assertNotIn("sha1", "".join(self.manage("list", "--json")[1]))
            self.assertEqual(self.manage("list", "--problems"), (0, []))
        self.assertEqual(set(opened), {"manifest.json"})

    def test_terminal_escapes_are_not_passed_on(self):
        write_v2(self.serve_dir, U, name="a\x1b[31m")
        write_v2(self.serve_dir, V, channels=["\x1b[31m"])
        write_v2(self.serve_dir, W, name=["\x1b[31m"])
        text = "".join(self.manage("list", channels=CHANNELS)[1])
        self.assertTrue(text.isascii() and text.isprintable(), text)

    def test_on_the_command_line(self):
        self.fill()
        for words, status in (((), 0), (("--problems",), 1), (("--problems", "name=web"), 2)):
            with self.subTest(words):
                result = run_program("list", "--dir", self.serve_dir, *words)
                self.assertEqual(result.returncode, status, result.stderr)
                self.assertIn(b"waits" if status < 2 else b"nothing else",
                              result.stdout + result.stderr)


    def test_a_reader_that_has_read_enough(self):
        for number in range(2000):
            write_v2(self.serve_dir, uuid_of(number))
        process = Program("list", "--dir", self.serve_dir, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)
        self.assertEqual(process.stdout.read(4), b"UUID")
        process.stdout.close()
        with process.stderr:
            self.assertEqual(process.stderr.read(), b"")
        self.assertEqual(process.wait(PATIENCE), 128 + signal.SIGPIPE)


class TestProblems(ManageCase):

    def problems(self, status=1, **config):
        """The lines of `list --problems`, which are those below `list`, too."""
        found = self.manage("list", "--problems", **config)
        self.assertEqual(found[0], status)
        below = self.manage("list", **config)
        self.assertEqual(below[0], 0)
        self.assertEqual(below[1][-len(found[1]):] if found[1] else [], found[1])
        return found[1]

    def test_what_is_left_out_and_why(self):
        write_v2(self.serve_dir, U, name="web", files=[{"size": 5, "sha1": "0" * 40}])
        write_v2(self.serve_dir, V, os="plan9")
        write_manifest(self.serve_dir, V, b"{")
        os.mkdir(os.path.join(self.serve_dir, W))
        os.rename(shutil.copytree(os.path.join(self.serve_dir, U),
                                  os.path.join(self.serve_dir, "copy")),
                  os.path.join(self.serve_dir, "F" + X[1:]))
        write_v2(self.serve_dir, uuid_of(5), origin=uuid_of(6))
        write_v2(self.serve_dir, uuid_of(6), origin=uuid_of(5))
        write_v2(self.serve_dir, uuid_of(7), origin=uuid_of(6))
        write_v2(self.serve_dir, uuid_of(8), homepage="no URL")
        for line, pattern in zip(self.problems(), (
                rf"{U} web 2.0.0 is left out: .*size is not the 5 bytes",
                rf"{V} is left out: manifest.json is not JSON",
                rf"{W} is left out: there is no manifest.json",
                rf"{uuid_of(5)} test 2.0.0 is left out: its origins form a cycle",
                rf"{uuid_of(6)} test 2.0.0 is left out: its origins form a cycle",
                rf"{uuid_of(7)} test 2.0.0 is left out: its origins form a cycle",
                rf"F{X[1:]} web 2.0.0 is left out: .*lower case",
                rf"{uuid_of(8)} test 2.0.0: homepage 'no URL' must be")):
            self.assertRegex(line, "^" + pattern)
        self.assertEqual(len(self.problems()), 8)
        self.assertEqual(self.listed(), [uuid_of(8)])

    def test_origins_that_imgadm_would_not_find(self):
        write_v2(self.serve_dir, V, origin=U)
        self.assertEqual(self.problems(), [
            f"{V} test 2.0.0: imgadm cannot import it until image {U} is on this server, too: "
            f"imgserver.py mirror URL {U}"])
        write_v2(self.serve_dir, U)
        self.assertEqual(self.problems(0), [])
        self.manage("disable", U)
        self.assertEqual(self.problems(0), [])
        self.set_aside(U)
        self.assertIn(f"{V} test 2.0.0: imgadm cannot import it until image {U} is activated",
                      self.problems())
        shutil.rmtree(os.path.join(self.serve_dir, ".incoming-" + U))
        write_v2(self.serve_dir, U, type="zones")
        self.assertEqual(self.problems()[1:], [
            f"{V} test 2.0.0: imgadm cannot import it until image {U} is on this server, too"])

    def test_what_is_not_active(self):
        for uuid in (U, V, W):
            write_v2(self.serve_dir, uuid)
        self.set_aside(U, 2 * DAY)
        for uuid, age in ((V, 3600), (W, 2 * DAY)):
            path = os.path.join(self.serve_dir, uuid, "image.zfs.gz")
            os.unlink(path)
            self.set_aside(uuid, age)
        write_v2(self.serve_dir, X, state="unactivated")
        os.mkdir(os.path.join(self.serve_dir, ".discarded-" + U))
        for line, pattern in zip(self.problems(), (
                f"{X} test 2.0.0: waits to be activated: its manifest has the state unactivated: "
                f"imgserver.py activate {X}$",
                f".discarded-{U}: is being removed, or was half removed: "
                "imgserver.py check --clean$",
                f"{U} test 2.0.0: waits to be activated, last change 48 hours ago: "
                f"imgserver.py activate {U}$",
                rf"{V} test 2.0.0: is not whole \(.*\), last change 1 hours ago$",
                rf"{W} test 2.0.0: is not whole \(.*\), last change 48 hours ago: "
                "imgserver.py check --clean$")):
            self.assertRegex(line, "^" + pattern)
        self.assertEqual(len(self.problems()), 5)

    def test_channels(self):
        write_v2(self.serve_dir, U, channels=["dev"])
        write_v2(self.serve_dir, V, channels=["release"], origin=U)
        write_v2(self.serve_dir, W)
        self.assertEqual(self.problems(0), [])
        self.assertEqual(self.problems(channels=CHANNELS), [
            f"{V} test 2.0.0: its origin {U} is in none of its channels: imgadm cannot import it "
            "from there",
            f"{W} test 2.0.0: it is in no channel of the configuration, so that nobody sees it "
            f"over IMGAPI: imgserver.py update {W} 'channels=[\"release\"]'"])


class TestChanges(ManageCase):

    def shown(self, site):
        return [image["uuid"] for image in ask(site, "/images").json()]

    def test_disable_and_enable(self):
        write_image(self.serve_dir, U)
        write_v2(self.serve_dir, V)
        write_v2(self.serve_dir, W, state="disabled", disabled=True)
        site = self.site()
        self.assertEqual(self.shown(site), [U, V])
        self.assertEqual(self.manage("disable", U, V, U), (0, [
            f"Disabled image {U} test 1.0.0", f"Disabled image {V} test 2.0.0"]))
        self.assertIs(self.stored(U)["disabled"], True)
        self.assertNotIn("v", self.stored(U))
        self.assertEqual([ask(site, f"/images/{uuid}").json()["state"] for uuid in (U, V)],
                         ["disabled"] * 2)
        self.assertEqual(self.manage("enable", U, W), (0, [
            f"Enabled image {U} test 1.0.0", f"Enabled image {W} test 2.0.0"]))
        self.assertNotIn("disabled", self.stored(U))
        self.assertEqual([ask(site, f"/images/{uuid}").json()["state"] for uuid in (U, V, W)],
                         ["active", "disabled", "active"])

    def test_a_mistake_in_one_of_several_changes_none(self):
        write_image(self.serve_dir, U)
        write_v2(self.serve_dir, V)
        write_manifest(self.serve_dir, V, b"{")
        for verb in ("enable", "disable", "delete"):
            for words, pattern in (((W,), "not found"), (("web",), "'web' is not a UUID"),
                                   ((U.upper().replace("0", "A"),), "lower case")):
                with self.subTest(verb, words=words):
                    self.refused(pattern, verb, U, *words)
        self.refused("not JSON", "disable", U, V)
        write_v2(self.serve_dir, W, origin=U)
        self.refused(f"dependent.*{W}", "delete", V, U)

    def test_what_cannot_be_written_is_named_with_its_directory(self):
        for call in ("new_file", "os.rename"):
            for verb, *words in (("disable",), ("enable",), ("update", "description=x")):
                write_image(self.serve_dir, U, disabled=verb == "enable")
                result = run_program("--dir", self.serve_dir, verb, U, *words, encoding="utf-8",
                                     prelude=f"""
def refuse(name, *words, **places):
    raise PermissionError(13, "Permission denied", name)
imgserver.{call} = refuse
""")
                with self.subTest(verb, call=call):
                    self.assertEqual((result.returncode, result.stderr), (
                        1, "imgserver: cannot write manifest.json: Permission denied "
                           f"({self.serve_dir}/{U}/manifest.json)\n"))

    def test_update(self):
        write_image(self.serve_dir, U, homepage="http://example.com/")
        site = self.site()
        before = ask(site, f"/images/{U}").headers["etag"]
        self.assertEqual(self.manage("update", U, "name=web", "version=4.1", "homepage=",
                                     'tags={"role": "db"}', 'channels=["dev"]'),
                         (0, [f"Updated image {U} web 4.1"]))
        answer = ask(site, f"/images/{U}")
        self.assertNotEqual(answer.headers["etag"], before)
        image = answer.json()
        self.assertEqual((image["name"], image["version"], image["tags"]),
                         ("web", "4.1", {"role": "db"}))
        self.assertNotIn("homepage", image)
        self.assertNotIn("v", self.stored(U))
        self.assertEqual(self.stored(U)["channels"], ["dev"])
        self.manage("update", U, "public=false")
        self.assertEqual((self.stored(U)["v"], self.stored(U)["public"]), (2, False))

    def test_update_by_the_rules_of_import(self):
        write_image(self.serve_dir, U)
        for words, pattern in (("colour=red", "colour is no field"), ("name", "not FIELD=VALUE"),
                               ("name=", "name cannot be removed"), ("v=2", "v cannot be set"),
                               ("min_ram=5", "one of its requirements"),
                               ("os=plan9", "os must be"),
                               ("public=maybe", "public must be true or false"),
                               ("name=\udcff", "not UTF-8"),
                               ('channels=["x"]', "no channel 'x' .*, but release, dev"),
                               ("type=zvol", "Parameter cannot be updated")):
            with self.subTest(words):
                error = self.refused(".", "update", U, "description=fine", words,
                                     channels=CHANNELS)
                texts = [str(error), *(each.get("message", "") for each in
                                       getattr(error, "errors", None) or ())]
                self.assertRegex("; ".join(texts), pattern)

    def test_delete(self):
        for uuid, origin in ((U, None), (V, U), (W, V), (X, None)):
            write_v2(self.serve_dir, uuid, origin=origin)
        site = self.site()
        self.assertEqual(len(self.shown(site)), 4)
        self.refused(f'"{U}" has 1 dependent.*{V}: --force deletes it', "delete", U)
        self.refused(f'"{V}" has 1 dependent.*{W}', "delete", U, V)
        self.assertEqual(self.manage("delete", U, V, W), (0, [
            f"Deleted image {uuid} test 2.0.0" for uuid in (W, V, U)]))
        self.assertEqual(self.shown(site), [X])
        self.assertEqual(os.listdir(self.serve_dir), [X])
        write_v2(self.serve_dir, V, origin=X)
        self.set_aside(V)
        self.refused(f'"{X}" has 1 dependent.*{V}', "delete", X)
        self.manage("delete", "--force", X)
        self.manage("delete", V)
        self.assertEqual(os.listdir(self.serve_dir), [])

    def test_what_cannot_be_shown_can_be_deleted(self):
        write_v2(self.serve_dir, U, origin=V)
        write_v2(self.serve_dir, V, origin=U)
        write_v2(self.serve_dir, W)
        write_manifest(self.serve_dir, W, b"{")
        self.manage("delete", W)
        self.refused("dependent", "delete", U)
        self.manage("delete", "--force", U, V)
        self.assertEqual(os.listdir(self.serve_dir), [])

    def test_a_running_download_ends_well(self):
        data = os.urandom(1 << 20) * 12
        write_image(self.serve_dir, U, data)
        server = self.serve()
        with server.connect() as connection:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            connection.send(f"GET /images/{U}/file HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            self.assertTrue(readable(connection.sock, PATIENCE))
            self.manage("delete", U)
            self.assertEqual(server.get(f"/images/{U}").status, 404)
            self.assertEqual(connection.answer().body, data)

    def test_published_beside_them(self):
        """What import made, the commands change; the file stays as it is."""
        result = run_program("import", "--dir", self.serve_dir, "--uuid", U, "web", "1", "d",
                             data=streams.pack(streams.stream()))
        self.assertEqual(result.returncode, 0, result.stderr)
        files = self.stored(U)["files"]
        for words in (("update", U, "version=2"), ("disable", U), ("enable", U)):
            result = run_program("--dir", self.serve_dir, *words)
            self.assertEqual((result.returncode, result.stderr), (0, b""))
            self.assertRegex(result.stdout.decode(), rf"^[A-Z][a-z]+d image {U} web 2\n$")
        self.assertEqual(self.stored(U)["files"], files)
        for words, error in ((("disable", V), f"image {V} not found"),
                             (("update", U, f"origin={V}"),
                              "origin: Parameter cannot be updated")):
            result = run_program("--dir", self.serve_dir, *words)
            self.assertEqual((result.returncode, result.stderr.decode()),
                             (1, f"imgserver: {error}\n"))


class TestPrune(ManageCase):

    def image(self, number, name="web", **fields):
        """An image that is the newer, the higher its number."""
        write_v2(self.serve_dir, uuid_of(number), name=name,
                 published_at=f"2020-01-{number:02}T00:00:00Z", **fields)

    def numbers(self):
        return sorted(int(name[:8], 16) for name in os.listdir(self.serve_dir))

    def prune(self, *words, **config):
        """The numbers of the images that went."""
        before = self.numbers()
        status, dry = self.manage("prune", "-n", *words, **config)
        self.assertEqual((status, self.numbers()), (0, before))
        status, lines = self.manage("prune", *words, **config)
        self.assertEqual(status, 0)
        self.assertEqual([line.replace("Would delete", "Deleted") for line in dry], lines)
        gone = sorted(set(before) - set(self.numbers()))
        self.assertEqual(lines, [f"Deleted image {line}" for line in (
            line.partition(" image ")[2] for line in lines)])
        self.assertEqual(sorted(int(line.split()[2][:8], 16) for line in lines), gone)
        return gone

    def test_the_newest_of_each_name_stay(self):
        for number in range(1, 6):
            self.image(number)
        self.image(6, "db")
        self.image(7, "db")
        self.assertEqual(self.prune("--keep", "1", "--name", "db"), [6])
        self.assertEqual(self.prune("--keep", "3"), [1, 2])
        self.assertEqual(self.prune("--keep", "3"), [])
        self.assertEqual(self.prune("--keep", "1"), [3, 4])
        self.assertEqual(self.numbers(), [5, 7])
        self.refused("no image 'wbe'", "prune", "--keep", "1", "--name", "wbe")

    def test_an_origin_stays(self):
        for number in range(1, 6):
            self.image(number)
        self.image(8, "top", origin=uuid_of(1))
        self.image(9, "waiting", origin=uuid_of(2))
        self.image(10, "broken", origin=uuid_of(3), type="zones")
        os.rename(os.path.join(self.serve_dir, uuid_of(9)),
                  os.path.join(self.serve_dir, ".incoming-" + uuid_of(9)))
        self.assertEqual(len(self.manage("prune", "--keep", "1", "-n")[1]), 1)
        self.manage("prune", "--keep", "1")
        self.assertEqual(sorted(os.listdir(self.serve_dir)), [
            ".incoming-" + uuid_of(9), *map(uuid_of, (1, 2, 3, 5, 8, 10))])

    def test_for_each_channel(self):
        for number, channels in ((1, ["dev"]), (2, ["release"]), (3, ["dev", "release"]),
                                 (4, ["dev"]), (5, None), (6, None)):
            self.image(number, channels=channels)
        self.assertEqual(self.prune("--keep", "1", channels=CHANNELS), [1, 2, 5])
        self.assertEqual(self.prune("--keep", "1"), [3, 4])

    def test_disabled_ones_do_not_count(self):
        for number, disabled in ((1, True), (2, False), (3, True), (4, False), (5, True)):
            self.image(number, disabled=disabled)
        self.assertEqual(self.prune("--keep", "2"), [1])
        self.assertEqual(self.prune("--keep", "1"), [2, 3])
        self.assertEqual(self.numbers(), [4, 5])

    def test_what_is_not_active_or_not_sound_is_left_alone(self):
        self.image(1, state="unactivated")
        self.image(2, type="zones")
        self.image(3)
        self.image(4)
        self.assertEqual(self.prune("--keep", "1"), [3])

    def test_of_one_moment_the_last_in_lists_stays(self):
        for number in (3, 1, 4, 2, 5):
            write_v2(self.serve_dir, uuid_of(number), name="web", published_at=(
                "2020-01-01T00:00:00.000Z" if number % 2 else "2020-01-01T00:00:00Z"))
        for newest in (self.listed(), [image["uuid"] for image in ask(
                self.site(), "/images").json()]):
            self.assertEqual(newest, [uuid_of(number) for number in range(1, 6)])
        self.assertEqual(self.prune("--keep", "3"), [1, 2])
        self.assertEqual(self.prune("--keep", "1"), [3, 4])

    def test_keep_is_a_number_from_1(self):
        self.image(1)
        for words in ((), ("--keep", "0"), ("--keep", "-1"), ("--keep", "x"), ("--keep", "1.5")):
            with self.subTest(words), self.assertRaises(SystemExit) as caught, \
                    mock.patch("sys.stderr"):
                self.manage("prune", *words)
            self.assertEqual(caught.exception.code, 2)
        self.assertEqual(self.numbers(), [1])


class TestConfigCheck(ManageCase):

    def check(self, values, *words):
        """(exit status, stdout, stderr) of config --check."""
        path = os.path.join(self.directory, "config.json")
        with open(path, "w") as file:
            json.dump({"serve_dir": "images", **values}, file)
        before = os.stat(path).st_mtime_ns, os.listdir(self.directory)
        results = []
        for last in (("config", "--check"), ()):
            if results and results[0][0] == 0:
                return results[0]             # the server itself would serve
            result = run_program("--config", path, *words, *last)
            results.append((result.returncode, result.stdout.decode(), result.stderr.decode()))
        self.assertEqual((os.stat(path).st_mtime_ns, os.listdir(self.directory)), before)
        self.assertEqual(results[0], results[1], "not as the server itself says it")
        return results[0]

    def said(self, listen, verdict="the configuration is right", directory=None):
        """The lines of a check that ends well."""
        return (f"configuration: {os.path.join(self.directory, 'config.json')}\n"
                f"serve_dir: {directory or self.serve_dir}\nlisten_port: {listen}\n{verdict}\n")

    def test_what_would_start(self):
        self.assertEqual(self.check({}, "--listen", "127.0.0.1:0"),
                         (0, self.said("127.0.0.1:0"), ""))
        path = os.path.join(self.directory, "s.sock")
        self.assertEqual(self.check({"listen_port": path}), (0, self.said(path), ""))
        self.assertFalse(os.path.exists(path))
        self.assertEqual(
            self.check({"listen_port": path}, "--dir", self.directory, "--listen", "127.0.0.1:0",
                       "--listen", "[::1]:0")[:2],
            (0, self.said("127.0.0.1:0, [::1]:0", directory=self.directory)))

    def test_no_file_of_the_configuration(self):
        path = os.path.join(self.directory, "none.json")
        result = run_program("--listen", "127.0.0.1:0", "--dir", self.serve_dir, "config",
                             "--check", prelude=f"imgserver.default_config = lambda: {path!r}")
        self.assertEqual(result.stdout.decode().splitlines()[0],
                         f"configuration: the defaults, as there is no {path}")

    def test_warnings_are_those_of_the_log(self):
        for level in ("info", "fatal"):           # with fatal the server itself says nothing
            status, said, warned = self.check({"colour": 1, "loglevel": level},
                                              "--listen", "127.0.0.1:0")
            self.assertEqual((status, said), (0, self.said(
                "127.0.0.1:0", "the server would start, with 1 warning")))
            self.assertRegex(warned,
                             r"^\S+Z warn config: 'colour' is no key of the configuration\n$")
        self.assertIn("would start, with 2 warnings\n", self.check(
            {"colour": 1, "size": 2}, "--listen", "127.0.0.1:0")[1])

    def test_a_directory_that_cannot_be_published_in_is_one_warning(self):
        path = os.path.join(self.directory, "config.json")
        with open(path, "w") as file:
            json.dump({"serve_dir": "images", "publish_from": ["10.0.0.0/8"]}, file)
        result = run_program(
            "--config", path, "--listen", "127.0.0.1:0", "config", "--check",
            prelude="import os; access = os.access; "
                    "os.access = lambda path, mode: not mode & os.W_OK and access(path, mode)")
        self.assertEqual(result.returncode, 0)
        self.assertIn(b"would start, with 1 warning\n", result.stdout)
        self.assertRegex(result.stderr, b"^[^\n]* warn nothing can be published over HTTP: "
                                        b"serve_dir cannot be written\n$")

    def test_a_program_that_others_may_change(self):
        """Who may write the directory of the program, as one of images, could plant code there."""
        home = os.path.join(self.directory, "home")
        os.mkdir(home)
        program = shutil.copy(imgserver.__file__, home)
        compiled = os.path.join(home, "__pycache__")
        os.mkdir(compiled)

        def risks():
            """The paths of the warnings of config --check there."""
            result = subprocess.run(
                [sys.executable, "-I", program, "--listen", "127.0.0.1:0", "--dir",
                 self.serve_dir, "config", "--check"], capture_output=True, text=True,
                timeout=PATIENCE)
            self.assertEqual(result.returncode, 0, result.stderr)
            found = re.findall("may write (.*), and so change the program", result.stderr)
            self.assertIn(f"with {len(found)} warning" if found else "is right", result.stdout)
            return found
        self.assertEqual(risks(), [])
        for path, mode in ((home, 0o775), (home, 0o1777), (program, 0o664), (compiled, 0o757)):
            with self.subTest(path, mode=oct(mode)):
                before = os.stat(path).st_mode & 0o7777
                os.chmod(path, mode)
                self.assertEqual(risks(), [path])
                os.chmod(path, before)
        if os.getuid() == 0:
            os.chown(home, 65534, 65534)
            self.assertEqual(risks(), [home])
            os.chown(program, 65534, 65534)       # the same user: nobody else
            self.assertEqual(risks(), [])

    def test_what_would_not(self):
        for values, status, pattern in (
                ({"loglevel": "loud"}, 96, 'config: loglevel must be "trace" or "debug" or'),
                ({"logformat": "xml"}, 96, 'config: logformat must be "text" or "json"'),
                ({"serve_dir": "nowhere"}, 96, "cannot list serve_dir"),
                ({"listen_port": os.path.join(self.directory, "no", "s.sock")}, 96,
                 "cannot listen on .*No such file"),
                ({"listen_port": "192.0.2.1:8080"}, 1, "cannot listen on .*assign")):
            with self.subTest(values):
                found, said, error = self.check(values)
                self.assertEqual((found, said), (status, ""))
                self.assertRegex(error, "^imgserver: " + pattern)

    def test_a_server_that_runs_is_no_mistake(self):
        for unix in (False, True):
            server = self.serve(unix=unix)
            listen = server.address if unix else "{}:{}".format(*server.address)
            status, said, error = self.check({"listen_port": listen})
            self.assertEqual((status, error), (0, ""))
            self.assertRegex(said, r"\nthe configuration is right \(.*the server that runs")
            self.assertEqual(server.get("/ping").status, 200)
            self.assertEqual(server.stop(signal.SIGTERM), 0)


class TestHelp(ManageCase):

    def test_every_command_has_an_example_that_it_understands(self):
        parser = imgserver.option_parser()
        [commands] = [action.choices for action in parser._actions
                      if isinstance(action, argparse._SubParsersAction)]
        self.assertGreater(len(commands), 12)
        for name, sub in commands.items():
            with self.subTest(name):
                program, *words = sub.format_help().partition("example:\n")[2].split()
                self.assertIn(program, ("imgserver.py", "import-image"))
                words = [name, *words][words[:1] == [name]:]
                for sign in "<>":             # the shell's
                    if sign in words:
                        del words[words.index(sign):]
                with mock.patch("sys.stderr"):
                    parser.parse_args(words)
