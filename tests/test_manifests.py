"""The pure functions of manifests and JSON: what goes in, what comes out."""

import contextlib
import copy
import json
import random
import re
import unittest

from tests.support import NOBODY, uuid_of

import imgserver

CREATOR = "352971aa-31ba-496c-9ade-a379feaecd52"
SHA1 = "0123456789abcdef0123456789abcdef01234567"
FILE = {"sha1": SHA1, "size": 5, "compression": "gzip"}
V1 = {"uuid": uuid_of(1), "name": "n", "version": "1", "type": "zone-dataset", "os": "smartos",
      "creator_uuid": CREATOR, "published_at": "2013-04-05T06:07:08Z", "files": [FILE]}
V2 = {"v": 2, "uuid": uuid_of(1), "owner": CREATOR, "name": "n", "version": "1",
      "state": "active", "disabled": False, "public": True,
      "published_at": "2013-04-05T06:07:08Z", "type": "zone-dataset", "os": "smartos",
      "files": [FILE]}
ZVOL = {"type": "zvol", "nic_driver": "virtio", "disk_driver": "virtio", "cpu_type": "host",
        "image_size": 10240}
MTIME = "2024-01-01T00:00:00Z"
ABSENT = "(absent)"


def changed(manifest, changes):
    """A copy of a manifest with fields set, or removed where ABSENT."""
    result = {**copy.deepcopy(manifest), **changes}
    return {key: value for key, value in result.items() if value is not ABSENT}


def whole(manifest, time=MTIME):
    """The complete v2 form of a manifest as it is stored."""
    return imgserver.complete(imgserver.normalise(manifest)[0], time)


class Upgrade(unittest.TestCase):

    # what is changed in V1: what is different in V2
    TABLE = [
        ("plain", {}, {}),
        ("creator is the owner", {"creator_uuid": uuid_of(7)}, {"owner": uuid_of(7)}),
        ("no creator", {"creator_uuid": ABSENT}, {"owner": NOBODY}),
        ("empty creator", {"creator_uuid": ""}, {"owner": NOBODY}),
        ("creator is no uuid", {"creator_uuid": "sdc"}, {"owner": NOBODY}),
        ("v1's own fields go", {
            "vendor_uuid": CREATOR, "creator_name": "c", "cloud_name": "c", "creator_admin": "a",
            "owner_uuid": uuid_of(3), "platform_type": "smartos", "created_at": "x",
            "updated_at": "x", "_url": "http://x/"}, {}),
        ("restricted", {"restricted_to_uuid": uuid_of(5)}, {"public": False,
                                                            "acl": [uuid_of(5)]}),
        ("restricted to nobody", {"restricted_to_uuid": ""}, {}),
        ("disabled", {"disabled": True}, {"disabled": True, "state": "disabled"}),
        ("not disabled", {"disabled": False}, {}),
        ("disabled is taken as true or false", {"disabled": 1}, {"disabled": True,
                                                                 "state": "disabled"}),
        ("unactivated", {"state": "unactivated"}, {"state": "unactivated"}),
        ("an owner and no creator", {"creator_uuid": ABSENT, "owner": uuid_of(7)},
         {"owner": uuid_of(7)}),
        ("private to several", {"public": False, "acl": [uuid_of(5), uuid_of(6)]},
         {"public": False, "acl": [uuid_of(5), uuid_of(6)]}),
        ("private", {"public": False}, {"public": False}),
        ("published when created", {"published_at": ABSENT,
                                    "created_at": "2012-01-01T00:00:00Z"},
         {"published_at": "2012-01-01T00:00:00Z"}),
        ("published wins over created", {"created_at": "2012-01-01T00:00:00Z"}, {}),
        ("neither", {"published_at": ABSENT}, {"published_at": MTIME}),
        ("no seconds", {"published_at": "2012-01-01T10:11Z"},
         {"published_at": "2012-01-01T10:11:00Z"}),
        ("created without seconds", {"published_at": ABSENT, "created_at": "2012-01-01T10:11Z"},
         {"published_at": "2012-01-01T10:11:00Z"}),
        ("thousandths stay", {"published_at": "2012-01-01T10:11:12.345Z"},
         {"published_at": "2012-01-01T10:11:12.345Z"}),
        ("image_size as a text", {**ZVOL, "image_size": "10240"}, ZVOL),
        ("image_size as a number", ZVOL, ZVOL),
        ("the rest stays", {"urn": "a:b:c:d", "origin": uuid_of(9), "users": [{"name": "root"}],
                            "requirements": {"ssh_key": True}, "tags": {"a": 1}},
         {"urn": "a:b:c:d", "origin": uuid_of(9), "users": [{"name": "root"}],
          "requirements": {"ssh_key": True}, "tags": {"a": 1}}),
        ("a null is unset", {"description": None}, {}),
    ]

    def test_table(self):
        for name, change, result in self.TABLE:
            with self.subTest(name):
                v1 = changed(V1, change)
                before = copy.deepcopy(v1)
                self.assertEqual(whole(v1), changed(V2, result))
                self.assertEqual(v1, before, "the argument was changed")

    def test_is_v1(self):
        for manifest, expected in (({}, True), ({"v": 1}, True), ({"v": 2}, False),
                                   ({"v": 3}, False), ({"v": "2"}, False), ({"v": True}, False),
                                   ({"v": None}, False)):
            with self.subTest(manifest):
                self.assertIs(imgserver.is_v1(manifest), expected)


