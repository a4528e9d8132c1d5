#!/usr/bin/env python3
"""imgserver - an image server for SmartOS in one file.

Serves a plain directory of images to every imgadm, over both APIs it has spoken:

    serve_dir/<uuid>/manifest.json      v1 (DSAPI) or v2 (IMGAPI), as its author wrote it
    serve_dir/<uuid>/<file>             the ZFS stream, usually compressed
    serve_dir/<uuid>/icon.png|jpg|gif   optional
    serve_dir/.incoming-<uuid>/         an image that is not active yet

    DSAPI    /datasets  /datasets/:uuid  /datasets/:uuid/:file
    IMGAPI   /images  /images/:uuid  /images/:uuid/file  /images/:uuid/icon  /channels
    both     /ping  /

The directory is the database: whatever appears in it whole is on show with the next
request, what is not sound is left out with one line in the log, and nothing in it is
ever changed by serving it.  It needs Python 3.9 or newer and nothing else.

The parts, each resting only on those above it: constants - errors - log - JSON -
configuration - manifests - store - ZFS streams - publishing - requests and responses -
routes - connections - servers - commands.

What it does not do: TLS (put nginx in front), authentication, HTTP/2, uploads over HTTP.

MIT licence; see LICENSE.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import email.utils
import errno
import fcntl
import functools
import hashlib
import html
import http
import json
import math
import os
import queue
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import stat
import struct
import sys
import threading
import time
import traceback
import urllib.parse
import weakref
from _thread import start_new_thread
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__version__ = "1.0.0"

# -- constants ---------------------------------------------------------------------------
#
# What several parts share; each part's own limits stand at its head.

DSAPI, IMGAPI = "dsapi", "imgapi"
NOBODY = "00000000-0000-0000-0000-000000000000"   # the owner of what has none (imgadm, IMGAPI)
MANIFEST = "manifest.json"
INCOMING = ".incoming-"                           # + uuid: an image that is not active yet
DISCARDED = ".discarded-"                         # + uuid: one that is being removed
ICONS = {"icon.png": "image/png", "icon.jpg": "image/jpeg", "icon.gif": "image/gif"}
JSON_TYPE = b"Content-Type: application/json\r\n"      # exactly: imgadm's dsapi ping compares it
CORS = b"Access-Control-Allow-Origin: *\r\n"

# What errno says of the system rather than of the file.
SHORTAGE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))

EXIT_CONFIG = 96              # SMF_EXIT_ERR_CONFIG: maintenance, not restart after restart

_UUID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
is_uuid = _UUID.fullmatch                         # lower case only, as imgadm and IMGAPI


# -- errors ------------------------------------------------------------------------------

class ApiError(Exception):
    """An error answer to a client: status, and code, message and errors as IMGAPI has them.

    fields holds further header lines, as bytes that end in CRLF.
    """

    def __init__(self, status, code, message, errors=None, fields=b""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.errors, self.fields = errors, fields


class NeedsThread(Exception):
    """The answer is not in memory: ask again from a thread, which may wait for a disk."""


class BadImage(Exception):
    """An image that is not fit to be shown; the text says which file and why."""


class UserError(Exception):
    """What a user is told in one sentence before the command ends with `status`."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def bad_request(message) -> ApiError:
    return ApiError(400, "BadRequestError", message)


def not_found(message) -> ApiError:
    return ApiError(404, "ResourceNotFound", message)


def invalid(field, message, code="Invalid") -> ApiError:
    """The answer to a query parameter that is not understood (IMGAPI, InvalidParameter)."""
    return ApiError(422, "InvalidParameter", message, [{"field": field, "code": code}])


# -- log ---------------------------------------------------------------------------------

ADDRESS_LIMIT = 45            # characters of an IPv6 address that maps IPv4, the longest
LOG_DELAY = 0.2               # seconds a line may wait for others, so that a burst is one write
LOG_LIMIT = 1 << 20           # bytes of log held while nobody reads it; then lines are dropped
TRACEBACK_LIMIT = 4000        # characters of a traceback in one log line, the last ones
LOG_TARGET_LIMIT = 1000       # characters of a client's text in one log line

LEVELS = {"trace": 10, "debug": 20, "info": 30, "warn": 40, "error": 50, "fatal": 60}
INFO, WARN = LEVELS["info"], LEVELS["warn"]


"".encode("unicode_escape")      # loads that codec now: later there may be no file left to open
_is_plain = re.compile(r'[ !#-\[\]-~]*').fullmatch


def printable(text, limit=LOG_TARGET_LIMIT) -> str:
    """A client's text as it may stand in a log line: printable ASCII, quotes escaped, cut."""
    if len(text) > limit:
        text = text[:limit] + "..."
    if _is_plain(text):
        return text
    return text.encode("unicode_escape").decode("ascii").replace('"', '\\"')


def stamp(seconds) -> str:
    """A time in seconds since 1970 as the log and manifests have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


class Log:
    """One line per event on stderr; SMF keeps them in the service's log file.

    Lines are gathered and written together, at once from warn upwards.  A reader of
    stderr that has stopped reading costs lines, never a request: what is written to a
    pipe is only what fits it.
    """

    def __init__(self, level="info", fd=2):
        self.level = LEVELS[level]
        self.fd = fd
        self._lines = []
        self._held = b""
        self._lost = 0
        self._flushing = threading.Lock()
        self._second, self._stamp = 0, ""
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        mode = os.fstat(fd).st_mode
        # A pipe that polls as writable takes PIPE_BUF bytes without blocking (POSIX), not more.
        self._piece = select.PIPE_BUF if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else LOG_LIMIT

    def line(self, level, text):
        """Write `text`, which must be printable, when `level` is to be logged."""
        if LEVELS[level] >= self.level:
            self.tick(int(time.time()))
            self.add(f"{level} {text}")
            if LEVELS[level] >= WARN:
                self.flush(wait=True)

    def add(self, text):
        """Have a line wait for the next flush, with the time of the last tick before it."""
        self._lines.append(self._stamp + text)

    def tick(self, now):
        """It is `now`, in whole seconds since 1970."""
        if now != self._second:
            self._second = now
            self._stamp = stamp(now) + " "

    def info(self, text):
        self.line("info", text)

    def warn(self, text):
        self.line("warn", text)

    def error(self, text):
        self.line("error", text)

    def exception(self, what):
        """A fault of our own: the traceback, on one line."""
        self.line("error", what + ": " + printable(traceback.format_exc()[-TRACEBACK_LIMIT:],
                                                          TRACEBACK_LIMIT))

    @property
    def pending(self) -> bool:
        return bool(self._lines or self._held)

    def flush(self, wait=False):
        """Write what is held, as far as it goes without waiting.  Raises nothing.

        While another thread writes it is left to a later flush, or waited for.
        """
        if not (wait or self.pending) or not self._flushing.acquire(blocking=wait):
            return
        try:
            lines = self._lines[:]
            del self._lines[:len(lines)]  # not all: a thread may add one just now
            data = self._held + "\n".join(lines + [""]).encode("ascii", "backslashreplace")
            if self._lost:
                data = f"\n({self._lost} bytes of log lost: nobody read them)\n".encode() + data
            try:
                while data and self._poll.poll(0):
                    data = data[os.write(self.fd, data[:self._piece]):]
                    self._lost = 0
            except OSError:               # a closed pipe, a full disk: there is nowhere to say it
                data = b""
            if len(data) > LOG_LIMIT:
                self._lost += len(data)
                data = b""
            self._held = data
        finally:
            self._flushing.release()


# -- JSON --------------------------------------------------------------------------------

NUMBER_LIMIT = 20             # digits of an integer in JSON: 2**64 has 20

def _unique(pairs):
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _integer(text):
    if len(text) > NUMBER_LIMIT:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _real(text):
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _constant(name):
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer, parse_float=_real,
                            parse_constant=_constant)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_quote = json.encoder.encode_basestring_ascii


def parse_json(data: bytes):
    """The value of strict JSON in UTF-8.  Raises ValueError.

    Stricter than json.loads, so that whatever is taken can be answered to any client:
    no NaN, no infinity, no key twice, no half surrogate pair, no endless nesting.
    """
    try:
        text = data.decode("utf-8")
        value = _DECODER.decode(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8")
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair")
    except RecursionError:
        raise ValueError("nested too deep")
    return value


def parse_object(data: bytes) -> dict:
    """The JSON object in `data`.  Raises ValueError, worded to follow the name of a file."""
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}")
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return value


def render_json(value, pad="\n") -> str:
    """JSON as every answer has it: ASCII, indented by two spaces.

    json.dumps(indent=2) gives the same text in Python code of its own and takes ten times
    as long (CPython uses its C encoder only without indent): a second for 10,000 images.
    """
    kind = type(value)
    if kind is str:
        return _quote(value)
    if kind is dict and value:
        inner = pad + "  "
        return "{" + ",".join([
            f"{inner}{_quote(key)}: "
            f"{_quote(item) if type(item) is str else render_json(item, inner)}"
            for key, item in value.items()]) + pad + "}"
    if kind is list and value:
        inner = pad + "  "
        return "[" + ",".join([inner + render_json(item, inner) for item in value]) + pad + "]"
    if kind is int:
        return repr(value)
    if kind is bool:
        return "true" if value else "false"
    return json.dumps(value)


# -- configuration -----------------------------------------------------------------------

def _text(value):
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("must be a text")
    return value


def _uuid_or_empty(value):
    if value != "" and not (isinstance(value, str) and is_uuid(value)):
        raise ValueError("must be a UUID in lower case, or empty")
    return value


def _loglevel(value):
    if not isinstance(value, str) or value not in LEVELS:
        raise ValueError("must be one of " + ", ".join(LEVELS))
    return value


def _number(low, high, kinds=(int,)):
    def check(value):
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise ValueError(f"must be a number from {low} to {high}")
        return value
    return check


def _socket_mode(value):
    if not isinstance(value, str) or not re.fullmatch("0?[0-7]{3}", value):
        raise ValueError('must be a file mode in octal, such as "0660"')
    return value


def _channels(value):
    """The official form: [{name, description, default?}], at most one default."""
    names = []
    for item in value if isinstance(value, list) else [None]:
        if not (isinstance(item, dict) and set(item) <= {"name", "description", "default"}
                and isinstance(item.get("name"), str)
                and re.fullmatch("[a-z][a-z0-9_-]*", item["name"])
                and isinstance(item.get("description", ""), str)
                and isinstance(item.get("default", False), bool)):
            raise ValueError('must be a list of {"name", "description", "default"}')
        names.append(item["name"])
    if len(set(names)) < len(names) or sum(c.get("default", False) for c in value) > 1:
        raise ValueError("must have each name once, and one default at most")
    return value


def parse_listen(value, any_port=False):
    """Where to listen: (host, port), host "" for every address; or the path of a socket.

    Takes 8080, "8080", "ADDRESS:PORT", "[IPV6]:PORT" and "/path".  Raises ValueError.
    """
    if isinstance(value, str) and value.startswith("/"):
        if "\0" in value:
            raise ValueError("is no path")
        if len(os.fsencode(value)) > 107:         # sun_path[108], illumos and Linux
            raise ValueError("is too long for a Unix socket: 107 bytes are the most")
        return value
    match = re.fullmatch(r"(?:(\[[0-9A-Fa-f:.]+\]|[^\[\]:/\s]+):)?([0-9]{1,5})", str(value))
    if isinstance(value, bool) or not match:
        raise ValueError("must be a port, ADDRESS:PORT, or the path of a socket, which starts "
                         "with /")
    host, port = (match[1] or "").strip("[]"), int(match[2])
    if not (0 if any_port else 1) <= port <= 65535:
        raise ValueError("must name a port from 1 to 65535")
    return host, port


def _listen(value):
    parse_listen(value)
    return value


# Every key of config.json: its default, and what checks it.  README.md says what each does.
SETTINGS = {
    "listen_port": (80, _listen),
    "prefix": ("http://", _text),
    "suffix": ("", _text),
    "loglevel": ("info", _loglevel),
    "serve_dir": (".", _text),
    "image-creator": ("internal", _text),
    "image-creator-uuid": ("", _uuid_or_empty),
    "image-vendor-uuid": ("", _uuid_or_empty),
    "socket_mode": ("0666", _socket_mode),
    "max_connections": (10000, _number(1, 1000000)),
    "header_timeout": (30, _number(0.1, 86400, (int, float))),
    "idle_timeout": (300, _number(0.1, 86400, (int, float))),
    "stall_timeout": (300, _number(0.1, 86400, (int, float))),
    "drain_time": (30, _number(0, 3600, (int, float))),
    "channels": ([], _channels),
}


class Config:
    """The settings, as attributes: `image-creator` is `image_creator`.

    warnings holds what an operator should hear once the log is there.
    """

    def __init__(self, values=None, directory="."):
        """Check `values`, a dict as in config.json; relative paths start at `directory`.

        Raises UserError with the key and the reason.
        """
        self.warnings = []
        for key, (default, check) in SETTINGS.items():
            value = (values or {}).get(key, default)
            try:
                setattr(self, key.replace("-", "_"), check(value))
            except ValueError as error:
                raise UserError(f"config: {key} {error}, not {json.dumps(value)}", EXIT_CONFIG)
        for key in values or {}:
            if key not in SETTINGS and key != "comments":
                self.warnings.append(f"config: {key!a} is no key of the configuration")
        self.default_channel = next((channel["name"] for channel in self.channels
                                     if channel.get("default")), None)
        self.listen = parse_listen(self.listen_port)
        self.serve_dir = os.path.abspath(os.path.join(directory, self.serve_dir))

    @classmethod
    def load(cls, path, must_exist=True):
        """Read a config.json.  Raises UserError where it is not there or not right."""
        try:
            with open(path, "rb") as file:
                values = parse_object(file.read())
        except FileNotFoundError:
            if must_exist:
                raise UserError(f"there is no {path}", EXIT_CONFIG)
            values = {}
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}", EXIT_CONFIG)
        except ValueError as error:
            raise UserError(f"{path} {error}", EXIT_CONFIG)
        return cls(values, os.path.dirname(os.path.abspath(path)))

    def check_serve_dir(self):
        """Raise UserError where serve_dir cannot be listed."""
        try:
            os.scandir(self.serve_dir).close()
        except OSError as error:
            raise UserError(f"cannot list serve_dir {self.serve_dir}: {error.strerror}",
                            EXIT_CONFIG)


# -- manifests ---------------------------------------------------------------------------
#
# Two formats of one thing.  A manifest without `v` is v1, DSAPI's; imgadm and IMGAPI have
# v2.  Everything here is a function of dicts and touches no file.

COMPRESSIONS = {"gzip": ".gz", "bzip2": ".bz2", "xz": ".xz", "none": ""}
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
STATES = ("active", "unactivated", "disabled", "creating", "failed")
TYPES = ("zone-dataset", "zvol", "lx-dataset", "lxd", "docker", "other")
SYSTEMS = ("smartos", "linux", "windows", "bsd", "illumos", "other")

# What upgrading drops (imgmanifest upgradeTo2), besides what it turns into v2's own fields.
V1_ONLY = frozenset(("creator_uuid", "vendor_uuid", "creator_name", "cloud_name",
                     "creator_admin", "restricted_to_uuid", "owner_uuid", "platform_type",
                     "created_at", "updated_at", "_url"))

V1_TEXTS = ("creator_uuid", "creator_name", "cloud_name")   # what other fields are made of

# The fields that IMGAPI shows, in its order (sdc-imgapi, Image.serialize, public mode).
PUBLIC_FIELDS = ("v", "uuid", "owner", "name", "version", "state", "disabled", "public",
         "published_at", "type", "os", "files", "acl", "description", "homepage", "eula",
         "icon", "urn", "requirements", "users", "generate_passwords",
         "inherited_directories", "origin", "nic_driver", "disk_driver", "cpu_type",
         "image_size", "tags", "error", "channels")
PUBLIC_FILE_FIELDS = ("sha1", "size", "compression", "dataset_guid")

_DATE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z", re.ASCII)
_PLATFORM = re.compile(r"20(1[2-9]|[2-9]\d)\d{4}T\d{6}Z", re.ASCII)
_SHA1 = re.compile("[0-9a-f]{40}")
_NAME = re.compile(r"[A-Za-z0-9._/ -]{1,1024}")
_VERSION = re.compile(r"[A-Za-z0-9._/+-]{1,512}")


def compression_of(head: bytes, name: str) -> str:
    """How a file is compressed, by its first bytes; by its name where it has none."""
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return kind
    if head:
        return "none"
    return {suffix: kind for kind, suffix in COMPRESSIONS.items()}.get(
        os.path.splitext(name)[1], "none")


def is_v1(manifest) -> bool:
    """Whether a manifest is of the old form (DSAPI); most of those have no v at all."""
    return manifest.get("v", 1) == 1 and not isinstance(manifest.get("v"), bool)


def upgrade(v1: dict) -> dict:
    """The v2 form of a v1 manifest, by the rules of imgmanifest's upgradeTo2.

    Where those would fail on what the original server wrote (no creator_uuid), nobody is
    the owner.
    """
    v2 = {key: value for key, value in v1.items() if key not in V1_ONLY}
    owner = v1.get("creator_uuid")
    v2.update(v=2, owner=owner if isinstance(owner, str) and is_uuid(owner) else NOBODY)
    restricted = v1.get("restricted_to_uuid")
    v2["public"] = not restricted
    if restricted:
        v2["acl"] = [restricted]
    v2["disabled"] = bool(v1.get("disabled"))
    v2["state"] = "disabled" if v2["disabled"] else "active"
    published = v1.get("published_at") or v1.get("created_at")
    if isinstance(published, str) and re.fullmatch(r"[0-9-]{10}T[0-9]{2}:[0-9]{2}Z", published):
        published = published[:-1] + ":00Z"
    if published is not None:
        v2["published_at"] = published
    size = v1.get("image_size")
    if isinstance(size, str) and re.fullmatch("[0-9]{1,15}", size):
        v2["image_size"] = int(size)
    passwords = v1.get("generate_passwords")
    if passwords in ("true", "false"):            # datasets of 2011 have it as a text
        v2["generate_passwords"] = passwords == "true"
    return v2


def downgrade(v2: dict) -> dict:
    """The v1 form of a v2 manifest: the official reverse (img2dsdiff), but keeping what v1
    clients pass over and an upgrade brings back, so that v1 - v2 - v1 - v2 loses nothing (but
    that an image is private, where v1 cannot say for whom).
    """
    v1 = {key: value for key, value in v2.items()
          if key not in ("v", "owner", "state", "public", "disabled", "published_at", "icon")}
    v1["creator_uuid"] = v1["vendor_uuid"] = v2["owner"]
    v1["platform_type"] = "smartos"
    if v2["disabled"]:
        v1["disabled"] = True
    acl = v1.pop("acl", [])
    if not v2["public"] and len(acl) == 1:
        v1["restricted_to_uuid"] = acl[0]
    elif acl:
        v1["acl"] = acl
    published = v2["published_at"]
    if published.endswith(":00Z"):
        published = published[:-4] + "Z"
    v1["published_at"] = v1["created_at"] = v1["updated_at"] = published
    if "image_size" in v1:
        v1["image_size"] = str(v1["image_size"])
    return v1


def _is_text(limit):
    return lambda value: type(value) is str and len(value) <= limit


def _is_one_of(names):
    return lambda value: type(value) is str and value in names


def _is_flag(value):
    return isinstance(value, bool)


def _is_int(value):
    return type(value) is int


def _is_url(value):
    return (isinstance(value, str) and len(value) <= 1024
            and re.match(r"https?://[^\s/]", value) is not None)


def _matches(pattern):
    fullmatch = pattern.fullmatch
    return lambda value: type(value) is str and fullmatch(value)


def _is_list_of(check):
    return lambda value: type(value) is list and all(map(check, value))


def _is_record(*keys):
    keys = set(keys)
    return lambda value: (type(value) is dict and value.keys() == keys
                          and all(type(item) is str for item in value.values()))


def _is_trait(value):
    return isinstance(value, (str, bool, list))


_is_sha1 = _matches(_SHA1)
_is_compression = _is_one_of(COMPRESSIONS)


def _is_files(value):
    """One file, with sha1, size and compression, each as imgadm needs it."""
    if type(value) is not list or len(value) != 1 or type(value[0]) is not dict:
        return False
    file = value[0]
    return (_is_int(file.get("size")) and file["size"] >= 0 and _is_sha1(file.get("sha1"))
            and _is_compression(file.get("compression"))
            and type(file.get("dataset_guid", "")) is str)


_is_platform = _matches(_PLATFORM)


def _is_platforms(value):
    return type(value) is dict and len(value) > 0 and all(map(_is_platform, value.values()))


REQUIREMENTS = {
    "networks": _is_list_of(_is_record("name", "description")), "brand": _is_text(1024),
    "ssh_key": _is_flag, "min_ram": _is_int, "max_ram": _is_int,
    "min_platform": _is_platforms, "max_platform": _is_platforms,
    "bootrom": _is_one_of(("bios", "uefi")),
}


def _is_requirements(value):
    return (isinstance(value, dict)
            and all(key in REQUIREMENTS and REQUIREMENTS[key](item)
                    for key, item in value.items())
            and value.get("min_ram", 0) <= value.get("max_ram", math.inf)
            and ("bootrom" not in value or value.get("brand") == "bhyve"))


ZVOL_FIELDS = ("nic_driver", "disk_driver", "cpu_type", "image_size")
REQUIRED = ("v", "uuid", "owner", "name", "version", "type", "os", "files")

# Every field of a v2 manifest and what it must look like (imgmanifest 3.1.0, sdc-imgapi).
FIELDS = {
    "v": lambda value: value == 2 and _is_int(value),
    "uuid": _matches(_UUID), "owner": _matches(_UUID), "origin": _matches(_UUID),
    "name": _matches(_NAME), "version": _matches(_VERSION),
    "description": _is_text(10240), "homepage": _is_url, "eula": _is_url,
    "type": _is_one_of(TYPES), "os": _is_one_of(SYSTEMS), "state": _is_one_of(STATES),
    "disabled": _is_flag, "public": _is_flag, "published_at": _matches(_DATE),
    "files": _is_files, "acl": _is_list_of(_matches(_UUID)), "icon": _is_flag,
    "urn": _is_text(2048), "requirements": _is_requirements,
    "users": _is_list_of(_is_record("name")), "billing_tags": _is_list_of(_is_text(128)),
    "traits": lambda value: isinstance(value, dict) and all(map(_is_trait, value.values())),
    "tags": lambda value: isinstance(value, dict) and len(json.dumps(value)) <= 100 << 10,
    "generate_passwords": _is_flag, "inherited_directories": _is_list_of(_is_text(1024)),
    "nic_driver": _is_text(1024), "disk_driver": _is_text(1024), "cpu_type": _is_text(1024),
    "image_size": _is_int, "error": lambda value: isinstance(value, dict),
    "channels": _is_list_of(_is_text(1024)),
}


def problems(v2: dict) -> list:
    """The names of all fields of a v2 manifest that break a rule; none: it is sound."""
    bad = [key for key in REQUIRED if key not in v2]
    bad += [key for key, value in v2.items() if key in FIELDS and not FIELDS[key](value)]
    is_zvol = v2.get("type") == "zvol"
    bad += [key for key in ZVOL_FIELDS if (key in v2) != is_zvol]
    if "inherited_directories" in v2 and v2.get("type") != "zone-dataset":
        bad.append("inherited_directories")
    if "error" in v2 and v2.get("state") != "failed":
        bad.append("error")
    return list(dict.fromkeys(bad))


def faults(manifest: dict, v2: dict) -> list:
    """The fields for which a stored manifest, of which v2 is the v2 form, is not shown."""
    return problems(v2) + [key for key in V1_TEXTS if not isinstance(manifest.get(key) or "", str)]


def public_fields(v2: dict) -> dict:
    """What IMGAPI shows of a manifest: its fields in its order, unset ones left out."""
    result = {key: v2[key] for key in PUBLIC_FIELDS if v2.get(key) is not None}
    result["files"] = [{key: item[key] for key in PUBLIC_FILE_FIELDS if key in item}
                       for item in v2["files"]]
    for key in ("acl", "icon"):
        if not result.get(key):
            result.pop(key, None)
    return result


def order_of(published_at) -> str:
    """A time as texts sort: with or without milliseconds, one form."""
    text = published_at.rstrip("Z")
    return text if "." in text else text + ".000"


def mended_file(stored: dict) -> dict:
    """files[0] as every client can take it, of what old manifests have: a size that is a
    text, a sha1 in upper case, an empty compression.
    """
    file = {key: value for key, value in stored.items() if value not in (None, "")}
    if isinstance(file.get("size"), str) and re.fullmatch("[0-9]{1,19}", file["size"]):
        file["size"] = int(file["size"])
    if isinstance(file.get("sha1"), str):
        file["sha1"] = file["sha1"].lower()
    return file


def is_file_name(name) -> bool:
    """Whether files[].path is a name for a file in the image's own directory, and no more."""
    try:
        return (isinstance(name, str) and name.isprintable() and "/" not in name
                and name not in ("", ".", "..", MANIFEST) and len(os.fsencode(name)) <= 255)
    except UnicodeEncodeError:            # the locale cannot spell it
        return False


