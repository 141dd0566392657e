"""`kimi-deploy generate`: streams, batches, resumes, and refuses what makes no sense before loading anything."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kimi_deploy.cli.generate import generate_command
from kimi_deploy.errors import KimiDeployError, ManifestError, TokenizerError, UsageError, WrongArtefactError
from kimi_deploy.manifest import Manifest
from kimi_deploy.runtime.generation import generate
from kimi_deploy.runtime.ort_runner import OrtRunner
from kimi_deploy.runtime.sampling import Sampling
from tests.runtime.export_folder import write_export_folder

WARM = ["--temperature", "1.0", "--seed", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export_folder(tmp_path_factory.mktemp("export"))


def run(folder: Path, *arguments: object, stdin: bytes = b"") -> Result:
    words = [str(folder), "--threads", "1", *map(str, arguments)]
    result = CliRunner().invoke(generate_command, words, input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def as_json(folder: Path, *arguments: object, stdin: bytes = b"") -> dict:
    return json.loads(run(folder, "--json", *arguments, stdin=stdin).stdout)


def test_the_text_is_that_of_the_runners_tokens(folder: Path) -> None:
    expected = generate(
        OrtRunner(folder, threads=1), [list(b"Hello")], max_new_tokens=20, sampling=Sampling(1.0, seed=5)
    )
    result = as_json(folder, "--prompt", "Hello", "--max-new-tokens", 20, *WARM)
    (one,) = result["results"]
    assert one["tokens"] == expected.tokens[0]
    assert one["finish_reason"] in ("length", "stop")
    assert result["statistics"]["prompt_tokens"] == 5
    streamed = run(folder, "--prompt", "Hello", "--max-new-tokens", 20, *WARM)
    assert streamed.stdout == one["text"] + "\n"
    assert "5 prompt tokens" in streamed.stderr


def test_token_ids_need_no_tokenizer_and_are_answered_with_ids(folder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    manifest = Manifest.read(bare)
    manifest.write(bare)
    with pytest.raises(TokenizerError, match="no tokenizer"):
        run(bare, "--prompt", "Hello")
    (text,) = as_json(folder, "--prompt", "Hello", "--max-new-tokens", 20, *WARM)["results"]
    arguments = ("--prompt-ids", ", ".join(map(str, b"Hello")), "--max-new-tokens", 20, *WARM)
    (ids,) = as_json(bare, *arguments)["results"]
    assert ids["tokens"] == text["tokens"]
    assert run(bare, *arguments).stdout.split() == [str(i) for i in text["tokens"]]


def test_standard_input_is_a_prompt(folder: Path) -> None:
    arguments = ("--max-new-tokens", 8)
    assert run(folder, *arguments, stdin=b"Hello").stdout == run(folder, "--prompt", "Hello", *arguments).stdout


def test_the_newline_that_ends_standard_input_is_not_of_the_prompt(folder: Path) -> None:
    (result,) = as_json(folder, "--max-new-tokens", 8, stdin=b"Hello\n")["results"]
    assert result["prompt"] == "Hello"


def test_a_reader_that_has_enough_ends_it_without_a_traceback(folder: Path) -> None:
    command = [sys.executable, "-m", "kimi_deploy", "generate", str(folder), "--prompt", "Hello", "--kernels", "none"]
    process = subprocess.Popen([*command, "--max-new-tokens", "5000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 128 + signal.SIGPIPE


def test_an_option_out_of_range_is_named_before_what_it_would_do(folder: Path) -> None:
    with pytest.raises(UsageError, match="top-p is out of range"):
        run(folder, "--prompt", "Hello", "--top-p", 2)


def test_a_file_is_a_batch_of_prompts(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Hello\n\nAnother prompt\n", encoding="utf-8")
    results = as_json(folder, "--prompts-file", path, "--max-new-tokens", 8)["results"]
    assert [r["prompt"] for r in results] == ["Hello", "Another prompt"]
    alone = as_json(folder, "--prompt", "Another prompt", "--max-new-tokens", 8)["results"]
    assert results[1] == alone[0]
    text = run(folder, "--prompts-file", path, "--max-new-tokens", 8).stdout
    assert text.index("[1] Hello") < text.index("[2] Another prompt")


def test_a_stop_id_ends_the_text(folder: Path) -> None:
    free = as_json(folder, "--prompt", "Hello", "--max-new-tokens", 20, *WARM)["results"][0]["tokens"]
    stopped = as_json(folder, "--prompt", "Hello", "--max-new-tokens", 20, *WARM, "--stop-id", free[4])["results"][0]
    assert stopped["tokens"] == free[: free.index(free[4])]
    assert stopped["finish_reason"] == "stop"


def test_chat_puts_the_prompt_into_the_template(folder: Path) -> None:
    result = as_json(folder, "--prompt", "Hi", "--chat", "--max-new-tokens", 4)
    assert result["statistics"]["prompt_tokens"] == 5  # bos H i eos >


@pytest.mark.parametrize("sampling", [[], WARM])
def test_a_saved_generation_goes_on_as_if_it_had_not_stopped(folder: Path, tmp_path: Path, sampling: list[str]) -> None:
    whole = as_json(folder, "--prompt", "Hello", "--max-new-tokens", 20, *sampling)["results"][0]["tokens"]
    path = tmp_path / "state.safetensors"
    first = as_json(folder, "--prompt", "Hello", "--max-new-tokens", 7, *sampling, "--save-state", path)
    again = as_json(folder, "--load-state", path, "--max-new-tokens", 13, *sampling)
    assert first["results"][0]["tokens"] + again["results"][0]["tokens"] == whole


def test_a_prompt_can_follow_a_saved_state(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    tokens = as_json(folder, "--prompt", "Hello", "--max-new-tokens", 7, "--save-state", path)["results"][0]["tokens"]
    runner = OrtRunner(folder, threads=1)
    expected = generate(runner, [[*b"Hello", *tokens, *b" and"]], max_new_tokens=5).tokens[0]
    again = as_json(folder, "--load-state", path, "--prompt", " and", "--max-new-tokens", 5)
    assert again["results"][0]["tokens"] == expected


REFUSED: dict[str, tuple[list[str], type[KimiDeployError], str]] = {
    "two prompts": (["--prompt", "a", "--prompts-file", "b"], UsageError, "together"),
    "two kinds of prompt": (["--prompt", "a", "--prompt-ids", "1"], UsageError, "--prompt and --prompt-ids together"),
    "chat of ids": (["--prompt-ids", "1", "--chat"], UsageError, "chat template"),
    "ids that are none": (["--prompt-ids", "1,x"], UsageError, "'x'"),
    "no ids": (["--prompt-ids", ""], UsageError, "no token ids"),
    "an id out of range": (["--prompt-ids", "1 272"], UsageError, "not in the vocabulary(?s:.*)0 to 271"),
    "a huge id": (["--prompt-ids", "9" * 40], UsageError, "not in the vocabulary"),
    "a negative id": (["--prompt-ids", "1,-1"], UsageError, "not in the vocabulary"),
    "greedy and warm": (["--prompt", "a", "--greedy", "--temperature", "1"], UsageError, "--greedy"),
    "top-k without temperature": (["--prompt", "a", "--top-k", "5"], UsageError, "temperature 0"),
    "negative temperature": (["--prompt", "a", "--temperature", "-1"], UsageError, "out of range"),
    "no such prompts": (["--prompts-file", "/nonexistent/prompts"], UsageError, "cannot be read"),
    "batch and state": (["--prompts-file", "b", "--save-state", "s"], UsageError, "one sequence"),
    "chat and state": (["--chat", "--load-state", "s"], UsageError, "conversation"),
    "nowhere to save": (["--prompt", "a", "--save-state", "/nonexistent/s"], UsageError, "no folder"),
    # a folder that nobody may write to, root neither
    "nowhere writable to save": (["--prompt", "a", "--save-state", "/proc/s"], UsageError, "cannot be written"),
    "a folder to save to": (["--prompt", "a", "--save-state", "/proc"], UsageError, "is a folder"),
    "no such state": (["--load-state", "/nonexistent/s"], UsageError, "no such file"),
    "empty prompt": (["--prompt", ""], UsageError, "nothing to continue"),
    "stop id out of range": (["--prompt", "a", "--stop-id", "272"], UsageError, "not in the vocabulary"),
    "too little capacity": (["--prompt", "abc", "--capacity", "4"], UsageError, "capacity 4"),
    "wrong backend": (["--prompt", "a", "--backend", "torch"], UsageError, "cannot run this folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_is_refused(folder: Path, case: str) -> None:
    arguments, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        run(folder, *arguments)


def test_a_capacity_that_a_saved_state_exceeds_is_refused_before_the_model_is_opened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.safetensors"
    run(folder, "--prompt", "Hello", "--max-new-tokens", 7, "--save-state", path)
    monkeypatch.setattr("kimi_deploy.runtime.open.open_runner", lambda *a, **k: pytest.fail("the model was opened"))
    # 5 of the prompt, 6 consumed, 1 pending, 3 of the next prompt, 3 of 4 new ones
    with pytest.raises(UsageError, match=r"18 or more: 12 tokens of the saved state, 3 tokens of the prompt") as error:
        run(folder, "--load-state", path, "--prompt", "abc", "--max-new-tokens", 4, "--capacity", 17)
    assert error.value.exit_code == 2
    assert "--capacity 18" in error.value.fix


def test_the_capacity_that_is_asked_for_suffices(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    run(folder, "--prompt", "Hello", "--max-new-tokens", 7, "--save-state", path)
    run(folder, "--load-state", path, "--prompt", "abc", "--max-new-tokens", 4, "--capacity", 18)


@pytest.mark.parametrize("case", ["empty prompt", "stop id out of range", "too little capacity", "no ids"])
def test_a_bad_request_is_refused_before_the_model_is_opened(
    folder: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kimi_deploy.runtime.open.open_runner", lambda *a, **k: pytest.fail("the model was opened"))
    arguments, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        run(folder, *arguments)


def test_nothing_is_opened_when_the_state_cannot_be_saved(tmp_path: Path) -> None:
    # the folder holds no model, which opening it would say
    with pytest.raises(UsageError, match="--save-state"):
        run(tmp_path, "--prompt", "a", "--save-state", tmp_path / "none" / "s")


def test_input_that_is_not_text_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        run(folder, stdin=b"\xff\xfe")


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        run(tmp_path / "none", "--prompt", "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="a file, not a folder"):
        run(tmp_path / "file", "--prompt", "a")
    (tmp_path / "file").unlink()
    with pytest.raises(WrongArtefactError, match="holds no model") as error:
        run(tmp_path, "--prompt", "a")
    assert "kimi-deploy export" in error.value.fix


def test_a_checkpoint_with_backend_ort_says_how_to_export(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="backend ort") as error:
        run(tmp_path, "--prompt", "a", "--backend", "ort")
    assert f"kimi-deploy export {tmp_path}" in error.value.fix


def test_a_changed_export_is_refused(tmp_path: Path) -> None:
    folder = write_export_folder(tmp_path / "export")
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-1])
    with pytest.raises(ManifestError, match=r"model\.onnx does not match"):
        run(folder, "--prompt", "a")
