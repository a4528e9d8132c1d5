"""IMGAPI, the read side: every route and parameter, as a table of requests and answers."""

import base64
import hashlib
import json
import os

from tests import imgadm, streams, support
from tests.support import NOBODY, uuid_of

DATA = b"not a real stream"
SHA1 = hashlib.sha1(DATA).hexdigest()
U1, U2, U3, U4, U5, U6, NONE = (uuid_of(number) for number in (1, 2, 3, 4, 5, 6, 99))
OWNER = uuid_of(77)


def md5_of(data):
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def numbers_of(answer):
    """The images of a list, as the numbers that uuid_of was given."""
    return [int(image["uuid"][:8], 16) for image in answer.json()]


class Case(support.ServerCase):

    def put(self, uuid, name, data):
        with open(os.path.join(self.serve_dir, uuid, name), "wb") as file:
            file.write(data)

    def expect(self, server, table, method="GET", headers=()):
        """Rows of target, status, and for errors: code, message, field and code in errors."""
        for target, status, *error in table:
            with self.subTest(method + " " + target):
                answer = server.get(target, headers, method)
                self.assertEqual(answer.status, status, answer)
                if method == "HEAD":
                    self.assertEqual(answer.body, b"")
                elif status >= 400:
                    self.expect_error(answer, status, *error)

    def expect_error(self, answer, status, code, message, field=None, why="Invalid"):
        found = self.assertError(answer, status, code)
        self.assertEqual(found["message"], message)
        self.assertEqual(found.get("errors"),
                         None if field is None else [{"field": field, "code": why}])


