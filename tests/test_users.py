"""Users, their passwords and rights; private images, of which strangers learn nothing."""

import base64
import contextlib
import fcntl
import functools
import gzip
import io
import json
import os
import pty
import stat
import threading
import time
import unittest
from unittest import mock

import imgserver
from tests import test_nginx
from tests.support import (SETTLED, Connection, ServerCase, ask, command, default_signals, log_of,
                           need, parse, run_program, uuid_of, wait_for, write_image, write_v2)

PUBLIC, PRIVATE, PRIVATE_V1, CHILD, WAITING, UNKNOWN = map(uuid_of, range(1, 7))
OWNER = "352971aa-31ba-496c-9ade-a379feaecd52"
PASSWORDS = {"rita": b"reads", "paul": b"publishes", "mona": "verw\u00e4ltet: ja".encode()}
RIGHTS = {"rita": "read", "paul": "publish", "mona": "manage"}


def basic(name, password=None):
    """The Authorization header of a user, with the right password by default."""
    password = PASSWORDS[name] if password is None else password
    return {"Authorization": "Basic " + base64.b64encode(name.encode() + b":" + password).decode()}


@functools.lru_cache
def user_of(name):
    """A User, made once: to hash a password takes long."""
    salt = os.urandom(imgserver.SALT_SIZE)
    return imgserver.User(name, RIGHTS[name], salt,
                          imgserver.hash_password(PASSWORDS[name], salt))


def user_file(directory, names=tuple(RIGHTS)):
    """Write a file of users; returns its path."""
    path = os.path.join(directory, "users")
    users = {name: user_of(name) for name in names}
    imgserver.write_users(path, users, directory)
    return path


def write_images(serve_dir, private=True):
    """Images of each kind; without the private ones they are what strangers see."""
    write_v2(serve_dir, PUBLIC, public=True, owner=OWNER, name="seen",
             published_at="2020-01-01T00:00:00Z")
    write_v2(serve_dir, CHILD, public=True, owner=OWNER, origin=PRIVATE,
             published_at="2020-01-05T00:00:00Z")
    if not private:
        return
    write_v2(serve_dir, PRIVATE, public=False, owner=OWNER, name="secret", tags={"a": "b"},
             billing_tags=["gold"], acl=[uuid_of(99)], published_at="2020-01-02T00:00:00Z")
    with open(os.path.join(serve_dir, PRIVATE, "icon.png"), "wb") as file:
        file.write(b"\x89PNG")
    write_image(serve_dir, PRIVATE_V1, name="secret", restricted_to_uuid=OWNER)
    write_v2(serve_dir, WAITING, public=False)
    os.rename(os.path.join(serve_dir, WAITING), os.path.join(serve_dir, ".incoming-" + WAITING))


class CommandCase(ServerCase):

    def setUp(self):
        super().setUp()
        self.config = os.path.join(self.directory, "config.json")
        self.path = os.path.join(self.directory, "users")
        self.write_config({"users": "users", "serve_dir": "images"})

    def write_config(self, values):
        with open(self.config, "w") as file:
            json.dump(values, file)

    def user(self, *words, data=b"", status=0):
        """Run `imgserver.py user`; its output, and its error where it fails."""
        result = run_program("user", "--config", self.config, *words, data=data)
        self.assertEqual(result.returncode, status, result.stderr)
        self.assertNotIn(b"Traceback", result.stderr)
        return (result.stderr if status else result.stdout).decode()

    def fits(self, name, password):
        user = imgserver.read_users(self.path)[name]
        return imgserver.hash_password(password, user.salt) == user.hash