class Downgrade(unittest.TestCase):

    # what is changed in V2: what v1 then has, beside creator_uuid and so on
    TABLE = [
        ("plain", {}, {}),
        ("disabled", {"disabled": True, "state": "disabled"}, {"disabled": True}),
        ("restricted to one", {"public": False, "acl": [uuid_of(5)]},
         {"restricted_to_uuid": uuid_of(5)}),
        ("acl of a public image", {"acl": [uuid_of(5), uuid_of(6)]},
         {"acl": [uuid_of(5), uuid_of(6)]}),
        ("private to several", {"public": False, "acl": [uuid_of(5), uuid_of(6)]},
         {"public": False, "acl": [uuid_of(5), uuid_of(6)]}),
        ("private", {"public": False}, {"public": False}),
        ("empty acl", {"acl": []}, {}),
        ("fields that v2 does not have", {"creator_name": {"a": 1}, "restricted_to_uuid": "x"},
        {}),
        ("image_size is a text", ZVOL, {**ZVOL, "image_size": "10240"}),
        ("what v1 clients pass over stays", {
            "homepage": "http://x/", "tags": {"a": 1}, "origin": uuid_of(9), "description": "d",
            "requirements": {"min_ram": 256}, "users": [{"name": "root"}],
            "generate_passwords": True},
         {"homepage": "http://x/", "tags": {"a": 1}, "origin": uuid_of(9), "description": "d",
          "requirements": {"min_ram": 256}, "users": [{"name": "root"}],
          "generate_passwords": True}),
    ]

    def test_table(self):
        for name, change, result in self.TABLE:
            with self.subTest(name):
                time = V2["published_at"]
                self.assertEqual(imgserver.downgrade(changed(V2, change)), changed(
                    V1, {"vendor_uuid": CREATOR, "platform_type": "smartos", "created_at": time,
                         "updated_at": time, **result}))

    def test_full_minutes_lose_their_seconds(self):
        for time, shown in (("2013-04-05T06:07:00Z", "2013-04-05T06:07Z"),
                            ("2013-04-05T06:00:01Z", "2013-04-05T06:00:01Z"),
                            ("2013-04-05T06:07:00.000Z", "2013-04-05T06:07:00.000Z")):
            with self.subTest(time):
                v1 = imgserver.downgrade({**V2, "published_at": time})
                self.assertEqual({v1[key] for key in ("published_at", "created_at",
                                                      "updated_at")}, {shown})
                self.assertEqual(imgserver.upgrade(v1)["published_at"], time)


class RoundTrip(unittest.TestCase):

    def test_v1_v2_v1_v2(self):
        """The second v2 is the first, and the second v1 loses nothing that upgrading keeps."""
        for name, change, _ in Upgrade.TABLE:
            with self.subTest(name):
                self.there_and_back(whole(changed(V1, change)))

    def test_v2_v1_v2(self):
        for name, change, _ in Downgrade.TABLE:
            with self.subTest(name):
                v2 = whole(changed(V2, change))
                for name in ("creator_name", "restricted_to_uuid"):
                    v2.pop(name, None)
                if v2.get("acl") == []:
                    del v2["acl"]
                self.there_and_back(v2)

    def there_and_back(self, v2):
        v1 = imgserver.downgrade(v2)
        again = whole(v1, "1999-01-01T00:00:00Z")
        self.assertEqual(again, v2)
        self.assertEqual(imgserver.downgrade(again), v1)

    def test_what_dsapi_shows_upgrades_to_what_imgapi_shows(self):
        """Each API speaks its own format of one and the same image."""
        tables = [(V1, change) for _, change, _ in Upgrade.TABLE]
        tables += [(V2, change) for _, change, _ in Downgrade.TABLE]
        filled = ("urn", "description")       # what imgadm 1 must have is made up where missing
        for manifest, change in tables:
            with self.subTest(change):
                manifest = imgserver.normalise(changed(manifest, change))[0]
                v2 = imgserver.complete(manifest, MTIME)
                v1 = imgserver.as_v1(manifest, v2, {**FILE, "path": "p", "url": "u"}, "internal")
                again = imgserver.public_fields(whole(v1))
                want = imgserver.public_fields(v2)
                for key in filled:
                    want.setdefault(key, again[key])
                self.assertEqual(again, want)


class AsV1(unittest.TestCase):

    FILE = {**FILE, "path": "image.zfs.gz", "url": "http://x/"}

    def as_v1(self, manifest):
        manifest = imgserver.normalise(manifest)[0]
        return imgserver.as_v1(manifest, imgserver.complete(manifest, MTIME), self.FILE,
                               "internal")

    def test_v1_is_answered_as_it_is_stored(self):
        stored = changed(V1, {"creator_name": "c", "cloud_name": "sdc", "urn": "sdc:c:n:1",
                              "description": "d", "platform_type": "smartos", "x-own": [1],
                              "created_at": "2011-01-01T00:00Z", "vendor_uuid": uuid_of(3)})
        self.assertEqual(self.as_v1(stored), {**stored, "files": [self.FILE]})

    # what is changed in V1, and the fields that must come of it
    MENDED = [
        ("empty creator", {"creator_uuid": ""}, {"creator_uuid": NOBODY}),
        ("no creator", {"creator_uuid": ABSENT}, {"creator_uuid": NOBODY}),
        ("owner, which imgadm refuses in v1", {"owner": CREATOR}, {"owner": ABSENT}),
        ("public, refused in a restricted one", {"public": False, "restricted_to_uuid": CREATOR},
         {"public": ABSENT, "restricted_to_uuid": CREATOR}),
        ("state", {"state": "active"}, {"state": ABSENT}),
        ("v: 1", {"v": 1}, {"v": ABSENT}),
        ("channels", {"channels": ["dev"]}, {"channels": ABSENT}),
        ("no time", {"published_at": ABSENT}, {"published_at": MTIME}),
        ("created only", {"published_at": ABSENT, "created_at": "2012-01-01T00:00:00Z"},
         {"published_at": "2012-01-01T00:00:00Z"}),
        ("no names", {}, {"creator_name": "internal", "urn": "internal:internal:n:1",
                          "description": "n 1"}),
        ("names of its own", {"cloud_name": "a", "creator_name": "b"}, {"urn": "a:b:n:1"}),
        ("empty names", {"urn": "", "description": "", "creator_name": ""},
         {"urn": "internal:internal:n:1", "description": "n 1", "creator_name": "internal"}),
    ]

    def test_mended(self):
        for name, change, fields in self.MENDED:
            with self.subTest(name):
                shown = self.as_v1(changed(V1, change))
                self.assertEqual({key: shown.get(key, ABSENT) for key in fields}, fields)

    def test_v2(self):
        self.assertEqual(self.as_v1(changed(V2, {"urn": "sdc:admin:n:1", "channels": ["dev"],
                                                 "published_at": "2013-04-05T06:07:00Z"})), {
            "uuid": uuid_of(1), "name": "n", "version": "1", "type": "zone-dataset",
            "os": "smartos", "urn": "sdc:admin:n:1", "cloud_name": "sdc",
            "creator_name": "admin", "creator_uuid": CREATOR, "vendor_uuid": CREATOR,
            "platform_type": "smartos", "published_at": "2013-04-05T06:07Z",
            "created_at": "2013-04-05T06:07Z", "updated_at": "2013-04-05T06:07Z",
            "description": "n 1", "files": [self.FILE]})

    def test_as_imgadm_create_writes_it(self):
        written = {key: V2[key] for key in ("v", "uuid", "name", "version", "type", "os",
                                            "files")}
        shown = self.as_v1(written)
        for key in ("uuid", "name", "version", "description", "published_at", "type", "os",
                    "files", "creator_uuid", "creator_name", "urn"):
            with self.subTest(key):            # all that imgadm 1 asks for after the download
                self.assertTrue(shown[key])
        self.assertEqual(shown["creator_uuid"], NOBODY)
        self.assertNotIn("v", shown)


