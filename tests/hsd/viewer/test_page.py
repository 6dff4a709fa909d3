"""The page: what it holds, and, in a real browser, that it shows it and that no token can act on it."""

import dataclasses
import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from hsd.viewer.page import page, payload, read_page, write_page

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=4000 --window-size=1200,900 --dump-dom"
).split()


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


@pytest.fixture
def tokenizer(made):
    return made.build_tokenizer()


@pytest.fixture
def group(made, tokenizer):
    return made.hostile_group(tokenizer)


@pytest.fixture
def measured(made, tokenizer, group):
    return made.made_up(tokenizer, group, [1, None, 1])


def test_payload_holds_the_numbers(tokenizer, group, measured):
    data = payload(tokenizer, [group], measured)
    failing, success, prefix = data["rollouts"]
    assert [r["ok"] for r in data["rollouts"]] == [False, True, False]
    assert (failing["tau"], success["tau"], prefix["tau"]) == (4, None, None)
    assert (failing["peer"], success["peer"], prefix["peer"]) == (1, None, 1)
    texts = data["texts"]
    shown = [texts[i] for i in failing["tokens"]]
    assert shown[:2] == ["</script><script>document.title='broken'</script>", "\n"] and shown[-1] == "<|end|>"
    credit = torch.tensor(failing["credit"]) * data["units"]["nats"]
    torch.testing.assert_close(credit, measured[0].credit, rtol=0, atol=0.51e-3)
    assert data["units"] == {"nats": 1e-3, "probability": 1e-4} and data["limit"] == 5  # 4 nats at tau
    top = torch.tensor(failing["top"]["teacher"]["probs"]).reshape(-1, 3) * data["units"]["probability"]
    torch.testing.assert_close(top, measured[0].teacher_top.probs, rtol=0, atol=0.51e-4)
    assert failing["top"]["student"]["ids"][::3] == failing["tokens"]
    assert failing["mean"] == [
        round(measured[0].credit.abs().mean().item(), 4),
        round(measured[0].answer_only.abs().mean().item(), 4),
    ]


def test_a_rollout_without_a_verdict_is_no_failure_on_the_page(tokenizer, group, measured):
    first, *others = group.rollouts
    unsure = dataclasses.replace(group, rollouts=(dataclasses.replace(first, scored=False), *others))
    data = payload(tokenizer, [unsure], measured)
    assert [(r["ok"], r["reward"]) for r in data["rollouts"]] == [(None, None), (True, 1.0), (False, 0.0)]


def test_large_and_infinite_credit(tokenizer, group, measured):
    loud = measured[0].credit.clone()
    loud[0], loud[1] = -650.0, torch.nan
    data = payload(tokenizer, [group], [dataclasses.replace(measured[0], credit=loud), *measured[1:]])
    values = data["rollouts"][0]["credit"]
    assert values[:2] == [-650_000, None]
    assert data["rollouts"][0]["mean"][0] is None


def test_a_rollout_whose_likeliest_tokens_were_not_kept_is_refused(tokenizer, group, measured):
    with pytest.raises(ValueError, match=r"^measured: expected the likeliest tokens of rollout 0 of group 0, got none"):
        payload(tokenizer, [group], [dataclasses.replace(measured[0], teacher_top=None), *measured[1:]])


def test_rollouts_that_do_not_fit_the_groups_are_refused(tokenizer, group, measured):
    for wrong in ([], measured[:2], measured[::-1]):
        with pytest.raises(ValueError, match=r"^measured: expected the 3 rollouts of the groups in order"):
            payload(tokenizer, [group], wrong)


def test_nothing_in_the_data_ends_its_element_and_nothing_is_fetched(tmp_path, tokenizer, group, measured):
    data = payload(tokenizer, [group], measured)
    write_page(tmp_path / "page.html", {"": data}, title="<b>T</b> {{js}}", note="</style>")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert data_of(text) == {"": data} == read_page(tmp_path / "page.html")
    assert text.count("</script>") == 2 and text.count("</style>") == 1
    assert "<h1>&lt;b&gt;T&lt;/b&gt; {{js}}</h1>" in text
    assert not re.search(r"""(?:src|href)\s*=|url\(|@import|https?:""", re.sub(r'id="data">.*?</script>', "", text))
    assert "default-src 'none'" in text


@pytest.mark.parametrize(
    "damage", [b"", b"<html></html>", b'<script type="application/json" id="data">{"a', b"\xff\xfe"]
)
def test_a_damaged_page_is_named(tmp_path, damage):
    path = tmp_path / "credit.html"
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=r"credit\.html: expected a page of hsd credit"):
        read_page(path)


