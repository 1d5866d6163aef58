"""Every format reads to the same thing, and a broken row is named by file and line or counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from biscale_gym.traces import Trace, TraceError, read_trace, write_trace
from biscale_gym.traces.mooncake import spread_bins
from biscale_gym.traces.statistics import interarrival_cv
from biscale_gym.traces.timestamps import parse_stamps

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55"""

AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:01+00:00,2399,6
2024-05-10 02:00:02.509930+02:00,76,15
"""

BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,276,693,API log
"""

BURSTGPT_SESSIONS = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5.25,12,3.1,ChatGPT,472,18,490,Conversation log
45.5,,0.4,ChatGPT,1087,230,1317,Conversation log
"""

OWN = "arrival_s,prompt_tokens,output_tokens\n0.5,10,2\n1.25,20,3\n1.25,30,4\n"


def write(folder: Path, text: str, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "arrival_s", "prompt_tokens", "output_tokens"),
    [
        (AZURE_2023, [0.0, 4.314579, 4.541877], [374, 396, 879], [44, 109, 55]),
        (AZURE_2024, [0.0, 0.99007, 2.5], [2162, 2399, 76], [5, 6, 15]),
        (BURSTGPT, [0.0, 40.0, 113.0], [472, 1087, 417], [18, 230, 276]),
        (BURSTGPT_SESSIONS, [0.0, 40.25], [472, 1087], [18, 230]),
        (OWN, [0.5, 1.25, 1.25], [10, 20, 30], [2, 3, 4]),
        ("\ufeff" + OWN.replace("\n", "\r\n") + "\r\n\r\n", [0.5, 1.25, 1.25], [10, 20, 30], [2, 3, 4]),
        ("note,output_tokens,arrival_s,prompt_tokens\nx,2,0,10.0\n", [0.0], [10], [2]),
    ],
    ids=["azure-2023", "azure-2024", "burstgpt", "burstgpt-sessions", "own", "bom-crlf-blank-end", "column-order"],
)
def test_comma_separated_formats(
    tmp_path: Path, text: str, arrival_s: list[float], prompt_tokens: list[int], output_tokens: list[int]
) -> None:
    trace = read_trace(write(tmp_path, text))
    np.testing.assert_allclose(trace.arrival_s, arrival_s, rtol=0.0, atol=1e-9)
    np.testing.assert_array_equal(trace.prompt_tokens, prompt_tokens)
    np.testing.assert_array_equal(trace.output_tokens, output_tokens)
    assert trace.name == "t"
    assert trace.skipped_rows == 0


def test_mooncake(tmp_path: Path) -> None:
    records = [
        {"timestamp": stamp, "input_length": 100 + i, "output_length": 10 + i, "hash_ids": [0, i]}
        for i, stamp in enumerate([0, 0, 0, 2999, 2999, 6000])
    ]
    path = write(tmp_path, "\n".join(map(json.dumps, records)) + "\n", "m.jsonl")
    trace = read_trace(path)
    np.testing.assert_array_equal(trace.prompt_tokens, np.arange(100, 106))
    np.testing.assert_array_equal(trace.output_tokens, np.arange(10, 16))
    assert trace.arrival_s[0] == 0.0
    assert np.all(np.diff(trace.arrival_s) > 0.0)
    assert read_trace(path).hash == trace.hash


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=30))
def test_spreading_stays_within_the_bin(sizes: list[int]) -> None:
    stamps_s = np.repeat(3.0 * np.arange(len(sizes)), sizes)
    spread_s = spread_bins(stamps_s)
    assert np.all(np.diff(spread_s) >= 0.0)
    assert np.all((spread_s >= stamps_s) & (spread_s < stamps_s + 3.0))


def test_true_times_are_not_spread() -> None:
    arrival_s = np.cumsum(np.random.default_rng(1).exponential(0.3, 500)).round(3)
    np.testing.assert_array_equal(spread_bins(arrival_s), arrival_s)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("\n \n", "the file is empty"),
        ("arrival_s,prompt_tokens,output_tokens\n", "no request in it"),
        ("TIMESTAMP,ContextToken,GeneratedTokens\n1,2,3\n", r"t.csv:1: no column 'ContextTokens'; did you mean 'Conte"),
        (OWN + "2.0,5\n", "t.csv:5: 2 columns, expected 3"),
        (OWN + "2.0,5,6,7\n", "t.csv:5: 4 columns, expected 3"),
        (OWN + "\n2.0,5,6\n", "t.csv:5: 1 columns, expected 3"),
        (OWN + "2.0,five,6\n", "t.csv:5: not numbers: '2.0,five,6'"),
        (OWN + "2.0,5,0\n", "t.csv:5: output_tokens is 0, expected a whole number of at least 1"),
        (OWN + "2.0,-5,1\n", "t.csv:5: prompt_tokens is -5"),
        (OWN + "2.0,nan,1\n", "t.csv:5: prompt_tokens is nan"),
        (OWN + "2.0,2.5,1\n", "t.csv:5: prompt_tokens is 2.5"),
        (OWN + "nan,5,1\n", "t.csv:5: arrival_s is not a time"),
        (OWN + "soon,5,1\n", "t.csv:5: arrival_s is not a time"),
        (OWN + "1.0,5,1\n", "t.csv:5: arrival_s goes back by 0.25 s: the rows are not sorted"),
        (OWN.replace("0.5", "-0.5"), "t.csv:2: arrival_s is -0.5, expected a time >= 0"),
        (AZURE_2023.replace("18:15:51.2224670", "18:15:49.0"), "t.csv:4: TIMESTAMP goes back by 1.995169 s"),
        (AZURE_2023.replace("2023-11-16 18:15:50.9951690", "yesterday"), "t.csv:3: TIMESTAMP is not a time"),
        (BURSTGPT.replace(",230,", ",0,"), "t.csv:3: Response tokens is 0"),
        ('{"timestamp": 0, "input_length": 3}\n', "t.csv:1: key 'output_length' is missing"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 1}\n{"timesta', "t.csv:2: not a JSON object"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        read_trace(write(tmp_path, text))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(b"arrival_s,prompt_tokens,output_tokens\n\xff\xfe,1,1\n")
    with pytest.raises(TraceError, match="not a text file"):
        read_trace(tmp_path / "binary.csv")
    with pytest.raises(TraceError, match="no trace format 'azur'; did you mean 'azure'"):
        read_trace(write(tmp_path, OWN), "azur")
    with pytest.raises(TraceError, match="no column 'TIMESTAMP'"):
        read_trace(write(tmp_path, OWN), "azure")


def test_skipped_rows_are_counted(tmp_path: Path) -> None:
    rows = ["0,10,1", "1,0,1", "2,ten,1", "bad", "3,10,2", "2.5,10,3", "nan,1,1", "4,10,4"]
    trace = read_trace(write(tmp_path, "arrival_s,prompt_tokens,output_tokens\n" + "\n".join(rows)), skip_bad=True)
    np.testing.assert_array_equal(trace.arrival_s, [0.0, 3.0, 4.0])
    assert trace.skipped_rows == 5

    failed = read_trace(write(tmp_path, BURSTGPT.replace(",18,", ",0,")), skip_bad=True)
    np.testing.assert_array_equal(failed.arrival_s, [0.0, 73.0])
    assert failed.skipped_rows == 1

    with pytest.raises(TraceError, match="no request in it; all 1 rows are broken"):
        read_trace(write(tmp_path, "arrival_s,prompt_tokens,output_tokens\n1,0,0\n"), skip_bad=True)


def test_a_broken_line_far_into_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("biscale_gym.traces.tabular.BLOCK_LINES", 7)
    lines = [f"{i},{i + 1},1" for i in range(50)]
    lines[40] = "40,x,1"
    path = write(tmp_path, "arrival_s,prompt_tokens,output_tokens\n" + "\n".join(lines) + "\n\n\n")
    with pytest.raises(TraceError, match=r"t\.csv:42: not numbers"):
        read_trace(path)
    assert len(read_trace(path, skip_bad=True)) == 49


traces = st.builds(
    lambda rows: Trace(
        np.sort([row[0] for row in rows]), np.array([row[1] for row in rows]), np.array([row[2] for row in rows])
    ),
    st.lists(st.tuples(st.floats(0.0, 1e6), st.integers(1, 200_000), st.integers(1, 5_000)), min_size=1, max_size=30),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trace=traces, suffix=st.sampled_from([".csv", ".parquet"]))
def test_written_traces_read_back_exactly(tmp_path: Path, trace: Trace, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    write_trace(trace, tmp_path / f"t{suffix}")
    assert read_trace(tmp_path / f"t{suffix}").hash == trace.hash
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


def test_writing_fails_clearly(tmp_path: Path) -> None:
    trace = Trace(np.array([0.0]), np.array([1]), np.array([1]))
    with pytest.raises(TraceError, match=r"no format to write with suffix '.cvs'; did you mean '.csv'"):
        write_trace(trace, tmp_path / "t.cvs")
    with pytest.raises(TraceError, match="cannot be written"):
        write_trace(trace, tmp_path / "absent" / "t.csv")


def test_parquet_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    parquet.write_table(
        pyarrow.table({"arrival_s": [0.0, 1.0], "prompt_tokens": [1, 0], "output_tokens": [1, 1]}), path
    )
    with pytest.raises(TraceError, match=r"t\.parquet:row 2: prompt_tokens is 0"):
        read_trace(path)
    assert read_trace(path, skip_bad=True).skipped_rows == 1
    parquet.write_table(pyarrow.table({"arrival": [0.0]}), path)
    with pytest.raises(TraceError, match="no column 'arrival_s'; did you mean 'arrival'"):
        read_trace(path)
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(TraceError, match="not a readable Parquet file"):
        read_trace(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TraceError, match=r"pip install 'biscale-gym\[parquet\]'"):
        read_trace(path)


@pytest.mark.parametrize(
    ("stamp", "expected"),
    [
        (b"2024-05-10 00:00:00.009930+00:00", "2024-05-10T00:00:00.009930"),
        (b"2024-05-10T00:00:00Z", "2024-05-10T00:00:00"),
        (b"2024-05-10 05:30:00.5+05:30", "2024-05-10T00:00:00.5"),
        (b"2024-05-09 19:00:00-05:00", "2024-05-10T00:00:00"),
        (b"2024-05-10", "NaT"),
        (b"now", "NaT"),
        (b"", "NaT"),
        (b"2024-05-10 00:00:00+0:00", "NaT"),
        (b"2024-05-10 25:00:00", "NaT"),
        (b"2024-05-10 00:00:00 or so", "NaT"),
    ],
)
def test_stamps(stamp: bytes, expected: str) -> None:
    parsed = parse_stamps(np.array([stamp, b"2024-01-01 00:00:00"])).astype("datetime64[ns]")
    np.testing.assert_array_equal(parsed, np.array([expected, "2024-01-01T00:00:00"], dtype="datetime64[ns]"))


def test_real_azure_conversation_trace(shared_data: Path) -> None:
    trace = read_trace(shared_data / "traces" / "AzureLLMInferenceTrace_conv.csv")
    assert len(trace) == 19_366
    assert trace.rate_rps == pytest.approx(5.53, abs=0.005)
    assert trace.prompt_tokens.mean() == pytest.approx(1155, abs=1)
    assert trace.output_tokens.mean() == pytest.approx(211, abs=1)
    assert interarrival_cv(trace) == pytest.approx(1.09, abs=0.005)


def test_real_mooncake_trace(shared_data: Path) -> None:
    trace = read_trace(shared_data / "traces" / "mooncake_conversation_trace.jsonl")
    assert len(trace) == 12_031
    assert trace.rate_rps == pytest.approx(3.40, abs=0.005)
    assert trace.prompt_tokens.mean() == pytest.approx(12_035, abs=1)
    # Spread over their bins, the arrivals are as irregular as Poisson within a bin; as stamped, the CV is 3.
    assert interarrival_cv(trace) == pytest.approx(1.0, abs=0.05)