class Complete(unittest.TestCase):

    # what is changed in V2, and the fields that must come of it
    TABLE = [
        ("nothing missing", {}, {}),
        ("no owner", {"owner": ABSENT}, {"owner": NOBODY}),
        ("empty owner", {"owner": ""}, {"owner": NOBODY}),
        ("no public", {"public": ABSENT}, {"public": True}),
        ("private", {"public": False}, {"public": False}),
        ("no disabled, no state", {"disabled": ABSENT, "state": ABSENT},
         {"disabled": False, "state": "active"}),
        ("disabled alone", {"disabled": True, "state": ABSENT},
         {"disabled": True, "state": "disabled"}),
        ("state disabled alone", {"disabled": ABSENT, "state": "disabled"},
         {"disabled": True, "state": "disabled"}),
        ("unactivated", {"state": "unactivated"}, {"state": "unactivated"}),
        ("unactivated and disabled", {"state": "unactivated", "disabled": True},
         {"state": "unactivated", "disabled": True}),
        ("creating", {"state": "creating"}, {"state": "creating"}),
        ("failed", {"state": "failed"}, {"state": "failed"}),
        ("no time", {"published_at": ABSENT}, {"published_at": MTIME}),
        ("null", {"published_at": None, "description": None, "owner": None},
         {"published_at": MTIME, "description": ABSENT, "owner": NOBODY}),
    ]

    def test_table(self):
        for name, change, result in self.TABLE:
            with self.subTest(name):
                manifest = changed(V2, change)
                before = copy.deepcopy(manifest)
                self.assertEqual(whole(manifest),
                                 changed(changed(V2, change), result))
                self.assertEqual(manifest, before, "the argument was changed")

    def test_v1_without_any_time(self):
        v2 = whole(changed(V1, {"published_at": ABSENT}))
        self.assertEqual(v2, {**V2, "published_at": MTIME})


def wrong(manifest):
    """The names of the fields that are not right as they stand."""
    mended, invalid = imgserver.mend_manifest(manifest)
    return {re.sub(r"[.\[].*", "", name) for name, *_ in invalid} | {
        name for name in manifest if json.dumps(manifest[name]) != json.dumps(
            mended.get(name, ABSENT))}


class Rules(unittest.TestCase):
    """Every field of a v2 manifest: values that are fine, and values that are not."""

    TABLE = {
        "v": ([2, 1, ABSENT], [0, 3, "2", 2.0, True, None]),
        "uuid": ([uuid_of(2)], [uuid_of(0xab).upper(), uuid_of(2)[:-1], uuid_of(2) + "\n", "",
                                "{" + uuid_of(2) + "}", 5, None, ABSENT]),
        "owner": ([NOBODY, ABSENT], ["", "admin", 0]),
        "name": (["a", "a.b_c/d e-F0", "x" * 1024], ["", "a+b", "x" * 1025, "\u00e9", "a\n", "a;b",
                                                    5, None, ABSENT]),
        "version": (["1", "1.0+a/b_c-D", "x" * 512], ["", "1 0", "x" * 513, "1\n", 1, ABSENT]),
        "description": (["\u00e9\n", "x" * 10240], ["", "x" * 10241, 5, []]),
        "homepage": (["http://example.com", "https://example.com/a?b"],
                     ["example.com", "ftp://example.com/", "javascript:x", "http://", "",
                      "http://" + "x" * 1018, 5]),
        "eula": (["https://example.com/eula"], ["eula", "file:///x", 5]),
        "type": (["zone-dataset", "lx-dataset", "lxd", "docker", "other"],
                 ["zone", "ZVOL", "", 5, None, ABSENT]),
        "os": (["smartos", "linux", "windows", "bsd", "illumos", "other"],
               ["solaris", "", 5, None, ABSENT]),
        "state": (["active", "unactivated", "disabled", "creating", "failed"],
                  ["bogus", "", None, True]),
        "disabled": ([True, False], ["true", 0, None]),
        "public": ([True, False], ["true", 1, None]),
        "published_at": (["2013-04-05T06:07:08Z", "2013-04-05T06:07:08.123Z"],
                         ["2013-04-05T06:07Z", "2013-04-05", "2013-04-05T06:07:08", "",
                          "2013-04-05T06:07:08.1Z", "2013-04-05T06:07:08+00:00",
                          "2013-13-05T06:07:08Z", "2013-04-05T24:07:08Z",
                          "2013-04-05T06:07:08Z\n", "\u0662013-04-05T06:07:08Z", 1365142028]),
        "origin": ([uuid_of(3)], ["", "x", 5, [uuid_of(3)]]),
        "files": ([[FILE], [{**FILE, "dataset_guid": "123"}], [{**FILE, "size": 0}],
                   [{**FILE, "path": "image.zfs.gz", "x-own": None}], [{}],
                   [{"sha1": SHA1, "size": 5}], [{"sha1": SHA1, "compression": "none"}],
                   [{"size": 5, "compression": "none"}]],
                  [[], {}, FILE, "x", [FILE, FILE], [5], [None],
                   [{**FILE, "size": "5"}], [{**FILE, "size": -1}], [{**FILE, "size": 5.0}],
                   [{**FILE, "size": True}], [{**FILE, "sha1": SHA1.upper()}],
                   [{**FILE, "sha1": SHA1[1:]}], [{**FILE, "sha1": None}],
                   [{**FILE, "compression": "lzma"}], [{**FILE, "compression": ["gzip"]}],
                   [{**FILE, "dataset_guid": 123}], [{**FILE, "path": "../x"}],
                   [{**FILE, "md5": "x"}], ABSENT]),
        "acl": ([[], [uuid_of(1), uuid_of(2)]], [uuid_of(1), ["x"], [None], {}]),
        "icon": ([True, False], ["icon.png", 1]),
        "urn": (["a:b:c:d"], [5, ["a"], ""]),
        "users": ([[], [{"name": "root"}]], [["root"], [{}], [{"name": 5}], {"name": "root"},
                                             [{"name": "root", "uid": "0"}]]),
        "billing_tags": ([[], ["a", "x" * 128]], [["x" * 129], "a", [5]]),
        "traits": ([{}, {"a": "b", "c": True, "d": ["e"]}], [{"a": 5}, {"a": {}}, {"a": None},
                                                             []]),
        "tags": ([{}, {"a": 5, "b": {"c": [None, 1.5]}}, {"a": "x" * 102392},
                  {"a": "\u4e2d" * 102392}, {"a": "\U0001f600" * 51196}],
                 [[], "a", {"a": "x" * 102393}, {"a": "\U0001f600" * 51197}]),
        "generate_passwords": ([True, False], ["true", 1]),
        "inherited_directories": ([[], ["/opt"]], ["/opt", [5]]),
        "requirements": (
            [{}, {"networks": []}, {"networks": [{"name": "net0", "description": "public"}]},
             {"brand": "lx"}, {"ssh_key": True}, {"min_ram": 1, "max_ram": 1}, {"min_ram": 5},
             {"max_ram": 5}, {"min_platform": {"7.0": "20120101T000000Z"}},
             {"max_platform": {"7.0": "20991231T235959Z", "6.5": "20130101T000000Z"}},
             {"brand": "bhyve", "bootrom": "uefi"}, {"brand": "bhyve", "bootrom": "bios"}],
            [[], {"bogus": 1}, {"networks": {}}, {"networks": [{"name": "net0"}]},
             {"networks": [{"name": "net0", "description": "x", "more": "y"}]},
             {"networks": [{"name": 0, "description": "x"}]}, {"brand": 5}, {"ssh_key": "true"},
             {"min_ram": "1"}, {"max_ram": 1.5}, {"min_ram": 2, "max_ram": 1}, {"min_ram": True},
             {"min_platform": {}}, {"min_platform": "20120101T000000Z"},
             {"min_platform": {"7.0": "20111231T000000Z"}}, {"max_platform": {"7.0": 5}},
             {"max_platform": {"7.0": "2014"}}, {"bootrom": "uefi"},
             {"brand": "kvm", "bootrom": "uefi"}, {"brand": "bhyve", "bootrom": "efi"}]),
        "channels": ([[], ["dev"]], ["dev", [5]]),
    }

    def test_table(self):
        for field, (good, bad) in self.TABLE.items():
            for value in good:
                with self.subTest(field=field, good=value):
                    self.assertEqual(wrong(changed(V2, {field: value})), set())
            for value in bad:
                with self.subTest(field=field, bad=value):
                    self.assertEqual(wrong(changed(V2, {field: value})), {field})

    def test_every_field_has_a_case(self):
        tested = set(self.TABLE) | set(imgserver.ZVOL_FIELDS) | {"error"}
        self.assertEqual(tested, set(imgserver.FIELDS))

    # what is changed in V2, and the fields that are refused
    TOGETHER = [
        ("zvol", ZVOL, set()),
        ("zvol with nothing", {"type": "zvol"}, set()),
        ("zvol without image_size", {**ZVOL, "image_size": ABSENT}, set()),
        ("zvol with a text", {**ZVOL, "image_size": "10240"}, {"image_size"}),
        ("zvol with a fraction", {**ZVOL, "image_size": 1.5}, {"image_size"}),
        ("zvol with numbers", {**ZVOL, "nic_driver": 1, "disk_driver": 2, "cpu_type": 3},
         {"nic_driver", "disk_driver", "cpu_type"}),
        ("zone with a zvol's fields", {**ZVOL, "type": "zone-dataset"},
         set(imgserver.ZVOL_FIELDS)),
        ("inherited_directories of lx", {"type": "lx-dataset", "inherited_directories": ["/a"]},
         {"inherited_directories"}),
        ("error of a failed image", {"state": "failed", "error": {"code": "x"}}, set()),
        ("error of an active image", {"error": {"code": "x"}}, {"error"}),
        ("error as a text", {"state": "failed", "error": "x"}, {"error"}),
        ("unknown fields are let be", {"x-own": 1}, set()),
        ("all problems at once", {"name": "", "version": "", "os": "x", "files": []},
         {"name", "version", "os", "files"}),
    ]

    def test_fields_that_depend_on_others(self):
        for name, change, bad in self.TOGETHER:
            with self.subTest(name):
                self.assertEqual(wrong(changed(V2, change)), bad)


