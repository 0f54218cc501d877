"""Configs and overrides that nobody would write: each loads, or ends in a ConfigError of a few lines.

Seeds are kept, so that a failure names its input. MMOE_FUZZ raises the number of inputs.
"""

import os
import random
import resource
import signal
from contextlib import contextmanager

import pytest

from mmoe.config.load import absolute, dump, flatten, load, merge, parse_overrides, read_layers, validate
from mmoe.config.reader import read_yaml
from mmoe.errors import ConfigError
from mmoe.recipe.config import RunConfig
from tests.conftest import REPOSITORY

INPUTS = int(os.environ.get("MMOE_FUZZ", 1000))
MOST_CPU_SECONDS = 30  # of one input: what takes longer hangs
MOST_MEMORY = 1 << 30  # bytes that all inputs together may add
CONFIGS = [(REPOSITORY / "configs" / name).read_bytes() for name in ("demo.yaml", "moe_10b.yaml", "real_small.yaml")]
PARENT = merge(*read_layers(REPOSITORY / "configs" / "demo.yaml"))
KEYS = sorted(flatten(load(RunConfig, REPOSITORY / "configs" / "demo.yaml").model_dump(mode="json")))
VALUES = (
    *(
        "",
        "null",
        "~",
        "true",
        "on",
        "no",
        "Yes",
        "0",
        "-1",
        "1",
        "3",
        "012",
        "0x10",
        "0b1",
        "1:30",
        "1_0",
        "1__0_",
        "_",
    ),
    *("1e-3", "1e400", "-1e400", "1e308", "1e-320", ".5", "5.", ".inf", "-.inf", ".nan", "inf", "nan", "Infinity"),
    *("9" * 19, "9" * 400, "9" * 5000, "-" + "9" * 30, str(2**63 - 1), str(2**62), str(2**31), "1" + "0" * 18),
    *("2020-01-01", "2020-01-01T00:00:00Z", "!!set {a}", "!!binary aGk=", "!!timestamp 2020-01-01", "!!omap [a: 1]"),
    *("!!python/object/apply:os.system [true]", "!x y", "!!str 1", "!!int x", "! 1", "!<a> b", "!!float .inf"),
    *(
        "[",
        "]",
        "{",
        "}",
        "{a",
        "[a",
        "'",
        '"',
        "'a",
        '"a',
        "a: b: c",
        "- a",
        "? a",
        ": a",
        "a:",
        "@",
        "`",
        "%",
        "%YAML",
    ),
    *(
        "[1, 2]",
        "[a, [b]]",
        "{}",
        "{a: 1}",
        "{a: {b: [1]}}",
        "{1: 2}",
        "{true: 1}",
        "{null: 1}",
        "{[a]: 1}",
        "{a: 1, a: 2}",
    ),
    *(
        "&a [*a]",
        "&a {b: *a}",
        "*a",
        "[&a x, *a]",
        "{<<: {a: 1}}",
        "{<<: 1}",
        "{<<: [1]}",
        "<<",
        "=",
        "{<<: &b {<<: *b}}",
    ),
    *(
        '"\\ud800"',
        '"\\0"',
        '"\\x1b[31m"',
        '"\\U00110000"',
        '"\\u202e"',
        "\ud800",
        "\0",
        "\x1b[2J",
        "\x85",
        "\ufeff",
        "\u2028",
    ),
    *(
        "[" * 40 + "]" * 40,
        "[" * 5000,
        "{a: " * 40 + "1" + "}" * 40,
        "- " * 500,
        "x" * 5000,
        "--- a\n--- b",
        "...",
        "---",
    ),
    *(
        "a\nb",
        "|\n a",
        ">\n a",
        "#",
        "a #b",
        "[a]b[/c]",
        "pipe:rm",
        "s3://a/b",
        "https://u:p@h/",
        "/",
        ".",
        "..",
        "~/x",
        " ",
    ),
    *(
        "float32",
        "bfloat16",
        "cosine",
        "[1, 1]",
        "[[1]]",
        "[.nan]",
        "[1, .inf]",
        "{steps: 1}",
        "{fraction: .nan}",
        "1.0",
    ),
)
TOKENS = [value.encode(errors="surrogatepass") for value in VALUES] + [
    b"\n",
    b"\n  ",
    b": ",
    b"- ",
    b"\xff",
    b"\t",
    b"\r",
]


