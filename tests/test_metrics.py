"""Metrics at /metrics: what is counted, and the text format of Prometheus."""

import os
import re
import sys
import unittest

from tests.support import (ROOT, ServerCase, ask, check_only, imgserver, uuid_of, wait_for,
                           write_image, write_v2)
from tests.test_page import LOGIN, users_file

U = uuid_of(1)
# As with loglevel fatal, but for the line that the tests wait for.
QUIET = """
run = imgserver.EventLoop.run
def run_quietly(loop):
    loop.log.level = imgserver.LEVELS["fatal"]
    run(loop)
imgserver.EventLoop.run = run_quietly
"""
SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\n"])*",?)+)\})? (\S+)')


def parse(text):
    """{(name, (labels...)): value} of the text format, which is checked line by line."""
    samples, kinds, seen = {}, {}, []
    for line in text.splitlines():
        if line.startswith("#"):
            hash, word, name, rest = line.split(" ", 3)
            assert word in ("HELP", "TYPE") and rest, line
            if word == "TYPE":
                kinds[name] = rest
                seen.append(name)
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        name = match[1]
        family = re.sub("_(bucket|sum|count)$", "", name) if name not in kinds else name
        assert family == seen[-1], f"{line} does not follow its TYPE"
        assert kinds[family] != "counter" or family.endswith("_total"), line
        labels = tuple(re.findall(r'="((?:[^"\\]|\\.)*)"', match[2] or ""))
        assert (name, labels) not in samples, f"{line} stands twice"
        samples[name, labels] = float(match[3])
    return samples


class MetricsCase(ServerCase):

    def start(self, **config):
        self.server = self.serve(config={"metrics": True, **config})
        return self.server

    def scrape(self):
        answer = self.server.get("/metrics")
        self.assertEqual(answer.status, 200)
        self.assertTrue(answer.body.endswith(b"\n"))
        return parse(answer.body.decode())

    def value(self, name, *labels):
        """A sample; counters move once the answer is sent, which a client sees a bit earlier."""
        return self.scrape().get(("imgserver_" + name, labels), 0)

    def await_value(self, wanted, name, *labels):
        wait_for(lambda: self.value(name, *labels) == wanted, f"{wanted} of {name}")


