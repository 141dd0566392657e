"""Sizes are read as people write them, in every command alike."""

import click
import pytest
from click.testing import CliRunner

from kimi_deploy.cli.main import cli
from kimi_deploy.cli.sizes import ByteSize, TokenCount


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1", 1), ("4096", 4096), ("128K", 131072), ("128k", 131072), ("128 k", 131072), ("1m", 1048576), (" 2M ", 2**21)],
)
def test_tokens_are_counted_in_powers_of_two(text: str, tokens: int) -> None:
    assert TokenCount().convert(text, None, None) == tokens


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24gb", 24 * 10**9),
        ("24G", 24 * 10**9),
        ("24g", 24 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("1.5 gib", 3 * 2**29),
        ("500 MB", 5 * 10**8),
        ("7", 7),
        ("7B", 7),
    ],
)
def test_bytes_are_counted_in_the_unit_that_is_named(text: str, size: int) -> None:
    assert ByteSize().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5K", "128Ki", "128KB", "k", "1,000", "9" * 30, "4G"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match=r"number of tokens|range"):
        TokenCount().convert(text, None, None)


@pytest.mark.parametrize("text", ["", "0", "-1", "GB", "24 bytes", "24GB/s", "0.1B", "1e9"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size"):
        ByteSize().convert(text, None, None)


TOKENS = {
    "generate": ["--max-new-tokens", "--capacity"],
    "validate": ["--max-tokens", "--long-tokens", "--greedy-tokens"],
    "plan": ["--context", "--chunk"],
    "bench": ["--prompt-tokens", "--decode-steps", "--context", "--long-context", "--chunk"],
}
BYTES = {"plan": ["--memory", "--bandwidth"], "export": ["--max-shard-size"]}


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [(c, o, "128k") for c, options in TOKENS.items() for o in options]
    + [(c, o, "24gb") for c, options in BYTES.items() for o in options],
)
def test_every_option_of_a_size_takes_the_same_spelling(command: str, option: str, value: str) -> None:
    group = cli.get_command(click.Context(cli), command)
    assert group is not None
    if isinstance(group, click.Group):
        group = group.commands["model"]
    parameter = next(p for p in group.params if option in p.opts)
    parameter.type_cast_value(click.Context(group), value)
    with pytest.raises(click.BadParameter):
        parameter.type_cast_value(click.Context(group), "lots")


@pytest.mark.parametrize("command", ["generate", "validate", "bench"])
def test_more_threads_than_any_machine_has_are_refused(command: str) -> None:
    with pytest.raises(click.BadParameter, match=r"1<=x<=1024"):
        CliRunner().invoke(
            cli, [command, "a", "b", "--threads", "9" * 20], standalone_mode=False, catch_exceptions=False
        )
