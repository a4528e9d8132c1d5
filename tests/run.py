#!/usr/bin/env python3
"""Run the tests, several classes side by side: run.py [-j N] [NAME...]

A class is one process, forked from this one; those with the longest `seconds` begin, then
those with the most tests.  NAME is a module, a class or a test, as unittest takes it.  The
output of a class that failed is printed whole.  With IMGSERVER_CHECK=1 the tests run too
that support.check_only leaves out else.  With IMGSERVER_AGAIN=1 classes that failed beside
others run once more, alone: on a machine that does other work too, that tells a fault from a
starved test; both runs are in the output.  The last line is `N passed, N failed, N skipped`.
"""

import argparse
import faulthandler
import json
import os
import random
import signal
import sys
import tempfile
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOM = 2 << 30                # bytes: more than all tests that run at once write
LIMIT = 900                   # seconds until a class that hangs is ended, with a traceback
AGAIN = 6                     # classes that may fail beside others: more, and it is no chance


def tests_of(suite):
    """All test cases of a suite, without the suites around them."""
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from tests_of(item)
        else:
            yield item


def is_left_out(test):
    """Whether support.check_only leaves the test to `make check`."""
    method = getattr(test, test._testMethodName, None)
    return bool(getattr(method, "check_only", "") or getattr(test, "check_only", ""))


def run_class(tests, output):
    """Run one class; returns [the numbers of failed and skipped tests, what was skipped]."""
    result = unittest.TextTestRunner(stream=output).run(unittest.TestSuite(tests))

    def names(pairs):         # of a subtest: its test; of setUpClass: a name that no test has
        return {getattr(test, "test_case", test).id(): text for test, text in pairs}
    failed = names(result.failures + result.errors)
    failed.update((test.id(), "") for test in result.unexpectedSuccesses)
    skipped = {name: text for name, text in names(result.skipped).items() if name not in failed}
    whole = {test.id() for test in tests}
    if not whole.issuperset(failed):
        failed = whole - set(skipped)
    elif not whole.issuperset(skipped):
        skipped = {name: "; ".join(skipped.values()) for name in whole - set(failed)}
    return [len(failed), len(skipped), [f"{name}: {text}" for name, text in skipped.items()]]


def start(tests):
    """Fork a process for one class; returns its id, its output and where its counts will be."""
    output, counts = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid, output, counts
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    random.seed()             # else all processes choose the same ports
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    try:
        json.dump(run_class(tests, sys.stderr), counts)
        counts.flush()
    finally:
        sys.stdout.flush()
        os._exit(0)


def run(queue, jobs):
    """Run lists of tests, `jobs` at once.

    Returns how many tests failed and were skipped, and the lists in which some failed.
    """
    running, failures, skips, failed_lists = {}, 0, 0, []
    while queue or running:
        while queue and len(running) < jobs:
            tests = queue.pop(0)
            pid, output, counts = start(tests)
            running[pid] = tests, output, counts, time.monotonic()
        pid, _, used = os.wait4(-1, 0)
        tests, output, counts, began = running.pop(pid)
        counts.seek(0)
        failed, skipped, reasons = json.loads(counts.read() or json.dumps([len(tests), 0, []]))
        print(f"{'FAILED' if failed else 'ok':6} {time.monotonic() - began:6.1f} s, CPU "
              f"{used.ru_utime + used.ru_stime:5.1f} s  {type(tests[0]).__module__}."
              f"{type(tests[0]).__qualname__}: {len(tests)}", flush=True)
        for reason in reasons:
            print("    skipped", reason, flush=True)
        if failed:
            output.seek(0)
            print(output.read(), flush=True)
            failed_lists.append(tests)
        output.close(), counts.close()
        failures, skips = failures + failed, skips + skipped
    return failures, skips, failed_lists


def temporary_place():
    """Where temporary files are made: in memory if there is room and programs may run."""
    memory = "/dev/shm"
    try:
        place = os.statvfs(memory)
    except OSError:
        return None
    if "TMPDIR" in os.environ or place.f_flag & os.ST_NOEXEC \
            or place.f_bavail * place.f_frsize < ROOM or not os.access(memory, os.W_OK):
        return None
    return memory


def compile_once(directory):
    """Have this program, and the Pythons it starts, keep compiled modules in a directory."""
    os.mkdir(directory)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = directory
    sys.dont_write_bytecode = False


def run_all(options):
    """Find the tests, run them, and print how many passed; returns the exit status."""
    loader = unittest.defaultTestLoader
    suite = loader.loadTestsFromNames(options.names) if options.names else \
        loader.discover("tests", top_level_dir=ROOT)
    classes, left = {}, 0
    for test in tests_of(suite):
        if is_left_out(test):
            left += 1
        else:
            classes.setdefault(type(test), []).append(test)
    queue = sorted(classes.values(), key=lambda tests: (
        getattr(tests[0], "seconds", 0), len(tests)), reverse=True)
    count = sum(map(len, queue))
    failed, skipped, again = run(queue, options.jobs)
    if again and len(again) <= AGAIN and os.environ.get("IMGSERVER_AGAIN") == "1":
        print(f"once more, alone: {len(again)} classes in which {failed} tests failed")
        failed, _, _ = run(again, 1)
    if left:
        print(f"{left} left to make check")
    print(f"{count - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not count else 0


def main():
    parser = argparse.ArgumentParser(description="Run the tests.")
    parser.add_argument("-j", "--jobs", type=int, default=2 * (os.cpu_count() or 1),
                        help="classes that run at once; they wait a lot (default: %(default)s)")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # so that its files go
    os.chdir(ROOT)
    sys.path.insert(0, ROOT)
    with tempfile.TemporaryDirectory(prefix="imgserver-tests-", dir=temporary_place()) as place:
        os.chmod(place, 0o755)            # some tests serve as another user
        os.environ["TMPDIR"] = tempfile.tempdir = place
        compile_once(os.path.join(place, "pycache"))
        return run_all(options)


if __name__ == "__main__":
    sys.exit(main())