def complete(manifest: dict, published_at: str) -> dict:
    """The v2 form of a stored manifest, with what its author left to the server filled in.

    imgadm create writes no owner, state, public, disabled or published_at; IMGAPI fills
    these when it takes an image, and so does this.  A directory is active, whatever state
    its manifest gives, unless that is disabled or no image at all (creating, failed).
    """
    v2 = upgrade(manifest) if is_v1(manifest) else manifest
    v2 = {key: value for key, value in v2.items() if value is not None}
    v2["owner"] = v2.get("owner") or NOBODY
    v2["disabled"] = bool(v2.get("disabled")) or v2.get("state") == "disabled"
    if v2.get("state") not in ("creating", "failed"):
        v2["state"] = "disabled" if v2["disabled"] else "active"
    v2.setdefault("public", True)
    v2.setdefault("published_at", published_at)
    return v2


def as_v1(manifest: dict, v2: dict, file: dict, creator: str) -> dict:
    """What DSAPI shows of a manifest: v1, as stored if it is v1, without files[0].url.

    Mended are what some imgadm refuses: no creator, a file without path or compression,
    and the fields that imgadm 1 wants after the download (imgadm of 2012: urn,
    description, creator_name, published_at).
    """
    urn = (v2.get("urn") or "").split(":")
    if is_v1(manifest):
        # imgmanifest asserts that a v1 manifest has no owner, and no public when restricted.
        v1 = {key: value for key, value in manifest.items()
              if key not in ("v", "owner", "state", "public", "channels", "icon")}
        v1["creator_uuid"] = v1.get("creator_uuid") or NOBODY
    else:
        v1 = downgrade(v2)
        v1.pop("channels", None)
        v1["cloud_name"] = urn[0] or creator
    v1["creator_name"] = v1.get("creator_name") or (urn[1] if len(urn) > 1 else creator)
    v1["urn"] = v1.get("urn") or ":".join(
        (v1.get("cloud_name") or creator, v1["creator_name"], v2["name"], v2["version"]))
    v1["description"] = v1.get("description") or f"{v2['name']} {v2['version']}"
    v1["published_at"] = v1.get("published_at") or v2["published_at"]
    v1["files"] = [file]
    return v1


# -- store -------------------------------------------------------------------------------
#
# The directory, read and remembered.  Nothing here changes it.  What is in memory is
# answered at once; what needs the disk raises NeedsThread unless the caller may wait, and is
# then done by one thread at a time.

MANIFEST_LIMIT = 1 << 20      # bytes; tags may take 100 KiB, a description 10: nothing needs more
RECHECK = 1.0                 # seconds until an edit in place must be seen in a list
RECHECK_SOON = 0.6            # seconds until requests for lists begin to look, a part each
RECHECK_EARLY = 0.8           # seconds by which they are through, or a thread begins to look
LOOK_AHEAD = 0.005            # seconds such a part of a look may take: more, and the disk is slow
RACY = 50_000_000             # ns; a time this young may not move with the next change: file
                              # systems tell it in ticks, of up to 10 ms (Linux before 6.13)
LISTS_LIMIT = 128 << 20       # bytes of lists in use at once; of 10,000 images one has 13 MB
LISTS_KEPT = 4                # rendered lists kept: each is as large as all manifests together
MD5_LIMIT = 16 << 20          # bytes; a file up to this size is hashed when it is asked for

