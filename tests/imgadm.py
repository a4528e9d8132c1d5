"""imgadm, as a server sees it: the requests, headers, paging and checks of three generations.

    client = Imgadm3([Source("http://host/datasets", address)])
    client.avail()                    the manifests that `imgadm avail` would print
    client.show(uuid)                 one manifest; None where no source has it
    client.import_image(uuid)         the bytes given to `zfs receive`, origins first
    client.update()                   {uuid: names of changed fields}

    Imgadm1("http://host/datasets/", address)    the one of 2012: update, avail, import_image

What would make imgadm fail, crash or hang raises Failure.  Written from what the real client
does on the wire, not from what a server would like it to do: it asks for files in
absolute-form, follows no redirect, and takes a file only with the length, the sha1 and (some
versions) the Content-MD5 that it was promised.
"""

import base64
import bz2
import concurrent.futures
import email.utils
import gzip
import hashlib
import json
import lzma
import re
import urllib.parse
import uuid as uuids

from tests import support

UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
PLATFORM = "20260101T000000Z"         # the platform image that this client pretends to run on
PAGE = 1000                           # images in a page of an IMGAPI list
AT_ONCE = 5                           # images that imgadm downloads at the same time
DECOMPRESS = {"gzip": gzip.decompress, "bzip2": bz2.decompress, "xz": lzma.decompress,
              "none": bytes}

# What upgradeTo2 drops of a v1 manifest.
DROPPED = ("creator_uuid", "vendor_uuid", "creator_name", "cloud_name", "creator_admin",
           "restricted_to_uuid", "owner_uuid", "platform_type", "created_at", "updated_at", "_url")


class Failure(Exception):
    """imgadm has failed, crashed, or would go on for ever."""


def must(condition, message):
    if not condition:
        raise Failure(message)


# -- requests ----------------------------------------------------------------------------

class Agent:
    """Sends requests over connections that are kept, as node's keep-alive agent does."""

    def __init__(self, address):
        self.address = address
        self.idle = []

    def get(self, target, headers):
        """The Answer to a GET of `target`, with (name, value) pairs as they stand, in order."""
        must(re.fullmatch("[!-~]+", target), f"request path contains unescaped characters: "
                                             f"{target!r}")
        lines = [f"GET {target} HTTP/1.1"] + [f"{name}: {value}" for name, value in headers]
        data = ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")
        while True:
            try:
                connection, reused = self.idle.pop(), True    # in one step: threads share it
            except IndexError:
                connection, reused = support.Connection(self.address), False
            connection.send(data)
            answer = connection.answer()
            if answer is not None:
                break
            connection.close()
            must(reused, "read ECONNRESET")
        if answer.headers.get("connection", "").lower() == "close":
            connection.close()
        else:
            self.idle.append(connection)
        return answer

    def close(self):
        while self.idle:
            self.idle.pop().close()


def json_body(answer):
    """The value of a JSON answer, with the checks that restify's client makes."""
    digest = answer.headers.get("content-md5")
    if digest is not None:
        must(digest == md5_of(answer.body), "BadDigest")
    try:
        return support.strict_json(answer.body)
    except (ValueError, AssertionError) as error:
        raise Failure(f"not JSON: {error}")


def error_of(answer):
    """The failure that imgadm prints for an error answer, which must be {code, message}."""
    error = json_body(answer)
    must(isinstance(error, dict) and isinstance(error.get("code"), str)
         and isinstance(error.get("message"), str), f"no code and message: {error!r}")
    return Failure(f"error ({error['code']}): {error['message']}")


def md5_of(data):
    return base64.b64encode(hashlib.md5(data).digest()).decode()


class Source:
    """An image source: its URL decides the kind, as imgadm guesses it, and the Host header.

    address is where to connect to, whatever the URL says: the name in it need not resolve.
    """

    def __init__(self, url, address, channel=None):
        parts = urllib.parse.urlsplit(url)
        self.url, self.address, self.host = url, address, parts.netloc
        self.kind = "dsapi" if re.search("/datasets/?$", parts.path) else "imgapi"
        # The dsapi client forgets the path before /datasets, the imgapi client keeps it.
        self.base = "" if self.kind == "dsapi" else parts.path.rstrip("/")
        self.channel = channel
        self.json_agent, self.raw_agent = Agent(address), Agent(address)

    def headers(self, user_agent, accept=True):
        """The header lines of a request, in imgadm's order."""
        lines = [("accept", "application/json")] if accept else []
        lines += [("user-agent", user_agent), ("date", email.utils.formatdate(usegmt=True))]
        if self.kind == "imgapi":
            lines += [("accept-version", "~2"), ("x-request-id", str(uuids.uuid4()))]
        return lines + [("Host", self.host), ("Connection", "keep-alive")]

    def image_target(self, uuid):
        if self.kind == "dsapi":
            return f"/datasets/{uuid}"
        return f"{self.base}/images/{uuid}" + self.query()

    def query(self, **more):
        fields = {**({"channel": self.channel} if self.channel else {}), **more}
        return "?" + urllib.parse.urlencode(fields) if fields else ""

    def file_request(self, manifest):
        """(target, whether it sends Accept) of the GET for an image's file."""
        if self.kind == "dsapi":
            # The whole url is the request target, and it goes to the source all the same.
            return manifest["files"][0].get("url", "/"), False
        return f"{self.base}/images/{manifest['uuid']}/file" + self.query(), True

    def close(self):
        self.json_agent.close()
        self.raw_agent.close()