class Mending(unittest.TestCase):
    """A value of another kind, in every field where that can be: what is made of it."""

    # rule of: (as stored, as it is mended) ...
    TEXT = [(1, "1"), (1.0, "1"), (1.5, "1.5"), (True, "true"), (False, "false")]
    FLAG = [("true", True), ("false", False), ("True", True), (1, True), (0, False), ("1", True)]
    NUMBER = [("10240", 10240), (1024.0, 1024), ("3.8e8", 380000000), (3.8e8, 380000000)]
    ID = [(uuid_of(0xabc).upper(), uuid_of(0xabc)), (f" {uuid_of(3)}\n", uuid_of(3))]
    TIME = [("2013-04-05T06:07:08.5Z", "2013-04-05T06:07:08.500Z"),
            ("2013-04-05T08:07:08+02:00", "2013-04-05T06:07:08Z"),
            ("2013-04-05t06:07z", "2013-04-05T06:07:00Z"), ("2013-04-05", "2013-04-05T00:00:00Z")]
    FIELDS = {
        **dict.fromkeys(("name", "version", "description", "urn"), TEXT),
        **dict.fromkeys(("disabled", "public", "generate_passwords"), FLAG),
        **dict.fromkeys(("owner", "origin", "uuid"), ID), "published_at": TIME,
        "v": [("2", 2), (2.0, 2), (3, 2)], "type": [("Zone-Dataset", "zone-dataset")],
        "os": [("SmartOS", "smartos")], "homepage": [(" http://a/\n", "http://a/")],
        "state": [("Active", "active"), ("nuked", "unactivated"), ("pending", "unactivated")],
        "acl": [(uuid_of(3), [uuid_of(3)]), ([uuid_of(0xabc).upper()], [uuid_of(0xabc)])],
        "billing_tags": [("a", ["a"]), ([1, "b", None, ""], ["1", "b"])],
        "inherited_directories": [("/opt", ["/opt"])], "channels": [("dev", ["dev"])],
        "users": [({"name": "root"}, [{"name": "root"}]), ([{"name": 0}], [{"name": "0"}])],
        "traits": [({"a": 5, "b": True}, {"a": "5", "b": True})],
        "files": [(FILE, [FILE])] + [([{**FILE, name: value}], [{**FILE, name: mended}])
                                     for name, value, mended in (
            ("size", "5", 5), ("size", 5.0, 5), ("sha1", SHA1.upper(), SHA1),
            ("compression", "GZIP", "gzip"), ("dataset_guid", 2 ** 64 - 1, str(2 ** 64 - 1)))],
        "requirements": [({name: value}, {name: mended}) for name, value, mended in (
            ("min_ram", "512", 512), ("max_ram", 1e3, 1000), ("ssh_key", "true", True),
            ("brand", 5, "5"), ("networks", {"name": "a", "description": "b"},
                                [{"name": "a", "description": "b"}]))],
    }

    def test_table(self):
        for name, cases in self.FIELDS.items():
            for value, mended in cases:
                with self.subTest(name, value=value):
                    stored = {**V2, name: value}
                    before = copy.deepcopy(stored)
                    result, notes, reasons = imgserver.normalise(stored)
                    self.assertEqual((result, notes, reasons), ({**V2, name: mended}, (), ()))
                    self.assertIs(type(result[name]), type(mended))
                    self.assertEqual(stored, before, "the argument was changed")

    def test_zvol(self):
        for name, cases in (("nic_driver", self.TEXT), ("disk_driver", self.TEXT),
                            ("cpu_type", self.TEXT), ("image_size", self.NUMBER)):
            for value, mended in cases:
                with self.subTest(name, value=value):
                    for manifest in (V1, V2):
                        v2 = whole({**manifest, **ZVOL, name: value})
                        self.assertEqual(v2[name], mended)

    def test_v1(self):
        for name, cases in (("restricted_to_uuid", self.ID), ("creator_uuid", self.ID),
                            ("creator_name", self.TEXT), ("created_at", self.TIME[:2])):
            for value, mended in cases:
                with self.subTest(name, value=value):
                    result, notes, reasons = imgserver.normalise({**V1, name: value})
                    self.assertEqual((result[name], notes, reasons), (mended, (), ()))

    def test_unset(self):
        required = set(imgserver.REQUIRED) | {"v"}
        for name in set(imgserver.FIELDS) - required:
            for value in (None, ""):
                with self.subTest(name, value=value):
                    result, notes, reasons = imgserver.normalise({**V2, name: value})
                    self.assertEqual((result, notes, reasons), (changed(V2, {name: ABSENT}), (),
                        ()))
        unset = {"networks": None, "brand": "", "ssh_key": None, "min_ram": None, "max_ram": 0,
                 "min_platform": None, "bootrom": None}
        self.assertEqual(imgserver.normalise({**V2, "requirements": unset}), (V2, (), ()))
        self.assertEqual(imgserver.normalise({**V2, "users": {}, "acl": {}, "tags": []}),
                         (V2, (), ()))

    def test_what_is_right_stays_as_it_is(self):
        for manifest in (V1, V2):
            self.assertEqual(json.dumps(imgserver.normalise(manifest)[0]), json.dumps(manifest))

    def test_options_of_dsapid(self):
        options = {"nic_driver": "virtio", "disk_driver": "virtio", "cpu_type": "host",
                   "image_size": 10240}
        v2 = whole({**V1, "type": "zvol", "options": options})
        self.assertEqual(v2, {**V2, "type": "zvol", **options})

    MOMENTS = [
        ("2013-04-05T06:07:08Z", "2013-04-05T06:07:08Z"), ("20130405T060708Z",
        "2013-04-05T06:07:08Z"),
        ("2013-04-05T06:07:08", "2013-04-05T06:07:08Z"), ("2013-04-05 06:07:08Z",
        "2013-04-05T06:07:08Z"),
        ("2013-04-05T06:07:08.97Z", "2013-04-05T06:07:08.970Z"),
        ("2013-04-05T06:07:08,123456789Z", "2013-04-05T06:07:08.123Z"),
        ("2013-04-05T06:07.5Z", "2013-04-05T06:07:30.000Z"), ("2013-04-05T06Z",
        "2013-04-05T06:00:00Z"),
        ("2013-04-05T06:07:08+00:00", "2013-04-05T06:07:08Z"),
        ("2013-04-05T06:07:08-0730", "2013-04-05T13:37:08Z"),
        ("2013-04-05T01:07:08+02", "2013-04-04T23:07:08Z"),
        ("2013-04-05T06:07:08\u221201:00", "2013-04-05T07:07:08Z"),
        ("2013-04-05T24:00:00Z", "2013-04-06T00:00:00Z"), ("2013-W14-5", "2013-04-05T00:00:00Z"),
        ("2013W145T06", "2013-04-05T06:00:00Z"), ("2013-095", "2013-04-05T00:00:00Z"),
        ("2013095T0607Z", "2013-04-05T06:07:00Z"), ("2013-04", "2013-04-01T00:00:00Z"),
        ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00Z"),
        ("", None), ("soon", None), ("2013-13-01", None), ("2013-02-30", None), ("2013-000", None),
        ("2013-367", None), ("2013-W54-1", None), ("2013-04-05T25:00:00Z", None),
        ("2013-04-05T06:60:00Z", None), ("0001-01-01T00:00:00+01:00", None),
        ("9999-12-31T24:00:00Z", None), ("2013-04-05T06:07:08+", None), ("5/4/2013", None),
        ("1365142028", None),
    ]

    def test_moments(self):
        for text, expected in self.MOMENTS:
            with self.subTest(text):
                self.assertEqual(imgserver.moment(text), expected)

    def test_numbers_as_javascript_prints_them(self):
        for number, text in ((1.0, "1"), (-2.5, "-2.5"), (-0.0, "0"), (1e20, "1" + "0" * 20),
                             (1e21, "1e+21"), (1e16, "1" + "0" * 16),
                             (1e-6, "0.000001"), (2.5e-5, "0.000025"), (1.5e-7, "1.5e-7"), (1e300,
                             "1e+300"),
                             (1234.5678, "1234.5678"), (5e-324, "5e-324"), (20.10, "20.1"),
                             (12345678901234567890, "12345678901234567890")):
            with self.subTest(number):
                self.assertEqual(imgserver.number_text(number), text)