class Command(CommandCase):

    seconds = 5

    def test_a_user_is_made_changed_and_deleted(self):
        self.assertEqual(self.user(), "")
        self.user("joe@example.com", data=b"p\xc3\xa4ss word\r\nnot this\n")
        self.user("ann", "--rights", "manage", data=b"secret")
        self.assertEqual(self.user(), "joe@example.com read\nann manage\n")
        self.assertTrue(self.fits("joe@example.com", b"p\xc3\xa4ss word"))
        self.user("joe@example.com", "--rights", "publish")
        self.assertTrue(self.fits("joe@example.com", b"p\xc3\xa4ss word"))
        self.user("ann", data=b"other\n")
        self.assertTrue(self.fits("ann", b"other"))
        self.assertEqual(sorted(self.user().splitlines()),
                         ["ann manage", "joe@example.com publish"])
        self.user("ann", "--delete")
        self.assertEqual(self.user(), "joe@example.com publish\n")
        self.assertIn("no user ann", self.user("ann", "--delete", status=1))
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)
        self.assertEqual(sorted(os.listdir(self.directory)), ["config.json", "images", "users"])

    def test_mistakes(self):
        for words, text in (
                (("a b",), "is no name"), (("a:b",), "is no name"), (("",), "is no name"),
                (("x" * 65,), "is no name"), (("joe\n",), "is no name"),
                (("--rights", "read"), "NAME"), (("--delete",), "NAME"),
                (("joe", "--delete"), "no user joe"),
                (("joe", "--rights", "read", "--delete"), "either")):
            with self.subTest(words), self.assertRaises(imgserver.UserError) as caught:
                options = imgserver.option_parser().parse_args(["user", *words])
                imgserver.run_user(imgserver.Config.load(self.config), options)
            self.assertIn(text, str(caught.exception))
        with contextlib.redirect_stderr(io.StringIO()):
            self.assertRaises(SystemExit, imgserver.option_parser().parse_args,
                              ["user", "joe", "--rights", "all"])
        for data in (b"x" * 2000, b"x\0", b"\n"):
            self.assertIn("1024 bytes", self.user("joe", data=data, status=1))
        self.assertFalse(os.path.exists(self.path))

    def test_without_users_in_the_configuration(self):
        self.write_config({"serve_dir": "images"})
        self.assertIn('"users": "users"', self.user("joe", data=b"x\n", status=96))

    def test_a_file_that_others_may_read_is_refused(self):
        self.user("joe", data=b"x\n")
        os.chmod(self.path, 0o604)
        self.assertIn("chmod 600", self.user("joe", data=b"y\n", status=96))

    def test_two_commands_at_once(self):
        fd = os.open(self.directory, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_EX)
        self.assertEqual(self.user("joe", data=b"x\n", status=1),
                         f"imgserver: somebody else changes {self.path}\n")

    def test_a_user_who_is_deleted_meanwhile(self):
        """A line without a password would end the server."""
        self.user("joe", data=b"x\n")
        self.user("ann", data=b"x\n")
        real = imgserver.lock_directory

        def lock(*arguments):
            with mock.patch.object(imgserver, "lock_directory", real):
                run("joe", "--delete")
            return real(*arguments)

        def run(*words):
            options = imgserver.option_parser().parse_args(["user", *words])
            imgserver.run_user(imgserver.Config.load(self.config), options)
        with mock.patch.object(imgserver, "lock_directory", lock), \
                self.assertRaisesRegex(imgserver.UserError, "there is no user joe any more"):
            run("joe", "--rights", "manage")
        self.assertEqual(self.user(), "ann read\n")

    def test_mode_and_owner_stay(self):
        self.user("joe", data=b"x\n")
        os.chmod(self.path, 0o640)
        if os.getuid() == 0:
            os.chown(self.path, 12, 34)
        before = os.stat(self.path)
        self.user("joe", data=b"y\n")
        after = os.stat(self.path)
        self.assertNotEqual(before.st_ino, after.st_ino)
        self.assertEqual((before.st_mode, before.st_uid, before.st_gid),
                         (after.st_mode, after.st_uid, after.st_gid))

    @unittest.skipIf(os.getuid(), "only root may give files away")
    def test_a_new_file_is_that_of_the_owner_of_serve_dir(self):
        os.chown(self.serve_dir, 12, 34)
        self.user("joe", data=b"x\n")
        status = os.stat(self.path)
        self.assertEqual((status.st_uid, status.st_gid), (12, 34))

    def on_terminal(self, *answers):
        """(exit status, all that the terminal showed) of `user joe`, with these lines typed."""
        pid, fd = pty.fork()
        if not pid:
            default_signals()
            words = command("user", "--config", self.config, "joe")
            os.execv(words[0], words)
        shown = b""
        with contextlib.suppress(OSError):            # EIO: it has ended
            for answer in answers:
                count = shown.count(b": ")
                while shown.count(b": ") == count:
                    shown += os.read(fd, 1000)
                os.write(fd, answer)
            while True:
                shown += os.read(fd, 1000)
        os.close(fd)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()

    def test_on_a_terminal_it_is_typed_twice_and_not_shown(self):
        status, shown = self.on_terminal(b"swordfish\n", b"swordfish\n")
        self.assertEqual(status, 0, shown)
        self.assertNotIn("swordfish", shown)
        self.assertTrue(self.fits("joe", b"swordfish"))

    def test_two_that_differ_change_nothing(self):
        status, shown = self.on_terminal(b"swordfish\n", b"swordfisk\n")
        self.assertEqual(status, 1, shown)
        self.assertIn("differ", shown)
        self.assertFalse(os.path.exists(self.path))

    def test_ctrl_c_ends_the_question(self):
        status, shown = self.on_terminal(b"\x03")
        self.assertIn(status, (130, -2), shown)
        self.assertFalse(os.path.exists(self.path))


