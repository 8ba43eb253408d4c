import pyarrow as pa

from mamba_dist.data.preparation.table_columns import ColumnValues


def test_another_dictionary_of_as_many_values_is_measured_anew() -> None:
    first, second = (pa.array(texts).dictionary_encode() for texts in (["a", "b"], ["ccc", "dd"]))
    before = ColumnValues(first, most_bytes=9)
    column = ColumnValues(second, most_bytes=9, before=before)
    assert column.sizes(0, 2).tolist() == [3, 2]
    assert column.read(0, 2) == ["ccc", "dd"]
    again = ColumnValues(second.slice(1), most_bytes=9, before=column)
    assert again.sizes(0, 1).tolist() == [2]
