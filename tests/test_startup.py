"""Starting: mistakes in the configuration, ports, and the file of a Unix socket."""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import unittest
from unittest import mock

import imgserver
from tests.support import (IMGSERVER, PATIENCE, ROOT, Connection, Program, ServerCase, free_port,
                           has_ipv6, run_program, uuid_of, wait_for, write_image)

CONFIG_ERROR = 96

# Contents of config.json, and a part of the one sentence that each gets.
BAD_CONFIGS = {
    "empty": ("", "line 1 column 1"),
    "no JSON": ("{\n  listen_port: 80\n}", "line 2 column 3"),
    "comma at the end": ('{"prefix": "http://",\n}', "line "),
    "cut": ('{"prefix": "http', "line 1 column"),
    "not UTF-8": (b'{"prefix": "\xe9"}', "not UTF-8"),
    "NaN": ('{"idle_timeout": NaN}', "NaN"),
    "a key twice": ('{"prefix": "a", "prefix": "b"}', "twice"),
    "nested deep": ("[" * 100000, "deep"),
    "a list": ("[]", "object"),
    "a text": ('"x"', "object"),
    "null": ("null", "object"),
}

BAD_VALUES = {
    "accel": ("files", "/files/", "/", "/a b", "/a/../b", "/a?b", None, 5, True, ["/files"]),
    "listen_port": ([80, 0], [80, "x"], [80, 80], ["/a", 80, "/a"], ["/", "/"], [[80]], [None],
                    ["*:80", 80], 0, "0", 70000, 65536, -1, 80.5, True, None, [], {}, "",
                    "eighty", "80x",
                    "127.0.0.1", ":80", "a:b:80", "127.0.0.1:0", "relative.sock", "./x.sock",
                    "[::1]", "http://127.0.0.1:80", "/" + "x" * 107, "/tmp/a\0b",
                    "/" + "é" * 54,
                    "80\n", "a..b:8080", "x" * 64 + ":8080", "example.com:80", "1.2.3:80",
                    "[1.2.3.4]:80x", "::1:80", "*", "*:", "**:80", "[*]:80", "localhost",
                    "1.2.3.4\0:80"),
    "prefix": (5, None, [], {}, True, "a\nb", "", "https", "http:", "http:/", "//", "ftp://",
               "https://host/", "https://host", "HTTP://", "http:// ", "http://a b."),
    "suffix": (80, None, [], "\x1b", "8080", ":", ":0", ":70000", ":80 ", ":8080/", "/", "/sub/",
               "//sub", "sub", "/a b", "/a?b", "/a#b", ":80:80"),
    "loglevel": ("inf", "INFO", "", 30, None, True, [], {}, ["info"]),
    "serve_dir": (5, None, [], {}, "a\nb", ""),
    "image-creator": (5, None, [], {}),
    "image-creator-uuid": ("x", 5, None, [], uuid_of(0xabc).upper(), uuid_of(1) + "\n"),
    "image-vendor-uuid": ("x", 5, {}),
    "socket_mode": (384, "rw", "0999", "", None, "07777", []),
    "max_connections": (0, -1, "5", 1.5, True, None, [], 10**9),
    "header_timeout": (0, -1, "5", True, None, {}, 10**9),
    "idle_timeout": (0, "5", None),
    "stall_timeout": (0, "5", None),
    "drain_time": (-1, "5", None),
    "channels": ({}, "x", None, [5], [{}], [{"name": "A"}], [{"name": "a", "x": 1}],
                 [{"name": "a"}, {"name": "a"}],
                 [{"name": "a", "default": True}, {"name": "b", "default": True}]),
}

BAD_OPTIONS = {
    "--listen": ("", "x", "70000", "127.0.0.1", "127.0.0.1:x", "a:b:1", ":0", "relative.sock",
                 "-1", "/" + "x" * 107, "a..b:0", "x" * 64 + ":0", "images.example.com:0"),
    "--loglevel": ("inf", "", "INFO"),
    "--dir": ("missing", "plain", "plain/x", "/dev/null", ""),
}

