"""Sources -> blocks of raw rows, streamed, with the digest of what was read.

A block is a few thousand rows that were not looked into yet: the lines of a JSON-lines file as they
are, or a batch of a table. What is in a block is its identity, so that rows that were prepared
before are known again, also when the file grew at its end.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final, Literal

from tuneline import object_store
from tuneline.artifacts import digest_of
from tuneline.base_model import cache_dir
from tuneline.errors import DataError
from tuneline.progress import report
from tuneline.recipe import Source

DEMO_SOURCES: Final = {"demo:train": ("TRAIN", 650, 1), "demo:test": ("TEST", 100, 2)}
"""Source name -> vocabulary, rows, seed of the generator."""
BLOCK_ROWS: Final = 1000
BLOCK_BYTES: Final = 8 * 2**20
MAX_ROW_BYTES: Final = 4 * 2**20
"""A longer row is dropped as too long without being read into memory."""
_PIECE: Final = 2**20
_LARGEST_ITEM: Final = 64 * 2**20
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_FORMATS: Final = (".jsonl", ".ndjson", ".json", ".parquet", ".csv")
_FETCHED_BYTES: Final = 20 * 10**9
"""Of objects in the cache together."""
_HUB: Final = "hf://"
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_MAGIC: Final = {
    b"\x1f\x8b": "gzip data", b"\x28\xb5\x2f\xfd": "zstd data", b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet table", b"BZh": "bzip2 data",
}  # fmt: skip
_ALLOWED: Final = (
    f"give {', '.join(_FORMATS)}, each also .gz or .zst, as a local file, folder or glob, "
    f"hf://org/name, s3://, gs://, or {', '.join(DEMO_SOURCES)}"
)


@dataclass(frozen=True)
class Block:
    """Raw rows of one file that go through the preparation together.

    Attributes:
        kind: `jsonl`: one JSON object a line, or `arrow`: a record batch as an IPC stream.
        payload: the rows.
        file: the file or data set they are of, for messages.
        first: number of the first row in its file, from 1.
        unit: what the file's rows are called, `line` or `row`.
        too_long: of these rows (counted from 0) only the size was read; the payload has none.
    """

    kind: Literal["jsonl", "arrow"]
    payload: bytes
    file: str
    first: int
    unit: str = "line"
    too_long: tuple[int, ...] = ()

    def where(self, row: int) -> str:
        """The place of a row, counted from 0, for a person."""
        return f"{self.file} {self.unit} {self.first + row}"


def read_blocks(
    source: Source, digests: dict[str, str], only: Collection[str] | None = None
) -> Iterator[Block]:
    """Stream a source's rows.

    Args:
        source: where they are.
        digests: gets `path -> digest` of each file when its last row has been read.
        only: names of files, as in `digests`, beside which others are left alone; None for all.

    Raises:
        DataError: nothing there, or a file that is empty, cut short or not what its name says.
    """
    if source.path in DEMO_SOURCES:
        yield from _demo(source, digests)
    elif source.path.startswith(_HUB):
        yield from _hub(source, digests)
    else:
        found = [(_printable(name), open_file) for name, open_file in files(source)]
        later = [name for name, _ in found if only is not None and name not in only]
        if found and len(later) == len(found):
            raise DataError(
                f"of {source.path} no file is there any more that was when it was decided what to "
                "read: run it again, it begins with what is there now"
            )
        for name, open_file in found:
            if only is None or name in only:
                yield from _file_blocks(name, open_file, digests)
        if later:
            names = ", ".join(later[:3]) + (", ..." if len(later) > 3 else "")
            report(
                f"came to {source.path} after it was decided what to read, and left for a later "
                f"run: {len(later)} ({names})"
            )


def _demo(source: Source, digests: dict[str, str]) -> Iterator[Block]:
    from tuneline.demo import orders

    vocabulary, rows, seed = DEMO_SOURCES[source.path]
    words = getattr(orders, vocabulary)
    yield from _json_blocks(orders.generate(words, rows, seed), source.path)
    digests[source.path] = digest_of([asdict(words), rows, seed])


_Open = Callable[[], AbstractContextManager[IO[bytes]]]


def files(source: Source) -> list[tuple[str, _Open]]:
    """The files of a source that is neither the demo's nor a hub's, by name, with what opens each;
    a local file by itself need not exist.

    Raises:
        DataError: nothing there, or no such kind of place.
        StorageError: the object store can't be reached or refuses.
    """
    scheme, separator, _ = source.path.partition("://")
    if object_store.is_remote(source.path):
        return _stored_files(source.path)
    if scheme == "gs":
        return _google_files(source.path)
    if separator:
        raise _unreadable(source.path, f"scheme '{scheme}://' is unknown")
    try:
        paths = _local_paths(source.path)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: no home of such a user
        raise _unreadable(source.path, getattr(error, "strerror", None) or str(error)) from error
    return [(name, lambda path=path: path.open("rb")) for name, path in paths]


def _local_paths(pattern: str) -> list[tuple[str, Path]]:
    if "\0" in pattern:
        raise ValueError("embedded null byte")
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _suffixes(p.name)[0])
        if not found:
            raise _unreadable(pattern, f"the folder has no file that ends in {', '.join(_FORMATS)}")
        return [(str(p), p) for p in found]
    if not path.exists() and any(character in pattern for character in "*?["):
        anchor = Path(path.anchor or ".")
        relative = str(path.relative_to(path.anchor)) if path.anchor else str(path)
        found = sorted(p for p in anchor.glob(relative) if p.is_file())
        if not found:
            raise _unreadable(pattern, "no file matches")
        return [(str(p), p) for p in found]
    if path.exists() and not path.is_file():
        raise _unreadable(pattern, "not a regular file")
    return [(pattern, path)]


def _stored_files(pattern: str) -> list[tuple[str, _Open]]:
    found = object_store.find_objects(pattern)
    if not found:
        raise _unreadable(pattern, "no such object, none below it and none that matches")
    if [one.url for one in found] != [pattern] and not any(c in pattern for c in "*?["):
        found = [one for one in found if _suffixes(one.url)[0]]
        if not found:
            raise _unreadable(pattern, f"no object below it ends in {', '.join(_FORMATS)}")
    return [(one.url, lambda one=one: _opened(one)) for one in found]


def _opened(found: object_store.StoredObject) -> IO[bytes]:
    return object_store.fetch_object(found, cache_dir() / "data", _FETCHED_BYTES).open("rb")


def _google_files(pattern: str) -> list[tuple[str, _Open]]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(pattern)
        if any(character in path for character in "*?["):
            found = sorted(map(str, system.glob(path)))
        elif system.isdir(path):
            found = sorted(p for p in map(str, system.find(path)) if _suffixes(p)[0])
        else:
            found = [path]
    except ImportError as error:
        raise DataError(
            f"data file {pattern}: gs:// needs gcsfs (pip install 'tuneline[gcs]')"
        ) from error
    except (OSError, ValueError) as error:
        raise _unreadable(pattern, str(error)) from error
    if not found:
        raise _unreadable(pattern, "no file matches")
    return [
        (f"gs://{p.removeprefix('gs://').lstrip('/')}", lambda p=p: system.open(p, "rb"))
        for p in found
    ]


def _unreadable(name: str, why: str) -> DataError:
    return DataError(f"data file {_shown(name)} can't be read ({why}): {_ALLOWED}")


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _suffixes(name: str) -> tuple[str, str]:
    """Format and compression of a file by its name, empty where unknown or none."""
    stem, compression = name.lower(), ""
    for ending in (".gz", ".zst"):
        if stem.endswith(ending):
            stem, compression = stem.removesuffix(ending), ending
    return next((f for f in _FORMATS if stem.endswith(f)), ""), compression


def _printable(name: str) -> str:
    """File systems allow names that no report could be written with."""
    return name.encode("utf-8", "backslashreplace").decode()


def _file_blocks(name: str, open_file: _Open, digests: dict[str, str]) -> Iterator[Block]:
    form, compression = _suffixes(name)
    if not form:
        raise _unreadable(name, f"the name ends in none of {', '.join(_FORMATS)}")
    count = 0
    try:
        with open_file() as raw:
            hashing = _Hashing(raw)
            for block in _READERS[form](name, hashing, compression):
                count += 1
                yield block
            digests[name] = hashing.digest()
    except DataError:
        raise
    except EOFError as error:
        raise DataError(f"data file {name} is cut short: copy it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"data file {name} is not a {compression} file: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"data file {name} is not UTF-8 ({error.reason}): save it as UTF-8"
        ) from error
    except OSError as error:
        if compression == ".zst" and type(error) is OSError and error.errno is None:
            raise DataError(f"data file {name} is damaged or cut short: {error}") from error
        raise _unreadable(name, error.strerror or str(error)) from error
    if not count:
        raise DataError(f"data file {name} is empty: it needs one row at least")


class _Hashing(io.RawIOBase):
    """Reads through, in order, and hashes what passes."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._digest = hashlib.sha256()

    def local_file(self) -> io.BufferedReader | None:
        """The file itself where it is one of this machine, to be read in any order."""
        return self._raw if isinstance(self._raw, io.BufferedReader) else None

    def rewind(self) -> None:
        """Begin again at the start; nothing may have been read through before."""
        self._raw.seek(0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._raw.read(len(buffer))
        buffer[: len(piece)] = piece
        self._digest.update(piece)
        return len(piece)

    def digest(self) -> str:
        """Of the whole file: what a reader left is read too."""
        while piece := self._raw.read(2**20):
            self._digest.update(piece)
        return f"sha256:{self._digest.hexdigest()}"


def _decompressed(raw: _Hashing, compression: str) -> io.BufferedReader:
    if compression == ".gz":
        stream: Any = gzip.GzipFile(fileobj=io.BufferedReader(raw, 2**20), mode="rb")
    elif compression == ".zst":
        import pyarrow as pa

        stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    else:
        stream = raw
    return io.BufferedReader(stream, 2**20)


def _lines(name: str, raw: _Hashing, compression: str) -> Iterator[Block]:
    with _decompressed(raw, compression) as file:
        _check_start(name, file)
        yield from _blocks_of_lines(name, file)


def _check_start(name: str, file: io.BufferedReader) -> None:
    """Skip a byte order mark; refuse what is no text by its first bytes."""
    start = file.peek(4)[:4]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"data file {name} is UTF-16: save it as UTF-8")
    for magic, kind in _MAGIC.items():
        if start.startswith(magic):
            raise DataError(
                f"data file {name} holds {kind} and no text: unpack it, or name it as what it is"
            )
    if start.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))