class Routes(Case):

    def setUp(self):
        super().setUp()
        support.write_image(self.serve_dir, U1, streams.pack(DATA))
        support.write_v2(self.serve_dir, U2, path="whatever", owner=OWNER)
        support.write_v2(self.serve_dir, U3, disabled=True)
        self.incoming(U4, published_at=None)
        support.write_v2(self.serve_dir, U5, state="failed", error={"code": "x"})
        support.write_image(self.serve_dir, U6, name="")
        self.put(U1, "icon.png", b"\x89PNG")
        self.put(U2, "icon.jpg", b"\xff\xd8")
        self.server = self.serve()

    def incoming(self, uuid, **fields):
        """An image that waits to be activated."""
        support.write_v2(self.serve_dir, uuid, **fields)
        os.rename(os.path.join(self.serve_dir, uuid),
                  os.path.join(self.serve_dir, ".incoming-" + uuid))

    @staticmethod
    def missing(uuid):
        return 404, "ResourceNotFound", f"image {uuid} not found"

    @staticmethod
    def no_route(target):
        return target, 404, "ResourceNotFound", f"{target} does not exist"

    def table(self):
        unauthorized = ('Unauthorized (auth required to use "inclAdminFields" parameter)')
        return [
            ("/images", 200),
            ("/images/", 200),
            ("/images?", 200),
            ("/images/?name=x", 200),
            (f"/images/{U1}", 200),
            (f"/images/{U1}/", 200),
            (f"/images/{U2}", 200),
            (f"/images/{U3}", 200),
            (f"/images/{U4}", 200),
            (f"/images/{U5}", 200),
            (f"/images/{U6}", *self.missing(U6)),
            (f"/images/{NONE}", *self.missing(NONE)),
            self.no_route("/images/xyz"),
            self.no_route("/images/" + uuid_of(0xabc).upper()),
            self.no_route(f"/images/.incoming-{U4}"),
            self.no_route(f"/images//{U1}"),
            self.no_route(f"/images/{U1}/file0"),
            self.no_route(f"/images/{U1}/file1"),
            self.no_route(f"/images/{U1}/jobs"),
            self.no_route(f"/images/{U1}/file/x"),
            self.no_route(f"/images/{U1}/manifest.json"),
            self.no_route(f"/images/{U1}/image.zfs.gz"),
            (f"/images/{U1}/file", 200),
            (f"/images/{U2}/file", 200),
            (f"/images/{U3}/file", 200),
            (f"/images/{U4}/file", 200),
            (f"/images/{NONE}/file", *self.missing(NONE)),
            (f"/images/{U1}/file?index=0", 200),
            (f"/images/{U1}/file?index=00", 200),
            (f"/images/{U1}/file?index=", 200),
            (f"/images/{U1}/file?index=x", 200),
            (f"/images/{U1}/file?index=1", 404, "ResourceNotFound",
             f'image "{U1}" has no file at index 1'),
            (f"/images/{U1}/file?index=10000000000000000000", 404, "ResourceNotFound",
             f'image "{U1}" has no file at index 10000000000000000000'),
            (f"/images/{U1}/icon", 200),
            (f"/images/{U2}/icon", 200),
            (f"/images/{U3}/icon", 404, "ResourceNotFound", f'image "{U3}" has no icon'),
            (f"/images/{NONE}/icon", *self.missing(NONE)),
            (f"/images/{U1}?account={OWNER}", 200),
            (f"/images/{U1}?account=", 200),
            (f"/images/{U1}?account=x", 422, "InvalidParameter",
             'invalid "account": not a UUID: "x"', "account"),
            (f"/images/{U1}/file?account={OWNER}", 200),
            (f"/images/{U1}?channel=bogus", 200),
            ("/images?channel=bogus", 200),
            ("/images?channel=*", 200),
            ("/images?inclAdminFields=false", 200),
            ("/images?inclAdminFields=true", 401, "UnauthorizedError", unauthorized),
            (f"/images/{U1}?inclAdminFields=true", 401, "UnauthorizedError", unauthorized),
            ("/images?inclAdminFields=x", 422, "InvalidParameter",
             'invalid "inclAdminFields": "x" (must be one of true, false)', "inclAdminFields"),
            self.no_route("/channels"),
            ("/state", 401, "UnauthorizedError", "Unauthorized"),
            self.no_route("/jobs"),
            self.no_route("/images.json"),
            ("/images/%ZZ", 400, "BadRequestError", "URI malformed"),
            ("/ping", 200),
        ]

    def test_get(self):
        self.expect(self.server, self.table())

    def test_head(self):
        self.expect(self.server, self.table(), "HEAD")

    def test_nothing_can_be_written(self):
        for target in ("/images", f"/images/{U1}", f"/images/{U1}/file", f"/images/{U1}/icon"):
            for method in ("POST", "PUT", "DELETE"):
                with self.subTest(method + " " + target):
                    answer = self.server.get(target + "?action=disable", method=method)
                    self.expect_error(answer, 405, "MethodNotAllowedError",
                                      f"{method} is not allowed: publishing over HTTP is off, "
                                      "until users, publish_from or manage_from of the "
                                      "configuration says who may")
                    self.assertEqual(answer.headers["allow"], "GET, HEAD, OPTIONS")

    def test_list_is_active_images_as_shown_alone(self):
        answer = self.server.get("/images")
        self.assertEqual(sorted(numbers_of(answer)), [1, 2])
        self.assertEqual(answer.body.decode("ascii"), json.dumps(answer.json(), indent=2))
        self.assertEqual(answer.headers["content-type"], "application/json")
        for image in answer.json():
            self.assertEqual(self.server.get(f"/images/{image['uuid']}").json(), image)

    def test_states(self):
        for uuid, state in ((U1, "active"), (U2, "active"), (U3, "disabled"),
                            (U4, "unactivated"), (U5, "failed")):
            with self.subTest(state):
                self.assertEqual(self.server.get(f"/images/{uuid}").json()["state"], state)

    def test_unactivated_has_no_published_at_of_its_own(self):
        self.assertNotIn("published_at", self.server.get(f"/images/{U4}").json())
        self.incoming(uuid_of(8), published_at="2020-01-02T03:04:05Z")
        self.assertEqual(self.server.get(f"/images/{uuid_of(8)}").json()["published_at"],
                         "2020-01-02T03:04:05Z")

    def test_unactivated_then_activated(self):
        os.rename(os.path.join(self.serve_dir, ".incoming-" + U4),
                  os.path.join(self.serve_dir, U4))
        self.assertEqual(self.server.get(f"/images/{U4}").json()["state"], "active")
        self.assertIn(4, numbers_of(self.server.get("/images")))

    def test_file(self):
        with open(os.path.join(self.serve_dir, U1, "image.zfs.gz"), "rb") as file:
            data = file.read()
        answer = self.server.get(f"/images/{U1}/file", {"Accept": "application/json"})
        self.assertEqual(answer.body, data)
        self.assertEqual(answer.headers["content-type"], "application/octet-stream")
        self.assertEqual(answer.headers["content-md5"], md5_of(data))
        self.assertEqual(answer.headers["etag"], f'"{hashlib.sha1(data).hexdigest()}"')
        self.assertIn("last-modified", answer.headers)
        etag = answer.headers["etag"]
        self.assertEqual(self.server.get(f"/images/{U1}/file",
                                         {"If-None-Match": etag}).status, 304)
        part = self.server.get(f"/images/{U1}/file", {"Range": "bytes=5-9"})
        self.assertEqual((part.status, part.body), (206, data[5:10]))
        self.assertNotIn("content-md5", part.headers)

    def test_icon(self):
        for uuid, kind, data in ((U1, "image/png", b"\x89PNG"), (U2, "image/jpeg", b"\xff\xd8")):
            with self.subTest(kind):
                answer = self.server.get(f"/images/{uuid}/icon")
                self.assertEqual(answer.body, data)
                self.assertEqual(answer.headers["content-type"], kind)
                self.assertEqual(answer.headers["content-md5"], md5_of(data))
                self.assertIs(self.server.get(f"/images/{uuid}").json()["icon"], True)
        self.assertNotIn("icon", self.server.get(f"/images/{U3}").json())

    def test_icon_that_comes_and_goes(self):
        def shown():
            return self.server.get(f"/images/{U3}").json().get("icon")
        self.assertIsNone(shown())
        self.put(U3, "icon.gif", b"GIF89a")
        support.wait_for(lambda: shown() is True, "the icon")
        self.assertEqual(self.server.get(f"/images/{U3}/icon").headers["content-type"],
                         "image/gif")
        os.unlink(os.path.join(self.serve_dir, U3, "icon.gif"))
        self.assertError(self.server.get(f"/images/{U3}/icon"), 404, "ResourceNotFound")
        support.wait_for(lambda: shown() is None, "the manifest without an icon")

    def test_etag_changes_with_the_manifest_alone(self):
        etag = self.server.get(f"/images/{U2}").headers["etag"]
        self.assertEqual(self.serve().get(f"/images/{U2}").headers["etag"], etag)
        support.write_v2(self.serve_dir, U2, path="whatever", owner=OWNER, description="new")
        self.assertNotEqual(self.server.get(f"/images/{U2}").headers["etag"], etag)