def open_regular(path):
    """Open a regular file for reading: (fd, its stat).  A fifo or device is refused at once.

    Raises OSError.  Symlinks are followed: only an operator can have placed them.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
    except OSError:
        os.close(fd)
        raise
    return fd, status


def stat_key(status):
    """What tells one state of a file from another.

    The ctime moves with every change that moves the mtime, and with those that hide it
    (touch, rsync -t) or open the file to us (chmod).
    """
    return status.st_ctime_ns, status.st_size, status.st_ino


UNSETTLED = ()                # no file's key: an image that has it is read again when asked for


def stat_key_at(path):
    """stat_key the file at path; None where it cannot be looked at."""
    try:
        return stat_key(os.stat(path))
    except (OSError, ValueError):
        return None


def raise_shortage(error):
    """Raise an OSError again that says something of the system and nothing of the file."""
    if error.errno in SHORTAGE:
        raise error


def changed_at(path):
    """The ctime of a directory in ns: of its last new, removed or renamed name."""
    key = stat_key_at(path)
    return key and key[0]


class Image:
    """One image directory as it was last read: what is shown of it, or why nothing is.

    place       what stands before its uuid in the path of its directory
    problem     None, or one sentence for the log; then nothing of its manifest is set
    try_again   the problem may be one of the moment, such as an error of the disk
    device      the file system that it is on; None where its files are on several
    dsapi       (before, after, etag) of its v1 manifest as bytes: files[0].url stands between
                the two, up to the part that the Host header decides; None when never asked for
    imgapi      (before, channels, etag) of its v2 manifest as bytes, without the last "}"
    file, path  the name of its file on disk, and the one that DSAPI shows
    """

    __slots__ = ("uuid", "place", "manifest_key", "file_key", "directory_changed", "checked",
                 "problem", "try_again", "device", "file", "path", "size", "sha1", "md5", "state",
                 "order", "name", "version", "os", "type", "origin", "owner", "public", "acl",
                 "billing_tags", "channels", "icon", "dsapi", "imgapi")

    def __init__(self, uuid, place):
        self.uuid, self.place = uuid, place
        self.manifest_key = self.file_key = self.directory_changed = None
        self.checked, self.try_again = 0.0, False
        self.problem = self.file = self.origin = self.icon = self.device = None
        self.dsapi = self.imgapi = None

    @property
    def directory(self) -> str:
        return self.place + self.uuid

    def is_fresh(self, api, for_list=False) -> bool:
        """Whether it is rendered for api, and on disk still what was read.

        Its manifest and file are looked at each time; its directory, where an icon or a
        file that no manifest names may have come, twice a second and for lists.
        """
        if self.problem is None and getattr(self, api) is None:
            return False
        try:                              # stat_key, written out: each request is here
            status = os.stat(f"{self.place}{self.uuid}/{MANIFEST}")
            if (status.st_ctime_ns, status.st_size, status.st_ino) != self.manifest_key:
                return False
            if self.file is not None:
                status = os.stat(f"{self.place}{self.uuid}/{self.file}")
                if (status.st_ctime_ns, status.st_size, status.st_ino) != self.file_key:
                    return False
        except OSError:                   # as before only where it was left out for just that
            if (self.manifest_key, self.file_key) != (
                    stat_key_at(f"{self.directory}/{MANIFEST}"),
                    self.file and stat_key_at(f"{self.directory}/{self.file}")):
                return False
        now = time.monotonic()
        if for_list or now - self.checked >= RECHECK / 2:
            if self.try_again or changed_at(self.directory) != self.directory_changed:
                return False
            self.checked = now
        return True

    def fields(self) -> dict:
        """Its v2 manifest, as IMGAPI shows it without channels."""
        return json.loads(self.imgapi[0] + b"\n}")


def sole_file(names):
    """The image file of a manifest that names none, as imgadm create writes it."""
    names = [name for name in names
             if name != MANIFEST and name not in ICONS and not name.startswith(".")]
    if len(names) != 1:
        raise BadImage(f"{MANIFEST} names no file, and the directory has {len(names)}")
    return names[0]


def read_manifest(directory):
    """The manifest of an image directory, with its stat.  Raises BadImage and OSError."""
    fd, status = open_regular(f"{directory}/{MANIFEST}")
    try:
        if status.st_size > MANIFEST_LIMIT:
            raise BadImage(f"{MANIFEST} is larger than {MANIFEST_LIMIT} bytes")
        return parse_object(os.read(fd, status.st_size)), status
    except ValueError as error:
        raise BadImage(f"{MANIFEST} {error}")
    finally:
        os.close(fd)


class ImageReader:
    """Reads image directories into Images, for one configuration."""

    def __init__(self, config):
        self.creator = config.image_creator
        self.with_channels = bool(config.channels)
        self.base_salt = json.dumps([config.prefix, config.suffix]).encode()
        # Stands for prefix + Host + suffix in a rendered manifest until a request gives them.
        self.host_placeholder = "http-" + os.urandom(16).hex()

    def read(self, uuid, place, apis) -> Image | None:
        """The image in `place` + uuid, rendered for `apis`; None where there is no manifest.

        Raises OSError only where the system is short of something: that says nothing
        about the image.
        """
        image = Image(uuid, place)
        directory = place + uuid
        image.checked, began = time.monotonic(), time.time_ns()
        try:
            status = os.stat(directory)
            image.directory_changed, image.device = status.st_ctime_ns, status.st_dev
            manifest, status = read_manifest(directory)
            image.manifest_key = stat_key(status)
            if status.st_dev != image.device:
                image.device = None
            self._fill(image, manifest, os.listdir(directory), status.st_mtime, apis)
        except BadImage as error:
            image.problem = str(error)
        except OSError as error:
            raise_shortage(error)
            if image.file is None and error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            image.problem = f"{image.file or MANIFEST}: {error.strerror}"
            image.try_again = True
        except RecursionError:
            image.problem = f"{MANIFEST}: nested too deep"
        except Exception as error:        # whatever it is, the other images can be shown
            image.problem = f"{MANIFEST}: {type(error).__name__}: {error}"
        if image.manifest_key is None:
            image.manifest_key = stat_key_at(f"{directory}/{MANIFEST}")
        ended = time.time_ns()            # a slow disk may take longer than RACY
        for key in (image.manifest_key, image.file_key, (image.directory_changed,)):
            if key and key[0] and began - RACY <= key[0] <= ended + RACY:
                image.manifest_key = UNSETTLED
                break
        return image

    def _fill(self, image, manifest, names, mtime, apis):
        """Understand the manifest and look at the file.  Raises BadImage."""
        if manifest.get("uuid") != image.uuid:
            raise BadImage(f"{MANIFEST}: its uuid is not {image.uuid}")
        files = manifest.get("files")
        if not isinstance(files, list) or len(files) != 1 or not isinstance(files[0], dict):
            raise BadImage(f"{MANIFEST}: files must hold one file")
        stored = files[0]
        name = stored["path"] if "path" in stored else sole_file(names)
        if not is_file_name(name):
            raise BadImage(f"{MANIFEST}: files[0].path is no plain file name")
        image.file = name
        file = self._look_at_file(image, stored)
        v2 = complete({**manifest, "files": [file]}, stamp(mtime))
        icons = [icon for icon in names if icon in ICONS and icon != name]
        if icons:
            image.icon, v2["icon"] = icons[0], True
        else:
            v2.pop("icon", None)
        bad = faults(manifest, v2)
        if bad:
            raise BadImage(f"{MANIFEST}: invalid " + ", ".join(bad))
        self._keep(image, v2, file)
        if "path" not in stored and not name.endswith(COMPRESSIONS[file["compression"]]):
            image.path += COMPRESSIONS[file["compression"]]   # all that imgadm 1 goes by
        if image.place.endswith(INCOMING):
            v2["state"] = image.state = "unactivated"
            if not manifest.get("published_at"):
                del v2["published_at"]    # that is when it is activated
        if IMGAPI in apis:
            image.imgapi = self._render_v2(v2)
        if DSAPI in apis:
            file = {**file, "path": image.path, "url": self.host_placeholder}
            image.dsapi = self._render_v1(as_v1(manifest, v2, file, self.creator), image)

    @staticmethod
    def _look_at_file(image, stored) -> dict:
        """files[0] as every client can take it, held against the file on disk."""
        path = f"{image.directory}/{image.file}"
        status = os.stat(path)
        image.file_key = stat_key(status)
        if status.st_dev != image.device:
            image.device = None
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(f"{image.file}: not a regular file")
        if status.st_mode & 0o444 != 0o444 and not os.access(path, os.R_OK):
            raise BadImage(f"{image.file}: {os.strerror(errno.EACCES)}")
        file = mended_file(stored)
        file.pop("path", None)
        file.pop("url", None)
        if file.get("size") != status.st_size:
            raise BadImage(f"{image.file}: its size is not the {file.get('size')} bytes of "
                          f"{MANIFEST} (still being copied?)")
        if "compression" not in file:
            fd, _ = open_regular(path)
            with open(fd, "rb", buffering=0) as data:
                file["compression"] = compression_of(data.read(8), image.file)
        return file

    def _keep(self, image, v2, file):
        """What filters, order and downloads need of a manifest without reading it again."""
        image.size, image.sha1 = file["size"], file["sha1"]
        md5 = file.get("md5")
        image.md5 = bytes.fromhex(md5) if isinstance(md5, str) and re.fullmatch(
            "[0-9a-f]{32}", md5) else None
        image.path = image.file
        image.name, image.version, image.state = v2["name"], v2["version"], v2["state"]
        image.order = (order_of(v2["published_at"]), image.uuid)
        image.type, image.os = sys.intern(v2["type"]), sys.intern(v2["os"])
        image.owner = sys.intern(v2["owner"])
        image.origin, image.public = v2.get("origin"), v2["public"]
        image.acl = tuple(v2.get("acl", ()))
        image.billing_tags = tuple(v2.get("billing_tags", ()))
        image.channels = tuple(v2.get("channels", ()))

    def _render_v1(self, v1, image):
        before, after = render_json(v1).split(self.host_placeholder)
        path = f"/datasets/{image.uuid}/{urllib.parse.quote(image.path, safe='')}"
        before, after = before.encode(), (path + after).encode()
        return before, after, etag_of(before, after, self.base_salt)

    def _render_v2(self, v2):
        fields = public_fields(v2)
        fields.pop("channels", None)
        channels = ""
        if self.with_channels:
            channels = ',\n  "channels": ' + render_json(v2.get("channels", []), "\n  ")
        before = render_json(fields)[:-2].encode()
        return before, channels.encode(), etag_of(before, channels.encode())


def etag_of(*parts) -> bytes:
    """The sha1 of what is shown, in hexadecimal: the same on every replica."""
    return hashlib.sha1(b"\0".join(parts)).hexdigest().encode()


class Listing:
    """One form of a list, ready to be sent: its bytes, its ETag and its header lines."""

    __slots__ = ("body", "etag", "fields", "zipped")

    def __init__(self, body, etag, coding=b""):
        self.body, self.etag = body, etag
        self.fields = b'%bETag: "%b"\r\nVary: Accept-Encoding\r\n%b%b' % (
            JSON_TYPE, etag.encode(), coding, CORS)
        self.zipped = None                # the Listing of its gzip form, once asked for

    def zip(self):
        """Make its gzip form; which is slow, for a thread."""
        import gzip
        self.zipped = Listing(gzip.compress(self.body, 6, mtime=0), self.etag + "-gzip",
                              b"Content-Encoding: gzip\r\n")


class RenderedList(bytearray):
    """The bytes of a list, which the Store can tell to be in use: by a cache, or being sent."""


def join_list(texts) -> RenderedList:
    """A JSON array of rendered objects.

    Grown in place: ten thousand manifests are 13 MB, of which no second copy is wanted.
    """
    body = RenderedList()
    for text in texts:
        body += b",\n  " if body else b"[\n  "
        body += text.replace(b"\n", b"\n  ")       # no string in JSON holds a raw line end
    body += b"\n]" if body else b"[]"
    return body


def list_etag(images, api, *view) -> str:
    """The ETag of a list of these images in a form that `view` describes."""
    return etag_of(repr(view).encode(), *(getattr(image, api)[2] for image in images)).decode()


class Snapshot:
    """The images on show at one moment, in order, and the lists rendered of them."""

    def __init__(self, images):
        self.images = sorted(images, key=lambda image: image.order)
        self.listings = {}                # view: Listing, the oldest first


class Store:
    """The images of one serve_dir."""

    def __init__(self, config, log):
        self.directory = config.serve_dir
        self.place = os.path.join(config.serve_dir, "")
        self.log = log
        self._reader = ImageReader(config)
        self._images = {}             # uuid: Image, sound or not
        self._lock = threading.Lock()
        self._snapshot = None
        self._apis = frozenset()      # what all images of the snapshot are rendered for
        self._changed = True          # an image has been read since the snapshot was made
        self._seen = None             # mtime of serve_dir at the last look at its names
        self._device = None           # the file system it was on then
        self._checked = -math.inf     # when the last look at every image began (monotonic)
        self._rechecking = False      # a thread is on its way to do that look
        self._ahead = None            # [the images, how many were looked at, since when]: the
                                      # look that the loop does in parts, if it is at one
        self._bodies = weakref.WeakValueDictionary()      # id: every list that is in use
        self._bodies_lock = threading.Lock()
        self._loops = set()           # images left out because their origins form a cycle

    # single images

    def image(self, uuid, api, may_block) -> Image:
        """The image of a directory, as it is on disk now: active, disabled or failed.

        Raises ApiError (404) where there is none that is sound, NeedsThread where it must be read,
        OSError where serve_dir is gone.
        """
        image = self._find(uuid, api, may_block)
        if image is None or image.try_again:
            os.stat(f"{self.directory}/.")            # is it serve_dir that cannot be read?
        if image is None or image.problem or image.origin and self._loops_back(
                image, lambda origin: self._find(origin, api, may_block)):
            raise not_found(f"image {uuid} not found")
        return image

    def _find(self, uuid, api, may_block) -> Image | None:
        """An image, sound or not, as it is on disk now; None: not here.  Raises NeedsThread."""
        image = self._images.get(uuid)
        if image is not None and image.is_fresh(api):
            return image
        if image is None and not os.path.lexists(f"{self.directory}/{uuid}"):
            return None
        if not may_block:
            raise NeedsThread
        with self._lock:
            image = self._images.get(uuid)
            if image is None or not image.is_fresh(api):
                image = self._load(uuid, api)
        return image

    def unactivated(self, uuid) -> Image:
        """The whole image that waits in .incoming-<uuid>.  Raises ApiError (404)."""
        image = self._reader.read(uuid, f"{self.directory}/{INCOMING}", (IMGAPI,))
        if image is None or image.problem:
            raise not_found(f"image {uuid} not found")
        return image

    def _load(self, uuid, api) -> Image | None:
        """Read one image again; the lock is held.  Says in the log what became of it."""
        before = self._images.get(uuid)
        apis = self._apis | {api} | {other for other in (DSAPI, IMGAPI)
                                     if before is not None and getattr(before, other)}
        image = self._reader.read(uuid, self.place, apis)
        # Set before the image is: the loop may look between the two (see _look_ahead).
        self._changed |= (before is not None and not before.problem
                          or image is not None and not image.problem)
        if image is None:
            if self._images.pop(uuid, None) is not None:
                self.log.info(f"image {uuid} is gone")
        else:
            self._images[uuid] = image
            self._say(image, before)
        return image

    def _say(self, image, before):
        """Log what is new about an image, once."""
        if image.problem:
            if before is None or before.problem != image.problem:
                self.log.warn(f"image {image.uuid} is left out: {printable(image.problem)}")
            return
        if before is not None and before.problem:
            self.log.info(f"image {image.uuid} is on show")
        if image.origin and (before is None or before.origin != image.origin) \
                and not os.path.exists(f"{self.directory}/{image.origin}/{MANIFEST}"):
            self.log.warn(f"image {image.uuid}: its origin {image.origin} is not on this "
                          "server; imgadm needs another source for that one")

    def _loops_back(self, image, find) -> bool:
        """Whether the chain of origins never ends: imgadm would follow it for ever."""
        seen = {image.uuid}
        link = image
        while link is not None and not link.problem and link.origin:
            if link.origin in seen:
                if image.uuid not in self._loops:
                    self._loops.add(image.uuid)
                    self.log.warn(f"image {image.uuid} is left out: its origins form a cycle")
                return True
            seen.add(link.origin)
            link = find(link.origin)
        self._loops.discard(image.uuid)
        return False

    # lists

    def snapshot(self, api, may_block) -> Snapshot:
        """All active images, rendered for api.  Raises NeedsThread, and OSError from serve_dir."""
        now = time.monotonic()
        if self._fresh(api, now, RECHECK):
            if (now - self._checked < RECHECK_SOON
                    or not may_block and (self._rechecking or self._look_ahead(api, now))):
                return self._snapshot
            # This one has a thread look again; the others are still served.
            self._rechecking = True
        if not may_block:
            raise NeedsThread
        with self._lock:
            try:
                if not self._fresh(api, time.monotonic(), RECHECK_SOON):
                    self._recheck(api)
            finally:
                self._rechecking = False
            return self._snapshot

    def listing(self, api, view, render, may_block) -> Listing:
        """The list of all active images in the form `view`, made by render(snapshot, *view)."""
        snapshot = self.snapshot(api, may_block)
        view = (api, *view)
        listing = snapshot.listings.get(view)
        if listing is None:
            if not may_block:
                raise NeedsThread
            with self._lock:
                listing = snapshot.listings.get(view)
                if listing is None:
                    listing = snapshot.listings[view] = render(snapshot, *view)
                    if len(snapshot.listings) > LISTS_KEPT:
                        del snapshot.listings[next(iter(snapshot.listings))]
        return listing

    def join(self, texts) -> RenderedList:
        """join_list, if memory for it is left.  Raises ApiError (503).

        The lists of one Host are one Body, however many clients take it; filters and Host
        headers are the clients' to make up, and each could hold one by not reading it.
        """
        with self._bodies_lock:
            used = [len(body) for body in self._bodies.values()]
            if len(used) > LISTS_KEPT and sum(used) > LISTS_LIMIT:
                raise ApiError(503, "ServiceUnavailableError", "too many different lists are "
                              "being sent", fields=b"Retry-After: 10\r\n")
            body = join_list(texts)
            self._bodies[id(body)] = body
        return body

    def _fresh(self, api, now, age) -> bool:
        """Whether no name has changed, and every image was looked at less than age seconds ago."""
        return (api in self._apis and now - self._checked < age
                and os.stat(self.directory).st_mtime_ns == self._seen)

    def _look_ahead(self, api, now) -> bool:
        """In the loop: look at as many images as are due now.  False: let a thread look.

        A thread that looks at ten thousand trades the interpreter's lock with the loop at
        every stat; where lists are asked for all the time, the loop itself is done sooner.
        Other file systems than that of serve_dir are not for the loop: one may hang.
        """
        if self._changed or now - self._checked >= RECHECK_EARLY:
            self._ahead = None
            return False
        if self._ahead is None or self._ahead[2] < self._checked:
            self._ahead = [list(self._images.values()), 0, now]
        images, count, since = self._ahead
        time_given = (RECHECK_EARLY - RECHECK_SOON) / 2       # the other half is in reserve
        due = len(images) * min(1, (now - since) / time_given)
        while count < due:
            if (images[count].device != self._device or not images[count].is_fresh(api, True)
                    or time.monotonic() - now > LOOK_AHEAD):
                self._ahead = None
                return False
            count += 1
        self._ahead[1] = count
        if count == len(images):
            self._checked, self._ahead = since, None
        return True

    def _recheck(self, api):
        """Look at every name, and at every image if that is due; the lock is held."""
        now = time.monotonic()
        everything = now - self._checked >= RECHECK_SOON or api not in self._apis
        status = os.stat(self.directory)
        seen, self._device = status.st_mtime_ns, status.st_dev
        # A change within the same tick of the file system's clock leaves the mtime as it is: one
        # may come after the names are read, so what counts is how old the mtime is before.
        settled = abs(time.time_ns() - seen) > RACY
        names = {name for name in os.listdir(self.directory) if is_uuid(name)}
        for uuid in sorted(names | set(self._images)):
            image = self._images.get(uuid)
            if image is None or uuid not in names \
                    or everything and not image.is_fresh(api, True):
                self._load(uuid, api)
        if self._changed:
            self._changed = False
            self._snapshot = Snapshot(
                image for image in self._images.values()
                if not image.problem and image.state == "active"
                and not (image.origin and self._loops_back(image, self._images.get)))
        # What the loop takes for a sign that the snapshot is fresh comes after it.
        self._seen = seen if settled else None
        self._apis |= {api}
        if everything:
            self._checked = now


# -- ZFS streams -------------------------------------------------------------------------
#
# What import and check read of an image file in one pass: its size and hashes, how it is
# compressed, and whether the ZFS send stream inside is one, and a whole one.

CHUNK = 1 << 20               # bytes of an image handled at once by import and check
LANE = 4                      # chunks a lane (hash, decompress) may lag behind
LZMA_MEMORY = 256 << 20       # bytes; xz -9 needs 65 MiB to decompress, a bomb asks for more

DRR_LENGTH = 312                  # bytes of a record, without payload (zfs_ioctl.h)
DRR_BEGIN, DRR_END = 0, 5         # drr_type
DRR_MAGIC = 0x2F5bacbac
COMPOUND = 2                      # stream type in drr_versioninfo: a package (zfs send -p, -R)
STREAM_TYPES = {2: "zone-dataset", 3: "zvol"}     # drr_type of DRR_BEGIN: DMU_OST_*
PROLOGUE = 1 << 20                # bytes kept until the BEGIN record of the data set has come


class SendStream:
    """A ZFS send stream, fed piece by piece: what its BEGIN says and whether its END came.

    type is None for what is no stream; guid and from_guid are numbers, from_guid 0 for a
    full stream.
    """

    def __init__(self):
        self.type = None
        self.guid = self.from_guid = 0
        self._order = None
        self._compound = False
        self._head = bytearray()
        self._tail = b""                  # the last two records, if it ends with two

    def feed(self, data):
        """Take the next bytes of the stream, decompressed."""
        self._tail = (self._tail + data[-2 * DRR_LENGTH:])[-2 * DRR_LENGTH:]
        if self._head is not None and len(self._head) < PROLOGUE:
            self._head += data[:PROLOGUE]
            self._read_begin()

    def _read_begin(self):
        """Find the BEGIN of the data set: the first record, or the first inside a package."""
        at = 0
        if len(self._head) < DRR_LENGTH:
            return
        for order in "<>":
            if struct.unpack_from(order + "I4xQ", self._head) == (DRR_BEGIN, DRR_MAGIC):
                self._order = order
        if self._order is None:
            return
        version, = struct.unpack_from(self._order + "Q", self._head, 16)
        if version & 3 == COMPOUND:
            # BEGIN, a list of properties as its payload, END, and then the data set's own.
            self._compound = True
            payload, = struct.unpack_from(self._order + "I", self._head, 4)
            at = 2 * DRR_LENGTH + payload
            if len(self._head) < at + DRR_LENGTH:
                return
        kind, self.guid, self.from_guid = struct.unpack_from(self._order + "I4xQQ", self._head,
                                                             at + 32)
        self.type = STREAM_TYPES.get(kind)
        self._head = None                 # it has said what it is

    def trouble(self):
        """What is wrong with the stream, once all of it was fed; None where nothing is."""
        if self.type is None:
            return "it is no ZFS send stream"
        # An END says which snapshot it ends.  One more, of none, ends a package; libzfs writes
        # that even where it has failed before.
        before, last = self._ended(0), self._ended(DRR_LENGTH)
        if (not before or last != 0) if self._compound else last != self.guid:
            return "the ZFS stream is cut short: its end record is missing"
        return None

    def _ended(self, at):
        """The guid in the END record at this place of the tail; None where there is none."""
        tail = self._tail.rjust(2 * DRR_LENGTH, b"\xff")
        kind, = struct.unpack_from(self._order + "I", tail, at)
        return struct.unpack_from(self._order + "Q", tail, at + 40)[0] if kind == DRR_END else None


class Decompressor:
    """The bytes inside a gzip, bzip2 or xz file (of one member or several), in small pieces."""

    def __init__(self, kind):
        self.kind = kind
        self._make = getattr(self, "_" + kind)
        self._member = self._make()

    # Imported where they are needed: a server that only serves has no use for them.

    def _gzip(self):
        import zlib
        self._errors = zlib.error
        return zlib.decompressobj(wbits=31)

    def _bzip2(self):
        import bz2
        self._errors = (OSError, ValueError)
        return bz2.BZ2Decompressor()

    def _xz(self):
        import lzma
        self._errors = lzma.LZMAError
        return lzma.LZMADecompressor(memlimit=LZMA_MEMORY)

    def feed(self, data):
        """Yield what comes out for `data`, a CHUNK at the most at a time.  Raises BadImage."""
        try:
            while data or (self._member and not getattr(self._member, "needs_input", True)):
                if self._member is None:
                    data = data.lstrip(b"\0")        # xz may be padded, tapes pad gzip
                    if not data:
                        return
                    self._member = self._make()
                # zlib hands back what it has not read; bz2 and lzma keep it, and say so.
                piece = self._member.decompress(data, CHUNK)
                data = getattr(self._member, "unconsumed_tail", b"")
                if self._member.eof:
                    data = self._member.unused_data
                    self._member = None
                yield piece
        except self._errors as error:
            raise BadImage(f"the {self.kind} data is corrupt ({error})")

    def close(self):
        """Raise BadImage if the data ended within a member."""
        if self._member is not None:
            raise BadImage(f"the {self.kind} data is cut short")


def read_stream(path, compression) -> SendStream:
    """The Stream in an image file as far as its beginning tells.  Raises BadImage, OSError."""
    stream = SendStream()
    inside = Decompressor(compression) if compression != "none" else None
    fd, _ = open_regular(path)
    with open(fd, "rb", buffering=0) as file:
        chunk = file.read(CHUNK)
        for piece in [chunk] if inside is None else inside.feed(chunk):
            stream.feed(piece)
            if stream.type is not None:
                break
    return stream


class Lane(threading.Thread):
    """A thread that hands each chunk it is given to `work`, at most LANE chunks behind.

    zlib and hashlib give up the interpreter's lock for chunks of this size, so that lanes
    run side by side.  A chunk may hold a gigabyte of compressed zeros: whoever waits for a
    lane heeds signals.
    """

    def __init__(self, work):
        super().__init__(daemon=True)
        self._work, self._error = work, None
        self._chunks = queue.Queue(LANE)
        self._done = threading.Event()

    def run(self):
        for chunk in iter(self._chunks.get, None):
            try:
                if self._error is None:
                    self._work(chunk)
            except Exception as error:    # told to whoever feeds the lane, at the next put
                self._error = error
        self._done.set()

    def put(self, chunk):
        """Raises what work has raised since."""
        if self._error is not None:
            raise self._error
        while True:
            try:
                return self._chunks.put(chunk, timeout=HEED)
            except queue.Full:
                heed_signals()

    def stop(self):
        """Have the thread end; what it has not done yet stays undone."""
        self._error = self._error or BadImage("stopped")
        self._chunks.put(None)

    def close(self):
        """Wait until all is done.  Raises what work has raised."""
        self.put(None)
        while not self._done.wait(HEED):
            heed_signals()
        if self._error is not None:
            raise self._error


class FileScan:
    """What one pass over an image file finds: size, sha1, md5, compression, stream."""

    def __init__(self):
        self.size = 0
        self.compression = None
        self.stream = SendStream()
        self._hashes = [hashlib.sha1(), hashlib.md5()]
        self._decompressor = None
        self._given_up = False

    @property
    def sha1(self) -> str:
        return self._hashes[0].hexdigest()

    @property
    def md5(self) -> str:
        return self._hashes[1].hexdigest()

    def run(self, read, write=None, progress=None):
        """Read to the end with read(CHUNK), handing each chunk to write as well.

        Raises BadImage for data that does not decompress, OSError from read and write.
        """
        lanes = [Lane(hash.update) for hash in self._hashes] + [Lane(self._look_inside)]
        for lane in lanes:
            lane.start()
        try:
            for chunk in iter(lambda: read(CHUNK), b""):
                if self.compression is None:
                    self._begin(chunk)
                for lane in lanes:
                    lane.put(chunk)
                if write is not None:
                    write(chunk)
                self.size += len(chunk)
                if progress is not None:
                    progress(self.size)
            for lane in lanes:
                lane.close()
        except BaseException:
            self._given_up = True
            for lane in lanes:
                lane.stop()
            raise
        if self._decompressor is not None:
            self._decompressor.close()

    def _begin(self, chunk):
        """Tell from the first chunk how the file is compressed."""
        self.compression = compression_of(chunk[:8], "")
        if self.compression != "none":
            self._decompressor = Decompressor(self.compression)

    def _look_inside(self, chunk):
        if self._decompressor is None:
            self.stream.feed(chunk)
            return
        for piece in self._decompressor.feed(chunk):
            if self._given_up:
                return
            self.stream.feed(piece)


# -- publishing --------------------------------------------------------------------------
#
# The only part that writes.  An image is made in .incoming-<uuid>, in serve_dir so that
# one rename(2) shows it whole: its file first, flushed to disk, then the manifest, then
# the rename.  Whatever ends a command before that leaves nothing on show.

HEED = 0.25                   # seconds a command may wait for its threads before it heeds a signal
ABANDONED = 24 * 3600         # seconds without a change until --clean takes an incomplete image
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)     # end a command

def interrupted(number, frame):
    """The handler of signals that end a command: raises UserError."""
    for each in ENDING:                   # the next one must not disturb the tidying up
        signal.signal(each, lambda number, frame: None)
    raise UserError(f"ended by {signal.Signals(number).name}", 128 + number)


def hold_signals():
    """From now on a signal that ends a command waits for the next `interruptible` call.

    Raised at just any moment, its exception could be lost: Python drops what is raised in a
    weak reference's callback or in __del__.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING + (signal.SIGALRM,))
    for number in ENDING:
        # What the caller ignores stays so (nohup); SIGPIPE is ignored by Python itself.
        if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGPIPE:
            signal.signal(number, interrupted)
    signal.signal(signal.SIGALRM, lambda number, frame: None)