def browse(tmp_path, text: str, probe: str, fragment: str = "") -> dict:
    """What ``probe``, the body of an async function run in the loaded page, returns."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    end = f"""<script>(async () => {{
        const q = (s) => document.querySelector(s), frame = () => new Promise((r) => setTimeout(r, 50));
        const choose = (id, value) => {{ q('#' + id).value = value; q('#' + id).dispatchEvent(new Event('change')); }};
        const errors = []; addEventListener('error', (e) => errors.push(e.message));
        const result = await (async () => {{ {probe} }})().catch((e) => ({{failed: String(e.stack)}}));
        const box = document.createElement('pre'); box.id = 'probe';
        box.textContent = JSON.stringify({{...result, errors, title: document.title}}); document.body.append(box);
    }})();</script></body>"""
    path = tmp_path / "probe.html"
    path.write_text(text.replace("</body>", end), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", path.as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    result = json.loads(html.unescape(found[1]))
    assert result.pop("errors") == [] and "failed" not in result, result
    return result


def test_in_a_browser(tmp_path, tokenizer, group, measured):
    text = page({"": payload(tokenizer, [group], measured)}, title="Credit", note="made up")
    seen = browse(
        tmp_path,
        text,
        r"""
        const words = (side) => [...document.querySelectorAll(`.${side} > .tok[data-t]`)].map((e) => e.textContent);
        const list = () => [...document.querySelectorAll('#list button')].map((b) => b.textContent);
        const out = {own: words('own'), peer: words('peer'), place: q('#place').textContent};
        out.facts = q('#facts').textContent;
        out.tau = ['own', 'peer'].map((s) => q(`.${s} > .tau`).dataset.t);
        out.same = document.querySelectorAll('.peer > .same').length;
        const at = (t) => q(`.own > [data-t="${t}"]`);
        out.classes = at(4).className; out.alpha = at(4).style.getPropertyValue('--a'); out.raised = at(12).className;
        out.colour = getComputedStyle(at(4)).backgroundColor;
        out.foreign = document.querySelectorAll('#rows img, #rows script, #rows i, #question i').length;
        out.question = q('#question').textContent;
        out.switch = [...document.querySelectorAll('.switch')].map((e) => e.offsetWidth);
        at(4).dispatchEvent(new PointerEvent('pointerover', {bubbles: true, pointerType: 'mouse'}));
        out.card = q('#card').innerText; out.shown = !q('#card').hidden;
        document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}));
        out.escaped = q('#card').hidden;
        at(0).focus();
        at(21).focus(); out.part = q('#card').innerText.split('\n')[0]; at(0).focus();
        out.focused = q('#card').innerText.split('\n')[0];
        at(0).dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));
        out.moved = document.activeElement.dataset.t;
        at(1).dispatchEvent(new KeyboardEvent('keydown', {key: 'p', bubbles: true}));
        out.crossed = document.activeElement.parentElement.className;
        choose('teacher', 'answer'); out.silent = at(4).style.getPropertyValue('--a');
        choose('teacher', 'credit'); choose('limit', '20'); out.faint = at(4).style.getPropertyValue('--a');
        choose('filter', 'success'); out.successes = list(); out.nopeer = q('#peer-head').textContent;
        choose('filter', 'fail'); out.failures = list();
        q('#next').click(); out.third = q('#facts').textContent;
        choose('filter', 'all'); q('#search').value = 'OVERRIDE'; q('#search').dispatchEvent(new Event('input'));
        out.found = list(); q('#search').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}));
        for (let i = 0; i < 99 && document.activeElement === document.body; i++) await frame();
            out.hit = document.activeElement.textContent; out.hash = location.hash;
        q('#search').value = 'nowhere'; q('#search').dispatchEvent(new Event('input'));
        out.empty = !q('#empty').hidden && q('#rows').hidden;
        out.network = performance.getEntriesByType('resource').length;
        return out;""",
    )
    assert seen["title"] == "Credit" and seen["foreign"] == 0 and seen["network"] == 0
    own = seen["own"]
    assert own[0] == "</script><script>document.title='broken'</script>"
    assert {
        "\u21b5\n",
        "\u21e5\t",
        "\\x00",
        "\\x1b[31m",
        "\\u202eright to left override",
        "\\u2028",
        "{{data}}",
    } <= set(own)
    assert {"\u05e9\u05dc\u05d5\u05dd", "&lt;", " leading space", "\\"} <= set(own)
    assert own[-5:] == ["\\xf0", "\\x9f", "\\x98", "\\x80", "<|end|>"]
    assert seen["question"] == "Question <b>What</b> is 1+1?</textarea></script>  Answer 2 & <i>  Success 1 of 3"
    assert seen["switch"] == [0, 0]  # one measurement: nothing to change to
    assert seen["peer"][4] == "\\xf0" and seen["tau"] == ["4", "4"] and seen["same"] == 4
    assert seen["place"] == "1 / 3" and "\u2717 fails" in seen["facts"] and "\u03c4 = 4" in seen["facts"]
    assert {"neg", "line", "tau"} <= set(seen["classes"].split()) and seen["alpha"] == "0.600"  # 4 of 5 nats
    assert "pos" in seen["raised"].split() and seen["colour"] == "rgba(213, 94, 0, 0.6)"
    assert seen["shown"] and seen["escaped"]
    for line in ("token 4 (\u03c4) ", "\u22124.000 nats", "\u22120.400 nats", "4.000 nats", "70.0% student"):
        assert line in seen["card"], seen["card"]
    assert seen["card"].count("document.title='broken'") >= 3  # the token and its place in both columns
    assert (
        seen["focused"].startswith("token 0 (\u03c4 \u2212 4)")
        and seen["moved"] == "1"
        and seen["crossed"] == "side peer"
    )
    assert (seen["silent"], seen["faint"]) == ("0.060", "0.150")
    assert len(seen["successes"]) == 1 and seen["nopeer"] == "No peer" and len(seen["failures"]) == 2
    assert "never leaves its peer" in seen["third"]
    assert (
        len(seen["found"]) == 1
        and seen["hit"] == "\\u202eright to left override"
        and seen["hash"].startswith("#r=0&t=")
    )
    assert seen["empty"]


def test_before_and_after_in_a_browser(made, tmp_path, tokenizer, group, measured):
    """The key b changes to the same rollout of the other measurement, also where a filter leaves nothing of it."""
    right = dataclasses.replace(group, rollouts=tuple(dataclasses.replace(r, reward=1.0) for r in group.rollouts))
    states = {"before": payload(tokenizer, [group], measured)}
    states["after"] = payload(tokenizer, [right], made.made_up(tokenizer, right, [None] * 3))
    seen = browse(
        tmp_path,
        page(states, title="Credit", note=""),
        r"""
        const press = (key) => document.body.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
        const now = () => [q('#measurement').value, q('#facts').textContent.slice(0, 6), q('#place').textContent,
                           q('#question').textContent.split('Success ')[1], location.hash];
        const out = {options: [...q('#measurement').options].map((o) => o.text)};
        out.shown = q('#measurement').offsetWidth > 0;
        press('j'); press('j'); out.third = now();
        press('b'); out.after = now();
        choose('filter', 'fail'); out.nothing = q('#rows').hidden; press('b'); out.back = now();
        press('b'); choose('filter', 'all'); out.filtered = now();
        choose('measurement', '0'); out.chosen = now();
        return out;""",
        "#m=0&r=0",
    )
    assert seen["options"] == ["before", "after"] and seen["shown"]
    assert seen["third"] == ["0", "\u2717 fail", "3 / 3", "1 of 3 before", "#r=2"]
    assert seen["after"] == ["1", "\u2713 succ", "3 / 3", "3 of 3 after", "#m=1&r=2"]
    assert seen["nothing"] and seen["back"] == ["0", "\u2717 fail", "2 / 2", "1 of 3 before", "#r=2"]
    assert seen["filtered"] == seen["after"] and seen["chosen"] == seen["third"]


def test_10_000_tokens_in_a_browser(made, tmp_path, tokenizer, group):
    from hsd.hindsight.groups import Group, Rollout

    words = tokenizer.convert_tokens_to_ids(made.HOSTILE)
    long = [words[(t * t) % len(words)] for t in range(10_000)]
    other = [*long[:6000], *reversed(long[6000:])]
    group = Group("long", "1", (Rollout(tuple(long), 0.0), Rollout(tuple(other), 1.0)))
    text = page({"": payload(tokenizer, [group], made.made_up(tokenizer, group, [1, None]))}, title="Long", note="")
    assert len(text) < 1_200_000
    seen = browse(
        tmp_path,
        text,
        r"""
        const at_once = document.querySelectorAll('#rows .tok').length;
        q('#go-tau').click(); await frame();
        const focused = document.activeElement, box = focused.getBoundingClientRect();
        for (let i = 0; i < 100 && document.querySelectorAll('.row').length < 79; i++) await frame();
        return {at_once, t: focused.dataset.t, visible: box.top >= 0 && box.bottom <= innerHeight,
                all: document.querySelectorAll('#rows .tok').length};""",
    )
    assert 0 < seen["at_once"] < 20_000  # the first rows; the rest follows
    assert int(seen["t"]) >= 6000 and seen["visible"] and seen["all"] == 20_000
