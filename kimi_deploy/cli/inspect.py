"""kimi-deploy inspect."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from kimi_deploy.cli.common import folder_argument, json_option, print_json, progress


@click.command("inspect")
@folder_argument("path")
@click.option("--quick", is_flag=True, help="Compare file sizes with the manifest, not hashes.")
@json_option
@click.pass_context
def inspect_command(ctx: click.Context, path: Path, quick: bool, as_json: bool) -> None:
    """Say what the folder PATH holds: a checkpoint, an export or an engine, and whether it is whole.

    Exits 1 when tensors are missing or superfluous, a file differs from the manifest, or an op has another ABI.
    """
    from kimi_deploy.inspection import inspect_folder

    with progress("reading"):
        found = inspect_folder(path, hashes=not quick)
    if as_json:
        print_json(found)
    else:
        {"checkpoint": _print_checkpoint, "onnx": _print_export, "engine": _print_engine, "plan": _print_plan}[
            found["kind"]
        ](found)
        for problem in found["problems"]:
            click.echo(f"problem: {problem}")
        if not found["problems"]:
            whole = (
                "every tensor accounted for" if found["kind"] == "checkpoint" else "files and ABI match the manifest"
            )
            click.echo(f"whole: {whole}{' (sizes only)' if quick and found['kind'] != 'checkpoint' else ''}")
    if found["problems"]:
        ctx.exit(1)


def _facts(rows: dict[str, Any]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        click.echo(f"{name:<{width}}  {value}")


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_checkpoint(found: dict[str, Any]) -> None:
    c, layers = found["config"], found["layers"]
    _facts(
        {
            "checkpoint": found["path"],
            "parameters": f"{found['parameters']:,} ({', '.join(found['parameters_by_dtype'])})",
            "stored": f"{found['tensors']:,} tensors, {found['bytes']:,} bytes in {', '.join(found['files'])}",
            "layers": f"{c['num_hidden_layers']}: {layers['linear_attention']} KDA, {layers['full_attention']} MLA; "
            f"{layers['dense']} dense, {layers['sparse']} mixture of experts",
            "hidden": c["hidden_size"],
            "vocabulary": f"{c['vocab_size']}{', tied' if c['tie_word_embeddings'] else ''}",
            "KDA": f"{c['linear_num_heads']} heads of {c['linear_head_dim']}, convolution {c['linear_conv_kernel']}, "
            f"gate {c['gate']}",
            "MLA": f"{c['num_attention_heads']} heads of {c['qk_nope_head_dim']} + {c['qk_rope_head_dim']} (value "
            f"{c['v_head_dim']}), latent {c['kv_lora_rank']}, query rank {c['q_lora_rank'] or 'none'}",
            "experts": f"{c['num_experts']} of width {c['moe_intermediate_size']} in {c['num_expert_group']} groups, "
            f"{c['num_experts_per_token']} per token, {c['num_shared_experts']} shared",
        }
    )


def _abi(manifest: dict[str, Any]) -> str:
    return ", ".join(f"{op} {abi}" for op, abi in manifest["op_abi"].items())


def _accuracy(reports: list[dict[str, str]]) -> str:
    words = []
    for r in reports:
        notes = "; ".join(text for text in (r["detail"], r["measured_with"]) if text)
        words.append(f"{r['backend'] or r['name']}: {r['standing']}" + (f" ({notes})" if notes else ""))
    return ", ".join(words) or "no report (kimi-deploy validate writes one)"


def _print_files(manifest: dict[str, Any]) -> None:
    for name, entry in manifest["files"].items():
        click.echo(f"  {entry['bytes']:>14,}  {entry['sha256'][:16]}  {name}")


def _print_contract(contract: dict[str, Any]) -> None:
    past = {s["present"]: s["past"] for s in contract["states"]}
    rows = [
        (mode, str(t["name"]), str(t["dtype"]), str(t["dims"]).replace("'", ""), past.get(t["name"], ""))
        for mode, key in (("in", "inputs"), ("out", "outputs"))
        for t in contract[key]
    ]
    _table(("", "name", "dtype", "shape", "next value of"), rows)


def _quantization(details: dict[str, Any]) -> dict[str, str]:
    from kimi_deploy.quantization.scheme import Scheme

    record = details.get("quantization")
    if record is None:
        return {}
    counts = ", ".join(f"{count} {role}" for role, count in record["parameters"].items())
    return {
        "quantised": f"{Scheme.from_dict(record).text}: {counts}; {record['weight_bytes']:,} bytes of weights, "
        f"{record['weight_bytes_before']:,} in {details.get('dtype')}",
        "not quantised": ", ".join(record["excluded"]),
    }


def _print_export(found: dict[str, Any]) -> None:
    manifest = found["manifest"]
    source, details = manifest["source"], manifest["details"]
    _facts(
        {
            "export": found["path"],
            "made from": f"{source.get('name')} (checkpoint {str(source.get('checkpoint'))[:16]})",
            "by": f"kimi-deploy {manifest['kimi_deploy_version']}",
            "dtype": details.get("dtype"),
            **_quantization(details),
            "bodies": f"{details.get('body')}, opset {details.get('opset')}",
            "op ABI": _abi(manifest),
            "accuracy": _accuracy(found["accuracy"]),
        }
    )
    _print_files(manifest)
    _print_contract(found["contract"])


def _print_engine(found: dict[str, Any]) -> None:
    manifest = found["manifest"]
    source, details = manifest["source"], manifest["details"]
    _facts(
        {
            "engine": found["path"],
            "made from": f"{source.get('name')} (model.onnx {str(source.get('model.onnx'))[:16]})",
            "by": f"kimi-deploy {manifest['kimi_deploy_version']}",
            "for": f"{details['backend']} {details['backend_version']}, compute capability "
            f"{', '.join(details['compute_capabilities'])}",
            "dtype": details["dtype"],
            "plugin layers": ", ".join(f"{count} {op}" for op, count in details["plugins"].items()) or "none",
            "op ABI": _abi(manifest),
            "accuracy": _accuracy(found["accuracy"]),
        }
    )
    _print_files(manifest)
    axes = ("batch", "sequence", "capacity", "num_logits")
    rows = [
        (name, *("..".join(map(str, dict.fromkeys(details["recipe"][name][axis]))) for axis in axes))
        for name in details["profiles"]
    ]
    _table(("profile", *axes), rows)
    _print_contract(details["contract"])


def _print_plan(found: dict[str, Any]) -> None:
    manifest = found["manifest"]
    details = manifest["details"]
    _facts(
        {
            "plan": found["path"],
            "made from": f"{manifest['source']['model']} ({manifest['source']['sha256'][:16]})",
            "by": f"kimi-deploy {manifest['kimi_deploy_version']}",
            "for": f"{details['backend']} {details['backend_version']}, compute capability "
            f"{', '.join(details['compute_capabilities'])}",
            "plugin layers": ", ".join(f"{count} {op}" for op, count in details["plugins"].items()),
        }
    )
    _print_files(manifest)
    rows = [
        (index, name, *("x".join(map(str, shape)) for shape in shapes))
        for index, profile in details["profiles"].items()
        for name, shapes in profile.items()
    ]
    _table(("profile", "input", "smallest", "likeliest", "largest"), rows)
