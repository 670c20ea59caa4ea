"""CSV as the report writes it: each column keeps its type, whatever values it happens to hold.

Texts are always quoted, with a `'` before what a spreadsheet would run as a formula. Numbers aren't: those of a column of floats
have a point or an exponent also where they are whole, and those of a column of integers never. What is missing is empty. Lists, which
CSV lacks, are texts separated by `; `. `dtypes` tells a reader the types, in which even an empty column keeps its own.
"""

import pyarrow as pa
import pyarrow.compute as pc

SEPARATOR = "; "
FORMULA = (
    "^([=+@\\-\t\r\n\uff1d\uff0b\uff0d\uff20])"  # how a text starts that spreadsheets run, also in full width
)


def header(schema: pa.Schema) -> bytes:
    """The first line."""
    return (",".join(f'"{name}"' for name in schema.names) + "\n").encode()


def lines(table: pa.Table) -> bytes:
    """A table's lines, without the header."""
    if not len(table):
        return b""
    cells = [_cells(column.combine_chunks()) for column in table.columns]
    joined = pc.binary_join_element_wise(*cells, ",", null_handling="replace", null_replacement="")
    return ("\n".join(joined.to_pylist()) + "\n").encode()


def dtypes(schema: pa.Schema) -> dict[str, str]:
    """Each column's type in the CSV file, as pandas names it: what `pandas.read_csv` takes as `dtype`."""
    return {field.name: _dtype(field.type) for field in schema}


def _dtype(kind: pa.DataType) -> str:
    if pa.types.is_integer(kind):
        return "Int64"
    if pa.types.is_floating(kind):
        return "Float64"
    return "boolean" if pa.types.is_boolean(kind) else "string"


def _cells(column: pa.Array) -> pa.Array:
    """A column's cells, as they stand in the file."""
    kind = column.type
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if pa.types.is_list(kind):
        column, kind = pc.binary_join(column, SEPARATOR), pa.string()
    text = pc.cast(column, pa.string())
    if pa.types.is_floating(kind):
        whole = pc.match_substring_regex(text, r"^-?\d+$")
        return pc.if_else(whole, pc.binary_join_element_wise(text, ".0", ""), text)
    if pa.types.is_string(kind):
        text = pc.replace_substring_regex(text, FORMULA, r"'\1")
        text = pc.replace_substring(text, '"', '""')
        return pc.binary_join_element_wise('"', text, '"', "")
    return text