class Broken(unittest.TestCase):
    """A field that cannot be read: what it costs, and what the log says of it."""

    COSTS_ITSELF = {
        "description": [["a"], "x" * 10241], "homepage": ["example.com", 5], "eula": ["ftp://x/"],
        "published_at": ["soon", 5, ["x"]], "owner": ["admin", 5], "urn": [[1]],
        "users": ["root", [{"uid": 5}], 5], "tags": ["a", {"a": "b" * 110000}],
        "traits": [{"a": {}}],
        "billing_tags": [[[]]], "generate_passwords": ["maybe"], "requirements": ["x", [1]],
        "error": [{"code": "x"}, 5], "state": ["bogus", 5], "channels": [5.5, [[]]][1:],
        "icon": ["icon.png"], "inherited_directories": [[[]]], "nic_driver": ["virtio"],
        "image_size": [10],
    }

    def test_an_optional_field_costs_itself(self):
        for name, values in self.COSTS_ITSELF.items():
            for value in values:
                with self.subTest(name, value=str(value)[:30]):
                    result, notes, reasons = imgserver.normalise({**V2, name: value})
                    self.assertEqual((result, reasons), (changed(V2, {name: ABSENT}), ()))
                    self.assertEqual(len(notes), 1)
                    self.assertTrue(notes[0].startswith(f"{name} {imgserver.spell(value)} "),
                        notes)
                    self.assertLess(len(notes[0]), 300)

    def test_a_member_costs_itself(self):
        for name, value in (("min_ram", "much"), ("min_platform", "7.0"), ("brands", "lx"),
                            ("bootrom", "uefi"), ("ssh_key", "maybe"), ("networks", [5])):
            with self.subTest(name):
                requirements = {"min_ram": 5, "brand": "lx"}
                requirements.pop(name, None)
                result, notes, reasons = imgserver.normalise(
                    {**V2, "requirements": {**requirements, name: value}})
                self.assertEqual((result, reasons), ({**V2, "requirements": requirements}, ()))
                self.assertEqual(len(notes), 1)
                self.assertTrue(notes[0].startswith(f"requirements.{name} "), notes)
        result, notes, _ = imgserver.normalise({**V2, "files": [{**FILE, "dataset_guid": [1]}]})
        self.assertEqual((result, len(notes)), (V2, 1))

    def test_what_restricts_fails_closed(self):
        for manifest in (V1, V2):
            for field, value, fields in (
                    ("public", "maybe", {"public": False}), ("public", [True], {"public": False}),
                    ("acl", ["x"], {"public": False, "acl": []}), ("acl", 5.5, {"public": False}),
                    ("acl", ["x", uuid_of(3)], {"public": False, "acl": [uuid_of(3)]}),
                    ("disabled", "no", {"disabled": True, "state": "disabled"}),
                    ("disabled", {"a": 1}, {"disabled": True, "state": "disabled"})):
                with self.subTest(field, value=value, v=manifest.get("v")):
                    result, notes, reasons = imgserver.normalise({**manifest, field: value})
                    v2 = imgserver.complete(result, MTIME)
                    self.assertEqual({key: v2.get(key) for key in fields}, fields)
                    self.assertEqual((len(notes), reasons), (1, ()))
        result, notes, _ = imgserver.normalise({**V1, "restricted_to_uuid": "joe"})
        self.assertEqual((imgserver.complete(result, MTIME)["public"], len(notes)), (False, 1))

    def test_what_imgadm_could_not_import(self):
        for field, values in {
                "uuid": [ABSENT, 5], "name": [ABSENT, ["x"], "", "a\nb"], "version": [ABSENT,
                {"a": 1}],
                "type": [ABSENT, "floppy", ["zvol"]], "os": [ABSENT, "beos"], "origin": ["../x"],
                "files": [ABSENT, [], {}, "x", [5], *([{**FILE, **change}] for change in (
                    {"sha1": "abc"}, {"size": -1}, {"size": "x"}, {"size": 1.5}, {"path": "../x"},
                    {"path": ""}, {"compression": "zstd"}))]}.items():
            for value in values:
                with self.subTest(field, value=value):
                    _, _, reasons = imgserver.normalise(changed(V2, {field: value}))
                    self.assertEqual(len(reasons), 1)
                    self.assertTrue(reasons[0].startswith(field), reasons)

    def test_what_imgadm_does_not_mind(self):
        for field in ("name", "version"):
            result, notes, reasons = imgserver.normalise({**V2, field: "a;b \u00e9"})
            self.assertEqual((result[field], len(notes), reasons), ("a;b \u00e9", 1, ()))

    def test_v_that_is_none(self):
        for v in ("x", True, 0, [2], -1):
            result, notes, reasons = imgserver.normalise({**V1, "v": v})
            self.assertEqual((result, len(notes), reasons), (V1, 1, ()))

    def test_several_files(self):
        result, notes, reasons = imgserver.normalise({**V2, "files": [FILE, {"size": 2}]})
        self.assertEqual((result, len(notes), reasons), (V2, 1, ()))


