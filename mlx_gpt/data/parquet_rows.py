"""Read the rows of a Parquet file."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_gpt.data.conversations import UNREAD
from mlx_gpt.data.rows import SAMPLE, Dropped, text_column
from mlx_gpt.data.schemas import COLUMNS, Row, Schema, read_row, schema_in
from mlx_gpt.errors import UserError
from mlx_gpt.packages import install


def read_parquet(path: Path, column: str, advance: Callable[[int], None]) -> Iterator[tuple[Row, str]]:
    """Yield the rows of a Parquet file, each with its place.

    Raises:
        UserError: as in `read_rows`.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"Reading {path} needs pyarrow: {install('parquet')}.") from error

    def holds_strings(kind: pa.DataType) -> bool:
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    def holds_strings_inside(kind: pa.DataType) -> bool:
        inside = [kind.field(i).type for i in range(kind.num_fields)]
        return any(holds_strings(item) or holds_strings_inside(item) for item in inside)

    def holds_objects(kind: pa.DataType) -> bool:
        return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type)

    try:
        with pq.ParquetFile(path) as file:
            arrow = file.schema_arrow
            nested = [field.name for field in arrow if holds_strings_inside(field.type)]
            strings = [field.name for field in arrow if holds_strings(field.type)]
            if len(set(arrow.names)) < len(arrow.names):
                raise UserError(f"{path} has two columns of one name: rename one of them.")
            lists = [field.name.lower() for field in arrow if holds_objects(field.type)]
            schema = schema_in([name.lower() for name in arrow.names], lists)
            if column or not schema:
                schema = None
                head = next(file.iter_batches(SAMPLE, columns=strings), None)
                values = {
                    each: [v for v in head[each].to_pylist() if v is not None] if head else [] for each in strings
                }
                columns = [text_column(path, arrow.names, values, column, nested)]
            else:
                columns = [
                    _lightest_part(file.metadata, name) if name.lower() in UNREAD else name
                    for name in arrow.names
                    if name.lower() in COLUMNS
                ]
            size_of_row = path.stat().st_size / max(1, file.metadata.num_rows)
            number = 0
            for batch in file.iter_batches(1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield _row(row, schema), f"{path}, row {number:,}"
                advance(int(size_of_row * len(batch)))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # pyarrow raises OSError for damaged content
        raise UserError(f"{path} is damaged or not Parquet ({str(error).splitlines()[0]}): export it again.") from error


def _lightest_part(metadata: Any, name: str) -> str:
    """Return the part of a column that is cheapest to read, such as the path of an image.

    Like the whole column, it shows which rows have a value.
    """
    sizes = Counter[str]()
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for part in map(group.column, range(group.num_columns)):
            if part.path_in_schema.split(".")[0] == name:
                sizes[part.path_in_schema] += part.total_compressed_size
    return min(sizes, key=lambda path: sizes[path], default=name)


def _row(row: dict[str, Any], schema: Schema | None) -> Row:
    """Return a row as a document, conversation or preference. Without a `schema`, its only column is the text."""
    if schema:
        return read_row(row, schema)
    [text] = row.values()
    return text if isinstance(text, str) else Dropped("not a string")
