"""mkimg: what it asks of the global zone and of the server, and what it leaves behind.

vmadm, imgadm, zfs, json and ssh are stand-ins that note what they were asked, and keep the
state of the VM and of the snapshots in files; ssh runs its command in a shell here, so that
the real import-image takes the image.
"""

import contextlib
import itertools
import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time

from tests import streams
from tests.support import (CHECK, PATIENCE, ROOT, Server, ServerCase, all_in_check, check_only,
                           copy_program, default_signals, need, uuid_of, wait_for, write_v2)

MKIMG = os.path.join(ROOT, "mkimg")
SHELLS = {"dash": ["dash"], "ksh93": ["ksh93"], "bash": ["bash"], "busybox": ["busybox", "sh"]}
STAMP = {"7.0": "20240102T030405Z"}      # of the platform that the stand-in for uname tells
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
    stop)
        if [ -e slow-stop ]; then
            rm slow-stop
            echo stopping > state
            (trap '' INT; sleep 0.3; echo stopped > state) > /dev/null 2>&1 &
        else
            echo stopped > state
        fi ;;
    start) echo running > state ;;
esac
""",
    "imgadm": NOTE + """cat image.json""",
    "uname": NOTE + """cat platform""",
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
[ "$1" = -o ] && shift 2
if [ -e "no-ssh" ]; then cat > /dev/null; exit 255; fi
case $2 in
    *"'--uuid'"*)
        if [ -e deaf ]; then
            echo > listening
            while [ -e deaf ]; do sleep 0.05; done
            exit 255
        fi ;;
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
    # It remembers what it has said: a Python each time would be most of what the tests cost.
    "json": """#!/bin/sh
input=
while IFS= read -r line || [ -n "$line" ]; do
    input=$input$line'
'
done
said=$SAID/$(printf '%s\\n' "$input" "$@" | cksum)
if [ ! -e "$said" ]; then
    printf '%s' "$input" | "${0%/*}/parse-json" "$@" > "$said.$$" || exit
    mv "$said.$$" "$said"
fi
while IFS= read -r line; do printf '%s\\n' "$line"; done < "$said"
""",
    "parse-json": f"""#!{sys.executable} -SE
import json, sys
value = json.load(sys.stdin)
if sys.argv[1:2] == ["-e"]:             # a change in JavaScript, of which this knows one form
    key, text = sys.argv[2].split(" = ")
    value[key[len("this."):]] = json.loads(text)
    sys.argv[1:] = []
for key in sys.argv[1].split(".") if sys.argv[1:] else ():
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


def installed():
    """The command lines of the shells that are here."""
    return [shell for shell in SHELLS.values() if shutil.which(shell[0])]


