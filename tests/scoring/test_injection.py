"""2,340 answers that carry code, judged under an audit hook: none of it is compiled, run, written, sent or started."""

import os
import subprocess
import sys
from pathlib import Path

MARK = "r1v_canary"
PAYLOADS = [
    f"__import__('os').system('touch {MARK}')",
    f"__import__('subprocess').Popen(['touch','{MARK}'])",
    f"open('{MARK}','w')",
    f'exec(\'open("{MARK}","w")\')',
    f"eval('{MARK}')",
    f"().__class__.__bases__[0].__subclasses__()#{MARK}",
    f"lambda {MARK}: 1",
    f"[{MARK} for {MARK} in (1,)]",
    f"{MARK}()",
    f"print('{MARK}')",
    f"os.system('{MARK}')",
    f"breakpoint() or '{MARK}'",
    f"compile('{MARK}','x','exec')",
    f"getattr(1,'{MARK}')",
    f"__builtins__['{MARK}']",
    f"globals()['{MARK}']",
    f"sys.modules['{MARK}']",
    f"socket.create_connection(('127.0.0.1',9))#{MARK}",
    f"urllib.request.urlopen('http://127.0.0.1/{MARK}')",
    f"Symbol('{MARK}')",
    f"sympify('{MARK}')",
    f"parse_expr('{MARK}')",
    f"lambdify(x,'{MARK}')",
    f"1;import {MARK}",
    f"1\nimport {MARK}",
    f"1 if {MARK} else 2",
    f"{{{MARK}:=1}}",
    f"f'{{{MARK}}}'",
    f"'{MARK}'.format(1)",
    f"${{{MARK}}}",
    f"`touch {MARK}`",
    f"$(touch {MARK})",
    f"| touch {MARK}",
    f"; touch {MARK}",
    f"\\input{{{MARK}}}",
    f"\\write18{{touch {MARK}}}",
    f"\\openout1={MARK}",
    f"\\csname {MARK}\\endcsname",
    f"cos\nsystem\n(S'touch {MARK}'\ntR.",
]
CONTEXTS = [
    before + "%s" + after
    for before, after in [
        ("", ""), ("1+", ""), ("", "+1"), ("\\frac{", "}{2}"), ("\\frac{1}{", "}"), ("\\sqrt{", "}"), ("x^{", "}"),
        ("x_{", "}"), ("\\text{", "}"), ("\\mathrm{", "}"), ("\\operatorname{", "}(x)"), ("\\{", ",2\\}"),
        ("(1,", ")"), ("x=", ""), ("", "=5"), ("x\\in[", ",2]"), ("\\begin{pmatrix}", "\\end{pmatrix}"),
        ("\\sum_{i=1}^{", "} i"), ("5 ", ""), ("5\\text{ ", "}"), ("\\left(", "\\right)"), ("f(", ")=x"),
        ("\\log_{", "}(8)"), ("1.5e", ""), ("\\$", ""), ("50\\% ", ""), ("A) ", ""), ("\\lim_{x\\to ", "} x"),
        ("\\int_0^1 ", " dx"), ("7 \\pmod{", "}"),
    ]
] * 2  # fmt: skip
CHILD = """
import sys
sys.path.insert(0, {tests!r})
from scoring.test_injection import CONTEXTS, MARK, PAYLOADS
from r1v_rl.scoring.answers import quick_verdict
from r1v_rl.scoring.extraction import find_answer
from r1v_rl.scoring.grader_process import answer_request, warm_up

warm_up()
hits = []

def hook(event, args):
    shown = repr(args)
    if event in ("compile", "exec", "import", "open", "marshal.loads", "pickle.find_class") and MARK in shown:
        hits.append((event, shown[:200]))
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        hits.append((event, shown[:200]))
    if event.split(".")[0] in ("socket", "subprocess", "ctypes", "shutil") or event in (
        "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.mkdir"
    ):
        hits.append((event, shown[:200]))

sys.addaudithook(hook)
tried = 0
for number, context in enumerate(CONTEXTS):
    for payload in PAYLOADS[number % {stride}::{stride}]:
        answer = context.replace("%s", payload)
        golds = ("5", "x^2+1") if number < len(CONTEXTS) // 2 else (answer, "(1,2)")
        completion = "\\\\boxed{{" + answer + "}}"
        find_answer(completion)
        for gold in golds:
            quick_verdict(answer, gold)
            answer_request({{"op": "same", "gold": gold, "answer": answer}})
        answer_request({{"op": "read", "gold": answer}})
        tried += 1
assert not hits, hits[:5]
print(tried)
"""


def test_no_payload_reaches_an_interpreter_a_file_a_socket_or_a_process(tmp_path):
    """Every payload in some contexts, 180 pairs; `R1V_ALL_PAYLOADS=1` takes all 2,340, which is a minute."""
    assert len(PAYLOADS) * len(CONTEXTS) == 2340
    stride = 1 if os.environ.get("R1V_ALL_PAYLOADS") else 13
    code = CHILD.format(tests=str(Path(__file__).parents[1]), stride=stride)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) == 2340 // stride
    assert not list(tmp_path.iterdir())