class Counts(MetricsCase):

    def test_off_unless_configured(self):
        site = self.site()
        error = self.assertError(ask(site, "/metrics"), 404)
        self.assertEqual(error["message"], "/metrics does not exist: metrics are off, until "
                         "metrics of the configuration is true")
        self.assertIsNone(site.metrics)

    def test_answers(self):
        write_image(self.serve_dir, U)
        server = self.start()
        size = len(server.get(f"/images/{U}").body)
        server.get(f"/images/{U}")
        server.head(f"/images/{U}")
        server.get(f"/datasets/{U}", {"If-None-Match": "*"})
        server.get("/nothing")
        server.get("/nothing", method="FROBNICATE")
        server.get("/images", method="OPTIONS")
        server.raw(b"\0\r\n\r\n")
        self.await_value(1, "http_requests_total", "none", "none", "400")
        samples = self.scrape()

        def requests(*labels):
            return samples["imgserver_http_requests_total", labels]
        self.assertEqual(requests("/images/:uuid", "GET", "200"), 2)
        self.assertEqual(requests("/images/:uuid", "HEAD", "200"), 1)
        self.assertEqual(requests("/datasets/:uuid", "GET", "304"), 1)
        self.assertEqual(requests("none", "GET", "404"), 1)
        self.assertEqual(requests("none", "other", "404"), 1)
        self.assertEqual(requests("/images", "OPTIONS", "204"), 1)
        self.assertEqual(samples["imgserver_http_response_body_bytes_total", ("/images/:uuid",)],
                         2 * size)
        name = "imgserver_http_request_duration_seconds"
        counts = [samples[name + "_bucket", ("/images/:uuid", str(edge))]
                  for edge in (*imgserver.BUCKETS, "+Inf")]
        self.assertEqual(counts, sorted(counts))
        self.assertEqual(counts[-1], 3)
        self.assertEqual(samples[name + "_count", ("/images/:uuid",)], 3)
        self.assertGreater(samples[name + "_sum", ("/images/:uuid",)], 0)

    def test_also_where_answers_are_not_logged(self):
        self.server = self.serve(config={"metrics": True}, prelude=QUIET)
        self.server.get("/ping")
        self.await_value(1, "http_requests_total", "/ping", "GET", "200")
        self.assertNotIn("/ping", self.server.log())
        self.assertEqual(self.value("log_lines_total", "info"), 1)

    def test_downloads(self):
        write_image(self.serve_dir, U, b"x" * 200000, name='a"\\b')
        server = self.start()
        for target in (f"/images/{U}/file", f"/datasets/{U}/image.zfs.gz"):
            for span in (None, "bytes=0-99", "bytes=-200000", "bytes=1-", "bytes=150000-"):
                server.get(target, {"Range": span})
            server.head(target)
            server.get(target, {"If-None-Match": "*"})
        title = r"a\"\\b 1.0.0"
        self.await_value(10, "files_sent_total", "whole")
        self.assertEqual(self.value("downloads_total", U, title), 6)
        self.assertEqual(self.value("downloads_total", "other", ""), 0)

    def test_a_download_that_is_cut(self):
        write_image(self.serve_dir, U, b"x" * (32 << 20))
        with self.start().connect() as connection:
            connection.send(b"GET /images/%b/file HTTP/1.1\r\nHost: a\r\n\r\n" % U.encode())
            connection.recv(1000)
        self.await_value(1, "files_sent_total", "cut")
        samples = self.scrape()
        self.assertEqual(samples["imgserver_downloads_total", (U, "test 1.0.0")], 1)
        sent = samples["imgserver_http_response_body_bytes_total", ("/images/:uuid/file",)]
        self.assertTrue(0 < sent < 32 << 20, sent)

    def test_images_and_log_lines(self):
        for number in range(1, 4):
            write_image(self.serve_dir, uuid_of(number))
        write_v2(self.serve_dir, uuid_of(4), disabled=True)
        write_image(self.serve_dir, uuid_of(5), name=None)
        write_image(self.serve_dir, uuid_of(6), origin=uuid_of(7))
        write_image(self.serve_dir, uuid_of(7), origin=uuid_of(6))
        os.mkdir(os.path.join(self.serve_dir, imgserver.INCOMING + uuid_of(8)))
        self.start()
        samples = self.scrape()
        self.assertEqual({state: samples["imgserver_images", (state,)] for state in
                          ("active", "disabled", "unactivated", "left_out")},
                         {"active": 3, "disabled": 1, "unactivated": 1, "left_out": 3})
        lines = [line.split()[1] for line in self.server.log().splitlines()]
        for level in ("warn", "error"):
            self.assertEqual(samples["imgserver_log_lines_total", (level,)], lines.count(level))
        self.assertGreaterEqual(lines.count("warn"), 2)

    def test_failed_logins(self):
        self.start(users=users_file(self.directory))
        self.server.get("/images", {"Authorization": LOGIN})
        self.assertEqual(self.value("failed_logins_total"), 0)
        self.server.get("/images", {"Authorization": LOGIN[:-4] + "AAAA"})
        self.assertEqual(self.value("failed_logins_total"), 1)

    def test_where_reading_needs_a_user_so_do_they(self):
        server = self.start(users=users_file(self.directory), read="users")
        self.assertError(server.get("/metrics"), 401)
        self.assertEqual(server.get("/metrics", {"Authorization": LOGIN}).status, 200)

    def test_without_serve_dir_the_others_are_there(self):
        self.start()
        os.rename(self.serve_dir, self.serve_dir + ".gone")
        samples = self.scrape()
        self.assertNotIn(("imgserver_images", ("active",)), samples)
        self.assertIn(("process_start_time_seconds", ()), samples)

    def test_connections_and_build(self):
        server = self.start()
        with server.connect() as connection:
            connection.request("/ping")
            samples = self.scrape()
        self.assertEqual(samples["imgserver_connections", ("reading",)], 1)
        self.assertEqual(samples["imgserver_connections", ("working",)], 1)
        self.assertEqual(samples["imgserver_build_info", (
            imgserver.__version__, "%d.%d.%d" % sys.version_info[:3])], 1)

    def test_uploads(self):
        data = b"x" * 1000
        server = self.start(publish_from=["127.0.0.1"], check_streams=False)

        def publish(query, body):
            return server.raw(
                b"POST /images?action=publish&name=n&version=1&type=other&os=other%b HTTP/1.1\r\n"
                b"Host: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
                % (query, len(body), body))
        self.assertIn(b" 200 OK", publish(b"", data))
        self.assertIn(b" 400 ", publish(b"&sha1=" + b"0" * 40, data))
        server.raw(b"POST /images HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}")
        self.await_value(1, "uploads_total", "stored")
        self.await_value(1, "uploads_total", "failed")
        self.await_value(2 * len(data) + 2, "http_request_body_bytes_total", "/images")