class Junk(unittest.TestCase):
    """Any value in any field: what comes out is sound, or has a reason, and goes round."""

    VALUES = (None, True, False, 0, -1, 2, 1.5, 1e300, "", "x", "true", " 5 ", "2013", "5e2", [],
        {},
              [[]], [{}], [None], {"a": 1}, {"a": None}, {"name": "x"}, [{"name": 1}], ["a", 1],
              "9" * 19, "1e99", 10 ** 19, "\u2028", "\x00")

    def test_it(self):
        choose = random.Random(1)
        names = [*imgserver.V1_FIELDS, "x-own"]
        members = [*imgserver.REQUIREMENTS, "x-own"]
        for _ in range(4000):
            manifest = copy.deepcopy(choose.choice((V1, V2, {**V1, **ZVOL}, {**V2, **ZVOL})))
            fields = choose.choices(names, k=3)
            manifest.update((name, choose.choice(self.VALUES)) for name in fields)
            if choose.random() < 0.3:
                manifest["requirements"] = {name: choose.choice(self.VALUES)
                                            for name in choose.choices(members, k=3)}
            if choose.random() < 0.3:
                name = choose.choice([*imgserver.FILE_FIELDS, "url"])
                manifest["files"] = [{**FILE, name: choose.choice(self.VALUES)}]
            with self.subTest(manifest):
                self.check(manifest)

    def check(self, manifest):
        before = json.dumps(manifest)
        result, _, reasons = imgserver.normalise(manifest)
        self.assertEqual(json.dumps(manifest), before, "the argument was changed")
        for check in (imgserver.validate, imgserver.validate_new, imgserver.validate_changes):
            with contextlib.suppress(imgserver.ApiError):
                check(manifest)
        if reasons:
            return
        v2 = imgserver.complete(result, MTIME)
        self.assertEqual({name for name, *_ in imgserver.mend_manifest(v2)[1]}
                         - imgserver.TOLERATED, set())
        v1 = imgserver.as_v1(result, v2, {**FILE, "path": "p", "url": "u"}, "c")
        for shown in (v1, imgserver.as_v2(v2, FILE), imgserver.public_fields(v2)):
            imgserver.render_json(shown)
        if v2["state"] not in ("creating", "failed"):         # which v1 does not know
            again = whole(imgserver.downgrade(v2), "1999-01-01T00:00:00Z")
            own = imgserver.V1_ONLY | {"icon", "options"}
            self.assertEqual(*({name: value for name, value in each.items() if name not in own
                                and (name, value) != ("acl", [])} for each in (v2, again)))