# -- manifests ---------------------------------------------------------------------------

def upgrade_manifest(manifest):
    """imgmanifest.upgradeManifest: the v2 form.  Raises Failure as imgadm does."""
    if "v" in manifest:
        must(float(manifest["v"]) >= 2, "InvalidManifest: v")
        return manifest
    must(manifest.get("creator_uuid"),
         'InvalidManifest: manifest is invalid: manifest does not have a "v" field')
    must("owner" not in manifest, "AssertionError: owner in a v1 manifest")
    must(UUID.fullmatch(manifest["uuid"]), "InvalidUUIDError")
    v2 = {key: value for key, value in manifest.items() if key not in DROPPED}
    v2.update(v=2, owner=manifest["creator_uuid"])
    if manifest.get("restricted_to_uuid"):
        must("public" not in manifest, "AssertionError: public in a restricted v1 manifest")
        v2.update(public=False, acl=[manifest["restricted_to_uuid"]])
    else:
        v2["public"] = True
    v2["disabled"] = bool(manifest.get("disabled"))
    v2["state"] = "disabled" if v2["disabled"] else "active"
    published = manifest.get("published_at") or manifest["created_at"]
    v2["published_at"] = re.sub("(T[0-9]{2}:[0-9]{2})Z$", r"\1:00Z", published)
    v2["files"] = [upgrade_file(file) for file in manifest["files"]]
    if "image_size" in manifest:
        v2["image_size"] = int(manifest["image_size"])
    return v2


def upgrade_file(file):
    name = file.get("path") or file.get("url", "")
    compression = "gzip" if name.endswith(".gz") else "bzip2" if name.endswith(".bz2") else "none"
    return {"compression": compression,
            **{key: value for key, value in file.items() if key not in ("path", "url")}}


_TEXT = r"[\s\S]*"
FORMATS = {                           # imgmanifest's rules for the fields that are texts
    "uuid": UUID.pattern, "owner": UUID.pattern, "origin": UUID.pattern,
    "name": "[A-Za-z0-9._/ -]{1,1024}", "version": "[A-Za-z0-9._/+-]{1,512}",
    "type": "zone-dataset|zvol|lx-dataset|docker|other",
    "os": "smartos|linux|windows|bsd|illumos|other",
    "state": "active|unactivated|disabled|failed|creating",
    "published_at": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z",
    "description": _TEXT, "homepage": "https?://.+", "eula": "https?://.+", "urn": _TEXT,
    "nic_driver": _TEXT, "disk_driver": _TEXT, "cpu_type": _TEXT,
}
KINDS = {"v": int, "disabled": bool, "public": bool, "icon": bool, "files": list, "acl": list,
         "requirements": dict, "users": list, "billing_tags": list, "traits": dict, "tags": dict,
         "generate_passwords": bool, "inherited_directories": list, "image_size": int,
         "error": dict}


def check_minimal_manifest(manifest):
    """validateMinimalManifest, as `imgadm install -m` applies it to what `show` printed."""
    for key in ("v", "uuid", "name", "version", "type", "os"):
        must(key in manifest, f"invalid manifest: {key} is missing")
    for key, value in manifest.items():
        if key in FORMATS:
            good = isinstance(value, str) and re.fullmatch(FORMATS[key], value)
        else:
            good = key in KINDS and type(value) is KINDS[key]
        must(good, f"invalid manifest: {key}")


def check_platform(manifest):
    """The minimum and maximum platform of an image, against the one this runs on."""
    requirements = manifest.get("requirements", {})
    for stamp in requirements.get("min_platform", {}).values():
        must(stamp <= PLATFORM, "MinPlatform")
    for stamp in requirements.get("max_platform", {}).values():
        must(stamp >= PLATFORM, "MaxPlatform")


# -- imgadm 3 and 2 ----------------------------------------------------------------------