def heed_signals():
    """Let a signal that has come meanwhile end the command."""
    held = signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    signal.pthread_sigmask(signal.SIG_SETMASK, held)


def interruptible(call):
    """`call`, as one that may wait for long: while it does, a signal ends the command.

    For commands that have called hold_signals.
    """
    def calling(*arguments):
        held = signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING + (signal.SIGALRM,))
        try:
            # A signal that came just before a system call would wait until that ends; the
            # next tick ends it with EINTR, and Python looks.
            signal.setitimer(signal.ITIMER_REAL, HEED, HEED)
            return call(*arguments)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
    return calling


def sync_directory(path):
    """Make a rename or a new name in the directory at `path` last; where it can be done."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def new_file(path):
    """A new binary file that the server's user can read; on disk when the block has ended."""
    with open(path, "xb") as file:
        os.fchmod(file.fileno(), 0o644)   # whatever the umask of an ssh session is
        yield file
        file.flush()
        os.fsync(file.fileno())


def replace_file(path, data, keep_time=False):
    """Put `data` in the place of a file, by rename.  Raises UserError.

    Its mode stays, and its owner unless we may not give files away and all may read it.

    keep_time: its mtime stays too.  Behind a symlink, it is the file there that is replaced.
    """
    path = os.path.realpath(path)
    aside = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}")
    try:
        with new_file(aside) as file:
            file.write(data)
            if os.path.exists(path):
                before, ours = os.stat(path), os.fstat(file.fileno())
                if (before.st_uid, before.st_gid) != (ours.st_uid, ours.st_gid):
                    try:
                        os.fchown(file.fileno(), before.st_uid, before.st_gid)
                    except PermissionError:
                        if not before.st_mode & stat.S_IROTH:
                            raise         # somebody could no longer read it
                os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
                if keep_time:
                    file.flush()
                    os.utime(aside, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.rename(aside, path)
        sync_directory(os.path.dirname(path))
    except BaseException as error:
        if os.path.exists(aside):
            os.unlink(aside)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {path}: {error.strerror}")
        raise


def stage(serve_dir, uuid):
    """Make the directory in which an image is put together: (its path, the directory, open).

    Raises UserError.
    """
    path = os.path.join(serve_dir, INCOMING + uuid)
    if os.path.lexists(os.path.join(serve_dir, uuid)):
        raise UserError(f"image {uuid} is here already")
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        raise UserError(f"image {uuid} is being imported, or waits to be activated; "
                      f"`imgserver.py discard {uuid}` throws it away")
    except OSError as error:
        raise UserError(f"cannot write to {serve_dir}: {error.strerror}")
    os.chmod(path, 0o755)
    return path, os.open(path, os.O_RDONLY)


def is_still(path, fd) -> bool:
    """Whether the file at `path` is the one that is open as fd."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except OSError:
        return False


def activate(config, uuid):
    """Put a whole image on show, by one rename.  Raises UserError."""
    path = os.path.join(config.serve_dir, INCOMING + uuid)
    if os.path.lexists(os.path.join(config.serve_dir, uuid)):
        raise UserError(f"image {uuid} is active already")
    image = ImageReader(config).read(uuid, os.path.join(config.serve_dir, INCOMING), (IMGAPI,))
    if image is None or image.problem:
        raise UserError(f"no whole image {uuid} waits to be activated"
                      + (f": {image.problem}" if image else ""))
    try:
        os.rename(path, os.path.join(config.serve_dir, uuid))
        sync_directory(config.serve_dir)
    except OSError as error:
        raise UserError(f"cannot activate image {uuid}: {error.strerror}")


def discard(serve_dir, uuid):
    """Throw away an image that is not active, whole or not.  Raises UserError."""
    path = os.path.join(serve_dir, INCOMING + uuid)
    aside = os.path.join(serve_dir, f"{DISCARDED}{uuid}.{os.getpid()}")
    try:
        os.rename(path, aside)            # or it could be activated while it is taken apart
        shutil.rmtree(aside)
    except FileNotFoundError:
        raise UserError(f"no image {uuid} waits to be activated")
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror}")


def new_manifest(config, uuid, fields) -> dict:
    """A v1 manifest, as the original import-image wrote it, of the fields that were given.

    v1, because every imgadm since 2012 takes it; imgadm 2 and later upgrade it themselves.
    With an owner of its own, or who may see it, it is v2: v1 cannot say that.
    """
    now = stamp(time.time())
    given = {key: value for key, value in fields.items() if value is not None}
    creator = config.image_creator_uuid or NOBODY
    manifest = {
        "uuid": uuid, "name": given.pop("name", ""), "version": given.pop("version", ""),
        "description": given.pop("description", ""), "published_at": now, "created_at": now,
        "type": "zone-dataset", "os": "smartos", "platform_type": "smartos",
        "cloud_name": config.image_creator, "creator_name": config.image_creator,
        "creator_uuid": creator, "vendor_uuid": config.image_vendor_uuid or creator,
    }
    manifest["urn"] = ":".join((config.image_creator, config.image_creator, manifest["name"],
                                manifest["version"]))
    manifest.update(given)
    if "owner" in given or "public" in given:
        manifest = upgrade(manifest)
        manifest.update((key, given[key]) for key in ("owner", "public") if key in given)
        del manifest["state"]             # that is for the server to say
    return manifest


def check_fields(manifest):
    """Raise UserError where imgadm's rules refuse a field, before any byte is stored."""
    v2 = complete({**manifest, "files": [{"sha1": "0" * 40, "size": 0, "compression": "none"}]},
                  stamp(0))
    rules = {
        "name": 'takes letters, digits, ".", "_", "/", "-" and spaces, 1 to 1024 of them',
        "version": 'takes letters, digits, ".", "_", "/", "+" and "-", 1 to 512 of them',
        "description": "takes a text of at most 10240 characters",
        "type": "must be one of " + ", ".join(TYPES),
        "os": "must be one of " + ", ".join(SYSTEMS),
        "origin": "must be the uuid of an image, in lower case",
        "published_at": "must look like 2026-01-31T12:00:00Z",
    }
    bad = next(iter(faults(manifest, v2)), None)
    if bad in ZVOL_FIELDS:
        raise UserError("a zvol needs nic_driver, disk_driver, cpu_type, and image_size in MiB"
                      if v2.get("type") == "zvol" else f"{bad} is for type zvol only")
    if bad is not None:
        raise UserError(f"{bad} {rules.get(bad, 'is not what imgadm takes there')}")


def choose_channels(config, manifest):
    """Where there are channels, the default one is for images that name none, as in IMGAPI.

    Raises UserError for channels in which no client would see the image.
    """
    names = [channel["name"] for channel in config.channels]
    if names and not manifest.get("channels"):
        if config.default_channel is None:
            raise UserError("channels must be given, such as 'channels=[\"" + names[0] + "\"]': "
                          "the configuration has no default one")
        manifest["channels"] = [config.default_channel]
    for name in manifest["channels"] if names else ():
        if name not in names:
            raise UserError(f"there is no channel {name!a} in the configuration")


def file_name(manifest, compression) -> str:
    """A name for the image file: NAME-VERSION.zfs.gz, fit for any URL and any shell."""
    kind = ".zvol" if manifest["type"] == "zvol" else ".zfs"
    name = re.sub("[^A-Za-z0-9._+-]+", "-", f"{manifest['name']}-{manifest['version']}")
    return name.strip(".-")[:200] + kind + COMPRESSIONS[compression]


class Import:
    """One image on its way into serve_dir."""

    def __init__(self, config, manifest, with_stream=True, progress=None):
        self.config, self.manifest = config, manifest
        self.with_stream, self.progress = with_stream, progress
        self.uuid = manifest["uuid"]

    def run(self, source, activated=True):
        """Take the image from the binary file `source`; all of it or nothing.

        Raises UserError, in one sentence, for whatever is wrong with the data or the disk.
        """
        serve_dir = self.config.serve_dir
        path, directory = stage(serve_dir, self.uuid)
        try:
            found = self._receive(source, os.path.join(path, ".file"))
            self._describe(found)
            if not is_still(path, directory):         # there may be another one by now
                raise UserError(f"image {self.uuid} was discarded while it was imported")
            os.rename(os.path.join(path, ".file"),
                      os.path.join(path, self.manifest["files"][0]["path"]))
            replace_file(os.path.join(path, MANIFEST),
                         (render_json(self.manifest) + "\n").encode())
            if activated:
                activate(self.config, self.uuid)
        except BaseException as error:
            if is_still(path, directory):
                shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, BadImage):
                raise UserError(f"image refused: {error}")
            if isinstance(error, OSError):
                raise UserError(f"the image cannot be stored: {error.strerror}")
            raise
        finally:
            os.close(directory)

    def _receive(self, source, path) -> FileScan:
        def read(size):
            try:
                return interruptible(source.read)(size)
            except OSError as error:
                raise UserError(f"the image cannot be read: {error.strerror}")

        found = FileScan()
        with new_file(path) as file:
            found.run(read, file.write, self.progress)
            file.flush()
            if os.fstat(file.fileno()).st_size != found.size:
                raise OSError(errno.EIO, "the disk has not kept all of it")
        return found

    def _describe(self, found):
        """Hold what was found against the manifest, and complete it.  Raises BadImage."""
        manifest = self.manifest
        if found.size == 0:
            raise BadImage("there is no data")
        stored = mended_file((manifest.get("files") or [{}])[0])
        truth = {"size": found.size, "sha1": found.sha1, "compression": found.compression}
        if found.stream.guid:
            truth["dataset_guid"] = str(found.stream.guid)
        for key, value in truth.items():
            if str(stored.get(key, value)) != str(value):
                raise BadImage(f"its {key} is {value}, but the manifest says {stored[key]}")
        if self.with_stream:
            self._describe_stream(found.stream)
        file = {"path": file_name(manifest, found.compression), **stored, **truth,
                "md5": found.md5}
        if not is_file_name(file["path"]):
            raise BadImage("files[0].path of the manifest is no plain file name")
        manifest["files"] = [file]

    def _describe_stream(self, stream):
        """Hold the ZFS stream against type and origin.  Raises BadImage."""
        manifest = self.manifest
        trouble = stream.trouble()
        if trouble:
            raise BadImage(trouble)
        if (stream.type == "zvol") != (manifest["type"] == "zvol"):
            raise BadImage(f"the stream is that of a {stream.type}, but the type is "
                          f"{manifest['type']}")
        origin = manifest.get("origin")
        if stream.from_guid and not origin:
            raise BadImage("the stream is incremental: --origin must name the image it builds on")
        if not stream.from_guid and origin:
            raise BadImage("the stream is not incremental, but an origin is given")
        if origin and self._guid_of(origin) != str(stream.from_guid):
            raise BadImage(f"the stream does not build on image {origin}")

    def _guid_of(self, origin):
        """The guid of an image's snapshot: from its manifest, else from its file."""
        reader = ImageReader(self.config)
        image = reader.read(origin, os.path.join(self.config.serve_dir, ""), (IMGAPI,))
        if image is None or image.problem:
            raise BadImage(f"its origin, image {origin}, is not on this server, or not sound")
        file = image.fields()["files"][0]
        return file.get("dataset_guid") or str(read_stream(
            os.path.join(image.directory, image.file), file["compression"]).guid)


# -- requests and responses --------------------------------------------------------------
#
# A request is parsed from its bytes, each of which is one character here (latin-1); a
# response is a value.  Nothing here knows a socket.

HEAD_LINE_LIMIT = 8 << 10     # bytes of a request line; nginx and node allow 8 KiB too
HEAD_LIMIT = 32 << 10         # bytes of a whole request head: imgadm sends less than 1 KiB
HEAD_FIELDS_LIMIT = 100       # header lines of one request
HOSTS_KEPT = 256              # Host headers of which the check and the URL are remembered
QUERY_FIELDS_LIMIT = 100      # parameters of one query: IMGAPI knows fifteen

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = rf"(({_TOKEN}) ([!-~\x80-\xff]+) HTTP/([0-9]\.[0-9]))\r?\n"
_FIELD_LINE = _TOKEN + r":[^\x00-\x08\n-\x1f\x7f]*\r?\n"
# A request head, to its blank line (RFC 9112 §2.1): line ends may be bare LF (§2.2), fields
# are not folded and have no space before the colon (§5.1, §5.2).
_HEAD = re.compile(rf"{_REQUEST_LINE}((?:{_FIELD_LINE})*)\r?\n")
_BEGINNING = re.compile(_REQUEST_LINE)
_HEAD_END = re.compile(r"\n\r?\n")
_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?")
_LENGTH = re.compile("[0-9]{1,19}")
_RANGE = re.compile("bytes=([0-9]{0,19})-([0-9]{0,19})")
_TARGET_HOST = re.compile("https?://[^/?]*", re.IGNORECASE)

METHODS = frozenset(("GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH", "TRACE",
                     "CONNECT"))


class Request:
    """One parsed request.

    headers   lower-case name: value; values of a repeated field are joined by commas
    segments  the path, split and percent-decoded: ["datasets", uuid]; [""] for /
    query     the text after "?", undecoded
    host      the Host header, checked; None on HTTP/1.0 without one
    keep      whether the client wants to go on with this connection
    may_block  whether answering may take its time: True in a thread, False in the loop
    """

    __slots__ = ("method", "target", "is_1_0", "headers", "segments", "query", "host", "keep",
                 "may_block")


def parse_head(match) -> Request:
    """Make a Request of what _HEAD has matched.

    Raises ApiError; whatever it says, the connection is of no further use then, since
    nobody can tell where the next request begins.
    """
    request = Request()
    request.may_block = False
    _, request.method, request.target, version, block = match.groups()
    if version[0] != "1":
        raise ApiError(505, "HttpVersionNotSupported", "HTTP/1.0 and HTTP/1.1 are spoken here")
    request.is_1_0 = version == "1.0"
    request.headers = headers = parse_fields(block)
    request.host = host = headers.get("host")
    if host is not None:
        if not names_host(host):
            raise bad_request("the Host header names no host")
    elif not request.is_1_0:
        raise bad_request("the Host header is missing")
    request.keep = not request.is_1_0
    if "connection" in headers:
        options = [option.strip().lower() for option in headers["connection"].split(",")]
        request.keep = "close" not in options and (request.keep or "keep-alive" in options)
    if "transfer-encoding" in headers or "content-length" in headers:
        check_framing(headers)
    if "expect" in headers and headers["expect"].lower() != "100-continue":
        raise ApiError(417, "ExpectationFailed", "only 100-continue can be expected")
    request.segments, request.query = split_target(request.target)
    return request


def explain_head(data):
    """Why `data` is no request head.  Returns if it may only be incomplete.

    Raises ApiError for the beginning of what can become no request (TLS, HTTP/0.9) at once.
    """
    end = _HEAD_END.search(data)
    head = data[:end.end()] if end else data
    check_size(head)
    if "\n" in head and not _BEGINNING.match(head) or not re.match("[A-Za-z]", data):
        raise bad_request("the request line is not that of HTTP/1.1")
    if end:
        raise bad_request("a header line is not well formed")


def check_size(head):
    """Refuse a head, whole or not, that is larger than any client of ours sends."""
    if len(head.partition("\n")[0]) > HEAD_LINE_LIMIT:
        raise ApiError(414, "RequestURITooLong", f"a request line over {HEAD_LINE_LIMIT} bytes")
    if len(head) > HEAD_LIMIT:
        raise ApiError(431, "RequestHeaderFieldsTooLarge", f"a head over {HEAD_LIMIT} bytes")


@functools.lru_cache(HOSTS_KEPT)
def names_host(host) -> bool:
    """Whether a Host header is a name or address, with a port or without (RFC 9112 §3.2)."""
    match = _HOST.fullmatch(host)
    return match is not None and int(match[2] or 0) <= 65535


def parse_fields(block: str) -> dict:
    """The header lines of a well-formed head as a dict; the names in lower case."""
    headers = {}
    lines = block.split("\n")
    lines.pop()
    if len(lines) > HEAD_FIELDS_LIMIT:
        raise ApiError(431, "RequestHeaderFieldsTooLarge",
                      f"more than {HEAD_FIELDS_LIMIT} header lines")
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t\r")
        if name in headers:
            if name in ("host", "content-length", "transfer-encoding"):
                raise bad_request(f"{name} is given twice")
            value = headers[name] + ", " + value
        headers[name] = value
    return headers


def check_framing(headers):
    """Refuse a body that cannot be told from the next request (RFC 9112 §6.1, §6.3)."""
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is None and coding.lower() == "chunked":
            raise ApiError(411, "LengthRequired", "a body needs a Content-Length here")
        raise bad_request("this Transfer-Encoding is not understood")
    if not _LENGTH.fullmatch(length):
        raise bad_request("Content-Length is not a number")


