"""make, its targets, config.json and the SMF manifest; with GNU make and bmake."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import unittest
import xml.etree.ElementTree

import imgserver
from tests.support import (PATIENCE, ROOT, Connection, ServerCase, all_in_check, copy_program,
                           need, reachable, run_program, wait_for)

MAKES = ("make", "bmake")
FILES = ("Makefile", "imgserver.py", "import-image", "mkimg", "config.json",
         "image-server.smf.xml", "LICENSE")
PATHS = ("a&b <c> 'd' \"e\"", "plain", "with spaces")


def state(directory):
    """{path: (bytes, mtime, mode)} of all files in a directory."""
    result = {}
    for place, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(place, name)
            status = os.stat(path)
            with open(path, "rb") as file:
                result[os.path.relpath(path, directory)] = (file.read(), status.st_mtime_ns,
                                                            status.st_mode)
    return result


class MakeCase(ServerCase):

    def copy(self, name="here", real=False):
        """A copy of what make works on, with the `real` imgserver.py or that of copy_program."""
        directory = os.path.join(self.directory, name)
        os.mkdir(directory)
        for each in FILES:
            path = shutil.copy(os.path.join(ROOT, each), directory)
            os.chmod(path, 0o755 if os.access(path, os.X_OK) else 0o644)   # as in a release
        if not real:
            copy_program(directory)
        with open(os.path.join(directory, "README.md"), "w") as file:
            file.write("imgserver\n")
        self.config(directory, {"image-creator-uuid": "", "image-vendor-uuid": ""})
        return directory

    def config(self, directory, changes=None):
        """config.json of a directory, after changes to it."""
        path = os.path.join(directory, "config.json")
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        if changes:
            values.update(changes)
            with open(path, "w", encoding="utf-8") as file:
                file.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        return values

    def run_make(self, make, directory, *words, status=0, environment=None):
        environment = dict(os.environ if environment is None else environment)
        for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKE", "PREFIX", "DESTDIR"):
            environment.pop(name, None)               # where the tests run under make
        environment.setdefault("PYTHON", sys.executable)
        result = subprocess.run([shutil.which(make), *words], cwd=directory, env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                encoding="utf-8", timeout=PATIENCE * 2)
        if status is not None:
            self.assertEqual(result.returncode, status, result.stdout + result.stderr)
        return result

    def smf(self, directory):
        """(working directory, exec of start) of an SMF manifest, as XML parsers see it."""
        path = os.path.join(directory, "image-server.smf.xml")
        tree = xml.etree.ElementTree.parse(path)
        start = tree.find(".//exec_method[@name='start']")
        return tree.find(".//method_context").get("working_directory"), start.get("exec")


class TestMake(MakeCase):
    seconds = 7

    def test_the_start_method_serves_from_what_make_compiled(self):
        directory = self.copy(real=True)
        path = os.path.join(self.directory, "s.sock")
        self.config(directory, {"listen_port": path, "serve_dir": self.serve_dir})
        self.run_make("make", directory, "smf")
        place, start = self.smf(directory)
        self.assertEqual(place, directory)
        start = shlex.split(start)
        result = subprocess.run([start[0], "-v", *start[1:], "--version"], cwd=place,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self.assertRegex(result.stderr, "code object from '__pycache__/imgserver[.]")
        for name in ("argparse", "imgserver"):        # no module comes from the directory
            with open(os.path.join(directory, name + os.extsep + "py"), "a") as file:
                file.write("\nif __name__ != '__main__': raise SystemExit('imported')\n")
        process = subprocess.Popen(start, cwd=place, stdin=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        wait_for(lambda: reachable(path) or process.poll() is not None, "the server")
        with Connection(path) as connection:
            self.assertEqual(connection.request("/ping").status, 200)
        process.terminate()
        self.assertEqual(process.wait(PATIENCE), 0)

    def test_what_make_compiled_can_be_read_by_the_service_s_user(self):
        directory = self.copy()
        for target in ("smf", "install"):
            place = directory if target == "smf" else os.path.join(self.directory, "installed")
            self.run_make("sh", directory, "-c", f"umask 077; exec make {target} PREFIX={place}")
            place = os.path.join(place, "__pycache__")
            for path in (place, *(os.path.join(place, name) for name in os.listdir(place))):
                self.assertEqual(os.stat(path).st_mode & 0o044, 0o044, path)

    def test_make_imports_nothing_from_the_directory(self):
        directory = self.copy(real=True)
        for name in ("argparse", "importlib", "re", "winreg"):
            with open(os.path.join(directory, name + ".py"), "w") as file:
                file.write("open('ran', 'w').close()\n")
        target = os.path.join(self.directory, "installed")
        self.run_make("make", directory)
        self.run_make("make", directory, "install", f"PREFIX={target}")
        self.assertFalse(os.path.exists(os.path.join(directory, "ran")))
        self.assertTrue(os.listdir(os.path.join(directory, "__pycache__")))

    def credential(self, directory):
        path = os.path.join(directory, "image-server.smf.xml")
        found = xml.etree.ElementTree.parse(path).find(".//method_credential")
        return found.get("user"), found.get("group")

    def test_user_and_group_stay_without_flags(self):
        directory = self.copy()
        target = os.path.join(self.directory, "installed")
        for words, place in ((("smf",), directory), (("install", f"PREFIX={target}"), target)):
            self.run_make("make", directory, *words, "SMF_FLAGS=--user daemon --group 'a&b'")
            self.assertEqual(self.credential(place), ("daemon", "a&b"))
            result = self.run_make("make", directory, *words)
            self.assertEqual(self.credential(place), ("daemon", "a&b"))
            self.assertEqual(result.stderr, "")
            self.run_make("make", directory, *words, "SMF_FLAGS=--group www")
            self.assertEqual(self.credential(place), ("daemon", "www"))
            self.run_make("make", directory, *words, "SMF_FLAGS=--user daemon")
            self.assertEqual(self.credential(place), ("daemon", ":default"))

    def test_a_service_that_would_run_as_root_says_so(self):
        directory = self.copy()
        for words in (("SMF_FLAGS=--user root",), (), ("SMF_FLAGS=--user 0",)):
            result = self.run_make("make", directory, "smf", *words)
            self.assertIn("would run as root", result.stderr)
        result = self.run_make("make", directory, "smf", "SMF_FLAGS=--user daemon")
        self.assertEqual(result.stderr, "")

    def test_a_kept_user_who_is_not_there_is_named(self):
        directory = self.copy()
        self.run_make("make", directory, "smf", "SMF_FLAGS=--user no-such-user")
        result = self.run_make("make", directory, "smf")
        self.assertIn("there is no user no-such-user", result.stderr)
        for data in (b"<no_credential/>", b"\xff", None):
            path = os.path.join(directory, "image-server.smf.xml")
            os.unlink(path)
            if data is not None:
                with open(path, "wb") as file:
                    file.write(data)
            self.run_make("make", directory, "smf")
            self.assertEqual(self.credential(directory)[1], ":default")

    def test_a_manifest_that_cannot_be_written_fails_make(self):
        directory = self.copy()
        path = os.path.join(directory, "image-server.smf.xml")
        os.unlink(path)
        os.makedirs(os.path.join(path, "image-server.smf.xml.new"))       # mv has no way out
        result = self.run_make("make", directory, "smf", status=None)
        self.assertNotEqual(result.returncode, 0)

    def test_what_make_compiled_is_never_older_than_the_source(self):
        directory = self.copy(real=True)
        self.run_make("make", directory, "smf")
        path = os.path.join(directory, "imgserver.py")
        os.utime(path, (0, 0))                        # an old file, such as a release has
        self.run_make("make", directory, "smf")
        with open(path, encoding="utf-8") as file:
            text = file.read()
        with open(path, "w", encoding="utf-8") as file:
            file.write(re.sub('__version__ = "[0-9]', '__version__ = "9', text))
        _, start = self.smf(directory)
        result = subprocess.run([*shlex.split(start), "--version"], cwd=directory,
                                stdout=subprocess.PIPE, text=True)
        self.assertIn(" 9", result.stdout)

    def check_make(self, make):
        need(make)
        for name in all_in_check(PATHS):
            with self.subTest(path=name):
                directory = self.copy(name)
                before = self.config(directory)
                self.run_make(make, directory)
                after = self.config(directory)
                for key in ("image-creator-uuid", "image-vendor-uuid"):
                    self.assertTrue(imgserver.is_uuid(after[key]))
                    before[key] = after[key]
                self.assertEqual(list(after.items()), list(before.items()))
                place, start = self.smf(directory)
                self.assertEqual(os.path.realpath(place), os.path.realpath(directory))
                run = subprocess.run(["sh", "-c", start.replace("%%", "%") + " --version"],
                                     cwd=place, stdout=subprocess.PIPE, check=True)
                self.assertTrue(run.stdout.startswith(b"imgserver "))
                made = state(directory)
                self.run_make(make, directory)
                self.assertEqual(state(directory), made)
                self.run_make(make, directory, "clean")
                self.assertEqual(state(directory), {path: made[path] for path in made
                                                    if not path.endswith(".pyc")})

    def test_gnu_make(self):
        self.check_make("make")

    def test_bmake(self):
        self.check_make("bmake")

    def test_config_changes_two_values_alone(self):
        directory = self.copy()
        path = os.path.join(directory, "config.json")
        os.chmod(path, 0o640)
        with open(path, encoding="utf-8") as file:
            before = file.read().splitlines()
        self.run_make("sh", directory, "-c", "umask 077; make config")
        with open(path, encoding="utf-8") as file:
            after = file.read().splitlines()
        changed = [new for old, new in zip(before, after) if old != new]
        self.assertEqual((len(after), len(changed)), (len(before), 2))
        self.assertTrue(all("-uuid\": " in line for line in changed))
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o640)

    def test_a_config_of_ones_own_is_kept(self):
        directory = self.copy()
        mine = {"image-creator-uuid": "11111111-2222-4333-8444-555555555555", "listen_port": 8080,
                "note": "\u00e9"}
        self.config(directory, mine)
        self.run_make("make", directory, "config")
        values = self.config(directory)
        for key, value in mine.items():
            self.assertEqual(values[key], value)

    def test_a_broken_config_stops_make(self):
        directory = self.copy()
        for data in (b"{", b"[]", b"\xff"):
            with open(os.path.join(directory, "config.json"), "wb") as file:
                file.write(data)
            before = state(directory)
            result = self.run_make("make", directory, status=None)
            self.assertNotEqual(result.returncode, 0)
            self.assertNotIn("Traceback", result.stderr)
            self.assertIn("config.json", result.stderr)
            self.assertEqual(state(directory), before)

    def test_no_python(self):
        directory = self.copy()
        before = state(directory)
        for make in MAKES:
            need(make)
            for target in ("config", "smf", "test", "install"):
                with self.subTest(make=make, target=target):
                    result = self.run_make(make, directory, target, "PYTHON=no-such-python",
                                           status=None)
                    self.assertNotEqual(result.returncode, 0)
                    self.assertIn("there is no Python no-such-python", result.stderr)
                    self.assertEqual(state(directory), before)

    def test_a_full_disk_leaves_what_was_there(self):
        directory = self.copy()
        before = state(directory)
        for target in ("config", "smf"):
            with self.subTest(target=target):
                result = self.run_make("sh", directory, "-c",
                                       f"ulimit -f 0; exec make {target}", status=None)
                self.assertNotEqual(result.returncode, 0)
                self.assertNotIn("Traceback", result.stderr)
                self.assertEqual(state(directory), before)

    def test_make_test_runs_the_tests_with_the_python_found(self):
        for make in all_in_check(MAKES):
            need(make)
            directory = self.copy(make)
            os.mkdir(os.path.join(directory, "tests"))
            for name, text in (("__init__.py", ""), ("test_one.py", (
                    "import os, sys, unittest\nfrom tests import __path__\n"
                    "class TestOne(unittest.TestCase):\n"
                    "    def test_one(self):\n"
                    "        open('ran', 'w').write(sys.executable)\n"
                    "        self.assertNotIn('FAIL', os.environ)\n"))):
                with open(os.path.join(directory, "tests", name), "w") as file:
                    file.write(text)
            shutil.copy(os.path.join(ROOT, "tests", "run.py"), os.path.join(directory, "tests"))
            result = self.run_make(make, directory, "test")
            self.assertIn("1 passed, 0 failed, 0 skipped\n", result.stdout)
            with open(os.path.join(directory, "ran")) as file:
                self.assertEqual(file.read(), sys.executable)
            result = self.run_make(make, directory, "test", status=None,
                                   environment={**os.environ, "FAIL": "1"})
            self.assertNotEqual(result.returncode, 0)
            self.run_make(make, directory, "clean")
            self.assertFalse(os.path.exists(os.path.join(directory, "tests", "__pycache__")))

    def test_bench_runs_though_a_directory_has_its_name(self):
        for make in MAKES:
            need(make)
            directory = self.copy(make)
            os.mkdir(os.path.join(directory, "bench"))
            with open(os.path.join(directory, "bench", "bench.py"), "w") as file:
                file.write("print('measured')\n")
            self.assertIn("measured", self.run_make(make, directory, "bench").stdout)


class TestInstall(MakeCase):

    def test_install_twice_and_uninstall(self):
        for make in MAKES:
            need(make)
            with self.subTest(make=make):
                source = self.copy(make)
                root = os.path.join(self.directory, make + " root")
                target = os.path.join(root, "opt", "img server")
                words = (f"DESTDIR={root}", "PREFIX=/opt/img server",
                         "SMF_FLAGS=--user web --group www")
                before = state(source)
                self.run_make(make, source, "install", *words)
                self.assertEqual(state(source), before)
                self.assertEqual(set(os.listdir(target)),
                                 {*FILES, "README.md", "__pycache__"} - {"Makefile"})
                place, start = self.smf(target)
                self.assertEqual(place, "/opt/img server")
                self.assertIn(" -IS -c ", start)
                with open(os.path.join(target, "image-server.smf.xml")) as file:
                    self.assertIn('user="web" group="www"', file.read())
                mine = self.config(target, {"listen_port": 8080})
                self.assertTrue(imgserver.is_uuid(mine["image-creator-uuid"]))
                self.run_make(make, source, "install", *words)
                self.assertEqual(self.config(target), mine)
                os.mkdir(os.path.join(target, "image"))
                self.run_make(make, source, "uninstall", *words)
                self.assertEqual(sorted(os.listdir(target)), ["config.json", "image"])


    def test_what_is_not_there_is_not_installed(self):
        """Operators copy few files; the program and import-image, which finds a Python, must be."""
        for make in MAKES:
            need(make)
            with self.subTest(make=make):
                source, target = self.copy(make), os.path.join(self.directory, make + " installed")
                for name in ("LICENSE", "README.md", "mkimg", "config.json",
                             "image-server.smf.xml"):
                    os.unlink(os.path.join(source, name))
                self.run_make(make, source, "install", "PREFIX=" + target)
                self.assertEqual(set(os.listdir(target)), {
                    "imgserver.py", "import-image", "config.json", "image-server.smf.xml",
                    "__pycache__"})
                self.assertEqual(list(self.config(target)),
                                 ["image-creator-uuid", "image-vendor-uuid"])
                os.unlink(os.path.join(source, "imgserver.py"))
                result = self.run_make(make, source, "install", "PREFIX=" + target, status=None)
                self.assertNotEqual(result.returncode, 0)


class TestFiles(unittest.TestCase):
    """The committed files."""

    def test_config_has_every_key_with_its_default_and_a_comment(self):
        with open(os.path.join(ROOT, "config.json"), encoding="utf-8") as file:
            text = file.read()
        values = json.loads(text)
        self.assertEqual(text, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
        self.assertEqual(list(values), ["comments", *imgserver.SETTINGS])
        self.assertEqual(list(values["comments"]), list(imgserver.SETTINGS))
        made = ("image-creator-uuid", "image-vendor-uuid")   # by `make`, in a working copy
        for key, (default, _) in imgserver.SETTINGS.items():
            if key not in made:
                self.assertEqual(values[key], default, key)
        self.assertEqual(imgserver.Config(values).warnings, [])

    def render(self, directory="/opt/imgserver", *words):
        result = run_program("smf", "--directory", directory, "--python",
                             "/opt/local/bin/python3.13", "--user", "imgserver", "--group",
                             "imgserver", *words)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout

    def test_the_smf_manifest_is_that_of_the_documented_directory(self):
        manifest = self.render()
        with open(os.path.join(ROOT, "image-server.smf.xml"), "rb") as file:
            committed = file.read()
        if b'"/opt/imgserver"' in committed:          # else `make` has been run here
            self.assertEqual(committed, manifest)
        root = xml.etree.ElementTree.fromstring(manifest)
        self.assertEqual(root.find("service").get("name"), "site/image-server")
        self.assertIsNotNone(root.find(".//propval[@name='duration'][@value='child']"))
        self.assertIn("net_privaddr", root.find(".//method_credential").get("privileges"))

    def test_smf_manifests_are_valid_by_the_dtd(self):
        need("xmllint")
        dtd = os.environ.get("SMF_DTD")
        if not dtd:
            raise unittest.SkipTest("SMF_DTD names no copy of service_bundle.dtd.1")
        manifests = [self.render(), self.render("/opt/a&b <c> 'd' \"e\" \u00e9")]
        with open(os.path.join(ROOT, "image-server.smf.xml"), "rb") as file:
            manifests.append(file.read())
        for manifest in manifests:
            result = subprocess.run(["xmllint", "--noout", "--nonet", "--dtdvalid", dtd, "-"],
                                    input=manifest, stderr=subprocess.PIPE)
            self.assertEqual(result.returncode, 0, result.stderr)

    def test_smf_manifests_are_well_formed(self):
        for directory in ("/opt/imgserver", "/opt/a&b <c> 'd' \"e\" \u00e9", "/opt/100%"):
            root = xml.etree.ElementTree.fromstring(self.render(directory, "--dir", directory))
            self.assertEqual(root.find(".//method_context").get("working_directory"), directory)
            start = root.find(".//exec_method[@name='start']").get("exec")
            self.assertEqual(start.count("%%"), directory.count("%"))

    def test_shellcheck(self):
        need("shellcheck")
        subprocess.run(["shellcheck", os.path.join(ROOT, "mkimg")], check=True)
