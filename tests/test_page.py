"""The page at /: its HTML as a value, and the same in a real browser."""

import base64
import contextlib
import fcntl
import gc
import gzip
import hashlib
import html.parser
import json
import os
import re
import select
import shutil
import subprocess
import tempfile
import time
import unittest
from unittest import mock
from urllib.parse import quote

from tests.support import (PATIENCE, ServerCase, ask, check_only, imgserver, need, parse,
                           uuid_of, wait_for, write_image, write_v2)

HTML = "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"

# Texts that would do something if one place forgot to escape them.
CONTROLS = " \u202egnp.exe \u2066 \0 \7 \x1b[31m \x9b31m \ufeff"      # no name has these
HOSTILE = [
    "<script>window.hit = 1; console.error('hit')</script>",
    "\"><img src='http://evil.example/x.png' onerror='window.hit = 1'>",
    "'><svg onload=window.hit=1>",
    "</style></title></script><!-- <b>",
    "&lt;b&gt; &amp; &#60;script&#62;",
    "javascript:window.hit=1",
    "\u05d0\u05d1\u05d2 (from right to left)",
    "http://evil.example/`${window.hit=1}`{{hit}}",
    "名前 \U0001f4be \u0301\u0301\u0301 " + "w" * 200,
]


LOGIN = "Basic " + base64.b64encode(b"joe:secret").decode()


def users_file(directory):
    """A file with the user of LOGIN, who may read."""
    path = os.path.join(directory, "users")
    salt = bytes(imgserver.SALT_SIZE)
    imgserver.write_users(path, {"joe": imgserver.User(
        "joe", "read", salt, imgserver.hash_password(b"secret", salt))}, directory)
    return path


class Reader(html.parser.HTMLParser):
    """A page as a parser sees it: tags = [(tag, attributes)], and the text of each row."""

    VOID = {"meta", "link", "input", "img"}

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.rows, self.lines, self.text = [], [], [], ""
        self._open = []
        self.feed(text)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "li":
            self.rows.append("")
        if tag == "code":
            self.lines.append("")

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, f"</{tag}> does not fit"

    def handle_data(self, data):
        if "script" in self._open or "style" in self._open:
            return
        self.text += data
        if "li" in self._open:
            self.rows[-1] += data
        if "code" in self._open:
            self.lines[-1] += data

    def links(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]


class PageCase(ServerCase):

    def read(self, site, target="/?page=1", **headers):
        answer = ask(site, target, **headers)
        self.assertEqual(answer.status, 200, answer)
        return Reader(answer.body.decode())

    def images(self, count, **fields):
        for number in range(1, count + 1):
            write_v2(self.serve_dir, uuid_of(number), **{
                "name": f"n{number}", "published_at": f"2024-01-{number:02}T00:00:00Z", **fields})


