"""mkimg: what it asks of the global zone and of the server, and what it leaves behind.

vmadm, imgadm, zfs, json and ssh are stand-ins that note what they were asked, and keep the
state of the VM and of the snapshots in files; ssh runs its command in a shell here, so that
the real import-image takes the image.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

from tests import streams
from tests.support import (IMGSERVER, PATIENCE, ROOT, ServerCase, default_signals, need, uuid_of,
                           wait_for)

MKIMG = os.path.join(ROOT, "mkimg")
SHELLS = {"dash": ["dash"], "ksh93": ["ksh93"], "bash": ["bash"], "busybox": ["busybox", "sh"]}
VM, IMAGE = uuid_of(1), uuid_of(2)
WORDS = ("web", "1.0", "A web server")

# Each begins with a line for the log, in one write, since several run at once: its name, and
# its arguments in brackets.
NOTE = """#!/bin/sh
line=${0##*/}
for word; do line="$line <$word>"; done
printf '%s\\n' "$line" >> "$STAND/log"
cd "$STAND"
if [ -e "fail-${0##*/}-$1" ]; then exit 1; fi
"""
STAND_INS = {
    "vmadm": NOTE + """
[ "$2" = "$VM" ] || { echo "No such vm: $2" >&2; exit 1; }
case $1 in
    get) sed "s/STATE/$(cat state)/" vm.json ;;
    stop) echo stopped > state ;;
    start) echo running > state ;;
esac
""",
    "imgadm": NOTE + """cat image.json""",
    "zfs": NOTE + """
for last; do :; done
case $1 in
    snapshot) echo "$2" >> snapshots ;;
    destroy) grep -vxF "$2" snapshots > left; mv left snapshots ;;
    list) grep -xF "$last" snapshots || exit 1 ;;
    get) cat origin ;;
    send)
        if [ -e hang ]; then head -c 400 stream; echo $$ > sending; exec sleep 60; fi
        if [ -e half ]; then head -c 400 stream; exit 1; fi
        cat stream
        if [ -e late ]; then exit 1; fi ;;
esac
""",
    "ssh": NOTE + """
[ "$1" = -n ] && { shift; exec < /dev/null; }
if [ -e "no-ssh" ]; then cat > /dev/null; exit 255; fi
case $2 in
    *"'-a'"*)
        [ ! -e no-activate ] || exit 1
        if [ -e slow ]; then
            sh -c "$2" || exit
            echo > activated
            until [ -e go ]; do sleep 0.05; done
            exit 0
        fi ;;
esac
exec sh -c "$2"
""",
    "json": f"""#!{sys.executable} -SE
import json, sys
value = json.load(sys.stdin)
for key in sys.argv[1].split("."):
    try:
        value = value[int(key)] if isinstance(value, list) else value[key]
    except (LookupError, TypeError):
        value = None
if value is not None:
    print(value if isinstance(value, str) else json.dumps(value, indent=2))
