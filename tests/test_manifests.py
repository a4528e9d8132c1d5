"""The pure functions of manifests and JSON: what goes in, what comes out."""

import copy
import json
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
        ("a state is overwritten", {"state": "unactivated"}, {}),
        ("published when created", {"published_at": ABSENT,
                                    "created_at": "2012-01-01T00:00:00Z"},
         {"published_at": "2012-01-01T00:00:00Z"}),
        ("published wins over created", {"created_at": "2012-01-01T00:00:00Z"}, {}),
        ("neither", {"published_at": ABSENT}, {"published_at": ABSENT}),
        ("no seconds", {"published_at": "2012-01-01T10:11Z"},
         {"published_at": "2012-01-01T10:11:00Z"}),
        ("created without seconds", {"published_at": ABSENT, "created_at": "2012-01-01T10:11Z"},
         {"published_at": "2012-01-01T10:11:00Z"}),
        ("thousandths stay", {"published_at": "2012-01-01T10:11:12.345Z"},
         {"published_at": "2012-01-01T10:11:12.345Z"}),
        ("image_size as a text", {"image_size": "10240"}, {"image_size": 10240}),
        ("image_size as a number", {"image_size": 10240}, {"image_size": 10240}),
        ("the rest stays", {"urn": "a:b:c:d", "origin": uuid_of(9), "users": [{"name": "root"}],
                            "requirements": {"ssh_key": True}, "tags": {"a": 1}},
         {"urn": "a:b:c:d", "origin": uuid_of(9), "users": [{"name": "root"}],
          "requirements": {"ssh_key": True}, "tags": {"a": 1}}),
        ("a null is a value", {"description": None}, {"description": None}),
    ]

    def test_table(self):
        for name, change, result in self.TABLE:
            with self.subTest(name):
                v1 = changed(V1, change)
                before = copy.deepcopy(v1)
                self.assertEqual(imgserver.upgrade(v1), changed(V2, result))
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
        ("empty acl", {"acl": []}, {}),
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
                self.there_and_back(imgserver.complete(changed(V1, change), MTIME))

    def test_v2_v1_v2(self):
        for name, change, _ in Downgrade.TABLE:
            with self.subTest(name):
                v2 = imgserver.complete(changed(V2, change), MTIME)
                if v2.get("acl") == []:
                    del v2["acl"]
                self.there_and_back(v2)

    def there_and_back(self, v2):
        v1 = imgserver.downgrade(v2)
        again = imgserver.complete(v1, "1999-01-01T00:00:00Z")
        self.assertEqual(again, v2)
        self.assertEqual(imgserver.downgrade(again), v1)

    def test_what_dsapi_shows_upgrades_to_what_imgapi_shows(self):
        """Each API speaks its own format of one and the same image."""
        tables = [(V1, change) for _, change, _ in Upgrade.TABLE]
        tables += [(V2, change) for _, change, _ in Downgrade.TABLE]
        filled = ("urn", "description")       # what imgadm 1 must have is made up where missing
        for manifest, change in tables:
            with self.subTest(change):
                manifest = changed(manifest, change)
                v2 = imgserver.complete(manifest, MTIME)
                v1 = imgserver.as_v1(manifest, v2, {**FILE, "path": "p", "url": "u"}, "internal")
                again = imgserver.public_fields(imgserver.complete(v1, MTIME))
                want = imgserver.public_fields(v2)
                for key in filled:
                    want.setdefault(key, again[key])
                self.assertEqual(again, want)


class AsV1(unittest.TestCase):

    FILE = {**FILE, "path": "image.zfs.gz", "url": "http://x/"}

    def as_v1(self, manifest):
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
        ("unactivated", {"state": "unactivated"}, {"state": "active"}),
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
                self.assertEqual(imgserver.complete(manifest, MTIME),
                                 changed(changed(V2, change), result))
                self.assertEqual(manifest, before, "the argument was changed")

    def test_v1_without_any_time(self):
        v2 = imgserver.complete(changed(V1, {"published_at": ABSENT}), MTIME)
        self.assertEqual(v2, {**V2, "published_at": MTIME})