def _blocks_of_lines(name: str, file: io.BufferedReader) -> Iterator[Block]:
    number, lines, size, too_long, any_row = 1, [], 0, [], False
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
            too_long.append(len(lines))
            while line and not line.endswith(b"\n"):
                line = file.readline(2**20)
            line = b"\n"
        lines.append(line)
        size += len(line)
        any_row = any_row or bool(too_long) or not line.isspace()
        if len(lines) == BLOCK_ROWS or size >= BLOCK_BYTES:
            yield Block("jsonl", b"".join(lines), name, number, too_long=tuple(too_long))
            number += len(lines)
            lines, size, too_long = [], 0, []
    if lines and any_row:
        yield Block("jsonl", b"".join(lines), name, number, too_long=tuple(too_long))
    elif not any_row and number > 1:
        raise DataError(f"data file {name} is empty: it has blank lines only")


def _json(name: str, raw: _Hashing, compression: str) -> Iterator[Block]:
    with _decompressed(raw, compression) as file:
        _check_start(name, file)
        while (start := file.peek(1)[:1]) and start.isspace():
            file.read(1)
        if start == b"[":
            yield from _blocks_of_items(_items(name, file), name)
        else:  # many data sets name JSON lines .json
            yield from _blocks_of_lines(name, file)


def _items(name: str, file: io.BufferedReader) -> Iterator[bytes]:
    """The items of a JSON array as they are written, one at a time, each in one line."""
    text = io.TextIOWrapper(file, encoding="utf-8")
    decoder = json.JSONDecoder()
    buffer, position, ended, number, comma = text.read(_PIECE), 1, False, 0, False
    while True:
        position = _SPACE.match(buffer, position).end()  # pyright: ignore[reportOptionalMemberAccess]  it matches nothing at least
        try:
            if buffer.startswith("]", position) and not comma:
                rest = buffer[position + 1 :] + text.read(_PIECE)
                if rest.strip():
                    raise ValueError("there is more after the array")
                return
            _, close = decoder.raw_decode(buffer, position)
            end = _SPACE.match(buffer, close).end()  # pyright: ignore[reportOptionalMemberAccess]
            if buffer[end : end + 1] not in (",", "]"):
                raise ValueError(f"expecting ',' or ']' after item {number + 1}")
        except (ValueError, RecursionError) as error:
            # what looks broken may go on in the next piece
            more = "" if ended else text.read(max(_PIECE, len(buffer) - position))
            ended = not more
            if ended or len(buffer) - position > _LARGEST_ITEM or isinstance(error, RecursionError):
                raise DataError(
                    f"data file {name} is malformed JSON at item {number + 1}: {error}"
                ) from error
            buffer, position = buffer[position:] + more, 0
            continue
        # between the values line breaks are spaces, and in a string JSON has none
        yield buffer[position:close].replace("\n", " ").encode("utf-8")
        number += 1
        comma = buffer[end] == ","
        position = end + comma


