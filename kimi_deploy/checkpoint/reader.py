"""Checkpoints: safetensors in, parameters of the source model out, completeness proven."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from kimi_deploy.checkpoint.cast import FLOAT_DTYPES, row_blocks
from kimi_deploy.checkpoint.files import find_tensors
from kimi_deploy.checkpoint.parameter_part import ParameterPart, Span
from kimi_deploy.checkpoint.safetensors_file import ITEM_BYTES, TensorInfo
from kimi_deploy.config import KimiLinearConfig
from kimi_deploy.contract import Dtype
from kimi_deploy.errors import CheckpointError
from kimi_deploy.model_folder import require_folder
from kimi_deploy.page_cache import TAKES_ADVICE, will_need
from kimi_deploy.weights import Form, Source, Weight, cut, weight_table

_NAMES_SHOWN = 10
_SAMPLE_BYTES = 64
_READ_AHEAD_BYTES, _READ_AHEAD_STEP = 4 << 30, 8 << 20
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class ResolvedWeight:
    """A parameter, the form its checkpoint stores it in, and the stored tensors' names in the form's order."""

    weight: Weight
    form: Form
    names: tuple[str, ...]


class Checkpoint:
    """An opened checkpoint folder: its config and its table of stored tensors.

    Parameters are read from the files on demand, single tensors through memory maps. Make one with `Checkpoint.open`.
    """

    def __init__(self, folder: Path, config: KimiLinearConfig, tensors: dict[str, TensorInfo]) -> None:
        self.folder, self.config, self.tensors = folder, config, tensors
        self._files: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read config.json, the index and every header of a folder; no tensor is read.

        Raises UsageError when there is no such folder, ConfigError for the config, CheckpointError for missing,
        damaged or contradictory files.
        """
        folder = Path(folder)
        require_folder(folder, "a checkpoint folder with config.json and safetensors files")
        return cls(folder, KimiLinearConfig.from_folder(folder), find_tensors(folder))

    def tensor(self, name: str) -> np.ndarray:
        """The stored tensor `name`, of a float dtype: a read-only view of the file, dtype and shape as stored."""
        info = self.tensors[name]
        if info.file not in self._files:
            self._files[info.file] = np.memmap(self.folder / info.file, np.uint8, "r")
        data = self._files[info.file][info.offset : info.offset + info.nbytes]
        return data.view(FLOAT_DTYPES[info.dtype]).reshape(info.shape)

    def resolve(self) -> tuple[ResolvedWeight, ...]:
        """Every parameter with the stored form it comes in, in model order.

        Proves that each is stored exactly once, that every tensor is used, and that every shape and dtype is
        right. Raises CheckpointError naming the tensors that are missing, stored twice, unused or wrong.
        """
        return self._resolved

    @cached_property
    def _resolved(self) -> tuple[ResolvedWeight, ...]:
        problems = _Problems()
        resolved = [r for w in weight_table(self.config) if (r := self._resolve_weight(w, problems))]
        used = {n for r in resolved for n in r.names} | problems.explained
        if self.config.tie_word_embeddings and _HEAD in self.tensors:
            used.add(_HEAD)
        # transformers saves the shared expert of a model without one as tensors of no elements
        problems.unused = sorted(n for n, t in self.tensors.items() if n not in used and t.nbytes)
        problems.raise_if_any()
        if self.config.tie_word_embeddings and _HEAD in self.tensors:
            self._check_tied_head()
        return tuple(resolved)

    def _resolve_weight(self, weight: Weight, problems: _Problems) -> ResolvedWeight | None:
        found = [
            (form, [[n for n in source.names if n in self.tensors] for source in form.sources]) for form in weight.forms
        ]
        present = [(form, names) for form, names in found if any(names)]
        everything = [n for _, names in present for alternatives in names for n in alternatives]
        problems.explained.update(everything)
        if len(present) > 1 or any(len(alternatives) > 1 for _, names in present for alternatives in names):
            problems.twice += everything
            return None
        form, names = present[0] if present else found[0]
        missing = [s.names[0] for s, alternatives in zip(form.sources, names, strict=True) if not alternatives]
        if missing:
            problems.missing += missing
            return None
        stored = tuple(alternatives[0] for alternatives in names)
        for source, name in zip(form.sources, stored, strict=True):
            self._check_tensor(source, self.tensors[name], problems)
        return ResolvedWeight(weight, form, stored)

    @staticmethod
    def _check_tensor(source: Source, info: TensorInfo, problems: _Problems) -> None:
        if info.shape not in (source.shape, *source.other_shapes):
            problems.shapes.append(f"{info.name} {list(info.shape)} instead of {list(source.shape)}")
        if info.dtype not in FLOAT_DTYPES:
            problems.dtypes.append(f"{info.name} {info.dtype}")

    def _check_tied_head(self) -> None:
        embedding, head = self.tensors[_EMBEDDING], self.tensors[_HEAD]
        same = (embedding.dtype, embedding.shape) == (head.dtype, head.shape)
        if same:
            a, b = (self.tensor(n).view(np.uint8) for n in (_EMBEDDING, _HEAD))
            same = all(np.array_equal(a[block], b[block]) for block in row_blocks(a))
        if not same:
            raise CheckpointError(
                f"{_HEAD} differs from {_EMBEDDING}, but the config ties them",
                seen="tie_word_embeddings true",
                expected=f"no {_HEAD}, or one that is bit-identical to the embedding",
                fix="set tie_word_embeddings to false in config.json, if the head was trained on its own",
            )

    def load(self, weight_name: str, dtype: Dtype) -> np.ndarray:
        """The parameter `weight_name` in the layout of `kimi_deploy.weights`, as a new array; see `ParameterPart.load`.

        Raises CheckpointError when the checkpoint does not resolve, has no such parameter, holds NaN or Inf in it, or
        has values too large for `dtype`.
        """
        return self.part(weight_name).load(dtype)

    @contextmanager
    def read_ahead(self) -> Iterator[None]:
        """While the caller does something else, have the operating system read the files' beginning into its cache.

        At most 4 GiB, and half of the memory that is free: what is read must still be there when it is used. Nothing is
        read where the operating system takes no such advice.
        """
        if not TAKES_ADVICE:
            yield
            return
        left = min(_READ_AHEAD_BYTES, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
        done = threading.Event()

        def read(left: int) -> None:
            for name in sorted({info.file for info in self.tensors.values()}):
                with (self.folder / name).open("rb", buffering=0) as file:
                    size = min(left, os.fstat(file.fileno()).st_size)
                    for offset in range(0, size, _READ_AHEAD_STEP):
                        if done.is_set():
                            return
                        will_need(file.fileno(), offset, _READ_AHEAD_STEP)
                    left -= size

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read ahead") as pool:
            reading = pool.submit(read, left)
            try:
                yield
            finally:
                done.set()
            reading.result()

    def part(self, weight_name: str, start: int = 0, stop: int | None = None) -> ParameterPart:
        """The rows `start` to `stop` (None = all) of a parameter along axis 0, to be read on their own.

        Raises CheckpointError when the checkpoint does not resolve or has no such parameter.
        """
        if weight_name not in self._by_name:
            raise CheckpointError(
                "the model has no such parameter", seen=weight_name, expected="a name of kimi_deploy.weights"
            )
        resolved = self._by_name[weight_name]
        end = resolved.weight.shape[0] if stop is None else stop
        weight, form, extents = cut(resolved.weight, resolved.form, start, end)
        spans = []
        for extent in extents:
            info = self.tensors[resolved.names[extent.source]]
            size = ITEM_BYTES[info.dtype]
            spans.append(Span(info, info.offset + extent.first * size, extent.count * size))
        return ParameterPart(self.folder, weight, form, start, tuple(spans))

    @cached_property
    def _by_name(self) -> dict[str, ResolvedWeight]:
        return {r.weight.name: r for r in self._resolved}

    def fingerprint(self) -> str:
        """sha256 over the config, the tensor table and a sample of every tensor, as 64 hex digits.

        Independent of how tensors are spread over files. The sample is each tensor's first and last 64 bytes:
        enough to tell two trainings of one shape apart, cheap at any size, no proof of every byte.
        """
        digest = hashlib.sha256(json.dumps(self.config.to_released_dict(), sort_keys=True).encode())
        with ExitStack() as stack:
            # not through the memory maps: a touched page maps its neighbours, which for 20,000 tensors are gigabytes
            names = {info.file for info in self.tensors.values()}
            files = {name: stack.enter_context((self.folder / name).open("rb")).fileno() for name in names}
            for name, info in sorted(self.tensors.items()):
                digest.update(json.dumps([name, info.dtype, info.shape, info.nbytes]).encode())
                if info.dtype in FLOAT_DTYPES and info.nbytes:
                    size = min(_SAMPLE_BYTES, info.nbytes)
                    for offset in (info.offset, info.offset + info.nbytes - size):
                        digest.update(os.pread(files[info.file], size, offset))
        return digest.hexdigest()


class _Problems:
    """What is wrong with a checkpoint, gathered so that one error names all of it."""

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.unused: list[str] = []
        self.twice: list[str] = []
        self.shapes: list[str] = []
        self.dtypes: list[str] = []
        # tensors of a parameter that is refused for another reason are not unused too
        self.explained: set[str] = set()

    def raise_if_any(self) -> None:
        kinds = (
            ("missing", self.missing),
            ("unused", self.unused),
            ("stored in two forms", self.twice),
            ("of a wrong shape", self.shapes),
            ("of a dtype that is no float", self.dtypes),
        )
        if found := [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds if names]:
            raise CheckpointError(
                "the checkpoint's tensors are not those of its config",
                seen="; ".join(found),
                expected="every tensor of the model once, in the released or the transformers form, and no other",
                fix="check that config.json belongs to these files, or download the checkpoint again",
            )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(ascii(n)[1:-1][:200] for n in names[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")