class Start(ServerCase):

    def refused(self, text, **config):
        with self.assertRaises(imgserver.UserError) as caught:
            self.site(**config)
        self.assertEqual(caught.exception.exit_status, 96)
        self.assertIn(text, str(caught.exception))

    def test_files_that_are_refused(self):
        path = user_file(self.directory)
        self.refused("No such file or directory: `imgserver.py user NAME` makes it",
                     users=os.path.join(self.directory, "none"))
        self.refused("regular", users=self.serve_dir)
        for mode in (0o604, 0o602, 0o666):
            os.chmod(path, mode)
            self.refused("others may", users=path)
        os.chmod(path, 0o600)
        with open(path) as file:
            line = file.readline()
        for text in (line + line, "joe\n", line.replace("16384", "4096"), "\0", "\xff",
                     line.replace("read", "all"), line.replace("$1$", "$1$zz"), " " + line):
            with self.subTest(text):
                with open(path, "w") as file:
                    file.write(text)
                self.refused("line", users=path)
        self.assertRaises(imgserver.UserError, self.site, read="nobody")
        self.assertRaises(imgserver.UserError, self.site, read=["users"])
        self.refused("users names no file", read="users")

    def test_the_server_ends_with_96(self):
        config = os.path.join(self.directory, "config.json")
        with open(config, "w") as file:
            json.dump({"users": "none", "serve_dir": "images", "listen_port": 1}, file)
        result = run_program("--config", config)
        self.assertEqual(result.returncode, 96)
        self.assertIn(b"none: No such file", result.stderr)

    def test_it_says_how_many_images_are_hidden(self):
        write_images(self.serve_dir)
        server = self.serve(config={"read": "public"})
        server.wait_log(r'read is "public": 2 of 4 images are hidden from strangers, '
                        "who cannot import 1 that")
        server = self.serve(config={"read": "users", "users": user_file(self.directory)})
        server.wait_log(r'read is "users": 4 of 4 images are hidden')


class FirstLooks(ServerCase):

    def test_a_first_look_at_a_private_image_reads_no_more_than_one_at_none(self):
        write_images(self.serve_dir)
        time.sleep(SETTLED)
        site, reads, read = self.site(read="public"), [], imgserver.ImageReader.read
        site.log_hidden()                 # as at the start: read for IMGAPI
        write_v2(self.serve_dir, uuid_of(77), public=False)
        time.sleep(SETTLED)

        def counted(reader, uuid, *arguments, **words):
            reads.append(uuid)
            return read(reader, uuid, *arguments, **words)
        with mock.patch("imgserver.ImageReader.read", counted):
            for target, expected in (("/images", {uuid_of(77)}), ("/datasets", {PRIVATE})):
                del reads[:]
                self.assertError(ask(site, f"{target}/{uuid_of(88)}"), 404)
                self.assertLessEqual(expected, set(reads))
                del reads[:]
                for uuid in (uuid_of(77), PRIVATE, PRIVATE_V1, uuid_of(88)):
                    self.assertError(ask(site, f"{target}/{uuid}"), 404)
                self.assertEqual(reads, [])


class SiteCase(ServerCase):

    config = {}

    def setUp(self):
        super().setUp()
        write_images(self.serve_dir)
        self.path = user_file(self.directory)
        self.open = self.site(users=self.path, **self.config)

    def ask(self, target, method="GET", user=None, site=None, **headers):
        return ask(site or self.open, target, method, **({} if user is None else basic(user)),
                   **headers)

    def failures(self):
        return log_of(self.open).count("gave a wrong password")