def _json_blocks(rows: Iterable[Any], name: str) -> Iterator[Block]:
    yield from _blocks_of_items((json.dumps(row).encode("ascii") for row in rows), name)


def _blocks_of_items(items: Iterable[bytes], name: str) -> Iterator[Block]:
    number, lines, size, too_long = 1, [], 0, []
    for item in items:
        line = item + b"\n"
        if len(line) > MAX_ROW_BYTES:
            too_long.append(len(lines))
            line = b"\n"
        lines.append(line)
        size += len(line)
        if len(lines) == BLOCK_ROWS or size >= BLOCK_BYTES:
            yield Block("jsonl", b"".join(lines), name, number, "row", tuple(too_long))
            number += len(lines)
            lines, size, too_long = [], 0, []
    if lines:
        yield Block("jsonl", b"".join(lines), name, number, "row", tuple(too_long))


def _csv(name: str, raw: _Hashing, compression: str) -> Iterator[Block]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with _decompressed(raw, compression) as file:
        _check_start(name, file)
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        reader = csv.reader(text, strict=True)
        yield from _json_blocks(_csv_rows(name, reader), name)


def _csv_rows(name: str, reader: Any) -> Iterator[dict[str, str | None]]:
    hint = "is there a stray quote or comma?"
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or "" in header:
            raise DataError(
                f"data file {name}: the header {str(header)[:300]} has empty or repeated names"
            )
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{name} line {reader.line_num}: {len(fields)} fields, the header has "
                    f"{len(header)}: {hint}"
                )
            yield {key: value or None for key, value in zip(header, fields, strict=True)}
    except csv.Error as error:
        raise DataError(f"{name} line {reader.line_num}: malformed CSV: {error}: {hint}") from error


