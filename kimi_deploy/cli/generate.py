"""kimi-deploy generate."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kimi_deploy.cli.common import (
    NamedPath,
    folder_argument,
    json_option,
    kernels_option,
    print_json,
    progress,
    say,
    threads_option,
)
from kimi_deploy.cli.sizes import TokenCount
from kimi_deploy.errors import UsageError
from kimi_deploy.output_file import check_writable

if TYPE_CHECKING:
    from kimi_deploy.runtime.generation import GenerationResult


@click.command("generate")
@folder_argument("folder")
@click.option("--prompt", help="The prompt; without one, standard input is the prompt.")
@click.option(
    "--prompt-ids",
    metavar="IDS",
    help="The prompt as token ids, as 1,2,3: what follows is printed as ids too, and the folder needs no tokenizer.",
)
@click.option("--prompts-file", type=NamedPath(path_type=Path), help="A batch: one prompt per line, in UTF-8.")
@click.option("--chat", is_flag=True, help="Put each prompt into the model's chat template, as a user's message.")
@click.option("--max-new-tokens", default=128, show_default=True, type=TokenCount(), help="Per prompt.")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--greedy", is_flag=True, help="Always the likeliest token; the same as --temperature 0.")
@click.option("--top-k", default=0, show_default=True, help="Draw from the k likeliest tokens; 0 is all.")
@click.option("--top-p", default=1.0, show_default=True, help="Draw from the fewest tokens that reach p; 1 is all.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same tokens.")
@click.option("--stop-id", "stop_ids", multiple=True, type=int, help="Another token id to stop at. Repeatable.")
@click.option(
    "--backend",
    type=click.Choice(("ort", "torch", "trt")),
    help="ort runs an export, torch a checkpoint, trt an engine on a GPU; without it the folder decides.",
)
@click.option(
    "--provider",
    type=click.Choice(("cpu", "cuda")),
    default="cpu",
    show_default=True,
    help="Where ort and torch run.",
)
@threads_option
@click.option(
    "--capacity",
    type=TokenCount(),
    help="Tokens of cache per sequence, as 4096 or 4K; without it, just what is needed.",
)
@click.option("--save-state", type=NamedPath(path_type=Path), help="Save the state after one prompt.")
@click.option("--load-state", type=NamedPath(path_type=Path), help="Go on from a saved state; a prompt may follow.")
@kernels_option
@json_option
def generate_command(folder: Path, **options: Any) -> None:
    """Generate text from FOLDER, an export, a checkpoint or an engine.

    One prompt streams to standard output as it is written; a batch is printed at its end. Generation stops at the
    end tokens that the config and the tokenizer name, and at each --stop-id.
    """
    from kimi_deploy.runtime.sampling import Sampling

    sampling = Sampling(options["temperature"], options["top_k"], options["top_p"], options["seed"])
    _check(options)
    prompts = _prompts(options)

    from kimi_deploy.runtime.base import kernels_to_dict, ops_run_as
    from kimi_deploy.runtime.open import check_folder, find_backend, open_runner
    from kimi_deploy.runtime.text_generation import TextGenerator

    check_folder(folder, options["backend"])
    generator = TextGenerator(folder, as_ids=options["prompt_ids"] is not None)
    ids = [generator.encode(p, chat=options["chat"]) for p in prompts]
    generator.check(
        ids,
        max_new_tokens=options["max_new_tokens"],
        extra_stop_ids=options["stop_ids"],
        state_file=options["load_state"],
        capacity=options["capacity"],
    )
    runner = open_runner(
        folder,
        options["backend"],
        provider=options["provider"],
        threads=options["threads"],
        kernels=options["kernels"],
    )
    state = None
    if options["load_state"] is not None:
        new_tokens = len(ids[0]) + options["max_new_tokens"]
        state, pending = generator.load(runner, options["load_state"], new_tokens, options["capacity"])
        ids = [pending + ids[0]]
    streams = len(ids) == 1 and not options["as_json"]
    # what is not written as it comes is written at the end
    total = len(ids) * options["max_new_tokens"]
    with nullcontext(lambda n: None) if streams else progress("generating", total, unit="tokens") as advance:
        completions, result = generator.complete(
            runner,
            ids,
            max_new_tokens=options["max_new_tokens"],
            sampling=sampling,
            extra_stop_ids=options["stop_ids"],
            state=state,
            capacity=options["capacity"],
            on_text=lambda _, text: click.echo(text, nl=False) if streams else advance(1),
        )
    if options["save_state"] is not None:
        generator.save(result, options["save_state"])
    if options["as_json"]:
        print_json(
            {
                "results": [
                    {"prompt": p, "text": c.text, "tokens": c.tokens, "finish_reason": c.finish_reason}
                    for p, c in zip(prompts, completions, strict=True)
                ],
                "statistics": _statistics(result),
                "kernels": kernels_to_dict(runner.kernels),
            }
        )
    elif streams:
        click.echo()
    else:
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
            click.echo(f"[{number}] {prompt}\n{completion.text}\n")
    how = f"; {ops_run_as(runner.kernels)}" if find_backend(folder) == "ort" else ""
    say(_summary(result) + how)


def _check(options: dict[str, Any]) -> None:
    """Refuse options that contradict each other before anything is loaded."""

    def refuse(what: str, fix: str) -> None:
        raise UsageError(what, fix=fix)

    given = [name for name in ("prompt", "prompt_ids", "prompts_file") if options[name] is not None]
    if len(given) > 1:
        refuse(" and ".join(f"--{name.replace('_', '-')}" for name in given) + " together", "give one of them")
    if options["chat"] and options["prompt_ids"] is not None:
        refuse("a chat template is made of text, --prompt-ids is not", "give the prompt as text, or leave out --chat")
    if options["greedy"] and options["temperature"]:
        refuse("--greedy with a --temperature above 0", "give one of them")
    if not options["temperature"] and (options["top_k"] or options["top_p"] != 1):
        refuse("--top-k and --top-p choose nothing at temperature 0", "add --temperature, for example 0.7")
    if options["prompts_file"] is not None and (options["save_state"] or options["load_state"]):
        refuse("a state file holds one sequence, --prompts-file several", "use --prompt")
    if options["chat"] and options["load_state"] is not None:
        refuse("a chat template writes a conversation from its beginning", "give the next turn as plain text")
    if options["load_state"] is not None and not options["load_state"].is_file():
        path = options["load_state"]
        raise UsageError(
            "--load-state: there is no such file",
            seen=f"{path}: a folder" if path.is_dir() else str(path),
            expected="a file that `generate --save-state` wrote",
        )
    if options["save_state"] is not None:
        check_writable("--save-state", options["save_state"])


def _prompts(options: dict[str, Any]) -> list[str]:
    for one in (options["prompt"], options["prompt_ids"]):
        if one is not None:
            return [one]
    path = options["prompts_file"]
    if path is None:
        if options["load_state"] is not None:
            return [""]
        if sys.stdin.isatty():
            raise UsageError("no prompt", fix="give --prompt, --prompts-file, or text on standard input")
        # the newline that ends a line of text is the shell's, not the prompt's
        return [_text(sys.stdin.buffer.read(), "standard input").removesuffix("\n").removesuffix("\r")]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            "the prompts file cannot be read",
            seen=f"{path}: {error.strerror}",
            expected="a text file in UTF-8, one prompt per line",
            fix="check the path",
        ) from error
    prompts = [line for line in _text(data, str(path)).splitlines() if line.strip()]
    if not prompts:
        raise UsageError("the prompts file has no prompt", seen=str(path), expected="one prompt per line")
    return prompts


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("a prompt is not valid UTF-8", seen=f"{where}: {error}") from None


def _statistics(result: GenerationResult) -> dict[str, float]:
    return {
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
        "time_to_first_token_s": result.time_to_first_token,
        "prefill_tokens_per_s": result.prefill_tokens_per_second,
        "decode_tokens_per_s": result.decode_tokens_per_second,
        "state_bytes": result.state.nbytes,
    }


def _summary(result: GenerationResult) -> str:
    return (
        f"{result.prompt_tokens} prompt tokens at {result.prefill_tokens_per_second:.0f}/s, "
        f"first token after {result.time_to_first_token:.3f} s, "
        f"{result.new_tokens} new tokens at {result.decode_tokens_per_second:.1f}/s, "
        f"state {result.state.nbytes / 1e6:.2f} MB"
    )