class Pages(PageCase):

    def test_when_it_is_the_answer(self):
        site = self.site()
        for target, accept, is_page in (
                ("/", HTML, True), ("/", "application/xhtml+xml", True), ("/", "*/*", False),
                ("/", None, False), ("/?q=x", HTML, True), ("/?q=x", None, False),
                ("/?page=1", None, True), ("/?page=1", "application/json", True)):
            with self.subTest(target, accept=accept):
                answer = ask(site, target, Accept=accept)
                self.assertEqual(answer.status, 200)
                self.assertEqual(answer.headers["content-type"].startswith("text/html"), is_page)
                self.assertIn("Accept", answer.headers["vary"])
        with open(os.path.join(self.serve_dir, "index.html"), "w") as file:
            file.write("<p>mine")
        self.assertEqual(ask(site, "/", Accept=HTML).body, b"<p>mine")
        self.assertIn(b"SmartOS images", ask(site, "/?page=1").body)
        write_v2(self.serve_dir, uuid_of(1))
        self.assertEqual(ask(site, f"/images/{uuid_of(1)}", Accept=HTML).json()["v"], 2)

    def test_what_a_row_says(self):
        base, web = uuid_of(1), uuid_of(2)
        write_image(self.serve_dir, base, name="base", version="1.2.3", description="A base",
                    published_at="2024-05-06T07:08:09Z", homepage="https://example.com/?a=1&b=2")
        write_v2(self.serve_dir, web, b"x" * 1500, name="web", origin=base, public=False,
                 published_at="2024-05-07T00:00:00Z", description="d" * 300)
        write_v2(self.serve_dir, uuid_of(3), name="lost", origin=uuid_of(9), os="linux",
                 published_at="2024-05-05T00:00:00Z", homepage="javascript:alert(1)")
        write_v2(self.serve_dir, uuid_of(4), name="off", disabled=True)
        page = self.read(self.site())
        self.assertEqual([row[:1] + row.split()[0][1:] for row in page.rows],
                         ["Wweb", "Bbase", "Llost"])
        first, second, third = page.rows
        self.assertIn("web 2.0.0" + "d" * 199 + "…smartos · zone-dataset · 1.46\xa0KiB · "
                      "2024-05-07 · private · builds on base 1.2.3 · Manifest", first)
        self.assertIn("base 1.2.3A basesmartos · zone-dataset · 17\xa0bytes · 2024-05-06 · 1 builds "
                      "on it · Homepage · Manifest", second)
        self.assertIn(f"linux · zone-dataset · 17\xa0bytes · 2024-05-05 · builds on {uuid_of(9)}, "
                      "which is not here · Manifest", third)
        self.assertEqual(page.lines, ["imgadm sources -a http://images.example.com"] + [
            f"imgadm import {uuid_of(number)}" for number in (2, 1, 3)])
        self.assertIn("https://example.com/?a=1&b=2", page.links("href"))
        self.assertNotIn("javascript", "".join(page.links("href")))
        self.assertIn("3 images, 1.50\xa0KiB", page.text)

    def test_a_homepage_is_checked_again(self):
        self.images(1)
        site = self.site()
        with mock.patch.object(imgserver.Image, "fields", lambda self: {
                "homepage": "javascript:alert(1)"}):
            self.assertNotIn("javascript", "".join(self.read(site, "/?page=1", Host="x")
                                                   .links("href")))

    def test_sizes(self):
        for size, wanted in ((0, "0 bytes"), (999, "999 bytes"), (1000, "0.98 KiB"),
                             (1024 * 99.6, "99.6 KiB"), (310 << 20, "310 MiB"),
                             (1 << 40, "1.00 TiB"), (1 << 60, "1.00 EiB"),
                             (1000 << 60, "0.98 ZiB")):
            self.assertEqual(imgserver.size_text(size).replace("\xa0", " "), wanted)

    def test_icons(self):
        self.images(2)
        with open(os.path.join(self.serve_dir, uuid_of(1), "icon.png"), "wb") as file:
            file.write(b"icon")
        site = self.site()
        page = self.read(site)
        [source] = page.links("src")
        self.assertEqual(ask(site, "/" + source).body, b"icon")

    def test_the_line_for_sources(self):
        for config, host, wanted in (
                ({}, "h:8080", "http://h:8080"), ({"prefix": "https://"}, "h", "https://h"),
                ({"suffix": ":81/a$(b)"}, "h", "'http://h:81/a$(b)'"),
                ({"suffix": ":81"}, "h:90", "http://h:90"), ({}, "[::1]:80", "'http://[::1]:80'")):
            with self.subTest(config, host=host):
                page = self.read(self.site(**config), Host=host)
                self.assertEqual(page.lines[0], f"imgadm sources -a {wanted}")

    def test_none_and_nothing_found(self):
        site = self.site()
        page = self.read(site)
        self.assertIn("There are no images here yet.", page.text)
        self.images(1)
        page = self.read(site, "/?page=1&q=%3Cb%3E")
        self.assertIn("Nothing matches <b>.", page.text)
        self.assertIn("0 images of 1", page.text)

    def test_pages(self):
        self.images(7)
        site = self.site()
        with mock.patch.object(imgserver, "PAGE_ROWS", 3):
            names = [[row[1:3] for row in self.read(site, f"/?page={number}").rows]
                     for number in (1, 2, 3, 4, 999999999)]
            self.assertEqual(names, [["n7", "n6", "n5"], ["n4", "n3", "n2"], ["n1"], ["n1"],
                                     ["n1"]])
            page = self.read(site, "/?page=2&q=2.0")
            self.assertIn("7 images of 7, 119\xa0bytes, page 2 of 3", page.text)
            current = [attributes for _, attributes in page.tags if "aria-current" in attributes]
            self.assertEqual([each["href"] for each in current], ["?page=2&q=2.0"])
            self.assertIn("?page=3&q=2.0", page.links("href"))
        with mock.patch.object(imgserver, "PAGE_ROWS", 1):
            self.images(30, published_at="2024-01-01T00:00:00Z")
            time.sleep(1.1)       # RECHECK: edits in place are in a list after a second
            numbers = [int(link.partition("=")[2]) for link in
                       self.read(site, "/?page=10").links("href")
                       if re.fullmatch(r"\?page=\d+", link)]
            self.assertEqual(numbers, [*range(1, 31)])
        for number in ("0", "-1", "x", "1.5", "1" * 40, "\u0663"):
            with self.subTest(number):
                error = self.assertError(ask(site, "/?page=" + quote(number)), 422)
                self.assertIn(number, error["message"])
        self.assertError(ask(site, "/?page=1&page=2"), 422)

    def test_the_filter(self):
        self.images(3)
        write_v2(self.serve_dir, uuid_of(4), name="Straße", os="linux", description="Web & more",
                 origin=uuid_of(1), published_at="2023-01-01T00:00:00Z")
        site = self.site()
        for words, wanted in (("n2", ["n2"]), ("N2", ["n2"]), ("linux", ["Straße"]),
                              ("STRASSE", ["Straße"]), ("more web", ["Straße"]), ("& q", []),
                              (uuid_of(1), ["n1", "Straße"]), ("  ", ["n3", "n2", "n1", "Straße"]),
                              ("zone 2.0.0 n", ["n3", "n2", "n1", "Straße"]), ("n2 n3", [])):
            with self.subTest(words):
                page = self.read(site, "/?page=1&q=" + quote(words))
                self.assertEqual([row[1:].split()[0] for row in page.rows], wanted)
                self.assertEqual([each for each in page.links("value") if each != "1"],
                                 [words.strip()] if words.strip() else [words])

    def test_channels(self):
        channels = [{"name": "release", "description": "<done>", "default": True},
                    {"name": "dev", "description": ""}]
        for number, names in ((1, ["release"]), (2, ["dev"]), (3, ["dev", "release"]), (4, None)):
            write_v2(self.serve_dir, uuid_of(number), name=f"n{number}", channels=names,
                     published_at=f"2024-01-0{number}T00:00:00Z")
        site = self.site(channels=channels)
        for query, wanted, option in (
                ("", ["n3", "n1"], ""), ("&channel=dev", ["n3", "n2"], "dev"),
                ("&channel=*", ["n3", "n2", "n1"], "*")):
            page = self.read(site, "/?page=1" + query)
            self.assertEqual([row[1:3] for row in page.rows], wanted)
            self.assertEqual(page.lines[0], "imgadm sources -a " + (
                f"'http://images.example.com?channel={option}'" if option
                else "http://images.example.com"))
            quoted = option and f"-C {imgserver.shlex.quote(option)} "
            self.assertTrue(page.lines[1].startswith(f"imgadm import {quoted}0"), page.lines[1])
            self.assertEqual("channel" in page.links("name"), bool(option))
            for link in page.links("href"):
                if link.startswith("images/"):
                    self.assertEqual(ask(site, "/" + link).status, 200)
        self.assertError(ask(site, "/?page=1&channel=nope"), 422, "ValidationFailed")
        for each in channels:
            each.pop("default", None)
        page = self.read(self.site(channels=channels), "/?page=1")
        self.assertEqual(len(page.rows), 3)

    def test_private_images_are_for_users(self):
        self.images(2)
        write_v2(self.serve_dir, uuid_of(3), name="secret", public=False, origin=uuid_of(1))
        self.assertEqual(len(self.read(self.site()).rows), 3)
        site = self.site(read="public", users=users_file(self.directory))
        for _ in range(2):                # from the cache, too
            answer = ask(site, "/?page=1")
            self.assertEqual(len(Reader(answer.body.decode()).rows), 2)
            self.assertNotIn(b"secret", answer.body)
            self.assertNotIn(b"builds on", answer.body)
            self.assertIn("?page=1&login=1", Reader(answer.body.decode()).links("href"))
            answer = ask(site, "/?page=1", Authorization=LOGIN)
            self.assertEqual(len(Reader(answer.body.decode()).rows), 3)
            self.assertEqual(answer.headers["cache-control"], "private, no-store")
            self.assertNotIn(b"login", answer.body)
        self.assertEqual(self.read(site, "/?page=1&q=secret").rows, [])
        self.assertError(ask(site, "/?login", Accept=HTML), 401)
        self.assertEqual(len(self.read(site, "/?login", Accept=HTML, Authorization=LOGIN).rows), 3)
        site = self.site(read="users", users=users_file(self.directory))
        self.assertError(ask(site, "/", Accept=HTML), 401)
        self.assertEqual(len(self.read(site, "/", Accept=HTML, Authorization=LOGIN).rows), 3)

    def test_rendered_once_for_each_state_of_the_images(self):
        self.images(2)
        site = self.site()
        with mock.patch.object(imgserver.PageView, "render", autospec=True,
                               side_effect=imgserver.PageView.render) as render:
            first = ask(site, "/?page=1")
            etag = first.headers["etag"]
            for headers in ({}, {"If_None_Match": etag}):
                again = ask(site, "/?page=1", **headers)
                self.assertEqual(again.status, 304 if "If_None_Match" in headers else 200)
            self.assertEqual(render.call_count, 1)
            for headers in ({"Host": "other"}, {"Accept_Encoding": "gzip"}):
                for _ in range(2):
                    self.assertNotEqual(ask(site, "/?page=1", **headers).headers["etag"], etag)
            self.assertEqual(render.call_count, 3)
            write_v2(self.serve_dir, uuid_of(3), name="fresh")
            self.assertEqual(len(self.read(site).rows), 3)
            self.assertEqual(render.call_count, 4)
            for number in range(10):
                ask(site, f"/?page=1&q={number}")
            self.assertLessEqual(len(site.store.snapshot(imgserver.IMGAPI, True).pages),
                                 imgserver.PAGES_KEPT)
        self.assertEqual(first.headers["cache-control"], "private, no-cache")
        zipped = ask(site, "/?page=1", Accept_Encoding="gzip")
        self.assertEqual(gzip.decompress(zipped.body), ask(site, "/?page=1").body)
        self.assertEqual(zipped.headers["content-encoding"], "gzip")

    def test_pages_that_nobody_reads_are_bounded(self):
        self.images(1)
        site = self.site()

        def response(words):
            request = parse(f"GET /?page=1&q={words} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            request.may_block = True
            return site.answer(request)
        kept = [response("x")]
        with mock.patch.object(imgserver, "PAGES_LIMIT", 10 * kept[0].length):
            while kept[-1].status == 200:
                self.assertLess(len(kept), 12)
                kept.append(response(len(kept)))
            self.assertEqual(kept[-1].status, 503)
            del kept[:]
            gc.collect()
            self.assertEqual(response("y").status, 200)

    def test_the_policy_fits_the_one_style_and_the_one_script(self):
        self.images(1)
        answer = ask(self.site(), "/?page=1")
        policy = answer.headers["content-security-policy"]
        self.assertTrue(policy.startswith("default-src 'none'; "), policy)
        self.assertNotIn("unsafe", policy)
        for tag in ("style", "script"):
            [text] = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), answer.body, re.S)
            digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
            self.assertIn(f"{tag}-src 'sha256-{digest}'", policy)
        self.assertEqual(answer.headers["x-content-type-options"], "nosniff")

    def test_hostile_texts_are_texts(self):
        for number, text in enumerate(HOSTILE, 1):
            write_v2(self.serve_dir, uuid_of(number), name=text, version=text, description=text + CONTROLS,
                     homepage=text, os="other", origin=uuid_of(1) if number > 1 else None)
        site = self.site()
        plain = [tag for tag, _ in self.read(site, "/?page=1&q=nothing").tags]
        for text in ["", *HOSTILE]:
            with self.subTest(text):
                page = self.read(site, "/?page=1&q=" + quote(text))
                tags = {tag for tag, _ in page.tags}
                self.assertLessEqual(tags, {*plain, "ol", "li", "i", "h2", "small", "b"})
                self.assertEqual([tag for tag, _ in page.tags].count("script"), 1)
                for _, attributes in page.tags:
                    self.assertFalse([name for name in attributes if name.startswith("on")])
                for link in page.links("href"):
                    self.assertRegex(link, r"^(https?://|\?page=|images|#list|data:image/svg)")

    def test_a_thousand_rows_are_below_700_kb(self):
        for number in range(1000):
            write_v2(self.serve_dir, uuid_of(number), name="base-64-lts", version="23.4.0",
                     description="A description of some length. " * 20,
                     origin=uuid_of(0) if number else None,
                     homepage="https://docs.example.com/images/base-64-lts")
        answer = ask(self.site(), "/?page=1")
        self.assertEqual(len(Reader(answer.body.decode()).rows), 1000)
        self.assertLess(len(answer.body), 700_000)