""",
}
ZONE = {"uuid": VM, "brand": "joyent", "state": "STATE", "zfs_filesystem": "zones/" + VM,
        "image_uuid": IMAGE}
DISK = {"path": f"/dev/zvol/rdsk/zones/{VM}-disk0", "zfs_filesystem": f"zones/{VM}-disk0",
        "image_uuid": IMAGE, "size": 10240, "model": "virtio", "boot": True}
BHYVE = {"uuid": VM, "brand": "bhyve", "state": "STATE", "bootrom": "uefi", "disks": [DISK],
         "nics": [{"model": "e1000"}]}


class MkimgCase(ServerCase):

    def setUp(self):
        super().setUp()
        need("bzip2", "xz")
        self.stand = os.path.join(self.directory, "stand")
        self.bin = os.path.join(self.stand, "bin")
        os.makedirs(self.bin)
        for name, text in STAND_INS.items():
            path = os.path.join(self.bin, name)
            with open(path, "w") as file:
                file.write(text)
            os.chmod(path, 0o755)
        # The server's side, in a directory whose name must be quoted to get there.
        self.importer = os.path.join(self.directory, "it's a $(server)")
        os.mkdir(self.importer)
        for path in (IMGSERVER, os.path.join(ROOT, "import-image")):
            shutil.copy(path, self.importer)
        with open(os.path.join(self.importer, "config.json"), "w") as file:
            json.dump({"serve_dir": self.serve_dir}, file)
        self.temporary = os.path.join(self.directory, "tmp")
        os.mkdir(self.temporary)
        self.vm(ZONE)
        self.put("image.json", json.dumps({"manifest": {"os": "smartos", "uuid": IMAGE}}))
        self.put("stream", streams.stream())
        self.put("state", "running\n")
        self.put("snapshots", f"zones/{VM}@image\n")

    def put(self, name, data=b""):
        data = data if isinstance(data, bytes) else data.encode()
        with open(os.path.join(self.stand, name), "wb") as file:
            file.write(data)

    def take(self, name):
        with open(os.path.join(self.stand, name), encoding="utf-8") as file:
            return file.read()

    def vm(self, record):
        self.put("vm.json", json.dumps(record))

    def environment(self):
        return {"PATH": self.bin + ":/usr/bin:/usr/sbin", "STAND": self.stand, "VM": VM,
                "IMGSERVER": "img.example.com", "IMPORTPATH": self.importer, "LOGIN": "admin",
                "TMPDIR": self.temporary, "PYTHON": sys.executable}

    def start(self, *words, shell=(), **changes):
        environment = {**self.environment(), **changes}
        return subprocess.Popen(
            [*shell, MKIMG, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, encoding="utf-8", cwd=self.directory,
            preexec_fn=default_signals,
            env={key: value for key, value in environment.items() if value is not None})

    def mkimg(self, *words, **options):
        """Run it; returns (exit status, stdout, stderr), after a look at what is left."""
        process = self.start(*words, **options)
        output, errors = process.communicate(timeout=PATIENCE * 3)
        self.assertLeftAsItWas()
        return process.returncode, output, errors

    def assertLeftAsItWas(self):
        """No snapshot but the one that was there before, no temporary file, none hacked."""
        self.assertEqual(self.take("snapshots"), f"zones/{VM}@image\n")
        self.assertEqual(os.listdir(self.temporary), [])
        self.assertEqual(sorted(os.listdir(self.directory)),
                         ["images", "it's a $(server)", "stand", "tmp"])

    def asked(self, name):
        """The argument lists that a stand-in was called with."""
        text = self.take("log") if os.path.exists(os.path.join(self.stand, "log")) else ""
        return [re.findall(r"<([^>]*)>", line) for line in text.splitlines()
                if line.startswith(name + " ")]

    def published(self, *words, **options):
        """Publish, and return the manifest of the one image that is there."""
        status, output, errors = self.mkimg(*words, **options)
        self.assertEqual(status, 0, errors)
        uuid, line = output.splitlines()[-2:]
        self.assertEqual(line, f"imgadm import {uuid}")
        self.assertIn(uuid, os.listdir(self.serve_dir))
        with open(os.path.join(self.serve_dir, uuid, "manifest.json")) as file:
            return json.load(file)

    def assertNothing(self, result, pattern, status=1):
        """It failed, said why, and nothing is on the server."""
        self.assertEqual((result[0], result[1]), (status, ""), result[2])
        self.assertRegex(result[2], pattern)
        self.assertEqual(os.listdir(self.serve_dir), [])


class TestPublish(MkimgCase):
    seconds = 12

    def test_a_running_zone_under_every_shell(self):
        for name, shell in SHELLS.items():
            if not shutil.which(shell[0]):
                continue
            with self.subTest(shell=name):
                self.put("log")
                self.put("state", "running\n")
                manifest = self.published(VM, *WORDS, shell=shell)
                self.assertEqual((manifest["name"], manifest["version"], manifest["description"],
                                  manifest["type"], manifest["os"]),
                                 (*WORDS, "zone-dataset", "smartos"))
                self.assertEqual(manifest["files"][0]["compression"], "gzip")
                self.assertEqual([words[0] for words in self.asked("vmadm")
                                  if words[0] != "get"], ["stop", "start"])
                self.assertEqual(self.take("state"), "running\n")
                [snapshot] = [words[1] for words in self.asked("zfs") if words[0] == "snapshot"]
                self.assertIn(["send", snapshot], self.asked("zfs"))
                self.assertEqual([words[1] for words in self.asked("zfs")
                                  if words[0] == "destroy"], [snapshot])
                self.assertTrue(all("admin@img.example.com" in words
                                    for words in self.asked("ssh")))

    def test_a_stopped_zone_is_neither_stopped_nor_started(self):
        self.put("state", "stopped\n")
        self.published(VM, *WORDS)
        self.assertEqual({words[0] for words in self.asked("vmadm")}, {"get"})

    def test_k_keeps_it_stopped(self):
        self.published("-k", VM, *WORDS)
        self.assertEqual(self.take("state"), "stopped\n")

    def test_every_compression(self):
        for kind in streams.PACKERS:
            with self.subTest(kind=kind):
                manifest = self.published("-c", kind, VM, *WORDS)
                self.assertEqual(manifest["files"][0]["compression"], kind)

    def test_hostile_descriptions(self):
        for text in ("it's $(touch hacked) `touch hacked`", "'; touch hacked; '\\'\"\\",
                     "a\nb\n\n", "-n", "", "* \u00e9 !! ${HOME} ~" + "x" * 2000):
            with self.subTest(text=text):
                self.assertEqual(self.published(VM, "web", "1", text)["description"], text)

    def test_what_the_image_says_of_itself_is_kept(self):
        self.put("image.json", json.dumps({"manifest": {
            "requirements": {"networks": [{"name": "net0", "description": "it's public"}]},
            "users": [{"name": "root"}], "generate_passwords": True}}))
        manifest = self.published(VM, *WORDS)
        self.assertEqual(manifest["requirements"]["networks"][0]["description"], "it's public")
        self.assertEqual((manifest["users"], manifest["generate_passwords"]),
                         ([{"name": "root"}], True))

    def test_an_image_that_is_gone(self):
        self.put("fail-imgadm-get")
        self.assertNotIn("requirements", self.published(VM, *WORDS))

    def test_lx(self):
        self.vm({**ZONE, "brand": "lx", "kernel_version": "4.3.0"})
        manifest = self.published(VM, *WORDS)
        self.assertEqual((manifest["type"], manifest["os"], manifest["requirements"],
                          manifest["tags"]),
                         ("lx-dataset", "linux", {"brand": "lx"}, {"kernel_version": "4.3.0"}))

    def zvol_fields(self, manifest):
        return [manifest[key] for key in ("type", "image_size", "cpu_type", "disk_driver",
                                          "nic_driver", "os")]

    def test_bhyve(self):
        self.vm(BHYVE)
        self.put("stream", streams.stream(kind=streams.ZVOL))
        self.put("image.json", json.dumps({"manifest": {"os": "linux"}}))
        manifest = self.published(VM, *WORDS)
        self.assertEqual(self.zvol_fields(manifest),
                         ["zvol", 10240, "host", "virtio", "e1000", "linux"])
        self.assertEqual(manifest["requirements"], {"brand": "bhyve", "bootrom": "uefi"})
        self.assertTrue([words for words in self.asked("zfs") if words[0] == "send"][0][1]
                        .startswith(f"zones/{VM}-disk0@"))

    def test_kvm_on_an_older_platform(self):
        disk = {"path": DISK["path"], "size": 5120, "model": "ide"}
        self.vm({**BHYVE, "brand": "kvm", "disks": [disk], "nics": [], "bootrom": None})
        self.put("stream", streams.stream(kind=streams.ZVOL, order=">"))
        manifest = self.published(VM, *WORDS)
        self.assertEqual(self.zvol_fields(manifest),
                         ["zvol", 5120, "qemu64", "ide", "virtio", "other"])
        self.assertNotIn("requirements", manifest)

    def incremental(self, snapshots):
        """Publish an incremental image of the VM; returns the zfs send that was run."""
        subprocess.run([os.path.join(self.importer, "import-image"), "--uuid", IMAGE, *WORDS],
                       input=streams.stream(guid=5), env=self.environment(), check=True,
                       stdout=subprocess.DEVNULL)
        self.put("stream", streams.stream(guid=6, from_guid=5))
        self.put("origin", f"zones/{IMAGE}@{VM}\n")
        for line in snapshots:
            self.put("snapshots", line)
        process = self.start("-i", VM, *WORDS)
        output, errors = process.communicate(timeout=PATIENCE * 3)
        self.assertEqual(process.returncode, 0, errors)
        with open(os.path.join(self.serve_dir, output.split()[0], "manifest.json")) as file:
            self.assertEqual(json.load(file)["origin"], IMAGE)
        return [words for words in self.asked("zfs") if words[0] == "send"][0]

    def test_incremental_from_the_final_snapshot(self):
        send = self.incremental([f"zones/{IMAGE}@final\n"])
        self.assertEqual(send[:3], ["send", "-i", f"zones/{IMAGE}@final"])

    def test_incremental_from_the_origin_of_the_clone(self):
        send = self.incremental([])
        self.assertEqual(send[:3], ["send", "-i", f"zones/{IMAGE}@{VM}"])


class TestRefused(MkimgCase):

    def test_usage(self):
        status, output, _ = self.mkimg("-h")
        self.assertEqual(status, 0)
        self.assertIn("UUID NAME VERSION DESCRIPTION", output)
        for words in ((), (VM,), (VM, *WORDS, "more"), ("-x", VM, *WORDS), ("x", *WORDS),
                      (VM.upper().replace("0", "A"), *WORDS), ("../" + VM, *WORDS),
                      ("-" * 36, *WORDS), (VM + "\n", *WORDS), ("-c", "lzma", VM, *WORDS),
                      (VM, "", "1", "x"), (VM, "a+b", "1", "x"), (VM, "web", "1 0", "x"),
                      (VM, "web", "", "x"), (VM, "\u00e9", "1", "x")):
            with self.subTest(words=words):
                self.assertNothing(self.mkimg(*words), "usage:", 2)
        self.assertNothing(self.mkimg(VM, *WORDS, IMGSERVER=None), "IMGSERVER is not set", 2)
        self.assertFalse(self.asked("vmadm") + self.asked("ssh"))

    def test_vms_that_cannot_be_imaged(self):
        cases = (
            ({**ZONE, "state": "provisioning"}, "is provisioning"),
            ({**ZONE, "state": "failed"}, "is failed"),
            ({**ZONE, "state": None}, "no known state"),
            ({**ZONE, "brand": "lx", "docker": True}, "docker"),
            ({**ZONE, "brand": "sn1"}, "brand sn1"),
            ({**ZONE, "zfs_filesystem": None}, "no data set"),
            ({**BHYVE, "disks": [DISK, DISK]}, "several disks"),
            ({**BHYVE, "disks": []}, "no data set"),
            ({**BHYVE, "disks": [{"path": "/dev/dsk/c0t0d0"}]}, "no zvol"),
            ({**BHYVE, "disks": [{**DISK, "size": None}]}, "size of its disk"),
        )
        for record, pattern in cases:
            with self.subTest(pattern=pattern):
                self.vm(record)
                self.assertNothing(self.mkimg(VM, *WORDS), pattern)
        self.assertEqual({words[0] for words in self.asked("vmadm")}, {"get"})

    def test_no_such_vm(self):
        self.assertNothing(self.mkimg(uuid_of(9), *WORDS), "there is no VM")

    def test_incremental_of_what_is_no_clone(self):
        self.put("origin", "-\n")
        self.assertNothing(self.mkimg("-i", VM, *WORDS), "is no clone")
        self.vm({**ZONE, "image_uuid": None})
        self.assertNothing(self.mkimg("-i", VM, *WORDS), "was not made from an image")

    def test_the_server_is_asked_before_the_vm_is_stopped(self):
        self.put("no-ssh")
        self.assertNothing(self.mkimg(VM, *WORDS), "does not work on admin@img.example.com")
        self.assertEqual({words[0] for words in self.asked("vmadm")}, {"get"})


class TestTrouble(MkimgCase):
    seconds = 12

    def test_each_step_may_fail(self):
        cases = (
            ("fail-vmadm-stop", "cannot stop VM"),
            ("fail-zfs-snapshot", "cannot snapshot"),
            ("fail-zfs-send", "zfs send has failed"),
            ("half", "zfs send has failed"),
            ("late", "zfs send has failed"),          # the stream is whole, the status is not
            ("no-activate", "activating image .* has failed"),
        )
        for name, pattern in cases:
            for compression in ("gzip", "none") if name in ("half", "late") else ("gzip",):
                with self.subTest(name=name, compression=compression):
                    self.put("state", "running\n")
                    self.put(name)
                    self.assertNothing(self.mkimg("-c", compression, VM, *WORDS), pattern)
                    self.assertEqual(self.take("state"), "running\n")
                    os.unlink(os.path.join(self.stand, name))

    def test_the_compressor_fails(self):
        path = os.path.join(self.bin, "gzip")
        with open(path, "w") as file:
            file.write("#!/bin/sh\n/usr/bin/gzip\nexit 1\n")
        os.chmod(path, 0o755)
        self.assertNothing(self.mkimg(VM, *WORDS), "gzip has failed")

    def test_the_server_refuses_the_stream(self):
        self.put("stream", b"this is no stream")
        result = self.mkimg(VM, *WORDS)
        self.assertNothing(result, "import-image on img.example.com has failed")
        self.assertIn("it is no ZFS send stream", result[2])

    def test_a_vm_that_does_not_start_again_is_told(self):
        self.put("fail-vmadm-start")
        status, _, errors = self.mkimg(VM, *WORDS)
        self.assertEqual(status, 0)
        self.assertIn(f"cannot start VM {VM}", errors)

    def test_signals(self):
        self.put("hang")
        for name, shell in SHELLS.items():
            if not shutil.which(shell[0]):
                continue
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                with self.subTest(shell=name, number=number):
                    self.put("state", "running\n")
                    self.put("sending")
                    process = self.start(VM, *WORDS, shell=shell)
                    wait_for(lambda: self.take("sending").strip(), "zfs send")
                    sender = int(self.take("sending"))
                    process.send_signal(number)
                    output, errors = process.communicate(timeout=PATIENCE)
                    self.assertEqual((process.returncode, output), (128 + number, ""), errors)
                    self.assertLeftAsItWas()
                    self.assertEqual(self.take("state"), "running\n")
                    self.assertRaises(ProcessLookupError, os.kill, sender, 0)
                    wait_for(lambda: os.listdir(self.serve_dir) == [], "the server's clean-up")

    def test_an_interrupt_while_it_activates_comes_too_late(self):
        need("setsid")
        for name, shell in SHELLS.items():
            if not shutil.which(shell[0]):
                continue
            with self.subTest(shell=name):
                self.put("slow")
                process = self.start(VM, *WORDS, shell=("setsid", *shell))
                wait_for(lambda: os.path.exists(os.path.join(self.stand, "activated")),
                         "the activation")
                os.killpg(process.pid, signal.SIGINT)        # as a terminal does
                self.put("go")
                output, errors = process.communicate(timeout=PATIENCE)
                self.assertEqual(process.returncode, 0, errors)
                self.assertIn(output.split()[0], os.listdir(self.serve_dir))
                for left in ("activated", "go", "slow"):
                    os.unlink(os.path.join(self.stand, left))

    def test_it_is_quoted_once_for_the_server(self):
        self.published(VM, "web", "1", "it's")
        command = [words[-1] for words in self.asked("ssh") if "--type" in words[-1]][0]
        self.assertEqual(shlex.split(command)[-4:], ["--", "web", "1", "it's"])
