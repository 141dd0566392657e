"""Export: checkpoint folder in, model.onnx + weight files + manifest.json + tokenizer files out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from kimi_deploy.checkpoint import Checkpoint
from kimi_deploy.contract import METADATA_KEY, Dtype, GraphContract
from kimi_deploy.errors import DiskSpaceError, UsageError
from kimi_deploy.manifest import Manifest
from kimi_deploy.onnx.bodies import set_bodies
from kimi_deploy.onnx.check import check_graph
from kimi_deploy.onnx.journal import Journal
from kimi_deploy.onnx.passes import (
    check_every_parameter_is_read,
    mark_plugin_nodes,
    name_dimensions,
    replace_sequences,
    tidy,
    transpose_weights,
)
from kimi_deploy.onnx.quantize import quantize_graph, quantize_weights
from kimi_deploy.onnx.weight_files import (
    Layout,
    attach,
    lay_out,
    layout_of,
    link_checkpoint_files,
    reserve,
    write_weights,
)
from kimi_deploy.onnx.weights import in_place_spans, plan_weights
from kimi_deploy.ops.flavours import Flavour
from kimi_deploy.output_folder import resumable_folder
from kimi_deploy.quantization.scheme import Scheme
from kimi_deploy.quantization.selection import record, settled
from kimi_deploy.text.stopping import stop_token_ids
from kimi_deploy.text.token_ids import TokenIds
from kimi_deploy.text.tokenizer import TOKENIZER_FILES, tokenizer_if_any
from kimi_deploy.weights import weight_table

MODEL_NAME = "model.onnx"

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""Opens a progress display for a step of so many bytes; yields a function that advances it."""


def export_model(
    folder: Path,
    output: Path,
    *,
    dtype: Dtype,
    flavour: Flavour,
    overwrite: bool,
    progress: Progress,
    max_shard_bytes: int | None = None,
    reference: bool = False,
    quantization: Scheme | None = None,
) -> Manifest:
    """Export the checkpoint in `folder` to `output`, whole or not at all; the result has passed its checks.

    The checks: ONNX's full checker, the contract's interface, and, read back from the files, the value of every weight.
    Weights go to one file, or to files of at most `max_shard_bytes`; with `reference`, those that the checkpoint holds
    just as the graph needs them stay there, and the output gets hard links to its files. Memory does not grow with the
    checkpoint; a run that was cut short is gone on with (`output_folder.resumable_folder`), and gives the same bytes.
    `quantization` stores the parameters it selects in 4 or 8 bits.

    Raises UsageError for an output that cannot be used or a quantisation that does not fit the model, ConfigError or
    CheckpointError for a bad checkpoint, TokenizerError for tokenizer files that could not be used, DiskSpaceError when
    there is too little disk space, and ExportError when the model cannot be traced or the result is not right.
    """
    checkpoint = Checkpoint.open(folder)
    checkpoint.resolve()
    # the export gets copies of these files, with which `generate` would fail
    tokenizer = tokenizer_if_any(folder) or TokenIds(checkpoint.config.vocab_size)
    stop_token_ids(checkpoint.config, tokenizer, folder)
    if quantization is not None:
        if reference:
            raise UsageError(
                "--quantize and --weights reference exclude each other",
                seen="both",
                expected="packed weights: a checkpoint's files hold none that are quantised",
                fix="leave --weights out",
            )
        quantization = settled(quantization, checkpoint.config, dtype)
    source = {"checkpoint": checkpoint.fingerprint(), "name": folder.resolve().name}
    contract = GraphContract.of(checkpoint.config, dtype)
    with resumable_folder(output, overwrite=overwrite, known=Manifest.files_of("onnx")) as (target, journal_path):
        in_place = in_place_spans(checkpoint, dtype) if reference else {}
        linked = {span.tensor.file: (folder / span.tensor.file).stat().st_size for span in in_place.values()}
        # here only so that a refusal comes before the work
        link_checkpoint_files(linked, folder, target)
        with progress("tracing the model", None), checkpoint.read_ahead():
            model = build_graph(checkpoint, contract, in_place)
            plan = plan_weights(model, checkpoint, dtype, in_place)
            details: dict[str, Any] = {"dtype": dtype, "body": flavour}
            if quantization is not None:
                before = plan.nbytes
                quantize_graph(model, checkpoint, quantization)
                quantize_weights(plan, checkpoint, quantization)
                details["quantization"] = record(quantization, checkpoint.config, before, plan.nbytes)
            op_abi = mark_plugin_nodes(model)
            set_bodies(model, flavour, dtype)
            layout = lay_out(plan, max_shard_bytes)
            method = "" if quantization is None else quantization.text
            fingerprint = f"{source['checkpoint']} {layout.fingerprint(plan)} {method}"
        with Journal(journal_path, fingerprint) as journal:
            if not journal.resumed:
                _remove_files(target)
            _check_space(target, layout)
            attach(model, plan, layout, target)
            ir.save(model, target / MODEL_NAME)
            # ONNX's checker refuses files with several links: it sees empty ones of their size
            for name in linked:
                (target / name).unlink(missing_ok=True)
            reserve(layout.sizes | linked, target)
            saved = check_graph(target / MODEL_NAME, contract)
            link_checkpoint_files(linked, folder, target)
            what = "the rest of the weights" if journal.resumed else "every weight"
            with progress(f"writing and checking {what}", sum(layout.sizes.values())) as advance:
                stored = layout_of(saved, plan, target)
                hashes = write_weights(plan, layout, stored, target, journal, advance)
        for name in ("config.json", *TOKENIZER_FILES):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
        manifest = Manifest(
            kind="onnx",
            source=source,
            op_abi=op_abi,
            details=details | {"opset": model.graph.opset_imports[""]},
        )
        if not linked:
            return manifest.write(target, hashes=hashes)
        with progress("hashing the checkpoint", sum(linked.values())) as advance:
            return manifest.write(target, advance, hashes)


def _remove_files(folder: Path) -> None:
    """What another export, cut short, has left there."""
    for path in folder.iterdir():
        path.unlink()


def build_graph(checkpoint: Checkpoint, contract: GraphContract, untransposed: Collection[str]) -> ir.Model:
    """The graph that reads every parameter as it is, without bodies; no weight is read."""
    # torch, which takes seconds to load: not before the arguments are known to be right
    from kimi_deploy.onnx.trace import trace

    model = trace(checkpoint.config, contract.dtype)
    name_dimensions(model, contract)
    transpose_weights(model, untransposed)
    replace_sequences(model)
    tidy(model)
    check_every_parameter_is_read(model, {w.name for w in weight_table(checkpoint.config)})
    model.metadata_props[METADATA_KEY] = contract.to_json()
    model.graph.name = "kimi_linear"
    return model


def _check_space(folder: Path, layout: Layout) -> None:
    """What an earlier run has already written is counted as free."""
    written = sum(p.stat().st_blocks * 512 for name in layout.sizes if (p := folder / name).exists())
    free = shutil.disk_usage(folder).free
    needed = sum(layout.sizes.values()) - written + (64 << 20)  # the graph, tokenizer files and room to breathe
    if free < needed:
        raise DiskSpaceError(
            "not enough disk space for the export",
            seen=f"{free / 1e9:.2f} GB free in {folder.parent.parent}",
            expected=f"{needed / 1e9:.2f} GB",
            fix="free some space, or give -o on another disk",
        )