class Given(unittest.TestCase):
    """What may be set, and how it is refused."""

    FIELDS = [
        ("version=4.1", "4.1"), ("name=2024", "2024"), ("name=true", "true"), ("description=5",
        "5"),
        ("homepage=http://a/?b=c", "http://a/?b=c"), ("urn=1", "1"), ("cpu_type=5", "5"),
        ("creator_name=null", "null"), ("disabled=true", True), ("public=false", False),
        ("image_size=10240", 10240), ('tags={"a": 1}', {"a": 1}), ('channels=["a"]', ["a"]),
        ("homepage=", None), ("tags=", None), ("description=[1]", "[1]"),
    ]

    def test_fields(self):
        for text, value in self.FIELDS:
            with self.subTest(text):
                self.assertEqual(imgserver.parse_field(text), (text.partition("=")[0], value))

    REFUSED = [
        ("hompage=http://a/", "hompage is no field of a manifest"),
        ("min_ram=512", "min_ram is no field of a manifest, but one of its requirements"),
        ("disabled=no", "disabled must be true or false, not 'no'"), ("disabled=False",
        "true or false"),
        ("public=no", "true or false"), ("public=1", "true or false"), ("ssh_key=true",
        "requirements"),
        ("requirements={min_ram: 5}", "requirements must be a JSON object, not '{min_ram: 5}'"),
        ("tags=a", "tags must be a JSON object"),
        ("acl=x", "acl must be a list"), ('acl="x"', "acl must be a list"),
        ("users=root", "users must be a list"), ("image_size=big", "must be a whole number"),
        ("uuid=x", "uuid cannot be set"), ("state=active", "state cannot be set"),
        ("v=1", "v cannot be set"), ("files=[]", "files cannot be set"), ("=x",
        "is not FIELD=VALUE"),
        ("homepage", "is not FIELD=VALUE"), ("options={}", "no field"),
    ]

    def test_refused_fields(self):
        for text, message in self.REFUSED:
            with self.subTest(text), self.assertRaises(ValueError) as caught:
                imgserver.parse_field(text)
            self.assertIn(message, str(caught.exception))

    def refused(self, manifest, check):
        with self.assertRaises(imgserver.ApiError) as caught:
            check(manifest)
        self.assertEqual(caught.exception.status, 422)
        return caught.exception

    def test_import(self):
        given = changed(V2, {"files": ABSENT, "x-own": None, "version": 1.0, "acl": ""})
        result = imgserver.validate(given)
        self.assertEqual(result, changed(V2, {"files": ABSENT, "x-own": None}))
        self.assertEqual(imgserver.validate(V1), V1)
        for change, field, code, message in (
                ({"name": ABSENT}, "name", "MissingParameter", "name is missing"),
                ({"name": "a+b"}, "name", "Invalid", "name takes letters"),
                ({"homepage": "ftp://x"}, "homepage", "Invalid", "must be an http(s) URL"),
                ({"tags": [1]}, "tags", "Invalid", "must be a JSON object"),
                ({"requirements": {"brands": 1}}, "requirements.brands", "Invalid",
                "is no requirement"),
                ({"image_size": 10}, "image_size", "Invalid", "is for type zvol only"),
                ({"files": [FILE, FILE]}, "files", "Invalid", "must hold one file"),
                ({"public": "no"}, "public", "Invalid", "must be true or false")):
            with self.subTest(field):
                error = self.refused(changed(V2, change), imgserver.validate)
                self.assertEqual((error.code, error.message),
                                 ("ValidationFailed", "invalid image data: " + field))
                [entry] = error.errors
                self.assertEqual((entry["field"], entry["code"]), (field, code))
                self.assertIn(message, entry["message"])
        for name, value in (("creator_uuid", "x"), ("cloud_name", "{}"), ("created_at",
            "yesterday")):
            error = self.refused({**V1, name: value}, imgserver.validate)
            self.assertEqual([entry["field"] for entry in error.errors], [name])

    def test_create(self):
        given = {"name": "n", "version": "1", "type": "zvol", "os": "linux", "tags": {}}
        self.assertEqual(imgserver.validate_new(given),
                         {"v": 2, **given, "tags": {}})
        for change, code, field, entry in (
                ({"state": "active"}, "ValidationFailed", "state", "NotAllowed"),
                ({"bogus": 1}, "InvalidParameter", "bogus", "Invalid"),
                ({"uuid": uuid_of(1)}, "InvalidParameter", "uuid", "Invalid"),
                ({"published_at": MTIME}, "InvalidParameter", "published_at", "Invalid"),
                ({"urn": "a:b:c:d"}, "InvalidParameter", "urn", "Invalid"),
                ({"name": None}, "ValidationFailed", "name", "MissingParameter")):
            with self.subTest(field):
                error = self.refused({**given, **change}, imgserver.validate_new)
                self.assertEqual((error.code, error.errors[0]["field"], error.errors[0]["code"]),
                                 (code, field, entry))
                self.assertEqual(error.message, f'invalid extra parameters: "{field}"'
                                 if code == "InvalidParameter"
                                 else f"invalid image data: {field}")

    def test_update(self):
        self.assertEqual(imgserver.validate_changes(
            {"name": 5, "homepage": None, "tags": {}, "acl": uuid_of(3)}),
            {"name": "5", "homepage": None, "tags": {}, "acl": [uuid_of(3)]})
        for changes, field, code in (
                ({"published_at": MTIME}, "published_at", "NotAllowed"),
                ({"disabled": True}, "disabled", "NotAllowed"), ({"x": 1}, "x", "NotAllowed"),
                ({"v": 2}, "v", "NotAllowed"), ({"creator_uuid": CREATOR}, "creator_uuid",
                "NotAllowed"),
                ({"name": None}, "name", "Invalid"), ({"homepage": "x"}, "homepage", "Invalid"),
                ({"requirements": {"min_ram": "x"}}, "requirements.min_ram", "Invalid")):
            with self.subTest(field):
                error = self.refused(changes, imgserver.validate_changes)
                self.assertEqual((error.code, error.message), (
                    "ValidationFailed", "invalid image update data: " + field))
                self.assertEqual([(entry["field"], entry["code"]) for entry in error.errors],
                                 [(field, code)])
        self.assertEqual(self.refused({}, imgserver.validate_changes).errors, [])


