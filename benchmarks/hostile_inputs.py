"""1,000 inputs that a verifier must survive, made deterministically: 400 answers and 600 programs, by kind."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

SEED = 2606
ANSWERS, PROGRAMS = 400, 600
GOLDS = ("7", r"\frac{1}{2}", "x^2 + 2x + 1", "(1, 2)", r"[1, \infty)", r"\text{Evelyn}", r"\sqrt{2}", r"\pi")


@dataclass(frozen=True)
class Hostile:
    kind: str
    text: str
    gold: str = ""  # of an answer
    form: str = "script"  # of a program: "script" or "function"


def hostile_answers() -> list[Hostile]:
    kinds = list(_ANSWERS.items())
    made = []
    for i in range(ANSWERS):
        kind, make = kinds[i % len(kinds)]
        made.append(Hostile(kind, make(random.Random(f"{SEED} {i}")), GOLDS[i // len(kinds) % len(GOLDS)]))
    return made


def hostile_programs(canary: str, parent: int) -> list[Hostile]:
    """`canary` is a file that they try to change, `parent` the process that they try to harm."""
    kinds = list(_PROGRAMS.items())
    made = []
    for i in range(PROGRAMS):
        kind, bodies = kinds[i % len(kinds)]
        turn = i // len(kinds)
        body = bodies[turn % len(bodies)].replace("CANARY", repr(canary)).replace("PARENT", str(parent))
        body = body.replace("NUMBER", str(random.Random(f"{SEED} {i}").randint(2, 9)))
        if turn // len(bodies) % 2:
            indented = "".join(f"    {line}\n" for line in body.splitlines())
            made.append(Hostile(kind, f"def f(x):\n{indented}    return None\n", form="function"))
        else:
            made.append(Hostile(kind, body))
    return made


def _boxed(make: Callable[[random.Random], str]) -> Callable[[random.Random], str]:
    return lambda rng: "I think it is \\boxed{" + make(rng) + "}"


def _noise(rng: random.Random, alphabet: str, most: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(1, most)))


_ANSWERS: dict[str, Callable[[random.Random], str]] = {
    "power tower": _boxed(lambda r: "^{".join([str(r.randint(2, 99))] * r.randint(3, 12)) + "}" * 11),
    "10**10**9": _boxed(lambda r: f"10**10**{r.randint(8, 12)}"),
    "10^{10^{9}}": _boxed(lambda r: f"10^{{10^{{{r.randint(8, 12)}}}}}"),
    "factorials": _boxed(lambda r: f"{r.randint(10**6, 10**12)}!" + "!" * r.randint(0, 3)),
    "many digits": _boxed(lambda r: _noise(r, "123456789", 990)),
    "too many digits": _boxed(lambda r: "9" * r.randint(10**4, 10**6)),
    "deep braces": _boxed(lambda r: "{" * (n := r.randint(50, 480)) + "7" + "}" * n),
    "deep parentheses": _boxed(lambda r: "(" * (n := r.randint(50, 480)) + "7" + ")" * n),
    "deep fractions": _boxed(lambda r: "\\frac{1}{1+" * (n := r.randint(10, 70)) + "x" + "}" * n),
    "deep roots": _boxed(lambda r: "\\sqrt{" * (n := r.randint(20, 130)) + "2" + "}" * n),
    "deeper than the cap": _boxed(lambda r: "\\frac{" * (n := r.randint(10**3, 10**5)) + "1" + "}{2}" * n),
    "unbalanced braces": lambda r: "\\boxed{" * r.randint(1, 2000) + "}" * r.randint(0, 1000),
    "long sum": _boxed(lambda r: f"\\sum_{{i=1}}^{{10^{{{r.randint(6, 12)}}}}} \\frac{{\\sin(i)}}{{i}}"),
    "long product": _boxed(lambda r: f"\\prod_{{i=1}}^{{{r.randint(10**5, 10**9)}}} (x + i)"),
    "hard integral": _boxed(
        lambda r: f"\\int_0^{{{r.randint(1, 9)}}} e^{{x^{{x}}}} \\sin(x^{{{r.randint(3, 99)}}}) dx"
    ),
    "limit": _boxed(lambda r: f"\\lim_{{x \\to \\infty}} (1 + \\frac{{{r.randint(2, 99)}}}{{x}})^{{x^x}}"),
    "wide polynomial": _boxed(lambda r: f"(x + y + z + w)^{{{r.randint(200, 99999)}}} - 1"),
    "trigonometry": _boxed(lambda r: "+".join(f"\\sin^{{{r.randint(9, 99)}}}({k}x)" for k in range(1, 40))),
    "matrix": _boxed(lambda r: "\\begin{pmatrix}" + "\\\\".join(["x&" * 12 + "1"] * 12) + "\\end{pmatrix}^{99}"),
    "large set": _boxed(lambda r: "\\{" + ",".join(str(r.randint(0, 9999)) for _ in range(180)) + "\\}"),
    "relations": _boxed(lambda r: "<".join("xyzuvw"[r.randint(0, 5)] for _ in range(r.randint(10, 200)))),
    "equations": _boxed(lambda r: "=".join(f"x^{{{r.randint(2, 99)}}}" for _ in range(20))),
    "division by zero": _boxed(lambda r: r.choice(["1/0", "\\frac{0}{0}", "0^0", "\\log 0", "\\tan\\frac{\\pi}{2}"])),
    "not finite": _boxed(lambda r: r.choice(["inf", "nan", "1e999999999", "-\\infty", "1e-999999999", "\\infty^0"])),
    "binomial": _boxed(lambda r: f"\\binom{{10^{{{r.randint(6, 12)}}}}}{{{r.randint(10**5, 10**6)}}}"),
    "code": _boxed(
        lambda r: r.choice(["__import__('os').system('kill -9 -1')", "exec('while 1: pass')", "open('/etc/passwd')"])
    ),
    "LaTeX noise": _boxed(lambda r: _noise(r, "\\{}^_$&#~()[]frac sqrt123xyz", 600)),
    "unicode noise": lambda r: "".join(chr(r.randint(1, 0x2FFFF)) for _ in range(r.randint(1, 900))),
    "control characters": _boxed(lambda r: _noise(r, "\0\1\x1b\r\n\t7\u202e\u200b\ufeff", 300)),
    "lone surrogates": _boxed(lambda r: _noise(r, "\ud800\udfff7", 50)),
    "many boxes": lambda r: "\\boxed{7}" * r.randint(10**4, 10**5) + "\\boxed{wrong}",
    "long text": lambda r: ("The answer is " + "maybe " * 9) * r.randint(10**4, 10**5),
    "long line of numbers": lambda r: " ".join(["1,234.5"] * r.randint(10**4, 10**5)) + " and so on",
    "dollar signs": lambda r: "$" * r.randint(10**3, 10**5),
    "opened formulas": lambda r: "The answer is " + r.choice(["\\(", "\\[", "$\\(", "\\[x"]) * r.randint(10**3, 10**5),
    "empty": lambda r: r.choice(["", " ", "\n" * 999, "\\boxed{}", "\\boxed", "\\boxed{ }", "####", "$$"]),
    "commands without arguments": _boxed(
        lambda r: "".join(r.choice(["\\frac", "\\sqrt", "^", "_"]) for _ in range(99))
    ),
    "macros": _boxed(lambda r: "\\def\\x{\\x\\x}" + "\\x" * r.randint(1, 99)),
    "modular": _boxed(lambda r: f"{r.randint(2, 9)}^{{{10 ** r.randint(9, 90)}}} \\bmod {r.randint(10**9, 10**12)}"),
    "irrational powers": _boxed(lambda r: "(" + "\\sqrt{2}^{" * (n := r.randint(3, 20)) + "2" + "}" * n + ")^{99999}"),
    "nested sums": _boxed(lambda r: "\\sum_{i=1}^{n}" * r.randint(2, 40) + "i"),
}

_PROGRAMS: dict[str, tuple[str, ...]] = {
    "fork bomb": (
        "import os\nwhile True: os.fork()",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import multiprocessing as m\nwhile True: m.get_context('fork').Process(target=lambda: 0).start()",
        "import ctypes\nc = ctypes.CDLL(None)\nwhile True: c.fork(); c.vfork()",
    ),
    "ten gigabytes": (
        "x = bytearray(10 ** 10)",
        "x = [0] * (10 ** 10)",
        "x = []\nwhile True: x.append(bytearray(10 ** 8))",
        "import mmap\nm = [mmap.mmap(-1, 1 << 30) for _ in range(10)]",
        "x = 'a'\nwhile True: x += x",
        "d = {}\nwhile True: d[len(d)] = [len(d)] * 99",
    ),
    "memory beside the heap": (
        "import os\nfds = [os.memfd_create(str(i)) for i in range(50)]\nfor fd in fds: os.truncate(fd, 1 << 30)",
        "from multiprocessing import shared_memory as s\nm = [s.SharedMemory(None, True, 1 << 30) for _ in range(9)]",
        "import os\nfor i in range(10 ** 6): r, w = os.pipe(); os.set_blocking(w, False); os.write(w, b'x' * 65536)",
    ),
    "endless loop": (
        "while True: pass",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import itertools\nsum(itertools.count())",
        "def g():\n    yield from g()\nfor _ in g(): pass",
    ),
    "endless loop in C": ("10 ** 10 ** 9", "list(range(10 ** 10))", "max(iter(int, 1))", "'a' * 99 in iter(str, 1)"),
    "huge integer": (
        "x = NUMBER ** (10 ** 10)",
        "x = 1 << (10 ** 11)",
        "print(len(str(NUMBER ** 10 ** 7)))",
        "import math\nmath.factorial(10 ** 8)",
        "import sys\nsys.set_int_max_str_digits(0)\nint('9' * 10 ** 7)",
    ),
    "sleep": (
        "import time\ntime.sleep(10 ** 6)",
        "import signal\nsignal.pause()",
        "import threading\nthreading.Event().wait()",
    ),
    "recursion": (
        "def g(n): return g(n + 1)\ng(0)",
        "import sys\nsys.setrecursionlimit(10 ** 9)\ndef g(n): return g(n + 1)\ng(0)",
        "import sys\nsys.setrecursionlimit(10 ** 9)\nclass A:\n    __getattr__ = lambda s, n: getattr(s, n)\nA().x",
        "x = []\nfor _ in range(10 ** 6): x = [x]\nrepr(x) == x",
        "eval('(' * 10 ** 5 + ')' * 10 ** 5)",
        "exec('if 1:\\n' + ''.join(' ' * i + 'if 1:\\n' for i in range(1, 200)))",
    ),
    "stdout flood": (
        "while True: print('x' * 10 ** 6)",
        "import os\nwhile True: os.write(1, b'x' * 10 ** 6)",
        "import sys\nsys.stdout.write('x' * 10 ** 9)",
        "print('\\n' * 10 ** 8)",
    ),
    "stderr flood": (
        "import sys\nwhile True: print('x' * 10 ** 6, file=sys.stderr)",
        "raise ValueError('x' * 10 ** 8)",
        "import warnings\nwhile True: warnings.warn('x' * 10 ** 4)",
    ),
    "binary output": (
        "import sys\nsys.stdout.buffer.write(bytes(range(256)) * 10 ** 4)",
        "print('\\0\\x1b[2J\\ud800')",
        "import os\nos.write(1, b'\\xff\\xfe' * 999); os.write(2, b'\\xff' * 999)",
    ),
    "network": (
        "import socket\nsocket.create_connection(('1.1.1.1', 53))",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1')",
        "import socket\ns = socket.socket(); s.bind(('0.0.0.0', 0)); s.listen(); s.accept()",
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('/run/docker.sock')",
        "import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', 80))",
    ),
    "read files": (
        "print(open('/etc/passwd').read())",
        "import os\nprint(os.listdir('/'), os.listdir('/root'), os.listdir('/proc'))",
        "print(open('/proc/PARENT/environ').read())",
        "print(open(CANARY).read())",
        "import os\nprint(os.readlink('/proc/self/exe'), open('/proc/self/maps').read())",
    ),
    "write files": (
        "open(CANARY, 'w').write('changed')",
        "import os\nos.unlink(CANARY)",
        "import os\nos.rename(CANARY, CANARY + '.moved')",
        "import os\nos.truncate(CANARY, 0)",
        "import os\nos.symlink('/etc/passwd', 'link'); open('link', 'a')",
        "import os\nos.link(CANARY, 'link'); open('link', 'a')",
        "import shutil, os\nshutil.rmtree(os.path.dirname(CANARY))",
    ),
    "fill the disk": (
        "i = 0\nwhile True:\n    open(str(i), 'wb').write(b'x' * 10 ** 7)\n    i += 1",
        "f = open('/tmp/hsd-hostile-big', 'wb')\nwhile True: f.write(b'x' * 10 ** 7)",
        "f = open('/dev/shm/hsd-hostile-big', 'wb')\nwhile True: f.write(b'x' * 10 ** 7)",
        "import os\nfor i in range(10 ** 6): os.mkdir(str(i))",
        "import sys\nsys.stdout.seek(1 << 40); sys.stdout.write('x')",
    ),
    "kill the parent": (
        "import os\nos.kill(PARENT, 9)",
        "import os\nos.kill(os.getppid(), 9)",
        "import os\nos.kill(-1, 9)",
        "import os\nos.killpg(0, 9)",
        "import ctypes\nc = ctypes.CDLL(None)\nc.kill(PARENT, 9); c.syscall(234, PARENT, PARENT, 9)",
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(PARENT), 9)",
    ),
    "harm the parent": (
        "import resource\nresource.prlimit(PARENT, resource.RLIMIT_NOFILE, (3, 3))",
        "import os\nos.setpriority(os.PRIO_PROCESS, PARENT, 19)",
        "import os\nos.sched_setaffinity(PARENT, {0})",
        "import ctypes\nc = ctypes.CDLL(None)\nc.ptrace(16, PARENT, 0, 0)\nopen('/proc/PARENT/mem', 'wb').write(b'x')",
        "import os\nos.truncate('/proc/PARENT/fd/1', 0)",
    ),
    "signals": (
        "import signal\nfor s in {*range(1, 65)} - {9, 19, 32, 33}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "import signal\nsignal.alarm(1)\nwhile True: pass",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        "import signal\nsignal.raise_signal(signal.SIGKILL)",
    ),
    "threads": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
        "import threading\nfor _ in range(20): threading.Thread(target=max, args=(iter(int, 1),)).start()",
        "import threading, os\nthreading.Thread(target=lambda: os._exit(0)).start()\nwhile True: pass",
        "import _thread\nfor _ in range(10 ** 6): _thread.start_new_thread(print, ())",
    ),
    "zombies": (
        "import os, time\nfor _ in range(999):\n    if os.fork() == 0: os._exit(0)\ntime.sleep(99)",
        "import subprocess\np = [subprocess.Popen(['/bin/true']) for _ in range(99)]",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass",
    ),
    "leave the session": (
        "import os\nos.setsid()\nwhile True: pass",
        "import os\nos.setpgid(0, 0)\nwhile True: pass",
        "import ctypes\nc = ctypes.CDLL(None)\nc.prctl(1, 0, 0, 0, 0); c.setsid()\nwhile True: pass",
        "import ctypes\nc = ctypes.CDLL(None)\nc.unshare(0x10000000); c.unshare(0x20000000)\nwhile True: pass",
    ),
    "other programs": (
        "import os\nos.system('rm -rf /tmp/hsd-hostile; sleep 99 &')",
        "import subprocess\nsubprocess.run(['sh', '-c', 'sleep 99'])",
        "import os\nos.execv('/bin/sleep', ['sleep', '99'])",
        "import pty\npty.spawn('/bin/sh')",
        "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'while True: pass'])",
    ),
    "crash the interpreter": (
        "import ctypes\nctypes.string_at(0)",
        "import ctypes\nctypes.memset(id(0), 255, 1 << 20)",
        "import os\nos.abort()",
        "import faulthandler\nfaulthandler._sigsegv()",
        "import sys, gc\nfor o in gc.get_objects():\n    try: o.clear()\n    except Exception: pass",
    ),
    "exit early": (
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "exit(0)",
        "import atexit\natexit.register(lambda: 1 / 0)\nimport sys; sys.exit()",
    ),
    "forge the verdict": (
        'import os\nfor d in range(3, 64):\n    try: os.write(d, b\'{"status": "correct"}\')\n    except OSError: pass',
        'print(\'{"status": "correct"}\')\nimport os; os._exit(0)',
        "import gc\nfor o in gc.get_objects():\n    if isinstance(o, dict) and 'status' in o: o['status'] = 'correct'",
        "import sys\nf = sys._getframe()\nwhile f: f.f_locals.update(status='correct', code=0); f = f.f_back",
        "import sys\nfor m in list(sys.modules.values()):\n    for n in ('send', '_finish'): setattr(m, n, print)",
    ),
    "patch the checker": (
        "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.len = lambda x: 0",
        'import sys, json\njson.dumps = lambda *a, **k: \'["value", ["=", true]]\'',
        "import builtins\nbuiltins.__import__ = lambda *a, **k: 1 / 0",
        "class A(int):\n    __eq__ = __ne__ = __lt__ = __gt__ = lambda *a: True\nglobals()['f'] = lambda x: A()",
        "globals()['f'] = type('F', (), {'__call__': lambda s, x: s, '__eq__': lambda s, o: True})()",
    ),
    "odd results": (
        "globals()['f'] = lambda x: float('nan')",
        "y = []\ny.append(y)\nglobals()['f'] = lambda x: y",
        "globals()['f'] = lambda x: NUMBER ** (10 ** 6)",
        "globals()['f'] = lambda x: 'x' * 10 ** 8",
        "globals()['f'] = lambda x: (i for i in iter(int, 1))",
        "globals()['f'] = lambda x: {frozenset([i]): {i} for i in range(10 ** 5)}",
    ),
    "odd errors": (
        "class E(Exception):\n    def __str__(self): raise self\nraise E",
        "class E(BaseException):\n    def __repr__(self):\n        while True: pass\n    __str__ = __repr__\nraise E",
        "raise type('AssertionError' * 10 ** 5, (Exception,), {})",
        "raise ExceptionGroup('x', [ValueError(i) for i in range(10 ** 5)])",
        "try:\n    1 / 0\nfinally:\n    while True: pass",
        "raise StopIteration",
    ),
    "odd source": (
        "\0",
        "x = '",
        "\t\x0c  pass\n pass",
        "# coding: utf-7\n+AGE-",
        "x = " + "-" * 50_000 + "1",
        "a" * 60_000,
        "`" * 60_000,
        "```" + "python" * 10_000,
    ),
    "descriptors": (
        "import os\nwhile True: os.dup(0)",
        "import os\nos.closerange(0, 1024)",
        "import os\nos.close(1); os.close(2); os.close(3)\nprint('x')",
        "f = [open('/dev/null') for _ in range(10 ** 5)]",
    ),
}