class Imgadm3:
    """imgadm 3.9.5."""

    user_agent = "imgadm/3.9.5 (node/20.20.2; OpenSSL/3.0.19)"
    compressions = ("gzip", "bzip2", "xz", "none")
    upgrades_origins = False          # a v1 origin is used as it comes

    def __init__(self, sources):
        self.sources = sources
        self.installed = {}           # uuid: the manifest in imgadm's database
        self.datasets = {}            # uuid: the bytes that `zfs receive` was given

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for source in self.sources:
            source.close()

    def get_json(self, source, target):
        return source.json_agent.get(target, source.headers(self.user_agent))

    def ping(self):
        """`imgadm sources -c`: every source answers, and is of the kind it is taken for."""
        for source in self.sources:
            answer = self.get_json(source, source.base + "/ping")
            if answer.status != 200:
                must(answer.headers.get("content-type") == "application/json",
                     "ReferenceError: format is not defined")
                raise error_of(answer)
            body = json_body(answer)
            if source.kind == "imgapi":
                must(isinstance(body, dict) and body.get("imgapi") is True,
                     "the source does not look like an IMGAPI: no imgapi in its ping")

    def avail(self):
        """The manifests of `imgadm avail`, of all sources in turn."""
        images = []
        for source in self.sources:
            images += (self.list_datasets if source.kind == "dsapi" else self.list_images)(source)
        for manifest in images:
            must(isinstance(manifest.get("name"), str) and isinstance(manifest.get("version"), str)
                 and isinstance(manifest.get("published_at", ""), str), f"TypeError: {manifest}")
        return images

    def list_datasets(self, source):
        return self.array(self.get_json(source, "/datasets"))

    def list_images(self, source):
        images, query = [], source.query()
        while True:
            page = self.array(self.get_json(source, f"{source.base}/images{query}"))
            full = len(page) >= PAGE
            last = images[-1]["uuid"] if images else None
            if page and page[0]["uuid"] == last:
                page = page[1:]
            if page and page[-1]["uuid"] == last:
                break                 # the server knows no marker: this is the first page again
            images += page
            if not full or not page:
                break
            query = source.query(marker=page[-1]["uuid"], limit=PAGE)
        for manifest in images:
            must(manifest.get("state") == "active", f"a list with an image that is not active: "
                                                    f"{manifest}")
        return images

    @staticmethod
    def array(answer):
        if answer.status >= 400:
            raise error_of(answer)
        images = json_body(answer)
        # imgadm would take this for an empty list, and say nothing.
        must(answer.status == 200 and isinstance(images, list), f"no list: {answer}")
        return images

    def find(self, uuid):
        """(source, manifest) of an image, of the first source that has it; (None, None)."""
        for source in self.sources:
            answer = self.get_json(source, source.image_target(uuid))
            if answer.status == 404:
                error_of(answer)
                continue
            if answer.status >= 400:
                raise error_of(answer)
            manifest = json_body(answer)
            must(answer.status == 200 and isinstance(manifest, dict), f"no manifest: {answer}")
            must(manifest.get("uuid") == uuid, f"another image: {manifest.get('uuid')}")
            return source, manifest
        return None, None

    def show(self, uuid):
        return self.find(uuid)[1]

    def import_image(self, uuid):
        """Install an image and its origins; the decompressed bytes of the image."""
        source, manifest = self.find(uuid)
        must(source, f"ActiveImageNotFound: {uuid}")
        manifest = upgrade_manifest(manifest)
        must(manifest.get("state") == "active", f"ActiveImageNotFound: {uuid}")
        check_platform(manifest)
        chain = [(source, manifest)]
        while manifest.get("origin") and manifest["origin"] not in self.installed:
            origin = manifest["origin"]
            must(all(origin != each["uuid"] for _, each in chain),
                 f"the origins of {uuid} form a cycle: imgadm would follow it for ever")
            source, manifest = self.find(origin)
            must(source, f"first of 1 error: image not found: {origin}")
            if self.upgrades_origins:
                manifest = upgrade_manifest(manifest)
            chain.append((source, manifest))
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            downloads = list(pool.map(lambda link: self.download(*link), chain))
        for (_, manifest), data in reversed(list(zip(chain, downloads))):
            self.datasets[manifest["uuid"]] = self.decompress(manifest, data)
            self.installed[manifest["uuid"]] = manifest
        return self.datasets[uuid]

    def download(self, source, manifest):
        """The file of an image, checked as imgadm checks it while it comes."""
        file = manifest["files"][0]
        must(type(file.get("size")) is int, "ctx.imgMeta.size (number) is required")
        if source.kind == "dsapi":
            manifest = json_body(self.get_json(source, source.image_target(manifest["uuid"])))
        target, accept = source.file_request(manifest)
        answer = source.raw_agent.get(target, source.headers(self.user_agent, accept))
        if answer.status >= 400:
            raise Failure("error (NotFoundError): ") if source.kind == "dsapi" \
                else error_of(answer)
        length = answer.headers.get("content-length")
        must(length, "unexpected missing or invalid Content-Length header: undefined")
        must(int(length) == file["size"], f"unexpected mismatch between expected size, "
             f"{file['size']}, and Content-Length header, {length}")
        must("transfer-encoding" not in answer.headers
             and "content-encoding" not in answer.headers, "an encoded file")
        sha1 = hashlib.sha1(answer.body).hexdigest()
        must(sha1 == file.get("sha1", sha1), f"image {manifest['uuid']} file checksum (sha1) "
             f"error: expected {file.get('sha1')!r}, downloaded checksum was {sha1!r}")
        self.check_md5(source, file, answer)
        return answer.body

    @staticmethod
    def check_md5(source, file, answer):
        """Since 3.7.2 Content-MD5 counts only where the manifest has no sha1."""
        if "sha1" not in file and "content-md5" in answer.headers:
            must(answer.headers["content-md5"] == md5_of(answer.body), "Content-MD5 mismatch")

    def decompress(self, manifest, data):
        compression = manifest["files"][0].get("compression")
        must(compression in self.compressions,
             f"image {manifest['uuid']} file compression: {compression}")
        try:
            return DECOMPRESS[compression](data)
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise Failure(f"{compression} of {manifest['uuid']}: {error}")

    def update(self):
        """`imgadm update`: the fields of each installed image that the sources changed."""
        changes = {}
        for uuid, known in self.installed.items():
            manifest = self.show(uuid)
            if manifest is None:
                continue
            changed = sorted(key for key in set(known) | set(manifest)
                             if json.dumps(known.get(key)) != json.dumps(manifest.get(key)))
            if changed:
                changes[uuid] = changed
                self.installed[uuid] = manifest
        return changes