class Rules(unittest.TestCase):
    """Every field of a v2 manifest: values that are fine, and values that are not."""

    TABLE = {
        "v": ([2], [1, 0, "2", 2.0, True, None, ABSENT]),
        "uuid": ([uuid_of(2)], [uuid_of(0xab).upper(), uuid_of(2)[:-1], uuid_of(2) + "\n", "",
                                "{" + uuid_of(2) + "}", 5, None, ABSENT]),
        "owner": ([NOBODY], ["", "admin", 0, ABSENT]),
        "name": (["a", "a.b_c/d e-F0", "x" * 1024], ["", "a+b", "x" * 1025, "\u00e9", "a\n", "a;b",
                                                    5, None, ABSENT]),
        "version": (["1", "1.0+a/b_c-D", "x" * 512], ["", "1 0", "x" * 513, "1\n", 1, ABSENT]),
        "description": (["", "\u00e9\n", "x" * 10240], ["x" * 10241, 5, []]),
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
                          "2013-04-05T06:07:08Z\n", "\u0662013-04-05T06:07:08Z", 1365142028]),
        "origin": ([uuid_of(3)], ["", "x", 5, [uuid_of(3)]]),
        "files": ([[FILE], [{**FILE, "dataset_guid": "123"}], [{**FILE, "size": 0}]],
                  [[], {}, FILE, "x", [FILE, FILE], [5], [None], [{}],
                   [{**FILE, "size": "5"}], [{**FILE, "size": -1}], [{**FILE, "size": 5.0}],
                   [{**FILE, "size": True}], [{**FILE, "sha1": SHA1.upper()}],
                   [{**FILE, "sha1": SHA1[1:]}], [{**FILE, "sha1": None}],
                   [{**FILE, "compression": "lzma"}], [{**FILE, "compression": ["gzip"]}],
                   [{"sha1": SHA1, "size": 5}], [{"sha1": SHA1, "compression": "none"}],
                   [{"size": 5, "compression": "none"}], [{**FILE, "dataset_guid": 123}],
                   ABSENT]),
        "acl": ([[], [uuid_of(1), uuid_of(2)]], [uuid_of(1), ["x"], [None], {}]),
        "icon": ([True, False], ["icon.png", 1]),
        "urn": (["a:b:c:d"], [5, ["a"]]),
        "users": ([[], [{"name": "root"}]], [["root"], [{}], [{"name": 5}], {"name": "root"},
                                             [{"name": "root", "uid": "0"}]]),
        "billing_tags": ([[], ["a", "x" * 128]], [["x" * 129], "a", [5]]),
        "traits": ([{}, {"a": "b", "c": True, "d": ["e"]}], [{"a": 5}, {"a": {}}, {"a": None},
                                                             []]),
        "tags": ([{}, {"a": 5, "b": {"c": [None, 1.5]}}, {"a": "x" * 100000}],
                 [[], "a", {"a": "x" * 102400}]),
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
                    self.assertEqual(imgserver.problems(changed(V2, {field: value})), [])
            for value in bad:
                with self.subTest(field=field, bad=value):
                    self.assertEqual(imgserver.problems(changed(V2, {field: value})), [field])

    def test_every_field_has_a_case(self):
        tested = set(self.TABLE) | set(imgserver.ZVOL_FIELDS) | {"error"}
        self.assertEqual(tested, set(imgserver.FIELDS))

    # what is changed in V2, and the fields that are refused
    TOGETHER = [
        ("zvol", ZVOL, set()),
        ("zvol with nothing", {"type": "zvol"}, set(imgserver.ZVOL_FIELDS)),
        ("zvol without image_size", {**ZVOL, "image_size": ABSENT}, {"image_size"}),
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
                self.assertEqual(set(imgserver.problems(changed(V2, change))), bad)


class Shown(unittest.TestCase):

    def test_order_and_fields(self):
        """Everything a client may see, in the official order, and nothing else."""
        order = ["v", "uuid", "owner", "name", "version", "state", "disabled", "public",
                 "published_at", "type", "os", "files", "acl", "description", "homepage", "eula",
                 "icon", "urn", "requirements", "users", "generate_passwords",
                 "inherited_directories", "origin", "nic_driver", "disk_driver", "cpu_type",
                 "image_size", "tags", "error", "channels"]
        full = {key: V2.get(key, True) for key in reversed(order)}
        full.update({"x-own": 1, "billing_tags": ["a"], "traits": {"a": True}, "activated": True,
                     "creator_uuid": CREATOR})
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
        self.assertIs(imgserver.public_fields({**V2, "generate_passwords": False})["generate_passwords"],
                      False)


class Json(unittest.TestCase):

    REFUSED = {
        "nothing": b"", "not JSON": b"{", "two values": b"{} {}", "NaN": b"[NaN]",
        "infinity": b"[-Infinity]", "1e999": b"[1e999]", "-1e999": b"[-1e999]",
        "a number of 5,000 digits": b"1" * 5000, "a key twice": b'{"a": 1, "a": 1}',
        "a key twice, deep": b'[{"b": {"a": 1, "a": 2}}]', "half a pair": rb'["\ud800"]',
        "half a pair as a key": rb'{"\udc00": 1}', "a pair turned round": rb'["\udc00\ud800"]',
        "latin-1": b'["\xe9"]', "a byte order mark": b"\xef\xbb\xbf{}",
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
                            (b"18446744073709551615", 2 ** 64 - 1)):
            with self.subTest(data):
                self.assertEqual(imgserver.parse_json(data), value)

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