def split_target(target):
    """(segments, query) of a request target.  Raises ApiError.

    imgadm asks for files in absolute-form, of whatever host the url names: only the path
    counts (RFC 9112 §3.2.2; every request that arrives is for this server).
    """
    if target[0] != "/":
        match = _TARGET_HOST.match(target)
        if not match:
            raise bad_request("the request target is neither a path nor a URL")
        target = target[match.end():]
        if target[:1] != "/":
            target = "/" + target
    path, _, query = target.partition("?")
    segments = path[1:].split("/")
    if len(segments) > 1 and not segments[-1]:
        segments.pop()                    # /datasets/ is imgadm 1's default
    if "%" in path or not path.isascii():
        segments = [decode_segment(segment) for segment in segments]
    return segments, query


def decode_segment(segment):
    """A segment of a path as text.  Raises ApiError for what is no UTF-8 or holds a NUL."""
    if re.search("%(?![0-9A-Fa-f]{2})", segment):
        raise bad_request("URI malformed")
    try:
        text = urllib.parse.unquote_to_bytes(segment.encode("latin-1")).decode("utf-8")
    except UnicodeDecodeError:
        raise bad_request("URI malformed")
    if "\0" in text:
        raise bad_request("URI malformed")
    return text


class Response:
    """What a request is answered with: status, header lines, and bytes or a part of a file.

    fields are header lines as bytes that end in CRLF; Server, Date, Content-Length and
    Connection are added by whoever sends.  file is an open file descriptor, of which
    `length` bytes from `offset` are the body; it is the sender's to close.
    """

    __slots__ = ("status", "fields", "body", "file", "offset", "length")

    def __init__(self, status, fields=b"", body=b"", file=None, offset=0, length=None):
        self.status, self.fields, self.body = status, fields, body
        self.file, self.offset = file, offset
        self.length = len(body) if length is None else length

    def close(self):
        """Close its file; may be called twice."""
        if self.file is not None:
            os.close(self.file)
            self.file = None


def header_line(name, value) -> bytes:
    """One header line.  Raises ValueError for what would end it early."""
    if not value.isprintable():
        raise ValueError(f"{name} cannot hold {value!a}")
    return f"{name}: {value}\r\n".encode("latin-1")


def json_response(value, status=200, fields=CORS) -> Response:
    return Response(status, JSON_TYPE + fields, render_json(value).encode())


def error_response(refusal) -> Response:
    """The error answer that imgadm prints: {code, message}, and errors where IMGAPI has them."""
    value = {"code": refusal.code, "message": refusal.message}
    if refusal.errors is not None:
        value["errors"] = refusal.errors
    return json_response(value, refusal.status, CORS + refusal.fields)


def etag_matches(header, etag) -> bool:
    """Whether an If-None-Match or If-Match header names `etag` (RFC 9110 §13.1.1).

    Unquoted ones count too: the official IMGAPI sends its ETags so.
    """
    if header.strip('"') == etag or header == "*":
        return True
    for item in header.split(","):
        item = item.strip(" \t")
        if item.startswith("W/"):
            item = item[2:]
        if item.strip('"') == etag:
            return True
    return False


LAST_SECOND = 253402300799        # 9999-12-31T23:59:59Z: a file of later times is shown as of then


def http_date(seconds) -> str:
    """A time in seconds since 1970 as headers have it, within what datetime can say."""
    return email.utils.formatdate(max(0, min(seconds, LAST_SECOND)), usegmt=True)


def not_modified_since(header, seconds) -> bool:
    """Whether If-Modified-Since is a date not before `seconds` (RFC 9110 §13.1.3)."""
    try:
        return email.utils.parsedate_to_datetime(header).timestamp() >= int(seconds)
    except (ValueError, TypeError, IndexError, OverflowError, OSError):
        return False


def parse_range(header, size):
    """(offset, length) of a Range header with one range; None where it is to be ignored.

    Raises ApiError (416) where it begins behind the end (RFC 9110 §14.1.2, §15.5.17).
    Several ranges are ignored too: no client of an image server sends them.
    """
    match = _RANGE.fullmatch(header)
    if not match or match[1] == match[2] == "":
        return None
    if match[1] == "":
        offset, last = max(0, size - int(match[2])), size - 1
    else:
        offset, last = int(match[1]), int(match[2] or size)
        if match[2] and last < offset:
            return None
    if offset >= size:
        raise ApiError(416, "RequestedRangeNotSatisfiable", f"the file has {size} bytes",
                      fields=header_line("Content-Range", f"bytes */{size}"))
    return offset, min(last, size - 1) - offset + 1


def file_response(request, fd, status, etag, fields, md5=None) -> Response:
    """The answer to a GET or HEAD of an open regular file: 200, 206, 304 or 416.

    md5 is called for the digest as bytes, or None, if the whole file is the answer.
    Closes fd unless the Response holds it.
    """
    headers, size = request.headers, status.st_size
    try:
        modified = http_date(int(status.st_mtime))
        fields += b'ETag: "%b"\r\nLast-Modified: %b\r\nAccept-Ranges: bytes\r\n' % (
            etag.encode(), modified.encode())
        if "if-none-match" in headers:
            unmodified = etag_matches(headers["if-none-match"], etag)
        else:
            unmodified = ("if-modified-since" in headers and
                          not_modified_since(headers["if-modified-since"], status.st_mtime))
        if unmodified:
            return Response(304, fields)
        part = None
        if ("range" in headers and request.method == "GET"
                and headers.get("if-range", modified) in (modified, f'"{etag}"')):
            part = parse_range(headers["range"], size)
        if part is not None:
            offset, length = part
            fields += header_line("Content-Range", f"bytes {offset}-{offset + length - 1}/{size}")
            response = Response(206, fields, b"", fd, offset, length)
        else:
            digest = md5() if md5 is not None else None
            if digest is not None:
                fields += b"Content-MD5: " + base64.b64encode(digest) + b"\r\n"
            response = Response(200, fields, b"", fd, 0, size)
        fd = None
        return response
    finally:
        if fd is not None:
            os.close(fd)


# -- routes ------------------------------------------------------------------------------
#
# From a Request to a Response.  A route may be called in the server's loop, where it
# raises NeedsThread rather than wait for a disk; it is then called again in a thread.

# Samples of the errors that IMGAPI knows, for /ping?error=NAME (sdc-imgapi, GET /ping).
PING_ERRORS = {                   # what ApiError is made of
    "ValidationFailed": (422, "ValidationFailed", "boom", []),
    "InvalidParameter": (422, "InvalidParameter", 'invalid "foo"',
                         [{"field": "foo", "code": "Invalid"}]),
    "ImageFilesImmutable": (422, "ImageFilesImmutable", "cannot modify files on activated image"),
    "ImageAlreadyActivated": (422, "ImageAlreadyActivated", "image is already activated"),
    "NoActivationNoFile": (422, "NoActivationNoFile",
                           "image cannot be activated: it has no file"),
    "OperatorOnly": (403, "OperatorOnly", "this endpoint may only be called by an operator"),
    "ImageUuidAlreadyExists": (409, "ImageUuidAlreadyExists", "image uuid already exists"),
    "StorageIsDown": (503, "StorageIsDown", "storage is down"),
    "StorageUnsupported": (503, "StorageUnsupported", "storage is unsupported"),
    "RemoteSource": (503, "RemoteSourceError", ""),
    "Internal": (500, "InternalError", "boom"),
}
PING_ERRORS_WITHOUT_SAMPLE = frozenset((
    "ResourceNotFound", "Upload", "Download", "OwnerDoesNotExist", "AccountDoesNotExist",
    "NotImageOwner", "NotMantaPathOwner", "OriginDoesNotExist", "OriginIsNotActive",
    "InsufficientServerVersion", "ImageHasDependentImages", "NotAvailable", "NotImplemented",
    "InvalidHeader", "ServiceUnavailable", "Unauthorized", "BadRequest"))


def parse_query(query) -> dict:
    """The parameters of a query: name: [values].  Raises ApiError for too many."""
    try:
        query = query.encode("latin-1").decode("utf-8", "replace")
        return urllib.parse.parse_qs(query, keep_blank_values=True, errors="replace",
                                     max_num_fields=QUERY_FIELDS_LIMIT)
    except ValueError:
        raise bad_request(f"more than {QUERY_FIELDS_LIMIT} query parameters")


def single_value(query, name):
    """The value of a parameter that may stand once; None where it is absent or empty."""
    values = query.get(name, [""])
    if len(values) > 1:
        raise invalid(name, f'invalid "{name}": given {len(values)} times')
    return values[0] or None


def matches_text(value, wanted, prefix=False) -> bool:
    """IMGAPI's filter for name and version: exact, or ~substring; DSAPI's is by prefix."""
    if wanted.startswith("~"):
        return wanted[1:] in value
    return value.startswith(wanted) if prefix else value == wanted


def as_text(value) -> str:
    """A tag's value as filters compare it: numbers and booleans as JSON writes them."""
    if isinstance(value, str):
        return value if len(value) <= 100 else ""
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return ""


def filters_of(query, account):
    """The filters of a GET /images, as functions of an Image, cheap ones first."""
    filters = []

    def single(name, check):
        if name in query:
            wanted = query[name][0] if len(query[name]) == 1 else ""
            filters.append((lambda image: check(image, wanted)) if wanted
                           else lambda image: False)

    single("os", lambda image, wanted: image.os == wanted)
    single("owner", lambda image, wanted: image.owner == wanted)
    single("name", lambda image, wanted: matches_text(image.name, wanted))
    single("version", lambda image, wanted: matches_text(image.version, wanted))
    single("type", lambda image, wanted: (image.type != wanted[1:] if wanted[0] == "!"
                                          else image.type == wanted))
    single("public", lambda image, wanted: json.dumps(image.public) == wanted)
    for tag in query.get("billing_tag", ()):
        filters.append(lambda image, tag=tag: tag != "" and tag in image.billing_tags)
    if account:
        filters.append(lambda image: may_see(image, account))
    for name, values in query.items():
        if name.startswith("tag."):
            filters.append(lambda image, key=name[4:], values=values: all(
                value != "" and as_text(image.fields().get("tags", {}).get(key)) == value
                for value in values))
    return filters


def may_see(image, account) -> bool:
    """Whether an account sees an image: its own, a public one, or one shared with it."""
    return image.owner == account or image.public or account in image.acl


def newest_first(query) -> bool:
    """Whether the list is to be newest first.  Raises ApiError."""
    value = single_value(query, "sort") or "published_at"
    attribute, _, direction = value.partition(".")
    if attribute != "published_at":
        raise invalid("sort", f"invalid 'sort': not a valid sorting attribute: '{attribute}'")
    return direction.lower() not in ("", "asc")


def limit_of(query):
    """How many images to list; None for all.  Raises ApiError."""
    value = single_value(query, "limit")
    if value is None:
        return None
    if not re.fullmatch("-?[0-9]+", value):
        raise invalid("limit", f'invalid limit: "{value}"')
    if not value.strip("-0"):
        return None
    return 0 if value[0] == "-" else int(value.lstrip("0")[:9])


def parse_accept_version(headers, target) -> int:
    """1 or 2: whether `channels` are shown is all that differs.  Raises ApiError."""
    wanted = headers.get("accept-version", "~1").strip()
    match = re.fullmatch(r"[~^=v]?\s*([0-9]{1,9})(\.(?:[0-9]{1,9}|[x*])){0,2}", wanted)
    if not match:
        return 2                  # "*", and whatever else cannot be told: any version will do
    if match[1] not in ("1", "2") or re.search(r"\.0*[1-9]", wanted):
        raise ApiError(400, "InvalidVersion", f"{wanted} is not supported by {target}")
    return int(match[1])


def accepts_gzip(header) -> bool:
    """Whether Accept-Encoding names gzip, and not to say no (RFC 9110 §12.5.3)."""
    for item in header.split(","):
        coding, _, parameters = item.partition(";")
        if coding.strip().lower() == "gzip":
            return not re.fullmatch(r"\s*q=0(\.0*)?\s*", parameters)
    return False


def image_text(image, version) -> bytes:
    """The v2 manifest of an image as a version of IMGAPI shows it."""
    before, channels, _ = image.imgapi
    return before + (channels if version == 2 else b"") + b"\n}"


def admin_fields(query):
    """Refuse inclAdminFields, which is for operators of the official server."""
    value = single_value(query, "inclAdminFields")
    if value not in (None, "true", "false"):
        raise invalid("inclAdminFields", f'invalid "inclAdminFields": "{value}"')
    if value == "true":
        raise ApiError(401, "UnauthorizedError", 'Unauthorized (auth required to use '
                                                '"inclAdminFields" parameter)')


def open_of(image, name, what, fits):
    """Open a file of an image: (fd, its stat).

    Raises ApiError (404) where it has no such file, or fits(its size in bytes) is false.
    """
    try:
        if name is not None:
            fd, status = open_regular(os.path.join(image.directory, name))
            if fits(status.st_size):
                return fd, status
            os.close(fd)
    except OSError as error:
        raise_shortage(error)
    raise not_found(f'image "{image.uuid}" has no {what}')