# -- a real browser ----------------------------------------------------------------------

class Browser:
    """Headless Chromium, spoken to over the two pipes of --remote-debugging-pipe.

    events   all that it has told, as [(method, parameters)]
    """

    FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-extensions", "--disable-sync", "--no-proxy-server",
             "--host-resolver-rules=MAP images.example.com 127.0.0.1, MAP *.example ~NOTFOUND",
             "--remote-debugging-pipe")

    def __init__(self, directory):
        theirs, ours = os.pipe(), os.pipe()
        read, write = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (theirs[0], ours[1]))

        def place():
            os.dup2(read, 3)
            os.dup2(write, 4)
        self.process = subprocess.Popen(
            ["chromium", *self.FLAGS, f"--user-data-dir={directory}", "about:blank"],
            preexec_fn=place, pass_fds=(3, 4), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        for fd in (read, write, theirs[0], ours[1]):
            os.close(fd)
        self._to, self._from = theirs[1], ours[0]
        self._buffer, self._number, self._session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target,
                                  flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(domain + ".enable")

    def call(self, method, **parameters):
        """The result of one command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self):
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], PATIENCE)[0]:
                raise AssertionError("the browser does not answer")
            data = os.read(self._from, 1 << 20)
            if not data:
                raise AssertionError("the browser has ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        answer = json.loads(line)
        if "method" in answer:
            self.events.append((answer["method"], answer["params"]))
        return answer

    def open(self, url):
        self.load("Page.navigate", url=url)

    def load(self, method, **parameters):
        """A command that opens a page; wait until that is there."""
        def count():
            return sum(method == "Page.loadEventFired" for method, _ in self.events)
        loads = count()
        self.call(method, **parameters)
        while count() == loads:
            self._receive()

    def run(self, script):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                           awaitPromise=True)
        if "exceptionDetails" in result:
            raise AssertionError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def click(self, selector):
        x, y = self.run(f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
                        "e.scrollIntoView({block: 'center'}); "
                        "const r = e.getBoundingClientRect(); "
                        "return [r.x + r.width / 2, r.y + r.height / 2] })()")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key, code=0, text=None, **more):
        parameters = {"key": key, "windowsVirtualKeyCode": code, **more}
        if text:
            parameters["text"] = text
        self.call("Input.dispatchKeyEvent", type="keyDown", **parameters)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def complaints(self):
        """Errors on the console, uncaught ones, and breaches of the policy."""
        return [parameters for method, parameters in self.events
                if method == "Runtime.exceptionThrown"
                or method == "Runtime.consoleAPICalled" and parameters["type"] != "log"
                or method == "Log.entryAdded" and parameters["entry"]["level"] == "error"]

    def requests(self):
        return [parameters["request"]["url"] for method, parameters in self.events
                if method == "Network.requestWillBeSent"]

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self._session = None
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        os.close(self._to)
        os.close(self._from)


ROWS = "document.querySelectorAll('#list li').length"
COUNT = "document.getElementById('count').textContent"


@check_only("starts a browser")
class InABrowser(PageCase):
    """All over plain http and a name, as operators have it: no secure context."""

    seconds = 15

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        need("chromium")
        cls.home = tempfile.mkdtemp(prefix="imgserver-test-")
        cls.addClassCleanup(shutil.rmtree, cls.home, ignore_errors=True)
        cls.browser = Browser(cls.home)
        cls.addClassCleanup(cls.browser.close)

    def setUp(self):
        super().setUp()
        self.browser.call("Emulation.clearDeviceMetricsOverride")
        self.browser.call("Emulation.setEmulatedMedia", features=[])
        self.browser.call("Emulation.setScriptExecutionDisabled", value=False)
        self.browser.open("about:blank")
        del self.browser.events[:]
        self.own = None

    def tearDown(self):
        """After each test: the console has no error, and no other server was asked."""
        self.assertEqual(self.browser.complaints(), [])
        self.assertEqual([url for url in self.browser.requests()
                          if not url.startswith((self.own, "data:"))], [])

    def visit(self, query="", **options):
        if self.own is None:
            server = self.serve(**options)
            self.own = f"http://images.example.com:{server.address[1]}/"
        self.browser.open(self.own + query)

    def test_it_is_seen_and_filters_while_typing(self):
        self.images(3, description="Some text")
        self.visit()
        browser = self.browser
        self.assertEqual(browser.run(ROWS), 3)
        self.assertEqual(browser.run("document.compatMode"), "CSS1Compat")
        self.assertEqual(browser.run("[...document.querySelectorAll('h2')]"
                                     ".map(e => e.innerText)"),
                         ["n3 2.0.0", "n2 2.0.0", "n1 2.0.0"])
        self.assertTrue(browser.run("getComputedStyle(document.querySelector('li')).display "
                                    "=== 'grid'"), "the style was refused")
        self.assertFalse(browser.run("isSecureContext"))
        browser.press("/", 191, "/")
        self.assertEqual(browser.run("document.activeElement.id"), "q")
        browser.type("n2")
        wait_for(lambda: browser.run(ROWS) == 1, "the filtered list")
        self.assertEqual(browser.run(COUNT), "1 image of 3, 17\xa0bytes")
        self.assertEqual(browser.run("location.search"), "?q=n2&page=1")
        self.assertEqual(browser.run("document.activeElement.id"), "q")
        self.assertEqual(browser.run("document.querySelectorAll('#list button').length"), 1)
        self.visit("?q=n2&page=1")
        self.assertEqual(browser.run(ROWS), 1)

    def test_without_scripts(self):
        self.images(3)
        self.browser.call("Emulation.setScriptExecutionDisabled", value=True)
        self.visit()

        def nodes(selector):
            root = self.browser.call("DOM.getDocument")["root"]["nodeId"]
            return self.browser.call("DOM.querySelectorAll", nodeId=root,
                                     selector=selector)["nodeIds"]
        self.assertEqual((len(nodes("li")), nodes("p>button")), (3, []))
        self.browser.call("DOM.focus", nodeId=nodes("#q")[0])
        self.browser.type("n2")
        self.browser.load("Input.dispatchKeyEvent", type="keyDown", key="Enter", text="\r",
                          windowsVirtualKeyCode=13)
        self.assertEqual(len(nodes("li")), 1)

    def test_copying(self):
        self.images(2)
        self.visit()
        browser = self.browser

        def pasted():
            browser.run("document.getElementById('q').value = ''; "
                        "document.getElementById('q').focus()")
            browser.press("v", 86, commands=["paste"])
            return browser.run("document.getElementById('q').value")
        browser.run("setTimeout = () => 0")       # the word stays, however slow the machine is
        browser.click("#list li:nth-child(2) button")
        wait_for(lambda: browser.run("document.getElementById('said').textContent") == "Copied")
        self.assertEqual(pasted(), f"imgadm import {uuid_of(1)}")
        browser.run("document.querySelector('header button').focus()")
        browser.press("Enter", 13, "\r")
        self.assertEqual(pasted(), f"imgadm sources -a {self.own[:-1]}")

    def test_hostile_texts(self):
        channels = [{"name": "dev", "description": text, "default": number == 0}
                    for number, text in enumerate(HOSTILE[1:2])]
        for number, text in enumerate(HOSTILE, 1):
            write_v2(self.serve_dir, uuid_of(number), name=text, version=text, description=text + CONTROLS,
                     homepage="https://evil.example/" + text, os="other", channels=["dev"],
                     origin=uuid_of(1) if number > 1 else None,
                     published_at=f"2024-01-{20 - number}T00:00:00Z")
        for query in ["", *("?page=1&q=" + quote(text)
                            for text in HOSTILE)]:
            self.visit(query, config={"channels": channels})
            self.assertIsNone(self.browser.run("window.hit"))
        self.visit("")
        shown = self.browser.run("[...document.querySelectorAll('h2')].map(e => e.textContent)")
        self.assertEqual(shown, [f"{text} {text}" for text in HOSTILE])
        self.browser.run("document.getElementById('q').focus()")
        self.browser.type(HOSTILE[1])
        wait_for(lambda: self.browser.run(ROWS) in (1, len(HOSTILE)) and
                 "q=%22" in self.browser.run("location.search"), "the filtered list")
        self.assertIsNone(self.browser.run("window.hit"))
        self.fits(320)

    def fits(self, width):
        """Whether nothing is wider than a window of that width."""
        self.browser.call("Emulation.setDeviceMetricsOverride", width=width, height=700,
                          deviceScaleFactor=1, mobile=False)
        self.assertLessEqual(self.browser.run("document.scrollingElement.scrollWidth"), width)
        self.assertEqual(self.browser.run(
            "[...document.querySelectorAll('p>button, p>code, h2, input')].filter(e => "
            f"e.getBoundingClientRect().right > {width} || e.scrollWidth > e.clientWidth && "
            "e.clientWidth && e.tagName !== 'INPUT').length"), 0)

    def test_narrow_and_wide(self):
        self.images(3, description="Some text " * 30, origin=uuid_of(2))
        channels = [{"name": f"channel-{number}" + "x" * 20 * number, "description": ""}
                    for number in range(9)]
        for number in range(1, 4):
            write_v2(self.serve_dir, uuid_of(number + 10), channels=[channels[-1]["name"]])
        self.visit("?channel=" + channels[-1]["name"],
                   config={"channels": channels, "suffix": "/" + "a" * 100})
        self.assertEqual(self.browser.run(ROWS), 3)
        for width in (320, 480, 700, 1000, 2000):
            with self.subTest(width):
                self.fits(width)

    def test_dark_and_light_have_contrast(self):
        self.images(2, description="Text", homepage="https://example.com/")
        self.visit()
        colours = set()
        for scheme in ("light", "dark"):
            self.browser.call("Emulation.setEmulatedMedia", features=[
                {"name": "prefers-color-scheme", "value": scheme}])
            pairs = self.browser.run("""(() => {
              const luminance = colour => colour.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
                .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
                .reduce((sum, v, n) => sum + v * [.2126, .7152, .0722][n], 0);
              const back = e => { for (; e; e = e.parentElement) { const colour =
                getComputedStyle(e).backgroundColor; if (colour !== "rgba(0, 0, 0, 0)")
                return colour; } };
              return [...document.querySelectorAll("h1, h2, h2 b, p, a, code, button, i, input")]
                .map(e => { const [a, b] = [getComputedStyle(e).color, back(e)].map(luminance)
                  .sort((a, b) => b - a); return [e.tagName, (a + .05) / (b + .05)] }) })()""")
            self.assertEqual([pair for pair in pairs if pair[1] < 4.5], [], scheme)
            colours.add(self.browser.run("getComputedStyle(document.body).backgroundColor"))
        self.assertEqual(len(colours), 2)

    def test_keyboard_and_screen_reader(self):
        self.images(2)
        self.visit()
        browser, order = self.browser, []
        for _ in range(7):
            browser.press("Tab", 9)
            order.append(browser.run("document.activeElement.getAttribute('aria-label') || "
                                     "document.activeElement.id || "
                                     "document.activeElement.textContent"))
            self.assertNotEqual(browser.run("getComputedStyle(document.activeElement)"
                                            ".outlineStyle"), "none")
        self.assertEqual(order, ["Skip to the images",
                                 f"Copy imgadm sources -a {self.own[:-1]}", "q", "Filter",
                                 "Manifest", f"Copy imgadm import {uuid_of(2)}", "Manifest"])
        nodes = [(node["role"]["value"], node.get("name", {}).get("value", ""))
                 for node in browser.call("Accessibility.getFullAXTree")["nodes"]
                 if not node["ignored"]]
        for role in ("banner", "main", "search", "contentinfo", "list", "status"):
            self.assertIn(role, [each for each, _ in nodes])
        self.assertIn(("searchbox", "Filter the images"), nodes)
        self.assertEqual([name for role, name in nodes if role == "heading"],
                         ["SmartOS images", "n2 2.0.0", "n1 2.0.0"])
        self.assertEqual([role for role, name in nodes
                          if role in ("button", "link", "searchbox") and not name], [])


if __name__ == "__main__":
    unittest.main()