class Manifests(Case):
    """Whatever is stored, IMGAPI shows v2 in the official order, and nothing of its own."""

    def show(self, uuid):
        return self.serve().get(f"/images/{uuid}").json()

    def test_v1_of_the_original(self):
        support.write_image(self.serve_dir, U1, creator_uuid="", published_at="2011-12-13T14:15Z")
        shown = self.show(U1)
        self.assertEqual(shown, {
            "v": 2, "uuid": U1, "owner": NOBODY, "name": "test", "version": "1.0.0",
            "state": "active", "disabled": False, "public": True,
            "published_at": "2011-12-13T14:15:00Z", "type": "zone-dataset", "os": "smartos",
            "files": [{"sha1": SHA1, "size": len(DATA), "compression": "none"}],
            "description": "An image for a test", "urn": "sdc:internal:test:1.0.0",
            "requirements": {"networks": [{"name": "net0", "description": "public"}]}})
        self.assertEqual(list(shown), [
            "v", "uuid", "owner", "name", "version", "state", "disabled", "public",
            "published_at", "type", "os", "files", "description", "urn", "requirements"])

    def test_v2_of_imgadm_create(self):
        support.write_v2(self.serve_dir, U1)
        shown = self.show(U1)
        self.assertRegex(shown.pop("published_at"), r"^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
        self.assertEqual(shown, {
            "v": 2, "uuid": U1, "owner": NOBODY, "name": "test", "version": "2.0.0",
            "state": "active", "disabled": False, "public": True, "type": "zone-dataset",
            "os": "smartos",
            "files": [{"sha1": SHA1, "size": len(DATA), "compression": "gzip"}]})

    def test_fields_that_are_not_for_clients(self):
        support.write_v2(self.serve_dir, U1, **{"billing_tags": ["a"], "traits": {"a": True},
                                                "activated": True, "x-own": 1,
                                                "channels": ["dev"], "creator_uuid": OWNER})
        shown = self.show(U1)
        self.assertEqual(set(shown) & {"activated", "x-own", "channels", "creator_uuid"}, set())
        self.assertEqual((shown["billing_tags"], shown["traits"]), (["a"], {"a": True}))

    def test_invalid_manifest_is_left_out_and_the_log_names_the_fields(self):
        support.write_v2(self.serve_dir, U1, name=["a"], type="floppy", os="solaris")
        support.write_v2(self.serve_dir, U2)
        server = self.serve()
        self.assertEqual(numbers_of(server.get("/images")), [2])
        self.assertError(server.get(f"/images/{U1}"), 404, "ResourceNotFound")
        line = server.wait_log(f"image {U1} is left out: .*")[0]
        for part in ("name", "type 'floppy' must be one of", "os 'solaris' must be one of"):
            self.assertIn(part, line)

    def test_origin_that_is_not_here(self):
        support.write_v2(self.serve_dir, U1, origin=NONE)
        server = self.serve()
        self.assertEqual(server.get("/images").json()[0]["origin"], NONE)
        server.get(f"/images/{U1}")
        text = f"image {U1}: imgadm cannot import it until image {NONE} is on this server, too"
        server.wait_log(text)
        self.assertEqual(server.log().count(text), 1)


class Filters(Case):

    #        name       version  os         type            time    more
    IMAGES = {
        1: ("base", "1.0.0", "smartos", "zone-dataset", "2013-01-01T00:00:00Z", {}),
        2: ("base64", "1.0.0", "smartos", "zone-dataset", "2013-02-01T00:00:00Z",
            {"owner": OWNER, "tags": {"role": "db", "n": 5, "yes": True, "obj": {"a": 1},
                                      "long": "x" * 101, "max": "y" * 100, "a.b": "c",
                                      "\u00e9": "\u4e2d", "half": 1.5}}),
        3: ("Base", "21.4.0", "linux", "lx-dataset", "2013-02-01T00:00:00Z",
            {"billing_tags": ["one", "two"], "tags": {"role": "db", "n": "5"}}),
        4: ("ubuntu", "20.04", "linux", "other", "2014-01-01T00:00:00.500Z",
            {"billing_tags": ["one"], "tags": {"role": "web"}}),
        5: ("new", "1.0.0+b", "illumos", "zone-dataset", "2015-06-07T08:09:10Z", {}),
        6: ("old", "1.0.0", "smartos", "zone-dataset", "2011-01-01T00:00:00Z",
            {"disabled": True}),
    }
    ALL = [1, 2, 3, 4, 5]
    TABLE = [
        # text: exact, or ~substring, with case
        ("", ALL), ("name=base", [1]), ("name=BASE", []), ("name=bas", []),
        ("name=~ase", [1, 2, 3]), ("name=~base", [1, 2]), ("name=~", ALL), ("name=~zzz", []),
        ("name=", []), ("name", []), ("name=base&name=base64", []), ("name=base&name=base", []),
        ("version=1.0.0", [1, 2]), ("version=~.0", [1, 2, 3, 4, 5]), ("version=~.04", [4]),
        ("version=1.0.0%2Bb", [5]), ("version=", []), ("version=1.0.0&version=1.0.0", []),
        # os and owner: exact, ~ is a letter
        ("os=smartos", [1, 2]), ("os=~smart", []), ("os=SmartOS", []), ("os=", []),
        ("os=linux", [3, 4]), ("os=linux&os=linux", []),
        (f"owner={OWNER}", [2]), (f"owner={NOBODY}", [1, 3, 4, 5]), ("owner=", []),
        (f"owner=~{OWNER}", []),
        # type: exact or !type
        ("type=zone-dataset", [1, 2, 5]), ("type=!zone-dataset", [3, 4]), ("type=zvol", []),
        ("type=!bogus", ALL), ("type=zone", []), ("type=~zone", []), ("type=", []),
        # public
        ("public=true", ALL), ("public=false", []), ("public=", []), ("public=xyz", []),
        # state: strangers see active images alone
        ("state=active", ALL), ("state=all", ALL), ("state=", ALL), ("state=disabled", []),
        ("state=unactivated", []), ("state=creating", []), ("state=failed", []),
        # tags
        ("tag.role=db", [2, 3]), ("tag.role=web", [4]), ("tag.role=", []), ("tag.none=x", []),
        ("tag.n=5", [2, 3]), ("tag.yes=true", [2]), ("tag.yes=1", []), ("tag.half=1.5", [2]),
        ("tag.role=db&tag.yes=true", [2]), ("tag.role=db&tag.role=web", []),
        ("tag.role=db&tag.role=db", [2, 3]), ("tag.obj=a", []), ("tag.obj=[object%20Object]", []),
        ("tag.long=" + "x" * 101, []), ("tag.max=" + "y" * 100, [2]), ("tag.a.b=c", [2]),
        ("tag.%C3%A9=%E4%B8%AD", [2]), ("tag.=x", []),
        # billing tags
        ("billing_tag=one", [3, 4]), ("billing_tag=one&billing_tag=two", [3]),
        ("billing_tag=x", []), ("billing_tag=", []),
        # account: these images are public, so everybody's
        (f"account={OWNER}", ALL), (f"account={OWNER}&owner={OWNER}", [2]),
        (f"account={OWNER}&owner={NOBODY}", [1, 3, 4, 5]), ("account=x", ALL),
        # together
        ("os=smartos&version=1.0.0", [1, 2]), ("os=smartos&name=~64", [2]),
        ("os=smartos&name=ubuntu", []),
        # unknown ones
        ("bogus=1", ALL), (f"uuid={U1}", ALL), (f"origin={U1}", ALL), ("Name=base", ALL),
        # sort
        ("sort=published_at", ALL), ("sort=published_at.asc", ALL), ("sort=", ALL),
        ("sort=published_at.desc", [5, 4, 3, 2, 1]), ("sort=published_at.DESC", [5, 4, 3, 2, 1]),
        ("sort=published_at.ASC", ALL), ("sort=published_at.down", [5, 4, 3, 2, 1]),
        # limit
        ("limit=2", [1, 2]), ("limit=0", ALL), ("limit=", ALL), ("limit=-1", []),
        ("limit=1000", ALL), ("limit=99999999999999999999999", ALL),
        # marker: a uuid or a date, itself included
        (f"marker={U1}", ALL), (f"marker={U3}", [3, 4, 5]), (f"marker={U5}", [5]),
        (f"marker={U6}", ALL), ("marker=", ALL),
        (f"marker={U2}&sort=published_at.desc", [2, 1]),
        ("marker=2014", [4, 5]), ("marker=2013-02", [2, 3, 4, 5]),
        ("marker=2013-02-01", [2, 3, 4, 5]), ("marker=2013-02-01T00:00Z", [2, 3, 4, 5]),
        ("marker=2013-02-01T00:00:00Z", [2, 3, 4, 5]),
        ("marker=2013-02-01T00:00:00.000Z", [2, 3, 4, 5]),
        ("marker=2013-02-01T00:00:00.001Z", [4, 5]),
        ("marker=2013-02-01T00:00:01Z", [4, 5]), ("marker=2014-01-01T00:00:00.500Z", [4, 5]),
        ("marker=2016", []), ("marker=1999", ALL),
        ("marker=2013-02-01&sort=published_at.desc", [3, 2, 1]),
        ("marker=2013-02-01T00:00:00.000Z&sort=published_at.desc", [3, 2, 1]),
        # the order: filter, sort, marker, limit
        ("limit=2&sort=published_at.desc", [5, 4]), (f"marker={U2}&limit=2", [2, 3]),
        (f"marker={U4}&limit=2&sort=published_at.desc", [4, 3]),
        ("name=~base&limit=1", [1]), ("os=linux&limit=1&sort=published_at.desc", [4]),
        (f"os=linux&marker={U2}&limit=1", [3]), (f"type=other&marker={U1}&limit=1", [4]),
    ]
    ERRORS = [
        ("sort=name", 422, "InvalidParameter",
         "invalid 'sort': not a valid sorting attribute: 'name'", "sort"),
        ("sort=.desc", 422, "InvalidParameter",
         "invalid 'sort': not a valid sorting attribute: ''", "sort"),
        ("state=bogus", 422, "InvalidParameter", 'invalid state: "bogus" (must be one of '
         'active, unactivated, disabled, creating, failed, all)', "state"),
        ("limit=x", 422, "InvalidParameter", 'invalid limit: "x"', "limit"),
        ("limit=%D9%A3", 422, "InvalidParameter", 'invalid limit: "\u0663"', "limit"),
        (f"marker={NONE}", 404, "ResourceNotFound", f"image {NONE} not found"),
        ("marker=bogus", 422, "InvalidParameter",
         'invalid value for "marker" param: "bogus" is not a UUID or date string', "marker"),
        ("marker=%D9%A2013", 422, "InvalidParameter",
         'invalid value for "marker" param: "\u0662013" is not a UUID or date string', "marker"),
        ("marker=2013-99-99", 422, "InvalidParameter",
         'invalid value for "marker" param: "2013-99-99" is not a UUID or date string', "marker"),
    ]
    HOSTILE = [
        "name=%ff%fe", "name=%", "name=%zz", "name=%00", "name=~%00", "tag.%ff=%ff", "tag.=",
        "tag", "tag.", "&&&&", "=", "=x", "?", "name[]=x", "name[a]=b", ";", "limit=1;limit=2",
        "billing_tag=%c3%28", "public=xyz", "limit=1&limit=2", "marker=1&marker=2",
        "sort=a&sort=b", "state=all&state=all", "channel=a&channel=b", "account=a&account=b",
        "limit=1e999", "limit=NaN", "limit=-99999999999999999999", "limit=1.5", "limit=+5",
        "marker=99999-01-01", "marker=0000", "marker=-1", "marker=2013-01-01T99:99:99Z",
        "sort=" + "published_at." * 500, "name=" + "x" * 7000, "name=~" + "a" * 7000,
        "tag." + "k" * 7000 + "=v", "x" * 7000, "&" * 7000, "=" * 7000, "%" * 7000,
        "tag.a=1&" * 800, "name=x&" * 900, "billing_tag=x&" * 500,
        "&".join(f"p{number}=1" for number in range(1000)), "name=\xff\xfe", "\xe9=\xe9",
        "name=" + "%41" * 2000, "type=!", "type=!!", "name=~~", "xerror=1", "error=1",
    ]

    def setUp(self):
        super().setUp()
        for number, (name, version, system, kind, time, more) in self.IMAGES.items():
            support.write_v2(self.serve_dir, uuid_of(number), name=name, version=version,
                             os=system, type=kind, published_at=time, **more)
        self.server = self.serve()

    def test_table(self):
        for query, numbers in self.TABLE:
            with self.subTest(query):
                answer = self.server.get("/images?" + query)
                self.assertEqual(answer.status, 200, answer)
                self.assertEqual(numbers_of(answer), numbers)
                self.assertEqual(answer.body.decode("ascii"), json.dumps(answer.json(), indent=2))

    def test_errors(self):
        self.expect(self.server, [("/images?" + query, *rest) for query, *rest in self.ERRORS])

    def test_hostile_queries(self):
        """None of them is an error of the server's, whatever the route."""
        for path in ("/images", f"/images/{U1}", f"/images/{U1}/file", f"/images/{U1}/icon",
                     "/channels", "/ping", "/datasets"):
            with self.server.connect() as connection:
                for query in self.HOSTILE:
                    with self.subTest(path=path, query=query[:50]):
                        answer = connection.request(f"{path}?{query}")
                        self.assertLess(answer.status, 500, answer)
                        if answer.headers["content-type"] == "application/json":
                            answer.json()

    def test_repeated_parameters_match_nothing(self):
        for name in ("name", "version", "os", "owner", "type", "public"):
            with self.subTest(name):
                self.assertEqual(numbers_of(self.server.get(f"/images?{name}=a&{name}=b")), [])

    def test_a_private_image_is_its_owners(self):
        support.write_v2(self.serve_dir, uuid_of(7), owner=OWNER, public=False, acl=[uuid_of(8)])
        target = f"/images/{uuid_of(7)}?account="
        for account, status in ((OWNER, 200), (uuid_of(8), 200), (uuid_of(9), 404)):
            with self.subTest(account):
                answer = self.server.get(target + account)
                self.assertEqual(answer.status, status)
                self.assertEqual(7 in numbers_of(self.server.get(f"/images?account={account}")),
                                 status == 200)
                if status == 404:
                    self.expect_error(answer, 404, "ResourceNotFound", "image not found")


class Ties(Case):

    def test_one_moment_in_two_spellings_is_one_moment(self):
        """With and without thousandths of a second: then the uuid decides."""
        for number, time in ((1, "2013-01-01T00:00:00.000Z"), (2, "2013-01-01T00:00:00Z"),
                             (3, "2013-01-01T00:00:00.000Z"), (4, "2013-01-01T00:00:00.001Z")):
            support.write_v2(self.serve_dir, uuid_of(number), published_at=time)
        server = self.serve()
        for query, numbers in (("", [1, 2, 3, 4]), (f"?marker={U2}", [2, 3, 4]),
                               ("?marker=2013-01-01T00:00:00.000Z", [1, 2, 3, 4]),
                               ("?marker=2013-01-01&sort=published_at.desc", [3, 2, 1])):
            with self.subTest(query):
                self.assertEqual(numbers_of(server.get("/images" + query)), numbers)


    def test_an_image_that_comes_later_takes_its_place(self):
        time = "2013-01-01T00:00:00Z"
        for number in (2, 4):
            support.write_v2(self.serve_dir, uuid_of(number), published_at=time)
        server = self.serve()
        self.assertEqual(numbers_of(server.get("/images")), [2, 4])
        for number in (3, 1):
            support.write_v2(self.serve_dir, uuid_of(number), published_at=time)
            server.get("/images")
        self.assertEqual(numbers_of(server.get("/images")), [1, 2, 3, 4])


class Paging(Case):

    def test_many_images_with_ties(self):
        """Each image comes once, to imgadm and to clients that ask for pages of their own."""
        count = 2500 if support.CHECK else 1100           # imgadm asks for 1,000 at a time
        for number in range(1, count + 1):
            support.write_v2(self.serve_dir, uuid_of(number * 7919 % 100003), path="f",
                             published_at=f"2013-01-{1 + number % 5:02}T00:00:00Z")
        server = self.serve()
        everything = [image["uuid"] for image in server.get("/images").json()]
        self.assertEqual(len(set(everything)), count)
        source = imgadm.Source("http://images.example.com", server.address)
        with imgadm.Imgadm3([source]) as client:
            self.assertEqual([image["uuid"] for image in client.avail()], everything)
        for limit, sort in ((1000, ""), (333, "&sort=published_at.desc")):
            with self.subTest(limit=limit, sort=sort):
                want = everything[::-1] if sort else everything
                self.assertEqual(self.pages(server, limit, sort), want)

    def pages(self, server, limit, sort):
        """All images in pages, each from the last one of the page before."""
        uuids, marker = [], ""
        with server.connect() as connection:
            while True:
                page = [image["uuid"] for image in connection.request(
                    f"/images?limit={limit}{sort}{marker}").json()]
                self.assertLessEqual(len(page), limit)
                if uuids:
                    self.assertEqual(page[0], uuids[-1])
                uuids += page[1:] if uuids else page
                if len(page) < limit:
                    return uuids
                marker = f"&marker={uuids[-1]}"


class Versions(Case):

    #      Accept-Version, 1 or 2, or None: not supported
    TABLE = [(None, 1), ("~1", 1), ("1", 1), ("1.0.0", 1), ("~2", 2), ("2", 2), ("2.0.0", 2),
             ("*", 2), ("~1.0", 1), ("~2.0.0", 2), ("x", 2), ("", 2), ("~99", None),
             ("99", None), ("3.0.0", None), ("0", None), ("~2.1", None), ("1.0.1", None)]

    def test_table(self):
        support.write_v2(self.serve_dir, U1, channels=["dev"])
        server = self.serve(config={"channels": [{"name": "dev", "description": "d",
                                                  "default": True}]})
        for version, expected in self.TABLE:
            for target in ("/images", "/images?name=test", f"/images/{U1}"):
                with self.subTest(version=version, target=target):
                    headers = {} if version is None else {"Accept-Version": version}
                    answer = server.get(target, headers)
                    if expected is None:
                        error = self.assertError(answer, 400, "InvalidVersion")
                        self.assertEqual(error["message"], f"{version} is not supported by GET "
                                         + target.partition("?")[0])
                        continue
                    self.assertEqual(answer.status, 200)
                    image = answer.json() if "/images/" in target else answer.json()[0]
                    self.assertEqual("channels" in image, expected == 2)

    def test_etags_tell_the_versions_apart(self):
        support.write_v2(self.serve_dir, U1, channels=["dev"])
        server = self.serve(config={"channels": [{"name": "dev", "description": "d",
                                                  "default": True}]})
        for target in ("/images", f"/images/{U1}"):
            with self.subTest(target):
                etags = {server.get(target, {"Accept-Version": version}).headers["etag"]
                         for version in ("~1", "~2")}
                self.assertEqual(len(etags), 2)


class Channels(Case):

    RELEASE = {"name": "release", "description": "stable ones", "default": True}
    DEV = {"name": "dev", "description": "fresh ones"}
    STAGING = {"name": "staging", "description": "in between"}
    VERSION = {"Accept-Version": "~2"}

    def images(self, channels):
        """Images 1 to 5, in: release; dev; both; none at all; one that is not configured."""
        for number, names in enumerate((["release"], ["dev"], ["dev", "release"], None,
                                        ["gone"]), 1):
            support.write_v2(self.serve_dir, uuid_of(number), channels=names,
                             published_at=f"2013-01-0{number}T00:00:00Z")
            self.put(uuid_of(number), "icon.png", b"x")
        return self.serve(config={"channels": channels})

    def test_channels(self):
        server = self.images([self.RELEASE, self.DEV, self.STAGING])
        answer = server.get("/channels")
        self.assertEqual(answer.json(), [self.RELEASE, self.DEV, self.STAGING])
        for query, numbers in (
                ("", [1, 3]), ("channel=", [1, 3]), ("channel=release", [1, 3]),
                ("channel=dev", [2, 3]), ("channel=staging", []), ("channel=*", [1, 2, 3]),
                ("channel=dev&name=test", [2, 3]), ("channel=dev&limit=1", [2]),
                (f"channel=dev&marker={U3}", [3]), ("channel=*&sort=published_at.desc",
                                                    [3, 2, 1])):
            with self.subTest(query):
                self.assertEqual(numbers_of(server.get("/images?" + query)), numbers)
        self.assertEqual(server.get("/ping").status, 200)

    def test_single_images(self):
        server = self.images([self.RELEASE, self.DEV])
        gone = 404, "ResourceNotFound", "image not found"
        unknown = 422, "ValidationFailed", "unknown channel: bogus", "channel"
        for part in ("", "/file", "/icon"):
            self.expect(server, [
                (f"/images/{U1}{part}", 200),
                (f"/images/{U1}{part}?channel=", 200),
                (f"/images/{U1}{part}?channel=release", 200),
                (f"/images/{U1}{part}?channel=dev", *gone),
                (f"/images/{U1}{part}?channel=*", 200),
                (f"/images/{U1}{part}?channel=bogus", *unknown),
                (f"/images/{U2}{part}", *gone),
                (f"/images/{U2}{part}?channel=dev", 200),
                (f"/images/{U3}{part}", 200),
                (f"/images/{U3}{part}?channel=dev", 200),
                (f"/images/{U4}{part}", *gone),
                (f"/images/{U4}{part}?channel=*", *gone),
                (f"/images/{U5}{part}?channel=*", *gone),
                (f"/images/{NONE}{part}", 404, "ResourceNotFound", f"image {NONE} not found"),
            ])
        self.expect(server, [("/images?channel=bogus", *unknown)])

    def test_no_default(self):
        server = self.images([self.DEV, self.STAGING])
        self.assertEqual(server.get("/channels").json(), [self.DEV, self.STAGING])
        missing = (422, "ValidationFailed",
                   "channel not specified and the server has no default channel", "channel",
                   "MissingParameter")
        self.expect(server, [("/images", *missing), ("/images?channel=", *missing),
                             (f"/images/{U2}", *missing), (f"/images/{U2}/file", *missing),
                             ("/images?channel=dev", 200), ("/channels", 200)])

    def test_shown_in_version_2(self):
        server = self.images([self.RELEASE, self.DEV])
        shown = server.get(f"/images/{U3}", self.VERSION).json()
        self.assertEqual(shown["channels"], ["dev", "release"])
        self.assertEqual(list(shown)[-1], "channels")
        self.assertNotIn("channels", server.get(f"/images/{U3}").json())

    def test_not_configured(self):
        """Then there are none: images show none, and what a client asks for is not looked at."""
        server = self.images([])
        self.expect(server, [("/channels", 404, "ResourceNotFound", "/channels does not exist")])
        for query in ("", "?channel=dev", "?channel=bogus", "?channel=*"):
            with self.subTest(query):
                answer = server.get("/images" + query, self.VERSION)
                self.assertEqual(numbers_of(answer), [1, 2, 3, 4, 5])
                self.assertNotIn(b"channels", answer.body)
                self.assertEqual(server.get(f"/images/{U1}{query}").status, 200)

    def test_imgadm_with_a_channel(self):
        server = self.images([self.RELEASE, self.DEV])
        for channel, numbers in ((None, [1, 3]), ("dev", [2, 3]), ("release", [1, 3])):
            source = imgadm.Source("http://images.example.com/", server.address, channel)
            with self.subTest(channel), imgadm.Imgadm3([source]) as client:
                client.ping()
                self.assertEqual([int(image["uuid"][:8], 16) for image in client.avail()],
                                 numbers)
                for number in range(1, 6):
                    self.assertEqual(client.show(uuid_of(number)) is not None, number in numbers)


class Ping(Case):

    TABLE = [
        # error=, status, code, message (None: not looked at), errors
        ("ValidationFailed", 422, "ValidationFailed", "boom", []),
        ("InvalidParameter", 422, "InvalidParameter", 'invalid "foo"',
         [{"field": "foo", "code": "Invalid"}]),
        ("OperatorOnly", 403, "OperatorOnly", None, None),
        ("StorageIsDown", 503, "StorageIsDown", None, None),
        ("Internal", 500, "InternalError", "boom", None),
        ("", 500, "InternalError", "boom", None),
        ("Bogus", 422, "InvalidParameter", "unknown error: BogusError",
         [{"field": "error", "code": "Missing"}]),
    ]

    def test_errors(self):
        server = self.serve()
        for name, status, code, message, errors in self.TABLE:
            for asked in {name, name + "Error" if name else ""}:
                with self.subTest(asked):
                    error = self.assertError(server.get("/ping?error=" + asked), status, code)
                    if message is not None:
                        self.assertEqual(error["message"], message)
                    self.assertEqual(error.get("errors"), errors)

    def test_everything_else_is_a_pong(self):
        server = self.serve()
        for query in ("", "?", "?message=x", "?x=y", "?xerror=1", "?noerror=", "?channel=dev",
                      "?x=error%3D"):
            with self.subTest(query):
                answer = server.get("/ping" + query)
                self.assertEqual(answer.status, 200)
                self.assertEqual(answer.headers["content-type"], "application/json")
                ping = answer.json()
                self.assertEqual((ping["ping"], ping["imgapi"]), ("pong", True))