class Credentials(SiteCase):

    TARGET = f"/images/{PRIVATE}?action=disable"

    def post(self, **headers):
        return ask(self.open, self.TARGET, "POST", **headers)

    def test_what_does_not_fit_is_401(self):
        cases = [
            {}, basic("rita", b"wrong"), basic("nobody", b"x"), basic("rita", b""),
            basic("rita", b"reads\0"), basic("", b""), basic("rita", b"x" * 10000),
            basic("mona", "verw\u00e4ltet: ja".encode("latin-1")), {"Authorization": ""},
            {"Authorization": "Basic"}, {"Authorization": "Basic cml0YQ=="},
            {"Authorization": "Basic ?"}, {"Authorization": "Basic \xff\xfe"},
            {"Authorization": basic("mona")["Authorization"].replace("Basic", "Bearer")},
            {"Authorization": 'Signature keyId="/a/keys/b",algorithm="rsa-sha1"'},
            {"Authorization": f"{basic('mona')['Authorization']}, x"},
        ]
        for headers in cases:
            with self.subTest(headers):
                answer = self.post(**headers)
                is_given = headers.get("Authorization", "").startswith("Basic")
                self.assertEqual(
                    self.assertError(answer, 401, "UnauthorizedError")["message"],
                    "the user or the password is wrong" if is_given else
                    "a user and a password are needed")
                self.assertEqual(answer.headers["www-authenticate"], 'Basic realm="imgserver"')
        self.assertNotIn("Authorization", log_of(self.open))

    def test_a_user_without_the_right_is_403(self):
        for name, right in (("rita", "publish"), ("paul", "manage")):
            error = self.assertError(self.post(**basic(name)), 403, "OperatorOnly")
            self.assertEqual(error["message"], f"user {name} lacks the right to {right}")
        self.assertEqual(self.post(**basic("mona")).status, 200)

    def test_lists_by_state_are_for_who_may_publish(self):
        write_v2(self.serve_dir, uuid_of(20), disabled=True)
        for target in ("/images?state=all", "/images?state=disabled", "/images?state=unactivated"):
            uuids = [{image["uuid"] for image in self.ask(target, user=user).json()}
                     for user in (None, "rita", "paul")]
            self.assertEqual(uuids[0], uuids[1])
            self.assertTrue(uuids[2] - uuids[1], target)
            self.assertNotIn(WAITING, uuids[0])
            for user in (None, "paul"):
                self.assertEqual(self.ask(target, user=user).headers["cache-control"],
                                 "private, no-store")

    def test_the_scheme_has_no_case(self):
        header = basic("mona")["Authorization"].replace("Basic", "bASIC")
        self.assertEqual(self.post(Authorization=header).status, 200)

    def test_the_log_has_a_line_for_each_failure_and_no_password(self):
        self.post(**basic("rita", b"hunter2"), X_Real_IP="10.9.8.7", peer="")
        self.post(**basic("swordfish", b"hunter2"), peer="")
        self.post(**basic("rita", b"hunter2"), X_Real_IP="10.9.8.7")
        lines = log_of(self.open).splitlines()
        self.assertEqual([line.partition(" ")[2] for line in lines], [
            "warn 10.9.8.7 gave a wrong password for user rita",
            "warn unix gave a wrong password or user",
            "warn 127.0.0.1 gave a wrong password for user rita"])

    def test_on_an_open_get_bad_ones_count_as_none(self):
        for target in ("/images", f"/images/{PRIVATE}", "/datasets", "/ping"):
            with self.subTest(target):
                bad = ask(self.open, target, **basic("rita", b"wrong"))
                self.assertEqual((bad.status, bad.body, bad.headers),
                                 (200, *(lambda good: (good.body, good.headers))(
                                     ask(self.open, target))))

    def test_an_edited_file_counts_with_the_next_request(self):
        self.assertEqual(self.post(**basic("mona")).status, 200)
        user_file(self.directory, ("rita", "paul"))
        self.assertError(self.post(**basic("mona")), 401)
        user_file(self.directory)
        self.assertEqual(self.post(**basic("mona")).status, 200)

    def test_a_file_that_cannot_be_read_leaves_the_users(self):
        spoil = (lambda: os.chmod(self.path, 0o644), lambda: os.unlink(self.path),
                 lambda: os.mkdir(self.path), lambda: os.rmdir(self.path))
        for number, step in enumerate(spoil, 1):
            step()
            for _ in range(2):
                self.assertEqual(self.post(**basic("mona")).status, 200)
            self.assertEqual(log_of(self.open).count("error the users stay"), number)
        user_file(self.directory, ("rita",))
        self.assertError(self.post(**basic("mona")), 401)

    def test_headers_that_a_client_makes_up_grant_nothing(self):
        site = self.site(manage_from=["10.0.0.1"])
        for name in ("X_Real_IP", "X_Forwarded_For", "Forwarded", "Host", "X_Remote_User"):
            answer = ask(site, self.TARGET, "POST", **{name: "10.0.0.1"})
            self.assertError(answer, 403, "OperatorOnly")

    def test_an_address_suffices_with_any_password(self):
        site = self.site(users=self.path, manage_from=["127.0.0.1"])
        self.assertEqual(ask(site, self.TARGET, "POST").status, 200)
        self.assertEqual(ask(site, self.TARGET, "POST", **basic("rita", b"no")).status, 200)


class Staging(SiteCase):
    """An image whose manifest says that it is unactivated is not in staging."""

    def test_it_is_for_who_may_manage(self):
        uuid = uuid_of(20)
        write_v2(self.serve_dir, uuid, state="unactivated")
        for method, target in (("POST", f"/images/{uuid}?action=activate"),
                               ("DELETE", f"/images/{uuid}/icon"), ("DELETE", f"/images/{uuid}")):
            self.assertError(self.ask(target, method, "paul"), 403, "OperatorOnly")
            self.assertEqual(self.ask(target, method, "mona").status,
                             {"POST": 200}.get(method, 404 if "icon" in target else 204))
        self.assertFalse(os.path.exists(os.path.join(self.serve_dir, uuid)))