# prefix and suffix with which "prefix + Host + suffix" begins a URL.
GOOD_PREFIXES = ("http://", "https://", "http://a.", "https://images.eu.")
GOOD_SUFFIXES = ("", ":1", ":65535", "/sub", "/a/b~c", ":8080/sub", ".example.com", ".org:1")

# What --listen and listen_port take, and the addresses that it stands for.
ADDRESSES = {
    80: [("", 80)], "80": [("", 80)], "*:8082": [("", 8082)],
    "0.0.0.0:80": [("0.0.0.0", 80)], "[::]:80": [("::", 80)],
    "10.0.0.5:80": [("10.0.0.5", 80)], "[::1]:80": [("::1", 80)],
    "[::ffff:1.2.3.4]:80": [("::ffff:1.2.3.4", 80)],
    "localhost:8082": [("127.0.0.1", 8082), ("::1", 8082)], "/run/s": ["/run/s"],
    (80, "/run/s"): [("", 80), "/run/s"],
    ("localhost:1", "/a", "/b"): [("127.0.0.1", 1), ("::1", 1), "/a", "/b"],
}

OLD_PYTHONS = os.path.join(os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv")),
                           "versions")

# Nothing is forbidden to root, so a server that is to be refused something is somebody else;
# it may no longer read the standard library then, so what is missing is loaded before.
AS_NOBODY = """
import os, fcntl, termios, resource, gzip, locale, encodings.idna
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
"""
# Leaves a socket bound, and not listening yet, until the file at `flag` has gone, and tells
# when it comes to the lock that only one can hold.
SLOW_LISTEN = """
import fcntl, os, socket, time
lockf = fcntl.lockf
def lock_noted(*arguments):
    open({flag!r} + ".locks", "a").write("x")
    lockf(*arguments)
fcntl.lockf = lock_noted
listen = socket.socket.listen
def listen_late(sock, *backlog):
    open({flag!r} + ".bound", "w").close()
    while os.path.exists({flag!r}):
        time.sleep(0.01)
    listen(sock, *backlog)
socket.socket.listen = listen_late
"""
# A file system that gives the number of a removed socket's inode to the next one.
SAME_INODE = """
import os, stat
real_stat, sockets = os.stat, []
def stat_again(*arguments, **options):
    status = real_stat(*arguments, **options)
    if not stat.S_ISSOCK(status.st_mode):
        return status
    sockets.append(status)
    return sockets[0]
os.stat = stat_again
"""


