"""Synthetic ZFS send streams, by the record layout of OpenZFS (include/sys/zfs_ioctl.h).

    data = stream(payload=b"...")                      a full stream of a file system
    data = stream(kind=ZVOL, from_guid=7, order=">")   an incremental one of a zvol, big-endian
    data = package(stream())                           as `zfs send -p` or -R wraps it
    data = pack(data, "xz")                            compressed

The data set's blocks are not real: nothing but `zfs receive` would miss that.
"""

import bz2
import gzip
import lzma
import random
import struct

RECORD = 312                            # bytes of a record without its payload
MAGIC = 0x2F5bacbac
BEGIN, WRITE, END = 0, 3, 5             # drr_type
FILE_SYSTEM, ZVOL = 2, 3                # drr_type of BEGIN: DMU_OST_*
SUBSTREAM, COMPOUND = 1, 2              # header type in drr_versioninfo
CLONE = 1                               # drr_flags of BEGIN
RESUMING = 1 << 20                      # a feature in drr_versioninfo
GUID = 0x1122334455667788


def begin(kind, guid, from_guid, order, header=SUBSTREAM, payload=0,
          name=b"zones/test@final", features=0, flags=None):
    """A DRR_BEGIN record.  An incremental one is a clone's, unless flags say otherwise."""
    if flags is None:
        flags = CLONE if from_guid else 0
    return struct.pack(order + "IIQQQIIQQ256s", BEGIN, payload, MAGIC, header | features << 2,
                       1700000000, kind, flags, guid, from_guid, name)


def write(data, order, guid):
    """A DRR_WRITE record and its payload, which is padded to 8 bytes."""
    data += bytes(-len(data) % 8)
    return struct.pack(order + "IIQIIQQQ", WRITE, 0, 1, 19, 0, 0, len(data),
                       guid).ljust(RECORD, b"\0") + data


def end(guid, order):
    """A DRR_END record; its checksum is not real."""
    return struct.pack(order + "II32sQ", END, 0, b"\xa5" * 32, guid).ljust(RECORD, b"\0")


def stream(payload=b"some blocks", kind=FILE_SYSTEM, guid=GUID, from_guid=0, order="<", **words):
    """A whole stream of one snapshot; `words` are for its BEGIN (features, flags)."""
    return (begin(kind, guid, from_guid, order, **words) + write(payload, order, guid)
            + end(guid, order))


def package(*streams, order="<", properties=b"\1" * 96):
    """A compound stream: a list of properties, the streams, and the end of all."""
    head = begin(0, 0, 0, order, COMPOUND, len(properties)) + properties + end(0, order)
    return head + b"".join(streams) + end(0, order)


PACKERS = {
    "gzip": lambda data: gzip.compress(data, mtime=0),          # the same bytes each time
    "bzip2": bz2.compress, "xz": lzma.compress,
    "none": lambda data: data,
}
SUFFIXES = {"gzip": ".gz", "bzip2": ".bz2", "xz": ".xz", "none": ""}


def pack(data, compression="gzip"):
    """`data`, compressed as a manifest's `compression` says."""
    return PACKERS[compression](data)


def noise(size):
    """Bytes that no compressor makes smaller; the same each time."""
    return random.Random(size).getrandbits(8 * size).to_bytes(size, "big")