class Site:
    """Everything that can be asked for, over one store."""

    def __init__(self, config, store, log):
        self.config, self.store, self.log = config, store, log
        self.channels = {channel["name"]: channel for channel in config.channels}
        # prefix + Host + suffix, as JSON: what files[].url begins with.
        self.url_base = functools.lru_cache(HOSTS_KEPT)(self._make_base)
        # The suffix was made to add a port: not to a Host header that has one.
        self._plain_suffix = re.sub("^:[0-9]+", "", config.suffix)

    def answer(self, request) -> Response:
        """The Response to a Request, also where it is refused.  Raises NeedsThread."""
        try:
            route = self._route(request)
            if len(request.segments) > 1:
                return route(self, request, request.segments[1])
            return route(self, request)
        except ApiError as refusal:
            return error_response(refusal)
        except OSError as error:
            self.log.error(f"cannot answer {printable(request.target)}: {error.strerror}")
            return error_response(ApiError(503, "ServiceUnavailableError",
                                            "the image directory cannot be read",
                                            fields=b"Retry-After: 10\r\n"))

    def _route(self, request):
        """The route for a request's path and method.  Raises ApiError."""
        segments = request.segments
        if len(segments) == 1:
            pattern = segments[0] if "/" not in segments[0] else None     # /images%2F:uuid
        elif not is_uuid(segments[1]):
            pattern = None
        elif len(segments) == 2:
            pattern = segments[0] + "/:uuid"
        else:
            last = "/".join(segments[2:])
            pattern = segments[0] + "/:uuid/" + (":file" if segments[0] == "datasets"
                                                 and len(segments) == 3 else last)
        route = ROUTES.get(pattern)
        if route is None:
            raise not_found(f"{request.target} does not exist")
        if request.method in ("GET", "HEAD"):
            return route
        if request.method == "OPTIONS":
            return Site.options
        if request.method not in METHODS:
            raise ApiError(501, "NotImplemented", "the method is not known here")
        raise ApiError(405, "MethodNotAllowedError", f"{request.method} is not allowed",
                      fields=b"Allow: GET, HEAD, OPTIONS\r\n")

    def options(self, request, *_):
        """What may be asked of a path, for scripts of other sites (CORS)."""
        headers = request.headers.get("access-control-request-headers", "")
        allow = b"GET, HEAD, OPTIONS"
        fields = b"Allow: %b\r\n%bAccess-Control-Allow-Methods: %b\r\n" % (allow, CORS, allow)
        if re.fullmatch(r"[A-Za-z0-9, -]{1,500}", headers):
            fields += header_line("Access-Control-Allow-Headers", headers)
        return Response(204, fields)

    # both

    def root(self, request):
        """index.html for a browser, index.json for the rest, as the original; else a hint."""
        if not request.may_block:
            raise NeedsThread
        accept = request.headers.get("accept", "")
        names = ["index.json"]
        if "text/html" in accept or "application/xhtml+xml" in accept:
            names.insert(0, "index.html")
        for name in names:
            try:
                fd, status = open_regular(os.path.join(self.config.serve_dir, name))
            except OSError as error:
                raise_shortage(error)
                continue
            kind = "text/html; charset=utf-8" if name.endswith("html") else "application/json"
            etag = hashlib.sha1(repr(stat_key(status)).encode()).hexdigest()
            return file_response(request, fd, status, etag,
                                 header_line("Content-Type", kind) + b"Vary: Accept\r\n" + CORS)
        return json_response({"server": f"imgserver/{__version__}", "datasets": "/datasets",
                              "images": "/images", "ping": "/ping"})

    def ping(self, request):
        """What tells both kinds of source what this is; ?error=NAME is answered by a sample."""
        if request.query:
            query = parse_query(request.query)
            if "error" in query:
                raise self._ping_error(single_value(query, "error") or "Internal")
        return json_response({"ping": "pong", "version": __version__, "imgapi": True,
                              "dsapi": True})

    @staticmethod
    def _ping_error(name):
        name = name[:-len("Error")] if name.endswith("Error") else name
        if name in PING_ERRORS:
            return ApiError(*PING_ERRORS[name])
        if name in PING_ERRORS_WITHOUT_SAMPLE:
            return ApiError(500, "InternalError", f'do not have a sample "{name}Error" error')
        return invalid("error", f"unknown error: {name}Error", "Missing")

    def manifest_response(self, request, etag, *parts):
        """One manifest, of which `parts` are the bytes: 200, 304 or 412 (RFC 9110 §13.2.2)."""
        headers = request.headers
        fields = b'%bETag: "%b"\r\n%b' % (JSON_TYPE, etag, CORS)
        if "if-match" in headers and not etag_matches(headers["if-match"], etag.decode()):
            raise ApiError(412, "PreconditionFailed",
                          f"if-match '{headers['if-match']}' didn't match etag '{etag.decode()}'")
        if "if-none-match" in headers and etag_matches(headers["if-none-match"], etag.decode()):
            return Response(304, fields)
        return Response(200, fields, b"".join(parts))

    def list_response(self, request, listing):
        """A whole list: with ETag, and as gzip for who asks (imgadm does not)."""
        headers = request.headers
        if "accept-encoding" in headers and accepts_gzip(headers["accept-encoding"]):
            if listing.zipped is None:
                if not request.may_block:
                    raise NeedsThread
                listing.zip()
            listing = listing.zipped
        if "if-none-match" in headers and etag_matches(headers["if-none-match"], listing.etag):
            return Response(304, listing.fields)
        return Response(200, listing.fields, listing.body)

    def stored_file(self, request, image):
        """The file of an image, of which the manifest may have been true a moment ago only."""
        if not request.may_block:
            raise NeedsThread
        fd, status = open_of(image, image.file, "file", lambda size: size == image.size)

        def md5():
            if image.md5 is None and image.size <= MD5_LIMIT:
                image.md5 = hashlib.md5(os.pread(fd, image.size, 0)).digest()
            return image.md5

        return file_response(request, fd, status, image.sha1,
                             b"Content-Type: application/octet-stream\r\n", md5)

    # DSAPI

    def _make_base(self, host):
        suffix = self.config.suffix
        if suffix and _HOST.fullmatch(host)[2]:
            suffix = self._plain_suffix
        return _quote(self.config.prefix + host + suffix)[1:-1].encode()

    def datasets(self, request):
        """All active images, v1; filters as dsapid has them: by prefix, or ~part."""
        url_base = self.url_base(request.host)
        if request.query:
            query = parse_query(request.query)
            wanted = {name: single_value(query, name)
                      for name in ("name", "version", "os", "type")}
            if any(wanted.values()):
                snapshot = self._thread_snapshot(request, DSAPI)
                return self._plain_list(url_base.join(image.dsapi[:2]) for image in snapshot.images
                                        if all(value is None or matches_text(
                                            getattr(image, name), value, name != "type")
                                            for name, value in wanted.items()))
        return self.list_response(request, self.store.listing(
            DSAPI, (url_base,), self._render_datasets, request.may_block))

    def _render_datasets(self, snapshot, api, url_base):
        texts = (url_base.join(image.dsapi[:2]) for image in snapshot.images)
        return Listing(self.store.join(texts), list_etag(snapshot.images, api))

    def _thread_snapshot(self, request, api):
        """The snapshot for a filtered list, which is made anew each time: in a thread."""
        if not request.may_block:
            raise NeedsThread
        return self.store.snapshot(api, True)

    def _plain_list(self, texts):
        return Response(200, JSON_TYPE + CORS, self.store.join(texts))

    def dataset(self, request, uuid):
        """One manifest, v1."""
        before, after, etag = self.store.image(uuid, DSAPI, request.may_block).dsapi
        return self.manifest_response(request, etag, before, self.url_base(request.host), after)

    def dataset_file(self, request, uuid):
        """The file of an image, by the name that its v1 manifest gives."""
        image = self.store.image(uuid, DSAPI, request.may_block)
        if request.segments[2] != image.path:
            raise not_found(f"{request.target} does not exist")
        return self.stored_file(request, image)

    # IMGAPI

    def channel_of(self, query):
        """The channel a request is about: None without channels, "*" for all.

        Raises ApiError as sdc-imgapi does.
        """
        if not self.channels:
            return None
        name = single_value(query, "channel")
        if name is None:
            if self.config.default_channel is None:
                raise ApiError(422, "ValidationFailed",
                              "channel not specified and the server has no default channel",
                              [{"field": "channel", "code": "MissingParameter"}])
            return self.config.default_channel
        if name not in self.channels and name != "*":
            raise ApiError(422, "ValidationFailed", f"unknown channel: {name}",
                          [{"field": "channel", "code": "Invalid"}])
        return name

    def in_channel(self, image, channel) -> bool:
        """Whether an image is to be seen there; one without channels is not, where there are."""
        return channel is None or any(name == channel or channel == "*"
                                      for name in image.channels if name in self.channels)

    def images(self, request):
        """All active images, v2, as IMGAPI's ListImages: filtered, sorted, marked, limited."""
        version = parse_accept_version(request.headers, f"{request.method} /images")
        query = parse_query(request.query) if request.query else {}
        admin_fields(query)
        channel = self.channel_of(query)

        if set(query) - {"channel", "inclAdminFields"}:
            images = self._select(request, query, channel)
            return self._plain_list(image_text(image, version) for image in images)
        view = (channel, version if self.channels else None)
        return self.list_response(request, self.store.listing(
            IMGAPI, view, self._render_images, request.may_block))

    def _render_images(self, snapshot, api, channel, version):
        images = [image for image in snapshot.images if self.in_channel(image, channel)]
        return Listing(self.store.join(image_text(image, version) for image in images),
                       list_etag(images, api, version))

    def _select(self, request, query, channel):
        """The images that a query asks for: filtered, sorted, from the marker on, limited."""
        backwards, limit = newest_first(query), limit_of(query)
        account = single_value(query, "account")
        state = single_value(query, "state") or "active"
        if state != "all" and state not in STATES:
            raise invalid("state", f'invalid state: "{state}"')
        if state not in ("active", "all"):
            return []             # nobody here is known well enough to be shown those
        images = [image for image in self._thread_snapshot(request, IMGAPI).images
                  if self.in_channel(image, channel)]
        for check in filters_of(query, account):
            images = [image for image in images if check(image)]
        if backwards:
            images.reverse()
        marker = single_value(query, "marker")
        if marker is not None:
            first = self._marker(marker, backwards, request)
            images = [image for image in images
                      if (image.order <= first if backwards else image.order >= first)]
        return images[:limit]

    def _marker(self, marker, backwards, request):
        """The place in the order where a list is to begin.  Raises ApiError."""
        if is_uuid(marker):
            return self.store.image(marker, IMGAPI, request.may_block).order
        text = marker.replace(" ", "T").rstrip("Z")
        text += "0000-01-01T00:00:00.000"[len(text):]
        try:
            time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")
            if not text.isascii() or not re.fullmatch(r"\.[0-9]{3}", text[19:]):
                raise ValueError
        except ValueError:
            raise invalid("marker", f'invalid value for "marker" param: "{marker}" is not a '
                                    "UUID or date string")
        return text, "~" if backwards else ""

    def one_image(self, request, uuid):
        """The image of an IMGAPI request, in any state, if its channel and account show it."""
        query = parse_query(request.query) if request.query else {}
        version = parse_accept_version(request.headers, f"{request.method} {request.target}")
        admin_fields(query)
        account = single_value(query, "account")
        if account is not None and not is_uuid(account):
            raise invalid("account", f'invalid "account": not a UUID: "{account}"')
        channel = self.channel_of(query)
        try:
            image = self.store.image(uuid, IMGAPI, request.may_block)
        except ApiError:
            if not os.path.lexists(os.path.join(self.config.serve_dir, INCOMING + uuid)):
                raise
            if not request.may_block:
                raise NeedsThread
            image = self.store.unactivated(uuid)
        if not self.in_channel(image, channel) or account and not may_see(image, account):
            raise not_found("image not found")
        return image, version, query

    def image(self, request, uuid):
        """One manifest, v2."""
        image, version, _ = self.one_image(request, uuid)
        before, channels, etag = image.imgapi
        if version == 1 and channels:
            channels, etag = b"", etag + b"-1"
        return self.manifest_response(request, etag, before, channels, b"\n}")

    def image_file(self, request, uuid):
        """The file of an image; ?index=0 is the only one."""
        image, _, query = self.one_image(request, uuid)
        index = single_value(query, "index") or "0"
        if re.fullmatch("[0-9]+", index) and index.strip("0"):
            raise not_found(f'image "{uuid}" has no file at index {index.lstrip("0")}')
        return self.stored_file(request, image)

    def image_icon(self, request, uuid):
        """The icon of an image, with the Content-MD5 that sdc-clients insist on."""
        image, _, _ = self.one_image(request, uuid)
        if not request.may_block:
            raise NeedsThread
        fd, status = open_of(image, image.icon, "icon", lambda size: size <= MD5_LIMIT)
        try:
            data = os.pread(fd, status.st_size, 0)
        except OSError:
            os.close(fd)
            raise
        return file_response(request, fd, status, hashlib.sha1(data).hexdigest(),
                             header_line("Content-Type", ICONS[image.icon]) + CORS,
                             hashlib.md5(data).digest)

    def channel_list(self, request):
        """The channels as they are configured; 404 where there are none."""
        if not self.channels:
            raise not_found(f"{request.target} does not exist")
        return json_response(self.config.channels)

    def state(self, request):
        """For operators of the official server: refused, as it does."""
        raise ApiError(401, "UnauthorizedError", "Unauthorized")


ROUTES = {
    "": Site.root,
    "ping": Site.ping,
    "datasets": Site.datasets,
    "datasets/:uuid": Site.dataset,
    "datasets/:uuid/:file": Site.dataset_file,
    "images": Site.images,
    "images/:uuid": Site.image,
    "images/:uuid/file": Site.image_file,
    "images/:uuid/icon": Site.image_icon,
    "channels": Site.channel_list,
    "state": Site.state,
}


# -- connections -------------------------------------------------------------------------
#
# A connection does not own a thread.  The loop holds it while it waits (READING), answers it
# from memory, and goes on with what the socket does not take at once (SENDING).  What may
# wait for a disk is for a thread (WORKING): it sends a file, or makes an answer that the loop
# is to send, and gives the connection back.
#
#            +------------------ answered, more to come ------------------+
#            v                                                            |
#   accept: READING --- whole request, answer in memory, all sent --------+
#            |  |  |                                                      |
#            |  |  +--- file, or slow answer ---> WORKING -- given back --+
#            |  |                                                         |
#            |  +------ the socket is full -----> SENDING --- all sent ---+
#            |                                       |
#            +--- refused, or the end ---> LINGERING |
#            |                                 |     |
#            +---------------------------------+-----+---> CLOSED
#
# The answers of one turn of the loop go out together at its end: the clients of the first
# ones are not woken in between, which costs as much as answering (virtual machines most).
#
# Sockets do not block; a thread waits with poll for one that is full, or has it block until
# the loop takes it back.  Only the loop changes a state, registers or closes a socket.  Every
# state has a deadline, and the loop looks at all of them once a second.

RECEIVE = 16 << 10            # bytes asked of a socket at once: many whole requests
ONE_PIECE = 64 << 10          # bytes; a body up to this size is copied behind its head
PARTS = 64                    # parts of answers given to one sendmsg; POSIX allows 16 at least
LOOP_SEND = 2 << 20           # bytes of one part that the loop tries to send at first
LOOP_STEP = 512 << 10         # bytes, once the socket was full: larger ones leave the caches
TURN = 8 << 20                # bytes sent in such steps in one turn of the loop, about 3 ms
STEP = 256 << 10              # bytes a thread sends at once, so that the client can begin early
FULL_STEP = 512 << 10         # bytes, once the socket was full: then fewer steps cost less
LINGER = 2.0                  # seconds a refused client gets to read why before the socket goes
TICK = 1.0                    # seconds between two looks at the time limits

READING, SENDING, WORKING, LINGERING, CLOSED = (
    "reading", "sending", "working", "lingering", "closed")

STATUS_LINES = {int(status): b"HTTP/1.1 %d %b\r\nServer: imgserver/%b\r\nDate: " % (
    status, status.phrase.encode(), __version__.encode()) for status in http.HTTPStatus}

# What sendfile says where it is of no use for a socket or file (illumos, old kernels).
_NO_SENDFILE = frozenset((errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EAFNOSUPPORT,
                          errno.ENOSYS, errno.ENOTSOCK))


class Truncated(Exception):
    """The file ended before the Content-Length that was announced."""


class Copier:
    """Sends parts of a file through a buffer of its own, where sendfile is of no use.

    It makes the socket block: a Unix socket polls as full until it is nearly empty.
    """

    def __init__(self, sock, fd):
        self._sock = sock
        self._sock.setblocking(True)
        self._file = open(fd, "rb", buffering=0, closefd=False)
        self._buffer = memoryview(bytearray(STEP))    # 900 a second are so many in stall_timeout

    def __call__(self, offset, want) -> int:
        """Send up to `want` bytes from `offset`; returns how many, 0 at the end of the file."""
        self._file.seek(offset)
        count = self._file.readinto(self._buffer[:min(want, STEP)])
        self._sock.sendall(self._buffer[:count])
        return count


def unsent(sock):
    """How full the socket's send queue is, only good to be compared; None: not known.

    A slow reader takes bytes long before the queue has room for more.  illumos cannot tell.
    """
    try:
        import termios
        return fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0")
    except (ImportError, AttributeError, OSError):
        return None


class Handler(BaseHTTPRequestHandler):
    """One connection: its buffer, its state, and the request that is being answered."""

    def setup(self):
        """Called once the connection is accepted, in place of http.server's files."""
        self.connection = self.request
        self.connection.setblocking(False)
        self.requestline = self.address = ""
        self.state = READING
        self.deadline = self.server.now + self.server.config.header_timeout
        self.buffer = ""                  # what came and is not parsed yet, as latin-1
        self.asked = None                 # the Request that is being answered
        self.out = []                     # parts of answers that are to be sent
        self.held = 0                     # bytes in them
        self.late = None                  # the response that a thread has made, to be put
        self.started = self.server.now    # when the request being answered began (monotonic)
        self.answered = 0                 # requests so far
        self.partial = False              # a request has begun, and is not whole yet
        self.scanned = 0                  # bytes of it in which no head ends
        self.unread = False               # the client may still be sending what nobody reads
        self.close_connection = False
        self.unsent = None                # bytes, at the last look of the clock
        self.note = ""                    # what the log says of a request that went wrong

    def handle(self):
        """Nothing yet: the loop calls readable() when there is something to read."""

    def finish(self):
        """Nothing: the connection lives until the loop closes it."""

    # in the loop: reading

    def readable(self):
        """There are bytes, or the client has gone."""
        try:
            data = self.connection.recv(RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.server.drop(self)
        elif self.state is READING:
            data = data.decode("latin-1")
            self.buffer = self.buffer + data if self.buffer else data
            self.advance()

    def advance(self):
        """Answer the whole requests in the buffer, until one needs a thread, or there is
        enough to send first: a client that never reads must not fill the memory.
        """
        while (self.buffer and self.state is READING and self.held <= ONE_PIECE
               and self.handle_one_request()):
            pass

    def handle_one_request(self):
        """Answer one request.  Returns whether it was answered and the next may be."""
        self.started = self.server.now
        try:
            if not self.parse_request():
                return False
            response = self.server.site.answer(self.asked)
        except NeedsThread:
            self.server.work(self)
            return False
        except ApiError as refusal:
            return self.refuse(refusal)
        except Exception:
            response = self.fault()
        return self.put(response)

    def refuse(self, refusal):
        """Answer what is no request, or is not taken: the last answer of this connection."""
        self.close_connection = self.unread = True
        return self.put(error_response(refusal))

    def parse_request(self):
        """Take one request off the buffer.  Returns whether it is all there.

        Raises ApiError for what is no request; the connection is of no further use then.
        """
        self.asked = None
        if self.buffer[0] in "\r\n":
            self.buffer = self.buffer.lstrip("\r\n")      # RFC 9112 §2.2
        # Of what was incomplete before, only the new bytes are searched for its end: matching
        # all of it again for each byte of a slow client would cost it little and us much.
        match = None
        if not self.partial or _HEAD_END.search(self.buffer, self.scanned):
            match = _HEAD.match(self.buffer)
        if match is None:
            self.wait_for_more()
            return False
        end = match.end()
        self.requestline = match[1]
        if end > HEAD_LINE_LIMIT:
            check_size(self.buffer[:end])
        self.buffer = self.buffer[end:]
        self.partial = False
        self.asked = asked = parse_head(match)
        if asked.host is None:
            asked.host = self.server.own_host(self.connection)
        if not asked.keep or self.server.draining:
            self.close_connection = True
        if "content-length" in asked.headers and asked.headers["content-length"].strip("0"):
            # No route takes a body, and what follows is never read as a request.
            self.close_connection = self.unread = True
            if asked.method in ("GET", "HEAD", "OPTIONS"):
                raise bad_request(f"a {asked.method} has no body here")
        return True

    def wait_for_more(self):
        """No whole request is there.  Raises ApiError where there will be none."""
        if not self.buffer:
            return
        if self.partial and self.buffer.find("\n", self.scanned) < 0:
            has_line = self.buffer.find("\n", 0, HEAD_LINE_LIMIT + 1) >= 0
            if len(self.buffer) <= (HEAD_LIMIT if has_line else HEAD_LINE_LIMIT):
                return                    # nothing that could be judged is new
        self.requestline = self.buffer[:HEAD_LINE_LIMIT].partition("\n")[0].rstrip("\r")
        explain_head(self.buffer)
        self.scanned = max(0, len(self.buffer) - 2)
        if not self.partial:
            self.partial = True
            if self.answered:             # the first one's time began with the connection
                self.deadline = self.server.now + self.server.config.header_timeout

    def fault(self):
        """The answer when our own code has failed."""
        self.server.log.exception("internal error")
        self.close_connection = True
        return error_response(ApiError(500, "InternalError", "internal error"))

    # in the loop: answering

    def head(self, response) -> bytes:
        """The head of a response as it is sent."""
        status = response.status
        framing = b"" if status in (204, 304) else b"Content-Length: %d\r\n" % response.length
        if self.close_connection:
            framing += b"Connection: close\r\n"
        elif self.asked.is_1_0:
            framing += b"Connection: keep-alive\r\n"
        return b"%b%b\r\n%b%b\r\n" % (STATUS_LINES[status], self.server.date,
                                       response.fields, framing)

    def has_body(self):
        return not self.requestline.startswith("HEAD ")

    def put(self, response):
        """Have a response from memory sent at the end of this turn.

        Returns whether the connection goes on after it.
        """
        if not self.out:
            self.server.outbox.append(self)
        head, size = self.head(response), 0
        self.out.append(head)
        if response.body and self.has_body():
            size = response.length
            self.out.append(response.body)
        self.held += len(head) + size
        self.log_request(response.status, size)
        self.answered += 1
        return not self.close_connection

    def flush(self):
        """Send as much of what was put as the socket takes; go on once it takes more."""
        try:
            if self.held <= ONE_PIECE:
                self.out = [b"".join(self.out)]
                sent = self.connection.send(self.out[0])
            else:
                step = LOOP_SEND if self.state is READING else self.server.share
                sent = self.connection.sendmsg([memoryview(part)[:step]
                                                for part in self.out[:PARTS]])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.went_away(error.strerror)
            return
        self.held -= sent
        if self.held:
            while sent >= len(self.out[0]):
                sent -= len(self.out.pop(0))
            self.out[0] = memoryview(self.out[0])[sent:]
            self.moving()
            if self.state is READING:
                self.server.send_on(self)
        else:
            self.out = []
            if self.state is SENDING:
                self.server.read_on(self)
            self.after_answer()

    def went_away(self, why):
        """End the connection, and say so: the log already has its answer as sent."""
        self.server.log.info(f"{self.address_string()} went away: {why}")
        self.server.drop(self)

    def given_back(self):
        """A thread has answered, or made the answer that is to be sent."""
        response, self.late = self.late, None
        if response is None:
            self.after_answer()
        else:
            self.put(response)
            self.server.outbox.append(self)       # also where older answers wait in self.out

    def after_answer(self):
        """What was asked so far is answered: go on, or end."""
        if self.close_connection:
            self.server.close_or_linger(self)
            return
        config = self.server.config
        self.deadline = self.server.now + (config.header_timeout if self.partial
                                           else config.idle_timeout)
        if self.buffer and not self.partial:
            self.advance()

    # in a thread

    def answer_slowly(self):
        """Answer a request that may wait for the disk; what is not a file the loop sends."""
        self.asked.may_block = True
        try:
            response = self.server.site.answer(self.asked)
        except Exception:
            response = self.fault()
        if response.file is None or not response.length or not self.has_body():
            response.close()
            self.late = response
        else:
            self.send_with_file(response)

    def send_with_file(self, response):
        """Send what was put, and a part of a file.

        Whatever goes wrong here closes the connection, so that nobody takes a part for all.
        """
        sent = 0
        try:
            self.out.append(self.head(response))
            self.send_heads()
            for sent in self.send_file(response):
                self.moving()
        except Truncated as error:
            self.close_connection = True
            self.server.log.error(f"{printable(self.requestline)}: {error}")
        except OSError as error:
            self.close_connection = True
            self.note = self.note or f" (the client went away: {error.strerror})"
        finally:
            response.close()
            self.server.log.tick(int(time.time()))
            self.log_request(response.status, sent)
            self.answered += 1

    def moving(self):
        """Bytes have gone out: the client has stall_timeout to take more."""
        self.deadline = time.monotonic() + self.server.config.stall_timeout

    def send_heads(self):
        """Send what was put, before a file; raises OSError."""
        data, self.out, self.held = memoryview(b"".join(self.out)), [], 0
        more = getattr(socket, "MSG_MORE", 0)     # Linux: do not send half a packet yet
        self.moving()
        while data:
            try:
                data = data[self.connection.send(data, more):]
                self.moving()
            except BlockingIOError:
                self.wait_writable()

    def send_file(self, response):
        """Send a part of a file; yields how many bytes have gone out so far.

        Raises Truncated if the file ends early, OSError if the client goes away.
        os.sendfile is for TCP only: illumos refuses AF_UNIX, and CPython up to 3.13 may
        report a made-up count for that (gh-154324).  An error from it means that nothing
        was sent by this call, so that copying goes on at the same place.
        """
        copy = None
        by_kernel = (hasattr(os, "sendfile") and sys.version_info >= (3, 9, 1)  # bpo-42237
                     and self.connection.family in (socket.AF_INET, socket.AF_INET6))
        offset, end, step = response.offset, response.offset + response.length, STEP
        while offset < end:
            want = min(step, end - offset)
            try:
                if by_kernel:
                    count = os.sendfile(self.connection.fileno(), response.file, offset, want)
                else:
                    copy = copy or Copier(self.connection, response.file)
                    count = copy(offset, want)
            except BlockingIOError:
                self.wait_writable()
                step = FULL_STEP
                continue
            except OSError as error:
                if not by_kernel or error.errno not in _NO_SENDFILE:
                    raise
                by_kernel = False
                continue
            if not 0 < count <= want:
                raise Truncated(f"truncated at {offset} of {end} bytes (sent {count})")
            offset += count
            yield offset - response.offset

    def wait_writable(self):
        """Wait until the socket takes bytes again, or it is time to see whether it has ended.

        The loop shuts down a socket that has waited too long, which wakes poll on Linux;
        nobody says that it does elsewhere.
        """
        poll = select.poll()
        poll.register(self.connection, select.POLLOUT)
        poll.poll(TICK * 1000)

    # time limits, called by the loop once a second

    def check_time(self, now):
        """Do what is due when a deadline has passed."""
        if self.state in (SENDING, WORKING) and self.deadline < math.inf:
            left = unsent(self.connection)
            if left != self.unsent:
                self.unsent = left
                self.moving()
        if now < self.deadline:
            return
        if self.state in (SENDING, WORKING):
            why = f"cut: the client has taken nothing for {self.server.config.stall_timeout} s"
            if self.state is SENDING:
                self.went_away(why)
            else:
                self.note = f" ({why})"
                self.server.hang_up(self)         # which wakes the thread with an error
        elif self.state is READING and self.partial:
            self.partial = False
            self.started = time.monotonic()
            self.asked = None
            self.refuse(ApiError(408, "RequestTimeout", "the request has not come to its end"))
        else:
            self.server.drop(self)

    # log

    def address_string(self):
        """Who is asking: a number, never a name; behind a Unix socket, whom the proxy names."""
        if self.address:
            return self.address
        if isinstance(self.client_address, tuple):    # not so where a Unix socket has a name
            self.address = self.client_address[0]
            if self.address.startswith("::ffff:"):
                self.address = self.address[7:]
            return self.address
        headers = self.asked.headers if self.asked is not None else {}
        address = headers.get("x-real-ip") or headers.get("x-forwarded-for", "").split(",")[-1]
        return printable(address.strip(), ADDRESS_LIMIT) or "unix"

    def log_request(self, code="-", size="-"):
        """The line of a request: who, what, status, bytes of the body, time taken."""
        log = self.server.log
        if log.level <= INFO:
            took = (time.monotonic() - self.started) * 1000
            line = self.requestline
            if len(line) > LOG_TARGET_LIMIT or not _is_plain(line):
                line = printable(line)
            log.add(f'info {self.address or self.address_string()} "{line}" '
                    f"{code} {size} {took:.1f}ms{self.note}")


# -- servers -----------------------------------------------------------------------------

ACCEPT_BATCH = 32             # connections accepted before those that wait are looked at again
ACCEPT_PAUSE = 0.5            # seconds without accepting after the files ran out
OVERFLOW = 256                # connections above the limit that are told 503 before they close
SPARE_FILES = 64              # file descriptors kept for images, directories and the log
THREAD_IDLE = 10.0            # seconds until a thread without work ends

class Workers:
    """Threads for what may wait: started when none is idle, ended when idle for long."""

    def __init__(self):
        self._jobs = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)

    def submit(self, job):
        """Have a thread call job().  Raises RuntimeError, MemoryError where none can be had."""
        if self._idle.acquire(blocking=False):
            self._jobs.put(job)
        else:
            start_new_thread(self._run, ([job],))     # Thread.start() would wait until it runs

    def _run(self, jobs):
        job = jobs.pop()                  # what it was called with stays until a thread ends
        while True:
            job()
            job = None                    # or the connection would stay until the next one
            self._idle.release()
            try:
                job = self._jobs.get(timeout=THREAD_IDLE)
            except queue.Empty:
                if self._idle.acquire(blocking=False):
                    return
                job = self._jobs.get()    # one was put just now, and it counts on us