class Starting(ServerCase):

    def fails(self, status, *arguments, **options):
        """It ends with `status` and one sentence, which is returned."""
        done = run_program(*arguments, cwd=self.directory, **options)
        error = done.stderr.decode("ascii")
        self.assertEqual(done.returncode, status, error)
        self.assertEqual(done.stdout, b"")
        self.assertNotIn("Traceback", error)
        sentences = [line for line in error.splitlines() if " warn " not in line]
        self.assertEqual(len(sentences), 1, error)
        self.assertRegex(sentences[0], r"^imgserver: [ -~]+$")
        return sentences[0]

    @staticmethod
    def answers(address):
        """Whether an imgserver answers there by now."""
        try:
            with Connection(address) as connection:
                return connection.request("/ping").json()["ping"] == "pong"
        except OSError:
            return False

    def config(self, content, name="config.json"):
        """The path of a configuration of that content; a dict is written as JSON."""
        if isinstance(content, dict):
            content = json.dumps({"serve_dir": "images", **content})
        path = os.path.join(self.directory, name)
        with open(path, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        return path


# Starts with each list of arguments on stdin, and prints what each would have ended with.
ONE_BY_ONE = """
import json, sys, traceback
sys.path.insert(0, sys.argv[1])
import imgserver
imgserver.ImageServer.serve_forever = lambda self: self.server_close()
imgserver.Console.say = lambda self, text, fd: said.append(text + "\\n")
results = []
for arguments in json.load(sys.stdin):
    said = []
    try:
        status = imgserver.main(arguments)
    except BaseException:
        status = traceback.format_exc()
    results.append((status, "".join(said)))
print(json.dumps(results))
"""


class BadConfigs(Starting):

    def setUp(self):
        super().setUp()
        with open(os.path.join(self.directory, "plain"), "w"):
            pass

    def all_fail(self, cases):
        """Each case (name, arguments, part) ends with 96 and one sentence that holds `part`.

        They are all tried in one process, as a process for each takes long.
        """
        done = subprocess.run([sys.executable, "-c", ONE_BY_ONE, ROOT], capture_output=True,
                              input=json.dumps([arguments for _, arguments, _ in cases]),
                              timeout=PATIENCE, cwd=self.directory, encoding="ascii")
        self.assertEqual(done.returncode, 0, done.stderr)
        results = json.loads(done.stdout)
        self.assertEqual(len(results), len(cases))
        for (name, _, part), (status, error) in zip(cases, results):
            with self.subTest(name):
                self.assertEqual(status, CONFIG_ERROR, error)
                self.assertRegex(error, r"^imgserver: [ -~]+\n$")
                self.assertIn(part, error)

    def test_files_that_are_no_configuration(self):
        cases = []
        for name, (content, part) in BAD_CONFIGS.items():
            path = self.config(content, f"{len(cases)}.json")
            cases.append((name, ["--config", path], part))
        self.all_fail(cases)
        self.fails(CONFIG_ERROR, "--config", self.config("{"))

    def test_values_that_are_wrong(self):
        cases = []
        for key, values in BAD_VALUES.items():
            for value in values:
                path = self.config({"listen_port": 65535, key: value}, f"{len(cases)}.json")
                cases.append((f"{key} {value!r}", ["--config", path],
                              "listen" if key == "listen_port" else key))
        self.all_fail(cases)
        self.fails(CONFIG_ERROR, "--config", self.config({"loglevel": []}))

    def test_prefix_and_suffix_that_begin_a_url(self):
        for prefix in GOOD_PREFIXES:
            self.assertEqual(imgserver.Config({"prefix": prefix}).prefix, prefix)
        for suffix in GOOD_SUFFIXES:
            self.assertEqual(imgserver.Config({"suffix": suffix}).suffix, suffix)

    def test_addresses(self):
        with mock.patch.object(socket, "getaddrinfo", side_effect=AssertionError("a resolver")):
            for value, addresses in ADDRESSES.items():
                with self.subTest(value):
                    value = list(value) if isinstance(value, tuple) else value
                    config = imgserver.Config({"listen_port": value})
                    self.assertEqual(config.listen_port, addresses)

    def test_options_that_are_wrong(self):
        path = self.config({"listen_port": 65535})
        cases = [(f"{option}={value}", ["--config", path, f"{option}={value}"],
                  "serve_dir" if option == "--dir" else option[2:])
                 for option, values in BAD_OPTIONS.items() for value in values]
        self.all_fail(cases)
        self.assertRegex(self.fails(CONFIG_ERROR, "--config", path, "--listen", "x"), ", not 'x'$")

    def test_mistakes_of_ours_are_one_sentence(self):
        for error, sentence in (
                (RuntimeError("can't start new thread"), "RuntimeError: can't start new thread"),
                (RecursionError("too deep"), "RecursionError: too deep"),
                (KeyError("name"), "KeyError: 'name'"), (MemoryError(), "MemoryError: ")):
            with self.subTest(sentence), mock.patch.object(imgserver.Console, "say") as say, \
                    mock.patch.object(imgserver, "load_config", side_effect=error):
                self.assertEqual(imgserver.main(["list"]), 1)
                [((said, fd), _)] = say.call_args_list
                self.assertRegex(said, f"^imgserver: {re.escape(sentence)} "
                                       r"\(line [0-9]+ of imgserver.py\)$")

    def test_no_command_writes_where_nothing_names_the_directory(self):
        """Without a config.json and --dir it would be the program's own directory."""
        before = sorted(os.listdir(self.directory))
        path = os.path.join(self.directory, "config.json")
        for words in (("import", "name", "1.0", "text"), ("activate", uuid_of(1)),
                      ("discard", uuid_of(1))):
            with self.subTest(words[0]), mock.patch.object(imgserver.Console, "say") as say, \
                    mock.patch.object(imgserver, "default_config", lambda: path):
                self.assertEqual(imgserver.main(words), CONFIG_ERROR)
                say.assert_called_once_with(f"imgserver: there is no {path} that names the "
                                            "directory of images: say --dir DIR", 2)
        self.assertEqual(sorted(os.listdir(self.directory)), before)
        with mock.patch.object(imgserver, "default_config", lambda: self.config({})):
            options = argparse.Namespace(config=None, dir=None, listen=None, loglevel=None,
                                         use="writes")
            config = imgserver.load_config(options)
            self.assertEqual((config.serve_dir, config.path), (self.serve_dir, path))

    def test_config_that_is_not_there(self):
        self.assertIn("missing.json", self.fails(CONFIG_ERROR, "--config", "missing.json"))

    def test_config_that_is_a_directory(self):
        self.fails(CONFIG_ERROR, "--config", self.serve_dir)

    def test_config_that_may_not_be_read(self):
        path = self.config({})
        os.chmod(path, 0)
        os.chmod(self.directory, 0o755)
        self.assertIn("Permission denied", self.fails(CONFIG_ERROR, "--config", path,
                                                      prelude=AS_NOBODY))

    def test_serve_dir_that_is_of_no_use(self):
        for value in ("missing", "plain", "plain/x", "/dev/null", "x" * 300):
            with self.subTest(value):
                path = self.config({"serve_dir": value, "listen_port": "127.0.0.1:65535"})
                self.assertIn("serve_dir", self.fails(CONFIG_ERROR, "--config", path))

    def test_serve_dir_that_may_not_be_read(self):
        os.chmod(self.directory, 0o755)
        os.chmod(self.serve_dir, 0)
        path = self.config({"listen_port": "127.0.0.1:65535"})
        os.chmod(path, 0o644)
        sentence = self.fails(CONFIG_ERROR, "--config", path, prelude=AS_NOBODY)
        self.assertIn("serve_dir", sentence)
        self.assertIn("Permission denied", sentence)

    def test_unknown_keys_are_warned_about(self):
        server = self.serve(config={"listen_prot": 80, "comments": {"x": "y"}, "\x1b[2J": 1})
        self.assertRegex(server.log(), r"warn config: 'listen_prot' is no key")
        self.assertEqual(server.log().count(" warn config: "), 2)
        self.assertEqual(server.get("/ping").status, 200)


class Ports(Starting):

    def taken(self):
        """A port that somebody listens on."""
        sock = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(sock.close)
        return sock.getsockname()[1]

    def test_port_in_use(self):
        port = self.taken()
        for listen in (f"127.0.0.1:{port}", str(port)):
            with self.subTest(listen):
                sentence = self.fails(1, "--listen", listen, "--dir", self.serve_dir)
                self.assertIn(listen, sentence)
                self.assertIn("in use", sentence)

    def test_port_of_another_imgserver(self):
        server = self.serve()
        self.fails(1, "--listen", "127.0.0.1:%d" % server.address[1], "--dir", self.serve_dir)
        self.assertEqual(server.get("/ping").status, 200)

    def test_port_again_right_after_the_end(self):
        port = free_port()
        server = self.serve(options=("--listen", f"127.0.0.1:{port}"))
        with server.connect() as connection:
            connection.request("/ping")
            server.stop()
        again = self.serve(options=("--listen", f"127.0.0.1:{port}"))
        self.assertEqual(again.address[1], port)
        self.assertEqual(again.get("/ping").status, 200)

    def test_address_of_another_machine(self):
        self.assertIn("192.0.2.1:8099", self.fails(
            1, "--listen", "192.0.2.1:8099", "--dir", self.serve_dir))     # it may come up yet

    def test_privileged_port_without_privilege(self):
        prelude = AS_NOBODY
        if self.anybody_may_bind(1023):
            prelude += ("import socket\n"
                        "def bind(*_): raise PermissionError(13, 'Permission denied')\n"
                        "socket.socket.bind = bind\n")
        os.chmod(self.directory, 0o755)
        for port in (1, 80, 1023):
            with self.subTest(port):
                sentence = self.fails(CONFIG_ERROR, "--listen", f"127.0.0.1:{port}", "--dir",
                                      self.serve_dir, "--config", self.config({}),
                                      prelude=prelude)
                self.assertIn("net_privaddr", sentence)

    @staticmethod
    def anybody_may_bind(port):
        """Whether this machine has fewer privileged ports, or none (containers, macOS)."""
        program = AS_NOBODY + f"import socket; socket.socket().bind(('127.0.0.1', {port}))"
        return subprocess.run([sys.executable, "-c", program],
                              stderr=subprocess.DEVNULL).returncode == 0

    def test_port_0_on_the_command_line_takes_a_free_one(self):
        for listen in ("0", "*:0", "127.0.0.1:0", "localhost:0", "[::1]:0"):
            if listen[0] == "[" and not has_ipv6():
                continue
            with self.subTest(listen):
                server = self.serve(options=("--listen", listen))
                self.assertGreater(server.address[1], 0)

    def test_port_of_the_configuration(self):
        for listen in (free_port(), str(free_port()), f"127.0.0.1:{free_port()}"):
            with self.subTest(listen):
                process = self.start("--config", self.config({"listen_port": listen}))
                address = ("127.0.0.1", int(str(listen).rpartition(":")[2]))
                wait_for(lambda: self.answers(address) or process.poll(), "the server")
                self.assertIsNone(process.poll(), "it has ended")

    def start(self, *arguments):
        process = Program(*arguments, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process


class UnixSockets(Starting):

    def path(self, name="s.sock"):
        return os.path.join(self.directory, name)

    def fails_on(self, status, path, **options):
        return self.fails(status, "--listen", path, "--dir", self.serve_dir, **options)

    def on(self, path, **options):
        """A server on the socket at `path`."""
        server = self.serve(unix=True, options=("--listen", path), **options)
        server.address = path
        return server

    def test_stale_file_is_taken_over(self):
        server = self.serve(unix=True)
        server.kill()
        self.assertTrue(stat.S_ISSOCK(os.lstat(server.address).st_mode))
        again = self.on(server.address)
        self.assertEqual(again.get("/ping").status, 200)
        again.stop()
        self.assertEqual([name for name in os.listdir(self.directory)
                          if "sock" in name or name.startswith(".")], [])

    def test_live_server_is_left_alone(self):
        server = self.serve(unix=True)
        before = os.lstat(server.address)
        self.assertIn(server.address, self.fails_on(1, server.address))
        self.assertTrue(os.path.samestat(os.lstat(server.address), before))
        self.assertEqual(server.get("/ping").status, 200)

    def test_live_server_of_another_kind_is_left_alone(self):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(self.path())
            sock.listen(1)
            self.fails_on(1, self.path())
            Connection(self.path()).close()

    def test_what_is_no_socket_is_left_alone(self):
        make = {"file": lambda path: open(path, "w").close(), "directory": os.mkdir,
                "fifo": os.mkfifo, "dangling symlink": lambda path: os.symlink("nothing", path),
                "symlink to a file": lambda path: os.symlink("config.json", path)}
        self.config({})
        for name, create in make.items():
            with self.subTest(name):
                path = self.path(name)
                create(path)
                before = os.lstat(path)
                self.assertIn(name.split()[-1], self.fails_on(CONFIG_ERROR, path))
                self.assertTrue(os.path.samestat(os.lstat(path), before))
                self.assertEqual(os.lstat(path).st_mode, before.st_mode)

    def test_directory_that_is_not_there_or_not_ours(self):
        self.fails_on(CONFIG_ERROR, self.path("missing/s.sock"))
        config = self.config({})
        os.chmod(self.directory, 0o555)           # not even for its owner, as whom we may run
        self.addCleanup(os.chmod, self.directory, 0o755)
        self.assertIn("cannot listen", self.fails(
            CONFIG_ERROR, "--listen", self.path(), "--dir", self.serve_dir,
            "--config", config, prelude=AS_NOBODY))

    def test_length_of_the_path(self):
        room = 107 - len(self.path(""))
        self.assertGreater(room, 1, "the directory for temporary files has too long a name")
        server = self.on(self.path("x" * room))
        self.assertEqual(server.get("/ping").status, 200)
        sentence = self.fails_on(CONFIG_ERROR, self.path("x" * (room + 1)))
        self.assertIn("107", sentence)
        if room > 2:
            name = "é" * ((room + 2) // 2)          # fewer characters, but too many bytes
            self.assertIn("107", self.fails_on(CONFIG_ERROR, self.path(name)))

    def test_stale_file_at_the_longest_path(self):
        path = self.path("x" * (107 - len(self.path(""))))
        self.on(path).kill()
        self.assertEqual(self.on(path).get("/ping").status, 200)

    def test_mode_of_the_file(self):
        mask = os.umask(0o077)
        self.addCleanup(os.umask, mask)
        for config, mode in (({}, 0o666), ({"socket_mode": "0600"}, 0o600),
                             ({"socket_mode": "660"}, 0o660), ({"socket_mode": "0777"}, 0o777)):
            with self.subTest(config):
                server = self.serve(unix=True, config=config)
                self.assertEqual(stat.S_IMODE(os.stat(server.address).st_mode), mode)
                self.assertEqual(server.stop(), 0)

    def test_mode_from_the_first_moment(self):
        """Nobody else can connect between bind and a chmod, as there is no such moment."""
        seen = self.path("seen")
        prelude = ("import os, socket\n"
                   "bind = socket.socket.bind\n"
                   "def look(sock, address):\n"
                   "    bind(sock, address)\n"
                   f"    open({seen!r}, 'w').write(oct(os.stat(address).st_mode & 0o777))\n"
                   "socket.socket.bind = look")
        self.serve(unix=True, config={"socket_mode": "0600"}, prelude=prelude)
        with open(seen) as file:
            self.assertEqual(file.read(), "0o600")

    def test_listen_port_of_the_configuration_may_be_a_path(self):
        path = self.path()
        process = Program("--config", self.config({"listen_port": path}),
                          stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        wait_for(lambda: self.answers(path), "the server")

    def test_file_that_is_another_server_s_by_now_is_not_removed(self):
        first = self.serve(unix=True)
        os.unlink(first.address)
        second = self.on(first.address)
        self.assertEqual(first.stop(), 0)
        self.assertEqual(second.get("/ping").status, 200)
        self.assertEqual(second.stop(), 0)
        self.assertFalse(os.path.exists(first.address))

    def test_file_of_the_next_server_is_not_removed_after_draining(self):
        first = self.serve(unix=True, prelude=SAME_INODE)
        with first.connect() as begun:
            begun.send(b"GET /ping HTTP/1.1\r\n")
            self.assertEqual(first.get("/ping").status, 200)      # it has read that by now
            first.send_signal(signal.SIGTERM)
            wait_for(lambda: not os.path.exists(first.address), "draining")
            second = self.on(first.address)
            begun.send(b"Host: localhost\r\n\r\n")
            self.assertEqual(begun.answer().status, 200)
        self.assertEqual(first.process.wait(PATIENCE), 0)
        self.assertEqual(second.get("/ping").status, 200)

    def test_file_that_was_replaced_by_a_plain_one_is_not_removed(self):
        server = self.serve(unix=True)
        os.unlink(server.address)
        self.config({})
        os.rename(self.path("config.json"), server.address)
        self.assertEqual(server.stop(), 0)
        self.assertTrue(os.path.isfile(server.address))

    def test_file_that_has_gone_hinders_no_end(self):
        server = self.serve(unix=True)
        os.unlink(server.address)
        self.assertEqual(server.stop(), 0)

    def test_two_starts_at_once_on_one_socket(self):
        """The second comes when the first is bound, but does not listen yet."""
        flag = self.path("flag")
        with open(flag, "w"):
            pass
        arguments = ("--listen", self.path(), "--dir", self.serve_dir)
        first = self.race(*arguments, prelude=SLOW_LISTEN.format(flag=flag))
        wait_for(lambda: os.path.exists(flag + ".bound"), "the first to bind")
        second = self.race(*arguments, prelude=SLOW_LISTEN.format(flag=flag))
        wait_for(lambda: os.path.getsize(flag + ".locks") >= 2, "the second to come")
        with open(self.path() + ".lock", "ab") as lock, self.assertRaises(BlockingIOError):
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(flag)
        self.one_wins([first, second])

    def test_eight_starts_at_once_on_one_socket(self):
        for stale in (False, True):
            with self.subTest(stale=stale):
                if stale:
                    with socket.socket(socket.AF_UNIX) as sock:
                        sock.bind(self.path())
                self.one_wins([self.race("--listen", self.path(), "--dir", self.serve_dir)
                               for _ in range(8)])

    def race(self, *arguments, **options):
        process = Program(*arguments, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, **options)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def one_wins(self, processes):
        """All but one end with 1, and that one answers; then it ends, and its file goes."""
        def running():
            return [process for process in processes if process.poll() is None]
        wait_for(lambda: len(running()) <= 1, "the end of all but one", 60)
        [winner] = running()
        wait_for(lambda: self.answers(self.path()), "an answer of the winner")
        for process in processes:
            if process is not winner:
                self.assertEqual(process.returncode, 1)
                self.assertNotIn(b"Traceback", process.stderr.read())
        winner.send_signal(signal.SIGTERM)
        self.assertEqual(winner.wait(PATIENCE), 0)
        self.assertEqual([name for name in os.listdir(os.path.dirname(self.path()))
                          if name.startswith(os.path.basename(self.path()))], [])

    def test_lock_that_a_killed_start_left_hinders_nobody(self):
        with open(self.path() + ".lock", "w"):
            pass
        server = self.on(self.path())
        self.assertFalse(os.path.exists(self.path() + ".lock"))
        self.assertEqual(server.stop(), 0)

    def test_lock_that_others_made_is_neither_followed_nor_written(self):
        target = self.path("target")
        with open(target, "w") as file:
            file.write("kept")
        make = {"symlink": lambda path: os.symlink(target, path),
                "dangling symlink": lambda path: os.symlink(self.path("nothing"), path),
                "fifo": os.mkfifo, "directory": os.mkdir}
        for name, create in make.items():
            with self.subTest(name):
                path = self.path(name)
                create(path + ".lock")
                self.assertIn(path + ".lock", self.fails_on(CONFIG_ERROR, path))
                self.assertFalse(os.path.lexists(path))
        path = self.path("hard link")
        os.link(target, path + ".lock")
        self.on(path)
        with open(target) as file:
            self.assertEqual(file.read(), "kept")
        self.assertFalse(os.path.exists(self.path("nothing")))

    def test_lock_is_private(self):
        with imgserver.socket_lock(self.path()):
            self.assertEqual(stat.S_IMODE(os.stat(self.path() + ".lock").st_mode), 0o600)
        self.assertFalse(os.path.exists(self.path() + ".lock"))

    def test_lock_that_is_never_released(self):
        """A start gives up, and a server that runs ends all the same."""
        server = self.serve(unix=True)
        with open(server.address + ".lock", "w") as lock, open(self.path() + ".lock", "w") as own:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            fcntl.lockf(own, fcntl.LOCK_EX)
            self.assertIn(".lock is locked", self.fails_on(
                1, self.path(), prelude="imgserver.LOCK_TIME = 0.1"))
            self.assertEqual(server.stop(), 0)
            self.assertFalse(os.path.exists(server.address))

    def test_listener_that_does_not_accept(self):
        with socket.socket(socket.AF_UNIX) as sock, contextlib.ExitStack() as waiting:
            sock.bind(self.path())
            sock.listen(0)
            while True:                   # until its queue is full
                client = waiting.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                try:
                    client.connect(self.path())
                except BlockingIOError:
                    break
            self.assertIn("another server listens", self.fails_on(1, self.path()))
            self.assertTrue(os.path.exists(self.path()))

    def test_requests_are_logged_as_unix_and_keep_alive_works(self):
        write_image(self.serve_dir, uuid_of(1))
        server = self.serve(unix=True)
        with server.connect() as connection:
            for target in ("/ping", "/datasets", f"/images/{uuid_of(1)}/file") * 3:
                self.assertEqual(connection.request(target).status, 200)
        server.wait_log(r'info unix "GET /datasets HTTP/1\.1" 200 ')
        wait_for(lambda: len(re.findall(r' info unix "GET /', server.log())) == 9, "9 lines")


class Pythons(Starting):

    def test_old_python_is_told_apart_in_words(self):
        need_pythons = ("2.7", "3.6", "3.7", "3.8")
        found = {}
        for name in os.listdir(OLD_PYTHONS) if os.path.isdir(OLD_PYTHONS) else ():
            found[".".join(name.split(".")[:2])] = os.path.join(OLD_PYTHONS, name, "bin/python")
        missing = [version for version in need_pythons if version not in found]
        for version in need_pythons:
            if version in found:
                with self.subTest(version):
                    done = subprocess.run([found[version], IMGSERVER, "--version"],
                                          capture_output=True, timeout=PATIENCE)
                    self.assertEqual(done.stdout, b"")
                    self.assertIn(b"needs Python 3.9 or newer", done.stderr)
                    if version in ("3.7", "3.8"):
                        self.assertEqual(done.returncode, CONFIG_ERROR)
                        self.assertEqual(done.stderr.count(b"\n"), 1)
                    else:
                        self.assertEqual(done.returncode, 1)
        if missing:
            self.skipTest("there is no Python " + ", ".join(missing))

    def test_no_module_comes_from_the_program_s_directory(self):
        copy = os.path.join(self.directory, "copy")
        os.mkdir(copy)
        for name in ("imgserver.py", "import-image"):
            shutil.copy(os.path.join(ROOT, name), copy)
        for name in ("argparse", "resource", "pwd", "winreg"):
            with open(os.path.join(copy, name + ".py"), "w") as file:
                file.write(f"open({copy!r} + '/ran', 'w').close()\n")
        environment = {**os.environ, "PYTHON": sys.executable, "PYTHONSAFEPATH": ""}
        for words in ([sys.executable, "imgserver.py", "--help"],
                      [sys.executable, "-I", "imgserver.py", "--help"],
                      [sys.executable, "-m", "imgserver", "smf"],
                      [os.path.join(copy, "import-image"), "--dir", self.serve_dir, "-a",
                       uuid_of(1)]):
            with self.subTest(words):
                done = subprocess.run(words, cwd=copy, env=environment, timeout=PATIENCE,
                                      capture_output=True)
                self.assertNotIn(b"Traceback", done.stderr)
                self.assertFalse(os.path.exists(os.path.join(copy, "ran")))


if __name__ == "__main__":
    unittest.main()