def _parquet(name: str, raw: _Hashing, compression: str) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _seekable(raw, compression) as file:
        try:
            # a group of rows may be the whole file: it is not read ahead
            table = pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(
                    f"data file {name}: the columns {str(names)[:300]} have repeated names"
                )
            number = 1
            for batch in table.iter_batches(_rows_at_once(table.metadata)):
                yield from _arrow_blocks(batch, name, number)
                number += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            raise DataError(f"data file {name} is damaged or no Parquet file: {reason}") from error


def _rows_at_once(metadata: Any) -> int:
    """So many rows of a Parquet file as make a block, by what its directory says of their size."""
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    widest = max((g.total_byte_size / g.num_rows for g in groups if g.num_rows > 0), default=0.0)
    return max(1, min(BLOCK_ROWS, int(BLOCK_BYTES / max(widest, 1.0))))


@contextmanager
def _seekable(raw: _Hashing, compression: str) -> Iterator[IO[bytes]]:
    # Parquet keeps its directory at the end. What is compressed or far away is read once, so a copy
    import shutil
    import tempfile

    if not compression and (file := raw.local_file()):
        yield file
        raw.rewind()
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(_decompressed(raw, compression), copy, 2**20)
        copy.seek(0)
        yield copy


def _arrow_blocks(batch: Any, name: str, number: int) -> Iterator[Block]:
    """Blocks of a bounded size; a row of more than `MAX_ROW_BYTES` is only counted."""
    import pyarrow as pa

    batch = _without_dictionaries(batch.replace_schema_metadata(None))
    parts = deque([(0, batch.num_rows)])
    while parts:
        start, end = parts.popleft()
        part = batch.slice(start, end - start)
        if part.nbytes > MAX_ROW_BYTES and end - start > 1:
            middle = (start + end) // 2
            parts.extendleft([(middle, end), (start, middle)])
            continue
        too_long = part.nbytes > MAX_ROW_BYTES
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, part.schema) as writer:
            if not too_long:
                writer.write_batch(part)
        payload = sink.getvalue().to_pybytes()
        yield Block("arrow", payload, name, number + start, "row", (0,) if too_long else ())


