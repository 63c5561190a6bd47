"""Command lines: values, overrides, help, and one sentence for every mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lcx.cli.flags import CONFIG, WORKDIR, Flag, Help, parse, read_config
from lcx.cli.main import VERBS, main, run
from lcx.config import Config
from lcx.errors import UserError

ROOT = Path(__file__).parents[2]
DECLARED = [
    CONFIG,
    WORKDIR,
    Flag("prompt", "the text to go on from", default=""),
    Flag("top_k", "tokens to draw from", kind=int, limits={"lower_bound": 1}),
    Flag("temperature", "0 takes the likeliest", kind=float, default=1.0, limits={"lower_bound": 0.0}),
    Flag("verbose", "say more", kind=bool, default=False),
]
GIVEN = ["--config=c.py", "--workdir=w"]


def parsed(*words):
    return parse("demo", "Does nothing.", DECLARED, words)


def test_values_have_their_kinds():
    values = parsed(*GIVEN, "--top_k", "5", "-temperature=0", "--verbose")
    assert (values.config, values.workdir, values.prompt) == ("c.py", "w", "")
    assert (values.top_k, values.temperature, values.verbose) == (5, 0.0, True)
    assert type(values.temperature) is float
    assert parsed(*GIVEN).top_k is None and not parsed(*GIVEN, "--noverbose").verbose


def test_one_call_leaves_nothing_for_the_next():
    parsed(*GIVEN, "--top_k=5", "--config.train.steps=3")
    assert parsed(*GIVEN).top_k is None and parsed(*GIVEN).overrides == []


def test_overrides_are_kept_in_order_in_both_spellings():
    words = [
        "--config.train.steps=1",
        *GIVEN,
        "--config.mesh.data",
        "-1",
        "--config.train.steps",
        "2",
        "--config.a=b=c",
    ]
    assert parsed(*words).overrides == [("train.steps", "1"), ("mesh.data", "-1"), ("train.steps", "2"), ("a", "b=c")]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([*GIVEN, "--workdirs=x"], 'unknown flag --workdirs: did you mean "workdir"? Allowed: config, prompt, temp'),
        ([*GIVEN, "--train.steps=3"], "a field of the config is written --config.train.steps=value."),
        ([*GIVEN, "--top_k=many"], "--top_k=many"),
        ([*GIVEN, "--top_k=0"], "--top_k=0"),
        ([*GIVEN, "--top_k"], "--top_k"),
        ([*GIVEN, "--noverbose=3"], "--noverbose"),
        ([*GIVEN, "extra"], '"extra" is not a flag'),
        (["--config=c.py"], "lcx demo needs --workdir: the folder of the run"),
        (["--config=c.py", "--workdir="], "lcx demo needs --workdir"),
        ([*GIVEN, "--config.train.steps"], "--config.train.steps needs a value"),
        (["--config.train.steps", *GIVEN], "--config.train.steps needs a value"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence):
    with pytest.raises(UserError) as refusal:
        parsed(*words)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_verb_without_config_knows_no_overrides():
    with pytest.raises(UserError, match="unknown flag --config.train.steps"):
        parse("demo", "", [WORKDIR], ["--workdir=w", "--config.train.steps=3"])


def test_help_names_every_flag_and_default():
    with pytest.raises(Help) as help_text:
        parsed("--help", "--nonsense")
    text = str(help_text.value)
    assert text.startswith("usage: lcx demo --config=... --workdir=... [flags]\n\nDoes nothing.\n")
    for flag in DECLARED:
        assert f"--{flag.name} " in text and flag.help in text
    assert "(default: 1.0)" in text and "--config.KEY" in text


def test_later_overrides_win_and_reach_the_config():
    words = [
        f"--config={ROOT}/configs/samba.py:size=tiny",
        "--workdir=w",
        "--config.train.steps=3",
        "--config.train.steps=1e2",
        "--config.data.sources[0].path=/corpus",
        "--config.model.mixers.swa.num_heads=4",
    ]
    config = Config.from_dict(read_config(parsed(*words)))
    assert config.train.steps == 100
    assert config.data.sources[0].path == "/corpus"
    assert config.model.mixers["swa"]["num_heads"] == 4


def test_exit_codes(capsys):
    def refuse(argv):
        raise UserError("the key is wrong.")

    def interrupted(argv):
        raise KeyboardInterrupt

    def broken(argv):
        raise ZeroDivisionError

    assert run(lambda argv: 75, []) == 75
    assert run(refuse, []) == 2
    assert capsys.readouterr() == ("", "error: the key is wrong.\n")
    assert run(interrupted, []) == 1
    with pytest.raises(ZeroDivisionError):
        run(broken, [])


def test_the_verb_gets_the_words_after_it(monkeypatch):
    seen = []
    monkeypatch.setitem(VERBS, "demo", ("demo_verb", "does nothing"))
    monkeypatch.setitem(sys.modules, "demo_verb", type(sys)("demo_verb"))
    monkeypatch.setattr(sys.modules["demo_verb"], "main", lambda argv: seen.append(argv) or 7, raising=False)
    assert main(["demo", "--a", "b"]) == 7
    assert seen == [["--a", "b"]]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_the_list_of_verbs(words, capsys):
    assert main(words) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)


def test_an_unknown_verb(capsys):
    assert main(["trian"]) == 2
    said = f'error: unknown verb "trian": did you mean "train"? Allowed: {", ".join(sorted(VERBS))}.\n'
    assert capsys.readouterr() == ("", said)


def modules_after(code):
    """The exit code and the names of the modules imported by a fresh process that runs `code`."""
    code = f"import sys, json, atexit\natexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules))))\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=60)
    return done.returncode, done.stdout.splitlines()[-1], done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import lcx.cli.main; sys.exit(lcx.cli.main.main(['--help']))",
        "import lcx.cli.main; sys.exit(lcx.cli.main.main(['train', '--help']))",
        "import lcx.cli.main; sys.exit(lcx.cli.main.main(['generate', '--help']))",
        "import lcx.cli.main; sys.exit(lcx.cli.main.main(['verify', '--help']))",
        f"import lcx.config; lcx.config.load_config({str(ROOT / 'configs/quickstart.py')!r})",
    ],
)
def test_help_and_configs_do_not_import_jax(code):
    exit_code, modules, errors = modules_after(code)
    assert exit_code == 0, errors
    assert '"lcx.config"' in modules
    assert not {'"jax"', '"flax"'} & set(modules.strip("[]").split(", "))


@pytest.mark.parametrize("verb", VERBS)
def test_scripts_are_the_verbs(verb):
    def output(*words):
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, timeout=60)

    by_script = output(f"scripts/{verb}.py", "--help")
    by_verb = output("-c", f"import sys, lcx.cli.main; sys.exit(lcx.cli.main.main(['{verb}', '--help']))")
    assert by_script.returncode == 0, by_script.stderr
    assert by_script.stdout == by_verb.stdout != ""