def random_key(rng: random.Random) -> str:
    key = rng.choice(KEYS)
    match rng.randrange(10):
        case 0:
            return rng.choice(
                ["", ".", "a..b", ".a", "a.", "a" * 300, ".".join("a" * 100), "data.sources.x", "\ud800", "[/]"]
            )
        case 1:
            return key.rpartition(".")[0] or key
        case 2:
            return f"{key}.{rng.choice(['x', '0', 'a.b', '[x]', ' '])}"
        case 3:
            at = rng.randrange(len(key))
            return key[:at] + rng.choice(["", "x", ".", "=", " ", "é"]) + key[at + rng.randrange(2) :]
    return key


def random_override(rng: random.Random) -> str:
    value = rng.choice(VALUES)
    if rng.random() < 0.2:
        at = rng.randrange(len(value) + 1)
        value = value[:at] + rng.choice(VALUES) + value[at:]
    return random_key(rng) + rng.choice(["=", "=", "=", "=", "=", "==", "", " = "]) + value


def random_config(rng: random.Random) -> bytes:
    content = bytearray(rng.choice(CONFIGS))
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        stop = min(len(content), start + rng.choice([0, 1, 1, 5, 50]))
        match rng.randrange(6):
            case 0:
                del content[start:stop]
            case 1:
                content[start:start] = content[start:stop] * rng.choice([1, 2, 200])
            case 2:
                content[start:stop] = rng.choice(TOKENS)
            case 3 if content:
                content[start % len(content)] ^= 1 << rng.randrange(8)
            case 4:
                value = content.find(b": ", start)
                if value >= 0:
                    end = min(end for end in (content.find(c, value + 2) for c in (b"\n", b",", b"}")) if end >= 0)
                    content[value + 2 : end] = rng.choice(TOKENS)
            case 5:
                content[start:start] = rng.choice(TOKENS)
    return bytes(content[: len(content) if rng.random() < 0.9 else rng.randrange(len(content) + 1)])


@contextmanager
def bounded_work():
    """Ends what hangs, by the time of this process and not of the machine; checks what memory was taken."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def stop(*_):
        raise TimeoutError("an input takes too long")

    old = signal.signal(signal.SIGPROF, stop)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY


def check(made, said_by: str, written: bool = True) -> bool:
    """Whether `made()` gives a config, the same again after it is written; it may raise nothing but a ConfigError."""
    signal.setitimer(signal.ITIMER_PROF, MOST_CPU_SECONDS)
    try:
        config = made()
    except ConfigError as error:
        assert 0 < len(str(error)) < 20_000, said_by
        return False
    except Exception as error:
        pytest.fail(f"{said_by[:500]}: {type(error).__name__}: {str(error)[:500]}")
    kept = absolute(config)
    assert not written or validate(RunConfig, read_yaml(dump(kept), "dumped"), "dumped") == kept, said_by
    return True


def test_overrides_that_nobody_would_write_end_in_a_sentence(tmp_path):
    loaded = 0
    with bounded_work():
        for seed in range(INPUTS):
            rng = random.Random(seed)
            overrides = [random_override(rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]

            def made(overrides=overrides):
                given = parse_overrides(overrides)
                try:
                    RunConfig.check_layer(PARENT, given)
                except ValueError as error:
                    raise ConfigError(str(error)) from None
                return validate(RunConfig, merge(PARENT, given), "demo.yaml")

            loaded += check(made, f"seed {seed}: {overrides!r}")
    assert INPUTS // 100 < loaded < INPUTS  # both ends are met


def test_every_key_with_every_odd_value_ends_in_a_sentence():
    """Of each alone, so that no check of one key hides what another does with it."""
    odd = [value for value in VALUES if len(value) < 25]
    with bounded_work():
        for key in KEYS:
            for value in odd:
                override = f"{key}={value}"

                def made(override=override):
                    return validate(RunConfig, merge(PARENT, parse_overrides([override])), "demo.yaml")

                check(made, override, written=False)


def test_config_files_that_nobody_would_write_end_in_a_sentence(tmp_path):
    loaded, path = 0, tmp_path / "config.yaml"
    with bounded_work():
        for seed in range(INPUTS // 4):
            content = random_config(random.Random(seed))
            path.write_bytes(content)
            loaded += check(lambda: load(RunConfig, path), f"seed {seed}: {content!r}")
    assert INPUTS // 200 < loaded < INPUTS // 4