class Imgadm2(Imgadm3):
    """imgadm 2.6.13: knows no xz, and takes no file of an IMGAPI without Content-MD5."""

    user_agent = "imgadm/2.6.13 (node/0.10.48; OpenSSL/1.0.2)"
    compressions = ("gzip", "bzip2", "none")
    upgrades_origins = True

    @staticmethod
    def check_md5(source, file, answer):
        if source.kind == "imgapi":
            must("content-md5" in answer.headers,
                 'image file headers did not include a "Content-MD5"')
            must(answer.headers["content-md5"] == md5_of(answer.body), "Content-MD5 mismatch")


# -- imgadm 1 ----------------------------------------------------------------------------

class Imgadm1:
    """imgadm of 2012: DSAPI alone, a Host without a port, and files by name through curl."""

    required = ("uuid", "name", "version", "description", "published_at", "type", "os", "files",
                "creator_uuid", "creator_name", "urn")

    def __init__(self, url, address):
        parts = urllib.parse.urlsplit(url)
        self.path, self.host = parts.path, parts.hostname
        self.address = address
        self.cache = {}               # uuid: manifest, as the last update brought it
        self.datasets = {}

    def get(self, target, headers):
        agent = Agent(self.address)
        try:
            return agent.get(target, headers)
        finally:
            agent.close()

    def update(self):
        """Fetch the list of exactly the source's URL into the cache; the uuids in it."""
        answer = self.get(self.path, [("host", self.host), ("Connection", "keep-alive")])
        # The status is not looked at; letters that two chunks share would be spoilt.
        must(answer.body.isascii(), "letters cut between chunks")
        images = json_body(answer)
        must(isinstance(images, list), "the list is not an array")
        self.cache = {manifest["uuid"]: manifest for manifest in images}
        return list(self.cache)

    def avail(self):
        """What it prints: (urn, published_at) of every image in the cache."""
        return [(manifest["urn"], manifest["published_at"]) for manifest in self.cache.values()]

    def import_image(self, uuid):
        manifest = self.cache[uuid]
        path = manifest["files"][0]["path"]
        # curl gets the name as it stands: no -f, so an error page is taken for the file.
        data = self.get(f"/datasets/{uuid}/{path}",
                        [("User-Agent", "curl/7.23.1"), ("Accept", "*/*"),
                         ("Host", self.host)]).body
        try:
            data = (gzip.decompress(data) if path.endswith(".gz") else
                    bz2.decompress(data) if path.endswith(".bz2") else data)
        except (OSError, EOFError) as error:
            raise Failure(f"{path}: {error}")
        for key in self.required:
            must(manifest.get(key), f"the manifest has no {key}")
        must(manifest["type"] in ("zone-dataset", "zvol"), f"unknown type {manifest['type']}")
        self.datasets[uuid] = data
        return data