class MkimgCase(ServerCase):

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.said = tempfile.mkdtemp(prefix="imgserver-test-")
        cls.addClassCleanup(shutil.rmtree, cls.said, ignore_errors=True)

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
        copy_program(self.importer)
        shutil.copy(os.path.join(ROOT, "import-image"), self.importer)
        with open(os.path.join(self.importer, "config.json"), "w") as file:
            json.dump({"serve_dir": self.serve_dir}, file)
        self.temporary = os.path.join(self.directory, "tmp")
        os.mkdir(self.temporary)
        self.vm(ZONE)
        self.put("image.json", json.dumps({"manifest": {"os": "smartos", "uuid": IMAGE}}))
        self.put("stream", streams.stream())
        self.put("platform", f"joyent_{STAMP['7.0']}\n")
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
                "TMPDIR": self.temporary, "PYTHON": sys.executable, "SAID": self.said}

    def start(self, *words, shell=(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
              session=False, **changes):
        environment = {**self.environment(), **changes}
        return subprocess.Popen(
            [*shell, MKIMG, *words], stdin=stdin, stdout=subprocess.PIPE,
            stderr=stderr, encoding="utf-8", cwd=self.directory,
            preexec_fn=default_signals, start_new_session=session,
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
        for shell in installed():
            with self.subTest(shell=shell):
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
        for text in ("it's $(touch hacked) `touch hacked`\n'; touch hacked; '\\'\"\\\n"
                     "* \u00e9 !! ${HOME} ~" + "x" * 2000 + "\n\n", "-n", ""):
            with self.subTest(text=text):
                self.assertEqual(self.published(VM, "web", "1", text).get("description", ""), text)

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
        self.assertEqual(self.published(VM, *WORDS)["requirements"], {"min_platform": STAMP})

    def test_the_platform_that_a_smartos_zone_needs(self):
        self.put("image.json", json.dumps({"manifest": {"requirements": {
            "min_platform": {"7.0": "20140101T000000Z"}, "max_ram": 512}}}))
        self.assertEqual(self.published(VM, *WORDS)["requirements"],
                         {"min_platform": STAMP, "max_ram": 512})
        for platform in ("omnios-r151046-0123456789", "joyent_", "joyent_20240102T030405Z'",
                         "joyent_ABCDEFGHTIJKLMNZ"):
            with self.subTest(platform=platform):
                self.put("platform", platform)
                self.assertEqual(self.published(VM, *WORDS)["requirements"]["min_platform"],
                                 {"7.0": "20140101T000000Z"})

    def test_fields_of_the_user(self):
        manifest = self.published(
            VM, *WORDS, "homepage=http://x.example/$(touch hacked)'`touch hacked`",
            'tags={"role": "it\'s; touch hacked"}', "public=false", "requirements={}")
        self.assertEqual(
            (manifest["homepage"], manifest["tags"], manifest["public"],
             manifest["requirements"]),
            ("http://x.example/$(touch hacked)'`touch hacked`", {"role": "it's; touch hacked"},
             False, {}))
        self.vm({**BHYVE, "bootrom": None})
        self.put("stream", streams.stream(kind=streams.ZVOL))
        self.assertEqual(self.published(VM, *WORDS, "cpu_type=qemu64")["cpu_type"], "qemu64")

    def test_progress_on_a_terminal_alone(self):
        terminal, ours = pty.openpty()
        try:
            process = self.start(VM, *WORDS, stderr=ours)
            process.communicate(timeout=PATIENCE * 3)
            self.assertEqual(process.returncode, 0, os.read(terminal, 10000))
        finally:
            os.close(ours)
            os.close(terminal)
        self.published(VM, *WORDS)
        self.assertEqual([words[1] == "-v" for words in self.asked("zfs") if words[0] == "send"],
                         [True, False])

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
        for words in ((), (VM,), ("-x", VM, *WORDS), ("x", *WORDS),
                      (VM, *WORDS, "more"), (VM, *WORDS, "-k"),
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
        self.assertIn(f"this starts it: vmadm start {VM}", errors)

    def test_signals(self):
        self.put("hang")
        signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
        for shell, number in itertools.product(installed(), signals) if CHECK else zip(
                itertools.cycle(installed()), signals):
            with self.subTest(shell=shell, number=number):
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
        for shell in all_in_check(installed()):
            with self.subTest(shell=shell):
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
        self.put("platform", "other\n")   # no requirements, which take several lines
        self.published(VM, "web", "1", "it's")
        command = [words[-1] for words in self.asked("ssh") if "--type" in words[-1]][0]
        self.assertEqual(shlex.split(command)[-4:], ["--", "web", "1", "it's"])


# Put before each command that mkimg runs, with a PATH that leads on to the command itself:
# sends SIGNAL when it is the turn of STEP, "COMMAND, its how maniest call, before or after".
STEP = """#!/bin/sh
name=${0##*/} number=0
[ ! -e "$STAND/count-$name" ] || read -r number < "$STAND/count-$name"
number=$((number + 1))
echo $number > "$STAND/count-$name"
echo "$name $number" >> "$STAND/steps"
read -r pid < "$STAND/pid"
[ "$STEP" != "$name $number before" ] || kill -s "$SIGNAL" -- "$TO$pid"
PATH=${PATH#*:} "$name" "$@"
status=$?
[ "$STEP" != "$name $number after" ] || kill -s "$SIGNAL" -- "$TO$pid"
exit $status
"""
COMMANDS = ("curl", "vmadm", "imgadm", "zfs", "ssh", "json", "uname", "mkdir", "mkfifo", "date",
            "tail", "gzip", "rm", "od", "tr", "sed")
SIGNALS = ("INT", "TERM", "HUP", "PIPE")
EVERY_WAY = os.environ.get("IMGSERVER_EVERY_WAY") == "1"    # each step, each signal: an hour
RANDOM_RUNS = 20                          # for each shell
SHELL_CRASHES = 2                         # one after the other, of one step


class ShellCrashed(Exception):
    """The shell that ran mkimg ended with SIGSEGV."""


def is_alive(pid):
    """Whether a process, or with a negative pid a process group, is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class TestSignals(MkimgCase):
    """A signal at any moment: the VM runs again, or a line says how; nothing else is left."""

    seconds = 12
    transport = "ssh"

    def setUp(self):
        super().setUp()
        self.steps = os.path.join(self.stand, "steps.bin")
        os.mkdir(self.steps)
        for name in COMMANDS:
            path = os.path.join(self.steps, name)
            with open(path, "w") as file:
                file.write(STEP)
            os.chmod(path, 0o755)

    def begin(self, shell, step="", number="TERM", group=False, path=None):
        """Start mkimg, alone in its session; `step` sends a signal to it or to its group."""
        for name in os.listdir(self.stand):
            if name.startswith("count-") or name in ("steps", "log"):
                os.unlink(os.path.join(self.stand, name))
        self.put("state", "running\n")
        return self.start(
            VM, *WORDS, session=True, STEP=step, SIGNAL=number, TO="-" if group else "",
            shell=("sh", "-c", 'echo $$ > "$STAND/pid"; exec "$0" "$@"', *shell),
            PATH=self.steps + ":" + self.environment()["PATH"])

    def images_there(self):
        """The names of all images on the server, active or not."""
        return os.listdir(self.serve_dir)

    def remove(self, uuid):
        shutil.rmtree(os.path.join(self.serve_dir, uuid))

    @staticmethod
    def unless_the_shell_crashes(act):
        """act(), again where the shell itself crashed: ksh93 does, once in some hundred signals
        that reach it within $(...).
        """
        for _ in range(SHELL_CRASHES):
            with contextlib.suppress(ShellCrashed):
                return act()
        return act()

    def end(self, process, number):
        """Wait for the end of mkimg, which got a signal; what is left must be in order.

        Raises ShellCrashed, when all is as before.
        """
        output, errors = process.communicate(timeout=PATIENCE * 3)
        if process.returncode == -signal.SIGSEGV:
            for name in os.listdir(self.temporary):
                shutil.rmtree(os.path.join(self.temporary, name))
            for uuid in self.images_there():
                self.remove(uuid)
            self.put("snapshots", f"zones/{VM}@image\n")
            raise ShellCrashed
        self.assertLeftAsItWas()
        wait_for(lambda: not is_alive(-process.pid), "the end of all that it started")
        if self.take("state") != "running\n":
            self.assertIn(f"vmadm start {VM}\n", errors)
        images = self.images_there()
        if process.returncode == 0:
            self.assertEqual(images, [output.split()[0]], errors)
            self.remove(images[0])
        else:
            self.assertEqual((output, images), ("", []), errors)
            # 1: the signal has ended a command as well, and mkimg saw that first; negative: it
            # came when there was nothing to put back yet.
            number = signal.Signals["SIG" + number]
            self.assertIn(process.returncode, (1, 128 + number, -number), errors)
        return errors

    def test_before_and_after_each_command(self):
        self.end(self.begin(installed()[0]), "TERM")
        steps = self.take("steps").splitlines()
        self.assertIn("zfs 3", steps)
        self.assertIn(self.transport + " 3", steps)
        if not EVERY_WAY:                 # until there, nothing is to be put back
            steps = steps[steps.index("mkdir 1"):]
        ways = list(itertools.product(installed(), SIGNALS, (False, True)))
        chance = random.Random(1)         # the same ones each time, of all kinds side by side
        chance.shuffle(ways)
        turns = itertools.cycle(ways)
        for step in steps:
            for when in ("before", "after") if CHECK else [chance.choice(("before", "after"))]:
                for shell, number, group in ways if EVERY_WAY else [next(turns)]:
                    with self.subTest(step=step, when=when, shell=shell[0], number=number,
                                      group=group):
                        errors = self.unless_the_shell_crashes(lambda: self.end(
                            self.begin(shell, f"{step} {when}", number, group), number))
                        if not group:
                            self.assertEqual(self.take("state"), "running\n", errors)

    def test_while_the_vm_is_on_its_way_down(self):
        """All processes get the signal, vmadm ends, and the VM stops all the same."""
        for shell in all_in_check(installed()):
            with self.subTest(shell=shell[0]):
                self.put("slow-stop")
                errors = self.unless_the_shell_crashes(lambda: self.end(
                    self.begin(shell, "vmadm 2 after", "INT", True), "INT"))
                self.assertEqual(self.take("state"), "running\n", errors)

    def test_a_vm_that_may_stop_later(self):
        self.put("fail-vmadm-stop")
        errors = self.end(self.begin(installed()[0]), "TERM")
        self.assertIn(f"if VM {VM} stops after all, this starts it: vmadm start {VM}\n", errors)

    def test_a_second_signal_ends_the_wait_for_the_server(self):
        for shell in all_in_check(installed()):
            with self.subTest(shell=shell[0]):
                self.put("deaf")
                process = self.begin(shell)
                wait_for(lambda: os.path.exists(os.path.join(self.stand, "listening")), "ssh")
                end = time.monotonic() + PATIENCE
                while process.poll() is None and time.monotonic() < end:
                    process.send_signal(signal.SIGTERM)
                    time.sleep(0.1)
                os.unlink(os.path.join(self.stand, "deaf"))
                os.unlink(os.path.join(self.stand, "listening"))
                errors = self.end(process, "TERM")
                self.assertIn("this discards it:\n    ssh admin@img.example.com \"'", errors)

    @check_only("random")
    def test_random_moments(self):
        chance = random.Random()
        for shell in installed():
            began = time.monotonic()
            self.end(self.begin(shell), "TERM")
            whole = time.monotonic() - began
            for _ in range(RANDOM_RUNS):
                delay, number = chance.random() * whole, chance.choice(SIGNALS)
                group = chance.random() < 0.5
                with self.subTest(shell=shell[0], delay=delay, number=number, group=group):
                    def once():
                        process = self.begin(shell)
                        time.sleep(delay)
                        (os.killpg if group else os.kill)(
                            process.pid, signal.Signals["SIG" + number])
                        self.end(process, number)
                    self.unless_the_shell_crashes(once)


# Until a user has logged in, who comes from the address has no right.
LOGIN = """
import base64
WANTED = "Basic " + base64.b64encode({!r}).decode()
imgserver.Rights.of = lambda self, request: (
    imgserver.MANAGE if request.headers.get("authorization") == WANTED else imgserver.READ)
"""
SLOW_CREATION = """
import time
create = imgserver.Publisher.create
def slow(*words):
    time.sleep(0.3)
    return create(*words)
imgserver.Publisher.create = slow
"""
NO_ACTIVATION = """
def activate(self, uuid):
    raise imgserver.ApiError(422, "NoActivationNoFile", "no")
imgserver.Publisher.activate = activate
"""


class HttpCase(MkimgCase):
    """mkimg, real curl, and the real server."""

    def setUp(self):
        super().setUp()
        need("curl")
        self.start_server()
        with open(os.path.join(self.bin, "curl"), "w") as file:
            file.write(NOTE + 'exec /usr/bin/curl "$@"\n')
        os.chmod(os.path.join(self.bin, "curl"), 0o755)

    def start_server(self, prelude=""):
        home = tempfile.mkdtemp(prefix="imgserver-test-")
        self.addCleanup(shutil.rmtree, home, ignore_errors=True)
        self.server = Server(home, self.serve_dir, {"manage_from": ["127.0.0.1"]},
                             prelude=prelude)
        self.addCleanup(self.end_server, self.server)

    def end_server(self, server):
        ServerCase.end(self, server)

    def host(self, user=""):
        return f"http://{user}127.0.0.1:{self.server.address[1]}"

    def environment(self):
        return {**super().environment(), "IMGSERVER": self.host(),
                "http_proxy": "http://127.0.0.1:1", "HOME": self.directory}

    def published(self, *words, **options):
        status, output, errors = self.mkimg(*words, **options)
        self.assertEqual(status, 0, errors)
        uuid, line = output.splitlines()[-2:]
        self.assertEqual(line, f"imgadm import {uuid}")
        self.assertEqual(os.listdir(self.serve_dir), [uuid])
        image = self.server.get(f"/images/{uuid}").json()
        self.assertEqual((image["state"], image["uuid"]), ("active", uuid))
        with open(os.path.join(self.serve_dir, uuid, "manifest.json"), "rb") as file:
            manifest = json.load(file)
        shutil.rmtree(os.path.join(self.serve_dir, uuid))
        return manifest

    def assertNothing(self, result, pattern, status=1):
        self.assertEqual((result[0], result[1]), (status, ""), result[2])
        self.assertRegex(result[2], pattern)
        self.assertEqual(os.listdir(self.serve_dir), [])


class TestHttp(HttpCase):
    seconds = 8

    def test_a_running_zone_under_every_shell(self):
        for shell in installed():
            with self.subTest(shell=shell):
                self.put("state", "running\n")
                text = "it's\ta \"\\\" & $(touch hacked)\n\u00e9 /\n\n"
                manifest = self.published(
                    VM, "web", "1.10", text, "homepage=http://x/'$(touch hacked)", "public=false",
                    "urn=007", 'tags={"a": "b"}', "requirements={}", shell=shell)
                for name in ("uuid", "owner", "disabled", "published_at", "files"):
                    del manifest[name]    # the server's
                self.assertEqual(manifest, {
                    "v": 2, "name": "web", "version": "1.10", "description": text,
                    "type": "zone-dataset", "os": "smartos", "urn": "007", "public": False,
                    "homepage": "http://x/'$(touch hacked)", "tags": {"a": "b"},
                    "requirements": {}})
                self.assertEqual(self.take("state"), "running\n")
        self.assertEqual(self.asked("ssh"), [])

    def test_every_compression(self):
        for kind in streams.PACKERS:
            with self.subTest(kind=kind):
                self.published("-c", kind, VM, *WORDS)

    def test_bhyve(self):
        self.vm(BHYVE)
        self.put("stream", streams.stream(kind=streams.ZVOL))
        manifest = self.published(VM, *WORDS)
        self.assertEqual((manifest["image_size"], manifest["type"], manifest["requirements"]),
                         (10240, "zvol", {"brand": "bhyve", "bootrom": "uefi"}))

    def test_incremental(self):
        self.put("origin", f"zones/{IMAGE}@{VM}\n")
        self.assertNothing(self.mkimg("-i", VM, *WORDS), f'origin image "{IMAGE}" does not exist')
        write_v2(self.serve_dir, IMAGE, streams.stream(guid=5), "image.zfs", "none")
        self.put("stream", streams.stream(guid=6, from_guid=5))
        status, output, errors = self.mkimg("-i", VM, *WORDS)
        self.assertEqual(status, 0, errors)
        image = self.server.get("/images/" + output.split()[-1]).json()
        self.assertEqual((image["origin"], image["state"]), (IMAGE, "active"))

    def test_each_step_may_fail(self):
        self.assertNothing(self.mkimg(VM, *WORDS, "homepage=x"),
                           "answers 422: invalid image data: homepage\n.* does not take the image")
        self.assertEqual({words[0] for words in self.asked("vmadm")}, {"get"})
        for name, pattern in (("fail-vmadm-stop", "cannot stop VM"),
                              ("fail-zfs-snapshot", "cannot snapshot"),
                              ("fail-zfs-send", "zfs send has failed"),
                              ("half", "answers 400: image refused: (?s:.)*zfs send has"),
                              ("late", "zfs send has failed")):
            with self.subTest(name=name):
                self.put(name)
                self.put("state", "running\n")
                self.assertNothing(self.mkimg(VM, *WORDS), pattern)
                self.assertEqual(self.take("state"), "running\n")
                os.unlink(os.path.join(self.stand, name))
        self.start_server(NO_ACTIVATION)
        self.assertNothing(self.mkimg(VM, *WORDS), "activating image .* has failed")
        self.assertNothing(self.mkimg(VM, *WORDS, IMGSERVER="http://127.0.0.1:1"),
                           "does not take the image")

    def test_passwords(self):
        secret = 'p"a\\ss $word\''
        self.start_server(LOGIN.format(f"joe:{secret}".encode()))
        self.assertNothing(self.mkimg(VM, *WORDS), "answers 403: address 127.0.0.1 lacks the right")
        terminal, ours = pty.openpty()
        try:
            process = self.start(VM, *WORDS, IMGSERVER=self.host("joe@"), stdin=ours)
            wait_for(lambda: not termios.tcgetattr(ours)[3] & termios.ECHO, "the question")
            os.write(terminal, secret.encode() + b"\n")
            output, errors = process.communicate(timeout=PATIENCE * 3)
            self.assertEqual(process.returncode, 0, errors)
            self.assertTrue(termios.tcgetattr(ours)[3] & termios.ECHO)
        finally:
            os.close(terminal)
            os.close(ours)
        shutil.rmtree(os.path.join(self.serve_dir, output.split()[-1]))
        self.assertNotIn("ss $word", self.take("log") + output + errors)
        self.assertNothing(self.mkimg(VM, *WORDS, IMGSERVER=self.host("joe@")), "no terminal")

    def test_netrc(self):
        path = os.path.join(self.stand, 'net"rc')
        self.put('net"rc', "machine 127.0.0.1 login joe password secret\n")
        os.chmod(path, 0o644)
        self.start_server(LOGIN.format(b"joe:secret"))
        self.assertNothing(self.mkimg(VM, *WORDS, NETRC=path), "its owner alone may read", 2)
        self.assertNothing(self.mkimg(VM, *WORDS, NETRC=path + "x"), "NETRC is", 2)
        os.chmod(path, 0o600)
        self.published(VM, *WORDS, NETRC=path)
        self.published(VM, *WORDS, NETRC=path, IMGSERVER=self.host("joe@"))

    def test_urls(self):
        for url in (self.host("joe:secret@"), "ftp://x", "://"):
            with self.subTest(url=url):
                self.assertNothing(self.mkimg(VM, *WORDS, IMGSERVER=url), "usage", 2)
        self.published(VM, *WORDS, IMGSERVER=self.host() + "/")


class TestHttpSignals(HttpCase, TestSignals):
    """The same, over HTTP."""

    transport = "curl"

    test_a_second_signal_ends_the_wait_for_the_server = None

    def test_all_get_a_signal_while_the_server_takes_the_manifest(self):
        """mkimg waits for the answer, and discards what is there then."""
        self.start_server(SLOW_CREATION)
        for shell in installed():
            with self.subTest(shell=shell[0]):
                self.unless_the_shell_crashes(lambda: self.end(
                    self.begin(shell, "curl 1 before", "INT", True), "INT"))
