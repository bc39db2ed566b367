"""Read the rows of a Parquet file."""

from collections.abc import Callable, Iterator
from pathlib import Path

from mlx_gpt.data.rows import SAMPLE, Dropped, text_column
from mlx_gpt.errors import UserError
from mlx_gpt.packages import install


def read_parquet(path: Path, column: str, advance: Callable[[int], None]) -> Iterator[str | Dropped]:
    """Yield the documents of a Parquet file.

    Raises:
        UserError: as in `read_documents`.
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

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            nested = [field.name for field in schema if holds_strings_inside(field.type)]
            strings = [field.name for field in schema if holds_strings(field.type)]
            if len(set(schema.names)) < len(schema.names):
                raise UserError(f"{path} has two columns of one name: rename one of them.")
            head = next(file.iter_batches(SAMPLE, columns=strings), None)
            values = {name: [v for v in head[name].to_pylist() if v is not None] if head else [] for name in strings}
            name = text_column(path, schema.names, values, column, nested)
            size_of_row = path.stat().st_size / max(1, file.metadata.num_rows)
            number = 0
            for batch in file.iter_batches(1024, columns=[name]):
                for text in batch[name].to_pylist():
                    number += 1
                    yield text if isinstance(text, str) else Dropped("not a string", f"{path}, row {number:,}")
                advance(int(size_of_row * len(batch)))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # pyarrow raises OSError for damaged content
        raise UserError(f"{path} is damaged or not Parquet ({str(error).splitlines()[0]}): export it again.") from error