class ImageServer(ThreadingHTTPServer):
    """The server on TCP: accepts, holds every connection, and knows all the time limits.

    config, log, site   what it was made with
    now, date           the time of this turn of the loop: monotonic, and for the Date header
    draining            whether it is about to end, and only finishes what it has begun
    share               bytes that one full socket is given in this turn of the loop
    """

    request_queue_size = 1024             # a fleet that boots imports all at once

    def __init__(self, config, log):
        self.config, self.log = config, log
        self.site = Site(config, Store(config, log), log)
        self.draining = False
        self._connections = set()
        self.outbox = []                  # handlers with answers to send, in this turn
        self.share = LOOP_STEP
        self._workers = Workers()
        self._returned = collections.deque()
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._short = False               # accept has failed, and the log says so
        self._resume_accept = None        # when to accept again, after the files ran out
        self._cut_at = None               # when draining ends (monotonic); -inf: at once
        self._second = 0
        self._read_clock()
        self._ended = threading.Event()
        host, port = self.choose_address()
        super().__init__((host, port), Handler)

    def choose_address(self):
        """The address to bind, and address_family with it.  Raises UserError."""
        host, port = self.config.listen
        if not host:
            if socket.has_dualstack_ipv6():
                self.address_family = socket.AF_INET6
                return "::", port
            return "0.0.0.0", port
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                       flags=socket.AI_PASSIVE | socket.AI_NUMERICHOST)
        except (OSError, UnicodeError):
            raise UserError(f"listen: {host!a} is no IP address", EXIT_CONFIG)
        self.address_family = found[0][0]
        return host, port

    def server_bind(self):
        """Bind without asking DNS for our name, as http.server does (it may hang there)."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.address_family == socket.AF_INET6 and self.server_address[0] == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # What is accepted inherits it, on Linux; answers are sent whole, so it matters little.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def server_activate(self):
        super().server_activate()
        self.socket.setblocking(False)

    def describe(self) -> str:
        """Where it listens, for the log."""
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @staticmethod
    def own_host(connection) -> str:
        """What stands for the Host header of a client of HTTP/1.0 that sends none."""
        host, port = connection.getsockname()[:2]
        host = (host[7:] if host.startswith("::ffff:") else host).partition("%")[0]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _read_clock(self):
        """What time it is for this turn of the loop; dates are made once a second."""
        self.now = time.monotonic()
        now = int(time.time())
        if now != self._second:
            self._second, self.date = now, http_date(now).encode()
            self.log.tick(now)

    # the loop

    def serve_forever(self, poll_interval=TICK):
        """Serve until shutdown() or a signal; then finish what has begun, for drain_time."""
        config = self.config
        # So often that no limit is overrun by more than a quarter.
        tick = min(poll_interval, config.header_timeout / 4, config.idle_timeout / 4,
                   config.stall_timeout / 4)
        looked = flushed = self.now
        self._selector.register(self.socket, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._take_back)
        try:
            while self._cut_at is None or self._connections and self.now < self._cut_at:
                events = self._selector.select(LOG_DELAY if self.log.pending else tick)
                self._read_clock()
                self.share = max(ONE_PIECE, min(LOOP_STEP, TURN // (len(events) or 1)))
                for key, _ in events:
                    try:
                        key.data()
                    except Exception:
                        self.handle_error(key.data.__self__, None)
                self._send_out()          # first, as what is answered has a new deadline
                if self.now - looked >= tick:
                    looked = self.now
                    self._check_deadlines()
                    self._send_out()
                if self.now - flushed >= LOG_DELAY:
                    flushed = self.now
                    self.log.flush()
                if self._cut_at is not None and not self.draining:
                    self._drain()
        finally:
            self._end()

    def _accept(self):
        for _ in range(ACCEPT_BATCH):
            try:
                request, address = self.get_request()
            except BlockingIOError:
                self._short = False       # the queue is empty: whatever was short, is not
                return
            except OSError as error:
                if error.errno in SHORTAGE:
                    if not self._short:
                        self._short = True
                        self.log.error(f"cannot accept connections: {error.strerror}")
                    self._selector.unregister(self.socket)
                    self._resume_accept = self.now + ACCEPT_PAUSE
                    return
                continue                  # the client has gone before we came
            self.process_request(request, address)

    def process_request(self, request, client_address):
        """Take up a connection; at the limit, tell it to come back, without a thread."""
        if len(self._connections) >= self.config.max_connections + OVERFLOW:
            request.close()
            return
        handler = self.RequestHandlerClass(request, client_address, self)
        self._selector.register(request, selectors.EVENT_READ, handler.readable)
        self._connections.add(handler)
        if len(self._connections) > self.config.max_connections:
            self.refuse(handler, "too many connections")

    def refuse(self, handler, why):
        """Answer 503 in place of whatever was asked."""
        self.log.warn(f"{handler.address_string()} is told to come back: {why}")
        handler.refuse(ApiError(503, "ServiceUnavailableError", why,
                               fields=b"Retry-After: 5\r\n"))

    def _send_out(self):
        """Send the answers of this turn."""
        while self.outbox:
            handlers, self.outbox = self.outbox, []
            for handler in handlers:
                if handler.state is READING and handler.held:
                    try:
                        handler.flush()
                    except Exception:
                        self.handle_error(handler, None)

    def handle_error(self, request, client_address):
        """A fault of our own that nothing has caught: only this connection has to go."""
        if request in self._connections and request.state is not WORKING:
            self.drop(request)
        try:
            self.log.exception("internal error")
        except Exception:
            pass                          # not even that: the others are still to be served

    def _check_deadlines(self):
        """End what has taken too long."""
        now = self.now
        for handler in list(self._connections):
            if now >= handler.deadline or handler.state in (SENDING, WORKING):
                try:
                    handler.check_time(now)
                except Exception:
                    self.handle_error(handler, None)
        if self._resume_accept is not None and now >= self._resume_accept and not self.draining:
            self._resume_accept = None
            self._selector.register(self.socket, selectors.EVENT_READ, self._accept)

    # states of a connection: each transition is one of these

    def send_on(self, handler):
        """READING to SENDING: nothing is read until all that was put is sent."""
        handler.state = SENDING
        self._selector.modify(handler.connection, selectors.EVENT_WRITE, handler.flush)

    def read_on(self, handler):
        """SENDING to READING."""
        handler.state = READING
        self._selector.modify(handler.connection, selectors.EVENT_READ, handler.readable)

    def work(self, handler):
        """READING to WORKING: have a thread answer."""
        self._selector.unregister(handler.connection)
        handler.state, handler.deadline = WORKING, math.inf
        try:
            self._workers.submit(lambda: self._do(handler))
        except (RuntimeError, MemoryError):       # can't start new thread
            handler.state = READING
            self._selector.register(handler.connection, selectors.EVENT_READ, handler.readable)
            self.refuse(handler, "no thread to answer with")

    def _do(self, handler):
        """In a thread: answer, and give the connection back to the loop."""
        try:
            handler.answer_slowly()
        except Exception:
            handler.close_connection = True
            self.log.exception("internal error")
        finally:
            handler.deadline = math.inf
            self._returned.append(handler)
            self._wake()

    def _take_back(self):
        """WORKING to READING: with an answer to send, or after it."""
        self._wakeup.recv(4096)
        while self._returned:
            handler = self._returned.popleft()
            handler.state = READING
            handler.connection.setblocking(False)
            try:
                self._selector.register(handler.connection, selectors.EVENT_READ,
                                        handler.readable)
                handler.given_back()
            except Exception:
                self.handle_error(handler, None)

    def close_or_linger(self, handler):
        """READING to CLOSED, by way of LINGERING where the client may still be sending.

        Closing a socket that holds unread bytes resets it, and the client would lose the
        answer that it was just sent (imgadm: "write EPIPE").
        """
        try:                              # what came while an answer was sent, nobody has read
            waits = handler.unread or handler.buffer or handler.connection.recv(
                1, socket.MSG_PEEK)
        except OSError:
            waits = False
        if not waits:
            self.drop(handler)
            return
        handler.state, handler.buffer = LINGERING, ""
        handler.deadline = self.now + LINGER
        try:
            handler.connection.shutdown(socket.SHUT_WR)
        except OSError:                   # it has gone already
            self.drop(handler)

    def drop(self, handler):
        """Any but WORKING to CLOSED."""
        handler.state = CLOSED
        with contextlib.suppress(KeyError):       # register or modify may have failed
            self._selector.unregister(handler.connection)
        handler.connection.close()
        self._connections.discard(handler)

    @staticmethod
    def hang_up(handler):
        """End a connection that a thread is working on: what it does next fails."""
        try:
            handler.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass                          # the client was faster

    # the end

    def _wake(self):
        try:
            self._waker.send(b"\0")
        except (BlockingIOError, OSError):
            pass                          # full: it will wake; closed: it has ended

    def stop(self, at_once=False):
        """Have the loop end: now, or after drain_time.  Safe in a signal handler."""
        self._cut_at = -math.inf if at_once else time.monotonic() + self.config.drain_time
        self._wake()

    def shutdown(self):
        """Have the loop end, and wait until it has; from another thread."""
        self.stop()
        self._ended.wait()

    def _drain(self):
        """No new connections, no further requests; what has begun is finished."""
        self.draining = True
        if self._resume_accept is None:
            self._selector.unregister(self.socket)
        self.server_close()
        working = 0
        for handler in list(self._connections):
            handler.close_connection = True
            if handler.state in (SENDING, WORKING):
                working += 1
            elif not handler.partial and handler.state is READING:
                self.drop(handler)
        if working:
            self.log.info(f"finishing {working} answers, for {self.config.drain_time} s at most")

    def _end(self):
        for handler in list(self._connections):
            self.hang_up(handler)
        self.server_close()
        self.log.flush()
        self._ended.set()


@contextlib.contextmanager
def socket_lock(path):
    """Within it no other server looks at, removes or binds the socket `path`.

    The lock is a file beside it, which is removed at the end: who waited for one that has
    gone begins anew.  One that a killed server left holds no lock, and is taken over.  Raises
    OSError where that file cannot be written.
    """
    while True:
        with open(path + ".lock", "wb") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:
                try:
                    yield
                finally:
                    os.unlink(lock.name)
                return


class UnixImageServer(ImageServer):
    """The same on a Unix socket, for nginx on the same machine."""

    address_family = socket.AF_UNIX
    _identity = None                      # (device, inode) of our socket file while it is there

    def choose_address(self):
        return self.config.listen, None

    def server_bind(self):
        """Bind and listen, replacing the socket file that a dead server has left.

        Raises UserError where a server answers there, or what is there is no socket.
        """
        self.server_address = path = self.config.listen
        with socket_lock(path):
            self._clear(path)
            # illumos asks for read and write permission of who connects (so_ux_lookup).
            mask = os.umask(0o777 & ~int(self.config.socket_mode, 8))
            try:
                self.socket.bind(path)
            finally:
                os.umask(mask)
            status = os.stat(path)
            self._identity = status.st_dev, status.st_ino
            self.socket.listen(self.request_queue_size)   # until then it looks like a dead one's

    @staticmethod
    def _clear(path):
        """Remove what a dead server has left at `path`; nothing else."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                if not stat.S_ISSOCK(os.lstat(path).st_mode):
                    raise UserError(f"{path} is there already, and it is no socket", EXIT_CONFIG)
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)           # nobody listens: a server died here
            except FileNotFoundError:
                pass                      # the last one has ended well: nothing to remove
            else:
                raise UserError(f"another server listens on {path}")

    def describe(self):
        return self.server_address

    @staticmethod
    def own_host(connection):
        return "localhost"

    def server_close(self):
        """Stop listening, and remove the socket file if it is ours: once, since the next
        server's may have the same inode number while we still finish downloads.
        """
        super().server_close()
        identity, self._identity = self._identity, None
        if identity is not None:
            try:
                with socket_lock(self.server_address):
                    status = os.stat(self.server_address)
                    if (status.st_dev, status.st_ino) == identity:
                        os.unlink(self.server_address)
            except OSError:
                pass                      # somebody else has removed it


# -- commands ----------------------------------------------------------------------------

def start(config, log) -> ImageServer:
    """A server that listens.  Raises UserError: status 96 where trying again will not help."""
    kind = UnixImageServer if isinstance(config.listen, str) else ImageServer
    try:
        return kind(config, log)
    except PermissionError as error:
        hint = ("" if isinstance(config.listen, str) or config.listen[1] >= 1024 else
                "; a port below 1024 needs the privilege net_privaddr, or choose --listen 8080")
        raise UserError(f"cannot listen on {config.listen_port}: {error.strerror}{hint}",
                      EXIT_CONFIG)
    except OSError as error:
        transient = error.errno == errno.EADDRINUSE
        raise UserError(f"cannot listen on {config.listen_port}: {error.strerror or error}",
                      1 if transient else EXIT_CONFIG)