def _without_dictionaries(batch: Any) -> Any:
    """Every row with its own values: a dictionary would count, and be copied, with each part."""
    import pyarrow as pa

    columns = [c.dictionary_decode() if pa.types.is_dictionary(c.type) else c for c in batch]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


_READERS: Final = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def pinned(source: Source) -> Source:
    """The same source, a hub's data set at the commit that its branch or tag names now.

    Raises:
        DataError: the hub does not say which.
    """
    repository, _, revision = source.path.removeprefix(_HUB).partition("@")
    if not source.path.startswith(_HUB) or _COMMIT.fullmatch(revision):
        return source
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        commit = HfApi().dataset_info(repository, revision=revision or None).sha or ""
    except (
        HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, HTTPError, OSError
    ) as error:  # fmt: skip
        raise DataError(
            f"data set {source.path}: the hub does not say which commit that is: "
            f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        ) from error
    return source.model_copy(update={"path": f"{_HUB}{repository}@{commit}"})


def _hub(source: Source, digests: dict[str, str]) -> Iterator[Block]:
    repository = source.path.removeprefix(_HUB).partition("@")[0]
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", repository):
        raise DataError(f"data set {source.path} is not of the form {_HUB}org/name[@revision]")
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # a branch or tag may move while it is read
    revision = pinned(source).path.rpartition("@")[2]
    try:
        rows: Any = load_dataset(
            repository,
            name=source.config or None,
            split=source.split,
            revision=revision,
            streaming=True,
        )
        name = f"{_HUB}{repository}@{revision}"
        digest, number = hashlib.sha256(), 1
        for batch in rows.with_format("arrow").iter(batch_size=BLOCK_ROWS):
            for part in batch.combine_chunks().to_batches():
                for block in _arrow_blocks(part, name, number):
                    digest.update(block.payload)
                    yield block
                number += part.num_rows
    except (
        DatasetsError, HfHubHTTPError, OfflineModeIsEnabled, HTTPError, OSError, ValueError,
        RuntimeError,
    ) as error:  # fmt: skip
        raise DataError(
            f"data set {source.path} (config {source.config or 'default'}, split {source.split}) "
            f"can't be had from the hub: {type(error).__name__}: {str(error).splitlines()[0][:300]}"
        ) from error
    if number == 1:
        raise DataError(f"data set {source.path} has no rows in split {source.split}")
    digests[f"{name} {source.config or 'default'}/{source.split}"] = f"sha256:{digest.hexdigest()}"
