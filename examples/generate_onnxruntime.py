"""Generate with an exported folder, using only ONNX Runtime and NumPy.

The graph's metadata says which inputs and outputs there are, and for every state its past name, its present name, its
dtype and its shape. What the inputs besides the states mean is fixed by four names: input_ids, sequence_lengths,
past_lengths (only where a layer has a latent cache) and logits_indices. Copy this file and change it as you like.

    python generate_onnxruntime.py EXPORT_DIR --ids 72,101,108,108,111 --max-new-tokens 32
    python generate_onnxruntime.py EXPORT_DIR --text "Hello" --max-new-tokens 32      # a byte vocabulary only
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort

METADATA_KEY = "kimi_deploy.contract"
NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16}


def new_states(contract: dict, batch: int, capacity: int) -> dict[str, np.ndarray]:
    """Zeroed states by past name. A symbolic dimension is "batch", or "capacity" of a latent cache in tokens."""
    if contract["dtype"] not in NUMPY_DTYPES:
        raise SystemExit(f"NumPy has no {contract['dtype']}: export with --dtype float32 or float16 for this script")
    sizes = {"batch": batch, "capacity": capacity}
    return {
        s["past"]: np.zeros([sizes.get(d, d) for d in s["dims"]], NUMPY_DTYPES[s["dtype"]]) for s in contract["states"]
    }


def step(
    session: ort.InferenceSession, contract: dict, ids: list[int], states: dict[str, np.ndarray], past: int
) -> np.ndarray:
    """Consume `ids` after `past` tokens; returns the last token's logits [vocab] and updates `states` in place.

    A state of fixed size gets a new array. A latent cache is bound with the same memory as input and output: the graph
    writes the new rows where they belong and leaves the others alone.
    """
    count = len(ids)
    feeds = {
        "input_ids": [ids],
        "sequence_lengths": [count],
        "past_lengths": [past],
        "logits_indices": [[count - 1]],
    }
    binding = session.io_binding()
    pasts = {s["past"] for s in contract["states"]}
    for tensor in contract["inputs"]:
        if tensor["name"] not in pasts:
            binding.bind_cpu_input(tensor["name"], np.array(feeds[tensor["name"]], tensor["dtype"]))
    presents = {}
    for state in contract["states"]:
        old = states[state["past"]]
        if state["kind"] == "latent":
            old = new = old[:, : past + count]  # the part in use: for one sequence a contiguous prefix
        else:
            new = presents[state["past"]] = np.empty_like(old)
        binding.bind_input(state["past"], "cpu", 0, old.dtype.type, old.shape, old.ctypes.data)
        binding.bind_output(state["present"], "cpu", 0, new.dtype.type, new.shape, new.ctypes.data)
    (output,) = (o for o in contract["outputs"] if o["name"] not in {s["present"] for s in contract["states"]})
    logits = np.empty((1, 1, contract["vocab_size"]), output["dtype"])
    binding.bind_output(output["name"], "cpu", 0, logits.dtype.type, logits.shape, logits.ctypes.data)
    session.run_with_iobinding(binding)
    states.update(presents)
    return logits[0, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="written by `kimi-deploy export`")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--ids", help="token ids, separated by commas")
    prompt.add_argument("--text", help="text, one token per UTF-8 byte")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()

    if not (arguments.folder / "model.onnx").is_file():
        parser.error(f"no export in {arguments.folder}")
    session = ort.InferenceSession(arguments.folder / "model.onnx", providers=["CPUExecutionProvider"])
    contract = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    try:
        ids = [int(i) for i in arguments.ids.split(",")] if arguments.text is None else list(arguments.text.encode())
    except ValueError:
        parser.error(f"--ids takes numbers separated by commas, not {arguments.ids!r}")
    if not ids or not all(0 <= i < contract["vocab_size"] for i in ids):
        parser.error(f"a prompt is one or more ids from 0 to {contract['vocab_size'] - 1}")
    if arguments.max_new_tokens < 1:
        parser.error("--max-new-tokens is 1 or more")
    states = new_states(contract, 1, len(ids) + arguments.max_new_tokens)

    logits = step(session, contract, ids, states, past=0)
    tokens = [int(logits.argmax())]
    while len(tokens) < arguments.max_new_tokens:
        logits = step(session, contract, tokens[-1:], states, past=len(ids) + len(tokens) - 1)
        tokens.append(int(logits.argmax()))
    if arguments.text is not None:
        print(bytes(t for t in tokens if t < 256).decode(errors="replace"))
    else:
        print(",".join(map(str, tokens)))


if __name__ == "__main__":
    main()