def raise_file_limit(config, log):
    """Have as many file descriptors as connections and their files may need."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * config.max_connections + SPARE_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (ValueError, OSError) as error:
            log.warn(f"cannot raise the limit of open files: {error}")
    if soft != resource.RLIM_INFINITY and soft - SPARE_FILES < config.max_connections:
        config.max_connections = max(1, soft - SPARE_FILES)
        log.warn(f"{soft} files may be open: max_connections is {config.max_connections}")


def run_serve(config, _):
    """Serve until SIGTERM or SIGINT; a second one ends it at once."""
    log = Log(config.loglevel)
    for warning in config.warnings:
        log.warn(warning)
    config.check_serve_dir()
    raise_file_limit(config, log)
    server = start(config, log)

    def end(number, frame):
        server.stop(at_once=server.draining)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGHUP, lambda number, frame: log.info(
        "SIGHUP: nothing to read again, the directory is always read as it is"))
    log.info(f"imgserver {__version__} serves {printable(config.serve_dir)} on "
             f"{printable(server.describe())}")
    log.flush()
    server.serve_forever()
    log.info("ended")
    log.flush()
    return 0


class Progress:
    """Bytes and rate on a terminal's stderr, some times a second; nothing anywhere else."""

    def __init__(self, what, quiet=False):
        self.what = what
        self.shown = not quiet and sys.stderr.isatty()
        self.began = self.last = time.monotonic()

    def __call__(self, size):
        now = time.monotonic()
        if self.shown and now - self.last >= 0.25:
            self.last = now
            rate = size / (now - self.began) / 1e6
            sys.stderr.write(f"\r{self.what}: {size / 1e6:.0f} MB, {rate:.0f} MB/s\033[K")
            sys.stderr.flush()

    def clear(self):
        if self.shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


def parse_field(text):
    """FIELD=VALUE, the value JSON if it parses, else a text; as imgadm create takes them."""
    name, sign, value = text.partition("=")
    if not sign or not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise UserError(f"{text!a} is not FIELD=VALUE")
    if name in ("v", "uuid", "files", "state"):
        raise UserError(f"{name} cannot be set")
    try:
        return name, parse_json(os.fsencode(value))
    except ValueError:
        return name, value


def new_uuid() -> str:
    import uuid
    return str(uuid.uuid4())


def checked_uuid(text) -> str:
    """`text`, if it is a UUID as imgadm has them.  Raises UserError."""
    if not is_uuid(text):
        raise UserError(f"{text!a} is not a UUID in lower case", 2)
    return text


def manifest_to_import(config, options) -> dict:
    """The manifest that the options of `import` ask for.  Raises UserError."""
    texts = options.words
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{text!a} is not UTF-8")
    given = {"os": options.os, "type": options.type, "origin": options.origin}
    if options.manifest:
        try:
            with interruptible(open)(options.manifest, "rb") as file:
                data = interruptible(file.read)(MANIFEST_LIMIT + 1)
            if len(data) > MANIFEST_LIMIT:
                raise UserError(f"{options.manifest} is larger than {MANIFEST_LIMIT} bytes")
            manifest = parse_object(data)
        except OSError as error:
            raise UserError(f"cannot read {options.manifest}: {error.strerror}")
        except ValueError as error:
            raise UserError(f"{options.manifest} {error}")
        manifest = {key: value for key, value in manifest.items() if key not in ("state", "icon")}
        if not is_v1(manifest):
            manifest = {"v": 2, "uuid": None, "owner": NOBODY, "public": True, "disabled": False,
                        "published_at": stamp(time.time()), **manifest}
        manifest.update({key: value for key, value in given.items() if value is not None})
        manifest.update(map(parse_field, texts))
        manifest["uuid"] = options.uuid or manifest.get("uuid") or new_uuid()
    else:
        if len(texts) < 3:
            raise UserError("NAME VERSION DESCRIPTION are needed, or --manifest FILE", 2)
        given.update(zip(("name", "version", "description"), texts))
        given.update(map(parse_field, texts[3:]))
        manifest = new_manifest(config, options.uuid or new_uuid(), given)
    if not isinstance(manifest["uuid"], str) or not is_uuid(manifest["uuid"]):
        raise UserError(f"{manifest['uuid']!a} is not a UUID in lower case")
    files = manifest.get("files", [])
    if not isinstance(files, list) or len(files) > 1 \
            or not all(isinstance(item, dict) for item in files):
        raise UserError("files of the manifest must hold one file")
    check_fields(manifest)
    if not options.stream_check and manifest["type"] in STREAM_TYPES.values():
        raise UserError(f"a {manifest['type']} is a ZFS stream: --no-stream-check needs "
                      "another --type")
    choose_channels(config, manifest)
    return manifest


def run_import(config, options):
    """Take an image from standard input or --file, and print its uuid."""
    manifest = manifest_to_import(config, options)
    if manifest.get("origin") and options.stream_check and not os.path.exists(
            os.path.join(config.serve_dir, manifest["origin"], MANIFEST)):
        raise UserError(f"its origin, image {manifest['origin']}, is not on this server")
    if options.file in (None, "-"):
        os.set_blocking(0, True)          # the other end may have had it otherwise
        source = open(0, "rb", closefd=False)
        if source.isatty():
            raise UserError("the image is read from standard input: `... < FILE`", 2)
    else:
        try:
            source = interruptible(open)(options.file, "rb")
        except OSError as error:
            raise UserError(f"cannot read {options.file}: {error.strerror}")
    progress = Progress("imported", options.quiet)
    try:
        Import(config, manifest, options.stream_check, progress).run(source, options.activate)
    finally:
        progress.clear()
    try:
        print(manifest["uuid"], flush=True)
    except OSError as error:
        raise OSError(error.errno, f"image {manifest['uuid']} is stored, but that cannot be "
                                   f"printed: {error.strerror}")
    return 0


def run_activate(config, options):
    """Put an image on show that `import -n` has left unactivated."""
    activate(config, checked_uuid(options.uuid))
    return 0


def run_discard(config, options):
    """Throw away an image that is not active."""
    discard(config.serve_dir, checked_uuid(options.uuid))
    return 0


def check_image(reader, config, uuid, quiet) -> FileScan:
    """Read all of an image, and hold it against its manifest.  Raises BadImage."""
    image = reader.read(uuid, os.path.join(config.serve_dir, ""), (IMGAPI,))
    if image is None:
        raise BadImage(f"there is no {MANIFEST}")
    if image.problem:
        raise BadImage(image.problem)
    found = FileScan()
    progress = Progress(f"{uuid} {image.file}", quiet)
    try:
        fd, _ = open_regular(os.path.join(image.directory, image.file))
        with open(fd, "rb", buffering=0) as file:
            found.run(interruptible(file.read), progress=progress)
        compare(found, image)
    except OSError as error:
        raise BadImage(f"{image.file}: {error.strerror}")
    except BadImage as error:
        raise BadImage(f"{image.file}: {error}")
    finally:
        progress.clear()
    return found


def compare(found, image):
    """Hold what was found against what the manifest says.  Raises BadImage."""
    is_stream = found.stream.type is not None or image.type in STREAM_TYPES.values()
    pairs = [("size", found.size, image.size), ("sha1", found.sha1, image.sha1)]
    if image.md5 is not None:
        pairs.append(("md5", found.md5, image.md5.hex()))
    if is_stream:
        promised = image.fields()["files"][0]["compression"]
        pairs.append(("compression", found.compression, promised))
    for name, value, promised in pairs:
        if value != promised:
            raise BadImage(f"its {name} is {value}, not {promised}")
    trouble = is_stream and found.stream.trouble()
    if trouble:
        raise BadImage(trouble)


def record_md5(directory, found):
    """Write the md5 of an image's file into its manifest, for Content-MD5; by rename.

    Its time stays, which may be what is shown as published_at.  Not where the manifest has
    become another since the file was read.  Raises BadImage where it cannot be written.
    """
    try:
        manifest, _ = read_manifest(directory)
        file = manifest["files"][0]
        if file["sha1"].lower() != found.sha1 or file.get("md5") == found.md5:
            return
    except (OSError, BadImage, LookupError, TypeError, AttributeError):
        return
    file["md5"] = found.md5
    try:
        replace_file(os.path.join(directory, MANIFEST),
                     (render_json(manifest) + "\n").encode(), keep_time=True)
    except UserError as mistake:
        raise BadImage(str(mistake))


def incoming(serve_dir):
    """Yield (uuid, whether it is whole, seconds since its last change) of what is not active."""
    for name in sorted(os.listdir(serve_dir)):
        if name.startswith(INCOMING) and is_uuid(name[len(INCOMING):]):
            path = os.path.join(serve_dir, name)
            try:
                times = [os.stat(path).st_mtime]
                times += [entry.stat(follow_symlinks=False).st_mtime
                          for entry in os.scandir(path)]
            except OSError:
                continue                  # it has just been activated, or is no directory
            yield (name[len(INCOMING):], os.path.exists(os.path.join(path, MANIFEST)),
                   time.time() - max(times))


def run_check(config, options):
    """Read every image again, and say which are not what their manifests promise."""
    config.check_serve_dir()
    reader = ImageReader(config)
    uuids = [checked_uuid(text) for text in options.uuid]
    uuids = uuids or sorted(name for name in os.listdir(config.serve_dir) if is_uuid(name))
    say = interruptible(functools.partial(print, flush=True))     # to a pager, it may take long
    bad = 0
    for uuid in uuids:
        try:
            found = check_image(reader, config, uuid, options.quiet)
            if options.record:
                record_md5(os.path.join(config.serve_dir, uuid), found)
        except BadImage as error:
            bad += 1
            say(f"{uuid}: {printable(str(error))}")
    for name in os.listdir(config.serve_dir) if options.clean else ():
        if name.startswith(DISCARDED):    # somebody was killed while removing it
            shutil.rmtree(os.path.join(config.serve_dir, name), ignore_errors=True)
    for uuid, whole, age in [] if options.uuid else list(incoming(config.serve_dir)):
        what = "waits to be activated" if whole else "was never finished, or is still coming"
        if options.clean and not whole and age > ABANDONED:
            try:
                discard(config.serve_dir, uuid)
                what = "was never finished: removed"
            except UserError as mistake:
                what = f"was never finished: {mistake}"
        say(f"{INCOMING}{uuid}: {what}; last change {age / 3600:.0f} hours ago")
    say(f"{len(uuids) - bad} of {len(uuids)} images are sound"
        + ("" if uuids else f": there is none in {config.serve_dir}"))
    return 1 if bad else 0


def run_config(config, options):
    """Write a creator's and a vendor's UUID into config.json, unless it has them."""
    path = os.path.abspath(options.config or default_config())
    values = {}
    if os.path.exists(path):
        with open(path, "rb") as file:    # main has read it, so that it is sound
            values = parse_json(file.read())
    before = dict(values)
    for key in ("image-creator-uuid", "image-vendor-uuid"):
        values[key] = values.get(key) or new_uuid()
    if values != before:
        replace_file(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
    print(f"creator {values['image-creator-uuid']}, vendor {values['image-vendor-uuid']}")
    return 0


SMF_MANIFEST = """\
<?xml version="1.0"?>
<!DOCTYPE service_bundle SYSTEM "/usr/share/lib/xml/dtd/service_bundle.dtd.1">
<!-- Made by `imgserver.py smf`: svccfg import image-server.smf.xml -->
<service_bundle type="manifest" name="image-server">
  <service name="site/image-server" type="service" version="1">
    <create_default_instance enabled="false"/>
    <dependency name="network" grouping="require_all" restart_on="error" type="service">
      <service_fmri value="svc:/milestone/network:default"/>
    </dependency>
    <dependency name="filesystem" grouping="require_all" restart_on="error" type="service">
      <service_fmri value="svc:/system/filesystem/local:default"/>
    </dependency>
    <method_context working_directory="{directory}">
      <method_credential user="{user}" group="{group}"
        privileges="{privileges}"/>
      <method_environment>
        <envvar name="PATH" value="/usr/bin:/usr/sbin"/>
        <envvar name="LC_ALL" value="C.UTF-8"/>
      </method_environment>
    </method_context>
    <exec_method type="method" name="start" timeout_seconds="60"
      exec="{command}"/>
    <exec_method type="method" name="stop" timeout_seconds="{stop}" exec=":kill"/>
    <property_group name="startd" type="framework">
      <!-- It stays in the foreground, and is started again whenever it ends. -->
      <propval name="duration" type="astring" value="child"/>
      <propval name="ignore_error" type="astring" value="core,signal"/>
    </property_group>
    <stability value="Evolving"/>
    <template>
      <common_name><loctext xml:lang="C">image server for imgadm</loctext></common_name>
    </template>
  </service>
</service_bundle>
"""


def run_smf(config, options):
    """Print the SMF manifest for this directory, this user and this Python."""
    directory = os.path.abspath(options.directory or os.path.dirname(__file__))
    # As a module of the working directory it is read from __pycache__, where `make` compiles it:
    # compiling costs each start 8 MiB that never come back.  -S: nothing but the standard library.
    command = [options.python or sys.executable, "-ES", "-m", "imgserver"]
    if options.config:
        command += ["--config", os.path.abspath(options.config)]
    if options.dir is not None:
        command += ["--dir", config.serve_dir]
    if options.listen is not None:
        command += ["--listen", options.listen]
    if options.loglevel is not None:
        command += ["--loglevel", options.loglevel]
    privileges = "basic,!file_link_any,!proc_info,!proc_session"
    if not isinstance(config.listen, str) and config.listen[1] < 1024:
        privileges += ",net_privaddr"
    user, group = options.user, options.group
    if not user:
        import pwd
        try:
            user = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            user = os.getuid()            # which SMF takes as well
    values = {"directory": directory, "user": user, "group": group or ":default",
              "privileges": privileges, "command": shlex.join(command).replace("%", "%%"),
              "stop": int(config.drain_time) + 30}
    sys.stdout.write(SMF_MANIFEST.format(
        **{key: html.escape(str(value)) for key, value in values.items()}))
    return 0


def default_config() -> str:
    """The path of the config.json beside this file."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "config.json")


def option_parser() -> argparse.ArgumentParser:
    """The command line; `run` of what it parses is the command's function."""
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    shared.add_argument("--config", metavar="FILE",
                        help="the configuration (default: config.json beside imgserver.py)")
    shared.add_argument("--dir", metavar="DIR",
                        help="the directory of images (default: serve_dir of the configuration)")
    parser = argparse.ArgumentParser(
        prog="imgserver.py", parents=[shared],
        description="An image server for SmartOS: serves a directory of images to imgadm.",
        epilog="Without a command it serves.  `imgserver.py COMMAND --help` tells more.")
    parser.set_defaults(run=run_serve)
    parser.add_argument("--version", action="version", help="print the version",
                        version=f"imgserver {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")

    def command(name, run, text):
        sub = commands.add_parser(name, parents=[shared], help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    serve = command("serve", run_serve, "serve the images (the default)")
    for each in (parser, serve):
        each.add_argument("--listen", metavar="PORT|ADDRESS:PORT|/PATH", default=argparse.SUPPRESS,
                          help="where to listen: TCP, or a Unix socket; port 0 takes any "
                               "(default: listen_port of the configuration, 80)")
        each.add_argument("--loglevel", metavar="LEVEL", default=argparse.SUPPRESS,
                          help="least level to log: " + ", ".join(LEVELS)
                               + " (default: loglevel of the configuration, info)")
    sub = command("import", run_import, "publish an image, read from standard input")
    sub.usage = ("%(prog)s [OPTION ...] NAME VERSION DESCRIPTION [FIELD=VALUE ...] < IMAGE\n"
                 "       %(prog)s [OPTION ...] --manifest FILE [FIELD=VALUE ...] < IMAGE")
    sub.add_argument("words", nargs="*", metavar="NAME VERSION DESCRIPTION [FIELD=VALUE ...]",
                     help="what it is; any field of a manifest, as JSON or a text")
    sub.add_argument("--manifest", metavar="FILE", help="take the fields from this manifest")
    sub.add_argument("--file", metavar="FILE", help="read the image from FILE")
    sub.add_argument("--uuid", metavar="UUID", help="its uuid (default: a new one)")
    sub.add_argument("--origin", metavar="UUID", help="the image an incremental one builds on")
    sub.add_argument("--os", help="its operating system (default: smartos)")
    sub.add_argument("--type", help="its type (default: zone-dataset)")
    sub.add_argument("-n", "--no-activate", dest="activate", action="store_false",
                     help="leave it unactivated, for `activate` or `discard`")
    sub.add_argument("--no-stream-check", dest="stream_check", action="store_false",
                     help="it is no ZFS send stream")
    sub.add_argument("-q", "--quiet", action="store_true", help="no progress on a terminal")
    command("activate", run_activate, "put an unactivated image on show").add_argument(
        "uuid", metavar="UUID")
    command("discard", run_discard, "throw an image away that is not active").add_argument(
        "uuid", metavar="UUID")
    sub = command("check", run_check, "read every image again, and compare with its manifest")
    sub.add_argument("uuid", nargs="*", metavar="UUID", help="only these images")
    sub.add_argument("--record", action="store_true",
                     help="write the md5 of sound images into their manifests")
    sub.add_argument("--clean", action="store_true",
                     help="remove what was never finished, a day after its last change")
    sub.add_argument("-q", "--quiet", action="store_true", help="no progress on a terminal")
    command("config", run_config, "write creator and vendor UUIDs into config.json, once")
    sub = command("smf", run_smf, "print the SMF manifest for this directory and Python")
    sub.add_argument("--directory", help="where imgserver.py is installed (default: here)")
    sub.add_argument("--python", help="the interpreter (default: this one)")
    sub.add_argument("--user", help="who runs it (default: you)")
    sub.add_argument("--group", help="the group (default: the user's)")
    return parser


def load_config(options) -> Config:
    """The configuration file with the command line's options over it.  Raises UserError."""
    config = Config.load(options.config or default_config(), options.config is not None)
    if options.dir is not None:
        config.serve_dir = os.path.abspath(options.dir)
    if options.listen is not None:
        try:
            config.listen_port = options.listen
            config.listen = parse_listen(options.listen, any_port=True)
        except ValueError as error:
            raise UserError(f"--listen {error}, not {options.listen!a}", EXIT_CONFIG)
    if options.loglevel is not None:
        if options.loglevel not in LEVELS:
            raise UserError(f"--loglevel must be one of {', '.join(LEVELS)}", EXIT_CONFIG)
        config.loglevel = options.loglevel
    return config


def main(arguments=None) -> int:
    """Run a command.  Returns its exit status; user mistakes are one sentence on stderr."""
    for fd in (0, 1, 2):                  # or the next socket would be taken for stderr
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Given here and not as defaults of the parser, where a command would set them once more.
    options = option_parser().parse_args(arguments, argparse.Namespace(
        config=None, dir=None, listen=None, loglevel=None))
    try:
        config = load_config(options)
        if options.run is not run_serve:
            hold_signals()
        status = options.run(config, options)
        if sys.stdout is not None:        # it is where there was none at the start
            sys.stdout.flush()
        return status
    except RuntimeError as error:         # can't start new thread
        sys.stderr.write(f"imgserver: {error}\n")
        return 1
    except OSError as error:              # commands turn theirs into a UserError, but for print
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)      # or Python would fail at its end again
        sys.stderr.write(f"imgserver: {error.strerror}\n")
        return 1
    except UserError as mistake:
        try:
            text = printable(str(mistake)).replace('\\"', '"')
            sys.stderr.write(f"imgserver: {text}\n")
        except (OSError, AttributeError):
            pass                          # nobody to tell; the exit status does
        if mistake.status > 128:          # a signal: no line that nobody reads may delay the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return mistake.status


if __name__ == "__main__":
    sys.exit(main())
