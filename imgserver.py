#!/usr/bin/env python3
"""imgserver - an image server for SmartOS in one file.

Serves a plain directory of images to every imgadm, over both APIs it has spoken:

    serve_dir/<uuid>/manifest.json      v1 (DSAPI) or v2 (IMGAPI), as its author wrote it
    serve_dir/<uuid>/<file>             the ZFS stream, usually compressed
    serve_dir/<uuid>/icon.png|jpg|gif   optional
    serve_dir/.incoming-<uuid>/         an image that is not active yet

    DSAPI        GET  /datasets  /datasets/:uuid  /datasets/:uuid/:file
    IMGAPI       GET  /images  /images/:uuid  /images/:uuid/file  /images/:uuid/icon  /channels
    publishing   POST /images  /images/:uuid  /images/:uuid/acl
                 PUT  /images/:uuid/file  /images/:uuid/icon
                 DELETE /images/:uuid  /images/:uuid/icon
    all          GET  /ping  / (the page)  /metrics

The directory is the database: a whole image is on show with the next request, an unsound one
is left out with one line in the log, and serving never changes a file.  Python 3.9 or newer
is all it needs.

The parts, each resting only on those above it: constants - errors - log - JSON -
configuration - manifests - store - image files - publishing - users - mirroring - HTTP
messages - routes - connections - servers - commands.

Not here: TLS and HTTP/2 (put nginx in front), several files for one image, and the
parts of IMGAPI that need a data centre.

MIT licence; see LICENSE.
"""

# Python 2.7 and 3.6 refuse this line, and the error shows it.
from __future__ import annotations; imgserver: "needs Python 3.9 or newer"

import sys

if sys.version_info < (3, 9):
    sys.stderr.write("imgserver needs Python 3.9 or newer, not %d.%d\n" % sys.version_info[:2])
    sys.exit(96)              # as EXIT_CONFIG
# No module is imported from the program's directory, which others may be able to write.  With -I
# (or -P, since 3.11) it is not in sys.path.
if __name__ == "__main__" and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    del sys.path[0]

import argparse
import array
import base64
import collections
import contextlib
import copy
import datetime
import email.utils
import errno
import fcntl
import functools
import hashlib
import hmac
import html
import http
import itertools
import json
import math
import operator
import os
import queue
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import stat
import struct
import threading
import time
import traceback
import urllib.parse
import weakref
from _thread import start_new_thread
from bisect import bisect_left
from http.server import ThreadingHTTPServer

__version__ = "2.0.0"

# -- constants ---------------------------------------------------------------------------
#
# Shared by several parts; the limits of one part stand at its head.

DSAPI, DSAPI_V2, IMGAPI = RENDERINGS = "dsapi", "dsapi_v2", "imgapi"    # forms of a manifest
NOBODY = "00000000-0000-0000-0000-000000000000"   # owner of images without one (imgadm, IMGAPI)
MANIFEST = "manifest.json"
INCOMING = ".incoming-"                           # + uuid: an image that is not active yet
DISCARDED = ".discarded-"                         # + uuid.hex: one that is being removed
ICONS = {"icon.png": "image/png", "icon.jpg": "image/jpeg", "icon.gif": "image/gif"}
JSON_TYPE = b"Content-Type: application/json\r\n"      # exactly: imgadm's dsapi ping compares it
CORS = b"Access-Control-Allow-Origin: *\r\n"
VARY = b"Vary: Accept\r\n"                       # DSAPI's manifests: v1 or v2
CACHE_NOTHING = b"Cache-Control: private, no-store\r\n"   # for one user, or one moment, alone

# Errors of the system rather than of the file.
SHORTAGE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))
# Errors of open_regular for a file that is missing, or not to be served.
NOT_THERE = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL, errno.ENXIO))

EXIT_CONFIG = 96              # SMF_EXIT_ERR_CONFIG: maintenance, not restart after restart

_UUID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
is_uuid = _UUID.fullmatch                         # lower case only, as imgadm and IMGAPI
is_count = re.compile("0*[1-9][0-9]{0,8}").fullmatch      # from 1 on


# -- errors ------------------------------------------------------------------------------

class ApiError(Exception):
    """An error answer to a client: status, and code, message and errors as IMGAPI has them.

    fields: further header lines, as bytes that end in CRLF.
    """

    def __init__(self, status, code, message, errors=None, fields=b""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.errors, self.fields = errors, fields


class NeedsThread(Exception):
    """The answer is not in memory: call again in a thread, which may block."""


class ClientGone(Exception):
    """The client disconnected in the middle of a body: no answer is sent; the text says why."""


class BadImage(Exception):
    """An image that cannot be shown; the text names the file and the reason."""


class UserError(Exception):
    """A user error: main() prints it and exits with `exit_status`."""

    def __init__(self, message, exit_status=1):
        super().__init__(message)
        self.exit_status = exit_status


class AddressInUse(UserError):
    """The address has a listener already, perhaps this very server."""


def bad_request(message) -> ApiError:
    return ApiError(400, "BadRequestError", message)


def not_found(message) -> ApiError:
    return ApiError(404, "ResourceNotFound", message)


def invalid(field, message, code="Invalid", kind="InvalidParameter") -> ApiError:
    """The answer to one parameter or field that cannot be; kind: as IMGAPI's code of it all."""
    return ApiError(422, kind, message, [{"field": field, "code": code}])


def unavailable(message, seconds) -> ApiError:
    """The answer to a client that may try again in some seconds."""
    return ApiError(503, "ServiceUnavailableError", message,
                    fields=b"Retry-After: %d\r\n" % seconds)


# -- log ---------------------------------------------------------------------------------

ADDRESS_LIMIT = 45            # characters of an IPv6 address that maps IPv4, the longest
LOG_DELAY = 0.2               # seconds a line may wait for others, so that a burst is one write
LOG_LIMIT = 1 << 20           # bytes of log queued while stderr is stalled, then dropped
TRACEBACK_LIMIT = 4000        # characters of a traceback in one log line, the last ones
LOG_TARGET_LIMIT = 1000       # characters of a client's text in one log line
AGENT_LIMIT = 200             # characters of a User-Agent there; imgadm's has some 90
AGENTS_KEPT = 64              # such texts that are cached, of up to HEAD_LIMIT bytes each

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


@functools.lru_cache(AGENTS_KEPT)
def agent_name(text) -> str:
    """A User-Agent as it may stand in a log line."""
    return printable(text, AGENT_LIMIT)


def client_name(peer, headers) -> str:
    """A client as the log names it: its address, or the one that a proxy on the Unix socket gives.

    For the log alone: the header may be forged.
    """
    address = peer or headers.get("x-real-ip") or headers.get("x-forwarded-for", "").split(",")[-1]
    return printable(address.strip(), ADDRESS_LIMIT) or "unix"


def stamp(seconds) -> str:
    """Seconds since 1970 as ISO 8601 in UTC, as in the log and in manifests."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


class Log:
    """One line per event on stderr; SMF keeps them in the service's log file.

    Lines are queued and written together, from warn upwards at once.  A stalled reader of
    stderr costs lines, never a request: a pipe is given no more than fits into it.

    form    "text", or "json": an object a line, with the keys of bunyan, as Triton's logs
    """

    def __init__(self, level="info", fd=2, form="text"):
        self.level = LEVELS[level]
        self.fd = fd
        self.counts = dict.fromkeys(("info", "warn", "error"), 0)     # lines, requests aside
        self._record = None if form == "text" else {
            "v": 0, "name": "imgserver", "hostname": socket.gethostname(), "pid": os.getpid()}
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

    def _line(self, level, text):
        """Write `text`, which must be printable, if `level` is logged: info, warn or error."""
        if LEVELS[level] >= self.level:
            self.tick(int(time.time()))
            self.counts[level] += 1
            self.add(level, text)
            if LEVELS[level] >= WARN:
                self.flush(wait=True)

    def add(self, level, text, facts=None):
        """Queue a line, prefixed with the cached time; facts: further keys of the JSON form."""
        self._lines.append(f"{self._stamp} {level} {text}" if self._record is None
                           else self._as_json(level, text, facts or {}))

    def _as_json(self, level, text, facts) -> str:
        return json.dumps({**self._record, "level": LEVELS[level], "time": self._stamp,
                           "msg": text, **facts}, separators=(",", ":"))

    def request(self, client, user, line, agent, status, size, seconds, title, failure):
        """Queue the line of a request.

        client, user    an address, and a name or None
        line, agent     the request line and the User-Agent as they came
        size, seconds   bytes of the body sent, and the time taken
        title, failure  further facts about the answer, "" where there are none
        """
        if len(line) > LOG_TARGET_LIMIT or not _is_plain(line):
            line = printable(line)
        agent = agent_name(agent)
        if self._record is None:
            self._lines.append(f'{self._stamp} info {client} "{line}" {status} {size} '
                               f'{seconds * 1000:.1f}ms {user or "-"} "{agent}"'
                               f"{title and ' ' + title}{failure}")
            return
        method, _, target = line.partition(" ")
        self.add("info", f"{line} {status}{failure}", {
            "req": {"method": method, "url": target.rpartition(" ")[0] or target,
                    "headers": {"user-agent": agent}, "remoteAddress": client},
            "res": {"statusCode": status, "bytes": size},
            "latency": round(seconds * 1000, 1), "user": user, "image": title or None})

    def tick(self, now):
        """Cache the timestamp of `now`, whole seconds since 1970."""
        if now != self._second:
            self._second = now
            self._stamp = stamp(now)

    def info(self, text):
        self._line("info", text)

    def warn(self, text):
        self._line("warn", text)

    def error(self, text):
        self._line("error", text)

    def exception(self, what):
        """Log an internal error: the traceback, on one line."""
        self._line("error", what + ": " + printable(traceback.format_exc()[-TRACEBACK_LIMIT:],
                                                    TRACEBACK_LIMIT))

    @property
    def pending(self) -> bool:
        return bool(self._lines or self._held)

    def flush(self, wait=False):
        """Write queued lines as far as possible without blocking.  Raises nothing.

        While another thread writes they are left to a later flush, unless `wait`.
        """
        if not (wait or self.pending) or not self._flushing.acquire(blocking=wait):
            return
        try:
            lines = self._lines[:]
            del self._lines[:len(lines)]  # not all: a thread may add one just now
            data = self._held + "\n".join(lines + [""]).encode("ascii", "backslashreplace")
            if self._lost:
                text = f"({self._lost} bytes of log lost: nobody read them)"
                if self._record is not None:
                    text = self._as_json("warn", text, {})
                data = f"\n{text}\n".encode() + data
            try:
                while data and self._poll.poll(0):
                    data = data[os.write(self.fd, data[:self._piece]):]
                    self._lost = 0
            except OSError:               # a closed pipe, a full disk: nowhere to report it
                data = b""
            if len(data) > LOG_LIMIT:
                self._lost += len(data)
                data = b""
            self._held = data
        finally:
            self._flushing.release()


# -- JSON --------------------------------------------------------------------------------

NUMBER_LIMIT = 20             # digits of an integer in JSON: 2**64 has 20
SPELL_LIMIT = 100             # characters of a value in a message
NAMES_LIMIT = 5               # names of a list there
NESTING_LIMIT = 100           # levels of JSON, so that a parsed value can be rendered, too


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
        raise ValueError(f"{text[:40]} is not JSON, or too large")
    return value


_HOOKS = {"parse_int": _integer, "parse_float": _real, "parse_constant": _real}
_DECODER = json.JSONDecoder(**_HOOKS)
_UNIQUE_DECODER = json.JSONDecoder(object_pairs_hook=_unique, **_HOOKS)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_quote = json.encoder.encode_basestring_ascii


def _is_deeper(value, levels) -> bool:
    """Whether arrays and objects are nested more than `levels` deep."""
    level = [value]
    while level and levels >= 0:
        levels -= 1
        level = [item for each in level if isinstance(each, (dict, list))
                 for item in (each.values() if isinstance(each, dict) else each)]
    return bool(level)


def parse_json(data: bytes, unique=False):
    """The value of strict JSON in UTF-8, with or without a byte-order mark.  Raises ValueError.

    Stricter than json.loads, so that every value can be answered to any client: no NaN, no
    infinity, no half surrogate pair, no endless nesting.  The last of a repeated key
    counts, as in JavaScript, unless `unique` refuses it.
    """
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
        value = (_UNIQUE_DECODER if unique else _DECODER).decode(text)
        if text.count("{") + text.count("[") > NESTING_LIMIT and _is_deeper(value, NESTING_LIMIT):
            raise ValueError("nested too deep")
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8")
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair")
    except RecursionError:
        raise ValueError("nested too deep")
    return value


def parse_object(data: bytes, unique=False) -> dict:
    """The JSON object in `data`.  Raises ValueError, worded to follow the name of a file."""
    try:
        value = parse_json(data, unique)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}")
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")
    return value


def render_json(value, pad="\n") -> str:
    """JSON as every answer has it: ASCII, indented by two spaces.

    json.dumps(indent=2) renders the same text in pure Python and takes ten times
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


def spell(value) -> str:
    """A value for messages and the log, truncated."""
    text = ascii(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SPELL_LIMIT else text[:SPELL_LIMIT] + "..."


def first_of(names) -> str:
    """The first names of a list for a message, and how many more there are."""
    more = len(names) - NAMES_LIMIT
    return ", ".join(names[:NAMES_LIMIT]) + (f", and {more} more..." if more > 0 else "")


# -- configuration -----------------------------------------------------------------------
#
# Checks: each returns the value of a setting, or raises ValueError with the rule.

# A port, from 1 to 65535.
_PORT = "(?:[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"


def _check(is_right, rule):
    """A check by a function of the value."""
    def check(value):
        if not is_right(value):
            raise ValueError(rule)
        return value
    return check


def _matching(pattern, rule):
    """A check for printable texts that match a pattern."""
    return _check(lambda value: isinstance(value, str) and value.isprintable()
                  and re.fullmatch(pattern, value), rule)


def _one_among(*choices):
    texts = [json.dumps(choice) for choice in choices]
    return _check(lambda value: json.dumps(value) in texts, "must be " + " or ".join(texts))


def _between(low, high):
    """A check for numbers; for whole ones where `low` is one."""
    return _check(lambda value: type(value) in (int, type(low)) and low <= value <= high,
                  f"must be a number from {low:g} to {high}")


def _networks(value):
    """A list of addresses, networks and "unix", as ip_network objects and that word."""
    rule = 'must be a list of addresses, networks and "unix"'
    if not isinstance(value, list):
        raise ValueError(rule)
    if not value:                         # saves the import of ipaddress: 1 MiB
        return value
    import ipaddress
    try:
        return [item if item == "unix" else ipaddress.ip_network(str(item)) for item in value]
    except ValueError as error:
        raise ValueError(f"{rule} ({error})")


def is_among(peer, networks) -> bool:
    """Whether a client is one of `networks`; peer is its address, "" on a Unix socket."""
    if not peer:
        return "unix" in networks
    import ipaddress
    address = ipaddress.ip_address(peer.partition("%")[0])
    return any(address in network for network in networks if network != "unix")


def _are_channels(value) -> bool:
    """Whether it is the official form: [{name, description?, default?}], one default at most."""
    kinds = {"name": str, "description": str, "default": bool}
    return (isinstance(value, list)
            and all(isinstance(item, dict)
                    and all(type(item[key]) is kinds.get(key) for key in item)
                    and re.fullmatch("[a-z][a-z0-9_-]*", item.get("name", "")) for item in value)
            and len({item["name"] for item in value}) == len(value)
            and sum(item.get("default", False) for item in value) <= 1)


def _parse_address(value, any_port) -> list:
    """parse_listen of one address; localhost has two."""
    if isinstance(value, str) and value.startswith("/"):
        if "\0" in value or len(os.fsencode(value)) > 107:    # sun_path[108], illumos and Linux
            raise ValueError("must be a path of at most 107 bytes for a Unix socket")
        return [value]
    match = re.fullmatch(r"(?:(\[[0-9A-Fa-f:.]+\]|[^\[\]:/\s\0]+):)?([0-9]{1,5})", str(value))
    if not match:
        raise ValueError("must be a port, ADDRESS:PORT, or the path of a socket, which starts "
                         "with /")
    host, port = (match[1] or "*").strip("[]"), int(match[2])
    if not (0 if any_port else 1) <= port <= 65535:
        raise ValueError("must name a port from 1 to 65535")
    hosts = {"*": ("",), "localhost": ("127.0.0.1", "::1")}.get(host, (host,))
    try:
        for each in filter(None, hosts):
            socket.inet_pton(socket.AF_INET6 if ":" in each else socket.AF_INET, each)
    except (OSError, UnicodeError):
        raise ValueError(f"must name an IP address, * or localhost: {host!a} is none")
    return [(each, port) for each in hosts]


def parse_listen(value, any_port=False) -> list:
    """The addresses to listen on: (address, port), address "" for all; or a socket's path.

    Takes 8080, "8080", "ADDRESS:PORT", "[IPV6]:PORT", "*:PORT", "localhost:PORT" (both of its
    addresses; without DNS) and "/path", or a list of these.  Raises ValueError.
    """
    items = value if isinstance(value, list) and value else [value]
    addresses = [address for item in items for address in _parse_address(item, any_port)]
    for address in addresses:
        if addresses.count(address) > 1 and address[1:] != (0,):
            raise ValueError(f"must name {listen_text(address)} once")
    return addresses


def host_and_port(host, port) -> str:
    """As in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def plain_address(address) -> str:
    """An address of a socket for both families, which writes 10.0.0.5 as ::ffff:10.0.0.5."""
    return address.removeprefix("::ffff:")


def listen_text(address) -> str:
    """One address of parse_listen, as the configuration has it."""
    if isinstance(address, str):
        return address
    host, port = address
    return host_and_port(host or "*", port)



_TEXT = _matching(".*", "must be a text")
_MAYBE_UUID = _matching(f"({_UUID.pattern})?", "must be a UUID in lower case, or empty")
_YES_OR_NO = _one_among(True, False)
_SECONDS = _between(0.1, 86400)

# Every key of config.json: its default and its check.  README.md explains each.
SETTINGS = {
    "listen_port": (80, parse_listen),
    # Before and after the Host header in files[].url: labels of its name, a port, a path.
    "prefix": ("http://", _matching(r"https?://([A-Za-z0-9-]+\.)*",
                                    'must be "http://" or "https://"')),
    "suffix": ("", _matching(
        rf"(\.[A-Za-z0-9-]+)*(:{_PORT})?(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)*",
        'must be "", ":PORT", "/PATH" or ":PORT/PATH", without a / at its end')),
    "loglevel": ("info", _one_among(*LEVELS)),
    "logformat": ("text", _one_among("text", "json")),
    "serve_dir": (".", _matching(".+", "must be the path of a directory")),
    "image-creator": ("internal", _TEXT),
    "image-creator-uuid": ("", _MAYBE_UUID),
    "image-vendor-uuid": ("", _MAYBE_UUID),
    "socket_mode": ("0666", _matching("0?[0-7]{3}",
                                      'must be a file mode in octal, such as "0660"')),
    "accel": ("", _matching("(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*", "must be the path of an "
                            'internal location, such as "/files", or empty')),
    "max_connections": (10000, _between(1, 1000000)),
    "header_timeout": (30, _SECONDS),
    "idle_timeout": (300, _SECONDS),
    "stall_timeout": (300, _SECONDS),
    "drain_time": (30, _between(0.0, 3600)),
    "channels": ([], _check(_are_channels, 'must be a list of {"name", "description", '
                            '"default"}, with each name once, and one default at most')),
    "metrics": (False, _YES_OR_NO),
    "users": ("", _TEXT),
    "read": ("anyone", _one_among("anyone", "public", "users")),
    "publish_from": ([], _networks),
    "manage_from": ([], _networks),
    "check_streams": (True, _YES_OR_NO),
    "max_upload": (0, _between(0, 1 << 60)),
}


class Config:
    """The settings, as attributes: `image-creator` is `image_creator`.

    listen_port     the addresses, as parse_listen gives them
    path            the configuration file; None for the defaults alone
    warnings        for the log, once it is open
    """

    path = None

    def __init__(self, values=None, directory="."):
        """Check `values`, a dict as in config.json; relative paths start at `directory`.

        Raises UserError with the key and the reason.
        """
        values = values or {}
        for key, (default, check) in SETTINGS.items():
            try:
                setattr(self, key.replace("-", "_"), check(values.get(key, default)))
            except ValueError as error:
                raise UserError(f"config: {key} {error}, not {spell(values[key])}", EXIT_CONFIG)
        self.warnings = [f"config: {key!a} is no key of the configuration" for key in values
                         if key not in SETTINGS and key != "comments"]
        self.warnings += [f'config: {key} has "unix": all that can connect to the socket may do '
                          "so, with nginx in front all whom it lets in"
                          for key in ("publish_from", "manage_from")
                          if "unix" in getattr(self, key)]
        self.default_channel = next((channel["name"] for channel in self.channels
                                     if channel.get("default")), None)
        self.serve_dir = os.path.abspath(os.path.join(directory, self.serve_dir))
        self.users = self.users and os.path.abspath(os.path.join(directory, self.users))
        if self.read == "users" and not (self.users or self.publish_from or self.manage_from):
            raise UserError('config: read is "users", but users names no file of them',
                            EXIT_CONFIG)

    @classmethod
    def load(cls, path, must_exist=True):
        """Read a config.json.  Raises UserError where it is missing or invalid."""
        values = None
        try:
            with open(path, "rb") as file:
                values = parse_object(file.read(), unique=True)
        except OSError as error:
            if must_exist or not isinstance(error, FileNotFoundError):
                raise UserError(f"cannot read {path}: {error.strerror}", EXIT_CONFIG)
        except ValueError as error:
            raise UserError(f"{path} {error}", EXIT_CONFIG)
        config = cls(values, os.path.dirname(os.path.abspath(path)))
        config.path = None if values is None else path
        return config

    def check_serve_dir(self):
        """Raise UserError where serve_dir cannot be listed."""
        try:
            os.scandir(self.serve_dir).close()
        except OSError as error:
            raise UserError(f"cannot list serve_dir {self.serve_dir}: {error.strerror}",
                            EXIT_CONFIG)


# -- manifests ---------------------------------------------------------------------------
#
# A manifest without `v` is v1, DSAPI's; imgadm and IMGAPI use v2.  Functions of dicts: nothing
# here touches a file.
#
# Any manifest, stored or given, is mended first: every field gets the value that imgadm and
# IMGAPI make of it, or is invalid.  Then normalise drops invalid optional fields, for serving;
# validate refuses them, for publishing.

COMPRESSIONS = {"gzip": ".gz", "bzip2": ".bz2", "xz": ".xz", "none": ""}
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
STATES = ("active", "unactivated", "disabled", "creating", "failed")
DSAPID_STATES = {"nuked": "unactivated", "pending": "unactivated", "deprecated": "active"}
TYPES = ("zone-dataset", "zvol", "lx-dataset", "lxd", "docker", "other")
SYSTEMS = ("smartos", "linux", "windows", "bsd", "illumos", "other")
TAGS_LIMIT = 100 << 10        # characters of tags as JSON.stringify writes them (imgmanifest)
SAFE_INTEGER = 2 ** 53        # the largest number that every JSON parser of a client keeps

_DAY, _MINUTE = r"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])", r"(?:[01]\d|2[0-3]):[0-5]\d"
_DATE = rf"(?a){_DAY}T{_MINUTE}:[0-5]\d(?:\.\d{{3}})?Z"
_V1_DATE = rf"(?a){_DAY}T{_MINUTE}(?::[0-5]\d(?:\.\d{{3}})?)?Z"
_DIGITS = re.compile(r"\s*(-?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,2})?)\s*")
# ISO 8601: a date of the calendar, a week date or an ordinal one, a time, an offset.
_ISO = re.compile(r"(\d{4})(?:(-?)(?:W(\d\d)(?:-?(\d))?|((?!000)[0-2]\d\d|3[0-5]\d|36[0-6])"
                  r"|(\d\d)(?:\2(\d\d))?))?(?:[Tt ]([01]\d|2[0-4])(?::?([0-5]\d)"
                  r"(?::?([0-5]\d|60))?)?(?:[.,](\d{1,30}))?\s*"
                  r"(?:[Zz]|([+\u2212-])(\d\d):?(\d\d)?)?)?", re.ASCII)


def compression_of(head: bytes, name: str) -> str:
    """The compression of a file by its first bytes; of an empty one by its name."""
    if head:
        kinds = [kind for magic, kind in MAGIC.items() if head.startswith(magic)]
    else:
        suffix = os.path.splitext(name)[1]
        kinds = [kind for kind in COMPRESSIONS if COMPRESSIONS[kind] == suffix]
    return kinds[0] if kinds else "none"


def is_file_name(name) -> bool:
    """Whether files[].path is a plain file name, in the image's own directory."""
    try:
        return (isinstance(name, str) and name.isprintable() and "/" not in name
                and name not in ("", ".", "..", MANIFEST) and len(os.fsencode(name)) <= 255)
    except UnicodeEncodeError:            # the locale cannot encode it
        return False


def is_v1(manifest) -> bool:
    """Whether a manifest is v1 (DSAPI); most of those have no `v`."""
    return manifest.get("v", 1) == 1 and not isinstance(manifest.get("v"), bool)


def number_text(value) -> str:
    """A number as JavaScript prints it: 1.0 is 1, 1e21 is 1e+21 (ECMA-262 Number::toString).

    But integers are printed with all their digits: the guids of ZFS have up to 20.
    """
    if isinstance(value, int) or value.is_integer() and abs(value) < 1e21:
        return str(int(value))
    text = repr(value)
    small = re.fullmatch(r"(-?)(\d)\.?(\d*)e-0([56])", text)
    if small:
        return f"{small[1]}0.{'0' * (int(small[4]) - 1)}{small[2]}{small[3]}"
    return re.sub("e([+-])0", r"e\1", text)


def moment(text):
    """A time in any form of ISO 8601, in UTC with 0 or 3 decimals; None where it is none.

    Without an offset it is UTC; further decimals are cut.
    """
    match = _ISO.fullmatch(text.strip())
    if not match:
        return None
    year, _, week, weekday, ordinal, month, day, hour, minute, second, part, sign, *offset = \
        match.groups()
    try:
        if week:
            date = datetime.datetime.fromisocalendar(int(year), int(week), int(weekday or 1))
        else:
            date = datetime.datetime(int(year), int(month or 1), int(day or 1))
        unit = 1000 if second else 60_000 if minute else 3_600_000       # of the decimals, in ms
        in_utc = date + datetime.timedelta(
            int(ordinal or 1) - 1, hours=int(hour or 0), minutes=int(minute or 0),
            seconds=int(second or 0), milliseconds=unit * int(part or 0) // 10 ** len(part or ""))
        east = datetime.timedelta(hours=int(offset[0] or 0), minutes=int(offset[1] or 0))
        in_utc += east if sign and sign != "+" else -east
    except (ValueError, OverflowError):
        return None
    return in_utc.isoformat(timespec="milliseconds" if part or in_utc.microsecond
                            else "seconds") + "Z"


# Menders: each returns the value that was meant, unchanged where it is right, or None.

UNSET = (None, "", [], {})    # values of a field that is not set


def _as_text(value):
    """A text, number or flag as a text; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return number_text(value) if isinstance(value, (int, float)) else None


def _text(pattern, mend=str):
    """A mender of texts that match a pattern, as they are or as `mend` makes them."""
    matches = re.compile(pattern).fullmatch

    def mend_text(value):
        if type(value) is str and matches(value):
            return value
        text = mend(_as_text(value) or "")
        return text if text and matches(text) else None
    return mend_text


def _word(pattern, others=()):
    """A mender of texts in lower case; others: (text, the one that is meant) ..."""
    def fold(text):
        text = text.strip().lower()
        return dict(others).get(text, text)
    return _text(pattern, fold)


def _flag(value):
    text = (_as_text(value) or "").strip().lower()
    return {"true": True, "1": True, "false": False, "0": False}.get(text)


def _number(value):
    if type(value) is str and len(value) <= NUMBER_LIMIT and _DIGITS.fullmatch(value):
        value = float(value) if set(value) & set(".eE") else int(value)
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= SAFE_INTEGER else None


def _version(value):
    number = _number(value)
    return min(number, 2) if number else None     # imgadm takes 3 as it can


def _list(mend_item):
    def mend_list(value):
        if type(value) is not list:
            value = [value] if value else []      # {} is an empty list to SDC 6
        items = [mend_item(item) for item in value if item not in (None, "")]
        return None if None in items else items
    return mend_list


def _object(mend_item, *keys):
    """A mender of JSON objects by their values; keys: those they must have, if any are given."""
    def mend_object(value):
        if type(value) is not dict or keys and value.keys() != set(keys):
            return None
        items = {name: mend_item(item) for name, item in value.items()}
        return None if None in items.values() else items
    return mend_object


def _any_object(value):
    return value if type(value) is dict else None


def _tags(value):
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    units = len(text.encode("utf-16-le", "surrogatepass")) // 2     # as JavaScript counts
    return value if type(value) is dict and units <= TAGS_LIMIT else None


def _one_file(value):
    files = [value] if value and type(value) is dict else value
    return files if type(files) is list and len(files) == 1 and type(files[0]) is dict else None


def mend(manifest: dict, fields: dict, prefix="") -> tuple[dict, list]:
    """(manifest, invalid): the fields mended by their rules.

    Unset fields are left out, and those that break a rule: invalid has these as
    (prefix + name, value, rule).  Unknown ones stay as they are.
    """
    result, invalid = {}, []
    for name, value in manifest.items():
        if name not in fields:
            result[name] = value
            continue
        field = fields[name]
        mended = field.mend(value)
        if mended is None:
            if value not in UNSET or (name, value) == ("path", ""):      # no name for a file
                invalid.append((prefix + name, value, field.rule))
            continue
        if field.members:
            mended, more = field.members(mended)
            invalid += more
        if mended or mended not in UNSET or mended == value:
            result[name] = mended
    return result, invalid


def _remove_misplaced(manifest, prefix="") -> list:
    """Remove the fields that such an image cannot have; returns them as mend does."""
    return [(prefix + name, manifest.pop(name), f"is for {other} {value} only")
            for name, (other, value) in ONLY_FOR.items()
            if name in manifest and manifest.get(other) != value]


def _requirements(value):
    mended, invalid = mend(value, REQUIREMENTS, "requirements.")
    for name in ("min_ram", "max_ram"):
        if mended.get(name) == 0:         # unset to imgmanifest
            del mended[name]
    invalid += [("requirements." + name, mended.pop(name), "is no requirement")
                for name in value if name not in REQUIREMENTS]
    if mended.get("min_ram", 0) > mended.get("max_ram", SAFE_INTEGER):
        invalid.append(("requirements.max_ram", mended.pop("max_ram"),
                        "must not be below min_ram"))
    return mended, invalid + _remove_misplaced(mended, "requirements.")


def _file_members(files):
    file, invalid = mend(files[0], FILE_FIELDS, "files[0].")
    return [file], invalid


# A field: its mender, the rule in words, and a mender of the value's members.
Field = collections.namedtuple("Field", "mend rule members", defaults=(None,))


def _one_of(names, others=()) -> Field:
    return Field(_word("|".join(names), others), "must be one of " + ", ".join(names))


def _up_to(length) -> Field:
    return Field(_text("(?s).{1,%d}" % length), f"must be a text of at most {length} characters")


_ID = Field(_word(_UUID), "must be a UUID in lower case")
_URL = Field(_text(r"https?://[^\s/](?s:.{0,1015})", str.strip),
             "must be an http(s) URL of at most 1024 characters")
_FLAG = Field(_flag, "must be true or false")
_SHORT = _up_to(1024)
_COUNT = Field(_number, "must be a whole number")
_TEXTS = Field(_list(_SHORT.mend), "must be a list of texts")
_MOMENT = Field(_text(_DATE, moment), "must look like 2026-01-31T12:00:00Z")
_V1_MOMENT = _MOMENT._replace(mend=_text(_V1_DATE, moment))
_URN_PART = Field(_text(r'[^:{}\[\]"\\\x00-\x1f\x7f]{1,1024}'),
                  'must be a text without any of : { } [ ] " \\')
_platforms = _object(_text(r"(?a)20(1[2-9]|[2-9]\d)\d{4}T\d{6}Z"))
_PLATFORMS = Field(lambda value: _platforms(value) or None, 'must be {"7.0": "YYYYMMDDTHHMMSSZ"}')

REQUIREMENTS = {
    "networks": Field(_list(_object(_as_text, "name", "description")),
                      'must be a list of {"name", "description"}'),
    "brand": _SHORT, "ssh_key": _FLAG, "min_ram": _COUNT, "max_ram": _COUNT,
    "min_platform": _PLATFORMS, "max_platform": _PLATFORMS, "bootrom": _one_of(("bios", "uefi")),
}

FILE_FIELDS = {
    "path": Field(lambda value: value if is_file_name(value) else None,
                  "must be a plain file name"),
    "size": Field(_number, "must be a number of bytes"),
    "sha1": Field(_word("[0-9a-f]{40}"), "must have 40 hexadecimal digits"),
    "md5": Field(_word("[0-9a-f]{32}"), "must have 32 hexadecimal digits"),
    "compression": _one_of(COMPRESSIONS),
    "dataset_guid": Field(_text("[0-9]{1,20}"), "must be a number of at most 20 digits"),
}
PUBLIC_FILE_FIELDS = ("sha1", "size", "compression", "dataset_guid")

# Every field of a v2 manifest (imgmanifest 3.1.0), in the order in which IMGAPI shows them
# (sdc-imgapi, Image.serialize), with billing_tags and traits, which the official server keeps
# back in its public mode.
FIELDS = {
    "v": Field(_version, "must be 1 or 2"), "uuid": _ID, "owner": _ID,
    "name": Field(_text(r"[A-Za-z0-9._/ -]{1,1024}"),
                  'takes letters, digits, ".", "_", "/", "-" and spaces, 1 to 1024 of them'),
    "version": Field(_text(r"[A-Za-z0-9._/+-]{1,512}"),
                     'takes letters, digits, ".", "_", "/", "+" and "-", 1 to 512 of them'),
    "state": _one_of(STATES, DSAPID_STATES.items()), "disabled": _FLAG, "public": _FLAG,
    "published_at": _MOMENT, "type": _one_of(TYPES), "os": _one_of(SYSTEMS),
    "files": Field(_one_file, "must hold one file", _file_members),
    "acl": Field(_list(_ID.mend), "must be a list of UUIDs in lower case"),
    "description": _up_to(10240), "homepage": _URL, "eula": _URL, "icon": _FLAG,
    "urn": _up_to(2048),
    "requirements": Field(_any_object, "must be a JSON object", _requirements),
    "users": Field(_list(_object(_as_text, "name")), 'must be a list of {"name"}'),
    "generate_passwords": _FLAG, "inherited_directories": _TEXTS, "origin": _ID,
    "nic_driver": _SHORT, "disk_driver": _SHORT, "cpu_type": _SHORT, "image_size": _COUNT,
    "tags": Field(_tags, "must be a JSON object of at most 100 KiB"),
    "billing_tags": _TEXTS._replace(mend=_list(_up_to(128).mend)),
    "traits": Field(_object(lambda item: item if isinstance(item, (bool, list))
                            else _as_text(item)),
                    "must be a JSON object of texts, flags and lists"),
    "error": Field(_any_object, "must be a JSON object"), "channels": _TEXTS,
}
# Those that cannot be given when an image is created, or updated (sdc-imgapi, lib/images.js).
NOT_CREATED = frozenset(("uuid", "state", "published_at", "icon", "urn", "error"))
NOT_UPDATED = NOT_CREATED | {"v", "disabled", "type", "files", "origin"}

# Those of v1, whose image_size may be a text.
V1_FIELDS = {
    **FIELDS, "image_size": _COUNT._replace(
        mend=lambda value: value if type(value) is str and re.fullmatch("[0-9]{1,15}", value)
        else _number(value)),
    "published_at": _V1_MOMENT, "created_at": _V1_MOMENT, "updated_at": _V1_MOMENT,
    "creator_uuid": _ID, "vendor_uuid": _ID, "owner_uuid": _ID, "restricted_to_uuid": _ID,
    "creator_name": _URN_PART, "cloud_name": _URN_PART, "platform_type": _SHORT,
}
# Those that upgrading drops or converts (imgmanifest upgradeTo2).
V1_ONLY = (V1_FIELDS.keys() - FIELDS.keys()) | {"creator_admin", "_url"}

ZVOL_FIELDS = ("nic_driver", "disk_driver", "cpu_type", "image_size")
ONLY_FOR = {**dict.fromkeys(ZVOL_FIELDS, ("type", "zvol")), "error": ("state", "failed"),
            "inherited_directories": ("type", "zone-dataset"), "bootrom": ("brand", "bhyve")}
DEFAULTS = {"owner": NOBODY, "public": True, "disabled": False}
REQUIRED = ("uuid", "name", "version", "type", "os", "files")
# Fields that stay although they break our rule: imgadm does not mind.
TOLERATED = frozenset(("name", "version", "creator_name", "cloud_name", "creator_uuid",
                       "vendor_uuid", "owner_uuid", "platform_type"))
# Fields that v1 does not have, or has only where they restrict.
NOT_V1 = frozenset(("v", "owner", "state", "public", "icon"))
# Without these imgadm cannot import an image.
ESSENTIAL = frozenset((*REQUIRED, "origin", "files[0].path", "files[0].size", "files[0].sha1",
                       "files[0].compression"))
# Restricting fields restrict even where they are invalid: the field and value that then apply.
RESTRICTING = {"disabled": ("disabled", True), "public": ("public", False),
               "acl": ("public", False), "restricted_to_uuid": ("public", False)}


def mend_manifest(manifest: dict, required=REQUIRED) -> tuple[dict, list]:
    """(manifest, invalid): mend, and the rules for fields together.

    Required fields that are missing are invalid with the value None.
    """
    fields = FIELDS if _version(manifest.get("v", 1)) == 2 else V1_FIELDS
    options = manifest.get("options")     # dsapid's place for a zvol's fields
    if fields is V1_FIELDS and isinstance(options, dict):
        manifest = {**{name: options[name] for name in ZVOL_FIELDS if name in options},
                    **manifest}
        del manifest["options"]
    result, invalid = mend(manifest, fields)
    invalid += _remove_misplaced(result)
    named = {name for name, *_ in invalid}
    invalid += [(name, None, "is missing") for name in required
                if name not in result and name not in named]
    return result, invalid


def normalise(manifest: dict):
    """(manifest, notes, reasons): a stored manifest as imgadm and IMGAPI read it.

    The manifest stays v1 or v2.  notes: a sentence for each field that breaks a rule and was
    dropped, or replaced by a more restrictive value; reasons: one for each without which imgadm
    cannot import the image, none for an image that can be shown.
    """
    notes, reasons = [], []
    files = manifest.get("files")
    if isinstance(files, list) and len(files) > 1:
        notes.append(f"files has {len(files)} of them: the first is the image, the others are "
                     "not served")
        manifest = {**manifest, "files": files[:1]}
    manifest, invalid = mend_manifest(manifest)
    for name, value, rule in invalid:
        text = f"{name} {rule}" if value is None else f"{name} {spell(value)} {rule}"
        if name in TOLERATED and isinstance(value, str) and value.isprintable():
            manifest[name] = value
            if name in REQUIRED:
                notes.append(f"{text}: it is shown as it is")
        elif name in ESSENTIAL:
            reasons.append(text)
        elif name in RESTRICTING:
            field, instead = RESTRICTING[name]
            notes.append(f"{text}: {field} is taken for {json.dumps(instead)}")
            manifest[field] = instead
            if name == "acl" and isinstance(value, list):
                manifest["acl"] = list(filter(None, map(_ID.mend, value)))
        else:
            notes.append(f"{text}: it is left out")
    return manifest, tuple(notes), tuple(reasons)


def validate(manifest: dict, later=("files",)) -> dict:
    """A whole manifest that was given, mended; fields that come `later` may be missing.

    Raises ApiError (422) with errors [{field, code, message}], as do the next two.
    """
    manifest, invalid = mend_manifest(manifest, [name for name in REQUIRED if name not in later])
    _refuse("invalid image data", [
        (name, "MissingParameter" if value is None else "Invalid", f"{name} {rule}")
        for name, value, rule in invalid])
    return manifest


def validate_new(fields: dict) -> dict:
    """The manifest of an image to be, mended: its uuid and file come later."""
    fixed = [name for name, value in fields.items() if name not in FIELDS
             or name in NOT_CREATED and value not in UNSET]
    if "state" in fixed:
        _refuse("invalid image data", [("state", "NotAllowed", "Parameter cannot be set")])
    _refuse("invalid extra parameters", [
        (name, "Invalid", f"{name} cannot be set" if name in FIELDS else
         f"{name} is no field of a manifest") for name in fixed], "InvalidParameter")
    return validate({"v": 2, **fields}, ("files", "uuid"))


def validate_changes(changes: dict) -> dict:
    """The fields to be changed alone, mended; None removes one."""
    if not changes:
        raise ApiError(422, "ValidationFailed",
                       "invalid image update data: no parameters provided", [])
    given = {name: value for name, value in changes.items()
             if name in FIELDS and name not in NOT_UPDATED}
    mended, invalid = mend(given, FIELDS)
    errors = [(name, "NotAllowed", "Parameter cannot be updated" if name in V1_FIELDS
               else f"{name} is no field of a manifest") for name in changes if name not in given]
    errors += [(name, "Invalid", f"{name} {rule}") for name, _, rule in invalid]
    errors += [(name, "Invalid", f"{name} cannot be removed") for name in REQUIRED
               if name in given and given[name] in UNSET]
    _refuse("invalid image update data", errors)
    return {name: mended.get(name) for name in given}


def _refuse(subject, errors, code="ValidationFailed"):
    """Raise an ApiError where there are errors: (field, code, message)."""
    if errors:
        quote = '"' * (code == "InvalidParameter")        # as sdc-imgapi words the two
        raise ApiError(422, code, f"{subject}: " + ", ".join(
            f"{quote}{field}{quote}" for field, *_ in errors),
            [{"field": field, "code": code, "message": text} for field, code, text in errors])


def parse_field(text):
    """(field, value) of FIELD=VALUE: a text as it stands, else JSON; None for `FIELD=`.

    Raises ValueError with the rule that is broken.
    """
    name, sign, value = text.partition("=")
    if not sign or not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise ValueError(f"{spell(text)} is not FIELD=VALUE")
    if name in ("v", "uuid", "files", "state", "icon", "error"):
        raise ValueError(f"{name} cannot be set")
    field = FIELDS.get(name) or V1_FIELDS.get(name)
    if field is None:
        raise ValueError(f"{name} is no field of a manifest"
                         + (", but one of its requirements" if name in REQUIREMENTS else ""))
    if value == "":
        return name, None
    if isinstance(field.mend(value), str):
        return name, value
    parsed = None
    with contextlib.suppress(ValueError):
        parsed = parse_json(os.fsencode(value))
    if parsed is None or type(field.mend(parsed)) is not type(parsed):
        raise ValueError(f"{name} {field.rule}, not {spell(value)}")
    return name, parsed


def upgrade(v1: dict) -> dict:
    """The v2 form of a v1 manifest, by the rules of imgmanifest's upgradeTo2.

    Where those fail, on manifests of the original server and dsapid, owner and public are
    those of the manifest; without an owner it is NOBODY.
    """
    v2 = {key: value for key, value in v1.items() if key not in V1_ONLY}
    owners = filter(None, map(_ID.mend, (v1.get("creator_uuid"), v1.get("owner"))))
    restricted = v1.get("restricted_to_uuid")
    v2.update(v=2, owner=next(owners, NOBODY), disabled=bool(v1.get("disabled")),
              public=not restricted and v1.get("public", True))
    if restricted:
        v2["acl"] = list(dict.fromkeys([*v1.get("acl", ()), restricted]))
    if v2.get("state") not in ("unactivated", "disabled"):
        v2.pop("state", None)             # dsapid's: imgadm lets disabled decide
    published = v1.get("published_at") or v1.get("created_at")
    if published:
        v2["published_at"] = _MOMENT.mend(published) or published
    if "image_size" in v1:
        v2["image_size"] = _number(v1["image_size"])
    return v2


def _set_state(v1, v2):
    """Set the fields of a v1 manifest, where those of NOT_V1 are missing, by its v2 form."""
    if v2["disabled"]:
        v1["disabled"] = True
    if v2["state"] == "unactivated":
        v1["state"] = "unactivated"
    if not v2["public"] and not v1.get("restricted_to_uuid"):
        v1["public"] = False


def downgrade(v2: dict) -> dict:
    """The v1 form of a v2 manifest: the official reverse (img2dsdiff), but with the fields that
    v1 clients ignore and an upgrade restores, so that v1 - v2 - v1 - v2 loses nothing.
    """
    v1 = {key: value for key, value in v2.items()
          if key not in V1_ONLY and key not in NOT_V1 and key != "disabled"}
    v1["creator_uuid"] = v1["vendor_uuid"] = v2["owner"]
    v1["platform_type"] = "smartos"
    acl = v1.pop("acl", [])
    if not v2["public"] and len(acl) == 1:
        v1["restricted_to_uuid"] = acl[0]
    elif acl:
        v1["acl"] = acl
    _set_state(v1, v2)
    published = re.sub(":00Z$", "Z", v2["published_at"])
    v1["published_at"] = v1["created_at"] = v1["updated_at"] = published
    if "image_size" in v1:
        v1["image_size"] = str(v1["image_size"])
    return v1


def complete(manifest: dict, published_at: str) -> dict:
    """The v2 form of a manifest, with the fields that imgadm create leaves to IMGAPI.

    An image is active, unless its manifest says that it is unactivated, disabled, or none at
    all (creating, failed).
    """
    v2 = {**DEFAULTS, "published_at": published_at,
          **(upgrade(manifest) if is_v1(manifest) else manifest)}
    state = v2.get("state")
    v2["disabled"] = v2["disabled"] or state == "disabled"
    if state not in ("creating", "failed", "unactivated"):
        v2["state"] = "disabled" if v2["disabled"] else "active"
    return v2


def public_fields(v2: dict) -> dict:
    """The fields of a manifest that IMGAPI shows, in its order, without unset ones."""
    result = {key: v2[key] for key in FIELDS if v2.get(key) is not None
              and (v2[key] or key not in ("acl", "icon"))}
    result["files"] = [{key: item[key] for key in PUBLIC_FILE_FIELDS if key in item}
                       for item in v2["files"]]
    return result


def order_of(published_at) -> str:
    """The sort key of a time, the same with or without milliseconds."""
    text = published_at.rstrip("Z")
    return text if "." in text else text + ".000"


def as_v1(manifest: dict, v2: dict, file: dict, creator: str) -> dict:
    """The manifest that DSAPI shows: v1, as stored if it is v1, without files[0].url.

    Filled in are a creator, without which some imgadm refuse it, and the fields that imgadm 1
    (2012) wants after the download: urn, description, creator_name, published_at.
    """
    urn = (v2.get("urn") or "").split(":")
    if is_v1(manifest):
        # imgmanifest asserts that a v1 manifest has no owner, and no public when restricted.
        v1 = {key: value for key, value in manifest.items() if key not in NOT_V1}
        v1["creator_uuid"] = v1.get("creator_uuid") or v2["owner"]
        _set_state(v1, v2)
    else:
        v1 = downgrade(v2)
        v1["cloud_name"] = urn[0] or creator
    v1.pop("channels", None)
    v1["creator_name"] = v1.get("creator_name") or (urn[1] if len(urn) > 1 else creator)
    v1["urn"] = v1.get("urn") or ":".join(
        (v1.get("cloud_name") or creator, v1["creator_name"], v2["name"], v2["version"]))
    v1["description"] = v1.get("description") or f"{v2['name']} {v2['version']}"
    v1["published_at"] = v1.get("published_at") or v2["published_at"]
    v1["files"] = [file]
    return v1


def as_v2(v2: dict, file: dict) -> dict:
    """The manifest that DSAPI shows to imgadm 2 and later: v2 without channels, and with fields
    that no rule is known for as stored.
    """
    result = public_fields(v2)
    result.pop("channels", None)
    result.update((key, value) for key, value in v2.items()
                  if key not in FIELDS and key not in V1_ONLY)
    result["files"] = [file]
    return result


def recorded_md5(file: dict):
    """The MD5 of a mended file as bytes; None unless md5_of has its sha1: else it may be
    another file's.
    """
    md5 = file.get("md5")
    of_this = "md5_of" in file and file["md5_of"] == str(file.get("sha1")).lower()
    return bytes.fromhex(md5) if md5 and of_this else None


def matches_text(value, wanted, prefix=False) -> bool:
    """IMGAPI's filter for name and version: exact, or ~substring; DSAPI's is by prefix."""
    if wanted.startswith("~"):
        return wanted[1:] in value
    return value.startswith(wanted) if prefix else value == wanted


# -- store -------------------------------------------------------------------------------
#
# The directory, read and cached.  Nothing here changes it.  Anything that opens a file or reads
# a directory raises NeedsThread unless may_block; one lock serialises it.  Stat is called in the
# event loop, too, since it is answered from the file system's cache: a serve_dir that hangs,
# as NFS may, stops the loop.

MANIFEST_LIMIT = 1 << 20      # bytes; tags may take 100 KiB, a description 10: nothing needs more
RECHECK = 1.0                 # seconds until an edit in place must be seen in a list
RECHECK_DIRECTORY = 0.5       # seconds, of an image that is requested alone
RECHECK_EARLY = 0.8           # age in seconds at which a list request starts a re-check
RECHECK_SLICE = 0.001         # seconds of such a re-check in one turn of the event loop
RECHECK_SLOW = 0.1            # seconds of a slice that waits for a disk: the rest is for a thread
RACY = 50_000_000             # ns; a younger time may not change with the next write: file
                              # systems keep it in ticks, of up to 10 ms (Linux before 6.13)
LISTS_KEPT = 4                # rendered lists cached: each is as large as all manifests together
LIST_PIECE = 128 << 10        # bytes of a list rendered at once: some 100 images, 100 us
LIST_PARTS = 32               # pieces of a list given to one sendmsg: POSIX allows 16 at least
ZIPPED_LIMIT = 32 << 20       # bytes of gzip forms in use; of 10,000 images one has 1 MB
MD5_LIMIT = 16 << 20          # bytes; a file up to this size is hashed on request, or
                              # when it is read without a sha1 in its manifest
PIECE = 1 << 20               # bytes of a file hashed or decompressed at once
OPEN_TRIES = 3                # of a file that is replaced between stat and open()
LINKS_IN_LOOP = 100           # origins of an image that the event loop follows, each by 3 stats
HASHES_KEPT = 10000           # files whose hashes are cached: 200 bytes each
HASH_AGAIN = 30.0             # seconds until a large file that could not be read is tried again

def trusted_stat(path, serve_dir):
    """os.stat, which follows a symlink only where root or the owner of serve_dir made it.

    Else a user who may write to one image could publish any file that the server can read.
    Raises OSError.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        if status.st_uid not in (0, os.stat(serve_dir).st_uid):
            raise OSError(errno.ELOOP, f"{os.path.basename(path)} is a symlink that belongs to "
                                       "neither root nor the owner of serve_dir")
        status = os.stat(path)
    return status


def open_regular(path, serve_dir=None):
    """Open a regular file for reading: (fd, its stat).  A fifo or device is refused at once.

    With serve_dir, symlinks are followed as trusted_stat does.  Raises OSError.
    """
    for _ in range(OPEN_TRIES):
        trusted = serve_dir and trusted_stat(path, serve_dir)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
        except OSError:
            os.close(fd)
            raise
        if not trusted or os.path.samestat(trusted, status):
            return fd, status
        os.close(fd)
    raise OSError(errno.ENOENT, "replaced while it was opened")


def stat_key(status):
    """The key of a file's state, which changes with the file.

    The ctime moves with every change that moves the mtime, and with those that hide it
    (touch, rsync -t) or open the file to us (chmod).
    """
    return status.st_ctime_ns, status.st_size, status.st_ino


REPLACED = f"{MANIFEST}: replaced while it was read"
UNSETTLED = ()                # no file's key: an image with it is always stale


def stat_key_at(path):
    """The stat_key of the file at path; None where stat fails."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_ctime_ns, status.st_size, status.st_ino      # inlined: requests come here


def hash_file(fd, size):
    """(hex sha1, md5 as bytes) of the first `size` bytes of an open file.  Raises OSError."""
    sha1, md5, offset = hashlib.sha1(), hashlib.md5(), 0
    while offset < size:
        piece = os.pread(fd, min(PIECE, size - offset), offset)
        if not piece:
            raise OSError(errno.EIO, "it became shorter while it was read")
        sha1.update(piece)
        md5.update(piece)
        offset += len(piece)
    return sha1.hexdigest(), md5.digest()


def run_out(job):
    """Run a generator to its end."""
    for _ in job:
        pass


class Hasher:
    """Hashes files, as hash_file, and caches the results by stat_key.

    `later`: large ones one by one in a thread.
    """

    def __init__(self, later=False):
        self._later = later
        self._computing = threading.Lock()        # taken before _lock
        self._lock = threading.Lock()
        self._results = {}                # (path, stat_key): (sha1, md5)
        self._failures = {}               # (path, stat_key): (when, errno, reason), of _run
        self._queue = collections.deque()     # a thread runs while there are any

    def hashes(self, path, key, fd=None):
        """Those of a file in state `key`; None: later, unless it is open as fd.  Raises OSError.

        One caller computes at a time: the others wait, also those for other files.
        """
        with self._lock:
            result = self._results.get((path, key))
            if result is None and fd is None and self._later and key[1] > MD5_LIMIT:
                return self._hash_later(path, key)
        if result is None:
            with self._computing:
                result = self._results.get((path, key)) or self._hash(path, key, fd)
        return result

    def _hash_later(self, path, key):
        """Let the thread hash a file; _lock is held.  Raises the OSError of the last time, also
        while it is tried again.
        """
        when, *failure = self._failures.get((path, key), (-math.inf,))
        if time.monotonic() - when >= HASH_AGAIN and (path, key) not in self._queue:
            # Where no thread starts, the next request tries again.
            with contextlib.suppress(RuntimeError, MemoryError):
                if not self._queue:
                    start_new_thread(self._run, ())
                self._queue.append((path, key))
        if failure:
            raise OSError(*failure)

    def _hash(self, path, key, fd=None):
        opened = open_regular(path)[0] if fd is None else os.dup(fd)
        with open(opened, "rb", buffering=0):
            result = hash_file(opened, key[1])
            if stat_key(os.fstat(opened)) == key:
                self._keep(self._results, path, key, result)
            elif fd is None:              # else they are those of the bytes that are sent
                raise OSError(errno.EAGAIN, "it changed while it was read")
        return result

    def _keep(self, results, path, key, result):
        with self._lock:
            results[path, key] = result
            if len(results) > HASHES_KEPT:
                del results[next(iter(results))]

    def _run(self):
        is_last = False
        while not is_last:
            with self._lock:
                path, key = self._queue[0]        # it stays there until it is hashed
            try:
                self._hash(path, key)
            except MemoryError:
                pass                      # the next request queues it again
            except OSError as error:
                if error.errno not in SHORTAGE:           # the same
                    self._keep(self._failures, path, key,
                               (time.monotonic(), error.errno, error.strerror))
            with self._lock:
                self._queue.popleft()
                is_last = not self._queue


def raise_shortage(error):
    """Raise an OSError again that is due to the system, not to the file."""
    if error.errno in SHORTAGE:
        raise error


class Image:
    """One image directory as last read: its rendered manifest, or the problem that hides it.

    place       the path of its directory, up to its uuid
    problem     None, or one sentence for the log; then nothing of its manifest is set
    try_again   the problem may be one of the moment, such as an error of the disk
    chain_checked   when its chain of origins was last seen to end (monotonic)
    md5         of its file, as bytes, where it is known for sure; claimed_md5 as its manifest
                has it, or None
    notes       sentences for the log about fields that are not shown as stored
    dsapi       (before, after, etag) of its v1 manifest as bytes: files[0].url stands between
                the two, up to the part that the Host header decides; None until it is requested
    dsapi_v2    the same of its v2 manifest
    imgapi      (before, channels, etag) of its v2 manifest as bytes, without the last "}"
    file, path  the name of its file on disk, and the one that DSAPI shows
    """

    __slots__ = ("uuid", "place", "manifest_key", "file_key", "directory_changed", "checked",
                 "chain_checked", "problem", "try_again", "file", "path", "size", "sha1", "md5",
                 "claimed_md5", "state", "order", "name", "version", "os", "type", "origin",
                 "owner", "public", "acl", "billing_tags", "channels", "icon", "notes",
                 *RENDERINGS)

    def __init__(self, uuid, place):
        self.uuid, self.place = uuid, place
        self.manifest_key = self.file_key = self.directory_changed = None
        self.checked, self.chain_checked, self.try_again = 0.0, -math.inf, False
        self.problem = self.file = self.path = self.origin = self.icon = None
        self.dsapi = self.dsapi_v2 = self.imgapi = None
        self.notes = ()

    @property
    def directory(self) -> str:
        return self.place + self.uuid

    @property
    def title(self) -> str:
        """Its name and version for the log; "" where it is not sound."""
        return "" if self.problem else f"{self.name} {self.version}"

    def is_fresh(self, api, for_list=False) -> bool:
        """Whether the cached image is rendered for `api` and unchanged on disk.

        Its manifest and file are checked each time; its directory, where an icon or an unnamed
        file may have come, twice a second and for lists.
        """
        if getattr(self, api) is None and self.problem is None:
            return False
        directory, file = self.place + self.uuid, self.file
        if (stat_key_at(f"{directory}/{MANIFEST}") != self.manifest_key or file is not None
                and stat_key_at(f"{directory}/{file}") != self.file_key):
            return False
        now = time.monotonic()
        if for_list or now - self.checked >= RECHECK_DIRECTORY:
            key = stat_key_at(directory)
            if self.try_again or (key and key[0]) != self.directory_changed:
                return False
            self.checked = now
        return True

    def fields(self) -> dict:
        """Its v2 manifest, as IMGAPI shows it without channels."""
        return json.loads(self.imgapi[0] + b"\n}")


# Beside an image file: hidden files, editors' backups, manifests, hashes and signatures.
_BESIDE = re.compile(r"\..*|.*~|#.*#|"
                     r".*\.(imgmanifest|json|md5|sha1|sha256|sig|asc|bak|orig|sw[op])")


def sole_file(directory, names, size):
    """The image file of a manifest that names none, as imgadm create writes it.

    The one of the manifest's size, or the only one where it has none.  Raises BadImage.
    """
    names = [name for name in names if name not in (MANIFEST, "manifest", *ICONS)
             and is_file_name(name) and not _BESIDE.fullmatch(name)]
    found = []
    for name in names:
        with contextlib.suppress(OSError):
            status = os.stat(f"{directory}/{name}")
            if not stat.S_ISDIR(status.st_mode) and size in (None, status.st_size):
                found.append(name)
    if not found and len(names) == 1:     # perhaps its size is not right yet
        return names[0]
    if len(found) != 1:
        raise BadImage(f"{MANIFEST} names no file, and {len(found)} files "
                       + ("are beside it" if size is None else f"have its size of {size} bytes")
                       + (": " if found else "") + ", ".join(sorted(found)))
    return found[0]


def misnamed_manifest(directory) -> str | None:
    """The file that may be meant for the manifest of a directory without one."""
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(directory)):
            if name == "manifest" or name.endswith(".imgmanifest"):
                return name
    return None


def read_manifest(directory, serve_dir=None, name=MANIFEST):
    """The manifest of an image directory, with its stat; serve_dir as open_regular takes it.

    Raises BadImage and OSError.
    """
    fd, status = open_regular(f"{directory}/{name}", serve_dir)
    try:
        if status.st_size > MANIFEST_LIMIT:
            raise BadImage(f"{name} is larger than {MANIFEST_LIMIT} bytes")
        return parse_object(os.read(fd, status.st_size)), status
    except ValueError as error:
        raise BadImage(f"{name} {error}")
    finally:
        os.close(fd)


NO_FILE = {"size": 0, "sha1": "0" * 40, "compression": "none"}     # one that is still to come


class ImageReader:
    """Reads image directories into Images, for one configuration."""

    def __init__(self, config, hasher=None):
        self.creator, self.serve_dir = config.image_creator, config.serve_dir
        self.hasher = hasher or Hasher()
        self.with_channels = bool(config.channels)
        self.base_salt = json.dumps([config.prefix, config.suffix]).encode()
        # Stands for prefix + Host + suffix in a rendered manifest until a request gives them.
        self.host_placeholder = "http-" + os.urandom(16).hex()

    def read(self, uuid, place, apis, needs_file=True) -> Image | None:
        """The image in `place` + uuid, rendered for `apis`; None where there is no manifest, and
        nothing that may be meant for one.

        Raises OSError only where the system is short of something: that says nothing
        about the image.
        """
        for _ in range(OPEN_TRIES):
            image = self._read(uuid, place, apis, needs_file)
            if image is None or image.problem != REPLACED:
                break
        return image

    def _read(self, uuid, place, apis, needs_file) -> Image | None:
        """Read it once; where its manifest is replaced on the way its problem is REPLACED."""
        image = Image(uuid, place)
        directory = place + uuid
        image.checked, began = time.monotonic(), time.time_ns()
        try:
            image.directory_changed = trusted_stat(directory, self.serve_dir).st_ctime_ns
            if not is_uuid(uuid):
                raise BadImage("its directory must have a UUID in lower case as name")
            manifest, status = read_manifest(directory, self.serve_dir)
            image.manifest_key = stat_key(status)
            self._fill(image, manifest, status.st_mtime, apis, needs_file)
            if stat_key_at(f"{directory}/{MANIFEST}") != image.manifest_key:
                raise BadImage(REPLACED)  # the file may be that of another manifest
        except BadImage as error:
            image.problem = str(error)
        except OSError as error:
            raise_shortage(error)
            if image.file is None and error.errno in (errno.ENOENT, errno.ENOTDIR):
                name = misnamed_manifest(directory)
                if name is None:
                    return None
                image.problem = f"its manifest must be named {MANIFEST}, not {name}"
            else:
                image.problem = f"{image.file or MANIFEST}: {error.strerror}"
                image.try_again = True
        except MemoryError as error:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)) from error
        except Exception as error:        # a bug: the other images can still be shown
            image.problem = f"{MANIFEST}: {type(error).__name__}: {error}"
        if image.manifest_key is None:
            image.manifest_key = stat_key_at(f"{directory}/{MANIFEST}")
        times = [key[0] for key in (image.manifest_key, image.file_key) if key]
        times.append(image.directory_changed or 0)
        ended = time.time_ns()            # a slow disk may take longer than RACY
        if any(began - RACY <= changed <= ended + RACY for changed in times):
            image.manifest_key = UNSETTLED
        return image

    def read_unactivated(self, uuid) -> Image | None:
        """The image in .incoming-<uuid>, which may have no file yet; for IMGAPI alone."""
        return self.read(uuid, os.path.join(self.serve_dir, INCOMING), (IMGAPI,),
                         needs_file=False)

    def render(self, manifest, is_active, icon=None):
        """Image.imgapi of a manifest as a verb has stored it: the disk may have another by now."""
        v2 = complete(normalise({"files": [NO_FILE], **manifest})[0], None)
        if not is_active:
            v2["state"] = "unactivated"
        return self._render_v2({**v2, "icon": bool(icon),
                                "files": v2["files"] if "files" in manifest else []})

    def _fill(self, image, manifest, mtime, apis, needs_file):
        """Interpret the manifest and check the file.  Raises BadImage and OSError."""
        is_whole = needs_file or manifest.get("files")
        if not is_whole:
            manifest = {**manifest, "files": [NO_FILE]}
        said = manifest.get("uuid")
        manifest, image.notes, reasons = normalise(manifest)
        if manifest.get("uuid") != image.uuid:
            raise BadImage(f"{MANIFEST}: its uuid {spell(said)} is not {image.uuid}")
        if reasons:
            raise BadImage(f"{MANIFEST}: " + ", ".join(reasons))
        file, names = manifest["files"][0], os.listdir(image.directory)
        if is_whole:
            file = self._check_file(image, file, names)
        v2 = complete({**manifest, "files": [file]}, stamp(mtime))
        if image.place.endswith(INCOMING):
            v2["state"] = "unactivated"
        v2.pop("icon", None)
        for name in [name for name in ICONS if name in names and name != image.file]:
            with contextlib.suppress(OSError):            # a link that is not to be followed
                trusted_stat(f"{image.directory}/{name}", self.serve_dir)
                image.icon, v2["icon"] = name, True
        self._keep(image, v2, file)
        shown_file = {**file, "path": image.path, "url": self.host_placeholder}
        if DSAPI in apis:
            image.dsapi = self._render_dsapi(
                as_v1(manifest, v2, shown_file, self.creator), image)
        if v2["state"] == "unactivated" and "published_at" not in manifest:
            del v2["published_at"]        # that is when it is activated
        if DSAPI_V2 in apis:
            image.dsapi_v2 = self._render_dsapi(as_v2(v2, shown_file), image)
        if IMGAPI in apis:
            image.imgapi = self._render_v2(v2 if is_whole else {**v2, "files": []})

    def _check_file(self, image, stored, names) -> dict:
        """files[0] for clients, compared with the file on disk.  Raises BadImage and OSError."""
        image.file = image.path = stored.get("path") or sole_file(
            image.directory, names, stored.get("size"))
        path = f"{image.directory}/{image.file}"
        status = trusted_stat(path, self.serve_dir)
        image.file_key = stat_key(status)
        if not stat.S_ISREG(status.st_mode):
            raise BadImage(f"{image.file}: not a regular file")
        if status.st_mode & 0o444 != 0o444 and not os.access(path, os.R_OK):
            raise BadImage(f"{image.file}: {os.strerror(errno.EACCES)}")
        file = {key: value for key, value in stored.items()
                if key not in ("path", "url", "md5_of", "sha256")}
        if file.setdefault("size", status.st_size) != status.st_size:
            raise BadImage(f"{image.file}: its size is not the {file['size']} bytes of {MANIFEST} "
                           "(still being copied?)")
        if "compression" not in file:
            with open(open_regular(path)[0], "rb", buffering=0) as data:
                file["compression"] = compression_of(data.read(8), image.file)
        image.md5 = recorded_md5(stored)
        image.claimed_md5 = bytes.fromhex(file["md5"]) if "md5" in file else None
        if "sha1" not in file:
            hashes = self.hasher.hashes(path, image.file_key)
            if hashes is None:
                image.try_again = True
                raise BadImage(f"{image.file}: being checked, since {MANIFEST} has no sha1")
            file["sha1"], image.md5 = hashes
        suffix = COMPRESSIONS[file["compression"]]
        if "path" not in stored and not image.file.endswith(suffix):
            image.path += suffix          # imgadm 1 knows the compression by it alone
        return file

    def _keep(self, image, v2, file):
        """Cache the values of a manifest that filters, order and downloads need."""
        image.size, image.sha1 = file["size"], file["sha1"]
        image.name, image.version, image.state = v2["name"], v2["version"], v2["state"]
        image.order = order_of(v2["published_at"]), image.uuid
        image.type, image.os = sys.intern(v2["type"]), sys.intern(v2["os"])
        image.owner = sys.intern(v2["owner"])
        image.origin, image.public = v2.get("origin"), v2["public"]
        image.acl = tuple(v2.get("acl", ()))
        image.billing_tags = tuple(v2.get("billing_tags", ()))
        image.channels = tuple(v2.get("channels", ()))

    def _render_dsapi(self, manifest, image):
        before, after = render_json(manifest).split(self.host_placeholder)
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


def no_common_channel(channels, origin) -> str | None:
    """Why imgadm could not import an image with these channels by a sound origin; else None."""
    if channels and set(channels).isdisjoint(origin.channels):
        return (f"its origin {origin.uuid} is in none of its channels: imgadm cannot import it "
                "from there")
    return None


def origin_problem(image, find, with_channels) -> str | None:
    """Why imgadm could not import a sound image by the one that it builds on; else None.

    find(uuid): the image of that uuid, or None.
    """
    origin = image.origin and find(image.origin)
    if image.origin and (origin is None or origin.problem):
        return f"imgadm cannot import it until image {image.origin} is on this server, too"
    if origin and origin.state == "unactivated" != image.state:
        return f"imgadm cannot import it until image {origin.uuid} is activated"
    return no_common_channel(image.channels, origin) if origin and with_channels else None


ENDLESS = "its origins form a cycle"


def endless(origins) -> set:
    """The uuids whose chain of origins never ends, of {uuid: its origin}.

    imgadm would follow it for ever.
    """
    verdicts = {}
    for link in origins:
        chain = set()
        while link in origins and link not in verdicts and link not in chain:
            chain.add(link)
            link = origins[link]
        verdicts.update(dict.fromkeys(chain, link in chain or verdicts.get(link, False)))
    return {uuid for uuid, is_endless in verdicts.items() if is_endless}


def etag_of(*parts) -> bytes:
    """The sha1 of the bytes shown, in hexadecimal: the same on every replica."""
    return hashlib.sha1(b"\0".join(parts)).hexdigest().encode()


class Listing:
    """A JSON array of images in one form, rendered piece by piece as it is sent.

    images      those of a snapshot, in its order
    numbers     places in them, of the images of this list; None for all
    text_of     a function of an Image: its text, in bytes
    length      bytes of the array

    Pieces are cached while there is room for the list; a reader has only its position.
    """

    __slots__ = ("_images", "_numbers", "_text_of", "_starts", "_pieces", "length", "etag",
                 "fields", "zipped")

    def __init__(self, images, text_of, etag=None, numbers=None):
        """Render it once, to learn its length; for a thread."""
        self._images, self._text_of, self.etag = images, text_of, etag
        self._numbers = None if numbers is None else array.array("I", numbers)
        self._pieces = self.zipped = None
        self.fields = b""                     # header lines that go with it, for routes
        self._starts = starts = [0]           # the first image of each piece
        size, self.length = 0, 2              # b"[]", or the b"\n]" behind the last image
        for number, image in enumerate(self._between(0, None)):
            if size > LIST_PIECE:
                starts.append(number)
                size = 0
            text = text_of(image)
            size += len(text)
            # As render writes it, behind b"[\n  " or b",\n  ".
            self.length += 4 + len(text) + 2 * text.count(b"\n")

    def _between(self, first, last) -> list:
        if self._numbers is None:
            return self._images[first:last]
        return [self._images[number] for number in self._numbers[first:last]]

    def for_host(self, text_of, growth) -> Listing:
        """The same list for another host, of which each image is `growth` bytes longer."""
        other = copy.copy(self)
        other._text_of, other._pieces, other.zipped = text_of, None, None
        other.length += len(self._images) * growth
        return other

    def __len__(self):
        """The number of its pieces; an empty array is one."""
        return len(self._starts)

    def render(self, number) -> bytes:
        """One piece; the first begins the array, the last ends it."""
        first, *rest = self._starts[number:number + 2]
        images = self._between(first, rest[0] if rest else None)
        if not images:
            return b"[]"
        text = b",\n".join(map(self._text_of, images)).replace(b"\n", b"\n  ")
        return b"%b\n  %b%b" % (b"," if number else b"[", text, b"" if rest else b"\n]")

    def parts(self, number, skip, budget) -> list:
        """Parts to send from `skip` bytes behind the beginning of a piece, of about `budget`.

        At most one is rendered, since other clients wait for that; uncached, it is sent whole, or
        the rest would be rendered again.  Called by the thread that owns the connection; two that
        render one piece at once store the same bytes.
        """
        parts, pieces, end = [], self._pieces, len(self._starts)
        while budget > 0 and number < end and len(parts) < LIST_PARTS:
            if pieces is None:
                return [memoryview(self.render(number))[skip:]]
            piece = pieces[number]
            if piece is None:
                pieces[number] = piece = self.render(number)
                end = 0
            parts.append(memoryview(piece)[skip:skip + budget])
            budget -= len(piece) - skip
            number, skip = number + 1, 0
        return parts

    @property
    def kept(self) -> bool:
        return self._pieces is not None

    def keep(self):
        """Cache pieces from now on."""
        self._pieces = [None] * len(self)

    def release(self):
        """Drop its cached pieces: they are rendered again for clients that still read."""
        self._pieces = self.zipped = None


class Rendered(bytearray):
    """Bytes that are cached or being sent; a reference to them can be weak."""


def gzipped(parts) -> Rendered:
    """The gzip form of bytes in parts, for a thread: some 30 ms for each MB."""
    import zlib
    packer, data = zlib.compressobj(6, wbits=31), Rendered()
    for part in parts:
        data += packer.compress(part)
    data += packer.flush()
    return data


class Snapshot:
    """The images on show at one moment, in order of publishing, and lists of them."""

    def __init__(self, images):
        self.images = tuple(sorted(images, key=lambda image: image.order))
        self.forms = {}               # (api, view): (the first Listing of it, its host)
        self.listings = {}            # (api, view, host): Listing, the oldest first
        self.pages = {}               # rendered pages, for Page
        self.texts = None             # uuid: the text for the page's filter, once it is used


class Store:
    """The images of one serve_dir.

    Single images are re-checked with each request for them, all images when a list is asked
    for, by one at a time.  in_slices(job) runs a generator between other work, up to where it
    yields True: from there on in a thread.
    """

    def __init__(self, config, log, in_slices=lambda job: start_new_thread(run_out, (job,))):
        self.directory = config.serve_dir
        self.place = os.path.join(config.serve_dir, "")
        self.log = log
        self._in_slices = in_slices
        self._hides = config.read != "anyone"
        self._reader = ImageReader(config, Hasher(later=True))
        self._told = set()            # warnings of origins that were logged
        self._images = {}             # uuid: Image, sound or not; written under _lock
        self._lock = threading.Lock()
        self._recheck_lock = threading.Lock()     # taken before _lock
        self._rechecking = False      # an early re-check runs
        self._empty = set()           # uuids in serve_dir without a manifest; changed in place
        self._snapshot = None
        self._apis = frozenset()      # APIs that all images of the snapshot are rendered for
        self._changed = True          # an image has been read since the snapshot was made
        self._names_key = None        # serve_dir as it was when its names were read
        self._checked = -math.inf     # when the last re-check of all images began (monotonic)
        self._endless = frozenset()   # images left out of the snapshot since their origins cycle
        self._names_at_start = ()     # until the first list: their images are no news for the log
        with contextlib.suppress(OSError):            # the first request meets it, too
            self._names_at_start = self._names()
        # One thread at a time computes lists: several would compete with the event loop for
        # the interpreter's lock, and be no faster.
        self.rendering = threading.Lock()
        self._lists_lock = threading.Lock()       # for listings of a snapshot, and gzip forms
        self._zipping = threading.Lock()
        self._zipped = weakref.WeakValueDictionary()      # id: Rendered that is in use

    # single images

    def image(self, uuid, api, may_block) -> Image:
        """The image of a directory, as it is on disk now, in any state.

        Raises ApiError (404) where there is none that is sound, NeedsThread where it must be
        read, OSError where serve_dir is missing.
        """
        image = self._images.get(uuid)
        if image is None or not image.is_fresh(api):
            image = self._find(uuid, api, may_block)
        if image is None or image.try_again:
            os.stat(f"{self.directory}/.")            # is it serve_dir that cannot be read?
        if image is None or image.problem or image.origin and not self._ends(
                image, api, may_block):
            raise not_found(f"image {uuid} not found")
        return image

    def _find(self, uuid, api, may_block) -> Image | None:
        """An image that memory has not, or not fresh, sound or not; None: not here.

        Raises NeedsThread.
        """
        # Where strangers do not see all images, time must not tell a private one from none: new
        # ones are read for any uuid that is not in memory.
        if self._hides and self._age(api) == math.inf:
            self.snapshot(api, may_block)
        if uuid not in self._images and not os.path.lexists(f"{self.directory}/{uuid}"):
            return None
        if not may_block:
            raise NeedsThread
        with self._lock:
            image = self._images.get(uuid)
            if image is None or not image.is_fresh(api):
                image = self._load(uuid, api)
        return image

    def _ends(self, image, api, may_block) -> bool:
        """Whether its chain of origins ends: else imgadm would follow it for ever.

        It is followed, and each link re-checked, once a second.  Raises NeedsThread for more
        than LINKS_IN_LOOP links.
        """
        now = time.monotonic()
        if now - image.chain_checked < RECHECK:
            return True
        chain, link = {image.uuid}, image
        while link is not None and not link.problem and link.origin:
            uuid = link.origin
            if uuid in chain:
                self._warn_once(f"image {image.uuid} is left out: {ENDLESS}")
                return False
            if len(chain) > LINKS_IN_LOOP and not may_block:
                raise NeedsThread
            chain.add(uuid)
            link = self._images.get(uuid)
            if link is None or now - link.checked >= RECHECK and not link.is_fresh(api):
                link = self._find(uuid, api, may_block)
        image.chain_checked = now
        self._warn_once(*self._origin_texts([image]))
        return True

    def unactivated(self, uuid) -> Image:
        """The image in .incoming-<uuid>, with its file or without.  Raises ApiError (404)."""
        image = self._reader.read_unactivated(uuid)
        if image is None or image.problem:
            raise not_found(f"image {uuid} not found")
        return image

    def in_any_state(self, uuid) -> Image:
        """An image, active or not, as it is on disk now.  Raises ApiError (404)."""
        try:
            return self.image(uuid, IMGAPI, True)
        except ApiError:
            return self.unactivated(uuid)

    def all_images(self) -> list:
        """All sound images, in any state, in order; for a thread.  Raises OSError."""
        self.snapshot(IMGAPI, True)
        images = [image for uuid, image in list(self._images.items())
                  if not image.problem and uuid not in self._endless]
        for uuid in self._names(INCOMING) - set(self._images):
            image = self._reader.read_unactivated(uuid)
            if image is not None and not image.problem:
                images.append(image)
        return sorted(images, key=lambda image: image.order)

    def count_states(self) -> dict:
        """Counts of images by state, and of those left out; for a thread.  Raises OSError."""
        counts = collections.Counter(active=0, disabled=0, unactivated=0, left_out=0)
        self.snapshot(IMGAPI, True)
        for uuid, image in list(self._images.items()):
            is_left_out = image.problem or uuid in self._endless
            counts["left_out" if is_left_out else image.state] += 1
        counts["unactivated"] += len(self._names(INCOMING))
        return counts

    def _load(self, uuid, api) -> Image | None:
        """Read one image again; _lock is held.  Logs the change."""
        before = self._images.get(uuid)
        apis = self._apis | {api} | {other for other in RENDERINGS
                                     if before is not None and getattr(before, other)}
        image = self._reader.read(uuid, self.place, apis)
        self._changed |= (before is not None and not before.problem
                          or image is not None and not image.problem)
        if image is None:
            self._images.pop(uuid, None)
            self._empty.add(uuid)
        else:
            self._images[uuid] = image
            self._empty.discard(uuid)
        self._log_change(uuid, image, before)
        return image

    def _log_change(self, uuid, image, before):
        """Log that an image came, changed or went: once, and not of those there at the start."""
        if image is None:
            if before is not None:
                self.log.info(f"image {uuid} is gone" + (
                    ", which was left out" if before.problem else f": {before.title}"))
            return
        if image.problem:
            if before is None or before.problem != image.problem:
                self.log.warn(f"image {uuid} is left out: {printable(image.problem)}")
            return
        if before is None or before.problem:
            event, is_news = "is on show", before or uuid not in self._names_at_start
        else:                             # it was rendered for no more APIs
            event = "has changed"
            is_news = any(getattr(before, api)[2] != getattr(image, api)[2]
                          for api in RENDERINGS if getattr(before, api))
        if is_news:
            self.log.info(f"image {uuid} {event}: {image.title}, {image.size} bytes")
        for note in image.notes:
            if before is None or note not in before.notes:
                self.log.warn(f"image {uuid}: {printable(note)}")

    def _origin_texts(self, images) -> list:
        """Warnings of those images that imgadm could not import by their origin."""
        texts = ((image.uuid, origin_problem(image, self._images.get, self._reader.with_channels))
                 for image in images if image.origin)
        return [f"image {uuid}: {text}" for uuid, text in texts if text]

    def _warn_once(self, *texts):
        for text in texts:
            if text not in self._told:
                self._told.add(text)
                self.log.warn(text)

    def hashes_of(self, fd, image, name):
        """(hex sha1, md5 as bytes) of a small file of an image, open as fd.  Raises OSError."""
        return self._reader.hasher.hashes(f"{image.directory}/{name}", stat_key(os.fstat(fd)), fd)

    def content_md5(self, image, fd):
        """The MD5, as bytes, of an image's file; None where it takes too long.  Raises OSError."""
        if image.md5 is not None or image.size > MD5_LIMIT:
            return image.md5
        return self.hashes_of(fd, image, image.file)[1]

    # lists

    def snapshot(self, api, may_block) -> Snapshot:
        """All active images, rendered for api.  Raises NeedsThread, and OSError of serve_dir."""
        age = self._age(api)
        if age < RECHECK:
            if age >= RECHECK_EARLY and not self._rechecking:
                self._rechecking = True
                self._in_slices(self._recheck_early(api))
            return self._snapshot
        if not may_block:
            raise NeedsThread
        with self._recheck_lock:
            if self._age(api) >= RECHECK_EARLY:
                run_out(self._recheck(api))
        return self._snapshot

    def _age(self, api) -> float:
        """Seconds since the last re-check; infinite where a name has come or gone since, or
        images are not rendered for `api`.  Raises OSError.
        """
        if api in self._apis and self._key_of_names() == self._names_key:
            return time.monotonic() - self._checked
        return math.inf

    def _recheck_early(self, api):
        """_recheck before requests have to wait for it, unless a thread is at it."""
        has_lock = self._recheck_lock.acquire(blocking=False)
        try:
            if has_lock:
                yield from self._recheck(api)
        except Exception:
            self._checked = -math.inf     # the next list meets and logs the same error
        finally:
            self._rechecking = False
            if has_lock:
                self._recheck_lock.release()

    def _key_of_names(self):
        """A value that changes when a name in serve_dir comes, goes or is replaced."""
        status = os.stat(self.directory)
        return status.st_ctime_ns, status.st_mtime_ns, status.st_ino, status.st_dev

    def _names(self, prefix="") -> set:
        """The names behind `prefix` in serve_dir that are, or may be meant for, uuids."""
        names = os.listdir(self.directory)
        if prefix:
            names = [name[len(prefix):] for name in names if name.startswith(prefix)]
        return {name for name in names if is_uuid(name.lower())}

    def _recheck(self, api):
        """Re-check every name, and every image if that is due; _recheck_lock is held.

        A generator: it yields after each slice, True where it would go on to wait for a disk.  In
        a thread, the interpreter's lock would change hands at each of 30,000 calls of stat.
        """
        now = time.monotonic()
        everything = now - self._checked >= RECHECK_EARLY or api not in self._apis
        key = self._key_of_names()
        # A change within one tick of the file system's clock leaves the time as it is, and may
        # come after the names are read: the time must be older than RACY before that.
        settled = abs(time.time_ns() - max(key[:2])) > RACY
        uuids, stale = {*self._images, *self._empty}, set()
        if key != self._names_key:
            names = self._names()
            stale, uuids = uuids - names, names
        slice_end = time.monotonic() + RECHECK_SLICE
        for uuid in uuids:
            image = self._images.get(uuid)
            if image is None or everything and not image.is_fresh(api, True):
                stale.add(uuid)
            if time.monotonic() > slice_end:
                yield time.monotonic() > slice_end + RECHECK_SLOW
                slice_end = time.monotonic() + RECHECK_SLICE
        if stale or self._changed:
            yield True
            with self._lock:
                for uuid in sorted(stale):
                    self._load(uuid, api)
                if self._changed:
                    self._changed = False
                    self._replace_snapshot()
        self._empty &= uuids
        # The event loop reads these without a lock, in the other order.
        self._names_key = key if settled else None
        self._apis |= {api}
        self._names_at_start = ()
        if everything:
            self._checked = now

    def _replace_snapshot(self):
        """Make a snapshot of the images as they are in memory; _lock is held."""
        sound = [image for image in self._images.values() if not image.problem]
        self._endless = endless({image.uuid: image.origin for image in sound if image.origin})
        before, self._snapshot = self._snapshot, Snapshot(
            image for image in sound
            if image.state == "active" and image.uuid not in self._endless)
        if before is not None:
            with self._lists_lock:
                for listing in list(before.listings.values()):
                    listing.release()
        texts = [f"image {uuid} is left out: {ENDLESS}" for uuid in sorted(self._endless)]
        texts += self._origin_texts(sound)
        self._warn_once(*texts)
        self._told = set(texts)       # a warning is due again after it has not been

    def listing(self, api, view, select, text_of, may_block, host=b"") -> Listing:
        """The list of all active images that select(images) gives, in one form.

        view: the form among those of the API; host: bytes that text_of puts into each image
        once.  Raises NeedsThread for the first list of a view.
        """
        snapshot = self.snapshot(api, may_block)
        listing = snapshot.listings.get((api, view, host))
        if listing is not None:
            return listing
        if (api, view) not in snapshot.forms:
            if not may_block:
                raise NeedsThread
            with self.rendering:
                if (api, view) not in snapshot.forms:     # none has rendered it since
                    images = select(snapshot.images)
                    etag = etag_of(repr(view).encode(),
                                   *(getattr(image, api)[2] for image in images))
                    snapshot.forms[api, view] = Listing(images, text_of, etag.decode()), host
        first, first_host = snapshot.forms[api, view]
        listing = first.for_host(text_of, len(host) - len(first_host))
        with self._lists_lock:
            listing = snapshot.listings.setdefault((api, view, host), listing)
            # Those of a snapshot that was replaced just now were released.
            if snapshot is self._snapshot and not listing.kept:
                listing.keep()
            if len(snapshot.listings) > LISTS_KEPT:
                snapshot.listings.pop(next(iter(snapshot.listings))).release()
        return listing

    def zipped(self, listing, may_block) -> Rendered | None:
        """The gzip form of a kept list; None where making one is not worth it now.

        One thread at a time makes them, and those in use are bounded: clients may leave lists
        unread, and send many Host headers.  Raises NeedsThread.
        """
        data = listing.zipped
        if data is not None or not listing.kept:
            return data
        if not may_block:
            raise NeedsThread
        with self._lists_lock:
            used = sum(len(other) for other in self._zipped.values())
        if used > ZIPPED_LIMIT or not self._zipping.acquire(blocking=False):
            return None
        try:
            data = gzipped(map(listing.render, range(len(listing))))
            with self._lists_lock:
                self._zipped[id(data)] = data
                if listing.kept:
                    listing.zipped = data
            return data
        finally:
            self._zipping.release()


# -- image files -------------------------------------------------------------------------
#
# The findings of one pass over an image file: its size and hashes, how it is compressed, and
# whether the ZFS send stream inside is whole, and one that imgadm can install.  imgadm runs
# `gzip -cdfq`, `bzip2 -cdfq` or `xz -cdfq` and `zfs receive`.

CHUNK = 256 << 10             # bytes of an image file fed at once; a bomb makes 256 MiB of them
LZMA_MEMORY = 256 << 20       # bytes; xz -9 needs 65 MiB to decompress, a bomb asks for more
MAGIC_LENGTH = 6              # bytes: the longest of MAGIC
MAGIC_BYTES = {kind: magic[0] for magic, kind in MAGIC.items()}      # the first of a member
HEAD_CHUNK = 16 << 10         # bytes of a file fed at once where its beginning is enough

DRR_LENGTH = 312                  # bytes of a record, without payload (zfs_ioctl.h)
DRR_BEGIN, DRR_END = 0, 5         # drr_type
DRR_MAGIC = 0x2F5bacbac
DRR_FLAG_CLONE = 1                # drr_flags: the origin is a snapshot of another data set
COMPOUND = 2                      # header type in drr_versioninfo: a package (zfs send -p, -R)
RESUMING = 1 << (20 + 2)          # feature in drr_versioninfo, whose lowest 2 bits are the type
STREAM_TYPES = {2: "zone-dataset", 3: "zvol"}     # drr_type of DRR_BEGIN: DMU_OST_*
ZFS_TYPES = ("zone-dataset", "zvol", "lx-dataset")    # image types that are ZFS streams
LAYER_TYPES = ("docker", "lxd")                   # image types that never are
PROLOGUE = 1 << 20                # bytes kept until the BEGIN record of the data set has come
TAIL = 64 << 10                   # bytes kept for the END records and the padding behind them
PADDING = b"\0\n"                 # bytes that zfs receive leaves unread: tapes, echo


class SendStream:
    """A ZFS send stream, fed piece by piece: the fields of its BEGIN, and whether it is whole.

    type is None for other data; guid and from_guid are numbers, from_guid 0 for a full
    stream.
    """

    def __init__(self):
        self.type = None
        self.guid = self.from_guid = 0
        self._order = None
        self._is_compound = self._is_clone = self._is_resumed = False
        self._head = bytearray()
        self._tail = bytearray()

    def feed(self, data):
        """Feed the next bytes of the stream, decompressed."""
        self._tail += data[-TAIL:]
        if len(self._tail) > 2 * TAIL:    # not each time: pieces may be single bytes
            del self._tail[:-TAIL]
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
            self._is_compound = True
            payload, = struct.unpack_from(self._order + "I", self._head, 4)
            at = 2 * DRR_LENGTH + payload
            if len(self._head) < at + DRR_LENGTH:
                return
        version, kind, flags, self.guid, self.from_guid = struct.unpack_from(
            self._order + "Q8xIIQQ", self._head, at + 16)
        self._is_clone = bool(flags & DRR_FLAG_CLONE)
        self._is_resumed = bool(version & RESUMING)
        self.type = STREAM_TYPES.get(kind)
        self._head = None                 # no later BEGIN counts

    def problem(self, whole=True):
        """Why imgadm could not install the stream; None where it could.

        whole: all of it was fed; else only its BEGIN tells.
        """
        if self.type is None:
            return "it is no ZFS send stream"
        if self._is_resumed:
            return "it is the rest of an interrupted stream (zfs send -t): send all of it"
        if self.from_guid and not self._is_clone:
            return ("the ZFS stream is incremental, but not that of a clone: zfs receive finds "
                    "no data set for it; send a clone of the origin")
        if not whole:
            return None
        ends = self._last_ends()
        if self._is_compound and ends[1:] == [0] and ends[0] != self.guid:
            return "it is a package of several snapshots: send one, without -R or -I"
        expected = [self.guid, 0] if self._is_compound else [self.guid]
        if ends[-len(expected):] != expected:
            return "the ZFS stream is cut short: its end record is missing"
        return None

    def _last_ends(self) -> list:
        """The guid in the END record behind which is only padding, and in one just before it.

        An END names its snapshot by guid.  One more, of none, ends a package; libzfs writes
        that even where it has failed before.
        """
        head, tail = struct.pack(self._order + "II", DRR_END, 0), self._tail
        at = tail.rfind(head, max(0, len(tail.rstrip(PADDING)) - DRR_LENGTH),
                        max(0, len(tail) - DRR_LENGTH + len(head)))
        return [struct.unpack_from(self._order + "Q", tail, start + 40)[0]
                for start in (at - DRR_LENGTH, at) if start >= 0 and tail.startswith(head, start)]


def member_decompressor(kind):
    """(a function that makes the decompressor of one member, its errors) of a compression.

    Modules are imported on use: a server that only serves does not need them.
    """
    if kind == "gzip":
        import zlib
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    if kind == "bzip2":
        import bz2
        return bz2.BZ2Decompressor, (OSError, ValueError)
    if kind == "xz":
        import lzma
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, LZMA_MEMORY), lzma.LZMAError
    return lambda: None, ()


class Decompressor:
    """The bytes inside a gzip, bzip2 or xz file (of one member or several), in small pieces.

    Of an uncompressed file, its own bytes.
    """

    def __init__(self, kind):
        self.kind = kind
        self._make, self._errors = member_decompressor(kind)
        self._member = self._make()
        self._padding = 0                 # bytes of it since the last member

    def feed(self, data):
        """Yield the decompressed bytes of `data`, PIECE at most at a time.  Raises BadImage."""
        if self.kind == "none":
            yield data
            return
        try:
            while data or (self._member and not getattr(self._member, "needs_input", True)):
                if self._member is None:
                    data = self._skip_padding(data)
                    if not data:
                        return
                    self._member = self._make()
                # zlib returns unread input; bz2 and lzma keep it, and report that.
                piece = self._member.decompress(data, PIECE)
                data = getattr(self._member, "unconsumed_tail", b"")
                if self._member.eof:
                    data = self._member.unused_data
                    self._member = None
                yield piece
        except self._errors as error:
            if self.kind == "xz" and "emory" in str(error):
                raise BadImage(f"the xz data needs more than {LZMA_MEMORY >> 20} MiB to unpack: "
                               "compress it with xz -9 at most")
            raise BadImage(f"the {self.kind} data is corrupt ({error})")

    def _skip_padding(self, data):
        """`data` without the padding it begins with; raises BadImage where no tool reads on.

        xz takes NULs by fours.  Other bytes than a member's are ignored by bzip2, and passed on
        as they are by gzip -f: zfs receive leaves padding behind a stream unread.
        """
        is_xz = self.kind == "xz"
        rest = data.lstrip(b"\0" if is_xz else PADDING)
        self._padding += len(data) - len(rest)
        if rest and is_xz:
            self._check_padding()
            self._padding = 0
        elif rest and (self._padding or MAGIC_BYTES[self.kind] != rest[0]):
            raise BadImage(f"the {self.kind} data is followed by other bytes, which {self.kind} "
                           "would not unpack")
        return rest

    def _check_padding(self):
        if self.kind == "xz" and self._padding % 4:
            raise BadImage("the xz data is corrupt (its padding is no multiple of 4 bytes)")

    def close(self):
        """Raise BadImage if the data ended within a member, or with padding that is none."""
        if self._member is not None:
            raise BadImage(f"the {self.kind} data is cut short")
        self._check_padding()


def stream_problem(kind, stream, required, whole=True):
    """Why a file of an image of type `kind` cannot be installed by its stream; None: it can.

    required: the types that must be a stream.  whole: all of it was fed, not the head alone.
    """
    if stream.type is None and kind not in required:
        return None
    problem = stream.problem(whole)
    if problem:
        return problem
    if kind in LAYER_TYPES or (stream.type == "zvol") != (kind == "zvol") and kind != "other":
        return f"the ZFS stream is that of a {stream.type}, but the type is {kind}"
    return None


class FileScan:
    """One pass over an image file: size, hashes, compression, and the stream inside.

    begin(compression) is called before the first byte is unpacked; its errors are passed on.
    Without `whole`, only the beginning is unpacked, for the BEGIN of the stream.
    """

    def __init__(self, begin=lambda compression: None, whole=True):
        self.size, self._when_known, self._whole = 0, begin, whole
        self.compression = None
        self.stream = SendStream()
        self._hashes = {name: hashlib.new(name) for name in ("sha1", "md5", "sha256")}
        self._head = b""
        self._decompressor = None

    def hashes(self) -> dict:
        """sha1, md5 and sha256 of the bytes that were fed, in hexadecimal."""
        return {name: each.hexdigest() for name, each in self._hashes.items()}

    def feed(self, chunk):
        """Feed the next bytes of the file.  Raises BadImage for data that does not decompress."""
        self.size += len(chunk)
        self._hash(chunk)
        if self._decompressor is None:
            self._head += chunk
            if len(self._head) < MAGIC_LENGTH:
                return
            chunk = self._head
        self._feed_stream(chunk)

    def finish(self):
        """End of the file.  Raises BadImage for truncated compressed data."""
        if self._decompressor is None:
            self._feed_stream(self._head)
        if self._whole:
            self._decompressor.close()

    def _hash(self, chunk):
        for each in self._hashes.values():
            each.update(chunk)

    def _feed_stream(self, chunk):
        if self._decompressor is None:
            self.compression = compression_of(self._head, "")
            self._when_known(self.compression)
            self._decompressor = Decompressor(self.compression)
        if self._whole or self.size <= PROLOGUE:
            for piece in self._decompressor.feed(chunk):
                self.stream.feed(piece)


def scan_head(path) -> FileScan:
    """A scan of the beginning alone, until it tells the stream.  Raises BadImage, OSError."""
    found = FileScan()
    with open(open_regular(path)[0], "rb", buffering=0) as file:
        while found.size < PROLOGUE and found.stream.type is None:
            chunk = file.read(HEAD_CHUNK)
            if not chunk:
                found.finish()
                break
            found.feed(chunk)
    return found


# -- publishing --------------------------------------------------------------------------
#
# The only part that writes.  An image is made in .incoming-<uuid>, in serve_dir so that one
# rename(2) shows it whole.  Each file is written under a temporary name, flushed to disk and
# renamed.  The rename is atomic, for several processes and machines; the lock (flock on the
# image's directory) only tells a live import from a killed one, and serialises changes.

STALE = 24 * 3600             # seconds since the last write until --clean removes leftovers
LOCK_PATIENCE = 2.0           # seconds a short change waits for another one of the same image
LOCK_RETRY = 0.02             # seconds between two tries
MKDIR_TRIES = 5               # of a staging directory, while leftovers or others are in the way
XZ_AT_ONCE = 4                # xz files unpacked at once by one server, each with LZMA_MEMORY
ICON_LIMIT = 128 << 10        # bytes of an icon, as in IMGAPI
V2_ALONE = frozenset(("owner", "public", "acl"))      # fields that v1 has no words for
PARTIAL = ".partial"          # beside the manifest: a file of which a mirror has a part
UPSTREAM = ".upstream.json"   # the same: the manifest of the server that a mirror asked
_TEMPORARY = re.compile(r"\.(manifest\.json|\.upstream\.json|file|icon\.(png|jpg|gif))\.[0-9a-f]+")


@contextlib.contextmanager
def temporary_name(name, directory):
    """A name beside `name`, unique on all machines; _TEMPORARY matches it.

    A file of that name in the open directory is removed when the block ends.
    """
    aside = f".{name}.{os.urandom(8).hex()}"
    try:
        yield aside
    finally:
        with contextlib.suppress(OSError):
            os.unlink(aside, dir_fd=directory)


@contextlib.contextmanager
def storing(action, path=None):
    """Convert each OSError in the block to an ApiError: 503 StorageIsDown, `action` and why.

    path: the file that the command line names, where the system knows a part of it at most.
    """
    try:
        yield
    except OSError as error:
        error.filename = path or error.filename
        raise ApiError(503, "StorageIsDown", f"{action}: {error.strerror}") from error


def sync(fd, action, path):
    """fsync an open directory, ignored where unsupported.  Raises ApiError, as storing does."""
    with storing(action, path):
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise


@contextlib.contextmanager
def open_directory(path):
    """The fd of a directory.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def give(fd, serve_dir, like=None):
    """Give an open file the owner and group of `like`, a stat.  Raises OSError.

    Without it, where root writes, those of serve_dir: the service must be able to change it.
    """
    if like is None and serve_dir and os.geteuid() == 0:
        like = os.stat(serve_dir)
    status = os.fstat(fd)
    if like and (like.st_uid, like.st_gid) != (status.st_uid, status.st_gid):
        os.fchown(fd, like.st_uid, like.st_gid)


@contextlib.contextmanager
def new_file(name, directory=None, mode=0o644, or_old=os.O_EXCL):
    """A new binary file in an open directory; on disk when the block has ended.

    It never has a wider mode than this one.  or_old 0: an old one will do.  Raises OSError.
    """
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | or_old, mode,
                 dir_fd=directory)
    with open(fd, "r+b") as file:
        os.fchmod(fd, mode)               # the umask of an ssh session may be 077
        yield file
        file.flush()
        os.fsync(fd)


def replace_file(path, data, directory=None, serve_dir=None, keep_time=False, mode=0o644):
    """Replace a file, atomically and durably.  Raises ApiError.

    directory   the open directory of the file, which may have lost its path to another one.
                Without it symlinks are followed, and the file behind them is replaced
    serve_dir   for the owner of a file that is new, or takes the place of a symlink, as `mode`
                is for its permissions; those of an old one stay
    keep_time   the mtime stays, too
    """
    if directory is None:
        path = os.path.realpath(path)
        with storing(f"cannot write {os.path.basename(path)}", path), \
                open_directory(os.path.dirname(path)) as directory:
            return replace_file(path, data, directory, serve_dir, keep_time, mode)
    name, before = os.path.basename(path), None
    with storing(f"cannot write {name}", path), temporary_name(name, directory) as aside:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):      # never a set-uid bit: the bytes are others'
                before, mode = status, status.st_mode & 0o777
        with new_file(aside, directory, mode) as file:
            file.write(data)
            file.flush()
            try:
                give(file.fileno(), serve_dir, before)
            except PermissionError:
                if before is None or not before.st_mode & stat.S_IROTH:
                    raise                 # its readers may have lost access
            if before is not None and keep_time:
                os.utime(file.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))
        os.rename(aside, name, src_dir_fd=directory, dst_dir_fd=directory)
    sync(directory, f"{name} is written, but not surely on disk", path)


def manifest_bytes(manifest) -> bytes:
    """A manifest as it is stored.  Raises ApiError where it is larger than one can be read."""
    data = (render_json(manifest) + "\n").encode()
    if len(data) > MANIFEST_LIMIT:
        raise ApiError(422, "ValidationFailed", f"the manifest would have {len(data)} bytes, "
                                                f"of which {MANIFEST_LIMIT} are the most")
    return data


def remove_tree(path):
    """Remove a directory, or a file in its place; of a symlink the link.  Raises OSError."""
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        os.unlink(path)
    while os.path.lexists(path):
        with contextlib.suppress(FileNotFoundError):      # an upload into it removes its own file
            shutil.rmtree(path)


def is_still(path, fd) -> bool:
    """Whether the file at `path` is the one that is open as fd."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except OSError:
        return False


def lock_directory(path, refusal, patience=0.0, serve_dir=None):
    """Open a directory and lock it: its fd, or None where there is no such directory.

    With serve_dir, a symlink is followed as trusted_stat does.  Raises OSError, and `refusal`
    where somebody else keeps it locked for `patience` seconds.  On a file system without locks
    (NFS may refuse them) it is opened alone.
    """
    end = time.monotonic() + patience
    while True:
        try:
            trusted = serve_dir and trusted_stat(path, serve_dir)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            if time.monotonic() >= end:
                raise refusal
            time.sleep(LOCK_RETRY)
            continue
        except OSError:
            pass                      # no flock on this file system: rename alone decides then
        if is_still(path, fd) and (not trusted or os.path.samestat(trusted, os.fstat(fd))):
            return fd
        os.close(fd)                      # it was renamed before it was locked


def new_manifest(config, uuid, fields) -> dict:
    """A v1 manifest, as the original import-image wrote it, of the fields that were given.

    v1, because every imgadm since 2012 takes it; imgadm 2 and later upgrade it themselves.
    """
    now = stamp(time.time())
    given = {key: value for key, value in fields.items() if value is not None}
    name, version = given.get("name", ""), given.get("version", "")
    creator, creator_uuid = config.image_creator, config.image_creator_uuid or NOBODY
    return {
        "uuid": uuid, "name": name, "version": version, "description": "",
        "published_at": now, "created_at": now,
        "type": "zone-dataset", "os": "smartos", "platform_type": "smartos",
        "cloud_name": creator, "creator_name": creator, "creator_uuid": creator_uuid,
        "vendor_uuid": config.image_vendor_uuid or creator_uuid,
        "urn": f"{creator}:{creator}:{name}:{version}", **given,
    }


def choose_channels(config, manifest):
    """Set the default channel, if there are any, for an image that names none, as IMGAPI does.

    Returns a warning where the image's origin is in none of them, or None.  Raises ApiError
    (422) for channels in which no client would see the image.
    """
    names = [channel["name"] for channel in config.channels]
    if not names:
        return None
    if not manifest.get("channels") and config.default_channel is not None:
        manifest["channels"] = [config.default_channel]
    channels = manifest.get("channels")
    if not channels:
        raise invalid("channels", f"channels must be given, such as 'channels=[\"{names[0]}\"]': "
                      "the configuration has no default one", "MissingParameter",
                      "ValidationFailed")
    for name in channels:
        if name not in names:
            raise invalid("channels", f"there is no channel {spell(name)} in the configuration, "
                          f"but {first_of(names)}", kind="ValidationFailed")
    origin = manifest.get("origin") and ImageReader(config).read(
        manifest["origin"], os.path.join(config.serve_dir, ""), ())
    if origin and not origin.problem:
        return no_common_channel(channels, origin)
    return None


def new_uuid() -> str:
    import uuid
    return str(uuid.uuid4())


def file_name(manifest, compression) -> str:
    """A name for the image file: NAME-VERSION.zfs.gz, fit for any URL and any shell."""
    kind = ".zvol" if manifest["type"] == "zvol" else ".zfs"
    name = re.sub("[^A-Za-z0-9._+-]+", "-", f"{manifest['name']}-{manifest['version']}")
    return name.strip(".-")[:200] + kind + COMPRESSIONS[compression]


def busy(uuid) -> ApiError:
    return ApiError(409, "ImageUuidAlreadyExists",
                    f"image {uuid} is being imported or changed by somebody else")


def already_active(uuid) -> ApiError:
    return ApiError(422, "ImageAlreadyActivated", f'image "{uuid}" is already activated')


def discarded(uuid) -> ApiError:
    return not_found(f"image {uuid} was discarded while it was imported")


class ImageDirectory:
    """The directory of one image at `path`; open as fd, and locked, until a block ends.

    fd None: it is not open, and perhaps no directory.  stored: the manifest that was written
    last, by this object.  All methods raise ApiError.
    """

    def __init__(self, uuid, path, fd=None):
        self.uuid, self.path, self.fd, self.stored = uuid, path, fd, None
        self.serve_dir = os.path.dirname(path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.fd is not None:
            os.close(self.fd)

    def manifest(self) -> dict:
        """Its manifest as stored."""
        with storing(f"image {self.uuid} cannot be read"):
            try:
                return read_manifest(self.path, self.serve_dir)[0]
            except FileNotFoundError:     # discard does not wait for the lock
                raise not_found(f"image {self.uuid} not found")
            except BadImage as error:
                raise ApiError(422, "ValidationFailed", f"image {self.uuid}: {error}")

    @contextlib.contextmanager
    def writing(self):
        """A block that writes in it.  404 where it was discarded: that takes no lock."""
        try:
            yield
        except ApiError as error:
            if isinstance(error.__cause__, FileNotFoundError) and not is_still(self.path, self.fd):
                raise discarded(self.uuid) from error
            raise

    def write(self, name, data):
        """Replace one of its files."""
        with self.writing():
            replace_file(os.path.join(self.path, name), data, self.fd, self.serve_dir)

    def write_manifest(self, manifest):
        """Replace its manifest while it is not on show."""
        self.write(MANIFEST, manifest_bytes(manifest))
        self.stored = manifest

    def change(self, change) -> dict:
        """Store change(manifest) as its manifest in any state, and return it.

        The mtime stays: an image without published_at shows it.  So does a symlink that may be
        followed; the file behind it is replaced.
        """
        before = self.manifest()
        manifest = change(before)
        if manifest != before:
            path, data = os.path.join(self.path, MANIFEST), manifest_bytes(manifest)
            with self.writing(), contextlib.ExitStack() as stack:
                directory = self.fd
                with storing(f"cannot write {MANIFEST}", path):
                    if os.path.islink(path):
                        path, link = os.path.realpath(path), path
                        if not os.path.samestat(trusted_stat(link, self.serve_dir),
                                                os.lstat(path)):
                            raise OSError(errno.ESTALE, "its symlink has changed")
                        directory = stack.enter_context(open_directory(os.path.dirname(path)))
                replace_file(path, data, directory, self.serve_dir, keep_time=True)
        return manifest

    def write_icon(self, content_type, data):
        """Give it an icon, in place of the one before."""
        name = {kind: name for name, kind in ICONS.items()}.get(content_type)
        if name is None:
            raise ApiError(400, "Upload", f"invalid content-type, {content_type}, must be one of "
                           + ", ".join(sorted(ICONS.values())))
        if len(data) > ICON_LIMIT:
            raise ApiError(400, "Upload", f"icon size {len(data)} exceeds the maximum allowed "
                           f"size, {ICON_LIMIT >> 10} KiB")
        self.write(name, data)
        self.remove_icons(but=name)

    def remove_icons(self, but=None) -> int:
        """Remove all icons but one; returns how many."""
        with storing("the icon cannot be changed", self.path):
            names = [name for name in os.listdir(self.fd) if name in ICONS and name != but]
            for name in names:
                os.unlink(name, dir_fd=self.fd)
        sync(self.fd, "the icon is changed, but not surely on disk", self.path)
        return len(names)

    def move(self, path):
        """Rename it; another directory that has come in its place is put back.

        Raises OSError, too.
        """
        os.rename(self.path, path)
        if self.fd is not None and not is_still(path, self.fd):
            try:
                os.rename(path, self.path)
            except OSError:               # a third one has come in the place of that
                ImageDirectory(self.uuid, path).set_aside()
            raise busy(self.uuid)

    def set_aside(self) -> str:
        """Rename it out of sight, as move does; returns the new path."""
        name = f"{DISCARDED}{self.uuid}.{os.urandom(8).hex()}"
        aside = os.path.join(os.path.dirname(self.path), name)
        self.move(aside)
        return aside


class Publisher:
    """The verbs on disk: each atomic and durable, for any thread, process or machine.

    They raise ApiError, with the codes of IMGAPI and no path in the message; its __cause__
    is the OSError where the disk is at fault, with the path.

    turn: a context manager that is entered for each piece of a file that is hashed.
    """

    def __init__(self, config, turn=None):
        self.config, self.serve_dir = config, config.serve_dir
        self._reader = ImageReader(config)
        self._turn = turn or contextlib.nullcontext()
        self._xz = threading.BoundedSemaphore(XZ_AT_ONCE)
        self._check = lambda: None

    def checking(self, check):
        """This publisher, with a check() of each image that it has locked; it may raise ApiError.

        No other change of the image comes between that and the verb's.
        """
        publisher = copy.copy(self)
        publisher._check = check
        return publisher

    # the verbs

    def create(self, manifest) -> dict:
        """Make an unactivated image without a file; one that nobody writes is replaced.

        As the next two, it returns the manifest as stored.
        """
        with self._created(validate(manifest)) as image:
            return image.stored

    def add_file(self, uuid, read, expected=None, check_stream=True) -> dict:
        """Store the file of an unactivated image.

        read          read(n): at most n bytes of the file, b"" at its end.  Its OSError is
                      the sender's fault (400 Upload); all else it raises is passed on
        expected      facts of files[0] (size, sha1, compression, dataset_guid) that must hold,
                      and further ones to store (path)
        check_stream  whether an image of a ZFS type must be one whole ZFS stream, and a
                      stream of any type one that imgadm can install

        After a failure the image has the file that it had before.
        """
        if os.path.lexists(self._path(uuid)):
            raise ApiError(422, "ImageFilesImmutable",
                           f"cannot modify files on activated image {uuid}")
        with self._locked(uuid, (INCOMING,), 0.0) as image:
            self._store_file(image, read, expected or {}, check_stream)
            return image.stored

    def import_image(self, manifest, read, activated=True, check_stream=True) -> dict:
        """create, add_file and activate under one lock: all of it, or nothing stays.

        files[0] of the manifest has facts that must be true of the file.  An ApiError
        whose message says "on show" comes when it was activated all the same.
        """
        expected = (manifest.get("files") or [{}])[0]
        with self._created(validate(manifest)) as image:
            self._store_file(image, read, expected, check_stream)
            if activated:
                self._show(image)
            return image.stored

    def activate(self, uuid):
        """Put a whole image on show, by one rename.

        An image on show whose manifest says unactivated, nuked or pending loses that state.
        """
        if os.path.lexists(self._path(uuid)):
            self.change(uuid, self._without_state)
            return
        refusal = ApiError(422, "NoActivationNoFile",
                           f"image {uuid} cannot be activated: its file is still being written")
        with self._locked(uuid, (INCOMING,), 0.0, refusal) as image:
            self._show(image)

    @staticmethod
    def _without_state(manifest):
        """A manifest without its unactivated state.  Raises ApiError where it has none."""
        if manifest.get("state") not in ("unactivated", "nuked", "pending"):
            raise already_active(manifest.get("uuid"))
        return {key: value for key, value in manifest.items() if key != "state"}

    def update(self, uuid, changes) -> dict:
        """Set fields of an image in any state; None removes one.  Returns its manifest.

        changes     the fields, or a function that is called for them once the image is locked

        A v1 manifest stays v1 unless a field is set that v1 does not have.
        """
        with self._locked(uuid) as image:
            return self._update(image, changes() if callable(changes) else changes)

    def _update(self, image, changes) -> dict:
        """update for a locked image."""
        changes = validate_changes(changes)

        def changed(manifest):
            if is_v1(manifest) and V2_ALONE & changes.keys():
                manifest = upgrade(manifest)
            manifest = {key: value for key, value in {**manifest, **changes}.items()
                        if value is not None or key not in changes}
            validate(manifest)
            if "channels" in changes:
                choose_channels(self.config, manifest)
            return manifest
        return image.change(changed)

    def enable(self, uuid) -> dict:
        """Let an image be listed again; returns its manifest."""
        return self.change(uuid, lambda manifest: {
            key: value for key, value in manifest.items()
            if key != "disabled" and (key, value) != ("state", "disabled")})

    def disable(self, uuid) -> dict:
        """Take an image off the lists; returns its manifest."""
        return self.change(uuid, lambda manifest: {**manifest, "disabled": True})

    def change(self, uuid, change) -> dict:
        """Store change(manifest) as the manifest of an image in any state, and return it."""
        with self._locked(uuid) as image:
            return image.change(change)

    def add_icon(self, uuid, content_type, data):
        """Give an image in any state its icon, in place of the one before."""
        with self._locked(uuid) as image:
            image.write_icon(content_type, data)

    def remove_icon(self, uuid):
        """Remove the icon of an image in any state.  Raises ApiError: 404 where it has none."""
        with self._locked(uuid) as image:
            if not image.remove_icons():
                raise not_found(f'image "{uuid}" has no icon')

    def delete(self, uuid, force=False, instead=dict):
        """Remove an image in any state.

        force       even where other images build on it
        instead     a function that is called once it is locked, for changes of its fields: where
                    there are some it is changed, and stays
        """
        with self._locked(uuid) as image:
            changes = instead()
            if changes:
                self._update(image, changes)
                return
            if not force:
                self.refuse_dependents(uuid)
            self._remove(image)

    def discard(self, uuid):
        """Remove an image that is not active, even while it is being written."""
        self._remove(ImageDirectory(uuid, self._path(uuid, INCOMING)))

    def refuse_existing(self, uuid):
        """Raise ApiError (409) where an image of this uuid is on show."""
        if os.path.lexists(self._path(uuid)):
            raise ApiError(409, "ImageUuidAlreadyExists", f'image uuid "{uuid}" already exists')

    def refuse_dependents(self, uuid, others=None, hint=""):
        """Raise ApiError (422) where other images, by default all here, build on this one."""
        if others is None:
            others = self.dependents().get(uuid)
        if others:
            raise ApiError(422, "ImageHasDependentImages", f'image "{uuid}" has {len(others)} '
                           f"dependent incremental image(s): {first_of(others)}{hint}")

    def manifest(self, uuid) -> dict:
        """The manifest of an image in any state, as stored.  Raises ApiError."""
        with self._locked(uuid) as image:
            return image.manifest()

    def dependents(self) -> dict:
        """uuid: the uuids of all images, in any state, that build on it; if there are any."""
        found = {}
        with storing("the images cannot be read"):
            names = sorted(os.listdir(self.serve_dir))
        for name in names:
            uuid = name.removeprefix(INCOMING)
            origin = (self._read(name) or {}).get("origin") if is_uuid(uuid) else None
            if isinstance(origin, str):
                found.setdefault(origin, []).append(uuid)
        return found

    def _read(self, name):
        """The manifest in a directory of serve_dir, or None: no client could import that."""
        with contextlib.suppress(OSError, BadImage):
            return read_manifest(os.path.join(self.serve_dir, name), self.serve_dir)[0]
        return None

    # directories

    def _path(self, uuid, prefix="") -> str:
        return os.path.join(self.serve_dir, prefix + uuid)

    def _locked(self, uuid, prefixes=("", INCOMING), patience=LOCK_PATIENCE,
                refusal=None) -> ImageDirectory:
        """The image, in the first place where it is.  Raises ApiError: refusal, or 409, where
        somebody else keeps it locked.
        """
        for prefix in prefixes:
            path = self._path(uuid, prefix)
            with storing(f"image {uuid} cannot be read"):
                fd = lock_directory(path, refusal or busy(uuid), patience, self.serve_dir)
            if fd is not None:
                with contextlib.ExitStack() as stack:
                    image = stack.enter_context(ImageDirectory(uuid, path, fd))
                    self._check()
                    stack.pop_all()
                return image
        raise not_found(f"image {uuid} not found" if "" in prefixes else
                        f"no image {uuid} waits to be activated")

    @contextlib.contextmanager
    def _created(self, manifest, is_kept=lambda path: False):
        """A new unactivated image, locked; removed again where the block raises.

        is_kept(path): whether an unfinished one at `path` stays, to be completed.
        """
        uuid = manifest["uuid"]
        self.refuse_existing(uuid)
        if manifest.get("origin"):
            self._check_chain(uuid, manifest["origin"])
        with storing("the image cannot be stored"):
            try:
                image = self._make_directory(uuid, is_kept)
            except OSError:
                with contextlib.suppress(OSError):
                    os.rmdir(self._path(uuid, INCOMING))
                raise
        with image:
            try:
                image.write_manifest({key: value for key, value in manifest.items()
                                      if key not in ("files", "state", "icon")})
                yield image
            except BaseException:
                if is_still(image.path, image.fd) and not is_kept(image.path):
                    with contextlib.suppress(OSError, ApiError):
                        remove_tree(image.set_aside())
                raise

    def _check_chain(self, uuid, origin):
        """Raise ApiError (422) where a new image's origin is not here, or builds on that image:
        in a cycle, an image that waits for its origin would no longer be shown.
        """
        seen, link = set(), origin
        while isinstance(link, str) and link not in seen:
            seen.add(link)
            manifest = self._read(link) or self._read(INCOMING + link) or {}
            if link == origin and not manifest:
                raise ApiError(422, "OriginDoesNotExist",
                               f'origin image "{origin}" does not exist on this server: '
                               f"`imgserver.py mirror URL {origin}` brings it")
            link = manifest.get("origin")
        if uuid in seen:
            raise ApiError(422, "OriginDoesNotExist",
                           f'origin image "{origin}" builds on image "{uuid}" itself')

    def _make_directory(self, uuid, is_kept) -> ImageDirectory:
        """A new staging directory, locked; a leftover is removed.  Raises ApiError and OSError."""
        path = self._path(uuid, INCOMING)
        for _ in range(MKDIR_TRIES):
            is_new = False
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o755)
                is_new = True
            image = ImageDirectory(uuid, path, lock_directory(path, busy(uuid)))
            with contextlib.ExitStack() as stack:
                stack.enter_context(image)
                if image.fd is not None and (is_new or is_kept(path)):
                    os.fchmod(image.fd, 0o755)
                    give(image.fd, self.serve_dir)
                    stack.pop_all()
                    return image
                # Without fd it is gone, or taken for a leftover by others, or no directory.
                if not is_new and (image.fd is not None or not os.path.isdir(path)):
                    with contextlib.suppress(FileNotFoundError):      # others clear it, too
                        aside = image.set_aside()
                        with contextlib.suppress(OSError):
                            remove_tree(aside)
        raise busy(uuid)

    def _remove(self, image):
        """Remove an image with its directory.  Raises ApiError."""
        with storing(f"image {image.uuid} cannot be removed"):
            try:
                aside = image.set_aside()
            except FileNotFoundError:
                raise not_found(f"no image {image.uuid} waits to be activated"
                                if image.fd is None else f"image {image.uuid} not found")
        self._sync(f"image {image.uuid} is removed, but not surely on disk")
        with storing(f"image {image.uuid} is removed, but not all of its files"):
            remove_tree(aside)

    def _sync(self, action):
        """fsync serve_dir.  Raises ApiError."""
        with storing(action), open_directory(self.serve_dir) as fd:
            sync(fd, action, self.serve_dir)

    def _show(self, image):
        """Activate a locked image.  Raises ApiError."""
        uuid, path = image.uuid, self._path(image.uuid)
        refusal = f"image {uuid} cannot be activated"
        with storing(refusal):
            found = self._reader.read(uuid, self._path("", INCOMING), (IMGAPI,))
        if found is None or found.problem:
            raise ApiError(422, "NoActivationNoFile", f"{refusal}: "
                           + (found.problem if found else f"there is no {MANIFEST}"))
        manifest = image.manifest()
        if not manifest.get("published_at"):
            image.write_manifest({**manifest, "published_at": stamp(time.time())})
        with storing(refusal):
            try:
                image.move(path)
            except OSError:
                if os.path.lexists(path):
                    raise already_active(uuid)
                raise
        self._sync(f"image {uuid} is on show, but not surely on disk")

    # files

    def _store_file(self, image, read, expected, check_stream):
        """add_file for a locked image."""
        try:
            with image.writing(), temporary_name("file", image.fd) as aside:
                with storing("the image cannot be stored", image.path):
                    found = self._receive(image, aside, read)
                self._accept(image, aside, found, expected, check_stream)
        except BadImage as error:
            raise ApiError(400, "Upload", f"image refused: {error}")

    def _receive(self, image, name, read) -> FileScan:
        """Write and examine a new file.  Raises ApiError, BadImage, OSError, and as `read`."""
        with new_file(name, image.fd) as file, self._scan() as found:
            give(file.fileno(), self.serve_dir)
            while True:
                try:
                    chunk = read(CHUNK)
                except OSError as error:
                    raise ApiError(400, "Upload", "the image cannot be read: "
                                   f"{error.strerror or error}") from error
                if not chunk:
                    break
                with self._turn:
                    found.feed(chunk)
                file.write(chunk)
            found.finish()
            file.flush()
            if os.fstat(file.fileno()).st_size != found.size:
                raise OSError(errno.EIO, "the disk has not kept all of it")
            return found

    @contextlib.contextmanager
    def _scan(self):
        """A FileScan.  Raises ApiError (503) where too many xz files are being unpacked."""
        with contextlib.ExitStack() as stack:
            def begin(compression):
                if compression == "xz":
                    if not self._xz.acquire(blocking=False):
                        raise unavailable(f"{XZ_AT_ONCE} xz files are on their way", 10)
                    stack.callback(self._xz.release)
            yield FileScan(begin)

    def _accept(self, image, aside, found, expected, check_stream):
        """Make the received file `aside` that of a locked image.  Raises ApiError, BadImage."""
        manifest = image.manifest()
        file = self._describe(manifest, found, expected, check_stream)
        if not is_still(image.path, image.fd):
            raise discarded(image.uuid)
        with storing("the image cannot be stored", image.path):
            # The manifest decides which file counts: another one may still be in use.
            if file["path"] in os.listdir(image.fd):
                name = file_name(manifest, found.compression)
                file["path"] = f"{file['sha1'][:8]}-{name}"
            os.rename(aside, file["path"], src_dir_fd=image.fd, dst_dir_fd=image.fd)
        try:
            image.write_manifest({**manifest, "files": [file]})
        finally:
            self._tidy(image)

    @staticmethod
    def _tidy(image):
        """Remove the files of an unactivated image that its manifest does not name."""
        with contextlib.suppress(ApiError, OSError, LookupError, TypeError):
            name = image.manifest()["files"][0]["path"]
            for each in os.listdir(image.fd):
                if each not in (name, MANIFEST, UPSTREAM, *ICONS):
                    with contextlib.suppress(OSError):
                        os.unlink(each, dir_fd=image.fd)

    def _describe(self, manifest, found, expected, check_stream) -> dict:
        """files[0] of a received file.  Raises BadImage where it contradicts the known facts."""
        if found.size == 0:
            raise BadImage("there is no data")
        expected = {key: value for key, value in expected.items() if value not in (None, "")}
        hashes, stream = found.hashes(), found.stream
        truth = {"size": found.size, "sha1": hashes["sha1"], "compression": found.compression}
        if stream.guid:
            truth["dataset_guid"] = str(stream.guid)
        for key, value in truth.items():
            promised = expected.get(key, value)
            if str(promised).lower() != str(value):
                raise BadImage(f"its {key} is {value}, not {promised}")
        if check_stream:
            origin = manifest.get("origin")
            problem = stream_problem(manifest["type"], stream, ZFS_TYPES)
            if problem is None and stream.type and origin and not stream.from_guid:
                problem = "the stream is not incremental, but an origin is given"
            if problem is not None:
                raise BadImage(problem)
            self.check_origin(origin, stream)
        file = {"path": file_name(manifest, found.compression), **expected, **truth, **hashes,
                "md5_of": hashes["sha1"]}
        if not is_file_name(file["path"]):
            raise BadImage("files[0].path of the manifest is no plain file name")
        return file

    def check_origin(self, origin, stream):
        """Raise BadImage where an incremental stream does not build on the origin's."""
        if stream.from_guid and not origin:
            raise BadImage("the stream is incremental, but no origin is given: the uuid of the "
                           "image that it builds on")
        if stream.from_guid and self._guid_of(origin) != str(stream.from_guid):
            raise BadImage(f"the stream does not build on image {origin}")

    def _guid_of(self, uuid) -> str:
        """The guid of an image's snapshot: from its manifest, else from its file."""
        for prefix in ("", INCOMING):
            with storing(f"image {uuid} cannot be read"):
                image = self._reader.read(uuid, self._path("", prefix), (IMGAPI,))
                if image is None:
                    continue
                if image.problem:
                    raise BadImage(f"its origin, image {uuid}, is not sound: {image.problem}")
                file = image.fields()["files"][0]
                if file.get("dataset_guid"):
                    return file["dataset_guid"]
                with self._turn:          # xz needs memory
                    return str(scan_head(os.path.join(image.directory, image.file)).stream.guid)
        raise BadImage(f"imgadm cannot import it until image {uuid} is on this server, too")


# -- users -------------------------------------------------------------------------------
#
# Rights over HTTP, each with those before it: to read, to publish images that are not on show
# yet, to manage those that are.  A client has them by its address, or as a user, of whom a
# line of a file has the name, the right and a hash of the password (HTTP Basic, RFC 7617).

ANYONE, READ, PUBLISH, MANAGE = range(4)
RIGHTS = {"read": READ, "publish": PUBLISH, "manage": MANAGE}
PEERS_KEPT = 1024             # addresses whose right is cached
EVERYBODY, SAME_CREDENTIALS, CLIENT = range(3)    # audiences: whom a cache may give an answer

SCRYPT = {"n": 1 << 14, "r": 8, "p": 1, "dklen": 32}      # takes 16 MiB, and some 70 ms
SCRYPT_TEXT = "scrypt${n}${r}${p}$".format(**SCRYPT)      # of a line, before salt and hash
SALT_SIZE = 16                # bytes
USERS_LIMIT = 1 << 20         # bytes of the file: some 7,000 users
PASSWORD_LIMIT = 1024         # bytes of a new password
CHECKS_WAITING = 8            # passwords that wait to be checked, some 0.6 s; further ones: 503
CHECKS_OF_ONE = 4             # of these for one address, so that others get their turn
FITTED = 600.0                # seconds that a right password is cached
WRONG = 5.0                   # seconds that a wrong one is cached

_USER_NAME = "[A-Za-z0-9._@-]{1,64}"
_USER = re.compile(rf"({_USER_NAME}) ({'|'.join(RIGHTS)}) "
                   rf"{re.escape(SCRYPT_TEXT)}([0-9a-f]{{32}})\$([0-9a-f]{{64}})")

User = collections.namedtuple("User", "name rights salt hash")


def hash_password(password: bytes, salt: bytes) -> bytes:
    """scrypt of a password without NUL: its HMAC would ignore one at the end (RFC 2104)."""
    return hashlib.scrypt(password, salt=salt, **SCRYPT)


def parse_basic(header):
    """(name, password as bytes) of an Authorization header; None, None of another scheme.

    The password is None where it is none (RFC 7617 §2).
    """
    scheme, _, text = header.partition(" ")
    if scheme.lower() != "basic":
        return None, None
    try:
        name, colon, password = base64.b64decode(text.strip(" "), validate=True).partition(b":")
    except ValueError:
        return "", None
    return name.decode("ascii", "replace"), password if colon and b"\0" not in password else None


def read_users(path) -> dict:
    """The users of a file: name: User.  Raises UserError, which shows no hash."""
    if not hasattr(hashlib, "scrypt"):
        raise UserError("users need a Python with hashlib.scrypt (OpenSSL 1.1)", EXIT_CONFIG)
    try:
        fd, status = open_regular(path)
        with open(fd, "rb") as file:
            lines = file.read(USERS_LIMIT).decode("ascii", "replace").split("\n")
    except OSError as error:
        hint = ": `imgserver.py user NAME` makes it" if error.errno == errno.ENOENT else ""
        raise UserError(f"cannot read the users in {path}: {error.strerror}{hint}", EXIT_CONFIG)
    if status.st_mode & (stat.S_IROTH | stat.S_IWOTH):
        raise UserError(f"others may read or write {path}, which has passwords: chmod 600 it",
                        EXIT_CONFIG)
    users = {}
    for number, line in enumerate(lines, 1):
        match = _USER.fullmatch(line)
        if match and match[1] not in users:
            users[match[1]] = User(match[1], match[2], *map(bytes.fromhex, match.groups()[2:]))
        elif line:
            raise UserError(f"{path}: line {number} is not a user, or one that is there already",
                            EXIT_CONFIG)
    return users


def write_users(path, users, serve_dir):
    """Replace the file of users; a new one is its owner's alone.  Raises ApiError."""
    text = "".join(f"{user.name} {user.rights} {SCRYPT_TEXT}{user.salt.hex()}${user.hash.hex()}\n"
                   for user in users.values())
    replace_file(path, text.encode(), serve_dir=serve_dir, mode=0o600)


class Users:
    """The users of a file, read again when it changes, and passwords checked lately.

    One password is checked at a time, while the thread of a request waits; the event loop uses
    the cache alone.  The same pair is not checked twice, and an unknown user takes as long as a
    wrong password.
    """

    def __init__(self, path, log):
        """Raises UserError where the file cannot be used."""
        from concurrent.futures import ThreadPoolExecutor
        self.path, self.log = path, log
        self.failed = 0                   # wrong passwords so far
        self._key = os.urandom(32)        # of the hashes in memory
        self._lock = threading.Lock()     # for _waiting, and for reading the file
        self._waiting = []                # addresses of clients whose passwords wait
        # One thread: malloc may keep the 16 MiB of scrypt for each that has called it.
        self._checker = ThreadPoolExecutor(1)
        key = stat_key_at(path)
        # stat_key of the file, its users, {hash of a header: (until (monotonic), User or None)}
        self._state = key, read_users(path), {}

    def user_of(self, request) -> User | None:
        """The User whose name and password a request has; None where it has none that fit.

        A wrong password is a line in the log.  Raises NeedsThread, and ApiError (503) where
        too many passwords wait to be checked.
        """
        header = request.headers["authorization"]
        users, checked = self._current(request.may_block)
        digest = hashlib.blake2b(header.encode("latin-1"), key=self._key).digest()
        is_known, user = self._known(checked, digest)
        if user is None:
            name, password = parse_basic(header)
            if name is None:
                return None
            if password is not None and not is_known:
                user = self._check(request, users.get(name), password, digest, checked)
            if user is None:              # a name that is unknown may be a password
                self.failed += 1
                self.log.warn(f"{client_name(request.peer, request.headers)} gave a wrong "
                              f"password {f'for user {name}' if name in users else 'or user'}")
        return user

    def _current(self, may_block):
        """(users, headers checked) of the file as it is now.  Raises NeedsThread."""
        key = stat_key_at(self.path)
        if key != self._state[0]:
            if not may_block:
                raise NeedsThread
            with self._lock:
                if key != self._state[0]:
                    try:
                        users = read_users(self.path)
                    except UserError as error:
                        users = self._state[1]
                        self.log.error(f"the users stay as they were: {printable(str(error))}")
                    self._state = key, users, {}
        return self._state[1:]

    @staticmethod
    def _known(checked, digest):
        """(whether a header was checked lately, its User or None)."""
        until, user = checked.get(digest, (-math.inf, None))
        return (True, user) if until > time.monotonic() else (False, None)

    def _check(self, request, user, password, digest, checked):
        """`user`, if that is the password, else None.  Raises as user_of."""
        with self._lock:
            if len(self._waiting) >= CHECKS_WAITING or request.peer and \
                    self._waiting.count(request.peer) >= CHECKS_OF_ONE:
                raise unavailable("too many passwords wait to be checked", 1)
            if not request.may_block:
                raise NeedsThread
            self._waiting.append(request.peer)
        try:
            return self._checker.submit(self._hash, user, password, digest, checked).result()
        finally:
            with self._lock:
                self._waiting.remove(request.peer)

    def _hash(self, user, password, digest, checked):
        """_check in the one thread, once for requests with the same header."""
        is_known, known = self._known(checked, digest)
        if is_known:
            return known
        found = hash_password(password, user.salt if user else bytes(SALT_SIZE))
        if user is None or not hmac.compare_digest(found, user.hash):
            user = None
        now = time.monotonic()
        for old in [old for old, (until, _) in checked.items() if until <= now]:
            del checked[old]
        checked[digest] = now + (FITTED if user else WRONG), user
        return user


class Rights:
    """The rights of clients, as configured.

    hides               whether some images are hidden from strangers
    least               the right of strangers
    identifies_readers  whether the client of a request that changes nothing is identified, too
    """

    def __init__(self, config, log):
        self.config = config
        self.users = Users(config.users, log) if config.users else None
        self.hides = config.read != "anyone"
        self.least = ANYONE if self.hides else READ
        self.identifies_readers = self.hides or self.users is not None
        self.of_address = functools.lru_cache(PEERS_KEPT)(self._of_address)

    @property
    def publishing(self) -> bool:
        """Whether publishing over HTTP is on."""
        return bool(self.users or self.config.publish_from or self.config.manage_from)

    def _of_address(self, peer) -> int:
        """The right of a client by its address; "" is the Unix socket.  Never by a header."""
        for right, networks in ((MANAGE, self.config.manage_from),
                                (PUBLISH, self.config.publish_from)):
            if is_among(peer, networks):
                return right
        return self.least

    def of(self, request) -> int:
        """The right of the client that a request came from.  Raises as Users.user_of."""
        if request.right is None:
            right = self.of_address(request.peer)
            if self.users is not None and "authorization" in request.headers:
                user = self.users.user_of(request)
                if user is not None:
                    request.user, right = user.name, max(right, RIGHTS[user.rights])
            request.right = right
        return request.right

    def need(self, request, right):
        """Raise ApiError where the client lacks a right: 401 where a user may have it."""
        if self.of(request) >= right:
            return
        if self.users is None or request.user:
            who = (f"user {request.user}" if request.user else
                   f"address {request.peer}" if request.peer else "the Unix socket")
            raise ApiError(403, "OperatorOnly",
                           f"{who} lacks the right to {list(RIGHTS)[right - 1]}")
        is_given = parse_basic(request.headers.get("authorization", ""))[0] is not None
        raise ApiError(401, "UnauthorizedError", "the user or the password is wrong" if is_given
                       else "a user and a password are needed",
                       fields=b'WWW-Authenticate: Basic realm="imgserver"\r\n')

    def admit(self, request):
        """Identify the client of a request before it is answered.

        Raises ApiError (401) where all reading needs a user, and as Users.user_of where the
        answer may depend on the user.
        """
        if self.config.read == "users":
            request.audience = CLIENT
            self.need(request, READ)
        elif "authorization" in request.headers:
            try:
                self.of(request)
            except ApiError:
                if self.hides or request.method not in ("GET", "HEAD"):
                    raise

    def visible(self, request, image):
        """`image`, where the client may know of it.  Raises ApiError, as where there is none."""
        if self.hides and not image.public:
            request.audience = CLIENT
            if self.of(request) < READ:
                raise not_found(f"image {image.uuid} not found")
        return image

    def lists_all(self, request) -> bool:
        """Whether a list has the private images, too; sets who may share the answer."""
        if not self.hides:
            return True
        all_of_them = self.of(request) >= READ
        request.audience = max(request.audience, CLIENT if all_of_them else SAME_CREDENTIALS)
        return all_of_them


# -- mirroring ---------------------------------------------------------------------------
#
# Images of another server, or of a directory on a disk, with the images that they build on.
# The other side is not trusted: names are checked before they become a path, lists are
# bounded, and a file is on show only once its size, sha1 and stream are right.

LIST_LIMIT = 64 << 20         # bytes of a list, all its pages together: of some 50,000 images
PAGE = 1000                   # images of a list per request, as imgadm's
RETRY_DELAYS = (1, 3, 10, 30)     # seconds before each further try of a request that failed
RETRY_AFTER_LIMIT = 300       # seconds that a server may ask to wait
RETRIED = (408, 429, 500, 502, 503, 504)      # statuses that may pass
GOOD_TRY = 1 << 20            # bytes after which a broken connection has all its tries again
LEAST_PACE = 64 << 10         # bytes that must come in stall_timeout: slower is stalled, too
ERROR_LIMIT = 4 << 10         # bytes of an error's body that are read for its message
PIECES_QUEUED = 4             # pieces of a file that wait to be hashed


class SourceError(Exception):
    """The other side is unreachable, or its answer unusable; the text has the reason.

    status      of its answer, or None
    wait        seconds until another try makes sense; None: it makes none
    """

    def __init__(self, message, status=None, wait=None):
        super().__init__(message)
        self.status, self.wait = status, wait


def retry_after(value) -> float:
    """The seconds that a Retry-After field asks for, or a date (RFC 9110 §10.2.3); 0: none."""
    with contextlib.suppress(AttributeError, TypeError, ValueError, OverflowError):
        seconds = int(value) if value.strip().isdigit() else \
            email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        return min(max(seconds, 0), RETRY_AFTER_LIMIT)
    return 0


def make_opener(ca, insecure):
    """urllib's opener, with its proxies, but redirects to the same server alone; an answer
    with an error is no exception.

    Here and not at the top: a server does without these modules.  Raises OSError for `ca`.
    """
    import ssl
    import urllib.request

    class Answers(urllib.request.HTTPRedirectHandler, urllib.request.HTTPDefaultErrorHandler):

        def redirect_request(self, request, response, code, message, headers, url):
            place = urllib.parse.urlsplit(url)
            if place[:2] != urllib.parse.urlsplit(request.full_url)[:2]:
                response.close()
                raise SourceError(f"it redirects to {place.scheme}://{place.hostname}, which is "
                                  "another server", code)
            return super().redirect_request(request, response, code, message, headers, url)

        def http_error_default(self, request, response, code, message, headers):
            return response

    context = ssl.create_default_context(cafile=ca)
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return urllib.request.build_opener(Answers, urllib.request.HTTPSHandler(context=context))


class RemoteServer:
    """An IMGAPI server, or a DSAPI one where the URL ends in /datasets.

    url         without credentials, which go into a header; fit to be printed
    timeout     seconds without a byte until a connection is given up
    waiting     a context manager around each wait for the other side
    pause       pause(seconds) between two tries
    tell        tell(text): why it pauses

    Methods raise SourceError.
    """

    problems = ()

    def __init__(self, url, channel=None, ca=None, insecure=False, timeout=300,
                 waiting=contextlib.nullcontext, pause=time.sleep, tell=lambda text: None):
        """Raises ValueError, without the URL, for one that is none and for `ca`."""
        try:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 \
                    or not re.fullmatch("[!-~]+", url):
                raise ValueError
        except ValueError:                # urlsplit's may show a password
            raise ValueError("is not http://HOST[:PORT], https://HOST[:PORT] or a "
                             "directory") from None
        channel = channel or dict(urllib.parse.parse_qsl(parts.query)).get("channel")
        path = parts.path.rstrip("/")
        self._is_dsapi = path.endswith("/datasets")
        if channel and self._is_dsapi:
            raise ValueError("is a DSAPI server, which has no channels")
        self._root = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        self.url, self._images = self._root + path, path + "/images" * (not self._is_dsapi)
        self._query = {"channel": channel} if channel else {}
        self._fields = {"User-Agent": f"imgserver/{__version__}", "Accept": "application/json"}
        if not self._is_dsapi:
            self._fields["Accept-Version"] = "~2"
        self.has_user = parts.username is not None
        if self.has_user:
            pair = map(urllib.parse.unquote, (parts.username, parts.password or ""))
            self._fields["Authorization"] = "Basic " + base64.b64encode(
                ":".join(pair).encode()).decode()
        self.timeout, self._waiting, self._pause, self._tell = timeout, waiting, pause, tell
        self._is_down = False
        try:
            self._opener = make_opener(ca, insecure)
        except OSError as error:
            raise ValueError(f"cannot be asked: --ca {ca}: {error.strerror or error}")

    def list(self, filters):
        """Yield the manifests of its list; one may come twice."""
        left, marker = LIST_LIMIT, None
        query = {} if self._is_dsapi else {**filters, "limit": PAGE}
        while True:
            page, size = self._json(list, self._images, left, query)
            left -= size
            yield from page
            last = page[-1].get("uuid") if page and isinstance(page[-1], dict) else None
            if self._is_dsapi or len(page) < PAGE or last == marker:
                return
            query["marker"] = marker = checked_name(last)

    def manifest(self, uuid) -> dict:
        """The manifest of an image in any state, as received."""
        manifest, _ = self._json(dict, f"{self._images}/{uuid}", MANIFEST_LIMIT)
        if manifest.get("uuid") != uuid:
            raise SourceError(f"its manifest is that of image {spell(manifest.get('uuid'))}")
        return manifest

    def bring_file(self, manifest, partial):
        """Add to a PartialFile the rest of the file of a manifest that was normalised.

        A broken connection is resumed.  Raises BadImage, too, and as `partial` does.
        """
        file, place = manifest["files"][0], f"{self._images}/{manifest['uuid']}"
        if not self._is_dsapi:
            path = place + "/file"
        elif "path" in file:
            path = f"{place}/{urllib.parse.quote(file['path'], safe='')}"
        else:                             # on this very server, as imgadm asks for it
            path = urllib.parse.quote("/" + urllib.parse.urlsplit(
                str(file.get("url"))).path.lstrip("/"), safe="/%~")
        self._retried(lambda: self._bring_rest(path, file["size"], partial),
                      lambda: partial.size)

    def _bring_rest(self, path, size, partial):
        """Ask once for the bytes of a file that `partial` lacks."""
        if partial.size >= size:
            return
        fields = {}
        if partial.size:
            partial.is_resumed = True
            fields["Range"] = f"bytes={partial.size}-"
            if partial.etag:
                fields["If-Range"] = partial.etag
        with self._open(path, fields=fields) as response:
            begin, total = 0, response.length
            if response.status in (206, 416):
                match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)",
                                     response.headers.get("Content-Range", ""))
                begin, total = map(int, match.groups(-1)) if match else (None, None)
            if total not in (None, size):
                raise SourceError(f"its file has {total} bytes, not the {size} of its manifest")
            if begin not in (0, partial.size):
                raise BadImage("it sends another part of the file than was asked for")
            partial.begin(begin, response.headers.get("ETag", ""))
            for data in self._pieces(response):
                if partial.size + len(data) > size:
                    raise BadImage(f"its file has more than the {size} bytes of its manifest")
                partial.add(data)
        if partial.size < size:
            raise SourceError(f"the connection ended {size - partial.size} bytes too early",
                              wait=0)

    def icon(self, manifest):
        """(content type, bytes) of its icon, or None."""
        if self._is_dsapi or not manifest.get("icon"):
            return None
        fields, data = self._get(f"{self._images}/{manifest['uuid']}/icon", ICON_LIMIT)
        return fields.get_content_type(), data

    @functools.cached_property
    def refuses_user(self) -> bool:
        """Whether the user of the URL is a stranger there.

        Where strangers may read, an imgserver says so at this address alone; others never do.
        """
        try:
            if self.has_user:
                root = self._images.rpartition("/")[0] + "/"
                self._retried(lambda: self._open(root, {"login": ""}).close())
        except SourceError as error:
            return error.status == 401
        return False

    def _json(self, kind, path, limit, query=()):
        """(the list or dict in the body of an answer, its bytes)."""
        data = self._get(path, limit, query)[1]
        try:
            value = parse_json(data)
        except ValueError as error:
            raise SourceError(f"its answer is not JSON: {error}")
        if not isinstance(value, kind):
            raise SourceError("its answer is not a JSON "
                              + ("object" if kind is dict else "array"))
        return value, len(data)

    def _get(self, path, limit, query=()):
        """(header fields, body) of an answer."""
        def ask():
            data = bytearray()
            with self._open(path, query) as response:
                for piece in self._pieces(response):
                    data += piece
                    if len(data) > limit:
                        raise SourceError(f"its answer is larger than {limit} bytes")
                return response.headers, bytes(data)
        return self._retried(ask)

    def _open(self, path, query=(), fields=()):
        """Send one request: the http.client.HTTPResponse, of status 2xx, or 416 for a Range."""
        import urllib.request
        query = urllib.parse.urlencode({**self._query, **dict(query)})
        request = urllib.request.Request(self._root + path + "?" * bool(query) + query,
                                         headers={**self._fields, **dict(fields)})
        with self._asking():
            response = self._opener.open(request, timeout=self.timeout)
        self._is_down = False
        if response.status // 100 == 2 or response.status == 416 and "Range" in fields:
            return response
        with response:
            text = response.reason
            with contextlib.suppress(SourceError, ValueError, AttributeError), self._asking():
                text = parse_object(response.read(ERROR_LIMIT)).get("message") or text
            wait = retry_after(response.headers.get("Retry-After")) \
                if response.status in RETRIED else None
            raise SourceError(f"it answers {response.status}: {text}", response.status, wait)

    def _pieces(self, response):
        """Yield the body of an answer.  Raises SourceError also where it ends too early, where
        http.client's read(n) ends quietly, or is too slow.
        """
        since, came = time.monotonic(), 0
        while True:
            with self._asking():
                data = response.read1(CHUNK)
            if not data:
                break
            yield data
            now = time.monotonic()
            came += len(data)
            if now - since > self.timeout:
                if came < LEAST_PACE:
                    raise SourceError(f"stalled: {came} bytes came in {now - since:.0f} s",
                                      wait=0)
                since, came = now, 0
        if response.length:
            raise SourceError(f"the connection ended {response.length} bytes too early", wait=0)

    @contextlib.contextmanager
    def _asking(self):
        """Convert each error of a connection in the block to a SourceError."""
        import http.client
        try:
            with self._waiting():
                yield
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if hasattr(error, "code"):    # an HTTPError: a redirect that urllib does not follow
                error.close()
                raise SourceError(f"it answers {error.code}: {str(reason).partition(chr(10))[0]}",
                                  error.code)
            kind = type(reason).__name__
            if kind == "SSLCertVerificationError":
                raise SourceError("its certificate cannot be verified: "
                                  f"{reason.verify_message} (--ca FILE names those to trust)")
            if isinstance(reason, TimeoutError) or kind == "timeout":     # before 3.10
                raise SourceError(f"stalled: nothing came for {self.timeout:g} s", wait=0)
            raise SourceError(getattr(reason, "strerror", None) or str(reason) or kind, wait=0)

    def _retried(self, ask, came=lambda: 0):
        """ask(), again after each failure that may pass, RETRY_DELAYS apart.

        came() is the number of bytes so far: with GOOD_TRY more, all the tries are left again.
        All further requests to a server that cannot be reached get one try.
        """
        tries, good = 0, came()
        while True:
            try:
                return ask()
            except SourceError as error:
                if came() - good >= GOOD_TRY:
                    tries, good = 0, came()
                if error.wait is None or tries == len(RETRY_DELAYS) or self._is_down:
                    self._is_down = error.wait is not None and error.status is None
                    raise
                delay = max(error.wait, RETRY_DELAYS[tries])
                self._tell(f"{self.url}: {error}; trying again in {delay:.0f} s")
                self._pause(delay)
                tries += 1


def checked_name(uuid) -> str:
    """A uuid of the other side.  Raises SourceError."""
    if not (isinstance(uuid, str) and is_uuid(uuid)):
        raise SourceError(f"its list names an image {spell(uuid)}, which is no UUID")
    return uuid


@contextlib.contextmanager
def reading(path):
    """Convert each OSError and BadImage in the block to a SourceError."""
    try:
        yield
    except OSError as error:
        status = 404 if isinstance(error, FileNotFoundError) else None
        raise SourceError(f"cannot read {error.filename or path}: {error.strerror}", status)
    except BadImage as error:
        raise SourceError(str(error))


class SourceDirectory:
    """A directory of images as a source: <uuid>/ as in a serve_dir, or pairs of files, NAME.zfs.gz
    and NAME.imgmanifest, as imgadm create -o writes them.  Methods are those of RemoteServer.

    problems    sentences about manifests that cannot be read, and so name no image
    """

    has_user = refuses_user = False

    def __init__(self, path):
        self.url, self._places, self.problems = os.path.abspath(path), {}, []
        with reading(self.url):
            for name in sorted(os.listdir(self.url)):
                if is_uuid(name):
                    self._places[name] = os.path.join(self.url, name), MANIFEST, ""
                elif name.endswith(".imgmanifest"):
                    try:
                        with reading(os.path.join(self.url, name)):
                            uuid = str(read_manifest(self.url, name=name)[0].get("uuid"))
                    except SourceError as error:
                        self.problems.append(str(error))
                    else:
                        self._places[uuid] = self.url, name, name[:-len("imgmanifest")]

    def list(self, filters):
        for uuid in self._places:
            manifest = {"uuid": uuid}     # the plan says why there is no more
            with contextlib.suppress(SourceError):
                manifest = self.manifest(uuid)
            if manifest.get("disabled") is not True:
                yield manifest

    def manifest(self, uuid) -> dict:
        if uuid not in self._places:
            raise SourceError(first_of(["image not found", *self.problems]), 404)
        directory, name, _ = self._places[uuid]
        with reading(os.path.join(directory, name)):
            return read_manifest(directory, name=name)[0]

    def bring_file(self, manifest, partial):
        directory, _, stem = self._places[manifest["uuid"]]
        given = manifest["files"][0]
        with reading(directory):
            name = not stem and given.get("path") or sole_file(
                directory, [each for each in os.listdir(directory) if each.startswith(stem)],
                given["size"])
            path = os.path.join(directory, name)
            file = open(open_regular(path)[0], "rb", buffering=0)
        with file:
            file.seek(partial.size)
            while True:
                with reading(path):
                    data = file.read(CHUNK)
                if not data:
                    return
                partial.add(data)

    def icon(self, manifest):
        directory, _, stem = self._places[manifest["uuid"]]
        for name, kind in ICONS.items():
            path = os.path.join(directory, name)
            if not stem and os.path.exists(path):
                with reading(path), open(open_regular(path)[0], "rb") as icon:
                    return kind, icon.read(ICON_LIMIT + 1)
        return None


def localise(config, given) -> dict:
    """A manifest of the other side as it is stored here.  Raises BadImage and ApiError."""
    manifest, _, reasons = normalise(given)
    if reasons:
        raise BadImage("its manifest cannot be used: " + ", ".join(reasons))
    manifest = dict(manifest)
    state = manifest.pop("state", "active")
    if state not in ("active", "disabled"):
        raise BadImage(f"it is {state} there")
    if state == "disabled":
        manifest["disabled"] = True
    file = manifest["files"][0]
    if not file.get("sha1") or not file.get("size"):
        raise BadImage("its manifest has no sha1 or no size of its file, so that nothing would "
                       "be verified")
    here = [channel["name"] for channel in config.channels]
    channels = [name for name in manifest.pop("channels", ()) if name in here]
    if channels:
        manifest["channels"] = channels
    choose_channels(config, manifest)
    return manifest


class PartialFile(FileScan):
    """An image's file as far as it has come: written, examined, and hashed in a thread of its
    own, since hashlib and zlib release the interpreter's lock.

    etag          the strong ETag of the answer that it comes with, or ""
    is_resumed    whether it has come in several parts
    """

    def __init__(self, file, whole, count):
        super().__init__(whole=whole)
        self.etag, self.is_resumed = "", False
        self._file, self._count = file, count
        self._pieces = queue.Queue(PIECES_QUEUED)
        start_new_thread(self._run, ())

    def _run(self):
        for data in iter(self._pieces.get, None):
            super()._hash(data)
            self._pieces.task_done()
        self._pieces.task_done()

    def _hash(self, data):
        self._pieces.put(data)

    def hashes(self) -> dict:
        self._pieces.join()
        return super().hashes()

    def close(self):
        """End the thread."""
        self._pieces.put(None)

    def read(self):
        """Examine the part that is on disk.  Raises BadImage, OSError."""
        self._file.seek(0)
        for data in iter(lambda: self._file.read(CHUNK), b""):
            self.is_resumed = True
            self._count(len(data))
            self.feed(data)

    def begin(self, offset, etag):
        """The next bytes are those behind its end, or from 0 on: these replace all others."""
        self.etag = etag if etag.startswith('"') else ""      # RFC 9110 §13.1.5: strong ones
        if offset < self.size:
            self._pieces.join()
            super().__init__(whole=self._whole)
            self.is_resumed = False
            self._file.seek(0)
            self._file.truncate()

    def add(self, data):
        """Append bytes.  Raises BadImage, OSError."""
        self._count(len(data))
        self._file.write(data)
        self.feed(data)


def is_image_file(name) -> bool:
    """Whether a file in an image's directory is the image."""
    return not (name.startswith(".") or name == MANIFEST or name in ICONS)


class Mirror(Publisher):
    """One run of `mirror`: the plan, then image after image.

    say         say(text) for each image that has come or has changed
    complain    complain(text) for each that has not
    progress    progress(text, size) begins to show an image, and returns a function to be
                called with the length of each piece
    """

    def __init__(self, config, source, say, complain, progress, check_stream=True):
        super().__init__(config)
        self.source, self.say, self.complain, self.progress = source, say, complain, progress
        self.check_stream = check_stream
        self.failed = set()

    def select(self, filters, latest=None) -> list:
        """The uuids of all listed images that fit, or of the `latest` newest of each name.

        filters: name and version as IMGAPI has them, os and type.  Raises SourceError.
        """
        found = {}
        for problem in self.source.problems:
            self._fail("", problem)
        for given in self.source.list(filters):
            entry = mend_manifest(given)[0] if isinstance(given, dict) else {}
            try:
                uuid = checked_name(entry.get("uuid"))
            except SourceError as error:
                self._fail("", str(error))
                continue
            if all(matches_text(str(entry.get(key)), wanted) for key, wanted in filters.items()):
                order = order_of(str(entry.get("published_at", "")))
                found[uuid] = order, uuid, str(entry.get("name"))
        of_name = collections.defaultdict(list)
        for _, uuid, name in sorted(found.values(), reverse=True):
            of_name[name].append(uuid)
        return sorted(uuid for uuids in of_name.values() for uuid in uuids[:latest])

    def brought(self) -> list:
        """The uuids of images here that an earlier run has brought from this source."""
        with storing("the images cannot be read"):
            return [uuid for uuid in sorted(os.listdir(self.serve_dir))
                    if is_uuid(uuid) and self._upstream(uuid) is not None]

    def plan(self, uuids, follow=True) -> dict:
        """{uuid: (size, text)} of the images that are to come, origins before those that build
        on them.  Images that are here are compared, and, with `follow`, followed.
        """
        plan = {}
        if self.source.refuses_user:
            self._fail("", f"{self.source.url} refuses the user or the password of the URL: its "
                           "private images are hidden")
        for uuid in uuids:
            self._attempt(self._add, uuid, plan, follow)
        return plan

    def bring(self, plan):
        """Bring the images of a plan."""
        for number, (uuid, (size, text)) in enumerate(plan.items(), 1):
            self._attempt(self._bring, uuid, text, self.progress(
                f"image {number} of {len(plan)}, {text}", size))

    def _attempt(self, act, uuid, *words):
        """Call act(uuid, ...); report a failure in a sentence."""
        try:
            act(uuid, *words)
        except (SourceError, BadImage, ApiError) as error:
            self._fail(uuid, f"image {uuid}: {error}")

    def _fail(self, uuid, text):
        self.failed.add(uuid)
        self.complain(text)

    def _add(self, first, plan, follow):
        """Add an image to a plan, and before it those of its origins that are not here."""
        chain, seen, uuid = {}, set(), first
        while uuid is not None and uuid not in plan:
            if uuid in seen:
                raise BadImage("its chain of origins is a cycle")
            seen.add(uuid)
            here = self._here(uuid)
            if here is None:
                try:
                    manifest = localise(self.config, self.source.manifest(uuid))
                except (SourceError, BadImage) as error:
                    if uuid == first:
                        raise
                    raise BadImage(f"image {uuid}, on which it builds: {error}")
                text = printable(f"{uuid} {manifest['name']} {manifest['version']}")
                chain[uuid] = manifest["files"][0]["size"], text
                uuid = manifest.get("origin")
            else:
                if uuid == first:
                    self._compare(here, follow)
                uuid = here.origin
        plan.update(reversed(chain.items()))

    def _here(self, uuid) -> Image | None:
        """An image that is here.  Raises BadImage where it is not sound."""
        with storing(f"image {uuid} cannot be read"):
            image = self._reader.read(uuid, self._path(""), ())
        if image is not None and image.problem:
            raise BadImage(f"image {uuid} is here, but not sound: {image.problem}")
        return image

    def _compare(self, here, follow):
        """Compare an image that is here with the other side's, and follow it."""
        last = self._upstream(here.uuid)
        try:
            given = self.source.manifest(here.uuid)
        except SourceError as error:
            if error.status != 404 or last is None or self.source.refuses_user:
                raise
            hidden = ", or hidden from the user of the URL" if self.source.has_user else ""
            self.say(f"{here.uuid} {here.title}: no longer there{hidden}; it stays here")
            return
        sha1 = localise(self.config, given)["files"][0]["sha1"]
        if sha1 != here.sha1:
            raise BadImage(f"it is here with other bytes, and stays so: sha1 {here.sha1} here, "
                           f"{sha1} there")
        if follow and last not in (None, given):
            names = self._follow(here.uuid, given)
            if names:
                self.say(f"{here.uuid} {here.title}: changed: {', '.join(names)}")

    def _bring(self, uuid, text, count):
        given = self.source.manifest(uuid)
        manifest = localise(self.config, given)
        if manifest.get("origin") in self.failed:
            raise BadImage(f"image {manifest['origin']}, on which it builds, has not come")
        try:
            self._import(given, manifest, count)
        except ApiError as error:
            here = self._here(uuid) if error.status == 409 else None
            if here is None or here.sha1 != manifest["files"][0]["sha1"]:
                raise
        else:
            self.say(text)

    # on disk

    @staticmethod
    def _is_kept(path) -> bool:
        """Whether there is a part of a file that a mirror may complete."""
        with contextlib.suppress(OSError):
            names = os.listdir(path)
            return UPSTREAM in names and any(
                os.path.getsize(os.path.join(path, name)) for name in names
                if name == PARTIAL or is_image_file(name))
        return False

    def _import(self, given, manifest, count):
        """Bring the image of a manifest: as it was given, and localised.

        After a failure the part of its file that has come stays, and the next call goes on
        there.  Raises ApiError, SourceError, BadImage.
        """
        expected = {key: value for key, value in manifest["files"][0].items()
                    if key in FILE_FIELDS}
        with self._created(manifest, self._is_kept) as image:
            self._record(image, given)
            with storing("the image cannot be stored"):
                found = self._complete(image, manifest, count)
            found.finish()                # not before: such a file would come again as it is
            self._accept(image, PARTIAL, found, expected, self.check_stream)
            self._bring_icon(image, given)
            self._show(image)

    def _bring_icon(self, image, given):
        """Give an image its icon.  One that cannot be used is no failure: the image is whole."""
        try:
            icon = self.source.icon(given)
            if icon is not None:
                image.write_icon(*icon)
        except (SourceError, ApiError) as error:
            self.complain(f"image {image.uuid} comes without its icon: {error}")

    def _complete(self, image, manifest, count) -> FileScan:
        """Download the file of an image, or the rest of it, as .partial.

        Several parts with a wrong sha1 may be of different files: all of it is downloaded
        again, once.  Raises OSError, SourceError, BadImage.
        """
        expected = manifest["files"][0]["sha1"]
        for name in os.listdir(image.fd):
            if is_image_file(name):       # complete: the run before was killed then
                os.rename(name, PARTIAL, src_dir_fd=image.fd, dst_dir_fd=image.fd)
        with new_file(PARTIAL, image.fd, or_old=0) as file:
            give(file.fileno(), self.serve_dir)
            for is_last in (False, True):
                with contextlib.closing(PartialFile(file, self.check_stream, count)) as partial:
                    try:
                        partial.read()
                        self.source.bring_file(manifest, partial)
                        sha1 = partial.hashes()["sha1"]
                        if sha1 != expected:
                            raise BadImage(f"its sha1 is {sha1}, not {expected}")
                        return partial
                    except BadImage:
                        file.truncate(0)
                        if is_last or not partial.is_resumed:
                            raise

    def _record(self, image, given):
        """Keep the manifest that the other side gave.  Raises ApiError."""
        image.write(UPSTREAM, (render_json(
            {"url": self.source.url, "manifest": given}) + "\n").encode())

    def _upstream(self, uuid) -> dict | None:
        """The manifest of an image that came from this source, as given; None of all others."""
        with contextlib.suppress(OSError, BadImage):
            known = read_manifest(self._path(uuid), name=UPSTREAM)[0]
            if known.get("url") == self.source.url and isinstance(known.get("manifest"), dict):
                return known["manifest"]
        return None

    def _follow(self, uuid, given) -> list:
        """Change the fields that the other side has changed since an image was brought, or
        followed; their names.  All others stay as they are here.  Raises ApiError, BadImage.
        """
        with self._locked(uuid, ("",)) as image:
            here, last = image.manifest(), self._upstream(uuid)
            if last is None:              # deleted, and published again
                return []
            before, after = localise(self.config, last), localise(self.config, given)
            if not is_v1(before) == is_v1(after) == is_v1(here):
                before, after, here = (upgrade(each) if is_v1(each) else each
                                       for each in (before, after, here))
            names = [name for name in sorted(before.keys() | after.keys())
                     if before.get(name) != after.get(name) and name not in ("files", "icon", "v")]
            if names:
                here = {name: value for name, value in here.items() if name not in names}
                here.update((name, after[name]) for name in names if name in after)
                with image.writing():
                    replace_file(os.path.join(image.path, MANIFEST), manifest_bytes(here),
                                 image.fd, self.serve_dir, keep_time=True)
            self._record(image, given)
            return names


# -- HTTP messages -----------------------------------------------------------------------
#
# A Request is parsed from bytes decoded as latin-1; a Response is a value.  No sockets here.

HEAD_LINE_LIMIT = 8 << 10     # bytes of a request line; nginx and node allow 8 KiB too
HEAD_LIMIT = 32 << 10         # bytes of a whole request head: imgadm sends less than 1 KiB
HEAD_FIELDS_LIMIT = 100       # header lines of one request
HOSTS_KEPT = 256              # Host headers whose check and URL are cached
QUERY_FIELDS_LIMIT = 100      # parameters of one query: IMGAPI knows fifteen

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = rf"(({_TOKEN}) ([!-~\x80-\xff]+) HTTP/([0-9]\.[0-9]))\r?\n"
_FIELD_LINE = _TOKEN + r":[^\x00-\x08\n-\x1f\x7f]*\r?\n"
# A request head, to its blank line (RFC 9112 §2.1): line ends may be bare LF (§2.2), fields
# are not folded and have no space before the colon (§5.1, §5.2).
_HEAD = re.compile(rf"{_REQUEST_LINE}((?:{_FIELD_LINE})*)\r?\n")
_BEGINNING = re.compile(_REQUEST_LINE)
_HEAD_END = re.compile(r"\n\r?\n")
_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{0,5}))?")
_LENGTH = re.compile("[0-9]{1,19}")
_RANGE = re.compile("bytes=([0-9]{0,19})-([0-9]{0,19})")
_TARGET_HOST = re.compile("https?://[^/?]*", re.IGNORECASE)
_USER_INFO = re.compile(r"(://|^\S+ )[^/?#]*@")    # in a request line

METHODS = frozenset(("GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH", "TRACE",
                     "CONNECT"))


class Request:
    """One parsed request.

    line        the request line as it came, for the log
    method, target, is_1_0      its parts
    headers     lower-case name: value; values of a repeated field are joined by commas
    segments    the path, split and percent-decoded: ["datasets", uuid]; [""] for /
    query       the text after "?", undecoded
    host        the Host header, checked; on HTTP/1.0 without one, the address that was asked
    keep_alive  whether the connection stays open for another request
    length      bytes of its body; None where it is chunked
    body        an object with read(n), as Body has it; None until a thread answers it
    peer        the address of the client; "" on a Unix socket
    user        the name of the client's user; None without one, or until `right` is set
    right       the right of the client, once it is known
    audience    whom a cache may give the answer to, set by Rights
    may_block   whether answering may block: True in a thread, False in the event loop
    route, arguments    the row of the route table that answers it, once it was found
    """

    length, body = 0, None
    peer, user, right, audience = "", None, None, EVERYBODY
    may_block, route = False, None


def parse_request(match) -> Request:
    """The Request in a match of _HEAD.

    Raises ApiError, after which the connection must end: the next request cannot be found.
    """
    request = Request()
    request.line, request.method, request.target, version, block = match.groups()
    if version[0] != "1":
        raise ApiError(505, "HttpVersionNotSupported", "HTTP/1.0 and HTTP/1.1 are spoken here")
    request.is_1_0 = version == "1.0"
    request.headers = headers = parse_fields(block)
    request.host = host = headers.get("host")
    if host is not None:
        if not is_host(host):
            raise bad_request("the Host header names no host")
    elif not request.is_1_0:
        raise bad_request("the Host header is missing")
    request.keep_alive = not request.is_1_0
    if "connection" in headers:
        options = [option.strip().lower() for option in headers["connection"].split(",")]
        request.keep_alive = "close" not in options and (request.keep_alive
                                                         or "keep-alive" in options)
    if "transfer-encoding" in headers or "content-length" in headers:
        request.length = body_length(headers, request.is_1_0)
    if "expect" in headers and headers["expect"].lower() != "100-continue":
        raise ApiError(417, "ExpectationFailed", "only 100-continue can be expected")
    request.segments, request.query = split_target(request.target)
    return request


def without_credentials(line) -> str:
    """A request line for the log, without user and password of a URL in it."""
    return _USER_INFO.sub(r"\1", line)


def explain_head(data):
    """Raise ApiError where `data`, a text, is not the beginning of a request head.

    Returns where it may only be incomplete.  TLS and HTTP/0.9 are refused at once.
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
def is_host(text) -> bool:
    """Whether a Host header is a name or address, with a port or without (RFC 9112 §3.2).

    The port may be empty (RFC 3986 §3.2.3).
    """
    match = _HOST.fullmatch(text)
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


def body_length(headers, is_1_0):
    """The length of a body in bytes; None for a chunked one (RFC 9112 §6.1 - 6.3).

    Raises ApiError for a body that cannot be told from the next request.
    """
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None or is_1_0 or coding.lower() != "chunked":
            raise bad_request("this Transfer-Encoding is not understood")
        return None
    if not _LENGTH.fullmatch(length):
        raise bad_request("Content-Length is not a number")
    return int(length)


def split_target(target):
    """(segments, query) of a request target.  Raises ApiError.

    imgadm asks for files in absolute-form, of any host that a url names: only the path
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
    """A segment of a path as text.  Raises ApiError where it is not UTF-8 or has a NUL."""
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
    """The answer to a request: status, header lines, and bytes, a Listing or part of a file.

    fields are header lines as bytes that end in CRLF; Server, Date, Content-Length and
    Connection are added by the connection.  file is an open file descriptor, of which
    `length` bytes from `offset` are the body; the connection closes it.  title is appended to
    the line in the log.  reason: code and message of a refusal; unset in all other answers.
    """

    __slots__ = ("status", "fields", "body", "file", "offset", "length", "title", "reason")

    def __init__(self, status, fields=b"", body=b"", file=None, offset=0, length=None, title=""):
        self.status, self.fields, self.body = status, fields, body
        self.file, self.offset, self.title = file, offset, title
        self.length = len(body) if length is None else length

    def close(self):
        """Close its file; may be called twice."""
        if self.file is not None:
            os.close(self.file)
            self.file = None


def header_line(name, value) -> bytes:
    """One header line.  Raises ValueError for a value that would end it early."""
    if not value.isprintable():
        raise ValueError(f"{name} cannot hold {value!a}")
    return f"{name}: {value}\r\n".encode("latin-1")


def json_response(value, status=200, fields=CACHE_NOTHING) -> Response:
    return Response(status, JSON_TYPE + fields + CORS, render_json(value).encode())


def error_response(error) -> Response:
    """The error answer that imgadm prints: {code, message}, and errors where IMGAPI has them."""
    value = {"code": error.code, "message": error.message}
    if error.errors is not None:
        value["errors"] = error.errors
    response = json_response(value, error.status, CACHE_NOTHING + error.fields)
    response.reason = f"{error.code}: {error.message}"
    return response


def etag_matches(header, etag) -> bool:
    """Whether an If-None-Match or If-Match header names `etag` (RFC 9110 §13.1.1).

    Unquoted ones count too: the official IMGAPI sends its ETags so.
    """
    return header.strip('"') == etag or header == "*" or etag in [
        item.strip(" \t").removeprefix("W/").strip('"') for item in header.split(",")]


LAST_SECOND = 253402300799        # 9999-12-31T23:59:59Z: a file of later times is shown as of then


def http_date(seconds) -> str:
    """A time in seconds since 1970 as an HTTP date, within the range of datetime."""
    return email.utils.formatdate(max(0, min(seconds, LAST_SECOND)), usegmt=True)


def not_modified_since(header, seconds) -> bool:
    """Whether If-Modified-Since is a date not before `seconds` (RFC 9110 §13.1.3).

    All three forms of a date (§5.6.7) are in UTC, also those that name no zone.
    """
    try:
        date = email.utils.parsedate_to_datetime(header)
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.timezone.utc)
        return date.timestamp() >= int(seconds)
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


def file_response(request, fd, status, etag, fields, md5=None, title="") -> Response:
    """The answer to a GET or HEAD of an open regular file: 200, 206, 304 or 416.

    md5 is called for the digest as bytes, or None, if the whole file is the answer.  A date
    in If-Range never matches: two files may have one mtime (RFC 9110 §13.1.5).  Closes fd
    unless the Response has it.
    """
    headers, size = request.headers, status.st_size
    try:
        fields += b'ETag: "%b"\r\nLast-Modified: %b\r\nAccept-Ranges: bytes\r\n' % (
            etag.encode(), http_date(int(status.st_mtime)).encode())
        if "if-none-match" in headers:
            unmodified = etag_matches(headers["if-none-match"], etag)
        else:
            unmodified = ("if-modified-since" in headers and
                          not_modified_since(headers["if-modified-since"], status.st_mtime))
        if unmodified:
            return Response(304, fields)
        part = None
        if ("range" in headers and request.method == "GET"
                and headers.get("if-range", f'"{etag}"') == f'"{etag}"'):
            part = parse_range(headers["range"], size)
        if part is not None:
            offset, length = part
            fields += header_line("Content-Range", f"bytes {offset}-{offset + length - 1}/{size}")
            response = Response(206, fields, b"", fd, offset, length, title)
        else:
            digest = md5() if md5 is not None else None
            if digest is not None:
                fields += b"Content-MD5: " + base64.b64encode(digest) + b"\r\n"
            response = Response(200, fields, b"", fd, 0, size, title)
        fd = None
        return response
    finally:
        if fd is not None:
            os.close(fd)


# -- routes ------------------------------------------------------------------------------
#
# From a Request to a Response.  Each route is a row of a table, which says where it is
# answered: MEMORY rows are tried in the event loop, where they raise
# NeedsThread rather than read from a disk (but stat: see store), THREAD rows go to a thread at
# once, and CHUNKED ones also take a body of unknown length.

MEMORY, THREAD, CHUNKED = 0, 1, 3                 # THREAD is a bit of CHUNKED
CACHE_FILES = b"Cache-Control: public, max-age=86400\r\n"
CACHE_MANIFESTS = b"Cache-Control: public, max-age=1, stale-if-error=86400\r\n"
CACHE_NEVER = b"Cache-Control: private, no-cache\r\n"     # has the Host header of a client
DSAPI_FIELDS = VARY + CACHE_NEVER

JSON_LIMIT = 1 << 20          # bytes of a JSON body, as of a manifest
TAG_LIMIT = 100               # characters of a tag's value that a filter finds
UPLOADS = 32                  # files that are uploaded at once, each with a thread
SPACE_LEFT = 1 << 30          # bytes of the disk that an upload must leave free
SPACE_STEP = 16 << 20         # bytes of an upload between two checks; of all UPLOADS, < SPACE_LEFT

_ADDRESS = re.compile(r"[0-9.]+(:|$)|\[")       # a host that is no name

# method (GET includes HEAD), pattern, handler(request, *the uuid and name in the path), flags
# as above, and the right that it needs.  routes() of each class below returns its rows.
Route = collections.namedtuple("Route", "method pattern handler flags right")

NO_ROWS = {}                      # of a path that the table of routes does not have

# Samples of the errors that IMGAPI knows, for /ping?error=NAME (sdc-imgapi, GET /ping).
PING_ERRORS = {                   # arguments of ApiError
    "ValidationFailed": (422, "ValidationFailed", "boom", []),
    "InvalidParameter": (422, "InvalidParameter", 'invalid "foo"',
                         [{"field": "foo", "code": "Invalid"}]),
    "OperatorOnly": (403, "OperatorOnly", "this endpoint may only be called by an operator"),
    "StorageIsDown": (503, "StorageIsDown", "storage is down"),
    "Internal": (500, "InternalError", "boom"),
}


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


def one_of(query, name, choices, refusal='invalid "{0}": "{1}"'):
    """The value of a parameter that has one of a few; None where it is absent or empty."""
    value = single_value(query, name)
    if value is not None and value not in choices:
        raise invalid(name, refusal.format(name, value)
                      + f' (must be one of {", ".join(choices)})')
    return value


# Parameters of GET /images that filter: check(image, text), cheap ones first.
FILTERS = {
    "os": lambda image, text: image.os == text,
    "owner": lambda image, text: image.owner == text,
    "name": lambda image, text: matches_text(image.name, text),
    "version": lambda image, text: matches_text(image.version, text),
    "type": lambda image, text: (image.type != text[1:] if text[0] == "!"
                                 else image.type == text),
    "public": lambda image, text: json.dumps(image.public) == text,
    "billing_tag": lambda image, text: text in image.billing_tags,
}


def image_filters(query, account):
    """The filters of a GET /images, as functions of an Image.  An empty text fits no image, nor
    do two of a field that has one value.
    """
    checks = []
    for name, check in FILTERS.items():
        texts = query.get(name, ())
        if len(texts) > 1 and name != "billing_tag":
            texts = [""]
        checks += [(check, text) for text in texts]
    if account:
        checks.append((may_see, account))
    tags = [(name[4:], text) for name, texts in query.items() if name.startswith("tag.")
            for text in texts]
    if tags:
        checks.append((has_tags, tags))
    return [(lambda image, check=check, wanted=wanted: check(image, wanted)) if wanted
            else lambda image: False for check, wanted in checks]


def has_tags(image, wanted) -> bool:
    """Whether an image has all tags of (name, text); numbers and booleans are as in JSON."""
    tags = image.fields().get("tags", {})
    for name, text in wanted:
        value = tags.get(name)
        if isinstance(value, (bool, int, float)):
            value = json.dumps(value)
        if value != text or not 0 < len(text) <= TAG_LIMIT:
            return False
    return True


def may_see(image, account) -> bool:
    """Whether an account sees an image: its own, a public one, or one shared with it."""
    return image.owner == account or image.public or account in image.acl


def newest_first(query) -> bool:
    """Whether the list is to be newest first.  Raises ApiError."""
    attribute, _, direction = (single_value(query, "sort") or "published_at").partition(".")
    if attribute != "published_at":
        raise invalid("sort", f"invalid 'sort': not a valid sorting attribute: '{attribute}'")
    return direction.lower() not in ("", "asc")


def limit_of(query):
    """How many images to list; None for all.  Raises ApiError."""
    value = single_value(query, "limit") or "0"
    if not re.fullmatch("-?[0-9]+", value):
        raise invalid("limit", f'invalid limit: "{value}"')
    limit = int(value[:9])                # there are fewer images
    return max(0, limit) if limit else None


def parse_accept_version(request) -> int:
    """1 or 2, which differ in `channels` alone.  Raises ApiError."""
    wanted = request.headers.get("accept-version")
    version = 1 if wanted is None else parse_version(wanted)
    if version is None:
        raise ApiError(400, "InvalidVersion", f"{wanted} is not supported by {request.method} "
                       + request.target.partition("?")[0])
    return version


@functools.lru_cache(HOSTS_KEPT)
def parse_version(wanted):
    """1 or 2, the best of a range of versions as npm writes them; None: neither."""
    match = re.fullmatch(r"\s*[~^=v]?\s*([0-9]{1,9})(\.(?:[0-9]{1,9}|[x*])){0,2}\s*",
                         wanted)
    if not match:
        return 2                  # "*", and anything not understood: any version
    if match[1] not in ("1", "2") or re.search(r"\.0*[1-9]", wanted):
        return None
    return int(match[1])


@functools.lru_cache(HOSTS_KEPT)
def accepts_gzip(header) -> bool:
    """Whether Accept-Encoding accepts gzip (RFC 9110 §12.5.3)."""
    for item in header.split(","):
        coding, _, parameters = item.partition(";")
        if coding.strip().lower() == "gzip":
            return not re.fullmatch(r"\s*q=0(\.0*)?\s*", parameters)
    return False


def dsapi_of(headers):
    """The form of DSAPI's manifests for a client: v2 for the Accept of imgadm 2 and later."""
    return DSAPI_V2 if headers.get("accept") == "application/json" else DSAPI


def check_admin_fields(query):
    """Refuse inclAdminFields, which is for operators of the official server."""
    if one_of(query, "inclAdminFields", ("true", "false")) == "true":
        raise ApiError(401, "UnauthorizedError", 'Unauthorized (auth required to use '
                                                 '"inclAdminFields" parameter)')


def open_of(image, name, kind, fits, serve_dir=None):
    """Open a file of an image: (fd, its stat).

    Raises ApiError (404) where it has no such file, or fits(its stat) is false, OSError where
    that cannot be told.
    """
    try:
        if name is not None:
            fd, status = open_regular(os.path.join(image.directory, name), serve_dir)
            if fits(status):
                return fd, status
            os.close(fd)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
    raise not_found(f'image "{image.uuid}" has no {kind}')


def file_of(request, find, store, accel) -> Response:
    """The file of the image that find() returns, with the ETag of just that state of the file.

    Where it was replaced between the two, find() is called again.  With accel, nginx on the
    Unix socket gets the path and sends the file: checks, conditions and 416 are ours, ranges
    its own.
    """
    for tries_left in reversed(range(OPEN_TRIES)):
        image = find()
        try:
            fd, status = open_of(image, image.file, "file",
                                 lambda status: stat_key(status) == image.file_key)
            break
        except ApiError:
            if not tries_left:
                raise
    fields = (b"Content-Type: application/octet-stream\r\n"
              + (CACHE_NOTHING if image.state == "unactivated" else CACHE_FILES))
    response = file_response(request, fd, status, image.sha1, fields,
                             lambda: store.content_md5(image, fd), image.title)
    if accel and not request.peer and response.file is not None:
        response.close()
        response.length = 0
        path = f"{accel}/{os.path.basename(image.directory)}/{image.file}"
        # nginx would pass Accept-Ranges on and add its own.
        response.fields = (response.fields.replace(b"Accept-Ranges: bytes\r\n", b"")
                           + header_line("X-Accel-Redirect", urllib.parse.quote(path)))
    return response


def check_if_match(headers, etag):
    """Raise ApiError (412) where If-Match names another version (RFC 9110 §13.1.1)."""
    if "if-match" in headers and not etag_matches(headers["if-match"], etag):
        raise ApiError(412, "PreconditionFailed",
                       f"if-match '{headers['if-match']}' didn't match etag '{etag}'")


def manifest_response(request, etag, fields, *parts) -> Response:
    """One manifest, of which `parts` are the bytes: 200 or 304 (RFC 9110 §13.2.2).

    Raises ApiError (412) where If-Match names another one.
    """
    headers = request.headers
    if "if-match" in headers:
        check_if_match(headers, etag.decode())
    fields = b'%bETag: "%b"\r\n%b%b' % (JSON_TYPE, etag, fields, CORS)
    if "if-none-match" in headers and etag_matches(headers["if-none-match"], etag.decode()):
        return Response(304, fields)
    return Response(200, fields, b"".join(parts))


def list_response(request, store, listing, vary, fields) -> Response:
    """A whole list: with ETag, and as gzip for clients that take it (imgadm does not)."""
    headers, body, etag, lines = request.headers, listing, listing.etag, listing.fields
    if not lines:
        lines = listing.fields = list_fields(etag, vary, fields)
    if "accept-encoding" in headers and accepts_gzip(headers["accept-encoding"]):
        zipped = store.zipped(listing, request.may_block)
        if zipped is not None:
            body, etag = zipped, etag + "-gzip"
            lines = list_fields(etag, vary, b"Content-Encoding: gzip\r\n" + fields)
    if "if-none-match" in headers and etag_matches(headers["if-none-match"], etag):
        return Response(304, lines)
    return Response(200, lines, body, length=listing.length if body is listing else len(body))


@functools.lru_cache(LISTS_KEPT * 4)
def list_fields(etag, vary, fields) -> bytes:
    return b'%bETag: "%b"\r\nVary: %b\r\n%b%b' % (JSON_TYPE, etag.encode(), vary, fields, CORS)


def filtered_response(images, numbers, text_of, fields) -> Response:
    """An uncached list of some images of a snapshot."""
    listing = Listing(images, text_of, numbers=numbers)
    return Response(200, JSON_TYPE + fields + CORS, listing, length=listing.length)


def read_all(request) -> bytes:
    """The whole body of a request, of which the length was checked; for a thread."""
    return b"".join(iter(lambda: request.body.read(request.length), b""))


def read_json(request, kind):
    """The value of a JSON body; an empty one is {}.  Its Content-Type does not count.

    Raises ApiError: 413 above JSON_LIMIT, 400 where it is no `kind`, or not as Content-MD5 says.
    """
    if request.length > JSON_LIMIT:
        raise ApiError(413, "RequestEntityTooLarge", f"a JSON body of over {JSON_LIMIT} bytes")
    data = read_all(request)
    promised = request.headers.get("content-md5")
    if promised is not None and promised != base64.b64encode(hashlib.md5(data).digest()).decode():
        raise ApiError(400, "BadDigest", "the body is not as its Content-MD5 says")
    try:
        value = parse_json(data or b"{}")
    except ValueError as error:
        raise ApiError(400, "InvalidContent", f"Invalid JSON: {error}")
    if not isinstance(value, kind):
        raise ApiError(400, "InvalidContent", "Invalid JSON: it must be an object")
    return value


class Dsapi:
    """The API of 2012: everything is below /datasets, and files have names."""

    def __init__(self, config, store, rights):
        self.config, self.store, self.rights = config, store, rights
        # prefix + Host + suffix, as JSON: the beginning of files[].url
        self.url_base = functools.lru_cache(HOSTS_KEPT)(self._make_url_base)

    def routes(self):
        return [
            Route("GET", "datasets", self.list, MEMORY, ANYONE),
            Route("GET", "datasets/:uuid", self.manifest, MEMORY, ANYONE),
            Route("GET", "datasets/:uuid/:file", self.file, THREAD, ANYONE),
        ]

    def _make_url_base(self, host):
        suffix = self.config.suffix
        if suffix and _HOST.fullmatch(host)[2]:       # it was made to add a port to a host
            suffix = re.sub("^:[0-9]+", "", suffix)
        return _quote(self.config.prefix + host + suffix)[1:-1].encode()

    def list(self, request):
        """All active images; filters as dsapid has them: by prefix, or ~part."""
        base, api = self.url_base(request.host), dsapi_of(request.headers)
        all_of_them = self.rights.lists_all(request)

        def text_of(image):
            return base.join(getattr(image, api)[:2])

        if request.query:
            query = parse_query(request.query)
            wanted = {name: single_value(query, name)
                      for name in ("name", "version", "os", "type")}
            if any(wanted.values()):
                if not request.may_block:
                    raise NeedsThread     # it is rendered to learn its length
                images = self.store.snapshot(api, True).images
                with self.store.rendering:
                    numbers = [number for number, image in enumerate(images)
                               if (all_of_them or image.public)
                               and all(value is None or matches_text(getattr(image, name), value,
                                                                     name != "type")
                                       for name, value in wanted.items())]
                    return filtered_response(images, numbers, text_of, DSAPI_FIELDS)
        listing = self.store.listing(
            api, (all_of_them,),
            lambda images: [image for image in images if all_of_them or image.public],
            text_of, request.may_block, base)
        return list_response(request, self.store, listing, b"Accept, Accept-Encoding",
                             CACHE_NEVER)

    def manifest(self, request, uuid):
        """One manifest, also of a disabled image."""
        api = dsapi_of(request.headers)
        image = self.store.image(uuid, api, request.may_block)
        if self.rights.hides:
            self.rights.visible(request, image)
        before, after, etag = getattr(image, api)
        return manifest_response(request, etag, DSAPI_FIELDS, before,
                                 self.url_base(request.host), after)

    def file(self, request, uuid, name):
        """The file of an image, by the name that its v1 manifest gives."""
        def find():
            image = self.rights.visible(request, self.store.image(uuid, DSAPI, True))
            if name != image.path:
                raise not_found(f"{request.target} does not exist")
            return image
        return file_of(request, find, self.store, self.config.accel)


def unknown_channel(name) -> ApiError:
    return invalid("channel", f"unknown channel: {name}", kind="ValidationFailed")


class Imgapi:
    """The API that imgadm uses by default since 2013: its reading half."""

    def __init__(self, config, store, rights):
        self.config, self.store, self.rights = config, store, rights
        self.channels = {channel["name"]: channel for channel in config.channels}
        self.vary = b"Accept-Version" if self.channels else b""     # whether it has `channels`

    def routes(self):
        return [
            Route("GET", "images", self.list, MEMORY, ANYONE),
            Route("GET", "images/:uuid", self.manifest, MEMORY, ANYONE),
            Route("GET", "images/:uuid/file", self.file, THREAD, ANYONE),
            Route("GET", "images/:uuid/icon", self.icon, THREAD, ANYONE),
            Route("GET", "state", self.state, MEMORY, ANYONE),
        ] + ([Route("GET", "channels", self.channel_list, MEMORY, ANYONE)] if self.channels
             else [])

    def channel_of(self, query, others=("*",)):
        """The channel a request is about: None without channels, "*" for all.

        Raises ApiError as sdc-imgapi does, for one that is neither configured nor in `others`.
        """
        if not self.channels:
            return None
        name = single_value(query, "channel")
        if name is None:
            if self.config.default_channel is None:
                raise invalid("channel",
                              "channel not specified and the server has no default channel",
                              "MissingParameter", "ValidationFailed")
            return self.config.default_channel
        if name not in self.channels and name not in others:
            raise unknown_channel(name)
        return name

    def in_channel(self, image, channel) -> bool:
        """Whether an image is to be seen there; one without channels is not, where there are."""
        return channel is None or any(name == channel or channel == "*"
                                      for name in image.channels if name in self.channels)

    @staticmethod
    def text_of(version):
        """A function of an Image: its v2 manifest, as a version of IMGAPI shows it."""
        if version == 2:
            return lambda image: b"%b%b\n}" % image.imgapi[:2]
        return lambda image: image.imgapi[0] + b"\n}"

    def cache_fields(self, image=None) -> bytes:
        """Cache-Control and Vary of a manifest or filtered list.

        An image that is not active yet may still be changed, so no cache is to keep it.
        """
        if image is not None and image.state == "unactivated":
            return CACHE_NOTHING
        return CACHE_MANIFESTS + (self.vary and b"Vary: %b\r\n" % self.vary)

    def list(self, request):
        """All active images, as ListImages: filtered, sorted, marked, limited."""
        version = parse_accept_version(request)
        query = parse_query(request.query) if request.query else {}
        check_admin_fields(query)
        channel = self.channel_of(query)
        if set(query) - {"channel", "inclAdminFields"}:
            images, checks, backwards, limit = self._select(request, query, channel)
            # Clients that may publish see more by state= than others.
            fields = CACHE_NOTHING if "state" in query else self.cache_fields()
            with self.store.rendering:
                numbers = range(len(images))
                for check in checks:
                    numbers = [number for number in numbers if check(images[number])]
                numbers = numbers[::-1 if backwards else 1][:limit]
                return filtered_response(images, numbers, self.text_of(version), fields)
        all_of_them = self.rights.lists_all(request)
        listing = self.store.listing(
            IMGAPI, (channel, version if self.channels else None, all_of_them),
            lambda images: [image for image in images if self.in_channel(image, channel)
                            and (all_of_them or image.public)],
            self.text_of(version), request.may_block)
        return list_response(request, self.store, listing,
                             b"Accept-Encoding" + (self.vary and b", " + self.vary),
                             CACHE_MANIFESTS)

    def _select(self, request, query, channel):
        """(images of a snapshot, checks that those of the query pass, newest first, limit)."""
        backwards, limit = newest_first(query), limit_of(query)
        account = single_value(query, "account")
        state = one_of(query, "state", (*STATES, "all"), 'invalid {0}: "{1}"') or "active"
        if state != "active":
            request.audience = CLIENT
        if not request.may_block:
            raise NeedsThread     # it is rendered to learn its length
        if state != "active" and self.rights.of(request) >= PUBLISH:
            images = self.store.all_images()
        else:
            images = self.store.snapshot(IMGAPI, True).images     # active ones
        checks = [lambda image: self.in_channel(image, channel), *image_filters(query, account)]
        if state not in ("active", "all"):
            checks.insert(0, lambda image: image.state == state)
        if not self.rights.lists_all(request):
            checks.insert(0, lambda image: image.public)
        marker = single_value(query, "marker")
        if marker is not None:
            first = self._marker(request, marker, backwards)
            checks.append(lambda image: image.order <= first if backwards
                          else image.order >= first)
        return images, checks, backwards, limit

    def _marker(self, request, marker, backwards):
        """The place in the order where a list is to begin: that of an image, or of a date, of
        which a short one is its start.  Raises ApiError.
        """
        if is_uuid(marker):
            return self.rights.visible(request, self.store.image(marker, IMGAPI, True)).order
        date = marker.replace(" ", "T").rstrip("Z")
        date += "0000-01-01T00:00:00.000"[len(date):]
        try:
            time.strptime(date[:19], "%Y-%m-%dT%H:%M:%S")
        except ValueError:
            date = ""
        if not date.isascii() or not re.fullmatch(r"\.[0-9]{3}", date[19:]):
            raise invalid("marker", f'invalid value for "marker" param: "{marker}" is not a '
                                    "UUID or date string")
        return date, "~" if backwards else ""

    def find(self, request, uuid):
        """(image, version, query) of a request for one image, in any state.

        Raises ApiError (404) where its channel or account does not show it, NeedsThread.
        """
        query, account, channel = {}, None, None
        version = parse_accept_version(request)
        if request.query or self.channels:
            query = parse_query(request.query)
            check_admin_fields(query)
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
        self.rights.visible(request, image)
        if channel and not self.in_channel(image, channel) \
                or account and not may_see(image, account):
            raise not_found("image not found")
        return image, version, query

    def manifest(self, request, uuid):
        image, version, _ = self.find(request, uuid)
        before, channels, etag = image.imgapi
        if version == 1 and channels:
            channels, etag = b"", etag + b"-1"
        return manifest_response(request, etag, self.cache_fields(image), before, channels,
                                 b"\n}")

    def file(self, request, uuid):
        """The file of an image; ?index=0 is the only one."""
        def find():
            image, _, query = self.find(request, uuid)
            index = single_value(query, "index") or "0"
            if re.fullmatch("[0-9]+", index) and index.strip("0"):
                raise not_found(f'image "{uuid}" has no file at index {index.lstrip("0")}')
            return image
        return file_of(request, find, self.store, self.config.accel)

    def icon(self, request, uuid):
        """The icon of an image, with the Content-MD5 that sdc-clients insist on."""
        image, _, _ = self.find(request, uuid)
        fd, status = open_of(image, image.icon, "icon",
                             lambda status: status.st_size <= MD5_LIMIT, self.config.serve_dir)
        try:
            sha1, md5 = self.store.hashes_of(fd, image, image.icon)
        except OSError:
            os.close(fd)
            raise
        return file_response(request, fd, status, sha1,
                             header_line("Content-Type", ICONS[image.icon])
                             + self.cache_fields(image) + CORS, lambda: md5)

    def channel_list(self, request):
        return json_response(self.config.channels, fields=CACHE_MANIFESTS)

    def state(self, request):
        """For operators of the official server: refused, as it does."""
        raise ApiError(401, "UnauthorizedError", "Unauthorized")


class ImgapiPublishing:
    """The writing half of IMGAPI (protocol of sdc-imgapi): only where publishing is on."""

    def __init__(self, config, store, imgapi, rights):
        self.config, self.store, self.imgapi, self.rights = config, store, imgapi, rights
        self.publisher = Publisher(config, threading.Semaphore(max(1, (os.cpu_count() or 1) - 1)))
        self._reader = ImageReader(config)
        self._uploads = threading.BoundedSemaphore(UPLOADS)
        self.actions = {                  # of an image: the right they need, and the change
            "activate": (PUBLISH, self.activate), "enable": (MANAGE, self.enable_or_disable),
            "disable": (MANAGE, self.enable_or_disable), "update": (MANAGE, self.update)}
        if imgapi.channels:
            self.actions["channel-add"] = (MANAGE, self.channel_add)

    def routes(self):
        return [
            Route("POST", "images", self.post, CHUNKED, PUBLISH),
            Route("POST", "images/:uuid", self.post_image, THREAD, PUBLISH),
            Route("DELETE", "images/:uuid", self._changing(self.delete), THREAD, PUBLISH),
            Route("PUT", "images/:uuid/file", self.put_file, CHUNKED, PUBLISH),
            Route("PUT", "images/:uuid/icon", self._changing(self.put_icon), THREAD, PUBLISH),
            Route("DELETE", "images/:uuid/icon", self._changing(self.delete_icon), THREAD,
                  PUBLISH),
            Route("POST", "images/:uuid/acl", self._changing(self.post_acl), THREAD, MANAGE),
        ] + [Route("POST", f"images/:uuid/{name}", self.not_available, THREAD, PUBLISH)
             for name in ("jobs", "push", "clone", "file/from-url")]

    # parts of several routes

    @staticmethod
    def _query(request) -> dict:
        """The parameters of a request.  Raises ApiError, also where the answer has no version."""
        parse_accept_version(request)
        return parse_query(request.query)

    @staticmethod
    def _answer(request, rendered) -> Response:
        """An image: Image.imgapi, or of ImageReader.render."""
        before, channels, etag = rendered
        if parse_accept_version(request) == 1 and channels:
            channels, etag = b"", etag + b"-1"
        return Response(200, b'%bETag: "%b"\r\n' % (JSON_TYPE, etag) + CACHE_NOTHING,
                        b"%b%b\n}" % (before, channels))

    def _changing(self, change, shown=MANAGE):
        """The handler of a route: change(request, image, query, publisher) of one that is here.

        It is answered by the image as it is then, unless change returns a Response.  shown:
        the right to change an image that is on show.  The publisher finds the image again: a
        body may take its time.
        """
        def handler(request, uuid):
            query = self._query(request)
            image, publisher = self._find(request, uuid, query, shown)
            response = change(request, image, query, publisher)
            if response is None:
                self.store.in_any_state(uuid).checked = -math.inf     # its icon may be new
                response = self._answer(request, self.store.in_any_state(uuid).imgapi)
            return response
        return handler

    @staticmethod
    def _waits(image) -> bool:
        """Whether an image is not on show.  In its own directory it is, even as "unactivated"."""
        return image.place.endswith(INCOMING)

    def _find(self, request, uuid, query, shown):
        """The image to be changed, and a Publisher that checks it in the same way."""
        def check():
            return self._checked(request, uuid, query, shown)
        return check(), self.publisher.checking(check)

    def _checked(self, request, uuid, query, shown) -> Image:
        """The image to be changed, in any state, where its channel shows it.

        One that waits to be activated need not be in the default channel: imgadm publish
        names none.  Raises ApiError: 404, 412 where If-Match names another version of it, 403
        or 401 where it is on show and the client lacks that right.
        """
        image = self.store.in_any_state(uuid)
        if not self._waits(image) or "channel" in query:
            if not self.imgapi.in_channel(image, self.imgapi.channel_of(query, ())):
                raise not_found("image not found")
        check_if_match(request.headers, image.imgapi[2].decode())
        if not self._waits(image):
            self.rights.need(request, shown)
        return image

    def not_available(self, request, *_):
        """Parts of IMGAPI that need a data centre."""
        raise ApiError(501, "NotAvailable", f"{request.method} {request.target} is not available "
                       "on this server")

    # new images

    def post(self, request):
        """CreateImage; ?action=publish takes a whole image in one request."""
        query = self._query(request)
        action = single_value(query, "action")
        if action == "publish":
            return self.publish(request, query)
        if request.length is None:
            raise ApiError(411, "LengthRequired", "a body needs a Content-Length here")
        if action == "create-from-vm":
            return self.not_available(request)
        if action is not None:
            raise invalid("action", f'"{action}" is not a valid action')
        fields = read_json(request, dict)
        account = single_value(query, "account")
        if account is not None and fields.setdefault("owner", account) != account:
            raise invalid("owner", f'"owner", {fields["owner"]}, is not the account')
        return self._create(request, query, new_uuid(), validate_new(fields))

    def import_manifest(self, request, uuid, query):
        """AdminImportImage: an image that keeps its uuid; icon and state are left out."""
        if "account" in query:
            raise ApiError(403, "OperatorOnly",
                           "this endpoint may only be called by an operator")
        if "source" in query:
            raise ApiError(501, "NotAvailable", "images of other servers come by `imgserver.py "
                           "mirror`")
        manifest = read_json(request, dict)
        if manifest.get("uuid") is None:
            raise invalid("uuid", 'missing "uuid" in the body', "MissingParameter")
        if manifest["uuid"] != uuid:
            raise invalid("uuid", f'URL UUID, "{uuid}" and body UUID, "{manifest["uuid"]}" '
                                  "do not match")
        self.publisher.refuse_existing(uuid)
        manifest = validate({name: value for name, value in manifest.items()
                             if name not in ("icon", "state", "error")})
        return self._create(request, query, uuid,
                            upgrade(manifest) if is_v1(manifest) else manifest)

    def _create(self, request, query, uuid, fields):
        """Make an image that has no file yet of checked fields, and answer it."""
        manifest = self.publisher.create(self._manifest(query, uuid, fields))
        return self._answer(request, self._reader.render(manifest, False))

    def _manifest(self, query, uuid, fields) -> dict:
        """A v2 manifest of checked fields, in its own channels, the query's or the default."""
        manifest = {"v": 2, "uuid": uuid, **DEFAULTS, **fields}
        if not self.imgapi.channels:
            manifest.pop("channels", None)
        elif "channel" in query or not manifest.get("channels"):
            channel = self.imgapi.channel_of(query, ())
            manifest["channels"] = manifest.get("channels") or [channel]
        choose_channels(self.config, manifest)
        return manifest

    def publish(self, request, query):
        """?action=publish&name=...&version=...: create, upload and activate in one request.

        The other parameters are fields of the manifest, as import takes them.
        """
        uuid = single_value(query, "uuid") or new_uuid()
        fields = {"v": 2, "uuid": uuid, "owner": self.config.image_creator_uuid or NOBODY,
                  "type": "zone-dataset", "os": "smartos"}
        for name in query:
            if name not in ("action", "channel", "uuid", "compression", "sha1"):
                try:
                    field, value = parse_field(f"{name}={single_value(query, name) or ''}")
                except ValueError as error:
                    raise invalid(name, str(error))
                if value is not None:
                    fields[field] = value
        manifest = self._manifest(query, uuid, validate(fields))
        manifest["files"] = [self._promised(request, query)]
        manifest = self._upload(request, self.publisher.import_image, manifest, True)
        return self._answer(request, self._reader.render(manifest, True))

    # changes

    def post_image(self, request, uuid):
        """?action=VERB of one image."""
        query = self._query(request)
        action = single_value(query, "action")
        if action is None:
            raise invalid("action", 'no image "action" was specified', "MissingParameter")
        if action == "import":
            return self.import_manifest(request, uuid, query)
        if action in ("export", "import-remote", "import-from-datacenter", "change-stor"):
            return self.not_available(request)
        if action not in self.actions:
            raise invalid("action", f'"{action}" is not a valid action')
        right, change = self.actions[action]
        self.rights.need(request, right)
        return self._changing(change, right)(request, uuid)

    def activate(self, request, image, query, publisher):
        """ActivateImage; its body, and that of the next one, is read for the connection's sake."""
        if image.state == "unactivated" and not self._waits(image):
            self.rights.need(request, MANAGE)
        read_json(request, object)
        publisher.activate(image.uuid)

    def enable_or_disable(self, request, image, query, publisher):
        read_json(request, object)
        getattr(publisher, single_value(query, "action"))(image.uuid)

    def update(self, request, image, query, publisher):
        """UpdateImage: null removes a field."""
        if request.length == 0:
            raise invalid("body", "missing request body", "MissingParameter")
        publisher.update(image.uuid, read_json(request, dict))

    def channel_add(self, request, image, query, publisher):
        """AddImageToChannel: the body has its name."""
        name = read_json(request, dict).get("channel")
        if not isinstance(name, str) or name not in self.imgapi.channels:
            raise unknown_channel(name)

        def changes():
            names = self.store.in_any_state(image.uuid).channels
            return {"channels": list(dict.fromkeys([*names, name]))}
        if name not in image.channels:
            publisher.update(image.uuid, changes)

    def post_acl(self, request, image, query, publisher):
        """?action=add (the default) or remove, with a list of account UUIDs."""
        action = one_of(query, "action", ("add", "remove"))
        accounts = read_json(request, object)
        if not isinstance(accounts, list):
            raise invalid("acl", 'invalid image "acl" (not an array)')
        for number, account in enumerate(accounts):
            if not isinstance(account, str) or not is_uuid(account):
                raise invalid("acl", f'invalid image "acl" (item {number} is not a UUID): '
                                     f"{account}")
        given = dict.fromkeys(accounts)

        def changes():
            acl = self.store.in_any_state(image.uuid).acl
            acl = ([account for account in acl if account not in given] if action == "remove"
                   else list(dict.fromkeys(acl) | given))
            return {"acl": acl or None}
        publisher.update(image.uuid, changes)

    # files

    @staticmethod
    def _promised(request, query) -> dict:
        """Facts of a file, as the query and Content-Length give them.  Raises ApiError."""
        return {"size": request.length, "sha1": single_value(query, "sha1"),
                "dataset_guid": single_value(query, "dataset_guid"),
                "compression": one_of(query, "compression", COMPRESSIONS,
                                      'invalid {0} "{1}"')}

    def put_file(self, request, uuid):
        """AddImageFile: straight to disk, examined on the way; the Content-Type is ignored."""
        query = self._query(request)
        expected = self._promised(request, query)
        if expected["compression"] is None:
            raise invalid("compression", 'missing "compression"', "Missing")
        one_of(query, "storage", ("local", "manta"))
        if "source" in query:
            return self.not_available(request)
        image, publisher = self._find(request, uuid, query, PUBLISH)
        if image.state != "unactivated":
            raise ApiError(422, "ImageFilesImmutable",
                           f"cannot modify files on activated image {uuid}")
        manifest = self._upload(request, publisher.add_file, uuid, expected)
        return self._answer(request, self._reader.render(manifest, False, image.icon))

    def _upload(self, request, verb, image, how) -> dict:
        """Run add_file or import_image with the body of a request; the manifest as stored.

        What can be refused is, before the first byte.  Raises ApiError, and ClientGone.
        """
        if "content-range" in request.headers:        # curl -C -; RFC 9110 §14.4
            raise bad_request("an upload cannot be resumed: it must be the whole file")
        self._check_size(request.length or 0)
        self._check_space(request.length or 0)
        if not self._uploads.acquire(blocking=False):
            raise unavailable(f"{UPLOADS} uploads are on their way", 10)
        body = request.body
        body.is_file = True

        def read(size):
            before = body.received
            data = body.read(size)
            self._check_size(body.received)
            if before // SPACE_STEP != body.received // SPACE_STEP:
                self._check_space(0)      # others are written at the same time
            return data

        try:
            return verb(image, read, how, self.config.check_streams)
        finally:
            self._uploads.release()

    def _check_size(self, size):
        """Raise ApiError (400) for a file that is too large."""
        limit = self.config.max_upload
        if limit and size > limit:
            raise ApiError(400, "Upload", f"image file size exceeds max_upload, {limit} bytes")

    def _check_space(self, size):
        """Raise ApiError (503) where `size` bytes more would leave too little of the disk."""
        with storing("the disk cannot be examined", self.config.serve_dir):
            status = os.statvfs(self.config.serve_dir)
        if status.f_bavail * status.f_frsize - size < SPACE_LEFT:
            raise ApiError(503, "StorageIsDown", "the disk has no room for it")

    def put_icon(self, request, image, query, publisher):
        """AddImageIcon, in place of the one before."""
        if request.length > ICON_LIMIT:
            raise ApiError(400, "Upload", f"icon size {request.length} (from Content-Length) "
                           f"exceeds the maximum allowed size, {ICON_LIMIT >> 10} KiB")
        data = read_all(request)
        sha1, wanted = hashlib.sha1(data).hexdigest(), single_value(query, "sha1")
        if wanted is not None and wanted.lower() != sha1:
            raise ApiError(400, "Upload", f'"sha1" hash, {wanted}, does not match the uploaded '
                           f"icon file sha1 hash, {sha1}")
        publisher.add_icon(image.uuid, request.headers.get("content-type", ""), data)

    def delete_icon(self, request, image, query, publisher):
        publisher.remove_icon(image.uuid)

    def delete(self, request, image, query, publisher):
        """DeleteImage: out of its channel, and altogether where that was the last one."""
        uuid, account = image.uuid, single_value(query, "account")
        if account is not None and account != image.owner:
            raise ApiError(422, "NotImageOwner",
                           f"account {account} is not the owner of image {uuid}")
        everywhere = one_of(query, "force_all_channels", ("true", "false")) == "true"
        if self._waits(image):
            publisher.refuse_dependents(uuid)
            publisher.discard(uuid)
            return Response(204, CACHE_NOTHING)
        channel = self.imgapi.channel_of(query, ())

        def changes():
            others = [name for name in self.store.in_any_state(uuid).channels
                      if name != channel and name in self.imgapi.channels]
            return {"channels": others} if others and not everywhere else {}
        publisher.delete(uuid, instead=changes)
        return Response(204, CACHE_NOTHING)


# The page.  Its policy has the hashes of the style and of the script.
PAGE_ROWS = 1000              # images on one page: 400 to 700 bytes each
PAGE_TEXT = 200               # characters of a description that are shown
PAGES_KEPT = 4                # rendered pages kept of one snapshot, below 1 MB each as a rule
PAGES_LIMIT = 64 << 20        # bytes of rendered pages in use: unread ones must not fill memory
PAGE_HUES = 4                 # colours of the letter that stands for a missing icon

PAGE_STYLE = """
:root{color-scheme:light dark;--back:#f4f6f8;--card:#fff;--line:#dce1e7;--text:#1b2430;
--soft:#566272;--link:#0b5cad;--on:#fff}
@media(prefers-color-scheme:dark){:root{--back:#11151b;--card:#1a2028;--line:#2d3641;
--text:#e7ebf0;--soft:#9eabba;--link:#7db8f5;--on:#0d1722}}
*{box-sizing:border-box;min-width:0;margin:0}
html{scroll-padding:5rem 0 1rem}
body{background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}
button,input{font:inherit;color:inherit}
header,main,footer{max-width:80rem;margin:0 auto;padding:0 1rem}
header{display:flex;flex-wrap:wrap;gap:1rem 3rem;align-items:end;justify-content:space-between;
padding-top:2rem}
h1{color:var(--text);font-size:2rem;line-height:1.2;letter-spacing:-.02em}
h2{font-size:1.0625rem;line-height:1.35}
h2 b{font-weight:400;margin-left:.25rem}
h2 b,header>:first-child,small,footer,#count{color:var(--soft)}
a{color:var(--link);text-underline-offset:.15em}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
.skip,label{position:absolute;left:-99rem}
.skip:focus{left:1rem;top:.5rem;z-index:2;background:var(--card);padding:.5rem}
header p,li>p,input,form button,nav a,ol,.note{border:1px solid var(--line);border-radius:.6rem;
background:var(--card);overflow:hidden}
header p,li>p{display:flex;margin-top:.35rem}
li>p{background:var(--back)}
code{font:.8125rem/1.5 ui-monospace,Menlo,Consolas,monospace}
p>code{flex:1;padding:.45rem .75rem}
button{padding:0 1.2rem;font-weight:600;cursor:pointer}
form button,p>button:hover,nav [aria-current]{background:var(--link);border-color:var(--link);
color:var(--on)}
p>button{flex:none;width:4.75rem;padding:0;border:0;border-left:1px solid var(--line);
background:var(--card);color:var(--link);font-size:.8125rem}
p>button:focus-visible{outline-offset:-3px}
form{display:flex;gap:.6rem;position:sticky;top:0;z-index:1;background:var(--back);
margin-top:.75rem;padding:.75rem 0}
input{flex:1;padding:.6rem .9rem}
input::placeholder{color:var(--soft);opacity:1}
nav{display:flex;flex-wrap:wrap;gap:.4rem;margin-top:1rem;align-items:center}
nav a{border-radius:2rem;padding:.25rem .9rem;text-decoration:none}
#count{padding-bottom:.6rem}
ol{list-style:none;padding:0;font-size:.9375rem}
li{display:grid;grid-template-columns:2.75rem minmax(12rem,1fr) minmax(0,auto);gap:0 1rem;
align-items:center;padding:.9rem 1rem;content-visibility:auto;contain-intrinsic-size:auto 6rem}
li+li{border-top:1px solid var(--line)}
li i,li img{width:2.75rem;height:2.75rem;border-radius:.6rem;align-self:start;object-fit:contain}
li i{display:grid;place-items:center;font:700 1.25rem system-ui,sans-serif;color:#fff;
background:#1f6fb2}
.h1{background:#7a4fb5}.h2{background:#1b7f6b}.h3{background:#b3541e}
small,footer{display:block;font-size:.8125rem}
.note{padding:3rem 1rem;text-align:center}
footer{padding-block:1.5rem}
@media(max-width:62rem){li{grid-template-columns:2.75rem minmax(0,1fr)}
li>p{grid-column:2;justify-self:start}}
@media(max-width:40rem){li>p{grid-column:1/3;width:100%}code{font-size:.75rem}
p>button{width:4rem}}
@media print{form,p>button,nav,footer{display:none}li{content-visibility:visible}}
"""

# A plain http: page has no navigator.clipboard, so that a line is selected and copied.
PAGE_SCRIPT = """
const box = document.getElementById("q"), said = document.getElementById("said");
function addButtons(root) {
  for (const code of root.querySelectorAll("p>code")) {
    const button = document.createElement("button");
    button.textContent = "Copy";
    button.setAttribute("aria-label", "Copy " + code.textContent);
    code.after(button);
  }
}
document.addEventListener("click", event => {
  const button = event.target.closest("p>button");
  if (!button) return;
  const selection = getSelection();
  selection.selectAllChildren(button.previousElementSibling);
  const done = document.execCommand("copy");
  if (done) selection.removeAllRanges();
  said.textContent = button.textContent = done ? "Copied" : "Ctrl+C";
  setTimeout(() => { said.textContent = ""; button.textContent = "Copy"; }, 1500);
});
const wanted = () => "?" + new URLSearchParams(new FormData(box.form));
async function filter() {
  const url = wanted();
  try {
    const answer = await fetch(url);
    if (!answer.ok || url !== wanted()) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    addButtons(page);
    for (const id of ["count", "list"])
      document.getElementById(id).replaceChildren(...page.getElementById(id).childNodes);
    history.replaceState(null, "", url);
  } catch (error) { }
}
let timer;
box.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(filter, 150); });
document.addEventListener("keydown", event => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey
      || event.target.closest("input")) return;
  event.preventDefault();
  box.focus();
});
addButtons(document);
"""


PAGE_HTML = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Images on {host}</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' \
viewBox='0 0 16 16'%3E%3Ctext y='13' font-size='13'%3E📦%3C/text%3E%3C/svg%3E">
<style>{style}</style></head><body>
<a class="skip" href="#list">Skip to the images</a>
<header><div><h1>SmartOS images</h1>on {host}</div>
<div>Add this server to a global zone:<p><code>imgadm sources -a {source}</code></p>
</div></header>
<main>{tabs}<form role="search"><label for="q">Filter the images</label>
<input type="search" id="q" name="q" value="{words}" autocomplete="off" \
spellcheck="false" placeholder="Name, version, os, description or uuid">
<input type="hidden" name="page" value="1">{hidden}
<button>Filter</button></form>
<p id="count" role="status">{count}</p>
<div id="list">{listed}{pages}</div></main>
<footer><a href="images">Images as JSON</a> {login} imgserver {version}</footer>
<div role="status" id="said" class="skip"></div>
<script>{script}</script></body></html>
"""


def size_text(size) -> str:
    """Bytes as people read them, three digits and a unit that stays beside them: 1.23 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB"):
        if size < 1000:
            break
        size /= 1024
    digits = 0 if unit == "bytes" or size >= 100 else 1 if size >= 10 else 2
    return f"{size:.{digits}f}\xa0{unit}"


class Page:
    """The page: HTML that works without scripts and loads nothing from elsewhere.

    Cached for each snapshot, host, filter, channel, page and coding.
    """

    def __init__(self, config, store, dsapi, imgapi):
        self.config, self.store, self.dsapi, self.imgapi = config, store, dsapi, imgapi
        self.rights = imgapi.rights
        self._in_use = weakref.WeakValueDictionary()      # id: page in the cache, or being sent
        style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                         for text in (PAGE_STYLE, PAGE_SCRIPT))
        self.fields = (
            b"Content-Type: text/html; charset=utf-8\r\nVary: Accept, Accept-Encoding\r\n"
            + header_line("Content-Security-Policy",
                          f"default-src 'none'; style-src 'sha256-{style}'; script-src "
                          f"'sha256-{script}'; img-src 'self' data:; connect-src 'self'; "
                          "form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
            + b"X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
            + CACHE_NEVER)                    # it has the Host header in it

    def routes(self):
        return [Route("GET", "", self.root, THREAD, ANYONE)]

    def root(self, request):
        """index.html for a browser, index.json for the rest, as the original; else the page,
        or a hint.  The page in any case where the query asks for it (?page=1).
        """
        query = parse_query(request.query)
        if "login" in query:
            self.rights.need(request, READ)
        if "page" in query:
            return self.page(request, query)
        accept = request.headers.get("accept", "")
        for_people = "text/html" in accept or "application/xhtml+xml" in accept
        name, kind = (("index.html", "text/html; charset=utf-8") if for_people
                      else ("index.json", "application/json"))
        try:
            fd, status = open_regular(os.path.join(self.config.serve_dir, name),
                                      self.config.serve_dir)
        except OSError as error:
            raise_shortage(error)
            if for_people:
                return self.page(request, query)
            return json_response({"server": f"imgserver/{__version__}", "datasets": "/datasets",
                                  "images": "/images", "ping": "/ping"},
                                 fields=VARY + CACHE_MANIFESTS)
        etag = hashlib.sha1(repr(stat_key(status)).encode()).hexdigest()
        return file_response(request, fd, status, etag, header_line("Content-Type", kind)
                             + VARY + CACHE_MANIFESTS + CORS)

    def page(self, request, query) -> Response:
        """One page of the list: ?page=N&q=WORDS&channel=NAME."""
        number = single_value(query, "page") or "1"
        if not is_count(number):
            raise invalid("page", f'invalid "page": "{number}" is not a number from 1 on')
        channel = self.imgapi.channel_of({"channel": [
            single_value(query, "channel") or self.config.default_channel or "*"]})
        snapshot = self.store.snapshot(IMGAPI, True)
        zipped = accepts_gzip(request.headers.get("accept-encoding", ""))
        view = (self.dsapi.url_base(request.host).decode(), channel,
                single_value(query, "q") or "", int(number), self.rights.lists_all(request))
        with self.store.rendering:
            page = snapshot.pages.get((view, zipped))
            if page is None:
                page = snapshot.pages[view, zipped] = self._render(snapshot, view, zipped)
                if len(snapshot.pages) > PAGES_KEPT:
                    del snapshot.pages[next(iter(snapshot.pages))]
        fields = self.fields + header_line("ETag", f'"{page.etag}"')
        if zipped:
            fields += b"Content-Encoding: gzip\r\n"
        if etag_matches(request.headers.get("if-none-match", ""), page.etag):
            return Response(304, fields)
        return Response(200, fields, page)

    def _render(self, snapshot, view, zipped) -> Rendered:
        """A page, or its gzip form.  Raises ApiError (503) where too many are unread."""
        if sum(map(len, list(self._in_use.values()))) > PAGES_LIMIT:
            raise unavailable("too many pages are on their way", 5)
        page = Rendered(PageView(self, snapshot, *view).render().encode())
        if zipped:
            page = gzipped([page])
        page.etag = hashlib.sha1(page).hexdigest()
        self._in_use[id(page)] = page
        return page


class PageView:
    """One page while it is rendered: everything of a manifest goes through html.escape."""

    def __init__(self, page, snapshot, url, channel, words, number, all_of_them):
        self.channels, self.snapshot = page.imgapi.channels, snapshot
        self.url, self.channel, self.words, self.number = url, channel, words, number
        self.images = [image for image in reversed(snapshot.images)
                       if (all_of_them or image.public) and page.imgapi.in_channel(image, channel)]
        self.by_uuid = {image.uuid: image for image in self.images}
        self.children = collections.Counter(image.origin for image in self.images)
        # A channel that clients do not get by themselves: a name as in the configuration, or *.
        self.special = channel if channel != page.config.default_channel else None
        self.channel_query = f"?channel={self.special}" if self.special else ""
        self.may_log_in = not all_of_them and page.rights.users is not None

    def render(self) -> str:
        """The page as HTML; a page number above the last one is the last."""
        found = self._filtered()
        last = max(1, -(-len(found) // PAGE_ROWS))
        number = self.number = min(self.number, last)
        rows = found[(number - 1) * PAGE_ROWS:number * PAGE_ROWS]
        listed = f"<ol>{''.join(map(self._row, rows))}</ol>" if rows else self._nothing()
        count = f"{len(found):,} image{'' if len(found) == 1 else 's'}"
        if self.words:
            count += f" of {len(self.images):,}"
        if found:
            count += f", {size_text(sum(image.size for image in found))}"
        if last > 1:
            count += f", page {number} of {last}"
        channels = {**self.channels, "*": {"name": "all channels"}} if self.channels else {}
        tabs = self._nav("Channels", [
            self._link(channel["name"], self.words, current=name == self.channel,
                       title=channel.get("description"), channel=name)
            for name, channel in channels.items()])
        pages = self._nav("Pages", [self._link(each, self.words, each, current=each == number)
                                    for each in range(1, last + 1)])
        host = html.escape(self.url.partition("://")[2])
        source = html.escape(shlex.quote(self.url + self.channel_query))
        hidden = (f'<input type="hidden" name="channel" value="{self.special}">'
                  if self.special else "")
        login = (self._link("Log in for private images", self.words, login="1")
                 if self.may_log_in else "")
        return PAGE_HTML.format(
            style=PAGE_STYLE, script=PAGE_SCRIPT, version=__version__, host=host, source=source,
            tabs=tabs, words=html.escape(self.words), hidden=hidden, count=count, listed=listed,
            pages=pages, login=login)

    def _filtered(self) -> list:
        """The images that have all words of the filter somewhere, in any case."""
        words = self.words.casefold().split()
        if not words:
            return self.images
        texts = self.snapshot.texts
        if texts is None:
            texts = self.snapshot.texts = {image.uuid: " ".join((
                image.name, image.version, image.os, image.type, image.uuid, image.origin or "",
                image.fields().get("description") or "")).casefold()
                for image in self.snapshot.images}
        return [image for image in self.images
                if all(word in texts[image.uuid] for word in words)]

    def _link(self, text, words="", number=1, current=False, title=None, **query) -> str:
        """A link to another view, by default in the same channel; `text` is HTML."""
        query = {"page": number, "q": words, "channel": self.special, **query}
        address = urllib.parse.urlencode({key: value for key, value in query.items() if value})
        attributes = " aria-current=page" if current else ""
        if title:
            attributes += f' title="{html.escape(title)}"'
        return f'<a href="?{html.escape(address)}"{attributes}>{text}</a>'

    def _nav(self, label, links) -> str:
        """Links to choose among, if there are several."""
        return f'<nav aria-label="{label}">{" ".join(links)}</nav>' if len(links) > 1 else ""

    def _nothing(self) -> str:
        text = ("There are no images here yet.</p><p>Publish the first with <code>import-image"
                "</code>, <code>mkimg</code> or <code>scp</code>.")
        if self.images:
            text = (f"Nothing matches <b>{html.escape(self.words)}</b>.</p><p>"
                    + self._link("Show all images"))
        return f'<div class="note"><p>{text}</p></div>'

    def _row(self, image) -> str:
        """One image, in some 500 bytes and its description."""
        fields, uuid, escape = image.fields(), image.uuid, html.escape
        text = fields.get("description") or ""
        if len(text) > PAGE_TEXT:
            text = text[:PAGE_TEXT - 1].rstrip() + "…"
        about = f"<p>{escape(text)}</p>" if text else ""
        meta = [escape(image.os), escape(image.type), size_text(image.size),
                escape(image.order[0][:10])]
        if not image.public:
            meta.append("private")
        if image.origin:
            origin = self.by_uuid.get(image.origin)
            title = (f"{origin.name} {origin.version}" if origin
                     else f"{image.origin}, which is not here")
            meta.append("builds on " + self._link(escape(title), image.origin))
        children = self.children[uuid]
        if children:
            verb = "builds" if children == 1 else "build"
            meta.append(self._link(f"{children:,} {verb} on it", uuid))
        homepage = fields.get("homepage")
        if _URL.mend(homepage):           # http or https
            meta.append(f'<a href="{escape(homepage)}">Homepage</a>')
        meta.append(f'<a href="images/{uuid}{self.channel_query}">Manifest</a>')
        if image.icon:
            icon = f'<img src="images/{uuid}/icon{self.channel_query}" alt="" loading="lazy">'
        else:
            icon = (f'<i class="h{sum(image.name.encode()) % PAGE_HUES}" aria-hidden="true">'
                    f"{escape(image.name[0].upper())}</i>")
        option = f"-C {escape(shlex.quote(self.special))} " if self.special else ""
        return (f"<li>{icon}<div><h2>{escape(image.name)} <b>{escape(image.version)}</b></h2>"
                f'{about}<small>{" · ".join(meta)}</small></div>'
                f"<p><code>imgadm import {option}{uuid}</code></p></li>\n")


QUICK = 0.001                 # seconds: the first bucket, which has nearly all answers from memory
BUCKETS = (QUICK, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 60.0, 600.0)      # seconds until it was sent
IMAGES_NAMED = 100            # images whose downloads have a series of their own


def labels(**texts) -> str:
    """Labels behind the name of a metric in Prometheus' text format 0.0.4."""
    escapes = str.maketrans({"\\": r"\\", '"': r'\"', "\n": r"\n"})
    pairs = (f'{name}="{str(text).translate(escapes)}"' for name, text in texts.items())
    return f"{{{','.join(pairs)}}}"


class Metrics:
    """Counts of this process for Prometheus.

    The event loop alone counts, once for each answer; threads read, and choose the images that
    are named once there are more than IMAGES_NAMED: from then on the loop adds none.
    connections: those of the event loop, which gives them.
    """

    connections = ()

    def __init__(self, store, log, rights):
        self.store, self.log, self.rights = store, log, rights
        self._started = time.time()
        # (pattern, method, status): [bytes sent, bytes received, seconds, answers of each bucket]
        self._rows = {}
        self._files = {"whole": 0, "cut": 0}
        self._uploads = {"stored": 0, "failed": 0}
        # uuid: [title, downloads counted in a series of its own, those in that of all others]
        self._images = {}
        self._named = set()                       # uuids of images that have their own now

    def routes(self):
        return [Route("GET", "metrics", self.answer, THREAD, ANYONE)]

    def count(self, request, response, size, seconds, failure):
        """Count an answer: `size` bytes of its body went out, `seconds` after its request."""
        try:
            row = self._rows[request.route.pattern, request.method, response.status]
        except (AttributeError, KeyError):        # no request, no route; or the first of its kind
            row = self._row(request, response.status)
        row[0] += size
        row[2] += seconds
        if seconds <= QUICK:
            row[3] += 1
        else:
            row[bisect_left(BUCKETS, seconds) + 3] += 1
        if request is not None and request.body is not None:
            row[1] += request.body.received
            if request.body.is_file:
                self._uploads["stored" if response.status < 300 else "failed"] += 1
        if response.title and request.method == "GET":
            self._count_file(request.arguments[0], response, failure)

    def _row(self, request, status) -> list:
        """The row of a kind of answers; unknown methods share one."""
        pattern, method = None, "none"
        if request is not None:
            method = request.method if request.method in METHODS else "other"
            pattern = request.route and request.route.pattern
        return self._rows.setdefault((pattern, method, status),
                                     [0, 0, 0.0] + [0] * (len(BUCKETS) + 1))

    def _count_file(self, uuid, response, failure):
        """Count a file, and a download where it begins at its first byte."""
        self._files["cut" if failure else "whole"] += 1
        if response.offset:
            return
        if len(self._named) < IMAGES_NAMED:
            self._named.add(uuid)
        image = self._images.setdefault(uuid, ["", 0, 0])
        image[0] = response.title
        image[1 if uuid in self._named else 2] += 1

    def answer(self, request):
        """All metrics, each as (name, kind, help, {suffix and labels: value}) at first."""
        metrics = self._of_answers() + self._others(self.rights.lists_all(request))
        text = "".join(f"# HELP {name} {about}\n# TYPE {name} {kind}\n"
                       + "".join(f"{name}{end} {value}\n" for end, value in samples.items())
                       for name, kind, about, samples in metrics)
        return Response(200, b"Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
                        + CACHE_NOTHING, text.encode())

    def _of_answers(self) -> list:
        requests, routes, durations = {}, {}, {}
        for (pattern, method, status), row in list(self._rows.items()):
            route, row = "none" if pattern is None else f"/{pattern}", row[:]
            requests[labels(route=route, method=method, status=status)] = sum(row[3:])
            routes[route] = list(map(operator.add, routes.get(route, [0] * len(row)), row))
        for route, (_, _, seconds, *counts) in routes.items():
            for edge, below in zip((*BUCKETS, "+Inf"), itertools.accumulate(counts)):
                durations["_bucket" + labels(route=route, le=edge)] = below
            durations["_sum" + labels(route=route)] = seconds
            durations["_count" + labels(route=route)] = sum(counts)
        return [
            ("imgserver_http_requests_total", "counter",
             "Requests answered (499: the client had gone).", requests),
            ("imgserver_http_request_duration_seconds", "histogram",
             "Seconds from a request to the last byte of its answer.", durations),
            ("imgserver_http_response_body_bytes_total", "counter", "Bytes of bodies sent.",
             {labels(route=route): row[0] for route, row in routes.items()}),
            ("imgserver_http_request_body_bytes_total", "counter", "Bytes of bodies received.",
             {labels(route=route): row[1] for route, row in routes.items()}),
        ]

    def _others(self, all_of_them) -> list:
        """all_of_them: whether the client may read private images; else none is named."""
        counts = {uuid: image[:] for uuid, image in list(self._images.items())}
        if len(counts) > IMAGES_NAMED:
            # A download stays in the series that it was counted in, so that none goes down.
            self._named = set(sorted(counts, key=lambda uuid: (
                sum(counts[uuid][1:]), uuid in self._named), reverse=True)[:IMAGES_NAMED])
        downloads = {labels(image=uuid, title=title): own for uuid, (title, own, _)
                     in counts.items() if uuid in self._named and all_of_them}
        downloads[labels(image="other", title="")] = sum(
            other if all_of_them else own + other for _, own, other in counts.values())
        images = {}
        with contextlib.suppress(OSError):        # serve_dir cannot be read: the others still can
            images = self.store.count_states()
        states = collections.Counter(connection.state for connection in list(self.connections))
        levels = dict(self.log.counts)
        if self.log.level <= INFO:        # the lines of answers are counted as such alone
            levels["info"] += sum(sum(row[3:]) for row in list(self._rows.values()))
        python = "%d.%d.%d" % sys.version_info[:3]
        return [
            ("imgserver_downloads_total", "counter", "Downloads of image files from their first "
             f"byte on; those of the {IMAGES_NAMED} images downloaded most by image.", downloads),
            ("imgserver_files_sent_total", "counter", "Answers with an image file, or a range.",
             {labels(result=result): count for result, count in self._files.items()}),
            ("imgserver_uploads_total", "counter", "Image files uploaded over HTTP.",
             {labels(result=result): count for result, count in self._uploads.items()}),
            ("imgserver_images", "gauge", "Images in serve_dir; left_out: not shown, see the log.",
             {labels(state=state): count for state, count in images.items()}),
            ("imgserver_connections", "gauge", "Open connections.",
             {labels(state=state): states[state] for state in OPEN_STATES}),
            ("imgserver_log_lines_total", "counter", "Lines logged.",
             {labels(level=level): count for level, count in levels.items()}),
            ("imgserver_failed_logins_total", "counter", "Names and passwords that did not fit.",
             {"": self.rights.users.failed if self.rights.users else 0}),
            ("process_start_time_seconds", "gauge", "Its start, in seconds since 1970.",
             {"": self._started}),
            ("imgserver_build_info", "gauge", "Always 1.",
             {labels(version=__version__, python=python): 1}),
        ]


class Site:
    """The table of routes over one store, and the routes of no API.  Tests give more `routes`."""

    def __init__(self, config, store, log, routes=()):
        self.config, self.store, self.log = config, store, log
        self.rights = Rights(config, log)
        self.metrics = Metrics(store, log, self.rights) if config.metrics else None
        dsapi, imgapi = Dsapi(config, store, self.rights), Imgapi(config, store, self.rights)
        if self.rights.publishing:
            if not os.access(config.serve_dir, os.W_OK | os.X_OK):
                log.warn("nothing can be published over HTTP: serve_dir cannot be written")
            routes = [*routes, *ImgapiPublishing(config, store, imgapi, self.rights).routes()]
        self.table = {}                   # pattern: {method: Route}
        for route in (Route("GET", "ping", self.ping, MEMORY, ANYONE), *dsapi.routes(),
                      *imgapi.routes(), *Page(config, store, dsapi, imgapi).routes(), *routes,
                      *(self.metrics.routes() if self.metrics else ())):
            self.table.setdefault(route.pattern, {})[route.method] = route

    def answer(self, request) -> Response:
        """The Response to a Request, also where it is refused.

        Raises NeedsThread in the event loop; then it is called again in a thread.
        """
        try:
            if self.rights.identifies_readers and request.method != "OPTIONS":
                self.rights.admit(request)
            route = request.route or self._find(request)
            if route.flags and not request.may_block:
                raise NeedsThread
            response = route.handler(request, *request.arguments)
        except ApiError as error:
            response = error_response(error)
            if error.status >= 500 and isinstance(error.__cause__, OSError):
                target = printable(without_credentials(request.target))
                path = error.__cause__.filename or self.config.serve_dir
                self.log.error(f"cannot answer {target}: {printable(f'{error} ({path})')}")
            if self.rights.hides:         # it may say that an image is not there
                request.audience = CLIENT
        except OSError as error:
            target = printable(without_credentials(request.target))
            self.log.error(f"cannot answer {target} from serve_dir "
                           f"{printable(self.config.serve_dir)}: {error.strerror}")
            response = error_response(unavailable("the image directory cannot be read", 10))
        if request.audience != EVERYBODY:
            self._restrict(request, response)
        return response

    def _restrict(self, request, response):
        """Restrict the caching of an answer to its audience.

        Scripts of other sites may not read it where the right is that of an address.
        """
        fields, count = re.subn(rb"(?m)^Vary: ([^\r]*)", rb"Vary: \1, Authorization",
                                response.fields)
        if not count:
            fields += b"Vary: Authorization\r\n"
        if request.audience == CLIENT:
            fields = re.sub(rb"(?m)^Cache-Control: .*\n", b"", fields) + CACHE_NOTHING
            if request.user is None and (request.right or ANYONE) > self.rights.least:
                fields = fields.replace(CORS, b"")
        response.fields = fields

    def _find(self, request) -> Route:
        """The row for a request; stored there, with its arguments.  Raises ApiError."""
        segments = request.segments
        request.arguments = segments[1:2]
        if len(segments) == 1:
            pattern = segments[0] if "/" not in segments[0] else None     # /images%2F:uuid
        elif not is_uuid(segments[1]):
            pattern = None
        elif len(segments) == 2:
            pattern = segments[0] + "/:uuid"
        elif segments[0] == "datasets" and len(segments) == 3:
            pattern = "datasets/:uuid/:file"
            request.arguments = segments[1:]
        else:
            pattern = f"{segments[0]}/:uuid/{'/'.join(segments[2:])}"
        rows, method = self.table.get(pattern, NO_ROWS), request.method
        route = rows.get("GET" if method == "HEAD" else method)
        if request.length != 0:
            self._check_body(request, route)
        if not rows:
            hint = (": metrics are off, until metrics of the configuration is true"
                    if pattern == "metrics" else "")
            raise not_found(f"{request.target} does not exist{hint}")
        if route is None:
            route = self._other_method(request, rows)
        if route.right > ANYONE:
            self._authorise(request, route)
        request.route = route
        return route

    def _other_method(self, request, rows) -> Route:
        """The row for OPTIONS.  Raises ApiError for a method that the path does not have."""
        methods = sorted(set(rows) | ({"HEAD"} if "GET" in rows else set()) | {"OPTIONS"})
        allow = ", ".join(methods)
        if request.method == "OPTIONS":
            request.arguments = [allow]
            pattern = next(iter(rows.values())).pattern
            return Route("OPTIONS", pattern, self.options, MEMORY, ANYONE)
        if request.method not in METHODS:
            raise ApiError(501, "NotImplemented", "the method is not known here")
        hint = ("" if self.rights.publishing or request.segments[0] != "images" else
                ": publishing over HTTP is off, until users, publish_from or manage_from of the "
                "configuration says who may")
        raise ApiError(405, "MethodNotAllowedError", f"{request.method} is not allowed{hint}",
                       fields=header_line("Allow", allow))

    def _authorise(self, request, route):
        """Refuse a client without the right for a route, and web pages of other sites.

        A page may make a browser ask anything, with the address and login of its user; but a
        browser tells where the page is from (Origin, Fetch Metadata).  A name without TLS says
        nothing: a page's owner may let its own name lead here (DNS rebinding).  Raises
        ApiError (403).
        """
        headers = request.headers
        scheme, _, host = headers.get("origin", "").lower().partition("://")
        if request.method not in ("GET", "HEAD") and (
                headers.get("sec-fetch-site") == "cross-site" or "origin" in headers and (
                    host != request.host.lower()
                    or scheme != "https" and not _ADDRESS.match(host))):
            raise ApiError(403, "OperatorOnly", "pages of other sites may change nothing here")
        self.rights.need(request, route.right)

    @staticmethod
    def _check_body(request, route):
        """Refuse a body of a kind that is not taken there.  Raises ApiError."""
        hint = route is None and request.segments[0] == "images"      # 405 says how to publish
        if request.length is None and not hint and (
                route is None or route.flags & CHUNKED != CHUNKED):
            raise ApiError(411, "LengthRequired", "a body needs a Content-Length here")
        if request.method in ("GET", "HEAD", "OPTIONS"):
            raise bad_request(f"a {request.method} has no body here")

    def log_hidden(self):
        """Log how many images strangers do not see: builders write `public: false` by default."""
        try:
            images = self.store.snapshot(IMGAPI, True).images
        except OSError:                   # the first request meets it, too
            return
        hidden = {image.uuid for image in images
                  if self.config.read == "users" or not image.public}
        cut_off = sum(image.origin in hidden and image.uuid not in hidden for image in images)
        self.log.info(f'read is "{self.config.read}": {len(hidden)} of {len(images)} images are '
                      "hidden from strangers" + (f", who cannot import {cut_off} that build on "
                                                 "them" if cut_off else ""))

    def options(self, request, allow):
        """The methods of a path; scripts of other sites may read, and no more (CORS)."""
        headers = request.headers.get("access-control-request-headers", "")
        fields = (header_line("Allow", allow) + CORS
                  + b"Access-Control-Allow-Methods: GET, HEAD, OPTIONS\r\n")
        if re.fullmatch(r"[A-Za-z0-9, -]{1,500}", headers):
            fields += header_line("Access-Control-Allow-Headers", headers)
        return Response(204, fields)

    def ping(self, request):
        """GET /ping of both APIs; ?error=NAME is answered by a sample of that error."""
        if request.query:
            query = parse_query(request.query)
            if "error" in query:
                name = single_value(query, "error") or "Internal"
                name = name[:-len("Error")] if name.endswith("Error") else name
                if name not in PING_ERRORS:
                    raise invalid("error", f"unknown error: {name}Error", "Missing")
                raise ApiError(*PING_ERRORS[name])
        return json_response({"ping": "pong", "version": __version__, "imgapi": True,
                              "dsapi": True})


# -- connections -------------------------------------------------------------------------
#
# A connection does not own a thread.  One owner at a time uses its socket: the event loop, a
# worker that reads a body, or a sender of files.  States, each with a deadline:
#
#   READING    the event loop waits for a request, and answers it from memory
#   SENDING    the event loop sends an answer from memory that the socket did not take at once
#   WORKING    a worker thread answers a request that may wait for a disk, or has a body
#   STREAMING  a sender sends a file
#   LINGERING  the last answer is sent; a client that still sends gets the time to read it
#   CLOSED
#
#   READING -> SENDING -> READING              a long list
#   READING -> WORKING -> READING              an answer made in a thread
#   READING -> WORKING -> STREAMING -> READING a file
#   READING -> LINGERING -> CLOSED             a refusal, or the end; each state may end CLOSED
#
# Only the event loop changes a state or closes a socket; it has no socket in its selector that a
# worker or a sender owns.  Answers of one turn of the loop go out together at its end: the
# clients of the first ones are not woken in between, which costs as much as answering (virtual
# machines most).

RECEIVE = 16 << 10            # bytes asked of a socket at once: many whole requests
RECEIVE_BODY = 256 << 10      # bytes of a body asked of a socket at once
ONE_PIECE = 64 << 10          # bytes; answers up to this size are copied together
PARTS = 64                    # parts of answers given to one sendmsg; POSIX allows 16 at least
LOOP_SEND = 2 << 20           # bytes of a kept list that the event loop tries to send at first
LOOP_STEP = 512 << 10         # bytes, once the socket was full: larger ones leave the caches
TURN = 8 << 20                # bytes sent in such steps in one turn of the loop, about 3 ms
FILE_STEP = 256 << 10         # bytes of a file sent at first, so that the client can begin early
FULL_STEP = 512 << 10         # bytes, once the socket was full: then fewer steps cost less
FILE_STEPS = 8                # such steps while the socket takes them, before others get theirs
COPY_STEP = 256 << 10         # bytes copied at once where sendfile is unsupported
LINGER = 2.0                  # seconds after its last byte that a refused client gets to read why
GONE = 499                    # status in the log of a request whose client went away (as nginx)
TICK = 1.0                    # seconds between two checks of deadlines
HANG = 1.0                    # seconds of one step after which a disk hangs, and others go on
SENDERS = 4                   # senders of files: with more threads, downloads get no faster
SENDER_THREADS = 32           # threads of all senders, each but the first of one on a hung disk

READING, SENDING, WORKING, STREAMING, LINGERING = OPEN_STATES = (
    "reading", "sending", "working", "streaming", "lingering")
CLOSED = "closed"

STATUS_LINES = {int(status): b"HTTP/1.1 %d %b\r\nServer: imgserver/%b\r\nDate: " % (
    status, status.phrase.encode(), __version__.encode()) for status in http.HTTPStatus}

# Errors of sendfile for a socket or file that it does not support (illumos, old kernels).
_NO_SENDFILE = frozenset((errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EAFNOSUPPORT,
                          errno.ENOSYS, errno.ENOTSOCK))
# Those of a file that no socket has.
_DISK_ERRORS = frozenset((errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV))


class FileFailed(Exception):
    """The file ended before the Content-Length that was announced, or cannot be read."""


class ListReader:
    """A Listing on its way to one client: a position, and no bytes."""

    __slots__ = ("_listing", "_number", "_offset")

    def __init__(self, listing):
        self._listing, self._number, self._offset = listing, 0, 0

    def parts(self, budget) -> list:
        """The next parts, of about `budget` bytes; fewer where they must be rendered."""
        return self._listing.parts(self._number, self._offset, budget)

    def advance(self, parts, count):
        """`count` bytes of `parts`, which parts() has given, were sent."""
        for part in parts:
            sent = min(count, len(part))
            count -= sent
            self._offset += sent
            if self._offset < len(part.obj):      # part.obj is the whole piece
                return
            self._number, self._offset = self._number + 1, 0

    @property
    def done(self) -> bool:
        return self._number == len(self._listing)


class Transport:
    """Bytes from and to one socket that does not block.

    It keeps exactly the parts that the socket did not take.  sent counts bytes.
    """

    __slots__ = ("sock", "unsent", "unsent_bytes", "has_list", "sent", "by_kernel")

    def __init__(self, sock):
        self.sock = sock
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX:     # else it polls as full until it is nearly empty
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, COPY_STEP)
        self.unsent, self.unsent_bytes, self.sent = (), 0, 0      # a list once there are parts
        self.has_list = False
        # os.sendfile is for TCP only: illumos refuses AF_UNIX, and CPython up to 3.13 may
        # report a made-up count for that (gh-154324); 3.9.0 loses counts (bpo-42237).
        self.by_kernel = (hasattr(os, "sendfile") and sys.version_info >= (3, 9, 1)
                          and sock.family in (socket.AF_INET, socket.AF_INET6))

    def receive(self, size):
        """Up to `size` bytes; b"" at the end, also where it was reset; None: none have come."""
        try:
            return self.sock.recv(size)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def queue(self, part, length):
        """Queue `part` (bytes or a Listing) of `length` bytes for the next flush."""
        if type(part) is Listing:
            part, self.has_list = ListReader(part), True
        if self.unsent:
            self.unsent.append(part)
        else:
            self.unsent = [part]
        self.unsent_bytes += length

    def flush(self, step, flags=0) -> bool:
        """Send as much as the socket takes, of each part about `step` bytes.

        Returns whether nothing is left.  Raises OSError where the client has gone.
        """
        unsent, size = self.unsent, self.unsent_bytes
        try:
            if size <= ONE_PIECE and not self.has_list:
                if len(unsent) > 1:
                    self.unsent = unsent = [b"".join(unsent)]
                count = self.sock.send(unsent[0], flags)
                parts = [unsent[0]] if count < size else ()
            else:
                parts = self._gather(step)
                count = self.sock.sendmsg(parts, (), flags)
        except BlockingIOError:
            return False
        self.sent += count
        if count == size:
            self.unsent, self.unsent_bytes, self.has_list = (), 0, False
            return True
        self.unsent_bytes = size - count
        while count:
            if type(unsent[0]) is ListReader:
                unsent[0].advance(parts, count)
                if unsent[0].done:
                    unsent.pop(0)
                break                     # nothing behind a list was gathered
            size = len(unsent[0])
            if count < size:
                unsent[0] = memoryview(unsent[0])[count:]
                break
            count -= size
            del unsent[0], parts[0]
        return False

    def _gather(self, step):
        """Parts for one sendmsg: up to the end of the first list, or of a long part."""
        parts = []
        for part in self.unsent[:PARTS // 2]:
            if type(part) is ListReader:
                parts += part.parts(step)
                break
            parts.append(memoryview(part)[:step])
            if len(part) > step:
                break
        return parts

    def send_file(self, fd, offset, count) -> int:
        """Send up to `count` bytes of a file; returns how many, 0 where the socket is full.

        Raises FileFailed, and OSError where the client has gone.  An error of sendfile means that
        this call sent nothing: copying goes on from `offset`.
        """
        try:
            if self.by_kernel:
                sent = os.sendfile(self.sock.fileno(), fd, offset, count)
            else:
                data = os.pread(fd, count, offset)
                sent = self.sock.send(data) if data else 0
        except BlockingIOError:
            return 0
        except OSError as error:
            if self.by_kernel and error.errno in _NO_SENDFILE:
                self.by_kernel = False
                return self.send_file(fd, offset, count)
            if error.errno in _DISK_ERRORS:
                raise FileFailed(f"the file cannot be read at {offset} bytes: {error.strerror}")
            raise
        if not 0 < sent <= count:
            raise FileFailed(f"the file is truncated at {offset} bytes (sent {sent})")
        self.sent += sent
        return sent

    def wait(self, event, timeout) -> bool:
        """In a thread: wait for POLLIN or POLLOUT; False where `timeout` seconds passed."""
        poll = select.poll()
        poll.register(self.sock, event)
        return bool(poll.poll(timeout * 1000))

    def end_sending(self):
        """Half-close: the client reads to the end, and may still be sending."""
        self.sock.shutdown(socket.SHUT_WR)

    def hang_up(self):
        """Shut the socket down, so that the next call of the thread that uses it fails."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass                          # the client was faster


class Body:
    """The body of a request, for the worker thread that answers it.

    First come the bytes that came with the head, then those of the socket.  `100 Continue` is
    sent at the first read, so that every refusal that needs no body comes before it.  rest:
    bytes read that belong to the next request.
    """

    def __init__(self, transport, rest, request, stall_timeout):
        self._transport, self.rest = transport, rest
        self._left = request.length           # of the body or the chunk; None: before a chunk
        self._chunked = request.length is None
        self._stall_timeout = stall_timeout
        self._asked = "expect" not in request.headers or request.is_1_0
        self.received, self.is_file = 0, False        # is_file: an image file is uploaded
        self.finished = request.length == 0

    def read(self, size) -> bytes:
        """Up to `size` bytes, as they come; b"" at the end.

        Raises ClientGone, and ApiError (400) where a chunked body breaks RFC 9112 §7.1, (408)
        where nothing came for stall_timeout.
        """
        if self.finished:
            return b""
        if self._left is None:
            self._begin_chunk()
            if self.finished:
                return b""
        data = self._take(min(size, self._left))
        self._left -= len(data)
        self.received += len(data)
        if not self._left:
            if self._chunked:
                self._expect_line_end()
                self._left = None
            else:
                self.finished = True
        return data

    def _take(self, size):
        """Up to `size` bytes, one at least."""
        if not self.rest:
            self.rest = self._receive(max(size, RECEIVE) if self._chunked else size)
        data, self.rest = self.rest[:size], self.rest[size:]
        return data

    def _receive(self, size):
        """The bytes that have come by now, or come next."""
        transport = self._transport
        if not self._asked:
            self._asked = True
            transport.queue(b"HTTP/1.1 100 Continue\r\n\r\n", 25)
        try:                              # earlier answers, too: the client may wait for them
            while transport.unsent and not transport.flush(ONE_PIECE):
                self._wait(select.POLLOUT)
        except OSError as error:
            raise ClientGone(f"the client went away: {error.strerror}")
        while True:
            data = transport.receive(min(size, RECEIVE_BODY))
            if data:
                return data
            if data is not None:
                raise ClientGone("the client went away before the end of the body: "
                                 f"{self.received} bytes came")
            self._wait(select.POLLIN)

    def _wait(self, event):
        if not self._transport.wait(event, self._stall_timeout):
            raise ApiError(408, "RequestTimeout", "the body stopped coming: nothing for "
                           f"{self._stall_timeout} s after {self.received} bytes")

    def _line(self):
        """The next line of the chunked coding, of which no valid one is long."""
        while b"\n" not in self.rest and len(self.rest) < 20:
            self.rest += self._receive(RECEIVE)
        line, end, self.rest = self.rest.partition(b"\n")
        if not end or not line.endswith(b"\r"):
            raise bad_request("the chunked body is not well formed")
        return line[:-1]

    def _begin_chunk(self):
        """Read a chunk's size.  Extensions and trailers, which no client sends, are refused."""
        line = self._line()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,16}", line):
            raise bad_request("the size of a chunk is not a hexadecimal number")
        self._left = int(line, 16)
        if not self._left:
            self._expect_line_end()
            self.finished = True

    def _expect_line_end(self):
        if self._line():
            raise bad_request("a chunk does not end where its size says")


class Connection:
    """One client: its socket, its state, and the request that is being answered."""

    __slots__ = ("transport", "loop", "peer", "state", "deadline", "buffer", "request", "line",
                 "response", "position", "step", "started", "answered", "partial", "scanned",
                 "unread", "closing", "unlogged", "failure")

    def __init__(self, sock, peer, loop):
        self.transport, self.loop = Transport(sock), loop
        self.peer = peer                  # the client's address; "" on a Unix socket
        self.state = READING
        self.deadline = loop.now + loop.config.header_timeout
        self.buffer = b""                 # bytes that came and are not parsed yet
        self.request = None               # the Request that is being answered
        self.line = ""                    # its first line, also where it is no Request
        self.response = None              # the Response of which the file is being sent
        self.position = self.step = 0     # of that file, in bytes
        self.started = loop.now           # when the request being answered began (monotonic)
        self.answered = 0                 # requests so far
        self.partial = False              # a request has begun, and is not whole yet
        self.scanned = 0                  # bytes of it in which no head ends
        self.unread = False               # the client may still send bytes that are not read
        self.closing = False              # this answer is the last one
        # (number of the byte behind it, line, request, response, bytes of its body, started) of
        # each answer that the socket has not taken whole
        self.unlogged = ()
        self.failure = ""                 # why an answer was not sent whole, for the log

    # in the event loop: requests

    def ready(self):
        """The socket takes more bytes, or some have come, or the client has gone."""
        if self.state is SENDING:
            self.flush()
            return
        data = self.transport.receive(RECEIVE)
        if data is None:
            return
        if not data:
            self.close()
        elif self.state is READING:
            self.buffer = self.buffer + data if self.buffer else data
            self.advance()
        else:                             # LINGERING: it has not stopped sending yet
            self.deadline = min(self.loop.now + LINGER,
                                self.started + self.loop.config.header_timeout)

    def advance(self):
        """Answer the whole requests in the buffer, until one needs a thread, or there is
        enough to send first: a client that never reads must not fill the memory.
        """
        while (self.buffer and self.state is READING
               and self.transport.unsent_bytes <= ONE_PIECE and self._answer_next()):
            pass

    def _answer_next(self):
        """Answer one request.  Returns whether it was answered and the next may be."""
        self.started = self.loop.now
        try:
            if not self._parse():
                return False
            response = self.loop.site.answer(self.request)
        except NeedsThread:
            self._work()
            return False
        except ApiError as error:
            return self.refuse(error)
        except Exception:
            response = self._fault()
        return self.put(response)

    def refuse(self, error):
        """Answer an error in place of a request: the last answer of this connection."""
        self.request = None
        self.closing = self.unread = True
        return self.put(error_response(error))

    def _parse(self):
        """Make the request at the head of the buffer.  Returns whether it is all there.

        Raises ApiError for bytes that are no request; the connection must end then.
        """
        self.request = None
        if self.buffer[0] in b"\r\n":
            self.buffer = self.buffer.lstrip(b"\r\n")     # RFC 9112 §2.2
        # Of an incomplete one, only the new bytes are searched for its end: matching all of it
        # again for each byte of a slow client would cost it little and us much.
        text, match = self.buffer.decode("latin-1"), None
        if not self.partial or _HEAD_END.search(text, self.scanned):
            match = _HEAD.match(text)
        if match is None:
            self._wait_for_more(text)
            return False
        end = match.end()
        line = match[1]
        self.line = without_credentials(line) if "@" in line else line
        if end > HEAD_LINE_LIMIT:
            check_size(text[:end])
        self.buffer = self.buffer[end:]
        self.partial = False
        self.request = request = parse_request(match)
        request.peer = self.peer
        if request.host is None:
            request.host = self.loop.own_host(self.transport.sock)
        if not request.keep_alive or self.loop.draining:
            self.closing = True
        return True

    def _wait_for_more(self, text):
        """No whole request is there.  Raises ApiError where there will be none."""
        if not text:
            return
        if self.partial and text.find("\n", self.scanned) < 0:
            has_line = text.find("\n", 0, HEAD_LINE_LIMIT + 1) >= 0
            if len(text) <= (HEAD_LIMIT if has_line else HEAD_LINE_LIMIT):
                return                    # nothing that could be judged is new
        self.line = without_credentials(text[:HEAD_LINE_LIMIT].partition("\n")[0].rstrip("\r"))
        explain_head(text)
        self.scanned = max(0, len(text) - 2)
        if not self.partial:
            self.partial = True
            if self.answered:             # the first one's time began with the connection
                self.deadline = self.loop.now + self.loop.config.header_timeout

    def _fault(self):
        """The answer after an internal error."""
        self.loop.log.exception("internal error")
        self.closing = True
        return error_response(ApiError(500, "InternalError", "internal error"))

    # in the event loop: answers

    def _head(self, response) -> bytes:
        status, request = response.status, self.request
        if request is not None and request.length != 0 and (
                request.body is None or not request.body.finished):
            self.closing = self.unread = True     # the rest is never taken for a request
        framing = b"" if status in (204, 304) else b"Content-Length: %d\r\n" % response.length
        if self.closing:
            framing += b"Connection: close\r\n"
        elif request.is_1_0:
            framing += b"Connection: keep-alive\r\n"
        return b"%b%b\r\n%b%b\r\n" % (STATUS_LINES[status], self.loop.date,
                                       response.fields, framing)

    @property
    def _wants_body(self):
        return self.request.method != "HEAD" if self.request is not None \
            else not self.line.startswith("HEAD ")

    def put(self, response):
        """Queue a response for the end of this turn; a file of it is left to a sender.

        Returns whether the connection goes on after it.
        """
        transport = self.transport
        if not transport.unsent:
            self.loop.outbox.append(self)
        data, body, size = self._head(response), b"", 0
        end = transport.sent + transport.unsent_bytes + len(data)
        if response.length and self._wants_body:
            body, size = response.body, response.length
            end += size
            if type(body) is bytes and len(body) <= ONE_PIECE:        # b"" where it is a file
                data += body
                body = b""
        transport.queue(data, len(data))
        if body:
            transport.queue(body, size)
        self.answered += 1
        self.unlogged += ((end, self.line, self.request, response, size, self.started),)
        return not self.closing

    def flush(self):
        """Send as much of the queue as the socket takes; go on once it takes more."""
        loop = self.loop
        try:
            done = self.transport.flush(LOOP_SEND if self.state is READING else loop.share)
        except OSError as error:
            self._give_up(f"the client went away: {error.strerror}")
            return
        if done:
            self._log_answers()
            if self.state is SENDING:
                self.state = READING
                loop.selector.modify(self.transport.sock, selectors.EVENT_READ, self)
            self._after_answer()
        else:
            self._await_progress()
            if self.state is READING:
                self.state = SENDING
                loop.selector.modify(self.transport.sock, selectors.EVENT_WRITE, self)

    def _await_progress(self):
        """The client has stall_timeout from now to take more."""
        self.deadline = time.monotonic() + self.loop.config.stall_timeout

    def _give_up(self, reason):
        """End a connection of which not all answers were sent."""
        self.failure = f" ({reason})"
        self._log_answers()
        self.close()

    def _after_answer(self):
        """All requests so far are answered: go on, or end."""
        if self.closing:
            self._close_or_linger()
            return
        config = self.loop.config
        self.deadline = self.loop.now + (config.header_timeout if self.partial
                                         else config.idle_timeout)
        if self.buffer and not self.partial:
            self.advance()

    # threads

    def _work(self):
        """READING to WORKING: a worker answers."""
        loop = self.loop
        try:                              # earlier answers need not wait for this one
            if self.transport.unsent and self.transport.flush(LOOP_SEND):
                self._log_answers()
        except OSError as error:
            self._give_up(f"the client went away: {error.strerror}")
            return
        loop.selector.unregister(self.transport.sock)
        self.state, self.deadline = WORKING, math.inf
        try:
            # Lists wait for each other, other requests never for lists.
            workers = loop.list_workers if len(self.request.segments) == 1 else loop.workers
            workers.submit(self._answer_in_thread, self.request.length == 0)
        except (RuntimeError, MemoryError):       # can't start new thread
            self._read_on()
            loop.tell_to_come_back(self, "no thread to answer with")

    def _answer_in_thread(self):
        """In a worker: make the answer, and give the connection back to the event loop."""
        request = self.request
        request.may_block = True
        response = None
        try:
            request.body = Body(self.transport, self.buffer, request,
                                self.loop.config.stall_timeout)
            response = self.loop.site.answer(request)
            if response.file is not None and (not self._wants_body
                                              or response.length <= ONE_PIECE):
                response = self._read_small(response)
        except ClientGone as error:
            response, self.failure = None, f" ({error})"
        except Exception:
            if response is not None:
                response.close()
            response = self._fault()
        finally:
            self.loop.give_back(self, lambda: self.take_back(response))

    def _read_small(self, response) -> Response:
        """A response with a small file, or one that is not to be sent, as bytes."""
        try:
            if self._wants_body:
                response.body = os.pread(response.file, response.length, response.offset)
                if len(response.body) != response.length:
                    raise OSError(errno.EIO, f"truncated at {len(response.body)} bytes")
        except OSError as error:
            self.loop.log.error(f"{printable(self.line)}: the file cannot be read: "
                                f"{error.strerror}")
            return error_response(unavailable("the image directory cannot be read", 10))
        finally:
            response.close()
        return response

    def take_back(self, response):
        """WORKING to READING, or to STREAMING where the answer is a file."""
        if self.request.body is not None:
            self.buffer = self.request.body.rest
        if response is None:              # the client is gone
            self.unlogged += ((math.inf, self.line, self.request, Response(GONE), 0,
                               self.started),)
            self._log_answers()
            self.close()
            return
        self.response = response          # close() closes its file
        self.put(response)
        if response.file is None:
            self.response = None
            self._read_on()
            self.loop.outbox.append(self)         # also where older answers are queued
            return
        self.state = STREAMING
        self.position, self.step = response.offset, FILE_STEP
        self._await_progress()
        try:
            self.loop.stream(self)
        except (RuntimeError, MemoryError):
            self._give_up("no thread to send it with")

    def send_more(self) -> bool:
        """In a sender: send the queue, then a part of the file; True: all is sent, or it failed.

        A failure closes the connection, so that no client takes a part for the whole.
        """
        response, transport = self.response, self.transport
        if self.failure:                  # its time is over
            return True
        try:
            if transport.unsent_bytes and not transport.flush(
                    FILE_STEP, getattr(socket, "MSG_MORE", 0)):   # no half packet yet (Linux)
                return False
            end = response.offset + response.length
            for _ in range(FILE_STEPS):
                want = min(self.step if transport.by_kernel else COPY_STEP, end - self.position)
                sent = transport.send_file(response.file, self.position, want)
                self.position += sent
                if sent < want or self.position == end:
                    break
        except FileFailed as error:
            self.loop.log.error(f"{printable(self.line)}: {error}")
            self.failure = " (cut: the file cannot be read)"
            return True
        except OSError as error:
            self.failure = self.failure or f" (the client went away: {error.strerror})"
            return True
        if sent < want:
            self.step = FULL_STEP
        self._await_progress()
        return self.position == end

    def _read_on(self):
        """To READING, of a connection that a thread had."""
        self.state = READING
        self.loop.selector.register(self.transport.sock, selectors.EVENT_READ, self)

    def end_of_file(self):
        """STREAMING to READING: a sender has sent the file, or failed."""
        self.response.close()
        self.response = None
        self._log_answers()
        if self.failure:
            self.close()
            return
        self._read_on()
        self._after_answer()

    # time limits and the end

    def check_deadline(self, now):
        """End a connection whose deadline has passed."""
        if now < self.deadline:
            return
        stalled = f"cut: the client has taken nothing for {self.loop.config.stall_timeout} s"
        if self.state is SENDING:
            self._give_up(stalled)
        elif self.state is STREAMING:
            self.failure = f" ({stalled})"
            self.deadline = math.inf
            self.transport.hang_up()              # which wakes the sender with an error
        elif self.state is READING and self.partial:
            self.partial = False
            self.started = time.monotonic()
            self.refuse(ApiError(408, "RequestTimeout", "the request has not come to its end"))
        else:
            self.close()

    def _close_or_linger(self):
        """READING to CLOSED, by way of LINGERING where the client may still be sending.

        Closing a socket with unread bytes resets it, and the client would lose the
        answer that it was just sent (imgadm: "write EPIPE").
        """
        try:                              # bytes that came while the answer was sent
            waits = self.unread or self.buffer or self.transport.sock.recv(1, socket.MSG_PEEK)
        except OSError:
            waits = False
        if not waits:
            self.close()
            return
        self.state, self.buffer = LINGERING, b""
        self.started, self.deadline = self.loop.now, self.loop.now + LINGER
        try:
            self.transport.end_sending()
        except OSError:                   # it has gone already
            self.close()

    def close(self):
        """Any state to CLOSED; not while a thread uses the socket."""
        self.state = CLOSED
        if self.response is not None:
            self.response.close()
        self.loop.forget(self)
        self.transport.sock.close()

    # log

    def _log_answers(self):
        """A line for each answer: client, request, status, bytes, time, user, agent, image.

        It is written once the answer is sent, or has failed, with the bytes that were sent.
        """
        log, metrics, unlogged = self.loop.log, self.loop.metrics, self.unlogged
        self.unlogged = ()
        if log.level > INFO and metrics is None:
            return
        now, sent = time.monotonic(), self.transport.sent
        for end, line, request, response, size, started in unlogged:
            failure, seconds = "", now - started
            if end > sent:
                failure, size = self.failure, max(0, size - end + sent)
            if metrics is not None:
                metrics.count(request, response, size, seconds, failure)
                if log.level > INFO:
                    continue
            user, headers = (None, {}) if request is None else (request.user, request.headers)
            if response.status >= 400 and not failure:
                failure = self._reason(line, response)
            log.request(self.peer or client_name("", headers), user, line,
                        headers.get("user-agent", ""), response.status, size, seconds,
                        response.title, failure)

    @staticmethod
    def _reason(line, response) -> str:
        """Why a request was refused, for the log; "" where it would have changed nothing."""
        reason = getattr(response, "reason", "")
        if not reason or line.startswith(("GET ", "HEAD ", "OPTIONS ")):
            return ""
        return printable(without_credentials(f" ({reason})"))


class Wakeup:
    """Makes a selector that has it return, from any thread or signal handler."""

    def __init__(self):
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        return self._reader.fileno()

    def send(self):
        with contextlib.suppress(OSError):        # full: it will wake; closed: it has ended
            self._writer.send(b"\0")

    def clear(self):
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)


class Sender:
    """Sends files to many clients, each as fast as it reads, in a thread of its own.

    A step that hangs on a disk delays that client alone: replace_hung() starts another thread
    for the others, and the hung one ends after its step.
    """

    def __init__(self, loop):
        self._loop = loop
        self._selector = selectors.DefaultSelector()
        self._wakeup = Wakeup()
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._arrivals = collections.deque()
        self._lock = threading.Lock()     # for the attributes below
        self._number = 0                  # of the thread that is in charge; 0: none yet
        self._current = None              # the connection of its step
        self._began = math.inf            # when that step began (monotonic)
        self.count = 0                    # connections that it has
        self.threads = 0                  # one, and one for each hung step

    def add(self, connection):
        """Take over a connection in STREAMING.  Raises RuntimeError where no thread starts."""
        with self._lock:
            if not self._number:
                start_new_thread(self._run, (1,))
                self._number = self.threads = 1
            self.count += 1
        self._arrivals.append(connection)
        self._wakeup.send()

    def _run(self, number):
        """Send until another thread is in charge."""
        checked = time.monotonic()
        while True:
            events = self._selector.select(TICK if self.count else None)
            ready = {key.data for key, _ in events}
            if time.monotonic() - checked >= TICK:    # a hang-up wakes epoll, perhaps no other
                checked = time.monotonic()
                ready |= {key.data for key in self._selector.get_map().values()
                          if key.data is not None and key.data.failure}
            for connection in ready:
                if connection is None:
                    self._arrive()
                elif not self._step(connection, number):
                    return

    def _arrive(self):
        """Wait for the sockets of new connections, too."""
        self._wakeup.clear()
        while self._arrivals:
            connection = self._arrivals.popleft()
            try:
                self._selector.register(connection.transport.sock, selectors.EVENT_WRITE,
                                        connection)
            except OSError as error:      # the system is short of something
                connection.failure = f" (cut: {error.strerror})"
                with self._lock:
                    self.count -= 1
                self._loop.give_back(connection, connection.end_of_file)

    def _step(self, connection, number) -> bool:
        """One step of one connection.  Returns whether this thread is still in charge."""
        with self._lock:
            if self._number != number:
                return False
            self._current, self._began = connection, time.monotonic()
        try:
            done = connection.send_more()
        except Exception as error:
            self._loop.log.exception("internal error")
            connection.failure, done = f" (cut: {type(error).__name__})", True
        with self._lock:
            replaced = self._number != number
            self.count -= done
            self.threads -= replaced
            if not replaced:
                self._began = math.inf
                if done:
                    self._selector.unregister(connection.transport.sock)
        if done:
            self._loop.give_back(connection, connection.end_of_file)
        elif replaced:
            self._arrivals.append(connection)
            self._wakeup.send()
        return not replaced

    def replace_hung(self, now, may_start):
        """For the event loop: start another thread where one hangs, if may_start."""
        with self._lock:
            if now - self._began < HANG or not may_start:
                return
            sock = self._current.transport.sock
            self._selector.unregister(sock)
            try:
                start_new_thread(self._run, (self._number + 1,))
            except (RuntimeError, MemoryError):
                self._selector.register(sock, selectors.EVENT_WRITE, self._current)
                return
            self._number += 1
            self.threads += 1
            self._began = math.inf


# -- servers -----------------------------------------------------------------------------
#
# One event loop with all connections, and the servers whose sockets it accepts from.

ACCEPT_BATCH = 32             # connections accepted before those that wait get their turn
ACCEPT_PAUSE = 0.5            # seconds without accepting after the files ran out
OVERFLOW = 256                # connections above the limit that are answered 503 before they close
SPARE_FILES = 64              # file descriptors kept for images, directories and the log
THREAD_IDLE = 10.0            # seconds until a thread without work ends
WORKERS = 24                  # threads for short jobs: more only wait for the interpreter's lock
WORKER_THREADS = 240          # such threads while a disk hangs under most of them
LIST_WORKERS = 4              # threads for lists, of which one is computed at a time
MANY_EVENTS = 32              # ready sockets after which the time of a turn is checked
TURN_TIME = 0.02              # seconds of a turn after which answers go out and others get theirs
GIVEN_BACK = 64               # connections taken back from threads in one turn, some 3 ms
CLEAN_UP = 2.0                # seconds that workers get at the end, to remove cut uploads
SWITCH_INTERVAL = 0.001       # seconds until a thread that computes lets the event loop run:
                              # Python's own 5 ms are as long as forty requests
LOCK_TIME = 5.0               # seconds a start waits for others that start on its Unix socket
LOCK_POLL = 0.02              # seconds between two tries: such a start takes milliseconds
PROBE_TIME = 1.0              # seconds to connect to a Unix socket: after more, it has a listener
NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)       # a machine without IPv6


class Workers:
    """Threads for jobs that may block: started when none is idle, ended when idle for long.

    Of short jobs at most `limit` run at once, unless a disk hangs: then replace_hung() adds some.
    """

    def __init__(self, limit=None):
        self._limit = limit or WORKERS
        self._jobs = queue.SimpleQueue()  # one for each thread that was taken from the idle ones
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()     # for the attributes below
        self._waiting = collections.deque()       # short jobs above the limit
        self._running = 0                 # short jobs that run
        self._finished = self._seen = 0   # short jobs finished, and at the last replace_hung()

    def submit(self, job, is_short=True):
        """Call job() in a thread.  Raises RuntimeError, MemoryError where none starts."""
        if is_short:
            with self._lock:
                if self._running >= self._limit:
                    self._waiting.append(job)
                    return
                self._running += 1
        self._start(job, is_short)

    def _start(self, job, is_short):
        if self._idle.acquire(blocking=False):
            self._jobs.put((job, is_short))
            return
        try:                              # Thread.start() would wait until it runs
            start_new_thread(self._run, ([(job, is_short)],))
        except (RuntimeError, MemoryError):
            with self._lock:
                self._running -= is_short
            raise

    def replace_hung(self):
        """Once a second: where jobs wait and none was finished, a disk hangs under the threads."""
        with self._lock:
            jobs = []
            if self._finished == self._seen:
                jobs = [self._waiting.popleft() for _ in range(min(
                    self._limit, len(self._waiting), WORKER_THREADS - self._running))]
            self._running += len(jobs)
            self._seen = self._finished
        for job in jobs:
            try:
                self._start(job, True)
            except (RuntimeError, MemoryError):
                with self._lock:
                    self._waiting.append(job)

    def _run(self, jobs):
        job, is_short = jobs.pop()        # an argument would stay until the thread ends
        while True:
            job()
            job = self._next() if is_short else None      # or the connection would stay
            if job is not None:
                continue
            self._idle.release()
            try:
                job, is_short = self._jobs.get(timeout=THREAD_IDLE)
            except queue.Empty:
                if self._idle.acquire(blocking=False):
                    return
                job, is_short = self._jobs.get()  # one was queued for this thread just now

    def _next(self):
        """The short job that follows one that has ended; None where none waits."""
        with self._lock:
            self._finished += 1
            if self._waiting:
                return self._waiting.popleft()
            self._running -= 1
            return None


class EventLoop:
    """Waits for all sockets, answers from memory, and enforces the deadlines.

    Each socket is registered with an object of which it calls ready(): a connection, a server,
    or itself, for the threads.

    config, log, site   the configuration, the log and the routes
    metrics             those of the site; None where they are off
    now, date           the time of this turn of the loop: monotonic, and for the Date header
    draining            whether it is about to end, and only finishes what has begun
    outbox              connections with answers to send in this turn
    share               bytes that one full socket is given in this turn
    """

    def __init__(self, config, log):
        self.config, self.log = config, log
        self.workers, self.list_workers = Workers(), Workers(LIST_WORKERS)
        self.site = Site(config, Store(config, log, self.in_slices), log)
        self.servers = []
        self.draining = False
        self.outbox, self.share = [], LOOP_STEP
        self._jobs = collections.deque()  # of in_slices
        self._connections = set()
        self.metrics = self.site.metrics
        if self.metrics is not None:
            self.metrics.connections = self._connections
        self._senders = [Sender(self) for _ in range(SENDERS)]
        self.selector = selectors.DefaultSelector()
        self._wakeup = Wakeup()
        self._given_back = collections.deque()    # (connection, callable), from threads
        self._accept_again = None         # when to accept again, after the files ran out
        self._accept_failed = False       # and the log says so
        self._cut_at = None               # when draining ends (monotonic); -inf: at once
        self._second = 0
        self._read_clock()

    def _read_clock(self):
        """Set the time of this turn of the loop; dates are made once a second."""
        self.now = time.monotonic()
        now = int(time.time())
        if now != self._second:
            self._second, self.date = now, http_date(now).encode()
            self.log.tick(now)

    # the loop

    def run(self):
        """Serve until stop(); then finish the requests that have begun, for drain_time."""
        config = self.config
        sys.setswitchinterval(SWITCH_INTERVAL)
        # So often that no limit is overrun by more than a quarter.
        tick = min(TICK, config.header_timeout / 4, config.idle_timeout / 4,
                   config.stall_timeout / 4)
        checked, flushed, was_cut_off = self.now, self.now, False
        self._accept(True)
        self.selector.register(self._wakeup, selectors.EVENT_READ, self)
        try:
            while self._cut_at is None or self._connections and self.now < self._cut_at:
                events = self.selector.select(
                    0 if self._jobs else LOG_DELAY if self.log.pending else tick)
                self._read_clock()
                self.share = max(ONE_PIECE, min(LOOP_STEP, TURN // (len(events) or 1)))
                if was_cut_off:           # or always the same ones would be
                    random.shuffle(events)
                was_cut_off = False
                for number, (key, _) in enumerate(events, 1):
                    try:
                        key.data.ready()
                    except Exception:
                        self.fault(key.data)
                    if not number % MANY_EVENTS and time.monotonic() - self.now > TURN_TIME:
                        was_cut_off = True        # the others are ready in the next turn, too
                        break
                self._send_out()          # first, as these connections have a new deadline
                if self._jobs:
                    self._run_slice()
                if self.now - checked >= tick:
                    checked = self.now
                    self._check_deadlines()
                    self._send_out()
                if self.now - flushed >= LOG_DELAY:
                    flushed = self.now
                    self.log.flush()
                if self._cut_at is not None and not self.draining:
                    self._drain()
        finally:
            self._end()

    def adopt(self, sock, peer):
        """Register a connection; above the limit answer 503, without a thread."""
        if len(self._connections) >= self.config.max_connections + OVERFLOW:
            sock.close()
            return
        connection = Connection(sock, peer, self)
        self.selector.register(sock, selectors.EVENT_READ, connection)
        self._connections.add(connection)
        if len(self._connections) > self.config.max_connections:
            self.tell_to_come_back(connection, "too many connections")

    def tell_to_come_back(self, connection, reason):
        """Answer 503 in place of any request."""
        self.log.warn(f"{connection.peer or 'unix'} is told to come back: {reason}")
        connection.refuse(unavailable(reason, 5))

    def forget(self, connection):
        with contextlib.suppress(KeyError):       # it may be nobody's, or a thread's
            self.selector.unregister(connection.transport.sock)
        self._connections.discard(connection)

    def _send_out(self):
        """Send the answers of this turn."""
        while self.outbox:
            connections, self.outbox = self.outbox, []
            for connection in connections:
                if connection.state is READING and connection.transport.unsent:
                    try:
                        connection.flush()
                    except Exception:
                        self.fault(connection)

    def fault(self, source):
        """Log an uncaught internal error: only a connection has to go, no server."""
        if source in self._connections and source.state not in (WORKING, STREAMING):
            source.close()
        try:
            self.log.exception("internal error")
        except Exception:
            pass                          # not even that: the others are still to be served

    def _check_deadlines(self):
        """End the connections whose deadline has passed."""
        now = self.now
        for connection in [each for each in self._connections if now >= each.deadline]:
            try:
                connection.check_deadline(now)
            except Exception:
                self.fault(connection)
        self.workers.replace_hung()
        for sender in self._senders:
            sender.replace_hung(
                now, sum(each.threads for each in self._senders) < SENDER_THREADS)
        if self._accept_again is not None and now >= self._accept_again and not self.draining:
            self._accept_again = None
            self._accept(True)

    def _accept(self, wanted):
        """Wait for new connections from now on, or no more."""
        for server in self.servers:
            with contextlib.suppress(KeyError):           # it is as it was wanted
                if wanted:
                    self.selector.register(server.socket, selectors.EVENT_READ, server)
                else:
                    self.selector.unregister(server.socket)

    def accept_failed(self, error):
        """The system is short of something: accept again a little later."""
        if not self._accept_failed:
            self._accept_failed = True
            self.log.error(f"cannot accept connections: {error.strerror}")
        self._accept(False)
        self._accept_again = self.now + ACCEPT_PAUSE

    def accepted_all(self):
        """The queue of a server is empty: the shortage is over."""
        self._accept_failed = False

    # threads

    def in_slices(self, job):
        """Run a generator between the turns of the loop; where it yields True, go on in a thread.

        May be called by any thread.
        """
        self._jobs.append(job)
        self._wakeup.send()

    def _run_slice(self):
        job = self._jobs.popleft()
        try:
            if next(job):
                self.workers.submit(lambda: run_out(job), False)
            else:
                self._jobs.append(job)
        except StopIteration:
            pass                          # it has ended
        except (RuntimeError, MemoryError):       # no thread: who needs it will do without
            job.close()

    def stream(self, connection):
        """Hand a connection to the sender that has the fewest."""
        min(self._senders, key=lambda sender: sender.count).add(connection)

    def give_back(self, connection, go_on):
        """From a thread that is done with a connection: call go_on() in the event loop."""
        self._given_back.append((connection, go_on))
        self._wakeup.send()

    def ready(self):
        """Take back the connections that threads are done with."""
        self._wakeup.clear()
        for _ in range(min(GIVEN_BACK, len(self._given_back))):
            connection, go_on = self._given_back.popleft()
            try:
                go_on()
            except Exception:
                connection.state = READING
                self.fault(connection)
        if self._given_back:
            self._wakeup.send()

    @staticmethod
    def own_host(sock) -> str:
        """The Host of a client of HTTP/1.0 that sends none: the address that it has asked."""
        if sock.family == socket.AF_UNIX:
            return "localhost"
        host, port = sock.getsockname()[:2]
        return host_and_port(plain_address(host).partition("%")[0], port)

    # the end

    def stop(self, at_once=False):
        """End the loop: now, or after drain_time.  Safe in a signal handler."""
        self._cut_at = -math.inf if at_once else time.monotonic() + self.config.drain_time
        self._wakeup.send()

    def _drain(self):
        """No new connections, no further requests; begun ones are finished."""
        self.draining = True
        self._accept(False)
        for server in self.servers:
            server.server_close()
        busy = 0
        for connection in list(self._connections):
            connection.closing = True
            if connection.state in (SENDING, WORKING, STREAMING):
                busy += 1
            elif not connection.partial and connection.state is READING:
                connection.close()
        if busy and self._cut_at > self.now:
            self.log.info(f"finishing {busy} answers, for {self.config.drain_time} s at most")

    def _end(self):
        """Cut the connections left; workers get a moment, for the files of cut uploads."""
        for connection in list(self._connections):
            connection.transport.hang_up()
        end = time.monotonic() + CLEAN_UP
        while time.monotonic() < end and any(
                connection.state is WORKING and connection.request.body is not None
                for connection in self._connections):
            if select.select([self._wakeup], [], [], CLEAN_UP / 10)[0]:
                self.ready()
        for server in self.servers:
            server.server_close()
        self.log.flush()


class ImageServer(ThreadingHTTPServer):
    """A listening TCP socket; the event loop has its connections, and no thread of its own."""

    request_queue_size = 1024             # a fleet that boots imports all at once

    def __init__(self, listen, loop):
        self.loop = loop
        super().__init__(self.choose_address(listen), Connection)
        loop.servers.append(self)

    def choose_address(self, listen):
        """The address to bind, and address_family with it."""
        host, port = listen
        if not host:
            host = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return host, port

    def server_bind(self):
        """Bind without asking DNS for our name, as http.server does (it may hang there)."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.address_family == socket.AF_INET6 and self.server_address[0] == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Inherited by accepted sockets on Linux; answers are sent whole, so it matters little.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def server_activate(self):
        super().server_activate()
        self.socket.setblocking(False)

    def describe(self) -> str:
        """Where it listens, for the log."""
        return "http://" + host_and_port(*self.server_address[:2])

    def ready(self):
        """Accept the connections that wait, up to a batch."""
        for _ in range(ACCEPT_BATCH):
            try:
                sock, address = self.get_request()
            except BlockingIOError:
                self.loop.accepted_all()
                return
            except OSError as error:
                if error.errno in SHORTAGE:
                    self.loop.accept_failed(error)
                    return
                continue                  # the client went away while it waited
            self.process_request(sock, address)

    def process_request(self, sock, client_address):
        """Hand a connection to the event loop, with the address for its rights and the log."""
        peer = client_address[0] if isinstance(client_address, tuple) else ""
        self.loop.adopt(sock, plain_address(peer))


@contextlib.contextmanager
def socket_lock(path):
    """A block in which no other imgserver probes, removes or binds the socket `path`.

    The lock is on a file beside it, which is removed at the end: a server that waited for a
    removed one tries the new one.  In a directory that others may write to, any of them may
    have made it: it is neither followed nor written, and waited for LOCK_TIME only.  Raises
    UserError, and OSError with the file's name where it cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    deadline = time.monotonic() + LOCK_TIME
    while True:
        fd = os.open(path + ".lock", flags, 0o600)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path}.lock is no regular file", EXIT_CONFIG)
            # POSIX has either of two errors for a lock; a file that was removed is no lock.
            with contextlib.suppress(BlockingIOError, PermissionError, FileNotFoundError):
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(status, os.lstat(path + ".lock")):
                    break
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if time.monotonic() > deadline:
            raise UserError(f"another server starts on {path}: {path}.lock is locked")
        time.sleep(LOCK_POLL)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):        # another user's, in a sticky directory
            os.unlink(path + ".lock")
        os.close(fd)


class UnixImageServer(ImageServer):
    """The same on a Unix socket, for nginx on the same machine."""

    address_family = socket.AF_UNIX
    _identity = None                      # (device, inode) of our socket file while it is there

    def choose_address(self, listen):
        return listen

    def server_bind(self):
        """Bind and listen, replacing the socket file of a dead server.

        Raises UserError where a server listens there, or something that is no socket is there.
        """
        path = self.server_address
        with socket_lock(path):
            self._clear(path)
            # illumos asks for read and write permission of who connects (so_ux_lookup).
            mask = os.umask(0o777 & ~int(self.loop.config.socket_mode, 8))
            try:
                self.socket.bind(path)
            finally:
                os.umask(mask)
            status = os.stat(path)
            self._identity = status.st_dev, status.st_ino
            self.socket.listen(self.request_queue_size)   # until then it seems a dead one's

    @staticmethod
    def _clear(path):
        """Remove the socket file of a dead server at `path`; nothing else."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(PROBE_TIME)
            try:
                if not stat.S_ISSOCK(os.lstat(path).st_mode):
                    raise UserError(f"{path} is there already, and it is no socket", EXIT_CONFIG)
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)           # no listener: its server died
                return
            except FileNotFoundError:
                return                    # the last one has ended well: nothing to remove
            except (BlockingIOError, socket.timeout):
                pass                      # a listener that does not accept: its queue is full
            raise AddressInUse(f"another server listens on {path}")

    def describe(self):
        return self.server_address

    def server_close(self):
        """Remove the socket file if it is ours, and stop listening.

        In this order no other server takes the file for a dead one's and replaces it before
        it is removed, so that no lock is needed.  Once: the next server's may have the same
        inode number while we still finish downloads.
        """
        identity, self._identity = self._identity, None
        if identity is not None:
            with contextlib.suppress(OSError):    # already removed by others
                status = os.lstat(self.server_address)
                if (status.st_dev, status.st_ino) == identity:
                    os.unlink(self.server_address)
        super().server_close()


# -- commands ----------------------------------------------------------------------------

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE)     # end a command
PROGRESS_EVERY = 0.25         # seconds between two figures on a terminal
COLUMN_LIMIT = 36             # characters of a column of `list`: a uuid
LIST_COLUMNS = "UUID NAME VERSION OS TYPE SIZE STATE PUBLISHED ORIGIN CHANNELS".split()
LIST_FILTERS = "uuid name version os type state origin channels owner public billing_tag".split()
CREATOR_KEYS = "image-creator-uuid", "image-vendor-uuid"     # that `make config` fills in
CLEAN = "check --clean"       # the command that removes remains
EXAMPLE = "f669428c-a939-11e2-a485-b790efc0f0c1"      # a uuid for --help


def program_risks():
    """Yield a warning for each path by which another user could change the program.

    Who may write to its directory, as to a serve_dir that is the same, can replace it, or what
    `make` compiled of it.  Only root and its owner should.
    """
    program = os.path.abspath(__file__)
    directory = os.path.dirname(program)
    with contextlib.suppress(OSError):
        owner = os.stat(program).st_uid
        for path in (directory, program, os.path.join(directory, "__pycache__")):
            status = os.stat(path)
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or status.st_uid not in (0, owner):
                yield ("others than root and the owner of imgserver.py may write "
                       f"{printable(path)}, and so change the program: chmod go-w it, and give "
                       "the images another directory")


def start(config, log) -> EventLoop:
    """An event loop that is ready to run, with a server for each address.

    Raises UserError where it could not serve: status 96 where trying again will not help.
    """
    for warning in (*config.warnings, *program_risks()):
        log.warn(warning)
    config.check_serve_dir()
    if config.accel and not any(isinstance(address, str) for address in config.listen_port):
        raise UserError("config: accel is for nginx on a Unix socket, and listen_port names none",
                        EXIT_CONFIG)
    raise_file_limit(config, log)
    loop = EventLoop(config, log)
    try:
        for before, address in zip([None, *config.listen_port], config.listen_port):
            # localhost: both addresses have one port, and there may be no IPv6.
            second = address[0] == "::1" and before == ("127.0.0.1", address[1])
            if second:
                address = "::1", loop.servers[-1].server_address[1]
            add_server(loop, address, second)
    except BaseException:
        for server in loop.servers:
            server.server_close()             # and remove the files of Unix sockets
        raise
    return loop


def add_server(loop, address, may_be_missing):
    """Listen on one address.  Raises UserError as `start` does."""
    is_path = isinstance(address, str)
    try:
        (UnixImageServer if is_path else ImageServer)(address, loop)
    except OSError as error:
        reason = error.strerror or error
        if may_be_missing and error.errno in NO_SUCH_ADDRESS:
            return
        if error.filename is not None:        # the lock file of a Unix socket
            reason = f"{error.filename}: {reason}"
        if isinstance(error, PermissionError) and not is_path and address[1] < 1024:
            reason = (f"{reason}; a port below 1024 needs the privilege net_privaddr, or "
                      "choose --listen 8080")
        refusal = f"cannot listen on {listen_text(address)}: {reason}"
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(refusal)
        raise UserError(refusal, 1 if error.errno == errno.EADDRNOTAVAIL else EXIT_CONFIG)


def raise_file_limit(config, log):
    """Raise the limit of file descriptors as far as connections and their files need it."""
    import resource
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in limits)
    wanted = min(2 * config.max_connections + OVERFLOW + SPARE_FILES, hard)
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))
            soft = wanted
        except (ValueError, OSError) as error:
            log.warn(f"cannot raise the limit of open files: {error}")
    most = max(soft // 2, soft - OVERFLOW - SPARE_FILES)      # some have a file open, too
    if most < config.max_connections:
        config.max_connections = max(1, most)
        log.warn(f"{soft} files may be open: max_connections is {config.max_connections}")


def run_serve(config, _):
    """Serve until SIGTERM or SIGINT; a second one ends it at once."""
    log = Log(config.loglevel, form=config.logformat)
    loop = start(config, log)

    def end(number, frame):
        loop.stop(at_once=loop.draining)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGHUP, lambda number, frame: log.info(
        "SIGHUP: nothing to read again, the directory is always read as it is"))
    log.info(f"imgserver {__version__} serves {printable(config.serve_dir)} on "
             + ", ".join(printable(server.describe()) for server in loop.servers))
    log.flush()
    if loop.site.rights.hides:
        loop.workers.submit(loop.site.log_hidden, False)
    loop.run()
    log.info("ended")
    log.flush()
    return 0


class Console:
    """Standard output and the terminal of a command, and the signals that end it.

    Nothing is interrupted by a signal: it is a flag, which a command asks for between two pieces
    of its work, and at each wait.  The wake-up descriptor becomes readable with a signal, so
    that none is lost just before a wait.
    """

    def __init__(self, quiet=False):
        self._number, self._wakeup, self._may_raise = None, [], False
        self._is_dirty = False            # a progress is on the terminal
        self._has_progress = not quiet and sys.stderr is not None and sys.stderr.isatty()

    def arm(self):
        """From now on a signal is kept until check or wait is called."""
        reader, writer = os.pipe()
        self._wakeup = [reader]
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in ENDING:
            # An ignored one stays so (nohup); SIGPIPE is ignored by Python itself.
            if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGPIPE:
                signal.signal(number, self._came)

    def _came(self, number, frame):
        if self._number is None:
            self._number = number
            if self._may_raise:
                self.check()

    @contextlib.contextmanager
    def interrupting(self):
        """A block that only waits, for the network or a user, and in which a signal raises."""
        self._may_raise = True
        try:
            self.check()
            yield
        finally:
            self._may_raise = False

    def check(self):
        """Raise UserError if a signal has come."""
        if self._number:
            raise UserError(f"ended by {signal.Signals(self._number).name}", 128 + self._number)

    def wait(self, seconds=None, reading=(), writing=()):
        """Wait until a file is ready, or some seconds.  Raises UserError for a signal instead."""
        found, written, _ = select.select([*self._wakeup, *reading], writing, [], seconds)
        if found == self._wakeup and not written:
            self.check()

    def say(self, text, fd=1):
        """Print a line on standard output, to a pager that may not read.

        Raises UserError where it must wait and a signal has come, and OSError.
        """
        self._show_progress("")
        data = (text + "\n").encode("utf-8", "surrogateescape")
        while data:
            self.wait(writing=[fd])
            with contextlib.suppress(BlockingIOError):
                try:
                    data = data[os.write(fd, data[:select.PIPE_BUF]):]
                except BrokenPipeError:
                    self.check()          # it was SIGPIPE, too
                    raise

    def complain(self, text):
        """Print a line on stderr, in printable ASCII, if anybody reads it."""
        with contextlib.suppress(OSError, UserError):
            self.say(f"imgserver: {terminal_text(text)}", 2)

    def progress(self, action, total=None):
        """Show bytes and rate on a terminal's stderr, some times a second, until the next line.

        Returns a function of the size of each piece that has come, which raises UserError after
        a signal.  total: the bytes that will come, from which the seconds follow that are left.
        """
        size, began, last = 0, time.monotonic(), time.monotonic()

        def count(more):
            nonlocal size, last
            self.check()
            size, now = size + more, time.monotonic()
            if self._has_progress and now - last >= PROGRESS_EVERY:
                last, rate = now, size / (now - began) / 1e6
                left = f", {(total - size) / 1e6 / rate:.0f} s left" if total and rate else ""
                self._show_progress(f"{action}: {size / 1e6:.0f}"
                                    + (f" of {total / 1e6:.0f}" if total else "")
                                    + f" MB, {rate:.0f} MB/s{left}")
        return count

    def _show_progress(self, text):
        """Replace it.  A terminal that is stopped (^S) shows nothing, and stops nothing."""
        if (text or self._is_dirty) and select.select([], [2], [], 0)[1]:
            self._is_dirty = text != ""
            sys.stderr.write(f"\r{text}\033[K")
            sys.stderr.flush()


def terminal_text(text) -> str:
    """A text as it may stand on a terminal: printable ASCII; quotes and backslashes are such."""
    return printable(text).replace('\\"', '"').replace("\\\\", "\\")


def open_input(path, console):
    """read(size) of a file, a FIFO, or standard input (path None); a signal ends each wait.

    It raises OSError, and UserError after a signal.  Raises UserError.
    """
    try:                                  # a plain open() would block on a FIFO without a writer
        fd = 0 if path is None else os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}")

    def read(size) -> bytes:
        while True:
            console.check()
            console.wait(reading=[fd])
            with contextlib.suppress(BlockingIOError):
                return os.read(fd, size)
    return read


def read_to_end(read, limit, end=None) -> bytes:
    """All that read(size) gives, or up to `end`, or a little more than `limit` bytes of it."""
    data = b""
    for more in iter(lambda: read(CHUNK), b""):
        data += more
        if len(data) > limit or end and end in data:
            break
    return data


def checked_uuid(text) -> str:
    """`text`, if it is a UUID as imgadm has them.  Raises UserError."""
    if not is_uuid(text):
        raise UserError(f"{text!a} is not a UUID in lower case", 2)
    return text


def read_given_manifest(path, console) -> dict:
    """The manifest in a file, alone or as `imgadm get` prints it.  Raises UserError."""
    try:
        data = read_to_end(open_input(path, console), MANIFEST_LIMIT)
        if len(data) > MANIFEST_LIMIT:
            raise UserError(f"{path} is larger than {MANIFEST_LIMIT} bytes")
        manifest = parse_object(data)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}")
    except ValueError as error:
        raise UserError(f"{path} {error}")
    if "uuid" not in manifest and isinstance(manifest.get("manifest"), dict):
        manifest = manifest["manifest"]
    return {key: value for key, value in manifest.items() if key not in ("state", "icon")}


def given_fields(texts) -> dict:
    """The fields of FIELD=VALUE words.  Raises UserError."""
    fields = {}
    for text in texts:
        try:
            text.encode("utf-8")
            if "=" not in text:
                raise UserError(f"{spell(text)} is not FIELD=VALUE: a description of several "
                                "words needs quotes", 2)
            name, fields[name] = parse_field(text)
        except UnicodeEncodeError:
            raise UserError(f"{text!a} is not UTF-8")
        except ValueError as error:
            raise UserError(str(error))
    return fields


def manifest_to_import(config, options) -> dict:
    """The manifest that the options of `import` ask for.  Raises UserError."""
    words = import_words(options)
    uuid = options.uuid and checked_uuid(options.uuid)
    given = {key: value for key, value in (("os", options.os), ("type", options.type),
                                           ("origin", options.origin)) if value is not None}
    if options.manifest:
        given.update(given_fields(words))
        manifest = {**read_given_manifest(options.manifest, options.console), **given}
        manifest["uuid"] = uuid or manifest.get("uuid") or new_uuid()
    else:
        if len(words) < 3:
            raise UserError("NAME VERSION DESCRIPTION are needed, or --manifest FILE", 2)
        words[:3] = map("=".join, zip(("name", "version", "description"), words))
        given.update(given_fields(words))
        manifest = new_manifest(config, uuid or new_uuid(), given)
    manifest = validate(manifest)
    own = {key: manifest[key] for key in ("owner", "public") if given.get(key) is not None}
    if is_v1(manifest) and own:           # v1 does not have these
        manifest = {**upgrade(manifest), **own}
    if not is_v1(manifest):
        manifest.pop("state", None)       # the server sets it
        manifest = {"v": 2, "uuid": None, **DEFAULTS, "published_at": stamp(time.time()),
                    **manifest}
    if options.no_stream_check and manifest["type"] in STREAM_TYPES.values():
        raise UserError(f"a {manifest['type']} is a ZFS stream: --no-stream-check needs "
                      "another --type")
    warning = choose_channels(config, manifest)
    if warning:
        options.console.complain(f"warning: {warning}")
    return manifest


def import_words(options) -> list:
    """The words of `import` from NAME on.  Raises UserError for an option among them."""
    words = options.words
    if words[:1] == ["--"]:
        return words[1:]
    fields = words[0 if options.manifest else 3:]
    late = [word for word in words if word.startswith("-")]
    if late and not all(re.match("[a-z][a-z0-9_]*=", word) for word in fields):
        raise UserError(f"options come before NAME, but {late[0]!a} does not", 2)
    return words


def run_import(config, options):
    """Take an image from standard input or --file, and print its uuid."""
    manifest = manifest_to_import(config, options)
    uuid, path = manifest["uuid"], options.file if options.file != "-" else None
    if path is None and os.isatty(0):
        raise UserError("the image is read from standard input: `... < FILE`", 2)
    source, count = open_input(path, options.console), options.console.progress("imported")

    def read(size):
        chunk = source(size)
        count(len(chunk))
        return chunk

    Publisher(config).import_image(manifest, read, not options.no_activate,
                                   not options.no_stream_check)
    try:
        options.console.say(uuid)
    except (OSError, UserError) as error:     # no status of a signal: the image is there
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"image {uuid} is stored, but that cannot be printed: {reason}")
    return 0


def mirror_source(config, options):
    """The source that a URL, or the path of a directory, names.  Raises UserError."""
    if "://" not in options.url and os.path.isdir(options.url):
        return SourceDirectory(options.url)
    try:
        return RemoteServer(
            options.url, options.channel, options.ca, options.insecure, config.stall_timeout,
            options.console.interrupting, options.console.wait,
            lambda text: options.quiet or options.console.complain(text))
    except ValueError as error:           # without the URL, which may have a password
        raise UserError(f"URL {error}", 2)


def run_mirror(config, options):
    """Bring images of another server, origins first; 1 where one of them has not come."""
    uuids = [checked_uuid(text) for text in options.uuid]
    filters = {name: getattr(options, name) for name in ("name", "version", "os", "type")
               if getattr(options, name) is not None}
    by_list = bool(filters) or options.all or options.latest is not None
    if by_list == bool(uuids):
        raise UserError("either UUIDs are needed, or --name, --version, --os, --type, --latest "
                        "or --all", 2)
    config.check_serve_dir()

    def say(text):
        if not options.quiet:
            options.console.say(text)

    try:
        source = mirror_source(config, options)
        mirror = Mirror(config, source, say, options.console.complain,
                        options.console.progress, not options.no_stream_check)
        if by_list:
            uuids = mirror.select(filters, options.latest)
            if not uuids and not options.quiet:
                options.console.complain("no image is listed there that fits")
            uuids = list(dict.fromkeys(uuids + mirror.brought()))
    except SourceError as error:
        raise UserError(f"{printable(options.url.rpartition('@')[2])}: {error}")
    plan = mirror.plan(uuids, follow=not options.dry_run)
    if options.dry_run:
        for size, text in plan.values():
            options.console.say(f"{text}  {size / 1e6:.1f} MB")
        options.console.say(f"{len(plan)} images, "
                            f"{sum(size for size, _ in plan.values()) / 1e6:.1f} MB")
    else:
        mirror.bring(plan)
    return 1 if mirror.failed else 0


def run_step(config, options):
    """Activate or discard an image that is not active."""
    getattr(Publisher(config), options.command)(checked_uuid(options.uuid))
    return 0


def run_import_image(config, options):
    """The command behind the script import-image."""
    options.command = "activate" if options.a else "discard" if options.d else "import"
    if options.command == "import":
        return run_import(config, options)
    words = options.words[options.words[:1] == ["--"]:]
    if len(words) != 1:
        raise UserError("-a and -d take one UUID, behind all options", 2)
    options.uuid = words[0]
    return run_step(config, options)


def label(config, uuid) -> str:
    """uuid, name and version of an image in any state, as far as its manifest has them."""
    for prefix in ("", INCOMING):
        with contextlib.suppress(OSError, BadImage, LookupError):
            manifest, _ = read_manifest(os.path.join(config.serve_dir, prefix + uuid))
            return printable(f"{uuid} {manifest['name']} {manifest['version']}")
    return printable(uuid)


def advised(text, command) -> str:
    """A sentence about a problem, with the command that helps if there is one."""
    return f"{text}: imgserver.py {command}" if command else text


class NoHasher:
    """In the place of a Hasher: no sha1 is needed where a manifest has none."""

    def hashes(self, path, key):
        return "", bytes(16)


class Inventory:
    """All images of serve_dir as they are now, for the commands: image files are not read.

    by_uuid     the sound ones, in any state
    images      the same, in the order of publishing
    left_out    name of a directory: why the image there is not shown
    """

    def __init__(self, config, apis=()):
        config.check_serve_dir()
        self.config, self.apis, self.reader = config, apis, ImageReader(config, NoHasher())
        self.by_uuid, self.left_out = {}, {}
        for name in sorted(os.listdir(config.serve_dir), reverse=True):   # .incoming-* come last
            try:
                image = self.read(name)
                if image is not None:
                    self.by_uuid.setdefault(image.uuid, image)
            except BadImage as error:
                self.left_out[name] = str(error)
        self.cyclic = endless({uuid: image.origin for uuid, image in self.by_uuid.items()})
        for uuid in self.cyclic:
            del self.by_uuid[uuid]
            self.left_out[uuid] = ENDLESS
        self.images = sorted(self.by_uuid.values(), key=lambda image: image.order)

    def read(self, name) -> Image | None:
        """The image of a name in serve_dir, as it is now; None where the name means none.

        Raises BadImage where it is not shown.
        """
        image, uuid = None, name[len(INCOMING):]
        if name.startswith(INCOMING) and is_uuid(uuid):
            image = self.reader.read_unactivated(uuid)
            return None if image is None or image.problem else image
        if is_uuid(name.lower()):
            image = self.reader.read(name, os.path.join(self.config.serve_dir, ""), self.apis)
            if image is None and os.path.isdir(os.path.join(self.config.serve_dir, name)):
                raise BadImage(f"there is no {MANIFEST}")
            if image is not None and image.problem:
                raise BadImage(image.problem)
        return image

    def leftovers(self):
        """Yield (name, sentence, command) of each directory of an image that is not active.

        As they are now.  command: that which helps; None: nothing is to be done yet.
        """
        serve_dir = self.config.serve_dir
        for name in sorted(os.listdir(serve_dir)):
            uuid, path = name[len(INCOMING):], os.path.join(serve_dir, name)
            if name.startswith(DISCARDED):
                yield name, f"{printable(name)}: is being removed, or was half removed", CLEAN
            if not name.startswith(INCOMING) or not is_uuid(uuid):
                continue
            try:
                age = time.time() - max(os.lstat(each).st_mtime for each in (
                    path, *(entry.path for entry in os.scandir(path))))
            except OSError:
                continue                  # it has just been activated, or is no directory
            image = self.reader.read(uuid, os.path.join(serve_dir, INCOMING), (IMGAPI,))
            problem = image.problem if image else f"there is no {MANIFEST}"
            shown = label(self.config, uuid)
            if os.path.lexists(os.path.join(serve_dir, uuid)):
                shown, problem = name, "an image of this uuid is active"      # which is not meant
            if problem:
                text, command = f"is not whole ({problem})", CLEAN if age > STALE else None
            else:
                text, command = "waits to be activated", f"activate {uuid}"
            yield name, (f"{shown}: {terminal_text(text)}, last change {age / 3600:.0f} hours "
                         "ago"), command

    def problems(self):
        """Yield a sentence for each image that is left out, not importable, waiting or stale."""
        for name in sorted(self.left_out):
            yield f"{label(self.config, name)} is left out: {terminal_text(self.left_out[name])}"
        for image in self.images:
            for text in (*image.notes, *self.reasons(image), self.origin_problem(image)):
                if text:
                    yield f"{image.uuid} {image.title}: {terminal_text(text)}"
        for _, text, command in self.leftovers():
            yield advised(text, command)

    def reasons(self, image):
        """Yield why a sound image is not seen by imgadm."""
        if image.state not in ("active", "disabled") and not image.place.endswith(INCOMING):
            yield advised(f"waits to be activated: its manifest has the state {image.state}",
                          image.state == "unactivated" and f"activate {image.uuid}")
        channels = [channel["name"] for channel in self.config.channels]
        if channels and set(channels).isdisjoint(image.channels):
            channel = self.config.default_channel or channels[0]
            yield advised("it is in no channel of the configuration, so that nobody sees it over "
                          "IMGAPI", f"update {image.uuid} 'channels=[\"{channel}\"]'")

    def origin_problem(self, image) -> str | None:
        """Why imgadm does not find the origin of a sound image; None: it does."""
        if image.uuid in self.cyclic:
            return self.left_out[image.uuid]
        problem = origin_problem(image, self.by_uuid.get, bool(self.config.channels))
        if problem and image.origin not in self.by_uuid and image.origin not in self.left_out:
            return advised(problem, f"mirror URL {image.origin}")
        return problem


def check_image(inventory, uuid, options):
    """Compare an image with its manifest.

    Raises BadImage, ApiError where --record cannot write, and UserError after a signal.
    """
    image = inventory.read(uuid)
    if image is None:
        raise BadImage("no such image")
    try:
        found = scan_image(image, options)
        compare_image(image, found, whole=not options.fast)
    except (OSError, BadImage) as error:
        raise BadImage(f"{image.file}: {getattr(error, 'strerror', error)}")
    if options.record:
        record_facts(inventory.config, uuid, found)
    problem = inventory.origin_problem(image)
    if problem:
        raise BadImage(problem)
    Publisher(inventory.config).check_origin(image.origin, found.stream)


def scan_image(image, options) -> FileScan:
    """A scan of an image's file, with --fast of its beginning alone.

    Raises BadImage, OSError, and UserError after a signal.
    """
    path = os.path.join(image.directory, image.file)
    if options.fast:
        return scan_head(path)
    found, count = FileScan(), options.console.progress(f"{image.uuid} {image.file}")
    with open(open_regular(path)[0], "rb", buffering=0) as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            found.feed(chunk)
            count(len(chunk))
    found.finish()
    return found


def compare_image(image, found, whole):
    """Raise BadImage where a file, or the stream inside, is not as its manifest says."""
    promised, required = image.fields()["files"][0], STREAM_TYPES.values()
    facts = {"size": found.size, **found.hashes()} if whole else {}
    if image.claimed_md5 is not None:
        promised["md5"] = image.claimed_md5.hex()
    if found.stream.type is not None or image.type in required:
        facts["compression"] = found.compression
    if found.stream.type is not None:
        facts["dataset_guid"] = str(found.stream.guid)
    for name, value in facts.items():
        if (promised.get(name) or value) != value:
            raise BadImage(f"its {name} is {value}, not {promised[name]}")
    problem = stream_problem(image.type, found.stream, required, whole)
    if problem:
        raise BadImage(problem)


def record_facts(config, uuid, found):
    """Write md5 and sha256 of an image's file into its manifest, and a missing size or sha1.

    Not where the manifest has become another since the file was read.  Raises ApiError.
    """
    facts = {"size": found.size, **found.hashes()}

    def recorded(manifest):
        try:
            first, *others = manifest["files"]
            kept = {key: first[key] for key in ("size", "sha1") if first.get(key)}
        except (LookupError, TypeError, ValueError, AttributeError):
            return manifest
        if any(str(value).lower() != str(facts[key]) for key, value in kept.items()):
            return manifest
        return {**manifest, "files": [
            {**first, **facts, "md5_of": facts["sha1"], **kept}, *others]}
    Publisher(config).change(uuid, recorded)


def run_check(config, options):
    """Compare every image with its manifest, and report those that differ."""
    if options.fast and options.record:
        raise UserError("--record must read all of an image: not with --fast", 2)
    uuids, say = list(map(checked_uuid, options.uuid)), options.console.say
    inventory = Inventory(config, (IMGAPI,))
    uuids = uuids or sorted(name for name in os.listdir(config.serve_dir)
                            if is_uuid(name.lower()))
    bad = 0
    for uuid in uuids:
        options.console.check()
        try:
            check_image(inventory, uuid, options)
        except (BadImage, ApiError) as error:
            bad += 1
            say(f"{label(config, uuid)}: {terminal_text(str(error))}")
        if options.clean:
            remove_temporaries(os.path.join(config.serve_dir, uuid))
    for name, text, command in () if options.uuid else list(inventory.leftovers()):
        if options.clean and command == CLEAN:
            say(f"{text}: {remove_leftover(config, name)}")
        elif not options.quiet:
            say(advised(text, command))
    if bad or not options.quiet:
        say(f"{len(uuids) - bad} of {len(uuids)} images are sound"
            + ("" if uuids else f": there is none in {config.serve_dir}"))
    return 1 if bad else 0


def remove_leftover(config, name) -> str:
    """Remove a directory of Inventory.leftovers; "removed", or why it is not."""
    try:
        if name.startswith(INCOMING):
            Publisher(config).discard(name[len(INCOMING):])
        else:
            remove_tree(os.path.join(config.serve_dir, name))
        return "removed"
    except (ApiError, OSError) as error:
        return getattr(error, "strerror", None) or str(error)


def remove_temporaries(directory):
    """Remove files that killed commands left half written in an image's directory."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(directory):
            if (_TEMPORARY.fullmatch(entry.name)
                    and time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE):
                os.unlink(entry.path)


def list_filters(texts):
    """Functions of an Image for the FIELD=VALUE words of `list`.  Raises UserError."""
    query, filters = {}, []
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or name not in LIST_FILTERS and not name.startswith("tag."):
            raise UserError(f"{text!a} is not FIELD=VALUE with one of "
                            + ", ".join(LIST_FILTERS) + ", tag.KEY", 2)
        query.setdefault(name, []).append(value)
        if name in ("uuid", "state", "origin"):
            filters.append(lambda image, name=name, value=value:
                           (getattr(image, name) or "") == value)
        elif name == "channels":
            filters.append(lambda image, value=value: value in image.channels)
    return filters + image_filters(query, None)


def list_text(images, config, options) -> str:
    """The images of `list` as a table, as lines for `cut`, or as JSON."""
    if options.json:
        values = [image.fields() for image in images]
        for image, value in zip(images, values):
            if image.sha1 == "" and value["files"]:
                del value["files"][0]["sha1"]
            if config.channels:
                value["channels"] = list(image.channels)
        return render_json(values)
    columns = LIST_COLUMNS[:None if config.channels else -1]
    rows = [[image.uuid, image.name, image.version, image.os, image.type, str(image.size),
             image.state, "-" if image.state == "unactivated" else
             image.order[0].partition(".")[0] + "Z", image.origin or "-",
             printable(",".join(image.channels)) or "-"][:len(columns)] for image in images]
    if options.parsable:
        return "\n".join(map("\t".join, rows))
    rows = [columns] + [[text if len(text) <= COLUMN_LIMIT else text[:COLUMN_LIMIT - 3] + "..."
                         for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(" ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def run_list(config, options):
    """List the images in any state, and their problems below."""
    plain = options.json or options.parsable
    if options.problems and (options.words or plain):
        raise UserError("--problems goes with nothing else", 2)
    filters = list_filters(options.words)
    inventory = Inventory(config, (IMGAPI,) if options.json or any(
        text.startswith("tag.") for text in options.words) else ())
    images = [image for image in inventory.images if all(check(image) for check in filters)]
    parts = [] if options.problems else [list_text(images, config, options)]
    if not filters and not plain:
        parts.append("\n".join(inventory.problems()))
    text = "\n\n".join(filter(None, parts))
    if text:
        options.console.say(text)
    return 1 if options.problems and text else 0


def change_images(config, options, uuids, change, done):
    """Call change(uuid) for each image, and say `done` of it."""
    for uuid in uuids:
        options.console.check()
        text = label(config, uuid)
        change(uuid)
        options.console.say(f"{done} image {text}")
    return 0


def run_state(config, options):
    """Enable or disable images: all of them are checked before the first is changed."""
    publisher = Publisher(config)
    uuids = list(dict.fromkeys(map(checked_uuid, options.uuid)))
    for uuid in uuids:
        publisher.manifest(uuid)
    return change_images(config, options, uuids, getattr(publisher, options.command),
                         options.command.capitalize() + "d")


def run_update(config, options):
    uuid = checked_uuid(options.uuid)
    Publisher(config).update(uuid, given_fields(options.words))
    options.console.say(f"Updated image {label(config, uuid)}")
    return 0


def run_delete(config, options):
    """Delete images: all of them are checked before the first is deleted."""
    publisher = Publisher(config)
    uuids = list(dict.fromkeys(map(checked_uuid, options.uuid)))
    origins = {}
    others = {} if options.force else publisher.dependents()
    for uuid in uuids:
        if not any(os.path.isdir(os.path.join(config.serve_dir, prefix + uuid))
                   for prefix in ("", INCOMING)):
            raise not_found(f"image {uuid} not found")
        publisher.refuse_dependents(uuid, [other for other in others.get(uuid, ())
                                          if other not in uuids],
                                    ": --force deletes it all the same")
        origins.update(dict.fromkeys(others.get(uuid, ()), uuid))

    def depth(uuid):                      # of a chain of origins; a cycle is cut at its length
        count = 0
        while uuid in origins and count < len(origins):
            uuid, count = origins[uuid], count + 1
        return count
    uuids.sort(key=depth, reverse=True)   # an image before the one that it builds on
    return change_images(config, options, uuids,
                         lambda uuid: publisher.delete(uuid, options.force), "Deleted")


def run_prune(config, options):
    """Delete all but the newest images of each name and channel, if no other builds on them."""
    publisher, groups, kept = Publisher(config), {}, set()
    images = [image for image in Inventory(config).images if image.state != "unactivated"
              and options.name in (None, image.name)]
    if options.name is not None and not images:
        raise UserError(f"there is no image {options.name!a}")
    for image in reversed(images):        # the newest first
        for channel in image.channels if config.channels and image.channels else (None,):
            group = groups.setdefault((image.name, channel), [])
            if len(group) < options.keep:             # so that N that can be imported stay
                kept.add(image.uuid)
                group += [image] if image.state == "active" else []
    others = publisher.dependents()
    doomed = [image.uuid for image in images
              if image.uuid not in kept and image.uuid not in others]
    return change_images(config, options, doomed,
                         (lambda uuid: None) if options.dry_run else publisher.delete,
                         "Would delete" if options.dry_run else "Deleted")


def check_config(config, options):
    """Say whether a server would start with this configuration, as `nginx -t` does.

    The same sentences and statuses; but an address in use is none of its mistakes.
    """
    log, note, say = Log("warn"), "", options.console.say
    try:
        for server in start(config, log).servers:
            server.server_close()
    except AddressInUse as error:
        note = f" ({error}: the server that runs, perhaps)"
    say("configuration: " + (os.path.abspath(config.path) if config.path else
                             f"the defaults, as there is no {default_config()}"))
    say(f"serve_dir: {config.serve_dir}")
    say("listen_port: " + ", ".join(map(listen_text, config.listen_port)))
    warnings = log.counts["warn"]
    say((f"the server would start, with {warnings} warning{'s' * (warnings > 1)}" if warnings
         else "the configuration is right") + terminal_text(note))
    return 0


def run_config(config, options):
    """Write a creator's and a vendor's UUID into config.json, unless it has them."""
    if options.check:
        return check_config(config, options)
    path, values = os.path.abspath(options.config or default_config()), {}
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        values = parse_json(file.read())  # main has read it, so that it is sound
    creator, vendor = made = [values.get(key) or new_uuid() for key in CREATOR_KEYS]
    if made != [values.get(key) for key in CREATOR_KEYS]:
        values.update(zip(CREATOR_KEYS, made))
        replace_file(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
    options.console.say(f"creator {creator}, vendor {vendor}")
    return 0


def ask_password(name, console) -> bytes:
    """A new password from the terminal, or a line of standard input.  Raises UserError."""
    if os.isatty(0):
        import getpass
        try:
            with console.interrupting():  # getpass lets the terminal echo again
                password, again = (getpass.getpass(f"{text} for {name}: ").encode(
                    "utf-8", "surrogateescape") for text in ("Password", "Again, the password"))
        except EOFError:
            raise UserError("no password was given")
        if password != again:
            raise UserError("the two passwords differ: nothing was changed")
    else:
        line = read_to_end(open_input(None, console), PASSWORD_LIMIT, b"\n")
        password = line.partition(b"\n")[0].removesuffix(b"\r")
    if not 1 <= len(password) <= PASSWORD_LIMIT or b"\0" in password:
        raise UserError(f"a password has 1 to {PASSWORD_LIMIT} bytes, and no NUL")
    return password


def run_user(config, options):
    """List the users, or make, change or delete one."""
    path, name = config.users, options.name
    if not path:
        raise UserError("the configuration names no file for users: add the line "
                        f'"users": "users", to {options.config or default_config()}', EXIT_CONFIG)
    config.check_serve_dir()
    users = read_users(path) if os.path.lexists(path) else {}
    if options.delete and options.rights or name is None and (options.delete or options.rights):
        raise UserError("say the NAME of the user, and either --rights or --delete", 2)
    if name is None:
        for user in users.values():
            options.console.say(f"{user.name} {user.rights}")
        return 0
    if not re.fullmatch(_USER_NAME, name):
        raise UserError(f"{name!a} is no name for a user: 1 to 64 letters, digits and . _ @ -", 2)
    if options.delete and name not in users:
        raise UserError(f"there is no user {name}")
    password = None
    if not options.delete and not (options.rights and name in users):
        password = ask_password(name, options.console)
    # Another command may change the file while a password is typed.
    lock = lock_directory(os.path.dirname(os.path.realpath(path)),
                          UserError(f"somebody else changes {path}"), LOCK_PATIENCE)
    try:
        users = read_users(path) if os.path.lexists(path) else {}
        user = users.pop(name, None)
        if not options.delete:
            if user is None and password is None:
                raise UserError(f"there is no user {name} any more")
            user = user or User(name, "read", b"", b"")
            salt = os.urandom(SALT_SIZE) if password else user.salt
            users[name] = User(name, options.rights or user.rights, salt,
                               hash_password(password, salt) if password else user.hash)
        write_users(path, users, config.serve_dir)
    finally:
        if lock is not None:
            os.close(lock)
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
</service_bundle>"""


# Runs it as __main__ from __pycache__, where `make` compiles it: compiling costs each start 8 MiB
# that never come back.  Isolated, so that no module comes from the working directory.
SMF_START = ("__file__ = 'imgserver.py'; from importlib.machinery import SourceFileLoader as L; "
             "exec(L('imgserver', __file__).get_code('imgserver'))")


def smf_credential(options):
    """(user, group) of the service: as the options say, else the manifest that is there.

    A line on stderr names a user that may surprise the operator.
    """
    import pwd
    user, group = options.user, ":default"
    if not user:
        with contextlib.suppress(OSError, ValueError, AttributeError), open(
                os.path.join(os.path.dirname(default_config()), "image-server.smf.xml"),
                encoding="utf-8") as file:
            user, group = map(html.unescape, re.search(
                '<method_credential user="([^"]*)" group="([^"]*)"', file.read()).groups())
    with contextlib.suppress(KeyError):
        user = user or pwd.getpwuid(os.getuid()).pw_name
    user = user or str(os.getuid())       # which SMF takes as well as a name
    try:
        uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        uid = None
        options.console.complain(f"there is no user {user}, who is to run the service: make one, "
                                 "or name another with --user")
    if uid == 0:
        options.console.complain("the service would run as root: name another user with --user "
                                 "(make SMF_FLAGS='--user U --group G')")
    return user, options.group or group


def run_smf(config, options):
    """Print the SMF manifest for this directory, this user and this Python."""
    directory = os.path.abspath(options.directory or os.path.dirname(__file__))
    words = [] if not options.config else ["--config", os.path.abspath(options.config)]
    if options.dir is not None:
        words += ["--dir", config.serve_dir]
    for address in options.listen or []:
        words += ["--listen", address]
    if options.loglevel is not None:
        words += ["--loglevel", options.loglevel]
    python = shlex.quote(options.python or sys.executable)
    command = " ".join([python, f'-IS -c "{SMF_START}"', *map(shlex.quote, words)])
    privileges = "basic,!file_link_any,!proc_info,!proc_session"
    if any(not isinstance(address, str) and address[1] < 1024 for address in config.listen_port):
        privileges += ",net_privaddr"
    user, group = smf_credential(options)
    values = {"directory": directory, "user": user, "group": group,
              "privileges": privileges, "command": command.replace("%", "%%"),
              "stop": int(config.drain_time) + 30}
    options.console.say(SMF_MANIFEST.format(
        **{key: html.escape(str(value), quote=False).replace('"', "&quot;")
           for key, value in values.items()}))
    return 0


def default_config() -> str:
    """The path of the config.json beside this file."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "config.json")


class CommandParser(argparse.ArgumentParser):
    """Refuses unknown options itself, with the usage of its command, not that of all.

    A list of UUIDs may go on behind an option.
    """

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if isinstance(getattr(namespace, "uuid", None), list) and "-" not in [
                word[:1] for word in unknown]:
            namespace.uuid, unknown = namespace.uuid + unknown, []
        if unknown:
            self.error("unrecognized arguments: " + " ".join(unknown))
        return namespace, unknown


def at_least_one(text) -> int:
    """The N of --keep.  Raises ArgumentTypeError, which the parser reports."""
    if not is_count(text):
        raise argparse.ArgumentTypeError(f"must be a number from 1 on, not {text!a}")
    return int(text)


GIVEN = {"default": argparse.SUPPRESS}        # may stand before the command, too
EVERYWHERE = (
    ("--config FILE  the configuration (default: config.json beside imgserver.py)", GIVEN),
    ("--dir DIR  the directory of images (default: serve_dir of the configuration)", GIVEN))
SERVING = (
    ("--listen PORT|ADDRESS:PORT|/PATH  where to listen: TCP, or a Unix socket; port 0 takes any; "
     "may be repeated (default: listen_port of the configuration, 80)",
     {"action": "append", **GIVEN}),
    (f"--loglevel LEVEL  least level to log: {', '.join(LEVELS)} (default: loglevel of the "
     "configuration, info)", GIVEN))
IMPORTING = (
    "--manifest FILE  take the fields from this manifest",
    "--file FILE  read the image from FILE",
    "--uuid UUID  its uuid (default: a new one)",
    "--origin UUID  the image an incremental one builds on",
    "--os OS  its operating system (default: smartos)",
    "--type TYPE  its type (default: zone-dataset)",
    "-n --no-activate  leave it unactivated, for `activate` or `discard`",
    "--no-stream-check  it is no ZFS send stream",
    "-q --quiet  no progress on a terminal",
    ("WORD  the image; any field of a manifest, as JSON or a text",
     {"dest": "words", "metavar": "NAME VERSION DESCRIPTION [FIELD=VALUE ...]",
      "nargs": argparse.REMAINDER}))
MIRRORING = (
    "URL  http[s]://[USER:PASSWORD@]HOST[:PORT], with /datasets at its end for DSAPI, or a "
    "directory of images",
    "[UUID...]  these images, and their origins",
    "--name NAME  images of this name, or with ~PART in it",
    "--version VERSION  of this version, or with ~PART in it",
    "--os OS  of this operating system",
    "--type TYPE  of this type",
    "--channel CHANNEL  in this channel of the other server",
    ("--latest K  the K newest of each name", {"type": at_least_one}),
    "--all  all that are listed there",
    "--ca FILE  certificates to trust, as PEM",
    "--insecure  trust any certificate",
    "-n --dry-run  print what would come, with sizes",
    "--no-stream-check  take files that are no ZFS send streams",
    "-q --quiet  print nothing but errors")
WORDS = {"dest": "words"}

# name, function, its use of the images ("reads", "writes" or ""), help, example, options
COMMANDS = (
    ("serve", run_serve, "", "serve the images (the default)", "--listen 8080 --dir /images",
     SERVING),
    ("import", run_import, "writes", "publish an image, read from standard input",
     "web 1.2.0 'Web server' < web.zfs.gz", IMPORTING),
    ("mirror", run_mirror, "writes", "bring images of another server, with those they build on",
     "https://images.smartos.org --name base-64-lts --latest 1", MIRRORING),
    ("activate", run_step, "writes", "put an unactivated image on show", EXAMPLE, ("UUID",)),
    ("discard", run_step, "writes", "throw an image away that is not active", EXAMPLE, ("UUID",)),
    ("list", run_list, "reads", "list the images, and their problems below",
     "name=~web state=disabled", (
         ("[FIELD=VALUE...]  only those that have it: name=web, name=~part, type=!zvol, "
          "tag.role=db; fields: " + ", ".join(LIST_FILTERS), WORDS),
         "-j --json  their manifests, as JSON",
         "-p --parsable  the columns alone, whole and with a tab between them, for cut -f",
         "--problems  only the problems; exit status 1 where there are any")),
    ("enable", run_state, "writes", "let disabled images be listed and imported again", EXAMPLE,
     ("UUID...",)),
    ("disable", run_state, "writes", "take images off the lists; running downloads go on",
     EXAMPLE, ("UUID...",)),
    ("delete", run_delete, "writes", "delete images; running downloads go on", EXAMPLE,
     ("UUID...", "--force  even where other images build on them")),
    ("update", run_update, "writes", "change fields of the manifest of an image",
     f"{EXAMPLE} 'description=Web server' homepage=",
     ("UUID", ("FIELD=VALUE...  as for import; FIELD= removes it", WORDS))),
    ("prune", run_prune, "writes", "delete old images: all but the newest of each name (and "
     "channel), if no other builds on them", "--keep 3 -n", (
         ("--keep N  how many of each name stay, 1 or more",
          {"type": at_least_one, "required": True}),
         "--name NAME  only the images of this name",
         "-n --dry-run  delete none, but name those that would go")),
    ("check", run_check, "reads", "read every image again, and compare with its manifest",
     "--fast -q", (
         "[UUID...]  only these images",
         "--fast  compare manifests, sizes, first bytes and origins only",
         "--record  write missing sizes and hashes of sound images into their manifests",
         "--clean  remove images that were never finished, a day after their last change",
         "-q --quiet  print nothing when all is well, and no progress")),
    ("user", run_user, "", "list the users, or make, change or delete one; a password is asked "
     "for, or is a line of standard input", "joe --rights publish", (
         "[NAME]",
         ("--rights RIGHTS  read, publish or manage: what NAME may do, each with those before it "
          "(default: read); the password of one who is there stays", {"choices": RIGHTS}),
         "--delete  delete NAME")),
    ("config", run_config, "", "write creator and vendor UUIDs into config.json, once", "--check",
     ("--check  write nothing, but say whether the server would start",)),
    ("smf", run_smf, "", "print the SMF manifest for this directory and Python",
     "--user imgserver --group imgserver > image-server.smf.xml", (
         "--directory DIRECTORY  where imgserver.py is installed (default: here)",
         "--python PYTHON  the interpreter (default: this one)",
         "--user USER  who runs it (default: you)",
         "--group GROUP  the group (default: the user's)")),
    # For the script import-image alone, which passes everything on: not listed.
    ("import-image", run_import_image, "writes", "publish an image, read from standard input",
     "--dir /images web 1.2.0 'Web server' < web.zfs.gz", (
         *IMPORTING,
         "-a  activate an image that -n has left: -a UUID",
         "-d  discard an image that is not active, or was never finished: -d UUID",
         "-p  print the Python that is used: $PYTHON, or the newest in /opt/local/bin, or "
         "python3")))
IMPORT_USAGE = ("%(prog)s [OPTION ...] NAME VERSION DESCRIPTION [FIELD=VALUE ...] < IMAGE\n"
                "       %(prog)s [OPTION ...] --manifest FILE [FIELD=VALUE ...] < IMAGE")


def add_options(parser, options):
    """Add options and words to a parser, each "USAGE  HELP", or that and more for add_argument.

    USAGE as --help has it: "-q --quiet", "--file FILE"; or "UUID", "[NAME]", "UUID...".
    """
    for option in options:
        option, settings = option if isinstance(option, tuple) else (option, {})
        usage, _, text = option.partition("  ")
        *names, last = usage.split()
        found = {"help": text}
        if last[0] == "-":
            names.append(last)
            found["action"] = "store_true"
        else:
            found["metavar"] = last.strip("[.]")
        if not names:
            found["dest"] = found["metavar"].lower()
            found["nargs"] = {"[X]": "?", "[X...]": "*", "X...": "+"}.get(
                last.replace(found["metavar"], "X"))
        parser.add_argument(*names, **{**found, **settings})


def option_parser() -> argparse.ArgumentParser:
    """The parser of the command line; `run` of its result is the command's function."""
    parser = argparse.ArgumentParser(
        prog="imgserver.py",
        description="An image server for SmartOS: serves a directory of images to imgadm.",
        epilog="Without a command it serves.  `imgserver.py COMMAND --help` tells more.")
    parser.set_defaults(run=run_serve, use="")
    add_options(parser, EVERYWHERE + SERVING)
    parser.add_argument("--version", action="version", help="print the version",
                        version=f"imgserver {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", dest="command",
                                     parser_class=CommandParser)
    for name, run, use, text, example, options in COMMANDS:
        program = name if name == "import-image" else f"imgserver.py {name}"
        sub = commands.add_parser(
            name, prog=program, usage=IMPORT_USAGE if name.startswith("import") else None,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {program} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **({} if name == "import-image" else {"help": text}))
        sub.set_defaults(run=run, use=use)
        add_options(sub, EVERYWHERE + options)
    return parser


def load_config(options) -> Config:
    """The configuration file with the command line's options over it.  Raises UserError."""
    config = Config.load(options.config or default_config(), options.config is not None)
    if options.dir == "":
        raise UserError("--dir must name the directory of images (serve_dir), not ''", EXIT_CONFIG)
    if options.use and config.path is None and options.dir is None:
        raise UserError(f"there is no {default_config()} that names the directory of images: "
                        "say --dir DIR", EXIT_CONFIG)
    if options.dir is not None:
        config.serve_dir = os.path.abspath(options.dir)
    for option, key, check in (
            ("listen", "listen_port", lambda words: parse_listen(words, any_port=True)),
            ("loglevel", "loglevel", SETTINGS["loglevel"][1])):
        value = getattr(options, option)
        try:
            if value is not None:
                setattr(config, key, check(value))
        except ValueError as error:
            given = value if isinstance(value, str) else ", ".join(value)
            raise UserError(f"--{option} {error}, not {given!a}", EXIT_CONFIG)
    return config


def error_text(error) -> str:
    """The sentence of an error: each field that is wrong, and the path that a disk refused."""
    text, errors, cause = str(error), getattr(error, "errors", None), error.__cause__
    if errors and all("message" in each for each in errors):
        text = "; ".join(each["message"] if each["field"] in each["message"] else
                         f"{each['field']}: {each['message']}" for each in errors)
    if isinstance(cause, OSError) and os.path.isabs(cause.filename or ""):
        text += f" ({cause.filename})"
    return text


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
    console = options.console = Console(getattr(options, "quiet", False))
    message, status = None, 1
    try:
        config = load_config(options)
        if options.run is not run_serve:
            console.arm()
        status = options.run(config, options)
    except (UserError, ApiError) as error:
        message, status = error_text(error), getattr(error, "exit_status", 1)
    except OSError as error:              # commands make an ApiError of theirs, but for say
        message = str(error.strerror or error)
    except Exception as error:            # no thread, no memory, or a mistake in this file
        here = main.__code__.co_filename
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == here]
        message = f"{type(error).__name__}: {error} (line {lines[-1]} of imgserver.py)"
    if message is None:                   # no signal changes the exit status any more
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    elif status != 128 + signal.SIGPIPE or options.use == "writes":       # not after `list | head`
        console.complain(message)
    return status


if __name__ == "__main__":
    sys.exit(main())
