"""`make test`: every test in stages, each with the threads it needs; one closing line for all of them.

Stages, in order: unit tests; the chapters executed by nbval, two kernels at a time; the rendered pages, also in a
browser; mutants and faults. A stage that fails does not stop the next ones. `python -m tests unit pages` runs these.
"""

import os
import re
import subprocess
import sys
import time

from tiltlib import runner

KERNELS = 2
PYTEST = [sys.executable, "-m", "pytest", "-q", "--durations=5"]
PAGES = ["tests/test_pages.py", "tests/test_browser.py"]
SLOW = ["tests/test_mutants.py", "tests/test_faults.py", "tests/test_faults_tuning.py", "tests/test_minibook.py"]


def stages() -> dict[str, list[str]]:
    apart = [f"--ignore={path}" for path in PAGES + SLOW]
    chapters = [str(path) for path in runner.chapters().values()]
    nbval = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=600", "-p", "no:python"]
    return {
        "unit": [*PYTEST, "tests", *apart, "-n", str(KERNELS)],
        "chapters": [*PYTEST, *nbval, *chapters, "-n", str(KERNELS), "--dist", "loadscope"],
        "pages": [*PYTEST, *PAGES],
        "slow": [*PYTEST, *SLOW, "-n", str(KERNELS), "--dist", "loadfile"],
    }


def main(wanted: list[str]) -> int:
    known, counts, failed = stages(), dict.fromkeys(("passed", "failed", "error", "skipped"), 0), []
    unknown = set(wanted) - set(known)
    if unknown:
        sys.exit(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    environment = runner.kernel_environment(min(KERNELS, os.cpu_count() or 1), TILT_MEMO="off", PYTHONHASHSEED="0")
    for name in wanted or known:
        began = time.time()
        print(f"== {name}", flush=True)
        with subprocess.Popen(known[name], env=environment, stdout=subprocess.PIPE, text=True) as process:
            last = ""
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line if re.search(r"\d+ (passed|failed|error|skipped)", line) else last
        for number, what in re.findall(r"(\d+) (passed|failed|error|skipped)", last):
            counts[what] += int(number)
        if process.returncode:
            failed.append(name)
        print(f"== {name}: {'FAILED' if process.returncode else 'ok'} in {time.time() - began:.0f} s\n", flush=True)
    if failed:
        print(f"failed stages: {', '.join(failed)}")
    print(f"{counts['passed']} passed, {counts['failed'] + counts['error']} failed, {counts['skipped']} skipped")
    return 1 if failed or not counts["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