class Shown(unittest.TestCase):

    def test_order_and_fields(self):
        """Everything a client may see, in the official order, and nothing else."""
        order = ["v", "uuid", "owner", "name", "version", "state", "disabled", "public",
                 "published_at", "type", "os", "files", "acl", "description", "homepage", "eula",
                 "icon", "urn", "requirements", "users", "generate_passwords",
                 "inherited_directories", "origin", "nic_driver", "disk_driver", "cpu_type",
                 "image_size", "tags", "billing_tags", "traits", "error", "channels"]
        full = {key: V2.get(key, True) for key in reversed(order)}
        full.update({"x-own": 1, "activated": True, "creator_uuid": CREATOR})
        full["files"] = [{"path": "p", "url": "u", "md5": "m", "stor": "local", **FILE,
                          "dataset_guid": "5", "x-own": 1}]
        result = imgserver.public_fields(full)
        self.assertEqual(list(result), order)
        self.assertEqual(result["files"], [{**FILE, "dataset_guid": "5"}])

    def test_unset_fields_are_left_out(self):
        for field, value, expected in (
                ("acl", [], ABSENT), ("acl", [CREATOR], [CREATOR]), ("icon", False, ABSENT),
                ("icon", True, True), ("generate_passwords", True, True),
                ("description", None, ABSENT), ("description", "", ""), ("tags", {}, {}),
                ("disabled", False, False), ("public", False, False), ("image_size", 0, 0)):
            with self.subTest(field=field, value=value):
                result = imgserver.public_fields({**V2, field: value})
                self.assertEqual(result.get(field, ABSENT), expected)

    def test_generate_passwords_false_is_not_lost(self):
        self.assertIs(imgserver.public_fields({**V2,
            "generate_passwords": False})["generate_passwords"],
                      False)


class Json(unittest.TestCase):

    REFUSED = {
        "nothing": b"", "not JSON": b"{", "two values": b"{} {}", "NaN": b"[NaN]",
        "infinity": b"[-Infinity]", "1e999": b"[1e999]", "-1e999": b"[-1e999]",
        "a number of 5,000 digits": b"1" * 5000, "half a pair": rb'["\ud800"]',
        "half a pair as a key": rb'{"\udc00": 1}', "a pair turned round": rb'["\udc00\ud800"]',
        "latin-1": b'["\xe9"]', "two byte-order marks": b"\xef\xbb\xbf" * 2 + b"{}",
        "utf-16": '{"a": 1}'.encode("utf-16"), "nested 100,000 deep": b"[" * 100000,
        "nested objects": b'{"a":' * 100000, "a raw line end": b'["\n"]',
        "a comment": b"[1] // x", "single quotes": b"{'a': 1}",
        "a surrogate in UTF-8": b'["\xed\xa0\x80"]',
    }

    def test_refused(self):
        for name, data in self.REFUSED.items():
            with self.subTest(name), self.assertRaises(ValueError):
                imgserver.parse_json(data)

    def test_taken(self):
        for data, value in ((b'{"a": [1, -2, 1.5, true, false, null, "x"]}',
                             {"a": [1, -2, 1.5, True, False, None, "x"]}),
                            (rb'"\ud83d\ude00 \\ud800"', "\U0001f600 \\ud800"),
                            ('"\u00e9"'.encode(), "\u00e9"), (b" 5 ", 5), (b"{}", {}),
                            (b'{"a": {"a": 1}}', {"a": {"a": 1}}),
                            (b"18446744073709551615", 2 ** 64 - 1),
                            (b"\xef\xbb\xbf{}", {}), (b'{"a": 1, "a": 2}', {"a": 2}),
                            (b'[{"b": {"a": 1, "a": null}}]', [{"b": {"a": None}}])):
            with self.subTest(data):
                self.assertEqual(imgserver.parse_json(data), value)

    def test_a_key_twice_can_be_refused(self):
        for data in (b'{"a": 1, "a": 1}', b'[{"b": {"a": 1, "a": 2}}]'):
            with self.subTest(data), self.assertRaises(ValueError):
                imgserver.parse_json(data, unique=True)

    VALUES = [
        None, True, False, 0, -5, 2 ** 64, 1.5, 1e300, -0.0, 1e-7, "", "a", "\u00e9\U0001f600",
        "\"\\/\b\f\n\r\t\x00\x1f\x7f\u2028", [], {}, [[]], [{}], {"a": {}}, {"a": []},
        {"": ""}, {"\n\u00e9": [1, [2, [3, {"a": None}]], "x"]}, [True, None, 1.25],
        {"b": 1, "a": 2}, V2, [V1, V2], {"a": [1] * 50},
    ]

    def test_rendered_as_json_dumps_does(self):
        for value in self.VALUES:
            with self.subTest(value):
                text = imgserver.render_json(value)
                self.assertEqual(text, json.dumps(value, indent=2))
                self.assertEqual(imgserver.parse_json(text.encode("ascii")), value)


class Files(unittest.TestCase):

    def test_compression_of(self):
        for head, name, expected in (
                (b"\x1f\x8b\x08\0\0\0\0\0", "a.zfs.gz", "gzip"),
                (b"\x1f\x8b\x08\0\0\0\0\0", "a.zfs", "gzip"),
                (b"\x1f\x8b\x08\0\0\0\0\0", "a.zfs.bz2", "gzip"),
                (b"BZh91AY&", "a.zfs.bz2", "bzip2"), (b"BZh91AY&", "a", "bzip2"),
                (b"\xfd7zXZ\0\0\x04", "a.zfs.xz", "xz"), (b"\xfd7zXZ\0\0\x04", "a", "xz"),
                (b"\0\0\0\0\0\0\0\0", "a.zfs", "none"),
                (b"", "a.zfs.gz", "gzip"), (b"", "a.zfs.bz2", "bzip2"), (b"", "a.zfs.xz", "xz"),
                (b"", "a.zfs", "none"), (b"", "gz", "none"), (b"\x1f", "a", "none")):
            with self.subTest(head=head, name=name):
                self.assertEqual(imgserver.compression_of(head, name), expected)

    GOOD = ["image.zfs.gz", "an image", "100%#?+&", "\u00e9.gz", "x" * 255, "...", "-n", "a\\b",
            "manifest.json.gz", '"']
    BAD = ["", ".", "..", "a/b", "/etc/passwd", "../x", "a/", "manifest.json", "a\n", "a\0b",
           "\x1b[2J", "x" * 256, "\u00e9" * 128, "a\u2028b", None, 5, ["a"], {}]

    def test_is_file_name(self):
        for name in self.GOOD:
            with self.subTest(good=name):
                self.assertTrue(imgserver.is_file_name(name))
        for name in self.BAD:
            with self.subTest(bad=name):
                self.assertFalse(imgserver.is_file_name(name))

    def test_a_name_that_no_file_system_takes(self):
        """Half a surrogate pair cannot be encoded; it must not raise either."""
        self.assertFalse(imgserver.is_file_name("\udfff\ud800"))