class Readme(MetricsCase):

    def test_its_table_and_alerts_name_what_there_is(self):
        with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
            text = file.read()
        write_image(self.serve_dir, U)
        self.start()
        self.server.get(f"/images/{U}/file")
        self.await_value(1, "files_sent_total", "whole")
        answer = self.server.get("/metrics").body.decode()
        table = set(re.findall(r"^\| `((?:imgserver|process)_[a-z_]+)` \|", text, re.M))
        self.assertEqual(table, set(re.findall("^# TYPE ([a-z_]+)", answer, re.M)))
        alerts = re.search(r"```yaml\n(groups:.*?)```", text, re.S)[1]
        used = re.findall(r"imgserver_[a-z_]+(?:\{[^{}]+\})?", alerts)
        self.assertEqual(len(used), 4)
        for each in used:
            self.assertRegex(answer, rf"(?m)^{re.escape(each)} [0-9]+$")


class Series(ServerCase):
    """Bounds, without a socket."""

    def metrics(self):
        return self.site(metrics=True).metrics

    def download(self, metrics, number, times=1):
        response = imgserver.Response(200, title=f"n{number} 1")
        for _ in range(times):
            metrics._count_file(uuid_of(number), response, "")

    def downloads(self, metrics):
        [samples] = [samples for name, *_, samples in metrics._others(True)
                     if name == "imgserver_downloads_total"]
        return {re.match('{image="([^"]*)"', labels)[1]: value
                for labels, value in samples.items()}

    def test_the_images_downloaded_most_have_their_own_and_none_goes_down(self):
        metrics, bound = self.metrics(), imgserver.IMAGES_NAMED
        for number in range(bound):
            self.download(metrics, number, 2)
        self.download(metrics, 1000, 3)
        first = self.downloads(metrics)
        self.assertEqual(len(first), bound + 1)
        self.assertEqual(first["other"], 3)
        self.assertEqual(first[uuid_of(1000)], 0)
        self.download(metrics, 1000, 5)
        for number in range(2000, 2300):
            self.download(metrics, number)
        again = self.downloads(metrics)
        self.assertEqual(len(again), bound + 1)
        self.assertEqual((again["other"], again[uuid_of(1000)]), (303, 5))
        for image, value in first.items():
            self.assertGreaterEqual(again.get(image, value), value)

    def test_methods_and_routes_are_bounded(self):
        metrics = self.metrics()
        for number in range(50):
            request = imgserver.parse_request(imgserver._HEAD.match(
                f"M{number} /x{number} HTTP/1.1\r\nHost: h\r\n\r\n"))
            metrics.count(request, imgserver.Response(404), 0, 0.001 * number, "")
        self.assertEqual(len(metrics._rows), 1)

    def test_edges_of_buckets_belong_to_them(self):
        metrics = self.metrics()
        for seconds in (*imgserver.BUCKETS, 1e9):
            metrics.count(None, imgserver.Response(400), 0, seconds, "")
        [row] = metrics._rows.values()
        self.assertEqual(row[3:], [1] * (len(imgserver.BUCKETS) + 1))


@check_only("needs prometheus_client")
class OtherParser(MetricsCase):

    def test_prometheus_client_parses_it(self):
        place = os.environ.get("PROMETHEUS_CLIENT")
        if place:
            sys.path.append(place)
            self.addCleanup(sys.path.remove, place)
        try:
            from prometheus_client.parser import text_string_to_metric_families
        except ImportError:
            self.skipTest("prometheus_client is not installed")
        write_image(self.serve_dir, U, name='a"\\b')
        server = self.start()
        server.get(f"/images/{U}/file")
        self.await_value(1, "files_sent_total", "whole")
        answer = server.get("/metrics")
        self.assertEqual(answer.headers["content-type"],
                         "text/plain; version=0.0.4; charset=utf-8")
        text = answer.body.decode()
        families = list(text_string_to_metric_families(text))
        self.assertEqual({family.type for family in families}, {"counter", "gauge", "histogram"})
        for family in families:
            self.assertTrue(family.documentation, family.name)
        ours = sorted(value for value in parse(text).values())
        theirs = sorted(sample.value for family in families for sample in family.samples)
        self.assertEqual(theirs, ours)
        [titles] = [[sample.labels["title"] for sample in family.samples] for family in families
                    if family.name == "imgserver_downloads"]
        self.assertIn('a"\\b 1.0.0', titles)


if __name__ == "__main__":
    unittest.main()
