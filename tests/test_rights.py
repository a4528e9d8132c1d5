"""The writing half of IMGAPI: what it asks which right for, and what a request may cost."""

import io
import json
import os
import unittest

import imgserver
from tests.support import NOBODY, ServerCase, parse, uuid_of, write_v2

U = uuid_of(1)
PUBLISHER, MANAGER = "192.0.2.1", "192.0.2.2"


class Body(io.BytesIO):
    """A body that came whole."""

    finished, received = True, 0


class Writing(ServerCase):

    def setUp(self):
        super().setUp()
        self.writing = self.site(publish_from=[PUBLISHER], manage_from=[MANAGER])

    def send(self, method, target, data=b"", peer=MANAGER, content_type="application/json",
             listed=False):
        """(status, code or None) of the answer; the number of images where it is a list."""
        request = parse(f"{method} {target} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(data)}\r\n"
                        f"Content-Type: {content_type}\r\n\r\n".encode())
        request.may_block, request.peer, request.body = True, peer, Body(data)
        answer = self.writing.answer(request)
        answer.close()
        if listed:
            return len(json.loads(b"".join(map(answer.body.render, range(len(answer.body))))))
        return answer.status, json.loads(answer.body or b"{}").get("code")

    def test_a_state_of_the_author_gives_no_rights(self):
        """An image that was on show stays for who may manage, whatever its manifest says."""
        for state in ("unactivated", "nuked"):
            write_v2(self.serve_dir, U, state=state)
            for method, target in (("POST", f"/images/{U}?action=activate"),
                                   ("PUT", f"/images/{U}/icon"), ("DELETE", f"/images/{U}/icon"),
                                   ("DELETE", f"/images/{U}")):
                with self.subTest(method, target=target):
                    self.assertEqual(self.send(method, target, peer=PUBLISHER),
                                     (403, "OperatorOnly"))
            self.assertEqual(self.send("DELETE", f"/images/{U}"), (204, None))
            self.assertEqual(os.listdir(self.serve_dir), [])

    def test_activated_twice(self):
        write_v2(self.serve_dir, U)
        self.assertEqual(self.send("POST", f"/images/{U}?action=activate", peer=PUBLISHER),
                         (422, "ImageAlreadyActivated"))

    def test_an_acl_that_grows_with_each_request(self):
        write_v2(self.serve_dir, U)
        accounts = [uuid_of(number) for number in range(20000)]
        for number, status in enumerate((200, 422)):
            data = json.dumps([uuid[:-6] + f"{number:06x}" for uuid in accounts]).encode()
            self.assertEqual(self.send("POST", f"/images/{U}/acl", data)[0], status)
        self.assertEqual(self.send("POST", f"/images/{U}?action=update", b'{"acl": null}')[0], 200)

    def test_json_of_any_depth_is_an_answer(self):
        for levels in (2, 90, imgserver.NESTING_LIMIT + 1, 500, 950, 100000):
            with self.subTest(levels):
                data = ('{"name": "a", "version": "1", "type": "other", "os": "other", "tags": '
                        + '{"a":' * (levels - 1) + "1" + "}" * levels).encode()
                self.assertEqual(self.send("POST", "/images", data),
                                 (200, None) if levels < 100 else (400, "InvalidContent"))

    def test_the_hashes_of_an_icon_are_taken_once(self):
        write_v2(self.serve_dir, U)
        with open(os.path.join(self.serve_dir, U, "icon.png"), "wb") as file:
            file.write(b"icon")
        hash_file, sizes = imgserver.hash_file, []

        def counted(fd, size):
            sizes.append(size)
            return hash_file(fd, size)
        imgserver.hash_file = counted
        self.addCleanup(setattr, imgserver, "hash_file", hash_file)
        for _ in range(40):
            self.assertEqual(self.send("HEAD", f"/images/{U}/icon")[0], 200)
        self.assertEqual(sizes, [4])

    def test_all_tags_of_a_query_are_one_look_at_each_manifest(self):
        for number in range(1, 4):
            write_v2(self.serve_dir, uuid_of(number), tags={"role": "web"})
        fields, seen = imgserver.Image.fields, []

        def counted(image):
            seen.append(image.uuid)
            return fields(image)
        imgserver.Image.fields = counted
        self.addCleanup(setattr, imgserver.Image, "fields", fields)
        query = "&".join(["tag.role=web"] * 98)
        self.assertEqual(self.send("GET", f"/images?{query}", listed=True), 3)
        self.assertEqual(len(seen), 3)

    def test_the_md5_of_what_is_not_active_is_taken_once(self):
        write_v2(self.serve_dir, U, owner=NOBODY)
        os.rename(os.path.join(self.serve_dir, U), os.path.join(self.serve_dir, ".incoming-" + U))
        hash_file, sizes = imgserver.hash_file, []

        def counted(fd, size):
            sizes.append(size)
            return hash_file(fd, size)
        imgserver.hash_file = counted
        self.addCleanup(setattr, imgserver, "hash_file", hash_file)
        for _ in range(40):
            self.assertEqual(self.send("HEAD", f"/images/{U}/file")[0], 200)
        self.assertEqual(len(sizes), 1)


if __name__ == "__main__":
    unittest.main()