class Checking(SiteCase):
    """When a password is hashed, and where."""

    def setUp(self):
        super().setUp()
        self.hashed = []
        real = imgserver.hash_password

        def noted(password, salt):
            self.hashed.append(password)
            return real(password, salt)
        imgserver.hash_password = noted
        self.addCleanup(setattr, imgserver, "hash_password", real)

    def request(self, may_block, peer="192.0.2.1", **headers):
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        request = parse(f"GET /ping HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode("latin-1"))
        request.may_block, request.peer = may_block, peer
        return request

    def test_never_in_the_event_loop(self):
        for headers in (basic("rita"), basic("rita", b"wrong"), basic("nobody", b"x")):
            self.assertRaises(imgserver.NeedsThread, self.open.answer,
                              self.request(False, **headers))
            self.assertEqual(self.hashed, [])
            self.assertEqual(self.open.answer(self.request(True, **headers)).status, 200)
            self.assertEqual(len(self.hashed), 1)
            self.assertEqual(self.open.answer(self.request(False, **headers)).status, 200)
            self.assertEqual(len(self.hashed), 1)     # it is remembered
            self.hashed.clear()

    def test_an_unknown_user_costs_the_same(self):
        self.open.answer(self.request(True, **basic("nobody", b"x")))
        self.open.answer(self.request(True, **basic("rita", b"y")))
        self.assertEqual(self.hashed, [b"x", b"y"])

    def test_nothing_without_the_header(self):
        self.open.rights.users.user_of = None         # would fail if it were called
        self.assertEqual(self.open.answer(self.request(False)).status, 200)

    def test_one_pair_that_many_ask_with_is_hashed_once(self):
        threads = [threading.Thread(target=self.open.answer,
                                    args=(self.request(True, f"192.0.2.{n}", **basic("paul")),))
                   for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(self.hashed, [b"publishes"])

    def test_what_is_remembered_ends(self):
        for name, password in (("rita", b"reads"), ("rita", b"wrong")):
            self.open.answer(self.request(True, **basic(name, password)))
            checked = self.open.rights.users._state[2]
            (digest, (until, user)), = [each for each in checked.items() if each[1][0] > 0]
            checked[digest] = 0.0, user
            self.assertRaises(imgserver.NeedsThread, self.open.answer,
                              self.request(False, **basic(name, password)))
        self.open.answer(self.request(True, **basic("rita")))
        self.assertEqual(len(checked), 1)             # the old ones are gone

    def test_a_full_queue_is_503_before_a_thread(self):
        users = self.open.rights.users
        users._waiting += ["192.0.2.1"] * imgserver.CHECKS_OF_ONE
        post = self.request(False, **basic("rita"))
        post.method = "POST"
        self.assertEqual(self.open.answer(post).status, 503)
        self.assertEqual(self.open.answer(self.request(False, **basic("rita"))).status, 200)
        for query, status in (("name=web", 200), ("state=all", 503)):
            answer = ask(self.open, "/images?" + query, peer="192.0.2.1", **basic("rita"))
            self.assertEqual(answer.status, status)
        self.assertRaises(imgserver.NeedsThread, self.open.answer,
                          self.request(False, "192.0.2.2", **basic("rita")))
        users._waiting += [""] * imgserver.CHECKS_OF_ONE
        for peer in ("", "192.0.2.2"):
            post = self.request(False, peer, **basic("rita"))
            post.method = "POST"
            self.assertEqual(self.open.answer(post).status, 503)
        self.assertEqual(self.hashed, [])


class Hidden(SiteCase):
    """read is "public"."""

    config = {"read": "public"}

    SINGLE = [f"{path}{query}" for path in (
        "/images/@", "/images/@/", "/images/@/file", "/images/@/file/", "/images/@/icon",
        "/datasets/@", "/datasets/@/image.zfs.gz", "/datasets/@/none", "/images/@/none",
        "http://images.example.com/datasets/@/image.zfs.gz", "/images%2f@", "/images/%40@")
        for query in ("", f"?account={OWNER}", f"?account={uuid_of(99)}", "?account=x",
                      "?index=0", "?index=7", "?channel=*", "?inclAdminFields=true",
                      "?state=all")
    ] + ["/images?marker=@", "/images?marker=@&limit=1", "/images?marker=@&state=all",
         "/images?owner=@", "/images?name=@", f"/images?marker=@&account={OWNER}"]

    LISTS = ["/images", "/datasets", "/images?public=false", "/images?public=true",
             "/images?name=secret", "/images?name=~secr", "/images?tag.a=b", "/images?limit=2",
             "/images?billing_tag=gold", f"/images?account={OWNER}", f"/images?owner={OWNER}",
             f"/images?account={uuid_of(99)}", "/images?state=all", "/images?state=disabled",
             "/images?state=unactivated", "/images?sort=published_at.desc&limit=2",
             "/images?marker=2020-01-02T00:00:00Z", "/images?marker=2020-01-02&limit=1",
             "/datasets?name=secret", "/datasets?name=~s", "/datasets?type=zone-dataset",
             "/images/?channel=*", "/images?inclAdminFields=false", f"/images?origin={PRIVATE}"]

    HEADERS = [{}, {"If_None_Match": "*"}, {"If_Match": "*"}, {"If_Match": '"x"'},
               {"Range": "bytes=0-3"}, {"Accept": "application/json"}, {"Accept_Version": "~2"},
               {"Accept_Encoding": "gzip"}, {"If_Modified_Since": "Fri, 31 Dec 2038 00:00:00 GMT"},
               basic("rita", b"wrong"), {"X_Real_IP": "127.0.0.1"}, {"Host": "localhost"}]

    def same(self, one, other):
        self.assertEqual((one.status, one.headers, one.body),
                         (other.status, other.headers, other.body))

    def test_a_private_image_answers_as_an_unknown_one(self):
        for uuid in (PRIVATE, PRIVATE_V1, WAITING):
            # As unknown as a uuid that differs in one place: its length is in the answers.
            for target in self.SINGLE:
                for method, headers in [("GET", each) for each in self.HEADERS] \
                        + [("HEAD", {}), ("OPTIONS", {}), ("POST", {}), ("PUT", {}),
                           ("DELETE", {}), ("PATCH", {})]:
                    with self.subTest(uuid=uuid, target=target, method=method, headers=headers):
                        one, other = (ask(self.open, target.replace("@", each), method, **headers)
                                      for each in (uuid, UNKNOWN))
                        one.body = one.body.replace(uuid.encode(), UNKNOWN.encode())
                        length = "content-length"
                        self.assertEqual(one.headers.get(length), other.headers.get(length))
                        self.same(one, other)
                        self.assertNotEqual(one.status, 500)

    def test_lists_are_those_of_a_server_without_it(self):
        directory = os.path.join(self.directory, "seen")
        os.mkdir(directory)
        write_images(directory, private=False)
        seen = imgserver.Config({"serve_dir": directory, "users": self.path, **self.config})
        seen = imgserver.Site(seen, imgserver.Store(seen, self.open.log, imgserver.run_out),
                              self.open.log)
        for user_first in (False, True):
            for target in self.LISTS:
                for method, headers in [("GET", each) for each in self.HEADERS] + [("HEAD", {})]:
                    with self.subTest(target=target, method=method, headers=headers):
                        if user_first:
                            ask(self.open, target, method, **{**headers, **basic("rita")})
                        one = ask(self.open, target, method, **headers)
                        self.same(one, ask(seen, target, method, **headers))
                        self.assertNotIn(b"secret", one.body)

    def test_users_see_everything_and_no_cache_keeps_it(self):
        images = [image["uuid"] for image in self.ask("/images", user="rita").json()]
        self.assertCountEqual(images, [PUBLIC, PRIVATE, PRIVATE_V1, CHILD])
        self.assertEqual(len(self.ask("/datasets", user="rita").json()), 4)
        self.assertEqual(len(self.ask("/images?name=secret", user="rita").json()), 2)
        self.assertEqual(len(self.ask("/datasets?name=secret", user="rita").json()), 2)
        for target in ("/images", "/datasets", "/images?name=secret", "/datasets?name=secret",
                       *(f"/images/{PRIVATE}{path}" for path in ("", "/file", "/icon")),
                       f"/images/{WAITING}", f"/images/{WAITING}/file", f"/datasets/{PRIVATE}",
                       f"/datasets/{PRIVATE}/image.zfs.gz", f"/images?marker={PRIVATE}"):
            for headers in ({}, {"If_None_Match": "*"}):
                with self.subTest(target, headers=headers):
                    answer = self.ask(target, user="rita", **headers)
                    self.assertIn(answer.status, (200, 304), answer)
                    self.assertEqual(answer.headers["cache-control"], "private, no-store")
                    self.assertRegex(answer.headers["vary"], "(^|, )Authorization$")

    def test_what_is_the_same_for_all_may_be_kept(self):
        for target in (f"/images/{PUBLIC}", f"/images/{PUBLIC}/file"):
            for user in (None, "rita"):
                answer = self.ask(target, user=user)
                self.assertIn("public", answer.headers["cache-control"])
                self.assertNotIn("Authorization", answer.headers.get("vary", ""))
        answer = self.ask("/images")
        self.assertIn("public", answer.headers["cache-control"])
        self.assertEqual(answer.headers["vary"], "Accept-Encoding, Authorization")
        answer = self.ask(f"/images/{PRIVATE}")
        self.assertEqual(answer.headers["cache-control"], "private, no-store")

    def test_lists_of_users_and_strangers_are_kept_apart(self):
        for target, accept in (("/images", "*/*"), ("/datasets", "*/*"),
                               ("/datasets", "application/json")):
            tags = {}
            for encoding in ("identity", "gzip", "identity"):
                for user, count in (("rita", 4), (None, 2), ("rita", 4)):
                    with self.subTest(target, accept=accept, encoding=encoding, user=user):
                        answer = self.ask(target, user=user, Accept=accept,
                                          Accept_Encoding=encoding)
                        body = answer.body if encoding == "identity" else gzip.decompress(
                            answer.body)
                        self.assertEqual(len(json.loads(body)), count)
                        tags[user] = answer.headers["etag"]
            self.assertNotEqual(tags["rita"], tags[None])
            answer = self.ask(target, Accept=accept, If_None_Match=tags["rita"])
            self.assertEqual(answer.status, 200)

    def test_an_address_sees_them_but_no_script_of_another_site(self):
        site = self.site(read="public", publish_from=["127.0.0.1"])
        for target, headers in ((f"/images/{PRIVATE}", {}), ("/images", {}), ("/datasets", {})):
            answer = self.ask(target, site=site, **headers)
            self.assertEqual(answer.status, 200)
            self.assertNotIn("access-control-allow-origin", answer.headers)
        self.assertIn("access-control-allow-origin",
                      self.ask(f"/images/{PUBLIC}", site=site).headers)

    def test_it_is_hidden_as_soon_as_it_is_private(self):
        self.assertEqual(self.ask(f"/images/{PUBLIC}").status, 200)
        write_v2(self.serve_dir, PUBLIC, public="no idea", owner=OWNER)
        self.assertError(self.ask(f"/images/{PUBLIC}"), 404)
        self.assertError(self.ask(f"/datasets/{PUBLIC}/image.zfs.gz"), 404)

    def test_without_users_nobody_sees_them(self):
        site = self.site(read="public")
        self.assertError(ask(site, f"/images/{PRIVATE}", **basic("mona")), 404)
        self.assertEqual(len(ask(site, "/images", **basic("mona")).json()), 2)


class UsersOnly(SiteCase):
    """read is "users"."""

    config = {"read": "users"}

    def test_everything_but_options_needs_one(self):
        for target in ("/", "/ping", "/images", "/datasets", f"/images/{PUBLIC}", "/none",
                       "/state", f"/images/{PUBLIC}/file", f"/datasets/{PUBLIC}/image.zfs.gz",
                       f"/images/{UNKNOWN}", "/ping?error=Internal", f"/images?marker={PUBLIC}"):
            for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "WHATEVER"):
                with self.subTest(target, method=method):
                    for headers in ({}, basic("rita", b"wrong")):
                        answer = ask(self.open, target, method, **headers)
                        self.assertError(answer, 401, "UnauthorizedError")
                        self.assertEqual(answer.headers["www-authenticate"],
                                         'Basic realm="imgserver"')
            self.assertIn(ask(self.open, target, "OPTIONS").status, (204, 404))
        for target in ("/ping", "/images", "/datasets", f"/images/{PRIVATE}/file"):
            answer = self.ask(target, user="rita")
            self.assertEqual(answer.status, 200)
            self.assertEqual(answer.headers["cache-control"], "private, no-store")

    def test_with_addresses_alone(self):
        site = self.site(read="users", publish_from=["10.0.0.1"])
        error = self.assertError(ask(site, "/ping"), 403, "OperatorOnly")
        self.assertEqual(error["message"], "address 127.0.0.1 lacks the right to read")
        site = self.site(read="users", publish_from=["127.0.0.1"])
        self.assertEqual(ask(site, "/ping").status, 200)


class Serving(ServerCase):
    """The same on a socket: TCP, the Unix socket, nginx."""

    unix = fresh = False

    def setUp(self):
        super().setUp()
        write_images(self.serve_dir)
        self.server = self.serve(unix=self.unix, fresh=self.fresh, config={
            "users": user_file(self.directory), "read": "public"})
        self.set_up_front()

    def set_up_front(self):
        """Tests go through what stands in front of the server."""

    def connect(self):
        return self.server.connect()

    def get(self, target, headers=(), method="GET"):
        with self.connect() as connection:
            return connection.request(target, method, headers)

    def test_reading(self):
        for target in (f"/images/{PRIVATE}", f"/images/{PRIVATE}/file", f"/datasets/{PRIVATE}",
                       f"http://localhost/datasets/{PRIVATE}/image.zfs.gz"):
            with self.subTest(target):
                self.assertError(self.get(target), 404, "ResourceNotFound")
                self.assertError(self.get(target, basic("rita", b"no")), 404, "ResourceNotFound")
                self.assertEqual(self.get(target, basic("rita")).status, 200)
                self.assertError(self.get(target), 404, "ResourceNotFound")
        self.assertEqual(len(self.get("/images").json()), 2)
        self.assertEqual(len(self.get("/images", basic("mona")).json()), 4)

    def test_publishing(self):
        data = b"not a stream"
        uuid = uuid_of(50)
        manifest = {"v": 2, "uuid": uuid, "name": "new", "version": "1", "type": "other",
                    "os": "other", "public": False}
        steps = [("POST", f"/images/{uuid}?action=import", json.dumps(manifest).encode(), "paul"),
                 ("PUT", f"/images/{uuid}/file?compression=none", data, "paul"),
                 ("POST", f"/images/{uuid}?action=activate", b"", "paul"),
                 ("POST", f"/images/{uuid}?action=update", b'{"description": "d"}', "mona"),
                 ("POST", f"/images/{uuid}?action=disable", b"", "mona"),
                 ("DELETE", f"/images/{uuid}", b"", "mona")]
        for method, target, body, user in steps:
            lesser = {"paul": "rita", "mona": "paul"}[user]
            for headers, status in (({}, 401), (basic(user, b"x"), 401), (basic(lesser), 403),
                                    (basic(user), (200, 204))):
                with self.subTest(target, status=status), self.connect() as connection:
                    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                    connection.send(f"{method} {target} HTTP/1.1\r\nHost: x\r\n{head}"
                                    f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                    answer = connection.answer()
                    if status in (401, 403):
                        self.assertError(answer, status)
                        self.assertEqual("www-authenticate" in answer.headers, status == 401)
                    else:
                        self.assertIn(answer.status, status, answer)
        self.assertEqual(sorted(os.listdir(self.serve_dir)),
                         sorted([PUBLIC, PRIVATE, PRIVATE_V1, CHILD, ".incoming-" + WAITING]))


class OnTcp(Serving):

    def test_the_log_names_the_user(self):
        self.get("/ping?1", basic("rita"))
        self.get("/ping?2", basic("rita", b"hunter2"))
        self.get("/ping?3")
        self.server.wait_log(r"ping\?3")
        log = self.server.log()
        self.assertRegex(log, r'info 127\.0\.0\.1 "GET /ping\?1 HTTP/1\.1" 200 \d+ [0-9.]+ms rita ')
        self.assertRegex(log, r'info 127\.0\.0\.1 "GET /ping\?2 HTTP/1\.1" 200 \d+ [0-9.]+ms - ')
        self.assertRegex(log, r'info 127\.0\.0\.1 "GET /ping\?3 HTTP/1\.1" 200 \d+ [0-9.]+ms - ')
        self.assertEqual(log.count("gave a wrong password"), 1)

    def test_no_password_of_a_target_is_logged(self):
        for line in ("GET http://joe:hunter2@host/ping HTTP/1.1", "GET joe:hunter2@host HTTP/1.1",
                     "GET HTTP://joe:hunter2@host?x HTTP/1.1", "GET ftp://joe:hunter2@h HTTP/1.1",
                     "GET http://joe:hunter2@host/none HTTP/1.1", "CONNECT joe:hunter2@h HTTP/1.1",
                     "GET http://joe:hunter2@host HTTP/2.0", "GET http://joe:hunt er2@h/ HTTP/1.1",
                     "GET http://joe:hunter2@host/x y", "GET http://joe:@hunter2@host/ HTTP/1.1"):
            self.server.raw(f"{line}\r\nHost: x\r\n\r\n".encode())
        self.get("/ping?end")
        self.server.wait_log(r"ping\?end")
        log = self.server.log()
        self.assertNotRegex(log, "hunt|joe")
        self.assertIn('"GET http://host/ping HTTP/1.1" 200', log)

    def test_the_refusal_comes_before_the_body(self):
        for headers in ({}, basic("paul", b"x"), basic("rita")):
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            for target in (f"/images/{WAITING}/file?compression=gzip", f"/images/{UNKNOWN}/file"):
                with self.subTest(target, headers=headers), self.connect() as connection:
                    connection.send(f"PUT {target} HTTP/1.1\r\nHost: x\r\n{head}Content-Length: "
                                    "33554432\r\nExpect: 100-continue\r\n\r\n".encode())
                    answer = connection.answer()  # a 100 Continue would be no status line of it
                    self.assertEqual(answer.status, 403 if "cml0YTpyZWFkcw==" in head else 401)
                    self.assertTrue(connection.closed())


class Guesses(Serving):

    seconds = 5
    fresh = True
    test_reading = test_publishing = None

    def test_a_thousand_wrong_tries(self):
        connection = self.connect()
        self.addCleanup(connection.close)
        self.assertEqual(connection.request("/images", headers=basic("rita")).status, 200)
        before, statuses = self.server.memory("VmHWM"), []

        def attack(number):
            with self.connect() as other:
                for each in range(20):
                    answer = other.request(f"/images/{PUBLIC}?action=update", "POST",
                                           basic("mona", b"guess%d.%d" % (number, each)))
                    statuses.append(answer.status)
        threads = [threading.Thread(target=attack, args=(number,)) for number in range(50)]
        for thread in threads:
            thread.start()
        for _ in range(200):                  # who is known, or gave none, is answered
            self.assertEqual(connection.request("/images", headers=basic("rita")).status, 200)
            self.assertEqual(connection.request(f"/images/{PUBLIC}").status, 200)
            self.assertEqual(connection.request(f"/images/{PUBLIC}/file").status, 200)
        for thread in threads:
            thread.join()
        self.assertEqual(len(statuses), 1000)
        self.assertLessEqual(set(statuses), {401, 503})
        self.assertLess(self.server.memory("VmHWM"), before + (40 << 20))
        log = wait_for(lambda: (lambda log: log.count('"POST') == 1000 and log)(self.server.log()))
        self.assertEqual(log.count("gave a wrong password for user mona"), statuses.count(401))
        self.assertNotIn("guess", log)
        self.assertEqual(self.get(f"/images/{PRIVATE}", basic("rita")).status, 200)


class OnUnixSocket(Serving):

    unix = True


class BehindNginx(Serving):

    unix = True
    start_nginx, _run_nginx = test_nginx.WithNginx.start_nginx, test_nginx.WithNginx._run_nginx
    changes = (('        proxy_set_header Authorization "";\n', ""),
               ("""        limit_except GET OPTIONS {
            auth_basic "imgserver";
            auth_basic_user_file /etc/nginx/imgserver.users;
        }
""", ""))                                 # as the README says

    def set_up_front(self):
        need("nginx")
        socket_of_ours = f"unix:{self.server.address};"
        self.port = self.start_nginx(test_nginx.snippet(), *self.changes, (
            "unix:/var/imgserver/imgserver.sock;", socket_of_ours))

    def connect(self):
        return Connection(("127.0.0.1", self.port))

    def test_a_failure_is_logged_with_the_address_of_the_client(self):
        self.get("/ping", basic("rita", b"wrong"))
        self.server.wait_log(r"warn 127\.0\.0\.1 gave a wrong password for user rita")


del Serving


if __name__ == "__main__":
    unittest.main()
